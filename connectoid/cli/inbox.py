"""What a receiver lets in: which files, how much in all, and under which names.

A file that breaks off stays as a hidden partial file, and the same offer of the same contact goes
on with it. That is sound: the hash of the whole decides at the end. The user sees what there is
when the file is offered again. A refusal removes it, and so does a week without a byte.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import connectoid
from connectoid.cli.talking import NOT_UNDERSTOOD, TransferError, count_of
from connectoid.cli.telling import MAX_NAME_CHARS, Teller
from connectoid.operating_system import long_path
from connectoid.shown import cut_before, shown

# Of all files of one command, unless the user says otherwise: a film, the largest file of a FAT
# file system, and a part of any disk.
MAX_BYTES = 4 * 2**30
# In one command: empty files fill a folder too.
MAX_FILES = 10_000
# Of a file that is offered: an exbibyte, which no disk has.
MAX_FILE_BYTES = 2**60
# Of a file's name in UTF-8: file systems take 255, and a number may be added to it.
MAX_NAME_BYTES = 200
# ... of which this much may say what kind of file it is.
MAX_SUFFIX_BYTES = 20
# Of a partial file's name: the fingerprint, the dots and the suffix.
PART_NAME_BYTES = 30
# A partial file that has not grown for so long is not missed.
PART_AGE_S = 7 * 86_400.0
# `.NAME.FINGERPRINT.part`
PART_PATTERN = ".*." + "[0-9a-f]" * 16 + ".part"

NOT_WANTED = "it is not wanted"
# What looks like the separators of a path, `/` and `\\`, in whatever block of Unicode.
LIKE_SEPARATORS = re.compile(
    "[\u2044\u2215\u2216\u2571\u2572\u27cb\u27cd\u29f5\u29f8\u29f9\ufe68\uff0f\uff3c]")

# What Windows takes for a drive, an alternate stream, a wildcard or a redirection.
RESERVED_CHARS = re.compile(r'[<>:"|?*]')
# What Windows takes for a device, with any suffix.
RESERVED_NAMES = re.compile(
    "(?:con|prn|aux|nul|conin\\$|conout\\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3]) *(?:\\.|$)",
    re.IGNORECASE)

# Returns whether the user says yes to a question; the second answer is about all later ones.
Ask: TypeAlias = Callable[[str], tuple[bool, bool]]


class Offer(NamedTuple):
    """A file that a sender offers: its name is safe, and `fingerprint` tells it from others."""

    name: str
    size: int
    fingerprint: str


@dataclass
class Inbox:
    """The folder of one `receive`, and what the user has let in."""

    folder: pathlib.Path
    contact: str
    max_bytes: int
    ask: Ask
    # Whether the user wants all that comes, within the limits.
    wants_all: bool = False
    # Each counts once, however often a connection breaks.
    accepted: set[Offer] = field(default_factory=set)
    accepted_bytes: int = 0
    # The hashes, by fingerprint, of the files that are in place.
    received: dict[str, str] = field(default_factory=dict)

    def read_offer(self, control: Mapping[str, Any]) -> Offer:
        """Return what the contact offers; raise TransferError.

        The fingerprint is that of this contact: nobody goes on with the partial file of another.
        """
        claimed = f"{self.contact}\n{control.get('fingerprint')}"
        return Offer(
            safe_name(control.get("file")),
            count_of(control, "size", MAX_FILE_BYTES),
            hashlib.sha256(claimed.encode("utf-8", "replace")).hexdigest()[:16],
        )

    def part(self, offer: Offer) -> pathlib.Path:
        """Return where a file grows until it is whole."""
        stem = offer.name.encode()[:MAX_NAME_BYTES - PART_NAME_BYTES].decode("utf-8", "ignore")
        path = self.folder / f".{stem}.{offer.fingerprint}.part"
        return pathlib.Path(long_path(str(path)))

    def refusal(self, offer: Offer) -> str | None:
        """Return why an offer is refused; None accepts it. The user is asked if need be."""
        if offer in self.accepted:
            return None
        if len(self.accepted) >= MAX_FILES:
            return f"{MAX_FILES:,} files have come already"
        left = self.max_bytes - self.accepted_bytes
        if offer.size > left:
            return f"{offer.size:,} bytes are more than the {left:,} that may still come"
        if not self.wants_all and not self._is_wanted(offer):
            self.part(offer).unlink(missing_ok=True)
            return NOT_WANTED
        self.accepted.add(offer)
        self.accepted_bytes += offer.size
        return None

    def _is_wanted(self, offer: Offer) -> bool:
        """Ask the user. The name has a line of its own: the sender writes nothing beside ours."""
        there = ""
        if self.part(offer).exists():
            there = f", of which {self.part(offer).stat().st_size:,} are there"
        yes, self.wants_all = self.ask(
            f"{shown(offer.name, MAX_NAME_CHARS)}\n"
            f"Receive {offer.size:,} bytes{there}, from {self.contact}? [y/N/all] ")
        return yes

    def remove_old_parts(self, now_s: float) -> list[pathlib.Path]:
        """Remove the partial files that have not grown for a week, and return them."""
        old = []
        for path in self.folder.glob(PART_PATTERN):
            if path.is_file() and now_s - path.lstat().st_mtime > PART_AGE_S:
                path.unlink(missing_ok=True)
                old.append(path)
        return old

    def has_parts(self) -> bool:
        """Return whether an accepted file waits for its rest."""
        return any(self.part(offer).exists() for offer in self.accepted)


def open_inbox(arguments: argparse.Namespace, teller: Teller) -> Inbox:
    """Return the inbox of a command; raise UsageError if it cannot be used, or nobody asked."""
    folder = pathlib.Path(arguments.dir)
    if not folder.is_dir():
        raise connectoid.UsageError(f"{folder} is not a folder.")
    if not arguments.yes and not sys.stdin.isatty():
        raise connectoid.UsageError(
            f"Not a terminal: give --yes to receive whatever {arguments.name} sends,"
            f" up to {arguments.max_bytes:,} bytes.")
    inbox = Inbox(
        folder, arguments.name, arguments.max_bytes, ask_user, wants_all=arguments.yes)
    for path in inbox.remove_old_parts(time.time()):
        teller.say(
            "removed", f"{path}: removed, for a week nothing came.", file=str(path))
    return inbox


def ask_user(question: str) -> tuple[bool, bool]:
    """Ask at the terminal; the end of the input is a no."""
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip().lower()
    return answer in ("y", "yes", "a", "all"), answer in ("a", "all")


def safe_name(name: object) -> str:
    """Return a file name that leads nowhere else; raise TransferError.

    It does not hide, as names with a dot do, and is no option of a command, as `-rf` in `rm *`. It
    means the same on every system: a folder may be on a stick, or in a network.
    """
    if not isinstance(name, str):
        raise TransferError(NOT_UNDERSTOOD)
    last = name.replace("\\", "/").rpartition("/")[2]
    plain = shown(LIKE_SEPARATORS.sub("_", last), len(last)).lstrip(".- ")
    # Windows drops these at the end.
    safe = _fitting(RESERVED_CHARS.sub("_", plain).rstrip(". ")).rstrip(". ")
    if RESERVED_NAMES.match(safe):
        return f"_{safe}"
    return safe or "file"


def _fitting(name: str) -> str:
    """Return a name that file systems take; a long one keeps its suffix and whole characters."""
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    suffix = pathlib.PurePath(name).suffix
    if len(suffix.encode()) > MAX_SUFFIX_BYTES:
        suffix = ""
    stem = name.removesuffix(suffix)
    octets = stem.encode()[:MAX_NAME_BYTES - len(suffix.encode())]
    return stem[:cut_before(stem, len(octets.decode("utf-8", "ignore")))] + suffix
