"""Look after a Connectoid relay: check it, back it up, restore, count, delete a mailbox.

All of it works beside the running relay, but `restore`, which refuses to. README.md, "Day two", has the commands:
`connectoid-admin check`, with `sudo` where the relay runs as another user. It needs `connectoid_relay.py` beside it,
of the version that is looked after, and nothing else. From Python, in another process than the relay's (SQLite's locks
belong to processes, and end when one of its files is closed):

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
import fcntl
import functools
import http.client
import io
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import cryptography
from cryptography import x509

from connectoid_relay import (
    ADD_QUOTA_BYTES,
    APPLICATION_ID,
    BUSY_TIMEOUT_S,
    DAY_US,
    LOCK_RETRY_S,
    LOCK_TIMEOUT_S,
    METRICS,
    QUOTA_BYTES,
    READ_RELAY,
    RELEASE_US,
    RESERVE_BYTES,
    SCHEMA,
    SECOND_US,
    STUN_COOKIE,
    YEAR_2200_US,
    Refusal,
    SettingError,
    __version__,
    build_parser,
    counted_bytes,
    encode_base64url,
    read_box,
    read_settings,
)

# ---------------------------------------------------------------------------------------
# Limits and places.
# ---------------------------------------------------------------------------------------

ENVIRONMENT_FILE = "/etc/connectoid/relay.env"  # where systemd/connectoid-relay.service has its flags from
ANSWER_TIMEOUT_S = 5.0  # for a relay to accept, and then to answer all of it: it takes milliseconds
DATAGRAM_TIMEOUT_S = 1.0  # for a reply over UDP, and then once more: PROTOCOL.md, "UDP"
WAL_TIMEOUT_S = 5.0  # for the readers that are in the way of a checkpoint
MAX_REPLY_BYTES = 1 << 20  # of metrics or a document: a few KiB
RENEWAL_DAYS = 21  # certbot and Caddy renew 30 days before the end: something is wrong if this is left
SLACK_US = 60 * SECOND_US  # between two clocks, before it is worth a word
LOOK_UP_STEPS = 10_000  # of SQLite's machine, a millisecond, after which it looks whether it was told to stop
FREE_BYTES = 64 << 20  # of disk below which the relay will soon refuse: four times the reserve
FREE_INODES = 100  # for the relay's few files
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized
TIMEX_BYTES = 512  # of its struct: 208 on 64-bit Linux, 128 on 32-bit
# A connection in WAL mode holds this for as long as it is open (sqlite.org, fileformat2 and os_unix.c).
SHARED_LOCK_FIRST, SHARED_LOCK_BYTES = 0x4000_0002, 510
NETWORK_FILE_SYSTEMS = frozenset({"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "nfs", "nfs4", "smb3"})

# Of every file: what the row of the relay says, counted anew. ?1 is the time.
COUNT = """SELECT (SELECT count(*) FROM messages), (SELECT coalesce(sum(max(size, 512)), 0) FROM messages),
    (SELECT count(*) FROM boxes)"""
MAILBOXES = "SELECT count(*), coalesce(max(messages), 0) FROM (SELECT count(*) AS messages FROM messages GROUP BY box)"
QUESTIONS = "SELECT count(*) FROM challenges WHERE expires_us > ?"
OLDEST_AFTER = "SELECT at FROM messages ORDER BY at LIMIT 1 OFFSET ?"
QUOTAS = "SELECT name, iif(day = ?, requests, 0), bytes FROM quotas ORDER BY name"
DELETE_MESSAGES = "DELETE FROM messages WHERE box = ? RETURNING size, quota"
DELETE_QUESTIONS = "DELETE FROM challenges WHERE box = ?"
DELETE_BOX = "DELETE FROM boxes WHERE box = ?"
SUBTRACT = "UPDATE relay SET messages = messages - ?, bytes = bytes - ?, boxes = boxes - ?"
# What is left of a backup without messages: time, proven mailboxes, requests of the day.
LEAVE_OUT = ("DELETE FROM messages", "DELETE FROM challenges", "UPDATE quotas SET bytes = 0",
             "UPDATE relay SET messages = 0, bytes = 0")


class AdminError(Exception):
    """Say in one line why it could not be done; nothing has changed."""


# ---------------------------------------------------------------------------------------
# The file beside a running relay. SQLite before 3.51.3 can lose a commit to a checkpoint
# (SqliteStore says how), so whatever commits, makes a checkpoint, or may do so by opening
# or closing, happens under the relay's own lock. Reads need none.
#
# Root may be the one who types, in a folder that belongs to the relay's user: nothing is
# followed that stands where a file of ours should, and what is made is given to that user.
# ---------------------------------------------------------------------------------------


def refuse_link(path: str) -> None:
    """Raise AdminError for a link: the relay's lock is beside the file itself, and a link is its owner's."""
    if os.path.islink(path):
        raise AdminError(f"{path} is a link; name the file itself with --db")


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Keep the relay from committing, for milliseconds; raise AdminError if it does not let us. Not to be nested."""
    refuse_link(path)
    try:
        lock_file = os.open(path + "-lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AdminError(f"{path}-lock: {error.strerror}; use sudo, or be the relay's user") from None
    try:
        give_away(lock_file, path)
        _wait_for(lock_file, path)
        yield
    finally:
        os.close(lock_file)


def _wait_for(lock_file: int, path: str) -> None:
    give_up_s = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_s:
                raise AdminError(f"{path} is held by another process") from None
            time.sleep(LOCK_RETRY_S)


def give_away(file: int, path: str) -> None:
    """Have an open file belong to whom the database, or else its folder, belongs: a relay must be able to open it."""
    if os.geteuid() == 0:
        owner = os.stat(path if os.path.exists(path) else os.path.dirname(os.path.abspath(path)))
        os.fchown(file, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def opened(path: str, oldest_version: int = len(SCHEMA)) -> Iterator[sqlite3.Connection]:
    """Open a relay's file as the relay does, whether one runs or not; raise AdminError."""
    look_before_opening(path)
    with contextlib.ExitStack() as closing:
        try:
            with locked(path):
                db = connect(path)
                closing.callback(_close, path, db)
                for pragma in ("secure_delete = ON", "wal_autocheckpoint = 0", "synchronous = FULL"):
                    db.execute(f"PRAGMA {pragma}")
                check_version(path, db, oldest_version)
            yield db
        except sqlite3.Error as error:
            raise explain(path, error) from error


def connect(path: str) -> sqlite3.Connection:
    """Open a file that others may have written to; a signal ends what it is at."""
    db = sqlite3.connect(path, BUSY_TIMEOUT_S, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")
    db.set_progress_handler(lambda: 0, LOOK_UP_STEPS)  # Python's signals come between two steps of Python
    return db


def explain(path: str, error: sqlite3.Error) -> AdminError:
    """Return an error of SQLite as one of ours; raise KeyboardInterrupt if it was a signal that ended it."""
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
        raise KeyboardInterrupt from None
    return AdminError(f"{path}: {error}")


def _close(path: str, db: sqlite3.Connection) -> None:
    with locked(path):  # the last one to close makes a checkpoint
        db.close()


def look_before_opening(path: str) -> None:
    """Raise AdminError for what is no file, or another program's, while it is as that program left it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AdminError(f"{path} is no file; name the relay's with --db")
        with contextlib.closing(sqlite3.connect(_uri(path, "immutable=1"), uri=True)) as db:
            if read_header(db)[0] not in (0, APPLICATION_ID) or (read_header(db)[0] == 0 and db.execute(
                    "SELECT count(*) FROM sqlite_schema").fetchone()[0]):
                raise AdminError(f"{path} belongs to another program")
    except PermissionError:
        raise AdminError(f"{path}: Permission denied; use sudo, or be the relay's user") from None
    except OSError as error:
        raise AdminError(f"{path}: {error.strerror}; name the relay's file with --db") from None
    except sqlite3.DatabaseError as error:
        # Without its WAL a file whose checkpoint was cut off looks damaged; opening it will tell.
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR):
            raise AdminError(f"{path}: {error}; name the relay's file with --db") from None


def _uri(path: str, query: str) -> str:
    return f"{Path(path).absolute().as_uri()}?{query}"


def read_header(db: sqlite3.Connection) -> tuple[int, int]:
    """Return whose file it is and the version of its schema."""
    (owner,), (version,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    return owner, version


def check_version(path: str, db: sqlite3.Connection, oldest: int = 1) -> int:
    """Return the version of the schema; raise AdminError if it is not ours to touch, or not as a relay makes it."""
    owner, version = read_header(db)
    if owner != APPLICATION_ID:
        raise AdminError(f"{path} " + ("belongs to another program" if owner else "has nothing in it yet"))
    if not 1 <= version <= len(SCHEMA):
        raise AdminError(f"{path} has schema {version}, this program knows {len(SCHEMA)}; use one as new as the relay")
    if version < oldest:
        raise AdminError(f"{path} has schema {version}, and this program {len(SCHEMA)}; restart the relay, which"
                         " brings it up to date")
    if odd := sorted(read_schema(db) ^ schema_of(version)):  # a trigger would be run by us, and by the relay
        raise AdminError(f"{path} is not as a relay makes it: see its {odd[0][0]} {odd[0][1]}")
    times = db.execute("SELECT time_us, last_at FROM relay").fetchone()
    if not times or not all(0 <= at_us < YEAR_2200_US for at_us in times):
        raise AdminError(f"{path} is damaged: it has no relay time")
    return version


def read_schema(db: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """Return kind, name and text of all that is in a file, but for what ANALYZE made."""
    return {(kind, name, sql) for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_schema")
            if sql and (kind, name) not in (("table", "sqlite_stat1"), ("table", "sqlite_stat4"))}


@functools.cache
def schema_of(version: int) -> set[tuple[str, str, str]]:
    """Return the same of a file as the relay makes it."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for sql in itertools.chain(*SCHEMA[:version]):
            db.execute(sql)
        return read_schema(db)


def check_integrity(path: str, db: sqlite3.Connection) -> None:
    """Raise AdminError if SQLite finds the file damaged."""
    (first,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if first != "ok":
        raise AdminError(f"{path} is damaged: {' '.join(first.split())}")


def empty_wal(path: str, db: sqlite3.Connection) -> bool:
    """Have what was deleted gone from the WAL too; return False if readers were in the way for too long."""
    give_up_s = time.monotonic() + WAL_TIMEOUT_S
    while True:
        with locked(path):
            if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                return True
        if time.monotonic() > give_up_s:
            return False
        time.sleep(BUSY_TIMEOUT_S)


def sync(path: str) -> None:
    """Have a file, or the names in a folder, on the disk for good."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def name_too(path: str, name: str) -> None:
    """Give a file one more name; raise AdminError if something has it. Where there is but one, it is the new one."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise AdminError(f"{name} is there already; nothing is overwritten") from None
    except OSError as error:  # FAT and its like, as on memory sticks
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(name):
            raise AdminError(f"{name} is there already; nothing is overwritten") from None
        os.rename(path, name)


def stamp() -> str:
    """Return this second, as it stands in names of files."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")


# ---------------------------------------------------------------------------------------
# Backup and restore. Both make the new file under another name, whole and checked, before
# it gets its own: whenever they are cut off, there is what was there before.
# ---------------------------------------------------------------------------------------


def back_up(path: str, target: str, *, without_messages: bool = False) -> str:
    """Copy the file as it is at this moment, and return the copy's name; raise AdminError.

    A target that is a folder gets a file named after the time. The copy is a reader to the
    relay: nobody waits for it, the WAL alone grows meanwhile. Nothing is overwritten.
    """
    if os.path.isdir(target):
        target = os.path.join(target, f"connectoid-{stamp()}.db")
    if os.path.lexists(target):
        raise AdminError(f"{target} is there already; nothing is overwritten")
    with _new_file(target) as new:
        with opened(path, 1) as db:
            db.execute("VACUUM INTO ?", (new,))  # no free pages, no WAL: what was deleted is not in it
        _finish_copy(path, new, LEAVE_OUT if without_messages else ())
        name_too(new, target)
    return target


@contextlib.contextmanager
def _new_file(beside: str) -> Iterator[str]:
    """Return an empty file for its owner's eyes only, and remove it; raise AdminError for what goes wrong meanwhile."""
    folder = os.path.dirname(os.path.abspath(beside))
    new = os.path.join(folder, f".{os.path.basename(beside)}-{secrets.token_hex(8)}.new")
    try:
        try:  # not tempfile: between its return and here a signal would leave the file
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield new
            sync(folder)
        finally:
            for rest in ("", "-journal", "-wal", "-shm"):
                Path(new + rest).unlink(missing_ok=True)
    except OSError as error:
        raise AdminError(f"{beside or 'no name'}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise explain(beside, error) from error


def _finish_copy(origin: str, new: str, statements: Sequence[str] = ()) -> None:
    """Bring a copy that nobody else knows into its last form, check it and sync it."""
    with contextlib.closing(connect(new)) as db:
        check_version(origin, db, len(SCHEMA) if statements else 1)
        check_integrity(origin, db)
        db.execute("PRAGMA journal_mode = DELETE")  # one file, that can be read from a read-only disk
        db.execute("PRAGMA secure_delete = ON")
        for sql in statements:
            db.execute(sql)
        if statements:
            db.execute("VACUUM")
    sync(new)


def restore(backup: str, path: str) -> str | None:
    """Put a backup in the place of the relay's file; return where the old one is, None if there was none.

    Refuses, with AdminError, beside a relay that runs, and a backup that is damaged, of
    a newer relay or not as a relay makes it. An older schema is the relay's to bring up to
    date when it starts.
    """
    look_before_opening(backup)
    refuse_link(path)
    if os.path.exists(path) and os.path.samefile(backup, path):
        raise AdminError(f"{backup} is the relay's file itself")
    if any(os.path.exists(backup + rest) and os.path.getsize(backup + rest) for rest in ("-wal", "-journal")):
        raise AdminError(f"{backup} is a file in use, or was; make a backup of it")
    with _new_file(path) as new:
        # Whoever the folder belongs to may have put a link in its place.
        with open(backup, "rb") as source, open(os.open(new, os.O_WRONLY | os.O_NOFOLLOW), "wb") as copy:
            shutil.copyfileobj(source, copy)
            give_away(copy.fileno(), path)
        _finish_copy(backup, new)
        with locked(path):  # a relay that starts now waits for it, and finds the new file
            refuse_beside_a_relay(path)
            aside = _put_aside(path)
            os.replace(new, path)
    return aside


def refuse_beside_a_relay(path: str) -> None:
    """Raise AdminError if some process has the database open."""
    if os.path.exists(path):
        with open(path, "r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, SHARED_LOCK_BYTES, SHARED_LOCK_FIRST)
            except (BlockingIOError, PermissionError):
                raise AdminError(f"{path} is in use; stop the relay first") from None


def _put_aside(path: str) -> str | None:
    """Give the old file a name of its own and leave no WAL that the new one would take for its own."""
    if not os.path.exists(path) or not os.path.getsize(path):
        aside = None
    else:
        aside = f"{path}.before-restore-{stamp()}"
        _fold_wal(path)
        name_too(path, aside)
    for rest in ("-wal", "-shm"):
        if os.path.lexists(path + rest):  # of a damaged file, or one that is lost
            os.replace(path + rest, f"{aside or path + '.lost'}{rest}")
    return aside


def _fold_wal(path: str) -> None:
    """Move what is in the WAL into the file, if that can be: then a single rename exchanges it whole."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise


# ---------------------------------------------------------------------------------------
# What is in the file: a mailbox deleted, everything counted.
# ---------------------------------------------------------------------------------------


class Deleted(NamedTuple):
    """What there was of a mailbox."""

    messages: int
    questions: int
    places: int  # 1 if its owner was proven
    gone: bool  # from the WAL as well


def delete(path: str, box: bytes) -> Deleted:
    """Delete all that is kept of a mailbox, for good, beside a running relay; raise AdminError.

    It may be written to again at once: `--deny` is against that.
    """
    with opened(path) as db:
        with locked(path):
            db.execute("BEGIN IMMEDIATE")
            try:
                counts = _delete_rows(db, box)
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
        return Deleted(*counts, empty_wal(path, db))


def _delete_rows(db: sqlite3.Connection, box: bytes) -> tuple[int, int, int]:
    messages = db.execute(DELETE_MESSAGES, (box,)).fetchall()
    for size, quota in messages:
        if quota and db.execute(QUOTA_BYTES, (quota,)).fetchone():
            db.execute(ADD_QUOTA_BYTES, (quota, -size))
    questions, places = (db.execute(sql, (box,)).rowcount for sql in (DELETE_QUESTIONS, DELETE_BOX))
    db.execute(SUBTRACT, (len(messages), sum(counted_bytes(size) for size, _ in messages), places))
    return len(messages), questions, places


def stored_in(path: str, now_us: int | None = None) -> dict[str, Any]:
    """Return what is in the file, in numbers: no mailboxes, no keys, no addresses. Raises AdminError."""
    with opened(path) as db:
        db.execute("BEGIN")  # all of it at one moment
        time_us, _, octets, places, messages = db.execute(READ_RELAY).fetchone()
        now_us = max(time_us, now_us if now_us is not None else time.time_ns() // 1000)
        mailboxes, fullest = db.execute(MAILBOXES).fetchone()
        numbers = {
            "schema": len(SCHEMA), "messages": messages, "message_bytes": octets,
            "mailboxes_with_messages": mailboxes, "messages_in_the_fullest_mailbox": fullest,
            "proven_mailboxes": places, "open_questions": db.execute(QUESTIONS, (now_us,)).fetchone()[0],
            **_ages(db, messages, now_us),
            "quotas": [{"name": name, "requests_today": requests, "bytes": kept}
                       for name, requests, kept in db.execute(QUOTAS, (now_us // DAY_US,))],
        }
        db.execute("ROLLBACK")
    return {"path": path, **_sizes(path), **numbers}


def _ages(db: sqlite3.Connection, messages: int, now_us: int) -> dict[str, int | None]:
    """Return how old messages are, in seconds."""
    ages: dict[str, int | None] = {}
    for name, skipped in (("oldest", 0), ("median", messages // 2), ("newest", max(0, messages - 1))):
        row = db.execute(OLDEST_AFTER, (skipped,)).fetchone()
        ages[f"{name}_message_age_s"] = max(0, now_us - row[0]) // SECOND_US if row else None
    return ages


def _sizes(path: str) -> dict[str, int]:
    files = {"file_bytes": path, "wal_bytes": path + "-wal", "reserve_bytes": path + "-reserve"}
    return {name: os.path.getsize(file) if os.path.exists(file) else 0 for name, file in files.items()}


# ---------------------------------------------------------------------------------------
# The relay that runs, asked as anybody would ask it.
# ---------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What came back, and over TLS whose certificate (DER) was shown."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    certificate: bytes = b""


def ask(url: str, path: str, *, verified: bool = True, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
    """Get a page of a relay; raise AdminError. It is ours on this machine if it need not be verified."""
    try:
        parts = urllib.parse.urlsplit(url)
        with contextlib.closing(_connect(parts, verified, timeout_s)) as connection:
            connection.connect()
            with _within(timeout_s, connection.sock):
                connection.request("GET", parts.path.rstrip("/") + path,
                                   headers={"Accept": "application/json", "Origin": "https://app.example.com"})
                over = connection.sock
                shown = over.getpeercert(binary_form=True) if isinstance(over, ssl.SSLSocket) else None
                reply = connection.getresponse()
                headers = {name.lower(): text for name, text in reply.getheaders()}
                return Answer(reply.status, headers, reply.read(MAX_REPLY_BYTES), shown or b"")
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: of names that cannot be
        reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or repr(error)
        raise AdminError(f"{url} does not answer: {reason}") from None


@contextlib.contextmanager
def _within(timeout_s: float, over: socket.socket) -> Iterator[None]:
    """End a connection after a time, however often a little comes; raise TimeoutError then."""
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(over, socket.SHUT_RDWR)  # below TLS, whose state is the other thread's

    timer = threading.Timer(timeout_s, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            raise TimeoutError("timed out")


def _connect(parts: urllib.parse.SplitResult, verified: bool, timeout_s: float) -> http.client.HTTPConnection:
    if parts.scheme != "https":
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    context = ssl.create_default_context()
    if not verified:  # its certificate is for another name than this machine's
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=timeout_s, context=context)


def parse_metrics(text: str) -> dict[tuple[str, str], float]:
    """Return the numbers of /metrics by name and value of the label."""
    lines = re.findall(r'(?m)^(\w+)(?:\{\w+="([^"\n]*)"\})? ([0-9]{1,18}(?:\.[0-9]+)?)$', text)
    return {(name, label): float(number) for name, label, number in lines if name in METRICS}


def read_metrics(url: str, *, verified: bool = True) -> dict[tuple[str, str], float]:
    """Return what a relay counts; raise AdminError."""
    answer = ask(url, "/metrics", verified=verified)
    metrics = parse_metrics(answer.body.decode("utf-8", "replace"))
    if answer.status != http.HTTPStatus.OK or ("connectoid_uptime_seconds", "") not in metrics:
        raise AdminError(f"{url} has no metrics (status {answer.status})")
    return metrics


def told_by(url: str, over_s: float = 0, *, verified: bool = True, sleep: Callable[[float], None] = time.sleep
            ) -> dict[str, Any]:
    """Return what a relay counts since its start, with rates a minute: since then, and within the next seconds."""
    before = read_metrics(url, verified=verified)
    if over_s:
        sleep(over_s)
    now = read_metrics(url, verified=verified) if over_s else before
    uptime_s = max(1, now["connectoid_uptime_seconds", ""])

    def counted(metric: str) -> dict[str, dict[str, float]]:
        return {label or "all": {
            "total": int(number), "per_minute": round(60 * number / uptime_s, 2),
            **({"per_minute_now": round(60 * (number - before.get((name, label), 0)) / over_s, 2)} if over_s else {}),
        } for (name, label), number in now.items() if name == metric}

    def gauges(*names: str) -> dict[str, int]:
        return {name: int(now.get((f"connectoid_{name}", ""), 0)) for name in names}

    return {"url": url, "version": next((label for name, label in now if name == "connectoid_info"), ""),
            **gauges("healthy", "uptime_seconds", "sweep_age_seconds", "connections", "waiting_boxes",
                     "queued_requests"),
            **{name.removesuffix("_total").removeprefix("connectoid_"): counted(name)
               for name, metric in METRICS.items() if metric.type == "counter"}}


def ask_datagram(host: str, port: int, datagram: bytes) -> bytes:
    """Return the reply to a datagram, asked twice; empty if none comes."""
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[:1]:
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

GOOD, ODD, BAD = "OK", "WARN", "FAIL"


class Finding(NamedTuple):
    """What was found of a thing."""

    level: str
    what: str
    text: str


@dataclass
class Subject:
    """What is looked at: the relay's flags as they will be, its file, and the address by which others reach it."""

    path: str
    flags: argparse.Namespace
    url: str = ""  # as others see it
    origin: str = ""  # of the flags
    mistake: str = ""  # in the flags
    now_us: Callable[[], int] = field(default=lambda: time.time_ns() // 1000)

    @property
    def local_url(self) -> str:
        """Return where the relay is on this machine."""
        host = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(  # noqa: S104 - read, not bound
            self.flags.host, f"[{self.flags.host}]" if ":" in self.flags.host else self.flags.host)
        return f"{'https' if self.flags.tls_cert else 'http'}://{host}:{self.flags.port}/"


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
    read_settings(flags)  # a SettingError is a finding
    for path in filter(None, (flags.keys, flags.deny, flags.tls_key)):
        open_to = "everybody" if path != flags.deny and os.stat(path).st_mode & stat.S_IROTH else ""
        yield Finding(ODD if open_to else GOOD, "flags", f"{path} can be read" + (
            f" by {open_to}; chmod 0640 it" if open_to else ""))
    yield from _check_exposure(flags)


def _check_exposure(flags: argparse.Namespace) -> Iterator[Finding]:
    inside = flags.host in ("127.0.0.1", "::1", "localhost")
    if inside and not flags.trusted_proxy:
        yield Finding(ODD, "flags", "behind a proxy all clients share the limits of one: --trusted-proxy 127.0.0.0/8")
    if not inside and not flags.tls_cert and not flags.trusted_proxy:
        yield Finding(ODD, "flags", "plain HTTP: web pages that came over HTTPS may not use it")
    if not flags.rate:
        yield Finding(ODD, "flags", "--rate 0: nothing holds back who asks too often")
    if not flags.contact:
        yield Finding(ODD, "flags", "no --contact: nobody knows whom to tell what is wrong")


def check_file(subject: Subject) -> Iterator[Finding]:
    """Look at the database: rights, version, integrity, sums."""
    path = subject.path
    if path == ":memory:":
        yield Finding(ODD, "file", "in memory: a restart forgets everything, and nothing can be looked at")
        return
    with opened(path, 1) as db:
        yield Finding(GOOD, "file", f"{path}, schema {check_version(path, db)} of {len(SCHEMA)}")
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077:
            yield Finding(ODD, "file", f"others may open it (mode {mode:04o}); chmod 0600 it")
        db.execute("BEGIN")
        check_integrity(path, db)
        yield Finding(GOOD, "file", "integrity_check ok")
        if check_version(path, db) == len(SCHEMA):
            yield _compare_sums(db)
        db.execute("ROLLBACK")


def _compare_sums(db: sqlite3.Connection) -> Finding:
    _, _, octets, places, messages = db.execute(READ_RELAY).fetchone()
    if (kept := (messages, octets, places)) == (counted := db.execute(COUNT).fetchone()):
        return Finding(GOOD, "file", f"{messages} messages, {octets} bytes, {places} proven mailboxes")
    return Finding(ODD, "file", f"messages, bytes and mailboxes are {counted}, but it says {kept}")


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Look at the room that is left, and whether the disk is one for a database."""
    if subject.path == ":memory:":
        return
    disk = os.statvfs(os.path.dirname(os.path.abspath(subject.path)))
    free = disk.f_bavail * disk.f_frsize
    taken = sum(_sizes(subject.path).values())
    # Rows and indexes take about as much again as small messages do.
    wanted = max(0, 2 * subject.flags.max_bytes + RESERVE_BYTES - taken)
    level = BAD if free < FREE_BYTES else ODD if free < wanted else GOOD
    yield Finding(level, "disk", f"{_size(free)} free" + (
        "" if level == GOOD else f", a full relay (--max-bytes) would take {_size(wanted)} more"))
    if disk.f_files and disk.f_favail < FREE_INODES:
        yield Finding(BAD, "disk", f"{disk.f_favail} inodes free")
    if os.path.exists(subject.path) and not os.path.exists(subject.path + "-reserve"):
        yield Finding(ODD, "disk", "the reserve is in use: the disk was full, and messages are refused")
    kind = file_system_of(os.path.realpath(subject.path))
    if kind in NETWORK_FILE_SYSTEMS:
        yield Finding(BAD, "disk", f"{kind}: SQLite's locks do not hold there; choose a local disk")
    elif kind in ("tmpfs", "ramfs"):
        yield Finding(ODD, "disk", f"{kind}: a restart of the machine forgets everything")


def file_system_of(path: str) -> str:
    """Return the kind of file system that a path is on, or nothing where that is not told."""
    best, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            place, (kind_there, *_) = line.split()[4], line.partition(" - ")[2].split()
            if os.path.commonpath((place, path)) == place and len(place) >= len(best):
                best, kind = place, kind_there
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
    if subject.path != ":memory:" and os.path.exists(subject.path):
        with opened(subject.path, 1) as db:
            (time_us,) = db.execute("SELECT time_us FROM relay").fetchone()
        if time_us > now_us + SLACK_US:
            yield Finding(ODD, "clock", f"the relay's time is {_date(time_us)}, ahead of the clock, and stays so"
                                        " until that is reached; nothing is lost")


def clock_is_synchronized() -> bool | None:
    """Return whether the kernel thinks so (adjtimex(2)); None where it does not tell."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(state != TIME_ERROR)


def check_certificate(subject: Subject) -> Iterator[Finding]:
    """Look at the certificate that the flags name."""
    if not subject.flags.tls_cert:
        return
    leaf = x509.load_pem_x509_certificates(Path(subject.flags.tls_cert).read_bytes())[0]
    now = datetime.datetime.fromtimestamp(subject.now_us() / SECOND_US, datetime.UTC)
    left = (leaf.not_valid_after_utc - now).days
    if now < leaf.not_valid_before_utc:
        yield Finding(BAD, "certificate", f"not valid before {leaf.not_valid_before_utc:%Y-%m-%d}")
    elif now >= leaf.not_valid_after_utc:
        yield Finding(BAD, "certificate", f"expired on {leaf.not_valid_after_utc:%Y-%m-%d}")
    else:
        yield Finding(GOOD if left >= RENEWAL_DAYS else ODD, "certificate", f"good for {left} days" + (
            "" if left >= RENEWAL_DAYS else "; it should have been renewed by now"))
    host = urllib.parse.urlsplit(subject.url).hostname
    if host and host not in (names := _names_in(leaf)) and f"*.{host.partition('.')[2]}" not in names:
        yield Finding(BAD, "certificate", f"is for {', '.join(names) or 'no name'}, not for {host}")


def _names_in(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def check_relay(subject: Subject) -> Iterator[Finding]:
    """Ask the relay on this machine: health, version, certificate, UDP."""
    url, flags = subject.local_url, subject.flags
    health = ask(url, "/health", verified=False)
    if health.status != http.HTTPStatus.OK:
        yield Finding(BAD, "relay", f"{url} is not well: {_detail(health.body)}")
    document = _document(ask(url, "/", verified=False))
    if document.get("software") != "connectoid_relay":
        yield Finding(BAD, "relay", f"{url} is another program")
        return
    yield Finding(GOOD if document.get("version") == __version__ else ODD, "relay", (
        f"{url} runs {document.get('version')}" + (
            "" if document.get("version") == __version__ else f", but {__version__} is installed; restart it")))
    if flags.tls_cert and health.certificate:
        leaf = x509.load_pem_x509_certificates(Path(flags.tls_cert).read_bytes())[0]
        if leaf != x509.load_der_x509_certificate(health.certificate):
            yield Finding(ODD, "relay", f"shows another certificate than {flags.tls_cert}; reload it")
    yield from _check_datagrams("relay", url, flags)


def _check_datagrams(what: str, url: str, flags: argparse.Namespace) -> Iterator[Finding]:
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if flags.udp:
        token = secrets.token_hex(8)
        pub = encode_base64url(b"\2" + secrets.token_bytes(48))
        asked = json.dumps({"action": "check", "pub": pub, "at": 0, "id": token}).encode()
        yield _heard(what, "a check over UDP", token.encode() in ask_datagram(host, port, asked))
    if flags.stun:
        token_bytes = secrets.token_bytes(12)
        asked = struct.pack("!HHI", 1, 0, STUN_COOKIE) + token_bytes
        yield _heard(what, "STUN", ask_datagram(host, port, asked)[8:20] == token_bytes)


def _heard(what: str, kind: str, answered: bool) -> Finding:
    return Finding(GOOD if answered else BAD, what, f"{kind} is {'' if answered else 'not '}answered")


def check_reachability(subject: Subject) -> Iterator[Finding]:
    """Ask the relay by the address that others use, as a browser would."""
    if not subject.url:
        yield Finding(ODD, "reach", "not looked at; name the address that others use with --url")
        return
    answer = ask(subject.url, "/")
    if _document(answer).get("software") != "connectoid_relay":
        yield Finding(BAD, "reach", f"{subject.url} is no relay (status {answer.status})")
        return
    yield Finding(GOOD, "reach", f"{subject.url} answers")
    if answer.headers.get("access-control-allow-origin") != "*":
        yield Finding(BAD, "reach", "a proxy takes away Access-Control-Allow-Origin: web pages cannot use it")
    yield from _check_datagrams("reach", subject.url, subject.flags)


def check_programs(_subject: Subject) -> Iterator[Finding]:
    """Say what it all runs on."""
    versions = (f"connectoid {__version__}, Python {'.'.join(map(str, sys.version_info[:3]))}, SQLite"
                f" {sqlite3.sqlite_version}, cryptography {cryptography.__version__}")
    yield Finding(GOOD, "programs", versions)


def _document(answer: Answer) -> dict[str, Any]:
    try:
        document = json.loads(answer.body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _detail(body: bytes) -> str:
    return str(_document(Answer(0, {}, body)).get("detail", "no reason given"))


CHECKS: Mapping[str, Callable[[Subject], Iterator[Finding]]] = {
    "programs": check_programs, "flags": check_configuration, "file": check_file, "disk": check_disk,
    "clock": check_clock, "certificate": check_certificate, "relay": check_relay, "reach": check_reachability,
}


def find_all(subject: Subject) -> Iterator[Finding]:
    """Yield what every check finds; one that cannot go on says why and does not keep the others from looking."""
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


def read_environment(path: str) -> list[str]:
    """Return the relay's flags from a file as systemd reads it (systemd.exec(5)); raise AdminError."""
    words = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except PermissionError:
        raise AdminError(f"{path}: Permission denied; use sudo") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdminError(f"{path}: {getattr(error, 'strerror', 'not UTF-8')}") from None
    for line in text.replace("\\\n", "").splitlines():
        name, _, value = line.strip().partition("=")
        if name == "FLAGS":
            quoted = value[:1] in ("'", '"') and value[-1:] == value[:1]
            words = _split(value[1:-1] if quoted else value, path)
    return words


def _is_there(path: str) -> bool:
    try:
        return bool(os.stat(path))
    except FileNotFoundError:
        return False
    except OSError:  # we may not look: it is not for nothing that it is kept from us
        return True


def _split(text: str, origin: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise AdminError(f"{origin}: {error}") from None


def find_subject(arguments: argparse.Namespace) -> Subject:
    """Return what the command line is about; a mistake in the relay's flags stands in it."""
    parser, errors, origin, mistake = build_parser("connectoid-relay"), io.StringIO(), "the defaults", ""
    flags = parser.parse_args([])
    try:
        if arguments.flags is not None:
            words, origin = _split(arguments.flags, "--flags"), "--flags"
        elif arguments.env or _is_there(ENVIRONMENT_FILE):
            origin = arguments.env or ENVIRONMENT_FILE
            words = read_environment(origin)
        else:
            words = []
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            flags = parser.parse_args(words)
    except AdminError as error:
        mistake = str(error)
    except SystemExit:
        mistake = f"{origin}: {errors.getvalue().strip().removeprefix('connectoid-relay: error: ')}"
    if mistake and arguments.run is not _check and not arguments.db:  # else it would be about another file
        raise AdminError(mistake)
    return Subject(arguments.db or flags.db, flags, getattr(arguments, "url", None) or "", origin, mistake)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, what is no text in it made harmless: it may come from a relay that is not ours."""
    print("".join(letter if letter.isprintable() else "?" for letter in text), file=file or sys.stdout, flush=True)


def _check(arguments: argparse.Namespace) -> int:
    worst = 0
    for level, what, text in find_all(find_subject(arguments)):
        if level != GOOD or not arguments.quiet:
            say(f"{level:<5} {what}: {text}")
        worst |= level == BAD
    return int(worst)


def _back_up(arguments: argparse.Namespace) -> int:
    path = find_subject(arguments).path
    target = back_up(path, arguments.target, without_messages=arguments.without_messages)
    if not arguments.quiet:
        say(f"{path} is backed up as {target}, {_size(os.path.getsize(target))}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    path = find_subject(arguments).path
    aside = restore(arguments.backup, path)
    say(f"{path} is what was backed up as {arguments.backup}" + (
        f"; what it was is in {aside}, to be deleted when it is not needed" if aside else ""))
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    messages, questions, places, gone = delete(find_subject(arguments).path, arguments.box)
    say(f"deleted: {messages} messages, {questions} questions, {places} places of proven mailboxes" + (
        "" if gone else "; a reader keeps a copy in the -wal, which the relay empties with the next sweep"))
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    subject = find_subject(arguments)
    stats: dict[str, Any] = {"file": stored_in(subject.path), "relay": None}
    url = subject.url or subject.local_url
    try:
        stats["relay"] = told_by(url, arguments.over, verified=bool(subject.url))
    except AdminError as error:  # the file alone is worth a look
        say(f"connectoid-admin: {error}; what the file says:", sys.stderr)
    if arguments.json:
        print(json.dumps(stats, indent=2))
    else:
        for line in render_table(stats):
            say(line)
    return 0


def render_table(stats: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the lines of a table of nested numbers, what is zero of refusals and the like left out."""
    for name, value in stats.items():
        label = f"{prefix} {name}".strip().replace("_", " ")
        if isinstance(value, dict) and "total" in value:
            if value["total"]:
                rates = [f"{value['per_minute']:g} a minute"] + (
                    [f"now {value['per_minute_now']:g}"] if "per_minute_now" in value else [])
                yield f"{label:<40} {value['total']} ({', '.join(rates)})"
        elif isinstance(value, dict):
            yield from render_table(value, label)
        elif isinstance(value, list):
            for entry in value:
                yield from render_table({key: entry[key] for key in entry if key != "name"}, f"{label} {entry['name']}")
        else:
            yield f"{label:<40} {'-' if value is None else value}"


def _size(octets: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if octets < 1024:  # noqa: PLR2004 - of each in the next
            return f"{octets:.0f} {unit}"
        octets /= 1024
    return f"{octets:.1f} GiB"


def _date(at_us: int) -> str:
    if not 0 <= at_us < YEAR_2200_US:
        return f"second {at_us // SECOND_US}"
    return f"{datetime.datetime.fromtimestamp(at_us // SECOND_US, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _mailbox(text: str) -> bytes:
    try:
        return read_box({"pub": text})
    except Refusal:
        raise argparse.ArgumentTypeError("is no mailbox; write its pub, 66 characters") from None


def _address(text: str) -> str:
    with contextlib.suppress(ValueError):  # a port that is none, half a bracket
        if text.isascii() and re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", text) and (
                urllib.parse.urlsplit(text).port != 0):
            return text
    raise argparse.ArgumentTypeError("is no web address; write https://...")


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of seconds")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists what there is)\n")


def build_admin_parser(prog: str = "connectoid-admin") -> argparse.ArgumentParser:
    """Return the parser of the command line: README.md, "Day two"."""
    parser = _Parser(prog=prog, description="Look after a Connectoid relay, beside it while it runs.",
                     epilog="COMMAND --help says more. Exit codes: 0 done, 1 failed or something is wrong, 2 usage,"
                            " 130 stopped.")
    parser.add_argument("--version", action="version", version=f"connectoid admin {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--db", metavar="FILE", help="the relay's database (default: as its flags say, else"
                                                     " connectoid.db, in $STATE_DIRECTORY if set)")
    common.add_argument("--env", metavar="FILE", help=f"has the relay's flags in FLAGS= (default: {ENVIRONMENT_FILE},"
                                                      " if it is there)")
    common.add_argument("--flags", metavar="TEXT", help="the relay's flags themselves, in one argument")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], meaning: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=meaning, description=f"{meaning.capitalize()}.",
                                    allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    url = command("check", _check, "look whether all is well: OK, WARN or FAIL a line; 1 if something failed")
    url.add_argument("--url", type=_address, help="the address that others use, to try it too")
    url.add_argument("-q", "--quiet", action="store_true", help="leave out what is OK")
    backup = command("backup", _back_up, "copy the file, as it is at this moment, while the relay runs")
    backup.add_argument("target", metavar="FILE", help="the copy, which must not be there yet; or a folder for it")
    backup.add_argument("--without-messages", action="store_true",
                        help="leave out what is gone after an hour anyway; for copies that are kept longer")
    backup.add_argument("-q", "--quiet", action="store_true", help="say nothing but what went wrong")
    command("restore", _restore, "put a backup in the place of the file, while no relay runs"
            ).add_argument("backup", metavar="FILE", help="the backup; the old file is kept beside the new one")
    stats = command("stats", _stats, "count what is stored, and what the running relay has done")
    stats.add_argument("--json", action="store_true", help="for programs")
    stats.add_argument("--url", type=_address, help="where the relay is (default: on this machine, by its flags)")
    stats.add_argument("--over", metavar="N", type=_seconds, default=0, help="also the rates in the next N seconds")
    command("delete", _delete, "delete all that is kept of a mailbox, for good"
            ).add_argument("box", metavar="PUB", type=_mailbox, help="the mailbox, as it stands in requests")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 130 stopped by a signal; 2 (usage) exits."""
    arguments = build_admin_parser(os.path.basename(sys.argv[0])).parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: half a copy is not left behind
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # by `head`; the interpreter would try once more at the end
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
