"""Look after a Connectoid relay: check it, back it up, restore, count, delete a mailbox.

Everything but `restore` works beside a running relay; `restore` refuses to. docs/operations.md
has the commands: `connectoid-admin check`, with `sudo` where the relay runs as another user. It
needs `connectoid_relay.py` beside it, in the version that it looks after, and nothing else. From
Python, call it in another process than the relay's: SQLite's locks belong to a process, and end
when the process closes one of its files.

    from connectoid_admin import back_up, delete, restore, stored_in

    back_up("connectoid.db", "/mnt/stick/")
    print(stored_in("connectoid.db"))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["cryptography>=47"]
# ///

from __future__ import annotations

__all__ = ["AdminError", "Finding", "back_up", "delete", "find_all", "main", "restore", "stored_in"]

import argparse
import contextlib
import ctypes
import datetime
import errno
import functools
import http.client
import io
import ipaddress
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import cryptography
from cryptography import x509

from connectoid_relay import (
    ADD_QUOTA_BYTES,
    DAY_US,
    LACKING,
    METRICS,
    NO_VARIABLES,
    QUOTA_BYTES,
    READ_RELAY,
    RELEASE_US,
    RESERVE_BYTES,
    SCHEMA,
    SECOND_US,
    STUN_COOKIE,
    YEAR_2200_US,
    DatabaseFile,
    Refusal,
    SettingError,
    StoreError,
    __version__,
    build_parser,
    checkpoint,
    counted_bytes,
    encode_base64url,
    parse_json,
    read_box,
    read_settings,
)

if not LACKING:
    import fcntl

# ---------------------------------------------------------------------------------------
# Limits and places.
# ---------------------------------------------------------------------------------------

# systemd/connectoid-relay.service takes the relay's flags from here.
ENVIRONMENT_FILE = "/etc/connectoid/relay.env"
# What begins a comment in it: systemd.exec(5).
COMMENTS = ("#", ";")
# For a relay to accept, and then to answer all of it: it takes milliseconds.
ANSWER_TIMEOUT_S = 5.0
# For a reply over UDP, and then once more: PROTOCOL.md, "UDP".
DATAGRAM_TIMEOUT_S = 1.0
# For the readers that are in the way of a checkpoint, and the pause between two attempts.
WAL_TIMEOUT_S = 5.0
WAL_RETRY_S = 0.02
# Of metrics or a document, which have a few KiB.
MAX_REPLY_BYTES = 1 << 20
# certbot and Caddy renew 30 days before the end: something is wrong if this is left.
RENEWAL_DAYS = 21
# Between two clocks, before it is worth a word.
SLACK_US = 60 * SECOND_US
# Steps of SQLite's machine, a millisecond, after which Python may take a signal.
STEPS_BETWEEN_SIGNALS = 10_000
# Below this much free disk the relay will soon refuse: four times the reserve.
FREE_BYTES = 64 << 20
# For the relay's few files.
FREE_INODES = 100
# adjtimex(2) says with this that the clock is not synchronized. Its struct has 208 bytes on
# 64-bit Linux and 128 on 32-bit.
TIME_ERROR = 5
TIMEX_BYTES = 512
# A connection in WAL mode holds these bytes for as long as it is open (sqlite.org, fileformat2
# and os_unix.c).
SHARED_LOCK_FIRST = 0x4000_0002
SHARED_LOCK_BYTES = 510
NETWORK_FILE_SYSTEMS = frozenset({
    "9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "nfs", "nfs4", "smb3"})

# What the row of the relay says, counted anew.
COUNT = """
    SELECT (SELECT count(*) FROM messages),
        (SELECT coalesce(sum(max(size, 512)), 0) FROM messages),
        (SELECT count(*) FROM boxes)"""
MAILBOXES = """
    SELECT count(*), coalesce(max(messages), 0)
    FROM (SELECT count(*) AS messages FROM messages GROUP BY box)"""
QUESTIONS = "SELECT count(*) FROM challenges WHERE expires_us > ?"
OLDEST_AFTER = "SELECT at FROM messages ORDER BY at LIMIT 1 OFFSET ?"
QUOTAS = "SELECT name, iif(day = ?, requests, 0), bytes FROM quotas ORDER BY name"
TIMES = "SELECT time_us, last_at FROM relay"
DELETE_MESSAGES = "DELETE FROM messages WHERE box = ? RETURNING size, quota"
DELETE_QUESTIONS = "DELETE FROM challenges WHERE box = ?"
DELETE_BOX = "DELETE FROM boxes WHERE box = ?"
SUBTRACT = "UPDATE relay SET messages = messages - ?, bytes = bytes - ?, boxes = boxes - ?"
# A backup without messages keeps the time, the proven mailboxes, and the requests of the day.
LEAVE_OUT = (
    "DELETE FROM messages",
    "DELETE FROM challenges",
    "UPDATE quotas SET bytes = 0",
    "UPDATE relay SET messages = 0, bytes = 0",
)


class AdminError(Exception):
    """Say in one line why it could not be done; nothing has changed."""


# ---------------------------------------------------------------------------------------
# The file beside a running relay, opened through the relay's own DatabaseFile. Whatever
# commits, makes a checkpoint, or may do so by opening or closing, happens under its lock
# (FileLock says why). Reads need none.
#
# Root may be the one who types, in a folder that belongs to the relay's user: no link is
# followed where a file of ours should stand, and what is made is given to that user.
# ---------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A relay's file, and a connection to it."""

    file: DatabaseFile
    db: sqlite3.Connection


@contextlib.contextmanager
def opened(path: str, oldest_version: int = len(SCHEMA)) -> Iterator[Opened]:
    """Open a relay's file as the relay does, whether one runs or not; raise AdminError."""
    refuse_link(path)
    file = find_file(path)
    with one_line_errors(file), lock_ready(file):
        with file.exclusive():
            db = file.connect()
        try:
            with file.exclusive():
                check_version(file, db, oldest_version)
            yield Opened(file, db)
        finally:
            # The last connection to be closed makes a checkpoint.
            with file.exclusive():
                db.close()


def refuse_link(path: str) -> None:
    """Raise AdminError for a link: the relay's lock is beside the file itself."""
    if os.path.islink(path):
        raise AdminError(f"{path} is a link; name the file itself with --db")


