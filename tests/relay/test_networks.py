"""Test that a customer with many IPv6 sources has no more than a /56 or a /48 may have."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import (
    NOW_US,
    OK_REPLY,
    OWNERS,
    Make,
    Owner,
    WatchedStore,
    check,
    lasting,
    refused,
    send,
)

from connectoid_relay import (
    MAX_BATCH_ITEMS,
    MAX_DATA_CHARS,
    MAX_SOURCES,
    MIN_COUNTED_BYTES,
    SECOND_US,
    TIMES_OF_48,
    TIMES_OF_56,
    Limits,
    RateLimit,
    Relay,
    RelayServer,
    SqliteStore,
    Wider,
    networks_of,
    source_of,
)

# In 2001:db8:7::/48.
HOME = "2001:db8:7:100::1"


def addresses(first: int, count: int, step: int = 1) -> list[str]:
    """Return addresses in so many /64s of one /48."""
    return [f"2001:db8:7:{first + step * number:x}::1" for number in range(count)]


# Of one /56, and one of each /56, of the same /48.
IN_56 = addresses(0x100, 256)
IN_48 = addresses(0, 256, 256)


class Network(NamedTuple):
    """Twenty sources, and how many times as much they may have as one."""

    sources: list[str]
    times: int


NETWORKS = (
    Network([HOME] * 20, 1),
    Network(IN_56[:20], TIMES_OF_56),
    Network(IN_48[:20], TIMES_OF_48),
)
IPV4 = [f"192.0.2.{number}" for number in range(256)]


@pytest.mark.parametrize(("address", "networks"), [
    ("192.0.2.7", ()),
    ("::ffff:192.0.2.7", ()),
    ("unix", ()),
    ("", ()),
    ("2001:db8:1:2fe::7", ("2001:0db8:0001:0200::/56", "2001:0db8:0001::/48")),
    ("2001:db8:1:200::8", ("2001:0db8:0001:0200::/56", "2001:0db8:0001::/48")),
    ("2001:db8:1:300::8", ("2001:0db8:0001:0300::/56", "2001:0db8:0001::/48")),
    ("::1", ("0000:0000:0000:0000::/56", "0000:0000:0000::/48")),
])
def test_networks_around_a_source_are_those_of_ipv6(
        address: str, networks: tuple[str, ...]) -> None:
    times = (TIMES_OF_56, TIMES_OF_48)
    expected = [Wider(*network) for network in zip(networks, times, strict=False)]
    assert list(networks_of(source_of(address))) == expected


# ---------------------------------------------------------------------------------------
# Rates.
# ---------------------------------------------------------------------------------------


def served(relay: Relay, requests: list[object], sources: list[str]) -> int:
    """Make a request from each of the sources in turn; return how many were not too often."""
    statuses = [relay.handle(request, source).status
                for request, source in zip(requests, sources, strict=False)]
    assert set(statuses) <= {200, 429}
    return statuses.count(200)


# A limit of 3, and how to use it up.
RATES: dict[str, tuple[dict[str, int], list[object]]] = {
    "rate": ({"rate": 3}, [check(OWNERS[0])] * 256),
    "max_sends": ({"max_sends": 3}, [send(OWNERS[0])] * 256),
    "max_source_bytes": (
        {"max_source_bytes": 12}, [send(Owner(number)) for number in range(1, 99)]),
    "max_seals": ({"max_seals": 3}, [check(Owner(number)) for number in range(1, 99)]),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize(("sources", "times"), [
    ([HOME] * 256, 1),
    (IN_56, TIMES_OF_56),
    (IN_48, TIMES_OF_48),
    (IPV4, 0),
], ids=["64", "56", "48", "IPv4"])
def test_rate_of_a_network_is_some_times_that_of_a_source(
        make: Make, name: str, sources: list[str], times: int) -> None:
    limits, requests = RATES[name]
    relay = make(**limits)
    if name == "max_seals":
        # Something to be asked for in each box.
        for number in range(1, 99):
            relay.handle(send(Owner(number)), f"198.51.100.{number}")
    # All of them are other customers in IPv4.
    assert served(relay, requests, sources) == (3 * times or len(requests[:256]))


def test_rate_counts_nothing_of_what_it_refuses(make: Make, alice: Owner) -> None:
    relay = make(rate=3)
    # One source of the network asks without a pause.
    assert served(relay, [check(alice)] * 99, [HOME] * 99) == 3
    # The others have what is left of it.
    assert served(relay, [check(alice)] * 99, IN_56[1:]) == 3 * (TIMES_OF_56 - 1)


def test_rate_limit_knows_a_bounded_number_of_networks() -> None:
    limit = RateLimit(5, SECOND_US)

    def take(number: int) -> int:
        return limit.take(number, NOW_US, wider=(Wider(f"around {number}", 2),))

    # Half of the places are those of networks.
    assert not any(take(number) for number in range(MAX_SOURCES // 2))
    # Further ones share one count.
    assert [take(-number) for number in range(1, 8)] == [0] * 5 + [1] * 2
    assert len(vars(limit)["_taken"]) == MAX_SOURCES + 1


# ---------------------------------------------------------------------------------------
# Places: connections, long polls, memory. A client is one end of a pair of sockets; the server
# takes the other end as a connection from any address.
# ---------------------------------------------------------------------------------------


# Somebody who waits and is never woken.
NOBODY: Any = object()


class Clients:
    """Clients at a server that does not run: all happens as they connect."""

    def __init__(self, relay: Relay, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.server = stack.enter_context(RelayServer(("127.0.0.1", 0), relay))

    def connect(self, address: str, request: bytes) -> bytes:
        """Connect from an address with a request; return what there is of a reply."""
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        ours.sendall(request)
        self.server.process_request(theirs, (address, 0))
        ours.setblocking(False)
        try:
            return ours.recv(4_096)
        except BlockingIOError:
            return b""

    def statuses(self, sources: list[str], request: bytes) -> list[bytes]:
        """Return the status of each reply, nothing for a client that waits."""
        return [self.connect(source, request)[9:12] for source in sources]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Return what closes all sockets with the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("network", NETWORKS, ids=["64", "56", "48"])
@pytest.mark.parametrize("limit", [1, 3])
def test_connections_of_a_network_are_limited(
        make: Make, stack: contextlib.ExitStack, alice: Owner, network: Network,
        limit: int) -> None:
    sources, times = network
    clients = Clients(make(rate=0, max_connections_per_source=limit), stack)
    room = limit * times
    statuses = clients.statuses(sources, lasting(check(alice)))
    assert statuses == [b"200"] * room + [b"503"] * (20 - room)
    # Other customers are served.
    assert clients.statuses(["2001:db8:8::1", "192.0.2.1"], lasting(check(alice))) == [b"200"] * 2


@pytest.mark.parametrize("network", NETWORKS, ids=["64", "56", "48"])
@pytest.mark.parametrize("limit", [1, 3])
def test_waits_of_a_network_are_limited(
        make: Make, stack: contextlib.ExitStack, alice: Owner, network: Network,
        limit: int) -> None:
    sources, times = network
    clients = Clients(make(rate=0, max_waiting_per_source=limit), stack)
    waiting = lasting(check(alice, wait=60))
    room = limit * times
    assert clients.statuses(sources, waiting) == [b""] * room + [b"200"] * (20 - room)
    assert clients.server.waiting.taken == room
    assert clients.statuses(["2001:db8:8::1", "192.0.2.1"], waiting) == [b""] * 2


@pytest.mark.parametrize(("limit", "fits"), [(2, False), (3, True), (4, True), (0, True)])
def test_a_batch_takes_places_of_its_network(
        make: Make, stack: contextlib.ExitStack, limit: int, fits: bool) -> None:
    room = Clients(make(max_waiting_per_source=limit), stack).server.waiting
    boxes = frozenset(owner.box for owner in OWNERS[:3])
    for count in range(TIMES_OF_56):
        assert room.has_room(source_of(IN_56[count]), boxes) == fits
        room.enter(NOBODY, source_of(IN_56[count]), boxes)
    assert room.has_room(source_of(IN_56[TIMES_OF_56]), boxes) == (limit == 0)
    # Another /56, and no IPv6.
    assert room.has_room(source_of(IN_48[7]), boxes) == fits
    assert room.has_room("192.0.2.1", boxes) == fits


def test_places_come_back_with_the_connection(
        make: Make, stack: contextlib.ExitStack, alice: Owner) -> None:
    clients = Clients(make(rate=0, max_waiting_per_source=1), stack)
    for _ in range(3):
        assert clients.statuses(IN_56[:3], lasting(check(alice, wait=60))) == [b"", b"", b"200"]
        for connection in tuple(vars(clients.server)["_connections"]):
            clients.server.close_connection(connection)
        assert clients.server.waiting.taken == clients.server.open.total == 0
        assert not vars(clients.server.open)["_sums"]


def test_memory_of_a_network_is_limited(
        make: Make, stack: contextlib.ExitStack, alice: Owner) -> None:
    clients = Clients(make(max_buffered_bytes=8_000), stack)
    # An unfinished request of 900 bytes: of its 1,000 a source has room for one.
    unfinished = lasting(check(alice, junk="A" * 2_000))[:900]
    assert clients.statuses(IN_48[:6], unfinished) == [b""] * 4 + [b"503"] * 2
    assert clients.statuses([IN_48[0]], unfinished) == [b"503"]
    assert clients.statuses(["192.0.2.1"], unfinished) == [b""]


# ---------------------------------------------------------------------------------------
# The attacks: a /56, which one customer has, against a relay with the default limits.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attackers", "part"), [(IN_56, 0.13), (IN_48, 0.26)], ids=["56", "48"])
def test_one_customer_cannot_take_all_places_of_long_polls(
        make: Make, stack: contextlib.ExitStack, attackers: list[str], part: float) -> None:
    clients = Clients(make(), stack)
    boxes = [check(Owner(number), wait=60) for number in range(1, MAX_BATCH_ITEMS + 1)]
    # A batch is parsed and looked at in the pool; here this thread does its work.
    whole = json.dumps(boxes).encode()
    for attacker in attackers[:40]:
        for _ in range(2):
            outcome: Any = clients.server.relay.begin(whole, source_of(attacker))
            wait = clients.server.relay.perform(outcome)
            waits: frozenset[bytes] = getattr(wait, "boxes", frozenset())
            if waits and clients.server.waiting.has_room(source_of(attacker), waits):
                clients.server.waiting.enter(NOBODY, source_of(attacker), waits)
    assert 0 < clients.server.waiting.taken <= part * Limits().max_waiting
    assert clients.statuses(["192.0.2.1"], lasting(boxes[0])) == [b""]


@pytest.mark.parametrize("attackers", [IN_56, IN_48], ids=["56", "48"])
def test_one_customer_cannot_fill_the_public_storage(
        make: Make, attackers: list[str], folder: Path) -> None:
    # The defaults, 4,096 times smaller: the same ratio of a source to the whole.
    limits = Limits()
    room = limits.max_bytes >> 12
    relay = make(
        SqliteStore(str(folder / "relay.db"), sync="normal"),
        max_bytes=room, max_source_bytes=limits.max_source_bytes >> 12, rate=600)
    kept = 0
    for number, attacker in enumerate(attackers[:64]):
        for size in range(64):
            data = "A" * MIN_COUNTED_BYTES
            reply = relay.handle(send(Owner(64 * number + size + 1), data), attacker)
            kept += reply.status == 200
            if reply.status != 200:
                assert refused(reply)[1] == "Too often"
                break
    times = {id(IN_56): TIMES_OF_56, id(IN_48): TIMES_OF_48}[id(attackers)]
    assert kept * MIN_COUNTED_BYTES == times * limits.max_source_bytes >> 12
    assert kept * MIN_COUNTED_BYTES < room * 2 // 3
    assert relay.handle(send(OWNERS[0]), "192.0.2.1") == OK_REPLY


def messages_of(relay: Relay, owner: Owner) -> list[str]:
    """Return the data of all messages of a box."""
    found: list[str] = []
    at_us = 0
    while page := relay.store.messages(owner.box, at_us, 100, relay.now_us()):
        found += [sealed for _, sealed in page]
        at_us = page[-1][0]
    return found


# Whoever reads the link fills the invitation's box, from so many sources of each kind.
@pytest.mark.parametrize("readers", [
    IPV4[:8], IPV4[:255], IN_56, IN_48, IN_56 + IN_48 + IPV4[:128],
], ids=["8 addresses", "255 addresses", "a /56", "a /48", "all"])
def test_reader_of_a_link_cannot_keep_bob_out(
        make: Make, alice: Owner, readers: list[str]) -> None:
    relay = make()
    bob = "198.51.100.1"

    def flood() -> None:
        for reader in readers:
            for _ in range(32):
                if relay.handle(send(alice), reader).status != 200:
                    break

    flood()
    assert relay.handle(send(alice, "Qk9C"), bob) == OK_REPLY
    flood()
    assert "Qk9C" in messages_of(relay, alice)
    limits = Limits()
    assert len(messages_of(relay, alice)) <= limits.max_box_messages


def test_largest_messages_of_a_crowd_do_not_keep_bob_out(make: Make, alice: Owner) -> None:
    relay = make()
    for reader in IPV4[:32]:
        for _ in range(32):
            relay.handle(send(alice, "A" * MAX_DATA_CHARS), reader)
    full = sum(map(len, messages_of(relay, alice)))
    assert full == Limits().max_box_bytes
    assert relay.handle(send(alice, "B" * MAX_DATA_CHARS), "198.51.100.1") == OK_REPLY
    assert messages_of(relay, alice)[-1] == "B" * MAX_DATA_CHARS


@pytest.mark.parametrize("attackers", [IN_56, IN_48], ids=["56", "48"])
def test_one_customer_has_one_share_of_a_full_queue(
        make: Make, stack: contextlib.ExitStack, attackers: list[str]) -> None:
    # The threads do not run.
    pool = Clients(make(max_queued=8), stack).server.pool
    taken = [pool.put(source_of(attacker), NOBODY) for attacker in attackers]
    assert taken == [True] * 8 + [False] * (256 - 8)
    # Another one has half of the places.
    assert [pool.put("192.0.2.1", NOBODY) for _ in range(5)] == [True] * 4 + [False]
    # A third one has a third of them.
    assert [pool.put("2001:db8:8::1", NOBODY) for _ in range(3)] == [True] * 2 + [False]


@pytest.mark.parametrize(("first", "second", "equal_bytes"), [
    ("192.0.2.1", "192.0.2.1", 16),
    ("192.0.2.1", "192.0.2.2", 0),
    ("2001:db8:1:203::1", "2001:db8:1:203::2", 16),
    ("2001:db8:1:203::1", "2001:db8:1:204::1", 12),
    ("2001:db8:1:203::1", "2001:db8:1:303::1", 8),
    ("2001:db8:1:203::1", "2001:db8:2:203::1", 0),
])
def test_hashes_of_one_network_begin_alike(
        make: Make, alice: Owner, first: str, second: str, equal_bytes: int) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    hashes = []
    for address in (first, second):
        assert relay.handle(send(alice), address) == OK_REPLY
        hashes.append(watched.values["put"][0].source)
    assert [len(hashed) for hashed in hashes] == [16, 16]
    are_equal = [one == other for one, other in zip(*hashes, strict=True)]
    assert [*are_equal, False].index(False) == equal_bytes
