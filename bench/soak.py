"""Churn a relay for ten minutes and print what is left and what was lost.

Many clients send, check, wait, receive and hang up half-way while the relay is stopped
(SIGTERM) and killed (SIGKILL) at random; messages live for 10 s. A message is lost if it was
acknowledged, has not expired and is not received. The exit code is 1 if one was lost, came twice
or in the wrong order, or if the database is damaged. Usage: python bench/soak.py 60
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import socket
import sqlite3
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common

# Of messages, questions and box rows.
TTL_S = 10
FLAGS = (
    *common.NO_RATES, "--message-ttl", str(TTL_S), "--question-ttl", str(TTL_S),
    "--box-ttl", str(TTL_S))
CLIENTS = 24
BOXES = 48
# The least time of churn without restarts: memory grows to its size in a minute.
WARM_UP_S = 8.0
WARM_UP_SHARE = 0.1
# The end of the time is without restarts, so that the last process has lived.
CALM_SHARE = 0.2
# From one restart to the next.
RESTART_S = (1.0, 8.0)
# Before its end a message does not count: a receive takes a while.
MARGIN_S = 1.0
# By then all must have expired, and the WAL must be empty.
QUIET_LIMIT_S = 60.0
# Of memory.
MOST_GROWTH = 1.1
# Connections to the database that threads may open: 16 and the loop, each with two files.
READERS = 17
# Before a client asks again when there is no relay.
RELAY_DOWN_S = 0.05
# SO_LINGER: close with a reset.
RESET = struct.pack("ii", 1, 0)
JOIN_TIMEOUT_S = 15.0


class Sent:
    """A message: when its send began, when it was acknowledged, and its `at` once it is seen."""

    __slots__ = ("acked_s", "at_us", "begin_s")

    def __init__(self) -> None:
        self.begin_s = time.monotonic()
        self.acked_s = float("inf")
        self.at_us = 0


class Box:
    """A mailbox and the ledger of what was sent to it."""

    def __init__(self, number: int) -> None:
        self.owner = common.Owner(number + 1)
        self.pub = self.owner.pub
        self.receiving = threading.Lock()
        self._lock = threading.Lock()
        self._sent: dict[str, Sent] = {}

    def begin(self, sealed: str) -> Sent:
        """Note that a message is on its way."""
        sent = Sent()
        with self._lock:
            self._sent[sealed] = sent
        return sent

    def alive(self) -> dict[str, Sent]:
        """Return what was acknowledged and will live for a while; forget what is long gone."""
        now_s = time.monotonic()
        with self._lock:
            self._sent = {
                sealed: sent for sealed, sent in self._sent.items()
                if now_s < sent.begin_s + 6 * TTL_S}
            return {sealed: sent for sealed, sent in self._sent.items() if sent.acked_s < now_s}

    def judge(
        self, found: list[tuple[int, str]], expected: dict[str, Sent], end_s: float,
    ) -> Counter[str]:
        """Return the mistakes in what was received."""
        with self._lock:
            sent = [self._sent.get(sealed) for _, sealed in found]
        known = [each for each in sent if each]
        times_us = [at for at, _ in found]
        mistakes = Counter({
            "unknown": len(sent) - len(known),
            "doubled": len(found) - len({sealed for _, sealed in found}),
            "lost": lost(found, expected, end_s),
            "at not increasing": sum(
                second <= first for first, second in itertools.pairwise(times_us)),
            # What was acknowledged before another's send began has the smaller `at`.
            "out of order": sum(
                second.acked_s < first.begin_s for first, second in itertools.pairwise(known)),
        })
        for at_us, each in zip(times_us, sent, strict=True):
            if each:
                mistakes["at changed"] += each.at_us not in (0, at_us)
                each.at_us = at_us
        return mistakes


def lost(found: list[tuple[int, str]], expected: dict[str, Sent], end_s: float) -> int:
    """Return how many messages had to be received and were not."""
    received = {sealed for _, sealed in found}
    missing = [sent for sealed, sent in expected.items() if sealed not in received]
    return sum(sent.begin_s + TTL_S - MARGIN_S > end_s for sent in missing)


# ---------------------------------------------------------------------------------------
# The clients: threads, each with its own source and chance.
# ---------------------------------------------------------------------------------------


class World:
    """What all clients share."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.port = 0
        self.boxes = [Box(number) for number in range(BOXES)]
        self.churning = threading.Event()
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self.events: Counter[str] = Counter()
        self.mistakes: Counter[str] = Counter()

    def count(self, event: str, times: int = 1) -> None:
        """Count what a client has seen."""
        with self._lock:
            self.events[event] += times

    def blame(self, mistakes: Counter[str]) -> None:
        """Count the mistakes of the relay."""
        with self._lock:
            self.mistakes.update(mistakes)


