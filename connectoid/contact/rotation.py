"""Addresses of one's own: making, announcing and replacing them.

PROTOCOL.md, "Rotation".
"""

from __future__ import annotations

from dataclasses import replace

from connectoid.contact.effects import Now
from connectoid.contact.machine import Machine
from connectoid.contact.record import OwnAddress, Relays, urls_of
from connectoid.errors import Refused, UsageError
from connectoid.limits import DAY_US, MAX_FORMER, MAX_REPLACED, NEVER_US, ROTATION_US
from connectoid.links import Mailbox, format_address
from connectoid.suite import Suite, check_address


def make_address(suite: Suite, relays: Relays, *, allow_http: bool) -> OwnAddress:
    """Return a new address with a key for each relay; raise UsageError for bad relays."""
    if not relays:
        raise UsageError("No relay is given.")
    keys: list[str] = []
    mailboxes: list[Mailbox] = []
    for url, ext in relays:
        key, pub = suite.make_key()
        keys.append(key)
        mailboxes.append(Mailbox(pub, url, ext))
    try:
        address = format_address(mailboxes)
        check_address(suite, address, allow_http=allow_http)
    except (Refused, UnicodeEncodeError) as error:
        raise UsageError(f"The address of these relays cannot be used: {error}.") from None
    return OwnAddress(address, tuple(keys))


def rotate(machine: Machine, relays: Relays | None = None) -> None:
    """Make a pending address, at the given relays or the old ones.

    One that was pending before stays polled, as the contact may know no newer one. Raise UsageError
    for bad relays, or if MAX_REPLACED addresses wait for the contact already, or more than
    MAX_FORMER were left too lately to go.
    """
    record = machine.record
    if relays is None:
        relays = machine.as_shown(record.relays)
    replaced = record.replaced
    if record.pending is not None:
        replaced = (*replaced, record.pending)
    if len(replaced) > MAX_REPLACED:
        raise UsageError(
            "This contact has not answered your last changes. Wait until you have been "
            "connected, or share again."
        )
    if len(_left_lately(machine)) > MAX_FORMER:
        raise UsageError(
            "The addresses of this contact have changed too often lately. Wait for a month, or "
            "share again."
        )
    pending = make_address(machine.suite, relays, allow_http=machine.allow_http)
    machine.keep(
        pending=pending,
        replaced=replaced,
        relays=relays,
        rotated_us=machine.now.wall_us,
    )
    note_new(machine, pending, machine.now)


def note_named(machine: Machine) -> None:
    """Note that the user has named the relays, and forget those where no address is any more."""
    record = machine.record
    named = dict.fromkeys((*record.named_relays, *urls_of(record.relays)))
    used = {mailbox.url for own in record.addresses for mailbox in own.mailboxes}
    machine.keep(named_relays=tuple(url for url in named if url in used))


def rotate_if_due(machine: Machine) -> None:
    """Make a pending address if there is none and the current one is old.

    What comes to a mailbox has no say in this: a copy of the contact's device could fill it, hear
    of each new address, and so make this side leave the one that the contact's owner knows.
    """
    record = machine.record
    if record.pending is None and record.relays and is_old(machine):
        rotate(machine)


def longest_address(machine: Machine) -> int:
    """Return the characters of the longest address that a message of now may announce."""
    record = machine.record
    lengths = [len(own.address) for own in record.addresses]
    # A new one is as long as one with another key.
    again = [Mailbox(record.signer, url, ext) for url, ext in machine.as_shown(record.relays)]
    return max([len(format_address(again)), *lengths])


def is_due(machine: Machine) -> bool:
    """Return whether the time has come to announce a new address, or the pending one again."""
    record = machine.record
    if record.pending is None:
        return bool(record.relays) and is_old(machine)
    age_us = machine.now.wall_us - record.rotated_us
    return not 0 <= age_us < DAY_US


def is_old(machine: Machine) -> bool:
    """Return whether the address is old, or was made by a clock that was ahead or by none."""
    age_us = machine.now.wall_us - machine.record.rotated_us
    return not 0 <= age_us < ROTATION_US


def take_into_use(machine: Machine, own: OwnAddress) -> None:
    """Make an address current if it is newer than that one: the contact has written to it.

    Those that are older become former ones. A copy of the contact's device may have written here,
    and its owner may know any of those. So each stays until the next address comes into use, and
    for 30 days at least.
    """
    record = machine.record
    waiting = record.replaced
    if record.pending is not None:
        waiting = (*waiting, record.pending)
    if own not in waiting:
        return
    place = waiting.index(own)
    newer = waiting[place + 1 :]
    left = waiting[:place]
    if record.current is not None:
        left = (record.current, *left)
    machine.keep(
        current=own,
        pending=record.pending if newer else None,
        replaced=newer[:-1],
        former=(
            *_left_lately(machine),
            *(replace(older, left_us=machine.now.wall_us) for older in left),
        ),
        rotated_us=machine.now.wall_us,
    )


def _left_lately(machine: Machine) -> tuple[OwnAddress, ...]:
    """Return the former addresses that have to stay: those that were left lately."""
    now_us = machine.now.wall_us
    return tuple(
        own for own in machine.record.former if 0 <= now_us - own.left_us < ROTATION_US)


def leave_invitation(machine: Machine) -> None:
    """Keep nothing of the invitation: nobody can open the link any more, and the contact stays."""
    machine.keep(
        invitation="",
        r="",
        welcome="",
        invited=None,
        link_private_key="",
        link_signer="",
        expires_us=NEVER_US,
    )


def note_new(machine: Machine, own: OwnAddress, now: Now) -> None:
    """Note that the mailboxes of a new address hold nothing older than now."""
    for mailbox in own.mailboxes:
        machine.box(mailbox.pub).read_s = now.monotonic_s
