"""Cryptography: the context strings, the interface for a contact, and the implementation.

A private key is a text that only its suite understands. PROTOCOL.md, "Keys" and "Context
strings".
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from typing import Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from connectoid.encoding import decode_base64url, encode_base64url
from connectoid.errors import OtherAppError, Refused
from connectoid.limits import APP_HASH_BYTES
from connectoid.links import Invitation, Mailbox, parse_address

# Each use of a key has its own, so nothing sealed for one use opens in another.
CONTEXTS = {
    "question": b"connectoid/1 question",
    "message": b"connectoid/1 message",
    "channel": b"connectoid/1 channel",
    "emoji": b"connectoid/1 emoji",
    "store": b"connectoid/1 store",
    "renew": b"connectoid/1 renew",
    "app": b"connectoid/1 app",
}


class Suite(Protocol):
    """The cryptography that a contact needs."""

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

    def forget(self, key: str) -> None:
        """Keep nothing of a private key that is not used any more."""

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Raise Refused (signature) unless it is that of the key's owner."""


def check_address(suite: Suite, address: str, *, allow_http: bool = False) -> tuple[Mailbox, ...]:
    """Return the mailboxes of an address to write to.

    Raise Refused (address) if not all can be written to.
    """
    mailboxes = parse_address(address, allow_http=allow_http)
    for mailbox in mailboxes:
        suite.check(mailbox.pub)
    return mailboxes


# Reading a key costs about as much as using it.
MAX_REMEMBERED_KEYS = 256
SCALAR_BYTES = 48

# Of a JWS: the header and the payload.
_SIGNED_PARTS = 2


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
        private_key = encode_base64url(scalar)
        self._remember(private_key, key)
        return private_key, encode_base64url(point)

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
        signature = self._private(key).sign(octets, self._ecdsa)
        r, s = utils.decode_dss_signature(signature)
        return r.to_bytes(SCALAR_BYTES, "big") + s.to_bytes(SCALAR_BYTES, "big")

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Raise Refused (signature) unless it is that of the key's owner."""
        if len(signature) != 2 * SCALAR_BYTES:
            raise Refused("signature")
        r = int.from_bytes(signature[:SCALAR_BYTES], "big")
        s = int.from_bytes(signature[SCALAR_BYTES:], "big")
        try:
            self._public(pub).verify(utils.encode_dss_signature(r, s), octets, self._ecdsa)
        except (InvalidSignature, Refused):
            raise Refused("signature") from None

    def forget(self, key: str) -> None:
        """Keep nothing of a private key that is not used any more."""
        self._private_keys.pop(key, None)

    @staticmethod
    @functools.lru_cache(MAX_REMEMBERED_KEYS)
    def _public(pub: str) -> ec.EllipticCurvePublicKey:
        try:
            octets = decode_base64url(pub)
            return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), octets)
        except (ValueError, Refused):
            raise Refused("address", "its key is no point of the curve") from None

    def _private(self, key: str) -> ec.EllipticCurvePrivateKey:
        if key not in self._private_keys:
            scalar = int.from_bytes(decode_base64url(key), "big")
            self._remember(key, ec.derive_private_key(scalar, ec.SECP384R1()))
        return self._private_keys[key]

    def _remember(self, key: str, private_key: ec.EllipticCurvePrivateKey) -> None:
        if len(self._private_keys) >= MAX_REMEMBERED_KEYS:
            self._private_keys.clear()
        self._private_keys[key] = private_key


# -- Hashes ------------------------------------------------------------------------------


def hash_commitment(signer: str, r: str) -> bytes:
    """Return h, which a link holds: it pins the inviter's signing key and commits her to R."""
    return hashlib.sha256(decode_base64url(signer) + decode_base64url(r)).digest()


def hash_app(app: str) -> bytes:
    """Return what a link holds of an app's identifier; nothing for an app that has none."""
    if not app:
        return b""
    digest = hashlib.sha256(CONTEXTS["app"] + b"\0" + app.encode("ascii")).digest()
    return digest[:APP_HASH_BYTES]


def app_of_contact(invitation: Invitation, app: str) -> str:
    """Return the identifier that counts for a contact, nothing where the link names no app.

    Raise OtherAppError if the link is that of another app.
    """
    if not invitation.app_hash:
        return ""
    if invitation.app_hash != hash_app(app):
        raise OtherAppError("This link belongs to another app. Open it there: it is still good.")
    return app


def prove(secret: bytes, jws: str) -> str:
    """Return a hello's fourth part, which proves that its sender has the link."""
    return encode_base64url(hmac.digest(secret, jws.encode("ascii"), "sha256"))


def hash_link(invitation: str) -> str:
    """Return the hash of an invitation, by which a link is known after it has been used."""
    return encode_base64url(hashlib.sha256(invitation.encode("ascii", "replace")).digest())


def hash_jws(jws: str) -> str:
    """Return the hash of a message in base64url: that of what its JWS signs."""
    signed = signing_input(jws).encode("ascii")
    return encode_base64url(hashlib.sha256(signed).digest())


def signing_input(jws: str) -> str:
    """Return what a JWS signs (RFC 7515): its header and its payload.

    The signature is no part of a message's identity. Anybody can make a second one of it: with
    (r, s) an ECDSA key has also signed as (r, n - s).
    """
    return ".".join(jws.split(".")[:_SIGNED_PARTS])
