"""What a real runner is fuzzed in: a clock that jumps, a network in memory, WebRTC, counted work.

The runner, its lines, senders and timers run as they always do, on an event loop of asyncio. Only
the loop's clock is played: where it would wait, time goes on at once.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ipaddress
import json
import logging
import re
import selectors
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fake_sdp import make_sdp
from fake_wire import RELAY, ToySuite, World

from connectoid import CONTEXTS, Ice, Refused
from connectoid.encoding import encode_base64url
from connectoid.networks import is_private_host
from connectoid.relay_client import MAX_RECEIVES, TransportError
from connectoid.webrtc import Description, Report

# A relay that lies; a contact of Alice's has mailboxes there.
LIAR = "https://liar.example.net/"
OWN = (RELAY, LIAR)
ANSWER = "A" * 43
# What a relay returns at a time.
MAX_REPLY_CHARS = 512 * 1024
# Requests to one relay at one time: a round of a few mailboxes, each read to its bound, and what
# goes out for each contact.
MAX_AT_ONCE = 200
# Behind a context string there may be more.
ZERO = b"\0"
NOT_FOUND = {"ok": True, "found": False}
# What anybody may be sent whom this side has not named (GUARD-7).
SEND_MEMBERS = {"pub", "ext", "action", "data"}

# ---------------------------------------------------------------------------------------
# Time.
# ---------------------------------------------------------------------------------------


class Jumps(selectors.DefaultSelector):
    """Wait for nobody: let the time of a world go on instead."""

    def __init__(self, world: Place) -> None:
        super().__init__()
        self._world = world

    def select(self, timeout: float | None = None) -> Any:
        """Return what is ready now."""
        if timeout is None:
            raise AssertionError("everything waits for what will never come")
        if timeout > 0:
            self._world.advance(timeout)
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop with the clock of a world, which stands still while there is work."""

    def __init__(self, world: Place) -> None:
        self._world = world
        super().__init__(Jumps(world))

    def time(self) -> float:
        """Return the world's time."""
        return self._world.monotonic_s


class Place(World):
    """A world whose mailboxes wake those who wait for them."""

    def __init__(self, suite: CountedSuite) -> None:
        super().__init__(suite)
        self.counted = suite
        self.arrived = asyncio.Event()

    def put(self, pub: str, sealed: str) -> None:
        """Put something into a mailbox."""
        super().put(pub, sealed)
        self.wake()

    def wake(self) -> None:
        """Wake those who wait at a relay."""
        self.arrived.set()
        self.arrived = asyncio.Event()


# ---------------------------------------------------------------------------------------
# Cryptography, counted.
# ---------------------------------------------------------------------------------------


class CountedSuite(ToySuite):
    """Count the operations that would each cost about half a millisecond."""

    def __init__(self, made: int) -> None:
        super().__init__()
        # Keys that were made before are made by nobody else.
        self.made = made
        self.done: collections.Counter[str] = collections.Counter()

    def make_key(self) -> tuple[str, str]:
        """Make a key."""
        self.done["make_key"] += 1
        return super().make_key()

    def seal(self, pub: str, info: bytes, plaintext: bytes) -> bytes:
        """Seal."""
        self.done["seal"] += 1
        return super().seal(pub, info, plaintext)

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Open."""
        self.done[f"open {info.partition(ZERO)[0].decode()}"] += 1
        return super().open(key, info, sealed)

    def sign(self, key: str, octets: bytes) -> bytes:
        """Sign."""
        self.done["sign"] += 1
        return super().sign(key, octets)

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Verify."""
        self.done["verify"] += 1
        # Not `sign` of this class, which counts.
        if signature != ToySuite.sign(self, pub, octets):
            raise Refused("signature")


# ---------------------------------------------------------------------------------------
# The network: a relay, a relay that lies, and whomever others name.
# ---------------------------------------------------------------------------------------

Request: TypeAlias = Mapping[str, Any]


