"""Cases of the content of messages: payloads, proofs, commitments, hashes, emoji."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cases_small import EXT_AT
from vector_forms import (
    commit,
    compare,
    hash_of,
    invite,
    make_jws,
    prove,
    prove_renewal,
    sdp,
    sign_otherwise,
    to_json,
)
from vector_keys import Json, b64, sha256, unb64
from vector_people import (
    A0,
    A0_AT,
    A1_AT,
    A_HASH,
    ALICE,
    B0_AT,
    BOB,
    HELLO,
    INVITATION,
    MALLORY,
    MALLORYS_HELLO,
    NEW_ALICE,
    OTHER_R,
    OTHER_S,
    START,
    WELCOME,
    R,
    S,
    build,
    from_alice,
    from_bob,
    hello_payload,
)

DAY = 86_400_000_000

# 2026-11-23: a clock that shows less is not set.
RELEASE = 1_795_392_000_000_000

# Those of the Matrix specification, which nobody makes.
EMOJI = Path(__file__).parent / "library" / "emoji.json"


# Bob sends these here, and Alice sends the others.
OF_BOB = ("hello", "ready", "offer")


def base_payload(kind: str) -> Json:
    """Return a good payload of a type."""
    made: Json = {
        "hello": hello_payload(),
        "welcome": build("welcome", B0_AT, ALICE, 2, hash_of(HELLO), at=A1_AT, r=R),
        "used": build("used", B0_AT, ALICE, 2, hash_of(HELLO), at=A0_AT, r=R),
    }
    if kind in made:
        return dict(made[kind])
    if kind in OF_BOB:
        return from_bob(kind)
    if kind == "renew":
        proof = prove_renewal(NEW_ALICE, ALICE, NEW_ALICE, INVITATION, A1_AT)
        return from_alice(kind, next=NEW_ALICE.pub, proof=proof)
    return from_alice(kind)


# A member that is left out.
GONE = object()

MANY_NUMBERS = ["0", -1, 0, 2**53, 2**63, True, None, [1], 1.5]

BAD_KEYS = [
    "",
    None,
    5,
    ALICE.pub[:-1],
    ALICE.pub + "=",
    ALICE.pub[:-1] + "B",
    b64(b"\4" + unb64(ALICE.pub)[1:]),
]

def nested(levels: int, before: bytes = b"") -> bytes:
    """Return arrays in each other, each with something before the next."""
    return (b"[" + before) * levels + b"0" + b"]" * levels


BAD_SDP: list[Any] = [
    GONE,
    "v=0",
    [],
    {},
    {"type": "offer"},
    {"sdp": "v=0"},
    {"type": "offer", "sdp": 5},
    {"type": "offer", "sdp": None},
    {"type": "answer", "sdp": "v=0"},
    {"type": "rollback", "sdp": "v=0"},
]

BAD_APPS: list[Any] = ["", 5, [], "a" * 129, "a list", "-a", "lüste", "a\n"]

BAD_VERSIONS: list[Any] = [
    [],
    [0],
    [-1],
    [1000],
    [1.5],
    [True],
    ["1"],
    [None],
    [[1]],
    [1, 1],
    [2, 1],
    [1, 2, 2],
]

WRONG_MEMBERS: Sequence[tuple[str, str, list[Any]]] = (
    ("call", "seq", [GONE, *MANY_NUMBERS]),
    ("call", "from", [GONE, *BAD_KEYS]),
    ("call", "to", [GONE, None, 5, [A1_AT]]),
    ("call", "connectoid", [GONE, None, 5, [A1_AT]]),
    ("call", "re", [GONE, "", 5, A_HASH[:-1], A_HASH[:-1] + "B", A_HASH + "="]),
    ("hello", "re", [GONE, A_HASH]),
    ("hello", "nonce", [GONE, None, R[:-1], R[:-1] + "B", b64(bytes(15)), b64(bytes(17))]),
    ("hello", "sdpOffer", [None, *BAD_SDP]),
    ("welcome", "re", [GONE, None, R]),
    ("welcome", "r", [GONE, None, R[:-1] + "B", A_HASH]),
    ("welcome", "sdpAnswer", ["v=0", sdp("offer", "Alice")]),
    *(
        (kind, "versions", [0, 1, "1", {}, *BAD_VERSIONS, list(range(1, 18))])
        for kind in ("hello", "welcome")
    ),
    *((kind, "app", BAD_APPS) for kind in ("hello", "welcome")),
    ("used", "re", [None]),
    ("used", "r", [GONE, None]),
    ("ready", "re", [None]),
    ("ready", "sdpOffer", ["v=0", sdp("answer", "Bob")]),
    ("offer", "sdpOffer", [GONE, None]),
    ("answer", "re", [None]),
    ("answer", "sdpAnswer", [GONE, None, sdp("offer", "Alice")]),
    ("moved", "re", [GONE, False, A_HASH[:-1]]),
    ("renew", "re", [GONE, A_HASH]),
    ("renew", "next", [GONE, *BAD_KEYS]),
    ("renew", "proof", [GONE, "", None, 5, b64(bytes(95)), b64(bytes(97)), b64(bytes(96)) + "="]),
    ("unshare", "re", [GONE, False]),
    (
        "call",
        "type",
        [
            GONE,
            None,
            5,
            "",
            "Call",
            "bye",
            ["call"],
            {"call": 1},
            "constructor",
            "toString",
            "__proto__",
        ],
    ),
)

GOOD_MEMBERS: Sequence[tuple[str, str, Any]] = (
    ("call", "re", A_HASH),
    ("call", "seq", 1),
    ("call", "seq", 2**53 - 1),
    ("ready", "sdpOffer", None),
    ("ready", "sdpOffer", sdp("offer", "Bob")),
    ("welcome", "sdpAnswer", None),
    ("welcome", "sdpAnswer", sdp("answer", "Alice")),
    ("moved", "re", A_HASH),
    ("unshare", "re", A_HASH),
    ("call", "later", {"an": ["unknown", "member"]}),
    ("call", "sdpOffer", 5),
    ("offer", "sdpOffer", sdp("offer", "Bob") | {"x": "🔑"}),
    ("hello", "r", 5),
    *(
        (kind, "versions", versions)
        for kind in ("hello", "welcome")
        for versions in (None, [1], [2], [1, 2], [999], list(range(1, 16)), list(range(1, 17)))
    ),
    *(
        (kind, "app", app)
        for kind in ("hello", "welcome")
        for app in (None, "a", "https://list.example.org:8443/a_b-c", "a" * 127, "a" * 128)
    ),
    ("used", "versions", 5),
    ("call", "versions", []),
    ("call", "levels", json.loads(nested(99))),
    ("call", "levels", '["' * 200),
    ("call", "connectoid", "no address: that is looked at later"),
    ("call", "to", ""),
)


def payload_text(kind: str, octets: bytes) -> str:
    """Return a message over a payload, signed by the right side for its type."""
    signer = ALICE
    if kind in OF_BOB:
        signer = BOB
    jws = make_jws(signer, octets)
    if kind == "hello":
        return prove(S, jws)
    return jws


def raw_payloads() -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes that are no JSON object of a message."""
    good = to_json(from_alice("call"))
    yield "empty", b""
    yield "null", b"null"
    yield "array", b"[" + good + b"]"
    yield "text", b'"call"'
    yield "number", b"1"
    yield "cut off", good[:-1]
    yield "something after it", good + b"}"
    yield "NUL after it", good + b"\0"
    yield "byte order mark", b"\xef\xbb\xbf" + good
    yield "UTF-16", good.decode().encode("utf-16-le")
    yield "not UTF-8", good[:-1] + b',"x":"\xff"}'
    yield "overlong UTF-8", good[:-1] + b',"x":"\xc0\xaf"}'
    yield "a surrogate in UTF-8", good[:-1] + b',"x":"\xed\xa0\x80"}'
    yield "an escaped lone surrogate", good[:-1] + b',"x":"\\ud800"}'
    yield "NaN", good[:-1] + b',"x":NaN}'
    yield "Infinity", good[:-1] + b',"x":-Infinity}'
    yield "single quotes", good.replace(b'"', b"'")
    yield "a comma too many", good[:-1] + b",}"
    yield "a comment", good + b"/**/"
    yield "a control character", good[:-1] + b',"x":"\n"}'
    # The payload is a level itself.
    yield "101 levels", good[:-1] + b',"x":' + nested(100) + b"}"
    closed = nested(100, b'"]",')
    yield "101 levels that strings seem to close", good[:-1] + b',"x":' + closed + b"}"
    yield "members in __proto__ alone", b'{"__proto__":' + good + b"}"


