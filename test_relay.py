"""Test the relay: the store, the core, the fronts, faults, the command line and the documents."""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import http.client
import itertools
import json
import logging
import os
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import connectoid_relay
from conftest import (
    NOTHING,
    OK,
    ROOT,
    SOURCE,
    START_US,
    SUITE,
    FakeClock,
    Owner,
    Process,
    answer_of,
    check,
    decode,
    exchange,
    http_request,
    parse_response,
    post,
    receive,
    running,
    send,
    serving,
)
from connectoid_relay import (
    CONTEXTS,
    DAY_US,
    ERRORS,
    FORMS,
    HOUR_US,
    MAX_BATCH_ITEMS,
    MAX_DATA_CHARS,
    MAX_DATAGRAM_BYTES,
    MAX_EXT_CHARS,
    MAX_RECEIVE_CHARS,
    MAX_RECEIVE_MESSAGES,
    MAX_SEEN_WRITES,
    MAX_SOURCES,
    MAX_WAIT_S,
    METRICS,
    MIN_COUNTED_BYTES,
    POOL_THREADS,
    RELEASE_US,
    SECOND_US,
    SOURCE_SHARE,
    YEAR_2200_US,
    Clock,
    Limits,
    Look,
    Message,
    NoRoom,
    Quota,
    RateLimit,
    Refusal,
    Relay,
    RelayServer,
    Reply,
    SqliteStore,
    Store,
    StoreError,
    StoreFull,
    Wait,
    __version__,
    answer_datagram,
    build_parser,
    encode_base64url,
    flag_of,
    meanings,
    read_access,
    source_of,
)

# ---------------------------------------------------------------------------------------
# The store's contract: every store keeps it, tested through the methods of Store alone.
# ---------------------------------------------------------------------------------------

STORES: Mapping[str, Callable[[Path], Store]] = {
    "memory": lambda _folder: SqliteStore(":memory:"),
    "file": lambda folder: SqliteStore(str(folder / "relay.db")),
}
NOW_US = START_US
MAX_AT = 2**63 - 1


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that goes with the test: each store has 8 MiB, and pytest would keep them all."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture(scope="session")
def open_table() -> Iterator[Callable[[str], Store]]:
    """Return a function that opens an empty table on a DynamoDB-compatible engine, as exact as SQLite."""
    engines = pytest.importorskip("engines", reason="boto3 is missing: pip install -e '.[test]'")
    dynamodb_store = pytest.importorskip("dynamodb_store")
    with contextlib.ExitStack() as stack:
        @functools.cache
        def start_engine(name: str) -> Any:
            return engines.client_of(stack.enter_context(engines.ENGINES[name]()))

        def open_new(name: str) -> Store:
            try:
                client, table = start_engine(name), engines.new_name()
            except engines.Missing as missing:
                pytest.skip(str(missing))
            dynamodb_store.create_table(client, table)
            return cast(Store, dynamodb_store.DynamoDbStore(table, client, bucket_width_us=lambda _ttl_us: 1))

        yield open_new


@pytest.fixture(params=[*STORES, *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("dynalite", "moto"))])
def store(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    """Return an empty store of each kind."""
    name = request.param
    store = STORES[name](folder) if name in STORES else request.getfixturevalue("open_table")(name)
    yield store
    store.close()


def box_of(number: int) -> bytes:
    """Return a mailbox as the store sees it: 49 bytes."""
    return bytes([2]) + number.to_bytes(48, "big")


def put(store: Store, limits: Limits | None = None, now_us: int = NOW_US, **members: int) -> int:
    """Put a message (box, source, size, ttl_us) and return its `at`."""
    given = {"box": 0, "source": 0, "size": 4, "ttl_us": HOUR_US} | members
    message = Message(box_of(given["box"]), "A" * given["size"], given["source"].to_bytes(16, "big"), given["ttl_us"])
    return store.put(message, limits or Limits(), now_us)


def sweep_all(store: Store, now_us: int) -> int:
    """Sweep until there is no more and return the number of steps."""
    for step in range(1, 1_000):
        if not store.sweep(now_us):
            return step
    raise AssertionError("a sweep that never ends")


def keep_box(store: Store, box: int, expires_us: int, room_for: int = 0, now_us: int = NOW_US) -> int | None:
    """Keep one box row and return until when it lives."""
    store.keep_boxes({box_of(box): expires_us}, now_us, room_for)
    return store.look(box_of(box), 0, now_us).box_expires_us


def test_at_increases_strictly_while_the_clock_stands_still(store: Store) -> None:
    assert [put(store, box=number % 2) for number in range(4)] == [NOW_US + number for number in range(4)]


def test_at_increases_when_the_clock_goes_back(store: Store) -> None:
    assert [put(store, now_us=now_us) for now_us in (NOW_US, NOW_US - HOUR_US, 0, NOW_US + 2, NOW_US + 9)] == [
        NOW_US, NOW_US + 1, NOW_US + 2, NOW_US + 3, NOW_US + 9]


def test_at_and_time_survive_reopening(folder: Path) -> None:
    first = STORES["file"](folder)
    put(first)
    put(first)
    first.close()
    second = STORES["file"](folder)
    assert second.time_us() == NOW_US
    assert put(second, now_us=NOW_US - DAY_US) == NOW_US + 2
    assert [at for at, _ in second.messages(box_of(0), 0, 100, NOW_US)] == [NOW_US, NOW_US + 1, NOW_US + 2]
    second.close()


def test_time_is_raised_by_every_write_and_never_lowered(store: Store) -> None:
    assert store.time_us() == 0
    writes: list[Callable[[int], object]] = [
        lambda now_us: put(store, now_us=now_us),
        lambda now_us: store.put_question(box_of(0), ("question", b"answer"), SECOND_US, now_us),
        lambda now_us: store.keep_boxes({box_of(0): now_us}, now_us, 1),
        store.probe,
        lambda now_us: store.sweep(now_us + 2 * HOUR_US),
    ]
    for hour, write in enumerate(writes):
        now_us = NOW_US + hour * HOUR_US
        write(now_us)
        assert store.time_us() >= now_us
    time_us = store.time_us()
    for write in writes[:4]:
        write(NOW_US - HOUR_US)
    assert store.time_us() == time_us


@pytest.mark.parametrize(("after_us", "now_us", "found"), [
    (0, NOW_US, True), (NOW_US - 1, NOW_US, True), (NOW_US, NOW_US, False), (MAX_AT, NOW_US, False),
    (0, 0, True), (0, NOW_US + HOUR_US - 1, True), (0, NOW_US + HOUR_US, False), (0, NOW_US + DAY_US, False),
])
def test_look_and_messages_agree_at_their_edges(store: Store, after_us: int, now_us: int, found: bool) -> None:
    put(store)
    assert store.look(box_of(0), after_us, now_us) == Look(found, None)
    assert store.messages(box_of(0), after_us, 1, now_us) == ([(NOW_US, "AAAA")] if found else [])
    assert store.look(box_of(1), 0, now_us) == Look(False, None)
    assert store.messages(box_of(1), 0, 100, now_us) == []


def test_messages_come_oldest_first_up_to_the_limit(store: Store) -> None:
    for number in range(5):
        put(store, source=number, size=4 + number)
        put(store, box=1, source=number)
    kept = [(NOW_US + 2 * number, "A" * (4 + number)) for number in range(5)]
    for limit in (1, 4, 5, 6, 100):
        assert store.messages(box_of(0), 0, limit, NOW_US) == kept[:limit]
        assert store.messages(box_of(0), kept[1][0], limit, NOW_US) == kept[2:2 + limit]


@pytest.mark.parametrize(("sizes", "fit"), [
    ([32_768] * 17, 16), ([32_768] * 15 + [32_767, 1, 2], 17), ([2] + [32_768] * 17, 16), ([32_768], 1),
])
def test_messages_come_up_to_512_kib(store: Store, sizes: list[int], fit: int) -> None:
    for number, size in enumerate(sizes):
        put(store, source=number, size=size)
    assert [len(sealed) for _, sealed in store.messages(box_of(0), 0, 100, NOW_US)] == sizes[:fit]


def test_arrivals_name_the_boxes_after_a_message(store: Store) -> None:
    assert store.arrivals(0) == (0, set())
    assert store.arrivals(NOW_US) == (NOW_US, set())
    for number in (0, 1, 0):
        put(store, box=number)
    assert store.arrivals(0) == (NOW_US + 2, {box_of(0), box_of(1)})
    assert store.arrivals(NOW_US) == (NOW_US + 2, {box_of(0), box_of(1)})
    assert store.arrivals(NOW_US + 1) == (NOW_US + 2, {box_of(0)})
    assert store.arrivals(NOW_US + 2) == (NOW_US + 2, set())


class Put(NamedTuple):
    """A message to put: from whom, how long, how many in a row."""

    source: int = 0
    size: int = 4
    times: int = 1
    box: int = 0


EIGHT = [Put(source, 100) for source in range(8)]  # each fills an eighth of 800 bytes
SMALL_BOX = Limits(max_box_messages=16, max_box_bytes=800)
SMALL_RELAY = Limits(max_bytes=9 * MIN_COUNTED_BYTES, max_box_messages=10_000)
ROUND_RELAY = Limits(max_bytes=3_000)


@pytest.mark.parametrize(("limits", "before", "message", "whose"), [
    (SMALL_BOX, [Put()], Put(), None),
    (SMALL_BOX, [Put(times=2)], Put(), "source"),
    (SMALL_BOX, [Put(times=2)], Put(source=1), None),
    (SMALL_BOX, [Put(times=2)], Put(box=1), None),
    (Limits(max_box_messages=23), [Put(times=2)], Put(), "source"),
    (Limits(max_box_messages=24), [Put(times=2)], Put(), None),
    (Limits(max_box_messages=4), [], Put(), None),  # at least one, however small the box
    (Limits(max_box_messages=4), [Put()], Put(), "source"),
    (SMALL_BOX, [Put(size=60)], Put(size=39), None),
    (SMALL_BOX, [Put(size=60)], Put(size=40), None),
    (SMALL_BOX, [Put(size=60)], Put(size=41), "source"),
    (SMALL_BOX, [Put(source, times=2) for source in range(7)], Put(8), None),
    (SMALL_BOX, [Put(source, times=2) for source in range(8)], Put(8), "box"),
    (SMALL_BOX, [Put(source, times=2) for source in range(8)], Put(0), "source"),
    (SMALL_BOX, [Put(source, times=2) for source in range(8)], Put(8, box=1), None),
    (SMALL_BOX, EIGHT[:7], Put(8, 99), None),
    (SMALL_BOX, EIGHT[:7], Put(8, 100), None),
    (SMALL_BOX, EIGHT[:7], Put(8, 101), "box"),
    (SMALL_BOX, EIGHT, Put(8, 2), "box"),
    (SMALL_RELAY, [Put(times=4)], Put(size=MIN_COUNTED_BYTES), None),
    (SMALL_RELAY, [Put(times=5)], Put(size=2), None),
    (SMALL_RELAY, [Put(times=5)], Put(size=MIN_COUNTED_BYTES), None),
    (SMALL_RELAY, [Put(times=5)], Put(size=MIN_COUNTED_BYTES + 1), "relay"),
    (SMALL_RELAY, [Put(times=6)], Put(size=2), "relay"),
    (SMALL_RELAY, [Put(times=6)], Put(size=2, box=9), None),
    (SMALL_RELAY, [Put(times=6), Put(times=2, box=9)], Put(size=MIN_COUNTED_BYTES, box=9), None),
    (SMALL_RELAY, [Put(times=6), Put(times=2, box=9)], Put(size=MIN_COUNTED_BYTES + 1, box=9), "relay"),
    (SMALL_RELAY, [Put(times=6), Put(times=3, box=9)], Put(size=2, box=9), "relay"),
    (ROUND_RELAY, [Put(size=1_000)], Put(1, 999), None),
    (ROUND_RELAY, [Put(size=1_000)], Put(1, 1_000), None),
    (ROUND_RELAY, [Put(size=1_000)], Put(1, 1_001), "relay"),
    (ROUND_RELAY, [Put(box=8, size=1_000), Put(1, 1_000)], Put(box=9, size=1_000), None),
    (ROUND_RELAY, [Put(box=8, size=1_000), Put(1, 1_000)], Put(box=9, size=1_001), "relay"),
])
def test_put_refuses_the_message_over_a_limit_and_keeps_the_rest(
        store: Store, limits: Limits, before: list[Put], message: Put, whose: str | None) -> None:
    keep_box(store, 9, NOW_US + DAY_US, room_for=1)  # box 9 has a proven owner
    kept = [put(store, limits, source=source, size=size, box=box)
            for source, size, times, box in before for _ in range(times)]
    source, size, _, box = message
    if whose is None:
        assert put(store, limits, source=source, size=size, box=box) == NOW_US + len(kept)
        return
    with pytest.raises(NoRoom) as refused:
        put(store, limits, source=source, size=size, box=box)
    # Room comes with the first message to expire: of the source, or of the box.
    until_us = {"source": NOW_US + HOUR_US, "box": NOW_US + HOUR_US, "relay": 0}[whose]
    assert (refused.value.whose, refused.value.until_us) == (whose, until_us)
    assert store.arrivals(0)[0] == max(kept, default=0)  # nothing was kept
    assert put(store, now_us=NOW_US + SECOND_US) == NOW_US + SECOND_US


def test_put_has_room_in_a_box_at_the_microsecond_of_expiry_without_a_sweep(store: Store) -> None:
    limits = Limits(max_box_messages=8)
    for source in range(8):
        put(store, limits, source=source, ttl_us=SECOND_US + source)  # expires at NOW + 1 s + 2 * source
    for source, whose in ((0, "source"), (8, "box")):
        with pytest.raises(NoRoom) as refused:
            put(store, limits, source=source, now_us=NOW_US + SECOND_US - 1)
        assert (refused.value.whose, refused.value.until_us) == (whose, NOW_US + SECOND_US)
    assert put(store, limits, source=0, now_us=NOW_US + SECOND_US) == NOW_US + SECOND_US


def test_put_and_put_question_go_by_the_stores_time_when_the_callers_is_behind(store: Store) -> None:
    put(store, Limits(max_box_messages=1))
    assert store.put_question(box_of(0), ("one", b"1"), HOUR_US, NOW_US) == "one"
    store.probe(NOW_US + HOUR_US)
    assert put(store, Limits(max_box_messages=1), NOW_US, ttl_us=1) == NOW_US + HOUR_US
    assert store.look(box_of(0), NOW_US, NOW_US + HOUR_US).found
    assert not store.look(box_of(0), NOW_US, NOW_US + HOUR_US + 1).found
    assert store.put_question(box_of(0), ("two", b"2"), 2, NOW_US) == "two"
    assert store.answers(box_of(0), NOW_US + HOUR_US + 1) == [b"2"]
    assert store.answers(box_of(0), NOW_US + HOUR_US + 2) == []


def test_place_in_the_last_third_ends_with_the_box_row(store: Store) -> None:
    keep_box(store, 9, NOW_US + SECOND_US, room_for=1)
    for _ in range(6):
        put(store, SMALL_RELAY)
    put(store, SMALL_RELAY, box=9, now_us=NOW_US + SECOND_US - 1)
    with pytest.raises(NoRoom):
        put(store, SMALL_RELAY, box=9, now_us=NOW_US + SECOND_US)


def test_question_is_handed_out_only_if_made_after_the_time_asked_for(store: Store) -> None:
    assert store.question(box_of(0), 0, NOW_US) is None
    assert store.put_question(box_of(0), ("one", b"1"), 60, NOW_US) == "one"
    assert store.question(box_of(0), NOW_US - 1, NOW_US) == "one"
    assert store.question(box_of(0), NOW_US, NOW_US) is None
    assert store.question(box_of(1), 0, NOW_US) is None
    assert store.question(box_of(0), 0, NOW_US + 59) == "one"
    assert store.question(box_of(0), 0, NOW_US + 60) is None


def test_put_question_keeps_a_young_one(store: Store) -> None:
    for later_us, offered, kept in ((0, "a", "a"), (0, "b", "a"), (29, "c", "a"), (30, "d", "d"), (31, "e", "d"),
                                    (59, "f", "d"), (60, "g", "g"), (61, "h", "g")):
        question = (offered, offered.encode())
        assert store.put_question(box_of(0), question, 60, NOW_US + later_us) == kept
        assert store.question(box_of(0), 0, NOW_US + later_us) == kept
    assert store.put_question(box_of(1), ("z", b"z"), 60, NOW_US + 61) == "z"


def test_answers_are_good_until_the_microsecond_of_expiry_and_at_most_two(store: Store) -> None:
    for later_us in range(0, 200, 10):
        store.put_question(box_of(0), (str(later_us), str(later_us).encode()), 60, NOW_US + later_us)
        assert 1 <= len(store.answers(box_of(0), NOW_US + later_us)) <= 2
    assert set(store.answers(box_of(0), NOW_US + 190)) == {b"150", b"180"}
    assert set(store.answers(box_of(0), NOW_US + 209)) == {b"150", b"180"}
    assert store.answers(box_of(0), NOW_US + 210) == [b"180"]
    assert store.answers(box_of(0), NOW_US + 239) == [b"180"]
    assert store.answers(box_of(0), NOW_US + 240) == []
    assert store.answers(box_of(1), NOW_US) == []


def test_keep_boxes_makes_rows_while_there_is_room_and_only_raises_them(store: Store) -> None:
    later_us = NOW_US + HOUR_US
    assert keep_box(store, 0, later_us) is None  # room_for=0 makes none
    assert [keep_box(store, number, later_us, room_for=2) for number in range(3)] == [later_us, later_us, None]
    assert keep_box(store, 0, later_us - 1, room_for=2) == later_us
    assert keep_box(store, 0, later_us + 1) == later_us + 1
    assert keep_box(store, 1, later_us + 1, room_for=2) == later_us + 1
    assert keep_box(store, 2, later_us, room_for=3) == later_us
    store.keep_boxes({}, NOW_US)
    everything = {box_of(number): later_us + 2 for number in range(5)}
    store.keep_boxes(everything, NOW_US, 4)
    kept = [store.look(box, 0, NOW_US).box_expires_us for box in everything]
    assert kept == [later_us + 2] * 4 + [None]


def test_store_behind_a_link_has_its_lock_beside_the_file_itself(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "link.db").symlink_to(folder / "disk" / "relay.db")
    store = SqliteStore(str(folder / "link.db"))
    put(store)
    assert {path.name for path in folder.iterdir()} == {"disk", "link.db"}
    assert {path.name for path in (folder / "disk").iterdir()} >= {"relay.db", "relay.db-lock", "relay.db-wal"}
    store.close()


@pytest.mark.parametrize("column", ["time_us", "last_at"])
def test_store_with_a_time_that_no_relay_has_is_refused(folder: Path, column: str) -> None:
    """One that is past the year 2200, up to where it would not fit a number of SQLite."""
    for time_us, refused in ((YEAR_2200_US - 1, False), (YEAR_2200_US, True), (2**63 - 1, True)):
        STORES["file"](folder).close()
        with contextlib.closing(sqlite3.connect(folder / "relay.db")) as db, db:
            db.execute(f"UPDATE relay SET {column} = ?", (time_us,))
        if refused:
            with pytest.raises(StoreError, match="no relay time"):
                STORES["file"](folder)
            with contextlib.closing(sqlite3.connect(folder / "relay.db")) as db, db:
                db.execute(f"UPDATE relay SET {column} = 0")
        else:
            STORES["file"](folder).close()


@pytest.mark.parametrize("write", ["put", "sweep", "close"])
def test_what_is_written_soon_is_written_with_the_next_write(folder: Path, write: str) -> None:
    store = STORES["file"](folder)
    store.keep_boxes({box_of(0): NOW_US + HOUR_US}, NOW_US, 1, soon=True)
    assert store.look(box_of(0), 0, NOW_US) == Look(False, None)
    {"put": lambda: put(store), "sweep": lambda: store.sweep(NOW_US), "close": store.close}[write]()
    other = STORES["file"](folder)
    assert other.look(box_of(0), 0, NOW_US).box_expires_us == NOW_US + HOUR_US
    other.close()
    store.close()


def test_snapshot_shows_one_state_to_this_thread_alone(folder: Path) -> None:
    store = STORES["file"](folder)
    with store.snapshot():
        assert store.look(box_of(0), 0, NOW_US) == Look(False, None)
        put(store)
        assert store.look(box_of(0), 0, NOW_US) == Look(False, None)
        with concurrent.futures.ThreadPoolExecutor(1) as another:
            assert another.submit(store.look, box_of(0), 0, NOW_US).result() == Look(True, None)
    assert store.look(box_of(0), 0, NOW_US) == Look(True, None)
    with store.snapshot():
        store.close()
    with store.snapshot(), pytest.raises(StoreError):
        store.look(box_of(0), 0, NOW_US)


def test_box_row_ends_at_its_microsecond_and_leaves_its_place_after_a_sweep(store: Store) -> None:
    later_us = NOW_US + SECOND_US
    assert keep_box(store, 0, later_us, room_for=1) == later_us
    assert store.look(box_of(0), 0, later_us - 1) == Look(False, later_us)
    assert store.look(box_of(0), 0, later_us) == Look(False, None)
    sweep_all(store, later_us)
    assert keep_box(store, 1, later_us + 1, room_for=1, now_us=later_us) == later_us + 1
    assert keep_box(store, 2, later_us + 1, room_for=1, now_us=later_us) is None


def test_sweep_takes_bounded_steps_and_leaves_the_counters_right(store: Store) -> None:
    limits = Limits(max_bytes=3 * 150 * MIN_COUNTED_BYTES)
    for number in range(300):
        put(store, limits, box=number, ttl_us=SECOND_US, size=2 if number % 2 else MIN_COUNTED_BYTES)
        store.put_question(box_of(number), ("question", b"answer"), SECOND_US, NOW_US)
    store.keep_boxes({box_of(number): NOW_US + SECOND_US for number in range(300)}, NOW_US, 300)
    later_us = NOW_US + 2 * SECOND_US
    with pytest.raises(NoRoom):  # what has expired takes its bytes until it is swept
        put(store, limits, box=999, now_us=later_us)
    assert sweep_all(store, NOW_US) == 1  # nothing has expired yet
    assert sweep_all(store, later_us) > 1
    assert store.arrivals(0) == (0, set())
    assert store.sweep(later_us) is False
    # As many as before fit again, no more.
    for number in range(300):
        put(store, limits, box=number, now_us=later_us)
    with pytest.raises(NoRoom, match="relay"):
        put(store, limits, box=999, now_us=later_us)
    assert [keep_box(store, number, later_us + 1, 1, later_us) for number in (7, 8)] == [later_us + 1, None]


def test_sweep_spares_what_has_a_microsecond_left(store: Store) -> None:
    put(store, box=1, ttl_us=SECOND_US)
    put(store, ttl_us=SECOND_US)
    store.put_question(box_of(0), ("question", b"answer"), SECOND_US + 1, NOW_US)
    keep_box(store, 0, NOW_US + SECOND_US + 1, room_for=1)
    now_us = NOW_US + SECOND_US
    sweep_all(store, now_us)
    assert store.messages(box_of(0), 0, 100, now_us) == [(NOW_US + 1, "AAAA")]
    assert store.answers(box_of(0), now_us) == [b"answer"]
    assert store.look(box_of(0), 0, now_us) == Look(True, now_us + 1)
    assert store.arrivals(0) == (NOW_US + 1, {box_of(0)})  # and the other is gone


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run the work in threads, all at once, and raise the first error of any."""
    errors: list[BaseException] = []
    together = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            together.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for error in errors:
        raise error


def test_put_from_many_threads_keeps_all_and_gives_each_its_own_at(store: Store) -> None:
    given_at: dict[int, list[int]] = {number: [] for number in range(8)}

    def put_fifty(number: int) -> None:
        for message in range(50):
            given_at[number].append(put(store, box=number % 3, source=50 * number + message))
            store.look(box_of(number % 3), 0, NOW_US)

    in_threads(8, put_fifty)
    assert all(ats == sorted(ats) for ats in given_at.values())
    kept = []
    for number in range(3):
        at_us = 0
        while page := store.messages(box_of(number), at_us, 100, NOW_US):
            kept += [at for at, _ in page]
            at_us = page[-1][0]
    assert sorted(kept) == sorted(at for ats in given_at.values() for at in ats)
    assert len(set(kept)) == 400


def test_put_from_many_threads_stops_exactly_at_the_limit(store: Store) -> None:
    refused: list[str] = []

    def put_ten(number: int) -> None:
        for message in range(10):
            try:
                put(store, Limits(max_box_messages=40), source=10 * number + message)
            except NoRoom as error:
                refused.append(error.whose)

    in_threads(8, put_ten)
    assert refused == ["box"] * 40
    assert len(store.messages(box_of(0), 0, 100, NOW_US)) == 40


def test_put_question_from_many_threads_hands_out_one(store: Store) -> None:
    handed_out: list[str] = []

    def offer(number: int) -> None:
        question = (f"question {number}", f"answer {number}".encode())
        handed_out.append(store.put_question(box_of(0), question, SECOND_US, NOW_US))

    in_threads(8, offer)
    assert len(handed_out) == 8
    assert len(set(handed_out)) == 1
    assert store.answers(box_of(0), NOW_US) == [handed_out[0].replace("question", "answer").encode()]


METHODS: Mapping[str, Callable[[Store], object]] = {
    "time_us": lambda store: store.time_us(),
    "put": put,
    "look": lambda store: store.look(box_of(0), 0, NOW_US),
    "messages": lambda store: store.messages(box_of(0), 0, 1, NOW_US),
    "arrivals": lambda store: store.arrivals(0),
    "question": lambda store: store.question(box_of(0), 0, NOW_US),
    "put_question": lambda store: store.put_question(box_of(0), ("question", b"answer"), SECOND_US, NOW_US),
    "answers": lambda store: store.answers(box_of(0), NOW_US),
    "keep_boxes": lambda store: store.keep_boxes({box_of(0): NOW_US}, NOW_US, 1),
    "sweep": lambda store: store.sweep(NOW_US),
    "probe": lambda store: store.probe(NOW_US),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("method", METHODS)
def test_closed_store_raises_store_error(store: Store, method: str, used: bool) -> None:
    if used:
        for call in METHODS.values():
            call(store)
    store.close()
    with pytest.raises(StoreError):
        METHODS[method](store)


# ---------------------------------------------------------------------------------------
# The core: requests in, replies out, through Relay.handle.
# ---------------------------------------------------------------------------------------

OK_REPLY = Reply(200, {"ok": True})
BAD = (400, "Bad request", 0)
HOME, OTHER = "192.0.2.1", "198.51.100.2"  # sources
Make = Callable[..., Relay]


@pytest.fixture
def make(clock: FakeClock) -> Iterator[Make]:
    """Return a function that makes a relay with limits; all are closed with the test."""
    made: list[Relay] = []

    def make_relay(store: Store | None = None, log_ips: bool = False, **limits: int) -> Relay:
        relay = Relay(store or SqliteStore(":memory:"), Limits(**limits), clock=clock.clock, log_ips=log_ips)
        made.append(relay)
        return relay

    yield make_relay
    for relay in made:
        relay.close()


def refused(reply: Reply) -> tuple[int, str, int]:
    """Return status, error and retry (0 = none) of a refusal, which has nothing else to say."""
    assert isinstance(reply.body, dict)
    assert reply.body["ok"] is False
    assert reply.body.keys() <= {"ok", "error", "detail", "retry"}
    assert isinstance(reply.body.get("detail", ""), str)
    retry = reply.body.get("retry", 0)
    assert type(retry) is int
    return reply.status, reply.body["error"], retry


def question_of(relay: Relay, owner: Owner, source: str = HOME) -> str:
    """Check a box that has messages and return the question."""
    status, reply = relay.handle(check(owner), source)
    assert isinstance(reply, dict)
    assert (status, reply) == (200, {"ok": True, "found": True, "question": reply["question"]})
    question = reply["question"]
    assert isinstance(question, str)
    return question


def prove(relay: Relay, owner: Owner, source: str = HOME) -> None:
    """Send to a box and receive from it, as its owner does."""
    assert relay.handle(send(owner), source) == OK_REPLY
    assert relay.handle(receive(owner, answer_of(relay, owner, source)), source).status == 200


def box_expiry(relay: Relay, owner: Owner) -> int | None:
    """Return until when the box has a row, once what was to be written soon is written."""
    relay.store.keep_boxes({}, 0)
    return relay.store.look(owner.box, 0, relay.now_us()).box_expires_us


def datagram(relay: Relay, request: object) -> object:
    """Return the reply to a datagram, or None for none."""
    reply = answer_datagram(relay, json.dumps(request).encode())
    return None if reply is None else json.loads(reply)


class WatchedStore:
    """Note the calls of a store's methods, and raise from some of them what a test sets."""

    def __init__(self, store: Store) -> None:
        self.inside = store
        self.calls: collections.Counter[str] = collections.Counter()
        self.values: dict[str, tuple[Any, ...]] = {}  # of the last call of each
        self.error: Exception | None = None
        self.failing: frozenset[str] = frozenset(METHODS)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inside, name)

        def call(*values: Any, **named: Any) -> Any:
            self.calls[name] += 1
            self.values[name] = values
            if self.error and name in self.failing:
                raise self.error
            return method(*values, **named)

        return call

    @property
    def store(self) -> Store:
        """Return itself, as what a relay takes."""
        return cast(Store, self)


