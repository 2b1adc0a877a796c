"""Run the Connectoid relay: it keeps small encrypted messages for an hour.

A mailbox is a P-384 public key. Anybody may send to it; only the holder of the private
key can receive. PROTOCOL.md says what goes over the wire, docs/hosting.md how to run it:
`python connectoid_relay.py --port 8080`. To embed it:

    from connectoid_relay import Relay, RelayServer, SqliteStore

    relay = Relay(SqliteStore("connectoid.db"))
    status, reply = relay.handle({"action": "check", "pub": "..."}, "192.0.2.7")

    with RelayServer(("127.0.0.1", 8080), relay) as server:
        # Or in a thread, until server.shutdown().
        server.serve_forever()
    relay.close()
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["cryptography>=47"]
# ///

from __future__ import annotations

__version__ = "0.2.0"

# For programs that embed the relay. connectoid_admin.py and deploy/dynamodb, which come with it,
# also use constants and functions below: any name without an underscore.
__all__ = [
    "About", "Access", "Clock", "DatabaseFile", "Limits", "Look", "Message", "Networks", "NoRoom",
    "Quota", "Rate", "Refusal", "Relay", "RelayServer", "Reply", "SettingError", "SqliteStore",
    "Store", "StoreError", "StoreFull", "Stored", "Text", "Turn", "Wait", "load_tls", "main",
    "read_access", "read_turn", "source_of", "wsgi",
]

import argparse
import atexit
import base64
import binascii
import collections
import contextlib
import enum
import functools
import hashlib
import hmac
import html
import http.server
import importlib
import ipaddress
import itertools
import json
import logging
import os
import queue
import re
import secrets
import selectors
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NamedTuple,
    NoReturn,
    Protocol,
    TypeAlias,
    TypeGuard,
    TypeVar,
    get_type_hints,
)

try:
    from cryptography.hazmat.primitives import hpke
    from cryptography.hazmat.primitives.asymmetric import ec
except ImportError as error:
    # It may be there, and broken: the cause is told too.
    NEEDS = ("The relay needs the package cryptography 47 or newer: pip install 'cryptography>=47'"
             f" ({error})")
    if __name__ == "__main__":
        sys.exit(NEEDS)
    raise ImportError(NEEDS) from error

# What Windows has not. All else of this file is used there in tests, in memory.
LACKING = ""
try:
    import fcntl
    import resource
except ImportError as error:
    LACKING = (f"the relay needs Linux, macOS or another POSIX system ({error});"
               " on Windows, run it in WSL")

log = logging.getLogger("connectoid_relay")

# ---------------------------------------------------------------------------------------
# Limits. Every number that protects somebody. Those that a host may want to change are
# fields of Limits, and each of them is a flag (`message_ttl_s` is `--message-ttl`). What
# the protocol fixes (PROTOCOL.md, "Limits") and what only the relay cares for are constants.
# ---------------------------------------------------------------------------------------

# Of `data`: the largest sealed message is 22 KiB (PROTOCOL.md, "send").
MAX_DATA_CHARS = 32_768
# Of `ext`, in code points: room for a token, none for a file.
MAX_EXT_CHARS = 1_024
# Of arrays and objects in each other (PROTOCOL.md, "Conventions"): no request has more than two.
MAX_JSON_LEVELS = 100
# Of a body that is parsed between two turns of the loop: in 0.1 ms.
MAX_INLINE_BYTES = 4_096
# Checks in one request: an app with 50 contacts has up to 200 mailboxes.
MAX_BATCH_ITEMS = 256
# Messages in one reply.
MAX_RECEIVE_MESSAGES = 100
# Of `data` in one reply: what a phone takes at once.
MAX_RECEIVE_CHARS = 512 * 1024
# Of a long poll: shorter than the time-outs of most proxies.
MAX_WAIT_S = 60
# TURN servers that a relay names: one over UDP, TCP and TLS, and one to spare.
MAX_TURN_URLS = 4
# Of a TURN secret: whoever is given credentials can try guesses of it against them.
MIN_TURN_SECRET_BYTES = 16
# Of the name in them: 64 bits of a keyed hash.
TURN_NAME_BYTES = 8
# In the mode of a secret file: a service may read one through its group.
OTHERS_MAY_READ = stat.S_IROTH
# What SQLite can compare.
MAX_AT_US = 2**63 - 1

# Of randomness in an answer: 256 bits.
ANSWER_BYTES = 32
# Of the key under which sources are hashed for a day.
SOURCE_KEY_BYTES = 32
# One source holds at most 1/8 of a box, the /56 around it 1/4, the /48 1/2: it takes a crowd to
# fill it.
SOURCE_SHARE = 8
# A message gives way to a newer one of its own source after 1/6 of its time, where that has filled
# its part of a box: it has been there for ten minutes, and an offer is of no use after one or two.
OLD_PART = 6
# One source may spend 1/8 of what a key has that travels in links, the /56 around it 1/4, the /48
# 1/2: who reads one link must not spend what all contacts of its owner need.
SEND_KEY_SHARE = 8
# A small message costs this much in rows and indexes all the same.
MIN_COUNTED_BYTES = 512
# An IPv6 customer has a /64, a /56 or a /48 (RFC 6177): up to 65,536 sources. So what bounds a
# source bounds the networks around it too. A /56 may have twice as much as one source: a home
# with two busy networks is served, one with 256 of them gets no more.
TIMES_OF_56 = 2
# A /48 may have four times as much: four of them are needed for all places of long polls, and
# three for the public part of the storage, where one was enough.
TIMES_OF_48 = 4
# Sources and networks that a rate limit knows at once (20 MB); further ones share one count.
MAX_SOURCES = 100_000
# Boxes whose last check a sweep writes: across a network each takes milliseconds.
MAX_SEEN_WRITES = 200
# Boxes whose last check is not yet written; further ones wait for their next.
MAX_SEEN_BOXES = 10_000
# /health asks the store no more often than this.
PROBE_EVERY_US = 5_000_000
# After so long without a sweep /health says so.
SWEEPER_LATE_US = 60_000_000
# Of requests, shown as a picture.
TRAFFIC_MINUTES = 60
# Of any number that a host sets: its microseconds still fit SQLite's integers.
MAX_SETTING = 10**12

# Between sweeps: when there is nothing more to delete, when there is, and after a failure.
SWEEP_EVERY_S = 1.0
SWEEP_PAUSE_S = 0.001
SWEEP_RETRY_S = 5.0
# They do what waits for the disk or a seal; so many sends share a commit.
POOL_THREADS = 16
# Connections that the kernel holds for the relay; one too many tries again after a second.
LISTEN_BACKLOG = 4_096
# Connections taken at a time. After so many events of others it is their turn again.
ACCEPT_BATCH = 64
# Datagrams taken at a time: a few milliseconds, about as much as the connections may take.
DATAGRAM_BATCH = 256
# Linux: more follows soon, so that it can share a packet.
MSG_MORE = getattr(socket, "MSG_MORE", 0)
# Asked of the kernel: a client that does not read may else take 4 MB of it.
SEND_BUFFER_BYTES = 64 * 1024
# Read from a connection in one turn of the loop.
RECV_BYTES = 64 * 1024
# Given to OpenSSL in one turn of the loop: a few milliseconds at worst.
TLS_TURN_BYTES = 4 * 1024
# Of a record: RFC 8446, section 5.1.
TLS_RECORD_BYTES = 16 * 1024
# A TLS client may send so much beyond TLS_OVERHEAD times what it has to say. The overhead is
# that of records with 4 bytes of content.
TLS_SPARE_BYTES = 64 * 1024
TLS_OVERHEAD = 8
# How late a deadline may be noticed; waits end by so much early.
TICK_S = 0.25
# For what a refused client still sends.
LINGER_S = 2.0
LINGER_BYTES = 1024 * 1024
# Refused connections that are told why; more are just closed.
MAX_LINGERING = 256
# For requests that are under way when the relay is stopped.
DRAIN_S = 1.5

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
# 2026-11-23: a clock that shows less is wrong, and so is one that shows the year 2200.
RELEASE_US = 1_795_392_000 * SECOND_US
YEAR_2200_US = 7_258_118_400 * SECOND_US


class Meaning(NamedTuple):
    """What a limit bounds, with its unit and its reason, and the least that it may be."""

    text: str
    minimum: int = 0


class Limits(NamedTuple):
    """Hold the limits that a host may change; the command line has a flag for each."""

    rate: Annotated[int, Meaning(
        "requests per source and minute; 0 = every rate limit off")] = 600
    max_seals: Annotated[int, Meaning(
        "questions made per source and minute: each costs a P-384 seal", 1)] = 120
    max_sends: Annotated[int, Meaning(
        "messages per mailbox, source and minute", 1)] = 60
    max_source_bytes: Annotated[int, Meaning(
        "bytes of data sent per source and hour: one host cannot fill the relay", 1)] = 64 << 20
    max_turn: Annotated[int, Meaning(
        "TURN credentials given per mailbox and hour", 1)] = 12
    max_turn_per_source: Annotated[int, Meaning(
        "TURN credentials given per source and hour: mailboxes cost nothing", 1)] = 240
    turn_ttl_s: Annotated[int, Meaning(
        "seconds that TURN credentials are good for", 1)] = 3_600
    max_udp: Annotated[int, Meaning(
        "UDP datagrams per second, from all together", 1)] = 10_000
    max_body_bytes: Annotated[int, Meaning(
        "bytes of a request's body: a batch of 256 checks", 1)] = 128 << 10
    max_header_bytes: Annotated[int, Meaning(
        "bytes of a request's line and headers", 64)] = 16 << 10
    request_timeout_s: Annotated[int, Meaning(
        "seconds for a whole request to arrive", 1)] = 10
    idle_timeout_s: Annotated[int, Meaning(
        "seconds that a connection may stay idle, or take to read a reply", 1)] = 75
    max_connections: Annotated[int, Meaning(
        "open connections; 0 = no limit")] = 10_000
    max_connections_per_source: Annotated[int, Meaning(
        "open connections of one source; 0 = no limit")] = 256
    max_waiting: Annotated[int, Meaning(
        "mailboxes waited for in long polls; 0 = no limit")] = 10_000
    max_waiting_per_source: Annotated[int, Meaning(
        "mailboxes waited for by one source: a minute of its requests; 0 = no limit")] = 640
    max_queued: Annotated[int, Meaning(
        "requests in the queue for a thread: half a second of work", 1)] = 512
    max_buffered_bytes: Annotated[int, Meaning(
        "bytes of unread requests and unsent replies", 1)] = 64 << 20
    max_box_messages: Annotated[int, Meaning(
        "messages in a mailbox", 1)] = 256
    max_box_bytes: Annotated[int, Meaning(
        "bytes of data in a mailbox", 1)] = 8 << 20
    max_bytes: Annotated[int, Meaning(
        "bytes of data in all; a third is kept for proven mailboxes", 1)] = 1 << 30
    max_boxes: Annotated[int, Meaning(
        "mailboxes with a proven owner: 250 MB of disk")] = 2_000_000
    message_ttl_s: Annotated[int, Meaning(
        "seconds that a message is kept", 1)] = 3_600
    question_ttl_s: Annotated[int, Meaning(
        "seconds that a question is good for", 2)] = 60
    box_ttl_s: Annotated[int, Meaning(
        "seconds that a proven mailbox is kept after its last check", 1)] = 30 * 86_400


def meanings() -> dict[str, Meaning]:
    """Return the meaning of each limit by its name, in the order of Limits."""
    hints = get_type_hints(Limits, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


class Quota(NamedTuple):
    """What the holder of an API key may have; 0 is what the limits say.

    `name` is that of its table in the key file; "" is counted nowhere. `bytes` are of data kept
    at a time. `in_links` says that strangers have the key: one source gets 1/SEND_KEY_SHARE.
    docs/hosting.md, "API keys", has more.
    """

    name: str = ""
    requests_per_day: int = 0
    bytes: int = 0
    message_ttl_s: int = 0
    in_links: bool = False


EVERYTHING = Quota()

# ---------------------------------------------------------------------------------------
# Errors. ERRORS is the table of PROTOCOL.md. A Refusal may be raised anywhere below; it
# becomes a reply in two places: Relay.refuse for a request, Connection.converse for
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
ERRORS = (
    BAD_REQUEST, FORBIDDEN, WRONG_ANSWER, NOT_FOUND, NOT_ALLOWED, TOO_SLOW, TOO_BIG, TOO_OFTEN,
    HEADERS_TOO_BIG, BUSY, FULL,
)


class Refusal(Exception):
    """Refuse a request: the error, a sentence for people, seconds after which to ask again."""

    def __init__(self, error: Error, detail: str = "", retry_s: int = 0) -> None:
        super().__init__(error.text)
        self.error = error
        self.detail = detail
        self.retry_s = retry_s

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
    """Raise ValueError: NaN and Infinity are not JSON."""
    raise ValueError(name)


# RFC 8259, section 2.
JSON_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NO_BRACKETS = bytes(octet for octet in range(256) if octet not in b"[]{}")
_NO_MARKS = bytes(octet for octet in _NO_BRACKETS if octet not in b'"\\')
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def is_deep(body: bytes) -> bool:
    """Return whether JSON has more than MAX_JSON_LEVELS, in one look from one end to the other.

    A parser follows each level on the stack, and a thread may have little of it: a look comes
    before.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_LEVELS:
        return False
    # Most strings have none of the marks: then nothing but their two quotes is left of them.
    marks = body.translate(None, _NO_MARKS).replace(b'""', b"")
    if b'"' in marks or b"\\" in marks:
        marks = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    levels = itertools.accumulate(map(_STEPS.__getitem__, marks))
    return max(levels, default=0) > MAX_JSON_LEVELS


def parse_json(body: bytes) -> object:
    """Return the JSON value of a body; raise Refusal (Bad request) if there is none."""
    if is_deep(body):
        raise Refusal(BAD_REQUEST, f"The body has over {MAX_JSON_LEVELS} levels of nesting.")
    try:
        text = body.decode("utf-8").strip(JSON_SPACE)
        request: object
        request, end = _DECODER.raw_decode(text)
        if end < len(text):
            raise ValueError("more than one value")
        if _SURROGATE_ESCAPE.search(body):
            _refuse_lone_surrogates(text)
    except ValueError:
        raise Refusal(BAD_REQUEST, "The body is not JSON in UTF-8.") from None
    return request


def _refuse_lone_surrogates(text: str) -> None:
    """Raise ValueError for half a character, which UTF-8 cannot hold.

    An escape is the only way to one. The pairs keep also what another member of the name replaces.
    """
    everything = json.loads(text, object_pairs_hook=list)
    json.dumps(everything, ensure_ascii=False).encode("utf-8")


def encode_base64url(octets: bytes) -> str:
    """Return RFC 4648 base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


_FROM_URLSAFE = bytes.maketrans(b"-_", b"+/")


def decode_pub(pub: str) -> bytes:
    """Return the 49 bytes of a `pub` of the right form.

    It does what base64.urlsafe_b64decode does, in half the time.
    """
    return binascii.a2b_base64(pub.encode("ascii").translate(_FROM_URLSAFE) + b"==")


# 49 bytes that begin with 2 or 3, in 66 characters whose last 4 bits are zero.
_PUB = re.compile(r"A[g-z0-9_-][A-Za-z0-9_-]{63}[AQgw]")
_DATA = re.compile(r"(?:[A-Za-z0-9_-]{4})*[A-Za-z0-9_-]{2,4}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,16}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _is_pub(value: object) -> bool:
    return isinstance(value, str) and _PUB.fullmatch(value) is not None


def _is_data(value: object) -> bool:
    return isinstance(value, str) and _DATA.fullmatch(value) is not None


def _is_id(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _is_ext(value: object) -> bool:
    return value is None or (_is_text(value) and len(value) <= MAX_EXT_CHARS)


def _is_integer(value: object) -> TypeGuard[int]:
    """Return whether it is one in JSON: to Python a boolean is an int; 1.0 is none."""
    return type(value) is int


def _is_count(value: object) -> bool:
    return _is_integer(value) and value >= 0


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def _is_limit(value: object) -> bool:
    return _is_integer(value) and 1 <= value <= MAX_RECEIVE_MESSAGES


class Form(NamedTuple):
    """What a member must be: a test, and how to say it to people."""

    fits: Callable[[object], bool]
    words: str


FORMS: Mapping[str, Form] = {
    "pub": Form(_is_pub, "a compressed P-384 point in 66 characters of base64url"),
    "ext": Form(_is_ext, f"null or a string of at most {MAX_EXT_CHARS} characters"),
    "data": Form(_is_data, "base64url without padding, at least 2 characters"),
    "answer": Form(_is_text, "a string"),
    "at": Form(_is_count, "an integer, at least 0"),
    "wait": Form(_is_count, "an integer, at least 0"),
    "limit": Form(_is_limit, f"an integer from 1 to {MAX_RECEIVE_MESSAGES}"),
    "prove": Form(_is_boolean, "true or false"),
    "turn": Form(_is_boolean, "true or false"),
    "id": Form(_is_id, "1 to 16 of A-Z a-z 0-9 - _"),
}


def read(request: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return a member of a request, or the default.

    Raises Refusal (Bad request) for a wrong form.
    """
    value = request.get(name, default)
    fits, words = FORMS[name]
    if not fits(value):
        raise Refusal(BAD_REQUEST, f"{name} must be {words}.")
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


# By their addresses: a client sends several requests in a row.
MAX_REMEMBERED_SOURCES = 1_024
# Of an IPv6 address: what one customer gets at least.
SOURCE_PREFIX_BITS = 64
# The end of such a source, and what its networks have in common with it: "2001:0db8:0001:00".
IPV6_SOURCE_END = "::/64"
CHARS_OF_56 = 17
CHARS_OF_48 = 14
# ::ffff:0:0/96
IPV4_MAPPED = bytes(10) + b"\xff\xff"
IPV4_MAPPED_BITS = 8 * len(IPV4_MAPPED)


@functools.lru_cache(MAX_REMEMBERED_SOURCES)
def source_of(address: str) -> str:
    """Return the source of an address: itself, the IPv4 address inside it, or its IPv6 /64."""
    if ":" not in address:
        return address
    try:
        octets = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        return address
    if octets.startswith(IPV4_MAPPED):
        return socket.inet_ntoa(octets[len(IPV4_MAPPED):])
    return octets[:8].hex(":", 2) + IPV6_SOURCE_END


class Wider(NamedTuple):
    """A network around a source, or what counts for it, and how many times as much it may have."""

    key: Hashable
    times: int


@functools.lru_cache(MAX_REMEMBERED_SOURCES)
def networks_of(source: str) -> tuple[Wider, ...]:
    """Return the networks around a source that one customer may have: none around IPv4."""
    if not source.endswith(IPV6_SOURCE_END):
        return ()
    return (
        Wider(source[:CHARS_OF_56] + "00::/56", TIMES_OF_56),
        Wider(source[:CHARS_OF_48] + "::/48", TIMES_OF_48),
    )


def customer_of(source: str) -> Hashable:
    """Return what takes turns with others: the /48 around an IPv6 source, or the source itself."""
    *_, widest = (Wider(source, 1), *networks_of(source))
    return widest.key


Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Networks:
    """A set of IP networks: `address in networks`, also for a source; no address is in none.

    Made of texts like 192.0.2.0/24 or of ipaddress's networks; raises ValueError for anything else.
    """

    def __init__(self, networks: Iterable[str | Network] = ()) -> None:
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
        for (version, shift), prefixes in self._prefixes.items():
            if version == plain.version and int(plain) >> shift in prefixes:
                return True
        return False


NO_NETWORKS = Networks()


def client_of(peer: str, forwarded_for: str, proxies: Networks) -> str:
    """Return the source of a request from a peer.

    Behind trusted proxies that is the last address that is none of theirs. Each proxy appends
    the address that it sees to X-Forwarded-For; what stands before the first stranger from the
    right was written by that stranger.
    """
    address = peer
    for hop in reversed(forwarded_for.split(",")):
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

# 2 MB. Whoever is sent something asks for it soon, and decompression is 6 % of a seal.
MAX_REMEMBERED_KEYS = 1_024
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
    key = read_public_key(box)
    sealed = _SUITE.encrypt(answer.encode("ascii"), key, info=CONTEXTS["question"])
    return encode_base64url(sealed)


def hash_answer(answer: str) -> bytes:
    """Return what the store keeps of an answer: enough to compare, useless to a thief."""
    return hashlib.sha256(answer.encode("utf-8")).digest()


# ---------------------------------------------------------------------------------------
# The store: what is kept, and nothing of the protocol. Every method takes the caller's
# time in microseconds. A write raises the store's own time to it, and uses whichever is
# larger; Relay.sweep has the caller catch up. A store raises StoreError and nothing else.
#
# From here down to SqliteStore: the interface, the SQL, the database file with its locks,
# the writes (one record each), the group commit that runs them, and the store itself.
#
# A read takes an idle connection and no lock. A write is a record in a queue; its thread
# takes the lock of the threads, then the lock of the processes (the file `-lock`), always
# in this order, and commits a batch of the queue in one transaction. Both locks are held
# for milliseconds.
# ---------------------------------------------------------------------------------------


class StoreError(Exception):
    """Say that the store cannot do this now, or cannot be opened; nothing has changed."""


class StoreFull(StoreError):
    """Say that the disk is full."""


class NoRoom(StoreError):
    """Say that a message would go over a limit: of its "source", "box", "quota" or the "relay"."""

    def __init__(self, whose: str, until_us: int = 0) -> None:
        super().__init__(f"no room: {whose}")
        self.whose = whose
        self.until_us = until_us


class Message(NamedTuple):
    """A message on its way in: source is a keyed hash of the sender's address and its networks.

    Its 16 bytes begin like those of other sources in the /48 (HASH_BYTES_OF_48) and in the /56.
    """

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
    """What the store holds, expired or not as long as it is not swept.

    `bytes` is of data, a small message counted as MIN_COUNTED_BYTES. `boxes` are those with a
    proven owner.
    """

    messages: int
    bytes: int
    boxes: int


