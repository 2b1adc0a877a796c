"""Test long polls: what ends them, and how many there may be."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import (
    DEADLINE_S,
    NOTHING,
    START_US,
    Client,
    FakeClock,
    Owner,
    check,
    hanging_up,
    lasting,
    limited,
    post,
    send,
    settle,
    until,
)

# Long polls ------------------------------------------------------------------------------


def test_a_wait_is_ended_by_a_message(port: int, alice: Owner) -> None:
    with Client(port, lasting(check(alice, wait=60))) as client:
        settle(port)
        assert client.is_silent()
        assert post(port, send(alice)) == (200, {"ok": True})
        status, reply = client.answer()
        assert (status, reply.keys(), reply["found"]) == (200, {"ok", "found", "question"}, True)
        # The answer has 256 bits.
        assert len(alice.open(reply["question"])) >= 43
        # The connection lives on.
        client.send(lasting(check(alice, at=2**62)))
        assert client.answer() == (200, NOTHING)


def test_a_wait_for_what_is_there_is_none(port: int, alice: Owner) -> None:
    post(port, send(alice))
    assert post(port, check(alice, wait=60))[1]["found"] is True


@pytest.mark.slow
def test_a_wait_ends_in_time(port: int, alice: Owner) -> None:
    assert post(port, check(alice, wait=1)) == (200, NOTHING)


@pytest.mark.slow
def test_a_batch_waits_as_long_as_its_smallest_wait(port: int, alice: Owner, bob: Owner) -> None:
    batch = [check(alice, wait=60), check(bob, wait=1), check(alice, wait=30)]
    assert post(port, batch) == (200, [NOTHING] * 3)


@pytest.mark.slow
def test_a_wait_ends_in_time_however_often_it_is_woken(clock: FakeClock, alice: Owner) -> None:
    request = lasting(check(alice, at=START_US + 10**12, wait=1))
    with (
        limited(clock, rate=0, max_box_messages=10_000) as server,
        Client(server.server_port, request) as client,
    ):
        deadline_s = time.monotonic() + DEADLINE_S
        while not select.select([client.socket], [], [], 0.1)[0]:
            assert time.monotonic() < deadline_s
            assert post(server.server_port, send(alice)) == (200, {"ok": True})
        assert client.answer() == (200, NOTHING)


@pytest.mark.parametrize("other", [{}, {"wait": 0}])
def test_a_batch_with_an_item_without_wait_does_not_wait(
        port: int, alice: Owner, bob: Owner, other: dict[str, int]) -> None:
    assert post(port, [check(alice, wait=60), check(bob, **other)]) == (200, [NOTHING, NOTHING])


def test_a_batch_with_a_bad_item_does_not_wait(port: int, alice: Owner) -> None:
    status, replies = post(port, [check(alice, wait=60), None])
    assert (status, replies[0], replies[1]["error"]) == (200, NOTHING, "Bad request")


@pytest.mark.parametrize("woken_by", [0, 1, 2])
def test_a_batch_is_ended_by_a_message_for_any_of_its_boxes(port: int, woken_by: int) -> None:
    owners = [Owner(n) for n in (1, 2, 3)]
    with Client(port, lasting([check(owner, wait=60) for owner in owners])) as client:
        settle(port)
        post(port, send(Owner(4)))
        post(port, send(owners[woken_by]))
        status, replies = client.answer()
    assert (status, [reply["found"] for reply in replies]) == (
        200,
        [n == woken_by for n in range(3)],
    )


def test_a_wait_goes_on_after_a_message_that_is_not_newer(
    port: int, clock: FakeClock, alice: Owner
) -> None:
    with Client(port, lasting(check(alice, at=START_US + 1_000_000_000, wait=60))) as client:
        settle(port)
        for _ in range(3):
            post(port, send(alice))
            # Once this is answered, the wait has been looked at.
            post(port, send(Owner(3)))
        settle(port)
        assert client.is_silent()
        clock.advance(1_001)
        post(port, send(alice))
        assert client.answer()[1]["found"] is True


@pytest.mark.parametrize("together", [True, False], ids=["same segment", "later"])
def test_a_wait_ends_with_the_next_request(port: int, alice: Owner, together: bool) -> None:
    # Whether TCP brings two requests at once or one by one is up to chance.
    wait, health = lasting(check(alice, wait=60)), lasting(path="/health")
    with Client(port, wait + health * together) as client:
        if not together:
            settle(port)
            assert client.is_silent()
            client.send(health)
        assert [client.answer(), client.answer()] == [(200, NOTHING), (200, {"ok": True})]


def test_waits_are_limited_and_end_at_once_beyond(
    clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    with limited(clock, max_waiting=3) as server, hanging_up([]) as clients:
        for _ in range(3):
            clients.append(Client(server.server_port, lasting(check(alice, wait=60))))
            settle(server.server_port)
        assert all(client.is_silent() for client in clients)
        # The reply comes far sooner than a minute.
        assert post(server.server_port, check(bob, wait=60)) == (200, NOTHING)
        post(server.server_port, send(alice))
        assert [client.answer()[1]["found"] for client in clients] == [True] * 3


def test_a_batch_takes_a_place_for_each_of_its_boxes(
    clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    with limited(clock, max_waiting=1) as server:
        assert post(server.server_port, [check(alice, wait=60), check(bob, wait=60)]) == (
            200,
            [NOTHING] * 2,
        )
        with Client(server.server_port, lasting([check(alice, wait=60)] * 2)) as client:
            settle(server.server_port)
            post(server.server_port, send(alice))
            assert [reply["found"] for reply in client.answer()[1]] == [True] * 2


def test_client_that_hangs_up_leaves_its_place(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    with limited(clock, rate=0, max_waiting=1) as server, hanging_up([]) as clients:
        Client(server.server_port, lasting(check(alice, wait=60))).close()

        def waits() -> bool:
            clients.append(Client(server.server_port, lasting(check(bob, wait=60))))
            settle(server.server_port)
            return clients[-1].is_silent()

        until(waits)
        post(server.server_port, send(bob))
        assert clients[-1].answer()[1]["found"] is True


@pytest.mark.slow
def test_no_message_between_look_and_wait_is_missed(clock: FakeClock) -> None:
    """Many pairs wait and send at the same moment, for a box a round; a miss lasts a minute."""
    pairs = 6
    rounds = 40

    def ask(connection: http.client.HTTPConnection, request: object) -> Any:
        connection.request("POST", "/", json.dumps(request))
        return json.loads(connection.getresponse().read())

    with limited(clock, rate=0) as server:
        def connect() -> http.client.HTTPConnection:
            return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=DEADLINE_S)

        def wait_for_all(pair: int, together: threading.Barrier) -> list[bool]:
            found = []
            with contextlib.closing(connect()) as connection:
                for number in range(rounds):
                    request = [check(Owner(1_000 + pair * rounds + number), wait=60)]
                    if pair % 2:
                        # No message comes for the second box.
                        request.append(check(Owner(1), wait=60))
                    together.wait(DEADLINE_S)
                    found.append(ask(connection, request)[0]["found"])
            return found

        def send_all(pair: int, together: threading.Barrier) -> list[bool]:
            delays = random.Random(pair)
            with contextlib.closing(connect()) as connection:
                sent = []
                for number in range(rounds):
                    together.wait(DEADLINE_S)
                    # Requests take the place of sleeps.
                    for _ in range(delays.randrange(4)):
                        ask(connection, check(Owner(2)))
                    sent.append(ask(connection, send(Owner(1_000 + pair * rounds + number)))["ok"])
            return sent

        barriers = [threading.Barrier(2) for _ in range(pairs)]
        with ThreadPoolExecutor(2 * pairs) as pool:
            outcomes = [pool.submit(body, pair, barrier) for pair, barrier in enumerate(barriers)
                        for body in (wait_for_all, send_all)]
            assert [outcome.result() for outcome in outcomes] == [[True] * rounds] * (2 * pairs)
