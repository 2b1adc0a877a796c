"""Readers of a link share nothing with the contact: they neither spend nor hold up what is its."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest
from apps import APP_URL, SOON_S, SUITE, Apps, until
from fake_sdp import make_sdp
from fake_wire import MINUTE_S, Attacker, World, apart, invite, link_of, open_link, paired

from connectoid import (
    Effect,
    Invitation,
    Mailbox,
    Send,
    format_address,
    limits,
    parse_address,
    prove,
    read_link,
    seal_message,
    sign_jws,
)
from connectoid.complaints import Complaints
from connectoid.encoding import encode_base64url
from connectoid.relay_client import RelayClient, TransportError
from connectoid.sender import (
    MAX_NEW_RELAYS,
    MAX_QUEUES_OF_CONTACT,
    MAX_QUEUES_OF_STRANGERS,
    Sender,
)
from connectoid_relay import Relay, SqliteStore

RELAY = "https://relay.example.com/"


class Post(NamedTuple):
    """A message for a mailbox."""

    pub: str
    data: str


def hellos(invitation: Invitation, mailbox: Mailbox) -> Iterator[Post]:
    """Return a hello of a stranger with a key of its own, to each mailbox of a link."""
    key, signer = SUITE.make_key()
    payload = {
        "type": "hello",
        "to": invitation.address,
        "from": signer,
        "seq": 1,
        "re": None,
        "connectoid": format_address([mailbox]),
        "nonce": encode_base64url(SUITE.random(16)),
        "sdpOffer": make_sdp("offer"),
    }
    jws = sign_jws(SUITE, key, payload)
    text = f"{jws}.{prove(invitation.secret, jws)}"
    for own in parse_address(invitation.address, allow_http=True):
        yield Post(own.pub, seal_message(SUITE, own.pub, text))


class OwnRelay:
    """A transport that ends at a relay in memory. What is sent to some mailboxes takes for ever."""

    def __init__(self, relay: Relay) -> None:
        self.slow: set[str] = set()
        self.under_way: list[str] = []
        self.refused: list[str] = []
        self._relay = relay

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = 0,
    ) -> tuple[int, bytes]:
        """Answer as the relay at RELAY; nobody is at any other URL."""
        if url != RELAY:
            self.refused.append(url)
            raise TransportError("nobody is there")
        if method == "GET":
            return 200, b'{"ok": true}'
        request = json.loads(body)
        if isinstance(request, dict) and request["pub"] in self.slow:
            self.under_way.append(request["pub"])
            await asyncio.get_running_loop().create_future()
        status, reply = self._relay.handle(request, "192.0.2.1")
        return status, json.dumps(reply).encode()

    async def renew(self) -> None:
        """Do nothing: there is nothing to close."""

    async def close(self) -> None:
        """Do nothing: all apps share it."""

    def post(self, post: Post) -> None:
        """Send a message, as anybody can."""
        request = {"pub": post.pub, "action": "send", "data": post.data}
        _, reply = self._relay.handle(request, "192.0.2.2")
        assert reply == {"ok": True}


@pytest.fixture
def relay() -> Iterator[Relay]:
    """Return a relay in memory."""
    relay = Relay(SqliteStore(":memory:"))
    yield relay
    relay.close()


class Pair:
    """Alice's app and Bob's, paired, and the link that strangers have read."""

    def __init__(self, apps: Apps, relay: Relay) -> None:
        self.network = OwnRelay(relay)
        self.alice = apps.begin("Alice", RELAY, transport=self.network)
        self.bob = apps.begin("Bob", RELAY, transport=OwnRelay(relay))
        link = self.alice.share("Bob", APP_URL)
        self.bob.open(link, "Alice")
        self.alice.connect("Bob", SOON_S).close()
        until(lambda: self.bob.contacts()[0].state == "paired", "paired")
        self._invitation = read_link(link)

    def say_hello(self, mailbox: Mailbox) -> None:
        """Have another stranger open the link, who wants the answer in a mailbox."""
        for post in hellos(self._invitation, mailbox):
            self.network.post(post)


def test_strangers_with_many_relays_keep_no_app_from_writing_to_a_contact_that_moves(
    apps: Apps, relay: Relay, caplog: pytest.LogCaptureFixture,
) -> None:
    """They name as many as may be new. What becomes of the answers to them is not told."""
    pair = Pair(apps, relay)
    for number in range(MAX_NEW_RELAYS):
        pair.say_hello(Mailbox(SUITE.make_key()[1], f"https://stranger{number}.example/"))
    until(lambda: len(set(pair.network.refused)) == MAX_NEW_RELAYS, "answered")
    elsewhere = "https://elsewhere.example/"
    pair.bob.move("Alice", [(RELAY, None), (elsewhere, None)])
    until(lambda: elsewhere in pair.network.refused, "written to")
    assert "stranger" not in caplog.text
    assert "ever new relays" not in caplog.text


def test_stranger_at_the_contact_s_own_relay_holds_up_nothing_that_goes_to_the_contact(
    apps: Apps, relay: Relay,
) -> None:
    """The relay never says whether it has the answer to the stranger."""
    pair = Pair(apps, relay)
    mailbox = Mailbox(SUITE.make_key()[1], RELAY)
    pair.network.slow.add(mailbox.pub)
    pair.say_hello(mailbox)
    until(lambda: pair.network.under_way == [mailbox.pub], "under way")
    assert pair.alice.connect("Bob", SOON_S)


# ---------------------------------------------------------------------------------------
# The machine says to whom a message goes, and strangers do not set its pace.
# ---------------------------------------------------------------------------------------


def whom(effects: Iterable[Effect]) -> list[bool]:
    """Return of each message whether it goes to a stranger."""
    return [effect.is_to_stranger for effect in effects if isinstance(effect, Send)]


def test_used_goes_to_a_stranger_and_all_else_to_the_contact(toy: World) -> None:
    alice, bob = paired(toy)
    link = link_of(alice)
    assert whom(alice.hear(Attacker(toy).hello(link), at=link.address)) == [True]
    assert not any(whom([*alice.done[:-2], *bob.done]))
    assert whom(alice.unshare()) == [False]


def test_used_in_place_of_unshare_goes_to_the_contact(toy: World) -> None:
    """Alice ends what Bob has not confirmed; her tombstone tells him again."""
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    assert alice.record.state == "welcomed"
    assert whom(alice.unshare()) == [False]
    toy.advance(MINUTE_S)
    bob.tick()
    # `used`, and `unshare` in case that he has a welcome.
    assert whom(alice.poll()) == [False, False]


def test_stranger_does_not_set_the_pace(toy: World) -> None:
    """Alice polls and tries as seldom as before."""
    alice, _ = apart(toy)
    link = link_of(alice)
    toy.advance(limits.ACTIVE_S)
    effects = alice.hear(Attacker(toy).hello(link), at=link.address)
    assert whom(effects) == [True]
    assert alice.contact.poll_gap_s(toy.now) == limits.POLL_SLOW_S
    assert not alice.contact.machine.is_active


# ---------------------------------------------------------------------------------------
# The limit of what goes to strangers.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_strangers_of_all_contacts_hold_so_many_connections_and_no_more(more: int) -> None:
    """Whoever has most gives one up."""
    under_way: list[str] = []

    class Silence:
        """Keep all waiting."""

        async def exchange(
            self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
            max_bytes: int = 0,
        ) -> tuple[int, bytes]:
            """Note a request, and never answer it."""
            under_way.append(url)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                under_way.remove(url)
            raise TransportError("never")

        async def renew(self) -> None:
            """Do nothing: there is nothing to close."""

        async def close(self) -> None:
            """Do nothing."""

    async def run() -> None:
        sender = Sender(
            lambda url: RelayClient(url, Silence()), Complaints(), to_strangers=True)
        for number in range(MAX_QUEUES_OF_STRANGERS + more):
            contact, relay = divmod(number, MAX_QUEUES_OF_CONTACT)
            mailbox = Mailbox("A", f"https://stranger{relay}.example{contact}a/")
            sender.send(contact, Send(mailbox, "QUJD", is_to_stranger=True))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(under_way) == MAX_QUEUES_OF_STRANGERS + min(more, 0)
        await sender.finish(0.01)

    asyncio.run(run())