class Store(Protocol):
    """Keep messages, questions, boxes and time.

    SqliteStore is one such store; test_relay.py has the contract.
    """

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Have this thread's reads in a `with` see one state, if that makes many looks cheaper."""

    def time_us(self) -> int:
        """Return the store's time as it was last raised."""

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`, larger than any before; raise NoRoom."""

    def look(self, box: bytes, at_us: int, now_us: int) -> Look:
        """Return whether the box has a message newer than `at`, and its row's expiry."""

    def messages(self, box: bytes, at_us: int, limit: int, now_us: int) -> list[tuple[int, str]]:
        """Return (at, data) newer than `at`, oldest first.

        Up to `limit` of them and up to 512 KiB, but at least one.
        """

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""

    def put_question(
            self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep (question, hash of answer) unless half the time of another is left.

        Return the question that now counts.
        """

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now, at most two."""

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for.

        `soon` is for what may be lost. Any later write finds it done; a read may have to wait
        for the next sweep.
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


# "Conn" in the file's header: another program's file is left alone.
APPLICATION_ID = 0x436F6E6E
# The default of SQLite.
PAGE_BYTES = 4_096

_FIRST_SCHEMA = (
    """CREATE TABLE relay (id INTEGER PRIMARY KEY CHECK (id = 1), time_us INTEGER NOT NULL,
       last_at INTEGER NOT NULL, bytes INTEGER NOT NULL, boxes INTEGER NOT NULL) STRICT""",
    "INSERT INTO relay VALUES (1, 0, 0, 0, 0)",
    """CREATE TABLE messages (at INTEGER PRIMARY KEY, box BLOB NOT NULL, \
expires_us INTEGER NOT NULL,
       source BLOB NOT NULL, size INTEGER NOT NULL, data TEXT NOT NULL) STRICT""",
    # All that a check and a send ask of a box stands in this index; `data` is not touched.
    "CREATE INDEX messages_box ON messages (box, at, expires_us, source, size)",
    "CREATE INDEX messages_expires ON messages (expires_us)",
    """CREATE TABLE challenges (box BLOB NOT NULL, made_us INTEGER NOT NULL, question TEXT NOT NULL,
       answer_sha256 BLOB NOT NULL, expires_us INTEGER NOT NULL,
       PRIMARY KEY (box, made_us)) STRICT, WITHOUT ROWID""",
    "CREATE INDEX challenges_expires ON challenges (expires_us)",
    """CREATE TABLE boxes (box BLOB PRIMARY KEY, expires_us INTEGER NOT NULL) \
STRICT, WITHOUT ROWID""",
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

# `now_us` is the time of the reader (of the relay, in a write).
LOOK = """
    SELECT EXISTS (SELECT 1 FROM messages
                   WHERE box = :box AND at > :at_us AND expires_us > :now_us),
        (SELECT expires_us FROM boxes WHERE box = :box AND expires_us > :now_us)"""
MESSAGES = """
    SELECT messages.at, messages.data FROM messages JOIN
        (SELECT at, size, sum(size) OVER (ORDER BY at) AS total FROM messages
         WHERE box = :box AND at > :at_us AND expires_us > :now_us ORDER BY at LIMIT :limit) AS page
    ON page.at = messages.at
    WHERE page.total <= :max_chars OR page.total = page.size
    ORDER BY messages.at"""
ARRIVALS = "SELECT at, box FROM messages WHERE at > :after_us ORDER BY at"
QUESTION = """
    SELECT question FROM challenges
    WHERE box = :box AND made_us > :made_after_us AND expires_us > :now_us
    ORDER BY made_us DESC LIMIT 1"""
ANSWERS = "SELECT answer_sha256 FROM challenges WHERE box = :box AND expires_us > :now_us"
# How many messages and bytes there are in a box, and whether it has a proven owner.
BOX_CONTENT = """
    SELECT count(*), coalesce(sum(size), 0),
        EXISTS (SELECT 1 FROM boxes WHERE box = :box AND expires_us > :now_us)
    FROM messages WHERE box = :box AND expires_us > :now_us"""
# The members of Held.
HELD = """
    SELECT at, expires_us, size, source FROM messages WHERE box = :box AND expires_us > :now_us
    ORDER BY at"""
DROP_MESSAGE = "DELETE FROM messages WHERE at = ? RETURNING size, quota"
ADD_MESSAGE = """
    INSERT INTO messages (at, box, expires_us, source, size, data, quota)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""
ADD_QUESTION = """
    INSERT OR REPLACE INTO challenges (box, made_us, question, answer_sha256, expires_us)
    VALUES (?, ?, ?, ?, ?)"""
ADD_BOX = "INSERT OR IGNORE INTO boxes (box, expires_us) VALUES (?, ?)"
KEEP_BOX = "UPDATE boxes SET expires_us = max(expires_us, :expires_us) WHERE box = :box"
QUOTA_BYTES = "SELECT bytes FROM quotas WHERE name = ?"
ADD_QUOTA_BYTES = """
    INSERT INTO quotas (name, bytes, day, requests) VALUES (?, ?, 0, 0)
    ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes"""
ADD_QUOTA_REQUESTS = """
    INSERT INTO quotas (name, bytes, day, requests) VALUES (?, 0, ?, ?)
    ON CONFLICT DO UPDATE SET
        requests = excluded.requests + iif(day = excluded.day, requests, 0), day = excluded.day"""
QUOTA_REQUESTS = "SELECT name, requests FROM quotas WHERE day = :day"
EXPIRED = """
    SELECT EXISTS (SELECT 1 FROM messages WHERE expires_us <= :now_us)
        OR EXISTS (SELECT 1 FROM challenges WHERE expires_us <= :now_us)
        OR EXISTS (SELECT 1 FROM boxes WHERE expires_us <= :now_us)"""
SWEEP_MESSAGES = """
    DELETE FROM messages WHERE at IN
        (SELECT at FROM messages WHERE expires_us <= :now_us ORDER BY expires_us LIMIT :limit)
    RETURNING size, quota"""
SWEEP_QUESTIONS = """
    DELETE FROM challenges WHERE (box, made_us) IN
        (SELECT box, made_us FROM challenges
         WHERE expires_us <= :now_us ORDER BY expires_us LIMIT :limit)"""
SWEEP_BOXES = """
    DELETE FROM boxes WHERE box IN
        (SELECT box FROM boxes
         WHERE expires_us <= :now_us ORDER BY expires_us LIMIT :limit)"""
READ_RELAY = "SELECT time_us, last_at, bytes, boxes, messages FROM relay"
WRITE_RELAY = """
    UPDATE relay SET time_us = :time_us, last_at = :last_at, bytes = :bytes, boxes = :boxes,
        messages = :messages"""
WRITE_TIME = "UPDATE relay SET time_us = ?"
# Fails if the file cannot be written; finds no row if no clock of a relay wrote the one there.
CHECK_RELAY = "UPDATE relay SET time_us = time_us WHERE max(time_us, last_at) < ?"

# STRICT came with it.
MIN_SQLITE = (3, 37, 0)
# Writes in one transaction: 1 MiB of messages, a few milliseconds.
COMMIT_BATCH = 32
# Rows of a table deleted in one transaction: half a MiB, which fits a small reserve.
SWEEP_ROWS = 16
# Kept back on the disk: room for questions and sweeps when it is full, and half for the WAL.
RESERVE_BYTES = 16 << 20
# After a deletion or a full disk, the WAL is emptied no more often than this, to spare the disk.
CHECKPOINT_EVERY_US = 5 * SECOND_US
# For a reader that is in the way of a checkpoint; all writers wait with us.
BUSY_TIMEOUT_S = 0.02
# For another process, which holds the file for milliseconds if it is well.
LOCK_TIMEOUT_S = 2.0
LOCK_RETRY_S = 0.002

# What an error of SQLite means to the people who run the relay.
_MEANINGS = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database; choose another file with --db",
    sqlite3.SQLITE_CORRUPT: "is damaged; stop the relay, move the file away and start again",
    sqlite3.SQLITE_READONLY: "cannot be written; mend its rights or choose another file with --db",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; choose another file with --db",
    sqlite3.SQLITE_BUSY: "is held by another program",
}
_FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


class FileLock:
    """Keep out other processes: one at a time commits, or makes a checkpoint.

    The lock is a file `-lock` beside the database. SQLite has locks of its own, but before
    3.51.3 it can lose a commit to a checkpoint of another connection (sqlite.org/wal.html,
    "WAL-reset bug"), so both happen under this one. Until it is opened, and in memory it never
    is, the lock keeps nobody out. `with` raises StoreError if another process does not let go.
    """

    def __init__(self, database: str) -> None:
        self._database = database
        self._file = -1

    def open(self) -> int:
        """Open the lock file, made if it is missing; return its descriptor; raise OSError."""
        # As SQLite does for its own files, follow no link that stands where ours should.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(self._database + "-lock", flags, 0o600)
        return self._file

    def close(self) -> None:
        """Close the lock file, and with it drop the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> None:
        if self._file < 0 or self._take():
            return
        give_up_s = time.monotonic() + LOCK_TIMEOUT_S
        while not self._take():
            if time.monotonic() > give_up_s:
                raise StoreError(f"{self._database} is held by another process")
            time.sleep(LOCK_RETRY_S)

    def _take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def check_sqlite(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> None:
    """Raise StoreError if SQLite is older than MIN_SQLITE."""
    if version < MIN_SQLITE:
        here, least = (".".join(map(str, numbers)) for numbers in (version, MIN_SQLITE))
        raise StoreError(f"Python has SQLite {here} here, and the relay needs {least} or newer;"
                         " choose a Python that has it")


class Room(enum.Enum):
    """Say for whose writes the disk has room."""

    # The reserve is kept back: for messages too.
    FOR_ALL = "for all"
    # The reserve is open, or could not be kept: messages are refused until it is back.
    FOR_OWNERS = "for owners"


def checkpoint(db: sqlite3.Connection) -> bool:
    """Move the WAL into the file and empty it; return False while a reader needs it.

    The caller holds the lock of the file.
    """
    busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


class DatabaseFile:
    """Hold a relay's SQLite file in WAL mode, or ":memory:", and all that stands beside it.

    These are the lock (`-lock`), the WAL (`-wal`) and a reserve of disk (`-reserve`). `db` is the
    connection that writes. A thread holds `thread_lock` while it uses `db`, and `exclusive()`
    inside it while it commits or makes a checkpoint. `connect` makes connections in place of
    sqlite3.connect. Every method raises StoreError and nothing else.
    """

    db: sqlite3.Connection

    def __init__(self, path: str, *,
                 connect: Callable[..., sqlite3.Connection] = sqlite3.connect) -> None:
        # SQLite puts its files beside the file itself, so the lock belongs there too.
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self.in_memory = path == ":memory:"
        self.room = Room.FOR_ALL
        self.lock = FileLock(self.path)
        self.thread_lock = threading.Lock()
        self.closed = False
        self._connect = connect
        self._idle_readers: list[sqlite3.Connection] = []
        self._reserve = Path(self.path + "-reserve")
        self._reserve_bytes = 0
        # When the WAL must be emptied, if anything deleted is still in it: at first it may be.
        self._wal_due_us: int | None = 0

    # Opening and closing

    def open(self) -> None:
        """Open the file, made if it is missing, and bring its schema up to date."""
        check_sqlite()
        try:
            self._open()
        except StoreFull:
            # Others have filled the disk while the relay was away.
            self.open_reserve()
            self._open()

    def _open(self) -> None:
        if not self.in_memory:
            self._open_lock()
        try:
            with self.exclusive():
                self._open_db()
        except BaseException:
            self.lock.close()
            raise

    def _open_db(self) -> None:
        with contextlib.ExitStack() as undo:
            self.db = self.connect()
            undo.callback(self.db.close)
            self._bring_up_to_date()
            self._size_reserve()
            self.keep_reserve()
            undo.pop_all()

    def _open_lock(self) -> None:
        """Open the lock, and before it a new file, for our eyes only, or look at the old one."""
        if LACKING:
            raise StoreError(LACKING)
        try:
            if os.path.exists(self.path):
                self.look_before_opening()
            else:
                # Only a new file: to close an old one would drop SQLite's locks in this process.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self.lock.open()
        except OSError as error:
            reason = f"{self.path}: {error.strerror}; choose another file with --db"
            raise StoreError(reason) from None

    def look_before_opening(self) -> None:
        """Refuse the file of another program while it is as that program left it, WAL and all."""
        uri = Path(self.path).absolute().as_uri() + "?immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
                self.check_owner(db)
        except sqlite3.Error as error:
            # Without its WAL a file whose checkpoint was cut off looks damaged. Opening it tells.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR):
                raise self.explain(error) from error

    def check_owner(self, db: sqlite3.Connection) -> int:
        """Return the version of the schema, 0 for an empty file.

        Raises StoreError for a file that is another program's, or a newer relay's.
        """
        (owner,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if (owner, version, tables) == (0, 0, 0):
            return 0
        if owner != APPLICATION_ID:
            raise StoreError(f"{self.path} belongs to another program;"
                             " choose another file with --db")
        if not 1 <= version <= len(SCHEMA):
            raise StoreError(f"{self.path} has schema {version}, and this program knows"
                             f" {len(SCHEMA)}; install a newer one, or choose another file"
                             " with --db")
        return int(version)

    def connect(self) -> sqlite3.Connection:
        """Return a new connection; any thread may use it, one at a time."""
        if self.closed:
            raise StoreError(f"{self.path} is closed")
        db = self._connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA secure_delete = ON")
        # On macOS a plain sync leaves the cache of the disk to a power loss.
        db.execute("PRAGMA fullfsync = ON")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        return db

    def _bring_up_to_date(self) -> None:
        missing = SCHEMA[self.check_owner(self.db):]
        if missing:
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("BEGIN IMMEDIATE")
            for sql in itertools.chain(*missing):
                self.db.execute(sql)
            self.db.execute(f"PRAGMA user_version = {len(SCHEMA)}")
            self.db.execute("COMMIT")
        if self.db.execute(CHECK_RELAY, (YEAR_2200_US,)).rowcount != 1:
            raise self.damaged()

    def close(self) -> None:
        """Move everything from the WAL into the file and let go of both."""
        # A reader that is at work closes itself when it is done.
        self.closed = True
        with self.thread_lock:
            with contextlib.suppress(StoreError), self.exclusive():
                try:
                    checkpoint(self.db)
                finally:
                    # The last connection to be closed makes a checkpoint by itself.
                    self._close_idle_readers()
                    self.db.close()
            self.lock.close()

    # Errors and locks

    def explain(self, error: sqlite3.Error) -> StoreError:
        """Return an error of SQLite as one of ours, with its meaning."""
        # Python's own errors have no code.
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _FULL_CODES:
            return StoreFull(f"{self.path}: the disk is full ({error})")
        meaning = _MEANINGS.get(code & 0xFF, "cannot be used")
        return StoreError(f"{self.path} {meaning} ({error})")

    def damaged(self) -> StoreError:
        """Return the error for a file that SQLite can read, but that no relay left like this."""
        return StoreError(f"{self.path} {_MEANINGS[sqlite3.SQLITE_CORRUPT]} (no relay time)")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep out the writers and checkpoints of other processes within a `with`.

        It is not to be nested. Raises StoreError also for what SQLite raises inside.
        """
        with self.lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self.explain(error) from error

    # Readers

    def take_reader(self) -> sqlite3.Connection:
        """Return a connection to read with; give it back with return_reader."""
        try:
            return self._idle_readers.pop()
        except IndexError:
            return self.connect()

    def return_reader(self, db: sqlite3.Connection) -> None:
        """Have a connection ready for the next reader."""
        self._idle_readers.append(db)
        if self.closed:
            self._close_idle_readers()

    def _close_idle_readers(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle_readers.pop().close()

    # The WAL, and room on the disk

    def empty_wal(self) -> None:
        """Have deletions gone from the WAL, if that can be done now."""
        with contextlib.suppress(StoreError), self.thread_lock, self.exclusive():
            if checkpoint(self.db):
                self._wal_due_us = None

    def shorten_wal(self) -> None:
        """Keep the WAL so short that the reserve has room for all that is in it.

        The caller holds the thread lock. What cannot be done now is tried after the next commit.
        """
        if self.in_memory:
            return
        with contextlib.suppress(OSError, StoreError):
            if os.stat(self.path + "-wal").st_size > self._reserve_bytes // 2:
                with self.exclusive():
                    checkpoint(self.db)

    def tidy(self, now_us: int, *, deleted: bool) -> None:
        """Have what was deleted gone from the WAL, and the reserve back, within a few seconds."""
        if self._wal_due_us is None and (deleted or self.room is Room.FOR_OWNERS):
            self._wal_due_us = now_us + CHECKPOINT_EVERY_US
        if self._wal_due_us is not None and self._wal_due_us <= now_us:
            self.empty_wal()
            self.keep_reserve()

    def _size_reserve(self) -> None:
        """Choose how much of the disk to keep back, and hold the file to the process's limit."""
        if self.in_memory:
            return
        disk = os.statvfs(self.path)
        room = disk.f_bavail * disk.f_frsize
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY:
            # What is in the WAL must fit the file as well.
            self.db.execute(f"PRAGMA max_page_count = {limit // PAGE_BYTES}")
            room = min(room, limit)
        self._reserve_bytes = min(RESERVE_BYTES, room // 4)

    def keep_reserve(self) -> None:
        """Take room that nobody else can use, and say in `room` whether there was any."""
        try:
            if self._reserve_bytes and self._reserve_size() != self._reserve_bytes:
                self._reserve.touch(0o600)
                self._reserve.write_bytes(bytes(self._reserve_bytes))
        except OSError:
            self.open_reserve()
        else:
            self.room = Room.FOR_ALL

    def _reserve_size(self) -> int:
        try:
            return self._reserve.stat().st_size
        except FileNotFoundError:
            return 0

    def open_reserve(self) -> None:
        """Give the reserve to the owners: messages are refused from now on until it is back."""
        self.room = Room.FOR_OWNERS
        with contextlib.suppress(OSError):
            self._reserve.unlink(missing_ok=True)


class RelayRow:
    """The row of the table `relay` within a transaction: writes change it, the commit saves it."""

    def __init__(self, time_us: int, last_at: int, size: int, boxes: int, messages: int) -> None:
        self.time_us = time_us
        self.last_at = last_at
        self.bytes = size
        self.boxes = boxes
        self.messages = messages


def counted_bytes(size: int) -> int:
    """Return how much a message of this size counts against the relay's bytes."""
    return max(size, MIN_COUNTED_BYTES)


# Room in a box. A source may fill an eighth of it, the networks around it more. When the box
# is full all the same, a source that holds nothing there still gets one message in, and the
# largest holder pays for it: else eight addresses would keep everybody out of an invitation.
#
# What an attacker gains. He can push out messages of whoever holds more than he does, one with
# each address of his. So the owner of a large customer's network, or of an address with a single
# message, loses nothing: a network that holds one message never gives way, and among equals the
# newcomer does. With 256 networks of his own he can still fill a box with one message of each.
#
# Why the oldest. An owner who is online has read it already, a newer one of the same sender
# mostly replaces it, and it would be the first to expire.
#
# A source that has filled its part makes room itself: its own oldest give way once they are old.
# Two apps that are started anew for each use need three messages for it. Without this they would
# be refused at the eleventh use in an hour.

# Of the hash of a source: how much of it the sources in a /48 and a /56 share.
HASH_BYTES_OF_48 = 8
HASH_BYTES_OF_56 = 12
HASH_BYTES_OF_SOURCE = 16


class Held(NamedTuple):
    """What a store knows of a message in a box without its data."""

    at: int
    expires_us: int
    size: int
    source: bytes

    @property
    def old_us(self) -> int:
        """Return when it is old enough to give way to a newer one of its own source."""
        return self.at + (self.expires_us - self.at) // OLD_PART


class Part(NamedTuple):
    """Which part of a box those may fill whose hashes begin with as many equal bytes."""

    hash_bytes: int
    divisor: int

    def is_over(self, near: Sequence[Held], size: int, limits: Limits) -> bool:
        """Return whether one more message of this size would be too much beside these."""
        if len(near) >= max(1, limits.max_box_messages // self.divisor):
            return True
        # Whatever its size, anybody may hold one.
        is_first = not near and self.divisor > 1
        total = sum(held.size for held in near) + size
        return total > limits.max_box_bytes // self.divisor and not is_first

    def weight_of(self, near: Sequence[Held], size: int, limits: Limits) -> int:
        """Return what a message of this size weighs: BY_NUMBER where messages are too many."""
        if len(near) >= max(1, limits.max_box_messages // self.divisor):
            return BY_NUMBER
        return size


PARTS = (
    Part(HASH_BYTES_OF_SOURCE, SOURCE_SHARE),
    Part(HASH_BYTES_OF_56, SOURCE_SHARE // TIMES_OF_56),
    Part(HASH_BYTES_OF_48, SOURCE_SHARE // TIMES_OF_48),
    # The whole box.
    Part(0, 1),
)
# Of a message, where it is their number that is short. Every `data` has more characters.
BY_NUMBER = 1
# From the widest network to the source, as the largest holder is looked for.
HOLDERS = (HASH_BYTES_OF_48, HASH_BYTES_OF_56, HASH_BYTES_OF_SOURCE)


def make_room(
        box: Sequence[Held], source: bytes, size: int, limits: Limits, now_us: int) -> list[Held]:
    """Return what has to give way in a box, mostly nothing, for a message of a source.

    The box is in the order of `at`. Raises NoRoom.
    """
    dropped: list[Held] = []
    around = _around(box, source)
    own = list(around[0])
    is_newcomer = not own
    for part, in_part in zip(PARTS, around, strict=True):
        near = [held for held in in_part if held not in dropped]
        while part.is_over(near, size, limits):
            given = None
            if is_newcomer:
                given = find_largest(near, source, part.weight_of(near, size, limits))
            elif own and own[0].old_us <= now_us:
                given = own.pop(0)
            if given is None:
                raise NoRoom("source" if part.hash_bytes else "box", _room_us(in_part, own))
            near.remove(given)
            dropped.append(given)
    return dropped


def _room_us(in_part: Sequence[Held], own: Sequence[Held]) -> int:
    """Return when there may be room: as one expires, or one of the source's own is old."""
    return min([held.expires_us for held in in_part] + [held.old_us for held in own], default=0)


def _around(box: Sequence[Held], source: bytes) -> list[Sequence[Held]]:
    """Return what is in each of the PARTS: of the source, of its /56, of its /48, and all."""
    around = [box]
    for part in reversed(PARTS[:-1]):
        start = source[:part.hash_bytes]
        around.append([held for held in around[-1] if held.source.startswith(start)])
    return around[::-1]


def find_largest(near: Sequence[Held], source: bytes, weight: int) -> Held | None:
    """Return the oldest message of the largest holder, None if that is the source itself.

    The weight is that of the new message: its bytes, or BY_NUMBER if all messages weigh the same.
    """
    own = source[:HASH_BYTES_OF_48]
    numbers = collections.Counter(held.source[:HASH_BYTES_OF_48] for held in near)
    # A network that holds one message never gives way.
    left = [held for held in near
            if numbers[held.source[:HASH_BYTES_OF_48]] > 1 or held.source.startswith(own)]
    largest = b""
    for hash_bytes in HOLDERS:
        sums: collections.Counter[bytes] = collections.Counter()
        if source.startswith(largest):
            # First of all: among equals the sender is the largest.
            sums[source[:hash_bytes]] = weight
        for held in left:
            sums[held.source[:hash_bytes]] += _weight_of(held, weight)
        ((largest, _),) = sums.most_common(1)
        left = [held for held in left if held.source.startswith(largest)]
    return left[0] if left else None


def _weight_of(held: Held, weight: int) -> int:
    """Return the weight of a message beside a new one of that weight."""
    if weight == BY_NUMBER:
        return BY_NUMBER
    return held.size


# Each write is a record. `apply` makes its changes within a transaction that others share,
# finds the relay's time raised in the row, and may raise NoRoom before it has changed anything.


class Write(Protocol):
    """A change of the database that waits for its turn."""

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> Any:
        """Make the change and return what its caller is told."""


class PutMessage(NamedTuple):
    """Keep a message; tell its `at`."""

    message: Message
    limits: Limits

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> int:
        """Check all room, then add the message; raise NoRoom."""
        box, text, source, ttl_us, quota = self.message
        size = len(text)
        messages, total, proven = db.execute(
            BOX_CONTENT, {"box": box, "now_us": row.time_us}).fetchone()
        dropped = self._make_room(db, row, messages, total)
        self._check_relay(row.bytes + counted_bytes(size), proven)
        if quota.name:
            self._take_of_quota(db, size)
        for held in dropped:
            take_off(db, row, db.execute(DROP_MESSAGE, (held.at,)).fetchall())
        at = max(row.time_us, row.last_at + 1)
        row.last_at = at
        row.bytes += counted_bytes(size)
        row.messages += 1
        db.execute(ADD_MESSAGE, (at, box, at + ttl_us, source, size, text, quota.name))
        return at

    def _make_room(
            self, db: sqlite3.Connection, row: RelayRow, messages: int, total: int) -> list[Held]:
        """Return what has to give way; raise NoRoom."""
        size = len(self.message.data)
        limits = self.limits
        if (messages < limits.max_box_messages // SOURCE_SHARE
                and total + size <= limits.max_box_bytes // SOURCE_SHARE):
            # Nobody can have too much in a box with so little in it: most boxes.
            return []
        rows = db.execute(HELD, {"box": self.message.box, "now_us": row.time_us})
        box = list(map(Held._make, rows))
        return make_room(box, self.message.source, size, limits, row.time_us)

    def _check_relay(self, total: int, proven: int) -> None:
        """Let strangers fill two thirds: the last one is for boxes whose owner has shown up."""
        room = self.limits.max_bytes
        if not proven:
            room = room * 2 // 3
        if total > room:
            raise NoRoom("relay")

    def _take_of_quota(self, db: sqlite3.Connection, size: int) -> None:
        quota = self.message.quota
        (kept,) = db.execute(QUOTA_BYTES, (quota.name,)).fetchone() or (0,)
        if quota.bytes and kept + size > quota.bytes:
            raise NoRoom("quota")
        db.execute(ADD_QUOTA_BYTES, (quota.name, size))


class PutQuestion(NamedTuple):
    """Keep a question unless another is still young; tell which one counts."""

    box: bytes
    question: str
    answer_sha256: bytes
    ttl_us: int

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> str:
        """Look whether another check was faster, then add the question."""
        made_after_us = row.time_us - self.ttl_us // 2
        newest = {"box": self.box, "now_us": row.time_us, "made_after_us": made_after_us}
        young = db.execute(QUESTION, newest).fetchone()
        if young:
            return str(young[0])
        expires_us = row.time_us + self.ttl_us
        db.execute(ADD_QUESTION,
                   (self.box, row.time_us, self.question, self.answer_sha256, expires_us))
        return self.question


class KeepBoxes(NamedTuple):
    """Raise the expiry of box rows, and make missing ones while there are fewer than room_for."""

    expiries_us: Mapping[bytes, int]
    room_for: int

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> None:
        """Update each row, or add it."""
        for box, expires_us in self.expiries_us.items():
            kept = db.execute(KEEP_BOX, {"box": box, "expires_us": expires_us}).rowcount
            if not kept and row.boxes < self.room_for:
                row.boxes += db.execute(ADD_BOX, (box, expires_us)).rowcount


class Spend(NamedTuple):
    """Add to the requests of today by name of quota."""

    requests: Mapping[str, int]

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> None:
        """Add to each quota's row, which starts again with the day."""
        for name, count in self.requests.items():
            db.execute(ADD_QUOTA_REQUESTS, (name, row.time_us // DAY_US, count))


class Sweep(NamedTuple):
    """Delete some of what has expired; tell whether there may be more."""

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> bool:
        """Delete at most SWEEP_ROWS of each table and take them from the sums."""
        span = {"now_us": row.time_us, "limit": SWEEP_ROWS}
        messages = db.execute(SWEEP_MESSAGES, span).fetchall()
        take_off(db, row, messages)
        questions = db.execute(SWEEP_QUESTIONS, span).rowcount
        boxes = db.execute(SWEEP_BOXES, span).rowcount
        row.boxes -= boxes
        return max(len(messages), questions, boxes) == SWEEP_ROWS


def take_off(db: sqlite3.Connection, row: RelayRow, deleted: Sequence[tuple[int, str]]) -> None:
    """Take messages that are deleted (size, quota) from the sums."""
    row.messages -= len(deleted)
    for size, quota in deleted:
        row.bytes -= counted_bytes(size)
        if quota:
            db.execute(ADD_QUOTA_BYTES, (quota, -size))


class WriteTime(NamedTuple):
    """Write the relay's time for real, even if it has not changed."""

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> None:
        """Change the row itself, so that the transaction is not empty."""
        db.execute(WRITE_TIME, (row.time_us,))


class Ticket:
    """A write in the queue; once it is `done`, what came of it."""

    def __init__(self, write: Write, now_us: int, *, durable: bool = False) -> None:
        self.write = write
        self.now_us = now_us
        self.durable = durable
        self.done = False
        self._outcome: Any = None

    def apply(self, db: sqlite3.Connection, row: RelayRow) -> Any:
        """Return what the write tells, or a NoRoom: it changed nothing, so the others may go on."""
        row.time_us = max(row.time_us, self.now_us)
        try:
            return self.write.apply(db, row)
        except NoRoom as error:
            return error

    def settle(self, outcome: Any) -> None:
        """Have the outcome told to whoever waits for it."""
        self._outcome = outcome
        self.done = True

    def result(self) -> Any:
        """Return the outcome of a ticket that is done, or raise it if it is a StoreError."""
        if isinstance(self._outcome, StoreError):
            raise self._outcome
        return self._outcome


SYNC_PRAGMAS: Mapping[str, str] = {
    "full": "PRAGMA synchronous = FULL",
    "normal": "PRAGMA synchronous = NORMAL",
}


class GroupCommit:
    """Have the writes of many threads share a commit: one sync of the disk for many sends.

    A thread adds a ticket to the queue and asks for the file's thread lock. Whoever gets it
    takes a batch from the front of the queue, runs it in one transaction, commits, and settles
    every ticket of the batch. The others mostly find their tickets done when they get the lock.
    No thread of its own is needed. How the disk is synced is "full", which survives a power
    loss, or "normal", which survives a crash of the relay; only durable writes ask for "full".
    """

    def __init__(self, file: DatabaseFile, sync: str) -> None:
        self._file = file
        self._queue: collections.deque[Ticket] = collections.deque()
        self._durable_pragma = SYNC_PRAGMAS[sync]
        # What the connection is set to.
        self._pragma = ""

    def waiting(self) -> int:
        """Return how many writes wait for a commit."""
        return len(self._queue)

    def add(self, ticket: Ticket) -> None:
        """Put a write into the queue: the next commit has it, and that may be a second away."""
        self._queue.append(ticket)

    def submit(self, ticket: Ticket) -> Any:
        """Return the outcome of a write once it is committed; raise StoreError."""
        self.add(ticket)
        while not ticket.done:
            with self._file.thread_lock:
                if not ticket.done:
                    self._commit_batch()
        return ticket.result()

    def _commit_batch(self) -> None:
        """Take a batch from the queue, run it in one transaction, and settle its tickets."""
        batch = [self._queue.popleft() for _ in range(min(COMMIT_BATCH, len(self._queue)))]
        # What all are told if something unforeseen is raised: nobody may wait for ever.
        outcomes: list[Any] = [StoreError("not committed")] * len(batch)
        try:
            with self._file.exclusive():
                outcomes = self._transact(batch)
        except StoreError as error:
            outcomes = [error] * len(batch)
        finally:
            for ticket, outcome in zip(batch, outcomes, strict=True):
                ticket.settle(outcome)
        self._file.shorten_wal()

    def _transact(self, batch: Sequence[Ticket]) -> list[Any]:
        """Return the outcomes of a batch, committed; one that changed nothing is rolled back."""
        db = self._file.db
        self._choose_sync(batch)
        db.execute("BEGIN IMMEDIATE")
        try:
            changes = db.total_changes
            row = self._read_row()
            outcomes = [ticket.apply(db, row) for ticket in batch]
            if db.total_changes != changes:
                db.execute(WRITE_RELAY, vars(row))
                db.execute("COMMIT")
            return outcomes
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _choose_sync(self, batch: Sequence[Ticket]) -> None:
        pragma = SYNC_PRAGMAS["normal"]
        if any(ticket.durable for ticket in batch):
            pragma = self._durable_pragma
        # A PRAGMA is compiled anew each time.
        if pragma != self._pragma:
            self._file.db.execute(pragma)
            self._pragma = pragma

    def _read_row(self) -> RelayRow:
        values = self._file.db.execute(READ_RELAY).fetchone()
        if values is None:
            raise self._file.damaged()
        return RelayRow(*values)


class _OfThread(threading.local):
    """What belongs to one thread: the connection that holds its snapshot."""

    snapshot: sqlite3.Connection | None = None


class _Snapshot:
    """Have all reads of a thread, within a `with`, go to one connection in one transaction.

    To take and drop SQLite's shared lock (fcntl) costs as much as a look itself, and so would a
    generator: this is a class for that. If no connection can be had, each read says what is wrong.
    """

    def __init__(self, file: DatabaseFile, of_thread: _OfThread) -> None:
        self._file = file
        self._of_thread = of_thread
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> None:
        with contextlib.suppress(sqlite3.Error, StoreError):
            self._db = self._file.take_reader()
            self._db.execute("BEGIN")
        self._of_thread.snapshot = self._db

    def __exit__(self, *_: object) -> None:
        self._of_thread.snapshot = None
        if self._db:
            # SQLite may have ended the transaction by itself.
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            self._file.return_reader(self._db)


class SqliteStore:
    """Keep everything in one SQLite file in WAL mode, or in ":memory:".

    Any number of threads and processes may use the file. Concurrent writes share one
    commit; `sync="full"` has it survive a power loss, "normal" only a crash of the
    relay. `connect` makes connections in place of sqlite3.connect, for tests with faults.
    Raises StoreError if the file cannot be used; a file of another program is left alone.
    """

    def __init__(self, path: str = "connectoid.db", *, sync: str = "full",
                 connect: Callable[..., sqlite3.Connection] = sqlite3.connect) -> None:
        self._file = DatabaseFile(path, connect=connect)
        self._commits = GroupCommit(self._file, sync)
        self._of_thread = _OfThread()
        self._file.open()

    def close(self) -> None:
        """Commit what is in the queue, move everything into the file and let go of it."""
        with contextlib.suppress(StoreError):
            self.keep_boxes({}, 0)
        self._file.close()

    # Reading and writing

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Have this thread's reads in a `with` see one state of the file."""
        if self._file.in_memory:
            return contextlib.nullcontext()
        return _Snapshot(self._file, self._of_thread)

    def _read(self, sql: str, **values: Any) -> list[Any]:
        try:
            snapshot = self._of_thread.snapshot
            if snapshot:
                return snapshot.execute(sql, values).fetchall()
            if self._file.in_memory:
                # A second connection would see another memory.
                with self._file.thread_lock:
                    return self._file.db.execute(sql, values).fetchall()
            db = self._file.take_reader()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                self._file.return_reader(db)
        except sqlite3.Error as error:
            raise self._file.explain(error) from error

    def _write(self, write: Write, now_us: int, *, durable: bool = False) -> Any:
        """Return the outcome of a write once it is committed; raise StoreError.

        On a full disk, room is made first by emptying the WAL, then by opening the reserve. The
        reserve belongs to the owners: not to what is durable, as messages are.
        """
        if durable and self._file.room is Room.FOR_OWNERS:
            raise StoreFull(f"{self._file.path}: the disk is full")
        try:
            return self._commits.submit(Ticket(write, now_us, durable=durable))
        except StoreFull:
            self._file.empty_wal()
        try:
            return self._commits.submit(Ticket(write, now_us, durable=durable))
        except StoreFull:
            self._file.open_reserve()
            self._file.empty_wal()
            if durable:
                raise
        return self._commits.submit(Ticket(write, now_us))

    # Methods of Store

    def time_us(self) -> int:
        """Return the store's time as it was last raised."""
        for time_us, *_ in self._read(READ_RELAY):
            return int(time_us)
        raise self._file.damaged()

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`; raise NoRoom or StoreFull."""
        return int(self._write(PutMessage(message, limits), now_us, durable=True))

    def look(self, box: bytes, at_us: int, now_us: int) -> Look:
        """Return whether the box has news, and until when its row lives."""
        ((found, box_expires_us),) = self._read(LOOK, box=box, now_us=now_us, at_us=at_us)
        return Look(bool(found), box_expires_us)

    def messages(self, box: bytes, at_us: int, limit: int, now_us: int) -> list[tuple[int, str]]:
        """Return (at, data) newer than `at`, oldest first."""
        return self._read(
            MESSAGES, box=box, now_us=now_us, at_us=at_us, limit=limit,
            max_chars=MAX_RECEIVE_CHARS)

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""
        rows = self._read(ARRIVALS, after_us=after_us)
        newest_us = after_us
        if rows:
            newest_us, _ = rows[-1]
        return newest_us, {box for _, box in rows}

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""
        found = self._read(QUESTION, box=box, now_us=now_us, made_after_us=made_after_us)
        for (question,) in found:
            return str(question)
        return None

    def put_question(
            self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep a question unless another is still young; return the one that counts."""
        return str(self._write(PutQuestion(box, *question, ttl_us), now_us))

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now."""
        return [answer for (answer,) in self._read(ANSWERS, box=box, now_us=now_us)]

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for."""
        write = KeepBoxes(expiries_us, room_for)
        if soon:
            # It costs no transaction of its own: the next one has it first.
            self._commits.add(Ticket(write, now_us))
        else:
            self._write(write, now_us)

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Add to the requests of today by name of quota."""
        self._write(Spend(requests), now_us)

    def spent(self, now_us: int) -> dict[str, int]:
        """Return the requests of today by name of quota, of all processes."""
        return dict(self._read(QUOTA_REQUESTS, day=now_us // DAY_US))

    def stored(self) -> Stored:
        """Return what the store holds."""
        for *_, octets, boxes, messages in self._read(READ_RELAY):
            return Stored(messages, octets, boxes)
        raise self._file.damaged()

    def sweep(self, now_us: int) -> bool:
        """Delete some of what has expired, in time from the WAL too, and mend a full disk."""
        more = False
        expired = self._read(EXPIRED, now_us=now_us) == [(1,)]
        if expired or self._commits.waiting():
            more = bool(self._write(Sweep(), now_us))
        self._file.tidy(now_us, deleted=expired)
        return more

    def probe(self, now_us: int) -> None:
        """Write the time and read the tables for real; raise StoreError if that fails."""
        self._write(WriteTime(), now_us, durable=True)
        self.look(b"", 0, now_us)


# ---------------------------------------------------------------------------------------
# Counting: rate limits (how much of something a source may have in a span of time, in
# memory, starting again with every span), the requests of a quota's day, and what is
# told of it all: events by kind, never by mailbox or source.
# ---------------------------------------------------------------------------------------


class RateLimit:
    """Count what each key takes in a span of time; a limit of 0 is none."""

    def __init__(self, limit: int, span_us: int) -> None:
        self.limit = limit
        self.span_us = span_us
        self._lock = threading.Lock()
        self._span = 0
        self._taken: dict[Hashable, int] = {}

    def take(self, key: Hashable, now_us: int, amount: int = 1,
             wider: Sequence[Wider] = ()) -> int:
        """Take the amount and return 0, or take nothing and return the seconds to wait."""
        if not self.limit:
            return 0
        with self._lock:
            span = now_us // self.span_us
            if span != self._span:
                self._span = span
                self._taken = {}
            if key not in self._taken and len(self._taken) >= MAX_SOURCES:
                # All further ones share a count.
                key = None
                wider = ()
            taken = self._taken.get(key, 0) + amount
            if taken > self.limit:
                return seconds_until((span + 1) * self.span_us, now_us)
            for network, times in wider:
                if self._taken.get(network, 0) + amount > self.limit * times:
                    return seconds_until((span + 1) * self.span_us, now_us)
            self._taken[key] = taken
            for network, _ in wider:
                self._taken[network] = self._taken.get(network, 0) + amount
            return 0


class Rate(Protocol):
    """A rate limit. RateLimit is one; relays that share a store may hand in another."""

    limit: int

    def take(self, key: Hashable, now_us: int, amount: int = 1,
             wider: Sequence[Wider] = ()) -> int:
        """Take the amount and return 0, or take nothing and return the seconds to wait.

        It is taken of the wider networks too, each of which may have the limit some times. May
        raise StoreError.
        """


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
        self._start(0, {})

    def _start(self, day: int, known: dict[str, int]) -> None:
        """Start a day with the sums that the store has; nothing is yet to be told."""
        self._day = day
        self._known = known
        self._untold: collections.Counter[str] = collections.Counter()

    def take(self, quota: Quota, now_us: int) -> int:
        """Take one and return 0, or take nothing and return the seconds to wait."""
        with self._lock:
            day = now_us // DAY_US
            if day != self._day:
                self._start(day, {})
            taken = self._known.get(quota.name, 0) + self._untold[quota.name]
            if 0 < quota.requests_per_day <= taken:
                return seconds_until((day + 1) * DAY_US, now_us)
            self._untold[quota.name] += 1
            return 0

    def share(self, store: Store, now_us: int) -> None:
        """Tell the store and learn from it; raise StoreError.

        What cannot be told now is told next time.
        """
        today = now_us // DAY_US
        with self._lock:
            day = self._day
            # The plus leaves out what is zero.
            untold = +self._untold
        # What is left of yesterday would count for today.
        if day == today:
            for name, count in untold.items():
                store.spend({name: count}, now_us)
                self._note_told(day, name, count)
        known = store.spent(now_us)
        with self._lock:
            if self._day == today:
                self._known = known
            elif self._day == day:
                self._start(today, known)

    def _note_told(self, day: int, name: str, count: int) -> None:
        """Count what was told at once: if the next name fails, this one must not be told again."""
        with self._lock:
            if self._day == day:
                self._known[name] = self._known.get(name, 0) + count
                self._untold[name] -= count


class SourceShares:
    """Bound what one source takes of the quotas of keys that travel in links."""

    def __init__(self, rate_limit: Callable[[str, int, int], Rate]) -> None:
        self._rate_limit = rate_limit
        self._rates: dict[tuple[str, int, int], Rate] = {}

    def take_request(self, quota: Quota, source: str, now_us: int) -> int:
        """Take one request of the day and return 0, or nothing and return the seconds to wait."""
        if not quota.in_links or not quota.requests_per_day:
            return 0
        share = max(1, quota.requests_per_day // SEND_KEY_SHARE)
        rate = self._rate_of(f"requests {quota.name}", share, DAY_US)
        return rate.take(source, now_us, wider=networks_of(source))

    def take_bytes(self, quota: Quota, source: str, size: int, ttl_us: int, now_us: int) -> int:
        """Take bytes of those kept at a time and return 0, or nothing and the seconds to wait."""
        if not quota.in_links or not quota.bytes:
            return 0
        # Anybody may send one message, whatever its size.
        share = max(MAX_DATA_CHARS, quota.bytes // SEND_KEY_SHARE)
        rate = self._rate_of(f"bytes {quota.name}", share, ttl_us)
        return rate.take(source, now_us, size, networks_of(source))

    def _rate_of(self, name: str, share: int, span_us: int) -> Rate:
        """Return the rate of a share: another one after a change of the key file."""
        share_of = (name, share, span_us)
        if share_of not in self._rates:
            self._rates.setdefault(share_of, self._rate_limit(*share_of))
        return self._rates[share_of]


class Metric(NamedTuple):
    """How a metric is told to Prometheus: type, meaning, and the known values of its label."""

    type: str
    meaning: str
    label: str = ""
    values: Sequence[str] = ("",)


# Two errors have the same text; each text is told once.
_ERROR_TEXTS = tuple(dict.fromkeys(error.text for error in ERRORS))

METRICS: Mapping[str, Metric] = {
    "connectoid_requests_total": Metric(
        "counter", "Requests by action.", "action", ("send", "check", "receive")),
    "connectoid_refusals_total": Metric(
        "counter", "Refused requests by error.", "error", _ERROR_TEXTS),
    "connectoid_datagrams_total": Metric(
        "counter", "Datagrams by what they got.", "reply", ("check", "stun", "none")),
    "connectoid_questions_total": Metric(
        "counter", "Questions made: each costs a P-384 seal."),
    "connectoid_turn_total": Metric(
        "counter", "TURN credentials asked for by outcome.", "outcome", ("given", "refused")),
    "connectoid_handshakes_total": Metric(
        "counter", "TLS handshakes by outcome.", "outcome", ("done", "failed")),
    "connectoid_messages": Metric(
        "gauge", "Messages in the store."),
    "connectoid_message_bytes": Metric(
        "gauge", "Bytes of data in the store, as --max-bytes counts them."),
    "connectoid_boxes": Metric(
        "gauge", "Boxes with a proven owner."),
    "connectoid_healthy": Metric(
        "gauge", "1 while the store can be read and written and the sweeper lives."),
    "connectoid_sweep_age_seconds": Metric(
        "gauge", "Seconds since the last sweep."),
    "connectoid_uptime_seconds": Metric(
        "gauge", "Seconds since the start."),
    "connectoid_connections": Metric(
        "gauge", "Open connections."),
    "connectoid_waiting_boxes": Metric(
        "gauge", "Boxes waited for in long polls."),
    "connectoid_queued_requests": Metric(
        "gauge", "Requests in the queue for a thread."),
    "connectoid_limit": Metric(
        "gauge", "The limits in force, by name.", "limit", ()),
    "connectoid_info": Metric(
        "gauge", "1, with the version.", "version", ()),
}

# A metric's name and the value of its label.
Sample: TypeAlias = tuple[str, str]


class Counts:
    """Count events, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Sample, int] = {}
        for name, metric in METRICS.items():
            if metric.type == "counter":
                for value in metric.values:
                    self._counts[name, value] = 0

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
        # By minute, the count at its end.
        self._totals: dict[int, int] = {}

    def note(self, total: int, now_us: int) -> None:
        """Take the count as it is now; about once a second."""
        self._totals[now_us // MINUTE_US] = total
        newest = list(self._totals.items())[-TRAFFIC_MINUTES - 1:]
        self._totals = dict(newest)

    def per_minute(self) -> list[int]:
        """Return the growth in each of at most TRAFFIC_MINUTES minutes, the current one last."""
        totals = [0, *self._totals.values()]
        growth = [now - before for before, now in itertools.pairwise(totals)]
        return growth[-TRAFFIC_MINUTES:]


# ---------------------------------------------------------------------------------------
# Access: the clients that the host lets in, by two files: API keys with their quotas, and
# a list of the addresses and mailboxes that are denied. docs/hosting.md, "API keys" and
# "Abuse".
# ---------------------------------------------------------------------------------------


class Access:
    """Say what an API key may have, and who is denied.

    A key in `send_keys` is known to sends alone: links carry it, and whoever reads one can spend
    nothing of its owner's. It never changes: to let others in, put another in its place
    (`relay.access`).
    """

    def __init__(self, keys: Mapping[str, Quota] | None = None,
                 public: Quota | None = EVERYTHING, *,
                 send_keys: Mapping[str, Quota] | None = None,
                 denied_sources: Networks = NO_NETWORKS,
                 denied_boxes: frozenset[bytes] = frozenset()) -> None:
        self.public = public
        self._denied_sources = denied_sources
        self._denied_boxes = denied_boxes
        # Looked up by digest: how long that takes tells nothing of the key.
        self._quotas = self._by_digest(keys or {})
        in_links = {key: quota._replace(in_links=True) for key, quota in (send_keys or {}).items()}
        self._send_quotas = self._by_digest(in_links)

    @classmethod
    def _by_digest(cls, keys: Mapping[str, Quota]) -> dict[bytes, Quota]:
        return {cls._digest(key): quota for key, quota in keys.items()}

    @staticmethod
    def _digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("utf-8")).digest()

    def quota_of(self, ext: str | None, *, sends: bool = False) -> Quota:
        """Return the quota of a key, or what the public gets.

        Raises Refusal (Forbidden) if that is nothing.
        """
        quota = self.public
        detail = "This relay wants an API key in ext."
        if ext and (self._quotas or self._send_quotas):
            digest = self._digest(ext)
            quota = self._quotas.get(digest, quota)
            if sends:
                quota = self._send_quotas.get(digest, quota)
            elif digest in self._send_quotas:
                detail = "This API key may only send; use the owner's, or a relay of your own."
        if quota is None:
            raise Refusal(FORBIDDEN, detail)
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
    known = Keys({}, {}, EVERYTHING)
    networks = NO_NETWORKS
    boxes: frozenset[bytes] = frozenset()
    if keys:
        known = KeyFile(keys).read()
    if denied:
        networks, boxes = _read_denied(denied)
    return Access(
        known.owners, known.public, send_keys=known.senders, denied_sources=networks,
        denied_boxes=boxes)


