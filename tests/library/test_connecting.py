"""Offers, answers and calls, and when an attempt is made again."""

from __future__ import annotations

import pytest
from fake_wire import (
    App,
    World,
    apart,
    count,
    invite,
    joined,
    link_of,
    open_link,
    paired,
    read_by,
    sdp,
    settle,
    signed_by,
)

from connectoid import Close, Contact, Gather, Join, Send, Tell, UsageError, limits


def test_answer_to_another_offer_is_ignored(toy: World) -> None:
    alice, bob = apart(toy)
    bob.connect()
    text = signed_by(alice, "answer", re="A" * 43, sdpAnswer=sdp("answer"))
    assert count(Join, bob.hear(text)) == 0
    assert bob.state == "waiting"
    text = signed_by(
        alice,
        "answer",
        re=bob.contact.attempt.offer,
        sdpAnswer=sdp("answer"),
        seq=alice.record.seq + 2,
    )
    assert count(Join, bob.hear(text)) == 1


def test_offer_found_after_a_gap_is_stale_and_gets_a_call(toy: World) -> None:
    for gap_s, expected in ((limits.FRESH_S, "answer"), (limits.FRESH_S + 1, "call")):
        alice, bob = apart(toy)
        alice.poll()
        toy.advance(gap_s)
        bob.connect()
        alice.poll()
        before = toy.put_so_far
        bob.poll()
        assert {message.type for message in read_by(bob)} >= {expected}
        assert bob.state == {"answer": "joining", "call": "waiting"}[expected]
        assert (toy.put_so_far > before) is (expected == "call")


def test_attempts_without_answer_are_told_and_then_seldom(toy: World) -> None:
    alice, bob = apart(toy)
    bob.connect()
    sent = [(toy.monotonic_s, count(Send, bob.done))]
    start_s = toy.monotonic_s
    for _ in range(1_300):
        toy.advance(5)
        if bob.contact.next_tick_s <= toy.monotonic_s:
            bob.tick()
        if count(Send, bob.done) != sent[-1][1]:
            sent.append((toy.monotonic_s, count(Send, bob.done)))
    times = [at_s - start_s for at_s, _ in sent]
    assert times[:3] == pytest.approx([0, 50, 100], abs=10)
    assert times[3] == pytest.approx(100 + 3_000, abs=60)
    assert bob.told.count("unanswered") == len([at_s for at_s in times if at_s > 100]) + 1 - (
        bob.state == "waiting"
    )
    assert alice.record.state == "paired"


@pytest.mark.parametrize(
    ("takes", "told"), [(True, ["unreachable"]), (False, ["unsent"])], ids=["taken", "refused"])
def test_networks_are_blamed_only_if_a_relay_has_taken_the_answer(
    toy: World, takes: bool, told: list[str],
) -> None:
    """An answer that a relay refuses reaches nobody: the relay has to be told."""
    alice, bob = apart(toy)
    bob.connect()
    before = len(alice.told)
    alice.online = takes
    alice.poll()
    assert alice.state == "joining"
    toy.advance(limits.AGAIN_AFTER_ANSWER_S)
    alice.tick()
    assert alice.told[before:] == told
    # The call that follows reaches nobody either, which is told once while attempts are frequent.
    toy.advance(limits.AGAIN_AFTER_OFFER_S)
    alice.tick()
    assert alice.told[before:] == told


def test_who_has_an_answer_has_been_heard_whatever_the_relay_replied(toy: World) -> None:
    """The reply of the relay was lost, and the networks do not connect."""
    alice, bob = apart(toy)
    bob.connect()
    bob.contact.machine.set_attempt(is_taken=False)
    alice.poll()
    bob.poll()
    assert bob.state == "joining"
    toy.advance(limits.AGAIN_AFTER_ANSWER_S)
    bob.tick()
    assert "unsent" not in bob.told
    assert "unreachable" in bob.told


def test_next_tick_is_never_in_the_past_after_a_tick(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for _ in range(200):
        toy.advance(7)
        for app in (alice, bob):
            app.poll()
            app.tick()
            assert app.contact.next_tick_s > toy.monotonic_s


def test_disconnect_and_lost_channel_are_not_tried_again_by_themselves(toy: World) -> None:
    alice, bob = paired(toy)
    assert alice.do(alice.contact.disconnect(toy.now)) == [Close(alice.contact.attempt.attempt_id)]
    assert bob.do(bob.contact.channel_closed(toy.now, bob.contact.attempt.attempt_id)) == [
        Tell("disconnected")
    ]
    before = toy.put_so_far
    settle(alice, bob, rounds=100, gap_s=60)
    assert toy.put_so_far == before


def test_webrtc_gets_type_and_sdp_and_no_other_member(toy: World) -> None:
    alice, bob = apart(toy)
    offer = {**sdp("offer"), "__proto__": {}, "extra": 1}
    effects = alice.hear(signed_by(bob, "offer", sdpOffer=offer))
    assert [effect.offer for effect in effects if isinstance(effect, Gather)] == [sdp("offer")]


@pytest.mark.parametrize("text", ["", "a" * 20_000, sdp("offer")["sdp"] + "m=video 9 RTP/AVP 96"])
def test_sdp_of_anything_else_is_a_mistake_and_the_attempt_goes_on(toy: World, text: str) -> None:
    alice = invite(toy)
    begun = Contact.open(toy.suite, toy.now, "Alice", link_of(alice))
    bob = App(toy, (begun[0], []))
    before = bob.record, bob.contact.attempt
    with pytest.raises(UsageError, match="not that of a data channel"):
        bob.contact.gathered(toy.now, 1, {"type": "offer", "sdp": text})
    assert (bob.record, bob.contact.attempt) == before
    settle(alice, bob, rounds=60)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_calls_of_one_round_make_one_offer(toy: World) -> None:
    alice, bob = apart(toy)
    calls = [signed_by(alice, "call", seq=alice.record.seq + number) for number in range(1, 50)]
    effects = bob.hear(*calls)
    assert (count(Gather, effects), count(Send, effects)) == (1, 1)


def test_call_right_after_the_channel_was_there_or_failed_gets_a_new_offer(toy: World) -> None:
    """It is newer than the answer, so it has crossed nothing."""
    alice, bob = paired(toy)
    assert bob.state == "connected"
    assert count(Gather, bob.hear(signed_by(alice, "call"))) == 1
    alice, bob = joined(toy)
    attempt_id = bob.contact.attempt.attempt_id
    bob.do(bob.contact.channel_opened(toy.now, attempt_id))
    bob.do(bob.contact.channel_closed(toy.now, attempt_id))
    assert bob.state == "waiting"
    assert count(Gather, bob.hear(signed_by(alice, "call"))) == 1


def test_call_that_crossed_an_offer_makes_no_second_one_within_five_seconds(toy: World) -> None:
    for after_s, offers in ((limits.NEW_OFFER_S - 0.1, 0), (limits.NEW_OFFER_S, 1)):
        alice, bob = apart(toy)
        bob.connect()
        toy.advance(after_s)
        effects = bob.hear(signed_by(alice, "call"))
        assert count(Gather, effects) == offers


def test_answer_is_given_only_to_a_peer_connection_that_is_open(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    bob.do(bob.contact.disconnect(toy.now))
    bob.connect()
    bob.poll()
    closed = [effect.attempt_id for effect in bob.done if isinstance(effect, Close)]
    assert not [
        effect for effect in bob.done if isinstance(effect, Join) and effect.attempt_id in closed
    ]
