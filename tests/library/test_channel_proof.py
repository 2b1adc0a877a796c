"""Each end of a channel shows whose it is."""

from __future__ import annotations

import pytest
from fake_wire import (
    Attacker,
    World,
    invite,
    joined,
    link_of,
    newest,
    open_channel,
    open_link,
    sdp,
    write,
    writes,
)

from connectoid import CONTEXTS, Close, limits
from connectoid.encoding import decode_base64url


def test_own_challenge_reflected_does_not_connect(world: World) -> None:
    alice, bob = joined(world)
    for app in (alice, bob):
        [challenge] = open_channel(app)
        effects = write(app, challenge)
        assert effects == [Close(app.contact.attempt.attempt_id)]
        assert app.contact.dropped == {"channel": 1}
        # The one of the pairing.
        assert app.told.count("connected") == 1


def test_challenge_opened_and_own_reflected_as_its_reply_does_not_connect(world: World) -> None:
    alice, bob = joined(world)
    [challenge] = open_channel(alice)
    [of_bob] = open_channel(bob)
    [_] = writes(write(alice, of_bob))
    assert writes(write(alice, challenge)) == []
    assert (alice.state, alice.contact.dropped) == ("waiting", {"channel": 1})


@pytest.mark.parametrize("octets", [b"", b"\0" * 32, b"A" * 200])
def test_man_in_the_middle_of_the_channel_cannot_show_whose_it_is(
    world: World, octets: bytes
) -> None:
    alice, bob = joined(world)
    open_channel(alice)
    [challenge] = open_channel(bob)
    mallory = Attacker(world)
    to_her = world.suite.seal(mallory.box, CONTEXTS["channel"], b"\0" * 32)
    for first in (octets, to_her):
        app = alice if first is octets else bob
        write(app, first)
        assert (app.state, app.contact.dropped) == ("waiting", {"channel": 1})
    assert len(challenge) == 97 + 32 + 16


@pytest.mark.parametrize(
    ("context", "hashes_from", "length"),
    [
        ("channel", None, 32),
        ("message", 0, 32),
        ("channel", 1, 32),
        ("channel", 0, 31),
        ("channel", 0, 33),
        ("channel", 0, 0),
    ],
)
def test_challenge_of_another_context_or_attempt_or_length_is_refused(
    toy: World, context: str, hashes_from: int | None, length: int
) -> None:
    alice, _ = joined(toy)
    open_channel(alice)
    attempt = alice.contact.attempt
    both = decode_base64url(attempt.offer) + decode_base64url(attempt.answer)
    info = CONTEXTS[context] + (b"" if hashes_from is None else b"\0" + both[hashes_from:])
    assert (
        writes(write(alice, toy.suite.seal(newest(alice).mailboxes[0].pub, info, b"A" * length)))
        == []
    )
    assert (alice.state, alice.contact.dropped) == ("waiting", {"channel": 1})


def test_nothing_is_opened_for_the_other_end_twice(world: World) -> None:
    alice, bob = joined(world)
    open_channel(alice)
    [challenge] = open_channel(bob)
    assert len(writes(write(alice, challenge))) == 1
    assert writes(write(alice, challenge)) == []
    assert alice.state == "waiting"


def test_messages_of_a_former_peer_connection_are_ignored(toy: World) -> None:
    alice, bob = joined(toy)
    attempt_id = bob.contact.attempt.attempt_id
    for late in (
        bob.contact.channel_opened(toy.now, attempt_id - 1),
        bob.contact.channel_message(toy.now, attempt_id - 1, b""),
        bob.contact.channel_closed(toy.now, attempt_id + 1),
        bob.contact.gathered(toy.now, attempt_id - 1, sdp("offer")),
    ):
        assert late == []
    assert (alice.state, bob.state) == ("joining", "joining")


def test_channel_being_proven_is_not_forgotten_when_the_attempt_is_late(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    bob_ready = [alice.poll(), bob.poll()]
    assert bob_ready
    toy.advance(limits.AGAIN_AFTER_OFFER_S - 0.1)
    [of_alice] = open_channel(alice)
    [of_bob] = open_channel(bob)
    toy.advance(0.2)
    # The challenges are on their way.
    alice.tick()
    [reply] = writes(write(bob, of_alice))
    back = writes(write(alice, of_bob))
    assert len(back) == 1
    write(alice, reply)
    write(bob, back[0])
    assert (alice.state, bob.state) == ("connected", "connected")
