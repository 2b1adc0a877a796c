"""The people in all files.

Alice has made a link, and Bob has opened it. Mallory would like to be one of them. `A0` is the key
of the mailbox in the link, `A1` that of the welcome, `A2` and `B2` those of a rotation under way,
`A3` and `A4` those of two more changes of relays meanwhile, `AF` and `BF` those of former
addresses.
"""

from __future__ import annotations

from typing import Any

from vector_forms import commit, hash_of, invite, mailbox, make_jws, prove, sdp
from vector_keys import Json, Key, b64, key, scatter

ALICE, BOB, MALLORY = (key(f"{name} signs") for name in ("Alice", "Bob", "Mallory"))

# The keys that follow theirs after renewals.
NEW_ALICE, NEW_BOB, NEWEST_BOB = (
    key(f"{name}, after a renewal") for name in ("Alice", "Bob", "Bob again")
)

BOXES = ("A0", "A1", "A2", "A3", "A4", "AF", "B0", "B1", "B2", "BF", "M0")

MAILBOX_KEYS = tuple(key(f"mailbox {name}") for name in BOXES)
A0, A1, A2, A3, A4, AF, B0, B1, B2, BF, M0 = MAILBOX_KEYS

A0_AT, A1_AT, A2_AT, A3_AT, A4_AT, AF_AT, B0_AT, B1_AT, B2_AT, BF_AT, M0_AT = (
    mailbox(box.pub) for box in MAILBOX_KEYS
)

S = scatter("S", 16)
OTHER_S = scatter("another S", 16)

R, OTHER_R, NONCE = (b64(scatter(name, 16)) for name in ("R", "another R", "nonce"))

INVITATION = invite(A0_AT, S, commit(ALICE.pub, R))

# Microseconds since 1970: the seq of the first message.
START = 1_800_000_000_000_000

A_HASH = b64(scatter("the hash of something", 32))


def build(
    kind: str, to: str, signer: Key, step: int, re: str | None, *, at: str, **members: Any
) -> Json:
    """Return a payload; `seq` is the start plus so many seconds."""
    return {
        "type": kind,
        "to": to,
        "from": signer.pub,
        "seq": START + step * 1_000_000,
        "re": re,
        "connectoid": at,
        **members,
    }


def hello_payload(signer: Key = BOB, /, **changes: Any) -> Json:
    """Return the payload of Bob's hello, changed."""
    return (
        build("hello", A0_AT, signer, 1, None, at=B0_AT, nonce=NONCE, sdpOffer=sdp("offer", "Bob"))
        | changes
    )


def hello(signer: Key = BOB, secret: bytes = S, /, **changes: Any) -> str:
    """Return a hello in four parts."""
    return prove(secret, make_jws(signer, hello_payload(signer, **changes)))


HELLO = hello()

MALLORYS_HELLO = hello(MALLORY, connectoid=M0_AT)


def welcome(signer: Key = ALICE, /, **changes: Any) -> str:
    """Return Alice's welcome, changed."""
    return make_jws(
        signer, build("welcome", B0_AT, signer, 2, hash_of(HELLO), at=A1_AT, r=R) | changes
    )


def used(signer: Key = ALICE, /, **changes: Any) -> str:
    """Return the message that says that a link is used, changed."""
    return make_jws(
        signer, build("used", B0_AT, signer, 2, hash_of(HELLO), at=A0_AT, r=R) | changes
    )


WELCOME = welcome()


def from_bob(kind: str, signer: Key = BOB, /, **changes: Any) -> Json:
    """Return the payload of a numbered message from Bob to the welcome's address, changed."""
    members: Json = {
        "offer": {"sdpOffer": sdp("offer", "Bob")},
        "answer": {"sdpAnswer": sdp("answer", "Bob")},
    }
    res = {"ready": hash_of(WELCOME), "answer": A_HASH}
    return build(kind, A1_AT, signer, 3, res.get(kind), at=B1_AT, **members.get(kind, {})) | changes


def from_alice(kind: str, signer: Key = ALICE, /, **changes: Any) -> Json:
    """Return the payload of a numbered message from Alice to the hello's address, changed."""
    members: Json = {
        "offer": {"sdpOffer": sdp("offer", "Alice")},
        "answer": {"sdpAnswer": sdp("answer", "Alice")},
    }
    res = {"answer": A_HASH}
    return build(kind, B0_AT, signer, 3, res.get(kind), at=A1_AT, **members.get(kind, {})) | changes
