"""Readers of a link and thieves of a device, against real apps at a real relay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from apps import APP_URL, SOON_S, SUITE, Apps, apps, until
from fake_sdp import make_sdp
from harness import serving

from connectoid import (
    Connectoid,
    ContactRecord,
    Mailbox,
    Now,
    Store,
    format_address,
    parse_address,
    prove,
    read_link,
    seal_message,
    sign_jws,
)
from connectoid.clock import system_now
from connectoid.encoding import encode_base64url
from connectoid.limits import MAX_SEQ
from connectoid_relay import Relay, SqliteStore

__all__ = ["apps"]


class Place:
    """A relay with its address."""

    def __init__(self, relay: Relay, url: str) -> None:
        self.url = url
        self._relay = relay

    def post(self, address: str, text: str) -> None:
        """Send a message to an address, as anybody can."""
        for mailbox in parse_address(address, allow_http=True):
            data = seal_message(SUITE, mailbox.pub, text)
            request = {"pub": mailbox.pub, "ext": None, "action": "send", "data": data}
            _, reply = self._relay.handle(request, "192.0.2.1")
            assert reply == {"ok": True}


@pytest.fixture
def place() -> Iterator[Place]:
    """Return a real relay in a thread."""
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        yield Place(relay, f"http://127.0.0.1:{server.server_address[1]}/")
    relay.close()


def forge(stolen: ContactRecord, kind: str, **members: Any) -> str:
    """Return what a thief signs with the key in a copied record."""
    own = stolen.pending or stolen.current
    assert own is not None
    payload = {
        "type": kind,
        "to": stolen.contact_address,
        "from": stolen.signer,
        "re": None,
        "connectoid": own.address,
        **members,
    }
    return sign_jws(SUITE, stolen.private_key, payload)


class Stranger:
    """Somebody who has read a link, with a signing key of its own."""

    def __init__(self, link: str, place: Place) -> None:
        self._invitation = read_link(link, allow_http=True)
        self._place = place
        self._key, self._signer = SUITE.make_key()
        self._mailbox = Mailbox(SUITE.make_key()[1], place.url, None)

    def say_hello(self) -> None:
        """Send a hello that is new."""
        payload = {
            "type": "hello",
            "to": self._invitation.address,
            "from": self._signer,
            "seq": 1,
            "re": None,
            "connectoid": format_address([self._mailbox]),
            "nonce": encode_base64url(SUITE.random(16)),
            "sdpOffer": make_sdp("offer"),
        }
        jws = sign_jws(SUITE, self._key, payload)
        text = f"{jws}.{prove(self._invitation.secret, jws)}"
        self._place.post(self._invitation.address, text)


def dropped(app: Connectoid, reason: str) -> int:
    """Return how many messages of its only contact an app has dropped for a reason."""
    (contact,) = app.runner._roster.contacts.values()
    return contact.dropped[reason]


def test_thief_s_largest_seq_keeps_the_owner_from_neither_connecting_nor_unsharing(
    apps: Apps, place: Place
) -> None:
    alice, bob = apps.pair(place.url)
    (stolen,) = bob.contacts()
    offer = make_sdp("offer")
    place.post(
        stolen.contact_address, forge(stolen, "offer", seq=MAX_SEQ - 1, sdpOffer=offer)
    )
    until(lambda: dropped(alice, "ahead"), "refused")
    assert bob.connect("Alice", SOON_S)
    bob.unshare("Alice")
    until(lambda: alice.contacts()[0].state == "ended", "ended")
    assert alice.contacts()[0].why == "unshared"


def test_refusals_are_counted_and_told_once(apps: Apps, place: Place) -> None:
    """A thief sends many messages that are refused, and Alice sees how many and why."""
    alice, bob = apps.pair(place.url)
    (stolen,) = bob.contacts()
    before = alice.refusals("Bob").get("ahead", 0)
    for less in range(1, 6):
        text = forge(stolen, "offer", seq=MAX_SEQ - less, sdpOffer=make_sdp("offer"))
        place.post(stolen.contact_address, text)
    until(lambda: alice.refusals("Bob").get("ahead", 0) == before + 5, "refused")
    until(lambda: ("Alice", "Bob", "refused") in apps.told, "told")
    assert apps.told.count(("Alice", "Bob", "refused")) == 1
    alice.close()
    with contextlib.closing(Store(apps.folder / "Alice.db")) as store:
        assert store.load_refusals()[1]["ahead"] == before + 5


def test_tombstone_tells_nothing_of_what_is_refused(apps: Apps, place: Place) -> None:
    """Its name may be that of another contact by now."""
    alice, bob = apps.pair(place.url)
    (stolen,) = bob.contacts()
    bob.close()
    alice.unshare("Bob")
    text = forge(stolen, "offer", seq=MAX_SEQ - 1, sdpOffer=make_sdp("offer"))
    place.post(stolen.contact_address, text)
    until(lambda: dropped(alice, "ahead"), "refused")
    alice.close()
    assert ("Alice", "Bob", "refused") not in apps.told


def until_taken(alice: Connectoid, hellos: int) -> None:
    """Wait until an app has taken so many hellos of others who have opened its link."""
    (contact,) = alice.runner._roster.contacts.values()
    until(lambda: contact.machine.taken["paired", "hello", "paired"] >= hellos, "taken")


def test_ten_hellos_of_a_stranger_do_not_keep_the_next_opener_from_hearing_used(
    apps: Apps, place: Place
) -> None:
    """Each in a minute of its own, by the clock of Alice's app."""
    minutes = [0]

    def now() -> Now:
        wall_us, monotonic_s = system_now()
        return Now(wall_us, monotonic_s + 61 * minutes[0])

    alice = apps.begin("Alice", place.url, now=now)
    bob = apps.begin("Bob", place.url)
    link = alice.share("Bob", APP_URL)
    bob.open(link, "Alice")
    assert bob.connect("Alice", SOON_S)
    stranger = Stranger(link, place)
    for number in range(10):
        minutes[0] = number
        stranger.say_hello()
        # A stranger does not set the pace: Alice asks her relay often because she calls Bob.
        alice.disconnect("Bob")
        alice.connect("Bob", SOON_S)
        until_taken(alice, number + 1)
    # A reader of the link cannot fill the screen with warnings.
    assert apps.told.count(("Alice", "Bob", "opened_twice")) == 1
    dave = apps.begin("Dave", place.url)
    dave.open(link, "Alice")
    until(lambda: ("Dave", "Alice", "used") in apps.told, "told")


def test_nothing_is_refused_in_a_life_without_attackers(apps: Apps) -> None:
    """Copies at a second relay are routine, and so are a move and an end."""
    with contextlib.ExitStack() as stack:
        urls = []
        for _ in range(2):
            relay = stack.enter_context(contextlib.closing(Relay(SqliteStore(":memory:"))))
            server = stack.enter_context(serving(relay))
            urls.append(f"http://127.0.0.1:{server.server_address[1]}/")
        alice = apps.begin("Alice", *urls)
        bob = apps.begin("Bob", *urls)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        for _ in range(2):
            alice.connect("Bob", SOON_S).close()
            bob.connect("Alice", SOON_S).close()
        bob.move("Alice", [(urls[1], None)])
        alice.connect("Bob", SOON_S).close()
        bob.unshare("Alice")
        until(lambda: ("Alice", "Bob", "unshared") in apps.told, "told")
        refused = {**alice.refusals("Bob")}
        alice.close()
        bob.close()
    assert refused.keys() <= {"replay"}
    assert "refused" not in {event for _, _, event in apps.told}
