"""Test connectoid.py directed: each promise and each attack once, on a fake wire and a fake clock.

The seeded simulations of many runs are elsewhere; here every test says in its name what it promises.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import connectoid
from connectoid import (
    CONNECTING,
    CONTEXTS,
    EMOJI,
    EVENTS,
    MEMBERS,
    PAIRING,
    REASONS,
    UNNUMBERED,
    Close,
    ConnectoidError,
    Contact,
    Effect,
    Forget,
    Gather,
    Invitation,
    Join,
    Kept,
    LinkError,
    Mailbox,
    Message,
    Now,
    Own,
    RecordError,
    Refused,
    Rule,
    Save,
    Send,
    Suite,
    SystemSuite,
    Tell,
    UsageError,
    Write,
    comparison_string,
    format_address,
    hash_jws,
    make_link,
    open_message,
    parse_address,
    parse_invitation,
    prove,
    read_jws,
    read_link,
    seal_message,
    sign_jws,
)
from connectoid_relay import SOURCE_SHARE, Limits

RELAY = "https://relay.example.com/"
OTHER_RELAY = "https://other.example.net/connectoid"
APP = "https://app.example.com/"
START_US = 1_800_000_000_000_000  # 2027-01-15
START_S = 7.0
DAY_S = 86_400.0
MINUTE_S = 61.0  # a little more, where something is allowed once a minute
STALE_S = 200.0  # without a check: what comes then is not fresh
HEADER = connectoid.HEADER
ENOUGH_ROUNDS = 8  # of 2 s: a pairing needs four


# ---------------------------------------------------------------------------------------
# The wire, the clock, the apps: mailboxes are lists that nobody empties, WebRTC answers at
# once, and a channel is open as soon as both have joined.
# ---------------------------------------------------------------------------------------


class ToySuite:
    """Stand in for cryptography where it does not matter: deterministic, quick, and no secret to anybody."""

    def __init__(self) -> None:
        self._made = 0

    def random(self, count: int) -> bytes:
        """Return the digest of a counter."""
        self._made += 1
        return hashlib.sha512(b"%d" % self._made).digest()[:count]

    def make_key(self) -> tuple[str, str]:
        """Return a key that is its public key."""
        pub = connectoid.encode_base64url(b"\2" + self.random(48))
        return pub, pub

    def check(self, pub: str) -> None:
        """Refuse a key of zeros alone."""
        if not any(connectoid.decode_base64url(pub)[1:]):
            raise Refused("address")

    def seal(self, pub: str, info: bytes, plaintext: bytes) -> bytes:
        """Write on it for whom and for what it is."""
        return hashlib.sha256(pub.encode() + info).digest() + self.random(16) + plaintext

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Read what is written on it."""
        if sealed[:32] != hashlib.sha256(key.encode() + info).digest():
            raise Refused("seal")
        return sealed[48:]

    def sign(self, key: str, octets: bytes) -> bytes:
        """Return a digest that anybody could make."""
        return hashlib.sha512(key.encode() + octets).digest()

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Compare it."""
        if signature != self.sign(pub, octets):
            raise Refused("signature")


class World:
    """A clock, and mailboxes that nobody empties: what a relay, or who records it, has."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.wall_us, self.monotonic_s = START_US, START_S
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
        """Lose what is in the mailboxes of an address, as a relay can."""
        for mailbox in parse_address(address):
            self.boxes[mailbox.pub].clear()


class CrashError(Exception):
    """The process of an app ends here."""


class App:
    """Run a contact as an app does: do what it asks for, in order."""

    def __init__(self, world: World, begun: tuple[Contact, list[Effect]], crash_after: int = -1) -> None:
        self.world, self.contact = world, begun[0]
        self.done: list[Effect] = []
        self.saved = ""
        self.gathers = True  # WebRTC answers
        self.online = True
        self.crash_after = crash_after  # so many effects; -1 is never
        self.do(begun[1])

    @property
    def kept(self) -> Kept:
        """Return the record of the contact."""
        return self.contact.kept

    @property
    def told(self) -> list[str]:
        """Return what the user was told so far."""
        return [effect.event for effect in self.done if isinstance(effect, Tell)]

    @property
    def state(self) -> str:
        """Return what it has of a connection."""
        return self.contact.attempt.state

    def do(self, effects: Iterable[Effect]) -> list[Effect]:
        """Do what is asked for, and what follows of it; return all of it."""
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
            case Save(kept):
                self.saved = kept.to_json()
            case Send(mailbox, sealed) if self.online:
                self.world.put(mailbox.pub, sealed)
            case Gather(ask, offer) if self.gathers:
                self.do(self.contact.gathered(self.world.now, ask, sdp("answer" if offer else "offer")))

    def poll(self) -> list[Effect]:
        """Check all mailboxes and take what is there."""
        boxes = {poll.mailbox.pub: [item for item in self.world.boxes[poll.mailbox.pub] if item[0] > poll.at]
                 for poll in self.contact.polls(self.world.now)}
        return self.do(self.contact.polled(self.world.now, boxes))

    def take(self, *sealed: str, address: str = "") -> list[Effect]:
        """Take what somebody put into the newest of its mailboxes, or that of an address."""
        address = address or newest(self).address
        pub = parse_address(address)[0].pub
        for text in sealed:
            self.world.put(pub, text)
        return self.do(self.contact.polled(self.world.now, {pub: self.world.boxes[pub][-len(sealed):]}))

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
        app = App(self.world, (Contact(self.world.suite, Kept.from_json(saved or self.saved)), []))
        app.saved = saved or self.saved
        return app


def sdp(kind: str) -> dict[str, str]:
    """Return an SDP that WebRTC could have made."""
    return {"type": kind, "sdp": f"v=0 {kind}"}


def newest(app: App) -> Own:
    """Return the address that an app announces."""
    own = app.kept.pending or app.kept.current or app.kept.invited
    assert own is not None
    return own


def current_of(app: App) -> Own:
    """Return the address that an app's contact has written to."""
    assert app.kept.current is not None
    return app.kept.current


def count(kind: type[Any], effects: Iterable[Effect]) -> int:
    """Return how many of a kind there are."""
    return sum(isinstance(effect, kind) for effect in effects)


def writes(effects: Iterable[Effect]) -> list[bytes]:
    """Return what is to be written on the channel."""
    return [effect.octets for effect in effects if isinstance(effect, Write)]


def write(app: App, octets: bytes) -> list[Effect]:
    """Let the channel bring a message to an app; return what it does."""
    return app.do(app.contact.channel_message(app.world.now, app.contact.attempt.ask, octets))


def open_channel(app: App) -> list[bytes]:
    """Open an app's end of the channel and return what it writes."""
    return writes(app.do(app.contact.channel_opened(app.world.now, app.contact.attempt.ask)))


def talk(one: App, other: App) -> None:
    """Open the channel between two, and carry what they write until nobody writes."""
    queue = [(other, octets) for octets in open_channel(one)] + [(one, octets) for octets in open_channel(other)]
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
    """Return what is in the link that an app made."""
    return read_link(make_link(APP, app.kept.invitation))


def open_link(world: World, invitation: Invitation, name: str = "Alice") -> App:
    """Return the app of somebody who opens a link."""
    return App(world, Contact.open(world.suite, world.now, name, invitation))


def paired(world: World) -> tuple[App, App]:
    """Return the apps of Alice and Bob, connected."""
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    settle(alice, bob)
    assert (alice.kept.state, bob.kept.state) == ("paired", "paired")
    assert (alice.state, bob.state) == ("connected", "connected")
    return alice, bob


def apart(world: World) -> tuple[App, App]:
    """Return the apps of Alice and Bob, paired and no longer connected."""
    alice, bob = paired(world)
    for app in (alice, bob):
        app.do(app.contact.channel_closed(world.now, app.contact.attempt.ask))
    return alice, bob


def sealed_since(world: World, pub: str, put_before: int) -> list[str]:
    """Return what came to a mailbox since."""
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
    owns = [own for own in (app.kept.invited, app.kept.current, app.kept.pending, app.kept.former) if own]
    texts = [opened_with(app.world, own.keys, sealed)
             for own in owns for box in own.mailboxes for sealed in sealed_since(app.world, box.pub, put_before)]
    return [read_jws(text) for text in texts if text]


class Attacker:
    """Somebody with keys of their own: Eve, who listens, or Mallory, who writes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.key, self.signer = world.suite.make_key()
        self.box_key, self.box = world.suite.make_key()
        self.address = str(Mailbox(self.box, RELAY))

    def payload(self, kind: str, to: str, **members: Any) -> dict[str, Any]:
        """Return the payload of a message from the attacker."""
        return {"type": kind, "to": to, "from": self.signer, "seq": 1, "re": None,
                "connectoid": self.address, **members}

    def sign(self, kind: str, to: str, **members: Any) -> str:
        """Return a message signed by the attacker."""
        return sign_jws(self.world.suite, self.key, self.payload(kind, to, **members))

    def hello(self, invitation: Invitation, to: str = "", **members: Any) -> str:
        """Return a hello with the secret of a link."""
        nonce = connectoid.encode_base64url(self.world.suite.random(16))
        jws = self.sign("hello", to or invitation.address, **{"nonce": nonce, "sdpOffer": sdp("offer"), **members})
        return f"{jws}.{prove(invitation.secret, jws)}"

    def received(self) -> list[Message]:
        """Return what came to the attacker's own mailbox."""
        texts = [opened_with(self.world, [self.box_key], sealed) for _, sealed in self.world.boxes[self.box]]
        return [read_jws(text) for text in texts if text]


def signed_by(app: App, kind: str, **members: Any) -> str:
    """Return a message that a contact's own key signs, whatever it says: a hostile contact."""
    payload = {"type": kind, "to": app.kept.contact_address, "from": app.kept.signer,
               "seq": app.kept.seq + 1, "re": None, "connectoid": newest(app).address, **members}
    return sign_jws(app.world.suite, app.kept.private_key, payload)


def sign_octets(world: World, key: str, octets: bytes, header: str = HEADER) -> str:
    """Return a JWS over any octets, under any header."""
    signed = f"{header}.{connectoid.encode_base64url(octets)}"
    return f"{signed}.{connectoid.encode_base64url(world.suite.sign(key, signed.encode()))}"


def held(contact: Contact) -> int:
    """Return how many things a contact holds in memory."""
    return sum(len(value) for value in vars(contact).values() if isinstance(value, Sized))


@pytest.fixture
def world() -> World:
    """Return a world with real cryptography."""
    return World(SystemSuite())


@pytest.fixture
def toy() -> World:
    """Return a world where cryptography does not matter."""
    return World(ToySuite())


# ---------------------------------------------------------------------------------------
# What is left to whom: a test for each row of that table in PROTOCOL.md, what somebody can
# do and what not.
# ---------------------------------------------------------------------------------------


