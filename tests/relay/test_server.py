"""Test the server as an object: starting, stopping, ports and families of addresses."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from harness import (
    DEADLINE_S,
    NOTHING,
    Client,
    FakeClock,
    Owner,
    StuckStore,
    check,
    hanging_up,
    lasting,
    limited,
    over_udp,
    post,
    running,
    send,
    settle,
)

from connectoid_relay import Limits, Relay, RelayServer, SqliteStore

# The server as an object -----------------------------------------------------------------


@pytest.mark.slow
def test_shutdown_answers_pending_long_polls_and_closes_the_others(
        relay: Relay, alice: Owner) -> None:
    server = RelayServer(("127.0.0.1", 0), relay)
    with running(server):
        waiting = Client(server.server_port, lasting(check(alice, wait=60)))
        batch = Client(server.server_port, lasting([check(alice, wait=60)]))
        idle = Client(server.server_port, lasting())
        half = Client(server.server_port, lasting()[:20])
        assert idle.reply()[0] == 200
        settle(server.server_port)
        server.shutdown()
    with waiting, batch, idle, half:
        assert waiting.answer() == (200, NOTHING)
        assert batch.answer() == (200, [NOTHING])
        assert [client.is_closed() for client in (waiting, batch, idle)] == [True] * 3
        # The relay has not read all of its bytes.
        with contextlib.suppress(ConnectionResetError):
            assert half.is_closed()
    with pytest.raises(ConnectionRefusedError):
        Client(server.server_port)


def test_shutdown_waits_for_what_is_under_way(clock: FakeClock, alice: Owner) -> None:
    store = StuckStore()
    with (
        limited(clock, store) as server,
        Client(server.server_port, lasting(send(alice))) as client,
    ):
        assert store.stuck.acquire(timeout=DEADLINE_S)
        server.stop()
        store.free.set()
        assert client.answer() == (200, {"ok": True})
        assert client.is_closed()


def test_a_server_serves_from_a_thread_and_gives_its_port_back(relay: Relay, alice: Owner) -> None:
    port = 0
    for _ in range(2):
        with RelayServer(("127.0.0.1", port), relay) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            port = server.server_port
            assert server.server_address == ("127.0.0.1", port)
            assert post(port, check(alice)) == (200, NOTHING)
            server.shutdown()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_a_server_that_never_served_can_be_closed(relay: Relay) -> None:
    with RelayServer(("127.0.0.1", 0), relay, udp=True) as server:
        server.shutdown()
    with RelayServer(("127.0.0.1", server.server_port), relay, udp=True) as another:
        assert another.server_port == server.server_port


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_in_use_is_an_error(relay: Relay, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as occupant:
        occupant.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            occupant.listen()
        with pytest.raises(OSError, match="in use"):
            RelayServer(("127.0.0.1", occupant.getsockname()[1]), relay, udp=True)


def ipv6_server(host: str, relay: Relay) -> RelayServer:
    """Return a server on an IPv6 address or on all, or skip the test."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    return RelayServer((host, 0), relay, udp=True)


@pytest.mark.parametrize(("listens_on", "hosts"), [("::1", ["::1"]), ("", ["::1", "127.0.0.1"])])
def test_ipv6_is_served_and_ipv4_with_it(
    relay: Relay, alice: Owner, listens_on: str, hosts: list[str]
) -> None:
    with running(ipv6_server(listens_on, relay)) as server:
        for host in hosts:
            with Client(server.server_port, lasting(check(alice)), host=host) as client:
                assert client.answer() == (200, NOTHING)
            assert over_udp(server.server_port, check(alice), host=host) == [NOTHING]


def test_ipv4_clients_of_a_dual_stack_server_count_as_ipv4(clock: FakeClock, alice: Owner) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(max_connections_per_source=1), clock=clock.clock)
    with contextlib.closing(relay), running(ipv6_server("", relay)) as server:
        # Mapped, both addresses would be in ::/64.
        hosts = ("127.0.0.1", "::1")
        clients = [Client(server.server_port, lasting(check(alice)), host=host) for host in hosts]
        with hanging_up(clients):
            assert [client.answer() for client in clients] == [(200, NOTHING)] * 2
