"""Write the vectors connectoid_*.json again, but for connectoid_emoji.json, which it reads.

The committed files are the truth; this shows how they came about, and test_vectors.py checks
that it still makes the very same. It is written from PROTOCOL.md and RFC 9180 with plain
cryptography and hashlib, and imports nothing of connectoid.py: two programs that agree are a
better proof than one. All keys and random bytes come from names, HPKE's ephemeral keys and
ECDSA's nonces too, so nothing here is fit for anything but tests.

    python vectors/generate.py
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HERE = Path(__file__).parent
Json: TypeAlias = dict[str, Any]

# ---------------------------------------------------------------------------------------
# Keys, encoding, cryptography: pure functions of their arguments.
# ---------------------------------------------------------------------------------------

FIELD = 2**384 - 2**128 - 2**96 + 2**32 - 1  # of P-384
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
CURVE_B = 0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF
HALF = 48  # bytes of a scalar, a coordinate, r and s


def b64(octets: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """Return what base64url without padding stands for."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def scatter(name: str, count: int) -> bytes:
    """Return so many bytes that look random, always the same for a name."""
    return hashlib.shake_256(f"connectoid vectors: {name}".encode()).digest(count)


class Key(NamedTuple):
    """A P-384 key: the scalar, and the public key in the form of `pub`."""

    scalar: int
    pub: str

    @property
    def private(self) -> str:
        """Return the scalar in hex."""
        return f"{self.scalar:096x}"

    @property
    def secret(self) -> ec.EllipticCurvePrivateKey:
        """Return the private key for use."""
        return ec.derive_private_key(self.scalar, ec.SECP384R1())


@functools.cache
def key(name: str) -> Key:
    """Return the key of a name."""
    scalar = int.from_bytes(scatter(name, HALF), "big") % (ORDER - 1) + 1
    public = ec.derive_private_key(scalar, ec.SECP384R1()).public_key()
    return Key(scalar, b64(public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)))


def no_point() -> str:
    """Return a `pub` whose x is no coordinate of the curve."""
    x = 2
    while pow(x**3 - 3 * x + CURVE_B, (FIELD - 1) // 2, FIELD) == 1:
        x += 1
    return b64(b"\2" + x.to_bytes(HALF, "big"))


def sha256(*parts: bytes) -> bytes:
    """Return SHA-256 of the parts, one after the other."""
    return hashlib.sha256(b"".join(parts)).digest()


def _extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(HALF), b"HPKE-v1" + suite + label + ikm, "sha384")


def _expand(suite: bytes, prk: bytes, label: bytes, info: bytes, count: int) -> bytes:
    # one block of SHA-384 is enough for all that is derived here
    return hmac.digest(prk, count.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info + b"\1", "sha384")[:count]


def hpke_seal(pub: str, info: bytes, plaintext: bytes, *, kdf: int = 2) -> bytes:
    """Return enc || ciphertext of RFC 9180, base mode, with an ephemeral key that follows from the arguments."""
    kem, suite = b"KEM\0\x11", b"HPKE\0\x11" + kdf.to_bytes(2, "big") + b"\0\2"
    ephemeral = key(f"ephemeral {pub} {info.hex()} {sha256(plaintext).hex()}").secret
    recipient = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), unb64(pub))
    enc, to = (point.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
               for point in (ephemeral.public_key(), recipient))
    prk = _extract(kem, b"", b"eae_prk", ephemeral.exchange(ec.ECDH(), recipient))
    shared = _expand(kem, prk, b"shared_secret", enc + to, HALF)
    context = b"\0" + _extract(suite, b"", b"psk_id_hash", b"") + _extract(suite, b"", b"info_hash", info)
    secret = _extract(suite, shared, b"secret", b"")
    nonce = _expand(suite, secret, b"base_nonce", context, 12)
    return enc + AESGCM(_expand(suite, secret, b"key", context, 32)).encrypt(nonce, plaintext, b"")


def sign_der(signer: Key, octets: bytes) -> bytes:
    """Return an ECDSA signature with SHA-384 in DER, with the nonce of RFC 6979."""
    return signer.secret.sign(octets, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))


def sign(signer: Key, octets: bytes) -> bytes:
    """Return r || s of ES384."""
    return b"".join(half.to_bytes(HALF, "big") for half in utils.decode_dss_signature(sign_der(signer, octets)))


# ---------------------------------------------------------------------------------------
# The forms of PROTOCOL.md, from the outside in.
# ---------------------------------------------------------------------------------------

MESSAGE, QUESTION, CHANNEL = (f"connectoid/1 {use}".encode() for use in ("message", "question", "channel"))
HEADER = '{"alg":"ES384","typ":"connectoid"}'
SIZES = (1_024, 2_048, 4_096, 8_192, 16_384)
RELAY = "https://relay.example.com/"


def mailbox(pub: str, url: str | bytes = RELAY, ext: str | bytes | None = None) -> str:
    """Return a mailbox as text."""
    parts = [part.encode() if isinstance(part, str) else part for part in (url, *([] if ext is None else [ext]))]
    return ".".join([pub, *map(b64, parts)])


def invite(address: str, secret: bytes, h: bytes) -> str:
    """Return the invitation to an address."""
    last = address.rpartition("~")[2]
    return address + ("." if last.count(".") == len(["url", "ext"]) else "..") + b64(secret + h)


def commit(signer: str, r: str) -> bytes:
    """Return h."""
    return sha256(unb64(signer), unb64(r))


def to_json(value: object) -> bytes:
    """Return JSON as the messages have it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def make_jws(signer: Key, payload: object, header: str = HEADER) -> str:
    """Return a JWS in three parts over a JSON value, or over the very bytes."""
    octets = payload if isinstance(payload, bytes) else to_json(payload)
    signed = f"{b64(header.encode())}.{b64(octets)}"
    return f"{signed}.{b64(sign(signer, signed.encode()))}"


def prove(secret: bytes, jws: str) -> str:
    """Return a hello in four parts."""
    return f"{jws}.{b64(hmac.digest(secret, jws.encode(), 'sha256'))}"


def hash_of(text: str) -> str:
    """Return the hash of a message: of its three parts."""
    return b64(sha256(".".join(text.split(".")[:3]).encode()))


def pad(octets: bytes, size: int | None = None) -> bytes:
    """Return a plaintext of a size, else of the smallest that fits."""
    needed = 4 + len(octets)
    size = size or next(size for size in SIZES if size >= needed)
    return (len(octets).to_bytes(4, "big") + octets).ljust(size, b"\0")


def seal(pub: str, text: str | bytes, info: bytes = MESSAGE) -> str:
    """Return `data` of a message for a mailbox."""
    return b64(hpke_seal(pub, info, pad(text.encode() if isinstance(text, str) else text)))


def compare(invitation: str, hello: str, signer: str, r: str) -> list[int]:
    """Return the seven numbers of the comparison string."""
    texts = (invitation, ".".join(hello.split(".")[:3]), signer, r)
    digest = sha256(b"\0".join([b"connectoid/1 emoji", *(text.encode() for text in texts)]))
    bits = "".join(f"{octet:08b}" for octet in digest)
    return [int(bits[start:start + 6], 2) for start in range(0, 42, 6)]


def sdp(kind: str, whose: str) -> Json:
    """Return an SDP: short, for nothing here looks inside."""
    return {"type": kind, "sdp": f"v=0\r\ns={whose}\r\n"}


# ---------------------------------------------------------------------------------------
# Who is who in all files: Alice has made a link, Bob has opened it; Mallory would like to be
# one of them. `A0` is the key of the mailbox in the link, `A1` that of the welcome, `A2` and
# `B2` those of a rotation under way, `AF` and `BF` those of former addresses.
# ---------------------------------------------------------------------------------------

ALICE, BOB, MALLORY = (key(f"{name} signs") for name in ("Alice", "Bob", "Mallory"))
BOXES = ("A0", "A1", "A2", "AF", "B0", "B1", "B2", "BF", "M0")
MAILBOX_KEYS = A0, A1, A2, AF, B0, B1, B2, BF, M0 = tuple(key(f"mailbox {name}") for name in BOXES)
A0_AT, A1_AT, A2_AT, AF_AT, B0_AT, B1_AT, B2_AT, BF_AT, M0_AT = (mailbox(box.pub) for box in MAILBOX_KEYS)
S, OTHER_S = scatter("S", 16), scatter("another S", 16)
R, OTHER_R, NONCE = (b64(scatter(name, 16)) for name in ("R", "another R", "nonce"))
INVITATION = invite(A0_AT, S, commit(ALICE.pub, R))
START = 1_800_000_000_000_000  # microseconds since 1970: the seq of the first message
A_HASH = b64(scatter("the hash of something", 32))


def build(kind: str, to: str, signer: Key, step: int, re: str | None, *, at: str, **members: Any) -> Json:
    """Return a payload; `seq` is the start plus so many seconds."""
    return {"type": kind, "to": to, "from": signer.pub, "seq": START + step * 1_000_000, "re": re,
            "connectoid": at, **members}


def hello_payload(signer: Key = BOB, /, **changes: Any) -> Json:
    """Return the payload of Bob's hello, changed."""
    return build("hello", A0_AT, signer, 1, None, at=B0_AT, nonce=NONCE, sdpOffer=sdp("offer", "Bob")) | changes


def hello(signer: Key = BOB, secret: bytes = S, /, **changes: Any) -> str:
    """Return a hello in four parts."""
    return prove(secret, make_jws(signer, hello_payload(signer, **changes)))


HELLO = hello()
MALLORYS_HELLO = hello(MALLORY, connectoid=M0_AT)


def welcome(signer: Key = ALICE, /, **changes: Any) -> str:
    """Return Alice's welcome, changed."""
    return make_jws(signer, build("welcome", B0_AT, signer, 2, hash_of(HELLO), at=A1_AT, r=R) | changes)


def used(signer: Key = ALICE, /, **changes: Any) -> str:
    """Return the message that says that a link is used, changed."""
    return make_jws(signer, build("used", B0_AT, signer, 2, hash_of(HELLO), at=A0_AT, r=R) | changes)


WELCOME = welcome()