class Network:
    """Carry requests to relays in memory, and note what everybody is asked."""

    def __init__(self, place: Place) -> None:
        self._place = place
        # The replies that the liar gives first, as octets; None is none.
        self.lies: collections.deque[bytes | None] = collections.deque()
        # Replies with a hundred messages more that the liar still makes up for whoever asks.
        self.endless = 0
        # What those answer that others name: octets, or None for no answer.
        self.strangers_reply: bytes | None = b'{"ok": true}'
        # Items that relays have given out: each may cost one opening.
        self.given = 0
        self._asked: collections.Counter[tuple[str, float]] = collections.Counter()
        self.questions = 0
        # The distinct messages that others got, by URL.
        self.strangers: collections.defaultdict[str, set[str]] = collections.defaultdict(set)

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = 0,
    ) -> tuple[int, bytes]:
        """Return status and body of a reply; raise TransportError."""
        # Each relay has a turn of the loop, as on a real network.
        await asyncio.sleep(0)
        self._count(url, MAX_AT_ONCE)
        if url not in OWN:
            reply = self._ask_stranger(method, url, body)
        elif method == "GET":
            reply = b'{"ok": true}'
        else:
            reply = await self._ask_own(url == LIAR, json.loads(body), wait_s)
        if reply is None:
            await asyncio.sleep(timeout_s + wait_s)
            raise TransportError("timed out")
        return 200, reply

    async def renew(self) -> None:
        """Do nothing: there is nothing to close."""

    async def close(self) -> None:
        """Do nothing."""

    def _count(self, whom: str, most: int) -> None:
        """Fail for a relay or mailbox that is asked again and again while no time goes by."""
        key = (whom, self._place.monotonic_s)
        self._asked[key] += 1
        assert self._asked[key] <= most, f"{whom} is asked without a pause"

    def _ask_stranger(self, method: str, url: str, body: bytes) -> bytes | None:
        """Note what somebody gets; fail for anything but a message of the protocol."""
        assert method == "POST", f"{method} to a stranger"
        if is_private_host(judge_url(url)):
            # HttpTransport looks at each connection.
            raise TransportError("it is in a private network")
        request = json.loads(body)
        assert isinstance(request, dict), "a batch to a stranger"
        assert set(request) == SEND_MEMBERS, request
        assert request["action"] == "send", request
        self.strangers[url].add(request["data"])
        return self.strangers_reply

    async def _ask_own(self, is_liar: bool, request: Any, wait_s: float) -> bytes | None:
        """Return the reply of a relay where this side has mailboxes."""
        if isinstance(request, list):
            await self._wait(request, wait_s, is_liar)
        elif request["action"] == "receive":
            self._count(request["pub"], MAX_RECEIVES + 1)
        if is_liar and self.lies:
            return self._count_lie(self.lies.popleft())
        if isinstance(request, list):
            return json.dumps([self._check(check, is_liar) for check in request]).encode()
        if request["action"] == "send":
            self._place.put(request["pub"], request["data"])
            return b'{"ok": true}'
        return json.dumps(self._receive(request, is_liar)).encode()

    async def _wait(self, checks: Sequence[Request], wait_s: float, is_liar: bool) -> None:
        """Hold checks back until there is something to say."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not any(map(self._newer, checks)):
                    if is_liar and (self.lies or self.endless):
                        return
                    await self._place.arrived.wait()

    def _count_lie(self, reply: bytes | None) -> bytes | None:
        """Count what may be opened of a lie."""
        if reply is not None:
            self.given += reply.count(b'"data"')
            self.questions += reply.count(b'"found"')
        return reply

    def _newer(self, request: Request) -> list[tuple[int, str]]:
        box = self._place.boxes.get(request["pub"], [])
        return [message for message in box if message[0] > request["at"]]

    def _check(self, request: Request, is_liar: bool) -> Request:
        if not self._newer(request) and not (is_liar and self.endless):
            return NOT_FOUND
        self.questions += 1
        question = ToySuite.seal(
            self._place.counted, request["pub"], CONTEXTS["question"], ANSWER.encode())
        return {"ok": True, "found": True, "question": encode_base64url(question)}

    def _receive(self, request: Request, is_liar: bool) -> Request:
        if is_liar and self.endless:
            return self._make_up(request)
        assert request["answer"] == ANSWER, "a wrong answer"
        messages: list[Mapping[str, Any]] = []
        chars = 0
        for at, data in self._newer(request)[:request["limit"]]:
            chars += len(data)
            if messages and chars > MAX_REPLY_CHARS:
                break
            messages.append({"at": at, "data": data})
        self.given += len(messages)
        if not messages:
            return NOT_FOUND
        return {"ok": True, "messages": messages}

    def _make_up(self, request: Request) -> Request:
        """Return as many messages as may be, each of them new."""
        self.endless -= 1
        ats = range(request["at"] + 1, request["at"] + 1 + request["limit"])
        self.given += len(ats)
        return {"ok": True, "messages": [{"at": at, "data": f"QUJD{at:08}"} for at in ats]}


def judge_url(url: str) -> str:
    """Return the host in a URL; fail for one that no relay of others may have."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    odd = parts.username or parts.query or parts.fragment
    assert not odd, url
    if parts.netloc.startswith("["):
        ipaddress.IPv6Address(host)
    else:
        assert re.fullmatch(r"[a-z0-9.-]+", host), url
    assert parts.scheme == "https" or is_private_host(host), url
    assert url.isascii(), url
    return host


