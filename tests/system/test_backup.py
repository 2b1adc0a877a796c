"""Test backup and restore."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from admin_harness import (
    ADMIN,
    TRIGGER,
    admin,
    check_taken_over,
    content,
    damage,
    execute,
    killed_at,
    make_file,
    restored_messages,
    texts,
)
from harness import (
    DEADLINE_S,
    OK,
    ROOT,
    SOURCE,
    FakeClock,
    Owner,
    Process,
    needs,
    post,
    put_down_after,
    send,
)

from connectoid_admin import AdminError, back_up, restore, stored_in
from connectoid_relay import (
    RELEASE_US,
    SCHEMA,
    SECOND_US,
    YEAR_2200_US,
    Limits,
    Message,
    Quota,
    Relay,
    SqliteStore,
    Stored,
)


def test_backup_beside_a_relay_has_what_was_committed_and_is_one_private_file(
    path: str, beside: Relay, alice: Owner, bob: Owner, clock: FakeClock
) -> None:
    tmp_path = Path(path).parent
    code, output, errors = admin("backup", "--db", path, str(tmp_path / "backup.db"))
    assert (code, errors) == (0, "")
    assert output.startswith(f"{path} is backed up as {tmp_path / 'backup.db'}, ")
    beside.handle(send(bob, "bGF0ZXI"), SOURCE)
    assert beside.stored() == Stored(4, 3 * 512 + 800, 1)
    assert stat.S_IMODE(os.stat(tmp_path / "backup.db").st_mode) == 0o600
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith("relay.db")) == [
        "backup.db"
    ]
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
    tmp_path: Path, path: str, beside: Relay, alice: Owner, clock: FakeClock
) -> None:
    code, _, errors = admin(
        "backup", "--db", path, "--without-messages", str(tmp_path / "backup.db")
    )
    assert (code, errors) == (0, "")
    octets = (tmp_path / "backup.db").read_bytes()
    assert b"QUJD" not in octets
    assert b"Qk9CQk9C" not in octets
    with contextlib.closing(SqliteStore(restored(tmp_path))) as store:
        assert store.stored() == Stored(0, 0, 1)
        assert store.time_us() >= clock.wall_us - 60 * SECOND_US
        assert store.answers(alice.box, clock.wall_us) == []
        assert store.spent(clock.wall_us)["keys.alice"] == 2
        store.put(
            Message(alice.box, "A" * 10_000, b"s" * 16, 1, Quota("keys.alice", bytes=10_000)),
            Limits(),
            0,
        )


def test_backup_into_a_folder_is_named_after_the_time(
    tmp_path: Path, path: str, beside: Relay
) -> None:
    (tmp_path / "kept").mkdir()
    assert admin("backup", "--db", path, str(tmp_path / "kept"))[0] == 0
    (name,) = os.listdir(tmp_path / "kept")
    assert re.fullmatch(r"connectoid-\d{8}T\d{6}Z\.db", name)


def test_backups_and_restores_in_one_second_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    kept = tmp_path / "kept"
    kept.mkdir()
    make_file(path, len(SCHEMA))
    backups = {back_up(str(path), str(kept)) for _ in range(5)}
    asides = {restore(backup, str(path)) for backup in backups}
    assert len(backups) == len(asides) == 5
    assert sorted(os.listdir(kept)) == sorted(os.path.basename(name) for name in backups)
    for name in backups | asides:
        assert name is not None
        assert re.search(r"\d{8}T\d{6}Z(-[2-5])?(\.db)?$", name)
        assert content(Path(name)) == content(path)


def test_backup_overwrites_nothing_and_leaves_nothing_when_it_fails(
    tmp_path: Path, path: str, beside: Relay
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    for target in ("mine", "link"):
        assert admin("backup", "--db", path, str(tmp_path / target)) == (
            1,
            "",
            f"connectoid-admin: {tmp_path / target} is there already; nothing is overwritten\n",
        )
    code, _, errors = admin("backup", "--db", path, str(tmp_path / "no" / "backup.db"))
    assert code == 1
    assert errors.endswith(": No such file or directory\n")
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("", "no name: No such file or directory"),
        ("nowhere/", "nowhere/: No such file or directory"),
        (os.fsdecode(b"\xff.db"), "names of files must be UTF-8"),
    ],
)
def test_backup_to_a_name_that_cannot_be_is_one_line(
    tmp_path: Path, path: str, target: str, complaint: str
) -> None:
    make_file(Path(path), len(SCHEMA))
    assert admin("backup", "--db", path, target, cwd=tmp_path) == (
        1,
        "",
        f"connectoid-admin: {complaint}\n",
    )
    assert sorted(os.listdir(tmp_path)) == ["relay.db", "relay.db-lock"]


def test_backup_has_the_name_that_was_given_whatever_is_in_it(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    names = ["a b.db", "$(touch pwned);'\"`&.db", "-x.db", "a?b#c%20.db", "two\nlines.db"]
    for name in names:
        code, output, errors = admin("backup", "--db", path, "--", name, cwd=tmp_path)
        assert (code, output.count("\n"), errors) == (0, 1, "")
        assert restored_messages(tmp_path / name) == 4
        assert restore(str(tmp_path / name), str(tmp_path / f"{name} restored")) is None
    assert {name for name in os.listdir(tmp_path) if not name.endswith((" restored", "-lock"))} == {
        "relay.db",
        *names,
    }


def test_quiet_backup_says_nothing_but_what_went_wrong(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    assert admin("backup", "-q", "--db", path, "copy.db", cwd=tmp_path) == (0, "", "")
    assert admin("backup", "-q", "--db", path, "copy.db", cwd=tmp_path) == (
        1,
        "",
        "connectoid-admin: copy.db is there already; nothing is overwritten\n",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_backup_that_is_told_to_stop_leaves_nothing(
    tmp_path: Path, path: str, number: signal.Signals
) -> None:
    make_file(Path(path), len(SCHEMA))
    (tmp_path / "kept").mkdir()
    with open(path + "-lock", "w") as lock_file:
        # The command waits for the lock, with the new file made.
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        with put_down_after(subprocess.Popen(
            [*ADMIN, "backup", "--db", path, str(tmp_path / "kept")],
            stderr=subprocess.PIPE,
            text=True,
        )) as process:
            while not os.listdir(tmp_path / "kept"):
                assert process.poll() is None
            process.send_signal(number)
            errors = process.communicate(timeout=DEADLINE_S)[1]
    assert errors == "connectoid-admin: stopped\n"
    assert process.returncode == 130
    assert os.listdir(tmp_path / "kept") == []


def test_long_statement_ends_when_it_is_told_to_stop(path: str) -> None:
    code = """import sqlite3, sys