def from_bob(kind: str, signer: Key = BOB, /, **changes: Any) -> Json:
    """Return the payload of a numbered message from Bob to Alice's address of the welcome, changed."""
    members: Json = {"offer": {"sdpOffer": sdp("offer", "Bob")}, "answer": {"sdpAnswer": sdp("answer", "Bob")}}
    re = hash_of(WELCOME) if kind == "ready" else A_HASH if kind == "answer" else None
    return build(kind, A1_AT, signer, 3, re, at=B1_AT, **members.get(kind, {})) | changes


def from_alice(kind: str, signer: Key = ALICE, /, **changes: Any) -> Json:
    """Return the payload of a numbered message from Alice to the address of Bob's hello, changed."""
    members: Json = {"offer": {"sdpOffer": sdp("offer", "Alice")}, "answer": {"sdpAnswer": sdp("answer", "Alice")}}
    re = A_HASH if kind == "answer" else None
    return build(kind, B0_AT, signer, 3, re, at=A1_AT, **members.get(kind, {})) | changes


# ---------------------------------------------------------------------------------------
# Small forms: each function yields the cases of a file.
# ---------------------------------------------------------------------------------------


def base64url_cases() -> Iterator[Json]:
    """Yield texts, with what they stand for."""
    for octets in (b"", b"\0", b"\xff\xff", b"\xfb\xff\xbf", scatter("base64url", 49)):
        yield {"name": f"{len(octets)} bytes", "text": b64(octets), "octets": octets.hex()}
    for name, text in {
        "padding": "AA==", "padding of one": "AAA=", "length 1 modulo 4": "AAAAA", "unused bits in 2": "AB",
        "unused bits in 3": "AAB", "plus": "+_-A", "slash": "/AAA", "new line at the end": "AAAA\n",
        "space within": "AA AA", "not ASCII": "AAAé", "full-width digit": "AAA\uff11", "NUL": "AAA\0", "dot": "AA.A",
    }.items():
        yield {"name": name, "text": text, "refused": "encoding"}


def key_cases() -> Iterator[Json]:
    """Yield public keys, with the private ones."""
    for name, number in (("scalar 1", 1), ("the last scalar", ORDER - 1), ("any", ALICE.scalar)):
        public = ec.derive_private_key(number, ec.SECP384R1()).public_key()
        pub = b64(public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint))
        yield {"name": name, "pub": pub, "private": Key(number, pub).private}
    octets = unb64(ALICE.pub)
    whole = key("Alice signs").secret.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    for name, pub in {
        "no point": no_point(), "x is the field's prime": b64(b"\2" + FIELD.to_bytes(HALF, "big")),
        "x over the field": b64(b"\2" + b"\xff" * HALF), "first byte 4": b64(b"\4" + octets[1:]),
        "first byte 0": b64(b"\0" + octets[1:]), "first byte 6": b64(b"\6" + octets[1:]),
        "point at infinity": b64(b"\0"), "empty": "", "one byte short": b64(octets[:-1]),
        "one byte more": b64(octets + b"\0"), "not compressed": b64(whole), "padded": ALICE.pub + "==",
        "unused bits": ALICE.pub[:-1] + "B", "P-256": b64(b"\2" + scatter("P-256", 32)),
        "standard alphabet": "A+" + ALICE.pub[2:], "space at the end": ALICE.pub + " ",
    }.items():
        yield {"name": name, "pub": pub, "refused": "address"}


GOOD_URLS = {
    "plain": RELAY, "no slash": "https://relay.example.com", "port": "https://relay.example.com:8443/",
    "last port": "https://relay.example.com:65535/", "path": "https://example.com/relays/one",
    "IPv4": "https://192.0.2.1/", "IPv6": "https://[2001:db8::1]:8443/", "http to localhost": "http://localhost:8080/",
    "http to 127.0.0.1": "http://127.0.0.1:8080", "http to ::1": "http://[::1]:8080/",
    "512 characters": "https://relay.example.com/".ljust(512, "a"),
}
HOSTILE_URLS = {
    "http": "http://relay.example.com/", "http to a name that begins like loopback": "http://127.0.0.1.example.com/",
    "http to a name like localhost": "http://localhost.example.com/", "http to a home": "http://192.168.1.1/",
    "http to this host's all addresses": "http://0.0.0.0:8080/", "http to loopback as a number": "http://2130706433/",
    "user": "https://alice@relay.example.com/", "user and password": "https://a:b@relay.example.com/",
    "a host for a user": "https://relay.example.com:443@192.0.2.1/", "query": RELAY + "?a=b", "fragment": RELAY + "#a",
    "javascript": "javascript:alert(1)", "file": "file:///etc/passwd", "data": "data:text/plain,a", "ftp": "ftp://a/",
    "web socket": "wss://relay.example.com/", "no scheme": "relay.example.com", "no host": "https:///a",
    "port 0": "https://relay.example.com:0/", "port 65536": "https://relay.example.com:65536/",
    "port without digits": "https://relay.example.com:/", "space": "https://relay.example.com/ a",
    "space before": " https://relay.example.com/", "new line": "https://relay.example.com/\n",
    "header in a path": "https://relay.example.com/\r\nHost:a", "backslash": "https://relay.example.com\\@192.0.2.1/",
    "not ASCII": "https://r\u00e9lay.example.com/", "513 characters": RELAY.ljust(513, "a"),
    "zone": "http://[fe80::1%25eth0]/",
}


def listed(address: str) -> list[Json]:
    """Return the mailboxes of a good address."""
    boxes = []
    for text in address.split("~"):
        pub, url, *ext = text.split(".")
        boxes.append({"pub": pub, "url": unb64(url).decode(), "ext": unb64(ext[0]).decode() if ext else None})
    return boxes


def good_addresses() -> Iterator[tuple[str, str]]:
    """Yield names and addresses that a client may write to."""
    for name, url in GOOD_URLS.items():
        yield f"url: {name}", mailbox(A0.pub, url)
    yield "ext", mailbox(A0.pub, RELAY, "key 1")
    yield "ext beyond ASCII", mailbox(A0.pub, RELAY, "schlüssel 🔑.~")
    yield "ext of 1024 code points", mailbox(A0.pub, RELAY, "🔑" * 1_024)
    yield "two mailboxes", f"{A0_AT}~{A1_AT}"
    yield "three mailboxes", f"{A0_AT}~{mailbox(A1.pub, 'https://other.example/', 'ext')}~{A2_AT}"


def bad_addresses() -> Iterator[tuple[str, str]]:
    """Yield names and addresses that nobody should write to."""
    for name, url in HOSTILE_URLS.items():
        yield f"url: {name}", mailbox(A0.pub, url)
    yield "url is not UTF-8", mailbox(A0.pub, b"https://\xff.example/")
    yield "url with unused bits", f"{A0.pub}.{b64(RELAY.encode())[:-1]}9"
    yield "url padded", f"{A0_AT}="
    yield "url as plain text", f"{A0.pub}.{RELAY}"
    yield "url empty", f"{A0.pub}."
    yield "pub alone", A0.pub
    yield "empty", ""
    yield "ext empty", f"{A0_AT}."
    yield "ext of 1025 code points", mailbox(A0.pub, RELAY, "a" * 1_025)
    yield "ext is not UTF-8", mailbox(A0.pub, RELAY, b"\xc3\x28")
    yield "ext holds a surrogate", mailbox(A0.pub, RELAY, b"\xed\xa0\x80")
    yield "fourth part", f"{mailbox(A0.pub, RELAY, 'ext')}.AAAA"
    yield "four mailboxes", "~".join((A0_AT, A1_AT, A2_AT, AF_AT))
    yield "a key twice", f"{A0_AT}~{mailbox(A0.pub, 'https://other.example/')}"
    yield "empty mailbox at the end", f"{A0_AT}~"
    yield "empty mailbox at the beginning", f"~{A0_AT}"
    yield "second mailbox damaged", f"{A0_AT}~{A1_AT[1:]}"
    yield "space at the end", f"{A0_AT} "
    yield "no point", mailbox(no_point())
    yield "second is no point", f"{A0_AT}~{mailbox(no_point())}"


def address_cases() -> Iterator[Json]:
    """Yield addresses, with their mailboxes."""
    for name, address in good_addresses():
        yield {"name": name, "address": address, "mailboxes": listed(address)}
    http = mailbox(A0.pub, HOSTILE_URLS["http"])
    yield {"name": "http where the app allows it", "allow_http": True, "address": http, "mailboxes": listed(http)}
    for name, address in bad_addresses():
        yield {"name": name, "address": address, "refused": "address"}
    user = mailbox(A0.pub, "http://alice@relay.example.com/")
    yield {"name": "user, where the app allows http", "allow_http": True, "address": user, "refused": "address"}


EXT_AT = mailbox(A1.pub, "https://other.example/", "key 1")
APP = "https://app.example.com/"


def good_links() -> Iterator[tuple[str, str, str]]:
    """Yield names, links and the invitations in them."""
    secret = (S, commit(ALICE.pub, R))
    several = invite(f"{A0_AT}~{EXT_AT}", *secret)
    yield "in the fragment", f"{APP}#connectoid={INVITATION}", INVITATION
    yield "in the query", f"{APP}?connectoid={INVITATION}", INVITATION
    yield "bare", INVITATION, INVITATION
    yield "ext", f"{APP}#connectoid={invite(EXT_AT, *secret)}", invite(EXT_AT, *secret)
    yield "two mailboxes", f"{APP}#connectoid={several}", several
    three = invite(f"{EXT_AT}~{A2_AT}~{A0_AT}", *secret)
    yield "three mailboxes, bare", three, three
    yield "other parameters around it", f"{APP}?a=b#x=1&connectoid={several}&y=2", several
    yield "escaped", f"{APP}#connectoid={several.replace('~', '%7E').replace('.', '%2e')}", several
    other = invite(A2_AT, *secret)
    yield "the fragment before the query", f"{APP}?connectoid={other}#connectoid={INVITATION}", INVITATION
    yield "the query, where the fragment is another", f"{APP}?connectoid={INVITATION}#top", INVITATION
    yield "white space around it", f" \t{APP}#connectoid={INVITATION}\r\n", INVITATION
    yield "an app of its own scheme", f"shoppinglist:open#connectoid={INVITATION}", INVITATION


