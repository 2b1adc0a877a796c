"""Print what a million mailboxes and 100,000 messages cost a relay, and what a sweep of them does (issue 4, Reach 5).

The files are filled directly with SQL, in the relay's own schema: 1,000,000 box rows and
100,000 messages of 2,500 characters, and 1,000 and 100. Needs about 2 GB of disk for a moment.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common

MOST_RATIO = 1.5  # of a check's CPU, big file to small one: the reach
MOST_MIB = 150
MOST_START_S = 1.0
MOST_DELAY_S = 0.05
STARTS = 5
SOURCE_BYTES = 16  # of a hashed source
SECOND_US, HOUR_US, DAY_US = 1_000_000, 3_600_000_000, 86_400_000_000
BOX_TTL_US = 30 * DAY_US  # the default
EXPIRE_AFTER_S = 4.0  # from the start of the relay until all messages expire at once
BASELINE_S = 2.0  # of checks before that
WAL_AFTER_S = 9.0  # after a sweep the relay empties its WAL within 5 s, at one of its turns of a second
SWEEP_LIMIT_S = 60.0


class Filled(NamedTuple):
    """A database: its directory, some boxes with a row and some that have messages as well."""

    directory: Path
    known: list[str]
    written: list[str]


def random_box(chance: random.Random) -> bytes:
    """Return what has the form of a mailbox; nobody has to be able to open it."""
    return bytes((chance.choice((2, 3)),)) + chance.randbytes(48)


def fill(directory: Path, boxes: int, messages: int) -> Filled:
    """Make a database with so many box rows and live messages."""
    chance, module = random.Random(boxes), common.relay_module()
    module.SqliteStore(str(directory / "connectoid.db")).close()  # makes the tables
    now_us = time.time_ns() // 1000
    known = [random_box(chance) for _ in range(boxes)]
    written = [chance.choice(known) for _ in range(messages)]
    # As after a check today: the first one of a day writes, which is another measurement.
    expires_us = (now_us // DAY_US + 1) * DAY_US + BOX_TTL_US
    data, counted = common.DATA, module.counted_bytes(len(common.DATA))
    with contextlib.closing(sqlite3.connect(directory / "connectoid.db", isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        db.executemany("INSERT OR IGNORE INTO boxes (box, expires_us) VALUES (?, ?)",
                       ((box, expires_us) for box in sorted(known)))
        db.executemany(module.ADD_MESSAGE, (
            (now_us + at, box, now_us + at + HOUR_US, chance.randbytes(SOURCE_BYTES), len(data), data, "")
            for at, box in enumerate(written)))
        db.execute(module.WRITE_RELAY, {"time_us": now_us, "last_at": now_us + messages, "bytes": messages * counted,
                                        "boxes": boxes, "messages": messages})
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Filled(directory, *(list(map(common.encode, chance.sample(list(found), min(20_000, len(found)))))
                               for found in (known, written)))


def start(filled: Filled, *flags: str) -> common.RelayProcess:
    """Return a relay on a filled database."""
    return common.RelayProcess(filled.directory, *common.NO_RATES, *flags)


# ---------------------------------------------------------------------------------------
# What a check costs
# ---------------------------------------------------------------------------------------


def requests(filled: Filled, chance: random.Random) -> Iterator[bytes]:
    """Yield checks that find nothing: of boxes with a row, with messages already read, and of nobody's."""
    while True:
        for pub in (chance.choice(filled.known), chance.choice(filled.written), common.encode(random_box(chance))):
            yield common.http_request(common.check(pub, common.LATER_AT), close=True)


def check_cpu_us(relay: common.RelayProcess, wanted: Iterator[bytes], count: int) -> float:
    """Return the microseconds of the relay's CPU for a check on a fresh connection."""
    octets = [next(wanted) for _ in range(count)]
    begin_s = common.cpu_s(relay.pid)
    for request in octets:
        with common.connect(relay.port) as client:
            client.sendall(request)
            _, body = common.read_reply(client)
        assert body == b'{"ok": true, "found": false}\n', body
    return 1e6 * (common.cpu_s(relay.pid) - begin_s) / count


def compare_checks(big: Filled, small: Filled, rounds: int, count: int) -> None:
    """Print what a check costs with much and with little in the store, in turns."""
    taken_us: dict[bool, list[float]] = {True: [], False: []}
    with start(big) as much, start(small) as little:
        wanted = {True: requests(big, random.Random(1)), False: requests(small, random.Random(1))}
        for number in range(rounds + 1):
            for is_big in (True, False) if number % 2 else (False, True):
                cpu_us = check_cpu_us(much if is_big else little, wanted[is_big], count)
                if number:  # the first round warms up
                    taken_us[is_big].append(cpu_us)
        memory_kib, small_kib = common.memory_kib(much.pid), common.memory_kib(little.pid)
    medians = {is_big: statistics.median(found) for is_big, found in taken_us.items()}
    for is_big, name in ((True, "big file"), (False, "small file")):
        common.row(f"CPU of a check, fresh connection, {name}: median (min to max) of {rounds} rounds of {count:,}",
                   f"{medians[is_big]:.0f} µs ({min(taken_us[is_big]):.0f} to {max(taken_us[is_big]):.0f})")
    ratio = medians[True] / medians[False]
    common.row("big to small", f"{ratio:.2f}", f"{MOST_RATIO}", ratio <= MOST_RATIO)
    common.row("memory after the checks, big file (small file)", f"{common.mib(memory_kib)} ({common.mib(small_kib)})",
               f"{MOST_MIB} MiB", memory_kib <= 1024 * MOST_MIB)


