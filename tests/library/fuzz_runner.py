"""A real runner among hostile contacts, readers of a link and a relay that lies.

An input is a script (fuzz_script.py). What a runner may spend on it stands in `Judge`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Mapping

from fake_wire import App, held, open_link
from fuzz_network import OWN, CountedSuite, JumpingLoop, Log, Place
from fuzz_script import EXTRA_LINES, HOSTILE, URLS, Script, Stage, Tape, cast
from mutation import KINDS, Mutator

from connectoid import Contact, Privacy
from connectoid.channel import MAX_QUEUED_MESSAGES
from connectoid.limits import AGAIN_AFTER_ANSWER_S, MAX_MAILBOXES, MAX_SEEN
from connectoid.messages import MEMBERS
from connectoid.sender import MAX_NEW_RELAYS

# ---------------------------------------------------------------------------------------
# The bounds.
# ---------------------------------------------------------------------------------------

# Of a contact, apart from the digests of what was read.
MAX_HELD = 200
# Seven records with the longest addresses, a hello and a welcome, in pages of 4 KiB.
MAX_STORE_GROWTH_BYTES = 7 * 24 * 1024
# Each is another one: `Complaints` logs none twice.
MAX_COMPLAINTS = 100


class Judge:
    """Fail if what others do costs a runner more than it may."""

    def __init__(self, stage: Stage, log: Log) -> None:
        self._stage = stage
        self._log = log
        # Where the runner's own clock goes on, each contact may connect once more.
        passed_s = stage.place.monotonic_s - stage.began_s
        turns = 2 + passed_s / AGAIN_AFTER_ANSWER_S
        self._own_work = stage.uses + len(stage.numbers) * turns

    def look(self) -> None:
        """Look at everything."""
        assert not self._log.faults, self._log.faults[0]
        assert self._log.complaints <= MAX_COMPLAINTS, "it complains again and again"
        self._look_at_tasks()
        self._look_at_strangers()
        self._look_at_work()
        self._look_at_memory()

    def _look_at_tasks(self) -> None:
        """One for the ticks, one to poll each relay, and one for each queue of the sender."""
        queues = len(self._stage.numbers) + len(self._stage.network.strangers)
        tasks = self._stage.count_tasks()
        assert tasks <= 1 + len(OWN) + queues, f"{tasks} tasks"

    def _look_at_strangers(self) -> None:
        """Others are asked if they were named, few of them for each contact, one reply for each."""
        strangers = self._stage.network.strangers
        assert strangers.keys() <= self._stage.named, "nobody has named it"
        for name in self._stage.numbers:
            urls = [url for url in strangers if name.lower() in url]
            assert len(urls) <= MAX_NEW_RELAYS, f"{len(urls)} relays that {name} has named"
        letters = sum(map(len, strangers.values()))
        assert letters <= self._most_sealed(), f"{letters} messages to others"

    def _look_at_work(self) -> None:
        """Each item is opened and verified once, and has one reply at most."""
        network = self._stage.network
        done = self._stage.place.counted.done
        assert done["open connectoid/1 message"] <= network.given, done
        assert done["open connectoid/1 question"] <= network.questions, done
        assert done["verify"] <= self._most_verified(), done
        assert done["sign"] <= self._most_signed(), (done, self._replies())
        assert done["seal"] <= self._most_sealed(), (done, self._replies())
        assert done["make_key"] <= MAX_MAILBOXES * self._replies(), (done, self._replies())
        assert self._stage.peers.gathered <= self._replies(), "too many connections"
        for channel in self._stage.face.channels:
            assert channel.taken <= MAX_QUEUED_MESSAGES, f"{channel.taken} wait for the app"
        assert self._stage.face.told <= 2 * self._replies(), "too many events"

    def _look_at_memory(self) -> None:
        """What is kept of each contact is bounded, in memory and in the store."""
        for contact in self._stage.runner._roster.contacts.values():
            assert held(contact) <= MAX_SEEN + MAX_HELD, f"{held(contact)} things are held"
        grown = self._stage.store_bytes() - self._stage.began_bytes
        assert grown <= MAX_STORE_GROWTH_BYTES, f"the store has {grown} bytes more"

    def _most_verified(self) -> float:
        """A `renew` has a proof besides, for one of two keys."""
        if self._stage.renewals:
            return 3 * self._stage.network.given
        return self._stage.network.given

    def _most_signed(self) -> float:
        """While a renewal is under way the old key signs a word ahead, with the new one's proof."""
        if self._stage.own_renewals:
            return 3 * self._replies()
        return self._replies()

    def _most_sealed(self) -> float:
        """Return how many mailboxes are written to."""
        if self._stage.own_renewals:
            return 2 * MAX_MAILBOXES * self._replies()
        return MAX_MAILBOXES * self._replies()

    def _replies(self) -> float:
        """Return how much the runner may send: what came, and what it does by itself."""
        return self._stage.network.given + self._own_work


async def check_honest(stage: Stage) -> None:
    """Fail unless Bob's call is answered, and Dave's hello."""
    place = stage.place
    stage.runner.set_privacy(Privacy())
    stage.peers.gathers = True
    bob = App(place, (Contact(place.suite, cast().others["Bob"], allow_http=False), []))
    bob.connect()
    dave = open_link(place, cast().links["Dave"])
    for _ in range(HONEST_ROUNDS):
        await asyncio.sleep(2.0)
        for app in (bob, dave):
            app.poll()
            app.tick()
        if bob.state == "joining" and dave.record.state in ("ready", "paired"):
            return
    raise AssertionError(f"Bob is {bob.state}, Dave {dave.record.state}")