def bad_links() -> Iterator[tuple[str, str, str]]:
    """Yield names, the kind of damage, and links."""
    damaged: dict[str, dict[str, str]] = {
        "missing": {
            "nothing": "", "no link": "hello", "the app alone": APP, "another parameter": f"{APP}#a={INVITATION}",
            "another case": f"{APP}#Connectoid={INVITATION}", "in the path": f"{APP}{INVITATION}",
            "no name": f"{APP}#{INVITATION}", "a text around it": f"open {INVITATION}"},
        "no secret": {
            "an address": A0_AT, "an address in a link": f"{APP}#connectoid={EXT_AT}",
            "no ext and no secret": f"{APP}#connectoid={mailbox(A0.pub)}",
            "an empty secret": f"{APP}#connectoid={A0_AT}..",
            "the first mailbox of two": f"{A0_AT}~{A1_AT}"},
        "secret": {
            "cut off by 1": INVITATION[:-1], "cut off by 4": INVITATION[:-4], "one more character": INVITATION + "A",
            "a full stop after it": f"{APP}#connectoid={INVITATION}.", "S alone": f"{A0_AT}..{b64(S)}",
            "padding": f"{APP}#connectoid={INVITATION}==", "another alphabet": f"{APP}#connectoid={INVITATION[:-1]}+",
            "a bracket after it": f"{APP}#connectoid={INVITATION})", "a fifth part": f"{INVITATION}.AAAA"},
        "address": {
            "an empty value": f"{APP}#connectoid=", "the beginning is lost": f"{APP}#connectoid={INVITATION[4:]}",
            "a space within": f"{APP}#connectoid={INVITATION[:80]} {INVITATION[80:]}",
            "a fourth part in the first mailbox": f"{APP}#connectoid={INVITATION}~{A1_AT}",
            "http": invite(mailbox(A0.pub, "http://relay.example.com/"), S, commit(ALICE.pub, R)),
            "a URL with a user": invite(mailbox(A0.pub, HOSTILE_URLS["user"]), S, commit(ALICE.pub, R)),
            "four mailboxes": invite("~".join((A0_AT, A1_AT, A2_AT, AF_AT)), S, commit(ALICE.pub, R)),
            "no point": invite(mailbox(no_point()), S, commit(ALICE.pub, R)),
            "cut off in the URL": f"{APP}#connectoid={INVITATION[:90]}",
            "cut off in the key": f"{APP}#connectoid={A0.pub[:50]}",
            "escaped wrongly": f"{APP}#connectoid={INVITATION.replace('.', '%zz')}",
        }}
    for damage, links in damaged.items():
        yield from ((name, damage, link) for name, link in links.items())


def link_cases() -> Iterator[Json]:
    """Yield links, with what is in them."""
    for name, link, invitation in good_links():
        address = invitation.rpartition(".")[0].removesuffix(".")
        yield {"name": name, "link": link, "invitation": invitation, "address": address, "mailboxes": listed(address),
               "secret": S.hex(), "h": commit(ALICE.pub, R).hex()}
    for name, damage, link in bad_links():
        yield {"name": name, "link": link, "refused": "link", "damage": damage}


# ---------------------------------------------------------------------------------------
# Seals, padding, JWS, payloads, proofs, hashes.
# ---------------------------------------------------------------------------------------


def flip(octets: bytes, place: int) -> bytes:
    """Return bytes with one bit changed."""
    changed = bytearray(octets)
    changed[place] ^= 1
    return bytes(changed)


def seal_cases() -> Iterator[Json]:
    """Yield what HPKE opens, and what it must not."""
    infos = {"message": MESSAGE, "question": QUESTION,
        "channel": CHANNEL + b"\0" + sha256(b"offer") + sha256(b"answer")}
    for name, info in infos.items():
        plaintext = scatter(name, 64)
        yield {"name": name, "private": A0.private, "info": info.hex(),
            "sealed": hpke_seal(A0.pub, info, plaintext).hex(),
               "plaintext": plaintext.hex()}
    yield {"name": "nothing in it", "private": A0.private, "info": MESSAGE.hex(),
           "sealed": hpke_seal(A0.pub, MESSAGE, b"").hex(), "plaintext": ""}
    good = hpke_seal(A0.pub, MESSAGE, scatter("message", 64))
    swapped = CHANNEL + b"\0" + sha256(b"answer") + sha256(b"offer")
    for name, info, sealed in (
        ("a message opened as a question", QUESTION, good),
        ("a question opened as a message", MESSAGE, hpke_seal(A0.pub, QUESTION, scatter("question", 43))),
        ("a challenge of another offer", infos["channel"], hpke_seal(A0.pub, swapped, scatter("channel", 32))),
        ("another key", MESSAGE, hpke_seal(A1.pub, MESSAGE, scatter("message", 64))),
        ("no info", MESSAGE, hpke_seal(A0.pub, b"", scatter("message", 64))),
        ("info with a zero after it", MESSAGE, hpke_seal(A0.pub, MESSAGE + b"\0", scatter("message", 64))),
        ("HKDF-SHA256 named in the suite", MESSAGE, hpke_seal(A0.pub, MESSAGE, scatter("message", 64), kdf=1)),
        ("a bit of the tag", MESSAGE, flip(good, -1)), ("a bit of the text", MESSAGE, flip(good, 100)),
        ("a bit of the ephemeral key", MESSAGE, flip(good, 40)), ("ephemeral key compressed", MESSAGE,
         b"\2" + good[1:]),
        ("cut off by one", MESSAGE, good[:-1]), ("one byte more", MESSAGE, good + b"\0"),
        ("cut off in the ephemeral key", MESSAGE, good[:90]), ("the ephemeral key alone", MESSAGE, good[:97]),
        ("nothing", MESSAGE, b""), ("zeros", MESSAGE, bytes(200)),
    ):
        yield {"name": name, "private": A0.private, "info": info.hex(), "sealed": sealed.hex(), "refused": "seal"}


def padding_cases() -> Iterator[Json]:
    """Yield `data`, with the text in it."""
    for length in (0, 1, 1_020, 1_021, 2_044, 2_045, 4_092, 8_188, 8_189, 16_380):
        text = ("x.y-z_" * length)[:length]
        yield {"name": f"text of {length}", "private": A0.private, "data": seal(A0.pub, text), "text": text,
               "size": len(pad(text.encode()))}
    yield {"name": "more padding than needed", "private": A0.private, "size": 4_096, "text": "abc",
           "data": b64(hpke_seal(A0.pub, MESSAGE, pad(b"abc", 4_096)))}
    good = pad(b"abc")
    for name, plaintext in {
        "empty": b"", "3 bytes": b"\0\0\0", "no padding": b"\0\0\0\3abc", "1023 bytes": good[:-1],
        "1025 bytes": good + b"\0",
        "3072 bytes": pad(b"abc", 3_072), "32 KiB": pad(b"abc", 32_768), "512 bytes": pad(b"abc", 512),
        "length one too large": (1_021).to_bytes(4, "big") + bytes(1_020),
        "length of 4 GiB": b"\xff" * 4 + bytes(1_020),
        "length little-endian": b"\3\0\0\0abc" + bytes(1_017), "a one at the end": good[:-1] + b"\1",
        "a one after the text": good[:7] + b"\1" + good[8:], "spaces for zeros": good[:7].ljust(1_024, b" "),
        "length one too small": b"\0\0\0\2abc" + bytes(1_017),
    }.items():
        yield {"name": name, "private": A0.private, "data": b64(hpke_seal(A0.pub, MESSAGE, plaintext)),
            "refused": "padding"}
    whole = seal(A0.pub, "abc")
    for name, text, refused in (
        ("not ASCII", seal(A0.pub, "é"), "jws"), ("padded data", whole + "=", "encoding"),
         ("new line", whole + "\n", "encoding"),
        ("standard alphabet", "+" + whole[1:], "encoding"), ("data of 1 modulo 4", whole[:-3], "encoding"),
        ("no data", "", "seal"), ("another mailbox's", seal(A1.pub, "abc"), "seal"),
        ("a question", b64(hpke_seal(A0.pub, QUESTION, pad(b"abc"))), "seal"),
    ):
        yield {"name": name, "private": A0.private, "data": text, "refused": refused}


def jws_of(header: str, alg_signature: bytes | None = None) -> str:
    """Return a call of Alice's under another header, signed rightly or with the bytes given."""
    jws = make_jws(ALICE, from_alice("call"), header)
    return jws if alg_signature is None else f"{jws.rpartition('.')[0]}.{b64(alg_signature)}"


