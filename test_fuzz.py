"""Feed the relay what nobody should send, and judge its replies by a second reading of PROTOCOL.md.

Three fronts (HTTP, JSON, UDP) get seeds, mutated seeds and random bytes. What they ought to
make of them is told by the judges below, which share no code with the relay, and by h11.
`bench/fuzz.py` runs the same targets for as long as one likes.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import logging
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import h11
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, SOURCE, Owner
from connectoid_relay import (
    ERRORS,
    Access,
    Head,
    Limits,
    Networks,
    Quota,
    RateLimit,
    Refusal,
    Relay,
    RelayServer,
    Reply,
    SqliteStore,
    Wait,
    answer_datagram,
    answer_stun,
    client_of,
    is_stun,
    parse_head,
    render,
    take_head,
)

# ---------------------------------------------------------------------------------------
# Seeds: one for each shape, good and bad. An input that has found something is added.
# ---------------------------------------------------------------------------------------

ALICE, BOB = Owner(1).pub, Owner(2).pub
KEY = "alice-has-paid-for-this"  # an API key: too long for an `id`, which is the one thing that is echoed
CHECK = {"pub": ALICE, "ext": None, "action": "check", "at": 0}
SEND = {"pub": ALICE, "ext": None, "action": "send", "data": "QUJD"}
RECEIVE = {"pub": BOB, "action": "receive", "answer": "2qk1X", "at": 0, "limit": 1}

JSON_SEEDS: dict[str, bytes] = {name: json.dumps(value).encode() for name, value in {
    "check": CHECK, "check with all": {**CHECK, "wait": 1, "id": "Ab_-09", "at": 2**63},
    "send": SEND, "send to bob": {**SEND, "pub": BOB, "data": "AA"}, "receive": RECEIVE,
    "receive many": {**RECEIVE, "limit": 100, "ext": KEY}, "batch": [CHECK, {**CHECK, "pub": BOB, "wait": 2}],
    "batch with others": [CHECK, SEND, RECEIVE, None, [CHECK], {**CHECK, "at": -1}], "empty batch": [],
    "too long a batch": [{}] * 257, "key": {**CHECK, "ext": KEY}, "data too long": {**SEND, "data": "A" * 32_769},
    "long ext": {**CHECK, "ext": "\U0001f600" * 1_024}, "longer ext": {**CHECK, "ext": "x" * 1_025},
    "booleans": {**CHECK, "at": True, "wait": False}, "boolean limit": {**RECEIVE, "limit": True},
    "fraction": {**CHECK, "at": 1.0}, "strings": {**CHECK, "at": "0"}, "null at": {**CHECK, "at": None},
    "pub with bits": {**CHECK, "pub": ALICE[:-1] + "x"}, "padded pub": {**SEND, "pub": ALICE + "=="},
    "uncompressed": {**SEND, "pub": "BA" + ALICE[2:]}, "no point": {**SEND, "pub": "Ag" + "A" * 62 + "BA"},
    "odd data": {**SEND, "data": "AAAAA"}, "other alphabet": {**SEND, "data": "+/+/"},
    "data line": {**SEND, "data": "AA\n"},
    "key as answer": {**RECEIVE, "answer": KEY},
    "unhashable": {"action": ["check"], "pub": {}}, "unknown action": {**CHECK, "action": "delete"},
    "long id": {**CHECK, "id": "A" * 17}, "null id": {**CHECK, "id": None},
}.items()} | {
    "lone surrogate": json.dumps({**RECEIVE, "answer": "\ud800"}).encode(),
    "lone surrogate aside": json.dumps({**CHECK, "unknown": ["\ud800"]}).encode(),
    "lone surrogate that does not count": b'{"ext": "\\ud800", "ext": null, "action": "check", "pub": "%s"}' % (
        ALICE.encode()),
    "pair": json.dumps({**RECEIVE, "answer": "\U0001f600"}).encode(),
    "same name twice": b'{"action": "send", "action": "check", "pub": 0, "pub": "%s"}' % ALICE.encode(),
    "nan": b'{"action": "check", "at": NaN}', "infinity": b"[-Infinity]", "overflow": b'{"at": 1e999}',
    "huge integer": b'{"at": ' + b"9" * 4_301 + b"}", "large integer": json.dumps({**CHECK, "at": 10**400}).encode(),
    "exponent": b'{"action": "check", "pub": "%s", "at": 1e3}' % ALICE.encode(),
    "deep": b"[" * 3_000 + b"]" * 3_000, "deep objects": b'{"a":' * 1_500 + b"1" + b"}" * 1_500,
    "bom": b"\xef\xbb\xbf{}", "utf-16": '{"at": 0}'.encode("utf-16"), "latin-1": b'{"ext": "\xe9"}',
    "overlong": b'"\xc0\xaf"', "utf-8 surrogate": b'"\xed\xa0\x80"', "two values": json.dumps(CHECK).encode() + b" {}",
    "cut off": b'{"action": "che',
    "control in a string": b'{"ext": "\n"}', "nul": b"\x00", "comment": b"{} // no", "spaces": b" \t\r\n{}\n",
    "nothing": b"",
    "other space": b"\x0c{}", "comma": b'{"at": 0,}', "minus": b'{"at": -0}', "zeros": b'{"at": 00}',
}


def framed(body: bytes, *lines: bytes, first: bytes = b"POST / HTTP/1.1") -> bytes:
    """Return a request with a body and further lines of headers."""
    return b"\r\n".join([first, b"Host: relay", b"Content-Length: %d" % len(body), *lines, b"", body])


BODY = JSON_SEEDS["check"]
GET = b"GET / HTTP/1.1\r\nHost: relay\r\n"
HTTP_SEEDS: dict[str, bytes] = {f"post {name}": framed(body) for name, body in JSON_SEEDS.items()} | {
    "page": GET + b"\r\n", "document": GET + b"Accept: application/json\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: other\r\n\r\n", "head": framed(b"", first=b"HEAD / HTTP/1.1"),
    "metrics": b"GET /metrics?x=/ HTTP/1.1\r\n\r\n",
    "old": framed(BODY, b"Connection: keep-alive", first=b"POST / HTTP/1.0"),
    "preflight": b"OPTIONS * HTTP/1.1\r\nOrigin: https://a\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    "close": framed(BODY, b"Connection: Upgrade, close"), "closed": framed(BODY, b"connection: closed"),
    "absolute": b"GET http://relay:80/health HTTP/1.1\r\n\r\n", "absolute bare": b"GET HTTPS://a?b HTTP/1.1\r\n\r\n",
    "connect": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "no path": b"GET /../health HTTP/1.1\r\n\r\n",
    "wrong method": b"PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", "own method": b"get / HTTP/1.1\r\n\r\n",
    "expect": framed(BODY, b"Expect: 100-Continue"), "expect other": framed(BODY, b"Expect: tea"),
    "forwarded": framed(BODY, b"X-Forwarded-For: 192.0.2.7, ::1", b"x-forwarded-for: ::ffff:192.0.2.9, x, 127.0.0.1"),
    "pipelined": framed(BODY) + framed(JSON_SEEDS["send"]) + GET + b"Connection: close\r\n\r\n" + GET,
    "pipelined waits": framed(JSON_SEEDS["check with all"]) * 3, "too many sends": framed(JSON_SEEDS["send"]) * 34,
    "smuggled": framed(framed(BODY)),
    "two lengths": framed(BODY, b"Content-Length: 5"), "same lengths": framed(b"{}", b"Content-Length: 2"),
    "list of lengths": GET + b"Content-Length: 2, 2\r\n\r\n{}", "plus": GET + b"Content-Length: +2\r\n\r\n{}",
    "zeros": GET + b"Content-Length: 002\r\n\r\n{}", "ten digits": GET + b"Content-Length: 0000000002\r\n\r\n{}",
    "hex": GET + b"Content-Length: 0x2\r\n\r\n{}", "empty length": GET + b"Content-Length:\r\n\r\n{}",
    "negative": GET + b"Content-Length: -1\r\n\r\n", "arabic": GET + "Content-Length: ٢\r\n\r\n{}".encode(),
    "tabbed length": GET + b"Content-Length:\t2\t\r\n\r\n{}",
    "length form feed": GET + b"Content-Length: \x0c2\r\n\r\n{}",
    "too long": GET + b"Content-Length: 99999999\r\n\r\n",
    "chunked": GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": framed(b"0\r\n\r\n", b"transfer-encoding: chunked"),
    "identity": framed(b"", b"Transfer-Encoding:"),
    "chunked spelt oddly": framed(b"", b"Transfer-Encoding:\x0bchunked"),
    "long s": framed(b"", "Expe\u017ft: 1".encode()),
    "space before colon": framed(BODY, b"Content-Length : 5"), "folded": framed(BODY, b"A: b", b" Content-Length: 5"),
    "folded length": GET + b"Content-Length:\r\n 2\r\n\r\n{}", "folded first": b"GET / HTTP/1.1\r\n A: b\r\n\r\n",
    "nul": framed(BODY, b"A: \x00"), "control": framed(BODY, b"A: \x1f\x7f"),
    "latin-1": framed(BODY, b"A: \xe9\x85\xa0"),
    "bare lf in a value": framed(BODY, b"A: b\nc"), "bare cr in a value": framed(BODY, b"A: b\rc"),
    "form feed": framed(BODY, b"A: \x0b\x0c"), "bare cr in half a head": GET + b"A: b\rc",
    "lf in half a head": GET + b"A\n", "nul in half a head": GET + b"A\0",
    "bare lf": framed(BODY, b"A: b\nContent-Length: 5"), "bare cr": framed(BODY, b"A: b\rContent-Length: 5"),
    "lf only": b"GET / HTTP/1.1\n\n", "cr cr lf": b"GET / HTTP/1.1\r\r\n\r\n", "lf at the end": b"GET / HTTP/1.1\r\n\n",
    "empty lines first": b"\r\n\r\nGET / HTTP/1.1\r\n\r\n", "empty name": framed(b"", b": x"),
    "no colon": framed(b"", b"A"),
    "line": b"GET  / HTTP/1.1\r\n\r\n", "tab": b"GET\t/ HTTP/1.1\r\n\r\n", "space": b"GET / HTTP/1.1 \r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http 0.9": b"GET /\r\n\r\n", "http 1.2": b"GET / HTTP/1.2\r\n\r\n",
    "lower": b"GET / http/1.1\r\n\r\n", "target in utf-8": "GET /é HTTP/1.1\r\n\r\n".encode(),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00",
    "body after get": GET + b"Content-Length: 18\r\n\r\nGET /b HTTP/1.1\r\n\r\nGET /health HTTP/1.0\r\n\r\n",
    "spaces in a value": GET + b"Accept: a" + b" " * 300 + b"b\r\n\r\n", "big head": GET + b"A: b\r\n" * 700,
    "half a head": b"POST / HTTP/1.1\r\nContent-Le", "half a body": framed(BODY)[:-9], "one cr": b"GET / HTTP/1.1\r",
}


def stun(*attributes: tuple[int, bytes], kind: int = 1, excess: int = 0) -> bytes:
    """Return a STUN message with attributes, whose length may be a lie."""
    octets = b"".join(struct.pack(">HH", name, len(value)) + value + bytes(-len(value) % 4)
                      for name, value in attributes)
    return struct.pack(">HHI", kind, len(octets) + excess, 0x2112A442) + b"transaction!" + octets


UDP_SEEDS: dict[str, bytes] = JSON_SEEDS | {
    "stun": stun(), "software": stun((0x8022, b"test!")), "username": stun((6, b"alice")),
    "last required": stun((0x7FFF, b"")),
    "first optional": stun((0x8000, b"abc")), "stun lies": stun(excess=4),
    "stun cut off": stun((0x8022, b"abcd"))[:-2], "indication": stun(kind=0x11), "allocate": stun(kind=3),
    "success": stun(kind=0x101),
    "two attributes": stun((0x8022, b""), (0x8028, b"CRC!")),
    "huge attribute": stun()[:2] + b"\0\4" + stun()[4:] + b"\x80\x22\xff\xff",
    "stun like": b"\x3f" + stun()[1:], "channel": b"\x40" + stun()[1:], "2048 bytes": BODY + b" " * (2_048 - len(BODY)),
    "2049 bytes": BODY + b" " * (2_049 - len(BODY)),
}

# ---------------------------------------------------------------------------------------
# Mutations. An input is a seed and a list of edits, small numbers all, so that a failure
# shrinks to the few edits that matter.
# ---------------------------------------------------------------------------------------

PIECES = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b"\x0b", b"\x85", b"\xff", b":", b",", b'"', b"{", b"}",
    b"[", b"]", b"\\",
    b"0", b"1", b"-1", b"1.0", b"1e9", b"9" * 20, b"true", b"null", b"NaN", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"Content-Length: 1\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"close",
    b"Expect: 100-continue\r\n", b"X-Forwarded-For: ::1\r\n", b"A: b\r\n", b"HTTP/1.0", b"HTTP/1.1", b"HEAD",
    b"OPTIONS", b"http://a",
    b"/health", b"/metrics", b"check", b"send",
    b"receive", b'"wait": 60, ', b'"limit": 2, ', b'"id": "a", ', b'"at": 0, ',
    ALICE.encode(), KEY.encode(), b"GET / HTTP/1.1\r\n\r\n", *UDP_SEEDS.values())


class Edit(NamedTuple):
    """A change: which kind, where (modulo the length), over how many bytes, with which piece."""

    kind: str
    where: int
    size: int
    piece: int


def tokens(octets: bytes) -> list[bytes]:
    """Return words and single other bytes."""
    return re.findall(rb"[A-Za-z0-9_-]+|\r\n|[^A-Za-z0-9_-]", octets, re.DOTALL)


def replace_token(octets: bytes, where: int, _size: int, piece: bytes) -> bytes:
    """Put a piece in the place of a token."""
    words = tokens(octets)
    return b"".join([*words[:where % len(words)], piece, *words[where % len(words) + 1:]])


def swap_tokens(octets: bytes, where: int, size: int, _piece: bytes) -> bytes:
    """Exchange two tokens."""
    words = tokens(octets)
    one, other = where % len(words), (where + size) % len(words)
    words[one], words[other] = words[other], words[one]
    return b"".join(words)


def replace_number(octets: bytes, where: int, size: int, _piece: bytes) -> bytes:
    """Write another number for one: a length that does not fit its body, most of all."""
    places = list(re.finditer(rb"[0-9]+", octets))
    if not places:
        return octets
    place = places[where % len(places)]
    return octets[:place.start()] + b"%d" % size + octets[place.end():]


KINDS: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "insert": lambda octets, where, size, piece: octets[:where] + piece + octets[where:],
    "delete": lambda octets, where, size, piece: octets[:where] + octets[where + size:],
    "repeat": lambda octets, where, size, piece: octets[:where + size] + octets[where:],
    "cut off": lambda octets, where, size, piece: octets[:where + 1],
    "flip": lambda octets, where, size, piece: (
        octets[:where] + bytes([octets[where] ^ 1 << size % 8]) + octets[where + 1:]),
    "byte": lambda octets, where, size, piece: octets[:where] + bytes([size * 4 % 256]) + octets[where + 1:],
    "case": lambda octets, where, size, piece: (
        octets[:where] + octets[where:where + size].swapcase() + octets[where + size:]),
    "splice": lambda octets, where, size, piece: octets[:where] + piece[size * len(piece) // 65:],
    "append": lambda octets, where, size, piece: octets + piece,
    "frame": lambda octets, where, size, piece: framed(octets),
    "replace token": replace_token, "swap tokens": swap_tokens, "replace number": replace_number,
}
MAX_EDITS = 6
MAX_INPUT_BYTES = 1 << 16  # repeats of repeats grow
MAX_DATAGRAM_BYTES = 65_507  # of UDP over IPv4


def mutate(octets: bytes, edits: Sequence[Edit]) -> bytes:
    """Return the octets after the edits."""
    for kind, where, size, piece in edits:
        if octets:
            octets = KINDS[kind](octets, where % len(octets), size, PIECES[piece])[:MAX_INPUT_BYTES]
    return octets


EDITS = st.lists(st.builds(Edit, st.sampled_from(sorted(KINDS)), st.integers(0, 4_095), st.integers(0, 64),
                           st.integers(0, len(PIECES) - 1)), max_size=MAX_EDITS)


def inputs(seeds: dict[str, bytes]) -> st.SearchStrategy[bytes]:
    """Return seeds with edits, and bytes of no meaning."""
    return st.builds(mutate, st.sampled_from(list(seeds.values())), EDITS) | st.binary(max_size=256)


# ---------------------------------------------------------------------------------------
# Judges: what ought to come, read from PROTOCOL.md a second time.
# ---------------------------------------------------------------------------------------

LIMITS = Limits(rate=10**9, max_sends=10**9, max_source_bytes=10**12, max_seals=10**9, max_udp=10**9,
                max_connections_per_source=0, max_header_bytes=4_096, max_body_bytes=40_000, request_timeout_s=60)
STATUS_OF = {error.text: {other.status for other in ERRORS if other.text == error.text} for error in ERRORS}
BAD, OK = "Bad request", "ok"
UNJUDGED_LEVELS = 100  # nested deeper than that a relay may refuse
MAX_AT = 10**4_300
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
BASE64URL = set(LETTERS + "-_")
TOKEN = set((LETTERS + "!#$%&'*+-.^_`|~").encode())


class NotJson(Exception):
    """Say that octets are no JSON of PROTOCOL.md, "Conventions"."""


def no_constant(name: str) -> None:
    """Refuse NaN and the infinities."""
    raise NotJson(name)


def strict_json(octets: bytes) -> object:
    """Return the value of octets; raise NotJson."""
    try:
        value: object = json.loads(octets.decode("utf-8"), parse_constant=no_constant)
        everything = json.loads(octets, object_pairs_hook=list)  # members that do not count, too
        json.dumps(everything, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None
    return value


def is_clean(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can hold."""
    return isinstance(value, str) and not any(0xD800 <= ord(character) < 0xE000 for character in value)