# The walk, questions and answers


def test_whole_walk_from_an_empty_box_to_the_expiry_of_messages(relay: Relay, clock: FakeClock, alice: Owner) -> None:
    assert relay.handle(check(alice), HOME) == (200, NOTHING)
    for number in range(3):
        assert relay.handle(send(alice, f"QUJ{number}"), OTHER) == OK_REPLY
        clock.advance(1)
    ats = [START_US + number * SECOND_US for number in range(3)]
    answer = answer_of(relay, alice)
    newest = [{"at": at, "data": f"QUJ{number}"} for number, at in enumerate(ats)]
    assert relay.handle(receive(alice, answer), HOME) == (200, {"ok": True, **newest[0]})
    assert relay.handle(receive(alice, answer, limit=1, at=ats[0]), HOME) == (200, {"ok": True, **newest[1]})
    assert relay.handle(receive(alice, answer, limit=2), HOME) == (200, {"ok": True, "messages": newest[:2]})
    assert relay.handle(receive(alice, answer, limit=100), HOME) == (200, {"ok": True, "messages": newest})
    assert relay.handle(receive(alice, answer, limit=100, at=ats[1]), HOME) == (
        200, {"ok": True, "messages": newest[2:]})
    for at_us in (ats[2], 2**63, 10**30):
        assert relay.handle(receive(alice, answer, limit=9, at=at_us), HOME) == (200, NOTHING)
        assert relay.handle(check(alice, at_us), HOME) == (200, NOTHING)
    clock.advance(3_600 - 1 - 0.000001)
    answer = answer_of(relay, alice)
    assert relay.handle(receive(alice, answer, at=ats[1]), HOME) == (200, {"ok": True, **newest[2]})
    clock.advance(0.000001)
    assert relay.handle(check(alice, ats[1]), HOME) == (200, NOTHING)
    assert relay.handle(receive(alice, answer, limit=100), HOME) == (200, NOTHING)


def test_question_is_reused_for_half_its_time_and_good_for_all_of_it(
        make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make()
    relay.handle(send(alice), OTHER)
    first = question_of(relay, alice, HOME)
    clock.advance(29.999999)
    assert question_of(relay, alice, OTHER) == first
    clock.advance(0.000001)
    second = question_of(relay, alice, OTHER)
    assert second != first
    answers = [alice.open(question) for question in (first, second)]
    for answer, good_s in zip(answers, (30, 60), strict=True):
        assert relay.handle(receive(alice, answer), OTHER).status == 200
        clock.advance(good_s - 0.000001 - (good_s == 60) * 30)
        assert relay.handle(receive(alice, answer), HOME).status == 200
        clock.advance(0.000001)
        assert refused(relay.handle(receive(alice, answer), HOME)) == (403, "Wrong answer", 0)


def test_answer_is_the_random_source_s_256_bits_and_kept_as_a_hash(clock: FakeClock, alice: Owner) -> None:
    drawn: list[bytes] = []

    def random_bytes(size: int) -> bytes:
        drawn.append(hashlib.sha512(bytes([len(drawn)])).digest()[:size])
        return drawn[-1]

    relay = Relay(SqliteStore(":memory:"), clock=clock.clock, random_bytes=random_bytes)
    relay.handle(send(alice), OTHER)
    question = question_of(relay, alice)
    answer = alice.open(question)
    assert decode(answer) == drawn[-1]
    assert len(drawn[-1]) == 32
    assert relay.store.answers(alice.box, START_US) == [hashlib.sha256(answer.encode()).digest()]
    stolen = relay.store.answers(alice.box, START_US)[0]
    for wrong in (question, stolen.hex(), answer + "=", answer[:-1], answer.swapcase(), "", "\0", "é", "x" * 100_000):
        assert refused(relay.handle(receive(alice, wrong), HOME)) == (403, "Wrong answer", 0)
    relay.close()


def test_question_opens_only_with_the_question_s_context(relay: Relay, alice: Owner, bob: Owner) -> None:
    relay.handle(send(alice), OTHER)
    question = decode(question_of(relay, alice))
    assert CONTEXTS["question"] == b"connectoid/1 question"
    assert len(SUITE.decrypt(question, alice.key, info=b"connectoid/1 question")) == 43
    for key, context in ((alice.key, b"connectoid/1 message"), (alice.key, b""), (bob.key, b"connectoid/1 question")):
        with pytest.raises(InvalidTag):
            SUITE.decrypt(question, key, info=context)


def test_answer_of_one_box_is_wrong_for_another(relay: Relay, alice: Owner, bob: Owner) -> None:
    for owner in (alice, bob):
        relay.handle(send(owner), OTHER)
    answers = [answer_of(relay, owner) for owner in (alice, bob)]
    assert answers[0] != answers[1]
    for owner, answer in ((alice, answers[1]), (bob, answers[0])):
        assert refused(relay.handle(receive(owner, answer), HOME)) == (403, "Wrong answer", 0)
        assert box_expiry(relay, owner) is None


def test_receive_of_a_box_without_questions_is_a_wrong_answer(relay: Relay, alice: Owner) -> None:
    relay.handle(send(alice), HOME)
    assert refused(relay.handle(receive(alice, "x"), HOME)) == (403, "Wrong answer", 0)


# Rates and sizes


class Rate(NamedTuple):
    """A limit of 3 in a span: the request that uses up one of the N-th box."""

    limits: dict[str, int]
    request: Callable[[Owner], object]
    span_s: int


OWNERS = [Owner(number) for number in range(10, 17)]
RATES = {
    "rate": Rate({"rate": 3}, check, 60),
    "max_seals": Rate({"max_seals": 3}, check, 60),
    "max_sends": Rate({"max_sends": 3}, lambda _: send(OWNERS[0]), 60),
    "max_source_bytes": Rate({"max_source_bytes": 12}, send, 3_600),
}


@pytest.mark.parametrize("name", RATES)
def test_rate_refuses_what_is_over_it_until_retry_has_passed(make: Make, clock: FakeClock, name: str) -> None:
    limits, request, span_s = RATES[name]
    relay = make(**limits, message_ttl_s=10_000)
    for number, owner in enumerate(OWNERS):  # something to find everywhere, each from its own source
        relay.handle(send(owner), f"203.0.113.{number}")
    clock.advance(7_200)  # the spans have begun anew
    for owner in OWNERS[:3]:
        assert relay.handle(request(owner), HOME).status == 200
    status, error, retry_s = refused(relay.handle(request(OWNERS[3]), HOME))
    assert (status, error) == (429, "Too often")
    assert 1 <= retry_s <= span_s
    assert relay.handle(request(OWNERS[4]), OTHER).status == 200  # the others are not concerned
    clock.advance(retry_s - 1)
    assert refused(relay.handle(request(OWNERS[3]), HOME)) == (429, "Too often", 1)
    clock.advance(1)
    assert relay.handle(request(OWNERS[3]), HOME).status == 200


@pytest.mark.parametrize(("sizes", "statuses"), [
    ([4, 4, 3], [200, 200, 200]), ([4, 4, 4], [200, 200, 200]), ([4, 4, 6, 4], [200, 200, 429, 200]), ([13], [400]),
    ([14], [429]),
])
def test_max_source_bytes_counts_what_was_taken(
        make: Make, sizes: list[int], statuses: list[int]) -> None:
    relay = make(max_source_bytes=12)
    replies = [relay.handle(send(owner, "A" * size), HOME) for owner, size in zip(OWNERS, sizes, strict=False)]
    assert [reply.status for reply in replies] == statuses


def test_max_sends_counts_per_box_and_source(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(max_sends=1)
    for owner, source, status in ((alice, HOME, 200), (alice, HOME, 429), (alice, OTHER, 200), (bob, HOME, 200)):
        assert relay.handle(send(owner), source).status == status


def test_max_seals_spares_questions_that_exist_and_checks_that_find_nothing(
        make: Make, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    relay = make(max_seals=1)
    relay.handle(send(alice), OTHER)
    relay.handle(send(bob), OTHER)
    question = question_of(relay, alice)
    clock.advance(29.999999)
    assert refused(relay.handle(check(bob), HOME))[:2] == (429, "Too often")
    assert question_of(relay, alice) == question
    assert relay.handle(check(bob, at=START_US + 1), HOME) == (200, NOTHING)
    assert datagram(relay, check(bob)) == {"ok": True, "found": True}


def test_max_udp_is_a_budget_of_all_datagrams_and_of_nobody_else(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(max_udp=3, rate=2)
    for _ in range(2):
        assert [datagram(relay, check(alice)) for _ in range(4)] == [NOTHING] * 3 + [None]
        clock.advance(1)
    assert [relay.handle(check(alice), HOME).status for _ in range(3)] == [200, 200, 429]
    assert datagram(relay, check(alice)) == NOTHING


def test_rate_0_lifts_all_rates_but_not_the_eighth_of_a_box(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(rate=0, max_seals=1, max_sends=1, max_source_bytes=1, max_udp=1, max_box_messages=16)
    for _ in range(2):
        assert relay.handle(send(alice), HOME) == OK_REPLY
        assert relay.handle(send(bob), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 3_600)
    assert question_of(relay, alice) != question_of(relay, bob)
    assert all(relay.handle(check(alice, at=START_US + 9), HOME) == (200, NOTHING) for _ in range(1_000))
    assert [datagram(relay, check(alice)) for _ in range(3)] == [{"ok": True, "found": True}] * 3


def test_rate_limit_knows_a_bounded_number_of_sources() -> None:
    limit = RateLimit(2, SECOND_US)
    assert all(limit.take(number, NOW_US) == 0 for number in range(MAX_SOURCES))
    assert [limit.take(f"late {number}", NOW_US) for number in range(3)] == [0, 0, 1]  # these share one count
    assert [limit.take(7, NOW_US + SECOND_US - 1) for _ in range(2)] == [0, 1]
    assert [limit.take("late 9", NOW_US + SECOND_US) for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(("address", "source"), [
    ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("::FFFF:192.0.2.7", "192.0.2.7"),
    ("::ffff:c000:207", "192.0.2.7"), ("0:0:0:0:0:ffff:c000:0207", "192.0.2.7"),
    ("2001:db8:1:2::7", "2001:0db8:0001:0002::/64"), ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:0db8:0001:0002::/64"),
    ("2001:DB8:1:2::8%eth0", "2001:0db8:0001:0002::/64"), ("2001:db8:1:3::7", "2001:0db8:0001:0003::/64"),
    ("fe80::1%eth0", "fe80:0000:0000:0000::/64"), ("::1", "0000:0000:0000:0000::/64"), ("", ""), ("unix", "unix"),
])
def test_source_of_makes_a_64_one_source_and_mapped_addresses_ipv4(address: str, source: str) -> None:
    assert source_of(address) == source


ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ANY_TEXT | st.text("0123456789abcdef:.%fF\0\ud800 ") | st.builds("::ffff:{}".format, ANY_TEXT))
def test_source_of_takes_any_text(address: str) -> None:
    assert isinstance(source_of(address), str)


@pytest.mark.parametrize(("first", "second", "same"), [
    ("192.0.2.7", "::ffff:192.0.2.7", True), ("2001:db8::1", "2001:db8::2", True),
    ("192.0.2.7", "192.0.2.8", False), ("2001:db8:0:1::1", "2001:db8:0:2::1", False), ("::1", "127.0.0.1", False),
])
def test_rate_and_share_are_those_of_the_source(
        make: Make, alice: Owner, first: str, second: str, same: bool) -> None:
    relay = make(rate=2, max_box_messages=8)
    assert relay.handle(send(alice), first) == OK_REPLY
    assert relay.handle(send(alice), second).status == (429 if same else 200)  # an eighth is 1
    assert relay.handle(check(alice, at=START_US + 1), second).status == (429 if same else 200)


def test_source_is_kept_as_a_hash_that_changes_daily_and_with_each_relay(make: Make, clock: FakeClock) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))

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
    assert refused(cast(Reply, relay.run(relay.begin(b"[" * 60_000, SOURCE)))) == (400, "Bad request", 0)
    outcome = relay.begin(b"[" * 60_000, SOURCE)
    assert refused(cast(Reply, outcome)) == (429, "Too often", 60)  # at once: nothing is left to run


@pytest.mark.parametrize("blanks", [0, 4_096])  # a long body is parsed by a thread of the pool
def test_long_body_is_answered_like_a_short_one(relay: Relay, alice: Owner, blanks: int) -> None:
    outcome = relay.begin(json.dumps(check(alice)).encode() + b" " * blanks, SOURCE)
    assert callable(outcome) == bool(blanks)
    assert relay.run(outcome) == (200, NOTHING)


@pytest.mark.parametrize("source", [None, b"192.0.2.1", 7, "\ud800", "a:\0"])
def test_handle_takes_any_source(relay: Relay, alice: Owner, source: Any) -> None:
    assert relay.handle(send(alice), source) == (200, OK)
    assert relay.handle(check(alice, at=2**63), source) == (200, NOTHING)


def test_source_has_another_hash_each_day(make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    hashes = []
    for later_s in (0, 1, 86_400):
        clock.advance(later_s)
        assert relay.handle(send(alice), SOURCE) == (200, OK)
        hashes.append(watched.values["put"][0].source)
    assert hashes[0] == hashes[1] != hashes[2]


# Batches and waiting


def test_batch_is_answered_item_by_item_in_order(relay: Relay, alice: Owner, bob: Owner) -> None:
    relay.handle(send(bob), OTHER)
    question = question_of(relay, bob)
    items = [check(alice), check(bob), send(alice), receive(bob, "x"), [check(bob)], None, check(bob, at=-1),
             {**check(bob), "pub": "x"}, check(bob, at=START_US)]
    status, replies = relay.handle(items, HOME)
    assert status == 200
    assert isinstance(replies, list)
    assert [reply if reply["ok"] else refused(Reply(400, reply)) for reply in replies] == [
        NOTHING, {"ok": True, "found": True, "question": question}, *[BAD] * 6, NOTHING]
    assert relay.store.arrivals(0) == (START_US, {bob.box})


def test_batch_has_1_to_256_items(make: Make, alice: Owner) -> None:
    relay = make(rate=0)
    for count in (1, 2, 255, 256):
        assert relay.handle([check(alice)] * count, HOME) == (200, [NOTHING] * count)
    for count in (0, 257, 1_000):
        assert refused(relay.handle([check(alice)] * count, HOME)) == BAD


def test_batch_counts_as_its_items(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(rate=5)
    assert relay.handle([check(alice), None, check(alice), "x"], HOME).status == 200
    status, replies = relay.handle([check(alice)] * 3, HOME)
    assert status == 200
    assert isinstance(replies, list)
    assert [reply.get("error", reply) for reply in replies] == [NOTHING, "Too often", "Too often"]
    assert refused(relay.handle(check(alice), HOME))[:2] == (429, "Too often")
    clock.advance(60)
    for _ in range(5):
        assert refused(relay.handle([], HOME)) == BAD  # an array of another length counts as one
    assert refused(relay.handle([], HOME))[:2] == (429, "Too often")


@pytest.mark.parametrize("wait", [0, 1, 60, 61, 10**30])
def test_handle_never_waits(relay: Relay, alice: Owner, bob: Owner, wait: int) -> None:
    assert relay.handle(check(alice, wait=wait), HOME) == (200, NOTHING)
    assert relay.handle([check(alice, wait=wait), check(bob, wait=wait)], HOME) == (200, [NOTHING] * 2)
    relay.handle(send(alice), OTHER)
    status, reply = relay.handle([check(bob, wait=wait), check(alice, wait=wait)], HOME)
    assert isinstance(reply, list)
    assert (status, reply[0], reply[1]["found"]) == (200, NOTHING, True)


# Forms


SURROGATES = "\ud800"
WRONG: Mapping[str, list[object]] = {
    "pub": [None, True, 1, 1.5, "", [], {}, Owner(1).pub[:-1], Owner(1).pub + "A", Owner(1).pub + "\n",
            "B" + Owner(1).pub[1:], Owner(1).pub[:-1] + "B", "é" * 66, SURROGATES * 66, [Owner(1).pub]],
    "ext": [True, 1, 1.5, [], {}, ["x"], "x" * 1_025, SURROGATES],
    "action": [None, True, 1, 1.5, "", [], {}, "Send", "send ", "health", SURROGATES, ["check"]],
    "at": [None, True, False, -1, -(10**30), 0.0, 1.5, 1e3, "", "1", [], {}, float("nan"), float("inf")],
    "wait": [None, True, False, -1, 0.0, 1.5, 1e3, "", "1", [], {}],
    "limit": [None, True, False, 0, -1, 101, 10**30, 1.0, 1.5, 1e1, "", "1", [], {}],
    "answer": [None, True, 1, 1.5, [], {}, SURROGATES],
    "data": [None, True, 1, 1.5, [], {}, "", "A", "AAAAA", "QUJD=", "QU==", "QU JD", "QUJD\n", "QU+/", "éé",
             SURROGATES * 2],
}
MEMBERS = {"send": ["pub", "ext", "action", "data"], "check": ["pub", "ext", "action", "at", "wait"],
           "receive": ["pub", "ext", "action", "at", "limit", "answer"]}
REQUESTS: Mapping[str, dict[str, Any]] = {
    "send": send(Owner(1)), "check": check(Owner(1)), "receive": receive(Owner(1), "x")}


@pytest.mark.parametrize(("action", "member"), [(action, member) for action in MEMBERS for member in MEMBERS[action]])
def test_member_of_a_wrong_form_is_a_bad_request_and_nothing_is_stored(make: Make, action: str, member: str) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store, rate=0)
    watched.calls.clear()
    for wrong in WRONG[member]:
        assert refused(relay.handle({**REQUESTS[action], member: wrong}, HOME)) == BAD, wrong
        if action == "check":
            assert relay.handle([{**REQUESTS[action], member: wrong}], HOME).body != [NOTHING], wrong
    assert watched.calls.keys() <= {"look"}
    assert relay.store.arrivals(0) == (0, set())


@pytest.mark.parametrize(("action", "member"), [(action, member) for action in MEMBERS for member in MEMBERS[action]])
def test_absent_member_is_a_bad_request_if_it_is_needed(relay: Relay, action: str, member: str) -> None:
    needed = member in ("pub", "action", "data", "answer")
    whole = relay.handle(REQUESTS[action], HOME)
    reply = relay.handle({name: value for name, value in REQUESTS[action].items() if name != member}, HOME)
    assert (refused(reply) == BAD) if needed else (reply == whole)


@pytest.mark.parametrize("request_", [None, True, 0, 1.5, "", "check", [], [[]], {}, {"ok": True}, 10**40, SURROGATES])
def test_what_is_no_request_is_a_bad_request(relay: Relay, request_: object) -> None:
    reply = relay.handle(request_, HOME)
    assert refused(Reply(400, reply.body[0]) if isinstance(reply.body, list) else reply) == BAD


@pytest.mark.parametrize("member", ["ext", "at", "wait", "limit"])
def test_member_at_its_edges_is_taken(relay: Relay, alice: Owner, member: str) -> None:
    edges: dict[str, list[object]] = {
        "ext": [None, "", "x" * 1_024, "\U0001f600" * 1_024], "at": [0, 1, 2**63 - 1, 2**63, 10**400],
        "wait": [0, 60, 61, 10**400], "limit": [1, 100]}
    relay.handle(send(alice), OTHER)
    requests = [check(alice), receive(alice, answer_of(relay, alice))]
    for edge in edges[member]:
        for request in requests:
            assert relay.handle({**request, member: edge}, HOME).status == 200


@pytest.mark.parametrize(("sealed", "reply"), [
    ("AA", (200, "", 0)), ("A" * 32_767, (200, "", 0)), ("A" * 32_768, (200, "", 0)), ("-_-_", (200, "", 0)),
    ("AB", (200, "", 0)), ("A" * 32_769, (413, "Too big", 0)), ("A" * 32_770, (413, "Too big", 0)),
    ("+" * 40_000, (413, "Too big", 0)), ("A" * 32_765, BAD), ("A" * 32_767 + "=", BAD),
])
def test_data_is_kept_as_it_was_sent_or_refused(
        relay: Relay, alice: Owner, sealed: str, reply: tuple[int, str, int]) -> None:
    outcome = relay.handle(send(alice, sealed), HOME)
    kept = [] if reply[1] else [(START_US, sealed)]
    assert (outcome == OK_REPLY) if kept else (refused(outcome) == reply)
    assert relay.store.messages(alice.box, 0, 100, START_US) == kept


def no_point() -> str:
    """Return a pub of the right form that is no point of the curve."""
    number = 0
    with contextlib.suppress(ValueError):
        while True:
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), box_of(number := number + 1))
    return base64.urlsafe_b64encode(box_of(number)).rstrip(b"=").decode()


def test_send_alone_refuses_a_pub_that_is_no_point(relay: Relay) -> None:
    nobody = no_point()
    assert refused(relay.handle({"pub": nobody, "action": "send", "data": "QUJD"}, HOME)) == BAD
    assert relay.handle({"pub": nobody, "action": "check"}, HOME) == (200, NOTHING)
    assert refused(relay.handle({"pub": nobody, "action": "receive", "answer": "x"}, HOME)) == (
        403, "Wrong answer", 0)
    assert relay.store.arrivals(0) == (0, set())


def test_unknown_members_are_ignored(relay: Relay, alice: Owner) -> None:
    extra: dict[str, Any] = {"id": 7, "version": None, "": [SURROGATES], "ok": True}
    assert relay.handle(send(alice, **extra), HOME) == OK_REPLY
    answer = answer_of(relay, alice)
    assert relay.handle(receive(alice, answer, **extra), HOME) == (200, {"ok": True, "at": START_US, "data": "QUJD"})


NAMES = st.sampled_from(sorted(WRONG))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, -(10**40), 10**400]) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT | NAMES, inner, max_size=4), max_leaves=8)
NEARLY = st.builds(
    lambda request, changes: {**request, **changes},
    st.sampled_from(list(REQUESTS.values())),
    st.dictionaries(NAMES, ANY_JSON, max_size=3))
