"""Floods: neither memory nor records grow, and replies are bounded."""

from __future__ import annotations

import pytest
from fake_wire import (
    MINUTE_S,
    Attacker,
    World,
    apart,
    count,
    held,
    invite,
    link_of,
    newest,
    open_link,
    paired,
    sdp,
    signed_by,
)

from connectoid import REASONS, Now, Send, Tell, limits
from connectoid.contact.effects import REPEATABLE

FLOOD = 10_000


@pytest.mark.slow
def test_ten_thousand_bad_messages_leave_nothing_behind(toy: World) -> None:
    alice, _ = apart(toy)
    alice.take("start")
    record = alice.saved
    before = held(alice.contact)
    own = newest(alice).address
    mallory = Attacker(toy)
    bad = [
        toy.seal(own, mallory.sign("offer", own, seq=number + 1, sdpOffer=sdp("offer")))
        if number % 4
        else f"QUJD{number}"
        for number in range(FLOOD)
    ]
    assert alice.take(*bad) == []
    assert alice.saved == record
    assert alice.contact.dropped["sender"] == FLOOD * 3 // 4
    assert alice.contact.dropped.total() == FLOOD + 1
    assert held(alice.contact) <= before + limits.MAX_SEEN + len(REASONS)
    assert alice.contact.poll_gap_s(Now(toy.wall_us, toy.monotonic_s + 100)) == limits.POLL_SLOW_S


