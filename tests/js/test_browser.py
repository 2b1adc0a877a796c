"""The library in real browsers: the vectors, and two profiles that pair and connect.

Chromium (CHROMIUM, or /usr/bin/chromium) does everything, driven by Playwright. Firefox ESR and
WebKitGTK, the nearest to Safari that Linux has, run the vectors and keep keys. Firefox connects,
but Debian's WebKitGTK has no WebRTC. A browser that is missing is skipped.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import needs, serving
from turn_server import turn_server

from connectoid import AiortcAdapter, Channel, Connectoid, NotConnectedError, Store
from connectoid_relay import Relay, SqliteStore, Turn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
# Debian: libwebkit2gtk-4.1-0 brings it. It has no headless mode, so it needs the X server of xvfb.
MINI_BROWSER = next(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), None)
XVFB = shutil.which("xvfb-run")
NEEDED = {
    "firefox": (FIREFOX, "apt-get install firefox-esr"),
    "webkit": (MINI_BROWSER and XVFB, "apt-get install libwebkit2gtk-4.1-0 xvfb xauth"),
}
# Everything stays on this machine: there is no other address in a container without a network.
ARGS = [
    "--no-sandbox",
    "--allow-loopback-in-peer-connection",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
]
PAGE = b"<!doctype html><meta charset=utf-8><link rel=icon href='data:,'><title>Test</title>"
CONNECTED_MS = 30_000
DELAYS_S = (0, 5, 15, 30, 60)
# How long a browser may take for a task, its start included.
REPLY_S = 60
STOP_S = 20
# Headless Firefox connects within one machine as Chromium does: no mDNS, loopback too.
FIREFOX_SETTINGS = """
user_pref("media.peerconnection.ice.loopback", true);
user_pref("media.peerconnection.ice.obfuscate_host_addresses", false);
user_pref("browser.shell.checkDefaultBrowser", false);
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("network.captive-portal-service.enabled", false);
user_pref("network.connectivity-service.enabled", false);
user_pref("app.update.enabled", false);
"""
# Do what the test asks for, and say what came of it.
REMOTE = b"""<!doctype html><meta charset=utf-8><title>Test</title><script type=module>
for (;;) {
    const { source, argument } = await (await fetch("/next" + location.search)).json();
    const reply = {};
    try {
        const found = (0, eval)(`(${source})`);
        reply.value = await (typeof found === "function" ? found(argument) : found);
    } catch (error) {
        reply.error = String(error);
    }
    await fetch("/done" + location.search, { method: "POST", body: JSON.stringify(reply) });
}
</script>"""


Queue = queue.SimpleQueue[dict[str, Any]]


class Site(http.server.ThreadingHTTPServer):
    """Serve the checkout, and hand tasks to browsers, by the name in their URL."""

    def __init__(self) -> None:
        self.remotes: dict[str, tuple[Queue, Queue]] = {}
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(ROOT)))

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of browsers that end while they wait."""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the checkout, an empty page at /, and at /remote one that obeys a `Remote`."""

    server: Site

    def do_GET(self) -> None:
        """Answer, without a line for each request."""
        path, _, name = self.path.partition("?")
        if path == "/next":
            self._reply("application/json", json.dumps(self.server.remotes[name][0].get()).encode())
        elif path in {"/", "/remote"}:
            self._reply("text/html", PAGE if path == "/" else REMOTE)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Take what came of a task."""
        reply = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.remotes[self.path.partition("?")[2]][1].put(reply)
        self._reply("text/plain", b"")

    def _reply(self, form: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", form)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Remote:
    """A browser that Playwright does not drive: its page asks for tasks. It acts like a `Page`."""

    def __init__(self, server: Site, kind: str, home: Path) -> None:
        home.mkdir()
        (home / "user.js").write_text(FIREFOX_SETTINGS, encoding="utf-8")
        commands = {
            "firefox": [FIREFOX, "--headless", "--no-remote", "--profile", home],
            "webkit": [XVFB, "-a", MINI_BROWSER],
        }
        self._server = server
        self._home = home
        self._command = [str(word) for word in commands[kind]]
        self._begin()

    def _begin(self) -> None:
        name = str(len(self._server.remotes))
        self._tasks, self._replies = self._server.remotes[name] = (
            queue.SimpleQueue(),
            queue.SimpleQueue(),
        )
        # Root gets no sandbox. Everything that is written goes to the profile.
        places = {
            name: str(self._home)
            for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "TMPDIR")
        }
        self._process = subprocess.Popen(
            [*self._command, f"http://127.0.0.1:{self._server.server_port}/remote?{name}"],
            start_new_session=True,
            env={**os.environ, **places, "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def evaluate(self, source: str, argument: object = None) -> Any:
        """Return the value of an expression, or of a function of the argument."""
        self._tasks.put({"source": source, "argument": argument})
        try:
            reply = self._replies.get(timeout=REPLY_S)
        except queue.Empty:
            pytest.fail(f"no answer in {REPLY_S} s to: {source[:200]}")
        assert "error" not in reply, reply
        return reply.get("value")

    def wait_for_function(self, source: str, timeout: float) -> None:
        """Wait until an expression is true."""
        assert self.evaluate(
            """async ([source, timeout]) => {
            const over = performance.now() + timeout;
            while (!(0, eval)(source) && performance.now() < over) {
                await new Promise((next) => setTimeout(next, 20));
            }
            return Boolean((0, eval)(source));
        }""",
            [source, timeout],
        ), source

    def restart(self) -> None:
        """End the browser, and start it again with the same profile."""
        self.close()
        self._begin()

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            # What is left of it.
            os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    """Serve the checkout."""
    with Site() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def site(server: Site) -> str:
    """Return the URL of an empty page beside the library."""
    return f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def relay() -> Iterator[str]:
    """Start a relay and return its URL."""
    flags = ["--host", "127.0.0.1", "--port", "0", "--db", ":memory:", "--stun"]
    command = [sys.executable, "connectoid_relay.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = re.search(r"http:\S+", process.stderr.readline())
        assert found
        yield f"{found[0]}/"
        process.terminate()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Return what starts browsers."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
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
                str(tmp_path / name), executable_path=CHROMIUM, args=ARGS, headless=True
            )
        page = contexts[name].new_page()
        page.on("console", lambda message: print(name, message.text))
        page.on("pageerror", lambda error: print(name, "error", error))
        page.goto(site)
        return page

    yield open_page
    for context in contexts.values():
        context.close()


Start = Callable[[str, str], Remote]


@pytest.fixture
def remote(server: Site, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a browser of a kind, with a profile of its own."""
    started: list[Remote] = []

    def start_browser(kind: str, name: str) -> Remote:
        found, hint = NEEDED[kind]
        if not found:
            pytest.skip(f"{kind} is missing: {hint}")
        started.append(Remote(server, kind, tmp_path / name))
        return started[-1]

    yield start_browser
    for browser in started:
        browser.close()


START = """async ([relays, store, lateMs]) => {
    const lib = await import("/js/connectoid.js");
    window.lib = lib;
    window.told = [];
    window.problems = [];
    window.late = lateMs;
    const fetchLate = async (url, init) => { // what is sent is on its way for a while
        if (!late || !String(init.body).includes('"action":"send"')) return fetch(url, init);
        setTimeout(() => fetch(url, { ...init, signal: null }), late);
        return new Response('{"ok":true}');
    };
    window.app = new lib.Connectoid(await lib.Store.open(store), relays, { fetch: fetchLate,
        onEvent: (name, event) => told.push(event),
        onProblem: (error) => problems.push(String(error)),
    });
    await app.start();
}"""


def start(page: Any, *relays: str, store: str = "contacts", late_s: int = 0) -> Any:
    """Start the contacts of a profile in a page."""
    page.evaluate(START, [relays, store, 1_000 * late_s])
    return page


def pair(alice: Any, bob: Any, site: str) -> None:
    """Share and open a link, and connect."""
    share(alice, bob, site)
    connect(alice, bob)


def share(alice: Any, bob: Any, site: str) -> None:
    """Share and open a link."""
    link = alice.evaluate("(url) => app.share('Bob', url)", site)
    bob.evaluate("(link) => app.open(link, 'Alice')", link)


def connect(alice: Any, bob: Any, timeout_ms: float = CONNECTED_MS) -> None:
    """Connect two that are paired, or about to be, and keep the channels."""
    for page, name in ((alice, "Bob"), (bob, "Alice")):
        begin_to_connect(page, name)
    for page in (alice, bob):
        page.wait_for_function("window.channel && !channel.closed", timeout=timeout_ms)


def begin_to_connect(page: Any, name: str) -> None:
    """Ask for a connection, and keep its channel once it is there."""
    page.evaluate(
        "(name) => { app.connect(name).then((channel) => { window.channel = channel; }); }", name
    )


def talk(sender: Any, receiver: Any, text: str) -> None:
    """Send a text over the channel, and find it there."""
    sender.evaluate("(text) => channel.send(text)", text)
    assert receiver.evaluate("channel.receive()") == text


def contact(page: Any) -> Any:
    """Return what can be shown of the one contact of a page."""
    return page.evaluate(
        "(({ name, state, comparison, attempt }) => ({ name, state, comparison, attempt }))"
        "(app.contacts()[0])"
    )


def check_vectors(page: Any) -> None:
    """Run the vectors in a page."""
    failures, count = page.evaluate("""async () => {
        const { checks } = await import("/js/tests/vector_checks.mjs");
        const all = await checks(async (name) => (await fetch(`/vectors/${name}.json`)).json());
        const failures = [];
        for (const [name, check] of all) {
            await check().catch((error) => failures.push(`${name}: ${error}`));
        }
        return [failures, all.length];
    }""")
    assert failures == []
    # As many as there are.
    assert count > 700


def test_vectors_pass_in_chromium(profile: Open) -> None:
    check_vectors(profile("alice"))


def test_profiles_pair_connect_and_go_on_after_a_reload(
    profile: Open, relay: str, site: str
) -> None:
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
        for (let number = 0; number < 400; number += 1) {
            await channel.send(new Uint8Array(60_000).fill(number));
        }
        await channel.send("end");
        await channel.close();
    })(); }""")
    assert bob.evaluate("""async () => {
        const seen = [];
        for await (const message of channel) {
            seen.push(message === "end" ? message : message[0] + message.length);
        }
        return seen;
    }""") == [number % 256 + 60_000 for number in range(400)] + ["end"]


@needs("turnserver")
def test_browsers_connect_by_turn_servers_alone_that_their_relay_lends(
    profile: Open, site: str
) -> None:
    """Nothing is set in the pages but the relay."""
    secret = "4f1de7f2c5a84f1de7f2c5a8"
    with turn_server(f"use-auth-secret\nstatic-auth-secret={secret}\n") as port:
        store = SqliteStore(":memory:")
        relay = Relay(store, turn=Turn([f"turn:127.0.0.1:{port}"], secret.encode()))
        with contextlib.closing(relay), serving(relay) as server:
            url = f"http://127.0.0.1:{server.server_port}/"
            alice, bob = start(profile("alice"), url), start(profile("bob"), url)
            for page in (alice, bob):
                page.evaluate("() => { app.privacy = { relayOnly: true }; }")
            pair(alice, bob, site)
            talk(alice, bob, "over TURN")
            assert alice.evaluate("problems") == bob.evaluate("problems") == []


@pytest.mark.parametrize("role", ["share", "open"])
def test_browser_and_python_connect(profile: Open, relay: str, site: str, role: str) -> None:
    pytest.importorskip("aiortc")
    page = start(profile("bob"), relay)
    with Connectoid(Store(":memory:"), [(relay, None)], AiortcAdapter()) as app:
        if role == "share":
            page.evaluate("(link) => app.open(link, 'Alice')", app.share("Bob", site))
        else:
            app.open(page.evaluate("(url) => app.share('Alice', url)", site), "Bob")
        page.evaluate(
            "() => { app.connect('Alice').then((channel) => { window.channel = channel; }); }"
        )
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


def test_private_keys_in_the_store_cannot_be_taken_out(
    profile: Open, relay: str, site: str
) -> None:
    page = start(profile("alice"), relay)
    page.evaluate("(url) => app.share('Bob', url)", site)
    assert take_keys_out(page) == ["kept"] * 4


def take_keys_out(page: Any) -> Any:
    """Try to take the private keys of the one contact out of the page and out of its store."""
    return page.evaluate("""async () => {
        const [{ privateKey, invited }] = app.contacts();
        const done = (request) => new Promise((resolve) => {
            request.onsuccess = () => resolve(request.result);
        });
        const db = await done(indexedDB.open("contacts"));
        const [record] = await done(db.transaction("contacts").objectStore("contacts").getAll());
        db.close();
        const pairs = [privateKey, ...invited.keys, record.privateKey, ...record.invited.keys];
        return Promise.all(pairs.map((pair) => (
            crypto.subtle.exportKey("pkcs8", pair.privateKey).then(() => "out", () => "kept"))));
    }""")


def test_store_that_is_full_is_said_and_nothing_is_sent(
    profile: Open, relay: str, site: str
) -> None:
    page = start(profile("alice"), relay)
    page.evaluate("(url) => app.share('Bob', url)", site)
    page.evaluate("""() => {
        IDBObjectStore.prototype.put = () => { throw new DOMException("", "QuotaExceededError"); };
    }""")
    with pytest.raises(playwright.Error, match="storage of this browser is full"):
        page.evaluate("app.unshare('Bob')")
    assert contact(page)["state"] == "invited"


def test_counts_of_refusals_are_kept_in_the_store_of_a_browser(
    profile: Open, relay: str, site: str
) -> None:
    """Also where an earlier version has made it. A deleted contact leaves none."""
    page = profile("alice")
    page.goto(site)
    kept = page.evaluate("""async () => {
        const { Store } = await import("/js/connectoid.js");
        const done = (request) => new Promise((resolve) => {
            request.onsuccess = () => resolve(request.result);
        });
        const opening = indexedDB.open("old", 1);
        opening.onupgradeneeded = () => (
            opening.result.createObjectStore("contacts", { autoIncrement: true }));
        (await done(opening)).close();
        const store = await Store.open("old");
        const number = await store.add({ name: "Bob" });
        await store.saveRefusals(number, { sdp: 3, unknown: 1 });
        await store.saveRefusals(number + 1, { sdp: 3 });
        store.close();
        const again = await Store.open("old");
        const before = [...await again.loadRefusals()];
        await again.delete(number);
        const after = [...await again.loadRefusals()];
        again.close();
        return [before, after];
    }""")
    assert kept == [[[1, {"sdp": 3}]], []]


def unused_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_one_of_two_relays_that_is_dead_holds_nothing_up(
    profile: Open, relay: str, site: str
) -> None:
    dead = f"http://127.0.0.1:{unused_port()}/"
    alice, bob = start(profile("alice"), dead, relay), start(profile("bob"), dead, relay)
    pair(alice, bob, site)
    talk(alice, bob, "milk, bread")
    alice.evaluate("channel.close()")
    bob.wait_for_function("channel.closed", timeout=CONNECTED_MS)
    connect(alice, bob)
    talk(bob, alice, "and butter")
    for page in (alice, bob):
        problems = page.evaluate("problems")
        assert problems
        assert all(f"{dead} cannot be reached" in problem for problem in problems)


def test_answer_that_comes_late_connects_a_new_pair(
    profile: Open, relay: str, site: str
) -> None:
    pairs = []
    # Side by side: each in a store of its own.
    for delay_s in DELAYS_S:
        store = f"contacts {delay_s}"
        alice = start(profile("alice"), relay, store=store, late_s=delay_s)
        bob = start(profile("bob"), relay, store=store)
        share(alice, bob, site)
        for page, name in ((alice, "Bob"), (bob, "Alice")):
            begin_to_connect(page, name)
        pairs.append((delay_s, alice, bob))
    for delay_s, alice, bob in pairs:
        for page in (alice, bob):
            page.wait_for_function(
                "window.channel && !channel.closed", timeout=1_000 * delay_s + CONNECTED_MS
            )
        talk(alice, bob, f"after {delay_s} s")
        assert alice.evaluate("problems") == bob.evaluate("problems") == []


def test_answer_of_a_page_that_was_away_connects_a_known_pair(
    profile: Open, relay: str, site: str
) -> None:
    pairs = []
    for delay_s in DELAYS_S:
        store = f"contacts {delay_s}"
        alice, bob = (start(profile(name), relay, store=store) for name in ("alice", "bob"))
        pair(alice, bob, site)
        # A phone that goes into a pocket hides its page, freezes it, and shows it again.
        alice.evaluate(
            """(delayMs) => {
            dispatchEvent(new Event("pagehide"));
            setTimeout(() => dispatchEvent(new Event("pageshow")), delayMs);
        }""",
            1_000 * delay_s,
        )
        bob.wait_for_function("channel.closed", timeout=CONNECTED_MS)
        begin_to_connect(bob, "Alice")
        pairs.append((delay_s, alice, bob))
    for delay_s, alice, bob in pairs:
        bob.wait_for_function("!channel.closed", timeout=1_000 * delay_s + CONNECTED_MS)
        begin_to_connect(alice, "Bob")
        alice.wait_for_function("!channel.closed", timeout=CONNECTED_MS)
        talk(alice, bob, f"after {delay_s} s")
        assert alice.evaluate("problems") == bob.evaluate("problems") == []


# ---------------------------------------------------------------------------------------
# Other browsers.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["firefox", "webkit"])
def test_other_browser_passes_the_vectors_and_keeps_keys(
    remote: Start, relay: str, site: str, kind: str
) -> None:
    page = remote(kind, "alice")
    check_vectors(page)
    start(page, relay)
    page.evaluate("(url) => app.share('Bob', url)", site)
    assert take_keys_out(page) == ["kept"] * 4
    signer = page.evaluate("app.contacts()[0].signer")
    page.restart()
    start(page, relay)
    assert page.evaluate(
        "app.contacts().map(({ name, state, signer }) => [name, state, signer])"
    ) == [["Bob", "invited", signer]]
    assert take_keys_out(page) == ["kept"] * 4
    # It still signs, and opens what was sealed to the mailbox: the same key as before.
    assert page.evaluate("""async () => {
        const [{ privateKey, signer, invited }] = app.contacts();
        const [suite, octets] = [new lib.SystemSuite(), Uint8Array.of(1, 2, 3)];
        await suite.verify(signer, await suite.sign(privateKey, octets), octets);
        const [{ pub }] = lib.parseAddress(invited.address);
        const sealed = await suite.seal(pub, octets, octets);
        return [...await suite.open(invited.keys[0], octets, sealed)];
    }""") == [1, 2, 3]
    assert [
        problem for problem in page.evaluate("problems") if "WebRTC is missing" not in problem
    ] == []


@pytest.mark.parametrize("role", ["share", "open"])
def test_firefox_and_chromium_connect(
    remote: Start, profile: Open, relay: str, site: str, role: str
) -> None:
    both = [start(remote("firefox", "one"), relay), start(profile("other"), relay)]
    alice, bob = both if role == "share" else reversed(both)
    pair(alice, bob, site)
    talk(alice, bob, "milk, bread")
    talk(bob, alice, "and butter 🧈")
    assert contact(alice)["comparison"] == contact(bob)["comparison"] != []
    assert alice.evaluate("problems") == bob.evaluate("problems") == []


GATHER = """async (iceServers) => {
    const { PeerAdapter } = await import("/js/connectoid.js");
    const adapter = new PeerAdapter();
    const told = [];
    return new Promise((resolve) => {
        adapter.start((contact, event, attemptId, value) => {
            if (event === "trouble") told.push(value);
            if (event === "gathered") resolve([value?.type ?? "nothing", told]);
        });
        adapter.gather(1, 1, null, Promise.resolve({ iceServers }));
    }).finally(() => adapter.stop());
}"""


def gathers_in_spite_of_bad_servers(page: Any) -> None:
    """See that a browser, which makes no connection with one of these, makes one without it."""
    bad = [{"urls": "turn:without-login.example"}, {"urls": "stun:a:b:c"}]
    for server in bad:
        assert page.evaluate(GATHER, [server, {"urls": "stun:127.0.0.1:3478"}]) == [
            "offer", [f"{server['urls']} cannot be used: this browser refuses it."]]


def test_server_that_chromium_refuses_costs_a_warning_and_no_connection(profile: Open) -> None:
    gathers_in_spite_of_bad_servers(profile("alice"))


def test_server_that_firefox_refuses_costs_a_warning_and_no_connection(remote: Start) -> None:
    gathers_in_spite_of_bad_servers(remote("firefox", "alice"))


EXAMINE = """async ([relays, iceServers]) => {
    const { examine } = await import("/js/connectoid.js");
    const found = [];
    for await (const finding of examine({ relays, iceServers })) {
        if (finding.state !== "ask") found.push(finding.found);
    }
    return found;
}"""


def finds_servers(page: Any, site: str) -> None:
    """See what a page finds of a server of pages, of nobody, and of TURN that a relay lends."""
    secret = "4f1de7f2c5a84f1de7f2c5a8"
    with turn_server(f"use-auth-secret\nstatic-auth-secret={secret}\n") as port:
        for own_secret, turn, follows in [
            (secret, "turn_relays", ["all_with_turn"]),
            # The host has mistyped it.
            (secret[1:], "turn_login", ["all_without_stun"]),
        ]:
            lends = Turn([f"turn:127.0.0.1:{port}"], own_secret.encode())
            relay = Relay(SqliteStore(":memory:"), turn=lends)
            with contextlib.closing(relay), serving(relay) as server:
                url = f"http://127.0.0.1:{server.server_port}/"
                # By another name it is another origin, which allows no page to read it.
                hidden = site.replace("127.0.0.1", "localhost")
                relays = [url, site, hidden, f"http://127.0.0.1:{unused_port()}/"]
                assert page.evaluate(EXAMINE, [relays, []]) == [
                    "relay_answers", "relay_lends_turn", "relay_wrong", "relay_hidden",
                    "relay_unreachable", turn, *follows]


def test_firefox_tells_what_it_finds_of_servers(remote: Start, site: str) -> None:
    finds_servers(remote("firefox", "alice"), site)


def test_chromium_tells_what_it_finds_of_servers(profile: Open, site: str) -> None:
    finds_servers(profile("alice"), site)


# ---------------------------------------------------------------------------------------
# Browsers with Python, which looks at every packet of SCTP before aiortc does.
# ---------------------------------------------------------------------------------------

MIB = 1_048_576
FULL_BYTES = 65_536
# Twice. Browsers send nothing of their own meanwhile but heartbeats and questions for consent.
IDLE_S = 32
SEND_MUCH = f"""async () => {{
    for (let number = 0; number < {MIB // FULL_BYTES}; number += 1) {{
        await channel.send(new Uint8Array({FULL_BYTES}).fill(number));
    }}
}}"""
TAKE_MUCH = f"""async () => {{
    const seen = [];
    while (seen.length < {MIB // FULL_BYTES}) {{
        const message = await channel.receive();
        seen.push([message.length, message.every((octet) => octet === message[0]), message[0]]);
    }}
    return seen;
}}"""


class Mixed(NamedTuple):
    """A browser, and Python on the other side."""

    page: Any
    app: Connectoid

    def connect(self) -> Channel:
        """Connect both; return the channel of Python."""
        begin_to_connect(self.page, "Alice")
        channel = self.app.connect("Bob", CONNECTED_MS / 1_000)
        self.page.wait_for_function("window.channel && !channel.closed", timeout=CONNECTED_MS)
        return channel

    def exchange(self, channel: Channel) -> None:
        """Send a MiB each way, in the largest messages."""
        expected = [[FULL_BYTES, True, number] for number in range(MIB // FULL_BYTES)]
        for number in range(MIB // FULL_BYTES):
            channel.send(bytes([number]) * FULL_BYTES)
        assert self.page.evaluate(TAKE_MUCH) == expected
        self.page.evaluate(SEND_MUCH)
        came = [channel.receive(CONNECTED_MS / 1_000) for _ in expected]
        assert came == [bytes([number]) * FULL_BYTES for number in range(MIB // FULL_BYTES)]


def stay_with_python(page: Any, relay: str, site: str, role: str) -> None:
    """Pair, exchange much, be idle, close from each side and connect again."""
    start(page, relay)
    with Connectoid(Store(":memory:"), [(relay, None)], AiortcAdapter()) as app:
        both = Mixed(page, app)
        if role == "share":
            page.evaluate("(link) => app.open(link, 'Alice')", app.share("Bob", site))
        else:
            app.open(page.evaluate("(url) => app.share('Alice', url)", site), "Bob")
        channel = both.connect()
        both.exchange(channel)
        # It does not matter who made the link.
        for _ in range(2 * (role == "share")):
            assert not page.evaluate(
                "(s) => new Promise((go) => setTimeout(() => go(channel.closed), s))",
                1_000 * IDLE_S)
        assert not channel.is_closed
        both.exchange(channel)
        page.evaluate("channel.close()")
        with pytest.raises(NotConnectedError):
            channel.receive(CONNECTED_MS / 1_000)
        channel = both.connect()
        both.exchange(channel)
        channel.close()
        page.wait_for_function("channel.closed", timeout=CONNECTED_MS)
        both.exchange(both.connect())
        assert app.refusals("Bob") == page.evaluate("app.refusals('Alice')") == {}
        assert page.evaluate("problems") == []


@pytest.mark.parametrize("role", ["share", "open"])
def test_chromium_stays_with_python(
    profile: Open, relay: str, site: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("aiortc")
    stay_with_python(profile("bob"), relay, site, role)
    assert caplog.messages == []


@pytest.mark.parametrize("role", ["share", "open"])
def test_firefox_stays_with_python(
    remote: Start, relay: str, site: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("aiortc")
    stay_with_python(remote("firefox", "bob"), relay, site, role)
    assert caplog.messages == []


# A frame, so that the page that asks what to do stays; `list` is the shopping list's document.
OPEN_LIST = """(url) => new Promise((resolve) => {
    const onload = () => {
        Object.defineProperty(window, "list", { get: () => frame.contentDocument });
        window.press = (selector) => list.querySelector(selector).click();
        window.fill = (selector, text) => { list.querySelector(selector).value = text; };
        resolve();
    };
    const frame = document.createElement("iframe");
    Object.assign(frame, { src: url, width: 1000, height: 800, onload });
    document.body.append(frame);
})"""


def begin_list(page: Remote, url: str) -> None:
    """Open the shopping list in a browser, and put Tomatoes on a first one."""
    page.evaluate(OPEN_LIST, url)
    page.wait_for_function("list.querySelector('#empty:not([hidden])')", CONNECTED_MS)
    page.evaluate("press('#first-list button')")
    page.wait_for_function("list.querySelector('#list:not([hidden])')", CONNECTED_MS)
    page.evaluate("fill('#add-text', 'Tomatoes'), press('#add button')")
    page.wait_for_function(
        "list.querySelector('#open-items').innerText.includes('Tomatoes')", CONNECTED_MS
    )


def test_shopping_list_in_firefox_is_shared_with_chromium(
    remote: Start, profile: Open, relay: str, site: str
) -> None:
    alice, bob = remote("firefox", "alice"), profile("bob")
    page = f"{site}examples/shopping_list/?relay={relay}"
    begin_list(alice, page)
    alice.wait_for_function("list.querySelector('#relay-dialog').open", CONNECTED_MS)
    alice.evaluate("press('#relay-form [type=submit]')")
    alice.wait_for_function("!list.querySelector('#relay-dialog').open", CONNECTED_MS)
    alice.evaluate(
        "press('#share'), fill('#share-name', 'Bob'), press('#share-form [type=submit]')"
    )
    alice.wait_for_function("list.querySelector('#share-url').value", CONNECTED_MS)
    # A relay on this machine has to be Bob's own as well.
    bob.goto(page)
    bob.click("#relay-form [type=submit]")
    bob.wait_for_selector("#relay-dialog", state="hidden")
    bob.goto(alice.evaluate("list.querySelector('#share-url').value"))
    bob.fill("#connect-name", "Alice")
    bob.click("#connect-form [type=submit]")
    bob.wait_for_selector("#open-items :text('Tomatoes')", timeout=CONNECTED_MS)
    bob.fill("#add-text", "Bread")
    bob.press("#add-text", "Enter")
    alice.wait_for_function(
        "list.querySelector('#open-items').innerText.includes('Bread')", CONNECTED_MS
    )


def test_shopping_list_without_webrtc_works_and_says_what_to_do(remote: Start, site: str) -> None:
    page = remote("webkit", "alice")
    begin_list(page, f"{site}examples/shopping_list/")
    said = page.evaluate("list.querySelector('#blocked').innerText")
    if page.evaluate("typeof RTCPeerConnection") == "undefined":
        assert said == (
            "This browser cannot connect to others: its WebRTC is off. "
            "Turn it on, or use another browser."
        )
    else:
        assert said == ""
