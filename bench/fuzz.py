"""Feed damaged inputs to all that reads: `python bench/fuzz.py [SECONDS] [--seed N]`.

The rooms are those of the relay (tests/relay/fuzz_targets.py) and of the library's readers in both
languages (tests/library/fuzz_readers.py), and a real runner among hostile contacts and relays
(tests/library/fuzz_runner.py). Each target gets its turns, with inputs of its own that
the seed repeats. It prints how many inputs each was given and what took longest. An input that
breaks a promise is made small and printed as a Python literal, to be added to the seeds there; the
exit status is 1. With `--inputs N` it goes on until there were so many, whatever time that takes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "relay"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "library"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

# The targets of this checkout, and with them the relay and the library of this checkout.
import fuzz_inputs
import fuzz_readers
import fuzz_runner
import fuzz_targets
from mutation import Mutator


class Room(NamedTuple):
    """Targets that share a world: what makes one, and what makes their inputs."""

    # It has a method `close`, which looks at it once more.
    make_world: Callable[[], Any]
    # An input of some is a script: these return how many messages were in it.
    targets: Mapping[str, tuple[Callable[[bytes, Any], int | None], Mapping[str, bytes]]]
    mutator: Mutator


ROOMS = (
    Room(fuzz_targets.World, fuzz_targets.TARGETS, fuzz_inputs.MUTATOR),
    Room(fuzz_readers.Node, fuzz_readers.TARGETS, fuzz_readers.MUTATOR),
    Room(fuzz_runner.Theatre, fuzz_runner.TARGETS, fuzz_runner.MUTATOR),
)
ROOM_OF: Mapping[str, Room] = {name: room for room in ROOMS for name in room.targets}
# How long a target runs before the next one has its turn.
TURN_S = 0.25
# How many inputs a target gets before new relays come: full boxes would hide the rest.
TURNS_OF_A_WORLD = 10
# What is sent to another process ahead: it fits into a pipe, in base64 too.
MAX_AHEAD = 64
MAX_AHEAD_BYTES = 16_384
# How often it says how far it is.
PROGRESS_S = 60.0
# How often we try to make a failure smaller, each time in new relays.
MAX_SHRINKS = 200
# Of the slowest input.
SHOWN_BYTES = 60


class Worlds:
    """Make a world for each room where inputs come, when the first comes."""

    def __init__(self) -> None:
        self._worlds: dict[int, Any] = {}

    def of(self, name: str) -> Any:
        """Return the world of a target."""
        room = ROOM_OF[name]
        if id(room) not in self._worlds:
            self._worlds[id(room)] = room.make_world()
        return self._worlds[id(room)]

    def close(self) -> None:
        """Close all, whatever one of them finds."""
        with contextlib.ExitStack() as stack:
            for world in self._worlds.values():
                stack.callback(world.close)


class Failure(Exception):
    """Say which promise an input has broken."""

    def __init__(self, name: str, octets: bytes, why: str) -> None:
        super().__init__(why)
        self.name = name
        self.octets = octets


class Fuzzer:
    """Give a target inputs, one after another, and count them."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.room = ROOM_OF[name]
        self.target, seeds = self.room.targets[name]
        self.seeds = list(seeds.values())
        self.chance = random.Random(f"{seed} {name}")
        self.tried = 0
        self.messages = 0
        self.slowest_s = 0.0
        self.slowest = b""

    def turn(self, world: Any, until_s: float) -> None:
        """Try inputs until it is time; raise Failure."""
        while time.monotonic() < until_s:
            if not hasattr(world, "prepare"):
                self._try(self._draw(), world)
                continue
            inputs = self._draw_some()
            world.prepare(self.name, inputs)
            for octets in inputs:
                self._try(octets, world)

    def _draw(self) -> bytes:
        return self.room.mutator.draw(self.chance, self.seeds)

    def _draw_some(self) -> list[bytes]:
        """Return inputs that fit into a pipe together, or a single one."""
        inputs = [self._draw()]
        while len(inputs) < MAX_AHEAD and sum(map(len, inputs)) < MAX_AHEAD_BYTES:
            inputs.append(self._draw())
        while len(inputs) > 1 and sum(map(len, inputs)) > 2 * MAX_AHEAD_BYTES:
            inputs.remove(max(inputs, key=len))
        return inputs

    def _try(self, octets: bytes, world: Any) -> None:
        self.tried += 1
        started_s = time.thread_time()
        try:
            self.messages += self.target(octets, world) or 0
        except Exception as error:
            raise Failure(self.name, octets, reason(error)) from error
        taken_s = time.thread_time() - started_s
        if taken_s > self.slowest_s:
            self.slowest_s = taken_s
            self.slowest = octets

    def show(self) -> None:
        """Print what was tried."""
        print(f"{self.name:12} {self.tried:9,} inputs, the slowest"
              f" {1000 * self.slowest_s:.1f} ms of CPU here: {self.slowest[:SHOWN_BYTES]!r}")
        if self.messages:
            print(f"{'':12} {self.messages:9,} messages in them")


