"""Print what a million mailboxes and 100,000 messages cost a relay, and what sweeping them does.

SQL fills the files directly, in the relay's own schema: 1,000,000 box rows and 100,000 messages
of 2,500 characters, and 1,000 and 100. It needs about 2 GB of disk for a moment.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common

# The reach: a check's CPU, big file to small one; memory; start; delay of a check in a sweep.
MOST_RATIO = 1.5
MOST_MIB = 150
MOST_START_S = 1.0
MOST_DELAY_S = 0.05
STARTS = 5
# Of a hashed source.
SOURCE_BYTES = 16
SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
DAY_US = 24 * HOUR_US
# The default.
BOX_TTL_US = 30 * DAY_US
# Mailboxes that are remembered, of all.
SAMPLE = 20_000
# From the start of the relay until all messages expire at once.
EXPIRE_AFTER_S = 4.0
# Of checks before that.
BASELINE_S = 2.0
# After a sweep the relay empties its WAL within 5 s, at one of its turns of a second.
WAL_AFTER_S = 9.0
SWEEP_LIMIT_S = 60.0
NOTHING_FOUND = b'{"ok": true, "found": false}\n'
NOTHING_LEFT = "0, 0 and 0"
COUNT_LEFT = "SELECT (SELECT count(*) FROM messages), messages, bytes FROM relay"


class Filled(NamedTuple):
    """A database: its folder, some boxes with a row and some that have messages as well."""

    directory: Path
    known: list[str]
    written: list[str]

    @property
    def db(self) -> Path:
        """Return the path of the database."""
        return self.directory / "connectoid.db"


def random_box(chance: random.Random) -> bytes:
    """Return what has the form of a mailbox; nobody has to be able to open it."""
    return bytes([chance.choice((2, 3))]) + chance.randbytes(48)


@contextlib.contextmanager
def written_fast(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database for one transaction whose end is in the file, though not on the disk."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        yield db
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def fill(directory: Path, boxes: int, messages: int) -> Filled:
    """Make a database with box rows and live messages."""
    chance = random.Random(boxes)
    module = common.relay_module()
    known = [random_box(chance) for _ in range(boxes)]
    written = [chance.choice(known) for _ in range(messages)]
    filled = Filled(directory, _some(chance, known), _some(chance, written))
    now_us = time.time_ns() // 1000
    row = {
        "time_us": now_us, "last_at": now_us + messages,
        "bytes": messages * module.counted_bytes(len(common.DATA)),
        "boxes": boxes, "messages": messages}

    # It makes the tables.
    module.SqliteStore(str(filled.db)).close()
    with written_fast(filled.db) as db:
        # The row is as after a check today, since the first check of a day writes.
        expires_us = (now_us // DAY_US + 1) * DAY_US + BOX_TTL_US
        db.executemany(
            "INSERT OR IGNORE INTO boxes (box, expires_us) VALUES (?, ?)",
            [(box, expires_us) for box in sorted(known)])
        db.executemany(module.ADD_MESSAGE, _rows(chance, written, now_us))
        db.execute(module.WRITE_RELAY, row)
    return filled


def _some(chance: random.Random, boxes: list[bytes]) -> list[str]:
    return [common.encode(box) for box in chance.sample(boxes, min(SAMPLE, len(boxes)))]


def _rows(
    chance: random.Random, written: list[bytes], now_us: int,
) -> Iterator[tuple[Any, ...]]:
    size = len(common.DATA)
    for number, box in enumerate(written):
        at = now_us + number
        source = chance.randbytes(SOURCE_BYTES)
        yield at, box, at + HOUR_US, source, size, common.DATA, ""


def start(filled: Filled) -> common.RelayProcess:
    """Return a relay on a filled database."""
    return common.RelayProcess(filled.directory, *common.NO_RATES)


# ---------------------------------------------------------------------------------------
# What a check costs.
# ---------------------------------------------------------------------------------------


def requests(filled: Filled, chance: random.Random) -> Iterator[bytes]:
    """Yield checks that find nothing.

    They are of boxes with a row, of boxes with messages already read, and of nobody's.
    """
    while True:
        nobody = common.encode(random_box(chance))
        for pub in (chance.choice(filled.known), chance.choice(filled.written), nobody):
            yield common.http_request(common.check(pub, common.LATER_AT), close=True)


def check_once(relay: common.RelayProcess, request: bytes) -> None:
    """Check on a fresh connection; nothing may be found."""
    with common.connect(relay.port) as client:
        client.sendall(request)
        _, body = common.read_reply(client)
    assert body == NOTHING_FOUND, body


class Side:
    """A relay on one of the files, and the CPU of its checks."""

    def __init__(self, name: str, filled: Filled, relay: common.RelayProcess) -> None:
        self.name = name
        self.relay = relay
        self.taken_us: list[float] = []
        self._wanted = requests(filled, random.Random(1))

    def check(self, count: int) -> float:
        """Return the microseconds of the relay's CPU for a check on a fresh connection."""
        octets = [next(self._wanted) for _ in range(count)]
        begin_s = common.cpu_s(self.relay.pid)
        for request in octets:
            check_once(self.relay, request)
        return 1e6 * (common.cpu_s(self.relay.pid) - begin_s) / count

    def show(self, count: int) -> None:
        """Print the CPU of a check."""
        rounds = len(self.taken_us)
        common.row(
            f"CPU of a check, fresh connection, {self.name}: median (min to max) of"
            f" {rounds} rounds of {count:,}, µs", common.spread(self.taken_us))


