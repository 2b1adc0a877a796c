"""A new signing key: the owner renews, and a copy of the device from before is shut out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_wire import (
    MINUTE_S,
    OTHER_RELAY,
    App,
    Attacker,
    CrashError,
    World,
    apart,
    count,
    current_of,
    invite,
    link_of,
    newest,
    open_link,
    paired,
    read_by,
    rotate,
    sdp,
    settle,
    signed_by,
)

from connectoid import (
    ROUTINE,
    ContactRecord,
    Gather,
    RecordError,
    Save,
    Send,
    SystemSuite,
    UsageError,
    limits,
    parse_address,
)
from connectoid.contact import renewal
from connectoid.contact.effects import Privacy
from connectoid.encoding import encode_base64url

NAMES = ["alice", "bob"]


def sides(toy: World, who: str) -> tuple[App, App]:
    """Return the app that renews and its contact's: paired, and no longer connected."""
    alice, bob = apart(toy)
    return (alice, bob) if who == "alice" else (bob, alice)


def renew(app: App) -> None:
    """Let the user of an app ask for a new key."""
    app.do(app.contact.renew(app.world.now))


def leave_link(app: App) -> None:
    """Let the link of an app come to its end."""
    app.world.advance(limits.INVITATION_US / 1e6)
    app.tick()


def is_agreed(one: App, other: App) -> bool:
    """Return whether each side knows the key of the other, and no renewal is under way."""
    return (
        (one.record.contact, other.record.contact) == (other.record.signer, one.record.signer)
        and not one.record.old_signer
        and not other.record.old_signer
    )


def connect(one: App, other: App) -> None:
    """Have both connect anew, and check that they do."""
    for app in (one, other):
        app.do(app.contact.disconnect(app.world.now))
        app.connect()
    settle(one, other, rounds=80)
    assert (one.state, other.state) == ("connected", "connected")


# -- What a renewal does ---------------------------------------------------------------


