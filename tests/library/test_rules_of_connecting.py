"""The rules of connecting, one by one: a simulation passes without some of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_sdp import make_sdp
from sim_desk import Desk, gathers, written
from sim_plan import HOUR_S, MONTH_S
from sim_world import url_of

from connectoid import (
    Close,
    Contact,
    Effect,
    Gather,
    Join,
    Send,
    Tell,
    UsageError,
    Write,
    seal_message,
)
from connectoid.limits import MAX_UNREACHABLE, POLL_FAST_S, POLL_SLOW_S


@pytest.fixture
def desk() -> Desk:
    """Return a pair at rest."""
    return Desk()


def test_inviter_calls_and_opener_offers(desk: Desk) -> None:
    assert desk.kinds(desk.alice.connect(desk.now)) == ["call"]
    assert desk.kinds(desk.offer()) == ["offer"]


def test_polling_is_fast_for_90_s_after_something_was_sent_or_came(desk: Desk) -> None:
    assert desk.bob.poll_gap_s(desk.now) <= 66
    sent = desk.offer()
    desk.check(desk.alice, sent)
    for contact in (desk.alice, desk.bob):
        desk.now_s = 89
        assert contact.poll_gap_s(desk.now) == POLL_FAST_S
        desk.now_s = 91
        assert contact.poll_gap_s(desk.now) == POLL_SLOW_S <= 66
        desk.now_s = 0


@pytest.mark.parametrize(("gap_s", "does"), [(74.0, "answer"), (76.0, "call")])
def test_offer_is_answered_if_the_check_before_was_75_s_ago_at_most(
    desk: Desk, gap_s: float, does: str
) -> None:
    sent = desk.offer()
    desk.now_s = gap_s
    effects = desk.check(desk.alice, sent)
    assert desk.kinds(effects or desk.gather(desk.alice, "answer")) == (
        ["call"] if does == "call" else []
    )
    assert len(gathers(effects)) == (does == "answer")


def test_offer_after_a_restart_is_answered_with_call(desk: Desk) -> None:
    alice = Contact(desk.apps["alice"].suite, desk.alice.record)
    assert desk.kinds(desk.check(alice, desk.offer())) == ["call"]


def test_only_the_newest_offer_counts(desk: Desk) -> None:
    first = desk.offer()
    second = desk.tick(desk.bob, 50.1) and desk.gather(desk.bob, "offer")
    made = gathers(desk.check(desk.alice, second, first))
    assert [one.offer for one in made] == [desk.messages(second)[0].sdp]


def test_call_makes_a_new_offer_unless_one_younger_than_5_s_is_out(desk: Desk) -> None:
    call = desk.alice.connect(desk.now)
    desk.offer()
    desk.now_s = 4.9
    assert not gathers(desk.check(desk.bob, call))
    call = desk.tick(desk.alice, 50.1)
    assert gathers(desk.check(desk.bob, call))


def test_answer_to_another_offer_is_ignored(desk: Desk) -> None:
    desk.check(desk.alice, desk.offer())
    answer = desk.gather(desk.alice, "answer")
    desk.tick(desk.bob, 50.1)
    desk.gather(desk.bob, "offer")
    assert not [effect for effect in desk.check(desk.bob, answer) if isinstance(effect, Join)]
    assert desk.bob.attempt.state == "waiting"


def test_answer_to_the_offer_is_joined(desk: Desk) -> None:
    desk.check(desk.alice, desk.offer())
    answer = desk.gather(desk.alice, "answer")
    assert [effect for effect in desk.check(desk.bob, answer) if isinstance(effect, Join)]


def test_offer_is_repeated_after_50_s(desk: Desk) -> None:
    desk.offer()
    assert not desk.tick(desk.bob, 49.9)
    assert gathers(desk.tick(desk.bob, 50.1))


def test_attempt_is_repeated_20_s_after_an_answer(desk: Desk) -> None:
    desk.check(desk.alice, desk.offer())
    desk.check(desk.bob, desk.gather(desk.alice, "answer"))
    for contact, sign in ((desk.alice, Send), (desk.bob, Gather)):
        assert not desk.tick(contact, 19.9)
        assert [effect for effect in desk.tick(contact, 20.1) if isinstance(effect, sign)]


def test_attempts_are_seldom_after_two_minutes(desk: Desk) -> None:
    starts_s = []
    desk.alice.connect(desk.now)
    for second in range(1, 7_000):
        if "call" in desk.kinds(desk.tick(desk.alice, float(second))):
            starts_s.append(second)
    assert [second for second in starts_s if second < 200] == [50, 100]
    assert [second for second in starts_s if second >= 200] == [3_100, 6_200] or starts_s[
        2
    ] >= 3_000
    assert len(starts_s) <= 6


def test_attempts_that_connect_nobody_are_told_at_once_and_made_every_ten_minutes(
    desk: Desk,
) -> None:
    """Alice answers each offer, and no channel comes."""
    starts_s: list[float] = []
    told_s: list[float] = []
    effects = desk.bob.connect(desk.now)
    while desk.now_s < 1_500:
        told_s += [desk.now_s for effect in effects if effect == Tell("unreachable")]
        offer: list[Effect] = []
        if gathers(effects):
            starts_s.append(desk.now_s)
            offer = desk.gather(desk.bob, "offer")
        desk.check(desk.alice, offer)
        answer: list[Effect] = []
        if offer:
            answer = desk.gather(desk.alice, "answer")
        desk.check(desk.bob, answer)
        effects = desk.tick(desk.bob, desk.now_s + 1)
    assert starts_s == [0, 20, 40, 660, 1_280]
    assert told_s == [20, 60, 680, 1_300]


def test_stale_offer_while_gathering_is_answered_with_call() -> None:
    desk = Desk(relays=2)
    desk.now_s = 74.0
    assert gathers(desk.check(desk.alice, desk.offer(), only=url_of(0)))
    desk.bob.disconnect(desk.now)
    second = desk.offer()
    # The other relay was last read at time 0.
    desk.now_s = 76.0
    assert desk.kinds(desk.check(desk.alice, second, only=url_of(1))) == ["call"]


def test_stale_offer_while_proving_is_answered_with_call() -> None:
    desk = Desk(relays=2)
    desk.now_s = 60.0
    desk.check(desk.alice, desk.offer(), only=url_of(0))
    answer = desk.gather(desk.alice, "answer")
    desk.check(desk.bob, answer)
    desk.alice.channel_opened(desk.now, desk.alice.attempt.attempt_id)
    assert desk.alice.attempt.state == "proving"
    desk.bob.disconnect(desk.now)
    second = desk.offer()
    desk.now_s = 76.0
    assert desk.kinds(desk.check(desk.alice, second, only=url_of(1))) == ["call"]


def connect(desk: Desk) -> None:
    """Bring both to a channel that is proven, through one relay."""
    desk.check(desk.alice, desk.offer(), only=url_of(0))
    desk.check(desk.bob, desk.gather(desk.alice, "answer"))
    attempt_id = desk.alice.attempt.attempt_id
    bob_attempt_id = desk.bob.attempt.attempt_id
    (mine,) = written(desk.alice.channel_opened(desk.now, attempt_id))
    (theirs,) = written(desk.bob.channel_opened(desk.now, bob_attempt_id))
    (back,) = written(desk.alice.channel_message(desk.now, attempt_id, theirs))
    (answered,) = written(desk.bob.channel_message(desk.now, bob_attempt_id, mine))
    desk.alice.channel_message(desk.now, attempt_id, answered)
    desk.bob.channel_message(desk.now, bob_attempt_id, back)
    assert back != answered


def test_polling_is_fast_while_the_other_end_is_silent(desk: Desk) -> None:
    """It may be in another network, and say so. A former connection says nothing any more."""
    connect(desk)
    desk.now_s = 1_000
    for contact in (desk.alice, desk.bob):
        attempt_id = contact.attempt.attempt_id
        assert contact.channel_silent(desk.now, attempt_id - 1) == []
        assert contact.poll_gap_s(desk.now) == POLL_SLOW_S
        assert contact.channel_silent(desk.now, attempt_id) == []
        assert contact.poll_gap_s(desk.now) == POLL_FAST_S


def test_attempt_begins_anew_with_another_network_and_a_connection_goes_on(desk: Desk) -> None:
    """What is under way has the addresses of the former one."""
    assert desk.bob.network_changed(desk.now) == []
    first = desk.offer()
    attempt_id = desk.bob.attempt.attempt_id
    desk.bob.machine.failed = MAX_UNREACHABLE
    (gather,) = gathers(desk.bob.network_changed(desk.now))
    assert gather == Gather(attempt_id + 1, None)
    assert desk.bob.machine.failed == 0
    second = desk.gather(desk.bob, "offer")
    made = gathers(desk.check(desk.alice, first, second))
    assert [one.offer for one in made] == [desk.messages(second)[0].sdp]
    connect(desk)
    assert desk.bob.network_changed(desk.now) == []


def test_attempt_begins_anew_with_a_relay_that_is_back_once_a_minute(desk: Desk) -> None:
    """What the opener has out may lack what that relay's STUN server tells."""
    assert desk.bob.relay_is_back(desk.now) == []
    desk.offer()
    attempt_id = desk.bob.attempt.attempt_id
    for now_s, attempts in ((0.0, 1), (59.9, 1), (60.0, 2), (60.1, 2)):
        desk.now_s = now_s
        desk.bob.relay_is_back(desk.now)
        assert desk.bob.attempt.attempt_id == attempt_id + attempts
    connect(desk)
    desk.now_s = 1_000
    assert desk.bob.relay_is_back(desk.now) == []


