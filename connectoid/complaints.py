"""What goes wrong outside is told once: a relay that is dead for a week makes one line."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from connectoid.clock import boot_time_s

# Remembered, so that each is logged once; and of how many contacts and relays the latest.
MAX_COMPLAINTS = 100
# Of different words about one contact or relay, in an hour. A relay may have ever new ones.
MAX_TOLD = 10
TOLD_S = 3_600.0
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
        # When something was logged lately, by what it is about.
        self._told: dict[About | None, list[float]] = {}

    def make(
        self, text: str, about: About | None = None, *, error: Exception | None = None,
    ) -> None:
        """Log a complaint, with the traceback of an error that is our own fault."""
        if self.are_over:
            return
        if text in self._logged:
            _put_last(self._logged, text, None)
        elif self._may_tell(about):
            _put_last(self._logged, text, None)
            log.warning("%s", text, exc_info=error)
        if about is not None:
            _put_last(self._latest, about, Complaint(text, boot_time_s()))

    def _may_tell(self, about: About | None) -> bool:
        """Return whether new words may be logged about something, and count them."""
        now_s = boot_time_s()
        told = [told_s for told_s in self._told.get(about, ()) if told_s > now_s - TOLD_S]
        if len(told) < MAX_TOLD:
            _put_last(self._told, about, [*told, now_s])
        return len(told) < MAX_TOLD

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