def other_headers() -> Iterator[tuple[str, str]]:
    """Yield names and messages whose header is not the one."""
    signed = f"{b64(HEADER.replace('ES384', 'HS256').encode())}.{b64(to_json(from_alice('call')))}".encode()
    yield "alg none", jws_of('{"alg":"none","typ":"connectoid"}', b"")
    yield "alg none with a signature", jws_of('{"alg":"none","typ":"connectoid"}')
    yield "HS256 with the public key", jws_of(HEADER.replace("ES384", "HS256"),
        hmac.digest(unb64(ALICE.pub), signed, "sha256"))
    for alg in ("HS384", "ES256", "ES512", "es384", "PS384"):
        yield f"alg {alg}", jws_of(HEADER.replace("ES384", alg))
    for name, header in {
        "spaces in the header": '{"alg": "ES384", "typ": "connectoid"}',
        "another order": '{"typ":"connectoid","alg":"ES384"}',
        "no typ": '{"alg":"ES384"}', "typ JWT": '{"alg":"ES384","typ":"JWT"}', "a key in the header":
        '{"alg":"ES384","typ":"connectoid","jwk":{}}', "alg twice": '{"alg":"none","alg":"ES384","typ":"connectoid"}',
        "empty header": "", "a new line in the header": HEADER + "\n", "an escape in the header": HEADER.replace("E",
        "\\u0045"),
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
    r, s = unb64(signature)[:HALF], unb64(signature)[HALF:]
    zero, order, ones = bytes(HALF), ORDER.to_bytes(HALF, "big"), b"\xff" * HALF
    above = int.to_bytes(int.from_bytes(s, "big") ^ (1 << 383), HALF, "big")
    for name, octets in {
        "DER": sign_der(ALICE, signed.encode()), "95 bytes": (r + s)[:-1], "97 bytes": r + s + b"\0",
        "97 bytes, a zero before": b"\0" + r + s,
        "97 bytes, a zero within": r + b"\0" + s, "half": r, "nothing": b"", "r is 0": zero + s, "s is 0": r + zero,
        "both are 0": zero + zero, "r is the order": order + s, "s is the order": r + order,
        "both are the order": order + order,
        "r is all ones": ones + s, "s is all ones": r + ones, "r and s swapped": s + r, "a bit of s": r + above,
        "P-256's length": scatter("a signature of P-256", 64), "little-endian": r[::-1] + s[::-1],
        "another's": sign(MALLORY, signed.encode()), "a mailbox key's": sign(A1, signed.encode()),
        "over the payload alone": sign(ALICE, signed.partition(".")[2].encode()),
    }.items():
        yield f"signature: {name}", f"{signed}.{b64(octets)}"
    tampered = b64(to_json(from_alice("call", seq=START + 9_000_000)))
    yield "tampered payload", f"{signed.partition('.')[0]}.{tampered}.{signature}"
    yield "from is no point", make_jws(ALICE, from_alice("call", ALICE, **{"from": no_point()}))


def jws_cases() -> Iterator[Json]:
    """Yield texts of messages, for form and signature."""
    for text, signer in ((HELLO, BOB), (WELCOME, ALICE), (used(), ALICE), (make_jws(BOB, from_bob("ready")), BOB)):
        payload = json.loads(unb64(text.split(".")[1]))
        yield {"name": payload["type"], "text": text, "payload": payload, "hash": hash_of(text), "from": signer.pub}
    ready = make_jws(BOB, json.dumps(from_bob("offer"), indent=2).encode())
    yield {"name": "white space in the payload", "text": ready, "payload": from_bob("offer"), "hash": hash_of(ready),
           "from": BOB.pub}
    for name, text in other_headers():
        yield {"name": name, "text": text, "refused": "jws"}
    jws = jws_of(HEADER)
    for name, text in {"payload padded": jws.replace(".", "=.", 2).replace("=.", ".", 1), "signature padded": jws + "=",
                       "signature with a new line": jws + "\n", "signature of 1 modulo 4": jws[:-3],
                       "payload in the standard alphabet": jws.replace(".", ".+", 1)}.items():
        yield {"name": name, "text": text, "refused": "encoding"}
    for name, text in other_signatures():
        yield {"name": name, "text": text, "refused": "signature"}


def base_payload(kind: str) -> Json:
    """Return a good payload of a type."""
    made: Json = {"hello": hello_payload(), "welcome": build("welcome", B0_AT, ALICE, 2, hash_of(HELLO), at=A1_AT, r=R),
                  "used": build("used", B0_AT, ALICE, 2, hash_of(HELLO), at=A0_AT, r=R)}
    if kind in made:
        return dict(made[kind])
    return from_bob(kind) if kind in ("ready", "offer") else from_alice(kind)


GONE = object()  # a member that is left out
MANY_NUMBERS = ["0", -1, 0, 2**53, 2**63, True, None, [1], 1.5]
BAD_KEYS = ["", None, 5, ALICE.pub[:-1], ALICE.pub + "=", ALICE.pub[:-1] + "B", b64(b"\4" + unb64(ALICE.pub)[1:])]
BAD_SDP: list[Any] = [GONE, "v=0", [], {}, {"type": "offer"}, {"sdp": "v=0"}, {"type": "offer", "sdp": 5},
                      {"type": "offer", "sdp": None}, {"type": "answer", "sdp": "v=0"},
                      {"type": "rollback", "sdp": "v=0"}]
WRONG_MEMBERS: Sequence[tuple[str, str, list[Any]]] = (
    ("call", "seq", [GONE, *MANY_NUMBERS]), ("call", "from", [GONE, *BAD_KEYS]),
     ("call", "to", [GONE, None, 5, [A1_AT]]),
    ("call", "connectoid", [GONE, None, 5, [A1_AT]]), ("call", "re", [GONE, "", 5, A_HASH[:-1], A_HASH[:-1] + "B",
     A_HASH + "="]),
    ("hello", "re", [GONE, A_HASH]), ("hello", "nonce", [GONE, None, R[:-1], R[:-1] + "B", b64(bytes(15)),
     b64(bytes(17))]),
    ("hello", "sdpOffer", [None, *BAD_SDP]), ("welcome", "re", [GONE, None, R]),
     ("welcome", "r", [GONE, None, R[:-1] + "B", A_HASH]),
    ("welcome", "sdpAnswer", ["v=0", sdp("offer", "Alice")]), ("used", "re", [None]), ("used", "r", [GONE, None]),
    ("ready", "re", [None]), ("ready", "sdpOffer", ["v=0", sdp("answer", "Bob")]), ("offer", "sdpOffer", [GONE, None]),
    ("answer", "re", [None]), ("answer", "sdpAnswer", [GONE, None, sdp("offer", "Alice")]),
     ("unshare", "re", [GONE, False]),
    ("call", "type", [GONE, None, 5, "", "Call", "bye", ["call"], {"call": 1}, "constructor", "toString", "__proto__"]),
)
GOOD_MEMBERS: Sequence[tuple[str, str, Any]] = (
    ("call", "re", A_HASH), ("call", "seq", 1), ("call", "seq", 2**53 - 1), ("ready", "sdpOffer", None),
     ("ready", "sdpOffer",
     sdp("offer", "Bob")), ("welcome", "sdpAnswer", None), ("welcome", "sdpAnswer", sdp("answer", "Alice")),
     ("unshare", "re", A_HASH),
    ("call", "later", {"an": ["unknown", "member"]}), ("call", "sdpOffer", 5),
     ("offer", "sdpOffer", sdp("offer", "Bob 🔑") | {"x": 1}),
    ("hello", "r", 5), ("call", "connectoid", "no address: that is looked at later"), ("call", "to", ""),
)


def payload_text(kind: str, octets: bytes) -> str:
    """Return a message over a payload, signed by whoever a good one of the type is from."""
    jws = make_jws(BOB if kind in ("hello", "ready", "offer") else ALICE, octets)
    return prove(S, jws) if kind == "hello" else jws


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
    yield "members in __proto__ alone", b'{"__proto__":' + good + b"}"


def payload_cases() -> Iterator[Json]:
    """Yield messages whose payload is to be looked at, all else being right."""
    for kind in ("hello", "welcome", "used", "ready", "offer", "answer", "call", "unshare"):
        octets = to_json(base_payload(kind))
        yield {"name": kind, "payload": octets.decode(), "text": payload_text(kind, octets), "type": kind}
    for kind, member, value in GOOD_MEMBERS:
        octets = to_json(base_payload(kind) | {member: value})
        yield {"name": f"{kind}, {member} {to_json(value).decode()}", "payload": octets.decode(),
               "text": payload_text(kind, octets), "type": kind}
    for kind, member, value in ((kind, member, value) for kind, member, values in WRONG_MEMBERS for value in values):
        changed = {name: given for name, given in (base_payload(kind) | {member: value}).items() if given is not GONE}
        octets = to_json(changed)
        yield {"name": f"{kind}, {member} {'left out' if value is GONE else to_json(value).decode()}",
               "payload": octets.decode(), "text": payload_text(kind, octets), "refused": "payload"}
    for name, octets in raw_payloads():
        yield {"name": name, "payload_hex": octets.hex(), "text": payload_text("call", octets), "refused": "payload"}


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
        "h for S": prove(commit(ALICE.pub, R), jws), "S || h for S": prove(S + commit(ALICE.pub, R), jws),
        "S in base64url": prove(b64(S).encode(), jws), "no secret": prove(b"", jws), "empty proof": jws + ".",
        "half of the proof": HELLO[:-22], "SHA-384": f"{jws}.{b64(hmac.digest(S, jws.encode(), 'sha384'))}",
        "over the dot too": f"{jws}.{prove(S, jws + '.').rpartition('.')[2]}", "padded proof": HELLO + "=",
        "over the payload alone": f"{jws}.{prove(S, jws.split('.')[1]).rpartition('.')[2]}",
        "S itself": f"{jws}.{b64(S)}",
        "another alphabet": f"{jws}.{'+' * 43}", "unused bits of the proof": HELLO[:-1] + chr(ord(HELLO[-1]) + 1),
    }.items():
        yield {"name": name, "secret": S.hex(), "text": text, "refused": "proof"}


def commitment_cases() -> Iterator[Json]:
    """Yield signing keys and R, with h."""
    for name, signer, r in (("Alice's", ALICE.pub, R), ("Alice's with another R", ALICE.pub, OTHER_R),
        ("Mallory's", MALLORY.pub, R)):
        yield {"name": name, "from": signer, "r": r, "h": b64(commit(signer, r))}
    h = b64(commit(ALICE.pub, R))
    yield {"name": "another R", "from": ALICE.pub, "r": OTHER_R, "h": h, "refused": "commitment"}
    yield {"name": "another key", "from": MALLORY.pub, "r": R, "h": h, "refused": "commitment"}
    yield {"name": "a mailbox key", "from": A0.pub, "r": R, "h": h, "refused": "commitment"}
    texts = b64(sha256(ALICE.pub.encode(), R.encode()))
    yield {"name": "over the texts", "from": ALICE.pub, "r": R, "h": texts, "refused": "commitment"}
    negated = b64(bytes([unb64(ALICE.pub)[0] ^ 1]) + unb64(ALICE.pub)[1:])
    yield {"name": "the other point with the same x", "from": negated, "r": R, "h": h, "refused": "commitment"}


def hash_cases() -> Iterator[Json]:
    """Yield messages, with what an `re` to them says."""
    yield {"name": "hello", "text": HELLO, "hash": hash_of(HELLO)}
    yield {"name": "hello without its proof", "text": HELLO.rpartition(".")[0], "hash": hash_of(HELLO)}
    yield {"name": "hello with another proof", "text": prove(OTHER_S, make_jws(BOB, hello_payload())),
        "hash": hash_of(HELLO)}
    yield {"name": "welcome", "text": WELCOME, "hash": hash_of(WELCOME)}


def emoji_of(numbers: list[int]) -> list[str]:
    """Return what two people read to each other."""
    emoji = json.loads((HERE / "connectoid_emoji.json").read_text(encoding="utf-8"))["emoji"]
    return [" ".join(emoji[number]) for number in numbers]


