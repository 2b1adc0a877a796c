"""The store: what it keeps, what it refuses, and what is left of it after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from apps import (
    NOWHERE,
    SOON_S,
    SUITE,
    Apps,
    FakeRelay,
    honest,
    make_record,
    secrets_of,
    store_of,
)
from harness import ROOT, put_down_after

import connectoid
import connectoid.cli
from connectoid import (
    Connectoid,
    ContactRecord,
    RecordError,
    Store,
    StoreError,
)
from connectoid_relay import Relay

# ---------------------------------------------------------------------------------------
# The store.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_store_keeps_records_and_gives_them_back(tmp_path: Path, passphrase: str | None) -> None:
    """Add, change, delete; ids are never given twice."""
    first, second = make_record("Bob"), make_record("Carol")
    store = Store(tmp_path / "s.db", passphrase)
    numbers = [store.add(first), store.add(second)]
    store.save(numbers[0], dataclasses.replace(first, seq=7))
    store.delete(numbers[1])
    store.close()
    store = Store(tmp_path / "s.db", passphrase)
    assert store.load() == {numbers[0]: dataclasses.replace(first, seq=7)}
    assert store.add(second) not in numbers
    store.close()


def test_store_files_are_the_owners_alone(tmp_path: Path) -> None:
    """Check the mode of all files, within a transaction too, and of a file that was open to all."""
    (tmp_path / "s.db").touch(0o666)
    store = Store(tmp_path / "s.db")
    number = store.add(make_record())
    with store._transaction():
        store._db.execute("DELETE FROM contacts WHERE id = ?", (number,))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    store.close()
    assert modes == {"s.db": 0o600, "s.db-lock": 0o600, "s.db-journal": 0o600}


def test_store_of_a_deleted_contact_holds_nothing_of_it(tmp_path: Path) -> None:
    """Look for its keys in the bytes of the files."""
    record = make_record()
    store = Store(tmp_path / "s.db")
    store.delete(store.add(record))
    store.close()
    octets = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [secret for secret in secrets_of(record) if secret.encode() in octets]


def test_store_with_a_passphrase_shows_nothing(tmp_path: Path) -> None:
    """Look for keys, names and relays in the file."""
    record = make_record("Bartholomew")
    store = Store(tmp_path / "s.db", "correct horse")
    store.add(record)
    store.close()
    octets = (tmp_path / "s.db").read_bytes()
    private = (*secrets_of(record), "Bartholomew", "127.0.0.1", "correct")
    assert not [text for text in private if text.encode() in octets]


@pytest.mark.parametrize(
    ("made_with", "opened_with", "says"),
    [
        ("right", "wrong", "not the passphrase"),
        ("right", None, "has a passphrase"),
        ("right", "", "not the passphrase"),
        (None, "any", "has no passphrase"),
    ],
)
def test_store_refuses_another_passphrase(
    tmp_path: Path, made_with: str | None, opened_with: str | None, says: str
) -> None:
    """A user who gives a passphrase must not find the keys unprotected later."""
    path = tmp_path / "s.db"
    store = Store(path, made_with)
    store.add(make_record())
    store.close()
    before = path.read_bytes()
    for lock in (True, False):
        with pytest.raises(StoreError, match=says) as caught:
            Store(path, opened_with, lock=lock)
        assert str(path) in str(caught.value)
        assert "right" not in str(caught.value)
    assert path.read_bytes() == before
    Store(path, made_with).close()


def test_store_records_cannot_change_places(tmp_path: Path) -> None:
    """Somebody with the file swaps two encrypted records: both are refused."""
    path = tmp_path / "s.db"
    store = Store(path, "correct horse")
    store.add(make_record("Bob"))
    store.add(make_record("Mallory"))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "UPDATE contacts SET record = "
            "(SELECT record FROM contacts AS other WHERE other.id <> contacts.id)"
        )
    store = Store(path, "correct horse")
    with pytest.raises(StoreError, match="damaged"):
        store.load()
    store.close()


def test_store_that_is_closed_says_so_and_not_that_it_is_damaged(tmp_path: Path) -> None:
    """Whatever is asked of it."""
    store = Store(tmp_path / "s.db")
    record = make_record("Bob")
    number = store.add(record)
    store.close()
    asks: list[Callable[[], object]] = [
        store.load, store.load_refusals, functools.partial(store.export, "x"),
        functools.partial(store.add, record), functools.partial(store.save, number, record),
        functools.partial(store.delete, number), functools.partial(store.save_refusals, number, {}),
    ]
    for ask in asks:
        with pytest.raises(StoreError, match=r"^The store .*s\.db is closed\.$"):
            ask()


def test_store_that_another_program_holds_is_busy_and_not_damaged(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "s.db")) as store:
        store._execute("PRAGMA busy_timeout = 0")
        other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN EXCLUSIVE")
            for ask in (store.load, store.load_refusals):
                with pytest.raises(StoreError, match="cannot be read: database is locked"):
                    ask()


def test_store_has_one_runner_and_any_number_of_readers(tmp_path: Path) -> None:
    """A second runner is refused with a sentence, and readers see what is committed.

    Once a store is closed, another runner may have it.
    """
    path = tmp_path / "s.db"
    runner = Store(path)
    runner.add(make_record())
    with pytest.raises(StoreError, match=r"Another program is using .*s\.db: end it first\."):
        Store(path)
    readers = [Store(path, lock=False) for _ in range(3)]
    runner.add(make_record("Carol"))
    assert [[record.name for record in reader.load().values()] for reader in readers] == [
        ["Bob", "Carol"]
    ] * 3
    for store in (*readers, runner, runner):
        store.close()
    Store(path).close()


def write_foreign(path: Path, mode: str = "DELETE") -> None:
    """Write another program's SQLite file."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA journal_mode = {mode}")
        database.execute("CREATE TABLE contacts (id INTEGER PRIMARY KEY, record BLOB)")
        database.commit()