class Turn:
    """Make short-lived credentials for the host's TURN servers. PROTOCOL.md, "TURN".

    The scheme is that of coturn's `use-auth-secret`: the servers know the secret too, and nobody
    has to tell them of users. It never changes: to have another, put it in its place
    (`relay.turn`).
    """

    def __init__(self, urls: Sequence[str], secret: bytes) -> None:
        self._urls = tuple(urls)
        self._secret = secret

    def credentials(self, name: str, now_us: int, ttl_s: int) -> dict[str, Any]:
        """Return what a client needs to use the servers for so many seconds, as a name."""
        username = f"{now_us // SECOND_US + ttl_s}:{name}"
        # What TURN servers take. HMAC does not need what SHA-1 no longer has.
        digest = hmac.digest(self._secret, username.encode("ascii"), "sha1")
        return {
            "urls": list(self._urls),
            "username": username,
            "credential": base64.b64encode(digest).decode("ascii"),
            "ttl": ttl_s,
        }


def read_turn(urls: Sequence[str], secret_file: str | None) -> Turn | None:
    """Return the TURN servers with the secret that a file holds, None if there are no servers.

    Raises SettingError for a file that others may read, or whose secret can be guessed.
    """
    if not urls or not secret_file:
        return None
    secret = _read_text(secret_file).strip()
    if Path(secret_file).stat().st_mode & OTHERS_MAY_READ:
        raise SettingError(f"{secret_file}: others may read it; chmod 0640 it")
    if len(secret.encode("utf-8")) < MIN_TURN_SECRET_BYTES or len(secret.split()) > 1:
        raise SettingError(
            f"{secret_file}: write one line of at least {MIN_TURN_SECRET_BYTES} characters,"
            " such as that of `openssl rand -hex 32`")
    return Turn(urls, secret.encode("utf-8"))


