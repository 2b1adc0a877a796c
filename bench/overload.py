"""Print how a relay serves a well-behaved client while others overload it, one way after another (issue 4, Reach 6).

Alice is within all limits: a check every 20 ms on a kept connection and one every 100 ms on a
fresh one, a message every 200 ms that she remembers once it is acknowledged. The others come
from other addresses of 127.0.0.0/8. At the end all that was acknowledged to anybody must be there.
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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import common

MOST_DELAY_S = 1.0  # of Alice's requests, 99th percentile: the reach
REACH = "p99 1 s, none"
BEYOND = ("connections beyond the limit in all", "fresh")  # then one more connection is beyond the limit too
MOST_GROWTH = 1.25  # of memory at its peak to what it was before: flat
RECOVERY_S = 5.0  # after which all must be as before
AFTER_S = 2.0  # of measuring then
# Alice's 3,300 requests a minute must be within the limits, those of the others beyond; and half requests end within
# the time of a measurement. All other limits are the defaults.
FLAGS = ("--rate", "6000", "--max-sends", "600", "--request-timeout", "4", "--udp")
MAX_CONNECTIONS, PER_SOURCE = 10_000, 256  # the defaults
ALICE = "127.0.0.9"
CHECK_EVERY_S, FRESH_EVERY, SEND_EVERY = 0.02, 5, 10  # every 5th check is a fresh one; with every 10th goes a send
ALICES_BOXES = 40  # each has room for 32 messages of one source
CROWD_BOXES = 300
SLOW = 2_000
PIPELINED = 10  # checks that each client of their flood always has under way: 5,000 in all
CHECKERS, CHECKING_SOURCES = 500, 10
SENDERS, SENDING_SOURCES = 2_000, 20  # four times as many as the queue for the threads has places
WARM_UP_S = 3.0  # of sends, so that caches and heap have their size
UDP_PER_S = 10_000
NICENESS = 10  # of the crowds: on one core they would keep Alice from asking, and the machine is not what we measure
TRACE_S = 0.05  # between two looks at the relay's memory

# ---------------------------------------------------------------------------------------
# The crowds: each runs in a process of its own until it is told to stop, and returns what
# it got (Counter) and the `data` of messages that were acknowledged.
# ---------------------------------------------------------------------------------------


class Got(NamedTuple):
    """What a crowd or Alice got: replies by name, acknowledged messages, seconds that refusals took to come."""

    replies: Counter[str]
    acked: list[str]
    refusal_s: list[float]


def name_of(status: int, body: bytes) -> str:
    """Return what to call a reply."""
    if status == 200:
        return "ok"
    return body.partition(b'"error": "')[2].partition(b'"')[0].decode("ascii") or "closed"


def source(number: int) -> str:
    """Return the address of one of the others."""
    return f"127.0.1.{1 + number % 250}"


def too_many_of(sources: int, port: int, stop: Event) -> Got:
    """Open connections without end, and do nothing on them."""
    got = Got(Counter(), [], [])
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


class Flood(NamedTuple):
    """What the clients of a flood ask for, how many they are, and from how many sources."""

    request_of: Callable[[random.Random, int], tuple[bytes, str]]
    clients: int
    sources: int
    pipelined: int  # requests that each client always has under way


def flood_of(flood: Flood, port: int, stop: Event) -> Got:
    """Have many clients ask without a pause; return what they got."""
    got, chance, serial = Got(Counter(), [], []), random.Random(7), itertools.count()
    joined, under_way = itertools.count(), dict[common.Member, list[tuple[str, float]]]()
    with common.Crowd() as crowd:

        def ask(member: common.Member, count: int) -> None:
            requests = [flood.request_of(chance, next(serial)) for _ in range(count)]
            under_way[member] += [(sealed, time.perf_counter()) for _, sealed in requests]
            crowd.say(member, b"".join(octets for octets, _ in requests))

        while not stop.is_set():
            if len(crowd.members) < flood.clients:
                with contextlib.suppress(OSError):
                    member = crowd.join(port, 0, source(30 + next(joined) % flood.sources))
                    under_way[member] = []
                    ask(member, flood.pipelined)
            for member, status, body in crowd.turn(0 if len(crowd.members) < flood.clients else 0.01):
                name = name_of(status, body)
                got.replies[name] += 1
                sealed, begin_s = under_way[member].pop(0) if under_way[member] else ("", 0.0)
                if not status:
                    del under_way[member]
                    continue
                if name == "ok" and sealed:
                    got.acked.append(sealed)
                elif name != "ok":
                    got.refusal_s.append(time.perf_counter() - begin_s)
                ask(member, 1)
    return got


def any_check(chance: random.Random, _serial: int) -> tuple[bytes, str]:
    """Return a check."""
    return common.http_request(common.check(chance.choice(PUBS), common.LATER_AT)), ""


def any_send(chance: random.Random, serial: int) -> tuple[bytes, str]:
    """Return a send whose data is found only once, by process and number."""
    sealed = common.encode(b"%d:%d:" % (os.getpid(), serial) + chance.randbytes(1_800))
    return common.http_request(common.send(chance.choice(PUBS), sealed)), sealed


def too_many_checks(port: int, stop: Event) -> Got:
    """Check without a pause."""
    return flood_of(Flood(any_check, CHECKERS, CHECKING_SOURCES, PIPELINED), port, stop)


def too_many_sends(port: int, stop: Event) -> Got:
    """Send without a pause."""
    return flood_of(Flood(any_send, SENDERS, SENDING_SOURCES, 1), port, stop)


def slow_senders(port: int, stop: Event) -> Got:
    """Send half a request, then a byte every two seconds, from 2,000 connections; who is cut off comes again."""
    got, whole = Got(Counter(), [], []), common.http_request(common.check(PUBS[0]))
    with common.Crowd() as crowd:
        next_s = time.perf_counter()
        for number in itertools.count():
            if stop.is_set():
                break
            if len(crowd.members) < SLOW:
                with contextlib.suppress(OSError):
                    crowd.join(port, len(whole) // 2, source(100 + number % 20), whole[:len(whole) // 2])
                    got.replies["connected"] += 1
            for _, status, body in crowd.turn(0 if len(crowd.members) < SLOW else 0.05):
                got.replies[name_of(status, body)] += 1
            if time.perf_counter() > next_s:
                next_s = time.perf_counter() + 2
                for member in tuple(crowd.members.values()):
                    crowd.say(member, whole[member.number:member.number + 1])
                    member.number += 1
    return got


def junk_datagrams(port: int, stop: Event) -> Got:
    """Send 10,000 datagrams a second that are nothing: noise, cut-off JSON, cut-off STUN."""
    got, chance = Got(Counter(), [], []), random.Random(8)
    check = b'{"pub": "%s", "action": "check", "at": 0}' % PUBS[0].encode("ascii")
    junk = [chance.randbytes(chance.randrange(1, 1_200)) for _ in range(50)] + [
        check[:chance.randrange(1, len(check))] for _ in range(50)] + [
        b"\0\1\0\x08\x21\x12\xa4\x42" + chance.randbytes(chance.randrange(20)) for _ in range(50)]
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind((source(200), 0))
        udp.connect(("127.0.0.1", port))
        begin_s, sent = time.perf_counter(), 0
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


KINDS: dict[str, tuple[Callable[[int, Event], Got], ...]] = {
    "connections beyond the limit of a source": (too_many_of_each,),
    "connections beyond the limit in all": (too_many_in_all,),
    "checks without a pause": (too_many_checks,),
    "sends without a pause": (too_many_sends,),
    "2,000 slow senders": (slow_senders,),
    "10,000 datagrams of junk a second": (junk_datagrams,),
    "all at once": (too_many_of_each, too_many_checks, too_many_sends, slow_senders, junk_datagrams),
}


def run_crowd(crowd: Callable[[int, Event], Got], port: int, stop: Event, result: Connection) -> None:
    """Be a process with a crowd."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    os.nice(NICENESS)
    with result:
        result.send(crowd(port, stop))


