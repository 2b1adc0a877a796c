"""Commands for contacts that are there: `contacts`, `verify`, `move`, `renew`, `unshare`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import connectoid
from connectoid import ContactRecord, Store
from connectoid.cli.running import (
    check_relays,
    command_for,
    connect,
    find,
    passphrase_of,
    read_contacts,
    read_contacts_and_refusals,
    running,
)
from connectoid.cli.telling import COMPARE, Teller, emoji_of, show_emoji

# For a relay to take the word that a sharing has ended.
TELL_S = 10.0

STATES = {
    "invited": "not opened yet",
    "welcomed": "opened, not yet connected",
    "opened": "not answered yet",
    "ready": "answered, not yet connected",
    "paired": "shared",
    "ended": "ended",
}

# What to do about news of a contact's key.
KEY_WARNINGS = {
    "renewed":
        "has a new key: ask by voice whether that was wanted, then mark it with `verify --same`",
    "copied": "two devices say that they are this contact: unshare, and share again",
}

# How to show what did not count, and for which nothing is wrong: a word for each of ROUTINE.
ROUTINE_WORDS = {
    "replay": "copies of messages that came before, as relays and mailboxes often deliver them",
    "replaced": "late messages signed by the key that the contact has replaced",
}


class Row(NamedTuple):
    """What people see of a contact."""

    name: str
    state: str
    # What came of the comparison.
    outcome: str
    warning: str


def list_contacts(arguments: argparse.Namespace, teller: Teller) -> int:
    """List the contacts with their states."""
    found = read_contacts_and_refusals(arguments)
    if not found:
        teller.remark(f"No contacts in {arguments.store}.")
    rows = [row_of(record) for record, _ in found]
    for (record, refusals), row in zip(found, show_rows(rows), strict=True):
        shown = row
        if arguments.verbose:
            shown += show_refusals(refusals)
        teller.say(
            "contact", "", result=shown,
            contact=record.name, state=record.state, why=record.why or None,
            verified=record.verified, differs=record.differs,
            renewing=bool(record.old_signer), moving=record.is_moving,
            key_news=record.key_news or None,
            opened_twice=bool(record.used_to), **sorted_out(refusals))
    return 0


def sorted_out(refusals: Mapping[str, int]) -> dict[str, Mapping[str, int]]:
    """Return what was refused apart from that for which nothing is wrong."""
    routine = {reason: count for reason, count in refusals.items() if reason in connectoid.ROUTINE}
    refused = {reason: count for reason, count in refusals.items() if reason not in routine}
    return {"refused": refused, "routine": routine}


def show_refusals(refusals: Mapping[str, int]) -> str:
    """Return, in lines to follow a contact, how often what was refused, and why."""
    parts = sorted_out(refusals)
    lines = [
        f"refused as {reason}: {count:,} ({connectoid.REASONS[reason]})"
        for reason, count in sorted(parts["refused"].items())]
    lines += [
        f"normal: {count:,} {ROUTINE_WORDS[reason]}"
        for reason, count in sorted(parts["routine"].items())]
    return "".join(f"\n    {line}" for line in lines)


def show_rows(rows: Sequence[Row]) -> list[str]:
    """Return rows as text: in columns on a terminal, with tabs for a pipe."""
    if not sys.stdout.isatty():
        return ["\t".join(filter(None, row)) for row in rows]
    name_chars = max((len(row.name) for row in rows), default=0)
    state_chars = max((len(row.state) for row in rows), default=0)
    shown = []
    for row in rows:
        text = f"{row.name:{name_chars}}  {row.state:{state_chars}}  {row.outcome}"
        if row.warning:
            text += f"\n    {row.warning}"
        shown.append(text)
    return shown


def row_of(record: ContactRecord) -> Row:
    """Return what people see of a contact."""
    state = STATES[record.state]
    if record.why:
        state = connectoid.EVENTS[record.why]
    if record.old_signer:
        state += ", renewal not answered yet"
    if record.is_moving:
        state += ", move not answered yet"
    return Row(record.name, state, outcome_of(record), warning_of(record))


def warning_of(record: ContactRecord) -> str:
    """Return what the user has to look into before trusting a contact, or nothing."""
    if record.key_news:
        return KEY_WARNINGS[record.key_news]
    if record.used_to and not record.verified:
        return "opened by somebody else too: compare before you trust"
    return ""


def outcome_of(record: ContactRecord) -> str:
    """Return what came of the comparison."""
    if not record.comparison:
        return "-"
    if record.differs:
        return "does not match: unshare"
    if record.verified:
        return "verified"
    return "not verified"


def verify(arguments: argparse.Namespace, teller: Teller) -> int:
    """Show what to compare, or mark what has come of it."""
    record = find(read_contacts(arguments), arguments)
    if not record.comparison:
        why = connectoid.EVENTS.get(record.why)
        raise connectoid.UsageError(why or "There is nothing to compare: no answer yet.")
    if arguments.same is not None:
        mark(arguments, teller)
        return 0
    teller.say(
        "compare", COMPARE, result=show_emoji(record),
        contact=record.name, emoji=emoji_of(record), verified=record.verified,
        differs=record.differs)
    return 0


def mark(arguments: argparse.Namespace, teller: Teller) -> None:
    """Write the outcome of a comparison into the store."""
    name = arguments.name
    with contextlib.closing(Store(arguments.store, passphrase_of(arguments))) as store:
        contacts = store.load()
        number = next(number for number, record in contacts.items() if record.name == name)
        store.save(number, contacts[number].compared(same=arguments.same))
    if arguments.same:
        teller.say("verified", f"{name} is marked as verified.", contact=name)
    else:
        command = command_for(arguments, "unshare", name)
        words = f"The emoji differ: somebody may read along. End it: {command}"
        teller.say("not_verified", words, contact=name)


def move(arguments: argparse.Namespace, teller: Teller) -> int:
    """Be reached through the relays of --relay from now on, and wait until the contact knows."""
    check_relays(arguments)
    name = arguments.name
    with running(arguments, teller) as runner:
        find(runner.contacts(), arguments)
        runner.move(name)
        teller.say("telling", f"Telling {name} ...", contact=name)
        try:
            connect(runner, arguments, teller)
        except TimeoutError as error:
            raise TimeoutError(f"{error} {name} has not confirmed the new relays yet.") from None
        relays = " ".join(arguments.relay)
        teller.say("moved", f"{name} now reaches you through {relays}.", contact=name)
    return 0


def renew(arguments: argparse.Namespace, teller: Teller) -> int:
    """Have a new signing key for a contact, and wait until the contact knows it."""
    name = arguments.name
    with running(arguments, teller) as runner:
        record = find(runner.contacts(), arguments)
        words = f"Telling {name} ... (Ctrl-C ends)"
        if record.old_signer:
            words = f"{name} has not answered the last renewal yet. {words}"
        teller.say("telling", words, contact=name)
        # With it `renewed` is told.
        is_told = runner.renew_and_tell(name, arguments.timeout)
    if not is_told:
        command = command_for(arguments, "renew", name)
        raise TimeoutError(
            f"{name} has not answered. Until then copies of this store still count: {command}")
    return 0


def unshare(arguments: argparse.Namespace, teller: Teller) -> int:
    """End the sharing with a contact, who is told."""
    name = arguments.name
    timeout_s = arguments.timeout
    if timeout_s is None:
        timeout_s = TELL_S
    with running(arguments, teller) as runner:
        find(runner.contacts(), arguments)
        is_told = runner.unshare_and_tell(name, timeout_s)
    if is_told:
        teller.say("left", f"The sharing with {name} has ended.", contact=name, told=True)
        return 0
    words = (
        f"You no longer share with {name}. {name} has not been told yet: no relay has"
        f" taken the message. Later commands with this store tell {name}, for 30 days."
    )
    teller.say("left", words, contact=name, told=False)
    return 1
