"""Cheap cryptography for the simulation: only the owner of a key can open and sign."""

from __future__ import annotations

import functools
import hmac
import random

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from connectoid import Refused, Send, Suite, SystemSuite, open_message
from connectoid.encoding import encode_base64url

TAG_BYTES = 32

NONCE_BYTES = 16


@functools.lru_cache(512)
def make_point(number: int) -> str:
    """Return a public key of P-384: relays take no others."""
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    return encode_base64url(key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint))


class Ring:
    """The owners of all keys, for the cheap suite and for the judge."""

    def __init__(self) -> None:
        # By public key.
        self.owners: dict[str, str] = {}
        # Private keys by public key.
        self.secrets: dict[str, str] = {}


class CheapSuite:
    """Seal and sign by HMAC under the private key, which is looked up.

    Only the holder of the private text may open and sign.
    """

    def __init__(self, ring: Ring, owner: str, source: random.Random) -> None:
        self._ring = ring
        self._owner = owner
        self._source = source

    def random(self, count: int) -> bytes:
        """Return so many bytes that repeat with the seed."""
        return self._source.randbytes(count)

    def make_key(self) -> tuple[str, str]:
        """Return a private text and a point that nobody else has got."""
        pub = make_point(len(self._ring.secrets) + 1)
        key = self._source.randbytes(NONCE_BYTES).hex()
        self._ring.secrets[pub] = key
        self._ring.owners[pub] = self._owner
        return key, pub

    def check(self, pub: str) -> None:
        """Raise Refused (address) for a key that was never handed out."""
        if pub not in self._ring.secrets:
            raise Refused("address", "its key is no point of the curve")

    def seal(self, pub: str, info: bytes, plaintext: bytes) -> bytes:
        """Return nonce || tag || plaintext."""
        self.check(pub)
        nonce = self._source.randbytes(NONCE_BYTES)
        return nonce + tag_of(self._ring.secrets[pub], info, nonce + plaintext) + plaintext

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Return the plaintext; raise Refused (seal)."""
        nonce = sealed[:NONCE_BYTES]
        tag = sealed[NONCE_BYTES : NONCE_BYTES + TAG_BYTES]
        plaintext = sealed[NONCE_BYTES + TAG_BYTES :]
        if tag != tag_of(key, info, nonce + plaintext):
            raise Refused("seal")
        return plaintext

    def sign(self, key: str, octets: bytes) -> bytes:
        """Return a tag that only the key's holder can make."""
        # As long as a real one.
        return tag_of(key, b"signature", octets) * 3

    def forget(self, key: str) -> None:
        """Do nothing: the judge looks keys up later."""

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Raise Refused (signature)."""
        if signature != self.sign(self._ring.secrets.get(pub, ""), octets):
            raise Refused("signature")


def tag_of(key: str, info: bytes, octets: bytes) -> bytes:
    """Return a tag that only the holder of the key can make."""
    return hmac.digest(key.encode("ascii"), info + b"\0" + octets, "sha256")


class WatchedSuite(SystemSuite):
    """The real suite, which also notes the owner of each key."""

    def __init__(self, ring: Ring, owner: str) -> None:
        super().__init__()
        self._ring = ring
        self._owner = owner

    def make_key(self) -> tuple[str, str]:
        """Return a key as SystemSuite does."""
        key, pub = super().make_key()
        self._ring.secrets[pub] = key
        self._ring.owners[pub] = self._owner
        return key, pub


def unseal(ring: Ring, suite: Suite, sent: Send) -> str:
    """Return the text in a message to anybody."""
    return open_message(suite, ring.secrets[sent.mailbox.pub], sent.data)
