"""A wire, a clock, apps and an attacker, for the tests of a contact.

Mailboxes are lists that nobody empties. WebRTC answers at once. A channel is open as soon as both
have joined.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sized
from typing import Any

import pytest
from fake_sdp import make_sdp

import connectoid
from connectoid import (
    Contact,
    ContactRecord,
    Effect,
    Gather,
    Invitation,
    Mailbox,
    Message,
    Now,
    OwnAddress,
    Refused,
    Save,
    Send,
    Suite,
    SystemSuite,
    Tell,
    Write,
    make_link,
    open_message,
    parse_address,
    prove,
    read_jws,
    read_link,
    seal_message,
    sign_jws,
)
from connectoid.encoding import decode_base64url, encode_base64url

RELAY = "https://relay.example.com/"

OTHER_RELAY = "https://other.example.net/connectoid"

APP = "https://app.example.com/"

# 2027-01-15 by the wall clock.
START_US = 1_800_000_000_000_000

START_S = 7.0

DAY_S = 86_400.0

# A little more than the minute in which something is allowed once.
MINUTE_S = 61.0

# So long after a check what comes is not fresh.
STALE_S = 200.0

HEADER = connectoid.messages.HEADER

# Each of 2 s. A pairing needs four.
ENOUGH_ROUNDS = 8


class ToySuite:
    """Stand in for cryptography where it does not matter: deterministic, quick, no secret."""

    def __init__(self) -> None:
        self.made = 0

    def random(self, count: int) -> bytes:
        """Return the digest of a counter."""
        self.made += 1
        return hashlib.sha512(b"%d" % self.made).digest()[:count]

    def make_key(self) -> tuple[str, str]:
        """Return a key that is its public key."""
        pub = encode_base64url(b"\2" + self.random(48))
        return pub, pub

    def check(self, pub: str) -> None:
        """Refuse a key of zeros alone."""
        if not any(decode_base64url(pub)[1:]):
            raise Refused("address")

    def seal(self, pub: str, info: bytes, plaintext: bytes) -> bytes:
        """Put the recipient and the use in front of the plaintext."""
        return hashlib.sha256(pub.encode() + info).digest() + self.random(16) + plaintext

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Compare the recipient and the use, and return the plaintext."""
        if sealed[:32] != hashlib.sha256(key.encode() + info).digest():
            raise Refused("seal")
        return sealed[48:]

    def sign(self, key: str, octets: bytes) -> bytes:
        """Return a digest that anybody could make."""
        return hashlib.shake_256(key.encode() + octets).digest(96)

    def forget(self, key: str) -> None:
        """Do nothing: no key is kept."""

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Compare it."""
        if signature != self.sign(pub, octets):
            raise Refused("signature")


class World:
    """A clock, and mailboxes that nobody empties: a relay that is recorded."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.wall_us = START_US
        self.monotonic_s = START_S
        self.boxes: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
        self.put_so_far = 0

    @property
    def now(self) -> Now:
        """Return the time."""
        return Now(self.wall_us, self.monotonic_s)

    def advance(self, seconds: float) -> None:
        """Let time go by, on both clocks."""
        self.wall_us += round(seconds * 1_000_000)
        self.monotonic_s += seconds

    def put(self, pub: str, sealed: str) -> None:
        """Put something into a mailbox."""
        self.put_so_far += 1
        self.boxes[pub].append((self.put_so_far, sealed))

    def seal(self, address: str, text: str) -> str:
        """Return a text sealed to the first mailbox of an address, as anybody can."""
        return seal_message(self.suite, parse_address(address)[0].pub, text)

    def drop(self, address: str) -> None:
        """Empty the mailboxes of an address, as a relay can."""
        for mailbox in parse_address(address):
            self.boxes[mailbox.pub].clear()


class CrashError(Exception):
    """The process of an app ends here."""


