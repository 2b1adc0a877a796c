"""Share what the benchmarks need: a relay as a process, what it uses, requests, a crowd of clients, rows of a table.

CONNECTOID_RELAY names another relay file than the one of this checkout.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

RELAY = Path(os.environ.get("CONNECTOID_RELAY") or Path(__file__).parent.parent / "connectoid_relay.py")
HOST = "127.0.0.1"
DATA = "QUJD" * 625  # 2,500 characters: a sealed message of the usual size
LATER_AT = 2**53  # `at` of a check that finds nothing, whatever comes
READY_S = 20.0  # in which a relay must have started, however busy the machine is
ASK_TIMEOUT_S = 10.0
SPARE_FILES = 400  # of a process beside its connections
SUITE = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)
QUESTION_INFO = b"connectoid/1 question"

# ---------------------------------------------------------------------------------------
# The machine: cores, and what a process uses, as the operating system has it.
# ---------------------------------------------------------------------------------------

_CORES = sorted(os.sched_getaffinity(0))
LOAD_CORE, SERVER_CORE = _CORES[0], _CORES[-1]  # the same where there is only one


def pin(core: int, pid: int = 0) -> None:
    """Let a process (0: this one) run on one core alone."""
    os.sched_setaffinity(pid, {core})


def machine() -> str:
    """Return one line on where the figures come from."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    use = "one for the server, one for the load" if len(_CORES) > 1 else "for server and load"
    return (f"{cpu[1] if cpu else platform.machine()}, {len(_CORES)} cores ({use}), Linux"
            f" {platform.release().partition('-')[0]}, Python {platform.python_version()},"
            f" {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")


def family(pid: int) -> list[int]:
    """Return a process and all that came of it."""
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # of a thread that has just ended
            for child in children.read_text("ascii").split():
                pids += family(int(child))
    return pids


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a process and its children have used; clock_getcpuclockid(3) has the number."""
    return sum(time.clock_gettime((~member << 3) | 2) for member in family(pid))


def memory_kib(pid: int) -> int:
    """Return the resident memory of a process and its children, without what the kernel holds for sockets."""
    texts = (Path(f"/proc/{member}/smaps_rollup").read_text("ascii") for member in family(pid))
    return sum(int(text.partition("Rss:")[2].split()[0]) for text in texts)


def threads(pid: int) -> int:
    """Return how many threads a process and its children have."""
    return sum(len(os.listdir(f"/proc/{member}/task")) for member in family(pid))


def descriptors(pid: int) -> int:
    """Return how many files a process and its children have open."""
    return sum(len(os.listdir(f"/proc/{member}/fd")) for member in family(pid))


def raise_file_limit(wanted: int) -> int:
    """Let this process and those it starts open so many files, if that may be; return how many they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted:  # only root may, and not everywhere
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(wanted, soft), hard), hard))
    return hard


# ---------------------------------------------------------------------------------------
# A relay as a process of its own.
# ---------------------------------------------------------------------------------------

NO_RATES = ("--rate", "0", "--max-connections-per-source", "0")


