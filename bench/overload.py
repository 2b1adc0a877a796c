"""Print how a relay serves a well-behaved client while others overload it.

Alice is within all limits: a check every 20 ms on a kept connection and one every 100 ms on a
fresh one, a message every 200 ms that she remembers once it is acknowledged. The others come
from other addresses of 127.0.0.0/8. At the end every acknowledged message must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import select
import signal
import socket
import sqlite3
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import common

# The reach: the delay of 99 % of Alice's requests, and no refusal.
MOST_DELAY_S = 1.0
REACH = "p99 1 s, none"
# One more connection is beyond the limit in all, so here her fresh ones are refused.
BEYOND = ("connections beyond the limit in all", "fresh")
# The memory is flat: at its peak at most this many times what it was before.
MOST_GROWTH = 1.25
# After this time all must be as before, and is measured.
RECOVERY_S = 5.0
AFTER_S = 2.0
# Alice's 3,300 requests a minute are within the limits, those of the others beyond; and half
# requests end within the time of a measurement. All other limits are the defaults.
FLAGS = ("--rate", "6000", "--max-sends", "600", "--request-timeout", "4", "--udp")
# The defaults.
MAX_CONNECTIONS = 10_000
PER_SOURCE = 256

ALICE = "127.0.0.9"
CHECK_EVERY_S = 0.02
# Every 5th check is a fresh one; every 10th comes with a send.
FRESH_EVERY = 5
SEND_EVERY = 10
# Each has room for 32 messages of one source.
ALICES_BOXES = 40
# Octets of a sealed message.
SEALED_BYTES = 1_800

CROWD_BOXES = 300
SLOW = 2_000
SLOW_SOURCES = 20
SLOW_BYTE_EVERY_S = 2.0
# Checks that each of the 500 clients always has under way: 5,000 in all.
PIPELINED = 10
CHECKERS = 500
CHECKING_SOURCES = 10
# Four times as many as the queue of the threads has places.
SENDERS = 2_000
SENDING_SOURCES = 20
# How many sends let caches and heap grow to their size.
WARM_UP_S = 3.0
# Until the crowds are there.
GATHER_S = 0.5
UDP_PER_S = 10_000
# Of the crowds: on one core they would keep Alice from asking, and it is not the machine that is
# measured.
NICENESS = 10
# Between two looks at the relay's memory.
TRACE_S = 0.05
PUBS = [common.Owner(1_000 + number).pub for number in range(CROWD_BOXES)]

# ---------------------------------------------------------------------------------------
# The crowds. Each runs in a process of its own until it is told to stop, and returns what
# it got.
# ---------------------------------------------------------------------------------------


class Got:
    """Replies by name, acknowledged messages, the seconds that refusals took to come."""

    def __init__(self) -> None:
        self.replies: Counter[str] = Counter()
        self.acked: list[str] = []
        self.refusal_s: list[float] = []


def name_of(status: int, body: bytes) -> str:
    """Return a name for a reply."""
    if status == 200:
        return "ok"
    return body.partition(b'"error": "')[2].partition(b'"')[0].decode("ascii") or "closed"


def source(number: int) -> str:
    """Return the address of one of the others."""
    return f"127.0.1.{1 + number % 250}"


def too_many_of(sources: int, port: int, stop: Event) -> Got:
    """Open connections without end, and do nothing on them."""
    got = Got()
    with common.Crowd() as crowd:
        for number in itertools.count():
            if stop.is_set():
                break
            with contextlib.suppress(OSError):
                crowd.join(port, number, source(number % sources))
                got.replies["connected"] += 1
            for _, status, body in crowd.turn(0):
                got.replies[name_of(status, body)] += 1
        got.replies["open at the end"] = len(crowd.members)
    return got


def too_many_of_each(port: int, stop: Event) -> Got:
    """Open connections beyond the limit of a source, from 10: there is room for others."""
    return too_many_of(10, port, stop)


def too_many_in_all(port: int, stop: Event) -> Got:
    """Open connections beyond the limit of all: 41 sources may have 10,496."""
    return too_many_of(1 + -(-MAX_CONNECTIONS // PER_SOURCE), port, stop)


class Asked(NamedTuple):
    """A request under way: its message, if it is a send, and when it began."""

    sealed: str
    begin_s: float


class Flood:
    """Many clients that ask without a pause."""

    def __init__(
        self, request_of: Callable[[random.Random, int], tuple[bytes, str]],
        clients: int, sources: int, pipelined: int,
    ) -> None:
        self.request_of = request_of
        self.clients = clients
        self.sources = sources
        # Requests that each client always has under way.
        self.pipelined = pipelined
        self.got = Got()
        self._crowd = common.Crowd()
        self._chance = random.Random(7)
        self._serial = itertools.count()
        self._joined = itertools.count()
        self._under_way: dict[common.Member, deque[Asked]] = {}

    def run(self, port: int, stop: Event) -> Got:
        """Ask until it is time to stop; return what all got."""
        with self._crowd:
            while not stop.is_set():
                timeout_s = 0.01
                if len(self._crowd.members) < self.clients:
                    timeout_s = 0.0
                    self._join(port)
                for heard in self._crowd.turn(timeout_s):
                    self._take(heard)
        return self.got

    def _join(self, port: int) -> None:
        address = source(30 + next(self._joined) % self.sources)
        with contextlib.suppress(OSError):
            member = self._crowd.join(port, 0, address)
            self._under_way[member] = deque()
            self._ask(member, self.pipelined)

    def _ask(self, member: common.Member, count: int) -> None:
        octets = []
        for _ in range(count):
            request, sealed = self.request_of(self._chance, next(self._serial))
            octets.append(request)
            self._under_way[member].append(Asked(sealed, time.perf_counter()))
        self._crowd.say(member, b"".join(octets))

    def _take(self, heard: common.Heard) -> None:
        name = name_of(heard.status, heard.body)
        self.got.replies[name] += 1
        if not heard.status:
            del self._under_way[heard.member]
            return
        self._count(name, self._under_way[heard.member])
        self._ask(heard.member, 1)

    def _count(self, name: str, under_way: deque[Asked]) -> None:
        # The relay may refuse a client before it has asked for anything.
        asked = Asked("", 0.0)
        if under_way:
            asked = under_way.popleft()
        if name != "ok":
            self.got.refusal_s.append(time.perf_counter() - asked.begin_s)
        elif asked.sealed:
            self.got.acked.append(asked.sealed)


def any_check(chance: random.Random, _serial: int) -> tuple[bytes, str]:
    """Return a check."""
    return common.http_request(common.check(chance.choice(PUBS), common.LATER_AT)), ""


def any_send(chance: random.Random, serial: int) -> tuple[bytes, str]:
    """Return a send whose data is unique, by process and number."""
    mark = b"%d:%d:" % (os.getpid(), serial)
    sealed = common.encode(mark + chance.randbytes(SEALED_BYTES))
    return common.http_request(common.send(chance.choice(PUBS), sealed)), sealed


def too_many_checks(port: int, stop: Event) -> Got:
    """Check without a pause."""
    return Flood(any_check, CHECKERS, CHECKING_SOURCES, PIPELINED).run(port, stop)


def too_many_sends(port: int, stop: Event) -> Got:
    """Send without a pause."""
    return Flood(any_send, SENDERS, SENDING_SOURCES, 1).run(port, stop)


def slow_senders(port: int, stop: Event) -> Got:
    """Send half a request, then a byte every two seconds, from 2,000 connections.

    A client that is cut off comes again. The number of a member is how many bytes it has sent.
    """
    got = Got()
    whole = common.http_request(common.check(PUBS[0]))
    half = whole[:len(whole) // 2]
    next_s = time.perf_counter()
    with common.Crowd() as crowd:
        for number in itertools.count():
            if stop.is_set():
                break
            timeout_s = 0.05
            if len(crowd.members) < SLOW:
                timeout_s = 0.0
                with contextlib.suppress(OSError):
                    crowd.join(port, len(half), source(100 + number % SLOW_SOURCES), half)
                    got.replies["connected"] += 1
            for _, status, body in crowd.turn(timeout_s):
                got.replies[name_of(status, body)] += 1
            if time.perf_counter() > next_s:
                next_s = time.perf_counter() + SLOW_BYTE_EVERY_S
                say_a_byte(crowd, whole)
    return got


def say_a_byte(crowd: common.Crowd, whole: bytes) -> None:
    """Let each member send one more byte."""
    for member in tuple(crowd.members.values()):
        crowd.say(member, whole[member.number:member.number + 1])
        member.number += 1


def junk_of(chance: random.Random) -> list[bytes]:
    """Return datagrams that are nothing: noise, cut-off JSON, cut-off STUN."""
    check = b'{"pub": "%s", "action": "check", "at": 0}' % PUBS[0].encode("ascii")
    stun = b"\0\1\0\x08\x21\x12\xa4\x42"
    junk = []
    for _ in range(50):
        junk.append(chance.randbytes(chance.randrange(1, 1_200)))
        junk.append(check[:chance.randrange(1, len(check))])
        junk.append(stun + chance.randbytes(chance.randrange(20)))
    return junk


def junk_datagrams(port: int, stop: Event) -> Got:
    """Send 10,000 datagrams of junk a second."""
    got = Got()
    chance = random.Random(8)
    junk = junk_of(chance)
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind((source(200), 0))
        udp.connect((common.HOST, port))
        begin_s = time.perf_counter()
        sent = 0
        while not stop.is_set():
            while sent < UDP_PER_S * (time.perf_counter() - begin_s):
                with contextlib.suppress(OSError):
                    udp.send(chance.choice(junk), socket.MSG_DONTWAIT)
                sent += 1
            time.sleep(0.002)
        got.replies["datagrams sent"] += sent
        while select.select([udp], [], [], 0)[0]:
            udp.recv(2048)
            got.replies["datagrams answered"] += 1
    return got


Kind = tuple[Callable[[int, Event], Got], ...]
WARM_UP: Kind = (too_many_sends,)
KINDS: dict[str, Kind] = {
    "connections beyond the limit of a source": (too_many_of_each,),
    "connections beyond the limit in all": (too_many_in_all,),
    "checks without a pause": (too_many_checks,),
    "sends without a pause": (too_many_sends,),
    "2,000 slow senders": (slow_senders,),
    "10,000 datagrams of junk a second": (junk_datagrams,),
    "all at once": (
        too_many_of_each, too_many_checks, too_many_sends, slow_senders, junk_datagrams),
}


def run_crowd(
    crowd: Callable[[int, Event], Got], port: int, stop: Event, result: Connection,
) -> None:
    """Be a process with a crowd."""
    # Ctrl-C is for the parent, which tells when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    with result:
        result.send(crowd(port, stop))


@contextlib.contextmanager
def crowds(kind: Kind, port: int) -> Iterator[list[Got]]:
    """Run the crowds of a kind meanwhile; the list is filled at the end with what they got."""
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    got: list[Got] = []
    running = []
    for crowd in kind:
        parent, child = context.Pipe(duplex=False)
        process = context.Process(
            target=run_crowd, args=(crowd, port, stop, child), daemon=True)
        process.start()
        child.close()
        running.append((process, parent))
    try:
        yield got
    finally:
        stop.set()
        for process, parent in running:
            # A process that has failed has said so on stderr.
            with contextlib.suppress(EOFError):
                got.append(parent.recv())
            process.join(10)


# ---------------------------------------------------------------------------------------
# Alice.
# ---------------------------------------------------------------------------------------


class Life:
    """What Alice got in some time: seconds by kind of request, replies, the relay's most KiB."""

    def __init__(self) -> None:
        self.taken_s: dict[str, list[float]] = {"kept": [], "fresh": [], "send": []}
        self.replies: Counter[str] = Counter()
        self.peak_kib = 0

    def spread(self) -> str:
        """Return how long all requests took."""
        return common.spread_ms([each for taken_s in self.taken_s.values() for each in taken_s])


