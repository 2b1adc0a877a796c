"""TURN servers that a relay lends: who asks for them, for whom, and how long they are kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from apps import (
    APP_URL,
    SOON_S,
    Apps,
    FakeRelay,
    Wire,
    Wires,
    honest,
    http_reply,
)
from harness import needs, serving
from turn_server import turn_server

from connectoid import AiortcAdapter, Mailbox, Privacy, SystemSuite
from connectoid.contact import Poll
from connectoid.ice import Ice
from connectoid.relay_client import RelayClient
from connectoid.turn import Loans
from connectoid.webrtc import Description
from connectoid_relay import Relay, SqliteStore, Turn

SECRET = "4f1de7f2c5a84f1de7f2c5a8"
URL = "turn:turn.example.com:3478"
SUITE = SystemSuite()
TTL_S = 100.0


class AskedWire(Wire):
    """Connect in memory, and note the servers that WebRTC gets, by contact."""

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        self.ice: dict[int, Ice] = {}

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Note the servers first."""
        self.ice[contact] = ice
        super().gather(contact, attempt_id, offer, ice)


@pytest.fixture
def lender() -> Iterator[Relay]:
    """Return a relay that lends a TURN server."""
    relay = Relay(SqliteStore(":memory:"), turn=Turn([URL], SECRET.encode()))
    yield relay
    relay.close()


def lending(relay: Relay, **changed: Any) -> Callable[[Any], bytes]:
    """Return the replies of a relay that lends, with something changed in what it lends."""
    serve = honest(relay)

    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({"ok": True, "turn": True})
        if changed and isinstance(request, dict) and request.get("turn"):
            return http_reply({"ok": True, "found": False, "turn": changed["turn"]})
        return serve(request)

    return reply


def loans_of(fake: FakeRelay) -> list[Any]:
    """Return the requests for TURN servers that a relay got."""
    requests = [asked.request for asked in fake.posts]
    return [one for one in requests if isinstance(one, dict) and one.get("turn")]


def names_in(ice: Ice) -> list[str]:
    """Return the user names of TURN servers."""
    return [server["username"] for server in ice.servers if isinstance(server, dict)]


def test_connection_has_the_turn_servers_of_ones_own_relay_and_a_name_for_each_contact(
    apps: Apps, lender: Relay,
) -> None:
    """The relay in the other's address is not asked by this side."""
    with FakeRelay(lending(lender)) as own, FakeRelay(lending(lender)) as theirs:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc, ice_servers=["stun:mine.example"])
        for who in ("Bob", "Carol"):
            other = apps.begin(who, theirs.url)
            for app in (alice, other):
                app.allow_private_relays = True
            other.open(alice.share(who, APP_URL), "Alice")
            assert alice.connect(who, SOON_S)
        assert {tuple(ice.servers[:1]) for ice in webrtc.ice.values()} == {("stun:mine.example",)}
        names = [name for ice in webrtc.ice.values() for name in names_in(ice)]
        assert len(names) == len(set(names)) == 2
        polled = {mailbox.pub for one in alice.contacts() for own_ in one.addresses
                  for mailbox in own_.mailboxes}
        assert {request["pub"] for request in loans_of(own)} <= polled
        assert not {request["pub"] for request in loans_of(theirs)} & polled


@pytest.mark.parametrize("turn", [
    None, [], "turn:turn.example.com", {"urls": ["turn:turn.example.com"]},
    {"urls": ["http://x/"], "username": "a", "credential": "b", "ttl": 9}], ids=str)
