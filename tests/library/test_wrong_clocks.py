"""Clocks that are wrong, and contacts that come back from a backup."""

from __future__ import annotations

import pytest
from fake_wire import (
    DAY_S,
    RELAY,
    START_US,
    App,
    World,
    apart,
    count,
    invite,
    link_of,
    newest,
    open_link,
    sdp,
    settle,
    signed_by,
)

from connectoid import Contact, Effect, Now, Send, limits


@pytest.mark.parametrize("alice_us", [0, -1, 10**15, 9_007_199_254_740_000, 2**53, 2**63, 2**70])
def test_clocks_far_off_pair_and_connect_all_the_same(toy: World, alice_us: int) -> None:
    toy.wall_us = alice_us
    alice, _ = Contact.invite(toy.suite, toy.now, "Bob", [(RELAY, None)])
    toy.wall_us = START_US
    shifted = Shifted(toy, (alice, []), alice_us - START_US)
    bob = open_link(toy, link_of(shifted))
    settle(shifted, bob)
    assert (shifted.state, bob.state) == ("connected", "connected")
    assert 0 < shifted.record.seq < limits.MAX_SEQ


class Shifted(App):
    """An app whose wall clock is off."""

    def __init__(self, world: World, begun: tuple[Contact, list[Effect]], off_us: int) -> None:
        self.off_us = off_us
        super().__init__(ShiftedWorld(world, off_us), begun)


class ShiftedWorld(World):
    """Show another's world with a wall clock that is off."""

    def __init__(self, world: World, off_us: int) -> None:
        super().__init__(world.suite)
        self.of = world
        self.off_us = off_us
        self.boxes = world.boxes

    @property
    def now(self) -> Now:
        """Return the time of the clock that is off."""
        return Now(self.of.wall_us + self.off_us, self.of.monotonic_s)

    def put(self, pub: str, sealed: str) -> None:
        """Put it into the mailbox of the world."""
        self.of.put(pub, sealed)

    def advance(self, seconds: float) -> None:
        """Let time go by in the world."""
        self.of.advance(seconds)


def test_wall_clock_that_steps_back_or_off_keeps_seq_rising_and_messages_accepted(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    seqs = [alice.record.seq]
    day_us = limits.MAX_SEQ_AHEAD_US
    for wall_us in (START_US - day_us // 2, 0, START_US + day_us // 2, 5, 2**60, START_US):
        toy.wall_us = wall_us
        alice.do(alice.contact.disconnect(toy.now))
        alice.connect()
        seqs.append(alice.record.seq)
    assert seqs == sorted(set(seqs))
    assert seqs[-1] < limits.MAX_SEQ // 2
    bob.poll()
    assert bob.record.seen_seq == seqs[-1]


@pytest.mark.parametrize("wall_us", [-1, 0, 1, 10**12, START_US])
def test_opener_rotates_by_its_first_ready_whatever_the_clock_shows(
    toy: World, wall_us: int
) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    first = newest(bob).address
    alice.poll()
    toy.wall_us = wall_us
    bob.poll()
    assert bob.record.state == "ready"
    assert newest(bob).address != first
    # The ready that follows announces the same.
    pending = newest(bob).address
    toy.advance(limits.AGAIN_AFTER_ANSWER_S)
    bob.tick()
    assert newest(bob).address == pending


def test_wall_clock_that_was_far_ahead_is_no_harm_once_it_is_right(toy: World) -> None:
    alice, bob = apart(toy)
    toy.wall_us = START_US + 365 * limits.DAY_US
    alice.connect()
    alice.do(alice.contact.disconnect(toy.now))
    toy.wall_us = START_US + limits.DAY_US
    bob.poll()
    assert bob.contact.dropped == {"ahead": 1}
    alice.connect()
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_seq_accepted_by_a_clock_that_was_not_set_is_no_harm_once_it_is(toy: World) -> None:
    alice, bob = apart(toy)
    toy.wall_us = 0
    alice.hear(signed_by(bob, "offer", seq=limits.MAX_SEQ - 1, sdpOffer=sdp("offer")))
    assert alice.record.seen_seq == limits.MAX_SEQ - 1
    toy.wall_us = START_US + limits.DAY_US
    alice.do(alice.contact.disconnect(toy.now))
    bob.connect()
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")
    assert alice.record.seen_seq == bob.record.seq


def test_clock_set_back_by_days_lets_old_messages_be_repeated_until_the_contact_writes(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    old = signed_by(bob, "offer", sdpOffer=sdp("offer"))
    alice.hear(old)
    toy.advance(3 * DAY_S)
    bob.connect()
    alice.poll()
    newest_seq = alice.record.seen_seq
    toy.wall_us -= 3 * limits.DAY_US
    alice.hear(old)
    assert alice.record.seen_seq < newest_seq
    toy.wall_us += 3 * limits.DAY_US
    for app in (alice, bob):
        app.do(app.contact.disconnect(toy.now))
    bob.connect()
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")
    assert alice.record.seen_seq > newest_seq
    alice.hear(old)
    assert alice.record.seen_seq > newest_seq


def test_contact_restored_from_a_backup_still_connects_and_the_other_takes_its_seq(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    backup = bob.saved
    toy.advance(DAY_S)
    alice.connect()
    settle(alice, bob)
    old = bob.restarted(backup)
    alice.do(alice.contact.disconnect(toy.now))
    toy.advance(60)
    old.connect()
    settle(alice, old, rounds=20)
    assert (alice.state, old.state) == ("connected", "connected")


def test_contact_restored_from_a_backup_answers_of_all_that_is_replayed_the_hello_and_the_newest(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    backup = alice.saved
    toy.advance(DAY_S)
    for _ in range(3):
        bob.do(bob.contact.disconnect(toy.now))
        toy.advance(DAY_S)
        bob.connect()
        alice.poll()
    old = alice.restarted(backup)
    effects = old.poll()
    # The welcome again, and an answer or call.
    assert count(Send, effects) == 2
    assert old.record.seen_seq == alice.record.seen_seq
    assert old.record.contact == alice.record.contact


def test_invitation_restored_from_a_backup_is_bound_anew_and_the_first_bob_sees_used_or_silence(
    toy: World,
) -> None:
    alice = invite(toy)
    backup = alice.saved
    bob = open_link(toy, link_of(alice))
    settle(alice, bob)
    old = alice.restarted(backup)
    # The relay still has Bob's hello.
    old.poll()
    assert old.record.comparison == alice.record.comparison
    assert old.record.contact == bob.record.signer


def test_wall_clock_is_believed_up_to_half_of_the_largest_seq(toy: World) -> None:
    _, bob = apart(toy)
    for wall_us, believed in ((limits.MAX_SEQ // 2 - 1, True), (limits.MAX_SEQ // 2, False)):
        toy.wall_us = wall_us
        app = bob.restarted()
        app.connect()
        assert (app.record.seq >= wall_us) is believed
