"""Keep a copy of shared shopping lists on a computer that is always on, such as a Raspberry Pi at home.

    python peer.py open LINK --name Alice      # a link from the page's "Share"
    python peer.py run                         # sync, until Ctrl-C
    python peer.py list
    python peer.py add "Olive oil" --quantity "1 l"
    python peer.py done "Olive oil"

`list`, `add` and `done` work on the file alone: a running peer sees the change and sends it. The lists are in
shopping_list.json, the keys in shopping_list.db (--dir says where). It needs connectoid.py with aiortc: in a checkout
`pip install '.[webrtc]'`. The messages and the rules of merging are those of model.js.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import queue
import re
import secrets
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout's root, if connectoid is not installed

from connectoid import EMOJI, EVENTS, AiortcAdapter, Channel, Connectoid, ConnectoidError, Kept, Store

# ---------------------------------------------------------------------------------------
# Limits: those of model.js and sync.js.
# ---------------------------------------------------------------------------------------

MAX_LISTS = 200
MAX_LISTS_OF_CONTACT = 50
MAX_ITEMS = 2_000  # of a list
MAX_NAME_CHARS = 60
MAX_TEXT_CHARS = 200
MAX_QUANTITY_CHARS = 20
MAX_AT = 2**52
MAX_NUMBER = 2**53 - 1
MAX_MESSAGE_CHARS = 65_536
MESSAGE_BYTES = 48_000
MAX_RECORDS = 500
MAX_REFUSED = 20
IDLE_S = 20.0
LOOK_EVERY_S = 0.5  # at the file, for what another process has changed
PAIR_FOR_S = 600.0  # `open` waits so long for the other to be there

ID = re.compile(r"[A-Za-z0-9_-]{8,40}")
UNPRINTABLE = re.compile("[\u2028-\u202e\u2066-\u2069]")

Record = dict[str, Any]
Changes = tuple[list[Record], list[Record]]  # lists, items


# ---------------------------------------------------------------------------------------
# What comes from outside: checked member by member, copied, or thrown away whole.
# ---------------------------------------------------------------------------------------


def must(condition: object) -> None:
    """Raise ValueError unless it holds."""
    if not condition:
        raise ValueError("This is no message of a shopping list.")


def is_text(text: object, max_chars: int) -> bool:
    """Return whether it may be shown: short enough, without control characters."""
    if not isinstance(text, str) or len(text) > max_chars or UNPRINTABLE.search(text):
        return False
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in text)


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
    must(is_integer(record.get("updatedAt"), 0, MAX_AT) and isinstance(record.get("deleted"), bool))


def check_list(record: Any) -> Record:
    """Return a list as it may be kept; raise ValueError."""
    check_record(record)
    must(is_text(record.get("name"), MAX_NAME_CHARS) and (record["name"] or record["deleted"]))
    return {name: record[name] for name in ("id", "name", "updatedAt", "by", "deleted")}


def check_item(record: Any) -> Record:
    """Return an item as it may be kept; raise ValueError."""
    check_record(record)
    must(is_id(record.get("list")) and isinstance(record.get("done"), bool))
    must(is_text(record.get("text"), MAX_TEXT_CHARS) and is_text(record.get("quantity"), MAX_QUANTITY_CHARS))
    must(record["text"] or record["deleted"])
    return {name: record[name] for name in ("id", "list", "text", "quantity", "done", "updatedAt", "by", "deleted")}


def read_message(text: bytes | str) -> Record | None:
    """Return a message that came, None for a type of later versions; raise ValueError."""
    must(isinstance(text, str) and len(text) <= MAX_MESSAGE_CHARS)
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("This is not JSON.") from None
    must(isinstance(message, dict) and isinstance(message.get("type"), str))
    kind, number = message["type"], message.get("number")
    if kind not in ("changes", "ack", "bye"):
        return None
    must(is_integer(number, 1, MAX_NUMBER))
    if kind != "changes":
        return {"type": kind, "number": number} | ({"delete": message.get("delete") is True} if kind == "bye" else {})
    lists, items = message.get("lists"), message.get("items")
    must(isinstance(lists, list) and isinstance(items, list) and len(lists) + len(items) <= MAX_RECORDS)
    return {"type": kind, "number": number, "lists": [check_list(one) for one in lists],
            "items": [check_item(one) for one in items]}


def write_changes(lists: Iterable[Record], items: Iterable[Record]) -> list[dict[str, list[Record]]]:
    """Return what goes into one message each, lists before their items; at least one."""
    parts: list[dict[str, list[Record]]] = [{"lists": [], "items": []}]
    room = MESSAGE_BYTES
    for kind, record in [*(("lists", one) for one in lists), *(("items", one) for one in items)]:
        octets = len(json.dumps(record)) + 1
        if octets > room or sum(map(len, parts[-1].values())) >= MAX_RECORDS:
            parts.append({"lists": [], "items": []})
            room = MESSAGE_BYTES
        parts[-1][kind].append(record)
        room -= octets
    return parts


# ---------------------------------------------------------------------------------------
# The lists, as model.js has them, and the file. Other processes may write it: every change
# is made between reading and writing it, under a lock.
# ---------------------------------------------------------------------------------------


def is_newer(one: Record, other: Record) -> bool:
    """Return whether one of two versions of a record wins."""
    return bool((one["updatedAt"], one["by"]) > (other["updatedAt"], other["by"]))


def list_of(record: Record) -> str:
    """Return the id of the list that a list or an item belongs to."""
    return str(record.get("list", record["id"]))


def tidy(text: str, max_chars: int) -> str:
    """Return text that a person typed as it may be kept; raise ValueError for none."""
    clean = " ".join("".join(char if is_text(char, 1) else " " for char in text).split())[:max_chars].strip()
    if not clean:
        raise ValueError("Write something first.")
    return clean


@dataclass
class Lists:
    """What the file holds. A contact has `lists` that are shared with it, `theirs` that came from it, `pending`."""

    device: str = field(default_factory=lambda: secrets.token_urlsafe(8))
    lists: dict[str, Record] = field(default_factory=dict)
    items: dict[str, Record] = field(default_factory=dict)
    contacts: dict[str, Record] = field(default_factory=dict)
    last_at: int = 0

    @classmethod
    def from_json(cls, text: str) -> Lists:
        """Return what a file holds; raise ValueError for a damaged one."""
        kept = json.loads(text)
        return cls(kept["device"], {one["id"]: check_list(one) for one in kept["lists"]},
                   {one["id"]: check_item(one) for one in kept["items"]}, kept["contacts"], kept["last_at"])

    def to_json(self) -> str:
        """Return what goes into the file."""
        kept = {"device": self.device, "lists": list(self.lists.values()), "items": list(self.items.values()),
                "contacts": self.contacts, "last_at": self.last_at}
        return json.dumps(kept, ensure_ascii=False, indent=1)

    def open_lists(self) -> list[Record]:
        """Return the lists that are not deleted, in the order in which they were made."""
        return sorted((one for one in self.lists.values() if not one["deleted"]), key=lambda one: str(one["id"]))

    def items_of(self, list_id: str) -> list[Record]:
        """Return the items of a list that are not deleted, in the order in which they were added."""
        return sorted((one for one in self.items.values() if one["list"] == list_id and not one["deleted"]),
                      key=lambda one: str(one["id"]))

    def all_of(self, ids: Iterable[str]) -> Changes:
        """Return all that is known of these lists, tombstones too."""
        wanted = set(ids)
        return ([one for one in self.lists.values() if one["id"] in wanted],
                [one for one in self.items.values() if one["list"] in wanted])

    def contact(self, name: str) -> Record:
        """Return what is kept of a contact; a new one lacks nothing."""
        return self.contacts.setdefault(name, {"lists": [], "theirs": [], "pending": False})

    def merge(self, changes: Record, may_write: Callable[[str, bool], bool] = lambda list_id, is_new: True) -> Changes:
        """Take what is newer, and return that; see model.js."""
        lists = [one for one in changes["lists"] if may_write(one["id"], one["id"] not in self.lists)
                 and self._put(self.lists, one, len(self.lists) < MAX_LISTS)]
        items = [one for one in changes["items"] if one["list"] in self.lists and may_write(one["list"], False)
                 and self._put(self.items, one, self._count_of(one["list"]) < MAX_ITEMS)]
        return lists, items

    def change(self, record: Record, now_s: float) -> Record:
        """Keep a record that was changed here, newer than what was there, and note who lacks it."""
        self.last_at = max(int(now_s * 1000), self.last_at + 1)
        record = {**record, "by": self.device, "updatedAt": min(MAX_AT, max(self.last_at, record["updatedAt"] + 1))}
        (self.items if "list" in record else self.lists)[record["id"]] = record
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
        for one in items:
            del self.items[one["id"]]

    def _put(self, records: dict[str, Record], record: Record, has_room: bool) -> bool:
        known = records.get(record["id"])
        if known is None and not has_room:
            return False
        if known is not None and (known.get("list") != record.get("list") or not is_newer(record, known)):
            return False
        records[record["id"]] = record
        return True

    def _count_of(self, list_id: str) -> int:
        return sum(one["list"] == list_id for one in self.items.values())


def new_id(now_s: float) -> str:
    """Return an id that begins with the time, so that their order is that of making."""
    digits, rest = "", int(now_s * 1000)
    while rest:
        rest, digit = divmod(rest, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return f"{digits.rjust(9, '0')}-{secrets.token_urlsafe(8)}"


class Keeper:
    """The file, written whole: after a power cut it holds what it held before or after."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = directory / "shopping_list.json"
        self._lock_path = directory / "shopping_list.lock"

    def load(self) -> Lists:
        """Return what the file holds; raise ValueError for a damaged one."""
        try:
            return Lists.from_json(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Lists()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): move it away, and open a new link.") from None

    @contextlib.contextmanager
    def changing(self) -> Iterator[Lists]:
        """Hold the lock, and write what the block has changed."""
        with self._lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lists = self.load()
            before = lists.to_json()
            yield lists
            if (after := lists.to_json()) != before or not self.path.exists():
                self._write(after)

    def stamp(self) -> tuple[int, int]:
        """Return what changes with the file."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_mtime_ns, status.st_ino  # inodes alone are used again, at once

    def _write(self, text: str) -> None:
        number, name = tempfile.mkstemp(dir=self.path.parent, prefix=".shopping_list")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(self.path)


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


class Peer:
    """Sync the lists of a file with all contacts."""

    def __init__(self, keeper: Keeper, store: Store, say: Callable[[str], None]) -> None:
        self._keeper, self._say = keeper, say
        self._came: queue.Queue[tuple[str, Any, Any]] = queue.Queue()
        self.runner = Connectoid(store, [], AiortcAdapter(), on_event=self._note_event)
        self._sessions: dict[str, Session] = {}
        self._sent: dict[str, tuple[int, str]] = {}  # what was said or heard last of each record
        self._stamp = (0, 0)

    def run(self, until: Callable[[], bool] = lambda: False, link: tuple[str, str] | None = None) -> None:
        """Sync until Ctrl-C, or until something holds; begin with opening a link, for a contact of this name."""
        with self.runner:
            self._note_all()
            if link:
                self.runner.open(*link)
            for kept in self.runner.contacts():
                self._reach(kept.name)
            while not until():
                with contextlib.suppress(queue.Empty):
                    self._take(*self._came.get(timeout=LOOK_EVERY_S))
                self._look_at_file()
                self._rest()

    def kept(self, name: str) -> Kept:
        """Return what Connectoid keeps of a contact; raise ValueError if there is none."""
        for kept in self.runner.contacts():
            if kept.name == name:
                return kept
        raise ValueError(f'There is no contact "{name}".')

    def is_synced(self, name: str) -> bool:
        """Return whether a contact has sent its lists, and has ours."""
        session, lists = self._sessions.get(name), self._keeper.load()
        return bool(session and session.acknowledged >= session.number > 0 and lists.contact(name)["lists"])

    # -- What Connectoid says ----------------------------------------------------------

    def _note_event(self, name: str, event: str) -> None:
        self._came.put((name, event, None))

    def _take(self, name: str, event: Any, text: Any) -> None:
        if isinstance(event, Session):
            self._hear(name, event, text)
        elif event == "connected":
            self._serve(name)
        elif event != "disconnected":
            self._say(f"{name}: {EVENTS[event]}")

    def _reach(self, name: str) -> None:
        """Want a connection; the event tells when it is there."""
        if any(kept.name == name and kept.state == "paired" for kept in self.runner.contacts()):
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
        session = self._sessions[name] = Session(channel, time.monotonic())
        self._say(f"{name}: connected.")
        channel.listen(lambda text: self._came.put((name, session, text)))
        lists = self._keeper.load()
        self._tell(name, *lists.all_of(lists.contact(name)["lists"]))

    def _hear(self, name: str, session: Session, text: Any) -> None:
        if text is None:
            self._end(name, session)
            return
        session.last_s = time.monotonic()
        try:
            message = read_message(text)
        except ValueError:
            session.refused += 1
            if session.refused > MAX_REFUSED:
                session.channel.close()
            return
        if message is None:
            return
        {"ack": self._acknowledge, "changes": self._merge, "bye": self._obey}[message["type"]](name, session, message)
        if message["type"] != "ack":
            self._send(session, {"type": "ack", "number": message["number"]})

    def _acknowledge(self, name: str, session: Session, message: Record) -> None:
        session.acknowledged = max(session.acknowledged, message["number"])
        if session.acknowledged >= session.number:
            with self._keeper.changing() as lists:
                lists.contact(name)["pending"] = False

    def _merge(self, name: str, session: Session, message: Record) -> None:
        with self._keeper.changing() as lists:
            contact = lists.contact(name)

            def may_write(list_id: str, is_new: bool) -> bool:
                if is_new and len(contact["theirs"]) < MAX_LISTS_OF_CONTACT and list_id not in contact["lists"]:
                    contact["lists"].append(list_id)
                    contact["theirs"].append(list_id)
                return list_id in contact["lists"]

            changed = lists.merge(message, may_write)
            lists.note_pending({list_of(one) for one in [*changed[0], *changed[1]]}, but=name)
        if sum(map(len, changed)):
            self._say(f"{name}: {len(changed[0])} lists and {len(changed[1])} items are new.")
        self._pass_on(*changed, but=name)

    def _obey(self, name: str, session: Session, message: Record) -> None:
        if not message["delete"]:
            return
        with self._keeper.changing() as lists:
            others = {one for other, contact in lists.contacts.items() if other != name for one in contact["lists"]}
            lists.forget(set(lists.contact(name)["theirs"]) - others)
            lists.contacts.pop(name)
        self._say(f"{name}: the lists are deleted, as the other app has asked for.")

    # -- What goes out -----------------------------------------------------------------

    def _tell(self, name: str, lists: Sequence[Record], items: Sequence[Record]) -> None:
        session = self._sessions.get(name)
        if session is None:
            self._reach(name)
            return
        for part in write_changes(lists, items):
            session.number += 1
            self._send(session, {"type": "changes", "number": session.number, **part})

    def _send(self, session: Session, message: Mapping[str, Any]) -> None:
        session.last_s = time.monotonic()
        with contextlib.suppress(ConnectoidError, TimeoutError):  # it is closed, and will say so
            session.channel.send(json.dumps(message, ensure_ascii=False), timeout_s=IDLE_S)

    def _pass_on(self, lists: Sequence[Record], items: Sequence[Record], but: str = "") -> None:
        """Tell all contacts of these lists but the one that they came from."""
        for record in [*lists, *items]:
            self._sent[record["id"]] = (record["updatedAt"], record["by"])
        for name, contact in self._keeper.load().contacts.items():
            shared = set(contact["lists"])
            theirs = ([one for one in lists if one["id"] in shared], [one for one in items if one["list"] in shared])
            if name != but and any(theirs):
                self._tell(name, *theirs)

    def _look_at_file(self) -> None:
        """Send what another process has changed in the file."""
        if self._keeper.stamp() == self._stamp:
            return
        self._stamp = self._keeper.stamp()  # before it is read: what is written in between is seen next time
        lists = self._keeper.load()

        def news(records: Mapping[str, Record]) -> list[Record]:
            return [one for one in records.values() if self._sent.get(one["id"]) != (one["updatedAt"], one["by"])]

        self._pass_on(news(lists.lists), news(lists.items))

    def _note_all(self) -> None:
        self._stamp = self._keeper.stamp()
        lists = self._keeper.load()
        for one in [*lists.lists.values(), *lists.items.values()]:
            self._sent[one["id"]] = (one["updatedAt"], one["by"])

    def _rest(self) -> None:
        """Disconnect where nothing has happened for a while."""
        for session in list(self._sessions.values()):
            if time.monotonic() - session.last_s > IDLE_S:
                session.channel.close()

    def _end(self, name: str, session: Session) -> None:
        if self._sessions.get(name) is not session:
            return
        del self._sessions[name]
        self._say(f"{name}: disconnected.")
        if self._keeper.load().contacts.get(name, {}).get("pending"):
            self._reach(name)


# ---------------------------------------------------------------------------------------
# Commands. Each returns the exit code.
# ---------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Return text without what could steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def say(words: str) -> None:
    """Tell people what happens."""
    print(clean(words), file=sys.stderr, flush=True)


def open_link(arguments: argparse.Namespace) -> int:
    """Connect with whoever made a link, and get the lists."""
    peer = Peer(Keeper(arguments.dir), Store(arguments.dir / "shopping_list.db"), say)
    until_s = time.monotonic() + PAIR_FOR_S

    def is_over() -> bool:
        is_ended = peer.kept(arguments.name).state == "ended"
        return is_ended or peer.is_synced(arguments.name) or time.monotonic() > until_s

    peer.run(is_over, (arguments.link, arguments.name))
    kept = peer.kept(arguments.name)
    if kept.state == "ended":
        raise ValueError(EVENTS[kept.why])
    if kept.state != "paired":
        raise ValueError(f"{arguments.name}'s app has not answered yet; it has to be open. `run` goes on to try.")
    print("Compare by voice:", "   ".join(" ".join(EMOJI[index]) for index in kept.comparison))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Sync until Ctrl-C."""
    Peer(Keeper(arguments.dir), Store(arguments.dir / "shopping_list.db"), say).run()
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print all lists."""
    lists = Keeper(arguments.dir).load()
    for one in lists.open_lists():
        print(clean(one["name"]))
        for item in lists.items_of(one["id"]):
            quantity = f" ({clean(item['quantity'])})" if item["quantity"] else ""
            print(f"  [{'x' if item['done'] else ' '}] {clean(item['text'])}{quantity}")
    return 0


def add(arguments: argparse.Namespace) -> int:
    """Put something on a list."""
    with Keeper(arguments.dir).changing() as lists:
        if not lists.open_lists():
            raise ValueError("There is no list yet: open a link first.")
        chosen = find(lists.open_lists(), "name", arguments.list) if arguments.list else lists.open_lists()[0]
        quantity = tidy(arguments.quantity, MAX_QUANTITY_CHARS) if arguments.quantity else ""
        now_s = time.time()
        lists.change({"id": new_id(now_s), "list": chosen["id"], "text": tidy(arguments.text, MAX_TEXT_CHARS),
                      "quantity": quantity, "done": False, "updatedAt": 0, "by": "", "deleted": False}, now_s)
    return 0


def done(arguments: argparse.Namespace) -> int:
    """Mark something as done."""
    with Keeper(arguments.dir).changing() as lists:
        items = [item for one in lists.open_lists() for item in lists.items_of(one["id"]) if not item["done"]]
        lists.change({**find(items, "text", arguments.text), "done": True}, time.time())
    return 0


def find(records: Iterable[Record], member: str, text: str) -> Record:
    """Return the record with this text, capitals aside; raise ValueError."""
    for record in records:
        if record[member].casefold() == text.casefold():
            return record
    raise ValueError(f'There is no "{text}".')


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--dir", type=Path, default=Path(), help="where the files are (default: here)")
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
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = parse(argv)
    try:
        work: Callable[[argparse.Namespace], int] = arguments.work
        return work(arguments)
    except (ConnectoidError, ValueError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