class App:
    """Run a contact as an app does: execute its effects in order."""

    def __init__(
        self, world: World, begun: tuple[Contact, list[Effect]], crash_after: int = -1
    ) -> None:
        self.world = world
        self.contact = begun[0]
        self.done: list[Effect] = []
        self.saved = ""
        # WebRTC answers.
        self.gathers = True
        self.online = True
        # After this many effects; -1 is never.
        self.crash_after = crash_after
        self.do(begun[1])

    @property
    def record(self) -> ContactRecord:
        """Return the record of the contact."""
        return self.contact.record

    @property
    def told(self) -> list[str]:
        """Return the events that the user was told."""
        return [effect.event for effect in self.done if isinstance(effect, Tell)]

    @property
    def state(self) -> str:
        """Return the state of its attempt."""
        return self.contact.attempt.state

    def do(self, effects: Iterable[Effect]) -> list[Effect]:
        """Execute effects and those that follow; return all of them."""
        start = len(self.done)
        for effect in effects:
            if self.crash_after == 0:
                raise CrashError
            self.crash_after -= 1
            self.done.append(effect)
            self._do(effect)
        return self.done[start:]

    def _do(self, effect: Effect) -> None:
        match effect:
            case Save(record):
                self.saved = record.to_json()
            case Send(mailbox, sealed) if self.online:
                self.world.put(mailbox.pub, sealed)
                self.do(self.contact.sent(self.world.now, effect.message_hash))
            case Gather(attempt_id, offer) if self.gathers:
                self.do(
                    self.contact.gathered(
                        self.world.now, attempt_id, sdp("answer" if offer else "offer")
                    )
                )

    def poll(self) -> list[Effect]:
        """Check all mailboxes and take their messages."""
        boxes = {
            poll.mailbox.pub: [
                item for item in self.world.boxes[poll.mailbox.pub] if item[0] > poll.at
            ]
            for poll in self.contact.polls(self.world.now)
        }
        return self.do(self.contact.polled(self.world.now, boxes))

    def take(self, *sealed: str, address: str = "") -> list[Effect]:
        """Take sealed texts from the mailbox of its newest address, or of another."""
        address = address or newest(self).address
        pub = parse_address(address)[0].pub
        for text in sealed:
            self.world.put(pub, text)
        return self.do(
            self.contact.polled(self.world.now, {pub: self.world.boxes[pub][-len(sealed) :]})
        )

    def hear(self, *texts: str, at: str = "") -> list[Effect]:
        """Take texts that somebody has sealed to its newest address, or to another."""
        address = at or newest(self).address
        return self.take(*(self.world.seal(address, text) for text in texts), address=address)

    def connect(self) -> list[Effect]:
        """Want a connection."""
        return self.do(self.contact.connect(self.world.now))

    def tick(self) -> list[Effect]:
        """Let the contact see the time."""
        return self.do(self.contact.tick(self.world.now))

    def unshare(self) -> list[Effect]:
        """End the sharing."""
        return self.do(self.contact.unshare(self.world.now))

    def restarted(self, saved: str = "") -> App:
        """Return the app as it is after the process ended, from its last record or another."""
        app = App(
            self.world,
            (Contact(self.world.suite, ContactRecord.from_json(saved or self.saved)), []),
        )
        app.saved = saved or self.saved
        return app


def sdp(kind: str) -> dict[str, str]:
    """Return an SDP that WebRTC could have made."""
    return make_sdp(kind)


def newest(app: App) -> OwnAddress:
    """Return the address that an app announces."""
    own = app.record.pending or app.record.current or app.record.invited
    assert own is not None
    return own


def current_of(app: App) -> OwnAddress:
    """Return the address that an app's contact has written to."""
    assert app.record.current is not None
    return app.record.current


def count(kind: type[Any], effects: Iterable[Effect]) -> int:
    """Return how many of a kind there are."""
    return sum(isinstance(effect, kind) for effect in effects)


def writes(effects: Iterable[Effect]) -> list[bytes]:
    """Return the messages to write on the channel."""
    return [effect.octets for effect in effects if isinstance(effect, Write)]


def write(app: App, octets: bytes) -> list[Effect]:
    """Deliver a message of the channel to an app; return the effects."""
    return app.do(
        app.contact.channel_message(app.world.now, app.contact.attempt.attempt_id, octets)
    )


def open_channel(app: App) -> list[bytes]:
    """Open an app's end of the channel and return its messages."""
    return writes(app.do(app.contact.channel_opened(app.world.now, app.contact.attempt.attempt_id)))


def talk(one: App, other: App) -> None:
    """Open the channel between two apps, and carry their messages until there are none."""
    queue = [(other, octets) for octets in open_channel(one)] + [
        (one, octets) for octets in open_channel(other)
    ]
    while queue:
        app, octets = queue.pop(0)
        back = one if app is other else other
        queue += [(back, more) for more in writes(write(app, octets))]


def settle(*apps: App, rounds: int = ENOUGH_ROUNDS, gap_s: float = 2.0) -> None:
    """Let apps poll for some rounds, and open the channel when all have joined."""
    for _ in range(rounds):
        apps[0].world.advance(gap_s)
        for app in apps:
            app.poll()
            if app.contact.next_tick_s <= app.world.monotonic_s:
                app.tick()
        if len(apps) == 2 and all(app.state == "joining" for app in apps):
            talk(*apps)


def invite(world: World, *relays: tuple[str, str | None]) -> App:
    """Return Alice's app with an invitation for Bob."""
    return App(world, Contact.invite(world.suite, world.now, "Bob", relays or ((RELAY, None),)))


def link_of(app: App) -> Invitation:
    """Return the invitation in the link of an app."""
    return read_link(make_link(APP, app.record.invitation))


def open_link(world: World, invitation: Invitation, name: str = "Alice") -> App:
    """Return an app that opens a link."""
    return App(world, Contact.open(world.suite, world.now, name, invitation))


