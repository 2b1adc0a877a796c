"""The end of a sharing: tombstones and expiry."""

from __future__ import annotations

import pytest
from fake_wire import (
    DAY_S,
    RELAY,
    App,
    World,
    apart,
    count,
    invite,
    link_of,
    open_link,
    paired,
    read_by,
    sdp,
    secrets_of,
    settle,
    signed_by,
    talk,
)

from connectoid import (
    Close,
    Contact,
    Forget,
    Gather,
    Mailbox,
    Save,
    Send,
    UsageError,
    format_address,
    limits,
)


def test_withdrawn_invitation_answers_used_and_pairs_with_nobody(world: World) -> None:
    alice = invite(world)
    link = link_of(alice)
    assert count(Send, alice.unshare()) == 0
    bob = open_link(world, link)
    settle(alice, bob)
    assert (bob.record.why, bob.told) == ("used", ["used"])
    assert (alice.record.state, alice.record.contact, alice.told) == ("unshared", "", [])
    world.advance(30 * DAY_S)
    assert alice.tick() == [Forget()]


def test_unshare_crossing_unshare_ends_both(world: World) -> None:
    alice, bob = paired(world)
    alice.unshare()
    bob.unshare()
    before = len(alice.done), len(bob.done)
    settle(alice, bob)
    assert (alice.record.state, bob.record.state) == ("ended", "ended")
    assert alice.done[before[0] :] == bob.done[before[1] :] == [Forget()]


def test_unshare_tells_the_other_and_leaves_nothing_of_name_and_connection(world: World) -> None:
    alice, bob = paired(world)
    alice.contact.verify(world.now, same=False)
    effects = alice.unshare()
    assert [type(effect) for effect in effects] == [Save, Close, Send]
    record = alice.record
    assert (record.state, record.name, record.relays) == ("unshared", "", ())
    assert (record.comparison, record.verified, record.differs) == ((), False, False)
    assert (record.hello, record.welcome) == ("", "")
    assert '"Bob"' not in alice.saved
    settle(alice, bob)
    assert (bob.record.state, bob.record.why, bob.told[-1]) == ("ended", "unshared", "unshared")
    assert bob.state == "apart"


def test_ended_contact_keeps_no_key_and_listens_to_nothing(world: World) -> None:
    alice, bob = paired(world)
    before = secrets_of(bob.record)
    alice.unshare()
    settle(alice, bob)
    assert not [secret for secret in before if secret in bob.saved]
    assert bob.contact.polls(world.now) == []
    assert bob.connect() == bob.tick() == []
    assert bob.record.name == "Alice"


def test_tombstone_tells_once_a_minute_for_thirty_days_and_then_goes(toy: World) -> None:
    alice, bob = apart(toy)
    bob.online = False
    alice.unshare()
    toy.advance(limits.AGAIN_IDLE_S)
    alice.tick()
    replies = []
    for number in range(7):
        text = signed_by(bob, "offer", seq=bob.record.seq + 1 + number, sdpOffer=sdp("offer"))
        effects = alice.hear(text)
        replies.append(count(Send, effects))
        assert count(Gather, effects) == 0
        toy.advance(20)
    assert replies == [1, 0, 0, 1, 0, 0, 1]
    toy.advance(30 * DAY_S - limits.AGAIN_IDLE_S - 7 * 20 - 1)
    assert count(Forget, alice.tick()) == 0
    toy.advance(1)
    assert alice.tick() == [Forget()]


@pytest.mark.parametrize("by", ["alice", "bob"])
def test_tombstone_repeats_its_word_until_the_other_has_heard_it(toy: World, by: str) -> None:
    apps = dict(zip(("alice", "bob"), apart(toy), strict=True))
    one = apps.pop(by)
    (other,) = apps.values()
    one.unshare()
    said = []
    for gap_s in (limits.AGAIN_IDLE_S - 1, 1, 1, limits.AGAIN_IDLE_S - 1, 1):
        toy.advance(gap_s)
        said.append(count(Send, one.tick()))
    assert said == [0, 1, 0, 1, 0]
    # The relay has lost all that was said. A start says it anew, and its first tick alone.
    for own in (*one.record.addresses, *other.record.addresses):
        toy.drop(own.address)
    one = one.restarted()
    assert [count(Send, one.tick()), count(Send, one.tick())] == [1, 0]
    heard = toy.put_so_far
    assert count(Send, other.poll()) == 1
    assert (other.record.state, other.record.why) == ("ended", "unshared")
    (answer,) = read_by(one, heard)
    assert (answer.type, answer.payload["re"] is None) == ("unshare", False)
    # That is not answered in turn.
    assert one.poll() == [Forget()]


@pytest.mark.parametrize("by", ["alice", "bob"])
def test_tombstone_is_heard_by_who_writes_to_a_copy_of_the_device(toy: World, by: str) -> None:
    """The other is away for hours, and the copy is the first to write when it comes back."""
    apps = dict(zip(("alice", "bob"), apart(toy), strict=True))
    one = apps.pop(by)
    (other,) = apps.values()
    thief = one.restarted()
    one.unshare()
    for own in other.record.addresses:
        toy.drop(own.address)
    thief.connect()
    other.poll()
    settle(other, thief, rounds=4)
    assert other.record.state == "paired"
    toy.advance(limits.AGAIN_IDLE_S)
    one.tick()
    other.poll()
    assert (other.record.state, other.record.why) == ("ended", "unshared")


