"""HTTP to relays: proxies, certificates, connections that were kept, and a missing package."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from apps import NOWHERE, SOON_S, FakeRelay, http_reply
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from harness import ROOT, serving

from connectoid import Connectoid, Store, UsageError
from connectoid.cli.command_line import main
from connectoid.http_transport import (
    JSON,
    MAX_HEAD_BYTES,
    MAX_INTERIM_REPLIES,
    MAX_LINE_BYTES,
    BoundedRead,
    BoundedReceive,
    ReplyError,
    make_session,
    type_of,
    words_of,
)
from connectoid.links import Mailbox
from connectoid.relay_client import (
    MAX_SEND_REPLY_BYTES,
    RelayClient,
    RelayError,
    make_transport,
)
from connectoid.thrifty_tls import make_context
from connectoid_relay import Relay, load_tls

ANSWER = {"ok": True, "from": "the fake"}
# A name that nobody but a proxy finds.
PROXIED_HOST = "relay.invalid"


async def ask(url: str, ca_file: str | None = None) -> object:
    """Return what a relay says to a request."""
    transport = make_transport(ca_file)
    try:
        return await RelayClient(url, transport, timeout_s=SOON_S).ask({"action": "send"})
    finally:
        await transport.close()


def test_client_uses_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are the proxy's business then; hosts of `no_proxy` are asked directly."""
    with FakeRelay(lambda _: http_reply(ANSWER)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert asyncio.run(ask("http://relay.invalid/")) == ANSWER
        with pytest.raises(RelayError, match="Connection refused"):
            asyncio.run(ask(NOWHERE))


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return what sets the environment, which names no proxy yet."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return monkeypatch


def refusal_of(url: str, ca_file: str | None = None) -> str:
    """Return why a relay cannot be reached."""
    with pytest.raises(RelayError) as caught:
        asyncio.run(ask(url, ca_file))
    return str(caught.value).removeprefix(f"{url} cannot be reached: ")


def test_refusal_of_a_proxy_does_not_tell_its_password(no_proxies: pytest.MonkeyPatch) -> None:
    """The error goes into the log, and into that of a wait for a contact."""
    with FakeRelay(lambda _: http_reply(b"", status="407 Who are you?")) as proxy:
        secret = proxy.url.replace("//", "//alice:hunter2@")
        no_proxies.setenv("https_proxy", secret)
        no_proxies.setenv("http_proxy", secret)
        for url in ("https://relay.invalid/", "http://relay.invalid/"):
            assert refusal_of(url) == "the proxy refuses (407)."


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
def test_proxy_needs_no_scheme_and_may_be_that_of_all(
    no_proxies: pytest.MonkeyPatch, name: str,
) -> None:
    """As for other programs."""
    with FakeRelay(lambda _: http_reply(ANSWER)) as proxy:
        no_proxies.setenv(name, proxy.url.removeprefix("http://"))
        assert asyncio.run(ask("http://relay.invalid/")) == ANSWER


@pytest.mark.parametrize("reply", [b"rubbish\r\n\r\n", b""], ids=str)
def test_proxy_on_the_way_is_named_where_its_reply_is_none(
    no_proxies: pytest.MonkeyPatch, reply: bytes,
) -> None:
    """Without its password. The relay is not to blame."""
    with FakeRelay(lambda _: reply) as proxy:
        no_proxies.setenv("http_proxy", proxy.url.replace("//", "//alice:hunter2@"))
        place = proxy.url.removeprefix("http://").rstrip("/")
        said = refusal_of("http://relay.invalid/")
    assert said.endswith(f"; the environment names a proxy for it, {place}.")
    assert "hunter2" not in said


BAD_PROXIES = {
    NOWHERE: "the proxy cannot be reached: Connection refused.",
    "socks5://alice:hunter2@127.0.0.1:9":
        "the environment names a proxy of the kind socks5, not http or https.",
    "http://alice:hunter2@[": "the environment names a proxy with a damaged URL.",
    "http://alice:hunter2@127.0.0.1:99999": "the environment names a proxy with a damaged URL.",
    "http:///": "the environment names a proxy without a host.",
}


@pytest.mark.parametrize(("proxy", "says"), BAD_PROXIES.items())
def test_proxy_that_cannot_be_used_is_called_one(
    no_proxies: pytest.MonkeyPatch, proxy: str, says: str,
) -> None:
    """Nothing is sent past it, and its password is not told."""
    no_proxies.setenv("http_proxy", proxy)
    assert refusal_of("http://relay.invalid/") == says


@pytest.mark.parametrize("count", [MAX_INTERIM_REPLIES - 1, MAX_INTERIM_REPLIES])
def test_interim_replies_are_passed_over(count: int) -> None:
    """A proxy may send a few."""
    octets = b"HTTP/1.1 103 Early Hints\r\n\r\n" * count + http_reply(ANSWER)
    with FakeRelay(lambda _: octets) as relay:
        assert asyncio.run(ask(relay.url)) == ANSWER


def test_interim_replies_beyond_the_limit_are_refused() -> None:
    """The reply itself is not read any more."""
    octets = b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INTERIM_REPLIES + 1) + http_reply(ANSWER)
    with FakeRelay(lambda _: octets) as relay:
        assert refusal_of(relay.url) == "it sends interim replies without end."


