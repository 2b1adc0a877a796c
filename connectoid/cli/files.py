"""Commands that carry files: `send` and `receive`.

The sender offers a name, a size and a fingerprint. The receiver asks its user, and says how much
it has of that already. The rest follows in blocks. At the end the hash of the whole decides.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

import connectoid
from connectoid import Channel, NotConnectedError
from connectoid.cli.inbox import NOT_WANTED, Inbox, Offer, open_inbox
from connectoid.cli.running import connect, running
from connectoid.cli.talking import (
    MessageChannel,
    TransferError,
    count_of,
    greet,
    read_control,
    read_reply,
)
from connectoid.cli.telling import Teller
from connectoid.operating_system import NO_FOLLOW, long_path

# Of a file, in one message: WebRTC's smallest common limit is 64 KiB.
BLOCK_BYTES = 60_000
# Sent and not yet acknowledged: a receiver's memory must hold as much.
WINDOW_BYTES = 8 * 1024 * 1024
# After so much the receiver says how far it is.
ACKNOWLEDGED_BYTES = 512 * 1024
# For a last word.
END_S = 5.0
# Of files with one name in a folder: more of them are an attack or a mistake.
MAX_SAME_NAMES = 10_000

# Gives a file a second name, as os.link does.
Link: TypeAlias = Callable[[pathlib.Path, pathlib.Path], None]


def again(arguments: argparse.Namespace, teller: Teller, work: Callable[[Channel], bool]) -> int:
    """Do a transfer over as many connections as it takes; --timeout bounds the wait for each."""
    with running(arguments, teller) as runner:
        while True:
            channel = connect(runner, arguments, teller)
            try:
                if work(channel):
                    return 0
            except NotConnectedError:
                name = arguments.name
                words = (
                    f"The connection broke. The transfer resumes when {name} is back. (Ctrl-C ends,"
                    " and a second start goes on from there)")
                teller.say("broken", words, contact=name)
            except BaseException:
                channel.close()
                raise


def send(arguments: argparse.Namespace, teller: Teller) -> int:
    """Send files to a contact who runs `receive`."""
    files = [pathlib.Path(name) for name in arguments.files]
    for path in files:
        if not path.is_file():
            raise connectoid.UsageError(f"{path} is not a file.")
    done: set[pathlib.Path] = set()

    def work(channel: Channel) -> bool:
        greet(channel, {"app": "files", "role": "send"}, arguments.name)
        for path in files:
            if path not in done:
                send_file(channel, path, teller)
                done.add(path)
        channel.send(json.dumps({"end": True}))
        with contextlib.suppress(NotConnectedError, TimeoutError):
            channel.receive(END_S)
        return True

    return again(arguments, teller, work)


def send_file(channel: MessageChannel, path: pathlib.Path, teller: Teller) -> None:
    """Send one file from where the receiver is; raise TransferError, NotConnectedError."""
    began_s = time.monotonic()
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        size = stat.st_size
        fingerprint = hashlib.sha256(f"{path.name} {size} {stat.st_mtime_ns}".encode()).hexdigest()
        channel.send(json.dumps({"file": path.name, "size": size, "fingerprint": fingerprint}))
        have = count_of(read_reply(channel), "have", size)
        progress = functools.partial(teller.progress, path.name)
        progress(have, size)
        digest = send_blocks(channel, file, have, size, progress)
    if not is_received(channel, size, progress):
        raise TransferError(
            f"{path.name} arrived damaged, or changed while it was sent; send it again.")
    progress(size, size)
    took_s = time.monotonic() - began_s
    words = f"{path.name}: {size:,} bytes in {took_s:.1f} s, SHA-256 {digest}"
    teller.say("sent", words, file=str(path), bytes=size, there_before=have, sha256=digest)


def send_blocks(
    channel: MessageChannel, file: BinaryIO, have: int, size: int,
    progress: Callable[[int, int], None],
) -> str:
    """Send a file from `have` on, and then the hash of the whole, which is returned in hex."""
    digest = hashlib.sha256()
    for _ in range(0, have, BLOCK_BYTES):
        digest.update(file.read(min(BLOCK_BYTES, have - file.tell())))
    acknowledged = have
    sent = have
    while block := file.read(BLOCK_BYTES):
        channel.send(block)
        digest.update(block)
        sent += len(block)
        acknowledged = take_acknowledgements(channel, sent, acknowledged, size)
        progress(acknowledged, size)
    channel.send(json.dumps({"sha256": digest.hexdigest(), "sent": sent}))
    return digest.hexdigest()


def take_acknowledgements(
    channel: MessageChannel, sent: int, acknowledged: int, size: int,
) -> int:
    """Read those that are there, and wait for more while the window is full; return the last."""
    while True:
        timeout_s = None
        if sent - acknowledged <= WINDOW_BYTES:
            timeout_s = 0.0
        try:
            reply = read_reply(channel, timeout_s)
        except TimeoutError:
            return acknowledged
        acknowledged = count_of(reply, "got", size)


def is_received(
    channel: MessageChannel, size: int, progress: Callable[[int, int], None],
) -> bool:
    """Return whether the receiver has the file whole, once it says so."""
    while True:
        reply = read_reply(channel)
        if "done" in reply:
            return reply["done"] is True
        progress(count_of(reply, "got", size), size)


def receive(arguments: argparse.Namespace, teller: Teller) -> int:
    """Receive what a contact sends with `send`, and what the user wants of it."""
    inbox = open_inbox(arguments, teller)

    def work(channel: Channel) -> bool:
        greet(channel, {"app": "files", "role": "receive"}, arguments.name)
        while "end" not in (control := read_control(channel.receive())):
            receive_file(channel, inbox, control, teller)
        channel.close()
        return True

    try:
        return again(arguments, teller, work)
    except KeyboardInterrupt:
        teller.interrupt()
        if inbox.has_parts():
            teller.remark(
                f"What has come is kept for a week: the next `receive` into {inbox.folder} goes on"
                " with it.")
        return 130


def receive_file(
    channel: MessageChannel, inbox: Inbox, control: Mapping[str, Any], teller: Teller,
) -> None:
    """Receive one file, or the rest of it; raise TransferError, NotConnectedError."""
    offer = inbox.read_offer(control)
    if offer.fingerprint in inbox.received:
        # The connection broke before the sender knew.
        channel.send(json.dumps({"have": offer.size}))
        claimed_hash = read_control(channel.receive()).get("sha256")
        channel.send(json.dumps({"done": claimed_hash == inbox.received[offer.fingerprint]}))
        return
    try:
        let_in(channel, inbox, offer)
        final, digest = keep_file(channel, inbox, offer, teller)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        give_up(channel, reason)
        raise TransferError(f"{offer.name} cannot be kept in {inbox.folder}: {reason}.") from None
    inbox.received[offer.fingerprint] = digest
    channel.send(json.dumps({"done": True}))
    words = f"{final}: {offer.size:,} bytes, SHA-256 {digest}"
    teller.say("received", words, file=str(final), bytes=offer.size, sha256=digest)


def let_in(channel: MessageChannel, inbox: Inbox, offer: Offer) -> None:
    """Raise TransferError for a file that is refused; the sender is told why."""
    refusal = inbox.refusal(offer)
    if refusal is None:
        return
    give_up(channel, refusal)
    words = f"{offer.name} is not received: {refusal}."
    if refusal != NOT_WANTED:
        words += " --max-bytes sets how much may come."
    raise TransferError(words)


def keep_file(
    channel: MessageChannel, inbox: Inbox, offer: Offer, teller: Teller,
) -> tuple[pathlib.Path, str]:
    """Write what comes to a partial file, and give it its name; return that, and the hash in hex.

    Raises TransferError, NotConnectedError, OSError.
    """
    name, size, _ = offer
    part = inbox.part(offer)
    check_room(part, size)
    progress = functools.partial(teller.progress, name)
    try:
        with open(part, "a+b", opener=open_no_link) as file:
            digest = digest_of(file, size)
            end = receive_blocks(channel, file, size, digest, progress)
    except TransferError:
        # Whoever breaks the rules does not go on. Windows removes no file that is open.
        part.unlink()
        raise
    if end.get("sha256") != digest.hexdigest() or part.stat().st_size != size:
        part.unlink()
        give_up(channel, None)
        raise TransferError(f"{name} arrived damaged; it is not kept.")
    return put_in_place(part, inbox.folder, name), digest.hexdigest()


def open_no_link(path: str, flags: int) -> int:
    """Open a file, but follow no link: in a shared folder it may be somebody else's."""
    return os.open(path, flags | NO_FOLLOW, 0o666)


