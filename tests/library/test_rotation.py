"""Addresses of one's own: replaced by time and by a move, by nobody else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from fake_wire import (
    DAY_S,
    OTHER_RELAY,
    RELAY,
    START_US,
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
    rotate,
    sdp,
    settle,
    signed_by,
)

from connectoid import (
    Contact,
    ContactRecord,
    RecordError,
    Save,
    Send,
    Store,
    SystemSuite,
    UsageError,
    limits,
    parse_address,
)
from connectoid.encoding import encode_base64url
from connectoid.roster import Roster
from connectoid_relay import SOURCE_SHARE, Limits

HASH = encode_base64url(bytes(32))


def test_pairing_rotates_both_and_the_first_message_to_a_new_address_makes_it_current(
    toy: World,
) -> None:
    alice = invite(toy)
    bob = open_link(toy, link_of(alice))
    first_of_bob = newest(bob).address
    settle(alice, bob)
    assert newest(alice).address != link_of(alice).address
    assert (alice.record.pending, alice.record.contact_address) == (None, newest(bob).address)
    assert newest(bob).address != first_of_bob
    alice.do(alice.contact.channel_closed(toy.now, alice.contact.attempt.attempt_id))
    alice.connect()
    pending = bob.record.pending
    bob.poll()
    assert (bob.record.pending, bob.record.current) == (None, pending)
    assert [own.address for own in bob.record.former] == [first_of_bob]


@pytest.mark.slow
@pytest.mark.parametrize("speaks", ["nobody", "alice", "bob"])
def test_mailbox_key_lives_two_months_at_most_if_both_apps_run(toy: World, speaks: str) -> None:
    """They poll every six hours, and at most one of them ever wants to connect."""
    alice, bob = apart(toy)
    born_s: dict[str, float] = {}
    lives_s: list[float] = []
    while toy.monotonic_s < 365 * DAY_S:
        for app in (alice, bob):
            app.poll()
            app.tick()
        if speaks != "nobody":
            app = {"alice": alice, "bob": bob}[speaks]
            app.connect()
            app.do(app.contact.disconnect(toy.now))
        owns = [own for app in (alice, bob) for own in app.record.addresses]
        alive = {key for own in owns for key in own.keys}
        for key in alive:
            born_s.setdefault(key, toy.monotonic_s)
        for key in set(born_s) - alive:
            lives_s.append(toy.monotonic_s - born_s.pop(key))
        toy.advance(DAY_S / 4)
    assert len(lives_s) >= 2 * 9
    assert max(lives_s) <= 62 * DAY_S
    assert all(toy.monotonic_s - since_s <= 62 * DAY_S for since_s in born_s.values())


def test_moved_is_repeated_once_a_day_until_something_comes_to_the_new_address(toy: World) -> None:
    alice, bob = apart(toy)
    toy.advance(limits.ROTATION_US / 1e6)
    toy.drop(newest(alice).address)
    sent = []
    for _ in range(9):
        sent.append(count(Send, alice.tick()))
        toy.advance(DAY_S / 4)
    assert sent == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert alice.record.pending is not None
    bob.poll()
    alice.poll()
    assert alice.record.pending is None
    toy.advance(DAY_S)
    assert alice.tick() == []


def test_moved_is_sent_by_the_first_tick_of_a_process_if_it_is_due(toy: World) -> None:
    alice, _ = apart(toy)
    toy.wall_us = alice.record.rotated_us + limits.ROTATION_US - 1
    assert count(Send, alice.restarted().tick()) == 0
    toy.wall_us += 1
    alice = alice.restarted()
    assert [type(effect) for effect in alice.tick()] == [Save, Send]
    alice = alice.restarted()
    assert alice.tick() == []
    toy.advance(limits.MOVED_EVERY_S - 1)
    assert alice.restarted().tick() == []
    toy.advance(1)
    assert count(Send, alice.restarted().tick()) == 1


def test_both_sides_that_move_at_once_have_new_addresses_and_fall_silent(toy: World) -> None:
    alice, bob = apart(toy)
    toy.advance(DAY_S)
    # Nothing has come yet to the address that his ready announced.
    bob.tick()
    settle(alice, bob)
    before = current_of(alice).address, current_of(bob).address
    assert (alice.record.pending, bob.record.pending) == (None, None)
    toy.advance(limits.ROTATION_US / 1e6 + 1)
    alice.tick()
    bob.tick()
    settle(alice, bob)
    assert (alice.record.pending, bob.record.pending) == (None, None)
    assert current_of(alice).address == bob.record.contact_address != before[0]
    assert current_of(bob).address == alice.record.contact_address != before[1]
    put_so_far = toy.put_so_far
    settle(alice, bob, rounds=60, gap_s=60.0)
    assert toy.put_so_far == put_so_far


def test_moved_without_end_gets_one_answer_a_minute(toy: World) -> None:
    alice, bob = apart(toy)
    sent = []
    for number in range(1, 8):
        text = signed_by(bob, "moved", seq=bob.record.seq + number)
        sent.append(count(Send, alice.hear(text)))
        toy.advance(20)
    assert sent == [1, 0, 0, 1, 0, 0, 1]


def test_at_most_one_address_is_pending_and_all_three_are_polled(toy: World) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    toy.advance(30 * DAY_S)
    bob.online = False
    seen = set()
    for _ in range(4):
        alice.do(alice.contact.disconnect(toy.now))
        alice.connect()
        seen.add(newest(alice).address)
        toy.advance(40 * DAY_S)
    assert len(seen) == 1
    polled = {poll.mailbox for poll in alice.contact.polls(toy.now)}
    assert polled == {
        box
        for own in (alice.record.pending, alice.record.current, *alice.record.former)
        if own
        for box in own.mailboxes
    }
    assert len(polled) == 3


def test_former_address_is_polled_until_the_next_rotation_and_then_its_keys_are_gone(
    toy: World,
) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    (former,) = alice.record.former
    assert former.mailboxes[0] in [poll.mailbox for poll in alice.contact.polls(toy.now)]
    alice.hear(signed_by(bob, "offer", to=former.address, sdpOffer=sdp("offer")), at=former.address)
    assert (
        alice.contact.dropped["replay"] + alice.contact.dropped["seal"]
        == alice.contact.dropped.total()
    )
    assert alice.record.seen_seq == bob.record.seq + 1
    rotate(alice, bob)
    assert former.keys[0] not in alice.saved
    assert former.mailboxes[0] not in [poll.mailbox for poll in alice.contact.polls(toy.now)]


@pytest.mark.parametrize(
    "forged", ["sender", "signature", "recipient", "replay", "address", "payload"]
)
def test_only_a_valid_message_makes_a_pending_address_current(toy: World, forged: str) -> None:
    alice, bob = apart(toy)
    toy.advance(30 * DAY_S + 1)
    alice.connect()
    pending = alice.record.pending
    assert pending is not None
    wrong: dict[str, dict[str, Any]] = {
        "sender": {"from": Attacker(toy).signer},
        "recipient": {"to": "elsewhere"},
        "replay": {"seq": 1},
        "address": {"connectoid": "x"},
        "payload": {"sdpOffer": None},
        "signature": {},
    }
    members = wrong[forged]
    text = signed_by(bob, "offer", **{"to": pending.address, "sdpOffer": sdp("offer"), **members})
    if forged == "signature":
        text = f"{text.rpartition('.')[0]}.{'A' * 128}"
    alice.hear(text, at=pending.address)
    assert alice.contact.dropped[forged] == 1
    assert alice.record.pending == pending


@pytest.mark.parametrize("who", ["alice", "bob"])
@pytest.mark.parametrize("after", range(14))
def test_crash_between_any_two_steps_of_a_rotation_repeats_the_step(
    toy: World, who: str, after: int
) -> None:
    alice, bob = apart(toy)
    rotate(alice, bob)
    toy.advance(30 * DAY_S + 1)
    apps = {"alice": alice.restarted(), "bob": bob.restarted()}
    apps[who].crash_after = after
    try:
        apps["alice"].connect()
        settle(apps["alice"], apps["bob"], rounds=3)
    except CrashError:
        apps[who] = apps[who].restarted()
    apps[who].crash_after = -1
    one, other = apps.values()
    for app in (one, other):
        app.do(app.contact.disconnect(toy.now))
        app.connect()
    settle(one, other, rounds=80)
    assert (one.state, other.state) == ("connected", "connected")
    for app, peer in ((one, other), (other, one)):
        polled = {
            own.address
            for own in (app.record.current, app.record.pending, *app.record.former)
            if own
        }
        assert peer.record.contact_address in polled


@pytest.mark.parametrize("who", ["alice", "bob"])
def test_copied_device_that_fills_mailboxes_cannot_keep_its_owner_from_being_heard(
    toy: World, who: str
) -> None:
    """More than a relay keeps of one source, in each of four rounds, and each word is answered."""
    apps = dict(zip(("alice", "bob"), apart(toy), strict=True))
    owner = apps.pop(who)
    (other,) = apps.values()
    thief = owner.restarted()
    before = [own.address for own in other.record.addresses]
    for _ in range(4):
        thief.online = False
        junk = [f"{toy.put_so_far}{number:04}" for number in range(64)]
        other.take(*junk, address=thief.record.contact_address)
        thief.online = True
        thief.connect()
        toy.advance(60)
        settle(other, thief, rounds=4)
        thief.do(thief.contact.disconnect(toy.now))
        settle(other, thief, rounds=4)
    assert [own.address for own in other.record.addresses] == before
    owner.unshare()
    settle(other, rounds=40)
    assert (other.record.state, other.record.why) == ("ended", "unshared")


def write_to(app: App, to: str, thief: App) -> None:
    """Let a thief with the keys of an app's contact write to one of the app's addresses."""
    text = signed_by(thief, "moved", to=to, re=HASH, seq=app.record.seen_seq + 1)
    app.hear(text, at=to)


@pytest.mark.parametrize("who", ["alice", "bob"])
def test_copied_device_that_answers_each_move_cannot_keep_its_owner_from_being_heard(
    toy: World, who: str
) -> None:
    """The owner's app does not run meanwhile, and knows the address from before alone."""
    apps = dict(zip(("alice", "bob"), apart(toy), strict=True))
    owner = apps.pop(who)
    (other,) = apps.values()
    thief = owner.restarted()
    for _ in range(3):
        # In order, so that each becomes current.
        for address in [move(other), move(other)]:
            write_to(other, address, thief)
            assert current_of(other).address == address
    owner.unshare()
    settle(other)
    assert (other.record.state, other.record.why) == ("ended", "unshared")


