"""The forms of PROTOCOL.md, from the outside in."""

from __future__ import annotations

import hmac
import json

from vector_keys import HALF, ORDER, Json, Key, b64, hpke_seal, sha256, sign, unb64

MESSAGE = b"connectoid/1 message"
QUESTION = b"connectoid/1 question"
CHANNEL = b"connectoid/1 channel"
RENEW = b"connectoid/1 renew\0"

HEADER = '{"alg":"ES384","typ":"connectoid"}'

SETUPS = {"offer": "actpass", "answer": "active"}

SIZES = (1_024, 2_048, 4_096, 8_192, 16_384)

RELAY = "https://relay.example.com/"


def mailbox(pub: str, url: str | bytes = RELAY, ext: str | bytes | None = None) -> str:
    """Return a mailbox as text."""
    parts = [pub, b64(to_octets(url))]
    if ext is not None:
        parts.append(b64(to_octets(ext)))
    return ".".join(parts)


def to_octets(text: str | bytes) -> bytes:
    """Return a text in UTF-8, and bytes as they are."""
    if isinstance(text, bytes):
        return text
    return text.encode()


def invite(address: str, secret: bytes, h: bytes) -> str:
    """Return the invitation to an address."""
    last = address.rpartition("~")[2]
    # An ext that is left out is told as an empty part.
    if last.count(".") != len(["url", "ext"]):
        address += "."
    return f"{address}.{b64(secret + h)}"


def commit(signer: str, r: str) -> bytes:
    """Return h."""
    return sha256(unb64(signer), unb64(r))


def hash_of_link(invitation: str) -> str:
    """Return the hash of a whole invitation."""
    return b64(sha256(invitation.encode()))


def prove_renewal(
    signer: Key, old: Key, new: Key, invitation: str, address: str, *, info: bytes = RENEW
) -> str:
    """Return the proof that a new key takes the place of an old one, at an address."""
    keys = unb64(old.pub) + unb64(new.pub)
    hashes = sha256(invitation.encode()) + sha256(address.encode())
    return b64(sign(signer, info + keys + hashes))


def to_json(value: object) -> bytes:
    """Return JSON as the messages have it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def make_jws(signer: Key, payload: object, header: str = HEADER) -> str:
    """Return a JWS in three parts over a JSON value, or over the very bytes."""
    octets = payload
    if not isinstance(octets, bytes):
        octets = to_json(payload)
    signed = f"{b64(header.encode())}.{b64(octets)}"
    return f"{signed}.{b64(sign(signer, signed.encode()))}"


def prove(secret: bytes, jws: str) -> str:
    """Return a hello in four parts."""
    return f"{jws}.{b64(hmac.digest(secret, jws.encode(), 'sha256'))}"


def signing_input(text: str) -> str:
    """Return what is signed of a message: the first two of its three or four parts."""
    return ".".join(text.split(".")[:2])


def hash_of(text: str) -> str:
    """Return the hash of a message: of what is signed."""
    return b64(sha256(signing_input(text).encode()))


def sign_otherwise(text: str) -> str:
    """Return a message in three parts with its other signature: (r, n - s) for (r, s)."""
    signature = unb64(text.split(".")[2])
    s = int.from_bytes(signature[HALF:], "big")
    other = signature[:HALF] + (ORDER - s).to_bytes(HALF, "big")
    return f"{signing_input(text)}.{b64(other)}"


def pad(octets: bytes, size: int | None = None) -> bytes:
    """Return a plaintext of a size, else of the smallest that fits."""
    needed = 4 + len(octets)
    size = size or next(size for size in SIZES if size >= needed)
    return (len(octets).to_bytes(4, "big") + octets).ljust(size, b"\0")


def seal(pub: str, text: str | bytes, info: bytes = MESSAGE) -> str:
    """Return `data` of a message for a mailbox."""
    return b64(hpke_seal(pub, info, pad(to_octets(text))))


def compare(invitation: str, hello: str, signer: str, r: str) -> list[int]:
    """Return the seven numbers of the comparison string."""
    texts = (invitation, signing_input(hello), signer, r)
    digest = sha256(b"\0".join([b"connectoid/1 emoji", *(text.encode() for text in texts)]))
    bits = "".join(f"{octet:08b}" for octet in digest)
    return [int(bits[start : start + 6], 2) for start in range(0, 42, 6)]


def sdp(kind: str, whose: str) -> Json:
    """Return an SDP of a data channel, short and without candidates."""
    lines = (
        "v=0",
        "o=- 1 1 IN IP4 0.0.0.0",
        f"s={whose}",
        "t=0 0",
        "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
        "a=sctp-port:5000",
        "a=ice-ufrag:abcd",
        "a=ice-pwd:abcdefghijklmnopqrstuv",
        f"a=fingerprint:sha-256 {':'.join(['AB'] * 32)}",
        f"a=setup:{SETUPS[kind]}",
    )
    return {"type": kind, "sdp": "".join(f"{line}\r\n" for line in lines)}