fuzzed = settings(derandomize=True, deadline=None, max_examples=150,
                  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@fuzzed
@given(ANY_JSON | NEARLY | st.lists(NEARLY, min_size=1, max_size=3))
def test_handle_answers_any_json_value(make: Make, request_: object) -> None:
    relay = make(rate=0)
    status, reply = relay.handle(request_, HOME)
    assert status in {200, 400, 403, 413}
    for item in reply if isinstance(reply, list) else [reply]:
        if item["ok"]:
            assert item.keys() in ({"ok"}, {"ok", "found"}, {"ok", "found", "question"})
        else:
            assert item["error"] in ("Bad request", "Wrong answer", "Too big")
    json.dumps(reply, allow_nan=False).encode("ascii")
    # Only a request that was good can have left something, and only a send.
    assert relay.store.arrivals(0)[1] == ({Owner(1).box} if reply == {"ok": True} else set())


@fuzzed
@given(st.binary() | st.builds(lambda request: json.dumps(request).encode(), ANY_JSON | NEARLY))
def test_datagram_of_any_octets_gets_a_shorter_reply_or_none(make: Make, octets: bytes) -> None:
    reply = answer_datagram(make(rate=0), octets)
    assert reply is None or (len(reply) <= len(octets) and json.loads(reply)["found"] is False)


# What relays on one store may share


def test_relay_takes_its_rate_limits_from_whoever_shares_them(clock: FakeClock, alice: Owner) -> None:
    made: dict[str, tuple[int, int]] = {}
    taken: list[tuple[str, object, int]] = []

    class Shared:
        """A rate limit that notes what is taken."""

        def __init__(self, name: str, limit: int, span_us: int) -> None:
            made[name] = (limit, span_us)
            self.name, self.limit = name, limit

        def take(self, key: object, _now_us: int, amount: int = 1) -> int:
            """Let all pass but a third request."""
            taken.append((self.name, key, amount))
            return 7 * (len(taken) > 7)

    relay = Relay(SqliteStore(":memory:"), clock=clock.clock, rate_limit=Shared)
    assert made == {"requests": (600, 60 * SECOND_US), "seals": (120, 60 * SECOND_US), "sends": (60, 60 * SECOND_US),
                    "sent_bytes": (64 << 20, HOUR_US)}
    assert relay.handle(send(alice), HOME) == OK_REPLY
    assert relay.handle(check(alice), HOME).status == 200
    assert taken == [("requests", HOME, 1), ("sends", (alice.box, HOME), 1), ("sent_bytes", HOME, 4),
                     ("requests", HOME, 1), ("seals", HOME, 1)]
    assert [relay.handle(check(alice), HOME).status for _ in range(3)] == [200, 200, 429]
    relay.close()


def test_relays_with_one_source_key_see_one_source(clock: FakeClock, folder: Path, alice: Owner) -> None:
    asked: list[int] = []

    def key_of(day: int) -> bytes:
        asked.append(day)
        return day.to_bytes(32)

    relays = [Relay(STORES["file"](folder), Limits(max_box_messages=2 * SOURCE_SHARE), clock=clock.clock,
                    source_key=key_of) for _ in range(2)]
    assert [relay.handle(send(alice), HOME).status for relay in (*relays, *relays)] == [200, 200, 429, 429]
    assert asked == [START_US // DAY_US] * 2
    clock.advance(86_400)
    assert relays[0].handle(send(alice), HOME) == OK_REPLY
    assert asked[2:] == [START_US // DAY_US + 1]
    for relay in relays:
        relay.close()


def test_batch_tells_which_boxes_it_will_look_at(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    within: list[list[bytes]] = []
    watched = WatchedStore(SqliteStore(":memory:"))

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
    wait = relay.run(outcome)
    assert isinstance(wait, Wait)
    relay.run(wait.again)
    assert [set(boxes) for boxes in within[1:]] == [{alice.box, bob.box}] * 2
    relay.close()


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
            assert exchange(port, http_request(b"", method="GET", path=path)).startswith(b"HTTP/1.1 200")
        with contextlib.closing(park(port, check(bob, wait=60))) as client:
            assert post(port, send(bob)) == (200, OK)
            assert reply_on(client)[1]["found"] is True
    (loop,) = (name for name in callers if "serve_forever" in name)
    assert callers[loop] <= {"arrivals", "snapshot"}
    assert set().union(*callers.values()) >= {"put", "look", "stored", "probe"}


# Storage: the eighth, the full box, the full relay, box rows


def test_one_source_fills_an_eighth_of_a_box_until_its_first_message_expires(
        make: Make, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    relay = make(max_box_messages=16, message_ttl_s=100)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    clock.advance(10.5)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 90)
    assert relay.handle(send(bob), HOME) == OK_REPLY
    assert relay.handle(send(alice), OTHER) == OK_REPLY
    clock.advance(89.499999)
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 1)
    clock.advance(0.000001)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice), HOME)) == (429, "Too often", 11)


@pytest.mark.parametrize(("limits", "sealed"), [({"max_box_messages": 8}, "AA"), ({"max_box_bytes": 80}, "A" * 10)])
def test_full_box_is_full_for_all_until_a_message_expires(
        make: Make, clock: FakeClock, limits: dict[str, int], sealed: str) -> None:
    alice, bob, *_ = OWNERS
    relay = make(**limits, message_ttl_s=100)
    for number in range(8):
        assert relay.handle(send(alice, sealed), f"203.0.113.{number}") == OK_REPLY
        clock.advance(1)
    assert refused(relay.handle(send(alice, sealed), HOME)) == (507, "Full", 92)
    assert relay.handle(send(bob, sealed), HOME) == OK_REPLY
    assert question_of(relay, alice)
    clock.advance(92)
    assert relay.handle(send(alice, sealed), HOME) == OK_REPLY
    assert refused(relay.handle(send(alice, sealed), OTHER)) == (507, "Full", 1)


