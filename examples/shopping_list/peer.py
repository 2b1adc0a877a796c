"""Keep a copy of shared shopping lists on a computer that is always on, such as one at home.

    python peer.py open LINK --name Alice      # a link from the page's "Share"
    python peer.py run                         # sync, until Ctrl-C
    python peer.py list
    python peer.py add "Olive oil" --quantity "1 l"
    python peer.py done "Olive oil"
    python peer.py renew Alice                 # somebody has a copy of these files

`list`, `add` and `done` work on the file alone: a running peer sees the change and sends it. The
lists are in lists.db, the keys in shopping_list.db (--dir says where). It needs the
library with aiortc: in a checkout `pip install '.[webrtc]'`. The messages and the rules of merging
are those of model.js.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import re
import secrets
import sqlite3
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectoid import (
    EMOJI,
    EVENTS,
    AiortcAdapter,
    Channel,
    Connectoid,
    ConnectoidError,
    ContactRecord,
    Store,
    load_ice_servers,
    shown,
)
from connectoid.encoding import load_json

# ---------------------------------------------------------------------------------------
# Limits: those of model.js and sync.js.
# ---------------------------------------------------------------------------------------

MAX_LISTS = 200
MAX_LISTS_OF_CONTACT = 50
# Of a list.
MAX_ITEMS = 2_000
# In all lists that are shared with a contact. Bytes: the lists among them.
MAX_ITEMS_OF_CONTACT = 10_000
MAX_BYTES_OF_CONTACT = 4_000_000
# Of a list or an item, what is not text.
RECORD_BYTES = 200
MAX_NAME_CHARS = 60
MAX_TEXT_CHARS = 200
MAX_QUANTITY_CHARS = 20
# The form of a time. What may be taken is MAX_AHEAD_MS.
MAX_AT = 2**52
# As the page has it: no other app opens the links of a shopping list.
APP = "connectoid.shopping-list"
# By how much the time of a change may be ahead of this device's clock.
MAX_AHEAD_MS = 86_400_000
# 2026-11-23. A clock that shows less is not set, and judges nobody's times.
CLOCK_SET_MS = 1_795_392_000_000
MAX_NUMBER = 2**53 - 1
MAX_MESSAGE_CHARS = 65_536
MESSAGE_BYTES = 48_000
MAX_RECORDS = 500
MAX_REFUSED = 20
IDLE_S = 20.0
# Sent to a contact and not acknowledged: far less than the 1 MiB from which on a send has to wait.
MAX_UNACKNOWLEDGED = 8
# So a send waits only where acknowledgements came for what was not taken. Then the contact loses
# its connection, since one thread serves all contacts.
SEND_S = 2.0
# Of a contact, that have not been looked at. As the library has it, 64 MiB at worst. A contact
# that says more loses its connection.
MAX_CAME = 1_024
# Of those, that are taken at once, before the others have their turn.
MAX_BATCH = 50
# Before a contact is reached again whose last connections, one, two and more, have brought it less
# than all changes: the first may have been a change of the network.
PAUSES_S = (0.0, 60.0, 300.0, 1_800.0)
# At the file, for what another process has changed.
LOOK_EVERY_S = 0.5
# For another process that writes the file.
BUSY_S = 60.0
# `open` waits so long for the other to be there.
PAIR_FOR_S = 600.0
# `renew` waits so long for the other's answer. `run` goes on to wait.
RENEW_FOR_S = 60.0

ID = re.compile(r"[A-Za-z0-9_-]{8,40}")
# Control characters, lone surrogates, and what ends lines or changes the direction of text.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")

Record = dict[str, Any]
# Says of a list's id, and whether the list would be new, whether a change is taken.
MayWrite = Callable[[str, bool], bool]
# Lists, items.
Changes = tuple[list[Record], list[Record]]

LIST_MEMBERS = ("id", "name", "updatedAt", "by", "deleted")
ITEM_MEMBERS = ("id", "list", "text", "quantity", "done", "updatedAt", "by", "deleted")


# ---------------------------------------------------------------------------------------
# What comes from outside: checked member by member, copied, or thrown away whole.
# ---------------------------------------------------------------------------------------


def must(condition: object) -> None:
    """Raise ValueError unless it holds."""
    if not condition:
        raise ValueError("This is no message of a shopping list.")


def is_text(text: object, max_chars: int) -> bool:
    """Return whether it may be shown: short enough, without control characters."""
    return isinstance(text, str) and len(text) <= max_chars and not UNPRINTABLE.search(text)


def is_integer(value: object, lowest: int, highest: int) -> bool:
    """Return whether it is an integer of this range, and no boolean."""
    return type(value) is int and lowest <= value <= highest


def is_id(value: object) -> bool:
    """Return whether it has the form of an id."""
    return isinstance(value, str) and ID.fullmatch(value) is not None


def check_record(record: Any) -> None:
    """Raise ValueError for a record without what all have."""
    must(isinstance(record, dict))
    must(is_id(record.get("id")) and is_id(record.get("by")))
    must(is_integer(record.get("updatedAt"), 0, MAX_AT))
    must(isinstance(record.get("deleted"), bool))


def check_list(record: Any) -> Record:
    """Return a list as it may be kept; raise ValueError."""
    check_record(record)
    must(is_text(record.get("name"), MAX_NAME_CHARS))
    must(record["name"] or record["deleted"])
    return {name: record[name] for name in LIST_MEMBERS}


def check_item(record: Any) -> Record:
    """Return an item as it may be kept; raise ValueError."""
    check_record(record)
    must(is_id(record.get("list")) and isinstance(record.get("done"), bool))
    must(is_text(record.get("text"), MAX_TEXT_CHARS))
    must(is_text(record.get("quantity"), MAX_QUANTITY_CHARS))
    must(record["text"] or record["deleted"])
    return {name: record[name] for name in ITEM_MEMBERS}


def read_message(text: bytes | str) -> Record | None:
    """Return a message that came, None for a type of later versions; raise ValueError."""
    must(isinstance(text, str) and len(text) <= MAX_MESSAGE_CHARS)
    try:
        message = load_json(str(text))
    except ValueError:
        raise ValueError("This is not JSON.") from None
    must(isinstance(message, dict) and isinstance(message.get("type"), str))
    kind = message["type"]
    if kind not in ("changes", "ack", "bye"):
        return None
    must(is_integer(message.get("number"), 1, MAX_NUMBER))
    read: Record = {"type": kind, "number": message["number"]}
    if kind == "ack":
        # An earlier version did not say it.
        read["refused"] = message.get("refused", 0)
        must(is_integer(read["refused"], 0, MAX_RECORDS))
    if kind == "bye":
        read["delete"] = message.get("delete") is True
    if kind == "changes":
        read.update(read_records(message.get("lists"), message.get("items")))
    return read


def read_records(lists: object, items: object) -> Record:
    """Return the lists and items of a message as they may be kept; raise ValueError."""
    if not isinstance(lists, list) or not isinstance(items, list):
        raise ValueError("A change has lists and items.")
    must(len(lists) + len(items) <= MAX_RECORDS)
    return {
        "lists": [check_list(one) for one in lists],
        "items": [check_item(one) for one in items],
    }


class Outbox:
    """What a contact is still to be told: each list and item once, as it was told last."""

    def __init__(self, lists: Iterable[Record] = (), items: Iterable[Record] = ()) -> None:
        self._lists: OrderedDict[str, Record] = OrderedDict()
        self._items: OrderedDict[str, Record] = OrderedDict()
        self.add(lists, items)

    def __bool__(self) -> bool:
        return bool(self._lists or self._items)

    def add(self, lists: Iterable[Record], items: Iterable[Record]) -> None:
        """Put lists and items into it."""
        self._lists.update((one["id"], one) for one in lists)
        self._items.update((one["id"], one) for one in items)

    def take(self) -> dict[str, list[Record]]:
        """Take out what goes into one message, lists before their items."""
        part: dict[str, list[Record]] = {"lists": [], "items": []}
        room = MESSAGE_BYTES
        for kind, waiting in (("lists", self._lists), ("items", self._items)):
            while waiting:
                record = next(iter(waiting.values()))
                room -= len(json.dumps(record)) + 1
                if room < 0 or sum(map(len, part.values())) >= MAX_RECORDS:
                    return part
                part[kind].append(waiting.pop(record["id"]))
        return part


# ---------------------------------------------------------------------------------------
# The lists, as model.js has them, and the file. Other processes may write it: every change
# is made between reading and writing it, in one transaction.
# ---------------------------------------------------------------------------------------


def is_newer(one: Record, other: Record) -> bool:
    """Return whether one of two versions of a record wins."""
    return bool((one["updatedAt"], one["by"]) > (other["updatedAt"], other["by"]))


def is_ahead(record: Record, now_ms: int) -> bool:
    """Return whether its time is one that no honest clock can have had; see model.js."""
    return bool(now_ms >= CLOCK_SET_MS and record["updatedAt"] > now_ms + MAX_AHEAD_MS)


def healed(record: Record, now_ms: int) -> Record:
    """Return a record with a time that later changes can exceed."""
    if is_ahead(record, now_ms):
        return {**record, "updatedAt": now_ms}
    return record


def present_ms() -> int:
    """Return this device's time."""
    return int(time.time() * 1000)


