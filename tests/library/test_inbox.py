"""Reading mailboxes: recipients, replays, the order of a round, the rhythm of checks."""

from __future__ import annotations

import pytest
from fake_wire import (
    DAY_S,
    MINUTE_S,
    OTHER_RELAY,
    RELAY,
    Attacker,
    World,
    apart,
    count,
    current_of,
    invite,
    link_of,
    newest,
    open_link,
    paired,
    read_by,
    rotate,
    sdp,
    settle,
    signed_by,
)

from connectoid import Gather, Now, Send, Tell, hash_jws, limits, parse_address
from connectoid.contact.contact import MAX_STEP_MESSAGES


def test_moved_recipient_is_refused(world: World) -> None:
    alice, bob = apart(world)
    elsewhere = Attacker(world).address
    alice.hear(signed_by(bob, "unshare", to=elsewhere))
    assert bob.record.current not in (None, newest(bob))
    bob.hear(signed_by(alice, "unshare", to=current_of(bob).address))
    assert (alice.contact.dropped["recipient"], bob.contact.dropped["recipient"]) == (1, 1)
    assert (alice.record.state, bob.record.state) == ("paired", "paired")


def test_message_of_one_contact_is_nothing_to_another(world: World) -> None:
    alice, bob = apart(world)
    to_carol, carol = apart(world)
    for address in (newest(to_carol).address, newest(alice).address):
        to_carol.hear(signed_by(bob, "unshare", to=address))
    assert to_carol.contact.dropped == {"recipient": 1, "sender": 1}
    assert (to_carol.record.state, carol.record.state) == ("paired", "paired")


def test_own_messages_reflected_are_refused(world: World) -> None:
    alice, bob = paired(world)
    both = {"sdpAnswer": sdp("answer"), "sdpOffer": sdp("offer")}
    mine = [
        signed_by(alice, kind, to=newest(alice).address, re="A" * 43, **both)
        for kind in ("offer", "ready", "unshare", "call", "answer")
    ]
    alice.hear(*mine)
    assert alice.contact.dropped == {"sender": 3, "unexpected": 2}
    before = len(bob.done)
    bob.take(
        *(sealed for _, sealed in world.boxes[parse_address(bob.record.contact_address)[0].pub])
    )
    assert bob.contact.dropped["seal"] >= 1
    assert bob.done[before:] == []


def test_same_bytes_again_are_refused_without_opening_them(toy: World) -> None:
    alice, bob = apart(toy)
    sealed = toy.seal(newest(alice).address, signed_by(bob, "offer", sdpOffer=sdp("offer")))
    assert count(Send, alice.take(sealed)) == 1
    toy.advance(MINUTE_S)
    assert alice.take(sealed, sealed) == []
    assert alice.contact.dropped == {"replay": 2}


def test_same_message_sealed_anew_is_refused_also_after_a_restart_and_in_another_mailbox(
    world: World,
) -> None:
    alice, bob = apart(world)
    text = signed_by(bob, "offer", sdpOffer=sdp("offer"))
    alice.hear(text)
    for app in (alice, alice.restarted()):
        before = app.record
        assert app.take(world.seal(newest(alice).address, text)) == []
        assert app.contact.dropped["replay"] == 1
        assert app.record == before