def test_last_third_is_kept_for_proven_boxes_until_a_sweep_makes_room(
        make: Make, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    relay = make(max_bytes=9 * MIN_COUNTED_BYTES, message_ttl_s=100)
    prove(relay, alice)
    for _ in range(5):
        assert relay.handle(send(bob), HOME) == OK_REPLY
    assert refused(relay.handle(send(bob), HOME)) == (507, "Full", 60)
    for _ in range(3):
        assert relay.handle(send(alice), OTHER) == OK_REPLY
    assert refused(relay.handle(send(alice), OTHER)) == (507, "Full", 60)
    assert alice.open(question_of(relay, alice))  # what exists keeps working
    clock.advance(101)
    assert relay.handle(check(alice), HOME) == (200, NOTHING)
    while relay.sweep():
        pass
    assert relay.handle(send(bob), HOME) == OK_REPLY


def test_strangers_never_stop_the_owner(make: Make, alice: Owner) -> None:
    relay = make(max_box_messages=16, max_bytes=24 * MIN_COUNTED_BYTES, rate=30, max_seals=2)
    strangers = [f"198.51.100.{number}" for number in range(100)]
    outcomes = collections.Counter(
        relay.handle(send(owner), stranger).status for owner in (alice, *OWNERS) for stranger in strangers)
    assert outcomes == {200: 16, 507: 784}
    junk: list[object] = [check(alice), receive(alice, "x"), None, *[check(owner) for owner in OWNERS]]
    statuses = {relay.handle(request, stranger).status for stranger in strangers for request in junk * 4}
    assert statuses == {200, 400, 403, 429}
    reply = relay.handle(receive(alice, answer_of(relay, alice), limit=100), HOME)
    assert reply == (200, {"ok": True, "messages": [{"at": START_US + n, "data": "QUJD"} for n in range(16)]})


def test_box_row_is_made_for_a_proven_owner_alone(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(max_boxes=10)
    relay.handle(send(alice), OTHER)
    relay.handle(check(alice), OTHER)
    datagram(relay, check(alice))
    relay.handle(receive(alice, "wrong"), OTHER)
    relay.sweep()
    assert box_expiry(relay, alice) is None
    relay.handle(receive(alice, answer_of(relay, alice)), HOME)
    assert box_expiry(relay, alice) is not None
    assert box_expiry(relay, bob) is None


@pytest.mark.parametrize("how", ["http", "udp", "batch"])
@pytest.mark.parametrize("ttl_s", [30 * 86_400, 86_400, 60, 1])
def test_box_row_lives_its_time_after_the_last_check(
        make: Make, clock: FakeClock, alice: Owner, how: str, ttl_s: int) -> None:
    ask: dict[str, Callable[[], object]] = {
        "http": lambda: relay.handle(check(alice), HOME), "udp": lambda: datagram(relay, check(alice)),
        "batch": lambda: relay.handle([check(alice)], HOME)}
    step_us = min(DAY_US, ttl_s * SECOND_US // 30)
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store, box_ttl_s=ttl_s, message_ttl_s=1)
    prove(relay, alice)
    for _ in range(5):
        expires_us = box_expiry(relay, alice)
        assert expires_us is not None
        assert ttl_s * SECOND_US < expires_us - relay.now_us() <= ttl_s * SECOND_US + step_us
        clock.advance(ttl_s - 0.01)
        ask[how]()
        assert box_expiry(relay, alice) == expires_us  # written down by the sweep
        relay.sweep()
        calls = watched.calls["keep_boxes"]
        for _ in range(3):  # once is enough for this day
            ask[how]()
            relay.sweep()
        assert watched.calls["keep_boxes"] == calls
    clock.advance(ttl_s + step_us / SECOND_US)
    assert box_expiry(relay, alice) is None
    ask[how]()
    relay.sweep()
    assert box_expiry(relay, alice) is None  # from here on the owner must answer again
    prove(relay, alice)
    assert box_expiry(relay, alice) is not None


def test_max_boxes_limits_rows_and_nothing_else(make: Make, clock: FakeClock) -> None:
    relay = make(max_boxes=2, box_ttl_s=1_000, message_ttl_s=10)
    for owner in OWNERS[:3]:
        prove(relay, owner)
    assert [box_expiry(relay, owner) is not None for owner in OWNERS[:3]] == [True, True, False]
    clock.advance(1_100)
    relay.sweep()
    prove(relay, OWNERS[2])
    assert [box_expiry(relay, owner) is not None for owner in OWNERS[:3]] == [False, False, True]


def pub_of(number: int) -> str:
    """Return the mailbox as clients name it."""
    return encode_base64url(box_of(number))


@pytest.mark.parametrize(("seen", "more"), [
    (MAX_SEEN_WRITES - 1, False), (MAX_SEEN_WRITES, True), (MAX_SEEN_WRITES + 1, True)])
def test_sweep_writes_down_so_many_boxes_at_a_time(make: Make, clock: FakeClock, seen: int, more: bool) -> None:
    relay = make(rate=0, max_boxes=seen)
    before_us = clock.wall_us + HOUR_US
    relay.store.keep_boxes({box_of(number): before_us for number in range(seen)}, clock.wall_us, seen)
    for number in range(seen):
        relay.handle({"pub": pub_of(number), "action": "check"}, HOME)

    def written() -> int:
        return sum(relay.store.look(box_of(number), 0, clock.wall_us).box_expires_us != before_us
                   for number in range(seen))

    assert relay.sweep() is more
    assert written() == min(seen, MAX_SEEN_WRITES)
    assert relay.sweep() is False
    assert written() == seen


def test_box_rows_are_not_all_raised_at_the_same_time_of_day(make: Make, clock: FakeClock) -> None:
    """Else a relay with many of them would have all the day's writes at midnight."""
    relay = make()
    boxes = [b"\2" + hashlib.sha384(b"%d" % number).digest() for number in range(240)]
    relay.store.keep_boxes(dict.fromkeys(boxes, clock.wall_us + HOUR_US), clock.wall_us, len(boxes))
    for box in boxes:
        relay.handle({"pub": encode_base64url(box), "action": "check"}, HOME)
    while relay.sweep():
        pass
    expiries_us = [relay.store.look(box, 0, clock.wall_us).box_expires_us or 0 for box in boxes]
    hours = collections.Counter(expiry_us % DAY_US // HOUR_US for expiry_us in expiries_us)
    assert len(hours) == 24
    assert max(hours.values()) < 40


def test_close_writes_down_seen_boxes(clock: FakeClock, folder: Path, alice: Owner) -> None:
    path = str(folder / "relay.db")
    relay = Relay(SqliteStore(path), clock=clock.clock)
    prove(relay, alice)
    first_us = box_expiry(relay, alice)
    clock.advance(3 * 86_400)
    relay.handle(check(alice), HOME)
    relay.close()
    relay = Relay(SqliteStore(path), clock=clock.clock)
    assert first_us is not None
    assert box_expiry(relay, alice) == first_us + 3 * DAY_US
    relay.close()


# A store that fails


def good_request(relay: Relay, action: str, owner: Owner) -> dict[str, Any]:
    """Return a request that was good while the store was."""
    relay.handle(send(owner), OTHER)
    return {"send": send(owner), "check": check(owner), "receive": receive(owner, answer_of(relay, owner))}[action]


@pytest.mark.parametrize("error", [
    StoreError("no"), StoreFull("no"), RuntimeError("no"), RecursionError(), KeyError("no")], ids=repr)
@pytest.mark.parametrize(("action", "method"), [
    ("send", "put"), ("check", "look"), ("check", "question"), ("check", "put_question"), ("receive", "answers"),
    ("receive", "look"), ("receive", "messages"),
])
def test_failing_store_becomes_a_reply(
        make: Make, clock: FakeClock, error: Exception, action: str, method: str) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    refusal = (507, "Full", 60) if isinstance(error, StoreFull) else (503, "Busy", 5)
    request = good_request(relay, action, OWNERS[0])
    clock.advance(30)  # the answer is still good; a check makes a new question
    watched.error, watched.failing = error, frozenset({method})
    assert refused(relay.handle(request, HOME)) == refusal
    if action == "check":
        status, replies = relay.handle([request, request], HOME)
        assert isinstance(replies, list)
        assert [status, *(refused(Reply(refusal[0], reply)) for reply in replies)] == [200, refusal, refusal]
    watched.error = None
    assert relay.handle(request, HOME).status == 200


def test_receive_works_when_the_box_row_cannot_be_written(make: Make, alice: Owner) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    request = good_request(relay, "receive", alice)
    for watched.error in (StoreError("no"), StoreFull("no")):
        watched.failing = frozenset({"keep_boxes"})
        assert relay.handle(request, HOME) == (200, {"ok": True, "at": START_US, "data": "QUJD"})


def test_failing_store_gives_no_arrivals_and_no_datagram(make: Make, alice: Owner) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    relay.handle(send(alice), HOME)
    assert relay.arrivals(0) == (START_US, {alice.box})
    watched.error = StoreError("no")
    assert relay.arrivals(7) == (7, set())
    assert datagram(relay, check(alice)) is None


def test_failing_sweep_forgets_nobody_who_was_seen(make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    prove(relay, alice)
    expires_us = box_expiry(relay, alice)
    clock.advance(86_400)
    relay.handle(check(alice), HOME)
    watched.error, watched.failing = StoreError("no"), frozenset({"keep_boxes"})
    with contextlib.suppress(StoreError):
        relay.sweep()
    watched.error = None
    relay.sweep()
    assert expires_us is not None
    assert box_expiry(relay, alice) == expires_us + DAY_US


def test_sweep_deletes_even_if_box_rows_cannot_be_written(make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    prove(relay, alice)
    clock.advance(86_400)
    relay.handle(check(alice), HOME)
    watched.error, watched.failing = StoreFull("no"), frozenset({"keep_boxes"})
    with contextlib.suppress(StoreError):
        relay.sweep()
    assert relay.store.arrivals(0) == (0, set())  # only so can a full disk free itself


# Health, the document, the clock, the log


def test_health_probes_at_most_every_5_seconds(make: Make, clock: FakeClock) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    watched.calls.clear()
    for later_s, probes in ((0, 1), (0, 1), (4.999999, 1), (0.000001, 2), (0, 2), (5, 3)):
        clock.advance(later_s)
        assert relay.health() == OK_REPLY
        assert watched.calls["probe"] == probes
    assert watched.inside.time_us() == relay.now_us()  # it was a real write


@pytest.mark.parametrize("error", [StoreError("no"), StoreFull("no"), RuntimeError("no")], ids=repr)
def test_health_is_bad_while_the_store_fails(make: Make, clock: FakeClock, error: Exception) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store)
    assert relay.run(relay.health) == OK_REPLY
    watched.error = error
    for later_s in (5, 0, 4, 1, 0):
        clock.advance(later_s)
        assert refused(cast(Reply, relay.run(relay.health))) == (503, "Busy", 5)
    watched.error = None
    clock.advance(5)
    assert relay.run(relay.health) == OK_REPLY


def test_health_is_what_it_was_while_a_probe_is_under_way(make: Make) -> None:
    relays: list[Relay] = []
    asked_meanwhile: list[Reply] = []

    class Probed(SqliteStore):
        def probe(self, now_us: int) -> None:
            asked_meanwhile.extend(relay.health() for relay in relays)

    relays.append(make(Probed(":memory:")))
    assert relays[0].health() == OK_REPLY
    assert asked_meanwhile == [OK_REPLY]


def test_health_is_bad_while_nobody_sweeps(relay: Relay, clock: FakeClock) -> None:
    clock.advance(59)
    assert relay.health() == OK_REPLY
    clock.advance(2)
    assert refused(relay.health()) == (503, "Busy", 5)
    relay.sweep()
    assert relay.health() == OK_REPLY


def test_document_has_all_members_and_the_limits_in_force(make: Make) -> None:
    document = make(rate=7, message_ttl_s=100).document()
    assert document.keys() == {"name", "description", "software", "version", "contact", "limits", "retention", "udp",
                               "stun", "notice", "price_url"}
    retention = {f"{name}_ttl_s": seconds for name, seconds in document["retention"].items()}
    assert document["limits"] | retention == Limits(rate=7, message_ttl_s=100)._asdict()
    assert document["retention"] == {"message": 100, "question": 60, "box": 30 * 86_400}
    assert (document["software"], document["udp"], document["stun"]) == ("connectoid_relay", False, False)
    json.dumps(document, allow_nan=False)


def test_arrivals_are_those_of_the_store(relay: Relay, alice: Owner, bob: Owner) -> None:
    for owner in (alice, bob):
        relay.handle(send(owner), HOME)
    for after_us in (0, START_US, START_US + 1):
        assert relay.arrivals(after_us) == relay.store.arrivals(after_us)
    assert relay.arrivals(START_US) == (START_US + 1, {bob.box})


@pytest.mark.parametrize(("wall_us", "believed_us"), [
    (0, RELEASE_US), (-1, RELEASE_US), (RELEASE_US - 1, RELEASE_US), (RELEASE_US, RELEASE_US),
    (RELEASE_US + 1, RELEASE_US + 1), (YEAR_2200_US - 1, YEAR_2200_US - 1), (YEAR_2200_US, RELEASE_US),
    (YEAR_2200_US + 100 * 365 * DAY_US, RELEASE_US),
])
@pytest.mark.parametrize("row_us", [0, START_US])
def test_clock_is_believed_only_from_the_release_to_2200_and_never_before_the_row(
        wall_us: int, believed_us: int, row_us: int) -> None:
    store = SqliteStore(":memory:")
    store.probe(row_us)
    relay = Relay(store, clock=Clock(lambda: wall_us, lambda: 7))
    assert relay.now_us() == max(believed_us, row_us)
    relay.close()


def test_time_never_goes_back_with_the_wall_clock(relay: Relay, clock: FakeClock, alice: Owner) -> None:
    now_us = relay.now_us()
    for wall_us in (0, now_us - HOUR_US, now_us + HOUR_US, YEAR_2200_US):
        clock.wall_us = wall_us
        assert relay.now_us() == now_us
        clock.monotonic_us += 1
        now_us += 1
        assert relay.now_us() == now_us
        assert relay.handle(send(alice), HOME) == OK_REPLY
        assert relay.handle(check(alice, at=now_us - 1), HOME).status == 200
    assert [at for at, _ in relay.store.messages(alice.box, 0, 9, now_us)] == list(range(now_us - 3, now_us + 1))


def test_sweep_catches_up_with_a_store_that_is_ahead(relay: Relay, clock: FakeClock) -> None:
    relay.store.probe(START_US + HOUR_US)
    assert relay.now_us() == START_US
    relay.sweep()
    assert relay.now_us() == START_US + HOUR_US
    clock.advance(1)
    relay.sweep()
    assert relay.now_us() == START_US + HOUR_US + SECOND_US


def test_message_is_kept_its_time_in_a_store_from_the_future(clock: FakeClock, folder: Path, alice: Owner) -> None:
    path = str(folder / "relay.db")
    store = SqliteStore(path)
    store.probe(START_US + 365 * DAY_US)  # once written under a clock a year ahead
    store.close()
    relay = Relay(SqliteStore(path), clock=clock.clock)
    assert relay.handle(send(alice), HOME) == OK_REPLY
    clock.advance(3_599)
    assert question_of(relay, alice)
    clock.advance(1)
    assert relay.handle(check(alice), HOME) == (200, NOTHING)
    relay.close()


class Session(NamedTuple):
    """What was said in a session with refusals of every kind."""

    replies: list[Reply]
    secrets: set[str]


SOURCES = ("203.0.113.77", "2001:db8:77::1", "198.51.100.77")


def run_session(relay: Relay, watched: WatchedStore, alice: Owner) -> Session:
    """Send, ask, guess, flood and break the store; return the replies and what no log may show."""
    first, second, third = SOURCES
    sealed = "c2VjcmV0LWRhdGE"
    replies = [relay.handle(send(alice, sealed), first), relay.handle(send(alice, sealed), first)]
    question = question_of(relay, alice, second)
    answer = alice.open(question)
    requests: list[object] = [
        receive(alice, answer + "x"), receive(alice, answer, limit=0), send(alice, sealed + "="), [alice.pub],
        alice.pub, check(alice, ext={"key": "secret-ext"}), send(alice, sealed, ext="secret-ext")]
    replies += [relay.handle(request, second) for request in requests]
    replies += [relay.handle(send(owner, sealed), third) for owner in OWNERS]
    for watched.error in (StoreError("no"), StoreFull("no"), RuntimeError("no")):
        replies += [relay.handle(request, second) for request in (
            send(alice, sealed), check(alice), receive(alice, answer))]
        replies += [relay.health()]
    watched.error = None
    replies += [relay.handle(check(alice, at=START_US + 9), third) for _ in range(30)]
    secrets = {alice.pub, alice.box.hex(), repr(alice.box)[2:20], question, answer, sealed, "secret-ext"}
    return Session(replies, secrets | {owner.pub for owner in OWNERS})


@pytest.mark.parametrize("log_ips", [False, True])
def test_log_tells_of_refusals_but_no_secrets_and_ips_only_if_asked(
        make: Make, alice: Owner, caplog: pytest.LogCaptureFixture, log_ips: bool) -> None:
    caplog.set_level(logging.DEBUG)
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store, log_ips, rate=25, max_box_messages=8, max_bytes=6 * MIN_COUNTED_BYTES)
    replies, secrets = run_session(relay, watched, alice)
    errors = {reply.body["error"] for reply in replies if isinstance(reply.body, dict) and not reply.body["ok"]}
    assert errors == {"Bad request", "Wrong answer", "Too often", "Full", "Busy"}
    for told in ("storage is full", "asks too often", "a request failed"):
        assert told in caplog.text
    shown = caplog.text + "".join(repr(vars(record)) for record in caplog.records)
    assert [secret for secret in secrets if secret in shown] == []
    assert (SOURCES[2] in caplog.text) is log_ips
    assert [source for source in SOURCES[:2] if source_of(source) in shown] == []  # they did nothing worth it


def test_replies_tell_only_what_was_asked_for(make: Make, alice: Owner) -> None:
    watched = WatchedStore(SqliteStore(":memory:"))
    relay = make(watched.store, rate=25, max_box_messages=8, max_bytes=6 * MIN_COUNTED_BYTES)
    replies, secrets = run_session(relay, watched, alice)
    replies += [relay.health(), Reply(200, relay.document())]
    said = json.dumps([reply.body for reply in replies])
    assert [secret for secret in (*secrets, *SOURCES, "2001:0db8") if secret in said] == []


# ---------------------------------------------------------------------------------------
# Random operations against a model that knows boxes as lists.
# ---------------------------------------------------------------------------------------

SMALL = Limits(rate=0, max_box_messages=16, max_box_bytes=4_800, max_bytes=42 * MIN_COUNTED_BYTES,
               message_ttl_s=10, question_ttl_s=4)
TTL_US, GOOD_US = 10 * SECOND_US, 4 * SECOND_US


class Kept(NamedTuple):
    """A message of the model."""

    box: str
    source: str
    data: str
    at: int


class Asked(NamedTuple):
    """A question of the model."""

    box: str
    question: str
    answer: str
    made_us: int


class Model:
    """Do what PROTOCOL.md says, in the plainest way; replies are without `detail`."""

    def __init__(self) -> None:
        self.now_us, self.last_at = START_US, 0
        self.kept: list[Kept] = []  # until they are swept
        self.asked: list[Asked] = []
        self.proven: set[str] = set()

    def box(self, pub: str, at: int = 0) -> list[Kept]:
        return [m for m in self.kept if m.box == pub and m.at > at and m.at + TTL_US > self.now_us]

    def send(self, pub: str, data: str, source: str) -> object:
        box = self.box(pub)
        mine = [m for m in box if m.source == source]
        total = sum(max(512, len(m.data)) for m in self.kept) + max(512, len(data))
        if len(mine) >= 2 or (mine and sum(len(m.data) for m in mine) + len(data) > 600):
            return self.refuse("Too often", mine[0].at + TTL_US)
        if len(box) >= 16 or sum(len(m.data) for m in box) + len(data) > 4_800:
            return self.refuse("Full", box[0].at + TTL_US)
        if total > 42 * 512 * (3 if pub in self.proven else 2) // 3:
            return self.refuse("Full", self.now_us + 60 * SECOND_US)
        self.last_at = max(self.now_us, self.last_at + 1)
        self.kept.append(Kept(pub, source, data, self.last_at))
        return {"ok": True}

    def refuse(self, error: str, until_us: int) -> object:
        return {"ok": False, "error": error, "retry": -(-(until_us - self.now_us) // SECOND_US)}

    def check(self, pub: str, at: int, new_question: str | None) -> object:
        """Return the reply; a new question is as the relay made it."""
        if not self.box(pub, at):
            return {"ok": True, "found": False}
        young = [q.question for q in self.asked if q.box == pub and q.made_us > self.now_us - GOOD_US // 2]
        return {"ok": True, "found": True, "question": young[-1] if young else new_question}

    def receive(self, pub: str, answer: str, at: int, limit: int) -> object:
        if not any(q.answer == answer for q in self.asked if q.box == pub and q.made_us + GOOD_US > self.now_us):
            return {"ok": False, "error": "Wrong answer"}
        self.proven.add(pub)
        messages = [{"at": m.at, "data": m.data} for m in self.box(pub, at)[:limit]]
        if not messages:
            return {"ok": True, "found": False}
        return {"ok": True, **messages[0]} if limit == 1 else {"ok": True, "messages": messages}

    def sweep(self) -> None:
        self.kept = [m for m in self.kept if m.at + TTL_US > self.now_us]


BOXES = {owner.pub: owner for owner in map(Owner, (21, 22, 23))}
PUBS = st.sampled_from(sorted(BOXES))
SIZES = st.sampled_from((6, 300, 600, 900))
PICKS = st.integers(0, 10**6)


class RelayAgainstModel(RuleBasedStateMachine):
    """Do the same to a relay on a file and to the model: every reply is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock, self.model = FakeClock(), Model()
        self.sent = self.opened = 0
        self.relay = self.open()

    def open(self) -> Relay:
        self.opened += 1
        store = SqliteStore(self.folder.name + "/relay.db", sync="normal")
        return Relay(store, SMALL, clock=self.clock.clock)

    def teardown(self) -> None:
        self.relay.close()
        self.folder.cleanup()

    def handle(self, request: object, source: str = HOME) -> Any:
        """Return the reply of the relay without what is for people."""
        status, body = self.relay.handle(request, source)
        for reply in body if isinstance(body, list) else [body]:
            reply.pop("detail", None)
        assert (status == 200) == (isinstance(body, list) or body["ok"])
        return body

    def some_at(self, pick: int) -> int:
        """Return an `at` that is near a message, or far from any."""
        ats = [kept.at + step for kept in self.model.kept for step in (-1, 0, 1)]
        return [0, 0, 0, self.model.now_us, 2**63, 2**70, *ats][pick % (6 + len(ats))]

    @initialize()
    def send_some(self) -> None:
        for pub in BOXES:
            self.send(pub, [1, 2, 3], 6)

    @rule(pub=PUBS, senders=st.lists(st.integers(0, 11), min_size=1, max_size=10), size=SIZES)
    def send(self, pub: str, senders: list[int], size: int) -> None:
        for sender in senders:
            self.sent += 1
            data = f"{self.sent:06}".ljust(size, "A")
            # After a restart a source is another one to the relay: so it is here.
            source = f"10.0.{self.opened}.{sender}"
            reply = self.handle({"pub": pub, "action": "send", "data": data}, source)
            assert reply == self.model.send(pub, data, source)

    @rule(pub=PUBS, pick=PICKS)
    def check(self, pub: str, pick: int) -> None:
        at = self.some_at(pick)
        self.compare_check(pub, at, self.handle({"pub": pub, "action": "check", "at": at}))

    def compare_check(self, pub: str, at: int, reply: Any) -> None:
        question = reply.get("question")
        new = None if question in [asked.question for asked in self.model.asked] else question
        assert reply == self.model.check(pub, at, new)
        if new:
            self.model.asked.append(Asked(pub, new, BOXES[pub].open(new), self.model.now_us))

    @rule(pubs=st.lists(PUBS, max_size=4), picks=st.lists(PICKS, min_size=4, max_size=4), waits=st.integers(0, 99))
    def batch(self, pubs: list[str], picks: list[int], waits: int) -> None:
        checks = [(pub, self.some_at(pick)) for pub, pick in zip(pubs, picks, strict=False)]
        items: list[object] = [{"pub": pub, "action": "check", "at": at, "wait": waits} for pub, at in checks]
        replies = self.handle([*items, "junk"])
        assert replies.pop() == {"ok": False, "error": "Bad request"}
        for (pub, at), reply in zip(checks, replies, strict=True):
            self.compare_check(pub, at, reply)

    @rule(which=st.sampled_from(("good", "good", "good", "expired", "foreign", "wrong")), pub=PUBS, pick=PICKS,
          limit=st.sampled_from((1, 2, 5, 100)))
    def receive(self, which: str, pub: str, pick: int, limit: int) -> None:
        if which == "good":
            self.check(pub, 0)
        alive = [asked for asked in self.model.asked if asked.made_us + GOOD_US > self.model.now_us]
        answers = [asked.answer for asked in {
            "good": [asked for asked in alive if asked.box == pub], "foreign": alive, "wrong": [],
            "expired": [asked for asked in self.model.asked[-9:] if asked not in alive and asked.box == pub]}[which]]
        answer, at = [*answers, "wrong"][pick % max(1, len(answers))], self.some_at(pick)
        reply = self.handle({"pub": pub, "action": "receive", "answer": answer, "at": at, "limit": limit})
        assert reply == self.model.receive(pub, answer, at, limit)

    @rule(later_us=st.sampled_from((1, 2, SECOND_US, GOOD_US // 2)))
    def advance(self, later_us: int) -> None:
        self.clock.wall_us += later_us
        self.clock.monotonic_us += later_us
        self.model.now_us += later_us

    @rule(pick=PICKS, step_us=st.sampled_from((-1, 0, 1)))
    def advance_to_an_edge(self, pick: int, step_us: int) -> None:
        if pick % 2:
            self.sweep()
        edges = {kept.at + TTL_US for kept in self.model.kept}
        edges |= {asked.made_us + good_us for asked in self.model.asked for good_us in (GOOD_US // 2, GOOD_US)}
        later = sorted(edge + step_us for edge in edges if edge + step_us > self.model.now_us)
        if later:
            self.advance(later[pick % min(len(later), 5)] - self.model.now_us)  # seldom far

    @rule()
    def sweep(self) -> None:
        while self.relay.sweep():
            pass
        self.model.sweep()

    @rule()
    def reopen(self) -> None:
        self.relay.close()
        self.relay = self.open()


@pytest.mark.parametrize(("examples", "steps"), [
    (10, 30), pytest.param(300, 50, marks=pytest.mark.slow)], ids=["quick", "long"])
def test_relay_replies_as_the_model_does(examples: int, steps: int) -> None:
    run_state_machine_as_test(RelayAgainstModel, settings=settings(
        derandomize=True, deadline=None, print_blob=False, max_examples=examples, stateful_step_count=steps,
        suppress_health_check=list(HealthCheck)))


VECTORS = Path(__file__).parent / "vectors"
MAX_HTTP_BYTES = 4_096  # of all bodies of a scenario that goes over HTTP byte by byte
ANSWER = re.compile(r"\$answer(?::(\w+):(\d+))?")


def expand(value: Any) -> Any:
    """Write out each {"repeat": [part, count, ...]} in a JSON value."""
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"repeat"}:
        return {name: expand(member) for name, member in value.items()}
    pairs = iter(expand(value["repeat"]))
    parts = [part for part, count in zip(pairs, pairs, strict=True) for _ in range(count)]
    return "".join(parts) if isinstance(parts[0], str) else parts


def load(name: str) -> Any:
    """Return what is in a file of vectors, written out."""
    return expand(json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8")))


QUESTIONS = load("relay_questions")
SCENARIOS = {path.stem: load(path.stem) for path in sorted(VECTORS.glob("relay_*.json"))
             if path.stem != "relay_questions"}
REFUSALS = [name for name, scenario in SCENARIOS.items() if scenario.get("refusal")]


class Sent(NamedTuple):
    """A request on its way: the bytes, and the JSON value in them, None if there is none."""

    octets: bytes
    request: Any
    as_bytes: bool
    source: str


Ask: TypeAlias = Callable[[Sent], tuple[int, Any]]


class Player:
    """Play the steps of a scenario into one relay and compare what comes back."""

    def __init__(self, scenario: Any, relay: Relay, clock: FakeClock, ask: Ask, *, sweeps: bool) -> None:
        self.relay, self.clock, self.ask, self.sweeps = relay, clock, ask, sweeps
        self.pubs = {name: key["pub"] for name, key in scenario["keys"].items()}
        self.owners = {key["pub"]: Owner(int(key["private"], 16)) for key in scenario["keys"].values()}
        assert all(owner.pub == pub for pub, owner in self.owners.items())
        self.opened: dict[str, dict[str, str]] = {pub: {} for pub in self.owners}  # questions to answers

    def play(self, steps: list[Any]) -> None:
        """Play all steps."""
        for step in self.requests(steps):
            self.exchange(step)

    def requests(self, steps: list[Any]) -> Iterator[Any]:
        """Yield the requests, each as often as it says, and let time go by between them."""
        for step in steps:
            if "advance_s" in step:
                self.advance(step["advance_s"])
            else:
                yield from itertools.repeat(step, step.get("repeat_step", 1))

    def advance(self, seconds: float) -> None:
        """Let time go by, and what the relay does in the background be done."""
        self.clock.advance(seconds)
        while self.sweeps and self.relay.sweep():
            pass

    def exchange(self, step: Any) -> tuple[Sent, Any]:
        """Ask, compare, and return what was sent and what came back."""
        sent = self.fill(step)
        status, reply = self.ask(sent)
        told = self.tell(sent.request, reply, step["reply"])
        assert (status, told) == (step["status"], step["reply"]), sent.octets[:400]
        return sent, reply

    def fill(self, step: Any) -> Sent:
        """Put the answers into a request."""
        source = step.get("source", SOURCE)
        if "request" in step:
            items = step["request"] if isinstance(step["request"], list) else [step["request"]]
            filled = [self.fill_item(item) for item in items]
            request = filled if isinstance(step["request"], list) else filled[0]
            return Sent(json.dumps(request, ensure_ascii=False).encode(), request, False, source)
        octets = bytes.fromhex(step["body_hex"]) if "body_hex" in step else self.fill_text(step["body"]).encode()
        try:
            return Sent(octets, json.loads(octets), True, source)
        except (ValueError, RecursionError):
            return Sent(octets, None, True, source)

    def fill_item(self, item: Any) -> Any:
        if isinstance(item, dict) and isinstance(item.get("answer"), str):
            return item | {"answer": self.fill_text(item["answer"], item.get("pub", ""))}
        return item

    def fill_text(self, text: str, pub: str = "") -> str:
        def answer(match: re.Match[str]) -> str:
            name, number = match.groups()
            return list(self.opened[self.pubs[name] if name else pub].values())[int(number or 0) - 1]
        return ANSWER.sub(answer, text)

    def tell(self, request: Any, reply: Any, expected: Any) -> Any:
        """Return a reply as a vector would have it: questions by their numbers, no detail."""
        if isinstance(reply, list):
            if not isinstance(expected, list) or len(expected) != len(reply):
                return reply
            return [self.tell(*item) for item in zip(request, reply, expected, strict=True)]
        told = {member: value for member, value in reply.items() if member != "detail"}
        if "question" in told:
            number = self.open(request["pub"], told["question"])
            told["question"] = "$question" if expected.get("question") == "$question" else f"$question:{number}"
        return told

    def open(self, pub: str, question: str) -> int:
        """Open a question with the box's key; return which of the box's questions it is."""
        opened = self.opened[pub]
        if question not in opened:
            answer = open_question(self.owners[pub], question)
            assert re.fullmatch(r"[ -~]{43,}", answer)
            assert answer not in opened.values()
            opened[question] = answer
        return list(opened).index(question) + 1

    def stored(self) -> dict[str, list[Any]]:
        """Return every message of every box, asked for from addresses that nobody else has."""
        sources = (f"203.0.113.{number}" for number in itertools.count(1))
        found: dict[str, list[Any]] = {pub: [] for pub in self.owners}
        for pub, owner in self.owners.items():
            at = 0
            while (looked := self.relay.handle(check(owner, at), next(sources)).body) != NOTHING:
                assert isinstance(looked, dict)
                request = receive(owner, owner.open(looked["question"]), at=at, limit=100)
                reply = self.relay.handle(request, next(sources)).body
                assert isinstance(reply, dict)
                found[pub] += reply["messages"]
                at = found[pub][-1]["at"]
        return found


def open_question(owner: Owner, question: str) -> str:
    """Return the answer, as a client has to: from canonical base64url without padding only."""
    sealed = decode(question)
    if encode_base64url(sealed) != question:
        raise ValueError("not canonical")
    return SUITE.decrypt(sealed, owner.key, info=CONTEXTS["question"]).decode("ascii")


def ask_with_bytes(relay: Relay, sent: Sent) -> tuple[int, Any]:
    """Hand a body to the core as a front does."""
    reply = relay.run(relay.begin(sent.octets, source_of(sent.source)))
    return reply.reply if isinstance(reply, Wait) else reply


def ask_with_json(relay: Relay, sent: Sent) -> tuple[int, Any]:
    """Hand the parsed JSON to the core as an embedder does; what is about the bytes goes as such."""
    return ask_with_bytes(relay, sent) if sent.as_bytes else relay.handle(sent.request, sent.source)


@contextlib.contextmanager
def playing(name: str, ask: str, *, sweeps: bool = True) -> Iterator[Player]:
    """Start a relay for a scenario: asked by "json", "bytes" or "http"."""
    scenario, clock = SCENARIOS[name], FakeClock()
    relay = Relay(SqliteStore(":memory:"), Limits(**scenario.get("limits", {})), clock=clock.clock)
    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        port = stack.enter_context(serving(relay)).server_port if ask == "http" else 0
        asks: dict[str, Ask] = {
            "json": lambda sent: ask_with_json(relay, sent),
            "bytes": lambda sent: ask_with_bytes(relay, sent),
            "http": lambda sent: post(port, sent.octets, piece=1),
        }
        yield Player(scenario, relay, clock, asks[ask], sweeps=sweeps)


def octets_of(step: Any) -> int:
    """Return how many bytes the bodies of a step have, about."""
    body = step.get("body", step.get("body_hex"))
    length = len(json.dumps(step.get("request")) if body is None else body)
    return length * int(step.get("repeat_step", 1)) * ("advance_s" not in step)


def goes_over_http(scenario: Any) -> bool:
    """Return whether one client on this machine can play a scenario in a moment."""
    sources = {step.get("source", SOURCE) for step in scenario["steps"] if "advance_s" not in step}
    return (len(sources) == 1 and not scenario.get("waits")
            and sum(map(octets_of, scenario["steps"])) < MAX_HTTP_BYTES)


def refusals_in(reply: Any) -> list[Any]:
    """Return the refusals in a reply or a batch of replies."""
    return [item for item in (reply if isinstance(reply, list) else [reply]) if item["ok"] is False]


CORE = [name for name, scenario in SCENARIOS.items() if not scenario.get("http_only")]
# Room comes back with a sweep; nothing else may depend on one.
UNSWEPT = [name for name in CORE if "max_bytes" not in SCENARIOS[name].get("limits", {})]
HTTP = [name for name, scenario in SCENARIOS.items() if goes_over_http(scenario)]


@pytest.mark.parametrize("name", CORE)
def test_scenario_as_json_gives_its_replies(name: str) -> None:
    with playing(name, "json") as player:
        player.play(SCENARIOS[name]["steps"])


@pytest.mark.parametrize("name", UNSWEPT)
def test_scenario_as_bytes_and_without_sweeps_gives_its_replies(name: str) -> None:
    with playing(name, "bytes", sweeps=False) as player:
        player.play(SCENARIOS[name]["steps"])


@pytest.mark.parametrize("name", HTTP)
def test_scenario_over_http_in_one_byte_pieces_gives_its_replies(name: str) -> None:
    with playing(name, "http", sweeps=False) as player:  # the server has a sweeper
        player.play(SCENARIOS[name]["steps"])


@pytest.mark.parametrize("name", CORE)
def test_datagram_with_a_request_tells_no_more_than_found(name: str) -> None:
    with playing(name, "json") as player:
        for step in player.requests(SCENARIOS[name]["steps"]):
            sent, reply = player.exchange(step)
            if len(sent.octets) > MAX_DATAGRAM_BYTES:
                continue
            is_check = isinstance(sent.request, dict) and sent.request.get("action") == "check"
            found = {"ok": True, "found": reply["found"]} if is_check and reply["ok"] else None
            answered = answer_datagram(player.relay, sent.octets)
            assert (answered and json.loads(answered)) == step.get("udp", found), sent.octets
            assert answered is None or len(answered) <= len(sent.octets)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_leaves_the_store_as_it_was(name: str) -> None:
    scenario, stored = SCENARIOS[name], []
    for steps in (scenario["steps"][:-1], scenario["steps"]):
        with playing(name, "http" if scenario.get("http_only") else "json") as player:
            player.play(steps)
            stored.append(player.stored())
    assert stored[0] == stored[1]
    assert refusals_in(scenario["steps"][-1]["reply"])


def test_vectors_are_as_many_as_their_readme_says() -> None:
    readme = " ".join((VECTORS / "README.md").read_text(encoding="utf-8").split())
    counts = re.search(r"(\d+) scenarios, one a file, (\d+) of them refusals; .* (\d+) fixed questions"
                       r" that open and (\d+) that must not\.", readme)
    assert counts
    assert [int(count) for count in counts.groups()] == [
        len(SCENARIOS), len(REFUSALS), len(QUESTIONS["open"]), len(QUESTIONS["must_not_open"])]
    assert len(SCENARIOS) >= 60
    assert 2 * len(REFUSALS) >= len(SCENARIOS)


def test_vectors_know_only_errors_of_the_table() -> None:
    steps = [step for scenario in SCENARIOS.values() for step in scenario["steps"] if "advance_s" not in step]
    single = {(step["reply"]["error"], step["status"]) for step in steps if "error" in step["reply"]}
    assert single == {(text, status) for text, status in ERRORS if status in {400, 403, 413, 429, 507}
                      and text != "Forbidden"}
    in_batches = {refusal["error"] for step in steps if step["status"] == 200 for refusal in refusals_in(step["reply"])}
    assert in_batches == {"Bad request", "Too often"}


@pytest.mark.parametrize("case", QUESTIONS["open"], ids=lambda case: case["title"])
def test_question_opens_to_its_answer(case: Any) -> None:
    assert QUESTIONS["info"] == CONTEXTS["question"].decode()
    assert open_question(Owner(int(case["private"], 16)), case["question"]) == case["answer"]


@pytest.mark.parametrize("case", QUESTIONS["must_not_open"], ids=lambda case: case["title"])
def test_question_that_is_not_right_does_not_open(case: Any) -> None:
    owner = Owner(int(case["private"], 16))
    with pytest.raises((ValueError, InvalidTag)):
        open_question(owner, case["question"])


SLOWLY = 10  # seconds in which anything here happens, on the slowest machine


# What several tests use ------------------------------------------------------------------


class Client:
    """A connection that stays: requests go out as bytes, replies come back one by one."""

    def __init__(self, port: int, *requests: bytes, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=SLOWLY)
        self.received = self.socket.makefile("rb")
        self.send(*requests)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *requests: bytes) -> None:
        """Send all requests, in one segment if they fit."""
        self.socket.sendall(b"".join(requests))

    def reply(self, with_body: bool = True) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next reply."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.received.readline()
            assert line, "the connection has ended"
            head += line
        status, headers, _ = parse_response(head)
        return status, headers, self.received.read(int(headers.get("content-length", 0))) if with_body else b""

    def answer(self) -> tuple[int, Any]:
        """Return status and parsed JSON of the next reply."""
        status, _, body = self.reply()
        return status, json.loads(body)

    def is_silent(self) -> bool:
        """Return whether nothing has come, not even the end."""
        return not select.select([self.socket], [], [], 0)[0]

    def is_closed(self) -> bool:
        """Wait for what comes next and return whether that is the end."""
        return self.received.read(1) == b""

    def close(self) -> None:
        """Hang up."""
        self.received.close()
        self.socket.close()


def lasting(request: object = None, *headers: str, path: str = "/") -> bytes:
    """Return a request that leaves the connection open: a POST of JSON, or a GET without any."""
    body, method = (b"", "GET") if request is None else (json.dumps(request).encode(), "POST")
    return http_request(body, *headers, method=method, path=path).replace(b"Connection: close\r\n", b"")


def unfinished(size: int) -> bytes:
    """Return a POST that lacks the last hundred of so many bytes of its body."""
    return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + b" " * (size - 100)


def padded(request: object, size: int) -> bytes:
    """Return a request's body, filled up with blanks."""
    return json.dumps(request).encode().ljust(size)


def settle(port: int) -> None:
    """Return when the server has looked at all that had reached it: it turns to each once in a turn."""
    with Client(port) as client:
        for _ in range(2):
            client.send(lasting(None, "Accept: application/json"))
            assert client.reply()[0] == 200


def eventually(condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true in good time."""
    deadline_s = time.monotonic() + SLOWLY
    while not (fulfilled := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return fulfilled


@contextlib.contextmanager
def limited(clock: FakeClock, store: SqliteStore | None = None, /, **limits: int) -> Iterator[RelayServer]:
    """Serve a relay with other limits."""
    relay = Relay(store or SqliteStore(":memory:"), Limits(**limits), clock=clock.clock)
    with contextlib.closing(relay), serving(relay) as server:
        yield server


@contextlib.contextmanager
def hanging_up(clients: list[Client]) -> Iterator[list[Client]]:
    """Close the clients in the end, also those that come later."""
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


@pytest.fixture
def port(relay: Relay) -> Iterator[int]:
    """Return the port of a server in a thread."""
    with serving(relay) as server:
        yield server.server_port


# Reading HTTP ----------------------------------------------------------------------------


def raw(*lines: bytes, first: bytes = b"GET /health HTTP/1.1", body: bytes = b"") -> bytes:
    """Return a request of exactly these lines."""
    return b"\r\n".join((first, b"Host: relay", b"Connection: close", *lines)) + b"\r\n\r\n" + body


TLS_CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(32)) + b"\x20"
RAW_REQUESTS = {
    "plain": (raw(), 200),
    "length": (raw(b"Content-Length: 5", body=b"abcde"), 200),
    "length 0": (raw(b"Content-Length: 0"), 200),
    "length of 9 digits": (raw(b"Content-Length: 000000005", body=b"abcde"), 200),
    "length in blanks": (raw(b"content-LENGTH:\t 5 \t", body=b"abcde"), 200),
    "no blank after colon": (raw(b"Content-Length:5", body=b"abcde"), 200),
    "two lengths": (raw(b"Content-Length: 5", b"Content-Length: 6", body=b"abcdef"), 400),
    "equal lengths": (raw(b"Content-Length: 5", b"Content-Length: 5", body=b"abcde"), 400),
    "lengths in a list": (raw(b"Content-Length: 5, 5", body=b"abcde"), 400),
    "negative length": (raw(b"Content-Length: -5", body=b"abcde"), 400),
    "length with plus": (raw(b"Content-Length: +5", body=b"abcde"), 400),
    "length with underscore": (raw(b"Content-Length: 1_0", body=b"abcdefghij"), 400),
    "hexadecimal length": (raw(b"Content-Length: 0x5", body=b"abcde"), 400),
    "fraction of a length": (raw(b"Content-Length: 5.0", body=b"abcde"), 400),
    "empty length": (raw(b"Content-Length:"), 400),
    "length of 10 digits": (raw(b"Content-Length: 0000000005", body=b"abcde"), 400),
    "length of 20 digits": (raw(b"Content-Length: 18446744073709551621", body=b"abcde"), 400),
    "Arabic digits": (raw("Content-Length: \u0665".encode(), body=b"abcde"), 400),
    "superscript in Latin-1": (raw(b"Content-Length: \xb2", body=b"ab"), 400),
    "9 digits too big": (raw(b"Content-Length: 999999999"), 413),
    "chunked": (raw(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    "chunked and length": (raw(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    "identity": (raw(b"transfer-encoding: identity"), 400),
    "empty transfer encoding": (raw(b"Transfer-Encoding:"), 400),
    "bare LF": (raw(b"A: b\nC: d"), 400),
    "bare LF at the end": (b"GET /health HTTP/1.1\nConnection: close\n\n", 400),
    "LF between the last lines": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\n", 400),
    "bare CR": (raw(b"A: b\rC: d"), 400),
    "bare CR in the first line": (raw(first=b"GET /\rhealth HTTP/1.1"), 400),
    "CR CR LF": (raw(b"A: b\r"), 400),
    "NUL in a value": (raw(b"A: b\0c"), 400),
    "NUL in the target": (raw(first=b"GET /health\0 HTTP/1.1"), 400),
    "control in a value": (raw(b"A: b\x07"), 400),
    "folded header": (raw(b"A: b", b" c"), 400),
    "folded length": (raw(b"Content-Length:", b"\t5", body=b"abcde"), 400),
    "blank before colon": (raw(b"Content-Length : 5", body=b"abcde"), 400),
    "blank in a name": (raw(b"Content Length: 5", body=b"abcde"), 400),
    "no colon": (raw(b"Content-Length"), 400),
    "no name": (raw(b": 5"), 400),
    "bad method": (raw(first=b"GE(T /health HTTP/1.1"), 400),
    "no method": (raw(first=b"/health HTTP/1.1"), 400),
    "blank before the method": (raw(first=b" GET /health HTTP/1.1"), 400),
    "two blanks": (raw(first=b"GET  /health HTTP/1.1"), 400),
    "blank in the target": (raw(first=b"GET /health now HTTP/1.1"), 400),
    "target not in ASCII": (raw(first=b"GET /h\xc3\xa9 HTTP/1.1"), 400),
    "empty line first": (b"\r\n" + raw(), 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/1.2": (raw(first=b"GET /health HTTP/1.2"), 400),
    "HTTP/2.0": (raw(first=b"GET /health HTTP/2.0"), 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http in small letters": (raw(first=b"GET /health http/1.1"), 400),
    "method in small letters": (raw(first=b"get /health HTTP/1.1"), 405),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
    "absolute target": (raw(first=b"GET http://relay.example.com:80/health HTTP/1.1"), 200),
    "absolute target in the middle": (raw(first=b"GET /healthhttp://relay.example.com HTTP/1.1"), 404),
    "absolute target without a path": (raw(first=b"GET https://relay.example.com?a=b HTTP/1.1"), 200),
    "query": (raw(first=b"GET /health?full=1/2?3 HTTP/1.1"), 200),
    "another path": (raw(first=b"GET /healthy HTTP/1.1"), 404),
    "a path below": (raw(first=b"GET /health/ HTTP/1.1"), 404),
    "TLS": (TLS_CLIENT_HELLO, 400),
}


@pytest.mark.parametrize(("octets", "status"), RAW_REQUESTS.values(), ids=RAW_REQUESTS)
def test_a_raw_request_is_answered_once_however_it_comes(port: int, octets: bytes, status: int) -> None:
    # What trails would be a request of its own to a proxy that counts otherwise than we do.
    replies = [exchange(port, octets), exchange(port, octets, piece=1), exchange(port, octets + lasting() * 3)]
    assert replies[1:] == replies[:1] * 2
    got, headers, body = parse_response(replies[0])
    assert (got, headers["connection"], headers["access-control-allow-origin"]) == (status, "close", "*")
    assert int(headers["content-length"]) == len(body)
    if status == 400:
        assert json.loads(body)["error"] == "Bad request"


@pytest.mark.parametrize("octets", [TLS_CLIENT_HELLO, b"GET / HTTP/1.1\n", b"GET /\0", b"GET / HTTP/1.1\rH"])
def test_what_cannot_become_a_request_is_answered_before_it_ends(port: int, octets: bytes) -> None:
    with Client(port, octets) as client:
        assert client.answer() == (400, {"ok": False, "error": "Bad request", "detail": "This is not HTTP/1.1."})
        assert client.is_closed()


@pytest.mark.parametrize("piece", [None, 1_000])
@pytest.mark.parametrize(("size", "status"), [(999, 200), (1_000, 200), (1_001, 431)])
def test_headers_are_taken_up_to_the_limit(clock: FakeClock, size: int, status: int, piece: int | None) -> None:
    request = raw(b"A: " + b"b" * (size - len(raw(b"A: "))))
    assert len(request) == size
    with limited(clock, max_header_bytes=1_000) as server:
        got, _, body = parse_response(exchange(server.server_port, request, piece))
    assert (got, json.loads(body).get("error")) == (status, "Too big" if status == 431 else None)


@pytest.mark.parametrize("piece", [None, 997])
@pytest.mark.parametrize(("size", "status"), [(131_071, 200), (131_072, 200), (131_073, 413)])
def test_bodies_are_taken_up_to_the_limit(
        port: int, alice: Owner, size: int, status: int, piece: int | None) -> None:
    got, reply = post(port, padded(check(alice), size), piece)
    assert (got, reply.get("error")) == (status, "Too big" if status == 413 else None)


@pytest.mark.parametrize(("octets", "status"), [
    (raw(b"A: " + b"b" * 200_000), 431), (http_request(b" " * 1_000_000), 413), (TLS_CLIENT_HELLO * 100, 400),
], ids=["headers", "body", "TLS"])
def test_a_refusal_is_readable_to_whom_sends_everything_first(port: int, octets: bytes, status: int) -> None:
    middle = len(octets) * 9 // 10
    with Client(port, octets[:middle]) as client:
        assert select.select([client.socket], [], [], SLOWLY)[0]
        settle(port)
        client.send(octets[middle:])  # would fail if the relay had closed without reading on
        got, headers, body = client.reply()
        error = "Bad request" if status == 400 else "Too big"
        assert (got, headers["connection"], json.loads(body)["error"]) == (status, "close", error)
        assert client.is_closed()


@pytest.mark.parametrize(("version", "expected"), [(b"1.1", b"HTTP/1.1 100 Continue\r\n\r\n"), (b"1.0", b"")])
def test_a_body_is_asked_for_if_the_client_expects_that(
        port: int, alice: Owner, version: bytes, expected: bytes) -> None:
    body = json.dumps(check(alice)).encode()
    head = http_request(body, "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/" + version)
    with Client(port, head.removesuffix(body)) as client:
        settle(port)
        client.send(body)
        assert client.received.read(len(expected)) == expected  # RFC 9110 10.1.1: HTTP/1.0 knows no such thing
        client.send(body)
        assert client.answer() == (200, NOTHING)


def test_a_body_too_big_is_not_asked_for(port: int) -> None:
    with Client(port, b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 131073\r\n\r\n") as client:
        assert client.answer()[0] == 413
        assert client.is_closed()


# What HTTP answers -----------------------------------------------------------------------

DOCUMENT = {"name", "description", "software", "version", "contact", "limits", "retention", "udp", "stun",
            "notice", "price_url"}


@pytest.mark.parametrize(("headers", "content_type"), [
    ((), "text/html; charset=utf-8"),
    (("Accept: text/html,application/xhtml+xml,*/*;q=0.8",), "text/html; charset=utf-8"),
    (("Accept: application/json",), "application/json"),
    (("accept: text/plain, application/json",), "application/json"),
])
def test_the_relay_introduces_itself_as_is_liked(port: int, headers: tuple[str, ...], content_type: str) -> None:
    with Client(port, lasting(None, *headers), lasting(None, *headers).replace(b"GET", b"HEAD"), lasting()) as client:
        status, head, body = client.reply()
        assert (status, head["content-type"], head["vary"]) == (200, content_type, "Accept")
        if content_type == "application/json":
            assert json.loads(body).keys() >= DOCUMENT
        else:
            assert body.startswith(b"<!DOCTYPE html>")
        # HEAD has the same head and no body: the next reply follows at once.
        assert client.reply(with_body=False) == (200, head, b"")
        assert client.reply()[2].startswith(b"<!DOCTYPE html>")


def test_health_is_told_with_and_without_body(port: int) -> None:
    get = lasting(path="/health")
    with Client(port, get.replace(b"GET", b"HEAD"), get) as client:
        status, head, _ = client.reply(with_body=False)
        assert (status, head["content-type"]) == (200, "application/json")
        got, same_head, body = client.reply()
        assert (got, same_head, json.loads(body)) == (200, head, {"ok": True})


def test_errors_after_a_head_have_their_body(port: int) -> None:
    with Client(port, lasting().replace(b"GET", b"HEAD"), b"nonsense\r\n\r\n") as client:
        assert client.reply(with_body=False)[0] == 200
        assert client.answer()[0] == 400


@pytest.mark.parametrize(("first", "status", "error", "allow"), [
    ("GET /nowhere", 404, "Not found", None),
    ("POST /nowhere", 404, "Not found", None),
    ("PUT /", 405, "Not allowed", {"GET", "HEAD", "POST", "OPTIONS"}),
    ("BREW /", 405, "Not allowed", {"GET", "HEAD", "POST", "OPTIONS"}),
    ("POST /health", 405, "Not allowed", {"GET", "HEAD", "OPTIONS"}),
])
def test_wrong_paths_and_methods_are_refused_without_harm(
        port: int, first: str, status: int, error: str, allow: set[str] | None) -> None:
    method, path = first.split()
    request = http_request(b"{}", method=method, path=path).replace(b"Connection: close\r\n", b"")
    with Client(port, request, lasting(path="/health")) as client:
        got, headers, body = client.reply()
        assert (got, json.loads(body)) == (status, {"ok": False, "error": error})
        assert (set(headers["allow"].split(", ")) if "allow" in headers else None) == allow
        assert client.answer() == (200, {"ok": True})


def test_browsers_may_ask_from_anywhere(port: int) -> None:
    preflight = lasting(None, "Origin: https://app.example.com", "Access-Control-Request-Method: POST")
    with Client(port, preflight.replace(b"GET", b"OPTIONS"), lasting(path="/health")) as client:
        assert client.reply() == (204, {
            "access-control-allow-origin": "*", "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": "Content-Type", "access-control-max-age": "86400"}, b"")
        assert client.answer() == (200, {"ok": True})


@pytest.mark.parametrize(("limits", "expected", "may_retry"), [
    ({}, (403, "Wrong answer"), False),
    ({"max_body_bytes": 100}, (413, "Too big"), False),
    ({"rate": 1}, (429, "Too often"), True),
    ({"max_bytes": 1}, (507, "Full"), True),
])
def test_errors_say_in_the_header_too_when_to_retry(
        clock: FakeClock, alice: Owner, limits: dict[str, int], expected: tuple[int, str], may_retry: bool) -> None:
    with limited(clock, **limits) as server, Client(server.server_port) as client:
        for request in (send(alice), receive(alice, "wrong")):
            client.send(lasting(request))
            status, headers, body = client.reply()
            if status != 200:
                break
        reply = json.loads(body)
        assert (status, reply["error"], reply["ok"]) == (*expected, False)
        assert headers["access-control-allow-origin"] == "*"
        assert headers["content-type"] == "application/json"
        assert headers.get("retry-after") == (str(reply["retry"]) if may_retry else None)
        assert "retry" in reply or not may_retry


@pytest.mark.parametrize("piece", [None, 1, 50])
def test_requests_in_a_row_are_answered_in_order(port: int, alice: Owner, piece: int | None) -> None:
    requests = [lasting(path="/health"), lasting(check(alice)), lasting(send(alice)), lasting(check(alice)),
                lasting([check(alice), 7]), lasting().replace(b"GET", b"OPTIONS"), http_request(b"{")]
    octets = exchange(port, b"".join(requests), piece)
    replies = [parse_response(b"HTTP/1.1 " + part) for part in octets.split(b"HTTP/1.1 ")[1:]]
    assert [status for status, _, _ in replies] == [200, 200, 200, 200, 200, 204, 400]
    bodies = [json.loads(body) for status, _, body in replies if status != 204]
    assert bodies[:3] == [{"ok": True}, NOTHING, {"ok": True}]
    question = bodies[3].pop("question")
    assert bodies[3] == {"ok": True, "found": True}
    assert bodies[4] == [{"ok": True, "found": True, "question": question}, {**bodies[4][1], "error": "Bad request"}]
    assert [headers.get("connection") for _, headers, _ in replies] == [None] * 6 + ["close"]


def test_a_small_reply_is_one_segment(port: int, alice: Owner) -> None:
    with Client(port) as client:
        for request in (check(alice), send(alice), check(alice), {}):
            client.send(lasting(request))
            client.reply()
        tcp_info = client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(tcp_info) < 156:
        pytest.skip("this kernel does not count segments")
    assert struct.unpack_from("I", tcp_info, 152) == (4,)  # tcpi_data_segs_in of linux/tcp.h


# Time-outs -------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_that_do_not_end_are_refused(clock: FakeClock) -> None:
    halves = [b"G", lasting()[:-2], unfinished(100), unfinished(70_000), lasting()[:20]]
    with limited(clock, request_timeout_s=1) as server, hanging_up([]) as clients:
        clients.extend(Client(server.server_port, half) for half in halves * 2)
        for client in (clients[4], clients[9]):  # a second request is no other than the first
            client.send(lasting()[20:], lasting()[:20])
            assert client.reply()[0] == 200
        deadline_s = time.monotonic() + SLOWLY
        trickling = {client.socket for client in clients[5:]}
        while trickling and time.monotonic() < deadline_s:
            for trickle in trickling:
                trickle.send(b"x")
            trickling -= set(select.select(trickling, [], [], 0.05)[0])
        for client in clients:
            status, headers, body = client.reply()
            assert (status, json.loads(body), headers["connection"]) == (
                408, {"ok": False, "error": "Too slow", "detail": "A request may take 1 s."}, "close")
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
    with limited(clock, **limits) as server, Client(server.server_port, lasting(check(alice, wait=2))) as client:
        assert client.answer() == (200, NOTHING)


@pytest.mark.slow
def test_a_client_that_takes_no_reply_is_let_go(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    limits = {"rate": 0, "max_connections_per_source": 2, "idle_timeout_s": 1, "request_timeout_s": 1}
    with limited(clock, **limits) as server:
        for _ in range(16):
            server.relay.handle(send(alice, "QUJD" * 8_192), "192.0.2.1")
        request = lasting(receive(alice, answer_of(server.relay, alice), limit=100))
        with Client(server.server_port, request * 30) as client:  # 15 MiB are more than sockets hold
            assert select.select([client.socket], [], [], SLOWLY)[0]
            with Client(server.server_port) as other:

                def has_room() -> bool:
                    other.send(lasting(check(bob)))  # served all the time, so it keeps its place
                    assert other.answer() == (200, NOTHING)
                    return post(server.server_port, check(bob)) == (200, NOTHING)

                assert not has_room()
                assert eventually(has_room)
            taken = b""
            with contextlib.suppress(ConnectionError):
                taken = client.received.read()
            assert len(taken) < 30 * 512 * 1_024  # cut off in the middle


# Parking ---------------------------------------------------------------------------------


def threads_of(process: Process) -> int:
    """Return how many threads a process has."""
    match = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{process.popen.pid}/status").read_text())
    assert match
    return int(match[1])


@pytest.mark.slow
def test_unfinished_requests_cost_no_thread_and_delay_nobody(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:", "--max-connections-per-source", "0", "--request-timeout", "120",
                    "--rate", "0", "--udp")
    assert post(process.port, check(alice)) == (200, NOTHING)
    threads = threads_of(process)
    request = lasting(check(alice))
    with hanging_up([Client(process.port, request[:20 + n % (len(request) - 20)]) for n in range(600)]) as clients:
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
    with hanging_up([Client(process.port, lasting(check(alice, wait=60))) for _ in range(200)]) as clients:
        settle(process.port)
        assert all(client.is_silent() for client in clients)
        assert threads_of(process) == threads
        assert post(process.port, send(alice)) == (200, {"ok": True})
        answers = [client.answer() for client in clients]
    assert {(status, reply["found"]) for status, reply in answers} == {(200, True)}
    assert process.stop()[0] == 0


@pytest.mark.slow
def test_a_process_that_is_stopped_answers_the_waiting(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:")
    with Client(process.port, lasting(check(alice, wait=60))) as waiting, Client(process.port) as idle:
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
        for _ in range(2):  # being refused takes no place
            with Client(server.server_port, request) as refused:
                status, headers, body = refused.reply()
                reply = json.loads(body)
                assert (status, reply["error"], reply["retry"]) == (503, "Busy", int(headers["retry-after"]))
                assert headers["access-control-allow-origin"] == "*"
                assert refused.is_closed()
        clients.pop().close()
        assert eventually(lambda: post(server.server_port, check(alice)) == (200, NOTHING))
        clients[0].send(request)
        assert clients[0].answer() == (200, NOTHING)


def test_a_limit_of_0_is_none(clock: FakeClock, alice: Owner) -> None:
    limits = {"max_connections": 0, "max_connections_per_source": 0, "max_waiting": 0}
    with limited(clock, **limits) as server, hanging_up([]) as clients:
        clients.extend(Client(server.server_port, lasting(check(alice, wait=60))) for _ in range(300))
        settle(server.server_port)
        assert all(client.is_silent() for client in clients)


def test_a_source_at_its_limit_leaves_room_for_another(clock: FakeClock, alice: Owner) -> None:
    request = lasting(check(alice))
    with (limited(clock, max_connections_per_source=1) as server, Client(server.server_port, request) as client,
          socket.create_connection(("127.0.0.1", server.server_port), SLOWLY, ("127.0.0.2", 0)) as other):
        assert client.answer() == (200, NOTHING)
        assert post(server.server_port, check(alice))[0] == 503
        other.sendall(request)
        assert other.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


class StuckStore(SqliteStore):
    """A store whose disk takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.stuck, self.free = threading.Semaphore(0), threading.Event()
        self.boxes: list[bytes] = []  # in the order in which their turn came

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message, when the disk is free again."""
        self.boxes.append(message.box)
        self.stuck.release()
        assert self.free.wait(SLOWLY)
        return super().put(message, limits, now_us)


def test_the_queue_is_limited_while_checks_go_on(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    store, queued = StuckStore(), 2
    with limited(clock, store, max_queued=queued) as server, hanging_up([]) as clients:
        for _ in range(POOL_THREADS):
            clients.append(Client(server.server_port, lasting(send(alice))))
            assert store.stuck.acquire(timeout=SLOWLY)
        for _ in range(queued):
            clients.append(Client(server.server_port, lasting(send(alice))))
            settle(server.server_port)
        assert all(client.is_silent() for client in clients)
        status, reply = post(server.server_port, send(alice))
        assert (status, reply["error"], reply["retry"] > 0) == (503, "Busy", True)
        assert post(server.server_port, check(bob)) == (200, NOTHING)
        store.free.set()
        assert [client.answer() for client in clients] == [(200, {"ok": True})] * (POOL_THREADS + queued)
        assert post(server.server_port, send(bob)) == (200, {"ok": True})


def test_sources_take_turns_and_have_their_share_of_a_full_queue(
        clock: FakeClock, alice: Owner, bob: Owner) -> None:
    store, queued = StuckStore(), 100
    with limited(clock, store, max_queued=queued) as server, hanging_up([]) as clients:
        for _ in range(POOL_THREADS):
            clients.append(Client(server.server_port, lasting(send(alice))))
            assert store.stuck.acquire(timeout=SLOWLY)
        clients.extend(Client(server.server_port, lasting(send(alice))) for _ in range(queued))
        settle(server.server_port)
        assert post(server.server_port, send(alice))[0] == 503
        with contextlib.ExitStack() as held:
            others = [held.enter_context(socket.create_connection(
                ("127.0.0.1", server.server_port), SLOWLY, ("127.0.0.2", 0))) for _ in range(queued // 2 + 1)]
            for other in others[:-1]:
                other.sendall(lasting(send(bob)))
            settle(server.server_port)
            others[-1].sendall(lasting(send(bob)))
            assert others[-1].recv(100).startswith(b"HTTP/1.1 503 ")  # a half of the places is its share
            store.free.set()
            statuses = {other.recv(100)[:12] for other in others[:-1]}
            assert statuses == {b"HTTP/1.1 200", b"HTTP/1.1 429"}  # of these a part is over its part of the box
        # Whoever is late waits for one of the other's at a time (and for those that the threads have taken).
        assert store.boxes[:-2].index(bob.box) <= POOL_THREADS + 1
        assert store.boxes[:2 * POOL_THREADS + queued].count(bob.box) >= queued // 2 - POOL_THREADS
        assert {client.answer()[0] for client in clients} <= {200, 429}


def test_requests_that_came_with_others_are_counted_as_memory(clock: FakeClock, alice: Owner) -> None:
    with limited(clock, max_buffered_bytes=SOURCE_SHARE * 10_000) as server:
        request = lasting(check(alice))
        few, many = 9_000 // len(request), 30_000 // len(request)
        assert exchange(server.server_port, request * few + http_request(json.dumps(
            check(alice)).encode())).count(b"HTTP/1.1 200 OK") == few + 1
        with Client(server.server_port, request * many) as client:
            assert client.answer()[0] == 503
            assert client.is_closed()


def test_a_connection_that_comes_as_the_server_stops_ends_nothing(relay: Relay, alice: Owner) -> None:
    ticking, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        ticking.set()
        assert go_on.wait(SLOWLY)

    with RelayServer(("127.0.0.1", 0), relay, on_tick=wait) as server:
        failures: list[BaseException] = []
        thread = threading.Thread(target=lambda: failures.extend(raised_by(server.serve_forever)))
        thread.start()
        assert ticking.wait(SLOWLY)
        server.stop()  # both are found in the same turn
        with Client(server.server_port, lasting(check(alice))):
            go_on.set()
            thread.join(SLOWLY)
        assert (thread.is_alive(), failures) == (False, [])


@pytest.mark.parametrize("request_of", [check, send])
def test_the_last_reply_arrives_although_more_was_sent(
        clock: FakeClock, alice: Owner, request_of: Callable[[Owner], dict[str, Any]]) -> None:
    with limited(clock) as server:
        octets = http_request(json.dumps(request_of(alice)).encode()) + b"\r\n" * 45_000  # nobody reads so much
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.server_port), SLOWLY) as client:
                client.sendall(octets)
                assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_the_last_reply_arrives_although_an_empty_line_came_meanwhile(clock: FakeClock, alice: Owner) -> None:
    store = StuckStore()  # old clients send one behind a body
    with (limited(clock, store) as server,
          socket.create_connection(("127.0.0.1", server.server_port), SLOWLY) as client):
        client.sendall(http_request(json.dumps(send(alice)).encode()))
        assert store.stuck.acquire(timeout=SLOWLY)
        client.sendall(b"\r\n")
        store.free.set()
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_the_queue_has_a_bound_for_however_many_sources(clock: FakeClock, alice: Owner) -> None:
    store, queued = StuckStore(), 4
    with limited(clock, store, max_queued=queued) as server, contextlib.ExitStack() as held:
        for number in range(POOL_THREADS + 3 * queued):
            client = held.enter_context(socket.create_connection(
                ("127.0.0.1", server.server_port), SLOWLY, (f"127.0.0.{2 + number}", 0)))
            client.sendall(lasting(send(alice)))
            if number < POOL_THREADS:
                assert store.stuck.acquire(timeout=SLOWLY)
            elif number >= POOL_THREADS + 2 * queued:
                assert client.recv(100).startswith(b"HTTP/1.1 503 ")
            else:
                settle(server.server_port)
        store.free.set()


@pytest.mark.slow
def test_who_asks_again_and_again_and_reads_nothing_is_timed_out(clock: FakeClock, alice: Owner) -> None:
    with limited(clock, idle_timeout_s=1) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect(("127.0.0.1", server.server_port))
        client.sendall(lasting(send(alice)) + b"GET / HTTP/1.1\r\n\r\n" * 2_500)
        assert eventually(lambda: b"\nconnectoid_connections 1\n" in exchange(  # the one that asks for this
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
    with limited(clock, max_buffered_bytes=SOURCE_SHARE * 3 * size) as server, hanging_up([]) as clients:
        clients.extend(Client(server.server_port, unfinished(size)) for _ in range(6))
        assert eventually(lambda: sum(not client.is_silent() for client in clients) >= 3)
        settle(server.server_port)
        kept = [client for client in clients if client.is_silent()]
        assert 2 <= len(kept) <= 3
        for client in clients:
            if client not in kept:
                status, headers, body = client.reply()
                reply = json.loads(body)
                assert (status, reply["error"], headers["retry-after"]) == (503, "Busy", str(reply["retry"]))
                assert client.is_closed()
        # What one source holds takes nothing from another.
        halves = http_request(padded(check(bob), size))
        with socket.create_connection(("127.0.0.1", server.server_port), 10, source_address=("127.0.0.2", 0)) as other:
            other.sendall(halves[:size // 2])
            settle(server.server_port)
            other.sendall(halves[size // 2:])
            assert other.recv(12) == b"HTTP/1.1 200"
        for client in kept:
            client.close()
        whole = padded(check(bob), size)
        assert eventually(lambda: post(server.server_port, whole) == (200, NOTHING))


@pytest.mark.parametrize("piece", [None, 100])
def test_memory_is_counted_only_while_it_is_used(clock: FakeClock, alice: Owner, piece: int | None) -> None:
    # One request fits, so any number of them does, one after the other; and in pieces it is no longer.
    with limited(clock, max_buffered_bytes=SOURCE_SHARE * 100_000) as server:
        body = padded(check(alice), 60_000)
        assert [post(server.server_port, body, piece) for _ in range(10)] == [(200, NOTHING)] * 10


# Long polls ------------------------------------------------------------------------------


def test_a_wait_is_ended_by_a_message(port: int, alice: Owner) -> None:
    with Client(port, lasting(check(alice, wait=60))) as client:
        settle(port)
        assert client.is_silent()
        assert post(port, send(alice)) == (200, {"ok": True})
        status, reply = client.answer()
        assert (status, reply.keys(), reply["found"]) == (200, {"ok", "found", "question"}, True)
        assert len(alice.open(reply["question"])) >= 43  # 256 bits
        client.send(lasting(check(alice, at=2**62)))  # the connection lives on
        assert client.answer() == (200, NOTHING)


def test_a_wait_for_what_is_there_is_none(port: int, alice: Owner) -> None:
    post(port, send(alice))
    assert post(port, check(alice, wait=60))[1]["found"] is True


@pytest.mark.slow
@pytest.mark.parametrize("request_of", [
    lambda alice, bob: check(alice, wait=1),
    lambda alice, bob: [check(alice, wait=60), check(bob, wait=1), check(alice, wait=30)],
], ids=["single", "smallest of a batch"])
def test_a_wait_ends_in_time(port: int, alice: Owner, bob: Owner, request_of: Callable[..., object]) -> None:
    request = request_of(alice, bob)
    assert post(port, request) == (200, [NOTHING] * 3 if isinstance(request, list) else NOTHING)


@pytest.mark.slow
def test_a_wait_ends_in_time_however_often_it_is_woken(clock: FakeClock, alice: Owner) -> None:
    request = lasting(check(alice, at=START_US + 10**12, wait=1))
    with (limited(clock, rate=0, max_box_messages=10_000) as server, Client(server.server_port, request) as client):
        deadline_s = time.monotonic() + SLOWLY
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
    assert (status, [reply["found"] for reply in replies]) == (200, [n == woken_by for n in range(3)])


def test_a_wait_goes_on_after_a_message_that_is_not_newer(port: int, clock: FakeClock, alice: Owner) -> None:
    with Client(port, lasting(check(alice, at=START_US + 1_000_000_000, wait=60))) as client:
        settle(port)
        for _ in range(3):
            post(port, send(alice))
            post(port, send(Owner(3)))  # when this is answered, the wait has been looked at
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


def test_waits_are_limited_and_end_at_once_beyond(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    with limited(clock, max_waiting=3) as server, hanging_up([]) as clients:
        for _ in range(3):
            clients.append(Client(server.server_port, lasting(check(alice, wait=60))))
            settle(server.server_port)
        assert all(client.is_silent() for client in clients)
        assert post(server.server_port, check(bob, wait=60)) == (200, NOTHING)  # far from a minute later
        post(server.server_port, send(alice))
        assert [client.answer()[1]["found"] for client in clients] == [True] * 3


def test_a_batch_takes_a_place_for_each_of_its_boxes(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    with limited(clock, max_waiting=1) as server:
        assert post(server.server_port, [check(alice, wait=60), check(bob, wait=60)]) == (200, [NOTHING] * 2)
        with Client(server.server_port, lasting([check(alice, wait=60)] * 2)) as client:
            settle(server.server_port)
            post(server.server_port, send(alice))
            assert [reply["found"] for reply in client.answer()[1]] == [True] * 2


def test_who_hangs_up_leaves_his_place(clock: FakeClock, alice: Owner, bob: Owner) -> None:
    with limited(clock, rate=0, max_waiting=1) as server, hanging_up([]) as clients:
        Client(server.server_port, lasting(check(alice, wait=60))).close()

        def waits() -> bool:
            clients.append(Client(server.server_port, lasting(check(bob, wait=60))))
            settle(server.server_port)
            return clients[-1].is_silent()

        assert eventually(waits)
        post(server.server_port, send(bob))
        assert clients[-1].answer()[1]["found"] is True


@pytest.mark.slow
def test_no_message_between_look_and_wait_is_missed(clock: FakeClock) -> None:
    """Each of many pairs has a box a round, waits and sends at the same moment; a miss would last a minute."""
    pairs, rounds = 6, 40

    def ask(connection: http.client.HTTPConnection, request: object) -> Any:
        connection.request("POST", "/", json.dumps(request))
        return json.loads(connection.getresponse().read())

    with limited(clock, rate=0) as server:
        def connect() -> http.client.HTTPConnection:
            return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=SLOWLY)

        def wait_for_all(pair: int, together: threading.Barrier) -> list[bool]:
            found = []
            with contextlib.closing(connect()) as connection:
                for number in range(rounds):
                    boxes = [Owner(1_000 + pair * rounds + number), Owner(1)]  # of the other no message comes
                    request = [check(owner, wait=60) for owner in boxes] if pair % 2 else check(boxes[0], wait=60)
                    together.wait(SLOWLY)
                    reply = ask(connection, request)
                    found.append(reply[0]["found"] if pair % 2 else reply["found"])
            return found

        def send_all(pair: int, together: threading.Barrier) -> list[bool]:
            delays = random.Random(pair)
            with contextlib.closing(connect()) as connection:
                sent = []
                for number in range(rounds):
                    together.wait(SLOWLY)
                    for _ in range(delays.randrange(4)):  # requests rather than sleeps
                        ask(connection, check(Owner(2)))
                    sent.append(ask(connection, send(Owner(1_000 + pair * rounds + number)))["ok"])
            return sent

        barriers = [threading.Barrier(2) for _ in range(pairs)]
        with ThreadPoolExecutor(2 * pairs) as pool:
            outcomes = [pool.submit(body, pair, barrier) for pair, barrier in enumerate(barriers)
                        for body in (wait_for_all, send_all)]
            assert [outcome.result() for outcome in outcomes] == [[True] * rounds] * (2 * pairs)


# The server as an object -----------------------------------------------------------------


@pytest.mark.slow
def test_shutdown_answers_who_waits_and_lets_go_of_the_others(relay: Relay, alice: Owner) -> None:
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
        with contextlib.suppress(ConnectionResetError):  # bytes of it were not read
            assert half.is_closed()
    with pytest.raises(ConnectionRefusedError):
        Client(server.server_port)


def test_shutdown_waits_for_what_is_under_way(clock: FakeClock, alice: Owner) -> None:
    store = StuckStore()
    with limited(clock, store) as server, Client(server.server_port, lasting(send(alice))) as client:
        assert store.stuck.acquire(timeout=SLOWLY)
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
            thread.join(SLOWLY)
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
def test_ipv6_is_served_and_ipv4_with_it(relay: Relay, alice: Owner, listens_on: str, hosts: list[str]) -> None:
    with running(ipv6_server(listens_on, relay)) as server:
        for host in hosts:
            with Client(server.server_port, lasting(check(alice)), host=host) as client:
                assert client.answer() == (200, NOTHING)
            assert over_udp(server.server_port, check(alice), host=host) == [NOTHING]


def test_ipv4_clients_of_a_dual_stack_server_count_as_ipv4(clock: FakeClock, alice: Owner) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(max_connections_per_source=1), clock=clock.clock)
    with contextlib.closing(relay), running(ipv6_server("", relay)) as server:
        hosts = ("127.0.0.1", "::1")  # mapped, both would be in ::/64
        clients = [Client(server.server_port, lasting(check(alice)), host=host) for host in hosts]
        with hanging_up(clients):
            assert [client.answer() for client in clients] == [(200, NOTHING)] * 2


# UDP -------------------------------------------------------------------------------------

LAST = check(Owner(99), id="-last_one-")


def over_udp(port: int, *datagrams: bytes | object, host: str = "127.0.0.1") -> list[Any]:
    """Send datagrams, and one that is answered; return the replies up to then, silence being none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    replies: list[Any] = []
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(SLOWLY)
        client.connect((host, port))
        for datagram in (*datagrams, LAST):
            client.send(datagram if isinstance(datagram, bytes) else json.dumps(datagram).encode())
        while not replies or replies[-1] != {**NOTHING, "id": LAST["id"]}:
            replies.append(json.loads(client.recv(65_536)))
    return replies[:-1]


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


@pytest.mark.parametrize("given_id", ["", "a" * 17, "a b", "a\n", "\u00e9", "a=", 7, 1.5, None, True, ["a"], {}])
def test_udp_does_not_reply_to_a_bad_id(udp_port: int, alice: Owner, given_id: object) -> None:
    assert over_udp(udp_port, check(alice, id=given_id)) == []


@pytest.mark.parametrize("members", [
    {"ext": "key"}, {"ext": 7}, {"ext": "x" * 1_500}, {"wait": 60}, {"wait": -1}, {"wait": None},
    {"at": 2**70}, {"more": [1, 2]},
], ids=repr)
def test_udp_checks_ignore_what_they_do_not_use(udp_port: int, alice: Owner, members: dict[str, Any]) -> None:
    assert over_udp(udp_port, {**check(alice), **members}) == [NOTHING]


def test_udp_replies_to_nothing_but_checks(udp_port: int, relay: Relay, alice: Owner, bob: Owner) -> None:
    post(udp_port, send(alice))
    whole = check(alice)
    assert over_udp(
        udp_port, send(bob), receive(alice, answer_of(relay, alice)), [whole], {}, 7, b"", b"{}", b"nonsense",
        {**whole, "action": "Check"}, {**whole, "pub": alice.pub[:-1]}, {"action": "check"}, {"pub": alice.pub},
        *({**whole, "at": at} for at in (-1, 1.0, True, None, "0")),
        b"\xef\xbb\xbf" + json.dumps(whole).encode(), json.dumps(whole).encode()[:-1],
        json.dumps(whole).encode("utf-16"), http_request(json.dumps(whole).encode()),
    ) == []
    assert over_udp(udp_port, check(bob)) == [NOTHING]  # send has kept nothing


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
    for _ in range(40):  # in parts, which a socket's buffer holds
        junk = [chance.randbytes(chance.choice((0, 1, 20, 100, 1_400, 9_000))) for _ in range(25)]
        cut = [whole[:chance.randrange(len(whole))] + chance.randbytes(chance.randrange(9)) for _ in range(25)]
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
        assert relay.handle(check(Owner(1)), "192.0.2.1") == (200, NOTHING)  # counted apart


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
        relay: Relay, clock: FakeClock, alice: Owner, ask: Callable[[Relay, object], object]) -> None:
    relay.handle(send(alice), "192.0.2.1")
    relay.handle(receive(alice, answer_of(relay, alice)), "192.0.2.1")
    relay.sweep()
    for _ in range(3):
        clock.advance(20 * 86_400)  # of 30 days
        assert ask(relay, check(alice)) is not None
        relay.sweep()
    expires_us = relay.store.look(alice.box, 0, relay.now_us()).box_expires_us
    assert expires_us is not None
    assert expires_us >= relay.now_us() + 30 * 86_400 * 1_000_000


@pytest.mark.parametrize(("size", "replies"), [(2_047, [NOTHING]), (2_048, [NOTHING]), (2_049, [])])
def test_a_datagram_has_a_largest_size(udp_port: int, alice: Owner, size: int, replies: list[Any]) -> None:
    assert over_udp(udp_port, padded(check(alice), size)) == replies


def test_two_connection_headers_count_both(port: int) -> None:
    request = http_request(b"", "Connection: keep-alive", method="GET", path="/health")
    assert parse_response(exchange(port, request))[1]["connection"] == "close"


PROGRAM = "connectoid_relay.py"
DEADLINE_S = 30.0  # for whatever must come, on the slowest machine
ROOMY = Limits(rate=0, max_box_messages=10**6, max_box_bytes=10**9)
ROOMY_FLAGS = ("--rate", "0", "--max-box-messages", "1000000", "--max-box-bytes", "1000000000")
BIG = "QUJD" * 8_000  # data of 32,000 characters
HOUR_S = 3_600


def page(port: int, owner: Owner, at: int = 0) -> list[tuple[int, str]]:
    """Return (at, data) of all that is newer than `at`, as its owner gets it over HTTP."""
    found: list[tuple[int, str]] = []
    _, reply = post(port, check(owner, at))
    answer = owner.open(reply["question"]) if reply["found"] else None
    while answer:
        status, reply = post(port, receive(owner, answer, at=found[-1][0] if found else at, limit=100))
        assert status == 200
        if "messages" not in reply:
            assert reply == NOTHING
            break
        found += [(message["at"], message["data"]) for message in reply["messages"]]
    return found


def messages_of(relay: Relay, owner: Owner, at: int = 0) -> list[tuple[int, str]]:
    """Return (at, data) of at most 100 messages newer than `at`, as their owner gets them."""
    status, reply = relay.handle(check(owner, at), SOURCE)
    assert status == 200
    assert isinstance(reply, dict)
    if not reply["found"]:
        return []
    status, reply = relay.handle(receive(owner, owner.open(reply["question"]), at=at, limit=100), SOURCE)
    assert status == 200
    assert isinstance(reply, dict)
    return [(message["at"], message["data"]) for message in reply["messages"]]


def assert_increasing(found: Sequence[tuple[int, str]]) -> None:
    """Have `at` strictly increase."""
    assert all(earlier[0] < later[0] for earlier, later in itertools.pairwise(found))


@contextlib.contextmanager
def relay_on(path: Path, clock: FakeClock, limits: Limits | None = None) -> Iterator[Relay]:
    """Open a relay on a file, and close it."""
    relay = Relay(SqliteStore(str(path)), limits, clock=clock.clock)
    try:
        yield relay
    finally:
        relay.close()


def run_relay(*flags: str, cwd: Path, program: Path = ROOT / PROGRAM,
              **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the relay until it leaves by itself."""
    return subprocess.run([sys.executable, str(program), *flags], cwd=cwd, capture_output=True, text=True,
                          timeout=DEADLINE_S, check=False, **options)


def assert_fails_with_one_line(finished: subprocess.CompletedProcess[str], *words: str) -> None:
    """Have a run that failed say why in one line for people."""
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("connectoid relay: ")
    assert finished.stderr.count("\n") == 1
    for word in words:
        assert word in finished.stderr


def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Ask again and again until it is so."""
    give_up_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < give_up_s, "it never came to that"
        time.sleep(0.01)


def trace_in(directory: Path, octets: bytes) -> list[str]:
    """Return the names of the files that hold the octets."""
    return sorted(path.name for path in directory.iterdir() if octets in path.read_bytes())


# ---------------------------------------------------------------------------------------
# Faults of the store: kills, full and read-only disks, damaged and foreign files, clocks
# that step, several relays on one file, and what stays in the files when it should not.
# ---------------------------------------------------------------------------------------


def send_until_killed(port: int, owner: Owner, texts: Iterator[str], counted: queue.SimpleQueue[str]) -> list[str]:
    """Send one text after the other; return those that were acknowledged."""
    acknowledged: list[str] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        for text in texts:
            connection.request("POST", "/", json.dumps(send(owner, text)))
            reply = json.loads(connection.getresponse().read())
            assert reply == OK
            acknowledged.append(text)
            counted.put(text)
    return acknowledged


def texts_of(name: str) -> Iterator[str]:
    """Return numbered texts of 32 KB, so that the WAL is emptied now and then and kills hit that too."""
    return (f"{name}n{number:05d}" + "A" * 32_000 for number in itertools.count())


def load_and_kill(process: Process, owners: Sequence[Owner], name: str, kill_after: int) -> list[list[str]]:
    """Kill a relay after so many messages of six senders; return what each got acknowledged."""
    counted: queue.SimpleQueue[str] = queue.SimpleQueue()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        senders = [pool.submit(send_until_killed, process.port, owners[sender % len(owners)],
                               texts_of(f"{name}s{sender}"), counted) for sender in range(6)]
        for _ in range(kill_after):
            counted.get(timeout=DEADLINE_S)
        process.popen.kill()
        return [sender.result() for sender in senders]


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["full", "normal"])
def test_kill_under_load_loses_no_acknowledged_message(sync: str, start: Callable[..., Process], tmp_path: Path,
                                                       alice: Owner, bob: Owner) -> None:
    owners, chance = (alice, bob), random.Random(sync)
    flags = ("--sync", sync, "--db", "relay.db", *ROOMY_FLAGS)
    acknowledged: list[list[list[str]]] = [[], []]  # for each owner, for each sender of a round, its texts
    before: list[list[tuple[int, str]]] = [[], []]
    for turn in range(5):
        lists = load_and_kill(start(*flags), owners, f"r{turn}", chance.randrange(20, 400))
        for number in range(2):
            acknowledged[number] += lists[number::2]
        process = start(*flags)
        for number, owner in enumerate(owners):
            found = page(process.port, owner)
            assert_increasing(found)
            assert found[:len(before[number])] == before[number]
            for texts in acknowledged[number]:
                kept = set(texts)
                assert [text for _, text in found if text in kept] == texts  # all, once, in their order
            before[number] = found
        assert process.stop() == (0, "")
    store = SqliteStore(str(tmp_path / "relay.db"))
    assert store.messages(alice.box, 0, 1, 0) == before[0][:1]
    store.close()


def test_file_whose_checkpoint_was_cut_off_opens_with_all_messages(tmp_path: Path, bob: Owner) -> None:
    whole, torn = tmp_path / "whole.db", tmp_path / "torn.db"
    store = SqliteStore(str(whole))
    for _ in range(30):
        store.put(Message(bob.box, "A" * 32_000, b"source", 10**9), Limits(), START_US)
    before, wal = whole.read_bytes(), (tmp_path / "whole.db-wal").read_bytes()
    store.close()
    after = whole.read_bytes()
    assert len(before) < len(after)
    # The first page has got there, which tells of many more; the others are in the WAL alone.
    torn.write_bytes(after[:4_096] + before[4_096:])
    (tmp_path / "torn.db-wal").write_bytes(wal)
    store = SqliteStore(str(torn))
    assert len(store.messages(bob.box, 0, 100, START_US)) == 16  # half a MiB of them
    assert store.look(bob.box, START_US + 28, START_US).found
    store.close()


# Kills a fork at every call that opening a new store makes, and opens the file again.
KILL_AT_EVERY_CALL = """
    import os, pathlib, signal, sys
    from connectoid_relay import Limits, Message, SqliteStore

    def die_at(moment):
        left = [moment]
        def count(frame, event, argument):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    for moment in range(1, 100_000):
        child = os.fork()
        if not child:
            sys.setprofile(die_at(moment))
            SqliteStore("relay.db")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        store = SqliteStore("relay.db")
        at = store.put(Message(b"box", "QUJD", b"source", 10**9), Limits(), 10**15)
        assert store.messages(b"box", 0, 10, 10**15) == [(at, "QUJD")]
        store.close()
        for path in pathlib.Path().iterdir():
            path.unlink()
        if not killed:
            break
    print(moment - 1)
"""


@pytest.mark.slow
def test_kill_at_every_call_of_the_first_start_leaves_a_file_that_opens(tmp_path: Path) -> None:
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(KILL_AT_EVERY_CALL)], cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                              timeout=300, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert int(finished.stdout) > 50  # so many moments, the making of each table among them


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "-lock", "-wal", "-shm", "-reserve"])
def test_kill_when_a_file_appears_lets_the_next_start_work(suffix: str, start: Callable[..., Process], tmp_path: Path,
                                                           alice: Owner) -> None:
    command = [sys.executable, str(ROOT / PROGRAM), "--port", "0", "--db", "relay.db"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        until((tmp_path / f"relay.db{suffix}").exists)
        first.kill()
    process = start("--db", "relay.db")
    assert process.port, process.first_line
    assert post(process.port, send(alice)) == (200, OK)
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]
    assert process.stop() == (0, "")


@contextlib.contextmanager
def disk_of(megabytes: int, directory: Path) -> Iterator[Path]:
    """Mount a disk of so many megabytes below a directory; skip the test where that is not allowed."""
    disk = directory / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip() if mounted else 'no mount'}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 4 MB."""
    with disk_of(4, tmp_path) as disk:
        yield disk


class Cramped(NamedTuple):
    """A place for a database that cannot grow beyond a few megabytes."""

    directory: Path
    options: dict[str, Any]  # for the process


@pytest.fixture(params=["disk", "limit"])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Cramped:
    """Return a small disk, and in a second run a limit on the size of files."""
    if request.param == "disk":
        return Cramped(request.getfixturevalue("small_disk"), {})
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    return Cramped(tmp_path, {"preexec_fn": limit})


def fill(answer_to: Callable[[dict[str, Any]], tuple[int, Any]], owner: Owner) -> int:
    """Send until there is no more room; return how many messages there was room for."""
    for number in range(1_000):
        status, reply = answer_to(send(owner, BIG))
        if status != 200:
            assert (status, reply["ok"], reply["error"]) == (507, False, "Full")
            assert reply["retry"] >= 1
            return number
        assert reply == OK
    raise AssertionError("32 MB found room where there is none")


@pytest.mark.slow
def test_full_disk_refuses_sends_and_serves_owners_until_messages_expire(
        cramped: Cramped, start: Callable[..., Process], alice: Owner, bob: Owner) -> None:
    process = start("--db", str(cramped.directory / "relay.db"), "--message-ttl", "5", *ROOMY_FLAGS,
                    **cramped.options)
    answer_to = functools.partial(post, process.port)
    assert answer_to(send(alice)) == (200, OK)
    room = fill(answer_to, bob)
    assert room >= 16  # half a megabyte at least
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]
    assert [text for _, text in page(process.port, bob)] == [BIG] * room
    until(lambda: answer_to(check(bob)) == (200, NOTHING))
    until(lambda: fill(answer_to, bob) >= room // 2)
    assert page(process.port, bob)[0][1] == BIG
    code, log = process.stop()
    assert code == 0
    assert "full" in log
    assert "Traceback" not in log


def sweep_for(relay: Relay, clock: FakeClock, seconds: int = 20) -> None:
    """Sweep as a server does: once a second, on in spite of errors."""
    for _ in range(seconds):
        with contextlib.suppress(StoreError):
            while relay.sweep():
                pass
        clock.advance(1)


@pytest.mark.slow
def test_full_disk_has_room_for_every_owner_again_and_again(small_disk: Path, clock: FakeClock, bob: Owner) -> None:
    owners = [Owner(number) for number in range(10, 40)]
    with relay_on(small_disk / "relay.db", clock, ROOMY) as relay:
        for _ in range(3):
            for owner in owners:
                assert relay.handle(send(owner), SOURCE) == (200, OK)
            assert fill(lambda request: relay.handle(request, SOURCE), bob) >= 16
            sweep_for(relay, clock, 2)
            for owner in owners:
                assert [text for _, text in messages_of(relay, owner)] == ["QUJD"]
            clock.advance(HOUR_S)
            sweep_for(relay, clock)
            assert trace_in(small_disk, BIG.encode()) == []


def fill_disk(directory: Path) -> Path:
    """Take what room is left on a small disk, and return the file that has it."""
    with contextlib.suppress(OSError), (directory / "film").open("wb", buffering=0) as film:
        while film.tell() < 1 << 30:
            film.write(bytes(4_096))
    return directory / "film"


@pytest.mark.slow
def test_disk_filled_by_others_refuses_sends_until_they_make_room(small_disk: Path, clock: FakeClock,
                                                                  alice: Owner) -> None:
    with relay_on(small_disk / "relay.db", clock, ROOMY) as relay:
        assert relay.handle(send(alice), SOURCE) == (200, OK)
        film = fill_disk(small_disk)
        fill(lambda request: relay.handle(request, SOURCE), Owner(3))
        assert [text for _, text in messages_of(relay, alice)] == ["QUJD"]
        film.unlink()
        sweep_for(relay, clock)
        assert relay.handle(send(alice, "YWdhaW4"), SOURCE) == (200, OK)
        assert [text for _, text in messages_of(relay, alice)] == ["QUJD", "YWdhaW4"]


@pytest.mark.slow
def test_disk_filled_by_others_has_room_again_where_messages_have_expired(tmp_path: Path, clock: FakeClock,
                                                                          bob: Owner) -> None:
    # Large enough for more messages than the reserve could hold, each of the largest size: to
    # delete them takes room as well, for they are overwritten.
    with disk_of(100, tmp_path) as disk, relay_on(disk / "relay.db", clock, ROOMY) as relay:
        for _ in range(500):
            assert relay.handle(send(bob, "QUJD" * 8_192), SOURCE) == (200, OK)
        fill_disk(disk)
        fill(lambda request: relay.handle(request, SOURCE), bob)
        clock.advance(HOUR_S + 1)
        sweep_for(relay, clock)
        assert trace_in(disk, b"QUJD" * 100) == []
        assert fill(lambda request: relay.handle(request, SOURCE), bob) >= 250


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_on_a_disk_that_it_filled_serves_owners(
        number: signal.Signals, cramped: Cramped, start: Callable[..., Process], alice: Owner, bob: Owner) -> None:
    flags = ("--db", str(cramped.directory / "relay.db"), *ROOMY_FLAGS)
    process = start(*flags, **cramped.options)
    assert post(process.port, send(alice)) == (200, OK)
    fill(functools.partial(post, process.port), bob)
    process.stop(number)
    process = start(*flags, **cramped.options)
    assert process.port, process.first_line
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_on_a_disk_that_others_filled_serves_owners(number: signal.Signals, small_disk: Path,
                                                            start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", str(small_disk / "relay.db"))
    assert post(process.port, send(alice)) == (200, OK)
    process.stop(number)
    fill_disk(small_disk)  # but for the reserve
    process = start("--db", str(small_disk / "relay.db"))
    assert process.port, process.first_line
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]


@pytest.mark.slow
def test_first_start_on_a_full_disk_fails_with_one_line(small_disk: Path) -> None:
    fill_disk(small_disk)
    assert_fails_with_one_line(run_relay("--port", "0", "--db", "relay.db", cwd=small_disk), "relay.db", "full")


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, linux/capability.h


def _obey_rights() -> None:
    """Have the rights of files bind root too, in the program that this process becomes."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@pytest.mark.parametrize(("file_mode", "directory_mode"), [
    (0o400, 0o700), (0o000, 0o700), (0o400, 0o500), (0o600, 0o500), (None, 0o500)])
