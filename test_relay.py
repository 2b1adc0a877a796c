"""Test the relay: the contract of stores, the protocol core, and random lives beside a model."""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import json
import string
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from connectoid_relay import (
    CONTEXTS,
    DAY_US,
    HOUR_US,
    MIN_COUNTED_BYTES,
    OLD_PART,
    SECOND_US,
    About,
    Access,
    Clock,
    Limits,
    Look,
    Message,
    NoRoom,
    Relay,
    Reply,
    SqliteStore,
    Store,
    StoreError,
    answer_datagram,
)

# The fake clock starts on 2027-01-15.
START_US = 1_800_000_000_000_000
# The source of requests in tests that are not about sources.
SOURCE = "192.0.2.1"
BASE64URL = set(string.ascii_letters + string.digits + "-_")
OK: dict[str, Any] = {"ok": True}
NOTHING: dict[str, Any] = {"ok": True, "found": False}
SUITE = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)


def decode(text: str) -> bytes:
    """Return what base64url without padding stands for; raise ValueError."""
    if not set(text) <= BASE64URL:
        raise ValueError("another alphabet")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Owner:
    """Hold a mailbox's private key, made from a number so that tests repeat."""

    def __init__(self, number: int) -> None:
        self.key = ec.derive_private_key(number, ec.SECP384R1())
        self.box = self.key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self.pub = base64.urlsafe_b64encode(self.box).rstrip(b"=").decode()

    def open(self, question: str) -> str:
        """Return the answer to a question."""
        return SUITE.decrypt(decode(question), self.key, info=CONTEXTS["question"]).decode("ascii")


class FakeClock:
    """Show the time that a test sets; `clock` is what the relay gets."""

    def __init__(self) -> None:
        self.wall_us = START_US
        self.monotonic_us = 7_000_000
        self.clock = Clock(lambda: self.wall_us, lambda: self.monotonic_us)

    def advance(self, seconds: float) -> None:
        """Let time go by."""
        self.wall_us += round(seconds * 1_000_000)
        self.monotonic_us += round(seconds * 1_000_000)


def send(owner: Owner, sealed: str = "QUJD", **members: Any) -> dict[str, Any]:
    """Return a send request."""
    return {"pub": owner.pub, "action": "send", "data": sealed, **members}


def check(owner: Owner, at: int = 0, **members: Any) -> dict[str, Any]:
    """Return a check request."""
    return {"pub": owner.pub, "action": "check", "at": at, **members}


def receive(owner: Owner, answer: str, **members: Any) -> dict[str, Any]:
    """Return a receive request."""
    return {"pub": owner.pub, "action": "receive", "answer": answer, **members}


def answer_of(relay: Relay, owner: Owner, source: str = SOURCE) -> str:
    """Check a box that has messages and return the answer to the question."""
    status, reply = relay.handle(check(owner), source)
    assert status == 200
    assert isinstance(reply, dict)
    return owner.open(reply["question"])


@pytest.fixture
def alice() -> Owner:
    """Return the owner of a mailbox."""
    return Owner(1)


