"""Feed the relay what nobody should send, and judge its replies by a second reading of PROTOCOL.md.

Three fronts (HTTP, JSON, UDP) get seeds, mutated seeds and random bytes. The judges tell what
they ought to make of them; they share no code with the relay. h11 is a judge as well.
`bench/fuzz.py` runs the same targets for as long as one likes.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fuzz_inputs import ALICE, BOB, CHECK, GET, KEY, MUTATOR, RECEIVE, SEND
from fuzz_targets import PROXIES, TARGETS, World, try_value
from harness import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectoid_relay import Refusal, client_of, parse_head


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Return the relays of all tests here; at the end nothing may be left in them."""
    made = World()
    yield made
    made.close()


def run(name: str, world: World, examples: int) -> None:
    """Try so many inputs on a target."""
    target, seeds = TARGETS[name]

    @settings(derandomize=True, deadline=None, max_examples=examples, database=None,
              suppress_health_check=list(HealthCheck))
    @given(MUTATOR.strategy(list(seeds.values())))
    def attempt(octets: bytes) -> None:
        target(octets, world)

    attempt()


@pytest.mark.parametrize("name", TARGETS)
def test_each_seed_gets_what_the_judge_says(name: str, world: World) -> None:
    target, seeds = TARGETS[name]
    for octets in seeds.values():
        target(octets, world)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_get_what_the_judge_says(name: str, world: World) -> None:
    run(name, world, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_seeds_get_what_the_judge_says(name: str, world: World) -> None:
    run(name, world, 1_000)


TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["check", "send", "receive", ALICE, BOB, KEY, "\ud800"]
)
NUMBERS = (
    st.integers()
    | st.sampled_from([2**63, -1, 10**400, 101])
    | st.floats()
    | st.booleans()
    | st.none()
)
NAMES = st.sampled_from(["action", "pub", "ext", "data", "answer", "at", "wait", "limit", "id"])
VALUES = st.recursive(TEXTS | NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    TEXTS | NAMES, inner, max_size=6), max_leaves=10)
NEARLY = st.builds(
    lambda request, changes: {**request, **changes},
    st.sampled_from([CHECK, SEND, RECEIVE]),
    st.dictionaries(NAMES, VALUES, max_size=2),
)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(VALUES | NEARLY | st.lists(NEARLY, max_size=4))
def test_any_value_gets_what_the_judge_says(world: World, value: object) -> None:
    try_value(value, world)


@contextlib.contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    """Fail a call that has not ended after this many seconds; it should take milliseconds."""
    def fail(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


USED_NAMES = (
    b"Accept",
    b"Connection",
    b"Content-Length",
    b"Expect",
    b"Transfer-Encoding",
    b"X-Forwarded-For",
    b"A",
)


@pytest.mark.parametrize("run_of", [b" ", b"\t", b" a", b",", b"1", b"\xa0", b"close", b", ::1"])
def test_a_head_takes_no_more_than_linear_time(run_of: bytes) -> None:
    """Read lines of tens of KiB: quadratic time would be half a minute, linear is milliseconds."""
    octets = (
        GET
        + b"".join(
            b"%s: a%sb\r\n" % (name, run_of * (65_536 // len(run_of))) for name in USED_NAMES
        )
        + b"\r\n"
    )
    with no_hang(3), contextlib.suppress(Refusal):
        parse_head(octets)
    with no_hang(3):
        assert client_of("127.0.0.1", (run_of * 16_384).decode("latin-1"), PROXIES)


@pytest.mark.slow
def test_the_long_form_says_what_it_has_tried() -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "bench" / "fuzz.py", "6", "--seed", "1"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout
    *_, last = finished.stdout.splitlines()
    assert re.fullmatch(r"seed 1: [0-9,]{3,} inputs: no promise broken", last)
