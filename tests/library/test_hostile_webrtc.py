"""What a hostile contact can have WebRTC do: a real relay, a real runner, and aiortc."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

import pytest
from apps import (
    APP_URL,
    SOON_S,
    SUITE,
    Apps,
    FakeRelay,
    Wire,
    Wires,
    honest,
    http_reply,
    until,
)
from fake_sdp import make_sdp
from two_ends import TwoEnds, run_two_ends

from connectoid import (
    AiortcAdapter,
    Connectoid,
    Contact,
    Ice,
    Invitation,
    Mailbox,
    NotConnectedError,
    Privacy,
    parse_address,
    prove,
    read_link,
    seal_message,
    sign_jws,
)
from connectoid.channel import TOO_LARGE, WRONG
from connectoid.clock import system_now
from connectoid.encoding import encode_base64url
from connectoid.limits import MAX_CANDIDATES, MAX_CHANNEL_BYTES
from connectoid.webrtc import Description
from connectoid_relay import Relay

aiortc = pytest.importorskip("aiortc")
ice = pytest.importorskip("aioice.ice")


class WatchedAdapter(AiortcAdapter):
    """aiortc, and the offers that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.offers: list[Description | None] = []

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Note an offer, and answer it."""
        self.offers.append(offer)
        super().gather(contact, attempt_id, offer, ice)


class Mallory:
    """Whoever has read a link, with functions of the library and no machine."""

    def __init__(self, link: str) -> None:
        self.invitation: Invitation = read_link(link)
        self.key, self.signer = SUITE.make_key()
        self.box_key, self.box = SUITE.make_key()
        (self.mailbox,) = parse_address(self.invitation.address)

    def say_hello(self, sdp: Description) -> None:
        """Send a hello with an offer."""
        payload = {
            "type": "hello",
            "to": self.invitation.address,
            "from": self.signer,
            "seq": system_now().wall_us,
            "re": None,
            "connectoid": str(Mailbox(self.box, self.mailbox.url)),
            "nonce": encode_base64url(SUITE.random(16)),
            "sdpOffer": sdp,
        }
        jws = sign_jws(SUITE, self.key, payload)
        text = f"{jws}.{prove(self.invitation.secret, jws)}"
        self.post(seal_message(SUITE, self.mailbox.pub, text))

    def post(self, sealed: str) -> None:
        """Send data to the mailbox in the link."""
        body = {"action": "send", "pub": self.mailbox.pub, "data": sealed}
        request = urllib.request.Request(self.mailbox.url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=SOON_S) as response:
            assert json.load(response) == {"ok": True}


def machine_of(app: Connectoid) -> Contact:
    """Return the machine of the one contact of an app, which has more than it tells."""
    (contact,) = app.runner._roster.contacts.values()
    return contact


def offer_of(kinds: Iterable[str]) -> Description:
    """Return an offer of aiortc of a data channel and media."""

    async def make() -> Description:
        connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration([]))
        connection.createDataChannel("connectoid")
        for kind in kinds:
            connection.addTransceiver(kind)
        await connection.setLocalDescription(await connection.createOffer())
        local = connection.localDescription
        await connection.close()
        return {"type": local.type, "sdp": local.sdp}

    return asyncio.run(make())


def offer_of_video() -> Description:
    """Return an offer of a data channel and a picture."""
    return offer_of(["video"])


def offer_of_sound() -> Description:
    """Return an offer of a data channel and two sounds."""
    return offer_of(["audio", "audio"])


def offer_of_many_candidates() -> Description:
    """Return an offer that would have datagrams sent to too many hosts."""
    return make_sdp("offer", candidates=MAX_CANDIDATES + 1)


def offer_of_little_room() -> Description:
    """Return an offer that takes messages of 1,000 bytes: `send` of larger ones would fail."""
    sdp = make_sdp("offer")
    return {**sdp, "sdp": sdp["sdp"] + "a=max-message-size:1000\r\n"}


HOSTILE: Mapping[str, Callable[[], Description]] = {
    "video": offer_of_video,
    "sound": offer_of_sound,
    "candidates": offer_of_many_candidates,
    "room": offer_of_little_room,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hello_of_anything_but_a_data_channel_reaches_no_webrtc(
    apps: Apps, relay_url: str, what: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is refused as `sdp` and changes nothing: Bob opens the same link, and they connect."""
    # Where there is no network they connect all the same.
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])
    webrtc = WatchedAdapter()
    alice = apps.begin("Alice", relay_url, webrtc=webrtc)
    link = alice.share("Bob", APP_URL)
    Mallory(link).say_hello(HOSTILE[what]())
    until(lambda: machine_of(alice).dropped, "dropped")
    assert machine_of(alice).dropped == {"sdp": 1}
    assert webrtc.offers == []
    assert alice.contacts()[0].state == "invited"
    bob = apps.begin("Bob", relay_url, webrtc=AiortcAdapter())
    bob.open(link, "Alice")
    alice.connect("Bob", SOON_S).send("Hello")
    assert bob.connect("Alice", SOON_S).receive(SOON_S) == "Hello"
    assert apps.told.count(("Alice", "Bob", "opened_twice")) == 0


