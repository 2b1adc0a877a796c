"""Test files that are damaged, or that belong to another program."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from harness import (
    BIG,
    HOUR_S,
    OK,
    ROOMY,
    SOURCE,
    FakeClock,
    Owner,
    Process,
    assert_fails_with_one_line,
    check,
    exchange,
    http_request,
    messages_of,
    parse_response,
    post,
    receive,
    relay_on,
    run_relay,
    send,
)

from connectoid_relay import Relay, SqliteStore, StoreError


def overwrite(path: Path, start: int, octets: bytes) -> None:
    """Write octets into the middle of a file."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(octets)


def store_with_messages(path: Path, owners: Sequence[Owner], clock: FakeClock) -> None:
    """Make a store with ten messages a box, and an open question, all in the one file."""
    with relay_on(path, clock, ROOMY) as relay:
        for number in range(10):
            for owner in owners:
                assert relay.handle(send(owner, "QUJD" * (1 + 300 * number)), SOURCE) == (200, OK)
        assert messages_of(relay, owners[0])


@pytest.mark.sockets
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(random.Random(1).randbytes(9_000)),
        lambda path: path.write_bytes(b"A list of things to buy\n"),
        lambda path: overwrite(path, 0, random.Random(1).randbytes(5_000)),
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, 4_096),
        lambda path: os.truncate(path, 5_000),
        lambda path: overwrite(
            path, 4_096, random.Random(1).randbytes(path.stat().st_size - 4_096)
        ),
    ],
    ids=[
        "random",
        "text",
        "no header",
        "100 bytes",
        "one page",
        "part of a page",
        "random after the first page",
    ],
)
def test_damaged_file_fails_with_one_line(
    damage: Callable[[Path], object], clock: FakeClock, tmp_path: Path, alice: Owner
) -> None:
    path = tmp_path / "relay.db"
    store_with_messages(path, [alice], clock)
    damage(path)
    damaged = path.read_bytes()
    assert_fails_with_one_line(
        run_relay("--port", "0", "--db", "relay.db", cwd=tmp_path), "relay.db"
    )
    # Somebody who can repair the file finds it as it was.
    assert path.read_bytes() == damaged


FOREIGN = {
    "another program's tables": "CREATE TABLE list (item TEXT); INSERT INTO list VALUES ('milk')",
    "another program's id": "PRAGMA application_id = 7",
    "another program's tables and id": (
        "PRAGMA application_id = 7; CREATE TABLE messages (item TEXT)"
    ),
    "another program's version": "PRAGMA user_version = 1",
    "a newer relay's": (
        f"PRAGMA application_id = {0x436F6E6E}; PRAGMA user_version = 1000000;"
        " CREATE TABLE a (b)"
    ),
    "another program's WAL": (
        "PRAGMA journal_mode = WAL; CREATE TABLE list (item TEXT);"
        " PRAGMA wal_checkpoint; INSERT INTO list VALUES ('milk')"
    ),
}


@pytest.mark.sockets
@pytest.mark.parametrize("script", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("state", ["closed", "open", "crashed"])
def test_foreign_file_fails_with_one_line_and_stays_as_it_is(
    state: str, script: str, tmp_path: Path
) -> None:
    path = tmp_path / "relay.db"
    # In a process of its own: to read the file in one that has it open would end SQLite's locks.
    program = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
        " db.executescript(sys.argv[2]); print(); input()"
    )
    with subprocess.Popen([sys.executable, "-c", f"{program}; db.close()", str(path), script],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as foreign:
        assert foreign.stdout is not None
        foreign.stdout.readline()
        if state == "closed":
            foreign.communicate(b"\n")
        elif state == "crashed":
            foreign.kill()
            foreign.wait()
        before = files_in(tmp_path)
        assert_fails_with_one_line(
            run_relay("--port", "0", "--db", "relay.db", cwd=tmp_path), "relay.db"
        )
        after = files_in(tmp_path)
        foreign.kill()
    assert after == before


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the content of a database's files, by name, but for the index of the WAL (-shm)."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if not path.name.endswith("-shm")
    }


def requests_of_all_kinds(owner: Owner) -> list[object]:
    """Return requests that touch every table."""
    return [
        send(owner),
        check(owner),
        receive(owner, "A" * 43),
        [check(owner), check(Owner(9))],
        send(Owner(9), BIG),
    ]


def use(relay: Relay, owner: Owner, clock: FakeClock) -> None:
    """Use a relay on a damaged file in every way; only the sweeper may see StoreError."""
    for request in requests_of_all_kinds(owner):
        status, reply = relay.handle(request, SOURCE)
        assert status in {200, 403, 429, 503, 507}
        assert isinstance(reply, list) or reply["ok"] is (status == 200)
        if isinstance(reply, dict) and reply.get("question"):
            receipt = receive(owner, owner.open(reply["question"]), limit=100)
            assert relay.handle(receipt, SOURCE).status in {200, 403, 503, 507}
    assert isinstance(relay.arrivals(0)[0], int)
    for seconds in (1, 30, HOUR_S):
        clock.advance(seconds)
        with contextlib.suppress(StoreError):
            relay.sweep()
    assert relay.health().status in {200, 503}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_damage_of_a_file_in_use_never_escapes_as_an_exception(
    seed: int, tmp_path: Path, clock: FakeClock, alice: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    path, chance = tmp_path / "relay.db", random.Random(seed)
    store_with_messages(path, [alice, Owner(2)], clock)
    caplog.set_level(logging.INFO)

    def damage() -> None:
        for _ in range(chance.randrange(1, 6)):
            octets = chance.randbytes(chance.choice((1, 4, 100, 4_096)))
            overwrite(path, chance.randrange(100, path.stat().st_size), octets)

    # The damage may be found when the file is opened.
    with contextlib.suppress(StoreError):
        if seed % 2:
            damage()
        relay = Relay(SqliteStore(str(path)), ROOMY, clock=clock.clock)
        if not seed % 2:
            damage()
        use(relay, alice, clock)
        relay.close()
    assert [record for record in caplog.records if record.exc_info] == []


VANDALISM = {
    "the row of time gone": "DELETE FROM relay",
    "a table gone": "DROP TABLE messages",
    "the table of time gone": "DROP TABLE relay",
    "all gone": "DROP TABLE messages; DROP TABLE relay; DROP TABLE boxes; DROP TABLE challenges",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", [*VANDALISM.values(), None], ids=[*VANDALISM.keys(), "cut off"])
def test_damage_while_serving_is_answered_busy(
    script: str | None, start: Callable[..., Process], tmp_path: Path, alice: Owner
) -> None:
    path = tmp_path / "relay.db"
    process = start("--db", "relay.db")
    assert post(process.port, send(alice)) == (200, OK)
    if script:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as vandal:
            vandal.executescript(script)
    else:
        # A stopped relay leaves everything in the one file.
        process.stop()
        process = start("--db", "relay.db")
        os.truncate(path, 4_096)
    for request in requests_of_all_kinds(alice):
        status, reply = post(process.port, request)
        assert status in {200, 403, 503}
        assert isinstance(reply, list) or reply["ok"] is (status == 200)
    assert post(process.port, send(alice))[0] == 503
    health, _, _ = parse_response(
        exchange(process.port, http_request(b"", method="GET", path="/health"))
    )
    # A single read and a single write may still work.
    assert health in {200, 503}
    # The loop goes on past a tick and a sweep.
    assert post(process.port, check(alice, wait=1))[0] in {200, 503}
    assert post(process.port, check(Owner(9), wait=1))[0] in {200, 503}
    code, log = process.stop()
    assert "Traceback" not in log
    assert code == 0