@contextlib.contextmanager
def crowds(kind: str, port: int) -> Iterator[list[Got]]:
    """Run the crowds of a kind meanwhile; the list is filled at the end with what they got."""
    context, got = multiprocessing.get_context("fork"), list[Got]()
    stop, running = context.Event(), []
    for crowd in KINDS[kind]:
        parent, child = context.Pipe(duplex=False)
        process = context.Process(target=run_crowd, args=(crowd, port, stop, child), daemon=True)
        process.start()
        child.close()
        running.append((process, parent))
    try:
        yield got
    finally:
        stop.set()
        for process, parent in running:
            with contextlib.suppress(EOFError):  # it has failed; its own words are on stderr
                got.append(parent.recv())
            process.join(10)


# ---------------------------------------------------------------------------------------
# Alice
# ---------------------------------------------------------------------------------------


class Alice:
    """A client within all limits, and what she remembers."""

    def __init__(self, port: int) -> None:
        self.port, self._turns = port, itertools.count()
        self.owners = [common.Owner(number + 1) for number in range(ALICES_BOXES)]
        self.acked: list[list[str]] = [[] for _ in self.owners]
        self._kept: socket.socket | None = None

    def live(self, seconds: float, pid: int) -> tuple[dict[str, list[float]], Counter[str], int]:
        """Ask for some time; return the seconds of each kind of request, the replies, the relay's largest KiB."""
        taken_s: dict[str, list[float]] = {"kept": [], "fresh": [], "send": []}
        replies: Counter[str] = Counter()
        peak_kib = common.memory_kib(pid)
        end_s = next_s = time.perf_counter()
        trace_s, end_s = next_s, end_s + seconds
        while next_s < end_s:
            turn = next(self._turns)
            kinds = ["fresh" if turn % FRESH_EVERY == 0 else "kept", *(["send"] if turn % SEND_EVERY == 1 else [])]
            for kind in kinds:
                begin_s = time.perf_counter()
                replies[f"{kind}: {self._do(kind)}"] += 1
                taken_s[kind].append(time.perf_counter() - begin_s)
            if time.perf_counter() > trace_s:
                peak_kib, trace_s = max(peak_kib, common.memory_kib(pid)), time.perf_counter() + TRACE_S
            next_s = max(next_s + CHECK_EVERY_S, time.perf_counter())
            time.sleep(max(0.0, next_s - time.perf_counter()))
        return taken_s, replies, peak_kib

    def _do(self, kind: str) -> str:
        """Do one request and return what came of it."""
        try:
            return self._send() if kind == "send" else self._check(kind == "fresh")
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

    def _check(self, fresh: bool) -> str:
        request = common.check(self.owners[0].pub, common.LATER_AT)
        if fresh:
            with common.connect(self.port, ALICE) as client:
                client.sendall(common.http_request(request, close=True))
                return name_of(*common.read_reply(client))
        return self._ask(request)

    def _ask(self, request: Any) -> str:
        self._kept = self._kept or common.connect(self.port, ALICE)
        self._kept.sendall(common.http_request(request))
        return name_of(*common.read_reply(self._kept))

    def _send(self) -> str:
        number = random.randrange(ALICES_BOXES)
        sealed = common.encode(random.randbytes(1_800))
        name = self._ask(common.send(self.owners[number].pub, sealed))
        if name == "ok":
            self.acked[number].append(sealed)
        return name

    def lost(self) -> int:
        """Receive all, and return how many acknowledged messages are not among it."""
        return sum(len(set(acked) - {sealed for _, sealed in common.receive_all(self.port, owner, ALICE)})
                   for owner, acked in zip(self.owners, self.acked, strict=True))


