"""Prove the outer part of connectoid.py (store, relay client, runner, asyncio, aiortc) and connectoid_cli.py.

The first half runs in one process, with WebRTC in memory; the tests marked `slow` start real processes that
connect through aiortc and the real relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import queue
import random
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import connectoid
import connectoid_cli
from conftest import ROOT, Process, running, serving
from connectoid import (
    AiortcAdapter,
    AsyncConnectoid,
    Channel,
    Connectoid,
    ConnectoidError,
    Contact,
    Kept,
    LinkError,
    NotConnectedError,
    RecordError,
    RelayClient,
    RelayError,
    Store,
    StoreError,
    SystemSuite,
    UsageError,
)
from connectoid_relay import Relay, RelayServer, SqliteStore

APP_URL = "https://app.example.com/"
NOWHERE = "http://127.0.0.1:9/"  # nobody listens there
SOON_S = 20.0  # for what takes a moment, on a machine that is busy
LOOK_EVERY_S = 0.01
SUITE = SystemSuite()


def until(holds: Callable[[], object], what: str, timeout_s: float = SOON_S) -> None:
    """Wait until something holds."""
    end_s, pause = time.monotonic() + timeout_s, threading.Event()
    while not holds():
        assert time.monotonic() < end_s, f"{what}: not within {timeout_s:.0f} s"
        pause.wait(LOOK_EVERY_S)


def make_kept(name: str = "Bob", url: str = NOWHERE) -> Kept:
    """Return the record of a new contact."""
    return Contact.invite(SUITE, connectoid.system_now(), name, [(url, None)])[0].kept


def secrets_of(kept: Kept) -> list[str]:
    """Return everything in a record that nobody else may see."""
    owns = [own for own in (kept.invited, kept.current, kept.pending, kept.former) if own]
    fourth = kept.invitation.rpartition(".")[2]
    return [text for text in (kept.private_key, kept.r, fourth, *(key for own in owns for key in own.keys)) if text]


# ---------------------------------------------------------------------------------------
# Fakes: relays that answer what a function says, and WebRTC in memory.
# ---------------------------------------------------------------------------------------


def http_reply(body: object, *headers: str, status: str = "200 OK") -> bytes:
    """Return an HTTP response with JSON (or raw bytes) in it."""
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(octets)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + octets


class Asked(NamedTuple):
    """A request that a fake relay got: when, and the JSON in it, None for a GET."""

    at_s: float
    request: Any


class FakeRelay:
    """Answer each request with the octets that a function makes of it; None keeps the other waiting."""

    def __init__(self, reply: Callable[[Any], bytes | None]) -> None:
        self._reply = reply
        self.asked: list[Asked] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FakeRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    @property
    def posts(self) -> list[Asked]:
        """Return what was asked but for the relay's document."""
        return [asked for asked in self.asked if asked.request is not None]

    @property
    def checks(self) -> list[Asked]:
        """Return the batches of checks."""
        return [asked for asked in self.posts if isinstance(asked.request, list)]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            stream = client.makefile("rb")
            stream.readline()
            length = int(http.client.parse_headers(stream).get("Content-Length", "0"))
            request = json.loads(stream.read(length)) if length else None
            self.asked.append(Asked(time.monotonic(), request))
            octets = self._reply(request)
            if octets is None:
                self._ended.wait()
            else:
                client.sendall(octets)


def honest(relay: Relay) -> Callable[[Any], bytes]:
    """Return the replies of a real relay; a check that would wait is answered at once."""

    def reply(request: Any) -> bytes:
        return http_reply({"ok": True} if request is None else relay.handle(request, "192.0.2.1")[1])

    return reply


def nothing_new(request: Any) -> bytes:
    """Return what a relay says that has no messages."""
    found: dict[str, Any] = {"ok": True, "found": False}
    return http_reply([found] * len(request) if isinstance(request, list) else found)


class End:
    """One end of a connection in memory."""

    def __init__(self, wire: Wire, contact: int, ask: int) -> None:
        self.wire, self.contact, self.ask = wire, contact, ask
        self.other: End | None = None

    def report(self, event: str, value: Any = None) -> None:
        """Report to the app whose end it is, from the network's thread."""
        self.wire.wires.later(functools.partial(self.wire.report, self.contact, event, self.ask, value))


class Wires:
    """Be a network in memory: it makes adapters, and reports to all of them from one thread."""

    def __init__(self) -> None:
        self.ends: dict[str, End] = {}
        self.gathered = 0
        self._work: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._work_on, daemon=True).start()

    def later(self, work: Callable[[], None]) -> None:
        """Have something done by the network's thread."""
        self._work.put(work)

    def adapter(self) -> Wire:
        """Return an adapter for one app."""
        return Wire(self)

    def _work_on(self) -> None:
        while True:
            try:
                self._work.get()()
            except ConnectoidError:  # as a WebRTC stack does
                logging.getLogger("wires").debug("a report failed", exc_info=True)


class Wire:
    """Connect in memory; an SDP is a name in the network's book."""

    def __init__(self, wires: Wires) -> None:
        self.wires = wires
        self.report: Callable[[int, str, int, Any], None] = lambda *_: None
        self._ends: dict[int, End] = {}

    def start(self, report: Callable[[int, str, int, Any], None]) -> None:
        """Begin: reports go there."""
        self.report = report

    def gather(self, contact: int, ask: int, offer: Mapping[str, str] | None, ice_servers: Sequence[str]) -> None:
        """Note an end under a new name."""
        self.close(contact, self._ends[contact].ask if contact in self._ends else ask)
        self.wires.gathered += 1
        kind, name = "answer" if offer else "offer", f"end {self.wires.gathered}"
        end = self.wires.ends[name] = self._ends[contact] = End(self, contact, ask)
        if offer:
            end.other = self.wires.ends[offer["sdp"]]
        end.report("gathered", {"type": kind, "sdp": name})

    def join(self, contact: int, ask: int, answer: Mapping[str, str]) -> None:
        """Connect both ends."""
        mine, theirs = self._ends[contact], self.wires.ends[answer["sdp"]]
        if theirs.other is mine:
            mine.other = theirs
            mine.report("opened")
            theirs.report("opened")

    def write(self, contact: int, ask: int, message: bytes | str) -> Future[None]:
        """Bring a message to the other end."""
        future: Future[None] = Future()
        end = self._ends.get(contact)
        if end is None or end.ask != ask or end.other is None:
            future.set_exception(ConnectionError("closed"))
        else:
            end.other.report("message", message)
            future.set_result(None)
        return future

    def close(self, contact: int, ask: int) -> None:
        """Close both ends."""
        end = self._ends.get(contact)
        if end is not None and end.ask == ask:
            del self._ends[contact]
            if end.other is not None and end.other.other is end:
                end.other.other = None
                end.other.report("closed")

    def stop(self) -> None:
        """Close all."""
        for contact, end in list(self._ends.items()):
            self.close(contact, end.ask)