def test_interim_replies_of_a_proxy_to_connect_are_bounded_too(
    no_proxies: pytest.MonkeyPatch,
) -> None:
    octets = b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INTERIM_REPLIES + 1) + http_reply(ANSWER)
    with FakeRelay(lambda _: octets) as proxy:
        no_proxies.setenv("https_proxy", proxy.url)
        assert refusal_of("https://relay.example/") == "it sends interim replies without end."


def test_interim_replies_without_end_are_read_only_to_the_limit() -> None:
    """They are there already, so that reading them on would give nobody else a turn of the loop."""
    turns: list[int] = []

    async def read() -> tuple[SimpleNamespace, None]:
        turns.append(len(turns))
        return SimpleNamespace(code=100), None

    async def run() -> None:
        bounded = BoundedRead(read)
        for _ in range(MAX_INTERIM_REPLIES):
            await bounded()
        with pytest.raises(ReplyError):
            await bounded()

    asyncio.run(run())
    assert len(turns) == MAX_INTERIM_REPLIES + 1


class FakeProtocol:
    """Count the octets that come through, and whether the connection is aborted."""

    should_close = False

    def __init__(self) -> None:
        self.taken = 0
        self.aborted = 0
        self.transport = self

    def data_received(self, octets: bytes) -> None:
        """Count them."""
        self.taken += len(octets)

    def abort(self) -> None:
        """Count it."""
        self.aborted += 1


@pytest.mark.parametrize(("last", "aborted"), [(0, 0), (1, 0), (2, 1)])
def test_octets_of_a_reply_are_bounded(last: int, aborted: int) -> None:
    """What is over the limit is not even looked at."""
    protocol = FakeProtocol()
    receive = BoundedReceive(protocol)
    receive(bytes(MAX_HEAD_BYTES - 1))
    receive(bytes(last))
    assert protocol.aborted == aborted
    assert protocol.taken == MAX_HEAD_BYTES - 1 + last * (1 - aborted)


