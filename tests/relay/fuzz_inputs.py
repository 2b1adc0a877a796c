"""The inputs of the fuzz: seeds of every shape, and edits that damage them."""

from __future__ import annotations

import json
import struct

from harness import Owner
from mutation import KINDS, Mutator

# ---------------------------------------------------------------------------------------
# Seeds: one for each shape, good and bad. An input that has found something is added.
# ---------------------------------------------------------------------------------------

ALICE, BOB = Owner(1).pub, Owner(2).pub
# This API key is too long for an `id`, the only thing that is echoed.
KEY = "alice-has-paid-for-this"
CHECK = {"pub": ALICE, "ext": None, "action": "check", "at": 0}
SEND = {"pub": ALICE, "ext": None, "action": "send", "data": "QUJD"}
RECEIVE = {"pub": BOB, "action": "receive", "answer": "2qk1X", "at": 0, "limit": 1}

JSON_SEEDS: dict[str, bytes] = {
    name: json.dumps(value).encode()
    for name, value in {
        "check": CHECK,
        "check with all": {**CHECK, "wait": 1, "id": "Ab_-09", "at": 2**63},
        "send": SEND,
        "send to bob": {**SEND, "pub": BOB, "data": "AA"},
        "receive": RECEIVE,
        "receive many": {**RECEIVE, "limit": 100, "ext": KEY},
        "batch": [CHECK, {**CHECK, "pub": BOB, "wait": 2}],
        "batch with others": [CHECK, SEND, RECEIVE, None, [CHECK], {**CHECK, "at": -1}],
        "empty batch": [],
        "too long a batch": [{}] * 257,
        "key": {**CHECK, "ext": KEY},
        "data too long": {**SEND, "data": "A" * 32_769},
        "long ext": {**CHECK, "ext": "\U0001f600" * 1_024},
        "longer ext": {**CHECK, "ext": "x" * 1_025},
        "booleans": {**CHECK, "at": True, "wait": False},
        "boolean limit": {**RECEIVE, "limit": True},
        "fraction": {**CHECK, "at": 1.0},
        "strings": {**CHECK, "at": "0"},
        "null at": {**CHECK, "at": None},
        "pub with bits": {**CHECK, "pub": ALICE[:-1] + "x"},
        "padded pub": {**SEND, "pub": ALICE + "=="},
        "uncompressed": {**SEND, "pub": "BA" + ALICE[2:]},
        "no point": {**SEND, "pub": "Ag" + "A" * 62 + "BA"},
        "odd data": {**SEND, "data": "AAAAA"},
        "other alphabet": {**SEND, "data": "+/+/"},
        "data line": {**SEND, "data": "AA\n"},
        "key as answer": {**RECEIVE, "answer": KEY},
        "unhashable": {"action": ["check"], "pub": {}},
        "unknown action": {**CHECK, "action": "delete"},
        "long id": {**CHECK, "id": "A" * 17},
        "null id": {**CHECK, "id": None},
    }.items()
} | {
    "lone surrogate": json.dumps({**RECEIVE, "answer": "\ud800"}).encode(),
    "lone surrogate aside": json.dumps({**CHECK, "unknown": ["\ud800"]}).encode(),
    "lone surrogate that does not count": (
        b'{"ext": "\\ud800", "ext": null, "action": "check", "pub": "%s"}' % ALICE.encode()
    ),
    "pair": json.dumps({**RECEIVE, "answer": "\U0001f600"}).encode(),
    "same name twice": b'{"action": "send", "action": "check", "pub": 0, "pub": "%s"}'
    % ALICE.encode(),
    "nan": b'{"action": "check", "at": NaN}',
    "infinity": b"[-Infinity]",
    "overflow": b'{"at": 1e999}',
    "huge integer": b'{"at": ' + b"9" * 4_301 + b"}",
    "large integer": json.dumps({**CHECK, "at": 10**400}).encode(),
    "exponent": b'{"action": "check", "pub": "%s", "at": 1e3}' % ALICE.encode(),
    "deep": b"[" * 3_000 + b"]" * 3_000,
    "deep objects": b'{"a":' * 1_500 + b"1" + b"}" * 1_500,
    "bom": b"\xef\xbb\xbf{}",
    "utf-16": '{"at": 0}'.encode("utf-16"),
    "latin-1": b'{"ext": "\xe9"}',
    "overlong": b'"\xc0\xaf"',
    "utf-8 surrogate": b'"\xed\xa0\x80"',
    "two values": json.dumps(CHECK).encode() + b" {}",
    "cut off": b'{"action": "che',
    "control in a string": b'{"ext": "\n"}',
    "nul": b"\x00",
    "comment": b"{} // no",
    "spaces": b" \t\r\n{}\n",
    "nothing": b"",
    "other space": b"\x0c{}",
    "comma": b'{"at": 0,}',
    "minus": b'{"at": -0}',
    "zeros": b'{"at": 00}',
}