@pytest.fixture
def bob() -> Owner:
    """Return the owner of another."""
    return Owner(2)


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still until it is told."""
    return FakeClock()


@pytest.fixture
def relay(clock: FakeClock) -> Iterator[Relay]:
    """Return a relay in memory with the default limits."""
    relay = Relay(SqliteStore(":memory:"), clock=clock.clock)
    yield relay
    relay.close()

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
    """Return a folder that goes with the test; pytest would keep the 8 MiB of every store."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    """Return an empty store of each kind."""
    store = STORES[request.param](folder)
    yield store
    store.close()


def box_of(number: int) -> bytes:
    """Return a mailbox as the store sees it: 49 bytes."""
    return bytes([2]) + number.to_bytes(48, "big")


def source_hash(source: int, network: int = 0) -> bytes:
    """Return the hash of a source: an IPv4 address, or one in a /48 with a number.

    There the source's first byte of two is its /56.
    """
    if network:
        return network.to_bytes(8, "big") + (source >> 8).to_bytes(4, "big") + bytes(
            [1, 0, 0, source & 0xFF])
    return (source + (1 << 32)).to_bytes(8, "big") + bytes(8)


def put(store: Store, limits: Limits | None = None, now_us: int = NOW_US, **members: int) -> int:
    """Put a message (box, source, network, size, ttl_us) and return its `at`."""
    given = {"box": 0, "source": 0, "network": 0, "size": 4, "ttl_us": HOUR_US} | members
    message = Message(
        box_of(given["box"]),
        "A" * given["size"],
        source_hash(given["source"], given["network"]),
        given["ttl_us"],
    )
    return store.put(message, limits or Limits(), now_us)


def sweep_all(store: Store, now_us: int) -> int:
    """Sweep until there is no more and return the number of steps."""
    for step in range(1, 1_000):
        if not store.sweep(now_us):
            return step
    raise AssertionError("a sweep that never ends")


def keep_box(
    store: Store, box: int, expires_us: int, room_for: int = 0, now_us: int = NOW_US
) -> int | None:
    """Keep one box row and return until when it lives."""
    store.keep_boxes({box_of(box): expires_us}, now_us, room_for)
    return store.look(box_of(box), 0, now_us).box_expires_us


def test_at_increases_strictly_while_the_clock_stands_still(store: Store) -> None:
    assert [put(store, box=number % 2) for number in range(4)] == [
        NOW_US + number for number in range(4)
    ]


def test_at_increases_when_the_clock_goes_back(store: Store) -> None:
    assert [
        put(store, now_us=now_us)
        for now_us in (NOW_US, NOW_US - HOUR_US, 0, NOW_US + 2, NOW_US + 9)
    ] == [NOW_US, NOW_US + 1, NOW_US + 2, NOW_US + 3, NOW_US + 9]


def test_at_and_time_survive_reopening(folder: Path) -> None:
    first = STORES["file"](folder)
    put(first)
    put(first)
    first.close()
    second = STORES["file"](folder)
    assert second.time_us() == NOW_US
    assert put(second, now_us=NOW_US - DAY_US) == NOW_US + 2
    assert [at for at, _ in second.messages(box_of(0), 0, 100, NOW_US)] == [
        NOW_US,
        NOW_US + 1,
        NOW_US + 2,
    ]
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


@pytest.mark.parametrize(
    ("after_us", "now_us", "found"),
    [
        (0, NOW_US, True),
        (NOW_US - 1, NOW_US, True),
        (NOW_US, NOW_US, False),
        (MAX_AT, NOW_US, False),
        (0, 0, True),
        (0, NOW_US + HOUR_US - 1, True),
        (0, NOW_US + HOUR_US, False),
        (0, NOW_US + DAY_US, False),
    ],
)
def test_look_and_messages_agree_at_their_edges(
    store: Store, after_us: int, now_us: int, found: bool
) -> None:
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


@pytest.mark.parametrize(
    ("sizes", "fit"),
    [
        ([32_768] * 17, 16),
        ([32_768] * 15 + [32_767, 1, 2], 17),
        ([2] + [32_768] * 17, 16),
        ([32_768], 1),
    ],
)
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


# Eight sources, each with an eighth of 800 bytes.
EIGHT = [Put(source, 100) for source in range(8)]
SMALL_BOX = Limits(max_box_messages=16, max_box_bytes=800)
SMALL_RELAY = Limits(max_bytes=9 * MIN_COUNTED_BYTES, max_box_messages=10_000)
ROUND_RELAY = Limits(max_bytes=3_000)


@pytest.mark.parametrize(
    ("limits", "before", "message", "whose"),
    [
        (SMALL_BOX, [Put()], Put(), None),
        (SMALL_BOX, [Put(times=2)], Put(), "source"),
        (SMALL_BOX, [Put(times=2)], Put(source=1), None),
        (SMALL_BOX, [Put(times=2)], Put(box=1), None),
        (Limits(max_box_messages=23), [Put(times=2)], Put(), "source"),
        (Limits(max_box_messages=24), [Put(times=2)], Put(), None),
        # A source may always have one message, however small the box.
        (Limits(max_box_messages=4), [], Put(), None),
        (Limits(max_box_messages=4), [Put()], Put(), "source"),
        (SMALL_BOX, [Put(size=60)], Put(size=39), None),
        (SMALL_BOX, [Put(size=60)], Put(size=40), None),
        (SMALL_BOX, [Put(size=60)], Put(size=41), "source"),
        (SMALL_BOX, [Put(source, times=2) for source in range(7)], Put(8), None),
        (SMALL_BOX, [Put(source, times=2) for source in range(8)], Put(0), "source"),
        # A newcomer gets one message in, and no second one.
        (SMALL_BOX, [Put(source, times=2) for source in range(8)], Put(8), None),
        (SMALL_BOX, [*[Put(source, times=2) for source in range(8)], Put(8)], Put(8), "box"),
        # All hold as much as the newcomer would.
        (SMALL_BOX, [Put(source) for source in range(16)], Put(16), "box"),
        (SMALL_BOX, [Put(source, times=2) for source in range(8)], Put(8, box=1), None),
        (SMALL_BOX, EIGHT[:7], Put(8, 99), None),
        (SMALL_BOX, EIGHT[:7], Put(8, 100), None),
        # Nobody has more than one message to give.
        (SMALL_BOX, EIGHT[:7], Put(8, 101), "box"),
        (SMALL_BOX, EIGHT, Put(8, 2), "box"),
        (SMALL_BOX, [*EIGHT[:7], Put(7, 50, 2)], Put(8, 2), None),
        (SMALL_BOX, [*EIGHT[:7], Put(7, 50, 2)], Put(8, 50), None),
        (SMALL_BOX, [*EIGHT[:7], Put(7, 50, 2)], Put(8, 51), "box"),
        (SMALL_RELAY, [Put(times=4)], Put(size=MIN_COUNTED_BYTES), None),
        (SMALL_RELAY, [Put(times=5)], Put(size=2), None),
        (SMALL_RELAY, [Put(times=5)], Put(size=MIN_COUNTED_BYTES), None),
        (SMALL_RELAY, [Put(times=5)], Put(size=MIN_COUNTED_BYTES + 1), "relay"),
        (SMALL_RELAY, [Put(times=6)], Put(size=2), "relay"),
        (SMALL_RELAY, [Put(times=6)], Put(size=2, box=9), None),
        (
            SMALL_RELAY,
            [Put(times=6), Put(times=2, box=9)],
            Put(size=MIN_COUNTED_BYTES, box=9),
            None,
        ),
        (
            SMALL_RELAY,
            [Put(times=6), Put(times=2, box=9)],
            Put(size=MIN_COUNTED_BYTES + 1, box=9),
            "relay",
        ),
        (SMALL_RELAY, [Put(times=6), Put(times=3, box=9)], Put(size=2, box=9), "relay"),
        (ROUND_RELAY, [Put(size=1_000)], Put(1, 999), None),
        (ROUND_RELAY, [Put(size=1_000)], Put(1, 1_000), None),
        (ROUND_RELAY, [Put(size=1_000)], Put(1, 1_001), "relay"),
        (ROUND_RELAY, [Put(box=8, size=1_000), Put(1, 1_000)], Put(box=9, size=1_000), None),
        (ROUND_RELAY, [Put(box=8, size=1_000), Put(1, 1_000)], Put(box=9, size=1_001), "relay"),
    ],
)
def test_put_refuses_the_message_over_a_limit_and_keeps_the_rest(
        store: Store, limits: Limits, before: list[Put], message: Put, whose: str | None) -> None:
    # Box 9 has a proven owner.
    keep_box(store, 9, NOW_US + DAY_US, room_for=1)
    kept = [put(store, limits, source=source, size=size, box=box)
            for source, size, times, box in before for _ in range(times)]
    source, size, _, box = message
    if whose is None:
        assert put(store, limits, source=source, size=size, box=box) == NOW_US + len(kept)
        return
    with pytest.raises(NoRoom) as refused:
        put(store, limits, source=source, size=size, box=box)
    # Room comes with the first message to expire, or of the source's own to be old.
    until_us = 0
    if whose != "relay":
        ((first_at, _),) = store.messages(box_of(box), 0, 1, NOW_US)
        senders = [put.source for put in before for _ in range(put.times)]
        own = [at for at, sender in zip(kept, senders, strict=True) if sender == source]
        until_us = min([first_at + HOUR_US, *[at + HOUR_US // OLD_PART for at in own]])
    assert (refused.value.whose, refused.value.until_us) == (whose, until_us)
    # Nothing was kept.
    assert store.arrivals(0)[0] == max(kept, default=0)
    assert put(store, now_us=NOW_US + SECOND_US) == NOW_US + SECOND_US


# In a box of 16 a source may have 2 messages, a /56 has room for 4 and a /48 for 8.
FILLED_BY_TWO = Limits(max_box_messages=16)


def ats_in(store: Store) -> list[int]:
    """Return the `at` of all messages in box 0, from NOW_US on."""
    return [at - NOW_US for at, _ in store.messages(box_of(0), 0, 100, NOW_US)]


def test_newcomer_gets_in_at_the_cost_of_the_oldest_message_of_the_largest_holder(
    store: Store,
) -> None:
    limits = Limits(max_box_messages=24)
    for source, times in ((0, 2), (1, 3), (2, 3), *((source, 2) for source in range(3, 11))):
        for _ in range(times):
            put(store, limits, source=source)
    assert len(ats_in(store)) == 24
    # The largest are 1 and 2 with three messages each, and then all with two.
    for newcomer, gone in ((11, 2), (12, 5), (13, 0), (14, 3), (15, 6), (16, 8)):
        before = ats_in(store)
        put(store, limits, source=newcomer)
        assert set(before) - set(ats_in(store)) == {gone}
    assert store.stored().messages == 24
    assert store.stored().bytes == 24 * MIN_COUNTED_BYTES


def test_newcomer_gets_in_by_as_many_messages_as_its_bytes_need(store: Store) -> None:
    for source in range(7):
        put(store, SMALL_BOX, source=source, size=100)
    for size in (10, 20, 30, 40):
        put(store, Limits(), source=7, size=size)
    put(store, SMALL_BOX, source=8, size=31)
    assert ats_in(store) == [*range(7), 10, 11]
    with pytest.raises(NoRoom):
        # The last message of source 7 does not give way.
        put(store, SMALL_BOX, source=9, size=30)
    assert ats_in(store) == [*range(7), 10, 11]


def test_network_with_one_message_never_gives_way_and_one_with_more_does(store: Store) -> None:
    # Two /48s fill the box, with a source in each of eight /56s.
    for network in (1, 2):
        for source in range(8):
            put(store, FILLED_BY_TWO, network=network, source=source << 8)
    # Two customers get in, at the cost of each of them.
    for source in (0, 1):
        put(store, FILLED_BY_TWO, source=source)
    assert ats_in(store) == [*range(1, 8), *range(9, 18)]
    # Further sources of the two networks do not: each holds as much as the other.
    for network in (1, 2, 1):
        with pytest.raises(NoRoom, match="box"):
            put(store, FILLED_BY_TWO, network=network, source=9 << 8)
    assert ats_in(store) == [*range(1, 8), *range(9, 18)]
    # A third /48 does, until it holds as much as they do.
    got_in = 0
    for source in range(16):
        with contextlib.suppress(NoRoom):
            put(store, FILLED_BY_TWO, network=3, source=source << 8)
            got_in += 1
    assert got_in == 4
    assert {16, 17} < set(ats_in(store))


# How many sources of a network get a message in: of its /56, of others, and then one more.
@pytest.mark.parametrize(("sources", "whose"), [
    ([1, 1], None),
    ([1, 1, 1], "source"),
    ([1, 1, 2, 2], None),
    # The /56 is full: a newcomer gets in, and so does the next until all have one.
    ([1, 1, 2, 2, 3], None),
    ([1, 1, 2, 2, 3, 4], None),
    ([1, 1, 2, 2, 3, 4, 5], "source"),
    ([1, 1, 2, 2, 1], "source"),
    # The /48 is full.
    ([1, 1, 2, 2, 0x101, 0x101, 0x102, 0x102], None),
    ([1, 1, 2, 2, 0x101, 0x101, 0x102, 0x102, 0x201], None),
    ([1, 1, 2, 2, 0x101, 0x101, 0x102, 0x102, 0x201, 0x201], "source"),
    ([number << 8 for number in range(8)], None),
    ([number << 8 for number in range(9)], "source"),
])
def test_networks_have_a_part_of_the_box(
    store: Store, sources: list[int], whose: str | None
) -> None:
    for source in sources[:-1]:
        put(store, FILLED_BY_TWO, network=1, source=source)
    if whose is None:
        put(store, FILLED_BY_TWO, network=1, source=sources[-1])
        return
    with pytest.raises(NoRoom, match=whose):
        put(store, FILLED_BY_TWO, network=1, source=sources[-1])
    # Others have room.
    put(store, FILLED_BY_TWO, network=2)
    put(store, FILLED_BY_TWO)


def test_put_has_room_in_a_box_at_the_microsecond_of_expiry_without_a_sweep(store: Store) -> None:
    limits = Limits(max_box_messages=8)
    for source in range(8):
        # The message of this source expires at NOW_US + 1 s + 2 * source.
        put(store, limits, source=source, ttl_us=SECOND_US + source)
    with pytest.raises(NoRoom) as refused:
        put(store, limits, source=8, now_us=NOW_US + SECOND_US - 1)
    assert (refused.value.whose, refused.value.until_us) == ("box", NOW_US + SECOND_US)
    assert put(store, limits, source=8, now_us=NOW_US + SECOND_US) == NOW_US + SECOND_US


# In a box of 16 a source may have 2 messages.
OLD_US = HOUR_US // OLD_PART


@pytest.mark.parametrize("more_us", [-1, 0, 1])
def test_own_oldest_message_gives_way_to_a_newer_one_once_it_is_old(
    store: Store, more_us: int
) -> None:
    for _ in range(2):
        put(store, FILLED_BY_TWO)
    put(store, FILLED_BY_TWO, source=1)
    now_us = NOW_US + OLD_US + more_us
    if more_us < 0:
        with pytest.raises(NoRoom) as refused:
            put(store, FILLED_BY_TWO, now_us=now_us)
        assert (refused.value.whose, refused.value.until_us) == ("source", NOW_US + OLD_US)
        assert ats_in(store) == [0, 1, 2]
        return
    put(store, FILLED_BY_TWO, now_us=now_us)
    assert ats_in(store) == [1, 2, OLD_US + more_us]
    assert store.stored().messages == 3
    assert store.stored().bytes == 3 * MIN_COUNTED_BYTES


def test_own_messages_give_way_as_far_as_a_newer_one_needs_and_no_others_do(store: Store) -> None:
    for source in range(7):
        put(store, SMALL_BOX, source=source, size=100)
    for size in (30, 30):
        put(store, SMALL_BOX, source=7, size=size)
    now_us = NOW_US + HOUR_US // 2
    put(store, SMALL_BOX, source=7, size=50, now_us=now_us)
    assert ats_in(store) == [*range(7), 8, HOUR_US // 2]
    put(store, SMALL_BOX, source=7, size=40, now_us=now_us)
    assert ats_in(store) == [*range(7), HOUR_US // 2, HOUR_US // 2 + 1]
    with pytest.raises(NoRoom, match="source"):
        put(store, SMALL_BOX, source=7, size=40, now_us=now_us + OLD_US - 1)


def test_own_message_gives_way_where_others_fill_the_box(store: Store) -> None:
    limits = Limits(max_box_messages=8)
    for source in range(8):
        put(store, limits, source=source)
    put(store, limits, source=3, now_us=NOW_US + HOUR_US // 2)
    assert ats_in(store) == [0, 1, 2, *range(4, 8), HOUR_US // 2]


def test_put_and_put_question_go_by_the_stores_time_when_the_callers_is_behind(
    store: Store,
) -> None:
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
    for later_us, offered, kept in (
        (0, "a", "a"),
        (0, "b", "a"),
        (29, "c", "a"),
        (30, "d", "d"),
        (31, "e", "d"),
        (59, "f", "d"),
        (60, "g", "g"),
        (61, "h", "g"),
    ):
        question = (offered, offered.encode())
        assert store.put_question(box_of(0), question, 60, NOW_US + later_us) == kept
        assert store.question(box_of(0), 0, NOW_US + later_us) == kept
    assert store.put_question(box_of(1), ("z", b"z"), 60, NOW_US + 61) == "z"


def test_answers_are_good_until_the_microsecond_of_expiry_and_at_most_two(store: Store) -> None:
    for later_us in range(0, 200, 10):
        store.put_question(
            box_of(0), (str(later_us), str(later_us).encode()), 60, NOW_US + later_us
        )
        assert 1 <= len(store.answers(box_of(0), NOW_US + later_us)) <= 2
    assert set(store.answers(box_of(0), NOW_US + 190)) == {b"150", b"180"}
    assert set(store.answers(box_of(0), NOW_US + 209)) == {b"150", b"180"}
    assert store.answers(box_of(0), NOW_US + 210) == [b"180"]
    assert store.answers(box_of(0), NOW_US + 239) == [b"180"]
    assert store.answers(box_of(0), NOW_US + 240) == []
    assert store.answers(box_of(1), NOW_US) == []


def test_keep_boxes_makes_rows_while_there_is_room_and_only_raises_them(store: Store) -> None:
    later_us = NOW_US + HOUR_US
    # With room for no row, none is made.
    assert keep_box(store, 0, later_us) is None
    assert [keep_box(store, number, later_us, room_for=2) for number in range(3)] == [
        later_us,
        later_us,
        None,
    ]
    assert keep_box(store, 0, later_us - 1, room_for=2) == later_us
    assert keep_box(store, 0, later_us + 1) == later_us + 1
    assert keep_box(store, 1, later_us + 1, room_for=2) == later_us + 1
    assert keep_box(store, 2, later_us, room_for=3) == later_us
    store.keep_boxes({}, NOW_US)
    everything = {box_of(number): later_us + 2 for number in range(5)}
    store.keep_boxes(everything, NOW_US, 4)
    kept = [store.look(box, 0, NOW_US).box_expires_us for box in everything]
    assert kept == [later_us + 2] * 4 + [None]


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
        put(
            store, limits, box=number, ttl_us=SECOND_US, size=2 if number % 2 else MIN_COUNTED_BYTES
        )
        store.put_question(box_of(number), ("question", b"answer"), SECOND_US, NOW_US)
    store.keep_boxes({box_of(number): NOW_US + SECOND_US for number in range(300)}, NOW_US, 300)
    later_us = NOW_US + 2 * SECOND_US
    # What has expired takes its bytes until it is swept.
    with pytest.raises(NoRoom):
        put(store, limits, box=999, now_us=later_us)
    # Nothing has expired yet.
    assert sweep_all(store, NOW_US) == 1
    assert sweep_all(store, later_us) > 1
    assert store.arrivals(0) == (0, set())
    assert store.sweep(later_us) is False
    # As many as before fit again, no more.
    for number in range(300):
        put(store, limits, box=number, now_us=later_us)
    with pytest.raises(NoRoom, match="relay"):
        put(store, limits, box=999, now_us=later_us)
    assert [keep_box(store, number, later_us + 1, 1, later_us) for number in (7, 8)] == [
        later_us + 1,
        None,
    ]


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
    # The expired message is gone.
    assert store.arrivals(0) == (NOW_US + 1, {box_of(0)})


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
    assert store.answers(box_of(0), NOW_US) == [
        handed_out[0].replace("question", "answer").encode()
    ]


METHODS: Mapping[str, Callable[[Store], object]] = {
    "time_us": lambda store: store.time_us(),
    "put": put,
    "look": lambda store: store.look(box_of(0), 0, NOW_US),
    "messages": lambda store: store.messages(box_of(0), 0, 1, NOW_US),
    "arrivals": lambda store: store.arrivals(0),
    "question": lambda store: store.question(box_of(0), 0, NOW_US),
    "put_question": lambda store: store.put_question(
        box_of(0), ("question", b"answer"), SECOND_US, NOW_US
    ),
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
OWNERS = [Owner(number) for number in range(10, 17)]
# Two sources.
HOME, OTHER = "192.0.2.1", "198.51.100.2"
Make = Callable[..., Relay]


@pytest.fixture
def make(clock: FakeClock) -> Iterator[Make]:
    """Return a function that makes a relay with limits; all are closed with the test."""
    made: list[Relay] = []

    def make_relay(
        store: Store | None = None,
        *,
        access: Access | None = None,
        about: About | None = None,
        log_ips: bool = False,
        **limits: int,
    ) -> Relay:
        relay = Relay(
            store or SqliteStore(":memory:"),
            Limits(**limits),
            access=access,
            about=about,
            clock=clock.clock,
            log_ips=log_ips,
        )
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
    """Note the calls of a store's methods, and raise from them what a test sets."""

    def __init__(self, store: Store | None = None) -> None:
        self.inside = store or SqliteStore(":memory:")
        self.calls: collections.Counter[str] = collections.Counter()
        # The arguments of the last call of each method.
        self.values: dict[str, tuple[Any, ...]] = {}
        self.error: Exception | None = None
        # The methods that raise it; None is for all of them.
        self.failing: frozenset[str] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inside, name)

        def call(*values: Any, **named: Any) -> Any:
            self.calls[name] += 1
            self.values[name] = values
            if self.error and self.fails(name):
                raise self.error
            return method(*values, **named)

        return call

    def fails(self, name: str) -> bool:
        """Return whether a method raises; a store can always be closed."""
        if self.failing is None:
            return name != "close"
        return name in self.failing

    @property
    def store(self) -> Store:
        """Return itself, as what a relay takes."""
        return cast(Store, self)


