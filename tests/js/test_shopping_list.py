"""The shopping list as people use it: two browsers, a relay, a computer at home; and its rules.

SCREENSHOTS=1 writes the pictures of README.md anew. Chromium is Debian's. axe-core is looked for in
node_modules beside the example, in js/, and in NODE_PATH.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import needs
from turn_server import turn_server

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "shopping_list"
sys.path.append(str(HERE))

import peer  # noqa: E402  (a script beside this file)

from connectoid import (  # noqa: E402
    AiortcAdapter,
    Connectoid,
    Contact,
    Store,
    SystemSuite,
    parse_address,
    read_link,
)
from connectoid.clock import system_now  # noqa: E402

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

CHROMIUM = shutil.which("chromium")
NODE = shutil.which("node")
AXE = Path("axe-core/axe.min.js")
# Without these, connections within one machine need mDNS.
FLAGS = ["--no-sandbox", "--allow-loopback-in-peer-connection"]
PERMISSIONS = ["microphone", "camera", "clipboard-read", "clipboard-write"]
# A deadline for what needs a connection, which takes about a second.
CONNECT_MS = 40_000
# The same, where a relay or a device was away.
AWAY_MS = 90_000
# Of sync.js.
IDLE_S = 20

browser_test = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")
node_test = pytest.mark.skipif(NODE is None, reason="needs Node >= 20")


# ---------------------------------------------------------------------------------------
# A file server, a relay, users.
# ---------------------------------------------------------------------------------------


class Files(http.server.SimpleHTTPRequestHandler):
    """Serve files, in silence; as a server that is down while `server.is_down`."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Send a file, unless the server is down."""
        if getattr(self.server, "is_down", False):
            self.close_connection = True
            self.connection.close()
            return
        super().do_GET()


class QuietServer(http.server.ThreadingHTTPServer):
    """Serve, and say nothing of connections that break off."""

    is_down = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


def serve(directory: Path) -> Iterator[QuietServer]:
    """Serve a directory on a free port."""
    with QuietServer(
        ("127.0.0.1", 0), functools.partial(Files, directory=str(directory))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def files() -> Iterator[QuietServer]:
    """Return a server of the checkout's files."""
    yield from serve(ROOT)


class User:
    """A person with a browser of their own: a profile on disk."""

    def __init__(self, start: Callable[[], Any], url: str, relay_port: int) -> None:
        self._start = start
        self.url = url
        self.relay = f"http://127.0.0.1:{relay_port}/"
        self.requests: list[str] = []
        self.complaints: list[str] = []
        # Kept with the profile, once the page was allowed to use it.
        self.has_relay = False
        self.context: Any = None
        self.page: Any = None

    def begin(self) -> User:
        """Open the browser, and the page."""
        self.context = self._start()
        self.context.set_default_timeout(CONNECT_MS)
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.pages[0] if self.context.pages else self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(f"thrown: {error}"))
        self.visit()
        return self

    def end(self) -> None:
        """Close the browser."""
        self.context.close()

    def visit(self, url: str = "") -> None:
        """Load the page, or a link to it."""
        self.page.goto(url or f"{self.url}?relay={self.relay}")
        self.page.wait_for_selector("#list:not([hidden]), #empty:not([hidden])")
        if not url and not self.has_relay:
            self.page.click("#relay-form [type=submit]")
            self.page.wait_for_selector("#relay-dialog", state="hidden")
            self.has_relay = True

    def make_list(self, name: str) -> None:
        """Make a first list."""
        self.page.fill("#first-name", name)
        self.page.click("#first-list button")

    def add(self, text: str, quantity: str = "") -> None:
        """Put something on the list."""
        self.page.fill("#add-text", text)
        self.page.fill("#add-quantity", quantity)
        self.page.press("#add-quantity", "Enter")

    def tick(self, text: str) -> None:
        """Mark something as done, or not."""
        self.page.click(f"#list li:has-text('{text}') label")

    def sees(self, text: str, part: str = "#open-items", timeout_ms: int = CONNECT_MS) -> None:
        """Wait until a text is there."""
        # The inner text: what is hidden does not count.
        playwright.expect(self.page.locator(part)).to_contain_text(
            text, timeout=timeout_ms, use_inner_text=True
        )

    def sees_no(self, text: str, part: str = "#open-items", timeout_ms: int = CONNECT_MS) -> None:
        """Wait until a text is gone."""
        playwright.expect(self.page.locator(part)).not_to_contain_text(
            text, timeout=timeout_ms, use_inner_text=True
        )

    def share(self, name: str) -> str:
        """Return a link for somebody."""
        self.page.click("#share")
        self.page.fill("#share-name", name)
        self.page.click("#share-form [type=submit]")
        self.page.wait_for_selector("#share-url", state="visible")
        link = self.page.input_value("#share-url")
        self.page.click("#share-dialog .corner button")
        return str(link)

    def open(self, link: str, name: str) -> None:
        """Open a link, and confirm."""
        self.visit(link)
        self.page.fill("#connect-name", name)
        self.page.click("#connect-form [type=submit]")


UserMaker = Callable[..., User]

# Nothing has to be scrolled sideways.
IS_WITHIN = "document.documentElement.scrollWidth <= innerWidth"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """Return Playwright."""
    with playwright.sync_playwright() as started:
        yield started


@pytest.fixture
def make_user(
    driver: Any, files: QuietServer, start: Callable[..., Any], tmp_path: Path
) -> Iterator[UserMaker]:
    """Return a function that makes users with browsers of their own, and one relay for all."""
    users: list[User] = []
    relay = start("--db", str(tmp_path / "relay.db"))

    def make_one(**options: Any) -> User:
        profile = tmp_path / f"profile-{len(users)}"
        begin = functools.partial(
            driver.chromium.launch_persistent_context,
            str(profile),
            executable_path=CHROMIUM,
            args=FLAGS,
            permissions=PERMISSIONS,
            reduced_motion="reduce",
            **options,
        )
        users.append(
            User(begin, f"http://localhost:{files.server_port}/examples/shopping_list/", relay.port)
        )
        return users[-1].begin()

    make_one.relay = relay  # type: ignore[attr-defined]
    yield make_one
    for user in users:
        user.end()
        assert not [
            text
            for text in user.complaints
            if "Content Security Policy" in text or "thrown" in text
        ]


@pytest.fixture
def pair(make_user: UserMaker) -> tuple[User, User]:
    """Return Alice and Bob, who share a list."""
    alice, bob = make_user(), make_user()
    alice.make_list("Groceries")
    alice.add("Tomatoes", "6")
    link = alice.share("Bob")
    bob.open(link, "Alice")
    bob.sees("Tomatoes")
    return alice, bob


def wait_for_worker(page: Any) -> None:
    """Wait until the page's files are kept."""
    page.evaluate("""() => new Promise((resolve) => {
        const look = () => navigator.serviceWorker.controller && resolve();
        navigator.serviceWorker.addEventListener("controllerchange", look);
        look();
    })""")


def reads_up_to_date(user: User) -> None:
    """Wait until everything has arrived at the other's."""
    user.sees("up to date", "#people")


# ---------------------------------------------------------------------------------------
# The page's files.
# ---------------------------------------------------------------------------------------


