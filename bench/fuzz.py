"""Feed damaged requests to all that reads, judged by test_fuzz.py: `python bench/fuzz.py [SECONDS] [--seed N]`.

Each target of test_fuzz.py gets its turns, with inputs of its own that the seed repeats. Prints how
many inputs each was given and what took longest; what breaks a promise is made small, printed as a
Python literal (to be added to the seeds there) and ends with exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_fuzz import (  # the file beside us, and with it the relay beside us
    KINDS,
    MAX_EDITS,
    PIECES,
    TARGETS,
    Edit,
    World,
    mutate,
)

MAX_RANDOM_BYTES = 300
RANDOM_SHARE = 0.05  # of the inputs: bytes of no meaning
TURN_S = 0.5  # for a target, before the next one has its turn
TURNS_OF_A_WORLD = 10  # of each target; then new relays: what has filled their boxes shall not hide the rest
MAX_SHRINKS = 200  # tries to make a failure smaller, each in new relays
SHOWN_BYTES = 60  # of the slowest input


def draw_edit(chance: random.Random) -> Edit:
    """Return an edit."""
    return Edit(chance.choice(sorted(KINDS)), chance.randrange(1 << 20),
                chance.choice((1, 1, 2, 8, chance.randrange(65))), chance.randrange(len(PIECES)))


def draw(chance: random.Random, seeds: list[bytes]) -> bytes:
    """Return an input: a seed with some edits, or bytes of no meaning."""
    if chance.random() < RANDOM_SHARE:
        return chance.randbytes(chance.randrange(MAX_RANDOM_BYTES))
    return mutate(chance.choice(seeds), [draw_edit(chance) for _ in range(chance.randrange(MAX_EDITS + 1))])


class Failure(Exception):
    """Say what an input has broken."""

    def __init__(self, name: str, octets: bytes, why: str) -> None:
        super().__init__(why)
        self.name, self.octets = name, octets


class Fuzzer:
    """Give a target inputs, one after another, and count them."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, (self.target, seeds) = name, TARGETS[name]
        self.seeds, self.chance = list(seeds.values()), random.Random(f"{seed} {name}")
        self.tried, self.slowest_s, self.slowest = 0, 0.0, b""

    def turn(self, world: World, until_s: float) -> None:
        """Try inputs until it is time; raise Failure."""
        while time.monotonic() < until_s:
            octets, started_s = draw(self.chance, self.seeds), time.thread_time()
            try:
                self.target(octets, world)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise Failure(self.name, octets, f"{type(error).__name__}: {error} ({where.line})") from error
            finally:
                self.tried += 1
            if (taken_s := time.thread_time() - started_s) > self.slowest_s:
                self.slowest_s, self.slowest = taken_s, octets


def fails(name: str, octets: bytes) -> bool:
    """Return whether an input alone, in a new world, breaks a promise."""
    try:
        with world_for_a_while() as world:
            if name in TARGETS:
                TARGETS[name][0](octets, world)
    except Exception:
        return True
    return False


def shrink(octets: bytes, still: Callable[[bytes], bool]) -> bytes:
    """Return a smaller input that still fails: without as many halves, quarters ... bytes as can be."""
    size, tries = len(octets) // 2, 0
    while size and tries < MAX_SHRINKS:
        for start in range(0, len(octets), size):
            tries += 1
            if tries < MAX_SHRINKS and still(shorter := octets[:start] + octets[start + size:]):
                octets = shorter
                break
        else:
            size //= 2
    return octets


@contextlib.contextmanager
def world_for_a_while() -> Iterator[World]:
    """Provide a new world."""
    world = World()
    try:
        yield world
    finally:
        world.close()


def run(fuzzers: list[Fuzzer], seconds: float) -> Failure | None:
    """Let all targets have turns until the time is over; return the first failure."""
    until_s = time.monotonic() + seconds
    try:
        while time.monotonic() < until_s:
            with world_for_a_while() as world:
                for fuzzer in TURNS_OF_A_WORLD * fuzzers:
                    fuzzer.turn(world, min(until_s, time.monotonic() + TURN_S))
    except Failure as failure:
        return failure
    except AssertionError as error:  # at the end of a world
        return Failure("the end of a world", b"", str(error))
    return None


def explain(failure: Failure, seed: int) -> str:
    """Return what was found, with what it takes to see it again."""
    text = f"{failure.name}, seed {seed}: {failure}\ninput: {failure.octets!r}"
    if not fails(failure.name, failure.octets):
        return f"{text}\nIt does so only after the inputs before it."
    return f"{text}\nsmaller: {shrink(failure.octets, functools.partial(fails, failure.name))!r}"


def main() -> int:
    """Try inputs until the time is over; return 1 if one has broken a promise."""
    parser = argparse.ArgumentParser(description="Feed damaged requests to all that reads.")
    parser.add_argument("seconds", type=float, nargs="?", default=60.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all that is random")
    parser.add_argument("--target", choices=TARGETS, action="append", help="one of these alone; may be repeated")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    fuzzers = [Fuzzer(name, arguments.seed) for name in arguments.target or TARGETS]
    failure = run(fuzzers, arguments.seconds)
    for fuzzer in fuzzers:
        print(f"{fuzzer.name:12} {fuzzer.tried:9,} inputs, the slowest {1000 * fuzzer.slowest_s:.1f} ms of CPU here:"
              f" {fuzzer.slowest[:SHOWN_BYTES]!r}")
    total = f"{sum(fuzzer.tried for fuzzer in fuzzers):,}"
    print(explain(failure, arguments.seed) if failure else f"seed {arguments.seed}: {total} inputs: no promise broken")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
