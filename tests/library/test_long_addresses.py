"""The longest addresses, apps and SDPs: two sides pair all the same, with fewer candidates."""

from __future__ import annotations

from fake_sdp import make_sdp
from fake_wire import APP, App, World, link_of, newest

from connectoid import Contact, Gather, make_link, parse_address, read_link
from connectoid.limits import MAX_ADDRESS_CHARS, MAX_APP_CHARS, MAX_CANDIDATES, MAX_URL_CHARS

LONGEST_APP = "a" * MAX_APP_CHARS
# It ends near the most characters of a line, as a browser's with several networks does.
CANDIDATE = (
    "a=candidate:1 1 udp 1 2001:db8:1111:2222:3333:4444:5555:{:04x} 54321 typ srflx "
    f"raddr 2001:db8:1111:2222:3333:4444:5555:6666 rport 54321 {'x' * 100}\r\n")


def longest_relays(host: str) -> list[tuple[str, str]]:
    """Return three relays whose address is as long as one may be."""
    start = f"https://{host}/"
    url = start + "a" * (MAX_URL_CHARS - len(start))
    return [(url, "A" * 459), (url, "A" * 460), (url, "A" * 461)]


def large_sdp(kind: str) -> dict[str, str]:
    """Return an SDP of nearly 8,192 characters."""
    lines = [CANDIDATE.format(number) for number in range(1, MAX_CANDIDATES + 1)]
    return {"type": kind, "sdp": make_sdp(kind)["sdp"] + "".join(lines)}


def gather(app: App, kind: str) -> None:
    """Have WebRTC say what it has gathered for the newest attempt."""
    attempt_id = app.contact.attempt.attempt_id
    app.do(app.contact.gathered(app.world.now, attempt_id, large_sdp(kind)))


def read_offers(app: App) -> list[str]:
    """Return the offers that WebRTC was given."""
    return [effect.offer["sdp"] for effect in app.done
            if isinstance(effect, Gather) and effect.offer is not None]


def test_two_sides_with_the_longest_addresses_pair_and_offer_what_has_room(toy: World) -> None:
    """Each message names two addresses of 4,096 characters."""
    alice = App(toy, Contact.invite(
        toy.suite, toy.now, "Bob", longest_relays("alice.example.com"), app=LONGEST_APP))
    assert len(newest(alice).address) == MAX_ADDRESS_CHARS
    invitation = read_link(make_link(APP, link_of(alice).text))
    contact, begun = Contact.open(
        toy.suite, toy.now, "Alice", invitation, relays=longest_relays("bob.example.com"),
        app=LONGEST_APP)
    bob = App(toy, (contact, []))
    alice.gathers = bob.gathers = False
    bob.do(begun)
    gather(bob, "offer")
    alice.poll()
    (offer,) = read_offers(alice)
    assert 0 < offer.count("a=candidate") < MAX_CANDIDATES
    gather(alice, "answer")
    bob.poll()
    assert (alice.record.state, bob.record.state) == ("welcomed", "ready")
    alice.poll()
    assert alice.record.state == "paired"
    assert len(parse_address(alice.record.contact_address)) == len(longest_relays(""))