def list_of(record: Record) -> str:
    """Return the id of the list that a list or an item belongs to."""
    return str(record.get("list", record["id"]))


def tidy(text: str, max_chars: int) -> str:
    """Return text that a person typed as it may be kept; raise ValueError for none."""
    shown = ""
    for char in text:
        if is_text(char, 1):
            shown += char
        else:
            shown += " "
    tidied = " ".join(shown.split())[:max_chars].strip()
    if not tidied:
        raise ValueError("Write something first.")
    return tidied


def may_write_all(list_id: str, is_new: bool) -> bool:
    """Return True: for a merge that no contact has asked for."""
    return True


def _id_of(record: Record) -> str:
    return str(record["id"])


def bytes_of(record: Record | None) -> int:
    """Return about how many bytes a list or an item takes."""
    if record is None:
        return 0
    words = [record[member] for member in ("name", "text", "quantity") if member in record]
    return RECORD_BYTES + len("".join(words).encode())


@dataclass
class Room:
    """What a contact may still add, and how many of its lists and items were not kept.

    What is known in a newer version is not among those: the contact will have that.
    """

    items: float
    bytes: float
    refused: int = 0

    def takes_list(self, record: Record, former: Record | None) -> bool:
        """Use it for a list in place of what was known, and return whether it sufficed."""
        growth = bytes_of(record) - bytes_of(former)
        if growth > 0 and self.bytes < growth:
            self.refused += 1
            return False
        self.bytes -= growth
        return True

    def takes(self, item: Record, known: Mapping[str, Record], held: int) -> bool:
        """Use it for an item of a list that holds so many, and return whether it sufficed."""
        former = known.get(item["id"])
        items = int(former is None)
        growth = bytes_of(item) - bytes_of(former)
        is_full = items and held >= MAX_ITEMS
        # What takes no more than before always has room.
        if is_full or (items and self.items < items) or (growth > 0 and self.bytes < growth):
            self.refused += 1
            return False
        self.items -= items
        self.bytes -= growth
        return True