def test_inviter_s_call_is_not_repeated_for_a_relay_that_is_back(desk: Desk) -> None:
    """It has nothing in it that could be wrong. Once she has given up, she calls."""
    assert desk.kinds(desk.alice.connect(desk.now)) == ["call"]
    assert desk.alice.relay_is_back(desk.now) == []
    for now_s in (51.0, 102.0, 153.0):
        desk.tick(desk.alice, now_s)
    assert desk.alice.attempt.state == "apart"
    assert desk.kinds(desk.alice.relay_is_back(desk.now)) == ["call"]


def test_relay_that_is_back_ends_no_attempt_that_both_have_answered(desk: Desk) -> None:
    desk.check(desk.alice, desk.offer())
    desk.check(desk.bob, desk.gather(desk.alice, "answer"))
    for contact in (desk.alice, desk.bob):
        assert contact.attempt.state == "joining"
        assert contact.relay_is_back(desk.now) == []


def test_stale_offer_while_connected_is_answered_with_call_and_the_app_is_told() -> None:
    desk = Desk(relays=2)
    desk.now_s = 60.0
    connect(desk)
    assert desk.alice.attempt.state == "connected"
    desk.bob.disconnect(desk.now)
    second = desk.offer()
    desk.now_s = 76.0
    effects = desk.check(desk.alice, second, only=url_of(1))
    assert desk.kinds(effects) == ["call"]
    assert Tell("disconnected") in effects