class Alice:
    """A client within all limits, and what she remembers."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.owners = [common.Owner(number + 1) for number in range(ALICES_BOXES)]
        self.acked: list[list[str]] = [[] for _ in self.owners]
        self._turns = itertools.count()
        self._kept: socket.socket | None = None

    def live(self, seconds: float, pid: int) -> Life:
        """Ask for some time, and look at the relay's memory now and then."""
        life = Life()
        next_s = time.perf_counter()
        trace_s = next_s
        end_s = next_s + seconds
        while next_s < end_s:
            self._take_turn(life)
            if time.perf_counter() > trace_s:
                life.peak_kib = max(life.peak_kib, common.memory_kib(pid))
                trace_s = time.perf_counter() + TRACE_S
            next_s = max(next_s + CHECK_EVERY_S, time.perf_counter())
            time.sleep(max(0.0, next_s - time.perf_counter()))
        return life

    def _take_turn(self, life: Life) -> None:
        turn = next(self._turns)
        kinds = ["kept"]
        if turn % FRESH_EVERY == 0:
            kinds = ["fresh"]
        if turn % SEND_EVERY == 1:
            kinds.append("send")
        for kind in kinds:
            begin_s = time.perf_counter()
            life.replies[f"{kind}: {self._do(kind)}"] += 1
            life.taken_s[kind].append(time.perf_counter() - begin_s)

    def _do(self, kind: str) -> str:
        """Do one request and return the name of its reply."""
        try:
            if kind == "send":
                return self._send()
            return self._check(fresh=kind == "fresh")
        except TimeoutError:
            self._hang_up()
            return "time-out"
        except (OSError, ValueError):
            self._hang_up()
            return "closed"

    def _hang_up(self) -> None:
        if self._kept:
            self._kept.close()
        self._kept = None

    def _check(self, *, fresh: bool) -> str:
        request = common.check(self.owners[0].pub, common.LATER_AT)
        if not fresh:
            return self._ask(request)
        with common.connect(self.port, ALICE) as client:
            client.sendall(common.http_request(request, close=True))
            return name_of(*common.read_reply(client))

    def _ask(self, request: object) -> str:
        self._kept = self._kept or common.connect(self.port, ALICE)
        self._kept.sendall(common.http_request(request))
        return name_of(*common.read_reply(self._kept))

    def _send(self) -> str:
        number = random.randrange(ALICES_BOXES)
        sealed = common.encode(random.randbytes(SEALED_BYTES))
        name = self._ask(common.send(self.owners[number].pub, sealed))
        if name == "ok":
            self.acked[number].append(sealed)
        return name

    def lost(self) -> int:
        """Receive all, and return how many acknowledged messages are missing."""
        lost: set[str] = set()
        for owner, acked in zip(self.owners, self.acked, strict=True):
            received = common.receive_all(self.port, owner, ALICE)
            lost |= set(acked) - {sealed for _, sealed in received}
        return len(lost)


