"""Test what relays on one store may share: rates, the key of sources, reads ahead."""

from __future__ import annotations

import collections
import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import (
    HOME,
    OK,
    OK_REPLY,
    START_US,
    STORES,
    FakeClock,
    Owner,
    WatchedStore,
    check,
    exchange,
    http_request,
    park,
    post,
    reply_on,
    send,
    serving,
)

from connectoid_relay import (
    DAY_US,
    HOUR_US,
    SECOND_US,
    SOURCE_SHARE,
    Limits,
    Relay,
    SqliteStore,
    Wait,
    Wider,
)

# What relays on one store may share


def test_relay_takes_its_rate_limits_from_whoever_shares_them(
    clock: FakeClock, alice: Owner
) -> None:
    made: dict[str, tuple[int, int]] = {}
    taken: list[tuple[str, object, int]] = []

    class Shared:
        """A rate limit that notes what is taken."""

        def __init__(self, name: str, limit: int, span_us: int) -> None:
            made[name] = (limit, span_us)
            self.name, self.limit = name, limit

        def take(self, key: object, _now_us: int, amount: int = 1,
                 wider: Sequence[Wider] = ()) -> int:
            """Let all pass but a third request."""
            assert not wider
            taken.append((self.name, key, amount))
            return 7 * (len(taken) > 7)

    relay = Relay(SqliteStore(":memory:"), clock=clock.clock, rate_limit=Shared)
    assert made == {
        "requests": (600, 60 * SECOND_US),
        "seals": (120, 60 * SECOND_US),
        "sends": (60, 60 * SECOND_US),
        "sent_bytes": (64 << 20, HOUR_US),
        "turn": (12, HOUR_US),
        "turn_per_source": (240, HOUR_US),
    }
    assert relay.handle(send(alice), HOME) == OK_REPLY
    assert relay.handle(check(alice), HOME).status == 200
    assert taken == [
        ("requests", HOME, 1),
        ("sends", (alice.box, HOME), 1),
        ("sent_bytes", HOME, 4),
        ("requests", HOME, 1),
        ("seals", HOME, 1),
    ]
    assert [relay.handle(check(alice), HOME).status for _ in range(3)] == [200, 200, 429]
    relay.close()


def test_relays_with_one_source_key_see_one_source(
    clock: FakeClock, folder: Path, alice: Owner
) -> None:
    asked: list[int] = []

    def key_of(day: int) -> bytes:
        asked.append(day)
        return day.to_bytes(32)

    relays = [
        Relay(
            STORES["file"](folder),
            Limits(max_box_messages=2 * SOURCE_SHARE),
            clock=clock.clock,
            source_key=key_of,
        )
        for _ in range(2)
    ]
    assert [relay.handle(send(alice), HOME).status for relay in (*relays, *relays)] == [
        200,
        200,
        429,
        429,
    ]
    assert asked == [START_US // DAY_US] * 2
    clock.advance(86_400)
    assert relays[0].handle(send(alice), HOME) == OK_REPLY
    assert asked[2:] == [START_US // DAY_US + 1]
    for relay in relays:
        relay.close()


def test_batch_tells_which_boxes_it_will_look_at(
    clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    within: list[list[bytes]] = []
    watched = WatchedStore()

    @contextlib.contextmanager
    def fetch(boxes: Iterable[bytes]) -> Iterator[None]:
        before = watched.calls["look"]
        yield
        within.append(list(boxes))
        assert watched.calls["look"] - before == 2

    relay = Relay(watched.store, clock=clock.clock, fetch=fetch)
    wrong = [{"pub": "AAAA"}, {}, 7, None, {"pub": 7}]
    assert relay.handle([check(alice), *wrong, check(bob)], HOME).status == 200
    assert within == [[alice.box, bob.box]]
    assert relay.handle(check(alice), HOME).status == 200
    outcome = relay.begin(json.dumps([check(alice, wait=9), check(bob, wait=9)]).encode(), HOME)
    wait = relay.perform(outcome)
    assert isinstance(wait, Wait)
    relay.perform(wait.requests)
    assert [set(boxes) for boxes in within[1:]] == [{alice.box, bob.box}] * 2
    relay.close()


@pytest.mark.sockets
def test_remote_server_asks_its_store_in_the_pool_alone(alice: Owner, bob: Owner) -> None:
    callers: dict[str, set[str]] = collections.defaultdict(set)

    class Remote(WatchedStore):
        """A store that notes who calls."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            callers[threading.current_thread().name].add(name)
            return super().__getattr__(name)

    relay = Relay(Remote(SqliteStore(":memory:")).store)
    with contextlib.closing(relay), serving(relay, remote=True) as server:
        port = server.server_port
        callers.clear()
        for request in (send(alice), check(alice), [check(alice), check(bob)], check(bob)):
            assert post(port, request)[0] == 200
        for path in ("/", "/health", "/metrics"):
            assert exchange(port, http_request(b"", method="GET", path=path)).startswith(
                b"HTTP/1.1 200"
            )
        with contextlib.closing(park(port, check(bob, wait=60))) as client:
            assert post(port, send(bob)) == (200, OK)
            assert reply_on(client)[1]["found"] is True
    (loop,) = (name for name in callers if "serve_forever" in name)
    assert callers[loop] <= {"arrivals", "snapshot"}
    assert set().union(*callers.values()) >= {"put", "look", "stored", "probe"}
