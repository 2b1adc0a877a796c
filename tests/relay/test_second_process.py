"""Test several relays on one file, and closing while others work."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from harness import (
    NOTHING,
    OK,
    ROOMY,
    ROOMY_FLAGS,
    SOURCE,
    FakeClock,
    Owner,
    Process,
    assert_increasing,
    check,
    messages_of,
    page,
    park,
    post,
    receive,
    relay_on,
    reply_on,
    send,
    until,
)

from connectoid_relay import Limits, Relay, SqliteStore


class Door(NamedTuple):
    """A way to one file: send a text, and read what is newer than `at`."""

    send: Callable[[str], None]
    read: Callable[[int], list[tuple[int, str]]]


@pytest.fixture(params=["stores", "relays", "processes"])
def doors(request: pytest.FixtureRequest, tmp_path: Path, alice: Owner) -> Iterator[list[Door]]:
    """Return two ways to one file: through stores in one process, relays too, or two processes."""
    with contextlib.ExitStack() as stack:
        if request.param == "processes":
            start = request.getfixturevalue("start")
            ports = [start("--db", "relay.db", *ROOMY_FLAGS).port for _ in range(2)]
            yield [_door_of_port(port, alice) for port in ports]
        else:
            relays = [Relay(SqliteStore(str(tmp_path / "relay.db")), ROOMY) for _ in range(2)]
            for relay in relays:
                stack.callback(relay.close)
            yield [
                _door_of_relay(relay, alice, stored=request.param == "stores") for relay in relays
            ]


def _door_of_port(port: int, owner: Owner) -> Door:
    def send_text(text: str) -> None:
        assert post(port, send(owner, text)) == (200, OK)
    return Door(send_text, lambda at: page(port, owner, at))


def _door_of_relay(relay: Relay, owner: Owner, *, stored: bool) -> Door:
    def send_text(text: str) -> None:
        assert relay.handle(send(owner, text), SOURCE) == (200, OK)
    if stored:
        return Door(send_text, lambda at: relay.store.messages(owner.box, at, 100, 0))
    return Door(send_text, lambda at: messages_of(relay, owner, at))


@pytest.mark.slow
def test_reader_that_advances_never_misses_a_message_of_two_writers(doors: list[Door]) -> None:
    texts = [[f"s{sender}n{number:04d}A" for number in range(60)] for sender in range(6)]

    def send_all(sender: int) -> None:
        for text in texts[sender]:
            doors[sender % 2].send(text)

    found: list[tuple[int, str]] = []
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        senders = [pool.submit(send_all, sender) for sender in range(6)]
        for turn in itertools.count():
            last = all(sender.done() for sender in senders)
            new = doors[turn % 2].read(found[-1][0] if found else 0)
            found += new
            if last and not new:
                break
        for sender in senders:
            sender.result()
    assert_increasing(found)
    assert sorted(text for _, text in found) == sorted(itertools.chain(*texts))
    # Each text was committed before the next was sent.
    for sent in texts:
        kept = set(sent)
        assert [text for _, text in found if text in kept] == sent


@pytest.mark.slow
def test_long_poll_at_one_process_ends_when_another_gets_a_message(start: Callable[..., Process],
                                                                   alice: Owner) -> None:
    here, there = (start("--db", "relay.db") for _ in range(2))
    with contextlib.closing(park(here.port, check(alice, wait=60))) as client:
        # It is promised within a second. The wait is far longer, so this is due to the message.
        client.settimeout(5)
        assert post(there.port, send(alice)) == (200, OK)
        status, reply = reply_on(client)
    assert (status, reply["found"]) == (200, True)
    status, reply = post(there.port, receive(alice, alice.open(reply["question"])))
    assert (status, reply["data"]) == (200, "QUJD")


def statuses_of_a_relay_closed_at_work(path: Path, clock: FakeClock) -> tuple[set[int], int]:
    """Close a relay under eight threads; return what they got, and what one gets afterwards."""
    relay, closed = (
        Relay(SqliteStore(str(path)), Limits(rate=0), clock=clock.clock),
        threading.Event(),
    )

    def work(owner: Owner) -> set[int]:
        got = set()
        while not closed.is_set():
            got |= {
                relay.handle(send(owner), owner.pub).status,
                relay.handle(check(owner), owner.pub).status,
            }
        return got

    with ThreadPoolExecutor(8) as pool:
        works = [pool.submit(work, Owner(1 + number)) for number in range(8)]
        until(lambda: bool(relay.arrivals(0)[1]))
        relay.close()
        closed.set()
        got = set().union(*(one.result() for one in works))
    return got, relay.handle(check(Owner(1)), SOURCE).status


@pytest.mark.slow
def test_close_while_others_are_at_work_gives_them_busy(
        tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    # Once a reader was closed while another thread used it, and SQLite crashed.
    for number in range(20):
        got, afterwards = statuses_of_a_relay_closed_at_work(tmp_path / f"{number}.db", clock)
        # 429 is for its eighth of a box.
        assert got <= {200, 429, 503}
        assert afterwards == 503
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_file_held_by_a_stuck_process_is_busy_and_can_be_left(
    tmp_path: Path, clock: FakeClock, alice: Owner
) -> None:
    with (
        relay_on(tmp_path / "relay.db", clock) as relay,
        (tmp_path / "relay.db-lock").open() as held,
    ):
        assert relay.handle(send(alice), SOURCE) == (200, OK)
        fcntl.flock(held, fcntl.LOCK_EX)
        status, reply = relay.handle(send(alice), SOURCE)
        assert (status, cast(dict[str, Any], reply)["error"]) == (503, "Busy")
        assert relay.handle(check(alice, at=clock.wall_us), SOURCE) == (200, NOTHING)
