"""Two browsers in the first networks of the table: Chromium, each in a network of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import (
    RELAY_IPV4,
    RELAY_PORT,
    ROOT,
    SYMMETRIC,
    TURN_PORT,
    UP,
    Lab,
    Namespace,
    lacking,
    open_lab,
)
from networks_of_people import FOR_USER, NETWORKS, Network
from test_changes import Phone, make_phone

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow

# Each page is served within its own network: browsers have Web Crypto for localhost.
PAGES_PORT = 8000
PATIENCE_MS = 100_000
ARGS = ["--no-sandbox", "--disable-features=WebRtcHideLocalIpsWithMdns"]
START = """async (relay) => {
    const { Connectoid, Store } = await import("/js/connectoid.js");
    window.app = new Connectoid(await Store.open("contacts"), [relay], { allowHttp: true });
    await app.start();
}"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Lend a lab, or skip the test."""
    if lacking():
        pytest.skip(lacking())
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    with open_lab(tmp_path) as lab:
        yield lab


@pytest.fixture
def chromium() -> Iterator[Any]:
    """Return what starts browsers. A lab that is made after it ends them before."""
    with playwright.sync_playwright() as started:
        yield started.chromium


def open_page(
    lab: Lab, chromium: Any, place: Namespace, arguments: Sequence[str] = ARGS,
) -> Any:
    """Return a page with the library in a browser that has a network of its own."""
    lab.start(*place.command(
        sys.executable, "-m", "http.server", str(PAGES_PORT), "--bind", "127.0.0.1",
        "--directory", str(ROOT)))
    program = lab.folder / f"chromium-{place.name}"
    program.write_text(f'#!/bin/sh\nexec {" ".join(place.command(CHROMIUM))} "$@"\n')
    program.chmod(0o755)
    browser = chromium.launch(executable_path=str(program), args=[*arguments], headless=True)
    lab.ending.callback(browser.close)
    page = browser.new_page()
    page.on("console", lambda message: print(place.name, message.text))
    url = f"http://127.0.0.1:{PAGES_PORT}/js/"
    for _ in range(100):
        try:
            page.goto(url)
            break
        except playwright.Error:
            # The server of the page is not there yet.
            page.wait_for_timeout(100)
    page.evaluate(START, f"http://{RELAY_IPV4}:{RELAY_PORT}/")
    return page


@pytest.mark.parametrize("network", NETWORKS[:3], ids=[network.name for network in NETWORKS[:3]])
def test_two_browsers_connect(chromium: Any, lab: Lab, network: Network) -> None:
    """One shares, the other opens the link."""
    alice, bob = (open_page(lab, chromium, place) for place in network.make(lab))
    link = alice.evaluate("app.share('Bob', location.href)")
    began_s = time.monotonic()
    bob.evaluate("(link) => app.open(link, 'Alice')", link)
    for page, name in ((alice, "Bob"), (bob, "Alice")):
        page.evaluate("(name) => { app.connect(name).then((c) => { window.channel = c; }); }", name)
    for page in (alice, bob):
        page.wait_for_function("window.channel", timeout=PATIENCE_MS)
    print(f"{network.name}, Chromium: connected after {time.monotonic() - began_s:.1f} s")


# Have a connection whenever there is none, as an app that syncs has.
STAY = """(name) => {
    window.connections = 0;
    (async () => {
        for (;;) {
            window.channel = await app.connect(name);
            window.connections += 1;
            for await (const message of channel) window.came = message;
        }
    })();
}"""


@pytest.mark.parametrize("change", [
    pytest.param(Phone.lose_wifi_silently, id="the Wi-Fi falls silent"),
    pytest.param(Phone.lose_wifi, id="the Wi-Fi goes"),
])
def test_browser_connects_anew_in_another_network(
    chromium: Any, lab: Lab, change: Callable[[Phone], None],
) -> None:
    """It is never offline, and nobody tells the page of another network."""
    phone = make_phone(lab)
    alice, bob = (open_page(lab, chromium, place) for place in (phone.host, lab.home().host()))
    link = alice.evaluate("app.share('Bob', location.href)")
    bob.evaluate("(link) => app.open(link, 'Alice')", link)
    for page, name in ((alice, "Bob"), (bob, "Alice")):
        page.evaluate(STAY, name)
    for page in (alice, bob):
        page.wait_for_function("connections === 1", timeout=PATIENCE_MS)
    change(phone)
    changed_s = time.monotonic()
    for page in (alice, bob):
        page.wait_for_function("connections > 1 && !channel.closed", timeout=PATIENCE_MS)
    print(f"Chromium: connected again {time.monotonic() - changed_s:.1f} s after the change")
    alice.evaluate("channel.send('here')")
    bob.wait_for_function("window.came === 'here'", timeout=PATIENCE_MS)


