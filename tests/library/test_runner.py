"""The runner: how often it asks, what a relay can do to it, and what an app can rely on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from apps import (
    APP_URL,
    BAD_BATCHES,
    NOWHERE,
    RUBBISH,
    SOON_S,
    SUITE,
    Apps,
    FakeRelay,
    Wire,
    Wires,
    honest,
    http_reply,
    make_record,
    nothing_new,
    secrets_of,
    store_of,
    until,
)
from fake_sdp import make_sdp
from harness import serving

import connectoid
import connectoid.cli
from connectoid import (
    Connectoid,
    Contact,
    ContactRecord,
    LinkError,
    NotConnectedError,
    OtherAppError,
    Store,
    StoreError,
    UsageError,
    limits,
)
from connectoid.clock import system_now
from connectoid.ice import Ice
from connectoid.line import WAIT_S
from connectoid.webrtc import Description
from connectoid_relay import Relay, SqliteStore

# ---------------------------------------------------------------------------------------
# The runner: how often it asks, and what a relay can do to it.
# ---------------------------------------------------------------------------------------


def always(reply: bytes) -> Callable[[Any], bytes]:
    """Return what a relay does that answers the same to everything."""
    return lambda _: reply


@pytest.mark.slow
def test_rubbish_relays_are_asked_again_but_seldom(apps: Apps) -> None:
    """In 5 s each relay gets two or three requests, and one for its document.

    None of them ends the loop of its own line, or of another one.
    """
    kinds = [always(reply) for reply in (*RUBBISH.values(), *BAD_BATCHES.values())]
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(FakeRelay(kind)) for kind in kinds]
        good = stack.enter_context(FakeRelay(nothing_new))
        records = [
            make_record(f"Bob {number}", relay.url) for number, relay in enumerate([*relays, good])
        ]
        app = apps.begin("Alice", store=store_of(apps.folder / "s.db", *records))
        threading.Event().wait(5.0)
        counts = [len(relay.checks) for relay in relays]
        app.close()
    assert counts.pop([*RUBBISH].index("retry without end")) == 1
    assert {*counts} <= {2, 3}, counts
    assert max(len(relay.posts) for relay in relays) <= 3
    assert good.checks


@pytest.mark.slow
def test_rubbish_relay_that_recovers_serves_its_contacts(apps: Apps, relay: Relay) -> None:
    """What could not be sent or read meanwhile is sent and read then."""
    broken = threading.Event()
    broken.set()
    with FakeRelay(
        lambda request: RUBBISH["HTML"] if broken.is_set() else honest(relay)(request)
    ) as fake:
        alice, bob = apps.begin("Alice", fake.url), apps.begin("Bob", fake.url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        until(lambda: len(fake.posts) > 2, "asked")
        broken.clear()
        assert alice.connect("Bob", SOON_S)
        bob.close()
        alice.close()


class NotedWire(Wire):
    """Connect in memory, and note the attempts for which WebRTC is asked."""

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        self.attempts: list[int] = []

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Note it first."""
        self.attempts.append(attempt_id)
        super().gather(contact, attempt_id, offer, ice)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HTML", "nothing"])
def test_offer_waits_until_a_relay_of_one_s_own_answers(
    apps: Apps, relay: Relay, kind: str,
) -> None:
    """The network may be away, or want its users to log in. Checks do not wait meanwhile."""
    away = threading.Event()
    away.set()

    def reply(request: Any) -> bytes:
        if not away.is_set():
            return honest(relay)(request)
        return {"HTML": RUBBISH["HTML"], "nothing": b""}[kind]

    with FakeRelay(reply) as fake:
        webrtc = NotedWire(apps.wires)
        alice, bob = apps.begin("Alice", fake.url), apps.begin("Bob", fake.url, webrtc=webrtc)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        # Two of each: more than a second after the first.
        until(lambda: len(fake.checks) > 3, "asked again")
        assert webrtc.attempts == []
        assert sum(check["wait"] > 0 for asked in fake.checks for check in asked.request) <= 2
        away.clear()
        assert alice.connect("Bob", SOON_S)
        assert webrtc.attempts
        bob.close()
        alice.close()


@pytest.mark.slow
def test_no_check_waits_at_a_relay_whose_document_was_missed(apps: Apps) -> None:
    """It may be back since, and no offer goes without its servers."""
    checked = threading.Event()

    def reply(request: Any) -> bytes:
        if request is not None:
            checked.set()
            return nothing_new(request)
        return http_reply({"ok": True}) if checked.is_set() else b""

    with FakeRelay(reply) as fake:
        app = apps.begin("Alice", fake.url)
        app.share("Bob", APP_URL)
        until(lambda: len(fake.checks) > 1, "asked again")
        app.close()
    first, second, *_ = fake.checks
    assert [check["wait"] for check in first.request] == [0]
    assert [check["wait"] > 0 for check in second.request] == [True]
    between = fake.asked[fake.asked.index(first) + 1:fake.asked.index(second)]
    assert [asked.request for asked in between] == [None]


