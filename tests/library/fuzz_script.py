"""Scripts for a real runner: what hostile contacts, readers of a link and a lying relay do to it.

The octets of a script say who does what, so it can be run again, and made smaller, alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fake_sdp import make_sdp
from fake_wire import (
    DAY_S,
    ToySuite,
    World,
    invite,
    link_of,
    open_link,
    settle,
)
from fuzz_network import LIAR, OWN, Network, Place, PlayedPeers

from connectoid import (
    CONTEXTS,
    ConnectoidError,
    ContactRecord,
    Invitation,
    Mailbox,
    Privacy,
    Store,
    hash_jws,
    parse_address,
    prove,
    seal_message,
    sign_jws,
)
from connectoid.channel import AsyncChannel
from connectoid.contact.connecting import channel_info
from connectoid.contact.renewal import proven_octets
from connectoid.encoding import encode_base64url
from connectoid.limits import (
    CHALLENGE_BYTES,
    MAX_CHANNEL_BYTES,
    MAX_SEQ,
    MAX_SEQ_AHEAD_US,
)
from connectoid.messages import MEMBERS
from connectoid.runner import Runner

RELAY = OWN[0]

# ---------------------------------------------------------------------------------------
# The contacts of Alice's app, made once: a runner begins with these records each time.
# ---------------------------------------------------------------------------------------


class Cast(NamedTuple):
    """The records of Alice's app by name, those of the others, and the links that she has made."""

    alice: Mapping[str, ContactRecord]
    others: Mapping[str, ContactRecord]
    links: Mapping[str, Invitation]
    # Of the toy suite: keys that are made from now on are others.
    made: int


# Whoever is hostile says what its own keys sign. Lara and Oscar have made the links.
HOSTILE = ("Mallory", "Lara", "Carol", "Oscar")
# Bob calls, and Dave opens his link, after all that the others have done.
HONEST = ("Bob", "Dave")
# Anybody reads Eve's link.
LEAKED = "Eve"


def pair_at(world: World, url: str) -> tuple[ContactRecord, ContactRecord]:
    """Return the records of an inviter and an opener, paired and apart."""
    inviter = invite(world, (url, None))
    opener = open_link(world, link_of(inviter))
    settle(inviter, opener)
    assert {inviter.record.state, opener.record.state} == {"paired"}
    return inviter.record, opener.record


@functools.cache
def cast() -> Cast:
    """Return who is there."""
    suite = ToySuite()
    world = World(suite)
    bob, mallory, carol = (pair_at(world, url) for url in (RELAY, RELAY, LIAR))
    lara, alice_of_lara = pair_at(world, RELAY)
    oscar = invite(world)
    eve, dave = invite(world), invite(world)
    alice = {
        "Bob": bob[0], "Mallory": mallory[0], "Carol": carol[0], "Lara": alice_of_lara,
        "Oscar": open_link(world, link_of(oscar)).record, "Eve": eve.record, "Dave": dave.record,
    }
    return Cast(
        {name: replace(record, name=name) for name, record in alice.items()},
        {"Bob": bob[1], "Mallory": mallory[1], "Carol": carol[1], "Lara": lara,
         "Oscar": oscar.record},
        {"Eve": link_of(eve), "Dave": link_of(dave)},
        suite.made)


# ---------------------------------------------------------------------------------------
# Scripts.
# ---------------------------------------------------------------------------------------