def test_read_only_place_fails_with_one_line(file_mode: int | None, directory_mode: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preexec_fn": _obey_rights} if os.geteuid() == 0 else {}
    directory = tmp_path / "place"
    directory.mkdir()
    path = directory / "relay.db"
    if file_mode is not None:
        SqliteStore(str(path)).close()
        for other in directory.glob("relay.db-*"):
            other.unlink()
        path.chmod(file_mode)
    directory.chmod(directory_mode)
    probe = tmp_path / "probe"
    probe.touch(0o400)
    if subprocess.run(["test", "-w", str(probe)], check=False, **options).returncode == 0:
        pytest.skip("no rights bind whoever runs this")
    assert_fails_with_one_line(run_relay("--port", "0", "--db", str(path), cwd=tmp_path, **options), str(path))


def test_read_only_disk_fails_with_one_line(small_disk: Path) -> None:
    path = small_disk / "relay.db"
    SqliteStore(str(path)).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_fails_with_one_line(run_relay("--port", "0", "--db", str(path), cwd=small_disk), str(path))


def test_missing_directory_fails_with_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "missing" / "relay.db")
    assert_fails_with_one_line(run_relay("--port", "0", "--db", path, cwd=tmp_path), path)
    assert list(tmp_path.iterdir()) == []