def comparison_cases() -> Iterator[Json]:
    """Yield what a comparison string is made of; each differs from the first in one thing."""
    first = {"invitation": INVITATION, "hello": HELLO, "from": ALICE.pub, "r": R}
    hosted = invite(A0_AT, S, commit(MALLORY.pub, R))
    for name, changes in {
        "Alice and Bob": {}, "hello in three parts": {"hello": HELLO.rpartition(".")[0]},
        "another hello": {"hello": MALLORYS_HELLO},
        "another link": {"invitation": hosted}, "another signing key": {"from": MALLORY.pub},
        "another r": {"r": OTHER_R},
        "two mailboxes": {"invitation": invite(f"{A1_AT}~{EXT_AT}", S, commit(ALICE.pub, R))},
    }.items():
        case = first | changes
        numbers = compare(*case.values())
        yield {"name": name, **case, "numbers": numbers, "emoji": emoji_of(numbers)}


def seq_cases() -> Iterator[Json]:
    """Yield what a contact has sent last and the time, with the `seq` of what it sends next."""
    for name, last, now, seq in (
        ("the clock goes on", START, START + 5, START + 5), ("the same microsecond", START, START, START + 1),
        ("the clock was set back", START, START - 10**12, START + 1), ("the first", 0, START, START),
        ("a clock that stands at 1970", START, 0, START + 1),
    ):
        yield {"name": name, "last": last, "now_us": now, "seq": seq}


# ---------------------------------------------------------------------------------------
# Messages in context: what somebody knows, and what is found in a mailbox.
# ---------------------------------------------------------------------------------------

SOON, LATE = START + 3_000_000, START + 5_000_000
NOW = START + 60_000_000  # of the wall clock, when the messages are found
TWO_AT = f"{A0_AT}~{AF_AT}"
TWO = invite(TWO_AT, S, commit(ALICE.pub, R))


def own(address: str) -> Json:
    """Return an address of one's own with its private keys."""
    pubs = {box.pub: box.private for box in MAILBOX_KEYS}
    return {"address": address, "private": [pubs[box["pub"]] for box in listed(address)]}


def context(role: str, state: str, addresses: dict[str, str], **members: Any) -> Json:
    """Return what one side knows."""
    signer = ALICE if role == "inviter" else BOB
    none = {"invitation": "", "r": "", "hello": "", "hello_hash": "", "welcome": "", "contact": "", "connectoid": "",
            "seq": START + 2_000_000, "seen_seq": 0}
    return {"role": role, "state": state, "from": signer.pub, "private": signer.private, **none,
            "addresses": {name: own(address) for name, address in addresses.items()}, **members}


def contexts() -> dict[str, Json]:
    """Return all contexts by name."""
    link = {"invitation": INVITATION, "r": R}
    bound = {**link, "hello_hash": hash_of(HELLO), "welcome": WELCOME, "contact": BOB.pub}
    there = {**bound, "connectoid": B1_AT, "seen_seq": SOON}
    known = {"hello_hash": hash_of(HELLO), "contact": ALICE.pub, "connectoid": A1_AT}
    alice = {
        "alice invited": context("inviter", "invited", {"invited": A0_AT}, **link, seq=0),
        "alice invited, two mailboxes": context("inviter", "invited", {"invited": TWO_AT}, invitation=TWO, r=R, seq=0),
        "alice welcomed": context("inviter", "welcomed", {"invited": A0_AT, "pending": A1_AT}, **bound,
        connectoid=B0_AT),
        "alice paired": context("inviter", "paired", {"invited": A0_AT, "current": A1_AT}, **there),
        "alice paired, moving": context(
            "inviter", "paired", {"invited": A0_AT, "pending": A2_AT, "current": A1_AT, "former": AF_AT}, **there),
        "alice paired, two mailboxes": context("inviter", "paired", {"current": f"{A1_AT}~{A2_AT}"}, **there),
        "alice unshared": context("inviter", "unshared", {"invited": A0_AT, "current": A1_AT},
        **there | {"welcome": ""}),
    }
    bob = {
        "bob opened": context("opener", "opened", {"current": B0_AT}, invitation=INVITATION, hello=HELLO,
                              hello_hash=hash_of(HELLO), connectoid=A0_AT, seq=START + 1_000_000),
        "bob ready": context("opener", "ready", {"pending": B1_AT, "current": B0_AT}, **known),
        "bob paired": context("opener", "paired", {"pending": B1_AT, "current": B0_AT}, **known, seen_seq=SOON),
        "bob paired, moving": context(
            "opener", "paired", {"pending": B2_AT, "current": B1_AT, "former": BF_AT}, **known, seen_seq=SOON),
        "bob unshared": context("opener", "unshared", {"current": B0_AT}, invitation=INVITATION,
                                hello_hash=hash_of(HELLO), connectoid=A0_AT),
    }
    return alice | bob


class Box(NamedTuple):
    """Something found in a mailbox: a message to seal, or `data` as it is."""

    key: Key
    text: str
    is_sealed: bool = False

    @property
    def found(self) -> Json:
        """Return it as the vectors have it."""
        return {"mailbox": self.key.pub, "data": self.text if self.is_sealed else seal(self.key.pub, self.text)}


def reply(box: Key, kind: str, to: str, re: str | None, signer: Key = ALICE, **members: Any) -> Json:
    """Return a message that must be sent: the members that are certain."""
    return {"mailbox": box.pub, "payload": {"type": kind, "to": to, "from": signer.pub, "re": re, **members}}


def bobs(kind: str, signer: Key = BOB, /, **changes: Any) -> str:
    """Return a numbered message from Bob after the pairing, changed."""
    return make_jws(signer, from_bob(kind, seq=LATE) | changes)


def alices(kind: str, signer: Key = ALICE, /, **changes: Any) -> str:
    """Return a numbered message from Alice after the pairing, changed."""
    return make_jws(signer, from_alice(kind, seq=LATE) | changes)


def accepted(name: str, where: str, *boxes: Box, sent: Sequence[Json] = (), warned: bool = False, **after: Any) -> Json:
    """Return a case where all that is found counts: what is known after it, what is sent."""
    return {"name": name, "context": where, "found": [box.found for box in boxes], "after": after, "sent": list(sent),
            **({"warned": True} if warned else {})}


def accepted_first() -> Iterator[Json]:
    """Yield hellos that count, and what others get that came second."""
    bound: Json = {"state": "welcomed", "contact": BOB.pub, "connectoid": B0_AT, "hello_hash": hash_of(HELLO),
             "numbers": compare(INVITATION, HELLO, ALICE.pub, R)}
    greeted = reply(B0, "welcome", B0_AT, hash_of(HELLO), r=R)
    told = reply(M0, "used", M0_AT, hash_of(MALLORYS_HELLO), r=R)
    yield accepted("hello", "alice invited", Box(A0, HELLO), sent=[greeted], **bound)
    two = hello(to=TWO_AT, connectoid=f"{B0_AT}~{mailbox(B1.pub, 'https://other.example/', 'key 1')}")
    yield accepted(
        "hello in the second mailbox", "alice invited, two mailboxes", Box(AF, two), state="welcomed",
        hello_hash=hash_of(two),
        numbers=compare(TWO, two, ALICE.pub, R), contact=BOB.pub,
        sent=[reply(box, "welcome", json.loads(unb64(two.split(".")[1]))["connectoid"], hash_of(two),
        r=R) for box in (B0, B1)])
    far = hello(seq=2**53 - 1)
    yield accepted("hello of a clock far ahead", "alice invited", Box(A0, far), state="welcomed", seen_seq=0,
                   sent=[greeted | {"payload": greeted["payload"] | {"re": hash_of(far)}}])
    local = hello(connectoid=mailbox(B0.pub, "http://localhost:8080/"))
    yield accepted("hello from a relay on this machine", "alice invited", Box(A0, local), state="welcomed", sent=[
        reply(B0, "welcome", mailbox(B0.pub, "http://localhost:8080/"), hash_of(local), r=R)])
    yield accepted("the same hello again", "alice welcomed", Box(A0, HELLO), sent=[greeted | {"text": WELCOME}],
        state="welcomed")
    yield accepted("the same hello, paired", "alice paired", Box(A0, HELLO), sent=[greeted | {"text": WELCOME}],
        state="paired")
    yield accepted("second hello after the first", "alice welcomed", Box(A0, MALLORYS_HELLO), sent=[told], warned=True,
        **bound
                   | {"numbers": []})
    again = hello(nonce=OTHER_R)
    yield accepted("second hello under Bob's own key", "alice welcomed", Box(A0, again), warned=True, state="welcomed",
                   hello_hash=hash_of(HELLO), sent=[reply(B0, "used", B0_AT, hash_of(again), r=R)])
    yield accepted("second hello, paired", "alice paired", Box(A0, MALLORYS_HELLO), sent=[told], warned=True,
        state="paired",
                   contact=BOB.pub, connectoid=B1_AT)
    yield accepted("two hellos in one round", "alice invited", Box(A0, HELLO), Box(A0, MALLORYS_HELLO),
        sent=[greeted, told],
                   warned=True, **bound)
    yield accepted("hello at a link withdrawn", "alice unshared", Box(A0, MALLORYS_HELLO), sent=[told],
        state="unshared")


def accepted_next() -> Iterator[Json]:
    """Yield what counts after the hello."""
    ready = make_jws(BOB, from_bob("ready"))
    yield accepted("ready", "alice welcomed", Box(A1, ready), state="paired", seen_seq=SOON, connectoid=B1_AT,
                   sent=[reply(B1, "call", B1_AT, hash_of(ready))], current=A1_AT, pending=None, former=None)
    left = bobs("unshare", to=A0_AT)
    yield accepted("Bob left before the welcome came", "alice welcomed", Box(A0, left), state="ended", why="unshared")
    yield accepted("welcome", "bob opened", Box(B0, WELCOME), state="ready", contact=ALICE.pub, connectoid=A1_AT,
        seen_seq=0,
                   numbers=compare(INVITATION, HELLO, ALICE.pub, R))
    early = welcome(seq=1)
    yield accepted("welcome of a clock that stands at 1970", "bob opened", Box(B0, early), state="ready",
        contact=ALICE.pub)
    yield accepted("used", "bob opened", Box(B0, used()), state="ended", why="used")
    yield accepted("call before anything else", "bob ready", Box(B0, make_jws(ALICE, from_alice("call"))),
        state="paired",
                   seen_seq=SOON)


