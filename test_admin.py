"""Test what a host has for the day after: connectoid-admin, upgrades of old files, dashboards, the installer."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from conftest import (
    NOTHING,
    OK,
    ROOT,
    FakeClock,
    Owner,
    Process,
    answer_of,
    check,
    post,
    receive,
    send,
    serving,
)
from connectoid_admin import (
    CHECKS,
    RENEWAL_DAYS,
    AdminError,
    Finding,
    Subject,
    ask,
    back_up,
    check_version,
    clock_is_synchronized,
    delete,
    file_system_of,
    find_all,
    locked,
    main,
    parse_metrics,
    read_environment,
    restore,
    stored_in,
)
from connectoid_relay import (
    APPLICATION_ID,
    METRICS,
    RELEASE_US,
    SCHEMA,
    SECOND_US,
    YEAR_2200_US,
    Access,
    Limits,
    Message,
    Quota,
    Relay,
    SqliteStore,
    Stored,
    StoreError,
    __version__,
    build_parser,
    load_tls,
    render_metrics,
)

SCHEMAS = ROOT / "deploy" / "schemas"
MONITORING = ROOT / "deploy" / "monitoring"
ADMIN = [sys.executable, str(ROOT / "connectoid_admin.py")]
FIRST_COMMIT = "eadacc9"  # the first with a schema
SOURCE = "192.0.2.1"

# ---------------------------------------------------------------------------------------
# Upgrades: deploy/schemas/N.sql is a file of schema N as a relay of that time left it when
# it was killed: three messages of Owner(1), who is proven, one of Owner(2), a question.
# ---------------------------------------------------------------------------------------

VERSIONS = range(1, len(SCHEMA) + 1)
OLD_VERSIONS = range(1, len(SCHEMA))
OF_ALICE = ["QUJ0", "QUJ1", "QUJ2"]
OF_BOB = ["Ym9i" * 200]


def make_file(path: Path, version: int) -> int:
    """Make a file of a schema and return its relay time."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript((SCHEMAS / f"{version}.sql").read_text())
        (time_us,) = db.execute("SELECT time_us FROM relay").fetchone()
    return int(time_us)


def content(path: Path) -> list[str]:
    """Return all that is in a file, and its version, without what the relay would do to it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [*db.iterdump(), *(str(db.execute(f"PRAGMA {name}").fetchone()) for name in (
            "user_version", "application_id", "integrity_check"))]


def texts(store: SqliteStore, owner: Owner, time_us: int) -> list[str]:
    """Return the messages of a mailbox."""
    return [text for _, text in store.messages(owner.box, 0, 100, time_us)]


def check_taken_over(path: Path, time_us: int, alice: Owner, bob: Owner) -> None:
    """Open a file as the relay does, and find everything there."""
    with contextlib.closing(SqliteStore(str(path))) as store:
        assert store.stored() == Stored(4, 3 * 512 + 800, 1)
        assert texts(store, alice, time_us) == OF_ALICE
        assert texts(store, bob, time_us) == OF_BOB
        assert store.look(alice.box, 0, time_us).box_expires_us is not None
        assert store.look(bob.box, 0, time_us).box_expires_us is None
        assert len(store.answers(alice.box, time_us)) == 1
        assert store.time_us() >= time_us
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert check_version(str(path), db) == len(SCHEMA)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_every_schema_that_ever_was_has_its_file() -> None:
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{version}.sql" for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_statements_of_a_schema_still_make_what_they_made_then(tmp_path: Path, version: int) -> None:
    make_file(tmp_path / "then.db", version)
    now = sqlite3.connect(":memory:")
    for sql in [sql for statements in SCHEMA[:version] for sql in statements]:
        now.execute(sql)
    query = "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"
    with contextlib.closing(now), contextlib.closing(sqlite3.connect(tmp_path / "then.db")) as then:
        assert now.execute(query).fetchall() == then.execute(query).fetchall()
        assert then.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


@pytest.mark.parametrize("version", VERSIONS)
def test_file_of_each_schema_is_taken_over_with_all_that_is_in_it(
        tmp_path: Path, version: int, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    path = tmp_path / "relay.db"
    time_us = make_file(path, version)
    check_taken_over(path, time_us, alice, bob)
    clock.wall_us = time_us + SECOND_US
    relay = Relay(SqliteStore(str(path)), clock=clock.clock)
    with contextlib.closing(relay):
        assert relay.handle(send(bob, "bmV3"), SOURCE) == (200, OK)
        answer = answer_of(relay, bob)
        status, reply = relay.handle(receive(bob, answer, limit=100), SOURCE)
        assert isinstance(reply, dict)
        assert (status, [message["data"] for message in reply["messages"]]) == (200, [*OF_BOB, "bmV3"])
        clock.advance(3_601)
        while relay.sweep():
            pass
        assert relay.stored() == Stored(0, 0, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_file_that_is_full_is_taken_over_and_still_full(
        tmp_path: Path, version: int, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    path, copies = tmp_path / "relay.db", 5_000
    clock.wall_us = make_file(path, version) + SECOND_US
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
            INSERT INTO messages (at, box, expires_us, source, size, data)
            SELECT at + i * 10000000, box, expires_us + 10 * 3600 * 1000000, source, 512,
            substr(data || hex(zeroblob(256)), 1, 512) FROM messages, n WHERE data = 'QUJ2'""", (copies,))
        db.execute("UPDATE relay SET bytes = bytes + ?, last_at = (SELECT max(at) FROM messages)", (copies * 512,))
        if version > 1:
            db.execute("UPDATE relay SET messages = messages + ?", (copies,))
    full = 3 * 512 + 800 + copies * 512
    relay = Relay(SqliteStore(str(path)), Limits(max_bytes=full, max_box_messages=10 * copies), clock=clock.clock)
    with contextlib.closing(relay):
        assert relay.stored() == Stored(4 + copies, full, 1)
        status, reply = relay.handle(send(bob), SOURCE)
        assert (status, isinstance(reply, dict) and reply["error"]) == (507, "Full")
        answer = answer_of(relay, alice)
        status, reply = relay.handle(receive(alice, answer), SOURCE)
        assert (status, isinstance(reply, dict) and reply["data"]) == (200, "QUJ0")


class Faulty(SqliteStore):
    """A store in which SQLite refuses the n-th thing that it is asked for, or dies before the n-th statement."""

    def __init__(self, path: str, refuse: int = -1, die: int = -1) -> None:
        self.asked, self.ran, self.refuse, self.die = 0, 0, refuse, die
        super().__init__(path)

    def _connect(self) -> sqlite3.Connection:
        db = super()._connect()
        db.set_authorizer(self._authorize)
        db.set_trace_callback(self._trace)
        return db

    def _authorize(self, *_: object) -> int:
        self.asked += 1
        return sqlite3.SQLITE_DENY if self.asked == self.refuse else sqlite3.SQLITE_OK

    def _trace(self, _sql: str) -> None:
        self.ran += 1
        if self.ran == self.die:
            os.kill(os.getpid(), signal.SIGKILL)


