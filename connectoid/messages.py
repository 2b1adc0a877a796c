"""Messages: the envelope, from the inside out, and the members of each type.

PROTOCOL.md, "Envelope", "Members" and "Reading a message".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from connectoid.apps import is_app
from connectoid.encoding import (
    HASH_FORM,
    PUB_FORM,
    RANDOM_FORM,
    SIGNATURE_FORM,
    decode_base64url,
    encode_base64url,
    parse_json,
)
from connectoid.errors import Refused, UsageError
from connectoid.limits import LENGTH_BYTES, MAX_OTHER_BYTES, MAX_SEQ, SIZES
from connectoid.sdp import check_sdp
from connectoid.suite import CONTEXTS, Suite, hash_jws
from connectoid.versions import is_list_of_versions

# It is compared as text and never interpreted.
HEADER = encode_base64url(b'{"alg":"ES384","typ":"connectoid"}')

# -- The form of each member -------------------------------------------------------------

Form: TypeAlias = Callable[[object], bool]


def _is_null(value: object) -> bool:
    return value is None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_seq(value: object) -> bool:
    # Not isinstance: True is an int.
    return type(value) is int and 0 < value < MAX_SEQ


def _is_pub(value: object) -> bool:
    return _matches(PUB_FORM, value)


def _is_hash(value: object) -> bool:
    return _matches(HASH_FORM, value)


def _is_random(value: object) -> bool:
    return _matches(RANDOM_FORM, value)


def _is_signature(value: object) -> bool:
    return _matches(SIGNATURE_FORM, value)


def _is_offer(value: object) -> bool:
    return _is_sdp("offer", value)


def _is_answer(value: object) -> bool:
    return _is_sdp("answer", value)


def _is_hash_or_null(value: object) -> bool:
    return value is None or _is_hash(value)


def _is_offer_or_null(value: object) -> bool:
    return value is None or _is_offer(value)


def _is_answer_or_null(value: object) -> bool:
    return value is None or _is_answer(value)


def _is_app_or_null(value: object) -> bool:
    return value is None or is_app(value)


def _is_versions_or_null(value: object) -> bool:
    return value is None or is_list_of_versions(value)


def _matches(form: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _is_sdp(kind: str, value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return value.get("type") == kind and isinstance(value.get("sdp"), str)


# The members of every type.
_ALWAYS: Mapping[str, Form] = {
    "to": _is_text,
    "from": _is_pub,
    "seq": _is_seq,
    "connectoid": _is_text,
}

# The further members of each type. Others are ignored.
MEMBERS: Mapping[str, Mapping[str, Form]] = {
    "hello": {
        "re": _is_null,
        "nonce": _is_random,
        "sdpOffer": _is_offer,
        "versions": _is_versions_or_null,
        "app": _is_app_or_null,
    },
    "welcome": {
        "re": _is_hash,
        "r": _is_random,
        "sdpAnswer": _is_answer_or_null,
        "versions": _is_versions_or_null,
        "app": _is_app_or_null,
    },
    "used": {"re": _is_hash, "r": _is_random},
    "ready": {"re": _is_hash, "sdpOffer": _is_offer_or_null},
    "offer": {"re": _is_hash_or_null, "sdpOffer": _is_offer},
    "answer": {"re": _is_hash, "sdpAnswer": _is_answer},
    "call": {"re": _is_hash_or_null},
    "moved": {"re": _is_hash_or_null},
    "renew": {"re": _is_null, "next": _is_pub, "proof": _is_signature},
    "unshare": {"re": _is_hash_or_null},
}

# These are known by their hash, all others by `seq`.
UNNUMBERED = ("hello", "welcome", "used")


# -- JWS ---------------------------------------------------------------------------------


class Message(NamedTuple):
    """A message whose form is right; its sender is only claimed until check_signature."""

    jws: str
    proof: str | None
    payload: Mapping[str, Any]
    # The offer or answer, with nothing in it but what WebRTC may see.
    sdp: Mapping[str, str] | None

    @property
    def type(self) -> str:
        """Return one of MEMBERS."""
        return str(self.payload["type"])

    @property
    def hash(self) -> str:
        """Return the hash, which is the `re` of a reply."""
        return hash_jws(self.jws)

    def check_signature(self, suite: Suite) -> None:
        """Raise Refused (signature) unless `from` signed it."""
        signed, _, signature = self.jws.rpartition(".")
        octets = decode_base64url(signature)
        suite.verify(self.payload["from"], octets, signed.encode("ascii"))


def sign_jws(suite: Suite, key: str, payload: Mapping[str, Any]) -> str:
    """Return a compact JWS (RFC 7515) over a payload as JSON."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    signed = f"{HEADER}.{encode_base64url(text.encode('utf-8'))}"
    signature = suite.sign(key, signed.encode("ascii"))
    return f"{signed}.{encode_base64url(signature)}"


