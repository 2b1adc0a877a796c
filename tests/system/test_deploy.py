"""Test each way to run the relay: HTTPS, systemd, WSGI servers, proxies.

Most tests start the relay as a process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import io
import ipaddress
import itertools
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from harness import (
    NOTHING,
    OK,
    ROOT,
    FakeClock,
    Owner,
    Process,
    check,
    exchange,
    http_request,
    needs,
    parse_response,
    post,
    receive,
    running,
    send,
    serving,
)

from connectoid_relay import (
    MAX_DATA_CHARS,
    MAX_RECEIVE_CHARS,
    TLS_OVERHEAD,
    TLS_SPARE_BYTES,
    Limits,
    Networks,
    Relay,
    RelayServer,
    SqliteStore,
    __version__,
    _TlsSocket,
    build_watchdog,
    load_tls,
    wsgi,
)

RELAY = [sys.executable, str(ROOT / "connectoid_relay.py")]
# The name in docs/hosting.md.
NAME = "relay.example.com"
HOSTING, EMBEDDING = (
    (ROOT / "docs" / page).read_text("utf-8") for page in ("hosting.md", "embedding.md")
)
# Status, headers, body.
Response: TypeAlias = tuple[int, dict[str, str], bytes]
Launch: TypeAlias = Callable[..., "subprocess.Popen[str]"]

# ---------------------------------------------------------------------------------------
# A certificate authority, clients that verify, and other programs beside the relay.
# ---------------------------------------------------------------------------------------


class Files(NamedTuple):
    """A chain of certificates and its private key."""

    certificate: Path
    key: Path

    @property
    def flags(self) -> tuple[str, ...]:
        """Return the flags that name them."""
        return "--tls-cert", str(self.certificate), "--tls-key", str(self.key)

    def become(self, other: Files) -> None:
        """Take over the content of others, as a renewal does."""
        self.certificate.write_bytes(other.certificate.read_bytes())
        self.key.write_bytes(other.key.read_bytes())


class Authority:
    """Issue certificates, as Let's Encrypt would."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count(1)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Connectoid tests")])
        self._usage = functools.partial(
            x509.KeyUsage,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        self.certificate = folder / "ca.pem"
        self._write(
            self.certificate,
            self._sign(
                self._name,
                self._key.public_key(),
                [
                    x509.BasicConstraints(ca=True, path_length=0),
                    self._usage(digital_signature=False, key_cert_sign=True, crl_sign=True),
                ],
            ),
        )

    def _sign(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePublicKey,
        extensions: Sequence[x509.ExtensionType],
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(
            self._name,
            name,
            key,
            x509.random_serial_number(),
            now - datetime.timedelta(days=1),
            now + datetime.timedelta(days=1),
        )
        for extension in (
            *extensions,
            x509.SubjectKeyIdentifier.from_public_key(key),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
        ):
            builder = builder.add_extension(
                extension, isinstance(extension, (x509.BasicConstraints, x509.KeyUsage))
            )
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, folder: Path | None = None, passphrase: bytes = b"") -> Files:
        """Return a new certificate for NAME and 127.0.0.1, and its key, in a folder."""
        number = next(self._numbers)
        folder = folder or self._folder
        files = Files(folder / f"fullchain{number}.pem", folder / f"privkey{number}.pem")
        key = ec.generate_private_key(ec.SECP256R1())
        self._write(
            files.certificate,
            self._sign(
                x509.Name([]),
                key.public_key(),
                [
                    x509.SubjectAlternativeName(
                        [x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                    ),
                    x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]),
                    self._usage(digital_signature=True, key_cert_sign=False, crl_sign=False),
                ],
            ),
        )
        hidden: KeySerializationEncryption = (
            BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        )
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
        return files

    def context(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """Return what a client needs to verify our certificates."""
        context = ssl.create_default_context(cafile=self.certificate)
        context.set_alpn_protocols(["http/1.1"])
        if version:
            context.minimum_version = context.maximum_version = version
        return context


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return the authority that all clients here trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Files:
    """Return a certificate that verifies, and its key."""
    return authority.issue(tmp_path)


@pytest.fixture
def trust(authority: Authority) -> ssl.SSLContext:
    """Return a client's TLS settings: it trusts our authority alone."""
    return authority.context()


class Client:
    """Keep a connection, over TLS if it gets settings, and fail when a reply is cut off."""

    def __init__(
        self,
        port: int,
        tls: ssl.SSLContext | None = None,
        source: str = "127.0.0.1",
        buffer_bytes: int = 0,
    ) -> None:
        plain = socket.socket()
        plain.settimeout(20)
        if buffer_bytes:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        try:
            plain.bind((source, 0))
            plain.connect(("127.0.0.1", port))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket = (
                plain
                if tls is None
                else tls.wrap_socket(plain, server_hostname=NAME, suppress_ragged_eofs=False)
            )
        except OSError:
            plain.close()
            raise
        self._incoming = self.socket.makefile("rb", buffering=4096)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._incoming.close()
        self.socket.close()

    @property
    def tls(self) -> ssl.SSLSocket:
        """Return the connection as the TLS connection that it is."""
        assert isinstance(self.socket, ssl.SSLSocket)
        return self.socket

    @property
    def serial(self) -> str:
        """Return which certificate the server has."""
        return str((self.tls.getpeercert() or {})["serialNumber"])

    def read(self, body: bool = True) -> Response:
        """Return the next reply."""
        lines = []
        while (line := self._incoming.readline()) != b"\r\n":
            if not line:
                raise ConnectionError("no reply")
            lines.append(line)
        status, headers, _ = parse_response(b"".join(lines) + b"\r\n")
        return (
            status,
            headers,
            self._incoming.read(int(headers.get("content-length", 0)) if body else 0),
        )

    def ask(self, octets: bytes) -> Response:
        """Send a request and return the reply."""
        self.socket.sendall(octets)
        return self.read()

    def post(self, request: object, *headers: str) -> tuple[int, Any]:
        """Post a JSON request and return the status and the parsed reply."""
        status, _, reply = self.ask(kept(json.dumps(request).encode(), *headers))
        return status, json.loads(reply)

    def rest(self) -> bytes:
        """Return all up to the end, and raise SSLEOFError if TLS does not announce the end."""
        return b"".join(iter(functools.partial(self._incoming.read, 65536), b""))


def kept(body: bytes = b"", *headers: str, method: str = "POST", path: str = "/") -> bytes:
    """Return a request to NAME that does not close the connection."""
    request = http_request(body, *headers, method=method, path=path)
    _, host, others = request.replace(b"Connection: close\r\n", b"", 1).partition(b"Host: relay")
    return request.partition(host)[0] + b"Host: " + NAME.encode() + others


def ask_once(port: int, tls: ssl.SSLContext | None, request: object) -> Any:
    """Post a request on a connection of its own and return the reply, whatever its status."""
    with Client(port, tls) as client:
        return client.post(request)[1]


def wait_until(holds: Callable[[], object], seconds: float = 15) -> None:
    """Return once a condition holds."""
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, "the condition never held"
        select.select([], [], [], 0.01)


def gauge(port: int, name: str, tls: ssl.SSLContext | None = None) -> int:
    """Return a number of the relay's metrics."""
    with Client(port, tls) as client:
        _, _, text = client.ask(kept(method="GET", path="/metrics"))
    found = re.search(rf"^connectoid_{name} (\d+)$", text.decode(), re.MULTILINE)
    assert found
    return int(found[1])


def client_hello() -> bytes:
    """Return how a TLS client begins."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(
            ssl.MemoryBIO(), outgoing, server_hostname=NAME
        ).do_handshake()
    return outgoing.read()


HALF_HELLO = client_hello()[:100]


def open_plain(port: int, octets: bytes = b"", count: int = 1) -> contextlib.ExitStack:
    """Open connections that send some bytes and then nothing; the stack closes them."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)).sendall(octets)
        return stack.pop_all()


def threads_of(process: Process) -> int:
    """Return how many threads a relay has."""
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return int(status.partition("Threads:")[2].split()[0])


def sockets_of(process: Process) -> int:
    """Return how many sockets a relay has open."""
    count = 0
    for link in Path(f"/proc/{process.popen.pid}/fd").iterdir():
        # The file may have been closed meanwhile.
        with contextlib.suppress(OSError):
            count += os.readlink(link).startswith("socket:")
    return count


def free_port() -> int:
    """Return a port that was free just now, below those that the system gives to clients.

    If another program takes it before the server does, the test fails. These programs do not take
    port 0, so there is no other way.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("", port))
            return port


def next_line(popen: subprocess.Popen[str]) -> str:
    """Return the next line of the log.

    It is read byte by byte, since `select` does not see what is buffered.
    """
    assert popen.stderr is not None
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([popen.stderr], [], [], 15)[0], f"no line after {line!r}"
        octet = os.read(popen.stderr.fileno(), 1)
        assert octet, f"it ended after {line!r}"
        line += octet
    return line.decode()


def ready_port(popen: subprocess.Popen[str]) -> int:
    """Return the port that a relay's ready line names."""
    line = next_line(popen)
    ready = re.fullmatch(
        rf"connectoid relay {re.escape(__version__)} listening on https?://\S+:(\d+)\n", line
    )
    assert ready, line
    return int(ready[1])


def answers(port: int, tls: ssl.SSLContext | None = None) -> bool:
    """Return whether a relay can be reached, and is well."""
    with contextlib.suppress(OSError), Client(port, tls) as client:
        status, _, reply = client.ask(kept(method="GET", path="/health"))
        return status == 200 and bool(json.loads(reply)["ok"])
    return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Return a function that starts a program; it ends with the test, and so do its children."""
    started: list[subprocess.Popen[str]] = []

    def launch_program(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                text=True,
                start_new_session=True,
                **{"stderr": subprocess.PIPE} | options,
            )
        )
        return started[-1]

    yield launch_program
    for popen in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.communicate(timeout=10)


def end(popen: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Send a signal and return the exit code and what was logged since."""
    popen.send_signal(number)
    _, log = popen.communicate(timeout=15)
    return popen.returncode, log


def fenced(language: str, within: str = "") -> str:
    """Return the one block of the docs in a language that has some words in it."""
    blocks = re.findall(
        rf"^```{language}\n(.*?)^```$", HOSTING + EMBEDDING, re.MULTILINE | re.DOTALL
    )
    found = [str(block) for block in blocks if within in block]
    assert len(found) == 1
    return found[0]


def replace(text: str, changes: Mapping[str, object]) -> str:
    """Return a text with all of the changes made."""
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, str(new))
    return text