def is_integer(value: object, least: int = 0, most: int = MAX_AT) -> bool:
    """Return whether a value is an integer from least to most."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def unpacked(value: object) -> bytes | None:
    """Return what base64url without padding stands for, None if it is none."""
    if not isinstance(value, str) or not value or set(value) - BASE64URL or len(value) % 4 == 1:
        return None
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))


def is_pub(value: object) -> bool:
    """Return whether a value has the form of `pub`, canonical."""
    octets = unpacked(value)
    return (octets is not None and len(octets) == 49 and octets[0] in (2, 3)
            and base64.urlsafe_b64encode(octets).rstrip(b"=").decode() == value)


def is_on_curve(pub: str) -> bool:
    """Return whether a `pub` of the right form is a point."""
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), unpacked(pub) or b"")
    except ValueError:
        return False
    return True


def judge_send(request: dict[str, Any]) -> str:
    """Return what a send with a good `pub` and `ext` gets."""
    sealed = request.get("data")
    if isinstance(sealed, str) and len(sealed) > 32_768:
        return "Too big"
    return OK if unpacked(sealed) and is_on_curve(request["pub"]) else BAD


def judge_check(request: dict[str, Any]) -> str:
    """Return what a check with a good `pub` and `ext` gets."""
    return OK if is_integer(request.get("at", 0)) and is_integer(request.get("wait", 0)) else BAD


def judge_receive(request: dict[str, Any]) -> str:
    """Return what a receive with a good `pub` and `ext` gets: nobody here knows an answer."""
    fits = (is_clean(request.get("answer")) and is_integer(request.get("limit", 1), 1, 100)
            and is_integer(request.get("at", 0)))
    return "Wrong answer" if fits else BAD


JUDGES = {"send": judge_send, "check": judge_check, "receive": judge_receive}


def judge_one(request: object, actions: Sequence[str] = tuple(JUDGES)) -> str:
    """Return "ok" or the error that a request ought to get."""
    if not isinstance(request, dict) or not isinstance(request.get("action"), str) or request["action"] not in actions:
        return BAD
    ext = request.get("ext")
    if not is_pub(request.get("pub")) or not (ext is None or (is_clean(ext) and len(ext) <= 1_024)):
        return BAD
    return JUDGES[request["action"]](request)


def judge(request: object) -> str | list[str]:
    """Return what a request or a batch ought to get."""
    if isinstance(request, list) and 1 <= len(request) <= 256:
        return [judge_one(item, ["check"]) for item in request]
    return judge_one(request)


def is_deep(octets: bytes) -> bool:
    """Return whether a relay may refuse octets as nested too deep."""
    if octets.count(b"[") + octets.count(b"{") <= UNJUDGED_LEVELS:
        return False
    steps = (1 if octet in b"[{" else -(octet in b"]}") for octet in octets)
    return max(itertools.accumulate(steps)) > UNJUDGED_LEVELS  # those in strings may count too


def judge_body(octets: bytes) -> tuple[object, str | list[str]]:
    """Return the value of a body (None if there is none) and what it ought to get."""
    try:
        value = strict_json(octets)
    except NotJson:
        return None, BAD
    return value, judge(value)


class Asked(NamedTuple):
    """A request on a connection, as the judge reads it."""

    method: bytes
    target: bytes
    length: int
    keep_alive: bool
    body: bytes


def split_lines(head: bytes) -> list[bytes]:
    """Return the lines of a head; raise ValueError for a bare CR or LF, or a control character."""
    lines = head.split(b"\r\n")
    if any((octet < 0x20 and octet != 9) or octet == 0x7F for line in lines for octet in line):
        raise ValueError("a control character")
    return lines


def split_field(line: bytes) -> tuple[bytes, bytes]:
    """Return name (in small letters) and value of a line; raise ValueError if it is none."""
    name, colon, value = line.partition(b":")
    if not colon or not name or set(name) - TOKEN:
        raise ValueError("no header")
    return name.lower(), value.strip(b" \t")


def read_first(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Return method, target and version; raise ValueError for anything else."""
    method, target, version = line.split(b" ")
    if not method or set(method) - TOKEN or version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise ValueError("no request line")
    if not target or any(not 0x21 <= octet <= 0x7E for octet in target):
        raise ValueError("no request line")
    return method, target, version


