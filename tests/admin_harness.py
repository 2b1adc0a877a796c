"""What the tests of connectoid-admin, of upgrades and of monitoring share."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import OK, ROOT, SOURCE, FakeClock, Owner, answer_of, receive, send, skip_without

from connectoid_admin import Finding, Subject, check_version, find_all
from connectoid_relay import (
    SCHEMA,
    Access,
    DatabaseFile,
    Quota,
    Relay,
    SqliteStore,
    Stored,
    build_parser,
)

SCHEMAS = ROOT / "deploy" / "schemas"
MONITORING = ROOT / "deploy" / "monitoring"
ADMIN = [sys.executable, str(ROOT / "connectoid_admin.py")]
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
        return [
            *db.iterdump(),
            *(
                str(db.execute(f"PRAGMA {name}").fetchone())
                for name in ("user_version", "application_id", "integrity_check")
            ),
        ]


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
        assert check_version(DatabaseFile(str(path)), db) == len(SCHEMA)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return where the database of a test is."""
    return str(tmp_path / "relay.db")


@pytest.fixture
def beside(path: str, clock: FakeClock, alice: Owner, bob: Owner) -> Iterator[Relay]:
    """Return a relay that stays open: two messages for Alice, who is proven, and one for Bob."""
    access = Access({"secret": Quota("keys.alice", bytes=10_000)})
    relay = Relay(SqliteStore(path), access=access, clock=clock.clock)
    for request in (
        send(alice, "QUJD", ext="secret"),
        send(alice, "REVG", ext="secret"),
        send(bob, "Qk9C" * 200),
    ):
        assert relay.handle(request, SOURCE) == (200, OK)
        clock.advance(10)
    assert relay.handle(receive(alice, answer_of(relay, alice)), SOURCE)[0] == 200
    relay.handle(receive(alice, answer_of(relay, alice), at=2**62), SOURCE)
    relay.sweep()
    yield relay
    relay.close()


def in_another_process(code: str, *words: str) -> str:
    """Run code with words in sys.argv[1:] and return what it printed and how it failed.

    To open and close a relay's file within its own process would drop SQLite's locks.
    """
    finished = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return finished.stdout + finished.stderr


def admin(*words: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
    """Run connectoid-admin and return its exit code and what it printed."""
    environment = {
        name: text for name, text in os.environ.items() if name != "STATE_DIRECTORY"
    } | variables
    finished = subprocess.run(
        [*ADMIN, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return finished.returncode, finished.stdout, finished.stderr


def killed_at(call: str, number: int, *command: str) -> bool:
    """Run a command, kill it at its n-th system call of a kind, return whether it got there."""
    skip_without("strace")
    finished = subprocess.run(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            f"trace={call}",
            "-e",
            f"inject={call}:signal=KILL:when={number}",
            *command,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in finished.stderr:
        pytest.skip("no leave to trace")
    return finished.returncode != 0


def restored_messages(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return int(db.execute("SELECT count(*) FROM messages").fetchone()[0])


def execute(path: Path, sql: str) -> None:
    """Change a file without telling anybody."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(sql)


def damage(path: Path) -> None:
    """Overwrite a page in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xa5" * 4096)


TRIGGER = "CREATE TRIGGER thief AFTER DELETE ON messages BEGIN UPDATE quotas SET bytes = 0; END"


def closed_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def subject(path: str, *flags: str, **members: Any) -> Subject:
    """Return a subject; nothing listens at the port of its flags unless they name one."""
    port = () if "--port" in flags else ("--port", str(closed_port()))
    return Subject(path, build_parser().parse_args([*port, *flags]), origin="the test", **members)


def found(looked_at: Subject, what: str) -> list[Finding]:
    """Return what one check finds."""
    return [finding for finding in find_all(looked_at) if finding.what == what]


def levels(findings: list[Finding]) -> list[str]:
    """Return how bad each is."""
    return [finding.level for finding in findings]


RULES = (MONITORING / "rules.yml").read_text()
ALERTS = re.findall(r"(?m)^      - alert: (\w+)$", RULES)


def promtool(*words: str) -> None:
    """Run promtool beside the rules; it must be content."""
    skip_without("promtool")
    finished = subprocess.run(
        ["promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