def _read_octets(path: str) -> bytes:
    try:
        # A pipe would not end.
        if Path(path).is_fifo():
            raise SettingError(f"{path}: is a pipe; give a file, which can be read again")
        return Path(path).read_bytes()
    except OSError as error:
        reason = f"{path}: {error.strerror}; give a file that the relay may read"
        raise SettingError(reason) from None


def _read_text(path: str) -> str:
    octets = _read_octets(path)
    try:
        return octets.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line}: save the file as UTF-8") from None


def _is_key(value: object) -> bool:
    return _is_text(value) and 1 <= len(value) <= MAX_EXT_CHARS


def _is_setting(value: object) -> bool:
    return _is_integer(value) and 1 <= value <= MAX_SETTING


_KEY_FORM = Form(_is_key, f"a string of 1 to {MAX_EXT_CHARS} characters")
_NUMBER_FORM = Form(_is_setting, f"a whole number from 1 to {MAX_SETTING}")

# The form of each member of [public] in the key file; [keys.NAME] has a key as well, and may have
# a second half, which only sends, with a quota of its own.
PUBLIC_FORMS: Mapping[str, Form] = {
    "requests_per_day": _NUMBER_FORM,
    "bytes": _NUMBER_FORM,
    "message_ttl": _NUMBER_FORM,
}
QUOTA_FORMS: Mapping[str, Form] = {
    "key": _KEY_FORM,
    **PUBLIC_FORMS,
    "send_key": _KEY_FORM,
    "send_requests_per_day": _NUMBER_FORM,
    "send_bytes": _NUMBER_FORM,
}
SEND_KEY = "send_key"


class Keys(NamedTuple):
    """What a key file says: quotas by API key, of owners and of who may only send; the public's."""

    owners: Mapping[str, Quota]
    senders: Mapping[str, Quota]
    public: Quota | None


