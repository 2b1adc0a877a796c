"""Provide the fixtures of test_relay.py: keys, a clock to turn, servers in a thread and as a process."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from connectoid_relay import CONTEXTS, Clock, Relay, RelayServer, SqliteStore

ROOT = Path(__file__).parent
START_US = 1_800_000_000_000_000  # 2027-01-15, by the fake clock
SOURCE = "192.0.2.1"  # of requests where it does not matter
OK: dict[str, Any] = {"ok": True}
NOTHING: dict[str, Any] = {"ok": True, "found": False}
SUITE = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)


def decode(text: str) -> bytes:
    """Return what base64url without padding stands for."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Owner:
    """Hold a mailbox's private key, made from a number so that tests repeat."""

    def __init__(self, number: int) -> None:
        self.key = ec.derive_private_key(number, ec.SECP384R1())
        self.box = self.key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self.pub = base64.urlsafe_b64encode(self.box).rstrip(b"=").decode()

    def open(self, question: str) -> str:
        """Return the answer to a question."""
        return SUITE.decrypt(decode(question), self.key, info=CONTEXTS["question"]).decode("ascii")


class FakeClock:
    """Show the time that a test sets; `clock` is what the relay gets."""

    def __init__(self) -> None:
        self.wall_us = START_US
        self.monotonic_us = 7_000_000
        self.clock = Clock(lambda: self.wall_us, lambda: self.monotonic_us)

    def advance(self, seconds: float) -> None:
        """Let time go by."""
        self.wall_us += round(seconds * 1_000_000)
        self.monotonic_us += round(seconds * 1_000_000)


def send(owner: Owner, sealed: str = "QUJD", **members: Any) -> dict[str, Any]:
    """Return a send request."""
    return {"pub": owner.pub, "action": "send", "data": sealed, **members}


def check(owner: Owner, at: int = 0, **members: Any) -> dict[str, Any]:
    """Return a check request."""
    return {"pub": owner.pub, "action": "check", "at": at, **members}


def receive(owner: Owner, answer: str, **members: Any) -> dict[str, Any]:
    """Return a receive request."""
    return {"pub": owner.pub, "action": "receive", "answer": answer, **members}


def answer_of(relay: Relay, owner: Owner, source: str = SOURCE) -> str:
    """Check a box that has messages and return the answer to the question."""
    status, reply = relay.handle(check(owner), source)
    assert status == 200
    assert isinstance(reply, dict)
    return owner.open(reply["question"])


def http_request(body: bytes, *headers: str, method: str = "POST", path: str = "/") -> bytes:
    """Return a whole HTTP request, closing the connection after it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: relay", "Connection: close",
             f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def exchange(port: int, octets: bytes, piece: int | None = None, timeout_s: float = 10) -> bytes:
    """Send octets (in pieces of so many bytes) and return all that comes back until the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # the relay may have refused half-way
            for start in range(0, len(octets), piece or len(octets)):
                client.sendall(octets[start:start + (piece or len(octets))])
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


def parse_response(octets: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers (names in small letters) and body of one HTTP response."""
    head, _, body = octets.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


def post(port: int, request: object, piece: int | None = None) -> tuple[int, Any]:
    """Post a JSON request (or raw bytes) and return the status and the parsed reply."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    status, headers, reply = parse_response(exchange(port, http_request(body), piece))
    assert headers["access-control-allow-origin"] == "*"
    return status, json.loads(reply)


@contextlib.contextmanager
def running(server: RelayServer) -> Iterator[RelayServer]:
    """Run a server in a thread, and close it."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
            assert not thread.is_alive()


def serving(relay: Relay, **options: Any) -> contextlib.AbstractContextManager[RelayServer]:
    """Serve a relay on a free port of 127.0.0.1, from a thread."""
    return running(RelayServer(("127.0.0.1", 0), relay, **options))


class Process:
    """A relay started from the command line, ready to serve."""

    def __init__(self, *flags: str, cwd: Path, **options: Any) -> None:
        command = [sys.executable, str(ROOT / "connectoid_relay.py"), "--port", "0", *flags]
        self.popen = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True, **options)
        assert self.popen.stderr is not None
        self.first_line = self.popen.stderr.readline()
        ready = re.fullmatch(r"connectoid relay (\S+) listening on https?://\S+:(\d+)\n", self.first_line)
        self.port = int(ready[2]) if ready else 0

    def stop(self, number: int = 15) -> tuple[int, str]:
        """Send a signal and return the exit code and what stood in the log since."""
        if self.popen.poll() is None:
            os.kill(self.popen.pid, number)
        _, log = self.popen.communicate(timeout=10)
        return self.popen.returncode, log


@pytest.fixture
def alice() -> Owner:
    """Return the owner of a mailbox."""
    return Owner(1)


@pytest.fixture
def bob() -> Owner:
    """Return the owner of another."""
    return Owner(2)


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still until it is told."""
    return FakeClock()


@pytest.fixture
def relay(clock: FakeClock) -> Iterator[Relay]:
    """Return a relay in memory with the default limits."""
    relay = Relay(SqliteStore(":memory:"), clock=clock.clock)
    yield relay
    relay.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that starts a relay as a process, with flags; all end with the test."""
    started: list[Process] = []

    def start_process(*flags: str, **options: Any) -> Process:
        process = Process(*flags, cwd=tmp_path, **options)
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.stop(9)