@pytest.mark.parametrize("who", ["alice", "bob"])
def test_copied_device_that_answers_late_brings_about_no_second_rotation(
    toy: World, who: str
) -> None:
    """The address has waited for longer than a rotation takes; it came into use just now."""
    apps = dict(zip(("alice", "bob"), apart(toy), strict=True))
    owner = apps.pop(who)
    (other,) = apps.values()
    thief = owner.restarted()
    toy.advance(limits.ROTATION_US / 1e6)
    other.tick()
    assert other.record.pending is not None
    toy.advance(limits.ROTATION_US / 1e6)
    for _ in range(2):
        write_to(other, newest(other).address, thief)
        other.tick()
        assert other.record.pending is None
    owner.unshare()
    settle(other)
    assert (other.record.state, other.record.why) == ("ended", "unshared")


@pytest.mark.parametrize("left", [limits.MAX_FORMER + step for step in (-1, 0, 1)])
def test_nobody_moves_or_renews_while_more_than_eight_addresses_were_left_lately(
    toy: World, left: int
) -> None:
    alice, bob = at_rest(toy)
    while len(alice.record.former) < left:
        write_to(alice, move(alice), bob)
    before = alice.record
    if left > limits.MAX_FORMER:
        for change in (lambda: move(alice), lambda: alice.contact.renew(toy.now)):
            with pytest.raises(UsageError, match=r"changed too often lately\."):
                change()
        assert alice.record == before
        # One rotates all the same when the time has come, and has room again.
        toy.advance(limits.ROTATION_US / 1e6)
        alice.tick()
        write_to(alice, newest(alice).address, bob)
        assert before.current
        assert [own.address for own in alice.record.former] == [before.current.address]
    move(alice)