def read_asked(head: bytes) -> Asked:
    """Return a request without its body from a head without its end; raise ValueError."""
    first, *lines = split_lines(head)
    method, target, version = read_first(first)
    headers = [split_field(line) for line in lines]
    lengths = [value for name, value in headers if name == b"content-length"] or [b"0"]
    if any(name == b"transfer-encoding" for name, _ in headers) or len(lengths) > 1:
        raise ValueError("smuggling")
    if not 1 <= len(lengths[0]) <= 9 or set(lengths[0]) - set(b"0123456789"):
        raise ValueError("no length")
    # "close" within another word closes too: nobody is hurt by that.
    close = any(b"close" in value.lower() for name, value in headers if name == b"connection")
    return Asked(method, target, int(lengths[0]), version == b"HTTP/1.1" and not close, b"")


def is_hopeless(half: bytes) -> bool:
    """Return whether half a head can never be a good one: a NUL, a bare LF, a CR with something else behind."""
    return b"\0" in half or b"\n" in half.replace(b"\r\n", b"") or b"\r" in half.replace(b"\r\n", b"")[:-1] or (
        half.replace(b"\r\n", b"").endswith(b"\r") and not half.endswith(b"\r"))


class Ends(Exception):
    """Say that no further request is read, and what comes instead."""

    def __init__(self, *after: int) -> None:
        super().__init__(after)
        self.after = set(after)


