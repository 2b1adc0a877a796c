"""Connect two copies of a peer-to-peer app through nothing but a link.

One user's app makes an invitation, which travels as a link through any messenger; the
other's opens it. From then on the two find each other through relays that can read
nothing, and connect directly. PROTOCOL.md says what goes over the wire. What is here does no I/O and knows no clock:

    alice, todo = Contact.invite(suite, now, "Bob", [("https://relay.example.com/", None)])
    link = make_link("https://app.example.com/", alice.kept.invitation)
    bob, todo = Contact.open(suite, now, "Alice", read_link(link))
    todo = bob.polled(now, {pub: [(at, data), ...]})  # what a check has found

Each call takes the time and returns what to do, in order: Save before anything leaves, then
Send, Gather, Join, Write, Close for the wire and for WebRTC, and Tell for the app.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["cryptography>=47"]
# ///

from __future__ import annotations

__version__ = "0.1.0"
__all__ = [
    "CONNECTING", "CONTEXTS", "EMOJI", "EVENTS", "PAIRING", "REASONS", "AiortcAdapter", "AsyncChannel",
    "AsyncConnectoid", "Channel", "Close", "Connectoid", "ConnectoidError", "Contact", "Effect", "Forget", "Gather",
    "Invitation", "Join", "Kept", "LinkError", "Mailbox", "Message", "NotConnectedError", "Now", "Own", "Poll",
    "RecordError", "Refused", "RelayClient", "RelayError", "Rule", "Save", "Send", "Store", "StoreError", "Suite",
    "SystemSuite", "Tell", "UsageError", "WebRTC", "Write",
    "comparison_string", "format_address", "hash_jws", "make_link", "open_message", "parse_address",
    "parse_invitation", "prove", "read_jws", "read_link", "seal_message", "sign_jws",
]

import asyncio
import base64
import collections
import contextlib
import fcntl
import functools
import hashlib
import hmac
import http.client
import importlib
import io
import json
import logging
import math
import os
import queue
import re
import secrets
import socket
import sqlite3
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeAlias

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import hashes, hpke
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
except ImportError:
    NEEDS = "Connectoid needs the package cryptography 47 or newer: pip install 'cryptography>=47'"
    if __name__ == "__main__":
        sys.exit(NEEDS)
    raise ImportError(NEEDS) from None

# ---------------------------------------------------------------------------------------
# Limits. What PROTOCOL.md fixes, and what is ours to choose within it. Seconds are those of
# a monotonic clock, except where something outlives the process: then it is microseconds
# of the wall clock.
# ---------------------------------------------------------------------------------------

MAX_MAILBOXES = 3  # in an address: each costs the other a seal and a request for every message
MAX_EXT_CHARS = 1_024  # of a mailbox's `ext`, in code points: as relays have it
MAX_URL_CHARS = 512  # of a relay's URL: a host name has 253
MAX_ADDRESS_CHARS = 4_096  # of a contact: beside one's own as long there is room for an SDP in every message
MAX_SEQ = 2**53  # what a number of JavaScript holds exactly
SECRET_BYTES = 16  # S, R and a hello's nonce: 128 bits
CHALLENGE_BYTES = 32  # what each sends the other on a new channel
SIZES = (1_024, 2_048, 4_096, 8_192, 16_384)  # bytes of a plaintext: all that a relay learns of its length
LENGTH_BYTES = 4

POLL_FAST_S = 2.0  # between two checks while something is going on, where the relay does not wait
POLL_SLOW_S = 55.0  # else; PROTOCOL.md allows 66: this leaves time for replies, and for SDP to be gathered
POLL_FAST_FOR_S = 90.0  # after something was sent or came
FRESH_S = 75.0  # an offer that came since the check before, so long ago at most, is still good
ZERO_EVERY_S = 3_600.0  # a check from 0: what a relay that lost its clock would hide comes to light
AGAIN_AFTER_ANSWER_S = 20.0  # without a connection
AGAIN_AFTER_OFFER_S = 50.0  # the same: the other polls at least every 66 s
ACTIVE_S = 120.0  # from the start, or the other's last sign: then attempts are seldom
AGAIN_IDLE_S = 3_000.0  # 50 minutes: less than a relay keeps a message
NEW_OFFER_S = 5.0  # a call that comes sooner has crossed the offer
GATHERED_S = 10.0  # the app's WebRTC has its own limit of 2 s
MAX_UNREACHABLE = 3  # attempts in a row that no channel came of: more only cost the relays something
REPEAT_S = 60.0  # between two welcomes, useds or unshares
MAX_USED = 10  # replies to others who open a link, for each invitation
MAX_SEEN = 1_024  # digests of what was read already, so that hourly repeats cost nothing

DAY_US = 86_400_000_000
INVITATION_US = 30 * DAY_US  # how long a link is good, and somebody else who opens it is told
TOMBSTONE_US = 30 * DAY_US  # how long a former contact is told
ROTATION_US = 30 * DAY_US  # the age at which an address is replaced
CROWDED_MESSAGES = 16  # in a mailbox: half of what a relay keeps there of one source
NEVER_US = 2**63 - 1
RELEASE_US = 1_795_392_000_000_000  # 2026-11-23: a clock that shows less is wrong

# ---------------------------------------------------------------------------------------
# Errors: the app's mistakes (UsageError), the user's (LinkError), a damaged record, and
# Refused, which is what others sent. A Refused message is counted and forgotten.
# ---------------------------------------------------------------------------------------

REASONS: Mapping[str, str] = {
    "encoding": "not canonical base64url without padding",
    "seal": "not sealed to this mailbox with this context string",
    "padding": "the plaintext has no allowed size, a wrong length, or something in its padding",
    "jws": "not three parts with the one header (a hello has a fourth)",
    "payload": "not JSON with the members and forms of its type",
    "unexpected": "a type that has no place in this state or from this side",
    "recipient": "`to` is not the address that this mailbox belongs to",
    "proof": "a hello without the secret of the link",
    "commitment": "a signing key and `r` that do not match the link",
    "reply": "`re` is not the hash of what was sent",
    "sender": "`from` is not the contact's signing key",
    "replay": "a `seq` that is not larger than the last one, or the very bytes again",
    "signature": "not signed by `from`",
    "address": "an address that nobody should write to",
    "channel": "the other end of the channel could not show whose it is",
}


class ConnectoidError(Exception):
    """Is raised, in one of its subclasses, for everything that can go wrong here."""


class UsageError(ConnectoidError):
    """The app asked for what makes no sense now, or for what fits in no message."""


class LinkError(ConnectoidError):
    """A link that cannot be used; its text tells the user what to do."""


class RecordError(ConnectoidError):
    """A saved record that is damaged, or of another version."""


class Refused(ConnectoidError):
    """What came from outside failed a check: `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or REASONS[reason])
        self.reason = reason


# ---------------------------------------------------------------------------------------
# Encoding and validation: from bytes and text to values that the rest may trust. Pure
# functions that return the value or raise Refused. PROTOCOL.md, "Conventions".
# ---------------------------------------------------------------------------------------

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_PUB = re.compile(r"A[g-z0-9_-][A-Za-z0-9_-]{63}[AQgw]")  # 49 bytes that begin with 2 or 3
_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?(?:/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?")
_LOOPBACK = re.compile(r"localhost|127\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}|\[::1\]", re.IGNORECASE)
MAX_PORT = 65_535


def encode_base64url(octets: bytes) -> str:
    """Return RFC 4648 base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


def decode_base64url(text: str) -> bytes:
    """Return what base64url stands for; raise Refused (encoding) for padding, another alphabet or unused bits."""
    if not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        raise Refused("encoding")
    octets = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if encode_base64url(octets) != text:
        raise Refused("encoding")
    return octets


def _decode_text(text: str) -> str:
    try:
        return decode_base64url(text).decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("encoding", "not UTF-8") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _parse_json(octets: bytes) -> object:
    try:
        value: object = json.loads(octets.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except (ValueError, RecursionError):
        raise Refused("payload", "not JSON in UTF-8") from None
    return value


# ---------------------------------------------------------------------------------------
# Mailboxes, addresses, invitations, links. Here `address` is always the very string.
# PROTOCOL.md, "Addresses and links".
# ---------------------------------------------------------------------------------------


class Mailbox(NamedTuple):
    """A public key at a relay, and what the relay wants to see of whoever asks."""

    pub: str
    url: str
    ext: str | None = None

    def __str__(self) -> str:
        parts = [self.pub, encode_base64url(self.url.encode())]
        return ".".join(parts if self.ext is None else [*parts, encode_base64url(self.ext.encode())])


def format_address(mailboxes: Iterable[Mailbox]) -> str:
    """Return the address of one to three mailboxes as text."""
    return "~".join(map(str, mailboxes))


def parse_address(address: str, *, allow_http: bool = False) -> tuple[Mailbox, ...]:
    """Return the mailboxes of an address; raise Refused (address), also for what a client must not ask.

    Whether the keys are points of the curve is up to Suite.check.
    """
    texts = address.split("~")
    if len(texts) > MAX_MAILBOXES:
        raise Refused("address", f"it has more than {MAX_MAILBOXES} mailboxes")
    try:
        mailboxes = tuple(_parse_mailbox(text, allow_http) for text in texts)
    except Refused as error:
        raise Refused("address", str(error) if error.reason == "address" else "a part of it is not readable") from None
    if len({mailbox.pub for mailbox in mailboxes}) < len(mailboxes):
        raise Refused("address", "a key occurs twice in it")
    return mailboxes


def _parse_mailbox(text: str, allow_http: bool) -> Mailbox:
    match text.split("."):
        case [pub, url] if url:
            ext = None
        case [pub, url, ext] if ext:
            pass
        case _:
            raise Refused("address", "it is cut off, or has a part too many")
    if not _PUB.fullmatch(pub):
        raise Refused("address", "its key is damaged")
    url, ext = _decode_text(url), None if ext is None else _decode_text(ext)
    check_url(url, allow_http=allow_http)
    if ext is not None and len(ext) > MAX_EXT_CHARS:
        raise Refused("address", f"its ext is longer than {MAX_EXT_CHARS} characters")
    return Mailbox(pub, url, ext)


def check_url(url: str, *, allow_http: bool = False) -> None:
    """Raise Refused (address) for a URL that is no relay's: only https, no user, query or fragment."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if match is None or not 1 <= int(match[3] or 1) <= MAX_PORT:
        raise Refused("address", "its relay has no URL like https://relay.example.com/")
    if match[1] == "http" and not allow_http and not _LOOPBACK.fullmatch(match[2]):
        raise Refused("address", "http is for a relay on this machine, elsewhere it is https")


@dataclass(frozen=True)
class Invitation:
    """What a link carries: where to write, the secret S that proves the link, and h."""

    text: str = field(repr=False)
    address: str
    secret: bytes = field(repr=False)
    commitment: bytes


def parse_invitation(text: str, *, allow_http: bool = False) -> Invitation:
    """Return what an invitation holds; raise LinkError with a sentence for the user."""
    *first, last = text.split("~")
    pub, url, ext, fourth = (*last.split(".", 3), "", "", "")[:4]
    address = "~".join([*first, ".".join([pub, url, ext] if ext else [pub, url])])
    try:
        parse_address(address, allow_http=allow_http)
    except Refused as error:
        raise LinkError(f"This link is damaged: {error}. Copy it again, whole, or ask for a new one.") from None
    if not fourth:
        raise LinkError("This link has no secret; ask for a new one.")
    try:
        both = decode_base64url(fourth)
    except Refused:
        both = b""
    if len(both) != SECRET_BYTES + hashlib.sha256().digest_size:
        raise LinkError("This link is cut off or damaged. Copy it again, whole.")
    return Invitation(text, address, both[:SECRET_BYTES], both[SECRET_BYTES:])


def make_link(app_url: str, invitation: str) -> str:
    """Return the link to an app: the invitation is in the fragment, which no server gets to see."""
    return f"{app_url.partition('#')[0]}#connectoid={invitation}"


def read_link(link: str, *, allow_http: bool = False) -> Invitation:
    """Return the invitation in a link, in its fragment or its query, or bare; raise LinkError."""
    address, _, fragment = link.strip().partition("#")
    for part in (fragment, address.partition("?")[2]):
        for parameter in part.split("&"):
            name, _, value = parameter.partition("=")
            if name == "connectoid":
                return parse_invitation(urllib.parse.unquote(value), allow_http=allow_http)
    if fragment or not re.fullmatch(r"[A-Za-z0-9._~-]+", address) or "." not in address or not _PUB.match(address):
        raise LinkError("There is no invitation in this link: connectoid=... is missing. Copy it again, whole.")
    return parse_invitation(address, allow_http=allow_http)


# ---------------------------------------------------------------------------------------
# Cryptography. All context strings, the suite that the state machine is handed, and the
# one for real. A private key is a text that only its suite understands.
# ---------------------------------------------------------------------------------------

CONTEXTS = {
    "question": b"connectoid/1 question",
    "message": b"connectoid/1 message",
    "channel": b"connectoid/1 channel",
    "emoji": b"connectoid/1 emoji",
    "store": b"connectoid/1 store",
}


class Suite(Protocol):
    """What the state machine needs of cryptography; PROTOCOL.md, "Keys"."""

    def random(self, count: int) -> bytes:
        """Return so many random bytes."""

    def make_key(self) -> tuple[str, str]:
        """Return a new private key, and its public key in the form of `pub`."""

    def check(self, pub: str) -> None:
        """Raise Refused (address) if a public key is no point of the curve."""

    def seal(self, pub: str, info: bytes, plaintext: bytes) -> bytes:
        """Return enc || ciphertext; raise Refused (address) if there is no such key."""

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Return the plaintext; raise Refused (seal)."""

    def sign(self, key: str, octets: bytes) -> bytes:
        """Return r || s of ES384."""

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Raise Refused (signature) unless it is that of the key's owner."""


def check_address(suite: Suite, address: str, *, allow_http: bool = False) -> tuple[Mailbox, ...]:
    """Return the mailboxes of an address to write to; raise Refused (address) if not all can be written to."""
    if len(address) > MAX_ADDRESS_CHARS:
        raise Refused("address", f"it has more than {MAX_ADDRESS_CHARS} characters")
    mailboxes = parse_address(address, allow_http=allow_http)
    for mailbox in mailboxes:
        suite.check(mailbox.pub)
    return mailboxes


MAX_REMEMBERED_KEYS = 256  # to read a key costs about as much as to use it
SCALAR_BYTES = 48


class SystemSuite:
    """P-384 with HPKE (RFC 9180) and ES384 (RFC 7518, section 3.4), by the package cryptography."""

    _hpke = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)
    _ecdsa = ec.ECDSA(hashes.SHA384())

    def __init__(self) -> None:
        self._private_keys: dict[str, ec.EllipticCurvePrivateKey] = {}

    def random(self, count: int) -> bytes:
        """Return so many random bytes of the system."""
        return secrets.token_bytes(count)

    def make_key(self) -> tuple[str, str]:
        """Return the scalar in base64url, and the public key."""
        key = ec.generate_private_key(ec.SECP384R1())
        scalar = key.private_numbers().private_value.to_bytes(SCALAR_BYTES, "big")
        point = key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self._remember(encode_base64url(scalar), key)
        return encode_base64url(scalar), encode_base64url(point)

    def check(self, pub: str) -> None:
        """Raise Refused (address) if a public key is no point of the curve."""
        self._public(pub)

    def seal(self, pub: str, info: bytes, plaintext: bytes) -> bytes:
        """Return enc || ciphertext; raise Refused (address) if there is no such key."""
        return self._hpke.encrypt(plaintext, self._public(pub), info=info)

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Return the plaintext; raise Refused (seal)."""
        try:
            return self._hpke.decrypt(sealed, self._private(key), info=info)
        except (InvalidTag, ValueError):
            raise Refused("seal") from None

    def sign(self, key: str, octets: bytes) -> bytes:
        """Return r || s of ES384."""
        r, s = utils.decode_dss_signature(self._private(key).sign(octets, self._ecdsa))
        return r.to_bytes(SCALAR_BYTES, "big") + s.to_bytes(SCALAR_BYTES, "big")

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Raise Refused (signature) unless it is that of the key's owner."""
        r, s = (int.from_bytes(half, "big") for half in (signature[:SCALAR_BYTES], signature[SCALAR_BYTES:]))
        try:
            if len(signature) != 2 * SCALAR_BYTES:
                raise Refused("signature")
            self._public(pub).verify(utils.encode_dss_signature(r, s), octets, self._ecdsa)
        except (InvalidSignature, Refused):
            raise Refused("signature") from None

    @staticmethod
    @functools.lru_cache(MAX_REMEMBERED_KEYS)
    def _public(pub: str) -> ec.EllipticCurvePublicKey:
        try:
            return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), decode_base64url(pub))
        except (ValueError, Refused):
            raise Refused("address", "its key is no point of the curve") from None

    def _private(self, key: str) -> ec.EllipticCurvePrivateKey:
        return self._private_keys.get(key) or self._remember(key, ec.derive_private_key(
            int.from_bytes(decode_base64url(key), "big"), ec.SECP384R1()))

    def _remember(self, key: str, private_key: ec.EllipticCurvePrivateKey) -> ec.EllipticCurvePrivateKey:
        if len(self._private_keys) >= MAX_REMEMBERED_KEYS:
            self._private_keys.clear()
        self._private_keys[key] = private_key
        return private_key


def hash_commitment(signer: str, r: str) -> bytes:
    """Return h, which a link holds: it pins the inviter's signing key and commits her to R."""
    return hashlib.sha256(decode_base64url(signer) + decode_base64url(r)).digest()


def prove(secret: bytes, jws: str) -> str:
    """Return a hello's fourth part, which proves that its sender has the link."""
    return encode_base64url(hmac.digest(secret, jws.encode("ascii"), "sha256"))


def hash_link(invitation: str) -> str:
    """Return what stays of an invitation: enough to know a link that was opened before."""
    return encode_base64url(hashlib.sha256(invitation.encode("ascii", "replace")).digest())


def hash_jws(jws: str) -> str:
    """Return the hash of a message in base64url: of its JWS in three parts, a hello's proof left out."""
    return encode_base64url(hashlib.sha256(".".join(jws.split(".")[:3]).encode("ascii")).digest())


# ---------------------------------------------------------------------------------------
# Messages: the envelope, from the inside out, and the members of each type.
# PROTOCOL.md, "Messages between apps".
# ---------------------------------------------------------------------------------------

HEADER = encode_base64url(b'{"alg":"ES384","typ":"connectoid"}')
_HASH = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")  # 32 bytes
_RANDOM = re.compile(r"[A-Za-z0-9_-]{21}[AQgw]")  # 16 bytes


def _matches(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_sdp(kind: str) -> Callable[[object], bool]:
    return lambda value: (isinstance(value, dict) and value.get("type") == kind and isinstance(value.get("sdp"), str))


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


_ANY_RE = _or_none(_matches(_HASH))
_ALWAYS: Mapping[str, Callable[[object], bool]] = {
    "to": lambda value: isinstance(value, str),
    "from": _matches(_PUB),
    "seq": lambda value: type(value) is int and 0 < value < MAX_SEQ,
    "connectoid": lambda value: isinstance(value, str),
}
# The form of the members of each type. What is not here is ignored.
MEMBERS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "hello": {"re": lambda value: value is None, "nonce": _matches(_RANDOM), "sdpOffer": _is_sdp("offer")},
    "welcome": {"re": _matches(_HASH), "r": _matches(_RANDOM), "sdpAnswer": _or_none(_is_sdp("answer"))},
    "used": {"re": _matches(_HASH), "r": _matches(_RANDOM)},
    "ready": {"re": _matches(_HASH), "sdpOffer": _or_none(_is_sdp("offer"))},
    "offer": {"re": _ANY_RE, "sdpOffer": _is_sdp("offer")},
    "answer": {"re": _matches(_HASH), "sdpAnswer": _is_sdp("answer")},
    "call": {"re": _ANY_RE},
    "unshare": {"re": _ANY_RE},
}
UNNUMBERED = ("hello", "welcome", "used")  # known by their hash; all others by seq


class Message(NamedTuple):
    """A message whose form is right; who sent it is only claimed until check_signature."""

    jws: str
    proof: str | None
    payload: Mapping[str, Any]

    @property
    def type(self) -> str:
        """Return one of MEMBERS."""
        return str(self.payload["type"])

    @property
    def hash(self) -> str:
        """Return what an `re` to this message says."""
        return hash_jws(self.jws)

    @property
    def sdp(self) -> Mapping[str, str] | None:
        """Return the offer or answer in it, without members that WebRTC does not know."""
        sdp = self.payload.get("sdpOffer" if "sdpOffer" in MEMBERS[self.type] else "sdpAnswer")
        return None if sdp is None else {"type": sdp["type"], "sdp": sdp["sdp"]}

    def check_signature(self, suite: Suite) -> None:
        """Raise Refused (signature) unless `from` signed it."""
        signed, _, signature = self.jws.rpartition(".")
        suite.verify(self.payload["from"], decode_base64url(signature), signed.encode("ascii"))


def sign_jws(suite: Suite, key: str, payload: Mapping[str, Any]) -> str:
    """Return a compact JWS (RFC 7515) over a payload as JSON."""
    octets = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    signed = f"{HEADER}.{encode_base64url(octets)}"
    return f"{signed}.{encode_base64url(suite.sign(key, signed.encode('ascii')))}"


def read_jws(text: str) -> Message:
    """Return the message in a JWS; raise Refused (jws, encoding, payload). The signature is not yet checked."""
    match text.split("."):
        case [header, body, signature] if header == HEADER:
            proof = None
        case [header, body, signature, proof] if header == HEADER:
            pass
        case _:
            raise Refused("jws")
    payload = _parse_json(decode_base64url(body))
    decode_base64url(signature)
    if not isinstance(payload, dict) or payload.get("type") not in tuple(MEMBERS):
        raise Refused("payload", "no known type")
    for name, fits in {**_ALWAYS, **MEMBERS[payload["type"]]}.items():
        if not fits(payload.get(name)) or (name == "re" and name not in payload):
            raise Refused("payload", f"{payload['type']} with a wrong {name}")
    if (proof is not None) != (payload["type"] == "hello"):
        raise Refused("jws", "a proof is the fourth part of a hello, and of nothing else")
    return Message(f"{header}.{body}.{signature}", proof, payload)


def seal_message(suite: Suite, pub: str, text: str) -> str:
    """Return `data` for a mailbox; raise UsageError if the text fits in no message."""
    octets = text.encode("ascii")
    needed = LENGTH_BYTES + len(octets)
    size = next((size for size in SIZES if size >= needed), None)
    if size is None:
        raise UsageError(f"A message of {needed} bytes is over {SIZES[-1]}: use fewer relays or a shorter SDP.")
    plaintext = (len(octets).to_bytes(LENGTH_BYTES, "big") + octets).ljust(size, b"\0")
    return encode_base64url(suite.seal(pub, CONTEXTS["message"], plaintext))


def open_message(suite: Suite, key: str, sealed: str) -> str:
    """Return the text in `data`; raise Refused (encoding, seal, padding)."""
    plaintext = suite.open(key, CONTEXTS["message"], decode_base64url(sealed))
    end = LENGTH_BYTES + int.from_bytes(plaintext[:LENGTH_BYTES], "big")
    if len(plaintext) not in SIZES or end > len(plaintext) or plaintext[end:].strip(b"\0"):
        raise Refused("padding")
    try:
        return plaintext[LENGTH_BYTES:end].decode("ascii")
    except UnicodeDecodeError:
        raise Refused("jws", "not ASCII") from None


# ---------------------------------------------------------------------------------------
# The comparison string: what two people read to each other to be sure that nobody stands
# between them. PROTOCOL.md, "Comparison string".
# ---------------------------------------------------------------------------------------

# Those of the Matrix specification, "SAS method: emoji", in its order.
EMOJI: Sequence[tuple[str, str]] = tuple(re.findall(r"([^ |]+) ([^|]+)", (
    "🐶 Dog|🐱 Cat|🦁 Lion|🐎 Horse|🦄 Unicorn|🐷 Pig|🐘 Elephant|🐰 Rabbit|🐼 Panda|🐓 Rooster|"
    "🐧 Penguin|🐢 Turtle|🐟 Fish|🐙 Octopus|🦋 Butterfly|🌷 Flower|🌳 Tree|🌵 Cactus|🍄 Mushroom|"
    "🌏 Globe|🌙 Moon|☁️ Cloud|🔥 Fire|🍌 Banana|🍎 Apple|🍓 Strawberry|🌽 Corn|🍕 Pizza|🎂 Cake|"
    "❤️ Heart|😀 Smiley|🤖 Robot|🎩 Hat|👓 Glasses|🔧 Spanner|🎅 Santa|👍 Thumbs Up|☂️ Umbrella|"
    "⌛ Hourglass|⏰ Clock|🎁 Gift|💡 Light Bulb|📕 Book|✏️ Pencil|📎 Paperclip|✂️ Scissors|🔒 Lock|"
    "🔑 Key|🔨 Hammer|☎️ Telephone|🏁 Flag|🚂 Train|🚲 Bicycle|✈️ Aeroplane|🚀 Rocket|🏆 Trophy|"
    "⚽ Ball|🎸 Guitar|🎺 Trumpet|🔔 Bell|⚓ Anchor|🎧 Headphones|📁 Folder|📌 Pin"
)))
COMPARED = 7  # of 6 bits each


def comparison_string(invitation: str, hello: str, inviter: str, r: str) -> tuple[int, ...]:
    """Return seven indexes of EMOJI for the texts as sent; a hello in three or four parts."""
    texts = (invitation, ".".join(hello.split(".")[:3]), inviter, r)
    digest = hashlib.sha256(b"\0".join([CONTEXTS["emoji"], *(text.encode("ascii") for text in texts)])).digest()
    bits = int.from_bytes(digest, "big") >> (8 * len(digest) - 6 * COMPARED)
    return tuple(bits >> 6 * place & 63 for place in reversed(range(COMPARED)))


# ---------------------------------------------------------------------------------------
# What is kept of a contact, and what a step of its machine asks for.
# ---------------------------------------------------------------------------------------


class Now(NamedTuple):
    """The time, twice: of the wall, in microseconds since 1970; and one that never steps, in seconds."""

    wall_us: int
    monotonic_s: float


@dataclass(frozen=True)
class Own:
    """An address of one's own, with the private keys of its mailboxes in order."""

    address: str
    keys: tuple[str, ...] = field(repr=False)

    @functools.cached_property
    def mailboxes(self) -> tuple[Mailbox, ...]:
        """Return the mailboxes of the address."""
        return parse_address(self.address, allow_http=True)


RECORD_VERSION = 1


@dataclass(frozen=True)
class Kept:
    """Everything of a contact that survives the process: as JSON, `to_json` and `from_json`."""

    role: str  # "inviter" made the link, "opener" opened it
    state: str  # of PAIRING
    name: str
    relays: tuple[tuple[str, str | None], ...]  # URL and ext, for new addresses of one's own
    private_key: str = field(repr=False)  # signs; for the life of the contact
    signer: str  # its public key
    expires_us: int  # of the invitation, or of the tombstone
    invitation: str = field(repr=False)
    link_hash: str = ""  # of the invitation, which goes sooner
    hello: str = field(default="", repr=False)  # the opener's, with its proof
    hello_hash: str = ""  # of the one that counts
    welcome: str = field(default="", repr=False)  # the inviter's
    welcome_hash: str = ""
    r: str = field(default="", repr=False)  # the inviter's
    invited: Own | None = None  # the address in the link
    current: Own | None = None
    pending: Own | None = None  # announced, and nothing came there yet
    former: Own | None = None
    rotated_us: int = 0
    contact: str = ""  # the other's signing key
    contact_address: str = ""
    comparison: tuple[int, ...] = ()
    verified: bool = False  # the user has compared: true for this pair of signing keys
    seq: int = 0  # the last that was sent
    seen_seq: int = 0  # the last that was accepted
    used_to: tuple[str, ...] = ()  # the hashes of other hellos that were answered, one for each reply
    why: str = ""  # it ended: a key of EVENTS

    def to_json(self) -> str:
        """Return the record as text; it holds private keys."""
        return json.dumps({"version": RECORD_VERSION, **vars(self)}, ensure_ascii=False, default=lambda own: {
            "address": own.address, "keys": own.keys})  # not asdict: a deep copy costs as much as opening a message

    def _check(self) -> None:
        """Raise ValueError or Refused if a member has not the type, or not a value, that it can have."""
        if self.role not in NUMBERED_FOR or self.state not in {state for state, _ in PAIRING} | {"ended"}:
            raise ValueError
        for name, kind in self.__annotations__.items():
            if kind in ("str", "int", "bool") and type(getattr(self, name)).__name__ != kind:
                raise ValueError(name)
        for own in (self.invited, self.current, self.pending, self.former):
            if own and len(own.mailboxes) != len(own.keys):
                raise ValueError

    @classmethod
    def from_json(cls, text: str) -> Kept:
        """Return the record that a text holds; raise RecordError."""
        try:
            members = json.loads(text)
            if members.pop("version") != RECORD_VERSION:
                raise RecordError("A saved contact is of another version of Connectoid.")
            members["relays"] = tuple((url, ext) for url, ext in members["relays"])
            for name in ("comparison", "used_to"):
                members[name] = tuple(members[name])
            for name in ("invited", "current", "pending", "former"):
                own = members[name]
                members[name] = None if own is None else Own(own["address"], tuple(own["keys"]))
            kept = cls(**members)
            kept._check()
            return kept
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Refused):
            raise RecordError("A saved contact is damaged.") from None


class Save(NamedTuple):
    """Write the record down, durably, before anything that follows; if that fails, drop the Contact."""

    kept: Kept


class Forget(NamedTuple):
    """Delete the record: nothing is left to do for it."""


class Send(NamedTuple):
    """Send `data` to a mailbox."""

    mailbox: Mailbox
    data: str


class Gather(NamedTuple):
    """Make a peer connection in place of the former one, and an offer (or the answer to this offer): `gathered`."""

    ask: int
    offer: Mapping[str, str] | None


class Join(NamedTuple):
    """Give the answer to the peer connection."""

    ask: int
    answer: Mapping[str, str]


class Write(NamedTuple):
    """Send one binary message on the data channel."""

    ask: int
    octets: bytes


class Close(NamedTuple):
    """Close the peer connection, if there is one."""

    ask: int


class Tell(NamedTuple):
    """Tell the app: a key of EVENTS."""

    event: str


Effect: TypeAlias = Save | Forget | Send | Gather | Join | Write | Close | Tell

EVENTS: Mapping[str, str] = {
    "paired": "The two know each other now; the comparison string is there.",
    "connected": "The channel is open, and the other end has shown whose it is.",
    "disconnected": "The channel is closed.",
    "opened_twice": "Somebody else opened this link too. Compare the emoji by voice before you trust this contact.",
    "used": "This link was used by somebody else, or withdrawn; ask for a new one.",
    "expired": "Nobody answered for as long as the link was good; share again.",
    "unshared": "The other has ended the sharing.",
    "unanswered": "Not answered yet; tried again from time to time.",
    "unreachable": "Both answered, but their networks do not connect: they may need a TURN server.",
}


@dataclass(frozen=True)
class Poll:
    """A mailbox to check: `at` goes into the check, the key opens its question and its messages."""

    mailbox: Mailbox
    key: str = field(repr=False)
    at: int


# ---------------------------------------------------------------------------------------
# The states. A rule says which method does what an event asks for in a state, and where
# that may lead. What has no rule is no event of that state: a message is refused, what
# WebRTC says too late is ignored. PROTOCOL.md, "States", is drawn from here.
# ---------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """In a state, an event: the method `_does`, and the states that may follow."""

    state: str
    event: str
    does: str
    then: tuple[str, ...]


def _table(*rules: tuple[str, str, str, str]) -> Mapping[tuple[str, str], Rule]:
    """Return the rules by state and event; `=` among what may follow is the state itself."""
    return {(state, event): Rule(state, event, does, tuple(dict.fromkeys(then.replace("=", state).split())))
            for states, event, does, then in rules for state in states.split()}


# What is known of the other. `message` is any numbered message of the contact but `unshare`.
PAIRING = _table(
    ("invited", "hello", "bind", "welcomed"),
    ("welcomed paired", "hello", "greet", "="),
    ("welcomed", "message", "confirm", "paired"),
    ("opened", "welcome", "accept", "ready"),
    ("opened", "used", "end_used", "ended"),
    ("ready", "message", "confirm", "paired"),
    ("welcomed ready", "proven", "confirm", "paired"),
    ("paired", "message", "go_on", "paired"),
    ("invited welcomed opened ready paired", "leave", "withdraw", "unshared"),
    ("welcomed ready paired", "unshare", "end_unshared", "ended"),
    ("invited opened", "expire", "end_expired", "ended"),
    ("welcomed ready", "expire", "part_expired", "unshared"),  # the other may know it as paired: tell
    ("unshared", "hello", "refuse", "unshared"),
    ("unshared", "welcome", "part_late", "unshared"),
    ("unshared", "message", "part", "unshared"),
    ("unshared", "unshare", "vanish", "ended"),
    ("unshared", "expire", "vanish", "ended"),
)
# What is going on to connect: nothing of it outlives the process.
CONNECTING = _table(
    ("apart", "begin", "begin", "gathering waiting apart"),
    ("apart gathering waiting joining proving connected", "offer", "take_offer", "gathering"),
    ("apart gathering waiting joining proving connected", "stale", "call", "waiting"),
    ("apart joining proving", "call", "offer", "gathering"),
    ("waiting connected", "call", "offer_unless_crossed", "gathering ="),
    ("apart waiting", "welcome", "offer", "gathering"),
    ("gathering", "gathered", "send_sdp", "waiting joining apart"),
    ("gathering", "late", "send_sdp", "waiting apart"),
    ("waiting joining proving", "late", "again", "gathering waiting = apart"),
    ("waiting", "answer", "join", "joining"),
    ("joining", "channel", "challenge", "proving"),
    ("proving", "octets", "prove", "proving connected waiting"),
    ("proving", "closed", "await_again", "waiting"),
    ("connected", "closed", "lose", "apart"),
    ("apart gathering waiting joining proving connected", "stop", "stop", "apart"),
)
LASTING = ("opened", "ready")  # the opener in these states wants to connect, whether the app does or not
NUMBERED_FOR = {"inviter": ("ready", "offer", "unshare"), "opener": ("answer", "call", "unshare")}
RESTLESS = ("gathering", "waiting", "joining", "proving")


@dataclass(frozen=True)
class Attempt:
    """One attempt to connect, for one peer connection."""

    state: str = "apart"
    since_s: float = -math.inf
    late_s: float = math.inf  # when the state has lasted too long
    ask: int = 0
    cause: str | None = None  # the hash of the message that is being answered
    offer: str = ""  # the hash of the message with the offer
    answer: str = ""
    challenge: bytes = field(default=b"", repr=False)
    replied: bool = False  # to the other's challenge


class Found(NamedTuple):
    """A message from a mailbox: to which address it came, and whether since the check before."""

    message: Message
    own: Own
    fresh: bool


# ---------------------------------------------------------------------------------------
# The machine of one contact.
# ---------------------------------------------------------------------------------------

P = ParamSpec("P")
Step: TypeAlias = Callable[Concatenate["Contact", P], None]


def _step(work: Step[P]) -> Callable[Concatenate[Contact, Now, P], list[Effect]]:
    """Make a method of an event: the time comes first, and what is to be done is returned, Save before all."""

    @functools.wraps(work)
    def run(self: Contact, now: Now, /, *args: P.args, **kwargs: P.kwargs) -> list[Effect]:
        before = self.kept, self._attempt
        self._now, self._effects = now, []
        try:
            work(self, *args, **kwargs)
        except UsageError:
            self.kept, self._attempt = before
            raise
        saves: list[Effect] = [] if self.kept is before[0] or self._gone else [Save(self.kept)]
        return saves + self._effects

    return run


class Contact:
    """The machine of one contact: events and the time in, effects out. It never raises but UsageError.

    `kept` is what it has of the other, `attempt` the state of CONNECTING, `dropped` counts refused messages by reason.
    """

    def __init__(self, suite: Suite, kept: Kept, *, allow_http: bool = False) -> None:
        self.kept = kept
        self.dropped: collections.Counter[str] = collections.Counter()
        self._suite, self._allow_http = suite, allow_http
        self._attempt = Attempt()
        self._now, self._effects = Now(0, -math.inf), list[Effect]()
        self._gone = False
        self._wanted = False
        self._active_until_s = self._fast_until_s = self._begin_s = -math.inf
        self._repeated_s: dict[str, float] = {}  # when a type was last sent as a reply that may be asked for often
        self._asks: list[Found] = []  # numbered messages of a round
        self._failed = 0  # attempts in a row in which both answered, and no channel came
        self._ats: dict[str, int] = {}  # cursors, by mailbox
        self._read_s: dict[str, float] = {}  # when a mailbox was last read to its end
        self._from_zero_s: dict[str, float] = {}
        self._asked_zero: set[str] = set()  # mailboxes whose check under way is from 0
        self._held: collections.Counter[str] = collections.Counter()  # messages in a mailbox, as far as is known
        self._seen: dict[bytes, None] = {}

    # -- Beginnings --------------------------------------------------------------------

    @classmethod
    def invite(cls, suite: Suite, now: Now, name: str, relays: Iterable[tuple[str, str | None]], *,
               lifetime_us: int = INVITATION_US, allow_http: bool = False) -> tuple[Contact, list[Effect]]:
        """Return a new contact with `kept.invitation` for a link, and what to do; raise UsageError for bad relays."""
        relays = tuple(relays)
        invited = _make_own(suite, relays, allow_http)
        private_key, signer = suite.make_key()
        r = encode_base64url(suite.random(SECRET_BYTES))
        fourth = encode_base64url(suite.random(SECRET_BYTES) + hash_commitment(signer, r))
        invitation = f"{invited.address}{'.' if relays[-1][1] is not None else '..'}{fourth}"
        kept = Kept("inviter", "invited", name, relays, private_key, signer, now.wall_us + lifetime_us, invitation,
                    link_hash=hash_link(invitation), r=r, invited=invited)
        contact = cls(suite, kept, allow_http=allow_http)
        contact._fast_until_s = now.monotonic_s + POLL_FAST_FOR_S
        contact._note_new(invited, now)
        return contact, [Save(kept)]

    @classmethod
    def open(cls, suite: Suite, now: Now, name: str, invitation: Invitation, *,
             relays: Iterable[tuple[str, str | None]] = (), allow_http: bool = False) -> tuple[Contact, list[Effect]]:
        """Return a new contact for somebody's invitation, and what to do; raise LinkError, UsageError.

        Nothing is sent before the user has confirmed, so call this after that. Without relays
        of one's own those of the link are used.
        """
        try:
            mailboxes = check_address(suite, invitation.address, allow_http=allow_http)
        except Refused as error:
            raise LinkError(f"This link is damaged: {error}. Copy it again, whole.") from None
        relays = tuple(relays) or tuple((mailbox.url, mailbox.ext) for mailbox in mailboxes)
        private_key, signer = suite.make_key()
        kept = Kept("opener", "opened", name, relays, private_key, signer, now.wall_us + INVITATION_US,
                    invitation.text, link_hash=hash_link(invitation.text), current=_make_own(suite, relays, allow_http),
                    contact_address=invitation.address)
        contact = cls(suite, kept, allow_http=allow_http)
        return contact, [Save(kept), *contact.connect(now)]

    # -- Events: what the app wants, what the time does ----------------------------------

    @_step
    def connect(self) -> None:
        """Want a connection."""
        self._wanted, self._failed = True, 0
        self._active_until_s = self._now.monotonic_s + ACTIVE_S
        self._turn("begin")

    @_step
    def disconnect(self) -> None:
        """Want no connection: close what there is."""
        self._wanted, self._active_until_s = False, -math.inf
        self._turn("stop")

    @_step
    def tick(self) -> None:
        """Let time go by: at the start, and again at `next_tick_s`."""
        if self.kept.expires_us < RELEASE_US <= self._now.wall_us:
            self._keep(expires_us=self._now.wall_us + INVITATION_US)  # it was reckoned by a clock that was not set
        if self.kept.expires_us <= self._now.wall_us < MAX_SEQ // 2:
            self._expire()
        if self.kept.state == "welcomed" and not self.kept.welcome and self._attempt.state == "apart":
            self._send_welcome(None)  # the process ended before it could
        if self._now.monotonic_s >= self._attempt.late_s:
            self._turn("late")
        elif self._wants() and self._now.monotonic_s >= self._begin_s:
            self._turn("begin")

    @_step
    def unshare(self) -> None:
        """End the sharing: name and connection go at once, the other is told for 30 days."""
        if (self.kept.state, "leave") not in PAIRING:
            raise UsageError("The sharing is ended already.")
        self._turn("stop")
        self._pair("leave")

    @_step
    def verify(self, *, same: bool = True) -> None:
        """Mark that the user has compared the string with the other by voice; raise UsageError before there is one."""
        if not self.kept.comparison:
            raise UsageError("There is nothing to compare yet: the other has not answered.")
        self._keep(verified=same)

    @_step
    def move(self, relays: Iterable[tuple[str, str | None]]) -> None:
        """Use other relays from now on, and tell the contact; raise UsageError for bad ones."""
        relays = tuple(relays)
        if self.kept.state not in ("ready", "paired"):
            raise UsageError("Share again: a link holds the relays that it was made with.")
        self._rotate(relays)
        self._wanted, self._active_until_s = True, self._now.monotonic_s + ACTIVE_S
        self._turn("stop")
        self._turn("begin")

    # -- Events: what WebRTC says --------------------------------------------------------

    @_step
    def gathered(self, ask: int, sdp: Mapping[str, str] | None) -> None:
        """Take the offer or answer that a Gather asked for; None if WebRTC failed."""
        if ask == self._attempt.ask:
            self._turn("gathered", sdp)

    @_step
    def channel_opened(self, ask: int) -> None:
        """Begin to prove to each other: the data channel is open."""
        if ask == self._attempt.ask:
            self._turn("channel")

    @_step
    def channel_message(self, ask: int, octets: bytes) -> None:
        """Take a binary message of the channel; after `connected` they are the app's."""
        if ask == self._attempt.ask:
            self._turn("octets", octets)

    @_step
    def channel_closed(self, ask: int) -> None:
        """Notice that the channel is closed."""
        if ask == self._attempt.ask:
            self._turn("closed")

    # -- Events: what relays say ---------------------------------------------------------

    @_step
    def polled(self, boxes: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        """Take what one round of checks found: for each mailbox read to its end, (at, data) in order.

        A mailbox that could not be asked, or not read to its end, is not among them.
        """
        keys = {mailbox.pub: (own, key) for own in self._owns() for mailbox, key in _pairs(own)}
        found: list[Found] = []
        for pub in filter(keys.__contains__, boxes):
            found += self._read_all(*keys[pub], pub, boxes[pub])
        # Those that begin a contact come first; of the others only the newest asks for something.
        for item in sorted(found, key=_order):
            try:
                self._take(item)
            except Refused as refused:
                self.dropped[refused.reason] += 1
        self._act()

    @property
    def mailboxes(self) -> list[Mailbox]:
        """Return the mailboxes that are polled."""
        return [mailbox for own in self._owns() for mailbox in own.mailboxes]

    def polls(self, now: Now, url: str | None = None) -> list[Poll]:
        """Return the checks to make (at one relay), at most `poll_gap_s` apart; call it only to make them."""
        polls = [Poll(mailbox, key, 0 if self._from_zero(now, mailbox.pub) else self._ats[mailbox.pub])
                 for own in self._owns() for mailbox, key in _pairs(own) if url in (None, mailbox.url)]
        self._asked_zero.update(poll.mailbox.pub for poll in polls if self._from_zero(now, poll.mailbox.pub))
        return polls

    def poll_gap_s(self, now: Now) -> float:
        """Return the seconds between two checks; where it is POLL_FAST_S, a check may wait instead."""
        return POLL_FAST_S if now.monotonic_s < self._fast_until_s else POLL_SLOW_S

    @property
    def next_tick_s(self) -> float:
        """Return when `tick` has something to do, by the monotonic clock; at the latest in an hour."""
        begin_s = self._begin_s if self._wants() else math.inf
        return min(self._attempt.late_s, begin_s, self._now.monotonic_s + ZERO_EVERY_S)

    @property
    def attempt(self) -> Attempt:
        """Return what is going on to connect."""
        return self._attempt

    # -- Both tables ---------------------------------------------------------------------

    def _pair(self, event: str, *args: Any) -> None:
        rule = PAIRING.get((self.kept.state, event))
        if rule is None:
            raise Refused("unexpected", f"{event} while {self.kept.state}")
        self._keep(state=_follow(rule, getattr(self, f"_{rule.does}")(*args)))

    def _turn(self, event: str, *args: Any) -> None:
        rule = CONNECTING.get((self._attempt.state, event))
        if rule is not None:
            state = _follow(rule, getattr(self, f"_{rule.does}")(*args))
            if state != self._attempt.state:
                self._set(state=state, since_s=self._now.monotonic_s)
            if state not in RESTLESS:
                self._set(late_s=math.inf)

    def _keep(self, **changes: Any) -> None:
        kept = replace(self.kept, **changes)
        if kept != self.kept:
            self.kept = kept

    def _set(self, **changes: Any) -> None:
        self._attempt = replace(self._attempt, **changes)

    def _wants(self) -> bool:
        wanted = self._wanted or self.kept.state in LASTING
        return wanted and self._attempt.state == "apart" and self.kept.state in ("paired", *LASTING)

    def _late_in(self, seconds: float) -> None:
        self._set(late_s=self._now.monotonic_s + seconds)

    # -- Reading -------------------------------------------------------------------------

    def _read_all(self, own: Own, key: str, pub: str, boxed: Sequence[tuple[int, str]]) -> Iterator[Found]:
        fresh = self._now.monotonic_s - self._read_s.get(pub, -math.inf) <= FRESH_S
        for _, data in boxed:
            try:
                yield Found(self._read(own, key, data), own, fresh)
            except Refused as refused:
                self.dropped[refused.reason] += 1
        if pub in self._asked_zero or pub not in self._ats:
            self._asked_zero.discard(pub)
            self._from_zero_s[pub] = self._now.monotonic_s
            self._held[pub] = 0
        self._held[pub] += len(boxed)
        self._read_s[pub] = self._now.monotonic_s
        self._ats[pub] = max([self._ats.get(pub, 0), *(at for at, _ in boxed)])

    def _read(self, own: Own, key: str, data: str) -> Message:
        digest = hashlib.sha256(data.encode("utf-8", "replace")).digest()
        if digest in self._seen:
            raise Refused("replay")
        self._seen[digest] = None
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        message = read_jws(open_message(self._suite, key, data))
        if message.payload["to"] != own.address:
            raise Refused("recipient")
        return message

    def _from_zero(self, now: Now, pub: str) -> bool:
        return pub not in self._ats or now.monotonic_s - self._from_zero_s[pub] >= ZERO_EVERY_S

    def _take(self, found: Found) -> None:
        """Check who sent a message, and let the pairing have it; what asks for a connection waits for _act."""
        message = found.message
        check = {"hello": self._check_hello, "welcome": self._check_welcome, "used": self._check_welcome}
        check.get(message.type, self._check_numbered)(message, found.own)
        message.check_signature(self._suite)
        check_address(self._suite, message.payload["connectoid"], allow_http=self._allow_http)
        if message.type in check:
            self._pair(message.type, message, found.fresh)
        else:
            self._hear(found)
        self._fast_until_s = self._now.monotonic_s + POLL_FAST_FOR_S
        self._active_until_s = self._now.monotonic_s + ACTIVE_S

    def _check_hello(self, message: Message, own: Own) -> None:
        if self.kept.role != "inviter" or own != self.kept.invited:
            raise Refused("unexpected")
        secret = parse_invitation(self.kept.invitation, allow_http=True).secret
        if not hmac.compare_digest(prove(secret, message.jws), str(message.proof)):
            raise Refused("proof")

    def _check_welcome(self, message: Message, own: Own) -> None:
        if message.hash == self.kept.welcome_hash:
            raise Refused("replay")  # the copy in another mailbox
        if self.kept.role != "opener" or not self.kept.invitation:
            raise Refused("unexpected")
        h = parse_invitation(self.kept.invitation, allow_http=True).commitment
        if not hmac.compare_digest(hash_commitment(message.payload["from"], message.payload["r"]), h):
            raise Refused("commitment")
        if message.payload["re"] != self.kept.hello_hash:
            raise Refused("reply")

    def _check_numbered(self, message: Message, own: Own) -> None:
        if message.type not in NUMBERED_FOR[self.kept.role] or (own == self.kept.invited and message.type != "unshare"):
            raise Refused("unexpected")
        if message.payload["from"] != self.kept.contact:
            raise Refused("sender")
        if message.payload["seq"] <= self.kept.seen_seq:
            raise Refused("replay")

    def _hear(self, found: Found) -> None:
        """Accept a numbered message of the contact: all that it carries is true from now on."""
        payload = found.message.payload
        if self.kept.state == "ended":  # by an earlier message of this round
            raise Refused("unexpected")
        self._keep(seen_seq=payload["seq"], contact_address=payload["connectoid"])
        if found.own == self.kept.pending:
            self._keep(current=found.own, pending=None, former=self.kept.current)
        self._pair("unshare" if found.message.type == "unshare" else "message", found.message)
        self._asks.append(found)

    # -- Pairing: what PAIRING names -----------------------------------------------------

    def _bind(self, message: Message, fresh: bool) -> str:
        """Take the first hello with a valid proof: the only one that ever counts."""
        self._keep(
            hello_hash=message.hash, contact=message.payload["from"], contact_address=message.payload["connectoid"],
            comparison=comparison_string(self.kept.invitation, message.jws, self.kept.signer, self.kept.r))
        self._wanted = True
        self._welcome_for(message, fresh)
        return "welcomed"

    def _welcome_for(self, message: Message, fresh: bool) -> None:
        if fresh:
            self._turn("offer", message)  # the welcome goes out with the answer
        else:
            self._send_welcome(None)

    def _greet(self, message: Message, fresh: bool) -> str:
        """Repeat the welcome to the hello that counts, and refuse all others."""
        if message.hash != self.kept.hello_hash:
            return self._warn(message, fresh)
        if self.kept.welcome and self._may_repeat("welcome"):
            self._post(message.payload["connectoid"], self.kept.welcome)
        elif not self.kept.welcome and self._attempt.state == "apart":
            self._welcome_for(message, fresh)
        return self.kept.state

    def _warn(self, message: Message, fresh: bool) -> str:
        """Tell the app once of another who has the link, and him that it is used."""
        if (fresh or message.hash not in self.kept.used_to) and Tell("opened_twice") not in self._effects:
            self._effects.append(Tell("opened_twice"))
        return self._refuse(message, fresh)

    def _refuse(self, message: Message, fresh: bool) -> str:
        """Say that the link is used: with r, which proves it. What a restart reads again was answered before."""
        again = message.hash in self.kept.used_to and not fresh
        if not again and len(self.kept.used_to) < MAX_USED and self._may_repeat("used"):
            self._keep(used_to=(*self.kept.used_to, message.hash))
            self._send_used(message.payload["connectoid"], message.hash)
        return self.kept.state

    def _accept(self, message: Message, fresh: bool) -> str:
        """Take the welcome that the link vouches for, and answer it with ready."""
        self._effects.append(Tell("paired"))
        inviter, r = message.payload["from"], message.payload["r"]
        self._keep(
            contact=inviter, contact_address=message.payload["connectoid"], welcome_hash=message.hash,
            comparison=comparison_string(self.kept.invitation, self.kept.hello, inviter, r), invitation="", hello="")
        if message.sdp and self._attempt.offer == self.kept.hello_hash and self._attempt.state == "waiting":
            self._turn("answer", message)
            self._say("ready", message.hash)
        else:
            self._turn("welcome", message)
        return "ready"

    def _confirm(self, message: Message | None = None) -> str:
        """Be sure that the other has what it needs to know."""
        if self.kept.role == "inviter":
            self._effects.append(Tell("paired"))
            self._wanted = True
            if self._attempt.state == "joining":
                self._late_in(AGAIN_AFTER_ANSWER_S)
        else:
            self._keep(expires_us=NEVER_US)
        return "paired"

    def _go_on(self, message: Message) -> str:
        return "paired"

    def _withdraw(self) -> str:
        """Leave a tombstone: keys, and where to tell the other."""
        if self.kept.state == "welcomed":
            self._send_used(self.kept.contact_address, self.kept.hello_hash)  # all that an opener can check so far
        elif self.kept.state in ("ready", "paired") or self.kept.hello_hash:
            self._say("unshare", None)
        self._keep(name="", relays=(), hello="", welcome="", comparison=(), verified=False,
                   expires_us=self._now.wall_us + TOMBSTONE_US)
        return "unshared"

    def _part(self, message: Message) -> str:
        """Tell the former contact."""
        if self._may_repeat("unshare"):
            self._say("unshare", message.hash)
        return "unshared"

    def _part_late(self, message: Message, fresh: bool) -> str:
        """Tell an inviter whose welcome comes when the user has thought better of it."""
        self._keep(contact=message.payload["from"], contact_address=message.payload["connectoid"])
        return self._part(message)

    def _vanish(self, message: Message | None = None) -> str:
        self._gone = True
        self._effects.append(Forget())
        return "ended"

    def _end(self, why: str) -> str:
        """Keep nothing but the name, the reason, and which link it was."""
        self._turn("stop")
        kept = self.kept
        self.kept = Kept(kept.role, kept.state, kept.name, (), "", "", NEVER_US, "", link_hash=kept.link_hash, why=why)
        self._effects.append(Tell(why))
        return "ended"

    def _end_used(self, message: Message, fresh: bool) -> str:
        return self._end("used")

    def _end_unshared(self, message: Message) -> str:
        return self._end("unshared")

    def _part_expired(self) -> str:
        self._turn("stop")
        self._effects.append(Tell("expired"))
        return self._withdraw()

    def _end_expired(self) -> str:
        return self._end("expired")

    def _expire(self) -> None:
        if (self.kept.state, "expire") in PAIRING:
            self._pair("expire")
        else:  # the invitation, while the contact stays
            self._keep(invitation="", r="", welcome="", invited=None, expires_us=NEVER_US)

    # -- Connecting: what CONNECTING names -----------------------------------------------

    def _act(self) -> None:
        """Do what the newest of this round's messages asks for."""
        asks, self._asks = self._asks, []
        for message, _, fresh in reversed(asks if self.kept.state == "paired" else []):
            if message.type in ("offer", "ready"):
                if message.sdp or self._attempt.state not in ("joining", "proving", "connected"):
                    self._turn("offer" if message.sdp and fresh else "stale", message)
                return
            if message.type == "call" or message.payload["re"] == self._attempt.offer:
                self._turn(message.type, message)
                return

    def _begin(self) -> str:
        """Call or offer, as the role has it; in `opened` the hello is the offer."""
        if self.kept.state not in ("paired", *LASTING):
            return "apart"
        self._begin_s = self._now.monotonic_s + AGAIN_IDLE_S
        if self.kept.role == "inviter":
            return self._call()
        if not self.kept.hello:
            return self._offer()
        self._post(self.kept.contact_address, self.kept.hello)
        self._late_in(AGAIN_AFTER_OFFER_S)
        return "waiting"

    def _call(self, message: Message | None = None) -> str:
        self._leave()
        self._close()
        self._say("call", message.hash if message else None)
        self._late_in(AGAIN_AFTER_OFFER_S)
        return "waiting"

    def _offer(self, message: Message | None = None) -> str:
        return self._gather(None, message.hash if message else None)

    def _offer_unless_crossed(self, message: Message) -> str:
        crossed = self._now.monotonic_s - self._attempt.since_s < NEW_OFFER_S
        if crossed and message.payload["re"] != self._attempt.offer:
            return self._attempt.state
        return self._offer(message)

    def _take_offer(self, message: Message) -> str:
        return self._gather(message.sdp, message.hash)

    def _gather(self, offer: Mapping[str, str] | None, cause: str | None) -> str:
        self._leave()
        ask = self._attempt.ask + 1
        self._attempt = Attempt("gathering", self._now.monotonic_s, math.inf, ask, cause)
        self._late_in(GATHERED_S)
        self._effects.append(Gather(ask, offer))
        return "gathering"

    def _send_sdp(self, sdp: Mapping[str, str] | None = None) -> str:
        """Send what was gathered, in the message that this state asks for; without it wait for the next attempt."""
        self._late_in(AGAIN_AFTER_OFFER_S)
        if self.kept.state == "welcomed":
            self._send_welcome(sdp)
            return "joining" if sdp else "apart"
        if sdp is None:
            return "waiting"
        if self.kept.role == "opener":
            self._set(offer=self._send_offer(sdp))
            return "waiting"
        self._set(offer=self._attempt.cause, answer=self._say("answer", self._attempt.cause, sdpAnswer=sdp))
        self._late_in(AGAIN_AFTER_ANSWER_S)
        return "joining"

    def _send_offer(self, sdp: Mapping[str, str]) -> str:
        if self.kept.state == "ready":
            return self._say("ready", self.kept.welcome_hash, sdpOffer=sdp)
        if self.kept.state == "paired":
            return self._say("offer", self._attempt.cause, sdpOffer=sdp)
        nonce = encode_base64url(self._suite.random(SECRET_BYTES))
        jws = self._sign("hello", self.kept.contact_address, None, nonce=nonce, sdpOffer=sdp)
        secret = parse_invitation(self.kept.invitation, allow_http=True).secret
        self._keep(hello=f"{jws}.{prove(secret, jws)}", hello_hash=hash_jws(jws))
        self._post(self.kept.contact_address, self.kept.hello)
        return self.kept.hello_hash

    def _join(self, message: Message) -> str:
        self._set(answer=message.hash)
        self._effects.append(Join(self._attempt.ask, message.sdp or {}))
        self._late_in(AGAIN_AFTER_ANSWER_S)
        return "joining"

    def _again(self) -> str:
        """Try once more while there is hope; then seldom."""
        if self.kept.state == "welcomed" and self._now.monotonic_s < self._active_until_s:
            self._late_in(self._active_until_s - self._now.monotonic_s)  # only the opener may try again
            return self._attempt.state
        answered = self._attempt.state != "waiting"
        self._failed += answered
        if self._now.monotonic_s < self._active_until_s and self._failed < MAX_UNREACHABLE:
            return self._begin()
        self._effects.append(Tell("unreachable" if answered else "unanswered"))
        self._close()
        return "apart"

    def _challenge(self) -> str:
        challenge = self._suite.random(CHALLENGE_BYTES)
        pub = parse_address(self.kept.contact_address, allow_http=True)[0].pub
        self._set(challenge=challenge)
        self._late_in(AGAIN_AFTER_ANSWER_S)
        self._effects.append(Write(self._attempt.ask, self._suite.seal(pub, self._channel_info(), challenge)))
        return "proving"

    def _prove(self, octets: bytes) -> str:
        """Open the other's challenge and send it back; then expect one's own."""
        if not self._attempt.replied:
            opened = self._open_challenge(octets)
            if len(opened) == CHALLENGE_BYTES:
                self._set(replied=True)
                self._effects.append(Write(self._attempt.ask, opened))
                return "proving"
        elif hmac.compare_digest(octets, self._attempt.challenge):
            self._effects.append(Tell("connected"))
            self._failed = 0
            if (self.kept.state, "proven") in PAIRING:
                self._pair("proven")
            return "connected"
        self.dropped["channel"] += 1
        self._close()
        return "waiting"

    def _open_challenge(self, octets: bytes) -> bytes:
        for own in self._owns():
            try:
                return self._suite.open(own.keys[0], self._channel_info(), octets)
            except Refused:
                continue
        return b""

    def _channel_info(self) -> bytes:
        hashed = decode_base64url(self._attempt.offer) + decode_base64url(self._attempt.answer)
        return CONTEXTS["channel"] + b"\0" + hashed

    def _await_again(self) -> str:
        return "waiting"

    def _lose(self) -> str:
        self._wanted = False
        self._effects.append(Tell("disconnected"))
        return "apart"

    def _stop(self) -> str:
        if self._attempt.state != "apart":
            self._close()
        return "apart"

    def _leave(self) -> None:
        """Tell the app that the connection it has is given up for another."""
        if self._attempt.state == "connected":
            self._effects.append(Tell("disconnected"))

    def _close(self) -> None:
        """Close the peer connection: an answer to its offer is none any more."""
        self._effects.append(Close(self._attempt.ask))
        self._set(offer="")

    # -- Sending -------------------------------------------------------------------------

    def _owns(self) -> list[Own]:
        kept = self.kept
        return [own for own in (kept.invited, kept.pending, kept.current, kept.former) if own]

    def _may_repeat(self, kind: str) -> bool:
        if self._now.monotonic_s - self._repeated_s.get(kind, -math.inf) < REPEAT_S:
            return False
        self._repeated_s[kind] = self._now.monotonic_s
        return True

    def _rotate(self, relays: tuple[tuple[str, str | None], ...] | None = None) -> None:
        relays = self.kept.relays if relays is None else relays
        pending = _make_own(self._suite, relays, self._allow_http)
        # An address that was announced and not yet used stays polled: the contact may know no other.
        self._keep(pending=pending, former=self.kept.pending or self.kept.former, relays=relays,
                   rotated_us=self._now.wall_us)
        self._note_new(pending, self._now)

    def _is_rotation_due(self) -> bool:
        """Say whether the address is old (also by a clock that was ahead), or fuller than a relay may let it become."""
        age_us = self._now.wall_us - self.kept.rotated_us
        crowded = self.kept.current and any(self._held[mailbox.pub] >= CROWDED_MESSAGES
                                            for mailbox in self.kept.current.mailboxes)
        return bool(crowded) or not 0 <= age_us < ROTATION_US

    def _note_new(self, own: Own, now: Now) -> None:
        """Remember that a mailbox that did not exist before now holds nothing older."""
        self._read_s.update((mailbox.pub, now.monotonic_s) for mailbox in own.mailboxes)

    def _say(self, kind: str, re: str | None, **members: Any) -> str:
        """Send a numbered message to the contact; return its hash."""
        if self.kept.pending is None and self.kept.relays and self._is_rotation_due():
            self._rotate()
        jws = self._sign(kind, self.kept.contact_address, re, **members)
        self._post(self.kept.contact_address, jws)
        return hash_jws(jws)

    def _send_welcome(self, sdp: Mapping[str, str] | None) -> None:
        self._rotate()
        answer = {"sdpAnswer": sdp} if sdp else {}
        jws = self._sign("welcome", self.kept.contact_address, self.kept.hello_hash, r=self.kept.r, **answer)
        self._keep(welcome=jws, welcome_hash=hash_jws(jws))
        self._set(offer=self.kept.hello_hash, answer=self.kept.welcome_hash)
        self._may_repeat("welcome")
        self._post(self.kept.contact_address, jws)

    def _send_used(self, address: str, re: str) -> None:
        self._post(address, self._sign("used", address, re, r=self.kept.r))

    def _sign(self, kind: str, to: str, re: str | None, **members: Any) -> str:
        """Return a new message, with all that is true now."""
        believed_us = self._now.wall_us if self._now.wall_us < MAX_SEQ // 2 else 0
        self._keep(seq=max(believed_us, self.kept.seq + 1))
        announced = self._owns()[0] if kind == "used" else self.kept.pending or self.kept.current or self._owns()[0]
        payload = {"type": kind, "to": to, "from": self.kept.signer, "seq": self.kept.seq, "re": re,
                   "connectoid": announced.address, **members}
        return sign_jws(self._suite, self.kept.private_key, payload)

    def _post(self, address: str, text: str) -> None:
        for mailbox in parse_address(address, allow_http=True):
            self._effects.append(Send(mailbox, seal_message(self._suite, mailbox.pub, text)))
        self._fast_until_s = self._now.monotonic_s + POLL_FAST_FOR_S


def _follow(rule: Rule, state: str) -> str:
    if state not in rule.then:
        raise RuntimeError(f"{rule.state} on {rule.event} cannot lead to {state}")
    return state


def _order(found: Found) -> tuple[bool, int]:
    numbered = found.message.type not in UNNUMBERED
    return numbered, found.message.payload["seq"] if numbered else 0


def _pairs(own: Own) -> Iterable[tuple[Mailbox, str]]:
    return zip(own.mailboxes, own.keys, strict=True)


def _make_own(suite: Suite, relays: Sequence[tuple[str, str | None]], allow_http: bool) -> Own:
    """Return a new address with a key for each relay; raise UsageError for bad relays."""
    keys = [suite.make_key() for _ in relays]
    try:
        address = format_address(Mailbox(pub, url, ext) for (_, pub), (url, ext) in zip(keys, relays, strict=True))
        check_address(suite, address, allow_http=allow_http)
    except (Refused, UnicodeEncodeError) as error:
        raise UsageError(f"These relays make no address: {error}.") from None
    return Own(address, tuple(key for key, _ in keys))


# ---------------------------------------------------------------------------------------
# The store: one SQLite file with a record for each contact, readable by its owner alone.
# ---------------------------------------------------------------------------------------

APPLICATION_ID = 0x436F6E6E  # "Conn": which program a SQLite file belongs to
STORE_VERSION = 1
STORE_BUSY_S = 5.0  # for another process that reads
SCRYPT = {"n": 2**15, "r": 8, "p": 1}  # 32 MiB and about 0.1 s for each guess of a passphrase
EXPORT_MARK = b"connectoid/1 export\n"
SQLITE_MARK = b"SQLite format 3\0"  # what a file begins with; SQLite itself takes some that are shorter for empty ones
SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {STORE_VERSION}",
    "CREATE TABLE protection (salt BLOB NOT NULL, checked BLOB NOT NULL)",
    "CREATE TABLE contacts (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL)",
)
SALT_BYTES, NONCE_BYTES, FILE_KEY_BYTES = 16, 12, 32


class StoreError(ConnectoidError):
    """The store cannot be used; its text says why, and what to do."""


class Store:
    """Keep contacts in a file of mode 0600; with a passphrase they are encrypted (AES-256-GCM under scrypt).

    One process may run contacts (`lock`), others may read. Raises StoreError for a file that is
    damaged, another program's, in use, or not to be opened with this passphrase; it never writes to such a file.
    """

    def __init__(self, path: str | os.PathLike[str], passphrase: str | None = None, *, lock: bool = True) -> None:
        self.path = os.fspath(path)
        self._lock_fd = self._take_lock() if lock and self.path != ":memory:" else None
        try:
            if self.path != ":memory:":
                self._look()
            self._db = sqlite3.connect(self.path, STORE_BUSY_S, isolation_level=None, check_same_thread=False)
            self._cipher = self._prepare(passphrase)
            if self.path != ":memory:":
                os.chmod(self.path, 0o600)
        except (OSError, ValueError, TypeError, sqlite3.Error) as error:  # a damaged file has values of any type
            self.close()
            raise StoreError(f"The store {self.path} cannot be opened: {error}.") from None
        except StoreError:
            self.close()
            raise

    def _take_lock(self) -> int:
        try:
            lock_fd = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            raise StoreError(f"Another program is using {self.path}: end it first.") from None
        except OSError as error:
            raise StoreError(f"The store {self.path} cannot be opened: {error}.") from None
        return lock_fd

    def _look(self) -> None:
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
            mark = file.read(len(SQLITE_MARK))
        if mark not in (b"", SQLITE_MARK):
            raise StoreError(f"{self.path} is not a store of Connectoid; choose another file.")

    def _prepare(self, passphrase: str | None) -> AESGCM | None:
        (application_id,), (version,) = (self._db.execute(f"PRAGMA {name}").fetchone()
                                         for name in ("application_id", "user_version"))
        if (application_id, version) == (0, 0) and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            self._create(passphrase)
        elif application_id != APPLICATION_ID:
            raise StoreError(f"{self.path} is not a store of Connectoid; choose another file.")
        elif version != STORE_VERSION:
            raise StoreError(f"{self.path} is of version {version}; this is version {STORE_VERSION} of Connectoid.")
        self._db.execute("PRAGMA synchronous = EXTRA")
        self._db.execute("PRAGMA secure_delete = ON")
        return self._unlock(passphrase)

    def _create(self, passphrase: str | None) -> None:
        salt = secrets.token_bytes(SALT_BYTES) if passphrase is not None else b""
        check = _encrypt(_cipher(passphrase, salt), b"", b"check") if passphrase is not None else b""
        with self._transaction():
            if self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                return  # another process has made it meanwhile
            for statement in SCHEMA:
                self._db.execute(statement)
            self._db.execute("INSERT INTO protection VALUES (?, ?)", (salt, check))

    def _unlock(self, passphrase: str | None) -> AESGCM | None:
        salt, check = self._db.execute("SELECT salt, checked FROM protection").fetchone()
        if not salt and passphrase is not None:
            raise StoreError(f"{self.path} has no passphrase: export it, and import it into a new store with one.")
        if not salt:
            return None
        if passphrase is None:
            raise StoreError(f"{self.path} has a passphrase.")
        cipher = _cipher(passphrase, salt)
        try:
            _decrypt(cipher, check, b"check")
        except InvalidTag:
            raise StoreError(f"This is not the passphrase of {self.path}.") from None
        return cipher

    def load(self) -> dict[int, Kept]:
        """Return the records by their ids; raise StoreError, RecordError."""
        try:
            rows = self._db.execute("SELECT id, record FROM contacts ORDER BY id").fetchall()
            return {number: Kept.from_json(self._open(number, record)) for number, record in rows}
        except (sqlite3.Error, InvalidTag, ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"The store {self.path} is damaged: {error or 'wrong tag'}.") from None

    def add(self, kept: Kept) -> int:
        """Keep a new record durably and return its id."""
        with self._transaction():
            number = int(self._db.execute("INSERT INTO contacts (record) VALUES (x'')").lastrowid or 0)
            self._db.execute("UPDATE contacts SET record = ? WHERE id = ?", (self._seal(number, kept), number))
        return number

    def save(self, number: int, kept: Kept) -> None:
        """Replace a record durably."""
        with self._transaction():
            self._db.execute("UPDATE contacts SET record = ? WHERE id = ?", (self._seal(number, kept), number))

    def delete(self, number: int) -> None:
        """Delete a record, and what the file still had of it."""
        with self._transaction():
            self._db.execute("DELETE FROM contacts WHERE id = ?", (number,))

    def export(self, passphrase: str) -> bytes:
        """Return all records under a passphrase, for another device; let only one of the two run from then on."""
        salt = secrets.token_bytes(SALT_BYTES)
        records = json.dumps([kept.to_json() for kept in self.load().values()]).encode("utf-8")
        return EXPORT_MARK + salt + _encrypt(_cipher(passphrase, salt), records, b"export")

    def import_(self, exported: bytes, passphrase: str) -> int:
        """Add the records of an export that are not here yet; return how many, raise StoreError, RecordError."""
        mark, salt, sealed = (exported[:len(EXPORT_MARK)], exported[len(EXPORT_MARK):len(EXPORT_MARK) + SALT_BYTES],
                              exported[len(EXPORT_MARK) + SALT_BYTES:])
        if mark != EXPORT_MARK:
            raise StoreError("This is not an export of Connectoid.")
        try:
            records = json.loads(_decrypt(_cipher(passphrase, salt), sealed, b"export"))
        except (InvalidTag, ValueError):
            raise StoreError("The export is damaged, or this is not its passphrase.") from None
        here = list(self.load().values())
        links, names = {kept.link_hash for kept in here}, {kept.name for kept in here}
        new = [kept for kept in map(Kept.from_json, records) if kept.link_hash not in links]
        for kept in new:
            self.add(replace(kept, name=_free_name(kept.name, names)))
        return len(new)

    def close(self) -> None:
        """Close the file and let others use it. Idempotent."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"The store {self.path} cannot be written: {error}.") from None

    def _seal(self, number: int, kept: Kept) -> bytes:
        record = kept.to_json().encode("utf-8")
        return record if self._cipher is None else _encrypt(self._cipher, record, str(number).encode())

    def _open(self, number: int, record: bytes) -> str:
        opened = record if self._cipher is None else _decrypt(self._cipher, record, str(number).encode())
        return opened.decode("utf-8")


def _free_name(name: str, taken: set[str]) -> str:
    """Return a name, with a number if another contact has it, and take it; tombstones have none."""
    free, number = name, 1
    while name and free in taken:
        number += 1
        free = f"{name} ({number})"
    taken.add(free)
    return free


def _cipher(passphrase: str, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt, FILE_KEY_BYTES, **SCRYPT).derive(passphrase.encode("utf-8")))


def _encrypt(cipher: AESGCM, octets: bytes, place: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, octets, CONTEXTS["store"] + b"\0" + place)


def _decrypt(cipher: AESGCM, sealed: bytes, place: bytes) -> bytes:
    return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], CONTEXTS["store"] + b"\0" + place)


# ---------------------------------------------------------------------------------------
# The client of a relay: HTTP with one connection, and nothing believed. PROTOCOL.md,
# "Operations", "Guards".
# ---------------------------------------------------------------------------------------

REQUEST_TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 1024 * 1024  # 100 messages in 512 KiB, with their JSON
MAX_RETRY_S = 900.0
MAX_QUOTED_CHARS = 200  # of what a relay says, in an error
MAX_ERROR_CHARS = 200  # of what a stranger's server says, in our words
REDIRECTS = range(300, 400)
MAX_BATCH_CHECKS = 256
RECEIVE_LIMIT = 100
MAX_RECEIVES = 16  # of one mailbox in a round: more than a box holds


class RelayError(ConnectoidError):
    """A relay that cannot be reached, refuses, or answers rubbish; `retry_s` is when to ask again, if it said so."""

    def __init__(self, text: str, retry_s: float = 0.0) -> None:
        super().__init__(text)
        self.retry_s = retry_s


class _Timely(io.RawIOBase):
    """Read from a socket up to a moment; the time-out of a socket begins anew with each byte."""

    def __init__(self, sock: socket.socket, until_s: float) -> None:
        self._sock, self._until_s, self._raw = sock, until_s, sock.makefile("rb", buffering=0)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class RelayClient:
    """Ask one relay, over one connection that is kept; for one thread at a time but for `interrupt`."""

    def __init__(self, url: str, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        check_url(url, allow_http=True)
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url, self._timeout_s, self._target = url, timeout_s, parts.path or "/"
        self.woken = threading.Event()  # set, no check waits
        self._waiting = False
        self._connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)

    def ask(self, request: object, wait_s: float = 0.0) -> Any:
        """Return the reply to a request, an object with `ok` true or the list of a batch; raise RelayError."""
        status, octets = self._exchange("POST", json.dumps(request).encode("utf-8"), wait_s)
        reply = self._read(octets)
        if isinstance(reply, dict) and reply.get("ok") is not True:
            said = ascii(" ".join(str(reply[name]) for name in ("error", "detail") if name in reply)[:MAX_QUOTED_CHARS])
            raise RelayError(f"{self.url} says {said} ({status}).", _retry_of(reply))
        return reply

    def document(self) -> Mapping[str, Any]:
        """Return what a relay says of itself; raise RelayError."""
        reply = self._read(self._exchange("GET", b"", 0.0)[1])
        return reply if isinstance(reply, dict) else {}

    def interrupt(self) -> None:
        """End a check that waits or is about to, in another thread: its `ask` raises RelayError. `woken` is set."""
        self.woken.set()
        sock = self._connection.sock
        if self._waiting and sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next request opens one."""
        self._connection.close()

    def _exchange(self, method: str, body: bytes, wait_s: float) -> tuple[int, bytes]:
        self._waiting = wait_s > 0
        try:
            if self._connection.sock is None:
                return self._exchange_once(method, body, wait_s)
            try:
                return self._exchange_once(method, body, wait_s)
            except (ConnectionError, http.client.BadStatusLine):  # it was kept, and closed meanwhile
                self.close()
                if self._waiting and self.woken.is_set():
                    raise
            return self._exchange_once(method, body, wait_s)
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no name of a host
            self.close()
            raise RelayError(f"{self.url} cannot be reached: {_printable(error)}.") from None
        finally:
            self._waiting = False

    def _exchange_once(self, method: str, body: bytes, wait_s: float) -> tuple[int, bytes]:
        if self._connection.sock is None:
            self._connection.connect()
        if self._waiting and self.woken.is_set():  # before there was a socket to shut down
            raise ConnectionAbortedError("woken")
        self._connection.sock.settimeout(self._timeout_s)
        until_s = time.monotonic() + self._timeout_s + wait_s
        # A type for the type checker alone: what is called there with a socket.
        self._connection.response_class = lambda sock, **options: http.client.HTTPResponse(  # type: ignore[assignment]
            _Timely(sock, until_s), **options)  # type: ignore[arg-type] # it has makefile, all that is used
        self._connection.request(method, self._target, body or None,
                                 {"Content-Type": "application/json", "Accept": "application/json"})
        response = self._connection.getresponse()
        octets = response.read(MAX_REPLY_BYTES + 1)
        if len(octets) > MAX_REPLY_BYTES:
            raise http.client.HTTPException("a reply over 1 MiB")
        if response.status in REDIRECTS:
            raise http.client.HTTPException(f"it sends elsewhere ({response.status})")
        return response.status, octets

    def _read(self, octets: bytes) -> Any:
        try:
            reply = _parse_json(octets)
        except Refused:
            raise RelayError(f"{self.url} is no relay: it answered what is not JSON.") from None
        if not isinstance(reply, dict | list):
            raise RelayError(f"{self.url} is no relay: it answered neither an object nor a list.")
        return reply


def _printable(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in text[:MAX_ERROR_CHARS]).strip()


def _retry_of(reply: Mapping[str, Any]) -> float:
    retry = reply.get("retry")
    return float(min(retry, MAX_RETRY_S)) if isinstance(retry, int | float) and retry > 0 else 0.0


def read_mailboxes(suite: Suite, client: RelayClient, polls: Sequence[Poll],
                   wait_s: float) -> dict[str, list[tuple[int, str]]]:
    """Return (at, data) of each mailbox that could be read to its end; raise RelayError if none can be asked."""
    checks = [{"pub": poll.mailbox.pub, "ext": poll.mailbox.ext, "action": "check", "at": poll.at, "wait": int(wait_s)}
              for poll in polls]
    replies = client.ask(checks, wait_s)
    if not isinstance(replies, list) or len(replies) != len(checks):
        raise RelayError(f"{client.url} did not answer a batch with as many replies.")
    read: dict[str, list[tuple[int, str]]] = {}
    errors: list[RelayError] = []
    for poll, reply in zip(polls, replies, strict=True):
        try:
            read[poll.mailbox.pub] = _read_mailbox(suite, client, poll, reply)
        except (RelayError, Refused) as error:
            errors.append(error if isinstance(error, RelayError) else RelayError(str(error)))
    if errors and not read:
        raise max(errors, key=lambda error: error.retry_s)
    return read


def _read_mailbox(suite: Suite, client: RelayClient, poll: Poll, reply: Any) -> list[tuple[int, str]]:
    if not isinstance(reply, dict) or reply.get("ok") is not True:
        raise RelayError(f"{client.url} refused a check.", _retry_of(reply) if isinstance(reply, dict) else 0.0)
    if not reply.get("found"):
        return []
    answer = suite.open(poll.key, CONTEXTS["question"], decode_base64url(str(reply.get("question"))))
    request = {"pub": poll.mailbox.pub, "ext": poll.mailbox.ext, "action": "receive", "limit": RECEIVE_LIMIT,
               "answer": answer.decode("ascii", "replace")}
    messages: list[tuple[int, str]] = []
    for _ in range(MAX_RECEIVES):
        found = client.ask({**request, "at": messages[-1][0] if messages else poll.at})
        if not isinstance(found, dict):
            raise RelayError(f"{client.url} answered a list.")
        if not found.get("messages"):
            return messages
        messages += _messages_of(found["messages"])
    return messages


def _messages_of(messages: object) -> list[tuple[int, str]]:
    pairs: list[tuple[int, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        match message:
            case {"at": int(at), "data": str(data)} if not isinstance(at, bool):
                pairs.append((at, data))
            case _:
                raise RelayError("A relay answered messages of a wrong form.")
    return pairs


# ---------------------------------------------------------------------------------------
# The runner: threads that move what the machines ask for. A line is everything that goes
# to one relay: one thread that polls, one that sends, so that a dead relay holds up no other.
# ---------------------------------------------------------------------------------------

CHECK_EVERY_S = 2.0  # between the starts of two checks at one relay, at least
WAIT_S = 60  # of a long poll: what a relay takes at most
BACKOFF_S = (2.0, 5.0, 15.0, 30.0, 60.0)  # after failures of a relay, one after the other
TROUBLE_S = 10.0  # before a wait began, a relay's trouble is that of the wait: it is asked again only after a pause
JITTER = 0.25  # of every pause, so that many clients do not come back together
SEND_FOR_S = 45.0  # what could not be sent by then, the machine sends anew
STOP_S = 2.0  # for threads, when the runner is closed
MAX_COMPLAINTS = 100  # remembered, so that each is logged once
MAX_QUEUED_MESSAGES = 1_024  # of a channel, that the app has not taken: then it is closed

log = logging.getLogger("connectoid")


class WebRTC(Protocol):
    """Makes peer connections: one for each contact, the newest `ask`. No call blocks.

    Reports, from any thread, are (contact, event, ask, value): `gathered` with an offer, an answer or None, `opened`,
    `message` with bytes or str, `closed`.
    """

    def start(self, report: Callable[[int, str, int, Any], None]) -> None:
        """Begin: reports go there."""

    def gather(self, contact: int, ask: int, offer: Mapping[str, str] | None, ice_servers: Sequence[str]) -> None:
        """Make a peer connection and an offer, or the answer to one; end the former one of this contact."""

    def join(self, contact: int, ask: int, answer: Mapping[str, str]) -> None:
        """Give the answer to the peer connection."""

    def write(self, contact: int, ask: int, message: bytes | str) -> Future[None]:
        """Send on the data channel; the future is done when there is room for more."""

    def close(self, contact: int, ask: int) -> None:
        """Close the peer connection."""

    def stop(self) -> None:
        """Close all, and end."""


class NoWebRTC:
    """Make no connections: contacts can be seen and ended, no more."""

    def start(self, report: Callable[[int, str, int, Any], None]) -> None:
        """Do nothing, as all here."""

    def gather(self, contact: int, ask: int, offer: Mapping[str, str] | None, ice_servers: Sequence[str]) -> None:
        """Do nothing: the machine tries again later."""

    def join(self, contact: int, ask: int, answer: Mapping[str, str]) -> None:
        """Do nothing."""

    def write(self, contact: int, ask: int, message: bytes | str) -> Future[None]:
        """Return a future that failed."""
        future: Future[None] = Future()
        future.set_exception(ConnectionError("no WebRTC"))
        return future

    def close(self, contact: int, ask: int) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class NotConnectedError(ConnectoidError):
    """There is no connection, or no longer; its text says what is known of the reason."""


def _boot_time_s() -> float:
    """Return the seconds of a clock that never steps and counts while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def system_now() -> Now:
    """Return the time of the system."""
    return Now(time.time_ns() // 1000, _boot_time_s())


class Channel:
    """A connection to a contact: messages of the app, in order, bytes or str, up to 64 KiB each."""

    def __init__(self, runner: Connectoid, contact: int, ask: int) -> None:
        self.ask = ask
        self._runner, self._contact = runner, contact
        self._came: queue.Queue[bytes | str | None] = queue.Queue()
        self._listener: Callable[[bytes | str | None], object] = self._came.put
        self._lock = threading.Lock()
        self.closed = threading.Event()

    def send(self, message: bytes | str, timeout_s: float | None = None) -> None:
        """Send a message, and wait until there is room for more; raise NotConnectedError, TimeoutError."""
        if self.closed.is_set():
            raise NotConnectedError("The connection is closed.")
        try:
            self._runner.webrtc.write(self._contact, self.ask, message).result(timeout_s)
        except (ConnectionError, CancelledError):
            raise NotConnectedError("The connection is closed.") from None

    def receive(self, timeout_s: float | None = None) -> bytes | str:
        """Return the next message; raise NotConnectedError once it is closed and empty, TimeoutError."""
        try:
            message = self._came.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError("Nothing came.") from None
        if message is None:
            self._came.put(None)
            raise NotConnectedError("The connection is closed.")
        return message

    def close(self) -> None:
        """Disconnect; what the other sent before may still be received. Idempotent."""
        if not self.closed.is_set():
            self._runner.disconnect(self._contact)
            self.take(None)

    def send_soon(self, message: bytes | str) -> asyncio.Future[None]:
        """Begin to send a message; the future of the running event loop is done when there is room for more."""
        return asyncio.wrap_future(self._runner.webrtc.write(self._contact, self.ask, message))

    def listen(self, listener: Callable[[bytes | str | None], object]) -> None:
        """Have a function called with each message, from any thread, those that came already first; None is the end."""
        with self._lock:
            while not self._came.empty():
                listener(self._came.get())
            self._listener = listener

    def take(self, message: bytes | str | None) -> None:
        """Take a message from the other, or the end."""
        with self._lock:
            if message is None:
                if self.closed.is_set():
                    return
                self.closed.set()
            elif self._came.qsize() >= MAX_QUEUED_MESSAGES:
                threading.Thread(target=self.close, daemon=True).start()  # this one may hold up all channels
                return
            self._listener(message)


class _Line:
    """What goes to one relay."""

    def __init__(self, runner: Connectoid, url: str) -> None:
        self._runner, self.url = runner, url
        self._poller, self._sender = RelayClient(url), RelayClient(url)
        self._letters: queue.Queue[tuple[float, Send] | None] = queue.Queue()
        self._woken = self._poller.woken
        self._known: frozenset[str] = frozenset()  # the mailboxes of the last round
        self._slow = False  # a pause goes on that was meant for an idle time
        self.stun: str | None = None
        self._threads = [threading.Thread(target=work, daemon=True, name=f"connectoid {url}")
                         for work in (self._poll_on, self._send_on)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.wake()
        self._letters.put(None)

    def join(self, until_s: float) -> None:
        for thread in self._threads:
            thread.join(max(0.0, until_s - _boot_time_s()))

    def send(self, letter: Send) -> None:
        self._letters.put((_boot_time_s() + SEND_FOR_S, letter))

    def wake(self) -> None:
        """Let a check begin as soon as it may, in place of one that waits."""
        self._poller.interrupt()

    def notice(self) -> None:
        """Wake if what is to be polled has changed, or is to be polled sooner."""
        hurried = self._slow and self._runner.poll_gap_s(self.url) < POLL_SLOW_S
        if hurried or not self._runner.mailboxes(self.url) <= self._known:
            self.wake()

    def _poll_on(self) -> None:
        failures = 0
        self._learn()
        while not self._runner.stopped.is_set():
            began_s, least_s = _boot_time_s(), CHECK_EVERY_S
            try:
                self._poll_once()
                failures, pause_s = 0, max(CHECK_EVERY_S, self._runner.poll_gap_s(self.url))
            except (RelayError, StoreError) as error:
                retry_s = _jittered(error.retry_s) if isinstance(error, RelayError) else 0.0
                pause_s = least_s = max(CHECK_EVERY_S, retry_s)
                if not self._woken.is_set():
                    self._runner.complain(str(error))
                    pause_s = max(retry_s, _jittered(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]))
                    failures += 1
            self._slow = failures == 0 and pause_s > CHECK_EVERY_S
            self._rest(began_s, pause_s, least_s)
            self._slow = False
        self._poller.close()

    def _rest(self, began_s: float, pause_s: float, least_s: float) -> None:
        """Wait for the rest of a pause; being woken shortens it to what a relay asks for at least."""
        if self._woken.wait(max(0.0, began_s + pause_s - _boot_time_s())):
            self._runner.stopped.wait(max(0.0, began_s + least_s - _boot_time_s()))

    def _learn(self) -> None:
        try:
            if self._poller.document().get("stun") is True:
                parts = urllib.parse.urlsplit(self.url)
                host = parts.netloc.rpartition(":")[0] if parts.port else parts.netloc
                self.stun = f"stun:{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        except RelayError as error:
            self._runner.complain(str(error))

    def _poll_once(self) -> None:
        with self._runner.changing:  # `notice` is called in it: no wake is lost, none comes for what is asked here
            polls = self._runner.polls(self.url)
            self._known = frozenset(poll.mailbox.pub for _, poll in polls)
            self._woken.clear()
        if self._runner.stopped.is_set():  # its wake may have been cleared
            return
        for part in (polls[start:start + MAX_BATCH_CHECKS] for start in range(0, len(polls), MAX_BATCH_CHECKS)):
            wait_s = 0 if self._woken.is_set() or part != polls else WAIT_S
            read = read_mailboxes(self._runner.suite, self._poller, [poll for _, poll in part], wait_s)
            self._runner.take(read, {poll.mailbox.pub: number for number, poll in part})

    def _send_on(self) -> None:
        while (item := self._letters.get()) is not None:
            until_s, letter = item
            request = {"pub": letter.mailbox.pub, "ext": letter.mailbox.ext, "action": "send", "data": letter.data}
            for backoff_s in (*BACKOFF_S, BACKOFF_S[-1]):
                try:
                    self._sender.ask(request)
                    break
                except RelayError as error:
                    self._runner.complain(str(error))
                    pause_s = _jittered(max(backoff_s, error.retry_s))
                if _boot_time_s() + pause_s > until_s or self._runner.stopped.wait(pause_s):
                    break
        self._sender.close()


def _jittered(seconds: float) -> float:
    return seconds * (1 + JITTER * secrets.randbelow(1_000) / 1_000)


class Connectoid:
    """Run the contacts of one store: a context manager, and safe to use from many threads.

    `on_event(name, event)` is called, from a thread of its own, with a key of EVENTS; without WebRTC (`webrtc`)
    contacts pair but do not connect. `relays` are (URL, ext) for new contacts.
    """

    def __init__(self, store: Store, relays: Iterable[tuple[str, str | None]] = (), webrtc: WebRTC | None = None, *,
                 on_event: Callable[[str, str], None] | None = None, ice_servers: Sequence[str] = (),
                 allow_http: bool = False, suite: Suite | None = None, now: Callable[[], Now] = system_now) -> None:
        self.store, self.relays, self.webrtc = store, tuple(relays), webrtc or NoWebRTC()
        self.suite = suite or SystemSuite()
        self.stopped = threading.Event()
        self._ice_servers, self._allow_http, self._now = tuple(ice_servers), allow_http, now
        self._on_event = on_event or (lambda name, event: None)
        self._events: queue.Queue[tuple[str, str] | None] = queue.Queue()
        self.changing = threading.Condition(threading.RLock())  # whoever touches a machine holds it
        self._contacts = {number: Contact(self.suite, kept, allow_http=allow_http)
                          for number, kept in store.load().items()}
        self._names = {number: contact.kept.name for number, contact in self._contacts.items()}  # a tombstone has none
        self._channels: dict[int, Channel] = {}
        self._lines: dict[str, _Line] = {}
        self._complaints: dict[str, float] = {}  # and when they were made last
        self._threads = [threading.Thread(target=work, daemon=True, name=f"connectoid {work.__name__}")
                         for work in (self._tick_on, self._tell_on)]

    def __enter__(self) -> Connectoid:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to poll and to connect."""
        self.webrtc.start(self._reported)
        for thread in self._threads:
            thread.start()
        with self.changing:
            self._draw_lines()

    def close(self) -> None:
        """Disconnect all, let waiting messages go, end the threads and close the store. Idempotent."""
        with self.changing:
            for number, contact in self._contacts.items():
                self._do(number, contact.disconnect(self._now()))
            self.stopped.set()
            self.changing.notify_all()
        for line in self._lines.values():
            line.stop()
        until_s = _boot_time_s() + STOP_S
        for line in self._lines.values():
            line.join(until_s)
        self._events.put(None)
        self.webrtc.stop()
        self.store.close()

    # -- What an app does ----------------------------------------------------------------

    def share(self, name: str, app_url: str) -> str:
        """Return a link for a new contact; raise UsageError for a name that is taken, or no relays."""
        with self.changing:
            self._check_new(name)
            contact, effects = Contact.invite(self.suite, self._now(), name, self.relays, allow_http=self._allow_http)
            self._adopt(contact, effects)
        return make_link(app_url, contact.kept.invitation)

    def open(self, link: str, name: str) -> str:
        """Open somebody's link, after the user has confirmed; return the contact's name, raise LinkError, UsageError.

        The same link again goes on with the contact that it made, by the name that it has.
        """
        invitation = read_link(link, allow_http=self._allow_http)
        with self.changing:
            for contact in self._contacts.values():
                if contact.kept.link_hash == hash_link(invitation.text):
                    if contact.kept.role == "inviter":
                        raise LinkError("This is your own link: send it to somebody else.")
                    return contact.kept.name
            self._check_new(name)
            self._adopt(*Contact.open(self.suite, self._now(), name, invitation, relays=self.relays,
                                      allow_http=self._allow_http))
        return name

    def connect(self, name: str, timeout_s: float | None = None, *, anew: bool = True) -> Channel:
        """Return a channel to a contact, once it is there; raise NotConnectedError, TimeoutError, UsageError.

        Without `anew` it goes on with a wait that has timed out, for as long as that one would have tried.
        """
        began_s = _boot_time_s()
        deadline_s = math.inf if timeout_s is None else began_s + timeout_s
        with self.changing:
            number = self._number(name)
            former = self._channels.get(number)
            if former is not None and not former.closed.is_set():
                return former
            wanting = None if anew else self._contacts[number]
            while self._channels.get(number) is former:
                contact = self._contacts.get(number)
                if contact is not None and contact is not wanting:  # a new one too, in place of one not saved
                    self._do(number, contact.connect(self._now()))
                    wanting = contact
                    continue
                if contact is None or contact.kept.state in ("ended", "unshared") or self.stopped.is_set():
                    raise NotConnectedError(EVENTS.get(contact.kept.why if contact else "") or "The sharing has ended.")
                left_s = deadline_s - _boot_time_s()
                if left_s <= 0:
                    trouble = self._trouble_since(began_s)
                    raise TimeoutError(f"{name} is not there. {EVENTS['unanswered']}{trouble}")
                self.changing.wait(min(left_s, ZERO_EVERY_S))
            return self._channels[number]

    def disconnect(self, contact: int) -> None:
        """Close the connection to a contact."""
        with self.changing:
            if contact in self._contacts:
                self._do(contact, self._contacts[contact].disconnect(self._now()))
                self._end_channel(contact)

    def unshare(self, name: str) -> None:
        """End the sharing with a contact, who is told; raise UsageError."""
        with self.changing:
            number = self._number(name)
            self._do(number, self._contacts[number].unshare(self._now()))
            self._end_channel(number)

    def forget(self, name: str) -> None:
        """Delete what is kept of a contact that has ended; raise UsageError for any other."""
        with self.changing:
            number = self._number(name)
            if self._contacts[number].kept.state != "ended":
                raise UsageError(f"{name} is still a contact: unshare ends it.")
            self._do(number, [Forget()])

    def move(self, name: str, relays: Iterable[tuple[str, str | None]] | None = None) -> None:
        """Be reached by a contact through other relays from now on, or those of this runner; raise UsageError.

        The contact is told, through his own relays. Until he has written to the new address the former one is polled.
        """
        with self.changing:
            number = self._number(name)
            self._do(number, self._contacts[number].move(self._now(), self.relays if relays is None else relays))

    def verify(self, name: str, *, same: bool = True) -> None:
        """Mark that the comparison strings were the same; raise UsageError."""
        with self.changing:
            number = self._number(name)
            self._do(number, self._contacts[number].verify(self._now(), same=same))

    def contacts(self) -> list[Kept]:
        """Return what is kept of all contacts, tombstones left out. It holds private keys: show name and state."""
        with self.changing:
            return [contact.kept for contact in self._contacts.values() if contact.kept.state != "unshared"]

    # -- What the lines ask --------------------------------------------------------------

    def mailboxes(self, url: str) -> set[str]:
        """Return the keys of all mailboxes at a relay."""
        with self.changing:
            return {mailbox.pub for contact in self._contacts.values() for mailbox in contact.mailboxes
                    if mailbox.url == url}

    def polls(self, url: str) -> list[tuple[int, Poll]]:
        """Return what is to be polled at a relay, with the contact's id."""
        with self.changing:
            return [(number, poll) for number, contact in self._contacts.items()
                    for poll in contact.polls(self._now(), url)]

    def poll_gap_s(self, url: str) -> float:
        """Return the seconds between two checks at a relay."""
        with self.changing:
            return min((contact.poll_gap_s(self._now()) for contact in self._contacts.values()), default=POLL_SLOW_S)

    def take(self, read: Mapping[str, Sequence[tuple[int, str]]], contacts: Mapping[str, int]) -> None:
        """Give what a round has found to the contacts."""
        with self.changing:
            for number in set(contacts.values()) & self._contacts.keys():
                boxes = {pub: found for pub, found in read.items() if contacts[pub] == number}
                self._do(number, self._contacts[number].polled(self._now(), boxes))

    def complain(self, text: str) -> None:
        """Log what a relay did, once, and remember when it did so last."""
        if self.stopped.is_set():
            return
        if self._complaints.pop(text, None) is None:
            log.warning("%s", text)
        self._complaints[text] = _boot_time_s()
        if len(self._complaints) > MAX_COMPLAINTS:
            del self._complaints[next(iter(self._complaints))]

    def _trouble_since(self, began_s: float) -> str:
        """Return the latest complaint about a relay, to be added to a sentence, if there was one since."""
        text = next(reversed(self._complaints), "")
        return f" {text}" if text and self._complaints[text] >= began_s - TROUBLE_S else ""

    # -- Effects -------------------------------------------------------------------------

    def _do(self, number: int, effects: Iterable[Effect]) -> None:
        """Do what a machine asks for, in order: what could not be saved is not sent."""
        try:
            for effect in effects:
                self._do_one(number, effect)
        except StoreError:
            self._contacts[number] = Contact(self.suite, self.store.load()[number], allow_http=self._allow_http)
            raise
        self._draw_lines()
        self.changing.notify_all()

    def _do_one(self, number: int, effect: Effect) -> None:
        match effect:
            case Save(kept):
                self.store.save(number, kept)
            case Forget():
                self.store.delete(number)
                del self._contacts[number], self._names[number]
            case Send(mailbox):
                self._line(mailbox.url).send(effect)
            case Gather(ask, offer):
                self._end_channel(number)
                self.webrtc.gather(number, ask, offer, self._servers())
            case Join(ask, answer):
                self.webrtc.join(number, ask, answer)
            case Write(ask, octets):
                self.webrtc.write(number, ask, octets)
            case Close(ask):
                self._end_channel(number)
                self.webrtc.close(number, ask)
            case Tell(event):
                self._tell(number, event)

    def _tell(self, number: int, event: str) -> None:
        contact = self._contacts[number]
        if event == "connected":
            self._channels[number] = Channel(self, number, contact.attempt.ask)
        if event == "disconnected":
            self._end_channel(number)
        self._events.put((self._names[number], event))

    def _reported(self, number: int, event: str, ask: int, value: Any) -> None:
        channel = self._channels.get(number)
        if event == "message" and channel is not None and channel.ask == ask:  # the way of all data: no machine
            channel.take(value)
            return
        with self.changing:
            contact = self._contacts.get(number)
            if contact is None or self.stopped.is_set():
                return
            now = self._now()
            match event:
                case "gathered":
                    self._do(number, contact.gathered(now, ask, value))
                case "opened":
                    self._do(number, contact.channel_opened(now, ask))
                case "message":
                    self._do(number, contact.channel_message(now, ask, value if isinstance(value, bytes) else b""))
                case "closed":
                    self._do(number, contact.channel_closed(now, ask))

    # -- The rest ------------------------------------------------------------------------

    def _adopt(self, contact: Contact, effects: Sequence[Effect]) -> None:
        number = self.store.add(contact.kept)
        self._contacts[number] = contact
        self._names[number] = contact.kept.name
        self._do(number, effects)

    def _check_new(self, name: str) -> None:
        if not name or not name.isprintable():
            raise UsageError("A contact needs a name, of characters that can be shown.")
        for number, contact in list(self._contacts.items()):
            if contact.kept.name == name and contact.kept.state != "ended":
                raise UsageError(f"There is a contact {name!r} already.")
            if contact.kept.name == name:
                self._do_one(number, Forget())

    def _number(self, name: str) -> int:
        for number, contact in self._contacts.items():
            if contact.kept.name == name:
                return number
        raise UsageError(f"There is no contact {name!r}.")

    def _servers(self) -> list[str]:
        return [*(line.stun for line in self._lines.values() if line.stun), *self._ice_servers]

    def _line(self, url: str) -> _Line:
        if url not in self._lines:
            self._lines[url] = _Line(self, url)
            self._lines[url].start()
        return self._lines[url]

    def _draw_lines(self) -> None:
        for url in {mailbox.url for contact in self._contacts.values() for mailbox in contact.mailboxes}:
            self._line(url).notice()

    def _end_channel(self, number: int) -> None:
        channel = self._channels.get(number)
        if channel is not None:
            channel.take(None)

    def _tick(self) -> None:
        for number, contact in list(self._contacts.items()):
            if contact.next_tick_s <= self._now().monotonic_s:
                self._do(number, contact.tick(self._now()))

    def _tick_on(self) -> None:
        with self.changing:
            while not self.stopped.is_set():
                try:
                    self._tick()
                except StoreError as error:
                    self.complain(str(error))
                    self.changing.wait(BACKOFF_S[0])
                soonest_s = min((contact.next_tick_s for contact in self._contacts.values()), default=math.inf)
                self.changing.wait(max(0.05, min(soonest_s - self._now().monotonic_s, ZERO_EVERY_S)))

    def _tell_on(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._on_event(*event)
            except Exception:
                log.exception("on_event failed")


# ---------------------------------------------------------------------------------------
# asyncio: the same calls, the blocking ones in threads.
# ---------------------------------------------------------------------------------------

ASYNC_SLICE_S = 1.0  # of a wait in a thread: so long at most a cancelled one goes on


class AsyncChannel:
    """A Channel for asyncio; made by AsyncConnectoid.connect."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._came: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        channel.listen(lambda message: loop.call_soon_threadsafe(self._came.put_nowait, message))

    async def send(self, message: bytes | str) -> None:
        """Send a message, and wait until there is room for more; raise NotConnectedError."""
        try:
            await self._channel.send_soon(message)
        except ConnectionError:
            raise NotConnectedError("The connection is closed.") from None

    async def receive(self) -> bytes | str:
        """Return the next message; raise NotConnectedError once it is closed and empty."""
        message = await self._came.get()
        if message is None:
            self._came.put_nowait(None)
            raise NotConnectedError("The connection is closed.")
        return message

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        await asyncio.to_thread(self._channel.close)


class AsyncConnectoid:
    """A Connectoid for asyncio: an asynchronous context manager around one."""

    def __init__(self, runner: Connectoid) -> None:
        self.runner = runner

    async def __aenter__(self) -> AsyncConnectoid:
        await asyncio.to_thread(self.runner.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.runner.close)

    async def share(self, name: str, app_url: str) -> str:
        """Return a link for a new contact, as Connectoid.share."""
        return await asyncio.to_thread(self.runner.share, name, app_url)

    async def open(self, link: str, name: str) -> str:
        """Open somebody's link, as Connectoid.open."""
        return await asyncio.to_thread(self.runner.open, link, name)

    async def connect(self, name: str) -> AsyncChannel:
        """Return a channel to a contact once it is there, as Connectoid.connect; asyncio.timeout ends it."""
        connect = self.runner.connect
        while True:
            with contextlib.suppress(TimeoutError):
                return AsyncChannel(await asyncio.to_thread(connect, name, ASYNC_SLICE_S))
            connect = functools.partial(self.runner.connect, anew=False)

    async def unshare(self, name: str) -> None:
        """End the sharing with a contact, as Connectoid.unshare."""
        await asyncio.to_thread(self.runner.unshare, name)


# ---------------------------------------------------------------------------------------
# WebRTC by aiortc (`pip install connectoid[webrtc]`): a thread with an event loop.
# ---------------------------------------------------------------------------------------

CHANNEL_LABEL = "connectoid"
GATHER_LIMIT_S = 2.0  # for candidates: what a STUN server has not said by then is left out
MAX_BUFFERED_BYTES = 1024 * 1024  # on a data channel; more waits
FLUSH_S = 2.0  # for what is buffered, when a connection is closed


class Peer(NamedTuple):
    """A peer connection of aiortc; `channel` is a list of at most one data channel."""

    ask: int
    connection: Any
    channel: list[Any]


class AiortcAdapter:
    """Make peer connections with aiortc; ICE servers are URLs, or dicts of RTCIceServer's arguments."""

    def __init__(self) -> None:
        try:
            self._aiortc = importlib.import_module("aiortc")
        except ImportError:
            raise UsageError("Connections need the package aiortc: pip install 'connectoid[webrtc]'") from None
        self._peers: dict[int, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._report: Callable[[int, str, int, Any], None] = lambda *_: None

    def start(self, report: Callable[[int, str, int, Any], None]) -> None:
        """Begin: reports go there."""
        self._report = report
        self._loop = asyncio.new_event_loop()
        # aiortc's own tasks fail when the other end has gone: that is no news, and no traceback for users.
        self._loop.set_exception_handler(
            lambda _, context: log.info("WebRTC: %s", context.get("exception") or context["message"]))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="connectoid aiortc")
        self._thread.start()

    def stop(self) -> None:
        """Close all, and end. Idempotent."""
        if hasattr(self, "_loop") and not self._loop.is_closed():
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._drop_all(), self._loop).result(FLUSH_S + STOP_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_S)
            if not self._thread.is_alive():
                self._loop.close()

    def gather(self, contact: int, ask: int, offer: Mapping[str, str] | None, ice_servers: Sequence[Any]) -> None:
        """Make a peer connection and an offer, or the answer to one."""
        self._do(self._gather(contact, ask, offer, ice_servers))

    def join(self, contact: int, ask: int, answer: Mapping[str, str]) -> None:
        """Give the answer to the peer connection."""
        self._do(self._join(contact, ask, answer))

    def write(self, contact: int, ask: int, message: bytes | str) -> Future[None]:
        """Send on the data channel; the future is done when there is room for more."""
        if self._loop.is_closed():
            return NoWebRTC().write(contact, ask, message)
        return asyncio.run_coroutine_threadsafe(self._write(contact, ask, message), self._loop)

    def close(self, contact: int, ask: int) -> None:
        """Close the peer connection, once what is buffered has gone."""
        peer = self._peers.get(contact)
        if peer is not None and peer.ask == ask:
            self._do(self._drop(contact))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        def begin() -> None:
            task = self._loop.create_task(work)
            self._tasks.add(task)  # the loop keeps only a weak reference
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    async def _gather(self, contact: int, ask: int, offer: Mapping[str, str] | None, servers: Sequence[Any]) -> None:
        await self._drop(contact)
        ice = [self._aiortc.RTCIceServer(**(server if isinstance(server, Mapping) else {"urls": server}))
               for server in servers]
        peer = Peer(ask, self._aiortc.RTCPeerConnection(self._aiortc.RTCConfiguration(ice)), [])
        self._peers[contact] = peer
        peer.connection.on("connectionstatechange", functools.partial(self._changed, contact, peer))
        try:
            await asyncio.wait_for(self._describe(contact, peer, offer), GATHER_LIMIT_S)
        except TimeoutError:
            if servers:  # none of them answered in time
                await self._gather(contact, ask, offer, [])
                return
        except Exception as error:
            log.warning("WebRTC failed: %s", error)
        local = peer.connection.localDescription
        self._report(contact, "gathered", ask, {"type": local.type, "sdp": local.sdp} if local else None)

    async def _describe(self, contact: int, peer: Peer, offer: Mapping[str, str] | None) -> None:
        connection = peer.connection
        if offer is None:
            self._watch(contact, peer, connection.createDataChannel(CHANNEL_LABEL))
            await connection.setLocalDescription(await connection.createOffer())
        else:
            connection.on("datachannel", functools.partial(self._watch, contact, peer))
            await connection.setRemoteDescription(self._aiortc.RTCSessionDescription(**offer))
            await connection.setLocalDescription(await connection.createAnswer())

    async def _join(self, contact: int, ask: int, answer: Mapping[str, str]) -> None:
        peer = self._peers.get(contact)
        if peer is not None and peer.ask == ask:
            try:
                await peer.connection.setRemoteDescription(self._aiortc.RTCSessionDescription(**answer))
            except Exception as error:
                log.warning("WebRTC failed: %s", error)

    def _watch(self, contact: int, peer: Peer, channel: Any) -> None:
        def opened() -> None:
            self._report(contact, "opened", peer.ask, None)

        if peer.channel or channel.label != CHANNEL_LABEL:
            return
        peer.channel.append(channel)
        channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES // 2
        channel.on("open", opened)
        channel.on("message", lambda message: self._report(contact, "message", peer.ask, message))
        channel.on("close", lambda: self._report(contact, "closed", peer.ask, None))
        if channel.readyState == "open":
            opened()

    def _changed(self, contact: int, peer: Peer) -> None:
        """Notice the end of a connection that was open; one that never was has its time all the same."""
        if peer.connection.connectionState in ("failed", "closed") and peer.channel:
            self._report(contact, "closed", peer.ask, None)

    async def _write(self, contact: int, ask: int, message: bytes | str) -> None:
        peer = self._peers.get(contact)
        if peer is None or peer.ask != ask or not peer.channel or peer.channel[0].readyState != "open":
            raise ConnectionError("the channel is closed")
        channel = peer.channel[0]
        channel.send(message)
        if channel.bufferedAmount > MAX_BUFFERED_BYTES:
            low = asyncio.Event()
            channel.once("bufferedamountlow", low.set)
            channel.once("close", low.set)
            await low.wait()

    async def _drop(self, contact: int) -> None:
        peer = self._peers.pop(contact, None)
        if peer is None:
            return
        until_s = _boot_time_s() + FLUSH_S
        while peer.channel and peer.channel[0].readyState == "open" and peer.channel[0].bufferedAmount > 0:
            if _boot_time_s() > until_s:
                break
            await asyncio.sleep(0.01)
        await peer.connection.close()

    async def _drop_all(self) -> None:
        drops = [self._drop(contact) for contact in list(self._peers)]
        await asyncio.gather(*drops, *self._tasks, return_exceptions=True)