def accepted_later() -> Iterator[Json]:
    """Yield what counts between two who know each other."""
    offer = bobs("offer")
    call = reply(B1, "call", B1_AT, hash_of(offer))
    yield accepted("offer", "alice paired", Box(A1, offer), sent=[call], seen_seq=LATE, state="paired")
    elsewhere = mailbox(B2.pub, "https://other.example:8443/relay", "key 1")
    moved = bobs("offer", connectoid=elsewhere)
    yield accepted("offer from new relays", "alice paired", Box(A1, moved), connectoid=elsewhere,
                   sent=[reply(B2, "call", elsewhere, hash_of(moved))])
    pending = bobs("offer", to=A2_AT)
    yield accepted("the first message at the pending address", "alice paired, moving", Box(A2, pending), current=A2_AT,
                   pending=None, former=A1_AT, seen_seq=LATE, sent=[reply(B1, "call", B1_AT, hash_of(pending))])
    former = bobs("offer", to=AF_AT)
    yield accepted("a message at the former address", "alice paired, moving", Box(AF, former), current=A1_AT,
        pending=A2_AT,
                   former=AF_AT, seen_seq=LATE, sent=[reply(B1, "call", B1_AT, hash_of(former))])
    next_one = bobs("offer", seq=SOON + 1)
    yield accepted("seq larger by one", "alice paired", Box(A1, next_one), seen_seq=SOON + 1,
                   sent=[reply(B1, "call", B1_AT, hash_of(next_one))])
    last = bobs("offer", seq=2**53 - 1)
    yield accepted("the largest seq", "alice paired", Box(A1, last), seen_seq=2**53 - 1,
                   sent=[reply(B1, "call", B1_AT, hash_of(last))])
    older = bobs("offer", seq=SOON + 1, sdpOffer=sdp("offer", "Bob before"), connectoid=B0_AT)
    yield accepted("a round is taken in the order of seq", "alice paired", Box(A1, offer), Box(A1, older),
        seen_seq=LATE,
                   connectoid=B1_AT, sent=[call])
    yield accepted("unshare", "alice paired", Box(A1, bobs("unshare")), state="ended", why="unshared")
    yield accepted("offer to who has left", "alice unshared", Box(A1, offer), state="unshared",
                   sent=[reply(B1, "unshare", B1_AT, hash_of(offer))])
    yield accepted("unshare to who has left", "alice unshared", Box(A1, bobs("unshare")), state="ended")
    yield accepted("welcome to who has left", "bob unshared", Box(B0, WELCOME), state="unshared",
                   sent=[reply(A1, "unshare", A1_AT, hash_of(WELCOME), BOB)])
    yield accepted("call", "bob paired", Box(B0, alices("call")), seen_seq=LATE, state="paired")
    yield accepted("call at the pending address", "bob paired", Box(B1, alices("call", to=B1_AT)), current=B1_AT,
        former=B0_AT,
                   pending=None)
    yield accepted("answer to an offer that is no longer out", "bob paired", Box(B0, alices("answer")), seen_seq=LATE,
        state="paired")
    yield accepted("unshare from Alice", "bob paired", Box(B0, alices("unshare")), state="ended", why="unshared")


def refused(reason: str, name: str, where: str, box: Box) -> Json:
    """Return a case where what is found does not count, and changes nothing."""
    return {"name": name, "context": where, "found": [box.found], "refused": reason}


def raw(box: Key, sealed: str) -> Box:
    """Return `data` as it is."""
    return Box(box, sealed, is_sealed=True)


def refused_envelopes() -> Iterator[Json]:
    """Yield what is no message, or not for this mailbox."""
    text = bobs("offer")
    data = seal(A1.pub, text)
    for name, changed in {"padded data": data + "=", "standard alphabet": "/" + data[1:],
        "unused bits": seal(A1.pub, text)[:-2] + "B",
                          "white space": data[:9] + " " + data[9:], "length 1 modulo 4": data[:-3]}.items():
        yield refused("encoding", name, "alice paired", raw(A1, changed))
    octets = pad(text.encode())
    for name, changed in {
        "a question": b64(hpke_seal(A1.pub, QUESTION, scatter("answer", 32).hex().encode())),
        "a message sealed as a question": seal(A1.pub, text, QUESTION),
        "a message sealed as a challenge": seal(A1.pub, text, CHANNEL),
        "sealed to another mailbox of hers": seal(A0.pub, text), "a bit changed": b64(flip(unb64(data), 200)),
        "two characters": "AA", "not sealed": b64(octets),
        "the ephemeral key is no point": b64(b"\4" + bytes(96) + unb64(data)[97:]),
    }.items():
        yield refused("seal", name, "alice paired", raw(A1, changed))
    for name, plaintext in {"not padded": octets[:4 + len(text)], "padding of another size": octets + bytes(1_000),
                            "something in the padding": octets[:-1] + b"\1",
                            "length beyond the end": b"\0\1\0\0" + octets[4:]}.items():
        yield refused("padding", name, "alice paired", raw(A1, b64(hpke_seal(A1.pub, MESSAGE, plaintext))))
    none = f"{b64(HEADER.replace('ES384', 'none').encode())}.{text.split('.')[1]}."
    for name, changed in {"alg none": none, "alg HS256": make_jws(BOB, from_bob("offer"),
        HEADER.replace("ES384", "HS256")),
                          "a proof on an offer": prove(S, text), "no JWS": "hello",
                          "not ASCII": "\u00e9" + text}.items():
        yield refused("jws", name, "alice paired", Box(A1, changed))
    for name, payload in {"no type": {}, "seq is a text": from_bob("offer", seq=str(LATE)),
        "no SDP": from_bob("offer", sdpOffer=None),
                          "an unknown type": from_bob("bye"), "seq of 2^53": from_bob("offer", seq=2**53)}.items():
        yield refused("payload", name, "alice paired", Box(A1, make_jws(BOB, payload)))


def refused_recipients() -> Iterator[Json]:
    """Yield what was written to another address: moved, or reflected."""
    for name, where, box in (
        ("moved recipient: a hello to Mallory's link", "alice invited", Box(A0, hello(to=M0_AT))),
        ("hello to the whole invitation", "alice invited", Box(A0, hello(to=INVITATION))),
        ("hello to the address with a dot after it", "alice invited", Box(A0, hello(to=A0_AT + "."))),
        ("hello to one of two mailboxes", "alice invited, two mailboxes", Box(A0, hello(to=A0_AT))),
        ("hello to the mailboxes in another order", "alice invited, two mailboxes",
         Box(A0, hello(to=f"{AF_AT}~{A0_AT}"))),
        ("hello to the key at another relay", "alice invited", Box(A0, hello(to=mailbox(A0.pub,
         "https://other.example/")))),
        ("moved recipient: a welcome to Mallory", "bob opened", Box(B0, welcome(to=M0_AT))),
        ("moved between two addresses of hers", "alice paired, moving", Box(A1, bobs("offer", to=A2_AT))),
        ("an offer to somebody else", "alice paired", Box(A1, bobs("offer", to=M0_AT))),
        ("an offer with an empty to", "alice paired", Box(A1, bobs("offer", to=""))),
        ("moved recipient: a call to Mallory", "bob paired", Box(B0, alices("call", to=M0_AT))),
        ("reflected call", "alice paired", Box(A1, make_jws(ALICE, from_alice("call", seq=LATE)))),
        ("reflected hello", "bob opened", Box(B0, HELLO)),
        ("reflected welcome", "alice welcomed", Box(A1, WELCOME)),
    ):
        yield refused("recipient", name, where, box)


def refused_places() -> Iterator[Json]:
    """Yield types that have no place in the state, from the side or in the mailbox."""
    for name, where, box in (
        ("hello to an opener", "bob opened", Box(B0, hello(MALLORY, to=B0_AT))),
        ("hello to an opener, paired", "bob paired", Box(B0, hello(ALICE, to=B0_AT))),
        ("hello at the address of the welcome", "alice welcomed", Box(A1, hello(to=A1_AT))),
        ("welcome to an inviter", "alice invited", Box(A0, welcome(MALLORY, to=A0_AT))),
        ("used to an inviter", "alice paired", Box(A1, used(BOB, to=A1_AT))),
        ("second welcome", "bob ready", Box(B0, welcome(connectoid=A2_AT))),
        ("welcome when paired", "bob paired", Box(B0, WELCOME)),
        ("used after the welcome", "bob ready", Box(B0, used())),
        ("used to who has left", "bob unshared", Box(B0, used())),
        ("answer to an inviter", "alice paired", Box(A1, bobs("answer"))),
        ("call to an inviter", "alice paired", Box(A1, bobs("call"))),
        ("offer to an opener", "bob paired", Box(B0, alices("offer"))),
        ("ready to an opener", "bob paired", Box(B0, alices("ready", re=A_HASH))),
        ("offer at the link's mailbox", "alice paired", Box(A0, bobs("offer", to=A0_AT))),
        ("ready at the link's mailbox", "alice welcomed", Box(A0, bobs("ready", to=A0_AT))),
    ):
        yield refused("unexpected", name, where, box)


def refused_pairings() -> Iterator[Json]:
    """Yield hellos, welcomes and useds that the link does not vouch for."""
    payload = hello_payload()
    for name, text in {
        "hello with a bad proof": prove(OTHER_S, make_jws(BOB, payload)),
        "hello by a relay that has no S": hello(MALLORY, OTHER_S),
        "hello with a proof by h": hello(MALLORY, commit(ALICE.pub, R)), "hello with the proof of another":
        f"{MALLORYS_HELLO.rpartition('.')[0]}.{HELLO.rpartition('.')[2]}",
        "hello with an empty proof": make_jws(BOB, payload) + ".",
        "hello with a padded proof": HELLO + "=", "hello proven for another link": hello(BOB, OTHER_S, to=A0_AT),
    }.items():
        yield refused("proof", name, "alice invited", Box(A0, text))
    yield refused("proof", "second hello with a bad proof", "alice welcomed",
        Box(A0, hello(MALLORY, OTHER_S, connectoid=M0_AT)))
    for name, text in {
        "welcome with another r": welcome(r=OTHER_R), "welcome with another key": welcome(MALLORY),
        "welcome with another key and r": welcome(MALLORY, r=OTHER_R), "welcome from Bob himself": welcome(BOB),
        "used with another r": used(r=OTHER_R), "used with another key": used(MALLORY),
    }.items():
        yield refused("commitment", name, "bob opened", Box(B0, text))
    for name, text in {
        "welcome to another hello": welcome(re=hash_of(MALLORYS_HELLO)), "used with a wrong re": used(re=A_HASH),
        "welcome whose re is the hash with the proof": welcome(re=b64(sha256(HELLO.encode()))),
        "used for another's hello": used(re=hash_of(MALLORYS_HELLO)),
    }.items():
        yield refused("reply", name, "bob opened", Box(B0, text))