# ---------------------------------------------------------------------------------------
# The run.
# ---------------------------------------------------------------------------------------


def in_words(replies: Counter[str]) -> str:
    """Return replies and how many there were, the most frequent first."""
    said = ", ".join(f"{name} {count:,}" for name, count in replies.most_common())
    return said or "nothing"


def overload(kind: str, alice: Alice, relay: common.RelayProcess, seconds: float) -> list[Got]:
    """Overload the relay in one way and print what came of it; return what the others got."""
    before_kib = common.memory_kib(relay.pid)
    normal = common.metrics(relay.port)["connectoid_connections"]
    cpu_s = common.cpu_s(relay.pid)
    begin_s = time.perf_counter()
    with crowds(KINDS[kind], relay.port) as got:
        time.sleep(GATHER_S)
        life = alice.live(seconds, relay.pid)
        used = (common.cpu_s(relay.pid) - cpu_s) / (time.perf_counter() - begin_s)
    time.sleep(RECOVERY_S)
    after_kib = common.memory_kib(relay.pid)
    show_alice(kind, life)
    show_others(kind, got)
    memory = " / ".join(f"{kib / 1024:.1f}" for kib in (before_kib, life.peak_kib, after_kib))
    common.row(
        f"{kind}: memory before / peak / 5 s after; CPU of the relay",
        f"{memory} MiB; {100 * used:.0f} %", "flat", life.peak_kib <= before_kib * MOST_GROWTH)
    show_recovery(kind, alice, relay, normal)
    return got


