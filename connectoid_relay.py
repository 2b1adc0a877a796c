"""Run the Connectoid relay: it keeps small encrypted messages for an hour.

A mailbox is a P-384 public key. Anybody may send to it; only the holder of the private
key can receive. PROTOCOL.md says what goes over the wire, README.md how to run it:
`python connectoid_relay.py --port 8080`. To embed it:

    from connectoid_relay import Relay, RelayServer, SqliteStore

    relay = Relay(SqliteStore("connectoid.db"))
    status, reply = relay.handle({"action": "check", "pub": "..."}, "192.0.2.7")

    with RelayServer(("127.0.0.1", 8080), relay) as server:
        server.serve_forever()  # or in a thread, until server.shutdown()
    relay.close()
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["cryptography>=47"]
# ///

from __future__ import annotations

__version__ = "0.1.0"
__all__ = [
    "About", "Access", "Clock", "Limits", "Look", "Message", "Networks", "NoRoom", "Quota", "Rate", "Refusal", "Relay",
    "RelayServer", "Reply", "SettingError", "SqliteStore", "Store", "StoreError", "StoreFull", "Stored", "Text",
    "Wait", "load_tls", "main", "read_access", "source_of", "wsgi",
]

import argparse
import atexit
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import hmac
import html
import http.server
import ipaddress
import itertools
import json
import logging
import os
import queue
import re
import resource
import secrets
import selectors
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar, get_type_hints

try:
    from cryptography.hazmat.primitives import hpke
    from cryptography.hazmat.primitives.asymmetric import ec
except ImportError:
    NEEDS = "The relay needs the package cryptography 47 or newer: pip install 'cryptography>=47'"
    if __name__ == "__main__":
        sys.exit(NEEDS)
    raise ImportError(NEEDS) from None

log = logging.getLogger("connectoid_relay")

# ---------------------------------------------------------------------------------------
# Limits. Every number that protects somebody: those that a host may want to change are
# fields of Limits, and each of them is a flag (`message_ttl_s` is `--message-ttl`). What
# the protocol fixes (PROTOCOL.md, "Limits") and what only we care for are constants.
# ---------------------------------------------------------------------------------------

MAX_DATA_CHARS = 32_768  # of `data`: the largest sealed message is 22 KiB (PROTOCOL.md, "send")
MAX_EXT_CHARS = 1_024  # of `ext`, in code points: room for a token, none for a file
MAX_INLINE_BYTES = 4_096  # of a body that is parsed between two turns of the loop: in 0.1 ms
MAX_BATCH_ITEMS = 256  # checks in one request: an app with 50 contacts has up to 200 mailboxes
MAX_RECEIVE_MESSAGES = 100  # messages in one reply
MAX_RECEIVE_CHARS = 512 * 1024  # of `data` in one reply: what a phone takes at once
MAX_WAIT_S = 60  # of a long poll: shorter than the time-outs of most proxies
MAX_AT_US = 2**63 - 1  # what SQLite can compare

ANSWER_BYTES = 32  # of randomness in an answer: 256 bits
SOURCE_KEY_BYTES = 32  # of the key under which sources are hashed for a day
SOURCE_SHARE = 8  # one source holds at most 1/8 of a box: a crowd is needed to fill it
MIN_COUNTED_BYTES = 512  # a small message costs this much in rows and indexes all the same
MAX_SOURCES = 100_000  # known to a rate limit at once (20 MB); further ones share one count
MAX_SEEN_WRITES = 200  # boxes whose last check a sweep writes: across a network each takes milliseconds
MAX_SEEN_BOXES = 10_000  # whose last check is not yet written; further ones wait for their next
PROBE_EVERY_US = 5_000_000  # /health asks the store no more often than this
SWEEPER_LATE_US = 60_000_000  # after so long without a sweep /health says so
TRAFFIC_MINUTES = 60  # of requests, shown as a picture
MAX_SETTING = 10**12  # of any number that a host sets: its microseconds still fit SQLite's integers

SWEEP_EVERY_S = 1.0  # when there was nothing more to delete
SWEEP_PAUSE_S = 0.001  # between two steps when there is more
SWEEP_RETRY_S = 5.0  # after a failure
POOL_THREADS = 16  # do what waits for the disk or a seal; so many sends share a commit
LISTEN_BACKLOG = 4_096  # connections that the kernel holds for us: who finds no place tries again after a second
ACCEPT_BATCH = 64  # connections taken at a time; after so many events of others it is their turn again
DATAGRAM_BATCH = 256  # datagrams taken at a time: a few milliseconds, about as much as the connections may take
MSG_MORE = getattr(socket, "MSG_MORE", 0)  # Linux: more follows soon, so that it can share a packet
SEND_BUFFER_BYTES = 64 * 1024  # asked of the kernel: a client who does not read may else take 4 MB of it
RECV_BYTES = 64 * 1024  # read from a connection in one turn of the loop
TLS_TURN_BYTES = 4 * 1024  # given to OpenSSL in one turn of the loop: a few milliseconds at worst
TLS_RECORD_BYTES = 16 * 1024  # of a record: RFC 8446, section 5.1
TLS_SPARE_BYTES = 64 * 1024  # that a TLS client may send beyond TLS_OVERHEAD times what he has to say
TLS_OVERHEAD = 8  # records of 4 bytes of content
TICK_S = 0.25  # how late a deadline may be noticed; waits end by so much early
LINGER_S = 2.0  # for what a refused client still sends
LINGER_BYTES = 1024 * 1024  # the same
MAX_LINGERING = 256  # refused connections that are told why; more are just closed
DRAIN_S = 1.5  # for requests that are under way when the relay is stopped

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
RELEASE_US = 1_795_392_000 * SECOND_US  # 2026-11-23: a clock that shows less is wrong
YEAR_2200_US = 7_258_118_400 * SECOND_US  # and so is one that shows more


class Meaning(NamedTuple):
    """What a limit bounds, with its unit and its reason, and the least that it may be."""

    text: str
    minimum: int = 0


class Limits(NamedTuple):
    """Hold the limits that a host may change; the command line has a flag for each."""

    rate: Annotated[int, Meaning("requests per source and minute; 0 = every rate limit off")] = 600
    max_seals: Annotated[int, Meaning("questions made per source and minute: each costs a P-384 seal", 1)] = 120
    max_sends: Annotated[int, Meaning("messages per box, source and minute", 1)] = 60
    max_source_bytes: Annotated[int, Meaning(
        "bytes of data sent per source and hour: one host cannot fill the relay", 1)] = 64 << 20
    max_udp: Annotated[int, Meaning("UDP datagrams per second, from all together", 1)] = 10_000
    max_body_bytes: Annotated[int, Meaning("bytes of a request's body: a batch of 256 checks", 1)] = 128 << 10
    max_header_bytes: Annotated[int, Meaning("bytes of a request's line and headers", 64)] = 16 << 10
    request_timeout_s: Annotated[int, Meaning("seconds for a whole request to arrive", 1)] = 10
    idle_timeout_s: Annotated[int, Meaning("seconds that a connection may stay idle, or take to read a reply", 1)] = 75
    max_connections: Annotated[int, Meaning("open connections; 0 = no limit")] = 10_000
    max_connections_per_source: Annotated[int, Meaning("open connections of one source; 0 = no limit")] = 256
    max_waiting: Annotated[int, Meaning("boxes waited for in long polls; 0 = no limit")] = 10_000
    max_queued: Annotated[int, Meaning("requests in the queue for a thread: half a second of work", 1)] = 512
    max_buffered_bytes: Annotated[int, Meaning("bytes of unread requests and unsent replies", 1)] = 64 << 20
    max_box_messages: Annotated[int, Meaning("messages in a box", 1)] = 256
    max_box_bytes: Annotated[int, Meaning("bytes of data in a box", 1)] = 8 << 20
    max_bytes: Annotated[int, Meaning("bytes of data in all; a third is kept for proven boxes", 1)] = 1 << 30
    max_boxes: Annotated[int, Meaning("boxes with a proven owner: 250 MB of disk")] = 2_000_000
    message_ttl_s: Annotated[int, Meaning("seconds that a message is kept", 1)] = 3_600
    question_ttl_s: Annotated[int, Meaning("seconds that a question is good for", 2)] = 60
    box_ttl_s: Annotated[int, Meaning("seconds that a proven box is kept after its last check", 1)] = 30 * 86_400


def meanings() -> dict[str, Meaning]:
    """Return the meaning of each limit by its name, in the order of Limits."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(Limits, include_extras=True).items()}


class Quota(NamedTuple):
    """What whoever has a certain API key may have; 0 is what the limits say. README, "API keys"."""

    name: str = ""  # of its table in the key file; "" is counted nowhere
    requests_per_day: int = 0
    bytes: int = 0  # of data kept at a time
    message_ttl_s: int = 0


EVERYTHING = Quota()

# ---------------------------------------------------------------------------------------
# Errors. ERRORS is the table of PROTOCOL.md. A Refusal may be raised anywhere below; it
# becomes a reply in two places: Relay.step for a request, RelayServer._converse for
# the HTTP around it.
# ---------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A body that is not JSON: a page, the metrics, or nothing."""

    media_type: str
    text: str


class Reply(NamedTuple):
    """A status (as in HTTP) and the body that goes with it.

    That is JSON: a dict, or a list for a batch. What people and monitors get over HTTP is a Text.
    """

    status: int
    body: Any


class Error(NamedTuple):
    """A row of the error table: the text of `error` and the status."""

    text: str
    status: int


BAD_REQUEST = Error("Bad request", 400)
FORBIDDEN = Error("Forbidden", 403)
WRONG_ANSWER = Error("Wrong answer", 403)
NOT_FOUND = Error("Not found", 404)
NOT_ALLOWED = Error("Not allowed", 405)
TOO_SLOW = Error("Too slow", 408)
TOO_BIG = Error("Too big", 413)
TOO_OFTEN = Error("Too often", 429)
HEADERS_TOO_BIG = Error("Too big", 431)
BUSY = Error("Busy", 503)
FULL = Error("Full", 507)
ERRORS = (BAD_REQUEST, FORBIDDEN, WRONG_ANSWER, NOT_FOUND, NOT_ALLOWED, TOO_SLOW, TOO_BIG,
          TOO_OFTEN, HEADERS_TOO_BIG, BUSY, FULL)


class Refusal(Exception):
    """Refuse a request: the error, a sentence for people, seconds after which to ask again."""

    def __init__(self, error: Error, detail: str = "", retry_s: int = 0) -> None:
        super().__init__(error.text)
        self.error, self.detail, self.retry_s = error, detail, retry_s

    def reply(self) -> Reply:
        """Return what the client is told."""
        body: dict[str, Any] = {"ok": False, "error": self.error.text}
        if self.detail:
            body["detail"] = self.detail
        if self.retry_s:
            body["retry"] = self.retry_s
        return Reply(self.error.status, body)


class SettingError(Exception):
    """Say in one line which file or flag of the host's is wrong, where, and what mends it."""