def refused_senders() -> Iterator[Json]:
    """Yield numbered messages that are not of the contact, not new, or not signed by it."""
    for name, where, box in (
        ("offer of Mallory", "alice paired", Box(A1, bobs("offer", MALLORY, **{"from": MALLORY.pub}))),
        ("offer under Alice's own key", "alice paired", Box(A1, bobs("offer", ALICE, **{"from": ALICE.pub}))),
        ("unshare of Mallory", "alice paired", Box(A1, bobs("unshare", MALLORY, **{"from": MALLORY.pub}))),
        ("unshare before any hello", "alice invited", Box(A0, bobs("unshare", to=A0_AT))),
        ("call before the welcome", "bob opened", Box(B0, alices("call"))),
        ("ready of Mallory, who lost the race", "alice welcomed", Box(A1,
         bobs("ready", MALLORY, **{"from": MALLORY.pub}))),
        ("call of Mallory", "bob ready", Box(B0, alices("call", MALLORY, **{"from": MALLORY.pub}))),
        ("offer of Mallory to who has left", "alice unshared", Box(A1, bobs("offer", MALLORY,
         **{"from": MALLORY.pub}))),
        ("Mallory at the pending address", "alice paired, moving", Box(A2,
         bobs("offer", MALLORY, to=A2_AT, **{"from": MALLORY.pub}))),
    ):
        yield refused("sender", name, where, box)
    for name, where, box in (
        ("the seq that was accepted last", "alice paired", Box(A1, bobs("offer", seq=SOON))),
        ("a smaller seq", "alice paired", Box(A1, bobs("offer", seq=SOON - 1))),
         ("seq 1", "alice paired", Box(A1, bobs("offer", seq=1))),
        ("an old ready", "alice paired", Box(A1, make_jws(BOB, from_bob("ready")))),
        ("an old unshare", "alice paired", Box(A1, bobs("unshare", seq=SOON))),
        ("an old message at the former address", "alice paired, moving", Box(AF, bobs("offer", to=AF_AT, seq=SOON))),
        ("an old message at the pending address", "alice paired, moving", Box(A2, bobs("offer", to=A2_AT, seq=SOON))),
        ("an old call", "bob paired", Box(B0, alices("call", seq=SOON))),
    ):
        yield refused("replay", name, where, box)


def unsigned(text: str, signature: bytes = bytes(96)) -> str:
    """Return a message with other bytes for a signature; a hello gets the proof that goes with them."""
    head, body, *rest = text.split(".")
    jws = f"{head}.{body}.{b64(signature)}"
    return prove(S, jws) if len(rest) > 1 else jws


def refused_signatures() -> Iterator[Json]:
    """Yield messages of every kind that `from` did not sign."""
    offer = bobs("offer")
    signed, _, signature = offer.rpartition(".")
    other = b64(to_json(from_bob("offer", seq=LATE, connectoid=M0_AT)))
    for name, where, box in (
        ("hello, not signed by from", "alice invited", Box(A0, hello(MALLORY, S, **{"from": BOB.pub}))),
        ("hello with zeros", "alice invited", Box(A0, unsigned(HELLO))),
        ("second hello with zeros", "alice welcomed", Box(A0, unsigned(MALLORYS_HELLO))),
        ("welcome, not signed by from", "bob opened", Box(B0, welcome(MALLORY, **{"from": ALICE.pub}))),
        ("used, not signed by from", "bob opened", Box(B0, used(MALLORY, **{"from": ALICE.pub}))),
        ("offer, not signed by from", "alice paired", Box(A1, bobs("offer", MALLORY, **{"from": BOB.pub}))),
        ("call, not signed by from", "bob paired", Box(B0, alices("call", MALLORY, **{"from": ALICE.pub}))),
        ("unshare with zeros", "alice paired", Box(A1, unsigned(bobs("unshare")))),
        ("unshare with zeros to who has left", "alice unshared", Box(A1, unsigned(bobs("unshare")))),
        ("tampered connectoid", "alice paired", Box(A1, f"{signed.partition('.')[0]}.{other}.{signature}")),
        ("at the pending address, with zeros", "alice paired, moving", Box(A2, unsigned(bobs("offer", to=A2_AT)))),
        ("signature in DER", "alice paired", Box(A1, unsigned(offer, sign_der(BOB, signed.encode())))),
        ("signed with a mailbox key", "alice paired", Box(A1, bobs("offer", B0, **{"from": BOB.pub}))),
    ):
        yield refused("signature", name, where, box)


def refused_addresses() -> Iterator[Json]:
    """Yield rightly signed messages of somebody who would have others write to where they should not."""
    for name, url in HOSTILE_URLS.items():
        yield refused("address", f"hello from {name}", "alice invited", Box(A0, hello(connectoid=mailbox(B0.pub, url))))
    several = {"four mailboxes": "~".join((B0_AT, B1_AT, B2_AT, BF_AT)),
        "a key twice": f"{B0_AT}~{mailbox(B0.pub, 'https://other.example/')}",
               "no point": mailbox(no_point()), "second is no point": f"{B0_AT}~{mailbox(no_point())}", "nothing": "",
               "an invitation": invite(B0_AT, S, bytes(32)), "ext of 1025": mailbox(B0.pub, RELAY, "a" * 1_025),
               "x over the field": mailbox(b64(b"\2" + b"\xff" * HALF)),
               "http": mailbox(B0.pub, "http://relay.example.com/")}
    for name, address in several.items():
        yield refused("address", f"hello: {name}", "alice invited", Box(A0, hello(connectoid=address)))
        yield refused("address", f"ready: {name}", "alice welcomed", Box(A1, bobs("ready", connectoid=address)))
        yield refused("address", f"offer: {name}", "alice paired", Box(A1, bobs("offer", connectoid=address)))
        yield refused("address", f"welcome: {name}", "bob opened", Box(B0, welcome(connectoid=address)))
        yield refused("address", f"call: {name}", "bob paired", Box(B0, alices("call", connectoid=address)))
    pending = bobs("offer", to=A2_AT, connectoid=several["no point"])
    yield refused("address", "no point, at the pending address", "alice paired, moving", Box(A2, pending))
    yield refused("address", "second hello: http", "alice welcomed", Box(A0,
        hello(MALLORY, connectoid=several["http"])))


def refused_for_two() -> Iterator[Json]:
    """Yield messages with two things wrong: the class is that of the check that comes first."""
    http = mailbox(B0.pub, "http://relay.example.com/")
    stranger = {"from": MALLORY.pub}
    noise = pad(b"no JWS")[:-1] + b"\1"
    yield refused("padding", "padding before jws", "alice paired", raw(A1, b64(hpke_seal(A1.pub, MESSAGE, noise))))
    for reason, after, where, box in (
        ("jws", "payload", "alice paired", Box(A1, make_jws(BOB, b"{", '{"alg":"none"}'))),
        ("payload", "recipient", "alice paired", Box(A1, bobs("offer", to=M0_AT, seq=0))),
        ("recipient", "unexpected", "alice paired", Box(A1, bobs("call", to=M0_AT))),
        ("recipient", "proof", "alice invited", Box(A0, hello(BOB, OTHER_S, to=M0_AT))),
        ("recipient", "sender", "alice paired", Box(A1, bobs("offer", MALLORY, to=M0_AT, **stranger))),
        ("unexpected", "sender", "alice paired", Box(A1, bobs("call", MALLORY, **stranger))),
        ("unexpected", "proof", "bob opened", Box(B0, hello(BOB, OTHER_S, to=B0_AT))),
        ("unexpected", "commitment", "alice invited", Box(A0, welcome(to=A0_AT, r=OTHER_R))),
        ("proof", "signature", "alice invited", Box(A0, unsigned(HELLO)[:-3] + "AAA")),
        ("commitment", "reply", "bob opened", Box(B0, welcome(MALLORY, re=A_HASH))),
        ("reply", "signature", "bob opened", Box(B0, unsigned(welcome(re=A_HASH)))),
        ("sender", "replay", "alice paired", Box(A1, bobs("offer", MALLORY, seq=1, **stranger))),
        ("sender", "signature", "alice paired", Box(A1, unsigned(bobs("offer", BOB, **stranger)))),
        ("replay", "signature", "alice paired", Box(A1, unsigned(bobs("offer", seq=SOON)))),
        ("signature", "address", "alice paired", Box(A1, unsigned(bobs("offer", connectoid=http)))),
        ("signature", "address of a hello", "alice invited", Box(A0, unsigned(hello(connectoid=http)))),
        ("address", "unexpected in this state", "bob unshared", Box(B0, used(connectoid=http))),
    ):
        yield refused(reason, f"{reason} before {after}", where, box)


