"""Test that links carry the half of an API key that only sends, and the owner keeps the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from apps import APP_URL, SOON_S, Apps, until
from harness import Owner, post, send, serving

import connectoid
import connectoid_relay
from connectoid.contact import Poll
from connectoid.links import Mailbox
from connectoid.roster import OwnKeys, Relay
from connectoid_relay import SEND_KEY_SHARE, Access, Quota, RelayServer, SqliteStore

HERS, HERS_IN_LINKS = "the owner's half", "the half in links"
HIS, HIS_IN_LINKS = "Bob's half", "the half in Bob's addresses"
# Far more than a pairing needs, and soon spent by a reader of the link: what one source may have.
SHARE = 60
SEND_REQUESTS = SHARE * SEND_KEY_SHARE


@pytest.fixture
def server() -> Iterator[RelayServer]:
    """Return a relay that serves Alice and Bob alone, each by two halves of a key."""
    access = Access(
        {HERS: Quota("keys.alice", 10_000), HIS: Quota("keys.bob", 10_000)}, None,
        send_keys={
            HERS_IN_LINKS: Quota("keys.alice.send_key", SEND_REQUESTS),
            HIS_IN_LINKS: Quota("keys.bob.send_key", SEND_REQUESTS),
        })
    relay = connectoid_relay.Relay(SqliteStore(":memory:"), access=access)
    with serving(relay) as server:
        yield server
    relay.close()


def test_address_has_the_half_that_sends_and_checks_have_the_other() -> None:
    keys = OwnKeys()
    relays: Sequence[Relay] = [
        ("https://a/", "hers", "sends"), ("https://b/", "one", None), ("https://c/", None)]
    shown = keys.in_addresses(relays)
    assert shown == (("https://a/", "sends"), ("https://b/", "one"), ("https://c/", None))
    asked = [keys.put_into(Poll(Mailbox("pub", url, ext), "key", 7)) for url, ext in shown]
    assert [poll.mailbox.ext for poll in asked] == ["hers", "one", None]
    # A mailbox at another relay, or with another key, is asked for as its address says.
    for url, ext in (("https://b/", "sends"), ("https://a/", "other"), ("https://a/", None)):
        poll = Poll(Mailbox("pub", url, ext), "key", 7)
        assert keys.put_into(poll) is poll


def test_key_that_has_got_two_halves_stays_here_from_the_next_address_on() -> None:
    keys = OwnKeys()
    keys.in_addresses([("https://a/", "hers", "sends"), ("https://b/", "one")])
    relays = (("https://a/", "hers"), ("https://a/", "other"), ("https://b/", "one"),
              ("https://c/", "hers"), ("https://a/", "sends"), ("https://a/", None))
    assert keys.out_of_addresses(relays) == (("https://a/", "sends"), *relays[1:])


def exts_in(address: str) -> set[str | None]:
    """Return what the mailboxes of an address have in `ext`."""
    return {mailbox.ext for mailbox in connectoid.parse_address(address, allow_http=True)}


def test_pair_with_keys_of_two_halves_connects_and_rotates(
    apps: Apps, server: RelayServer
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/"
    alice = apps.begin("Alice", relays=[(url, HERS, HERS_IN_LINKS)])
    bob = apps.begin("Bob", relays=[(url, HIS, HIS_IN_LINKS)])
    link = alice.share("Bob", APP_URL)
    assert exts_in(connectoid.read_link(link).address) == {HERS_IN_LINKS}
    bob.open(link, "Alice")
    alice.connect("Bob", SOON_S).close()
    until(lambda: ("Bob", "Alice", "disconnected") in apps.told, "disconnected")
    alice.move("Bob")
    alice.connect("Bob", SOON_S).close()
    bob.connect("Alice", SOON_S)
    until(lambda: alice.contacts()[0].pending is None, "Bob wrote to the new address")
    told = [record.contact_address for app in (alice, bob) for record in app.contacts()]
    assert [exts_in(address) for address in told] == [{HIS_IN_LINKS}, {HERS_IN_LINKS}]
    saved = "".join(record.to_json() for app in (alice, bob) for record in app.contacts())
    assert HERS not in saved
    assert HIS not in saved


def test_reader_of_a_link_who_spends_its_key_does_not_keep_the_owner_from_her_mailbox(
    apps: Apps, server: RelayServer
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/"
    alice = apps.begin("Alice", relays=[(url, HERS, HERS_IN_LINKS)])
    bob = apps.begin("Bob", relays=[(url, HIS, HIS_IN_LINKS)])
    link = alice.share("Bob", APP_URL)
    bob.open(link, "Alice")
    alice.connect("Bob", SOON_S).close()
    # The reader takes the key out of the link, and asks for all that he can get.
    (stolen,) = exts_in(connectoid.read_link(link).address)
    statuses = [
        post(server.server_port, send(Owner(number), ext=stolen))[0]
        for number in range(1, SHARE + 2)
    ]
    assert statuses[-1] == 429
    mailbox = alice.contacts()[0].addresses[0].mailboxes[0]
    check = {"pub": mailbox.pub, "action": "check", "at": 0}
    assert post(server.server_port, {**check, "ext": stolen})[0] == 403
    # Alice's own checks go on, and so does what she sends to Bob.
    assert post(server.server_port, {**check, "ext": HERS})[0] == 200
    assert not alice.runner.trouble_since(0.0, 1)
    alice.move("Bob", [(url, HERS)])
    bob.connect("Alice", SOON_S)
