"""Share, chat and send files from a terminal, directly from one device to another.

    connectoid share Bob             # prints a link for Bob, and waits for him
    connectoid open LINK --name Alice
    connectoid chat Alice

It uses the public API of connectoid.py alone. Words for people go to stderr, what a script
wants (links, received lines, --json) to stdout. README.md shows a session.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import contextlib
import dataclasses
import functools
import getpass
import hashlib
import json
import math
import os
import pathlib
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import connectoid
from connectoid import EMOJI, AiortcAdapter, Channel, Connectoid, ConnectoidError, Kept, NotConnectedError, Store

# ---------------------------------------------------------------------------------------
# Limits and words.
# ---------------------------------------------------------------------------------------

BLOCK_BYTES = 60_000  # of a file in one message: WebRTC's smallest common limit is 64 KiB
WINDOW_BYTES = 8 * 1024 * 1024  # sent and not yet acknowledged: what a receiver's memory must hold
ACKNOWLEDGED_BYTES = 512 * 1024  # after so much the receiver says how far it is
RECONNECT_S = 300.0  # for a transfer that broke off to go on
READY_S = 5.0  # for the last word of a pairing
LOOK_EVERY_S = 0.05  # whether it came
PROGRESS_EVERY_S = 0.2
MAX_NAME_CHARS = 200  # of a file, as file systems have it

ENVIRONMENT = os.environ.get
HOME = ENVIRONMENT("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
DEFAULT_STORE = ENVIRONMENT("CONNECTOID_STORE") or os.path.join(HOME, "connectoid", "contacts.db")

STATES = {
    "invited": "not opened yet",
    "welcomed": "opened, not yet connected",
    "opened": "not answered yet",
    "ready": "answered, not yet connected",
    "paired": "shared",
    "ended": "ended",
}
COMPARE = "Compare these by voice, not in the chat that carried the link:"


class TransferError(ConnectoidError):
    """A transfer that cannot go on; its text says why."""


# ---------------------------------------------------------------------------------------
# Telling: JSON lines for scripts, words for people.
# ---------------------------------------------------------------------------------------


class Teller:
    """Say what happens: to people on stderr, or with --json as one object a line on stdout."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._lock = threading.Lock()
        self._progress_s = 0.0
        self._unfinished = False

    def say(self, event: str, words: str, *, result: str | None = None, **members: Any) -> None:
        """Tell an event; `result` is what goes to stdout for people too."""
        with self._lock:
            if self._as_json:
                print(json.dumps({"event": event, **members}, ensure_ascii=False), flush=True)
                return
            self._end_line()
            if words:
                print(words, file=sys.stderr, flush=True)
            if result is not None:
                print(result, flush=True)

    def progress(self, name: str, done: int, size: int) -> None:
        """Show how far a file is, a few times a second, on a terminal."""
        now_s = time.monotonic()
        if self._as_json or not sys.stderr.isatty() or (done < size and now_s - self._progress_s < PROGRESS_EVERY_S):
            return
        with self._lock:
            self._progress_s, self._unfinished = now_s, True
            percent = 100 * done // size if size else 100
            print(f"\r{name}: {percent:3d} % of {size / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._unfinished:
            print(file=sys.stderr)
            self._unfinished = False


def emoji_of(kept: Kept) -> list[dict[str, str]]:
    """Return the comparison string of a contact as emoji with their names."""
    return [{"emoji": EMOJI[index][0], "name": EMOJI[index][1]} for index in kept.comparison]


def show_emoji(kept: Kept) -> str:
    """Return the comparison string as a line for people."""
    return "   ".join(f"{pair['emoji']} {pair['name']}" for pair in emoji_of(kept))


def clean(text: str) -> str:
    """Return a text from outside without what could steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


# ---------------------------------------------------------------------------------------
# Commands. Each gets the arguments and returns the exit code.
# ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(arguments: argparse.Namespace, teller: Teller) -> Iterator[Connectoid]:
    """Run the store's contacts for the time of a command."""

    def on_event(name: str, event: str) -> None:
        if event not in ("disconnected", "connected"):
            teller.say(event, f"{name}: {connectoid.EVENTS[event]}", contact=name)

    store = Store(arguments.store, passphrase_of(arguments))
    with contextlib.closing(store):
        webrtc = None if arguments.command == "unshare" else AiortcAdapter()
        with Connectoid(store, [(url, arguments.ext) for url in arguments.relay], webrtc, on_event=on_event,
                        ice_servers=arguments.ice_server, allow_http=arguments.allow_http) as runner:
            yield runner


def connect(runner: Connectoid, arguments: argparse.Namespace, teller: Teller) -> Channel:
    """Return a channel to the contact of a command."""
    find(runner.contacts(), arguments.name)
    teller.say("waiting", f"Waiting for {arguments.name} ... (Ctrl-C ends)", contact=arguments.name)
    channel = runner.connect(arguments.name, arguments.timeout)
    teller.say("connected", f"Connected with {arguments.name}.", contact=arguments.name)
    return channel


def share(arguments: argparse.Namespace, teller: Teller) -> int:
    """Print a link for a new contact, and wait until the other has opened it."""
    with running(arguments, teller) as runner:
        link = link_for(runner, arguments)
        teller.say("link", f"Send this link to {arguments.name} alone: whoever opens it first is your contact.",
                   result=link, link=link, contact=arguments.name)
        if not arguments.json:
            show_qr(link)
        return finish_pairing(runner, arguments, teller)


def link_for(runner: Connectoid, arguments: argparse.Namespace) -> str:
    """Return a new link, or the one that was made before and that nobody has opened yet."""
    for kept in runner.contacts():
        if kept.name == arguments.name and kept.state == "invited":
            return connectoid.make_link(arguments.app_url, kept.invitation)
    if not arguments.relay:
        raise connectoid.UsageError("No relay: give --relay URL, or set CONNECTOID_RELAY.")
    return runner.share(arguments.name, arguments.app_url)


def open_link(arguments: argparse.Namespace, teller: Teller) -> int:
    """Open somebody's link, and wait until both are connected."""
    if arguments.link == "-":
        arguments.link, arguments.yes = sys.stdin.readline(), True
    invitation = connectoid.read_link(arguments.link, allow_http=arguments.allow_http)
    hosts = ", ".join(mailbox.url for mailbox in connectoid.parse_address(invitation.address, allow_http=True))
    if sys.stdin.isatty() and not arguments.yes:
        print(f"Connect with {arguments.name}, through {hosts}? [Y/n] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
            return 1
    with running(arguments, teller) as runner:
        name = runner.open(arguments.link, arguments.name)
        if name != arguments.name:
            teller.say("known", f"You have opened this link before, as {name}.", contact=name)
            arguments.name = name
        return finish_pairing(runner, arguments, teller)


def finish_pairing(runner: Connectoid, arguments: argparse.Namespace, teller: Teller) -> int:
    """Wait for the first connection, and show what to compare."""
    channel = connect(runner, arguments, teller)
    until_s = time.monotonic() + READY_S
    while find(runner.contacts(), arguments.name).state not in ("paired", "ended") and time.monotonic() < until_s:
        time.sleep(LOOK_EVERY_S)
    kept = find(runner.contacts(), arguments.name)
    store = "" if arguments.store == DEFAULT_STORE else f" --store {shlex.quote(arguments.store)}"
    teller.say("compare", f"{COMPARE}\n\n    {show_emoji(kept)}\n\nIf they are the same: connectoid verify "
               f"{shlex.quote(kept.name)} --same{store}", contact=kept.name, emoji=emoji_of(kept))
    channel.close()
    return 0


def show_qr(link: str) -> None:
    """Draw a link as a QR code on a terminal, if the package segno is there."""
    if not sys.stderr.isatty():
        return
    try:
        import segno  # noqa: PLC0415 - an extra
    except ImportError:
        print("(For a QR code: pip install 'connectoid[cli]')", file=sys.stderr)
        return
    segno.make(link, micro=False).terminal(out=sys.stderr, compact=True)


def find(contacts: Sequence[Kept], name: str) -> Kept:
    """Return a contact by its name; raise UsageError."""
    for kept in contacts:
        if kept.name == name:
            return kept
    names = ", ".join(kept.name for kept in contacts) or "nobody yet"
    raise connectoid.UsageError(f"There is no contact {name!r}. There is: {names}.")


def read_contacts(arguments: argparse.Namespace) -> list[Kept]:
    """Return the contacts of a store that another command may be using."""
    if not os.path.exists(arguments.store):
        return []
    store = Store(arguments.store, passphrase_of(arguments), lock=False)
    try:
        return [kept for kept in store.load().values() if kept.state != "unshared"]
    finally:
        store.close()


def list_contacts(arguments: argparse.Namespace, teller: Teller) -> int:
    """List the contacts with their states."""
    for kept in read_contacts(arguments):
        state = connectoid.EVENTS[kept.why] if kept.why else STATES[kept.state]
        verified = "verified" if kept.verified else "not verified"
        warning = "\topened by somebody else too: compare before you trust" if kept.used_to else ""
        teller.say("contact", "", result=f"{kept.name}\t{state}\t{verified if kept.comparison else '-'}{warning}",
                   contact=kept.name, state=kept.state, why=kept.why or None, verified=kept.verified,
                   opened_twice=bool(kept.used_to))
    return 0


def verify(arguments: argparse.Namespace, teller: Teller) -> int:
    """Show what to compare, and mark the outcome."""
    kept = find(read_contacts(arguments), arguments.name)
    if not kept.comparison:
        raise connectoid.UsageError(connectoid.EVENTS.get(kept.why) or "There is nothing to compare: no answer yet.")
    teller.say("compare", COMPARE, result=show_emoji(kept),
               contact=kept.name, emoji=emoji_of(kept), verified=kept.verified)
    if arguments.same is not None:
        store = Store(arguments.store, passphrase_of(arguments))
        with contextlib.closing(store):
            number, kept = next((number, kept) for number, kept in store.load().items() if kept.name == arguments.name)
            store.save(number, dataclasses.replace(kept, verified=arguments.same))
        words = "marked as verified" if arguments.same else f"not whom you think: connectoid unshare {kept.name}"
        teller.say("verified" if arguments.same else "not_verified", f"{kept.name} is {words}.", contact=kept.name)
    return 0


def move(arguments: argparse.Namespace, teller: Teller) -> int:
    """Be reached through the relays of --relay from now on, and wait until the contact has been told."""
    with running(arguments, teller) as runner:
        runner.move(arguments.name)
        teller.say("moved", f"{arguments.name} is told to reach you through {' '.join(arguments.relay)} from now on.",
                   contact=arguments.name)
        connect(runner, arguments, teller)
    return 0


def unshare(arguments: argparse.Namespace, teller: Teller) -> int:
    """End the sharing with a contact, who is told."""
    with running(arguments, teller) as runner:
        runner.unshare(arguments.name)
    teller.say("left", f"The sharing with {arguments.name} has ended.", contact=arguments.name)
    return 0


def export(arguments: argparse.Namespace, teller: Teller) -> int:
    """Write all contacts to a file under a passphrase, for another device."""
    with contextlib.closing(Store(arguments.store, passphrase_of(arguments))) as store:
        octets = store.export(new_passphrase())
    with open(arguments.file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(octets)
    teller.say("exported", f"{arguments.file} holds your keys. Import it on the other device, then leave this store:"
               " two devices with the same keys get in each other's way.", file=arguments.file)
    return 0


def import_(arguments: argparse.Namespace, teller: Teller) -> int:
    """Add the contacts of an export to the store."""
    octets = pathlib.Path(arguments.file).read_bytes()
    with contextlib.closing(Store(arguments.store, passphrase_of(arguments))) as store:
        count = store.import_(octets, getpass.getpass("Passphrase of the export: "))
    teller.say("imported", f"{count} contacts are new here.", count=count)
    return 0


def new_passphrase() -> str:
    """Return a passphrase that was typed twice; raise UsageError."""
    first = getpass.getpass("New passphrase for the export: ")
    if not first or first != getpass.getpass("Again: "):
        raise connectoid.UsageError("The passphrases are empty or differ.")
    return first


def passphrase_of(arguments: argparse.Namespace) -> str | None:
    """Return the store's passphrase, if it has one."""
    if arguments.passphrase_file:
        return pathlib.Path(arguments.passphrase_file).read_text(encoding="utf-8").rstrip("\n")
    return ENVIRONMENT("CONNECTOID_PASSPHRASE") or None


# ---------------------------------------------------------------------------------------
# Chat.
# ---------------------------------------------------------------------------------------


def chat(arguments: argparse.Namespace, teller: Teller) -> int:
    """Send lines from stdin, print those that come, until either side ends."""
    with running(arguments, teller) as runner:
        channel = connect(runner, arguments, teller)
        greet(channel, {"app": "chat"})
        typing = threading.Thread(target=send_lines, args=(channel,), daemon=True)
        typing.start()
        with contextlib.suppress(NotConnectedError):
            while (line := channel.receive()) is not None:
                said = read_control(line).get("line")
                if isinstance(said, str):
                    teller.say("line", "", result=f"{arguments.name}: {clean(said)}", contact=arguments.name, line=said)
        teller.say("disconnected", f"Disconnected from {arguments.name}.", contact=arguments.name)
    return 0


def send_lines(channel: Channel) -> None:
    """Send stdin, line by line; its end closes the channel."""
    with contextlib.suppress(NotConnectedError):
        for line in sys.stdin:
            channel.send(json.dumps({"line": line.rstrip("\n")}))
        channel.close()


def greet(channel: Channel, hello: Mapping[str, Any]) -> dict[str, Any]:
    """Say which command this is, and return what the other says; raise TransferError if they do not fit."""
    channel.send(json.dumps(hello))
    theirs = read_control(channel.receive())
    if theirs.get("app") != hello["app"] or (theirs.get("role") == hello.get("role") and "role" in hello):
        raise TransferError(f"The other side runs {clean(str(theirs.get('role') or theirs.get('app')))!r}, "
                            f"this one {hello.get('role', hello['app'])!r}.")
    return theirs


def read_control(message: bytes | str) -> dict[str, Any]:
    """Return a control message; raise TransferError for anything else."""
    try:
        control = json.loads(message)
    except (ValueError, RecursionError):
        control = None
    if isinstance(message, bytes) or not isinstance(control, dict):
        raise TransferError("The other side sent what this program does not understand.")
    return control


# ---------------------------------------------------------------------------------------
# Files. The sender offers name, size and a fingerprint; the receiver says what it has of that
# already; blocks; at the end the hash of the whole decides.
# ---------------------------------------------------------------------------------------


def again(arguments: argparse.Namespace, teller: Teller, work: Callable[[Channel], bool]) -> int:
    """Do a transfer over as many connections as it takes."""
    with running(arguments, teller) as runner:
        while True:
            channel = connect(runner, arguments, teller)
            try:
                if work(channel):
                    return 0
            except NotConnectedError:
                teller.say("broken", "The connection broke; it goes on where it was.")
                arguments.timeout = RECONNECT_S
            except BaseException:
                channel.close()
                raise


def send(arguments: argparse.Namespace, teller: Teller) -> int:
    """Send files to a contact who runs `receive`."""
    files = [pathlib.Path(name) for name in arguments.files]
    for path in files:
        if not path.is_file():
            raise connectoid.UsageError(f"{path} is no file.")
    done: set[pathlib.Path] = set()

    def work(channel: Channel) -> bool:
        greet(channel, {"app": "files", "role": "send"})
        for path in files:
            if path not in done:
                send_file(channel, path, teller)
                done.add(path)
        channel.send(json.dumps({"end": True}))
        with contextlib.suppress(NotConnectedError, TimeoutError):
            channel.receive(READY_S)
        return True

    return again(arguments, teller, work)


def send_file(channel: Channel, path: pathlib.Path, teller: Teller) -> None:
    """Send one file from where the receiver is; raise TransferError, NotConnectedError."""
    began_s = time.monotonic()
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        size = stat.st_size
        fingerprint = hashlib.sha256(f"{path.name} {size} {stat.st_mtime_ns}".encode()).hexdigest()
        channel.send(json.dumps({"file": path.name, "size": size, "fingerprint": fingerprint}))
        have = count_of(read_control(channel.receive()), "have", size)
        digest = hashlib.sha256()
        for _ in range(0, have, BLOCK_BYTES):
            digest.update(file.read(min(BLOCK_BYTES, have - file.tell())))
        acknowledged = sent = have
        while block := file.read(BLOCK_BYTES):
            channel.send(block)
            digest.update(block)
            sent += len(block)
            while sent - acknowledged > WINDOW_BYTES:
                acknowledged = count_of(read_control(channel.receive()), "got", size)
                teller.progress(path.name, acknowledged, size)
    channel.send(json.dumps({"sha256": digest.hexdigest(), "sent": sent}))
    while "done" not in (reply := read_control(channel.receive())):
        teller.progress(path.name, count_of(reply, "got", size), size)
    if reply["done"] is not True:
        raise TransferError(f"{path.name} arrived damaged, or changed while it was sent; send it again.")
    teller.progress(path.name, size, size)
    took_s = time.monotonic() - began_s
    teller.say("sent", f"{path.name}: {size:,} bytes in {took_s:.1f} s, SHA-256 {digest.hexdigest()}",
               file=str(path), bytes=size, there_before=have, sha256=digest.hexdigest())


def count_of(control: Mapping[str, Any], name: str, most: int) -> int:
    """Return a number of bytes in a control message; raise TransferError."""
    count = control.get(name)
    if type(count) is not int or not 0 <= count <= most:
        raise TransferError("The other side sent what this program does not understand.")
    return count


def receive(arguments: argparse.Namespace, teller: Teller) -> int:
    """Receive what a contact sends with `send`."""
    folder = pathlib.Path(arguments.dir)
    if not folder.is_dir():
        raise connectoid.UsageError(f"{folder} is no folder.")
    received: dict[str, str] = {}

    def work(channel: Channel) -> bool:
        greet(channel, {"app": "files", "role": "receive"})
        while "end" not in (control := read_control(channel.receive())):
            receive_file(channel, folder, control, teller, received)
        channel.close()
        return True

    return again(arguments, teller, work)


def receive_file(channel: Channel, folder: pathlib.Path, control: Mapping[str, Any], teller: Teller,
                 received: dict[str, str]) -> None:
    """Receive one file, or the rest of it; raise TransferError, NotConnectedError.

    `received` has the hashes, by fingerprint, of the files that are in place already.
    """
    name, size = safe_name(control.get("file")), count_of(control, "size", 2**60)
    fingerprint = hashlib.sha256(str(control.get("fingerprint")).encode()).hexdigest()[:16]
    if fingerprint in received:  # the connection broke before the sender knew
        channel.send(json.dumps({"have": size}))
        channel.send(json.dumps({"done": read_control(channel.receive()).get("sha256") == received[fingerprint]}))
        return
    part = folder / f".{name[:MAX_NAME_CHARS - 30]}.{fingerprint}.part"
    left = size - (part.stat().st_size if part.exists() else 0)
    if left > shutil.disk_usage(folder).free:
        raise TransferError(f"{name} needs {left:,} bytes more than are free in {folder}.")
    with part.open("a+b") as file:
        digest = digest_of(file, size)
        end = receive_blocks(channel, file, size, digest, functools.partial(teller.progress, name))
    if end.get("sha256") != digest.hexdigest() or part.stat().st_size != size:
        part.unlink()
        channel.send(json.dumps({"done": False}))
        raise TransferError(f"{name} arrived damaged; it is not kept.")
    final = put_in_place(part, folder, name)
    received[fingerprint] = digest.hexdigest()
    channel.send(json.dumps({"done": True}))
    teller.say("received", f"{final}: {size:,} bytes, SHA-256 {digest.hexdigest()}",
               file=str(final), bytes=size, sha256=digest.hexdigest())


def digest_of(file: BinaryIO, size: int) -> hashlib._Hash:
    """Return the hash of what is there already; what is longer than the file will be is dropped."""
    digest = hashlib.sha256()
    if os.fstat(file.fileno()).st_size > size:
        file.truncate(0)
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest


def receive_blocks(channel: Channel, file: BinaryIO, size: int, digest: hashlib._Hash,
                   progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Append what comes to a file, and return the control message after it."""
    have = told = file.tell()
    channel.send(json.dumps({"have": have}))
    while isinstance(block := channel.receive(), bytes):
        have += len(block)
        if have > size:
            raise TransferError("The other side sent more than it said.")
        file.write(block)
        digest.update(block)
        if have - told >= ACKNOWLEDGED_BYTES:
            told = have
            channel.send(json.dumps({"got": have}))
        progress(have, size)
    return read_control(block)


def safe_name(name: object) -> str:
    """Return a file name that leads nowhere else; raise TransferError."""
    if not isinstance(name, str):
        raise TransferError("The other side sent what this program does not understand.")
    last = clean(name.replace("\\", "/").rpartition("/")[2]).strip().lstrip(".")
    return last.encode("utf-8")[:MAX_NAME_CHARS].decode("utf-8", "ignore") or "file"


def put_in_place(part: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Give a finished file its name, or the next that is free: nothing is overwritten."""
    stem, suffix = os.path.splitext(name)
    for number in range(10_000):
        final = folder / (name if number == 0 else f"{stem} ({number}){suffix}")
        try:
            os.link(part, final)
        except FileExistsError:
            continue
        part.unlink()
        return final
    raise TransferError(f"There are too many files called {name} in {folder}.")


# ---------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------

COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace, Teller], int], str]] = {
    "share": (share, "print a link for a new contact, and wait until it is opened"),
    "open": (open_link, "open a link that somebody has sent you"),
    "contacts": (list_contacts, "list the contacts (also while another command runs)"),
    "verify": (verify, "show the seven emoji to compare (also while another command runs), and mark the outcome"),
    "move": (move, "be reached by a contact through other relays from now on"),
    "unshare": (unshare, "end the sharing with a contact"),
    "chat": (chat, "chat with a contact, line by line"),
    "send": (send, "send files to a contact who runs `receive`"),
    "receive": (receive, "receive files from a contact who runs `send`"),
    "export": (export, "write all contacts to a file, for another device"),
    "import": (import_, "add the contacts of such a file"),
}