def test_page_has_no_script_or_style_of_its_own() -> None:
    page = (HERE / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy[1]
    rest = page.replace(policy[0], "")
    assert not re.search(r"unsafe|<style|\sstyle=|\son\w+=|<script(?![^>]+src=)|javascript:", rest)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(",
        "".join(path.read_text(encoding="utf-8") for path in HERE.glob("*.js")),
    )


def list_of_worker(name: str) -> set[str]:
    """Return the files that a list in sw.js names."""
    worker = (HERE / "sw.js").read_text(encoding="utf-8")
    found = re.search(rf'const {name} = urls\("[^"]+", \[(.*?)\]\);', worker, re.DOTALL)
    assert found
    return set(re.findall(r'"([^"]+)"', found[1]))


def test_service_worker_keeps_every_file_of_the_page() -> None:
    patterns = ("*.js", "*.css", "*.svg", "*.webmanifest")
    files = {path.name for pattern in patterns for path in HERE.glob(pattern)}
    assert list_of_worker("FILES") == files - {"sw.js"} | {"./"}


def test_service_worker_keeps_every_module_of_the_library() -> None:
    library = ROOT / "js"
    paths = [*library.glob("*.js"), *library.glob("contact/*.js")]
    assert list_of_worker("MODULES") == {path.relative_to(library).as_posix() for path in paths}


def test_manifest_names_icons_that_exist() -> None:
    manifest = json.loads((HERE / "manifest.webmanifest").read_text(encoding="utf-8"))
    assert manifest["display"] == "standalone"
    assert all((HERE / icon["src"]).exists() for icon in manifest["icons"])


# ---------------------------------------------------------------------------------------
# The rules, on their own; and the same in both languages.
# ---------------------------------------------------------------------------------------


def node(script: str, value: object) -> Any:
    """Run a script as a module beside model.js; it gets `value`, and prints JSON."""
    assert NODE
    begin = """import { readFileSync } from "node:fs";
        const value = JSON.parse(readFileSync(0, "utf-8"));"""
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", begin + script],
        cwd=HERE,
        input=json.dumps(value),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@node_test
def test_model_keeps_its_promises() -> None:
    command = [str(NODE), "--test", str(ROOT / "tests" / "js" / "test_model.mjs")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@node_test
def test_qr_code_is_that_of_another_maker_in_every_version() -> None:
    segno = pytest.importorskip("segno", reason="pip install segno")
    # Full codes: segno pads others with a zero too many.
    sizes = (
        "14 26 42 62 84 106 122 152 180 213 251 287 331 362 412 450 504 560 624 666 711 "
        "779 857 911 997 1059 1125 1190 1264 1370 1452 1538 1628 1722 1809 1911 1989 2099 "
        "2213 2331"
    )
    capacities = [int(size) for size in sizes.split()]
    texts = [("https://a.example/#connectoid=" + "aZ_.-~09" * 300)[:count] for count in capacities]
    made = node(
        """import { makeQr } from "./qr.js";
        const make = (text) => makeQr(text).map((row) => row.map(Number).join(""));
        console.log(JSON.stringify(value.map(make)));""",
        texts,
    )
    for version, (text, rows) in enumerate(zip(texts, made, strict=True), 1):
        # In the format.
        mask = int(rows[8][2:5], 2) ^ 0b101
        other = segno.make(
            text, version=version, error="m", mode="byte", mask=mask, boost_error=False
        )
        assert rows == ["".join(map(str, row)) for row in other.matrix], version


MILK: dict[str, Any] = {
    "id": "item-milk",
    "list": "list-groceries",
    "text": "Milk",
    "quantity": "1 l",
    "done": False,
    "updatedAt": 5,
    "by": "device-alice",
    "deleted": False,
}
GROCERIES: dict[str, Any] = {
    "id": "list-groceries",
    "name": "Groceries",
    "updatedAt": 5,
    "by": "device-alice",
    "deleted": False,
}
CHANGES = {"type": "changes", "number": 1, "lists": [GROCERIES], "items": [MILK]}
GOOD = [
    CHANGES,
    {"type": "ack", "number": 3},
    {"type": "ack", "number": 3, "refused": 0},
    {"type": "ack", "number": 3, "refused": 499},
    {"type": "ack", "number": 3, "refused": 500},
    {"type": "bye", "number": 2, "delete": True},
    {**CHANGES, "more": 1},
    {**CHANGES, "items": [{**MILK, "text": "", "deleted": True}]},
    {**CHANGES, "items": [{**MILK, "text": "🥕" * 200}]},
    {**CHANGES, "items": [{**MILK, "text": "<img src=x onerror=alert(1)>"}]},
    {"type": "later", "number": "?"},
]
BAD: list[Any] = [
    None,
    [],
    1,
    "changes",
    {},
    {"type": 1},
    {"type": "ack"},
    {"type": "ack", "number": 0},
    {"type": "ack", "number": "1"},
    {"type": "ack", "number": True},
    {"type": "ack", "number": 2**53},
    {"type": "ack", "number": 3, "refused": -1},
    {"type": "ack", "number": 3, "refused": 501},
    {"type": "ack", "number": 3, "refused": True},
    {"type": "ack", "number": 3, "refused": None},
    {"type": "bye"},
    {**CHANGES, "lists": None},
    {**CHANGES, "items": {}},
    {**CHANGES, "items": [MILK] * 500},
    {**CHANGES, "items": [None]},
    {**CHANGES, "items": [[]]},
    *(
        {**CHANGES, "items": [{**MILK, **change}]}
        for change in (
            {"id": 1},
            {"id": "short"},
            {"id": "x" * 41},
            {"id": "item milk"},
            {"id": "item-milk\n"},
            {"list": None},
            {"text": ""},
            {"text": None},
            {"text": "🥕" * 201},
            {"text": "a\nb"},
            {"text": "\u202eklim"},
            {"text": "\ud800"},
            {"text": ["Milk"]},
            {"quantity": None},
            {"quantity": "x" * 21},
            {"quantity": 1},
            {"done": 1},
            {"done": None},
            {"updatedAt": -1},
            {"updatedAt": 2**52 + 1},
            {"updatedAt": 0.5},
            {"updatedAt": "5"},
            {"updatedAt": True},
            {"updatedAt": None},
            {"by": ""},
            {"by": None},
            {"deleted": None},
            {"deleted": 0},
        )
    ),
    *(
        {**CHANGES, "lists": [{**GROCERIES, **change}]}
        for change in (
            {"name": ""},
            {"name": "x" * 61},
            {"name": 1},
            {"name": "a\u2028b"},
            {"id": "../../etc"},
            {"deleted": "no"},
        )
    ),
]


def read_by_peer(text: str) -> Any:
    """Return what peer.py makes of a message."""
    try:
        return peer.read_message(text)
    except ValueError:
        return "refused"


@node_test
def test_messages_are_read_and_refused_alike_by_page_and_peer() -> None:
    texts = [
        *map(json.dumps, GOOD),
        *map(json.dumps, BAD),
        "",
        "{",
        "[" * 50_000,
        json.dumps(CHANGES) + " " * 65_536,
    ]
    by_page = node(
        """import { readMessage } from "./model.js";
        const read = (text) => { try { return readMessage(text); } catch (error) {
          if (error instanceof TypeError) return "refused";
          throw error;
        } };
        console.log(JSON.stringify(value.map(read)));""",
        texts,
    )
    by_peer = [read_by_peer(text) for text in texts]
    assert "refused" not in by_peer[: len(GOOD)]
    assert set(map(str, by_peer[len(GOOD) :])) == {"refused"}
    for text, one, other in zip(texts, by_page, by_peer, strict=True):
        assert one == other, text[:200]


NOW_MS = 1_800_000_000_000
DAY_MS = 86_400_000


def random_changes(chance: random.Random) -> list[dict[str, Any]]:
    """Return what several devices might say, in any order and more than once."""

    def stamp() -> dict[str, Any]:
        device = f"device-{chance.randrange(3)}"
        at = chance.choice([*range(6), NOW_MS + DAY_MS, NOW_MS + DAY_MS + 1, 2**52])
        return {"updatedAt": at, "by": device, "deleted": chance.random() < 0.2}

    changes = []
    for _ in range(30):
        lists = [
            {
                **GROCERIES,
                **stamp(),
                "id": f"list-000{chance.randrange(3)}",
                "name": f"list {chance.randrange(9)}",
            }
        ]
        items = [
            {
                **MILK,
                **stamp(),
                "id": f"item-000{chance.randrange(6)}",
                "list": f"list-000{chance.randrange(3)}",
                "text": f"thing {chance.randrange(9)}",
            }
            for _ in range(3)
        ]
        changes.append({"lists": lists[: chance.randrange(2)], "items": items})
    return changes


@node_test
def test_page_and_peer_merge_alike() -> None:
    rounds = [random_changes(random.Random(seed)) for seed in range(100)]
    by_page = node(
        """import { Model } from "./model.js";
        console.log(JSON.stringify(value.map((round) => {
          const model = new Model({ device: "device-x", now: () => 1_800_000_000_000 });
          const room = { items: 9, bytes: 4_000, refused: 0 };
          const mayWrite = (list) => list !== "list-0002";
          const taken = round.map((changes) => model.merge(changes, mayWrite, room));
          const [lists, items] = [model.lists, model.items].map((map) => [...map.values()]);
          return { taken, room: Object.values(room), lists, items };
        })));""",
        rounds,
    )
    for one, changes in zip(by_page, rounds, strict=True):
        lists = peer.Lists()
        room = peer.Room(9, 4_000)
        taken = [
            lists.merge(each, lambda list_id, is_new: list_id != "list-0002", room, NOW_MS)
            for each in changes
        ]
        assert one["room"] == [room.items, room.bytes, room.refused]
        assert one["taken"] == [{"lists": new[0], "items": new[1]} for new in taken]
        assert one["lists"] == list(lists.lists.values())
        assert one["items"] == list(lists.items.values())
        assert one["items"]


# ---------------------------------------------------------------------------------------
# peer.py without a network.
# ---------------------------------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[peer.Keeper]:
    """Return a file with one list, shared with Alice."""
    with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
        with keeper.changing() as lists:
            lists.merge(CHANGES)
            lists.contact("Alice")["lists"].append(GROCERIES["id"])
        yield keeper


def test_peer_lists_adds_and_marks_as_done(
    keeper: peer.Keeper, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(keeper.path.parent)
    assert peer.main(["--dir", directory, "add", "Olive oil", "--quantity", "1 l"]) == 0
    assert peer.main(["--dir", directory, "done", "milk"]) == 0
    assert capsys.readouterr().err == "Olive oil is on the list Groceries.\nMilk is done.\n"
    assert peer.main(["--dir", directory, "list"]) == 0
    assert capsys.readouterr().out == "Groceries\n  [ ] Olive oil (1 l)\n  [x] Milk (1 l)\n"
    assert keeper.load().contact("Alice")["pending"]


def fill(lists: peer.Lists, count: int, now_s: float) -> None:
    """Add so many items."""
    for number in range(count):
        lists.change({**MILK, "id": f"item-{number:05}"}, now_s)


def test_peer_file_is_written_whole_or_not_at_all(keeper: peer.Keeper) -> None:
    keeper._database.execute("PRAGMA max_page_count = 100")
    with pytest.raises(sqlite3.OperationalError, match="full"), keeper.changing() as lists:
        fill(lists, 2_000, 1.0)
    assert [*keeper.load().items] == [MILK["id"]]
    with contextlib.closing(peer.Keeper(keeper.path.parent)) as other:
        assert [*other.load().items] == [MILK["id"]]


def test_peer_reads_of_other_processes_only_what_is_new(keeper: peer.Keeper) -> None:
    with contextlib.closing(peer.Keeper(keeper.path.parent)) as other:
        assert other.load() == keeper.load()
        assert other.news() == ([], [])
        with keeper.changing() as lists:
            changed = lists.change({**MILK, "done": True}, 1.0)
        assert other.news() == ([], [changed])
        assert other.news() == ([], [])
        # One's own changes are no news.
        with other.changing() as lists:
            lists.change(changed, 2.0)
        assert other.news() == ([], [])
        assert len(keeper.news()[1]) == 1
        with keeper.changing() as lists:
            lists.forget([GROCERIES["id"]])
        assert other.load().items == {}
        with keeper.changing() as lists:
            lists.merge(CHANGES)
        assert other.news() == ([GROCERIES], [MILK])


def test_peer_writes_one_row_for_one_changed_item(keeper: peer.Keeper) -> None:
    with keeper.changing() as lists:
        fill(lists, 1_900, 1.0)
    before = keeper._database.total_changes
    with keeper.changing() as lists:
        lists.change({**MILK, "done": True}, 2.0)
    # The item, and what was changed last.
    assert keeper._database.total_changes - before <= 3
    before = keeper._database.total_changes
    with keeper.changing():
        pass
    assert keeper._database.total_changes == before


def test_peer_file_is_for_its_owner_alone(keeper: peer.Keeper) -> None:
    assert [oct(path.stat().st_mode & 0o777) for path in keeper.path.parent.glob("lists.db*")] == [
        "0o600", "0o600", "0o600"]


def test_peer_takes_over_the_file_of_earlier_versions(tmp_path: Path) -> None:
    kept = {
        "device": "device-home",
        "lists": [GROCERIES],
        "items": [MILK],
        "contacts": {"Alice": {"lists": [GROCERIES["id"]], "theirs": [], "pending": True}},
        "last_at": 7,
    }
    (tmp_path / "shopping_list.json").write_text(json.dumps(kept), encoding="utf-8")
    for _ in range(2):
        with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
            lists = keeper.load()
        assert [lists.device, lists.lists, lists.items, lists.last_at, lists.contacts] == [
            "device-home", {GROCERIES["id"]: GROCERIES}, {MILK["id"]: MILK}, 7, kept["contacts"]]
    assert not (tmp_path / "shopping_list.json").exists()


def test_peer_heals_what_was_poisoned_before(tmp_path: Path) -> None:
    poisoned = {**MILK, "updatedAt": 2**52, "done": True}
    with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
        with keeper.changing() as lists:
            lists.merge({"lists": [GROCERIES], "items": [poisoned]}, now_ms=0)
        assert keeper.load().items[MILK["id"]]["updatedAt"] == 2**52
    with contextlib.closing(peer.Keeper(tmp_path)) as keeper:
        at = keeper.load().items[MILK["id"]]["updatedAt"]
        assert at <= time.time() * 1000
        with keeper.changing() as lists:
            changed = lists.change({**lists.items[MILK["id"]], "done": False}, time.time())
            # A third one brings it again.
            assert lists.merge({"lists": [], "items": [poisoned]}) == ([], [])
        assert changed["updatedAt"] <= time.time() * 1000 + 1


def test_peer_says_what_to_do_about_a_damaged_file(
    keeper: peer.Keeper, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper.close()
    keeper.path.write_text("{" * 5_000, encoding="utf-8")
    assert peer.main(["--dir", str(keeper.path.parent), "list"]) == 1
    assert "move it away" in capsys.readouterr().err


def test_peer_says_that_there_is_no_such_thing(
    keeper: peer.Keeper, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peer.main(["--dir", str(keeper.path.parent), "done", "Caviar"]) == 1
    assert capsys.readouterr().err == 'There is no "Caviar".\n'


@pytest.mark.parametrize(("text", "words"), [
    ('["turn:turn.example.com"]', "ICE server 1: a TURN server needs a username"),
    ('[{"urls": "turn:a", "username": "me", "credential": "mellon", "x": 1}]', "has a member"),
    ("mellon", "line 1, column 1: it is not JSON"),
])
def test_peer_looks_at_turn_servers_and_tells_no_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str,
) -> None:
    path = tmp_path / "servers.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(SystemExit) as left:
        peer.main(["--ice-servers", str(path), "list"])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert "mellon" not in told


# ---------------------------------------------------------------------------------------
# Two people, two browsers, one relay.
# ---------------------------------------------------------------------------------------


@browser_test
@pytest.mark.slow
def test_list_is_shared_and_synced_both_ways(make_user: UserMaker) -> None:
    alice, bob = make_user(), make_user()
    alice.make_list("Groceries")
    alice.add("Tomatoes", "6")
    alice.add("<img src=x onerror=document.title='broken'>")
    link = alice.share("Bob")
    alice.sees("Bob has not opened the link yet", "#people")
    bob.requests.clear()
    bob.visit(link)
    bob.page.wait_for_selector("#connect-dialog[open]")
    assert "connectoid" not in bob.page.url
    # Nothing is sent before the user has confirmed, who sees through whom it would be.
    bob.sees(bob.relay, "#connect-relays")
    assert not [url for url in bob.requests if bob.relay in url]
    bob.page.fill("#connect-name", "Alice")
    began_s = time.monotonic()
    bob.page.click("#connect-form [type=submit]")
    bob.sees("Tomatoes")
    assert time.monotonic() - began_s < 10
    bob.sees("<img src=x onerror=document.title='broken'>")
    bob.tick("Tomatoes")
    alice.sees("Tomatoes", "#done-items")
    bob.add("Bread")
    alice.sees("Bread")
    alice.page.click("[aria-label='Change Bread']")
    alice.page.fill("#item-text", "Rye bread")
    alice.page.fill("#item-quantity", "2")
    alice.page.click("#item-form [type=submit]")
    bob.sees("Rye bread 2")
    bob.page.click("#clear-done")
    alice.sees_no("Tomatoes", "#list")
    bob.page.click("#toast button")
    alice.sees("Tomatoes", "#done-items")
    for user in (alice, bob):
        reads_up_to_date(user)
        own = (user.url.split("/examples")[0], user.relay)
        assert not [url for url in user.requests if not url.startswith(own)]


@browser_test
@pytest.mark.slow
def test_both_see_the_same_emoji_and_can_say_so(pair: tuple[User, User]) -> None:
    seen = []
    for user in pair:
        user.page.click("#people button:has-text('Compare')")
        seen.append(user.page.locator("#emoji").inner_text().split())
        user.page.click("#emoji-same")
        user.sees("Compared", "#people")
    assert seen[0] == seen[1]
    assert len(seen[0]) >= 2 * 7


@browser_test
@pytest.mark.slow
def test_emoji_that_differed_leave_a_mark_until_they_are_the_same(pair: tuple[User, User]) -> None:
    alice, _ = pair
    alice.page.click("#people button:has-text('Compare')")
    alice.page.click("#emoji-differ")
    alice.page.wait_for_selector("#unshare-dialog[open]")
    alice.page.keyboard.press("Escape")
    for _ in range(2):
        alice.sees("The emoji differed. Somebody may read along. Unshare.", "#people .bad")
        alice.page.reload()
    alice.sees("The emoji differed", "#people")
    alice.page.click("#people button:has-text('Compare')")
    alice.page.click("#emoji-same")
    alice.sees("Compared", "#people")
    alice.sees_no("The emoji differed", "#people")


@browser_test
@pytest.mark.slow
def test_relay_that_is_down_is_told_beside_a_new_link_and_before_unsharing(
    pair: tuple[User, User], make_user: Any
) -> None:
    alice, _ = pair
    reads_up_to_date(alice)
    make_user.relay.stop()
    alice.page.click("#people button:has-text('Unshare')")
    alice.sees("Bob is told as soon as a relay can be reached", "#unshare-dialog[open]")
    alice.page.keyboard.press("Escape")
    alice.page.click("#share")
    alice.page.fill("#share-name", "Carol")
    alice.page.click("#share-form [type=submit]")
    alice.page.wait_for_selector("#share-trouble", state="visible")


@browser_test
@pytest.mark.slow
def test_long_words_neither_leave_the_screen_nor_break_letter_by_letter(
    pair: tuple[User, User],
) -> None:
    alice, _ = pair
    word = "Donaudampfschifffahrtsgesellschaft"
    alice.page.click("#edit-list")
    alice.page.fill("#name-text", f"{word} in summer")
    alice.page.click("#name-form [type=submit]")
    alice.add("Donaudampfschifffahrt", "18 very long letters")
    alice.page.click("#people button:has-text('Rename')")
    alice.page.fill("#name-text", f"Bartholomew {word}")
    alice.page.click("#name-form [type=submit]")
    alice.page.click("#people button:has-text('Compare')")
    alice.page.click("#emoji-same")
    alice.sees("Compared", "#people")
    for width in (360, 800, 1280):
        alice.page.set_viewport_size({"width": width, "height": 740})
        assert alice.page.evaluate(IS_WITHIN), width
        assert alice.page.locator("#lists .count").bounding_box()["x"] < width
        assert alice.page.locator(".verified").bounding_box()["height"] < 30
        text = alice.page.locator("#open-items .text", has_text="schiff")
        assert text.bounding_box()["width"] >= 80


@browser_test
@pytest.mark.slow
def test_lists_and_contacts_are_there_after_a_reload(pair: tuple[User, User]) -> None:
    alice, bob = pair
    for user in pair:
        user.page.reload()
    bob.add("Bread")
    alice.sees("Bread")
    alice.add("Butter")
    bob.sees("Butter")
    alice.page.click("#people button:has-text('Rename')")
    alice.page.fill("#name-text", "Bob's phone")
    alice.page.click("#name-form [type=submit]")
    alice.sees("Bob's phone", "#people")
    alice.page.click("#edit-list")
    alice.page.fill("#name-text", "Market")
    alice.page.click("#name-form [type=submit]")
    bob.sees("Market", "#title")


@browser_test
@pytest.mark.slow
def test_idle_pages_disconnect_and_a_change_connects_them(pair: tuple[User, User]) -> None:
    alice, bob = pair
    alice.sees("Last synced", "#people", 1000 * (2 * IDLE_S))
    bob.sees("Last synced", "#people")
    for writer, reader, text in ((bob, alice, "Bread"), (alice, bob, "Butter")):
        began_s = time.monotonic()
        writer.add(text)
        reader.sees(text)
        print(f"{text}: {time.monotonic() - began_s:.2f} s")
        reads_up_to_date(writer)


@browser_test
@pytest.mark.slow
def test_page_works_offline_and_syncs_when_back(
    pair: tuple[User, User], files: QuietServer
) -> None:
    alice, bob = pair
    wait_for_worker(bob.page)
    reads_up_to_date(bob)
    files.is_down = True
    bob.context.set_offline(True)
    bob.page.reload()
    bob.sees("Tomatoes")
    bob.sees("Offline", ".bar")
    bob.add("Bread")
    bob.tick("Tomatoes")
    alice.add("Butter")
    bob.sees("Changes wait until you are online", "#people")
    bob.page.reload()
    bob.sees("Bread")
    files.is_down = False
    bob.context.set_offline(False)
    bob.sees("Butter", timeout_ms=AWAY_MS)
    alice.sees("Bread", timeout_ms=AWAY_MS)
    alice.sees("Tomatoes", "#done-items")
    bob.sees("up to date", "#people")


@browser_test
@pytest.mark.slow
def test_relay_that_was_away_is_found_again(
    pair: tuple[User, User], make_user: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    alice, bob = pair
    make_user.relay.stop()
    bob.page.reload()
    bob.add("Bread")
    bob.sees("Changes are kept, and go out later", "#notices")
    bob.sees("hanges wait", "#people")
    start("--db", str(tmp_path / "relay.db"), "--port", str(make_user.relay.port))
    alice.sees("Bread", timeout_ms=AWAY_MS)
    bob.sees("up to date", "#people")
    bob.sees_no("Changes are kept", "#notices")


@browser_test
@pytest.mark.slow
def test_a_turn_server_is_looked_at_and_kept(make_user: UserMaker) -> None:
    alice = make_user()
    alice.page.goto(alice.url)
    alice.page.click("#open-settings")
    alice.page.fill("#turn-url", "turn.example.com")
    alice.page.fill("#turn-user", "alice")
    alice.page.fill("#turn-password", "mellon")
    alice.page.click("#settings-form [type=submit]")
    alice.sees("a URL looks like stun:HOST:PORT, turn:HOST:PORT", "#settings-error")
    alice.page.fill("#turn-url", "turn:turn.example.com:3478")
    with alice.page.expect_navigation():
        alice.page.click("#settings-form [type=submit]")
    alice.page.click("#open-settings")
    assert alice.page.input_value("#turn-url") == "turn:turn.example.com:3478"
    assert alice.page.input_value("#turn-password") == "mellon"


@browser_test
@pytest.mark.slow
def test_who_wants_to_be_asked_first_is_asked(pair: tuple[User, User]) -> None:
    alice, bob = pair
    alice.page.click("#open-settings")
    alice.page.check("#ask-first")
    with alice.page.expect_navigation():
        alice.page.click("#settings-form [type=submit]")
    alice.page.wait_for_selector("#list:not([hidden])")
    reads_up_to_date(alice)
    alice.sees("Last synced", "#people", timeout_ms=AWAY_MS)
    bob.sees("Last synced", "#people", timeout_ms=AWAY_MS)
    bob.add("Bread")
    alice.sees("Bob would like to connect.", "#people")
    alice.sees_no("Bread")
    alice.page.click("#people button:has-text('Connect')")
    alice.sees("Bread")
    playwright.expect(alice.page.locator("#people button:has-text('Connect')")).to_be_hidden()


@browser_test
@pytest.mark.slow
def test_settings_say_which_part_of_a_turn_server_is_wrong(make_user: UserMaker) -> None:
    alice = make_user()
    alice.page.click("#open-settings")
    for parts, field, words in [
        (("", "alice", ""), "turn-url", "Which TURN server is it?"),
        (("turn:a:b", "alice", "mellon"), "turn-url", "TURN server: a URL looks like"),
        (("turn:a", "", "mellon"), "turn-user", "needs a user name"),
        (("turn:a", "alice", ""), "turn-password", "needs a password"),
    ]:
        for name, value in zip(("url", "user", "password"), parts, strict=True):
            alice.page.fill(f"#turn-{name}", value)
        for button in ("#settings-form [type=submit]", "#check"):
            alice.page.click(button)
            alice.sees(words, "#settings-error")
            assert alice.page.evaluate("document.activeElement.id") == field
            assert alice.page.locator("[aria-invalid]").count() == 1
    # Nothing but TURN, and none anywhere.
    for name in ("url", "user", "password"):
        alice.page.fill(f"#turn-{name}", "")
    alice.page.check("#relay-only")
    alice.page.click("#settings-form [type=submit]")
    alice.sees("For that you need a TURN server", "#settings-error")
    alice.page.fill("#turn-url", "turn:turn.example.com")
    alice.page.fill("#turn-user", "alice")
    alice.page.fill("#turn-password", "mellon")
    with alice.page.expect_navigation():
        alice.page.click("#settings-form [type=submit]")
    alice.page.click("#open-settings")
    assert alice.page.is_checked("#relay-only")


SECRET = "4f1de7f2c5a84f1de7f2c5a8"


@pytest.fixture
def lender(start: Callable[..., Any], tmp_path: Path) -> Iterator[str]:
    """Return the URL of a relay that has STUN, and lends a real TURN server."""
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    with turn_server(f"use-auth-secret\nstatic-auth-secret={SECRET}\n") as port:
        relay = start("--stun", "--turn", f"turn:127.0.0.1:{port}", "--turn-secret", str(file))
        yield f"http://127.0.0.1:{relay.port}/"


@browser_test
@needs("turnserver")
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_connection_check_tells_what_it_finds(
    make_user: UserMaker, lender: str, tmp_path: Path, scheme: str
) -> None:
    wide, narrow = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
    source = axe_source()
    for name, viewport in (("desktop", wide), ("phone", narrow)):
        alice = make_user(color_scheme=scheme, viewport=viewport)
        alice.page.click("#open-settings")
        alice.page.fill("#relay-url", f"{lender} http://127.0.0.1:9/")
        alice.page.click("#check")
        alice.sees("That is all.", "#check-now", timeout_ms=AWAY_MS)
        found = alice.page.text_content("#check-findings")
        for words in (
            f"Good: The relay {lender} answers",
            "lends a TURN server.",
            "Problem: http://127.0.0.1:9/ cannot be reached.",
            "is in your own network, and tells nothing of the way out.",
            "carries connections.",
            "In all: where two devices find no direct way, TURN carries them.",
        ):
            assert words in found, found
        assert complaints_of_axe(alice.page, source) == []
        assert alice.page.evaluate(IS_WITHIN)
        picture(alice.page, tmp_path, f"{name}-check-{scheme}")


@browser_test
@pytest.mark.slow
def test_connection_check_can_be_stopped_and_begun_again(make_user: UserMaker) -> None:
    alice = make_user()
    # It is listened to, and never answered.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        alice.page.click("#open-settings")
        alice.page.fill("#relay-url", f"http://127.0.0.1:{mute.getsockname()[1]}/")
        alice.page.click("#check")
        alice.sees("Asking the relay", "#check-now")
        alice.page.click("#check-stop")
        alice.sees("Stopped.", "#check-now")
        assert alice.page.inner_text("#check-findings") == ""
        alice.page.click("#check-again")
        alice.sees("Asking the relay", "#check-now")
        # Whoever closes it, ends it.
        alice.page.click("#check-dialog .corner button")
    alice.page.fill("#relay-url", alice.relay)
    alice.page.click("#check")
    alice.sees("That is all.", "#check-now", timeout_ms=AWAY_MS)
    alice.sees("answers", "#check-findings")


@browser_test
@pytest.mark.slow
def test_one_of_two_relays_may_be_down(make_user: UserMaker, start: Callable[..., Any]) -> None:
    alice, bob = make_user(), make_user()
    other = start()
    alice.page.goto(alice.url)
    alice.page.click("#first-list button")
    # Without a name, the field's own words.
    alice.sees("Groceries", "#title")
    alice.add("Tomatoes", "6")
    alice.page.click("#open-settings")
    alice.page.fill("#relay-url", f"http://127.0.0.1:{other.port}/  {alice.relay}")
    alice.page.click("#settings-form [type=submit]")
    alice.sees_no("Relay for new links", "body")
    link = alice.share("Bob")
    other.stop()
    # Bob has no setting of his own: the link names both relays.
    bob.open(link, "Alice")
    bob.sees("Tomatoes")
    for writer, reader, text in ((alice, bob, "Bread"), (bob, alice, "Butter")):
        writer.page.reload()
        reads_up_to_date(reader)
        writer.add(text)
        reader.sees(text, timeout_ms=AWAY_MS)
    for user in (alice, bob):
        reads_up_to_date(user)
        # It holds nothing up.
        assert "cannot be reached" not in user.page.inner_text("#notices")
    make_user.relay.stop()  # type: ignore[attr-defined]
    alice.page.reload()
    alice.sees("Changes are kept, and go out later", "#notices")


@browser_test
@pytest.mark.slow
def test_second_opener_is_told_and_the_first_sharer_warned(make_user: UserMaker) -> None:
    alice, bob, eve = make_user(), make_user(), make_user()
    alice.make_list("Groceries")
    alice.add("Tomatoes")
    link = alice.share("Bob")
    bob.open(link, "Alice")
    bob.sees("Tomatoes")
    eve.open(link, "Alice")
    eve.sees("Somebody else has opened this link before you", "#people", AWAY_MS)
    assert eve.page.locator("#open-items li").count() == 0
    alice.sees("Somebody else opened your link too", "#people", AWAY_MS)
    alice.page.reload()
    alice.sees("Somebody else opened your link too", "#people")
    eve.page.click("#people button:has-text('OK')")
    playwright.expect(eve.page.locator("#people li")).to_have_count(0)
    eve.page.reload()
    eve.sees("Nobody yet", ".people")


def fill_mailbox(link: str, port: int, sources: int, each: int) -> None:
    """Fill the mailbox of a link, as somebody with so many addresses does."""
    (mailbox,) = parse_address(read_link(link).address)
    request = json.dumps({"pub": mailbox.pub, "action": "send", "data": "QUJD"})
    for number in range(sources):
        here = (f"127.0.1.{number}", 0)
        connection = http.client.HTTPConnection("127.0.0.1", port, source_address=here)
        with contextlib.closing(connection):
            for _ in range(each):
                connection.request("POST", "/", request)
                response = connection.getresponse()
                assert json.load(response)["ok"]


@browser_test
@pytest.mark.slow
def test_flooded_link_is_told_on_both_sides(make_user: Any) -> None:
    alice, bob = make_user(), make_user()
    alice.make_list("Groceries")
    fill_mailbox(alice.share("Carol"), make_user.relay.port, 8, 32)
    alice.sees("Somebody fills the mailbox of this link", "#people .bad", AWAY_MS)
    alice.sees("refused, and changed nothing", "#people")
    # Nobody who is not paired is up to date.
    alice.sees_no("up to date", "#people")
    link = alice.share("Bob")
    alice.end()
    # As many customers as there are places.
    fill_mailbox(link, make_user.relay.port, 256, 1)
    bob.open(link, "Alice")
    bob.sees("others have filled that mailbox", "#notices", AWAY_MS)
    bob.sees("ask for a new link", "#notices")
    alice.begin()


@browser_test
@pytest.mark.slow
def test_new_key_of_a_contact_is_told_until_the_user_has_compared_again(
    make_user: UserMaker, tmp_path: Path
) -> None:
    alice = make_user()
    alice.make_list("Groceries")
    link = alice.share("Bob")
    home = Connectoid(Store(tmp_path / "bob.db"), [(alice.relay, None)], AiortcAdapter(),
                      app=peer.APP)
    with home:
        home.open(link, "Alice")
        home.connect("Alice", CONNECT_MS / 1_000)
        alice.sees("Connected", "#people")
        home.renew("Alice")
        for _ in range(2):
            alice.sees("Bob's app has a new key", "#people .warning", AWAY_MS)
            alice.page.reload()
        alice.page.click("#people button:has-text('Compare')")
        alice.page.click("#emoji-same")
        for _ in range(2):
            alice.sees_no("new key", "#people")
            alice.page.reload()


@browser_test
@pytest.mark.slow
def test_new_key_of_ones_own_is_waited_for_and_then_told(pair: tuple[User, User]) -> None:
    alice, bob = pair
    reads_up_to_date(alice)
    bob.end()
    alice.page.click("#people button:has-text('New key')")
    alice.sees("Bob cannot tell a thief", "#renew-dialog")
    alice.page.click("#renew-form [data-close]")
    alice.sees_no("new key yet", "#people")
    alice.page.click("#people button:has-text('New key')")
    alice.page.click("#renew-form [type=submit]")
    for _ in range(2):
        alice.sees("Bob's app does not know your new key yet", "#people .renewing")
        alice.sees_no("New key", "#people .person-buttons")
        alice.page.reload()
    alice.sees("does not know your new key yet", "#people")
    bob.begin()
    alice.sees("Bob's app knows your new key", "#toast", AWAY_MS)
    alice.sees_no("new key yet", "#people")
    alice.sees("New key", "#people .person-buttons")
    bob.sees("Alice's app has a new key", "#people .warning")
    # They still share.
    alice.add("Bread")
    bob.sees("Bread", timeout_ms=AWAY_MS)


@browser_test
@pytest.mark.slow
def test_unsharing_reaches_a_contact_that_was_away_and_asks_what_to_keep(
    pair: tuple[User, User],
) -> None:
    alice, bob = pair
    reads_up_to_date(alice)
    bob.end()
    alice.page.click("#people button:has-text('Unshare')")
    alice.page.click("#unshare-form [type=submit]")
    alice.sees("Nobody yet", ".people")
    alice.add("Secret present")
    bob.begin()
    bob.sees("Alice has ended the sharing", "#people", AWAY_MS)
    bob.sees("Tomatoes")
    bob.sees_no("Secret present")
    bob.page.click("#people button:has-text('Delete my copy')")
    bob.sees("Your first list", "#empty")
    bob.page.reload()
    bob.sees("Your first list", "#empty")
    bob.sees("Nobody yet", ".people")
    alice.sees("Tomatoes")


@browser_test
@pytest.mark.slow
def test_unsharing_deletes_the_copy_there_if_wanted(pair: tuple[User, User]) -> None:
    alice, bob = pair
    reads_up_to_date(alice)
    alice.page.click("#people button:has-text('Unshare')")
    alice.page.check("#unshare-there")
    alice.page.click("#unshare-form [type=submit]")
    bob.sees("Your first list", "#empty")
    bob.sees("Alice has ended the sharing, and the lists were deleted here", "#people", AWAY_MS)
    alice.sees("Tomatoes")


@browser_test
@pytest.mark.slow
def test_contact_gets_the_lists_that_are_shared_and_no_others(pair: tuple[User, User]) -> None:
    alice, bob = pair
    for name in ("Presents", "Hardware"):
        alice.page.click("#new-list")
        alice.page.fill("#name-text", name)
        alice.page.click("#name-form [type=submit]")
        alice.add(f"Thing for {name}")
    alice.page.click("#share")
    alice.page.click("#share-others-list button:has-text('Bob')")
    bob.sees("Hardware", "#lists")
    bob.page.click("#lists button:has-text('Hardware')")
    bob.sees("Thing for Hardware")
    # So that all is said once more.
    alice.page.reload()
    alice.sees("Bob", "#people")
    alice.add("More for Hardware")
    bob.sees("More for Hardware")
    assert "Presents" not in bob.page.locator("body").inner_text()
    bob.page.click("#edit-list")
    bob.page.click("#name-delete")
    alice.sees_no("Hardware", "#lists")
    alice.sees("Presents", "#lists")


ADD_ITEM = """(item) => new Promise((resolve, reject) => {
  const opening = indexedDB.open("shopping_list", 1);
  opening.onsuccess = () => {
    const transaction = opening.result.transaction(["lists", "items"], "readwrite");
    const lists = transaction.objectStore("lists").getAll();
    lists.onsuccess = () =>
      transaction.objectStore("items").put({ ...item, list: lists.result[0].id });
    transaction.oncomplete = () => resolve(opening.result.close());
    transaction.onabort = reject;
  };
})"""
COUNT_CHANGES = """(item) => {
  window.changes = 0;
  new MutationObserver((seen) => { window.changes += seen.length; }).observe(
    item, { attributes: true, characterData: true, childList: true, subtree: true });
}"""


@browser_test
@pytest.mark.slow
def test_an_item_takes_neither_the_place_of_another_part_nor_the_time_of_other_items(
    make_user: UserMaker,
) -> None:
    alice = make_user()
    alice.make_list("Groceries")
    alice.add("Tomatoes", "6")
    # A contact chooses the ids of what it adds.
    alice.page.evaluate(ADD_ITEM, {**MILK, "id": "quantity"})
    alice.page.reload()
    alice.page.click("[aria-label='Change Tomatoes']")
    assert alice.page.input_value("#item-dialog input >> nth=1") == "6"
    alice.page.keyboard.press("Escape")
    alice.page.locator("#list li:has-text('Tomatoes')").evaluate(COUNT_CHANGES)
    alice.tick("Milk")
    alice.sees("Milk", "#done-items")
    assert alice.page.evaluate("window.changes") == 0


@browser_test
@pytest.mark.slow
def test_undo_stays_whatever_is_to_be_said(make_user: UserMaker) -> None:
    alice = make_user()
    alice.make_list("Groceries")
    alice.add("Tomatoes")
    alice.page.click("[aria-label='Change Tomatoes']")
    alice.page.click("#item-delete")
    alice.page.evaluate("import('./ui.js').then(({ toast }) => toast('Bob is there.'))")
    alice.sees("Tomatoes is deleted", "#toast")
    alice.page.click("#toast button")
    alice.sees("Tomatoes")
    alice.sees("Bob is there.", "#toast")


def delete_groceries(bob: User, alice: User) -> None:
    """Let Bob delete the list, for both."""
    bob.page.click("#edit-list")
    bob.page.click("#name-delete")
    alice.sees_no("Groceries", "#lists")


def make_another(alice: User) -> None:
    """Give Alice a second list, and show the first."""
    alice.page.click("#new-list")
    alice.page.fill("#name-text", "Presents")
    alice.page.click("#name-form [type=submit]")
    alice.page.click("#lists button:has-text('Groceries')")


@browser_test
@pytest.mark.slow
def test_list_that_is_shared_is_the_one_that_the_dialog_names(pair: tuple[User, User]) -> None:
    """Whatever a contact does meanwhile."""
    alice, bob = pair
    make_another(alice)
    alice.page.click("#share")
    delete_groceries(bob, alice)
    bob.page.click("#toast button")
    alice.sees("Groceries", "#lists")
    alice.page.fill("#share-name", "Carol")
    alice.page.click("#share-form [type=submit]")
    alice.page.wait_for_selector("#share-url", state="visible")
    alice.page.click("#share-dialog .corner button")
    alice.sees("Groceries", "#people li:has-text('Carol')")
    # The same with a list that stays deleted.
    alice.page.click("#lists button:has-text('Groceries')")
    alice.page.click("#share")
    delete_groceries(bob, alice)
    alice.page.fill("#share-name", "Dave")
    alice.page.click("#share-form [type=submit]")
    alice.sees("This list is no longer here", "#share-error")


@browser_test
@pytest.mark.slow
def test_list_that_a_contact_deletes_passes_nothing_on_to_another(
    pair: tuple[User, User],
) -> None:
    """Neither a name, nor its deletion, nor what was typed for it."""
    alice, bob = pair
    make_another(alice)
    alice.page.click("#edit-list")
    delete_groceries(bob, alice)
    alice.page.click("#name-form [type=submit]")
    alice.sees("This list is no longer here", "#name-error")
    alice.page.click("#name-delete")
    alice.sees("This list is no longer here", "#toast")
    alice.sees("Presents", "#lists")
    bob.page.click("#toast button")
    alice.page.click("#lists button:has-text('Groceries')")
    alice.page.fill("#add-text", "Bread")
    delete_groceries(bob, alice)
    alice.page.press("#add-text", "Enter")
    alice.sees("This list is no longer here", "#toast")
    alice.sees("Nothing to buy", "#list")
    alice.page.press("#add-text", "Enter")
    alice.sees("Bread")


@browser_test
@pytest.mark.slow
def test_second_tab_says_where_the_contacts_are_and_its_changes_are_sent(
    pair: tuple[User, User],
) -> None:
    alice, bob = pair
    second = alice.context.new_page()
    second.goto(alice.url)
    playwright.expect(second.locator("#blocked")).to_contain_text("another tab")
    second.fill("#add-text", "Bread")
    second.press("#add-text", "Enter")
    alice.sees("Bread")
    bob.sees("Bread")
    alice.page.close()
    playwright.expect(second.locator("#people")).to_contain_text("Bob", timeout=CONNECT_MS)
    playwright.expect(second.locator("#blocked")).to_be_hidden()


# RFC 5208, RFC 5480: how the PKCS #8 of every P-384 key begins, after its length.
PKCS8_BEGINS = bytes.fromhex("020100301006072a8648ce3d020106052b81040022")


@browser_test
@pytest.mark.slow
def test_keys_that_no_script_can_read_are_plain_in_the_files_of_the_profile(
    make_user: UserMaker, tmp_path: Path
) -> None:
    """What docs/threat-model.md says of browsers is so. Should this fail, they have got better."""
    alice = make_user()
    alice.make_list("Groceries")
    alice.share("Bob")
    files = [path for path in (tmp_path / "profile-0").rglob("*.log") if "IndexedDB" in str(path)]
    assert any(PKCS8_BEGINS in path.read_bytes() for path in files)


@browser_test
@pytest.mark.slow
def test_bad_links_and_relays_are_told_in_a_sentence(make_user: UserMaker) -> None:
    alice = make_user()
    alice.make_list("Groceries")
    link = alice.share("Bob")
    alice.visit(f"{link[:-9]}")
    alice.sees("Copy it again, whole", "#notices")
    other = Contact.invite(
        SystemSuite(), system_now(), "Bob", [(alice.relay, None)], app="org.example.chat")
    foreign = f"{alice.url}#connectoid={other[0].record.invitation}"
    # Before anybody is asked.
    alice.visit(foreign)
    alice.sees("This link belongs to another app", "#notices")
    assert not alice.page.locator("#connect-dialog").is_visible()
    # Of a version that nobody speaks yet.
    alice.visit(f"{alice.url}#connectoid=2~AAAA")
    alice.sees("This link needs a newer version of this app", "#notices")
    alice.page.click("#have-link")
    alice.page.fill("#link-text", foreign)
    alice.page.click("#link-form [type=submit]")
    alice.sees("This link belongs to another app", "#link-error")
    alice.page.fill("#link-text", "https://example.com/")
    alice.page.click("#link-form [type=submit]")
    alice.sees("This is not an invitation link", "#link-error")
    alice.page.fill("#link-text", link)
    alice.page.click("#link-form [type=submit]")
    alice.page.fill("#connect-name", "Me")
    alice.page.click("#connect-form [type=submit]")
    alice.sees("This is your own link", "#connect-error")
    alice.page.keyboard.press("Escape")
    # Neither the settings nor the server of the page have a relay.
    alice.page.click("#open-settings")
    alice.page.fill("#relay-url", "")
    alice.page.click("#settings-form [type=submit]")
    alice.page.click("#share")
    alice.page.fill("#share-name", "Carol")
    alice.page.fill("#share-relay-url", "http://127.0.0.1:9/")
    alice.page.click("#share-form [type=submit]")
    alice.sees("No relay answers at http://127.0.0.1:9/. Check the address.", "#share-error")
    alice.page.fill("#share-relay-url", alice.relay)
    alice.page.click("#share-form [type=submit]")
    alice.page.wait_for_selector("#share-url", state="visible")


@browser_test
@pytest.mark.slow
def test_relay_in_the_address_is_shown_and_asked_about_before_it_is_used(
    make_user: UserMaker, start: Callable[..., Any]
) -> None:
    alice = make_user()
    alice.make_list("Groceries")
    foreign = f"http://127.0.0.1:{start().port}/"
    alice.requests.clear()
    alice.page.goto(f"{alice.url}?relay={foreign}")
    alice.sees(foreign, "#relay-offered")
    alice.sees(f"Now they go through {alice.relay}", "#relay-dialog")
    assert "relay=" not in alice.page.url
    alice.page.click("#relay-form [data-close]")
    # What was made before, with the relay of the settings, and what is made now.
    alice.share("Bob")
    assert not [url for url in alice.requests if url.startswith(foreign)]
    alice.page.click("#open-settings")
    assert alice.page.input_value("#relay-url") == alice.relay
    alice.page.keyboard.press("Escape")
    alice.page.goto(f"{alice.url}?relay={foreign}")
    alice.page.click("#relay-form [type=submit]")
    alice.page.wait_for_selector("#relay-dialog", state="hidden")
    alice.page.click("#open-settings")
    assert alice.page.input_value("#relay-url") == foreign
    alice.page.keyboard.press("Escape")
    # Once: the same address asks no more. And what is no URL is not shown to anybody.
    for same in (foreign, "%E2%80%AEnonsense"):
        alice.page.goto(f"{alice.url}?relay={same}")
        alice.sees("Bob has not opened the link yet", "#people")
        assert not alice.page.locator("#relay-dialog").is_visible()
    alice.page.goto(f"{alice.url}?relay=http://relay.example.com/")
    alice.page.click("#relay-form [type=submit]")
    alice.sees("its address begins with https://", "#relay-error")


@browser_test
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (
            "Object.defineProperty(window, 'indexedDB', { value: undefined });",
            "your lists are in this tab only",
        ),
        (
            "IDBObjectStore.prototype.put = () => {"
            " throw new DOMException('', 'QuotaExceededError'); };",
            "storage of this browser is full",
        ),
        (
            "delete window.RTCPeerConnection;",
            "its WebRTC is off. Turn it on, or use another browser",
        ),
    ],
)
def test_browser_that_lacks_something_is_told_and_nothing_on_the_page_is_lost(
    driver: Any, files: QuietServer, trouble: str, sentence: str
) -> None:
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_page()
    page.add_init_script(trouble)
    page.goto(f"http://localhost:{files.server_port}/examples/shopping_list/")
    page.fill("#first-name", "Groceries")
    page.click("#first-list button")
    playwright.expect(page.locator("body")).to_contain_text(sentence, use_inner_text=True)
    page.fill("#add-text", "Tomatoes")
    page.press("#add-text", "Enter")
    playwright.expect(page.locator("#open-items")).to_contain_text("Tomatoes")
    browser.close()


def built_library() -> Path:
    """Build the library into one file, or skip."""
    if not (ROOT / "js" / "node_modules" / "esbuild").is_dir():
        pytest.skip("esbuild is missing: npm install --ignore-scripts in js/")
    assert NODE
    command = [NODE, "build.mjs"]
    subprocess.run(command, cwd=ROOT / "js", check=True, capture_output=True, timeout=60)
    return ROOT / "js" / "dist" / "connectoid.js"


@browser_test
@pytest.mark.slow
def test_folder_works_when_copied_alone(driver: Any, tmp_path: Path) -> None:
    folder = tmp_path / "site" / "list"
    shutil.copytree(
        HERE, folder, ignore=shutil.ignore_patterns("node_modules", "screenshots", "__pycache__")
    )
    shutil.copy(built_library(), folder)
    for server in serve(tmp_path / "site"):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(f"http://localhost:{server.server_port}/list/")
        playwright.expect(page.locator(".people")).to_contain_text("Nobody yet")
        wait_for_worker(page)
        server.is_down = True
        page.reload()
        playwright.expect(page.locator(".people")).to_contain_text("Nobody yet")
        browser.close()


# ---------------------------------------------------------------------------------------
# A browser and a computer at home.
# ---------------------------------------------------------------------------------------


@browser_test
@pytest.mark.slow
def test_peer_at_home_holds_a_copy_and_changes_it(make_user: UserMaker, tmp_path: Path) -> None:
    alice = make_user()
    alice.make_list("Groceries")
    alice.add("Tomatoes", "6")
    command = [sys.executable, str(HERE / "peer.py"), "--dir", str(tmp_path / "home")]
    # The relay of the test is on this machine.
    command.append("--allow-private-relays")

    def run(*words: str) -> str:
        return subprocess.run(
            [*command, *words], check=True, capture_output=True, text=True, timeout=90
        ).stdout

    opened = run("open", alice.share("Home"), "--name", "Alice")
    alice.sees("Home", "#people")
    assert run("list") == "Groceries\n  [ ] Tomatoes (6)\n"
    alice.page.click("#people button:has-text('Compare')")
    assert alice.page.locator("#emoji li").first.inner_text().split()[-1] in opened
    alice.page.keyboard.press("Escape")
    with subprocess.Popen([*command, "run"], stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr
            said = [running.stderr.readline() for _ in range(2)]
            assert said == ["Syncing. Ctrl-C ends.\n", "Alice: connected.\n"]
            alice.add("Butter")
            reads_up_to_date(alice)
            run("add", "Olive oil", "--quantity", "1 l")
            run("done", "tomatoes")
            # Sooner than by connecting anew.
            alice.sees("Olive oil 1 l", timeout_ms=500 * IDLE_S)
            alice.sees("Tomatoes", "#done-items")
            alice.add("Bread")
            reads_up_to_date(alice)
            assert "  [ ] Bread\n" in run("list")
        finally:
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=20)
    assert running.returncode == 0


# ---------------------------------------------------------------------------------------
# Looks: everybody can use it.
# ---------------------------------------------------------------------------------------


def axe_source() -> str:
    """Return axe-core, or skip."""
    more = os.environ.get("NODE_PATH", "").split(os.pathsep)
    places = [HERE / "node_modules", ROOT / "js" / "node_modules", *map(Path, more)]
    for place in places:
        if (place / AXE).is_file():
            return (place / AXE).read_text(encoding="utf-8")
    pytest.skip("axe-core is missing: npm install --ignore-scripts")


def complaints_of_axe(page: Any, source: str) -> list[str]:
    """Return what axe-core finds wrong."""
    page.evaluate(source)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {[node['html'][:200] for node in one['nodes']]}"
        for one in found["violations"]
    ]


@browser_test
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_and_dialogs_please_axe(make_user: UserMaker, scheme: str) -> None:
    source = axe_source()
    alice, bob = (
        make_user(color_scheme=scheme),
        make_user(color_scheme=scheme, viewport={"width": 360, "height": 740}),
    )
    wrong = {"empty": complaints_of_axe(alice.page, source)}
    alice.make_list("Groceries")
    for text in ("Tomatoes", "Bread"):
        alice.add(text, "2")
    alice.tick("Bread")
    link = alice.share("Bob")
    bob.visit(link)
    wrong["connect"] = complaints_of_axe(bob.page, source)
    bob.page.fill("#connect-name", "Alice")
    bob.page.click("#connect-form [type=submit]")
    bob.sees("Tomatoes")
    wrong["phone"] = complaints_of_axe(bob.page, source)
    reads_up_to_date(alice)
    wrong["shared"] = complaints_of_axe(alice.page, source)
    openers = {
        "share": "#share",
        "settings": "#open-settings",
        "new": "#new-list",
        "list": "#edit-list",
        "link": "#have-link",
        "item": "[aria-label='Change Tomatoes']",
        "compare": "#people button:has-text('Compare')",
        "renew": "#people button:has-text('New key')",
        "unshare": "#people button:has-text('Unshare')",
    }
    for name, opener in openers.items():
        alice.page.click(opener)
        alice.page.wait_for_selector("dialog[open]")
        wrong[name] = complaints_of_axe(alice.page, source)
        alice.page.keyboard.press("Escape")
    assert {name: found for name, found in wrong.items() if found} == {}


@browser_test
@pytest.mark.slow
def test_everything_can_be_done_by_keyboard(make_user: UserMaker) -> None:
    page = make_user().page

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def focused() -> str:
        return str(
            page.evaluate(
                "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
            )
        )

    page.focus("#first-name")
    page.keyboard.type("Groceries")
    press("Enter")
    assert focused() == "add-text"
    for text in ("Milk", "Bread"):
        page.keyboard.type(text)
        press("Enter")
        assert focused() == "add-text"
    press("Tab", "Tab", "Tab", "Space")
    playwright.expect(page.locator("#done-items")).to_contain_text("Milk")
    # It went to the basket with what it is on.
    assert focused().startswith("box:")
    press("Space")
    playwright.expect(page.locator("#open-items")).to_contain_text("Milk")
    press("Tab")
    assert focused() == "Change Milk"
    press("Enter")
    assert focused() == "item-text"
    press("Escape")
    assert focused() == "Change Milk"


def picture(page: Any, directory: Path, name: str) -> None:
    """Take a screenshot."""
    page.evaluate("document.activeElement.blur()")
    page.evaluate("document.getElementById('toast').replaceChildren()")
    # With a path, Playwright would begin threads that stay.
    (directory / f"{name}.png").write_bytes(page.screenshot())


PICTURED = (
    ("Tomatoes", "6"),
    ("Sourdough bread", ""),
    ("Olive oil", "1 l"),
    ("Mozzarella", "2"),
    ("Basil", "1 pot"),
    ("Oat milk", "3"),
)


@browser_test
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_phone_and_desktop(make_user: UserMaker, tmp_path: Path, scheme: str) -> None:
    directory = HERE / "screenshots" if os.environ.get("SCREENSHOTS") else tmp_path
    directory.mkdir(exist_ok=True)
    alice = make_user(color_scheme=scheme, viewport={"width": 1280, "height": 800})
    phone = {"width": 390, "height": 844}
    bob = make_user(color_scheme=scheme, viewport=phone, device_scale_factor=2, has_touch=True)
    alice.make_list("Groceries")
    for text, quantity in PICTURED:
        alice.add(text, quantity)
    link = alice.share("Bob")
    alice.page.click("#people button:has-text('Show link')")
    picture(alice.page, directory, f"desktop-share-{scheme}")
    alice.page.keyboard.press("Escape")
    bob.visit(link)
    bob.page.wait_for_selector("#connect-dialog[open]")
    picture(bob.page, directory, f"phone-connect-{scheme}")
    bob.page.fill("#connect-name", "Alice")
    bob.page.click("#connect-form [type=submit]")
    bob.sees("Tomatoes")
    bob.tick("Sourdough bread")
    bob.tick("Oat milk")
    alice.sees("Oat milk", "#done-items")
    alice.page.click("#people button:has-text('Compare')")
    picture(alice.page, directory, f"desktop-compare-{scheme}")
    alice.page.click("#emoji-same")
    alice.page.click("#new-list")
    alice.page.fill("#name-text", "Hardware store")
    alice.page.click("#name-form [type=submit]")
    alice.add("Screws", "50")
    link = alice.share("Home")
    alice.page.click("#lists button:has-text('Groceries')")
    reads_up_to_date(alice)
    picture(alice.page, directory, f"desktop-{scheme}")
    picture(bob.page, directory, f"phone-{scheme}")
    bob.page.evaluate("document.querySelector('.people').scrollIntoView()")
    picture(bob.page, directory, f"phone-people-{scheme}")
    assert len(list(directory.glob(f"*-{scheme}.png"))) >= 6
    for user in (alice, bob):
        assert user.page.evaluate(IS_WITHIN)
