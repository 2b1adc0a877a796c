"""What the tests of the library share: fake relays, WebRTC in memory, apps on both."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_sdp import make_sdp
from harness import DEADLINE_S, serving

import connectoid
import connectoid.cli
from connectoid import (
    Connectoid,
    Contact,
    ContactRecord,
    Ice,
    Store,
    SystemSuite,
)
from connectoid.clock import system_now
from connectoid.webrtc import Description, Report
from connectoid_relay import Relay, SqliteStore

APP_URL = "https://app.example.com/"
# Nobody listens there.
NOWHERE = "http://127.0.0.1:9/"
SOON_S = DEADLINE_S
LOOK_EVERY_S = 0.01
SUITE = SystemSuite()


def until(holds: Callable[[], object], what: str, timeout_s: float = SOON_S) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < end_s, f"{what}: not within {timeout_s:.0f} s"
        pause.wait(LOOK_EVERY_S)


def make_record(name: str = "Bob", url: str = NOWHERE, app: str = "") -> ContactRecord:
    """Return the record of a new contact."""
    return Contact.invite(SUITE, system_now(), name, [(url, None)], app=app)[0].record


def secrets_of(record: ContactRecord) -> list[str]:
    """Return everything in a record that nobody else may see."""
    fourth = record.invitation.rpartition(".")[2]
    return [text for text in (record.r, fourth, *record.private_keys) if text]


# ---------------------------------------------------------------------------------------
# Fakes: relays that answer what a function says, and WebRTC in memory.
# ---------------------------------------------------------------------------------------


def http_reply(body: object, *headers: str, status: str = "200 OK") -> bytes:
    """Return an HTTP response with JSON (or raw bytes) in it."""
    octets = body
    if not isinstance(octets, bytes):
        octets = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(octets)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + octets


class Asked(NamedTuple):
    """A request that a fake relay got: when, and the JSON in it, None for a GET."""

    at_s: float
    request: Any


class FakeRelay:
    """Answer each request with the octets that a function makes of it.

    After None the client gets no answer.
    """

    def __init__(self, reply: Callable[[Any], bytes | None]) -> None:
        self._reply = reply
        self.asked: list[Asked] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/"
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> FakeRelay:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(SOON_S)

    @property
    def posts(self) -> list[Asked]:
        """Return what was asked but for the relay's document."""
        return [asked for asked in self.asked if asked.request is not None]

    @property
    def checks(self) -> list[Asked]:
        """Return the batches of checks."""
        return [asked for asked in self.posts if isinstance(asked.request, list)]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                thread = threading.Thread(target=self._answer, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _answer(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            stream = client.makefile("rb")
            stream.readline()
            length = int(http.client.parse_headers(stream).get("Content-Length", "0"))
            request = None
            if length:
                request = json.loads(stream.read(length))
            self.asked.append(Asked(time.monotonic(), request))
            octets = self._reply(request)
            if octets is None:
                self._ended.wait()
            else:
                client.sendall(octets)


def honest(relay: Relay) -> Callable[[Any], bytes]:
    """Return the replies of a real relay; a check that would wait is answered at once."""

    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({"ok": True})
        return http_reply(relay.handle(request, "192.0.2.1")[1])

    return reply


def nothing_new(request: Any) -> bytes:
    """Return what a relay says that has no messages."""
    found: dict[str, Any] = {"ok": True, "found": False}
    if isinstance(request, list):
        return http_reply([found] * len(request))
    return http_reply(found)


class End:
    """One end of a connection in memory."""

    def __init__(self, wire: Wire, contact: int, attempt_id: int) -> None:
        self.wire = wire
        self.contact = contact
        self.attempt_id = attempt_id
        self.other: End | None = None

    def report(self, event: str, value: Any = None) -> None:
        """Report to the app whose end it is, on its loop."""
        self.wire.report_soon(self.contact, event, self.attempt_id, value)


class Wires:
    """Be a network in memory: it makes an adapter for each app, on loops of their own."""

    def __init__(self) -> None:
        self.ends: dict[str, End] = {}
        self.gathered = 0
        # Two apps have two threads.
        self.lock = threading.RLock()

    def adapter(self) -> Wire:
        """Return an adapter for one app."""
        return Wire(self)


class Wire:
    """Connect in memory; an SDP has a name in the network's book."""

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._ends: dict[int, End] = {}

    def start(self, report: Report) -> None:
        """Begin: reports go there."""
        self._loop = asyncio.get_running_loop()
        self._report = report

    def report_soon(self, *report: Any) -> None:
        """Report on the app's loop, unless it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._report, *report)

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Note an end under a new name."""
        with self._wires.lock:
            if contact in self._ends:
                self.close(contact, self._ends[contact].attempt_id)
            self._wires.gathered += 1
            kind = "offer"
            if offer:
                kind = "answer"
            sdp = make_sdp(kind, f"end {self._wires.gathered}")
            end = End(self, contact, attempt_id)
            self._wires.ends[sdp["sdp"]] = end
            self._ends[contact] = end
            if offer:
                end.other = self._wires.ends[offer["sdp"]]
        end.report("gathered", sdp)

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Connect both ends."""
        with self._wires.lock:
            mine = self._ends[contact]
            theirs = self._wires.ends[answer["sdp"]]
            if theirs.other is mine:
                mine.other = theirs
                mine.report("opened")
                theirs.report("opened")

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Bring a message to the other end."""
        with self._wires.lock:
            end = self._ends.get(contact)
            if end is None or end.attempt_id != attempt_id or end.other is None:
                raise ConnectionError("closed")
            end.other.report("message", message)

    def close(self, contact: int, attempt_id: int) -> None:
        """Close both ends."""
        with self._wires.lock:
            end = self._ends.get(contact)
            if end is None or end.attempt_id != attempt_id:
                return
            del self._ends[contact]
            if end.other is not None and end.other.other is end:
                end.other.other = None
                end.other.report("closed")

    def doubt(self) -> None:
        """Do nothing: this network stays."""

    async def stop(self) -> None:
        """Close all."""
        for contact, end in list(self._ends.items()):
            self.close(contact, end.attempt_id)


class Apps:
    """Make apps on one network in memory, and close them with the test."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self.wires = Wires()
        # Whose app, about whom, what.
        self.told: list[tuple[str, str, str]] = []

    def begin(
        self,
        who: str,
        *urls: str,
        store: Store | None = None,
        webrtc: connectoid.WebRTC | None = None,
        **options: Any,
    ) -> Connectoid:
        """Return a running app; its store is named after its owner."""
        app = Connectoid(
            store or Store(self.folder / f"{who}.db"),
            options.pop("relays", [(url, None) for url in urls]),
            webrtc or self.wires.adapter(),
            on_event=lambda name, event: self.told.append((who, name, event)),
            **options,
        )
        return self._stack.enter_context(app)

    def pair(self, url: str, **options: Any) -> tuple[Connectoid, Connectoid]:
        """Return Alice's app and Bob's, connected once and disconnected again."""
        alice = self.begin("Alice", url, **options)
        bob = self.begin("Bob", url, **options)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        channel = alice.connect("Bob", SOON_S)
        until(lambda: {alice.contacts()[0].state, bob.contacts()[0].state} == {"paired"}, "paired")
        channel.close()
        until(lambda: ("Bob", "Alice", "disconnected") in self.told, "disconnected")
        return alice, bob


def store_of(path: Path, *records: ContactRecord) -> Store:
    """Return a store with records in it."""
    store = Store(path)
    for record in records:
        store.add(record)
    return store


FOUND = {"ok": True, "found": True}
# A byte over 1 MiB.
BIG = b'{"ok": true, "data": "' + b"A" * (1024 * 1024 - 23) + b'"}'
RUBBISH: dict[str, bytes] = {
    "HTML": http_reply(b"<html>Welcome to the hotel</html>"),
    "no JSON": http_reply(b"{"),
    "no UTF-8": http_reply(b'{"ok": true, "x": "\xff"}'),
    "NaN": http_reply(b'{"ok": true, "at": NaN}'),
    "deep": http_reply(b"[" * 100_000),
    "a string": http_reply("ok"),
    "null": http_reply(None),
    "empty": http_reply(b""),
    "over 1 MiB": http_reply(BIG),
    "closes at once": b"",
    "closes in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "closes in the body": http_reply({"ok": True})[:-3],
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500,
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    "wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
    "redirect": http_reply({"ok": True}, "Location: http://127.0.0.1:9/", status="302 Found"),
    "permanent redirect": http_reply(
        {"ok": True}, "Location: http://127.0.0.1:9/", status="308 Permanent Redirect"
    ),
    "error": http_reply({"ok": False, "error": "Forbidden"}, status="403 Forbidden"),
    "error without text": http_reply({"ok": False}, status="500 Oops"),
    "no ok": http_reply({"found": False}),
    "ok is 1": http_reply({"ok": 1}),
    "bad gateway": http_reply(b"<h1>502</h1>", status="502 Bad Gateway"),
    "retry without end": http_reply(
        b'{"ok": false, "error": "Busy", "retry": 1' + b"0" * 400 + b"}"
    ),
    "retry is no number": http_reply({"ok": False, "error": "Busy", "retry": "soon"}),
    "control characters": http_reply({"ok": False, "error": "\x1b[2J\r\n"}),
}
BAD_BATCHES: dict[str, bytes] = {
    "an object": http_reply({"ok": True}),
    "too few": http_reply([]),
    "too many": http_reply([FOUND, FOUND]),
    "no objects": http_reply([1]),
    "nulls": http_reply([None]),
    "an error": http_reply([{"ok": False, "error": "Bad request"}]),
    "no question": http_reply([FOUND]),
    "a question that is no text": http_reply([{**FOUND, "question": {"a": 1}}]),
    "a question for nobody": http_reply([{**FOUND, "question": "QUJD"}]),
    "a question in another alphabet": http_reply([{**FOUND, "question": "a+b="}]),
}


@pytest.fixture
def apps(tmp_path: Path) -> Iterator[Apps]:
    """Return what makes apps."""
    with contextlib.ExitStack() as stack:
        yield Apps(tmp_path, stack)


@pytest.fixture
def relay_url() -> Iterator[str]:
    """Return the URL of a real relay in a thread."""
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    relay.close()
