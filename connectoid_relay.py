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
    "Clock", "Limits", "Message", "NoRoom", "Relay", "RelayServer", "Reply", "SqliteStore",
    "Store", "StoreError", "StoreFull", "main",
]

import argparse
import base64
import collections
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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

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
MAX_BATCH_ITEMS = 256  # checks in one request: an app with 50 contacts has up to 200 mailboxes
MAX_RECEIVE_MESSAGES = 100  # messages in one reply
MAX_RECEIVE_CHARS = 512 * 1024  # of `data` in one reply: what a phone takes at once
MAX_WAIT_S = 60  # of a long poll: shorter than the time-outs of most proxies
MAX_AT_US = 2**63 - 1  # what SQLite can compare
MAX_LENGTH_DIGITS = 9  # of a Content-Length: no machine has trouble with these

ANSWER_BYTES = 32  # of randomness in an answer: 256 bits
SOURCE_SHARE = 8  # one source holds at most 1/8 of a box: a crowd is needed to fill it
MIN_COUNTED_BYTES = 512  # a small message costs this much in rows and indexes all the same
MAX_SOURCES = 100_000  # known to a rate limit at once (20 MB); further ones share one count
MAX_SEEN_BOXES = 10_000  # whose last check is not yet written; further ones wait for their next
PROBE_EVERY_US = 5_000_000  # /health asks the store no more often than this
SWEEPER_LATE_US = 60_000_000  # after so long without a sweep /health says so

SWEEP_EVERY_S = 1.0  # when there was nothing more to delete
SWEEP_PAUSE_S = 0.005  # between two steps when there is more
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
    request_timeout_s: int = _limit(10, "seconds for a whole request, and for taking the reply", 1)
    idle_timeout_s: int = _limit(75, "seconds that a connection may stay idle", 1)
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
# Errors. ERRORS is the table of PROTOCOL.md; a Refusal is the only exception that becomes
# a reply, and it becomes one in two places: Relay._guarded and RelayServer._refuse.
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
# 49 bytes that begin with 2 or 3, in 66 characters whose last 4 bits are zero.
_PUB = re.compile(r"A[g-z0-9_-][A-Za-z0-9_-]{63}[AQgw]")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]{2,}")


