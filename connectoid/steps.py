"""Steps of the machines, one after another: what they ask for is done before the next one.

The store is written here, and what leaves the process goes to the carrier. A step that fails costs
no other contact anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

from connectoid.carrier import Carrier
from connectoid.complaints import Complaints
from connectoid.contact import Contact, Effect, Forget, Now, Save, Tell
from connectoid.errors import UsageError
from connectoid.limits import ZERO_EVERY_S
from connectoid.line import Lines
from connectoid.pauses import MIN_RETRY_S
from connectoid.refusals import Refusals
from connectoid.roster import Roster
from connectoid.store import StoreError

# Between two ticks, at least.
TICK_S = 0.05

Step = Callable[..., list[Effect]]


class Steps:
    """Make the steps of the contacts on a roster, and do what they ask for."""

    def __init__(
        self, roster: Roster, complaints: Complaints, refusals: Refusals, lines: Lines,
        carrier: Carrier, *, now: Callable[[], Now],
    ) -> None:
        # Set with every step, and replaced: whoever waits for something looks again.
        self.changed = asyncio.Event()
        self._roster = roster
        self._complaints = complaints
        self._refusals = refusals
        self._lines = lines
        self._carrier = carrier
        self._now = now
        # A contact whose step has failed has no tick before then.
        self._rests_until_s: dict[int, float] = {}

    def make(self, number: int, step: Step, *args: Any) -> None:
        """Make a step that no app has asked for; raise StoreError, which is complained of here.

        Anything else that fails is a fault of this program. It is logged once.
        """
        try:
            self.do(number, step(self._now(), *args))
        except StoreError as error:
            self._complaints.make(str(error), number)
            raise
        except UsageError as error:
            # The machine has undone the step itself. What it cannot do now, it tries later.
            self._complaints.make(str(error), number)
            self._rest(number)
        except Exception as error:
            text = f"A step of contact {number} failed: {error!r}"
            self._complaints.make(text, number, error=error)
            self._restore(number)

    def do(self, number: int, effects: Iterable[Effect]) -> None:
        """Do what a machine asks for, in order: what could not be saved is not sent.

        Raises StoreError.
        """
        for effect in effects:
            if isinstance(effect, Save | Forget):
                self._write_down(number, effect)
            else:
                self._carrier.carry_out(number, effect)
        if self._carrier.is_running and not self._carrier.is_stopped:
            self._lines.draw()
        self._note_refusals(number)
        self.note_change()

    async def tick(self) -> None:
        """Make the ticks of all contacts when they are due, for ever."""
        while True:
            changed = self.changed
            for number, contact in list(self._roster.contacts.items()):
                if self._tick_at_s(number, contact) <= self._now().monotonic_s:
                    with contextlib.suppress(StoreError):
                        self.make(number, contact.tick)
            ticks_s = [self._tick_at_s(*item) for item in self._roster.contacts.items()]
            left_s = min(ticks_s, default=math.inf) - self._now().monotonic_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(TICK_S, min(left_s, ZERO_EVERY_S))):
                    await changed.wait()

    def note_change(self) -> None:
        """Wake all that wait for `changed`."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _note_refusals(self, number: int) -> None:
        contact = self._roster.contacts.get(number)
        if contact is None:
            self._refusals.forget(number)
            return
        is_news = self._refusals.note(number, contact, self._now().monotonic_s)
        # The name of a tombstone may be that of another contact by now.
        if is_news and contact.record.state != "unshared":
            self._carrier.carry_out(number, Tell("refused"))

    def _tick_at_s(self, number: int, contact: Contact) -> float:
        return max(contact.next_tick_s, self._rests_until_s.get(number, -math.inf))

    def _write_down(self, number: int, effect: Save | Forget) -> None:
        try:
            if isinstance(effect, Save):
                self._roster.save(number, effect.record)
            else:
                self._roster.delete(number)
        except Exception:
            self._restore(number)
            raise

    def _restore(self, number: int) -> None:
        self._roster.restore(number)
        self._rest(number)
        self.note_change()

    def _rest(self, number: int) -> None:
        self._rests_until_s[number] = self._now().monotonic_s + MIN_RETRY_S
