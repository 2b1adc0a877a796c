"""A server that sends records without content, after a handshake as always."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from apps import SOON_S, http_reply
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from test_http_transport import ANSWER, ask, make_certificate

from connectoid.gathering import read_server, tls_of
from connectoid.relay_client import RelayError
from connectoid.thrifty_tls import MAX_BESIDE_CONTENT, RECORD_BYTES, Overhead, make_context

# RFC 8446: the kinds of what is in a record, and the messages of a server (sections 5.2, 4.6).
DATA = b"\x17"
HANDSHAKE = b"\x16"
TICKET = b"\x04\0\0\x0f" + struct.pack("!IIB1sH1sH", 256, 0, 1, b"\1", 1, b"\1", 0) + HANDSHAKE
NEW_KEYS = b"\x18\0\0\1\1" + HANDSHAKE
MAX_RECEIVED = 65_536

Ask: TypeAlias = Callable[[], Coroutine[Any, Any, object]]


def expand(secret: bytes, label: bytes, length: int) -> bytes:
    """Return what HKDF-Expand-Label does with SHA-384, up to 48 octets (RFC 8446, section 7.1)."""
    label = b"tls13 " + label
    info = struct.pack("!HB", length, len(label)) + label + b"\0\1"
    return hmac.digest(secret, info, "sha384")[:length]


class Records:
    """Make the records of a server of TLS 1.3."""

    def __init__(self, secret: bytes) -> None:
        self._begin(secret)

    def of(self, inner: bytes) -> bytes:
        """Return a record."""
        nonce = (int.from_bytes(self._iv, "big") ^ self._number).to_bytes(12, "big")
        head = b"\x17\x03\x03" + struct.pack("!H", len(inner) + 16)
        self._number += 1
        record = head + self._cipher.encrypt(nonce, inner, head)
        if inner == NEW_KEYS:
            self._begin(expand(self._secret, b"traffic upd", 48))
        return record

    def _begin(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(expand(secret, b"key", 32))
        self._iv = expand(secret, b"iv", 12)
        self._number = 0


def shake_hands(client: socket.socket, context: ssl.SSLContext) -> None:
    """Shake hands as always."""
    arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(arrived, leaving, server_side=True)
    while not is_done(server):
        client.sendall(leaving.read())
        arrived.write(client.recv(MAX_RECEIVED))
    client.sendall(leaving.read())


def is_done(server: ssl.SSLObject) -> bool:
    """Go on with a handshake; return whether it is done."""
    try:
        server.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


@contextlib.contextmanager
def serving(
    folder: Path, inners: list[bytes], ask: Callable[..., Coroutine[Any, Any, object]] = ask,
) -> Iterator[Ask]:
    """Send records after one handshake; yield what asks the server, and waits for the end."""
    certificate = make_certificate(folder, -1, 1)
    keys = folder / "keys"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.keylog_filename = str(keys)

    def serve() -> None:
        client, _ = listener.accept()
        # A client that has had enough is gone.
        with client, contextlib.suppress(OSError):
            client.settimeout(SOON_S)
            shake_hands(client, context)
            lines = [line.split() for line in keys.read_text().splitlines()]
            secrets = {words[0]: bytes.fromhex(words[2]) for words in lines if len(words) == 3}
            records = Records(secrets["SERVER_TRAFFIC_SECRET_0"])
            client.sendall(b"".join(map(records.of, inners)))
            client.shutdown(socket.SHUT_WR)
            while client.recv(MAX_RECEIVED):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"

        async def ask_to_the_end() -> object:
            try:
                return await ask(url, str(certificate))
            finally:
                await asyncio.to_thread(thread.join, SOON_S)

        yield ask_to_the_end


REPLY = http_reply(ANSWER)
CASES = {
    "none": ([], True),
    "a few tickets": ([TICKET] * 10, True),
    "a few keys": ([NEW_KEYS] * 10, True),
    "many tickets": ([TICKET] * 4_000, False),
    "many keys": ([NEW_KEYS] * 4_000, False),
}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("case", CASES)
def test_records_without_content_are_taken_to_the_limit(
    tmp_path: Path, case: str, loop: str,
) -> None:
    """OpenSSL would take them without end, and the loop would do nothing else."""
    module = pytest.importorskip(loop, reason="uvloop is missing: pip install uvloop")
    inners, is_taken = CASES[case]
    with (
        serving(tmp_path, [*inners, REPLY + DATA]) as ask_it,
        asyncio.Runner(loop_factory=module.new_event_loop) as runner,
    ):
        if is_taken:
            assert runner.run(ask_it()) == ANSWER
            return
        with pytest.raises(RelayError, match="TLS: it sends records without content"):
            runner.run(ask_it())


@pytest.mark.parametrize("case", CASES)
def test_turn_server_over_tls_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str,
) -> None:
    inners, is_taken = CASES[case]
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))

    async def read(url: str, _ca_file: str) -> bytes:
        place = url.removeprefix("https://").rstrip("/")
        (server,) = read_server({"urls": f"turns:{place}", "username": "u", "credential": "c"})
        reader, writer = await asyncio.open_connection(
            server.host, server.port, ssl=tls_of(server))
        try:
            return await reader.readexactly(len(REPLY))
        finally:
            writer.transport.abort()

    with serving(tmp_path, [*inners, REPLY + DATA], read) as ask_it:
        if is_taken:
            assert asyncio.run(ask_it()) == REPLY
            return
        with pytest.raises(ssl.SSLError, match="records without content"):
            asyncio.run(ask_it())


def test_reply_in_records_of_an_octet_each_is_read(tmp_path: Path) -> None:
    """Its records have more octets than may come without content."""
    reply = http_reply(ANSWER, "X: " + "y" * 4_000)
    assert len(reply) * RECORD_BYTES > MAX_BESIDE_CONTENT
    inners = [bytes([octet]) + DATA for octet in reply]
    with serving(tmp_path, inners) as ask_it:
        assert asyncio.run(ask_it()) == ANSWER


@pytest.mark.parametrize(("octets", "is_taken"), [
    (MAX_BESIDE_CONTENT - 1, True), (MAX_BESIDE_CONTENT, True), (MAX_BESIDE_CONTENT + 1, False)])
def test_octets_without_content_are_bounded(octets: int, *, is_taken: bool) -> None:
    """Content counts for its record, and for no more."""
    overhead = Overhead()
    overhead.allow(1)
    overhead.take(RECORD_BYTES)
    overhead.allow(1)
    if is_taken:
        overhead.take(octets)
        return
    with pytest.raises(ssl.SSLError, match="records without content"):
        overhead.take(octets)


def test_server_chooses_no_group_of_its_own_and_no_second_handshake() -> None:
    """Its group may have 10,000 bits, and OpenSSL computes in it for a second each time."""
    context = make_context()
    assert {cipher["kea"] for cipher in context.get_ciphers()} == {"kx-any", "kx-ecdhe"}
    assert context.options & ssl.OP_NO_RENEGOTIATION