def test_octet_after_a_reply_ends_the_connection() -> None:
    """Otherwise aiohttp would read replies that nobody waits for, and keep them."""
    protocol = FakeProtocol()
    receive = BoundedReceive(protocol)
    receive(bytes(3))
    receive.end()
    receive.allow(1)
    receive(b"")
    assert (protocol.taken, protocol.aborted) == (3, 0)
    receive(b"H")
    assert (protocol.taken, protocol.aborted) == (3, 1)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_replies_on_an_idle_connection_end_it(loop: str, *, is_late: bool) -> None:
    """A relay takes a message well, and floods the connection that is kept, at once or later."""
    module = pytest.importorskip(loop, reason="uvloop is missing: pip install uvloop")
    reply = http_reply(ANSWER).replace(b"Connection: close\r\n", b"")
    ended = asyncio.Semaphore(0)
    answered = asyncio.Semaphore(0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        if is_late:
            await answered.acquire()
        with contextlib.suppress(ConnectionError):
            while True:
                await writer.drain()
                writer.write(b"HTTP/1.1 204 \r\n\r\n" * 1_000)
        ended.release()
        writer.close()

    async def ask_twice() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            transport = make_transport()
            client = RelayClient(url, transport, timeout_s=SOON_S)
            for _ in range(2):
                assert await client.ask({"action": "send"}) == ANSWER
                answered.release()
                async with asyncio.timeout(SOON_S):
                    await ended.acquire()
            await transport.close()

    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        runner.run(ask_twice())


@pytest.mark.parametrize("public_only", [True, False])
def test_connections_to_relays_that_others_name_are_not_kept(*, public_only: bool) -> None:
    """Nor is any address remembered."""

    async def run() -> None:
        async with make_session(make_context(), public_only=public_only) as session:
            assert isinstance(session.connector, aiohttp.TCPConnector)
            assert session.connector.force_close is public_only
            assert not session.connector.use_dns_cache

    asyncio.run(run())


def test_cookies_of_a_relay_are_not_read(caplog: pytest.LogCaptureFixture) -> None:
    """Older versions of aiohttp logged what they could not read, in the relay's own words."""
    cookies = [f"Set-Cookie: Your store, is damaged{number};;=" for number in range(50)]
    with FakeRelay(lambda _: http_reply({"ok": True}, *cookies)) as fake:
        assert asyncio.run(ask(fake.url)) == {"ok": True}
    assert caplog.records == []


def test_relay_hears_nothing_of_what_a_client_is_made_of() -> None:
    """No versions of Python or of a library."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(http_reply(ANSWER))
        writer.close()

    async def ask_once() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")

    asyncio.run(ask_once())
    assert b"\r\nUser-Agent: connectoid\r\n" in heads[0]
    assert not re.search(b"python|aiohttp", heads[0], re.IGNORECASE)


@pytest.mark.parametrize(
    ("size", "is_taken"),
    [(MAX_SEND_REPLY_BYTES - 1, True), (MAX_SEND_REPLY_BYTES, True),
     (MAX_SEND_REPLY_BYTES + 1, False)])
def test_reply_to_a_send_is_small(size: int, *, is_taken: bool) -> None:
    """Contacts and strangers choose whom this side writes to."""
    reply = {"ok": True, "more": ""}
    reply["more"] = "x" * (size - len(json.dumps(reply)))

    async def send(url: str) -> None:
        transport = make_transport()
        try:
            client = RelayClient(url, transport, timeout_s=SOON_S)
            await client.send(Mailbox("A" * 66, url, None), "AAAA")
        finally:
            await transport.close()

    with FakeRelay(lambda _: http_reply(reply)) as relay:
        if is_taken:
            asyncio.run(send(relay.url))
        else:
            with pytest.raises(RelayError, match="a reply over 4 KiB"):
                asyncio.run(send(relay.url))


def test_reply_of_extensions_without_end_is_cut_off() -> None:
    """The relay has not closed the connection: this side has."""
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65_536).replace(b"\0", b"y"))
                await writer.drain()
        ended.set()
        writer.close()

    async def ask_for_ever() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            with pytest.raises(RelayError, match="its reply was cut off"):
                await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            await ended.wait()

    asyncio.run(ask_for_ever())


@pytest.mark.parametrize("octets", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES])
def test_long_lines_in_the_head_of_a_reply_are_read(octets: int) -> None:
    """Proxies add some. The limit is that of the value."""
    with FakeRelay(lambda _: http_reply(ANSWER, "X: " + "y" * octets)) as relay:
        assert asyncio.run(ask(relay.url)) == ANSWER


def test_line_in_the_head_of_a_reply_over_the_limit_is_refused() -> None:
    """Whoever sends it without end is not read on."""
    with FakeRelay(lambda _: http_reply(ANSWER, "X: " + "y" * (MAX_LINE_BYTES + 1))) as relay:
        assert refusal_of(relay.url).startswith("it does not speak HTTP: Got more than 65536")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a file with a certificate for 127.0.0.1, signed by itself, and its key."""
    return make_certificate(tmp_path, -1, 1)


def make_certificate(folder: Path, begins: int, ends: int) -> Path:
    """Return such a file; the certificate is valid from and until so many days from now.

    It is for a host behind a proxy too.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    today = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName(PROXIED_HOST)])
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(),
        today + datetime.timedelta(days=begins), today + datetime.timedelta(days=ends))
    signed = builder.add_extension(hosts, critical=False).sign(key, hashes.SHA256())
    path = folder / "certificate.pem"
    path.write_bytes(
        signed.public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


@pytest.mark.parametrize("head", [
    "HTTP/1.1 200 Connection established", "HTTP/1.1 200 OK\r\nContent-Length: 0",
    "HTTP/1.0 200 OK\r\nContent-Type: text/html"])
def test_relay_is_asked_through_a_tunnel_of_a_proxy(
    no_proxies: pytest.MonkeyPatch, certificate: Path, https_url: str, head: str,
) -> None:
    """A few interim replies may come before it."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while octets := await reader.read(65_536):
                    writer.write(octets)
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().split(":")
        beyond, to_relay = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_INTERIM_REPLIES)
        writer.write(f"{head}\r\n\r\n".encode())
        await asyncio.gather(pump(reader, to_relay), pump(beyond, writer))

    async def run() -> object:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            no_proxies.setenv("https_proxy", f"http://127.0.0.1:{port}")
            return await ask(https_url, str(certificate))

    assert asyncio.run(run()) == ANSWER


