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
    "Clock", "Limits", "Look", "Message", "NoRoom", "Refusal", "Relay", "RelayServer", "Reply", "SqliteStore",
    "Store", "StoreError", "StoreFull", "Wait", "main", "source_of",
]

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import hmac
import html
import http.server
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
import sys
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

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
MAX_SEEN_BOXES = 10_000  # whose last check is not yet written; further ones wait for their next
PROBE_EVERY_US = 5_000_000  # /health asks the store no more often than this
SWEEPER_LATE_US = 60_000_000  # after so long without a sweep /health says so

SWEEP_EVERY_S = 1.0  # when there was nothing more to delete
SWEEP_PAUSE_S = 0.001  # between two steps when there is more
SWEEP_RETRY_S = 5.0  # after a failure
POOL_THREADS = 16  # do what waits for the disk or a seal; so many sends share a commit
LISTEN_BACKLOG = 1_024  # connections that the kernel holds for us
ACCEPT_BATCH = 64  # connections, and datagrams, taken in one turn of the loop
RECV_BYTES = 64 * 1024  # read from a connection in one turn of the loop
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


def _limit(default: int, meaning: str, minimum: int = 0) -> int:
    """Return a field of Limits with its default, its unit and reason, and its minimum."""
    declared: int = field(default=default, metadata={"meaning": meaning, "minimum": minimum})
    return declared


@dataclass(frozen=True)
class Limits:
    """Hold the limits that a host may change; the command line has a flag for each."""

    rate: int = _limit(600, "requests per source and minute; 0 = every rate limit off")
    max_seals: int = _limit(120, "questions made per source and minute: each costs a P-384 seal", 1)
    max_sends: int = _limit(60, "messages per box, source and minute", 1)
    max_source_bytes: int = _limit(
        64 << 20, "bytes of data sent per source and hour: one host cannot fill the relay", 1)
    max_udp: int = _limit(10_000, "UDP datagrams per second, from all together", 1)
    max_body_bytes: int = _limit(128 << 10, "bytes of a request's body: a batch of 256 checks", 1)
    max_header_bytes: int = _limit(16 << 10, "bytes of a request's line and headers", 64)
    request_timeout_s: int = _limit(10, "seconds for a whole request to arrive", 1)
    idle_timeout_s: int = _limit(75, "seconds that a connection may stay idle, or take to read a reply", 1)
    max_connections: int = _limit(10_000, "open connections; 0 = no limit")
    max_connections_per_source: int = _limit(256, "open connections of one source; 0 = no limit")
    max_waiting: int = _limit(10_000, "boxes waited for in long polls; 0 = no limit")
    max_queued: int = _limit(512, "requests in the queue for a thread: half a second of work", 1)
    max_buffered_bytes: int = _limit(64 << 20, "bytes of unread requests and unsent replies", 1)
    max_box_messages: int = _limit(256, "messages in a box", 1)
    max_box_bytes: int = _limit(8 << 20, "bytes of data in a box", 1)
    max_bytes: int = _limit(1 << 30, "bytes of data in all; a third is kept for proven boxes", 1)
    max_boxes: int = _limit(2_000_000, "boxes with a proven owner: 250 MB of disk")
    message_ttl_s: int = _limit(3_600, "seconds that a message is kept", 1)
    question_ttl_s: int = _limit(60, "seconds that a question is good for", 2)
    box_ttl_s: int = _limit(30 * 86_400, "seconds that a proven box is kept after its last check", 1)


# ---------------------------------------------------------------------------------------
# Errors. ERRORS is the table of PROTOCOL.md. A Refusal may be raised anywhere below; it
# becomes a reply in two places: Relay.step for a request, RelayServer._converse for
# the HTTP around it.
# ---------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """A status (as in HTTP) and the JSON that goes with it."""

    status: int
    body: dict[str, Any] | list[Any]


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