def change(sql: str) -> Callable[[Path], None]:
    """Return what changes a store by a statement."""

    def run(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute(sql)

    return run


def replaced_by(octets: bytes) -> Callable[[Path], None]:
    """Return what puts other bytes into a file."""
    return lambda path: void(path.write_bytes(octets))


def void(_: object) -> None:
    """Drop a value."""


def cut(path: Path, size: int) -> None:
    """Cut a file off."""
    os.truncate(path, size)


def afresh(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file in place of the store."""
    path.unlink()
    write(path)


def add_member(path: Path) -> None:
    """Change the JSON of a record, or its seal where it has one."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        (record,) = database.execute("SELECT record FROM contacts").fetchone()
        changed = record.replace(b'"version"', b'"new": 1, "version"')
        database.execute(
            "UPDATE contacts SET record = ?", (record[:-1] if changed == record else changed,)
        )


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut off in its header": functools.partial(cut, size=50),
    "cut off after a page": functools.partial(cut, size=4096),
    "cut off in a page": functools.partial(cut, size=10_000),
    "random": replaced_by(random.Random(1).randbytes(8192)),
    "text": replaced_by(b"Dear Bob,\nall is well.\n"),
    "nearly empty": replaced_by(b"\n"),
    "zeros": replaced_by(bytes(8192)),
    "foreign": functools.partial(afresh, write=write_foreign),
    "foreign with a log": functools.partial(
        afresh, write=functools.partial(write_foreign, mode="WAL")
    ),
    "a folder": functools.partial(afresh, write=Path.mkdir),
    "newer": change("PRAGMA user_version = 2"),
    "without a table": change("DROP TABLE contacts"),
    "without protection": change("DROP TABLE protection"),
    "a record that is no JSON": change("UPDATE contacts SET record = x'7b'"),
    "a record that is no text": change("UPDATE contacts SET record = x'ff'"),
    "a record that is no blob": change("UPDATE contacts SET record = '{}'"),
    "a record that is a number": change("UPDATE contacts SET record = 7"),
    "a record of another version": change(
        """UPDATE contacts SET record = CAST('{"version": 2}' AS BLOB)"""
    ),
    "a record with a member too few": change(
        """UPDATE contacts SET record = CAST('{"version": 1}' AS BLOB)"""
    ),
    "a record with unknown members": add_member,
}


# A key of a passphrase costs a tenth of a second, and each of these tests makes seven.
SEALED_IS_QUICK = ("without protection", "a record with unknown members")


def damaged_stores() -> Iterator[Any]:
    """Yield each damage, to a store without a passphrase and to one with it."""
    for name, damage in DAMAGES.items():
        yield pytest.param(damage, None, id=f"open-{name}")
        marks = [pytest.mark.slow]
        if name in SEALED_IS_QUICK:
            marks = []
        yield pytest.param(damage, "correct horse", id=f"sealed-{name}", marks=marks)


@pytest.mark.parametrize(("damage", "passphrase"), [*damaged_stores()])
def test_store_never_writes_to_a_damaged_or_foreign_file(
    tmp_path: Path,
    damage: Callable[[Path], None],
    passphrase: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reader, runner and commands report it in a sentence, and every byte stays."""
    path = tmp_path / "s.db"
    store = Store(path, passphrase)
    record = make_record()
    store.add(record)
    store.close()
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    for lock in (True, False):
        with (
            pytest.raises((StoreError, RecordError)) as caught,
            contextlib.closing(Store(path, passphrase, lock=lock)) as store,
        ):
            Connectoid(store)
        assert not [secret for secret in secrets_of(record) if secret in repr(caught.value)]
    if passphrase:
        monkeypatch.setenv("CONNECTOID_PASSPHRASE", passphrase)
    for command in (
        ["contacts"],
        ["share", "Carol", "--relay", NOWHERE],
        ["verify", "Bob"],
        ["unshare", "Bob"],
    ):
        assert connectoid.cli.main([*command, "--store", str(path)]) == 1, command
    assert capsys.readouterr().err.count("connectoid: ") == 4
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_store_with_flipped_bytes_is_read_or_refused(tmp_path: Path) -> None:
    """300 files with a damaged byte yield records, StoreError and RecordError, and nothing else."""
    chance = random.Random(7)
    store = Store(tmp_path / "s.db")
    for name in ("Bob", "Carol", "Dora"):
        store.add(make_record(name))
    store.close()
    whole = (tmp_path / "s.db").read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for number in range(300):
        octets = bytearray(whole)
        for _ in range(number % 8 + 1):
            octets[chance.choice([chance.randrange(200), chance.randrange(len(octets))])] ^= (
                1 << chance.randrange(8)
            )
        (tmp_path / "flipped.db").write_bytes(octets)
        try:
            with contextlib.closing(Store(tmp_path / "flipped.db")) as store:
                store.load()
            outcomes["read"] += 1
        except (StoreError, RecordError):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes


def test_store_import_gives_no_two_contacts_one_name(tmp_path: Path) -> None:
    """A contact is selected by its name."""
    with contextlib.closing(
        store_of(tmp_path / "old.db", make_record("Bob"), make_record("Bob (2)"))
    ) as old:
        exported = old.export("secret")
    with contextlib.closing(store_of(tmp_path / "new.db", make_record("Bob"))) as new:
        assert new.import_(exported, "secret") == 2
        assert sorted(record.name for record in new.load().values()) == [
            "Bob",
            "Bob (2)",
            "Bob (2) (2)",
        ]
        assert new.import_(exported, "secret") == 0


def test_store_export_brings_contacts_to_another_device(tmp_path: Path) -> None:
    """The first import adds all contacts, and the second one none.

    A wrong passphrase or a damaged export adds nothing.
    """
    store, other = Store(tmp_path / "a.db", "one"), Store(tmp_path / "b.db")
    records = [make_record("Bob"), make_record("Carol")]
    for record in records:
        store.add(record)
    exported = store.export("two")
    assert not [
        secret for record in records for secret in secrets_of(record) if secret.encode() in exported
    ]
    for octets, passphrase in (
        (exported, "one"),
        (exported, ""),
        (exported[:-1], "two"),
        (exported[:30], "two"),
        (exported[:19], "two"),
        (exported[:-1] + bytes([exported[-1] ^ 1]), "two"),
    ):
        with pytest.raises(
            StoreError, match=r"damaged, or this is not its passphrase|not an export"
        ):
            other.import_(octets, passphrase)
    with pytest.raises(StoreError, match="not an export"):
        other.import_(b"Dear Bob", "two")
    assert other.load() == {}
    assert [other.import_(exported, "two") for _ in range(2)] == [2, 0]
    assert list(other.load().values()) == records
    for opened in (store, other):
        opened.close()


def run_child(
    script: str, *arguments: object
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Start Python with a script that has connectoid imported; nothing is left of it afterwards."""
    before = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nimport connectoid\n"
    return put_down_after(
        subprocess.Popen(
            [sys.executable, "-c", before + script, *map(str, arguments)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )


WRITER = """
from dataclasses import replace
store = connectoid.Store(sys.argv[1], sys.argv[2] or None)
number, kept = next(iter(store.load().items()))
while True:
    kept = replace(kept, seq=kept.seq + 1, hello="h" * (kept.seq * 997 % 9000))
    store.save(number, kept)
    print(kept.seq, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("passphrase", ["", "correct horse"])
def test_store_survives_kills_at_any_point(tmp_path: Path, passphrase: str) -> None:
    """After kill -9 it has the last record that was acknowledged, or the next one."""
    path, chance = tmp_path / "s.db", random.Random(3)
    store = Store(path, passphrase or None)
    store.add(make_record())
    store.close()
    for _ in range(6):
        with run_child(WRITER, path, passphrase) as child:
            assert child.stdout is not None
            acknowledged = [int(child.stdout.readline()) for _ in range(chance.randrange(1, 40))]
            # Anywhere in a transaction.
            threading.Event().wait(chance.random() / 100)
            child.kill()
            acknowledged += map(int, child.communicate()[0].split())
        store = Store(path, passphrase or None)
        (record,) = store.load().values()
        store.close()
        assert record.seq - acknowledged[-1] in (0, 1)


MAKER = """
import sqlite3
def stop(statement):
    stop.left -= 1
    if stop.left < 0:
        os.kill(os.getpid(), 9)
stop.left = int(sys.argv[2])
class Traced(sqlite3.Connection):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.set_trace_callback(stop)
connect = sqlite3.connect
sqlite3.connect = lambda *args, **options: connect(*args, factory=Traced, **options)
connectoid.Store(sys.argv[1], "correct horse").close()
print("made")
"""


@pytest.mark.slow
def test_store_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """The process is killed before each of the statements that make a store.

    The next time the store opens with its passphrase, or is made anew.
    """
    for count in itertools.count():
        path = tmp_path / f"{count}.db"
        with run_child(MAKER, path, count) as child:
            printed, errors = child.communicate()
        assert child.returncode in (0, -9), errors
        Store(path, "correct horse").close()
        with pytest.raises(StoreError, match="has a passphrase"):
            Store(path)
        if printed:
            break
    assert count > 5


FULL = """
import resource, signal
store = connectoid.Store(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
(kept,) = store.load().values()
added = 0
try:
    while True:
        store.add(kept)
        added += 1
except connectoid.StoreError as error:
    print(error)
print(added, len(store.load()))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.add(kept)
print(len(store.load()))
"""


@pytest.mark.slow
def test_store_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A write fails with a sentence; what was there stays, and with room it goes on."""
    store = Store(tmp_path / "s.db")
    store.add(make_record())
    store.close()
    with run_child(FULL, tmp_path / "s.db") as child:
        printed, errors = child.communicate()
    said, counts, after = printed.splitlines()
    added, there = map(int, counts.split())
    assert said.startswith(f"The store {tmp_path}/s.db cannot be written: "), errors
    assert (there, int(after)) == (added + 1, added + 2)
    store = Store(tmp_path / "s.db")
    assert len(store.load()) == added + 2
    store.close()


NOBODY = 65_534
READ_ONLY = f"""
if os.getuid() == 0:
    os.setuid({NOBODY})
for lock in (True, False):
    try:
        store = connectoid.Store(sys.argv[1], lock=lock)
        print(len(store.load()))
        store.add(next(iter(store.load().values())))
    except connectoid.StoreError as error:
        print(error)
"""


@pytest.mark.slow
def test_store_in_a_read_only_folder_says_so() -> None:
    """No runner can begin there, and nothing ends in a traceback."""
    folder = Path(tempfile.mkdtemp())
    try:
        store = Store(folder / "s.db")
        store.add(make_record())
        store.close()
        before = (folder / "s.db").read_bytes()
        (folder / "s.db-lock").unlink()
        if os.getuid() == 0:
            os.chown(folder / "s.db", NOBODY, NOBODY)
        folder.chmod(0o555)
        with run_child(READ_ONLY, folder / "s.db") as child:
            printed, errors = child.communicate()
        assert not errors
        assert printed.splitlines()[0].startswith(f"The store {folder}/s.db cannot be opened: ")
        assert printed.splitlines()[-1].startswith(f"The store {folder}/s.db cannot be written: ")
        assert (folder / "s.db").read_bytes() == before
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------
# Saved before it leaves: the files are copied whenever a relay gets a message, which is what
# a process that is killed at that moment leaves behind.
# ---------------------------------------------------------------------------------------


class Copies:
    """A relay that copies the stores of a folder for each message that it gets."""

    def __init__(self, folder: Path, relay: Relay) -> None:
        self._folder, self._relay = folder, relay
        # Mailbox, data, where the copies are.
        self.sent: list[tuple[str, str, Path]] = []

    def reply(self, request: Any) -> bytes:
        """Copy, then let the relay answer."""
        if isinstance(request, dict) and request["action"] == "send":
            copies = self._folder / f"copies {len(self.sent)}"
            copies.mkdir()
            for path in self._folder.glob("*.db*"):
                shutil.copy(path, copies)
            self.sent.append((request["pub"], request["data"], copies))
        return honest(self._relay)(request)


def keys_of(records: Sequence[ContactRecord]) -> dict[str, str]:
    """Return the private keys of all mailboxes."""
    return {
        mailbox.pub: key
        for record in records
        for own in record.addresses
        for mailbox, key in own.keyed_mailboxes
    }


@pytest.mark.slow
def test_store_has_a_message_before_it_leaves(apps: Apps, relay: Relay) -> None:
    """Whenever a process ends, its store knows of every message that it has sent."""
    copies = Copies(apps.folder, relay)
    with FakeRelay(copies.reply) as fake:
        _, bob = apps.pair(fake.url)
        bob.connect("Alice", SOON_S).close()
        types = []
        keys: dict[str, str] = {}
        for pub, data, folder in copies.sent:
            stores = [Store(folder / f"{name}.db") for name in ("Alice", "Bob")]
            records = [record for store in stores for record in store.load().values()]
            for store in stores:
                store.close()
            keys |= keys_of(records)
            message = connectoid.read_jws(connectoid.open_message(SUITE, keys[pub], data))
            (sender,) = [record for record in records if record.signer == message.payload["from"]]
            assert (
                sender.seq >= message.payload["seq"]
                or message.type in connectoid.messages.UNNUMBERED
            )
            assert message.payload["connectoid"] in [
                own.address for own in (sender.current, sender.pending) if own
            ]
            assert message.type != "hello" or sender.hello.startswith(message.jws)
            assert message.type != "welcome" or (
                sender.welcome.startswith(message.jws) and sender.contact
            )
            types.append(message.type)
    assert types[:3] == ["hello", "welcome", "ready"]
    assert "offer" in types