@dataclass
class Lists:
    """What the file holds.

    A contact has `lists` that are shared with it, `theirs` that came from it, and `pending` while
    it lacks a change.
    """

    device: str = field(default_factory=lambda: secrets.token_urlsafe(8))
    lists: dict[str, Record] = field(default_factory=dict)
    items: dict[str, Record] = field(default_factory=dict)
    contacts: dict[str, Record] = field(default_factory=dict)
    last_at: int = 0
    # The items once more, by their list: no change of one item looks at all others.
    _by_list: dict[str, dict[str, Record]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)
    # What the file lacks.
    _changed: dict[str, Record] = field(default_factory=dict)
    _removed: set[str] = field(default_factory=set)

    def take_kept(self, record: Any) -> Record:
        """Take what the file holds, healed if it must be; raise ValueError."""
        check = check_list
        if "list" in record:
            check = check_item
        checked = check(record)
        kept = healed(checked, present_ms())
        self._keep(kept)
        if kept is checked:
            del self._changed[kept["id"]]
        return kept

    def take_changed(self) -> list[Record]:
        """Return the records to be written, once."""
        changed = [*self._changed.values()]
        self._changed.clear()
        return changed

    def take_removed(self) -> set[str]:
        """Return the ids to be deleted, once."""
        removed = set(self._removed)
        self._removed.clear()
        return removed

    def open_lists(self) -> list[Record]:
        """Return the lists that are not deleted, in the order in which they were made."""
        found = [one for one in self.lists.values() if not one["deleted"]]
        return sorted(found, key=_id_of)

    def items_of(self, list_id: str) -> list[Record]:
        """Return the items of a list that are not deleted, in the order in which they came."""
        items = self._by_list.get(list_id, {}).values()
        return sorted((one for one in items if not one["deleted"]), key=_id_of)

    def all_of(self, ids: Iterable[str]) -> Changes:
        """Return all that is known of these lists, tombstones too."""
        wanted = dict.fromkeys(ids)
        lists = [self.lists[one] for one in wanted if one in self.lists]
        items = [item for one in wanted for item in self._by_list.get(one, {}).values()]
        return lists, items

    def room_in(self, ids: Iterable[str]) -> Room:
        """Return what a contact may still add to the lists that are shared with it."""
        room = Room(MAX_ITEMS_OF_CONTACT, MAX_BYTES_OF_CONTACT)
        for one in ids:
            room.items -= len(self._by_list.get(one, {}))
            room.bytes -= self._bytes.get(one, 0)
        return room

    def contact(self, name: str) -> Record:
        """Return what is kept of a contact; a new one lacks nothing."""
        return self.contacts.setdefault(name, {"lists": [], "theirs": [], "pending": False})

    def merge(
        self, changes: Record, may_write: MayWrite = may_write_all, room: Room | None = None,
        now_ms: int | None = None,
    ) -> Changes:
        """Take what is newer, and return that; see model.js."""
        room = room or Room(math.inf, math.inf)
        now = now_ms
        if now is None:
            now = present_ms()
        lists = []
        for one in changes["lists"]:
            is_new = one["id"] not in self.lists
            is_open = may_write(one["id"], is_new)
            if not is_open or (is_new and len(self.lists) >= MAX_LISTS):
                room.refused += 1
            elif self._takes_list(one, now, room):
                lists.append(self._keep(healed(one, now)))
        items = []
        for one in changes["items"]:
            if one["list"] not in self.lists or not may_write(one["list"], False):
                room.refused += 1
            elif self._takes_item(one, now, room):
                items.append(self._keep(healed(one, now)))
        return lists, items

    def _is_news(self, record: Record, known: Record | None, now: int, room: Room) -> bool:
        """Return whether a record is to replace what is known; count it if it never may."""
        if known is None:
            return True
        if known.get("list") != record.get("list") or is_ahead(record, now):
            room.refused += 1
            return False
        return is_newer(record, known)

    def _takes_list(self, record: Record, now: int, room: Room) -> bool:
        known = self.lists.get(record["id"])
        return self._is_news(record, known, now, room) and room.takes_list(record, known)

    def _takes_item(self, record: Record, now: int, room: Room) -> bool:
        held = len(self._by_list.get(record["list"], {}))
        is_news = self._is_news(record, self.items.get(record["id"]), now, room)
        return is_news and room.takes(record, self.items, held)

    def _keep(self, record: Record) -> Record:
        if "list" in record:
            of_list = self._by_list.setdefault(record["list"], {})
            growth = bytes_of(record) - bytes_of(of_list.get(record["id"]))
            self._bytes[record["list"]] = self._bytes.get(record["list"], 0) + growth
            of_list[record["id"]] = record
            self.items[record["id"]] = record
        else:
            growth = bytes_of(record) - bytes_of(self.lists.get(record["id"]))
            self._bytes[record["id"]] = self._bytes.get(record["id"], 0) + growth
            self.lists[record["id"]] = record
        self._changed[record["id"]] = record
        self._removed.discard(record["id"])
        return record

    def change(self, record: Record, now_s: float) -> Record:
        """Keep a record that was changed here, newer than what was there, and note who lacks it."""
        self.last_at = max(int(now_s * 1000), self.last_at + 1)
        updated_at = max(self.last_at, record["updatedAt"] + 1)
        record = self._keep({**record, "by": self.device, "updatedAt": updated_at})
        self.note_pending({list_of(record)})
        return record

    def note_pending(self, list_ids: set[str], but: str = "") -> None:
        """Note that the contacts of these lists lack a change."""
        for name, contact in self.contacts.items():
            if name != but and list_ids & set(contact["lists"]):
                contact["pending"] = True

    def forget(self, ids: Iterable[str]) -> None:
        """Forget lists here, without a tombstone: the others keep them."""
        lists, items = self.all_of(ids)
        for one in lists:
            del self.lists[one["id"]]
            self._by_list.pop(one["id"], None)
            self._bytes.pop(one["id"], None)
        for one in items:
            del self.items[one["id"]]
        for one in [*lists, *items]:
            self._changed.pop(one["id"], None)
            self._removed.add(one["id"])