@pytest.mark.slow
def test_relay_that_asks_for_time_gets_it(apps: Apps) -> None:
    """A `retry` of 4 s is obeyed by checks and by messages."""
    busy = http_reply({"ok": False, "error": "Busy", "retry": 4}, status="503 Busy")
    with FakeRelay(lambda request: http_reply({"ok": True}) if request is None else busy) as fake:
        bob = apps.begin("Bob", fake.url)
        bob.open(make_record("Bob", fake.url).invitation, "Alice")
        sends = functools.partial(
            lambda: [asked for asked in fake.posts if isinstance(asked.request, dict)]
        )
        until(lambda: len(fake.checks) > 1 and len(sends()) > 1, "asked again")
        for asked in (fake.checks, sends()):
            assert asked[1].at_s - asked[0].at_s >= 3.9
        bob.close()


@pytest.mark.slow
def test_fifty_idle_contacts_make_one_request_a_minute_and_relay(apps: Apps) -> None:
    """Two relays have half of the mailboxes each, and are asked to wait.

    They answer at once instead, and are not asked more often for that.
    """
    with FakeRelay(nothing_new) as first, FakeRelay(nothing_new) as second:
        records = [
            make_record(f"Bob {number}", (first, second)[number % 2].url) for number in range(50)
        ]
        app = apps.begin("Alice", store=store_of(apps.folder / "s.db", *records))
        threading.Event().wait(5.0)
        app.close()
        for relay in (first, second):
            assert [len(asked.request) for asked in relay.posts] == [25]
            assert {check["wait"] for check in relay.posts[0].request} == {WAIT_S}


@pytest.mark.slow
def test_one_dead_relay_of_two_holds_up_nothing(apps: Apps, relay_url: str) -> None:
    """Two apps pair and stop before a request to the dead relay has ended."""
    with FakeRelay(lambda _: None) as silent:
        alice, bob = (
            apps.begin("Alice", silent.url, relay_url),
            apps.begin("Bob", silent.url, relay_url),
        )
        began_s = time.monotonic()
        bob.open(alice.share("Bob", APP_URL), "Alice")
        alice.connect("Bob", SOON_S)
        assert time.monotonic() - began_s < connectoid.relay_client.REQUEST_TIMEOUT_S
        began_s = time.monotonic()
        alice.close()
        bob.close()
        assert (
            time.monotonic() - began_s
            < connectoid.relay_client.REQUEST_TIMEOUT_S + WAIT_S
        )


def test_runner_leaves_no_thread_and_can_be_closed_twice(apps: Apps, relay_url: str) -> None:
    """A wait in another thread ends with an error."""
    before = set(threading.enumerate())
    alice, bob = apps.pair(relay_url)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(NotConnectedError):
            alice.connect("Carol")
        ended.append("told")

    alice.share("Carol", APP_URL)
    waiter = threading.Thread(target=wait)
    waiter.start()
    for app in (alice, bob, alice, bob):
        app.close()
    waiter.join(SOON_S)
    assert ended == ["told"]
    until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - before
                if "connectoid" in thread.name
            ]
        ),
        "threads ended",
        5,
    )


def test_channel_brings_messages_in_order_and_ends_for_both(apps: Apps, relay_url: str) -> None:
    """Text stays text, bytes stay bytes; what was sent before the end is still received."""
    alice, bob = apps.pair(relay_url)
    there = bob.connect("Alice", SOON_S)
    here = alice.connect("Bob", SOON_S)
    sent: list[bytes | str] = ["Grüße", b"\0\xff", "", *map(str, range(500))]
    for message in sent:
        there.send(message)
    there.close()
    there.close()
    assert [here.receive(SOON_S) for _ in sent] == sent
    for channel in (here, there):
        for _ in range(2):
            with pytest.raises(NotConnectedError):
                channel.receive(SOON_S)
        with pytest.raises(NotConnectedError):
            channel.send("too late")
    again = alice.connect("Bob", SOON_S)
    assert again is not here
    with pytest.raises(TimeoutError):
        again.receive(0.01)


