"""The envelope: seals, padding and signatures."""

from __future__ import annotations

import json

import pytest
from fake_wire import (
    RELAY,
    Attacker,
    World,
    apart,
    invite,
    link_of,
    newest,
    open_link,
    sdp,
    sign_octets,
    signed_by,
)

from connectoid import (
    CONTEXTS,
    Contact,
    LinkError,
    Mailbox,
    Refused,
    UsageError,
    limits,
    open_message,
    read_link,
    seal_message,
)
from connectoid.encoding import decode_base64url, encode_base64url


def test_message_passed_off_as_a_question_opens_to_nothing(world: World) -> None:
    alice = invite(world)
    open_link(world, link_of(alice))
    [poll] = alice.contact.polls(world.now)
    [(_, hello)] = world.boxes[poll.mailbox.pub]
    octets = decode_base64url(hello)
    for context in ("question", "channel"):
        with pytest.raises(Refused) as error:
            world.suite.open(poll.key, CONTEXTS[context], octets)
        assert error.value.reason == "seal"
    assert world.suite.open(poll.key, CONTEXTS["message"], octets)


def test_question_passed_off_as_a_message_is_refused_and_no_oracle(world: World) -> None:
    alice, bob = apart(world)
    pub = newest(alice).mailboxes[0].pub
    text = signed_by(bob, "offer", sdpOffer=sdp("offer"))
    plaintext = (len(text).to_bytes(4, "big") + text.encode()).ljust(2_048, b"\0")
    question = encode_base64url(world.suite.seal(pub, CONTEXTS["question"], plaintext))
    assert alice.take(question) == []
    assert alice.contact.dropped == {"seal": 1}


def test_context_strings_differ() -> None:
    assert len(set(CONTEXTS.values())) == len(CONTEXTS) >= 4
    assert not any(
        one != other and one.startswith(other)
        for one in CONTEXTS.values()
        for other in CONTEXTS.values()
    )


@pytest.mark.parametrize(
    "header",
    [
        b'{"alg":"none","typ":"connectoid"}',
        b'{"alg":"HS256","typ":"connectoid"}',
        b'{"alg":"ES256","typ":"connectoid"}',
        b'{"alg":"ES384"}',
        b'{"typ":"connectoid","alg":"ES384"}',
        b'{"alg": "ES384","typ":"connectoid"}',
        b'{"alg":"ES384","typ":"connectoid","jwk":{}}',
        b'{"alg":"ES384","typ":"JWT"}',
        b"",
        b"{}",
    ],
)
def test_other_algorithm_than_the_one_is_refused(toy: World, header: bytes) -> None:
    alice, bob = apart(toy)
    octets = json.dumps(
        json.loads(decode_base64url(signed_by(bob, "unshare").split(".")[1]))
    ).encode()
    text = sign_octets(toy, bob.record.private_key, octets, encode_base64url(header))
    alice.hear(text, text.rpartition(".")[0] + ".")
    assert alice.contact.dropped == {"jws": 2}
    assert alice.record.state == "paired"


@pytest.mark.parametrize("change", ["body", "signature", "empty", "short", "long", "zeros", "big"])
def test_changed_signature_or_body_is_refused(world: World, change: str) -> None:
    alice, bob = apart(world)
    header, body, signature = signed_by(bob, "unshare").split(".")
    octets = decode_base64url(signature)
    forged = {
        "empty": b"",
        "short": octets[:-1],
        "long": octets + b"\0",
        "zeros": bytes(96),
        "big": b"\xff" * 96,
        "signature": octets[:-1] + bytes([octets[-1] ^ 1]),
        "body": octets,
    }[change]
    if change == "body":
        payload = json.loads(decode_base64url(body))
        body = encode_base64url(json.dumps({**payload, "seq": payload["seq"] + 1}).encode())
    text = f"{header}.{body}.{encode_base64url(forged)}"
    alice.hear(text)
    assert alice.contact.dropped == {"signature": 1}
    assert alice.record.state == "paired"


# No y for x = 1.
OFF_CURVE = encode_base64url(b"\2" + b"\0" * 47 + b"\1")

OVER_FIELD = encode_base64url(b"\3" + b"\xff" * 48)


@pytest.mark.parametrize("pub", [OFF_CURVE, OVER_FIELD])
def test_key_that_is_no_point_is_refused_wherever_it_comes(world: World, pub: str) -> None:
    alice, bob = apart(world)
    mailbox = Mailbox(pub, RELAY)
    alice.hear(signed_by(bob, "offer", sdpOffer=sdp("offer"), connectoid=str(mailbox)))
    assert alice.contact.dropped == {"address": 1}
    assert alice.record.contact_address == newest(bob).address
    with pytest.raises(LinkError, match="damaged"):
        Contact.open(world.suite, world.now, "Alice", read_link(f"{mailbox}..{'A' * 64}"))
    with pytest.raises(Refused, match="point"):
        world.suite.seal(pub, b"", b"")
    link = link_of(alice)
    hello = Attacker(world).hello(link, **{"from": pub})
    alice.hear(hello, at=link.address)
    assert alice.contact.dropped == {"address": 1, "signature": 1}


def test_sealed_text_with_an_invalid_point_or_of_any_length_is_refused(world: World) -> None:
    alice, _ = apart(world)
    point = bytes.fromhex("04") + b"\xff" * 96
    bad = [
        b"",
        b"\0",
        point[:-1],
        point,
        point + bytes(16),
        point + bytes(1_040),
        bytes(97 + 16),
        bytes(2_000),
    ]
    alice.take(*map(encode_base64url, bad), "A", "AB", "A=", "é", "\ud800", " ", "QUJD\n")
    assert alice.contact.dropped == {"seal": len(bad), "encoding": 7}
    assert alice.record.state == "paired"


@pytest.mark.parametrize(
    ("plaintext", "reason"),
    [
        (b"", "padding"),
        (b"\0" * 1_023, "padding"),
        (b"\0" * 1_025, "padding"),
        (b"\0" * 32_768, "padding"),
        (b"\xff" * 4 + b"\0" * 1_020, "padding"),
        (b"\0\0\3\xfd" + b"\0" * 1_020, "padding"),
        (b"\0\0\0\1A" + b"\0" * 1_018 + b"\1", "padding"),
        (b"\0" * 1_024, "jws"),
        (b"\0\0\0\2\xc3\xa9" + b"\0" * 1_018, "jws"),
    ],
)
def test_padding_is_checked_to_the_last_byte(toy: World, plaintext: bytes, reason: str) -> None:
    alice, _ = apart(toy)
    sealed = toy.suite.seal(newest(alice).mailboxes[0].pub, CONTEXTS["message"], plaintext)
    alice.take(encode_base64url(sealed))
    assert alice.contact.dropped == {reason: 1}


@pytest.mark.parametrize("size", limits.SIZES)
def test_padding_takes_the_smallest_size_that_fits(toy: World, size: int) -> None:
    key, pub = toy.suite.make_key()
    for length, padded in ((size - 5, size), (size - 4, size), (size - 3, size * 2)):
        if padded > limits.SIZES[-1]:
            with pytest.raises(UsageError, match="16384"):
                seal_message(toy.suite, pub, "A" * length)
            continue
        sealed = seal_message(toy.suite, pub, "A" * length)
        assert len(decode_base64url(sealed)) == 48 + padded
        assert open_message(toy.suite, key, sealed) == "A" * length