def payload_cases() -> Iterator[Json]:
    """Yield messages whose payload is to be looked at, all else being right."""
    yield from good_payload_cases()
    yield from refused_payload_cases()


def good_payload_cases() -> Iterator[Json]:
    """Yield payloads that are read."""
    kinds = ("hello", "welcome", "used", "ready", "offer", "answer", "call", "moved", "renew",
             "unshare")
    for kind in kinds:
        octets = to_json(base_payload(kind))
        yield {
            "name": kind,
            "payload": octets.decode(),
            "text": payload_text(kind, octets),
            "type": kind,
        }
    for kind, member, value in GOOD_MEMBERS:
        octets = to_json(base_payload(kind) | {member: value})
        yield {
            "name": f"{kind}, {member} {to_json(value).decode()}",
            "payload": octets.decode(),
            "text": payload_text(kind, octets),
            "type": kind,
        }


def refused_payload_cases() -> Iterator[Json]:
    """Yield payloads that are refused."""
    for kind, member, value in (
        (kind, member, value) for kind, member, values in WRONG_MEMBERS for value in values
    ):
        changed = {
            name: given
            for name, given in (base_payload(kind) | {member: value}).items()
            if given is not GONE
        }
        octets = to_json(changed)
        what = "left out"
        if value is not GONE:
            what = to_json(value).decode()
        yield {
            "name": f"{kind}, {member} {what}",
            "payload": octets.decode(),
            "text": payload_text(kind, octets),
            "refused": "payload",
        }
    for name, octets in raw_payloads():
        yield {
            "name": name,
            "payload_hex": octets.hex(),
            "text": payload_text("call", octets),
            "refused": "payload",
        }


