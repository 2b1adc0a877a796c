"""What is under way goes on: over a long way, in another network, and after a while without any."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import UP, Home, Lab, Line, Namespace, lacking, open_lab
from people import PATIENCE_S, Command, Person, pair, send_file

pytestmark = pytest.mark.slow

CELL = "up1"
# A file takes ten seconds there.
WIFI_LINE = Line(delay_ms=15, bits_per_s=2e7)
FILE_BYTES = 20_000_000
SATELLITE = Line(delay_ms=300)


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


def begin_to_send(lab: Lab, alice: Person, bob: Person) -> tuple[Command, Command]:
    """Begin to send a file; return both commands once a part of it has come."""
    path = lab.folder / "file.bin"
    path.write_bytes(os.urandom(FILE_BYTES))
    inbox = lab.folder / "inbox"
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
    sends, receives = begin_to_send(lab, alice, bob)
    change(phone)
    changed_s = time.monotonic()
    sends.wait_for("broken")
    again = sends.wait_for("connected")
    print(f"{who}: connected again {again.at_s - changed_s:.1f} s after the change")
    sent = sends.wait_for("sent")
    assert sent.told["there_before"] > 0
    assert receives.wait_for("received").told["sha256"] == sent.told["sha256"]


def test_file_goes_on_once_there_is_a_network_again(lab: Lab) -> None:
    """Bob's is away until both sides have seen that the connection is over."""
    phone = make_phone(lab)
    alice, bob = Person(lab, "Alice", lab.home().host()), Person(lab, "Bob", phone.host)
    pair(alice, bob)
    sends, receives = begin_to_send(lab, alice, bob)
    phone.lose_all()
    for command in (sends, receives):
        command.wait_for("broken")
    phone.find_wifi()
    back_s = time.monotonic()
    again = sends.wait_for("connected")
    print(f"connected again {again.at_s - back_s:.1f} s after the network was back")
    assert sends.wait_for("sent").told["there_before"] > 0
    receives.wait_for("received")


def test_relay_that_was_away_at_the_start_brings_two_together_once_it_is_back(lab: Lab) -> None:
    """Each is behind a NAT, so that they need its STUN server too."""
    alice = Person(lab, "Alice", lab.home().host())
    bob = Person(lab, "Bob", lab.home().host())
    lab.internet.nft("table inet away { chain forward {"
                     " type filter hook forward priority 0; reject; }; }")
    shares = alice.start("share", "Bob")
    opens = bob.start("open", shares.wait_for("link").told["link"], "--name", "Alice", "--yes")
    for command in (shares, opens):
        command.wait_for("waiting")
    lab.internet.nft("delete table inet away")
    back_s = time.monotonic()
    connected = [command.wait_for("connected") for command in (shares, opens)]
    print(f"connected {max(event.at_s for event in connected) - back_s:.1f} s after it was back")


def test_connection_over_a_satellite_holds(lab: Lab) -> None:
    """A round trip takes 600 ms. The file takes longer than the connections that used to break."""
    alice = Person(lab, "Alice", lab.home(line=SATELLITE).host())
    bob = Person(lab, "Bob", lab.home().host())
    pair(alice, bob)
    sends, _ = begin_to_send(lab, alice, bob)
    sent = sends.wait_for("sent")
    # It would have gone on with what was there.
    assert sent.told["there_before"] == 0