def read_next(octets: bytes) -> tuple[Asked, bytes]:
    """Return a request and what is behind it; raise Ends."""
    head, end, rest = octets.partition(b"\r\n\r\n")
    if len(head + end) > LIMITS.max_header_bytes:
        raise Ends(431, 400)  # which of both depends on how the bytes come
    if not end:
        raise Ends(400 if is_hopeless(head) else 1)
    try:
        request = read_asked(head)
    except ValueError:
        raise Ends(400) from None
    if request.length > LIMITS.max_body_bytes:
        raise Ends(413)
    if len(rest) < request.length:
        raise Ends(1)
    return request._replace(body=rest[:request.length]), rest[request.length:]


def read_conversation(octets: bytes) -> tuple[list[Asked], set[int]]:
    """Return the whole requests in octets, and what follows them.

    That is a set of error statuses, {0} for the end, {1} for half a request, {2} for bytes behind
    a request after which the connection closes.
    """
    asked: list[Asked] = []
    try:
        while octets:
            request, octets = read_next(octets)
            asked.append(request)
            if not request.keep_alive and octets:
                raise Ends(2)
    except Ends as ends:
        return asked, ends.after
    return asked, {0}


def path_of(target: bytes) -> bytes:
    """Return the path of a target, whose scheme and host do not matter."""
    return re.sub(rb"^[hH][tT][tT][pP][sS]?://[^/?]*", b"", target).split(b"?")[0] or b"/"