def new_id(now_s: float) -> str:
    """Return an id that begins with the time, so that their order is that of making."""
    digits = ""
    rest = int(now_s * 1000)
    while rest:
        rest, digit = divmod(rest, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return f"{digits.rjust(9, '0')}-{secrets.token_urlsafe(8)}"


SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id TEXT PRIMARY KEY, json TEXT NOT NULL, revision INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS records_by_revision ON records (revision);
CREATE TABLE IF NOT EXISTS contacts (name TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class Keeper:
    """The file: SQLite, with a row for each list and each item.

    A change writes the rows that it changes. Each has the revision of its change, so that another
    process reads only what is new.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = directory / "lists.db"
        former = directory / "shopping_list.json"
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        self._lists = Lists()
        # What of the file is in the lists, and what others have written since `news`.
        self._revision = 0
        self._version = -1
        self._removals = 0
        self._news: dict[str, Record] = {}
        self._database = sqlite3.connect(self.path, isolation_level=None, timeout=BUSY_S)
        with self._saying_what_is_damaged():
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(SCHEMA)
        if former.exists():
            self._take_over(former)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._database.close()

    def load(self) -> Lists:
        """Return what the file holds, not to be changed; raise ValueError for a damaged one."""
        with self._saying_what_is_damaged():
            if self._version != self._data_version():
                self._read()
        return self._lists

    def news(self) -> Changes:
        """Return the records that other processes have written since the last call."""
        self.load()
        found = [*self._news.values()]
        self._news.clear()
        return [one for one in found if "list" not in one], [one for one in found if "list" in one]

    @contextlib.contextmanager
    def changing(self) -> Iterator[Lists]:
        """Hold the lock, and write what the block has changed, all or nothing."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            with self._saying_what_is_damaged():
                self._read()
            contacts = {name: json.dumps(one) for name, one in self._lists.contacts.items()}
            yield self._lists
            self._write(contacts)
            self._database.execute("COMMIT")
        except BaseException:
            # Of a full disk SQLite takes the transaction back itself.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            # They hold what was not written.
            self._forget()
            raise

    def _read(self) -> None:
        """Bring the lists up to date with the file."""
        version = self._data_version()
        settings = dict(self._database.execute("SELECT name, value FROM settings"))
        if int(settings.get("removals", 0)) != self._removals:
            self._forget()
            self._removals = int(settings["removals"])
        is_first = self._version < 0
        self._lists.device = settings.get("device", self._lists.device)
        self._lists.last_at = int(settings.get("last_at", 0))
        revision = int(settings.get("revision", 0))
        rows = self._database.execute("SELECT name, json FROM contacts")
        self._lists.contacts = {name: json.loads(text) for name, text in rows}
        rows = self._database.execute(
            "SELECT json FROM records WHERE revision > ? ORDER BY rowid", (self._revision,))
        for (text,) in rows:
            record = self._lists.take_kept(json.loads(text))
            if not is_first:
                self._news[record["id"]] = record
        self._revision = revision
        self._version = version

    def _write(self, contacts: Mapping[str, str]) -> None:
        """Write what has changed; `contacts` is what the file has of them."""
        lists = self._lists
        execute = self._database.execute
        changed = lists.take_changed()
        self._revision += bool(changed)
        self._database.executemany(
            "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT (id)"
            " DO UPDATE SET json = excluded.json, revision = excluded.revision",
            [(one["id"], json.dumps(one, ensure_ascii=False), self._revision) for one in changed])
        removed = lists.take_removed()
        self._database.executemany(
            "DELETE FROM records WHERE id = ?", [(one,) for one in removed])
        self._removals += bool(removed)
        for name, one in lists.contacts.items():
            if contacts.get(name) != json.dumps(one):
                execute("REPLACE INTO contacts VALUES (?, ?)", (name, json.dumps(one)))
        for name in contacts.keys() - lists.contacts.keys():
            execute("DELETE FROM contacts WHERE name = ?", (name,))
        settings = {
            "device": lists.device,
            "last_at": str(lists.last_at),
            "revision": str(self._revision),
            # Who has read the file reads it anew when this has changed.
            "removals": str(self._removals),
        }
        self._database.executemany(
            "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name)"
            " DO UPDATE SET value = excluded.value WHERE value != excluded.value",
            list(settings.items()))

    def _take_over(self, former: Path) -> None:
        """Move what an earlier version kept in one JSON file into this one."""
        try:
            kept = json.loads(former.read_text(encoding="utf-8"))
            with self.changing() as lists:
                lists.device = kept["device"]
                lists.contacts.update(kept["contacts"])
                lists.last_at = max(lists.last_at, kept["last_at"])
                changes = {
                    "lists": [check_list(one) for one in kept["lists"]],
                    "items": [check_item(one) for one in kept["items"]],
                }
                lists.merge(changes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(damaged(former, error)) from None
        former.rename(former.with_suffix(".json.old"))

    def _forget(self) -> None:
        self._lists = Lists(self._lists.device)
        self._revision = 0
        self._version = -1

    def _data_version(self) -> int:
        """Return a number that changes when another process has written."""
        (version,) = self._database.execute("PRAGMA data_version").fetchone()
        return int(version)

    @contextlib.contextmanager
    def _saying_what_is_damaged(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            # It is locked, or the disk is full.
            raise
        except (sqlite3.DatabaseError, KeyError, TypeError, ValueError) as error:
            raise ValueError(damaged(self.path, error)) from None


def damaged(path: Path, error: Exception) -> str:
    """Return what to do about a file that cannot be read."""
    return f"{path} is damaged ({error}): move it away, and open a new link."


# ---------------------------------------------------------------------------------------
# Syncing: one thread takes what Connectoid's threads put into its queue.
# ---------------------------------------------------------------------------------------


@dataclass
class Session:
    """A channel to a contact: the numbers of messages, and when something last happened on it."""

    channel: Channel
    last_s: float
    number: int = 0
    acknowledged: int = 0
    refused: int = 0
    outbox: Outbox = field(default_factory=Outbox)
    # None at the end.
    came: deque[bytes | str | None] = field(default_factory=deque)

    @property
    def is_synced(self) -> bool:
        """Return whether the contact has all that it was to be told."""
        return self.acknowledged >= self.number > 0 and not self.outbox

    @property
    def may_tell(self) -> bool:
        """Return whether there is more to tell, and the contact has taken enough of the rest."""
        # The first message says what there is, be it nothing.
        has_more = self.outbox or self.number == 0
        return bool(has_more) and self.number - self.acknowledged < MAX_UNACKNOWLEDGED

    def read(self, text: bytes | str) -> Record | None:
        """Return a message that came, None for one that is not understood; too many of them end it.
        """
        try:
            return read_message(text)
        except ValueError:
            self.refused += 1
            if self.refused > MAX_REFUSED:
                self.channel.close()
            return None


@dataclass
class Batch:
    """What messages that were taken together come to: what is new, and what is to be said."""

    lists: list[Record] = field(default_factory=list)
    items: list[Record] = field(default_factory=list)
    acks: list[Record] = field(default_factory=list)
    # Of the contact's, that were not kept here, and of ours, that were not kept there.
    refused: int = 0
    lacking: int = 0
    has_deleted: bool = False

    def lines(self, name: str) -> Iterator[str]:
        """Return what people are told of it."""
        if self.lacking:
            yield f"{name}'s app has not taken {self.lacking} lists and items."
        if self.refused:
            yield f"{name} sent {self.refused} lists and items that are not taken here."
        if self.lists or self.items:
            yield f"{name}: {len(self.lists)} lists and {len(self.items)} items are new."
        if self.has_deleted:
            yield f"{name}: the lists are deleted, as the other app has asked for."


# The event of each of the news of a contact's key that a record keeps.
KEY_EVENTS = {"renewed": "contact_renewed", "copied": "copied"}


def never() -> bool:
    """Return False: for a peer that syncs until Ctrl-C."""
    return False


class Peer:
    """Sync the lists of a file with all contacts."""

    def __init__(
        self, keeper: Keeper, runner: Connectoid, say: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper = keeper
        self._say = say
        self._now_s = now_s
        # A contact's name, with an event or with a session on which something came.
        self._came: queue.Queue[tuple[str, str | Session]] = queue.Queue()
        self.runner = runner
        runner.on_event = self._note_event
        self._sessions: dict[str, Session] = {}
        # How many connections in turn have not brought a contact all changes, and when it is
        # reached again.
        self._failures: dict[str, int] = {}
        self._due_s: dict[str, float] = {}

    def run(
        self, is_over: Callable[[], bool] = never, link: tuple[str, str] | None = None,
    ) -> None:
        """Sync until Ctrl-C, or until it is over.

        It begins with opening the link, if there is one, for a contact of the name beside it.
        """
        with self.runner:
            # What has healed is kept.
            with self._keeper.changing():
                pass
            if link:
                self.runner.open(*link)
            for kept in self.runner.contacts():
                self._reach(kept.name)
                # It may have come while nobody looked.
                if kept.key_news:
                    self._say(f"{kept.name}: {EVENTS[KEY_EVENTS[kept.key_news]]}")
            while not is_over():
                with contextlib.suppress(queue.Empty):
                    self._take(*self._came.get(timeout=LOOK_EVERY_S))
                self._look_at_file()
                self._rest()
                self._reach_again()

    def renew(self, name: str, timeout_s: float = RENEW_FOR_S) -> None:
        """Have a new key for a contact, so that copies of these files count no more.

        Or go on with a renewal. Raise ValueError if there is no such contact or no answer in time,
        ConnectoidError if it cannot be done.
        """
        with self.runner:
            self.kept(name)
            self._say(f"Telling {name}'s app about a new key.")
            if not self.runner.renew_and_tell(name, timeout_s):
                raise ValueError(
                    f"{name}'s app has not answered yet; until then copies of these files still"
                    " count. `run` goes on to tell it.")
        self._say(f"{name}'s app takes nothing any more from copies of these files.")

    def kept(self, name: str) -> ContactRecord:
        """Return what Connectoid keeps of a contact; raise ValueError if there is none."""
        for kept in self.runner.contacts():
            if kept.name == name:
                return kept
        raise ValueError(f'There is no contact "{name}".')

    def is_synced(self, name: str) -> bool:
        """Return whether a contact has sent its lists, and has ours."""
        session = self._sessions.get(name)
        if session is None or not session.is_synced:
            return False
        return bool(self._keeper.load().contact(name)["lists"])

    # -- What Connectoid says ----------------------------------------------------------

    def _note_event(self, name: str, event: str) -> None:
        self._came.put((name, event))

    def _note_message(self, name: str, session: Session, text: bytes | str | None) -> None:
        if text is not None and len(session.came) >= MAX_CAME:
            session.channel.close()
            return
        session.came.append(text)
        # Whoever takes what was there before takes this too, or comes back for it.
        if len(session.came) == 1:
            self._came.put((name, session))

    def _take(self, name: str, event: str | Session) -> None:
        if isinstance(event, Session):
            self._hear(name, event)
        elif event == "connected":
            self._serve(name)
        elif event != "disconnected":
            self._say(f"{name}: {EVENTS[event]}")

    def _reach(self, name: str) -> None:
        """Want a connection, unless it is too early; the event tells when it is there."""
        paired = [kept.name for kept in self.runner.contacts() if kept.state == "paired"]
        if name in paired and self._now_s() >= self._due_s.get(name, 0.0):
            with contextlib.suppress(TimeoutError, ConnectoidError):
                self.runner.connect(name, timeout_s=0)

    def _serve(self, name: str) -> None:
        try:
            channel = self.runner.connect(name, timeout_s=0)
        except (TimeoutError, ConnectoidError):
            return
        former = self._sessions.get(name)
        if former and former.channel is channel:
            return
        session = Session(channel, self._now_s())
        self._sessions[name] = session
        self._say(f"{name}: connected.")
        channel.listen(lambda text: self._note_message(name, session, text))
        lists = self._keeper.load()
        self._tell(name, *lists.all_of(lists.contact(name)["lists"]))

    def _hear(self, name: str, session: Session) -> None:
        """Take what came from a contact: many messages in one transaction."""
        texts = [session.came.popleft() for _ in range(min(len(session.came), MAX_BATCH))]
        read = [session.read(text) for text in texts if text is not None]
        messages = [message for message in read if message is not None]
        if messages:
            session.last_s = self._now_s()
            batch = Batch()
            with self._keeper.changing() as kept:
                for message in messages:
                    self._apply(kept, name, session, message, batch)
            for ack in batch.acks:
                self._send(session, ack)
            for line in batch.lines(name):
                self._say(line)
            self._pass_on(batch.lists, batch.items, but=name)
            self._tell_on(session)
        if None in texts:
            self._end(name, session)
        elif session.came:
            self._came.put((name, session))

    def _apply(
        self, kept: Lists, name: str, session: Session, message: Record, batch: Batch,
    ) -> None:
        """Do what a message says, within a transaction."""
        number = message["number"]
        refused = 0
        match message["type"]:
            case "ack":
                if self._acknowledge(kept, name, session, number):
                    batch.lacking += message["refused"]
                return
            case "changes":
                refused = merge_from(name, kept, message, batch)
            case "bye" if message["delete"]:
                delete_for(name, kept)
                batch.has_deleted = True
        batch.refused += refused
        batch.acks.append({"type": "ack", "number": number, "refused": refused})

    def _acknowledge(self, kept: Lists, name: str, session: Session, number: int) -> bool:
        """Return whether it says anything: a second one does not."""
        # Nobody has got what was not sent.
        last = min(number, session.number)
        if last <= session.acknowledged:
            return False
        session.acknowledged = last
        if session.is_synced:
            kept.contact(name)["pending"] = False
            self._failures.pop(name, None)
        return True

    # -- What goes out -----------------------------------------------------------------

    def _tell(self, name: str, lists: Sequence[Record], items: Sequence[Record]) -> None:
        session = self._sessions.get(name)
        if session is None:
            self._reach(name)
            return
        session.outbox.add(lists, items)
        self._tell_on(session)

    def _tell_on(self, session: Session) -> None:
        """Tell as much as may be under way; acknowledgements make room for the rest."""
        while session.may_tell and not session.channel.is_closed:
            session.number += 1
            part = session.outbox.take()
            self._send(session, {"type": "changes", "number": session.number, **part})

    def _send(self, session: Session, message: Mapping[str, Any]) -> None:
        session.last_s = self._now_s()
        try:
            session.channel.send(json.dumps(message, ensure_ascii=False), timeout_s=SEND_S)
        except TimeoutError:
            session.channel.close()
        except ConnectoidError:
            # A closed channel will say so itself.
            pass

    def _pass_on(
        self, lists: Sequence[Record], items: Sequence[Record], but: str = "",
    ) -> None:
        """Tell all contacts of these lists but the one that they came from."""
        for name, contact in self._keeper.load().contacts.items():
            shared = set(contact["lists"])
            their_lists = [one for one in lists if one["id"] in shared]
            their_items = [one for one in items if one["list"] in shared]
            if name != but and (their_lists or their_items):
                self._tell(name, their_lists, their_items)

    def _look_at_file(self) -> None:
        """Send what another process has changed in the file."""
        lists, items = self._keeper.news()
        if lists or items:
            self._pass_on(lists, items)

    def _rest(self) -> None:
        """Disconnect where nothing has happened for a while."""
        for session in list(self._sessions.values()):
            if self._now_s() - session.last_s > IDLE_S:
                session.channel.close()

    def _end(self, name: str, session: Session) -> None:
        if self._sessions.get(name) is not session:
            return
        del self._sessions[name]
        self._say(f"{name}: disconnected.")
        if not self._keeper.load().contacts.get(name, {}).get("pending"):
            return
        failures = self._failures.get(name, 0)
        self._failures[name] = failures + 1
        pause_s = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
        self._due_s[name] = self._now_s() + pause_s
        if pause_s:
            self._say(
                f"{name}'s app does not confirm the changes."
                f" They are sent again in {pause_s / 60:.0f} min.")

    def _reach_again(self) -> None:
        """Reach those whose pause is over."""
        due = [name for name, due_s in self._due_s.items() if self._now_s() >= due_s]
        for name in due:
            del self._due_s[name]
            self._reach(name)


def merge_from(name: str, kept: Lists, changes: Record, batch: Batch) -> int:
    """Merge what a contact says, and return how many lists and items were not kept."""
    contact = kept.contact(name)

    def may_write(list_id: str, is_new: bool) -> bool:
        has_room = len(contact["theirs"]) < MAX_LISTS_OF_CONTACT
        if is_new and has_room and list_id not in contact["lists"]:
            contact["lists"].append(list_id)
            contact["theirs"].append(list_id)
        return list_id in contact["lists"]

    room = kept.room_in(contact["lists"])
    lists, items = kept.merge(changes, may_write, room)
    # What found no room is not shared: somebody else may bring a list of that id later.
    lost = {one["id"] for one in changes["lists"]} - kept.lists.keys()
    for member in ("lists", "theirs"):
        contact[member] = [one for one in contact[member] if one not in lost]
    kept.note_pending({list_of(one) for one in [*lists, *items]}, but=name)
    batch.lists += lists
    batch.items += items
    return room.refused


def delete_for(name: str, kept: Lists) -> None:
    """Delete what only a contact has shared, who wants it."""
    contact = kept.contact(name)
    kept.contacts.pop(name)
    theirs = set(contact["theirs"])
    for other in kept.contacts.values():
        theirs.difference_update(other["lists"])
    kept.forget(theirs)


# ---------------------------------------------------------------------------------------
# Commands. Each returns the exit code.
# ---------------------------------------------------------------------------------------


def say(words: str) -> None:
    """Tell people what happens."""
    print(shown(words, len(words)), file=sys.stderr, flush=True)


def open_link(arguments: argparse.Namespace) -> int:
    """Connect with whoever made a link, and get the lists."""
    peer = peer_of(arguments)
    until_s = time.monotonic() + PAIR_FOR_S

    def is_over() -> bool:
        is_ended = peer.kept(arguments.name).state == "ended"
        return is_ended or peer.is_synced(arguments.name) or time.monotonic() > until_s

    peer.run(is_over, (arguments.link, arguments.name))
    kept = peer.kept(arguments.name)
    if kept.state == "ended":
        raise ValueError(EVENTS[kept.why])
    if kept.state != "paired":
        raise ValueError(
            f"{arguments.name}'s app has not answered yet; it has to be open."
            " `run` goes on to try.")
    emoji = "   ".join(" ".join(EMOJI[index]) for index in kept.comparison)
    print("Compare by voice:", emoji)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Sync until Ctrl-C."""
    say("Syncing. Ctrl-C ends.")
    peer_of(arguments).run()
    return 0


def renew(arguments: argparse.Namespace) -> int:
    """Have a new key for a contact."""
    peer_of(arguments).renew(arguments.name)
    return 0


def peer_of(arguments: argparse.Namespace) -> Peer:
    """Return the peer of a folder."""
    runner = Connectoid(
        Store(arguments.dir / "shopping_list.db"), [], AiortcAdapter(),
        ice_servers=arguments.ice_servers, app=APP)
    runner.allow_private_relays = arguments.allow_private_relays
    return Peer(arguments.keeper, runner, say)


def show(arguments: argparse.Namespace) -> int:
    """Print all lists."""
    lists = arguments.keeper.load()
    for one in lists.open_lists():
        print(shown(one["name"]))
        for item in lists.items_of(one["id"]):
            line = shown(item["text"])
            if item["quantity"]:
                line += f" ({shown(item['quantity'])})"
            mark = " "
            if item["done"]:
                mark = "x"
            print(f"  [{mark}] {line}")
    return 0


def add(arguments: argparse.Namespace) -> int:
    """Put something on a list."""
    with arguments.keeper.changing() as lists:
        if not lists.open_lists():
            raise ValueError("There is no list yet: open a link first.")
        chosen = lists.open_lists()[0]
        if arguments.list:
            chosen = find(lists.open_lists(), "name", arguments.list)
        quantity = ""
        if arguments.quantity:
            quantity = tidy(arguments.quantity, MAX_QUANTITY_CHARS)
        now_s = time.time()
        item = {
            "id": new_id(now_s),
            "list": chosen["id"],
            "text": tidy(arguments.text, MAX_TEXT_CHARS),
            "quantity": quantity,
            "done": False,
            "updatedAt": 0,
            "by": "",
            "deleted": False,
        }
        lists.change(item, now_s)
    say(f"{item['text']} is on the list {chosen['name']}.")
    return 0


def done(arguments: argparse.Namespace) -> int:
    """Mark something as done."""
    with arguments.keeper.changing() as lists:
        items: list[Record] = []
        for one in lists.open_lists():
            items += [item for item in lists.items_of(one["id"]) if not item["done"]]
        found = find(items, "text", arguments.text)
        lists.change({**found, "done": True}, time.time())
    say(f"{found['text']} is done.")
    return 0


def find(records: Iterable[Record], member: str, text: str) -> Record:
    """Return the record with this text, capitals aside; raise ValueError."""
    for record in records:
        if record[member].casefold() == text.casefold():
            return record
    raise ValueError(f'There is no "{text}".')


def ice_servers_file(path: str) -> list[Any]:
    """Return the servers in a file."""
    try:
        return load_ice_servers(path)
    except ConnectoidError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="where the files are (default: here)")
    parser.add_argument(
        "--allow-private-relays", action="store_true",
        help="use relays on this machine and in private networks, such as one at home")
    parser.add_argument(
        "--ice-servers", metavar="FILE", type=ice_servers_file, default=[],
        help="a JSON file that only you can read, with a list of STUN and TURN servers:"
        ' {"urls": "turn:HOST:PORT", "username": ..., "credential": ...}')
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("open", help="connect with whoever made a link")
    command.add_argument("link")
    command.add_argument("--name", required=True, help="what you call this person")
    command.set_defaults(work=open_link)
    commands.add_parser("run", help="sync until Ctrl-C").set_defaults(work=run)
    commands.add_parser("list", help="print all lists").set_defaults(work=show)
    command = commands.add_parser("add", help="put something on a list")
    command.add_argument("text")
    command.add_argument("--quantity", default="")
    command.add_argument("--list", default="", help="its name (default: the first)")
    command.set_defaults(work=add)
    command = commands.add_parser("done", help="mark something as done")
    command.add_argument("text")
    command.set_defaults(work=done)
    command = commands.add_parser(
        "renew", help="have a new key for a person, if somebody has a copy of these files")
    command.add_argument("name")
    command.set_defaults(work=renew)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = parse(argv)
    try:
        work: Callable[[argparse.Namespace], int] = arguments.work
        with contextlib.closing(Keeper(arguments.dir)) as arguments.keeper:
            return work(arguments)
    except (ConnectoidError, OSError, ValueError, sqlite3.Error) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