class KeyFile:
    """Read a key file: TOML, with tables [keys.NAME] and [public].

    A mistake is told with the line where people find it, in a SettingError.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._text = _read_text(path)

    def read(self) -> Keys:
        """Return the quotas by API key, and that of the public."""
        tables = self._tables_in(self._parse())
        public = None
        if "public" in tables:
            public = self._quota_in(tables.pop("public"), "public", PUBLIC_FORMS)
        owners: dict[str, Quota] = {}
        senders: dict[str, Quota] = {}
        for name, table in tables.items():
            quota = self._quota_in(table, name, QUOTA_FORMS)
            if "key" not in table:
                raise self._mistake(name, "", f"[{name}] needs a key = \"...\"")
            self._check_new(name, "key", table["key"], {**owners, **senders})
            owners[table["key"]] = quota
            if SEND_KEY in table:
                self._check_new(name, SEND_KEY, table[SEND_KEY], {**owners, **senders})
                senders[table[SEND_KEY]] = self._send_quota_in(table, quota)
        return Keys(owners, senders, public)

    def _check_new(self, name: str, member: str, key: str, known: Mapping[str, Quota]) -> None:
        """Raise SettingError if a key is there twice."""
        if key in known:
            mend = f"{known[key].name} has the same key; make another"
            raise self._mistake(name, member, mend)

    def _send_quota_in(self, table: Mapping[str, Any], owners: Quota) -> Quota:
        """Return the quota of the half that sends: as much as the owner's, unless it says so."""
        return Quota(
            f"{owners.name}.{SEND_KEY}",
            table.get("send_requests_per_day", owners.requests_per_day),
            table.get("send_bytes", owners.bytes),
            owners.message_ttl_s)

    def _parse(self) -> dict[str, Any]:
        # Most relays have no key file, and the module takes 0.8 MiB.
        tomllib = importlib.import_module("tomllib")
        try:
            file: dict[str, Any] = tomllib.loads(self._text)
        except (ValueError, RecursionError) as error:
            # A ValueError is a TOMLDecodeError, or of a number without end.
            mistake, _, place = str(error).partition(" (at line ")
            line = place.partition(",")[0] or len(self._text.splitlines())
            raise SettingError(f"{self._path}, line {line}: {mistake};"
                               " write TOML: [keys.NAME], then key = \"...\"") from None
        return file

    def _tables_in(self, file: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the tables by their names, `keys.NAME` and `public`."""
        tables: dict[str, Any] = {}
        for name, value in file.items():
            if name == "keys" and isinstance(value, dict):
                continue
            if name != "public" or not isinstance(value, dict):
                raise self._no_table("", name)
            tables[name] = value
        keys = file.get("keys", {})
        for name, value in keys.items():
            if not isinstance(value, dict):
                raise self._no_table("keys", name)
            tables[f"keys.{name}"] = value
        return tables

    def _no_table(self, table: str, name: str) -> SettingError:
        full_name = f"{table}.{name}".strip(".")
        mend = f"{full_name} is not a table; there are [keys.NAME] and [public]"
        return self._mistake(table, name, mend)

    def _quota_in(self, table: Mapping[str, Any], name: str, forms: Mapping[str, Form]) -> Quota:
        for member, value in table.items():
            if member not in forms:
                known = ", ".join(forms)
                mend = f"{member!r} is unknown; [{name}] may have {known}"
                raise self._mistake(name, member, mend)
            fits, words = forms[member]
            if not fits(value):
                raise self._mistake(name, member, f"{member} must be {words}")
            if member.startswith("send_") and SEND_KEY not in table:
                mend = f"{member} needs a {SEND_KEY} = \"...\" beside it"
                raise self._mistake(name, member, mend)
        numbers = [table.get(member, 0) for member in PUBLIC_FORMS]
        return Quota(name, *numbers)

    def _mistake(self, table: str, member: str, mend: str) -> SettingError:
        """Return the error with the line of the member, or else of its table."""
        wanted = _plain(f"{table}.{member}")
        place = 1
        here = ""
        for number, line in enumerate(self._text.splitlines(), 1):
            header = re.match(r"\s*\[+([^]]*)\]", line)
            if header:
                here = _plain(header[1])
                found = here
            else:
                found = _plain(f"{here}.{line.partition('=')[0]}")
            if found == wanted:
                place = number
                break
            if found == _plain(table):
                place = number
        return SettingError(f"{self._path}, line {place}: {mend}")


def _plain(name: str) -> str:
    """Return a name without the quotes and spaces that people may put into it."""
    return re.sub(r"[\s\"']", "", name).strip(".")


def read_network(text: str) -> Network:
    """Return a network from `192.0.2.0/24` or a single address.

    Raises ValueError with what to write.
    """
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("write an address, or a network like 192.0.2.0/24") from None
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"write {network}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= IPV4_MAPPED_BITS:
        # The relay takes its addresses for IPv4: see source_of.
        return ipaddress.ip_network((mapped, network.prefixlen - IPV4_MAPPED_BITS))
    return network


def _read_denied(path: str) -> tuple[Networks, frozenset[bytes]]:
    """Return the networks and the mailboxes of a file that has one a line, # before a comment."""
    networks = []
    boxes = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        entry = line.partition("#")[0].strip()
        try:
            if _PUB.fullmatch(entry):
                boxes.append(decode_pub(entry))
            elif entry:
                networks.append(_whole_source(read_network(entry)))
        except ValueError as error:
            raise SettingError(f"{path}, line {number}: {entry[:80]!r} is not an address, network"
                               f" or mailbox; {error}") from None
    return Networks(networks), frozenset(boxes)


def _whole_source(network: Network) -> Network:
    """Return a network, or the source that it is part of: less than that cannot be denied."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen > SOURCE_PREFIX_BITS:
        return network.supernet(new_prefix=SOURCE_PREFIX_BITS)
    return network


# ---------------------------------------------------------------------------------------
# The protocol core: requests in, replies out (PROTOCOL.md, "Operations"). No sockets, no
# SQL; clock, random source and store are handed in. It never raises to its caller.
#
# The life of a request. A front hands `Relay.begin` the bytes of a body and its source.
# `admit` counts the request against the source's rate limit. `parse` turns it into a
# Request: a record whose forms are right and which the host allows. Of the JSON nothing
# else is kept.
#
# What may block. `begin` never does: it parses at most 4 KiB and looks into the store
# once, which takes microseconds. Nearly all requests are checks that find nothing; they
# have their reply now. Any other one comes back as what is left to do: a Request, or a
# Body to parse first. `perform` does it, in a thread that may wait for the disk (send,
# receive), for a seal (the question) or for a long parse. A batch is one body, and
# performed in one go.
#
# The life of a wait. A check with `wait` that finds nothing comes to a Wait: the requests
# to perform again, and for how many seconds. The core itself never sleeps. The front
# parks the client until `arrivals` names one of its boxes. Then it asks `look`, or has
# `perform` do a whole batch again; that may come to another Wait. When the time is over
# the client gets `Wait.reply`, which says that nothing was found.
#
# The life of a message. `send` counts it against its source and has the store keep it;
# the sender hears "ok" when it is on the disk. `arrivals` then names its box, to all
# processes on the store. The next check of the box finds it, and gets a question: an
# answer that is sealed for the mailbox's key. Two questions at most are good at a time,
# for a minute each. `receive` with the answer proves the owner, gets the messages that
# are newer than `at`, and makes the box's row, which reserves room. Reading deletes
# nothing: a message goes when its time is over, by `sweep`. A check with `prove` gets a
# question without a message: it is for owners who want no more than TURN credentials.
#
# Errors. Whatever fails below raises. `Relay.refuse` alone turns an exception into the
# reply that the client gets, and counts it.
# ---------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """Where the relay's time comes from, in microseconds."""

    wall_us: Callable[[], int]
    monotonic_us: Callable[[], int]


def _wall_us() -> int:
    return time.time_ns() // 1000


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


SYSTEM_CLOCK = Clock(_wall_us, _monotonic_us)

SEND = "send"
CHECK = "check"
RECEIVE = "receive"
OPERATIONS = (SEND, CHECK, RECEIVE)
BATCH_OPERATIONS = (CHECK,)


class Request(NamedTuple):
    """Hold a request whose forms are right, and what the host grants it.

    Each operation uses some of the fields. `found` says that a look has found a message
    already: what is left of the check is its question. With `prove` the question is made in any
    case.
    """

    operation: str
    box: bytes
    source: str
    quota: Quota = EVERYTHING
    at_us: int = 0
    wait_s: int = 0
    limit: int = 1
    data: str = ""
    answer: str = ""
    prove: bool = False
    turn: bool = False
    found: bool = False


class Batch(NamedTuple):
    """Hold the requests of a batch in their order; a refused one stands as its refusal."""

    requests: Sequence[Request | Refusal]


class Body(NamedTuple):
    """Hold a body that a thread is still to parse, with its source."""

    octets: bytes
    source: str


FOUND_NOTHING: Mapping[str, bool] = {"ok": True, "found": False}


def _found_nothing() -> Reply:
    return Reply(200, {**FOUND_NOTHING})


class Wait(NamedTuple):
    """Have a front perform requests again as soon as one of their boxes gets a message.

    No later than after so many seconds it gives the reply instead.
    """

    requests: Request | Batch
    seconds: int

    @property
    def boxes(self) -> frozenset[bytes]:
        """Return the boxes to watch."""
        if isinstance(self.requests, Request):
            return frozenset((self.requests.box,))
        return frozenset(_boxes_in(self.requests))

    @property
    def reply(self) -> Reply:
        """Return what the client is told when nothing has come."""
        if isinstance(self.requests, Request):
            return _found_nothing()
        return Reply(200, [{**FOUND_NOTHING} for _ in self.requests.requests])


def without_wait(outcome: Reply | Wait) -> Reply:
    """Return the reply for a client that does not wait."""
    if isinstance(outcome, Wait):
        return outcome.reply
    return outcome


# What a request comes to: a reply, a wait, or what is left to perform.
Work: TypeAlias = Request | Batch | Body
Outcome: TypeAlias = Reply | Wait | Work


# The versions of PROTOCOL.md that a relay speaks, for its document.
PROTOCOLS = (1,)

DESCRIPTION = "Keeps small encrypted messages until the app they are for comes online."


class About(NamedTuple):
    """What the host says of the relay, for apps to show: it stands in the document."""

    name: str = "Connectoid relay"
    contact: str | None = None
    notice: str | None = None
    price_url: str | None = None


def describe(
        about: About, limits: Limits, public: Quota | None, *, turn: bool = False,
) -> dict[str, Any]:
    """Return what apps and people may know of a relay. PROTOCOL.md, "HTTP"."""
    shown = limits._asdict()
    retention = {name: shown.pop(f"{name}_ttl_s") for name in ("message", "question", "box")}
    if public and public.message_ttl_s:
        retention["message"] = public.message_ttl_s
    return {
        "name": about.name,
        "description": DESCRIPTION,
        "software": "connectoid_relay",
        "version": __version__,
        "protocols": list(PROTOCOLS),
        "contact": about.contact,
        "limits": shown,
        "retention": retention,
        "udp": False,
        "stun": False,
        "turn": turn,
        "notice": about.notice,
        "price_url": about.price_url,
    }


def _fetch_nothing(_boxes: Iterable[bytes]) -> contextlib.AbstractContextManager[None]:
    """Return what a store needs whose looks cost microseconds each."""
    return contextlib.nullcontext()


def _boxes_in(batch: Batch) -> Iterator[bytes]:
    """Yield the boxes that a batch looks at."""
    for request in batch.requests:
        if isinstance(request, Request):
            yield request.box


class Complaints:
    """Log warnings, each text once a minute at most."""

    def __init__(self) -> None:
        self._logged = RateLimit(1, MINUTE_US)

    def add(self, text: str, now_us: int) -> None:
        """Log a text, unless that was done in this minute."""
        if not self._logged.take(text, now_us):
            log.warning("connectoid-relay: %s", text)


OWN_PART_IS_FULL = "You have as much in this mailbox as one network may, until messages expire."


def refusal_of(error: Exception, now_us: int) -> Refusal:
    """Return what an exception means to a client."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NoRoom):
        return _refusal_without_room(error, now_us)
    if isinstance(error, StoreFull):
        return Refusal(FULL, "The relay's disk is full.", retry_s=60)
    if isinstance(error, StoreError):
        return Refusal(BUSY, "The relay cannot use its store.", retry_s=5)
    return Refusal(BUSY, "The relay failed.", retry_s=5)


def _refusal_without_room(error: NoRoom, now_us: int) -> Refusal:
    if error.whose == "relay":
        return Refusal(FULL, "The relay's storage is full.", retry_s=60)
    if error.whose == "quota":
        detail = "This API key has as much in mailboxes as it may, until messages expire."
        return Refusal(TOO_OFTEN, detail, retry_s=60)
    retry_s = seconds_until(error.until_us, now_us)
    if error.whose == "source":
        return Refusal(TOO_OFTEN, OWN_PART_IS_FULL, retry_s)
    return Refusal(FULL, "This mailbox is full, until messages in it expire.", retry_s)


# Of the detail of a refusal.
IN_LINKS = f"One network may spend 1/{SEND_KEY_SHARE} of what this API key has."


class Admission:
    """Let requests in: count them, read them, and refuse what the host does not allow.

    Each method raises Refusal, or StoreError where rate limits are held in a store.
    """

    def __init__(self, limits: Limits, access: Access, *, counts: Counts, complaints: Complaints,
                 log_ips: bool, requests: Rate, shares: SourceShares) -> None:
        self.access = access
        self.daily = DailyRequests()
        self._limits = limits
        self._counts = counts
        self._complaints = complaints
        self._log_ips = log_ips
        self._requests = requests
        self._shares = shares
        self._parsing = threading.Lock()

    def admit(self, source: str, now_us: int) -> None:
        """Count a request of a source, if it is neither denied nor asks too often."""
        if self.access.denies(source):
            raise Refusal(FORBIDDEN, "This relay does not serve this address.")
        retry_s = self._requests.take(source, now_us, wider=networks_of(source))
        if retry_s:
            name = source if self._log_ips else "a source"
            self._complaints.add(f"{name} asks too often", now_us)
            detail = f"More than {self._limits.rate} requests in a minute."
            raise Refusal(TOO_OFTEN, detail, retry_s)

    def parse(self, sent: object, source: str, now_us: int,
              operations: Sequence[str] = OPERATIONS) -> Request:
        """Return the request in a JSON value."""
        if not isinstance(sent, dict):
            detail = f"A request is an object, or an array of 1 to {MAX_BATCH_ITEMS} checks."
            raise Refusal(BAD_REQUEST, detail)
        operation = sent.get("action")
        if not isinstance(operation, str) or operation not in operations:
            raise Refusal(BAD_REQUEST, f"action must be one of {', '.join(operations)}.")
        self._counts.add("connectoid_requests_total", operation)
        box = read_box(sent)
        quota = self.access.quota_of(read(sent, "ext"), sends=operation == SEND)
        self.access.check_box(box)
        self._spend(quota, source, now_us)
        if operation == CHECK:
            at_us = read_at(sent)
            wait_s = min(read(sent, "wait", 0), MAX_WAIT_S)
            prove = read(sent, "prove", False)
            return Request(CHECK, box, source, at_us=at_us, wait_s=wait_s, prove=prove)
        if operation == SEND:
            return Request(SEND, box, source, quota, data=read_data(sent))
        return self._parse_receive(sent, box, source)

    @staticmethod
    def _parse_receive(sent: Mapping[str, Any], box: bytes, source: str) -> Request:
        answer = read(sent, "answer")
        limit = read(sent, "limit", 1)
        at_us = read_at(sent)
        turn = read(sent, "turn", False)
        return Request(
            RECEIVE, box, source, at_us=at_us, limit=limit, answer=answer, turn=turn)

    def parse_body(self, body: Body, now_us: int) -> Request | Batch:
        """Return the request or the batch in an admitted body; may take milliseconds."""
        # One at a time: meanwhile no other thread can run.
        with self._parsing:
            sent = parse_json(body.octets)
        return self.parse_whole(sent, body.source, now_us)

    def parse_whole(self, sent: object, source: str, now_us: int) -> Request | Batch:
        """Return the request or the batch in the JSON value of an admitted body."""
        if not isinstance(sent, list) or not 1 <= len(sent) <= MAX_BATCH_ITEMS:
            return self.parse(sent, source, now_us)
        # Who asked for the body is counted already: that was for the first item.
        first = self._parse_item(sent[0], source, now_us, admitted=True)
        rest = [self._parse_item(item, source, now_us) for item in sent[1:]]
        return Batch((first, *rest))

    def _parse_item(self, sent: object, source: str, now_us: int, *,
                    admitted: bool = False) -> Request | Refusal:
        """Return an item of a batch, or why it is refused."""
        try:
            if not admitted:
                self.admit(source, now_us)
            return self.parse(sent, source, now_us, BATCH_OPERATIONS)
        except Refusal as refusal:
            return refusal
        except StoreError as error:
            self._complaints.add(str(error), now_us)
            return refusal_of(error, now_us)

    def _spend(self, quota: Quota, source: str, now_us: int) -> None:
        """Count a request against its API key's day."""
        if not quota.name:
            return
        if retry_s := self._shares.take_request(quota, source, now_us):
            raise Refusal(TOO_OFTEN, IN_LINKS, retry_s)
        retry_s = self.daily.take(quota, now_us)
        if retry_s:
            detail = f"More than {quota.requests_per_day} requests in a day."
            raise Refusal(TOO_OFTEN, detail, retry_s)


class RelayTime:
    """Tell the time since 1970: it never runs backwards, whatever the wall clock does.

    It begins no earlier than the store's time. A Raspberry Pi without network believes in
    1970, or in the day of its last shutdown.
    """

    def __init__(self, clock: Clock, store: Store) -> None:
        believed_us = clock.wall_us()
        if not RELEASE_US <= believed_us < YEAR_2200_US:
            believed_us = RELEASE_US
        self._monotonic_us = clock.monotonic_us
        self._base_us = max(believed_us, store.time_us()) - clock.monotonic_us()

    def now_us(self) -> int:
        """Return the time in microseconds."""
        return self._base_us + self._monotonic_us()

    def catch_up(self, store: Store) -> None:
        """Go on to the store's time: another process on it may have a clock that is ahead."""
        # The store comes first. Sends of this process raise its time all the while, and compared
        # with an earlier time of our own it would push the clock ahead with every sweep.
        store_us = store.time_us()
        self._base_us += max(0, store_us - self.now_us())


class SeenBoxes:
    """Remember which boxes with a row were checked today, to keep those rows.

    Each is written about once a day, with a sweep.
    """

    def __init__(self, box_ttl_us: int) -> None:
        self._ttl_us = box_ttl_us
        self._step_us = min(DAY_US, box_ttl_us // 30)
        # Until when each box is kept, not yet written.
        self._until_us: dict[bytes, int] = {}

    def expiry_us(self, box: bytes, now_us: int) -> int:
        """Return until when a box checked now is kept: the same for a day, to write once a day.

        Each box has a midnight of its own, so that they are not all written together.
        """
        shift_us = int.from_bytes(box[-8:], "big") % self._step_us
        midnight_us = ((now_us + shift_us) // self._step_us + 1) * self._step_us - shift_us
        return midnight_us + self._ttl_us

    def note(self, box: bytes, written_until_us: int, now_us: int) -> None:
        """Remember a check of a box, unless its row says so already."""
        until_us = self.expiry_us(box, now_us)
        if until_us > written_until_us and len(self._until_us) < MAX_SEEN_BOXES:
            self._until_us[box] = until_us

    def write(self, store: Store, now_us: int) -> bool:
        """Write some of them down; return whether there may be more. Raises StoreError."""
        some_us = dict(itertools.islice(self._until_us.copy().items(), MAX_SEEN_WRITES))
        if some_us:
            store.keep_boxes(some_us, now_us)
        for box, until_us in some_us.items():
            # Else it was checked again meanwhile, on another day.
            if self._until_us.get(box) == until_us:
                del self._until_us[box]
        return len(some_us) == MAX_SEEN_WRITES


class Mailboxes:
    """Perform what a request asks of the store. Each method raises Refusal and StoreError."""

    def __init__(self, store: Store, limits: Limits, *, counts: Counts,
                 random_bytes: Callable[[int], bytes], rate_limit: Callable[[str, int, int], Rate],
                 shares: SourceShares, source_key: Callable[[int], bytes] | None) -> None:
        self._store = store
        self._limits = limits
        self._counts = counts
        self._random_bytes = random_bytes
        self._shares = shares
        # Without a rate all limits here are 0, which is none.
        on = limits.rate > 0
        self._seals = rate_limit("seals", on * limits.max_seals, MINUTE_US)
        self._sends = rate_limit("sends", on * limits.max_sends, MINUTE_US)
        self._sent_bytes = rate_limit("sent_bytes", on * limits.max_source_bytes, HOUR_US)
        self._turn = rate_limit("turn", on * limits.max_turn, HOUR_US)
        self._turn_per_source = rate_limit(
            "turn_per_source", on * limits.max_turn_per_source, HOUR_US)
        # Our own is never written: the file shows no addresses.
        self._make_source_key = source_key or self._random_source_key
        self._source_day = 0
        self._source_key = b""
        self.seen = SeenBoxes(limits.box_ttl_s * SECOND_US)

    def look(self, box: bytes, at_us: int, now_us: int) -> bool:
        """Return whether a box has news, and remember that it was checked. Never blocks."""
        found, expires_us = self._store.look(box, at_us, now_us)
        if expires_us is not None:
            self.seen.note(box, expires_us, now_us)
        return found

    def question(self, box: bytes, source: str, now_us: int) -> str:
        """Return the young question of a box, or make one."""
        ttl_us = self._limits.question_ttl_s * SECOND_US
        question = self._store.question(box, now_us - ttl_us // 2, now_us)
        if question is not None:
            return question
        if retry_s := self._seals.take(source, now_us, wider=networks_of(source)):
            detail = f"More than {self._limits.max_seals} questions in a minute."
            raise Refusal(TOO_OFTEN, detail, retry_s)
        answer = encode_base64url(self._random_bytes(ANSWER_BYTES))
        made = (seal_question(box, answer), hash_answer(answer))
        self._counts.add("connectoid_questions_total")
        return self._store.put_question(box, made, ttl_us, now_us)

    def receive(self, request: Request, now_us: int) -> list[dict[str, Any]]:
        """Return the messages of an owner who has the answer, oldest first."""
        given = hash_answer(request.answer)
        answers = self._store.answers(request.box, now_us)
        # All are compared, so that the time tells nothing of which.
        right = [hmac.compare_digest(given, kept) for kept in answers]
        if not any(right):
            raise Refusal(WRONG_ANSWER, "Check again for a new question.")
        self._prove(request.box, request.at_us, now_us)
        messages = self._store.messages(request.box, request.at_us, request.limit, now_us)
        return [{"at": at, "data": sealed} for at, sealed in messages]

    def _prove(self, box: bytes, at_us: int, now_us: int) -> None:
        """Make the row of a box whose owner has just answered; without one life goes on."""
        if self._store.look(box, at_us, now_us).box_expires_us is not None:
            return
        expiries_us = {box: self.seen.expiry_us(box, now_us)}
        with contextlib.suppress(StoreError):
            self._store.keep_boxes(expiries_us, now_us, room_for=self._limits.max_boxes, soon=True)

    def turn_name(self, request: Request, now_us: int) -> str | None:
        """Return the name under which TURN servers know the mailbox of an owner today.

        None if that was given too often. A server can count what each name uses, and learns
        nothing of the mailbox.
        """
        retry_s = self._turn.take(request.box, now_us)
        if not retry_s:
            source = request.source
            retry_s = self._turn_per_source.take(source, now_us, wider=networks_of(source))
        if retry_s:
            self._counts.add("connectoid_turn_total", "refused")
            return None
        self._counts.add("connectoid_turn_total", "given")
        self._renew_key(now_us)
        hashed = self._keyed_hash(f"turn {encode_base64url(request.box)}")
        return hashed[:TURN_NAME_BYTES].hex()

    def send(self, request: Request, now_us: int) -> None:
        """Keep a message; return when it is on the disk."""
        # Nothing is kept for a box that nobody can open.
        read_public_key(request.box)
        ttl_us = (request.quota.message_ttl_s or self._limits.message_ttl_s) * SECOND_US
        self._take_rates(request, ttl_us, now_us)
        source = self._hash_source(request.source, now_us)
        message = Message(request.box, request.data, source, ttl_us, request.quota)
        self._store.put(message, self._limits, now_us)

    def _take_rates(self, request: Request, ttl_us: int, now_us: int) -> None:
        """Count a message against its source and the networks around that."""
        box, source, size = request.box, request.source, len(request.data)
        networks = networks_of(source)
        to_box = [Wider((box, network), times) for network, times in networks]
        retry_s = self._sends.take((box, source), now_us, wider=to_box)
        if not retry_s:
            retry_s = self._sent_bytes.take(source, now_us, size, networks)
        if retry_s:
            raise Refusal(TOO_OFTEN, "One network has sent too much in a short time.", retry_s)
        if retry_s := self._shares.take_bytes(request.quota, source, size, ttl_us, now_us):
            raise Refusal(TOO_OFTEN, IN_LINKS, retry_s)

    def _random_source_key(self, _day: int) -> bytes:
        return self._random_bytes(SOURCE_KEY_BYTES)

    def _renew_key(self, now_us: int) -> None:
        """Have a key of today: what is hashed tomorrow cannot be compared with it."""
        today = now_us // DAY_US
        if today != self._source_day:
            self._source_key = self._make_source_key(today)
            self._source_day = today

    def _hash_source(self, source: str, now_us: int) -> bytes:
        """Return what stands for a source today: tomorrow the same source has another."""
        self._renew_key(now_us)
        networks = networks_of(source)
        if not networks:
            return self._keyed_hash(source)
        in_56, in_48 = (self._keyed_hash(str(network)) for network, _ in networks)
        return (
            in_48[:HASH_BYTES_OF_48]
            + in_56[HASH_BYTES_OF_48:HASH_BYTES_OF_56]
            + self._keyed_hash(source)[HASH_BYTES_OF_56:])

    def _keyed_hash(self, name: str) -> bytes:
        octets = name.encode("utf-8", "replace")
        hashed = hashlib.blake2b(octets, key=self._source_key, digest_size=HASH_BYTES_OF_SOURCE)
        return hashed.digest()


class Probe:
    """Say whether the store is well: it is written and read for real, but seldom."""

    def __init__(self, store: Store, complaints: Complaints) -> None:
        self._store = store
        self._complaints = complaints
        self._probed_us = 0
        self._problem = ""

    def problem(self, now_us: int) -> str:
        """Return what is wrong with the store, or nothing; may block.

        What is asked while a probe is under way gets what was known before.
        """
        if now_us - self._probed_us < PROBE_EVERY_US:
            return self._problem
        self._probed_us = now_us
        try:
            self._store.probe(now_us)
            self._problem = ""
        except Exception as error:
            # Whatever it is, the store is not well.
            self._complaints.add(str(error), now_us)
            self._problem = "The store cannot be read or written."
        return self._problem


class Relay:
    """Answer requests: `handle` for whoever embeds it, `begin` and `perform` for fronts.

    Somebody must call `sweep` about once a second; RelayServer and wsgi do. `access` and `turn`
    may be replaced at any time. Relays on one store can hold rate limits in sum: `rate_limit`
    makes one from its name, its limit and its span in microseconds, and `source_key`
    returns the 32 bytes under which all of them hash the sources of a day. In a `with` of
    `fetch` these boxes are looked at, by the same thread: a store may get them at once.
    """

    def __init__(self, store: Store, limits: Limits | None = None, *,
                 access: Access | None = None, turn: Turn | None = None,
                 about: About | None = None, clock: Clock = SYSTEM_CLOCK,
                 log_ips: bool = False,
                 random_bytes: Callable[[int], bytes] = secrets.token_bytes,
                 rate_limit: Callable[[str, int, int], Rate] = own_rate,
                 source_key: Callable[[int], bytes] | None = None,
                 fetch: Callable[[Iterable[bytes]], contextlib.AbstractContextManager[None]]
                 = _fetch_nothing) -> None:
        self.store = store
        self.limits = limits or Limits()
        self.about = about or About()
        self.turn = turn
        self.counts = Counts()
        self.closed = threading.Event()
        self._fetch = fetch
        self._complaints = Complaints()
        shares = SourceShares(rate_limit)
        self._admission = Admission(
            self.limits, access or Access(), counts=self.counts, complaints=self._complaints,
            log_ips=log_ips, requests=rate_limit("requests", self.limits.rate, MINUTE_US),
            shares=shares)
        self._mailboxes = Mailboxes(
            store, self.limits, counts=self.counts, random_bytes=random_bytes,
            rate_limit=rate_limit, shares=shares, source_key=source_key)
        # A rate of 0 turns all limits off.
        max_udp = self.limits.max_udp * (self.limits.rate > 0)
        self._datagrams = RateLimit(max_udp, SECOND_US)
        self._traffic = Traffic()
        self._time = RelayTime(clock, store)
        self._started_us = self.now_us()
        self._swept_us = self._started_us
        self._probe = Probe(store, self._complaints)
        # An older process with a slower clock learns our time.
        with contextlib.suppress(StoreError):
            store.probe(self.now_us())
            self._admission.daily.share(store, self.now_us())

    @property
    def access(self) -> Access:
        """Whom the host lets in. It may be replaced at any time."""
        return self._admission.access

    @access.setter
    def access(self, access: Access) -> None:
        self._admission.access = access

    def now_us(self) -> int:
        """Return the relay's own time, which never runs backwards."""
        return self._time.now_us()

    # Requests

    def handle(self, request: object, source: str) -> Reply:
        """Return (status, reply) for a parsed JSON request from an IP address.

        Never raises, and never waits for messages: `wait` is up to the fronts. Blocks
        while the disk works. PROTOCOL.md, "Operations".
        """
        try:
            admitted = source_of(str(source))
            now_us = self.now_us()
            self._admission.admit(admitted, now_us)
            outcome = self._perform(self._admission.parse_whole(request, admitted, now_us))
        except Exception as error:
            return self.refuse(error)
        return without_wait(outcome)

    def begin(self, body: bytes, source: str) -> Outcome:
        """Return what a body from a source (as `source_of` has it) comes to.

        Never blocks or raises. What is neither a Reply nor a Wait is left to `perform`.
        """
        try:
            now_us = self.now_us()
            self._admission.admit(source, now_us)
            if len(body) > MAX_INLINE_BYTES or body.lstrip().startswith(b"["):
                return Body(body, source)
            return self._look(self._admission.parse(parse_json(body), source, now_us), now_us)
        except Exception as error:
            return self.refuse(error)

    def look(self, request: Request) -> Outcome:
        """Return what a check comes to now, as `begin` does. Never blocks or raises."""
        try:
            return self._look(request, self.now_us())
        except Exception as error:
            return self.refuse(error)

    def perform(self, outcome: Outcome) -> Reply | Wait:
        """Do what is left to do of a request; may block. Never raises."""
        if isinstance(outcome, Reply | Wait):
            return outcome
        try:
            if isinstance(outcome, Body):
                outcome = self._admission.parse_body(outcome, self.now_us())
            return self._perform(outcome)
        except Exception as error:
            return self.refuse(error)

    def refuse(self, error: Exception) -> Reply:
        """Return what the client is told of an exception, and count it.

        This is the only place that turns an exception into a reply.
        """
        refusal = refusal_of(error, self.now_us())
        self.counts.add("connectoid_refusals_total", refusal.error.text)
        if not isinstance(error, Refusal):
            self._report(error)
        return refusal.reply()

    def _report(self, error: Exception) -> None:
        """Log what the host should know of."""
        if isinstance(error, NoRoom):
            if error.whose == "relay":
                self._complain("the storage is full (--max-bytes)")
        elif isinstance(error, StoreError):
            self._complain(str(error))
        else:
            log.error("a request failed; please report this", exc_info=error)

    def _complain(self, text: str) -> None:
        self._complaints.add(text, self.now_us())

    def admit(self, source: str) -> None:
        """Count a request of a source; raise Refusal if it is denied or asks too often."""
        self._admission.admit(source, self.now_us())

    def _look(self, request: Request, now_us: int) -> Reply | Wait | Request:
        """Answer a check that finds nothing; any other request is returned, to be performed."""
        if request.operation != CHECK or request.found:
            return request
        if self._mailboxes.look(request.box, request.at_us, now_us):
            return request._replace(found=True)
        if request.prove:
            return request
        if request.wait_s:
            return Wait(request, request.wait_s)
        return _found_nothing()

    def _perform(self, work: Request | Batch) -> Reply | Wait:
        """Do all of a request, or of a batch of them."""
        if isinstance(work, Batch):
            return self._perform_batch(work)
        now_us = self.now_us()
        if work.operation == SEND:
            self._mailboxes.send(work, now_us)
            return Reply(200, {"ok": True})
        if work.operation == RECEIVE:
            return self._receive(work, now_us)
        outcome = self._look(work, now_us)
        if isinstance(outcome, Request):
            question = self._mailboxes.question(work.box, work.source, now_us)
            return Reply(200, {"ok": True, "found": outcome.found, "question": question})
        return outcome

    def _receive(self, request: Request, now_us: int) -> Reply:
        messages = self._mailboxes.receive(request, now_us)
        body: dict[str, Any] = {"ok": True, "messages": messages}
        if not messages:
            body = {**FOUND_NOTHING}
        elif request.limit == 1:
            body = {"ok": True, **messages[0]}
        turn = self.turn
        if turn and request.turn:
            body |= self._turn_for(turn, request, now_us)
        return Reply(200, body)

    def _turn_for(self, turn: Turn, request: Request, now_us: int) -> dict[str, Any]:
        """Return the member `turn` of the reply to an owner; nothing if that was given too often.

        Who asks too often still gets the messages.
        """
        name = self._mailboxes.turn_name(request, now_us)
        if name is None:
            return {}
        return {"turn": turn.credentials(name, now_us, self.limits.turn_ttl_s)}

    def _perform_batch(self, batch: Batch) -> Reply | Wait:
        """Return the replies of a batch, or a wait if each of its checks would wait."""
        with self._fetch(_boxes_in(batch)):
            outcomes = [self._perform_item(request) for request in batch.requests]
        waits = [outcome for outcome in outcomes if isinstance(outcome, Wait)]
        if len(waits) == len(outcomes):
            return Wait(batch, min(wait.seconds for wait in waits))
        return Reply(200, [without_wait(outcome).body for outcome in outcomes])

    def _perform_item(self, request: Request | Refusal) -> Reply | Wait:
        if isinstance(request, Refusal):
            return self.refuse(request)
        return self.perform(request)

    # UDP

    def admit_datagram(self, source: str) -> bool:
        """Count a datagram against the budget of all; return whether it may be answered."""
        if self.access.denies(source):
            return False
        return not self._datagrams.limit or not self._datagrams.take("udp", self.now_us())

    def check_udp(self, request: Mapping[str, Any]) -> bool:
        """Return what a UDP check finds; raise Refusal or StoreError. PROTOCOL.md, "UDP"."""
        if request.get("action") != CHECK:
            raise Refusal(BAD_REQUEST)
        box = read_box(request)
        self.access.check_box(box)
        return self._mailboxes.look(box, read_at(request), self.now_us())

    # What fronts do beside requests

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Have many checks see one state of the store, within a `with`.

        Nobody may be told within it that a message is kept.
        """
        try:
            return self.store.snapshot()
        except StoreError:
            # Each check will say so.
            return contextlib.nullcontext()

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at`, and which boxes got messages since; nothing if that fails."""
        try:
            return self.store.arrivals(after_us)
        except StoreError as error:
            self._complain(str(error))
            return after_us, set()

    def sweep(self) -> bool:
        """Write down who was seen and delete some of what has expired.

        Return whether there is more of either.
        """
        now_us = self.now_us()
        self._traffic.note(self._count_requests(), now_us)
        self._time.catch_up(self.store)
        more_seen = False
        try:
            more_seen = self._write_seen()
        finally:
            more = self.store.sweep(self.now_us())
            self._swept_us = self.now_us()
        return more or more_seen

    def _count_requests(self) -> int:
        counts = self.counts.taken().items()
        return sum(count for (name, _), count in counts if name == "connectoid_requests_total")

    def _write_seen(self) -> bool:
        """Write down some of those who were seen, and return whether there may be more."""
        self._admission.daily.share(self.store, self.now_us())
        return self._mailboxes.seen.write(self.store, self.now_us())

    def close(self) -> None:
        """Write down who was seen and close the store."""
        self.closed.set()
        with contextlib.suppress(StoreError):
            self._write_seen()
        self.store.close()

    # What the relay tells of itself

    def health_problem(self) -> str:
        """Return why the relay is not well, or nothing; may block."""
        problem = self._probe.problem(self.now_us())
        if self.sweeper_is_late():
            return "The sweeper has stopped."
        return problem

    def health(self) -> Reply:
        """Return 200 while the store can be written and read and the sweeper lives; may block."""
        problem = self.health_problem()
        if problem:
            return Refusal(BUSY, problem, retry_s=5).reply()
        return Reply(200, {"ok": True})

    def sweeper_is_late(self) -> bool:
        """Return whether nobody has swept for a minute."""
        return self.now_us() - self._swept_us > SWEEPER_LATE_US

    def document(self) -> dict[str, Any]:
        """Return what apps and people may know of this relay. PROTOCOL.md, "HTTP"."""
        return describe(self.about, self.limits, self.access.public, turn=self.turn is not None)

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

    def sweep_age_s(self) -> int:
        """Return the whole seconds since the last sweep."""
        return (self.now_us() - self._swept_us) // SECOND_US


# ---------------------------------------------------------------------------------------
# HTTP: RFC 9112 as far as a relay needs it, read strictly, so that no proxy before us can
# see another request than we do. Pure functions from bytes to requests, replies to bytes.
# ---------------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = _TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*\r\n"
_REQUEST_LINE = rb"(" + _TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n"
_HEAD = re.compile(_REQUEST_LINE + rb"(?:" + _FIELD + rb")*\r\n")
# What can never become a head. TLS, for one, has a NUL at once.
_HOPELESS = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n|\Z)")
_LENGTH = re.compile(rb"[0-9]{1,9}")
_AUTHORITY = re.compile(r"\Ahttps?://[^/?]*", re.IGNORECASE)
# The headers that the relay uses; only to be searched in what _HEAD has matched. Spaces
# around a value are stripped later: to match them here would take time by the square of
# their number.
_USED_FIELD = re.compile(
    rb"\n(?i:(Accept|Connection|Content-Length|Expect|Transfer-Encoding|X-Forwarded-For))"
    rb":([^\r]*)\r")
_METHODS = {
    "/": "GET, HEAD, POST, OPTIONS",
    "/health": "GET, HEAD, OPTIONS",
    "/metrics": "GET, HEAD, OPTIONS",
}
HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Lines of headers.
CLOSE = b"Connection: close\r\n"
JSON = b"Content-Type: application/json\r\n"
CORS = b"Access-Control-Allow-Origin: *\r\n"
VARY = b"Vary: Accept\r\n"
PREFLIGHT = (
    b"Access-Control-Allow-Methods: GET, POST, OPTIONS\r\n"
    b"Access-Control-Allow-Headers: Content-Type\r\n"
    b"Access-Control-Max-Age: 86400\r\n")
# Nothing of the page comes from anywhere else or runs, whatever its host has written.
GUARDED = (
    b"Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n"
    b"X-Content-Type-Options: nosniff\r\n")
NO_CONTENT = Reply(204, Text("", ""))
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")
    for status in HTTPStatus}
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

    So many bytes were searched before: a client that sends byte by byte has none of them
    read again.
    """
    end = incoming.find(HEAD_END, max(0, searched - len(HEAD_END) + 1))
    size = len(incoming)
    if end >= 0:
        size = end + len(HEAD_END)
    if size > limits.max_header_bytes:
        raise Refusal(HEADERS_TOO_BIG, f"More than {limits.max_header_bytes} bytes of headers.")
    if end < 0:
        if _HOPELESS.search(incoming, max(0, searched - 1)):
            raise Refusal(BAD_REQUEST, "This is not HTTP/1.1.")
        return None
    octets = bytes(incoming[:size])
    del incoming[:size]
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
        key = name.lower()
        text = value.strip(b" \t")
        if key in headers:
            # RFC 9110, section 5.3.
            text = headers[key] + b"," + text
        headers[key] = text
    if b"transfer-encoding" in headers:
        raise Refusal(BAD_REQUEST, "Send a Content-Length; Transfer-Encoding is not taken.")
    length = headers.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise Refusal(BAD_REQUEST, "Send one Content-Length of 1 to 9 digits.")
    method, target, minor = match.groups()
    is_newest = minor == b"1"
    return Head(
        method=method.decode("ascii"),
        path=_AUTHORITY.sub("", target.decode("ascii"), count=1).partition("?")[0] or "/",
        length=int(length),
        keep_alive=is_newest and b"close" not in headers.get(b"connection", b"").lower(),
        expects_continue=is_newest and headers.get(b"expect", b"").lower() == b"100-continue",
        wants_json=b"application/json" in headers.get(b"accept", b""),
        forwarded_for=headers.get(b"x-forwarded-for", b"").decode("latin-1"),
    )


def encode_json(value: object) -> bytes:
    """Return JSON, with an end of line for curl; the most frequent reply stands ready."""
    if value == FOUND_NOTHING:
        return FOUND_NOTHING_JSON
    return json.dumps(value).encode("ascii") + b"\n"


def respond(reply: Reply, head: Head | None) -> tuple[bytes, bytes]:
    """Return the lines of headers and the body of a reply; the head is None if there was none.

    `retry` is also a header.
    """
    if reply.status == HTTPStatus.NO_CONTENT:
        return CORS + PREFLIGHT, b""
    if isinstance(reply.body, Text):
        body = reply.body.text.encode("utf-8")
        media_type = reply.body.media_type.encode("ascii")
        headers = CORS + b"Content-Type: %s\r\n" % media_type + GUARDED
    else:
        body = encode_json(reply.body)
        headers = CORS + JSON
        if isinstance(reply.body, dict) and "retry" in reply.body:
            headers += b"Retry-After: %d\r\n" % reply.body["retry"]
    if reply.status == HTTPStatus.METHOD_NOT_ALLOWED and head:
        headers += b"Allow: %s\r\n" % _METHODS[head.path].encode("ascii")
    if head and head.method != "POST" and head.path == "/":
        headers += VARY
    headers += b"Content-Length: %d\r\n" % len(body)
    if head and head.method == "HEAD":
        return headers, b""
    return headers, body


def render(reply: Reply, head: Head | None = None, *, last: bool = True) -> bytes:
    """Return a whole reply to a request, or to None, which was not read to its end.

    After the last one we close. There is no Date: the relay has no clock that it would
    swear by.
    """
    headers, body = respond(reply, head)
    if last:
        headers += CLOSE
    return b"%s%s\r\n%s" % (STATUS_LINES[reply.status], headers, body)


class Front(NamedTuple):
    """What a front tells of itself in the document and in the metrics."""

    udp: bool = False
    stun: bool = False
    gauges: Callable[[], Mapping[str, int]] = dict


class Call(NamedTuple):
    """An HTTP request that is here whole: from which source, and at which front."""

    head: Head
    body: bytes
    source: str
    front: Front


class View(NamedTuple):
    """Something for people or monitors that is still to be made: the path says what."""

    path: str
    front: Front


def route(relay: Relay, call: Call) -> Outcome | View:
    """Return what an HTTP request comes to. Never blocks or raises.

    What is neither a Reply nor a Wait is left to `complete`.
    """
    head = call.head
    if head.method == "OPTIONS":
        return NO_CONTENT
    if head.path not in _METHODS:
        return relay.refuse(Refusal(NOT_FOUND))
    if head.method == "POST" and head.path == "/":
        return relay.begin(call.body, call.source)
    if head.method == "POST" or head.method not in _METHODS[head.path].split(", "):
        return relay.refuse(Refusal(NOT_ALLOWED))
    return _look_at(relay, call)


def _look_at(relay: Relay, call: Call) -> Reply | View:
    """Return what people or monitors ask for, or what is still to be made of it."""
    head = call.head
    try:
        # Monitors ask for /health often, and all sources must have it.
        if head.path != "/health":
            relay.admit(call.source)
    except Exception as error:
        return relay.refuse(error)
    if head.path == "/" and head.wants_json:
        return Reply(200, document_of(relay, call.front))
    return View(head.path, call.front)


def complete(relay: Relay, outcome: Call | View | Outcome) -> Reply | Wait:
    """Do all of a call, or what `route` has left to do; may block. Never raises."""
    if isinstance(outcome, Call):
        outcome = route(relay, outcome)
    if not isinstance(outcome, View):
        return relay.perform(outcome)
    try:
        return show(relay, outcome)
    except Exception as error:
        return relay.refuse(error)


def show(relay: Relay, view: View) -> Reply:
    """Return what people and monitors see; may block."""
    if view.path == "/health":
        return relay.health()
    if view.path == "/metrics":
        gauges = {**samples_of(relay), **name_gauges(view.front.gauges())}
        return Reply(200, Text(METRICS_TYPE, render_metrics(gauges)))
    return Reply(200, Text(HTML_TYPE, render_page(relay, document_of(relay, view.front))))


def document_of(relay: Relay, front: Front) -> dict[str, Any]:
    """Return what apps may know of a relay and its front."""
    return relay.document() | {"udp": front.udp, "stun": front.stun}


def name_gauges(gauges: Mapping[str, int]) -> dict[Sample, int]:
    """Return gauges under their names in METRICS."""
    return {(f"connectoid_{name}", ""): number for name, number in gauges.items()}


def samples_of(relay: Relay) -> dict[Sample, int]:
    """Return the metrics that the core knows, without those of a store that fails; may block."""
    gauges = {
        "healthy": int(not relay.health_problem()),
        "uptime_seconds": relay.uptime_s(),
        "sweep_age_seconds": relay.sweep_age_s(),
    }
    stored = relay.stored()
    if stored:
        gauges["messages"] = stored.messages
        gauges["message_bytes"] = stored.bytes
        gauges["boxes"] = stored.boxes
    samples = {**relay.counts.taken(), **name_gauges(gauges)}
    for name, limit in relay.limits._asdict().items():
        samples["connectoid_limit", name] = limit
    samples["connectoid_info", __version__] = 1
    return samples


def render_metrics(samples: Mapping[Sample, int]) -> str:
    """Return samples in Prometheus's text format 0.0.4, in the order of METRICS."""
    lines = []
    for name, metric in METRICS.items():
        found = {value: number for (of, value), number in samples.items() if of == name}
        if found:
            lines += [f"# HELP {name} {metric.meaning}", f"# TYPE {name} {metric.type}"]
        for value, number in found.items():
            label = f'{{{metric.label}="{value}"}}' if metric.label else ""
            lines.append(f"{name}{label} {number}")
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
:root {{ color-scheme: light dark; --paper: #fcfcfa; --ink: #1d2124; --soft: #596168;
  --line: #dddfdc; --note: #f5efdd; --link: #2f756c; --well: #1f6d43; --unwell: #a8321f }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #15181a; --ink: #e3e5e6; --soft: #9ea6ac;
  --line: #343a3e; --note: #2b2719; --link: #6fb5aa; --well: #7cc79b; --unwell: #f19480 }} }}
body {{ margin: 0 auto; max-width: 48rem; padding: 2.5rem 1.25rem; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); font: 1.0625rem/1.55 system-ui, sans-serif }}
h1 {{ margin: 0; font-size: 1.9rem; line-height: 1.2 }}
h2 {{ margin: 0 0 .75rem; font-size: 1em }}
p {{ margin: 0 0 .75rem }} dl, figure {{ margin: 0 0 1.25rem }} h1 + p {{ margin-top: .4rem }}
aside {{ margin: 1rem 0; border-left: 4px solid; padding: .75rem 1rem; background: var(--note);
  white-space: pre-line }}
section {{ margin-top: 1.5rem; border-top: 1px solid var(--line); padding-top: 1.25rem }}
@media (min-width: 46rem) {{ section {{ display: grid; grid-template-columns: 11rem 1fr }} }}
dl {{ display: grid; grid-template-columns: 43% 1fr }} dt {{ padding-right: .75rem }}
dd {{ margin: 0 }}
dd ~ dt, dd ~ dd {{ margin-top: .4rem; border-top: 1px solid var(--line); padding-top: .4rem }}
svg {{ display: block; width: 100%; height: 4.5rem; margin: .5rem 0 .25rem;
  border-bottom: 1px solid var(--line) }}
h1 + p, dt, figure {{ color: var(--soft) }} a, svg {{ color: var(--link) }}
path {{ fill: currentColor }}
code {{ white-space: nowrap }} figure, code {{ font-size: .9em }} span + span {{ float: right }}
strong::before {{ content: ""; display: inline-block; border: .3em solid; margin-right: .55em }}
.well {{ color: var(--well) }} .well::before {{ border-radius: 50% }}
.unwell {{ color: var(--unwell) }} .unwell::before {{ transform: rotate(45deg) }}
</style>
<main><h1>{name}</h1><p>{description}</p>{notice}
<p><strong class="{health}">{state}</strong> Up for {uptime}.</p>
<section><h2>What it does</h2><div>
<p>It passes small messages between apps that are not online at the same time. A mailbox is a
public key. Apps seal their messages for it, so that only the holder of the private key can open
them.</p>
<p>The relay knows neither who writes nor what. It can delay or lose a message, and it sees which
mailboxes are used, when, and from which network addresses. Every message is deleted when its
time is over, read or not.</p></div></section>
<section><h2>Now</h2><div>{bars}<dl><dt>Messages<dd>{messages}<dt>Storage<dd>{used} of {room}
<dt>Mailboxes with a proven owner<dd>{boxes} of {limits[max_boxes]:,}</dl></div></section>
<section><h2>Limits</h2><dl><dt>Requests from one address<dd>{rate}
<dt>Connections at a time<dd>{connections}
<dt>Size of a message<dd>24 KiB (32,768 characters)
<dt>A message is kept<dd>{kept}, unless an API key says otherwise
<dt>Messages in a mailbox<dd>{limits[max_box_messages]:,}, at most {box}
<dt>An unused mailbox is kept<dd>{box_kept}
</dl></section>
<section><h2>About</h2><div><dl>{contact}{price}<dt>Checks over UDP<dd>{udp}<dt>STUN<dd>{stun}
<dt>TURN<dd>{turn}
<dt>Software<dd>{software} {version}</dl>
<p>Apps use <code>POST /</code>, and get this page as JSON with
<code>Accept: application/json</code>. Monitors use <code>GET /health</code> and
<code>GET /metrics</code>.</p></div></section></main>
</html>
"""
# Minutes that the picture of the traffic shows.
BARS = 60
# A bar for so many requests has the full height at least: a single one is no rush.
LEAST_FULL_BAR = 10
UNITS_OF_TIME = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
UNITS_OF_SIZE = ("bytes", "KiB", "MiB", "GiB", "TiB")


def render_page(relay: Relay, document: Mapping[str, Any]) -> str:
    """Return the page for people; may block."""
    texts = {name: html.escape(str(document[name] or ""))
             for name in ("name", "description", "software", "version")}
    limits = document["limits"]
    retention = document["retention"]
    return PAGE.format(
        **texts,
        **_describe_now(relay, limits),
        notice=_describe_notice(document["notice"]),
        contact=_describe_contact(document["contact"]),
        price=_describe_price(document["price_url"]),
        limits=limits,
        rate=_limit(limits["rate"], " a minute"),
        connections=_limit(limits["max_connections"]),
        box=_size(limits["max_box_bytes"]),
        kept=_span(retention["message"]),
        box_kept=_span(retention["box"]),
        udp=_switch(document["udp"]),
        stun=_switch(document["stun"]),
        turn=_switch(document["turn"]),
    )


def _describe_now(relay: Relay, limits: Mapping[str, int]) -> dict[str, str]:
    """Return the parts of the page that change all the time."""
    now = {
        "health": "well",
        "state": "All is well.",
        "uptime": _span(relay.uptime_s()),
        "bars": _bars(relay.traffic()),
        "room": _size(limits["max_bytes"]),
        "messages": "unknown",
        "boxes": "unknown",
        "used": "unknown",
    }
    problem = relay.health_problem()
    if problem:
        now["health"] = "unwell"
        now["state"] = html.escape(f"Not well: {problem}")
    stored = relay.stored()
    if stored:
        now["messages"] = f"{stored.messages:,}"
        now["boxes"] = f"{stored.boxes:,}"
        now["used"] = _size(stored.bytes)
    return now


def _describe_notice(notice: str | None) -> str:
    if not notice:
        return ""
    return f'\n<aside aria-label="Notice">{html.escape(notice)}</aside>'


def _describe_contact(contact: str | None) -> str:
    if not contact:
        return ""
    return f"<dt>Contact<dd>{_link(contact, contact.removeprefix('mailto:'))}\n"


def _describe_price(price_url: str | None) -> str:
    if not price_url:
        return ""
    return f"<dt>Prices<dd>{_link(price_url, 'What this relay costs')}\n"


def _limit(limit: int, unit: str = "") -> str:
    if not limit:
        return "no limit"
    return f"{limit:,}{unit}"


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _link(target: str, words: str) -> str:
    """Return a link to a web or mail address; anything else stays text.

    So no `javascript:` becomes a link.
    """
    url = target
    if re.fullmatch(r"[\w.+-]+@[\w.-]+", target):
        url = f"mailto:{target}"
    if not re.fullmatch(r"(https?://|mailto:)\S+", url):
        return html.escape(target)
    return f'<a href="{html.escape(url)}" rel="noreferrer">{html.escape(words)}</a>'


def _bars(traffic: Sequence[int]) -> str:
    """Return a picture of the last 60 minutes.

    A minute without requests has a dash, one before the start has nothing.
    """
    shown = traffic[-BARS:]
    most = max(shown, default=0)
    path = ""
    for x, requests in enumerate(shown, BARS - len(shown)):
        height = 1 + 2 * (requests > 0) + round(69 * requests / max(most, LEAST_FULL_BAR))
        path += f"M{10 * x} 72v-{height}h8v{height}z"
    words = "No requests in the last 60 minutes"
    if most:
        words = f"Requests per minute: peak {most:,}"
    return (
        f"<figure><figcaption>{words}</figcaption>\n"
        '<svg viewBox="0 0 598 72" preserveAspectRatio="none" '
        f'role="img" aria-label="{words}. One bar a minute."><path d="{path}"/></svg>\n'
        "<p><span>60 minutes ago</span><span>now</span></p></figure>\n")


def _span(seconds: int) -> str:
    """Return a time in its two largest units: 1 day 4 hours."""
    words = []
    for unit, unit_s in UNITS_OF_TIME:
        count, seconds = divmod(seconds, unit_s)
        if count == 1:
            words.append(f"1 {unit}")
        elif count:
            words.append(f"{count:,} {unit}s")
    return " ".join(words[:2]) or "0 seconds"


def _size(octets: int) -> str:
    """Return a size in the largest unit that it fills: 1.5 KiB."""
    power = min(max(octets.bit_length() - 1, 0) // 10, len(UNITS_OF_SIZE) - 1)
    return f"{round(octets / 1024**power, 1):g} {UNITS_OF_SIZE[power]}"


# ---------------------------------------------------------------------------------------
# UDP: one datagram with a check, one back, never longer, and STUN (RFC 8489) on the same
# port. Pure functions. Whatever is neither gets nothing, so that a forged sender gains
# nothing.
# ---------------------------------------------------------------------------------------

# More than any check needs.
MAX_DATAGRAM_BYTES = 2_048
STUN_COOKIE = 0x2112A442
STUN_COOKIE_OCTETS = STUN_COOKIE.to_bytes(4, "big")
# The first two bits of a STUN message are 0: RFC 8489, section 5.
STUN_FIRST_OCTETS = 0x40
# Type, length of the attributes, cookie, transaction.
STUN_HEADER = struct.Struct(">HHI12s")
# Type, length.
STUN_ATTRIBUTE = struct.Struct(">HH")
BINDING_REQUEST = 0x0001
BINDING_SUCCESS = 0x0101
XOR_MAPPED_ADDRESS = 0x0020
STUN_IPV4 = 1
STUN_IPV6 = 2
# Attributes from here on may be ignored.
COMPREHENSION_OPTIONAL = 0x8000


def is_stun(datagram: bytes) -> bool:
    """Return whether a datagram is STUN: two bits are 0 and the cookie is in its place."""
    if len(datagram) < STUN_HEADER.size or datagram[0] >= STUN_FIRST_OCTETS:
        return False
    return datagram[4:8] == STUN_COOKIE_OCTETS


def answer_stun(datagram: bytes, address: str, port: int) -> bytes | None:
    """Return the sender's address, as we see it, for a Binding request; None for anything else.

    A request that needs an attribute understood gets nothing either: an error (RFC 8489,
    section 6.3.1) would help nobody but a forger.
    """
    kind, length, cookie, transaction = STUN_HEADER.unpack_from(datagram)
    if kind != BINDING_REQUEST or length != len(datagram) - STUN_HEADER.size:
        return None
    if not _may_be_ignored(datagram):
        return None
    family, octets = _pack_address(address)
    mask = STUN_COOKIE_OCTETS + transaction
    hidden = bytes(octet ^ key for octet, key in zip(octets, mask, strict=False))
    value = struct.pack(">xBH", family, port ^ STUN_COOKIE >> 16) + hidden
    attribute = STUN_ATTRIBUTE.pack(XOR_MAPPED_ADDRESS, len(value)) + value
    header = STUN_HEADER.pack(BINDING_SUCCESS, len(attribute), cookie, transaction)
    return header + attribute


def _pack_address(address: str) -> tuple[int, bytes]:
    """Return STUN's family and the bytes of an address; IPv4 in IPv6 is IPv4."""
    if ":" not in address:
        return STUN_IPV4, socket.inet_aton(address)
    octets = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    if octets.startswith(IPV4_MAPPED):
        return STUN_IPV4, octets[len(IPV4_MAPPED):]
    return STUN_IPV6, octets


def _may_be_ignored(datagram: bytes) -> bool:
    """Return whether all attributes of a request are whole and may be ignored."""
    place = STUN_HEADER.size
    while place + STUN_ATTRIBUTE.size <= len(datagram):
        kind, length = STUN_ATTRIBUTE.unpack_from(datagram, place)
        if kind < COMPREHENSION_OPTIONAL:
            return False
        padding = -length % 4
        place += STUN_ATTRIBUTE.size + length + padding
    return place == len(datagram)


def answer_datagram(relay: Relay, datagram: bytes, source: str = "") -> bytes | None:
    """Return the reply to a datagram with a check, or None for none. PROTOCOL.md, "UDP"."""
    if len(datagram) > MAX_DATAGRAM_BYTES or not relay.admit_datagram(source):
        return None
    try:
        request = parse_json(datagram)
        if not isinstance(request, dict):
            return None
        found = "true" if relay.check_udp(request) else "false"
        ending = ""
        if "id" in request:
            ending = f', "id": "{read(request, "id")}"'
    except (Refusal, StoreError):
        return None
    octets = f'{{"ok": true, "found": {found}{ending}}}'.encode("ascii")
    if len(octets) > len(datagram):
        return None
    return octets


# ---------------------------------------------------------------------------------------
# The server: one loop for all sockets, a pool of threads for what blocks.
#
# Threads. The loop is the thread that is in `serve_forever`. It owns every socket and all
# that is noted of clients, so none of that needs a lock. POOL_THREADS threads are the
# pool: they perform what may wait for the disk, a seal, a long parse or a handshake. One
# more thread sweeps. Other threads and signal handlers reach the loop through `soon`.
#
# What may block. Nothing on the loop. It waits in `select` alone, reads 64 KiB at most
# from a socket at a time, and looks into the store, which takes microseconds. A store
# across a network is `remote`: then every request goes to the pool whole.
#
# The life of a connection. `process_request` makes a Connection. Its `converse` is a
# generator: it yields the events that it waits for (READ, WRITE, or NOTHING while the pool
# works for it), and goes on with a Wake, which says why. So the whole talk with a client
# reads from top to bottom, and a client that is idle, slow or waiting costs some memory
# and no thread. A deadline is a number on the connection; the loop looks at all of them
# four times a second. A generator that ends or raises OSError closes its connection.
#
# The life of a request. `read_request` tries what has come in before it waits for more:
# most requests are here whole. `route` answers it on the loop, or returns what is left.
# That goes to the pool as a task, and comes back through the pool's queue `done` and a
# byte from the bell, which ends `select`. In the pool the sources take turns, so that one
# of them with many requests waits for itself alone.
#
# The life of a wait. A connection with a Wait enters the waiting room under its boxes and
# watches its socket. It is woken by the first of three. MESSAGE: the loop asks the core
# for `arrivals`, after each task and with each tick, and finds one of its boxes there.
# READY: the client talks on or hangs up. LATE: the time is over. A message that comes
# between the look and the wait is not lost: `cursor_us` says up to which messages the look
# has seen all, and `arrivals` is asked from there before the connection is parked.
#
# Budgets. What a stranger can make us hold is bounded before it costs: connections and
# buffered bytes in all and for each source, boxes waited for, tasks in the pool. Whatever
# finds no room gets "Busy" and when to try again.
#
# The end. `stop` closes the listening socket, lets idle connections go and answers the
# waiting ones. What is under way has DRAIN_S seconds.
# ---------------------------------------------------------------------------------------

NOTHING = 0
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
NEVER_S = float("inf")

_T = TypeVar("_T")


class Wake(enum.Enum):
    """Say why a connection goes on."""

    # Its socket can be read or written, as it asked for.
    READY = "ready"
    # A box that it waits for has got a message.
    MESSAGE = "message"
    # The pool has done its task: there is a result.
    DONE = "done"
    # Its deadline has come.
    LATE = "late"


# What a method of Connection is that may wait: it yields events and returns a result.
_Steps: TypeAlias = Generator[int, Wake | None, _T]


class _Task(NamedTuple):
    """A call for the pool, and the connection that waits for its result."""

    connection: Connection
    call: Callable[..., Any]
    arguments: tuple[Any, ...]


class _Turns:
    """Tasks for the threads. Customers take turns: one with many tasks waits for itself alone.

    A customer is a source, and a whole /48 of IPv6. When all places are taken, a customer may
    still have its equal share of them: so there are at most twice as many.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._taken = 0
        self._lock = threading.Lock()
        self._tasks: dict[Hashable, collections.deque[_Task]] = {}
        # Each customer with tasks, once.
        self._next: queue.SimpleQueue[Hashable | None] = queue.SimpleQueue()

    def __len__(self) -> int:
        return self._taken

    def put(self, source: str, task: _Task) -> bool:
        """Queue a task of a source, or return False if there is no place for it."""
        customer = customer_of(source)
        with self._lock:
            own = self._tasks.get(customer)
            if self._taken >= self._places and not self._has_share(own):
                return False
            if own is None:
                own = collections.deque()
                self._tasks[customer] = own
                self._next.put(customer)
            own.append(task)
            self._taken += 1
            return True

    def _has_share(self, own: collections.deque[_Task] | None) -> bool:
        """Return whether a customer with these tasks has less than its share of the places."""
        share = self._places // (len(self._tasks) + (own is None))
        return len(own or ()) < share and self._taken < 2 * self._places

    def get(self) -> _Task | None:
        """Return the next task, as soon as there is one; None is the end."""
        customer = self._next.get()
        if customer is None:
            return None
        with self._lock:
            tasks = self._tasks[customer]
            task = tasks.popleft()
            self._taken -= 1
            if tasks:
                self._next.put(customer)
            else:
                del self._tasks[customer]
            return task

    def end(self) -> None:
        """Have one thread told that this is the end, after what has its turn before."""
        self._next.put(None)


class _Bell:
    """End the loop's `select`, from any thread or signal handler.

    However often it rings, one byte is under way.
    """

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._has_rung = False

    def ring(self) -> None:
        """Wake the loop, if that is not done yet."""
        if self._has_rung:
            return
        self._has_rung = True
        # OSError: the server is closed.
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def silence(self) -> None:
        """Take the byte back. Call it before looking at what it was rung for."""
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(RECV_BYTES)
        self._has_rung = False

    def close(self) -> None:
        """Close both ends."""
        self.reader.close()
        self._writer.close()


class _Pool:
    """Threads for what may block. The loop puts tasks in and takes results out of `done`."""

    def __init__(self, places: int, bell: _Bell) -> None:
        self._bell = bell
        self._turns = _Turns(places)
        self._threads: list[threading.Thread] = []
        self.done: collections.deque[tuple[Connection, Any]] = collections.deque()

    def __len__(self) -> int:
        return len(self._turns)

    def put(self, source: str, task: _Task) -> bool:
        """Queue a task of a source, or return False if there is no place for it."""
        return self._turns.put(source, task)

    def start(self) -> None:
        """Start the threads."""
        for _ in range(POOL_THREADS):
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, by_s: float) -> None:
        """Let the threads end when all is done, but wait no longer than to a monotonic time."""
        for _ in self._threads:
            self._turns.end()
        for thread in self._threads:
            thread.join(max(0.0, by_s - time.monotonic()))

    def _work(self) -> None:
        """Do one task after another: the body of each thread."""
        while (task := self._turns.get()) is not None:
            try:
                result = task.call(*task.arguments)
            except Exception:
                # None does; but a thread less would be for good.
                log.exception("a task failed; please report this")
                result = None
            self.done.append((task.connection, result))
            # A parsed request may be large, and the next task far.
            del task, result
            self._bell.ring()


class _Tally:
    """Add something up for each source, for the networks around it, and for all of them."""

    def __init__(self) -> None:
        self.total = 0
        self._sums: dict[Hashable, int] = {}

    def add(self, source: str, change: int) -> None:
        """Change a source's sum. A source with nothing leaves nothing behind."""
        self.total += change
        self._add(source, change)
        for network, _ in networks_of(source):
            self._add(network, change)

    def _add(self, key: Hashable, change: int) -> None:
        left = self._sums.get(key, 0) + change
        if left:
            self._sums[key] = left
        else:
            self._sums.pop(key, None)

    def is_over(self, source: str, limit: int, more: int = 0) -> bool:
        """Return whether this much more would be too much for a source or a network around it."""
        if self._sums.get(source, 0) + more > limit:
            return True
        networks = networks_of(source)
        if not networks:
            return False
        return any(
            self._sums.get(network, 0) + more > limit * times for network, times in networks)


class _WaitingRoom:
    """Know which connections wait for which boxes; a limit of 0 places is none."""

    def __init__(self, places: int, places_per_source: int) -> None:
        self._places = places
        self._places_per_source = places_per_source
        self._waiting: dict[bytes, set[Connection]] = {}
        self._taken = _Tally()

    @property
    def taken(self) -> int:
        """Return how many places are taken."""
        return self._taken.total

    def has_room(self, source: str, boxes: frozenset[bytes]) -> bool:
        """Return whether there are places for so many more boxes of a source."""
        more = len(boxes)
        if 0 < self._places < self.taken + more:
            return False
        own = self._places_per_source
        return not own or not self._taken.is_over(source, own, more)

    def enter(self, connection: Connection, source: str, boxes: frozenset[bytes]) -> None:
        """Note that a connection waits for boxes."""
        self._taken.add(source, len(boxes))
        for box in boxes:
            self._waiting.setdefault(box, set()).add(connection)

    def leave(self, connection: Connection, source: str, boxes: frozenset[bytes]) -> None:
        """Note that it no longer does."""
        self._taken.add(source, -len(boxes))
        for box in boxes:
            self._waiting[box].discard(connection)
            if not self._waiting[box]:
                del self._waiting[box]

    def waiting_for(self, box: bytes) -> Sequence[Connection]:
        """Return the connections that wait for a box now."""
        return tuple(self._waiting.get(box, ()))


def load_tls(certificate: str, key: str) -> ssl.SSLContext:
    """Return what TLS needs, from PEM files: the chain and its private key. Raises SettingError."""
    # The words of ssl name no file.
    if b"BEGIN CERTIFICATE" not in _read_octets(certificate):
        raise SettingError(f"{certificate} has no certificate in it; give it as PEM")
    if b"PRIVATE KEY" not in _read_octets(key):
        raise SettingError(f"{key} has no private key in it; give it as PEM")
    # TLS 1.2 or newer.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except OSError as error:
        # Most are SSLError. A file may also have gone meanwhile.
        raise _tls_mistake(certificate, key, error) from None
    return context


def _no_passphrase() -> bytes:
    """Return no passphrase: nobody is here to be asked."""
    return b""


def _tls_mistake(certificate: str, key: str, error: OSError) -> SettingError:
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return SettingError(
            f"{key} is not the key of {certificate}; give the two that belong together")
    mend = ""
    if b"ENCRYPTED" in _read_octets(key):
        mend = "without a passphrase, "
    return SettingError(
        f"{certificate} or {key} cannot be used; give a chain of certificates and its private"
        f" key, {mend}both as PEM")


class _TlsSocket:
    """TLS on a socket that does not block, with the methods of a socket that we use.

    OpenSSL itself reads as long as there is something: a flood of records without any
    content (KeyUpdate) would hold the loop for seconds. So it gets its octets from us, few
    in a turn, and a client that sends many more than it has to say is cut off.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self.connection = connection
        self.fileno = connection.fileno
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        # What the kernel has not taken of a send of so many bytes.
        self._unsent = b""
        self._taken = 0
        self._spare_bytes = TLS_SPARE_BYTES

    def shake_hands(self) -> int | None:
        """Do what can be done of the handshake now.

        Return the events it waits for, None if it has failed.
        """
        try:
            if self._feed():
                return None
            events = NOTHING
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                events = READ
            if not self._has_flushed():
                return WRITE
        except (OSError, ValueError):
            # ValueError: it is closed.
            return None
        return events

    def recv(self, size: int) -> bytes:
        """Return what has come in, nothing at its end.

        Raises BlockingIOError if that is nothing yet, ConnectionError for a flood.
        """
        received = b""
        ended = self._feed()
        try:
            while chunk := self._tls.read(size):
                received += chunk
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        # What OpenSSL answers by itself.
        self._has_flushed()
        if not (received or ended):
            raise BlockingIOError
        self._spare_bytes += TLS_OVERHEAD * len(received)
        return received

    def send(self, octets: memoryview | bytes, _flags: int = 0) -> int:
        """Return how many bytes have gone out.

        Raises BlockingIOError, after which the same must be sent again.
        """
        if not self._taken:
            self._taken = self._tls.write(octets[:TLS_RECORD_BYTES])
        self._flush()
        taken = self._taken
        self._taken = 0
        return taken

    def end(self) -> socket.socket:
        """Say that nothing follows; return the bare socket.

        So the client knows that nothing was cut off.
        """
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
            sent = self.connection.send(self._unsent)
            self._unsent = self._unsent[sent:]

    def _has_flushed(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._flush()
        return not self._unsent


class Connection:
    """A client: its socket, what came in and is not used yet, and where its talk is.

    The server calls `go_on` and `close`. The rest is `converse`, from top to bottom.
    """

    __slots__ = (
        "address", "counted", "cursor_us", "deadline_s", "events", "held", "idle", "incoming",
        "is_proxy", "result", "server", "socket", "source", "steps")

    def __init__(self, server: RelayServer, connection: socket.socket, address: str) -> None:
        self.server = server
        self.socket: socket.socket | _TlsSocket = connection
        self.address = address
        self.source = source_of(address)
        # One that we trust: its clients are many.
        self.is_proxy = address in server.proxies
        # What the selector watches for.
        self.events = NOTHING
        self.incoming = bytearray()
        # Bytes kept from one turn to another.
        self.held = 0
        self.deadline_s = NEVER_S
        # Whether it is among the connections: a refused one no longer is.
        self.counted = False
        # Nothing is lost if it is timed out now.
        self.idle = False
        # Up to which messages its check has certainly seen all.
        self.cursor_us = 0
        # Of its task in the pool.
        self.result: Any = None
        self.steps = self.converse()

    def go_on(self, wake: Wake | None = None) -> None:
        """Go on until it waits again; None begins. Whatever goes wrong ends it alone."""
        try:
            self.server.watch(self, self.steps.send(wake))
        except (StopIteration, OSError):
            self.server.close_connection(self)
        except Exception:
            log.exception("a connection failed; please report this")
            self.server.close_connection(self)

    def close(self) -> None:
        """Give back all that it holds."""
        self.steps.close()
        self._hold(0)
        self._end_tls().close()

    def converse(self) -> _Steps[None]:
        """Answer requests until one side has enough."""
        server = self.server
        try:
            server.check_room(self)
            yield from self._shake_hands()
            last = False
            while not last:
                head = yield from self.read_request()
                reply = yield from self._answer(head)
                last = server.stopping or not head.keep_alive
                unsent = self._push(render(reply, head, last=last), last)
                # A client that is idle does not keep its reply.
                del reply
                if unsent:
                    yield from self._send(unsent)
                if self.incoming and not last:
                    # The next request is here, but the others have a turn first.
                    self.deadline_s = server.now_s + server.limits.idle_timeout_s
                    yield from self._until(WRITE)
            # To close while something is unread would throw away what the kernel still
            # holds of the reply.
            self._end_tls().shutdown(socket.SHUT_WR)
        except Refusal as refusal:
            yield from self._refuse(refusal)

    def _until(self, events: int) -> _Steps[None]:
        """Wait for the socket; raise TimeoutError at the deadline."""
        if (yield events) is Wake.LATE:
            raise TimeoutError

    # Reading

    def _shake_hands(self) -> _Steps[None]:
        """Begin TLS, if that is what we speak; the pool does what costs time."""
        server = self.server
        if not server.tls or isinstance(self.socket, _TlsSocket):
            return
        deadline_s = server.now_s + server.limits.request_timeout_s
        self.deadline_s = deadline_s
        self.idle = True
        # A client that says nothing costs nothing.
        yield from self._until(READ)
        if not self.is_proxy and server.takes_no_handshake(self.source):
            raise ConnectionAbortedError
        tls = _TlsSocket(self.socket, server.tls)
        self.socket = tls
        while events := (yield from self._in_pool(self.source, tls.shake_hands)):
            self.idle = True
            self.deadline_s = deadline_s
            yield from self._until(events)
        if events is None:
            server.relay.counts.add("connectoid_handshakes_total", "failed")
            raise ConnectionAbortedError
        server.relay.counts.add("connectoid_handshakes_total", "done")

    def _end_tls(self) -> socket.socket:
        """Return the socket, without TLS from now on."""
        if isinstance(self.socket, _TlsSocket):
            self.socket = self.socket.end()
        return self.socket

    def read_request(self) -> _Steps[Head]:
        """Return the head of the next request as soon as its body is in `incoming`.

        What has come in is tried before anything is waited for. Raises Refusal, or
        TimeoutError when nothing of a request came in time.
        """
        limits = self.server.limits
        head: Head | None = None
        searched = 0
        begun = False
        while True:
            if self.incoming and not head:
                head = take_head(self.incoming, limits, searched)
                searched = len(self.incoming)
                if head and head.expects_continue and searched < head.length:
                    self.socket.send(CONTINUE)
            if head and len(self.incoming) >= head.length:
                self.idle = False
                return head
            if self._receive():
                continue
            self._bear(len(self.incoming))
            if not begun and (head or self.incoming):
                begun = True
                self.idle = False
                self.deadline_s = self.server.now_s + limits.request_timeout_s
            elif not begun and not self.idle:
                self.idle = True
                self.deadline_s = self.server.now_s + limits.idle_timeout_s
            if (yield READ) is Wake.LATE:
                if begun:
                    raise Refusal(TOO_SLOW, f"A request may take {limits.request_timeout_s} s.")
                raise TimeoutError

    def _receive(self) -> bool:
        """Take what has come in, if anything; raise ConnectionError when there will be no more."""
        try:
            chunk = self.socket.recv(RECV_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            raise ConnectionAbortedError
        self.incoming += chunk
        return True

    def _take_body(self, head: Head) -> bytes:
        body = bytes(self.incoming[:head.length])
        del self.incoming[:head.length]
        # What is left is of further requests.
        self._bear(len(self.incoming))
        return body

    def _bear(self, size: int) -> None:
        """Hold so many bytes, or raise Refusal."""
        if not self._hold(size):
            raise Refusal(BUSY, "Too much is under way.", retry_s=5)

    def _hold(self, size: int) -> bool:
        """Note how many bytes we hold for the client.

        Return whether we can bear that, from this source too.
        """
        if size == self.held:
            return True
        self.server.held.add(self.source, size - self.held)
        self.held = size
        return self.server.can_hold(self)

    # Answering

    def _answer(self, head: Head) -> _Steps[Reply]:
        """Return the reply to a request that is here whole, when all is done and waited for."""
        server = self.server
        source = self.source
        if self.is_proxy:
            source = client_of(self.address, head.forwarded_for, server.proxies)
        self.cursor_us = server.cursor_us
        call = Call(head, self._take_body(head), source, server.front)
        outcome: Call | View | Outcome = call
        if not server.remote:
            outcome = route(server.relay, call)
        # It may be large, and a wait is long.
        del call
        wait: Wait | None = None
        until_s = 0.0
        while not isinstance(outcome, Reply):
            if isinstance(outcome, Wait):
                if not wait:
                    until_s = server.now_s + outcome.seconds
                wait = outcome
                outcome = yield from self._wait(source, wait, until_s)
                continue
            done = yield from self._in_pool(source, complete, server.relay, outcome)
            outcome = done or self._overload_reply(wait)
        return outcome

    def _overload_reply(self, wait: Wait | None) -> Reply:
        """Return what a client is told for whose request the pool has no place."""
        if wait:
            return wait.reply
        refusal = Refusal(BUSY, "Too many requests at once.", retry_s=2)
        return self.server.relay.refuse(refusal)

    def _in_pool(self, source: str, call: Callable[..., _T], *arguments: Any) -> _Steps[_T | None]:
        """Return what a call that may take long returns; None if too many are in the queue."""
        if not self.server.pool.put(source, _Task(self, call, arguments)):
            return None
        self.idle = False
        self.deadline_s = NEVER_S
        yield NOTHING
        result: _T = self.result
        self.result = None
        return result

    def _wait(self, source: str, wait: Wait, until_s: float) -> _Steps[Outcome]:
        """Hold a source's long poll until one of its boxes gets a message; return how to go on."""
        server = self.server
        boxes = wait.boxes
        if server.stopping or self.incoming or until_s - TICK_S <= server.now_s:
            return wait.reply
        if not server.waiting.has_room(source, boxes):
            return wait.reply
        # What came between the look and now would else be seen only at the next check.
        self.cursor_us, arrived = server.relay.arrivals(self.cursor_us)
        if not arrived.isdisjoint(boxes):
            return wait.requests
        self.idle = True
        self.deadline_s = until_s - TICK_S
        server.waiting.enter(self, source, boxes)
        try:
            wake = yield READ
            # With TLS there may be octets that say nothing.
            while wake is Wake.READY and not self._receive():
                wake = yield READ
        finally:
            self.idle = False
            server.waiting.leave(self, source, boxes)
        if wake is not Wake.MESSAGE:
            return wait.reply
        if server.remote or isinstance(wait.requests, Batch):
            return wait.requests
        # A single check looks at once: a flood of messages to one box takes no places in
        # the queue.
        return server.relay.look(wait.requests)

    def _push(self, octets: bytes | memoryview, last: bool) -> bytes | memoryview:
        """Send what the kernel takes now and return the rest.

        With the last of all goes the end of the connection, in one packet.
        """
        flags = MSG_MORE if last else 0
        try:
            return octets[self.socket.send(octets, flags):]
        except BlockingIOError:
            return octets

    def _send(self, unsent: bytes | memoryview) -> _Steps[None]:
        """Send a reply, or the rest of one, as fast as the client takes it."""
        self.deadline_s = self.server.now_s + self.server.limits.idle_timeout_s
        while unsent := self._push(memoryview(unsent), False):
            if not self._hold(len(unsent) + len(self.incoming)):
                raise ConnectionAbortedError
            yield from self._until(WRITE)
        self._hold(len(self.incoming))

    def _refuse(self, refusal: Refusal) -> _Steps[None]:
        """Answer a request that was not read to its end; take what still comes, and close."""
        server = self.server
        self.idle = False
        server.count(self, False)
        is_crowded = server.count_refused() > MAX_LINGERING
        if server.tls and is_crowded:
            # To tell them would cost a handshake each.
            return
        yield from self._shake_hands()
        yield from self._send(render(server.relay.refuse(refusal)))
        if is_crowded:
            return
        # Closing now would send a reset, which overtakes the reply.
        self._end_tls().shutdown(socket.SHUT_WR)
        self.incoming.clear()
        self.deadline_s = server.now_s + LINGER_S
        dropped = 0
        while dropped < LINGER_BYTES:
            yield from self._until(READ)
            size = len(self.socket.recv(RECV_BYTES))
            if not size:
                return
            dropped += size


# Linux's, in ip(7): Python names it since 3.14, and other systems have another.
IP_PKTINFO = 8
# What the kernel tells beside a datagram: an address of IPv6 and an interface, or less.
PACKET_INFO_BYTES = 16 + 4
# The routes say through which interface a reply goes: it need not be the one of the request.
ANY_INTERFACE = bytes(4)


def _ask_for_packet_info(udp: socket.socket) -> bool:
    """Have the kernel tell the address that each datagram came to; return whether it will.

    A socket that is bound to one address replies from it anyhow, and saves 1.6 us a check.
    """
    if not ipaddress.ip_address(udp.getsockname()[0]).is_unspecified:
        return False
    level, option = socket.IPPROTO_IP, IP_PKTINFO
    if udp.family == socket.AF_INET6:
        level, option = socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO
    elif sys.platform != "linux":
        return False
    # A kernel without it chooses the address itself.
    with contextlib.suppress(OSError):
        udp.setsockopt(level, option, 1)
        return True
    return False


def _from_asked_address(told: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Return what has a reply come from the address that a datagram went to."""
    for level, kind, octets in told:
        # RFC 3542, section 6.1: the address, then the interface. An IPv4 address is mapped.
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return [(level, kind, octets[:16] + ANY_INTERFACE)]
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            # The interface, then our address.
            return [(level, kind, ANY_INTERFACE + octets[4:])]
    return []


class _DatagramFront:
    """Answer what comes to a UDP socket, from the address that was asked.

    A machine may have several, and a client drops what another one says.
    """

    def __init__(self, udp: socket.socket, relay: Relay, front: Front) -> None:
        self.socket = udp
        self._is_told = _ask_for_packet_info(udp)
        self._relay = relay
        self._front = front

    def answer_some(self) -> None:
        """Answer what is there, up to DATAGRAM_BATCH."""
        counted: collections.Counter[str] = collections.Counter()
        # OSError: there are no more, or one cannot be answered.
        with contextlib.suppress(OSError), self._relay.snapshot():
            for _ in range(DATAGRAM_BATCH):
                if self._is_told:
                    datagram, told, _, address = self.socket.recvmsg(
                        MAX_DATAGRAM_BYTES + 1, socket.CMSG_SPACE(PACKET_INFO_BYTES))
                else:
                    datagram, address = self.socket.recvfrom(MAX_DATAGRAM_BYTES + 1)
                kind, reply = self._answer(datagram, *address[:2])
                if not reply:
                    counted["none"] += 1
                    continue
                counted[kind] += 1
                if self._is_told:
                    self.socket.sendmsg((reply,), _from_asked_address(told), 0, address)
                else:
                    self.socket.sendto(reply, address)
        for kind, count in counted.items():
            self._relay.counts.add("connectoid_datagrams_total", kind, count)

    def _answer(self, datagram: bytes, address: str, port: int) -> tuple[str, bytes | None]:
        """Return what a datagram is, and the reply to it, if any."""
        source = source_of(address)
        if is_stun(datagram):
            if self._front.stun and self._relay.admit_datagram(source):
                return "stun", answer_stun(datagram, address, port)
        elif self._front.udp:
            return "check", answer_datagram(self._relay, datagram, source)
        return "none", None


def sweep_until(stop: threading.Event, relay: Relay) -> None:
    """Sweep about once a second, in small steps while there is much: the body of a thread."""
    pause_s = 0.0
    while not stop.wait(pause_s):
        pause_s = SWEEP_EVERY_S
        try:
            if relay.sweep():
                pause_s = SWEEP_PAUSE_S
        except Exception as error:
            log.warning("connectoid-relay: cannot sweep: %s", error)
            pause_s = SWEEP_RETRY_S


def _take_ipv4_too(unbound: socket.socket) -> None:
    if unbound.family == socket.AF_INET6:
        unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def _family_of(host: str) -> int:
    """Return the family of an address to listen on; "" is all interfaces."""
    if host:
        return socket.getaddrinfo(host, None)[0][0]
    if socket.has_dualstack_ipv6():
        return socket.AF_INET6
    return socket.AF_INET


def _do_nothing() -> None:
    pass


class RelayServer(http.server.ThreadingHTTPServer):
    """Serve a relay over HTTP, and over UDP if asked: an http.server with other insides.

    `serve_forever`, `shutdown`, `server_close`, `server_port` and `with` are as usual; it
    serves once. The host "" is all interfaces, IPv6 and IPv4. `udp` answers checks and
    `stun` Binding requests in single datagrams. X-Forwarded-For is believed from `proxies`.
    The serving thread calls `on_tick` some times a second. `tls` is what `load_tls` gives,
    and may be replaced meanwhile. `inherited` are sockets that listen already: one stream
    and at most one of datagrams. `remote` is for a store across a network: the pool alone
    asks it, and not for UDP; only its `arrivals` must not block. Raises OSError if the
    address cannot be had.
    """

    request_queue_size = LISTEN_BACKLOG

    def __init__(self, server_address: tuple[str, int], relay: Relay, *, udp: bool = False,
                 stun: bool = False, tls: ssl.SSLContext | None = None,
                 proxies: Networks = NO_NETWORKS, inherited: Sequence[socket.socket] = (),
                 on_tick: Callable[[], None] = _do_nothing, remote: bool = False) -> None:
        # It fails for a name that nobody knows, and then nothing is open.
        self.address_family = _family_of(server_address[0])
        self.relay = relay
        self.limits = relay.limits
        self.tls = tls
        self.proxies = proxies
        self.remote = remote
        self.front = Front(udp, stun, self._gauges)
        # Up to which messages the loop knows all.
        self.cursor_us = relay.store.time_us() - 1
        # Then there are no new connections and no waits.
        self.stopping = False
        self.now_s = time.monotonic()
        self.open = _Tally()
        self.held = _Tally()
        self.waiting = _WaitingRoom(self.limits.max_waiting, self.limits.max_waiting_per_source)
        # A handshake costs as much as a seal.
        self.handshakes = RateLimit(self.limits.rate, MINUTE_US)
        self._bell = _Bell()
        self.pool = _Pool(self.limits.max_queued, self._bell)
        self._connections: set[Connection] = set()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._on_tick = on_tick
        self._next_tick_s = self.now_s
        self._drained_by_s = self.now_s
        self._finished = threading.Event()
        self._finished.set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell.reader, READ, self._hear)
        self._inherited = {opened.type: opened for opened in inherited}
        self._udp: socket.socket | None = None
        super().__init__(server_address, http.server.BaseHTTPRequestHandler)
        if udp or stun:
            try:
                self._bind_udp()
            except BaseException:
                self.server_close()
                raise

    # What http.server does otherwise

    def server_bind(self) -> None:
        """Bind without asking the DNS for our name, or take the socket that we inherit."""
        inherited = self._inherited.get(socket.SOCK_STREAM)
        if inherited:
            self.socket.close()
            self.socket = inherited
            self.server_address = inherited.getsockname()
        else:
            _take_ipv4_too(self.socket)
            socketserver.TCPServer.server_bind(self)
        # What is accepted has this too: replies are not held back (Nagle).
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.socket.setblocking(False)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown or stop is called; then answer pending long polls and return.

        Nothing is polled for: poll_interval is there because http.server has it.
        """
        self._finished.clear()
        no_more_sweeps = threading.Event()
        sweeper = threading.Thread(
            target=sweep_until, args=(no_more_sweeps, self.relay), daemon=True)
        sweeper.start()
        self.pool.start()
        try:
            while not self._has_drained():
                self._turn()
        finally:
            no_more_sweeps.set()
            self.pool.stop(self._drained_by_s)
            sweeper.join(max(0.0, self._drained_by_s - time.monotonic()))
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
        self._bell.ring()

    def server_close(self) -> None:
        """Close all sockets."""
        for connection in tuple(self._connections):
            self.close_connection(connection)
        self.socket.close()
        if self._udp:
            self._udp.close()
        self._bell.close()
        self._selector.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a new connection in; no thread is made for it."""
        request.setblocking(False)
        connection = Connection(self, request, client_address[0])
        self._connections.add(connection)
        self.count(connection, True)
        connection.go_on()

    # The loop

    def _turn(self) -> None:
        """Do what the sockets ask for, at the latest when the next tick is due."""
        ready = self._selector.select(self._next_tick_s - time.monotonic())
        for number, (key, _) in enumerate(ready, 1):
            self.now_s = time.monotonic()
            if number % ACCEPT_BATCH == 0:
                # Thousands may have something at once: not before all who are new.
                self._hear()
                self._take_connections()
            if not isinstance(key.data, Connection):
                key.data()
            elif key.data.events:
                # Else an earlier event of this turn has moved it on.
                key.data.go_on(Wake.READY)
        self.now_s = time.monotonic()
        if self.now_s >= self._next_tick_s:
            self._tick()

    def _tick(self) -> None:
        """Do what is due: deadlines, messages of other processes, accepting (again)."""
        self._next_tick_s = self.now_s + TICK_S
        self._on_tick()
        late = [connection for connection in self._connections
                if connection.deadline_s <= self.now_s]
        for connection in late:
            connection.go_on(Wake.LATE)
        self._wake_waiting()
        if not self.stopping:
            # KeyError: it is registered already.
            with contextlib.suppress(KeyError):
                self._selector.register(self.socket, READ, self._take_connections)

    def _drain(self) -> None:
        """Stop accepting, answer pending long polls, let idle connections go."""
        if self.stopping:
            return
        self.stopping = True
        self._drained_by_s = self.now_s + DRAIN_S
        self._accept_no_more()
        self.socket.close()
        idle = [connection for connection in self._connections if connection.idle]
        for connection in idle:
            connection.go_on(Wake.LATE)

    def _has_drained(self) -> bool:
        if not self.stopping:
            return False
        return not self._connections or self.now_s > self._drained_by_s

    def _accept_no_more(self) -> None:
        # KeyError: it is not registered just now.
        with contextlib.suppress(KeyError):
            self._selector.unregister(self.socket)

    def _take_connections(self) -> None:
        if self.stopping:
            # Since this turn began.
            return
        try:
            with self.relay.snapshot():
                for _ in range(ACCEPT_BATCH):
                    self.process_request(*self.socket.accept())
        except BlockingIOError:
            pass
        except OSError:
            # Out of files: until the next tick somebody may have gone.
            self._accept_no_more()

    def _hear(self) -> None:
        """Do what other threads ask for, and go on where the pool has finished."""
        # Before the look into the queues: what comes from now on rings again.
        self._bell.silence()
        while self._calls:
            self._calls.popleft()()
        done = self.pool.done
        while done:
            connection, result = done.popleft()
            connection.result = result
            # Only the connection keeps it: it may be large.
            del result
            connection.go_on(Wake.DONE)
        if self.waiting.taken:
            self._wake_waiting()

    def _wake_waiting(self) -> None:
        """Go on with those whose boxes got messages, from whatever process."""
        self.cursor_us, boxes = self.relay.arrivals(self.cursor_us)
        for box in boxes:
            for connection in self.waiting.waiting_for(box):
                connection.cursor_us = self.cursor_us
                connection.go_on(Wake.MESSAGE)

    # For connections

    def watch(self, connection: Connection, events: int) -> None:
        """Have the selector watch a connection for these events."""
        if events == connection.events:
            return
        if connection.events:
            self._selector.unregister(connection.socket)
        if events:
            self._selector.register(connection.socket, events, connection)
        connection.events = events

    def close_connection(self, connection: Connection) -> None:
        """Forget a connection, and close it."""
        self.count(connection, False)
        self._connections.discard(connection)
        self.watch(connection, NOTHING)
        connection.close()

    def count(self, connection: Connection, counted: bool) -> None:
        """Count a connection, or no longer; it may be so already."""
        self.open.add(connection.source, counted - connection.counted)
        connection.counted = counted

    def check_room(self, connection: Connection) -> None:
        """Raise Refusal if there are too many connections, this one included."""
        limit = self.limits.max_connections
        if 0 < limit < self.open.total:
            raise Refusal(BUSY, f"There are {limit} connections in all.", retry_s=10)
        limit = self.limits.max_connections_per_source
        if limit and not connection.is_proxy and self.open.is_over(connection.source, limit):
            raise Refusal(BUSY, f"There are {limit} connections of one source.", retry_s=10)

    def can_hold(self, connection: Connection) -> bool:
        """Return whether we can bear what we hold, in all and for a connection's source."""
        limit = self.limits.max_buffered_bytes
        if self.held.total > limit:
            return False
        own_limit = limit // SOURCE_SHARE
        return connection.is_proxy or not self.held.is_over(connection.source, own_limit)

    def takes_no_handshake(self, source: str) -> bool:
        """Count a handshake of a source; return whether that is one too many."""
        now_us = self.relay.now_us()
        return self.handshakes.take(source, now_us, wider=networks_of(source)) > 0

    def count_refused(self) -> int:
        """Return how many connections are here that no longer count."""
        return len(self._connections) - self.open.total

    def _gauges(self) -> dict[str, int]:
        return {
            "connections": self.open.total,
            "waiting_boxes": self.waiting.taken,
            "queued_requests": len(self.pool),
        }

    def _bind_udp(self) -> None:
        udp = self._inherited.get(socket.SOCK_DGRAM)
        if not udp:
            udp = socket.socket(self.socket.family, socket.SOCK_DGRAM)
            self._udp = udp
            try:
                _take_ipv4_too(udp)
                udp.bind(self.server_address)
            except OSError:
                self.server_close()
                raise
        self._udp = udp
        udp.setblocking(False)
        front = _DatagramFront(udp, self.relay, self.front)
        self._selector.register(udp, READ, front.answer_some)


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
    try:
        if head.length < 0:
            raise Refusal(BAD_REQUEST, "Send one Content-Length of 1 to 9 digits.")
        if head.length > relay.limits.max_body_bytes:
            raise Refusal(TOO_BIG, f"A body may have {relay.limits.max_body_bytes} bytes.")
        body = take_body()
    except Exception as error:
        return relay.refuse(error)
    source = client_of(address, head.forwarded_for, proxies)
    outcome = complete(relay, Call(head, body, source, Front()))
    return without_wait(outcome)


def respond_in_pairs(reply: Reply, head: Head | None) -> tuple[list[tuple[str, str]], bytes]:
    """Return the names and values of the headers, and the body of a reply: as `respond`."""
    headers, body = respond(reply, head)
    pairs = []
    for line in headers.decode("ascii").splitlines():
        name, _, value = line.partition(": ")
        pairs.append((name, value))
    return pairs, body


def wsgi(relay: Relay, proxies: Networks = NO_NETWORKS) -> Callable[..., Iterable[bytes]]:
    """Return the relay as a WSGI application.

    A thread sweeps until the relay is closed or the process ends. Make store, relay and
    application in the process that serves them: SQLite and threads do not survive a fork,
    so the application raises RuntimeError in a child.
    """
    owner = os.getpid()
    threading.Thread(target=sweep_until, args=(relay.closed, relay), daemon=True).start()
    atexit.register(relay.closed.set)

    def application(environ: dict[str, Any],
                    start_response: Callable[..., Any]) -> Iterable[bytes]:
        if os.getpid() != owner:
            raise RuntimeError(
                "make the relay in the process that serves it (gunicorn: without --preload)")
        head = _head_of(environ)
        address = environ.get("REMOTE_ADDR", "")

        def take_body() -> bytes:
            return _read_body(environ, head.length)

        reply = answer_at_once(relay, head, address, take_body, proxies)
        headers, body = respond_in_pairs(reply, head)
        start_response(f"{reply.status} {HTTPStatus(reply.status).phrase}", headers)
        return [body]

    return application


def _head_of(environ: Mapping[str, Any]) -> Head:
    text = str(environ.get("CONTENT_LENGTH") or "0")
    length = -1
    if _LENGTH.fullmatch(text.encode("utf-8")):
        length = int(text)
    return Head(
        method=environ["REQUEST_METHOD"],
        path=environ.get("PATH_INFO") or "/",
        length=length,
        # The server around us sees to these two.
        keep_alive=True,
        expects_continue=False,
        wants_json="application/json" in environ.get("HTTP_ACCEPT", ""),
        forwarded_for=environ.get("HTTP_X_FORWARDED_FOR", ""),
    )


def _read_body(environ: Mapping[str, Any], length: int) -> bytes:
    if not length:
        return b""
    try:
        octets: bytes = environ["wsgi.input"].read(length)
    except OSError:
        raise Refusal(BAD_REQUEST, "The body did not arrive.") from None
    return octets


# ---------------------------------------------------------------------------------------
# The command line: flags to limits, a server until a signal comes, words for people.
# ---------------------------------------------------------------------------------------

# Files beside the connections: the database, the log, what is lingering.
SPARE_FILES = 64
# As in syslog(3), from which level on.
PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.NOTSET, 6))
# The number of the first file that systemd hands over: sd_listen_fds(3).
FIRST_INHERITED = 3


def _whole_number(minimum: int, maximum: int = MAX_SETTING) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,13}", text) and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {minimum} to {maximum}")
        return int(text)
    return convert


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return read_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a network; {error}") from None


