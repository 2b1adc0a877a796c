"""Test time-outs and the limits of connections, of memory and of the queue."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import (
    DEADLINE_S,
    NOTHING,
    Client,
    FakeClock,
    Owner,
    Process,
    StuckStore,
    answer_of,
    check,
    exchange,
    hanging_up,
    http_request,
    lasting,
    limited,
    padded,
    post,
    receive,
    send,
    settle,
    unfinished,
    until,
)

from connectoid_relay import POOL_THREADS, SOURCE_SHARE, Relay, RelayServer

# Time-outs -------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_that_do_not_end_are_refused(clock: FakeClock) -> None:
    halves = [b"G", lasting()[:-2], unfinished(100), unfinished(70_000), lasting()[:20]]
    with limited(clock, request_timeout_s=1) as server, hanging_up([]) as clients:
        clients.extend(Client(server.server_port, half) for half in halves * 2)
        # A second request is timed like the first.
        for client in (clients[4], clients[9]):
            client.send(lasting()[20:], lasting()[:20])
            assert client.reply()[0] == 200
        deadline_s = time.monotonic() + DEADLINE_S
        trickling = {client.socket for client in clients[5:]}
        while trickling and time.monotonic() < deadline_s:
            for trickle in trickling:
                trickle.send(b"x")
            trickling -= set(select.select(trickling, [], [], 0.05)[0])
        for client in clients:
            status, headers, body = client.reply()
            assert (status, json.loads(body), headers["connection"]) == (
                408,
                {"ok": False, "error": "Too slow", "detail": "A request may take 1 s."},
                "close",
            )
            assert client.is_closed()


@pytest.mark.slow
def test_idle_connections_are_closed(clock: FakeClock, alice: Owner) -> None:
    with (limited(clock, idle_timeout_s=1) as server, Client(server.server_port) as mute,
          Client(server.server_port, lasting(send(alice))) as client):
        assert client.answer() == (200, {"ok": True})
        assert client.is_closed()
        assert mute.is_closed()


@pytest.mark.slow
def test_a_wait_is_not_idle(clock: FakeClock, alice: Owner) -> None:
    limits = {"idle_timeout_s": 1, "request_timeout_s": 1}
    with (
        limited(clock, **limits) as server,
        Client(server.server_port, lasting(check(alice, wait=2))) as client,
    ):
        assert client.answer() == (200, NOTHING)


@pytest.mark.slow
def test_a_client_that_takes_no_reply_is_let_go(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    limits = {
        "rate": 0,
        "max_connections_per_source": 2,
        "idle_timeout_s": 1,
        "request_timeout_s": 1,
    }
    with limited(clock, **limits) as server:
        for _ in range(16):
            server.relay.handle(send(alice, "QUJD" * 8_192), "192.0.2.1")
        request = lasting(receive(alice, answer_of(server.relay, alice), limit=100))
        # The replies are 15 MiB, more than sockets hold.
        with Client(server.server_port, request * 30) as client:
            assert select.select([client.socket], [], [], DEADLINE_S)[0]
            with Client(server.server_port) as other:

                def has_room() -> bool:
                    # This client is served all the time, so it keeps its connection.
                    other.send(lasting(check(bob)))
                    assert other.answer() == (200, NOTHING)
                    return post(server.server_port, check(bob)) == (200, NOTHING)

                assert not has_room()
                until(has_room)
            taken = b""
            with contextlib.suppress(ConnectionError):
                taken = client.received.read()
            # The replies are cut off in the middle.
            assert len(taken) < 30 * 512 * 1_024


# Parking ---------------------------------------------------------------------------------


def threads_of(process: Process) -> int:
    """Return how many threads a process has."""
    match = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{process.popen.pid}/status").read_text())
    assert match
    return int(match[1])


@pytest.mark.slow
def test_unfinished_requests_cost_no_thread_and_delay_nobody(
    start: Callable[..., Process], alice: Owner
) -> None:
    process = start(
        "--db",
        ":memory:",
        "--max-connections-per-source",
        "0",
        "--request-timeout",
        "120",
        "--rate",
        "0",
        "--udp",
    )
    assert post(process.port, check(alice)) == (200, NOTHING)
    threads = threads_of(process)
    request = lasting(check(alice))
    with hanging_up(
        [Client(process.port, request[: 20 + n % (len(request) - 20)]) for n in range(600)]
    ) as clients:
        settle(process.port)
        for _ in range(100):
            begin_s = time.monotonic()
            assert post(process.port, check(alice)) == (200, NOTHING)
            assert time.monotonic() - begin_s < 5
        assert threads_of(process) == threads
        for n, client in enumerate(clients):
            client.send(request[20 + n % (len(request) - 20):])
        assert [client.answer() for client in clients] == [(200, NOTHING)] * 600


@pytest.mark.slow
def test_waits_cost_no_thread(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:", "--rate", "0")
    assert post(process.port, check(alice)) == (200, NOTHING)
    threads = threads_of(process)
    with hanging_up(
        [Client(process.port, lasting(check(alice, wait=60))) for _ in range(200)]
    ) as clients:
        settle(process.port)
        assert all(client.is_silent() for client in clients)
        assert threads_of(process) == threads
        assert post(process.port, send(alice)) == (200, {"ok": True})
        answers = [client.answer() for client in clients]
    assert {(status, reply["found"]) for status, reply in answers} == {(200, True)}
    assert process.stop()[0] == 0


@pytest.mark.slow
def test_a_process_that_is_stopped_answers_the_waiting(
    start: Callable[..., Process], alice: Owner
) -> None:
    process = start("--db", ":memory:")
    with (
        Client(process.port, lasting(check(alice, wait=60))) as waiting,
        Client(process.port) as idle,
    ):
        settle(process.port)
        assert process.stop() == (0, "")
        assert waiting.answer() == (200, NOTHING)
        assert waiting.is_closed()
        assert idle.is_closed()


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_source"])
def test_connections_are_limited(clock: FakeClock, alice: Owner, name: str) -> None:
    request = lasting(check(alice))
    with limited(clock, **{name: 3}) as server, hanging_up([]) as clients:
        for _ in range(3):
            clients.append(Client(server.server_port, request))
            assert clients[-1].answer() == (200, NOTHING)
        # A refused connection takes no place.
        for _ in range(2):
            with Client(server.server_port, request) as refused:
                status, headers, body = refused.reply()
                reply = json.loads(body)
                assert (status, reply["error"], reply["retry"]) == (
                    503,
                    "Busy",
                    int(headers["retry-after"]),
                )
                assert headers["access-control-allow-origin"] == "*"
                assert refused.is_closed()
        clients.pop().close()
        until(lambda: post(server.server_port, check(alice)) == (200, NOTHING))
        clients[0].send(request)
        assert clients[0].answer() == (200, NOTHING)


def test_a_limit_of_0_is_none(clock: FakeClock, alice: Owner) -> None:
    limits = {"max_connections": 0, "max_connections_per_source": 0, "max_waiting": 0}
    with limited(clock, **limits) as server, hanging_up([]) as clients:
        clients.extend(
            Client(server.server_port, lasting(check(alice, wait=60))) for _ in range(300)
        )
        settle(server.server_port)
        assert all(client.is_silent() for client in clients)


def test_a_source_at_its_limit_leaves_room_for_another(clock: FakeClock, alice: Owner) -> None:
    request = lasting(check(alice))
    with (
        limited(clock, max_connections_per_source=1) as server,
        Client(server.server_port, request) as client,
        socket.create_connection(
            ("127.0.0.1", server.server_port), DEADLINE_S, ("127.0.0.2", 0)
        ) as other,
    ):
        assert client.answer() == (200, NOTHING)
        assert post(server.server_port, check(alice))[0] == 503
        other.sendall(request)
        assert other.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


def test_the_queue_is_limited_while_checks_go_on(
    clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    store, queued = StuckStore(), 2
    with limited(clock, store, max_queued=queued) as server, hanging_up([]) as clients:
        for _ in range(POOL_THREADS):
            clients.append(Client(server.server_port, lasting(send(alice))))
            assert store.stuck.acquire(timeout=DEADLINE_S)
        for _ in range(queued):
            clients.append(Client(server.server_port, lasting(send(alice))))
            settle(server.server_port)
        assert all(client.is_silent() for client in clients)
        status, reply = post(server.server_port, send(alice))
        assert (status, reply["error"], reply["retry"] > 0) == (503, "Busy", True)
        assert post(server.server_port, check(bob)) == (200, NOTHING)
        store.free.set()
        assert [client.answer() for client in clients] == [(200, {"ok": True})] * (
            POOL_THREADS + queued
        )
        assert post(server.server_port, send(bob)) == (200, {"ok": True})


def test_sources_take_turns_and_have_their_share_of_a_full_queue(
        clock: FakeClock, alice: Owner, bob: Owner) -> None:
    store, queued = StuckStore(), 100
    with limited(clock, store, max_queued=queued) as server, hanging_up([]) as clients:
        for _ in range(POOL_THREADS):
            clients.append(Client(server.server_port, lasting(send(alice))))
            assert store.stuck.acquire(timeout=DEADLINE_S)
        clients.extend(Client(server.server_port, lasting(send(alice))) for _ in range(queued))
        settle(server.server_port)
        assert post(server.server_port, send(alice))[0] == 503
        with contextlib.ExitStack() as held:
            others = [
                held.enter_context(
                    socket.create_connection(
                        ("127.0.0.1", server.server_port), DEADLINE_S, ("127.0.0.2", 0)
                    )
                )
                for _ in range(queued // 2 + 1)
            ]
            for other in others[:-1]:
                other.sendall(lasting(send(bob)))
            settle(server.server_port)
            others[-1].sendall(lasting(send(bob)))
            # Its share is half of the places.
            assert others[-1].recv(100).startswith(b"HTTP/1.1 503 ")
            store.free.set()
            statuses = {other.recv(100)[:12] for other in others[:-1]}
            # Some are over their eighth of the box.
            assert statuses == {b"HTTP/1.1 200", b"HTTP/1.1 429"}
        # A source that comes late waits for one request of the other at a time,
        # and for those that the threads have taken.
        assert store.boxes[:-2].index(bob.box) <= POOL_THREADS + 1
        assert store.boxes[:2 * POOL_THREADS + queued].count(bob.box) >= queued // 2 - POOL_THREADS
        assert {client.answer()[0] for client in clients} <= {200, 429}


def test_requests_that_came_with_others_are_counted_as_memory(
    clock: FakeClock, alice: Owner
) -> None:
    with limited(clock, max_buffered_bytes=SOURCE_SHARE * 10_000) as server:
        request = lasting(check(alice))
        few, many = 9_000 // len(request), 30_000 // len(request)
        assert exchange(server.server_port, request * few + http_request(json.dumps(
            check(alice)).encode())).count(b"HTTP/1.1 200 OK") == few + 1
        with Client(server.server_port, request * many) as client:
            assert client.answer()[0] == 503
            assert client.is_closed()


def test_a_connection_that_comes_as_the_server_stops_ends_nothing(
    relay: Relay, alice: Owner
) -> None:
    ticking, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        ticking.set()
        assert go_on.wait(DEADLINE_S)

    with RelayServer(("127.0.0.1", 0), relay, on_tick=wait) as server:
        failures: list[BaseException] = []
        thread = threading.Thread(target=lambda: failures.extend(raised_by(server.serve_forever)))
        thread.start()
        assert ticking.wait(DEADLINE_S)
        # The server finds both in the same turn.
        server.stop()
        with Client(server.server_port, lasting(check(alice))):
            go_on.set()
            thread.join(DEADLINE_S)
        assert (thread.is_alive(), failures) == (False, [])


@pytest.mark.parametrize("request_of", [check, send])
def test_the_last_reply_arrives_although_more_was_sent(
        clock: FakeClock, alice: Owner, request_of: Callable[[Owner], dict[str, Any]]) -> None:
    with limited(clock) as server:
        # The relay does not read so much.
        octets = http_request(json.dumps(request_of(alice)).encode()) + b"\r\n" * 45_000
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_S) as client:
                client.sendall(octets)
                assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_the_last_reply_arrives_although_an_empty_line_came_meanwhile(
    clock: FakeClock, alice: Owner
) -> None:
    # Old clients send an empty line behind a body.
    store = StuckStore()
    with (limited(clock, store) as server,
          socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_S) as client):
        client.sendall(http_request(json.dumps(send(alice)).encode()))
        assert store.stuck.acquire(timeout=DEADLINE_S)
        client.sendall(b"\r\n")
        store.free.set()
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_the_queue_has_a_bound_for_however_many_sources(clock: FakeClock, alice: Owner) -> None:
    store, queued = StuckStore(), 4
    with limited(clock, store, max_queued=queued) as server, contextlib.ExitStack() as held:
        for number in range(POOL_THREADS + 3 * queued):
            client = held.enter_context(socket.create_connection(
                ("127.0.0.1", server.server_port), DEADLINE_S, (f"127.0.0.{2 + number}", 0)))
            client.sendall(lasting(send(alice)))
            if number < POOL_THREADS:
                assert store.stuck.acquire(timeout=DEADLINE_S)
            elif number >= POOL_THREADS + 2 * queued:
                assert client.recv(100).startswith(b"HTTP/1.1 503 ")
            else:
                settle(server.server_port)
        store.free.set()


@pytest.mark.slow
def test_client_that_asks_again_and_again_and_reads_nothing_is_timed_out(
    clock: FakeClock, alice: Owner
) -> None:
    with limited(clock, idle_timeout_s=1) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect(("127.0.0.1", server.server_port))
        client.sendall(lasting(send(alice)) + b"GET / HTTP/1.1\r\n\r\n" * 2_500)
        # The only connection is the one that asks.
        until(lambda: b"\nconnectoid_connections 1\n" in exchange(
            server.server_port, http_request(b"", method="GET", path="/metrics")))


def raised_by(call: Callable[[], object]) -> list[BaseException]:
    """Return what a call raises."""
    try:
        call()
    except Exception as error:
        return [error]
    return []


def test_memory_for_requests_is_limited_and_comes_back(clock: FakeClock, bob: Owner) -> None:
    size = 100_000
    with (
        limited(clock, max_buffered_bytes=SOURCE_SHARE * 3 * size) as server,
        hanging_up([]) as clients,
    ):
        clients.extend(Client(server.server_port, unfinished(size)) for _ in range(6))
        until(lambda: sum(not client.is_silent() for client in clients) >= 3)
        settle(server.server_port)
        kept = [client for client in clients if client.is_silent()]
        assert 2 <= len(kept) <= 3
        for client in clients:
            if client not in kept:
                status, headers, body = client.reply()
                reply = json.loads(body)
                assert (status, reply["error"], headers["retry-after"]) == (
                    503,
                    "Busy",
                    str(reply["retry"]),
                )
                assert client.is_closed()
        # What one source holds takes nothing from another.
        halves = http_request(padded(check(bob), size))
        with socket.create_connection(
            ("127.0.0.1", server.server_port), 10, source_address=("127.0.0.2", 0)
        ) as other:
            other.sendall(halves[:size // 2])
            settle(server.server_port)
            other.sendall(halves[size // 2:])
            assert other.recv(12) == b"HTTP/1.1 200"
        for client in kept:
            client.close()
        whole = padded(check(bob), size)
        until(lambda: post(server.server_port, whole) == (200, NOTHING))


@pytest.mark.parametrize("piece", [None, 100])
def test_memory_is_counted_only_while_it_is_used(
    clock: FakeClock, alice: Owner, piece: int | None
) -> None:
    # One request fits, so any number of them fits, one after the other.
    # A request in pieces is no longer.
    with limited(clock, max_buffered_bytes=SOURCE_SHARE * 100_000) as server:
        body = padded(check(alice), 60_000)
        assert [post(server.server_port, body, piece) for _ in range(10)] == [(200, NOTHING)] * 10