def test_rubbish_instead_of_turn_servers_costs_a_warning(
    apps: Apps, lender: Relay, turn: Any, caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeRelay(lending(lender, turn=turn)) as own:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc)
        bob = apps.begin("Bob", own.url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert alice.connect("Bob", SOON_S)
    assert [names_in(ice) for ice in webrtc.ice.values()] == [[]]
    told = "A relay lends TURN servers that are left out" in caplog.text
    assert told == (turn is not None)


@pytest.mark.parametrize("silent", ["check", "receive"])
def test_relay_that_does_not_answer_holds_a_connection_up_for_seconds_only(
    apps: Apps, lender: Relay, silent: str,
) -> None:
    serve = lending(lender)

    def reply(request: Any) -> bytes | None:
        for_turn = isinstance(request, dict) and (request.get("prove") or request.get("turn"))
        if for_turn and request["action"] == silent:
            return None
        return serve(request)

    with FakeRelay(reply) as own:
        alice = apps.begin("Alice", own.url)
        bob = apps.begin("Bob", own.url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert alice.connect("Bob", SOON_S)


def test_relay_of_before_asks_nothing_and_lends_nothing(apps: Apps, lender: Relay) -> None:
    serve = lending(lender)

    def reply(request: Any) -> bytes:
        if isinstance(request, dict):
            request.pop("prove", None)
        return serve(request)

    with FakeRelay(reply) as own:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc)
        bob = apps.begin("Bob", own.url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert alice.connect("Bob", SOON_S)
        assert loans_of(own) == []
    assert [names_in(ice) for ice in webrtc.ice.values()] == [[]]


class FakeTime:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


def test_loan_is_renewed_after_half_of_its_time_and_used_until_its_end(lender: Relay) -> None:
    key, pub = SUITE.make_key()
    with FakeRelay(lending(lender, turn={
            "urls": [URL], "username": "alice", "credential": "secret", "ttl": int(TTL_S)})) as own:
        poll = Poll(Mailbox(pub, own.url, None), key, 0)
        now = FakeTime()

        async def renew_at(seconds: float) -> tuple[int, bool]:
            now.now_s = 1_000 + seconds
            is_known = loans.of(poll) is not None
            await loans.renew(poll)
            return len(loans_of(own)), is_known

        async def run() -> list[tuple[int, bool]]:
            try:
                return [await renew_at(at_s) for at_s in (0, 49.9, 50, 149.9, 300)]
            finally:
                await client.close()

        client = RelayClient(own.url)
        loans = Loans(client, SUITE, now)
        assert asyncio.run(run()) == [(1, False), (1, True), (2, True), (3, True), (4, False)]
        assert loans.of(poll) is not None
        # Another mailbox of the same user has nothing of it.
        other = Poll(Mailbox(SUITE.make_key()[1], own.url, None), key, 0)
        assert loans.of(other) is None


def test_nothing_of_what_is_lent_is_in_logs_and_reprs(
    apps: Apps, lender: Relay, caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeRelay(lending(lender)) as own:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc)
        bob = apps.begin("Bob", own.url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert alice.connect("Bob", SOON_S)
        (server,) = webrtc.ice[1].servers
        written = (apps.folder / "Alice.db").read_bytes()
    assert server["credential"] not in caplog.text
    assert server["credential"] not in repr(webrtc.ice)
    assert server["credential"].encode() not in written


@needs("turnserver")
@pytest.mark.slow
def test_two_apps_connect_through_a_real_turn_server_that_their_relay_lends(apps: Apps) -> None:
    """Both connect by relay alone, with nothing set but the relay."""
    config = f"use-auth-secret\nstatic-auth-secret={SECRET}"
    with turn_server(config) as turn_port:
        turn = Turn([f"turn:127.0.0.1:{turn_port}"], SECRET.encode())
        relay = Relay(SqliteStore(":memory:"), turn=turn)
        with serving(relay) as server:
            url = f"http://127.0.0.1:{server.server_port}/"
            alice, bob = (
                apps.begin(who, url, webrtc=AiortcAdapter()) for who in ("Alice", "Bob"))
            for app in (alice, bob):
                app.privacy = Privacy(relay_only=True)
            bob.open(alice.share("Bob", APP_URL), "Alice")
            alice.connect("Bob", SOON_S).send("over TURN")
            assert bob.connect("Alice", SOON_S).receive(SOON_S) == "over TURN"
            assert relay.counts.taken()["connectoid_turn_total", "given"] == 2
            alice.close()
            bob.close()
        relay.close()