class Apps:
    """Make apps on one network in memory, and close them with the test."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.wires = Wires()
        self.told: list[tuple[str, str, str]] = []  # whose app, about whom, what

    def begin(self, who: str, *urls: str, store: Store | None = None, webrtc: connectoid.WebRTC | None = None,
              **options: Any) -> Connectoid:
        """Return a running app; its store is named after its owner."""
        app = Connectoid(store or Store(self.folder / f"{who}.db"), [(url, None) for url in urls],
                         webrtc or self.wires.adapter(),
                         on_event=lambda name, event: self.told.append((who, name, event)), **options)
        return self._stack.enter_context(app)

    def pair(self, url: str, **options: Any) -> tuple[Connectoid, Connectoid]:
        """Return Alice's app and Bob's, connected once and disconnected again."""
        alice, bob = self.begin("Alice", url, **options), self.begin("Bob", url, **options)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        channel = alice.connect("Bob", SOON_S)
        until(lambda: {alice.contacts()[0].state, bob.contacts()[0].state} == {"paired"}, "paired")
        channel.close()
        until(lambda: ("Bob", "Alice", "disconnected") in self.told, "disconnected")
        return alice, bob


@pytest.fixture
def apps(tmp_path: Path) -> Iterator[Apps]:
    """Return what makes apps."""
    with contextlib.ExitStack() as stack:
        yield Apps(tmp_path, stack)


@pytest.fixture
def relay_url() -> Iterator[str]:
    """Return the URL of a real relay in a thread."""
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    relay.close()


# ---------------------------------------------------------------------------------------
# The store.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_store_keeps_records_and_gives_them_back(tmp_path: Path, passphrase: str | None) -> None:
    """Add, change, delete; ids are never given twice."""
    first, second = make_kept("Bob"), make_kept("Carol")
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
    """Look at the mode of all files, also within a transaction and for a file that was open to all."""
    (tmp_path / "s.db").touch(0o666)
    store = Store(tmp_path / "s.db")
    number = store.add(make_kept())
    with store._transaction():
        store._db.execute("DELETE FROM contacts WHERE id = ?", (number,))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    store.close()
    assert modes == {"s.db": 0o600, "s.db-lock": 0o600, "s.db-journal": 0o600}


def test_store_of_a_deleted_contact_holds_nothing_of_it(tmp_path: Path) -> None:
    """Look for its keys in the bytes of the files."""
    kept = make_kept()
    store = Store(tmp_path / "s.db")
    store.delete(store.add(kept))
    store.close()
    octets = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [secret for secret in secrets_of(kept) if secret.encode() in octets]


def test_store_with_a_passphrase_shows_nothing(tmp_path: Path) -> None:
    """Look for keys, names and relays in the file."""
    kept = make_kept("Bartholomew")
    store = Store(tmp_path / "s.db", "correct horse")
    store.add(kept)
    store.close()
    octets = (tmp_path / "s.db").read_bytes()
    assert not [text for text in (*secrets_of(kept), "Bartholomew", "127.0.0.1", "correct") if text.encode() in octets]


@pytest.mark.parametrize(("made_with", "opened_with", "says"), [
    ("right", "wrong", "not the passphrase"), ("right", None, "has a passphrase"), ("right", "", "not the passphrase"),
    (None, "any", "has no passphrase")])
def test_store_refuses_another_passphrase(tmp_path: Path, made_with: str | None, opened_with: str | None,
                                          says: str) -> None:
    """Whoever gives one must not find his keys unprotected later."""
    path = tmp_path / "s.db"
    store = Store(path, made_with)
    store.add(make_kept())
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
    store.add(make_kept("Bob"))
    store.add(make_kept("Mallory"))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE contacts SET record = (SELECT record FROM contacts AS o WHERE o.id <> contacts.id)")
    store = Store(path, "correct horse")
    with pytest.raises(StoreError, match="damaged"):
        store.load()
    store.close()


def test_store_has_one_runner_and_any_number_of_readers(tmp_path: Path) -> None:
    """The second runner gets a sentence, readers see what is committed, and a closed store is free."""
    path = tmp_path / "s.db"
    runner = Store(path)
    runner.add(make_kept())
    with pytest.raises(StoreError, match=r"Another program is using .*s\.db: end it first\."):
        Store(path)
    readers = [Store(path, lock=False) for _ in range(3)]
    runner.add(make_kept("Carol"))
    assert [[kept.name for kept in reader.load().values()] for reader in readers] == [["Bob", "Carol"]] * 3
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
        database.execute("UPDATE contacts SET record = ?", (record[:-1] if changed == record else changed,))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut off in its header": functools.partial(cut, size=50),
    "cut off after a page": functools.partial(cut, size=4096),
    "cut off in a page": functools.partial(cut, size=10_000),
    "random": replaced_by(random.Random(1).randbytes(8192)),
    "text": replaced_by(b"Dear Bob,\nall is well.\n"),
    "nearly empty": replaced_by(b"\n"),
    "zeros": replaced_by(bytes(8192)),
    "foreign": functools.partial(afresh, write=write_foreign),
    "foreign with a log": functools.partial(afresh, write=functools.partial(write_foreign, mode="WAL")),
    "a folder": functools.partial(afresh, write=Path.mkdir),
    "newer": change("PRAGMA user_version = 2"),
    "without a table": change("DROP TABLE contacts"),
    "without protection": change("DROP TABLE protection"),
    "a record that is no JSON": change("UPDATE contacts SET record = x'7b'"),
    "a record that is no text": change("UPDATE contacts SET record = x'ff'"),
    "a record that is no blob": change("UPDATE contacts SET record = '{}'"),
    "a record that is a number": change("UPDATE contacts SET record = 7"),
    "a record of another version": change("""UPDATE contacts SET record = CAST('{"version": 2}' AS BLOB)"""),
    "a record with a member too few": change("""UPDATE contacts SET record = CAST('{"version": 1}' AS BLOB)"""),
    "a record with unknown members": add_member,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("passphrase", [None, "correct horse"], ids=["open", "sealed"])
def test_store_never_writes_to_a_damaged_or_foreign_file(
        tmp_path: Path, damage: Callable[[Path], None], passphrase: str | None,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader, runner and commands say so in a sentence, and every byte stays."""
    path = tmp_path / "s.db"
    store = Store(path, passphrase)
    kept = make_kept()
    store.add(kept)
    store.close()
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    for lock in (True, False):
        with pytest.raises((StoreError, RecordError)) as caught, contextlib.closing(
                Store(path, passphrase, lock=lock)) as store:
            Connectoid(store)
        assert not [secret for secret in secrets_of(kept) if secret in repr(caught.value)]
    if passphrase:
        monkeypatch.setenv("CONNECTOID_PASSPHRASE", passphrase)
    for command in (["contacts"], ["share", "Carol", "--relay", NOWHERE], ["verify", "Bob"], ["unshare", "Bob"]):
        assert connectoid_cli.main([*command, "--store", str(path)]) == 1, command
    assert capsys.readouterr().err.count("connectoid: ") == 4
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_store_with_flipped_bytes_is_read_or_refused(tmp_path: Path) -> None:
    """Nothing else comes out of 300 files with a damaged byte than records, StoreError and RecordError."""
    chance = random.Random(7)
    store = Store(tmp_path / "s.db")
    for name in ("Bob", "Carol", "Dora"):
        store.add(make_kept(name))
    store.close()
    whole = (tmp_path / "s.db").read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for number in range(300):
        octets = bytearray(whole)
        for _ in range(number % 8 + 1):
            octets[chance.choice([chance.randrange(200), chance.randrange(len(octets))])] ^= 1 << chance.randrange(8)
        (tmp_path / "flipped.db").write_bytes(octets)
        try:
            with contextlib.closing(Store(tmp_path / "flipped.db")) as store:
                store.load()
            outcomes["read"] += 1
        except (StoreError, RecordError):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes


def test_store_import_gives_no_two_contacts_one_name(tmp_path: Path) -> None:
    """A contact is asked for by its name."""
    with contextlib.closing(store_of(tmp_path / "old.db", make_kept("Bob"), make_kept("Bob (2)"))) as old:
        exported = old.export("secret")
    with contextlib.closing(store_of(tmp_path / "new.db", make_kept("Bob"))) as new:
        assert new.import_(exported, "secret") == 2
        assert sorted(kept.name for kept in new.load().values()) == ["Bob", "Bob (2)", "Bob (2) (2)"]
        assert new.import_(exported, "secret") == 0


def test_store_export_brings_contacts_to_another_device(tmp_path: Path) -> None:
    """Once they are new, the second time not; a wrong passphrase or a damaged export adds nothing."""
    store, other = Store(tmp_path / "a.db", "one"), Store(tmp_path / "b.db")
    records = [make_kept("Bob"), make_kept("Carol")]
    for kept in records:
        store.add(kept)
    exported = store.export("two")
    assert not [secret for kept in records for secret in secrets_of(kept) if secret.encode() in exported]
    for octets, passphrase in ((exported, "one"), (exported, ""), (exported[:-1], "two"), (exported[:30], "two"),
                               (exported[:19], "two"), (exported[:-1] + bytes([exported[-1] ^ 1]), "two")):
        with pytest.raises(StoreError, match=r"damaged, or this is not its passphrase|not an export"):
            other.import_(octets, passphrase)
    with pytest.raises(StoreError, match="not an export"):
        other.import_(b"Dear Bob", "two")
    assert other.load() == {}
    assert [other.import_(exported, "two") for _ in range(2)] == [2, 0]
    assert list(other.load().values()) == records
    for opened in (store, other):
        opened.close()


