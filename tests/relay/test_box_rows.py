"""Test the rows of boxes: who gets one, how long it lives, and when it is written."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    HOME,
    OTHER,
    OWNERS,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    answer_of,
    box_expiry,
    box_of,
    check,
    datagram,
    prove,
    receive,
    send,
)

from connectoid_relay import (
    DAY_US,
    HOUR_US,
    MAX_SEEN_WRITES,
    SECOND_US,
    Relay,
    SqliteStore,
    encode_base64url,
)


def pub_of(number: int) -> str:
    """Return the mailbox as clients name it."""
    return encode_base64url(box_of(number))


def test_box_row_is_made_for_a_proven_owner_alone(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(max_boxes=10)
    relay.handle(send(alice), OTHER)
    relay.handle(check(alice), OTHER)
    datagram(relay, check(alice))
    relay.handle(receive(alice, "wrong"), OTHER)
    relay.sweep()
    assert box_expiry(relay, alice) is None
    relay.handle(receive(alice, answer_of(relay, alice)), HOME)
    assert box_expiry(relay, alice) is not None
    assert box_expiry(relay, bob) is None


@pytest.mark.parametrize("how", ["http", "udp", "batch"])
@pytest.mark.parametrize("ttl_s", [30 * 86_400, 86_400, 60, 1])
def test_box_row_lives_its_time_after_the_last_check(
        make: Make, clock: FakeClock, alice: Owner, how: str, ttl_s: int) -> None:
    ask: dict[str, Callable[[], object]] = {
        "http": lambda: relay.handle(check(alice), HOME),
        "udp": lambda: datagram(relay, check(alice)),
        "batch": lambda: relay.handle([check(alice)], HOME),
    }
    step_us = min(DAY_US, ttl_s * SECOND_US // 30)
    watched = WatchedStore()
    relay = make(watched.store, box_ttl_s=ttl_s, message_ttl_s=1)
    prove(relay, alice)
    for _ in range(5):
        expires_us = box_expiry(relay, alice)
        assert expires_us is not None
        assert ttl_s * SECOND_US < expires_us - relay.now_us() <= ttl_s * SECOND_US + step_us
        clock.advance(ttl_s - 0.01)
        ask[how]()
        # Only the sweep writes it down.
        assert box_expiry(relay, alice) == expires_us
        relay.sweep()
        calls = watched.calls["keep_boxes"]
        # A second check on the same day writes nothing.
        for _ in range(3):
            ask[how]()
            relay.sweep()
        assert watched.calls["keep_boxes"] == calls
    clock.advance(ttl_s + step_us / SECOND_US)
    assert box_expiry(relay, alice) is None
    ask[how]()
    relay.sweep()
    # The row is gone: the owner has to answer again.
    assert box_expiry(relay, alice) is None
    prove(relay, alice)
    assert box_expiry(relay, alice) is not None


def test_max_boxes_limits_rows_and_nothing_else(make: Make, clock: FakeClock) -> None:
    relay = make(max_boxes=2, box_ttl_s=1_000, message_ttl_s=10)
    for owner in OWNERS[:3]:
        prove(relay, owner)
    assert [box_expiry(relay, owner) is not None for owner in OWNERS[:3]] == [True, True, False]
    clock.advance(1_100)
    relay.sweep()
    prove(relay, OWNERS[2])
    assert [box_expiry(relay, owner) is not None for owner in OWNERS[:3]] == [False, False, True]


@pytest.mark.parametrize(("seen", "more"), [
    (MAX_SEEN_WRITES - 1, False), (MAX_SEEN_WRITES, True), (MAX_SEEN_WRITES + 1, True)])
def test_sweep_writes_down_so_many_boxes_at_a_time(
    make: Make, clock: FakeClock, seen: int, more: bool
) -> None:
    relay = make(rate=0, max_boxes=seen)
    before_us = clock.wall_us + HOUR_US
    relay.store.keep_boxes(
        {box_of(number): before_us for number in range(seen)}, clock.wall_us, seen
    )
    for number in range(seen):
        relay.handle({"pub": pub_of(number), "action": "check"}, HOME)

    def written() -> int:
        return sum(relay.store.look(box_of(number), 0, clock.wall_us).box_expires_us != before_us
                   for number in range(seen))

    assert relay.sweep() is more
    assert written() == min(seen, MAX_SEEN_WRITES)
    assert relay.sweep() is False
    assert written() == seen


def test_box_rows_are_not_all_raised_at_the_same_time_of_day(make: Make, clock: FakeClock) -> None:
    """Otherwise a relay with many of them would make all the day's writes at midnight."""
    relay = make()
    boxes = [b"\2" + hashlib.sha384(b"%d" % number).digest() for number in range(240)]
    relay.store.keep_boxes(dict.fromkeys(boxes, clock.wall_us + HOUR_US), clock.wall_us, len(boxes))
    for box in boxes:
        relay.handle({"pub": encode_base64url(box), "action": "check"}, HOME)
    while relay.sweep():
        pass
    expiries_us = [relay.store.look(box, 0, clock.wall_us).box_expires_us or 0 for box in boxes]
    hours = collections.Counter(expiry_us % DAY_US // HOUR_US for expiry_us in expiries_us)
    assert len(hours) == 24
    assert max(hours.values()) < 40


def test_close_writes_down_seen_boxes(clock: FakeClock, folder: Path, alice: Owner) -> None:
    path = str(folder / "relay.db")
    relay = Relay(SqliteStore(path), clock=clock.clock)
    prove(relay, alice)
    first_us = box_expiry(relay, alice)
    clock.advance(3 * 86_400)
    relay.handle(check(alice), HOME)
    relay.close()
    relay = Relay(SqliteStore(path), clock=clock.clock)
    assert first_us is not None
    assert box_expiry(relay, alice) == first_us + 3 * DAY_US
    relay.close()
