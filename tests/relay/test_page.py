"""Test the page for people, and the picture of the traffic on it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import pytest
from harness import (
    OK,
    START_US,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    ask,
    check,
    document_of,
    get,
    send,
    serving,
)

from connectoid_relay import (
    MAX_SETTING,
    MINUTE_US,
    TRAFFIC_MINUTES,
    About,
    Relay,
    StoreError,
    Traffic,
    __version__,
    _bars,
    _size,
    _span,
    render_page,
)

# ---------------------------------------------------------------------------------------
# The page for people.
# ---------------------------------------------------------------------------------------


def page_of(relay: Relay, **fronts: bool) -> str:
    """Return the page, as a server gives it."""
    return render_page(relay, relay.document() | fronts)


def told_on(page: str) -> dict[str, str]:
    """Return what the page tells, by its name there."""
    return {name: words.strip() for name, words in re.findall(r"<dt>([^<]*)<dd>([^<]*)", page)}


def links_in(page: str) -> list[str]:
    """Return the start tags of all links."""
    return re.findall(r"<a\b[^>]*>", page)


MARKUP = """<script>alert(1)</script><img src=x onerror='y'>"&{name}{}%s"""


def test_page_shows_the_hosts_texts_as_text(make: Make) -> None:
    plain = page_of(make(about=About("relay")))
    page = page_of(make(about=About(name=MARKUP, contact=MARKUP, notice=MARKUP, price_url=MARKUP)))
    # The name is in the title too.
    assert page.count(html.escape(MARKUP)) == 5
    tags = re.compile(r"<(/?[a-zA-Z]+)")
    added = ["aside", "/aside", "dt", "dd", "dt", "dd"]
    assert sorted(tags.findall(page)) == sorted([*tags.findall(plain), *added])
    assert links_in(page) == []


@pytest.mark.parametrize(
    "about", [About(), About("n", "m@example.org", "notice", "https://example.org/")], ids=len
)
def test_page_loads_and_runs_nothing(make: Make, about: About) -> None:
    page = page_of(make(about=about), udp=True, stun=True).lower()
    for loading in (
        "<script",
        "src=",
        "<link",
        "@import",
        "url(",
        "<iframe",
        "<form",
        "<base",
        "<object",
        "<embed",
        "http-equiv",
        "javascript:",
        "srcset",
    ):
        assert loading not in page, loading
    assert not re.search(r"\son\w+\s*=", page)
    assert page.count("http") == (about.price_url is not None)


@pytest.mark.parametrize(
    ("contact", "shown"),
    [
        ("me@example.org", '<a href="mailto:me@example.org" rel="noreferrer">me@example.org</a>'),
        (
            "mailto:me@example.org",
            '<a href="mailto:me@example.org" rel="noreferrer">me@example.org</a>',
        ),
        (
            "https://example.org/?a=1&b=2",
            '<a href="https://example.org/?a=1&amp;b=2" rel="noreferrer">'
            "https://example.org/?a=1&amp;b=2</a>",
        ),
        (
            "http://example.org",
            '<a href="http://example.org" rel="noreferrer">http://example.org</a>',
        ),
        (
            'https://x/"onclick="y',
            '<a href="https://x/&quot;onclick=&quot;y" rel="noreferrer">'
            "https://x/&quot;onclick=&quot;y</a>",
        ),
        ("javascript:alert(1)", "javascript:alert(1)"),
        ("JavaScript:alert(1)//me@example.org", "JavaScript:alert(1)//me@example.org"),
        ("data:text/html,<b>", "data:text/html,&lt;b&gt;"),
        ("javascript:alert(1)\nhttps://example.org", "javascript:alert(1)\nhttps://example.org"),
        ("+49 30 901820", "+49 30 901820"),
        ("write to me@example.org", "write to me@example.org"),
        ("//example.org", "//example.org"),
        ("@me:example.org", "@me:example.org"),
    ],
)
def test_contact_is_a_link_if_it_can_be_one_without_harm(
    make: Make, contact: str, shown: str
) -> None:
    page = page_of(make(about=About(contact=contact)))
    assert f"<dt>Contact<dd>{shown}\n" in page
    assert len(links_in(page)) == shown.count("<a ")


