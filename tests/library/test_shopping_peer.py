"""The shopping list's peer.py against contacts that take nothing, say too much or never confirm."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peer
import pytest
from apps import APP_URL, SOON_S, Apps, Wire, Wires, make_record, until

from connectoid import Connectoid, ContactRecord, NotConnectedError, Store
from connectoid.limits import MAX_JSON_LEVELS

NOW_MS = 1_700_000_000_000


def make_list(list_id: str) -> dict[str, Any]:
    """Return a list."""
    return {"id": list_id, "name": list_id, "updatedAt": NOW_MS, "by": "device-1", "deleted": False}


def make_item(item_id: str, list_id: str, text: str = "Milk") -> dict[str, Any]:
    """Return an item."""
    return {
        "id": item_id, "list": list_id, "text": text, "quantity": "", "done": False,
        "updatedAt": NOW_MS, "by": "device-1", "deleted": False}


def changes(number: int, *, lists: Any = (), items: Any = ()) -> str:
    """Return a message with changes."""
    message = {"type": "changes", "number": number, "lists": [*lists], "items": [*items]}
    return json.dumps(message)


def ack(number: int) -> str:
    """Return an acknowledgement."""
    return json.dumps({"type": "ack", "number": number})


class FakeChannel:
    """A channel that notes what is sent, and brings what a test says."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.is_closed = False
        self._listener: Callable[[str | None], object] = print

    def send(self, message: str, timeout_s: float) -> None:
        """Note a message; raise NotConnectedError."""
        assert timeout_s == peer.SEND_S
        if self.is_closed:
            raise NotConnectedError
        self.sent.append(json.loads(message))

    def listen(self, listener: Callable[[str | None], object]) -> None:
        """Bring what comes there."""
        self._listener = listener

    def bring(self, *messages: str) -> None:
        """Be the contact who says something."""
        for message in messages:
            self._listener(message)

    def close(self) -> None:
        """End it."""
        if not self.is_closed:
            self.is_closed = True
            self._listener(None)


class FakeRunner:
    """A Connectoid with one contact, Bob, who is reached at once."""

    def __init__(self) -> None:
        self.on_event: Callable[[str, str], object] = print
        self.channel = FakeChannel()
        self.reached = 0
        self.key_news = ""
        self.answers = True
        self.renewed: list[str] = []

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def contacts(self) -> list[ContactRecord]:
        """Return Bob."""
        return [replace(make_record("Bob"), state="paired", key_news=self.key_news)]

    def connect(self, name: str, timeout_s: float) -> FakeChannel:
        """Return the channel, and tell of a new one."""
        if self.channel.is_closed or not self.reached:
            self.reached += 1
            self.channel = FakeChannel()
            self.on_event(name, "connected")
        return self.channel

    def renew_and_tell(self, name: str, timeout_s: float) -> bool:
        """Note it; return whether Bob answers."""
        self.renewed.append(name)
        return self.answers


