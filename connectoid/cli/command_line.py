"""The command line: its commands, its flags, and how it ends."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import connectoid
from connectoid import ConnectoidError
from connectoid.cli.chat import chat
from connectoid.cli.contacts import list_contacts, move, renew, unshare, verify
from connectoid.cli.devices import export, import_
from connectoid.cli.doctor import doctor
from connectoid.cli.files import receive, send
from connectoid.cli.inbox import MAX_BYTES
from connectoid.cli.pairing import open_link, share
from connectoid.cli.running import DEFAULT_STORE, ENVIRONMENT, EndedError
from connectoid.cli.telling import Teller, in_flags, telling_warnings
from connectoid.ice import check_ice_servers, has_turn, load_ice_servers, parse_ice_servers
from connectoid.operating_system import speak_utf8

# Each gets the arguments and returns the exit code.
COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace, Teller], int], str]] = {
    "share": (share, "make a link for a new contact, and wait until it is opened"),
    "open": (open_link, "open a link that somebody sent you"),
    "contacts": (list_contacts, "list the contacts (works while another command runs)"),
    "verify": (
        verify,
        "show the seven emoji to compare (works while another command runs), or record the outcome"
        " with --same or --different (needs a store that no other command is using)",
    ),
    "move": (move, "have a contact reach you through other relays from now on"),
    "renew": (
        renew,
        "give a contact a new key of yours, so that it accepts nothing more from copies of this"
        " store",
    ),
    "unshare": (unshare, "stop sharing with a contact, and tell them so"),
    "chat": (chat, "chat with a contact, line by line"),
    "send": (send, "send files to a contact who is running `receive`"),
    "receive": (receive, "receive files from a contact who is running `send`"),
    "export": (export, "write all contacts to a file, to take them to another device"),
    "import": (import_, "add the contacts from an exported file"),
    "doctor": (doctor, "check relays and this network, and say what can connect to what"),
}

# These make a store where there is none. Those that only read find nobody in it.
MAKES_STORE = ("share", "open", "import")
READS_ONLY = ("contacts", "verify")
NEEDS_NO_STORE = ("doctor",)


def seconds(text: str) -> float:
    """Return a time to wait; raise ValueError, which argparse words."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """Return a number of bytes; raise ValueError, which argparse words."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def ice_server_url(text: str) -> str:
    """Return the URL of a STUN server."""
    if has_turn([text]):
        raise argparse.ArgumentTypeError(
            "a TURN server needs a username and a credential; other users see flags, so put them"
            " into the file of --ice-servers")
    try:
        check_ice_servers([text])
    except connectoid.UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def ice_servers_file(path: str) -> list[Any]:
    """Return the servers in a file."""
    try:
        return load_ice_servers(path)
    except connectoid.UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


