"""A run: the people in the world, their acts, and the possible ends."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Mapping
from typing import NamedTuple

from sim_app import App, is_over
from sim_judge import keys_of
from sim_plan import FAIR, HOUR_S, MONTH_S, Plan
from sim_world import Broken, World

from connectoid import make_link
from connectoid.limits import AGAIN_IDLE_S

# After the adversary has stopped and both users asked for a connection.
PRESSED_IN_S = 300.0

# The same when nobody asked: until the next rare attempt, and one more.
IDLE_IN_S = 2.2 * AGAIN_IDLE_S

# An opener may open on the last day of a link.
EXPIRED_AFTER_S = 61 * 86_400.0

TOGETHER_S = 120.0


class Outcome(NamedTuple):
    """The end of a run."""

    # Of each pair.
    ends: tuple[str, ...]
    # After the adversary stopped.
    settled_s: float
    told: Mapping[str, int]
    dropped: Mapping[str, int]


class Run:
    """Play a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World(plan)
        self.pairs = [self._invite("alice", name) for name in plan.openers[:1]]
        alice = self.pairs[0][0]
        self.pairs += [(alice, self._open(alice, name)) for name in plan.openers[1:]]
        if plan.carol:
            self.pairs.append(self._invite("alice2", "carol"))

    def _invite(self, inviter: str, opener: str) -> tuple[App, App]:
        alice = self.world.apps[inviter] = App(self.world, inviter, relays=self.world.relays)
        # No link, no story.
        chaos = self.world.chaos
        self.world.chaos = FAIR
        alice.start()
        self.world.chaos = chaos
        return alice, self._open(alice, opener)

    def _open(self, alice: App, name: str) -> App:
        bob = self.world.apps[name] = App(self.world, name)
        assert alice.saved is not None
        bob.link = make_link("https://app.example/", alice.saved.invitation)
        bob.partners.add(alice.name)
        alice.partners.add(name)
        self.world.after(self.plan.open_after_s * self.world.draw.uniform(0.8, 1.2), bob.start)
        return bob

    def play(self) -> Outcome:
        """Play the plan and return its outcome; raise Broken with the story."""
        try:
            with contextlib.closing(self.world):
                return self._play()
        except Exception as error:
            raise Broken(
                f"{error!r}\n{self.plan}\n{self.world.story()}\nSEED={self.plan.seed}"
            ) from error

    def _play(self) -> Outcome:
        world = self.world
        plan = self.plan
        for at_s, who, what in plan.acts:
            world.after(at_s, functools.partial(world.apps[who].act, what))
        world.run(plan.chaos_s)
        world.chaos = FAIR
        world.note("mallory", "gives up")
        if plan.sleep_s:
            self._sleep(plan.sleep_s)
        world.run(max(world.now_s, plan.open_after_s * 1.2))
        since_s = world.now_s
        pressed = plan.pressed or not all(app.wants for app in world.apps.values())
        if pressed:
            self._press()
        settled = self._settle(PRESSED_IN_S if pressed or plan.sleep_s else IDLE_IN_S)
        settled_s = world.now_s - since_s if settled else -1.0
        if not settled:
            self._expect_excuses()
            self._sleep(EXPIRED_AFTER_S)
            far = any(abs(wall_s) > MONTH_S for wall_s in plan.walls_s.values())
            lost = far or any(app.gone for app in world.apps.values())
            # An app with a useless clock is told by nobody.
            if not self._settle(PRESSED_IN_S) and not lost:
                raise Broken("not told why, long after")
        ends = tuple(map(self.end_of, self.pairs))
        for app in world.apps.values():
            app.stop()
        return Outcome(ends, settled_s, world.told, world.dropped)

    def _press(self) -> None:
        for app in self.world.apps.values():
            app.press()

    def _sleep(self, sleep_s: float) -> None:
        for app in self.world.apps.values():
            app.stop()
        self.world.asleep = True
        self.world.run(self.world.now_s + sleep_s)
        self.world.asleep = False
        self._press()

    def _settle(self, within_s: float) -> bool:
        return self.world.run(
            self.world.now_s + within_s, lambda: all(map(self.end_of, self.pairs))
        )

    def end_of(self, pair: tuple[App, App]) -> str:
        """Return how a pair ended, or nothing as long as it did not."""
        alice, bob = pair
        if _are_connected(alice, bob):
            return "connected"
        if is_over(bob) and (is_over(alice) or _is_of_another(alice, bob)):
            assert bob.saved
            return bob.saved.why or bob.saved.state
        return ""

    def _expect_excuses(self) -> None:
        """Raise Broken if an app still waits for something other than the calendar."""
        for alice, bob in self.pairs:
            if self.end_of((alice, bob)):
                continue
            assert alice.saved
            assert bob.saved
            if is_over(alice) and bob.saved.state in ("opened", "ready"):
                continue
            if (
                _is_of_another(alice, bob)
                and bob.saved.state == "opened"
                and not alice.saved.invited
            ):
                # A link of more than 30 days: nobody listens there any more.
                continue
            if is_over(bob) and alice.saved.state in ("invited", "welcomed"):
                continue
            if (alice.gone or bob.gone) and self.plan.sleep_s > MONTH_S:
                # A tombstone stays for 30 days, and the other side was not there.
                continue
            raise Broken(f"{alice.name} and {bob.name} neither connected nor told why")