@pytest.mark.slow
def test_message_of_16_mib_is_refused_while_it_comes(
    apps: Apps, relay_url: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The contact's aiortc does not keep to what Alice's says that it takes."""
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])
    alice = apps.begin("Alice", relay_url, webrtc=AiortcAdapter())
    adapter = AiortcAdapter()
    bob = apps.begin("Bob", relay_url, webrtc=adapter)
    bob.open(alice.share("Bob", APP_URL), "Alice")
    here = alice.connect("Bob", SOON_S)
    there = bob.connect("Alice", SOON_S)
    (peer,) = adapter._peers.values()

    def send() -> None:
        peer.connection.sctp._remote_max_message_size = None
        peer.channel.send(bytes(16 * 1_048_576))

    bob.loop_thread.call(send)
    with pytest.raises(NotConnectedError, match=TOO_LARGE):
        here.receive(SOON_S)
    assert there.closed.wait(SOON_S)


async def open_another_channel(peer: Any) -> None:
    """Open a second data channel with a long label."""
    peer.connection.createDataChannel("x" * 60_000)


async def send_no_text(peer: Any) -> None:
    """Send a text that is no UTF-8."""
    await peer.connection.sctp._send(peer.channel.id, 51, b"\xff")


ABUSES: Mapping[str, Callable[[Any], Coroutine[Any, Any, None]]] = {
    "channel": open_another_channel,
    "text": send_no_text,
}


@pytest.mark.parametrize("what", ABUSES)
def test_contact_who_sends_what_nobody_may_loses_the_connection(
    apps: Apps, relay_url: str, what: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole message of 64 KiB comes through before that, either way."""
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])
    alice = apps.begin("Alice", relay_url, webrtc=AiortcAdapter())
    adapter = AiortcAdapter()
    bob = apps.begin("Bob", relay_url, webrtc=adapter)
    bob.open(alice.share("Bob", APP_URL), "Alice")
    here = alice.connect("Bob", SOON_S)
    there = bob.connect("Alice", SOON_S)
    there.send(bytes(MAX_CHANNEL_BYTES))
    assert here.receive(SOON_S) == bytes(MAX_CHANNEL_BYTES)
    here.send(bytes(MAX_CHANNEL_BYTES))
    assert there.receive(SOON_S) == bytes(MAX_CHANNEL_BYTES)
    (peer,) = adapter._peers.values()
    bob.loop_thread.wait(ABUSES[what](peer), SOON_S)
    with pytest.raises(NotConnectedError, match=WRONG):
        here.receive(SOON_S)