# ---------------------------------------------------------------------------------------
# The doctor of the page: what it finds of networks that are known.
# ---------------------------------------------------------------------------------------

EXAMINE = """async ([relays, iceServers]) => {
    const { examine } = await import("/js/connectoid.js");
    const found = [];
    for await (const finding of examine({ relays, iceServers })) found.push(finding);
    return found;
}"""
NO_UDP = """table inet noudp { chain forward { type filter hook forward priority -1;
    meta l4proto udp drop; }; }"""


def address_of(place: Namespace) -> str:
    """Return the address that a place has at the internet."""
    shown = subprocess.run(
        place.command("ip", "-j", "-4", "address", "show", "dev", UP), check=True,
        stdout=subprocess.PIPE)
    return str(json.loads(shown.stdout)[0]["addr_info"][0]["local"])


def public(lab: Lab) -> Namespace:
    """A host with an address of its own."""
    return lab.place()


def home(lab: Lab) -> Namespace:
    """A host behind a NAT that keeps a port."""
    return lab.home().host()


def symmetric(lab: Lab) -> Namespace:
    """A host behind a NAT with a port for each destination."""
    return lab.home(SYMMETRIC).host()


def without_udp(lab: Lab) -> Namespace:
    """A host in a network that lets no datagram out."""
    house = lab.home()
    house.router.nft(NO_UDP)
    return house.host()


class Found(NamedTuple):
    """What a page finds: of the way out, and of TURN over UDP, over TCP, and without the password.
    """

    way: str
    family: str = "IPv4"
    turn: tuple[str, ...] = ("turn_relays", "turn_relays", "turn_login")


# As browsers are: pages see no address of the device.
HIDING = ARGS[:1]
NOTHING_BY_UDP = Found("way_silent", "", ("turn_silent", "turn_relays", "turn_silent"))


@pytest.mark.parametrize(("make", "arguments", "known"), [
    pytest.param(public, ARGS, Found("way_open"), id="public"),
    pytest.param(home, HIDING, Found("way_one_port"), id="home"),
    pytest.param(symmetric, HIDING, Found("way_symmetric"), id="symmetric"),
    pytest.param(without_udp, HIDING, NOTHING_BY_UDP, id="without UDP"),
])
def test_browser_finds_what_its_network_lets_through(
    chromium: Any, lab: Lab, make: Callable[[Lab], Namespace], arguments: Sequence[str],
    known: Found,
) -> None:
    """There are a relay, a second STUN server elsewhere, and TURN by UDP and TCP."""
    lab.turn(*FOR_USER)
    second = lab.place()
    lab.start(*second.command(
        "turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", "--stun-only",
        f"--listening-port={TURN_PORT}", "--log-file=stdout", "--pidfile=stun.pid"))
    page = open_page(lab, chromium, make(lab), arguments)
    server = f"turn:{RELAY_IPV4}:{TURN_PORT}"
    login = {"username": "user", "credential": "password"}
    found = page.evaluate(EXAMINE, [[f"http://{RELAY_IPV4}:{RELAY_PORT}/"], [
        {"urls": f"stun:{address_of(second)}:{TURN_PORT}"},
        {"urls": [server, f"{server}?transport=tcp"], **login},
        {"urls": f"{server}?transport=udp", **login, "credential": "wrong"},
    ]])
    names = [finding["found"] for finding in found]
    stun = "stun_silent" if known.way == "way_silent" else "stun_answers"
    assert names == [
        "asks_relays", "relay_answers", "asks_stun", stun, stun, known.way, "asks_turn",
        *known.turn, "all_with_turn"]
    assert found[names.index(known.way)]["about"] == known.family