def find_file(path: str) -> DatabaseFile:
    """Return a file, not yet opened; raise AdminError for what is no file, or another program's."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        raise AdminError(f"{path}: Permission denied; use sudo, or be the relay's user") from None
    except OSError as error:
        reason = f"{path}: {error.strerror}; name the relay's file with --db"
        raise AdminError(reason) from None
    if not stat.S_ISREG(mode):
        raise AdminError(f"{path} is not a file; name the relay's with --db")
    file = DatabaseFile(path, connect=connect)
    with one_line_errors(file):
        file.look_before_opening()
    return file


def connect(*words: Any, **members: Any) -> sqlite3.Connection:
    """Open a file that others may have written to, as sqlite3.connect does.

    A signal ends a statement that runs: Python takes signals between two of its own steps only.
    """
    db: sqlite3.Connection = sqlite3.connect(*words, **members)
    db.execute("PRAGMA trusted_schema = OFF")
    db.set_progress_handler(_go_on, STEPS_BETWEEN_SIGNALS)
    return db


def _go_on() -> int:
    return 0


@contextlib.contextmanager
def lock_ready(file: DatabaseFile) -> Iterator[None]:
    """Open the lock of a file, so that `file.exclusive()` keeps the relay from committing."""
    try:
        give_away(file.lock.open(), file.path)
    except OSError as error:
        reason = f"{file.path}-lock: {error.strerror}; use sudo, or be the relay's user"
        raise AdminError(reason) from None
    try:
        yield
    finally:
        file.lock.close()


def give_away(descriptor: int, path: str) -> None:
    """Have an open file belong to the owner of the database: a relay must be able to open it.

    Where there is no database yet, its folder's owner gets the file.
    """
    if os.geteuid() == 0:
        place = path
        if not os.path.exists(path):
            place = os.path.dirname(os.path.abspath(path))
        owner = os.stat(place)
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def one_line_errors(file: DatabaseFile) -> Iterator[None]:
    """Raise what goes wrong with a file as an AdminError, and a signal as KeyboardInterrupt."""
    try:
        yield
    except (StoreError, sqlite3.Error) as error:
        raise explain(file, error) from error


def explain(file: DatabaseFile, error: StoreError | sqlite3.Error) -> AdminError:
    """Return an error of a file as one of ours; raise KeyboardInterrupt if a signal caused it."""
    told: Exception = error
    cause: BaseException | None = error
    if isinstance(error, StoreError):
        cause = error.__cause__
    if getattr(cause, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
        raise KeyboardInterrupt from None
    if isinstance(error, sqlite3.Error):
        told = file.explain(error)
    return AdminError(str(told))


def check_version(file: DatabaseFile, db: sqlite3.Connection, oldest: int = 1) -> int:
    """Return the version of the schema.

    Raises AdminError if it is not ours to touch, or not as a relay makes it.
    """
    version = file.check_owner(db)
    if not version:
        raise AdminError(f"{file.path} has nothing in it yet")
    if version < oldest:
        raise AdminError(f"{file.path} has schema {version}, and this program {len(SCHEMA)};"
                         " restart the relay, which brings it up to date")
    # A trigger would be run by this program, and by the relay.
    odd = sorted(read_schema(db) ^ schema_of(version))
    if odd:
        kind, name, _ = odd[0]
        raise AdminError(f"{file.path} is not as a relay makes it: see its {kind} {name}")
    times = db.execute(TIMES).fetchone()
    if not times or not all(0 <= at_us < YEAR_2200_US for at_us in times):
        raise AdminError(f"{file.path} is damaged: it has no relay time")
    return version


# What ANALYZE makes.
STATISTICS = (("table", "sqlite_stat1"), ("table", "sqlite_stat4"))


def read_schema(db: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """Return kind, name and text of all that is in a file, but for what ANALYZE made."""
    rows = db.execute("SELECT type, name, sql FROM sqlite_schema")
    return {
        (kind, name, sql) for kind, name, sql in rows
        if sql and (kind, name) not in STATISTICS}


@functools.cache
def schema_of(version: int) -> set[tuple[str, str, str]]:
    """Return the same of a file as the relay makes it."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for sql in itertools.chain(*SCHEMA[:version]):
            db.execute(sql)
        return read_schema(db)