from connectoid_admin import DatabaseFile, connect, explain
db = connect(sys.argv[1])
print("ready", flush=True)
try:
    db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
               " SELECT count(*) FROM n")
except sqlite3.Error as error:
    try:
        explain(DatabaseFile("it"), error)
    except KeyboardInterrupt:
        print("stopped")
"""
    with put_down_after(subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = cpu_ticks(process.pid)
        # After that much CPU it is well within the statement.
        while cpu_ticks(process.pid) < before + 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE_S)[0] == "stopped\n"


def cpu_ticks(pid: int) -> int:
    """Return how much CPU a process has used, in hundredths of a second (proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_backup_to_a_disk_without_room_is_one_line_and_leaves_nothing(
    tmp_path: Path, path: str
) -> None:
    make_file(Path(path), len(SCHEMA))
    execute(Path(path), "UPDATE messages SET data = hex(zeroblob(2000000))")
    (tmp_path / "small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "small")],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("no leave to mount")
    try:
        assert admin("backup", "--db", path, str(tmp_path / "small")) == (
            1,
            "",
            f"connectoid-admin: {path}: the disk is full (database or disk is full)\n",
        )
        back_up(path, str(tmp_path / "backup.db"))
        assert admin(
            "restore", "--db", str(tmp_path / "small" / "relay.db"), str(tmp_path / "backup.db")
        ) == (
            1,
            "",
            f"connectoid-admin: {tmp_path / 'small' / 'relay.db'}: No space left on device\n",
        )
        assert os.listdir(tmp_path / "small") == []
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "link", "unlink"])
def test_backup_that_is_killed_at_any_write_leaves_no_backup_or_a_whole_one(
    tmp_path: Path, call: str
) -> None:
    make_file(tmp_path / "relay.db", len(SCHEMA))
    for number in range(1, 60):
        target = tmp_path / f"backup{number}.db"
        killed = killed_at(
            call, number, *ADMIN, "backup", "--db", str(tmp_path / "relay.db"), str(target)
        )
        assert killed or target.exists()
        if target.exists():
            assert restored_messages(target) == 4
        if not killed:
            break
    assert not killed
    assert number > 1


