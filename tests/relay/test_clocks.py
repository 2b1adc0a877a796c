"""Test clocks: those that stand still, step, or disagree."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import (
    HOME,
    HOUR_S,
    NOTHING,
    OK,
    OK_REPLY,
    SOURCE,
    START_US,
    FakeClock,
    Owner,
    check,
    messages_of,
    question_of,
    relay_on,
    send,
)

from connectoid_relay import (
    DAY_US,
    HOUR_US,
    RELEASE_US,
    SECOND_US,
    YEAR_2200_US,
    Clock,
    Relay,
    SqliteStore,
)


@pytest.mark.parametrize(
    ("wall_us", "believed_us"),
    [
        (0, RELEASE_US),
        (-1, RELEASE_US),
        (RELEASE_US - 1, RELEASE_US),
        (RELEASE_US, RELEASE_US),
        (RELEASE_US + 1, RELEASE_US + 1),
        (YEAR_2200_US - 1, YEAR_2200_US - 1),
        (YEAR_2200_US, RELEASE_US),
        (YEAR_2200_US + 100 * 365 * DAY_US, RELEASE_US),
    ],
)
@pytest.mark.parametrize("row_us", [0, START_US])
def test_clock_is_believed_only_from_the_release_to_2200_and_never_before_the_row(
        wall_us: int, believed_us: int, row_us: int) -> None:
    store = SqliteStore(":memory:")
    store.probe(row_us)
    relay = Relay(store, clock=Clock(lambda: wall_us, lambda: 7))
    assert relay.now_us() == max(believed_us, row_us)
    relay.close()


def test_time_never_goes_back_with_the_wall_clock(
    relay: Relay, clock: FakeClock, alice: Owner
) -> None:
    now_us = relay.now_us()
    for wall_us in (0, now_us - HOUR_US, now_us + HOUR_US, YEAR_2200_US):
        clock.wall_us = wall_us
        assert relay.now_us() == now_us
        clock.monotonic_us += 1
        now_us += 1
        assert relay.now_us() == now_us
        assert relay.handle(send(alice), HOME) == OK_REPLY
        assert relay.handle(check(alice, at=now_us - 1), HOME).status == 200
    assert [at for at, _ in relay.store.messages(alice.box, 0, 9, now_us)] == list(
        range(now_us - 3, now_us + 1)
    )


def test_sweep_catches_up_with_a_store_that_is_ahead(relay: Relay, clock: FakeClock) -> None:
    relay.store.probe(START_US + HOUR_US)
    assert relay.now_us() == START_US
    relay.sweep()
    assert relay.now_us() == START_US + HOUR_US
    clock.advance(1)
    relay.sweep()
    assert relay.now_us() == START_US + HOUR_US + SECOND_US


class BusyStore(SqliteStore):
    """A store that a relay writes to a millisecond later, whenever its time is asked for."""

    relay: Relay | None = None

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(":memory:")
        self._clock = clock

    def time_us(self) -> int:
        """Return the time after that write."""
        if self.relay is not None:
            self._clock.advance(0.001)
            self.probe(self.relay.now_us())
        return super().time_us()


def test_sweep_does_not_run_ahead_of_sends_of_its_own_process(clock: FakeClock) -> None:
    store = BusyStore(clock)
    relay = Relay(store, clock=clock.clock)
    ahead_us = relay.now_us() - clock.monotonic_us
    store.relay = relay
    for _ in range(3):
        relay.sweep()
        assert relay.now_us() - clock.monotonic_us == ahead_us
    relay.close()


def test_message_is_kept_its_time_in_a_store_from_the_future(
    clock: FakeClock, folder: Path, alice: Owner
) -> None:
    path = str(folder / "relay.db")
    store = SqliteStore(path)
    # The store was once written under a clock a year ahead.
    store.probe(START_US + 365 * DAY_US)
    store.close()
    relay = Relay(SqliteStore(path), clock=clock.clock)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    clock.advance(3_599)
    assert question_of(relay, alice)
    clock.advance(1)
    assert relay.handle(check(alice), HOME) == (200, NOTHING)
    relay.close()


EPOCH_US, YEAR_2100_US, YEAR_2300_US = 0, 4_102_444_800_000_000, 10_413_792_000_000_000
HALF_HOUR_US = 1_800_000_000
# The wall clock at the first start, the wall clock at the second, and whether the first message
# is still kept then.
STEPS = {
    "from 1970": (EPOCH_US, START_US, False),
    "to 1970": (START_US, EPOCH_US, True),
    "1970 twice": (EPOCH_US, EPOCH_US, True),
    "from 2300": (YEAR_2300_US, START_US, False),
    "to 2300": (START_US, YEAR_2300_US, True),
    # This clock is believed, so the time in the store stays ahead.
    "from 2100": (YEAR_2100_US, START_US, True),
    "to 2100": (START_US, YEAR_2100_US, False),
    "a day back": (START_US, START_US - 86_400_000_000, True),
    "half an hour forward": (START_US, START_US + HALF_HOUR_US, True),
    "two hours forward": (START_US, START_US + 4 * HALF_HOUR_US, False),
    "none": (START_US, START_US, True),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_clock_step_between_starts_leaves_no_box_deaf(
    step: tuple[int, int, bool], tmp_path: Path, clock: FakeClock, alice: Owner
) -> None:
    clock.wall_us, second_us, kept = step
    with relay_on(tmp_path / "relay.db", clock) as relay:
        assert relay.handle(send(alice, "Zmlyc3Q"), SOURCE) == (200, OK)
        ((first_at, _),) = messages_of(relay, alice)
    clock.wall_us = second_us
    clock.monotonic_us = 5
    with relay_on(tmp_path / "relay.db", clock) as relay:
        assert relay.handle(check(alice, first_at), SOURCE) == (200, NOTHING)
        assert relay.handle(send(alice, "c2Vjb25k"), SOURCE) == (200, OK)
        found = messages_of(relay, alice)
        assert [text for _, text in found] == ["Zmlyc3Q"] * kept + ["c2Vjb25k"]
        assert messages_of(relay, alice, first_at) == found[-1:]
        assert found[-1][0] > first_at
        clock.advance(HOUR_S - 1)
        assert messages_of(relay, alice, first_at) == found[-1:]
        clock.advance(2)
        assert relay.handle(check(alice), SOURCE) == (200, NOTHING)
        relay.sweep()
        assert relay.store.messages(alice.box, 0, 100, 0) == []


@pytest.mark.parametrize(
    "step_us", [-START_US, -HALF_HOUR_US, HALF_HOUR_US, YEAR_2300_US - START_US]
)
def test_clock_step_while_running_changes_nothing(
    step_us: int, relay: Relay, clock: FakeClock, alice: Owner
) -> None:
    relay.handle(send(alice, "Zmlyc3Q"), SOURCE)
    clock.wall_us += step_us
    clock.advance(5)
    relay.handle(send(alice, "c2Vjb25k"), SOURCE)
    assert messages_of(relay, alice) == [(START_US, "Zmlyc3Q"), (START_US + 5_000_000, "c2Vjb25k")]
    clock.advance(HOUR_S - 1)
    assert [text for _, text in messages_of(relay, alice)] == ["c2Vjb25k"]


def test_relays_with_different_clocks_on_one_file_share_the_later_time(
    tmp_path: Path, alice: Owner
) -> None:
    ahead = FakeClock()
    behind = FakeClock()
    behind.wall_us -= 86_400_000_000
    with (
        relay_on(tmp_path / "relay.db", behind) as slow,
        relay_on(tmp_path / "relay.db", ahead) as fast,
    ):
        seen = 0
        for number, (relay, other) in enumerate([(fast, slow), (slow, fast)] * 3):
            assert relay.handle(send(alice, f"AA{number}A"), SOURCE) == (200, OK)
            ((at, text),) = messages_of(other, alice, seen)
            assert (text, at > seen) == (f"AA{number}A", True)
            seen = at
            for clock in (ahead, behind):
                clock.advance(1)
        assert slow.handle(check(alice, seen), SOURCE) == (200, NOTHING)
        for relay in (slow, fast):
            relay.sweep()
        for clock in (ahead, behind):
            clock.advance(HOUR_S + 1)
        assert [relay.handle(check(alice), SOURCE).body for relay in (slow, fast)] == [
            NOTHING,
            NOTHING,
        ]