@pytest.fixture
def https_url(certificate: Path) -> Iterator[str]:
    """Return the URL of a relay whose certificate no system trusts."""
    with serving_tls(certificate) as url:
        yield url


@contextlib.contextmanager
def serving_tls(certificate: Path) -> Iterator[str]:
    """Serve a relay with a certificate; yield its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    ended = threading.Event()
    started = threading.Event()
    urls: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(http_reply(ANSWER))
        await writer.drain()
        writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
            urls.append(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            started.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(SOON_S)
    try:
        yield urls[0]
    finally:
        ended.set()
        thread.join(SOON_S)


def test_client_trusts_a_certificate_that_it_is_given(certificate: Path, https_url: str) -> None:
    """And no other."""
    assert asyncio.run(ask(https_url, str(certificate))) == ANSWER
    with pytest.raises(RelayError, match=r"cannot be reached.*certificate"):
        asyncio.run(ask(https_url))


def test_errors_of_tls_are_told_in_its_own_words(certificate: Path, https_url: str) -> None:
    """Their numbers are not those of the system."""
    assert refusal_of(https_url) == (
        "its certificate is not accepted: self-signed certificate; if it is yours, name it with"
        " --ca FILE (ca_file) or SSL_CERT_FILE.")
    said = refusal_of(https_url.replace("127.0.0.1", "localhost"), str(certificate))
    assert said.startswith("its certificate is not accepted: Hostname mismatch")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(http_reply(ANSWER))
        await writer.drain()
        writer.close()

    async def ask_without_tls() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await ask(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")

    with pytest.raises(RelayError, match=r"does not speak TLS on this port; .* with http://\.$"):
        asyncio.run(ask_without_tls())


@pytest.mark.parametrize(("begins", "ends", "why"), [
    (1, 2, "certificate is not yet valid"), (-2, -1, "certificate has expired")])
def test_clock_is_named_where_a_certificate_is_not_valid_now(
    tmp_path: Path, begins: int, ends: int, why: str,
) -> None:
    """A device without a network may show any day."""
    path = make_certificate(tmp_path, begins, ends)
    with serving_tls(path) as url:
        said = refusal_of(url, str(path))
    shown = r"it shows \d{4}-\d\d-\d\d \d\d:\d\d UTC\.$"
    assert re.search(f"{why}; or this device's clock is wrong: {shown}", said), said


def test_http_to_a_port_of_tls_is_told(https_url: str) -> None:
    said = refusal_of(https_url.replace("https:", "http:"))
    assert said.endswith("; if it speaks TLS, its address begins with https://.")


@pytest.mark.parametrize("status", ["302 Found", "303 See Other", "307 Temporary Redirect"])
def test_redirects_are_told_as_what_a_portal_does(status: str) -> None:
    reply = http_reply(b"", "Location: http://portal.invalid/", status=status)
    with FakeRelay(lambda _: reply) as fake:
        said = refusal_of(fake.url)
    assert said.startswith(f"it sends elsewhere ({status[:3]}), as networks do where users have")


@pytest.mark.parametrize("is_at_once", [True, False])
def test_no_connection_is_kept_to_what_answers_a_page(is_at_once: bool) -> None:
    """Where users have to log in, it would go on to lead there once they have."""
    page = b"<p>Log in"
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 9\r\n\r\n" + page
    connections = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while await reader.read(MAX_LINE_BYTES):
            half = len(reply) if is_at_once else len(reply) - len(page)
            writer.write(reply[:half])
            await writer.drain()
            # The client has read the head by then.
            await asyncio.sleep(0.05)
            writer.write(reply[half:])
        writer.close()

    async def ask_for_pages() -> None:
        transport = make_transport()
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            client = RelayClient(url, transport, timeout_s=SOON_S)
            for _ in range(2):
                with pytest.raises(RelayError, match="it answered a web page"):
                    await client.ask({"action": "send"})
            await transport.close()
            for writer in connections:
                writer.close()
                await writer.wait_closed()

    asyncio.run(ask_for_pages())
    assert len(connections) == 2


TYPES = {
    "application/json": JSON,
    " Application/JSON ;charset=utf-8": JSON,
    JSON + ";" * 60_000: JSON,
    "text/html; a=application/json": "text/html",
    "application/jsonl": "application/jsonl",
    "": "",
}


@pytest.mark.parametrize("header", TYPES, ids=lambda header: header[:40])
def test_type_of_a_reply_is_what_is_before_its_parameters(header: str) -> None:
    assert type_of(header) == TYPES[header]


def test_parameters_of_a_type_are_read_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The email package takes the square of their number: 64 KiB hold the loop for a minute."""
    read = []

    def parse(raw: str) -> tuple[str, dict[str, str]]:
        read.append(raw)
        return JSON, {}

    monkeypatch.setattr(aiohttp.helpers, "parse_content_type", parse)
    with FakeRelay(lambda _: http_reply(ANSWER, f"Content-Type: {JSON};;;")) as relay:
        assert asyncio.run(ask(relay.url)) == ANSWER
    assert read == []