def test_names_are_given_once(apps: Apps, relay_url: str) -> None:
    """Two contacts of one name, none at all, one's own link, and a link twice."""
    alice, bob = apps.begin("Alice", relay_url), apps.begin("Bob")
    link = alice.share("Bob", APP_URL)
    for name, says in (
            ("Bob", "already"), ("", "needs a name"), ("\u200d", "needs a name"),
            ("a\u202eb", "can be shown"), ("\ud800", "can be shown")):
        with pytest.raises(UsageError, match=says):
            alice.share(name, APP_URL)
    with pytest.raises(LinkError, match="your own link"):
        alice.open(link, "Carol")
    for name in ("Alice", "Alicia"):
        bob.open(link, name)
    assert [record.name for record in bob.contacts()] == ["Alice"]
    for act in (bob.connect, bob.unshare, bob.verify):
        with pytest.raises(UsageError, match="no contact 'Zoe'"):
            act("Zoe")
    with pytest.raises(UsageError, match="No relay is given"):
        bob.share("Carol", APP_URL)


def test_unshare_tells_whether_a_relay_has_the_word(apps: Apps, relay_url: str) -> None:
    """It does with a relay that runs, and if nobody has opened the link; not with a dead one."""
    alice, bob = apps.pair(relay_url)
    assert alice.unshare_and_tell("Bob", SOON_S)
    with pytest.raises(NotConnectedError, match="has ended the sharing"):
        bob.connect("Alice", SOON_S)
    alice.share("Carol", APP_URL)
    assert alice.unshare_and_tell("Carol", 0)

    alice.relays = ((NOWHERE, None),)
    bob.open(alice.share("Bob", APP_URL), "Alice again")
    until(lambda: any(record.hello for record in bob.contacts()), "the hello is made")
    assert not bob.unshare_and_tell("Alice again", 0.1)


def test_contact_is_reached_through_other_relays_after_a_move(apps: Apps, relay_url: str) -> None:
    """Alice leaves a relay. Bob learns of it through the old one.

    He writes to the new one, and they connect.
    """
    alice, bob = apps.pair(relay_url)
    bob.allow_private_relays = True
    relay = Relay(SqliteStore(":memory:"))
    with serving(relay) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        with pytest.raises(UsageError, match="no contact"):
            alice.move("Carol", [(url, None)])
        alice.move("Bob", [(url, None)])
        alice.connect("Bob", SOON_S).close()
        (record,) = bob.contacts()
        assert [
            mailbox.url
            for mailbox in connectoid.parse_address(record.contact_address, allow_http=True)
        ] == [url]
        bob.connect("Alice", SOON_S)
        until(lambda: alice.contacts()[0].pending is None, "Bob wrote to the new address")
        alice.relays = ((url, None),)
        alice.move("Bob")
        assert alice.contacts()[0].relays == ((url, None),)
        alice.close()
    relay.close()


def test_unshare_reaches_the_other_when_he_comes(apps: Apps, relay_url: str) -> None:
    """Bob's app was not running then. Afterwards the name is free."""
    alice, bob = apps.pair(relay_url)
    bob.close()
    alice.unshare("Bob")
    assert alice.contacts() == []
    bob = apps.begin("Bob", relay_url)
    with pytest.raises(NotConnectedError, match="has ended the sharing"):
        bob.connect("Alice", SOON_S)
    assert [(record.state, record.why) for record in bob.contacts()] == [("ended", "unshared")]
    bob.forget("Alice")
    assert bob.contacts() == []
    assert bob.share("Alice", APP_URL)
    with pytest.raises(UsageError, match="still a contact"):
        bob.forget("Alice")


def test_contact_that_has_ended_keeps_its_name_until_another_one_takes_it(
    apps: Apps, relay_url: str
) -> None:
    """Neither a link that is refused nor a share without a relay costs what is known of it."""
    alice, bob = apps.pair(relay_url)
    carol = apps.begin("Carol", relay_url, app="org.example.chat")
    theirs = carol.share("Alice", APP_URL)
    bob.unshare("Alice")
    until(lambda: ("Alice", "Bob", "unshared") in apps.told, "told")
    with pytest.raises(OtherAppError):
        alice.open(theirs, "Bob")
    with pytest.raises(LinkError):
        alice.open(theirs[:-4], "Bob")
    alice.relays = ()
    with pytest.raises(UsageError, match="No relay is given"):
        alice.share("Bob", APP_URL)
    assert [record.why for record in alice.contacts()] == ["unshared"]
    alice.relays = ((relay_url, None),)
    alice.share("Bob", APP_URL)
    assert [record.state for record in alice.contacts()] == ["invited"]