class Tape:
    """Read choices from octets; behind the end all are 0."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._at = 0

    @property
    def is_over(self) -> bool:
        """Return whether there is no more."""
        return self._at >= len(self._octets)

    def number(self) -> int:
        """Return a number from 0 to 255."""
        self._at += 1
        return (self._octets + b"\0")[min(self._at - 1, len(self._octets))]

    def pick(self, choices: Sequence[Any]) -> Any:
        """Return one of some choices."""
        return choices[self.number() % len(choices)]

    def octets(self) -> bytes:
        """Return up to 255 octets."""
        start, size = self._at + 1, self.number()
        self._at += size
        return self._octets[start:start + size]


# Of a URL in an address; {} is replaced by whoever names it, and a number.
URLS = (
    RELAY, "https://{}.example/", "https://{}.example", "https://{}.example/a", "https://{}.org/",
    "https://{}.example:8443/a/b", "http://{}.example/",
    "https://[1]/", "https://[::1]/", "https://127.0.0.1:9/", "http://127.0.0.1:9/",
    "http://localhost/{}", "https://{}.example/?a", "https://u@{}.example/", "https://{}.example/..",
    "https://" + "a." * 120 + "{}.example/", "https://{}.example/" + "a" * 480, "ftp://{}.example/",
    "https://{}\0.example/", "https://{}.exämple/", LIAR,
)
EXTRA_LINES = (
    "m=video 9 UDP/TLS/RTP/SAVPF 96", "m=audio 9 UDP/TLS/RTP/SAVPF 111", "a=mid:1", "a=ice-lite",
    "a=candidate:1 1 udp 1 192.0.2.1 9 typ host", "a=candidate:1 1 udp 1 224.0.0.1 9 typ host",
    "a=candidate:1 1 udp 1 evil.example 9 typ host", "a=x:" + "y" * 600, "a=\x00", "a=\u2028", "",
    "a=candidate:1 1 udp 1 0.0.0.0 9 typ host", "a=fingerprint:sha-1 AB", "s=", "v=0", "k=clear:a",
)
VALUES: Sequence[Any] = (
    None, "", "A" * 43, "A" * 22, 0, 1, -1, 1.5, True, MAX_SEQ - 1, MAX_SEQ, 10**30, float("inf"),
    [], {}, [1], [1, 2, 999], [999], "\ud800", "x" * 5_000, {"type": "offer"}, ["hello"], "hello",
    {"type": "offer", "sdp": ""}, {"type": "answer", "sdp": "v=0\r\n"}, "app.example", "~", "..",
)
PAUSES_S = (0.0, 0.1, 2.0, 5.0, 21.0, 61.0, 61.0, 601.0, 3_700.0, DAY_S + 1)
BAD_REPLIES: Sequence[bytes | None] = (
    None, b"", b"{", b"null", b"1", b"[]", b"[[]]", b"[null]", b"{}", b'{"ok": true}',
    b'[{"ok": true, "found": true}]', b'{"ok": false, "error": "Busy", "retry": 900}',
    b'[{"ok": false, "error": "Too often", "retry": 1e308}]', b'{"ok": false, "retry": -1}',
    b'[{"ok": true, "found": true, "question": "QUJD"}]', b"[" * 5_000, b"\xff" * 300,
    b'{"ok": true, "messages": [{"at": 9007199254740991, "data": ""}]}',
    b'{"ok": true, "messages": [{"at": -5, "data": "QUJD"}, {"at": 1.5, "data": "QUJD"}]}',
    b'{"ok": true, "messages": [{"at": 0, "data": "%s"}]}' % (b"A" * 500_000),
    b'{"ok": true, "messages": {"at": 1}}', b'{"ok": false, "error": "\\u001b[2J", "detail": []}',
)
REPORTS = ("opened", "message", "closed", "gathered")
# Most messages are good, or none would come far.
ONE_DAMAGED_IN = 8
# A larger number is how often something is done, less than it is once.
BURST = 192
# Replies: a round of a mailbox reads 16.
ENDLESS = 40
# Of a reply to `receive`.
MADE_UP = 100


class Script:
    """Let all whom an input names do what it says, to one runner."""

    def __init__(self, tape: Tape, stage: Stage) -> None:
        self._tape = tape
        self._stage = stage
        self._suite = ToySuite()
        self._sent: list[tuple[str, str]] = []
        self._hashes = ["A" * 43]
        self._renewed: dict[str, str] = {}
        self._seqs = dict.fromkeys(HOSTILE, 0)
        self._names = 0

    async def run(self) -> None:
        """Do all that is on the tape."""
        while not self._tape.is_over:
            await self._tape.pick(ACTIONS)(self)

    # -- Messages -------------------------------------------------------------------------

    def say(self) -> None:
        """Send one or more messages that a hostile contact's own keys have signed."""
        name = self._tape.pick(HOSTILE)
        kind = self._tape.pick(tuple(MEMBERS))
        for _ in range(self._times()):
            self._say(name, kind)

    def _say(self, name: str, kind: str) -> None:
        record = cast().others[name]
        alice = self._stage.record_of(name)
        to = record.contact_address
        if name == "Oscar":
            # Nobody has told him yet.
            to = newest_of(alice) or to
        # A key of the toy suite is its public key.
        signer = self._tape.pick((record.signer, self._renewed.get(name, record.signer)))
        following = self._suite_key(100 + self._tape.number() % 100)
        payload = {
            "type": kind,
            "to": self._tape.pick((to, to, to, newest_of(alice))),
            "from": signer,
            "seq": self._draw_seq(name),
            "re": self._tape.pick((None, alice.hello_hash, *self._hashes[-3:])),
            "connectoid": self._draw_address(name),
            "r": record.r,
            "next": following,
            "nonce": encode_base64url(self._stage.place.suite.random(16)),
            "sdpOffer": self._draw_sdp("offer"),
            "sdpAnswer": self._draw_sdp("answer"),
        }
        octets = proven_octets(signer, following, alice.link_hash, payload["connectoid"])
        payload["proof"] = encode_base64url(self._suite.sign(following, octets))
        if kind == "renew":
            self._stage.renewals += 1
            self._renewed[name] = following
        self._post(payload, signer, to)

    def say_hello(self) -> None:
        """Send one or more hellos with the secret of the link that everybody reads."""
        link = cast().links[LEAKED]
        for _ in range(self._times()):
            key = self._suite_key(self._tape.number() % 20)
            payload = {
                "type": "hello", "to": link.address, "from": key, "seq": 1, "re": None,
                "connectoid": self._draw_address("Eve"),
                "nonce": encode_base64url(self._stage.place.suite.random(16)),
                "sdpOffer": self._draw_sdp("offer"),
            }
            self._post(payload, key, link.address, link.secret)

    def _post(self, payload: dict[str, Any], key: str, to: str, secret: bytes = b"") -> None:
        """Damage, sign, seal and send a payload; what fits in no message is not sent."""
        if self._tape.number() % ONE_DAMAGED_IN == ONE_DAMAGED_IN - 1:
            payload[self._tape.pick(tuple(payload))] = self._tape.pick(VALUES)
        with contextlib.suppress(ConnectoidError, UnicodeEncodeError):
            text = sign_jws(self._suite, key, payload)
            self._hashes.append(hash_jws(text))
            if secret:
                text = f"{text}.{prove(secret, text)}"
            for mailbox in parse_address(to):
                self._put(mailbox.pub, seal_message(self._suite, mailbox.pub, text))

    def say_again(self) -> None:
        """Repeat what was sent, to whomever."""
        if self._sent:
            pub, data = self._tape.pick(self._sent)
            self._put(self._tape.pick((pub, self._draw_box())), data)

    def bring_junk(self) -> None:
        """Fill a mailbox with what nobody has sealed."""
        pub = self._draw_box()
        octets = self._tape.octets()
        for number in range(self._times()):
            self._put(pub, encode_base64url(b"%d" % number + octets))
        self._put(pub, octets.decode("latin-1"))

    def _put(self, pub: str, data: str) -> None:
        self._sent.append((pub, data))
        self._stage.attacks += 1
        self._stage.place.put(pub, data)

    def _times(self) -> int:
        """Return how often something is done: mostly once."""
        return max(1, self._tape.number() - BURST)

    def _suite_key(self, number: int) -> str:
        return encode_base64url(b"\3" + bytes([number + 1]) * 48)

    def _draw_seq(self, name: str) -> Any:
        self._seqs[name] += 1
        now_us = self._stage.place.wall_us
        following = now_us + self._seqs[name]
        latest = now_us + MAX_SEQ_AHEAD_US
        return self._tape.pick(
            (following, following, following, following, 1, latest, latest + 1, MAX_SEQ - 1))

    def _draw_address(self, name: str) -> str:
        """Return an address: one's own, a new one that is good or not, or Alice's."""
        record = self._stage.record_of(name)
        if self._tape.pick((True, False)):
            if name == "Eve":
                return str(Mailbox(self._suite_key(99), RELAY))
            return newest_of(cast().others[name])
        if self._tape.pick((*[False] * 7, True)):
            return newest_of(record)
        mailboxes = [self._draw_mailbox(name) for _ in range(self._tape.pick((1, 1, 3, 4)))]
        return "~".join(mailboxes)

    def _draw_mailbox(self, name: str) -> str:
        self._names += 1
        url = self._tape.pick(URLS).format(f"{name.lower()}{self._names}")
        self._stage.named.add(url)
        ext = self._tape.pick((None, None, "", "key", "k" * 1_025))
        return str(Mailbox(self._suite_key(self._tape.number() % 250), url, ext))

    def _draw_sdp(self, kind: str) -> Any:
        sdp = make_sdp(kind)
        if self._tape.pick((True, True, True, False)):
            return sdp
        extra = f"{self._tape.pick(EXTRA_LINES)}\r\n" * self._tape.pick((1, 1, 32, 33, 200))
        return {**sdp, "sdp": self._tape.pick((sdp["sdp"] + extra, extra + sdp["sdp"]))}

    def _draw_box(self) -> str:
        """Return a mailbox of Alice's that a hostile contact knows."""
        boxes = [
            mailbox.pub for name in (*HOSTILE, LEAKED)
            for own in self._stage.record_of(name).addresses for mailbox in own.mailboxes]
        return str(self._tape.pick(boxes or [""]))

    # -- Everything else ------------------------------------------------------------------

    def lie(self) -> None:
        """Have a relay answer what it should not, a few times."""
        reply = self._tape.pick((*BAD_REPLIES, self._tape.octets()))
        self._stage.network.lies += [reply] * self._tape.pick((1, 1, 3, 20))
        self._stage.place.wake()

    def lie_without_end(self) -> None:
        """Have a relay make up more messages than may be read in one round."""
        self._stage.network.endless = ENDLESS
        self._stage.place.wake()

    def make_up(self) -> None:
        """Have a relay say that there are messages, and make up as many as it can."""
        boxes = [poll.pub for poll in self._stage.mailboxes_at(LIAR)]
        questions = [
            {"ok": True, "found": True, "question": encode_base64url(
                self._suite.seal(pub, CONTEXTS["question"], b"A" * 43))}
            for pub in boxes]
        self._stage.network.lies.append(json.dumps(questions).encode())
        for turn in range(self._tape.pick((1, 3, 17))):
            messages = [
                {"at": turn * MADE_UP + number + 1, "data": f"QUJD{turn:04}{number:04}"}
                for number in range(self._tape.pick((1, MADE_UP)))]
            self._stage.network.lies.append(
                json.dumps({"ok": True, "messages": messages}).encode())
        self._stage.place.wake()

    def change_strangers(self) -> None:
        """Have those whom others name answer in another way."""
        self._stage.network.strangers_reply = self._tape.pick((b'{"ok": true}', *BAD_REPLIES))

    async def wait(self) -> None:
        """Let time go by."""
        await asyncio.sleep(self._tape.pick(PAUSES_S))

    def report(self) -> None:
        """Have WebRTC report what the other side does."""
        peers = self._stage.peers
        if not peers.attempts:
            return
        number = self._tape.pick(tuple(peers.attempts))
        event = self._tape.pick(REPORTS)
        attempt_id = peers.attempts[number] + self._tape.pick((0, 0, 0, 0, 0, -1, 1))
        value = self._tape.pick((
            self._tape.octets(), b"", "", b"A" * 32, b"A" * (MAX_CHANNEL_BYTES + 1), None))
        if event == "gathered" and not isinstance(value, type(None)):
            # WebRTC is our own.
            value = make_sdp("offer")
        if event == "message" and value is None:
            value = b""
        for _ in range(self._times() * self._tape.pick((1, 1, 20))):
            peers.report(number, event, attempt_id, value)

    async def prove(self) -> None:
        """Have a hostile contact open a channel and prove its keys, as an honest one does."""
        peers = self._stage.peers
        name = self._tape.pick(HOSTILE)
        number = self._stage.numbers[name]
        contact = self._stage.runner._roster.contacts.get(number)
        if contact is None or number not in peers.attempts or not contact.record.addresses:
            return
        attempt_id = peers.attempts[number]
        info = channel_info(contact.machine)
        peers.report(number, "opened", attempt_id, None)
        pub = contact.record.addresses[0].mailboxes[0].pub
        sealed = self._suite.seal(pub, info, b"B" * CHALLENGE_BYTES)
        peers.report(number, "message", attempt_id, sealed)
        # It is written in a task.
        await asyncio.sleep(0)
        challenge, *_ = peers.written[number] or [b""]
        peers.report(number, "message", attempt_id, challenge[-CHALLENGE_BYTES:])

    def use(self) -> None:
        """Have the app do something with a hostile contact."""
        name = self._tape.pick(HOSTILE)
        runner = self._stage.runner
        self._stage.uses += 1
        with contextlib.suppress(ConnectoidError):
            self._tape.pick((
                lambda: self._stage.begin(runner.connect(name, 1.0)),
                lambda: self._stage.begin(runner.connect(name, 90.0)),
                lambda: runner.disconnect(name),
                lambda: runner.move(name),
                lambda: runner.verify(name),
                lambda: runner.unshare(name),
                lambda: self._renew(name),
                lambda: runner.set_privacy(Privacy(ask_first=True)),
                lambda: runner.set_privacy(Privacy()),
            ))()

    def _renew(self, name: str) -> None:
        self._stage.own_renewals += 1
        self._stage.runner.renew(name)

    def break_webrtc(self) -> None:
        """Have WebRTC find no network, or find one again."""
        self._stage.peers.gathers = not self._stage.peers.gathers