def give_up(channel: MessageChannel, reason: str | None) -> None:
    """Tell the sender that its file is not kept, and why.

    The sender closes the channel then. A word that is sent just before a close could be lost.
    """
    last_word: dict[str, Any] = {"done": False}
    if reason is not None:
        last_word["reason"] = reason
    channel.send(json.dumps(last_word))
    until_s = time.monotonic() + END_S
    with contextlib.suppress(NotConnectedError, TimeoutError):
        while (left_s := until_s - time.monotonic()) > 0:
            channel.receive(left_s)


def check_room(part: pathlib.Path, size: int) -> None:
    """Raise OSError if the disk has no room for the rest of a file."""
    left = size
    if part.exists():
        left -= part.stat().st_size
    free = shutil.disk_usage(part.parent).free
    if left > free:
        raise OSError(errno.ENOSPC, f"it needs {left - free:,} bytes more than are free")


def digest_of(file: BinaryIO, size: int) -> hashlib._Hash:
    """Return the hash of what is there already. More than the file will have is dropped."""
    digest = hashlib.sha256()
    if os.fstat(file.fileno()).st_size > size:
        file.truncate(0)
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest


def receive_blocks(
    channel: MessageChannel, file: BinaryIO, size: int, digest: hashlib._Hash,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Append what comes to a file, and return the control message after it."""
    have = file.tell()
    told = have
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


def put_in_place(
    part: pathlib.Path, folder: pathlib.Path, name: str, link: Link = os.link,
) -> pathlib.Path:
    """Give a finished file its name, or the next that is free: nothing is overwritten.

    Raises OSError.
    """
    stem, suffix = os.path.splitext(name)
    final = pathlib.Path(long_path(str(folder / name)))
    for number in range(1, MAX_SAME_NAMES + 1):
        try:
            give_name(part, final, link)
        except FileExistsError:
            final = final.with_name(f"{stem} ({number}){suffix}")
            continue
        return final
    raise FileExistsError(errno.EEXIST, "too many files there have this name")


def give_name(part: pathlib.Path, final: pathlib.Path, link: Link) -> None:
    """Give a file a name that is free; raise FileExistsError for another one, or OSError."""
    try:
        link(part, final)
    except FileExistsError:
        raise
    except OSError:
        # FAT and exFAT have no hard links. An empty file takes the name there, and is replaced.
        with final.open("xb"):
            pass
        try:
            os.replace(part, final)
        except OSError:
            final.unlink()
            raise
        return
    part.unlink()