def show_alice(kind: str, life: Life) -> None:
    """Print what Alice got."""
    for name, taken_s in life.taken_s.items():
        refused = len(taken_s) - life.replies[f"{name}: ok"]
        what = f"{kind}: Alice's {name}, p50 / p99 / longest; refused"
        measured = f"{common.spread_ms(taken_s)}; {refused} of {len(taken_s)}"
        if (kind, name) == BEYOND:
            common.row(what, measured)
        else:
            served = common.percentile(taken_s, 99) <= MOST_DELAY_S and not refused
            common.row(what, measured, REACH, served)
    common.row(f"{kind}: Alice got", in_words(life.replies))


def show_others(kind: str, got: list[Got]) -> None:
    """Print what the others got."""
    words = [in_words(crowd.replies) for crowd in got]
    refusal_s = [seconds for crowd in got for seconds in crowd.refusal_s]
    if refusal_s:
        words.append(f"a refusal came after {common.spread_ms(refusal_s)}")
    common.row(f"{kind}: the others got", "; ".join(words))


def show_recovery(kind: str, alice: Alice, relay: common.RelayProcess, normal: int) -> None:
    """Print whether all is as before."""
    connections = common.metrics(relay.port)["connectoid_connections"]
    life = alice.live(AFTER_S, relay.pid)
    all_well = all(name.endswith(": ok") for name in life.replies)
    common.row(
        f"{kind}: 5 s after: all of Alice's, p50 / p99 / longest; connections; replies",
        f"{life.spread()}; {connections} (before {normal}); {in_words(life.replies)}",
        "as before", connections <= normal + 1 and all_well)