def newest_of(record: ContactRecord) -> str:
    """Return the address that somebody announces; nothing after the end."""
    own = record.pending or record.current or record.invited
    if own is None:
        return ""
    return own.address


def now_and_then(action: Callable[[Script], None]) -> Callable[[Script], Any]:
    """Return an action that lets the runner have a turn behind it."""
    async def act(script: Script) -> None:
        action(script)
        await asyncio.sleep(0)

    return act


ACTIONS: Sequence[Callable[[Script], Any]] = (
    Script.wait,
    Script.prove,
    *map(now_and_then, (
        Script.say, Script.say, Script.say, Script.say_hello, Script.say_again, Script.bring_junk,
        Script.lie, Script.make_up, Script.change_strangers, Script.report, Script.use,
        Script.break_webrtc, Script.lie_without_end)),
)


# ---------------------------------------------------------------------------------------
# The stage: one runner for one script.
# ---------------------------------------------------------------------------------------


class UnreadChannel(AsyncChannel):
    """A channel from which the app takes nothing."""

    taken = 0

    def take(self, message: bytes | str | None) -> None:
        """Count what waits for the app."""
        self.taken += message is not None
        super().take(message)


class Face:
    """The face of a runner: it counts what the user is told."""

    runner: Runner

    def __init__(self) -> None:
        self.told = 0
        self.channels: list[UnreadChannel] = []

    def make_channel(self, contact: int, attempt_id: int) -> UnreadChannel:
        """Return a channel that nobody reads."""
        self.channels.append(UnreadChannel(self.runner, contact, attempt_id))
        return self.channels[-1]

    def tell(self, name: str, event: str) -> None:
        """Count an event."""
        self.told += 1


