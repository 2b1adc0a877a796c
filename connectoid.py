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
    "CONNECTING", "CONTEXTS", "EMOJI", "EVENTS", "PAIRING", "REASONS", "Close", "ConnectoidError", "Contact", "Effect",
    "Forget", "Gather", "Invitation", "Join", "Kept", "LinkError", "Mailbox", "Message", "Now", "Own", "Poll",
    "RecordError", "Refused", "Rule", "Save", "Send", "Suite", "SystemSuite", "Tell", "UsageError", "Write",
    "comparison_string", "format_address", "hash_jws", "make_link", "open_message", "parse_address",
    "parse_invitation", "prove", "read_jws", "read_link", "seal_message", "sign_jws",
]

import base64
import collections
import functools
import hashlib
import hmac
import json
import math
import re
import secrets
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeAlias

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import hashes, hpke
    from cryptography.hazmat.primitives.asymmetric import ec, utils
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
MAX_SEQ = 2**53  # what a number of JavaScript holds exactly
SECRET_BYTES = 16  # S, R and a hello's nonce: 128 bits
CHALLENGE_BYTES = 32  # what each sends the other on a new channel
SIZES = (1_024, 2_048, 4_096, 8_192, 16_384)  # bytes of a plaintext: all that a relay learns of its length
LENGTH_BYTES = 4

POLL_FAST_S = 2.0  # between two checks while something is going on, where the relay does not wait
POLL_SLOW_S = 60.0  # else; PROTOCOL.md allows 66, which leaves time for a slow reply
POLL_FAST_FOR_S = 90.0  # after something was sent or came
FRESH_S = 75.0  # an offer that came since the check before, so long ago at most, is still good
ZERO_EVERY_S = 3_600.0  # a check from 0: what a relay that lost its clock would hide comes to light
AGAIN_AFTER_ANSWER_S = 20.0  # without a connection
AGAIN_AFTER_OFFER_S = 50.0  # the same: the other polls at least every 66 s
ACTIVE_S = 120.0  # from the start, or the other's last sign: then attempts are seldom
AGAIN_IDLE_S = 3_000.0  # 50 minutes: less than a relay keeps a message
NEW_OFFER_S = 5.0  # a call that comes sooner has crossed the offer
GATHERED_S = 10.0  # the app's WebRTC has its own limit of 2 s
REPEAT_S = 60.0  # between two welcomes, useds or unshares
MAX_USED = 10  # replies to others who open a link, for each invitation
MAX_SEEN = 1_024  # digests of what was read already, so that hourly repeats cost nothing

DAY_US = 86_400_000_000
INVITATION_US = 30 * DAY_US  # how long a link is good, and somebody else who opens it is told
TOMBSTONE_US = 30 * DAY_US  # how long a former contact is told
ROTATION_US = 30 * DAY_US  # the age at which an address is replaced
NEVER_US = 2**63 - 1

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
        raise Refused("address", "its relay has no plain https URL")
    if match[1] == "http" and not allow_http and not _LOOPBACK.fullmatch(match[2]):
        raise Refused("address", "its relay is not asked over https")


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


MAX_REMEMBERED_KEYS = 256  # to read a key costs about as much as to use it
SCALAR_BYTES = 48


class SystemSuite:
    """P-384 with HPKE (RFC 9180) and ES384 (RFC 7518, section 3.4), by the package cryptography."""

    _hpke = hpke.Suite(hpke.KEM.P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)
    _ecdsa = ec.ECDSA(hashes.SHA384())

    def random(self, count: int) -> bytes:
        """Return so many random bytes of the system."""
        return secrets.token_bytes(count)

    def make_key(self) -> tuple[str, str]:
        """Return the scalar in base64url, and the public key."""
        key = ec.generate_private_key(ec.SECP384R1())
        scalar = key.private_numbers().private_value.to_bytes(SCALAR_BYTES, "big")
        point = key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
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

    @staticmethod
    @functools.lru_cache(MAX_REMEMBERED_KEYS)
    def _private(key: str) -> ec.EllipticCurvePrivateKey:
        return ec.derive_private_key(int.from_bytes(decode_base64url(key), "big"), ec.SECP384R1())