def compare_starts(big: Filled, small: Filled) -> None:
    """Print how long the relay takes until it is ready and has answered its first check."""
    for filled, name in ((small, "small file"), (big, "big file")):
        ready_s, answered_s = [], []
        for number in range(STARTS):
            with start(filled) as relay:
                common.ask(relay.port, common.check(filled.known[number], common.LATER_AT))
                answered_s.append(time.perf_counter() - relay.started_s)
                ready_s.append(relay.ready_s)
        longest = max(answered_s)
        common.row(f"start, {name}: ready, first answer (median of {STARTS}; longest)",
                   f"{statistics.median(ready_s):.2f} s, {statistics.median(answered_s):.2f} s; {longest:.2f} s",
                   *((f"{MOST_START_S:.0f} s", longest < MOST_START_S) if filled is big else ()))


# ---------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------


def expire(filled: Filled) -> float:
    """Have all messages of a stopped relay expire within the same second, soon; return when, in Unix seconds."""
    then_s = time.time() + EXPIRE_AFTER_S
    with contextlib.closing(sqlite3.connect(filled.directory / "connectoid.db", isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        then_s = time.time() + EXPIRE_AFTER_S
        db.execute("UPDATE messages SET expires_us = ?", (int(then_s * SECOND_US),))
        took_s = time.time() - (then_s - EXPIRE_AFTER_S)
        then_s += took_s  # the same again, as the rows are in the cache now
        db.execute("UPDATE messages SET expires_us = ?", (int(then_s * SECOND_US),))
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return then_s


def check_until(relay: common.RelayProcess, wanted: Iterator[bytes], end_s: float) -> list[float]:
    """Check on fresh connections, one after the other, until then; return the seconds that each took."""
    taken_s = []
    while time.time() < end_s:
        request, begin_s = next(wanted), time.perf_counter()
        with common.connect(relay.port) as client:
            client.sendall(request)
            common.read_reply(client)
        taken_s.append(time.perf_counter() - begin_s)
    return taken_s


def sweep(filled: Filled, messages: int) -> bool:
    """Print how a sweep of all messages delays checks and whether all has gone; return whether it has."""
    then_s = expire(filled)
    wal = filled.directory / "connectoid.db-wal"
    with start(filled) as relay:
        wanted = requests(filled, random.Random(2))
        before = check_until(relay, wanted, min(then_s, time.time() + BASELINE_S))
        time.sleep(max(0.0, then_s - time.time()))
        begin_s, begin_cpu_s, during = time.perf_counter(), common.cpu_s(relay.pid), list[float]()
        while time.perf_counter() < begin_s + SWEEP_LIMIT_S:
            during += check_until(relay, wanted, time.time() + 0.25)
            if not common.metrics(relay.port)["connectoid_messages"]:
                break
        took_s, used_s = time.perf_counter() - begin_s, common.cpu_s(relay.pid) - begin_cpu_s
        peak_mib = wal.stat().st_size / 2**20
        during += check_until(relay, wanted, time.time() + WAL_AFTER_S)  # moving the WAL into the file is a part of it
        memory_kib, wal_bytes = common.memory_kib(relay.pid), wal.stat().st_size
    left = count_left(filled)
    common.row("check before the sweep: p50 / p99 / longest", common.spread_ms(before))
    common.row(f"check during the sweep of {messages:,} and {WAL_AFTER_S:.0f} s after ({len(during):,} checks):"
               " p50 / p99 / longest", common.spread_ms(during), "longest 50 ms", max(during) <= MOST_DELAY_S)
    common.row("the sweep took; CPU of the relay, checks included; WAL at its end",
               f"{took_s:.1f} s; {used_s:.1f} s; {peak_mib:.1f} MiB")
    common.row(f"left after: messages, sums, bytes of WAL after {WAL_AFTER_S:.0f} s", f"{left}, {wal_bytes:,}", "0",
               left == "0, 0 and 0" and not wal_bytes)
    common.row("memory after the sweep", common.mib(memory_kib))
    return left == "0, 0 and 0"


def count_left(filled: Filled) -> str:
    """Return the messages that are left, and what the relay's row says of messages and bytes."""
    with contextlib.closing(sqlite3.connect(filled.directory / "connectoid.db")) as db:
        (messages,), = db.execute("SELECT count(*) FROM messages")
        (counted, size), = db.execute("SELECT messages, bytes FROM relay")
        (sound,), = db.execute("PRAGMA quick_check")
    return f"{messages}, {counted} and {size}" if sound == "ok" else f"damaged: {sound}"


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=1_000_000, help="rows of boxes in the big file (%(default)s)")
    parser.add_argument("--messages", type=int, default=100_000, help="messages in the big file (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of checks on each file (%(default)s)")
    parser.add_argument("--checks", type=int, default=2_000, help="checks in a round (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Run it; the exit code is 1 if a sweep left something or the file is damaged."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the relay is stopped
    common.pin(common.LOAD_CORE)
    with tempfile.TemporaryDirectory() as much, tempfile.TemporaryDirectory() as little:
        small = fill(Path(little), 1_000, 100)
        big = fill(Path(much), arguments.boxes, arguments.messages)
        size_mib = (big.directory / "connectoid.db").stat().st_size / 2**20
        print(f"{arguments.boxes:,} boxes and {arguments.messages:,} messages are a file of {size_mib:.0f} MiB; relay:",
              *common.NO_RATES)
        common.heading()
        compare_checks(big, small, arguments.rounds, arguments.checks)
        compare_starts(big, small)
        return int(not sweep(big, arguments.messages))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