def test_channel_that_takes_no_message_ends_as_one_that_is_closed(
    apps: Apps, relay_url: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever aiortc raises, the app hears of a connection that it has no more."""
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])
    adapter = AiortcAdapter()
    alice = apps.begin("Alice", relay_url, webrtc=adapter)
    bob = apps.begin("Bob", relay_url, webrtc=AiortcAdapter())
    bob.open(alice.share("Bob", APP_URL), "Alice")
    here = alice.connect("Bob", SOON_S)
    there = bob.connect("Alice", SOON_S)
    (peer,) = adapter._peers.values()
    peer.connection.sctp._remote_max_message_size = 1_000
    here.send("." * 1_000)
    assert there.receive(SOON_S) == "." * 1_000
    with pytest.raises(NotConnectedError, match=r"The connection is closed\."):
        here.send("." * 1_001)
    assert here.closed.wait(SOON_S)
    assert there.closed.wait(SOON_S)


def test_channel_that_takes_no_message_is_closed_without_the_other_end() -> None:
    """It would take part in it, or never."""

    async def play(ends: TwoEnds) -> None:
        async def nothing(_: Any) -> None:
            pass

        ends.mallory.sctp._receive_reconfig_param = nothing
        ends.alice.sctp._remote_max_message_size = 10
        with pytest.raises(ConnectionError):
            await ends.alice.adapter.write(1, 1, bytes(11))
        await ends.alice.reported("closed")

    run_two_ends(play)


def test_waiting_for_room_leaves_nothing_behind() -> None:
    """However often a message has waited."""

    async def play(ends: TwoEnds) -> None:
        channel = ends.alice.peer.channel

        def listeners() -> list[int]:
            return [len(channel.listeners(event)) for event in ("close", "bufferedamountlow")]

        before = listeners()
        for _ in range(40):
            await ends.alice.adapter.write(1, 1, bytes(MAX_CHANNEL_BYTES))
        assert listeners() == before

    run_two_ends(play)


class AskedWire(Wire):
    """WebRTC in memory, and the ICE servers that it was given for each contact."""

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        self.ice: dict[int, Ice] = {}

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Note the servers of the newest attempt."""
        self.ice[contact] = ice
        super().gather(contact, attempt_id, offer, ice)


def says_stun(relay: Relay) -> Callable[[Any], bytes]:
    """Return the replies of a real relay that has a STUN server."""
    serve = honest(relay)

    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({"ok": True, "stun": True})
        return serve(request)

    return reply


class OddWire(Wire):
    """WebRTC that offers something else than a data channel."""

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Report what nobody may send."""
        sdp = make_sdp("offer")
        odd = {**sdp, "sdp": sdp["sdp"].replace("m=application", "m=video")}
        self.report_soon(contact, "gathered", attempt_id, odd)


def test_offer_that_fits_in_no_message_is_told_and_the_contact_goes_on(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture,
) -> None:
    """Made anew from its record, it would gather again at once, and so for ever."""
    alice = apps.begin("Alice", relay_url, webrtc=OddWire(apps.wires))
    alice.open(apps.begin("Bob", relay_url).share("Alice", APP_URL), "Bob")
    (contact,) = alice.runner._roster.contacts.values()
    until(lambda: "is not that of a data channel" in caplog.text, "told")
    assert list(alice.runner._roster.contacts.values()) == [contact]
    assert "Traceback" not in caplog.text
    with pytest.raises(TimeoutError, match="is not that of a data channel"):
        alice.connect("Bob", 0)


def test_relay_that_a_contact_names_is_no_stun_server_for_another(
    apps: Apps, relay: Relay,
) -> None:
    """Mallory's link leads to her relay: it is asked for her sake, and never for Bob's."""
    with FakeRelay(says_stun(relay)) as own, FakeRelay(says_stun(relay)) as hers:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc)
        # All relays of a test are on this machine.
        alice.allow_private_relays = True
        mallory = apps.begin("Mallory", hers.url)
        alice.relays = ()
        alice.open(mallory.share("Alice", APP_URL), "Mallory")
        assert mallory.connect("Alice", SOON_S)
        alice.relays = ((own.url, None),)
        bob = apps.begin("Bob", hers.url)
        bob.allow_private_relays = True
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert alice.connect("Bob", SOON_S)
        # Bob's address is at Mallory's relay too, and Alice polls both.
        assert webrtc.ice[2] == Ice([own.url.replace("http://", "stun:").rstrip("/")])


def test_relay_that_was_away_when_the_app_started_is_asked_for_its_stun_server_once_it_is_back(
    apps: Apps, relay: Relay,
) -> None:
    """At first the network answers itself, with a page where users have to log in."""
    serve = says_stun(relay)
    is_back = threading.Event()

    def reply(request: Any) -> bytes:
        if is_back.is_set():
            return serve(request)
        return http_reply(b"<html>Log in</html>")

    with FakeRelay(reply) as own:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc)
        link = alice.share("Bob", APP_URL)
        until(lambda: own.checks, "asked")
        is_back.set()
        apps.begin("Bob", own.url).open(link, "Alice")
        until(lambda: webrtc.ice, "gathered")
        assert webrtc.ice[1] == Ice([own.url.replace("http://", "stun:").rstrip("/")])


def test_app_that_asks_first_tells_a_contact_no_address_before_it_connects(
    apps: Apps, relay_url: str,
) -> None:
    """Bob opens the link and offers; WebRTC is not touched until Alice's app says so."""
    webrtc = AskedWire(apps.wires)
    alice = apps.begin("Alice", relay_url, webrtc=webrtc)
    alice.privacy = Privacy(ask_first=True)
    bob = apps.begin("Bob", relay_url)
    bob.open(alice.share("Bob", APP_URL), "Alice")
    until(lambda: ("Alice", "Bob", "wants_to_connect") in apps.told, "asked")
    assert webrtc.ice == {}
    alice.connect("Bob", SOON_S).send("Hello")
    assert bob.connect("Alice", SOON_S).receive(SOON_S) == "Hello"


def test_connections_by_relay_alone_use_turn_servers_and_say_if_there_are_none(
    apps: Apps, relay: Relay, caplog: pytest.LogCaptureFixture,
) -> None:
    """The STUN of relays is not asked: it would see one's own address."""
    turn = {"urls": ["turn:turn.example.com"], "username": "alice", "credential": "secret"}
    with FakeRelay(says_stun(relay)) as own:
        webrtc = AskedWire(apps.wires)
        alice = apps.begin("Alice", own.url, webrtc=webrtc, ice_servers=[turn])
        alice.privacy = Privacy(relay_only=True)
        bob = apps.begin("Bob", own.url, ice_servers=["stun:stun.example.com"])
        bob.privacy = Privacy(relay_only=True)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        until(lambda: webrtc.ice, "gathered")
        assert webrtc.ice[1] == Ice([turn], relay_only=True)
    assert "Alice: connections by relay alone need a TURN server" in caplog.text


async def gather_offer(ice: Ice) -> str:
    """Return the SDP of an offer that aiortc makes with some ICE servers."""
    gathered: asyncio.Future[Description] = asyncio.get_running_loop().create_future()

    def report(_contact: int, event: str, _attempt_id: int, value: Any) -> None:
        if event == "gathered":
            gathered.set_result(value)

    adapter = AiortcAdapter()
    adapter.start(report)
    adapter.gather(1, 1, None, ice)
    async with asyncio.timeout(SOON_S):
        description = await gathered
    await adapter.stop()
    return description["sdp"]


def test_aiortc_by_relay_alone_tells_no_address_of_this_machine() -> None:
    """A TURN server that cannot be reached leaves an offer without candidates."""
    nowhere = {"urls": "turn:127.0.0.1:9", "username": "alice", "credential": "secret"}
    sdp = asyncio.run(gather_offer(Ice([nowhere], relay_only=True)))
    assert "a=candidate" not in sdp
    assert "c=IN IP4 0.0.0.0" in sdp or "c=" not in sdp


def test_aiortc_makes_an_offer_beside_a_stun_server_by_its_ipv6_address() -> None:
    """It cannot read the URL that follows from such a relay."""
    assert "m=application" in asyncio.run(gather_offer(Ice(["stun:[2001:db8::1]:443"])))


def open_sockets() -> int:
    """Return how many sockets this process has open."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        # That of the listing itself has gone.
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return found


@pytest.mark.parametrize(("steps", "servers"), [
    (0, ()), (1, ()), (2, ()), (3, ()), (5, ()), (8, ()), (1, ("stun:192.0.2.1:3478",))])
def test_connection_that_ends_while_it_gathers_leaves_no_socket(
    steps: int, servers: tuple[str, ...],
) -> None:
    """However far it is: closed, replaced by another attempt, or ended with all others."""

    async def run() -> int:
        adapter = AiortcAdapter()
        adapter.start(lambda *_: None)
        before = open_sockets()
        for attempt_id in (1, 2, 3):
            adapter.gather(1, attempt_id, None, Ice(servers))
            for _ in range(steps):
                await asyncio.sleep(0)
            if attempt_id == 1:
                adapter.close(1, attempt_id)
        await adapter.stop()
        # A transport closes its socket in the next step of the loop.
        await asyncio.sleep(0)
        return open_sockets() - before

    assert asyncio.run(run()) <= 0


def test_aiortc_gets_the_lines_of_an_offer_that_it_needs_and_no_other(
    apps: Apps, relay_url: str,
) -> None:
    """What nobody knows is left out, and the offer is answered."""
    webrtc = WatchedAdapter()
    alice = apps.begin("Alice", relay_url, webrtc=webrtc)
    mallory = Mallory(alice.share("Bob", APP_URL))
    sdp = make_sdp("offer")
    more = {**sdp, "sdp": sdp["sdp"] + "a=identity:eyJpZHAiOnt9fQ\r\na=later:1\r\n"}
    mallory.say_hello(more)
    until(lambda: webrtc.offers, "answered")
    assert webrtc.offers == [sdp]