class RelayProcess:
    """A relay from the command line, pinned to its core and ready to serve; `with` stops it."""

    def __init__(self, directory: Path, *flags: str, port: int = 0, db: str = "connectoid.db") -> None:
        self.db, self._log = directory / db, directory / "relay.log"
        command = [sys.executable, str(RELAY), "--port", str(port), "--db", str(self.db), *flags]
        with self._log.open("ab") as log:
            self._told = log.tell()
            self.started_s = time.perf_counter()
            self.popen = subprocess.Popen(command, cwd=directory, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = self.popen.pid
        pin(SERVER_CORE, self.pid)
        try:
            self.port = self._wait_until_ready()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        self.ready_s = time.perf_counter() - self.started_s

    def log(self) -> str:
        """Return what this process has said so far."""
        return self._log.read_bytes()[self._told:].decode("utf-8", "replace")

    def _wait_until_ready(self) -> int:
        while time.perf_counter() < self.started_s + READY_S and self.popen.poll() is None:
            if ready := re.search(r"listening on https?://\S+:(\d+)\n", self.log()):
                return int(ready[1])
            time.sleep(0.002)
        raise RuntimeError(f"the relay did not start: {self.log()}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal and wait for the end."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(15)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(15)
            raise RuntimeError(f"the relay did not stop: {self.log()}") from None

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGTERM)


def relay_module() -> Any:
    """Return the relay's file as a module, for its schema and its store."""
    spec = importlib.util.spec_from_file_location("connectoid_relay", RELAY)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # type hints are looked up there
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------
# Requests, and one client that waits for its reply.
# ---------------------------------------------------------------------------------------


class Owner:
    """Hold a mailbox's private key, made from a number so that runs repeat."""

    def __init__(self, number: int) -> None:
        self.key = ec.derive_private_key(number, ec.SECP384R1())
        self.box = self.key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self.pub = encode(self.box)

    def open(self, question: str) -> str:
        """Return the answer to a question."""
        sealed = base64.urlsafe_b64decode(question + "=" * (-len(question) % 4))
        return SUITE.decrypt(sealed, self.key, info=QUESTION_INFO).decode("ascii")


def encode(octets: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


def http_request(request: object, *, close: bool = False) -> bytes:
    """Return the bytes of a POST with a JSON request."""
    body = json.dumps(request).encode("ascii")
    last = b"Connection: close\r\n" if close else b""
    return b"POST / HTTP/1.1\r\nHost: relay\r\n%sContent-Length: %d\r\n\r\n%s" % (last, len(body), body)


def check(pub: str, at: int = 0, wait: int = 0) -> dict[str, Any]:
    """Return a check request."""
    return {"pub": pub, "action": "check", "at": at, **({"wait": wait} if wait else {})}


def send(pub: str, sealed: str = DATA) -> dict[str, Any]:
    """Return a send request."""
    return {"pub": pub, "action": "send", "data": sealed}


def connect(port: int, source: str = "127.0.0.1", timeout_s: float = ASK_TIMEOUT_S) -> socket.socket:
    """Return a connection to the relay from an address of this host; 127.0.0.0/8 has many."""
    client = socket.socket()
    try:
        client.settimeout(timeout_s)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The port is chosen with the peer known: each source has as many as there are, IP_BIND_ADDRESS_NO_PORT.
        client.setsockopt(socket.IPPROTO_IP, 24, 1)
        client.bind((source, 0))
        client.connect(("127.0.0.1", port))
    except BaseException:
        client.close()
        raise
    return client


def read_reply(client: socket.socket) -> tuple[int, bytes]:
    """Return status and body of the next reply; raise ConnectionError if there is none."""
    received = bytearray()
    while not (reply := take_reply(received)):
        if not (chunk := client.recv(65536)):
            raise ConnectionAbortedError
        received += chunk
    return reply


def take_reply(received: bytearray) -> tuple[int, bytes] | None:
    """Remove the first whole reply from what was received, and return its status and body."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    _, found, rest = head.partition(b"\r\ncontent-length:")
    whole = end + 4 + (int(rest.partition(b"\r\n")[0]) if found else 0)
    if len(received) < whole:
        return None
    body = bytes(received[end + 4:whole])
    del received[:whole]
    return int(head[9:12]), body


def ask(port: int, request: object, source: str = "127.0.0.1", timeout_s: float = ASK_TIMEOUT_S) -> tuple[int, Any]:
    """Return status and parsed reply of one request on a connection of its own; raise OSError."""
    with connect(port, source, timeout_s) as client:
        client.sendall(http_request(request, close=True))
        status, body = read_reply(client)
    return status, json.loads(body)


def metrics(port: int) -> dict[str, int]:
    """Return what the relay tells of itself, by name (and label)."""
    with connect(port) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n")
        _, body = read_reply(client)
    return {name: int(number) for name, _, number in (
        line.rpartition(" ") for line in body.decode("ascii").splitlines() if line[:1] != "#")}


def receive_all(port: int, owner: Owner, source: str = "127.0.0.1") -> list[tuple[int, str]]:
    """Return (at, data) of all that a mailbox has, oldest first; raise OSError, or RuntimeError if refused."""
    status, reply = ask(port, check(owner.pub), source)
    found: list[tuple[int, str]] = []
    if status == 200 and not reply["found"]:
        return found
    answer = owner.open(reply["question"]) if status == 200 else ""
    while status == 200 and reply.get("found") is not False:
        status, reply = ask(port, {"pub": owner.pub, "action": "receive", "answer": answer, "limit": 100,
                                   "at": found[-1][0] if found else 0}, source)
        found += [(message["at"], message["data"]) for message in reply.get("messages", ())]
    if status != 200:
        raise RuntimeError(f"not received: {reply}")
    return found


# ---------------------------------------------------------------------------------------
# A crowd: many connections that do not block, in one thread.
# ---------------------------------------------------------------------------------------


class Member:
    """One connection of a crowd, with a number that its owner gives a meaning."""

    __slots__ = ("number", "received", "socket", "unsent")

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.socket, self.number = connection, number
        self.received, self.unsent = bytearray(), b""


class Heard(NamedTuple):
    """A reply to a member; status 0 is the end of its connection."""

    member: Member
    status: int
    body: bytes


class Crowd:
    """Wait for many connections at once; `with` closes them all."""

    def __init__(self) -> None:
        self._poll, self.members = select.epoll(), dict[int, Member]()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for member in tuple(self.members.values()):
            self.leave(member)
        self._poll.close()

    def join(self, port: int, number: int, source: str = "127.0.0.1", octets: bytes = b"") -> Member:
        """Connect one more, and have it say something; raise OSError."""
        member = Member(connect(port, source), number)
        member.socket.setblocking(False)
        self.members[member.socket.fileno()] = member
        self._poll.register(member.socket, select.EPOLLIN)
        self.say(member, octets)
        return member

    def leave(self, member: Member) -> None:
        """Close a connection; it may be so already."""
        if self.members.pop(member.socket.fileno(), None):
            member.socket.close()

    def say(self, member: Member, octets: bytes) -> None:
        """Send now what can be sent, and the rest later."""
        member.unsent += octets
        with contextlib.suppress(BlockingIOError, ConnectionError):  # its end is heard with the next turn
            while member.unsent:
                member.unsent = member.unsent[member.socket.send(member.unsent):]
        if member.socket.fileno() >= 0:
            self._poll.modify(member.socket, select.EPOLLIN | (select.EPOLLOUT if member.unsent else 0))

    def turn(self, timeout_s: float) -> Iterator[Heard]:
        """Yield what is heard until nothing more is at hand, after waiting for the first at most so long."""
        for number, events in self._poll.poll(max(0.0, timeout_s), 1024):
            member = self.members.get(number)
            if member and events & select.EPOLLOUT:
                self.say(member, b"")
            if member and events & ~select.EPOLLOUT:
                yield from self._hear(member)

    def _hear(self, member: Member) -> Iterator[Heard]:
        try:
            chunk = member.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        member.received += chunk
        while reply := take_reply(member.received):
            yield Heard(member, *reply)
        if not chunk:
            self.leave(member)
            yield Heard(member, 0, b"")


# ---------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def spread_ms(seconds: Sequence[float]) -> str:
    """Return median, 99th percentile and longest in milliseconds."""
    shown = " / ".join(f"{1000 * percentile(seconds, percent):.1f}" for percent in (50, 99, 100))
    return f"{shown} ms"


def mib(kib: float) -> str:
    """Return KiB as MiB."""
    return f"{kib / 1024:.1f} MiB"


def heading() -> None:
    """Print the head of the table."""
    print(f"{machine()}\n\n| what | measured | reach | met |\n|---|---|---|---|", flush=True)


def row(what: str, measured: str, reach: str = "", met: bool | None = None) -> None:
    """Print one line of the table; what has no reach is there to explain the others."""
    print(f"| {what} | {measured} | {reach or '-'} | {'-' if met is None else 'yes' if met else 'no'} |", flush=True)