def seconds(text: str) -> float:
    """Return a time to wait; raise ValueError, which argparse words."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


SHARED: Mapping[str, dict[str, Any]] = {
    "relay": {"action": "append", "metavar": "URL", "default": [],
              "help": "a relay for new contacts and `move`, up to three (default: $CONNECTOID_RELAY)"},
    "ext": {"metavar": "KEY", "default": ENVIRONMENT("CONNECTOID_EXT"),
            "help": "what these relays want to see, such as an API key; other users see flags ($CONNECTOID_EXT)"},
    "store": {"metavar": "FILE", "default": DEFAULT_STORE,
              "help": "where contacts are kept (default: $CONNECTOID_STORE, or %(default)s)"},
    "passphrase-file": {"metavar": "FILE", "help": "a file with its passphrase (or $CONNECTOID_PASSPHRASE)"},
    "ice-server": {"metavar": "URL", "action": "append", "default": [],
                   "help": "stun:HOST:PORT, beside the relays' own"},
    "allow-http": {"action": "store_true", "help": "use relays without https on other machines too"},
    "timeout": {"type": seconds, "metavar": "SECONDS", "help": "how long to wait for the other (default: for ever)"},
    "json": {"action": "store_true", "help": "one JSON object a line on stdout"},
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="connectoid", description="Share, chat and send files, device to device.")
    parser.add_argument("--version", action="version", version=f"connectoid {connectoid.__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    for flag, options in SHARED.items():
        shared.add_argument(f"--{flag}", **options)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    made = {name: commands.add_parser(name, parents=[shared], help=words, description=f"{words.capitalize()}.")
            for name, (_, words) in COMMANDS.items()}
    for name in ("share", "verify", "move", "unshare", "chat", "send", "receive"):
        made[name].add_argument("name", metavar="NAME", help="the contact")
    made["share"].add_argument("--app-url", default="connectoid:", metavar="URL", help="what the link begins with")
    made["open"].add_argument("link", metavar="LINK", help="or - to read it from stdin, where no other user sees it")
    made["open"].add_argument("--name", required=True, help="what to call the other")
    made["open"].add_argument("--yes", action="store_true", help="do not ask before connecting")
    outcome = made["verify"].add_mutually_exclusive_group()
    outcome.add_argument("--same", dest="same", action="store_true", default=None, help="they are the same")
    outcome.add_argument("--different", dest="same", action="store_false", help="they are not")
    made["send"].add_argument("files", nargs="+", metavar="FILE")
    made["receive"].add_argument("--dir", default=".", help="where to put the files (default: here)")
    for name in ("export", "import"):
        made[name].add_argument("file", metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 done, 1 failed, 2 usage, 130 interrupted."""
    teller = Teller(as_json=False)
    try:
        arguments = make_parser().parse_args(argv)
        arguments.relay = arguments.relay or ENVIRONMENT("CONNECTOID_RELAY", "").split()
        teller = Teller(arguments.json)
        folder = os.path.dirname(os.path.abspath(arguments.store))
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return COMMANDS[arguments.command][0](arguments, teller)
    except KeyboardInterrupt:
        return 130
    except (ConnectoidError, TimeoutError, OSError, EOFError, UnicodeError) as error:  # EOFError: no passphrase typed
        teller.say("error", f"connectoid: {error or 'nothing was typed'}", error=str(error))
        return 2 if isinstance(error, connectoid.UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