def missing(db: Path, acked: list[str]) -> int:
    """Return how many of the others' acknowledged messages are not in the database."""
    with contextlib.closing(sqlite3.connect(db)) as opened:
        kept = {sealed for (sealed,) in opened.execute("SELECT data FROM messages")}
        (sound,) = opened.execute("PRAGMA integrity_check").fetchone()
    return len(set(acked) - kept) + int(sound != "ok")


def measure(
    relay: common.RelayProcess, arguments: argparse.Namespace,
) -> tuple[list[str], int]:
    """Go through the kinds; return what the others sent and how much Alice has lost."""
    alice = Alice(relay.port)
    with crowds(WARM_UP, relay.port) as got:
        time.sleep(WARM_UP_S)
    time.sleep(RECOVERY_S)
    life = alice.live(AFTER_S, relay.pid)
    common.row(
        "before: all of Alice's, p50 / p99 / longest; memory",
        f"{life.spread()}; {common.mib(life.peak_kib)}")
    for number, kind in enumerate(KINDS, 1):
        if number in arguments.kinds:
            got += overload(kind, alice, relay, arguments.seconds)
    return [sealed for crowd in got for sealed in crowd.acked], alice.lost()


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    numbers = "\n".join(f"  {number}  {kind}" for number, kind in enumerate(KINDS, 1))
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nKinds:\n{numbers}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", type=int, nargs="*", default=list(range(1, len(KINDS) + 1)),
                        help="numbers of the kinds of overload (all)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each kind (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Run it; the exit code is 1 if anything acknowledged was lost."""
    arguments = read_arguments()
    common.raise_file_limit(MAX_CONNECTIONS + 5_000 + 2 * common.SPARE_FILES)
    common.pin(common.LOAD_CORE)
    print("relay:", *FLAGS)
    with tempfile.TemporaryDirectory() as directory:
        with common.RelayProcess(Path(directory), *FLAGS) as relay:
            common.heading()
            acked, lost = measure(relay, arguments)
        others_lost = missing(relay.db, acked)
    common.row(
        f"acknowledged messages lost: Alice's, of {len(acked):,} to the others",
        f"{lost}, {others_lost}", "0", lost + others_lost == 0)
    return int(lost + others_lost > 0)


if __name__ == "__main__":
    common.run(main)
