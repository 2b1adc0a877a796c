"""Test that a file of each schema is taken over whole.

deploy/schemas/N.sql is a file of schema N as a relay of that time left it when it was killed:
three messages of Owner(1), who is proven, one of Owner(2), a question.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from admin_harness import (
    OF_ALICE,
    OF_BOB,
    OLD_VERSIONS,
    SCHEMAS,
    VERSIONS,
    check_taken_over,
    content,
    killed_at,
    make_file,
)
from harness import (
    OK,
    ROOT,
    SOURCE,
    FakeClock,
    Owner,
    Process,
    answer_of,
    check,
    post,
    receive,
    send,
)

from connectoid_admin import AdminError, back_up, lock_ready, stored_in
from connectoid_relay import (
    APPLICATION_ID,
    SCHEMA,
    SECOND_US,
    DatabaseFile,
    Limits,
    Relay,
    SqliteStore,
    Stored,
    StoreError,
)

# The first commit with a schema.
FIRST_COMMIT = "eadacc9"


def test_every_schema_that_ever_was_has_its_file() -> None:
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{version}.sql" for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_statements_of_a_schema_still_make_what_they_made_then(
    tmp_path: Path, version: int
) -> None:
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
    tmp_path: Path, version: int, clock: FakeClock, alice: Owner, bob: Owner
) -> None:
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
        assert (status, [message["data"] for message in reply["messages"]]) == (
            200,
            [*OF_BOB, "bmV3"],
        )
        clock.advance(3_601)
        while relay.sweep():
            pass
        assert relay.stored() == Stored(0, 0, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_file_that_is_full_is_taken_over_and_still_full(
    tmp_path: Path, version: int, clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    path = tmp_path / "relay.db"
    copies = 5_000
    clock.wall_us = make_file(path, version) + SECOND_US
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            """WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
            INSERT INTO messages (at, box, expires_us, source, size, data)
            SELECT at + i * 10000000, box, expires_us + 10 * 3600 * 1000000, source, 512,
            substr(data || hex(zeroblob(256)), 1, 512) FROM messages, n WHERE data = 'QUJ2'""",
            (copies,),
        )
        db.execute(
            "UPDATE relay SET bytes = bytes + ?, last_at = (SELECT max(at) FROM messages)",
            (copies * 512,),
        )
        if version > 1:
            db.execute("UPDATE relay SET messages = messages + ?", (copies,))
    full = 3 * 512 + 800 + copies * 512
    relay = Relay(
        SqliteStore(str(path)),
        Limits(max_bytes=full, max_box_messages=10 * copies),
        clock=clock.clock,
    )
    with contextlib.closing(relay):
        assert relay.stored() == Stored(4 + copies, full, 1)
        status, reply = relay.handle(send(bob), SOURCE)
        assert (status, isinstance(reply, dict) and reply["error"]) == (507, "Full")
        answer = answer_of(relay, alice)
        status, reply = relay.handle(receive(alice, answer), SOURCE)
        assert (status, isinstance(reply, dict) and reply["data"]) == (200, "QUJ0")


class Faulty(SqliteStore):
    """A store in which SQLite refuses the n-th request, or dies before the n-th statement."""

    def __init__(self, path: str, refuse: int = -1, die: int = -1) -> None:
        self.asked = 0
        self.ran = 0
        self.refuse = refuse
        self.die = die
        super().__init__(path, connect=self._connect)

    def _connect(self, *words: Any, **members: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = sqlite3.connect(*words, **members)
        db.set_authorizer(self._authorize)
        db.set_trace_callback(self._trace)
        return db

    def _authorize(self, *_: object) -> int:
        self.asked += 1
        if self.asked == self.refuse:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def _trace(self, _sql: str) -> None:
        self.ran += 1
        if self.ran == self.die:
            os.kill(os.getpid(), signal.SIGKILL)


def old_and_new(folder: Path, version: int) -> tuple[int, list[str], list[str]]:
    """Return the time of an old file, its content, and its content once it is up to date."""
    time_us = make_file(folder / "model.db", version)
    old = content(folder / "model.db")
    SqliteStore(str(folder / "model.db")).close()
    return time_us, old, content(folder / "model.db")


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_upgrade_that_fails_anywhere_leaves_the_whole_old_file(
    tmp_path: Path, version: int, alice: Owner, bob: Owner
) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    path = tmp_path / "relay.db"
    refused = 0
    outcomes = []
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
    # The fault was within the upgrade.
    assert outcomes[len(outcomes) // 2] == old
    assert content(path) == new
    check_taken_over(path, time_us, alice, bob)


DYING = """
import sys
from test_upgrades import Faulty
Faulty(sys.argv[1], die=int(sys.argv[2])).close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_upgrade_that_is_killed_before_any_statement_leaves_the_whole_old_file(
    tmp_path: Path, version: int, alice: Owner, bob: Owner
) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    survived = 0
    for number in range(1, 60):
        path = tmp_path / f"{number}.db"
        make_file(path, version)
        child = subprocess.run(
            [sys.executable, "-c", DYING, str(path), str(number)],
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
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
    tmp_path: Path, version: int, call: str, alice: Owner, bob: Owner
) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    code = "import sys; from connectoid_relay import SqliteStore; SqliteStore(sys.argv[1]).close()"
    for number in range(1, 200):
        path = tmp_path / f"{number}.db"
        make_file(path, version)
        if not killed_at(call, number, sys.executable, "-c", code, str(path)):
            assert content(path) == new
            break
        shutil.copy(path, tmp_path / "looked-at.db")
        if os.path.exists(f"{path}-wal"):
            shutil.copy(f"{path}-wal", tmp_path / "looked-at.db-wal")
        assert content(tmp_path / "looked-at.db") in (old, new), number
        (tmp_path / "looked-at.db-wal").unlink(missing_ok=True)
        check_taken_over(path, time_us, alice, bob)
        path.unlink()
    else:
        raise AssertionError("it never came to an end")


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_upgrade_on_a_full_disk_leaves_a_whole_file(
    tmp_path: Path, version: int, alice: Owner, bob: Owner
) -> None:
    time_us, old, new = old_and_new(tmp_path, version)
    code = "import sys; from connectoid_relay import SqliteStore; SqliteStore(sys.argv[1]).close()"
    refused = 0
    for limit in range(4096, 200_000, 4096):
        path = tmp_path / f"{limit}.db"
        make_file(path, version)
        child = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda limit=limit: resource.setrlimit(  # type: ignore[misc]
                resource.RLIMIT_FSIZE, (limit, limit)
            ),
        )
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
    tmp_path: Path, version: int, start: Callable[..., Process], alice: Owner
) -> None:
    path = tmp_path / "relay.db"
    time_us = make_file(path, version)
    file = DatabaseFile(str(path))
    # Both wait for the lock before either may go on.
    with lock_ready(file), file.exclusive():
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "import sys; from connectoid_relay import SqliteStore;"
                    " s = SqliteStore(sys.argv[1]);"
                    " print(s.stored().messages); s.close()",
                    str(path),
                ],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        time.sleep(0.5)
    assert [process.communicate(timeout=20)[0] for process in processes] == ["4\n", "4\n"]
    check_taken_over(path, time_us, alice, Owner(2))