# The walk, questions and answers


def test_whole_walk_from_an_empty_box_to_the_expiry_of_messages(
    relay: Relay, clock: FakeClock, alice: Owner
) -> None:
    assert relay.handle(check(alice), HOME) == (200, NOTHING)
    for number in range(3):
        assert relay.handle(send(alice, f"QUJ{number}"), OTHER) == OK_REPLY
        clock.advance(1)
    ats = [START_US + number * SECOND_US for number in range(3)]
    answer = answer_of(relay, alice)
    newest = [{"at": at, "data": f"QUJ{number}"} for number, at in enumerate(ats)]
    assert relay.handle(receive(alice, answer), HOME) == (200, {"ok": True, **newest[0]})
    assert relay.handle(receive(alice, answer, limit=1, at=ats[0]), HOME) == (
        200,
        {"ok": True, **newest[1]},
    )
    assert relay.handle(receive(alice, answer, limit=2), HOME) == (
        200,
        {"ok": True, "messages": newest[:2]},
    )
    assert relay.handle(receive(alice, answer, limit=100), HOME) == (
        200,
        {"ok": True, "messages": newest},
    )
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


def test_answer_is_the_random_source_s_256_bits_and_kept_as_a_hash(
    clock: FakeClock, alice: Owner
) -> None:
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
    for wrong in (
        question,
        stolen.hex(),
        answer + "=",
        answer[:-1],
        answer.swapcase(),
        "",
        "\0",
        "é",
        "x" * 100_000,
    ):
        assert refused(relay.handle(receive(alice, wrong), HOME)) == (403, "Wrong answer", 0)
    relay.close()