def statuses_of(request: Asked) -> set[int]:
    """Return the statuses that a request may get."""
    methods = {b"/": (b"GET", b"HEAD", b"POST"), b"/health": (b"GET", b"HEAD"), b"/metrics": (b"GET", b"HEAD")}
    path = path_of(request.target)
    if request.method == b"OPTIONS":
        return {204}
    if path not in methods:
        return {404}
    if request.method not in methods[path]:
        return {405}
    return statuses_of_body(request.body) if request.method == b"POST" else {200}


def statuses_of_body(body: bytes) -> set[int]:
    """Return the statuses that a posted body may get."""
    value, verdict = judge_body(body)
    if is_deep(body):
        return {200, 400}
    if isinstance(verdict, list):
        return {200}
    sends = isinstance(value, dict) and value.get("action") == "send"
    return ({200, 429} if sends else {200}) if verdict == OK else STATUS_OF[verdict] - {431}


def may_wait(request: Asked) -> bool:
    """Return whether a request may be held, and then gets nothing from a client that has hung up."""
    with contextlib.suppress(NotJson):
        value = strict_json(request.body)
        items = value if isinstance(value, list) else [value]
        return any(isinstance(item, dict) and item.get("wait") for item in items)
    return False


# ---------------------------------------------------------------------------------------
# The world: relays and servers that live as long as the inputs come, and what they let out.
# ---------------------------------------------------------------------------------------

SPARE_COUNTS = 8  # of one source in each rate limit; beside them only those of boxes with messages
HANG_S = 20.0  # nothing takes that long unless it hangs
FENCE = json.dumps({**CHECK, "id": "fence-fence-1234"}).encode()


class Log(logging.Handler):
    """Keep what is logged: nothing that a client sends is worth a line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, with its traceback."""
        self.lines.append(self.format(record))


class World:
    """Hold a relay for the core and three that serve: the same input comes whole, in pieces and with more behind."""

    def __init__(self) -> None:
        self.log, self.drawn = Log(), list[bytes]()
        logging.getLogger("connectoid_relay").addHandler(self.log)
        access = Access({KEY: Quota("alice", requests_per_day=10**9)})
        self.core, *relays = (Relay(SqliteStore(":memory:"), LIMITS, access=access, random_bytes=self.draw)
                              for _ in range(4))
        self.servers = [RelayServer(("127.0.0.1", 0), relay, udp=True, stun=True) for relay in relays]
        self.holders: list[object] = [*self.servers, *relays, self.core]
        self.sizes_at_first = [sizes(holder) for holder in self.holders]
        self.threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in self.servers]
        for thread in self.threads:
            thread.start()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.connect(("127.0.0.1", self.servers[0].server_port))
        self.udp.settimeout(HANG_S)

    def draw(self, count: int) -> bytes:
        """Return random bytes and remember them: they are secrets."""
        self.drawn.append(secrets.token_bytes(count))
        return self.drawn[-1]

    def check_secrets(self, text: bytes) -> None:
        """Fail if a reply has a secret in it, or if anything was logged."""
        assert not self.log.lines, self.log.lines[:3]
        assert KEY.encode() not in text
        for drawn in self.drawn:
            assert base64.urlsafe_b64encode(drawn).rstrip(b"=") not in text
            assert drawn not in text

    def check_memory(self) -> None:
        """Fail if something of a client is left: refused requests have no place in any table."""
        for holder, first in zip(self.holders, self.sizes_at_first, strict=True):
            left = {name: size for name, size in sizes(holder).items() if size > first.get(name, 0)}
            assert not left, f"left behind: {left}"
        for relay in (self.core, *(server.relay for server in self.servers)):
            counted = sum(sum(sizes(limit).values()) for limit in vars(relay).values() if isinstance(limit, RateLimit))
            assert counted <= relay.store.stored().messages + SPARE_COUNTS

    def close(self) -> None:
        """Stop all servers; then nothing of any client may be left in them."""
        try:
            self.udp.close()
            for server in self.servers:
                server.shutdown()
            self.check_memory()
            self.check_secrets(b"")
        finally:
            logging.getLogger("connectoid_relay").removeHandler(self.log)
            for server in self.servers:
                server.server_close()
                server.relay.close()
            self.core.close()


def sizes(holder: object) -> dict[str, int]:
    """Return how much is in each container that an object has, by name."""
    return {name: len(value) for name, value in vars(holder).items()
            if isinstance(value, Sized) and not isinstance(value, str | bytes | tuple)}


