"""Test the DynamoDB store and its server on real engines: dynalite, and moto for what that lacks.

The store's contract is in test_relay.py, run by test_dynamodb_contract.py. Here is what more
than one relay on a table adds to it: order, sums, crashes, and an engine that is slow, full
or gone.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import email.utils
import functools
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

engines = pytest.importorskip("engines", reason="boto3 is missing: pip install -e '.[test]'")

from botocore.awsrequest import AWSResponse  # noqa: E402
from botocore.exceptions import (  # noqa: E402
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ReadTimeoutError,
)
from dynamodb_store import (  # noqa: E402
    ARRIVALS_KEPT_US,
    ATTEMPTS,
    FIRST_LEASE_PARTS,
    ID_BYTES,
    LEASE_PARTS,
    MAX_ARRIVALS,
    MAX_BATCH_TRIES,
    MAX_BOX_ENTRIES,
    MAX_CLOCK_GAP_S,
    MAX_CODE_CHARS,
    MIN_PART_US,
    PARTS_OF_TTL,
    ArrivalLog,
    Box,
    DynamoDbStore,
    Entry,
    SharedRateLimit,
    box_item,
    bucket_width_us,
    check_limits,
    create_table,
    make_client,
    read_box_item,
    ttl_of,
)
from harness import (  # noqa: E402
    NOTHING,
    OK,
    ROOT,
    SOURCE,
    START_US,
    Engine,
    FakeClock,
    Owner,
    answer_of,
    check,
    exchange,
    http_request,
    parse_response,
    post,
    receive,
    send,
    serving,
    source_hash,
)
from server import build_parser  # noqa: E402

import connectoid_relay  # noqa: E402
from connectoid_relay import (  # noqa: E402
    DAY_US,
    HOUR_US,
    MAX_SOURCES,
    MIN_COUNTED_BYTES,
    MINUTE_US,
    POOL_THREADS,
    SECOND_US,
    SOURCE_SHARE,
    YEAR_2200_US,
    Access,
    Limits,
    Look,
    Message,
    NoRoom,
    Quota,
    Relay,
    SettingError,
    SqliteStore,
    Stored,
    StoreError,
    Wider,
)

NOW_US = START_US
EMPTY = Stored(0, 0, 0)
# A deadline for what must happen, however busy the machine is.
DEADLINE_S = 60
WRITES = ("put_item", "update_item")
SERVER = ROOT / "deploy" / "dynamodb" / "server.py"

# ---------------------------------------------------------------------------------------
# Engines, tables, and a client that a test can stop in its tracks.
# ---------------------------------------------------------------------------------------


@pytest.fixture
def client(dynalite_url: str) -> Any:
    """Return a client of dynalite."""
    return engines.client_of(dynalite_url)


@pytest.fixture
def table(client: Any) -> str:
    """Return the name of an empty table."""
    name = engines.new_name()
    create_table(client, name)
    return str(name)


class Hooked:
    """A client that tells of each call before and after.

    What those raise is what the caller gets.
    """

    def __init__(
        self,
        inside: Any,
        before: Callable[[str, Mapping[str, Any]], object] = lambda *_: None,
        after: Callable[[str, Mapping[str, Any]], object] = lambda *_: None,
    ) -> None:
        self.inside, self.before, self.after = inside, before, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inside, name)
        if name == "exceptions":
            return method

        def call(*arguments: Any, **parameters: Any) -> Any:
            self.before(name, parameters)
            reply = method(*arguments, **parameters)
            self.after(name, parameters)
            return reply

        return call


def sort_key_of(parameters: Mapping[str, Any]) -> bytes:
    """Return which item a write is for."""
    key: bytes = (parameters.get("Key") or parameters["Item"])["sk"]["B"]
    return key


def open_store(table: str, client: Any, **options: Any) -> DynamoDbStore:
    """Return a store as exact as SQLite's."""
    return DynamoDbStore(table, client, **{"bucket_width_us": lambda _ttl_us: 1} | options)


def box_of(number: int) -> bytes:
    """Return a mailbox as the store sees it: 49 bytes."""
    return bytes([2]) + number.to_bytes(48)


def message(text: str = "AAAA", *, box: int = 0, source: int = 0, ttl_us: int = HOUR_US,
            quota: Quota | None = None) -> Message:
    """Return a message."""
    return Message(box_of(box), text, source_hash(source), ttl_us, quota or Quota())


def texts_in(
    store: DynamoDbStore, box: int = 0, after_us: int = 0, now_us: int = NOW_US
) -> list[str]:
    """Return the messages of a box."""
    return [text for _, text in store.messages(box_of(box), after_us, 100, now_us)]


def sweep_all(store: DynamoDbStore, now_us: int) -> None:
    """Sweep until there is no more."""
    for _ in range(1_000):
        if not store.sweep(now_us):
            return
    raise AssertionError("a sweep that never ends")


def client_error(code: str) -> ClientError:
    """Return what an engine refuses a call with."""
    return ClientError(
        {"Error": {"Code": code, "Message": "secret words of the engine"}}, "GetItem"
    )


def raise_error(error: Exception, *_: object) -> None:
    """Raise an error, as a hook."""
    raise error


def rate_of(reply: Any) -> tuple[int, str]:
    """Return the status and the error of a reply."""
    return reply.status, reply.body.get("error", "")


def test_engine_that_is_missing_is_told_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "DYNALITE", Path("nowhere"))
    with pytest.raises(engines.Missing, match="run `npm install --ignore-scripts`"):
        engines.dynalite().__enter__()


# ---------------------------------------------------------------------------------------
# Without an engine: items, parts, the log of arrivals.
# ---------------------------------------------------------------------------------------


def entry(number: int, expires_us: int = NOW_US + HOUR_US) -> Entry:
    """Return an entry of a full index."""
    return Entry(NOW_US + number, expires_us, 32_768, bytes(16), number.to_bytes(16))


def test_box_item_holds_all_of_a_box() -> None:
    box = Box(7, NOW_US + 9, NOW_US + DAY_US, (entry(1), entry(2)))
    item = box_item(box)
    assert read_box_item(item) == box
    assert item["ttl"] == ttl_of(NOW_US + DAY_US)
    assert box_item(box._replace(kept_until_us=0))["ttl"] == ttl_of(NOW_US + HOUR_US)
    assert read_box_item({}) == Box()


@pytest.mark.parametrize(("entries", "kib"), [(256, 14), (MAX_BOX_ENTRIES, 209)])
def test_box_item_stays_far_below_the_400_kib_of_an_item(entries: int, kib: int) -> None:
    item = box_item(Box(entries=tuple(map(entry, range(entries)))))
    assert len(item["entries"]) <= kib * 1_024


@pytest.mark.parametrize(("count", "fits"), [
    (MAX_BOX_ENTRIES - 1, True), (MAX_BOX_ENTRIES, True), (MAX_BOX_ENTRIES + 1, False)])
def test_check_limits_refuses_more_messages_than_an_item_can_list(count: int, fits: bool) -> None:
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(SettingError, match="at most 4096 with DynamoDB")
    ):
        check_limits(Limits(max_box_messages=count))


@pytest.mark.parametrize(
    ("ttl_us", "width_us"),
    [
        (1, MIN_PART_US),
        (PARTS_OF_TTL * MIN_PART_US, MIN_PART_US),
        (HOUR_US, 300 * SECOND_US),
        (DAY_US, 2 * HOUR_US),
    ],
)
def test_bucket_width_is_a_twelfth_of_a_life_and_at_least_a_second(
    ttl_us: int, width_us: int
) -> None:
    assert bucket_width_us(ttl_us) == width_us


def test_arrival_log_gives_a_late_one_a_place_that_nobody_has_passed() -> None:
    log = ArrivalLog()
    assert log.after(5) == (5, set())
    log.note([(10, b"a"), (12, b"b")])
    assert log.after(0) == (12, {b"a", b"b"})
    assert log.after(11) == (12, {b"b"})
    # 11 was told late.
    log.note([(10, b"a"), (11, b"c"), (12, b"b")])
    assert log.after(12) == (13, {b"c"})
    assert log.after(13) == (13, set())
    log.note([(20, b"d")])
    assert log.after(13) == (20, {b"d"})
    assert log.newest_at == 20


def test_arrival_log_puts_what_was_told_late_after_its_own_start() -> None:
    log = ArrivalLog(100)
    assert log.after(99) == (99, set())
    log.note([(90, b"late"), (101, b"next")])
    assert log.after(100) == (102, {b"late", b"next"})
    assert log.after(101) == (102, {b"next"})


def test_arrival_log_forgets_what_is_old_and_what_is_too_much() -> None:
    log = ArrivalLog()
    log.note([(1, b"old"), (2, b"young"), (ARRIVALS_KEPT_US + 2, b"new")])
    assert log.after(0)[1] == {b"young", b"new"}
    log.note(
        (number, b"flood")
        for number in range(ARRIVALS_KEPT_US + 3, ARRIVALS_KEPT_US + 2 + MAX_ARRIVALS)
    )
    assert log.after(0)[1] == {b"new", b"flood"}
    log.note([(ARRIVALS_KEPT_US + 2 + MAX_ARRIVALS, b"flood")])
    assert log.after(0)[1] == {b"flood"}


class FakeLeases:
    """What a rate limit asks of a store, without a table."""

    def __init__(self) -> None:
        self.taken: collections.Counter[Any] = collections.Counter()
        self.writes = 0

    def lease(self, counted: Any, amount: int, limit: int, _ends_us: int) -> bool:
        """Take an amount if the sum stays within the limit."""
        self.writes += 1
        if self.taken[counted] + amount > limit:
            return False
        self.taken[counted] += amount
        return True