SHARED: Mapping[str, dict[str, Any]] = {
    "relay": {
        "action": "append",
        "metavar": "URL",
        "default": [],
        "help": "a relay for new contacts and for `move`; may be given three times"
        " (default: $CONNECTOID_RELAY)",
    },
    "ext": {
        "metavar": "KEY",
        "default": ENVIRONMENT("CONNECTOID_EXT"),
        "help": "what these relays ask for, such as an API key; all of them get the same, so name"
        " only relays that may know it (default: $CONNECTOID_EXT, which other users of this"
        " machine do not see)",
    },
    "send-ext": {
        "metavar": "KEY",
        "default": ENVIRONMENT("CONNECTOID_SEND_EXT"),
        "help": "the send-only half of that API key, which links carry instead of --ext"
        " (default: $CONNECTOID_SEND_EXT)",
    },
    "store": {
        "metavar": "FILE",
        "default": DEFAULT_STORE,
        "help": "where contacts are kept (default: $CONNECTOID_STORE, or %(default)s)",
    },
    "passphrase-file": {
        "metavar": "FILE",
        "help": "a file with the passphrase of the store (or $CONNECTOID_PASSPHRASE)",
    },
    "ice-server": {
        "metavar": "URL",
        "type": ice_server_url,
        "action": "append",
        "default": [],
        "help": "a STUN server, stun:HOST:PORT, in addition to those of the relays; may be"
        " repeated",
    },
    "ice-servers": {
        "metavar": "FILE",
        "type": ice_servers_file,
        "default": [],
        "help": "a JSON file that only you can read, with a list of STUN and TURN servers:"
        ' [{"urls": "turn:HOST:PORT", "username": ..., "credential": ...}]'
        " (or the same text in $CONNECTOID_ICE_SERVERS)",
    },
    "ca": {
        "metavar": "FILE",
        "help": "certificates (PEM) to trust in addition to the system's, such as that of your own"
        " relay ($SSL_CERT_FILE replaces the system's)",
    },
    "allow-http": {
        "action": "store_true",
        "help": "also use relays on other machines without HTTPS",
    },
    "allow-private-relays": {
        "action": "store_true",
        "help": "also use relays on this machine and in private networks that somebody else,"
        " and not you, has named",
    },
    "timeout": {
        "type": seconds,
        "metavar": "SECONDS",
        "help": "how long to wait for the other side (default: for ever)",
    },
    "json": {
        "action": "store_true",
        "help": "print one JSON object per line on stdout",
    },
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="connectoid", description="Share, chat and send files, device to device.")
    parser.add_argument(
        "--version", action="version", version=f"connectoid {connectoid.__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    for flag, options in SHARED.items():
        shared.add_argument(f"--{flag}", **options)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (_, words) in COMMANDS.items():
        made[name] = commands.add_parser(
            name, parents=[shared], help=words, description=f"{words.capitalize()}.")
    for name in ("share", "verify", "move", "renew", "unshare", "chat", "send", "receive"):
        made[name].add_argument("name", metavar="NAME", help="the contact")
    add_pairing_arguments(made)
    add_file_arguments(made)
    return parser


def add_pairing_arguments(made: Mapping[str, argparse.ArgumentParser]) -> None:
    """Give `share`, `open`, `contacts` and `verify` what they alone take."""
    made["share"].add_argument(
        "--app-url", default="connectoid:", metavar="URL",
        help="what the link begins with (default: %(default)s)")
    made["open"].add_argument(
        "link", metavar="LINK",
        help="a link from `share`, or one that names no app;"
        " - reads it from stdin, where no other user sees it")
    made["open"].add_argument("--name", required=True, help="what to call the other person")
    made["open"].add_argument("--yes", action="store_true", help="connect without asking first")
    made["contacts"].add_argument(
        "--verbose", action="store_true",
        help="also say what did not count of what came for each contact, and why")
    made["doctor"].add_argument(
        "--verbose", action="store_true", help="also say how each server saw each local address")
    outcome = made["verify"].add_mutually_exclusive_group()
    outcome.add_argument(
        "--same", dest="same", action="store_true", default=None,
        help="record that they are the same on both sides")
    outcome.add_argument(
        "--different", dest="same", action="store_false", help="record that they are not")


def add_file_arguments(made: Mapping[str, argparse.ArgumentParser]) -> None:
    """Give the commands that read or write files what they alone take."""
    made["send"].add_argument("files", nargs="+", metavar="FILE", help="a file to send")
    made["receive"].add_argument(
        "--dir", default=".", metavar="FOLDER", help="where to put the files (default: here)")
    made["receive"].add_argument(
        "--yes", action="store_true", help="accept each file without asking first")
    made["receive"].add_argument(
        "--max-bytes", type=count, default=MAX_BYTES, metavar="BYTES",
        help="take at most so many bytes in all (default: %(default)s, which is 4 GiB)")
    for name in ("export", "import"):
        made[name].add_argument("file", metavar="FILE", help="of the export")
        made[name].add_argument(
            "--export-passphrase-file", metavar="FILE",
            help="a file with the passphrase of the export (default: ask for it)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 done, 1 failed, 2 usage, 130 interrupted."""
    speak_utf8(sys.stdin, sys.stdout, sys.stderr)
    try:
        try:
            return run(argv)
        finally:
            # A pipe whose reader has gone says so here, and not when Python ends.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code; raise BrokenPipeError."""
    teller = Teller(as_json=False)
    try:
        arguments = make_parser().parse_args(argv)
        arguments.relay = arguments.relay or ENVIRONMENT("CONNECTOID_RELAY", "").split()
        teller = Teller(arguments.json)
        arguments.ice_server = [*arguments.ice_server, *arguments.ice_servers]
        if "CONNECTOID_ICE_SERVERS" in os.environ and not arguments.ice_servers:
            arguments.ice_server += parse_ice_servers(
                os.environ["CONNECTOID_ICE_SERVERS"], "$CONNECTOID_ICE_SERVERS")
        prepare_store(arguments)
        with telling_warnings(teller):
            return COMMANDS[arguments.command][0](arguments, teller)
    except KeyboardInterrupt:
        teller.interrupt()
        return 130
    except BrokenPipeError:
        raise
    except connectoid.UsageError as error:
        teller.say("error", f"connectoid: {error}", error=str(error))
        return 2
    except EndedError as error:
        words = f"connectoid: {error}"
        if teller.has_told(error.why, error.name):
            words = ""
        teller.say("error", words, error=str(error))
        return 1
    except (ConnectoidError, TimeoutError, OSError, EOFError, UnicodeError) as error:
        words = explain(error)
        teller.say("error", f"connectoid: {words}", error=words)
        return 1


def prepare_store(arguments: argparse.Namespace) -> None:
    """Make the folder of a new store; raise UsageError if a command needs one that is there."""
    if arguments.command in NEEDS_NO_STORE:
        return
    if not arguments.store:
        raise connectoid.UsageError("This user has no home: name a store with --store.")
    if arguments.command in MAKES_STORE:
        folder = os.path.dirname(os.path.abspath(arguments.store))
        os.makedirs(folder, mode=0o700, exist_ok=True)
    elif arguments.command not in READS_ONLY and not os.path.exists(arguments.store):
        raise connectoid.UsageError(f"There is no store {arguments.store}.")


def explain(error: Exception) -> str:
    """Return what went wrong, for people."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    # An EOFError has no text: no passphrase was typed.
    return in_flags(str(error)) or "Nothing was typed."