# ---------------------------------------------------------------------------------------
# Targets: each takes octets and the world, and asserts what is promised.
# ---------------------------------------------------------------------------------------

PROXIES = Networks(["127.0.0.0/8", "::1"])


def taken(octets: bytes, cuts: Sequence[int]) -> tuple[Head | str | None, bytes]:
    """Return what take_head makes of octets that come in pieces, and what it leaves."""
    incoming, searched = bytearray(), 0
    for start, end in zip([0, *cuts], [*cuts, len(octets)], strict=True):
        incoming += octets[start:end]
        try:
            head = take_head(incoming, LIMITS, searched)
        except Refusal as refusal:
            return str(refusal.error.status), b""
        if head:
            return head, bytes(incoming) + octets[end:]
        searched = len(incoming)
    return None, b""


def try_heads(octets: bytes, _world: World) -> None:
    """A head is the same however it comes, to the judge, and to h11."""
    head, rest = taken(octets, [])
    in_bytes, rest_of_bytes = taken(octets, range(1, len(octets)))
    conversation, after = read_conversation(octets)
    if isinstance(head, Head):
        assert (in_bytes, rest_of_bytes) == (head, rest)
        assert read_asked(octets[:len(octets) - len(rest) - 4])[2:4] == (head.length, head.keep_alive)
        compare_with_h11(octets, head, rest)
        assert client_of("127.0.0.1", head.forwarded_for, PROXIES)
        assert b"\r\n\r\n" in render(Reply(200, {"ok": True}), head)
    else:
        assert not conversation
        assert {int(str(text or 1)) for text in (head, in_bytes)} <= (after if octets else {1})


def try_whole_head(octets: bytes, _world: World) -> None:
    """parse_head takes what the judge takes, and refuses all else with one Bad request."""
    octets = octets.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    try:
        wanted = read_asked(octets[:-4])
    except ValueError:
        with pytest.raises(Refusal) as refused:
            parse_head(octets)
        assert refused.value.error.text == BAD
        return
    head = parse_head(octets)
    assert (head.method.encode(), head.path.encode(), head.length, head.keep_alive) == (
        wanted.method, path_of(wanted.target), wanted.length, wanted.keep_alive)


def compare_with_h11(octets: bytes, head: Head, rest: bytes) -> None:
    """What we read h11 reads too, with the same body and the same rest.

    Differences that are meant: we do without Host (h11 wants exactly one in HTTP/1.1), so each
    head gets one here in place of its own; and we close on "close" within a longer word.
    """
    text, _, _ = octets.partition(b"\r\n\r\n")
    first, *lines = text.split(b"\r\n")
    lines = [line for line in lines if line[:5].lower() != b"host:"]
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    peer.receive_data(b"\r\n".join([first, b"Host: relay", *lines, b"", rest]))
    request = peer.next_event()
    assert isinstance(request, h11.Request), request
    path = path_of(request.target).decode()
    assert (request.method.decode(), path) == (head.method, head.path)
    if len(rest) >= head.length:
        body, keeps = read_with_h11(peer)
        assert body == rest[:head.length]
        assert peer.trailing_data[0] == rest[head.length:]
        assert keeps or not head.keep_alive


def read_with_h11(peer: h11.Connection) -> tuple[bytes, bool]:
    """Return the body of a request, and whether the connection is good for another."""
    body = b""
    while isinstance(event := peer.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage), event
    return body, peer.their_state is not h11.MUST_CLOSE


def check_reply(reply: Reply, verdict: str | list[str], value: object) -> None:
    """A reply has the form of the protocol and says what the judge says."""
    json.dumps(reply.body, allow_nan=False).encode("ascii")
    if isinstance(verdict, list):
        assert reply.status == 200
        assert isinstance(reply.body, list)
        assert [item.get("error", OK) for item in reply.body] == verdict
        assert all(item["ok"] is ("error" not in item) for item in reply.body)
        return
    said = reply.body.get("error", OK)
    assert reply.body["ok"] is (said == OK)
    assert reply.status in (STATUS_OF[said] if said != OK else {200})
    full = isinstance(value, dict) and value.get("action") == "send" and said == "Too often"
    assert said == verdict or (verdict == OK and full), (said, verdict)
    allowed = {"ok", "found", "question"} if said == OK else {"ok", "error", "detail", "retry"}
    assert reply.body.keys() <= allowed


def try_core(octets: bytes, world: World) -> None:
    """A body gets what it ought to get, by begin and run as by handle, and only a good send is stored."""
    value, verdict = judge_body(octets)
    replies = [finish(world, world.core.begin(octets, SOURCE), value)]
    if verdict != BAD or value is not None:
        replies.append(finish(world, lambda: world.core.handle(value, SOURCE), value))
    for reply in replies:
        if not is_deep(octets):
            check_reply(reply, verdict, value)
        world.check_secrets(json.dumps(reply.body).encode())


def finish(world: World, outcome: Any, value: object) -> Reply:
    """Run what is left of a request; return the reply, after a look at what is stored."""
    before = world.core.store.stored()
    outcome = world.core.run(outcome)
    reply: Reply = outcome.reply if isinstance(outcome, Wait) else outcome
    after = world.core.store.stored()
    kept = isinstance(value, dict) and value.get("action") == "send" and reply.body == {"ok": True}
    assert after == before._replace(messages=before.messages + kept, bytes=after.bytes if kept else before.bytes)
    return reply


def try_value(value: object, world: World) -> None:
    """Relay.handle gives any value what it ought to get."""
    reply = finish(world, lambda: world.core.handle(value, SOURCE), value)
    check_reply(reply, judge(value), value)


def wanted_of_datagram(octets: bytes) -> dict[str, Any] | None:
    """Return what the reply to a check in a datagram ought to have beside `found`; None if there ought to be none."""
    with contextlib.suppress(NotJson):
        request = strict_json(octets)
        if len(octets) <= 2_048 and isinstance(request, dict) and request.get("action") == "check" and is_pub(
                request.get("pub")) and is_integer(request.get("at", 0)):
            name = request.get("id", "")
            if "id" not in request:
                return {"ok": True}
            return {"ok": True, "id": name} if is_id(name) else None
    return None