def proof_cases() -> Iterator[Json]:
    """Yield hellos, with the secret of the link."""
    jws = make_jws(BOB, hello_payload())
    other = make_jws(BOB, hello_payload(nonce=OTHER_R))
    yield {"name": "Bob's", "secret": S.hex(), "text": HELLO}
    yield {"name": "Mallory's, who has the link", "secret": S.hex(), "text": MALLORYS_HELLO}
    yield {"name": "under another secret", "secret": OTHER_S.hex(), "text": prove(OTHER_S, jws)}
    for name, text in {
        "another secret": prove(OTHER_S, jws),
        "the proof of another hello": f"{jws}.{prove(S, other).rpartition('.')[2]}",
        "h for S": prove(commit(ALICE.pub, R), jws),
        "S || h for S": prove(S + commit(ALICE.pub, R), jws),
        "S in base64url": prove(b64(S).encode(), jws),
        "no secret": prove(b"", jws),
        "empty proof": jws + ".",
        "half of the proof": HELLO[:-22],
        "SHA-384": f"{jws}.{b64(hmac.digest(S, jws.encode(), 'sha384'))}",
        "over the dot too": f"{jws}.{prove(S, jws + '.').rpartition('.')[2]}",
        "padded proof": HELLO + "=",
        "over the payload alone": f"{jws}.{prove(S, jws.split('.')[1]).rpartition('.')[2]}",
        "S itself": f"{jws}.{b64(S)}",
        "another alphabet": f"{jws}.{'+' * 43}",
        "unused bits of the proof": HELLO[:-1] + chr(ord(HELLO[-1]) + 1),
    }.items():
        yield {"name": name, "secret": S.hex(), "text": text, "refused": "proof"}


