"""Share what the benchmarks need.

A relay as a process, what it uses, requests, a crowd of clients, rows of a table.
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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HERE = Path(__file__).parent
RELAY = Path(os.environ.get("CONNECTOID_RELAY") or HERE.parent / "connectoid_relay.py")
HOST = "127.0.0.1"
# 2,500 characters: a sealed message of the usual size.
DATA = "QUJD" * 625
# A check with this `at` finds nothing, whatever comes.
LATER_AT = 2**53
# The form of a mailbox that nobody has.
NO_BOX = "Ag" + "A" * 64
# A relay must have started by then, however busy the machine is.
READY_S = 20.0
STOP_TIMEOUT_S = 15.0
ASK_TIMEOUT_S = 10.0
# How many files a process opens beside its connections.
SPARE_FILES = 400
SUITE = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)
QUESTION_INFO = b"connectoid/1 question"
# Set before bind(2): the port is chosen when the peer is known, so each source has all ports.
IP_BIND_ADDRESS_NO_PORT = 24

# ---------------------------------------------------------------------------------------
# The machine: its cores, and what the operating system says that a process uses.
# ---------------------------------------------------------------------------------------

_CORES = sorted(os.sched_getaffinity(0))
# The two are the same on a machine with one core.
LOAD_CORE = _CORES[0]
SERVER_CORE = _CORES[-1]


def pin(core: int, pid: int = 0) -> None:
    """Let a process run on one core only; 0 is this process."""
    os.sched_setaffinity(pid, {core})


def machine() -> str:
    """Return one line on where the figures come from."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    cpu = platform.machine()
    if model:
        cpu = model[1]
    use = "for server and load"
    if len(_CORES) > 1:
        use = "one for the server, one for the load"
    kernel = platform.release().partition("-")[0]
    python = platform.python_version()
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return f"{cpu}, {len(_CORES)} cores ({use}), Linux {kernel}, Python {python}, {today}"


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread that has just ended has no such file.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text("ascii").split():
                pids += family(int(child))
    return pids


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a process and its children have used."""
    # clock_getcpuclockid(3) makes this number of a process.
    return sum(time.clock_gettime((~member << 3) | 2) for member in family(pid))


def memory_kib(pid: int) -> int:
    """Return the resident memory of a process and its children.

    What the kernel holds for sockets is not in it.
    """
    texts = [Path(f"/proc/{member}/smaps_rollup").read_text("ascii") for member in family(pid)]
    return sum(int(text.partition("Rss:")[2].split()[0]) for text in texts)


def threads(pid: int) -> int:
    """Return how many threads a process and its children have."""
    return sum(len(os.listdir(f"/proc/{member}/task")) for member in family(pid))


def descriptors(pid: int) -> int:
    """Return how many files a process and its children have open."""
    return sum(len(os.listdir(f"/proc/{member}/fd")) for member in family(pid))


def raise_file_limit(wanted: int) -> int:
    """Let this process and its children open this many files, if allowed; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted:
        # Only root may raise the hard limit, and not everywhere.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(wanted, soft), hard), hard))
    return hard