def test_tombstone_that_knows_no_key_of_the_other_repeats_nothing(toy: World) -> None:
    """Nobody has opened Alice's link, or Bob has no welcome: nobody could check the word."""
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for app in (alice, bob):
        app.unshare()
        toy.advance(limits.AGAIN_IDLE_S)
        assert app.tick() == app.restarted().tick() == []


def test_tombstone_survives_a_restart_and_ends_when_the_other_unshares(toy: World) -> None:
    alice, bob = apart(toy)
    alice.unshare()
    alice = alice.restarted()
    bob.unshare()
    assert alice.poll()[-1] == Forget()


@pytest.mark.parametrize("by", ["alice", "bob"])
@pytest.mark.parametrize("when", ["opened", "welcomed", "ready", "paired"])
def test_unshare_at_any_time_of_the_pairing_ends_both(toy: World, by: str, when: str) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for app in {
        "opened": [],
        "welcomed": [alice],
        "ready": [alice, bob],
        "paired": [alice, bob, alice],
    }[when]:
        app.poll()
    one, other = (alice, bob) if by == "alice" else (bob, alice)
    one.unshare()
    settle(alice, bob, rounds=100, gap_s=5)
    assert other.record.state in ("ended", "unshared")
    assert other.record.why in ("unshared", "used")
    assert one.record.state in ("unshared", "ended")
    assert "connected" not in {alice.state, bob.state}


def test_inviter_whom_the_channel_alone_has_proven_says_unshare(toy: World) -> None:
    """Bob has the welcome: a `used` would tell him nothing."""
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    bob.poll()
    talk(alice, bob)
    assert (alice.record.state, alice.record.seen_seq) == ("paired", 0)
    before = toy.put_so_far
    alice.unshare()
    assert [message.type for message in read_by(bob, before)] == ["unshare"]
    bob.poll()
    assert (bob.record.state, bob.record.why) == ("ended", "unshared")


def test_inviter_who_is_welcomed_says_used_and_the_tombstone_says_unshare(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    alice.poll()
    bob.poll()
    before = toy.put_so_far
    alice.unshare()
    assert [message.type for message in read_by(bob, before)] == ["used"]
    bob.poll()
    assert (bob.record.state, bob.contact.dropped) == ("ready", {"unexpected": 1})
    alice.poll()
    bob.poll()
    assert (bob.record.state, bob.record.why) == ("ended", "unshared")


def test_invitation_expires_as_long_after_as_the_app_said(toy: World) -> None:
    begun = Contact.invite(
        toy.suite, toy.now, "Bob", [(RELAY, None)], lifetime_us=3 * limits.DAY_US
    )
    alice = App(toy, begun)
    toy.advance(3 * DAY_S - 1)
    assert alice.tick() == []
    toy.advance(1)
    alice.tick()
    assert (alice.told, alice.record.state, alice.record.why) == (["expired"], "ended", "expired")
    assert not secrets_of(alice.record)


def test_opened_link_without_answer_expires(toy: World) -> None:
    bob = open_link(toy, link_of(invite(toy)))
    toy.advance(30 * DAY_S)
    bob.tick()
    assert (bob.told, bob.record.why) == (["expired"], "expired")
    assert not secrets_of(bob.record)


def test_paired_contact_never_expires(toy: World) -> None:
    alice, bob = apart(toy)
    toy.advance(1_000 * DAY_S)
    for app in (alice, bob):
        app.tick()
        app.connect()
    settle(alice, bob, rounds=30)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_address_too_long_to_answer_is_refused_and_never_stops_an_unshare(toy: World) -> None:
    mallory = invite(toy)
    bob = open_link(toy, link_of(mallory))
    settle(mallory, bob)
    boxes = [Mailbox(toy.suite.make_key()[1], RELAY, "\U0001f600" * 760) for _ in range(3)]
    text = "A" * limits.SIZES[-1]
    # The longest text that fits with a short seq. No reply of this kind does.
    while len(text) > limits.SIZES[-1] - 4:
        boxes[2] = boxes[2]._replace(ext=str(boxes[2].ext)[:-1])
        text = signed_by(
            mallory, "call", seq=bob.record.seen_seq + 1, connectoid=format_address(boxes)
        )
    bob.hear(text)
    assert bob.contact.dropped["address"] == 1
    assert count(Send, bob.unshare()) == 1


def test_opener_who_was_welcomed_and_expires_tells_the_inviter(toy: World) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for app in (alice, bob, alice):
        app.poll()
    assert (alice.record.state, bob.record.state) == ("paired", "ready")
    toy.advance(31 * DAY_S)
    bob = bob.restarted()
    bob.tick()
    settle(alice, bob)
    assert (alice.record.why, bob.told) == ("unshared", ["expired"])


@pytest.mark.parametrize("state", ["unshared", "ended"])
def test_unshare_of_what_is_ended_is_a_mistake_of_the_app_and_nothing_else(
    toy: World, state: str
) -> None:
    alice, bob = paired(toy)
    alice.unshare()
    bob.poll()
    app = {"unshared": alice, "ended": bob}[state]
    with pytest.raises(UsageError):
        app.unshare()


def test_message_after_an_unshare_of_the_same_round_leaves_nothing_in_the_record(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    seq = bob.record.seq
    texts = [
        signed_by(bob, "unshare", seq=seq + 1),
        signed_by(bob, "offer", seq=seq + 2, sdpOffer=sdp("offer")),
    ]
    alice.hear(*texts)
    assert (alice.record.state, alice.record.contact_address) == ("ended", "")
    assert alice.record.seen_seq == 0
