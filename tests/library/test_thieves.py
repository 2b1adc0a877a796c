"""Seeded lives of three: an owner, her contact, and a thief with a copy of her device.

The relay loses, repeats and disorders messages, the thief says what he likes, and the owner renews.
Once the contact has her new key, nothing of the thief counts, and nothing is sealed to him.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest
from fake_wire import (
    App,
    World,
    apart,
    opened_with,
    sdp,
    settle,
    signed_by,
)

from connectoid import UsageError, limits

STEPS = 60
SEEDS = range(60)


class Lives:
    """Three who live by chance. The thief has all that the owner had when he began."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.draw = random.Random(seed)
        pair = [*apart(world)]
        self.draw.shuffle(pair)
        self.owner, self.other = pair
        self.thief = self.owner.restarted()
        # From now on what the owner makes is no longer the thief's.
        self.owners_keys = {self.owner.record.signer}
        self.is_shut_out = False

    def act(self) -> None:
        """Let somebody do something, and look at what became of it."""
        acts: list[Callable[[], object]] = [
            self.poll, self.poll, self.poll, self.tick, self.connect, self.lose, self.repeat,
            self.restart, self.renew, self.steal, self.steal, self.claim_renewal,
        ]
        self.draw.choice(acts)()
        self.world.advance(self.draw.choice((0.5, 2.0, 30.0, 400.0)))
        self.look()

    def look(self) -> None:
        """Check that the contact goes on with the owner alone, once it has heard of her key."""
        self.owners_keys.add(self.owner.record.signer)
        contact = self.other.record.contact
        assert contact in self.owners_keys
        if contact != self.thief.record.signer:
            self.is_shut_out = True
        if self.is_shut_out:
            assert self.other.record.state == "paired"
            assert contact in (self.owner.record.signer, self.owner.record.old_signer)

    # -- The honest two, and the relay ------------------------------------------------------

    def someone(self) -> App:
        """Return the owner or her contact."""
        return self.draw.choice((self.owner, self.other))

    def poll(self) -> None:
        """Let one of them read, perhaps from one mailbox alone."""
        app = self.someone()
        polls = [poll.mailbox.pub for poll in app.contact.polls(self.world.now)]
        self.draw.shuffle(polls)
        chosen = polls[: self.draw.choice((1, len(polls)))]
        app.do(app.contact.polled(
            self.world.now, {pub: list(self.world.boxes[pub]) for pub in chosen}))

    def tick(self) -> None:
        """Let one of them see the time."""
        self.someone().tick()

    def connect(self) -> None:
        """Let one of them want a connection."""
        self.someone().connect()

    def restart(self) -> None:
        """End one of the two programs, and start it again."""
        if self.draw.random() < 0.5:
            self.owner = self.owner.restarted()
        else:
            self.other = self.other.restarted()

    def renew(self) -> None:
        """Let the owner ask for a new key."""
        with contextlib.suppress(UsageError):
            self.owner.do(self.owner.contact.renew(self.world.now))

    def lose(self) -> None:
        """Lose what is in some mailbox."""
        if self.world.boxes:
            self.world.boxes[self.draw.choice(list(self.world.boxes))].clear()

    def repeat(self) -> None:
        """Put something old into its mailbox again."""
        pub = self.draw.choice(list(self.world.boxes))
        if self.world.boxes[pub]:
            self.world.put(pub, self.draw.choice(self.world.boxes[pub])[1])

    # -- The thief --------------------------------------------------------------------------

    def steal(self) -> None:
        """Say something in the owner's name; not the last word while that still counts."""
        kinds = ["moved", "call"]
        if self.thief.record.role == "opener":
            kinds = ["moved", "offer", "ready"]
        if self.is_shut_out:
            kinds.append("unshare")
        kind = self.draw.choice(kinds)
        ahead_us = self.draw.choice((0, 5_000_000, limits.MAX_SEQ_AHEAD_US))
        to = self.draw.choice(self.other.record.addresses)
        re = self.other.record.welcome_hash if kind == "ready" else None
        text = signed_by(
            self.thief, kind, to=to.address, seq=self.world.wall_us + ahead_us, re=re,
            sdpOffer=sdp("offer"))
        self.say(to.address, text)

    def claim_renewal(self) -> None:
        """Renew as the thief, who is second."""
        if not self.is_shut_out:
            return
        self.thief = self.thief.restarted()
        with contextlib.suppress(UsageError):
            self.thief.do(self.thief.contact.renew(self.world.now))

    def say(self, address: str, text: str) -> None:
        """Put a text into the mailboxes of an address."""
        for own in self.other.record.addresses:
            if own.address == address:
                for mailbox in own.mailboxes:
                    self.world.put(mailbox.pub, self.world.seal(address, text))

    # -- The end ------------------------------------------------------------------------------

    def end(self) -> None:
        """Let the owner renew at last, with both there: they agree, and the thief reads nothing."""
        self.renew()
        for app in (self.owner, self.other):
            app.do(app.contact.disconnect(self.world.now))
        self.world.advance(limits.AGAIN_IDLE_S)
        settle(self.owner, self.other, rounds=20)
        self.look()
        assert self.is_shut_out
        assert self.other.record.contact == self.owner.record.signer
        assert not self.owner.record.old_signer
        put = self.world.put_so_far
        for app in (self.owner, self.other):
            app.connect()
        settle(self.owner, self.other, rounds=80)
        assert (self.owner.state, self.other.state) == ("connected", "connected")
        keys = [key for own in self.thief.record.addresses for key in own.keys]
        boxes = {box.pub for own in self.owner.record.addresses for box in own.mailboxes}
        for pub in boxes:
            for at, sealed in self.world.boxes[pub]:
                assert at <= put or opened_with(self.world, keys, sealed) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_of_a_thief_counts_once_the_owner_was_first(toy: World, seed: int) -> None:
    lives = Lives(toy, seed)
    for _ in range(STEPS):
        lives.act()
    lives.end()


@pytest.mark.slow
def test_lives_are_long_enough_for_the_thief_to_be_shut_out_in_most_of_them(toy: World) -> None:
    """What is looked at happens: the owner renews early enough, and the thief still speaks."""
    shut_out = refused = 0
    for seed in SEEDS:
        lives = Lives(World(toy.suite), seed)
        for _ in range(STEPS):
            lives.act()
        shut_out += lives.is_shut_out
        dropped = lives.other.contact.dropped
        refused += dropped["sender"] + dropped["replaced"]
    assert shut_out > len(SEEDS) / 2
    assert refused > len(SEEDS)