def shared_limit(leases: FakeLeases, limit: int) -> SharedRateLimit:
    """Return a rate limit on leases, of a minute."""
    return SharedRateLimit(leases, "requests", limit, MINUTE_US)  # type: ignore[arg-type]


# 17 is no multiple of what is leased at a time.
@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9, 17, 600])
def test_shared_rate_limit_gives_one_process_exactly_the_limit_again_in_each_span(
    limit: int,
) -> None:
    rate = shared_limit(FakeLeases(), limit)
    for span in range(2):
        now_us = NOW_US + span * MINUTE_US
        assert [rate.take("a", now_us) for _ in range(limit + 1)] == [0] * limit + [60]
        assert rate.take("b", now_us + MINUTE_US - 1) == 0
    assert shared_limit(FakeLeases(), 0).take("a", NOW_US, 10**9) == 0


def test_shared_rate_limit_costs_few_writes_and_a_refusal_none() -> None:
    rate = shared_limit(leases := FakeLeases(), 600)
    for _ in range(72):
        rate.take("a", NOW_US)
    # The leases are 9, 9, 18 and 36; from then on 75 at a time.
    assert leases.writes == 4
    for _ in range(2_000):
        rate.take("a", NOW_US)
    assert leases.writes <= 4 + LEASE_PARTS + 2


@pytest.mark.parametrize(("relays", "served"), [
    (FIRST_LEASE_PARTS - 1, FIRST_LEASE_PARTS - 1), (FIRST_LEASE_PARTS, FIRST_LEASE_PARTS),
    (FIRST_LEASE_PARTS + 1, FIRST_LEASE_PARTS)])
def test_shared_rate_limit_serves_a_source_that_asks_each_of_so_many_relays(
    relays: int, served: int
) -> None:
    leases = FakeLeases()
    assert [shared_limit(leases, 640).take("a", NOW_US) for _ in range(relays)].count(0) == served


@pytest.mark.parametrize(
    ("amount", "granted"), [(1, 600), (7, 85), (100, 6), (599, 1), (600, 1), (601, 0)]
)
def test_shared_rate_limit_takes_amounts_whole_or_not_at_all(amount: int, granted: int) -> None:
    rate = shared_limit(FakeLeases(), 600)
    assert [rate.take("a", NOW_US, amount) for _ in range(700)].count(0) == granted


def test_shared_rate_limit_takes_a_smaller_amount_when_a_larger_one_is_too_much() -> None:
    rate = shared_limit(FakeLeases(), 8)
    assert [rate.take("a", NOW_US, amount) for amount in (6, 3, 2, 1)] == [0, 60, 0, 60]


def test_shared_rate_limit_holds_for_the_networks_around_a_source() -> None:
    leases = FakeLeases()
    relays = [shared_limit(leases, 64) for _ in range(2)]
    served: collections.Counter[int] = collections.Counter()
    for number in range(400):
        wider = (Wider(f"56 {number % 8}", 2), Wider("48", 4))
        served[relays[number % 2].take(f"64 {number % 64}", NOW_US, wider=wider)] += 1
    assert served == {0: 256, 60: 144}
    one = shared_limit(FakeLeases(), 64)
    assert [one.take(f"64 {number}", NOW_US, wider=(Wider("56", 2),)) for number in range(200)
            ].count(0) == 128


def test_shared_rate_limit_has_further_sources_share_one_count_when_it_knows_too_many() -> None:
    rate = shared_limit(leases := FakeLeases(), 8)
    for number in range(MAX_SOURCES):
        assert rate.take(number, NOW_US) == 0
    assert [rate.take(f"further {number}", NOW_US) for number in range(9)] == [0] * 8 + [60]
    assert len(leases.taken) == MAX_SOURCES + 1
    assert rate.take(0, NOW_US) == 0


def test_shared_rate_limit_never_gives_threads_more_than_was_leased() -> None:
    rate = shared_limit(FakeLeases(), 100)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waits = list(pool.map(lambda _: rate.take("a", NOW_US, 3), range(200)))
    assert waits.count(0) <= 33


# ---------------------------------------------------------------------------------------
# Order and sums, with more than one relay on a table.
# ---------------------------------------------------------------------------------------


def test_message_that_lands_second_gets_the_larger_at_though_it_took_the_smaller(
    client: Any, table: str
) -> None:
    fast = open_store(table, client)

    def overtake(name: str, parameters: Mapping[str, Any]) -> None:
        # The slow one has its `at` by now.
        if name == "put_item" and sort_key_of(parameters).startswith(b"m"):
            slow_client.before = lambda *_: None
            fast_at.append(fast.put(message("FAST"), Limits(), NOW_US))

    fast_at: list[int] = []
    slow_client = Hooked(client, overtake)
    slow_at = open_store(table, slow_client).put(message("SLOW"), Limits(), NOW_US)
    assert slow_at > fast_at[0] == NOW_US + 1
    assert fast.messages(box_of(0), 0, 100, NOW_US) == [(fast_at[0], "FAST"), (slow_at, "SLOW")]
    # Nobody has passed it.
    assert texts_in(fast, after_us=fast_at[0]) == ["SLOW"]


def test_box_limit_holds_for_two_relays_that_saw_the_last_place_free(
    client: Any, table: str
) -> None:
    limits = Limits(max_box_messages=1)
    fast = open_store(table, client)

    def overtake(name: str, parameters: Mapping[str, Any]) -> None:
        if name == "put_item" and sort_key_of(parameters).startswith(b"m"):
            slow_client.before = lambda *_: None
            fast.put(message("FAST"), limits, NOW_US)

    slow_client = Hooked(client, overtake)
    with pytest.raises(NoRoom) as refused:
        open_store(table, slow_client).put(message("SLOW", source=1), limits, NOW_US)
    assert (refused.value.whose, refused.value.until_us) == ("box", NOW_US + 1 + HOUR_US)
    assert texts_in(fast) == ["FAST"]
    # What the other had taken was given back.
    assert fast.stored() == Stored(1, MIN_COUNTED_BYTES, 0)


def test_place_that_a_sweep_has_freed_is_not_given_back_too(client: Any, table: str) -> None:
    limits = Limits(max_box_messages=1)
    fast = open_store(table, client)

    def overtake(name: str, parameters: Mapping[str, Any]) -> None:
        if name == "put_item" and sort_key_of(parameters).startswith(b"m"):
            slow_client.before = lambda *_: None
            fast.put(message("FAST"), limits, NOW_US)
            # The other one is so slow that its message would have expired.
            sweep_all(fast, NOW_US + MINUTE_US)

    slow_client = Hooked(client, overtake)
    with pytest.raises(NoRoom, match="box"):
        open_store(table, slow_client).put(
            message("SLOW", source=1, ttl_us=SECOND_US), limits, NOW_US
        )
    assert fast.stored() == Stored(1, MIN_COUNTED_BYTES, 0)
    sweep_all(fast, NOW_US + 2 * HOUR_US)
    assert fast.stored() == EMPTY


def test_put_refuses_more_entries_than_an_item_can_list_whatever_the_limits_say(
    client: Any, table: str
) -> None:
    store, limits = open_store(table, client), Limits(max_box_messages=10**6, max_box_bytes=10**12)
    full = Box(1, NOW_US, 0, tuple(map(entry, range(MAX_BOX_ENTRIES - 1))))
    assert store._table.write((box_of(0), b"box"), box_item(full))
    assert store.put(message(source=1), limits, NOW_US + SECOND_US) == NOW_US + SECOND_US
    with pytest.raises(NoRoom) as refused:
        store.put(message(source=1), limits, NOW_US + SECOND_US)
    assert (refused.value.whose, refused.value.until_us) == ("box", NOW_US + HOUR_US)


def test_quota_of_bytes_holds_in_sum_and_comes_back_with_expiry(client: Any, table: str) -> None:
    stores = [open_store(table, client) for _ in range(2)]
    quota = Quota("keys.alice", bytes=100)
    stores[0].put(message("A" * 60, quota=quota), Limits(), NOW_US)
    for size, store in ((41, stores[1]), (101, stores[0]), (41, stores[0])):
        with pytest.raises(NoRoom, match="quota"):
            store.put(message("A" * size, box=1, quota=quota), Limits(), NOW_US)
    stores[1].put(message("A" * 40, box=1, quota=quota), Limits(), NOW_US)
    with pytest.raises(NoRoom, match="quota"):
        stores[0].put(message("A", box=2, quota=quota), Limits(), NOW_US)
    # Others have their own.
    stores[1].put(message("A" * 1_000, box=2), Limits(), NOW_US)
    later_us = NOW_US + HOUR_US + SECOND_US
    stores[0].put(message("A" * 100, box=3, quota=quota), Limits(), later_us)
    with pytest.raises(NoRoom, match="quota"):
        stores[1].put(message("A", box=4, quota=quota), Limits(), later_us)


def test_quota_gets_back_what_a_full_relay_refused(client: Any, table: str) -> None:
    store, quota = open_store(table, client), Quota("keys.alice", bytes=100)
    for _ in range(3):
        with pytest.raises(NoRoom, match="relay"):
            store.put(message("A" * 60, quota=quota), Limits(max_bytes=MIN_COUNTED_BYTES), NOW_US)
    store.put(message("A" * 100, quota=quota), Limits(), NOW_US)


