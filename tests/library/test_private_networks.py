"""Nobody leads an app to a service of its own machine or network, or to ever new hosts."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from apps import (
    APP_URL,
    SOON_S,
    SUITE,
    Apps,
    FakeRelay,
    apps,
    honest,
    http_reply,
    nothing_new,
    until,
)
from fake_sdp import make_sdp
from test_hostile_counterparts import Place, Stranger, forge, place

from connectoid import Connectoid, Mailbox, Privacy, format_address
from connectoid.http_transport import (
    PRIVATE,
    DaemonResolver,
    HttpTransport,
    is_of_this_machine,
    is_refused,
)
from connectoid.limits import MAX_MAILBOXES
from connectoid.lookups import MAX_ADDRESSES_OF_FAMILY, MAX_LOOKUPS, MAX_LOOKUPS_OF_ONE
from connectoid.relay_client import ON_BEHALF_OF
from connectoid.sender import MAX_NEW_RELAYS
from connectoid_relay import Relay, SqliteStore

__all__ = ["apps", "place"]

REFUSED = "is no relay of yours"
ALL_WAYS = Privacy()


def found(*addresses: str) -> list[Any]:
    """Return what getaddrinfo says of a name."""
    infos = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        infos.append((family, socket.SOCK_STREAM, 6, "", (address, 443)))
    return infos


@pytest.fixture
def relay() -> Iterator[Relay]:
    """Return a relay in memory."""
    relay = Relay(SqliteStore(":memory:"))
    yield relay
    relay.close()


def resolve(*addresses: str, public_only: bool = True) -> list[str]:
    """Return the addresses that may be connected to, of those that a name has."""

    async def run() -> list[str]:
        resolver = DaemonResolver(
            public_only=public_only, getaddrinfo=lambda *_: found(*addresses))
        return [result["host"] for result in await resolver.resolve("relay.example.com", 443)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:192.168.1.1", "fe80::1%eth0",
     "64:ff9b::7f00:1", "2002:a00:1::1", "fd00::1", "100.64.0.1", "0.0.0.0", "ff02::1"],
)
def test_name_of_somebody_else_that_leads_to_a_private_network_is_not_connected_to(
    address: str,
) -> None:
    with pytest.raises(OSError, match="private network"):
        resolve(address)
    assert resolve(address, public_only=False) == [address]
    assert resolve(address, "192.0.2.1", address, "2001:db8::1") == ["192.0.2.1", "2001:db8::1"]


def test_lookups_are_so_many_at_a_time_and_those_of_one_s_own_relays_do_not_wait() -> None:
    """All others wait for a place, without a thread."""
    begun = threading.Semaphore(0)
    may_end = threading.Event()

    def getaddrinfo(*_: object) -> list[Any]:
        begun.release()
        may_end.wait(SOON_S)
        return found("192.0.2.1")

    async def run() -> None:
        resolver = DaemonResolver(public_only=True, getaddrinfo=getaddrinfo)
        lookups = [
            asyncio.create_task(resolver.resolve(f"relay{number}.example"))
            for number in range(3 * MAX_LOOKUPS)
        ]
        for _ in range(MAX_LOOKUPS):
            await asyncio.to_thread(begun.acquire, timeout=SOON_S)
        names = [thread.name for thread in threading.enumerate()]
        assert len([name for name in names if name.startswith("look up ")]) == MAX_LOOKUPS
        assert not begun.acquire(blocking=False)
        may_end.set()
        async with asyncio.timeout(SOON_S):
            assert len(await asyncio.gather(*lookups)) == 3 * MAX_LOOKUPS

    asyncio.run(run())


def test_slow_names_of_one_contact_hold_up_no_other() -> None:
    """It has two places, however many hosts it names; the third name waits for itself."""
    begun = threading.Semaphore(0)
    may_end = threading.Event()
    hosts: list[str] = []

    def getaddrinfo(host: str, *_: object) -> list[Any]:
        hosts.append(host)
        if host.startswith("slow"):
            begun.release()
            may_end.wait(SOON_S)
        return found("192.0.2.1")

    async def look_up(resolver: DaemonResolver, contact: int, host: str) -> str:
        ON_BEHALF_OF.set((True, contact))
        return (await resolver.resolve(host))[0]["host"]

    async def run() -> None:
        resolver = DaemonResolver(public_only=True, getaddrinfo=getaddrinfo)
        slow = [
            asyncio.create_task(look_up(resolver, 1, f"slow{number}.example"))
            for number in range(2 * MAX_LOOKUPS)
        ]
        for _ in range(MAX_LOOKUPS_OF_ONE):
            assert await asyncio.to_thread(begun.acquire, timeout=SOON_S)
        other = asyncio.create_task(look_up(resolver, 2, "bob.example"))
        async with asyncio.timeout(SOON_S):
            assert await other == "192.0.2.1"
        assert len(hosts) == MAX_LOOKUPS_OF_ONE + 1
        # Whoever gives up leaves no place taken.
        for task in slow[::2]:
            task.cancel()
        may_end.set()
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*slow[1::2])
            assert await look_up(resolver, 1, "slow.example") == "192.0.2.1"

    asyncio.run(run())


@pytest.mark.parametrize("public_only", [True, False])
@pytest.mark.parametrize("more", [-1, 0, 1, 4_000])
def test_few_addresses_of_a_name_are_tried(more: int, *, public_only: bool) -> None:
    """Each costs a socket and a timer, and a name may have thousands."""
    count = MAX_ADDRESSES_OF_FAMILY + more
    fours = [f"192.0.2.{number % 256}" for number in range(count)]
    sixes = [f"2001:db8::{number:x}" for number in range(count)]
    few = fours[:MAX_ADDRESSES_OF_FAMILY] + sixes[:MAX_ADDRESSES_OF_FAMILY]
    assert resolve(*fours, *sixes, public_only=public_only) == few
    if public_only:
        assert resolve("10.0.0.1", "10.0.0.2", *fours) == fours[:MAX_ADDRESSES_OF_FAMILY]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_url_of_this_machine_is_asked_only_if_it_may_be_private(host: str) -> None:
    """Before anything is looked up."""

    async def run() -> str:
        transport = HttpTransport(None, lambda _: False)
        try:
            url = f"https://{host}:9/"
            with pytest.raises(ConnectionError) as error:
                await transport.exchange("POST", url, b"{}", timeout_s=SOON_S)
            return str(error.value)
        finally:
            await transport.close()

    assert asyncio.run(run()) == PRIVATE


def test_public_address_of_this_machine_is_as_private_as_localhost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A contact would have this machine knock at its own ports, behind its firewall."""
    monkeypatch.setattr("connectoid.http_transport.source_for", lambda _, host: f"2606:{host[5:]}")
    assert resolve("2606::1", "2607::1") == ["2607::1"]
    assert resolve("2606::1", public_only=False) == ["2606::1"]
    assert is_refused("[2606::1]")
    assert not is_refused("[2607::1]")
    assert not is_refused("relay.example.com")