@pytest.mark.slow
def test_backups_beside_a_busy_relay_are_whole_and_nothing_is_lost(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    process = start(
        "--db", "relay.db", "--rate", "0", "--max-box-messages", "100000",
        "--max-box-bytes", "1000000000",
    )
    stop, sent = threading.Event(), [0] * 4

    def write(number: int) -> None:
        while not stop.is_set():
            assert post(process.port, send(Owner(number + 1), "A" * 3_000, ext=f"{number}")) == (
                200,
                OK,
            )
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
    assert (
        restored_messages(tmp_path / "relay.db")
        == sum(sent)
        == stored_in(str(tmp_path / "relay.db"))["messages"]
    )


def test_restore_beside_a_relay_is_refused_and_changes_nothing(
    tmp_path: Path, start: Callable[..., Process], alice: Owner
) -> None:
    make_file(tmp_path / "made.db", len(SCHEMA))
    back_up(str(tmp_path / "made.db"), str(tmp_path / "backup.db"))
    # An idle relay holds no lock of ours, but it has the file open.
    process = start("--db", "relay.db")
    before = sorted(os.listdir(tmp_path))
    assert admin("restore", "--db", "relay.db", "backup.db", cwd=tmp_path) == (
        1,
        "",
        "connectoid-admin: relay.db is in use; stop the relay first\n",
    )
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
    tmp_path: Path, start: Callable[..., Process], alice: Owner
) -> None:
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