def test_question_opens_only_with_the_question_s_context(
    relay: Relay, alice: Owner, bob: Owner
) -> None:
    relay.handle(send(alice), OTHER)
    question = decode(question_of(relay, alice))
    assert CONTEXTS["question"] == b"connectoid/1 question"
    assert len(SUITE.decrypt(question, alice.key, info=b"connectoid/1 question")) == 43
    for key, context in (
        (alice.key, b"connectoid/1 message"),
        (alice.key, b""),
        (bob.key, b"connectoid/1 question"),
    ):
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
        # Until they are swept.
        self.kept: list[Kept] = []
        self.asked: list[Asked] = []
        self.proven: set[str] = set()

    def box(self, pub: str, at: int = 0) -> list[Kept]:
        return [m for m in self.kept if m.box == pub and m.at > at and m.at + TTL_US > self.now_us]

    def send(self, pub: str, data: str, source: str) -> object:
        box = self.box(pub)
        own = [m for m in box if m.source == source]
        total = sum(max(512, len(m.data)) for m in self.kept) + max(512, len(data))
        left, mine = list(box), list(own)
        while len(mine) >= 2 or (mine and sum(len(m.data) for m in mine) + len(data) > 600):
            if not self.is_old(mine[0]):
                return self.refuse("Too often", self.room_us(own, mine))
            left.remove(mine.pop(0))
        while len(left) >= 16 or sum(len(m.data) for m in left) + len(data) > 4_800:
            first = self.first_of_the_largest(left, "" if len(left) >= 16 else data)
            if own:
                first = mine.pop(0) if mine and self.is_old(mine[0]) else None
            if not first:
                return self.refuse("Full", self.room_us(box, mine))
            left.remove(first)
        if total > 42 * 512 * (3 if pub in self.proven else 2) // 3:
            return self.refuse("Full", self.now_us + 60 * SECOND_US)
        self.last_at = max(self.now_us, self.last_at + 1)
        self.kept = [m for m in self.kept if m in left or m not in box]
        self.kept.append(Kept(pub, source, data, self.last_at))
        return {"ok": True}

    def is_old(self, message: Kept) -> bool:
        return message.at + TTL_US // OLD_PART <= self.now_us

    def room_us(self, part: list[Kept], mine: list[Kept]) -> int:
        return min([m.at + TTL_US for m in part] + [m.at + TTL_US // OLD_PART for m in mine])

    def first_of_the_largest(self, box: list[Kept], data: str) -> Kept | None:
        """Return what gives way to a newcomer: with data the bytes count, else the messages."""
        holders = {}
        for source in dict.fromkeys(m.source for m in box):
            its = [m for m in box if m.source == source]
            amount = sum(len(m.data) for m in its) if data else len(its)
            if len(its) > 1 and amount > max(1, len(data)):
                holders[source] = amount
        largest = max(holders, key=lambda source: holders[source], default=None)
        return next((m for m in box if m.source == largest), None)

    def refuse(self, error: str, until_us: int) -> object:
        return {"ok": False, "error": error, "retry": -(-(until_us - self.now_us) // SECOND_US)}

    def check(self, pub: str, at: int, new_question: str | None) -> object:
        """Return the reply; a new question is as the relay made it."""
        if not self.box(pub, at):
            return {"ok": True, "found": False}
        young = [
            q.question
            for q in self.asked
            if q.box == pub and q.made_us > self.now_us - GOOD_US // 2
        ]
        return {"ok": True, "found": True, "question": young[-1] if young else new_question}

    def receive(self, pub: str, answer: str, at: int, limit: int) -> object:
        if not any(
            q.answer == answer
            for q in self.asked
            if q.box == pub and q.made_us + GOOD_US > self.now_us
        ):
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

    @rule(
        pubs=st.lists(PUBS, max_size=4),
        picks=st.lists(PICKS, min_size=4, max_size=4),
        waits=st.integers(0, 99),
    )
    def batch(self, pubs: list[str], picks: list[int], waits: int) -> None:
        checks = [(pub, self.some_at(pick)) for pub, pick in zip(pubs, picks, strict=False)]
        items: list[object] = [
            {"pub": pub, "action": "check", "at": at, "wait": waits} for pub, at in checks
        ]
        replies = self.handle([*items, "junk"])
        assert replies.pop() == {"ok": False, "error": "Bad request"}
        for (pub, at), reply in zip(checks, replies, strict=True):
            self.compare_check(pub, at, reply)

    @rule(
        which=st.sampled_from(("good", "good", "good", "expired", "foreign", "wrong")),
        pub=PUBS,
        pick=PICKS,
        limit=st.sampled_from((1, 2, 5, 100)),
    )
    def receive(self, which: str, pub: str, pick: int, limit: int) -> None:
        if which == "good":
            self.check(pub, 0)
        alive = [asked for asked in self.model.asked if asked.made_us + GOOD_US > self.model.now_us]
        answers = [
            asked.answer
            for asked in {
                "good": [asked for asked in alive if asked.box == pub],
                "foreign": alive,
                "wrong": [],
                "expired": [
                    asked
                    for asked in self.model.asked[-9:]
                    if asked not in alive and asked.box == pub
                ],
            }[which]
        ]
        answer, at = [*answers, "wrong"][pick % max(1, len(answers))], self.some_at(pick)
        reply = self.handle(
            {"pub": pub, "action": "receive", "answer": answer, "at": at, "limit": limit}
        )
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
        edges |= {
            asked.made_us + good_us
            for asked in self.model.asked
            for good_us in (GOOD_US // 2, GOOD_US)
        }
        later = sorted(edge + step_us for edge in edges if edge + step_us > self.model.now_us)
        if later:
            # Most steps are short: the next few moments count.
            self.advance(later[pick % min(len(later), 5)] - self.model.now_us)

    @rule()
    def sweep(self) -> None:
        while self.relay.sweep():
            pass
        self.model.sweep()

    @rule()
    def reopen(self) -> None:
        self.relay.close()
        self.relay = self.open()


def live(examples: int, steps: int) -> None:
    """Let so many relays take so many random steps each, beside a model."""
    run_state_machine_as_test(
        RelayAgainstModel,
        settings=settings(
            derandomize=True,
            deadline=None,
            print_blob=False,
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_relay_replies_as_the_model_does() -> None:
    live(examples=10, steps=30)