def test_address_of_this_machine_is_where_it_sends_from_to_itself() -> None:
    assert is_of_this_machine("127.0.0.1")
    assert not is_of_this_machine("203.0.113.1")
    assert not is_of_this_machine("2001:db8::1")


def test_proxy_is_led_to_no_private_address_but_looks_names_up_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What docs/threat-model.md says: behind a proxy only the URL is looked at."""

    async def run(url: str) -> tuple[int, bytes]:
        transport = HttpTransport(None, lambda _: False)
        try:
            return await transport.exchange("POST", url, b"{}", timeout_s=SOON_S)
        finally:
            await transport.close()

    with FakeRelay(lambda _: http_reply([])) as proxy:
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("http_proxy", proxy.url)
        for host in ("127.0.0.1", "localhost", "[::1]", "192.168.1.1"):
            with pytest.raises(ConnectionError, match=REFUSED):
                asyncio.run(run(f"http://{host}:9/"))
        assert proxy.asked == []
        assert asyncio.run(run("http://relay.example.com/")) == (200, b"[]")
        assert len(proxy.asked) == 1


def lead(
    apps: Apps, place: Place, url: str, *, is_allowed: bool, privacy: Privacy = ALL_WAYS,
) -> Connectoid:
    """Have a stranger who opens Alice's link lead her to a URL; return her app."""
    alice = apps.begin("Alice", place.url)
    alice.allow_private_relays = is_allowed
    alice.privacy = privacy
    stranger = Stranger(alice.share("Bob", APP_URL), place)
    stranger._mailbox = Mailbox(SUITE.make_key()[1], url, None)
    stranger.say_hello()
    until(lambda: alice.contacts()[0].state == "welcomed", "bound")
    return alice


def test_opener_leads_an_app_to_no_port_of_its_machine(
    apps: Apps, place: Place, caplog: pytest.LogCaptureFixture,
) -> None:
    """The user is told, in the log."""
    with FakeRelay(nothing_new) as service:
        lead(apps, place, service.url, is_allowed=False)
        until(lambda: REFUSED in caplog.text, "told")
        assert service.asked == []


def test_private_relay_is_written_to_where_the_user_allows_it(apps: Apps, place: Place) -> None:
    """It gets the protocol's POST and nothing else."""
    relay = Relay(SqliteStore(":memory:"))
    with FakeRelay(honest(relay)) as service:
        lead(apps, place, service.url, is_allowed=True)
        until(lambda: service.asked, "written to")
        assert {asked.request["action"] for asked in service.asked} == {"send"}
    relay.close()