def old_and_new(folder: Path, version: int) -> tuple[int, list[str], list[str]]:
    """Return the time of an old file, its content, and what it is when it was brought up to date."""
    time_us = make_file(folder / "model.db", version)
    old = content(folder / "model.db")
    SqliteStore(str(folder / "model.db")).close()
    return time_us, old, content(folder / "model.db")


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_upgrade_that_fails_anywhere_leaves_the_whole_old_file(
        tmp_path: Path, version: int, alice: Owner, bob: Owner) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    path, refused, outcomes = tmp_path / "relay.db", 0, []
    make_file(path, version)
    while True:
        refused += 1
        try:
            Faulty(str(path), refuse=refused).close()
        except StoreError:
            outcomes.append(content(path))
            assert outcomes[-1] in (old, new), refused
        else:
            break
    assert len(outcomes) > 40
    assert outcomes[len(outcomes) // 2] == old  # the fault was within the upgrade
    assert content(path) == new
    check_taken_over(path, time_us, alice, bob)


DYING = """
import sys
from test_admin import Faulty
Faulty(sys.argv[1], die=int(sys.argv[2])).close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_upgrade_that_is_killed_before_any_statement_leaves_the_whole_old_file(
        tmp_path: Path, version: int, alice: Owner, bob: Owner) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    survived = 0
    for number in range(1, 60):
        path = tmp_path / f"{number}.db"
        make_file(path, version)
        child = subprocess.run([sys.executable, "-c", DYING, str(path), str(number)], cwd=ROOT, check=False)
        if child.returncode == 0:
            assert content(path) == new
            break
        assert child.returncode == -signal.SIGKILL
        found = content(path)
        assert found in (old, new), number
        survived += found == old
        check_taken_over(path, time_us, alice, bob)
    else:
        raise AssertionError("it never came to an end")
    assert survived > len([sql for statements in SCHEMA[version:] for sql in statements])


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD_VERSIONS)
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "fsync", "ftruncate", "unlink"])
def test_upgrade_that_is_killed_at_any_write_leaves_a_whole_file(
        tmp_path: Path, version: int, call: str, alice: Owner, bob: Owner) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    code = "import sys; from connectoid_relay import SqliteStore; SqliteStore(sys.argv[1]).close()"
    for number in range(1, 200):
        path = tmp_path / f"{number}.db"
        make_file(path, version)
        if not killed_at(call, number, sys.executable, "-c", code, str(path)):
            assert content(path) == new
            break
        shutil.copy(path, tmp_path / "looked-at.db")
        shutil.copy(f"{path}-wal", tmp_path / "looked-at.db-wal") if os.path.exists(f"{path}-wal") else None
        assert content(tmp_path / "looked-at.db") in (old, new), number
        (tmp_path / "looked-at.db-wal").unlink(missing_ok=True)
        check_taken_over(path, time_us, alice, bob)
        path.unlink()
    else:
        raise AssertionError("it never came to an end")


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_upgrade_on_a_full_disk_leaves_a_whole_file(tmp_path: Path, version: int, alice: Owner, bob: Owner) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    code = "import sys; from connectoid_relay import SqliteStore; SqliteStore(sys.argv[1]).close()"
    refused = 0
    for limit in range(4096, 200_000, 4096):
        path = tmp_path / f"{limit}.db"
        make_file(path, version)
        child = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False,
            preexec_fn=lambda limit=limit: resource.setrlimit(  # type: ignore[misc]
                resource.RLIMIT_FSIZE, (limit, limit)))
        assert content(path) in (old, new)
        if child.returncode:
            assert "StoreFull" in child.stderr or "StoreError" in child.stderr, child.stderr
            refused += 1
        check_taken_over(path, time_us, alice, bob)
    assert refused >= 1
    assert child.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_two_relays_that_upgrade_one_file_at_once_both_find_it_whole(
        tmp_path: Path, version: int, start: Callable[..., Process], alice: Owner) -> None:
    path = tmp_path / "relay.db"
    time_us = make_file(path, version)
    with locked(str(path)):  # both are at the door before one may go in
        processes = [subprocess.Popen(
            [sys.executable, "-c", "import sys; from connectoid_relay import SqliteStore; s = SqliteStore(sys.argv[1]);"
             " print(s.stored().messages); s.close()", str(path)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        time.sleep(0.5)
    assert [process.communicate(timeout=20)[0] for process in processes] == ["4\n", "4\n"]
    check_taken_over(path, time_us, alice, Owner(2))


@pytest.mark.slow
def test_relay_of_the_first_commit_is_killed_and_todays_goes_on_with_its_file(
        tmp_path: Path, start: Callable[..., Process], alice: Owner, bob: Owner) -> None:
    shown = subprocess.run(["git", "-C", str(ROOT), "show", f"{FIRST_COMMIT}:connectoid_relay.py"],
                           capture_output=True, text=True, check=False) if shutil.which("git") else None
    if shown is None or shown.returncode:
        pytest.skip("no history here")
    (tmp_path / "first.py").write_text(shown.stdout)
    first = subprocess.Popen(
        [sys.executable, "first.py", "--port", "0", "--host", "127.0.0.1", "--db", "relay.db"], cwd=tmp_path,
        stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        port = int(first.stderr.readline().rsplit(":", 1)[1])
        for text in OF_ALICE:
            assert post(port, send(alice, text)) == (200, OK)
        answer = alice.open(post(port, check(alice))[1]["question"])
        assert post(port, receive(alice, answer))[0] == 200
        with pytest.raises(AdminError, match="has schema 1, and this program 2; restart the relay"):
            stored_in(str(tmp_path / "relay.db"))
        back_up(str(tmp_path / "relay.db"), str(tmp_path / "backup.db"))  # beside it, before the upgrade
    finally:
        first.kill()
        first.communicate()
    for name in ("relay.db", "backup.db"):
        process = start("--db", name)
        assert process.port, process.first_line
        assert post(process.port, receive(alice, answer, limit=9))[1]["messages"][2]["data"] == "QUJ2"
        assert post(process.port, send(bob)) == (200, OK)
        assert process.stop() == (0, "")
        assert stored_in(str(tmp_path / name))["messages"] == 4


# ---------------------------------------------------------------------------------------
# Backup and restore.
# ---------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return where the database of a test is."""
    return str(tmp_path / "relay.db")


@pytest.fixture
def beside(path: str, clock: FakeClock, alice: Owner, bob: Owner) -> Iterator[Relay]:
    """Return a relay that is open while the test looks: two messages of Alice, who is proven, one of Bob."""
    access = Access({"secret": Quota("keys.alice", bytes=10_000)})
    relay = Relay(SqliteStore(path), access=access, clock=clock.clock)
    for request in (send(alice, "QUJD", ext="secret"), send(alice, "REVG", ext="secret"), send(bob, "Qk9C" * 200)):
        assert relay.handle(request, SOURCE) == (200, OK)
        clock.advance(10)
    assert relay.handle(receive(alice, answer_of(relay, alice)), SOURCE)[0] == 200
    relay.handle(receive(alice, answer_of(relay, alice), at=2**62), SOURCE)
    relay.sweep()
    yield relay
    relay.close()


def in_another_process(code: str, *words: str) -> str:
    """Run code with words in sys.argv[1:] and return what it printed and how it failed.

    Within the process of a relay nobody may open and close its file: that would drop SQLite's locks.
    """
    finished = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True,
                              check=False)
    return finished.stdout + finished.stderr