def commitment_cases() -> Iterator[Json]:
    """Yield signing keys and R, with h."""
    for name, signer, r in (
        ("Alice's", ALICE.pub, R),
        ("Alice's with another R", ALICE.pub, OTHER_R),
        ("Mallory's", MALLORY.pub, R),
    ):
        yield {"name": name, "from": signer, "r": r, "h": b64(commit(signer, r))}
    h = b64(commit(ALICE.pub, R))
    yield {"name": "another R", "from": ALICE.pub, "r": OTHER_R, "h": h, "refused": "commitment"}
    yield {"name": "another key", "from": MALLORY.pub, "r": R, "h": h, "refused": "commitment"}
    yield {"name": "a mailbox key", "from": A0.pub, "r": R, "h": h, "refused": "commitment"}
    texts = b64(sha256(ALICE.pub.encode(), R.encode()))
    yield {"name": "over the texts", "from": ALICE.pub, "r": R, "h": texts, "refused": "commitment"}
    negated = b64(bytes([unb64(ALICE.pub)[0] ^ 1]) + unb64(ALICE.pub)[1:])
    yield {
        "name": "the other point with the same x",
        "from": negated,
        "r": R,
        "h": h,
        "refused": "commitment",
    }


def hash_cases() -> Iterator[Json]:
    """Yield messages with their hashes."""
    yield {"name": "hello", "text": HELLO, "hash": hash_of(HELLO)}
    yield {
        "name": "hello without its proof",
        "text": HELLO.rpartition(".")[0],
        "hash": hash_of(HELLO),
    }
    yield {
        "name": "hello with another proof",
        "text": prove(OTHER_S, make_jws(BOB, hello_payload())),
        "hash": hash_of(HELLO),
    }
    yield {"name": "welcome", "text": WELCOME, "hash": hash_of(WELCOME)}
    yield {
        "name": "hello with its other signature",
        "text": prove(S, sign_otherwise(HELLO)),
        "hash": hash_of(HELLO),
    }
    yield {
        "name": "welcome with its other signature",
        "text": sign_otherwise(WELCOME),
        "hash": hash_of(WELCOME),
    }


def emoji_of(numbers: list[int]) -> list[str]:
    """Return the words that two people read to each other."""
    emoji = json.loads(EMOJI.read_text(encoding="utf-8"))["emoji"]
    return [" ".join(emoji[number]) for number in numbers]


def comparison_cases() -> Iterator[Json]:
    """Yield the inputs of comparison strings; each differs from the first in one thing."""
    first = {"invitation": INVITATION, "hello": HELLO, "from": ALICE.pub, "r": R}
    hosted = invite(A0_AT, S, commit(MALLORY.pub, R))
    for name, changes in {
        "Alice and Bob": {},
        "hello in three parts": {"hello": HELLO.rpartition(".")[0]},
        "hello with its other signature": {"hello": prove(S, sign_otherwise(HELLO))},
        "another hello": {"hello": MALLORYS_HELLO},
        "another link": {"invitation": hosted},
        "another signing key": {"from": MALLORY.pub},
        "another r": {"r": OTHER_R},
        "two mailboxes": {"invitation": invite(f"{A1_AT}~{EXT_AT}", S, commit(ALICE.pub, R))},
    }.items():
        case = first | changes
        numbers = compare(*case.values())
        yield {"name": name, **case, "numbers": numbers, "emoji": emoji_of(numbers)}


def seq_cases() -> Iterator[Json]:
    """Yield the last `seq` of a contact and the time, with the next `seq`."""
    for name, last, now, seq in (
        ("the clock goes on", START, START + 5, START + 5),
        ("the same microsecond", START, START, START + 1),
        ("the clock was set back", START, START - 10**9, START + 1),
        ("the next seq is a day ahead of the clock", START - 1, START - DAY, START),
        ("the next seq is more than a day ahead", START, START - DAY, START - DAY),
        ("the last seq is the largest but one", 2**53 - 2, START, START),
        ("a clock not yet set, far behind the last", START, RELEASE - 1, START + 1),
        ("a clock just set, far behind the last", START, RELEASE, RELEASE),
        ("a clock that shows 2^52", START, 2**52, START + 1),
        ("the first", 0, START, START),
        ("a clock that stands at 1970", START, 0, START + 1),
    ):
        yield {"name": name, "last": last, "now_us": now, "seq": seq}