def test_offer_while_gathering_takes_the_place_of_the_one_before(desk: Desk) -> None:
    desk.check(desk.alice, desk.offer())
    desk.bob.disconnect(desk.now)
    second = desk.offer()
    assert [one.offer for one in gathers(desk.check(desk.alice, second))] == [
        desk.messages(second)[0].sdp
    ]


def test_message_moved_to_another_address_of_its_recipient_is_refused(desk: Desk) -> None:
    desk.alice.move(desk.now, [("https://0.example/", None)])
    assert desk.alice.record.pending
    moved = [
        Send(mailbox, seal_message(desk.apps["bob"].suite, mailbox.pub, message.jws))
        for message in desk.messages(desk.offer())
        for mailbox in desk.alice.record.pending.mailboxes
    ]
    assert not gathers(desk.check(desk.alice, list(moved)))
    assert desk.alice.dropped == {"recipient": 1}


def test_mailbox_is_checked_from_0_at_first_and_every_hour(desk: Desk) -> None:
    alice = desk.restart(desk.apps["alice"])
    assert {poll.at for poll in alice.polls(desk.now)} == {0}
    desk.check(alice)
    sent = desk.offer()
    desk.now_s = 10.0
    desk.check(alice, sent)
    assert max(poll.at for poll in alice.polls(desk.now)) > 0
    desk.now_s = HOUR_S + 1
    assert {poll.at for poll in alice.polls(desk.now)} == {0}


