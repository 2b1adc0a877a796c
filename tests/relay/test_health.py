"""Test the health of a relay, its document and its list of arrivals."""

from __future__ import annotations

import json

import pytest
from harness import HOME, OK_REPLY, START_US, FakeClock, Make, Owner, WatchedStore, refused, send

from connectoid_relay import Limits, Relay, Reply, SqliteStore, StoreError, StoreFull

# Health, the document, the clock, the log


def test_health_probes_at_most_every_5_seconds(make: Make, clock: FakeClock) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    watched.calls.clear()
    for later_s, probes in ((0, 1), (0, 1), (4.999999, 1), (0.000001, 2), (0, 2), (5, 3)):
        clock.advance(later_s)
        assert relay.health() == OK_REPLY
        assert watched.calls["probe"] == probes
    # It was a real write.
    assert watched.inside.time_us() == relay.now_us()


@pytest.mark.parametrize("error", [StoreError("no"), StoreFull("no"), RuntimeError("no")], ids=repr)
def test_health_is_bad_while_the_store_fails(
    make: Make, clock: FakeClock, error: Exception
) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    assert relay.health() == OK_REPLY
    watched.error = error
    for later_s in (5, 0, 4, 1, 0):
        clock.advance(later_s)
        assert refused(relay.health()) == (503, "Busy", 5)
    watched.error = None
    clock.advance(5)
    assert relay.health() == OK_REPLY


def test_health_is_what_it_was_while_a_probe_is_under_way(make: Make) -> None:
    relays: list[Relay] = []
    asked_meanwhile: list[Reply] = []

    class Probed(SqliteStore):
        def probe(self, now_us: int) -> None:
            asked_meanwhile.extend(relay.health() for relay in relays)

    relays.append(make(Probed(":memory:")))
    assert relays[0].health() == OK_REPLY
    assert asked_meanwhile == [OK_REPLY]


def test_health_is_bad_while_nobody_sweeps(relay: Relay, clock: FakeClock) -> None:
    clock.advance(59)
    assert relay.health() == OK_REPLY
    clock.advance(2)
    assert refused(relay.health()) == (503, "Busy", 5)
    relay.sweep()
    assert relay.health() == OK_REPLY


def test_document_has_all_members_and_the_limits_in_force(make: Make) -> None:
    document = make(rate=7, message_ttl_s=100).document()
    assert document.keys() == {
        "name",
        "description",
        "software",
        "version",
        "protocols",
        "contact",
        "limits",
        "retention",
        "udp",
        "stun",
        "turn",
        "notice",
        "price_url",
    }
    retention = {f"{name}_ttl_s": seconds for name, seconds in document["retention"].items()}
    assert document["limits"] | retention == Limits(rate=7, message_ttl_s=100)._asdict()
    assert document["retention"] == {"message": 100, "question": 60, "box": 30 * 86_400}
    assert (document["software"], document["udp"], document["stun"]) == (
        "connectoid_relay",
        False,
        False,
    )
    json.dumps(document, allow_nan=False)


def test_arrivals_are_those_of_the_store(relay: Relay, alice: Owner, bob: Owner) -> None:
    for owner in (alice, bob):
        relay.handle(send(owner), HOME)
    for after_us in (0, START_US, START_US + 1):
        assert relay.arrivals(after_us) == relay.store.arrivals(after_us)
    assert relay.arrivals(START_US) == (START_US + 1, {bob.box})
