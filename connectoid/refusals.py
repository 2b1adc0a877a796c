"""What was refused of each contact: counted by reason, told, and written down.

Anybody who may write to a mailbox decides how much is refused. So this costs a number for each
reason, an event for each reason an hour, and a write a minute.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from connectoid.complaints import Complaints
from connectoid.errors import ROUTINE
from connectoid.limits import TELL_EVERY_S
from connectoid.store import Store, StoreError

# Between two writes for one contact: what a kill may cost of the counts.
WRITTEN_EVERY_S = 60.0


class Machine(Protocol):
    """What is asked of a Contact."""

    @property
    def dropped(self) -> collections.Counter[str]:
        """Return the numbers of refused messages by reason, since it was made."""


@dataclass
class Tally:
    """The refusals of one contact; `seen` are those of the machine that runs now."""

    counts: collections.Counter[str]
    machine: Machine
    seen: collections.Counter[str] = field(default_factory=collections.Counter)
    told_s: dict[str, float] = field(default_factory=dict)
    written_s: float = -math.inf
    is_written: bool = True


class Refusals:
    """Keep the refusals of all contacts by their ids."""

    def __init__(self, store: Store, complaints: Complaints) -> None:
        self._store = store
        self._complaints = complaints
        self._written = store.load_refusals()
        self._tallies: dict[int, Tally] = {}

    def counts(self, number: int) -> Mapping[str, int]:
        """Return how often something of a contact was refused, by reason."""
        if number in self._tallies:
            return dict(self._tallies[number].counts)
        return dict(self._written.get(number, {}))

    def note(self, number: int, contact: Machine, now_s: float) -> bool:
        """Count what a step has refused; return whether to tell the app now."""
        if number not in self._tallies:
            counts = collections.Counter(self._written.get(number, {}))
            self._tallies[number] = Tally(counts, contact)
        tally = self._tallies[number]
        if tally.machine is not contact:
            # The machine was made anew from its record.
            tally.machine = contact
            tally.seen = collections.Counter()
        new = contact.dropped - tally.seen
        if new:
            tally.counts += new
            tally.seen = contact.dropped.copy()
            tally.is_written = False
        if not tally.is_written and now_s - tally.written_s >= WRITTEN_EVERY_S:
            self._write(number, tally, now_s)
        return _is_to_tell(tally, new, now_s)

    def forget(self, number: int) -> None:
        """Forget a contact that was deleted."""
        self._tallies.pop(number, None)
        self._written.pop(number, None)

    def write_all(self, now_s: float) -> None:
        """Write down what is not yet."""
        for number, tally in self._tallies.items():
            if not tally.is_written:
                self._write(number, tally, now_s)

    def _write(self, number: int, tally: Tally, now_s: float) -> None:
        """Write down the counts of a contact. Nothing depends on them: a failure is told."""
        tally.written_s = now_s
        try:
            self._store.save_refusals(number, tally.counts)
        except StoreError as error:
            self._complaints.make(str(error))
        else:
            tally.is_written = True


def _is_to_tell(tally: Tally, new: collections.Counter[str], now_s: float) -> bool:
    """Return whether one of the reasons was not told for an hour. If so, it counts as told."""
    untold = [
        reason for reason in new.keys() - ROUTINE
        if now_s - tally.told_s.get(reason, -math.inf) >= TELL_EVERY_S]
    tally.told_s.update(dict.fromkeys(untold, now_s))
    return bool(untold)
