"""Test trusted proxies: whose request it is."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from harness import (
    DEADLINE_S,
    Make,
    Owner,
    Process,
    check,
    denying,
    forwarded,
    get,
    http_request,
    networks,
    serving,
    until,
)
from hypothesis import example, given
from hypothesis import strategies as st

from connectoid_relay import Networks, client_of, source_of

TRUSTED = networks("10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.1/32")


@pytest.mark.parametrize(("peer", "forwarded_for", "client"), [
    ("192.0.2.9", "", "192.0.2.9"),
    # This is forged: nobody trusts this peer.
    ("192.0.2.9", "203.0.113.1", "192.0.2.9"),
    ("192.0.2.9", "10.0.0.1", "192.0.2.9"),
    ("10.0.0.1", "", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1", "203.0.113.1"),
    ("192.0.2.1", "  203.0.113.1\t", "203.0.113.1"),
    # The client wrote the first itself.
    ("10.0.0.1", "198.51.100.1, 203.0.113.1", "203.0.113.1"),
    ("10.0.0.1", "10.0.0.3,203.0.113.1", "203.0.113.1"),
    # Several hops are trusted.
    ("10.0.0.1", "198.51.100.1,203.0.113.1, 10.0.0.2 ,192.0.2.1", "203.0.113.1"),
    # All hops are trusted: the first is the client.
    ("10.0.0.1", "10.0.0.4, 10.0.0.3, 10.0.0.2", "10.0.0.4"),
    ("10.0.0.1", "2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002::/64"),
    ("10.0.0.1", "2001:db8:1:2::9", "2001:0db8:0001:0002::/64"),
    ("10.0.0.1", "::ffff:203.0.113.1", "203.0.113.1"),
    ("10.0.0.1", "203.0.113.1, ::ffff:10.0.0.2", "203.0.113.1"),
    ("::ffff:10.0.0.1", "203.0.113.1", "203.0.113.1"),
    ("::ffff:192.0.2.9", "203.0.113.1", "192.0.2.9"),
    ("2001:db8:ffff::1", "203.0.113.1", "203.0.113.1"),
    ("2001:db8:fffe::1", "203.0.113.1", "2001:0db8:fffe:0000::/64"),
    # An entry that is no address tells nothing, so the peer that sent it is the source.
    ("10.0.0.1", "unknown", "10.0.0.1"),
    ("10.0.0.1", "_hidden", "10.0.0.1"),
    ("10.0.0.1", ",", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1,", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1:4711", "10.0.0.1"),
    ("10.0.0.1", "[2001:db8:1::1]:443", "10.0.0.1"),
    ("10.0.0.1", "[2001:db8:1::1]", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1/32", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.01", "10.0.0.1"),
    ("10.0.0.1", '"203.0.113.1"', "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1 10.0.0.2", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1, garbage, 10.0.0.2", "10.0.0.2"),
    ("10.0.0.1", "203.0.113.1,,10.0.0.2", "10.0.0.2"),
    ("10.0.0.1", "unknown, 203.0.113.1", "203.0.113.1"),
    ("", "203.0.113.1", ""),
])
def test_client_is_the_last_address_that_no_trusted_proxy_has(
    peer: str, forwarded_for: str, client: str
) -> None:
    assert client_of(peer, forwarded_for, TRUSTED) == client
    assert client_of(peer, forwarded_for, networks()) == source_of(peer)


@given(
    peer=st.text() | st.ip_addresses().map(str),
    hops=st.lists(st.text() | st.ip_addresses().map(str)),
)
@example("10.0.0.1", ["fe80::1%x"]).via("a zone")
@example("10.0.0.1", ["\ud800", "\0"]).via("what no address holds")
def test_client_is_found_in_any_text(peer: str, hops: list[str]) -> None:
    everywhere = networks("0.0.0.0/0", "::/0")
    for proxies in (networks(), TRUSTED, everywhere):
        assert isinstance(client_of(peer, ",".join(hops), proxies), str)


@given(st.lists(st.tuples(st.ip_addresses(), st.integers(0, 128))), st.lists(st.ip_addresses()))
def test_networks_hold_what_ipaddress_says(
        chosen: list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]],
        addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
    some = [ipaddress.ip_network(f"{address}/{min(bits, address.max_prefixlen)}", strict=False)
            for address, bits in chosen]
    asked = [address for address in (*addresses, *(address for address, _ in chosen))
             if not getattr(address, "ipv4_mapped", None)]
    assert [str(address) in Networks(some) for address in asked] == [
        any(address in network for network in some) for address in asked]


def test_trusted_proxy_is_read_from_mapped_addresses_too(
    start: Callable[..., Process], alice: Owner
) -> None:
    process = start(
        "--db",
        ":memory:",
        "--rate",
        "1",
        "--host",
        "127.0.0.1",
        "--trusted-proxy",
        "::ffff:127.0.0.1",
    )
    assert [
        forwarded(process.port, check(alice), f"203.0.113.{number}")[0] for number in range(3)
    ] == [200] * 3


@pytest.mark.sockets
def test_rates_behind_a_trusted_proxy_are_those_of_its_clients(make: Make, alice: Owner) -> None:
    with serving(make(rate=2), proxies=networks("127.0.0.0/8")) as server:
        port = server.server_port

        def statuses(*hops: str) -> list[int]:
            return [forwarded(port, check(alice), *hops)[0] for _ in range(3)]

        assert statuses("203.0.113.1") == [200, 200, 429]
        assert statuses("203.0.113.2") == [200, 200, 429]
        # Two headers are one list, in their order.
        assert statuses("203.0.113.3", "203.0.113.1") == [429] * 3
        assert statuses("203.0.113.1, 203.0.113.3", "127.0.0.7") == [200, 200, 429]
        assert statuses("2001:db8::1") == [200, 200, 429]
        assert statuses("2001:db8::2") == [429] * 3
        assert statuses("garbage") == [200, 200, 429]
        # These count for the proxy itself.
        assert statuses() == [429] * 3
        for path in ("/", "/metrics"):
            assert get(port, path, "X-Forwarded-For: 203.0.113.1")[0] == 429
            assert get(port, path, f"x-forwarded-for: 198.51.100.{len(path)}")[0] == 200


@pytest.mark.sockets
def test_header_of_a_proxy_that_nobody_trusts_is_ignored(make: Make, alice: Owner) -> None:
    with serving(make(rate=2), proxies=networks("192.0.2.0/24")) as server:
        assert [
            forwarded(server.server_port, check(alice), f"203.0.113.{number}")[0]
            for number in range(3)
        ] == [200, 200, 429]


@pytest.mark.sockets
def test_deny_list_holds_for_clients_of_a_proxy_and_not_for_the_proxy(
        tmp_path: Path, make: Make, alice: Owner) -> None:
    access = denying(tmp_path, "203.0.113.1", "127.0.0.0/8")
    with serving(make(access=access), proxies=networks("127.0.0.0/8")) as server:
        port = server.server_port
        assert [
            forwarded(port, check(alice), *hops)[0]
            for hops in (("203.0.113.1",), ("203.0.113.2",), ("203.0.113.1, 203.0.113.2",), ())
        ] == [403, 200, 200, 403]


@contextlib.contextmanager
def connected(port: int, count: int) -> Iterator[list[int]]:
    """Hold connections, each after a reply; yield their statuses."""
    request = http_request(b"", method="GET", path="/health").replace(b"Connection: close\r\n", b"")
    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(count):
            client = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
            )
            client.sendall(request)
            statuses.append(int(client.recv(65_536).split()[1]))
        yield statuses


@pytest.mark.sockets
@pytest.mark.parametrize(
    ("proxies", "allowed"), [((), 2), (("127.0.0.0/8",), 4)], ids=["stranger", "proxy"]
)
def test_proxy_may_have_all_connections_and_no_more(
    make: Make, proxies: Sequence[str], allowed: int
) -> None:
    relay = make(max_connections=4, max_connections_per_source=2)
    with serving(relay, proxies=networks(*proxies)) as server:
        with connected(server.server_port, allowed) as statuses:
            assert statuses == [200] * allowed
            assert get(server.server_port, "/health", "X-Forwarded-For: 203.0.113.1")[0] == 503
        until(lambda: get(server.server_port, "/health")[0] == 200)
