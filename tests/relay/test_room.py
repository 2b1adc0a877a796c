"""Test whom a relay has room for: the eighth, the full box, the full relay, box rows."""

from __future__ import annotations

import collections

import pytest
from harness import (
    HOME,
    NOTHING,
    OK_REPLY,
    OTHER,
    OWNERS,
    START_US,
    FakeClock,
    Make,
    Owner,
    answer_of,
    check,
    prove,
    question_of,
    receive,
    refused,
    send,
)

from connectoid_relay import MIN_COUNTED_BYTES, OLD_PART


def test_one_source_fills_an_eighth_of_a_box_until_its_first_message_is_old(
    make: Make, clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    relay = make(max_box_messages=16, message_ttl_s=100 * OLD_PART)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    clock.advance(10.5)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 90)
    assert relay.handle(send(bob), HOME) == OK_REPLY
    assert relay.handle(send(alice), OTHER) == OK_REPLY
    clock.advance(89.499999)
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 1)
    clock.advance(0.000001)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 11)


@pytest.mark.parametrize(
    ("limits", "sealed"), [({"max_box_messages": 8}, "AA"), ({"max_box_bytes": 80}, "A" * 10)]
)
def test_full_box_is_full_for_all_until_a_message_expires(
    make: Make, clock: FakeClock, limits: dict[str, int], sealed: str
) -> None:
    alice, bob, *_ = OWNERS
    relay = make(**limits, message_ttl_s=100)
    for number in range(8):
        assert relay.handle(send(alice, sealed), f"203.0.113.{number}") == OK_REPLY
        clock.advance(1)
    assert refused(relay.handle(send(alice, sealed), HOME)) == (507, "Full", 92)
    assert relay.handle(send(bob, sealed), HOME) == OK_REPLY
    assert question_of(relay, alice)
    clock.advance(92)
    assert relay.handle(send(alice, sealed), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice, sealed), OTHER)) == (507, "Full", 1)


def test_last_third_is_kept_for_proven_boxes_until_a_sweep_makes_room(
    make: Make, clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    relay = make(max_bytes=9 * MIN_COUNTED_BYTES, message_ttl_s=100)
    prove(relay, alice)
    for _ in range(5):
        assert relay.handle(send(bob), HOME) == OK_REPLY
    assert refused(relay.handle(send(bob), HOME)) == (507, "Full", 60)
    for _ in range(3):
        assert relay.handle(send(alice), OTHER) == OK_REPLY
    assert refused(relay.handle(send(alice), OTHER)) == (507, "Full", 60)
    # What exists keeps working.
    assert alice.open(question_of(relay, alice))
    clock.advance(101)
    assert relay.handle(check(alice), HOME) == (200, NOTHING)
    while relay.sweep():
        pass
    assert relay.handle(send(bob), HOME) == OK_REPLY


def test_strangers_never_stop_the_owner(make: Make, alice: Owner) -> None:
    relay = make(max_box_messages=16, max_bytes=24 * MIN_COUNTED_BYTES, rate=30, max_seals=2)
    strangers = [f"198.51.100.{number}" for number in range(100)]
    outcomes = collections.Counter(
        relay.handle(send(owner), stranger).status
        for owner in (alice, *OWNERS)
        for stranger in strangers
    )
    assert outcomes == {200: 16, 507: 784}
    junk: list[object] = [
        check(alice),
        receive(alice, "x"),
        None,
        *[check(owner) for owner in OWNERS],
    ]
    statuses = {
        relay.handle(request, stranger).status for stranger in strangers for request in junk * 4
    }
    assert statuses == {200, 400, 403, 429}
    reply = relay.handle(receive(alice, answer_of(relay, alice), limit=100), HOME)
    assert reply == (
        200,
        {"ok": True, "messages": [{"at": START_US + n, "data": "QUJD"} for n in range(16)]},
    )
