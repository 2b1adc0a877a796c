"""The store: one SQLite file with a record for each contact, readable by its owner alone.

With a passphrase each record is encrypted. An export carries all records to another device.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from connectoid.contact import ContactRecord
from connectoid.encoding import load_json
from connectoid.errors import REASONS, ConnectoidError
from connectoid.operating_system import PRIVATE, long_path, take_lock
from connectoid.suite import CONTEXTS

# "Conn": which program a SQLite file belongs to.
APPLICATION_ID = 0x436F6E6E
STORE_VERSION = 1

# The first bytes of a SQLite file. SQLite would take some shorter files for empty ones.
SQLITE_MARK = b"SQLite format 3\0"

# The wait for another process that is reading.
STORE_BUSY_S = 5.0

# 32 MiB and about 0.1 s for each guess of a passphrase.
SCRYPT = {"n": 2**15, "r": 8, "p": 1}
SALT_BYTES = 16
NONCE_BYTES = 12
FILE_KEY_BYTES = 32

EXPORT_MARK = b"connectoid/1 export\n"

SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {STORE_VERSION}",
    "CREATE TABLE protection (salt BLOB NOT NULL, checked BLOB NOT NULL)",
    "CREATE TABLE contacts (id INTEGER PRIMARY KEY AUTOINCREMENT, record BLOB NOT NULL)",
)


REFUSALS_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS refusals (id INTEGER PRIMARY KEY, counts BLOB NOT NULL)")


class StoreError(ConnectoidError):
    """A store that cannot be used. The text says why, and what to do."""


class Store:
    """Keep contacts in a file of mode 0600; with a passphrase they are encrypted.

    The cipher is AES-256-GCM under a key by scrypt. One process may run contacts (`lock`), others
    may read. Raises StoreError for a file that is damaged, another program's, in use, or not to be
    opened with this passphrase; it never writes to such a file.
    """

    def __init__(
        self, path: str | os.PathLike[str], passphrase: str | None = None, *, lock: bool = True
    ) -> None:
        self.path = os.fspath(path)
        self._is_file = self.path != ":memory:"
        if self._is_file:
            self.path = long_path(self.path)
        self._is_closed = False
        self._opened = contextlib.ExitStack()
        if lock and self._is_file:
            self._take_lock()
        try:
            self._cipher = self._open_file(passphrase)
        except StoreError:
            self.close()
            raise
        except (OSError, ValueError, TypeError, sqlite3.Error) as error:
            # A damaged file may hold values of any type.
            self.close()
            raise StoreError(f"The store {self.path} cannot be opened: {error}.") from None

    def close(self) -> None:
        """Close the file and let others use it: all other calls raise StoreError. Idempotent."""
        self._is_closed = True
        self._opened.close()

    # -- Records -------------------------------------------------------------------------

    def load(self) -> dict[int, ContactRecord]:
        """Return the records by their ids; raise StoreError, RecordError."""
        try:
            rows = self._execute("SELECT id, record FROM contacts ORDER BY id").fetchall()
            return {number: self._unseal(number, sealed) for number, sealed in rows}
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        except (InvalidTag, ValueError, TypeError, AttributeError) as error:
            why = error or "wrong tag"
            raise StoreError(f"The store {self.path} is damaged: {why}.") from None

    def add(self, record: ContactRecord) -> int:
        """Keep a new record durably and return its id; raise StoreError."""
        with self._transaction():
            # The seal needs the id.
            cursor = self._execute("INSERT INTO contacts (record) VALUES (x'')")
            number = int(cursor.lastrowid or 0)
            self._update(number, record)
        return number

    def save(self, number: int, record: ContactRecord) -> None:
        """Replace a record durably; raise StoreError."""
        with self._transaction():
            self._update(number, record)

    def delete(self, number: int) -> None:
        """Delete a record and overwrite it in the file; raise StoreError."""
        with self._transaction():
            self._execute("DELETE FROM contacts WHERE id = ?", number)
            if self._has_refusals():
                self._execute("DELETE FROM refusals WHERE id = ?", number)

    # -- What was refused: for people to see, nothing depends on it ------------------------

    def load_refusals(self) -> dict[int, dict[str, int]]:
        """Return how often something of each contact was refused, by reason; raise StoreError.

        Counts that are damaged are left out.
        """
        found: dict[int, dict[str, int]] = {}
        try:
            rows = []
            if self._has_refusals():
                rows = self._execute("SELECT id, counts FROM refusals").fetchall()
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        for number, sealed in rows:
            with contextlib.suppress(InvalidTag, ValueError, TypeError, AttributeError):
                counts = load_json(self._open_octets(f"refusals {number}", sealed).decode("utf-8"))
                known = REASONS.keys() & counts.keys()
                found[number] = {reason: int(counts[reason]) for reason in known}
        return found

    def save_refusals(self, number: int, counts: Mapping[str, int]) -> None:
        """Replace the counts of a contact, if it is there; raise StoreError."""
        octets = json.dumps(counts).encode("ascii")
        sealed = self._seal_octets(f"refusals {number}", octets)
        with self._transaction():
            # A store of an earlier version has no such table.
            self._execute(REFUSALS_SCHEMA)
            self._execute(
                "INSERT OR REPLACE INTO refusals SELECT id, ? FROM contacts WHERE id = ?",
                sealed, number)

    # -- Another device ------------------------------------------------------------------

    def export(self, passphrase: str) -> bytes:
        """Return all records under a passphrase, for another device; raise StoreError.

        Let only one of the two devices run from then on.
        """
        salt = secrets.token_bytes(SALT_BYTES)
        texts = [record.to_json() for record in self.load().values()]
        octets = json.dumps(texts).encode("utf-8")
        return EXPORT_MARK + salt + _encrypt(_make_cipher(passphrase, salt), octets, b"export")

    def import_(self, exported: bytes, passphrase: str) -> int:
        """Add the records of an export that are not here yet; return how many.

        Raise StoreError for a wrong passphrase, RecordError for a damaged record.
        """
        records = _open_export(exported, passphrase)
        here = list(self.load().values())
        links = {record.link_hash for record in here}
        names = {record.name for record in here}
        new = [record for record in records if record.link_hash not in links]
        for record in new:
            name = _take_free_name(record.name, names)
            self.add(replace(record, name=name))
        return len(new)

    # -- Opening -------------------------------------------------------------------------

    def _take_lock(self) -> None:
        """Be the only process that runs these contacts, until this is closed."""
        try:
            lock_fd = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT, PRIVATE)
            self._opened.callback(os.close, lock_fd)
            is_taken = take_lock(lock_fd)
        except OSError as error:
            self.close()
            why = error.strerror or error
            raise StoreError(f"The store {self.path} cannot be opened: {why}.") from None
        if not is_taken:
            self.close()
            raise StoreError(f"Another program is using {self.path}: end it first.")

    def _open_file(self, passphrase: str | None) -> AESGCM | None:
        """Open the file, make the tables if it is new, and return its cipher."""
        if self._is_file:
            self._check_mark()
        self._db = sqlite3.connect(
            self.path, timeout=STORE_BUSY_S, isolation_level=None, check_same_thread=False
        )
        self._opened.callback(self._db.close)
        self._prepare(passphrase)
        cipher = self._unlock(passphrase)
        if self._is_file:
            os.chmod(self.path, PRIVATE)
        return cipher

    def _check_mark(self) -> None:
        """Raise StoreError for a file of another kind; make a missing one."""
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE), "rb") as file:
            mark = file.read(len(SQLITE_MARK))
        if mark not in (b"", SQLITE_MARK):
            raise self._foreign()

    def _prepare(self, passphrase: str | None) -> None:
        """Make the tables of a new file; raise StoreError for a file that is no store."""
        application_id = self._fetch_number("PRAGMA application_id")
        version = self._fetch_number("PRAGMA user_version")
        if application_id == version == 0 and not self._has_tables():
            self._create(passphrase)
        elif application_id != APPLICATION_ID:
            raise self._foreign()
        elif version != STORE_VERSION:
            raise StoreError(
                f"{self.path} is of version {version}; "
                f"this is version {STORE_VERSION} of Connectoid."
            )
        self._execute("PRAGMA synchronous = EXTRA")
        # On macOS a plain sync leaves the cache of the disk to a power loss.
        self._execute("PRAGMA fullfsync = ON")
        self._execute("PRAGMA secure_delete = ON")

    def _create(self, passphrase: str | None) -> None:
        salt = b""
        checked = b""
        if passphrase is not None:
            salt = secrets.token_bytes(SALT_BYTES)
            checked = _encrypt(_make_cipher(passphrase, salt), b"", b"check")
        with self._transaction():
            if self._has_tables():
                # Another process has made them in the meantime.
                return
            for statement in SCHEMA:
                self._execute(statement)
            self._execute("INSERT INTO protection VALUES (?, ?)", salt, checked)

    def _unlock(self, passphrase: str | None) -> AESGCM | None:
        """Return the cipher of the records, or None if they are not encrypted."""
        salt, checked = self._execute("SELECT salt, checked FROM protection").fetchone()
        if not salt:
            if passphrase is None:
                return None
            raise StoreError(
                f"{self.path} has no passphrase: "
                "export it, and import it into a new store with one."
            )
        if passphrase is None:
            raise StoreError(f"{self.path} has a passphrase.")
        cipher = _make_cipher(passphrase, salt)
        try:
            _decrypt(cipher, checked, b"check")
        except InvalidTag:
            raise StoreError(f"This is not the passphrase of {self.path}.") from None
        return cipher

    def _foreign(self) -> StoreError:
        return StoreError(f"{self.path} is not a store of Connectoid; choose another file.")

    def _unreadable(self, error: sqlite3.Error) -> StoreError:
        """Return what SQLite says of a file. Of a busy one or a broken disk it is no damage."""
        what = "is damaged"
        if isinstance(error, sqlite3.OperationalError):
            what = "cannot be read"
        return StoreError(f"The store {self.path} {what}: {error}.")

    # -- SQL -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
                self._execute("COMMIT")
            except BaseException:
                self._execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"The store {self.path} cannot be written: {error}.") from None

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        if self._is_closed:
            raise StoreError(f"The store {self.path} is closed.")
        return self._db.execute(statement, values)

    def _fetch_number(self, statement: str) -> int:
        (number,) = self._execute(statement).fetchone()
        return int(number)

    def _has_refusals(self) -> bool:
        found = self._execute("SELECT 1 FROM sqlite_master WHERE name = 'refusals'")
        return found.fetchone() is not None

    def _has_tables(self) -> bool:
        return self._execute("SELECT 1 FROM sqlite_master").fetchone() is not None

    def _update(self, number: int, record: ContactRecord) -> None:
        sealed = self._seal(number, record)
        self._execute("UPDATE contacts SET record = ? WHERE id = ?", sealed, number)

    def _seal(self, number: int, record: ContactRecord) -> bytes:
        return self._seal_octets(str(number), record.to_json().encode("utf-8"))

    def _unseal(self, number: int, sealed: bytes) -> ContactRecord:
        return ContactRecord.from_json(self._open_octets(str(number), sealed).decode("utf-8"))

    def _seal_octets(self, place: str, octets: bytes) -> bytes:
        if self._cipher is None:
            return octets
        return _encrypt(self._cipher, octets, place.encode())

    def _open_octets(self, place: str, sealed: bytes) -> bytes:
        if self._cipher is None:
            return sealed
        return _decrypt(self._cipher, sealed, place.encode())


def _open_export(exported: bytes, passphrase: str) -> list[ContactRecord]:
    """Return the records of an export; raise StoreError, RecordError."""
    if not exported.startswith(EXPORT_MARK):
        raise StoreError("This is not an export of Connectoid.")
    rest = exported[len(EXPORT_MARK) :]
    cipher = _make_cipher(passphrase, rest[:SALT_BYTES])
    try:
        texts = load_json(_decrypt(cipher, rest[SALT_BYTES:], b"export").decode("utf-8"))
    except (InvalidTag, ValueError):
        raise StoreError("The export is damaged, or this is not its passphrase.") from None
    return [ContactRecord.from_json(text) for text in texts]


def _take_free_name(name: str, taken: set[str]) -> str:
    """Return a name, with a number if another contact has it, and take it."""
    free = name
    number = 1
    # Tombstones have no name.
    while name and free in taken:
        number += 1
        free = f"{name} ({number})"
    taken.add(free)
    return free


# -- The cipher of records and exports ---------------------------------------------------


def _make_cipher(passphrase: str, salt: bytes) -> AESGCM:
    key = Scrypt(salt, FILE_KEY_BYTES, **SCRYPT).derive(passphrase.encode("utf-8"))
    return AESGCM(key)


def _encrypt(cipher: AESGCM, octets: bytes, place: bytes) -> bytes:
    """Encrypt octets for one place, so that nobody can exchange two records."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, octets, _associated(place))


def _decrypt(cipher: AESGCM, sealed: bytes, place: bytes) -> bytes:
    """Return the octets that were encrypted for this place; raise InvalidTag."""
    nonce = sealed[:NONCE_BYTES]
    return cipher.decrypt(nonce, sealed[NONCE_BYTES:], _associated(place))


def _associated(place: bytes) -> bytes:
    return CONTEXTS["store"] + b"\0" + place