def test_two_sweepers_free_each_part_once(client: Any, table: str) -> None:
    fast = open_store(table, client)
    for number in range(3):
        fast.put(message(box=number, ttl_us=SECOND_US), Limits(), NOW_US)
    fast.put(message(box=9), Limits(), NOW_US)
    fast.keep_boxes({box_of(0): NOW_US + SECOND_US, box_of(1): NOW_US + DAY_US}, NOW_US, 5)
    later_us = NOW_US + MINUTE_US

    def overtake(name: str, _parameters: Mapping[str, Any]) -> None:
        # The slow relay has seen what to free.
        if name == "update_item":
            slow_client.before = lambda *_: None
            sweep_all(fast, later_us)

    slow_client = Hooked(client)
    slow = open_store(table, slow_client)
    slow_client.before = overtake
    sweep_all(slow, later_us)
    assert slow.stored() == fast.stored() == Stored(1, MIN_COUNTED_BYTES, 1)


def test_box_row_that_is_kept_longer_is_counted_once_until_its_new_end(
    client: Any, table: str
) -> None:
    stores = [open_store(table, client) for _ in range(2)]
    stores[0].keep_boxes({box_of(0): NOW_US + HOUR_US}, NOW_US, 1)
    for store in stores:
        store.keep_boxes({box_of(0): NOW_US + 2 * HOUR_US}, NOW_US)
    for hours, boxes in ((1, 1), (2, 0)):
        sweep_all(stores[1], NOW_US + hours * HOUR_US)
        assert stores[0].stored().boxes == boxes


def test_box_row_is_counted_once_when_a_message_lands_while_it_is_made(
    client: Any, table: str
) -> None:
    fast = open_store(table, client)

    def overtake(name: str, _parameters: Mapping[str, Any]) -> None:
        if name == "put_item":
            slow_client.before = lambda *_: None
            fast.put(message("FAST"), Limits(), NOW_US)

    slow_client = Hooked(client, overtake)
    open_store(table, slow_client).keep_boxes({box_of(0): NOW_US + DAY_US}, NOW_US, 5)
    assert fast.look(box_of(0), 0, NOW_US) == Look(True, NOW_US + DAY_US)
    assert fast.stored().boxes == 1


def test_arrivals_of_another_process_are_heard_without_asking_the_table(
    client: Any, table: str
) -> None:
    calls: collections.Counter[tuple[str, str]] = collections.Counter()
    hooked = Hooked(client, lambda name, _: calls.update([(threading.current_thread().name, name)]))
    here, there = open_store(table, hooked, follow_every_s=0.01), open_store(table, client)
    at = there.put(message(box=7), Limits(), NOW_US)
    calls.clear()
    wait_until(lambda: here.arrivals(0) != (0, set()))
    assert here.arrivals(at - 1) == (at, {box_of(7)})
    own_at = here.put(message(box=8), Limits(), NOW_US)
    # One's own at once.
    assert here.arrivals(at) == (own_at, {box_of(8)})
    here.close()
    assert not calls[threading.current_thread().name, "query"]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


def test_arrival_that_is_told_late_is_heard(client: Any, table: str) -> None:
    here, fast = open_store(table, client, follow_every_s=0.01), open_store(table, client)

    def overtake(name: str, parameters: Mapping[str, Any]) -> None:
        # The slow relay's message is kept, but not announced yet.
        if name == "put_item" and len(sort_key_of(parameters)) == 8:
            slow_client.before = lambda *_: None
            fast.put(message(box=8), Limits(), NOW_US)
            wait_until(lambda: box_of(8) in here.arrivals(0)[1])
            seen_us.append(here.arrivals(0)[0])

    seen_us: list[int] = []
    slow_client = Hooked(client, overtake)
    assert open_store(table, slow_client).put(message(box=7), Limits(), NOW_US) < seen_us[0]
    wait_until(lambda: here.arrivals(seen_us[0])[1] == {box_of(7)})
    here.close()


def test_source_key_is_shared_by_all_and_another_every_day(client: Any, table: str) -> None:
    stores = [open_store(table, client) for _ in range(3)]
    keys = [[store.source_key(day) for store in stores] for day in (1, 2, 3, 1)]
    assert [len(set(same)) for same in keys] == [1] * 4
    assert len({same[0] for same in keys}) == 3
    assert len(keys[0][0]) == 32


def test_source_key_is_one_for_two_that_make_it_at_the_same_time(client: Any, table: str) -> None:
    fast = open_store(table, client)

    def overtake(name: str, _parameters: Mapping[str, Any]) -> None:
        if name == "put_item":
            slow_client.before = lambda *_: None
            made.append(fast.source_key(1))

    made: list[bytes] = []
    slow_client = Hooked(client, overtake)
    assert [open_store(table, slow_client).source_key(1)] == made


Relays = Callable[..., list[Relay]]


@pytest.fixture
def relays(client: Any, table: str, clock: FakeClock) -> Iterator[Relays]:
    """Return a function that makes three relays on one table, as three processes have them."""
    with contextlib.ExitStack() as stack:
        def make(access: Access | None = None, **limits: int) -> list[Relay]:
            made = []
            for _ in range(3):
                store = open_store(table, client)
                made.append(
                    Relay(
                        store,
                        Limits(**limits),
                        clock=clock.clock,
                        access=access,
                        rate_limit=store.rate_limit,
                        source_key=store.source_key,
                        fetch=store.fetch,
                    )
                )
                stack.callback(made[-1].close)
            return made

        yield make


def outcomes(
    relays: list[Relay], requests: list[tuple[Any, str]]
) -> collections.Counter[tuple[int, str]]:
    """Return how often each outcome came of requests to relays in turn."""
    return collections.Counter(
        rate_of(relay.handle(*request))
        for relay, request in zip(itertools.cycle(relays), requests, strict=False)
    )


BUSY = (503, "Busy")
TOO_OFTEN = (429, "Too often")
FULL = (507, "Full")
DONE = (200, "")


def test_requests_of_a_source_are_limited_in_sum(
    relays: Relays, alice: Owner, clock: FakeClock
) -> None:
    three = relays(rate=24)
    asked = outcomes(three, [(check(alice), SOURCE)] * 90)
    # What one relay has leased (an eighth) and not used when another is refused lies idle
    # until the minute is over.
    assert 24 - 2 * 24 // LEASE_PARTS <= asked[DONE] <= 24
    assert asked.keys() == {DONE, TOO_OFTEN}
    assert three[0].handle(check(alice), "192.0.2.99").status == 200
    clock.advance(60)
    assert outcomes(three, [(check(alice), SOURCE)] * 3) == {DONE: 3}


def test_messages_of_a_source_to_a_box_are_limited_in_sum(relays: Relays, alice: Owner) -> None:
    sent = outcomes(relays(max_sends=6), [(send(alice), SOURCE)] * 30)
    assert sent == {DONE: 6, TOO_OFTEN: 24}


def test_part_of_a_box_that_a_source_may_fill_is_an_eighth_in_sum(
    relays: Relays, alice: Owner
) -> None:
    three = relays(max_box_messages=3 * SOURCE_SHARE)
    assert outcomes(three, [(send(alice), SOURCE)] * 9) == {DONE: 3, TOO_OFTEN: 6}
    crowd = [(send(alice), f"198.51.100.{number}") for number in range(30)]
    # Two of the crowd get in at its cost; then all have one message each.
    assert outcomes(three, crowd) == {DONE: 3 * SOURCE_SHARE - 1, FULL: 30 - 3 * SOURCE_SHARE + 1}


def test_what_gives_way_in_a_full_box_is_taken_off_the_totals_by_whichever_relay(
    client: Any, table: str
) -> None:
    stores = [open_store(table, client) for _ in range(2)]
    limits = Limits(max_box_messages=16)
    for source in range(8):
        for _ in range(2):
            stores[source % 2].put(message(source=source), limits, NOW_US)
    for source in range(8, 16):
        stores[source % 2].put(message("NEW", source=source), limits, NOW_US)
    assert texts_in(stores[0]) == ["AAAA"] * 8 + ["NEW"] * 8
    for store in stores:
        assert store.stored() == Stored(16, 16 * MIN_COUNTED_BYTES, 0)
    sweep_all(stores[0], NOW_US + 2 * HOUR_US)
    assert stores[1].stored() == EMPTY


def test_requests_of_a_key_are_counted_in_sum(relays: Relays, alice: Owner) -> None:
    three = relays(Access({"token": Quota("keys.alice", requests_per_day=10)}))
    asked: collections.Counter[tuple[int, str]] = collections.Counter()
    for relay in [*three, *three, *three, *three, *three, *three]:
        asked[rate_of(relay.handle(check(alice, ext="token"), SOURCE))] += 1
        # As a server does every second.
        relay.sweep()
        for other in three:
            other.sweep()
    assert asked == {DONE: 10, TOO_OFTEN: 8}


def test_table_shows_no_source(relays: Relays, alice: Owner, client: Any, table: str) -> None:
    for relay in relays():
        relay.handle(send(alice), "203.0.113.77")
        relay.handle(receive(alice, answer_of(relay, alice, "203.0.113.77")), "203.0.113.77")
    items = client.scan(TableName=table)["Items"]
    assert len(items) > 10
    assert "203.0.113" not in repr(items)


# ---------------------------------------------------------------------------------------
# Crashes and lost replies.
# ---------------------------------------------------------------------------------------

# The calls of a put with a quota, in order.
PUT_WRITES = ("quota", "totals", "body", "box", "arrivals")
QUOTA = Quota("keys.alice", bytes=1_000)


class Killed(BaseException):
    """The end of a process: nothing of ours may catch it."""