def first_relay() -> str:
    """Return the relay of the first commit, or skip."""
    if not shutil.which("git"):
        pytest.skip("no git here")
    shown = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{FIRST_COMMIT}:connectoid_relay.py"],
        capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip("no history here")
    return shown.stdout


@pytest.mark.slow
def test_relay_of_the_first_commit_is_killed_and_todays_goes_on_with_its_file(
    tmp_path: Path, start: Callable[..., Process], alice: Owner, bob: Owner
) -> None:
    (tmp_path / "first.py").write_text(first_relay())
    first = subprocess.Popen(
        [sys.executable, "first.py", "--port", "0", "--host", "127.0.0.1", "--db", "relay.db"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stderr is not None
        port = int(first.stderr.readline().rsplit(":", 1)[1])
        for text in OF_ALICE:
            assert post(port, send(alice, text)) == (200, OK)
        answer = alice.open(post(port, check(alice))[1]["question"])
        assert post(port, receive(alice, answer))[0] == 200
        with pytest.raises(AdminError, match="has schema 1, and this program 2; restart the relay"):
            stored_in(str(tmp_path / "relay.db"))
        # This runs beside the old relay, before the upgrade.
        back_up(str(tmp_path / "relay.db"), str(tmp_path / "backup.db"))
    finally:
        first.kill()
        first.communicate()
    for name in ("relay.db", "backup.db"):
        process = start("--db", name)
        assert process.port, process.first_line
        assert (
            post(process.port, receive(alice, answer, limit=9))[1]["messages"][2]["data"] == "QUJ2"
        )
        assert post(process.port, send(bob)) == (200, OK)
        assert process.stop() == (0, "")
        assert stored_in(str(tmp_path / name))["messages"] == 4


# ---------------------------------------------------------------------------------------
# Backup and restore.
# ---------------------------------------------------------------------------------------