@pytest.mark.parametrize("who", NAMES)
def test_renewal_replaces_the_key_and_the_address_and_both_are_told(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    before = owner.record
    renew(owner)
    assert owner.record.signer != before.signer
    assert owner.record.old_signer == before.signer
    settle(owner, other)
    assert is_agreed(owner, other)
    assert (owner.told.count("renewed"), other.told.count("contact_renewed")) == (1, 1)
    assert current_of(owner).address == other.record.contact_address
    assert current_of(owner) not in (before.current, before.pending)
    leave_link(owner)
    assert before.private_key not in owner.saved
    connect(owner, other)


@pytest.mark.parametrize("who", NAMES)
def test_mark_and_emoji_survive_a_renewal(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    for app in (owner, other):
        app.do(app.contact.verify(toy.now))
    renew(owner)
    settle(owner, other)
    assert owner.record.verified
    assert other.record.verified
    assert owner.record.comparison == other.record.comparison


@pytest.mark.parametrize("times", [0, 1, 2])
def test_who_opens_the_link_of_one_who_has_renewed_hears_that_it_is_used(
    toy: World, times: int
) -> None:
    alice, bob = apart(toy)
    link = link_of(alice)
    first = alice.record.signer
    for _ in range(times):
        renew(alice)
        settle(alice, bob)
    # One more is under way.
    bob.online = False
    renew(alice)
    assert (alice.record.link_signer, alice.record.welcome) == (first, "")
    alice = alice.restarted()
    eve = open_link(toy, link)
    settle(alice, eve)
    assert (eve.record.why, alice.told.count("opened_twice")) == ("used", 1)
    assert alice.record.state == "paired"


def test_link_of_one_who_has_renewed_ends_by_its_own_date_and_its_key_goes(toy: World) -> None:
    alice, bob = apart(toy)
    link = link_of(alice)
    key = alice.record.private_key
    renew(alice)
    settle(alice, bob)
    assert alice.record.link_private_key == key
    toy.wall_us = alice.record.expires_us - 1
    alice.tick()
    assert parse_address(link.address)[0] in alice.contact.mailboxes
    toy.wall_us += 1
    alice.tick()
    assert (alice.record.invitation, alice.record.r, alice.record.link_signer) == ("", "", "")
    assert key not in alice.saved
    assert parse_address(link.address)[0] not in alice.contact.mailboxes
    # What is renewed later was never in a link that somebody can open.
    renew(alice)
    assert (alice.record.link_signer, alice.record.state) == ("", "paired")


def test_hello_that_counts_is_not_answered_after_a_renewal(toy: World) -> None:
    """Relays keep it for an hour, and whoever has it can repeat it. The welcome is gone."""
    alice = invite(toy)
    link = link_of(alice)
    bob = open_link(toy, link)
    toy.advance(1.0)
    hello = bob.record.hello
    settle(alice, bob)
    renew(alice)
    settle(alice, bob)
    for app in (alice, alice.restarted()):
        assert count(Send, app.hear(hello, at=link.address)) == 0
        assert app.record.contact == bob.record.signer
        assert app.record.welcome == ""


@pytest.mark.parametrize("says", ["renew", "unshare"])
def test_thief_who_has_welcomed_somebody_is_undone_once_the_owner_is_there(
    toy: World, says: str
) -> None:
    """His copy is from when the link waited."""
    alice = invite(toy)
    link = link_of(alice)
    thief = alice.restarted()
    if says == "renew":
        bob = open_link(toy, link)
        alice.poll()
        settle(alice, bob)
        renew(alice)
        settle(alice, bob)
    else:
        alice.unshare()
    for mailbox in parse_address(link.address):
        toy.boxes[mailbox.pub].clear()
    eve = open_link(toy, link)
    thief.poll()
    eve.poll()
    assert (eve.record.state, eve.record.contact) == ("ready", thief.record.signer)
    alice.poll()
    eve.poll()
    assert (eve.record.state, eve.record.why) == ("ended", "unshared")
    assert ("opened_twice" in alice.told) == (says == "renew")


@pytest.mark.parametrize("when", ["before", "meanwhile", "afterwards"])
def test_hello_with_the_address_of_the_contact_ends_no_contact(toy: World, when: str) -> None:
    """Whoever has the link and runs the relay knows that address, and asks for replies to it."""
    alice, bob = apart(toy)
    link = link_of(alice)
    if when != "before":
        renew(alice)
    if when == "afterwards":
        settle(alice, bob)
    for own in bob.record.addresses:
        toy.drop(own.address)
    hello = Attacker(toy).hello(link, connectoid=newest(bob).address)
    said = count(Send, alice.hear(hello, at=link.address))
    assert said == (2 if when == "afterwards" else 1)
    bob.poll()
    assert sum(bob.contact.dropped.values()) >= said
    assert bob.record.state == "paired"


@pytest.mark.parametrize("who", NAMES)
def test_renewal_can_be_repeated_and_each_takes_another_key(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    signers = set()
    for _ in range(4):
        renew(owner)
        settle(owner, other)
        assert is_agreed(owner, other)
        signers.add(owner.record.signer)
    assert len(signers) == 4
    connect(owner, other)


def test_renewal_is_a_mistake_before_both_know_each_other_or_while_one_is_under_way(
    toy: World,
) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    for app in (alice, bob):
        with pytest.raises(UsageError, match="know each other"):
            renew(app)
    settle(alice, bob)
    bob.online = False
    renew(alice)
    before = alice.record, alice.contact.attempt
    with pytest.raises(UsageError, match="not answered"):
        renew(alice)
    assert (alice.record, alice.contact.attempt) == before


@pytest.mark.parametrize("who", NAMES)
def test_contact_of_an_older_app_is_never_sent_a_renewal(toy: World, who: str) -> None:
    owner, _ = sides(toy, who)
    members = {**json.loads(owner.saved), "protocol": 1}
    owner = owner.restarted(json.dumps(members))
    before = owner.record
    with pytest.raises(UsageError, match="older app"):
        renew(owner)
    assert owner.record == before


def test_record_from_before_there_were_renewals_opens(toy: World) -> None:
    for app in paired(toy):
        members = json.loads(app.saved)
        del members["old_private_key"], members["old_signer"]
        assert ContactRecord.from_json(json.dumps(members)) == app.record


def test_suite_and_record_keep_no_key_that_was_renewed() -> None:
    suite = SystemSuite()
    alice, bob = apart(World(suite))
    for owner, other in ((alice, bob), (bob, alice)):
        old = owner.record.private_key
        renew(owner)
        assert old in suite._private_keys
        settle(owner, other)
        leave_link(owner)
        assert old not in owner.saved
        assert old not in suite._private_keys
    assert alice.record.private_keys | bob.record.private_keys <= {*suite._private_keys}


@pytest.mark.parametrize("who", NAMES)
def test_late_messages_of_a_replaced_key_are_no_refusals(toy: World, who: str) -> None:
    """A restart reads all again that relays still keep, for an hour."""
    owner, other = sides(toy, who)
    late = signed_by(owner, "unshare", to=newest(other).address)
    renew(owner)
    settle(owner, other)
    assert other.hear(late) == []
    assert other.contact.dropped["replaced"] == 1
    again = other.restarted()
    again.poll()
    assert again.contact.dropped["replaced"] >= 1
    assert again.contact.dropped.keys() <= ROUTINE
    assert again.record == other.record


# -- A copy of the device ----------------------------------------------------------------


@pytest.mark.parametrize("who", NAMES)
def test_copy_of_a_device_is_shut_out_once_its_owner_has_renewed(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    renew(owner)
    settle(owner, other)
    before = other.record
    to = newest(other).address
    asks = {"alice": "call", "bob": "offer"}[who]
    for number, kind in enumerate(("moved", "unshare", asks)):
        text = signed_by(thief, kind, to=to, seq=toy.wall_us + number, sdpOffer=sdp("offer"))
        assert count(Send, other.hear(text)) == 0
    assert other.contact.dropped == {"replaced": 3}
    assert other.record == before
    # He has a key to nothing that is written from now on.
    put = toy.put_so_far
    connect(owner, other)
    assert read_by(thief, put) == []


@pytest.mark.parametrize("who", NAMES)
def test_thief_who_is_second_cannot_renew(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    renew(owner)
    settle(owner, other)
    signer = owner.record.signer
    renew(thief)
    settle(owner, other)
    assert other.contact.dropped["sender"] >= 2
    assert other.record.contact == signer
    assert thief.record.old_signer
    connect(owner, other)


@pytest.mark.parametrize("who", NAMES)
def test_thief_who_is_first_keeps_the_owner_out_and_the_contact_is_told(
    toy: World, who: str
) -> None:
    """What is not promised: the first one wins. Both sides can notice."""
    owner, other = sides(toy, who)
    thief = owner.restarted()
    renew(thief)
    settle(thief, other)
    assert other.record.contact == thief.record.signer
    assert "contact_renewed" in other.told
    renew(owner)
    settle(owner, other)
    assert other.contact.dropped["sender"] >= 1
    assert "renewed" not in owner.told
    assert owner.record.old_signer


@pytest.mark.parametrize("who", NAMES)
def test_thief_who_answers_a_renewal_does_not_keep_the_contact_from_renewing(
    toy: World, who: str
) -> None:
    """He has a copy of the contact's device. The contact does not know the owner's new key."""
    owner, other = sides(toy, who)
    # An earlier one, after which no address of the owner is pending.
    renew(owner)
    settle(owner, other)
    thief = other.restarted()
    renew(owner)
    settle(owner, thief)
    assert not owner.record.old_signer
    for own in other.record.addresses:
        toy.drop(own.address)
    renew(other)
    settle(owner, other)
    assert owner.contact.dropped["proof"] == 0
    assert owner.record.contact == other.record.signer != thief.record.signer


@pytest.mark.parametrize("who", NAMES)
def test_channel_of_a_thief_is_closed_by_the_renewal_of_the_owner(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    thief.connect()
    other.connect()
    settle(thief, other, rounds=20)
    assert (thief.state, other.state) == ("connected", "connected")
    renew(owner)
    other.poll()
    assert other.state == "apart"
    assert "disconnected" in other.told
    connect(owner, other)


@pytest.mark.parametrize("who", NAMES)
def test_attempt_of_a_thief_does_not_outlive_the_renewal_of_the_owner(
    toy: World, who: str
) -> None:
    """He has brought the contact to an open channel, and would prove it with the old mailbox."""
    owner, other = sides(toy, who)
    thief = owner.restarted()
    thief.connect()
    other.connect()
    for _ in range(20):
        toy.advance(2.0)
        other.poll()
        thief.poll()
        if thief.state == other.state == "joining":
            break
    attempt_id = other.contact.attempt.attempt_id
    other.do(other.contact.channel_opened(toy.now, attempt_id))
    assert other.state == "proving"
    renew(owner)
    other.poll()
    assert other.do(other.contact.channel_message(toy.now, attempt_id, b"x" * 32)) == []
    assert other.state == "apart"


@pytest.mark.parametrize("who", NAMES)
def test_thief_who_numbers_a_message_high_does_not_keep_a_renewal_from_counting(
    toy: World, who: str
) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    asks = {"alice": "call", "bob": "offer"}[who]
    high = toy.wall_us + limits.MAX_SEQ_AHEAD_US
    other.hear(signed_by(thief, asks, seq=high, to=newest(other).address, sdpOffer=sdp("offer")))
    assert other.record.seen_seq == high
    renew(owner)
    settle(owner, other)
    assert is_agreed(owner, other)
    connect(owner, other)


@pytest.mark.parametrize("who", NAMES)
def test_request_of_a_thief_in_the_round_of_the_renewal_is_not_acted_on(
    toy: World, who: str
) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    thief.connect()
    toy.advance(1.0)
    renew(owner)
    effects = other.poll()
    assert "contact_renewed" in other.told
    assert count(Gather, effects) == 0
    assert count(Send, effects) == 1


@pytest.mark.parametrize("who", NAMES)
def test_thief_who_announces_the_owners_new_address_completes_no_renewal(
    toy: World, who: str
) -> None:
    """The relay drops the renewal, and tells him the address. The contact writes there."""
    owner, other = sides(toy, who)
    thief = owner.restarted()
    renew(owner)
    for own in other.record.addresses:
        toy.drop(own.address)
    to = newest(other).address
    stolen = newest(owner).address
    for re in (None, encode_base64url(bytes(32))):
        put(other, signed_by(thief, "moved", to=to, seq=toy.wall_us, re=re, connectoid=stolen))
        toy.advance(MINUTE_S)
        other.poll()
        owner.poll()
    assert current_of(owner).address == stolen
    assert owner.record.old_signer == other.record.contact
    assert "renewed" not in owner.told
    # Her next word is heard all the same, and so is her last one.
    again = owner.restarted()
    again.tick()
    settle(again, other)
    assert is_agreed(again, other)
    assert again.told.count("renewed") == 1


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize(
    ("later", "counts"),
    [(limits.MAX_RENEWAL_HASHES - step, step > 0) for step in (1, 0, -1)],
)
def test_answer_to_one_of_the_newest_words_completes_a_renewal(
    toy: World, who: str, later: int, counts: bool
) -> None:
    owner, other = sides(toy, who)
    renew(owner)
    said = owner.record.renewal_hashes[-1]
    for number in range(later):
        renewal.note_said(owner.contact.machine, f"{number}")
    assert len(owner.record.renewal_hashes) <= limits.MAX_RENEWAL_HASHES
    owner.hear(signed_by(other, "moved", to=newest(owner).address, seq=toy.wall_us, re=said))
    assert (owner.record.old_signer == "") == counts
    assert owner.told.count("renewed") == counts
    assert (owner.record.renewal_hashes == ()) == counts


def test_channel_over_what_the_new_key_has_signed_completes_a_renewal(toy: World) -> None:
    alice, bob = apart(toy)
    renew(alice)
    bob.poll()
    # His answer is lost, and nobody has called for his offer.
    toy.drop(newest(alice).address)
    assert alice.record.old_signer
    bob.connect()
    settle(alice, bob, rounds=20)
    assert (alice.state, bob.state) == ("connected", "connected")
    assert is_agreed(alice, bob)
    assert alice.told.count("renewed") == 1


def test_renewal_under_way_in_an_older_record_is_completed_by_the_next_answer(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    renew(alice)
    toy.drop(newest(bob).address)
    members = json.loads(alice.saved)
    del members["renewal_hashes"]
    alice = alice.restarted(json.dumps(members))
    assert alice.record.renewal_hashes == ()
    alice.tick()
    settle(alice, bob)
    assert is_agreed(alice, bob)


# -- Two devices with one key ------------------------------------------------------------


def put(app: App, text: str) -> None:
    """Put a text into the newest mailboxes of an app."""
    for mailbox in newest(app).mailboxes:
        app.world.put(mailbox.pub, app.world.seal(newest(app).address, text))


def renew_beside_a_thief(toy: World, who: str, seq: int = 1) -> tuple[App, App, App]:
    """Return the owner, the contact and a thief, after a round with the renewals of two."""
    owner, other = sides(toy, who)
    thief = owner.restarted()
    renew(owner)
    put(other, renew_by(thief, to=newest(other).address, seq=seq))
    other.poll()
    return owner, other, thief


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("seq", [1, 2**53 - 1])
def test_two_renewals_in_a_round_do_not_count_whatever_their_seq(
    toy: World, who: str, seq: int
) -> None:
    owner, other, thief = renew_beside_a_thief(toy, who, seq)
    assert other.record.contact == thief.record.signer == owner.record.old_signer
    assert other.record.key_news == "copied"
    assert other.contact.dropped["copied"] == 2
    assert "contact_renewed" not in other.told
    # Nor does one that comes alone, after a restart either, and it is told once.
    put(other, renew_by(thief, to=newest(other).address))
    other.poll()
    again = other.restarted()
    toy.advance(limits.AGAIN_IDLE_S)
    owner.tick()
    again.poll()
    assert again.record.contact == thief.record.signer
    assert again.record.key_news == "copied"
    assert (other.told.count("copied"), again.told.count("copied")) == (1, 0)


@pytest.mark.parametrize("who", NAMES)
def test_renewal_counts_again_once_the_user_says_that_all_is_well(toy: World, who: str) -> None:
    owner, other, _ = renew_beside_a_thief(toy, who)
    other.do(other.contact.verify(toy.now, same=False))
    assert other.record.key_news == "copied"
    other.do(other.contact.verify(toy.now))
    assert other.record.key_news == ""
    for own in other.record.addresses:
        toy.drop(own.address)
    toy.advance(limits.AGAIN_IDLE_S)
    owner.tick()
    settle(owner, other)
    assert is_agreed(owner, other)
    assert other.record.key_news == "renewed"


@pytest.mark.parametrize("who", NAMES)
def test_two_renewals_are_seen_in_a_round_that_is_taken_in_parts(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    renew(owner)
    forged = signed_by(thief, "moved", to=newest(other).address)
    for _ in range(40):
        put(other, forged)
    put(other, renew_by(thief, to=newest(other).address, seq=2**53 - 1))
    boxes = {poll.mailbox.pub: list(toy.boxes[poll.mailbox.pub])
             for poll in other.contact.polls(toy.now)}
    other.do(other.contact.polled_in_part(toy.now, boxes))
    while other.contact.is_behind:
        other.do(other.contact.polled_in_part(toy.now))
    assert other.contact.machine.vouched is None
    assert other.record.key_news == "copied"


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("renews", [True, False])
def test_renewal_of_a_thief_does_not_keep_the_owner_from_leaving(
    toy: World, who: str, renews: bool
) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    if renews:
        renew(owner)
        put(other, renew_by(thief, to=newest(other).address, seq=1))
        other.poll()
        assert other.record.key_news == "copied"
    owner.unshare()
    put(other, renew_by(thief, to=newest(other).address, seq=2))
    other.poll()
    assert other.record.why == "unshared"


def test_renewal_without_its_proof_does_not_keep_another_from_counting(toy: World) -> None:
    alice, bob = apart(toy)
    renew(bob)
    put(alice, signed_by(
        alice, "renew", to=newest(alice).address, next=bob.record.signer[::-1],
        **{"from": bob.record.old_signer}, proof=encode_base64url(bytes(96))))
    settle(bob, alice)
    assert is_agreed(alice, bob)
    assert alice.record.key_news == "renewed"


def test_news_of_a_key_outlive_the_app_and_end_with_the_contact(toy: World) -> None:
    alice, bob = apart(toy)
    renew(bob)
    settle(bob, alice)
    again = alice.restarted()
    assert again.record.key_news == "renewed"
    again.unshare()
    assert again.record.key_news == ""


def test_record_with_other_news_of_a_key_is_damaged_and_one_without_opens(toy: World) -> None:
    alice, _ = apart(toy)
    members = json.loads(alice.saved)
    del members["key_news"]
    assert ContactRecord.from_json(json.dumps(members)) == alice.record
    with pytest.raises(RecordError, match="damaged"):
        ContactRecord.from_json(json.dumps({**members, "key_news": "stolen"}))


@pytest.mark.parametrize(
    ("after_s", "times"),
    [(limits.TELL_EVERY_S - 1, 1), (limits.TELL_EVERY_S, 2), (limits.TELL_EVERY_S + 1, 2)],
)
def test_new_keys_of_a_contact_are_told_once_an_hour(
    toy: World, after_s: float, times: int
) -> None:
    alice, bob = apart(toy)
    renew(bob)
    alice.poll()
    told_s = toy.monotonic_s
    for at_s in (600.0, 1_200.0, after_s):
        bob.poll()
        toy.advance(told_s + at_s - toy.monotonic_s)
        renew(bob)
        alice.poll()
    assert alice.record.contact == bob.record.signer
    assert alice.told.count("contact_renewed") == times


@pytest.mark.parametrize("who", NAMES)
def test_request_of_a_thief_that_waits_for_the_user_goes_with_a_renewal(
    toy: World, who: str
) -> None:
    owner, other = sides(toy, who)
    other.contact.privacy = Privacy(ask_first=True)
    thief = owner.restarted()
    thief.connect()
    toy.advance(1.0)
    other.poll()
    assert other.contact.machine.asked is not None
    renew(owner)
    other.poll()
    assert other.contact.machine.asked is None


# -- Messages that are lost, late or repeated ----------------------------------------------


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("restarts", [True, False])
def test_lost_renewal_is_repeated_while_the_app_runs(
    toy: World, who: str, restarts: bool
) -> None:
    owner, other = sides(toy, who)
    renew(owner)
    for _ in range(3):
        # The relay forgets after an hour.
        toy.drop(other.record.contact_address)
        for own in other.record.addresses:
            toy.drop(own.address)
        if restarts:
            owner = owner.restarted()
        else:
            assert owner.contact.next_tick_s <= toy.monotonic_s + limits.AGAIN_IDLE_S
            toy.advance(limits.AGAIN_IDLE_S)
        assert count(Send, owner.tick()) == 2
    settle(owner, other)
    assert is_agreed(owner, other)
    toy.advance(limits.AGAIN_IDLE_S)
    assert owner.tick() == []


@pytest.mark.parametrize("who", NAMES)
def test_lost_answer_is_given_again(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    renew(owner)
    toy.advance(1.0)
    other.poll()
    toy.drop(newest(owner).address)
    assert owner.record.old_signer
    toy.advance(limits.AGAIN_IDLE_S)
    owner.tick()
    settle(owner, other)
    assert is_agreed(owner, other)
    assert other.told.count("contact_renewed") == 1
    # The repetition is nothing to worry about.
    assert set(other.contact.dropped) <= {"replay"}


@pytest.mark.parametrize("who", NAMES)
def test_unshare_while_the_renewal_is_not_answered_counts_either_way(
    toy: World, who: str
) -> None:
    for knows in (True, False):
        owner, other = sides(World(toy.suite), who)
        renew(owner)
        if knows:
            other.poll()
        else:
            owner.world.drop(newest(other).address)
        owner.unshare()
        owner.world.advance(MINUTE_S)
        other.poll()
        assert other.record.why == "unshared"


@pytest.mark.parametrize("who", NAMES)
def test_contact_who_has_left_tells_it_to_the_new_key_and_address(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    other.unshare()
    for own in owner.record.addresses:
        toy.drop(own.address)
    renew(owner)
    toy.advance(MINUTE_S)
    other.poll()
    assert other.record.contact == owner.record.signer
    # He has no contact any more of whom there would be something to tell.
    assert "contact_renewed" not in other.told
    owner.poll()
    assert owner.record.why == "unshared"


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("after", range(12))
def test_crash_between_any_two_steps_of_a_renewal_repeats_the_step(
    toy: World, who: str, after: int
) -> None:
    alice, bob = apart(toy)
    apps = {"alice": alice.restarted(), "bob": bob.restarted()}
    apps[who].crash_after = after
    try:
        renew(apps["alice"])
        settle(apps["alice"], apps["bob"], rounds=3)
    except CrashError:
        apps[who] = apps[who].restarted()
    apps[who].crash_after = -1
    one, other = apps.values()
    connect(one, other)
    assert is_agreed(one, other)


def test_new_key_is_saved_before_anything_leaves(toy: World) -> None:
    alice, _ = apart(toy)
    effects = alice.contact.renew(toy.now)
    assert [type(effect) for effect in effects] == [Save, Send, Send]
    assert isinstance(effects[0], Save)
    assert effects[0].record.signer == alice.record.signer
    assert effects[0].record.old_signer


# -- Both at once, and beside a rotation ----------------------------------------------------


@pytest.mark.parametrize("lost", ["nothing", "alice", "bob", "both"])
def test_both_may_renew_at_once(toy: World, lost: str) -> None:
    alice, bob = apart(toy)
    renew(alice)
    renew(bob)
    for name, app in (("alice", alice), ("bob", bob)):
        if lost in (name, "both"):
            for own in app.record.addresses:
                toy.drop(own.address)
    toy.advance(limits.AGAIN_IDLE_S)
    settle(alice, bob, rounds=20)
    assert is_agreed(alice, bob)
    for app in (alice, bob):
        assert set(app.contact.dropped) <= {"replay"}
    connect(alice, bob)


@pytest.mark.parametrize("first", ["pending", "current"])
def test_both_may_renew_at_once_whichever_mailbox_is_read_first(toy: World, first: str) -> None:
    """Bob's copies of her `renew` are in two mailboxes, and only the first one read counts."""
    alice, bob = apart(toy)
    rotate(alice, bob)
    renew(alice)
    renew(bob)
    alice.poll()
    read_first = getattr(bob.record, first).mailboxes[0].pub
    polls = {poll.mailbox.pub: toy.boxes[poll.mailbox.pub] for poll in bob.contact.polls(toy.now)}
    bob.do(bob.contact.polled(toy.now, {read_first: polls.pop(read_first)}))
    bob.do(bob.contact.polled(toy.now, polls))
    alice.poll()
    assert is_agreed(alice, bob)


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("moves", ["before", "meanwhile", "both"])
def test_renewal_and_change_of_relays_at_once_are_told(
    toy: World, who: str, moves: str
) -> None:
    owner, other = sides(toy, who)
    rotate(owner, other)
    if moves in ("before", "both"):
        owner.do(owner.contact.move(toy.now, [(OTHER_RELAY, None)]))
    renew(owner)
    if moves in ("meanwhile", "both"):
        owner.do(owner.contact.move(toy.now, [(OTHER_RELAY, "key")]))
    settle(owner, other, rounds=40)
    assert is_agreed(owner, other)
    assert newest(owner).address == other.record.contact_address
    assert {box.url for box in parse_address(other.record.contact_address)} == {OTHER_RELAY}


def test_relay_of_the_contact_that_goes_away_does_not_hold_a_renewal_up(toy: World) -> None:
    """A `renew` is made anew each time, to the address that is known then."""
    alice, bob = apart(toy)
    rotate(alice, bob)
    renew(alice)
    for own in bob.record.addresses:
        toy.drop(own.address)
    bob.do(bob.contact.move(toy.now, [(OTHER_RELAY, None)]))
    alice.poll()
    toy.advance(limits.AGAIN_IDLE_S)
    alice.tick()
    boxes = {box.pub for own in bob.record.addresses for box in own.mailboxes}
    new = {box.pub for box in newest(bob).mailboxes}
    for pub in boxes - new:
        toy.boxes[pub].clear()
    settle(alice, bob, rounds=20)
    assert is_agreed(alice, bob)


# -- What a hostile contact may try -----------------------------------------------------------


def renew_by(app: App, **changes: Any) -> str:
    """Return a `renew` that a contact's own key signs, whatever it says."""
    next_key, next_signer = app.world.suite.make_key()
    record = app.record
    octets = renewal.proven_octets(
        record.signer, next_signer, record.link_hash, newest(app).address)
    proof = encode_base64url(app.world.suite.sign(next_key, octets).ljust(96, b"\0"))
    return signed_by(app, "renew", next=next_signer, proof=proof, **changes)


def test_contact_cannot_claim_a_key_whose_owner_has_not_signed_for_it() -> None:
    world = World(SystemSuite())
    alice, bob = apart(world)
    mallory = Attacker(world)
    stranger, carol = apart(World(world.suite))
    # Carol's new key has signed for her own contact, and for nobody else.
    renew(stranger)
    claimed = stranger.record.signer
    proof = renewal.prove(stranger.contact.machine, newest(bob).address)
    text = signed_by(bob, "renew", next=claimed, proof=proof)
    alice.hear(text)
    assert dict(alice.contact.dropped) == {"proof": 1}
    text = signed_by(bob, "renew", next=mallory.signer, proof=encode_base64url(bytes(96)))
    alice.hear(text)
    assert alice.contact.dropped["proof"] == 2
    assert alice.record.contact == bob.record.signer
    assert carol.record.contact != claimed


@pytest.mark.parametrize("who", NAMES)
def test_thief_cannot_join_the_proof_of_the_owner_with_an_address_of_his_own(
    toy: World, who: str
) -> None:
    owner, other = sides(toy, who)
    thief = owner.restarted()
    put_before = toy.put_so_far
    renew(owner)
    # Whoever has a copy of the contact's device, too, can read what the owner has proven.
    renewal_of_owner = next(
        message for message in read_by(other, put_before) if message.type == "renew")
    members = {name: renewal_of_owner.payload[name] for name in ("to", "next", "proof")}
    toy.drop(newest(other).address)
    other.hear(signed_by(thief, "renew", connectoid=Attacker(toy).address, **members))
    assert dict(other.contact.dropped) == {"proof": 1}
    assert other.record.contact == thief.record.signer
    toy.advance(limits.AGAIN_IDLE_S)
    owner.tick()
    settle(owner, other)
    assert is_agreed(owner, other)
    assert current_of(owner).address == other.record.contact_address


def renew_without_end(
    alice: App, bob: App, keys: int, gap_s: float = 1.0
) -> tuple[App, int]:
    """Have Bob renew and wait for no answer; return him, and how many she sends."""
    sent = 0
    for _ in range(keys):
        renew(bob)
        sent += count(Send, alice.poll())
        alice.world.advance(gap_s)
        record = {**json.loads(bob.saved), "old_private_key": "", "old_signer": ""}
        bob = bob.restarted(json.dumps({**record, "pending": None, "replaced": []}))
    assert alice.record.contact == bob.record.signer
    return bob, sent


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_one_who_renews_without_end_gets_few_replies(toy: World, step: int) -> None:
    alice, bob = apart(toy)
    most = 1 + limits.MAX_RENEWAL_ANSWERS
    bob, sent = renew_without_end(alice, bob, most + step)
    assert sent == most + min(step, 0)
    # In the long run two a minute.
    _, sent = renew_without_end(alice, bob, 60, gap_s=10.0)
    assert sent <= 2 * 10 + most


@pytest.mark.parametrize("who", NAMES)
def test_answer_to_a_renewal_that_was_left_out_is_made_up_for(toy: World, who: str) -> None:
    owner, other = sides(toy, who)
    owner, _ = renew_without_end(other, owner, 1 + limits.MAX_RENEWAL_ANSWERS)
    renew(owner)
    assert count(Send, other.poll()) == 0
    assert owner.record.old_signer
    toy.advance(limits.AGAIN_IDLE_S)
    owner.tick()
    settle(owner, other)
    assert is_agreed(owner, other)
