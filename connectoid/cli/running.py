"""The store of a command, its contacts, and their runner."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence

import connectoid
from connectoid import (
    AiortcAdapter,
    Channel,
    Connectoid,
    ContactRecord,
    NotConnectedError,
    Store,
)
from connectoid.cli.telling import Teller
from connectoid.operating_system import data_file

ENVIRONMENT = os.environ.get
# Empty where nobody is at home: then a command that needs a store asks for --store.
DEFAULT_STORE = ENVIRONMENT("CONNECTOID_STORE") or data_file("connectoid", "contacts.db")


# No other app opens the links of this one. It is no setting: a command line that claimed to be
# another app would pair with it, and could say nothing to it.
APP = "connectoid.cli"

# The commands tell these themselves.
SILENT = ("connected", "disconnected")


class EndedError(NotConnectedError):
    """The contact of a command has ended; `why` is a key of EVENTS."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(words_of(name, why))
        self.name = name
        self.why = why


def words_of(name: str, event: str) -> str:
    """Return an event of a contact in words."""
    if event == "unshared":
        return f"{name} has ended the sharing."
    if event == "refused":
        return (
            f"{name}: something that came for this contact was refused, and changed nothing."
            " `connectoid contacts --verbose` says why.")
    return f"{name}: {connectoid.EVENTS[event]}"


def outlook_of(runner: Connectoid, name: str, event: str) -> str:
    """Return what an event without a connection leads to: the reason, and when it goes on."""
    if event not in ("unsent", "unreachable"):
        return ""
    try:
        progress = runner.progress(name)
    except (connectoid.ConnectoidError, ConnectionError):
        # It has ended meanwhile.
        return ""
    words = " Trying again now."
    if progress.again_at_s is not None:
        at = time.strftime("%H:%M", time.localtime(progress.again_at_s))
        words = f" Trying again at {at}, or as soon as this network changes."
    if event == "unsent" and progress.trouble:
        words = f" {progress.trouble}{words}"
    return words


def command_for(arguments: argparse.Namespace, *words: str) -> str:
    """Return a command that a user can paste, for the store of this one."""
    argv = ["connectoid", *words]
    if arguments.store != DEFAULT_STORE:
        argv += ["--store", arguments.store]
    return shlex.join(argv)


@contextlib.contextmanager
def running(arguments: argparse.Namespace, teller: Teller) -> Iterator[Connectoid]:
    """Run the store's contacts for the time of a command."""

    def on_event(name: str, event: str) -> None:
        if event == "paired":
            teller.say(event, "", contact=name)
        elif event not in SILENT:
            words = words_of(name, event) + outlook_of(runner, name, event)
            teller.say(event, words, contact=name)

    store = Store(arguments.store, passphrase_of(arguments))
    with contextlib.closing(store):
        relays = [(url, arguments.ext, arguments.send_ext) for url in arguments.relay]
        webrtc = None
        if arguments.command not in ("renew", "unshare"):
            webrtc = AiortcAdapter()
        runner = Connectoid(
            store, relays, webrtc, on_event=on_event,
            ice_servers=arguments.ice_server, allow_http=arguments.allow_http,
            ca_file=arguments.ca, app=APP)
        runner.allow_private_relays = arguments.allow_private_relays
        with runner:
            yield runner


def connect(runner: Connectoid, arguments: argparse.Namespace, teller: Teller) -> Channel:
    """Return a channel to the contact of a command."""
    name = arguments.name
    find(runner.contacts(), arguments)
    teller.say("waiting", f"Waiting for {name} ... (Ctrl-C ends)", contact=name)
    try:
        channel = runner.connect(name, arguments.timeout)
    except NotConnectedError:
        why = find(runner.contacts(), arguments).why
        if why:
            raise EndedError(name, why) from None
        raise
    teller.say("connected", f"Connected with {name}.", contact=name)
    return channel


def find(contacts: Sequence[ContactRecord], arguments: argparse.Namespace) -> ContactRecord:
    """Return the contact of a command; raise UsageError."""
    for record in contacts:
        if record.name == arguments.name:
            return record
    raise connectoid.UsageError(
        f"There is no contact {arguments.name!r} in {arguments.store}.")


def check_relays(arguments: argparse.Namespace) -> None:
    """Raise UsageError if a command that needs relays has none."""
    if not arguments.relay:
        raise connectoid.UsageError("No relay: give --relay URL, or set CONNECTOID_RELAY.")


def read_contacts(arguments: argparse.Namespace) -> list[ContactRecord]:
    """Return the contacts of a store that another command may be using."""
    return [record for record, _ in read_contacts_and_refusals(arguments)]


def read_contacts_and_refusals(
    arguments: argparse.Namespace,
) -> list[tuple[ContactRecord, Mapping[str, int]]]:
    """Return each contact with how often something of it was refused, by reason."""
    if not os.path.exists(arguments.store):
        return []
    store = Store(arguments.store, passphrase_of(arguments), lock=False)
    with contextlib.closing(store):
        refusals = store.load_refusals()
        return [
            (record, refusals.get(number, {}))
            for number, record in store.load().items()
            if record.state != "unshared"
        ]


def passphrase_of(arguments: argparse.Namespace) -> str | None:
    """Return the store's passphrase, if it has one."""
    if arguments.passphrase_file:
        return read_passphrase(arguments.passphrase_file)
    return ENVIRONMENT("CONNECTOID_PASSPHRASE") or None


def read_passphrase(path: str) -> str:
    """Return the passphrase that a file holds; raise OSError, UnicodeError."""
    return pathlib.Path(path).read_text(encoding="utf-8").rstrip("\n")