def seconds_until(then_us: int, now_us: int) -> int:
    """Return the whole seconds from now to then, at least 1: the form of `retry`."""
    return max(1, -(-(then_us - now_us) // SECOND_US))


# ---------------------------------------------------------------------------------------
# Encoding and validation: from bytes and JSON to values that the core may trust. Pure
# functions that return the value or raise Refusal. PROTOCOL.md, "Forms".
# ---------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are not JSON


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> object:
    """Return the JSON value of a body; raise Refusal (Bad request) if there is none."""
    try:
        request: object = _DECODER.decode(body.decode("utf-8"))
        if _SURROGATE_ESCAPE.search(body):  # the only way to a lone surrogate, which UTF-8 cannot hold
            json.dumps(request, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise Refusal(BAD_REQUEST, "The body is not JSON in UTF-8.") from None
    return request


def encode_base64url(octets: bytes) -> str:
    """Return RFC 4648 base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


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
    return base64.urlsafe_b64decode(read(request, "pub") + "==")


def read_at(request: Mapping[str, Any]) -> int:
    """Return `at` in microseconds, no more than SQLite can compare."""
    return min(int(read(request, "at", 0)), MAX_AT_US)


def read_data(request: Mapping[str, Any]) -> str:
    """Return `data` as it was sent; raise Refusal, which is Too big for what is too long."""
    sealed = request.get("data")
    if isinstance(sealed, str) and len(sealed) > MAX_DATA_CHARS:
        raise Refusal(TOO_BIG, f"data must be at most {MAX_DATA_CHARS} characters.")
    return str(read(request, "data"))


IPV4_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96


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


# ---------------------------------------------------------------------------------------
# Cryptography. All context strings that the relay uses, and RFC 9180 by the library.
# ---------------------------------------------------------------------------------------

CONTEXTS = {"question": b"connectoid/1 question"}
_SUITE = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)


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
    """Say that a message would go over a limit: of its "source", its "box" or the "relay"."""

    def __init__(self, whose: str, until_us: int = 0) -> None:
        super().__init__(f"no room: {whose}")
        self.whose, self.until_us = whose, until_us


class Message(NamedTuple):
    """A message on its way in: source is a keyed hash of whoever sent it."""

    box: bytes
    data: str
    source: bytes
    ttl_us: int


class Look(NamedTuple):
    """What a check learns: whether there is news, and when the box row (if any) expires."""

    found: bool
    box_expires_us: int | None


class Store(Protocol):
    """Keep messages, questions, boxes and time. SqliteStore is one; test_relay.py has the contract."""

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

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for."""

    def sweep(self, now_us: int) -> bool:
        """Delete some of what has expired, and return whether there is more."""

    def probe(self, now_us: int) -> None:
        """Read and write for real; raise StoreError if the store is not well."""

    def close(self) -> None:
        """Let go of the file."""


APPLICATION_ID = 0x436F6E6E  # "Conn" in the file's header: another program's file is left alone
SCHEMA_VERSION = 1
PAGE_BYTES = 4_096  # of SQLite, by default
SCHEMA = (
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
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

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
ADD_MESSAGE = "INSERT INTO messages (at, box, expires_us, source, size, data) VALUES (?, ?, ?, ?, ?, ?)"
ADD_QUESTION = """INSERT OR REPLACE INTO challenges (box, made_us, question, answer_sha256, expires_us)
    VALUES (?, ?, ?, ?, ?)"""
ADD_BOX = "INSERT OR IGNORE INTO boxes (box, expires_us) VALUES (?, ?)"
KEEP_BOX = "UPDATE boxes SET expires_us = max(expires_us, ?2) WHERE box = ?1"
EXPIRED = """SELECT EXISTS (SELECT 1 FROM messages WHERE expires_us <= ?1)
    OR EXISTS (SELECT 1 FROM challenges WHERE expires_us <= ?1)
    OR EXISTS (SELECT 1 FROM boxes WHERE expires_us <= ?1)"""
SWEEP_MESSAGES = """DELETE FROM messages WHERE at IN (SELECT at FROM messages
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2) RETURNING size"""
SWEEP_CHALLENGES = """DELETE FROM challenges WHERE (box, made_us) IN (SELECT box, made_us FROM challenges
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2)"""
SWEEP_BOXES = """DELETE FROM boxes WHERE box IN (SELECT box FROM boxes
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2)"""
READ_RELAY = "SELECT time_us, last_at, bytes, boxes FROM relay"
WRITE_RELAY = "UPDATE relay SET time_us = :time_us, last_at = :last_at, bytes = :bytes, boxes = :boxes"

COMMIT_BATCH = 32  # writes in one transaction: 1 MiB of messages, a few milliseconds
SWEEP_ROWS = 16  # rows of a table deleted in one transaction: half a MiB, fits a small reserve
RESERVE_BYTES = 4 << 20  # kept back on the disk: room for questions and sweeps when it is full
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


@dataclass
class _RelayRow:
    """The row `relay` in a write: the jobs change it, and it is written back at the end."""

    time_us: int
    last_at: int
    bytes: int
    boxes: int


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


def _check_box(content: Sequence[int], size: int, limits: Limits) -> None:
    """Raise NoRoom if a box with this content (BOX_CONTENT) has none for a message of this size."""
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
        self._path, self._reserve, self._in_memory = path, Path(path + "-reserve"), path == ":memory:"
        self._sync_pragma = {"full": "PRAGMA synchronous = FULL", "normal": "PRAGMA synchronous = NORMAL"}[sync]
        self._lock = threading.Lock()  # one writer at a time; the file's lock is for other processes
        self._queue: collections.deque[_Ticket] = collections.deque()
        self._readers: list[sqlite3.Connection] = []  # those that are idle
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
                self._db = self._connect()
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

    def _check_owner(self, db: sqlite3.Connection) -> bool:
        """Return whether the file is new; raise StoreError if it is neither that nor ours."""
        (owner,), (version,), (tables,) = (db.execute(sql).fetchone() for sql in (
            "PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema"))
        if (owner, version, tables) == (0, 0, 0):
            return True
        if owner != APPLICATION_ID:
            raise StoreError(f"{self._path} belongs to another program; choose another file with --db")
        if version != SCHEMA_VERSION:
            raise StoreError(f"{self._path} has schema {version}, this relay knows {SCHEMA_VERSION};"
                             " choose another file with --db")
        return False

    def _prepare(self) -> None:
        if self._check_owner(self._db):
            self._db.execute("PRAGMA journal_mode = WAL")
            for sql in ("BEGIN IMMEDIATE", *SCHEMA, "COMMIT"):
                self._db.execute(sql)
        # Fails here and now if the file cannot be written or the row has gone.
        if self._db.execute("UPDATE relay SET time_us = time_us").rowcount != 1:
            raise self._damaged()

    def _damaged(self) -> StoreError:
        return StoreError(f"{self._path} {_MEANINGS[sqlite3.SQLITE_CORRUPT]} (no relay time)")

    def close(self) -> None:
        """Move everything from the WAL into the file and let go of both."""
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
            self._db.execute(self._sync_pragma if durable else "PRAGMA synchronous = NORMAL")
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
            if self._in_memory:  # a second connection would see another memory
                with self._lock:
                    return self._db.execute(sql, values).fetchall()
            db = self._idle_reader()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                self._readers.append(db)
                if self._closed:
                    self._close_readers()
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _idle_reader(self) -> sqlite3.Connection:
        try:
            return self._readers.pop()
        except IndexError:  # all are in use
            return self._connect()

    # Methods of Store

    def time_us(self) -> int:
        """Return the store's time as it was last raised."""
        for time_us, *_ in self._read(READ_RELAY):
            return int(time_us)
        raise self._damaged()

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`; raise NoRoom or StoreFull."""
        box, sealed, source, ttl_us = message

        def job(row: _RelayRow) -> int:
            *content, proven = self._db.execute(BOX_CONTENT, (box, row.time_us, source)).fetchone()
            _check_box(content, len(sealed), limits)
            # Strangers may fill two thirds; the last one is for boxes whose owner has shown up.
            room = limits.max_bytes * (3 if proven else 2) // 3
            if row.bytes + counted_bytes(len(sealed)) > room:
                raise NoRoom("relay")
            row.last_at = at = max(row.time_us, row.last_at + 1)
            row.bytes += counted_bytes(len(sealed))
            self._db.execute(ADD_MESSAGE, (at, box, at + ttl_us, source, len(sealed), sealed))
            return at

        return int(self._write(job, now_us, durable=True))

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

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for."""
        def job(row: _RelayRow) -> None:
            for box, expires_us in expiries_us.items():
                kept = self._db.execute(KEEP_BOX, (box, expires_us)).rowcount
                if not kept and row.boxes < room_for:
                    row.boxes += self._db.execute(ADD_BOX, (box, expires_us)).rowcount

        self._write(job, now_us)

    def sweep(self, now_us: int) -> bool:
        """Delete some of what has expired, have it gone from the WAL in time, mend a full disk."""
        def job(row: _RelayRow) -> bool:
            span = (row.time_us, SWEEP_ROWS)
            sizes = self._db.execute(SWEEP_MESSAGES, span).fetchall()
            row.bytes -= sum(counted_bytes(size) for (size,) in sizes)
            challenges = self._db.execute(SWEEP_CHALLENGES, span).rowcount
            boxes = self._db.execute(SWEEP_BOXES, span).rowcount
            row.boxes -= boxes
            return max(len(sizes), challenges, boxes) == SWEEP_ROWS

        swept = self._read(EXPIRED, now_us) == [(1,)]
        more = swept and bool(self._write(job, now_us))
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
# Rate limits: how much of something a source may have in a span of time. In memory, a
# count per source that starts again with every span; nothing is kept beyond that.
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


def _nothing() -> Reply:
    return Reply(200, {"ok": True, "found": False})


class Relay:
    """Answer requests: `handle` for whoever embeds it, `begin` and `run` for fronts.

    Somebody must call `sweep` about once a second; RelayServer does.
    """

    def __init__(self, store: Store, limits: Limits | None = None, *, clock: Clock = SYSTEM_CLOCK,
                 random_bytes: Callable[[int], bytes] = secrets.token_bytes, log_ips: bool = False) -> None:
        self.store, self.limits = store, limits or Limits()
        self._clock, self._random_bytes, self._log_ips = clock, random_bytes, log_ips
        wall_us = clock.wall_us()
        # A Raspberry Pi without network believes in 1970, or in the day of its last shutdown.
        believed_us = wall_us if RELEASE_US <= wall_us < YEAR_2200_US else RELEASE_US
        self._base_us = max(believed_us, store.time_us()) - clock.monotonic_us()
        on = self.limits.rate > 0  # else all limits here are 0, which is none
        self._requests = RateLimit(self.limits.rate, MINUTE_US)
        self._seals = RateLimit(on * self.limits.max_seals, MINUTE_US)
        self._sends = RateLimit(on * self.limits.max_sends, MINUTE_US)
        self._sent_bytes = RateLimit(on * self.limits.max_source_bytes, HOUR_US)
        self._datagrams = RateLimit(on * self.limits.max_udp, SECOND_US)
        self._complaints = RateLimit(1, MINUTE_US)
        self._source_day, self._source_key = 0, b""  # never written: the file shows no addresses
        self._parsing = threading.Lock()
        self._seen_us: dict[bytes, int] = {}  # boxes with a check today, not yet written
        self._swept_us = self.now_us()
        with contextlib.suppress(StoreError):  # let an older process with a slower clock know
            store.probe(self.now_us())
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
            return refusal.reply()
        except StoreFull as error:
            self._complain(str(error))
            return Refusal(FULL, "The relay's disk is full.", retry_s=60).reply()
        except StoreError as error:
            self._complain(str(error))
            return Refusal(BUSY, "The relay cannot use its store.", retry_s=5).reply()
        except Exception:
            log.exception("a request failed; please report this")
            return Refusal(BUSY, "The relay failed.", retry_s=5).reply()

    def _complain(self, text: str) -> None:
        if not self._complaints.take(text, self.now_us()):
            log.warning("connectoid relay: %s", text)

    # From a request to an operation

    def _begin_from(self, request: object, address: object) -> Outcome:
        source = source_of(str(address))
        self._admit(source)
        return self._begin(request, source)

    def _begin_body(self, body: bytes, source: str) -> Outcome:
        self._admit(source)
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
            functools.partial(self._begin_item, item, source) for item in request[1:])])

    def _begin_item(self, item: object, source: str) -> Outcome:
        self._admit(source)
        return self._begin_one(item, source, _BATCH_OPERATIONS)

    def _begin_one(self, request: object, source: str, operations: Mapping[str, _Operation]) -> Outcome:
        if not isinstance(request, dict):
            raise Refusal(BAD_REQUEST, f"A request is an object, or an array of 1 to {MAX_BATCH_ITEMS} checks.")
        action = request.get("action")
        if not isinstance(action, str) or action not in operations:
            raise Refusal(BAD_REQUEST, f"action must be one of {', '.join(operations)}.")
        box = read_box(request)
        read(request, "ext")  # API keys will be looked up here
        return operations[action](self, request, box, source)

    def _admit(self, source: str) -> None:
        if retry_s := self._requests.take(source, self.now_us()):
            self._complain(f"{source if self._log_ips else 'a source'} asks too often")
            raise Refusal(TOO_OFTEN, f"More than {self.limits.rate} requests in a minute.", retry_s)

    def _merge(self, calls: Sequence[Callable[[], Outcome]]) -> Outcome:
        """Return the replies of a batch, or a wait if each of its checks would wait."""
        outcomes = [self.run(call) for call in calls]
        waits = [outcome for outcome in outcomes if isinstance(outcome, Wait)]
        replies = [outcome.reply if isinstance(outcome, Wait) else outcome for outcome in outcomes]
        reply = Reply(200, [reply.body for reply in replies])
        if len(waits) < len(outcomes):
            return reply
        boxes = frozenset[bytes]().union(*(wait.boxes for wait in waits))
        again = functools.partial(self._merge, [wait.again for wait in waits])
        return Wait(boxes, min(wait.seconds for wait in waits), reply, again)

    # check

    def _check(self, request: Mapping[str, Any], box: bytes, source: str) -> Outcome:
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
            kept_until_us = self._box_expiry_us(now_us)
            if kept_until_us > expires_us:
                self._seen_us[box] = kept_until_us
        return found

    def _box_expiry_us(self, now_us: int) -> int:
        """Return until when a box checked now is kept: the same all day, to write once a day."""
        ttl_us = self.limits.box_ttl_s * SECOND_US
        step_us = min(DAY_US, ttl_us // 30)
        return (now_us // step_us + 1) * step_us + ttl_us

    def _ask(self, box: bytes, source: str) -> Reply:
        """Return the young question of a box, or make one."""
        now_us, ttl_us = self.now_us(), self.limits.question_ttl_s * SECOND_US
        question = self.store.question(box, now_us - ttl_us // 2, now_us)
        if question is None:
            if retry_s := self._seals.take(source, now_us):
                raise Refusal(TOO_OFTEN, f"More than {self.limits.max_seals} questions in a minute.", retry_s)
            answer = encode_base64url(self._random_bytes(ANSWER_BYTES))
            made = (seal_question(box, answer), hash_answer(answer))
            question = self.store.put_question(box, made, ttl_us, now_us)
        return Reply(200, {"ok": True, "found": True, "question": question})

    def glance(self, request: object) -> bool:
        """Return what a UDP check finds; raise Refusal or StoreError. PROTOCOL.md, "UDP"."""
        if self._datagrams.take("udp", self.now_us()):
            raise Refusal(TOO_OFTEN)
        if not isinstance(request, dict) or request.get("action") != "check":
            raise Refusal(BAD_REQUEST)
        return self._found(read_box(request), read_at(request))

    # receive

    def _receive(self, request: Mapping[str, Any], box: bytes, _source: str) -> Outcome:
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
            expiry_us = {box: self._box_expiry_us(now_us)}
            with contextlib.suppress(StoreError):
                self.store.keep_boxes(expiry_us, now_us, room_for=self.limits.max_boxes)

    # send

    def _send(self, request: Mapping[str, Any], box: bytes, source: str) -> Outcome:
        return functools.partial(self._keep, box, read_data(request), source)

    def _keep(self, box: bytes, sealed: str, source: str) -> Reply:
        now_us = self.now_us()
        read_public_key(box)  # nothing is kept for a box that nobody can open
        if retry_s := self._sends.take((box, source), now_us) or self._sent_bytes.take(source, now_us, len(sealed)):
            raise Refusal(TOO_OFTEN, "Too many messages from one source.", retry_s)
        message = Message(box, sealed, self._hash_source(source), self.limits.message_ttl_s * SECOND_US)
        try:
            self.store.put(message, self.limits, now_us)
        except NoRoom as error:
            raise self._no_room(error) from None
        return Reply(200, {"ok": True})

    def _hash_source(self, source: str) -> bytes:
        """Return what stands for a source today: tomorrow the same source has another."""
        today = self.now_us() // DAY_US
        if today != self._source_day:
            self._source_day, self._source_key = today, self._random_bytes(SOURCE_KEY_BYTES)
        return hashlib.blake2b(source.encode("utf-8", "replace"), key=self._source_key, digest_size=16).digest()

    def _no_room(self, error: NoRoom) -> Refusal:
        if error.whose == "relay":
            self._complain("the storage is full (--max-bytes)")
            return Refusal(FULL, "The relay's storage is full.", retry_s=60)
        retry_s = seconds_until(error.until_us, self.now_us())
        if error.whose == "source":
            return Refusal(TOO_OFTEN, f"One source may fill 1/{SOURCE_SHARE} of a box.", retry_s)
        return Refusal(FULL, "The box is full.", retry_s)

    # For the fronts

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
        # Another process may have a clock that is ahead: without this ours would stand still.
        self._base_us += max(0, self.store.time_us() - now_us)
        try:
            self._write_seen()
        finally:
            more = self.store.sweep(self.now_us())
        self._swept_us = self.now_us()
        return more

    def _write_seen(self) -> None:
        seen_us = dict(self._seen_us)
        if seen_us:
            self.store.keep_boxes(seen_us, self.now_us())
        for box, until_us in seen_us.items():
            if self._seen_us.get(box) == until_us:  # else it was checked again meanwhile, on another day
                del self._seen_us[box]

    def health(self) -> Reply:
        """Return 200 while a write and a read of the store work and the sweeper lives; may block."""
        now_us = self.now_us()
        if now_us - self._probed_us >= PROBE_EVERY_US:
            self._probed_us = now_us
            try:
                self.store.probe(now_us)
                self._ill = ""
            except Exception as error:  # whatever it is, the store is not well
                self._complain(str(error))
                self._ill = "The store cannot be read or written."
        late = now_us - self._swept_us > SWEEPER_LATE_US
        ill = "The sweeper has stopped." if late else self._ill
        return Refusal(BUSY, ill, retry_s=5).reply() if ill else Reply(200, {"ok": True})

    def document(self) -> dict[str, Any]:
        """Return what apps and people may know of this relay. PROTOCOL.md, "GET /"."""
        limits = asdict(self.limits)
        retention = {name: limits.pop(f"{name}_ttl_s") for name in ("message", "question", "box")}
        return {
            "name": "Connectoid relay",
            "description": "Keeps small encrypted messages until the app they are for comes online.",
            "software": "connectoid_relay", "version": __version__, "contact": None,
            "limits": limits, "retention": retention, "udp": False, "stun": False,
            "notice": None, "price_url": None,
        }

    def close(self) -> None:
        """Write down who was seen and close the store."""
        with contextlib.suppress(StoreError):
            self._write_seen()
        self.store.close()


_Operation: TypeAlias = Callable[[Relay, Mapping[str, Any], bytes, str], Outcome]
_OPERATIONS: Mapping[str, _Operation] = {"send": Relay._send, "check": Relay._check, "receive": Relay._receive}
_BATCH_OPERATIONS: Mapping[str, _Operation] = {"check": Relay._check}


# ---------------------------------------------------------------------------------------
# HTTP: RFC 9112 as far as a relay needs it, read strictly, so that no proxy before us can
# see another request than we do. Pure functions from bytes to requests, replies to bytes.
# ---------------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
_HEAD = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n((?:" + _FIELD.pattern + rb")*)\r\n")
_HOPELESS = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n|\Z)")  # TLS, for one, has a NUL at once
_LENGTH = re.compile(rb"[0-9]{1,9}")
_AUTHORITY = re.compile(r"\Ahttps?://[^/?]*", re.IGNORECASE)
_METHODS = {"/": ("GET", "HEAD", "POST", "OPTIONS"), "/health": ("GET", "HEAD", "OPTIONS")}
HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Lines of headers, for any reply.
CLOSE = b"Connection: close\r\n"
JSON = b"Content-Type: application/json\r\n"
HTML = b"Content-Type: text/html; charset=utf-8\r\n"
CORS = b"Access-Control-Allow-Origin: *\r\n"
# Without the empty line at the end: CLOSE may come before it.
PREFLIGHT = (b"HTTP/1.1 204 No Content\r\n" + CORS + b"Access-Control-Allow-Methods: GET, POST, OPTIONS\r\n"
             b"Access-Control-Allow-Headers: Content-Type\r\nAccess-Control-Max-Age: 86400\r\n")
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>body {{ font: 1.1rem/1.5 system-ui, sans-serif; max-width: 36rem; margin: 3rem auto; padding: 0 1rem }}</style>
<h1>{name}</h1>
<p>{description}</p>
<p>It knows neither who writes nor what: messages are sealed for the key that is the mailbox, and only
the holder of that key can have them. They are deleted after {minutes} minutes.</p>
<p>Connectoid relay {version}. Apps use <code>POST /</code>;
<code>GET /health</code> says whether the relay is well.</p>
</html>
"""


class Head(NamedTuple):
    """A request without its body: what the relay uses of it."""

    method: str
    path: str
    length: int
    keep_alive: bool
    expects_continue: bool
    wants_json: bool


def take_head(incoming: bytearray, limit: int, searched: int = 0) -> Head | None:
    """Remove a request's head from what came in; None if it is not complete. Raises Refusal.

    So many bytes were searched before: who sends byte by byte shall not have all read again.
    """
    end = incoming.find(HEAD_END, max(0, searched - len(HEAD_END) + 1))
    if (len(incoming) if end < 0 else end + len(HEAD_END)) > limit:
        raise Refusal(HEADERS_TOO_BIG, f"More than {limit} bytes of headers.")
    if end < 0:
        if _HOPELESS.search(incoming, max(0, searched - 1)):
            raise Refusal(BAD_REQUEST, "This is not HTTP/1.1.")
        return None
    head = bytes(incoming[:end + len(HEAD_END)])
    del incoming[:len(head)]
    return parse_head(head)


def parse_head(octets: bytes) -> Head:
    """Return the head of a request; raise Refusal (Bad request) for whatever is unusual."""
    match = _HEAD.fullmatch(octets)
    if not match:
        raise Refusal(BAD_REQUEST, "This is not HTTP/1.1.")
    method, target, minor, lines = match.group(1, 2, 3, 4)
    headers = [(name.lower(), value.strip(b" \t")) for name, value in _FIELD.findall(lines)]
    header = dict(headers)
    if b"transfer-encoding" in header:
        raise Refusal(BAD_REQUEST, "Send a Content-Length; Transfer-Encoding is not taken.")
    lengths = [value for name, value in headers if name == b"content-length"] or [b"0"]
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise Refusal(BAD_REQUEST, "Send one Content-Length of 1 to 9 digits.")
    return Head(
        method=method.decode("ascii"),
        path=_AUTHORITY.sub("", target.decode("ascii"), count=1).partition("?")[0] or "/",
        length=int(lengths[0]),
        keep_alive=minor == b"1" and not any(
            name == b"connection" and b"close" in value.lower() for name, value in headers),
        expects_continue=minor == b"1" and header.get(b"expect", b"").lower() == b"100-continue",
        wants_json=b"application/json" in header.get(b"accept", b""),
    )


def render(status: int, body: bytes, head: Head | None, headers: bytes) -> bytes:
    """Return a whole reply to a request; to None, which was not read to its end, the last.

    Without a Date: the relay has no clock that it would swear by.
    """
    return b"HTTP/1.1 %d %s\r\nContent-Length: %d\r\n%s%s%s\r\n%s" % (
        status, HTTPStatus(status).phrase.encode("ascii"), len(body), CORS, headers,
        b"" if head and head.keep_alive else CLOSE, b"" if head and head.method == "HEAD" else body)


def render_reply(reply: Reply, head: Head | None = None, headers: bytes = b"") -> bytes:
    """Return a reply of the core as HTTP: `retry` also as a header, an end of line for whoever uses curl."""
    if isinstance(reply.body, dict) and "retry" in reply.body:
        headers += b"Retry-After: %d\r\n" % reply.body["retry"]
    return render(reply.status, json.dumps(reply.body).encode("ascii") + b"\n", head, JSON + headers)


def render_page(document: dict[str, Any], head: Head) -> bytes:
    """Return the relay's document: JSON for apps that ask for it, a page for people."""
    if head.wants_json:
        return render_reply(Reply(200, document), head, b"Vary: Accept\r\n")
    texts = {name: html.escape(str(document[name])) for name in ("name", "description", "version")}
    page = PAGE.format(minutes=document["retention"]["message"] // 60, **texts)
    return render(200, page.encode("utf-8"), head, HTML + b"Vary: Accept\r\n")


# ---------------------------------------------------------------------------------------
# UDP: one datagram with a check, one back, never longer. A pure function; whatever is
# not a well-formed check gets nothing, so that a forged sender gains nothing.
# ---------------------------------------------------------------------------------------

MAX_DATAGRAM_BYTES = 2_048  # more than any check needs


def answer_datagram(relay: Relay, datagram: bytes) -> bytes | None:
    """Return the reply to a datagram, or None for none. PROTOCOL.md, "UDP"."""
    if len(datagram) > MAX_DATAGRAM_BYTES:
        return None
    try:
        request = parse_json(datagram)
        reply = {"ok": True, "found": relay.glance(request)}
        if isinstance(request, dict) and "id" in request:
            reply["id"] = read(request, "id")
    except (Refusal, StoreError):
        return None
    octets = json.dumps(reply).encode("ascii")
    return octets if len(octets) <= len(datagram) else None


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

_T = TypeVar("_T")
_Steps: TypeAlias = Generator[int, Any, _T]  # yields events; at a deadline gets a TimeoutError


class _Client:
    """A connection: its socket, what came in and is not used yet, and how it goes on."""

    __slots__ = ("counted", "cursor_us", "deadline_s", "events", "held", "idle", "incoming", "socket",
                 "source", "steps")

    def __init__(self, connection: socket.socket, source: str) -> None:
        self.socket, self.source, self.events = connection, source, NOTHING
        self.incoming, self.held = bytearray(), 0  # held: bytes kept from one turn to another
        self.deadline_s = NEVER_S
        self.counted = False  # among the connections: a refused one no longer is
        self.idle = False  # nothing is lost if it is timed out now
        self.cursor_us = 0  # up to which messages its check has certainly seen
        self.steps: _Steps[None]


def _take_ipv4_too(unbound: socket.socket) -> None:
    if unbound.family == socket.AF_INET6:
        unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def _add(counter: collections.Counter[str], source: str, change: int) -> None:
    """Count for a source and for EVERYBODY; who has nothing leaves nothing behind."""
    for key in (source, EVERYBODY):
        counter[key] += change
        if not counter[key]:
            del counter[key]


class RelayServer(http.server.ThreadingHTTPServer):
    """Serve a relay over HTTP, and over UDP if asked: an http.server with other insides.

    `serve_forever`, `shutdown`, `server_close`, `server_port` and `with` are as usual; it
    serves once. The host "" is all interfaces, IPv6 and IPv4. Raises OSError if the
    address cannot be had.
    """

    request_queue_size = LISTEN_BACKLOG

    def __init__(self, server_address: tuple[str, int], relay: Relay, *, udp: bool = False) -> None:
        host = server_address[0]
        self.address_family = (socket.getaddrinfo(host, None)[0][0] if host else
                               socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        self.relay, self.limits = relay, relay.limits
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._open: collections.Counter[str] = collections.Counter()  # connections per source, and of EVERYBODY
        self._waiting: dict[bytes, set[_Client]] = {}
        self._places = 0  # taken in _waiting
        self._held: collections.Counter[str] = collections.Counter()  # bytes, counted in the same way
        self._cursor_us = relay.store.time_us() - 1  # up to which messages the loop knows all
        self._tasks: queue.SimpleQueue[tuple[_Client, Outcome] | None] = queue.SimpleQueue()
        self._done: collections.deque[tuple[_Client, Outcome]] = collections.deque()
        self._finished, self._no_more_sweeps = threading.Event(), threading.Event()
        self._finished.set()
        self._stop_asked = self._stopping = False  # stopping: no new connections, no waits
        self._now_s = self._next_tick_s = self._drained_by_s = time.monotonic()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, READ, self._finish_tasks)
        self._udp: socket.socket | None = None
        super().__init__(server_address, http.server.BaseHTTPRequestHandler)
        if udp:
            self._bind_udp()

    # What http.server does otherwise

    def server_bind(self) -> None:
        """Bind without asking the DNS for our name; replies are not held back (Nagle)."""
        _take_ipv4_too(self.socket)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited
        self.socket.setblocking(False)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown or stop is called; then answer who waits and return.

        Nothing is polled for: poll_interval is there because http.server has it.
        """
        self._finished.clear()
        bodies = [self._sweep, *[self._work] * POOL_THREADS]
        threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        try:
            while not (self._stopping and (not self._clients or self._now_s > self._drained_by_s)):
                self._turn()
        finally:
            self._no_more_sweeps.set()
            for _ in range(POOL_THREADS):
                self._tasks.put(None)
            for thread in threads:
                thread.join(max(0.0, self._drained_by_s - time.monotonic()))
            self._finished.set()

    def shutdown(self) -> None:
        """Stop serving, and return when that is done. From another thread than the serving one."""
        self.stop()
        self._finished.wait()

    def stop(self) -> None:
        """Have serve_forever return soon; for signal handlers."""
        self._stop_asked = True
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
        client = _Client(request, source_of(client_address[0]))
        client.steps = self._converse(client)
        self._clients.add(client)
        self._count(client, True)
        self._resume(client)

    # The other threads

    def _work(self) -> None:
        """Do what may take long, until there is None to do: the body of each pool thread."""
        while (task := self._tasks.get()) is not None:
            client, outcome = task
            self._done.append((client, self.relay.run(outcome)))
            del task, outcome  # a parsed request may be large, and the next one far
            self._wake()

    def _sweep(self) -> None:
        """Sweep, in small steps while there is much to do: the body of the sweeper's thread."""
        pause_s = 0.0
        while not self._no_more_sweeps.wait(pause_s):
            try:
                pause_s = SWEEP_PAUSE_S if self.relay.sweep() else SWEEP_EVERY_S
            except Exception as error:
                log.warning("connectoid relay: cannot sweep: %s", error)
                pause_s = SWEEP_RETRY_S

    # The loop

    def _turn(self) -> None:
        """Do what the sockets ask for, at the latest when the next tick is due."""
        for key, _ in self._selector.select(self._next_tick_s - time.monotonic()):
            self._now_s = time.monotonic()
            if not isinstance(key.data, _Client):
                key.data()
            elif key.data.events:  # else an earlier event of this turn has moved it on
                self._resume(key.data)
        self._now_s = time.monotonic()
        if self._now_s >= self._next_tick_s:
            self._tick()
        if self._stop_asked and not self._stopping:
            self._drain()

    def _tick(self) -> None:
        """Do what is due: deadlines, messages of other processes, accepting (again)."""
        self._next_tick_s = self._now_s + TICK_S
        for client in [client for client in self._clients if client.deadline_s <= self._now_s]:
            self._resume(client, error=TimeoutError())
        self._wake_waiting()
        if not self._stopping:
            with contextlib.suppress(KeyError):  # it is registered already
                self._selector.register(self.socket, READ, self._take_connections)

    def _drain(self) -> None:
        """Stop accepting, answer who waits, let go of who is idle."""
        self._stopping, self._drained_by_s = True, self._now_s + DRAIN_S
        with contextlib.suppress(KeyError):  # it is not registered just now
            self._selector.unregister(self.socket)
        self.socket.close()
        for client in [client for client in self._clients if client.idle]:
            self._resume(client, error=TimeoutError())

    def _take_connections(self) -> None:
        try:
            for _ in range(ACCEPT_BATCH):
                self.process_request(*self.socket.accept())
        except BlockingIOError:
            pass
        except OSError:  # out of files: until the next tick somebody may have gone
            self._selector.unregister(self.socket)

    def _finish_tasks(self) -> None:
        """Take back from the threads what they have done."""
        self._wake_reader.recv(RECV_BYTES)
        while self._done:
            client, outcome = self._done.popleft()
            self._resume(client, outcome)
        if self._waiting:
            self._wake_waiting()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it is over
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
        client.socket.close()

    def _count(self, client: _Client, counted: bool) -> None:
        """Count a client among the connections, or no longer; it may be so already."""
        _add(self._open, client.source, counted - client.counted)
        client.counted = counted

    # The life of a client

    def _converse(self, client: _Client) -> _Steps[None]:
        """Answer requests until one side has enough."""
        try:
            self._check_room(client)
            head = None
            while not head or head.keep_alive:
                head, body = yield from self._next_request(client)
                client.cursor_us = self._cursor_us
                answer = self._answer(client, head, self._route(client, head, body))
                del body  # a client that waits or is idle keeps neither its last request nor the reply
                yield from self._send(client, (yield from answer))
                if self._stopping:
                    return
                if client.incoming:  # the next request is here, but the others have a turn first
                    yield WRITE
        except Refusal as refusal:
            yield from self._refuse(client, refusal)

    def _check_room(self, client: _Client) -> None:
        for key, limit, whose in ((EVERYBODY, self.limits.max_connections, "in all"),
                                  (client.source, self.limits.max_connections_per_source, "of one source")):
            if 0 < limit < self._open[key]:
                raise Refusal(BUSY, f"There are {limit} connections {whose}.", retry_s=10)

    def _next_request(self, client: _Client) -> _Steps[tuple[Head, bytes]]:
        """Return the next request; raise Refusal, or TimeoutError from one who was just idle."""
        incoming, limits = client.incoming, self.limits
        if not incoming:
            client.idle, client.deadline_s = True, self._now_s + limits.idle_timeout_s
            yield from self._more(client)
            client.idle = False
        client.deadline_s = self._now_s + limits.request_timeout_s
        try:
            searched = 0
            while not (head := take_head(incoming, limits.max_header_bytes, searched)):
                searched = len(incoming)
                yield from self._more(client)
            if head.length > limits.max_body_bytes:
                raise Refusal(TOO_BIG, f"A body may have {limits.max_body_bytes} bytes.")
            if head.expects_continue and len(incoming) < head.length:
                client.socket.send(CONTINUE)
            while len(incoming) < head.length:
                yield from self._more(client)
        except TimeoutError:
            raise Refusal(TOO_SLOW, f"A request may take {limits.request_timeout_s} s.") from None
        body = bytes(incoming[:head.length])
        del incoming[:head.length]
        self._hold(client, 0)
        return head, body

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
        _add(self._held, client.source, size - client.held)
        client.held = size
        limit = self.limits.max_buffered_bytes
        return self._held[EVERYBODY] <= limit and self._held[client.source] <= limit // SOURCE_SHARE

    def _answer(self, client: _Client, head: Head, outcome: Outcome | bytes) -> _Steps[bytes]:
        """Return the whole reply to a request, when it is there."""
        until_s, overload = 0.0, Refusal(BUSY, "Too many requests at once.", retry_s=2).reply()
        while not isinstance(outcome, (Reply, bytes)):
            if isinstance(outcome, Wait):
                until_s, overload = until_s or self._now_s + outcome.seconds, outcome.reply
                outcome = yield from self._poll(client, outcome, until_s)
            elif self._tasks.qsize() >= self.limits.max_queued:
                outcome = overload
            else:
                client.deadline_s = NEVER_S
                self._tasks.put((client, outcome))
                outcome = yield NOTHING
        if isinstance(outcome, bytes):
            return outcome
        return render_reply(outcome, head._replace(keep_alive=False) if self._stopping else head)

    def _route(self, client: _Client, head: Head, body: bytes) -> Outcome | bytes:
        if head.method == "OPTIONS":
            return PREFLIGHT + (b"" if head.keep_alive else CLOSE) + b"\r\n"
        methods = _METHODS.get(head.path)
        if not methods:
            return Refusal(NOT_FOUND).reply()
        if head.method not in methods:
            allow = b"Allow: %s\r\n" % ", ".join(methods).encode("ascii")
            return render_reply(Refusal(NOT_ALLOWED).reply(), head, allow)
        if head.path == "/health":
            return self.relay.health
        if head.method == "POST":
            return self.relay.begin(body, client.source)
        return render_page(self.relay.document() | {"udp": self._udp is not None}, head)

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
            return self.relay.step(wait.again) if len(wait.boxes) == 1 else wait.again
        except TimeoutError:
            return wait.reply
        finally:
            client.idle = False
            self._places -= len(wait.boxes)
            for box in wait.boxes:
                self._waiting[box].discard(client)
                if not self._waiting[box]:
                    del self._waiting[box]

    def _send(self, client: _Client, payload: bytes) -> _Steps[None]:
        """Send a whole reply, as fast as the client takes it."""
        client.deadline_s = self._now_s + self.limits.idle_timeout_s
        unsent = memoryview(payload)
        while unsent:
            try:
                unsent = unsent[client.socket.send(unsent):]
            except BlockingIOError:
                if not self._hold(client, len(unsent)):
                    raise ConnectionAbortedError from None
                yield WRITE
        self._hold(client, 0)

    def _refuse(self, client: _Client, refusal: Refusal) -> _Steps[None]:
        """Answer a request that was not read to its end; take what still comes, and close."""
        client.idle = False
        yield from self._send(client, render_reply(refusal.reply()))
        self._count(client, False)
        if len(self._clients) - self._open[EVERYBODY] > MAX_LINGERING:
            return
        # Closing now would send a reset, which overtakes the reply.
        client.socket.shutdown(socket.SHUT_WR)
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
        self._udp = socket.socket(self.address_family, socket.SOCK_DGRAM)
        try:
            _take_ipv4_too(self._udp)
            self._udp.bind(self.server_address)
        except OSError:
            self.server_close()
            raise
        self._udp.setblocking(False)
        self._selector.register(self._udp, READ, functools.partial(self._answer_datagrams, self._udp))

    def _answer_datagrams(self, udp: socket.socket) -> None:
        with contextlib.suppress(OSError):  # no more, or one that cannot be answered
            for _ in range(ACCEPT_BATCH):
                datagram, address = udp.recvfrom(MAX_DATAGRAM_BYTES + 1)
                if reply := answer_datagram(self.relay, datagram):
                    udp.sendto(reply, address)


# ---------------------------------------------------------------------------------------
# The command line: flags to limits, a server until a signal comes, words for people.
# ---------------------------------------------------------------------------------------

MAX_FLAG = 10**12  # of any number: its microseconds still fit SQLite's integers
SPARE_FILES = 64  # beside the connections: the database, the log, what is lingering


def _whole_number(minimum: int, maximum: int = MAX_FLAG) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,13}", text) and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {minimum} to {maximum}")
        return int(text)
    return convert


def flag_of(limit: str) -> str:
    """Return the flag of a field of Limits."""
    return "--" + limit.removesuffix("_s").replace("_", "-")


def build_parser(prog: str = "connectoid_relay.py") -> argparse.ArgumentParser:
    """Return the parser of the command line: README.md, "Flags"."""
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [flag ...] (--help lists them)", allow_abbrev=False,
        description="Keep small encrypted messages for an hour.",
        epilog="The defaults suit a Raspberry Pi. Stop it with Ctrl-C or SIGTERM.")
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
    parser.add_argument("--log-ips", action="store_true", help="name sources in the log")
    for limit in fields(Limits):
        parser.add_argument(flag_of(limit.name), dest=limit.name, metavar="N", default=limit.default,
                            type=_whole_number(limit.metadata["minimum"]),
                            help=f"{limit.metadata['meaning']} (default: {limit.default})")
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


def serve(arguments: argparse.Namespace) -> None:
    """Run a relay until SIGTERM or SIGINT; raise StoreError or OSError if it cannot."""
    limits = Limits(**{limit.name: getattr(arguments, limit.name) for limit in fields(Limits)})
    raise_file_limit(limits.max_connections)
    relay = Relay(SqliteStore(arguments.db, sync=arguments.sync), limits, log_ips=arguments.log_ips)
    address = (arguments.host, arguments.port)
    with contextlib.closing(relay), RelayServer(address, relay, udp=arguments.udp) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        host = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
        log.warning("connectoid relay %s listening on http://%s:%d", __version__, host, server.server_port)
        server.serve_forever()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 stopped, 1 failed; 2 (usage) exits."""
    arguments = build_parser(os.path.basename(sys.argv[0])).parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        serve(arguments)
    except StoreError as error:
        log.error("connectoid relay: %s", error)
        return 1
    except (OSError, UnicodeError) as error:  # UnicodeError is a host name with impossible labels
        log.error("connectoid relay: cannot listen on %s port %d: %s; choose another with --host or --port",
                  arguments.host or "any address,", arguments.port, getattr(error, "strerror", error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