def paired(world: World) -> tuple[App, App]:
    """Return the apps of Alice and Bob, connected."""
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    settle(alice, bob)
    assert (alice.record.state, bob.record.state) == ("paired", "paired")
    assert (alice.state, bob.state) == ("connected", "connected")
    return alice, bob


def apart(world: World) -> tuple[App, App]:
    """Return the apps of Alice and Bob, paired and no longer connected."""
    alice, bob = paired(world)
    for app in (alice, bob):
        app.do(app.contact.channel_closed(world.now, app.contact.attempt.attempt_id))
    return alice, bob


def sealed_since(world: World, pub: str, put_before: int) -> list[str]:
    """Return the messages that a mailbox has got since."""
    return [sealed for at, sealed in world.boxes[pub] if at > put_before]


def opened_with(world: World, keys: Iterable[str], sealed: str) -> str | None:
    """Return the message in a sealed text, if one of the keys opens it."""
    for key in keys:
        try:
            return open_message(world.suite, key, sealed)
        except Refused:
            continue
    return None


def read_by(app: App, put_before: int = 0) -> list[Message]:
    """Return the messages in an app's mailboxes since, as their owner can read them."""
    texts = [
        opened_with(app.world, own.keys, sealed)
        for own in app.record.addresses
        for box in own.mailboxes
        for sealed in sealed_since(app.world, box.pub, put_before)
    ]
    return [read_jws(text) for text in texts if text]


class Attacker:
    """An attacker with keys of its own: Eve listens, Mallory writes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.key, self.signer = world.suite.make_key()
        self.box_key, self.box = world.suite.make_key()
        self.address = str(Mailbox(self.box, RELAY))

    def payload(self, kind: str, to: str, **members: Any) -> dict[str, Any]:
        """Return the payload of a message from the attacker."""
        return {
            "type": kind,
            "to": to,
            "from": self.signer,
            "seq": 1,
            "re": None,
            "connectoid": self.address,
            **members,
        }

    def sign(self, kind: str, to: str, **members: Any) -> str:
        """Return a message signed by the attacker."""
        return sign_jws(self.world.suite, self.key, self.payload(kind, to, **members))

    def hello(self, invitation: Invitation, to: str = "", **members: Any) -> str:
        """Return a hello with the secret of a link."""
        nonce = encode_base64url(self.world.suite.random(16))
        jws = self.sign(
            "hello",
            to or invitation.address,
            **{"nonce": nonce, "sdpOffer": sdp("offer"), **members},
        )
        return f"{jws}.{prove(invitation.secret, jws)}"

    def received(self) -> list[Message]:
        """Return the messages in the attacker's own mailbox."""
        texts = [
            opened_with(self.world, [self.box_key], sealed)
            for _, sealed in self.world.boxes[self.box]
        ]
        return [read_jws(text) for text in texts if text]


def signed_by(app: App, kind: str, **members: Any) -> str:
    """Return a message that a contact's own key signs, whatever it says: a hostile contact."""
    payload = {
        "type": kind,
        "to": app.record.contact_address,
        "from": app.record.signer,
        "seq": app.record.seq + 1,
        "re": None,
        "connectoid": newest(app).address,
        **members,
    }
    return sign_jws(app.world.suite, app.record.private_key, payload)


def sign_octets(world: World, key: str, octets: bytes, header: str = HEADER) -> str:
    """Return a JWS over any octets, under any header."""
    signed = f"{header}.{encode_base64url(octets)}"
    return f"{signed}.{encode_base64url(world.suite.sign(key, signed.encode()))}"


def held(contact: Contact) -> int:
    """Return how many things a contact holds in memory."""
    return sum(len(value) for value in vars(contact.machine).values() if isinstance(value, Sized))


def rotate(alice: App, bob: App) -> None:
    """Let a month go by and two apps connect, so that both addresses are replaced."""
    alice.world.advance(30 * DAY_S + 1)
    for app in (alice, bob):
        app.tick()
        app.do(app.contact.disconnect(alice.world.now))
    alice.connect()
    settle(alice, bob, rounds=20)


def joined(world: World) -> tuple[App, App]:
    """Return two apps that have exchanged offer and answer, the channel not yet open."""
    alice, bob = apart(world)
    bob.connect()
    for app in (alice, bob):
        app.poll()
    assert (alice.state, bob.state) == ("joining", "joining")
    return alice, bob


# The form of a key, for what only looks at the form.
TEST_PUB = "Ag" + "A" * 64


def secrets_of(record: ContactRecord) -> set[str]:
    """Return all texts of a record that nobody else may see."""
    fourth = [record.invitation.rpartition(".")[2]] if record.invitation else []
    own_r = [record.r] if record.r else []
    return {*record.private_keys, *fourth, *own_r} - {""}


@pytest.fixture
def world() -> World:
    """Return a world with real cryptography."""
    return World(SystemSuite())


@pytest.fixture
def toy() -> World:
    """Return a world where cryptography does not matter."""
    return World(ToySuite())
