"""Cases of the envelope: seals, padding, JWS."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator

from vector_forms import (
    CHANNEL,
    HEADER,
    MESSAGE,
    QUESTION,
    hash_of,
    make_jws,
    pad,
    prove,
    seal,
    sign_otherwise,
    to_json,
)
from vector_keys import (
    HALF,
    ORDER,
    Json,
    b64,
    hpke_seal,
    no_point,
    scatter,
    sha256,
    sign,
    sign_der,
    unb64,
)
from vector_people import (
    A0,
    A1,
    ALICE,
    BOB,
    HELLO,
    MALLORY,
    START,
    WELCOME,
    S,
    from_alice,
    from_bob,
    hello_payload,
    used,
)


def flip(octets: bytes, place: int) -> bytes:
    """Return bytes with one bit changed."""
    changed = bytearray(octets)
    changed[place] ^= 1
    return bytes(changed)


INFOS = {
    "message": MESSAGE,
    "question": QUESTION,
    "channel": CHANNEL + b"\0" + sha256(b"offer") + sha256(b"answer"),
}


def good_seals() -> Iterator[Json]:
    """Yield seals that HPKE opens."""
    for name, info in INFOS.items():
        plaintext = scatter(name, 64)
        yield {
            "name": name,
            "private": A0.private,
            "info": info.hex(),
            "sealed": hpke_seal(A0.pub, info, plaintext).hex(),
            "plaintext": plaintext.hex(),
        }
    yield {
        "name": "nothing in it",
        "private": A0.private,
        "info": MESSAGE.hex(),
        "sealed": hpke_seal(A0.pub, MESSAGE, b"").hex(),
        "plaintext": "",
    }


def bad_seals() -> Iterator[Json]:
    """Yield seals that it must not open."""
    for name, info, sealed in (*sealed_for_another_use(), *damaged_seals()):
        yield {
            "name": name,
            "private": A0.private,
            "info": info.hex(),
            "sealed": sealed.hex(),
            "refused": "seal",
        }


def sealed_for_another_use() -> tuple[tuple[str, bytes, bytes], ...]:
    """Return names, the `info` to open with, and a seal with another `info` or to another key."""
    good = hpke_seal(A0.pub, MESSAGE, scatter("message", 64))
    swapped = CHANNEL + b"\0" + sha256(b"answer") + sha256(b"offer")
    return (
        ("a message opened as a question", QUESTION, good),
        (
            "a question opened as a message",
            MESSAGE,
            hpke_seal(A0.pub, QUESTION, scatter("question", 43)),
        ),
        (
            "a challenge of another offer",
            INFOS["channel"],
            hpke_seal(A0.pub, swapped, scatter("channel", 32)),
        ),
        ("another key", MESSAGE, hpke_seal(A1.pub, MESSAGE, scatter("message", 64))),
        ("no info", MESSAGE, hpke_seal(A0.pub, b"", scatter("message", 64))),
        (
            "info with a zero after it",
            MESSAGE,
            hpke_seal(A0.pub, MESSAGE + b"\0", scatter("message", 64)),
        ),
        (
            "HKDF-SHA256 named in the suite",
            MESSAGE,
            hpke_seal(A0.pub, MESSAGE, scatter("message", 64), kdf=1),
        ),
    )


def damaged_seals() -> tuple[tuple[str, bytes, bytes], ...]:
    """Return names, the `info`, and a damaged seal."""
    good = hpke_seal(A0.pub, MESSAGE, scatter("message", 64))
    return (
        ("a bit of the tag", MESSAGE, flip(good, -1)),
        ("a bit of the text", MESSAGE, flip(good, 100)),
        ("a bit of the ephemeral key", MESSAGE, flip(good, 40)),
        ("ephemeral key compressed", MESSAGE, b"\2" + good[1:]),
        ("cut off by one", MESSAGE, good[:-1]),
        ("one byte more", MESSAGE, good + b"\0"),
        ("cut off in the ephemeral key", MESSAGE, good[:90]),
        ("the ephemeral key alone", MESSAGE, good[:97]),
        ("nothing", MESSAGE, b""),
        ("zeros", MESSAGE, bytes(200)),
    )


def seal_cases() -> Iterator[Json]:
    """Yield seals that HPKE opens, and those that it must not."""
    yield from good_seals()
    yield from bad_seals()


def good_paddings() -> Iterator[Json]:
    """Yield texts of many lengths."""
    for length in (0, 1, 1_020, 1_021, 2_044, 2_045, 4_092, 8_188, 8_189, 16_380):
        text = ("x.y-z_" * length)[:length]
        yield {
            "name": f"text of {length}",
            "private": A0.private,
            "data": seal(A0.pub, text),
            "text": text,
            "size": len(pad(text.encode())),
        }
    yield {
        "name": "more padding than needed",
        "private": A0.private,
        "size": 4_096,
        "text": "abc",
        "data": b64(hpke_seal(A0.pub, MESSAGE, pad(b"abc", 4_096))),
    }


def bad_paddings() -> Iterator[Json]:
    """Yield plaintexts of another form."""
    good = pad(b"abc")
    for name, plaintext in {
        "empty": b"",
        "3 bytes": b"\0\0\0",
        "no padding": b"\0\0\0\3abc",
        "1023 bytes": good[:-1],
        "1025 bytes": good + b"\0",
        "3072 bytes": pad(b"abc", 3_072),
        "32 KiB": pad(b"abc", 32_768),
        "512 bytes": pad(b"abc", 512),
        "length one too large": (1_021).to_bytes(4, "big") + bytes(1_020),
        "length of 4 GiB": b"\xff" * 4 + bytes(1_020),
        "length little-endian": b"\3\0\0\0abc" + bytes(1_017),
        "a one at the end": good[:-1] + b"\1",
        "a one after the text": good[:7] + b"\1" + good[8:],
        "spaces for zeros": good[:7].ljust(1_024, b" "),
        "length one too small": b"\0\0\0\2abc" + bytes(1_017),
    }.items():
        yield {
            "name": name,
            "private": A0.private,
            "data": b64(hpke_seal(A0.pub, MESSAGE, plaintext)),
            "refused": "padding",
        }
    whole = seal(A0.pub, "abc")
    for name, text, refused in (
        ("not ASCII", seal(A0.pub, "é"), "jws"),
        ("padded data", whole + "=", "encoding"),
        ("new line", whole + "\n", "encoding"),
        ("standard alphabet", "+" + whole[1:], "encoding"),
        ("data of 1 modulo 4", whole[:-3], "encoding"),
        ("no data", "", "seal"),
        ("another mailbox's", seal(A1.pub, "abc"), "seal"),
        ("a question", b64(hpke_seal(A0.pub, QUESTION, pad(b"abc"))), "seal"),
    ):
        yield {"name": name, "private": A0.private, "data": text, "refused": refused}


def padding_cases() -> Iterator[Json]:
    """Yield `data`, with the text in it."""
    yield from good_paddings()
    yield from bad_paddings()


def jws_of(header: str, alg_signature: bytes | None = None) -> str:
    """Return a call of Alice's under another header, signed rightly or with the bytes given."""
    jws = make_jws(ALICE, from_alice("call"), header)
    if alg_signature is None:
        return jws
    signed = jws.rpartition(".")[0]
    return f"{signed}.{b64(alg_signature)}"


