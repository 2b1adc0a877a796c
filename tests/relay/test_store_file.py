"""Test the database file: its lock, its columns, older files, and the numbers for hosts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import sqlite3
from pathlib import Path

import pytest
from harness import (
    NOTHING,
    NOW_US,
    OK,
    START_US,
    STORES,
    TO_MIDNIGHT_S,
    FakeClock,
    Owner,
    alices,
    ask,
    box_of,
    check,
    put,
    relay_on,
    run_relay,
    send,
    texts_of,
)

import connectoid_relay
from connectoid_relay import (
    DAY_US,
    HOUR_US,
    MIN_COUNTED_BYTES,
    MIN_SQLITE,
    SCHEMA,
    YEAR_2200_US,
    Limits,
    Look,
    Message,
    NoRoom,
    Quota,
    SqliteStore,
    Stored,
    StoreError,
    check_sqlite,
)


def test_store_behind_a_link_has_its_lock_beside_the_file_itself(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "link.db").symlink_to(folder / "disk" / "relay.db")
    store = SqliteStore(str(folder / "link.db"))
    put(store)
    assert {path.name for path in folder.iterdir()} == {"disk", "link.db"}
    assert {path.name for path in (folder / "disk").iterdir()} >= {
        "relay.db",
        "relay.db-lock",
        "relay.db-wal",
    }
    store.close()


def test_store_refuses_a_link_in_the_place_of_its_lock(folder: Path) -> None:
    (folder / "relay.db-lock").symlink_to(folder / "precious")
    with pytest.raises(StoreError, match="Too many levels of symbolic links"):
        SqliteStore(str(folder / "relay.db"))
    assert not (folder / "precious").exists()


@pytest.mark.parametrize("column", ["time_us", "last_at"])
def test_store_with_a_time_that_no_relay_has_is_refused(folder: Path, column: str) -> None:
    """A time past the year 2200, up to the largest number of SQLite."""
    for time_us, refused in ((YEAR_2200_US - 1, False), (YEAR_2200_US, True), (2**63 - 1, True)):
        STORES["file"](folder).close()
        with contextlib.closing(sqlite3.connect(folder / "relay.db")) as db, db:
            db.execute(f"UPDATE relay SET {column} = ?", (time_us,))
        if refused:
            with pytest.raises(StoreError, match="no relay time"):
                STORES["file"](folder)
            with contextlib.closing(sqlite3.connect(folder / "relay.db")) as db, db:
                db.execute(f"UPDATE relay SET {column} = 0")
        else:
            STORES["file"](folder).close()


@pytest.mark.parametrize("write", ["put", "sweep", "close"])
def test_what_is_written_soon_is_written_with_the_next_write(folder: Path, write: str) -> None:
    store = STORES["file"](folder)
    store.keep_boxes({box_of(0): NOW_US + HOUR_US}, NOW_US, 1, soon=True)
    assert store.look(box_of(0), 0, NOW_US) == Look(False, None)
    {"put": lambda: put(store), "sweep": lambda: store.sweep(NOW_US), "close": store.close}[write]()
    other = STORES["file"](folder)
    assert other.look(box_of(0), 0, NOW_US).box_expires_us == NOW_US + HOUR_US
    other.close()
    store.close()


def test_snapshot_shows_one_state_to_this_thread_alone(folder: Path) -> None:
    store = STORES["file"](folder)
    with store.snapshot():
        assert store.look(box_of(0), 0, NOW_US) == Look(False, None)
        put(store)
        assert store.look(box_of(0), 0, NOW_US) == Look(False, None)
        with concurrent.futures.ThreadPoolExecutor(1) as another:
            assert another.submit(store.look, box_of(0), 0, NOW_US).result() == Look(True, None)
    assert store.look(box_of(0), 0, NOW_US) == Look(True, None)
    with store.snapshot():
        store.close()
    with store.snapshot(), pytest.raises(StoreError):
        store.look(box_of(0), 0, NOW_US)


# ---------------------------------------------------------------------------------------
# The store: files of older relays, and the numbers that it keeps for hosts.
# ---------------------------------------------------------------------------------------


def old_file(path: Path, owner: Owner, messages: int) -> None:
    """Make a file as the first relay did, with messages and the box row of an owner."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for sql in (*SCHEMA[0], "PRAGMA user_version = 1"):
            db.execute(sql)
        for number in range(messages):
            db.execute(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?)",
                (
                    START_US + number,
                    owner.box,
                    START_US + 3_600_000_000 + number,
                    b"s" * 16,
                    4,
                    f"QUJ{number}",
                ),
            )
        db.execute("INSERT INTO boxes VALUES (?, ?)", (owner.box, START_US + 30 * DAY_US))
        db.execute("UPDATE relay SET time_us = ?, last_at = ?, bytes = ?, boxes = 1", (
            START_US, START_US + messages - 1, messages * MIN_COUNTED_BYTES))


def test_file_of_the_first_schema_is_taken_over_with_all_that_is_in_it(
        tmp_path: Path, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    path = tmp_path / "relay.db"
    old_file(path, alice, 3)
    access = alices(Quota("public", bytes=8))
    with relay_on(path, clock, access=access) as relay:
        assert relay.stored() == Stored(3, 3 * MIN_COUNTED_BYTES, 1)
        assert relay.store.look(alice.box, 0, START_US).box_expires_us == START_US + 30 * DAY_US
        assert texts_of(relay, alice) == ["QUJ0", "QUJ1", "QUJ2"]
        assert ask(relay, send(alice, "bmV3"), check(bob)) == [OK, NOTHING]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(SCHEMA),)
    clock.advance(1)
    # Now it is a file of today.
    with relay_on(path, clock, access=access) as relay:
        assert texts_of(relay, alice) == ["QUJ0", "QUJ1", "QUJ2", "bmV3"]
        assert ask(relay, send(bob, "bmV3"), send(bob, "bmV3")) == [OK, (429, "Too often", 60)]
        assert relay.stored() == Stored(5, 5 * MIN_COUNTED_BYTES, 1)
        clock.advance(3_599.5)
        # Messages of old belong to no quota, and expire like the others.
        relay.sweep()
        assert relay.stored() == Stored(1, MIN_COUNTED_BYTES, 1)
        assert ask(relay, send(bob, "bmV3"), send(bob, "bmV3")) == [OK, (429, "Too often", 60)]


