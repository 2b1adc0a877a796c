"""The record as JSON, damaged records, and secrets in texts."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

import pytest
from fake_wire import (
    APP,
    World,
    invite,
    joined,
    link_of,
    open_channel,
    open_link,
    paired,
    secrets_of,
    settle,
)

from connectoid import CONTEXTS, ContactRecord, LinkError, RecordError, Refused, Save, read_link


def all_states(world: World) -> list[ContactRecord]:
    """Return a record of every state that there is."""
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    settle(alice, bob)
    alice.unshare()
    settle(bob)
    return [
        effect.record for app in (alice, bob) for effect in app.done if isinstance(effect, Save)
    ]


def test_record_is_the_same_after_json_in_every_state(world: World) -> None:
    records = all_states(world)
    assert {record.state for record in records} == {
        "invited",
        "welcomed",
        "opened",
        "ready",
        "paired",
        "unshared",
        "ended",
    }
    for record in records:
        assert ContactRecord.from_json(record.to_json()) == record
        json.loads(record.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "null",
        "[]",
        "1",
        '"x"',
        "{}",
        '{"version": 1}',
        "\0",
        '{"version": 1, "role": "inviter"}',
    ],
)
def test_damaged_record_is_told(damage: str) -> None:
    with pytest.raises(RecordError, match="damaged"):
        ContactRecord.from_json(damage)


@pytest.mark.parametrize(
    "change",
    [
        {"relays": None},
        {"relays": [1]},
        {"relays": [["a"]]},
        {"comparison": None},
        {"current": "x"},
        {"current": {"address": "x", "keys": None}},
        {"unknown": 1},
    ],
)
def test_record_with_a_wrong_member_is_told_without_its_secrets(
    toy: World, change: Mapping[str, Any]
) -> None:
    members = json.loads(paired(toy)[0].saved)
    with pytest.raises(RecordError, match="damaged") as error:
        ContactRecord.from_json(json.dumps({**members, **change}))
    assert members["private_key"] not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("cut", [1, 2, 100, 1_000])
def test_record_cut_off_is_told_without_its_secrets(toy: World, cut: int) -> None:
    saved = paired(toy)[0].saved
    with pytest.raises(RecordError, match="damaged") as error:
        ContactRecord.from_json(saved[:-cut])
    assert ContactRecord.from_json(saved).private_key not in "".join(
        traceback.format_exception(error.value)
    )


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_record_of_another_version_is_told(toy: World, version: object) -> None:
    members = json.loads(invite(toy).saved)
    with pytest.raises(RecordError, match="another version"):
        ContactRecord.from_json(json.dumps({**members, "version": version}))


def test_record_without_a_member_is_told(toy: World) -> None:
    members = json.loads(invite(toy).saved)
    for name in (
        "role",
        "state",
        "relays",
        "private_key",
        "invitation",
        "current",
        "comparison",
        "version",
    ):
        with pytest.raises(RecordError):
            ContactRecord.from_json(
                json.dumps({key: value for key, value in members.items() if key != name})
            )


def test_record_from_before_there_were_replaced_addresses_has_none(toy: World) -> None:
    record = paired(toy)[0].record
    members = json.loads(record.to_json())
    assert members.pop("replaced") == []
    assert ContactRecord.from_json(json.dumps(members)) == record


@pytest.mark.parametrize("is_named", [True, False])
def test_record_from_before_named_relays_has_those_of_its_newest_address(
    toy: World, is_named: bool
) -> None:
    members = json.loads(paired(toy)[0].saved)
    urls = [url for url, _ in members["relays"]]
    assert members.pop("named_relays") == urls
    record = ContactRecord.from_json(json.dumps({**members, "relays_named": is_named}))
    assert record.named_relays == (tuple(urls) if is_named else ())


def test_no_repr_shows_a_secret(world: World) -> None:
    alice, bob = paired(world)
    shown = [
        *alice.done,
        *bob.done,
        *all_states(world),
        link_of(alice),
        *alice.contact.polls(world.now),
    ]
    secrets = set().union(
        *(secrets_of(app.record) for app in (alice, bob)),
        *(secrets_of(effect.record) for effect in shown if isinstance(effect, Save)),
        *(secrets_of(record) for record in shown if isinstance(record, ContactRecord)),
    )
    assert len(secrets) > 10
    joining, other = joined(world)
    open_channel(joining)
    text = repr([*shown, joining.contact.attempt, joining.contact, Save(other.record)])
    assert not [secret for secret in secrets if secret in text]
    assert repr(link_of(alice).secret)[2:-1] not in text
    assert repr(joining.contact.attempt.challenge)[2:-1] not in text


def test_no_error_shows_a_secret(world: World) -> None:
    alice = invite(world)
    text = alice.record.invitation
    secret = text.rpartition(".")[2]
    for link in (text[:-1], text + "A", f"B{text[1:]}", f"{APP}#connectoid=x{text}"):
        with pytest.raises(LinkError) as error:
            read_link(link)
        assert secret[:20] not in "".join(traceback.format_exception(error.value))
    key = alice.record.private_key
    with pytest.raises(Refused) as refused:
        world.suite.open(key, CONTEXTS["message"], b"")
    assert key not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "change",
    [
        {"state": "nonsense"},
        {"state": 5},
        {"role": "guest"},
        {"seq": "5"},
        {"seen_seq": None},
        {"expires_us": "soon"},
        {"contact_address": None},
        {"current": 0},
        {"current": {}},
        {"current": {"address": "x", "keys": ["a"]}},
        {"replaced": None},
        {"replaced": [None]},
        {"former": 0},
        {"former": [None]},
        {"replaced": [{"address": "x", "keys": ["a"]}]},
        {"private_key": 1},
    ],
)
def test_record_with_a_member_of_the_wrong_type_is_told(
    toy: World, change: Mapping[str, Any]
) -> None:
    members = json.loads(paired(toy)[0].saved)
    with pytest.raises(RecordError):
        ContactRecord.from_json(json.dumps({**members, **change}))


def test_record_nested_without_end_is_told() -> None:
    with pytest.raises(RecordError):
        ContactRecord.from_json("[" * 100_000)


# The members of a record in all versions so far: users have them on their disks.
SAVED_MEMBERS = {
    "version",
    "role",
    "state",
    "name",
    "relays",
    "private_key",
    "signer",
    "expires_us",
    "invitation",
    "link_hash",
    "hello",
    "hello_hash",
    "welcome",
    "welcome_hash",
    "r",
    "invited",
    "current",
    "pending",
    "replaced",
    "former",
    "rotated_us",
    "contact",
    "contact_address",
    "app",
    "protocol",
    "comparison",
    "verified",
    "differs",
    "seq",
    "seen_seq",
    "used_to",
    "why",
    "named_relays",
    "old_private_key",
    "old_signer",
    "link_private_key",
    "link_signer",
    "renewal_hashes",
    "former_contact",
    "key_news",
    "met",
}


def test_saved_members_keep_their_names(toy: World) -> None:
    for app in paired(toy):
        members = json.loads(app.saved)
        assert members.keys() == SAVED_MEMBERS
        assert members["version"] == 1
        assert members["current"].keys() == {"address", "keys"}