def test_relay_alone_reads_and_forges_nothing_but_sees_sizes_and_can_drop(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    pub = parse_address(link_of(alice).address)[0].pub
    mallory = Attacker(world)
    [(_, hello)] = world.boxes[pub]
    assert opened_with(world, [mallory.box_key, mallory.key], hello) is None
    sizes = {len(connectoid.decode_base64url(sealed)) for box in world.boxes.values() for _, sealed in box}
    assert sizes <= {size + 97 + 16 for size in connectoid.SIZES}  # enc and tag: only steps are seen
    guessed = parse_invitation(f"{link_of(alice).address}..{'A' * 64}")
    alice.take(world.seal(link_of(alice).address, mallory.hello(guessed)), address=link_of(alice).address)
    assert alice.contact.dropped == {"proof": 1}
    assert alice.kept.state == "invited"
    world.drop(link_of(alice).address)
    settle(alice, bob)
    assert (alice.kept.state, bob.kept.state) == ("invited", "opened")
    assert not {"used", "paired", "opened_twice"} & {*alice.told, *bob.told}


def test_relay_that_delays_only_delays(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    held_back = dict(world.boxes)
    world.boxes.clear()
    settle(alice, bob)
    world.advance(3 * DAY_S)
    world.boxes.update(held_back)
    settle(alice, bob, rounds=20)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_reader_of_the_link_can_race_bob_and_both_are_shown_it(world: World) -> None:
    alice = invite(world)
    mallory = open_link(world, link_of(alice))
    settle(alice, mallory)
    assert alice.kept.contact == mallory.kept.signer
    bob = open_link(world, link_of(alice))
    settle(alice, bob, mallory)
    assert bob.told == ["used"]
    assert (bob.kept.state, bob.kept.why) == ("ended", "used")
    assert "opened_twice" in alice.told


def test_reader_of_the_link_after_bob_cannot_take_his_place_nor_read(world: World) -> None:
    alice, bob = paired(world)
    link = link_of(alice)
    comparison = alice.kept.comparison
    mallory = open_link(world, link)
    settle(alice, mallory)
    assert mallory.told == ["used"]
    assert alice.told.count("opened_twice") == 1
    assert (alice.kept.contact, alice.kept.comparison) == (bob.kept.signer, comparison)
    everything = [sealed for box in world.boxes.values() for _, sealed in box]
    keys = [connectoid.encode_base64url(link.secret), mallory.kept.private_key]
    assert all(opened_with(world, keys, sealed) is None for sealed in everything)


def test_reader_of_the_link_with_the_relays_impersonates_bob_who_sees_silence_and_no_emoji(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    world.drop(link_of(alice).address)
    mallory = open_link(world, link_of(alice), "Bob")
    settle(alice, mallory)
    assert alice.kept.contact == mallory.kept.signer  # she can
    settle(bob, rounds=100, gap_s=5)
    assert set(bob.told) == {"unanswered"}
    assert bob.kept.comparison == ()  # he has nothing to compare: Alice has
    assert len(alice.kept.comparison) == 7


def test_reader_of_the_link_with_the_relays_cannot_be_alice_to_bob(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    world.drop(link_of(alice).address)
    mallory = open_link(world, link_of(alice))
    settle(alice, mallory)
    assert alice.kept.contact == mallory.kept.signer
    r = alice.kept.r  # she has it from her welcome
    own = newest(bob).address
    forger = Attacker(world)
    by_her = forger.sign("welcome", own, r=r, re=bob.kept.hello_hash)
    in_her_name = forger.sign("welcome", own, r=r, re=bob.kept.hello_hash, **{"from": alice.kept.signer})
    bob.take(*(world.seal(own, text) for text in (by_her, in_her_name, alice.kept.welcome)))
    assert bob.contact.dropped == {"commitment": 1, "signature": 1, "recipient": 1}
    assert bob.kept.state == "opened"


def test_replaced_link_lets_mallory_between_and_the_emoji_differ(world: World) -> None:
    alice, mallorys = invite(world), invite(world)
    to_alice = open_link(world, link_of(alice), "Alice")
    bob = open_link(world, link_of(mallorys))
    settle(alice, to_alice)
    settle(mallorys, bob)
    assert (alice.state, bob.state) == ("connected", "connected")  # she can
    assert alice.kept.comparison == to_alice.kept.comparison
    assert bob.kept.comparison == mallorys.kept.comparison
    assert alice.kept.comparison != bob.kept.comparison
    bob.contact.verify(world.now, same=False)
    assert not bob.kept.verified


def test_comparison_string_hangs_on_the_link_the_hello_the_signer_and_r(world: World) -> None:
    alice, bob = paired(world)
    assert alice.kept.comparison == bob.kept.comparison
    texts = ("inv", "a.b.c", "from", "r")
    base = comparison_string(*texts)
    others = [comparison_string(*(text + "x" if place == at else text for at, text in enumerate(texts)))
              for place in range(4)]
    assert len({base, *others}) == 5
    assert comparison_string("inv", "a.b.c.proof", "from", "r") == base
    assert all(0 <= index < len(EMOJI) == 64 for index in base)


def test_old_link_gives_nothing_after_thirty_days(world: World) -> None:
    alice, bob = paired(world)
    link, comparison = link_of(alice), alice.kept.comparison
    world.advance(30 * DAY_S)
    alice.tick()
    assert (alice.kept.invitation, alice.kept.r, alice.kept.invited) == ("", "", None)
    mallory = open_link(world, link)
    before = len(alice.done)
    settle(alice, mallory)
    assert count(Send, alice.done[before:]) == 0
    assert mallory.kept.state == "opened"
    assert (alice.kept.state, alice.kept.contact, alice.kept.comparison) == ("paired", bob.kept.signer, comparison)


def test_copied_device_is_you_until_the_contact_unshares(world: World) -> None:
    alice, bob = apart(world)
    thief = bob.restarted()
    thief.connect()
    settle(alice, thief)
    assert (alice.state, thief.state) == ("connected", "connected")  # the thief can
    alice.unshare()
    settle(thief, rounds=2)
    assert (thief.kept.state, thief.kept.why) == ("ended", "unshared")
    again = bob.restarted()
    again.do(again.contact.connect(world.now))
    settle(alice, again, rounds=20)
    assert alice.kept.state == "unshared"
    assert alice.state == "apart"


def rotate(alice: App, bob: App) -> None:
    """Let a month go by and two apps connect, so that both addresses are replaced."""
    alice.world.advance(30 * DAY_S + 1)
    for app in (alice, bob):
        app.tick()
        app.do(app.contact.disconnect(alice.world.now))
    alice.connect()
    settle(alice, bob, rounds=20)


def test_recorded_traffic_is_readable_to_a_thief_back_to_the_last_but_one_rotation_only(world: World) -> None:
    alice, bob = paired(world)
    addresses = [newest(alice).address]
    for _ in range(3):
        rotate(alice, bob)
        addresses.append(newest(alice).address)
    assert len(set(addresses)) == 4
    stolen = Kept.from_json(alice.saved)
    keys = [key for own in (stolen.invited, stolen.current, stolen.pending, stolen.former) if own for key in own.keys]
    readable = [any(opened_with(world, keys, sealed) for _, sealed in world.boxes[parse_address(address)[0].pub])
                for address in addresses]
    assert readable == [False, False, True, True]
    invited = parse_address(open_address(bob))[0].pub
    assert all(opened_with(world, keys, sealed) is None for _, sealed in world.boxes[invited])


def open_address(bob: App) -> str:
    """Return the address of the link that an app opened."""
    first = next(effect for effect in bob.done if isinstance(effect, Save))
    return first.kept.contact_address


# ---------------------------------------------------------------------------------------
# Attacks on the envelope: what is sealed, signed and counted.
# ---------------------------------------------------------------------------------------


def test_message_passed_off_as_a_question_opens_to_nothing(world: World) -> None:
    alice = invite(world)
    open_link(world, link_of(alice))
    [poll] = alice.contact.polls(world.now)
    [(_, hello)] = world.boxes[poll.mailbox.pub]
    octets = connectoid.decode_base64url(hello)
    for context in ("question", "channel"):
        with pytest.raises(Refused) as error:
            world.suite.open(poll.key, CONTEXTS[context], octets)
        assert error.value.reason == "seal"
    assert world.suite.open(poll.key, CONTEXTS["message"], octets)


def test_question_passed_off_as_a_message_is_refused_and_no_oracle(world: World) -> None:
    alice, bob = apart(world)
    pub = newest(alice).mailboxes[0].pub
    text = signed_by(bob, "offer", sdpOffer=sdp("offer"))
    plaintext = (len(text).to_bytes(4, "big") + text.encode()).ljust(2_048, b"\0")
    question = connectoid.encode_base64url(world.suite.seal(pub, CONTEXTS["question"], plaintext))
    assert alice.take(question) == []
    assert alice.contact.dropped == {"seal": 1}


def test_context_strings_differ() -> None:
    assert len(set(CONTEXTS.values())) == len(CONTEXTS) >= 4
    assert not any(one != other and one.startswith(other) for one in CONTEXTS.values() for other in CONTEXTS.values())


@pytest.mark.parametrize("header", [
    b'{"alg":"none","typ":"connectoid"}', b'{"alg":"HS256","typ":"connectoid"}', b'{"alg":"ES256","typ":"connectoid"}',
    b'{"alg":"ES384"}', b'{"typ":"connectoid","alg":"ES384"}', b'{"alg": "ES384","typ":"connectoid"}',
    b'{"alg":"ES384","typ":"connectoid","jwk":{}}', b'{"alg":"ES384","typ":"JWT"}', b"", b"{}",
])
def test_other_algorithm_than_the_one_is_refused(toy: World, header: bytes) -> None:
    alice, bob = apart(toy)
    octets = json.dumps(json.loads(connectoid.decode_base64url(signed_by(bob, "unshare").split(".")[1]))).encode()
    text = sign_octets(toy, bob.kept.private_key, octets, connectoid.encode_base64url(header))
    alice.take(toy.seal(newest(alice).address, text), toy.seal(newest(alice).address, text.rpartition(".")[0] + "."))
    assert alice.contact.dropped == {"jws": 2}
    assert alice.kept.state == "paired"


@pytest.mark.parametrize("change", ["body", "signature", "empty", "short", "long", "zeros", "big"])
def test_changed_signature_or_body_is_refused(world: World, change: str) -> None:
    alice, bob = apart(world)
    header, body, signature = signed_by(bob, "unshare").split(".")
    octets = connectoid.decode_base64url(signature)
    forged = {"empty": b"", "short": octets[:-1], "long": octets + b"\0", "zeros": bytes(96), "big": b"\xff" * 96,
              "signature": octets[:-1] + bytes([octets[-1] ^ 1]), "body": octets}[change]
    if change == "body":
        payload = json.loads(connectoid.decode_base64url(body))
        body = connectoid.encode_base64url(json.dumps({**payload, "seq": payload["seq"] + 1}).encode())
    text = f"{header}.{body}.{connectoid.encode_base64url(forged)}"
    alice.take(world.seal(newest(alice).address, text))
    assert alice.contact.dropped == {"signature": 1}
    assert alice.kept.state == "paired"


OFF_CURVE = connectoid.encode_base64url(b"\2" + b"\0" * 47 + b"\1")  # no y for x = 1
OVER_FIELD = connectoid.encode_base64url(b"\3" + b"\xff" * 48)


@pytest.mark.parametrize("pub", [OFF_CURVE, OVER_FIELD])
def test_key_that_is_no_point_is_refused_wherever_it_comes(world: World, pub: str) -> None:
    alice, bob = apart(world)
    mailbox = Mailbox(pub, RELAY)
    alice.take(world.seal(newest(alice).address, signed_by(bob, "offer", sdpOffer=sdp("offer"),
                                                           connectoid=str(mailbox))))
    assert alice.contact.dropped == {"address": 1}
    assert alice.kept.contact_address == newest(bob).address
    with pytest.raises(LinkError, match="damaged"):
        Contact.open(world.suite, world.now, "Alice", read_link(f"{mailbox}..{'A' * 64}"))
    with pytest.raises(Refused, match="point"):
        world.suite.seal(pub, b"", b"")
    link = link_of(alice)
    hello = Attacker(world).hello(link, **{"from": pub})
    alice.take(world.seal(link.address, hello), address=link.address)
    assert alice.contact.dropped == {"address": 1, "signature": 1}


def test_sealed_text_with_an_invalid_point_or_of_any_length_is_refused(world: World) -> None:
    alice, _ = apart(world)
    point = bytes.fromhex("04") + b"\xff" * 96
    bad = [b"", b"\0", point[:-1], point, point + bytes(16), point + bytes(1_040), bytes(97 + 16), bytes(2_000)]
    alice.take(*map(connectoid.encode_base64url, bad), "A", "AB", "A=", "é", "\ud800", " ", "QUJD\n")
    assert alice.contact.dropped == {"seal": len(bad), "encoding": 7}
    assert alice.kept.state == "paired"


@pytest.mark.parametrize(("plaintext", "reason"), [
    (b"", "padding"), (b"\0" * 1_023, "padding"), (b"\0" * 1_025, "padding"), (b"\0" * 32_768, "padding"),
    (b"\xff" * 4 + b"\0" * 1_020, "padding"), (b"\0\0\3\xfd" + b"\0" * 1_020, "padding"),
    (b"\0\0\0\1A" + b"\0" * 1_018 + b"\1", "padding"), (b"\0" * 1_024, "jws"),
    (b"\0\0\0\2\xc3\xa9" + b"\0" * 1_018, "jws"),
])
def test_padding_is_checked_to_the_last_byte(toy: World, plaintext: bytes, reason: str) -> None:
    alice, _ = apart(toy)
    sealed = toy.suite.seal(newest(alice).mailboxes[0].pub, CONTEXTS["message"], plaintext)
    alice.take(connectoid.encode_base64url(sealed))
    assert alice.contact.dropped == {reason: 1}


def test_moved_recipient_is_refused(world: World) -> None:
    alice, bob = apart(world)
    elsewhere = Attacker(world).address
    alice.take(world.seal(newest(alice).address, signed_by(bob, "unshare", to=elsewhere)))
    assert bob.kept.current not in (None, newest(bob))
    bob.take(world.seal(newest(bob).address, signed_by(alice, "unshare", to=current_of(bob).address)))
    assert (alice.contact.dropped["recipient"], bob.contact.dropped["recipient"]) == (1, 1)
    assert (alice.kept.state, bob.kept.state) == ("paired", "paired")


def test_message_of_one_contact_is_nothing_to_another(world: World) -> None:
    alice, bob = apart(world)
    to_carol, carol = apart(world)
    for address in (newest(to_carol).address, newest(alice).address):
        to_carol.take(world.seal(newest(to_carol).address, signed_by(bob, "unshare", to=address)))
    assert to_carol.contact.dropped == {"recipient": 1, "sender": 1}
    assert (to_carol.kept.state, carol.kept.state) == ("paired", "paired")


def test_own_messages_reflected_are_refused(world: World) -> None:
    alice, bob = paired(world)
    both = {"sdpAnswer": sdp("answer"), "sdpOffer": sdp("offer")}
    mine = [signed_by(alice, kind, to=newest(alice).address, re="A" * 43, **both)
            for kind in ("offer", "ready", "unshare", "call", "answer")]
    alice.take(*(world.seal(newest(alice).address, text) for text in mine))
    assert alice.contact.dropped == {"sender": 3, "unexpected": 2}
    before = len(bob.done)
    bob.take(*(sealed for _, sealed in world.boxes[parse_address(bob.kept.contact_address)[0].pub]))
    assert bob.contact.dropped["seal"] >= 1
    assert bob.done[before:] == []


# ---------------------------------------------------------------------------------------
# Replays.
# ---------------------------------------------------------------------------------------


def test_same_bytes_again_are_refused_without_opening_them(toy: World) -> None:
    alice, bob = apart(toy)
    sealed = toy.seal(newest(alice).address, signed_by(bob, "offer", sdpOffer=sdp("offer")))
    assert count(Send, alice.take(sealed)) == 1
    toy.advance(MINUTE_S)
    assert alice.take(sealed, sealed) == []
    assert alice.contact.dropped == {"replay": 2}


def test_same_message_sealed_anew_is_refused_also_after_a_restart_and_in_another_mailbox(world: World) -> None:
    alice, bob = apart(world)
    text = signed_by(bob, "offer", sdpOffer=sdp("offer"))
    alice.take(world.seal(newest(alice).address, text))
    for app in (alice, alice.restarted()):
        before = app.kept
        assert app.take(world.seal(newest(alice).address, text)) == []
        assert app.contact.dropped["replay"] == 1
        assert app.kept == before


@pytest.mark.parametrize("back", [0, 1, 1_000_000])
def test_older_seq_is_refused(toy: World, back: int) -> None:
    alice, bob = apart(toy)
    seq = alice.kept.seen_seq + 2_000_000
    alice.take(toy.seal(newest(alice).address, signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer"))))
    alice.take(toy.seal(newest(alice).address, signed_by(bob, "unshare", seq=seq - back)))
    assert alice.contact.dropped == {"replay": 1}
    assert (alice.kept.state, alice.kept.seen_seq) == ("paired", seq)


def test_seq_counts_over_all_mailboxes_and_old_addresses(toy: World) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    assert alice.kept.former is not None
    seq = alice.kept.seen_seq
    old = signed_by(bob, "unshare", seq=seq, to=alice.kept.former.address)
    before = alice.contact.dropped["replay"]
    alice.take(toy.seal(alice.kept.former.address, old), address=alice.kept.former.address)
    assert alice.contact.dropped["replay"] == before + 1
    assert alice.kept.state == "paired"


def test_one_message_in_three_mailboxes_is_taken_once(toy: World) -> None:
    relays: list[tuple[str, str | None]] = [(RELAY, None), (OTHER_RELAY, "key"), ("https://third.example.org/", None)]
    alice = invite(toy, *relays)
    bob = open_link(toy, link_of(alice))
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")
    assert len(newest(alice).mailboxes) == len(newest(bob).mailboxes) == 3
    hellos = [sealed for box in parse_address(link_of(alice).address) for _, sealed in toy.boxes[box.pub]]
    assert len(set(hellos)) == 3
    assert "opened_twice" not in alice.told
    assert alice.told.count("paired") == bob.told.count("paired") == 1


def test_messages_of_one_round_are_taken_in_order_of_seq_and_only_the_newest_is_answered(toy: World) -> None:
    alice, bob = apart(toy)
    seq = bob.kept.seq
    offers = [signed_by(bob, "offer", seq=seq + step, sdpOffer=sdp("offer")) for step in (3, 1, 2)]
    effects = alice.take(*(toy.seal(newest(alice).address, text) for text in offers))
    assert count(Send, effects) == 1
    assert alice.contact.dropped == {}
    assert alice.kept.seen_seq == seq + 3
    [answer] = [message for message in read_by(bob) if message.type == "answer"][-1:]
    assert answer.payload["re"] == hash_jws(offers[0])


def test_welcome_ready_and_used_again_change_nothing(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    settle(alice, bob)
    records = alice.kept, bob.kept
    for app in (alice.restarted(), bob.restarted()):
        app.poll()  # from 0: all again
        assert app.kept in records
        assert count(Gather, app.done) == count(Tell, app.done) == 0


# ---------------------------------------------------------------------------------------
# Attacks on the pairing.
# ---------------------------------------------------------------------------------------


def test_first_contact_forged_by_the_relay_is_dropped_whatever_the_proof(world: World) -> None:
    alice = invite(world)
    link = link_of(alice)
    hello = Attacker(world).hello(link)
    jws = hello.rpartition(".")[0]
    near = prove(link.secret, jws) + "A"
    for proof in ("", "A", "A" * 43, prove(b"", jws), prove(link.commitment, jws), "=" * 43, near):
        alice.take(world.seal(link.address, f"{jws}.{proof}"), address=link.address)
    alice.take(world.seal(link.address, jws), address=link.address)
    assert alice.contact.dropped == {"proof": 7, "jws": 1}
    assert alice.kept.state == "invited"


def test_proof_of_one_hello_does_not_serve_another(world: World) -> None:
    alice = invite(world)
    link, mallory = link_of(alice), Attacker(world)
    proof = mallory.hello(link).rpartition(".")[2]
    jws = mallory.hello(link).rpartition(".")[0]
    alice.take(world.seal(link.address, f"{jws}.{proof}"), address=link.address)
    assert alice.contact.dropped == {"proof": 1}


def test_hello_in_another_mailbox_than_the_invitations_is_refused(world: World) -> None:
    alice, _ = apart(world)
    link = link_of(alice)
    hello = Attacker(world).hello(parse_invitation(alice.kept.invitation), to=newest(alice).address)
    alice.take(world.seal(newest(alice).address, hello))
    assert alice.contact.dropped == {"unexpected": 1}
    assert link.address != newest(alice).address


@pytest.mark.parametrize(("change", "reason"), [
    ({"r": "A" * 22}, "commitment"), ({"re": "A" * 43}, "reply"), ({"from": "Ag" + "A" * 64}, "commitment"),
    ({"to": "elsewhere"}, "recipient"), ({"connectoid": ""}, "address"), ({"re": None}, "payload"),
    ({"r": ""}, "payload"),
])
@pytest.mark.parametrize("kind", ["welcome", "used"])
def test_forged_welcome_or_used_is_refused(toy: World, kind: str, change: Mapping[str, Any], reason: str) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    payload = {"type": kind, "to": newest(bob).address, "from": alice.kept.signer, "seq": 1, "re": bob.kept.hello_hash,
               "r": alice.kept.r, "connectoid": link_of(alice).address}
    text = sign_jws(toy.suite, alice.kept.private_key, {**payload, **change})
    bob.take(toy.seal(newest(bob).address, text))
    assert bob.contact.dropped == {reason: 1}
    assert bob.kept.state == "opened"
    bob.take(toy.seal(newest(bob).address, sign_jws(toy.suite, alice.kept.private_key, payload)))
    assert bob.kept.state == {"welcome": "ready", "used": "ended"}[kind]


def test_second_hello_after_r_is_known_gets_used_and_changes_nothing(world: World) -> None:
    alice, _ = paired(world)
    link, mallory = link_of(alice), Attacker(world)
    before = alice.kept
    for _ in range(3):  # the second and third could be ground to any emoji, R being known
        alice.take(world.seal(link.address, mallory.hello(link)), address=link.address)
        world.advance(MINUTE_S)
    assert {message.type for message in mallory.received()} == {"used"}
    assert {message.payload["r"] for message in mallory.received()} == {before.r}
    for name in ("contact", "contact_address", "comparison", "hello_hash", "welcome", "state", "seen_seq"):
        assert getattr(alice.kept, name) == getattr(before, name)


def test_r_leaves_only_after_a_hello_is_bound_and_saved(world: World) -> None:
    alice = invite(world)
    link, mallory = link_of(alice), Attacker(world)
    alice.take(world.seal(link.address, mallory.sign("hello", link.address) + ".A"), address=link.address)
    assert count(Send, alice.done) == 0
    alice.gathers = False
    effects = alice.take(world.seal(link.address, mallory.hello(link)), address=link.address)
    assert [type(effect) for effect in effects] == [Save, Gather]
    [saved] = [effect.kept for effect in effects if isinstance(effect, Save)]
    assert (saved.state, saved.contact) == ("welcomed", mallory.signer)
    alice.restarted().tick()
    [welcome] = mallory.received()
    assert welcome.payload["r"] == alice.kept.r


def test_every_step_saves_before_anything_leaves(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    settle(alice, bob)
    for app in (alice, bob):
        sealed_after_save = [isinstance(effect, Save) for effect in app.done if isinstance(effect, Save | Send)]
        assert sealed_after_save[0]
        assert count(Save, app.done) >= count(Send, app.done) / len(newest(app).mailboxes) - 1
        assert Kept.from_json(app.saved) == app.kept


@pytest.mark.parametrize("stale", [False, True])
def test_welcome_is_one_and_the_same_bytes_at_most_once_a_minute(toy: World, stale: bool) -> None:
    alice = invite(toy)
    toy.advance(STALE_S if stale else 1)
    bob = open_link(toy, link_of(alice))
    bob.online = False
    settle(alice, rounds=2)
    link = link_of(alice)
    for _ in range(30):
        alice.take(toy.seal(link.address, bob.kept.hello), address=link.address)
        toy.advance(10)
    welcomes = [opened_with(toy, newest(bob).keys, sealed) for _, sealed in toy.boxes[newest(bob).mailboxes[0].pub]]
    assert len(welcomes) in (5, 6)
    assert set(welcomes) == {alice.kept.welcome}
    assert alice.kept.used_to == ()


def test_bob_makes_one_hello_and_only_ever_sends_those_bytes(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    settle(bob, rounds=60, gap_s=10)
    bob = bob.restarted()
    bob.tick()
    assert alice.kept.invited is not None
    hellos = [opened_with(toy, alice.kept.invited.keys, sealed)
              for _, sealed in toy.boxes[alice.kept.invited.mailboxes[0].pub]]
    assert len(hellos) >= 3
    assert set(hellos) == {bob.kept.hello}


def test_stale_hello_gets_a_welcome_without_an_answer_and_a_ready_with_an_offer(toy: World) -> None:
    alice = invite(toy)
    toy.advance(STALE_S)
    bob = open_link(toy, link_of(alice))
    toy.advance(STALE_S)
    alice.poll()
    [welcome] = read_by(bob)
    assert (welcome.type, welcome.sdp) == ("welcome", None)
    bob.poll()
    [ready] = [message for message in read_by(alice) if message.type == "ready"]
    assert ready.sdp == sdp("offer")
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


# ---------------------------------------------------------------------------------------
# Clocks, backups, the channel.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alice_us", [0, -1, 10**15, 9_007_199_254_740_000, 2**53, 2**63, 2**70])
def test_clocks_far_off_pair_and_connect_all_the_same(toy: World, alice_us: int) -> None:
    toy.wall_us = alice_us
    alice, _ = Contact.invite(toy.suite, toy.now, "Bob", [(RELAY, None)])
    toy.wall_us = START_US
    shifted = Shifted(toy, (alice, []), alice_us - START_US)
    bob = open_link(toy, link_of(shifted))
    settle(shifted, bob)
    assert (shifted.state, bob.state) == ("connected", "connected")
    assert 0 < shifted.kept.seq < connectoid.MAX_SEQ


class Shifted(App):
    """An app whose wall clock is off."""

    def __init__(self, world: World, begun: tuple[Contact, list[Effect]], off_us: int) -> None:
        self.off_us = off_us
        super().__init__(ShiftedWorld(world, off_us), begun)


class ShiftedWorld(World):
    """Show another's world with a wall clock that is off."""

    def __init__(self, world: World, off_us: int) -> None:
        super().__init__(world.suite)
        self.of, self.off_us = world, off_us
        self.boxes = world.boxes

    @property
    def now(self) -> Now:
        """Return the time of the clock that is off."""
        return Now(self.of.wall_us + self.off_us, self.of.monotonic_s)

    def put(self, pub: str, sealed: str) -> None:
        """Put it into the mailbox of the world."""
        self.of.put(pub, sealed)

    def advance(self, seconds: float) -> None:
        """Let time go by in the world."""
        self.of.advance(seconds)


def test_wall_clock_that_steps_back_or_off_keeps_seq_rising_and_messages_accepted(toy: World) -> None:
    alice, bob = apart(toy)
    seqs = [alice.kept.seq]
    for wall_us in (START_US - 10**12, 0, START_US + 10**12, 5, 2**60, START_US):
        toy.wall_us = wall_us
        alice.do(alice.contact.disconnect(toy.now))
        alice.connect()
        seqs.append(alice.kept.seq)
    assert seqs == sorted(set(seqs))
    assert seqs[-1] < connectoid.MAX_SEQ // 2
    bob.poll()
    assert bob.kept.seen_seq == seqs[-1]


def test_contact_restored_from_a_backup_still_connects_and_the_other_takes_its_seq(toy: World) -> None:
    alice, bob = apart(toy)
    backup = bob.saved
    toy.advance(DAY_S)
    alice.connect()
    settle(alice, bob)
    old = bob.restarted(backup)
    alice.do(alice.contact.disconnect(toy.now))
    toy.advance(60)
    old.connect()
    settle(alice, old, rounds=20)
    assert (alice.state, old.state) == ("connected", "connected")


def test_contact_restored_from_a_backup_answers_of_all_that_is_replayed_the_hello_and_the_newest(toy: World) -> None:
    alice, bob = apart(toy)
    backup = alice.saved
    toy.advance(DAY_S)
    for _ in range(3):
        bob.do(bob.contact.disconnect(toy.now))
        toy.advance(DAY_S)
        bob.connect()
        alice.poll()
    old = alice.restarted(backup)
    effects = old.poll()
    assert count(Send, effects) == 2  # the welcome again, and an answer or call
    assert old.kept.seen_seq == alice.kept.seen_seq
    assert old.kept.contact == alice.kept.contact


def test_invitation_restored_from_a_backup_is_bound_anew_and_the_first_bob_sees_used_or_silence(toy: World) -> None:
    alice = invite(toy)
    backup = alice.saved
    bob = open_link(toy, link_of(alice))
    settle(alice, bob)
    old = alice.restarted(backup)
    old.poll()  # the relay still has Bob's hello
    assert old.kept.comparison == alice.kept.comparison
    assert old.kept.contact == bob.kept.signer


def joined(world: World) -> tuple[App, App]:
    """Return two apps that have exchanged offer and answer, the channel not yet open."""
    alice, bob = apart(world)
    bob.connect()
    for app in (alice, bob):
        app.poll()
    assert (alice.state, bob.state) == ("joining", "joining")
    return alice, bob


def test_own_challenge_reflected_does_not_connect(world: World) -> None:
    alice, bob = joined(world)
    for app in (alice, bob):
        [challenge] = open_channel(app)
        effects = write(app, challenge)
        assert effects == [Close(app.contact.attempt.ask)]
        assert app.contact.dropped == {"channel": 1}
        assert app.told.count("connected") == 1  # the one of the pairing


def test_challenge_opened_and_own_reflected_as_its_reply_does_not_connect(world: World) -> None:
    alice, bob = joined(world)
    [challenge], [of_bob] = open_channel(alice), open_channel(bob)
    [_] = writes(write(alice, of_bob))
    assert writes(write(alice, challenge)) == []
    assert (alice.state, alice.contact.dropped) == ("waiting", {"channel": 1})


@pytest.mark.parametrize("octets", [b"", b"\0" * 32, b"A" * 200])
def test_man_in_the_middle_of_the_channel_cannot_show_whose_it_is(world: World, octets: bytes) -> None:
    alice, bob = joined(world)
    open_channel(alice)
    [challenge] = open_channel(bob)
    mallory = Attacker(world)
    to_her = world.suite.seal(mallory.box, CONTEXTS["channel"], b"\0" * 32)
    for first in (octets, to_her):
        app = alice if first is octets else bob
        write(app, first)
        assert (app.state, app.contact.dropped) == ("waiting", {"channel": 1})
    assert len(challenge) == 97 + 32 + 16


@pytest.mark.parametrize(("context", "hashes_from", "length"), [
    ("channel", None, 32), ("message", 0, 32), ("channel", 1, 32), ("channel", 0, 31), ("channel", 0, 33),
    ("channel", 0, 0),
])
def test_challenge_of_another_context_or_attempt_or_length_is_refused(
        toy: World, context: str, hashes_from: int | None, length: int) -> None:
    alice, _ = joined(toy)
    open_channel(alice)
    attempt = alice.contact.attempt
    both = connectoid.decode_base64url(attempt.offer) + connectoid.decode_base64url(attempt.answer)
    info = CONTEXTS[context] + (b"" if hashes_from is None else b"\0" + both[hashes_from:])
    assert writes(write(alice, toy.suite.seal(newest(alice).mailboxes[0].pub, info, b"A" * length))) == []
    assert (alice.state, alice.contact.dropped) == ("waiting", {"channel": 1})


def test_nothing_is_opened_for_the_other_end_twice(world: World) -> None:
    alice, bob = joined(world)
    open_channel(alice)
    [challenge] = open_channel(bob)
    assert len(writes(write(alice, challenge))) == 1
    assert writes(write(alice, challenge)) == []
    assert alice.state == "waiting"


def test_messages_of_a_former_peer_connection_are_ignored(toy: World) -> None:
    alice, bob = joined(toy)
    ask = bob.contact.attempt.ask
    for late in (bob.contact.channel_opened(toy.now, ask - 1), bob.contact.channel_message(toy.now, ask - 1, b""),
                 bob.contact.channel_closed(toy.now, ask + 1), bob.contact.gathered(toy.now, ask - 1, sdp("offer"))):
        assert late == []
    assert (alice.state, bob.state) == ("joining", "joining")


def test_answer_to_another_offer_is_ignored(toy: World) -> None:
    alice, bob = apart(toy)
    bob.connect()
    text = signed_by(alice, "answer", re="A" * 43, sdpAnswer=sdp("answer"))
    assert count(Join, bob.take(toy.seal(newest(bob).address, text))) == 0
    assert bob.state == "waiting"
    text = signed_by(alice, "answer", re=bob.contact.attempt.offer, sdpAnswer=sdp("answer"), seq=alice.kept.seq + 2)
    assert count(Join, bob.take(toy.seal(newest(bob).address, text))) == 1


# ---------------------------------------------------------------------------------------
# Hostile addresses: what a client must not be made to ask.
# ---------------------------------------------------------------------------------------

TEST_PUB = "Ag" + "A" * 64  # the form of a key, for what only looks at the form
HOSTILE_URLS = [
    "http://relay.example.com/", "HTTPS://relay.example.com/", "file:///etc/passwd", "javascript:alert(1)",
    "data:text/html,x", "ftp://relay.example.com/", "https:relay.example.com", "https:/relay.example.com/",
    "//relay.example.com/", "relay.example.com", "https://", "https:///", "https://user@relay.example.com/",
    "https://user:pass@relay.example.com/", "https://relay.example.com@evil.example/", "https://:@evil.example/",
    "https://relay.example.com\\@evil.example/", "https:\\\\relay.example.com/", "https://relay.example.com/\\evil",
    "https://relay.example.com:0/", "https://relay.example.com:99999/", "https://relay.example.com:65536/",
    "https://relay.example.com:/", "https://relay.example.com:-1/", "https://relay.example.com:+1/",
    "https://relay.example.com:\u0661/", "https://relay.example.com/?a=b", "https://relay.example.com/#a",
    "https://relay.example.com/\n", "\nhttps://relay.example.com/", "https://relay.example.com/\r\nHost: evil",
    "https://relay.example.com/\0", "https://relay.example.com/ a", " https://relay.example.com/",
    "https://relay.ex\tample.com/", "https://rel\u0430y.example.com/", "https://relay\uff0eexample.com/",
    "https://relay.example.com/\u202e", "https://\u2100.example.com/", "https://relay.example.com\uff0fevil/",
    "https://[::1", "https://::1/", "https://[fe80::1%25eth0]/", "https://[evil.example]/",
    "http://localhost.evil.example/", "http://127.0.0.1.evil.example/", "http://evil.example/127.0.0.1",
    "http://127.0.0.1@evil.example/", "http://[::ffff:10.0.0.1]/", "http://10.0.0.1/", "http://0.0.0.0/",
    "https://relay.example.com/" + "a" * 487, "https://" + "a" * 2_000,
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_hostile_url_in_a_hello_is_never_asked(toy: World, url: str) -> None:
    alice = invite(toy)
    link, mallory = link_of(alice), Attacker(toy)
    mallory.address = str(Mailbox(mallory.box, url))
    alice.take(toy.seal(link.address, mallory.hello(link)), address=link.address)
    assert alice.contact.dropped == {"address": 1}
    assert alice.kept.state == "invited"
    assert count(Send, alice.done) == count(Gather, alice.done) == 0


@pytest.mark.parametrize("url", [
    "https://relay.example.com", "https://relay.example.com/", "https://relay.example.com:8443/a/b%20c/~d",
    "https://[2001:db8::1]:443/", "https://192.0.2.1/", "http://127.0.0.1:8000/", "http://localhost/",
    "http://[::1]:8000/", "https://xn--bcher-kva.example/", "https://relay.example.com/@a:b",
    "https://relay.example.com/" + "a" * 486,
])
def test_plain_url_is_taken(url: str) -> None:
    assert parse_address(str(Mailbox(TEST_PUB, url))) == (Mailbox(TEST_PUB, url),)


def test_http_is_for_loopback_or_where_the_app_allows_it(toy: World) -> None:
    address = str(Mailbox(TEST_PUB, "http://relay.example.com/"))
    with pytest.raises(Refused, match="https"):
        parse_address(address)
    assert len(parse_address(address, allow_http=True)) == 1
    with pytest.raises(LinkError, match="https"):
        read_link(f"{address}..{'A' * 64}")
    assert read_link(f"{address}..{'A' * 64}", allow_http=True).address == address
    with pytest.raises(UsageError, match="https"):
        invite(toy, ("http://relay.example.com/", None))


@pytest.mark.parametrize("parts", [
    "", ".", "..", "~", TEST_PUB, f"{TEST_PUB}.", f".{'a' * 8}",
    f"{TEST_PUB}.aHR0cHM6Ly9h.", f"{TEST_PUB}.aHR0cHM6Ly9h.YQ.YQ",
    f"{TEST_PUB}.aHR0cHM6Ly9h~", f"~{TEST_PUB}.aHR0cHM6Ly9h", f"{TEST_PUB}.aHR0cHM6Ly9h~{TEST_PUB}.aHR0cHM6Ly9i",
    f"{TEST_PUB}.aHR0cHM6Ly9h=", f"{TEST_PUB}.aHR0cHM6Ly9h\n", f"{TEST_PUB[:-1]}.aHR0cHM6Ly9h", f"{TEST_PUB}._w",
    f"{TEST_PUB[:-1]}B.aHR0cHM6Ly9h", f"{TEST_PUB}.aHR0cHM6Ly9h._w",
    f"{TEST_PUB}.aHR0cHM6Ly9h.YR", f"B{TEST_PUB[1:]}.aHR0cHM6Ly9h",
    f"AQ{TEST_PUB[2:]}.aHR0cHM6Ly9h", f"{TEST_PUB}.aHR0cHM6Ly9h.é", f"{TEST_PUB} .aHR0cHM6Ly9h",
])
def test_address_of_another_form_is_refused(parts: str) -> None:
    with pytest.raises(Refused) as error:
        parse_address(parts)
    assert error.value.reason == "address"


# ---------------------------------------------------------------------------------------
# Floods: nothing kept grows, and what is sent is bounded.
# ---------------------------------------------------------------------------------------

FLOOD = 10_000


def test_ten_thousand_bad_messages_leave_nothing_behind(toy: World) -> None:
    alice, _ = apart(toy)
    alice.take("start")
    record, before = alice.saved, held(alice.contact)
    own = newest(alice).address
    mallory = Attacker(toy)
    bad = [toy.seal(own, mallory.sign("offer", own, seq=number + 1, sdpOffer=sdp("offer")))
           if number % 4 else f"QUJD{number}" for number in range(FLOOD)]
    assert alice.take(*bad) == []
    assert alice.saved == record
    assert alice.contact.dropped["sender"] == FLOOD * 3 // 4
    assert alice.contact.dropped.total() == FLOOD + 1
    assert held(alice.contact) <= before + connectoid.MAX_SEEN + len(REASONS)
    assert alice.contact.poll_gap_s(Now(toy.wall_us, toy.monotonic_s + 100)) == connectoid.POLL_SLOW_S


def test_flood_of_hellos_gets_one_used_a_minute_and_ten_for_the_invitation(toy: World) -> None:
    alice, _ = paired(toy)
    link, mallory = link_of(alice), Attacker(toy)
    for _ in range(20):
        for _ in range(6):
            hellos = [toy.seal(link.address, mallory.hello(link)) for _ in range(20)]
            assert count(Send, alice.take(*hellos, address=link.address)) <= 1
            toy.advance(10)
        toy.advance(0.5)
    used = mallory.received()
    assert {message.type for message in used} == {"used"}
    assert len(used) == connectoid.MAX_USED == 10
    assert len(alice.kept.used_to) == 10
    old = alice.restarted()
    old.take(toy.seal(link.address, mallory.hello(link)), address=link.address)
    assert len(mallory.received()) == 10
    assert held(alice.contact) <= connectoid.MAX_SEEN + 50


def test_used_goes_out_once_a_minute(toy: World) -> None:
    alice, _ = paired(toy)
    link, mallory = link_of(alice), Attacker(toy)
    sent = []
    for _ in range(7):
        sent.append(count(Send, alice.take(toy.seal(link.address, mallory.hello(link)), address=link.address)))
        toy.advance(20)
    assert sent == [1, 0, 0, 1, 0, 0, 1]


def test_used_is_not_said_again_to_what_a_restart_reads_again(toy: World) -> None:
    """An app that is started often would else spend the ten on one stranger."""
    alice, _ = paired(toy)
    link, mallory = link_of(alice), Attacker(toy)
    sealed = toy.seal(link.address, mallory.hello(link))
    for expected in ([1, 1], [0, 0], [0, 0]):
        effects = alice.take(sealed, address=link.address)
        assert [count(Send, effects), count(Tell, effects)] == expected
        toy.advance(120)
        alice = alice.restarted()
    assert len(alice.kept.used_to) == 1
    alice.poll()
    again = alice.take(toy.seal(link.address, mallory.hello(link)), address=link.address)
    assert [count(Send, again), len(alice.kept.used_to)] == [1, 2]


def test_flood_of_valid_messages_gets_one_reply_a_round_and_keeps_the_record_small(toy: World) -> None:
    alice, bob = apart(toy)
    size = len(alice.saved)
    texts = [signed_by(bob, "offer", seq=bob.kept.seq + number, sdpOffer=sdp("offer")) for number in range(1, 2_001)]
    effects = alice.take(*(toy.seal(newest(alice).address, text) for text in texts))
    assert count(Send, effects) == 1
    assert len(alice.saved) < size + 400  # it has made an address, as this one is crowded
    assert held(alice.contact) <= connectoid.MAX_SEEN + 50


def test_withdrawn_invitation_answers_used_and_pairs_with_nobody(world: World) -> None:
    alice = invite(world)
    link = link_of(alice)
    assert count(Send, alice.unshare()) == 0
    bob = open_link(world, link)
    settle(alice, bob)
    assert (bob.kept.why, bob.told) == ("used", ["used"])
    assert (alice.kept.state, alice.kept.contact, alice.told) == ("unshared", "", [])
    world.advance(30 * DAY_S)
    assert alice.tick() == [Forget()]


def test_unshare_crossing_unshare_ends_both(world: World) -> None:
    alice, bob = paired(world)
    alice.unshare()
    bob.unshare()
    before = len(alice.done), len(bob.done)
    settle(alice, bob)
    assert (alice.kept.state, bob.kept.state) == ("ended", "ended")
    assert alice.done[before[0]:] == bob.done[before[1]:] == [Forget()]


# ---------------------------------------------------------------------------------------
# Fuzz: whatever is in a message, a step raises nothing and the contact stays what it was.
# ---------------------------------------------------------------------------------------

FUZZ_RUNS = 500
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=70)
    | st.sampled_from(["", "A" * 43, "A" * 22, TEST_PUB, "\0", "é", "~", ".", "offer", "answer", "hello", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "sdp", "x"]), inner),
    max_leaves=5)
WRONG_VALUES: Mapping[str, list[Any]] = {
    "sdpOffer": [None, sdp("answer"), {"type": "offer"}, {"sdp": "v=0"}, {"type": "offer", "sdp": 1}, [], "x"],
    "nonce": [None, "", "A" * 21, "A" * 23, "A" * 21 + "B", 7, "=" * 22],
    "re": ["A" * 43, "", False],
    "from": ["A" * 66, None],
    "to": [None],
    "connectoid": [None],
    "type": ["Hello", None, "r"],
}


@pytest.mark.parametrize(("name", "value"),
                         [(name, value) for name, values in WRONG_VALUES.items() for value in values])
def test_hello_with_a_wrong_member_is_refused(toy: World, name: str, value: object) -> None:
    alice = invite(toy)
    link, mallory = link_of(alice), Attacker(toy)
    payload = {**mallory.payload("hello", link.address, nonce="A" * 22, sdpOffer=sdp("offer")), name: value}
    jws = sign_jws(toy.suite, mallory.key, payload)
    alice.take(toy.seal(link.address, f"{jws}.{prove(link.secret, jws)}"), address=link.address)
    assert alice.contact.dropped == {"payload": 1}
    assert alice.kept.state == "invited"


@pytest.mark.parametrize("name", ["type", "to", "from", "seq", "re", "connectoid", "nonce", "sdpOffer"])
def test_hello_without_a_member_is_refused(toy: World, name: str) -> None:
    alice = invite(toy)
    link, mallory = link_of(alice), Attacker(toy)
    payload = mallory.payload("hello", link.address, nonce="A" * 22, sdpOffer=sdp("offer"))
    del payload[name]
    jws = sign_jws(toy.suite, mallory.key, payload)
    alice.take(toy.seal(link.address, f"{jws}.{prove(link.secret, jws)}"), address=link.address)
    assert alice.contact.dropped == {"payload": 1}


RAW = [
    b'{"type":"hello"', b"[]", b"null", b"1", b'"x"', b"", b"\xff", b"{}",
    b"[" * 9_000, b'{"a":' * 1_500 + b"1" + b"}" * 1_500,
    b'{"type":"offer","to":"\\ud800"}', b'{"seq":' + b"9" * 5_000 + b"}", b'{"seq":NaN}',
    b'{"seq":-Infinity}', b'{"x":1e999}',
    b"\xef\xbb\xbf{}", b'{"type":["hello"]}', b'{"type":{}}', b'{"type":null}',
    b'{"type":"answer","type":"hello"}', b"{'a':1}",
]


@pytest.mark.parametrize("octets", RAW)
def test_body_that_is_no_payload_is_refused(toy: World, octets: bytes) -> None:
    alice, bob = apart(toy)
    before = alice.saved
    assert alice.take(toy.seal(newest(alice).address, sign_octets(toy, bob.kept.private_key, octets))) == []
    assert alice.contact.dropped == {"payload": 1}
    assert alice.saved == before


@settings(max_examples=FUZZ_RUNS, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(sorted(connectoid.MEMBERS)),
       state=st.sampled_from(["invited", "welcomed", "opened", "paired"]),
       name=st.sampled_from(["type", "to", "from", "seq", "re", "connectoid", "nonce", "r", "sdpOffer", "sdpAnswer"]),
       value=JSON_VALUES)
def test_any_value_of_any_member_in_any_state_raises_nothing(kind: str, state: str, name: str, value: object) -> None:
    app, payload, finish = STARTS[state]()
    common = {"sdpOffer": sdp("offer"), "sdpAnswer": sdp("answer"), "nonce": "A" * 22}
    payload = {**common, **payload, "type": kind, name: value}
    try:
        text = finish(payload)
    except (ValueError, UnicodeEncodeError):
        return  # a lone surrogate cannot be written
    effects = app.take(app.world.seal(str(payload_address(app)), text), address=payload_address(app))
    assert count(Send, effects) <= 1
    assert app.kept.state in {rule.state for rule in PAIRING.values()} | {"ended"}


def payload_address(app: App) -> str:
    """Return the address where an app of STARTS listens."""
    return (app.kept.invited or newest(app)).address if app.kept.state == "invited" else newest(app).address


def start_invited() -> tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return Alice before anybody wrote, and what Mallory with the link would write."""
    world = World(ToySuite())
    alice, mallory = invite(world), Attacker(world)
    link = link_of(alice)

    def finish(payload: dict[str, Any]) -> str:
        jws = sign_jws(world.suite, mallory.key, payload)
        return f"{jws}.{prove(link.secret, jws)}" if payload["type"] == "hello" else jws

    return alice, mallory.payload("hello", link.address), finish


def start_opened() -> tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return Bob without an answer, and what Alice would write, hostile."""
    world = World(ToySuite())
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    payload = {"type": "", "to": newest(bob).address, "from": alice.kept.signer, "seq": 1, "re": bob.kept.hello_hash,
               "r": alice.kept.r, "connectoid": link_of(alice).address}
    return bob, payload, lambda members: sign_jws(world.suite, alice.kept.private_key, members)


def start_known(state: str) -> tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return Alice when she knows Bob, and what he would write, hostile."""
    world = World(ToySuite())
    alice, bob = apart(world)
    alice = App(world, (Contact(world.suite, replace(alice.kept, state=state)), []))
    payload = {"type": "", "to": newest(alice).address, "from": bob.kept.signer, "seq": bob.kept.seq + 1,
               "re": "A" * 43,
               "r": "A" * 22, "connectoid": newest(bob).address}
    return alice, payload, lambda members: sign_jws(world.suite, bob.kept.private_key, members)


STARTS: Mapping[str, Callable[[], tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]]] = {
    "invited": start_invited, "opened": start_opened,
    "welcomed": lambda: start_known("welcomed"), "paired": lambda: start_known("paired"),
}


@settings(max_examples=FUZZ_RUNS, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(max_size=200) | st.binary(max_size=200).map(connectoid.encode_base64url), max_size=4),
       st.binary(max_size=1_100))
def test_any_data_raises_nothing(texts: list[str], plaintext: bytes) -> None:
    app, _, _ = start_invited()
    pub = link_of(app).address.split(".")[0]
    padded = (len(plaintext).to_bytes(4, "big") + plaintext).ljust(2_048, b"\0")
    sealed = app.world.suite.seal(pub, CONTEXTS["message"], padded)
    assert app.take(*texts, connectoid.encode_base64url(sealed), address=link_of(app).address) == []
    assert app.contact.dropped.total() == len(texts) + 1
    assert set(app.contact.dropped) <= set(REASONS)


@settings(max_examples=FUZZ_RUNS, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=120) | st.text(alphabet="~.=#?&%connectoidA-_", max_size=80))
def test_any_text_as_link_or_address_raises_its_own_error_alone(text: str) -> None:
    for link in (text, f"{APP}#connectoid={text}", f"{APP}?connectoid={text}"):
        with pytest.raises(LinkError):
            read_link(link)
    with pytest.raises(Refused):
        parse_address(text)
    with pytest.raises(Refused):
        read_jws(text)


# ---------------------------------------------------------------------------------------
# Links: what is wrong with one is said in a sentence.
# ---------------------------------------------------------------------------------------

GOOD_MAILBOX = str(Mailbox(TEST_PUB, RELAY))
GOOD = f"{GOOD_MAILBOX}..{'A' * 64}"
SENTENCES = {
    "nothing": ("", "no invitation"),
    "another page": (f"{APP}#section", "no invitation"),
    "another parameter": (f"{APP}?invitation={GOOD}", "no invitation"),
    "cut before the key": (f"{APP}#connectoid=", "damaged"),
    "cut in the key": (f"{APP}#connectoid={GOOD[:40]}", "cut off"),
    "cut after the key": (f"{APP}#connectoid={GOOD[:66]}", "cut off"),
    "cut in the URL": (f"{APP}#connectoid={GOOD[:80]}", "damaged"),
    "no secret": (f"{APP}#connectoid={GOOD_MAILBOX}", r"^This link has no secret; ask for a new one\.$"),
    "no secret, empty ext": (f"{APP}#connectoid={GOOD_MAILBOX}.", r"^This link has no secret; ask for a new one\.$"),
    "cut in the secret": (f"{APP}#connectoid={GOOD[:-1]}", "cut off or damaged"),
    "a letter too many": (f"{APP}#connectoid={GOOD}A", "cut off or damaged"),
    "a full stop of the sentence": (f"{APP}#connectoid={GOOD}.", "cut off or damaged"),
    "a bracket": (f"{APP}#connectoid={GOOD})", "cut off or damaged"),
    "a changed key": (f"{APP}#connectoid=B{GOOD[1:]}", "key is damaged"),
    "a space in it": (f"{APP}#connectoid={GOOD[:70]} {GOOD[70:]}", "damaged"),
    "four mailboxes": (f"{APP}#connectoid={'~'.join([GOOD_MAILBOX] * 3)}~{GOOD}", "more than 3"),
    "twice the same": (f"{APP}#connectoid={GOOD_MAILBOX}~{GOOD}", "twice"),
    "not https": (f"{APP}#connectoid={Mailbox(TEST_PUB, 'http://relay.example.com/')}..{'A' * 64}", "https"),
}


@pytest.mark.parametrize(("link", "says"), SENTENCES.values(), ids=SENTENCES)
def test_damaged_link_says_what_is_wrong_in_a_sentence(link: str, says: str) -> None:
    with pytest.raises(LinkError, match=says) as error:
        read_link(link)
    text = str(error.value)
    assert text.startswith(("This link ", "There is no invitation "))
    assert text.endswith((".", "whole."))
    assert "A" * 60 not in text  # no secret in what a user may post somewhere


@pytest.mark.parametrize("link", [
    f"{APP}#connectoid={GOOD}", f"{APP}?connectoid={GOOD}", f"{APP}?a=b&connectoid={GOOD}#other", GOOD,
    f" {APP}#connectoid={GOOD}\n", f"{APP}#a&connectoid={GOOD}&utm=x", f"#connectoid={GOOD}",
    f"{APP}#connectoid={GOOD.replace('.', '%2E')}", f"{APP}?connectoid={GOOD}#connectoid={GOOD}",
])
def test_invitation_is_found_in_fragment_query_or_bare(link: str) -> None:
    assert read_link(link) == Invitation(GOOD, GOOD_MAILBOX, bytes(16), bytes(32))


def test_made_link_has_the_invitation_in_the_fragment_and_is_read_again(toy: World) -> None:
    for relays in ([(RELAY, None)], [(RELAY, "key é"), (OTHER_RELAY, None)], [(RELAY, None), (OTHER_RELAY, "k")]):
        alice = invite(toy, *relays)
        for app_url in (APP, f"{APP}#old", f"{APP}?a=b"):
            link = make_link(app_url, alice.kept.invitation)
            assert link == f"{app_url.partition('#')[0]}#connectoid={alice.kept.invitation}"
            read = read_link(link)
            assert alice.kept.invited is not None
            assert (read.text, read.address) == (alice.kept.invitation, alice.kept.invited.address)
            assert [(box.url, box.ext) for box in parse_address(read.address)] == relays


# ---------------------------------------------------------------------------------------
# Limits, each one below, at, and one over.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", connectoid.SIZES)
def test_padding_takes_the_smallest_size_that_fits(toy: World, size: int) -> None:
    key, pub = toy.suite.make_key()
    for length, padded in ((size - 5, size), (size - 4, size), (size - 3, size * 2)):
        if padded > connectoid.SIZES[-1]:
            with pytest.raises(UsageError, match="16384"):
                seal_message(toy.suite, pub, "A" * length)
            continue
        sealed = seal_message(toy.suite, pub, "A" * length)
        assert len(connectoid.decode_base64url(sealed)) == 48 + padded
        assert open_message(toy.suite, key, sealed) == "A" * length


def test_address_has_one_to_three_mailboxes(toy: World) -> None:
    boxes = [Mailbox(toy.suite.make_key()[1], RELAY) for _ in range(4)]
    for number in (1, 2, 3):
        assert parse_address(format_address(boxes[:number])) == tuple(boxes[:number])
    for refused in (boxes, []):
        with pytest.raises(Refused):
            parse_address(format_address(refused))


@pytest.mark.parametrize("letter", ["a", "é", "\U0001f600"])
def test_ext_has_at_most_so_many_code_points(letter: str) -> None:
    most = connectoid.MAX_EXT_CHARS
    for length in (1, most - 1, most):
        box = Mailbox(TEST_PUB, RELAY, letter * length)
        assert parse_address(str(box)) == (box,)
    with pytest.raises(Refused, match="1024"):
        parse_address(str(Mailbox(TEST_PUB, RELAY, letter * (most + 1))))


def test_url_has_at_most_so_many_characters() -> None:
    most = connectoid.MAX_URL_CHARS
    for length in (most - 1, most):
        connectoid.check_url(RELAY.ljust(length, "a"))
    with pytest.raises(Refused):
        connectoid.check_url(RELAY.ljust(most + 1, "a"))


@pytest.mark.parametrize(("port", "good"), [(0, False), (1, True), (65_534, True), (65_535, True), (65_536, False)])
def test_port_is_one_that_exists(port: int, good: bool) -> None:
    try:
        connectoid.check_url(f"https://relay.example.com:{port}/")
    except Refused:
        assert not good
    else:
        assert good


@pytest.mark.parametrize(("seq", "reason"), [
    (-1, "payload"), (0, "payload"), (connectoid.MAX_SEQ - 2, ""), (connectoid.MAX_SEQ - 1, ""),
    (connectoid.MAX_SEQ, "payload"), (connectoid.MAX_SEQ + 1, "payload"), (True, "payload"),
    (1.0, "payload"), ("9", "payload"),
])
def test_seq_is_a_positive_integer_below_two_to_the_53(toy: World, seq: object, reason: str) -> None:
    alice, bob = apart(toy)
    alice.take(toy.seal(newest(alice).address, signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer"))))
    assert alice.contact.dropped == ({reason: 1} if reason else {})


@pytest.mark.parametrize(("others", "reason"), [
    (connectoid.MAX_SEEN - 2, "replay"), (connectoid.MAX_SEEN - 1, "replay"), (connectoid.MAX_SEEN, "encoding"),
])
def test_so_many_messages_are_remembered_by_their_bytes(toy: World, others: int, reason: str) -> None:
    alice = invite(toy)
    alice.take("=", *(f"={number}" for number in range(others)), address=link_of(alice).address)
    before = alice.contact.dropped[reason]
    alice.take("=", address=link_of(alice).address)
    assert alice.contact.dropped[reason] == before + 1


def test_wall_clock_is_believed_up_to_half_of_the_largest_seq(toy: World) -> None:
    _, bob = apart(toy)
    for wall_us, believed in ((connectoid.MAX_SEQ // 2 - 1, True), (connectoid.MAX_SEQ // 2, False)):
        toy.wall_us = wall_us
        app = bob.restarted()
        app.connect()
        assert (app.kept.seq >= wall_us) is believed


# ---------------------------------------------------------------------------------------
# Records, and what shows secrets.
# ---------------------------------------------------------------------------------------


def secrets_of(kept: Kept) -> set[str]:
    """Return all texts of a record that nobody else may see."""
    owns = [own for own in (kept.invited, kept.current, kept.pending, kept.former) if own]
    fourth = [kept.invitation.rpartition(".")[2]] if kept.invitation else []
    own_r = [kept.r] if kept.r else []
    return {kept.private_key, *(key for own in owns for key in own.keys), *fourth, *own_r} - {""}


def all_states(world: World) -> list[Kept]:
    """Return a record of every state that there is."""
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    settle(alice, bob)
    alice.unshare()
    settle(bob)
    return [effect.kept for app in (alice, bob) for effect in app.done if isinstance(effect, Save)]


def test_record_is_the_same_after_json_in_every_state(world: World) -> None:
    records = all_states(world)
    assert {kept.state for kept in records} == {"invited", "welcomed", "opened", "ready", "paired", "unshared", "ended"}
    for kept in records:
        assert Kept.from_json(kept.to_json()) == kept
        json.loads(kept.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("damage", [
    "", "{", "null", "[]", "1", '"x"', "{}", '{"version": 1}', "\0", '{"version": 1, "role": "inviter"}',
])
def test_damaged_record_is_told(damage: str) -> None:
    with pytest.raises(RecordError, match="damaged"):
        Kept.from_json(damage)


@pytest.mark.parametrize("change", [
    {"relays": None}, {"relays": [1]}, {"relays": [["a"]]}, {"comparison": None}, {"current": "x"},
    {"current": {"address": "x", "keys": None}}, {"unknown": 1},
])
def test_record_with_a_wrong_member_is_told_without_its_secrets(toy: World, change: Mapping[str, Any]) -> None:
    members = json.loads(paired(toy)[0].saved)
    with pytest.raises(RecordError, match="damaged") as error:
        Kept.from_json(json.dumps({**members, **change}))
    assert members["private_key"] not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("cut", [1, 2, 100, 1_000])
def test_record_cut_off_is_told_without_its_secrets(toy: World, cut: int) -> None:
    saved = paired(toy)[0].saved
    with pytest.raises(RecordError, match="damaged") as error:
        Kept.from_json(saved[:-cut])
    assert Kept.from_json(saved).private_key not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_record_of_another_version_is_told(toy: World, version: object) -> None:
    members = json.loads(invite(toy).saved)
    with pytest.raises(RecordError, match="another version"):
        Kept.from_json(json.dumps({**members, "version": version}))


def test_record_without_a_member_is_told(toy: World) -> None:
    members = json.loads(invite(toy).saved)
    for name in ("role", "state", "relays", "private_key", "invitation", "current", "comparison", "version"):
        with pytest.raises(RecordError):
            Kept.from_json(json.dumps({key: value for key, value in members.items() if key != name}))


def test_no_repr_shows_a_secret(world: World) -> None:
    alice, bob = paired(world)
    shown = [*alice.done, *bob.done, *all_states(world), link_of(alice), *alice.contact.polls(world.now)]
    secrets = set().union(*(secrets_of(app.kept) for app in (alice, bob)),
                          *(secrets_of(effect.kept) for effect in shown if isinstance(effect, Save)),
                          *(secrets_of(kept) for kept in shown if isinstance(kept, Kept)))
    assert len(secrets) > 10
    joining, other = joined(world)
    open_channel(joining)
    text = repr([*shown, joining.contact.attempt, joining.contact, Save(other.kept)])
    assert not [secret for secret in secrets if secret in text]
    assert repr(link_of(alice).secret)[2:-1] not in text
    assert repr(joining.contact.attempt.challenge)[2:-1] not in text


def test_no_error_shows_a_secret(world: World) -> None:
    alice = invite(world)
    text = alice.kept.invitation
    secret = text.rpartition(".")[2]
    for link in (text[:-1], text + "A", f"B{text[1:]}", f"{APP}#connectoid=x{text}"):
        with pytest.raises(LinkError) as error:
            read_link(link)
        assert secret[:20] not in "".join(traceback.format_exception(error.value))
    key = alice.kept.private_key
    with pytest.raises(Refused) as refused:
        world.suite.open(key, CONTEXTS["message"], b"")
    assert key not in "".join(traceback.format_exception(refused.value))


def test_errors_have_one_base_and_every_reason_a_sentence() -> None:
    for error in (UsageError, LinkError, RecordError, Refused):
        assert issubclass(error, ConnectoidError)
    assert all(str(Refused(reason)) == text for reason, text in REASONS.items())
    with pytest.raises(KeyError):
        Refused("because")


def test_all_that_is_public_exists_and_is_documented() -> None:
    assert len(set(connectoid.__all__)) == len(connectoid.__all__)
    for name in connectoid.__all__:
        member = getattr(connectoid, name)
        assert not callable(member) or member.__doc__, name


# ---------------------------------------------------------------------------------------
# Rotation.
# ---------------------------------------------------------------------------------------


def test_pairing_rotates_both_and_the_first_message_to_a_new_address_makes_it_current(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    first_of_bob = newest(bob).address
    settle(alice, bob)
    assert newest(alice).address != link_of(alice).address
    assert (alice.kept.pending, alice.kept.contact_address) == (None, newest(bob).address)
    assert newest(bob).address != first_of_bob
    alice.do(alice.contact.channel_closed(toy.now, alice.contact.attempt.ask))
    alice.connect()
    pending = bob.kept.pending
    bob.poll()
    assert (bob.kept.pending, bob.kept.current) == (None, pending)
    assert bob.kept.former is not None
    assert bob.kept.former.address == first_of_bob


def test_at_most_one_address_is_pending_and_all_three_are_polled(toy: World) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    toy.advance(30 * DAY_S)
    bob.online = False
    seen = set()
    for _ in range(4):
        alice.do(alice.contact.disconnect(toy.now))
        alice.connect()
        seen.add(newest(alice).address)
        toy.advance(40 * DAY_S)
    assert len(seen) == 1
    polled = {poll.mailbox for poll in alice.contact.polls(toy.now)}
    assert polled == {box for own in (alice.kept.pending, alice.kept.current, alice.kept.former) if own
                      for box in own.mailboxes}
    assert len(polled) == 3


def test_former_address_is_polled_until_the_next_rotation_and_then_its_keys_are_gone(toy: World) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    former = alice.kept.former
    assert former is not None
    assert former.mailboxes[0] in [poll.mailbox for poll in alice.contact.polls(toy.now)]
    alice.take(toy.seal(former.address, signed_by(bob, "offer", to=former.address, sdpOffer=sdp("offer"))),
               address=former.address)
    assert alice.contact.dropped["replay"] + alice.contact.dropped["seal"] == alice.contact.dropped.total()
    assert alice.kept.seen_seq == bob.kept.seq + 1
    rotate(alice, bob)
    assert former.keys[0] not in alice.saved
    assert former.mailboxes[0] not in [poll.mailbox for poll in alice.contact.polls(toy.now)]


@pytest.mark.parametrize("forged", ["sender", "signature", "recipient", "replay", "address", "payload"])
def test_only_a_valid_message_makes_a_pending_address_current(toy: World, forged: str) -> None:
    alice, bob = apart(toy)
    toy.advance(30 * DAY_S + 1)
    alice.connect()
    pending = alice.kept.pending
    assert pending is not None
    wrong: dict[str, dict[str, Any]] = {
        "sender": {"from": Attacker(toy).signer}, "recipient": {"to": "elsewhere"}, "replay": {"seq": 1},
        "address": {"connectoid": "x"}, "payload": {"sdpOffer": None}, "signature": {}}
    members = wrong[forged]
    text = signed_by(bob, "offer", **{"to": pending.address, "sdpOffer": sdp("offer"), **members})
    if forged == "signature":
        text = f"{text.rpartition('.')[0]}.{'A' * 128}"
    alice.take(toy.seal(pending.address, text), address=pending.address)
    assert alice.contact.dropped[forged] == 1
    assert alice.kept.pending == pending


@pytest.mark.parametrize("who", ["alice", "bob"])
@pytest.mark.parametrize("after", range(14))
def test_crash_between_any_two_steps_of_a_rotation_repeats_the_step(toy: World, who: str, after: int) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    toy.advance(30 * DAY_S + 1)
    apps = {"alice": alice.restarted(), "bob": bob.restarted()}
    apps[who].crash_after = after
    try:
        apps["alice"].connect()
        settle(apps["alice"], apps["bob"], rounds=3)
    except CrashError:
        apps[who] = apps[who].restarted()
    apps[who].crash_after = -1
    one, other = apps.values()
    for app in (one, other):
        app.do(app.contact.disconnect(toy.now))
        app.connect()
    settle(one, other, rounds=80)
    assert (one.state, other.state) == ("connected", "connected")
    for app, peer in ((one, other), (other, one)):
        polled = {own.address for own in (app.kept.current, app.kept.pending, app.kept.former) if own}
        assert peer.kept.contact_address in polled


@pytest.mark.parametrize("restarts", [True, False])
def test_many_short_sessions_an_hour_leave_room_in_every_mailbox(toy: World, restarts: bool) -> None:
    """A relay keeps an eighth of a box for one source: 32 messages an hour by default."""
    alice, bob = apart(toy)
    toy.drop(link_of(alice).address)  # the hello, which every restart would answer: relays keep it for an hour
    for _ in range(60):
        if restarts:
            alice, bob = alice.restarted(), bob.restarted()
        alice.connect()
        bob.connect()
        settle(alice, bob)
        assert alice.state == bob.state == "connected"
        for app in (alice, bob):
            app.do(app.contact.disconnect(toy.now))
    assert max(map(len, toy.boxes.values())) <= Limits().max_box_messages // SOURCE_SHARE


def test_verified_mark_survives_rotation_and_restart(toy: World) -> None:
    alice, bob = paired(toy)
    alice.do(alice.contact.verify(toy.now))
    comparison = alice.kept.comparison
    rotate(alice, bob)
    again = alice.restarted()
    assert (again.kept.verified, again.kept.comparison) == (True, comparison)
    again.do(again.contact.verify(toy.now, same=False))
    assert not again.kept.verified
    assert not Kept.from_json(again.saved).verified


def test_verify_before_there_is_something_to_compare_is_a_mistake(toy: World) -> None:
    bob = open_link(toy, link_of(invite(toy)))
    for app in (invite(toy), bob):
        with pytest.raises(UsageError, match="compare"):
            app.contact.verify(toy.now)
        assert not app.kept.verified


def test_move_to_other_relays_is_told_and_both_meet_there(toy: World) -> None:
    alice, bob = apart(toy)
    for mover, other in ((alice, bob), (bob, alice)):
        mover.do(mover.contact.move(toy.now, [(OTHER_RELAY, "key"), (RELAY, None)]))
        settle(alice, bob, rounds=20)
        assert [(box.url, box.ext) for box in parse_address(other.kept.contact_address)] == [
            (OTHER_RELAY, "key"), (RELAY, None)]
        assert mover.kept.relays == ((OTHER_RELAY, "key"), (RELAY, None))
        assert (alice.state, bob.state) == ("connected", "connected")


@pytest.mark.parametrize("relays", [[(RELAY, "")], [(RELAY, None)] * 4, [("ftp://x/", None)], [(RELAY, "a" * 1_025)],
                                    [("http://x/", None)]])
def test_move_to_bad_relays_is_a_mistake_and_changes_nothing(
        toy: World, relays: Sequence[tuple[str, str | None]]) -> None:
    alice, _ = paired(toy)
    before = alice.kept, alice.contact.attempt
    with pytest.raises(UsageError, match="relay"):
        alice.contact.move(toy.now, relays)
    assert (alice.kept, alice.contact.attempt) == before
    with pytest.raises(UsageError, match="Share again"):
        invite(toy).contact.move(toy.now, [(RELAY, None)])
    with pytest.raises(UsageError):
        Contact.invite(toy.suite, toy.now, "Bob", relays)


# ---------------------------------------------------------------------------------------
# Unshare, tombstones, expiry.
# ---------------------------------------------------------------------------------------


def test_unshare_tells_the_other_and_leaves_nothing_of_name_and_connection(world: World) -> None:
    alice, bob = paired(world)
    alice.contact.verify(world.now)
    effects = alice.unshare()
    assert [type(effect) for effect in effects] == [Save, Close, Send]
    kept = alice.kept
    assert (kept.state, kept.name, kept.relays, kept.comparison, kept.verified) == ("unshared", "", (), (), False)
    assert (kept.hello, kept.welcome) == ("", "")
    assert '"Bob"' not in alice.saved
    settle(alice, bob)
    assert (bob.kept.state, bob.kept.why, bob.told[-1]) == ("ended", "unshared", "unshared")
    assert bob.state == "apart"


def test_ended_contact_keeps_no_key_and_listens_to_nothing(world: World) -> None:
    alice, bob = paired(world)
    before = secrets_of(bob.kept)
    alice.unshare()
    settle(alice, bob)
    assert not [secret for secret in before if secret in bob.saved]
    assert bob.contact.polls(world.now) == []
    assert bob.connect() == bob.tick() == []
    assert bob.kept.name == "Alice"


def test_tombstone_tells_once_a_minute_for_thirty_days_and_then_goes(toy: World) -> None:
    alice, bob = apart(toy)
    bob.online = False
    alice.unshare()
    replies = []
    for number in range(7):
        text = signed_by(bob, "offer", seq=bob.kept.seq + 1 + number, sdpOffer=sdp("offer"))
        effects = alice.take(toy.seal(newest(alice).address, text))
        replies.append(count(Send, effects))
        assert count(Gather, effects) == 0
        toy.advance(20)
    assert replies == [1, 0, 0, 1, 0, 0, 1]
    toy.advance(30 * DAY_S - 7 * 20 - 1)
    assert alice.tick() == []
    toy.advance(1)
    assert alice.tick() == [Forget()]


def test_tombstone_survives_a_restart_and_ends_when_the_other_unshares(toy: World) -> None:
    alice, bob = apart(toy)
    alice.unshare()
    alice = alice.restarted()
    bob.unshare()
    assert alice.poll()[-1] == Forget()


@pytest.mark.parametrize("by", ["alice", "bob"])
@pytest.mark.parametrize("when", ["opened", "welcomed", "ready", "paired"])
def test_unshare_at_any_time_of_the_pairing_ends_both(toy: World, by: str, when: str) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for app in {"opened": [], "welcomed": [alice], "ready": [alice, bob], "paired": [alice, bob, alice]}[when]:
        app.poll()
    one, other = (alice, bob) if by == "alice" else (bob, alice)
    one.unshare()
    settle(alice, bob, rounds=100, gap_s=5)
    assert other.kept.state in ("ended", "unshared")
    assert other.kept.why in ("unshared", "used")
    assert one.kept.state in ("unshared", "ended")
    assert "connected" not in {alice.state, bob.state}


def test_invitation_expires_as_long_after_as_the_app_said(toy: World) -> None:
    begun = Contact.invite(toy.suite, toy.now, "Bob", [(RELAY, None)], lifetime_us=3 * connectoid.DAY_US)
    alice = App(toy, begun)
    toy.advance(3 * DAY_S - 1)
    assert alice.tick() == []
    toy.advance(1)
    alice.tick()
    assert (alice.told, alice.kept.state, alice.kept.why) == (["expired"], "ended", "expired")
    assert not secrets_of(alice.kept)


def test_opened_link_without_answer_expires(toy: World) -> None:
    bob = open_link(toy, link_of(invite(toy)))
    toy.advance(30 * DAY_S)
    bob.tick()
    assert (bob.told, bob.kept.why) == (["expired"], "expired")
    assert not secrets_of(bob.kept)


def test_paired_contact_never_expires(toy: World) -> None:
    alice, bob = apart(toy)
    toy.advance(1_000 * DAY_S)
    for app in (alice, bob):
        app.tick()
        app.connect()
    settle(alice, bob, rounds=30)
    assert (alice.state, bob.state) == ("connected", "connected")


# ---------------------------------------------------------------------------------------
# The rhythm of polling, and rules of connecting that the simulations do not show one by one.
# ---------------------------------------------------------------------------------------


def test_polls_are_fast_for_ninety_seconds_after_something_and_else_at_most_66_s_apart(toy: World) -> None:
    alice, bob = apart(toy)

    def gap(after_s: float) -> float:
        return alice.contact.poll_gap_s(Now(toy.wall_us, toy.monotonic_s + after_s))

    toy.advance(1_000)
    assert gap(0) == connectoid.POLL_SLOW_S <= 66
    alice.take("garbage")
    assert gap(0) == connectoid.POLL_SLOW_S
    alice.connect()
    assert (gap(0), gap(89.9), gap(90)) == (2.0, 2.0, connectoid.POLL_SLOW_S)
    toy.advance(1_000)
    alice.take(toy.seal(newest(alice).address, signed_by(bob, "ready", re="A" * 43)))
    assert (gap(0), gap(89.9), gap(90)) == (2.0, 2.0, connectoid.POLL_SLOW_S)


def test_check_is_from_zero_at_the_start_and_once_an_hour(toy: World) -> None:
    alice = invite(toy)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [0]
    alice.take("=", address=link_of(alice).address)
    cursor = toy.put_so_far
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [cursor]
    toy.advance(connectoid.ZERO_EVERY_S - 1)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [cursor]
    toy.advance(1)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [0]
    alice.poll()
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [cursor]
    assert [poll.at for poll in alice.restarted().contact.polls(toy.now)] == [0]


def test_cursor_never_goes_back_and_is_one_for_each_mailbox(toy: World) -> None:
    alice = invite(toy, (RELAY, None), (OTHER_RELAY, None))
    one, other = (poll.mailbox.pub for poll in alice.contact.polls(toy.now))
    alice.contact.polled(toy.now, {one: [(9, "="), (5, "=")], "unknown": [(99, "=")]})
    alice.contact.polled(toy.now, {one: [], other: [(3, "=")]})
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [9, 3]


def test_offer_found_after_a_gap_is_stale_and_gets_a_call(toy: World) -> None:
    for gap_s, expected in ((connectoid.FRESH_S, "answer"), (connectoid.FRESH_S + 1, "call")):
        alice, bob = apart(toy)
        alice.poll()
        toy.advance(gap_s)
        bob.connect()
        alice.poll()
        before = toy.put_so_far
        bob.poll()
        assert {message.type for message in read_by(bob)} >= {expected}
        assert bob.state == {"answer": "joining", "call": "waiting"}[expected]
        assert (toy.put_so_far > before) is (expected == "call")


def test_attempts_without_answer_are_told_and_then_seldom(toy: World) -> None:
    alice, bob = apart(toy)
    bob.online = False
    bob.connect()
    sent = [(toy.monotonic_s, count(Send, bob.done))]
    start_s = toy.monotonic_s
    for _ in range(1_300):
        toy.advance(5)
        if bob.contact.next_tick_s <= toy.monotonic_s:
            bob.tick()
        if count(Send, bob.done) != sent[-1][1]:
            sent.append((toy.monotonic_s, count(Send, bob.done)))
    times = [at_s - start_s for at_s, _ in sent]
    assert times[:3] == pytest.approx([0, 50, 100], abs=10)
    assert times[3] == pytest.approx(100 + 3_000, abs=60)
    assert bob.told.count("unanswered") == len([at_s for at_s in times if at_s > 100]) + 1 - (bob.state == "waiting")
    assert alice.kept.state == "paired"


def test_next_tick_is_never_in_the_past_after_a_tick(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for _ in range(200):
        toy.advance(7)
        for app in (alice, bob):
            app.poll()
            app.tick()
            assert app.contact.next_tick_s > toy.monotonic_s


def test_disconnect_and_lost_channel_are_not_tried_again_by_themselves(toy: World) -> None:
    alice, bob = paired(toy)
    assert alice.do(alice.contact.disconnect(toy.now)) == [Close(alice.contact.attempt.ask)]
    assert bob.do(bob.contact.channel_closed(toy.now, bob.contact.attempt.ask)) == [Tell("disconnected")]
    before = toy.put_so_far
    settle(alice, bob, rounds=100, gap_s=60)
    assert toy.put_so_far == before


def test_numbered_messages_at_the_invitation_are_refused_but_unshare(toy: World) -> None:
    alice, bob = apart(toy)
    address = link_of(alice).address
    alice.take(toy.seal(address, signed_by(bob, "offer", to=address, sdpOffer=sdp("offer"))), address=address)
    assert alice.contact.dropped == {"unexpected": 1}
    alice.take(toy.seal(address, signed_by(bob, "unshare", to=address)), address=address)
    assert alice.kept.why == "unshared"


def test_numbered_message_before_the_welcome_is_refused(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    toy.drop(newest(bob).address)
    for kind in ("call", "unshare", "answer"):
        bob.take(toy.seal(newest(bob).address, signed_by(alice, kind, re="A" * 43, sdpAnswer=sdp("answer"))))
    assert bob.contact.dropped == {"sender": 3}
    assert bob.kept.state == "opened"


def test_webrtc_gets_type_and_sdp_and_no_other_member(toy: World) -> None:
    alice, bob = apart(toy)
    offer = {**sdp("offer"), "__proto__": {}, "extra": 1}
    effects = alice.take(toy.seal(newest(alice).address, signed_by(bob, "offer", sdpOffer=offer)))
    assert [effect.offer for effect in effects if isinstance(effect, Gather)] == [sdp("offer")]


def test_hello_that_gives_the_invitation_as_its_own_address_makes_no_loop(toy: World) -> None:
    alice = invite(toy)
    link, mallory = link_of(alice), Attacker(toy)
    for number in (1, 2, 3):
        text = mallory.hello(link, connectoid=link.address)
        alice.take(toy.seal(link.address, text), address=link.address)
        before = len(alice.done)
        alice.poll()
        assert count(Send, alice.done[before:]) == 0
        assert alice.contact.dropped.total() == number
        toy.advance(MINUTE_S)


def test_sdp_that_fits_in_no_message_is_a_mistake_and_the_attempt_goes_on(toy: World) -> None:
    alice = invite(toy)
    begun = Contact.open(toy.suite, toy.now, "Alice", link_of(alice))
    bob = App(toy, (begun[0], []))
    before = bob.kept, bob.contact.attempt
    with pytest.raises(UsageError, match="shorter SDP"):
        bob.contact.gathered(toy.now, 1, {"type": "offer", "sdp": "a" * 20_000})
    assert (bob.kept, bob.contact.attempt) == before
    settle(alice, bob, rounds=60)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_calls_of_one_round_make_one_offer(toy: World) -> None:
    alice, bob = apart(toy)
    calls = [signed_by(alice, "call", seq=alice.kept.seq + number) for number in range(1, 50)]
    effects = bob.take(*(toy.seal(newest(bob).address, text) for text in calls))
    assert (count(Gather, effects), count(Send, effects)) == (1, 1)


def test_call_that_crossed_an_offer_makes_no_second_one_within_five_seconds(toy: World) -> None:
    for after_s, offers in ((connectoid.NEW_OFFER_S - 0.1, 0), (connectoid.NEW_OFFER_S, 1)):
        alice, bob = apart(toy)
        bob.connect()
        toy.advance(after_s)
        effects = bob.take(toy.seal(newest(bob).address, signed_by(alice, "call")))
        assert count(Gather, effects) == offers


# ---------------------------------------------------------------------------------------
# The tables.
# ---------------------------------------------------------------------------------------

TABLES = {"PAIRING": (PAIRING, {"invited", "opened"}, {"ended"}), "CONNECTING": (CONNECTING, {"apart"}, set[str]())}


@pytest.mark.parametrize("name", TABLES)
def test_every_rule_names_a_method_and_leads_to_states_of_the_table(name: str) -> None:
    table, _, final = TABLES[name]
    states = {rule.state for rule in table.values()} | final
    for (state, event), rule in table.items():
        assert (rule.state, rule.event) == (state, event)
        assert callable(getattr(Contact, f"_{rule.does}"))
        assert rule.then
        assert set(rule.then) <= states
        assert len(set(rule.then)) == len(rule.then)


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached_and_left_but_the_final_one(name: str) -> None:
    table, reached, final = TABLES[name]
    states = {rule.state for rule in table.values()} | final
    reached = set(reached)
    for _ in states:
        reached |= {state for rule in table.values() if rule.state in reached for state in rule.then}
    assert reached == states
    for state in states - final:
        assert any(set(rule.then) - {state} for rule in table.values() if rule.state == state)


def test_every_type_of_message_has_a_place_in_the_table() -> None:
    events = {event for _, event in PAIRING}
    numbered = {kind for kinds in connectoid.NUMBERED_FOR.values() for kind in kinds}
    assert numbered | set(connectoid.UNNUMBERED) == set(connectoid.MEMBERS)
    assert set(connectoid.UNNUMBERED) | {"unshare", "message"} <= events
    assert {"used", "unshared", "expired"} <= set(EVENTS)


def test_told_is_always_one_of_the_events(toy: World) -> None:
    alice, bob = paired(toy)
    mallory = open_link(toy, link_of(alice))
    settle(alice, mallory)
    alice.unshare()
    settle(alice, bob)
    assert {*alice.told, *bob.told, *mallory.told} <= set(EVENTS)
    assert set(alice.told[:2]) == {"paired", "connected"}
    assert bob.told[0] == "paired"


# ---------------------------------------------------------------------------------------
# What a contact can send to make a step fail, and what an app can ask for twice. What is


def test_address_too_long_to_answer_is_refused_and_never_stops_an_unshare(toy: World) -> None:
    mallory = invite(toy)
    bob = open_link(toy, link_of(mallory))
    settle(mallory, bob)
    boxes = [Mailbox(toy.suite.make_key()[1], RELAY, "\U0001f600" * 760) for _ in range(3)]
    text = "A" * connectoid.SIZES[-1]
    while len(text) > connectoid.SIZES[-1] - 4:  # the longest that fits with a short seq: no reply of the kind does
        boxes[2] = boxes[2]._replace(ext=str(boxes[2].ext)[:-1])
        text = signed_by(mallory, "call", seq=bob.kept.seen_seq + 1, connectoid=format_address(boxes))
    bob.take(toy.seal(newest(bob).address, text))
    assert bob.contact.dropped["address"] == 1
    assert count(Send, bob.unshare()) == 1


def test_opener_who_was_welcomed_and_expires_tells_the_inviter(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for app in (alice, bob, alice):
        app.poll()
    assert (alice.kept.state, bob.kept.state) == ("paired", "ready")
    toy.advance(31 * DAY_S)
    bob = bob.restarted()
    bob.tick()
    settle(alice, bob)
    assert (alice.kept.why, bob.told) == ("unshared", ["expired"])


@pytest.mark.parametrize("state", ["unshared", "ended"])
def test_unshare_of_what_is_ended_is_a_mistake_of_the_app_and_nothing_else(toy: World, state: str) -> None:
    alice, bob = paired(toy)
    alice.unshare()
    bob.poll()
    app = {"unshared": alice, "ended": bob}[state]
    with pytest.raises(UsageError):
        app.unshare()


def test_second_move_before_the_contact_wrote_to_the_first_still_listens_there(toy: World) -> None:
    alice, bob = apart(toy)
    alice.do(alice.contact.move(toy.now, [(OTHER_RELAY, None)]))
    bob.poll()  # he knows the first new address
    alice.do(alice.contact.move(toy.now, [(RELAY, None)]))
    polled = {poll.mailbox for poll in alice.contact.polls(toy.now)}
    assert set(parse_address(bob.kept.contact_address)) <= polled


def test_answer_is_given_only_to_a_peer_connection_that_is_open(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    bob.do(bob.contact.disconnect(toy.now))
    bob.connect()
    bob.poll()
    closed = [effect.ask for effect in bob.done if isinstance(effect, Close)]
    assert not [effect for effect in bob.done if isinstance(effect, Join) and effect.ask in closed]


def test_channel_being_proven_is_not_forgotten_when_the_attempt_is_late(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    bob_ready = [alice.poll(), bob.poll()]
    assert bob_ready
    toy.advance(connectoid.AGAIN_AFTER_OFFER_S - 0.1)
    [of_alice], [of_bob] = open_channel(alice), open_channel(bob)
    toy.advance(0.2)
    alice.tick()  # the challenges are on their way
    [reply] = writes(write(bob, of_alice))
    back = writes(write(alice, of_bob))
    assert len(back) == 1
    write(alice, reply)
    write(bob, back[0])
    assert (alice.state, bob.state) == ("connected", "connected")


def test_message_after_an_unshare_of_the_same_round_leaves_nothing_in_the_record(toy: World) -> None:
    alice, bob = apart(toy)
    seq = bob.kept.seq
    texts = [signed_by(bob, "unshare", seq=seq + 1), signed_by(bob, "offer", seq=seq + 2, sdpOffer=sdp("offer"))]
    alice.take(*(toy.seal(newest(alice).address, text) for text in texts))
    assert (alice.kept.state, alice.kept.contact_address) == ("ended", "")
    assert alice.kept.seen_seq == 0


def test_address_made_by_a_clock_that_was_ahead_is_still_replaced(toy: World) -> None:
    toy.wall_us += 10 * 365 * connectoid.DAY_US
    alice, _ = apart(toy)
    toy.wall_us = START_US
    address = newest(alice).address
    toy.advance(31 * DAY_S)
    alice.connect()
    assert newest(alice).address != address


def test_move_to_no_relay_is_a_mistake(toy: World) -> None:
    alice, _ = paired(toy)
    with pytest.raises(UsageError):
        alice.contact.move(toy.now, [])


@pytest.mark.parametrize("relay", [("https://relay.example.com/\ud800", None), (RELAY, "\ud800")])
def test_relay_that_is_no_text_is_a_mistake_of_the_app(toy: World, relay: tuple[str, str | None]) -> None:
    with pytest.raises(UsageError):
        invite(toy, relay)


def test_link_over_http_opened_without_leave_is_a_link_error(toy: World) -> None:
    link = read_link(f"{Mailbox(TEST_PUB, 'http://relay.example.com/')}..{'A' * 64}", allow_http=True)
    with pytest.raises(LinkError):
        open_link(toy, link)


@pytest.mark.parametrize("change", [
    {"state": "nonsense"}, {"state": 5}, {"role": "guest"}, {"seq": "5"}, {"seen_seq": None}, {"expires_us": "soon"},
    {"contact_address": None}, {"current": 0}, {"current": {}},
    {"current": {"address": "x", "keys": ["a"]}}, {"private_key": 1},
])
def test_record_with_a_member_of_the_wrong_type_is_told(toy: World, change: Mapping[str, Any]) -> None:
    members = json.loads(paired(toy)[0].saved)
    with pytest.raises(RecordError):
        Kept.from_json(json.dumps({**members, **change}))


def test_record_nested_without_end_is_told() -> None:
    with pytest.raises(RecordError):
        Kept.from_json("[" * 100_000)


def test_hour_that_ends_while_a_check_waits_does_not_skip_the_check_from_zero(toy: World) -> None:
    alice = invite(toy)
    alice.poll()
    toy.advance(connectoid.ZERO_EVERY_S - 1)
    [asked] = alice.contact.polls(toy.now)
    toy.advance(2)
    alice.do(alice.contact.polled(toy.now, {asked.mailbox.pub: []}))
    alice.take("=", address=link_of(alice).address)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [0]


def test_ten_thousand_hellos_in_a_round_warn_once(toy: World) -> None:
    alice, _ = paired(toy)
    link, mallory = link_of(alice), Attacker(toy)
    effects = alice.take(*(toy.seal(link.address, mallory.hello(link)) for _ in range(100)), address=link.address)
    assert count(Tell, effects) == 1


# ---------------------------------------------------------------------------------------
# Documents: what PROTOCOL.md and README.md repeat is what the code has.
# ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parent
PROTOCOL, README = ((ROOT / name).read_text("utf-8") for name in ("PROTOCOL.md", "README.md"))


def draw(table: Mapping[tuple[str, str], Rule]) -> str:
    """Return a table of states as the diagram in PROTOCOL.md."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for rule in table.values():
        for then in rule.then:
            arrows.setdefault((rule.state, then), []).append(rule.event)
    lines = [f"    {state} --> {then}: {', '.join(events)}" for (state, then), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def rows_after(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, without its two head lines."""
    lines = text.partition(f"\n{heading}\n")[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("table", [PAIRING, CONNECTING])
def test_states_in_the_protocol_are_those_of_the_code(table: Mapping[tuple[str, str], Rule]) -> None:
    assert draw(table) in PROTOCOL


def test_context_strings_in_the_protocol_are_those_of_the_code() -> None:
    rows = {use: info.strip("`| ").encode() for use, info in rows_after(PROTOCOL, "## Context strings")}
    assert rows == CONTEXTS


def test_types_and_their_members_in_the_protocol_are_those_of_the_code() -> None:
    text = PROTOCOL.partition("and, by its type, from one side only:\n")[2]
    rows = rows_after(f"\n# x\n{text}", "# x")
    assert {row[0].strip("` ") for row in rows} == MEMBERS.keys()
    for kind, _, _, members, counts in rows:
        named = set(re.findall(r"`(nonce|r|sdpOffer|sdpAnswer)`", members))
        assert named == MEMBERS[kind.strip("` ")].keys() - {"re"}, kind
        assert (counts.strip(" |") == "no") == (kind.strip("` ") in UNNUMBERED)


def test_reasons_in_the_protocol_are_those_of_the_code() -> None:
    text = PROTOCOL.partition("### Reading a message\n")[2].partition("### Pairing")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == REASONS.keys() - {"channel"}


def test_who_can_do_what_stands_in_readme_as_in_the_protocol() -> None:
    assert rows_after(README, "### What is left to whom") == rows_after(PROTOCOL, "### What is left to whom")