def refusal_of(version: int) -> str:
    """Return what is said of a file with the schema of another relay."""
    return (f"relay.db has schema {version}, and this program knows {len(SCHEMA)};"
            " install a newer one, or choose another file with --db")


@pytest.mark.parametrize("version", [len(SCHEMA) + 1, 2**31 - 1, -1, 0])
def test_file_of_a_version_to_come_is_refused_in_one_line_and_stays_as_it_is(
        tmp_path: Path, alice: Owner, version: int) -> None:
    old_file(tmp_path / "relay.db", alice, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "relay.db")) as db:
        db.execute(f"PRAGMA user_version = {version}")
    octets = (tmp_path / "relay.db").read_bytes()
    with pytest.raises(StoreError) as caught:
        SqliteStore(str(tmp_path / "relay.db"))
    assert str(caught.value) == f"{tmp_path}/{refusal_of(version)}"
    assert (tmp_path / "relay.db").read_bytes() == octets


@pytest.mark.sockets
def test_process_refuses_a_file_of_a_version_to_come(tmp_path: Path, alice: Owner) -> None:
    old_file(tmp_path / "relay.db", alice, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "relay.db")) as db:
        db.execute(f"PRAGMA user_version = {len(SCHEMA) + 1}")
    finished = run_relay("--db", "relay.db", "--port", "0", cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr == f"connectoid-relay: {refusal_of(len(SCHEMA) + 1)}\n"


def test_stored_follows_puts_and_sweeps() -> None:
    with contextlib.closing(SqliteStore(":memory:")) as store:
        assert store.stored() == Stored(0, 0, 0)
        for number, size in enumerate((2, MIN_COUNTED_BYTES, MIN_COUNTED_BYTES + 1)):
            message = Message(Owner(1).box, "A" * size, b"s", 10 + number, Quota("q"))
            assert store.put(message, Limits(), START_US) == START_US + number
        counted = 3 * MIN_COUNTED_BYTES + 1
        assert store.stored() == Stored(3, counted, 0)
        store.keep_boxes({Owner(1).box: START_US + 11}, START_US, room_for=1)
        assert store.stored() == Stored(3, counted, 1)
        for now_us, stored in ((START_US + 9, Stored(3, counted, 1)),
                               (START_US + 11, Stored(2, counted - MIN_COUNTED_BYTES, 0)),
                               (START_US + 14, Stored(0, 0, 0))):
            assert store.sweep(now_us) is False
            assert store.stored() == stored


def test_spend_adds_by_name_and_day(tmp_path: Path) -> None:
    days = [START_US + day * DAY_US for day in range(3)]
    midnight_us = START_US + TO_MIDNIGHT_S * 1_000_000
    def spend(requests: dict[str, int], now_us: int) -> dict[str, int]:
        store.spend(requests, now_us)
        return store.spent(now_us)

    with contextlib.closing(SqliteStore(str(tmp_path / "relay.db"))) as store:
        assert spend({"a": 2}, days[0]) == {"a": 2}
        assert spend({"b": 1, "a": 3}, midnight_us - 1) == {"b": 1, "a": 5}
        assert spend({"a": 4}, midnight_us) == {"a": 4}
        # The store's own time counts, and that does not go back.
        assert spend({"a": 1}, days[0]) == {"b": 1}
        assert store.spent(midnight_us) == {"a": 5}
    with contextlib.closing(SqliteStore(str(tmp_path / "relay.db"))) as store:
        assert spend({"a": 1, "b": 7}, days[1]) == {"a": 6, "b": 7}
        assert spend({"a": 1}, days[2]) == {"a": 1}
        store.put(Message(Owner(1).box, "QUJD", b"s", 10, Quota("a", bytes=4)), Limits(), days[2])
        assert spend({"a": 1}, days[2]) == {"a": 2}
        with pytest.raises(NoRoom, match="quota"):
            store.put(Message(Owner(1).box, "QU", b"s", 10, Quota("a", bytes=4)), Limits(), days[2])


def test_older_sqlite_is_refused_in_one_sentence() -> None:
    major, minor, _ = MIN_SQLITE
    with pytest.raises(StoreError, match=r"SQLite 3\.36\.9 .* 3\.37\.0 or newer"):
        check_sqlite((major, minor - 1, 9))
    check_sqlite(MIN_SQLITE)
    check_sqlite((major, minor, 1))


def test_syncs_reach_the_disk_on_macos_too(folder: Path) -> None:
    store = SqliteStore(str(folder / "relay.db"))
    with contextlib.closing(store):
        assert store._file.db.execute("PRAGMA fullfsync").fetchone() == (1,)


def test_statements_name_their_values_or_count_on_their_order() -> None:
    """Python 3.12 warns of ?1 with a tuple, on the terminal of the host."""
    statements = [value for value in vars(connectoid_relay).values() if isinstance(value, str)]
    assert not [text for text in statements if re.search(r"= \?[0-9]", text)]