def test_app_that_asks_first_is_led_nowhere_before_the_user_connects(
    apps: Apps, place: Place,
) -> None:
    """It is told that somebody waits. The welcome goes out with the user's wish."""
    relay = Relay(SqliteStore(":memory:"))
    with FakeRelay(honest(relay)) as service:
        alice = lead(apps, place, service.url, is_allowed=True, privacy=Privacy(ask_first=True))
        until(lambda: ("Alice", "Bob", "wants_to_connect") in apps.told, "told")
        assert service.asked == []
        with pytest.raises(TimeoutError):
            alice.connect("Bob", 0)
        until(lambda: service.asked, "written to")
    relay.close()


def test_link_leads_an_app_to_no_port_of_its_machine_unless_the_user_names_it(
    apps: Apps, place: Place, caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever opens the link of a relay at home names the relay as his own."""
    alice = apps.begin("Alice", place.url)
    bob = apps.begin("Bob")
    link = alice.share("Bob", APP_URL)
    bob.open(link, "Alice")
    until(lambda: REFUSED in caplog.text, "told")
    assert alice.contacts()[0].state == "invited"
    bob.relays = ((place.url, None),)
    assert bob.connect("Alice", SOON_S)


def test_relay_that_was_named_for_a_contact_is_still_one_of_the_user_s_own(
    apps: Apps, place: Place,
) -> None:
    """After a restart without it."""
    alice, bob = apps.pair(place.url)
    bob.close()
    again = apps.begin("Bob")
    assert again.connect("Alice", SOON_S)
    assert [record.named_relays for record in again.contacts()] == [(place.url,)]
    assert alice.contacts()[0].named_relays == (place.url,)


def test_relay_at_home_that_the_user_moves_away_from_is_polled_until_nobody_writes_there(
    apps: Apps, place: Place,
) -> None:
    """Bob was not there meanwhile, and knows no other."""
    alice, bob = apps.pair(place.url)
    alice.close()
    bob.close()
    relay = Relay(SqliteStore(":memory:"))
    with FakeRelay(honest(relay)) as elsewhere:
        alice = apps.begin("Alice", elsewhere.url)
        alice.move("Bob")
        bob = apps.begin("Bob")
        bob.allow_private_relays = True
        until(lambda: alice.contacts()[0].pending is None, "Bob has written to the new address")
        assert alice.contacts()[0].named_relays == (place.url, elsewhere.url)
        alice.close()
        bob.close()
    relay.close()


def test_relay_of_a_link_is_asked_for_no_document_until_the_user_names_it(
    apps: Apps, relay: Relay,
) -> None:
    """Bob has no relay of his own: he polls there, and connects."""
    with FakeRelay(honest(relay)) as service:

        def documents() -> int:
            return sum(asked.request is None for asked in service.asked)

        alice = apps.begin("Alice", service.url)
        bob = apps.begin("Bob")
        bob.allow_private_relays = True
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert bob.connect("Alice", SOON_S)
        # That was Alice.
        assert documents() == 1
        bob.relays = ((service.url, None),)
        until(lambda: documents() == 2, "asked")


def has_seen(app: Connectoid, seq: int) -> bool:
    """Return whether an app's only contact has sent this number."""
    return app.contacts()[0].seen_seq == seq


def test_contact_that_names_ever_new_relays_costs_bounded_tasks_threads_and_sockets(
    apps: Apps, place: Place, caplog: pytest.LogCaptureFixture,
) -> None:
    """Each message names three hosts that nobody knows: some are written to, the others not."""
    alice, bob = apps.pair(place.url)
    (stolen,) = bob.contacts()
    bob.close()
    # Alice's WebRTC answers it, and nobody joins.
    offer = make_sdp("offer")
    apps.wires.ends[offer["sdp"]] = next(iter(apps.wires.ends.values()))

    def writing_to() -> set[str]:
        tasks = alice.loop_thread.call(asyncio.all_tasks)
        return {task.get_name() for task in tasks if task.get_name().startswith("send to ")}

    threads = threading.active_count()
    seen: set[str] = set()
    number = 0
    while "names ever new relays" not in caplog.text:
        number += 1
        urls = [f"https://relay{number}-{place_no}.invalid/" for place_no in range(MAX_MAILBOXES)]
        boxes = [Mailbox(SUITE.make_key()[1], url, None) for url in urls]
        seq = stolen.seq + 1_000_000 * number
        members = {"seq": seq, "sdpOffer": offer, "connectoid": format_address(boxes)}
        place.post(stolen.contact_address, forge(stolen, "offer", **members))
        until(functools.partial(has_seen, alice, seq), "accepted")
        seen |= writing_to()
        assert number <= MAX_NEW_RELAYS
        assert threading.active_count() <= threads + MAX_LOOKUPS
    assert 0 < len(seen) <= MAX_NEW_RELAYS
    # No relay has the word, and none is asked.
    assert not alice.unshare_and_tell("Bob", 0)