def read_jws(text: str) -> Message:
    """Return the message in a JWS; raise Refused (jws, encoding, payload, sdp).

    The signature is not checked yet.
    """
    match text.split("."):
        case [header, body, signature] if header == HEADER:
            proof = None
        case [header, body, signature, proof] if header == HEADER:
            pass
        case _:
            raise Refused("jws")
    payload = parse_json(decode_base64url(body))
    decode_base64url(signature)
    if not isinstance(payload, dict) or payload.get("type") not in tuple(MEMBERS):
        raise Refused("payload", "no known type")
    _check_members(payload)
    if (proof is None) == (payload["type"] == "hello"):
        raise Refused("jws", "a proof is the fourth part of a hello, and of nothing else")
    return Message(f"{header}.{body}.{signature}", proof, payload, _read_sdp(payload))


def _check_members(payload: Mapping[str, Any]) -> None:
    """Raise Refused (payload) unless each member has its form; `re` has to be there."""
    for name, has_form in {**_ALWAYS, **MEMBERS[payload["type"]]}.items():
        if not has_form(payload.get(name)) or (name == "re" and name not in payload):
            raise Refused("payload", f"{payload['type']} with a wrong {name}")


def _read_sdp(payload: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Return the offer or answer in a payload as WebRTC may see it; raise Refused (sdp)."""
    for name in ("sdpOffer", "sdpAnswer"):
        if name in MEMBERS[payload["type"]] and payload.get(name) is not None:
            sdp = payload[name]
            return {"type": sdp["type"], "sdp": check_sdp(sdp["sdp"])}
    return None


# -- Room --------------------------------------------------------------------------------

# Bytes of a signature, and of the proof of a hello.
_SIGNATURE_BYTES = 96
_PROOF_BYTES = 32


def room_for_sdp(address_chars: int) -> int:
    """Return how many bytes an SDP may have as JSON, beside two addresses with so many characters.

    Every type of message has that room.
    """
    around = f"{HEADER}..{encode_base64url(bytes(_SIGNATURE_BYTES))}"
    proof = f".{encode_base64url(bytes(_PROOF_BYTES))}"
    payload_chars = SIZES[-1] - LENGTH_BYTES - len(around) - len(proof)
    # Four characters of base64url are three bytes.
    return payload_chars * 3 // 4 - MAX_OTHER_BYTES - address_chars


# -- Sealed ------------------------------------------------------------------------------


def seal_message(suite: Suite, pub: str, text: str) -> str:
    """Return `data` for a mailbox; raise UsageError if the text fits in no message."""
    plaintext = _pad(text.encode("ascii"))
    return encode_base64url(suite.seal(pub, CONTEXTS["message"], plaintext))


def open_message(suite: Suite, key: str, sealed: str) -> str:
    """Return the text in `data`; raise Refused (encoding, seal, padding, jws)."""
    plaintext = suite.open(key, CONTEXTS["message"], decode_base64url(sealed))
    try:
        return _unpad(plaintext).decode("ascii")
    except UnicodeDecodeError:
        raise Refused("jws", "not ASCII") from None


def _pad(octets: bytes) -> bytes:
    """Return the length, the octets, and zeros up to the next of SIZES."""
    needed = LENGTH_BYTES + len(octets)
    for size in SIZES:
        if size >= needed:
            length = len(octets).to_bytes(LENGTH_BYTES, "big")
            return (length + octets).ljust(size, b"\0")
    raise UsageError(
        f"A message of {needed} bytes is over {SIZES[-1]}: use fewer relays or a shorter SDP."
    )


def _unpad(plaintext: bytes) -> bytes:
    """Return the octets without their padding; raise Refused (padding)."""
    end = LENGTH_BYTES + int.from_bytes(plaintext[:LENGTH_BYTES], "big")
    if len(plaintext) not in SIZES or end > len(plaintext) or plaintext[end:].strip(b"\0"):
        raise Refused("padding")
    return plaintext[LENGTH_BYTES:end]