@pytest.mark.parametrize(("ahead_us", "reason"), [(-1, ""), (0, ""), (1, "ahead")])
def test_seq_is_at_most_a_day_ahead_of_a_clock_that_is_set(
    toy: World, ahead_us: int, reason: str
) -> None:
    alice, bob = apart(toy)
    seq = toy.wall_us + limits.MAX_SEQ_AHEAD_US + ahead_us
    before = alice.record
    alice.hear(signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer")))
    assert alice.contact.dropped == ({reason: 1} if reason else {})
    assert (alice.record == before) is bool(reason)


def test_owner_of_a_copied_device_is_heard_after_a_day_and_can_always_unshare(toy: World) -> None:
    alice, bob = apart(toy)
    seq = toy.wall_us + limits.MAX_SEQ_AHEAD_US
    thief = signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer"))
    alice.hear(thief)
    bob.connect()
    alice.poll()
    assert alice.contact.dropped == {"replay": 1}
    assert alice.record.seen_seq == seq
    toy.advance(DAY_S + 1)
    bob.do(bob.contact.disconnect(toy.now))
    bob.connect()
    alice.poll()
    assert alice.record.seen_seq == bob.record.seq > seq
    seq = toy.wall_us + limits.MAX_SEQ_AHEAD_US
    alice.hear(signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer")))
    assert alice.record.seen_seq == seq
    bob.unshare()
    assert bob.record.seq < seq
    alice.poll()
    assert (alice.record.state, alice.record.why) == ("ended", "unshared")


@pytest.mark.parametrize("back", [0, 1, 1_000_000])
def test_older_seq_is_refused(toy: World, back: int) -> None:
    alice, bob = apart(toy)
    seq = alice.record.seen_seq + 2_000_000
    alice.hear(signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer")))
    alice.hear(signed_by(bob, "offer", seq=seq - back, sdpOffer=sdp("offer")))
    assert alice.contact.dropped == {"replay": 1}
    assert (alice.record.state, alice.record.seen_seq) == ("paired", seq)


def test_seq_counts_over_all_mailboxes_and_old_addresses(toy: World) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    seq = alice.record.seen_seq
    former = alice.record.former[-1].address
    old = signed_by(bob, "offer", seq=seq, to=former, sdpOffer=sdp("offer"))
    before = alice.contact.dropped["replay"]
    alice.hear(old, at=former)
    assert alice.contact.dropped["replay"] == before + 1
    assert alice.record.state == "paired"


def test_one_message_in_three_mailboxes_is_taken_once(toy: World) -> None:
    relays: list[tuple[str, str | None]] = [
        (RELAY, None),
        (OTHER_RELAY, "key"),
        ("https://third.example.org/", None),
    ]
    alice = invite(toy, *relays)
    bob = open_link(toy, link_of(alice))
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")
    assert len(newest(alice).mailboxes) == len(newest(bob).mailboxes) == 3
    hellos = [
        sealed for box in parse_address(link_of(alice).address) for _, sealed in toy.boxes[box.pub]
    ]
    assert len(set(hellos)) == 3
    assert "opened_twice" not in alice.told
    assert alice.told.count("paired") == bob.told.count("paired") == 1


def test_messages_of_one_round_are_taken_in_order_of_seq_and_only_the_newest_is_answered(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    seq = bob.record.seq
    offers = [signed_by(bob, "offer", seq=seq + step, sdpOffer=sdp("offer")) for step in (3, 1, 2)]
    effects = alice.hear(*offers)
    assert count(Send, effects) == 1
    assert alice.contact.dropped == {}
    assert alice.record.seen_seq == seq + 3
    [answer] = [message for message in read_by(bob) if message.type == "answer"][-1:]
    assert answer.payload["re"] == hash_jws(offers[0])


def test_welcome_ready_and_used_again_change_nothing(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    settle(alice, bob)
    records = alice.record, bob.record
    for app in (alice.restarted(), bob.restarted()):
        # From 0: all again.
        app.poll()
        assert app.record in records
        assert count(Gather, app.done) == count(Tell, app.done) == 0


@pytest.mark.parametrize(
    ("seq", "reason"),
    [
        (-1, "payload"),
        (0, "payload"),
        (limits.MAX_SEQ - 2, ""),
        (limits.MAX_SEQ - 1, ""),
        (limits.MAX_SEQ, "payload"),
        (limits.MAX_SEQ + 1, "payload"),
        (True, "payload"),
        (1.0, "payload"),
        ("9", "payload"),
    ],
)
def test_seq_is_a_positive_integer_below_two_to_the_53(
    toy: World, seq: object, reason: str
) -> None:
    alice, bob = apart(toy)
    # By a clock that is set the largest would be `ahead`.
    toy.wall_us = 0
    alice.hear(signed_by(bob, "offer", seq=seq, sdpOffer=sdp("offer")))
    assert alice.contact.dropped == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (limits.MAX_SEEN - 2, "replay"),
        (limits.MAX_SEEN - 1, "replay"),
        (limits.MAX_SEEN, "encoding"),
    ],
)
def test_so_many_messages_are_remembered_by_their_bytes(
    toy: World, others: int, reason: str
) -> None:
    alice = invite(toy)
    alice.take("=", *(f"={number}" for number in range(others)), address=link_of(alice).address)
    before = alice.contact.dropped[reason]
    alice.take("=", address=link_of(alice).address)
    assert alice.contact.dropped[reason] == before + 1


@pytest.mark.parametrize(("more", "rests"), [(-1, False), (0, False), (1, True)])
def test_mailbox_that_brings_too_much_at_once_rests_and_the_others_do_not(
    toy: World, more: int, rests: bool
) -> None:
    """Good messages count like others: whoever floods chooses which they are."""
    alice, _ = paired(toy)
    mailboxes = set(alice.contact.mailboxes)
    flooded = set(parse_address(link_of(alice).address))
    toy.advance(MINUTE_S)
    count = limits.MAX_BURST_MESSAGES + more
    junk = [f"QUJD{number}" for number in range(count)]
    alice.take(*junk, address=link_of(alice).address)
    now = Now(toy.wall_us, toy.monotonic_s)
    resting = set(alice.contact.resting(now))
    assert resting == (flooded if rests else set())
    assert {poll.mailbox for poll in alice.contact.polls(now)} == mailboxes - resting
    toy.advance((count - 1) / limits.BURST_PER_S)
    assert bool(alice.contact.resting(Now(toy.wall_us, toy.monotonic_s))) is rests
    toy.advance(1 / limits.BURST_PER_S)
    assert not alice.contact.resting(Now(toy.wall_us, toy.monotonic_s))


def test_mailbox_that_brings_a_little_in_each_round_rests_in_the_end(toy: World) -> None:
    """Whoever floods it gains nothing by staying below the bound of one round."""
    alice, _ = paired(toy)
    brought = 0
    for turn in range(100):
        if not alice.contact.resting(Now(toy.wall_us, toy.monotonic_s)):
            junk = [f"QU{turn}-{number}" for number in range(limits.MAX_BURST_MESSAGES)]
            alice.take(*junk, address=link_of(alice).address)
            brought += len(junk)
        toy.advance(2)
    assert brought <= 200 * limits.BURST_PER_S + 2 * limits.MAX_BURST_MESSAGES


def test_polls_are_fast_for_ninety_seconds_after_something_and_else_at_most_66_s_apart(
    toy: World,
) -> None:
    alice, bob = apart(toy)

    def gap(after_s: float) -> float:
        return alice.contact.poll_gap_s(Now(toy.wall_us, toy.monotonic_s + after_s))

    toy.advance(1_000)
    assert gap(0) == limits.POLL_SLOW_S <= 66
    alice.take("garbage")
    assert gap(0) == limits.POLL_SLOW_S
    alice.connect()
    assert (gap(0), gap(89.9), gap(90)) == (2.0, 2.0, limits.POLL_SLOW_S)
    toy.advance(1_000)
    alice.hear(signed_by(bob, "ready", re="A" * 43))
    assert (gap(0), gap(89.9), gap(90)) == (2.0, 2.0, limits.POLL_SLOW_S)


def test_check_is_from_zero_at_the_start_and_once_an_hour(toy: World) -> None:
    alice = invite(toy)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [0]
    alice.take("=", address=link_of(alice).address)
    cursor = toy.put_so_far
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [cursor]
    toy.advance(limits.ZERO_EVERY_S - 1)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [cursor]
    toy.advance(1)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [0]
    alice.poll()
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [cursor]
    assert [poll.at for poll in alice.restarted().contact.polls(toy.now)] == [0]


def test_cursor_never_goes_back_and_is_one_for_each_mailbox(toy: World) -> None:
    alice = invite(toy, (RELAY, None), (OTHER_RELAY, None))
    one, other = (poll.mailbox.pub for poll in alice.contact.polls(toy.now))
    alice.contact.polled(toy.now, {one: [(9, "="), (5, "=")], "unknown": [(99, "=")]})
    alice.contact.polled(toy.now, {one: [], other: [(3, "=")]})
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [9, 3]


def test_numbered_messages_at_the_invitation_are_refused_but_unshare(toy: World) -> None:
    alice, bob = apart(toy)
    address = link_of(alice).address
    alice.hear(signed_by(bob, "offer", to=address, sdpOffer=sdp("offer")), at=address)
    assert alice.contact.dropped == {"unexpected": 1}
    alice.hear(signed_by(bob, "unshare", to=address), at=address)
    assert alice.record.why == "unshared"


def test_numbered_message_before_the_welcome_is_refused(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    toy.drop(newest(bob).address)
    for kind in ("call", "unshare", "answer"):
        bob.hear(signed_by(alice, kind, re="A" * 43, sdpAnswer=sdp("answer")))
    assert bob.contact.dropped == {"sender": 3}
    assert bob.record.state == "opened"


def test_hour_that_ends_while_a_check_waits_does_not_skip_the_check_from_zero(toy: World) -> None:
    alice = invite(toy)
    alice.poll()
    toy.advance(limits.ZERO_EVERY_S - 1)
    [asked] = alice.contact.polls(toy.now)
    toy.advance(2)
    alice.do(alice.contact.polled(toy.now, {asked.mailbox.pub: []}))
    alice.take("=", address=link_of(alice).address)
    assert [poll.at for poll in alice.contact.polls(toy.now)] == [0]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_so_many_messages_are_read_in_a_step_and_the_others_in_the_next(
    toy: World, more: int
) -> None:
    alice = invite(toy)
    (poll,) = alice.contact.polls(toy.now)
    messages = MAX_STEP_MESSAGES + more
    found = [(at, f"QUJ{at}") for at in range(1, messages + 1)]
    alice.do(alice.contact.polled_in_part(toy.now, {poll.mailbox.pub: found}))
    assert alice.contact.is_behind == (more > 0)
    alice.do(alice.contact.polled_in_part(toy.now))
    assert not alice.contact.is_behind
    assert alice.contact.dropped.total() == messages


def test_round_in_parts_comes_to_the_same_as_one_that_is_taken_at_once(toy: World) -> None:
    """Its messages are sorted, and only the newest asks for a connection."""
    alice, bob = apart(toy)
    texts = [
        signed_by(bob, "offer", seq=bob.record.seq + number, sdpOffer=sdp("offer"))
        for number in range(3 * MAX_STEP_MESSAGES, 0, -1)
    ]
    own = newest(alice)
    sealed = [toy.seal(own.address, text) for text in texts]
    pub = own.mailboxes[0].pub
    found = list(enumerate(sealed, 1))
    done = alice.do(alice.contact.polled_in_part(toy.now, {pub: found}))
    while alice.contact.is_behind:
        # What an app asks comes in between.
        alice.do(alice.contact.verify(toy.now))
        done += alice.do(alice.contact.polled_in_part(toy.now))
    assert alice.record.seen_seq == bob.record.seq + len(texts)
    assert alice.contact.dropped.total() == 0
    assert count(Gather, done) == 1