def test_directory_as_database_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "relay.db").mkdir()
    assert_fails_with_one_line(run_relay("--port", "0", "--db", "relay.db", cwd=tmp_path), "relay.db")


def overwrite(path: Path, start: int, octets: bytes) -> None:
    """Write octets into the middle of a file."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(octets)


def store_with_messages(path: Path, owners: Sequence[Owner], clock: FakeClock) -> None:
    """Make a store with ten messages a box, and an open question, all in the one file."""
    with relay_on(path, clock, ROOMY) as relay:
        for number in range(10):
            for owner in owners:
                assert relay.handle(send(owner, "QUJD" * (1 + 300 * number)), SOURCE) == (200, OK)
        assert messages_of(relay, owners[0])


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(random.Random(1).randbytes(9_000)),
    lambda path: path.write_bytes(b"A list of things to buy\n"),
    lambda path: overwrite(path, 0, random.Random(1).randbytes(5_000)),
    lambda path: os.truncate(path, 100),
    lambda path: os.truncate(path, 4_096),
    lambda path: os.truncate(path, 5_000),
    lambda path: overwrite(path, 4_096, random.Random(1).randbytes(path.stat().st_size - 4_096)),
], ids=["random", "text", "no header", "100 bytes", "one page", "part of a page", "random after the first page"])
def test_damaged_file_fails_with_one_line(damage: Callable[[Path], object], clock: FakeClock, tmp_path: Path,
                                          alice: Owner) -> None:
    path = tmp_path / "relay.db"
    store_with_messages(path, [alice], clock)
    damage(path)
    damaged = path.read_bytes()
    assert_fails_with_one_line(run_relay("--port", "0", "--db", "relay.db", cwd=tmp_path), "relay.db")
    assert path.read_bytes() == damaged  # whoever can mend it finds it as it was


FOREIGN = {
    "another program's tables": "CREATE TABLE list (item TEXT); INSERT INTO list VALUES ('milk')",
    "another program's id": "PRAGMA application_id = 7",
    "another program's tables and id": "PRAGMA application_id = 7; CREATE TABLE messages (item TEXT)",
    "another program's version": "PRAGMA user_version = 1",
    "a newer relay's": f"PRAGMA application_id = {0x436F6E6E}; PRAGMA user_version = 1000000; CREATE TABLE a (b)",
    "another program's WAL": "PRAGMA journal_mode = WAL; CREATE TABLE list (item TEXT); PRAGMA wal_checkpoint;"
                             " INSERT INTO list VALUES ('milk')",
}


@pytest.mark.parametrize("script", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("state", ["closed", "open", "crashed"])
def test_foreign_file_fails_with_one_line_and_stays_as_it_is(state: str, script: str, tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    # In a process of its own: to read the file in one that has it open would end SQLite's locks.
    program = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2]); print(); input()"
    with subprocess.Popen([sys.executable, "-c", f"{program}; db.close()", str(path), script],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as foreign:
        assert foreign.stdout is not None
        foreign.stdout.readline()
        if state == "closed":
            foreign.communicate(b"\n")
        elif state == "crashed":
            foreign.kill()
            foreign.wait()
        before = files_in(tmp_path)
        assert_fails_with_one_line(run_relay("--port", "0", "--db", "relay.db", cwd=tmp_path), "relay.db")
        after = files_in(tmp_path)
        foreign.kill()
    assert after == before


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the content of a database's files, by name; what an index of the WAL (-shm) holds is no content."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith("-shm")}


def requests_of_all_kinds(owner: Owner) -> list[object]:
    """Return requests that touch every table."""
    return [send(owner), check(owner), receive(owner, "A" * 43), [check(owner), check(Owner(9))], send(Owner(9), BIG)]


def use(relay: Relay, owner: Owner, clock: FakeClock) -> None:
    """Use a relay on a damaged file in every way; errors are replies, or StoreError to the sweeper."""
    for request in requests_of_all_kinds(owner):
        status, reply = relay.handle(request, SOURCE)
        assert status in {200, 403, 429, 503, 507}
        assert isinstance(reply, list) or reply["ok"] is (status == 200)
        if isinstance(reply, dict) and reply.get("question"):
            receipt = receive(owner, owner.open(reply["question"]), limit=100)
            assert relay.handle(receipt, SOURCE).status in {200, 403, 503, 507}
    assert isinstance(relay.arrivals(0)[0], int)
    for seconds in (1, 30, HOUR_S):
        clock.advance(seconds)
        with contextlib.suppress(StoreError):
            relay.sweep()
    assert relay.health().status in {200, 503}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_damage_of_a_file_in_use_never_escapes_as_an_exception(
        seed: int, tmp_path: Path, clock: FakeClock, alice: Owner, caplog: pytest.LogCaptureFixture) -> None:
    path, chance = tmp_path / "relay.db", random.Random(seed)
    store_with_messages(path, [alice, Owner(2)], clock)
    caplog.set_level(logging.INFO)

    def damage() -> None:
        for _ in range(chance.randrange(1, 6)):
            octets = chance.randbytes(chance.choice((1, 4, 100, 4_096)))
            overwrite(path, chance.randrange(100, path.stat().st_size), octets)

    with contextlib.suppress(StoreError):  # one may be refused already at its opening
        if seed % 2:
            damage()
        relay = Relay(SqliteStore(str(path)), ROOMY, clock=clock.clock)
        if not seed % 2:
            damage()
        use(relay, alice, clock)
        relay.close()
    assert [record for record in caplog.records if record.exc_info] == []


VANDALISM = {
    "the row of time gone": "DELETE FROM relay",
    "a table gone": "DROP TABLE messages",
    "the table of time gone": "DROP TABLE relay",
    "all gone": "DROP TABLE messages; DROP TABLE relay; DROP TABLE boxes; DROP TABLE challenges",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", [*VANDALISM.values(), None], ids=[*VANDALISM.keys(), "cut off"])
def test_damage_while_serving_is_answered_busy(script: str | None, start: Callable[..., Process], tmp_path: Path,
                                               alice: Owner) -> None:
    path = tmp_path / "relay.db"
    process = start("--db", "relay.db")
    assert post(process.port, send(alice)) == (200, OK)
    if script:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as vandal:
            vandal.executescript(script)
    else:
        process.stop()  # so that all is in the file
        process = start("--db", "relay.db")
        os.truncate(path, 4_096)
    for request in requests_of_all_kinds(alice):
        status, reply = post(process.port, request)
        assert status in {200, 403, 503}
        assert isinstance(reply, list) or reply["ok"] is (status == 200)
    assert post(process.port, send(alice))[0] == 503
    health, _, _ = parse_response(exchange(process.port, http_request(b"", method="GET", path="/health")))
    assert health in {200, 503}  # a read and a write may work
    # The loop lives on, past a tick and a sweep.
    assert post(process.port, check(alice, wait=1))[0] in {200, 503}
    assert post(process.port, check(Owner(9), wait=1))[0] in {200, 503}
    code, log = process.stop()
    assert "Traceback" not in log
    assert code == 0


EPOCH_US, YEAR_2100_US, YEAR_2300_US = 0, 4_102_444_800_000_000, 10_413_792_000_000_000
HALF_HOUR_US = 1_800_000_000
STEPS = {  # the wall clock at the first start and at the second, and whether that is less than an hour
    "from 1970": (EPOCH_US, START_US, False),
    "to 1970": (START_US, EPOCH_US, True),
    "1970 twice": (EPOCH_US, EPOCH_US, True),
    "from 2300": (YEAR_2300_US, START_US, False),
    "to 2300": (START_US, YEAR_2300_US, True),
    "from 2100": (YEAR_2100_US, START_US, True),  # believed, so the row of time stays ahead
    "to 2100": (START_US, YEAR_2100_US, False),
    "a day back": (START_US, START_US - 86_400_000_000, True),
    "half an hour forward": (START_US, START_US + HALF_HOUR_US, True),
    "two hours forward": (START_US, START_US + 4 * HALF_HOUR_US, False),
    "none": (START_US, START_US, True),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_clock_step_between_starts_leaves_no_box_deaf(step: tuple[int, int, bool], tmp_path: Path, clock: FakeClock,
                                                      alice: Owner) -> None:
    clock.wall_us, second_us, kept = step
    with relay_on(tmp_path / "relay.db", clock) as relay:
        assert relay.handle(send(alice, "Zmlyc3Q"), SOURCE) == (200, OK)
        ((first_at, _),) = messages_of(relay, alice)
    clock.wall_us, clock.monotonic_us = second_us, 5
    with relay_on(tmp_path / "relay.db", clock) as relay:
        assert relay.handle(check(alice, first_at), SOURCE) == (200, NOTHING)
        assert relay.handle(send(alice, "c2Vjb25k"), SOURCE) == (200, OK)
        found = messages_of(relay, alice)
        assert [text for _, text in found] == (["Zmlyc3Q", "c2Vjb25k"] if kept else ["c2Vjb25k"])
        assert messages_of(relay, alice, first_at) == found[-1:]
        assert found[-1][0] > first_at
        clock.advance(HOUR_S - 1)
        assert messages_of(relay, alice, first_at) == found[-1:]
        clock.advance(2)
        assert relay.handle(check(alice), SOURCE) == (200, NOTHING)
        relay.sweep()
        assert relay.store.messages(alice.box, 0, 100, 0) == []


@pytest.mark.parametrize("step_us", [-START_US, -HALF_HOUR_US, HALF_HOUR_US, YEAR_2300_US - START_US])
def test_clock_step_while_running_changes_nothing(step_us: int, relay: Relay, clock: FakeClock, alice: Owner) -> None:
    relay.handle(send(alice, "Zmlyc3Q"), SOURCE)
    clock.wall_us += step_us
    clock.advance(5)
    relay.handle(send(alice, "c2Vjb25k"), SOURCE)
    assert messages_of(relay, alice) == [(START_US, "Zmlyc3Q"), (START_US + 5_000_000, "c2Vjb25k")]
    clock.advance(HOUR_S - 1)
    assert [text for _, text in messages_of(relay, alice)] == ["c2Vjb25k"]


def test_relays_with_different_clocks_on_one_file_share_the_later_time(tmp_path: Path, alice: Owner) -> None:
    ahead, behind = FakeClock(), FakeClock()
    behind.wall_us -= 86_400_000_000
    with relay_on(tmp_path / "relay.db", behind) as slow, relay_on(tmp_path / "relay.db", ahead) as fast:
        seen = 0
        for number in range(6):
            relay, other = (slow, fast) if number % 2 else (fast, slow)
            assert relay.handle(send(alice, f"AA{number}A"), SOURCE) == (200, OK)
            ((at, text),) = messages_of(other, alice, seen)
            assert (text, at > seen) == (f"AA{number}A", True)
            seen = at
            for clock in (ahead, behind):
                clock.advance(1)
        assert slow.handle(check(alice, seen), SOURCE) == (200, NOTHING)
        for relay in (slow, fast):
            relay.sweep()
        for clock in (ahead, behind):
            clock.advance(HOUR_S + 1)
        assert [relay.handle(check(alice), SOURCE).body for relay in (slow, fast)] == [NOTHING, NOTHING]


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
            yield [_door_of_relay(relay, alice, stored=request.param == "stores") for relay in relays]


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
    for sent in texts:  # a text was committed when the next was sent
        kept = set(sent)
        assert [text for _, text in found if text in kept] == sent


def park(port: int, request: object) -> socket.socket:
    """Send a request with `wait` and return its connection once the relay has read it."""
    client = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    client.sendall(http_request(json.dumps(request).encode()))
    post(port, check(Owner(99)))  # asked later, answered: so the first has been read
    return client


def reply_on(client: socket.socket) -> tuple[int, Any]:
    """Return the status and the reply that come on a connection."""
    with client, client.makefile("rb") as stream:
        status, _, body = parse_response(stream.read())
    return status, json.loads(body)


@pytest.mark.slow
def test_long_poll_at_one_process_ends_when_another_gets_a_message(start: Callable[..., Process],
                                                                   alice: Owner) -> None:
    here, there = (start("--db", "relay.db") for _ in range(2))
    with contextlib.closing(park(here.port, check(alice, wait=60))) as client:
        # Promised within a second. The wait is far longer, so what comes now comes of the message.
        client.settimeout(5)
        assert post(there.port, send(alice)) == (200, OK)
        status, reply = reply_on(client)
    assert (status, reply["found"]) == (200, True)
    status, reply = post(there.port, receive(alice, alice.open(reply["question"])))
    assert (status, reply["data"]) == (200, "QUJD")


def test_expired_messages_are_gone_from_the_files(tmp_path: Path, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    with relay_on(tmp_path / "relay.db", clock, ROOMY) as relay:
        for number in range(300):
            relay.handle(send(alice, f"SECRET{number:04d}" + "QUJD" * (number % 7 * 500)), SOURCE)
        relay.handle(send(bob, "SECRETAA"), SOURCE)
        assert messages_of(relay, alice)
        _, reply = relay.handle(check(alice), SOURCE)
        assert isinstance(reply, dict)
        question = reply["question"].encode()
        assert trace_in(tmp_path, b"SECRET")
        assert trace_in(tmp_path, question)
        clock.advance(1_800)
        relay.handle(send(alice, "LATERAAA"), SOURCE)
        clock.advance(1_801)
        sweep_for(relay, clock)
        assert {octets: trace_in(tmp_path, octets) for octets in (b"SECRET", question, bob.box)} == {
            b"SECRET": [], question: [], bob.box: []}
        assert trace_in(tmp_path, b"LATERAAA")
        assert trace_in(tmp_path, alice.box)  # its owner has shown up
        clock.advance(31 * 86_400)
        sweep_for(relay, clock)
        assert {octets: trace_in(tmp_path, octets) for octets in (b"LATERAAA", alice.box)} == {
            b"LATERAAA": [], alice.box: []}


@pytest.mark.slow
def test_expired_messages_are_gone_once_a_reader_is_out_of_the_way(tmp_path: Path, clock: FakeClock,
                                                                   alice: Owner) -> None:
    path = tmp_path / "relay.db"
    with relay_on(path, clock) as relay, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        relay.handle(send(alice, "SECRETAA"), SOURCE)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)
        clock.advance(HOUR_S + 1)
        relay.sweep()
        clock.advance(30)
        relay.sweep()
        assert trace_in(tmp_path, b"SECRETAA")  # the reader still needs it
        reader.execute("ROLLBACK")
        sweep_for(relay, clock)
        assert trace_in(tmp_path, b"SECRETAA") == []


@pytest.mark.parametrize("swept", [True, False])
def test_expired_messages_are_gone_after_a_crash(*, swept: bool, tmp_path: Path, clock: FakeClock,
                                                 alice: Owner) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    with relay_on(before / "relay.db", clock) as relay:
        relay.handle(send(alice, "SECRETAA"), SOURCE)
        assert trace_in(before, b"SECRETAA")
        clock.advance(HOUR_S + 1)
        if swept:
            relay.sweep()
        shutil.copytree(before, after)  # what a crash leaves
    with relay_on(after / "relay.db", clock) as relay:
        sweep_for(relay, clock)
        assert trace_in(after, b"SECRETAA") == []


@pytest.mark.slow
def test_expired_messages_are_gone_from_the_files_of_a_running_relay(start: Callable[..., Process], tmp_path: Path,
                                                                     alice: Owner) -> None:
    process = start("--db", "relay.db", "--message-ttl", "2")
    assert post(process.port, send(alice, "SECRETAA")) == (200, OK)
    assert trace_in(tmp_path, b"SECRETAA")
    until(lambda: trace_in(tmp_path, b"SECRETAA") == [])
    assert post(process.port, check(alice)) == (200, NOTHING)
    assert process.stop() == (0, "")


def test_files_of_the_store_are_for_its_user_only(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        store = SqliteStore(str(tmp_path / "relay.db"))
        store.put_question(b"box", ("question", b"hash"), 10, START_US)
        modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(mask)
    assert set(modes.values()) == {0}
    assert {"relay.db", "relay.db-reserve"} < modes.keys()


def statuses_of_a_relay_closed_at_work(path: Path, clock: FakeClock) -> tuple[set[int], int]:
    """Return what eight threads got that went on while a relay was closed, and what one gets afterwards."""
    relay, closed = Relay(SqliteStore(str(path)), Limits(rate=0), clock=clock.clock), threading.Event()

    def work(owner: Owner) -> set[int]:
        got = set()
        while not closed.is_set():
            got |= {relay.handle(send(owner), owner.pub).status, relay.handle(check(owner), owner.pub).status}
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
    # Once a reader was closed under the feet of the thread that used it, and SQLite crashed.
    for number in range(20):
        got, afterwards = statuses_of_a_relay_closed_at_work(tmp_path / f"{number}.db", clock)
        assert got <= {200, 429, 503}  # 429: its eighth of a box
        assert afterwards == 503
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_file_held_by_a_stuck_process_is_busy_and_can_be_left(tmp_path: Path, clock: FakeClock, alice: Owner) -> None:
    with relay_on(tmp_path / "relay.db", clock) as relay, (tmp_path / "relay.db-lock").open() as held:
        assert relay.handle(send(alice), SOURCE) == (200, OK)
        fcntl.flock(held, fcntl.LOCK_EX)
        status, reply = relay.handle(send(alice), SOURCE)
        assert (status, cast(dict[str, Any], reply)["error"]) == (503, "Busy")
        assert relay.handle(check(alice, at=clock.wall_us), SOURCE) == (200, NOTHING)


# ---------------------------------------------------------------------------------------
# The command line, as a process: flags, words, exit codes, signals, the log.
# ---------------------------------------------------------------------------------------

FLAGS = ["--version", "--help", "--host", "--port", "--db", "--sync", "--udp", "--stun", "--tls-cert", "--tls-key",
         "--keys", "--deny", "--trusted-proxy", "--name", "--contact", "--notice", "--price-url", "--log-ips",
         *map(flag_of, Limits._fields)]


def document_of(port: int) -> dict[str, Any]:
    """Return the relay's document."""
    octets = exchange(port, http_request(b"", "Accept: application/json", method="GET"))
    status, _, body = parse_response(octets)
    assert status == 200
    document: dict[str, Any] = json.loads(body)
    return document