def _are_connected(alice: App, bob: App) -> bool:
    if not alice.contact or not bob.contact:
        return False
    pc = alice.webrtc.pc
    if pc is None or pc.peer is not bob.webrtc.pc:
        return False
    return alice.contact.attempt.state == bob.contact.attempt.state == "connected"


def _is_of_another(alice: App, bob: App) -> bool:
    assert alice.saved
    assert bob.saved
    return alice.saved.contact not in {"", *keys_of(bob.saved)}


def play(plan: Plan) -> Outcome:
    """Play a plan."""
    return Run(plan).play()


class Meeting(NamedTuple):
    """The past of two apps before they are online together."""

    plan: Plan
    # How much later the opener starts than the inviter.
    offset_s: float
    # How long both were online before; 0 if the opener opens the link only now.
    known_s: float
    # Since then.
    apart_s: float


def draw_meeting(seed: int) -> Meeting:
    """Return a meeting of a seed: no loss, no adversary, clocks up to two minutes apart."""
    draw = random.Random(seed)
    walls_s = {"alice": draw.uniform(-60, 60), "bob": draw.uniform(-60, 60)}
    plan = Plan(
        seed,
        relays=draw.choice((1, 1, 2, 3)),
        walls_s=walls_s,
        waits=draw.random() < 0.5,
        slowest=1.0,
        open_after_s=0.0,
    )
    offset_s = draw.choice((1, -1)) * draw.choice(
        (draw.uniform(0, 5), draw.uniform(0, 150), draw.uniform(0, HOUR_S))
    )
    known_s = draw.choice((0.0, 0.0, draw.uniform(0.1, 8), draw.uniform(0.1, 8), 30.0))
    return Meeting(
        plan, offset_s, known_s, draw.choice((5.0, 100.0, 3_000.0, 7_200.0, 29 * 86_400.0))
    )


def meet(meeting: Meeting) -> float:
    """Return after how many seconds both are connected; raise Broken after two minutes."""
    run = Run(meeting.plan)
    try:
        with contextlib.closing(run.world):
            return _meet(run, meeting)
    except Exception as error:
        raise Broken(
            f"{error!r}\n{meeting}\n{run.world.story()}\nSEED={meeting.plan.seed}"
        ) from error


def _meet(run: Run, meeting: Meeting) -> float:
    world = run.world
    (alice, bob) = run.pairs[0]
    _prepare(world, alice, bob, meeting)
    first, second = (alice, bob) if meeting.offset_s > 0 else (bob, alice)
    first.start()
    world.run(world.now_s + abs(meeting.offset_s))
    since_s = world.now_s
    second.start()
    if not world.run(since_s + TOGETHER_S, lambda: run.end_of((alice, bob)) == "connected"):
        raise Broken("not connected within two minutes")
    return world.now_s - since_s


def _prepare(world: World, alice: App, bob: App, meeting: Meeting) -> None:
    """Play the past of both, and stop them. The inviter of an unopened link may stay."""
    if not meeting.known_s:
        # The link is not opened yet.
        world.asleep = True
        world.run(1.0)
        world.asleep = False
        if meeting.offset_s < 0:
            alice.stop()
        return
    world.run(meeting.known_s)
    bob.stop()
    alice.stop()
    world.run(world.now_s + meeting.apart_s)
