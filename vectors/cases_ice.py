"""Cases of ICE servers: those that follow from what is known of a contact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vector_forms import RELAY, mailbox
from vector_keys import Json
from vector_people import B1

OTHER = "https://other.example.net/connectoid"
THEIRS = "https://theirs.example/"
STRANGERS = "https://strangers.example/"

STUN: Json = {"stun": True}
LENT: Json = {
    "urls": ["turn:turn.example.com:3478", "turns:turn.example.com:5349?transport=tcp"],
    "username": "1800003600:00c0ffee00c0ffee",
    "credential": "dGhpcyBpcyBubyBobWFjLgA=",
    "ttl": 3_600,
}

TURN = "turn:turn.example.com:3478"

DOCUMENTS: Json = {RELAY: STUN, OTHER: STUN, THEIRS: STUN, STRANGERS: STUN}


def as_ice_server(lent: Json) -> Json:
    """Return what WebRTC gets of what a relay has lent."""
    return {member: lent[member] for member in ("urls", "username", "credential")}


def servers(
    name: str, relays: list[str], stun: list[str], more: tuple[str, ...] = (), **known: Any
) -> Json:
    """Return a case of a contact with mailboxes of one's own at relays."""
    return {
        "name": name,
        "relays": [[url, None] for url in relays],
        "connectoid": mailbox(B1.pub, THEIRS),
        "documents": DOCUMENTS | known,
        "lent": {},
        "more": list(more),
        "ice_servers": [*stun, *more],
    }


def lending(name: str, relays: list[str], lent: Json, used: list[Json], *more: str) -> Json:
    """Return a case of relays that have lent TURN servers, of which some are used."""
    ice_servers = [*more, *map(as_ice_server, used)]
    documents: Json = {url: {} for url in relays}
    case = servers(name, relays, [], more, **documents)
    return case | {"lent": lent, "ice_servers": ice_servers}


def with_document(name: str, document: Json) -> Json:
    """Return a case of a relay that says something of itself."""
    return servers(name, [RELAY], [], (), **{RELAY: document})


def of_relay(url: str, stun: str) -> Json:
    """Return a case of a relay by its URL."""
    return servers(f"relay {url}", [url], [stun], (), **{url: STUN})


def ice_cases() -> Iterator[Json]:
    """Yield contacts, with the ICE servers for them."""
    at = "stun:relay.example.com:443"
    other_at = "stun:other.example.net:443"
    yield servers("one's own relay, and not the contact's", [RELAY], [at])
    yield servers("two relays in their order", [OTHER, RELAY], [other_at, at])
    yield servers("a relay twice", [RELAY, RELAY], [at])
    yield servers("the contact's relay is one's own too", [THEIRS], ["stun:theirs.example:443"])
    yield servers("what the app sets comes after", [RELAY], [at], (TURN,))
    yield servers("no relay, but what the app sets", [], [], (TURN,))
    yield servers("a relay of which nothing is known", ["https://unknown.example/"], [])
    other = LENT | {"username": "1800003600:1111"}
    yield lending("what one's own relay has lent", [RELAY], {RELAY: LENT}, [LENT])
    yield lending("what the app sets comes before it", [RELAY], {RELAY: LENT}, [LENT], TURN)
    yield lending(
        "two that lend, in the order of the relays", [OTHER, RELAY],
        {RELAY: LENT, OTHER: other}, [other, LENT])
    yield lending("a relay twice that lends", [RELAY, RELAY], {RELAY: LENT}, [LENT])
    yield lending("what relays of others have lent", [OTHER], {RELAY: LENT, THEIRS: LENT}, [])
    yield with_document("a relay that says nothing of STUN", {})
    yield with_document("a relay without STUN", {"stun": False})
    yield with_document("a relay that says 1", {"stun": 1})
    yield with_document("a relay that says it in a text", {"stun": "true"})
    yield with_document("a relay that names another server", {"stun": "stun:strangers.example:1"})
    yield of_relay("https://relay.example.com:8443/path", "stun:relay.example.com:8443")
    yield of_relay("http://localhost:8080/", "stun:localhost:8080")
    yield of_relay("http://127.0.0.1", "stun:127.0.0.1:80")
    yield of_relay("https://[2001:db8::1]/", "stun:[2001:db8::1]:443")
    yield of_relay("https://[2001:db8::1]:8443/", "stun:[2001:db8::1]:8443")


def turn(name: str, relay: str = RELAY, **changed: Any) -> Json:
    """Return a case of what a relay lends, and of what WebRTC gets of it."""
    lent = LENT | changed
    return {
        "name": name,
        "relay": relay,
        "turn": lent,
        "ice_server": as_ice_server(lent),
        "ttl_s": min(lent["ttl"], 86_400),
    }