def reason(error: Exception) -> str:
    """Return an error in words, with the line that raised it."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {error} ({line})"


def fails(name: str, octets: bytes) -> bool:
    """Return whether an input alone, in a new world, breaks a promise."""
    try:
        with worlds_for_a_while() as worlds:
            if name in ROOM_OF:
                ROOM_OF[name].targets[name][0](octets, worlds.of(name))
    except Exception:
        return True
    return False


def shrink(name: str, octets: bytes) -> bytes:
    """Return a smaller input that still fails.

    Halves, quarters and smaller pieces are left out as long as that can be.
    """
    size = len(octets) // 2
    tries = 0
    while size and tries < MAX_SHRINKS:
        for start in range(0, len(octets), size):
            tries += 1
            shorter = octets[:start] + octets[start + size:]
            if tries < MAX_SHRINKS and fails(name, shorter):
                octets = shorter
                break
        else:
            size //= 2
    return octets


@contextlib.contextmanager
def worlds_for_a_while() -> Iterator[Worlds]:
    """Provide new worlds."""
    worlds = Worlds()
    try:
        yield worlds
    finally:
        worlds.close()


def run(fuzzers: list[Fuzzer], seconds: float, inputs: int) -> Failure | None:
    """Let all targets have turns until time and inputs are over; return the first failure."""
    told_s = time.monotonic()
    until_s = told_s + seconds
    try:
        while time.monotonic() < until_s or total(fuzzers) < inputs:
            if time.monotonic() >= told_s + PROGRESS_S:
                told_s = time.monotonic()
                print(f"{total(fuzzers):12,} inputs so far", flush=True)
            with worlds_for_a_while() as worlds:
                for fuzzer in TURNS_OF_A_WORLD * fuzzers:
                    fuzzer.turn(worlds.of(fuzzer.name), time.monotonic() + TURN_S)
                    if time.monotonic() >= until_s and total(fuzzers) >= inputs:
                        break
    except Failure as failure:
        return failure
    except KeyboardInterrupt:
        print("interrupted")
        return None
    # Its close() looks at a world once more.
    except AssertionError as error:
        return Failure("the end of a world", b"", str(error))
    return None


def total(fuzzers: list[Fuzzer]) -> int:
    """Return how many inputs were tried."""
    return sum(fuzzer.tried for fuzzer in fuzzers)


def explain(failure: Failure, seed: int) -> str:
    """Return what was found, with what it takes to see it again."""
    text = f"{failure.name}, seed {seed}: {failure}\ninput: {failure.octets!r}"
    if not fails(failure.name, failure.octets):
        return f"{text}\nIt fails only after the inputs before it."
    return f"{text}\nsmaller: {shrink(failure.name, failure.octets)!r}"


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Feed damaged inputs to all that reads.")
    add = parser.add_argument
    add("seconds", type=float, nargs="?", default=60.0, help="(default: %(default)s)")
    add("--seed", type=int, default=random.randrange(10**6), help="of all that is random")
    add("--inputs", type=int, default=0, help="go on until there were so many")
    add("--target", choices=ROOM_OF, action="append", help="only this one; may be repeated")
    return parser.parse_args()


def main() -> int:
    """Try inputs until the time is over; return 1 if one has broken a promise."""
    arguments = read_arguments()
    print(f"seed {arguments.seed}", flush=True)
    fuzzers = [Fuzzer(name, arguments.seed) for name in arguments.target or ROOM_OF]
    failure = run(fuzzers, arguments.seconds, arguments.inputs)
    for fuzzer in fuzzers:
        fuzzer.show()
    if failure:
        print(explain(failure, arguments.seed))
        return 1
    print(f"seed {arguments.seed}: {total(fuzzers):,} inputs: no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
