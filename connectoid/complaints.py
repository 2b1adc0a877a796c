"""What goes wrong outside is told once: a relay that is dead for a week makes one line."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from connectoid.clock import boot_time_s

# Remembered, so that each is logged once; and of how many contacts and relays the latest.
MAX_COMPLAINTS = 100
# Before a wait began, a relay's trouble is that of the wait: it is asked again only after a pause.
TROUBLE_S = 10.0

log = logging.getLogger("connectoid")

# The id of a contact, or the URL of a relay where this side has mailboxes.
About: TypeAlias = int | str


class Complaint(NamedTuple):
    """The latest of something, and when it was made."""

    text: str
    made_s: float


class Complaints:
    """Log each complaint once, and remember the latest about each contact and each relay."""

    def __init__(self) -> None:
        self.are_over = False
        self._logged: dict[str, None] = {}
        self._latest: dict[About, Complaint] = {}

    def make(
        self, text: str, about: About | None = None, *, error: Exception | None = None,
    ) -> None:
        """Log a complaint, with the traceback of an error that is our own fault."""
        if self.are_over:
            return
        if text not in self._logged:
            log.warning("%s", text, exc_info=error)
        _put_last(self._logged, text, None)
        if about is not None:
            _put_last(self._latest, about, Complaint(text, boot_time_s()))

    def latest_since(self, began_s: float, abouts: Iterable[About]) -> str:
        """Return the latest complaint about some that a wait from then on has felt, or nothing.

        A contact's are those about it, and about the relays where its messages come in: not what
        another contact's relay says.
        """
        found = [self._latest[about] for about in abouts if about in self._latest]
        felt = [one for one in found if one.made_s >= began_s - TROUBLE_S]
        return max(felt, key=_made_s, default=Complaint("", 0.0)).text


def _made_s(complaint: Complaint) -> float:
    return complaint.made_s


def _put_last(entries: dict[Any, Any], key: object, value: object) -> None:
    """Put an entry last, and let go of the first if there are too many."""
    entries.pop(key, None)
    entries[key] = value
    if len(entries) > MAX_COMPLAINTS:
        del entries[next(iter(entries))]