PAGES = {
    b"<!DOCTYPE html><p>Welcome to the hotel": "it answered a web page, as networks do where users",
    b"\r\n <html><p>Log in": "it answered a web page, as networks do where users",
    b"<h1>400 Bad Request</h1>The plain HTTP request was sent to HTTPS port": "it speaks TLS",
    b"Reason: You're speaking plain HTTP to an SSL-enabled server port.": "it speaks TLS",
    b"Client sent an HTTP request to an HTTPS server.": "it speaks TLS",
    b"plain HTTP": "it answered what is not JSON",
}


@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_what_is_no_json_is_told_as_what_it_is(page: bytes) -> None:
    with FakeRelay(lambda _: http_reply(page, status="400 Bad Request")) as fake:
        with pytest.raises(RelayError) as caught:
            asyncio.run(ask(fake.url))
        assert str(caught.value).startswith(f"{fake.url} is not a relay: {PAGES[page]}")


LATER = OSError(1, "[SSL] internal error (_ssl.c:2580)")
LATER.__cause__ = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert")
OS_ERRORS = [
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)"),
     "Connection refused"),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
    (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 9, 0, 0), "
             "[Errno 111] Connect call failed ('127.0.0.1', 9)"),
     "Multiple exceptions: Connect call failed ('::1', 9, 0, 0), "
     "Connect call failed ('127.0.0.1', 9)"),
    (OSError(), "OSError"),
    (LATER, "TLS: [SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert"),
    (ValueError("http://alice:hunter2@127.0.0.1/"), "ValueError"),
]


