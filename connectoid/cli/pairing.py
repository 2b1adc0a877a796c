"""Commands that make a contact: `share` and `open`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

import connectoid
from connectoid import Connectoid
from connectoid.cli.running import APP, check_relays, command_for, connect, find, running
from connectoid.cli.telling import COMPARE, Teller, emoji_of, show_emoji

# For the last word of a pairing, and between two looks whether it came.
READY_S = 5.0
LOOK_EVERY_S = 0.05
# Lines of a terminal for the words around a QR code.
WORDS_LINES = 6
# Empty modules around a QR code, as its standard wants them.
QR_BORDER = 4


def share(arguments: argparse.Namespace, teller: Teller) -> int:
    """Print a link for a new contact, and wait until the other has opened it."""
    name = arguments.name
    with running(arguments, teller) as runner:
        link = link_for(runner, arguments)
        teller.remark(f"Send this link to {name} alone: whoever opens it first is your contact.")
        if not arguments.json:
            show_qr(link)
        teller.say("link", "", result=link, link=link, contact=name)
        try:
            return finish_pairing(runner, arguments, teller)
        except TimeoutError as error:
            if find(runner.contacts(), arguments).state != "invited":
                raise
            again = command_for(arguments, "share", name)
            raise TimeoutError(f"{error} `{again}` shows the link again.") from None
        except KeyboardInterrupt:
            teller.interrupt()
            record = find(runner.contacts(), arguments)
            if record.state == "invited":
                teller.remark(f"The link stays good until {date_of(record.expires_us)}.")
            return 130


def date_of(time_us: int) -> str:
    """Return a date for people."""
    return time.strftime("%d %B %Y", time.localtime(time_us // 1_000_000)).lstrip("0")


def link_for(runner: Connectoid, arguments: argparse.Namespace) -> str:
    """Return a new link, or the one that was made before and that nobody has opened yet."""
    for record in runner.contacts():
        if record.name == arguments.name and record.state == "invited":
            return connectoid.make_link(arguments.app_url, record.invitation)
    check_relays(arguments)
    return runner.share(arguments.name, arguments.app_url)


def open_link(arguments: argparse.Namespace, teller: Teller) -> int:
    """Open somebody's link, and wait until both are connected."""
    if arguments.link == "-":
        arguments.link = sys.stdin.readline()
    invitation = connectoid.read_link(arguments.link, allow_http=arguments.allow_http)
    # Before the question: nobody agrees to what cannot be.
    connectoid.app_of_contact(invitation, APP)
    mailboxes = connectoid.parse_address(invitation.address, allow_http=True)
    # Whole: the end of a long name says whose it is.
    urls = [mailbox.url for mailbox in mailboxes]
    relays = ", ".join(connectoid.shown(url, len(url)) for url in urls)
    if not arguments.yes and not is_wanted(arguments.name, relays):
        teller.remark("Not opened. The link is still good.")
        return 1
    with running(arguments, teller) as runner:
        name = runner.open(arguments.link, arguments.name)
        if name != arguments.name:
            teller.say("known", f"You have opened this link before, as {name}.", contact=name)
            arguments.name = name
        return finish_pairing(runner, arguments, teller)


def is_wanted(name: str, relays: str) -> bool:
    """Ask whether to connect with a contact; raise UsageError where nobody can answer."""
    if not sys.stdin.isatty():
        raise connectoid.UsageError(
            f"Not a terminal: give --yes to connect with {name} through {relays}.")
    question = f"Connect with {name}, through {relays}? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def finish_pairing(runner: Connectoid, arguments: argparse.Namespace, teller: Teller) -> int:
    """Wait for the first connection, and show what to compare."""
    channel = connect(runner, arguments, teller)
    until_s = time.monotonic() + READY_S
    record = find(runner.contacts(), arguments)
    while record.state not in ("paired", "ended") and time.monotonic() < until_s:
        time.sleep(LOOK_EVERY_S)
        record = find(runner.contacts(), arguments)
    command = command_for(arguments, "verify", record.name, "--same")
    shown = show_emoji(record, margin="    ")
    words = f"{COMPARE}\n\n{shown}\n\nIf they are the same: {command}"
    teller.say("compare", words, contact=record.name, emoji=emoji_of(record))
    channel.close()
    return 0


def show_qr(link: str) -> None:
    """Draw a link as a QR code, if the package segno is there and the terminal is large enough."""
    if not sys.stderr.isatty():
        return
    try:
        # An extra.
        segno = importlib.import_module("segno")
    except ImportError:
        print("(For a QR code: pip install 'connectoid[cli]')", file=sys.stderr)
        return
    code = segno.make(link, micro=False)
    columns, rows = code.symbol_size(border=QR_BORDER)
    if not has_room(columns, (rows + 1) // 2 + WORDS_LINES):
        print("(Enlarge the window for a QR code.)", file=sys.stderr)
        return
    code.terminal(out=sys.stderr, border=QR_BORDER, compact=True)


def has_room(columns: int, lines: int) -> bool:
    """Return whether the terminal shows so many columns and lines."""
    size = os.get_terminal_size(sys.stderr.fileno())
    return columns <= size.columns and lines <= size.lines
