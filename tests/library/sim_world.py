"""The world of a run: time, the log, relays, and the adversary on the wire."""

from __future__ import annotations

import collections
import functools
import heapq
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fake_sdp import make_sdp
from harness import START_US
from sim_plan import FAIR, LATE_S, Plan
from sim_relay import NO_LIMITS, MemoryStore, ReadySqliteStore
from sim_suite import CheapSuite, Ring, WatchedSuite, unseal

import connectoid_relay
from connectoid import (
    CONTEXTS,
    Poll,
    Refused,
    Send,
    Suite,
    hash_jws,
    prove,
    read_jws,
    seal_message,
    sign_jws,
)
from connectoid.encoding import decode_base64url, encode_base64url

if TYPE_CHECKING:
    from sim_app import App
    from sim_webrtc import Pc


# The most events of a run. More would be an endless loop.
MAX_EVENTS = 60_000


class Broken(AssertionError):
    """A promise was broken."""


def url_of(relay: int) -> str:
    """Return the URL of a relay."""
    return f"https://{relay}.example/"


class World:
    """Run events in the order of their time; know everything."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.draw = random.Random(plan.seed + 1)
        self.now_s = 0.0
        self.chaos = plan.chaos
        self.fair_since_s = 0.0
        self.log: list[tuple[float, str, str, Any]] = []
        self.ring = Ring()
        self.told: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        # Somebody was told something: look whether it is over.
        self.news = False
        self.relays = {url_of(number): self._make_relay() for number in range(plan.relays)}
        self.dead = url_of(plan.dead)
        self.wire = Wire(self)
        self.apps: dict[str, App] = {}
        self.pcs: dict[str, Pc] = {}
        self.events = 0
        # Nobody starts a program.
        self.asleep = False
        self._queue: list[tuple[float, int, Callable[[], None]]] = []

    def _make_relay(self) -> connectoid_relay.Relay:
        clock = connectoid_relay.Clock(
            lambda: START_US + int(self.now_s * 1e6), lambda: int(self.now_s * 1e6)
        )
        return connectoid_relay.Relay(self._make_store(), NO_LIMITS, clock=clock)

    def _make_store(self) -> connectoid_relay.Store:
        if self.plan.real:
            return connectoid_relay.SqliteStore(":memory:")
        suite = self.make_suite("relay")
        if self.plan.sqlite:
            return ReadySqliteStore(suite)
        return MemoryStore(suite)

    def make_suite(self, owner: str) -> Suite:
        """Return a suite whose keys are noted as the owner's."""
        if self.plan.real:
            return WatchedSuite(self.ring, owner)
        return CheapSuite(self.ring, owner, self.draw)

    def note(self, who: str, what: str, about: Any = "") -> None:
        """Add a line to the log."""
        self.log.append((self.now_s, who, what, about))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call something later."""
        self.events += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self.events, call))

    def run(self, until_s: float, over: Callable[[], bool] = lambda: False) -> bool:
        """Let time go by until something is over; return whether it is."""
        self.news = True
        while True:
            if self.news and over():
                return True
            self.news = False
            if not self._queue or self._queue[0][0] > until_s:
                self.now_s = until_s
                return over()
            self.now_s, _, call = heapq.heappop(self._queue)
            call()
            if self.events > MAX_EVENTS:
                raise Broken("a loop without end")

    def close(self) -> None:
        """Close the relays."""
        for relay in self.relays.values():
            relay.close()

    def story(self) -> str:
        """Return the log for people."""
        return "\n".join(
            f"{at:10.2f} {who:7} {what:10} {self._show(about)}" for at, who, what, about in self.log
        )

    def _show(self, about: Any) -> str:
        if not isinstance(about, Send):
            return str(about)[:90]
        owner = self.ring.owners[about.mailbox.pub]
        try:
            message = read_jws(unseal(self.ring, self.make_suite(owner), about))
        except Refused as refused:
            return f"to {owner} at {about.mailbox.url}: unreadable ({refused.reason})"
        payload = message.payload
        return (
            f"{message.type} to {owner} at {about.mailbox.url} "
            f"hash {message.hash[:6]} re {str(payload['re'])[:6]}"
            f" seq ..{payload['seq'] % 10**9} {'sdp' if message.sdp else ''}"
        )


FORGED_TYPES = (
    *("hello", "welcome", "used", "ready", "offer"),
    *("answer", "call", "moved", "unshare"),
)

# Messages of a run. A box that is full is another matter.
MAX_HARASSED = 60

ADVERSARY = "203.0.113.9"


class Wire:
    """Carry requests to relays, fairly or not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._draw = random.Random(world.plan.seed + 2)
        self._seen: list[Send] = []
        self._harassed = 0
        self._suite = world.make_suite("mallory")
        self._key, self._signer = self._suite.make_key()

    def send(self, app: App, sent: Send) -> None:
        """Carry a message of an app, as far as chaos allows."""
        chaos = self._world.chaos
        draw = self._draw
        self._world.note(app.name, "sends", sent)
        delay_s = app.queue_s(draw.uniform(0.02, 0.5))
        if chaos is FAIR:
            self._world.after(delay_s, functools.partial(self._arrive, sent, app.source))
            return
        self._seen.append(sent)
        copies = 1
        if draw.random() < chaos.double:
            copies = 2
        for copy in range(copies):
            if draw.random() < chaos.drop:
                self._world.note("mallory", "drops")
                continue
            late_s = 0.1 * copy
            if draw.random() < chaos.delay:
                late_s = draw.random() * draw.choice(LATE_S)
            mailbox = sent.mailbox
            if draw.random() < chaos.swap:
                mailbox = draw.choice(self._seen).mailbox
            source = app.source
            if copy:
                source = ADVERSARY
            arrive = functools.partial(self._arrive, Send(mailbox, sent.data), source)
            self._world.after(delay_s + late_s, arrive)
        self._harass()

    def _harass(self) -> None:
        """Replay something old, or forge something new."""
        chaos = self._world.chaos
        draw = self._draw
        self._harassed += 1
        if self._harassed > MAX_HARASSED:
            return
        if draw.random() < chaos.replay:
            again = draw.choice(self._seen)
            self._world.after(
                draw.random() * draw.choice(LATE_S),
                functools.partial(self._arrive, again, ADVERSARY),
            )
        if draw.random() < chaos.forge:
            victim = draw.choice(list(self._world.apps.values()))
            for forged in self._forge(victim):
                self._world.note("mallory", "forges", forged)
                self._world.after(draw.random(), functools.partial(self._arrive, forged, ADVERSARY))

    def _forge(self, victim: App) -> Iterator[Send]:
        """Forge a message without the private keys and the link."""
        draw = self._draw
        if victim.contact is None:
            return
        record = victim.contact.record
        own = draw.choice([record.invited, record.current, record.pending])
        if own is None:
            return
        kind = draw.choice(FORGED_TYPES)
        sdp_name = "sdpOffer"
        sdp = make_sdp("offer", "mallory")
        if kind in ("welcome", "answer"):
            sdp_name = "sdpAnswer"
            sdp = make_sdp("answer", "mallory")
        re = None
        if kind != "hello":
            offer = victim.contact.attempt.offer
            hashes = (record.hello_hash, record.welcome_hash, offer, hash_jws("x.y.z"))
            re = draw.choice([known for known in hashes if known])
        payload = {
            "type": kind,
            "to": own.address,
            "from": draw.choice([record.contact or self._signer, self._signer]),
            "seq": draw.choice((1, record.seen_seq + 1, 2**53 - 1)),
            "re": re,
            "connectoid": draw.choice([record.contact_address or own.address, own.address]),
            "nonce": encode_base64url(bytes(16)),
            "r": encode_base64url(draw.randbytes(16)),
            sdp_name: sdp,
        }
        text = sign_jws(self._suite, self._key, payload)
        if kind == "hello":
            text = f"{text}.{prove(draw.randbytes(16), text)}"
        for mailbox in own.mailboxes:
            yield Send(mailbox, seal_message(self._suite, mailbox.pub, text))

    def _arrive(self, sent: Send, source: str) -> None:
        mailbox, sealed = sent.mailbox, sent.data
        if mailbox.url == self._world.dead:
            return
        request = {"action": "send", "pub": mailbox.pub, "data": sealed}
        status, reply = self._world.relays[mailbox.url].handle(request, source)
        if status != 200:
            self._world.note("relay", "refuses", reply)
        owner = self._world.apps.get(self._world.ring.owners[mailbox.pub])
        if owner is not None:
            owner.wake()

    def read(self, app: App, poll: Poll) -> list[tuple[int, str]] | None:
        """Return the messages in a mailbox, read to its end; None if that failed."""
        url = poll.mailbox.url
        now_s = self._world.now_s
        if url == self._world.dead or self._draw.random() < self._world.chaos.blind:
            return None
        if any(
            start_s <= now_s < end_s and url == url_of(relay)
            for start_s, end_s, relay in self._world.plan.held
        ):
            return None
        relay = self._world.relays[poll.mailbox.url]
        pub = poll.mailbox.pub
        at = poll.at
        _, reply = relay.handle({"action": "check", "pub": pub, "at": at}, app.source)
        assert isinstance(reply, dict)
        found: list[tuple[int, str]] = []
        if not reply["found"]:
            return found
        question = app.suite.open(
            poll.key, CONTEXTS["question"], decode_base64url(reply["question"])
        )
        request = {
            "action": "receive",
            "pub": pub,
            "answer": question.decode("ascii"),
            "limit": 100,
        }
        while True:
            _, reply = relay.handle({**request, "at": at}, app.source)
            assert isinstance(reply, dict)
            if "messages" not in reply:
                return found
            found += [(message["at"], message["data"]) for message in reply["messages"]]
            at = found[-1][0]