def parse_json(body: bytes) -> object:
    """Return the JSON value of a body; raise Refusal (Bad request) if there is none."""
    try:
        request: object = _DECODER.decode(body.decode("utf-8"))
        if b"\\u" in body:  # the only way to a lone surrogate, which UTF-8 cannot hold
            json.dumps(request, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise Refusal(BAD_REQUEST, "The body is not JSON in UTF-8.") from None
    return request


def encode_base64url(octets: bytes) -> str:
    """Return RFC 4648 base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


def read_pub(request: Mapping[str, Any]) -> bytes:
    """Return the 49 bytes of `pub`: of the right form, not yet known to be on the curve."""
    pub = request.get("pub")
    if not isinstance(pub, str) or not _PUB.fullmatch(pub):
        raise Refusal(BAD_REQUEST, "pub must be a compressed P-384 point, 66 characters base64url.")
    return base64.urlsafe_b64decode(pub + "==")


def read_ext(request: Mapping[str, Any]) -> str | None:
    """Return `ext`, a text of at most 1,024 code points, or None."""
    ext = request.get("ext")
    if ext is not None and not (isinstance(ext, str) and len(ext) <= MAX_EXT_CHARS and _is_text(ext)):
        raise Refusal(BAD_REQUEST, f"ext must be null or a string of at most {MAX_EXT_CHARS} characters.")
    return ext


def read_integer(request: Mapping[str, Any], name: str, default: int, minimum: int = 0) -> int:
    """Return an integer member, or its default when absent; booleans and 1.0 are none."""
    number = request.get(name, default)
    if type(number) is not int or number < minimum:
        raise Refusal(BAD_REQUEST, f"{name} must be an integer, at least {minimum}.")
    return number


def read_limit(request: Mapping[str, Any]) -> int:
    """Return `limit`, 1 to 100."""
    limit = read_integer(request, "limit", 1, minimum=1)
    if limit > MAX_RECEIVE_MESSAGES:
        raise Refusal(BAD_REQUEST, f"limit must be at most {MAX_RECEIVE_MESSAGES}.")
    return limit


def read_data(request: Mapping[str, Any]) -> str:
    """Return `data` as it was sent: 2 to 32,768 characters of base64url, not 1 modulo 4."""
    sealed = request.get("data")
    if not isinstance(sealed, str):
        raise Refusal(BAD_REQUEST, "data must be a string.")
    if len(sealed) > MAX_DATA_CHARS:
        raise Refusal(TOO_BIG, f"data must be at most {MAX_DATA_CHARS} characters.")
    if not _BASE64URL.fullmatch(sealed) or len(sealed) % 4 == 1:
        raise Refusal(BAD_REQUEST, "data must be base64url without padding.")
    return sealed


def read_answer(request: Mapping[str, Any]) -> str:
    """Return `answer`, any text: whether it is right is another question."""
    answer = request.get("answer")
    if not isinstance(answer, str) or not _is_text(answer):
        raise Refusal(BAD_REQUEST, "answer must be a string.")
    return answer


def _is_text(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def source_of(address: str) -> str:
    """Return whom an address stands for: itself, the IPv4 one inside, or its IPv6 /64."""
    if address.startswith("::ffff:") and "." in address:
        return address[7:]
    if ":" not in address:
        return address
    try:
        return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex(":", 2) + "::/64"
    except OSError:
        return address


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
# time in microseconds; the store's own time is the larger of that and its row, and never
# runs backwards. A store raises StoreError and nothing else.
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

# ?1 is always the box, ?2 the caller's time.
LOOK = """SELECT
    EXISTS (SELECT 1 FROM messages WHERE box = ?1 AND at > ?3
            AND expires_us > max(?2, (SELECT time_us FROM relay))),
    (SELECT expires_us FROM boxes WHERE box = ?1
            AND expires_us > max(?2, (SELECT time_us FROM relay)))"""
MESSAGES = """SELECT messages.at, messages.data FROM messages JOIN
    (SELECT at, size, sum(size) OVER (ORDER BY at) AS total FROM messages WHERE box = ?1 AND at > ?3
     AND expires_us > max(?2, (SELECT time_us FROM relay)) ORDER BY at LIMIT ?4) AS page
    ON page.at = messages.at WHERE page.total <= ?5 OR page.total = page.size ORDER BY messages.at"""
ARRIVALS = "SELECT at, box FROM messages WHERE at > ? ORDER BY at"
QUESTION = """SELECT question FROM challenges WHERE box = ?1 AND made_us > ?3
    AND expires_us > max(?2, (SELECT time_us FROM relay)) ORDER BY made_us DESC LIMIT 1"""
ANSWERS = """SELECT answer_sha256 FROM challenges WHERE box = ?1
    AND expires_us > max(?2, (SELECT time_us FROM relay))"""
BOX_CONTENT = """SELECT count(*), coalesce(sum(size), 0), coalesce(min(expires_us), 0),
    coalesce(sum(source = ?3), 0), coalesce(sum(size * (source = ?3)), 0),
    coalesce(min(iif(source = ?3, expires_us, NULL)), 0),
    EXISTS (SELECT 1 FROM boxes WHERE box = ?1 AND expires_us > ?2)
    FROM messages WHERE box = ?1 AND expires_us > ?2"""
ADD_MESSAGE = """INSERT INTO messages (at, box, expires_us, source, size, data)
    VALUES (?, ?, ?, ?, ?, ?)"""
ADD_QUESTION = """INSERT OR REPLACE INTO challenges (box, made_us, question, answer_sha256, expires_us)
    VALUES (?, ?, ?, ?, ?)"""
ADD_BOX = "INSERT OR IGNORE INTO boxes (box, expires_us) VALUES (?, ?)"
KEEP_BOX = "UPDATE boxes SET expires_us = max(expires_us, ?2) WHERE box = ?1"
EXPIRED = """WITH now (us) AS (SELECT max(?1, time_us) FROM relay) SELECT
    EXISTS (SELECT 1 FROM messages WHERE expires_us <= (SELECT us FROM now))
    OR EXISTS (SELECT 1 FROM challenges WHERE expires_us <= (SELECT us FROM now))
    OR EXISTS (SELECT 1 FROM boxes WHERE expires_us <= (SELECT us FROM now))"""
SWEEP_MESSAGES = """DELETE FROM messages WHERE at IN (SELECT at FROM messages
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2) RETURNING size"""
SWEEP_CHALLENGES = """DELETE FROM challenges WHERE (box, made_us) IN (SELECT box, made_us FROM challenges
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2)"""
SWEEP_BOXES = """DELETE FROM boxes WHERE box IN (SELECT box FROM boxes
    WHERE expires_us <= ?1 ORDER BY expires_us LIMIT ?2)"""
READ_RELAY = "SELECT time_us, last_at, bytes, boxes FROM relay"
WRITE_RELAY = "UPDATE relay SET time_us = ?, last_at = ?, bytes = ?, boxes = ?"
TABLES = "SELECT count(*) FROM sqlite_schema"

COMMIT_BATCH = 32  # writes in one transaction: 1 MiB of messages, a few milliseconds
SWEEP_ROWS = 128  # rows of a table deleted in one transaction: a few milliseconds
RESERVE_BYTES = 8 << 20  # kept back on the disk: room for questions and sweeps when it is full
CHECKPOINT_EVERY_US = 5 * SECOND_US  # after a deletion, until it is gone from the WAL as well
BUSY_TIMEOUT_S = 1.0  # for a reader that is in the way of a checkpoint
LOCK_TIMEOUT_S = 5.0  # for another process that holds the file
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
class _Transaction:
    """A write under way: the connection, and the row `relay`, written back at its end."""

    db: sqlite3.Connection
    time_us: int
    last_at: int
    bytes: int
    boxes: int

    def raise_time(self, now_us: int) -> int:
        self.time_us = max(self.time_us, now_us)
        return self.time_us

    def next_at(self, now_us: int) -> int:
        self.last_at = max(self.raise_time(now_us), self.last_at + 1)
        return self.last_at


_Job: TypeAlias = Callable[[_Transaction], Any]


class _Ticket:
    """A write that waits for its commit, and what came of it: an error until it is committed."""

    __slots__ = ("done", "durable", "error", "job", "outcome", "refused")

    def __init__(self, job: _Job, durable: bool) -> None:
        self.job, self.durable, self.outcome, self.done = job, durable, None, False
        self.error: StoreError | None = StoreError("not committed")
        self.refused: NoRoom | None = None

    def run(self, transaction: _Transaction) -> None:
        try:
            self.outcome = self.job(transaction)
        except NoRoom as error:  # raised before anything was written
            self.refused = error


class _BoxContent(NamedTuple):
    """What a send must know of a box: BOX_CONTENT."""

    messages: int
    bytes: int
    first_expires_us: int
    source_messages: int
    source_bytes: int
    source_first_expires_us: int
    proven: int


def counted_bytes(size: int) -> int:
    """Return how much a message of this size counts against the relay's bytes."""
    return max(size, MIN_COUNTED_BYTES)


def _check_room(content: _BoxContent, size: int, relay_bytes: int, limits: Limits) -> None:
    """Raise NoRoom if a message of this size would go over a limit."""
    share_messages = max(1, limits.max_box_messages // SOURCE_SHARE)
    share_bytes = limits.max_box_bytes // SOURCE_SHARE
    if content.source_messages >= share_messages or (
            content.source_messages and content.source_bytes + size > share_bytes):
        raise NoRoom("source", content.source_first_expires_us)
    if content.messages >= limits.max_box_messages or content.bytes + size > limits.max_box_bytes:
        raise NoRoom("box", content.first_expires_us)
    # Strangers may fill two thirds; the last one is for boxes whose owner has shown up.
    if relay_bytes + counted_bytes(size) > limits.max_bytes * (3 if content.proven else 2) // 3:
        raise NoRoom("relay")


class SqliteStore:
    """Keep everything in one SQLite file in WAL mode, or in ":memory:".

    Any number of threads and processes may use the file. Concurrent writes share one
    commit; `sync="full"` has it survive a power loss, "normal" only a crash of the
    relay. SQLite before 3.51.3 can lose a commit to a checkpoint of another connection
    (sqlite.org/wal.html, "WAL-reset bug"), so both happen under one lock of ours.
    Raises StoreError if the file cannot be used; a file of another program is left alone.
    """

    def __init__(self, path: str = "connectoid.db", *, sync: str = "full") -> None:
        self._path = path
        self._in_memory = path == ":memory:"
        self._durable = {"full": "PRAGMA synchronous = FULL", "normal": "PRAGMA synchronous = NORMAL"}[sync]
        self._lock = threading.Lock()  # held while writing; the file's lock is for other processes
        self._queue: collections.deque[_Ticket] = collections.deque()
        self._connections: list[sqlite3.Connection] = []
        self._readers: list[sqlite3.Connection] = []  # those that are idle
        self._deleted_us: int | None = None  # since when a deletion waits for its checkpoint
        self._lock_file = -1 if self._in_memory else self._create_files()
        try:
            with self._exclusive():
                self._db = self._connect()
                self._prepare()
                self._reserve_bytes = self._choose_reserve()
                self._disk_full = not self._make_reserve()
        except StoreError:
            self._disconnect()
            raise

    # Opening and closing

    def _create_files(self) -> int:
        """Create the database, for our eyes only, and return the open lock file."""
        try:
            if not os.path.exists(self._path):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            return os.open(self._path + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}; choose another file with --db") from None

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None,
                             check_same_thread=False)
        self._connections.append(db)
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        return db

    def _prepare(self) -> None:
        """Make the schema in an empty file; refuse one that is not ours before touching it."""
        (owner,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute(TABLES).fetchone()
        if (owner, version, tables) == (0, 0, 0):
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                self._db.execute(statement)
            self._db.execute("COMMIT")
        elif owner != APPLICATION_ID:
            raise StoreError(f"{self._path} belongs to another program; choose another file with --db")
        elif version != SCHEMA_VERSION:
            raise StoreError(f"{self._path} has schema {version}, this relay knows {SCHEMA_VERSION};"
                             " choose another file with --db")
        # Fails here and now if the file cannot be written or the row has gone.
        if self._db.execute("UPDATE relay SET time_us = time_us").rowcount != 1:
            raise StoreError(f"{self._path} is damaged; move the file away and start again")

    def close(self) -> None:
        """Move everything from the WAL into the file and let go of both."""
        with contextlib.suppress(StoreError), self._exclusive():
            self._checkpoint()
            for db in reversed(self._connections):  # the last one checkpoints by itself
                db.close()
        self._disconnect()

    def _disconnect(self) -> None:
        for db in self._connections:
            db.close()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    # Locks, errors, transactions

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise every error of SQLite as a StoreError with its meaning."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)  # Python's own errors have none
            if code in _FULL_CODES:
                raise StoreFull(f"{self._path}: the disk is full ({error})") from error
            meaning = _MEANINGS.get(code & 0xFF, "cannot be used")
            raise StoreError(f"{self._path} {meaning} ({error})") from error

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep all other writers and checkpoints out, those of other processes too."""
        with self._lock, self._file_lock(), self._translated():
            yield

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        while not self._try_file_lock():
            if time.monotonic() > deadline_s:
                raise StoreError(f"{self._path} is held by another process")
            time.sleep(LOCK_RETRY_S)
        try:
            yield
        finally:
            if self._lock_file >= 0:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _try_file_lock(self) -> bool:
        if self._lock_file >= 0:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _write(self, job: _Job, *, durable: bool = False) -> Any:
        """Run the job in a transaction and return its outcome once that is committed.

        What the owners need (everything but a durable send) may use up the reserve.
        """
        ticket = self._submit(_Ticket(job, durable))
        if isinstance(ticket.error, StoreFull):
            self._open_reserve()
            if not durable:
                ticket = self._submit(_Ticket(job, durable))
        if ticket.error:
            raise ticket.error
        return ticket.outcome

    def _submit(self, ticket: _Ticket) -> _Ticket:
        """Return the ticket when it is done: whoever gets the lock commits for all who wait."""
        self._queue.append(ticket)
        while not ticket.done:
            with self._lock:
                if not ticket.done:
                    self._commit([self._queue.popleft() for _ in range(min(COMMIT_BATCH, len(self._queue)))])
        return ticket

    def _commit(self, batch: Sequence[_Ticket]) -> None:
        try:
            with self._file_lock(), self._translated():
                try:
                    self._run(batch)
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
            for ticket in batch:
                ticket.error = ticket.refused
            self._shorten_wal()
        except StoreError as error:
            for ticket in batch:
                ticket.error = ticket.refused or error
        finally:
            for ticket in batch:
                ticket.done = True

    def _run(self, batch: Sequence[_Ticket]) -> None:
        """Run a batch in one transaction; one that has changed nothing is rolled back."""
        durable = any(ticket.durable for ticket in batch)
        self._db.execute(self._durable if durable else "PRAGMA synchronous = NORMAL")
        self._db.execute("BEGIN IMMEDIATE")
        changes = self._db.total_changes
        transaction = _Transaction(self._db, *self._db.execute(READ_RELAY).fetchone())
        for ticket in batch:
            ticket.run(transaction)
        if self._db.total_changes == changes:
            return
        self._db.execute(WRITE_RELAY, (transaction.time_us, transaction.last_at,
                                       transaction.bytes, transaction.boxes))
        self._db.execute("COMMIT")

    def _read(self, sql: str, *values: Any) -> list[Any]:
        with self._translated():
            if self._in_memory:  # a second connection would see another memory
                with self._lock:
                    return self._db.execute(sql, values).fetchall()
            try:
                db = self._readers.pop()
            except IndexError:
                db = self._connect()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                self._readers.append(db)

    # Methods of Store

    def time_us(self) -> int:
        """Return the store's time: that of the last write, or a little more."""
        ((time_us, last_at, _, _),) = self._read(READ_RELAY)
        return max(int(time_us), int(last_at))

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`; raise NoRoom or StoreFull."""
        if self._disk_full:  # what is left belongs to the owners
            raise StoreFull(f"{self._path}: the disk is full")
        at: int = self._write(functools.partial(_put, message, limits, now_us), durable=True)
        return at

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
        rows = self._read(QUESTION, box, now_us, made_after_us)
        return rows[0][0] if rows else None

    def put_question(self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep a question unless another is still young; return the one to hand out."""
        kept: str = self._write(functools.partial(_put_question, box, question, ttl_us, now_us))
        return kept

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now."""
        return [answer for (answer,) in self._read(ANSWERS, box, now_us)]

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for."""
        self._write(functools.partial(_keep_boxes, expiries_us, now_us, room_for))

    def sweep(self, now_us: int) -> bool:
        """Delete some of what has expired, have it gone from the WAL in time, mend a full disk."""
        more = False
        if self._read(EXPIRED, now_us)[0][0]:
            more = self._write(functools.partial(_delete_expired, now_us))
            self._deleted_us = now_us if self._deleted_us is None else self._deleted_us
        overdue = self._deleted_us is not None and now_us - self._deleted_us >= CHECKPOINT_EVERY_US
        if overdue or self._disk_full:
            self._empty_wal()
        return more

    def probe(self, now_us: int) -> None:
        """Write the time for real and read it back; raise StoreError if that fails."""
        if self._disk_full:
            raise StoreFull(f"{self._path}: the disk is full")
        self._write(functools.partial(_write_time, now_us), durable=True)
        self._read(READ_RELAY)

    # The WAL, and room on the disk

    def _checkpoint(self) -> bool:
        """Move the WAL into the file and empty it; return False while a reader needs it."""
        busy: int = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return not busy

    def _empty_wal(self) -> None:
        """Have deletions gone from the WAL; when the disk is full, see whether it still is."""
        try:
            with self._exclusive():
                if self._checkpoint():
                    self._deleted_us = None
                    self._disk_full = not self._make_reserve()
        except StoreFull:
            self._open_reserve()

    def _shorten_wal(self) -> None:
        """Keep the WAL so short that the reserve has room for all that is in it."""
        with contextlib.suppress(OSError, StoreError):  # the next commit tries again
            if os.stat(self._path + "-wal").st_size > self._reserve_bytes // 2:
                with self._file_lock(), self._translated():
                    self._checkpoint()

    def _choose_reserve(self) -> int:
        """Return how much of the disk to keep back, and keep the file within its size limit."""
        if self._in_memory:
            return 0
        directory = os.statvfs(os.path.dirname(self._path) or ".")
        room = directory.f_bavail * directory.f_frsize
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY:
            room = min(room, limit)
            # The WAL could not be emptied into a file that may not grow.
            self._db.execute(f"PRAGMA max_page_count = {limit // 4096}")
        return min(RESERVE_BYTES, room // 4)

    def _make_reserve(self) -> bool:
        """Take room that nobody else can use; return False if there is none."""
        if self._in_memory:
            return True
        path = Path(self._path + "-reserve")
        try:
            if not path.exists() or path.stat().st_size < self._reserve_bytes:
                path.write_bytes(bytes(self._reserve_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        return True

    def _open_reserve(self) -> None:
        """Give the reserve to the owners: sends are refused from now on until it is back."""
        with contextlib.suppress(StoreError, OSError), self._exclusive():
            self._disk_full = True
            Path(self._path + "-reserve").unlink(missing_ok=True)
            self._checkpoint()


def _put(message: Message, limits: Limits, now_us: int, transaction: _Transaction) -> int:
    box, sealed, source, ttl_us = message
    content = _BoxContent(*transaction.db.execute(
        BOX_CONTENT, (box, max(transaction.time_us, now_us), source)).fetchone())
    _check_room(content, len(sealed), transaction.bytes, limits)
    at = transaction.next_at(now_us)
    transaction.bytes += counted_bytes(len(sealed))
    transaction.db.execute(ADD_MESSAGE, (at, box, at + ttl_us, source, len(sealed), sealed))
    return at


def _put_question(box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int,
                  transaction: _Transaction) -> str:
    now_us = transaction.raise_time(now_us)
    young = transaction.db.execute(QUESTION, (box, now_us, now_us - ttl_us // 2)).fetchone()
    if young:  # another check was faster
        return str(young[0])
    transaction.db.execute(ADD_QUESTION, (box, now_us, *question, now_us + ttl_us))
    return question[0]


def _keep_boxes(expiries_us: Mapping[bytes, int], now_us: int, room_for: int,
                transaction: _Transaction) -> None:
    transaction.raise_time(now_us)
    for box, expires_us in expiries_us.items():
        kept = transaction.db.execute(KEEP_BOX, (box, expires_us)).rowcount
        if not kept and transaction.boxes < room_for:
            transaction.boxes += transaction.db.execute(ADD_BOX, (box, expires_us)).rowcount


def _delete_expired(now_us: int, transaction: _Transaction) -> bool:
    span = (transaction.raise_time(now_us), SWEEP_ROWS)
    sizes = transaction.db.execute(SWEEP_MESSAGES, span).fetchall()
    transaction.bytes -= sum(counted_bytes(size) for (size,) in sizes)
    challenges = transaction.db.execute(SWEEP_CHALLENGES, span).rowcount
    boxes = transaction.db.execute(SWEEP_BOXES, span).rowcount
    transaction.boxes -= boxes
    return max(len(sizes), challenges, boxes) == SWEEP_ROWS


def _write_time(now_us: int, transaction: _Transaction) -> None:
    transaction.db.execute("UPDATE relay SET time_us = ?", (transaction.raise_time(now_us),))


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


class _Check(NamedTuple):
    box: bytes
    at_us: int
    wait_s: int
    source: str


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
        on = self.limits.rate > 0
        self._requests = RateLimit(self.limits.rate, MINUTE_US)
        self._seals = RateLimit(on * self.limits.max_seals, MINUTE_US)
        self._sends = RateLimit(on * self.limits.max_sends, MINUTE_US)
        self._sent_bytes = RateLimit(on * self.limits.max_source_bytes, HOUR_US)
        self._datagrams = RateLimit(on * self.limits.max_udp, SECOND_US)
        self._complaints = RateLimit(1, MINUTE_US)
        self._source_key = random_bytes(32)  # never written: no address can be guessed from the file
        self._seen_us: dict[bytes, int] = {}  # boxes with a check today, not yet written
        self._swept_us = self.now_us()
        self._probed_us = 0
        self._probe_reply = Reply(200, {"ok": True})

    def now_us(self) -> int:
        """Return the relay's own time: it never runs backwards, whatever the wall clock does."""
        return self._base_us + self._clock.monotonic_us()

    def handle(self, request: object, source: str) -> Reply:
        """Return (status, reply) for a parsed JSON request from an IP address.

        Never raises, and never waits for messages: `wait` is up to the fronts. Blocks
        while the disk works. PROTOCOL.md, "Operations".
        """
        outcome = self.run(functools.partial(self._begin, request, source_of(source)))
        return outcome.reply if isinstance(outcome, Wait) else outcome

    def begin(self, body: bytes, source: str) -> Outcome:
        """Return what a body from a source (as `source_of` has it) comes to, without blocking."""
        return self._guarded(functools.partial(self._begin_body, body, source))

    def run(self, outcome: Outcome) -> Reply | Wait:
        """Do what `begin` left to do; may block on the disk. Never raises."""
        while callable(outcome):
            outcome = self._guarded(outcome)
        return outcome

    def _guarded(self, call: Callable[[], Outcome]) -> Outcome:
        """Call, and turn every exception into a reply: the only place that does."""
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

    def _begin_body(self, body: bytes, source: str) -> Outcome:
        try:
            request = parse_json(body)
        except Refusal:
            self._admit(source)  # junk counts as well
            raise
        return self._begin(request, source)

    def _begin(self, request: object, source: str) -> Outcome:
        if isinstance(request, list) and 1 <= len(request) <= MAX_BATCH_ITEMS:
            items = [functools.partial(self._begin_one, item, source, _BATCH_OPERATIONS) for item in request]
            return functools.partial(self._merge, items)
        return self._begin_one(request, source, _OPERATIONS)

    def _begin_one(self, request: object, source: str, operations: Mapping[str, _Operation]) -> Outcome:
        self._admit(source)
        if not isinstance(request, dict):
            raise Refusal(BAD_REQUEST, f"A request is an object, or an array of 1 to {MAX_BATCH_ITEMS} checks.")
        action = request.get("action")
        if not isinstance(action, str) or action not in operations:
            raise Refusal(BAD_REQUEST, f"action must be one of {', '.join(operations)}.")
        box = read_pub(request)
        read_ext(request)  # API keys will be looked up here
        return operations[action](self, request, box, source)

    def _admit(self, source: str) -> None:
        retry_s = self._requests.take(source, self.now_us())
        if retry_s:
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
        at_us = min(read_integer(request, "at", 0), MAX_AT_US)
        wait_s = min(read_integer(request, "wait", 0), MAX_WAIT_S)
        return self._look(_Check(box, at_us, wait_s, source))

    def _look(self, check: _Check) -> Outcome:
        if self._found(check.box, check.at_us):
            return functools.partial(self._ask, check.box, check.source)
        if check.wait_s:
            again = functools.partial(self._look, check)
            return Wait(frozenset((check.box,)), check.wait_s, _nothing(), again)
        return _nothing()

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
            retry_s = self._seals.take(source, now_us)
            if retry_s:
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
        return self._found(read_pub(request), min(read_integer(request, "at", 0), MAX_AT_US))

    # receive

    def _receive(self, request: Mapping[str, Any], box: bytes, _source: str) -> Outcome:
        answer = read_answer(request)
        at_us = min(read_integer(request, "at", 0), MAX_AT_US)
        return functools.partial(self._deliver, box, answer, at_us, read_limit(request))

    def _deliver(self, box: bytes, answer: str, at_us: int, limit: int) -> Reply:
        now_us = self.now_us()
        given = hash_answer(answer)
        right = [hmac.compare_digest(given, kept) for kept in self.store.answers(box, now_us)]
        if not any(right):
            raise Refusal(WRONG_ANSWER, "Check again for a new question.")
        self._prove(box, at_us)
        messages = [{"at": at, "data": sealed}
                    for at, sealed in self.store.messages(box, at_us, limit, now_us)]
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
        retry_s = (self._sends.take((box, source), now_us)
                   or self._sent_bytes.take(source, now_us, len(sealed)))
        if retry_s:
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
        return hashlib.blake2b(f"{today} {source}".encode(), key=self._source_key, digest_size=16).digest()

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
        seen_us, self._seen_us = self._seen_us, {}
        if seen_us:
            self.store.keep_boxes(dict(seen_us), now_us)
        more = self.store.sweep(self.now_us())
        self._swept_us = self.now_us()
        return more

    def health(self) -> Reply:
        """Return 200 while a write and a read of the store work and the sweeper lives."""
        now_us = self.now_us()
        if now_us - self._swept_us > SWEEPER_LATE_US:
            return Refusal(BUSY, "The sweeper has stopped.", retry_s=5).reply()
        if now_us - self._probed_us >= PROBE_EVERY_US:
            self._probed_us = now_us
            outcome = self.run(self._probe)
            self._probe_reply = outcome if isinstance(outcome, Reply) else self._probe_reply
        return self._probe_reply

    def _probe(self) -> Reply:
        try:
            self.store.probe(self.now_us())
        except StoreError as error:
            self._complain(str(error))
            raise Refusal(BUSY, "The store cannot be read or written.", retry_s=5) from None
        return Reply(200, {"ok": True})

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
            self.store.keep_boxes(dict(self._seen_us), self.now_us())
        self.store.close()


_Operation: TypeAlias = Callable[[Relay, Mapping[str, Any], bytes, str], Outcome]
_OPERATIONS: Mapping[str, _Operation] = {
    "send": Relay._send, "check": Relay._check, "receive": Relay._receive,
}
_BATCH_OPERATIONS: Mapping[str, _Operation] = {"check": Relay._check}


# ---------------------------------------------------------------------------------------
# HTTP: RFC 9112 as far as a relay needs it, read strictly, so that no proxy before us can
# see another request than we do. Pure functions from bytes to requests, replies to bytes.
# ---------------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
_HEAD = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n((?:" + _FIELD.pattern + rb")*)\r\n")
_HOPELESS = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n|\Z)")  # TLS, for one, has a NUL at once
_REASONS = {status: HTTPStatus(status).phrase.encode("ascii") for status in (200, *(error.status for error in ERRORS))}
_AUTHORITY = re.compile(r"https?://[^/?]*", re.IGNORECASE)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLOSE = b"Connection: close\r\n"
CORS = b"Access-Control-Allow-Origin: *\r\n"
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


def take_head(incoming: bytearray, limit: int) -> Head | None:
    """Remove a request's head from what came in; None if it is not complete. Raises Refusal."""
    end = incoming.find(b"\r\n\r\n") + 4
    if end > limit or (end < 4 and len(incoming) > limit):
        raise Refusal(HEADERS_TOO_BIG, f"More than {limit} bytes of headers.")
    if end < 4:
        if _HOPELESS.search(incoming):
            raise Refusal(BAD_REQUEST, "This is not HTTP/1.1.")
        return None
    head = parse_head(bytes(incoming[:end]))
    del incoming[:end]
    return head


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
    if len(lengths) > 1 or len(lengths[0]) > MAX_LENGTH_DIGITS or not lengths[0].isdigit():
        raise Refusal(BAD_REQUEST, f"Send one Content-Length of 1 to {MAX_LENGTH_DIGITS} digits.")
    return Head(
        method=method.decode("ascii"),
        path=_AUTHORITY.sub("", target.decode("ascii"), count=1).partition("?")[0] or "/",
        length=int(lengths[0]),
        keep_alive=minor == b"1" and b"close" not in header.get(b"connection", b"").lower(),
        expects_continue=header.get(b"expect", b"").lower() == b"100-continue",
        wants_json=b"application/json" in header.get(b"accept", b""),
    )


def render(status: int, body: bytes, content_type: str = "application/json", *,
           headers: bytes = b"", keep_alive: bool = True, with_body: bool = True) -> bytes:
    """Return a whole reply. Without a Date: the relay has no clock that it would swear by."""
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s%s%s\r\n%s" % (
        status, _REASONS[status], content_type.encode("ascii"), len(body), CORS, headers,
        b"" if keep_alive else CLOSE, body if with_body else b"")


def render_reply(reply: Reply, *, keep_alive: bool = True, with_body: bool = True,
                 headers: bytes = b"") -> bytes:
    """Return a reply of the core as HTTP, `retry` also as a header."""
    if isinstance(reply.body, dict) and "retry" in reply.body:
        headers += b"Retry-After: %d\r\n" % reply.body["retry"]
    return render(reply.status, json.dumps(reply.body).encode("ascii"), headers=headers,
                  keep_alive=keep_alive, with_body=with_body)


def render_page(document: Mapping[str, Any]) -> bytes:
    """Return the page for people."""
    texts = {name: html.escape(str(document[name])) for name in ("name", "description", "version")}
    return PAGE.format(minutes=document["retention"]["message"] // 60, **texts).encode("utf-8")


# ---------------------------------------------------------------------------------------
# UDP: one datagram with a check, one back, never longer. A pure function; whatever is
# not a well-formed check gets nothing, so that a forged sender gains nothing.
# ---------------------------------------------------------------------------------------

MAX_DATAGRAM_BYTES = 2_048  # more than any check; a longer one is cut, and so is no JSON
_ID = re.compile(r"[A-Za-z0-9_-]{1,16}")


def answer_datagram(relay: Relay, datagram: bytes) -> bytes | None:
    """Return the reply to a datagram, or None for none. PROTOCOL.md, "UDP"."""
    try:
        request = parse_json(datagram)
        found = relay.glance(request)
    except (Refusal, StoreError):
        return None
    reply: dict[str, Any] = {"ok": True, "found": found}
    if isinstance(request, dict) and "id" in request:
        if not isinstance(request["id"], str) or not _ID.fullmatch(request["id"]):
            return None
        reply["id"] = request["id"]
    octets = json.dumps(reply).encode("ascii")
    return octets if len(octets) <= len(datagram) else None


# ---------------------------------------------------------------------------------------
# The server. One thread owns all sockets: it waits for them with a selector, reads, and
# answers at once what needs neither disk nor seal (most of all the check that finds
# nothing). The rest goes to a few threads and comes back through a queue. So a connection
# that is idle, slow or waiting costs some memory and no thread, and no socket needs a lock.
# ---------------------------------------------------------------------------------------

READING, WORKING, WAITING, WRITING, LINGERING, CLOSED = range(6)
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
NEVER_S = float("inf")


class Connection:
    """A client's socket and where we are with it. Only the loop's thread touches it."""

    __slots__ = ("cursor_us", "deadline_s", "events", "head", "incoming", "keep_alive", "outgoing",
                 "socket", "source", "state", "to_drop", "wait", "wait_until_s", "with_body")

    def __init__(self, client: socket.socket, source: str) -> None:
        self.socket, self.source, self.state, self.events = client, source, READING, 0
        self.incoming, self.outgoing = bytearray(), memoryview(b"")
        self.head: Head | None = None  # of the request whose body is still coming
        self.keep_alive = self.with_body = True  # whether the reply under way leaves it so, and has one
        self.deadline_s = NEVER_S
        self.wait: Wait | None = None
        self.wait_until_s = 0.0  # of the long poll under way, however often it is asked again
        self.cursor_us = 0  # up to which messages the request under way has certainly seen
        self.to_drop = LINGER_BYTES


class RelayServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serve a relay over HTTP, and over UDP if asked: an http.server with other insides.

    `serve_forever`, `shutdown`, `server_close`, `server_port` and `with` are as usual; it
    serves once. The host "" is all interfaces, IPv6 and IPv4. Raises OSError if the
    address cannot be had.
    """

    request_queue_size = LISTEN_BACKLOG

    def __init__(self, server_address: tuple[str, int], relay: Relay, *, udp: bool = False) -> None:
        self.relay, self.limits = relay, relay.limits
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._lingering: set[Connection] = set()  # refused, not yet closed; not in the other set
        self._per_source: collections.Counter[str] = collections.Counter()
        self._waiting: dict[bytes, set[Connection]] = {}
        self._places = 0  # taken in _waiting
        self._buffered = 0  # bytes in all buffers, counted anew at each tick
        self._cursor_us = relay.store.time_us()  # of the newest message that the loop knows of
        self._tasks: queue.SimpleQueue[tuple[Connection, Outcome] | None] = queue.SimpleQueue()
        self._done: collections.deque[tuple[Connection, Outcome]] = collections.deque()
        self._finished, self._sweeper_stop = threading.Event(), threading.Event()
        self._finished.set()
        self._stop_asked = self._stopping = False  # stopping: no new connections, no waits
        self._now_s = self._next_tick_s = self._drained_by_s = time.monotonic()
        self._wake_reader, self._wake_writer = socket.socketpair()
        dual = server_address[0] == "" and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if dual else _family_of(server_address[0])
        self._udp: socket.socket | None = None
        self._listening = False  # whether the loop accepts
        super().__init__(server_address, http.server.BaseHTTPRequestHandler)
        if udp:
            self._bind_udp()

    # What http.server would do

    def server_bind(self) -> None:
        """Bind without asking the DNS for our name; replies are not held back (Nagle)."""
        _accept_ipv4(self.socket)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def _bind_udp(self) -> None:
        self._udp = socket.socket(self.address_family, socket.SOCK_DGRAM)
        try:
            _accept_ipv4(self._udp)
            self._udp.bind(self.server_address)
        except OSError:
            self.server_close()
            raise

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown or stop is called; then answer who waits and return."""
        self._finished.clear()
        threads = [threading.Thread(target=self.process_request_thread, daemon=True)
                   for _ in range(POOL_THREADS)] + [threading.Thread(target=self._sweep, daemon=True)]
        for thread in threads:
            thread.start()
        try:
            self._open()
            while not (self._stopping and self._drained()):
                self._turn(poll_interval)
        finally:
            self._sweeper_stop.set()
            for _ in range(POOL_THREADS):
                self._tasks.put(None)
            for thread in threads:
                thread.join(max(0.1, self._drained_by_s - time.monotonic()))
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
        for connection in (*self._connections, *self._lingering):
            self._close(connection)
        for opened in (self.socket, self._udp, self._wake_reader, self._wake_writer, self._selector):
            if opened is not None:
                opened.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a new connection in; no thread is made for it."""
        request.setblocking(False)
        connection = Connection(request, source_of(client_address[0]))
        connection.deadline_s = self._now_s + self.limits.idle_timeout_s
        self._connections.add(connection)
        self._per_source[connection.source] += 1
        self._attend(connection, RelayServer._welcome)

    def process_request_thread(self, *_: Any) -> None:
        """Do what may take long, until there is None to do: the body of each pool thread."""
        while (task := self._tasks.get()) is not None:
            connection, outcome = task
            self._done.append((connection, self.relay.run(outcome)))
            self._wake()

    def _sweep(self) -> None:
        """Sweep, in small steps while there is much to do: the body of the sweeper's thread."""
        pause_s = 0.0
        while not self._sweeper_stop.wait(pause_s):
            try:
                pause_s = SWEEP_PAUSE_S if self.relay.sweep() else SWEEP_EVERY_S
            except StoreError as error:
                log.warning("connectoid relay: cannot sweep: %s", error)
                pause_s = SWEEP_RETRY_S

    # The loop

    def _open(self) -> None:
        self.socket.setblocking(False)
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, READ, self._finish_tasks)
        if self._udp:
            self._udp.setblocking(False)
            self._selector.register(self._udp, READ, self._answer_datagrams)
        self._listen(True)

    def _listen(self, on: bool) -> None:
        if on and not self._listening:
            self._selector.register(self.socket, READ, self._accept)
        elif self._listening and not on:
            self._selector.unregister(self.socket)
        self._listening = on

    def _turn(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            self._now_s = time.monotonic()
            if isinstance(key.data, Connection):
                self._attend(key.data, _ON_READY[key.data.state])
            else:
                key.data()
        self._now_s = time.monotonic()
        if self._now_s >= self._next_tick_s:
            self._tick()
        if self._stop_asked and not self._stopping:
            self._drain()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it is over
            self._wake_writer.send(b"\0")

    def _tick(self) -> None:
        """Do what is due: deadlines, messages of other processes, accepting again."""
        self._next_tick_s = self._now_s + TICK_S
        everyone = (*self._connections, *self._lingering)
        self._buffered = sum(len(one.incoming) + len(one.outgoing) for one in everyone)
        for connection in everyone:
            if connection.deadline_s <= self._now_s:
                self._attend(connection, _ON_DEADLINE[connection.state])
        self._wake_waiting()
        if not self._stopping:
            self._listen(True)

    def _drain(self) -> None:
        """Stop accepting, answer who waits, let go of who is idle."""
        self._stopping = True
        self._drained_by_s = self._now_s + DRAIN_S
        self._listen(False)
        self.socket.close()
        for connection in tuple(self._connections):
            if connection.state == WAITING:
                self._attend(connection, RelayServer._end_wait)
            elif connection.state == READING and not connection.incoming and not connection.head:
                self._close(connection)

    def _drained(self) -> bool:
        return not self._connections or self._now_s >= self._drained_by_s

    def _attend(self, connection: Connection, step: Callable[[RelayServer, Connection], None]) -> None:
        """Do a step for one connection; whatever goes wrong ends that connection alone."""
        try:
            try:
                step(self, connection)
            except Refusal as refusal:
                self._refuse(connection, refusal)
        except OSError:
            self._close(connection)
        except Exception:
            log.exception("a connection failed; please report this")
            self._close(connection)

    def _watch(self, connection: Connection, events: int) -> None:
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.socket, events, connection)
        elif not events:
            self._selector.unregister(connection.socket)
        else:
            self._selector.modify(connection.socket, events, connection)
        connection.events = events

    # Accepting, refusing, closing

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                client, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError:  # out of files; until the next tick somebody may have gone
                self._listen(False)
                return
            self.process_request(client, address)

    def _welcome(self, connection: Connection) -> None:
        limits = self.limits
        if 0 < limits.max_connections < len(self._connections):
            raise Refusal(BUSY, f"More than {limits.max_connections} connections.", retry_s=10)
        if 0 < limits.max_connections_per_source < self._per_source[connection.source]:
            raise Refusal(BUSY, f"More than {limits.max_connections_per_source} connections"
                          " of one source.", retry_s=10)
        self._read(connection)

    def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        """Answer a request that was not read to its end, and close."""
        connection.keep_alive = False
        self._leave(connection)
        if len(self._lingering) < MAX_LINGERING:
            self._lingering.add(connection)
        self._answer(connection, refusal.reply())

    def _linger(self, connection: Connection) -> None:
        """Say no more, but take what still comes: a reset would overtake the reply."""
        connection.incoming.clear()
        connection.state, connection.deadline_s = LINGERING, self._now_s + LINGER_S
        connection.socket.shutdown(socket.SHUT_WR)
        self._watch(connection, READ)

    def _drop(self, connection: Connection) -> None:
        dropped = len(connection.socket.recv(RECV_BYTES))
        connection.to_drop -= dropped
        if not dropped or connection.to_drop <= 0:
            self._close(connection)

    def _leave(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._per_source[connection.source] -= 1
            if not self._per_source[connection.source]:
                del self._per_source[connection.source]

    def _close(self, connection: Connection) -> None:
        if connection.state == WAITING:
            self._unpark(connection)
        connection.state, connection.deadline_s = CLOSED, NEVER_S
        self._leave(connection)
        self._lingering.discard(connection)
        self._watch(connection, 0)
        connection.socket.close()

    # Reading requests

    def _read(self, connection: Connection) -> None:
        try:
            chunk = connection.socket.recv(RECV_BYTES)
        except BlockingIOError:
            return self._watch(connection, READ)
        if not chunk:
            return self._close(connection)
        if not connection.incoming and not connection.head:
            connection.deadline_s = self._now_s + self.limits.request_timeout_s
        connection.incoming += chunk
        self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        """Answer the requests that are complete, and wait for the rest of the next."""
        while connection.state == READING and (request := self._next_request(connection)):
            self._dispatch(connection, *request)
        if connection.state == READING:
            if not self._has_room_for(connection.incoming):
                raise Refusal(BUSY, "Too much is under way.", retry_s=5)
            self._watch(connection, READ)

    def _has_room_for(self, buffer: bytearray | memoryview) -> bool:
        self._buffered += len(buffer)
        return self._buffered <= self.limits.max_buffered_bytes

    def _next_request(self, connection: Connection) -> tuple[Head, bytes] | None:
        incoming = connection.incoming
        head = connection.head
        if not head:
            head = connection.head = take_head(incoming, self.limits.max_header_bytes)
            if not head:
                return None
            if head.length > self.limits.max_body_bytes:
                raise Refusal(TOO_BIG, f"A body may have {self.limits.max_body_bytes} bytes.")
            if head.expects_continue and len(incoming) < head.length:
                connection.socket.send(CONTINUE)
        if len(incoming) < head.length:
            return None
        body = bytes(incoming[:head.length])
        del incoming[:head.length]
        connection.head = None
        return head, body

    def _too_slow(self, connection: Connection) -> None:
        if connection.incoming or connection.head:
            raise Refusal(TOO_SLOW, f"A request may take {self.limits.request_timeout_s} s.")
        self._close(connection)

    # Answering

    def _dispatch(self, connection: Connection, head: Head, body: bytes) -> None:
        connection.keep_alive = head.keep_alive and not self._stopping
        connection.with_body = head.method != "HEAD"
        connection.cursor_us = self._cursor_us
        routes = _ROUTES.get(head.path)
        if head.method == "OPTIONS":
            self._send(connection, PREFLIGHT + (b"" if connection.keep_alive else CLOSE) + b"\r\n")
        elif routes is None:
            self._answer(connection, Refusal(NOT_FOUND).reply())
        elif head.method not in routes:
            allow = b"Allow: %s, OPTIONS\r\n" % ", ".join(routes).encode("ascii")
            self._answer(connection, Refusal(NOT_ALLOWED).reply(), headers=allow)
        else:
            routes[head.method](self, connection, head, body)

    def _post(self, connection: Connection, _head: Head, body: bytes) -> None:
        self._conclude(connection, self.relay.begin(body, connection.source))

    def _page(self, connection: Connection, head: Head, _body: bytes) -> None:
        document = self.relay.document() | {"udp": self._udp is not None}
        page = json.dumps(document).encode("ascii") if head.wants_json else render_page(document)
        self._send(connection, render(
            200, page, "application/json" if head.wants_json else "text/html; charset=utf-8",
            headers=b"Vary: Accept\r\n", keep_alive=connection.keep_alive, with_body=connection.with_body))

    def _health(self, connection: Connection, _head: Head, _body: bytes) -> None:
        self._conclude(connection, self.relay.health)

    def _conclude(self, connection: Connection, outcome: Outcome) -> None:
        """Answer, wait, or leave the work to a thread: whatever the request has come to."""
        if isinstance(outcome, Reply):
            self._answer(connection, outcome)
        elif isinstance(outcome, Wait):
            self._park(connection, outcome)
        elif self._tasks.qsize() >= self.limits.max_queued:
            self._answer(connection, Refusal(BUSY, "Too many requests at once.", retry_s=2).reply())
        else:
            self._hand_over(connection, outcome)

    def _hand_over(self, connection: Connection, outcome: Outcome) -> None:
        connection.state, connection.deadline_s = WORKING, NEVER_S
        self._watch(connection, 0)
        self._tasks.put((connection, outcome))

    def _finish_tasks(self) -> None:
        """Take back from the threads what they have done."""
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(RECV_BYTES)
        while self._done:
            connection, outcome = self._done.popleft()
            if connection.state == WORKING:
                connection.state = READING
                self._attend(connection, functools.partial(RelayServer._finish, outcome=outcome))
        if self._waiting:
            self._wake_waiting()

    def _finish(self, connection: Connection, outcome: Outcome) -> None:
        self._conclude(connection, outcome)
        self._serve(connection)

    def _answer(self, connection: Connection, reply: Reply, headers: bytes = b"") -> None:
        self._send(connection, render_reply(reply, headers=headers, keep_alive=connection.keep_alive,
                                            with_body=connection.with_body))

    def _send(self, connection: Connection, payload: bytes) -> None:
        """Send a whole reply, now or as the client takes it."""
        connection.wait_until_s = 0.0
        connection.outgoing = memoryview(payload)
        connection.state, connection.deadline_s = WRITING, self._now_s + self.limits.request_timeout_s
        self._write(connection)

    def _write(self, connection: Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            sent = connection.socket.send(connection.outgoing)
            connection.outgoing = connection.outgoing[sent:]
        if not connection.outgoing:
            self._sent(connection)
        elif self._has_room_for(connection.outgoing):
            self._watch(connection, WRITE)
        else:
            self._close(connection)

    def _sent(self, connection: Connection) -> None:
        if connection in self._lingering:
            self._linger(connection)
        elif connection.keep_alive:
            timeout_s = self.limits.request_timeout_s if connection.incoming else self.limits.idle_timeout_s
            connection.state, connection.deadline_s = READING, self._now_s + timeout_s
        else:
            self._close(connection)

    def _write_on(self, connection: Connection) -> None:
        self._write(connection)
        self._serve(connection)

    # Long polls

    def _park(self, connection: Connection, wait: Wait) -> None:
        """Keep a long poll until one of its boxes gets a message, or answer it now."""
        connection.wait_until_s = connection.wait_until_s or self._now_s + wait.seconds
        places = self._places + len(wait.boxes)
        full = 0 < self.limits.max_waiting < places
        if full or self._stopping or connection.wait_until_s - TICK_S <= self._now_s:
            return self._answer(connection, wait.reply)
        # What came between the look and now would otherwise be seen only at the next check.
        connection.cursor_us, boxes = self.relay.arrivals(connection.cursor_us)
        if not boxes.isdisjoint(wait.boxes):
            return self._hand_over(connection, wait.again)
        connection.state, connection.wait = WAITING, wait
        connection.deadline_s = connection.wait_until_s - TICK_S
        self._places = places
        for box in wait.boxes:
            self._waiting.setdefault(box, set()).add(connection)
        self._watch(connection, READ)

    def _unpark(self, connection: Connection) -> Wait:
        wait, connection.wait = connection.wait, None
        assert wait is not None  # noqa: S101
        self._places -= len(wait.boxes)
        for box in wait.boxes:
            self._waiting[box].discard(connection)
            if not self._waiting[box]:
                del self._waiting[box]
        return wait

    def _wake_waiting(self) -> None:
        """Ask again for those whose boxes got messages, from whatever process."""
        self._cursor_us, boxes = self.relay.arrivals(self._cursor_us)
        for box in boxes:
            for connection in tuple(self._waiting.get(box, ())):
                connection.cursor_us = self._cursor_us
                self._hand_over(connection, self._unpark(connection).again)

    def _end_wait(self, connection: Connection) -> None:
        self._answer(connection, self._unpark(connection).reply)
        self._serve(connection)

    def _interrupt_wait(self, connection: Connection) -> None:
        """Let go of who hangs up; who sends the next request has waited enough."""
        chunk = connection.socket.recv(RECV_BYTES)
        if not chunk:
            return self._close(connection)
        connection.incoming += chunk
        self._end_wait(connection)

    # UDP

    def _answer_datagrams(self) -> None:
        assert self._udp is not None
        with contextlib.suppress(OSError):  # none left, or one that cannot be answered
            for _ in range(ACCEPT_BATCH):
                datagram, address = self._udp.recvfrom(MAX_DATAGRAM_BYTES)
                reply = answer_datagram(self.relay, datagram)
                if reply:
                    self._udp.sendto(reply, address)


_Step: TypeAlias = Callable[[RelayServer, Connection], None]
_Route: TypeAlias = Callable[[RelayServer, Connection, Head, bytes], None]


def _ignore(_server: RelayServer, _connection: Connection) -> None:
    """Do nothing: another event of the same turn was faster."""


# What to do with a connection, by its state: when its socket is ready, at its deadline.
_ON_READY: Mapping[int, _Step] = {
    READING: RelayServer._read, WORKING: _ignore, WAITING: RelayServer._interrupt_wait,
    WRITING: RelayServer._write_on, LINGERING: RelayServer._drop, CLOSED: _ignore,
}
_ON_DEADLINE: Mapping[int, _Step] = {
    READING: RelayServer._too_slow, WORKING: _ignore, WAITING: RelayServer._end_wait,
    WRITING: RelayServer._close, LINGERING: RelayServer._close, CLOSED: _ignore,
}
_ROUTES: Mapping[str, Mapping[str, _Route]] = {
    "/": {"GET": RelayServer._page, "HEAD": RelayServer._page, "POST": RelayServer._post},
    "/health": {"GET": RelayServer._health, "HEAD": RelayServer._health},
}


def _accept_ipv4(unbound: socket.socket) -> None:
    """Have an IPv6 socket on all interfaces take IPv4 as well."""
    if unbound.family == socket.AF_INET6:
        unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def _family_of(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0] if host else socket.AF_INET


# ---------------------------------------------------------------------------------------
# The command line: flags to limits, a server until a signal comes, words for people.
# ---------------------------------------------------------------------------------------

MAX_FLAG = 10**12  # of any number: its microseconds still fit SQLite's integers
SPARE_FILES = 64  # beside the connections: the database, the log, what is lingering


def _whole_number(minimum: int, maximum: int = MAX_FLAG) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {minimum} to {maximum}")
        return int(text)
    return convert


def flag_of(limit: str) -> str:
    """Return the flag of a field of Limits."""
    return "--" + limit.removesuffix("_s").replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line: README.md, "Flags"."""
    parser = argparse.ArgumentParser(
        prog="connectoid_relay.py", description="Keep small encrypted messages for an hour.",
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
    relay = Relay(SqliteStore(arguments.db, sync=arguments.sync), limits, log_ips=arguments.log_ips)
    try:
        raise_file_limit(limits.max_connections)
        with RelayServer((arguments.host, arguments.port), relay, udp=arguments.udp) as server:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.stop())
            host = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
            log.warning("connectoid relay %s listening on http://%s:%d", __version__, host, server.server_port)
            server.serve_forever()
    finally:
        relay.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 stopped, 1 failed; 2 (usage) exits."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        serve(arguments)
    except StoreError as error:
        log.error("connectoid relay: %s", error)
        return 1
    except OSError as error:
        log.error("connectoid relay: cannot listen on port %d: %s; choose another with --host or --port",
                  arguments.port, error.strerror)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