def run(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark and exit with its code; 130 after Ctrl-C.

    SIGTERM ends it in the ordinary way as well, so each `with` stops its server.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


# ---------------------------------------------------------------------------------------
# A relay as a process of its own.
# ---------------------------------------------------------------------------------------

# One address plays all the clients.
NO_RATES = (
    "--rate", "0", "--max-connections-per-source", "0", "--max-waiting-per-source", "0")


class RelayProcess:
    """A relay from the command line, pinned to its core and ready to serve; `with` stops it."""

    def __init__(
        self, directory: Path, *flags: str, port: int = 0, db: str = "connectoid.db",
    ) -> None:
        self.db = directory / db
        self._log = directory / "relay.log"
        command = [
            sys.executable, str(RELAY), "--port", str(port), "--db", str(self.db), *flags]
        with self._log.open("ab") as log:
            self._told = log.tell()
            self.started_s = time.perf_counter()
            self.popen = subprocess.Popen(
                command, cwd=directory, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = self.popen.pid
        pin(SERVER_CORE, self.pid)
        try:
            self.port = self._wait_until_ready()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        self.ready_s = time.perf_counter() - self.started_s

    def log(self) -> str:
        """Return what this process has written so far."""
        return self._log.read_bytes()[self._told:].decode("utf-8", "replace")

    def _wait_until_ready(self) -> int:
        end_s = self.started_s + READY_S
        while time.perf_counter() < end_s and self.popen.poll() is None:
            ready = re.search(r"listening on https?://\S+:(\d+)\n", self.log())
            if ready:
                return int(ready[1])
            time.sleep(0.002)
        raise RuntimeError(f"the relay did not start: {self.log()}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal and wait for the end; raise RuntimeError if it does not come."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(STOP_TIMEOUT_S)
            raise RuntimeError(f"the relay did not stop: {self.log()}") from None

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def relay_module() -> Any:
    """Return the relay's file as a module, for its schema and its store."""
    spec = importlib.util.spec_from_file_location("connectoid_relay", RELAY)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # Type hints are looked up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------
# Requests, and one client that waits for its reply.
# ---------------------------------------------------------------------------------------


class Owner:
    """Hold a mailbox's private key, made from a number so that runs repeat."""

    def __init__(self, number: int) -> None:
        self.key = ec.derive_private_key(number, ec.SECP384R1())
        public = self.key.public_key()
        self.box = public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
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
    lines = [b"POST / HTTP/1.1", b"Host: relay"]
    if close:
        lines.append(b"Connection: close")
    lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def check(pub: str, at: int = 0, wait: int = 0) -> dict[str, Any]:
    """Return a check request."""
    request: dict[str, Any] = {"pub": pub, "action": "check", "at": at}
    if wait:
        request["wait"] = wait
    return request


def send(pub: str, sealed: str = DATA) -> dict[str, Any]:
    """Return a send request."""
    return {"pub": pub, "action": "send", "data": sealed}


def receive(pub: str, answer: str, at: int = 0, limit: int = 1) -> dict[str, Any]:
    """Return a receive request; a reply to more than one message has a list."""
    request: dict[str, Any] = {
        "pub": pub, "action": "receive", "answer": answer, "at": at}
    if limit > 1:
        request["limit"] = limit
    return request


def connect(port: int, source: str = HOST, timeout_s: float = ASK_TIMEOUT_S) -> socket.socket:
    """Return a connection to the relay from an address of this host; 127.0.0.0/8 has many."""
    client = socket.socket()
    try:
        client.settimeout(timeout_s)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        client.bind((source, 0))
        client.connect((HOST, port))
    except BaseException:
        client.close()
        raise
    return client


def read_reply(client: socket.socket) -> tuple[int, bytes]:
    """Return status and body of the next reply; raise ConnectionError if there is none."""
    received = bytearray()
    while not (reply := take_reply(received)):
        chunk = client.recv(65536)
        if not chunk:
            raise ConnectionAbortedError
        received += chunk
    return reply


def take_reply(received: bytearray) -> tuple[int, bytes] | None:
    """Remove the first whole reply from what was received; return its status and body."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    _, found, rest = head.partition(b"\r\ncontent-length:")
    whole = end + 4
    if found:
        whole += int(rest.partition(b"\r\n")[0])
    if len(received) < whole:
        return None
    body = bytes(received[end + 4:whole])
    del received[:whole]
    return int(head[9:12]), body


def ask(
    port: int, request: object, source: str = HOST, timeout_s: float = ASK_TIMEOUT_S,
) -> tuple[int, Any]:
    """Return status and parsed reply of one request on a fresh connection; raise OSError."""
    with connect(port, source, timeout_s) as client:
        client.sendall(http_request(request, close=True))
        status, body = read_reply(client)
    return status, json.loads(body)


def get(port: int, path: str) -> bytes:
    """Return the body of a page of the relay; raise OSError."""
    with connect(port) as client:
        client.sendall(b"GET %s HTTP/1.1\r\nConnection: close\r\n\r\n" % path.encode("ascii"))
        _, body = read_reply(client)
    return body


def metrics(port: int) -> dict[str, int]:
    """Return the relay's metrics by name (and label)."""
    found = {}
    for line in get(port, "/metrics").decode("ascii").splitlines():
        if not line.startswith("#"):
            name, _, number = line.rpartition(" ")
            found[name] = int(number)
    return found


def receive_all(port: int, owner: Owner, source: str = HOST) -> list[tuple[int, str]]:
    """Return (at, data) of every message of a mailbox, oldest first.

    Raise OSError, or RuntimeError if the relay refuses.
    """
    status, reply = ask(port, check(owner.pub), source)
    found: list[tuple[int, str]] = []
    answer = ""
    if status == 200 and reply["found"]:
        answer = owner.open(reply["question"])
    while status == 200 and reply.get("found") is not False:
        last_at = max((at for at, _ in found), default=0)
        status, reply = ask(port, receive(owner.pub, answer, last_at, 100), source)
        found += [(message["at"], message["data"]) for message in reply.get("messages", ())]
    if status != 200:
        raise RuntimeError(f"not received: {reply}")
    return found


# ---------------------------------------------------------------------------------------
# A crowd: many connections that do not block, in one thread.
# ---------------------------------------------------------------------------------------


class Member:
    """One connection of a crowd. Its number means what the caller of `add` wants."""

    __slots__ = ("number", "received", "socket", "unsent")

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.socket = connection
        self.number = number
        self.received = bytearray()
        self.unsent = b""


class Heard(NamedTuple):
    """A reply to a member; status 0 is the end of its connection."""

    member: Member
    status: int
    body: bytes


class Crowd:
    """Wait for many connections at once; `with` closes them all."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self.members: dict[int, Member] = {}

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for member in tuple(self.members.values()):
            self.leave(member)
        self._poll.close()

    def join(self, port: int, number: int, source: str = HOST, octets: bytes = b"") -> Member:
        """Connect one more member and send what it has to say; raise OSError."""
        member = Member(connect(port, source), number)
        member.socket.setblocking(False)
        self.members[member.socket.fileno()] = member
        self._poll.register(member.socket, select.EPOLLIN)
        self.say(member, octets)
        return member

    def leave(self, member: Member) -> None:
        """Close a connection, which may be closed already."""
        if self.members.pop(member.socket.fileno(), None):
            member.socket.close()

    def say(self, member: Member, octets: bytes) -> None:
        """Send now what can be sent, and the rest later."""
        member.unsent += octets
        # The next turn hears the end of a connection.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while member.unsent:
                member.unsent = member.unsent[member.socket.send(member.unsent):]
        if member.socket.fileno() < 0:
            return
        events = select.EPOLLIN
        if member.unsent:
            events |= select.EPOLLOUT
        self._poll.modify(member.socket, events)

    def turn(self, timeout_s: float) -> Iterator[Heard]:
        """Wait this long for the first reply, then yield all that is at hand."""
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
# Figures.
# ---------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that this share of the values does not exceed; 0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """Return the median with the least and the most."""
    least = f"{min(values):{form}}"
    most = f"{max(values):{form}}"
    return f"{statistics.median(values):{form}} ({least} to {most})"


def spread_ms(seconds: Sequence[float]) -> str:
    """Return median, 99th percentile and longest in milliseconds."""
    shown = [f"{1000 * percentile(seconds, percent):.2f}" for percent in (50, 99, 100)]
    return " / ".join(shown) + " ms"


def mib(kib: float) -> str:
    """Return KiB as MiB."""
    return f"{kib / 1024:.1f} MiB"


def heading() -> None:
    """Print the head of the table."""
    print(f"{machine()}\n\n| what | measured | reach | met |\n|---|---|---|---|", flush=True)


def row(what: str, measured: str, reach: str = "-", met: bool | None = None) -> None:
    """Print one line of the table; a line without a reach explains the others."""
    verdict = {None: "-", True: "yes", False: "no"}[met]
    print(f"| {what} | {measured} | {reach} | {verdict} |", flush=True)