def test_version_is_printed(tmp_path: Path) -> None:
    finished = run_relay("--version", cwd=tmp_path)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"connectoid relay {__version__}\n", "")


def test_help_names_every_flag(tmp_path: Path) -> None:
    finished = run_relay("--help", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    named = set(finished.stdout.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert [flag for flag in FLAGS if flag not in named] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("host", "shown"), [
    ((), "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"), (("--host", "127.0.0.1"), "127.0.0.1"),
    (("--host", "::1"), "[::1]")])
def test_ready_line_names_the_real_port(host: tuple[str, ...], shown: str, start: Callable[..., Process]) -> None:
    if host and not socket.has_dualstack_ipv6() and ":" in host[-1]:
        pytest.skip("no IPv6 here")
    process = start("--db", ":memory:", *host)
    assert process.port > 0
    assert process.first_line == f"connectoid relay {__version__} listening on http://{shown}:{process.port}\n"
    address = "::1" if ":" in shown and host else "127.0.0.1"
    with socket.create_connection((address, process.port), timeout=DEADLINE_S) as client:
        client.sendall(http_request(b"", method="GET", path="/health"))
        with client.makefile("rb") as stream:
            assert parse_response(stream.read())[0] == 200
    assert process.stop() == (0, "")


@pytest.mark.parametrize("flags", [
    ["--no-such-flag"], ["extra"], ["--port"], ["--port", "70000"], ["--port", "-1"], ["--port", "http"],
    ["--port", "80.0"], ["--port", ""], ["--port", "٨٠٨٠"], ["--rate", "-1"], ["--rate", "1e3"], ["--rate", "1_000"],
    ["--message-ttl", "0"], ["--question-ttl", "0"], ["--box-ttl", "soon"], ["--max-box-messages", "0"],
    ["--max-bytes", "9" * 30], ["--max-connections", " 5"], ["--sync", "off"], ["--udp", "yes"]], ids=" ".join)
def test_wrong_flags_are_a_usage_error(flags: list[str], tmp_path: Path) -> None:
    finished = run_relay(*flags, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(r"connectoid_relay\.py: error: .* \(--help lists the flags\)\n", finished.stderr)
    assert any(flag in finished.stderr for flag in flags)
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_port_in_use_fails_with_one_line(kind: socket.SocketKind, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = str(taken.getsockname()[1])
        finished = run_relay("--host", "127.0.0.1", "--port", port, "--udp", "--db", "relay.db", cwd=tmp_path)
    assert_fails_with_one_line(finished, port)


def test_second_relay_on_a_port_fails_with_one_line(start: Callable[..., Process], tmp_path: Path) -> None:
    port = str(start("--db", ":memory:").port)
    assert_fails_with_one_line(run_relay("--port", port, "--db", ":memory:", cwd=tmp_path), port)


# None of these is asked of a DNS server: an interface that does not exist, labels that no name
# may have, an address of documentation that no machine has.
@pytest.mark.parametrize("host", ["fe80::1%nowhere", "a" * 64, "relay..example", ".", "203.0.113.1"])
def test_host_that_cannot_be_had_fails_with_one_line(host: str, tmp_path: Path) -> None:
    assert_fails_with_one_line(run_relay("--host", host, "--port", "0", "--db", ":memory:", cwd=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_answers_who_waits_and_ends_well(number: signal.Signals, start: Callable[..., Process],
                                                alice: Owner, bob: Owner, tmp_path: Path) -> None:
    process = start("--db", "relay.db")
    assert post(process.port, send(bob)) == (200, OK)
    with (contextlib.closing(park(process.port, check(alice, wait=60))) as waiting,
          contextlib.closing(park(process.port, [check(alice, wait=60)])) as batch,
          socket.create_connection(("127.0.0.1", process.port)),  # idle
          socket.create_connection(("127.0.0.1", process.port)) as slow):
        slow.sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        process.popen.send_signal(number)
        assert process.popen.wait(3) == 0  # promised: under 2 s
        assert reply_on(waiting) == (200, NOTHING)
        assert reply_on(batch) == (200, [NOTHING])
    assert process.stop() == (0, "")
    assert not (tmp_path / "relay.db-wal").exists()  # all is in the one file
    store = SqliteStore(str(tmp_path / "relay.db"))
    assert [text for _, text in store.messages(bob.box, 0, 10, 0)] == ["QUJD"]
    store.close()


@pytest.mark.slow
def test_second_signal_does_no_harm(start: Callable[..., Process]) -> None:
    process = start("--db", "relay.db")
    with socket.create_connection(("127.0.0.1", process.port)) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        post(process.port, check(Owner(9)))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.popen.send_signal(number)
        assert process.popen.wait(DEADLINE_S) == 0
    assert process.stop() == (0, "")


def test_database_in_memory_leaves_no_file(start: Callable[..., Process], tmp_path: Path, alice: Owner) -> None:
    process = start("--db", ":memory:")
    assert post(process.port, send(alice)) == (200, OK)
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]
    assert process.stop() == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "state", "expected"), [
    ((), "", "connectoid.db"), ((), "state", "state/connectoid.db"), (("--db", "other.db"), "state", "other.db")])
def test_database_stands_where_the_flag_or_the_state_directory_says(
        flags: tuple[str, ...], state: str, expected: str, start: Callable[..., Process], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    environment = {name: text for name, text in os.environ.items() if name != "STATE_DIRECTORY"}
    if state:
        environment["STATE_DIRECTORY"] = str(tmp_path / state)
    process = start(*flags, env=environment)
    assert process.port
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.db")] == [expected]


def test_every_limit_is_a_flag_and_shows_in_the_document(start: Callable[..., Process]) -> None:
    given = {name: default + 1 for name, default in Limits()._asdict().items()}
    flags = itertools.chain(*((flag_of(name), str(number)) for name, number in given.items()))
    document = document_of(start("--db", ":memory:", *flags).port)
    retention = {name: given.pop(f"{name}_ttl_s") for name in ("message", "question", "box")}
    assert document["limits"] == given
    assert document["retention"] == retention
    assert (document["software"], document["version"], document["udp"]) == ("connectoid_relay", __version__, False)


def test_limits_default_to_what_the_class_says(start: Callable[..., Process]) -> None:
    document = document_of(start("--db", ":memory:").port)
    named = {f"{name}_ttl_s": seconds for name, seconds in document["retention"].items()}
    assert document["limits"] | named == Limits()._asdict()


def misbehave(port: int, owner: Owner) -> list[str]:
    """Make errors of all kinds, too many requests at last; return what no log may hold."""
    assert post(port, send(owner, "SECRETAA")) == (200, OK)
    _, reply = post(port, check(owner))
    answer = owner.open(reply["question"])
    assert post(port, receive(owner, "WRONG" + answer))[0] == 403
    assert post(port, b"{SECRET")[0] == 400
    assert post(port, {"pub": owner.pub, "action": "SECRET"})[0] == 400
    assert post(port, send(owner, "SECRET" * 6_000))[0] == 413
    for octets in (b"SECRET\n\n", http_request(b"", path="/SECRET"), b"GET / HTTP/1.1\r\nA: " + b"SECRET" * 9_999,
                   b"POST / HTTP/1.1\r\nTransfer-Encoding: SECRET\r\n\r\n"):
        assert exchange(port, octets).startswith(b"HTTP/1.1 4")
    until(lambda: bool(post(port, check(owner))[0] == 429))
    return [owner.pub, answer, "SECRET"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--log-ips",)])
def test_log_holds_no_key_and_no_message_and_an_address_only_if_asked(
        flags: tuple[str, ...], start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", "relay.db", "--udp", "--rate", "30", *flags)
    secrets = misbehave(process.port, alice)
    code, log = process.stop()
    assert code == 0
    assert [secret for secret in secrets if secret in log] == []
    assert ("127.0.0.1" in log) is bool(flags)
    assert "too often" in log
    assert "Traceback" not in log


def test_udp_answers_on_the_same_port_number(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:", "--udp", "--host", "127.0.0.1")
    assert document_of(process.port)["udp"] is True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", process.port))
        for found in (False, True):
            client.send(json.dumps(check(alice, id="one-1")).encode())
            assert json.loads(client.recv(2_048)) == {"ok": True, "found": found, "id": "one-1"}
            assert post(process.port, send(alice)) == (200, OK)


@pytest.mark.parametrize("modules", [
    ["cryptography/__init__.py"],
    ["cryptography/__init__.py", "cryptography/hazmat/__init__.py", "cryptography/hazmat/primitives/__init__.py"],
], ids=["missing", "old"])
def test_missing_cryptography_is_said_in_one_sentence(modules: list[str], tmp_path: Path) -> None:
    for module in modules:
        (tmp_path / "stub" / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stub" / module).touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "stub")}
    finished = run_relay("--port", "0", cwd=tmp_path, env=environment)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.count("\n") == 1
    assert "cryptography" in finished.stderr
    assert "pip install 'cryptography>=47'" in finished.stderr
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    code = "try: import connectoid_relay\nexcept ImportError as error: print(error)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, check=True)
    assert (imported.stdout, imported.stderr) == (finished.stderr, "")


def test_memory_at_start_is_below_40_mib(start: Callable[..., Process]) -> None:
    """The least of three: how many pages of a library the kernel maps beside those asked for varies by 1 MiB."""
    statuses = [Path(f"/proc/{start().popen.pid}/status").read_text("ascii") for _ in range(3)]
    assert min(int(status.partition("VmRSS:")[2].split()[0]) for status in statuses) < 40 * 1024


def test_file_alone_runs_in_an_empty_directory(tmp_path: Path, alice: Owner) -> None:
    shutil.copy(ROOT / PROGRAM, tmp_path)
    # -I: neither this directory nor the environment helps.
    with subprocess.Popen([sys.executable, "-I", PROGRAM, "--port", "0"], cwd=tmp_path, stderr=subprocess.PIPE,
                          text=True) as popen:
        assert popen.stderr is not None
        try:
            port = int(popen.stderr.readline().rpartition(":")[2])
            assert post(port, send(alice)) == (200, OK)
            assert [text for _, text in page(port, alice)] == ["QUJD"]
        finally:
            popen.terminate()
        assert popen.wait(DEADLINE_S) == 0
        assert popen.stderr.read() == ""
    assert sorted(path.name for path in tmp_path.iterdir() if "-" not in path.name) == ["connectoid.db", PROGRAM]


def test_main_can_be_called_from_another_program(tmp_path: Path) -> None:
    code = "import sys, connectoid_relay; sys.exit(connectoid_relay.main(['--db', '/', '--port', '0']))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=DEADLINE_S, check=False)
    assert_fails_with_one_line(finished, "/")


# ---------------------------------------------------------------------------------------
# Documents: what they repeat of the code is compared with it, what they tell to type is
# typed.
# ---------------------------------------------------------------------------------------


def read_table(document: str, heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading, without the head."""
    text = (ROOT / document).read_text("utf-8").partition(f"\n{heading}\n")[2]
    lines = [line for line in text.partition("\n## ")[0].split("\n") if line.startswith("|")]
    assert len(lines) > 2, f"no table below {heading!r} in {document}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_error_table_is_that_of_the_code() -> None:
    rows = [(text.strip("`"), int(status)) for text, status, _ in read_table("PROTOCOL.md", "## Errors")]
    assert rows == sorted(((error.text, error.status) for error in ERRORS), key=lambda row: row[1])


def test_limits_table_is_that_of_the_code() -> None:
    rows = [(name.strip("`"), int(default.replace(",", "")), meaning)
            for name, default, meaning in read_table("PROTOCOL.md", "## Limits")]
    assert rows == [(name, getattr(Limits(), name), text) for name, (text, _) in meanings().items()]


def test_forms_table_is_that_of_the_code() -> None:
    rows = {name.strip("`"): form for name, form in read_table("PROTOCOL.md", "### Forms")}
    assert rows == {name: form for name, (_, form) in FORMS.items()}


def test_metrics_table_is_that_of_the_code() -> None:
    rows = [tuple(cell.strip("`") for cell in row) for row in read_table("PROTOCOL.md", "### Metrics")]
    assert rows == [(name, metric.type, metric.label, metric.meaning) for name, metric in METRICS.items()]


def test_readme_s_key_file_and_list_of_the_denied_are_read(tmp_path: Path, alice: Owner) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (keys,), (denied,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL), re.findall(
        r"```\n(# a source.*?)```", text, re.DOTALL)
    (tmp_path / "keys.toml").write_text(keys, "utf-8")
    (tmp_path / "denied").write_text(denied, "utf-8")
    access = read_access(str(tmp_path / "keys.toml"), str(tmp_path / "denied"))
    (key,) = re.findall(r'key = "(.*)"', keys)
    assert access.quota_of(key) == Quota("keys.alice", 100_000, 50_000_000, 86_400)
    assert access.quota_of(None) == Quota("public", 10_000, 0, 600)
    assert [access.denies(source) for source in ("192.0.2.7", "192.0.2.8", "198.51.100.9")] == [True, False, True]
    with pytest.raises(Refusal, match="Forbidden"):
        access.check_box(alice.box)


def test_context_table_is_that_of_the_code() -> None:
    rows = {use: info.strip("`").encode() for use, info in read_table("PROTOCOL.md", "## Context strings")}
    assert rows.items() >= CONTEXTS.items()  # the others are the library's


def test_fixed_limits_in_the_protocol_are_those_of_the_code() -> None:
    text = " ".join((ROOT / "PROTOCOL.md").read_text("utf-8").split())
    assert (f"`data` {MAX_DATA_CHARS:,} characters, `ext` {MAX_EXT_CHARS:,} code points, {MAX_BATCH_ITEMS} checks"
            f" in a batch, {MAX_RECEIVE_MESSAGES} messages and {MAX_RECEIVE_CHARS >> 10} KiB of `data` in a reply,"
            f" {MAX_WAIT_S} s of waiting") in text


def test_readme_has_the_flags_verbatim() -> None:
    shown = (ROOT / "README.md").read_text("utf-8").partition("## Flags\n\n```\n")[2].partition("```")[0]
    assert shown.split() == build_parser().format_help().split()


def test_changelog_names_the_version() -> None:
    newest = (ROOT / "CHANGELOG.md").read_text("utf-8").partition("\n## ")[2]
    assert re.match(rf"{re.escape(__version__)}\b[^.]", newest)


def test_all_names_exist_and_have_docstrings() -> None:
    for name in connectoid_relay.__all__:
        written = getattr(connectoid_relay, name).__doc__
        assert written, name
        assert not written.startswith(f"{name}("), f"{name} has only the docstring that Python makes"


@pytest.mark.slow
def test_readme_session_works_as_typed(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    text = (ROOT / "README.md").read_text("utf-8").replace("8080", str(port))
    start_relay = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[0].replace("'.[cli]'", "'cryptography>=47'")
    by_hand = text.partition("## The relay by hand")[2]
    make_key, talk = re.findall(r"```sh\n(.*?)```", by_hand, re.DOTALL)[:2]
    (shown,) = re.findall(r"```\n(\{.*?)```", by_hand, re.DOTALL)
    shutil.copy(ROOT / "connectoid_relay.py", tmp_path)
    with subprocess.Popen(["bash", "-c", start_relay], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            assert process.stderr is not None
            lines = itertools.takewhile(lambda line: "listening on" not in line, process.stderr)
            assert not any("rror" in line for line in lines)
            typed = subprocess.run(["bash", "-c", (make_key + talk).replace("curl ", "curl -sS ")], cwd=tmp_path,
                                   capture_output=True, text=True, timeout=60, check=False)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert typed.stderr == ""
    # A question is new each time, and README shows only its beginning.
    pattern = re.sub(r'"question": "[^"]+"', '"question": "…"', shown)
    assert re.sub(r'"question": "[^"]+"', '"question": "…"', typed.stdout) == pattern
