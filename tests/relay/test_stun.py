"""Test STUN: bytes by hand from RFC 8489, addresses from RFC 5769, and two clients of others."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from aioice import stun
from harness import (
    CHECK_FENCE,
    COOKIE,
    DEADLINE_S,
    STUN_FENCE,
    TRANSACTION,
    FakeClock,
    Make,
    Owner,
    binding_request,
    check,
    datagrams_to,
    document_of,
    needs,
    octets_over_udp,
    running,
    serving,
    until,
)
from hypothesis import given
from hypothesis import strategies as st

from connectoid_relay import Relay, RelayServer, answer_stun, is_stun

IPV6 = "2001:db8:1234:5678:11:2233:4455:6677"
# RFC 5769, sections 2.2 and 2.3: the attribute XOR-MAPPED-ADDRESS for port 32853.
MAPPED_IPV4 = bytes.fromhex("0020 0008 0001 a147 e112a643")
MAPPED_IPV6 = bytes.fromhex("0020 0014 0002 a147 0113a9fa a5d3f179 bc25f4b5 bed2b9d9")


def attribute(kind: int, value: bytes = b"", padding: bytes = b"\0") -> bytes:
    """Return an attribute, padded to four bytes."""
    return struct.pack(">HH", kind, len(value)) + value + padding * (-len(value) % 4)


SOFTWARE = attribute(0x8022, b"STUN test client", b" ")


@pytest.mark.parametrize(
    ("address", "mapped"),
    [
        ("192.0.2.1", MAPPED_IPV4),
        ("::ffff:192.0.2.1", MAPPED_IPV4),
        (IPV6, MAPPED_IPV6),
        (f"{IPV6}%eth0", MAPPED_IPV6),
    ],
)
@pytest.mark.parametrize(
    "attributes",
    [
        b"",
        SOFTWARE,
        attribute(0x8022, b"odd"),
        attribute(0x8028, b"\xe5\x7a\x3b\xcf"),
        attribute(0xFFFF),
        SOFTWARE + attribute(0x8029, bytes(8)) + attribute(0x8000, b"x" * 1_900),
    ],
    ids=len,
)
def test_binding_request_gets_its_address(address: str, mapped: bytes, attributes: bytes) -> None:
    request = binding_request(attributes=attributes)
    assert is_stun(request)
    header = bytes.fromhex("0101") + len(mapped).to_bytes(2, "big") + COOKIE + TRANSACTION
    assert answer_stun(request, address, 32_853) == header + mapped


# RFC 5769, section 2.1: a request of ICE, with attributes that must be understood.
ICE_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74"
    "002400046e0001ff80290008932ff9b151263b36000600096576746a3a6836765920202000080014"
    "9aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf")

UNANSWERED: dict[str, bytes] = {
    "indication": binding_request(0x0011),
    "success": binding_request(0x0101),
    "error": binding_request(0x0111),
    "allocate": binding_request(0x0003),
    "shared secret": binding_request(0x0002),
    "method 0": binding_request(0x0000),
    "high method": binding_request(0x2001),
    "length 4 and no attribute": binding_request(length=4),
    "length 0 and an attribute": binding_request(attributes=SOFTWARE, length=0),
    "length too short": binding_request(attributes=SOFTWARE, length=len(SOFTWARE) - 4),
    "length too long": binding_request(attributes=SOFTWARE, length=len(SOFTWARE) + 4),
    "attribute without value": binding_request(attributes=SOFTWARE[:4]),
    "attribute cut off": binding_request(attributes=SOFTWARE[:-4]),
    "attribute header cut off": binding_request(attributes=SOFTWARE + b"\x80\x22"),
    "padding missing": binding_request(attributes=attribute(0x8022, b"odd", b"")),
    "byte too many": binding_request(attributes=SOFTWARE + b"\0"),
    "change request": binding_request(attributes=attribute(0x0003, bytes(4))),
    "attribute 0": binding_request(attributes=attribute(0x0000)),
    "last that must be understood": binding_request(attributes=attribute(0x7FFF)),
    "must be understood, behind": binding_request(
        attributes=SOFTWARE + attribute(0x0024, bytes(4))
    ),
    "ice": ICE_REQUEST,
}


@pytest.mark.parametrize("name", UNANSWERED)
def test_stun_that_is_no_plain_binding_request_gets_nothing(name: str) -> None:
    assert is_stun(UNANSWERED[name])
    assert answer_stun(UNANSWERED[name], "192.0.2.1", 32_853) is None


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\0",
        binding_request()[:19],
        binding_request(cookie=bytes(4)),
        binding_request(cookie=COOKIE[::-1]),
        *(bytes([first]) + binding_request()[1:] for first in (0x40, 0x80, 0xC0, 0xFF)),
        b'{"action": "check", "pub": "A"}',
    ],
)
def test_what_is_not_stun_is_told_apart(datagram: bytes) -> None:
    assert not is_stun(datagram)


@given(
    st.integers(0, 0x3FFF),
    st.binary(max_size=64),
    st.integers(0, 70) | st.none(),
    st.sampled_from(["192.0.2.1", "::1", "::ffff:192.0.2.1", "fe80::1%eth0"]),
    st.integers(0, 65_535),
)
def test_any_stun_gets_a_short_reply_or_none(
    kind: int, attributes: bytes, length: int | None, address: str, port: int
) -> None:
    datagram = binding_request(kind, attributes, length=length)
    assert is_stun(datagram)
    reply = answer_stun(datagram, address, port)
    if reply is not None:
        is_ipv6 = address in ("::1", "fe80::1%eth0")
        assert kind == 1
        assert len(reply) == 32 + 12 * is_ipv6
        assert stun.parse_message(reply).attributes["XOR-MAPPED-ADDRESS"][1] == port


@given(st.lists(st.tuples(st.integers(0x8000, 0xffff), st.binary(max_size=20))))
def test_any_optional_attributes_are_ignored(attributes: list[tuple[int, bytes]]) -> None:
    request = binding_request(
        attributes=b"".join(attribute(kind, value) for kind, value in attributes)
    )
    assert answer_stun(request, "192.0.2.1", 32_853) == answer_stun(
        binding_request(), "192.0.2.1", 32_853
    )


@pytest.mark.sockets
@pytest.mark.parametrize(
    ("fronts", "replies"),
    [
        ({"udp": True}, ["check"]),
        ({"stun": True}, ["stun"]),
        ({"udp": True, "stun": True}, ["stun", "check"]),
    ],
    ids=str,
)
def test_server_answers_of_checks_and_stun_what_it_was_asked_to(
    make: Make, alice: Owner, fronts: dict[str, bool], replies: list[str]
) -> None:
    relay = make()
    datagrams = (
        *UNANSWERED.values(),
        b"",
        b"\0",
        binding_request(),
        json.dumps(check(alice)).encode(),
    )
    with serving(relay, **fronts) as server:
        document = document_of(server.server_port)
        assert (document["udp"], document["stun"]) == ("udp" in fronts, "stun" in fronts)
        fence = CHECK_FENCE if "udp" in fronts else STUN_FENCE
        came = octets_over_udp(server.server_port, *datagrams, fence=fence)
    assert [is_stun(reply) for reply in came] == [kind == "stun" for kind in replies]
    counted = relay.counts.taken()
    # The fence is answered too.
    for kind, fenced in (("check", "udp" in fronts), ("stun", "udp" not in fronts)):
        assert counted["connectoid_datagrams_total", kind] == replies.count(kind) + fenced
    assert counted["connectoid_datagrams_total", "none"] == len(datagrams) - len(replies)


@pytest.mark.sockets
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_stun_over_a_socket_tells_the_clients_own_address(make: Make, host: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    relay = make()
    with (
        serving_on("" if socket.has_dualstack_ipv6() else host, relay) as port,
        datagrams_to(port, host) as client,
    ):
        request = stun.Message(
            stun.Method.BINDING, stun.Class.REQUEST, attributes={"SOFTWARE": "aioice"}
        )
        request.add_fingerprint()
        client.send(bytes(request))
        reply = stun.parse_message(client.recv(2_048))
        assert (
            reply.message_method,
            reply.message_class,
            reply.transaction_id,
            reply.attributes,
        ) == (
            stun.Method.BINDING,
            stun.Class.RESPONSE,
            request.transaction_id,
            {"XOR-MAPPED-ADDRESS": client.getsockname()[:2]},
        )


@contextlib.contextmanager
def serving_on(host: str, relay: Relay) -> Iterator[int]:
    """Serve STUN on an interface; yield the port."""
    with running(RelayServer((host, 0), relay, stun=True)) as server:
        yield server.server_port


@needs("turnutils_stunclient")
@pytest.mark.sockets
def test_stun_answers_the_client_of_coturn(make: Make) -> None:
    with serving(make(), stun=True) as server:
        finished = subprocess.run(
            ["turnutils_stunclient", "-p", str(server.server_port), "127.0.0.1"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert finished.returncode == 0, finished
    assert re.search(r"UDP reflexive addr: 127\.0\.0\.1:\d+", finished.stdout)


@pytest.mark.sockets
@pytest.mark.parametrize("case", [(600, 0, 3), (0, 2, 4)], ids=["rate 600", "rate 0"])
def test_stun_has_its_part_of_the_budget_of_datagrams(
    make: Make, clock: FakeClock, alice: Owner, case: tuple[int, int, int]
) -> None:
    rate, over, later = case
    relay = make(max_udp=3, rate=rate)
    with serving(relay, udp=True, stun=True) as server, datagrams_to(server.server_port) as client:
        def count_of(*datagrams: bytes) -> int:
            before = sum(counted().values())
            for datagram in datagrams:
                client.send(datagram)
            until(lambda: sum(counted().values()) == before + len(datagrams))
            replies = 0
            while select.select([client], [], [], 0)[0]:
                client.recv(2_048)
                replies += 1
            return replies

        def counted() -> dict[str, int]:
            taken = relay.counts.taken()
            return {
                kind: taken["connectoid_datagrams_total", kind]
                for kind in ("check", "stun", "none")
            }

        ask_ = json.dumps(check(alice)).encode()
        assert count_of(binding_request(), ask_, binding_request()) == 3
        assert count_of(binding_request(), ask_) == over
        clock.advance(1)
        assert count_of(*[binding_request()] * 4) == later