def framed(body: bytes, *lines: bytes, first: bytes = b"POST / HTTP/1.1") -> bytes:
    """Return a request with a body and further lines of headers."""
    return b"\r\n".join(
        [first, b"Host: relay", b"Content-Length: %d" % len(body), *lines, b"", body]
    )


BODY = JSON_SEEDS["check"]
GET = b"GET / HTTP/1.1\r\nHost: relay\r\n"
HTTP_SEEDS: dict[str, bytes] = {
    f"post {name}": framed(body) for name, body in JSON_SEEDS.items()
} | {
    "page": GET + b"\r\n",
    "document": GET + b"Accept: application/json\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: other\r\n\r\n",
    "head": framed(b"", first=b"HEAD / HTTP/1.1"),
    "metrics": b"GET /metrics?x=/ HTTP/1.1\r\n\r\n",
    "old": framed(BODY, b"Connection: keep-alive", first=b"POST / HTTP/1.0"),
    "preflight": (
        b"OPTIONS * HTTP/1.1\r\nOrigin: https://a\r\n"
        b"Access-Control-Request-Method: POST\r\n\r\n"
    ),
    "close": framed(BODY, b"Connection: Upgrade, close"),
    "closed": framed(BODY, b"connection: closed"),
    "absolute": b"GET http://relay:80/health HTTP/1.1\r\n\r\n",
    "absolute bare": b"GET HTTPS://a?b HTTP/1.1\r\n\r\n",
    "connect": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no path": b"GET /../health HTTP/1.1\r\n\r\n",
    "wrong method": b"PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx",
    "own method": b"get / HTTP/1.1\r\n\r\n",
    "expect": framed(BODY, b"Expect: 100-Continue"),
    "expect other": framed(BODY, b"Expect: tea"),
    "forwarded": framed(
        BODY, b"X-Forwarded-For: 192.0.2.7, ::1", b"x-forwarded-for: ::ffff:192.0.2.9, x, 127.0.0.1"
    ),
    "pipelined": framed(BODY)
    + framed(JSON_SEEDS["send"])
    + GET
    + b"Connection: close\r\n\r\n"
    + GET,
    "pipelined waits": framed(JSON_SEEDS["check with all"]) * 3,
    "too many sends": framed(JSON_SEEDS["send"]) * 34,
    "smuggled": framed(framed(BODY)),
    "two lengths": framed(BODY, b"Content-Length: 5"),
    "same lengths": framed(b"{}", b"Content-Length: 2"),
    "list of lengths": GET + b"Content-Length: 2, 2\r\n\r\n{}",
    "plus": GET + b"Content-Length: +2\r\n\r\n{}",
    "zeros": GET + b"Content-Length: 002\r\n\r\n{}",
    "ten digits": GET + b"Content-Length: 0000000002\r\n\r\n{}",
    "hex": GET + b"Content-Length: 0x2\r\n\r\n{}",
    "empty length": GET + b"Content-Length:\r\n\r\n{}",
    "negative": GET + b"Content-Length: -1\r\n\r\n",
    "arabic": GET + "Content-Length: ٢\r\n\r\n{}".encode(),
    "tabbed length": GET + b"Content-Length:\t2\t\r\n\r\n{}",
    "length form feed": GET + b"Content-Length: \x0c2\r\n\r\n{}",
    "too long": GET + b"Content-Length: 99999999\r\n\r\n",
    "chunked": GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": framed(b"0\r\n\r\n", b"transfer-encoding: chunked"),
    "identity": framed(b"", b"Transfer-Encoding:"),
    "chunked spelt oddly": framed(b"", b"Transfer-Encoding:\x0bchunked"),
    "long s": framed(b"", "Expe\u017ft: 1".encode()),
    "space before colon": framed(BODY, b"Content-Length : 5"),
    "folded": framed(BODY, b"A: b", b" Content-Length: 5"),
    "folded length": GET + b"Content-Length:\r\n 2\r\n\r\n{}",
    "folded first": b"GET / HTTP/1.1\r\n A: b\r\n\r\n",
    "nul": framed(BODY, b"A: \x00"),
    "control": framed(BODY, b"A: \x1f\x7f"),
    "latin-1": framed(BODY, b"A: \xe9\x85\xa0"),
    "bare lf in a value": framed(BODY, b"A: b\nc"),
    "bare cr in a value": framed(BODY, b"A: b\rc"),
    "form feed": framed(BODY, b"A: \x0b\x0c"),
    "bare cr in half a head": GET + b"A: b\rc",
    "lf in half a head": GET + b"A\n",
    "nul in half a head": GET + b"A\0",
    "bare lf": framed(BODY, b"A: b\nContent-Length: 5"),
    "bare cr": framed(BODY, b"A: b\rContent-Length: 5"),
    "lf only": b"GET / HTTP/1.1\n\n",
    "cr cr lf": b"GET / HTTP/1.1\r\r\n\r\n",
    "lf at the end": b"GET / HTTP/1.1\r\n\n",
    "empty lines first": b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "empty name": framed(b"", b": x"),
    "no colon": framed(b"", b"A"),
    "line": b"GET  / HTTP/1.1\r\n\r\n",
    "tab": b"GET\t/ HTTP/1.1\r\n\r\n",
    "space": b"GET / HTTP/1.1 \r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http 0.9": b"GET /\r\n\r\n",
    "http 1.2": b"GET / HTTP/1.2\r\n\r\n",
    "lower": b"GET / http/1.1\r\n\r\n",
    "target in utf-8": "GET /é HTTP/1.1\r\n\r\n".encode(),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00",
    "body after get": GET
    + b"Content-Length: 18\r\n\r\nGET /b HTTP/1.1\r\n\r\nGET /health HTTP/1.0\r\n\r\n",
    "spaces in a value": GET + b"Accept: a" + b" " * 300 + b"b\r\n\r\n",
    "big head": GET + b"A: b\r\n" * 700,
    "half a head": b"POST / HTTP/1.1\r\nContent-Le",
    "half a body": framed(BODY)[:-9],
    "one cr": b"GET / HTTP/1.1\r",
}


