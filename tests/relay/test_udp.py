"""Test checks over UDP."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import (
    NOTHING,
    START_US,
    STUN_FENCE,
    FakeClock,
    Owner,
    answer_of,
    binding_request,
    check,
    exchange,
    http_request,
    octets_over_udp,
    over_udp,
    padded,
    parse_response,
    post,
    receive,
    running,
    send,
    serving,
)

from connectoid_relay import Limits, Relay, RelayServer, SqliteStore, answer_datagram


@pytest.fixture
def udp_port(relay: Relay) -> Iterator[int]:
    """Return the port of a server in a thread that answers UDP too."""
    with serving(relay, udp=True) as server:
        yield server.server_port


def test_udp_tells_whether_there_is_something(udp_port: int, alice: Owner, bob: Owner) -> None:
    assert over_udp(udp_port, check(alice)) == [NOTHING]
    assert post(udp_port, send(alice)) == (200, {"ok": True})
    assert over_udp(udp_port, check(alice), check(bob)) == [{"ok": True, "found": True}, NOTHING]
    assert over_udp(udp_port, check(alice, at=START_US + 10**12)) == [NOTHING]


def test_udp_is_off_unless_asked_for(relay: Relay) -> None:
    with serving(relay) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as occupant:
        occupant.bind(("127.0.0.1", server.server_port))
        document = http_request(b"", "Accept: application/json", method="GET")
        assert json.loads(parse_response(exchange(server.server_port, document))[2])["udp"] is False


def test_udp_stands_in_the_document(udp_port: int) -> None:
    document = http_request(b"", "Accept: application/json", method="GET")
    assert json.loads(parse_response(exchange(udp_port, document))[2])["udp"] is True


@pytest.mark.parametrize("given_id", ["a", "Z-_09", "a" * 16])
def test_udp_replies_carry_the_id(udp_port: int, alice: Owner, given_id: str) -> None:
    assert over_udp(udp_port, check(alice, id=given_id)) == [{**NOTHING, "id": given_id}]


@pytest.mark.parametrize(
    "given_id", ["", "a" * 17, "a b", "a\n", "\u00e9", "a=", 7, 1.5, None, True, ["a"], {}]
)
def test_udp_does_not_reply_to_a_bad_id(udp_port: int, alice: Owner, given_id: object) -> None:
    assert over_udp(udp_port, check(alice, id=given_id)) == []


@pytest.mark.parametrize("members", [
    {"ext": "key"}, {"ext": 7}, {"ext": "x" * 1_500}, {"wait": 60}, {"wait": -1}, {"wait": None},
    {"at": 2**70}, {"more": [1, 2]},
], ids=repr)
def test_udp_checks_ignore_what_they_do_not_use(
    udp_port: int, alice: Owner, members: dict[str, Any]
) -> None:
    assert over_udp(udp_port, {**check(alice), **members}) == [NOTHING]


def test_udp_replies_to_nothing_but_checks(
    udp_port: int, relay: Relay, alice: Owner, bob: Owner
) -> None:
    post(udp_port, send(alice))
    whole = check(alice)
    assert (
        over_udp(
            udp_port,
            send(bob),
            receive(alice, answer_of(relay, alice)),
            [whole],
            {},
            7,
            b"",
            b"{}",
            b"nonsense",
            {**whole, "action": "Check"},
            {**whole, "pub": alice.pub[:-1]},
            {"action": "check"},
            {"pub": alice.pub},
            *({**whole, "at": at} for at in (-1, 1.0, True, None, "0")),
            b"\xef\xbb\xbf" + json.dumps(whole).encode(),
            json.dumps(whole).encode()[:-1],
            json.dumps(whole).encode("utf-16"),
            http_request(json.dumps(whole).encode()),
        )
        == []
    )
    # Nothing of the send was kept.
    assert over_udp(udp_port, check(bob)) == [NOTHING]


def test_udp_replies_are_no_longer_than_what_asked(relay: Relay, alice: Owner) -> None:
    relay.handle(send(alice), "192.0.2.1")
    for members in ({}, {"id": "a"}, {"id": "a" * 16}):
        request = {"action": "check", "pub": alice.pub, **members}
        datagram = json.dumps(request, separators=(",", ":")).encode()
        reply = answer_datagram(relay, datagram)
        assert reply is not None
        assert json.loads(reply) == {"ok": True, "found": True, **members}
        assert len(reply) <= len(datagram)


@pytest.mark.slow
def test_udp_goes_on_after_junk(udp_port: int, alice: Owner) -> None:
    chance = random.Random(1)
    whole = json.dumps(check(alice)).encode()
    # Each part fits in a socket's buffer.
    for _ in range(40):
        junk = [chance.randbytes(chance.choice((0, 1, 20, 100, 1_400, 9_000))) for _ in range(25)]
        cut = [
            whole[: chance.randrange(len(whole))] + chance.randbytes(chance.randrange(9))
            for _ in range(25)
        ]
        assert over_udp(udp_port, *junk, *cut) == []
    assert over_udp(udp_port, check(alice)) == [NOTHING]
    assert post(udp_port, check(alice)) == (200, NOTHING)


@pytest.mark.parametrize("rate", [600, 0])
def test_udp_as_a_whole_has_a_budget(clock: FakeClock, rate: int) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(rate=rate, max_udp=3), clock=clock.clock)
    datagrams = [json.dumps(check(Owner(n))).encode() for n in range(1, 5)]
    with contextlib.closing(relay):
        for _ in range(2):
            replied = [answer_datagram(relay, datagram) is not None for datagram in datagrams]
            assert replied == [True, True, True, rate == 0]
            clock.advance(1)
        # HTTP is counted apart.
        assert relay.handle(check(Owner(1)), "192.0.2.1") == (200, NOTHING)


def test_udp_counts_against_no_source(clock: FakeClock, alice: Owner) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(rate=1), clock=clock.clock)
    with contextlib.closing(relay), serving(relay, udp=True) as server:
        assert over_udp(server.server_port, *[check(alice)] * 5) == [NOTHING] * 5
        assert post(server.server_port, check(alice)) == (200, NOTHING)


@pytest.mark.parametrize("ask", [
    lambda relay, request: relay.handle(request, "192.0.2.1"),
    lambda relay, request: answer_datagram(relay, json.dumps(request).encode()),
], ids=["HTTP", "UDP"])
def test_a_check_keeps_a_proven_box(
    relay: Relay, clock: FakeClock, alice: Owner, ask: Callable[[Relay, object], object]
) -> None:
    relay.handle(send(alice), "192.0.2.1")
    relay.handle(receive(alice, answer_of(relay, alice)), "192.0.2.1")
    relay.sweep()
    for _ in range(3):
        # That is 20 of 30 days.
        clock.advance(20 * 86_400)
        assert ask(relay, check(alice)) is not None
        relay.sweep()
    expires_us = relay.store.look(alice.box, 0, relay.now_us()).box_expires_us
    assert expires_us is not None
    assert expires_us >= relay.now_us() + 30 * 86_400 * 1_000_000


@pytest.mark.parametrize(("size", "replies"), [(2_047, [NOTHING]), (2_048, [NOTHING]), (2_049, [])])
def test_a_datagram_has_a_largest_size(
    udp_port: int, alice: Owner, size: int, replies: list[Any]
) -> None:
    assert over_udp(udp_port, padded(check(alice), size)) == replies


@pytest.mark.parametrize(("host", "asked"), [
    ("127.0.0.2", "127.0.0.2"), ("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"),
    ("", "127.0.0.1"), ("", "127.0.0.2"), ("::", "127.0.0.2"), ("::", "::1"),
])
def test_replies_come_from_the_address_that_was_asked(
    relay: Relay, alice: Owner, host: str, asked: str
) -> None:
    if ":" in host + asked and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with running(RelayServer((host, 0), relay, udp=True, stun=True)) as server:
        # The kernel drops what comes to these sockets from another address.
        assert over_udp(server.server_port, check(alice), host=asked) == [NOTHING]
        replies = octets_over_udp(
            server.server_port, binding_request(), fence=STUN_FENCE, host=asked)
        assert [reply[:2] for reply in replies] == [b"\x01\x01"]