def test_wait_that_was_in_vain_tells_no_trouble_of_another_contact(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is at Carol's relay. That says nothing of Bob, who is at another one."""
    alice = apps.begin("Alice", NOWHERE)
    alice.share("Carol", APP_URL)
    alice.relays = ((relay_url, None),)
    alice.share("Bob", APP_URL)
    until(lambda: NOWHERE in caplog.text, "complained")
    with pytest.raises(TimeoutError, match=f"^{NOWHERE} cannot be reached.* Carol has not opened"):
        alice.connect("Carol", 0)
    with pytest.raises(TimeoutError, match=r"^Bob has not opened the link yet\.$"):
        alice.connect("Bob", 0)


def test_pairing_that_expires_is_told_by_the_name_that_it_had(apps: Apps, tmp_path: Path) -> None:
    """Its tombstone has none any more."""
    now = system_now()
    alice, _ = Contact.invite(SUITE, now, "Bob", [(NOWHERE, None)])
    bob, effects = Contact.open(
        SUITE, now, "Alice", connectoid.parse_invitation(alice.record.invitation)
    )
    (attempt_id,) = (
        effect.attempt_id for effect in effects if isinstance(effect, connectoid.Gather)
    )
    hello = [
        effect.data
        for effect in bob.gathered(now, attempt_id, make_sdp("offer"))
        if isinstance(effect, connectoid.Send)
    ]
    alice.polled(now, {alice.mailboxes[0].pub: list(enumerate(hello, 1))})
    assert alice.record.state == "welcomed"
    store_of(
        tmp_path / "Alice.db", dataclasses.replace(alice.record, expires_us=limits.RELEASE_US + 1)
    ).close()
    apps.begin("Alice", NOWHERE)
    until(lambda: ("Alice", "Bob", "expired") in apps.told, "told")


def test_second_opener_of_a_link_is_told_and_the_first_is_warned(
    apps: Apps, relay_url: str
) -> None:
    """The first one stays."""
    alice, bob = apps.begin("Alice", relay_url), apps.begin("Bob", relay_url)
    link = alice.share("Bob", APP_URL)
    bob.open(link, "Alice")
    channel = alice.connect("Bob", SOON_S)
    eve = apps.begin("Eve", relay_url)
    eve.open(link, "Alice")
    with pytest.raises(NotConnectedError, match="used by somebody else"):
        eve.connect("Alice", SOON_S)
    until(lambda: ("Alice", "Bob", "opened_twice") in apps.told, "warned")
    assert not channel.closed.is_set()
    assert ("Bob", "Alice", "used") not in apps.told


def test_marks_of_verification_stay(apps: Apps, relay_url: str) -> None:
    """Both have the same seven emoji, and the store keeps the user's verdict."""
    alice, bob = apps.pair(relay_url)
    assert alice.contacts()[0].comparison == bob.contacts()[0].comparison
    assert len(alice.contacts()[0].comparison) == 7
    alice.verify("Bob")
    alice.close()
    assert apps.begin("Alice").contacts()[0].verified


def test_app_whose_event_handler_fails_goes_on(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The next events still come."""
    heard: list[str] = []

    def on_event(name: str, event: str) -> None:
        heard.append(event)
        raise ValueError(event)

    store = Store(apps.folder / "Carol.db")
    with Connectoid(store, [(relay_url, None)], apps.wires.adapter(), on_event=on_event) as carol:
        apps.begin("Bob", relay_url).open(carol.share("Bob", APP_URL), "Carol")
        carol.connect("Bob", SOON_S)
        until(lambda: {"connected", "paired"} <= {*heard}, "told")
    assert "on_event failed" in caplog.text


def machines_of(app: Connectoid) -> Sequence[Contact]:
    """Return the machines of an app, which have more than it tells."""
    return list(app.runner._roster.contacts.values())


def test_contacts_say_nothing_secret_of_themselves(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither do reprs, nor the log of a whole pairing."""
    caplog.set_level(logging.DEBUG)
    alice, bob = apps.pair(relay_url)
    records = [*alice.contacts(), *bob.contacts()]
    said = caplog.text + repr(
        [
            records,
            [connectoid.Save(record) for record in records],
            alice,
            vars(alice.runner),
            alice.runner._roster.polls(relay_url),
            [vars(contact.machine) for app in (alice, bob) for contact in machines_of(app)],
        ]
    )
    assert not [secret for record in records for secret in secrets_of(record) if secret in said]


class FullStore(Store):
    """A store whose disk can be full."""

    full = False

    def save(self, number: int, record: ContactRecord) -> None:
        """Save, if there is room."""
        if self.full:
            raise StoreError("The store cannot be written: the disk is full.")
        super().save(number, record)


@pytest.mark.slow
def test_runner_with_a_full_disk_sends_nothing_and_goes_on_later(
    apps: Apps, relay_url: str
) -> None:
    """What could not be saved is not sent; once there is room, the contacts pair."""
    store = FullStore(apps.folder / "full.db")
    alice, bob = apps.begin("Alice", relay_url, store=store), apps.begin("Bob", relay_url)
    link = alice.share("Bob", APP_URL)
    store.full = True
    bob.open(link, "Alice")
    # Longer than from one check to the next.
    threading.Event().wait(3.0)
    assert bob.contacts()[0].state == "opened"
    store.full = False
    alice.connect("Bob", SOON_S)
    until(lambda: bob.contacts()[0].state == "paired", "paired")