# ---------------------------------------------------------------------------------------
# WebRTC, and what is logged.
# ---------------------------------------------------------------------------------------


class PlayedPeers:
    """Be the WebRTC of a runner: it gathers at once, and reports what a script says."""

    def __init__(self) -> None:
        self.gathers = True
        self.gathered = 0
        # The newest attempt of each contact.
        self.attempts: dict[int, int] = {}
        # What was written to each contact on its newest channel.
        self.written: collections.defaultdict[int, list[bytes | str]] = (
            collections.defaultdict(list))

    def start(self, report: Report) -> None:
        """Begin: reports go there."""
        self.report = report

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Report an SDP soon; fail for an offer that WebRTC must not see."""
        assert not ice.servers, ice
        self.gathered += 1
        self.attempts[contact] = attempt_id
        self.written[contact].clear()
        kind = "offer"
        if offer is not None:
            kind = "answer"
            judge_description(offer, "offer")
        sdp = None
        if self.gathers:
            sdp = make_sdp(kind)
        loop = asyncio.get_running_loop()
        loop.call_soon(self.report, contact, "gathered", attempt_id, sdp)

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Fail for an answer that WebRTC must not see."""
        assert attempt_id == self.attempts[contact]
        judge_description(answer, "answer")

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Keep what is written."""
        self.written[contact].append(message)

    def close(self, contact: int, attempt_id: int) -> None:
        """Do nothing: a late report is ignored."""

    def doubt(self) -> None:
        """Do nothing: this network stays."""

    async def stop(self) -> None:
        """Do nothing."""


def judge_description(description: Description, kind: str) -> None:
    """Fail for an SDP that is not that of one data channel, or asks too much of WebRTC."""
    lines = description["sdp"].split("\r\n")
    sections = [line for line in lines if line.startswith("m=")]
    assert description["type"] == kind
    assert len(sections) == 1, sections
    assert sections[0].startswith("m=application "), sections
    assert sum(line.startswith("a=candidate:") for line in lines) <= 32
    assert len(lines) <= 129
    assert description["sdp"].isascii()


class Log(logging.Handler):
    """Keep what a runner complains of; a traceback is a fault of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints = 0
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.complaints += 1
        if record.exc_info or record.levelno >= logging.ERROR:
            self.faults.append(self.format(record))