def no_turn(name: str, lent: Any, relay: str = RELAY) -> Json:
    """Return a case of what counts as nothing lent."""
    return {"name": name, "relay": relay, "turn": lent, "refused": "turn"}


def turn_cases() -> Iterator[Json]:
    """Yield what relays lend, in its form and in others."""
    yield turn("URLs of UDP and TLS")
    yield from turn_url_cases()
    yield from word_cases("username")
    yield from word_cases("credential")
    for ttl_s in (1, 86_399, 86_400, 86_401, 2**53 - 1):
        yield turn(f"{ttl_s} s", ttl=ttl_s)
    for ttl in (0, -1, None, True, "3600", [3_600], 0.5):
        yield no_turn(f"ttl {ttl!r}", LENT | {"ttl": ttl})
    for member in LENT:
        yield no_turn(f"without {member}", {key: LENT[key] for key in LENT if key != member})
    for lent in (None, True, [], [LENT], TURN):
        yield no_turn(f"turn {str(lent)[:8]}", lent)


def turn_url_cases() -> Iterator[Json]:
    """Yield URLs of TURN servers."""
    for url in GOOD_TURN_URLS:
        yield turn(f"URL {url}", urls=[url])
    for url in PRIVATE_TURN_URLS:
        for relay in PRIVATE_RELAYS:
            yield turn(f"URL {url} of relay {relay}", relay, urls=[url])
        yield no_turn(f"URL {url} of relay {RELAY}", LENT | {"urls": [url]})
    for url in BAD_TURN_URLS:
        yield no_turn(f"URL {url!r}", LENT | {"urls": [url]}, PRIVATE_RELAYS[0])
    yield no_turn("a good URL and a bad one", LENT | {"urls": [TURN, "turn:"]})
    yield no_turn("a public URL and a private one", LENT | {"urls": [TURN, "turn:10.0.0.1"]})
    for count in (1, 3, 4):
        yield turn(f"{count} URLs", urls=[TURN] * count)
    for count in (0, 5):
        yield no_turn(f"{count} URLs", LENT | {"urls": [TURN] * count})
    others: tuple[Any, ...] = (TURN, None, {}, [None], [[TURN]])
    for urls in others:
        yield no_turn(f"urls {urls!r}", LENT | {"urls": urls})


def word_cases(member: str) -> Iterator[Json]:
    """Yield user names or passwords."""
    for count in (1, 255, 256):
        yield turn(f"{member} of {count}", RELAY, **{member: "x" * count})
    yield turn(f"{member} of all characters", RELAY, **{member: "".join(map(chr, range(33, 127)))})
    for text in ("", "x" * 257, "a b", "a\r\nb", "\x7f", "\u00e9", None, 5):
        words = ascii(text)[:12]
        yield no_turn(f"{member} {words}", LENT | {member: text})


GOOD_TURN_URLS = (
    "turn:turn.example.com",
    "turn:turn.example.com:1",
    "turn:turn.example.com:65535?transport=udp",
    "turn:turn.example.com?transport=tcp",
    "turns:turn.example.com",
    "turn:203.0.113.7:3478",
    "turn:[2001:db8::1]:3478",
)
PRIVATE_TURN_URLS = (
    "turn:localhost:3478",
    "turn:127.0.0.1",
    "turn:192.168.1.1:3478",
    "turns:[::1]:443?transport=tcp",
    "turn:[fd00::1]",
    "turn:[::ffff:10.0.0.1]",
)
# Those of one's own machine and network, which may have a TURN server there.
PRIVATE_RELAYS = ("http://127.0.0.1:8080/", "https://192.168.1.7/", "http://localhost/")
BAD_TURN_URLS = (
    "",
    "turn:",
    "turn://turn.example.com",
    "stun:turn.example.com",
    "TURN:turn.example.com",
    "https://turn.example.com",
    "turn:alice@turn.example.com",
    "turn:turn.example.com:0",
    "turn:turn.example.com:65536",
    "turn:turn.example.com:",
    "turn:turn.example.com/",
    "turn:turn.example.com?transport=sctp",
    "turn:turn.example.com?transport=UDP",
    "turn:turn.example.com?",
    "turn:turn.example.com?transport=udp&x=1",
    "turn:turn.example.com#x",
    "turn: turn.example.com",
    "turn:turn.example.com\n",
    "turn:2001:db8::1",
    "turn:0x7f.1",
    "turn:0177.0.0.1",
    "turn:b\u00fccher.example",
)