def test_contacts_say_nothing_secret_of_themselves(apps: Apps, relay_url: str,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    """Neither do reprs, nor the log of a whole pairing."""
    caplog.set_level(logging.DEBUG)
    alice, bob = apps.pair(relay_url)
    records = [*alice.contacts(), *bob.contacts()]
    said = caplog.text + repr([records, [connectoid.Save(kept) for kept in records], alice, alice.polls(relay_url),
                               [vars(contact) for app in (alice, bob) for contact in app._contacts.values()]])
    assert not [secret for kept in records for secret in secrets_of(kept) if secret in said]


def run_child(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start Python with a script that has connectoid imported."""
    before = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nimport connectoid\n"
    return subprocess.Popen([sys.executable, "-c", before + script, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


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
    store.add(make_kept())
    store.close()
    for _ in range(6):
        child = run_child(WRITER, path, passphrase)
        assert child.stdout is not None
        acknowledged = [int(child.stdout.readline()) for _ in range(chance.randrange(1, 40))]
        threading.Event().wait(chance.random() / 100)  # anywhere in a transaction
        child.kill()
        acknowledged += map(int, child.communicate()[0].split())
        store = Store(path, passphrase or None)
        (kept,) = store.load().values()
        store.close()
        assert kept.seq - acknowledged[-1] in (0, 1)


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
    """Killed before any of the statements that make it, it is under its passphrase the next time, or made then."""
    for count in itertools.count():
        path = tmp_path / f"{count}.db"
        child = run_child(MAKER, path, count)
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
    store.add(make_kept())
    store.close()
    printed, errors = run_child(FULL, tmp_path / "s.db").communicate()
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
    """A runner cannot begin there; nothing is a traceback."""
    folder = Path(tempfile.mkdtemp())
    try:
        store = Store(folder / "s.db")
        store.add(make_kept())
        store.close()
        before = (folder / "s.db").read_bytes()
        (folder / "s.db-lock").unlink()
        if os.getuid() == 0:
            os.chown(folder / "s.db", NOBODY, NOBODY)
        folder.chmod(0o555)
        printed, errors = run_child(READ_ONLY, folder / "s.db").communicate()
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
        self.sent: list[tuple[str, str, Path]] = []  # mailbox, data, where the copies are

    def reply(self, request: Any) -> bytes:
        """Copy, then let the relay answer."""
        if isinstance(request, dict) and request["action"] == "send":
            copies = self._folder / f"copies {len(self.sent)}"
            copies.mkdir()
            for path in self._folder.glob("*.db*"):
                shutil.copy(path, copies)
            self.sent.append((request["pub"], request["data"], copies))
        return honest(self._relay)(request)


def keys_of(records: Sequence[Kept]) -> dict[str, str]:
    """Return the private keys of all mailboxes."""
    owns = [own for kept in records for own in (kept.invited, kept.current, kept.pending, kept.former) if own]
    return {mailbox.pub: key for own in owns for mailbox, key in zip(own.mailboxes, own.keys, strict=True)}


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
            records = [kept for store in stores for kept in store.load().values()]
            for store in stores:
                store.close()
            keys |= keys_of(records)
            message = connectoid.read_jws(connectoid.open_message(SUITE, keys[pub], data))
            (sender,) = [kept for kept in records if kept.signer == message.payload["from"]]
            assert sender.seq >= message.payload["seq"] or message.type in connectoid.UNNUMBERED
            assert message.payload["connectoid"] in [own.address for own in (sender.current, sender.pending) if own]
            assert message.type != "hello" or sender.hello.startswith(message.jws)
            assert message.type != "welcome" or (sender.welcome.startswith(message.jws) and sender.contact)
            types.append(message.type)
    assert types[:3] == ["hello", "welcome", "ready"]
    assert "offer" in types


class FullStore(Store):
    """A store whose disk can be full."""

    full = False

    def save(self, number: int, kept: Kept) -> None:
        """Save, if there is room."""
        if self.full:
            raise StoreError("The store cannot be written: the disk is full.")
        super().save(number, kept)


@pytest.mark.slow
def test_runner_with_a_full_disk_sends_nothing_and_goes_on_later(apps: Apps, relay_url: str) -> None:
    """What could not be saved is not sent; once there is room, the contacts pair."""
    store = FullStore(apps.folder / "full.db")
    alice, bob = apps.begin("Alice", relay_url, store=store), apps.begin("Bob", relay_url)
    link = alice.share("Bob", APP_URL)
    store.full = True
    bob.open(link, "Alice")
    threading.Event().wait(3.0)  # longer than from one check to the next
    assert bob.contacts()[0].state == "opened"
    store.full = False
    alice.connect("Bob", SOON_S)
    until(lambda: bob.contacts()[0].state == "paired", "paired")


# ---------------------------------------------------------------------------------------
# The client of a relay.
# ---------------------------------------------------------------------------------------

FOUND = {"ok": True, "found": True}
BIG = b'{"ok": true, "data": "' + b"A" * (1024 * 1024 - 23) + b'"}'  # a byte over 1 MiB
RUBBISH: dict[str, bytes] = {
    "HTML": http_reply(b"<html>Welcome to the hotel</html>"),
    "no JSON": http_reply(b"{"),
    "no UTF-8": http_reply(b'{"ok": true, "x": "\xff"}'),
    "NaN": http_reply(b'{"ok": true, "at": NaN}'),
    "deep": http_reply(b"[" * 100_000),
    "a string": http_reply("ok"),
    "null": http_reply(None),
    "empty": http_reply(b""),
    "over 1 MiB": http_reply(BIG),
    "closes at once": b"",
    "closes in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "closes in the body": http_reply({"ok": True})[:-3],
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500,
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    "wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
    "redirect": http_reply({"ok": True}, "Location: http://127.0.0.1:9/", status="302 Found"),
    "permanent redirect": http_reply({"ok": True}, "Location: http://127.0.0.1:9/", status="308 Permanent Redirect"),
    "error": http_reply({"ok": False, "error": "Forbidden"}, status="403 Forbidden"),
    "error without text": http_reply({"ok": False}, status="500 Oops"),
    "no ok": http_reply({"found": False}),
    "ok is 1": http_reply({"ok": 1}),
    "bad gateway": http_reply(b"<h1>502</h1>", status="502 Bad Gateway"),
    "retry without end": http_reply(b'{"ok": false, "error": "Busy", "retry": 1' + b"0" * 400 + b"}"),
    "retry is no number": http_reply({"ok": False, "error": "Busy", "retry": "soon"}),
    "control characters": http_reply({"ok": False, "error": "\x1b[2J\r\n"}),
}
BAD_BATCHES: dict[str, bytes] = {
    "an object": http_reply({"ok": True}),
    "too few": http_reply([]),
    "too many": http_reply([FOUND, FOUND]),
    "no objects": http_reply([1]),
    "nulls": http_reply([None]),
    "an error": http_reply([{"ok": False, "error": "Bad request"}]),
    "no question": http_reply([FOUND]),
    "a question that is no text": http_reply([{**FOUND, "question": {"a": 1}}]),
    "a question for nobody": http_reply([{**FOUND, "question": "QUJD"}]),
    "a question in another alphabet": http_reply([{**FOUND, "question": "a+b="}]),
}


@pytest.mark.parametrize("reply", RUBBISH.values(), ids=RUBBISH.keys())
def test_client_takes_rubbish_for_a_dead_relay(reply: bytes) -> None:
    """It is an error that names the relay, printable, and nothing is asked elsewhere."""
    with FakeRelay(lambda _: reply) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        for _ in range(2):
            with pytest.raises(RelayError) as caught:
                client.ask({"action": "send"})
            assert fake.url in str(caught.value)
            assert str(caught.value).isprintable()
            assert 0 <= caught.value.retry_s <= connectoid.MAX_RETRY_S
        client.close()
    assert len(fake.asked) == 2


def polls_of(*names: str, url: str = NOWHERE) -> list[connectoid.Poll]:
    """Return what contacts poll."""
    contacts = [Contact(SUITE, make_kept(name, url)) for name in names]
    return [poll for contact in contacts for poll in contact.polls(connectoid.system_now())]


@pytest.mark.parametrize("reply", BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_client_takes_a_wrong_batch_for_a_dead_relay(reply: bytes) -> None:
    """Nothing was read, and it is an error."""
    with FakeRelay(lambda _: reply) as fake:
        client = RelayClient(fake.url)
        with pytest.raises(RelayError) as caught:
            connectoid.read_mailboxes(SUITE, client, polls_of("Bob"), 0)
        client.close()
    assert str(caught.value).isprintable()


def question_for(poll: connectoid.Poll) -> str:
    """Return a question that the owner of a mailbox can open."""
    return connectoid.encode_base64url(SUITE.seal(poll.mailbox.pub, connectoid.CONTEXTS["question"], b"A" * 43))


MESSAGES: dict[str, object] = {
    "a list": [FOUND],
    "no list": {"ok": True, "messages": {"at": 1}},
    "a number": {"ok": True, "messages": 7},
    "nulls": {"ok": True, "messages": [None]},
    "no at": {"ok": True, "messages": [{"data": "QUJD"}]},
    "a text for at": {"ok": True, "messages": [{"at": "1", "data": "QUJD"}]},
    "a truth for at": {"ok": True, "messages": [{"at": True, "data": "QUJD"}]},
    "no data": {"ok": True, "messages": [{"at": 1, "data": None}]},
    "a wrong answer": {"ok": False, "error": "Wrong answer"},
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES.keys())
def test_client_takes_wrong_messages_for_a_dead_relay(messages: object) -> None:
    """A mailbox that cannot be read to its end is not read at all; another one is."""
    good, bad = polls_of("Bob", "Carol")

    def reply(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([{"ok": True, "found": False}, {**FOUND, "question": question_for(bad)}][:len(request)]
                              if len(request) > 1 else [{**FOUND, "question": question_for(bad)}])
        return http_reply(messages)

    with FakeRelay(reply) as fake:
        client = RelayClient(fake.url)
        with pytest.raises(RelayError):
            connectoid.read_mailboxes(SUITE, client, [bad], 0)
        assert connectoid.read_mailboxes(SUITE, client, [good, bad], 0) == {good.mailbox.pub: []}
        client.close()


def test_client_reads_no_mailbox_for_ever() -> None:
    """A relay with ever new messages is left after some."""
    (poll,) = polls_of("Bob")
    numbers = itertools.count(1)

    def reply(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([{**FOUND, "question": question_for(poll)}])
        return http_reply({"ok": True, "messages": [{"at": next(numbers), "data": "QUJD"}]})

    with FakeRelay(reply) as fake:
        client = RelayClient(fake.url)
        read = connectoid.read_mailboxes(SUITE, client, [poll], 0)
        client.close()
    assert len(read[poll.mailbox.pub]) == connectoid.MAX_RECEIVES


def test_client_does_not_wait_for_ever() -> None:
    """A relay that never answers, and one that does so a byte at a time, have as long as a request may take."""
    with FakeRelay(lambda _: None) as silent:
        client = RelayClient(silent.url, timeout_s=0.3)
        with pytest.raises(RelayError, match="cannot be reached: timed out"):
            client.ask({"action": "send"})
    server = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()
    left = bytearray(http_reply({"ok": True}))

    def drip() -> None:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            while left:
                client.sendall(bytes([left.pop(0)]))
                if ended.wait(0.1):
                    return

    threading.Thread(target=drip, daemon=True).start()
    client = RelayClient(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.5)
    with pytest.raises(RelayError, match="cannot be reached: timed out"):
        client.ask({"action": "send"})
    assert left  # it was not waited for
    ended.set()
    server.close()


def test_client_waits_as_long_as_a_poll_may() -> None:
    """A long poll has its own time beside that of a request, and can be ended from outside."""
    with FakeRelay(lambda _: None) as silent:
        client = RelayClient(silent.url, timeout_s=0.1)
        timer = threading.Timer(0.5, client.interrupt)
        timer.start()
        began_s = time.monotonic()
        with pytest.raises(RelayError):
            client.ask([{"action": "check", "wait": 60}], 60)
        assert 0.4 < time.monotonic() - began_s < 60
        timer.join()
    assert len(silent.asked) == 1


@pytest.mark.parametrize("url", [f"http://{'a' * 64}.example/", "http://a..example/", "http://127.0.0.1:9/",
                                 "http://[::1]:9/", "http://a.invalid/"])
def test_client_cannot_reach_what_is_nowhere(url: str) -> None:
    """Names that no resolver takes are the relay's fault, as others send them in addresses."""
    client = RelayClient(url, timeout_s=3)
    with pytest.raises(RelayError, match="cannot be reached"):
        client.ask({"action": "send"})


def test_client_goes_on_after_a_relay_was_restarted() -> None:
    """The connection that was kept is gone: the next request opens another and loses nothing."""
    relay = Relay(SqliteStore(":memory:"))
    (poll,) = polls_of("Bob")
    request = {"pub": poll.mailbox.pub, "action": "send", "data": "QUJD"}
    with serving(relay) as server:
        port = server.server_address[1]
        client = RelayClient(f"http://127.0.0.1:{port}/")
        assert client.ask(request) == {"ok": True}
        assert client.ask(request) == {"ok": True}
    with running(RelayServer(("127.0.0.1", port), relay)):
        assert client.ask(request) == {"ok": True}
    client.close()
    relay.close()


# ---------------------------------------------------------------------------------------
# The runner: how often it asks, and what a relay can do to it.
# ---------------------------------------------------------------------------------------


def store_of(path: Path, *records: Kept) -> Store:
    """Return a store with records in it."""
    store = Store(path)
    for kept in records:
        store.add(kept)
    return store


def always(reply: bytes) -> Callable[[Any], bytes]:
    """Return what a relay does that answers the same to everything."""
    return lambda _: reply


@pytest.mark.slow
def test_rubbish_relays_are_asked_again_but_seldom(apps: Apps) -> None:
    """In 5 s each is asked two or three times beside its document; none ends the loop of its line, or another's."""
    kinds = [always(reply) for reply in (*RUBBISH.values(), *BAD_BATCHES.values())]
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(FakeRelay(kind)) for kind in kinds]
        good = stack.enter_context(FakeRelay(nothing_new))
        records = [make_kept(f"Bob {number}", relay.url) for number, relay in enumerate([*relays, good])]
        app = apps.begin("Alice", store=store_of(apps.folder / "s.db", *records))
        threading.Event().wait(5.0)
        counts = [len(relay.checks) for relay in relays]
        app.close()
    assert counts.pop([*RUBBISH].index("retry without end")) == 1
    assert {*counts} <= {2, 3}, counts
    assert max(len(relay.posts) for relay in relays) <= 3
    assert good.checks


@pytest.mark.slow
def test_rubbish_relay_that_recovers_serves_its_contacts(apps: Apps, relay: Relay) -> None:
    """What could not be sent or read meanwhile is sent and read then."""
    broken = threading.Event()
    broken.set()
    with FakeRelay(lambda request: RUBBISH["HTML"] if broken.is_set() else honest(relay)(request)) as fake:
        alice, bob = apps.begin("Alice", fake.url), apps.begin("Bob", fake.url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        until(lambda: len(fake.posts) > 2, "asked")
        broken.clear()
        assert alice.connect("Bob", SOON_S)
        bob.close()
        alice.close()


@pytest.mark.slow
def test_relay_that_asks_for_time_gets_it(apps: Apps) -> None:
    """A `retry` of 4 s is obeyed by checks and by messages."""
    replies = [{"ok": False, "error": "Busy", "retry": 4}]
    with FakeRelay(lambda _: http_reply(replies[0], status="503 Busy")) as fake:
        bob = apps.begin("Bob", fake.url)
        bob.open(make_kept("Bob", fake.url).invitation, "Alice")
        sends = functools.partial(lambda: [asked for asked in fake.posts if isinstance(asked.request, dict)])
        until(lambda: len(fake.checks) > 1 and len(sends()) > 1, "asked again")
        for asked in (fake.checks, sends()):
            assert asked[1].at_s - asked[0].at_s >= 3.9
        bob.close()


@pytest.mark.slow
def test_fifty_idle_contacts_make_one_request_a_minute_and_relay(apps: Apps) -> None:
    """Two relays have half of the mailboxes each, and are asked to wait; that they do not brings nothing sooner."""
    with FakeRelay(nothing_new) as first, FakeRelay(nothing_new) as second:
        records = [make_kept(f"Bob {number}", (first, second)[number % 2].url) for number in range(50)]
        app = apps.begin("Alice", store=store_of(apps.folder / "s.db", *records))
        threading.Event().wait(5.0)
        app.close()
        for relay in (first, second):
            assert [len(asked.request) for asked in relay.posts] == [25]
            assert {check["wait"] for check in relay.posts[0].request} == {connectoid.WAIT_S}


@pytest.mark.slow
def test_one_dead_relay_of_two_holds_up_nothing(apps: Apps, relay_url: str) -> None:
    """Two pair, and stop, before a request to the dead one has ended."""
    with FakeRelay(lambda _: None) as silent:
        alice, bob = apps.begin("Alice", silent.url, relay_url), apps.begin("Bob", silent.url, relay_url)
        began_s = time.monotonic()
        bob.open(alice.share("Bob", APP_URL), "Alice")
        alice.connect("Bob", SOON_S)
        assert time.monotonic() - began_s < connectoid.REQUEST_TIMEOUT_S
        began_s = time.monotonic()
        alice.close()
        bob.close()
        assert time.monotonic() - began_s < connectoid.REQUEST_TIMEOUT_S + connectoid.WAIT_S


def test_runner_leaves_no_thread_and_can_be_closed_twice(apps: Apps, relay_url: str) -> None:
    """Whoever waits in another thread is told."""
    before = set(threading.enumerate())
    alice, bob = apps.pair(relay_url)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(NotConnectedError):
            alice.connect("Carol")
        ended.append("told")

    alice.share("Carol", APP_URL)
    waiter = threading.Thread(target=wait)
    waiter.start()
    for app in (alice, bob, alice, bob):
        app.close()
    waiter.join(SOON_S)
    assert ended == ["told"]
    until(lambda: not [thread for thread in set(threading.enumerate()) - before if "connectoid" in thread.name],
          "threads ended", 5)


def test_channel_brings_messages_in_order_and_ends_for_both(apps: Apps, relay_url: str) -> None:
    """Text stays text, bytes stay bytes; what was sent before the end is still received."""
    alice, bob = apps.pair(relay_url)
    there = bob.connect("Alice", SOON_S)
    here = alice.connect("Bob", SOON_S)
    sent: list[bytes | str] = ["Grüße", b"\0\xff", "", *map(str, range(500))]
    for message in sent:
        there.send(message)
    there.close()
    there.close()
    assert [here.receive(SOON_S) for _ in sent] == sent
    for channel in (here, there):
        for _ in range(2):
            with pytest.raises(NotConnectedError):
                channel.receive(SOON_S)
        with pytest.raises(NotConnectedError):
            channel.send("too late")
    again = alice.connect("Bob", SOON_S)
    assert again is not here
    with pytest.raises(TimeoutError):
        again.receive(0.01)


def test_names_are_given_once(apps: Apps, relay_url: str) -> None:
    """Two contacts of one name, none at all, one's own link, and a link twice."""
    alice, bob = apps.begin("Alice", relay_url), apps.begin("Bob")
    link = alice.share("Bob", APP_URL)
    for name, says in (("Bob", "already"), ("", "needs a name")):
        with pytest.raises(UsageError, match=says):
            alice.share(name, APP_URL)
    with pytest.raises(LinkError, match="your own link"):
        alice.open(link, "Carol")
    for name in ("Alice", "Alicia"):
        bob.open(link, name)
    assert [kept.name for kept in bob.contacts()] == ["Alice"]
    for act in (bob.connect, bob.unshare, bob.verify):
        with pytest.raises(UsageError, match="no contact 'Zoe'"):
            act("Zoe")
    with pytest.raises(UsageError, match="make no address"):
        bob.share("Carol", APP_URL)


def test_contact_is_reached_through_other_relays_after_a_move(apps: Apps, relay_url: str) -> None:
    """Alice leaves a relay: Bob learns of it while he uses the old one, writes to the new one, and they connect."""
    alice, bob = apps.pair(relay_url)
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        with pytest.raises(UsageError, match="no contact"):
            alice.move("Carol", [(url, None)])
        alice.move("Bob", [(url, None)])
        alice.connect("Bob", SOON_S).close()
        (kept,) = bob.contacts()
        assert [mailbox.url for mailbox in connectoid.parse_address(kept.contact_address, allow_http=True)] == [url]
        bob.connect("Alice", SOON_S)
        until(lambda: alice.contacts()[0].pending is None, "Bob wrote to the new address")
        alice.relays = ((url, None),)
        alice.move("Bob")
        assert alice.contacts()[0].relays == ((url, None),)
        alice.close()
    relay.close()


def test_unshare_reaches_the_other_when_he_comes(apps: Apps, relay_url: str) -> None:
    """His app was not running then; after that the name is free."""
    alice, bob = apps.pair(relay_url)
    bob.close()
    alice.unshare("Bob")
    assert alice.contacts() == []
    bob = apps.begin("Bob", relay_url)
    with pytest.raises(NotConnectedError, match="has ended the sharing"):
        bob.connect("Alice", SOON_S)
    assert [(kept.state, kept.why) for kept in bob.contacts()] == [("ended", "unshared")]
    bob.forget("Alice")
    assert bob.contacts() == []
    assert bob.share("Alice", APP_URL)
    with pytest.raises(UsageError, match="still a contact"):
        bob.forget("Alice")


def test_pairing_that_expires_is_told_by_the_name_that_it_had(apps: Apps, tmp_path: Path) -> None:
    """Its tombstone has none any more."""
    now = connectoid.system_now()
    alice, _ = Contact.invite(SUITE, now, "Bob", [(NOWHERE, None)])
    bob, effects = Contact.open(SUITE, now, "Alice", connectoid.parse_invitation(alice.kept.invitation))
    (ask,) = (effect.ask for effect in effects if isinstance(effect, connectoid.Gather))
    hello = [effect.data for effect in bob.gathered(now, ask, {"type": "offer", "sdp": "v=0"})
             if isinstance(effect, connectoid.Send)]
    alice.polled(now, {alice.mailboxes[0].pub: list(enumerate(hello, 1))})
    assert alice.kept.state == "welcomed"
    store_of(tmp_path / "Alice.db", dataclasses.replace(alice.kept, expires_us=connectoid.RELEASE_US + 1)).close()
    apps.begin("Alice", NOWHERE)
    until(lambda: ("Alice", "Bob", "expired") in apps.told, "told")


def test_second_who_opens_a_link_is_told_and_the_first_is_warned(apps: Apps, relay_url: str) -> None:
    """Whoever came first stays."""
    alice, bob = apps.begin("Alice", relay_url), apps.begin("Bob", relay_url)
    link = alice.share("Bob", APP_URL)
    bob.open(link, "Alice")
    channel = alice.connect("Bob", SOON_S)
    eve = apps.begin("Eve", relay_url)
    eve.open(link, "Alice")
    with pytest.raises(NotConnectedError, match="used by somebody else"):
        eve.connect("Alice", SOON_S)
    until(lambda: ("Alice", "Bob", "opened_twice") in apps.told, "warned")
    assert not channel.closed.is_set()
    assert ("Bob", "Alice", "used") not in apps.told


def test_marks_of_verification_stay(apps: Apps, relay_url: str) -> None:
    """Both have the same seven emoji; a mark is kept in the store."""
    alice, bob = apps.pair(relay_url)
    assert alice.contacts()[0].comparison == bob.contacts()[0].comparison
    assert len(alice.contacts()[0].comparison) == 7
    alice.verify("Bob")
    alice.close()
    assert apps.begin("Alice").contacts()[0].verified


def test_app_whose_event_handler_fails_goes_on(apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The next events still come."""
    heard: list[str] = []

    def on_event(name: str, event: str) -> None:
        heard.append(event)
        raise ValueError(event)

    store = Store(apps.folder / "Carol.db")
    with Connectoid(store, [(relay_url, None)], apps.wires.adapter(), on_event=on_event) as carol:
        apps.begin("Bob", relay_url).open(carol.share("Bob", APP_URL), "Carol")
        carol.connect("Bob", SOON_S)
        until(lambda: {"connected", "paired"} <= {*heard}, "told")
    assert "on_event failed" in caplog.text


# ---------------------------------------------------------------------------------------
# asyncio.
# ---------------------------------------------------------------------------------------


async def talk(alice: AsyncConnectoid, bob: AsyncConnectoid) -> list[bytes | str]:
    """Pair two apps, send both ways, cancel what waits, and return what came."""
    await bob.open(await alice.share("Bob", APP_URL), "Alice")
    async with asyncio.timeout(SOON_S):
        here, there = await asyncio.gather(alice.connect("Bob"), bob.connect("Alice"))
        await there.send("Hello")
        came = [await here.receive()]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await here.receive()
        await asyncio.gather(*(here.send(bytes([number]) * 60_000) for number in range(40)))
        came += [await there.receive() for _ in range(40)]
        await here.close()
        for channel in (here, there):
            with pytest.raises(NotConnectedError):
                await channel.receive()
            with pytest.raises(NotConnectedError):
                await channel.send("too late")
    await alice.share("Carol", APP_URL)
    waiting = asyncio.create_task(alice.connect("Carol"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await alice.unshare("Carol")
    return came


SAID: list[bytes | str] = ["Hello", *(bytes([number]) * 60_000 for number in range(40))]


def test_asyncio_face_does_all_that_the_blocking_one_does(apps: Apps, relay_url: str) -> None:
    """Share, open, connect, send, receive, close, unshare, and cancel."""

    async def run() -> list[bytes | str]:
        runners = [Connectoid(Store(apps.folder / f"{who}.db"), [(relay_url, None)], apps.wires.adapter())
                   for who in ("Alice", "Bob")]
        async with AsyncConnectoid(runners[0]) as alice, AsyncConnectoid(runners[1]) as bob:
            return await talk(alice, bob)

    assert asyncio.run(run()) == SAID


def test_asyncio_wait_begins_one_attempt(apps: Apps, relay_url: str) -> None:
    """However long it waits, the machine is asked once: rule 5 of connecting limits the attempts."""
    asked: list[bool] = []

    class Counting(Connectoid):
        def connect(self, name: str, timeout_s: float | None = None, *, anew: bool = True) -> Channel:
            """Count, and connect."""
            asked.append(anew)
            return super().connect(name, timeout_s, anew=anew)

    async def run() -> None:
        async with AsyncConnectoid(Counting(Store(":memory:"), [(relay_url, None)], apps.wires.adapter())) as alice:
            await alice.share("Bob", APP_URL)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2 * connectoid.ASYNC_SLICE_S + 0.5):
                    await alice.connect("Bob")

    asyncio.run(run())
    assert asked == [True, False, False]


# ---------------------------------------------------------------------------------------
# The command line in one process: what it says, its exit codes, and the transfer of files
# over a channel in memory.
# ---------------------------------------------------------------------------------------


def test_cli_without_a_command_or_with_wrong_ones_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and the usage."""
    for argv in ([], ["dance"], ["share"], ["send", "Bob"], ["open", "x"], ["chat", "Bob", "--timeout", "soon"],
                 ["verify", "Bob", "--same", "--different"]):
        with pytest.raises(SystemExit) as caught:
            connectoid_cli.main(argv)
        assert caught.value.code == 2
        assert "usage: connectoid" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, *connectoid_cli.COMMANDS])
def test_cli_helps_with_every_command(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, on stdout, with every flag."""
    with pytest.raises(SystemExit) as caught:
        connectoid_cli.main([*filter(None, [command]), "--help"])
    assert caught.value.code == 0
    said, errors = capsys.readouterr()
    assert not errors
    for word in connectoid_cli.COMMANDS if command is None else [f"--{flag}" for flag in connectoid_cli.SHARED]:
        assert word in said


INVITATION = make_kept("Bob", "https://relay.example.com/").invitation
BAD_LINKS = {
    "": "There is no invitation",
    "https://app.example.com/": "There is no invitation",
    "Dear Bob, here is the link": "There is no invitation",
    f"{APP_URL}#connectoid={INVITATION[:-5]}": "cut off or damaged",
    f"{APP_URL}#connectoid={INVITATION[:-64]}": "no secret; ask for a new one",
    f"{APP_URL}#connectoid={INVITATION[3:]}": "damaged: its key is damaged",
    f"{APP_URL}#connectoid={INVITATION[:60]}": "This link is damaged",
    f"{APP_URL}#connectoid={INVITATION.replace('.', '')}": "This link is damaged",
    make_kept("Bob", "http://127.0.0.1:9/").invitation.replace(
        connectoid.encode_base64url(b"http://127.0.0.1:9/"), connectoid.encode_base64url(b"http://example.com/")):
        "elsewhere it is https",
}


@pytest.mark.parametrize(("link", "says"), BAD_LINKS.items(), ids=BAD_LINKS.values())
def test_cli_says_what_is_wrong_with_a_link(link: str, says: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, one sentence, and no store is made."""
    assert connectoid_cli.main(["open", link, "--name", "Alice", "--yes", "--store", str(tmp_path / "s.db")]) == 1
    said, errors = capsys.readouterr()
    assert (said, errors.count("\n")) == ("", 1)
    assert says in errors
    assert [*tmp_path.iterdir()] == []


def test_cli_exit_codes_tell_usage_from_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user got wrong is 2, what went wrong is 1; with --json both are a line."""
    monkeypatch.delenv("CONNECTOID_RELAY", raising=False)
    store = ["--json", "--store", str(tmp_path / "s.db")]
    store_of(tmp_path / "s.db", make_kept("Bob")).close()
    (tmp_path / "there").touch()
    for code, argv in ((0, ["contacts"]), (2, ["share", "Carol"]), (2, ["share", "Carol", "--relay", "nonsense"]),
                       (2, ["share", "Carol", "--relay", "http://example.com/"]),
                       (1, ["share", "Bob", "--timeout", "0.1"]), (2, ["share", "Bob\x1b[2J", "--relay", NOWHERE]),
                       (2, ["verify", "Bob"]), (2, ["verify", "Zoe"]), (2, ["unshare", "Zoe"]), (2, ["chat", "Zoe"]),
                       (2, ["send", "Bob", "/nonexistent"]), (2, ["receive", "Bob", "--dir", "/nonexistent"]),
                       (1, ["chat", "Bob", "--timeout", "0.1"]), (1, ["import", "/nonexistent"]),
                       (1, ["import", str(tmp_path / "there")]),
                       (1, ["contacts", "--passphrase-file", "/nonexistent"])):
        monkeypatch.setattr("getpass.getpass", lambda _: "x")
        assert connectoid_cli.main([*argv, *store]) == code, argv
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[-1]["event"] == ("contact" if code == 0 else "error"), argv


def test_cli_share_shows_the_link_again_until_somebody_has_opened_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever pressed Ctrl-C, or lost the window, can still send it."""
    argv = ["share", "Bob", "--timeout", "0.01", "--store", str(tmp_path / "s.db")]
    assert connectoid_cli.main([*argv, "--relay", NOWHERE]) == 1
    link = capsys.readouterr().out
    assert connectoid_cli.main(argv) == 1
    assert capsys.readouterr().out == link


def test_cli_says_what_a_relay_said_when_nobody_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else one looks for the fault at the other's."""
    argv = ["share", "Bob", "--relay", NOWHERE, "--timeout", "1", "--store", str(tmp_path / "s.db")]
    assert connectoid_cli.main(argv) == 1
    assert f"Bob is not there. Not answered yet; tried again from time to time. {NOWHERE} cannot be reached" in (
        capsys.readouterr().err)


def test_cli_reads_a_link_from_stdin_and_names_the_contact_that_has_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a list of processes all users of a machine see what was typed."""
    link = connectoid.make_link(APP_URL, make_kept("Bob", NOWHERE).invitation)
    for name in ("Alice", "Zoe"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{link}\n"))
        argv = ["open", "-", "--name", name, "--timeout", "0.01", "--store", str(tmp_path / "s.db")]
        assert connectoid_cli.main(argv) == 1
        assert "Waiting for Alice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "soon"])
def test_cli_waits_for_a_time_that_there_is(text: str, tmp_path: Path) -> None:
    """And makes no contact before it knows."""
    with pytest.raises(SystemExit, match="2"):
        connectoid_cli.main(["share", "Bob", f"--timeout={text}", "--store", str(tmp_path / "s.db")])
    assert not (tmp_path / "s.db").exists()


def test_cli_contacts_keep_the_warning_that_a_link_was_opened_twice(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The event itself may have been missed."""
    store_of(tmp_path / "s.db", dataclasses.replace(make_kept("Bob"), used_to=("A" * 43,))).close()
    assert connectoid_cli.main(["contacts", "--store", str(tmp_path / "s.db")]) == 0
    assert "opened by somebody else too" in capsys.readouterr().out


def test_cli_relays_of_a_flag_take_the_place_of_those_of_the_environment(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the help says: the environment has the default."""
    monkeypatch.setenv("CONNECTOID_RELAY", "http://localhost:1/ http://localhost:2/")
    for flags, urls in (([], 2), (["--relay", NOWHERE], 1)):
        connectoid_cli.main(["share", f"Bob {urls}", *flags, "--timeout", "0.01", "--store", str(tmp_path / "s.db")])
        invitation = connectoid.read_link(capsys.readouterr().out.strip())
        assert len(connectoid.parse_address(invitation.address)) == urls


def test_cli_exports_and_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """An export is the owner's alone, never overwrites, and asks twice; nobody who types is no traceback."""
    store_of(tmp_path / "a.db", make_kept("Bob")).close()
    words = iter(["one", "two", "", "one", "one", "one", "one", "two", "one"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(words))
    out, old, new = str(tmp_path / "out"), str(tmp_path / "a.db"), str(tmp_path / "b.db")
    assert [connectoid_cli.main(["export", out, "--store", old]) for _ in range(4)] == [2, 2, 0, 1]
    assert stat.S_IMODE(os.stat(out).st_mode) == 0o600
    assert [connectoid_cli.main(["import", out, "--store", new, "--json"]) for _ in range(2)] == [1, 0]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"event": "imported", "count": 1}

    def nobody(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", nobody)
    assert connectoid_cli.main(["export", out + "2", "--store", old]) == 1


class Pipe:
    """One end of a channel in memory, with a count of the bytes of files that it sent; it can break off."""

    def __init__(self) -> None:
        self.other: Pipe = self
        self.came: queue.Queue[bytes | str | None] = queue.Queue()
        self.sent_bytes, self.break_after_bytes = 0, 2**60

    def send(self, message: bytes | str) -> None:
        """Bring a message to the other end; at the break both ends are closed."""
        if isinstance(message, bytes):
            self.sent_bytes += len(message)
            if self.sent_bytes > self.break_after_bytes:
                self.other.came.put(None)
                raise NotConnectedError
        self.other.came.put(message)

    def receive(self, timeout_s: float | None = None) -> bytes | str:
        """Return what came."""
        message = self.came.get(timeout=timeout_s or SOON_S)
        if message is None:
            raise NotConnectedError
        return message


def make_pipe() -> tuple[Pipe, Pipe]:
    """Return both ends of a channel."""
    here, there = Pipe(), Pipe()
    here.other, there.other = there, here
    return here, there


def transfer(path: Path, folder: Path, break_after_bytes: int = 2**60) -> tuple[Pipe, list[ConnectoidError]]:
    """Send a file into a folder; return the sender's end and what failed."""
    here, there = make_pipe()
    here.break_after_bytes = break_after_bytes
    teller, failed = connectoid_cli.Teller(as_json=True), list[ConnectoidError]()

    def receive() -> None:
        try:
            connectoid_cli.receive_file(there, folder, json.loads(there.receive()), teller, {})  # type: ignore[arg-type]
        except ConnectoidError as error:
            failed.append(error)

    receiver = threading.Thread(target=receive)
    receiver.start()
    try:
        connectoid_cli.send_file(here, path, teller)  # type: ignore[arg-type]
    except ConnectoidError as error:
        failed.append(error)
        there.came.put(None)
    receiver.join(SOON_S)
    return here, failed


@pytest.mark.parametrize("size", [0, 1, 60_000, 60_001, 20_000_000])
def test_file_arrives_whole(tmp_path: Path, size: int) -> None:
    """Name and content are equal, and nothing else is left."""
    (tmp_path / "to").mkdir()
    path = tmp_path / "Straße 1.bin"
    path.write_bytes(random.Random(size).randbytes(size))
    pipe, failed = transfer(path, tmp_path / "to")
    assert (failed, pipe.sent_bytes) == ([], size)
    assert {found.name: found.read_bytes() for found in (tmp_path / "to").iterdir()} == {path.name: path.read_bytes()}


def test_broken_transfer_goes_on_where_it_was(tmp_path: Path) -> None:
    """After two breaks no block was sent twice; a file that changed meanwhile is sent anew."""
    (tmp_path / "to").mkdir()
    path = tmp_path / "large"
    path.write_bytes(random.Random(5).randbytes(3_000_000))
    pipes = []
    for break_after_bytes in (1_000_000, 1_200_000, 2**60):
        pipe, failed = transfer(path, tmp_path / "to", break_after_bytes)
        pipes.append(pipe)
        assert all(isinstance(error, NotConnectedError) for error in failed)
    assert sum(pipe.sent_bytes for pipe in pipes) <= 3_000_000 + 2 * connectoid_cli.BLOCK_BYTES
    assert (tmp_path / "to" / "large").read_bytes() == path.read_bytes()
    transfer(path, tmp_path / "to", 1_000_000)
    path.write_bytes(b"another")
    pipe, failed = transfer(path, tmp_path / "to")
    assert (pipe.sent_bytes, failed) == (7, [])
    assert (tmp_path / "to" / "large (1)").read_bytes() == b"another"
    assert (tmp_path / "to" / "large").stat().st_size == 3_000_000


def receive_from(control: dict[str, Any], folder: Path, *messages: bytes | str,
                 received: dict[str, str] | None = None) -> tuple[list[Any], str]:
    """Let a hostile sender speak; return what it was told and the error."""
    here, there = make_pipe()
    for message in messages:
        here.send(message)
    here.other.came.put(None)
    error = ""
    try:
        connectoid_cli.receive_file(there, folder, control, connectoid_cli.Teller(as_json=True),  # type: ignore[arg-type]
                                    {} if received is None else received)
    except ConnectoidError as failed:
        error = str(failed)
    return [json.loads(text or "null") for text in here.came.queue if isinstance(text, str)], error


CONTENT = b"content"
END = json.dumps({"sha256": hashlib.sha256(CONTENT).hexdigest()})


def test_file_whose_last_acknowledgement_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    """The receiver has it all, and says whether it is the same; it stays there once."""
    offer, received = {"file": "f", "size": 7, "fingerprint": "x"}, dict[str, str]()
    receive_from(offer, tmp_path, CONTENT, END, received=received)
    told, error = receive_from(offer, tmp_path, END, received=received)
    assert (told, error) == ([{"have": 7}, {"done": True}], "")
    told, _ = receive_from(offer, tmp_path, json.dumps({"sha256": "0" * 64}), received=received)
    assert told == [{"have": 7}, {"done": False}]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_file_larger_than_the_disk_is_refused_before_it_comes(tmp_path: Path) -> None:
    """A sender may not fill the disk of whoever receives."""
    told, error = receive_from({"file": "f", "size": 2**59}, tmp_path, CONTENT, END)
    assert told == []
    assert "than are free in" in error
    assert not list(tmp_path.iterdir())


def test_file_with_a_wrong_hash_is_not_kept(tmp_path: Path) -> None:
    """Both sides are told, and nothing stays, so that the next attempt begins anew."""
    told, error = receive_from({"file": "f", "size": 7}, tmp_path, CONTENT, json.dumps({"sha256": "0" * 64}))
    assert told == [{"have": 0}, {"done": False}]
    assert error == "f arrived damaged; it is not kept."
    told, error = receive_from({"file": "f", "size": 8}, tmp_path, CONTENT, END)
    assert error == "f arrived damaged; it is not kept."
    _, error = receive_from({"file": "f", "size": 6}, tmp_path, CONTENT, END)
    assert error == "The other side sent more than it said."
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


HOSTILE_NAMES = {
    "../../etc/passwd": "passwd", "/etc/passwd": "passwd", "..\\..\\boot.ini": "boot.ini", "..": "file", ".": "file",
    "": "file", "/": "file", ".bashrc": "bashrc", "...": "file",
    "a\nb\x1b[2Jc": "a\ufffdb\ufffd[2Jc", "a\0b": "a\ufffdb",
    "\ud800x": "\ufffdx", "e" * 300: "e" * 200, "\u00fc" * 300: "\u00fc" * 100, "  spaces  ": "spaces",
    "\u202egpj.exe": "\ufffdgpj.exe", "CON/../x": "x",
}


@pytest.mark.parametrize(("name", "kept_as"), HOSTILE_NAMES.items())
def test_hostile_file_name_leads_nowhere_else(name: str, kept_as: str, tmp_path: Path) -> None:
    """The file is in the folder, under a name that shows what it is."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    _, error = receive_from({"file": name, "size": 7, "fingerprint": "x"}, folder, CONTENT, END)
    assert not error
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [f"a/b/{kept_as}"]


def test_received_file_overwrites_nothing(tmp_path: Path) -> None:
    """Existing files, folders and links keep their names and what is in them."""
    (tmp_path / "f.txt").write_text("mine")
    (tmp_path / "f (1).txt").mkdir()
    (tmp_path / "f (2).txt").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        receive_from({"file": "f.txt", "size": 7}, tmp_path, CONTENT, END)
    assert (tmp_path / "f.txt").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "f (3).txt").read_bytes() == (tmp_path / "f (4).txt").read_bytes() == CONTENT


@pytest.mark.parametrize("control", [
    {}, {"file": 7, "size": 7}, {"file": "f"}, {"file": "f", "size": -1}, {"file": "f", "size": True},
    {"file": "f", "size": 1.5}, {"file": "f", "size": "7"}, {"file": "f", "size": 2**61}])
def test_receiver_refuses_what_it_does_not_understand(control: dict[str, Any], tmp_path: Path) -> None:
    """An offer of a wrong form leaves nothing."""
    told, error = receive_from(control, tmp_path, CONTENT, END)
    assert (told, error) == ([], "The other side sent what this program does not understand.")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("end", ["", "null", "[]", "7", "{", '"x"', "[" * 100_000], ids=lambda end: end[:5] or "empty")
def test_receiver_takes_any_end_for_a_failed_transfer(end: str, tmp_path: Path) -> None:
    """Rubbish in place of the hash is an error of the other side."""
    _, error = receive_from({"file": "f", "size": 7}, tmp_path, CONTENT, end)
    assert error == "The other side sent what this program does not understand."


@pytest.mark.parametrize("reply", ["", "{}", '{"have": -1}', '{"have": 8}', '{"have": "0"}', '{"have": true}'])
def test_sender_refuses_what_it_does_not_understand(reply: str, tmp_path: Path) -> None:
    """Where the receiver claims to be is within the file."""
    here, there = make_pipe()
    (tmp_path / "f").write_bytes(CONTENT)
    there.send(reply)
    with pytest.raises(connectoid_cli.TransferError, match="does not understand"):
        connectoid_cli.send_file(here, tmp_path / "f", connectoid_cli.Teller(as_json=True))  # type: ignore[arg-type]
    assert here.sent_bytes == 0


# ---------------------------------------------------------------------------------------
# Two people with terminals: real processes, the real relay, WebRTC by aiortc.
# ---------------------------------------------------------------------------------------

# aioice does not offer 127.0.0.1; where that is all there is, it has to.
TERMINAL = f"""
import sys
import aioice.ice
sys.path.insert(0, {str(ROOT)!r})
found = aioice.ice.get_host_addresses
aioice.ice.get_host_addresses = lambda **kinds: found(**kinds) or ["127.0.0.1"]
import connectoid_cli
sys.exit(connectoid_cli.main(sys.argv[1:]))
"""
CONNECTS_S = 30.0  # for a connection, where nothing holds it up


class Terminal:
    """A command that runs, with the events that it told so far."""

    def __init__(self, home: Path, *argv: str, relays: Sequence[str] = ()) -> None:
        home.mkdir(exist_ok=True)
        environment = {**os.environ, "CONNECTOID_STORE": str(home / "s.db"), "CONNECTOID_RELAY": " ".join(relays)}
        self.popen = subprocess.Popen([sys.executable, "-c", TERMINAL, *argv, "--json"], cwd=home, env=environment,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.events.append(json.loads(line))

    def told(self, event: str) -> dict[str, Any] | None:
        """Return the first event of a kind that it told."""
        return next((told for told in self.events if told["event"] == event), None)

    def wait_for(self, event: str, timeout_s: float = CONNECTS_S) -> dict[str, Any]:
        """Return an event once it is told."""
        until(lambda: self.told(event) or not self._reader.is_alive(), event, timeout_s)
        told = self.told(event)
        assert told is not None, (event, self.events, self.popen.stderr and self.popen.stderr.read())
        return told

    def type(self, text: str) -> None:
        """Type a line."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(text.encode() + b"\n")
        self.popen.stdin.flush()

    def end(self, number: int = 0, timeout_s: float = CONNECTS_S) -> int:
        """Send a signal, if any, and return the exit code; nothing but JSON was said, and no traceback."""
        if number:
            self.popen.send_signal(number)
        code = self.popen.wait(timeout_s)
        self._reader.join(timeout_s)
        assert self.popen.stdout
        assert self.popen.stderr
        assert self.popen.stdin
        errors = self.popen.stderr.read().decode()
        assert "Traceback" not in errors, errors
        for stream in (self.popen.stdout, self.popen.stderr):
            stream.close()
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        return code


class People:
    """Alice and Bob, each with a store of their own, and their relays."""

    def __init__(self, folder: Path, relays: Sequence[str]) -> None:
        self.folder, self.relays = folder, relays
        self.terminals: list[Terminal] = []

    def run(self, who: str, *argv: str) -> Terminal:
        """Start a command."""
        self.terminals.append(Terminal(self.folder / who, *argv, relays=self.relays))
        return self.terminals[-1]

    def pair(self) -> None:
        """Let Alice share and Bob open."""
        alice = self.run("Alice", "share", "Bob")
        bob = self.run("Bob", "open", alice.wait_for("link")["link"], "--name", "Alice")
        assert [alice.end(), bob.end()] == [0, 0]
        emoji = [terminal.wait_for("compare")["emoji"] for terminal in (alice, bob)]
        assert emoji[0] == emoji[1]

    def kill(self) -> None:
        """End whatever still runs."""
        for terminal in self.terminals:
            if terminal.popen.poll() is None:
                terminal.end(signal.SIGKILL)


@pytest.fixture
def people(tmp_path: Path, start: Callable[..., Process]) -> Iterator[People]:
    """Return Alice and Bob with a relay."""
    people = People(tmp_path, [f"http://127.0.0.1:{start().port}/"])
    yield people
    people.kill()


class LateRelay:
    """A relay that delivers the first message to whoever opened a link late; all else passes at once."""

    def __init__(self, relay: Relay, late_s: float) -> None:
        self._relay, self._late_s = relay, late_s
        self._sends = itertools.count()

    def reply(self, request: Any) -> bytes:
        """Acknowledge a message, and deliver it now or later."""
        if isinstance(request, dict) and request["action"] == "send" and next(self._sends) == 1 and self._late_s:
            timer = threading.Timer(self._late_s, self._relay.handle, (request, "192.0.2.1"))
            timer.daemon = True
            timer.start()
            return http_reply({"ok": True})
        return honest(self._relay)(request)


DELAYS_S = (0, 5, 15, 30, 60)
CONNECTED_AFTER_S = 25  # more than the delay: what rule 5 of connecting may take, and polls of 2 s


@pytest.mark.slow
def test_people_connect_however_late_an_answer_comes(tmp_path: Path) -> None:
    """The answer to the first offer is held back; the five pairs run side by side."""
    with contextlib.ExitStack() as stack:
        pairs: dict[int, tuple[Terminal, Terminal]] = {}
        for delay_s in DELAYS_S:
            relay = LateRelay(Relay(SqliteStore(":memory:")), delay_s)
            fake = stack.enter_context(FakeRelay(relay.reply))
            people = People(tmp_path / str(delay_s), [fake.url])
            people.folder.mkdir()
            stack.callback(people.kill)
            alice = people.run("Alice", "share", "Bob")
            pairs[delay_s] = alice, people.run("Bob", "open", alice.wait_for("link")["link"], "--name", "Alice")
        began_s = time.monotonic()
        for delay_s, (alice, bob) in pairs.items():
            left_s = began_s + delay_s + CONNECTED_AFTER_S - time.monotonic()
            alice.wait_for("connected", left_s)
            bob.wait_for("connected", left_s)
            print(delay_s, "s late: connected after", round(time.monotonic() - began_s, 1))
        assert [terminal.end() for pair in pairs.values() for terminal in pair] == [0] * 2 * len(DELAYS_S)


@pytest.mark.slow
def test_people_are_connected_and_chat(people: People) -> None:
    """Both run; then lines both ways, seen beside it, and Ctrl-C leaves nothing."""
    alice = people.run("Alice", "share", "Bob")
    link = alice.wait_for("link")["link"]
    bob = people.run("Bob", "open", link, "--name", "Alice")
    bob.wait_for("connected")
    assert [alice.end(), bob.end()] == [0, 0]
    before = {who: sorted(path.name for path in (people.folder / who).iterdir()) for who in ("Alice", "Bob")}
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "chat", "Alice")
    bob.wait_for("connected")
    alice.type("Grüße \x1b[2J")
    bob.type("Hello")
    assert (alice.wait_for("line")["line"], bob.wait_for("line")["line"]) == ("Hello", "Grüße \x1b[2J")
    verify, contacts = people.run("Alice", "verify", "Bob"), people.run("Alice", "contacts")
    assert [verify.end(), contacts.end()] == [0, 0]
    assert verify.wait_for("compare")["emoji"][0].keys() == {"emoji", "name"}
    assert contacts.events == [
        {"event": "contact", "contact": "Bob", "state": "paired", "why": None, "verified": False,
         "opened_twice": False}]
    marking = people.run("Alice", "verify", "Bob", "--same")
    assert (marking.end(), "end it first" in marking.wait_for("error")["error"]) == (1, True)
    assert alice.end(signal.SIGINT) == 130
    bob.wait_for("disconnected")
    assert bob.end() == 0
    assert before == {who: sorted(path.name for path in (people.folder / who).iterdir()) for who in before}
    marking = people.run("Alice", "verify", "Bob", "--same")
    assert (marking.end(), marking.told("verified") is not None) == (0, True)


@pytest.mark.slow
def test_people_meet_who_came_at_different_times(tmp_path: Path, start: Callable[..., Process]) -> None:
    """Alice shares and leaves; Bob opens and leaves; the relay restarts; then both come, and a dead relay is first."""
    flags = ["--db", str(tmp_path / "relay.db")]
    relay = start(*flags)
    people = People(tmp_path, [NOWHERE, f"http://127.0.0.1:{relay.port}/"])
    alice = people.run("Alice", "share", "Bob")
    link = alice.wait_for("link")["link"]
    assert alice.end(signal.SIGINT) == 130
    bob = people.run("Bob", "open", link, "--name", "Alice")
    bob.wait_for("waiting")
    until(lambda: (tmp_path / "relay.db-wal").stat().st_size > 5_000, "hello is at the relay")
    assert bob.end(signal.SIGINT) == 130
    assert relay.stop()[0] == 0
    start(*flags, "--port", str(relay.port))
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "open", link, "--name", "Alice")
    bob.wait_for("compare")
    alice.wait_for("connected")
    assert bob.end() == 0
    assert alice.end() == 1  # `open` does not chat: it ends once both are connected
    assert alice.wait_for("error")["error"] == "The connection is closed."
    people.kill()


@pytest.mark.slow
def test_people_are_told_of_a_link_that_was_opened_twice(people: People) -> None:
    """Eve is told, with exit code 1; Alice is warned; Bob goes on."""
    alice = people.run("Alice", "share", "Bob")
    link = alice.wait_for("link")["link"]
    assert people.run("Bob", "open", link, "--name", "Alice").end() == 0
    assert alice.end() == 0
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "chat", "Alice")
    bob.wait_for("connected")
    eve = people.run("Eve", "open", link, "--name", "Alice")
    assert eve.end() == 1
    assert eve.wait_for("error")["error"].startswith("This link was used by somebody else")
    alice.wait_for("opened_twice")
    bob.type("still here")
    assert alice.wait_for("line")["line"] == "still here"
    assert bob.end(signal.SIGINT) == 130
    assert alice.end() == 0


@pytest.mark.slow
def test_people_are_told_of_the_end_of_a_sharing(people: People) -> None:
    """Bob was away when Alice ended it."""
    people.pair()
    assert people.run("Alice", "unshare", "Bob").end() == 0
    contacts = people.run("Alice", "contacts")
    assert (contacts.end(), contacts.events) == (0, [])
    bob = people.run("Bob", "chat", "Alice")
    assert bob.end() == 1
    assert bob.wait_for("error")["error"] == connectoid.EVENTS["unshared"]


LARGE_BYTES = 24_000_000


@pytest.mark.slow
@pytest.mark.parametrize("who", ["Alice", "Bob"])
def test_people_go_on_with_a_file_after_a_kill(people: People, who: str) -> None:
    """Either the sender or the receiver is killed in the middle; what was there is not sent again."""
    people.pair()
    large, folder = people.folder / "large.bin", people.folder / "Bob" / "in"
    folder.mkdir()
    large.write_bytes(random.Random(2).randbytes(LARGE_BYTES))
    commands = {"Alice": ("send", "Bob", str(large)), "Bob": ("receive", "Alice", "--dir", str(folder))}
    running_now = {name: people.run(name, *argv) for name, argv in commands.items()}

    def there_bytes() -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    until(lambda: there_bytes() > LARGE_BYTES // 4, "a part is there", CONNECTS_S)
    assert running_now[who].end(signal.SIGKILL) == -9
    there = there_bytes()
    assert there < LARGE_BYTES
    threading.Event().wait(connectoid.NEW_OFFER_S + 0.5)  # a call that comes sooner counts as crossed
    running_now[who] = people.run(who, *commands[who])
    assert [terminal.end(timeout_s=60) for terminal in running_now.values()] == [0, 0]
    sent, received = running_now["Alice"].wait_for("sent"), running_now["Bob"].wait_for("received")
    assert sent["sha256"] == received["sha256"] == hashlib.sha256(large.read_bytes()).hexdigest()
    assert sent["there_before"] >= there
    assert [(path.name, path.stat().st_size) for path in folder.iterdir()] == [("large.bin", LARGE_BYTES)]


@pytest.mark.slow
def test_asyncio_face_connects_through_aiortc(apps: Apps, relay_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as over wires in memory, with the adapter that is ready."""
    ice = pytest.importorskip("aioice.ice")
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])

    async def run() -> list[bytes | str]:
        runners = [Connectoid(Store(apps.folder / f"{who}.db"), [(relay_url, None)], AiortcAdapter())
                   for who in ("Alice", "Bob")]
        async with AsyncConnectoid(runners[0]) as alice, AsyncConnectoid(runners[1]) as bob:
            return await talk(alice, bob)

    assert asyncio.run(run()) == SAID
