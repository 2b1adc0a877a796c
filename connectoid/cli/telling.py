"""What commands say: JSON lines for scripts, words for people."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from connectoid import EMOJI, ContactRecord, shown
from connectoid.networks import NAME_IT

PROGRESS_EVERY_S = 0.2
# Of a file's name, so that it fits on a line with what is said of it.
MAX_NAME_CHARS = 60
# In a line: all seven are wider than a terminal of 80 columns.
EMOJI_IN_LINE = 4
EMOJI_GAP = "   "

COMPARE = "Compare these by voice, not in the chat that carried the link:"

# What the library says of settings, in flags.
IN_FLAGS: Mapping[str, str] = {
    NAME_IT: "if you trust it, name it with --relay, or give --allow-private-relays",
}


class Teller:
    """Say what happens: to people on stderr, or with --json as one object a line on stdout."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._lock = threading.Lock()
        self._progress_s = 0.0
        self._unfinished = False
        self._told: set[tuple[str, object]] = set()

    def say(self, event: str, words: str, *, result: str | None = None, **members: Any) -> None:
        """Tell an event; `result` is what goes to stdout for people too."""
        with self._lock:
            self._told.add((event, members.get("contact")))
            if self._as_json:
                # In ASCII: a lone surrogate has no UTF-8, and a terminal would obey the rest.
                print(json.dumps({"event": event, **members}), flush=True)
                return
            self._end_line()
            if words:
                print(words, file=sys.stderr, flush=True)
            if result is not None:
                print(result, flush=True)

    def warn(self, words: str) -> None:
        """Say what went wrong outside, on stderr in any case."""
        with self._lock:
            self._end_line()
            print(words, file=sys.stderr, flush=True)

    def remark(self, words: str) -> None:
        """Say what only people want to know."""
        if not self._as_json:
            print(words, file=sys.stderr, flush=True)

    def has_told(self, event: str, contact: str) -> bool:
        """Return whether an event of a contact was told."""
        return (event, contact) in self._told

    def progress(self, name: str, done: int, size: int) -> None:
        """Show how far a file is, a few times a second, on a terminal."""
        if self._as_json or not sys.stderr.isatty():
            return
        now_s = time.monotonic()
        if done < size and now_s - self._progress_s < PROGRESS_EVERY_S:
            return
        percent = 100
        if size:
            percent = 100 * done // size
        words = f"\r{shown(name, MAX_NAME_CHARS)}: {percent:3d}% of {size / 1e6:.1f} MB"
        with self._lock:
            self._progress_s = now_s
            self._unfinished = True
            print(words, end="", file=sys.stderr, flush=True)

    def interrupt(self) -> None:
        """End the line where a terminal shows ^C."""
        if sys.stderr.isatty():
            print(file=sys.stderr, flush=True)
        self._unfinished = False

    def _end_line(self) -> None:
        if self._unfinished:
            print(file=sys.stderr)
            self._unfinished = False


class WarningsToTeller(logging.Handler):
    """Give a teller what the library warns of."""

    def __init__(self, teller: Teller) -> None:
        super().__init__(logging.WARNING)
        self._teller = teller

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, with the traceback if there is one."""
        self._teller.warn(in_flags(self.format(record)))


@contextlib.contextmanager
def telling_warnings(teller: Teller) -> Iterator[None]:
    """Have a teller say what the library warns of."""
    log = logging.getLogger("connectoid")
    handler = WarningsToTeller(teller)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def in_flags(words: str) -> str:
    """Return what the library says, with the flags of the command line for its settings."""
    for said, flags in IN_FLAGS.items():
        words = words.replace(said, flags)
    return words


def emoji_of(record: ContactRecord) -> list[dict[str, str]]:
    """Return the comparison string of a contact as emoji with their names."""
    return [{"emoji": EMOJI[index][0], "name": EMOJI[index][1]} for index in record.comparison]


def show_emoji(record: ContactRecord, margin: str = "") -> str:
    """Return the comparison string for people: four emoji on a line, three on the next."""
    shown = [f"{pair['emoji']} {pair['name']}" for pair in emoji_of(record)]
    lines = (shown[:EMOJI_IN_LINE], shown[EMOJI_IN_LINE:])
    return "\n".join(margin + EMOJI_GAP.join(line) for line in lines)