def compare_checks(big: Filled, small: Filled, rounds: int, count: int) -> None:
    """Print what a check costs with much and with little in the store, in turns."""
    with start(big) as big_relay, start(small) as small_relay:
        much = Side("big file", big, big_relay)
        little = Side("small file", small, small_relay)
        sides = [much, little]
        # The first round warms up.
        for side in sides:
            side.check(count)
        for _ in range(rounds):
            sides.reverse()
            for side in sides:
                side.taken_us.append(side.check(count))
        memory_kib = common.memory_kib(big_relay.pid)
        small_kib = common.memory_kib(small_relay.pid)
    much.show(count)
    little.show(count)
    ratio = statistics.median(much.taken_us) / statistics.median(little.taken_us)
    common.row("big to small", f"{ratio:.2f}", f"{MOST_RATIO}", ratio <= MOST_RATIO)
    common.row(
        "memory after the checks, big file (small file)",
        f"{common.mib(memory_kib)} ({common.mib(small_kib)})",
        f"{MOST_MIB} MiB", memory_kib <= 1024 * MOST_MIB)


# ---------------------------------------------------------------------------------------
# The start.
# ---------------------------------------------------------------------------------------


class Starts(NamedTuple):
    """When a relay was ready, and had answered its first check, each time."""

    ready_s: list[float]
    answered_s: list[float]

    def show(self, name: str, reach: str, met: bool | None) -> None:
        """Print the medians and the longest."""
        ready_s = statistics.median(self.ready_s)
        answered_s = statistics.median(self.answered_s)
        common.row(
            f"start, {name}: ready, first answer (median of {STARTS}; longest)",
            f"{ready_s:.2f} s, {answered_s:.2f} s; {max(self.answered_s):.2f} s", reach, met)


def start_often(filled: Filled) -> Starts:
    """Start a relay on a file some times."""
    starts = Starts([], [])
    for pub in filled.known[:STARTS]:
        with start(filled) as relay:
            common.ask(relay.port, common.check(pub, common.LATER_AT))
            starts.answered_s.append(time.perf_counter() - relay.started_s)
            starts.ready_s.append(relay.ready_s)
    return starts


def compare_starts(big: Filled, small: Filled) -> None:
    """Print how long the relay takes until it is ready and has answered its first check."""
    start_often(small).show("small file", "-", None)
    starts = start_often(big)
    met = max(starts.answered_s) < MOST_START_S
    starts.show("big file", f"{MOST_START_S:.0f} s", met)


# ---------------------------------------------------------------------------------------
# The sweep.
# ---------------------------------------------------------------------------------------


def expire(filled: Filled) -> float:
    """Let all messages of a stopped relay expire within the same second, soon.

    Return when, in Unix seconds.
    """
    with written_fast(filled.db) as db:
        begin_s = time.time()
        then_s = begin_s + EXPIRE_AFTER_S
        db.execute("UPDATE messages SET expires_us = ?", (int(then_s * SECOND_US),))
        # The same again takes as long at most, as the rows are in the cache now.
        then_s += time.time() - begin_s
        db.execute("UPDATE messages SET expires_us = ?", (int(then_s * SECOND_US),))
    return then_s