def is_id(name: object) -> bool:
    """Return whether a value has the form of `id`."""
    return isinstance(name, str) and 1 <= len(name) <= 16 and not set(name) - BASE64URL


def is_binding(octets: bytes) -> bool:
    """Return whether octets are a Binding request of RFC 8489 that needs nothing understood."""
    if len(octets) < 20 or struct.unpack(">HH", octets[:4]) != (1, len(octets) - 20):
        return False
    rest = octets[20:]
    while len(rest) >= 4:
        kind, size = struct.unpack(">HH", rest[:4])
        padded = 4 + (size + 3) // 4 * 4
        if kind < 0x8000 or len(rest) < padded:
            return False
        rest = rest[padded:]
    return not rest


def check_datagram(octets: bytes, reply: bytes | None, address: tuple[str, int]) -> None:
    """A datagram gets what it ought to get, or nothing."""
    if len(octets) >= 20 and octets[0] < 64 and octets[4:8] == b"\x21\x12\xa4\x42":
        masked = bytes(one ^ other for one, other in zip(socket.inet_aton(address[0]), octets[4:8], strict=True))
        wanted = struct.pack(">HHI12sHHxBH4s", 0x101, 12, 0x2112A442, octets[8:20], 0x20, 8, 1,
                             address[1] ^ 0x2112, masked)
        assert reply == (wanted if is_binding(octets) else None)
        return
    members = wanted_of_datagram(octets)
    if reply is None:
        shortest = len(json.dumps({**members, "found": True})) if members else 0
        assert members is None or shortest + 1 > len(octets) or is_deep(octets)
        return
    assert members is not None
    assert len(reply) <= len(octets)
    told = json.loads(reply)
    assert isinstance(told.pop("found"), bool)
    assert told == members


def try_datagram(octets: bytes, world: World) -> None:
    """answer_datagram and answer_stun say what they ought to, and store nothing."""
    before = world.core.store.stored()
    reply = answer_stun(octets, SOURCE, 4_242) if is_stun(octets) else answer_datagram(world.core, octets, SOURCE)
    check_datagram(octets, reply, (SOURCE, 4_242))
    assert world.core.store.stored() == before
    world.check_secrets(reply or b"")


def try_udp(octets: bytes, world: World) -> None:
    """A socket gets at most one datagram for each that it sends; the one sent behind it shows the end."""
    octets = octets[:MAX_DATAGRAM_BYTES]
    world.udp.send(octets)
    world.udp.send(FENCE)
    replies = []
    while b"fence-fence-1234" not in (reply := world.udp.recv(4_096)):
        replies.append(reply)
    assert len(replies) <= 1, replies
    if FENCE.strip(b"{}") not in octets:
        check_datagram(octets, replies[0] if replies else None, world.udp.getsockname())


class Answer(NamedTuple):
    """A reply on a connection."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def exchange(port: int, pieces: Sequence[bytes]) -> bytes:
    """Send pieces, say that there is no more, and return all that comes until the other side closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), HANG_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # closed by the relay: what it said before may still be read
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while chunk := client.recv(1 << 16):
                received += chunk
    return received


def read_answers(received: bytes, asked: Sequence[Asked]) -> list[Answer]:
    """Return the replies in what was received, strictly; whatever is left over is a failure."""
    answers: list[Answer] = []
    while received:
        if received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
            received = received[25:]
            continue
        head, end, received = received.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        status = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+", first)
        assert end, head
        assert status, first
        headers = dict(split_field(line) for line in lines)
        assert len(headers) == len(lines), "a header twice"
        method = asked[len(answers)].method if len(answers) < len(asked) else b""
        size = 0 if method == b"HEAD" or int(status[1]) == 204 else int(headers[b"content-length"])
        assert len(received) >= size, "a body cut off"
        answers.append(Answer(int(status[1]), headers, received[:size]))
        received = received[size:]
    return answers


def check_answer(answer: Answer, request: Asked | None) -> None:
    """A reply is whole and says no more than it may."""
    assert answer.headers[b"access-control-allow-origin"] == b"*"
    assert answer.status in {200, 204, *(error.status for error in ERRORS)} - {503, 507, 408}, answer
    if answer.headers.get(b"content-type") == b"application/json" and answer.body:
        told = strict_json(answer.body)
        errors = [item.get("error") for item in (told if isinstance(told, list) else [told]) if isinstance(item, dict)]
        assert all(error is None or error in STATUS_OF for error in errors)
        if not isinstance(told, list) and answer.status != 200:
            assert isinstance(told, dict)
            assert (told["ok"], answer.status in STATUS_OF[told["error"]]) == (False, True)
            assert str(told.get("retry", "")).encode() == answer.headers.get(b"retry-after", b"")
    last = request is None or not request.keep_alive
    assert (answer.headers.get(b"connection") == b"close") is last, answer


def check_conversation(answers: Sequence[Answer], asked: Sequence[Asked], after: set[int]) -> None:
    """Each request has one reply, in order; after an error of HTTP there is one more, and nothing after it."""
    wanted = len(asked) + (min(after) >= 400)
    # Who still sends when we close is reset, and his last reply may be lost on its way (after {2}).
    missing = after == {2} or (bool(asked) and after <= {0, 1} and may_wait(asked[-1]))
    assert wanted - missing <= len(answers) <= wanted, (answers, asked, after)
    for number, answer in enumerate(answers):
        request = asked[number] if number < len(asked) else None
        check_answer(answer, request)
        statuses = statuses_of(request) if request else after
        assert answer.status in statuses, (answer, request)