def stun(*attributes: tuple[int, bytes], kind: int = 1, excess: int = 0) -> bytes:
    """Return a STUN message with attributes, whose length may be a lie."""
    octets = b"".join(struct.pack(">HH", name, len(value)) + value + bytes(-len(value) % 4)
                      for name, value in attributes)
    return struct.pack(">HHI", kind, len(octets) + excess, 0x2112A442) + b"transaction!" + octets


UDP_SEEDS: dict[str, bytes] = JSON_SEEDS | {
    "stun": stun(),
    "software": stun((0x8022, b"test!")),
    "username": stun((6, b"alice")),
    "last required": stun((0x7FFF, b"")),
    "first optional": stun((0x8000, b"abc")),
    "stun lies": stun(excess=4),
    "stun cut off": stun((0x8022, b"abcd"))[:-2],
    "indication": stun(kind=0x11),
    "allocate": stun(kind=3),
    "success": stun(kind=0x101),
    "two attributes": stun((0x8022, b""), (0x8028, b"CRC!")),
    "huge attribute": stun()[:2] + b"\0\4" + stun()[4:] + b"\x80\x22\xff\xff",
    "stun like": b"\x3f" + stun()[1:],
    "channel": b"\x40" + stun()[1:],
    "2048 bytes": BODY + b" " * (2_048 - len(BODY)),
    "2049 bytes": BODY + b" " * (2_049 - len(BODY)),
}

# ---------------------------------------------------------------------------------------
# Mutations.
# ---------------------------------------------------------------------------------------

PIECES = (
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b"\x0b",
    b"\x85",
    b"\xff",
    b":",
    b",",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"0",
    b"1",
    b"-1",
    b"1.0",
    b"1e9",
    b"9" * 20,
    b"true",
    b"null",
    b"NaN",
    b"\\ud800",
    b"\\u0000",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"Content-Length: 1\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"close",
    b"Expect: 100-continue\r\n",
    b"X-Forwarded-For: ::1\r\n",
    b"A: b\r\n",
    b"HTTP/1.0",
    b"HTTP/1.1",
    b"HEAD",
    b"OPTIONS",
    b"http://a",
    b"/health",
    b"/metrics",
    b"check",
    b"send",
    b"receive",
    b'"wait": 60, ',
    b'"limit": 2, ',
    b'"id": "a", ',
    b'"at": 0, ',
    ALICE.encode(),
    KEY.encode(),
    b"GET / HTTP/1.1\r\n\r\n",
    *UDP_SEEDS.values(),
)


# The largest datagram of UDP over IPv4.
MAX_DATAGRAM_BYTES = 65_507

MUTATOR = Mutator(
    {**KINDS, "frame": lambda octets, where, size, piece: framed(octets)}, PIECES)