class Client:
    """One client, which does at random what clients do, the bad ones included."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.source = f"127.0.2.{number + 1}"
        self.chance = random.Random(f"{world.seed}-{number}")
        self.deeds: dict[Callable[[Box], str], int] = {
            self.send: 40,
            self.check: 15,
            self.receive: 15,
            self.poll: 6,
            self.break_off: 8,
            self.hang_up: 6,
            self.pipeline: 5,
            self.talk_nonsense: 5,
        }

    def live(self) -> None:
        """Do one thing after the other until the end."""
        while not self.world.ended.is_set():
            if self.world.churning.wait(0.2):
                self._act()

    def _act(self) -> None:
        (deed,) = self.chance.choices(list(self.deeds), list(self.deeds.values()))
        try:
            outcome = deed(self.chance.choice(self.world.boxes))
        # Half a reply is a ValueError.
        except (OSError, ValueError):
            outcome = "no reply"
            time.sleep(RELAY_DOWN_S)
        self.world.count(f"{deed.__name__}: {outcome}")

    def _ask(self, request: dict[str, Any]) -> str:
        status, reply = common.ask(self.world.port, request, self.source)
        if status == 200:
            return "ok"
        return str(reply["error"])

    def _connect(self) -> socket.socket:
        return common.connect(self.world.port, self.source)

    def _flips_heads(self) -> bool:
        return self.chance.random() < 0.5

    def _any_at(self) -> int:
        return self.chance.choice((0, common.LATER_AT))

    def send(self, box: Box) -> str:
        """Send, and remember it if it is acknowledged."""
        size = self.chance.choice((3, 300, 1_900, 1_900, 1_900, 20_000))
        sealed = common.encode(self.chance.randbytes(9 + size))
        sent = box.begin(sealed)
        outcome = self._ask(common.send(box.pub, sealed))
        if outcome == "ok":
            sent.acked_s = time.monotonic()
        return outcome

    def check(self, box: Box) -> str:
        """Check."""
        return self._ask(common.check(box.pub, self._any_at()))

    def receive(self, box: Box) -> str:
        """Receive all that a box has, and judge it."""
        if not box.receiving.acquire(blocking=False):
            return "another does"
        try:
            expected = box.alive()
            found = common.receive_all(self.world.port, box.owner, self.source)
            self.world.blame(box.judge(found, expected, time.monotonic()))
        except RuntimeError:
            return "refused"
        finally:
            box.receiving.release()
        self.world.count("messages received", len(found))
        return "ok"

    def poll(self, box: Box) -> str:
        """Wait for a message that will not come, or for any; hang up half of the time."""
        request = common.check(box.pub, self._any_at(), 2)
        if self._flips_heads():
            return self._ask(request)
        with self._connect() as client:
            client.sendall(common.http_request(request))
            time.sleep(self.chance.random() / 4)
        return "hung up"

    def break_off(self, box: Box) -> str:
        """Send a part of a request and close, or reset."""
        octets = common.http_request(common.send(box.pub))
        with self._connect() as client:
            client.sendall(octets[:self.chance.randrange(1, len(octets))])
            if self._flips_heads():
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return "done"

    def hang_up(self, box: Box) -> str:
        """Send a whole message and do not wait for the reply: it may be kept or not."""
        sealed = common.encode(self.chance.randbytes(1_909))
        box.begin(sealed)
        with self._connect() as client:
            client.sendall(common.http_request(common.send(box.pub, sealed)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return "done"

    def pipeline(self, box: Box) -> str:
        """Send some checks at once and read only one of the replies."""
        request = common.http_request(common.check(box.pub, common.LATER_AT))
        with self._connect() as client:
            client.sendall(request * self.chance.randrange(2, 30))
            common.read_reply(client)
        return "done"

    def talk_nonsense(self, _box: Box) -> str:
        """Send what is no request and read to the end."""
        nonsense = self.chance.choice((
            self.chance.randbytes(300),
            b"GET / HTTP/1.1\r\nX: \0\r\n\r\n",
            common.http_request([1, 2, 3], close=True)))
        with self._connect() as client:
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
        return "done"


@contextlib.contextmanager
def clients(world: World) -> Iterator[None]:
    """Let all clients live meanwhile."""
    alive = [
        threading.Thread(target=Client(world, number).live, daemon=True)
        for number in range(CLIENTS)]
    for thread in alive:
        thread.start()
    try:
        yield
    finally:
        world.ended.set()
        for thread in alive:
            thread.join(JOIN_TIMEOUT_S)


# ---------------------------------------------------------------------------------------
# The relay: what it uses, and how it is stopped and started.
# ---------------------------------------------------------------------------------------


class Use(NamedTuple):
    """What a relay and its database use."""

    threads: int
    descriptors: int
    memory_kib: int
    rows: dict[str, int]
    wal_bytes: int

    def is_quiet(self) -> bool:
        """Return whether nothing is left but the one row that the relay has of itself."""
        quiet = {name: int(name == "relay") for name in self.rows}
        return self.rows == quiet and not self.wal_bytes


def use_of(relay: common.RelayProcess) -> Use:
    """Return what a relay uses now."""
    rows = {}
    tables = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
    with contextlib.closing(sqlite3.connect(f"{relay.db.as_uri()}?mode=ro", uri=True)) as db:
        for (name,) in db.execute(tables).fetchall():
            (rows[name],) = db.execute(f"SELECT count(*) FROM {name}").fetchone()
    wal = relay.db.with_name(relay.db.name + "-wal")
    return Use(
        common.threads(relay.pid), common.descriptors(relay.pid),
        common.memory_kib(relay.pid), rows, wal.stat().st_size)


class Host:
    """A careless host of the relay."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._chance = random.Random(f"{seed}-host")
        self.relay = common.RelayProcess(directory, *FLAGS)
        self.deaths: Counter[str] = Counter()
        self.said: Counter[str] = Counter()
        self.starts_s: list[float] = []

    def restart(self) -> None:
        """Stop or kill the relay, and start it again on the same port and file."""
        number = self._chance.choice((signal.SIGTERM, signal.SIGKILL))
        port = self.relay.port
        self.relay.stop(number)
        self._listen()
        self.deaths[number.name] += 1
        if number == signal.SIGTERM and self.relay.popen.returncode != 0:
            self.deaths["failed to stop well"] += 1
        self.relay = common.RelayProcess(self._directory, *FLAGS, port=port)
        self.starts_s.append(self.relay.ready_s)

    def _listen(self) -> None:
        """Keep what the relay has said, except that it is ready."""
        for line in self.relay.log().splitlines():
            if " listening on " not in line:
                self.said[line] += 1

    def churn(self, world: World, seconds: float, *, restarts: bool) -> None:
        """Let the clients live for some time."""
        end_s = time.monotonic() + seconds
        calm_s = 0.0
        if restarts:
            calm_s = end_s - CALM_SHARE * seconds
        world.port = self.relay.port
        world.churning.set()
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, self._chance.uniform(*RESTART_S)))
            if time.monotonic() < calm_s:
                self.restart()
        world.churning.clear()

    def wait_until_quiet(self) -> Use:
        """Wait until all has expired, and return what is used then."""
        give_up_s = time.monotonic() + QUIET_LIMIT_S
        time.sleep(TTL_S)
        use = use_of(self.relay)
        while not use.is_quiet() and time.monotonic() < give_up_s:
            time.sleep(1)
            use = use_of(self.relay)
        return use

    def end(self) -> str:
        """Stop the relay and return what SQLite says of its file."""
        self.relay.stop()
        self._listen()
        with contextlib.closing(sqlite3.connect(self.relay.db)) as db:
            return str(db.execute("PRAGMA integrity_check").fetchone()[0])


