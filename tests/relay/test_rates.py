"""Test the rates: what each of them counts, and when it is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
    check,
    datagram,
    question_of,
    refused,
    send,
)

from connectoid_relay import OLD_PART


class Rate(NamedTuple):
    """With a limit of 3 in a span: the request that uses up the limit of the N-th box."""

    limits: dict[str, int]
    request: Callable[[Owner], object]
    span_s: int


RATES = {
    "rate": Rate({"rate": 3}, check, 60),
    "max_seals": Rate({"max_seals": 3}, check, 60),
    "max_sends": Rate({"max_sends": 3}, lambda _: send(OWNERS[0]), 60),
    "max_source_bytes": Rate({"max_source_bytes": 12}, send, 3_600),
}


@pytest.mark.parametrize("name", RATES)
def test_rate_refuses_what_is_over_it_until_retry_has_passed(
    make: Make, clock: FakeClock, name: str
) -> None:
    limits, request, span_s = RATES[name]
    relay = make(**limits, message_ttl_s=10_000)
    # Every box gets a message, each from a source of its own.
    for number, owner in enumerate(OWNERS):
        relay.handle(send(owner), f"203.0.113.{number}")
    # A new span begins.
    clock.advance(7_200)
    for owner in OWNERS[:3]:
        assert relay.handle(request(owner), HOME).status == 200
    status, error, retry_s = refused(relay.handle(request(OWNERS[3]), HOME))
    assert (status, error) == (429, "Too often")
    assert 1 <= retry_s <= span_s
    # Other sources and other boxes are served.
    assert relay.handle(request(OWNERS[4]), OTHER).status == 200
    clock.advance(retry_s - 1)
    assert refused(relay.handle(request(OWNERS[3]), HOME)) == (429, "Too often", 1)
    clock.advance(1)
    assert relay.handle(request(OWNERS[3]), HOME).status == 200


@pytest.mark.parametrize(
    ("sizes", "statuses"),
    [
        ([4, 4, 3], [200, 200, 200]),
        ([4, 4, 4], [200, 200, 200]),
        ([4, 4, 6, 4], [200, 200, 429, 200]),
        ([13], [400]),
        ([14], [429]),
    ],
)
def test_max_source_bytes_counts_what_was_taken(
        make: Make, sizes: list[int], statuses: list[int]) -> None:
    relay = make(max_source_bytes=12)
    replies = [
        relay.handle(send(owner, "A" * size), HOME)
        for owner, size in zip(OWNERS, sizes, strict=False)
    ]
    assert [reply.status for reply in replies] == statuses


def test_max_sends_counts_per_box_and_source(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(max_sends=1)
    for owner, source, status in (
        (alice, HOME, 200),
        (alice, HOME, 429),
        (alice, OTHER, 200),
        (bob, HOME, 200),
    ):
        assert relay.handle(send(owner), source).status == status


def test_max_seals_spares_questions_that_exist_and_checks_that_find_nothing(
        make: Make, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    relay = make(max_seals=1)
    relay.handle(send(alice), OTHER)
    relay.handle(send(bob), OTHER)
    question = question_of(relay, alice)
    clock.advance(29.999999)
    assert refused(relay.handle(check(bob), HOME))[:2] == (429, "Too often")
    assert question_of(relay, alice) == question
    assert relay.handle(check(bob, at=START_US + 1), HOME) == (200, NOTHING)
    assert datagram(relay, check(bob)) == {"ok": True, "found": True}


def test_max_udp_is_a_budget_of_all_datagrams_and_of_nobody_else(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    relay = make(max_udp=3, rate=2)
    for _ in range(2):
        assert [datagram(relay, check(alice)) for _ in range(4)] == [NOTHING] * 3 + [None]
        clock.advance(1)
    assert [relay.handle(check(alice), HOME).status for _ in range(3)] == [200, 200, 429]
    assert datagram(relay, check(alice)) == NOTHING


def test_rate_0_lifts_all_rates_but_not_the_eighth_of_a_box(
    make: Make, alice: Owner, bob: Owner
) -> None:
    relay = make(
        rate=0, max_seals=1, max_sends=1, max_source_bytes=1, max_udp=1, max_box_messages=16
    )
    for _ in range(2):
        assert relay.handle(send(alice), HOME) == OK_REPLY
        assert relay.handle(send(bob), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 3_600 // OLD_PART)
    assert question_of(relay, alice) != question_of(relay, bob)
    assert all(
        relay.handle(check(alice, at=START_US + 9), HOME) == (200, NOTHING) for _ in range(1_000)
    )
    assert [datagram(relay, check(alice)) for _ in range(3)] == [{"ok": True, "found": True}] * 3