def seconds_until(then_us: int, now_us: int) -> int:
    """Return the whole seconds from now to then, at least 1: the form of `retry`."""
    return max(1, -(-(then_us - now_us) // SECOND_US))


# ---------------------------------------------------------------------------------------
# Encoding and validation: from bytes and JSON to values that the core may trust. Pure
# functions that return the value or raise Refusal. PROTOCOL.md, "Forms".
# ---------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are not JSON


JSON_SPACE = " \t\r\n"  # RFC 8259, section 2
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> object:
    """Return the JSON value of a body; raise Refusal (Bad request) if there is none."""
    try:
        text = body.decode("utf-8").strip(JSON_SPACE)
        request: object
        request, end = _DECODER.raw_decode(text)
        if end < len(text):
            raise ValueError("more than one value")
        if _SURROGATE_ESCAPE.search(body):  # the only way to a lone surrogate, which UTF-8 cannot hold
            everything = json.loads(text, object_pairs_hook=list)  # also what another member of the name replaces
            json.dumps(everything, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise Refusal(BAD_REQUEST, "The body is not JSON in UTF-8.") from None
    return request


def encode_base64url(octets: bytes) -> str:
    """Return RFC 4648 base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


_FROM_URLSAFE = bytes.maketrans(b"-_", b"+/")


def decode_pub(pub: str) -> bytes:
    """Return the 49 bytes of a `pub` of the right form; as base64.urlsafe_b64decode, in half the time."""
    return binascii.a2b_base64(pub.encode("ascii").translate(_FROM_URLSAFE) + b"==")


# 49 bytes that begin with 2 or 3, in 66 characters whose last 4 bits are zero.
_PUB = re.compile(r"A[g-z0-9_-][A-Za-z0-9_-]{63}[AQgw]")
_DATA = re.compile(r"(?:[A-Za-z0-9_-]{4})*[A-Za-z0-9_-]{2,4}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,16}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # a boolean is an int to Python, 1.0 is not


# The form of each member, and how to say it to people.
FORMS: Mapping[str, tuple[Callable[[Any], object], str]] = {
    "pub": (lambda pub: isinstance(pub, str) and _PUB.fullmatch(pub),
            "a compressed P-384 point in 66 characters of base64url"),
    "ext": (lambda ext: ext is None or (_is_text(ext) and len(ext) <= MAX_EXT_CHARS),
            f"null or a string of at most {MAX_EXT_CHARS} characters"),
    "data": (lambda sealed: isinstance(sealed, str) and _DATA.fullmatch(sealed),
             "base64url without padding, at least 2 characters"),
    "answer": (_is_text, "a string"),
    "at": (_is_count, "an integer, at least 0"),
    "wait": (_is_count, "an integer, at least 0"),
    "limit": (lambda limit: type(limit) is int and 1 <= limit <= MAX_RECEIVE_MESSAGES,
              f"an integer from 1 to {MAX_RECEIVE_MESSAGES}"),
    "id": (lambda name: isinstance(name, str) and _ID.fullmatch(name), "1 to 16 of A-Z a-z 0-9 - _"),
}


def read(request: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return a member of a request, or the default; raise Refusal (Bad request) for a wrong form."""
    value = request.get(name, default)
    fits, form = FORMS[name]
    if not fits(value):
        raise Refusal(BAD_REQUEST, f"{name} must be {form}.")
    return value


def read_box(request: Mapping[str, Any]) -> bytes:
    """Return the 49 bytes of `pub`: of the right form, not yet known to be on the curve."""
    return decode_pub(read(request, "pub"))


def read_at(request: Mapping[str, Any]) -> int:
    """Return `at` in microseconds, no more than SQLite can compare."""
    return min(int(read(request, "at", 0)), MAX_AT_US)


def read_data(request: Mapping[str, Any]) -> str:
    """Return `data` as it was sent; raise Refusal, which is Too big for what is too long."""
    sealed = request.get("data")
    if isinstance(sealed, str) and len(sealed) > MAX_DATA_CHARS:
        raise Refusal(TOO_BIG, f"data must be at most {MAX_DATA_CHARS} characters.")
    return str(read(request, "data"))


MAX_REMEMBERED_SOURCES = 1_024  # by their addresses: a client has some requests after another
SOURCE_PREFIX_BITS = 64  # of an IPv6 address: what one customer gets at least
IPV4_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96


@functools.lru_cache(MAX_REMEMBERED_SOURCES)
def source_of(address: str) -> str:
    """Return whom an address stands for: itself, the IPv4 one inside, or its IPv6 /64."""
    if ":" not in address:
        return address
    try:
        octets = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        return address
    if octets.startswith(IPV4_MAPPED):
        return socket.inet_ntoa(octets[len(IPV4_MAPPED):])
    return octets[:8].hex(":", 2) + "::/64"


class Networks:
    """A set of IP networks: `address in networks`, also for a source; whatever is no address is in none.

    Made of texts like 192.0.2.0/24 or of ipaddress's networks; raises ValueError for what is neither.
    """

    def __init__(self, networks: Iterable[str | ipaddress.IPv4Network | ipaddress.IPv6Network] = ()) -> None:
        # One look-up for each length of a prefix that occurs, however long the list is.
        self._prefixes: dict[tuple[int, int], set[int]] = {}
        for network in map(ipaddress.ip_network, networks):
            shift = network.max_prefixlen - network.prefixlen
            prefixes = self._prefixes.setdefault((network.version, shift), set())
            prefixes.add(int(network.network_address) >> shift)

    def __contains__(self, address: str) -> bool:
        if not self._prefixes:
            return False
        try:
            parsed = ipaddress.ip_address(address.partition("/")[0].partition("%")[0])
        except ValueError:
            return False
        plain = getattr(parsed, "ipv4_mapped", None) or parsed
        return any(version == plain.version and int(plain) >> shift in prefixes
                   for (version, shift), prefixes in self._prefixes.items())


NO_NETWORKS = Networks()


def client_of(peer: str, forwarded_for: str, proxies: Networks) -> str:
    """Return the source of a request from a peer: behind trusted proxies the last address that is none of theirs.

    Each proxy appends the address that it sees to X-Forwarded-For; what stands before the
    first stranger from the right was written by that stranger.
    """
    address = peer
    for hop in reversed(forwarded_for.split(",") if forwarded_for else ()):
        if address not in proxies or not _is_address(hop.strip()):
            break
        address = hop.strip()
    return source_of(address)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------
# Cryptography. All context strings that the relay uses, and RFC 9180 by the library.
# ---------------------------------------------------------------------------------------

MAX_REMEMBERED_KEYS = 1_024  # 2 MB: who is sent something asks for it soon, and decompression is 6 % of a seal
CONTEXTS = {"question": b"connectoid/1 question"}
_SUITE = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)


@functools.lru_cache(MAX_REMEMBERED_KEYS)
def read_public_key(box: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a mailbox; raise Refusal (Bad request) if it is not on the curve."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), box)
    except ValueError:
        raise Refusal(BAD_REQUEST, "pub is not a point of the curve P-384.") from None


def seal_question(box: bytes, answer: str) -> str:
    """Return base64url(enc || ciphertext) of the answer, which only the owner can open."""
    sealed = _SUITE.encrypt(answer.encode("ascii"), read_public_key(box), info=CONTEXTS["question"])
    return encode_base64url(sealed)


def hash_answer(answer: str) -> bytes:
    """Return what the store keeps of an answer: enough to compare, useless to a thief."""
    return hashlib.sha256(answer.encode("utf-8")).digest()


# ---------------------------------------------------------------------------------------
# The store: what is kept, and nothing of the protocol. Every method takes the caller's
# time in microseconds. A write raises the store's own time to it, and uses whichever is
# larger; Relay.sweep has the caller catch up. A store raises StoreError and nothing else.
# ---------------------------------------------------------------------------------------


class StoreError(Exception):
    """Say that the store cannot do this now, or cannot be opened; nothing has changed."""


class StoreFull(StoreError):
    """Say that the disk is full."""


class NoRoom(StoreError):
    """Say that a message would go over a limit: of its "source", its "box", its "quota" or the "relay"."""

    def __init__(self, whose: str, until_us: int = 0) -> None:
        super().__init__(f"no room: {whose}")
        self.whose, self.until_us = whose, until_us


class Message(NamedTuple):
    """A message on its way in: source is a keyed hash of whoever sent it."""

    box: bytes
    data: str
    source: bytes
    ttl_us: int
    quota: Quota = EVERYTHING


class Look(NamedTuple):
    """What a check learns: whether there is news, and when the box row (if any) expires."""

    found: bool
    box_expires_us: int | None


class Stored(NamedTuple):
    """What the store holds, expired or not as long as it is not swept."""

    messages: int
    bytes: int  # of data, small messages counted as MIN_COUNTED_BYTES
    boxes: int  # with a proven owner


class Store(Protocol):
    """Keep messages, questions, boxes and time. SqliteStore is one; test_relay.py has the contract."""

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Have this thread's reads in a `with` see one state, if that spares something: for many looks."""

    def time_us(self) -> int:
        """Return the store's time as it was last raised."""

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`, larger than any before; raise NoRoom."""

    def look(self, box: bytes, at_us: int, now_us: int) -> Look:
        """Return whether the box has a message newer than `at`, and its row's expiry."""

    def messages(self, box: bytes, at_us: int, limit: int, now_us: int) -> list[tuple[int, str]]:
        """Return (at, data) newer than `at`, oldest first: up to limit and 512 KiB, at least one."""

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""

    def put_question(self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep (question, hash of answer) unless half the time of another is left; return which."""

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now, at most two."""

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for.

        `soon` is for what may be lost: any later write finds it done, who only reads may have to
        wait for the next sweep.
        """

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Add to the requests of today (UTC) by name of quota."""

    def spent(self, now_us: int) -> dict[str, int]:
        """Return the requests of today by name of quota, of all processes."""

    def stored(self) -> Stored:
        """Return what the store holds."""

    def sweep(self, now_us: int) -> bool:
        """Delete some of what has expired, and return whether there is more."""

    def probe(self, now_us: int) -> None:
        """Read and write for real; raise StoreError if the store is not well."""

    def close(self) -> None:
        """Let go of the file."""


APPLICATION_ID = 0x436F6E6E  # "Conn" in the file's header: another program's file is left alone
PAGE_BYTES = 4_096  # of SQLite, by default
_FIRST_SCHEMA = (
    """CREATE TABLE relay (id INTEGER PRIMARY KEY CHECK (id = 1), time_us INTEGER NOT NULL,
       last_at INTEGER NOT NULL, bytes INTEGER NOT NULL, boxes INTEGER NOT NULL) STRICT""",
    "INSERT INTO relay VALUES (1, 0, 0, 0, 0)",
    """CREATE TABLE messages (at INTEGER PRIMARY KEY, box BLOB NOT NULL, expires_us INTEGER NOT NULL,
       source BLOB NOT NULL, size INTEGER NOT NULL, data TEXT NOT NULL) STRICT""",
    # All that a check and a send ask of a box stands in this index; `data` is not touched.
    "CREATE INDEX messages_box ON messages (box, at, expires_us, source, size)",
    "CREATE INDEX messages_expires ON messages (expires_us)",
    """CREATE TABLE challenges (box BLOB NOT NULL, made_us INTEGER NOT NULL, question TEXT NOT NULL,
       answer_sha256 BLOB NOT NULL, expires_us INTEGER NOT NULL,
       PRIMARY KEY (box, made_us)) STRICT, WITHOUT ROWID""",
    "CREATE INDEX challenges_expires ON challenges (expires_us)",
    """CREATE TABLE boxes (box BLOB PRIMARY KEY, expires_us INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
    "CREATE INDEX boxes_expires ON boxes (expires_us)",
    f"PRAGMA application_id = {APPLICATION_ID}",
)
_QUOTAS = (
    """CREATE TABLE quotas (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, day INTEGER NOT NULL,
       requests INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
    "ALTER TABLE messages ADD COLUMN quota TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE relay ADD COLUMN messages INTEGER NOT NULL DEFAULT 0",
    "UPDATE relay SET messages = (SELECT count(*) FROM messages)",
)
# A file of version N has had the first N of these. They are never changed, only added to.
SCHEMA = (_FIRST_SCHEMA, _QUOTAS)

# ?1 is the box, ?2 the time of the reader (of the relay, in a write).
LOOK = """SELECT EXISTS (SELECT 1 FROM messages WHERE box = ?1 AND at > ?3 AND expires_us > ?2),
    (SELECT expires_us FROM boxes WHERE box = ?1 AND expires_us > ?2)"""
MESSAGES = """SELECT messages.at, messages.data FROM messages JOIN
    (SELECT at, size, sum(size) OVER (ORDER BY at) AS total FROM messages
     WHERE box = ?1 AND at > ?3 AND expires_us > ?2 ORDER BY at LIMIT ?4) AS page
    ON page.at = messages.at WHERE page.total <= ?5 OR page.total = page.size ORDER BY messages.at"""
ARRIVALS = "SELECT at, box FROM messages WHERE at > ? ORDER BY at"
QUESTION = """SELECT question FROM challenges WHERE box = ?1 AND made_us > ?3 AND expires_us > ?2
    ORDER BY made_us DESC LIMIT 1"""
ANSWERS = "SELECT answer_sha256 FROM challenges WHERE box = ?1 AND expires_us > ?2"
BOX_CONTENT = """SELECT count(*), coalesce(sum(size), 0), coalesce(min(expires_us), 0),
    coalesce(sum(source = ?3), 0), coalesce(sum(size * (source = ?3)), 0),
    coalesce(min(iif(source = ?3, expires_us, NULL)), 0),
    EXISTS (SELECT 1 FROM boxes WHERE box = ?1 AND expires_us > ?2)
    FROM messages WHERE box = ?1 AND expires_us > ?2"""
ADD_MESSAGE = """INSERT INTO messages (at, box, expires_us, source, size, data, quota)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""
ADD_QUESTION = """INSERT OR REPLACE INTO challenges (box, made_us, question, answer_sha256, expires_us)
    VALUES (?, ?, ?, ?, ?)"""
ADD_BOX = "INSERT OR IGNORE INTO boxes (box, expires_us) VALUES (?, ?)"
KEEP_BOX = "UPDATE boxes SET expires_us = max(expires_us, ?2) WHERE box = ?1"
QUOTA_BYTES = "SELECT bytes FROM quotas WHERE name = ?"
ADD_QUOTA_BYTES = """INSERT INTO quotas (name, bytes, day, requests) VALUES (?, ?, 0, 0)
    ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes"""
ADD_QUOTA_REQUESTS = """INSERT INTO quotas (name, bytes, day, requests) VALUES (?, 0, ?, ?)
    ON CONFLICT DO UPDATE SET requests = excluded.requests + iif(day = excluded.day, requests, 0),
    day = excluded.day"""
QUOTA_REQUESTS = "SELECT name, requests FROM quotas WHERE day = ?"
EXPIRED = """SELECT EXISTS (SELECT 1 FROM messages WHERE expires_us <= ?1)
    OR EXISTS (SELECT 1 FROM challenges WHERE expires_us <= ?1)
    OR EXISTS (SELECT 1 FROM boxes WHERE expires_us <= ?1)"""
SWEEP_MESSAGES = """DELETE FROM messages WHERE at IN (SELECT at FROM messages
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2) RETURNING size, quota"""
SWEEP_CHALLENGES = """DELETE FROM challenges WHERE (box, made_us) IN (SELECT box, made_us FROM challenges
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2)"""
SWEEP_BOXES = """DELETE FROM boxes WHERE box IN (SELECT box FROM boxes
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2)"""
READ_RELAY = "SELECT time_us, last_at, bytes, boxes, messages FROM relay"
WRITE_RELAY = """UPDATE relay SET time_us = :time_us, last_at = :last_at, bytes = :bytes, boxes = :boxes,
    messages = :messages"""

COMMIT_BATCH = 32  # writes in one transaction: 1 MiB of messages, a few milliseconds
SWEEP_ROWS = 16  # rows of a table deleted in one transaction: half a MiB, fits a small reserve
RESERVE_BYTES = 16 << 20  # kept back on the disk: room for questions and sweeps when it is full, and half for the WAL
CHECKPOINT_EVERY_US = 5 * SECOND_US  # after a deletion or a full disk, so as to spare the disk
BUSY_TIMEOUT_S = 0.02  # for a reader that is in the way of a checkpoint; all writers wait with us
LOCK_TIMEOUT_S = 2.0  # for another process, which holds the file for milliseconds if it is well
LOCK_RETRY_S = 0.002

# What an error of SQLite means to whoever runs the relay.
_MEANINGS = {
    sqlite3.SQLITE_NOTADB: "is no SQLite database; choose another file with --db",
    sqlite3.SQLITE_CORRUPT: "is damaged; stop the relay, move the file away and start again",
    sqlite3.SQLITE_READONLY: "cannot be written; mend its rights or choose another file with --db",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; choose another file with --db",
    sqlite3.SQLITE_BUSY: "is held by another program",
}
_FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


class _RelayRow:
    """The row `relay` in a write: the jobs change it, and it is written back at the end."""

    def __init__(self, time_us: int, last_at: int, size: int, boxes: int, messages: int) -> None:
        self.time_us, self.last_at, self.bytes, self.boxes, self.messages = time_us, last_at, size, boxes, messages


class _OfThread(threading.local):
    """What belongs to one thread: the connection that holds its snapshot."""

    snapshot: sqlite3.Connection | None = None


class _Snapshot:
    """Have all reads of a thread, within a `with`, go to one connection in one transaction.

    To take and drop the file's shared lock (fcntl) costs as much as a look itself, and so
    would a generator: this is a class for that. If no connection can be had, each read says what is wrong.
    """

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> None:
        with contextlib.suppress(sqlite3.Error, StoreError):
            self._db = self._store._take_reader()
            self._db.execute("BEGIN")
        self._store._of_thread.snapshot = self._db

    def __exit__(self, *_: object) -> None:
        self._store._of_thread.snapshot = None
        if self._db:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have ended it by itself
                self._db.execute("ROLLBACK")
            self._store._return_reader(self._db)


class _Ticket(concurrent.futures.Future[Any]):
    """A write that waits for its commit."""

    def __init__(self, job: Callable[[_RelayRow], Any], now_us: int, durable: bool) -> None:
        super().__init__()
        self.job, self.now_us, self.durable = job, now_us, durable

    def run(self, row: _RelayRow) -> Any:
        row.time_us = max(row.time_us, self.now_us)
        try:
            return self.job(row)
        except NoRoom as error:  # raised before anything was written: the others may go on
            return error


def counted_bytes(size: int) -> int:
    """Return how much a message of this size counts against the relay's bytes."""
    return max(size, MIN_COUNTED_BYTES)


def check_room(content: Sequence[int], size: int, limits: Limits) -> None:
    """Raise NoRoom if a box with this content has none for a message of this size.

    The content is the number of messages, their bytes and the first expiry, of all and
    then of the message's own source (as BOX_CONTENT has them).
    """
    messages, total, until_us, own_messages, own_total, own_until_us = content
    share_messages = max(1, limits.max_box_messages // SOURCE_SHARE)
    share_bytes = limits.max_box_bytes // SOURCE_SHARE
    if own_messages >= share_messages or (own_messages and own_total + size > share_bytes):
        raise NoRoom("source", own_until_us)
    if messages >= limits.max_box_messages or total + size > limits.max_box_bytes:
        raise NoRoom("box", until_us)


class SqliteStore:
    """Keep everything in one SQLite file in WAL mode, or in ":memory:".

    Any number of threads and processes may use the file. Concurrent writes share one
    commit; `sync="full"` has it survive a power loss, "normal" only a crash of the
    relay. SQLite before 3.51.3 can lose a commit to a checkpoint of another connection
    (sqlite.org/wal.html, "WAL-reset bug"), so both happen under one lock of ours.
    Raises StoreError if the file cannot be used; a file of another program is left alone.
    """

    def __init__(self, path: str = "connectoid.db", *, sync: str = "full") -> None:
        if os.path.islink(path):  # SQLite puts its files beside the file itself; the lock belongs there too
            path = os.path.realpath(path)
        self._path, self._reserve, self._in_memory = path, Path(path + "-reserve"), path == ":memory:"
        self._sync_pragma = {"full": "PRAGMA synchronous = FULL", "normal": "PRAGMA synchronous = NORMAL"}[sync]
        self._lock = threading.Lock()  # one writer at a time; the file's lock is for other processes
        self._queue: collections.deque[_Ticket] = collections.deque()
        self._readers: list[sqlite3.Connection] = []  # those that are idle
        self._of_thread = _OfThread()
        self._durable: bool | None = None  # which the connection is set to
        self._overdue_us: int | None = 0  # when the WAL must be emptied: what was deleted is still in it
        try:
            self._open()
        except StoreFull:  # others have filled the disk while we were away
            self._open_reserve()
            self._open()

    # Opening and closing

    def _open(self) -> None:
        self._closed = False
        with contextlib.ExitStack() as undo:
            self._lock_file = -1 if self._in_memory else self._create_files()
            undo.callback(self._close_lock_file)
            with self._lock, self._exclusive():
                self._db, self._durable = self._connect(), None
                undo.callback(self._db.close)
                self._prepare()
                self._reserve_bytes = self._choose_reserve()
                self._disk_full = not self._make_reserve()
            undo.pop_all()

    def _create_files(self) -> int:
        """Create the database, for our eyes only, and return the open lock file."""
        try:
            if os.path.exists(self._path):
                self._look_before_opening()
            else:  # not otherwise: to close it again would drop the locks that SQLite has in this process
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            return os.open(self._path + "-lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}; choose another file with --db") from None
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _look_before_opening(self) -> None:
        """Refuse the file of another program while it is as that program left it, WAL and all."""
        uri = Path(self._path).absolute().as_uri() + "?immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
                self._check_owner(db)
        except sqlite3.DatabaseError as error:
            # Without its WAL a file whose checkpoint was cut off looks damaged; opening it will tell.
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR):
                raise

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(f"{self._path} is closed")
        db = sqlite3.connect(self._path, BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        return db

    def _check_owner(self, db: sqlite3.Connection) -> int:
        """Return the version of the file's schema, 0 for a new one; raise StoreError if it is not ours."""
        (owner,), (version,), (tables,) = (db.execute(sql).fetchone() for sql in (
            "PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema"))
        if (owner, version, tables) == (0, 0, 0):
            return 0
        if owner != APPLICATION_ID:
            raise StoreError(f"{self._path} belongs to another program; choose another file with --db")
        if not 1 <= version <= len(SCHEMA):
            raise StoreError(f"{self._path} has schema {version}, this relay knows {len(SCHEMA)};"
                             " choose another file with --db")
        return int(version)

    def _prepare(self) -> None:
        missing = SCHEMA[self._check_owner(self._db):]
        if missing:
            self._db.execute("PRAGMA journal_mode = WAL")
            for sql in ("BEGIN IMMEDIATE", *itertools.chain(*missing),
                        f"PRAGMA user_version = {len(SCHEMA)}", "COMMIT"):
                self._db.execute(sql)
        # Fails here and now if the file cannot be written, the row has gone, or no clock of a relay wrote it.
        if self._db.execute("UPDATE relay SET time_us = time_us WHERE max(time_us, last_at) < ?",
                            (YEAR_2200_US,)).rowcount != 1:
            raise self._damaged()

    def _damaged(self) -> StoreError:
        return StoreError(f"{self._path} {_MEANINGS[sqlite3.SQLITE_CORRUPT]} (no relay time)")

    def close(self) -> None:
        """Move everything from the WAL into the file and let go of both."""
        with contextlib.suppress(StoreError):
            self.keep_boxes({}, 0)  # and with it what is in the queue
        self._closed = True  # a reader that is at work closes itself when it is done
        with self._lock:
            with contextlib.suppress(StoreError), self._exclusive():
                try:
                    self._checkpoint()
                finally:
                    self._close_readers()
                    self._db.close()  # the last one to close checkpoints by itself
            self._close_lock_file()

    def _close_readers(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._readers.pop().close()

    def _close_lock_file(self) -> None:
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    # Locks, errors, transactions

    def _explain(self, error: sqlite3.Error) -> StoreError:
        """Return an error of SQLite as one of ours, with its meaning."""
        code = getattr(error, "sqlite_errorcode", 0)  # Python's own errors have none
        if code in _FULL_CODES:
            return StoreFull(f"{self._path}: the disk is full ({error})")
        return StoreError(f"{self._path} {_MEANINGS.get(code & 0xFF, 'cannot be used')} ({error})")

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep out the writers and checkpoints of other processes; they hold it for milliseconds."""
        self._take_file_lock()
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error
        finally:
            if self._lock_file >= 0:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _take_file_lock(self) -> None:
        give_up_s = time.monotonic() + LOCK_TIMEOUT_S
        while self._lock_file >= 0:
            try:
                return fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise StoreError(f"{self._path} is held by another process") from None
                time.sleep(LOCK_RETRY_S)
        return None

    def _write(self, job: Callable[[_RelayRow], Any], now_us: int, *, durable: bool = False) -> Any:
        """Return the outcome of a job once it is committed; raise StoreError. The job finds the time raised.

        On a full disk room is made first by emptying the WAL, then by opening the reserve,
        but that belongs to the owners: not to what is durable, as sends are.
        """
        if durable and self._disk_full:
            raise StoreFull(f"{self._path}: the disk is full")
        for make_room in (self._empty_wal, self._open_reserve):
            try:
                return self._submit(_Ticket(job, now_us, durable))
            except StoreFull as error:
                full = error
                make_room()
        if durable:
            raise full
        return self._submit(_Ticket(job, now_us, durable))

    def _submit(self, ticket: _Ticket) -> Any:
        """Whoever gets the lock commits for all who wait for it: one sync for many sends."""
        self._queue.append(ticket)
        while not ticket.done():
            with self._lock:
                if not ticket.done():
                    self._commit([self._queue.popleft() for _ in range(min(COMMIT_BATCH, len(self._queue)))])
                    self._shorten_wal()
        return ticket.result()

    def _commit(self, batch: Sequence[_Ticket]) -> None:
        # What the others are told if something unforeseen is raised here: none may wait for ever.
        outcomes: list[Any] = [StoreError("not committed")] * len(batch)
        try:
            outcomes = self._run(batch)
        except StoreError as error:
            outcomes = [error] * len(batch)
        finally:
            for ticket, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, StoreError):
                    ticket.set_exception(outcome)
                else:
                    ticket.set_result(outcome)

    def _run(self, batch: Sequence[_Ticket]) -> list[Any]:
        """Run a batch in one transaction; one that has changed nothing is rolled back."""
        durable = any(ticket.durable for ticket in batch)
        with self._exclusive():
            if durable != self._durable:  # a PRAGMA is compiled anew each time
                self._db.execute(self._sync_pragma if durable else "PRAGMA synchronous = NORMAL")
                self._durable = durable
            self._db.execute("BEGIN IMMEDIATE")
            try:
                changes = self._db.total_changes
                values = self._db.execute(READ_RELAY).fetchone()
                if values is None:
                    raise self._damaged()
                row = _RelayRow(*values)
                outcomes = [ticket.run(row) for ticket in batch]
                if self._db.total_changes != changes:
                    self._db.execute(WRITE_RELAY, vars(row))
                    self._db.execute("COMMIT")
                return outcomes
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _read(self, sql: str, *values: Any) -> list[Any]:
        try:
            if snapshot := self._of_thread.snapshot:
                return snapshot.execute(sql, values).fetchall()
            if self._in_memory:  # a second connection would see another memory
                with self._lock:
                    return self._db.execute(sql, values).fetchall()
            db = self._take_reader()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                self._return_reader(db)
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _take_reader(self) -> sqlite3.Connection:
        try:
            return self._readers.pop()
        except IndexError:  # all are in use
            return self._connect()

    def _return_reader(self, db: sqlite3.Connection) -> None:
        self._readers.append(db)
        if self._closed:
            self._close_readers()

    # Methods of Store

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Have this thread's reads in a `with` see one state of the file."""
        return contextlib.nullcontext() if self._in_memory else _Snapshot(self)

    def time_us(self) -> int:
        """Return the store's time as it was last raised."""
        for time_us, *_ in self._read(READ_RELAY):
            return int(time_us)
        raise self._damaged()

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`; raise NoRoom or StoreFull."""
        box, sealed, source, ttl_us, quota = message

        def job(row: _RelayRow) -> int:
            *content, proven = self._db.execute(BOX_CONTENT, (box, row.time_us, source)).fetchone()
            check_room(content, len(sealed), limits)
            # Strangers may fill two thirds; the last one is for boxes whose owner has shown up.
            room = limits.max_bytes * (3 if proven else 2) // 3
            if row.bytes + counted_bytes(len(sealed)) > room:
                raise NoRoom("relay")
            self._take_bytes(quota, len(sealed))
            row.last_at = at = max(row.time_us, row.last_at + 1)
            row.bytes += counted_bytes(len(sealed))
            row.messages += 1
            self._db.execute(ADD_MESSAGE, (at, box, at + ttl_us, source, len(sealed), sealed, quota.name))
            return at

        return int(self._write(job, now_us, durable=True))

    def _take_bytes(self, quota: Quota, size: int) -> None:
        if not quota.name:
            return
        kept = self._db.execute(QUOTA_BYTES, (quota.name,)).fetchone() or (0,)
        if quota.bytes and kept[0] + size > quota.bytes:
            raise NoRoom("quota")
        self._db.execute(ADD_QUOTA_BYTES, (quota.name, size))

    def look(self, box: bytes, at_us: int, now_us: int) -> Look:
        """Return whether the box has news, and until when its row lives."""
        ((found, box_expires_us),) = self._read(LOOK, box, now_us, at_us)
        return Look(bool(found), box_expires_us)

    def messages(self, box: bytes, at_us: int, limit: int, now_us: int) -> list[tuple[int, str]]:
        """Return (at, data) newer than `at`, oldest first."""
        return self._read(MESSAGES, box, now_us, at_us, limit, MAX_RECEIVE_CHARS)

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""
        rows = self._read(ARRIVALS, after_us)
        return (rows[-1][0] if rows else after_us), {box for _, box in rows}

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""
        return next((question for (question,) in self._read(QUESTION, box, now_us, made_after_us)), None)

    def put_question(self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep a question unless another is still young; return the one to hand out."""
        def job(row: _RelayRow) -> str:
            time_us = row.time_us
            young = self._db.execute(QUESTION, (box, time_us, time_us - ttl_us // 2)).fetchone()
            if young:  # another check was faster
                return str(young[0])
            self._db.execute(ADD_QUESTION, (box, time_us, *question, time_us + ttl_us))
            return question[0]

        return str(self._write(job, now_us))

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now."""
        return [answer for (answer,) in self._read(ANSWERS, box, now_us)]

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for."""
        def job(row: _RelayRow) -> None:
            for box, expires_us in expiries_us.items():
                kept = self._db.execute(KEEP_BOX, (box, expires_us)).rowcount
                if not kept and row.boxes < room_for:
                    row.boxes += self._db.execute(ADD_BOX, (box, expires_us)).rowcount

        if soon:  # it costs no transaction of its own: the next one has it first
            self._queue.append(_Ticket(job, now_us, False))
        else:
            self._write(job, now_us)

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Add to the requests of today by name of quota."""
        def job(row: _RelayRow) -> None:
            for name, count in requests.items():
                self._db.execute(ADD_QUOTA_REQUESTS, (name, row.time_us // DAY_US, count))

        self._write(job, now_us)

    def spent(self, now_us: int) -> dict[str, int]:
        """Return the requests of today by name of quota, of all processes."""
        return dict(self._read(QUOTA_REQUESTS, now_us // DAY_US))

    def stored(self) -> Stored:
        """Return what the store holds."""
        for *_, size, boxes, messages in self._read(READ_RELAY):
            return Stored(messages, size, boxes)
        raise self._damaged()

    def sweep(self, now_us: int) -> bool:
        """Delete some of what has expired, have it gone from the WAL in time, mend a full disk."""
        def job(row: _RelayRow) -> bool:
            span = (row.time_us, SWEEP_ROWS)
            messages = self._db.execute(SWEEP_MESSAGES, span).fetchall()
            row.messages -= len(messages)
            row.bytes -= sum(counted_bytes(size) for size, _ in messages)
            for size, quota in messages:
                if quota:
                    self._db.execute(ADD_QUOTA_BYTES, (quota, -size))
            challenges = self._db.execute(SWEEP_CHALLENGES, span).rowcount
            boxes = self._db.execute(SWEEP_BOXES, span).rowcount
            row.boxes -= boxes
            return max(len(messages), challenges, boxes) == SWEEP_ROWS

        swept = self._read(EXPIRED, now_us) == [(1,)]
        more = bool(self._write(job, now_us)) if swept or self._queue else False
        if self._overdue_us is None and (self._disk_full or swept):
            self._overdue_us = now_us + CHECKPOINT_EVERY_US
        if self._overdue_us is not None and self._overdue_us <= now_us:
            self._empty_wal()
            self._disk_full = not self._make_reserve()
        return more

    def probe(self, now_us: int) -> None:
        """Write the time and read the tables for real; raise StoreError if that fails."""
        def job(row: _RelayRow) -> None:
            self._db.execute("UPDATE relay SET time_us = ?", (row.time_us,))

        self._write(job, now_us, durable=True)
        self.look(b"", 0, now_us)

    # The WAL, and room on the disk

    def _checkpoint(self) -> bool:
        """Move the WAL into the file and empty it; return False while a reader needs it."""
        return bool(self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)

    def _empty_wal(self) -> None:
        """Have deletions gone from the WAL, if that can be done now."""
        with contextlib.suppress(StoreError), self._lock, self._exclusive():
            if self._checkpoint():
                self._overdue_us = None

    def _shorten_wal(self) -> None:
        """Keep the WAL so short that the reserve has room for all that is in it."""
        with contextlib.suppress(OSError, StoreError):  # the next commit tries again
            if not self._in_memory and os.stat(self._path + "-wal").st_size > self._reserve_bytes // 2:
                with self._exclusive():
                    self._checkpoint()

    def _choose_reserve(self) -> int:
        """Return how much of the disk to keep back, and keep the file within its size limit."""
        if self._in_memory:
            return 0
        disk, (limit, _) = os.statvfs(self._path), resource.getrlimit(resource.RLIMIT_FSIZE)
        room = disk.f_bavail * disk.f_frsize
        if limit != resource.RLIM_INFINITY:  # what is in the WAL must fit the file as well
            self._db.execute(f"PRAGMA max_page_count = {limit // PAGE_BYTES}")
            room = min(room, limit)
        return min(RESERVE_BYTES, room // 4)

    def _make_reserve(self) -> bool:
        """Take room that nobody else can use; return False if there is none."""
        size = self._reserve_bytes
        try:
            if size and not (self._reserve.exists() and self._reserve.stat().st_size == size):
                self._reserve.touch(0o600)
                self._reserve.write_bytes(bytes(size))
        except OSError:
            with contextlib.suppress(OSError):
                self._reserve.unlink()
            return False
        return True

    def _open_reserve(self) -> None:
        """Give the reserve to the owners: sends are refused from now on until it is back."""
        self._disk_full = True
        with contextlib.suppress(OSError):
            self._reserve.unlink(missing_ok=True)
        self._empty_wal()


# ---------------------------------------------------------------------------------------
# Counting: rate limits (how much of something a source may have in a span of time, in
# memory, starting again with every span), the requests of a quota's day, and what is
# told of it all: events by kind, never by mailbox or source.
# ---------------------------------------------------------------------------------------


class RateLimit:
    """Count what each key takes in a span of time; a limit of 0 is none."""

    def __init__(self, limit: int, span_us: int) -> None:
        self.limit, self.span_us = limit, span_us
        self._lock = threading.Lock()
        self._span = 0
        self._taken: dict[Hashable, int] = {}

    def take(self, key: Hashable, now_us: int, amount: int = 1) -> int:
        """Take the amount and return 0, or take nothing and return the seconds to wait."""
        if not self.limit:
            return 0
        with self._lock:
            span = now_us // self.span_us
            if span != self._span:
                self._span, self._taken = span, {}
            if key not in self._taken and len(self._taken) >= MAX_SOURCES:
                key = None  # all further ones share a count
            taken = self._taken.get(key, 0) + amount
            if taken > self.limit:
                return seconds_until((span + 1) * self.span_us, now_us)
            self._taken[key] = taken
            return 0


class Rate(Protocol):
    """A rate limit. RateLimit is one; who shares a store with others may hand in another."""

    limit: int

    def take(self, key: Hashable, now_us: int, amount: int = 1) -> int:
        """Take the amount and return 0, or take nothing and return the seconds to wait; may raise StoreError."""


def own_rate(_name: str, limit: int, span_us: int) -> Rate:
    """Return a rate limit that this process keeps for itself."""
    return RateLimit(limit, span_us)


class DailyRequests:
    """Count the requests of each quota's day (UTC), together with the other processes on the store.

    What was taken here is told to the store with the next sweep, which learns what the
    others took: a request costs no write, and the sum is right to a second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._day = 0
        self._known: dict[str, int] = {}  # sums by name, as the store had them last
        self._new: collections.Counter[str] = collections.Counter()  # not yet told

    def take(self, quota: Quota, now_us: int) -> int:
        """Take one and return 0, or take nothing and return the seconds to wait."""
        with self._lock:
            day = now_us // DAY_US
            if day != self._day:
                self._day, self._known, self._new = day, {}, collections.Counter()
            taken = self._known.get(quota.name, 0) + self._new[quota.name]
            if 0 < quota.requests_per_day <= taken:
                return seconds_until((day + 1) * DAY_US, now_us)
            self._new[quota.name] += 1
            return 0

    def share(self, store: Store, now_us: int) -> None:
        """Tell the store and learn from it; what cannot be told now is told next time. Raises StoreError."""
        with self._lock:
            day, new = self._day, +self._new
        today = now_us // DAY_US
        for name, count in new.items() if day == today else ():  # what is left of yesterday would count for today
            store.spend({name: count}, now_us)
            with self._lock:  # at once: if the next name fails, this one must not be told again
                if self._day == day:
                    self._known[name] = self._known.get(name, 0) + count
                    self._new[name] -= count
        known = store.spent(now_us)
        with self._lock:
            if self._day == day != today:
                self._day, self._known, self._new = today, known, collections.Counter()
            elif self._day == today:
                self._known = known


class Metric(NamedTuple):
    """How a metric is told: its type and meaning to Prometheus, and the values of its label that are known."""

    type: str
    meaning: str
    label: str = ""
    values: Sequence[str] = ("",)


METRICS: Mapping[str, Metric] = {
    "connectoid_requests_total": Metric("counter", "Requests by action.", "action", ("send", "check", "receive")),
    "connectoid_refusals_total": Metric("counter", "Refused requests by error.", "error", tuple(
        dict.fromkeys(error.text for error in ERRORS))),
    "connectoid_datagrams_total": Metric("counter", "Datagrams by what they got.", "reply",
                                         ("check", "stun", "none")),
    "connectoid_questions_total": Metric("counter", "Questions made: each costs a P-384 seal."),
    "connectoid_handshakes_total": Metric("counter", "TLS handshakes by outcome.", "outcome", ("done", "failed")),
    "connectoid_messages": Metric("gauge", "Messages in the store."),
    "connectoid_message_bytes": Metric("gauge", "Bytes of data in the store, as --max-bytes counts them."),
    "connectoid_boxes": Metric("gauge", "Boxes with a proven owner."),
    "connectoid_healthy": Metric("gauge", "1 while the store can be read and written and the sweeper lives."),
    "connectoid_sweep_age_seconds": Metric("gauge", "Seconds since the last sweep."),
    "connectoid_uptime_seconds": Metric("gauge", "Seconds since the start."),
    "connectoid_connections": Metric("gauge", "Open connections."),
    "connectoid_waiting_boxes": Metric("gauge", "Boxes waited for in long polls."),
    "connectoid_queued_requests": Metric("gauge", "Requests in the queue for a thread."),
    "connectoid_limit": Metric("gauge", "The limits in force, by name.", "limit", ()),
    "connectoid_info": Metric("gauge", "1, with the version.", "version", ()),
}
Sample: TypeAlias = tuple[str, str]  # a metric's name and the value of its label


class Counts:
    """Count events, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Sample, int] = {
            (name, value): 0 for name, metric in METRICS.items() if metric.type == "counter"
            for value in metric.values}

    def add(self, name: str, value: str = "", count: int = 1) -> None:
        """Add to a count; a KeyError says that the metric is not in the table."""
        with self._lock:
            self._counts[name, value] += count

    def taken(self) -> dict[Sample, int]:
        """Return all counts as they are now."""
        with self._lock:
            return dict(self._counts)


class Traffic:
    """Remember how much a count has grown in each of the last minutes."""

    def __init__(self) -> None:
        self._totals: dict[int, int] = {}  # by minute, the count at its end

    def note(self, total: int, now_us: int) -> None:
        """Take the count as it is now; about once a second."""
        self._totals[now_us // MINUTE_US] = total
        self._totals = dict(list(self._totals.items())[-TRAFFIC_MINUTES - 1:])

    def per_minute(self) -> list[int]:
        """Return the growth in each of the last minutes, at most TRAFFIC_MINUTES, the current one last."""
        totals = [0, *self._totals.values()]
        return [now - before for before, now in itertools.pairwise(totals)][-TRAFFIC_MINUTES:]


# ---------------------------------------------------------------------------------------
# Access: whom the host lets in, from two files of his: API keys with their quotas, and
# a list of the addresses and mailboxes that are denied. README, "API keys", "Abuse".
# ---------------------------------------------------------------------------------------


class Access:
    """Say what an API key may have, and who is denied.

    It never changes: to let others in, put another in its place (`relay.access`).
    """

    def __init__(self, keys: Mapping[str, Quota] | None = None, public: Quota | None = EVERYTHING, *,
                 denied_sources: Networks = NO_NETWORKS, denied_boxes: frozenset[bytes] = frozenset()) -> None:
        self.public, self._denied_sources, self._denied_boxes = public, denied_sources, denied_boxes
        # Looked up by digest: how long that takes tells nothing of the key.
        self._quotas = {self._digest(key): quota for key, quota in (keys or {}).items()}

    @staticmethod
    def _digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("utf-8")).digest()

    def quota_of(self, ext: str | None) -> Quota:
        """Return the quota of a key, or what the public gets; raise Refusal (Forbidden) if that is nothing."""
        quota = self._quotas.get(self._digest(ext), self.public) if self._quotas and ext else self.public
        if quota is None:
            raise Refusal(FORBIDDEN, "This relay wants an API key in ext.")
        return quota

    def denies(self, source: str) -> bool:
        """Return whether a source is denied."""
        return source in self._denied_sources

    def check_box(self, box: bytes) -> None:
        """Raise Refusal (Forbidden) for a mailbox that is denied."""
        if box in self._denied_boxes:
            raise Refusal(FORBIDDEN, "This relay does not serve this mailbox.")


def read_access(keys: str | None = None, denied: str | None = None) -> Access:
    """Return what two files say; raise SettingError, with the line, for what is wrong in them."""
    quotas, public = _read_keys(keys) if keys else ({}, EVERYTHING)
    networks, boxes = _read_denied(denied) if denied else (NO_NETWORKS, frozenset())
    return Access(quotas, public, denied_sources=networks, denied_boxes=boxes)


def _read_octets(path: str) -> bytes:
    try:
        if Path(path).is_fifo():  # it would not end
            raise SettingError(f"{path}: is a pipe; give a file, which can be read again")
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; give a file that the relay may read") from None


def _read_text(path: str) -> str:
    octets = _read_octets(path)
    try:
        return octets.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line}: save the file as UTF-8") from None


# The form of each member of a table in the key file, and how to say it to people.
QUOTA_FORMS: Mapping[str, tuple[Callable[[Any], object], str]] = {
    "key": (lambda key: _is_text(key) and 1 <= len(key) <= MAX_EXT_CHARS,
            f"a string of 1 to {MAX_EXT_CHARS} characters"),
    **dict.fromkeys(("requests_per_day", "bytes", "message_ttl"), (
        lambda number: type(number) is int and 1 <= number <= MAX_SETTING, f"a whole number from 1 to {MAX_SETTING}")),
}


def _read_keys(path: str) -> tuple[dict[str, Quota], Quota | None]:
    """Return the quotas by API key and that of the public."""
    import tomllib  # noqa: PLC0415 - 0.8 MiB, and most relays have no key file

    text = _read_text(path)
    try:
        file = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and a number without end
        mistake, _, place = str(error).partition(" (at line ")
        line = place.partition(",")[0] or len(text.splitlines())
        raise SettingError(f"{path}, line {line}: {mistake}; write TOML: [keys.NAME], then key = \"...\"") from None
    tables = _tables_in(file, path, text)
    public = _quota_in(tables.pop("public"), "public", path, text) if "public" in tables else None
    quotas: dict[str, Quota] = {}
    for name, table in tables.items():
        quota = _quota_in(table, name, path, text)
        if "key" not in table:
            raise _mistake(path, text, name, "", f"[{name}] needs a key = \"...\"")
        if table["key"] in quotas:
            raise _mistake(path, text, name, "key", f"{quotas[table['key']].name} has the same key; make another")
        quotas[table["key"]] = quota
    return quotas, public


def _tables_in(file: dict[str, Any], path: str, text: str) -> dict[str, dict[str, Any]]:
    """Return the tables of a key file by their names, `keys.NAME` and `public`."""
    keys = file.pop("keys", {})
    tables = file | ({f"keys.{name}": table for name, table in keys.items()} if isinstance(keys, dict)
                     else {"keys": keys})
    for name, table in tables.items():
        if not isinstance(table, dict) or (name in file and name != "public"):
            raise _mistake(path, text, *name.rpartition(".")[::2],
                           f"{name} is no table; there are [keys.NAME] and [public]")
    return tables


def _quota_in(table: Mapping[str, Any], name: str, path: str, text: str) -> Quota:
    members = [member for member in QUOTA_FORMS if name != "public" or member != "key"]
    for member, value in table.items():
        if member not in members:
            raise _mistake(path, text, name, member, f"{member!r} is unknown; [{name}] may have {', '.join(members)}")
        fits, form = QUOTA_FORMS[member]
        if not fits(value):
            raise _mistake(path, text, name, member, f"{member} must be {form}")
    return Quota(name, *(table.get(member, 0) for member in ("requests_per_day", "bytes", "message_ttl")))


def _mistake(path: str, text: str, table: str, member: str, mend: str) -> SettingError:
    """Return the error with the line where the member stands, or else its table, as people write TOML."""
    wanted, place, here = _plain(f"{table}.{member}"), 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+([^]]*)\]", line)
        here = _plain(header[1]) if header else here
        found = here if header else _plain(f"{here}.{line.partition('=')[0]}")
        if found == wanted:
            return SettingError(f"{path}, line {number}: {mend}")
        if found == _plain(table):
            place = number
    return SettingError(f"{path}, line {place}: {mend}")


def _plain(name: str) -> str:
    return re.sub(r"[\s\"']", "", name).strip(".")


def read_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return a network from `192.0.2.0/24` or a single address; raise ValueError with what to write."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("write an address, or a network like 192.0.2.0/24") from None
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"write {network}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= 8 * len(IPV4_MAPPED):  # its addresses are IPv4 to us, see source_of
        return ipaddress.ip_network((mapped, network.prefixlen - 8 * len(IPV4_MAPPED)))
    return network


def _read_denied(path: str) -> tuple[Networks, frozenset[bytes]]:
    """Return the networks and the mailboxes of a file that has one a line, # before a comment."""
    networks, boxes = [], []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        entry = line.partition("#")[0].strip()
        try:
            if _PUB.fullmatch(entry):
                boxes.append(decode_pub(entry))
            elif entry:
                network = read_network(entry)
                # What is less than a source cannot be denied.
                too_long = isinstance(network, ipaddress.IPv6Network) and network.prefixlen > SOURCE_PREFIX_BITS
                networks.append(network.supernet(new_prefix=SOURCE_PREFIX_BITS) if too_long else network)
        except ValueError as error:
            raise SettingError(f"{path}, line {number}: {entry[:80]!r} is no address, network or mailbox;"
                               f" {error}") from None
    return Networks(networks), frozenset(boxes)


# ---------------------------------------------------------------------------------------
# The protocol core: requests in, replies out (PROTOCOL.md, "Operations"). No sockets, no
# SQL; clock, random source and store are handed in. It never raises to its caller.
# ---------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """Where the relay's time comes from, in microseconds."""

    wall_us: Callable[[], int]
    monotonic_us: Callable[[], int]


SYSTEM_CLOCK = Clock(lambda: time.time_ns() // 1000, lambda: time.monotonic_ns() // 1000)


class Wait(NamedTuple):
    """What a front does for a long poll: call `again` when one of the boxes gets a message
    (no later than after so many seconds), or give the reply.
    """

    boxes: frozenset[bytes]
    seconds: int
    reply: Reply
    again: Callable[[], Outcome]


# What a request comes to: a reply, a wait, or a call that may take long and then tells.
Outcome: TypeAlias = "Reply | Wait | Callable[[], Outcome]"


class About(NamedTuple):
    """What the host says of the relay, for apps to show: it stands in the document."""

    name: str = "Connectoid relay"
    contact: str | None = None
    notice: str | None = None
    price_url: str | None = None


def _fetch_nothing(_boxes: Iterable[bytes]) -> contextlib.AbstractContextManager[None]:
    """Return what a store needs whose looks cost microseconds each."""
    return contextlib.nullcontext()


def _boxes_in(batch: Iterable[object]) -> Iterator[bytes]:
    """Yield the mailboxes of those items whose form is right, if anybody asks."""
    for item in batch:
        with contextlib.suppress(Refusal):
            if isinstance(item, dict):
                yield read_box(item)


FOUND_NOTHING: Mapping[str, bool] = {"ok": True, "found": False}


def _nothing() -> Reply:
    return Reply(200, {**FOUND_NOTHING})


class Relay:
    """Answer requests: `handle` for whoever embeds it, `begin` and `run` for fronts.

    Somebody must call `sweep` about once a second; RelayServer and wsgi do. `access` may
    be replaced at any time. Relays on one store can hold rate limits in sum: `rate_limit`
    makes one from its name, its limit and its span in microseconds, and `source_key`
    returns the 32 bytes under which all of them hash the sources of a day. In a `with` of
    `fetch` these boxes are looked at, by the same thread: a store may get them at once.
    """

    def __init__(self, store: Store, limits: Limits | None = None, *, access: Access | None = None,
                 about: About | None = None, clock: Clock = SYSTEM_CLOCK,
                 random_bytes: Callable[[int], bytes] = secrets.token_bytes, log_ips: bool = False,
                 rate_limit: Callable[[str, int, int], Rate] = own_rate,
                 source_key: Callable[[int], bytes] | None = None,
                 fetch: Callable[[Iterable[bytes]], contextlib.AbstractContextManager[None]] = _fetch_nothing) -> None:
        self.store, self.limits = store, limits or Limits()
        self.access, self.about = access or Access(), about or About()
        self.counts = Counts()
        self._daily, self._traffic = DailyRequests(), Traffic()
        self._clock, self._random_bytes, self._log_ips = clock, random_bytes, log_ips
        wall_us = clock.wall_us()
        # A Raspberry Pi without network believes in 1970, or in the day of its last shutdown.
        believed_us = wall_us if RELEASE_US <= wall_us < YEAR_2200_US else RELEASE_US
        self._base_us = max(believed_us, store.time_us()) - clock.monotonic_us()
        on = self.limits.rate > 0  # else all limits here are 0, which is none
        self._requests = rate_limit("requests", self.limits.rate, MINUTE_US)
        self._seals = rate_limit("seals", on * self.limits.max_seals, MINUTE_US)
        self._sends = rate_limit("sends", on * self.limits.max_sends, MINUTE_US)
        self._sent_bytes = rate_limit("sent_bytes", on * self.limits.max_source_bytes, HOUR_US)
        self._datagrams = RateLimit(on * self.limits.max_udp, SECOND_US)
        self._complaints = RateLimit(1, MINUTE_US)
        # Our own is never written: the file shows no addresses.
        self._make_source_key = source_key or (lambda _day: random_bytes(SOURCE_KEY_BYTES))
        self._source_day, self._source_key = 0, b""
        self._fetch = fetch
        self._parsing = threading.Lock()
        self._seen_us: dict[bytes, int] = {}  # boxes with a check today, not yet written
        self._swept_us = self._started_us = self.now_us()
        with contextlib.suppress(StoreError):  # let an older process with a slower clock know
            store.probe(self.now_us())
            self._daily.share(store, self.now_us())
        self.closed = threading.Event()
        self._probed_us, self._ill = 0, ""  # what /health has to say, asked seldom

    def now_us(self) -> int:
        """Return the relay's own time: it never runs backwards, whatever the wall clock does."""
        return self._base_us + self._clock.monotonic_us()

    def handle(self, request: object, source: str) -> Reply:
        """Return (status, reply) for a parsed JSON request from an IP address.

        Never raises, and never waits for messages: `wait` is up to the fronts. Blocks
        while the disk works. PROTOCOL.md, "Operations".
        """
        outcome = self.run(functools.partial(self._begin_from, request, source))
        return outcome.reply if isinstance(outcome, Wait) else outcome

    def begin(self, body: bytes, source: str) -> Outcome:
        """Return what a body from a source (as `source_of` has it) comes to, without blocking."""
        return self.step(functools.partial(self._begin_body, body, source))

    def run(self, outcome: Outcome) -> Reply | Wait:
        """Do what `begin` left to do; may block on the disk. Never raises."""
        while callable(outcome):
            outcome = self.step(outcome)
        return outcome

    def step(self, call: Callable[[], Outcome]) -> Outcome:
        """Do one step of a request and turn every exception into a reply: the only place that does."""
        try:
            return call()
        except Refusal as refusal:
            return self.refuse(refusal)
        except StoreFull as error:
            self._complain(str(error))
            return self.refuse(Refusal(FULL, "The relay's disk is full.", retry_s=60))
        except StoreError as error:
            self._complain(str(error))
            return self.refuse(Refusal(BUSY, "The relay cannot use its store.", retry_s=5))
        except Exception:
            log.exception("a request failed; please report this")
            return self.refuse(Refusal(BUSY, "The relay failed.", retry_s=5))

    def refuse(self, refusal: Refusal) -> Reply:
        """Return what the client is told, and count it."""
        self.counts.add("connectoid_refusals_total", refusal.error.text)
        return refusal.reply()

    def _complain(self, text: str) -> None:
        if not self._complaints.take(text, self.now_us()):
            log.warning("connectoid relay: %s", text)

    # From a request to an operation

    def _begin_from(self, request: object, address: object) -> Outcome:
        source = source_of(str(address))
        self.admit(source)
        return self._begin(request, source)

    def _begin_body(self, body: bytes, source: str) -> Outcome:
        self.admit(source)
        if len(body) > MAX_INLINE_BYTES:
            return functools.partial(self._begin_long, body, source)
        return self._begin(parse_json(body), source)

    def _begin_long(self, body: bytes, source: str) -> Outcome:
        with self._parsing:  # one at a time: a parse of milliseconds lets no other thread run
            request = parse_json(body)
        return self._begin(request, source)

    def _begin(self, request: object, source: str) -> Outcome:
        if not isinstance(request, list) or not 1 <= len(request) <= MAX_BATCH_ITEMS:
            return self._begin_one(request, source, _OPERATIONS)
        first = functools.partial(self._begin_one, request[0], source, _BATCH_OPERATIONS)  # counted already
        return functools.partial(self._merge, [first, *(
            functools.partial(self._begin_item, item, source) for item in request[1:])], _boxes_in(request))

    def _begin_item(self, item: object, source: str) -> Outcome:
        self.admit(source)
        return self._begin_one(item, source, _BATCH_OPERATIONS)

    def _begin_one(self, request: object, source: str, operations: Mapping[str, _Operation]) -> Outcome:
        if not isinstance(request, dict):
            raise Refusal(BAD_REQUEST, f"A request is an object, or an array of 1 to {MAX_BATCH_ITEMS} checks.")
        action = request.get("action")
        if not isinstance(action, str) or action not in operations:
            raise Refusal(BAD_REQUEST, f"action must be one of {', '.join(operations)}.")
        self.counts.add("connectoid_requests_total", action)
        box = read_box(request)
        quota = self.access.quota_of(read(request, "ext"))
        self.access.check_box(box)
        if quota.name and (retry_s := self._daily.take(quota, self.now_us())):
            raise Refusal(TOO_OFTEN, f"More than {quota.requests_per_day} requests in a day.", retry_s)
        return operations[action](self, request, box, source, quota)

    def admit(self, source: str) -> None:
        """Count a request of a source; raise Refusal if it is denied or asks too often."""
        if self.access.denies(source):
            raise Refusal(FORBIDDEN, "This relay does not serve this address.")
        if retry_s := self._requests.take(source, self.now_us()):
            self._complain(f"{source if self._log_ips else 'a source'} asks too often")
            raise Refusal(TOO_OFTEN, f"More than {self.limits.rate} requests in a minute.", retry_s)

    def _merge(self, calls: Sequence[Callable[[], Outcome]], boxes: Iterable[bytes]) -> Outcome:
        """Return the replies of a batch, or a wait if each of its checks would wait."""
        with self._fetch(boxes):
            outcomes = [self.run(call) for call in calls]
        waits = [outcome for outcome in outcomes if isinstance(outcome, Wait)]
        replies = [outcome.reply if isinstance(outcome, Wait) else outcome for outcome in outcomes]
        reply = Reply(200, [reply.body for reply in replies])
        if len(waits) < len(outcomes):
            return reply
        waited_for = frozenset[bytes]().union(*(wait.boxes for wait in waits))
        again = functools.partial(self._merge, [wait.again for wait in waits], waited_for)
        return Wait(waited_for, min(wait.seconds for wait in waits), reply, again)

    # check

    def _check(self, request: Mapping[str, Any], box: bytes, source: str, _quota: Quota) -> Outcome:
        at_us, wait_s = read_at(request), min(read(request, "wait", 0), MAX_WAIT_S)
        # From here on without the request: it may be large, and a wait is long.
        return self._look(box, at_us, wait_s, source)

    def _look(self, box: bytes, at_us: int, wait_s: int, source: str) -> Outcome:
        if self._found(box, at_us):
            return functools.partial(self._ask, box, source)
        again = functools.partial(self._look, box, at_us, wait_s, source)
        return Wait(frozenset((box,)), wait_s, _nothing(), again) if wait_s else _nothing()

    def _found(self, box: bytes, at_us: int) -> bool:
        """Return whether there is news, and remember that the box was checked today."""
        now_us = self.now_us()
        found, expires_us = self.store.look(box, at_us, now_us)
        if expires_us is not None and len(self._seen_us) < MAX_SEEN_BOXES:
            kept_until_us = self._box_expiry_us(box, now_us)
            if kept_until_us > expires_us:
                self._seen_us[box] = kept_until_us
        return found

    def _box_expiry_us(self, box: bytes, now_us: int) -> int:
        """Return until when a box checked now is kept: the same for a day, to write once a day.

        Each box has a midnight of its own, so that they are not all written at the same time.
        """
        ttl_us = self.limits.box_ttl_s * SECOND_US
        step_us = min(DAY_US, ttl_us // 30)
        shift_us = int.from_bytes(box[-8:], "big") % step_us
        return ((now_us + shift_us) // step_us + 1) * step_us - shift_us + ttl_us

    def _ask(self, box: bytes, source: str) -> Reply:
        """Return the young question of a box, or make one."""
        now_us, ttl_us = self.now_us(), self.limits.question_ttl_s * SECOND_US
        question = self.store.question(box, now_us - ttl_us // 2, now_us)
        if question is None:
            if retry_s := self._seals.take(source, now_us):
                raise Refusal(TOO_OFTEN, f"More than {self.limits.max_seals} questions in a minute.", retry_s)
            answer = encode_base64url(self._random_bytes(ANSWER_BYTES))
            made = (seal_question(box, answer), hash_answer(answer))
            self.counts.add("connectoid_questions_total")
            question = self.store.put_question(box, made, ttl_us, now_us)
        return Reply(200, {"ok": True, "found": True, "question": question})

    def admit_datagram(self, source: str) -> bool:
        """Count a datagram against the budget of all; return whether it may be answered."""
        if self.access.denies(source):
            return False
        return not self._datagrams.limit or not self._datagrams.take("udp", self.now_us())

    def glance(self, request: Mapping[str, Any]) -> bool:
        """Return what a UDP check finds; raise Refusal or StoreError. PROTOCOL.md, "UDP"."""
        if request.get("action") != "check":
            raise Refusal(BAD_REQUEST)
        box = read_box(request)
        self.access.check_box(box)
        return self._found(box, read_at(request))

    # receive

    def _receive(self, request: Mapping[str, Any], box: bytes, _source: str, _quota: Quota) -> Outcome:
        answer, limit = read(request, "answer"), read(request, "limit", 1)
        return functools.partial(self._deliver, box, answer, read_at(request), limit)

    def _deliver(self, box: bytes, answer: str, at_us: int, limit: int) -> Reply:
        now_us = self.now_us()
        given = hash_answer(answer)
        right = [hmac.compare_digest(given, kept) for kept in self.store.answers(box, now_us)]
        if not any(right):
            raise Refusal(WRONG_ANSWER, "Check again for a new question.")
        self._prove(box, at_us)
        messages = [{"at": at, "data": sealed} for at, sealed in self.store.messages(box, at_us, limit, now_us)]
        if not messages:
            return _nothing()
        return Reply(200, {"ok": True, **messages[0]} if limit == 1 else {"ok": True, "messages": messages})

    def _prove(self, box: bytes, at_us: int) -> None:
        """Make the box row of an owner who has just answered; without one life goes on."""
        now_us = self.now_us()
        if self.store.look(box, at_us, now_us).box_expires_us is None:
            expiry_us = {box: self._box_expiry_us(box, now_us)}
            with contextlib.suppress(StoreError):
                self.store.keep_boxes(expiry_us, now_us, room_for=self.limits.max_boxes, soon=True)

    # send

    def _send(self, request: Mapping[str, Any], box: bytes, source: str, quota: Quota) -> Outcome:
        return functools.partial(self._keep, box, read_data(request), source, quota)

    def _keep(self, box: bytes, sealed: str, source: str, quota: Quota) -> Reply:
        now_us = self.now_us()
        read_public_key(box)  # nothing is kept for a box that nobody can open
        if retry_s := self._sends.take((box, source), now_us) or self._sent_bytes.take(source, now_us, len(sealed)):
            raise Refusal(TOO_OFTEN, "Too many messages from one source.", retry_s)
        ttl_us = (quota.message_ttl_s or self.limits.message_ttl_s) * SECOND_US
        message = Message(box, sealed, self._hash_source(source), ttl_us, quota)
        try:
            self.store.put(message, self.limits, now_us)
        except NoRoom as error:
            raise self._no_room(error) from None
        return Reply(200, {"ok": True})

    def _hash_source(self, source: str) -> bytes:
        """Return what stands for a source today: tomorrow the same source has another."""
        today = self.now_us() // DAY_US
        if today != self._source_day:
            self._source_day, self._source_key = today, self._make_source_key(today)
        return hashlib.blake2b(source.encode("utf-8", "replace"), key=self._source_key, digest_size=16).digest()

    def _no_room(self, error: NoRoom) -> Refusal:
        if error.whose == "relay":
            self._complain("the storage is full (--max-bytes)")
            return Refusal(FULL, "The relay's storage is full.", retry_s=60)
        if error.whose == "quota":
            return Refusal(TOO_OFTEN, "The quota of bytes is used up until messages expire.", retry_s=60)
        retry_s = seconds_until(error.until_us, self.now_us())
        if error.whose == "source":
            return Refusal(TOO_OFTEN, f"One source may fill 1/{SOURCE_SHARE} of a box.", retry_s)
        return Refusal(FULL, "The box is full.", retry_s)

    # For the fronts

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Have many checks see one state of the store, in a `with` in which nobody is told that a message is kept."""
        try:
            return self.store.snapshot()
        except StoreError:  # each check will say so
            return contextlib.nullcontext()

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` and the boxes that got messages since; nothing if that fails."""
        try:
            return self.store.arrivals(after_us)
        except StoreError as error:
            self._complain(str(error))
            return after_us, set()

    def sweep(self) -> bool:
        """Write down who was seen, delete some of what has expired; return whether there is more."""
        now_us = self.now_us()
        self._traffic.note(sum(count for (name, _), count in self.counts.taken().items()
                               if name == "connectoid_requests_total"), now_us)
        # Another process may have a clock that is ahead: without this ours would stand still.
        self._base_us += max(0, self.store.time_us() - now_us)
        more_seen = False
        try:
            more_seen = self._write_seen()
        finally:
            more = self.store.sweep(self.now_us())
            self._swept_us = self.now_us()
        return more or more_seen

    def _write_seen(self) -> bool:
        """Write down some of those who were seen, and return whether there may be more."""
        self._daily.share(self.store, self.now_us())
        seen_us = dict(itertools.islice(self._seen_us.copy().items(), MAX_SEEN_WRITES))
        if seen_us:
            self.store.keep_boxes(seen_us, self.now_us())
        for box, until_us in seen_us.items():
            if self._seen_us.get(box) == until_us:  # else it was checked again meanwhile, on another day
                del self._seen_us[box]
        return len(seen_us) == MAX_SEEN_WRITES

    def ill(self) -> str:
        """Return why the relay is not well, or nothing: a real write and read, seldom; may block."""
        now_us = self.now_us()
        if now_us - self._probed_us >= PROBE_EVERY_US:
            self._probed_us = now_us
            try:
                self.store.probe(now_us)
                self._ill = ""
            except Exception as error:  # whatever it is, the store is not well
                self._complain(str(error))
                self._ill = "The store cannot be read or written."
        return "The sweeper has stopped." if self.sweeper_is_late() else self._ill

    def health(self) -> Reply:
        """Return 200 while a write and a read of the store work and the sweeper lives; may block."""
        ill = self.ill()
        return Refusal(BUSY, ill, retry_s=5).reply() if ill else Reply(200, {"ok": True})

    def sweeper_is_late(self) -> bool:
        """Return whether nobody has swept for a minute."""
        return self.now_us() - self._swept_us > SWEEPER_LATE_US

    def document(self) -> dict[str, Any]:
        """Return what apps and people may know of this relay. PROTOCOL.md, "HTTP"."""
        limits = self.limits._asdict()
        retention = {name: limits.pop(f"{name}_ttl_s") for name in ("message", "question", "box")}
        if self.access.public and self.access.public.message_ttl_s:
            retention["message"] = self.access.public.message_ttl_s
        return {
            "name": self.about.name,
            "description": "Keeps small encrypted messages until the app they are for comes online.",
            "software": "connectoid_relay", "version": __version__, "contact": self.about.contact,
            "limits": limits, "retention": retention, "udp": False, "stun": False,
            "notice": self.about.notice, "price_url": self.about.price_url,
        }

    def uptime_s(self) -> int:
        """Return the whole seconds since the start."""
        return (self.now_us() - self._started_us) // SECOND_US

    def stored(self) -> Stored | None:
        """Return what the store holds, None if that cannot be said now."""
        try:
            return self.store.stored()
        except StoreError as error:
            self._complain(str(error))
            return None

    def traffic(self) -> list[int]:
        """Return the requests of each of the last minutes, the current one last."""
        return self._traffic.per_minute()

    def samples(self) -> dict[Sample, int]:
        """Return the metrics that the core knows; may block. Without those of a store that fails."""
        samples = self.counts.taken()
        gauges = {"healthy": not self.ill(), "uptime_seconds": self.uptime_s(),
                  "sweep_age_seconds": (self.now_us() - self._swept_us) // SECOND_US}
        if stored := self.stored():
            gauges |= {"messages": stored.messages, "message_bytes": stored.bytes, "boxes": stored.boxes}
        samples |= {(f"connectoid_{name}", ""): int(number) for name, number in gauges.items()}
        samples |= {("connectoid_limit", name): number for name, number in self.limits._asdict().items()}
        samples["connectoid_info", __version__] = 1
        return samples

    def close(self) -> None:
        """Write down who was seen and close the store."""
        self.closed.set()
        with contextlib.suppress(StoreError):
            self._write_seen()
        self.store.close()


_Operation: TypeAlias = Callable[[Relay, Mapping[str, Any], bytes, str, Quota], Outcome]
_OPERATIONS: Mapping[str, _Operation] = {"send": Relay._send, "check": Relay._check, "receive": Relay._receive}
_BATCH_OPERATIONS: Mapping[str, _Operation] = {"check": Relay._check}


# ---------------------------------------------------------------------------------------
# HTTP: RFC 9112 as far as a relay needs it, read strictly, so that no proxy before us can
# see another request than we do. Pure functions from bytes to requests, replies to bytes.
# ---------------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = _TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*\r\n"
_HEAD = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n(?:" + _FIELD + rb")*\r\n")
_HOPELESS = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n|\Z)")  # TLS, for one, has a NUL at once
_LENGTH = re.compile(rb"[0-9]{1,9}")
_AUTHORITY = re.compile(r"\Ahttps?://[^/?]*", re.IGNORECASE)
# The headers that the relay uses; only to be searched in what _HEAD has matched. Spaces around a value
# are stripped later: to match them here would take time by the square of their number.
_USED_FIELD = re.compile(
    rb"\n(?i:(Accept|Connection|Content-Length|Expect|Transfer-Encoding|X-Forwarded-For)):([^\r]*)\r")
_METHODS = {"/": "GET, HEAD, POST, OPTIONS", "/health": "GET, HEAD, OPTIONS", "/metrics": "GET, HEAD, OPTIONS"}
HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Lines of headers.
CLOSE = b"Connection: close\r\n"
JSON = b"Content-Type: application/json\r\n"
CORS = b"Access-Control-Allow-Origin: *\r\n"
VARY = b"Vary: Accept\r\n"
PREFLIGHT = (b"Access-Control-Allow-Methods: GET, POST, OPTIONS\r\nAccess-Control-Allow-Headers: Content-Type\r\n"
             b"Access-Control-Max-Age: 86400\r\n")
# Nothing of the page comes from anywhere else or runs, whatever its host has written.
GUARDED = (b"Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n"
           b"X-Content-Type-Options: nosniff\r\n")
NO_CONTENT = Reply(204, Text("", ""))
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus}
FOUND_NOTHING_JSON = json.dumps(FOUND_NOTHING).encode("ascii") + b"\n"
HTML_TYPE = "text/html; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Head(NamedTuple):
    """A request without its body: what the relay uses of it."""

    method: str
    path: str
    length: int
    keep_alive: bool
    expects_continue: bool
    wants_json: bool
    forwarded_for: str


def take_head(incoming: bytearray, limits: Limits, searched: int = 0) -> Head | None:
    """Remove a request's head from what came in; None if it is not complete. Raises Refusal.

    So many bytes were searched before: who sends byte by byte shall not have all read again.
    """
    end = incoming.find(HEAD_END, max(0, searched - len(HEAD_END) + 1))
    if (len(incoming) if end < 0 else end + len(HEAD_END)) > limits.max_header_bytes:
        raise Refusal(HEADERS_TOO_BIG, f"More than {limits.max_header_bytes} bytes of headers.")
    if end < 0:
        if _HOPELESS.search(incoming, max(0, searched - 1)):
            raise Refusal(BAD_REQUEST, "This is not HTTP/1.1.")
        return None
    octets = bytes(incoming[:end + len(HEAD_END)])
    del incoming[:len(octets)]
    head = parse_head(octets)
    if head.length > limits.max_body_bytes:
        raise Refusal(TOO_BIG, f"A body may have {limits.max_body_bytes} bytes.")
    return head


def parse_head(octets: bytes) -> Head:
    """Return the head of a request; raise Refusal (Bad request) for whatever is unusual."""
    match = _HEAD.fullmatch(octets)
    if not match:
        raise Refusal(BAD_REQUEST, "This is not HTTP/1.1.")
    headers: dict[bytes, bytes] = {}
    for name, value in _USED_FIELD.findall(octets):
        key, text = name.lower(), value.strip(b" \t")
        headers[key] = headers[key] + b"," + text if key in headers else text  # RFC 9110, section 5.3
    if b"transfer-encoding" in headers:
        raise Refusal(BAD_REQUEST, "Send a Content-Length; Transfer-Encoding is not taken.")
    length = headers.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise Refusal(BAD_REQUEST, "Send one Content-Length of 1 to 9 digits.")
    method, target, minor = match.groups()
    return Head(
        method=method.decode("ascii"),
        path=_AUTHORITY.sub("", target.decode("ascii"), count=1).partition("?")[0] or "/",
        length=int(length),
        keep_alive=minor == b"1" and b"close" not in headers.get(b"connection", b"").lower(),
        expects_continue=minor == b"1" and headers.get(b"expect", b"").lower() == b"100-continue",
        wants_json=b"application/json" in headers.get(b"accept", b""),
        forwarded_for=headers.get(b"x-forwarded-for", b"").decode("latin-1"),
    )


def encode_json(value: object) -> bytes:
    """Return JSON, with an end of line for whoever uses curl; the most frequent reply stands ready."""
    return FOUND_NOTHING_JSON if value == FOUND_NOTHING else json.dumps(value).encode("ascii") + b"\n"


def respond(reply: Reply, head: Head | None) -> tuple[bytes, bytes]:
    """Return the lines of headers and the body of a reply; the head is None if there was none.

    `retry` is also a header.
    """
    if reply.status == HTTPStatus.NO_CONTENT:
        return CORS + PREFLIGHT, b""
    if isinstance(reply.body, Text):
        body = reply.body.text.encode("utf-8")
        headers = CORS + b"Content-Type: %s\r\n" % reply.body.media_type.encode("ascii") + GUARDED
    else:
        body, headers = encode_json(reply.body), CORS + JSON
        if isinstance(reply.body, dict) and "retry" in reply.body:
            headers += b"Retry-After: %d\r\n" % reply.body["retry"]
    if reply.status == HTTPStatus.METHOD_NOT_ALLOWED and head:
        headers += b"Allow: %s\r\n" % _METHODS[head.path].encode("ascii")
    if head and head.method != "POST" and head.path == "/":
        headers += VARY
    return headers + b"Content-Length: %d\r\n" % len(body), b"" if head and head.method == "HEAD" else body


def render(reply: Reply, head: Head | None = None, *, last: bool = True) -> bytes:
    """Return a whole reply to a request, or to None, which was not read to its end; after the last we close.

    Without a Date: the relay has no clock that it would swear by.
    """
    headers, body = respond(reply, head)
    return b"%s%s%s\r\n%s" % (STATUS_LINES[reply.status], headers, CLOSE if last else b"", body)


class Front(NamedTuple):
    """What a front tells of itself in the document and in the metrics."""

    udp: bool = False
    stun: bool = False
    gauges: Callable[[], Mapping[str, int]] = dict


def route(relay: Relay, head: Head, body: bytes, source: str, front: Front) -> Outcome:
    """Return what an HTTP request of a source comes to, without blocking."""
    if head.method == "OPTIONS":
        return NO_CONTENT
    if head.path not in _METHODS:
        return relay.refuse(Refusal(NOT_FOUND))
    if head.method == "POST" and head.path == "/":
        return relay.begin(body, source)
    if head.method == "POST" or head.method not in _METHODS[head.path].split(", "):
        return relay.refuse(Refusal(NOT_ALLOWED))
    if head.path == "/health":
        return relay.health
    return relay.step(functools.partial(_show, relay, head, source, front))


def _show(relay: Relay, head: Head, source: str, front: Front) -> Outcome:
    """Return what people and monitors see."""
    relay.admit(source)
    if head.path == "/metrics":
        return lambda: Reply(200, Text(METRICS_TYPE, render_metrics(relay.samples() | {
            (f"connectoid_{name}", ""): number for name, number in front.gauges().items()})))
    document = relay.document() | {"udp": front.udp, "stun": front.stun}
    if head.wants_json:
        return Reply(200, document)
    return lambda: Reply(200, Text(HTML_TYPE, render_page(relay, document)))


def render_metrics(samples: Mapping[Sample, int]) -> str:
    """Return samples in Prometheus's text format 0.0.4, in the order of METRICS."""
    lines = []
    for name, metric in METRICS.items():
        found = [(value, number) for (sampled, value), number in samples.items() if sampled == name]
        if found:
            lines += [f"# HELP {name} {metric.meaning}", f"# TYPE {name} {metric.type}"]
        lines += [f'{name}{{{metric.label}="{value}"}} {number}' if metric.label else f"{name} {number}"
                  for value, number in found]
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------------------------------
# The page that people see at GET /: no script, nothing from elsewhere. A template and
# pure functions for its parts.
# ---------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fcfcfa; --ink: #1d2124; --soft: #596168; --line: #dddfdc; --note: #f5efdd;
  --link: #2f756c; --well: #1f6d43; --ill: #a8321f }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #15181a; --ink: #e3e5e6; --soft: #9ea6ac; --line: #343a3e;
  --note: #2b2719; --link: #6fb5aa; --well: #7cc79b; --ill: #f19480 }} }}
body {{ margin: 0 auto; max-width: 48rem; padding: 2.5rem 1.25rem; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); font: 1.0625rem/1.55 system-ui, sans-serif }}
h1 {{ margin: 0; font-size: 1.9rem; line-height: 1.2 }} h2 {{ margin: 0 0 .75rem; font-size: 1em }}
p {{ margin: 0 0 .75rem }} dl, figure {{ margin: 0 0 1.25rem }} h1 + p {{ margin-top: .4rem }}
aside {{ margin: 1rem 0; border-left: 4px solid; padding: .75rem 1rem; background: var(--note); white-space: pre-line }}
section {{ margin-top: 1.5rem; border-top: 1px solid var(--line); padding-top: 1.25rem }}
@media (min-width: 46rem) {{ section {{ display: grid; grid-template-columns: 11rem 1fr }} }}
dl {{ display: grid; grid-template-columns: 43% 1fr }} dt {{ padding-right: .75rem }} dd {{ margin: 0 }}
dd ~ dt, dd ~ dd {{ margin-top: .4rem; border-top: 1px solid var(--line); padding-top: .4rem }}
svg {{ display: block; width: 100%; height: 4.5rem; margin: .5rem 0 .25rem; border-bottom: 1px solid var(--line) }}
h1 + p, dt, figure {{ color: var(--soft) }} a, svg {{ color: var(--link) }} path {{ fill: currentColor }}
code {{ white-space: nowrap }} figure, code {{ font-size: .9em }} span + span {{ float: right }}
strong::before {{ content: ""; display: inline-block; border: .3em solid; margin-right: .55em }}
.well {{ color: var(--well) }} .well::before {{ border-radius: 50% }}
.ill {{ color: var(--ill) }} .ill::before {{ transform: rotate(45deg) }}
</style>
<main><h1>{name}</h1><p>{description}</p>{notice}
<p><strong class="{health}">{state}</strong> Up for {uptime}.</p>
<section><h2>What it does</h2><div>
<p>It passes small messages between apps that are not online at the same time. A mailbox is a public key. Apps seal
their messages for it, so that only the holder of the private key can open them.</p>
<p>The relay knows neither who writes nor what. It can delay or lose a message, and it sees which mailboxes are used,
when, and from which network addresses. Every message is deleted when its time is over, read or not.</p></div></section>
<section><h2>Now</h2><div>{bars}<dl><dt>Messages<dd>{messages}<dt>Storage<dd>{used} of {room}
<dt>Mailboxes with a proven owner<dd>{boxes} of {limits[max_boxes]:,}</dl></div></section>
<section><h2>Limits</h2><dl><dt>Requests from one address<dd>{rate}<dt>Connections at a time<dd>{connections}
<dt>Size of a message<dd>24 KiB (32,768 characters)<dt>A message is kept<dd>{kept}, unless an API key says otherwise
<dt>Messages in a mailbox<dd>{limits[max_box_messages]:,}, at most {box}<dt>An unused mailbox is kept<dd>{box_kept}
</dl></section>
<section><h2>About</h2><div><dl>{contact}{price}<dt>Checks over UDP<dd>{udp}<dt>STUN<dd>{stun}
<dt>Software<dd>{software} {version}</dl>
<p>Apps use <code>POST /</code>, and have this page as JSON with <code>Accept: application/json</code>. Monitors use
<code>GET /health</code> and <code>GET /metrics</code>.</p></div></section></main>
</html>
"""


def render_page(relay: Relay, document: Mapping[str, Any]) -> str:
    """Return the page for people; may block."""
    texts = {name: html.escape(str(document[name] or "")) for name in ("name", "description", "software", "version")}
    limits, retention = document["limits"], document["retention"]
    notice, contact, price = (document[name] or "" for name in ("notice", "contact", "price_url"))
    ill, stored = relay.ill(), relay.stored()
    return PAGE.format(
        **texts, limits=limits, bars=_bars(relay.traffic()), uptime=_span(relay.uptime_s()),
        health="ill" if ill else "well", state=html.escape(f"Not well: {ill}" if ill else "All is well."),
        notice=notice and f'\n<aside aria-label="Notice">{html.escape(notice)}</aside>',
        contact=contact and f"<dt>Contact<dd>{_link(contact, contact.removeprefix('mailto:'))}\n",
        price=price and f"<dt>Prices<dd>{_link(price, 'What this relay costs')}\n",
        messages=f"{stored.messages:,}" if stored else "unknown", boxes=f"{stored.boxes:,}" if stored else "unknown",
        used=_size(stored.bytes) if stored else "unknown", room=_size(limits["max_bytes"]),
        box=_size(limits["max_box_bytes"]), kept=_span(retention["message"]), box_kept=_span(retention["box"]),
        rate=f"{limits['rate']:,} a minute" if limits["rate"] else "no limit",
        connections=f"{limits['max_connections']:,}" if limits["max_connections"] else "no limit",
        **{name: "on" if document[name] else "off" for name in ("udp", "stun")})


def _link(target: str, words: str) -> str:
    """Return a link to a web or mail address; anything else as text, so that no `javascript:` becomes a link."""
    url = f"mailto:{target}" if re.fullmatch(r"[\w.+-]+@[\w.-]+", target) else target
    if not re.fullmatch(r"(https?://|mailto:)\S+", url):
        return html.escape(target)
    return f'<a href="{html.escape(url)}" rel="noreferrer">{html.escape(words)}</a>'


def _bars(traffic: Sequence[int]) -> str:
    """Return a picture of the last 60 minutes: a dash for one without requests, nothing for one before the start."""
    shown, path = traffic[-60:], ""
    most = max(shown, default=0)
    for x, requests in enumerate(shown, 60 - len(shown)):
        height = 1 + 2 * (requests > 0) + round(69 * requests / max(most, 10))  # 10: a single one is no rush
        path += f"M{10 * x} 72v-{height}h8v{height}z"
    words = f"Requests per minute: {most:,} at most" if most else "No requests in the last 60 minutes"
    return (f'<figure><figcaption>{words}</figcaption>\n<svg viewBox="0 0 598 72" preserveAspectRatio="none" '
            f'role="img" aria-label="{words}. One bar a minute."><path d="{path}"/></svg>\n'
            "<p><span>60 minutes ago</span><span>now</span></p></figure>\n")


def _span(seconds: int) -> str:
    """Return a time in its two largest units: 1 day 4 hours."""
    words = []
    for unit, unit_s in (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, unit_s)
        words += [f"{count:,} {unit}{'s' * (count != 1)}"] * (count > 0)
    return " ".join(words[:2]) or "0 seconds"


def _size(octets: int) -> str:
    """Return a size in the largest unit that it fills: 1.5 KiB."""
    power = min(max(octets.bit_length() - 1, 0) // 10, 4)
    return f"{round(octets / 1024**power, 1):g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# ---------------------------------------------------------------------------------------
# UDP: one datagram with a check, one back, never longer, and STUN (RFC 8489) on the same
# port. Pure functions; whatever is neither gets nothing, so that a forged sender gains
# nothing.
# ---------------------------------------------------------------------------------------

MAX_DATAGRAM_BYTES = 2_048  # more than any check needs
STUN_COOKIE = 0x2112A442
STUN_HEADER = struct.Struct(">HHI12s")  # type, length of the attributes, cookie, transaction
STUN_ATTRIBUTE = struct.Struct(">HH")  # type, length
BINDING_REQUEST, BINDING_SUCCESS, XOR_MAPPED_ADDRESS = 0x0001, 0x0101, 0x0020
COMPREHENSION_OPTIONAL = 0x8000  # attributes from here on may be ignored


def is_stun(datagram: bytes) -> bool:
    """Return whether a datagram is STUN: the first two bits are 0 and the cookie is in its place."""
    return len(datagram) >= STUN_HEADER.size and datagram[0] < 0x40 and (  # noqa: PLR2004 - two bits
        datagram[4:8] == STUN_COOKIE.to_bytes(4, "big"))


def answer_stun(datagram: bytes, address: str, port: int) -> bytes | None:
    """Return the sender's address, as we see it, for a Binding request; None for anything else.

    A request that needs an attribute understood gets nothing either: an error (RFC 8489,
    section 6.3.1) would help nobody but a forger.
    """
    kind, length, cookie, transaction = STUN_HEADER.unpack_from(datagram)
    if kind != BINDING_REQUEST or length != len(datagram) - STUN_HEADER.size or not _may_be_ignored(datagram):
        return None
    family, octets = (1, socket.inet_aton(address)) if ":" not in address else (
        2, socket.inet_pton(socket.AF_INET6, address.partition("%")[0]))
    if octets.startswith(IPV4_MAPPED):
        family, octets = 1, octets[len(IPV4_MAPPED):]
    mask = cookie.to_bytes(4, "big") + transaction
    hidden = bytes(octet ^ key for octet, key in zip(octets, mask, strict=False))
    value = struct.pack(">xBH", family, port ^ cookie >> 16) + hidden
    attribute = STUN_ATTRIBUTE.pack(XOR_MAPPED_ADDRESS, len(value)) + value
    return STUN_HEADER.pack(BINDING_SUCCESS, len(attribute), cookie, transaction) + attribute


def _may_be_ignored(datagram: bytes) -> bool:
    """Return whether all attributes of a request are whole and may be ignored."""
    place = STUN_HEADER.size
    while place + STUN_ATTRIBUTE.size <= len(datagram):
        kind, length = STUN_ATTRIBUTE.unpack_from(datagram, place)
        if kind < COMPREHENSION_OPTIONAL:
            return False
        place += STUN_ATTRIBUTE.size + length + -length % 4
    return place == len(datagram)


def answer_datagram(relay: Relay, datagram: bytes, source: str = "") -> bytes | None:
    """Return the reply to a datagram with a check, or None for none. PROTOCOL.md, "UDP"."""
    if len(datagram) > MAX_DATAGRAM_BYTES or not relay.admit_datagram(source):
        return None
    try:
        request = parse_json(datagram)
        if not isinstance(request, dict):
            return None
        found = "true" if relay.glance(request) else "false"
        octets = f'{{"ok": true, "found": {found}, "id": "{read(request, "id")}"}}' if "id" in request else (
            f'{{"ok": true, "found": {found}}}')
    except (Refusal, StoreError):
        return None
    return octets.encode("ascii") if len(octets) <= len(datagram) else None


# ---------------------------------------------------------------------------------------
# The server. One thread owns all sockets: it waits for them with a selector, reads, and
# answers at once what needs neither disk nor seal (most of all the check that finds
# nothing). The rest goes to a few threads and comes back through a queue. A client is a
# generator that yields the events it waits for; so one that is idle, slow or waiting
# costs some memory and no thread, and no socket needs a lock.
# ---------------------------------------------------------------------------------------

NOTHING, READ, WRITE = 0, selectors.EVENT_READ, selectors.EVENT_WRITE
NEVER_S = float("inf")
EVERYBODY = ""  # the key of the count of all connections, beside those of the sources

_Task: TypeAlias = "tuple[_Client, Callable[[], Any]]"


class _Turns:
    """Tasks for the threads. Sources take turns, so that one with many of them waits for itself alone.

    When all places are taken, a source may still have its equal share of them: so there
    are at most twice as many.
    """

    def __init__(self, places: int) -> None:
        self._places, self._taken, self._lock = places, 0, threading.Lock()
        self._tasks: dict[str, collections.deque[_Task]] = {}
        self._next: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # each source with tasks, once

    def __len__(self) -> int:
        return self._taken

    def put(self, source: str, task: _Task) -> bool:
        """Queue a task of a source, or return False if there is no place for it."""
        with self._lock:
            own = self._tasks.get(source)
            share = self._places // (len(self._tasks) + (own is None))
            if self._taken >= self._places and (len(own or ()) >= share or self._taken >= 2 * self._places):
                return False
            if own is None:
                own = self._tasks[source] = collections.deque()
                self._next.put(source)
            own.append(task)
            self._taken += 1
            return True

    def get(self) -> _Task | None:
        """Return the next task, as soon as there is one; None is the end."""
        source = self._next.get()
        if source is None:
            return None
        with self._lock:
            tasks = self._tasks[source]
            task = tasks.popleft()
            self._taken -= 1
            if tasks:
                self._next.put(source)
            else:
                del self._tasks[source]
            return task

    def end(self) -> None:
        """Have one thread told that this is the end, after what has its turn before."""
        self._next.put(None)


_T = TypeVar("_T")
_Steps: TypeAlias = Generator[int, Any, _T]  # yields events; at a deadline gets a TimeoutError


class _Client:
    """A connection: its socket, what came in and is not used yet, and how it goes on."""

    __slots__ = ("address", "counted", "cursor_us", "deadline_s", "events", "held", "idle", "incoming", "proxy",
                 "socket", "source", "steps")

    def __init__(self, connection: socket.socket, address: str, proxies: Networks) -> None:
        self.socket: socket.socket | _TlsSocket = connection
        self.address, self.source, self.events = address, source_of(address), NOTHING
        self.proxy = address in proxies  # one that we trust: its clients are many
        self.incoming, self.held = bytearray(), 0  # held: bytes kept from one turn to another
        self.deadline_s = NEVER_S
        self.counted = False  # among the connections: a refused one no longer is
        self.idle = False  # nothing is lost if it is timed out now
        self.cursor_us = 0  # up to which messages its check has certainly seen
        self.steps: _Steps[None]


def _take_ipv4_too(unbound: socket.socket) -> None:
    if unbound.family == socket.AF_INET6:
        unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def _add(sums: dict[str, int], source: str, change: int) -> None:
    """Add for a source and for EVERYBODY; who has nothing leaves nothing behind."""
    for key in (source, EVERYBODY):
        if total := sums.get(key, 0) + change:
            sums[key] = total
        else:
            sums.pop(key, None)


def load_tls(certificate: str, key: str) -> ssl.SSLContext:
    """Return what TLS needs, from PEM files: the chain and its private key. Raises SettingError."""
    for path, needed in ((certificate, b"BEGIN CERTIFICATE"), (key, b"PRIVATE KEY")):
        if needed not in _read_octets(path):  # the words of ssl name no file
            raise SettingError(f"{path} has no {needed.decode().removeprefix('BEGIN ').lower()} in it; give it as PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 or newer
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=lambda: b"")  # nobody is here to be asked
    except OSError as error:  # most are SSLError; a file may also have gone meanwhile
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise SettingError(f"{key} is not the key of {certificate}; give the two that belong together") from None
        mend = "without a passphrase, " if b"ENCRYPTED" in _read_octets(key) else ""
        raise SettingError(f"{certificate} or {key} cannot be used; give a chain of certificates and its private"
                           f" key, {mend}both as PEM") from None
    return context


class _TlsSocket:
    """TLS on a socket that does not block, with the methods of a socket that we use.

    OpenSSL itself reads as long as there is something: a flood of records without any
    content (KeyUpdate) would hold the loop for seconds. So it gets its octets from us, few
    in a turn, and whoever sends many more than he has to say is cut off.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self.connection, self.fileno = connection, connection.fileno
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent, self._taken = b"", 0  # what the kernel has not taken of a send of so many bytes
        self._spare_bytes = TLS_SPARE_BYTES

    def shake_hands(self) -> int | None:
        """Do what can be done of the handshake now; return the events it waits for, None if it has failed."""
        try:
            if self._feed():
                return None
            events = NOTHING
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                events = READ
            return events if self._has_flushed() else WRITE
        except (OSError, ValueError):  # ValueError: it is closed
            return None

    def recv(self, size: int) -> bytes:
        """Return what has come in, nothing at its end; raise BlockingIOError, or ConnectionError for a flood."""
        ended, received = self._feed(), b""
        try:
            while chunk := self._tls.read(size):
                received += chunk
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        self._has_flushed()  # what OpenSSL answers by itself
        if not (received or ended):
            raise BlockingIOError
        self._spare_bytes += TLS_OVERHEAD * len(received)
        return received

    def send(self, octets: memoryview | bytes, _flags: int = 0) -> int:
        """Return how many bytes have gone out; raise BlockingIOError, after which the same must be sent again."""
        self._taken = self._taken or self._tls.write(octets[:TLS_RECORD_BYTES])
        self._flush()
        taken, self._taken = self._taken, 0
        return taken

    def end(self) -> socket.socket:
        """Say that nothing follows, so that the client knows that nothing was cut off; return the bare socket."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()
        return self.connection

    def _feed(self) -> bool:
        """Give OpenSSL some of what has come in; return whether there will be no more."""
        try:
            octets = self.connection.recv(TLS_TURN_BYTES)
        except BlockingIOError:
            return False
        self._incoming.write(octets)
        self._spare_bytes -= len(octets)
        if self._spare_bytes < 0:
            raise ConnectionAbortedError
        return not octets

    def _flush(self) -> None:
        self._unsent += self._outgoing.read()
        while self._unsent:
            self._unsent = self._unsent[self.connection.send(self._unsent):]

    def _has_flushed(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._flush()
        return not self._unsent


def sweep_until(stop: threading.Event, relay: Relay) -> None:
    """Sweep about once a second, in small steps while there is much to do: the body of a thread."""
    pause_s = 0.0
    while not stop.wait(pause_s):
        try:
            pause_s = SWEEP_PAUSE_S if relay.sweep() else SWEEP_EVERY_S
        except Exception as error:
            log.warning("connectoid relay: cannot sweep: %s", error)
            pause_s = SWEEP_RETRY_S


class RelayServer(http.server.ThreadingHTTPServer):
    """Serve a relay over HTTP, and over UDP if asked: an http.server with other insides.

    `serve_forever`, `shutdown`, `server_close`, `server_port` and `with` are as usual; it
    serves once. The host "" is all interfaces, IPv6 and IPv4. `udp` answers checks and
    `stun` Binding requests in single datagrams; `proxies` are those whose X-Forwarded-For is
    believed; `on_tick` is called some times a second by the serving thread; `tls`, which may be replaced while it
    serves, is what `load_tls` gives; `inherited` are sockets that listen already, one
    stream and at most one of datagrams; `remote` is for a store across a network, which only the
    pool asks, and not for UDP: its `arrivals` alone must not block. Raises OSError if the address cannot be had.
    """

    request_queue_size = LISTEN_BACKLOG

    def __init__(self, server_address: tuple[str, int], relay: Relay, *, udp: bool = False, stun: bool = False,
                 tls: ssl.SSLContext | None = None, proxies: Networks = NO_NETWORKS,
                 inherited: Sequence[socket.socket] = (), on_tick: Callable[[], None] = lambda: None,
                 remote: bool = False) -> None:
        host = server_address[0]
        self._remote = remote
        # A call that is made later, by the pool, or at once.
        self._route: Callable[..., Outcome] = functools.partial(functools.partial, route) if remote else route
        self._inherited = {opened.type: opened for opened in inherited}
        self.address_family = (socket.getaddrinfo(host, None)[0][0] if host else
                               socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        self.relay, self.limits, self.tls = relay, relay.limits, tls
        self._proxies, self._on_tick = proxies, on_tick
        self._front = Front(udp, stun, self._gauges)
        self._handshakes = RateLimit(relay.limits.rate, MINUTE_US)  # one costs as much as a seal
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._open: dict[str, int] = {}  # connections per source, and of EVERYBODY
        self._waiting: dict[bytes, set[_Client]] = {}
        self._places = 0  # taken in _waiting
        self._held: dict[str, int] = {}  # bytes, counted in the same way
        self._cursor_us = relay.store.time_us() - 1  # up to which messages the loop knows all
        self._tasks = _Turns(relay.limits.max_queued)
        self._done: collections.deque[tuple[_Client, Any]] = collections.deque()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._finished, self._no_more_sweeps = threading.Event(), threading.Event()
        self._finished.set()
        self._stopping = False  # then there are no new connections and no waits
        self._now_s = self._next_tick_s = self._drained_by_s = time.monotonic()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._awake = False  # whether there is an octet for the reader
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, READ, self._finish_tasks)
        self._udp: socket.socket | None = None
        super().__init__(server_address, http.server.BaseHTTPRequestHandler)
        if udp or stun:
            self._bind_udp()

    # What http.server does otherwise

    def server_bind(self) -> None:
        """Bind without asking the DNS for our name, or take the socket that we inherit."""
        if inherited := self._inherited.get(socket.SOCK_STREAM):
            self.socket.close()
            self.socket, self.server_address = inherited, inherited.getsockname()
        else:
            _take_ipv4_too(self.socket)
            socketserver.TCPServer.server_bind(self)
        # What is accepted has this too: replies are not held back (Nagle).
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.socket.setblocking(False)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown or stop is called; then answer who waits and return.

        Nothing is polled for: poll_interval is there because http.server has it.
        """
        self._finished.clear()
        bodies: list[Callable[[], None]] = [
            functools.partial(sweep_until, self._no_more_sweeps, self.relay), *[self._work] * POOL_THREADS]
        threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        try:
            while not (self._stopping and (not self._clients or self._now_s > self._drained_by_s)):
                self._turn()
        finally:
            self._no_more_sweeps.set()
            for _ in range(POOL_THREADS):
                self._tasks.end()
            for thread in threads:
                thread.join(max(0.0, self._drained_by_s - time.monotonic()))
            self._finished.set()

    def shutdown(self) -> None:
        """Stop serving, and return when that is done. From another thread than the serving one."""
        self.stop()
        self._finished.wait()

    def stop(self) -> None:
        """Have serve_forever return soon; for signal handlers."""
        self.soon(self._drain)

    def soon(self, call: Callable[[], None]) -> None:
        """Have the serving thread make a call; for signal handlers and other threads."""
        self._calls.append(call)
        self._wake()

    def server_close(self) -> None:
        """Close all sockets."""
        for client in tuple(self._clients):
            self._close(client)
        for opened in (self.socket, self._udp, self._wake_reader, self._wake_writer, self._selector):
            if opened is not None:
                opened.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a new connection in; no thread is made for it."""
        request.setblocking(False)
        client = _Client(request, client_address[0], self._proxies)
        client.steps = self._converse(client)
        self._clients.add(client)
        self._count(client, True)
        self._resume(client)

    # The other threads

    def _work(self) -> None:
        """Do what may take long, until there is None to do: the body of each pool thread."""
        while (task := self._tasks.get()) is not None:
            client, call = task
            try:
                result = call()
            except Exception:  # none does; but a thread less would be for good
                log.exception("a task failed; please report this")
                result = None
            self._done.append((client, result))
            del task, call, result  # a parsed request may be large, and the next one far
            self._wake()

    # The loop

    def _turn(self) -> None:
        """Do what the sockets ask for, at the latest when the next tick is due."""
        for number, (key, _) in enumerate(self._selector.select(self._next_tick_s - time.monotonic()), 1):
            self._now_s = time.monotonic()
            if number % ACCEPT_BATCH == 0:  # thousands may have something at once: not before all who are new
                self._finish_tasks()
                self._take_connections()
            if not isinstance(key.data, _Client):
                key.data()
            elif key.data.events:  # else an earlier event of this turn has moved it on
                self._resume(key.data)
        self._now_s = time.monotonic()
        if self._now_s >= self._next_tick_s:
            self._tick()

    def _tick(self) -> None:
        """Do what is due: deadlines, messages of other processes, accepting (again)."""
        self._next_tick_s = self._now_s + TICK_S
        self._on_tick()
        for client in [client for client in self._clients if client.deadline_s <= self._now_s]:
            self._resume(client, error=TimeoutError())
        self._wake_waiting()
        if not self._stopping:
            with contextlib.suppress(KeyError):  # it is registered already
                self._selector.register(self.socket, READ, self._take_connections)

    def _drain(self) -> None:
        """Stop accepting, answer who waits, let go of who is idle."""
        if self._stopping:
            return
        self._stopping, self._drained_by_s = True, self._now_s + DRAIN_S
        with contextlib.suppress(KeyError):  # it is not registered just now
            self._selector.unregister(self.socket)
        self.socket.close()
        for client in [client for client in self._clients if client.idle]:
            self._resume(client, error=TimeoutError())

    def _take_connections(self) -> None:
        if self._stopping:  # since this turn began
            return
        try:
            with self.relay.snapshot():
                for _ in range(ACCEPT_BATCH):
                    self.process_request(*self.socket.accept())
        except BlockingIOError:
            pass
        except OSError:  # out of files: until the next tick somebody may have gone
            with contextlib.suppress(KeyError):  # found so twice in a turn
                self._selector.unregister(self.socket)

    def _finish_tasks(self) -> None:
        """Take back from the threads what they have done, and what they ask for."""
        with contextlib.suppress(BlockingIOError):  # it was done earlier in this turn
            self._wake_reader.recv(RECV_BYTES)
        self._awake = False  # before the look into the queues: what comes from now on wakes us again
        while self._calls:
            self._calls.popleft()()
        while self._done:
            client, outcome = self._done.popleft()
            self._resume(client, outcome)
        if self._waiting:
            self._wake_waiting()

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # it is over
                self._wake_writer.send(b"\0")

    def _wake_waiting(self) -> None:
        """Go on with those whose boxes got messages, from whatever process."""
        self._cursor_us, boxes = self.relay.arrivals(self._cursor_us)
        for box in boxes:
            for client in tuple(self._waiting.get(box, ())):
                client.cursor_us = self._cursor_us
                self._resume(client, True)

    def _resume(self, client: _Client, value: Any = None, error: Exception | None = None) -> None:
        """Go on with a client until it waits again; whatever goes wrong ends this one alone."""
        try:
            self._watch(client, client.steps.throw(error) if error else client.steps.send(value))
        except (StopIteration, OSError):
            self._close(client)
        except Exception:
            log.exception("a connection failed; please report this")
            self._close(client)

    def _watch(self, client: _Client, events: int) -> None:
        if events == client.events:
            return
        if client.events:
            self._selector.unregister(client.socket)
        if events:
            self._selector.register(client.socket, events, client)
        client.events = events

    def _close(self, client: _Client) -> None:
        client.steps.close()
        self._count(client, False)
        self._hold(client, 0)
        self._clients.discard(client)
        self._watch(client, NOTHING)
        self._end_tls(client).close()

    def _count(self, client: _Client, counted: bool) -> None:
        """Count a client among the connections, or no longer; it may be so already."""
        _add(self._open, client.source, counted - client.counted)
        client.counted = counted

    # The life of a client

    def _converse(self, client: _Client) -> _Steps[None]:
        """Answer requests until one side has enough.

        A request that is here whole, whose reply is at hand and fits the kernel's buffer,
        as most are, is answered in this one generator; others go on in generators of their own.
        """
        try:
            self._check_room(client)
            if self.tls:
                yield from self._handshake(client)
            last = False
            while not last:
                head = take_head(client.incoming, self.limits) if self._has_more(client) else None
                if not head or len(client.incoming) < head.length:
                    head = yield from self._complete(client, head)
                client.cursor_us = self._cursor_us
                source = self._source_of(client, head)
                outcome = self._route(self.relay, head, self._take_body(client, head), source, self._front)
                reply = outcome if isinstance(outcome, Reply) else (yield from self._finish(client, source, outcome))
                last = self._stopping or not head.keep_alive
                unsent = self._push(client, render(reply, head, last=last), last)
                del outcome, reply  # a client that waits or is idle keeps neither
                if unsent:
                    yield from self._send(client, unsent)
                if client.incoming and not last:  # the next request is here, but the others have a turn first
                    client.deadline_s = self._now_s + self.limits.idle_timeout_s
                    yield WRITE
            # To close while something is unread would throw away what the kernel still holds of the reply.
            self._end_tls(client).shutdown(socket.SHUT_WR)
        except Refusal as refusal:
            yield from self._refuse(client, refusal)

    def _check_room(self, client: _Client) -> None:
        own_limit = 0 if client.proxy else self.limits.max_connections_per_source
        for key, limit, whose in ((EVERYBODY, self.limits.max_connections, "in all"),
                                  (client.source, own_limit, "of one source")):
            if 0 < limit < self._open.get(key, 0):
                raise Refusal(BUSY, f"There are {limit} connections {whose}.", retry_s=10)

    def _source_of(self, client: _Client, head: Head) -> str:
        """Return whom a request comes from."""
        return client_of(client.address, head.forwarded_for, self._proxies) if client.proxy else client.source

    def _handshake(self, client: _Client) -> _Steps[None]:
        """Begin TLS, if that is what we speak; what costs time is done by the pool."""
        if not self.tls or isinstance(client.socket, _TlsSocket):
            return
        deadline_s = client.deadline_s = self._now_s + self.limits.request_timeout_s
        client.idle = True
        yield READ  # who says nothing costs nothing
        if not client.proxy and self._handshakes.take(client.source, self.relay.now_us()):
            raise ConnectionAbortedError
        client.socket = _TlsSocket(client.socket, self.tls)
        while events := (yield from self._in_pool(client, client.source, client.socket.shake_hands)):
            client.idle, client.deadline_s = True, deadline_s
            yield events
        self.relay.counts.add("connectoid_handshakes_total", "failed" if events is None else "done")
        if events is None:
            raise ConnectionAbortedError

    def _end_tls(self, client: _Client) -> socket.socket:
        """Return the socket of a client, without TLS from now on."""
        if isinstance(client.socket, _TlsSocket):
            client.socket = client.socket.end()
        return client.socket

    def _in_pool(self, client: _Client, source: str, call: Callable[[], _T]) -> _Steps[_T | None]:
        """Return what a call that may take long returns; None if too many are in the queue."""
        if not self._tasks.put(source, (client, call)):
            return None
        client.idle, client.deadline_s = False, NEVER_S
        result: _T = yield NOTHING
        return result

    def _has_more(self, client: _Client) -> bool:
        """Return whether there is something of a request: what is left of earlier reads, or was read now."""
        return bool(client.incoming) or self._receive(client)

    def _complete(self, client: _Client, head: Head | None) -> _Steps[Head]:
        """Wait for the rest of a request, of which the head may be here; return the head, with the body come in.

        Raises Refusal, or TimeoutError from one who was just idle.
        """
        incoming, limits = client.incoming, self.limits
        if not (head or incoming):
            client.idle, client.deadline_s = True, self._now_s + limits.idle_timeout_s
            yield from self._more(client)
            client.idle = False
        client.deadline_s = self._now_s + limits.request_timeout_s
        try:
            searched = 0
            while not (head := head or take_head(incoming, limits, searched)):
                searched = len(incoming)
                yield from self._more(client)
            if head.expects_continue and len(incoming) < head.length:
                client.socket.send(CONTINUE)
            while len(incoming) < head.length:
                yield from self._more(client)
        except TimeoutError:
            raise Refusal(TOO_SLOW, f"A request may take {limits.request_timeout_s} s.") from None
        return head

    def _take_body(self, client: _Client, head: Head) -> bytes:
        body = bytes(client.incoming[:head.length])
        del client.incoming[:head.length]
        if not self._hold(client, len(client.incoming)):  # of further requests
            raise Refusal(BUSY, "Too much is under way.", retry_s=5)
        return body

    def _more(self, client: _Client) -> _Steps[None]:
        """Wait for more of a request, if we can bear to hold what is there so far."""
        while not self._receive(client):
            if not self._hold(client, len(client.incoming)):
                raise Refusal(BUSY, "Too much is under way.", retry_s=5)
            yield READ

    def _receive(self, client: _Client) -> bool:
        """Take what has come in, if anything; raise ConnectionError when there will be no more."""
        try:
            chunk = client.socket.recv(RECV_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            raise ConnectionAbortedError
        client.incoming += chunk
        return True

    def _hold(self, client: _Client, size: int) -> bool:
        """Note how many bytes we hold for a client; return whether we can bear that, from this source too."""
        if size == client.held:
            return True
        _add(self._held, client.source, size - client.held)
        client.held = size
        limit, held = self.limits.max_buffered_bytes, self._held.get
        return held(EVERYBODY, 0) <= limit and (client.proxy or held(client.source, 0) <= limit // SOURCE_SHARE)

    def _finish(self, client: _Client, source: str, outcome: Outcome) -> _Steps[Reply]:
        """Return the reply to a request that is not answered at once."""
        until_s, overload = 0.0, None
        while not isinstance(outcome, Reply):
            if isinstance(outcome, Wait):
                until_s, overload = until_s or self._now_s + outcome.seconds, outcome.reply
                outcome = yield from self._poll(client, outcome, until_s)
            else:
                done = yield from self._in_pool(client, source, functools.partial(self.relay.run, outcome))
                outcome = done or overload or self.relay.refuse(
                    Refusal(BUSY, "Too many requests at once.", retry_s=2))
        return outcome

    def _gauges(self) -> dict[str, int]:
        return {"connections": self._open.get(EVERYBODY, 0), "waiting_boxes": self._places,
                "queued_requests": len(self._tasks)}

    def _poll(self, client: _Client, wait: Wait, until_s: float) -> _Steps[Outcome]:
        """Hold a long poll until one of its boxes gets a message; return how to go on."""
        full = 0 < self.limits.max_waiting < self._places + len(wait.boxes)
        if full or self._stopping or client.incoming or until_s - TICK_S <= self._now_s:
            return wait.reply
        # What came between the look and now would otherwise be seen only at the next check.
        client.cursor_us, boxes = self.relay.arrivals(client.cursor_us)
        if not boxes.isdisjoint(wait.boxes):
            return wait.again
        client.idle, client.deadline_s = True, until_s - TICK_S
        self._places += len(wait.boxes)
        for box in wait.boxes:
            self._waiting.setdefault(box, set()).add(client)
        try:
            while not (yield READ):  # True is a message; else the client hangs up or talks on
                if self._receive(client):
                    return wait.reply
            # A single one is looked up at once: a flood of messages to one box takes no places in the queue.
            return wait.again if self._remote or len(wait.boxes) > 1 else self.relay.step(wait.again)
        except TimeoutError:
            return wait.reply
        finally:
            client.idle = False
            self._places -= len(wait.boxes)
            for box in wait.boxes:
                self._waiting[box].discard(client)
                if not self._waiting[box]:
                    del self._waiting[box]

    def _push(self, client: _Client, octets: bytes | memoryview, last: bool) -> bytes | memoryview:
        """Send what the kernel takes now and return the rest; with the last of all goes the end, in one packet."""
        try:
            return octets[client.socket.send(octets, MSG_MORE if last else 0):]
        except BlockingIOError:
            return octets

    def _send(self, client: _Client, unsent: bytes | memoryview) -> _Steps[None]:
        """Send a reply, or the rest of one, as fast as the client takes it."""
        client.deadline_s = self._now_s + self.limits.idle_timeout_s
        while unsent := self._push(client, memoryview(unsent), False):
            if not self._hold(client, len(unsent) + len(client.incoming)):
                raise ConnectionAbortedError
            yield WRITE
        self._hold(client, len(client.incoming))

    def _refuse(self, client: _Client, refusal: Refusal) -> _Steps[None]:
        """Answer a request that was not read to its end; take what still comes, and close."""
        client.idle = False
        self._count(client, False)
        crowded = len(self._clients) - self._open.get(EVERYBODY, 0) > MAX_LINGERING
        if self.tls and crowded:
            return  # to tell them would cost a handshake each
        yield from self._handshake(client)
        yield from self._send(client, render(self.relay.refuse(refusal)))
        if crowded:
            return
        # Closing now would send a reset, which overtakes the reply.
        self._end_tls(client).shutdown(socket.SHUT_WR)
        client.incoming.clear()
        client.deadline_s = self._now_s + LINGER_S
        dropped = 0
        while dropped < LINGER_BYTES:
            yield READ
            if not (size := len(client.socket.recv(RECV_BYTES))):
                return
            dropped += size

    # UDP

    def _bind_udp(self) -> None:
        inherited = self._inherited.get(socket.SOCK_DGRAM)
        self._udp = inherited or socket.socket(self.socket.family, socket.SOCK_DGRAM)
        if not inherited:
            try:
                _take_ipv4_too(self._udp)
                self._udp.bind(self.server_address)
            except OSError:
                self.server_close()
                raise
        self._udp.setblocking(False)
        self._selector.register(self._udp, READ, functools.partial(self._answer_datagrams, self._udp))

    def _answer_datagrams(self, udp: socket.socket) -> None:
        counted: collections.Counter[str] = collections.Counter()
        # OSError: there are no more, or one cannot be answered.
        with contextlib.suppress(OSError), self.relay.snapshot():
            for _ in range(DATAGRAM_BATCH):
                datagram, address = udp.recvfrom(MAX_DATAGRAM_BYTES + 1)
                kind, reply = self._answer_datagram(datagram, *address[:2])
                counted[kind if reply else "none"] += 1
                if reply:
                    udp.sendto(reply, address)
        for kind, count in counted.items():
            self.relay.counts.add("connectoid_datagrams_total", kind, count)

    def _answer_datagram(self, datagram: bytes, address: str, port: int) -> tuple[str, bytes | None]:
        source = source_of(address)
        if not is_stun(datagram):
            return "check", answer_datagram(self.relay, datagram, source) if self._front.udp else None
        wanted = self._front.stun and self.relay.admit_datagram(source)
        return "stun", answer_stun(datagram, address, port) if wanted else None


# ---------------------------------------------------------------------------------------
# Fronts that are called with one whole request: WSGI (PEP 3333), the same routes inside
# somebody's gunicorn, Flask or Django. They never wait: a thread of theirs is too dear
# for a long poll.
# ---------------------------------------------------------------------------------------


def answer_at_once(relay: Relay, head: Head, address: str, take_body: Callable[[], bytes],
                   proxies: Networks = NO_NETWORKS) -> Reply:
    """Return the reply to a request from an address, without a wait; may block, never raises.

    `take_body` gets the body, if it is short enough, or raises Refusal.
    """
    source = client_of(address, head.forwarded_for, proxies)
    outcome = relay.run(functools.partial(_begin_whole, relay, head, take_body, source))
    return outcome.reply if isinstance(outcome, Wait) else outcome


def _begin_whole(relay: Relay, head: Head, take_body: Callable[[], bytes], source: str) -> Outcome:
    if head.length < 0:
        raise Refusal(BAD_REQUEST, "Send one Content-Length of 1 to 9 digits.")
    if head.length > relay.limits.max_body_bytes:
        raise Refusal(TOO_BIG, f"A body may have {relay.limits.max_body_bytes} bytes.")
    return route(relay, head, take_body(), source, Front())


def respond_in_pairs(reply: Reply, head: Head | None) -> tuple[list[tuple[str, str]], bytes]:
    """Return the names and values of the headers, and the body of a reply: as `respond`."""
    headers, body = respond(reply, head)
    pairs = [line.partition(": ") for line in headers.decode("ascii").splitlines()]
    return [(name, value) for name, _, value in pairs], body


def wsgi(relay: Relay, proxies: Networks = NO_NETWORKS) -> Callable[..., Iterable[bytes]]:
    """Return the relay as a WSGI application; a thread sweeps until the relay is closed or the process ends.

    Make store, relay and application in the process that serves them: SQLite and threads
    do not survive a fork, so the application raises RuntimeError in a child.
    """
    owner = os.getpid()
    threading.Thread(target=sweep_until, args=(relay.closed, relay), daemon=True).start()
    atexit.register(relay.closed.set)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if os.getpid() != owner:
            raise RuntimeError("make the relay in the process that serves it (gunicorn: without --preload)")
        head = _head_of(environ)
        reply = answer_at_once(relay, head, environ.get("REMOTE_ADDR", ""),
                               functools.partial(_read_body, environ, head.length), proxies)
        headers, body = respond_in_pairs(reply, head)
        start_response(f"{reply.status} {HTTPStatus(reply.status).phrase}", headers)
        return [body]

    return application


def _head_of(environ: Mapping[str, Any]) -> Head:
    length = str(environ.get("CONTENT_LENGTH") or "0")
    return Head(method=environ["REQUEST_METHOD"], path=environ.get("PATH_INFO") or "/",
                length=int(length) if _LENGTH.fullmatch(length.encode("utf-8")) else -1,
                keep_alive=True, expects_continue=False,  # the server around us sees to these
                wants_json="application/json" in environ.get("HTTP_ACCEPT", ""),
                forwarded_for=environ.get("HTTP_X_FORWARDED_FOR", ""))


def _read_body(environ: Mapping[str, Any], length: int) -> bytes:
    try:
        octets: bytes = environ["wsgi.input"].read(length) if length else b""
    except OSError:
        raise Refusal(BAD_REQUEST, "The body did not arrive.") from None
    return octets


# ---------------------------------------------------------------------------------------
# The command line: flags to limits, a server until a signal comes, words for people.
# ---------------------------------------------------------------------------------------

SPARE_FILES = 64  # beside the connections: the database, the log, what is lingering
PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.NOTSET, 6))  # as in syslog(3), from which level on
FIRST_INHERITED = 3  # sd_listen_fds(3): the number of the first file that systemd hands over


def _whole_number(minimum: int, maximum: int = MAX_SETTING) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,13}", text) and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {minimum} to {maximum}")
        return int(text)
    return convert


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return read_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no network; {error}") from None


def _text(text: str) -> str:
    if _SURROGATE.search(text):
        raise argparse.ArgumentTypeError("write it in UTF-8")
    return text


def _web_address(text: str) -> str:
    if not re.fullmatch(r"https?://\S+", _text(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no web address; write https://...")
    return text


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def flag_of(limit: str) -> str:
    """Return the flag of a field of Limits."""
    return "--" + limit.removesuffix("_s").replace("_", "-")


def build_parser(prog: str = "connectoid_relay.py") -> argparse.ArgumentParser:
    """Return the parser of the command line: README.md, "Flags"."""
    parser = _Parser(
        prog=prog, usage="%(prog)s [flag ...] (--help lists them)", allow_abbrev=False,
        description="Keep small encrypted messages for an hour.",
        epilog="The defaults suit a Raspberry Pi. Stop it with Ctrl-C or SIGTERM. * Read again on SIGHUP.")
    parser.add_argument("--version", action="version", version=f"connectoid relay {__version__}")
    parser.add_argument("--host", default="", help="address to listen on (default: all, IPv6 and IPv4)")
    parser.add_argument("--port", type=_whole_number(0, 65535), default=8080,
                        help="port; 0 = any free one (default: 8080)")
    parser.add_argument("--db", metavar="FILE",
                        default=os.path.join(os.environ.get("STATE_DIRECTORY", ""), "connectoid.db"),
                        help="database, or :memory: (default: connectoid.db, in $STATE_DIRECTORY if set)")
    parser.add_argument("--sync", choices=("full", "normal"), default="full",
                        help="full: an acknowledged message survives a power loss; normal: a crash of"
                             " the relay only (default: full)")
    parser.add_argument("--udp", action="store_true", help="answer checks over UDP too, on the same port")
    parser.add_argument("--stun", action="store_true", help="answer STUN Binding requests, on the same UDP port")
    parser.add_argument("--tls-cert", metavar="FILE", help="speak HTTPS with this chain of certificates (PEM) *")
    parser.add_argument("--tls-key", metavar="FILE", help="the private key of --tls-cert (PEM) *")
    parser.add_argument("--keys", metavar="FILE", help="API keys and their quotas (TOML) *")
    parser.add_argument("--deny", metavar="FILE", help="addresses, networks and mailboxes to refuse, one a line *")
    parser.add_argument("--trusted-proxy", metavar="CIDR", type=_network, action="append", default=[],
                        help="believe X-Forwarded-For from there; may be repeated")
    parser.add_argument("--name", type=_text, default=About().name,
                        help="what the relay is called (default: %(default)s)")
    parser.add_argument("--contact", type=_text, help="how people reach you: a mail or web address")
    parser.add_argument("--notice", metavar="TEXT", type=_text, help="what apps and people shall know at present")
    parser.add_argument("--price-url", metavar="URL", type=_web_address, help="where it says what the relay costs")
    parser.add_argument("--log-ips", action="store_true", help="name sources in the log")
    for name, (meaning, minimum) in meanings().items():
        parser.add_argument(flag_of(name), dest=name, metavar="N", default=getattr(Limits(), name),
                            type=_whole_number(minimum), help=f"{meaning} (default: %(default)s)")
    return parser


def raise_file_limit(max_connections: int) -> None:
    """Let this process open a file for each connection, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + MAX_LINGERING + SPARE_FILES if max_connections else hard
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if wanted > hard:
        log.warning("connectoid relay: the system allows %d open files, %d connections need %d",
                    hard, max_connections, wanted)


def notify(state: str) -> None:
    """Tell systemd how we are (sd_notify(3)), if it is there; whoever does not hear it cannot be helped."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_systemd:
            to_systemd.sendto(state.encode("ascii"), path.replace("@", "\0", 1) if path[0] == "@" else path)


def _number_of(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else 0


def build_watchdog(monotonic_us: Callable[[], int] = SYSTEM_CLOCK.monotonic_us) -> Callable[[], None]:
    """Return what the loop calls with every tick: it tells systemd in time that the loop lives.

    Of the store it tells nothing, as /health does: a new start mends no disk.
    """
    interval_us = _number_of("WATCHDOG_USEC") // 2
    next_us = 0 if interval_us else MAX_AT_US

    def beat() -> None:
        nonlocal next_us
        if monotonic_us() >= next_us:
            next_us = monotonic_us() + interval_us
            notify("WATCHDOG=1")

    return beat


def inherited_sockets() -> list[socket.socket]:
    """Return the sockets that systemd has bound for us (sd_listen_fds(3)); raise SettingError for others."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=FIRST_INHERITED + number) for number in range(_number_of("LISTEN_FDS"))]
    kinds = sorted(opened.type for opened in sockets)
    if (any(opened.family not in (socket.AF_INET, socket.AF_INET6) for opened in sockets)
            or [opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for opened in sockets].count(1) != 1
            or kinds not in ([socket.SOCK_STREAM], [socket.SOCK_STREAM, socket.SOCK_DGRAM])):
        raise SettingError("the socket unit must have one ListenStream= with a port, at most one ListenDatagram=,"
                           " and no Accept=")
    for opened in sockets:
        os.set_inheritable(opened.fileno(), False)
    return sockets


class JournalFormatter(logging.Formatter):
    """Begin each line with its level, as journald reads it (sd-daemon(3)), for `journalctl -p warning`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, those of a traceback too."""
        priority = next(number for level, number in PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def log_to_stderr() -> None:
    """Have the log on stderr, with levels where that is journald's, which says so (systemd.exec(5))."""
    handler = logging.StreamHandler()
    with contextlib.suppress(OSError):
        stderr = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
            handler.setFormatter(JournalFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)


class Settings(NamedTuple):
    """What is read again on SIGHUP."""

    access: Access
    tls: ssl.SSLContext | None


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Return what the files say that the flags name; raise SettingError."""
    return Settings(read_access(arguments.keys, arguments.deny),
                    load_tls(arguments.tls_cert, arguments.tls_key) if arguments.tls_cert else None)


def reread_when_asked(asked: threading.Event, arguments: argparse.Namespace, server: RelayServer) -> None:
    """Take what the files say now, or say why all stays as it was: the body of a thread."""
    while asked.wait():
        asked.clear()
        try:
            server.relay.access, server.tls = read_settings(arguments)
        except SettingError as error:
            log.error("connectoid relay: %s; all stays as it was", error)
        except Exception:  # whatever it is, the next one asked for is read
            log.exception("reading the files failed; please report this")
        else:
            log.info("connectoid relay: read the files again")


def open_relay(arguments: argparse.Namespace, limits: Limits, **settings: Any) -> Relay:
    """Return a relay on the SQLite file that the flags name."""
    return Relay(SqliteStore(arguments.db, sync=arguments.sync), limits, **settings)


def serve(arguments: argparse.Namespace, make_relay: Callable[..., Relay] = open_relay, *,
          remote: bool = False) -> None:
    """Run a relay until SIGTERM or SIGINT; raise SettingError, StoreError or OSError if it cannot.

    `make_relay` is called as `open_relay` is; `remote` is RelayServer's.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    if remote and (arguments.udp or arguments.stun):
        raise SettingError("--udp and --stun are for a relay whose store is a file of its own; leave them out")
    limits = Limits(*(getattr(arguments, name) for name in Limits._fields))
    about = About(arguments.name, arguments.contact, arguments.notice, arguments.price_url)
    (access, tls), sockets = read_settings(arguments), inherited_sockets()
    if len(sockets) == 1 and (arguments.udp or arguments.stun):
        raise SettingError("--udp and --stun need a ListenDatagram= with the same port in the socket unit")
    raise_file_limit(limits.max_connections)
    relay = make_relay(arguments, limits, access=access, about=about, log_ips=arguments.log_ips)
    with contextlib.closing(relay), RelayServer(
            (arguments.host, arguments.port), relay, udp=arguments.udp, stun=arguments.stun, tls=tls,
            proxies=Networks(arguments.trusted_proxy), inherited=sockets, on_tick=build_watchdog(),
            remote=remote) as server:
        handle_signals(server, asked := threading.Event())
        threading.Thread(target=reread_when_asked, args=(asked, arguments, server), daemon=True).start()
        host = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
        log.info("connectoid relay %s listening on %s://%s:%d", __version__, "https" if tls else "http", host,
                    server.server_port)
        notify("READY=1")
        server.serve_forever()


def handle_signals(server: RelayServer, asked: threading.Event) -> None:
    """Stop on SIGTERM and SIGINT; on SIGHUP ask for the files to be read again."""
    def stop(*_: object) -> None:
        server.stop()
        notify("STOPPING=1")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # Not in the handler itself: it may have interrupted another that holds the event's lock.
    signal.signal(signal.SIGHUP, lambda *_: server.soon(asked.set))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 stopped, 1 failed; 2 (usage) exits."""
    return run_command(build_parser(os.path.basename(sys.argv[0])), argv, serve)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
                run: Callable[[argparse.Namespace], None]) -> int:
    """Run what the arguments ask for and return the exit code: as `main`, for a parser with further flags."""
    arguments = parser.parse_args(argv)
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        parser.error("--tls-cert and --tls-key go together")
    log_to_stderr()
    try:
        run(arguments)
    except (StoreError, SettingError) as error:
        log.error("connectoid relay: %s", error)
        return 1
    except (OSError, UnicodeError) as error:  # UnicodeError is a host name with impossible labels
        log.error("connectoid relay: cannot listen on %s port %d: %s; choose another with --host or --port",
                  arguments.host or "any address,", arguments.port, getattr(error, "strerror", error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
