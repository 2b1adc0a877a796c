"""What is under way goes on: over a long way, in another network, and after a while without any."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import (
    ETC,
    HOSTS,
    RELAY_NAME,
    RELAY_PORT,
    UP,
    Home,
    Lab,
    Line,
    Namespace,
    lacking,
    open_lab,
)
from people import PATIENCE_S, Command, Person, pair, send_file

pytestmark = pytest.mark.slow

CELL = "up1"
# A file takes ten seconds there.
WIFI_LINE = Line(delay_ms=15, bits_per_s=2e7)
FILE_BYTES = 20_000_000
SATELLITE = Line(delay_ms=300)
# Longer than a request takes that nobody answers.
AWAY_S = 12.0
PORTAL_PORT = 8079


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Lend a lab, or skip the test."""
    if lacking():
        pytest.skip(lacking())
    with open_lab(tmp_path) as lab:
        yield lab


class Phone(NamedTuple):
    """A host at home that has a second way out, over a network of its own."""

    host: Namespace
    wifi: Home
    cell: Home

    def lose_wifi(self) -> None:
        """Let the Wi-Fi and its address go."""
        self.host.ip(f"address flush dev {UP}", f"link set {UP} down")

    def lose_wifi_silently(self) -> None:
        """Let the Wi-Fi fall silent; its address stays, and another way is preferred."""
        self.wifi.router.ip("link set lan0 down")
        self.host.ip(f"route del default dev {UP}")

    def lose_all(self) -> None:
        """Let both ways go."""
        self.host.ip(f"link set {CELL} down", f"link set {UP} down")

    def find_wifi(self) -> None:
        """Let the Wi-Fi be back, with the same address."""
        self.host.ip(
            f"link set {UP} up", f"route add default via 192.168.{self.wifi.number}.1 dev {UP}")


def make_phone(lab: Lab) -> Phone:
    """Return a phone that prefers its Wi-Fi."""
    wifi, cell = lab.home(line=WIFI_LINE), lab.home()
    host = wifi.host()
    lab.wire(host, CELL, cell.router, CELL)
    cell.router.ip(f"link set {CELL} master lan0")
    host.ip(
        f"address add 192.168.{cell.number}.99/24 dev {CELL}",
        f"route add default via 192.168.{cell.number}.1 dev {CELL} metric 700")
    return Phone(host, wifi, cell)


def begin_to_send(alice: Person, bob: Person) -> tuple[Command, Command]:
    """Begin to send a file; return both commands once a part of it has come."""
    path = alice.folder / "file.bin"
    path.write_bytes(os.urandom(FILE_BYTES))
    inbox = bob.folder / "inbox"
    inbox.mkdir()
    commands = send_file(alice, bob, path)
    until(lambda: any(part.stat().st_size > 1_000_000 for part in inbox.rglob("*")
                      if part.is_file()))
    return commands


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < end_s, "not in time"
        pause.wait(0.05)


@pytest.mark.parametrize(("who", "change"), [
    pytest.param("Alice", Phone.lose_wifi_silently, id="the sender's Wi-Fi falls silent"),
    pytest.param("Bob", Phone.lose_wifi, id="the recipient's Wi-Fi goes"),
])
def test_file_goes_on_in_another_network(
    lab: Lab, who: str, change: Callable[[Phone], None],
) -> None:
    """Alice sends a file to Bob, and one of them leaves the house."""
    phone = make_phone(lab)
    places = {"Alice": phone.host, "Bob": phone.host}
    for name in places.keys() - {who}:
        places[name] = lab.home().host()
    alice, bob = (Person(lab, name, place) for name, place in places.items())
    pair(alice, bob)
    sends, receives = begin_to_send(alice, bob)
    change(phone)
    changed_s = time.monotonic()
    sends.wait_for("broken")
    again = sends.wait_for("connected")
    print(f"{who}: connected again {again.at_s - changed_s:.1f} s after the change")
    sent = sends.wait_for("sent")
    assert sent.told["there_before"] > 0
    assert receives.wait_for("received").told["sha256"] == sent.told["sha256"]


class Break(NamedTuple):
    """Bob's network goes, and comes back."""

    bob: Namespace
    goes: Callable[[], None]
    comes_back: Callable[[], None]


def wifi_off(lab: Lab) -> Break:
    """His device sees it go."""
    phone = make_phone(lab)
    return Break(phone.host, phone.lose_all, phone.find_wifi)


def provider_away(lab: Lab) -> Break:
    """His device sees nothing: its router is there, and swallows all."""
    home = lab.home(line=WIFI_LINE)
    return Break(
        home.host(), functools.partial(put_away, home.router, "drop"),
        functools.partial(home.router.nft, "delete table inet away"))


