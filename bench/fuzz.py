"""Feed damaged requests to all that reads: `python bench/fuzz.py [SECONDS] [--seed N]`.

The parser of HTTP, the core, the datagrams and a real socket each get the same inputs, made
of the seeds below by chance that can be repeated. Prints how many were tried; the first that breaks a promise is
printed as a Python literal, with exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from connectoid_relay import (  # the file beside us, not an installed one
    ERRORS,
    Head,
    Limits,
    Refusal,
    Relay,
    RelayServer,
    Reply,
    SqliteStore,
    Wait,
    answer_datagram,
    answer_stun,
    is_stun,
    take_head,
)

PUB = "Aodp-ev42RyLT54aqPTIk6mYZFNVcTMsLPSpFaMw0GSrBaUPjp66nPnNVfSDevDn3K"
SOURCE = "192.0.2.1"
STATUSES = {200, 204, *(error.status for error in ERRORS)}
WELL = Limits(rate=0, max_connections_per_source=0, max_bytes=1 << 20)  # small: it gets full as well
INPUTS_OF_A_RELAY = 20_000  # then a new one: what has filled its boxes shall not hide the rest
MAX_DAMAGES = 6  # of one input
REPLY_TIMEOUT_S = 20.0


def _post(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: relay", b"Content-Length: %d" % len(body), *headers, b"", body])


BODIES = [
    json.dumps(request).encode() for request in (
        {"action": "check", "pub": PUB, "at": 0, "id": "a1"},
        {"action": "check", "pub": PUB, "at": 2**63, "wait": 60, "ext": "key"},
        {"action": "send", "pub": PUB, "data": "QUJD", "ext": None},
        {"action": "receive", "pub": PUB, "answer": "A" * 43, "at": 1, "limit": 100},
        [{"action": "check", "pub": PUB}, {"action": "check", "pub": PUB, "wait": 1}, 7],
    )] + [
    b"\xef\xbb\xbf{}", b'{"action": "check", "pub": "\\ud800"}', b"[" * 2_000, b'{"at": 1e999, "at": NaN}',
    b'{"at": ' + b"9" * 5_000 + b"}", b'{"limit": true, "wait": -0, "at": 1.0}', b"\xff\x00", b"",
    b"\x00\x01\x00\x00\x21\x12\xa4\x42" + b"T" * 12,
]
SEEDS = [_post(body) for body in BODIES] + BODIES + [
    _post(BODIES[0], b"Expect: 100-continue", b"X-Forwarded-For: 192.0.2.7, ::1"),
    _post(BODIES[0]) + _post(BODIES[2], b"Connection: close"),
    _post(BODIES[0], b"Content-Length: 5"), _post(BODIES[0], b"Transfer-Encoding: chunked"),
    _post(BODIES[0], b"A : b"), _post(BODIES[0], b"A: b\r\n folded"), _post(BODIES[0], b"A: \x00"),
    b"GET http://relay/?query HTTP/1.1\r\nAccept: application/json\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n\r\n", b"PUT /metrics HTTP/1.1\n\n", b"\x16\x03\x01\x02\x00\x01\x00",
]
PIECES = [b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\t", b",", b"0", b"-1", b"65536", b"null", b"true", b'"', b"\\u",
          b"\\ud800", b"{", b"[", b"\xff", b"close", b"Content-Length: 1\r\n", b"Connection: close\r\n", b"HTTP/1.0"]


def damage(chance: random.Random) -> bytes:
    """Return a seed, or two spliced, with some pieces put in, taken out or doubled."""
    octets = chance.choice(SEEDS)
    if chance.random() < 0.3:
        other = chance.choice(SEEDS)
        octets = octets[:chance.randrange(len(octets) + 1)] + other[chance.randrange(len(other) + 1):]
    for _ in range(chance.randrange(MAX_DAMAGES)):
        start = chance.randrange(len(octets) + 1)
        end = min(len(octets), start + chance.choice((0, 0, 1, 1, 2, 8, 64)))
        octets = octets[:start] + chance.choice((
            chance.choice(PIECES), chance.randbytes(chance.randrange(4)), octets[start:end] * 2)) + octets[end:]
    return octets


# ---------------------------------------------------------------------------------------
# The promises, one function for each reader.
# ---------------------------------------------------------------------------------------


def read_in_pieces(octets: bytes, piece: int) -> tuple[Head | str | None, bytes]:
    """Return the head, the error or None, and what is left, when bytes come in pieces."""
    incoming = bytearray()
    try:
        for start in range(0, len(octets), piece):
            searched = len(incoming)
            incoming += octets[start:start + piece]
            if head := take_head(incoming, WELL, searched):
                return head, bytes(incoming + octets[start + piece:])
    except Refusal as refusal:
        return refusal.error.text, b""
    return None, b""


def try_head(octets: bytes, _relay: Relay, _port: int) -> None:
    """A head is the same however it comes, and nothing in it is open to two readings."""
    whole, rest = read_in_pieces(octets, len(octets) or 1)
    assert read_in_pieces(octets, 1) == (whole, rest)
    if isinstance(whole, Head):
        taken = octets[:len(octets) - len(rest)].lower()
        assert not re.search(rb"\0|(?<!\r)\n|\r(?!\n)|\n[ \t]|\n[^\r:]*[ \t]:|\ntransfer-encoding:", taken)
        assert len(re.findall(rb"\ncontent-length:", taken)) <= 1


def try_core(octets: bytes, relay: Relay, _port: int) -> None:
    """A body gets a reply of the protocol, and what is refused leaves nothing behind."""
    before = relay.stored()
    outcome = relay.run(relay.begin(octets, SOURCE))
    reply = outcome.reply if isinstance(outcome, Wait) else outcome
    assert isinstance(reply, Reply)
    assert reply.status in STATUSES - {500, 503}, reply
    for body in reply.body if isinstance(reply.body, list) else [reply.body]:
        assert body["ok"] is ("error" not in body), reply
    json.dumps(reply.body).encode("ascii")
    assert reply.status == 200 or relay.stored() == before


def try_datagram(octets: bytes, relay: Relay, _port: int) -> None:
    """A datagram gets less than it has, never a question, and nothing but a check or STUN gets anything."""
    stun = is_stun(octets)
    reply = answer_stun(octets, SOURCE, 4_242) if stun else answer_datagram(relay, octets, SOURCE)
    if reply is not None and not stun:
        assert len(reply) <= len(octets)
        assert json.loads(reply).keys() <= {"ok", "found", "id"}
        assert json.loads(octets)["action"] == "check"


def try_socket(octets: bytes, _relay: Relay, port: int) -> None:
    """A connection gets whole replies and its end."""
    received = b""
    with (socket.create_connection(("127.0.0.1", port), REPLY_TIMEOUT_S) as client,
          contextlib.suppress(ConnectionError)):  # refused half-way
        client.sendall(octets)
        client.shutdown(socket.SHUT_WR)
        while chunk := client.recv(1 << 16):
            received += chunk
    while received and b"HEAD" not in octets:
        head, end, received = received.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 ([0-9]{3}) ", head)
        assert status, head
        assert end, head
        if status[1] not in (b"100", b"204"):
            assert int(status[1]) in STATUSES - {503}, head
            assert b"\r\nAccess-Control-Allow-Origin: *" in head, head
            length = int(re.findall(rb"\r\nContent-Length: ([0-9]+)", head)[0])
            assert len(received) >= length, head
            received = received[length:]


TARGETS: dict[str, Callable[[bytes, Relay, int], None]] = {
    "HTTP parser": try_head, "core": try_core, "datagrams": try_datagram, "socket": try_socket}


@contextlib.contextmanager
def serving() -> Iterator[tuple[Relay, int]]:
    """Provide a new relay and the port at which it serves."""
    with contextlib.closing(Relay(SqliteStore(":memory:"), WELL)) as relay, RelayServer(
            ("127.0.0.1", 0), relay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield relay, server.server_port
        finally:
            server.shutdown()
            thread.join()


def main() -> int:
    """Try inputs until the time is over; return 1 if one has broken a promise."""
    parser = argparse.ArgumentParser(description="Feed damaged requests to all that reads.")
    parser.add_argument("seconds", type=float, nargs="?", default=60.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all that is random")
    arguments = parser.parse_args()
    chance, tried, until_s = random.Random(arguments.seed), 0, time.monotonic() + arguments.seconds
    while time.monotonic() < until_s:
        with serving() as (relay, port):
            for _ in range(INPUTS_OF_A_RELAY):
                octets = damage(chance)
                for name, attempt in TARGETS.items():
                    try:
                        attempt(octets, relay, port)
                    except Exception as error:
                        print(f"{name}, input {tried} of seed {arguments.seed}: {error!r}\n{octets!r}")
                        return 1
                tried += 1
                if time.monotonic() >= until_s:
                    break
    print(f"seed {arguments.seed}: {tried:,} inputs for each of {', '.join(TARGETS)}: no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
