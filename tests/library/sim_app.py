"""An app in the simulation: it starts, stops, polls, crashes, and executes effects."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from harness import START_US
from sim_judge import judge_connection, judge_save
from sim_plan import HOUR_S, PEOPLE
from sim_webrtc import PlayedWebRTC
from sim_world import Broken, World

from connectoid import (
    Close,
    Contact,
    ContactRecord,
    Effect,
    Forget,
    Gather,
    Join,
    Now,
    Save,
    Send,
    Suite,
    Tell,
    UsageError,
    Write,
    read_link,
)
from connectoid.limits import POLL_FAST_S

# A check that a relay holds; then it is asked again.
HELD_S = 55.0

# How late a timer is.
TIMER_S = 0.001


class App:
    """A program with one contact: it starts, stops, polls, crashes, and executes effects."""

    def __init__(self, world: World, name: str, *, relays: Iterable[str] = ()) -> None:
        self.world = world
        self.name = name
        self.suite = world.make_suite(name)
        self.source = f"192.0.2.{PEOPLE.index(name) + 1}"
        self.relays = [(url, None) for url in relays]
        self.partners: set[str] = set()
        self.link = ""
        self.contact: Contact | None = None
        self.saved: ContactRecord | None = None
        self.gone = False
        self.wants = True
        self.process = 0
        self.webrtc = PlayedWebRTC(self)
        self.connected_s = -1.0
        self.steps = 0
        # The effect, counted over the run, before which to crash.
        self.crash_at = -1
        self._wall_s = world.plan.walls_s.get(name, 0.0)
        self._boot_s = 0.0
        self._sent_s = self._polled_s = self._poll_s = self._tick_s = 0.0
        self._polling = self._forgets = self._news = False
        self._effects: dict[type[Effect], Callable[[Any], None]] = {
            Save: self._save,
            Forget: self._forget,
            Send: self._send,
            Gather: self.webrtc.gather,
            Join: self.webrtc.join,
            Write: self.webrtc.write,
            Close: self.webrtc.close,
            Tell: self._tell,
        }

    # -- Time ----------------------------------------------------------------------------

    @property
    def now(self) -> Now:
        """Return the time by this device's clocks."""
        return Now(
            max(0, START_US + round((self.world.now_s + self._wall_s) * 1e6)),
            self.world.now_s - self._boot_s,
        )

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call something later, if this process still runs."""
        process = self.process

        def call_if_alive() -> None:
            if self.process == process:
                call()

        self.world.after(delay_s, call_if_alive)

    def queue_s(self, delay_s: float) -> float:
        """Return a delay that keeps the messages of this app in order."""
        self._sent_s = max(self._sent_s, self.world.now_s + delay_s)
        return self._sent_s - self.world.now_s

    # -- Life ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the program."""
        if self.contact is not None or self.gone or self.world.asleep:
            return
        self.process += 1
        self._boot_s = self.world.now_s - self.world.draw.uniform(0, 1e5)
        self._tick_s = self._poll_s = float("inf")
        self._polled_s = self.world.now_s - HOUR_S
        self._polling = False
        self.world.note(self.name, "starts", f"from {self.saved.state}" if self.saved else "")
        if self.saved:
            self.contact = Witness(self.suite, self._restored())
            self.step("tick")
            if self.wants and self.contact:
                self.step("connect")
        elif self.link:
            self.contact, effects = Witness.open(
                self.suite, self.now, "Alice", read_link(self.link)
            )
            self._do(effects)
        else:
            self.contact, effects = Witness.invite(self.suite, self.now, "Bob", self.relays)
            self._do(effects)

    def _restored(self) -> ContactRecord:
        assert self.saved
        record = ContactRecord.from_json(self.saved.to_json())
        if record != self.saved:
            raise Broken(f"{self.name}: a record changed on its way through JSON")
        self.saved = record
        return record

    def stop(self, why: str = "stops") -> None:
        """End the program without a save. The other end of the channel notices in a while."""
        if self.contact is not None:
            self.world.note(self.name, why)
            self.world.dropped.update(self.contact.dropped)
        self.process += 1
        self.contact = None
        self.webrtc.die()

    def _crash(self) -> None:
        self.stop("crashes")
        self.world.after(self.world.draw.uniform(1, 20), self.start)

    def act(self, what: str) -> None:
        """Act as the user does."""
        self.world.note(self.name, "USER", what)
        if what == "off":
            self.stop()
            self.world.after(self.world.draw.choice((5.0, 60.0, 200.0)), self.start)
        elif self.contact is None:
            return
        elif what == "move":
            with contextlib.suppress(UsageError):
                self.step("move", self.relays or [(url, None) for url in self.world.relays])
        elif what in ("verify", "renew"):
            with contextlib.suppress(UsageError):
                self.step(what)
        elif what != "unshare" or not is_over(self):
            self.wants = what == "connect"
            self.step(what)

    def press(self) -> None:
        """Ask for a connection, and start the program if it is off."""
        self.wants = True
        if self.contact is None:
            self.start()
        elif self.contact.attempt.state != "connected":
            self.act("connect")

    # -- Steps and what they ask for -------------------------------------------------------

    def step(self, event: str, *args: Any) -> None:
        """Hand the machine an event, and execute its effects."""
        assert self.contact is not None
        self._do(getattr(self.contact, event)(self.now, *args))

    def _do(self, effects: list[Effect]) -> None:
        """Do everything, in order, unless the process dies on the way."""
        draw = self.world.draw
        process = self.process
        # Then nothing is worth a save.
        self._forgets = Forget() in effects
        dies = -1
        if effects and draw.random() < self.world.chaos.crash:
            dies = draw.randrange(len(effects) + 1)
        for place, effect in enumerate(effects):
            if place == dies or self.steps == self.crash_at:
                self.steps += 1
                return self._crash()
            self.steps += 1
            self._effects[type(effect)](effect)
            if self.process != process:
                return None
        if dies == len(effects):
            return self._crash()
        self._set_tick()
        self._set_poll()
        return None

    def _set_tick(self) -> None:
        assert self.contact is not None
        due_s = max(self.contact.next_tick_s + self._boot_s, self.world.now_s) + TIMER_S
        if due_s < self._tick_s:
            self._tick_s = due_s
            self.after(due_s - self.world.now_s, functools.partial(self._tick, due_s))

    def _tick(self, due_s: float) -> None:
        if self.contact is None or due_s != self._tick_s:
            return
        self._tick_s = math.inf
        if self.contact.next_tick_s <= self.now.monotonic_s:
            self.step("tick")
        else:
            self._set_tick()

    def _save(self, effect: Save) -> None:
        record = effect.record
        judge_save(self, record)
        # It becomes text only when it is read: that costs a fifth of a run.
        self.saved = record

    def _forget(self, _effect: Forget) -> None:
        self.gone = True
        self.world.news = True
        self.stop("forgets")

    def check_saved(self) -> None:
        """Raise Broken if something leaves of which the record on disk knows nothing."""
        if self.contact is None or (self.contact.record is not self.saved and not self._forgets):
            raise Broken(f"{self.name}: something leaves before it was saved")

    def _send(self, effect: Send) -> None:
        self.check_saved()
        self.world.wire.send(self, effect)
        # The reply of the relay, whatever becomes of the message.
        if self.contact is not None:
            self.contact.sent(self.now, effect.message_hash)

    def _tell(self, effect: Tell) -> None:
        self.world.note(self.name, "TELLS", effect.event)
        self.world.told[effect.event] += 1
        self.world.news = True
        if effect.event == "connected":
            judge_connection(self)
            self.connected_s = self.world.now_s
        elif effect.event == "disconnected" and self.wants:
            self.after(self.world.draw.uniform(0.5, 5), self._reconnect)

    def _reconnect(self) -> None:
        if self.contact is not None and self.wants:
            self.step("connect")

    # -- Polling -------------------------------------------------------------------------

    def wake(self) -> None:
        """Let a check that the relay holds come back."""
        self._news = True
        self._set_poll()

    def _set_poll(self) -> None:
        """Set when to check next: the time that was set before may be too late now."""
        if self.contact is None or self._polling:
            return
        gap_s = self.contact.poll_gap_s(self.now)
        if gap_s != POLL_FAST_S:
            gap_s *= self.world.draw.uniform(1, self.world.plan.slowest)
        elif self.world.plan.waits and not self._news:
            gap_s = HELD_S
        self._poll_in(max(0.02, self._polled_s + gap_s - self.world.now_s))

    def _poll_in(self, delay_s: float) -> None:
        due_s = self.world.now_s + delay_s
        if due_s < self._poll_s:
            self._poll_s = due_s
            self.after(delay_s, functools.partial(self._poll, due_s))

    def _poll(self, due_s: float) -> None:
        if self.contact is None or due_s != self._poll_s:
            return
        self._poll_s = math.inf
        self._polled_s = self.world.now_s
        self._polling = True
        # The next check finds later messages, and then does not wait.
        self._news = False
        found = {
            poll.mailbox.pub: boxed
            for poll in self.contact.polls(self.now)
            if (boxed := self.world.wire.read(self, poll)) is not None
        }
        self.after(self.world.draw.uniform(0.02, 0.3), functools.partial(self._polled, found))

    def _polled(self, found: dict[str, list[tuple[int, str]]]) -> None:
        self._polling = False
        if any(found.values()):
            self.world.note(
                self.name, "reads", {pub[:6]: len(boxed) for pub, boxed in found.items() if boxed}
            )
        self.step("polled", found)


class Witness(Contact):
    """A contact that counts which rules of its tables were taken, and where they led."""

    taken: ClassVar[collections.Counter[tuple[str, str, str]]] = collections.Counter()

    def __init__(self, suite: Suite, record: ContactRecord, *, allow_http: bool = False) -> None:
        super().__init__(suite, record, allow_http=allow_http)
        self.machine.taken = Witness.taken


def is_over(app: App) -> bool:
    return app.gone or (app.saved is not None and app.saved.state in ("ended", "unshared"))