# ---------------------------------------------------------------------------------------
# HTTPS, built in.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_https_serves_clients_that_verify(
    version: ssl.TLSVersion,
    start: Callable[..., Process],
    files: Files,
    authority: Authority,
    alice: Owner,
) -> None:
    process = start("--host", "127.0.0.1", *files.flags)
    assert process.first_line.startswith(
        f"connectoid relay {__version__} listening on https://127.0.0.1:"
    )
    context = authority.context(version)
    # Browsers offer both.
    context.set_alpn_protocols(["h2", "http/1.1"])
    with Client(process.port, context) as client:
        assert client.tls.version() == version.name.replace("_", ".")
        assert client.tls.selected_alpn_protocol() == "http/1.1"
        assert client.post(check(alice)) == (200, NOTHING)
        assert client.post(send(alice, "vttf66efd34d")) == (200, OK)
        answer = alice.open(client.post(check(alice))[1]["question"])
        status, reply = client.post(receive(alice, answer))
        assert (status, reply["data"]) == (200, "vttf66efd34d")
    assert process.stop() == (0, "")


@needs("curl")
def test_https_serves_curl(
    start: Callable[..., Process], files: Files, authority: Authority, alice: Owner
) -> None:
    process = start(*files.flags)
    command = [
        "curl",
        "-sS",
        "--cacert",
        str(authority.certificate),
        "--resolve",
        f"{NAME}:{process.port}:127.0.0.1",
        f"https://{NAME}:{process.port}/",
    ]
    for request, reply in ((check(alice), NOTHING), (send(alice, "A" * MAX_DATA_CHARS), OK)):
        for headers in ([], ["-H", "Expect: 100-continue"]):
            ran = subprocess.run(
                [*command, *headers, "-d", json.dumps(request)],
                capture_output=True,
                timeout=20,
                check=True,
            )
            assert (json.loads(ran.stdout), ran.stderr) == (reply, b"")


