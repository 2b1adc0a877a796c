"""Addresses, URLs and links: hostile ones, damaged ones, and those at the limits."""

from __future__ import annotations

import ipaddress
import random
import urllib.parse

import pytest
from fake_wire import (
    APP,
    OTHER_RELAY,
    RELAY,
    TEST_PUB,
    Attacker,
    World,
    count,
    invite,
    link_of,
    open_link,
)

from connectoid import (
    Gather,
    Invitation,
    LinkError,
    Mailbox,
    Refused,
    Send,
    UsageError,
    format_address,
    limits,
    make_link,
    parse_address,
    read_link,
)
from connectoid.urls import check_url, origin_of

HOSTILE_URLS = [
    "http://relay.example.com/",
    "HTTPS://relay.example.com/",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "data:text/html,x",
    "ftp://relay.example.com/",
    "https:relay.example.com",
    "https:/relay.example.com/",
    "//relay.example.com/",
    "relay.example.com",
    "https://",
    "https:///",
    "https://user@relay.example.com/",
    "https://user:pass@relay.example.com/",
    "https://relay.example.com@evil.example/",
    "https://:@evil.example/",
    "https://relay.example.com\\@evil.example/",
    "https:\\\\relay.example.com/",
    "https://relay.example.com/\\evil",
    "https://relay.example.com:0/",
    "https://relay.example.com:99999/",
    "https://relay.example.com:65536/",
    "https://relay.example.com:/",
    "https://relay.example.com:-1/",
    "https://relay.example.com:+1/",
    "https://relay.example.com:\u0661/",
    "https://relay.example.com/?a=b",
    "https://relay.example.com/#a",
    "https://relay.example.com/\n",
    "\nhttps://relay.example.com/",
    "https://relay.example.com/\r\nHost: evil",
    "https://relay.example.com/\0",
    "https://relay.example.com/ a",
    " https://relay.example.com/",
    "https://relay.ex\tample.com/",
    "https://rel\u0430y.example.com/",
    "https://relay\uff0eexample.com/",
    "https://relay.example.com/\u202e",
    "https://\u2100.example.com/",
    "https://relay.example.com\uff0fevil/",
    "https://[::1",
    "https://::1/",
    "https://[fe80::1%25eth0]/",
    "https://[evil.example]/",
    "https://xn--bcher-kva.example/",
    "http://localhost.evil.example/",
    "http://127.0.0.1.evil.example/",
    "http://evil.example/127.0.0.1",
    "http://127.0.0.1@evil.example/",
    "http://[::ffff:10.0.0.1]/",
    "http://10.0.0.1/",
    "http://0.0.0.0/",
    "https://relay.example.com/" + "a" * 487,
    "https://" + "a" * 2_000,
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_hostile_url_in_a_hello_is_never_asked(toy: World, url: str) -> None:
    alice = invite(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    mallory.address = str(Mailbox(mallory.box, url))
    alice.hear(mallory.hello(link), at=link.address)
    assert alice.contact.dropped == {"address": 1}
    assert alice.record.state == "invited"
    assert count(Send, alice.done) == count(Gather, alice.done) == 0


@pytest.mark.parametrize(
    "url",
    [
        "https://relay.example.com",
        "https://relay.example.com/",
        "https://relay.example.com:8443/a/b%20c/~d",
        "https://[2001:db8::1]:443/",
        "https://192.0.2.1/",
        "http://127.0.0.1:8000/",
        "http://localhost/",
        "http://[::1]:8000/",
        "https://relay.example.com/@a:b",
        "https://relay.example.com/" + "a" * 486,
    ],
)
def test_plain_url_is_taken(url: str) -> None:
    assert parse_address(str(Mailbox(TEST_PUB, url))) == (Mailbox(TEST_PUB, url),)


def test_http_is_for_loopback_or_where_the_app_allows_it(toy: World) -> None:
    address = str(Mailbox(TEST_PUB, "http://relay.example.com/"))
    with pytest.raises(Refused, match="https"):
        parse_address(address)
    assert len(parse_address(address, allow_http=True)) == 1
    with pytest.raises(LinkError, match="https"):
        read_link(f"{address}..{'A' * 64}")
    assert read_link(f"{address}..{'A' * 64}", allow_http=True).address == address
    with pytest.raises(UsageError, match="https"):
        invite(toy, ("http://relay.example.com/", None))


@pytest.mark.parametrize(
    "parts",
    [
        "",
        ".",
        "..",
        "~",
        TEST_PUB,
        f"{TEST_PUB}.",
        f".{'a' * 8}",
        f"{TEST_PUB}.aHR0cHM6Ly9h.",
        f"{TEST_PUB}.aHR0cHM6Ly9h.YQ.YQ",
        f"{TEST_PUB}.aHR0cHM6Ly9h~",
        f"~{TEST_PUB}.aHR0cHM6Ly9h",
        f"{TEST_PUB}.aHR0cHM6Ly9h~{TEST_PUB}.aHR0cHM6Ly9i",
        f"{TEST_PUB}.aHR0cHM6Ly9h=",
        f"{TEST_PUB}.aHR0cHM6Ly9h\n",
        f"{TEST_PUB[:-1]}.aHR0cHM6Ly9h",
        f"{TEST_PUB}._w",
        f"{TEST_PUB[:-1]}B.aHR0cHM6Ly9h",
        f"{TEST_PUB}.aHR0cHM6Ly9h._w",
        f"{TEST_PUB}.aHR0cHM6Ly9h.YR",
        f"B{TEST_PUB[1:]}.aHR0cHM6Ly9h",
        f"AQ{TEST_PUB[2:]}.aHR0cHM6Ly9h",
        f"{TEST_PUB}.aHR0cHM6Ly9h.é",
        f"{TEST_PUB} .aHR0cHM6Ly9h",
    ],
)
def test_address_of_another_form_is_refused(parts: str) -> None:
    with pytest.raises(Refused) as error:
        parse_address(parts)
    assert error.value.reason == "address"


GOOD_MAILBOX = str(Mailbox(TEST_PUB, RELAY))

GOOD = f"{GOOD_MAILBOX}..{'A' * 64}"

SENTENCES = {
    "nothing": ("", "not an invitation link"),
    "another page": (f"{APP}#section", "not an invitation link"),
    "another parameter": (f"{APP}?invitation={GOOD}", "not an invitation link"),
    "cut before the key": (f"{APP}#connectoid=", "damaged"),
    "cut in the key": (f"{APP}#connectoid={GOOD[:40]}", "cut off"),
    "cut after the key": (f"{APP}#connectoid={GOOD[:66]}", "cut off"),
    "cut in the URL": (f"{APP}#connectoid={GOOD[:80]}", "damaged"),
    "no secret": (
        f"{APP}#connectoid={GOOD_MAILBOX}",
        r"^This link has no secret; ask for a new one\.$",
    ),
    "no secret, empty ext": (
        f"{APP}#connectoid={GOOD_MAILBOX}.",
        r"^This link has no secret; ask for a new one\.$",
    ),
    "cut in the secret": (f"{APP}#connectoid={GOOD[:-1]}", "cut off or damaged"),
    "a letter too many": (f"{APP}#connectoid={GOOD}A", "cut off or damaged"),
    "a full stop of the sentence": (f"{APP}#connectoid={GOOD}.", "cut off or damaged"),
    "a bracket": (f"{APP}#connectoid={GOOD})", "cut off or damaged"),
    "a changed key": (f"{APP}#connectoid=B{GOOD[1:]}", "key is damaged"),
    "a space in it": (f"{APP}#connectoid={GOOD[:70]} {GOOD[70:]}", "damaged"),
    "four mailboxes": (f"{APP}#connectoid={'~'.join([GOOD_MAILBOX] * 3)}~{GOOD}", "more than 3"),
    "twice the same": (f"{APP}#connectoid={GOOD_MAILBOX}~{GOOD}", "twice"),
    "not https": (
        f"{APP}#connectoid={Mailbox(TEST_PUB, 'http://relay.example.com/')}..{'A' * 64}",
        "https",
    ),
}


@pytest.mark.parametrize(("link", "says"), SENTENCES.values(), ids=SENTENCES)
def test_damaged_link_says_what_is_wrong_in_a_sentence(link: str, says: str) -> None:
    with pytest.raises(LinkError, match=says) as error:
        read_link(link)
    text = str(error.value)
    assert text.startswith(("This link ", "This is not an invitation link. "))
    assert text.endswith((".", "whole."))
    # No text that a user may post has a secret in it.
    assert "A" * 60 not in text


@pytest.mark.parametrize(
    "link",
    [
        f"{APP}#connectoid={GOOD}",
        f"{APP}?connectoid={GOOD}",
        f"{APP}?a=b&connectoid={GOOD}#other",
        GOOD,
        f" {APP}#connectoid={GOOD}\n",
        f"{APP}#a&connectoid={GOOD}&utm=x",
        f"#connectoid={GOOD}",
        f"{APP}#connectoid={GOOD.replace('.', '%2E')}",
        f"{APP}?connectoid={GOOD}#connectoid={GOOD}",
    ],
)
def test_invitation_is_found_in_fragment_query_or_bare(link: str) -> None:
    assert read_link(link) == Invitation(GOOD, GOOD_MAILBOX, bytes(16), bytes(32))


def test_made_link_has_the_invitation_in_the_fragment_and_is_read_again(toy: World) -> None:
    for relays in (
        [(RELAY, None)],
        [(RELAY, "key é"), (OTHER_RELAY, None)],
        [(RELAY, None), (OTHER_RELAY, "k")],
    ):
        alice = invite(toy, *relays)
        for app_url in (APP, f"{APP}#old", f"{APP}?a=b"):
            link = make_link(app_url, alice.record.invitation)
            assert link == f"{app_url.partition('#')[0]}#connectoid={alice.record.invitation}"
            read = read_link(link)
            assert alice.record.invited is not None
            assert (read.text, read.address) == (
                alice.record.invitation,
                alice.record.invited.address,
            )
            assert [(box.url, box.ext) for box in parse_address(read.address)] == relays


def test_address_has_one_to_three_mailboxes(toy: World) -> None:
    boxes = [Mailbox(toy.suite.make_key()[1], RELAY) for _ in range(4)]
    for number in (1, 2, 3):
        assert parse_address(format_address(boxes[:number])) == tuple(boxes[:number])
    for refused in (boxes, []):
        with pytest.raises(Refused):
            parse_address(format_address(refused))


@pytest.mark.parametrize("letter", ["a", "é", "\U0001f600"])
def test_ext_has_at_most_so_many_code_points(letter: str) -> None:
    most = limits.MAX_EXT_CHARS
    # More of the longest would make the address too long.
    many = letter * 512
    for length in (1, most - 1, most):
        box = Mailbox(TEST_PUB, RELAY, many[:length].ljust(length, "a"))
        assert parse_address(str(box)) == (box,)
    with pytest.raises(Refused, match="1024"):
        parse_address(str(Mailbox(TEST_PUB, RELAY, many.ljust(most + 1, "a"))))


def test_address_has_at_most_so_many_characters() -> None:
    """It is refused before anything in it is decoded."""
    for length in (limits.MAX_ADDRESS_CHARS - 1, limits.MAX_ADDRESS_CHARS):
        with pytest.raises(Refused, match="cut off"):
            parse_address("." * length)
    with pytest.raises(Refused, match="4096"):
        parse_address("." * (limits.MAX_ADDRESS_CHARS + 1))


PIECES = (
    *"09afzAF.-:[]%/@_", "..", "::", "0x", "xn--", "localhost", "127.0.0.1", "192.0.2.", "ffff:",
    "64:ff9b::", ":443", ":0443", "/a", "/.", "/%2e", "/%41", "https://", "\u3002", "\u0661",
)


def test_url_that_is_taken_is_read_alike_by_every_parser() -> None:
    """A random one has the same scheme, host, port and path for urllib and for aiohttp's yarl."""
    yarl = pytest.importorskip("yarl")
    dice = random.Random(1)
    taken = 0
    for _ in range(20_000):
        url = "https://" + "".join(dice.choices(PIECES, k=dice.randrange(1, 7)))
        try:
            origin = origin_of(url)
        except Refused:
            continue
        taken += 1
        host = origin.host.strip("[]")
        parts = urllib.parse.urlsplit(url)
        assert (parts.scheme, parts.hostname, parts.port or 443) == (origin[0], host, origin[2])
        read = yarl.URL(url, encoded=True)
        if "[" in url:
            # yarl writes them in their short form.
            host = str(ipaddress.IPv6Address(host))
        assert read.host is not None
        assert (read.scheme, read.host.lower(), read.port) == (origin[0], host, origin[2])
        assert read.raw_path_qs == (parts.path or "/")
    assert taken > 1_000


def test_url_has_at_most_so_many_characters() -> None:
    most = limits.MAX_URL_CHARS
    for length in (most - 1, most):
        check_url(RELAY.ljust(length, "a"))
    with pytest.raises(Refused):
        check_url(RELAY.ljust(most + 1, "a"))


@pytest.mark.parametrize(
    ("port", "good"), [(0, False), (1, True), (65_534, True), (65_535, True), (65_536, False)]
)
def test_port_is_one_that_exists(port: int, good: bool) -> None:
    try:
        check_url(f"https://relay.example.com:{port}/")
    except Refused:
        assert not good
    else:
        assert good


def test_link_over_http_opened_without_leave_is_a_link_error(toy: World) -> None:
    link = read_link(
        f"{Mailbox(TEST_PUB, 'http://relay.example.com/')}..{'A' * 64}", allow_http=True
    )
    with pytest.raises(LinkError):
        open_link(toy, link)