def kill_at_write(client: Any, number: int, *, done: bool) -> Hooked:
    """Return a client whose process is killed at a write, before or after it is done.

    Then nothing is called.
    """
    count, dead = itertools.count(), threading.Event()

    def before(name: str, _parameters: Mapping[str, Any]) -> None:
        if not done and name in WRITES and next(count) == number:
            dead.set()
        if dead.is_set():
            raise Killed

    def after(name: str, _parameters: Mapping[str, Any]) -> None:
        if done and name in WRITES and next(count) == number:
            dead.set()
            raise Killed

    return Hooked(client, before, after)


def test_put_writes_what_the_tests_of_crashes_think(client: Any, table: str) -> None:
    keys: list[bytes] = []
    hooked = Hooked(client)
    store = open_store(table, hooked)
    hooked.before = lambda name, parameters: (
        keys.append(sort_key_of(parameters)) if name in WRITES else None
    )
    store.put(message(quota=QUOTA), Limits(), NOW_US)
    assert [key[:1] for key in keys] == [b"k", b"m", b"m", b"b", NOW_US.to_bytes(8)[:1]]
    assert len(keys) == len(PUT_WRITES)


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(len(PUT_WRITES)), ids=PUT_WRITES)
def test_put_that_is_killed_at_a_write_keeps_all_or_nothing_and_leaks_until_its_part_ends(
        client: Any, table: str, number: int, done: bool) -> None:
    other = open_store(table, client)
    other.put(message("FIRST"), Limits(), NOW_US)
    with pytest.raises(Killed):
        open_store(table, kill_at_write(client, number, done=done)).put(
            message("DYING", quota=QUOTA), Limits(), NOW_US
        )
    kept = ["FIRST"] + ["DYING"] * (number > 3 or (number == 3 and done))
    assert texts_in(other) == kept
    assert other.put(message("LATER", source=1), Limits(), NOW_US) > NOW_US
    assert texts_in(other) == [*kept, "LATER"]
    # It takes a place for as long as a message would, and no longer.
    sweep_all(other, NOW_US + HOUR_US - 1)
    assert other.stored().messages == 2 + (number > 1 or (number == 1 and done))
    sweep_all(other, NOW_US + HOUR_US + SECOND_US)
    assert other.stored() == EMPTY
    other.put(message("A" * 1_000, box=3, quota=QUOTA), Limits(), NOW_US + HOUR_US + SECOND_US)


LOST = ReadTimeoutError(endpoint_url="http://engine")


@pytest.mark.parametrize("number", range(1, len(PUT_WRITES)), ids=PUT_WRITES[1:])
def test_put_whose_reply_of_the_engine_is_lost_neither_loses_nor_doubles(
        client: Any, table: str, number: int) -> None:
    hooked, count = Hooked(client), itertools.count()
    store = open_store(table, hooked)
    store.put(message("FIRST"), Limits(), NOW_US)

    def lose(name: str, _parameters: Mapping[str, Any]) -> None:
        if name in WRITES and next(count) == number:
            raise LOST

    hooked.after = lose
    acknowledged = PUT_WRITES[number] in ("box", "arrivals")
    with (
        contextlib.nullcontext()
        if acknowledged
        else pytest.raises(StoreError, match="does not answer")
    ):
        store.put(message("LOST", quota=QUOTA), Limits(), NOW_US)
    other = open_store(table, client)
    assert texts_in(other) == ["FIRST"] + ["LOST"] * acknowledged
    sweep_all(other, NOW_US + HOUR_US + SECOND_US)
    assert other.stored() == EMPTY


@pytest.mark.parametrize(
    ("error", "told"),
    [(LOST, "does not answer"), (AttributeError("rubbish"), "does not speak DynamoDB")],
    ids=["lost", "rubbish"],
)
def test_put_of_which_nobody_knows_whether_it_was_kept_keeps_its_place(
    client: Any, table: str, error: Exception, told: str
) -> None:
    hooked = Hooked(client)
    store, other = open_store(table, hooked), open_store(table, client)

    def lose(name: str, parameters: Mapping[str, Any]) -> None:
        if name == "put_item" and sort_key_of(parameters) == b"box":
            hooked.before = lose_a_read
            raise error

    def lose_a_read(name: str, _parameters: Mapping[str, Any]) -> None:
        if name == "get_item":
            hooked.before = lambda *_: None
            raise error

    hooked.after = lose
    with pytest.raises(StoreError, match=told):
        store.put(message("LOST"), Limits(), NOW_US)
    assert texts_in(other) == ["LOST"]
    assert other.stored() == Stored(1, MIN_COUNTED_BYTES, 0)
    sweep_all(other, NOW_US + HOUR_US)
    assert other.stored() == EMPTY


def test_put_that_fails_in_whatever_way_at_the_box_keeps_its_place_until_its_part_ends(
        client: Any, table: str) -> None:
    lengths = iter([ID_BYTES])

    def random_bytes(length: int) -> bytes:
        if length != next(lengths, None):
            raise RuntimeError("no random numbers")
        return bytes(length)

    # For the version of the box.
    with pytest.raises(RuntimeError, match="no random numbers"):
        open_store(table, client, random_bytes=random_bytes).put(message(), Limits(), NOW_US)
    other = open_store(table, client)
    assert other.stored() == Stored(1, MIN_COUNTED_BYTES, 0)
    sweep_all(other, NOW_US + HOUR_US)
    assert other.stored() == EMPTY


def test_put_that_the_client_library_repeats_after_a_lost_reply_is_kept_once(
    client: Any, table: str
) -> None:
    repeated: list[str] = []

    def repeat(name: str, parameters: Mapping[str, Any]) -> None:
        if name == "put_item" and sort_key_of(parameters) == b"box" and not repeated:
            repeated.append(name)
            # The first attempt, whose reply was lost.
            client.put_item(**parameters)

    store = open_store(table, Hooked(client, repeat))
    assert store.put(message(), Limits(), NOW_US) == NOW_US
    assert repeated
    assert store.messages(box_of(0), 0, 100, NOW_US) == [(NOW_US, "AAAA")]


def test_put_never_writes_over_a_box_that_was_deleted_and_made_anew_meanwhile(
    client: Any, table: str
) -> None:
    fast = open_store(table, client)
    fast.put(message("GONE", ttl_us=SECOND_US), Limits(), NOW_US)

    def overtake(name: str, parameters: Mapping[str, Any]) -> None:
        # The slow one has seen the old box.
        if name == "put_item" and sort_key_of(parameters) == b"box":
            slow_client.before = lambda *_: None
            # As TTL does.
            client.delete_item(TableName=table, Key={"pk": {"B": box_of(0)}, "sk": {"B": b"box"}})
            fast.put(message("FAST"), Limits(), NOW_US + MINUTE_US)

    slow_client = Hooked(client, overtake)
    open_store(table, slow_client).put(message("SLOW", source=1), Limits(), NOW_US + MINUTE_US)
    assert texts_in(fast) == ["FAST", "SLOW"]


@pytest.mark.parametrize("kept_hours", [0, 1], ids=["new", "renewed"])
def test_box_row_is_counted_once_when_the_client_library_repeats_its_write(
        client: Any, table: str, kept_hours: int) -> None:
    other = open_store(table, client)
    other.keep_boxes({box_of(0): NOW_US + kept_hours * HOUR_US}, NOW_US, 5)

    def repeat(name: str, parameters: Mapping[str, Any]) -> None:
        if name == "put_item":
            hooked.before = lambda *_: None
            # The first attempt, whose reply was lost.
            client.put_item(**parameters)

    hooked = Hooked(client, repeat)
    open_store(table, hooked).keep_boxes({box_of(0): NOW_US + 2 * HOUR_US}, NOW_US, 5)
    for hours, boxes in ((1, 1), (2, 0)):
        sweep_all(other, NOW_US + hours * HOUR_US)
        assert other.stored().boxes == boxes


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [0, 1], ids=["totals", "row"])
def test_keep_boxes_that_is_killed_heals_when_the_row_ends(
    client: Any, table: str, number: int, done: bool
) -> None:
    other = open_store(table, client)
    other.probe(NOW_US)
    with pytest.raises(Killed):
        open_store(table, kill_at_write(client, number, done=done)).keep_boxes(
            {box_of(0): NOW_US + HOUR_US}, NOW_US, 1
        )
    made = number == 1 and done
    assert other.look(box_of(0), 0, NOW_US).box_expires_us == (NOW_US + HOUR_US if made else None)
    assert other.stored().boxes == (number == 1 or done)
    sweep_all(other, NOW_US + HOUR_US)
    assert other.stored() == EMPTY
    other.keep_boxes({box_of(1): NOW_US + DAY_US}, NOW_US + HOUR_US, 1)
    assert other.stored().boxes == 1


def test_box_row_whose_renewal_is_killed_is_counted_again_from_the_next_one(
    client: Any, table: str
) -> None:
    other = open_store(table, client)
    other.keep_boxes({box_of(0): NOW_US + HOUR_US}, NOW_US, 1)
    with pytest.raises(Killed):
        open_store(table, kill_at_write(client, 0, done=True)).keep_boxes(
            {box_of(0): NOW_US + 2 * HOUR_US}, NOW_US
        )
    sweep_all(other, NOW_US + HOUR_US)
    assert other.look(box_of(0), 0, NOW_US + HOUR_US).box_expires_us == NOW_US + 2 * HOUR_US
    assert other.stored().boxes == 0
    other.keep_boxes({box_of(0): NOW_US + 3 * HOUR_US}, NOW_US + HOUR_US)
    for hours, boxes in ((2, 1), (3, 0)):
        sweep_all(other, NOW_US + hours * HOUR_US)
        assert other.stored().boxes == boxes