class Stage:
    """Have a runner with the contacts of the cast."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.network = Network(place)
        self.peers = PlayedPeers()
        self.face = Face()
        self.store = Store(":memory:")
        self.numbers = {name: self.store.add(record) for name, record in cast().alice.items()}
        self.runner = Runner(
            self.store, [(RELAY, None)], self.peers, ice_servers=(), allow_http=False,
            suite=place.suite, now=lambda: place.now, ca_file=None, transport=self.network, app="")
        self.face.runner = self.runner
        self.began_s = place.monotonic_s
        self.began_bytes = self.store_bytes()
        # What the app has done, what others have put into mailboxes, and the URLs they have named.
        self.uses = 0
        # By others, and by the app.
        self.renewals = 0
        self.own_renewals = 0
        self.attacks = 0
        self.named: set[str] = set()
        self._begun: list[asyncio.Task[Any]] = []

    def record_of(self, name: str) -> ContactRecord:
        """Return the record of a contact; the first one if it is gone."""
        contact = self.runner._roster.contacts.get(self.numbers[name])
        if contact is None:
            return cast().alice[name]
        return contact.record

    def mailboxes_at(self, url: str) -> list[Mailbox]:
        """Return the mailboxes that are polled at a relay."""
        contacts = self.runner._roster.contacts.values()
        return [box for contact in contacts for box in contact.mailboxes if box.url == url]

    def store_bytes(self) -> int:
        """Return the size of the store."""
        fetch = self.store._fetch_number
        return fetch("PRAGMA page_count") * fetch("PRAGMA page_size")

    def begin(self, waiting: Any) -> None:
        """Let the app wait for a channel."""
        self._begun.append(asyncio.create_task(waiting))

    def count_tasks(self) -> int:
        """Return how many tasks the runner has."""
        begun = sum(not task.done() for task in self._begun)
        return len(asyncio.all_tasks()) - begun - 1

    async def end(self) -> None:
        """Close the runner; nothing of it may be left."""
        await self.runner.close()
        await asyncio.gather(*self._begun, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1, asyncio.all_tasks()
