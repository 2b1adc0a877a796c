"""Versions: apps of different ages agree on one, or say that a newer app is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from fake_wire import (
    APP,
    App,
    Attacker,
    World,
    count,
    invite,
    link_of,
    open_link,
    paired,
    read_by,
    settle,
    sign_octets,
)

from connectoid import (
    EVENTS,
    ContactRecord,
    LinkError,
    Send,
    UnsupportedVersionError,
    hash_jws,
    prove,
    read_jws,
    read_link,
    sign_jws,
)
from connectoid.limits import MAX_VERSION, MAX_VERSIONS
from connectoid.messages import HEADER
from connectoid.versions import VERSIONS, is_list_of_versions

NEWER = "needs_newer_app"


@pytest.mark.parametrize("marker", ["2~", "9~", "10~", f"{MAX_VERSION - 1}~", f"{MAX_VERSION}~"])
@pytest.mark.parametrize("rest", ["", "anything.at_all", "A" * 66 + ".b..c"])
def test_link_of_the_future_needs_a_newer_app(marker: str, rest: str) -> None:
    for link in (f"{APP}#connectoid={marker}{rest}", f"{APP}?connectoid={marker}{rest}"):
        with pytest.raises(UnsupportedVersionError, match="needs a newer version of this app"):
            read_link(link)


@pytest.mark.parametrize("marker", ["0~", "1~", "02~", f"{MAX_VERSION + 1}~", "-2~", "2", "~"])
def test_link_with_a_damaged_marker_is_damaged(toy: World, marker: str) -> None:
    link = f"{APP}#connectoid={marker}{link_of(invite(toy)).text}"
    with pytest.raises(LinkError, match="damaged") as error:
        read_link(link)
    assert not isinstance(error.value, UnsupportedVersionError)


@pytest.mark.parametrize(("versions", "is_list"), [
    (list(range(1, MAX_VERSIONS)), True),
    (list(range(1, MAX_VERSIONS + 1)), True),
    (list(range(1, MAX_VERSIONS + 2)), False),
    ([MAX_VERSION - 1], True),
    ([MAX_VERSION], True),
    ([MAX_VERSION + 1], False),
    ([0], False),
    ([], False),
    ([2, 1], False),
    ([True], False),
    ((1,), False),
])
def test_list_of_versions_is_short_and_ascending(versions: Any, is_list: bool) -> None:
    assert is_list_of_versions(versions) is is_list


def test_hello_and_welcome_say_what_is_spoken(toy: World) -> None:
    alice, bob = paired(toy)
    hello = next(each for each in read_by(alice) if each.type == "hello")
    welcome = next(each for each in read_by(bob) if each.type == "welcome")
    assert hello.payload["versions"] == welcome.payload["versions"] == list(VERSIONS)
    assert [alice.record.protocol, bob.record.protocol] == [max(VERSIONS)] * 2


def test_inviter_is_told_once_that_a_newer_app_is_needed_and_the_link_stays_good(
    toy: World,
) -> None:
    alice = invite(toy)
    link = link_of(alice)
    before = alice.record
    newer = Attacker(toy)
    hellos = [newer.hello(link, versions=versions) for versions in ([3], [3, 4], [MAX_VERSION])]
    effects = alice.hear(*hellos, at=link.address)
    assert (alice.told, count(Send, effects)) == ([NEWER], 0)
    assert (alice.contact.dropped, alice.record) == ({"version": 3}, before)
    bob = open_link(toy, link)
    settle(alice, bob)
    assert (alice.record.state, bob.record.state) == ("paired", "paired")
    assert alice.told.count(NEWER) == 1
    # Anybody who has read the link can have it said.
    assert EVENTS[NEWER].startswith("Somebody with this link")


def test_opener_is_told_that_a_newer_app_is_needed_and_goes_on_once_it_is_there(
    toy: World,
) -> None:
    alice = invite(toy)
    link = link_of(alice)
    bob = open_link(toy, link)
    alice.poll()
    toy.drop(bob.record.addresses[0].address)
    before = bob.record
    bob.hear(welcome_of(alice, versions=[3]))
    assert (bob.told, dict(bob.contact.dropped)) == ([NEWER], {"version": 1})
    assert bob.record == before
    bob.hear(welcome_of(alice, versions=[1, 3]))
    assert (bob.record.state, bob.record.protocol) == ("ready", 1)


def welcome_of(alice: App, **changes: Any) -> str:
    """Return Alice's welcome, with other members, signed by her key."""
    payload = {**read_jws(alice.record.welcome).payload, **changes}
    return sign_jws(alice.world.suite, alice.record.private_key, payload)


def test_opener_counts_the_versions_of_its_hello_and_not_those_of_its_app(toy: World) -> None:
    alice = invite(toy)
    link = link_of(alice)
    bob = open_link(toy, link)
    alice.poll()
    payload = {**read_jws(bob.record.hello).payload, "versions": [1, 3]}
    jws = sign_jws(toy.suite, bob.record.private_key, payload)
    hello = f"{jws}.{prove(link.secret, jws)}"
    bob = bob.restarted(replace(bob.record, hello=hello, hello_hash=hash_jws(jws)).to_json())
    bob.hear(welcome_of(alice, re=hash_jws(jws), versions=[1, 2, 3]))
    assert (bob.record.state, bob.record.protocol) == ("ready", 3)


def test_nobody_in_between_takes_a_version_out_of_a_hello(toy: World) -> None:
    alice = invite(toy)
    link = link_of(alice)
    bob = Attacker(toy)
    relay = Attacker(toy)
    hello = read_jws(bob.hello(link, versions=[1, 2]))
    changed = json.dumps({**hello.payload, "versions": [1]}).encode()
    jws = sign_octets(toy, relay.key, changed, HEADER)
    alice.hear(f"{jws}.{prove(link.secret, jws)}", at=link.address)
    assert dict(alice.contact.dropped) == {"signature": 1}


def test_stored_contact_without_a_version_speaks_the_first(toy: World) -> None:
    for app in paired(toy):
        members = json.loads(app.saved)
        del members["protocol"]
        assert ContactRecord.from_json(json.dumps(members)) == replace(app.record, protocol=1)