def test_what_is_left_over_carries_a_ttl(client: Any, table: str) -> None:
    store = open_store(table, client)
    store.put(message(quota=QUOTA), Limits(), NOW_US)
    store.put_question(box_of(0), ("question", b"answer"), SECOND_US, NOW_US)
    store.keep_boxes({box_of(1): NOW_US + DAY_US}, NOW_US, 1)
    store.spend({"keys.alice": 1}, NOW_US)
    assert store.rate_limit("requests", 10, DAY_US).take(SOURCE, NOW_US) == 0
    items = client.scan(TableName=table)["Items"]
    lasting = {(item["pk"]["B"], item["sk"]["B"]) for item in items if "ttl" not in item}
    assert lasting == {(b"relay", b"messages"), (b"relay", b"boxes"), (b"quota", b"keys.alice")}
    soonest_s = NOW_US // SECOND_US
    assert all(int(item["ttl"]["N"]) >= soonest_s for item in items if "ttl" in item)


# ---------------------------------------------------------------------------------------
# The model: SQLite does the same, whatever is done by whichever of two stores on a table.
# ---------------------------------------------------------------------------------------

BOXES = st.integers(0, 2)
SMALL = Limits(max_box_messages=4, max_box_bytes=400, max_bytes=9 * MIN_COUNTED_BYTES)


class TwoStores(RuleBasedStateMachine):
    """Do the same to SQLite and to one of two stores on a table, and compare what they say."""

    client: Any = None

    @initialize()
    def begin(self) -> None:
        name = engines.new_name()
        create_table(self.client, name)
        self.now_us = NOW_US
        self.model = SqliteStore(":memory:")
        self.stores = [open_store(name, self.client) for _ in range(2)]
        self.turn = itertools.cycle(self.stores)

    def both(self, call: Callable[[Any], Any]) -> None:
        """Compare the outcome of a call."""
        told = []
        for store in (self.model, next(self.turn)):
            try:
                told.append(call(store))
            except NoRoom as refused:
                told.append((refused.whose, refused.until_us))
        assert told[0] == told[1]

    @rule(seconds=st.sampled_from([0, 1, 29, 30, 60, 600]))
    def wait(self, seconds: int) -> None:
        self.now_us += seconds * SECOND_US

    @rule(
        box=BOXES,
        source=st.integers(0, 4),
        size=st.integers(1, 80),
        ttl_s=st.sampled_from([1, 60, 900]),
    )
    def put(self, box: int, source: int, size: int, ttl_s: int) -> None:
        kept = message("A" * size, box=box, source=source, ttl_us=ttl_s * SECOND_US)
        self.both(lambda store: store.put(kept, SMALL, self.now_us))

    @rule(box=BOXES, ago_s=st.sampled_from([0, 1, 60, 3_600]))
    def look(self, box: int, ago_s: int) -> None:
        at_us = self.now_us - ago_s * SECOND_US
        self.both(lambda store: store.look(box_of(box), at_us, self.now_us))
        self.both(lambda store: store.messages(box_of(box), at_us, 3, self.now_us))

    @rule(box=BOXES)
    def ask(self, box: int) -> None:
        question = (f"question {self.now_us}", b"answer %d" % self.now_us)
        self.both(lambda store: store.put_question(box_of(box), question, MINUTE_US, self.now_us))

    @rule(box=BOXES, seconds=st.sampled_from([1, 60, 3_600]), room_for=st.integers(0, 2))
    def keep(self, box: int, seconds: int, room_for: int) -> None:
        # Rows of SQLite, too, can be revived until they are swept.
        for store in (self.model, *self.stores):
            sweep_all(store, self.now_us)  # type: ignore[arg-type]
        self.model.keep_boxes(
            {box_of(box): self.now_us + seconds * SECOND_US}, self.now_us, room_for
        )
        next(self.turn).keep_boxes(
            {box_of(box): self.now_us + seconds * SECOND_US}, self.now_us, room_for
        )

    @rule()
    def sweep(self) -> None:
        sweep_all(self.model, self.now_us)  # type: ignore[arg-type]
        for store in self.stores:
            sweep_all(store, self.now_us)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "model"):
            self.both(
                lambda store: [sorted(store.answers(box_of(box), self.now_us)) for box in range(3)]
            )
            self.both(lambda store: store.stored())

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.close()
            for store in self.stores:
                store.close()


@pytest.mark.slow
def test_two_stores_on_a_table_do_what_sqlite_does(client: Any) -> None:
    TwoStores.client = client
    run_state_machine_as_test(TwoStores, settings=settings(
        derandomize=True, deadline=None, max_examples=25, stateful_step_count=25,
        suppress_health_check=list(HealthCheck)))


# ---------------------------------------------------------------------------------------
# An engine in trouble, and what the host is told.
# ---------------------------------------------------------------------------------------


class Stingy:
    """A client that gives one item of a batch at a time, or none."""

    def __init__(self, inside: Any, gives: int) -> None:
        self.inside, self.gives, self.batches = inside, gives, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def batch_get_item(self, RequestItems: Any) -> Any:
        """Return few items and name the rest as unprocessed."""
        self.batches += 1
        ((table, request),) = RequestItems.items()
        given, rest = request["Keys"][:self.gives], request["Keys"][self.gives:]
        reply = (
            self.inside.batch_get_item(RequestItems={table: request | {"Keys": given}})
            if given
            else {
                "Responses": {},
                "ResponseMetadata": {"HTTPHeaders": {"content-type": "application/x-amz-json-1.0"}},
            }
        )
        return reply | {"UnprocessedKeys": {table: request | {"Keys": rest}} if rest else {}}


@pytest.mark.parametrize("count", [MAX_BATCH_TRIES - 1, MAX_BATCH_TRIES, MAX_BATCH_TRIES + 1])
def test_messages_that_come_in_parts_are_asked_for_so_many_times(
    client: Any, table: str, count: int
) -> None:
    store = open_store(table, stingy := Stingy(client, 1))
    texts = [f"TEXT{number}" for number in range(count)]
    for number, text in enumerate(texts):
        store.put(message(text, source=number), Limits(), NOW_US)
    if count <= MAX_BATCH_TRIES:
        assert texts_in(store) == texts
    else:
        with pytest.raises(StoreError, match="has not enough capacity"):
            texts_in(store)
    assert stingy.batches == min(count, MAX_BATCH_TRIES)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            client_error("ResourceNotFoundException"),
            "does not exist; make it with --create-table or name another",
        ),
        (
            client_error("UnrecognizedClientException"),
            "does not accept our credentials; give others with the right",
        ),
        (
            client_error("AccessDeniedException"),
            "does not accept our credentials; give others with the right",
        ),
        (
            client_error("ValidationException"),
            "has not the keys pk and sk, both binary; make another",
        ),
        (
            client_error("ProvisionedThroughputExceededException"),
            "has not enough capacity; raise it",
        ),
        (client_error("InternalServerError"), "cannot be used (InternalServerError)"),
        (client_error("No\nline; of 'its' own"), "cannot be used (Nolineofitsown)"),
        (client_error("E" * 200_000), f"cannot be used ({'E' * MAX_CODE_CHARS})"),
        (
            UnicodeDecodeError("utf-8", b"secret", 0, 1, "secret"),
            "does not speak DynamoDB, or others write to the table",
        ),
        (
            HTTPClientError(error="secret"),
            "cannot be asked; look for line breaks in the credentials",
        ),
        (NoCredentialsError(), "needs credentials; set AWS_ACCESS_KEY_ID"),
        (
            EndpointConnectionError(endpoint_url="http://secret"),
            "does not answer; look at the network",
        ),
    ],
    ids=repr,
)
def test_engine_that_refuses_is_told_in_one_sentence_without_its_words(
        client: Any, error: Exception, told: str) -> None:
    with pytest.raises(StoreError) as refused:
        open_store("the-table", Hooked(client, functools.partial(raise_error, error)))
    assert told in str(refused.value)
    assert str(refused.value).startswith("the table the-table ")
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


class Impostor:
    """A server that answers everything with an empty object."""

    def __getattr__(self, _name: str) -> Any:
        return lambda **_: {}


def test_server_that_does_not_speak_dynamodb_is_not_taken_for_an_empty_table() -> None:
    with pytest.raises(StoreError, match="--endpoint-url does not speak DynamoDB"):
        open_store("the-table", Impostor())


AMZ_JSON = "application/x-amz-json-1.0"
# The type and the body.
NO_REPLIES = [
    ("", b""),
    ("text/html", b"<html>Welcome</html>"),
    ("application/json", b"{}"),
    (AMZ_JSON, b""),
    (AMZ_JSON, b"[]"),
    (AMZ_JSON, b"null"),
    (AMZ_JSON, b"\xff\xfe"),
    (AMZ_JSON, b'{"Item": [], "Attributes": 1, "Items": 1, "Responses": 1}'),
]
Misled = Callable[[Callable[[str, bytes], bool], tuple[str, bytes]], Any]


class Octets(io.BytesIO):
    """A body as botocore reads it."""

    def stream(self) -> Iterator[bytes]:
        """Yield all of it."""
        yield self.read()


