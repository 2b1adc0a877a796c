"""Provide what tests share: servers in a thread and as a process, clients, and what a host sets."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, AnyStr, NamedTuple

import pytest
from hypothesis import strategies as st

from connectoid_relay import (
    Access,
    Limits,
    Message,
    Networks,
    Quota,
    Relay,
    RelayServer,
    Reply,
    SqliteStore,
    StoreError,
    read_access,
)
from test_relay import (
    BAD,
    HOME,
    NOTHING,
    NOW_US,
    OK,
    OK_REPLY,
    OTHER,
    OWNERS,
    SOURCE,
    START_US,
    STORES,
    SUITE,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    alice,
    answer_of,
    bob,
    box_expiry,
    box_of,
    check,
    clock,
    datagram,
    decode,
    folder,
    make,
    prove,
    put,
    question_of,
    receive,
    refused,
    relay,
    send,
    source_hash,
)

# What test_relay.py has for itself, tests get from here with the rest.
__all__ = [
    "BAD",
    "HOME",
    "NOTHING",
    "NOW_US",
    "OK",
    "OK_REPLY",
    "OTHER",
    "OWNERS",
    "SOURCE",
    "START_US",
    "STORES",
    "SUITE",
    "FakeClock",
    "Make",
    "Owner",
    "WatchedStore",
    "alice",
    "answer_of",
    "bob",
    "box_expiry",
    "box_of",
    "check",
    "clock",
    "datagram",
    "decode",
    "folder",
    "make",
    "prove",
    "put",
    "question_of",
    "receive",
    "refused",
    "relay",
    "send",
    "source_hash",
]

# ---------------------------------------------------------------------------------------
# Where things are, how long they may take, and what a machine may lack.
# ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
PROGRAM = "connectoid_relay.py"
# A deadline: ten times what a machine needs that is busy with another suite.
DEADLINE_S = 120.0
# A deadline for transfers of megabytes, and for connecting again after a kill.
LONG_DEADLINE_S = 600.0


def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Return once a condition holds."""
    give_up_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < give_up_s, "it never came to that"
        time.sleep(0.01)


# Debian's packages of the programs that tests run, where the names differ.
PACKAGES = {
    "gcc": "gcc libc6-dev",
    "nginx": "nginx-light",
    "promtool": "prometheus",
    "setpriv": "util-linux",
    "systemd-analyze": "systemd",
    "systemd-socket-activate": "systemd",
    "turnserver": "coturn",
    "turnutils_stunclient": "coturn",
    "unshare": "util-linux",
    "xvfb-run": "xvfb",
}


def lacking(*programs: str) -> str:
    """Return which programs are missing and how to get them; nothing if all are there."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [program for program in programs if not shutil.which(program, path=path)]
    packages = [PACKAGES.get(program, program) for program in missing]
    if not missing:
        return ""
    return f"missing: {', '.join(missing)}: apt-get install {' '.join(packages)}"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test where one of these programs is missing."""
    return pytest.mark.skipif(bool(lacking(*programs)), reason=lacking(*programs))


def skip_without(*programs: str) -> None:
    """Skip the test that runs where one of these programs is missing."""
    if lacking(*programs):
        pytest.skip(lacking(*programs))


# ---------------------------------------------------------------------------------------
# HTTP, one request on a connection.
# ---------------------------------------------------------------------------------------


def http_request(body: bytes, *headers: str, method: str = "POST", path: str = "/") -> bytes:
    """Return a whole HTTP request, closing the connection after it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: relay", "Connection: close",
             f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def body_of(request: object) -> bytes:
    """Return a request as JSON; bytes are sent as they are."""
    if isinstance(request, bytes):
        return request
    return json.dumps(request).encode()


def exchange(
    port: int, octets: bytes, piece: int | None = None, timeout_s: float = DEADLINE_S
) -> bytes:
    """Send octets (in pieces of so many bytes) and return all that comes back until the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The relay may have refused half-way.
        with contextlib.suppress(ConnectionError):
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
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return int(first.split()[1]), headers, body