def check_until(
    relay: common.RelayProcess, wanted: Iterator[bytes], end_s: float,
) -> list[float]:
    """Check until then, one after the other; return the seconds that each took."""
    taken_s = []
    while time.time() < end_s:
        request = next(wanted)
        begin_s = time.perf_counter()
        check_once(relay, request)
        taken_s.append(time.perf_counter() - begin_s)
    return taken_s


def sweep(filled: Filled, messages: int) -> bool:
    """Print how a sweep of all messages delays checks; return whether all have gone."""
    then_s = expire(filled)
    wal = filled.db.with_name("connectoid.db-wal")
    with start(filled) as relay:
        wanted = requests(filled, random.Random(2))
        before = check_until(relay, wanted, min(then_s, time.time() + BASELINE_S))
        time.sleep(max(0.0, then_s - time.time()))
        begin_s = time.perf_counter()
        begin_cpu_s = common.cpu_s(relay.pid)
        during: list[float] = []
        while time.perf_counter() < begin_s + SWEEP_LIMIT_S:
            during += check_until(relay, wanted, time.time() + 0.25)
            if not common.metrics(relay.port)["connectoid_messages"]:
                break
        took_s = time.perf_counter() - begin_s
        used_s = common.cpu_s(relay.pid) - begin_cpu_s
        peak_mib = wal.stat().st_size / 2**20
        # The sweep also moves the WAL into the file.
        during += check_until(relay, wanted, time.time() + WAL_AFTER_S)
        memory_kib = common.memory_kib(relay.pid)
        wal_bytes = wal.stat().st_size
    show_delays(before, during, messages)
    common.row(
        "the sweep took; CPU of the relay, checks included; WAL at its end",
        f"{took_s:.1f} s; {used_s:.1f} s; {peak_mib:.1f} MiB")
    common.row("memory after the sweep", common.mib(memory_kib))
    return show_left(filled, wal_bytes)


def show_delays(before: list[float], during: list[float], messages: int) -> None:
    """Print how long checks took before the sweep and while it went on."""
    common.row("check before the sweep: p50 / p99 / longest", common.spread_ms(before))
    common.row(
        f"check during the sweep of {messages:,} and {WAL_AFTER_S:.0f} s after"
        f" ({len(during):,} checks): p50 / p99 / longest", common.spread_ms(during),
        "longest 50 ms", max(during) <= MOST_DELAY_S)


def show_left(filled: Filled, wal_bytes: int) -> bool:
    """Print what the sweep has left; return whether it is nothing."""
    left = count_left(filled)
    common.row(
        f"left after: messages, sums, bytes of WAL after {WAL_AFTER_S:.0f} s",
        f"{left}, {wal_bytes:,}", "0", left == NOTHING_LEFT and not wal_bytes)
    return left == NOTHING_LEFT


def count_left(filled: Filled) -> str:
    """Return the messages that are left, and what the relay's row says of messages and bytes."""
    with contextlib.closing(sqlite3.connect(filled.db)) as db:
        messages, counted, size = db.execute(COUNT_LEFT).fetchone()
        (sound,) = db.execute("PRAGMA quick_check").fetchone()
    if sound != "ok":
        return f"damaged: {sound}"
    return f"{messages}, {counted} and {size}"


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--boxes", type=int, default=1_000_000, help="rows of boxes in the big file (%(default)s)")
    add("--messages", type=int, default=100_000, help="messages in the big file (%(default)s)")
    add("--rounds", type=int, default=7, help="rounds of checks on each file (%(default)s)")
    add("--checks", type=int, default=2_000, help="checks in a round (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Run it; the exit code is 1 if a sweep left something or the file is damaged."""
    arguments = read_arguments()
    common.pin(common.LOAD_CORE)
    with tempfile.TemporaryDirectory() as much, tempfile.TemporaryDirectory() as little:
        small = fill(Path(little), 1_000, 100)
        big = fill(Path(much), arguments.boxes, arguments.messages)
        size_mib = big.db.stat().st_size / 2**20
        print(f"{arguments.boxes:,} boxes and {arguments.messages:,} messages are a file of"
              f" {size_mib:.0f} MiB; relay:", *common.NO_RATES)
        common.heading()
        compare_checks(big, small, arguments.rounds, arguments.checks)
        compare_starts(big, small)
        return int(not sweep(big, arguments.messages))


if __name__ == "__main__":
    common.run(main)