@pytest.fixture
def misled(dynalite_url: str) -> Misled:
    """Return a function that makes a client of dynalite.

    Some of its calls get a 200 from somebody else.
    """

    def make(is_misled: Callable[[str, bytes], bool], reply: tuple[str, bytes]) -> Any:
        content_type, body = reply

        def answer(request: Any, event_name: str, **_: Any) -> Any:
            if not is_misled(event_name.rpartition(".")[2], request.body):
                return None
            headers = {"content-type": content_type, "content-length": str(len(body))}
            return AWSResponse(request.url, 200, headers, Octets(body))

        client = engines.session().client("dynamodb", endpoint_url=dynalite_url)
        client.meta.events.register("before-send.dynamodb", answer)
        return client

    return make


# M..., box.
@pytest.mark.parametrize(
    "sort_key", [b'"sk": {"B": "b', b'"sk": {"B": "Ym94"}'], ids=["body", "box"]
)
@pytest.mark.parametrize("reply", NO_REPLIES[:-1], ids=str)
def test_message_that_no_engine_has_confirmed_is_not_acknowledged(
        client: Any, table: str, misled: Misled, sort_key: bytes, reply: tuple[str, bytes]) -> None:
    calls: list[str] = []

    def is_misled(operation: str, request: bytes) -> bool:
        found = operation == "PutItem" and sort_key in request
        calls.extend([operation] * found)
        return found

    store = open_store(table, misled(is_misled, reply))
    with pytest.raises(StoreError, match="does not speak DynamoDB"):
        store.put(message(), Limits(), NOW_US)
    assert calls
    other = open_store(table, client)
    assert texts_in(other) == []
    sweep_all(other, NOW_US + HOUR_US)
    assert other.stored() == EMPTY


CALLS: Mapping[str, Callable[[DynamoDbStore], object]] = {
    "GetItem": lambda store: store.look(box_of(0), 0, NOW_US),
    "UpdateItem": lambda store: store.put(message(), Limits(), NOW_US),
    "Query": lambda store: store.arrivals(0),
    "BatchGetItem": lambda store: store.messages(box_of(9), 0, 1, NOW_US)}


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("reply", NO_REPLIES, ids=str)
def test_reply_that_makes_no_sense_is_a_store_error_and_trouble_of_the_engine(
        client: Any, table: str, misled: Misled, operation: str, reply: tuple[str, bytes]) -> None:
    open_store(table, client).put(message(box=9), Limits(), NOW_US)
    is_open = threading.Event()
    store = open_store(table, misled(lambda name, _: name == operation and is_open.is_set(), reply))
    is_open.set()
    with pytest.raises(StoreError, match="does not speak DynamoDB"):
        CALLS[operation](store)
    # Of writes, or of reads.
    assert set(store._table._troubles) == {operation == "UpdateItem"}


def test_box_that_others_have_written_is_a_store_error(client: Any, table: str) -> None:
    client.put_item(
        TableName=table, Item={"pk": {"B": box_of(0)}, "sk": {"B": b"box"}, "version": {"N": "1"}}
    )
    with pytest.raises(StoreError, match="a box in the table is none of ours"):
        open_store(table, client).look(box_of(0), 0, NOW_US)


def set_relay(client: Any, table: str, name: str, value: str) -> None:
    """Write a number of the relay's item."""
    client.put_item(
        TableName=table, Item={"pk": {"B": b"relay"}, "sk": {"B": b"messages"}, name: {"N": value}}
    )


@pytest.mark.parametrize("name", ["time_us", "last_at"])
@pytest.mark.parametrize(("time_us", "fits"), [
    (YEAR_2200_US - 1, True), (YEAR_2200_US, False), (YEAR_2200_US + 1, False)])
def test_time_of_the_table_from_the_year_2200_on_is_refused(
        client: Any, table: str, name: str, time_us: int, fits: bool) -> None:
    store = open_store(table, client)
    set_relay(client, table, name, str(time_us))
    for ask in (store.time_us, lambda: open_store(table, client)):
        with (
            contextlib.nullcontext()
            if fits
            else pytest.raises(StoreError, match="past the year 2200")
        ):
            ask()
    set_relay(client, table, name, str(NOW_US))
    # A refused message has taught the relay nothing.
    assert store.time_us() == NOW_US


def test_table_with_foreign_numbers_is_refused(client: Any, table: str) -> None:
    set_relay(client, table, "time_us", "1.5")
    with pytest.raises(StoreError, match="or others write to the table"):
        open_store(table, client)