class Home:
    """A peer with a fake runner and a fake clock."""

    def __init__(self, keeper: peer.Keeper) -> None:
        self.keeper = keeper
        self.runner = FakeRunner()
        self.said: list[str] = []
        self.now_s = 0.0
        self._peer = peer.Peer(
            keeper, cast(Connectoid, self.runner), self.said.append, lambda: self.now_s)

    def run(self, steps: Iterator[None]) -> None:
        """Run, and before each turn do one step."""
        self._peer.run(lambda: next(steps, True) is not None)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Return a peer who shares a list with Bob."""
    with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
        with keeper.changing() as lists:
            lists.merge({"lists": [make_list("list-0001")], "items": []})
            lists.contact("Bob")["lists"].append("list-0001")
            lists.contact("Bob")["pending"] = True
        yield Home(keeper)


@pytest.mark.parametrize(
    ("news", "says"), [("renewed", "has a new key"), ("copied", "Two devices"), ("", "")]
)
def test_news_of_a_key_that_came_before_are_told_at_the_start(
    home: Home, news: str, says: str
) -> None:
    home.runner.key_news = news
    home.run(iter(()))
    told = [words for words in home.said if "copy of its device" in words]
    assert len(told) == bool(news)
    assert says in "".join(told)


def test_no_more_is_under_way_than_is_acknowledged(home: Home) -> None:
    items = [make_item(f"item-{number:04}", "list-0001", "x" * 200) for number in range(1_900)]
    with home.keeper.changing() as lists:
        lists.merge({"lists": [], "items": items})

    def steps() -> Iterator[None]:
        yield
        sent = home.runner.channel.sent
        assert len(sent) == peer.MAX_UNACKNOWLEDGED
        # What was never sent has nobody got.
        for number, under_way in [(1, 9), (1, 9), (2, 10), (2**53 - 1, 10 + 4)]:
            home.runner.channel.bring(ack(number))
            yield
            assert len(sent) == under_way
        assert [len(json.dumps(part)) <= peer.MESSAGE_BYTES + 100 for part in sent] == [True] * 14
        assert [one for part in sent for one in part["items"]] == items

    home.run(steps())


@pytest.mark.parametrize(("count", "is_closed"), [
    (peer.MAX_CAME - 1, False), (peer.MAX_CAME, False), (peer.MAX_CAME + 1, True)])
def test_contact_who_says_more_than_is_taken_loses_the_connection(
    home: Home, count: int, is_closed: bool,
) -> None:
    def steps() -> Iterator[None]:
        yield
        channel = home.runner.channel
        channel.bring(*["{}"] * count)
        assert channel.is_closed == is_closed
        # The end is among what came.
        yield

    home.run(steps())


def test_messages_that_wait_are_taken_together_and_told_in_one_line(home: Home) -> None:
    messages = [
        changes(number, items=[make_item(f"item-{number:04}", "list-0001")])
        for number in range(1, peer.MAX_BATCH + 2)]

    def steps() -> Iterator[None]:
        yield
        home.runner.channel.bring(*messages)
        yield
        yield
        acks = [one["number"] for one in home.runner.channel.sent if one["type"] == "ack"]
        assert acks == [*range(1, peer.MAX_BATCH + 2)]

    home.run(steps())
    assert home.said == [
        "Bob: connected.",
        f"Bob: 0 lists and {peer.MAX_BATCH} items are new.",
        "Bob: 0 lists and 1 items are new.",
    ]


@pytest.mark.parametrize(("missing", "is_taken"), [(2, True), (1, True), (0, False)])
def test_list_that_finds_no_room_is_not_shared_with_who_brought_it(
    home: Home, missing: int, is_taken: bool,
) -> None:
    full = [make_list(f"list-{number:04}") for number in range(1, peer.MAX_LISTS + 1 - missing)]
    with home.keeper.changing() as lists:
        lists.merge({"lists": full, "items": []})

    def steps() -> Iterator[None]:
        yield
        home.runner.channel.bring(changes(1, lists=[make_list("list-carol-1")]))
        yield

    home.run(steps())
    bob = home.keeper.load().contact("Bob")
    assert ("list-carol-1" in bob["lists"]) == is_taken
    assert ("list-carol-1" in bob["theirs"]) == is_taken


def test_acknowledgement_counts_once(home: Home) -> None:
    def steps() -> Iterator[None]:
        yield
        message = json.dumps({"type": "ack", "number": 1, "refused": 500})
        home.runner.channel.bring(message, message, message)
        yield

    home.run(steps())
    assert home.said == ["Bob: connected.", "Bob's app has not taken 500 lists and items."]


@pytest.mark.slow
def test_contact_who_never_confirms_is_reached_ever_more_seldom(home: Home) -> None:
    reached = []

    def steps() -> Iterator[None]:
        for pause_s in [*peer.PAUSES_S, peer.PAUSES_S[-1]]:
            yield
            home.runner.channel.close()
            yield
            home.now_s += pause_s - 0.5
            yield
            reached.append(home.runner.reached)
            home.now_s += 0.5
            yield

    home.run(steps())
    # The first time at once.
    assert reached == [2, 2, 3, 4, 5]
    assert home.said[-1].startswith("Bob's app does not confirm the changes.")


def test_contact_who_confirms_is_reached_at_once_the_next_time(home: Home) -> None:
    def steps() -> Iterator[None]:
        yield
        home.runner.channel.close()
        yield
        yield
        assert home.runner.reached == 2
        home.runner.channel.bring(ack(1))
        yield
        with home.keeper.changing() as lists:
            lists.contact("Bob")["pending"] = True
        home.runner.channel.close()
        yield
        yield
        assert home.runner.reached == 3

    home.run(steps())


@pytest.mark.parametrize(
    ("levels", "is_read"),
    [(MAX_JSON_LEVELS - 1, True), (MAX_JSON_LEVELS, True), (MAX_JSON_LEVELS + 1, False)])
def test_message_has_so_many_levels_of_arrays_and_objects(levels: int, is_read: bool) -> None:
    more = "[" * (levels - 1) + '"}]"' + "]" * (levels - 1)
    text = f'{{"type": "later", "more": {more}}}'
    if is_read:
        assert peer.read_message(text) is None
    else:
        with pytest.raises(ValueError, match="This is not JSON"):
            peer.read_message(text)


@pytest.mark.parametrize(("left", "is_taken"), [(206, True), (205, True), (204, False)])
def test_contact_adds_so_many_bytes_of_names_of_lists(left: int, is_taken: bool) -> None:
    room = peer.Room(0, left)
    named = {**make_list("list-0001"), "name": "Käse"}
    taken, _ = peer.Lists().merge({"lists": [named], "items": []}, room=room)
    assert len(taken) == is_taken
    assert (room.bytes, room.refused) == (left - 205 * is_taken, 1 - is_taken)


@pytest.mark.parametrize(
    ("left", "name", "is_taken"), [(0, "Käse", False), (1, "Käse", True), (0, "Oil", True)])
def test_contact_may_make_the_bytes_of_a_name_fewer(
    left: int, name: str, is_taken: bool
) -> None:
    lists = peer.Lists()
    known = {**make_list("list-0001"), "name": "Milk"}
    lists.merge({"lists": [known], "items": []})
    before = lists.room_in([known["id"]]).bytes
    assert before == peer.MAX_BYTES_OF_CONTACT - 204
    renamed = {**known, "name": name, "updatedAt": NOW_MS + 1}
    taken, _ = lists.merge({"lists": [renamed], "items": []}, room=peer.Room(0, left))
    assert len(taken) == is_taken
    lists.forget([known["id"]])
    assert lists.room_in([known["id"]]).bytes == peer.MAX_BYTES_OF_CONTACT


class StuckWire(Wire):
    """An adapter whose messages to all but the first contact never leave."""

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        self.stuck = threading.Event()

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Write what the library says. An app's message for Mallory waits for ever."""
        if contact != min(self._ends) and '"type"' in str(message):
            self.stuck.set()
            await self._loop.create_future()
        await super().write(contact, attempt_id, message)