def post(port: int, request: object, piece: int | None = None) -> tuple[int, Any]:
    """Post a JSON request (or raw bytes) and return the status and the parsed reply."""
    body = body_of(request)
    status, headers, reply = parse_response(exchange(port, http_request(body), piece))
    assert headers["access-control-allow-origin"] == "*"
    return status, json.loads(reply)


def get(
    port: int, path: str = "/", *headers: str, method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    """Return status, headers and text of a page."""
    status, found, body = parse_response(
        exchange(port, http_request(b"", *headers, method=method, path=path))
    )
    return status, found, body.decode("utf-8")


def document_of(port: int) -> dict[str, Any]:
    """Return the relay's document."""
    status, _, text = get(port, "/", "Accept: application/json")
    assert status == 200
    document: dict[str, Any] = json.loads(text)
    return document


def forwarded(port: int, request: object, *hops: str) -> tuple[int, Any]:
    """Post a request with an X-Forwarded-For header for each of the hops."""
    octets = http_request(
        json.dumps(request).encode(), *(f"X-Forwarded-For: {hop}" for hop in hops)
    )
    status, _, body = parse_response(exchange(port, octets))
    return status, json.loads(body)


# ---------------------------------------------------------------------------------------
# A connection that stays.
# ---------------------------------------------------------------------------------------


class Client:
    """A connection that stays: requests go out as bytes, replies come back one by one."""

    def __init__(self, port: int, *requests: bytes, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=DEADLINE_S)
        self.received = self.socket.makefile("rb")
        self.send(*requests)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *requests: bytes) -> None:
        """Send all requests, in one segment if they fit."""
        self.socket.sendall(b"".join(requests))

    def reply(self, with_body: bool = True) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next reply."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.received.readline()
            assert line, "the connection has ended"
            head += line
        status, headers, body = parse_response(head)
        if with_body:
            body = self.received.read(int(headers.get("content-length", 0)))
        return status, headers, body

    def answer(self) -> tuple[int, Any]:
        """Return status and parsed JSON of the next reply."""
        status, _, body = self.reply()
        return status, json.loads(body)

    def is_silent(self) -> bool:
        """Return whether nothing has come, not even the end."""
        return not select.select([self.socket], [], [], 0)[0]

    def is_closed(self) -> bool:
        """Wait for what comes next and return whether that is the end."""
        return self.received.read(1) == b""

    def close(self) -> None:
        """Hang up."""
        self.received.close()
        self.socket.close()


def lasting(request: object = None, *headers: str, path: str = "/") -> bytes:
    """Return a request that leaves the connection open: a POST of JSON, or a GET without any."""
    if request is None:
        closing = http_request(b"", *headers, method="GET", path=path)
    else:
        closing = http_request(body_of(request), *headers, path=path)
    return closing.replace(b"Connection: close\r\n", b"")


def unfinished(size: int) -> bytes:
    """Return a POST that lacks the last hundred of so many bytes of its body."""
    return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + b" " * (size - 100)


def padded(request: object, size: int) -> bytes:
    """Return a request's body, filled up with blanks."""
    return json.dumps(request).encode().ljust(size)


@contextlib.contextmanager
def hanging_up(clients: list[Client]) -> Iterator[list[Client]]:
    """Close the clients in the end, also those that come later."""
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def settle(port: int) -> None:
    """Return once the server has seen all that had reached it; it sees each client once a turn."""
    with Client(port) as client:
        for _ in range(2):
            client.send(lasting(None, "Accept: application/json"))
            assert client.reply()[0] == 200


def park(port: int, request: object) -> socket.socket:
    """Send a request with `wait` and return its connection once the relay has read it."""
    client = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    client.sendall(http_request(json.dumps(request).encode()))
    # This is asked later. Once it is answered, the first has been read.
    post(port, check(Owner(99)))
    return client


def reply_on(client: socket.socket) -> tuple[int, Any]:
    """Return the status and the reply that come on a connection."""
    with client, client.makefile("rb") as stream:
        status, _, body = parse_response(stream.read())
    return status, json.loads(body)


# ---------------------------------------------------------------------------------------
# Servers in a thread.
# ---------------------------------------------------------------------------------------


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
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def serving(relay: Relay, **options: Any) -> contextlib.AbstractContextManager[RelayServer]:
    """Serve a relay on a free port of 127.0.0.1, from a thread."""
    return running(RelayServer(("127.0.0.1", 0), relay, **options))


