"""Hello, welcome, used and ready, with attackers in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from fake_wire import (
    MINUTE_S,
    STALE_S,
    Attacker,
    World,
    apart,
    count,
    invite,
    link_of,
    newest,
    open_link,
    opened_with,
    paired,
    read_by,
    sdp,
    settle,
)

from connectoid import ContactRecord, Gather, Save, Send, parse_invitation, prove, sign_jws


def test_first_contact_forged_by_the_relay_is_dropped_whatever_the_proof(world: World) -> None:
    alice = invite(world)
    link = link_of(alice)
    hello = Attacker(world).hello(link)
    jws = hello.rpartition(".")[0]
    near = prove(link.secret, jws) + "A"
    for proof in ("", "A", "A" * 43, prove(b"", jws), prove(link.commitment, jws), "=" * 43, near):
        alice.hear(f"{jws}.{proof}", at=link.address)
    alice.hear(jws, at=link.address)
    assert alice.contact.dropped == {"proof": 7, "jws": 1}
    assert alice.record.state == "invited"


def test_proof_of_one_hello_does_not_serve_another(world: World) -> None:
    alice = invite(world)
    link = link_of(alice)
    mallory = Attacker(world)
    proof = mallory.hello(link).rpartition(".")[2]
    jws = mallory.hello(link).rpartition(".")[0]
    alice.hear(f"{jws}.{proof}", at=link.address)
    assert alice.contact.dropped == {"proof": 1}


def test_hello_in_another_mailbox_than_the_invitations_is_refused(world: World) -> None:
    alice, _ = apart(world)
    link = link_of(alice)
    hello = Attacker(world).hello(
        parse_invitation(alice.record.invitation), to=newest(alice).address
    )
    alice.hear(hello)
    assert alice.contact.dropped == {"unexpected": 1}
    assert link.address != newest(alice).address


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": "A" * 22}, "commitment"),
        ({"re": "A" * 43}, "reply"),
        ({"from": "Ag" + "A" * 64}, "commitment"),
        ({"to": "elsewhere"}, "recipient"),
        ({"connectoid": ""}, "address"),
        ({"re": None}, "payload"),
        ({"r": ""}, "payload"),
    ],
)
@pytest.mark.parametrize("kind", ["welcome", "used"])
def test_forged_welcome_or_used_is_refused(
    toy: World, kind: str, change: Mapping[str, Any], reason: str
) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    payload = {
        "type": kind,
        "to": newest(bob).address,
        "from": alice.record.signer,
        "seq": 1,
        "re": bob.record.hello_hash,
        "r": alice.record.r,
        "connectoid": link_of(alice).address,
    }
    text = sign_jws(toy.suite, alice.record.private_key, {**payload, **change})
    bob.hear(text)
    assert bob.contact.dropped == {reason: 1}
    assert bob.record.state == "opened"
    bob.hear(sign_jws(toy.suite, alice.record.private_key, payload))
    assert bob.record.state == {"welcome": "ready", "used": "ended"}[kind]


def test_second_hello_after_r_is_known_gets_used_and_changes_nothing(world: World) -> None:
    alice, _ = paired(world)
    link = link_of(alice)
    mallory = Attacker(world)
    before = alice.record
    # The second and third could be ground to any emoji, R being known.
    for _ in range(3):
        alice.hear(mallory.hello(link), at=link.address)
        world.advance(MINUTE_S)
    assert {message.type for message in mallory.received()} == {"used"}
    assert {message.payload["r"] for message in mallory.received()} == {before.r}
    for name in (
        "contact",
        "contact_address",
        "comparison",
        "hello_hash",
        "welcome",
        "state",
        "seen_seq",
    ):
        assert getattr(alice.record, name) == getattr(before, name)


def test_r_leaves_only_after_a_hello_is_bound_and_saved(world: World) -> None:
    alice = invite(world)
    link = link_of(alice)
    mallory = Attacker(world)
    alice.hear(mallory.sign("hello", link.address) + ".A", at=link.address)
    assert count(Send, alice.done) == 0
    alice.gathers = False
    effects = alice.hear(mallory.hello(link), at=link.address)
    assert [type(effect) for effect in effects] == [Save, Gather]
    [saved] = [effect.record for effect in effects if isinstance(effect, Save)]
    assert (saved.state, saved.contact) == ("welcomed", mallory.signer)
    alice.restarted().tick()
    [welcome] = mallory.received()
    assert welcome.payload["r"] == alice.record.r


def test_every_step_saves_before_anything_leaves(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    settle(alice, bob)
    for app in (alice, bob):
        sealed_after_save = [
            isinstance(effect, Save) for effect in app.done if isinstance(effect, Save | Send)
        ]
        assert sealed_after_save[0]
        assert count(Save, app.done) >= count(Send, app.done) / len(newest(app).mailboxes) - 1
        assert ContactRecord.from_json(app.saved) == app.record


@pytest.mark.parametrize("stale", [False, True])
def test_welcome_is_one_and_the_same_bytes_at_most_once_a_minute(toy: World, stale: bool) -> None:
    alice = invite(toy)
    toy.advance(STALE_S if stale else 1)
    bob = open_link(toy, link_of(alice))
    bob.online = False
    settle(alice, rounds=2)
    link = link_of(alice)
    for _ in range(30):
        alice.hear(bob.record.hello, at=link.address)
        toy.advance(10)
    welcomes = [
        opened_with(toy, newest(bob).keys, sealed)
        for _, sealed in toy.boxes[newest(bob).mailboxes[0].pub]
    ]
    assert len(welcomes) in (5, 6)
    assert set(welcomes) == {alice.record.welcome}
    assert alice.record.used_to == ()


def test_bob_makes_one_hello_and_only_ever_sends_those_bytes(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    settle(bob, rounds=60, gap_s=10)
    bob = bob.restarted()
    bob.tick()
    assert alice.record.invited is not None
    hellos = [
        opened_with(toy, alice.record.invited.keys, sealed)
        for _, sealed in toy.boxes[alice.record.invited.mailboxes[0].pub]
    ]
    assert len(hellos) >= 3
    assert set(hellos) == {bob.record.hello}


def test_hello_that_is_out_goes_on_in_another_network(toy: World) -> None:
    """Its bytes stay the same, and the answer is for the peer connection that made them."""
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    attempt = bob.contact.attempt
    assert attempt.state == "waiting"
    assert bob.contact.network_changed(toy.now) == []
    assert bob.contact.attempt == attempt
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_stale_hello_gets_a_welcome_without_an_answer_and_a_ready_with_an_offer(toy: World) -> None:
    alice = invite(toy)
    toy.advance(STALE_S)
    bob = open_link(toy, link_of(alice))
    toy.advance(STALE_S)
    alice.poll()
    [welcome] = read_by(bob)
    assert (welcome.type, welcome.sdp) == ("welcome", None)
    bob.poll()
    [ready] = [message for message in read_by(alice) if message.type == "ready"]
    assert ready.sdp == sdp("offer")
    settle(alice, bob)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_hello_that_gives_the_invitation_as_its_own_address_makes_no_loop(toy: World) -> None:
    alice = invite(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    for number in (1, 2, 3):
        text = mallory.hello(link, connectoid=link.address)
        alice.hear(text, at=link.address)
        before = len(alice.done)
        alice.poll()
        assert count(Send, alice.done[before:]) == 0
        assert alice.contact.dropped.total() == number
        toy.advance(MINUTE_S)
