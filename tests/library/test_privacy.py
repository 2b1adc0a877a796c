"""What an app that asks first tells a contact who wants to connect: no address, in no way."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from fake_wire import (
    MINUTE_S,
    OTHER_RELAY,
    RELAY,
    App,
    Attacker,
    World,
    apart,
    count,
    invite,
    link_of,
    newest,
    open_link,
    read_by,
    settle,
    signed_by,
)

from connectoid import (
    Contact,
    ContactRecord,
    Effect,
    Gather,
    Mailbox,
    Privacy,
    Send,
    Tell,
    limits,
)

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


# ---------------------------------------------------------------------------------------
# Whoever runs a relay sees who writes to it.
# ---------------------------------------------------------------------------------------

THIRD_RELAY = "https://third.example.net/"


def relays_written_to(effects: Iterable[Effect]) -> set[str]:
    """Return the URLs of the relays that get something."""
    return {effect.mailbox.url for effect in effects if isinstance(effect, Send)}


def hear(app: App, contact: App, kind: str) -> list[Effect]:
    """Let an app hear a word of its contact, with the newest address of each."""
    to = newest(app).address
    return app.hear(signed_by(contact, kind, to=to, seq=app.record.seen_seq + 1))


def moved_away(world: World, *urls: str) -> tuple[App, App]:
    """Return Alice's app, which asks first, and Bob's, which has moved to other relays."""
    alice, bob = apart(world)
    alice.contact.privacy = ASKING
    bob.do(bob.contact.move(world.now, [(url, None) for url in urls]))
    return alice, bob


def test_relay_that_a_contact_newly_names_gets_nothing_before_the_app_connects(
    toy: World,
) -> None:
    alice, bob = moved_away(toy, OTHER_RELAY)
    effects = [*alice.poll(), *hear(alice, bob, "moved")]
    assert relays_written_to(effects) == set()
    assert Tell(WISH) in effects
    assert alice.record.met == (RELAY,)
    assert relays_written_to(alice.connect()) == {OTHER_RELAY}
    assert alice.record.met == (OTHER_RELAY,)
    meet(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_moved_alone_to_a_new_relay_is_not_answered_and_the_app_is_told_once_a_minute(
    toy: World,
) -> None:
    alice, bob = moved_away(toy, OTHER_RELAY)
    for _ in range(2):
        effects = hear(alice, bob, "moved")
        assert (relays_written_to(effects), effects.count(Tell(WISH))) == (set(), 1)
        assert Tell(WISH) not in hear(alice, bob, "moved")
        toy.advance(MINUTE_S)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_relays_of_an_address_that_are_met_or_one_s_own_get_what_the_new_ones_do_not(
    toy: World, known: int
) -> None:
    """Alice has her mailbox at the first, and has met the second."""
    alice, bob = apart(toy)
    bob.do(bob.contact.move(toy.now, [(OTHER_RELAY, None)]))
    meet(alice, bob)
    assert alice.record.met == (OTHER_RELAY,)
    alice.do(alice.contact.disconnect(toy.now))
    alice.contact.privacy = ASKING
    urls = [RELAY, OTHER_RELAY, THIRD_RELAY][:known]
    bob.do(bob.contact.move(toy.now, [(url, None) for url in urls]))
    toy.advance(MINUTE_S)
    effects = hear(alice, bob, "moved")
    assert relays_written_to(effects) == set(urls) - {THIRD_RELAY}
    assert (Tell(WISH) in effects) == (known == 3)
    # With what is held back nothing becomes known.
    assert THIRD_RELAY not in alice.restarted().record.met


def test_relay_that_was_met_is_written_to_after_a_restart(toy: World) -> None:
    alice, bob = apart(toy)
    bob.do(bob.contact.move(toy.now, [(OTHER_RELAY, None)]))
    alice.poll()
    again = alice.restarted()
    again.contact.privacy = ASKING
    toy.advance(MINUTE_S)
    again.contact.polls(toy.now)
    assert relays_written_to(hear(again, bob, "moved")) == {OTHER_RELAY}


def test_record_from_before_relays_were_met_has_met_those_of_the_contact(toy: World) -> None:
    alice, bob = apart(toy)
    for app, met in ((alice, [RELAY]), (bob, [RELAY]), (invite(toy), [])):
        app.do(app.contact.disconnect(toy.now))
        members = json.loads(app.record.to_json())
        assert members.pop("met") == met
        assert ContactRecord.from_json(json.dumps(members)) == app.record


def test_welcome_to_a_new_relay_waits_for_the_app(toy: World) -> None:
    alice = invite(toy)
    alice.contact.privacy = ASKING
    bob = App(toy, Contact.open(
        toy.suite, toy.now, "Alice", link_of(alice), relays=[(OTHER_RELAY, None)]))
    assert relays_written_to(alice.poll()) == set()
    assert (alice.record.state, alice.told) == ("welcomed", [WISH])
    assert relays_written_to(alice.connect()) == {OTHER_RELAY}
    # It has it by now.
    assert relays_written_to(alice.connect()) == set()
    meet(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_opener_who_asks_first_meets_the_relays_of_the_link_and_of_the_welcome(
    toy: World,
) -> None:
    alice = invite(toy)
    invitation = link_of(alice)
    bob = App(toy, Contact.open(
        toy.suite, toy.now, "Alice", invitation, relays=[(OTHER_RELAY, None)]))
    bob.contact.privacy = ASKING
    assert bob.record.met == (RELAY,)
    meet(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_stranger_with_the_link_gets_used_at_no_new_relay_even_while_the_app_connects(
    toy: World,
) -> None:
    alice, _ = apart(toy)
    alice.contact.privacy = ASKING
    link = link_of(alice)
    alice.connect()
    for url in (OTHER_RELAY, RELAY):
        stranger = Attacker(toy)
        stranger.address = str(Mailbox(stranger.box, url))
        effects = alice.hear(stranger.hello(link), at=link.address)
        assert relays_written_to(effects) == {url} & {RELAY}
        assert Tell(WISH) not in effects


@pytest.mark.parametrize("act", ["unshare", "renew"])
def test_unshare_and_renew_go_to_a_new_relay_at_once(toy: World, act: str) -> None:
    alice, bob = moved_away(toy, OTHER_RELAY)
    alice.poll()
    assert relays_written_to(alice.do(getattr(alice.contact, act)(toy.now))) == {OTHER_RELAY}
    # What repeats it is not held back either, wherever the contact has gone meanwhile.
    bob.do(bob.contact.move(toy.now, [(THIRD_RELAY, None)]))
    toy.drop(newest(bob).address)
    toy.advance(limits.AGAIN_IDLE_S)
    hear(alice, bob, "moved")
    assert relays_written_to([*alice.done[-2:], *alice.tick()]) == {THIRD_RELAY}


def test_unshare_of_a_contact_at_a_new_relay_is_not_answered_there(toy: World) -> None:
    alice, bob = moved_away(toy, OTHER_RELAY)
    effects = hear(alice, bob, "unshare")
    assert relays_written_to(effects) == set()
    assert Tell(WISH) not in effects
    assert (alice.record.state, alice.record.why) == ("ended", "unshared")


def test_app_that_does_not_ask_writes_to_new_relays_at_once(toy: World) -> None:
    alice, _ = moved_away(toy, OTHER_RELAY)
    alice.contact.privacy = Privacy(relay_only=True)
    assert relays_written_to(alice.poll()) == {OTHER_RELAY}
