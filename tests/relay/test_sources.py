"""Test what counts as one source: addresses, networks, and the hash that a relay keeps of them."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from harness import (
    ANY_TEXT,
    HOME,
    NOTHING,
    NOW_US,
    OK,
    OK_REPLY,
    OTHER,
    OWNERS,
    SOURCE,
    START_US,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    check,
    refused,
    send,
)
from hypothesis import given
from hypothesis import strategies as st

from connectoid_relay import (
    MAX_SOURCES,
    SECOND_US,
    Body,
    Message,
    RateLimit,
    Relay,
    Reply,
    source_of,
)


def test_rate_limit_knows_a_bounded_number_of_sources() -> None:
    limit = RateLimit(2, SECOND_US)
    assert all(limit.take(number, NOW_US) == 0 for number in range(MAX_SOURCES))
    # The late ones share one count.
    assert [limit.take(f"late {number}", NOW_US) for number in range(3)] == [0, 0, 1]
    assert [limit.take(7, NOW_US + SECOND_US - 1) for _ in range(2)] == [0, 1]
    assert [limit.take("late 9", NOW_US + SECOND_US) for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::FFFF:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("0:0:0:0:0:ffff:c000:0207", "192.0.2.7"),
        ("2001:db8:1:2::7", "2001:0db8:0001:0002::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:0db8:0001:0002::/64"),
        ("2001:DB8:1:2::8%eth0", "2001:0db8:0001:0002::/64"),
        ("2001:db8:1:3::7", "2001:0db8:0001:0003::/64"),
        ("fe80::1%eth0", "fe80:0000:0000:0000::/64"),
        ("::1", "0000:0000:0000:0000::/64"),
        ("", ""),
        ("unix", "unix"),
    ],
)
def test_source_of_makes_a_64_one_source_and_mapped_addresses_ipv4(
    address: str, source: str
) -> None:
    assert source_of(address) == source


@given(
    ANY_TEXT | st.text("0123456789abcdef:.%fF\0\ud800 ") | st.builds("::ffff:{}".format, ANY_TEXT)
)
def test_source_of_takes_any_text(address: str) -> None:
    assert isinstance(source_of(address), str)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.7", "::ffff:192.0.2.7", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::1", "127.0.0.1", False),
    ],
)
def test_rate_and_share_are_those_of_the_source(
        make: Make, alice: Owner, first: str, second: str, same: bool) -> None:
    relay = make(rate=2, max_box_messages=8)
    assert relay.handle(send(alice), first) == OK_REPLY
    # An eighth of this box is one message.
    assert relay.handle(send(alice), second).status == (429 if same else 200)
    assert relay.handle(check(alice, at=START_US + 1), second).status == (429 if same else 200)


def test_source_is_kept_as_a_hash_that_changes_daily_and_with_each_relay(
    make: Make, clock: FakeClock
) -> None:
    watched = WatchedStore()

    def kept_source(relay: Relay, address: str) -> bytes:
        assert relay.handle(send(OWNERS[0]), address) == OK_REPLY
        message = watched.values["put"][0]
        assert isinstance(message, Message)
        return message.source

    relays = [make(watched.store), make(watched.store)]
    today = [kept_source(relay, address) for relay in relays for address in (HOME, OTHER)]
    assert today == [kept_source(relay, address) for relay in relays for address in (HOME, OTHER)]
    clock.advance(86_400)
    tomorrow = [kept_source(relay, address) for relay in relays for address in (HOME, OTHER)]
    assert len({*today, *tomorrow}) == 8
    assert all(len(source) >= 16 for source in today)


def test_rate_is_taken_before_anything_is_parsed(make: Make) -> None:
    relay = make(rate=1)
    assert refused(cast(Reply, relay.perform(relay.begin(b"[" * 60_000, SOURCE)))) == (
        400,
        "Bad request",
        0,
    )
    outcome = relay.begin(b"[" * 60_000, SOURCE)
    # The refusal comes at once: nothing is left to perform.
    assert refused(cast(Reply, outcome)) == (429, "Too often", 60)


# A long body is parsed by a thread of the pool.
@pytest.mark.parametrize("blanks", [0, 4_096])
def test_long_body_is_answered_like_a_short_one(relay: Relay, alice: Owner, blanks: int) -> None:
    outcome = relay.begin(json.dumps(check(alice)).encode() + b" " * blanks, SOURCE)
    assert isinstance(outcome, Body) == bool(blanks)
    assert relay.perform(outcome) == (200, NOTHING)


@pytest.mark.parametrize("source", [None, b"192.0.2.1", 7, "\ud800", "a:\0"])
def test_handle_takes_any_source(relay: Relay, alice: Owner, source: Any) -> None:
    assert relay.handle(send(alice), source) == (200, OK)
    assert relay.handle(check(alice, at=2**63), source) == (200, NOTHING)


def test_source_has_another_hash_each_day(make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    hashes = []
    for later_s in (0, 1, 86_400):
        clock.advance(later_s)
        assert relay.handle(send(alice), SOURCE) == (200, OK)
        hashes.append(watched.values["put"][0].source)
    assert hashes[0] == hashes[1] != hashes[2]