# ---------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------


def shown(replies: Counter[str]) -> str:
    """Return counts as text, the most frequent first."""
    return ", ".join(f"{name} {count:,}" for name, count in replies.most_common()) or "nothing"


def overload(kind: str, alice: Alice, relay: common.RelayProcess, seconds: float) -> list[Got]:
    """Overload the relay in one way, print what Alice and the others got, and return the latter."""
    before_kib, normal = common.memory_kib(relay.pid), common.metrics(relay.port)["connectoid_connections"]
    cpu_s, begin_s = common.cpu_s(relay.pid), time.perf_counter()
    with crowds(kind, relay.port) as got:
        time.sleep(0.5)  # until the crowds are there
        taken_s, replies, peak_kib = alice.live(seconds, relay.pid)
        used = (common.cpu_s(relay.pid) - cpu_s) / (time.perf_counter() - begin_s)
    ended_s = time.perf_counter()
    time.sleep(max(0.0, ended_s + RECOVERY_S - time.perf_counter()))
    after_kib, connections = common.memory_kib(relay.pid), common.metrics(relay.port)["connectoid_connections"]
    after_s, after_replies, _ = alice.live(AFTER_S, relay.pid)
    for name, seconds_each in taken_s.items():
        refused = len(seconds_each) - replies[f"{name}: ok"]
        served = common.percentile(seconds_each, 99) <= MOST_DELAY_S and not refused
        common.row(f"{kind}: Alice's {name}, p50 / p99 / longest; refused",
                   f"{common.spread_ms(seconds_each)}; {refused} of {len(seconds_each)}",
                   *((REACH, served) if (kind, name) != BEYOND else ()))
    common.row(f"{kind}: Alice got", shown(replies))
    refusal_s = [refused for crowd in got for refused in crowd.refusal_s]
    common.row(f"{kind}: the others got", "; ".join(shown(crowd.replies) for crowd in got) + (
        f"; a refusal came after {common.spread_ms(refusal_s)}" if refusal_s else ""))
    common.row(f"{kind}: memory before / peak / 5 s after; CPU of the relay",
               f"{before_kib / 1024:.1f} / {peak_kib / 1024:.1f} / {common.mib(after_kib)}; {100 * used:.0f} %", "flat",
               peak_kib <= before_kib * MOST_GROWTH)
    back = connections <= normal + 1 and all(name.endswith(": ok") for name in after_replies)
    common.row(f"{kind}: 5 s after: all of Alice's, p50 / p99 / longest; connections; replies",
               f"{common.spread_ms([each for kinds in after_s.values() for each in kinds])}; {connections} (before"
               f" {normal}); {shown(after_replies)}", "as before", back)
    return got