def test_former_address_is_still_read_after_a_rotation(desk: Desk) -> None:
    # It goes to the address that is current now.
    late = desk.offer()
    announced = desk.alice.move(desk.now, [("https://0.example/", None)])
    desk.bob.disconnect(desk.now)
    desk.check(desk.bob, announced)
    newer = desk.gather(desk.bob, "offer")
    assert desk.messages(newer)[0].payload["to"] != desk.messages(late)[0].payload["to"]
    desk.now_s = 1.0
    restarted = desk.restart(desk.apps["alice"])
    restarted.machine.record = desk.alice.record
    desk.check(restarted)
    desk.check(restarted, newer)
    late_pub = next(effect.mailbox.pub for effect in late if isinstance(effect, Send))
    assert late_pub in {poll.mailbox.pub for poll in restarted.polls(desk.now)}


def test_address_is_replaced_after_30_days(desk: Desk) -> None:
    # At the address that Bob announced: the rotation is complete.
    desk.check(desk.bob, desk.alice.connect(desk.now))
    before = desk.messages(desk.gather(desk.bob, "offer"))[0].payload["connectoid"]
    desk.bob.disconnect(desk.now)
    assert desk.messages(desk.offer())[0].payload["connectoid"] == before
    desk.bob.disconnect(desk.now)
    desk.now_s = MONTH_S
    assert desk.messages(desk.offer())[0].payload["connectoid"] != before


def test_address_that_was_announced_stays_open_when_the_user_moves_again(desk: Desk) -> None:
    desk.check(desk.bob, desk.alice.move(desk.now, [("https://0.example/", None)]))
    # It goes to the address that was just announced.
    sent = desk.gather(desk.bob, "offer")
    desk.alice.move(desk.now, [("https://0.example/", None)])
    assert gathers(desk.check(desk.alice, sent))


def test_unshare_twice_is_a_mistake_of_the_app(desk: Desk) -> None:
    desk.alice.unshare(desk.now)
    with pytest.raises(UsageError):
        desk.alice.unshare(desk.now)


def test_channel_whose_other_end_cannot_open_the_challenge_is_closed(desk: Desk) -> None:
    for challenge in desk.open_channel():
        assert isinstance(challenge, Write)
        assert [type(effect) for effect in desk.hear(challenge.octets)] == [Write]
    assert [type(effect) for effect in desk.hear(bytes(32))] == [Close]
    assert desk.alice.dropped == {"channel": 1}


def test_challenge_of_another_attempt_is_refused(desk: Desk) -> None:
    old = desk.open_channel()
    desk.open_channel()
    for challenge in old:
        assert isinstance(challenge, Write)
        assert [type(effect) for effect in desk.hear(challenge.octets)] == [Close]
    assert desk.alice.dropped == {"channel": 1}


def test_attempt_goes_on_if_webrtc_never_gathers(desk: Desk) -> None:
    desk.bob.connect(desk.now)
    desk.tick(desk.bob, 10.1)
    assert desk.bob.attempt.state == "waiting"
    assert gathers(desk.tick(desk.bob, 60.2))


def test_what_a_former_peer_connection_says_is_ignored(desk: Desk) -> None:
    desk.bob.connect(desk.now)
    former = desk.bob.attempt.attempt_id
    desk.bob.disconnect(desk.now)
    desk.bob.connect(desk.now)
    sdp = make_sdp("offer", "late")
    assert not desk.bob.gathered(desk.now, former, sdp)
    desk.gather(desk.bob, "offer")
    assert not desk.bob.channel_opened(desk.now, former)
    assert not desk.bob.channel_message(desk.now, former, bytes(32))
    assert not desk.bob.channel_closed(desk.now, former)


def test_address_is_current_after_the_contact_has_written_there_and_the_last_but_one_is_forgotten(
    desk: Desk,
) -> None:
    first = desk.alice.record.current
    announced = desk.alice.move(desk.now, [("https://0.example/", None)])
    pending = desk.alice.record.pending
    assert (pending, desk.alice.record.current) != (None, None)
    assert desk.alice.record.current == first
    desk.check(desk.bob, announced)
    desk.check(desk.alice, desk.gather(desk.bob, "offer"))
    record = desk.alice.record
    assert (record.current, record.pending) == (pending, None)
    assert first
    assert record.former == (replace(first, left_us=record.rotated_us),)
