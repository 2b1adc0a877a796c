"""What an app that asks first tells a contact who wants to connect: no address."""

from __future__ import annotations

import pytest
from fake_wire import (
    MINUTE_S,
    App,
    World,
    apart,
    count,
    invite,
    link_of,
    newest,
    open_link,
    read_by,
    settle,
)

from connectoid import Gather, Privacy, Tell

ASKING = Privacy(ask_first=True)
WISH = "wants_to_connect"


def meet(*apps: App) -> None:
    """Let two apps poll until nothing more comes of it."""
    settle(*apps, rounds=5)


def test_inviter_who_asks_first_pairs_and_makes_no_answer_before_the_app_connects(
    toy: World,
) -> None:
    alice = invite(toy)
    alice.contact.privacy = ASKING
    bob = open_link(toy, link_of(alice))
    meet(alice, bob)
    assert (alice.record.state, bob.record.state) == ("paired", "paired")
    assert count(Gather, alice.done) == 0
    assert alice.told == ["paired", WISH]
    assert {message.type: message.sdp for message in read_by(bob)} == {
        "welcome": None, "call": None}
    alice.connect()
    meet(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_inviter_who_asked_for_a_connection_before_the_hello_needs_not_be_asked(
    toy: World,
) -> None:
    alice = invite(toy)
    alice.contact.privacy = ASKING
    alice.connect()
    bob = open_link(toy, link_of(alice))
    meet(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")
    assert WISH not in alice.told


@pytest.mark.parametrize("asks", ["Alice", "Bob", "both"])
def test_contact_who_wants_to_connect_waits_for_the_app(toy: World, asks: str) -> None:
    alice, bob = apart(toy)
    caller, asked = (bob, alice) if asks == "Alice" else (alice, bob)
    asked.contact.privacy = ASKING
    if asks == "both":
        caller.contact.privacy = ASKING
    gathers = count(Gather, asked.done)
    seen = len(asked.told)
    caller.connect()
    meet(caller, asked)
    assert asked.told[seen:] == [WISH]
    assert count(Gather, asked.done) == gathers
    assert asked.state == "apart"
    asked.connect()
    meet(caller, asked)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_offer_of_a_moment_ago_is_called_for_anew_by_its_hash(toy: World) -> None:
    alice, bob = apart(toy)
    alice.contact.privacy = ASKING
    bob.connect()
    offer = bob.contact.attempt.offer
    alice.poll()
    alice.connect()
    (call,) = [message for message in read_by(bob) if message.payload["re"] == offer]
    assert call.type == "call"
    bob.poll()
    alice.poll()
    assert alice.state == "joining"


def test_app_is_told_of_a_wish_once_a_minute(toy: World) -> None:
    alice, bob = apart(toy)
    alice.contact.privacy = ASKING
    before = alice.told.count(WISH)
    for _ in range(3):
        for _ in range(4):
            bob.do(bob.contact.disconnect(toy.now))
            bob.connect()
            alice.poll()
            toy.advance(1)
        toy.advance(MINUTE_S)
    assert alice.told.count(WISH) == before + 3


def test_app_that_disconnects_is_asked_again(toy: World) -> None:
    alice, bob = apart(toy)
    alice.contact.privacy = ASKING
    alice.connect()
    meet(alice, bob)
    assert alice.state == "connected"
    alice.do(alice.contact.disconnect(toy.now))
    bob.do(bob.contact.channel_closed(toy.now, bob.contact.attempt.attempt_id))
    toy.advance(MINUTE_S)
    bob.connect()
    assert Tell(WISH) in alice.poll()
    assert alice.state == "apart"


def test_app_that_no_longer_asks_first_answers_the_next_offer(toy: World) -> None:
    alice, bob = apart(toy)
    alice.contact.privacy = ASKING
    bob.connect()
    alice.poll()
    alice.contact.privacy = Privacy()
    bob.do(bob.contact.disconnect(toy.now))
    bob.connect()
    assert count(Gather, alice.poll()) == 1


def test_contact_learns_the_same_address_whether_an_app_asks_or_not(toy: World) -> None:
    alice, bob = apart(toy)
    alice.contact.privacy = ASKING
    before = newest(alice).address
    bob.connect()
    alice.poll()
    assert newest(alice).address == before
    assert bob.record.contact_address == before