def test_tls_before_1_2_is_refused_and_harms_nobody(
    start: Callable[..., Process],
    files: Files,
    trust: ssl.SSLContext,
    alice: Owner,
    authority: Authority,
) -> None:
    process = start(*files.flags)
    old = authority.context()
    # Otherwise this client itself would refuse.
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.deprecated_call():
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError) as refused:
        Client(process.port, old)
    # The second is what Debian's own OpenSSL says.
    assert refused.value.reason in {"TLSV1_ALERT_PROTOCOL_VERSION", "TLSV1_ALERT_INTERNAL_ERROR"}
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    assert process.stop() == (0, "")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_large_reply_arrives_whole_at_a_slow_reader(
    version: ssl.TLSVersion,
    start: Callable[..., Process],
    files: Files,
    authority: Authority,
    alice: Owner,
) -> None:
    process = start(*files.flags)
    sent = [str(number) * (MAX_DATA_CHARS // len(str(number))) for number in range(16)]
    with Client(process.port, authority.context(version), buffer_bytes=4096) as client:
        assert all(client.post(send(alice, sealed)) == (200, OK) for sealed in sent)
        answer = alice.open(client.post(check(alice))[1]["question"])
        client.socket.sendall(kept(json.dumps(receive(alice, answer, limit=100)).encode()) * 3)
        for _ in range(3):
            status, _, body = client.read()
            assert status == 200
            assert len(body) > MAX_RECEIVE_CHARS
            assert [message["data"] for message in json.loads(body)["messages"]] == sent


@pytest.mark.parametrize("records", ["one", "one a request", "one a byte"])
def test_pipelined_requests_are_answered_in_order(
    records: str, start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    requests = [
        kept(json.dumps(request).encode()) for request in (check(alice), send(alice), check(alice))
    ]
    pieces = {
        "one": [b"".join(requests)],
        "one a request": requests,
        "one a byte": [bytes([octet]) for octet in b"".join(requests)],
    }[records]
    with Client(process.port, trust) as client:
        for _ in range(2):
            for piece in pieces:
                client.socket.sendall(piece)
            replies = [json.loads(client.read()[2]) for _ in requests]
            assert replies[1] == OK
            assert replies[2]["found"]
        # The connection is kept.
        assert client.post(check(alice))[1]["found"]


def test_long_poll_over_tls_is_woken_by_a_send(
    start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    with Client(process.port, trust) as client:
        client.socket.sendall(kept(json.dumps(check(alice, wait=60)).encode()))
        wait_until(lambda: gauge(process.port, "waiting_boxes", trust) == 1)
        assert ask_once(process.port, trust, send(alice)) == OK
        assert json.loads(client.read()[2])["found"]
        # A client that sends more ends its wait, even if that comes in a TLS record of its own.
        client.socket.sendall(kept(json.dumps(check(Owner(9), wait=60)).encode()))
        wait_until(lambda: gauge(process.port, "waiting_boxes", trust) == 1)
        assert json.loads(client.ask(kept(json.dumps(check(alice)).encode()))[2]) == NOTHING
        assert json.loads(client.read()[2])["found"]


ENDS: Mapping[str, tuple[bytes, int | None]] = {
    "close": (http_request(b"{}"), 400),
    "not found": (http_request(b"", path="/x"), 404),
    "413": (http_request(b" " * 300_000), 413),
    "413 far over": (http_request(b" " * 1_000_000), 413),
    "431": (kept(b"", "X: " + "y" * 60_000), 431),
    "not HTTP": (b"\0", 400),
    "408": (b"POST / HTTP/1.1\r\n", 408),
    "idle": (b"", None),
}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_end_of_a_connection_is_said(
    version: ssl.TLSVersion, start: Callable[..., Process], files: Files, authority: Authority
) -> None:
    process = start("--request-timeout", "1", "--idle-timeout", "1", *files.flags)
    for name, (octets, status) in ENDS.items():
        with Client(process.port, authority.context(version)) as client:
            client.socket.sendall(octets)
            # This raises SSLEOFError if there was no close_notify.
            rest = client.rest()
            assert (parse_response(rest)[0] if rest else None) == status, name
            if status in (413, 431):
                assert json.loads(parse_response(rest)[2])["error"] == "Too big"


@pytest.mark.parametrize(
    "octets",
    [
        http_request(b"{}"),
        http_request(b" " * 100_000),
        b"\0" * 1_000,
        b"\x16\x03\x01\xff\xff" + b"x" * 70_000,
        b"\x16\x03\x01\x00\x05hello",
        client_hello() + http_request(b"{}"),
    ],
    ids=["HTTP", "long HTTP", "NULs", "too long", "no handshake", "HTTP after a hello"],
)
def test_what_is_no_tls_gets_no_reply_and_harms_nobody(
    octets: bytes, start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    with contextlib.suppress(ConnectionError):
        assert b"HTTP" not in exchange(process.port, octets)
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    assert process.stop() == (0, "")


@pytest.mark.parametrize(
    "octets",
    [b"", HALF_HELLO[:1], HALF_HELLO, client_hello()],
    ids=["nothing", "a byte", "half a hello", "a hello"],
)
def test_client_that_does_not_finish_a_handshake_costs_no_thread_and_is_closed(
    octets: bytes, start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start("--request-timeout", "1", *files.flags)
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    threads = threads_of(process)
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", process.port), 10))
            for _ in range(50)
        ]
        for connection in silent:
            connection.sendall(octets)
        assert threads_of(process) == threads
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                # Our half of a handshake may come before the end.
                while connection.recv(65536):
                    pass
    assert 0.7 < time.monotonic() - began_s < 5
    assert threads_of(process) == threads
    wait_until(lambda: gauge(process.port, "connections", trust) == 1)


def test_client_that_sends_a_handshake_byte_by_byte_has_no_more_time(
    start: Callable[..., Process], files: Files
) -> None:
    process = start("--request-timeout", "1", *files.flags)
    began_s = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", process.port), 10) as client,
        contextlib.suppress(ConnectionError),
    ):
        for octet in client_hello():
            client.sendall(bytes([octet]))
            assert time.monotonic() - began_s < 5
            if select.select([client], [], [], 0.1)[0]:
                break
        assert client.recv(1) == b""


@pytest.mark.parametrize(
    "octets",
    [b"", HALF_HELLO[:1], HALF_HELLO, client_hello()],
    ids=["nothing", "a byte", "half a hello", "a hello"],
)
def test_client_that_hangs_up_in_a_handshake_is_closed_at_once(
    octets: bytes, start: Callable[..., Process], files: Files
) -> None:
    process = start(*files.flags)
    for _ in range(3):
        open_plain(process.port, octets, 10).close()
        # The default of --request-timeout is ten seconds.
        wait_until(lambda: sockets_of(process) == 3, seconds=4)


@pytest.mark.parametrize("octets", [b"", HALF_HELLO], ids=["nothing", "half a hello"])
def test_200_silent_connections_delay_nobody(
    octets: bytes, start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    with open_plain(process.port, octets, 200):
        for _ in range(5):
            began_s = time.monotonic()
            assert ask_once(process.port, trust, check(alice)) == NOTHING
            # Blocked, it would take ten seconds.
            assert time.monotonic() - began_s < 2


def test_handshakes_of_a_source_are_limited_by_the_minute(
    clock: FakeClock, files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(rate=5), clock=clock.clock)
    with contextlib.closing(relay), serving(relay, tls=load_tls(*map(str, files))) as server:
        for _ in range(2):
            # Clients that say nothing are not counted.
            with open_plain(server.server_port, count=10):
                assert [ask_once(server.server_port, trust, check(alice)) for _ in range(5)] == [
                    NOTHING
                ] * 5
            for _ in range(3):
                with pytest.raises(OSError, match=r"(?i)eof|reset|aborted"):
                    Client(server.server_port, trust)
            with Client(server.server_port, trust, source="127.0.0.2") as other:
                assert other.post(check(alice)) == (200, NOTHING)
            clock.advance(60)


def test_handshakes_of_a_trusted_proxy_are_not_those_of_one_source(
    clock: FakeClock, files: Files, trust: ssl.SSLContext
) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(rate=2), clock=clock.clock)
    proxies = Networks(["127.0.0.1"])
    with (
        contextlib.closing(relay),
        serving(relay, tls=load_tls(*map(str, files)), proxies=proxies) as server,
    ):
        for _ in range(6):
            with Client(server.server_port, trust):
                pass


class MemoryClient:
    """A TLS client whose records are sent one by one."""

    def __init__(self, trust: ssl.SSLContext, connection: socket.socket) -> None:
        self.incoming, self.outgoing, self.connection = ssl.MemoryBIO(), ssl.MemoryBIO(), connection
        self.tls = trust.wrap_bio(self.incoming, self.outgoing, server_hostname=NAME)
        self.sent_bytes = 0

    def flush(self) -> int:
        """Send what there is to send, and return how many bytes that was."""
        octets = self.outgoing.read()
        self.connection.sendall(octets)
        self.sent_bytes += len(octets)
        return len(octets)

    def shake_hands(self, server: _TlsSocket) -> None:
        """Do a handshake with a server in the same thread."""
        waits = True
        while waits:
            try:
                self.tls.do_handshake()
                waits = False
            except ssl.SSLWantReadError:
                self.flush()
                server.shake_hands()
                self.incoming.write(self.connection.recv(65_536))
        self.flush()
        assert server.shake_hands() == 0


def test_tls_client_may_send_64_kib_more_than_8_times_its_plaintext(
    files: Files, trust: ssl.SSLContext
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        server, client = _TlsSocket(ours, load_tls(*map(str, files))), MemoryClient(trust, theirs)
        client.shake_hands(server)
        spare_bytes, said = TLS_SPARE_BYTES - client.sent_bytes, 0
        while True:
            client.tls.write(b"x")
            spare_bytes -= client.flush()
            if spare_bytes < 0:
                break
            assert server.recv(100) == b"x"
            spare_bytes += TLS_OVERHEAD
            said += 1
        with pytest.raises(ConnectionAbortedError):
            server.recv(100)
        # A request in records of one byte is no flood.
        assert said > 1_000


@pytest.mark.slow
def test_flood_of_small_records_is_cut_off(
    start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    with socket.create_connection(("127.0.0.1", process.port), 10) as connection:
        client = MemoryClient(trust, connection)
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        client.flush()
        client.incoming.write(connection.recv(65_536))
        while True:
            try:
                client.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.incoming.write(connection.recv(65_536))
        client.tls.write(b"POST / HTTP/1.1\r\nContent-Length: 131072\r\n\r\n")
        for _ in range(131_072):
            client.tls.write(b" ")
        # The relay resets the connection, sooner or later.
        with contextlib.suppress(OSError):
            client.flush()
            while octets := connection.recv(65_536):
                client.incoming.write(octets)
        client.incoming.write_eof()
        # The connection ends without a reply.
        assert client.tls.read(100) == b""
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    assert process.stop() == (0, "")


def test_handshake_over_the_rate_of_the_flag_is_closed(
    start: Callable[..., Process], files: Files, trust: ssl.SSLContext
) -> None:
    process = start("--rate", "5", *files.flags)
    refused = False
    # This is more than twice the limit, since a new minute may begin.
    for _ in range(11):
        try:
            with Client(process.port, trust):
                pass
        except OSError:
            refused = True
    assert refused
    assert process.stop() == (0, "")


def test_connection_limit_over_tls_answers_busy(
    start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start("--max-connections-per-source", "2", *files.flags)
    with Client(process.port, trust) as first, Client(process.port, trust) as second:
        for _ in range(3):
            with Client(process.port, trust) as third:
                third.socket.sendall(kept(json.dumps(check(alice)).encode()))
                # It ends with a close_notify.
                status, headers, body = parse_response(third.rest())
                assert (status, headers["retry-after"], json.loads(body)["error"]) == (
                    503,
                    "10",
                    "Busy",
                )
        assert first.post(check(alice)) == second.post(check(alice)) == (200, NOTHING)
    wait_until(lambda: ask_once(process.port, trust, check(alice)) == NOTHING)


def test_sigterm_ends_in_time_while_handshakes_hang(
    start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    with (
        open_plain(process.port, b"", 30),
        open_plain(process.port, HALF_HELLO, 30),
        open_plain(process.port, client_hello(), 30),
        Client(process.port, trust) as idle,
        Client(process.port, trust) as waiting,
    ):
        assert idle.post(check(alice)) == (200, NOTHING)
        waiting.socket.sendall(kept(json.dumps(check(alice, wait=60)).encode()))
        wait_until(lambda: gauge(process.port, "waiting_boxes", trust) == 1)
        began_s = time.monotonic()
        assert process.stop() == (0, "")
        assert time.monotonic() - began_s < 2
        assert json.loads(waiting.read()[2]) == NOTHING
        # Both end with a close_notify.
        assert idle.rest() == waiting.rest() == b""


def reset(port: int, octets: bytes) -> None:
    """Send some bytes and break the connection off."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(octets)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def distrust(port: int, _trust: ssl.SSLContext) -> None:
    """Refuse the relay's certificate."""
    Client(port, ssl.create_default_context())


def ask_and_reset(port: int, trust: ssl.SSLContext, octets: bytes) -> None:
    """Send something over TLS and break the connection off."""
    with Client(port, trust) as client:
        client.socket.sendall(octets)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("octets", [client_hello(), HALF_HELLO], ids=["a hello", "half a hello"])
def test_client_that_breaks_off_a_handshake_takes_no_thread_along(
    octets: bytes, start: Callable[..., Process], files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    process = start(*files.flags)
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    threads = threads_of(process)
    # There are fewer threads than this.
    for _ in range(40):
        reset(process.port, octets)
    wait_until(lambda: sockets_of(process) == 3, seconds=4)
    assert threads_of(process) == threads
    assert ask_once(process.port, trust, send(alice)) == OK
    assert process.stop() == (0, "")


FAILURES: Mapping[str, Callable[[int, ssl.SSLContext], object]] = {
    "plain HTTP": lambda port, _: exchange(port, http_request(b"{}")),
    "hang-up": lambda port, _: open_plain(port).close(),
    "half a hello": lambda port, _: open_plain(port, HALF_HELLO).close(),
    "a hello and a hang-up": lambda port, _: open_plain(port, client_hello()).close(),
    "reset": lambda port, _: reset(port, b""),
    "reset in a handshake": lambda port, _: reset(port, client_hello()),
    "reset in a request": lambda port, trust: ask_and_reset(port, trust, b"POST"),
    "reset while waiting": lambda port, trust: ask_and_reset(
        port, trust, kept(json.dumps(check(Owner(1), wait=60)).encode())
    ),
    "no trust": distrust,
    "413": lambda port, trust: ask_and_reset(port, trust, http_request(b" " * 300_000)),
    "no TLS": lambda port, _: exchange(port, b"\0" * 100),
}


@pytest.mark.parametrize(
    "flags",
    [(), ("--max-connections-per-source", "3"), ("--rate", "3")],
    ids=["by themselves", "at the connection limit", "over the rate"],
)
def test_connections_that_fail_leave_no_file_open(
    flags: tuple[str, ...],
    start: Callable[..., Process],
    files: Files,
    trust: ssl.SSLContext,
    alice: Owner,
) -> None:
    process = start(*flags, *files.flags)
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    # One listens, and two wake the loop.
    wait_until(lambda: sockets_of(process) == 3)
    for _ in range(5):
        for fail in FAILURES.values():
            with contextlib.suppress(OSError):
                fail(process.port, trust)
    wait_until(lambda: sockets_of(process) == 3)
    assert process.stop() == (0, "")


# ---------------------------------------------------------------------------------------
# Renewal: the files are read again on SIGHUP.
# ---------------------------------------------------------------------------------------

READ_AGAIN = "connectoid-relay: read the files again\n"


def reload(process: Process) -> str:
    """Send SIGHUP and return what is logged."""
    process.popen.send_signal(signal.SIGHUP)
    return next_line(process.popen)


def serial_at(port: int, trust: ssl.SSLContext) -> str:
    """Return which certificate a new connection gets."""
    with Client(port, trust) as client:
        return client.serial


def test_renewed_certificate_is_for_new_connections_and_open_ones_go_on(
    start: Callable[..., Process],
    files: Files,
    authority: Authority,
    trust: ssl.SSLContext,
    alice: Owner,
) -> None:
    process = start(*files.flags)
    with Client(process.port, trust) as opened, open_plain(process.port, HALF_HELLO):
        before = opened.serial
        for _ in range(2):
            files.become(authority.issue())
            assert reload(process) == READ_AGAIN
            after = serial_at(process.port, trust)
            assert after != before
            assert opened.post(check(alice)) == (200, NOTHING)
            before = after
    assert process.stop() == (0, "")


def spoil_with_other_key(files: Files, authority: Authority) -> None:
    """Give the key of another certificate."""
    files.key.write_bytes(authority.issue().key.read_bytes())


def spoil_with_passphrase(files: Files, authority: Authority) -> None:
    """Give a key that needs a passphrase."""
    files.become(authority.issue(passphrase=b"secret"))


def spoil_with_folder(path: Path) -> None:
    """Put a folder in a file's place: not even root can read it as a file."""
    path.unlink()
    path.mkdir()


MISTAKES: Mapping[str, tuple[Callable[[Files, Authority], object], str]] = {
    "another key": (spoil_with_other_key, "{key} is not the key of {certificate}"),
    "key with a passphrase": (spoil_with_passphrase, "without a passphrase"),
    "garbage as certificate": (
        lambda files, _: files.certificate.write_bytes(b"garbage"),
        "{certificate}",
    ),
    "garbage as key": (lambda files, _: files.key.write_bytes(b"garbage"), "{key}"),
    "binary certificate": (
        lambda files, _: files.certificate.write_bytes(b"\x30\x82\xff\0"),
        "{certificate}",
    ),
    "empty certificate": (lambda files, _: files.certificate.write_bytes(b""), "{certificate}"),
    "empty key": (lambda files, _: files.key.write_bytes(b""), "{key}"),
    "files mixed up": (
        lambda files, _: files.certificate.write_bytes(files.key.read_bytes()),
        "{certificate}",
    ),
    "key cut off": (lambda files, _: files.key.write_bytes(files.key.read_bytes()[:100]), "{key}"),
    "certificate cut off": (
        lambda files, _: files.certificate.write_bytes(files.certificate.read_bytes()[:200]),
        "{certificate}",
    ),
    "no certificate": (
        lambda files, _: files.certificate.unlink(),
        "{certificate}: No such file or directory",
    ),
    "no key": (lambda files, _: files.key.unlink(), "{key}: No such file or directory"),
    "certificate unreadable": (
        lambda files, _: spoil_with_folder(files.certificate),
        "{certificate}: ",
    ),
    "key unreadable": (lambda files, _: spoil_with_folder(files.key), "{key}: "),
}


def test_wrong_files_at_renewal_leave_the_old_certificate(
    start: Callable[..., Process],
    files: Files,
    authority: Authority,
    trust: ssl.SSLContext,
    alice: Owner,
) -> None:
    process = start(*files.flags)
    serial = serial_at(process.port, trust)
    for name, (spoil, words) in MISTAKES.items():
        files.become(authority.issue())
        spoil(files, authority)
        line = reload(process)
        assert words.format(**files._asdict()) in line, name
        assert line.endswith("; all stays as it was\n"), name
        assert serial_at(process.port, trust) == serial, name
        for path in files:
            if path.is_dir():
                path.rmdir()
    assert ask_once(process.port, trust, check(alice)) == NOTHING
    files.become(authority.issue())
    assert reload(process) == READ_AGAIN
    assert serial_at(process.port, trust) != serial
    assert process.stop() == (0, "")


def run_at_a_terminal(command: Sequence[str], cwd: Path) -> tuple[int, str, bytes]:
    """Run a program with a terminal; return its exit code, its stderr and what it asked there."""
    ours, its = pty.openpty()
    try:
        ran = subprocess.run(
            command,
            cwd=cwd,
            stdin=its,
            stdout=its,
            stderr=subprocess.PIPE,
            timeout=20,
            text=True,
            start_new_session=True,
            check=False,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        return (
            ran.returncode,
            ran.stderr,
            os.read(ours, 1000) if select.select([ours], [], [], 0)[0] else b"",
        )
    finally:
        os.close(ours)
        os.close(its)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_files_at_the_start_fail_with_one_line(
    mistake: str, files: Files, authority: Authority, tmp_path: Path
) -> None:
    spoil, words = MISTAKES[mistake]
    spoil(files, authority)
    code, log, asked = run_at_a_terminal([*RELAY, "--port", "0", *files.flags], tmp_path)
    assert (code, log.count("\n"), asked) == (1, 1, b"")
    assert words.format(**files._asdict()) in log
    assert not list(tmp_path.glob("connectoid.db*"))


def test_files_that_may_not_be_read_are_named(files: Files, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can become somebody else")
    # Other users cannot enter tmp_path.
    with tempfile.TemporaryDirectory() as path:
        public = Files(Path(path) / "fullchain.pem", Path(path) / "privkey.pem")
        public.become(files)
        public.key.chmod(0o600)
        os.chmod(path, 0o755)
        script = (
            "import connectoid_relay, encodings.utf_8_sig, os, sys;"
            "os.setgid(65534); os.setuid(65534);"
            "sys.exit(connectoid_relay.main())"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script, "--port", "0", *public.flags],
            cwd=tmp_path,
            timeout=20,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (
        1,
        f"connectoid-relay: {public.key}: Permission denied; give a file that the relay may read\n",
    )


def test_keys_and_certificate_change_together_or_not_at_all(
    start: Callable[..., Process],
    files: Files,
    authority: Authority,
    trust: ssl.SSLContext,
    alice: Owner,
) -> None:
    keys = files.key.with_name("keys.toml")
    keys.write_text("[public]\n")
    process = start("--keys", str(keys), *files.flags)
    serial = serial_at(process.port, trust)
    mine = check(alice, ext="mine")

    def rule() -> tuple[bool, bool]:
        public = ask_once(process.port, trust, check(alice)) == NOTHING
        assert ask_once(process.port, trust, mine)["ok"] is True
        return public, serial_at(process.port, trust) == serial

    assert rule() == (True, True)
    # A valid file, which keeps strangers out.
    keys.write_text('[keys.alice]\nkey = "mine"\n')
    files.certificate.write_bytes(b"garbage")
    assert str(files.certificate) in reload(process)
    assert rule() == (True, True)
    # The key is missing.
    keys.write_text("[keys.alice]\n")
    files.become(authority.issue())
    assert str(keys) in reload(process)
    assert rule() == (True, True)
    keys.write_text('[keys.alice]\nkey = "mine"\n')
    assert reload(process) == READ_AGAIN
    assert rule() == (False, False)
    assert process.stop() == (0, "")


# ---------------------------------------------------------------------------------------
# Under systemd: sockets that it holds, and what it is told.
# ---------------------------------------------------------------------------------------

# Pass on sockets as systemd does: as files 3, 4, ... of a process that LISTEN_PID names.
ACTIVATE = """
import fcntl, os, sys
numbers, pid, *command = sys.argv[1:]
copies = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 100) for number in numbers.split()]
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number)
os.environ.update(LISTEN_FDS=str(len(copies)), LISTEN_PID=pid or str(os.getpid()))
os.execv(command[0], command)
"""


def bound(
    kind: socket.SocketKind,
    port: int = 0,
    family: socket.AddressFamily = socket.AF_INET,
    host: str = "127.0.0.1",
) -> socket.socket:
    """Return a socket as systemd hands it over."""
    opened = socket.socket(family, kind)
    opened.bind((host, port))
    if kind == socket.SOCK_STREAM:
        opened.listen()
    return opened


@pytest.fixture
def activate(launch: Launch) -> Launch:
    """Return a function that starts a relay with sockets."""

    def activate_relay(
        sockets: Sequence[socket.socket], *flags: str, pid: str = ""
    ) -> subprocess.Popen[str]:
        numbers = [opened.fileno() for opened in sockets]
        return launch(
            [sys.executable, "-c", ACTIVATE, " ".join(map(str, numbers)), pid, *RELAY, *flags],
            pass_fds=numbers,
        )

    return activate_relay


@needs("systemd-socket-activate")
def test_systemd_s_own_tool_starts_the_relay_with_a_socket(launch: Launch, alice: Owner) -> None:
    port = free_port()
    popen = launch(["systemd-socket-activate", "-l", f"127.0.0.1:{port}", *RELAY, "--port", "1"])
    assert next_line(popen) == f"Listening on 127.0.0.1:{port} as 3.\n"
    # The connection starts the relay.
    with Client(port) as client:
        assert client.post(check(alice)) == (200, NOTHING)
        while not (line := next_line(popen)).startswith("connectoid"):
            # The tool logs other lines first.
            pass
        assert line == f"connectoid relay {__version__} listening on http://127.0.0.1:{port}\n"
        assert post(port, send(alice)) == (200, OK)
    assert end(popen) == (0, "")


@needs("systemd-socket-activate")
def test_systemd_s_own_tool_with_datagrams_alone_fails_with_one_line(launch: Launch) -> None:
    port = free_port()
    popen = launch(
        ["systemd-socket-activate", "--datagram", "-l", f"127.0.0.1:{port}", *RELAY, "--udp"]
    )
    next_line(popen)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"{}", ("127.0.0.1", port))
    _, log = popen.communicate(timeout=15)
    assert popen.returncode == 1
    (line,) = [line for line in log.splitlines() if line.startswith("connectoid")]
    assert line.startswith(f"connectoid-relay: {UNIT_MISTAKE}")
    assert "Traceback" not in log


def ask_datagram(port: int, request: object, host: str = "127.0.0.1") -> Any:
    """Ask over UDP and return the reply."""
    with socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM
    ) as client:
        client.settimeout(10)
        client.sendto(json.dumps(request).encode(), (host, port))
        return json.loads(client.recv(2048))


@pytest.mark.parametrize("datagram_first", [False, True])
def test_inherited_sockets_serve_http_and_udp(
    datagram_first: bool, activate: Launch, alice: Owner
) -> None:
    with bound(socket.SOCK_STREAM) as stream:
        port = stream.getsockname()[1]
        with bound(socket.SOCK_DGRAM, port) as datagram:
            both = [datagram, stream] if datagram_first else [stream, datagram]
            # The port and the host mean nothing here.
            popen = activate(both, "--udp", "--port", "1", "--host", "192.0.2.99")
            assert ready_port(popen) == port
            assert post(port, check(alice)) == (200, NOTHING)
            assert ask_datagram(port, check(alice)) == NOTHING
            assert post(port, send(alice)) == (200, OK)
            assert ask_datagram(port, check(alice)) == {"ok": True, "found": True}
            assert end(popen) == (0, "")


def test_inherited_socket_of_ipv6_serves_ipv4_too_and_https(
    activate: Launch, files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    with socket.socket(socket.AF_INET6) as stream:
        # systemd does this by default.
        stream.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        stream.bind(("", 0))
        stream.listen()
        popen = activate([stream], *files.flags)
        port = ready_port(popen)
        assert port == stream.getsockname()[1]
        assert ask_once(port, trust, check(alice)) == NOTHING
        assert end(popen) == (0, "")


def unix_socket() -> socket.socket:
    """Return a listening socket that the relay cannot use."""
    opened = socket.socket(socket.AF_UNIX)
    opened.bind(f"\0connectoid-{os.getpid()}-{random.random()}")
    opened.listen()
    return opened


def unheard_stream() -> socket.socket:
    """Return a stream that does not listen, like a connection of a unit with Accept=yes."""
    opened = socket.socket()
    opened.bind(("127.0.0.1", 0))
    return opened


STREAM, DATAGRAM = (
    functools.partial(bound, socket.SOCK_STREAM),
    functools.partial(bound, socket.SOCK_DGRAM),
)
UNIT_MISTAKE = "the socket unit must have one ListenStream= with a port, "


@pytest.mark.parametrize(
    ("makers", "flags", "words"),
    [
        ([STREAM, STREAM], [], UNIT_MISTAKE),
        ([STREAM, STREAM], ["--udp"], UNIT_MISTAKE),
        ([unix_socket], [], UNIT_MISTAKE),
        ([STREAM, unix_socket], [], UNIT_MISTAKE),
        ([DATAGRAM], ["--udp"], UNIT_MISTAKE),
        ([STREAM, DATAGRAM, DATAGRAM], ["--udp"], UNIT_MISTAKE),
        ([], [], UNIT_MISTAKE),
        ([unheard_stream], [], UNIT_MISTAKE),
        (
            [STREAM],
            ["--udp"],
            "--udp and --stun need a ListenDatagram= with the same port in the socket unit",
        ),
        (
            [STREAM],
            ["--stun"],
            "--udp and --stun need a ListenDatagram= with the same port in the socket unit",
        ),
    ],
)
def test_inherited_sockets_of_other_kinds_fail_with_one_line(
    makers: list[Callable[[], socket.socket]],
    flags: list[str],
    words: str,
    activate: Launch,
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        popen = activate([stack.enter_context(make()) for make in makers], *flags)
        _, log = popen.communicate(timeout=15)
    assert (popen.returncode, log.count("\n")) == (1, 1)
    assert log.startswith(f"connectoid-relay: {words}")
    assert not list(tmp_path.glob("connectoid.db*"))


def test_sockets_meant_for_another_process_are_left_alone(activate: Launch, alice: Owner) -> None:
    with bound(socket.SOCK_STREAM) as stream:
        popen = activate([stream], "--port", "0", "--host", "127.0.0.1", pid=str(os.getpid()))
        port = ready_port(popen)
        assert port != stream.getsockname()[1]
        assert post(port, check(alice)) == (200, NOTHING)
        assert end(popen) == (0, "")


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_restart_on_an_inherited_socket_loses_no_connection(
    secure: bool, activate: Launch, files: Files, trust: ssl.SSLContext, alice: Owner
) -> None:
    flags = files.flags if secure else ()
    with bound(socket.SOCK_STREAM) as stream, ThreadPoolExecutor(10) as pool:
        port = stream.getsockname()[1]
        popen = activate([stream], *flags)
        assert ready_port(popen) == port
        for _ in range(2):
            assert end(popen) == (0, "")
            asked = [
                pool.submit(ask_once, port, trust if secure else None, check(alice))
                for _ in range(10)
            ]
            wait_until(lambda: waiting_in_the_kernel(port) == 10)
            assert not any(each.done() for each in asked)
            popen = activate([stream], *flags)
            assert ready_port(popen) == port
            assert [each.result(15) for each in asked] == [NOTHING] * 10
        assert end(popen) == (0, "")


def waiting_in_the_kernel(port: int) -> int:
    """Return how many connections wait to be accepted: the receive queue of a listening socket."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if state == "0A" and int(local.partition(":")[2], 16) == port:
            return int(queues.partition(":")[2], 16)
    return 0


class Systemd:
    """Receive what the relay tells systemd."""

    def __init__(self, opened: socket.socket, name: str) -> None:
        self._socket, self.name = opened, name
        opened.settimeout(10)

    def hear(self) -> str:
        """Return the next message."""
        return self._socket.recv(1000).decode()

    def heard(self) -> list[str]:
        """Return the messages that have arrived."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            found.append(self.hear())
        return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest) -> Iterator[Systemd]:
    """Return a fake systemd that listens on a NOTIFY_SOCKET."""
    # The path of tmp_path is too long for a socket.
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened,
    ):
        name = f"{folder}/notify" if request.param == "path" else f"@connectoid{folder}"
        opened.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        yield Systemd(opened, name)


def without_systemd(**more: str) -> dict[str, str]:
    """Return this process's environment without systemd's variables, and with more."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    } | more


def test_systemd_is_told_when_the_relay_is_ready_and_when_it_stops(
    systemd: Systemd, launch: Launch, alice: Owner
) -> None:
    port = free_port()
    popen = launch([*RELAY, "--port", str(port)], env=without_systemd(NOTIFY_SOCKET=systemd.name))
    assert systemd.hear() == "READY=1"
    with Client(port) as client:
        assert client.post(check(alice)) == (200, NOTHING)
        client.socket.sendall(kept(json.dumps(check(alice, wait=60)).encode()))
        wait_until(lambda: gauge(port, "waiting_boxes") == 1)
        # The relay sends no WATCHDOG=1 unless systemd asks for it.
        assert systemd.heard() == []
        popen.send_signal(signal.SIGTERM)
        assert systemd.hear() == "STOPPING=1"
    assert ready_port(popen) == port
    assert (popen.wait(10), popen.communicate()[1], systemd.heard()) == (0, "", [])


def test_systemd_is_not_told_ready_by_a_relay_that_cannot_start(
    systemd: Systemd, launch: Launch
) -> None:
    popen = launch(
        [*RELAY, "--port", "0", "--db", "no/such/folder"],
        env=without_systemd(NOTIFY_SOCKET=systemd.name),
    )
    assert popen.wait(15) == 1
    assert systemd.heard() == []


@pytest.mark.parametrize("name", ["/no/such/socket", "@nobody-hears-this", "relative", "@"])
def test_nobody_to_be_told_is_no_harm(
    name: str, start: Callable[..., Process], alice: Owner
) -> None:
    process = start(env=without_systemd(NOTIFY_SOCKET=name, WATCHDOG_USEC="400000"))
    assert post(process.port, check(alice)) == (200, NOTHING)
    assert process.stop() == (0, "")


def test_watchdog_is_told_at_about_half_of_its_time(systemd: Systemd, launch: Launch) -> None:
    launch(
        [*RELAY, "--port", "0"],
        env=without_systemd(NOTIFY_SOCKET=systemd.name, WATCHDOG_USEC="400000"),
    )
    assert systemd.hear() == "READY=1"
    times_s = []
    for _ in range(7):
        assert systemd.hear() == "WATCHDOG=1"
        times_s.append(time.monotonic())
    assert 0.15 < (times_s[-1] - times_s[0]) / 6 < 0.4


def test_watchdog_is_told_no_sooner_than_half_of_its_time(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.name)
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    beat = build_watchdog(clock.clock.monotonic_us)
    heard = []
    for seconds in (0, 0, 4.999, 0.001, 0.25, 4.5, 0.25, 100, 0):
        clock.advance(seconds)
        beat()
        heard.append(len(systemd.heard()))
    assert heard == [1, 0, 0, 1, 0, 0, 1, 1, 0]


def test_watchdog_that_is_not_asked_for_is_not_told(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.name)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    beat = build_watchdog(clock.clock.monotonic_us)
    for _ in range(10):
        beat()
        clock.advance(1_000)
    assert systemd.heard() == []


def test_watchdog_is_told_of_the_loop_alone(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, relay: Relay, clock: FakeClock
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.name)
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    go_on = threading.Event()
    with serving(relay, on_tick=build_watchdog()) as server:
        assert [systemd.hear() for _ in range(2)] == ["WATCHDOG=1"] * 2
        # The sweeper is late. /health says so, and a restart would not help.
        clock.advance(3_600)
        systemd.heard()
        assert systemd.hear() == "WATCHDOG=1"
        stuck = threading.Event()

        def get_stuck() -> None:
            stuck.set()
            go_on.wait(10)

        server.soon(get_stuck)
        assert stuck.wait(10)
        systemd.heard()
        # Three beats would have come in this time.
        assert not go_on.wait(0.8)
        assert systemd.heard() == []
        go_on.set()
        assert systemd.hear() == "WATCHDOG=1"


# ---------------------------------------------------------------------------------------
# WSGI: checked by wsgiref's validator and compared with our own server, then in others.
# ---------------------------------------------------------------------------------------

Application: TypeAlias = Callable[..., Any]


def call(
    application: Application, method: str, path: str, body: bytes = b"", **environ: str | None
) -> Response:
    """Call an application, through the validator, and return its reply."""
    given: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "QUERY_STRING": "",
        "REMOTE_ADDR": "127.0.0.1",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
    } | environ
    given = {name: value for name, value in given.items() if value is not None}
    setup_testing_defaults(given)
    began: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], _error: object = None
    ) -> Callable[[bytes], object]:
        began.append((status, headers))
        return lambda _octets: None

    # Otherwise the validator itself fails.
    valid = re.fullmatch("[0-9]*", given.get("CONTENT_LENGTH", ""), re.ASCII)
    parts: Any = (validator(application) if valid else application)(given, start_response)
    try:
        reply = b"".join(parts)
    finally:
        if valid:
            parts.close()
    ((status, headers),) = began
    assert len({name for name, _ in headers}) == len(headers)
    return int(status.split()[0]), {name.lower(): value for name, value in headers}, reply


def post_to(application: Application, request: object, **environ: str) -> tuple[int, Any]:
    """Post a JSON request to an application."""
    status, _, reply = call(application, "POST", "/", json.dumps(request).encode(), **environ)
    return status, json.loads(reply)


class Ask(NamedTuple):
    """A request to both faces of a relay."""

    method: str
    path: str = "/"
    body: bytes = b""
    length: str | None = None
    accept: str = "*/*"


ALICE = Owner(1)
REQUESTS: Mapping[str, Ask] = {
    "document": Ask("GET", accept="application/json"),
    "page": Ask("GET", accept="text/html"),
    "query": Ask("GET", "/?x=y", accept="application/json"),
    "head of the document": Ask("HEAD", accept="application/json"),
    "head of the page": Ask("HEAD"),
    "health": Ask("GET", "/health"),
    "head of health": Ask("HEAD", "/health"),
    "metrics": Ask("GET", "/metrics"),
    "head of metrics": Ask("HEAD", "/metrics"),
    "options": Ask("OPTIONS"),
    "options of health": Ask("OPTIONS", "/health"),
    "options of nothing": Ask("OPTIONS", "/nothing"),
    "nothing": Ask("GET", "/nothing"),
    "head of nothing": Ask("HEAD", "/nothing"),
    "post to nothing": Ask("POST", "/nothing", b"{}"),
    "odd path": Ask("GET", "//health"),
    "put": Ask("PUT", "/", b"{}"),
    "delete": Ask("DELETE"),
    "post to health": Ask("POST", "/health", b"{}"),
    "post to metrics": Ask("POST", "/metrics"),
    "check": Ask("POST", "/", json.dumps(check(ALICE)).encode()),
    "check of nothing new": Ask("POST", "/", json.dumps(check(ALICE, at=2**62)).encode()),
    "batch": Ask("POST", "/", json.dumps([check(ALICE), check(Owner(2)), 1]).encode()),
    "send": Ask("POST", "/", json.dumps(send(ALICE)).encode()),
    "send too much": Ask("POST", "/", json.dumps(send(ALICE, "A" * (MAX_DATA_CHARS + 1))).encode()),
    "wrong answer": Ask("POST", "/", json.dumps(receive(ALICE, "A" * 43)).encode()),
    "no JSON": Ask("POST", "/", b"\xff"),
    "no body": Ask("POST"),
    "largest body": Ask("POST", "/", json.dumps(check(ALICE)).encode().ljust(131_072)),
    "body too large": Ask("POST", "/", b" " * 131_073),
    "get with a body": Ask("GET", "/health", b"{}"),
    "get with a body too large": Ask("GET", "/health", b" " * 131_073),
    "length too large": Ask("POST", "/", b"", "999999999"),
    "length far too large": Ask("POST", "/", b"", "9999999999"),
    "negative length": Ask("POST", "/", b"", "-1"),
    "signed length": Ask("POST", "/", b"", "+2"),
    "no number as length": Ask("POST", "/", b"", "0x2"),
    "lengths": Ask("POST", "/", b"", "2,2"),
    "foreign digits": Ask("POST", "/", b"", "\xb2"),
    "spaced length": Ask("POST", "/", b"", "2 2"),
}


class Both(NamedTuple):
    """One relay with two faces: a server and an application."""

    port: int
    application: Application


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    """Return a relay on a port and as an application.

    Its clock stands still, so its questions stay the same.
    """
    relay = Relay(SqliteStore(":memory:"), clock=FakeClock().clock)
    relay.handle(send(ALICE), "192.0.2.1")
    with serving(relay) as server:
        yield Both(server.server_port, wsgi(relay))


@pytest.mark.parametrize("name", REQUESTS)
def test_wsgi_answers_as_the_server_does(name: str, both: Both) -> None:
    ask = REQUESTS[name]
    length = str(len(ask.body)) if ask.length is None else ask.length
    with Client(both.port) as client:
        client.socket.sendall(
            f"{ask.method} {ask.path} HTTP/1.1\r\nHost: x\r\nAccept: {ask.accept}\r\n".encode()
            + b"Content-Length: %s\r\n\r\n" % length.encode("latin-1")
            + ask.body
        )
        expected = client.read(body=ask.method != "HEAD")
    path, _, query = ask.path.partition("?")
    given = call(
        both.application,
        ask.method,
        path,
        ask.body,
        QUERY_STRING=query,
        HTTP_ACCEPT=ask.accept,
        CONTENT_LENGTH=length,
    )
    expected[1].pop("connection", None)
    # These two tell of the other requests.
    if name.endswith(("metrics", "page")):
        expected, given = (
            (status, headers | {"content-length": ""}, b"")
            for status, headers, _ in (expected, given)
        )
    assert given == expected


def test_wsgi_takes_a_missing_or_empty_length_as_none(relay: Relay) -> None:
    application = wsgi(relay)
    for given in ({"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": None}):
        status, _, reply = call(application, "POST", "/", b'{"not": "read"}', **given)
        assert (status, json.loads(reply)["error"]) == (400, "Bad request")
        assert call(application, "GET", "/health", **given)[0] == 200


def test_wsgi_says_too_often_as_the_server_does(clock: FakeClock, alice: Owner) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(rate=2), clock=clock.clock)
    with contextlib.closing(relay), serving(relay) as server:
        application = wsgi(relay)
        assert (
            post_to(application, check(alice))
            == post(server.server_port, check(alice))
            == (200, NOTHING)
        )
        body = json.dumps(check(alice)).encode()
        with Client(server.server_port) as client:
            status, headers, reply = call(application, "POST", "/", body)
            assert (status, headers["retry-after"]) == (429, str(json.loads(reply)["retry"]))
            assert (status, headers, reply) == client.ask(kept(body))


def test_wsgi_does_not_wait(relay: Relay, alice: Owner) -> None:
    began_s = time.monotonic()
    assert post_to(wsgi(relay), check(alice, wait=60)) == (200, NOTHING)
    assert post_to(wsgi(relay), [check(alice, wait=60)]) == (200, [NOTHING])
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "counted"),
    [
        ("127.0.0.1", "192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "198.51.100.9, 192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "192.0.2.7, 10.1.2.3", "192.0.2.7"),
        ("192.0.2.7", "198.51.100.9", "192.0.2.7"),
        ("192.0.2.7", "", "192.0.2.7"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "junk", "127.0.0.1"),
        ("127.0.0.1", "192.0.2.7, junk", "127.0.0.1"),
        ("", "192.0.2.7", ""),
    ],
)
def test_wsgi_believes_trusted_proxies_alone(
    peer: str, forwarded_for: str, counted: str, clock: FakeClock, alice: Owner
) -> None:
    relay = Relay(SqliteStore(":memory:"), Limits(rate=1), clock=clock.clock)
    with contextlib.closing(relay):
        application = wsgi(relay, Networks(["127.0.0.0/8", "10.0.0.0/8"]))
        assert relay.handle(check(alice), counted)[0] == 200
        assert (
            post_to(
                application, check(alice), REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=forwarded_for
            )[0]
            == 429
        )
        assert (
            post_to(
                application, check(alice), REMOTE_ADDR="203.0.113.5", HTTP_X_FORWARDED_FOR=counted
            )[0]
            == 200
        )


def test_wsgi_works_below_a_prefix(relay: Relay, alice: Owner) -> None:
    application = wsgi(relay)
    body = json.dumps(check(alice)).encode()
    for path in ("", "/"):
        assert json.loads(call(application, "POST", path, body, SCRIPT_NAME="/relay")[2]) == NOTHING
    assert call(application, "GET", "/health", SCRIPT_NAME="/relay")[0] == 200
    assert call(application, "GET", "/relay", SCRIPT_NAME="/relay")[0] == 404


def test_wsgi_in_a_forked_child_says_what_to_do(tmp_path: Path) -> None:
    script = """
import os
from connectoid_relay import Relay, SqliteStore, wsgi
application = wsgi(Relay(SqliteStore("connectoid.db")))
child = os.fork()
if not child:
    try:
        application({}, None)
    except RuntimeError as error:
        os._exit(7 if "--preload" in str(error) else 8)
    os._exit(9)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=20,
        check=False,
    )
    assert ran.returncode == 7


def write_application(folder: Path) -> None:
    """Write app.py of the docs beside a copy of the relay.

    For the tests alone, a header names the process.
    """
    shutil.copy(ROOT / "connectoid_relay.py", folder)
    (folder / "app.py").write_text(
        fenced("python", "wsgi(")
        + """
import os
relay = application

def application(environ, start_response):
    def start(status, headers):
        return start_response(status, [*headers, ("X-Worker", str(os.getpid()))])

    return relay(environ, start)
"""
    )


def ask_worker(port: int, request: object) -> tuple[Any, str]:
    """Post a request on a connection of its own; return the reply and which process gave it."""
    with Client(port) as client:
        _, headers, body = client.ask(http_request(json.dumps(request).encode()))
        return json.loads(body), headers["x-worker"]


@pytest.mark.slow
def test_gunicorn_with_two_workers_serves_one_file(launch: Launch, tmp_path: Path) -> None:
    pytest.importorskip("gunicorn", reason="gunicorn is missing: pip install gunicorn")
    write_application(tmp_path)
    command = re.search(r"`gunicorn (--workers 2 [^`]*)`", EMBEDDING)
    assert command
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        popen = launch(
            [
                sys.executable,
                "-m",
                "gunicorn",
                "--bind",
                f"127.0.0.1:{port}",
                *shlex.split(command[1]),
            ],
            stderr=log,
        )
    wait_until(lambda: answers(port))

    def deliver(number: int) -> tuple[str, str]:
        owner, sealed = Owner(1_000 + number), f"AAAA{number}".ljust(10, "A")
        reply, sender = ask_worker(port, send(owner, sealed))
        assert reply == OK
        reply, checker = ask_worker(port, check(owner))
        received, receiver = ask_worker(port, receive(owner, owner.open(reply["question"])))
        assert received["data"] == sealed
        return (sender, receiver) if checker == sender else (sender, checker)

    crossed, numbers, deadline_s = 0, itertools.count(), time.monotonic() + 20
    with ThreadPoolExecutor(8) as pool:
        while crossed < 5:
            assert time.monotonic() < deadline_s, "one of them does all the work"
            crossed += sum(
                one != other for one, other in pool.map(deliver, itertools.islice(numbers, 16))
            )
    assert end(popen)[0] == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_waitress_serves(launch: Launch, tmp_path: Path, alice: Owner) -> None:
    pytest.importorskip("waitress", reason="waitress is missing: pip install waitress")
    write_application(tmp_path)
    port = free_port()
    popen = launch(
        [sys.executable, "-m", "waitress", f"--listen=127.0.0.1:{port}", "app:application"],
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: answers(port))
    serve_all(functools.partial(Client, port), alice)
    _, log = end(popen, signal.SIGINT)
    assert "Traceback" not in log


def serve_all(connect: Callable[[], Client], alice: Owner) -> None:
    """Use every route of a relay, on one connection."""
    with connect() as client:
        assert client.post(check(alice)) == (200, NOTHING)
        status, headers, reply = client.ask(
            kept(json.dumps(send(alice, "vttf66efd34d")).encode().ljust(131_072))
        )
        assert (status, json.loads(reply), headers["access-control-allow-origin"]) == (200, OK, "*")
        answer = alice.open(client.post(check(alice))[1]["question"])
        assert client.post(receive(alice, answer))[1]["data"] == "vttf66efd34d"
        assert client.ask(kept(method="GET", path="/health"))[0] == 200

    def ask(body: bytes = b"", *headers: str, method: str = "POST", path: str = "/") -> Response:
        with connect() as client:
            client.socket.sendall(kept(body, *headers, method=method, path=path))
            return client.read(body=method != "HEAD")

    status, headers, reply = ask(b"", "Accept: application/json", method="GET")
    assert (status, json.loads(reply)["version"], headers["vary"]) == (200, __version__, "Accept")
    status, headers, _ = ask(method="HEAD")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    status, headers, _ = ask(method="OPTIONS")
    assert (status, headers["access-control-allow-methods"]) == (204, "GET, POST, OPTIONS")
    status, _, reply = ask(method="GET", path="/nothing")
    assert (status, json.loads(reply)["error"]) == (404, "Not found")
    status, headers, _ = ask(method="DELETE")
    assert (status, headers["allow"]) == (405, "GET, HEAD, POST, OPTIONS")
    for size in (131_073, 200_000):
        status, headers, reply = ask(json.dumps(check(alice)).encode().ljust(size))
        assert (status, json.loads(reply)["error"]) == (413, "Too big")
        assert headers["access-control-allow-origin"] == "*"


# ---------------------------------------------------------------------------------------
# Behind nginx and Caddy, with the configuration of docs/hosting.md.
# ---------------------------------------------------------------------------------------

FLAGS = re.findall(r"\bFLAGS=(.*--trusted-proxy.*)' \|", HOSTING)
LIVE = f"/etc/letsencrypt/live/{NAME}"
NGINX = """
user root;
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{site}
}}
"""
CADDY = """{{
	admin off
	http_port {http_port}
	auto_https disable_redirects
}}
{site}"""


def configure_nginx(folder: Path, port: int, relay_port: int, files: Files) -> list[str]:
    """Write the docs' configuration for nginx and return the command that runs it."""
    site = replace(
        fenced("nginx"),
        {
            f"{LIVE}/fullchain.pem": files.certificate,
            f"{LIVE}/privkey.pem": files.key,
            "127.0.0.1:8080": f"127.0.0.1:{relay_port}",
            " 443 ssl": f" {port} ssl",
            ":443 ssl": f":{port} ssl",
        },
    )
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, site=site))
    command = [
        "/usr/sbin/nginx",
        "-e",
        "stderr",
        "-p",
        str(folder),
        "-c",
        str(folder / "nginx.conf"),
    ]
    ran = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=20, check=True)
    # nginx marks what it complains of: [warn], [emerg], ...
    assert "[" not in ran.stderr
    return command


def configure_caddy(folder: Path, port: int, relay_port: int, files: Files) -> list[str]:
    """Write the docs' configuration for Caddy and return the command that runs it."""
    written = fenced("caddyfile")
    site = replace(
        written,
        {
            f"{NAME} {{\n": f"https://{NAME}:{port} {{\n\ttls {files.certificate} {files.key}\n",
            "127.0.0.1:8080": f"127.0.0.1:{relay_port}",
        },
    )
    (folder / "Caddyfile").write_text(CADDY.format(http_port=free_port(), site=site))
    (folder / "docs.caddyfile").write_text(written)
    formatted = subprocess.run(
        ["caddy", "fmt", str(folder / "docs.caddyfile")],
        capture_output=True,
        text=True,
        timeout=20,
        env=at_home(folder),
        check=False,
    )
    assert formatted.stdout == written
    command = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    subprocess.run(
        ["caddy", "validate", *command[2:]],
        env=at_home(folder),
        capture_output=True,
        timeout=20,
        check=True,
    )
    return command


def at_home(folder: Path) -> dict[str, str]:
    """Return an environment in which a program writes to one folder alone."""
    return os.environ | {
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }


PROXIES: Mapping[str, Callable[[Path, int, int, Files], list[str]]] = {
    "nginx": configure_nginx,
    "caddy": configure_caddy,
}
Connect: TypeAlias = Callable[..., Client]
Front: TypeAlias = Callable[[int], Connect]


@pytest.fixture(params=[pytest.param(name, marks=needs(name)) for name in PROXIES])
def front(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    files: Files,
    trust: ssl.SSLContext,
    launch: Launch,
) -> Front:
    """Return a function that starts a proxy before a relay's port.

    The function returns how to connect to the proxy.
    """

    def start_front(relay_port: int) -> Connect:
        port = free_port()
        with (tmp_path / "proxy.log").open("w") as log:
            launch(
                PROXIES[request.param](tmp_path, port, relay_port, files),
                stderr=log,
                env=at_home(tmp_path),
            )
        wait_until(lambda: answers(port, trust))
        return functools.partial(Client, port, trust)

    return start_front


@pytest.fixture
def behind(start: Callable[..., Process]) -> Callable[..., Process]:
    """Return a function that starts a relay with the docs' flags for a relay behind a proxy.

    Unlike there, it trusts one address of this machine alone: here clients have the others.
    """
    assert len(FLAGS) == 1
    assert HOSTING.count("The flags are those for Caddy.") == 1
    flags = replace(FLAGS[0], {"127.0.0.0/8": "127.0.0.1/32", "8080": "0"})
    return functools.partial(start, *shlex.split(flags))


@pytest.mark.slow
def test_proxy_passes_everything_on(
    front: Front, behind: Callable[..., Process], alice: Owner
) -> None:
    process = behind()
    serve_all(front(process.port), alice)
    assert process.stop() == (0, "")


@pytest.mark.slow
def test_long_poll_through_a_proxy_is_woken_by_a_send(
    front: Front, behind: Callable[..., Process], alice: Owner
) -> None:
    process = behind()
    connect = front(process.port)
    with connect() as waiting, connect() as sender:
        # This also reads what TLS sends after the handshake.
        assert waiting.post(check(alice)) == (200, NOTHING)
        waiting.socket.sendall(kept(json.dumps(check(alice, wait=60)).encode()))
        wait_until(lambda: gauge(process.port, "waiting_boxes") == 1)
        # The request is held for at least this long.
        assert select.select([waiting.socket], [], [], 3)[0] == []
        began_s = time.monotonic()
        assert sender.post(send(alice)) == (200, OK)
        assert json.loads(waiting.read()[2])["found"]
        assert time.monotonic() - began_s < 2


@pytest.mark.slow
def test_client_that_hangs_up_at_a_proxy_leaves_its_place(
    front: Front, behind: Callable[..., Process], alice: Owner
) -> None:
    process = behind()
    with front(process.port)() as waiting:
        waiting.socket.sendall(kept(json.dumps(check(alice, wait=60)).encode()))
        wait_until(lambda: gauge(process.port, "waiting_boxes") == 1)
    wait_until(lambda: gauge(process.port, "waiting_boxes") == 0)


@pytest.mark.slow
def test_clients_behind_a_proxy_are_told_apart_and_cannot_forge(
    front: Front, behind: Callable[..., Process], alice: Owner
) -> None:
    process = behind("--rate", "40")
    connect = front(process.port)
    numbers = itertools.count(1)

    def ask(client: Client, *headers: str) -> int:
        return client.post(check(alice), *headers)[0]

    def spend(client: Client, *headers: str) -> bool:
        # Three minutes' worth: one of the minutes may end meanwhile.
        return any(
            ask(client, *(header.format(next(numbers)) for header in headers)) == 429
            for _ in range(120)
        )

    forged = "X-Forwarded-For: 198.51.100.{}"
    with (
        connect(source="127.0.0.2") as second,
        connect(source="127.0.0.3") as third,
        Client(process.port, source="127.0.0.4") as direct,
    ):
        assert spend(second)
        assert ask(third) == 200
        # The request counts for the third client.
        assert ask(third, "X-Forwarded-For: 127.0.0.2") == 200
        assert spend(second, forged)
        # Two headers.
        assert spend(second, forged, "X-Forwarded-For: 203.0.113.{}")
        # A client that bypasses the proxy is not believed.
        assert spend(direct, forged)
        assert ask(third) == 200


class Counting(RelayServer):
    """Count the connections."""

    connections = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count one more connection."""
        self.connections += 1
        super().process_request(request, client_address)


@pytest.mark.slow
def test_proxy_uses_its_connections_for_several_clients(
    front: Front, relay: Relay, alice: Owner
) -> None:
    server = Counting(("127.0.0.1", 0), relay, proxies=Networks(["127.0.0.1/32"]))
    with running(server):
        connect = front(server.server_port)
        before = server.connections
        for number in range(20):
            with connect(source=f"127.0.0.{2 + number}") as client:
                assert client.post(check(alice)) == client.post(check(alice)) == (200, NOTHING)
        # The proxy may open another connection while one is still being put back.
        assert server.connections - before <= 2


@pytest.mark.slow
def test_proxy_is_one_source_for_its_connections_and_its_clients_are_not(
    front: Front, behind: Callable[..., Process], alice: Owner
) -> None:
    process = behind("--max-connections-per-source", "4")
    connect = front(process.port)
    with contextlib.ExitStack() as stack:
        waiting = [
            stack.enter_context(connect(source=f"127.0.0.{2 + number}")) for number in range(12)
        ]
        for client in waiting:
            client.socket.sendall(kept(json.dumps(check(alice, wait=60)).encode()))
        wait_until(lambda: gauge(process.port, "waiting_boxes") == 12)
        with connect() as sender:
            assert sender.post(send(alice)) == (200, OK)
        assert all(json.loads(client.read()[2])["found"] for client in waiting)


@pytest.mark.slow
def test_restart_behind_a_proxy_is_over_with_the_relay_s_start(
    front: Front, behind: Callable[..., Process], alice: Owner
) -> None:
    port = str(free_port())
    process = behind("--port", port)
    connect = front(process.port)
    with connect() as client, ThreadPoolExecutor(4) as pool:
        assert client.post(send(alice)) == (200, OK)
        for _ in range(3):
            assert process.stop() == (0, "")
            process = behind("--port", port)
            replies = [pool.submit(client_post, connect, check(alice)) for _ in range(4)]
            done, _ = concurrent.futures.wait(replies, 15)
            assert [reply.result()[0] for reply in done] == [200] * 4
            assert client.post(check(alice))[1]["found"]


def client_post(connect: Connect, request: object) -> tuple[int, Any]:
    """Post a request on a connection of its own."""
    with connect() as client:
        return client.post(request)


def test_log_has_levels_for_journald_and_none_for_people(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for told, first in ((True, "<6>connectoid relay "), (False, "connectoid relay ")):
        with log.open("w") as stderr:
            status = os.fstat(stderr.fileno())
            stream = f"{status.st_dev}:{status.st_ino if told else 0}"
            process = subprocess.Popen(
                [*RELAY, "--port", "0", "--db", ":memory:"],
                stderr=stderr,
                env={**os.environ, "JOURNAL_STREAM": stream},
            )
            wait_until(lambda: "listening on" in log.read_text())
            process.terminate()
            assert process.wait(10) == 0
        assert log.read_text().startswith(first)


def test_error_has_its_level_for_journald(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stderr:
        status = os.fstat(stderr.fileno())
        finished = subprocess.run(
            [*RELAY, "--port", "0", "--db", "/nowhere/relay.db"],
            stderr=stderr,
            check=False,
            env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )
    assert finished.returncode == 1
    assert (
        (tmp_path / "log")
        .read_text()
        .startswith("<3>connectoid-relay: /nowhere/relay.db: No such file")
    )
