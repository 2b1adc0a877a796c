"""Test a relay whose store fails: errors become replies, and nothing is forgotten."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from harness import (
    HOME,
    OTHER,
    OWNERS,
    START_US,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    answer_of,
    box_expiry,
    check,
    datagram,
    prove,
    receive,
    refused,
    send,
)

from connectoid_relay import DAY_US, Relay, Reply, StoreError, StoreFull

# A store that fails


def good_request(relay: Relay, action: str, owner: Owner) -> dict[str, Any]:
    """Return a request that was good while the store was."""
    relay.handle(send(owner), OTHER)
    return {
        "send": send(owner),
        "check": check(owner),
        "receive": receive(owner, answer_of(relay, owner)),
    }[action]


@pytest.mark.parametrize(
    "error",
    [StoreError("no"), StoreFull("no"), RuntimeError("no"), RecursionError(), KeyError("no")],
    ids=repr,
)
@pytest.mark.parametrize(
    ("action", "method"),
    [
        ("send", "put"),
        ("check", "look"),
        ("check", "question"),
        ("check", "put_question"),
        ("receive", "answers"),
        ("receive", "look"),
        ("receive", "messages"),
    ],
)
def test_failing_store_becomes_a_reply(
        make: Make, clock: FakeClock, error: Exception, action: str, method: str) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    refusal = (503, "Busy", 5)
    if isinstance(error, StoreFull):
        refusal = (507, "Full", 60)
    request = good_request(relay, action, OWNERS[0])
    # The answer is still good, but a check makes a new question.
    clock.advance(30)
    watched.error = error
    watched.failing = frozenset({method})
    assert refused(relay.handle(request, HOME)) == refusal
    if action == "check":
        status, replies = relay.handle([request, request], HOME)
        assert isinstance(replies, list)
        assert [status, *(refused(Reply(refusal[0], reply)) for reply in replies)] == [
            200,
            refusal,
            refusal,
        ]
    watched.error = None
    assert relay.handle(request, HOME).status == 200


def test_receive_works_when_the_box_row_cannot_be_written(make: Make, alice: Owner) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    request = good_request(relay, "receive", alice)
    for watched.error in (StoreError("no"), StoreFull("no")):
        watched.failing = frozenset({"keep_boxes"})
        assert relay.handle(request, HOME) == (200, {"ok": True, "at": START_US, "data": "QUJD"})


def test_failing_store_gives_no_arrivals_and_no_datagram(make: Make, alice: Owner) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    relay.handle(send(alice), HOME)
    assert relay.arrivals(0) == (START_US, {alice.box})
    watched.error = StoreError("no")
    assert relay.arrivals(7) == (7, set())
    assert datagram(relay, check(alice)) is None


def test_failing_sweep_forgets_no_box_that_was_seen(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    prove(relay, alice)
    expires_us = box_expiry(relay, alice)
    clock.advance(86_400)
    relay.handle(check(alice), HOME)
    watched.error = StoreError("no")
    watched.failing = frozenset({"keep_boxes"})
    with contextlib.suppress(StoreError):
        relay.sweep()
    watched.error = None
    relay.sweep()
    assert expires_us is not None
    assert box_expiry(relay, alice) == expires_us + DAY_US


def test_sweep_deletes_even_if_box_rows_cannot_be_written(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    prove(relay, alice)
    clock.advance(86_400)
    relay.handle(check(alice), HOME)
    watched.error = StoreFull("no")
    watched.failing = frozenset({"keep_boxes"})
    with contextlib.suppress(StoreError):
        relay.sweep()
    # A full disk frees itself only in this way.
    assert relay.store.arrivals(0) == (0, set())
