"""Test batches of checks through `Relay.handle`, which never waits."""

from __future__ import annotations

import pytest
from harness import (
    BAD,
    HOME,
    NOTHING,
    OTHER,
    START_US,
    FakeClock,
    Make,
    Owner,
    check,
    question_of,
    receive,
    refused,
    send,
)

from connectoid_relay import Relay, Reply


def test_batch_is_answered_item_by_item_in_order(relay: Relay, alice: Owner, bob: Owner) -> None:
    relay.handle(send(bob), OTHER)
    question = question_of(relay, bob)
    items = [
        check(alice),
        check(bob),
        send(alice),
        receive(bob, "x"),
        [check(bob)],
        None,
        check(bob, at=-1),
        {**check(bob), "pub": "x"},
        check(bob, at=START_US),
    ]
    status, replies = relay.handle(items, HOME)
    assert status == 200
    assert isinstance(replies, list)
    assert [reply if reply["ok"] else refused(Reply(400, reply)) for reply in replies] == [
        NOTHING,
        {"ok": True, "found": True, "question": question},
        *[BAD] * 6,
        NOTHING,
    ]
    assert relay.store.arrivals(0) == (START_US, {bob.box})


def test_batch_has_1_to_256_items(make: Make, alice: Owner) -> None:
    relay = make(rate=0)
    for count in (1, 2, 255, 256):
        assert relay.handle([check(alice)] * count, HOME) == (200, [NOTHING] * count)
    for count in (0, 257, 1_000):
        assert refused(relay.handle([check(alice)] * count, HOME)) == BAD


def test_batch_counts_as_its_items(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(rate=5)
    assert relay.handle([check(alice), None, check(alice), "x"], HOME).status == 200
    status, replies = relay.handle([check(alice)] * 3, HOME)
    assert status == 200
    assert isinstance(replies, list)
    assert [reply.get("error", reply) for reply in replies] == [NOTHING, "Too often", "Too often"]
    assert refused(relay.handle(check(alice), HOME))[:2] == (429, "Too often")
    clock.advance(60)
    for _ in range(5):
        # An array of another length counts as one.
        assert refused(relay.handle([], HOME)) == BAD
    assert refused(relay.handle([], HOME))[:2] == (429, "Too often")


@pytest.mark.parametrize("wait", [0, 1, 60, 61, 10**30])
def test_handle_never_waits(relay: Relay, alice: Owner, bob: Owner, wait: int) -> None:
    assert relay.handle(check(alice, wait=wait), HOME) == (200, NOTHING)
    assert relay.handle([check(alice, wait=wait), check(bob, wait=wait)], HOME) == (
        200,
        [NOTHING] * 2,
    )
    relay.handle(send(alice), OTHER)
    status, reply = relay.handle([check(bob, wait=wait), check(alice, wait=wait)], HOME)
    assert isinstance(reply, list)
    assert (status, reply[0], reply[1]["found"]) == (200, NOTHING, True)