def test_flood_of_hellos_under_one_key_gets_one_used_a_minute_and_leaves_room_for_another(
    toy: World,
) -> None:
    """Twenty in each of twenty minutes; then Bob's friend opens the link too."""
    alice, _ = paired(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    sent = 0
    for _ in range(20):
        for _ in range(6):
            hellos = [toy.seal(link.address, mallory.hello(link)) for _ in range(20)]
            sent += count(Send, alice.take(*hellos, address=link.address))
            toy.advance(10)
        toy.advance(0.5)
    used = mallory.received()
    assert {message.type for message in used} == {"used"}
    # The first of a key waits for none, and the second for none before it.
    assert len(used) == sent <= 20 + 1
    assert alice.record.used_to == (mallory.signer,)
    friend = open_link(toy, link)
    alice.poll()
    friend.poll()
    assert friend.told == ["used"]
    assert held(alice.contact) <= limits.MAX_SEEN + 50


@pytest.mark.parametrize(
    ("others", "heard"),
    [
        (limits.MAX_NEWLY_TOLD - 1, True),
        (limits.MAX_NEWLY_TOLD, False),
        (limits.MAX_NEWLY_TOLD + 1, False),
    ],
)
def test_ten_keys_are_told_within_a_minute_and_the_next_one_later(
    toy: World, others: int, heard: bool
) -> None:
    alice, _ = paired(toy)
    link = link_of(alice)
    hellos = [Attacker(toy).hello(link) for _ in range(others)]
    assert count(Send, alice.hear(*hellos, at=link.address)) == min(others, limits.MAX_NEWLY_TOLD)
    friend = Attacker(toy)
    alice.hear(friend.hello(link), at=link.address)
    assert len(friend.received()) == heard
    toy.advance(MINUTE_S)
    alice.hear(friend.hello(link), at=link.address)
    assert len(friend.received()) == 1 + heard


@pytest.mark.parametrize(
    ("others", "told"),
    [(limits.MAX_USED - 1, 0), (limits.MAX_USED, 1), (limits.MAX_USED + 1, 1)],
)
def test_thirty_two_keys_that_were_told_are_remembered(
    toy: World, others: int, told: int
) -> None:
    """A key that is forgotten is told again what a restart reads again."""
    alice, _ = paired(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    sealed = toy.seal(link.address, mallory.hello(link))
    alice.take(sealed, address=link.address)
    for _ in range(others):
        alice.hear(Attacker(toy).hello(link), at=link.address)
        toy.advance(MINUTE_S)
    assert len(alice.record.used_to) == min(others + 1, limits.MAX_USED)
    assert count(Send, alice.restarted().take(sealed, address=link.address)) == told


def test_used_goes_out_once_a_minute_to_a_key_that_was_told(toy: World) -> None:
    alice, _ = paired(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    sent = []
    for _ in range(8):
        sent.append(count(Send, alice.hear(mallory.hello(link), at=link.address)))
        toy.advance(20)
    assert sent == [1, 1, 0, 0, 1, 0, 0, 1]


def test_used_is_not_said_again_to_what_a_restart_reads_again(toy: World) -> None:
    """Otherwise an app that starts often would tell one stranger again and again."""
    alice, _ = paired(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    sealed = toy.seal(link.address, mallory.hello(link))
    for expected in ([1, 1], [0, 0], [0, 0]):
        effects = alice.take(sealed, address=link.address)
        assert [count(Send, effects), count(Tell, effects)] == expected
        toy.advance(120)
        alice = alice.restarted()
    assert len(alice.record.used_to) == 1
    alice.poll()
    again = alice.hear(mallory.hello(link), at=link.address)
    assert [count(Send, again), len(alice.record.used_to)] == [1, 1]


def test_flood_of_valid_messages_gets_one_reply_a_round_and_keeps_the_record_small(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    size = len(alice.saved)
    texts = [
        signed_by(bob, "offer", seq=bob.record.seq + number, sdpOffer=sdp("offer"))
        for number in range(1, 2_001)
    ]
    effects = alice.hear(*texts)
    assert count(Send, effects) == 1
    assert len(alice.saved) < size + 10
    assert held(alice.contact) <= limits.MAX_SEEN + 50


def test_ten_thousand_hellos_in_a_round_warn_once(toy: World) -> None:
    alice, _ = paired(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    effects = alice.hear(*(mallory.hello(link) for _ in range(100)), at=link.address)
    assert count(Tell, effects) == 1


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (limits.FLOODED_MESSAGES - 1, []),
        (limits.FLOODED_MESSAGES, ["flooded"]),
        (limits.FLOODED_MESSAGES + 1, ["flooded"]),
    ],
)
def test_inviter_is_told_once_that_her_link_is_flooded(
    toy: World, messages: int, told: list[str]
) -> None:
    alice = invite(toy)
    link = link_of(alice)
    junk = [f"QUJD{number}" for number in range(messages)]
    alice.take(*junk[:9], address=link.address)
    assert alice.told == []
    alice.take(*junk[9:], address=link.address)
    assert alice.told == told
    alice.take(*(f"QUJE{number}" for number in range(messages)), address=link.address)
    assert alice.told == ["flooded"]


def test_inviter_whose_link_was_opened_is_told_of_no_flood(toy: World) -> None:
    alice, _ = paired(toy)
    link = link_of(alice)
    told = list(alice.told)
    alice.take(*(f"QUJD{number}" for number in range(FLOOD)), address=link.address)
    assert alice.told == told


@pytest.mark.parametrize(
    ("after_s", "times"),
    [(limits.TELL_EVERY_S - 1, 1), (limits.TELL_EVERY_S, 2), (limits.TELL_EVERY_S + 1, 2)])
def test_reader_of_the_link_warns_the_inviter_once_an_hour(
    toy: World, after_s: float, times: int,
) -> None:
    """Whoever the hellos are of; the record keeps that they came."""
    alice, _ = paired(toy)
    link = link_of(alice)
    alice.hear(Attacker(toy).hello(link), at=link.address)
    told_s = toy.monotonic_s
    for at_s in (1.0, 600.0, after_s):
        toy.advance(told_s + at_s - toy.monotonic_s)
        alice.poll()
        alice.hear(Attacker(toy).hello(link), at=link.address)
    assert alice.told.count("opened_twice") == times
    assert len(alice.record.used_to) == 4


@pytest.mark.parametrize("event", sorted(REPEATABLE))
def test_what_others_can_bring_about_at_will_is_told_once_an_hour(toy: World, event: str) -> None:
    """All else is told each time."""
    machine = invite(toy).contact.machine
    for _ in range(3):
        with machine.step(toy.now) as effects:
            machine.tell(event)
            machine.tell("disconnected")
    assert effects == [Tell("disconnected")]
    toy.advance(limits.TELL_EVERY_S)
    with machine.step(toy.now) as effects:
        machine.tell(event)
    assert effects == [Tell(event)]
