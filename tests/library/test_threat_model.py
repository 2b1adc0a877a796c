"""Each row of "Threat model" in PROTOCOL.md: an attacker's successes and failures."""

from __future__ import annotations

from fake_wire import (
    DAY_S,
    App,
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
    rotate,
    settle,
)

from connectoid import (
    EMOJI,
    ContactRecord,
    Save,
    Send,
    comparison_string,
    limits,
    parse_address,
    parse_invitation,
)
from connectoid.encoding import decode_base64url, encode_base64url


def test_relay_alone_reads_and_forges_nothing_but_sees_sizes_and_can_drop(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    pub = parse_address(link_of(alice).address)[0].pub
    mallory = Attacker(world)
    [(_, hello)] = world.boxes[pub]
    assert opened_with(world, [mallory.box_key, mallory.key], hello) is None
    sizes = {len(decode_base64url(sealed)) for box in world.boxes.values() for _, sealed in box}
    # The length includes enc and tag. Only steps are visible.
    assert sizes <= {size + 97 + 16 for size in limits.SIZES}
    guessed = parse_invitation(f"{link_of(alice).address}..{'A' * 64}")
    alice.hear(mallory.hello(guessed), at=link_of(alice).address)
    assert alice.contact.dropped == {"proof": 1}
    assert alice.record.state == "invited"
    world.drop(link_of(alice).address)
    settle(alice, bob)
    assert (alice.record.state, bob.record.state) == ("invited", "opened")
    assert not {"used", "paired", "opened_twice"} & {*alice.told, *bob.told}


def test_relay_that_delays_only_delays(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    held_back = dict(world.boxes)
    world.boxes.clear()
    settle(alice, bob)
    world.advance(3 * DAY_S)
    world.boxes.update(held_back)
    settle(alice, bob, rounds=20)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_reader_of_the_link_can_race_bob_and_both_are_shown_it(world: World) -> None:
    alice = invite(world)
    mallory = open_link(world, link_of(alice))
    settle(alice, mallory)
    assert alice.record.contact == mallory.record.signer
    bob = open_link(world, link_of(alice))
    settle(alice, bob, mallory)
    assert bob.told == ["used"]
    assert (bob.record.state, bob.record.why) == ("ended", "used")
    assert "opened_twice" in alice.told


def test_reader_of_the_link_after_bob_cannot_take_his_place_nor_read(world: World) -> None:
    alice, bob = paired(world)
    link = link_of(alice)
    comparison = alice.record.comparison
    mallory = open_link(world, link)
    settle(alice, mallory)
    assert mallory.told == ["used"]
    assert alice.told.count("opened_twice") == 1
    assert (alice.record.contact, alice.record.comparison) == (bob.record.signer, comparison)
    everything = [sealed for box in world.boxes.values() for _, sealed in box]
    keys = [encode_base64url(link.secret), mallory.record.private_key]
    assert all(opened_with(world, keys, sealed) is None for sealed in everything)


def test_reader_of_the_link_with_the_relays_impersonates_bob_who_sees_silence_and_no_emoji(
    world: World,
) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    world.drop(link_of(alice).address)
    mallory = open_link(world, link_of(alice), "Bob")
    settle(alice, mallory)
    # Mallory can do this.
    assert alice.record.contact == mallory.record.signer
    settle(bob, rounds=100, gap_s=5)
    assert set(bob.told) == {"unanswered"}
    # Bob has nothing to compare, and Alice has.
    assert bob.record.comparison == ()
    assert len(alice.record.comparison) == 7


def test_reader_of_the_link_with_the_relays_cannot_be_alice_to_bob(world: World) -> None:
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    world.drop(link_of(alice).address)
    mallory = open_link(world, link_of(alice))
    settle(alice, mallory)
    assert alice.record.contact == mallory.record.signer
    # Mallory has it from the welcome.
    r = alice.record.r
    own = newest(bob).address
    forger = Attacker(world)
    by_her = forger.sign("welcome", own, r=r, re=bob.record.hello_hash)
    in_her_name = forger.sign(
        "welcome", own, r=r, re=bob.record.hello_hash, **{"from": alice.record.signer}
    )
    bob.take(*(world.seal(own, text) for text in (by_her, in_her_name, alice.record.welcome)))
    assert bob.contact.dropped == {"commitment": 1, "signature": 1, "recipient": 1}
    assert bob.record.state == "opened"


def test_replaced_link_lets_mallory_between_and_the_emoji_differ(world: World) -> None:
    alice = invite(world)
    mallorys = invite(world)
    to_alice = open_link(world, link_of(alice), "Alice")
    bob = open_link(world, link_of(mallorys))
    settle(alice, to_alice)
    settle(mallorys, bob)
    # Mallory can do this.
    assert (alice.state, bob.state) == ("connected", "connected")
    assert alice.record.comparison == to_alice.record.comparison
    assert bob.record.comparison == mallorys.record.comparison
    assert alice.record.comparison != bob.record.comparison
    bob.contact.verify(world.now, same=False)
    assert not bob.record.verified


def test_comparison_string_hangs_on_the_link_the_hello_the_signer_and_r(world: World) -> None:
    alice, bob = paired(world)
    assert alice.record.comparison == bob.record.comparison
    texts = ("inv", "a.b", "from", "r")
    base = comparison_string(*texts)
    others = [
        comparison_string(*(text + "x" if place == at else text for at, text in enumerate(texts)))
        for place in range(4)
    ]
    assert len({base, *others}) == 5
    assert comparison_string("inv", "a.b.signature", "from", "r") == base
    assert comparison_string("inv", "a.b.signature.proof", "from", "r") == base
    assert all(0 <= index < len(EMOJI) == 64 for index in base)


def test_old_link_gives_nothing_after_thirty_days(world: World) -> None:
    alice, bob = paired(world)
    link = link_of(alice)
    comparison = alice.record.comparison
    world.advance(30 * DAY_S)
    alice.tick()
    assert (alice.record.invitation, alice.record.r, alice.record.invited) == ("", "", None)
    mallory = open_link(world, link)
    before = len(alice.done)
    settle(alice, mallory)
    assert count(Send, alice.done[before:]) == 0
    assert mallory.record.state == "opened"
    assert (alice.record.state, alice.record.contact) == ("paired", bob.record.signer)
    assert alice.record.comparison == comparison


def test_copied_device_is_you_until_the_contact_unshares(world: World) -> None:
    alice, bob = apart(world)
    thief = bob.restarted()
    thief.connect()
    settle(alice, thief)
    # The thief can do this.
    assert (alice.state, thief.state) == ("connected", "connected")
    alice.unshare()
    settle(thief, rounds=2)
    assert (thief.record.state, thief.record.why) == ("ended", "unshared")
    again = bob.restarted()
    again.do(again.contact.connect(world.now))
    settle(alice, again, rounds=20)
    # The copy has answered her, so nothing is left of the contact.
    assert alice.record.state == "ended"
    assert alice.state == "apart"


def test_copied_device_is_nobody_once_its_owner_has_renewed(world: World) -> None:
    alice, bob = apart(world)
    thief = bob.restarted()
    bob.do(bob.contact.renew(world.now))
    settle(alice, bob)
    put_before = world.put_so_far
    thief.connect()
    settle(alice, thief, rounds=20)
    # What he hears is nothing, and what he says last does not count.
    assert (alice.state, thief.state) == ("apart", "waiting")
    assert read_by(thief, put_before) == []
    thief.unshare()
    settle(alice, rounds=2)
    assert alice.record.state == "paired"
    for app in (alice, bob):
        app.connect()
    settle(alice, bob, rounds=40)
    assert (alice.state, bob.state) == ("connected", "connected")


def test_recorded_traffic_is_readable_to_a_thief_back_to_the_last_but_one_rotation_only(
    world: World,
) -> None:
    alice, bob = paired(world)
    addresses = [newest(alice).address]
    for _ in range(3):
        rotate(alice, bob)
        addresses.append(newest(alice).address)
    assert len(set(addresses)) == 4
    stolen = ContactRecord.from_json(alice.saved)
    keys = [key for own in stolen.addresses for key in own.keys]
    readable = [
        any(
            opened_with(world, keys, sealed)
            for _, sealed in world.boxes[parse_address(address)[0].pub]
        )
        for address in addresses
    ]
    assert readable == [False, False, True, True]
    invited = parse_address(open_address(bob))[0].pub
    assert all(opened_with(world, keys, sealed) is None for _, sealed in world.boxes[invited])


def open_address(bob: App) -> str:
    """Return the address of the link that an app opened."""
    first = next(effect for effect in bob.done if isinstance(effect, Save))
    return first.record.contact_address
