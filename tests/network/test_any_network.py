"""Two people with the command line, in the networks of the table.

What is asserted is that they connect, within a limit that has room for a busy machine. What it took
is printed: `bench/networks.py` makes a table of it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, lacking, open_lab
from networks_of_people import NETWORKS, Network
from people import PATIENCE_S, Person, pair, send_file

pytestmark = pytest.mark.slow

FILE_BYTES = 2_000_000

CONNECTING = [network for network in NETWORKS if network.connects]
APART = [network for network in NETWORKS if not network.connects]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Lend a lab, or skip the test."""
    if lacking():
        pytest.skip(lacking())
    with open_lab(tmp_path) as lab:
        yield lab


def settle_in(lab: Lab, network: Network) -> tuple[Person, Person]:
    """Put Alice and Bob into a network."""
    places = network.make(lab)
    alice, bob = (
        Person(lab, name, place, relay=network.relay, ice_servers=network.ice_servers)
        for name, place in zip(("Alice", "Bob"), places, strict=True))
    return alice, bob


@pytest.mark.parametrize("network", CONNECTING, ids=[network.name for network in CONNECTING])
def test_two_people_connect(lab: Lab, network: Network) -> None:
    """One shares, the other opens the link."""
    if network.needs_coturn and shutil.which("turnserver") is None:
        pytest.skip("turnserver is missing: apt-get install coturn")
    alice, bob = settle_in(lab, network)
    print(f"{network.name}: connected after {pair(alice, bob):.1f} s")
    if network.is_narrow:
        exchange_files(alice, bob)


def exchange_files(*people: Person) -> None:
    """Send a file each way."""
    for sender, recipient in (people, people[::-1]):
        path = sender.folder / f"{sender.name}.bin"
        path.write_bytes(os.urandom(FILE_BYTES))
        (sender.folder / "inbox").mkdir(exist_ok=True)
        sends, receives = send_file(sender, recipient, path)
        began_s = time.monotonic()
        sent = sends.wait_for("sent")
        print(f"{sender.name}'s file took {sent.at_s - began_s:.1f} s")
        assert receives.wait_for("received").told["sha256"] == sent.told["sha256"]
        # Nobody else may use the stores meanwhile.
        for command in (sends, receives):
            command.process.wait(PATIENCE_S)


@pytest.mark.parametrize("network", APART, ids=[network.name for network in APART])
def test_two_people_hear_that_their_networks_do_not_connect(lab: Lab, network: Network) -> None:
    """No direct path exists, and both are told what would help."""
    alice, bob = settle_in(lab, network)
    shares = alice.start("share", "Bob")
    opens = bob.start("open", shares.wait_for("link").told["link"], "--name", "Alice", "--yes")
    began_s = opens.wait_for("waiting").at_s
    told = opens.wait_for("unreachable")
    print(f"{network.name}: told after {told.at_s - began_s:.1f} s")