def check_integrity(file: DatabaseFile, db: sqlite3.Connection) -> None:
    """Raise AdminError if SQLite finds the file damaged."""
    (first,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if first != "ok":
        raise AdminError(f"{file.path} is damaged: {' '.join(first.split())}")


def empty_wal(file: DatabaseFile, db: sqlite3.Connection) -> bool:
    """Have deletions gone from the WAL too; return False if readers were in the way too long."""
    give_up_s = time.monotonic() + WAL_TIMEOUT_S
    while True:
        with file.exclusive():
            if checkpoint(db):
                return True
        if time.monotonic() > give_up_s:
            return False
        time.sleep(WAL_RETRY_S)


def sync(path: str) -> None:
    """Have a file, or the names in a folder, on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Where a file cannot have two names: FAT and its like, as on memory sticks.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def name_too(path: str, name: str) -> None:
    """Give a file one more name, or where it can have but one, the new one.

    Raises AdminError if something has the name.
    """
    try:
        os.link(path, name)
    except FileExistsError:
        raise AdminError(f"{name} is there already; nothing is overwritten") from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(name):
            raise AdminError(f"{name} is there already; nothing is overwritten") from None
        os.rename(path, name)


def name_by_time(start: str, end: str = "") -> str:
    """Return a name with this second in it that nothing has.

    The second one of a second ends in -2, and so on.
    """
    stem = start + datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    name = stem + end
    number = 2
    while os.path.lexists(name):
        name = f"{stem}-{number}{end}"
        number += 1
    return name


# ---------------------------------------------------------------------------------------
# Backup and restore. Both make the new file under another name, whole and checked, before
# it gets its own. Whenever they are cut off, what was there before is still there.
# ---------------------------------------------------------------------------------------


def back_up(path: str, target: str, *, without_messages: bool = False) -> str:
    """Copy the file as it is at this moment, and return the copy's name; raise AdminError.

    A target that is a folder gets a file named after the time. The copy is a reader to the
    relay: nobody waits for it, the WAL alone grows meanwhile. Nothing is overwritten.
    """
    statements: Sequence[str] = ()
    if without_messages:
        statements = LEAVE_OUT
    if os.path.isdir(target):
        target = name_by_time(os.path.join(target, "connectoid-"), ".db")
    if os.path.lexists(target):
        raise AdminError(f"{target} is there already; nothing is overwritten")
    with _new_file(target) as new:
        with opened(path, 1) as (file, db):
            # It has no free pages and no WAL: what was deleted is not in it.
            db.execute("VACUUM INTO ?", (new,))
        _finish_copy(file, new, statements)
        name_too(new, target)
    return target


@contextlib.contextmanager
def _new_file(beside: str) -> Iterator[str]:
    """Return an empty file for its owner's eyes only, and remove it at the end.

    Raises AdminError for what goes wrong meanwhile.
    """
    folder = os.path.dirname(os.path.abspath(beside))
    new = os.path.join(folder, f".{os.path.basename(beside)}-{secrets.token_hex(8)}.new")
    try:
        with one_line_errors(DatabaseFile(beside)):
            try:
                # Not tempfile: between its return and here a signal would leave the file.
                os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                yield new
                sync(folder)
            finally:
                for rest in ("", "-journal", "-wal", "-shm"):
                    Path(new + rest).unlink(missing_ok=True)
    except OSError as error:
        raise AdminError(f"{beside or 'no name'}: {error.strerror}") from error


def _finish_copy(origin: DatabaseFile, new: str, statements: Sequence[str] = ()) -> None:
    """Bring a copy that nobody else knows into its last form, check it and sync it."""
    oldest_version = 1
    if statements:
        oldest_version = len(SCHEMA)
    with contextlib.closing(DatabaseFile(new, connect=connect).connect()) as db:
        check_version(origin, db, oldest_version)
        check_integrity(origin, db)
        # One file, which can be read from a read-only disk.
        db.execute("PRAGMA journal_mode = DELETE")
        for sql in statements:
            db.execute(sql)
        if statements:
            db.execute("VACUUM")
    sync(new)


def restore(backup: str, path: str) -> str | None:
    """Put a backup in the place of the relay's file; return where the old one is, if there was one.

    Refuses, with AdminError, beside a relay that runs. Refuses a backup that is damaged, of a
    newer relay, or not as a relay makes it. The relay brings an older schema up to date when it
    starts.
    """
    origin = find_file(backup)
    refuse_link(path)
    if os.path.exists(path) and os.path.samefile(backup, path):
        raise AdminError(f"{backup} is the relay's file itself")
    for rest in (backup + "-wal", backup + "-journal"):
        if os.path.exists(rest) and os.path.getsize(rest):
            raise AdminError(f"{backup} is a file in use, or was; make a backup of it")
    with _new_file(path) as new:
        _copy(backup, new, path)
        _finish_copy(origin, new)
        return _exchange(path, new)


def _copy(backup: str, new: str, path: str) -> None:
    """Copy the octets, and give the copy away."""
    # The owner of the folder may have put a link in the new file's place.
    descriptor = os.open(new, os.O_WRONLY | os.O_NOFOLLOW)
    with open(descriptor, "wb") as copy, open(backup, "rb") as source:
        shutil.copyfileobj(source, copy)
        give_away(descriptor, path)


def _exchange(path: str, new: str) -> str | None:
    """Put the new file in the place of the old one, and return where the old one is."""
    file = DatabaseFile(path, connect=connect)
    # A relay that starts now waits for the lock, and finds the new file.
    with lock_ready(file), file.exclusive():
        refuse_beside_a_relay(path)
        aside = _put_aside(path)
        os.replace(new, path)
    return aside


def refuse_beside_a_relay(path: str) -> None:
    """Raise AdminError if some process has the database open."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB, SHARED_LOCK_BYTES, SHARED_LOCK_FIRST)
        except (BlockingIOError, PermissionError):
            raise AdminError(f"{path} is in use; stop the relay first") from None


def _put_aside(path: str) -> str | None:
    """Give the old file another name, and leave no WAL that the new one would take for its own."""
    aside = None
    lost = f"{path}.lost"
    if os.path.exists(path) and os.path.getsize(path):
        aside = name_by_time(f"{path}.before-restore-")
        _fold_wal(path)
        name_too(path, aside)
    for rest in ("-wal", "-shm"):
        # A damaged file has them still, or one that is lost.
        if os.path.lexists(path + rest):
            os.replace(path + rest, f"{aside or lost}{rest}")
    return aside


def _fold_wal(path: str) -> None:
    """Move what is in the WAL into the file, if possible: then one rename exchanges it whole."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            checkpoint(db)
    except sqlite3.DatabaseError as error:
        code = error.sqlite_errorcode & 0xFF
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise


# ---------------------------------------------------------------------------------------
# What is in the file: a mailbox deleted, everything counted.
# ---------------------------------------------------------------------------------------


class Deleted(NamedTuple):
    """What there was of a mailbox: `places` is 1 if its owner was proven.

    `gone` says whether it is out of the WAL as well.
    """

    messages: int
    questions: int
    places: int
    gone: bool


def delete(path: str, box: bytes) -> Deleted:
    """Delete all that is kept of a mailbox, for good, beside a running relay; raise AdminError.

    Others can write to it again at once; `--deny` prevents that.
    """
    with opened(path) as (file, db):
        with file.exclusive():
            db.execute("BEGIN IMMEDIATE")
            try:
                messages, questions, places = _delete_rows(db, box)
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
        return Deleted(messages, questions, places, empty_wal(file, db))


def _delete_rows(db: sqlite3.Connection, box: bytes) -> tuple[int, int, int]:
    messages = db.execute(DELETE_MESSAGES, (box,)).fetchall()
    octets = 0
    for size, quota in messages:
        octets += counted_bytes(size)
        if quota and db.execute(QUOTA_BYTES, (quota,)).fetchone():
            db.execute(ADD_QUOTA_BYTES, (quota, -size))
    questions = db.execute(DELETE_QUESTIONS, (box,)).rowcount
    places = db.execute(DELETE_BOX, (box,)).rowcount
    db.execute(SUBTRACT, (len(messages), octets, places))
    return len(messages), questions, places


def stored_in(path: str, now_us: int | None = None) -> dict[str, Any]:
    """Return what is in the file, in numbers; raise AdminError.

    It tells no mailboxes, no keys and no addresses.
    """
    if now_us is None:
        now_us = read_clock_us()
    with opened(path) as (_, db):
        # All of it at one moment.
        db.execute("BEGIN")
        numbers = _count(db, now_us)
        db.execute("ROLLBACK")
    return {"path": path, **_sizes(path), **numbers}


def _count(db: sqlite3.Connection, now_us: int) -> dict[str, Any]:
    time_us, _, octets, places, messages = db.execute(READ_RELAY).fetchone()
    now_us = max(time_us, now_us)
    mailboxes, fullest = db.execute(MAILBOXES).fetchone()
    (questions,) = db.execute(QUESTIONS, (now_us,)).fetchone()
    quotas = [
        {"name": name, "requests_today": requests, "bytes": kept}
        for name, requests, kept in db.execute(QUOTAS, (now_us // DAY_US,))]
    return {
        "schema": len(SCHEMA),
        "messages": messages,
        "message_bytes": octets,
        "mailboxes_with_messages": mailboxes,
        "messages_in_the_fullest_mailbox": fullest,
        "proven_mailboxes": places,
        "open_questions": questions,
        "oldest_message_age_s": _age_s(db, 0, now_us),
        "median_message_age_s": _age_s(db, messages // 2, now_us),
        "newest_message_age_s": _age_s(db, max(0, messages - 1), now_us),
        "quotas": quotas,
    }


def _age_s(db: sqlite3.Connection, skipped: int, now_us: int) -> int | None:
    """Return how old the message is that comes after so many older ones, None if there is none."""
    row = db.execute(OLDEST_AFTER, (skipped,)).fetchone()
    if not row:
        return None
    (at_us,) = row
    return int(max(0, now_us - at_us) // SECOND_US)


def _sizes(path: str) -> dict[str, int]:
    return {
        "file_bytes": _bytes_of(path),
        "wal_bytes": _bytes_of(path + "-wal"),
        "reserve_bytes": _bytes_of(path + "-reserve"),
    }


def _bytes_of(path: str) -> int:
    if not os.path.exists(path):
        return 0
    return os.path.getsize(path)


def read_clock_us() -> int:
    """Return the time of this machine's clock."""
    return time.time_ns() // 1000


# ---------------------------------------------------------------------------------------
# The relay that runs, asked as anybody would ask it.
# ---------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What came back, and over TLS whose certificate (DER) was shown."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    certificate: bytes = b""


# What a browser would send along from a web page.
HEADERS = {"Accept": "application/json", "Origin": "https://app.example.com"}


def ask(url: str, path: str, *, verified: bool = True,
        timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
    """Get a page of a relay; raise AdminError.

    It need not be verified if it is ours, on this machine.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        with contextlib.closing(_connect(parts, verified, timeout_s)) as connection:
            connection.connect()
            with _within(timeout_s, connection.sock):
                connection.request("GET", parts.path.rstrip("/") + path, headers=HEADERS)
                return _take_answer(connection)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # A ValueError is of names that cannot be.
        raise AdminError(f"{url} does not answer: {_reason_of(error)}") from None


def _take_answer(connection: http.client.HTTPConnection) -> Answer:
    certificate = None
    if isinstance(connection.sock, ssl.SSLSocket):
        certificate = connection.sock.getpeercert(binary_form=True)
    reply = connection.getresponse()
    headers = {name.lower(): text for name, text in reply.getheaders()}
    return Answer(reply.status, headers, reply.read(MAX_REPLY_BYTES), certificate or b"")


def _reason_of(error: Exception) -> str:
    for name in ("verify_message", "strerror"):
        reason = getattr(error, name, "")
        if reason:
            return str(reason)
    return str(error) or repr(error)


@contextlib.contextmanager
def _within(timeout_s: float, over: socket.socket) -> Iterator[None]:
    """End a connection after a time, however often a little comes; raise TimeoutError then."""
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            # Below TLS, whose state belongs to the other thread.
            socket.socket.shutdown(over, socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            raise TimeoutError("timed out")


def _connect(parts: urllib.parse.SplitResult, verified: bool, timeout_s: float
             ) -> http.client.HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    context = ssl.create_default_context()
    if not verified:
        # Its certificate is for another name than this machine's.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)


_METRIC = re.compile(r'(?m)^(\w+)(?:\{\w+="([^"\n]*)"\})? ([0-9]{1,18}(?:\.[0-9]+)?)$')
UPTIME = ("connectoid_uptime_seconds", "")


def parse_metrics(text: str) -> dict[tuple[str, str], float]:
    """Return the numbers of /metrics by name and value of the label."""
    return {
        (name, label): float(number)
        for name, label, number in _METRIC.findall(text) if name in METRICS}


def read_metrics(url: str, *, verified: bool = True) -> dict[tuple[str, str], float]:
    """Return what a relay counts; raise AdminError."""
    answer = ask(url, "/metrics", verified=verified)
    metrics = parse_metrics(answer.body.decode("utf-8", "replace"))
    if answer.status != http.HTTPStatus.OK or UPTIME not in metrics:
        raise AdminError(f"{url} has no metrics (status {answer.status})")
    return metrics


# What a relay shows of itself as it is now.
GAUGES = ("healthy", "uptime_seconds", "sweep_age_seconds", "connections", "waiting_boxes",
          "queued_requests")


def told_by(url: str, over_s: float = 0, *, verified: bool = True,
            sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Return what a relay counts since its start, with rates a minute.

    The rates are since the start, and with `over_s` within the next seconds as well.
    """
    before = read_metrics(url, verified=verified)
    now = before
    if over_s:
        sleep(over_s)
        now = read_metrics(url, verified=verified)
    told: dict[str, Any] = {"url": url, "version": _version_in(now)}
    for name in GAUGES:
        told[name] = int(now.get((f"connectoid_{name}", ""), 0))
    for name, metric in METRICS.items():
        if metric.type == "counter":
            short_name = name.removesuffix("_total").removeprefix("connectoid_")
            told[short_name] = _rates(name, before, now, over_s)
    return told


def _version_in(metrics: Mapping[tuple[str, str], float]) -> str:
    for name, label in metrics:
        if name == "connectoid_info":
            return label
    return ""


def _rates(metric: str, before: Mapping[tuple[str, str], float],
           now: Mapping[tuple[str, str], float], over_s: float) -> dict[str, dict[str, float]]:
    """Return total and rates of a counter by the value of its label."""
    uptime_s = max(1, now[UPTIME])
    rates: dict[str, dict[str, float]] = {}
    for (name, label), number in now.items():
        if name != metric:
            continue
        rate = {"total": int(number), "per_minute": round(60 * number / uptime_s, 2)}
        if over_s:
            grown = number - before.get((name, label), 0)
            rate["per_minute_now"] = round(60 * grown / over_s, 2)
        rates[label or "all"] = rate
    return rates


def ask_datagram(host: str, port: int, datagram: bytes) -> bytes:
    """Return the reply to a datagram, asked twice; empty if none comes."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as udp:
        udp.settimeout(DATAGRAM_TIMEOUT_S)
        for _ in range(2):
            with contextlib.suppress(OSError):
                udp.connect(address)
                udp.send(datagram)
                return udp.recv(2048)
    return b""


# ---------------------------------------------------------------------------------------
# Check: each looks at one thing and yields findings. FAIL is what keeps people from using
# the relay, or will tomorrow; WARN what a host should know.
# ---------------------------------------------------------------------------------------

GOOD = "OK"
ODD = "WARN"
BAD = "FAIL"
# These let in whoever is on the machine, and nobody else.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Finding(NamedTuple):
    """What was found of a thing."""

    level: str
    what: str
    text: str


@dataclass
class Subject:
    """What is looked at: the relay's flags as they will be, its file, and its address.

    `url` is the address that others use, `origin` where the flags came from, `mistake` what is
    wrong in them.
    """

    path: str
    flags: argparse.Namespace
    url: str = ""
    origin: str = ""
    mistake: str = ""
    now_us: Callable[[], int] = read_clock_us

    @property
    def local_url(self) -> str:
        """Return where the relay is on this machine."""
        scheme = "http"
        if self.flags.tls_cert:
            scheme = "https"
        return f"{scheme}://{_local_host(self.flags.host)}:{self.flags.port}/"


def _local_host(host: str) -> str:
    """Return by which name this machine reaches a relay that listens at a host."""
    if not host:
        return "localhost"
    if host == str(ipaddress.IPv4Address(0)):
        return "127.0.0.1"
    if host == str(ipaddress.IPv6Address(0)):
        return "[::1]"
    if ":" in host:
        return f"[{host}]"
    return host


def check_configuration(subject: Subject) -> Iterator[Finding]:
    """Look at the flags and the files that they name."""
    flags = subject.flags
    if subject.mistake:
        yield Finding(BAD, "flags", subject.mistake)
        return
    yield Finding(GOOD, "flags", f"understood, from {subject.origin}")
    if bool(flags.tls_cert) != bool(flags.tls_key):
        yield Finding(BAD, "flags", "--tls-cert and --tls-key go together")
        return
    if bool(flags.turn) != bool(flags.turn_secret):
        yield Finding(BAD, "flags", "--turn and --turn-secret go together")
        return
    # A SettingError is a finding.
    read_settings(flags)
    if flags.deny:
        yield Finding(GOOD, "flags", f"{flags.deny} can be read")
    for path in (flags.keys, flags.turn_secret, flags.tls_key):
        if path:
            yield _check_secret(path)
    yield from _check_exposure(flags)


def _check_secret(path: str) -> Finding:
    if os.stat(path).st_mode & stat.S_IROTH:
        return Finding(ODD, "flags", f"{path} can be read by everybody; chmod 0640 it")
    return Finding(GOOD, "flags", f"{path} can be read")


def _check_exposure(flags: argparse.Namespace) -> Iterator[Finding]:
    inside = flags.host in LOOPBACK
    if inside and not flags.trusted_proxy:
        yield Finding(ODD, "flags", "behind a proxy all clients share the limits of one:"
                                    " --trusted-proxy 127.0.0.0/8")
    if not inside and not flags.tls_cert and not flags.trusted_proxy:
        yield Finding(ODD, "flags", "plain HTTP: web pages that came over HTTPS may not use it")
    if not flags.rate:
        yield Finding(ODD, "flags", "--rate 0: nothing holds back clients that ask too often")
    if not flags.contact:
        yield Finding(ODD, "flags", "no --contact: nobody knows whom to tell what is wrong")


def check_file(subject: Subject) -> Iterator[Finding]:
    """Look at the database: rights, version, integrity, sums."""
    path = subject.path
    if path == ":memory:":
        yield Finding(ODD, "file", "in memory: a restart forgets everything, and nothing can be"
                                   " looked at")
        return
    with opened(path, 1) as (file, db):
        version = check_version(file, db)
        yield Finding(GOOD, "file", f"{path}, schema {version} of {len(SCHEMA)}")
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077:
            yield Finding(ODD, "file", f"others may open it (mode {mode:04o}); chmod 0600 it")
        db.execute("BEGIN")
        check_integrity(file, db)
        yield Finding(GOOD, "file", "integrity_check ok")
        # The relay may have brought it up to date meanwhile.
        if check_version(file, db) == len(SCHEMA):
            yield _compare_sums(db)
        db.execute("ROLLBACK")


def _compare_sums(db: sqlite3.Connection) -> Finding:
    _, _, octets, places, messages = db.execute(READ_RELAY).fetchone()
    kept = (messages, octets, places)
    counted = db.execute(COUNT).fetchone()
    if kept == counted:
        text = f"{messages} messages, {octets} bytes, {places} proven mailboxes"
        return Finding(GOOD, "file", text)
    text = f"messages, bytes and mailboxes are {counted}, but it says {kept}"
    return Finding(ODD, "file", text)


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Look at the room that is left, and whether the disk is one for a database."""
    path = subject.path
    if path == ":memory:":
        return
    disk = os.statvfs(os.path.dirname(os.path.abspath(path)))
    taken = sum(_sizes(path).values())
    # Rows and indexes take about as much again as small messages do.
    wanted = max(0, 2 * subject.flags.max_bytes + RESERVE_BYTES - taken)
    yield _compare_room(disk.f_bavail * disk.f_frsize, wanted)
    if disk.f_files and disk.f_favail < FREE_INODES:
        yield Finding(BAD, "disk", f"{disk.f_favail} inodes free")
    if _is_readable(path) and not os.path.exists(path + "-reserve"):
        yield Finding(ODD, "disk", "the reserve is in use: the disk was full, and messages are"
                                   " refused")
    kind = file_system_of(os.path.realpath(path))
    if kind in NETWORK_FILE_SYSTEMS:
        yield Finding(BAD, "disk", f"{kind}: SQLite's locks do not hold there; choose a local disk")
    elif kind in ("tmpfs", "ramfs"):
        yield Finding(ODD, "disk", f"{kind}: a restart of the machine forgets everything")


def _is_readable(path: str) -> bool:
    """Return whether there is a database of a relay."""
    if path == ":memory:":
        return False
    try:
        with opened(path, 1) as (_, db):
            db.execute(TIMES).fetchone()
    except (AdminError, OSError, sqlite3.Error):
        return False
    return True


def _compare_room(free: int, wanted: int) -> Finding:
    level = GOOD
    text = f"{_size(free)} free"
    if free < wanted:
        level = ODD
    if free < FREE_BYTES:
        level = BAD
    if level != GOOD:
        text += f", a full relay (--max-bytes) would take {_size(wanted)} more"
    return Finding(level, "disk", text)


def file_system_of(path: str) -> str:
    """Return the kind of file system that a path is on, or nothing where that is not told."""
    best = ""
    kind = ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            place = before.split()[4]
            if os.path.commonpath((place, path)) == place and len(place) >= len(best):
                best = place
                kind = after.split()[0]
    return kind


def check_clock(subject: Subject) -> Iterator[Finding]:
    """Look at the machine's clock, and at the relay's time, which never runs backwards."""
    now_us = subject.now_us()
    if not RELEASE_US <= now_us < YEAR_2200_US:
        yield Finding(BAD, "clock", f"shows {_date(now_us)}, which the relay does not believe")
    elif clock_is_synchronized() is False:
        yield Finding(ODD, "clock", "not synchronized: timedatectl set-ntp true")
    else:
        yield Finding(GOOD, "clock", _date(now_us))
    if not _is_readable(subject.path):
        # That is what the look at the file has found.
        return
    with opened(subject.path, 1) as (_, db):
        time_us, _ = db.execute(TIMES).fetchone()
    if time_us > now_us + SLACK_US:
        yield Finding(ODD, "clock", f"the relay's time is {_date(time_us)}, ahead of the clock,"
                                    " and stays so until that is reached; nothing is lost")


def clock_is_synchronized() -> bool | None:
    """Return whether the kernel thinks so (adjtimex(2)); None where it does not tell."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    return bool(state != TIME_ERROR)


def check_certificate(subject: Subject) -> Iterator[Finding]:
    """Look at the certificate that the flags name."""
    if not subject.flags.tls_cert:
        return
    leaf = _read_certificate(subject.flags.tls_cert)
    yield _check_dates(leaf, subject.now_us())
    host = urllib.parse.urlsplit(subject.url).hostname
    if not host:
        return
    names = _names_in(leaf)
    _, _, domain = host.partition(".")
    if host not in names and f"*.{domain}" not in names:
        yield Finding(BAD, "certificate", f"is for {', '.join(names) or 'no name'}, not for {host}")


def _read_certificate(path: str) -> x509.Certificate:
    leaf, *_ = x509.load_pem_x509_certificates(Path(path).read_bytes())
    return leaf


def _check_dates(leaf: x509.Certificate, now_us: int) -> Finding:
    now = datetime.datetime.fromtimestamp(now_us / SECOND_US, datetime.UTC)
    days = (leaf.not_valid_after_utc - now).days
    if now < leaf.not_valid_before_utc:
        return Finding(BAD, "certificate", f"not valid before {leaf.not_valid_before_utc:%Y-%m-%d}")
    if now >= leaf.not_valid_after_utc:
        return Finding(BAD, "certificate", f"expired on {leaf.not_valid_after_utc:%Y-%m-%d}")
    if days < RENEWAL_DAYS:
        text = f"good for {days} days; it should have been renewed by now"
        return Finding(ODD, "certificate", text)
    return Finding(GOOD, "certificate", f"good for {days} days")


def _names_in(certificate: x509.Certificate) -> list[str]:
    extensions = certificate.extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def check_relay(subject: Subject) -> Iterator[Finding]:
    """Ask the relay on this machine: health, version, certificate, UDP."""
    if subject.mistake:
        # What answers where the default flags lead may be somebody else's.
        yield Finding(ODD, "relay", "not looked at: the flags are not understood")
        return
    if subject.path != ":memory:" and not os.path.exists(subject.path):
        yield Finding(ODD, "relay", f"not looked at: {subject.path} is missing")
        return
    url = subject.local_url
    flags = subject.flags
    health = ask(url, "/health", verified=False)
    if health.status != http.HTTPStatus.OK:
        yield Finding(BAD, "relay", _illness(url, health))
    document = _document(ask(url, "/", verified=False))
    if document.get("software") != "connectoid_relay":
        yield Finding(BAD, "relay", f"{url} is another program")
        return
    yield _compare_version(url, document.get("version"))
    if flags.tls_cert and health.certificate:
        shown = x509.load_der_x509_certificate(health.certificate)
        if shown != _read_certificate(flags.tls_cert):
            text = f"shows another certificate than {flags.tls_cert}; reload it"
            yield Finding(ODD, "relay", text)
    yield from _check_datagrams("relay", url, flags)


def _illness(url: str, health: Answer) -> str:
    """Return what a relay that is not well says of it."""
    return f"{url} is not well: {_document(health).get('detail', 'no reason given')}"


def _compare_version(url: str, version: object) -> Finding:
    if version == __version__:
        return Finding(GOOD, "relay", f"{url} runs {version}")
    text = f"{url} runs {version}, but {__version__} is installed; restart it"
    return Finding(ODD, "relay", text)


def _check_datagrams(what: str, url: str, flags: argparse.Namespace) -> Iterator[Finding]:
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    if flags.udp:
        yield _heard(what, "a check over UDP", _answers_a_check(host, port))
    if flags.stun:
        yield _heard(what, "STUN", _answers_stun(host, port))


DEFAULT_PORTS: Mapping[str, int] = {"http": 80, "https": 443}


def _answers_a_check(host: str, port: int) -> bool:
    token = secrets.token_hex(8)
    pub = encode_base64url(b"\2" + secrets.token_bytes(48))
    check = {"action": "check", "pub": pub, "at": 0, "id": token}
    return token.encode() in ask_datagram(host, port, json.dumps(check).encode())


def _answers_stun(host: str, port: int) -> bool:
    """Send a binding request (RFC 8489, section 5): type, length, cookie, transaction."""
    transaction = secrets.token_bytes(12)
    binding = struct.pack("!HHI", 1, 0, STUN_COOKIE) + transaction
    return ask_datagram(host, port, binding)[8:20] == transaction


def _heard(what: str, kind: str, answered: bool) -> Finding:
    if answered:
        return Finding(GOOD, what, f"{kind} is answered")
    return Finding(BAD, what, f"{kind} is not answered")


def check_reachability(subject: Subject) -> Iterator[Finding]:
    """Ask the relay by the address that others use, as a browser would."""
    url = subject.url
    if not url:
        text = "not looked at; name the address that others use with --url"
        yield Finding(ODD, "reach", text)
        return
    answer = ask(url, "/")
    if _document(answer).get("software") != "connectoid_relay":
        yield Finding(BAD, "reach", f"{url} is not a relay (status {answer.status})")
        return
    yield Finding(GOOD, "reach", f"{url} answers")
    if answer.headers.get("access-control-allow-origin") != "*":
        text = "a proxy takes away Access-Control-Allow-Origin: web pages cannot use it"
        yield Finding(BAD, "reach", text)
    yield from _check_datagrams("reach", url, subject.flags)


def check_programs(_subject: Subject) -> Iterator[Finding]:
    """Say what it all runs on."""
    major, minor, micro, *_ = sys.version_info
    yield Finding(GOOD, "programs", (
        f"connectoid {__version__}, Python {major}.{minor}.{micro},"
        f" SQLite {sqlite3.sqlite_version}, cryptography {cryptography.__version__}"))


def _document(answer: Answer) -> dict[str, Any]:
    try:
        document = parse_json(answer.body)
    except Refusal:
        return {}
    if isinstance(document, dict):
        return document
    return {}


CHECKS: Mapping[str, Callable[[Subject], Iterator[Finding]]] = {
    "programs": check_programs,
    "flags": check_configuration,
    "file": check_file,
    "disk": check_disk,
    "clock": check_clock,
    "certificate": check_certificate,
    "relay": check_relay,
    "reach": check_reachability,
}


def find_all(subject: Subject) -> Iterator[Finding]:
    """Yield what every check finds.

    A check that cannot go on says why, and does not keep the others from looking.
    """
    for what, look in CHECKS.items():
        try:
            yield from look(subject)
        except (AdminError, SettingError) as error:
            yield Finding(BAD, what, str(error))
        except (OSError, ValueError, sqlite3.Error) as error:
            yield Finding(BAD, what, f"cannot be looked at: {error}")


# ---------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------


def read_environment(path: str) -> dict[str, str]:
    """Return the variables that a file sets, as systemd reads it (systemd.exec(5)).

    Raises AdminError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except PermissionError:
        raise AdminError(f"{path}: Permission denied; use sudo") from None
    except OSError as error:
        raise AdminError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AdminError(f"{path}: not UTF-8") from None
    found = {}
    for line in text.replace("\\\n", "").splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(COMMENTS):
            found[name] = _unquoted(value)
    return found


def _unquoted(value: str) -> str:
    if value[:1] in ("'", '"') and value[-1:] == value[:1]:
        return value[1:-1]
    return value


def _split(text: str, origin: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise AdminError(f"{origin}: {error}") from None


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError:
        # It is kept from us, and there is a reason for that.
        return True
    return True


class Words(NamedTuple):
    """The relay's flags as they are written, and where; and what it finds in the environment."""

    words: Sequence[str]
    origin: str
    environ: Mapping[str, str]


def find_words(arguments: argparse.Namespace) -> Words:
    """Return the relay's flags by the command line, the environment file, or the environment.

    Raises AdminError.
    """
    if arguments.flags is not None:
        return Words(_split(arguments.flags, "--flags"), "--flags", os.environ)
    if arguments.env or _is_there(ENVIRONMENT_FILE):
        path = arguments.env or ENVIRONMENT_FILE
        environ = read_environment(path)
        return Words(_split(environ.get("FLAGS", ""), path), path, environ)
    return Words((), "the environment and the defaults", os.environ)


def parse_flags(found: Words) -> argparse.Namespace:
    """Return the flags as the relay parses them; raise AdminError."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            return build_parser("connectoid-relay", found.environ).parse_args(found.words)
    except SystemExit:
        text = errors.getvalue().strip().removeprefix("connectoid-relay: error: ")
        raise AdminError(f"{found.origin}: {text}") from None


def find_subject(arguments: argparse.Namespace) -> Subject:
    """Return what the command line is about; a mistake in the relay's flags stands in it."""
    found = Words((), "the defaults", NO_VARIABLES)
    flags = parse_flags(found)
    mistake = ""
    try:
        found = find_words(arguments)
        flags = parse_flags(found)
    except AdminError as error:
        mistake = str(error)
    # Without --db it would be about another file.
    if mistake and arguments.run is not _check and not arguments.db:
        raise AdminError(mistake)
    url = getattr(arguments, "url", None) or ""
    return Subject(arguments.db or flags.db, flags, url, found.origin, mistake)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, with what is no text in it made harmless: a relay may be somebody else's."""
    harmless = "".join(letter if letter.isprintable() else "?" for letter in text)
    print(harmless, file=file or sys.stdout, flush=True)


def _check(arguments: argparse.Namespace) -> int:
    code = 0
    for level, what, text in find_all(find_subject(arguments)):
        if level != GOOD or not arguments.quiet:
            say(f"{level:<5} {what}: {text}")
        if level == BAD:
            code = 1
    return code


def _tell_health(arguments: argparse.Namespace) -> int:
    url = find_subject(arguments).local_url
    health = ask(url, "/health", verified=False)
    if health.status != http.HTTPStatus.OK:
        raise AdminError(_illness(url, health))
    if not arguments.quiet:
        say(f"{url} is well")
    return 0


def _back_up(arguments: argparse.Namespace) -> int:
    path = find_subject(arguments).path
    target = back_up(path, arguments.target, without_messages=arguments.without_messages)
    if not arguments.quiet:
        say(f"{path} is backed up as {target}, {_size(os.path.getsize(target))}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    path = find_subject(arguments).path
    aside = restore(arguments.backup, path)
    text = f"{path} is what was backed up as {arguments.backup}"
    if aside:
        text += f"; what it was is in {aside}, to be deleted when it is not needed"
    say(text)
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    messages, questions, places, gone = delete(find_subject(arguments).path, arguments.box)
    text = (f"deleted: {messages} messages, {questions} questions,"
            f" {places} places of proven mailboxes")
    if not gone:
        text += "; a reader keeps a copy in the -wal, which the relay empties with the next sweep"
    say(text)
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    subject = find_subject(arguments)
    stats: dict[str, Any] = {"file": stored_in(subject.path), "relay": None}
    url = subject.url or subject.local_url
    try:
        stats["relay"] = told_by(url, arguments.over, verified=bool(subject.url))
    except AdminError as error:
        # The file alone is worth a look.
        say(f"connectoid-admin: {error}; what the file says:", sys.stderr)
    if arguments.json:
        print(json.dumps(stats, indent=2))
        return 0
    for line in render_table(stats):
        say(line)
    if arguments.over and stats["relay"] and not _has_requests(stats["relay"]):
        say("no requests")
    return 0


def _has_requests(told: Mapping[str, Any]) -> bool:
    """Return whether a relay has counted anything since its start."""
    return any(
        rate["total"]
        for counts in told.values() if isinstance(counts, dict)
        for rate in counts.values())


# Where the words of the file or of the metrics are not those of people.
LABELS = {
    "file file bytes": "database bytes",
    "relay waiting boxes": "waiting mailboxes",
}


def render_table(stats: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the lines of a table of nested numbers, without the counts that are zero."""
    for name, value in stats.items():
        label = f"{prefix} {name}".strip().replace("_", " ")
        label = LABELS.get(label, label)
        if isinstance(value, dict) and "total" in value:
            if value["total"]:
                yield f"{label:<40} {value['total']} ({_rates_in_words(value)})"
        elif isinstance(value, dict):
            yield from render_table(value, label)
        elif isinstance(value, list):
            for entry in value:
                numbers = {key: entry[key] for key in entry if key != "name"}
                yield from render_table(numbers, f"{label} {entry['name']}")
        elif value is None:
            yield f"{label:<40} -"
        else:
            yield f"{label:<40} {value}"


def _rates_in_words(rate: Mapping[str, float]) -> str:
    words = f"{rate['per_minute']:g} a minute"
    if "per_minute_now" in rate:
        words += f", now {rate['per_minute_now']:g}"
    return words


KIB = 1024


def _size(octets: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if octets < KIB:
            return f"{octets:.0f} {unit}"
        octets /= KIB
    return f"{octets:.1f} GiB"


def _date(at_us: int) -> str:
    second = at_us // SECOND_US
    if not 0 <= at_us < YEAR_2200_US:
        return f"second {second}"
    return f"{datetime.datetime.fromtimestamp(second, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _mailbox(text: str) -> bytes:
    try:
        return read_box({"pub": text})
    except Refusal:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a mailbox: its pub has 66 characters") from None


_WEB_ADDRESS = re.compile(r"https?://[^\s/@?#]+(/[^\s?#]*)?")


def _address(text: str) -> str:
    # A ValueError is of a port that is none, or half a bracket.
    with contextlib.suppress(ValueError):
        has_port = urllib.parse.urlsplit(text).port != 0
        if has_port and text.isascii() and _WEB_ADDRESS.fullmatch(text):
            return text
    raise argparse.ArgumentTypeError("is not a web address; write https://...")


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists what there is)\n")


def build_admin_parser(prog: str = "connectoid-admin") -> argparse.ArgumentParser:
    """Return the parser of the command line: docs/operations.md."""
    parser = _Parser(
        prog=prog, description="Look after a Connectoid relay, beside it while it runs.",
        epilog="COMMAND --help says more. Exit codes: 0 done, 1 failed or something is wrong,"
               " 2 usage, 130 stopped.")
    parser.add_argument("--version", action="version", version=f"connectoid admin {__version__}")
    commands = _Commands(parser)
    _add_check(commands)
    _add_health(commands)
    _add_backup(commands)
    _add_restore(commands)
    _add_stats(commands)
    _add_delete(commands)
    return parser


class _Commands:
    """The commands of a parser, which have some flags in common."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(metavar="COMMAND", required=True)
        self._common = _Parser(add_help=False)
        self._common.add_argument(
            "--db", metavar="FILE", help="the relay's database (default: as its flags say, else"
                                         " connectoid.db, in $STATE_DIRECTORY if set)")
        self._common.add_argument(
            "--env", metavar="FILE", help="a file with the relay's flags in FLAGS=, or with its"
                                          " variables (default:"
                                          f" {ENVIRONMENT_FILE}, if it is there)")
        self._common.add_argument(
            "--flags", metavar="TEXT", help="the relay's flags themselves, in one argument")

    def add(self, name: str, run: Callable[[argparse.Namespace], int], meaning: str
            ) -> argparse.ArgumentParser:
        """Return the parser of a new command."""
        description = f"{meaning[:1].upper()}{meaning[1:]}."
        added: argparse.ArgumentParser = self._commands.add_parser(
            name, parents=[self._common], help=meaning, description=description,
            allow_abbrev=False)
        added.set_defaults(run=run)
        return added


def _add_check(commands: _Commands) -> None:
    command = commands.add(
        "check", _check,
        "check whether all is well, in lines of OK, WARN or FAIL; exit code 1 if something failed")
    command.add_argument(
        "--url", type=_address, help="the address that others use, to check that as well")
    command.add_argument("-q", "--quiet", action="store_true", help="print only what is not OK")


def _add_health(commands: _Commands) -> None:
    command = commands.add(
        "health", _tell_health, "ask the running relay whether it is well; for container engines")
    command.add_argument("-q", "--quiet", action="store_true", help="say nothing if it is")


def _add_backup(commands: _Commands) -> None:
    command = commands.add(
        "backup", _back_up, "copy the file, as it is at this moment, while the relay runs")
    command.add_argument(
        "target", metavar="FILE", help="where the copy goes: a new file, or a folder")
    command.add_argument(
        "--without-messages", action="store_true",
        help="leave messages out, which expire after an hour anyway")
    command.add_argument(
        "-q", "--quiet", action="store_true", help="print only what went wrong")


def _add_restore(commands: _Commands) -> None:
    command = commands.add(
        "restore", _restore, "put a backup in the place of the file, while no relay runs")
    command.add_argument(
        "backup", metavar="FILE", help="the backup; the old file is kept beside the new one")


def _add_stats(commands: _Commands) -> None:
    command = commands.add(
        "stats", _stats, "count what is stored, and what the running relay has done")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--url", type=_address, help="where the relay is (default: on this machine, by its flags)")
    command.add_argument(
        "--over", metavar="N", type=_seconds, default=0,
        help="also measure the rates over the next N seconds")


def _add_delete(commands: _Commands) -> None:
    command = commands.add("delete", _delete, "delete all that is kept of a mailbox, for good")
    command.add_argument(
        "box", metavar="PUB", type=_mailbox, help="the mailbox, as requests name it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is done, 1 failed, 130 stopped by a signal; wrong usage exits with 2.
    """
    if LACKING:
        say(f"connectoid-admin: {LACKING}", sys.stderr)
        return 1
    # These stop it as Ctrl-C does: half a copy is not left behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        try:
            arguments = build_admin_parser(os.path.basename(sys.argv[0])).parse_args(argv)
            return int(arguments.run(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # `head` has read enough; the interpreter would try once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except AdminError as error:
        say(f"connectoid-admin: {error}", sys.stderr)
        return 1
    except UnicodeEncodeError:
        say("connectoid-admin: names of files must be UTF-8", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("connectoid-admin: stopped", sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