def hash_commitment(signer: str, r: str) -> bytes:
    """Return h, which a link holds: it pins the inviter's signing key and commits her to R."""
    return hashlib.sha256(decode_base64url(signer) + decode_base64url(r)).digest()


def prove(secret: bytes, jws: str) -> str:
    """Return a hello's fourth part, which proves that its sender has the link."""
    return encode_base64url(hmac.digest(secret, jws.encode("ascii"), "sha256"))


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
    used_sent: int = 0
    why: str = ""  # it ended: a key of EVENTS

    def to_json(self) -> str:
        """Return the record as text; it holds private keys."""
        return json.dumps({"version": RECORD_VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Kept:
        """Return the record that a text holds; raise RecordError."""
        try:
            members = json.loads(text)
            if members.pop("version") != RECORD_VERSION:
                raise RecordError("A saved contact is of another version of Connectoid.")
            members["relays"] = tuple((url, ext) for url, ext in members["relays"])
            members["comparison"] = tuple(members["comparison"])
            for name in ("invited", "current", "pending", "former"):
                own = members[name]
                members[name] = own and Own(own["address"], tuple(own["keys"]))
            return cls(**members)
        except (ValueError, TypeError, KeyError, AttributeError):
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
    return {(state, event): Rule(state, event, does, tuple(then.split()))
            for states, event, does, then in rules for state in states.split()}


# What is known of the other. `message` is any numbered message of the contact but `unshare`.
PAIRING = _table(
    ("invited", "hello", "bind", "welcomed"),
    ("welcomed paired", "hello", "greet", "welcomed paired"),
    ("welcomed", "message", "confirm", "paired"),
    ("opened", "welcome", "accept", "ready"),
    ("opened", "used", "end_used", "ended"),
    ("ready", "message", "confirm", "paired"),
    ("ready", "proven", "confirm", "paired"),
    ("paired", "message", "go_on", "paired"),
    ("invited welcomed opened ready paired", "leave", "withdraw", "unshared"),
    ("welcomed ready paired", "unshare", "end_unshared", "ended"),
    ("invited welcomed opened ready", "expire", "end_expired", "ended"),
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
    ("waiting connected", "call", "offer_unless_crossed", "gathering waiting connected"),
    ("apart gathering waiting", "welcome", "offer", "gathering"),
    ("gathering", "gathered", "send_sdp", "waiting joining apart"),
    ("gathering", "late", "send_sdp", "waiting joining apart"),
    ("waiting joining proving", "late", "again", "gathering waiting joining apart"),
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
        self._now, self._effects = Now(0, 0.0), list[Effect]()
        self._gone = False
        self._wanted = False
        self._active_until_s = self._fast_until_s = self._begin_s = -math.inf
        self._repeated_s: dict[str, float] = {}  # when a type was last sent as a reply that may be asked for often
        self._asks: list[Found] = []  # numbered messages of a round
        self._ats: dict[str, int] = {}  # cursors, by mailbox
        self._read_s: dict[str, float] = {}  # when a mailbox was last read to its end
        self._from_zero_s: dict[str, float] = {}
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
                    r=r, invited=invited)
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
        mailboxes = parse_address(invitation.address, allow_http=allow_http)
        try:
            for mailbox in mailboxes:
                suite.check(mailbox.pub)
        except Refused as error:
            raise LinkError(f"This link is damaged: {error}. Copy it again, whole.") from None
        relays = tuple(relays) or tuple((mailbox.url, mailbox.ext) for mailbox in mailboxes)
        private_key, signer = suite.make_key()
        kept = Kept("opener", "opened", name, relays, private_key, signer, now.wall_us + INVITATION_US,
                    invitation.text, current=_make_own(suite, relays, allow_http),
                    contact_address=invitation.address)
        contact = cls(suite, kept, allow_http=allow_http)
        return contact, [Save(kept), *contact.connect(now)]

    # -- Events: what the app wants, what the time does ----------------------------------

    @_step
    def connect(self) -> None:
        """Want a connection."""
        self._wanted = True
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
        if self._now.wall_us >= self.kept.expires_us:
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

    def polls(self, now: Now) -> list[Poll]:
        """Return the mailboxes to check, at most `poll_gap_s` apart."""
        return [Poll(mailbox, key, 0 if self._from_zero(now, mailbox.pub) else self._ats[mailbox.pub])
                for own in self._owns() for mailbox, key in _pairs(own)]

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
        if self._from_zero(self._now, pub):
            self._from_zero_s[pub] = self._now.monotonic_s
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
        for mailbox in parse_address(message.payload["connectoid"], allow_http=self._allow_http):
            self._suite.check(mailbox.pub)
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
            self._effects.append(Tell("opened_twice"))
            return self._refuse(message, fresh)
        if self.kept.welcome and self._may_repeat("welcome"):
            self._post(message.payload["connectoid"], self.kept.welcome)
        elif not self.kept.welcome and self._attempt.state == "apart":
            self._welcome_for(message, fresh)
        return self.kept.state

    def _refuse(self, message: Message, fresh: bool) -> str:
        """Say that the link is used: with r, which proves it."""
        if self.kept.used_sent < MAX_USED and self._may_repeat("used"):
            self._keep(used_sent=self.kept.used_sent + 1)
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
        """Keep nothing but the name and the reason."""
        self._turn("stop")
        self._keep(private_key="", invitation="", hello="", welcome="", r="", invited=None, current=None, pending=None,
                   former=None, contact_address="", why=why, expires_us=NEVER_US)
        self._effects.append(Tell(why))
        return "ended"

    def _end_used(self, message: Message, fresh: bool) -> str:
        return self._end("used")

    def _end_unshared(self, message: Message) -> str:
        return self._end("unshared")

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
        self._effects.append(Close(self._attempt.ask))
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
        if self._now.monotonic_s < self._active_until_s:
            if self.kept.state != "welcomed":
                return self._begin()
            self._late_in(self._active_until_s - self._now.monotonic_s)  # only the opener may try again
            return "joining"
        self._effects.append(Tell("unanswered" if self._attempt.state == "waiting" else "unreachable"))
        self._effects.append(Close(self._attempt.ask))
        return "apart"

    def _challenge(self) -> str:
        challenge = self._suite.random(CHALLENGE_BYTES)
        pub = parse_address(self.kept.contact_address, allow_http=True)[0].pub
        self._set(challenge=challenge)
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
            if self.kept.state == "ready":
                self._pair("proven")
            return "connected"
        self.dropped["channel"] += 1
        self._effects.append(Close(self._attempt.ask))
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
            self._effects.append(Close(self._attempt.ask))
        return "apart"

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
        pending = _make_own(self._suite, relays or self.kept.relays, self._allow_http)
        self._keep(pending=pending, relays=relays or self.kept.relays, rotated_us=self._now.wall_us)
        self._note_new(pending, self._now)

    def _note_new(self, own: Own, now: Now) -> None:
        """Remember that a mailbox that did not exist before now holds nothing older."""
        self._read_s.update((mailbox.pub, now.monotonic_s) for mailbox in own.mailboxes)

    def _say(self, kind: str, re: str | None, **members: Any) -> str:
        """Send a numbered message to the contact; return its hash."""
        due = self._now.wall_us - self.kept.rotated_us >= ROTATION_US
        if due and self.kept.pending is None and self.kept.relays:
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
    address = format_address(Mailbox(pub, url, ext) for (_, pub), (url, ext) in zip(keys, relays, strict=True))
    try:
        parse_address(address, allow_http=allow_http)
    except Refused as error:
        raise UsageError(f"These relays make no address: {error}.") from None
    return Own(address, tuple(key for key, _ in keys))