# Of 2 s: a line that a relay has slowed down begins anew within a minute.
HONEST_ROUNDS = 60
# Until what has come is taken.
SETTLE_S = 10.0


async def play(octets: bytes, place: Place, log: Log) -> int:
    """Run a script against a runner, and judge; return how many messages the runner got."""
    stage = Stage(place)
    await stage.runner.start(stage.face)
    await Script(Tape(octets), stage).run()
    await asyncio.sleep(SETTLE_S)
    Judge(stage, log).look()
    await check_honest(stage)
    await stage.end()
    assert not log.faults, log.faults[0]
    return stage.network.given


# ---------------------------------------------------------------------------------------
# The target.
# ---------------------------------------------------------------------------------------

# Inputs before memory is measured: caches fill.
WARM_UP = 50
MAX_GROWTH_BYTES = 32 * 1024 * 1024


class Theatre:
    """What the process has before a script and still has behind it."""

    def __init__(self) -> None:
        self._played = 0
        self._first_bytes = 0
        self.log = Log()
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self.log)

    def play(self, octets: bytes) -> int:
        """Run one script, and look at threads and descriptors; return how many messages it had."""
        before = belongings()
        self.log.complaints = 0
        self.log.faults.clear()
        place = Place(CountedSuite(cast().made))
        place.advance(3_600)
        loop = JumpingLoop(place)
        try:
            messages = loop.run_until_complete(play(octets, place, self.log))
        finally:
            loop.run_until_complete(cancel_all())
            loop.close()
        assert belongings() == before, (belongings(), before)
        self._played += 1
        if self._played == WARM_UP:
            self._first_bytes = resident_bytes()
        return messages

    def close(self) -> None:
        """Fail if the process has grown."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self.log)
        if self._played > WARM_UP:
            grown = resident_bytes() - self._first_bytes
            assert grown <= MAX_GROWTH_BYTES, f"{grown} bytes more after {self._played} scripts"


LOGGERS = ("connectoid", "asyncio")


async def cancel_all() -> None:
    """End what a script that has failed has left."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def belongings() -> tuple[int, int]:
    """Return how many threads and descriptors this process has."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Return the memory of this process."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def try_runner(octets: bytes, theatre: Theatre) -> int:
    """What others do costs a runner no more than it may, and no honest contact anything.

    Returns how many messages the runner got.
    """
    return theatre.play(octets)


SAY = 2
# Of a message with one's own address.
CHOICES = 7


def say(name: str, kind: str, *choices: int) -> bytes:
    """Return the octets of a message, with choices for its members: 0 is what an honest one has."""
    who = [SAY, HOSTILE.index(name), tuple(MEMBERS).index(kind), 0, 0, 0]
    return bytes(who) + bytes(choices).ljust(CHOICES, b"\0")


def offer_to(url: int) -> bytes:
    """Return the octets of an offer of Mallory's, with a new address at a URL."""
    return say("Mallory", "offer", 0, 0, 0, 1, 0, 0, url, 0, url, 0, 0, 0)


def offer_with(line: int) -> bytes:
    """Return the octets of an offer of Mallory's with one of EXTRA_LINES."""
    return say("Mallory", "offer", 0, 0, 0, 0, 3, line, 0, 0, 0, 0)


PAUSE = bytes([0, 2])
PROVE = bytes([1, 0])
# Messages of one byte on a channel: as many as 63 times 20.
FLOOD = bytes([11, 1, 1, 0, 1, 65, 0, 255, 2])
SEEDS: Mapping[str, bytes] = {
    "nothing": b"",
    "a bit of all": bytes(range(1, 250, 3)),
    "new relays": offer_to(1) * 20,
    "new relays in a while": (offer_to(1) + PAUSE) * 20,
    "each URL": b"".join(offer_to(url) + PAUSE for url in range(len(URLS))),
    "each odd line": b"".join(offer_with(line) + PAUSE for line in range(len(EXTRA_LINES))),
    "a burst of offers": say("Mallory", "offer")[:3] + b"\xff",
    "a burst of hellos": bytes([5, 255]) + bytes(range(200)),
    "a burst of junk": bytes([7, 0, 3, 7, 7, 7, 255]) * 5,
    "messages made up": bytes([9, 2]) + bytes([1]) * 17 + bytes([0, 3]),
    "messages without end": bytes([14, 0, 4, 0, 5]),
    "calls of Lara": say("Lara", "call") + say("Lara", "answer") + PAUSE,
    "a welcome of Oscar": say("Oscar", "welcome", 0, 0, 1) + PAUSE,
    "an unshare": say("Mallory", "unshare") + PAUSE,
    "renewals": (say("Mallory", "renew") + PAUSE) * 3 + b"".join(
        bytes([SAY, 0, kind, 0, 1, 0, *bytes(CHOICES)]) + PAUSE for kind in range(len(MEMBERS))),
    "a channel that nobody reads": (offer_to(1) + PAUSE) * 2 + PROVE + FLOOD * 2 + PAUSE,
    "many channels": (offer_to(1) + PAUSE + PROVE + PAUSE) * 5,
}
MUTATOR = Mutator(KINDS, [bytes([number]) * 3 for number in range(16)], random_share=0.4)
TARGETS = {"runner": (try_runner, SEEDS)}
