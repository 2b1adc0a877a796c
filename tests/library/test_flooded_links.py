"""Whoever reads a link fills its mailbox at a real relay: both are told, and Bob gets through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from apps import APP_URL, SOON_S, Apps, until
from harness import serving

import connectoid
from connectoid import Now
from connectoid.clock import system_now
from connectoid_relay import Relay, RelayServer, SqliteStore


@pytest.fixture
def server() -> Iterator[RelayServer]:
    """Return a real relay with the default limits."""
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        yield server
    relay.close()


def fill(relay: Relay, link: str, sources: int, each: int) -> None:
    """Fill the mailbox of a link, as somebody with so many addresses does."""
    (mailbox,) = connectoid.parse_address(connectoid.read_link(link).address, allow_http=True)
    request = {"pub": mailbox.pub, "action": "send", "data": "QUJD"}
    for source in range(sources):
        for _ in range(each):
            status, _ = relay.handle(request, f"203.0.113.{source}")
            assert status == 200


def test_reader_with_eight_addresses_does_not_keep_bob_out_and_alice_is_told(
    apps: Apps, server: RelayServer
) -> None:
    """Her app leaves the full mailbox alone for a minute, by its clock, and then reads it again."""
    url = f"http://127.0.0.1:{server.server_port}/"
    minutes = [0]

    def now() -> Now:
        wall_us, monotonic_s = system_now()
        return Now(wall_us, monotonic_s + 70 * minutes[0])

    alice = apps.begin("Alice", url, now=now)
    link = alice.share("Bob", APP_URL)
    fill(server.relay, link, sources=8, each=32)
    until(lambda: ("Alice", "Bob", "flooded") in apps.told, "told of the flood")
    minutes[0] = 1
    bob = apps.begin("Bob", url)
    bob.open(link, "Alice")
    alice.connect("Bob", SOON_S)
    assert apps.told.count(("Alice", "Bob", "flooded")) == 1


def test_bob_is_told_what_a_full_mailbox_means(apps: Apps, server: RelayServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/"
    alice = apps.begin("Alice", url)
    link = alice.share("Bob", APP_URL)
    alice.close()
    # As many customers as there are places.
    fill(server.relay, link, sources=256, each=1)
    bob = apps.begin("Bob", url)
    bob.open(link, "Alice")
    until(lambda: "ask for a new link" in bob.runner.trouble_since(0.0, 1), "told")
