"""Two apps at one real relay: neither opens the links of the other, and no link is spent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from apps import APP_URL, SOON_S, Apps, until
from harness import serving

import connectoid
from connectoid.links import format_invitation
from connectoid.suite import hash_app
from connectoid_relay import Relay, RelayServer, SqliteStore

LIST = "org.example.list"
CHAT = "org.example.chat"


@pytest.fixture
def server() -> Iterator[RelayServer]:
    """Return a real relay with the default limits."""
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        yield server
    relay.close()


def requests_at(server: RelayServer) -> dict[str, int]:
    """Return how many requests the relay has counted, by operation."""
    counts = server.relay.counts.taken()
    return {
        label: count
        for (name, label), count in counts.items()
        if name == "connectoid_requests_total"
    }


def dropped_by(app: connectoid.Connectoid) -> dict[str, int]:
    """Return how many messages the app's one contact has dropped, by reason."""
    (contact,) = app.runner._roster.contacts.values()
    return dict(contact.dropped)


@pytest.mark.parametrize("other", [CHAT, ""])
def test_another_app_sends_nothing_and_the_link_opens_in_its_own(
    apps: Apps, server: RelayServer, other: str
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/"
    alice = apps.begin("Alice", url, app=LIST)
    link = alice.share("Bob", APP_URL)
    alice.close()
    before = requests_at(server)
    assert before
    eve = apps.begin("Bob's other app", url, app=other)
    with pytest.raises(connectoid.OtherAppError, match="still good"):
        eve.open(link, "Alice")
    assert eve.contacts() == []
    # Closing would have sent what waits.
    eve.close()
    assert requests_at(server) == before
    alice = apps.begin("Alice", url, app=LIST)
    apps.begin("Bob", url, app=LIST).open(link, "Alice")
    alice.connect("Bob", SOON_S)
    assert [record.app for record in alice.contacts()] == [LIST]


@pytest.mark.parametrize("of_link", [CHAT, ""])
def test_link_whose_name_of_an_app_was_changed_pairs_nobody_and_is_not_spent(
    apps: Apps, server: RelayServer, of_link: str
) -> None:
    """Somebody in between writes another app into the link, or none: Alice's drops the hello."""
    url = f"http://127.0.0.1:{server.server_port}/"
    alice = apps.begin("Alice", url, app=LIST)
    link = alice.share("Bob", APP_URL)
    said = connectoid.read_link(link)
    changed = format_invitation(said.address, said.secret, said.commitment, hash_app(of_link))
    eve = apps.begin("Bob's other app", url, app=CHAT)
    eve.open(connectoid.make_link(APP_URL, changed), "Alice")
    until(lambda: dropped_by(alice) == {"app": 1}, "dropped")
    assert [record.state for record in alice.contacts()] == ["invited"]
    assert [record.state for record in eve.contacts()] == ["opened"]
    apps.begin("Bob", url, app=LIST).open(link, "Alice")
    alice.connect("Bob", SOON_S)


def test_link_that_names_no_app_opens_in_any(apps: Apps, server: RelayServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/"
    alice = apps.begin("Alice", url)
    bob = apps.begin("Bob", url, app=LIST)
    bob.open(alice.share("Bob", APP_URL), "Alice")
    alice.connect("Bob", SOON_S)
    assert [record.app for record in bob.contacts()] == [""]


@pytest.mark.parametrize(("app", "is_one"), [
    ("a" * 127, True), ("a" * 128, True), ("a" * 129, False), ("a list", False), ("-a", False),
])
def test_identifier_is_short_and_plain(apps: Apps, app: str, is_one: bool) -> None:
    if is_one:
        apps.begin("Alice", app=app)
        return
    with pytest.raises(connectoid.UsageError, match="identifier"):
        connectoid.Connectoid(connectoid.Store(apps.folder / "other.db"), app=app)