@pytest.mark.sockets
def test_contact_who_takes_nothing_holds_up_nobody(
    apps: Apps, relay_url: str, tmp_path: Path,
) -> None:
    bob = apps.begin("Bob", relay_url, app=peer.APP)
    mallory = apps.begin("Mallory", relay_url, app=peer.APP)
    wire = StuckWire(apps.wires)
    runner = Connectoid(Store(tmp_path / "home.db"), [], wire, app=peer.APP)
    runner.allow_private_relays = True
    links = {name: app.share("Home", APP_URL) for name, app in (("Bob", bob), ("Mallory", mallory))}
    is_over = threading.Event()

    def serve() -> None:
        with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
            home = peer.Peer(keeper, runner, lambda words: None)
            home.run(is_over.is_set, (links["Bob"], "Bob"))

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    channel = bob.connect("Home", SOON_S)
    runner.open(links["Mallory"], "Mallory")
    theirs = mallory.connect("Home", SOON_S)
    for number in range(1, 40):
        theirs.send(changes(number, lists=[make_list(f"list-m-{number:04}")]))
    assert wire.stuck.wait(SOON_S)
    until(lambda: theirs.is_closed, "closed")
    channel.send(changes(1, lists=[make_list("list-0001")]))
    while json.loads(channel.receive(SOON_S))["type"] != "ack":
        # It is what the peer says first.
        pass
    is_over.set()
    serving.join(SOON_S)
    assert not serving.is_alive()


# -- A copy of the files -------------------------------------------------------------------


def of_home(home: Home) -> peer.Peer:
    """Return the peer of a home."""
    return peer.Peer(home.keeper, cast(Connectoid, home.runner), home.said.append)


def test_renewal_that_is_answered_is_told(home: Home) -> None:
    of_home(home).renew("Bob")
    assert home.runner.renewed == ["Bob"]
    assert home.said[-1] == "Bob's app takes nothing any more from copies of these files."


def test_renewal_without_an_answer_says_what_goes_on(home: Home) -> None:
    home.runner.answers = False
    with pytest.raises(ValueError, match="`run` goes on"):
        of_home(home).renew("Bob")


def test_renewal_for_nobody_is_told(home: Home) -> None:
    with pytest.raises(ValueError, match='no contact "Eve"'):
        of_home(home).renew("Eve")
    assert home.runner.renewed == []


def test_command_renews_for_the_contact_that_it_names() -> None:
    arguments = peer.parse(["renew", "Alice"])
    assert (arguments.work, arguments.name) == (peer.renew, "Alice")


@pytest.mark.sockets
def test_contact_knows_the_new_key_of_the_peer(
    apps: Apps, relay_url: str, tmp_path: Path,
) -> None:
    bob = apps.begin("Bob", relay_url, app=peer.APP)
    link = bob.share("Home", APP_URL)

    def begin() -> Connectoid:
        store = Store(tmp_path / "home.db")
        runner = Connectoid(store, [], apps.wires.adapter(), app=peer.APP)
        runner.allow_private_relays = True
        return runner

    with begin() as runner:
        runner.open(link, "Bob")
        runner.connect("Bob", SOON_S)
        (before,) = runner.contacts()
    said: list[str] = []
    with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
        peer.Peer(keeper, begin(), said.append).renew("Bob", SOON_S)
    (theirs,) = bob.contacts()
    assert theirs.contact != before.signer
    assert theirs.former_contact == before.signer
    assert "takes nothing any more" in said[-1]
