"""connectoid.js in real Chromium: the vectors, and two profiles that pair and connect through a real relay.

Skipped where Chromium (CHROMIUM, or /usr/bin/chromium) or Playwright is missing.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from connectoid import AiortcAdapter, Connectoid, Store

HERE = Path(__file__).parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is missing"),
]
# Everything stays on this machine: there is no other address in a container without a network.
ARGS = ["--no-sandbox", "--allow-loopback-in-peer-connection", "--disable-features=WebRtcHideLocalIpsWithMdns"]
PAGE = b"<!doctype html><meta charset=utf-8><link rel=icon href='data:,'><title>Test</title>"
CONNECTED_MS = 30_000


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the checkout, and an empty page at /."""

    def do_GET(self) -> None:
        """Answer, without a line for each request."""
        if self.path.partition("?")[0] == "/":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Serve the library and return the URL of an empty page."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(HERE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def relay() -> Iterator[str]:
    """Start a relay and return its URL."""
    flags = ["--host", "127.0.0.1", "--port", "0", "--db", ":memory:", "--stun"]
    command = [sys.executable, "connectoid_relay.py", *flags]
    with subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = re.search(r"http:\S+", process.stderr.readline())
        assert found
        yield f"{found[0]}/"
        process.terminate()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Return what starts browsers."""
    with playwright.sync_playwright() as started:
        yield started.chromium


Open = Callable[[str], Any]


@pytest.fixture
def profile(chromium: Any, tmp_path: Path, site: str) -> Iterator[Open]:
    """Return a function that opens a page in the browser profile of a name."""
    contexts: dict[str, Any] = {}

    def open_page(name: str) -> Any:
        if name not in contexts:
            contexts[name] = chromium.launch_persistent_context(
                str(tmp_path / name), executable_path=CHROMIUM, args=ARGS, headless=True)
        page = contexts[name].new_page()
        page.on("console", lambda message: print(name, message.text))
        page.on("pageerror", lambda error: print(name, "error", error))
        page.goto(site)
        return page

    yield open_page
    for context in contexts.values():
        context.close()


START = """async ([relay, store]) => {
    const lib = await import("/connectoid.js");
    window.lib = lib;
    window.told = [];
    window.problems = [];
    window.app = new lib.Connectoid(await lib.Store.open(store), [relay], {
        onEvent: (name, event) => told.push(event), onProblem: (error) => problems.push(String(error)) });
    await app.start();
}"""


def start(page: Any, relay: str) -> Any:
    """Start the contacts of a profile in a page."""
    page.evaluate(START, [relay, "contacts"])
    return page


def pair(alice: Any, bob: Any, site: str) -> None:
    """Share and open a link, and connect."""
    link = alice.evaluate("(url) => app.share('Bob', url)", site)
    bob.evaluate("(link) => app.open(link, 'Alice')", link)
    connect(alice, bob)


def connect(alice: Any, bob: Any) -> None:
    """Connect two that are paired, or about to be, and keep the channels."""
    for page, name in ((alice, "Bob"), (bob, "Alice")):
        page.evaluate("(name) => { app.connect(name).then((channel) => { window.channel = channel; }); }", name)
    for page in (alice, bob):
        page.wait_for_function("window.channel && !channel.closed", timeout=CONNECTED_MS)


def talk(sender: Any, receiver: Any, text: str) -> None:
    """Send a text over the channel, and find it there."""
    sender.evaluate("(text) => channel.send(text)", text)
    assert receiver.evaluate("channel.receive()") == text


def contact(page: Any) -> Any:
    """Return what can be shown of the one contact of a page."""
    return page.evaluate("(({ name, state, comparison, attempt }) => ({ name, state, comparison, attempt }))"
                         "(app.contacts()[0])")


def test_vectors_pass_in_chromium(profile: Open) -> None:
    page = profile("alice")
    failures, count = page.evaluate("""async () => {
        const { checks } = await import("/vector_checks.mjs");
        const all = await checks(async (name) => (await fetch(`/vectors/${name}.json`)).json());
        const failures = [];
        for (const [name, check] of all) await check().catch((error) => failures.push(`${name}: ${error}`));
        return [failures, all.length];
    }""")
    assert failures == []
    assert count > 700  # as many as there are


def test_profiles_pair_connect_and_go_on_after_a_reload(profile: Open, relay: str, site: str) -> None:
    alice, bob = start(profile("alice"), relay), start(profile("bob"), relay)
    pair(alice, bob, site)
    talk(alice, bob, "milk, bread")
    talk(bob, alice, "and butter 🧈")
    assert contact(alice)["comparison"] == contact(bob)["comparison"] != []
    bob.reload()
    alice.wait_for_function("channel.closed", timeout=CONNECTED_MS)
    start(bob, relay)
    assert contact(bob)["state"] == "paired"
    connect(alice, bob)
    talk(alice, bob, "there again")
    bob.evaluate("app.unshare('Alice')")
    alice.wait_for_function("told.includes('unshared')", timeout=CONNECTED_MS)
    assert contact(alice)["state"] == "ended"
    assert alice.evaluate("problems") == bob.evaluate("problems") == []


def test_much_data_arrives_whole_and_in_order(profile: Open, relay: str, site: str) -> None:
    alice, bob = start(profile("alice"), relay), start(profile("bob"), relay)
    pair(alice, bob, site)
    alice.evaluate("""() => { (async () => {
        for (let number = 0; number < 400; number += 1) await channel.send(new Uint8Array(60_000).fill(number));
        await channel.send("end");
        await channel.close();
    })(); }""")
    assert bob.evaluate("""async () => {
        const seen = [];
        for await (const message of channel) seen.push(message === "end" ? message : message[0] + message.length);
        return seen;
    }""") == [number % 256 + 60_000 for number in range(400)] + ["end"]


@pytest.mark.parametrize("role", ["share", "open"])
def test_browser_and_python_connect(profile: Open, relay: str, site: str, role: str) -> None:
    pytest.importorskip("aiortc")
    page = start(profile("bob"), relay)
    with Connectoid(Store(":memory:"), [(relay, None)], AiortcAdapter()) as app:
        if role == "share":
            page.evaluate("(link) => app.open(link, 'Alice')", app.share("Bob", site))
        else:
            app.open(page.evaluate("(url) => app.share('Alice', url)", site), "Bob")
        page.evaluate("() => { app.connect('Alice').then((channel) => { window.channel = channel; }); }")
        channel = app.connect("Bob", CONNECTED_MS / 1_000)
        page.wait_for_function("window.channel", timeout=CONNECTED_MS)
        for number in range(50):
            channel.send(bytes([number]) * 60_000)
        channel.send("end")
        came = page.evaluate("""async () => {
            const seen = [];
            for await (const message of channel) {
                if (message === "end") return seen;
                seen.push([message[0], message.length]);
            }
        }""")
        assert came == [[number, 60_000] for number in range(50)]
        page.evaluate("channel.send(Uint8Array.of(1, 2, 255))")
        assert channel.receive(10) == b"\1\2\xff"
        assert list(app.contacts()[0].comparison) == contact(page)["comparison"] != []


def test_second_tab_is_told_that_the_app_is_open(profile: Open, relay: str) -> None:
    start(profile("alice"), relay)
    second = profile("alice")
    with pytest.raises(playwright.Error, match="open in another tab"):
        start(second, relay)


def test_private_keys_in_the_store_cannot_be_taken_out(profile: Open, relay: str, site: str) -> None:
    page = start(profile("alice"), relay)
    page.evaluate("(url) => app.share('Bob', url)", site)
    assert page.evaluate("""async () => {
        const [{ privateKey, invited }] = app.contacts();
        const done = (request) => new Promise((resolve) => { request.onsuccess = () => resolve(request.result); });
        const db = await done(indexedDB.open("contacts"));
        const [record] = await done(db.transaction("contacts").objectStore("contacts").getAll());
        db.close();
        const pairs = [privateKey, ...invited.keys, record.privateKey, ...record.invited.keys];
        return Promise.all(pairs.map((pair) => (
            crypto.subtle.exportKey("pkcs8", pair.privateKey).then(() => "out", () => "kept"))));
    }""") == ["kept"] * 4


def test_store_that_is_full_is_said_and_nothing_is_sent(profile: Open, relay: str, site: str) -> None:
    page = start(profile("alice"), relay)
    page.evaluate("(url) => app.share('Bob', url)", site)
    page.evaluate("""() => {
        IDBObjectStore.prototype.put = () => { throw new DOMException("", "QuotaExceededError"); };
    }""")
    with pytest.raises(playwright.Error, match="storage of this browser is full"):
        page.evaluate("app.unshare('Bob')")
    assert contact(page)["state"] == "invited"