@contextlib.contextmanager
def limited(
    clock: FakeClock, store: SqliteStore | None = None, /, **limits: int
) -> Iterator[RelayServer]:
    """Serve a relay with other limits."""
    relay = Relay(store or SqliteStore(":memory:"), Limits(**limits), clock=clock.clock)
    with contextlib.closing(relay), serving(relay) as server:
        yield server


@pytest.fixture
def port(relay: Relay) -> Iterator[int]:
    """Return the port of a server in a thread."""
    with serving(relay) as server:
        yield server.server_port


class StuckStore(SqliteStore):
    """A store whose disk takes nothing until it is released."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.stuck = threading.Semaphore(0)
        self.free = threading.Event()
        # The boxes, in the order of their turns.
        self.boxes: list[bytes] = []

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message, when the disk is free again."""
        self.boxes.append(message.box)
        self.stuck.release()
        assert self.free.wait(DEADLINE_S)
        return super().put(message, limits, now_us)


# ---------------------------------------------------------------------------------------
# Programs.
# ---------------------------------------------------------------------------------------


# What nohup, or a shell that starts a program behind `&`, has it ignore.
MUTED = ("SIGHUP", "SIGINT", "SIGQUIT")


def unmute_children() -> None:
    """Let programs that tests start take signals as usual, also where this process ignores them.

    What is ignored, they inherit. What has a handler, they do not (execve(2)).
    """
    # Windows has not all of them.
    for number in (getattr(signal, name) for name in MUTED if hasattr(signal, name)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def put_down(popen: subprocess.Popen[Any]) -> None:
    """Kill a process if it still runs, and close its pipes."""
    popen.kill()
    popen.wait(DEADLINE_S)
    for stream in (popen.stdin, popen.stdout, popen.stderr):
        if stream is not None:
            # What the process has not read can no longer be flushed.
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def put_down_after(popen: subprocess.Popen[AnyStr]) -> Iterator[subprocess.Popen[AnyStr]]:
    """Lend a process to a test, and leave nothing of it behind, whatever happens."""
    try:
        yield popen
    finally:
        put_down(popen)


# Python, for which warnings are errors: of a relay they would be the first words that a host sees.
STRICT = [sys.executable, "-W", "error"]


class Process:
    """A relay started from the command line, ready to serve."""

    def __init__(self, *flags: str, cwd: Path, **options: Any) -> None:
        command = [*STRICT, str(ROOT / PROGRAM), "--port", "0", *flags]
        self.popen = subprocess.Popen(
            command, cwd=cwd, stderr=subprocess.PIPE, text=True, **options
        )
        assert self.popen.stderr is not None
        self.first_line = self.popen.stderr.readline()
        self.port = 0
        ready = re.fullmatch(
            r"connectoid relay (\S+) listening on https?://\S+:(\d+)\n", self.first_line)
        if ready:
            self.port = int(ready[2])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and return the exit code and what stood in the log since."""
        if self.popen.poll() is None:
            os.kill(self.popen.pid, number)
        _, log = self.popen.communicate(timeout=DEADLINE_S)
        return self.popen.returncode, log


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that starts a relay as a process, with flags; all end with the test."""
    with contextlib.ExitStack() as started:

        def start_process(*flags: str, **options: Any) -> Process:
            process = Process(*flags, cwd=tmp_path, **options)
            started.callback(put_down, process.popen)
            return process

        yield start_process


def next_log_line(process: Process) -> str:
    """Return what a process logs next."""
    assert process.popen.stderr is not None
    assert select.select([process.popen.stderr], [], [], DEADLINE_S)[0], "it logs nothing"
    return str(process.popen.stderr.readline())


def run_relay(*flags: str, cwd: Path, program: Path = ROOT / PROGRAM,
              **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the relay until it leaves by itself."""
    return subprocess.run(
        [*STRICT, str(program), *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        **options,
    )


def assert_fails_with_one_line(finished: subprocess.CompletedProcess[str], *words: str) -> None:
    """Let a run that failed say why, in one line for people."""
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("connectoid-relay: ")
    assert finished.stderr.count("\n") == 1
    for word in words:
        assert word in finished.stderr


# ---------------------------------------------------------------------------------------
# Relays on files, and what is in them.
# ---------------------------------------------------------------------------------------

ROOMY = Limits(rate=0, max_box_messages=10**6, max_box_bytes=10**9)
ROOMY_FLAGS = ("--rate", "0", "--max-box-messages", "1000000", "--max-box-bytes", "1000000000")
# Any text that Python can hold, lone surrogates too.
ANY_TEXT = st.text(st.characters(exclude_categories=()))
# These are 32,000 characters.
BIG = "QUJD" * 8_000
HOUR_S = 3_600


@contextlib.contextmanager
def relay_on(path: Path, clock: FakeClock, limits: Limits | None = None,
             access: Access | None = None) -> Iterator[Relay]:
    """Open a relay on a file, and close it."""
    relay = Relay(SqliteStore(str(path)), limits, access=access, clock=clock.clock)
    try:
        yield relay
    finally:
        relay.close()


def sweep_for(relay: Relay, clock: FakeClock, seconds: int = 20) -> None:
    """Sweep as a server does: once a second, on in spite of errors."""
    for _ in range(seconds):
        with contextlib.suppress(StoreError):
            while relay.sweep():
                pass
        clock.advance(1)


def trace_in(directory: Path, octets: bytes) -> list[str]:
    """Return the names of the files that hold the octets."""
    return sorted(path.name for path in directory.iterdir() if octets in path.read_bytes())


def page(port: int, owner: Owner, at: int = 0) -> list[tuple[int, str]]:
    """Return (at, data) of all that is newer than `at`, as its owner gets it over HTTP."""
    found: list[tuple[int, str]] = []
    _, reply = post(port, check(owner, at))
    if not reply["found"]:
        return found
    answer = owner.open(reply["question"])
    while True:
        status, reply = post(port, receive(owner, answer, at=at, limit=100))
        assert status == 200
        if "messages" not in reply:
            assert reply == NOTHING
            return found
        found += [(message["at"], message["data"]) for message in reply["messages"]]
        at = found[-1][0]


def messages_of(relay: Relay, owner: Owner, at: int = 0) -> list[tuple[int, str]]:
    """Return (at, data) of at most 100 messages newer than `at`, as their owner gets them."""
    status, reply = relay.handle(check(owner, at), SOURCE)
    assert status == 200
    assert isinstance(reply, dict)
    if not reply["found"]:
        return []
    status, reply = relay.handle(
        receive(owner, owner.open(reply["question"]), at=at, limit=100), SOURCE
    )
    assert status == 200
    assert isinstance(reply, dict)
    return [(message["at"], message["data"]) for message in reply["messages"]]


def assert_increasing(found: Sequence[tuple[int, str]]) -> None:
    """Have `at` strictly increase."""
    assert all(earlier[0] < later[0] for earlier, later in itertools.pairwise(found))


# ---------------------------------------------------------------------------------------
# What a host sets.
# ---------------------------------------------------------------------------------------

KEY = "sesame-5f2c91d0a77b"
OTHER_KEY = "another-81c30e5bd9"
FORBIDDEN = (403, "Forbidden", 0)
# START_US is at 8 o'clock UTC.
TO_MIDNIGHT_S = 57_600


def alices(public: Quota | None = None, **quota: Any) -> Access:
    """Return the access with one key, of the table [keys.alice]."""
    return Access({KEY: Quota("keys.alice", **quota)}, public)


def refusal_in(body: dict[str, Any]) -> tuple[str, int] | None:
    """Return error and retry of a refusal's JSON; None for what is none."""
    if body["ok"]:
        return None
    assert body.keys() <= {"ok", "error", "detail", "retry"}
    return str(body["error"]), int(body.get("retry", 0))


def gist(reply: Reply) -> object:
    """Return the JSON of a reply that is well, and a refusal in short."""
    if reply.status == 200:
        return reply.body
    return refused(reply)


def ask(relay: Relay, *requests: object, source: str = SOURCE) -> list[object]:
    """Return the gist of the replies to requests in a row."""
    return [gist(relay.handle(request, source)) for request in requests]


def batch(relay: Relay, *items: object, source: str = SOURCE) -> list[Any]:
    """Return the replies to a batch: what is well, and refusals as error and retry."""
    status, replies = relay.handle(list(items), source)
    assert status == 200
    assert isinstance(replies, list)
    return [refusal_in(reply) or reply for reply in replies]


def texts_of(relay: Relay, owner: Owner, **members: Any) -> list[str]:
    """Return the data of all messages in a box, which has some."""
    reply = relay.handle(check(owner, **members), SOURCE)
    assert isinstance(reply.body, dict)
    reply = relay.handle(
        receive(owner, owner.open(reply.body["question"]), limit=100, **members), SOURCE
    )
    assert isinstance(reply.body, dict)
    return [message["data"] for message in reply.body["messages"]]


def requests_with(owner: Owner, members: dict[str, Any]) -> list[object]:
    """Return a request of each kind."""
    return [send(owner, **members), check(owner, **members), receive(owner, "no", **members)]


def denying(tmp_path: Path, *lines: str) -> Access:
    """Return the access that a list of lines gives."""
    (tmp_path / "deny.txt").write_text("\n".join(lines))
    return read_access(denied=str(tmp_path / "deny.txt"))


def networks(*texts: str) -> Networks:
    """Return a set of networks."""
    return Networks(ipaddress.ip_network(text) for text in texts)


# ---------------------------------------------------------------------------------------
# Datagrams: checks, and STUN of RFC 8489.
# ---------------------------------------------------------------------------------------

COOKIE = bytes.fromhex("2112a442")
# All samples in RFC 5769 have this transaction.
TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")


def binding_request(
    kind: int = 0x0001,
    attributes: bytes = b"",
    *,
    transaction: bytes = TRANSACTION,
    cookie: bytes = COOKIE,
    length: int | None = None,
) -> bytes:
    """Return a STUN message, a Binding request if nothing else is asked for."""
    if length is None:
        length = len(attributes)
    head = kind.to_bytes(2, "big") + length.to_bytes(2, "big")
    return head + cookie + transaction + attributes


class Fence(NamedTuple):
    """A datagram that is surely answered, and what the reply to it has in it."""

    datagram: bytes
    mark: bytes


CHECK_FENCE = Fence(json.dumps(check(Owner(99), id="-last_one-")).encode(), b"-last_one-")
STUN_FENCE = Fence(binding_request(transaction=TRANSACTION[::-1]), TRANSACTION[::-1])


@contextlib.contextmanager
def datagrams_to(port: int, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """Connect a socket of datagrams."""
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect((host, port))
        yield client


def octets_over_udp(
    port: int, *datagrams: bytes, fence: Fence = CHECK_FENCE, host: str = "127.0.0.1"
) -> list[bytes]:
    """Send datagrams and a fence; return the replies that came before the fence's."""
    replies: list[bytes] = []
    with datagrams_to(port, host) as client:
        for datagram in (*datagrams, fence.datagram):
            client.send(datagram)
        while not replies or fence.mark not in replies[-1]:
            replies.append(client.recv(65_536))
    return replies[:-1]


def over_udp(port: int, *requests: bytes | object, host: str = "127.0.0.1") -> list[Any]:
    """Send requests as datagrams and return the replies; silence is none."""
    datagrams = [body_of(request) for request in requests]
    return [json.loads(reply) for reply in octets_over_udp(port, *datagrams, host=host)]


# ---------------------------------------------------------------------------------------
# Engines that speak DynamoDB, each started once for all tests that ask for one.
# ---------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """An engine that runs."""

    name: str
    url: str


@contextlib.contextmanager
def running_engine(name: str) -> Iterator[Engine]:
    """Run an engine, or skip the test."""
    engines = pytest.importorskip("engines", reason="boto3 is missing: pip install -e '.[test]'")
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(engines.ENGINES[name]())
        except engines.Missing as missing:
            pytest.skip(str(missing))
        yield Engine(name, url)


@pytest.fixture(scope="session")
def dynalite_url() -> Iterator[str]:
    """Return the URL of dynalite."""
    with running_engine("dynalite") as dynalite:
        yield dynalite.url


@pytest.fixture(scope="session", params=["dynalite", "moto"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Return each engine."""
    with running_engine(request.param) as engine:
        yield engine