def other_headers() -> Iterator[tuple[str, str]]:
    """Yield names and messages whose header is not the one."""
    header = b64(HEADER.replace("ES384", "HS256").encode())
    signed = f"{header}.{b64(to_json(from_alice('call')))}".encode()
    yield "alg none", jws_of('{"alg":"none","typ":"connectoid"}', b"")
    yield "alg none with a signature", jws_of('{"alg":"none","typ":"connectoid"}')
    yield (
        "HS256 with the public key",
        jws_of(HEADER.replace("ES384", "HS256"), hmac.digest(unb64(ALICE.pub), signed, "sha256")),
    )
    for alg in ("HS384", "ES256", "ES512", "es384", "PS384"):
        yield f"alg {alg}", jws_of(HEADER.replace("ES384", alg))
    for name, header in {
        "spaces in the header": '{"alg": "ES384", "typ": "connectoid"}',
        "another order": '{"typ":"connectoid","alg":"ES384"}',
        "no typ": '{"alg":"ES384"}',
        "typ JWT": '{"alg":"ES384","typ":"JWT"}',
        "a key in the header": '{"alg":"ES384","typ":"connectoid","jwk":{}}',
        "alg twice": '{"alg":"none","alg":"ES384","typ":"connectoid"}',
        "empty header": "",
        "a new line in the header": HEADER + "\n",
        "an escape in the header": HEADER.replace("E", "\\u0045"),
    }.items():
        yield name, jws_of(header)
    jws = jws_of(HEADER)
    yield "header padded", jws.replace(".", "==.", 1)
    yield "two parts", jws.rpartition(".")[0]
    yield "one part", "connectoid"
    yield "nothing", ""
    yield "a proof on a call", prove(S, jws)
    yield "an empty fourth part on a call", jws + "."
    yield "hello without proof", make_jws(BOB, hello_payload())
    yield "hello in five parts", HELLO + ".AAAA"
    yield "JSON instead of a JWS", to_json(from_alice("call")).decode()
    yield "white space before it", " " + jws