def refused_beside() -> Iterator[Json]:
    """Yield rounds in which one message is refused, and the other counts."""
    offer, other = bobs("offer"), bobs("offer", sdpOffer=sdp("offer", "Bob again"))
    call = reply(B1, "call", B1_AT, hash_of(offer))
    yield {**accepted("the very bytes twice", "alice paired", Box(A1, offer), Box(A1, offer), sent=[call],
        seen_seq=LATE),
           "refused": "replay"}
    yield {**accepted("one seq twice", "alice paired", Box(A1, offer), Box(A1, other), sent=[call], seen_seq=LATE),
           "refused": "replay"}
    two = bobs("offer", to=f"{A1_AT}~{A2_AT}")
    yield {**accepted("a message in both mailboxes", "alice paired, two mailboxes", Box(A1, two), Box(A2, two),
        seen_seq=LATE,
                      sent=[reply(B1, "call", B1_AT, hash_of(two))]), "refused": "replay"}
    yield {**accepted("Mallory beside Bob", "alice paired", Box(A1, bobs("offer", MALLORY, seq=LATE + 9,
        **{"from": MALLORY.pub})),
                      Box(A1, offer), sent=[call], seen_seq=LATE), "refused": "sender"}
    yield {**accepted("a bad proof before the hello", "alice invited", Box(A0,
        hello(MALLORY, OTHER_S, connectoid=M0_AT)),
                      Box(A0, HELLO), state="welcomed", contact=BOB.pub, hello_hash=hash_of(HELLO),
                      sent=[reply(B0, "welcome", B0_AT, hash_of(HELLO), r=R)]), "refused": "proof"}
    yield {**accepted("a forged welcome before the right one", "bob opened",
        Box(B0, welcome(MALLORY, connectoid=M0_AT)),
                      Box(B0, WELCOME), state="ready", contact=ALICE.pub, connectoid=A1_AT), "refused": "commitment"}
    yield {**accepted("a second welcome in the round", "bob opened", Box(B0, WELCOME),
        Box(B0, welcome(connectoid=A2_AT)),
                      state="ready", connectoid=A1_AT), "refused": "unexpected"}
    yield {**accepted("junk before an offer", "alice paired", raw(A1, "QUJD"), Box(A1, offer), sent=[call],
        seen_seq=LATE),
           "refused": "seal"}


def context_file() -> Json:
    """Return the file of messages in context."""
    cases = (
        accepted_first, accepted_next, accepted_later, refused_envelopes, refused_recipients, refused_places,
        refused_pairings, refused_senders, refused_signatures, refused_addresses, refused_for_two, refused_beside)
    return {"now_us": NOW, "keys": {box.pub: box.private for box in MAILBOX_KEYS}, "contexts": contexts(),
            "cases": [case for function in cases for case in function()]}


# ---------------------------------------------------------------------------------------
# Whole pairings.
# ---------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One of the two in a pairing: its signing key, and its first address and the next."""

    signer: Key
    keys: tuple[tuple[Key, ...], ...]
    addresses: tuple[str, ...]

    @property
    def told(self) -> Json:
        """Return all that it knows before the first message."""
        return {"from": self.signer.pub, "private": self.signer.private, "addresses": [
            {"address": address, "private": [box.private for box in keys]}
            for address, keys in zip(self.addresses, self.keys, strict=True)]}


def side(name: str, relays: Sequence[tuple[str, str | None]]) -> Side:
    """Return somebody with new keys at relays."""
    keys = tuple(tuple(key(f"{name}, mailbox {n} of address {which}") for n in range(len(relays)))
                 for which in (0, 1))
    addresses = tuple("~".join(mailbox(box.pub, *relay) for box, relay in zip(boxes, relays, strict=True))
                      for boxes in keys)
    return Side(key(f"{name} signs"), keys, addresses)


def step(by: str, text: str, address: str, **members: Any) -> Json:
    """Return a message on its way."""
    return {"by": by, "payload": json.loads(unb64(text.split(".")[1])), "text": text, "hash": hash_of(text), "data": [
        {"mailbox": box["pub"], "data": seal(box["pub"], text)} for box in listed(address)], **members}


def messages(alice: Side, bob: Side, r: str, secret: bytes, answered: bool) -> list[Json]:
    """Return the messages of a pairing, to the answer that connects."""
    (a0, a1), (b0, b1) = alice.addresses, bob.addresses
    nonce = b64(scatter(f"nonce of {bob.signer.pub}", 16))
    first = build("hello", a0, bob.signer, 1, None, at=b0, nonce=nonce, sdpOffer=sdp("offer", "Bob"))
    opened = prove(secret, make_jws(bob.signer, first))
    answer = {"sdpAnswer": sdp("answer", "Alice")} if answered else {}
    greeted = make_jws(alice.signer, build("welcome", b0, alice.signer, 2, hash_of(opened), at=a1, r=r, **answer))
    offer = {} if answered else {"sdpOffer": sdp("offer", "Bob again")}
    ready = make_jws(bob.signer, build("ready", a1, bob.signer, 3, hash_of(greeted), at=b1, **offer))
    steps = [step("bob", opened, a0, fresh=answered), step("alice", greeted, b0, fresh=True),
             step("bob", ready, a1, fresh=True)]
    if not answered:
        last = make_jws(alice.signer, build("answer", b1, alice.signer, 4, hash_of(ready), at=a1,
                                            sdpAnswer=sdp("answer", "Alice")))
        steps.append(step("alice", last, b1, fresh=True))
    return steps


def challenge(by: str, to: Key, info: bytes) -> Json:
    """Return what one side sends on a new channel, and expects back."""
    octets = scatter(f"challenge to {to.pub}", 32)
    return {"by": by, "to": to.pub, "challenge": octets.hex(), "sealed": hpke_seal(to.pub, info, octets).hex()}


def pairing(name: str, alices_relays: Sequence[tuple[str, str | None]], bobs_relays: Sequence[tuple[str, str | None]],
            answered: bool) -> Json:
    """Return a pairing, from the link to the channel."""
    alice, bob = side(f"Alice, {name}", alices_relays), side(f"Bob, {name}", bobs_relays)
    secret, r = scatter(f"S, {name}", 16), b64(scatter(f"R, {name}", 16))
    invitation = invite(alice.addresses[0], secret, commit(alice.signer.pub, r))
    steps = messages(alice, bob, r, secret, answered)
    offer, answer = (steps[0], steps[1]) if answered else (steps[2], steps[3])
    info = CHANNEL + b"\0" + unb64(offer["hash"]) + unb64(answer["hash"])
    numbers = compare(invitation, steps[0]["text"], alice.signer.pub, r)
    return {
        "name": name, "link": f"{APP}#connectoid={invitation}", "invitation": invitation, "secret": secret.hex(),
        "r": r,
        "h": b64(commit(alice.signer.pub, r)), "alice": alice.told, "bob": bob.told, "messages": steps,
        "numbers": numbers, "emoji": emoji_of(numbers),
        "channel": {"offer": offer["hash"], "answer": answer["hash"], "info": info.hex(), "challenges": [
            challenge("alice", bob.keys[1][0], info), challenge("bob", alice.keys[1][0], info)]}}


def pairing_cases() -> Iterator[Json]:
    """Yield pairings: over one relay and over several, answered at once and later."""
    one, other, third = (RELAY, None), ("https://other.example/", "key 1"), ("https://third.example:8443/relay", None)
    yield pairing("one relay, the welcome answers", [one], [one], True)
    yield pairing("one relay, the offer was stale", [one], [one], False)
    yield pairing("ext, the welcome answers", [other], [other], True)
    yield pairing("three relays, the welcome answers", [one, other, third], [one, other, third], True)
    yield pairing("three relays and two others, the offer was stale", [third, one, other], [other, one], False)


def channel_cases() -> Iterator[Json]:
    """Yield what comes on the channel of the first pairing, up to where it decides."""
    first = next(pairing_cases())
    mine, other = first["channel"]["challenges"]
    alice, octets, whole = mine["challenge"], bytes.fromhex(other["challenge"]), other["sealed"]
    info, hashed = CHANNEL + b"\0", tuple(unb64(first["channel"][name]) for name in ("offer", "answer"))
    right = info + b"".join(hashed)
    yield {"name": "both prove it", "by": "alice", "received": [whole, alice], "written": other["challenge"]}
    yield {"name": "both prove it, from Bob's side", "by": "bob", "received": [mine["sealed"], other["challenge"]],
           "written": alice}
    for name, received in {
        "hashes swapped": [hpke_seal(other["to"], info + hashed[1] + hashed[0], octets).hex()],
        "another offer": [hpke_seal(other["to"], info + sha256(b"offer") + hashed[1], octets).hex()],
        "hashes in base64url": [hpke_seal(other["to"], info + "".join(map(b64, hashed)).encode(), octets).hex()],
        "no zero in the info": [hpke_seal(other["to"], CHANNEL + b"".join(hashed), octets).hex()],
        "a question as a challenge": [hpke_seal(other["to"], QUESTION, octets).hex()],
        "a message as a challenge": [first["messages"][2]["data"][0]["data"].encode().hex()],
        "31 bytes": [hpke_seal(other["to"], right, octets[:-1]).hex()],
        "33 bytes": [hpke_seal(other["to"], right, octets + b"\0").hex()],
        "a bit changed": [flip(bytes.fromhex(whole), -1).hex()], "reflected": [mine["sealed"]],
        "not sealed": [octets.hex()],
        "nothing": [""], "the reply before the challenge": [alice], "another reply": [whole, flip(octets, 0).hex()],
        "its own challenge for a reply": [whole, octets.hex()], "the challenge again for a reply": [whole, whole],
        "half a reply": [whole, alice[:32]], "a reply and more": [whole, alice + "00"], "an empty reply": [whole, ""],
    }.items():
        yield {"name": name, "by": "alice", "received": received, "refused": "channel"}


# ---------------------------------------------------------------------------------------
# The files.
# ---------------------------------------------------------------------------------------

FILES = {
    "base64url": ("Base64url without padding, canonical only.", base64url_cases), "keys": ("Public keys.", key_cases),
    "addresses": ("Addresses.", address_cases), "links": ("Links, and the invitations in them.", link_cases),
    "seals": ("HPKE with the context strings.", seal_cases), "padding": ("What is in a sealed message.", padding_cases),
    "jws": ("Form and signature of messages.", jws_cases), "payloads": ("Payloads of every type.", payload_cases),
    "proofs": ("The fourth part of a hello.", proof_cases), "commitments": ("What the link pins.", commitment_cases),
    "hashes": ("Hashes of messages.", hash_cases), "comparison": ("Comparison strings.", comparison_cases),
    "seq": ("The seq of what is sent.", seq_cases), "pairings": ("Whole pairings.", pairing_cases),
    "channel": ("What comes on the channel of the first pairing.", channel_cases),
}


def make_files() -> dict[str, str]:
    """Return the text of each file by its name."""
    values: dict[str, Json] = {name: {"title": title, "cases": list(cases())} for name, (title, cases) in FILES.items()}
    values["contexts"] = {"title": "Messages in context.", **context_file()}
    return {f"connectoid_{name}.json": json.dumps(value, ensure_ascii=False, indent=1) + "\n"
            for name, value in values.items()}


def main() -> None:
    """Write all files."""
    for name, text in make_files().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
