"""The plan of a run, drawn before it begins."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from harness import START_US

from connectoid.limits import MAX_REPLACED

MONTH_S = 30 * 86_400.0

HOUR_S = 3_600.0

# This times the gap that the machine asks for is 66 s.
SLOWEST = 1.1


class Chaos(NamedTuple):
    """The adversary: probabilities for each message, answer and step. All 0 is fair."""

    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    swap: float = 0.0
    replay: float = 0.0
    forge: float = 0.0
    crash: float = 0.0
    # A check does not reach the relay.
    blind: float = 0.0
    # There is no path between the two networks.
    no_path: float = 0.0
    # WebRTC fails, or never says so.
    no_sdp: float = 0.0
    # A message on the channel is lost.
    mute: float = 0.0


FAIR = Chaos()

# How long messages are held back.
LATE_S = (1.0, 30.0, 600.0, 3_000.0)


@dataclass(frozen=True)
class Plan:
    """The course of a run, apart from chance on the way."""

    seed: int
    relays: int = 1
    # The relay that never answers.
    dead: int = -1
    openers: tuple[str, ...] = ("bob",)
    carol: bool = False
    open_after_s: float = 5.0
    chaos: Chaos = FAIR
    chaos_s: float = 0.0
    # The time, the app, and the act of its user.
    acts: tuple[tuple[float, str, str], ...] = ()
    # From, to, and the relay that answers no check in between.
    held: tuple[tuple[float, float, int], ...] = ()
    # Both programs are off for so long after the adversary has stopped.
    sleep_s: float = 0.0
    # Both users then ask for a connection.
    pressed: bool = True
    # The error of each clock.
    walls_s: Mapping[str, float] = field(default_factory=dict)
    # The relays hold checks; otherwise apps check every 2 s.
    waits: bool = True
    # In each SDP.
    candidates: int = 0
    # Real cryptography, and the real store.
    real: bool = False
    # The relays' real store under the cheap suite.
    sqlite: bool = False
    slowest: float = SLOWEST


PEOPLE = ("alice", "bob", "eve", "alice2", "carol")

WHATS = ("off", "off", "off", "connect", "disconnect", "move", "verify", "unshare", "unshare")

# The part of runs in which both users change relays again and again, and how often. The most is one
# more than is allowed to who hears nothing.
RESTLESS = 0.15

MOVES = (2, 3, 4, MAX_REPLACED + 2)

SLEEPS_S = (0.0,) * 12 + (600.0, 4_000.0, 86_400.0, 31 * 86_400.0)

WRONG_CLOCK_S = 120.0

FAR_CLOCKS_S = (-START_US / 1e6, -10 * 365 * 86_400.0, 10 * 365 * 86_400.0, 500 * 365 * 86_400.0)


def draw_plan(seed: int, *, real: bool = False) -> Plan:
    """Return the plan of a seed."""
    draw = random.Random(seed)
    relays = draw.choice((1, 1, 2, 3))
    openers = draw.choice((("bob",),) * 4 + (("bob", "eve"),))
    chaos_s = draw.choice((0.0, 30.0, 60.0, 60.0, 120.0, 120.0, 300.0, 300.0))
    # Rare, because they take long.
    if not real and draw.random() < 0.08:
        chaos_s = draw.choice((900.0, 900.0, 2 * HOUR_S))
    carol = draw.random() < 0.1
    dead = draw.randrange(relays) if relays > 1 and draw.random() < 0.3 else -1
    open_after_s = draw.choice((0.5, 5.0, 30.0, 100.0, 4_000.0 if draw.random() < 0.2 else 10.0))
    chaos = _draw_chaos(draw, chaos_s)
    acts = _draw_acts(draw, chaos_s, openers, carol)
    held = _draw_held(draw, chaos_s, relays)
    sleep_s = draw.choice(SLEEPS_S)
    pressed = draw.random() < 0.7
    walls_s = _draw_walls(draw)
    waits = draw.random() < 0.9
    candidates = draw.choice((0, 0, 16))
    moves = _draw_moves(draw, chaos_s, openers)
    renewals = _draw_renewals(draw, chaos_s, openers)
    return Plan(
        seed,
        relays,
        dead,
        openers,
        carol,
        open_after_s,
        chaos,
        chaos_s,
        tuple(sorted((*acts, *moves, *renewals))),
        held,
        sleep_s,
        pressed=pressed,
        walls_s=walls_s,
        waits=waits,
        candidates=candidates,
        real=real,
    )


def _draw_chaos(draw: random.Random, chaos_s: float) -> Chaos:
    """Return probabilities, each of which is 0 in about half of the runs."""

    def some(most: float) -> float:
        return draw.random() * most if draw.random() < 0.5 else 0.0

    # A long run is no series of crashes.
    crash = some(0.25) * min(1, 300 / (chaos_s + 1))
    return Chaos(
        some(0.6),
        some(0.4),
        some(0.5),
        some(0.2),
        some(0.4),
        some(0.4),
        crash,
        some(0.5),
        draw.choice((0.0, 0.0, some(1.0), 1.0)),
        some(0.3),
        some(0.3),
    )


def _draw_acts(
    draw: random.Random, until_s: float, openers: tuple[str, ...], carol: bool
) -> tuple[tuple[float, str, str], ...]:
    people = ("alice", *openers, *(("alice2", "carol") if carol else ()))
    count = draw.choice((0, 0, 1, 2, 4))
    return tuple(
        sorted(
            (draw.random() * until_s, draw.choice(people), draw.choice(WHATS)) for _ in range(count)
        )
    )


def _draw_moves(
    draw: random.Random, until_s: float, openers: tuple[str, ...]
) -> tuple[tuple[float, str, str], ...]:
    """Return, in few runs, changes of relays of both sides, one after the other."""
    if draw.random() > RESTLESS:
        return ()
    return tuple(
        (draw.uniform(until_s / 2, until_s), who, "move")
        for who in ("alice", openers[0])
        for _ in range(draw.choice(MOVES))
    )


def _draw_renewals(
    draw: random.Random, until_s: float, openers: tuple[str, ...]
) -> tuple[tuple[float, str, str], ...]:
    """Return renewals of keys, of either side or of both."""
    count = draw.choice((0, 0, 0, 1, 2, 4))
    return tuple(
        (draw.uniform(until_s / 4, until_s), draw.choice(("alice", openers[0])), "renew")
        for _ in range(count)
    )


def _draw_held(
    draw: random.Random, until_s: float, relays: int
) -> tuple[tuple[float, float, int], ...]:
    starts_s = [draw.random() * until_s for _ in range(draw.choice((0, 0, 0, 1, 3)))]
    return tuple(
        (start_s, min(until_s, start_s + draw.uniform(20, 200)), draw.randrange(relays))
        for start_s in starts_s
    )


def _draw_walls(draw: random.Random) -> dict[str, float]:
    if draw.random() < 0.05:
        return {who: draw.choice(FAR_CLOCKS_S) for who in PEOPLE}
    return {who: draw.uniform(-WRONG_CLOCK_S / 2, WRONG_CLOCK_S / 2) for who in PEOPLE}