@pytest.mark.parametrize(
    "about", [About(), About(contact="", notice="", price_url="")], ids=["none", "empty"]
)
def test_page_leaves_out_what_the_host_does_not_say(make: Make, about: About) -> None:
    page = page_of(make(about=about))
    assert [word for word in ("Contact", "Prices", "<aside", "None") if word in page] == []


def test_page_tells_prices_and_notice(make: Make) -> None:
    about = About("Relay of the club", notice="Moves on\nMonday.", price_url="https://x.example/p")
    page = page_of(make(about=about))
    assert (
        '<dt>Prices<dd><a href="https://x.example/p" rel="noreferrer">What this relay costs</a>\n'
        in page
    )
    assert '<aside aria-label="Notice">Moves on\nMonday.</aside>' in page
    assert "<title>Relay of the club</title>" in page
    assert "<h1>Relay of the club</h1>" in page


TOLD_IN_LIMITS = {
    "rate": 0,
    "max_connections": 0,
    "max_bytes": 3 << 19,
    "max_box_bytes": 1 << 20,
    "max_boxes": 1_000_000,
    "max_box_messages": 1_000,
    "message_ttl_s": 5_400,
    "box_ttl_s": 90_000,
}


def test_page_tells_how_the_relay_is(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(**TOLD_IN_LIMITS)
    assert ask(relay, send(alice), send(alice), send(alice)) == [OK] * 3
    clock.advance(59)
    page = page_of(relay, udp=True)
    assert '<strong class="well">All is well.</strong> Up for 59 seconds.' in page
    told = told_on(page)
    del told["Size of a message"]
    assert told == {
        "Messages": "3",
        "Storage": "1.5 KiB of 1.5 MiB",
        "Mailboxes with a proven owner": "0 of 1,000,000",
        "Requests from one address": "no limit",
        "Connections at a time": "no limit",
        "A message is kept": "1 hour 30 minutes, unless an API key says otherwise",
        "Messages in a mailbox": "1,000, at most 1 MiB",
        "An unused mailbox is kept": "1 day 1 hour",
        "Checks over UDP": "on",
        "STUN": "off",
        "TURN": "off",
        "Software": f"connectoid_relay {__version__}",
    }


def test_page_tells_what_is_wrong_with_the_relay(make: Make, clock: FakeClock) -> None:
    watched = WatchedStore()
    relay = make(watched.store, **TOLD_IN_LIMITS)
    clock.advance(61)
    stopped = '<strong class="unwell">Not well: The sweeper has stopped.</strong>'
    assert f"{stopped} Up for 1 minute 1 second." in page_of(relay)
    relay.sweep()
    watched.error = StoreError("the disk has gone")
    clock.advance(5)
    page = page_of(relay)
    assert '<strong class="unwell">Not well: The store cannot be read or written.</strong>' in page
    told = told_on(page)
    assert told["Messages"] == "unknown"
    assert told["Storage"] == "unknown of 1.5 MiB"
    assert told["Mailboxes with a proven owner"] == "unknown of 1,000,000"


@pytest.mark.sockets
@pytest.mark.parametrize("headers", [(), ("Accept: text/html,*/*;q=0.8",), ("Accept: text/plain",)])
def test_page_is_sent_with_its_guards(make: Make, headers: Sequence[str]) -> None:
    about = About("Relè ☕ der Küche")
    with serving(make(about=about), stun=True) as server:
        status, found, text = get(server.server_port, "/?lang=en", *headers)
        assert (status, found) == (200, {
            "access-control-allow-origin": "*", "content-type": "text/html; charset=utf-8",
            "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
            "x-content-type-options": "nosniff", "vary": "Accept", "connection": "close",
            "content-length": str(len(text.encode()))})
        assert f"<h1>{about.name}</h1>" in text
        assert told_on(text)["STUN"] == "on"


@pytest.mark.sockets
def test_page_is_sent_while_the_store_fails(make: Make, clock: FakeClock) -> None:
    watched = WatchedStore()
    with serving(make(watched.store)) as server:
        watched.error = StoreError("the disk has gone")
        clock.advance(5)
        status, _, text = get(server.server_port)
        assert (status, "Not well: The store cannot be read or written." in text) == (200, True)
        assert document_of(server.server_port)["name"] == "Connectoid relay"


# The picture of the traffic


@pytest.mark.parametrize("notes_a_minute", [1, 2, 60])
def test_traffic_is_the_growth_of_each_of_the_last_60_minutes(notes_a_minute: int) -> None:
    traffic, growth, count = Traffic(), [], 0
    for minute in range(3 * TRAFFIC_MINUTES):
        growth.append(minute % 7 * notes_a_minute)
        for note in range(notes_a_minute):
            count += minute % 7
            traffic.note(count, START_US + minute * MINUTE_US + note * MINUTE_US // notes_a_minute)
            shown = [*growth[:-1], minute % 7 * (note + 1)]
            assert traffic.per_minute() == shown[-TRAFFIC_MINUTES:]


def test_traffic_is_empty_at_first_and_loses_no_growth_to_a_gap() -> None:
    traffic = Traffic()
    assert traffic.per_minute() == []
    for minute, count in ((0, 5), (1, 7), (9, 30), (9, 31)):
        traffic.note(count, START_US + minute * MINUTE_US)
    assert (sum(traffic.per_minute()), traffic.per_minute()[:2]) == (31, [5, 2])


def test_traffic_of_a_relay_is_its_requests_by_minute(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    relay = make()
    for requests in (3, 0, 2):
        ask(relay, *[check(alice)] * requests, {"action": "none"})
        for _ in range(2):
            relay.sweep()
            clock.advance(30)
    assert relay.traffic() == [3, 0, 2]
    assert "Requests per minute: peak 3" in page_of(relay)


def bars_in(picture: str) -> dict[int, int]:
    """Return the heights of the bars by their place."""
    found = re.search(r'<path d="([^"]*)"/>', picture)
    assert found is not None
    bars = re.findall(r"M(\d+) 72v-(\d+)h8v\2z", found[1])
    assert "".join(f"M{x} 72v-{height}h8v{height}z" for x, height in bars) == found[1]
    return {int(x): int(height) for x, height in bars}


@pytest.mark.parametrize(
    ("traffic", "words", "bars"),
    [
        ([], "No requests in the last 60 minutes", {}),
        ([0], "No requests in the last 60 minutes", {590: 1}),
        ([0] * 60, "No requests in the last 60 minutes", {10 * x: 1 for x in range(60)}),
        ([1], "Requests per minute: peak 1", {590: 10}),
        ([0, 10], "Requests per minute: peak 10", {580: 1, 590: 72}),
        (
            [0] * 59 + [1_234_567],
            "Requests per minute: peak 1,234,567",
            {10 * x: 1 for x in range(59)} | {590: 72},
        ),
        (
            [1_000_000] + [1] * 59,
            "Requests per minute: peak 1,000,000",
            {0: 72} | {10 * x: 3 for x in range(1, 60)},
        ),
        (
            [10**12] * 7 + [10] * 60,
            "Requests per minute: peak 10",
            {10 * x: 72 for x in range(60)},
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bars_fit_their_picture(traffic: list[int], words: str, bars: dict[int, int]) -> None:
    picture = _bars(traffic)
    assert bars_in(picture) == bars
    assert f"<figcaption>{words}</figcaption>" in picture
    assert f'aria-label="{words}. One bar a minute."' in picture


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "1 minute"),
        (61, "1 minute 1 second"),
        (3_599, "59 minutes 59 seconds"),
        (3_600, "1 hour"),
        (3_601, "1 hour 1 second"),
        (7_262, "2 hours 1 minute"),
        (86_399, "23 hours 59 minutes"),
        (86_400, "1 day"),
        (90_061, "1 day 1 hour"),
        (30 * 86_400, "30 days"),
        (MAX_SETTING, "11,574,074 days 1 hour"),
    ],
)
def test_span_is_told_in_two_units(seconds: int, words: str) -> None:
    assert _span(seconds) == words


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        (0, "0 bytes"),
        (2, "2 bytes"),
        (1_023, "1023 bytes"),
        (1_024, "1 KiB"),
        (1_536, "1.5 KiB"),
        ((1 << 20) - 1, "1024 KiB"),
        (1 << 20, "1 MiB"),
        (1 << 30, "1 GiB"),
        (1 << 40, "1 TiB"),
        (3 << 50, "3072 TiB"),
        (MAX_SETTING, "931.3 GiB"),
    ],
)
def test_size_is_told_in_the_largest_unit(octets: int, words: str) -> None:
    assert _size(octets) == words