# RFC 7065: a host, perhaps a port, perhaps how to reach it.
_TURN_URL = re.compile(
    r"turns?:(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?"
    r"(?:\?transport=(?:udp|tcp))?")


def _turn_url(text: str) -> str:
    if not _TURN_URL.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a TURN server; write turn:HOST:PORT, or turns:HOST:PORT for TLS,"
            " perhaps with ?transport=tcp")
    return text


def _text(text: str) -> str:
    if _SURROGATE.search(text):
        raise argparse.ArgumentTypeError("write it in UTF-8")
    return text


def _web_address(text: str) -> str:
    if not re.fullmatch(r"https?://\S+", _text(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a web address; write https://...")
    return text


# For parsers that take flags alone.
NO_VARIABLES: Mapping[str, str] = {}
# What the variable of a flag without a value may say.
_SWITCHES: Mapping[str, bool] = {
    "1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}


def variable_of(flag: str) -> str:
    """Return the environment variable that says what a flag would."""
    return "CONNECTOID_" + flag.removeprefix("--").replace("-", "_").upper()


def _value_of(action: argparse.Action, text: str) -> object:
    """Return what a flag makes of a word; raise ArgumentTypeError."""
    if action.choices and text not in action.choices:
        choices = " or ".join(action.choices)
        raise argparse.ArgumentTypeError(f"{text!r} is not {choices}")
    if callable(action.type):
        return action.type(text)
    return text


def _value_of_variable(action: argparse.Action, text: str) -> object:
    """Return what a variable says instead of a flag; raise ArgumentTypeError."""
    if action.nargs == 0:
        if text.lower() not in _SWITCHES:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_SWITCHES)}")
        return _SWITCHES[text.lower()]
    if isinstance(action.default, list):
        return [_value_of(action, word) for word in text.split()]
    return _value_of(action, text)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose flags may be variables instead.

    An empty variable says nothing, as one that is not set.
    """

    def __init__(self, environ: Mapping[str, str], **settings: Any) -> None:
        self._environ = environ
        self._variables: dict[str, argparse.Action] = {}
        super().__init__(**settings)

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        action = super().add_argument(*flags, **settings)
        # --help and --version set nothing.
        if action.default != argparse.SUPPRESS:
            self._variables[variable_of(flags[-1])] = action
        return action

    def parse_known_args(  # type: ignore[override]
            self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None,
            ) -> tuple[argparse.Namespace, list[str]]:
        """Take from the environment what no flag says."""
        said = {name: action for name, action in self._variables.items() if self._environ.get(name)}
        # No flag gives None, so what stays None was not given.
        namespace = namespace or argparse.Namespace()
        for action in said.values():
            setattr(namespace, action.dest, None)
        found, rest = super().parse_known_args(args, namespace)
        for name, action in said.items():
            if getattr(found, action.dest) is None:
                setattr(found, action.dest, self._read_variable(name, action))
        return found, rest

    def _read_variable(self, name: str, action: argparse.Action) -> object:
        try:
            return _value_of_variable(action, self._environ[name])
        except argparse.ArgumentTypeError as error:
            self.error(f"variable {name}: {error}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def flag_of(limit: str) -> str:
    """Return the flag of a field of Limits."""
    return "--" + limit.removesuffix("_s").replace("_", "-")


def build_parser(prog: str = "connectoid_relay.py",
                 environ: Mapping[str, str] = NO_VARIABLES) -> argparse.ArgumentParser:
    """Return the parser of the command line: docs/hosting.md, "Flags".

    What no flag says it takes from `environ`.
    """
    parser = _Parser(
        environ,
        prog=prog, usage="%(prog)s [flag ...] (--help lists them)", allow_abbrev=False,
        description="Keep small encrypted messages for an hour.",
        epilog="The defaults suit a Raspberry Pi. Stop it with Ctrl-C or SIGTERM."
               " * Read again on SIGHUP. An environment variable may say what a flag does:"
               " CONNECTOID_MAX_BYTES for --max-bytes; the flag wins. Where a flag may be"
               " repeated, blanks part the values; a flag without a value is 1 or 0.")
    parser.add_argument("--version", action="version", version=f"connectoid relay {__version__}")
    _add_server_flags(parser)
    _add_access_flags(parser)
    _add_about_flags(parser)
    for name, (meaning, minimum) in meanings().items():
        parser.add_argument(
            flag_of(name), dest=name, metavar="N", default=getattr(Limits(), name),
            type=_whole_number(minimum), help=f"{meaning} (default: %(default)s)")
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sockets and of the database."""
    parser.add_argument(
        "--host", default="",
        help="address to listen on; 127.0.0.1 serves this machine alone (default: all, IPv6"
        " and IPv4)")
    parser.add_argument(
        "--port", type=_whole_number(0, 65535), default=8080,
        help="port; 0 = any free one (default: 8080)")
    parser.add_argument(
        "--db", metavar="FILE",
        default=os.path.join(os.environ.get("STATE_DIRECTORY", ""), "connectoid.db"),
        help="database, or :memory: (default: connectoid.db, in $STATE_DIRECTORY if set)")
    parser.add_argument(
        "--sync", choices=("full", "normal"), default="full",
        help="full: an acknowledged message survives a power loss; normal: a crash of"
             " the relay only (default: full)")
    parser.add_argument(
        "--udp", action="store_true", help="answer checks over UDP too, on the same port")
    parser.add_argument(
        "--stun", action="store_true", help="answer STUN Binding requests, on the same UDP port")
    parser.add_argument(
        "--turn", metavar="URL", type=_turn_url, action="append", default=[],
        help=f"a TURN server for clients: turn:HOST:PORT; may be given {MAX_TURN_URLS} times")
    parser.add_argument(
        "--turn-secret", metavar="FILE",
        help="a file with the secret that these servers share *")
    parser.add_argument(
        "--tls-cert", metavar="FILE", help="speak HTTPS with this chain of certificates (PEM) *")
    parser.add_argument(
        "--tls-key", metavar="FILE", help="the private key of --tls-cert (PEM) *")


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say whom the host lets in."""
    parser.add_argument("--keys", metavar="FILE", help="API keys and their quotas (TOML) *")
    parser.add_argument(
        "--deny", metavar="FILE",
        help="addresses, networks and mailboxes to refuse, one per line *")
    parser.add_argument(
        "--trusted-proxy", metavar="CIDR", type=_network, action="append", default=[],
        help="a proxy whose X-Forwarded-For is believed; may be repeated")


def _add_about_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is told of the relay, and of its clients."""
    parser.add_argument(
        "--name", type=_text, default=About().name,
        help="what the relay is called (default: %(default)s)")
    parser.add_argument(
        "--contact", type=_text, help="how people reach you: a mail or web address")
    parser.add_argument(
        "--notice", metavar="TEXT", type=_text, help="what apps and people should know now")
    parser.add_argument(
        "--price-url", metavar="URL", type=_web_address,
        help="the page that says what the relay costs")
    parser.add_argument(
        "--log-ips", action="store_true", help="name the addresses of clients in the log")


def raise_file_limit(max_connections: int) -> None:
    """Let this process open a file for each connection, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard
    if max_connections:
        wanted = max_connections + MAX_LINGERING + SPARE_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if wanted > hard:
        log.warning("connectoid-relay: the system allows %d open files, %d connections need %d",
                    hard, max_connections, wanted)


def notify(state: str) -> None:
    """Tell systemd how we are (sd_notify(3)), if it is there.

    Nothing is done about a message that it does not get.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    with (contextlib.suppress(OSError),
          socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_systemd):
        to_systemd.sendto(state.encode("ascii"), path)


def _number_of(variable: str) -> int:
    """Return the number in an environment variable, 0 if it has none."""
    text = os.environ.get(variable, "")
    if not re.fullmatch(r"[0-9]{1,15}", text):
        return 0
    return int(text)


def build_watchdog(
        monotonic_us: Callable[[], int] = SYSTEM_CLOCK.monotonic_us) -> Callable[[], None]:
    """Return what the loop calls with every tick: it tells systemd in time that the loop lives.

    Of the store it tells nothing, as /health does: a new start mends no disk.
    """
    interval_us = _number_of("WATCHDOG_USEC") // 2
    if not interval_us:
        return _do_nothing
    next_us = 0

    def beat() -> None:
        nonlocal next_us
        if monotonic_us() >= next_us:
            next_us = monotonic_us() + interval_us
            notify("WATCHDOG=1")

    return beat


def inherited_sockets() -> list[socket.socket]:
    """Return the sockets that systemd has bound for us: sd_listen_fds(3).

    Raises SettingError for others than we can use.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    numbers = range(FIRST_INHERITED, FIRST_INHERITED + _number_of("LISTEN_FDS"))
    sockets = [socket.socket(fileno=number) for number in numbers]
    if not _can_be_used(sockets):
        raise SettingError(
            "the socket unit must have one ListenStream= with a port, at most one ListenDatagram=,"
            " and no Accept=")
    for opened in sockets:
        os.set_inheritable(opened.fileno(), False)
    return sockets


def _can_be_used(sockets: Sequence[socket.socket]) -> bool:
    """Return whether these are one listening stream and at most one socket of datagrams."""
    if any(opened.family not in (socket.AF_INET, socket.AF_INET6) for opened in sockets):
        return False
    listening = [opened for opened in sockets
                 if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
    kinds = sorted(opened.type for opened in sockets)
    one_stream = [socket.SOCK_STREAM]
    return len(listening) == 1 and kinds in (one_stream, [*one_stream, socket.SOCK_DGRAM])


class JournalFormatter(logging.Formatter):
    """Begin each line with its level, as journald reads it: sd-daemon(3).

    `journalctl -p warning` then finds it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, those of a traceback too."""
        priority = next(number for level, number in PRIORITIES if record.levelno >= level)
        lines = super().format(record).splitlines()
        return "\n".join(f"<{priority}>{line}" for line in lines)


def log_to_stderr() -> None:
    """Have the log on stderr, with levels where that is journald's: systemd.exec(5)."""
    if sys.stderr is None:
        # It was closed before the start, as with `2>&-`: the log goes nowhere.
        log.addHandler(logging.NullHandler())
        return
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
    turn: Turn | None
    tls: ssl.SSLContext | None


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Return what the files say that the flags name; raise SettingError."""
    access = read_access(arguments.keys, arguments.deny)
    turn = read_turn(arguments.turn, arguments.turn_secret)
    tls = None
    if arguments.tls_cert:
        tls = load_tls(arguments.tls_cert, arguments.tls_key)
    return Settings(access, turn, tls)


def reread_when_asked(asked: threading.Event, arguments: argparse.Namespace,
                      server: RelayServer) -> None:
    """Take what the files say now, or say why all stays as it was: the body of a thread."""
    while asked.wait():
        asked.clear()
        try:
            settings = read_settings(arguments)
        except SettingError as error:
            log.error("connectoid-relay: %s; all stays as it was", error)
        except Exception:
            # Whatever it is, the next one asked for is read.
            log.exception("reading the files failed; please report this")
        else:
            server.relay.access = settings.access
            server.relay.turn = settings.turn
            server.tls = settings.tls
            log.info("connectoid-relay: read the files again")


def open_relay(arguments: argparse.Namespace, limits: Limits, **settings: Any) -> Relay:
    """Return a relay on the SQLite file that the flags name."""
    return Relay(SqliteStore(arguments.db, sync=arguments.sync), limits, **settings)


def serve(arguments: argparse.Namespace, make_relay: Callable[..., Relay] = open_relay, *,
          remote: bool = False) -> None:
    """Run a relay until SIGTERM or SIGINT; raise SettingError, StoreError or OSError if it cannot.

    `make_relay` is called as `open_relay` is; `remote` is RelayServer's.
    """
    if LACKING:
        raise SettingError(LACKING)
    # Until there is something to read again.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    speaks_udp = arguments.udp or arguments.stun
    if remote and speaks_udp:
        raise SettingError(
            "--udp and --stun are for a relay whose store is a file of its own; leave them out")
    settings = read_settings(arguments)
    sockets = inherited_sockets()
    if len(sockets) == 1 and speaks_udp:
        raise SettingError(
            "--udp and --stun need a ListenDatagram= with the same port in the socket unit")
    limits = Limits(*(getattr(arguments, name) for name in Limits._fields))
    about = About(arguments.name, arguments.contact, arguments.notice, arguments.price_url)
    raise_file_limit(limits.max_connections)
    relay = make_relay(
        arguments, limits, access=settings.access, turn=settings.turn, about=about,
        log_ips=arguments.log_ips)
    address = (arguments.host, arguments.port)
    with contextlib.closing(relay), RelayServer(
            address, relay, udp=arguments.udp, stun=arguments.stun, tls=settings.tls,
            proxies=Networks(arguments.trusted_proxy), inherited=sockets,
            on_tick=build_watchdog(), remote=remote) as server:
        asked = threading.Event()
        handle_signals(server, asked)
        threading.Thread(
            target=reread_when_asked, args=(asked, arguments, server), daemon=True).start()
        log.info("connectoid relay %s listening on %s", __version__, _url_of(server))
        notify("READY=1")
        server.serve_forever()


def _url_of(server: RelayServer) -> str:
    """Return where a server listens."""
    scheme = "https" if server.tls else "http"
    host = server.server_name
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}:{server.server_port}"


def handle_signals(server: RelayServer, asked: threading.Event) -> None:
    """Stop on SIGTERM and SIGINT; on SIGHUP ask for the files to be read again."""
    def stop(*_: object) -> None:
        server.stop()
        notify("STOPPING=1")

    def ask(*_: object) -> None:
        # Not in the handler itself: it may have interrupted another that holds the
        # event's lock.
        server.soon(asked.set)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, ask)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 stopped, 1 failed; 2 (usage) exits."""
    return run_command(build_parser(os.path.basename(sys.argv[0]), os.environ), argv, serve)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, or exit; quietly with 1 if the reader of the help has gone."""
    try:
        try:
            return parser.parse_args(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would try once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
                run: Callable[[argparse.Namespace], None]) -> int:
    """Run what the arguments ask for and return the exit code.

    It is `main` for a parser with further flags.
    """
    arguments = parse(parser, argv)
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        parser.error("--tls-cert and --tls-key go together")
    if bool(arguments.turn) != bool(arguments.turn_secret):
        parser.error("--turn and --turn-secret go together")
    if len(arguments.turn) > MAX_TURN_URLS:
        parser.error(f"give --turn at most {MAX_TURN_URLS} times")
    log_to_stderr()
    try:
        run(arguments)
    except (StoreError, SettingError) as error:
        log.error("connectoid-relay: %s", error)
        return 1
    except (OSError, UnicodeError) as error:
        # UnicodeError is a host name with impossible labels.
        log.error(
            "connectoid-relay: cannot listen on %s port %d: %s; choose another with --host or"
            " --port", arguments.host or "any address,", arguments.port,
            getattr(error, "strerror", error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