def missing(db: Path, acked: list[str]) -> int:
    """Return how many of the others' acknowledged messages are not in the database."""
    with contextlib.closing(sqlite3.connect(db)) as opened:
        kept = {sealed for (sealed,) in opened.execute("SELECT data FROM messages")}
        (sound,), = opened.execute("PRAGMA integrity_check")
    return len(set(acked) - kept) + int(sound != "ok")


def measure(relay: common.RelayProcess, arguments: argparse.Namespace) -> tuple[list[str], int]:
    """Go through the kinds; return what was acknowledged to the others and how much Alice has lost."""
    alice, acked = Alice(relay.port), list[str]()
    with crowds("sends without a pause", relay.port) as warm:
        time.sleep(WARM_UP_S)
    acked += [sealed for got in warm for sealed in got.acked]
    time.sleep(RECOVERY_S)
    taken_s, _, kib = alice.live(AFTER_S, relay.pid)
    common.row("before: all of Alice's, p50 / p99 / longest; memory",
               f"{common.spread_ms([each for kinds in taken_s.values() for each in kinds])}; {common.mib(kib)}")
    for number, kind in enumerate(KINDS):
        if number + 1 in arguments.kinds:
            acked += [sealed for got in overload(kind, alice, relay, arguments.seconds) for sealed in got.acked]
    return acked, alice.lost()


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    numbers = "\n".join(f"  {number}  {kind}" for number, kind in enumerate(KINDS, 1))
    parser = argparse.ArgumentParser(description=f"{__doc__}\nKinds:\n{numbers}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", type=int, nargs="*", default=list(range(1, len(KINDS) + 1)),
                        help="numbers of the kinds of overload (all)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each kind (%(default)s)")
    return parser.parse_args()


PUBS = [common.Owner(1_000 + number).pub for number in range(CROWD_BOXES)]


def main() -> int:
    """Run it; the exit code is 1 if anything acknowledged was lost."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the relay is stopped
    common.raise_file_limit(MAX_CONNECTIONS + 5_000 + 2 * common.SPARE_FILES)
    common.pin(common.LOAD_CORE)
    print("relay:", *FLAGS)
    with tempfile.TemporaryDirectory() as directory:
        with common.RelayProcess(Path(directory), *FLAGS) as relay:
            common.heading()
            acked, lost = measure(relay, arguments)
        others_lost = missing(relay.db, acked)
    common.row(f"acknowledged messages lost: Alice's, of {len(acked):,} to the others", f"{lost}, {others_lost}",
               "0", lost + others_lost == 0)
    return int(lost + others_lost > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