def other_signatures() -> Iterator[tuple[str, str]]:
    """Yield names and messages that `from` did not sign, or not so."""
    jws = make_jws(ALICE, from_alice("call"))
    signed, _, signature = jws.rpartition(".")
    r = unb64(signature)[:HALF]
    s = unb64(signature)[HALF:]
    zero = bytes(HALF)
    order = ORDER.to_bytes(HALF, "big")
    ones = b"\xff" * HALF
    above = int.to_bytes(int.from_bytes(s, "big") ^ (1 << 383), HALF, "big")
    for name, octets in {
        "DER": sign_der(ALICE, signed.encode()),
        "95 bytes": (r + s)[:-1],
        "97 bytes": r + s + b"\0",
        "97 bytes, a zero before": b"\0" + r + s,
        "97 bytes, a zero within": r + b"\0" + s,
        "half": r,
        "nothing": b"",
        "r is 0": zero + s,
        "s is 0": r + zero,
        "both are 0": zero + zero,
        "r is the order": order + s,
        "s is the order": r + order,
        "both are the order": order + order,
        "r is all ones": ones + s,
        "s is all ones": r + ones,
        "r and s swapped": s + r,
        "a bit of s": r + above,
        "P-256's length": scatter("a signature of P-256", 64),
        "little-endian": r[::-1] + s[::-1],
        "another's": sign(MALLORY, signed.encode()),
        "a mailbox key's": sign(A1, signed.encode()),
        "over the payload alone": sign(ALICE, signed.partition(".")[2].encode()),
    }.items():
        yield f"signature: {name}", f"{signed}.{b64(octets)}"
    tampered = b64(to_json(from_alice("call", seq=START + 9_000_000)))
    yield "tampered payload", f"{signed.partition('.')[0]}.{tampered}.{signature}"
    yield "from is no point", make_jws(ALICE, from_alice("call", ALICE, **{"from": no_point()}))


def jws_cases() -> Iterator[Json]:
    """Yield texts of messages, for form and signature."""
    yield from good_jws_cases()
    yield from refused_jws_cases()


def good_jws_cases() -> Iterator[Json]:
    """Yield texts that are read."""
    for text, signer in (
        (HELLO, BOB),
        (WELCOME, ALICE),
        (used(), ALICE),
        (make_jws(BOB, from_bob("ready")), BOB),
    ):
        payload = json.loads(unb64(text.split(".")[1]))
        yield {
            "name": payload["type"],
            "text": text,
            "payload": payload,
            "hash": hash_of(text),
            "from": signer.pub,
        }
    ready = make_jws(BOB, json.dumps(from_bob("offer"), indent=2).encode())
    yield {
        "name": "white space in the payload",
        "text": ready,
        "payload": from_bob("offer"),
        "hash": hash_of(ready),
        "from": BOB.pub,
    }
    jws = jws_of(HEADER)
    yield {
        "name": "the other signature of the same key: (r, n - s)",
        "text": sign_otherwise(jws),
        "payload": from_alice("call"),
        "hash": hash_of(jws),
        "from": ALICE.pub,
    }


def refused_jws_cases() -> Iterator[Json]:
    """Yield texts that are refused."""
    jws = jws_of(HEADER)
    for name, text in other_headers():
        yield {"name": name, "text": text, "refused": "jws"}
    for name, text in {
        "payload padded": jws.replace(".", "=.", 2).replace("=.", ".", 1),
        "signature padded": jws + "=",
        "signature with a new line": jws + "\n",
        "signature of 1 modulo 4": jws[:-3],
        "payload in the standard alphabet": jws.replace(".", ".+", 1),
    }.items():
        yield {"name": name, "text": text, "refused": "encoding"}
    for name, text in other_signatures():
        yield {"name": name, "text": text, "refused": "signature"}