def test_restore_takes_the_place_of_a_damaged_file(
    tmp_path: Path, alice: Owner, bob: Owner
) -> None:
    path = tmp_path / "relay.db"
    time_us = make_file(tmp_path / "made.db", len(SCHEMA))
    back_up(str(tmp_path / "made.db"), str(tmp_path / "backup.db"))
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 9_000)
    (tmp_path / "relay.db-wal").write_bytes(b"\xff" * 9_000)
    aside = restore(str(tmp_path / "backup.db"), str(path))
    assert aside is not None
    assert Path(aside).read_bytes().endswith(b"\xff" * 9_000)
    check_taken_over(path, time_us, alice, bob)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: path.write_bytes(b"not a database" * 1_000), "file is not a database"),
        (Path.unlink, "No such file or directory"),
        (lambda path: os.truncate(path, 3 * 4096), "malformed|damaged"),
        (damage, "malformed|damaged"),
        (
            lambda path: execute(path, f"PRAGMA user_version = {len(SCHEMA) + 1}"),
            "install a newer one",
        ),
        (lambda path: execute(path, "PRAGMA application_id = 7"), "belongs to another program"),
        (lambda path: execute(path, "PRAGMA user_version = 0"), "install a newer one"),
        (lambda path: execute(path, "PRAGMA user_version = -1"), "install a newer one"),
        (lambda path: execute(path, TRIGGER), "is not as a relay makes it: see its trigger thief"),
        (
            lambda path: execute(path, "CREATE VIEW spare AS SELECT * FROM boxes"),
            "see its view spare",
        ),
        (lambda path: execute(path, "DROP TABLE quotas"), "see its table quotas"),
        (lambda path: execute(path, "DROP INDEX messages_box"), "see its index messages_box"),
        (lambda path: execute(path, "DELETE FROM relay"), "it has no relay time"),
        (
            lambda path: execute(path, f"UPDATE relay SET time_us = {YEAR_2200_US}"),
            "it has no relay time",
        ),
        (
            lambda path: execute(path, f"UPDATE relay SET last_at = {2**63 - 1}"),
            "it has no relay time",
        ),
        (lambda path: execute(path, "UPDATE relay SET time_us = -1"), "it has no relay time"),
        (lambda path: Path(f"{path}-wal").write_bytes(b"x"), "is a file in use, or was"),
    ],
    ids=[
        "junk",
        "missing",
        "cut",
        "damaged",
        "newer",
        "foreign",
        "no schema",
        "negative schema",
        "trigger",
        "view",
        "table gone",
        "index gone",
        "no time",
        "late time",
        "late message",
        "negative time",
        "in use",
    ],
)
def test_restore_refuses_what_is_no_whole_backup_and_changes_nothing(
    tmp_path: Path, spoil: Callable[[Path], object], complaint: str
) -> None:
    make_file(tmp_path / "relay.db", len(SCHEMA))
    before = content(tmp_path / "relay.db")
    back_up(str(tmp_path / "relay.db"), str(tmp_path / "backup.db"))
    spoil(tmp_path / "backup.db")
    names = set(os.listdir(tmp_path)) | {"relay.db-lock"}
    with pytest.raises(AdminError, match=complaint):
        restore(str(tmp_path / "backup.db"), str(tmp_path / "relay.db"))
    assert set(os.listdir(tmp_path)) <= names
    assert content(tmp_path / "relay.db") == before


def test_restore_of_the_file_itself_or_in_the_place_of_a_link_is_refused(
    tmp_path: Path, path: str
) -> None:
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


SLOW_CLOSE = [
    "strace", "-qq", "-o", "/dev/null", "-e", "trace=close",
    "-e", "inject=close:delay_enter=5000",
]


@pytest.mark.slow
@needs("strace")
def test_restore_follows_no_link_that_the_folders_owner_puts_in_its_way(
    tmp_path: Path, path: str
) -> None:
    """Let every close() take 5 ms: a link is there long before the new file is opened again."""
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
        [*SLOW_CLOSE, *ADMIN, "restore", "--db", str(tmp_path / "relay" / "relay.db"),
         str(tmp_path / "backup.db")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    stop.set()
    thread.join(10)
    if "ptrace" in finished.stderr:
        pytest.skip("no leave to trace")
    assert swapped.is_set()
    assert (tmp_path / "precious").read_text() == "precious"
    assert (finished.returncode, finished.stderr) == (
        1,
        f"connectoid-admin: {tmp_path / 'relay' / 'relay.db'}: Too many levels of symbolic links\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "link", "rename", "unlink"])
def test_restore_that_is_killed_anywhere_leaves_the_whole_old_file_or_the_whole_new_one(
    tmp_path: Path, call: str
) -> None:
    make_file(tmp_path / "new.db", len(SCHEMA))
    back_up(str(tmp_path / "new.db"), str(tmp_path / "backup.db"))
    found = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        SqliteStore(str(folder / "relay.db")).close()
        killed = killed_at(
            call,
            number,
            *ADMIN,
            "restore",
            "--db",
            str(folder / "relay.db"),
            str(tmp_path / "backup.db"),
        )
        found.append(restored_messages(folder / "relay.db"))
        shutil.rmtree(folder)
        if not killed:
            break
    # The old file has no message, the new one has four.
    assert found == sorted(found)
    assert found[-1] == 4


# ---------------------------------------------------------------------------------------
# Delete, stats.
# ---------------------------------------------------------------------------------------