@pytest.mark.parametrize(("gap_s", "fits"), [
    (MAX_CLOCK_GAP_S - 1, True), (MAX_CLOCK_GAP_S, True), (MAX_CLOCK_GAP_S + 1, False)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_clock_that_is_not_the_engines_is_refused(
        client: Any, table: str, gap_s: int, fits: bool, sign: int) -> None:
    store = open_store(table, client)
    # Dynalite tells one.
    assert email.utils.parsedate_to_datetime(store._table.date)
    store._table.date = email.utils.formatdate(NOW_US // SECOND_US + sign * gap_s, usegmt=True)
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(StoreError, match="differ by more than 5 minutes; set")
    ):
        store.check_clock(NOW_US)


@pytest.mark.parametrize("date", ["", "nonsense"])
def test_engine_that_tells_no_date_is_trusted(client: Any, table: str, date: str) -> None:
    store = open_store(table, client)
    store._table.date = date
    store.check_clock(0)


@pytest.mark.parametrize(("ahead_s", "warned"), [
    (MAX_CLOCK_GAP_S - 1, False), (MAX_CLOCK_GAP_S, False), (MAX_CLOCK_GAP_S + 1, True)])
def test_table_whose_time_is_ahead_is_told(
    client: Any, table: str, ahead_s: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    wall_us = time.time_ns() // 1_000
    open_store(table, client).probe(wall_us + ahead_s * SECOND_US)
    open_store(table, client).check_clock(wall_us)
    assert ("more than 5 minutes ahead of our clock" in caplog.text) == warned


@pytest.mark.parametrize(("environment", "options", "told"), [
    ({"AWS_PROFILE": "nope"}, {}, "AWS_PROFILE names a profile that is not there"),
    ({"AWS_SECRET_ACCESS_KEY": ""}, {}, "half of the credentials is missing"),
    ({}, {"region": "bad region"}, "--region, or AWS_DEFAULT_REGION, is no name of a region"),
    ({}, {"endpoint_url": "ftp://127.0.0.1"}, "--endpoint-url is not a web address"),
    ({}, {"endpoint_url": "http://alice:PASSWORD@x y"}, "--endpoint-url is not a web address"),
], ids=str)
def test_setting_that_cannot_be_used_is_told_and_not_repeated(
    environment: dict[str, str], options: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (engines.ENVIRONMENT | environment).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(SettingError, match=f"^{re.escape(told)}") as refused:
        make_client(**options)
    assert "PASSWORD" not in str(refused.value)


@pytest.mark.parametrize(
    ("operation", "error", "told"),
    [
        (
            "describe_table",
            client_error("AccessDeniedException"),
            "does not accept our credentials",
        ),
        (
            "describe_time_to_live",
            client_error("AccessDeniedException"),
            "does not accept our credentials",
        ),
        ("describe_time_to_live", client_error("ThrottlingException"), "has not enough capacity"),
        ("describe_time_to_live", LOST, "does not answer"),
        ("create_table", client_error("AccessDeniedException"), "does not accept our credentials"),
        ("describe_table", AttributeError(), "does not speak DynamoDB"),
    ],
    ids=str,
)
def test_table_that_cannot_be_made_is_told(
    client: Any, operation: str, error: Exception, told: str
) -> None:
    hooked = Hooked(client, lambda name, _: raise_error(error) if name == operation else None)
    with pytest.raises(StoreError, match=told):
        create_table(hooked, engines.new_name())


@pytest.mark.parametrize("code", ["UnknownOperationException", "ValidationException"])
def test_engine_that_knows_no_ttl_gets_its_table_all_the_same(client: Any, code: str) -> None:
    refuse = functools.partial(raise_error, client_error(code))
    hooked = Hooked(client, lambda name, _: refuse() if name == "describe_time_to_live" else None)
    assert not create_table(hooked, name := engines.new_name())
    assert open_store(name, client).stored() == EMPTY


def test_table_that_exists_is_not_made_again(client: Any, table: str) -> None:
    calls: list[str] = []
    create_table(Hooked(client, lambda name, _: calls.append(name)), table)
    assert calls[0] == "describe_table"
    assert "create_table" not in calls


def test_first_message_of_all_gets_an_at_even_at_the_beginning_of_time(
    client: Any, table: str
) -> None:
    store = open_store(table, client)
    assert [store.put(message(), Limits(), now_us) for now_us in (0, 0, 5)] == [1, 2, 5]


def test_table_with_other_keys_is_refused(client: Any) -> None:
    name = engines.new_name()
    client.create_table(TableName=name, BillingMode="PAY_PER_REQUEST",
                        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
                        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}])
    # This waits for the lock, and leaves the file as it is.
    create_table(client, name)
    with pytest.raises(StoreError, match="has not the keys pk and sk"):
        open_store(name, client)


def test_create_table_says_whether_the_engine_deletes_what_has_expired(engine: Engine) -> None:
    client = engines.client_of(engine.url)
    name = engines.new_name()
    deletes = engine.name == "moto"
    assert [create_table(client, name) for _ in range(2)] == [deletes] * 2
    if deletes:
        told = client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
        assert (told["TimeToLiveStatus"], told["AttributeName"]) == ("ENABLED", "ttl")


def test_client_has_a_connection_for_every_thread_and_gives_up_soon() -> None:
    config = make_client(region="eu-central-1").meta.config
    assert config.max_pool_connections >= POOL_THREADS + 2
    assert (config.connect_timeout, config.read_timeout) == (1, 1)
    assert config.retries == {"mode": "standard", "total_max_attempts": ATTEMPTS}


def test_throttled_engine_makes_sends_busy_and_checks_go_on(
    client: Any, table: str, clock: FakeClock, alice: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    hooked = Hooked(client)
    relay = Relay(open_store(table, hooked), Limits(rate=0), clock=clock.clock)

    def throttle(name: str, _parameters: Mapping[str, Any]) -> None:
        if name in WRITES:
            raise client_error("ProvisionedThroughputExceededException")

    hooked.before = throttle
    reply = relay.handle(send(alice), SOURCE)
    assert (rate_of(reply), reply.body["retry"]) == (BUSY, 5)
    assert relay.health().status == 503
    assert relay.handle(check(alice), SOURCE) == (200, NOTHING)
    hooked.before = lambda *_: None
    # What was not acknowledged is not there.
    assert relay.handle(check(alice), SOURCE) == (200, NOTHING)
    # It is asked again after a second.
    wait_until(lambda: relay.handle(send(alice), SOURCE) == (200, OK))
    assert relay.stored() == Stored(1, MIN_COUNTED_BYTES, 0)
    assert "has not enough capacity; raise it" in caplog.text
    assert "secret" not in caplog.text
    relay.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [(LOST, "does not answer"), (client_error("ThrottlingException"), "has not enough capacity")],
    ids=["lost", "full"],
)
def test_engine_in_trouble_is_asked_by_one_call_at_a_time(
    client: Any, table: str, error: Exception, told: str
) -> None:
    calls: list[str] = []
    hooked = Hooked(client, lambda name, _: calls.append(name))
    store = open_store(table, hooked)

    def be_silent(name: str, _parameters: Mapping[str, Any]) -> None:
        calls.append(name)
        raise error

    hooked.before = be_silent
    calls.clear()
    for _ in range(100):
        with pytest.raises(StoreError, match=told):
            store.look(box_of(0), 0, NOW_US)
    assert 1 <= len(calls) < 50
    hooked.before = lambda *_: None

    def is_well() -> bool:
        with contextlib.suppress(StoreError):
            return not store.look(box_of(0), 0, NOW_US).found
        return False

    # Asked again after a second.
    wait_until(is_well)


def test_error_of_one_item_is_no_trouble_of_the_engine(client: Any, table: str) -> None:
    hooked = Hooked(client)
    store = open_store(table, hooked)
    for code in ("ValidationException", "InternalServerError"):
        hooked.before = functools.partial(raise_error, client_error(code))
        with pytest.raises(StoreError):
            store.look(box_of(0), 0, NOW_US)
        hooked.before = lambda *_: None
        assert not store.look(box_of(0), 0, NOW_US).found


def test_batch_is_read_a_hundred_boxes_at_a_time_and_only_for_itself(
        client: Any, table: str, clock: FakeClock, alice: Owner) -> None:
    calls: list[str] = []
    hooked = Hooked(client, lambda name, _: calls.append(name))
    store = open_store(table, hooked)
    relay = Relay(store, Limits(rate=0), clock=clock.clock, fetch=store.fetch)
    batch = [
        *(check(Owner(number)) for number in range(3, 253)),
        check(alice),
        "nonsense",
        check(alice),
    ]
    calls.clear()
    status, replies = relay.handle(batch, SOURCE)
    assert (status, calls) == (200, ["batch_get_item"] * 3)
    assert [reply["ok"] for reply in replies] == [True] * 251 + [False, True]
    assert relay.handle(send(alice), SOURCE) == (200, OK)
    replies = relay.handle(batch, SOURCE).body
    assert [number for number, reply in enumerate(replies) if reply.get("found")] == [250, 252]
    assert relay.handle(check(alice), SOURCE).body["found"]
    calls.clear()
    assert relay.handle(check(Owner(3)), SOURCE) == (200, NOTHING)
    # A check alone is not answered from what a batch has read.
    assert calls == ["get_item"]
    relay.close()


def test_batch_at_a_silent_engine_gets_busy_for_each_of_its_checks(
        client: Any, table: str, clock: FakeClock, alice: Owner) -> None:
    calls: list[str] = []
    hooked = Hooked(client)
    store = open_store(table, hooked)
    relay = Relay(store, Limits(rate=0), clock=clock.clock, fetch=store.fetch)

    def be_silent(name: str, _parameters: Mapping[str, Any]) -> None:
        calls.append(name)
        raise LOST

    hooked.before = be_silent
    status, replies = relay.handle([check(alice)] * 256, SOURCE)
    assert (status, {reply["error"] for reply in replies}) == (200, {"Busy"})
    assert len(calls) < 10
    relay.close()


def test_closed_store_stops_its_thread(client: Any, table: str) -> None:
    before = set(threading.enumerate())
    store = open_store(table, client, follow_every_s=0.01)
    (follower,) = set(threading.enumerate()) - before
    store.close()
    assert not follower.is_alive()


# ---------------------------------------------------------------------------------------
# The server: nothing of the store on its loop; the program; three of them.
# ---------------------------------------------------------------------------------------


def ask_all(port: int, owner: Owner) -> list[int]:
    """Ask for everything that a server has and return the statuses."""
    statuses = [
        post(port, request)[0]
        for request in (
            check(owner),
            send(owner),
            [check(owner), check(Owner(3))],
            check(owner, wait=0),
            "nonsense",
        )
    ]
    _, reply = post(port, check(owner))
    statuses.append(post(port, receive(owner, owner.open(reply["question"])))[0])
    for method, path in (
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("OPTIONS", "/"),
        ("GET", "/x"),
    ):
        octets = exchange(port, http_request(b"", method=method, path=path))
        statuses.append(parse_response(octets)[0])
    return statuses


def park(port: int, request: object) -> socket.socket:
    """Send a request with `wait` and return its connection."""
    client = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    client.sendall(http_request(json.dumps(request).encode()))
    return client


def reply_on(client: socket.socket) -> tuple[int, Any]:
    """Return the status and the reply that come on a connection."""
    with client, client.makefile("rb") as stream:
        status, _, body = parse_response(stream.read())
    return status, json.loads(body)


def test_server_never_asks_the_table_on_its_loop(
    client: Any, table: str, alice: Owner, bob: Owner
) -> None:
    callers: set[str] = set()
    hooked = Hooked(client, lambda *_: callers.add(threading.current_thread().name))
    store = open_store(table, hooked, follow_every_s=0.01)
    relay = Relay(
        store, rate_limit=store.rate_limit, source_key=store.source_key, fetch=store.fetch
    )
    with contextlib.closing(relay), serving(relay, remote=True) as server:
        callers.clear()
        assert ask_all(server.server_port, alice) == [
            200,
            200,
            200,
            200,
            400,
            200,
            200,
            200,
            200,
            204,
            404,
        ]
        waiting = park(server.server_port, check(bob, wait=60))
        other = open_store(table, client)
        other.put(Message(bob.box, "QUJD", bytes(16), HOUR_US), Limits(), relay.now_us())
        status, reply = reply_on(waiting)
    assert (status, reply["found"]) == (200, True)
    assert callers
    assert not [caller for caller in callers if "serve_forever" in caller]


class Proxy:
    """Pass octets to an engine and back, until it is told to be silent."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.flows, self.accepted, self._engine = threading.Event(), 0, port
        self.flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.accepted += 1
                engine = socket.create_connection(("127.0.0.1", self._engine))
                for pair in ((client, engine), (engine, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source, target:
            while octets := source.recv(65_536):
                self.flows.wait()
                target.sendall(octets)


@pytest.mark.slow
def test_server_says_busy_while_the_engine_is_silent_and_goes_on_after_it(
        dynalite_url: str, table: str, alice: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in engines.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    proxy = Proxy(int(dynalite_url.rpartition(":")[2]))
    store = DynamoDbStore(
        table, make_client(endpoint_url=f"http://127.0.0.1:{proxy.port}"), follow_every_s=0.1
    )
    relay = Relay(store, Limits(rate=0))
    with (
        contextlib.closing(proxy.listener),
        contextlib.closing(relay),
        serving(relay, remote=True) as server,
    ):
        assert post(server.server_port, send(alice, "ONE0")) == (200, OK)
        proxy.flows.clear()
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            replies = list(pool.map(functools.partial(post, server.server_port), [
                send(alice, f"BAD{number:05d}") for number in range(40)]))
        assert {(status, reply["error"], reply["retry"]) for status, reply in replies} == {
            (*BUSY, 5)
        }
        assert exchange(
            server.server_port, http_request(b"", method="GET", path="/health")
        ).startswith(b"HTTP/1.1 503")
        proxy.flows.set()
        wait_until(lambda: post(server.server_port, send(alice, "TWO0"))[0] == 200)
        kept = [text for _, text in store.messages(alice.box, 0, 100, relay.now_us())]
    # What was refused may land when the engine wakes, but never between or twice.
    assert (kept[0], kept.count("TWO0")) == ("ONE0", 1)
    assert len(set(kept)) == len(kept)


class ServerProcess:
    """A server started from the command line."""

    def __init__(self, *flags: str, **environment: str) -> None:
        known = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.popen = subprocess.Popen(
            [sys.executable, str(SERVER), "--port", "0", "--host", "127.0.0.1", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=known | environment,
        )
        assert self.popen.stderr is not None
        self.log = ""
        self.port = 0
        while line := self.popen.stderr.readline():
            self.log += line
            if ready := re.fullmatch(
                r"connectoid relay \S+ listening on http://127\.0\.0\.1:(\d+)\n", line
            ):
                self.port = int(ready[1])
                return

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        _, log = self.popen.communicate(timeout=DEADLINE_S)
        self.log += log
        return self.popen.returncode


Start = Callable[..., ServerProcess]


@pytest.fixture
def start(dynalite_url: str) -> Iterator[Start]:
    """Return a function that starts a server on dynalite; all end with the test."""
    started: list[ServerProcess] = []

    def start_process(*flags: str, **environment: str) -> ServerProcess:
        started.append(ServerProcess("--endpoint-url", dynalite_url, *flags,
                                     **(engines.ENVIRONMENT | environment)))
        return started[-1]

    yield start_process
    for process in started:
        process.stop(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment", "told"),
    [
        (
            [],
            {},
            "the table connectoid does not exist; make it with --create-table or name another"
            " with --table",
        ),
        (
            [],
            {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""},
            "the table connectoid needs credentials; set AWS_",
        ),
        (
            [],
            {"AWS_DEFAULT_REGION": ""},
            "no region is known; name one with --region or AWS_DEFAULT_REGION",
        ),
        (
            ["--endpoint-url", "http://127.0.0.1:1"],
            {},
            "does not answer; look at the network and at --endpoint-url",
        ),
        (
            ["--endpoint-url", "nonsense"],
            {},
            "--endpoint-url is not a web address; write http://HOST:PORT",
        ),
        (
            ["--udp"],
            {},
            "--udp and --stun are for a relay whose store is a file of its own; leave them out",
        ),
        (
            ["--stun"],
            {},
            "--udp and --stun are for a relay whose store is a file of its own; leave them out",
        ),
        (["--db", "x.db"], {}, "--db and --sync are for a relay on a file; leave them out"),
        (
            ["--region", ""],
            {"AWS_DEFAULT_REGION": ""},
            "no region is known; name one with --region",
        ),
        (
            ["--max-box-messages", "4097"],
            {},
            "--max-box-messages must be at most 4096 with DynamoDB",
        ),
    ],
    ids=str,
)
def test_server_that_cannot_start_says_why_in_one_line(
        start: Start, flags: list[str], environment: dict[str, str], told: str) -> None:
    process = start(*flags, **environment)
    assert process.stop() == 1
    assert process.log.startswith("connectoid-relay: ")
    assert told in process.log
    assert process.log.count("\n") == 1


def test_flags_of_the_server_are_those_of_the_page_and_of_the_relay() -> None:
    flags, known = ({flag for action in parser._actions for flag in action.option_strings}
                    for parser in (build_parser(), connectoid_relay.build_parser()))
    page = (SERVER.parent / "README.md").read_text(encoding="utf-8")
    assert known < flags
    assert set(re.findall(r"^\| `(--[a-z-]+)", page, re.MULTILINE)) == flags - known


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("ab", False),
        ("abc", True),
        ("a" * 255, True),
        ("a" * 256, False),
        ("Connectoid_1.x-y", True),
        ("a/b", False),
    ],
)
def test_name_of_a_table_is_what_dynamodb_allows(
    name: str, fits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if fits:
        assert build_parser().parse_args(["--table", name]).table == name
        return
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--table", name])
    assert "is no name of a table: 3 to 255 of" in capsys.readouterr().err


@pytest.mark.slow
def test_server_makes_its_table_serves_and_stops(start: Start, alice: Owner) -> None:
    process = start("--table", engines.new_name(), "--create-table")
    assert ask_all(process.port, alice) == [200, 200, 200, 200, 400, 200, 200, 200, 200, 204, 404]
    _, _, metrics = parse_response(
        exchange(process.port, http_request(b"", method="GET", path="/metrics"))
    )
    assert b"\nconnectoid_messages 1\n" in metrics
    assert b"\nconnectoid_boxes 1\n" in metrics
    assert process.stop() == 0
    assert process.log.startswith(
        "connectoid-relay: this engine deletes nothing by itself (no TTL)"
    )


@pytest.mark.slow
def test_long_poll_at_one_server_ends_when_another_gets_the_message(
    start: Start, table: str, alice: Owner
) -> None:
    here, there = (start("--table", table) for _ in range(2))
    waiting = park(here.port, check(alice, wait=60))
    # This is asked later, when the first has been read.
    assert post(here.port, check(Owner(9))) == (200, NOTHING)
    assert post(there.port, send(alice)) == (200, OK)
    status, reply = reply_on(waiting)
    # With 59 s to spare.
    assert (status, reply["found"]) == (200, True)
    assert post(there.port, receive(alice, alice.open(reply["question"])))[1]["data"] == "QUJD"


@pytest.mark.slow
def test_server_warns_of_a_table_whose_time_is_ahead(start: Start, client: Any, table: str) -> None:
    set_relay(client, table, "time_us", str(time.time_ns() // 1_000 + DAY_US))
    process = start("--table", table)
    assert process.stop() == 0
    assert process.log.startswith(
        "connectoid-relay: the table's time is more than 5 minutes ahead of our clock"
    )


# 300 texts for the crowded box, 150 for the quiet one.
SENDERS, TEXTS, ROOM = 6, 25, 160


class Load:
    """Send texts to boxes through servers that may be killed; count what was acknowledged."""

    def __init__(self, ports: list[int], owners: list[Owner]) -> None:
        self.ports, self.owners = ports, owners
        self.acknowledged: dict[str, list[str]] = {owner.pub: [] for owner in owners}
        self.refused: collections.Counter[tuple[int, str]] = collections.Counter()
        self.sent = 0

    def send_all(self, sender: int) -> None:
        """Send each text once, to the next server each time, from a source of its own."""
        for number in range(TEXTS):
            for turn, owner in enumerate(self.owners):
                text = f"s{sender}n{number:04d}t{turn}A"
                # Nobody holds two messages, so nothing gives way.
                forwarded = f"X-Forwarded-For: 198.51.{sender}.{number + 100 * turn}"
                request = http_request(json.dumps(send(owner, text)).encode(), forwarded)
                try:
                    status, _, body = parse_response(self.ask(sender + number + turn, request))
                # The relay was killed before or after it kept the message.
                except (IndexError, ValueError):
                    self.refused[0, "killed"] += 1
                else:
                    if status == 200:
                        self.acknowledged[owner.pub].append(text)
                    else:
                        self.refused[status, json.loads(body)["error"]] += 1
                self.sent += 1

    def ask(self, first: int, request: bytes) -> bytes:
        """Return the reply of the first server that takes the request.

        It is nothing if that one is killed.
        """
        for number in itertools.count(first):
            try:
                return exchange(self.ports[number % len(self.ports)], request, timeout_s=DEADLINE_S)
            # It is gone, and this was not sent.
            except ConnectionRefusedError:
                continue
            except OSError:
                break
        return b""


class Reader:
    """What the owners of some mailboxes have read."""

    def __init__(self, store: DynamoDbStore, owners: Sequence[Owner]) -> None:
        self._store = store
        self._owners = owners
        self.read: dict[str, list[tuple[int, str]]] = {owner.pub: [] for owner in owners}

    def read_on(self) -> int:
        """Read what is new, and return how much that is."""
        found = 0
        for owner in self._owners:
            kept = self.read[owner.pub]
            after = 0
            if kept:
                after = kept[-1][0]
            new = self._store.messages(owner.box, after, 100, time.time_ns() // 1_000)
            kept += new
            found += len(new)
        return found


@pytest.mark.slow
def test_three_servers_of_which_each_is_killed_lose_and_double_nothing_and_keep_order_and_limits(
        start: Start, client: Any, table: str, alice: Owner, bob: Owner) -> None:
    flags = (
        "--table", table, "--rate", "0", "--trusted-proxy", "127.0.0.1/32",
        "--max-box-messages", str(ROOM),
    )
    servers = [start(*flags) for _ in range(3)]
    crowded, quiet = alice, bob
    load = Load([server.port for server in servers], [crowded, crowded, quiet])
    store = DynamoDbStore(table, client)
    reader = Reader(store, [crowded, quiet])
    read = reader.read
    with concurrent.futures.ThreadPoolExecutor(SENDERS) as pool:
        senders = [pool.submit(load.send_all, sender) for sender in range(SENDERS)]
        for victim in range(3):
            while load.sent < (victim + 1) * SENDERS * TEXTS * 3 // 4:
                reader.read_on()
                assert not all(sender.done() for sender in senders)
            servers[victim].stop(signal.SIGKILL)
            servers.append(start(*flags))
            load.ports[victim] = servers[-1].port
        while not all(sender.done() for sender in senders):
            reader.read_on()
        for sender in senders:
            sender.result()
    while reader.read_on():
        pass
    for owner in (crowded, quiet):
        ats, texts = zip(*read[owner.pub], strict=True)
        assert list(ats) == sorted(set(ats))
        assert len(texts) == len(set(texts)) <= ROOM
        assert set(load.acknowledged[owner.pub]) <= set(texts)
    assert load.refused.keys() <= {(0, "killed"), FULL, BUSY}
    assert load.refused[FULL] > 0
    assert len(read[crowded.pub]) == ROOM
    assert len(load.acknowledged[quiet.pub]) > 100
    assert all(server.stop() == 0 for server in servers[3:])
    # What the killed ones had taken in the totals is free again once all has expired.
    assert store.stored().messages >= sum(map(len, read.values()))
    sweep_all(store, time.time_ns() // 1_000 + 2 * HOUR_US)
    assert store.stored() == EMPTY