@pytest.mark.parametrize(
    ("age_us", "stays"),
    [(limits.ROTATION_US - 1, True), (limits.ROTATION_US, False), (limits.ROTATION_US + 1, False)],
)
def test_former_address_goes_a_month_after_it_was_left_whatever_was_left_later(
    toy: World, age_us: int, stays: bool
) -> None:
    alice, bob = at_rest(toy)
    addresses = [current_of(alice).address]
    begun_us = toy.wall_us
    for part_us in (0, limits.ROTATION_US // 2, age_us):
        toy.advance((begun_us + part_us - toy.wall_us) / 1e6)
        addresses.append(move(alice))
        write_to(alice, addresses[-1], bob)
    oldest, *later = addresses[:-1]
    left = [own.address for own in alice.record.former]
    assert left[-2:] == later
    assert (oldest in left) == stays
    assert left == [own.address for own in alice.restarted().record.former]


def test_record_with_one_time_for_all_former_addresses_opens(toy: World) -> None:
    alice, bob = at_rest(toy)
    for _ in range(2):
        write_to(alice, move(alice), bob)
    members = json.loads(alice.saved)
    for own in members["former"]:
        del own["left_us"]
    members["left_us"] = toy.wall_us
    assert ContactRecord.from_json(json.dumps(members)) == alice.record
    members["former"][0]["left_us"] = "soon"
    with pytest.raises(RecordError):
        ContactRecord.from_json(json.dumps(members))


def test_rotation_takes_the_half_of_a_key_that_has_come_since(toy: World) -> None:
    alice = invite(toy, (RELAY, "the whole key"))
    settle(alice, open_link(toy, link_of(alice)))
    assert [box.ext for box in newest(alice).mailboxes] == ["the whole key"]
    alice.contact.machine.as_shown = lambda relays: tuple((url, "a half") for url, _ in relays)
    toy.advance(limits.ROTATION_US / 1e6)
    alice.tick()
    assert [box.ext for box in newest(alice).mailboxes] == ["a half"]
    assert alice.restarted().record.relays == ((RELAY, "a half"),)


def test_ten_sessions_an_hour_fit_into_what_a_relay_keeps_of_one_source(toy: World) -> None:
    """Both apps are started anew for each, and both want it: that takes most messages."""
    alice, bob = apart(toy)
    # Relays keep the hello for an hour, and every restart would answer it.
    toy.drop(link_of(alice).address)
    before = {pub: len(box) for pub, box in toy.boxes.items()}
    for _ in range(10):
        alice = alice.restarted()
        bob = bob.restarted()
        alice.connect()
        bob.connect()
        settle(alice, bob)
        assert alice.state == bob.state == "connected"
        for app in (alice, bob):
            app.do(app.contact.disconnect(toy.now))
    put = [len(box) - before.get(pub, 0) for pub, box in toy.boxes.items()]
    assert max(put) <= Limits().max_box_messages // SOURCE_SHARE


def test_suite_keeps_no_key_that_a_contact_has_given_up() -> None:
    suite = SystemSuite()
    alice, bob = apart(World(suite))
    kept = suite._private_keys
    rotate(alice, bob)
    (former,) = alice.record.former
    assert {*former.keys} <= {*kept}
    rotate(alice, bob)
    assert not {*former.keys} & {*kept}
    used = alice.record.private_keys | bob.record.private_keys
    assert used <= {*kept}
    alice.unshare()
    bob.poll()
    assert not bob.record.private_keys & {*kept} - {""}
    assert bob.record.state == "ended"
    alice.world.advance(31 * DAY_S)
    alice.tick()
    assert alice.contact.machine.gone
    assert not used & {*kept}


def test_suite_forgets_a_key_that_a_line_has_used_after_its_contact_gave_it_up() -> None:
    suite = SystemSuite()
    store = Store(":memory:")
    alice = invite(World(suite))
    roster = Roster(store, suite, lambda: alice.world.now, allow_http=False)
    number = roster.add(alice.contact)
    used = alice.record.private_keys
    late, pub = suite.make_key()
    roster.forget_unused(number, [late, *used])
    assert {*suite._private_keys} == used
    sealed = suite.seal(pub, b"", b"")
    # A key that is used once more is only slower.
    assert suite.open(late, b"", sealed) == b""
    roster.delete(number)
    roster.forget_unused(number, [late, *used])
    assert not suite._private_keys
    store.close()


def test_verified_mark_survives_rotation_and_restart(toy: World) -> None:
    alice, bob = paired(toy)
    alice.do(alice.contact.verify(toy.now))
    comparison = alice.record.comparison
    rotate(alice, bob)
    again = alice.restarted()
    assert (again.record.verified, again.record.comparison) == (True, comparison)
    again.do(again.contact.verify(toy.now, same=False))
    record = ContactRecord.from_json(again.saved)
    assert (record.verified, record.differs) == (False, True)
    again.do(again.contact.verify(toy.now))
    assert (again.record.verified, again.record.differs) == (True, False)


def test_verify_before_there_is_something_to_compare_is_a_mistake(toy: World) -> None:
    bob = open_link(toy, link_of(invite(toy)))
    for app in (invite(toy), bob):
        with pytest.raises(UsageError, match="compare"):
            app.contact.verify(toy.now)
        assert not app.record.verified


def test_move_to_other_relays_is_told_and_both_meet_there(toy: World) -> None:
    alice, bob = apart(toy)
    for mover, other in ((alice, bob), (bob, alice)):
        mover.do(mover.contact.move(toy.now, [(OTHER_RELAY, "key"), (RELAY, None)]))
        settle(alice, bob, rounds=20)
        assert [(box.url, box.ext) for box in parse_address(other.record.contact_address)] == [
            (OTHER_RELAY, "key"),
            (RELAY, None),
        ]
        assert mover.record.relays == ((OTHER_RELAY, "key"), (RELAY, None))
        assert (alice.state, bob.state) == ("connected", "connected")


@pytest.mark.parametrize(
    "relays",
    [
        [(RELAY, "")],
        [(RELAY, None)] * 4,
        [("ftp://x/", None)],
        [(RELAY, "a" * 1_025)],
        [("http://x/", None)],
    ],
)
def test_move_to_bad_relays_is_a_mistake_and_changes_nothing(
    toy: World, relays: Sequence[tuple[str, str | None]]
) -> None:
    alice, _ = paired(toy)
    before = alice.record, alice.contact.attempt
    with pytest.raises(UsageError, match="relay"):
        alice.contact.move(toy.now, relays)
    assert (alice.record, alice.contact.attempt) == before
    with pytest.raises(UsageError, match="Share again"):
        invite(toy).contact.move(toy.now, [(RELAY, None)])
    with pytest.raises(UsageError):
        Contact.invite(toy.suite, toy.now, "Bob", relays)


def test_second_move_before_the_contact_wrote_to_the_first_still_listens_there(toy: World) -> None:
    alice, bob = apart(toy)
    alice.do(alice.contact.move(toy.now, [(OTHER_RELAY, None)]))
    # He knows the first new address.
    bob.poll()
    alice.do(alice.contact.move(toy.now, [(RELAY, None)]))
    polled = {poll.mailbox for poll in alice.contact.polls(toy.now)}
    assert set(parse_address(bob.record.contact_address)) <= polled


def at_rest(world: World) -> tuple[App, App]:
    """Return two apps that are not connected and have no pending address."""
    alice, bob = apart(world)
    world.advance(DAY_S)
    bob.tick()
    settle(alice, bob)
    assert alice.record.pending is bob.record.pending is None
    return alice, bob


def move(app: App, url: str = OTHER_RELAY) -> str:
    """Let a user change relays, and give up the attempt to connect; return the new address."""
    app.do(app.contact.move(app.world.now, [(url, None)]))
    app.do(app.contact.disconnect(app.world.now))
    return newest(app).address


@pytest.mark.parametrize("moves", range(1, limits.MAX_REPLACED + 2))
def test_both_move_several_times_at_once_and_still_meet(toy: World, moves: int) -> None:
    """Each knows the first new address of the other, and nothing comes to it until later."""
    alice, bob = at_rest(toy)
    firsts = [move(alice), move(bob)]
    for app, first in zip((bob, alice), firsts, strict=True):
        app.poll()
        toy.drop(first)
    for app in (alice, bob):
        for _ in range(moves - 1):
            move(app)
    assert [bob.record.contact_address, alice.record.contact_address] == firsts
    for app in (alice, bob):
        app.connect()
    settle(alice, bob, rounds=40)
    assert (alice.state, bob.state) == ("connected", "connected")
    toy.advance(DAY_S)
    for app in (alice, bob):
        app.tick()
    settle(alice, bob)
    for app in (alice, bob):
        assert (app.record.pending, app.record.replaced) == (None, ())


@pytest.mark.parametrize("place", range(4))
def test_message_at_a_replaced_address_makes_it_current_and_older_ones_are_former(
    toy: World, place: int
) -> None:
    alice, bob = apart(toy)
    move(alice)
    bob.poll()
    alice.poll()
    first = current_of(alice)
    moved = [move(alice) for _ in range(4)]
    alice.hear(signed_by(bob, "moved", to=moved[place]), at=moved[place])
    record = alice.record
    assert record.current is not None
    assert record.current.address == moved[place]
    # What was left for the first of these was left a moment ago, too.
    assert [own.address for own in record.former][-1 - place :] == [first.address, *moved[:place]]
    assert [own.address for own in record.replaced] == moved[place + 1 : -1]
    assert (record.pending is None) == (place == 3)
    assert newest(alice).address == moved[-1]
    assert alice.restarted().record == record


@pytest.mark.parametrize("moves", [limits.MAX_REPLACED, limits.MAX_REPLACED + 1])
def test_so_many_moves_that_nobody_answers_are_made_and_no_address_is_let_go(
    toy: World, moves: int
) -> None:
    alice, _ = at_rest(toy)
    made = [move(alice) for _ in range(moves)]
    polled = {own.address for own in alice.record.addresses}
    assert {*made, current_of(alice).address} <= polled
    assert len(alice.record.replaced) == moves - 1


def test_one_more_move_that_nobody_answers_is_refused_and_changes_nothing(toy: World) -> None:
    alice, bob = at_rest(toy)
    made = [move(alice) for _ in range(limits.MAX_REPLACED + 1)]
    before = alice.record
    with pytest.raises(UsageError, match=r"not answered your last changes\."):
        alice.contact.move(toy.now, [(RELAY, None)])
    # A renewal makes an address too.
    with pytest.raises(UsageError, match=r"not answered your last changes\."):
        alice.contact.renew(toy.now)
    assert alice.record == before
    # Something comes to one of them: there is room again.
    alice.hear(signed_by(bob, "moved", to=made[0]), at=made[0])
    move(alice)
    with pytest.raises(UsageError):
        alice.contact.move(toy.now, [(RELAY, None)])


def test_relays_that_the_user_has_named_are_known_while_an_address_is_there(toy: World) -> None:
    alice, bob = at_rest(toy)
    third = "https://third.example.net/"
    assert (alice.record.named_relays, bob.record.named_relays) == ((RELAY,), ())
    for app in (alice, bob):
        move(app)
    # Those of the link do not become Bob's own.
    assert (alice.record.named_relays, bob.record.named_relays) == (
        (RELAY, OTHER_RELAY),
        (OTHER_RELAY,),
    )
    # The invitation's address is polled for its own 30 days.
    toy.advance(31 * DAY_S)
    alice.tick()
    for url in (OTHER_RELAY, OTHER_RELAY, third):
        toy.advance(30 * DAY_S)
        settle(alice, bob)
        move(alice, url)
    assert alice.record.named_relays == (OTHER_RELAY, third)


def test_address_made_by_a_clock_that_was_ahead_is_still_replaced(toy: World) -> None:
    toy.wall_us += 10 * 365 * limits.DAY_US
    alice, _ = apart(toy)
    toy.wall_us = START_US
    address = newest(alice).address
    toy.advance(31 * DAY_S)
    alice.connect()
    assert newest(alice).address != address


def test_move_to_no_relay_is_a_mistake(toy: World) -> None:
    alice, _ = paired(toy)
    with pytest.raises(UsageError):
        alice.contact.move(toy.now, [])


@pytest.mark.parametrize("relay", [("https://relay.example.com/\ud800", None), (RELAY, "\ud800")])
def test_relay_that_is_no_text_is_a_mistake_of_the_app(
    toy: World, relay: tuple[str, str | None]
) -> None:
    with pytest.raises(UsageError):
        invite(toy, relay)
