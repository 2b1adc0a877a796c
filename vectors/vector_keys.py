"""Keys, encoding and cryptography: pure functions of their arguments."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
from typing import Any, NamedTuple, TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

Json: TypeAlias = dict[str, Any]


# Of P-384.
FIELD = 2**384 - 2**128 - 2**96 + 2**32 - 1

ORDER = int(
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF"
    "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973",
    16,
)

CURVE_B = int(
    "B3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE814112"
    "0314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF",
    16,
)

# Bytes of a scalar, a coordinate, r and s.
HALF = 48


def b64(octets: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """Return the octets of base64url without padding."""
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
    return hmac.digest(
        prk, count.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info + b"\1", "sha384"
    )[:count]


def hpke_seal(pub: str, info: bytes, plaintext: bytes, *, kdf: int = 2) -> bytes:
    """Return enc || ciphertext of RFC 9180, base mode.

    The ephemeral key follows from the arguments.
    """
    kem = b"KEM\0\x11"
    suite = b"HPKE\0\x11" + kdf.to_bytes(2, "big") + b"\0\2"
    ephemeral = key(f"ephemeral {pub} {info.hex()} {sha256(plaintext).hex()}").secret
    recipient = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), unb64(pub))
    enc, to = (
        point.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        for point in (ephemeral.public_key(), recipient)
    )
    prk = _extract(kem, b"", b"eae_prk", ephemeral.exchange(ec.ECDH(), recipient))
    shared = _expand(kem, prk, b"shared_secret", enc + to, HALF)
    context = (
        b"\0" + _extract(suite, b"", b"psk_id_hash", b"") + _extract(suite, b"", b"info_hash", info)
    )
    secret = _extract(suite, shared, b"secret", b"")
    nonce = _expand(suite, secret, b"base_nonce", context, 12)
    return enc + AESGCM(_expand(suite, secret, b"key", context, 32)).encrypt(nonce, plaintext, b"")


def sign_der(signer: Key, octets: bytes) -> bytes:
    """Return an ECDSA signature with SHA-384 in DER, with the nonce of RFC 6979."""
    return signer.secret.sign(octets, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))


def sign(signer: Key, octets: bytes) -> bytes:
    """Return r || s of ES384."""
    return b"".join(
        half.to_bytes(HALF, "big") for half in utils.decode_dss_signature(sign_der(signer, octets))
    )