# ---------------------------------------------------------------------------------------
# The run.
# ---------------------------------------------------------------------------------------


def show_use(before: Use, after: Use) -> None:
    """Print what is used before and after; the aim is the same."""
    show_same("threads", before.threads, after.threads)
    # A connection to the database is opened when all others are in use: how many there are is
    # chance.
    common.row(
        "descriptors at the start, at the end", f"{before.descriptors}, {after.descriptors}",
        f"the same but for at most {READERS} connections to the database",
        after.descriptors <= before.descriptors + 2 * READERS)
    common.row(
        "memory at the start, at the end",
        f"{common.mib(before.memory_kib)}, {common.mib(after.memory_kib)}",
        f"at most {MOST_GROWTH} times", after.memory_kib <= MOST_GROWTH * before.memory_kib)
    show_same("rows", json.dumps(before.rows), json.dumps(after.rows))
    show_same("bytes of WAL", before.wal_bytes, after.wal_bytes)


def show_same(what: str, before: int | str, after: int | str) -> None:
    """Print two figures that have to be equal."""
    common.row(
        f"{what} at the start, at the end", f"{before}, {after}", "the same", before == after)


def in_words(counted: Counter[str]) -> str:
    """Return what was counted, by name."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counted.items()))


def show_events(world: World, host: Host) -> None:
    """Print what happened."""
    longest_s = max(host.starts_s, default=0)
    common.row(
        "restarts; longest start", f"{in_words(host.deaths)}; {longest_s:.2f} s", "0 failed",
        not host.deaths["failed to stop well"])
    sent = world.events["send: ok"]
    received = world.events["messages received"]
    common.row(
        "messages acknowledged; received (each as often as it was asked for)",
        f"{sent:,}; {received:,}")
    common.row("what the clients did", in_words(world.events))
    said = "; ".join(f"{line} ({count})" for line, count in host.said.items())
    common.row("what the relays said", said or "nothing")


def verdict(world: World, integrity: str) -> bool:
    """Print what may not happen, and return whether it has not."""
    mistakes = "; ".join(f"{name} {count}" for name, count in world.mistakes.items())
    faultless = not world.mistakes.total()
    common.row(
        "mistakes in what was received", mistakes or "nothing received", "0", faultless)
    common.row("PRAGMA integrity_check", integrity, "ok", integrity == "ok")
    return faultless and integrity == "ok" and world.events["send: ok"] > 0


def soak(directory: Path, seconds: float, seed: int) -> bool:
    """Do it all, and return whether nothing was lost or damaged."""
    world = World(seed)
    host = Host(directory, seed)
    try:
        with clients(world):
            fresh = use_of(host.relay)
            host.churn(world, max(WARM_UP_S, WARM_UP_SHARE * seconds), restarts=False)
            before = host.wait_until_quiet()
            host.churn(world, seconds, restarts=True)
            after = host.wait_until_quiet()
        integrity = host.end()
    finally:
        host.relay.stop(signal.SIGKILL)
    common.row(
        "fresh relay: threads, descriptors, memory",
        f"{fresh.threads}, {fresh.descriptors}, {common.mib(fresh.memory_kib)}")
    show_use(before, after)
    show_events(world, host)
    return verdict(world, integrity)


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("seconds", type=float, nargs="?", default=600.0, help="of churn (%(default)s)")
    add("--seed", type=int, default=random.randrange(10**6), help="of all that is random")
    return parser.parse_args()


def main() -> int:
    """Run it; the exit code is 1 if a message was lost or the file is damaged."""
    arguments = read_arguments()
    common.pin(common.LOAD_CORE)
    print(f"{arguments.seconds:.0f} s, seed {arguments.seed}; relay:", *FLAGS)
    common.heading()
    with tempfile.TemporaryDirectory() as directory:
        return int(not soak(Path(directory), arguments.seconds, arguments.seed))


if __name__ == "__main__":
    common.run(main)
