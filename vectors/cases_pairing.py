"""Cases of whole pairings and of the channel."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cases_envelope import flip
from cases_payload import emoji_of
from cases_small import APP, listed
from vector_forms import (
    CHANNEL,
    QUESTION,
    RELAY,
    commit,
    compare,
    hash_of,
    invite,
    mailbox,
    make_jws,
    prove,
    sdp,
    seal,
)
from vector_keys import Json, Key, b64, hpke_seal, key, scatter, sha256, unb64
from vector_people import build


class Side(NamedTuple):
    """One of the two in a pairing: its signing key, and its first address and the next."""

    signer: Key
    keys: tuple[tuple[Key, ...], ...]
    addresses: tuple[str, ...]

    @property
    def told(self) -> Json:
        """Return all that it knows before the first message."""
        return {
            "from": self.signer.pub,
            "private": self.signer.private,
            "addresses": [
                {"address": address, "private": [box.private for box in keys]}
                for address, keys in zip(self.addresses, self.keys, strict=True)
            ],
        }


def side(name: str, relays: Sequence[tuple[str, str | None]]) -> Side:
    """Return somebody with new keys at relays."""
    keys = tuple(
        tuple(key(f"{name}, mailbox {n} of address {which}") for n in range(len(relays)))
        for which in (0, 1)
    )
    addresses = tuple(
        "~".join(mailbox(box.pub, *relay) for box, relay in zip(boxes, relays, strict=True))
        for boxes in keys
    )
    return Side(key(f"{name} signs"), keys, addresses)


def step(by: str, text: str, address: str, **members: Any) -> Json:
    """Return a message on its way."""
    return {
        "by": by,
        "payload": json.loads(unb64(text.split(".")[1])),
        "text": text,
        "hash": hash_of(text),
        "data": [
            {"mailbox": box["pub"], "data": seal(box["pub"], text)} for box in listed(address)
        ],
        **members,
    }


def messages(alice: Side, bob: Side, r: str, secret: bytes, answered: bool) -> list[Json]:
    """Return the messages of a pairing, to the answer that connects."""
    a0, a1 = alice.addresses
    b0, b1 = bob.addresses
    answer = {}
    offer = {}
    if answered:
        answer["sdpAnswer"] = sdp("answer", "Alice")
    else:
        offer["sdpOffer"] = sdp("offer", "Bob again")
    nonce = b64(scatter(f"nonce of {bob.signer.pub}", 16))
    first = build(
        "hello", a0, bob.signer, 1, None, at=b0, nonce=nonce, sdpOffer=sdp("offer", "Bob"),
        versions=[1, 2],
    )
    opened = prove(secret, make_jws(bob.signer, first))
    second = build(
        "welcome", b0, alice.signer, 2, hash_of(opened), at=a1, r=r, versions=[1, 2], **answer,
    )
    greeted = make_jws(alice.signer, second)
    third = build("ready", a1, bob.signer, 3, hash_of(greeted), at=b1, **offer)
    ready = make_jws(bob.signer, third)
    steps = [
        step("bob", opened, a0, fresh=answered),
        step("alice", greeted, b0, fresh=True),
        step("bob", ready, a1, fresh=True),
    ]
    if not answered:
        last = build(
            "answer", b1, alice.signer, 4, hash_of(ready), at=a1, sdpAnswer=sdp("answer", "Alice"),
        )
        steps.append(step("alice", make_jws(alice.signer, last), b1, fresh=True))
    return steps


def challenge(by: str, to: Key, info: bytes) -> Json:
    """Return the challenge of one side on a new channel."""
    octets = scatter(f"challenge to {to.pub}", 32)
    return {
        "by": by,
        "to": to.pub,
        "challenge": octets.hex(),
        "sealed": hpke_seal(to.pub, info, octets).hex(),
    }


def pairing(
    name: str,
    alices_relays: Sequence[tuple[str, str | None]],
    bobs_relays: Sequence[tuple[str, str | None]],
    answered: bool,
) -> Json:
    """Return a pairing, from the link to the channel."""
    alice = side(f"Alice, {name}", alices_relays)
    bob = side(f"Bob, {name}", bobs_relays)
    secret = scatter(f"S, {name}", 16)
    r = b64(scatter(f"R, {name}", 16))
    invitation = invite(alice.addresses[0], secret, commit(alice.signer.pub, r))
    steps = messages(alice, bob, r, secret, answered)
    # The offer in the hello is answered in the welcome, one in the ready later.
    offer, answer = steps[:2]
    if not answered:
        offer, answer = steps[2:]
    info = CHANNEL + b"\0" + unb64(offer["hash"]) + unb64(answer["hash"])
    numbers = compare(invitation, steps[0]["text"], alice.signer.pub, r)
    return {
        "name": name,
        "link": f"{APP}#connectoid={invitation}",
        "invitation": invitation,
        "secret": secret.hex(),
        "r": r,
        "h": b64(commit(alice.signer.pub, r)),
        "alice": alice.told,
        "bob": bob.told,
        "messages": steps,
        "numbers": numbers,
        "emoji": emoji_of(numbers),
        "channel": {
            "offer": offer["hash"],
            "answer": answer["hash"],
            "info": info.hex(),
            "challenges": [
                challenge("alice", bob.keys[1][0], info),
                challenge("bob", alice.keys[1][0], info),
            ],
        },
    }


def pairing_cases() -> Iterator[Json]:
    """Yield pairings: over one relay and over several, answered at once and later."""
    one = (RELAY, None)
    other = ("https://other.example/", "key 1")
    third = ("https://third.example:8443/relay", None)
    yield pairing("one relay, the welcome answers", [one], [one], True)
    yield pairing("one relay, the offer was stale", [one], [one], False)
    yield pairing("ext, the welcome answers", [other], [other], True)
    yield pairing(
        "three relays, the welcome answers", [one, other, third], [one, other, third], True
    )
    yield pairing(
        "three relays and two others, the offer was stale", [third, one, other], [other, one], False
    )


def proven_channels() -> Iterator[Json]:
    """Yield channels that are proven."""
    first = next(pairing_cases())
    mine, other = first["channel"]["challenges"]
    alice = mine["challenge"]
    whole = other["sealed"]
    yield {
        "name": "both prove it",
        "by": "alice",
        "received": [whole, alice],
        "written": other["challenge"],
    }
    yield {
        "name": "both prove it, from Bob's side",
        "by": "bob",
        "received": [mine["sealed"], other["challenge"]],
        "written": alice,
    }


def unproven_channels() -> Iterator[Json]:
    """Yield channels that are not."""
    first = next(pairing_cases())
    mine, other = first["channel"]["challenges"]
    alice = mine["challenge"]
    octets = bytes.fromhex(other["challenge"])
    whole = other["sealed"]
    info = CHANNEL + b"\0"
    hashed = tuple(unb64(first["channel"][name]) for name in ("offer", "answer"))
    right = info + b"".join(hashed)
    for name, received in {
        "hashes swapped": [hpke_seal(other["to"], info + hashed[1] + hashed[0], octets).hex()],
        "another offer": [
            hpke_seal(other["to"], info + sha256(b"offer") + hashed[1], octets).hex()
        ],
        "hashes in base64url": [
            hpke_seal(other["to"], info + "".join(map(b64, hashed)).encode(), octets).hex()
        ],
        "no zero in the info": [hpke_seal(other["to"], CHANNEL + b"".join(hashed), octets).hex()],
        "a question as a challenge": [hpke_seal(other["to"], QUESTION, octets).hex()],
        "a message as a challenge": [first["messages"][2]["data"][0]["data"].encode().hex()],
        "31 bytes": [hpke_seal(other["to"], right, octets[:-1]).hex()],
        "33 bytes": [hpke_seal(other["to"], right, octets + b"\0").hex()],
        "a bit changed": [flip(bytes.fromhex(whole), -1).hex()],
        "reflected": [mine["sealed"]],
        "its own challenge, opened and sealed for it": [
            hpke_seal(other["to"], right, bytes.fromhex(alice)).hex()
        ],
        "not sealed": [octets.hex()],
        "nothing": [""],
        "the reply before the challenge": [alice],
        "another reply": [whole, flip(octets, 0).hex()],
        "its own challenge for a reply": [whole, octets.hex()],
        "the challenge again for a reply": [whole, whole],
        "half a reply": [whole, alice[:32]],
        "a reply and more": [whole, alice + "00"],
        "an empty reply": [whole, ""],
    }.items():
        yield {"name": name, "by": "alice", "received": received, "refused": "channel"}


def channel_cases() -> Iterator[Json]:
    """Yield messages on the channel of the first pairing, up to the one that decides."""
    yield from proven_channels()
    yield from unproven_channels()