def put_away(router: Namespace, verdict: str) -> None:
    """Let nothing through a router."""
    router.nft("table inet away { chain forward {"
               f" type filter hook forward priority -1; {verdict}; }}; }}")


BREAKS = {"the Wi-Fi": wifi_off, "the provider": provider_away}


def test_file_goes_on_once_there_is_a_network_again(lab: Lab) -> None:
    """Bob's is away until both sides have seen that the connection is over."""
    broken = {}
    for room, make in BREAKS.items():
        cut = make(lab)
        alice = Person(lab, "Alice", lab.home().host(), room=room)
        bob = Person(lab, "Bob", cut.bob, room=room)
        pair(alice, bob)
        broken[room] = (cut, begin_to_send(alice, bob))
        cut.goes()
    for _, commands in broken.values():
        for command in commands:
            command.wait_for("broken")
    for cut, _ in broken.values():
        cut.comes_back()
    back_s = time.monotonic()
    for room, (_, (sends, receives)) in broken.items():
        again = sends.wait_for("connected")
        print(f"{room}: connected again {again.at_s - back_s:.1f} s after it was back")
        assert sends.wait_for("sent").told["there_before"] > 0
        receives.wait_for("received")


class Hindrance(NamedTuple):
    """What is between somebody and the relay, and how it goes."""

    host: Namespace
    goes: Callable[[], None]


def refused(lab: Lab) -> Hindrance:
    """The router says that there is no way."""
    home = lab.home()
    put_away(home.router, "reject")
    return Hindrance(
        home.host(), functools.partial(home.router.nft, "delete table inet away"))


def swallowed(lab: Lab) -> Hindrance:
    """The router says nothing."""
    home = lab.home()
    put_away(home.router, "drop")
    return Hindrance(
        home.host(), functools.partial(home.router.nft, "delete table inet away"))


def unnamed(lab: Lab) -> Hindrance:
    """Nobody knows the name of the relay."""
    host = lab.home().host()
    hosts = ETC / host.name / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    # Into the same file: programs have it as their own already.
    return Hindrance(host, functools.partial(name_all, hosts))


def name_all(hosts: Path) -> None:
    """Let a host know all names again."""
    hosts.write_text(HOSTS)


def captive(lab: Lab) -> Hindrance:
    """The router shows a page of its own, and lets nothing else through."""
    home = lab.home()
    lab.bad_server("portal", home.router, PORTAL_PORT)
    home.router.nft(
        "table inet portal { chain pre { type nat hook prerouting priority -100;"
        f' iifname "lan0" tcp dport {RELAY_PORT} redirect to :{PORTAL_PORT}; }};'
        " chain forward { type filter hook forward priority -1; drop; }; }")
    return Hindrance(
        home.host(), functools.partial(home.router.nft, "delete table inet portal"))


HINDRANCES = {
    "refused": refused, "swallowed": swallowed, "no name": unnamed, "a portal": captive}


def test_what_is_in_the_way_at_the_start_goes_and_two_connect(lab: Lab) -> None:
    """Each is behind a NAT, so that they need the relay's STUN server too."""
    begun = {}
    for room, make in HINDRANCES.items():
        ways = (make(lab), make(lab))
        alice, bob = (
            Person(lab, name, way.host, relay=RELAY_NAME, room=room)
            for name, way in zip(("Alice", "Bob"), ways, strict=True))
        shares = alice.start("share", "Bob")
        opens = bob.start("open", shares.wait_for("link").told["link"], "--name", "Alice", "--yes")
        begun[room] = (ways, (shares, opens))
    for _, commands in begun.values():
        for command in commands:
            command.wait_for("waiting")
    threading.Event().wait(AWAY_S)
    for ways, _ in begun.values():
        for way in ways:
            way.goes()
    back_s = time.monotonic()
    for room, (_, commands) in begun.items():
        connected = [command.wait_for("connected") for command in commands]
        took_s = max(event.at_s for event in connected) - back_s
        print(f"{room}: connected {took_s:.1f} s after it was gone")


# How long the file takes is for bench/transfer.py to say.
SATELLITE_PATIENCE_S = 600.0


def test_connection_over_a_satellite_holds(lab: Lab) -> None:
    """A round trip takes 600 ms. The file takes longer than the connections that used to break."""
    alice = Person(lab, "Alice", lab.home(line=SATELLITE).host())
    bob = Person(lab, "Bob", lab.home().host())
    pair(alice, bob)
    sends, _ = begin_to_send(alice, bob)
    sent = sends.wait_for("sent", SATELLITE_PATIENCE_S)
    # It would have gone on with what was there.
    assert sent.told["there_before"] == 0