def admin(*words: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
    """Run connectoid-admin and return its exit code and what it printed."""
    environment = {name: text for name, text in os.environ.items() if name != "STATE_DIRECTORY"} | variables
    finished = subprocess.run([*ADMIN, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    return finished.returncode, finished.stdout, finished.stderr


def test_backup_beside_a_relay_has_what_was_committed_and_is_one_private_file(
        path: str, beside: Relay, alice: Owner, bob: Owner, clock: FakeClock) -> None:
    tmp_path = Path(path).parent
    code, output, errors = admin("backup", "--db", path, str(tmp_path / "backup.db"))
    assert (code, errors) == (0, "")
    assert output.startswith(f"{path} is backed up as {tmp_path / 'backup.db'}, ")
    beside.handle(send(bob, "bGF0ZXI"), SOURCE)
    assert beside.stored() == Stored(4, 3 * 512 + 800, 1)
    assert stat.S_IMODE(os.stat(tmp_path / "backup.db").st_mode) == 0o600
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith("relay.db")) == ["backup.db"]
    os.chmod(tmp_path / "backup.db", 0o400)
    with contextlib.closing(SqliteStore(restored(tmp_path))) as store:
        assert store.stored() == Stored(3, 2 * 512 + 800, 1)
        assert texts(store, alice, clock.wall_us) == ["QUJD", "REVG"]
        assert texts(store, bob, clock.wall_us) == ["Qk9C" * 200]


def restored(folder: Path, backup: str = "backup.db") -> str:
    """Return the name of a file restored on another disk."""
    target = folder / "other" / "relay.db"
    target.parent.mkdir()
    assert restore(str(folder / backup), str(target)) is None
    assert sorted(os.listdir(target.parent)) == ["relay.db", "relay.db-lock"]
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o600
    return str(target)


def test_backup_without_messages_keeps_mailboxes_time_and_requests_alone(
        tmp_path: Path, path: str, beside: Relay, alice: Owner, clock: FakeClock) -> None:
    code, _, errors = admin("backup", "--db", path, "--without-messages", str(tmp_path / "backup.db"))
    assert (code, errors) == (0, "")
    octets = (tmp_path / "backup.db").read_bytes()
    assert b"QUJD" not in octets
    assert b"Qk9CQk9C" not in octets
    with contextlib.closing(SqliteStore(restored(tmp_path))) as store:
        assert store.stored() == Stored(0, 0, 1)
        assert store.time_us() >= clock.wall_us - 60 * SECOND_US
        assert store.answers(alice.box, clock.wall_us) == []
        assert store.spent(clock.wall_us)["keys.alice"] == 2
        store.put(Message(alice.box, "A" * 10_000, b"s" * 16, 1, Quota("keys.alice", bytes=10_000)), Limits(), 0)


def test_backup_into_a_folder_is_named_after_the_time(tmp_path: Path, path: str, beside: Relay) -> None:
    (tmp_path / "kept").mkdir()
    assert admin("backup", "--db", path, str(tmp_path / "kept"))[0] == 0
    (name,) = os.listdir(tmp_path / "kept")
    assert re.fullmatch(r"connectoid-\d{8}T\d{6}Z\.db", name)


def test_backup_overwrites_nothing_and_leaves_nothing_when_it_fails(
        tmp_path: Path, path: str, beside: Relay) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    for target in ("mine", "link"):
        assert admin("backup", "--db", path, str(tmp_path / target)) == (
            1, "", f"connectoid-admin: {tmp_path / target} is there already; nothing is overwritten\n")
    code, _, errors = admin("backup", "--db", path, str(tmp_path / "no" / "backup.db"))
    assert code == 1
    assert errors.endswith(": No such file or directory\n")
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("target", "complaint"), [
    ("", "no name: No such file or directory"), ("nowhere/", "nowhere/: No such file or directory"),
    (os.fsdecode(b"\xff.db"), "names of files must be UTF-8"),
])
def test_backup_to_a_name_that_cannot_be_is_one_line(tmp_path: Path, path: str, target: str, complaint: str) -> None:
    make_file(Path(path), len(SCHEMA))
    assert admin("backup", "--db", path, target, cwd=tmp_path) == (1, "", f"connectoid-admin: {complaint}\n")
    assert sorted(os.listdir(tmp_path)) == ["relay.db", "relay.db-lock"]


def test_backup_has_the_name_that_was_given_whatever_is_in_it(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    names = ["a b.db", "$(touch pwned);'\"`&.db", "-x.db", "a?b#c%20.db", "two\nlines.db"]
    for name in names:
        code, output, errors = admin("backup", "--db", path, "--", name, cwd=tmp_path)
        assert (code, output.count("\n"), errors) == (0, 1, "")
        assert restored_messages(tmp_path / name) == 4
        assert restore(str(tmp_path / name), str(tmp_path / f"{name} restored")) is None
    assert {name for name in os.listdir(tmp_path) if not name.endswith((" restored", "-lock"))} == {"relay.db", *names}


def test_quiet_backup_says_nothing_but_what_went_wrong(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    assert admin("backup", "-q", "--db", path, "copy.db", cwd=tmp_path) == (0, "", "")
    assert admin("backup", "-q", "--db", path, "copy.db", cwd=tmp_path) == (
        1, "", "connectoid-admin: copy.db is there already; nothing is overwritten\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_backup_that_is_told_to_stop_leaves_nothing(tmp_path: Path, path: str, number: signal.Signals) -> None:
    make_file(Path(path), len(SCHEMA))
    (tmp_path / "kept").mkdir()
    with open(path + "-lock", "w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)  # it waits for it, with the new file made
        process = subprocess.Popen([*ADMIN, "backup", "--db", path, str(tmp_path / "kept")], stderr=subprocess.PIPE,
                                   text=True)
        while not os.listdir(tmp_path / "kept"):
            assert process.poll() is None
        process.send_signal(number)
        assert process.communicate(timeout=20)[1] == "connectoid-admin: stopped\n"
    assert process.returncode == 130
    assert os.listdir(tmp_path / "kept") == []


def test_long_statement_ends_when_it_is_told_to_stop(path: str) -> None:
    code = """import sqlite3, sys
from connectoid_admin import connect, explain
db = connect(sys.argv[1])
print("ready", flush=True)
try:
    db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")
except sqlite3.Error as error:
    try:
        explain("it", error)
    except KeyboardInterrupt:
        print("stopped")
"""
    process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    before = cpu_ticks(process.pid)
    while cpu_ticks(process.pid) < before + 10:  # then it is well within the statement
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "stopped\n"


def cpu_ticks(pid: int) -> int:
    """Return how much CPU a process has used, in hundredths of a second (proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_backup_to_a_disk_without_room_is_one_line_and_leaves_nothing(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    execute(Path(path), "UPDATE messages SET data = hex(zeroblob(2000000))")
    (tmp_path / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "small")], check=False,
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("no leave to mount")
    try:
        assert admin("backup", "--db", path, str(tmp_path / "small")) == (
            1, "", f"connectoid-admin: {path}: database or disk is full\n")
        back_up(path, str(tmp_path / "backup.db"))
        assert admin("restore", "--db", str(tmp_path / "small" / "relay.db"), str(tmp_path / "backup.db")) == (
            1, "", f"connectoid-admin: {tmp_path / 'small' / 'relay.db'}: No space left on device\n")
        assert os.listdir(tmp_path / "small") == []
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def killed_at(call: str, number: int, *command: str) -> bool:
    """Run a command that is killed at its n-th system call of a kind; return whether it came to that."""
    if not shutil.which("strace"):
        pytest.skip("not installed: strace")
    finished = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e",
         f"inject={call}:signal=KILL:when={number}", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if "ptrace" in finished.stderr:
        pytest.skip("no leave to trace")
    return finished.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "link", "unlink"])
def test_backup_that_is_killed_at_any_write_leaves_no_backup_or_a_whole_one(tmp_path: Path, call: str) -> None:
    make_file(tmp_path / "relay.db", len(SCHEMA))
    for number in range(1, 60):
        target = tmp_path / f"backup{number}.db"
        killed = killed_at(call, number, *ADMIN, "backup", "--db", str(tmp_path / "relay.db"), str(target))
        assert killed or target.exists()
        if target.exists():
            assert restored_messages(target) == 4
        if not killed:
            break
    assert not killed
    assert number > 1


def restored_messages(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return int(db.execute("SELECT count(*) FROM messages").fetchone()[0])


@pytest.mark.slow
def test_backups_beside_a_busy_relay_are_whole_and_nothing_is_lost(
        tmp_path: Path, start: Callable[..., Process]) -> None:
    process = start("--db", "relay.db", "--rate", "0", "--max-box-messages", "100000", "--max-box-bytes", "1000000000")
    stop, sent = threading.Event(), [0] * 4

    def write(number: int) -> None:
        while not stop.is_set():
            assert post(process.port, send(Owner(number + 1), "A" * 3_000, ext=f"{number}")) == (200, OK)
            sent[number] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    counts = []
    try:
        for number in range(8):
            before = sum(sent)
            code, _, errors = admin("backup", "--db", "relay.db", f"{number}.db", cwd=tmp_path)
            assert (code, errors) == (0, "")
            counts.append(restored_messages(tmp_path / f"{number}.db"))
            assert before <= counts[-1] <= sum(sent) + len(threads)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert counts == sorted(counts)
    assert process.stop()[0] == 0
    assert restored_messages(tmp_path / "relay.db") == sum(sent) == stored_in(str(tmp_path / "relay.db"))["messages"]


def test_restore_beside_a_relay_is_refused_and_changes_nothing(
        tmp_path: Path, start: Callable[..., Process], alice: Owner) -> None:
    make_file(tmp_path / "made.db", len(SCHEMA))
    back_up(str(tmp_path / "made.db"), str(tmp_path / "backup.db"))
    process = start("--db", "relay.db")  # idle: it holds no lock of ours, but the file
    before = sorted(os.listdir(tmp_path))
    assert admin("restore", "--db", "relay.db", "backup.db", cwd=tmp_path) == (
        1, "", "connectoid-admin: relay.db is in use; stop the relay first\n")
    assert sorted(os.listdir(tmp_path)) == before
    assert post(process.port, send(alice)) == (200, OK)
    assert process.stop() == (0, "")
    assert restored_messages(tmp_path / "relay.db") == 1


def test_restore_keeps_the_old_file_aside_whole(tmp_path: Path, alice: Owner) -> None:
    path = tmp_path / "relay.db"
    make_file(path, len(SCHEMA))
    old = content(path)
    with contextlib.closing(SqliteStore(str(tmp_path / "other.db"))) as store:
        store.put(Message(alice.box, "bmV3", b"s" * 16, 60 * SECOND_US), Limits(), RELEASE_US)
    back_up(str(tmp_path / "other.db"), str(tmp_path / "backup.db"))
    aside = restore(str(tmp_path / "backup.db"), str(path))
    assert aside is not None
    assert re.fullmatch(re.escape(str(path)) + r"\.before-restore-\d{8}T\d{6}Z", aside)
    assert content(Path(aside)) == old
    with contextlib.closing(SqliteStore(str(path))) as store:
        assert texts(store, alice, RELEASE_US) == ["bmV3"]
    assert (tmp_path / "backup.db").exists()


@pytest.mark.slow
def test_restore_after_a_kill_takes_the_wal_along_with_the_old_file(
        tmp_path: Path, start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", "relay.db")
    assert post(process.port, send(alice, "b2xk")) == (200, OK)
    process.stop(9)
    assert (tmp_path / "relay.db-wal").stat().st_size > 0
    make_file(tmp_path / "made.db", len(SCHEMA))
    back_up(str(tmp_path / "made.db"), str(tmp_path / "backup.db"))
    aside = restore(str(tmp_path / "backup.db"), str(tmp_path / "relay.db"))
    assert aside is not None
    assert restored_messages(Path(aside)) == 1
    assert restored_messages(tmp_path / "relay.db") == 4


def test_restore_takes_the_place_of_a_damaged_file(tmp_path: Path, alice: Owner, bob: Owner) -> None:
    path = tmp_path / "relay.db"
    time_us = make_file(tmp_path / "made.db", len(SCHEMA))
    back_up(str(tmp_path / "made.db"), str(tmp_path / "backup.db"))
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 9_000)
    (tmp_path / "relay.db-wal").write_bytes(b"\xff" * 9_000)
    aside = restore(str(tmp_path / "backup.db"), str(path))
    assert aside is not None
    assert Path(aside).read_bytes().endswith(b"\xff" * 9_000)
    check_taken_over(path, time_us, alice, bob)


def execute(path: Path, sql: str) -> None:
    """Change a file behind everybody's back."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(sql)


def damage(path: Path) -> None:
    """Overwrite a page in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xa5" * 4096)


TRIGGER = "CREATE TRIGGER thief AFTER DELETE ON messages BEGIN UPDATE quotas SET bytes = 0; END"


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda path: path.write_bytes(b"not a database" * 1_000), "file is not a database"),
    (Path.unlink, "No such file or directory"),
    (lambda path: os.truncate(path, 3 * 4096), "malformed|damaged"),
    (damage, "malformed|damaged"),
    (lambda path: execute(path, f"PRAGMA user_version = {len(SCHEMA) + 1}"), "use one as new as the relay"),
    (lambda path: execute(path, "PRAGMA application_id = 7"), "belongs to another program"),
    (lambda path: execute(path, "PRAGMA user_version = 0"), "use one as new as the relay"),
    (lambda path: execute(path, "PRAGMA user_version = -1"), "use one as new as the relay"),
    (lambda path: execute(path, TRIGGER), "is not as a relay makes it: see its trigger thief"),
    (lambda path: execute(path, "CREATE VIEW spare AS SELECT * FROM boxes"), "see its view spare"),
    (lambda path: execute(path, "DROP TABLE quotas"), "see its table quotas"),
    (lambda path: execute(path, "DROP INDEX messages_box"), "see its index messages_box"),
    (lambda path: execute(path, "DELETE FROM relay"), "it has no relay time"),
    (lambda path: execute(path, f"UPDATE relay SET time_us = {YEAR_2200_US}"), "it has no relay time"),
    (lambda path: execute(path, f"UPDATE relay SET last_at = {2**63 - 1}"), "it has no relay time"),
    (lambda path: execute(path, "UPDATE relay SET time_us = -1"), "it has no relay time"),
    (lambda path: Path(f"{path}-wal").write_bytes(b"x"), "is a file in use, or was"),
], ids=["junk", "missing", "cut", "damaged", "newer", "foreign", "no schema", "negative schema", "trigger", "view",
        "table gone", "index gone", "no time", "late time", "late message", "negative time", "in use"])
def test_restore_refuses_what_is_no_whole_backup_and_changes_nothing(
        tmp_path: Path, spoil: Callable[[Path], object], complaint: str) -> None:
    make_file(tmp_path / "relay.db", len(SCHEMA))
    before = content(tmp_path / "relay.db")
    back_up(str(tmp_path / "relay.db"), str(tmp_path / "backup.db"))
    spoil(tmp_path / "backup.db")
    names = set(os.listdir(tmp_path)) | {"relay.db-lock"}
    with pytest.raises(AdminError, match=complaint):
        restore(str(tmp_path / "backup.db"), str(tmp_path / "relay.db"))
    assert set(os.listdir(tmp_path)) <= names
    assert content(tmp_path / "relay.db") == before


def test_restore_of_the_file_itself_or_in_the_place_of_a_link_is_refused(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    back_up(path, str(tmp_path / "backup.db"))
    (tmp_path / "link.db").symlink_to(path)
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(AdminError, match="is the relay's file itself"):
        restore(str(tmp_path / "link.db"), path)
    with pytest.raises(AdminError, match="is a link; name the file itself with --db"):
        restore(str(tmp_path / "backup.db"), str(tmp_path / "link.db"))
    with pytest.raises(AdminError, match="is a link; name the file itself with --db"):
        back_up(str(tmp_path / "link.db"), str(tmp_path / "another.db"))
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="not installed: strace")
def test_restore_follows_no_link_that_the_folders_owner_puts_in_its_way(tmp_path: Path, path: str) -> None:
    """Every close() takes 5 ms, so that a link is there long before the new file is opened again."""
    make_file(Path(path), len(SCHEMA))
    back_up(path, str(tmp_path / "backup.db"))
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "relay").mkdir()
    swapped, stop = threading.Event(), threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for new in (tmp_path / "relay").glob("*.new"):
                with contextlib.suppress(OSError):
                    new.unlink()
                    new.symlink_to(tmp_path / "precious")
                    return swapped.set()
        return None

    thread = threading.Thread(target=swap)
    thread.start()
    finished = subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "-e", "trace=close", "-e", "inject=close:delay_enter=5000", *ADMIN,
         "restore", "--db", str(tmp_path / "relay" / "relay.db"), str(tmp_path / "backup.db")],
        cwd=ROOT, capture_output=True, text=True, check=False)
    stop.set()
    thread.join(10)
    if "ptrace" in finished.stderr:
        pytest.skip("no leave to trace")
    assert swapped.is_set()
    assert (tmp_path / "precious").read_text() == "precious"
    assert (finished.returncode, finished.stderr) == (
        1, f"connectoid-admin: {tmp_path / 'relay' / 'relay.db'}: Too many levels of symbolic links\n")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "link", "rename", "unlink"])
def test_restore_that_is_killed_anywhere_leaves_the_whole_old_file_or_the_whole_new_one(
        tmp_path: Path, call: str) -> None:
    make_file(tmp_path / "new.db", len(SCHEMA))
    back_up(str(tmp_path / "new.db"), str(tmp_path / "backup.db"))
    found = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        SqliteStore(str(folder / "relay.db")).close()
        killed = killed_at(call, number, *ADMIN, "restore", "--db", str(folder / "relay.db"),
                           str(tmp_path / "backup.db"))
        found.append(restored_messages(folder / "relay.db"))
        shutil.rmtree(folder)
        if not killed:
            break
    assert found == sorted(found)  # of none the old file's, of four the new one's
    assert found[-1] == 4


# ---------------------------------------------------------------------------------------
# Delete, stats.
# ---------------------------------------------------------------------------------------


def test_delete_beside_a_relay_takes_all_of_a_mailbox_and_nothing_else(
        path: str, beside: Relay, alice: Owner, bob: Owner, clock: FakeClock) -> None:
    assert admin("delete", "--db", path, alice.pub) == (
        0, "deleted: 2 messages, 1 questions, 1 places of proven mailboxes\n", "")
    assert beside.stored() == Stored(1, 800, 0)
    assert beside.handle(check(alice), SOURCE) == (200, NOTHING)
    status, reply = beside.handle(check(bob), SOURCE)
    assert isinstance(reply, dict)
    assert (status, reply["found"]) == (200, True)
    # Its bytes belong to nobody any more: the quota of 10,000 is free again.
    quota = Quota("keys.alice", bytes=10_000)
    beside.store.put(Message(alice.box, "A" * 10_000, b"s" * 16, SECOND_US, quota), Limits(), clock.wall_us)
    assert "QUJD" not in Path(path).read_bytes().decode("latin-1")
    clock.advance(3_600)
    while beside.sweep():
        pass
    assert beside.stored() == Stored(0, 0, 0)


def test_delete_of_a_mailbox_that_has_nothing_is_done(path: str, beside: Relay) -> None:
    assert admin("delete", "--db", path, Owner(3).pub) == (
        0, "deleted: 0 messages, 0 questions, 0 places of proven mailboxes\n", "")
    assert beside.stored() == Stored(3, 2 * 512 + 800, 1)


@pytest.mark.parametrize("pub", ["", "A", "A" * 66, Owner(1).pub[:-1]])
def test_delete_refuses_what_is_no_mailbox(pub: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["delete", pub])
    assert caught.value.code == 2
    assert "is no mailbox; write its pub, 66 characters" in capsys.readouterr().err


@pytest.mark.slow
def test_deletes_beside_a_busy_relay_keep_its_sums_right(tmp_path: Path, start: Callable[..., Process]) -> None:
    process = start("--db", "relay.db", "--rate", "0", "--max-box-messages", "100000", "--max-box-bytes", "1000000000")
    stop = threading.Event()

    def write(number: int) -> None:
        while not stop.is_set():
            assert post(process.port, send(Owner(number + 1), "A" * 600)) == (200, OK)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(12):
            code, _, errors = admin("delete", "--db", "relay.db", Owner(number % 3 + 1).pub, cwd=tmp_path)
            assert (code, errors) == (0, "")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert process.stop() == (0, "")
    findings = list(find_all(subject(str(tmp_path / "relay.db"))))
    assert [finding for finding in findings if finding.what == "file" and finding.level != "OK"] == []


def test_stats_count_what_is_stored_and_tell_no_keys(
        path: str, beside: Relay, alice: Owner, bob: Owner, clock: FakeClock) -> None:
    output = in_another_process("import json, sys; from connectoid_admin import stored_in\n"
                                "print(json.dumps(stored_in(sys.argv[1], int(sys.argv[2]))))", path, str(clock.wall_us))
    stats = json.loads(output)
    assert {name: stats[name] for name in stats if name not in ("file_bytes", "wal_bytes", "reserve_bytes")} == {
        "path": path, "schema": len(SCHEMA), "messages": 3, "message_bytes": 2 * 512 + 800,
        "mailboxes_with_messages": 2, "messages_in_the_fullest_mailbox": 2, "proven_mailboxes": 1,
        "open_questions": 1, "oldest_message_age_s": 30, "median_message_age_s": 20, "newest_message_age_s": 10,
        "quotas": [{"name": "keys.alice", "requests_today": 2, "bytes": 8}],
    }
    assert alice.pub not in output
    assert bob.pub not in output
    assert "secret" not in output


def test_stats_have_rates_and_refusals_of_the_relay(path: str, beside: Relay, alice: Owner) -> None:
    beside.handle({"action": "send"}, SOURCE)
    with serving(beside) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        code, output, errors = admin("stats", "--db", path, "--json", "--url", url)
        assert (code, errors) == (0, "")
        relay = json.loads(output)["relay"]
        assert relay["version"] == __version__
        assert relay["healthy"] == 1
        assert relay["requests"]["send"]["total"] == 4  # the refused one too
        assert relay["refusals"]["Bad request"]["total"] == 1
        assert {f"connectoid_{name}_total" for name in relay if f"connectoid_{name}_total" in METRICS} == {
            name for name, metric in METRICS.items() if metric.type == "counter"}
        code, table, _ = admin("stats", "--db", path, "--url", url, "--over", "1")
        assert code == 0
        assert re.search(r"(?m)^file messages +3$", table)
        assert re.search(r"(?m)^relay requests send +4 \([\d.]+ a minute, now 0\)$", table)
        assert re.search(r"(?m)^relay refusals Bad request +1 ", table)
        assert re.search(r"(?m)^file quotas keys.alice bytes +8$", table)
        assert "Too often" not in table  # what never was
        assert alice.pub not in output + table


def test_stats_without_a_relay_are_those_of_the_file(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    code, output, errors = admin("stats", "--db", path, "--json", "--url", f"http://127.0.0.1:{closed_port()}/")
    assert code == 0
    assert json.loads(output)["relay"] is None
    assert json.loads(output)["file"]["messages"] == 4
    assert "does not answer: Connection refused" in errors


def closed_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_metrics_are_parsed_as_they_are_rendered(beside: Relay) -> None:
    samples = beside.samples()
    assert parse_metrics(render_metrics(samples)) == samples


@pytest.mark.parametrize("command", ["stats", "backup", "delete"])
def test_a_relay_that_is_stuck_in_a_commit_is_told(tmp_path: Path, path: str, command: str) -> None:
    make_file(Path(path), len(SCHEMA))
    words = {"backup": [str(tmp_path / "backup.db")], "delete": [Owner(1).pub], "stats": []}[command]
    with open(path + "-lock", "w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        assert admin(command, "--db", path, *words) == (
            1, "", f"connectoid-admin: {path} is held by another process\n")


@pytest.mark.parametrize("command", ["stats", "backup", "delete", "check"])
def test_no_command_makes_a_file_where_there_is_none(tmp_path: Path, command: str) -> None:
    words = {"backup": ["backup.db"], "delete": [Owner(1).pub]}.get(command, [])
    code, output, errors = admin(command, "--db", "wrong.db", "--flags", "", *words, cwd=tmp_path)
    assert code == 1
    assert "wrong.db: No such file or directory; name the relay's file with --db" in output + errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["stats", "backup", "delete"])
def test_file_of_another_program_is_left_alone(tmp_path: Path, command: str) -> None:
    execute(tmp_path / "other.db", "CREATE TABLE t (a)")
    octets = (tmp_path / "other.db").read_bytes()
    words = {"backup": ["backup.db"], "delete": [Owner(1).pub]}.get(command, [])
    code, _, errors = admin(command, "--db", "other.db", "--flags", "", *words, cwd=tmp_path)
    assert (code, errors) == (1, "connectoid-admin: other.db belongs to another program\n")
    assert (tmp_path / "other.db").read_bytes() == octets
    assert os.listdir(tmp_path) == ["other.db"]


@pytest.mark.parametrize("command", ["stats", "backup", "delete"])
def test_file_with_a_trigger_is_left_alone(tmp_path: Path, path: str, command: str) -> None:
    make_file(Path(path), len(SCHEMA))
    execute(Path(path), TRIGGER)
    before = content(Path(path))
    words = {"backup": ["backup.db"], "delete": [Owner(1).pub]}.get(command, [])
    assert admin(command, "--db", path, *words, cwd=tmp_path) == (
        1, "", f"connectoid-admin: {path} is not as a relay makes it: see its trigger thief\n")
    assert content(Path(path)) == before
    assert not (tmp_path / "backup.db").exists()
    assert found(subject(path), "file") == [
        Finding("FAIL", "file", f"{path} is not as a relay makes it: see its trigger thief")]


@pytest.mark.parametrize("version", VERSIONS)
def test_file_of_each_schema_is_as_a_relay_makes_it_and_may_be_analyzed(path: str, version: int) -> None:
    make_file(Path(path), version)
    execute(Path(path), "ANALYZE")
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert check_version(path, db) == version


@pytest.mark.parametrize("rest", ["-wal", "-journal", "-shm"])
def test_no_link_beside_the_file_is_followed(tmp_path: Path, path: str, rest: str) -> None:
    make_file(Path(path), len(SCHEMA))
    (tmp_path / "precious").write_text("precious")
    Path(path + rest).symlink_to(tmp_path / "precious")
    code, _, errors = admin("delete", "--db", path, Owner(1).pub)
    assert (code, errors) == (1, f"connectoid-admin: {path}: unable to open database file\n")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.fixture
def as_another_user() -> Iterator[None]:
    """Be somebody who may read nothing of a test's."""
    if os.geteuid():
        pytest.skip("needs root")
    os.seteuid(65_534)
    yield
    os.seteuid(0)


def test_who_may_not_read_the_file_or_the_flags_is_told_to_use_sudo(
        path: str, as_another_user: None, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--db", path], ["--env", f"{path}.env"]):
        assert main(["stats", *words]) == 1
        assert re.fullmatch(rf"connectoid-admin: {path}(.env)?: Permission denied; use sudo[^\n]*\n",
                            capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--flags", "--rate many"], ["--env", "nowhere.env"]])
def test_nothing_but_check_goes_on_with_other_flags_than_the_relays(tmp_path: Path, words: list[str]) -> None:
    make_file(tmp_path / "connectoid.db", len(SCHEMA))
    code, output, errors = admin("backup", *words, "backup.db", cwd=tmp_path)
    assert (code, output, errors.count("\n")) == (1, "", 1)
    assert not (tmp_path / "backup.db").exists()
    assert admin("backup", "--db", "connectoid.db", *words, "backup.db", cwd=tmp_path)[0] == 0


def test_lock_file_is_no_link_to_follow(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    (tmp_path / "relay.db-lock").symlink_to(tmp_path / "precious")
    code, _, errors = admin("delete", "--db", path, Owner(1).pub)
    assert code == 1
    assert f"{path}-lock: Too many levels of symbolic links" in errors
    assert not (tmp_path / "precious").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_root_makes_belongs_to_the_relays_user(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    back_up(path, str(tmp_path / "backup.db"))
    for name in os.listdir(tmp_path):
        os.unlink(tmp_path / name) if name == "relay.db-lock" else None
    os.chown(path, 1234, 1234)
    stored_in(path)
    restore(str(tmp_path / "backup.db"), path)
    owners = {name: os.stat(tmp_path / name).st_uid for name in os.listdir(tmp_path) if name.startswith("relay.db")}
    assert set(owners) >= {"relay.db", "relay.db-lock"}
    assert set(owners.values()) == {1234}


# ---------------------------------------------------------------------------------------
# Check.
# ---------------------------------------------------------------------------------------


def subject(path: str, *flags: str, **members: Any) -> Subject:
    """Return what is to be looked at; nothing listens at the port of its flags unless they name one."""
    port = () if "--port" in flags else ("--port", str(closed_port()))
    return Subject(path, build_parser().parse_args([*port, *flags]), origin="the test", **members)


def found(looked_at: Subject, what: str) -> list[Finding]:
    """Return what one check finds."""
    return [finding for finding in find_all(looked_at) if finding.what == what]


def levels(findings: list[Finding]) -> list[str]:
    """Return how bad each is."""
    return [finding.level for finding in findings]


def test_check_of_a_relay_that_is_well_fails_nowhere_and_is_one_line_a_finding(
        path: str, beside: Relay, clock: FakeClock) -> None:
    with serving(beside, udp=True, stun=True) as server:
        port = server.server_port
        code, output, errors = admin(
            "check", "--db", path, "--url", f"http://127.0.0.1:{port}/",
            "--flags", f"--host 127.0.0.1 --port {port} --udp --stun --trusted-proxy 127.0.0.0/8 --contact me")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert all(re.fullmatch(r"(OK   |WARN ) \w+: .+", line) for line in lines), output
    assert f"OK    file: {path}, schema {len(SCHEMA)} of {len(SCHEMA)}" in lines
    assert "OK    relay: a check over UDP is answered" in lines
    assert "OK    reach: STUN is answered" in lines
    assert {line.split()[1] for line in lines} == {f"{what}:" for what in CHECKS} - {"certificate:"}


def test_check_fails_where_nobody_listens(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    looked_at = subject(path, "--host", "127.0.0.1")
    (finding,) = found(looked_at, "relay")
    assert finding == Finding("FAIL", "relay", f"{looked_at.local_url} does not answer: Connection refused")
    assert admin("check", "--db", path, "--flags", f"--port {looked_at.flags.port}")[0] == 1


def test_check_tells_an_ill_relay(path: str, clock: FakeClock) -> None:
    relay = Relay(SqliteStore(path), clock=clock.clock)
    with serving(relay) as server:
        relay.store.close()
        looked_at = subject(path, "--host", "127.0.0.1", "--port", str(server.server_port))
        assert found(looked_at, "relay")[0] == Finding(
            "FAIL", "relay", f"{looked_at.local_url} is not well: The store cannot be read or written.")


def test_check_tells_another_program_at_the_relays_port() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        looked_at = subject(":memory:", "--host", "127.0.0.1", "--port", str(server.server_port))
        findings = found(looked_at, "relay")
        server.shutdown()
        thread.join(10)
    assert findings[-1] == Finding("FAIL", "relay", f"{looked_at.local_url} is another program")


class Hostile(socketserver.StreamRequestHandler):
    """What answers a request with something else than a relay would."""

    reply = b""
    patient = False

    def handle(self) -> None:
        self.rfile.readline()
        with contextlib.suppress(OSError):
            while self.patient:  # a byte now and then, so that no single read takes too long
                self.wfile.write(self.reply)
                time.sleep(0.05)
            self.wfile.write(self.reply)


@contextlib.contextmanager
def hostile(reply: bytes, *, patient: bool = False) -> Iterator[str]:
    """Serve it, and return where."""
    handler = type("Handler", (Hostile,), {"reply": reply, "patient": patient})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join(10)


@pytest.mark.parametrize("reply", [b"H", b"HTTP/1.1 200 OK\r\nA: b\r\n", b"HTTP/1.1 200 OK\r\n\r\nx"],
                         ids=["status", "headers", "body"])
def test_relay_that_never_ends_its_answer_is_not_waited_for(reply: bytes) -> None:
    with hostile(reply, patient=True) as url, pytest.raises(AdminError, match=f"^{url} does not answer: timed out$"):
        ask(url, "/", timeout_s=1)


def test_what_a_hostile_relay_says_stays_in_its_line(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    text = json.dumps({"software": "connectoid_relay", "version": "1\x1b[2J\nOK    relay: all is well"})
    with hostile(b"HTTP/1.1 500 \x1b[31m\r\n\r\n" + text.encode()) as url:
        port = url.rstrip("/").rpartition(":")[2]
        code, output, errors = admin("check", "--db", path, "--flags", f"--host 127.0.0.1 --port {port}", "--url", url)
    assert (code, errors) == (1, "")
    assert "relay: all is well" in output
    assert not re.search(r"(?m)^OK +relay", output)
    assert all(letter.isprintable() or letter == "\n" for letter in output)


def test_check_follows_no_redirection() -> None:
    with hostile(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n") as url:
        assert found(subject(":memory:", url=url), "reach") == [
            Finding("FAIL", "reach", f"{url} is no relay (status 302)")]


@pytest.mark.parametrize("metrics", [
    "connectoid_healthy 1", "connectoid_uptime_seconds 1e999", "connectoid_uptime_seconds nan",
    "connectoid_uptime_seconds -1", "connectoid_uptime_seconds " + "9" * 400, "\xff",
])
def test_stats_of_what_is_no_relay_are_those_of_the_file(path: str, metrics: str) -> None:
    make_file(Path(path), len(SCHEMA))
    with hostile(b"HTTP/1.1 200 OK\r\n\r\n" + metrics.encode("latin-1") + b"\n") as url:
        code, output, errors = admin("stats", "--db", path, "--json", "--url", url)
    assert (code, errors) == (0, f"connectoid-admin: {url} has no metrics (status 200); what the file says:\n")
    assert json.loads(output)["relay"] is None


def test_stats_of_a_hostile_relay_have_nothing_for_the_terminal(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    metrics = 'connectoid_uptime_seconds 5\nconnectoid_info{version="\x1b]0;x\x07"} 1\n'
    with hostile(b"HTTP/1.1 200 OK\r\n\r\n" + metrics.encode()) as url:
        for words in ([], ["--json"]):
            code, output, errors = admin("stats", "--db", path, "--url", url, *words)
            assert (code, errors) == (0, "")
            assert "]0;x" in output
            assert all(letter.isprintable() or letter == "\n" for letter in output)


def test_quiet_check_leaves_out_what_is_well(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    words = ["check", "--db", path, "--flags", f"--port {closed_port()}"]
    code, output, _ = admin(*words)
    assert admin(*words, "--quiet") == (
        code, "".join(line for line in output.splitlines(keepends=True) if not line.startswith("OK ")), "")
    assert "OK " in output


def test_check_tells_a_mistake_in_the_flags(tmp_path: Path) -> None:
    (tmp_path / "relay.env").write_text("# comment\nFLAGS='--port 8080 --rate many'\n")
    code, output, _ = admin("check", "--db", ":memory:", "--env", str(tmp_path / "relay.env"))
    assert code == 1
    assert (f"FAIL  flags: {tmp_path / 'relay.env'}: argument --rate: 'many' is no whole number from 0 to 1000000000000"
            in output)


@pytest.mark.parametrize(("flags", "level", "text"), [
    ("--tls-cert a.pem", "FAIL", "--tls-cert and --tls-key go together"),
    ("--keys nowhere.toml", "FAIL", "nowhere.toml: No such file or directory; give a file that the relay may read"),
    ("--host 127.0.0.1", "WARN", "behind a proxy all clients share the limits of one: --trusted-proxy 127.0.0.0/8"),
    ("--port 80", "WARN", "plain HTTP: web pages that came over HTTPS may not use it"),
    ("--rate 0", "WARN", "--rate 0: nothing holds back who asks too often"),
    ("", "WARN", "no --contact: nobody knows whom to tell what is wrong"),
])
def test_check_tells_what_is_odd_in_the_flags(flags: str, level: str, text: str) -> None:
    assert Finding(level, "flags", text) in found(subject(":memory:", *flags.split()), "flags")


def test_check_tells_keys_that_everybody_may_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[keys.alice]\nkey = "secret"\n')
    for mode, expected in ((0o644, "WARN"), (0o640, "OK")):
        keys.chmod(mode)
        findings = found(subject(":memory:", "--keys", str(keys)), "flags")
        assert [finding.level for finding in findings if str(keys) in finding.text] == [expected]


def test_check_tells_a_damaged_file_wrong_rights_and_wrong_sums(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    os.chmod(path, 0o644)
    assert [(finding.level, finding.text) for finding in found(subject(path), "file")][1:] == [
        ("WARN", "others may open it (mode 0644); chmod 0600 it"), ("OK", "integrity_check ok"),
        ("OK", "4 messages, 2336 bytes, 1 proven mailboxes")]
    execute(Path(path), "UPDATE relay SET messages = 7")
    assert found(subject(path), "file")[-1] == Finding(
        "WARN", "file", "messages, bytes and mailboxes are (4, 2336, 1), but it says (7, 2336, 1)")
    damage(Path(path))
    assert found(subject(path), "file")[-1].level == "FAIL"


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_check_and_backup_take_an_old_file_and_leave_it_old(tmp_path: Path, path: str, version: int) -> None:
    make_file(Path(path), version)
    before = content(Path(path))
    assert found(subject(path), "file")[0] == Finding("OK", "file", f"{path}, schema {version} of {len(SCHEMA)}")
    back_up(path, str(tmp_path / "backup.db"))
    assert content(tmp_path / "backup.db") == content(Path(path)) == before
    with pytest.raises(AdminError, match=f"has schema {version}, and this program {len(SCHEMA)}; restart the relay"):
        delete(path, Owner(1).box)
    assert content(Path(path)) == before


def test_check_tells_a_disk_without_room_and_a_reserve_in_use(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    findings = found(subject(path, "--max-bytes", "1"), "disk")
    assert Finding("WARN", "disk", "the reserve is in use: the disk was full, and messages are refused") in findings
    Path(path + "-reserve").touch()
    assert "WARN" not in levels([finding for finding in found(subject(path, "--max-bytes", "1"), "disk")
                                 if "tmpfs" not in finding.text])
    (room, *_) = found(subject(path, "--max-bytes", str(10**12)), "disk")
    assert room.level in ("WARN", "FAIL")
    assert "a full relay (--max-bytes) would take " in room.text


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux")
def test_file_system_is_the_one_mounted_nearest() -> None:
    assert file_system_of("/proc/self/status") == "proc"
    assert file_system_of("/") != "proc"


def test_check_tells_a_clock_that_is_not_believed_or_behind_the_relays_time(path: str) -> None:
    time_us = make_file(Path(path), len(SCHEMA))
    date = datetime.datetime.fromtimestamp(time_us // SECOND_US, datetime.UTC)
    assert found(subject(path, now_us=lambda: 0), "clock") == [
        Finding("FAIL", "clock", "shows 1970-01-01 00:00:00 UTC, which the relay does not believe"),
        Finding("WARN", "clock", f"the relay's time is {date:%Y-%m-%d %H:%M:%S} UTC, ahead of the clock, and stays so"
                                 " until that is reached; nothing is lost")]
    assert len(found(subject(path, now_us=lambda: time_us), "clock")) == 1
    assert clock_is_synchronized() in (True, False, None)


class Shown(NamedTuple):
    """A certificate and its key."""

    certificate: Path
    key: Path


def issue(folder: Path, days: int, name: str = "relay.example.com") -> Shown:
    """Make a certificate that is good for so many days and a bit."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    certificate = x509.CertificateBuilder(
        issuer, issuer, key.public_key(), x509.random_serial_number(), now - datetime.timedelta(days=90),
        now + datetime.timedelta(days=days, minutes=10),
    ).add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False).sign(key, hashes.SHA256())
    files = Shown(folder / f"{days}.pem", folder / f"{days}.key")
    files.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    files.key.touch(0o600)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@pytest.mark.parametrize(("days", "level"), [(RENEWAL_DAYS, "OK"), (RENEWAL_DAYS - 1, "WARN"), (-1, "FAIL")])
def test_check_tells_a_certificate_near_its_end(tmp_path: Path, days: int, level: str) -> None:
    files = issue(tmp_path, days)
    looked_at = subject(":memory:", "--tls-cert", str(files.certificate), "--tls-key", str(files.key))
    assert levels(found(looked_at, "certificate")) == [level]


def test_check_tells_a_certificate_for_another_name(tmp_path: Path) -> None:
    files = issue(tmp_path, 60)
    for name, expected in (("relay.example.com", ["OK"]), ("other.example.com", ["OK", "FAIL"])):
        looked_at = subject(":memory:", "--tls-cert", str(files.certificate), "--tls-key", str(files.key),
                            url=f"https://{name}:1/")
        assert levels(found(looked_at, "certificate")) == expected


def test_check_tells_a_certificate_that_was_renewed_but_not_read_again(tmp_path: Path, relay: Relay) -> None:
    old, new = issue(tmp_path, 40), issue(tmp_path, 80)
    with serving(relay, tls=load_tls(str(old.certificate), str(old.key))) as server:
        for files, expected in ((old, ["OK"]), (new, ["OK", "WARN"])):
            findings = found(subject(
                ":memory:", "--host", "127.0.0.1", "--port", str(server.server_port),
                "--tls-cert", str(files.certificate), "--tls-key", str(files.key)), "relay")
            assert levels(findings) == expected
        (reach,) = found(subject(":memory:", url=f"https://127.0.0.1:{server.server_port}/"), "reach")
        assert reach.level == "FAIL"
        assert "self-signed certificate" in reach.text or "certificate" in reach.text


def test_environment_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "relay.env"
    for text, words in (("FLAGS=--port 80\n", ["--port", "80"]), ('FLAGS="--port 80"\n', ["--port", "80"]),
                        ("# FLAGS=1\nOTHER=2\n", []), ("FLAGS=\n", []),
                        ("FLAGS=--name 'My relay' --udp", ["--name", "My relay", "--udp"]),
                        ("FLAGS=--port 80 \\\n  --udp\n", ["--port", "80", "--udp"])):
        file.write_text(text)
        assert read_environment(str(file)) == words


def test_database_is_the_one_of_the_relays_flags_or_of_its_folder(tmp_path: Path) -> None:
    make_file(tmp_path / "mine.db", len(SCHEMA))
    (tmp_path / "relay.env").write_text(f"FLAGS=--db {tmp_path / 'mine.db'} --port {closed_port()}\n")
    code, output, _ = admin("stats", "--env", str(tmp_path / "relay.env"))
    assert code == 0
    assert str(tmp_path / "mine.db") in output
    make_file(tmp_path / "connectoid.db", len(SCHEMA))
    code, output, _ = admin("stats", "--flags", f"--port {closed_port()}", STATE_DIRECTORY=str(tmp_path))
    assert code == 0
    assert str(tmp_path / "connectoid.db") in output


@pytest.mark.parametrize("words", [
    [], ["nonsense"], ["backup"], ["stats", "--over", "x"], *(["check", "--url", url] for url in (
        "relay", "ftp://relay/", "http://", "http://[/", "http://relay:0/", "http://relay:99999/", "http://relay:x/",
        "http://\xfc.example/", "http://relay/\xfc", "https://me:secret@relay/", "http://relay/?x", "http://re lay/")),
])
def test_wrong_usage_is_one_line_and_2(words: list[str]) -> None:
    code, output, errors = admin(*words)
    assert (code, output) == (2, "")
    assert re.fullmatch(r"connectoid_admin\.py[^\n]*: error: [^\n]+\n", errors)


def test_every_command_has_its_help() -> None:
    code, output, _ = admin("--help")
    assert code == 0
    for command in ("check", "backup", "restore", "stats", "delete"):
        assert f"    {command} " in output
        assert admin(command, "--help")[0] == 0
    assert admin("--version") == (0, f"connectoid admin {__version__}\n", "")


def test_output_that_nobody_reads_to_the_end_is_no_traceback(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    process = subprocess.Popen([*ADMIN, "check", "--db", path, "--flags", f"--port {closed_port()}"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait(20)
    process.stderr.close()


# ---------------------------------------------------------------------------------------
# Monitoring: the rules by promtool, then all of it by a real Prometheus.
# ---------------------------------------------------------------------------------------

DASHBOARD = json.loads((MONITORING / "connectoid-dashboard.json").read_text())
RULES = (MONITORING / "rules.yml").read_text()
ALERTS = re.findall(r"(?m)^      - alert: (\w+)$", RULES)
LOAD_S = 24  # of scrapes, one a second: two of the dashboard's rate windows
RATE_WINDOW = "12s"


def promtool(*words: str) -> None:
    """Run promtool beside the rules; it must be content."""
    if not shutil.which("promtool"):
        pytest.skip("not installed: prometheus")
    finished = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_rules_and_configuration_are_valid_and_do_what_their_tests_say() -> None:
    promtool("check", "rules", "rules.yml")
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_one_case_that_fires_and_one_that_is_silent() -> None:
    cases = re.findall(r"(?m)^  - name: (\w+) (fires|is silent)$", (MONITORING / "rules_test.yml").read_text())
    assert sorted(cases) == sorted((alert, case) for alert in ALERTS for case in ("fires", "is silent"))


def queries() -> dict[str, str]:
    """Return the queries of the dashboard by panel and letter."""
    return {f"{panel['title']} {target['refId']}": target["expr"]
            for panel in DASHBOARD["panels"] for target in panel["targets"]}


def test_dashboard_and_rules_know_all_metrics_and_no_others() -> None:
    named = set(re.findall(r"connectoid_\w+", " ".join([*queries().values(), RULES])))
    assert named == set(METRICS)
    limits = set(re.findall(r'limit="(\w+)"', " ".join([*queries().values(), RULES])))
    assert limits <= set(Limits._fields)
    errors = set(re.findall(r'error="([^"]+)"', " ".join([*queries().values(), RULES])))
    assert errors <= set(METRICS["connectoid_refusals_total"].values)


def test_panels_have_numbers_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [(x, y) for panel in DASHBOARD["panels"] for place in [panel["gridPos"]]
              for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


class Prometheus:
    """A Prometheus of our own, with the rules, that scrapes one relay every second."""

    def __init__(self, folder: Path, relay_port: int) -> None:
        self.port = closed_port()
        configuration = (MONITORING / "prometheus.yml").read_text().replace("15s", "1s").replace(
            "localhost:8080", f"127.0.0.1:{relay_port}").replace("rules.yml", str(MONITORING / "rules.yml"))
        (folder / "prometheus.yml").write_text(configuration)
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}",
                 f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=log)

    def ask(self, path: str, **members: str) -> Any:
        """Return what its API says."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(members)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """Return the values of a query now."""
        return [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]

    def until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Ask again until it is so."""
        give_up = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if holds():
                    return
            assert time.monotonic() < give_up
            time.sleep(0.2)


def load_relay(port: int, stop: threading.Event) -> None:
    """Do what apps do, and what they should not do."""
    owners, number = [Owner(number) for number in range(1, 9)], 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("127.0.0.1", port))
        while not stop.is_set():
            number += 1
            owner = owners[number % len(owners)]
            post(port, send(owner, "A" * 2_500))
            found = post(port, check(owner))[1]
            if "question" in found:
                post(port, receive(owner, owner.open(found["question"]), limit=1))
            udp.send(json.dumps(check(owner, id="a")).encode())
            if number % 20 == 0:
                post(port, b"nonsense")
                post(port, receive(owner, "wrong"))


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Process]]:
    """Return a Prometheus that has scraped a relay under load."""
    if not shutil.which("prometheus"):
        pytest.skip("not installed: prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    process = Process("--udp", "--rate", "0", "--max-box-messages", "100000", "--max-box-bytes", "1000000000",
                      cwd=folder)
    prometheus = Prometheus(folder, process.port)
    stop = threading.Event()
    thread = threading.Thread(target=load_relay, args=(process.port, stop))
    try:
        thread.start()
        prometheus.until(lambda: prometheus.query(f"count_over_time(connectoid_healthy[{LOAD_S}s])") >= [LOAD_S - 3],
                         LOAD_S + 30)
        yield prometheus, process
    finally:
        stop.set()
        thread.join(20)
        prometheus.process.terminate()
        prometheus.process.wait(20)
        process.stop()


@pytest.mark.slow
def test_real_prometheus_scrapes_and_knows_every_metric(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, _ = scraped
    assert prometheus.query("up") == [1]
    assert prometheus.query('rate(connectoid_requests_total{action="send"}[20s])')[0] > 0
    for name in METRICS:
        assert prometheus.query(name), name
        (metadata,) = prometheus.ask("metadata", metric=name)[name]
        assert (metadata["type"], metadata["help"]) == (METRICS[name].type, METRICS[name].meaning)


@pytest.mark.slow
def test_every_panel_of_the_dashboard_has_numbers(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, _ = scraped
    values = {"$__rate_interval": RATE_WINDOW, "$job": "connectoid", "$instance": ".*"}
    empty = []
    for title, expression in queries().items():
        for variable, value in values.items():
            expression = expression.replace(variable, value)  # noqa: PLW2901 - step by step
        numbers = prometheus.query(expression)
        if not numbers or not all(number >= 0 for number in numbers):
            empty.append((title, numbers))
    assert empty == []


@pytest.mark.slow
def test_dashboard_marks_the_starts_of_a_relay(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, _ = scraped
    (mark,) = DASHBOARD["annotations"]["list"]
    expression = mark["expr"].replace("$job", "connectoid").replace("$instance", ".*")
    assert prometheus.query(expression) == []
    assert prometheus.query(expression.removesuffix(" > 0")) == [0]


@pytest.mark.slow
def test_dashboard_finds_relays_by_its_variables(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, process = scraped
    for label, expected in (("job", ["connectoid"]), ("instance", [f"127.0.0.1:{process.port}"])):
        assert prometheus.ask(f"label/{label}/values", **{"match[]": "connectoid_info"}) == expected


@pytest.mark.slow
def test_every_alert_is_evaluated_silent_when_all_is_well_and_made_of_metrics_that_exist(
        scraped: tuple[Prometheus, Process]) -> None:
    prometheus, _ = scraped
    (group,) = prometheus.ask("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == ALERTS
    for rule in group["rules"]:
        assert (rule["health"], rule["state"]) == ("ok", "inactive"), rule
        assert prometheus.query(rule["query"]) == [], rule["name"]
        for metric in set(re.findall(r"\b(?:connectoid_\w+(?:{[^}]*})?|up{[^}]*})", rule["query"])):
            assert prometheus.query(metric), (rule["name"], metric)


@pytest.mark.slow
def test_alert_is_pending_when_the_relay_has_gone(tmp_path: Path) -> None:
    if not shutil.which("prometheus"):
        pytest.skip("not installed: prometheus")
    process = Process(cwd=tmp_path)
    prometheus = Prometheus(tmp_path, process.port)
    try:
        prometheus.until(lambda: prometheus.query("up") == [1])
        process.stop(9)
        prometheus.until(lambda: [(alert["labels"]["alertname"], alert["state"])
                                  for alert in prometheus.ask("alerts")["alerts"]] == [("ConnectoidDown", "pending")])
    finally:
        process.stop(9)
        prometheus.process.terminate()
        prometheus.process.wait(20)


# ---------------------------------------------------------------------------------------
# The installer. deploy/install_test.sh tries it in a Debian of its own: make install-test.
# ---------------------------------------------------------------------------------------

SCRIPTS = sorted((ROOT / "deploy").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_one_that_any_shell_reads(script: Path) -> None:
    for shell in filter(shutil.which, ("dash", "bash", "busybox")):
        words = [shell, "ash", "-n"] if shell == "busybox" else [shell, "-n"]
        subprocess.run([*words, str(script)], check=True)
    if shutil.which("shellcheck"):
        finished = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert finished.stdout == ""
    assert "\nset -eu\n" in script.read_text()


@pytest.mark.parametrize(("words", "code", "complaint"), [
    ([], 2, "usage: "), (["nonsense"], 2, "usage: "), (["remove", "--all"], 2, "what is --all?"),
    (["install", "--flags"], 2, "--flags needs a text"), (["upgrade", "--purge"], 2, "what is --purge?"),
])
def test_installer_does_nothing_when_it_is_used_wrongly(words: list[str], code: int, complaint: str) -> None:
    finished = subprocess.run(["sh", "deploy/install.sh", *words], cwd=ROOT, capture_output=True, text=True,
                              check=False)
    assert finished.returncode == code
    assert complaint in finished.stderr


def test_installer_does_nothing_for_who_is_not_root() -> None:
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("not installed: setpriv")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    script = (ROOT / "deploy" / "install.sh").read_text()  # such a user may not be able to
    finished = subprocess.run([*user, "sh", "-s", "install"], input=script, cwd="/", capture_output=True, text=True,
                              check=False)
    assert finished.returncode == 1
    assert finished.stderr == "install.sh: only root can do this: use sudo\n"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("debootstrap"), reason="needs root and debootstrap")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_trial_of_the_installer_that_is_told_to_stop_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(["sh", "deploy/install_test.sh"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True)
    while not list(tmp_path.glob("*/root.part")):  # debootstrap is at work
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "install_test.sh: debootstrap; a minute or two\n"
    assert process.returncode == 1
    assert os.listdir(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # of one that has just ended
            assert str(tmp_path) not in file.read_text(errors="replace")


def test_installer_tells_its_usage() -> None:
    finished = subprocess.run(["sh", "deploy/install.sh", "--help"], cwd=ROOT, capture_output=True, text=True,
                              check=True)
    assert finished.stdout.startswith("usage: install.sh install [--flags TEXT] | upgrade | remove [--purge]\n")


# ---------------------------------------------------------------------------------------
# README.
# ---------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """Return a section of README."""
    assert f"\n## {title}\n" in README, f"README has no {title!r}"
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_readme_names_every_command_of_the_admin_and_every_alert() -> None:
    text = section("Day two")
    for command in ("check", "backup", "restore", "stats", "delete"):
        assert f"connectoid-admin {command}" in text
    for alert in ALERTS:
        assert alert in text


def test_readme_nightly_backup_is_silent_and_keeps_a_month(tmp_path: Path, path: str) -> None:
    (line,) = re.findall(r"(?m)^17 3 \* \* \* root (.+)$", section("Day two"))
    make_file(Path(path), len(SCHEMA))
    folder = tmp_path / "backups"
    folder.mkdir(0o700)
    for days in (29, 32):
        (folder / f"connectoid-{days}.db").touch()
        os.utime(folder / f"connectoid-{days}.db", (0, time.time() - days * 86_400))
    line = line.replace("/usr/local/bin/connectoid-admin backup", f"{' '.join(ADMIN)} backup --db {path}")
    finished = subprocess.run(["sh", "-c", line.replace("/var/backups/connectoid", str(folder))], capture_output=True,
                              text=True, check=True, env={"PATH": "/usr/bin:/bin"})  # as cron has it
    assert finished.stdout + finished.stderr == ""
    kept = sorted(os.listdir(folder))
    assert kept[1:] == ["connectoid-29.db"]
    assert restored_messages(folder / kept[0]) == 0


def test_readme_files_are_all_that_prometheus_needs(tmp_path: Path) -> None:
    (names,) = re.findall(r"(?m)^sudo cp (.+) /etc/prometheus/$", section("Day two"))
    for name in names.split():
        shutil.copy(ROOT / name, tmp_path)
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


# sudo, systemctl and the installed connectoid-admin, each as small as can be, in a folder of a test.
STAND_INS = {
    "sudo": '#!/bin/sh\nexec "$@"\n',
    "connectoid-admin": """#!/bin/sh
what=$1 && shift
exec $ADMIN "$what" --flags "--host 127.0.0.1 --port $PORT" "$@"
""",
    "systemctl": """#!/bin/sh
[ "$2" = connectoid-relay ] || exit 1
case $1 in
    stop) kill "$(cat pid)"; while kill -0 "$(cat pid)"; do sleep 0.1; done ;;
    start) $RELAY --host 127.0.0.1 --port "$PORT" & echo $! >pid ;;
esac >>log 2>&1
""",
}


class Host:
    """A machine on which README is typed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, closed_port()
        for name, text in STAND_INS.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def type(self, block: str) -> str:
        """Run a block of commands and return what it prints."""
        finished = subprocess.run(
            ["sh", "-eu", "-c", block], cwd=self.folder, stdout=subprocess.PIPE, text=True, check=False, env={
                "PATH": f"{self.folder}:/usr/bin:/bin", "PORT": str(self.port), "ADMIN": " ".join(ADMIN),
                "RELAY": f"{sys.executable} {ROOT / 'connectoid_relay.py'}"})
        assert finished.returncode == 0, finished.stdout
        return finished.stdout

    def wait(self) -> int:
        """Return the port once the relay answers."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                post(self.port, b"")
                break
            time.sleep(0.1)
        return self.port


def test_readme_day_two_and_a_lost_disk_go_as_typed(tmp_path: Path) -> None:
    look, put_back, *_ = re.findall(r"(?ms)^```sh\n(.*?)^```$", section("Day two"))
    (pub,) = re.findall(r"connectoid-admin delete (\S{66})$", look, re.MULTILINE)
    host = Host(tmp_path)
    host.type("systemctl start connectoid-relay")
    try:
        assert post(host.wait(), {"action": "send", "pub": pub, "data": "QUJD"}) == (200, OK)
        output = host.type(look)
        assert "FAIL" not in output
        assert re.search(r"(?m)^file messages +1$", output)
        assert "deleted: 1 messages, 0 questions, 0 places of proven mailboxes" in output
        host.type("systemctl stop connectoid-relay; rm connectoid.db*; systemctl start connectoid-relay")
        assert post(host.wait(), {"action": "check", "pub": pub}) == (200, NOTHING)
        assert "is what was backed up as connectoid-backup.db" in host.type(put_back)
        assert post(host.wait(), {"action": "check", "pub": pub})[1]["found"] is True
    finally:
        host.type("systemctl stop connectoid-relay")


@pytest.mark.parametrize("row", ["Raspberry Pi", "VPS", "behind a proxy", "embedded", "WSGI"])
def test_readme_has_each_way_to_run_it_with_what_it_carries_and_costs(row: str) -> None:
    lines = [line for line in section("Which way to run it").splitlines() if line.startswith("|") and row in line]
    assert lines, row
    assert "measured" in lines[0] or "computed" in lines[0]
