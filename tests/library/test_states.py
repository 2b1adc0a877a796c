"""The tables of states, and the public names."""

from __future__ import annotations

import re

import pytest
from fake_wire import World, link_of, open_link, paired, settle
from pages import page

import connectoid
from connectoid import (
    CONNECTING,
    EVENTS,
    PAIRING,
    REASONS,
    ConnectoidError,
    LinkError,
    RecordError,
    Refused,
    UsageError,
)
from connectoid.contact.rules import CONNECTING_STATES, NUMBERED_FOR, PAIRING_STATES


def test_errors_have_one_base_and_every_reason_a_sentence() -> None:
    for error in (UsageError, LinkError, RecordError, Refused):
        assert issubclass(error, ConnectoidError)
    assert all(str(Refused(reason)) == text for reason, text in REASONS.items())
    protocol = page("PROTOCOL.md")
    in_tables = set(re.findall(r"(?m)^\| (?:READ|SDP)-\d+ \| `(\w+)` \|", protocol))
    assert in_tables | {"channel"} == REASONS.keys()
    assert "with the reason `channel`" in protocol
    with pytest.raises(KeyError):
        Refused("because")


def test_all_that_is_public_exists_and_is_documented() -> None:
    assert len(set(connectoid.__all__)) == len(connectoid.__all__)
    for name in connectoid.__all__:
        member = getattr(connectoid, name)
        assert not callable(member) or member.__doc__, name


TABLES = {
    "PAIRING": (PAIRING, {"invited", "opened"}, {"ended"}),
    "CONNECTING": (CONNECTING, {"apart"}, set[str]()),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_rule_has_a_function_and_leads_to_states_of_the_table(name: str) -> None:
    table, _, final = TABLES[name]
    states = {rule.state for rule in table.values()} | final
    for (state, event), rule in table.items():
        assert (rule.state, rule.event) == (state, event)
        assert callable(rule.does)
        assert rule.then
        assert set(rule.then) <= states
        assert len(set(rule.then)) == len(rule.then)


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached_and_left_but_the_final_one(name: str) -> None:
    table, reached, final = TABLES[name]
    states = {rule.state for rule in table.values()} | final
    reached = set(reached)
    for _ in states:
        reached |= {
            state for rule in table.values() if rule.state in reached for state in rule.then
        }
    assert reached == states
    for state in states - final:
        assert any(set(rule.then) - {state} for rule in table.values() if rule.state == state)


def test_every_type_of_message_has_a_place_in_the_table() -> None:
    events = {event for _, event in PAIRING}
    numbered = {kind for kinds in NUMBERED_FOR.values() for kind in kinds}
    assert numbered | set(connectoid.messages.UNNUMBERED) == set(connectoid.messages.MEMBERS)
    assert set(connectoid.messages.UNNUMBERED) | {"unshare", "message"} <= events
    assert {"used", "unshared", "expired"} <= set(EVENTS)


def test_told_is_always_one_of_the_events(toy: World) -> None:
    alice, bob = paired(toy)
    mallory = open_link(toy, link_of(alice))
    settle(alice, mallory)
    alice.unshare()
    settle(alice, bob)
    assert {*alice.told, *bob.told, *mallory.told} <= set(EVENTS)
    assert set(alice.told[:2]) == {"paired", "connected"}
    assert bob.told[0] == "paired"


def test_every_state_is_explained() -> None:
    pairing = {rule.state for rule in PAIRING.values()} | {"ended"}
    connecting = {rule.state for rule in CONNECTING.values()}
    assert pairing == PAIRING_STATES.keys()
    assert connecting == CONNECTING_STATES.keys()