@pytest.mark.parametrize(("error", "says"), OS_ERRORS)
def test_errors_of_the_system_are_told_without_numbers(error: Exception, says: str) -> None:
    """What an unknown error says itself is not told at all: there may be a password in it."""
    assert words_of(error) == says


@pytest.mark.parametrize("name", ["nowhere.pem", "empty.pem"])
def test_certificates_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    """That is a mistake of the app, and nothing of it goes on."""
    (tmp_path / "empty.pem").write_text("")
    path = str(tmp_path / name)
    app = Connectoid(Store(":memory:"), ca_file=path)
    with pytest.raises(UsageError, match=re.escape(f"The certificates in {path} cannot be read")):
        app.start()
    app.close()


@pytest.mark.slow
def test_client_honours_the_certificates_of_the_environment(
    certificate: Path, https_url: str,
) -> None:
    """SSL_CERT_FILE is read when a program starts."""
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from connectoid import RelayClient
async def ask():
    client = RelayClient(sys.argv[1])
    print(await client.ask({{"action": "send"}}))
    await client.close()
asyncio.run(ask())
"""
    printed = subprocess.run(
        [sys.executable, "-c", script, https_url], capture_output=True, text=True,
        timeout=SOON_S, check=False, env={"SSL_CERT_FILE": str(certificate)})
    assert (printed.stdout, printed.stderr) == (f"{ANSWER}\n", "")


WITHOUT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
before = set(sys.modules)
import connectoid, connectoid.cli
assert not [name for name in sys.modules if name.startswith(("aiohttp", "aiortc"))]
sys.modules["aiohttp"] = None
sys.exit(connectoid.cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_missing_package_is_told_by_the_command_that_brings_it(tmp_path: Path) -> None:
    """Importing the library needs neither aiohttp nor aiortc; running contacts does."""
    store = ["--store", str(tmp_path / "s.db")]
    ran = [
        subprocess.run(
            [sys.executable, "-c", WITHOUT, *command, *store], capture_output=True, text=True,
            timeout=SOON_S, check=False)
        for command in (["contacts"], ["share", "Bob", "--relay", "https://relay.example.com/"])
    ]
    assert [(one.returncode, one.stderr) for one in ran] == [
        (0, f"No contacts in {store[1]}.\n"),
        (2, "connectoid: Relays need the package aiohttp: pip install 'connectoid[webrtc]'\n"),
    ]


@pytest.mark.slow
def test_package_is_a_command(tmp_path: Path) -> None:
    """`python -m connectoid` is the command line."""
    ran = subprocess.run(
        [sys.executable, "-m", "connectoid", "--version"], cwd=ROOT, capture_output=True,
        text=True, timeout=SOON_S, check=False)
    assert ran.stdout.startswith("connectoid ")


def test_command_line_trusts_the_certificates_of_ca(
    relay: Relay, certificate: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """Without them it says what to do."""
    tls = load_tls(str(certificate), str(certificate))
    with serving(relay, tls=tls) as server:
        url = f"https://127.0.0.1:{server.server_port}/"
        main(["doctor", "--relay", url])
        assert "name it with --ca FILE" in capsys.readouterr().out
        main(["doctor", "--relay", url, "--ca", str(certificate)])
        told = capsys.readouterr().out
    assert "not accepted" not in told
    assert "its certificate is valid until" in told
    assert main(["doctor", "--relay", url, "--ca", "missing.pem"]) == 2
    assert "The certificates in missing.pem cannot be read" in capsys.readouterr().err