def gist(answer: Answer) -> tuple[Any, ...]:
    """Return what does not change with the time of a reply."""
    told = re.sub(rb'"(question|at|retry|detail)": ("[^"]*"|[0-9]+)', b"", answer.body)
    is_json = answer.headers.get(b"content-type") == b"application/json" and b'"software"' not in told
    headers = {name: value for name, value in answer.headers.items() if name not in (b"content-length", b"retry-after")}
    return answer.status, headers, told if is_json else b""


TRAILER = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"


def in_pieces(octets: bytes) -> list[bytes]:
    """Return the single bytes of what is short, else some pieces that cut lines and bodies."""
    size = 1 if len(octets) <= 300 else len(octets) // 61
    return [octets[start:start + size] for start in range(0, len(octets), size)]


def try_socket(octets: bytes, world: World) -> None:
    """Three servers give one conversation the same replies: whole, in pieces, and with another request behind."""
    asked, after = read_conversation(octets)
    stored = [server.relay.store.stored().messages for server in world.servers]
    whole, cut = (read_answers(exchange(server.server_port, pieces), asked)
                  for server, pieces in zip(world.servers, ([octets], in_pieces(octets)), strict=False))
    check_conversation(whole, asked, after)
    check_conversation(cut, asked, after)
    for one, other in zip(whole, cut, strict=False):
        assert gist(one) == gist(other) or len(after) > 1
    received = exchange(world.servers[2].server_port, [octets + TRAILER])
    asked_of_all, after_all = read_conversation(octets + TRAILER)
    behind = read_answers(received, asked_of_all)
    check_conversation(behind, asked_of_all, after_all)
    if after == {0} and (not asked or asked[-1].keep_alive):
        assert asked_of_all[:-1] == asked
        assert behind[-1].status == 200
    check_stored(world, stored, ((asked, whole), (asked, cut), (asked_of_all, behind)))
    world.check_secrets(received)


Talk = tuple[Sequence[Asked], Sequence[Answer]]


def check_stored(world: World, before: Sequence[int], talks: Sequence[Talk]) -> None:
    """Each store has as many messages more as sends were answered with ok, or lost their reply."""
    for server, messages, (asked, answers) in zip(world.servers, before, talks, strict=True):
        kept = sum(answer.body.strip() == b'{"ok": true}' and request.method == b"POST"
                   for request, answer in zip(asked, answers, strict=False))
        lost = max(0, len(asked) - len(answers))
        assert 0 <= server.relay.store.stored().messages - messages - kept <= lost


Target = Callable[[bytes, World], None]
TARGETS: dict[str, tuple[Target, dict[str, bytes]]] = {
    "take_head": (try_heads, HTTP_SEEDS), "parse_head": (try_whole_head, HTTP_SEEDS), "core": (try_core, JSON_SEEDS),
    "datagram": (try_datagram, UDP_SEEDS), "HTTP socket": (try_socket, HTTP_SEEDS), "UDP socket": (try_udp, UDP_SEEDS)}

# ---------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Return the relays of all tests here; at the end nothing may be left in them."""
    made = World()
    yield made
    made.close()


def run(name: str, world: World, examples: int) -> None:
    """Try so many inputs on a target."""
    target, seeds = TARGETS[name]

    @settings(derandomize=True, deadline=None, max_examples=examples, database=None,
              suppress_health_check=list(HealthCheck))
    @given(inputs(seeds))
    def attempt(octets: bytes) -> None:
        target(octets, world)

    attempt()


@pytest.mark.parametrize("name", TARGETS)
def test_each_seed_gets_what_the_judge_says(name: str, world: World) -> None:
    target, seeds = TARGETS[name]
    for octets in seeds.values():
        target(octets, world)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_get_what_the_judge_says(name: str, world: World) -> None:
    run(name, world, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_seeds_get_what_the_judge_says(name: str, world: World) -> None:
    run(name, world, 1_000)


TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(["check", "send", "receive", ALICE, BOB, KEY, "\ud800"])
NUMBERS = st.integers() | st.sampled_from([2**63, -1, 10**400, 101]) | st.floats() | st.booleans() | st.none()
NAMES = st.sampled_from(["action", "pub", "ext", "data", "answer", "at", "wait", "limit", "id"])
VALUES = st.recursive(TEXTS | NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    TEXTS | NAMES, inner, max_size=6), max_leaves=10)
NEARLY = st.builds(lambda request, changes: {**request, **changes}, st.sampled_from([CHECK, SEND, RECEIVE]),
                   st.dictionaries(NAMES, VALUES, max_size=2))


@settings(derandomize=True, deadline=None, max_examples=200, database=None, suppress_health_check=list(HealthCheck))
@given(VALUES | NEARLY | st.lists(NEARLY, max_size=4))
def test_any_value_gets_what_the_judge_says(world: World, value: object) -> None:
    try_value(value, world)


@contextlib.contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    """Fail what has not ended after so many seconds; what is tried takes milliseconds."""
    def fail(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


USED_NAMES = (b"Accept", b"Connection", b"Content-Length", b"Expect", b"Transfer-Encoding", b"X-Forwarded-For", b"A")


@pytest.mark.parametrize("run_of", [b" ", b"\t", b" a", b",", b"1", b"\xa0", b"close", b", ::1"])
def test_a_head_takes_no_more_than_linear_time(run_of: bytes) -> None:
    """Tens of KiB a line: what grows with the square takes half a minute, what does not a few milliseconds."""
    octets = GET + b"".join(b"%s: a%sb\r\n" % (name, run_of * (65_536 // len(run_of))) for name in USED_NAMES) + b"\r\n"
    with no_hang(3), contextlib.suppress(Refusal):
        parse_head(octets)
    with no_hang(3):
        assert client_of("127.0.0.1", (run_of * 16_384).decode("latin-1"), PROXIES)


@pytest.mark.slow
def test_the_long_form_says_what_it_has_tried() -> None:
    finished = subprocess.run([sys.executable, ROOT / "bench" / "fuzz.py", "6", "--seed", "1"], check=False,
                              capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout
    *_, last = finished.stdout.splitlines()
    assert re.fullmatch(r"seed 1: [0-9,]{3,} inputs: no promise broken", last)
