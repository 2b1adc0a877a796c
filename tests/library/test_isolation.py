"""What one contact, relay or app does costs the others nothing, and no more than a bounded time."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from apps import (
    APP_URL,
    FOUND,
    NOWHERE,
    SOON_S,
    SUITE,
    Apps,
    FakeRelay,
    Wire,
    honest,
    http_reply,
    make_record,
    nothing_new,
    store_of,
    until,
)
from fake_sdp import make_sdp
from test_hostile_counterparts import forge

from connectoid import (
    CONTEXTS,
    Channel,
    Connectoid,
    Contact,
    ContactRecord,
    Ice,
    Mailbox,
    NotConnectedError,
    Poll,
    Send,
    Store,
    SystemSuite,
    UsageError,
    seal_message,
)
from connectoid.channel import MAX_QUEUED_MESSAGES
from connectoid.clock import system_now
from connectoid.complaints import Complaints
from connectoid.contact.contact import MAX_STEP_MESSAGES
from connectoid.encoding import encode_base64url
from connectoid.limits import BURST_PER_S, MAX_CHANNEL_BYTES, MAX_RELAY_MESSAGES
from connectoid.line import Host, Line, ReadBox
from connectoid.relay_client import (
    MAX_RECEIVES,
    RECEIVE_LIMIT,
    Budget,
    RelayClient,
    TransportError,
)
from connectoid.roster import Roster
from connectoid.sender import (
    MAX_LETTERS,
    MAX_NEW_RELAYS,
    MAX_QUEUES,
    MAX_QUEUES_OF_CONTACT,
    Sender,
)
from connectoid.webrtc import Description
from connectoid_relay import Relay

# ---------------------------------------------------------------------------------------
# Faults of our own, in the steps and effects of one contact.
# ---------------------------------------------------------------------------------------


class BrokenFor(SystemSuite):
    """A suite that fails for one mailbox in an unexpected way."""

    def __init__(self) -> None:
        super().__init__()
        self.broken_key = ""

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Open what is sealed, or fail."""
        if key == self.broken_key and info == CONTEXTS["message"]:
            raise ZeroDivisionError("a fault")
        return super().open(key, info, sealed)


class BrokenWire:
    """WebRTC that fails for one contact in an unexpected way, and works for all others."""

    def __init__(self, wire: Wire) -> None:
        self.start = wire.start
        self.join = wire.join
        self.write = wire.write
        self.close = wire.close
        self.doubt = wire.doubt
        self.stop = wire.stop
        self.failed = 0
        self._wire = wire
        self._broken: int | None = None

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Fail for the first contact that comes."""
        if self._broken is None:
            self._broken = contact
        if contact == self._broken:
            self.failed += 1
            raise ZeroDivisionError("a fault")
        self._wire.gather(contact, attempt_id, offer, ice)


def test_fault_in_a_contact_s_step_is_logged_once_and_stops_no_other(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture,
) -> None:
    """Carol's hello cannot be read; Bob, at the same relay, pairs."""
    suite = BrokenFor()
    alice = apps.begin("Alice", relay_url, suite=suite)
    carol = apps.begin("Carol", relay_url)
    bob = apps.begin("Bob", relay_url)
    link = alice.share("Carol", APP_URL)
    (record,) = alice.contacts()
    assert record.invited is not None
    suite.broken_key = record.invited.keys[0]
    carol.open(link, "Alice")
    until(lambda: "ZeroDivisionError" in caplog.text, "failed")
    bob.open(alice.share("Bob", APP_URL), "Alice")
    assert alice.connect("Bob", SOON_S)
    suite.broken_key = ""
    assert alice.connect("Carol", SOON_S)
    assert caplog.text.count("A step of contact 1 failed") == 1


def test_fault_in_an_effect_is_logged_once_and_stops_no_other(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture,
) -> None:
    """WebRTC fails for Carol; Bob connects."""
    wire = BrokenWire(apps.wires.adapter())
    alice = apps.begin("Alice", relay_url, webrtc=wire)
    alice.open(apps.begin("Carol", relay_url).share("Alice", APP_URL), "Carol")
    bob = apps.begin("Bob", relay_url)
    alice.open(bob.share("Alice", APP_URL), "Bob")
    assert bob.connect("Alice", SOON_S)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            alice.connect("Carol", 0)
    assert wire.failed >= 1
    assert caplog.text.count("Gather for contact 1 failed") == 1


# ---------------------------------------------------------------------------------------
# What comes in: a budget for each contact and round, and slices of CPU.
# ---------------------------------------------------------------------------------------


@pytest.fixture
def roster() -> Iterator[Roster]:
    """Return an empty roster on a store in memory."""
    store = Store(":memory:")
    yield Roster(store, SUITE, system_now, allow_http=False)
    store.close()


def question_for(mailbox: str) -> str:
    """Return a question that the owner of a mailbox can open."""
    return encode_base64url(SUITE.seal(mailbox, CONTEXTS["question"], b"A" * 43))


def test_line_leaves_what_is_over_a_contact_s_budget_for_the_next_round(roster: Roster) -> None:
    """Both mailboxes of a contact are flooded: each round reads one of them, in turn."""
    numbers = itertools.count(1)
    read: list[list[str]] = []

    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({"ok": True})
        if isinstance(request, list):
            return http_reply([
                {**FOUND, "question": question_for(check["pub"])} for check in request
            ])
        messages = [{"at": next(numbers), "data": "QUJD"} for _ in range(RECEIVE_LIMIT)]
        return http_reply({"ok": True, "messages": messages})

    async def take(number: int, boxes: Sequence[ReadBox]) -> None:
        assert [len(box.messages) for box in boxes] == [MAX_RECEIVES * RECEIVE_LIMIT]
        read.append([box.poll.mailbox.pub for box in boxes])

    async def run(url: str) -> None:
        contact, _ = Contact.invite(SUITE, system_now(), "Bob", [(url, None), (url, None)])
        roster.add(contact)
        client = RelayClient(url)
        line = Line(client, roster, Complaints(), asyncio.Semaphore(9), Host(take, bool, print))
        running = asyncio.create_task(line.run())
        async with asyncio.timeout(SOON_S):
            while len(read) < 2:
                await asyncio.sleep(0.01)
                line.wake()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()

    with FakeRelay(reply) as fake:
        asyncio.run(run(fake.url))
    first, second = read
    assert first != second


def round_of(brought: Sequence[int]) -> list[int]:
    """Return the contacts that a line reads in a round, whose mailboxes bring so many messages.

    No time goes by, so that none is taken off.
    """
    now = system_now()
    store = Store(":memory:")
    roster = Roster(store, SUITE, lambda: now, allow_http=False)
    left: dict[str, int] = {}
    read: list[int] = []

    def reply(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([
                {**FOUND, "question": question_for(check["pub"])} for check in request
            ])
        count = min(RECEIVE_LIMIT, left[request["pub"]])
        left[request["pub"]] -= count
        ats = range(request["at"] + 1, request["at"] + 1 + count)
        return http_reply({"ok": True, "messages": [{"at": at, "data": "QUJD"} for at in ats]})

    async def take(number: int, boxes: Sequence[ReadBox]) -> None:
        read.append(number)

    async def run(url: str) -> None:
        for count in brought:
            contact, _ = Contact.invite(SUITE, now, f"Bob {count}", [(url, None)])
            left[contact.mailboxes[0].pub] = count
            roster.add(contact)
        client = RelayClient(url)
        host = Host(take, lambda _: False, print)
        line = Line(client, roster, Complaints(), asyncio.Semaphore(9), host)
        await line._poll()
        await client.close()

    with FakeRelay(reply) as fake:
        asyncio.run(run(fake.url))
    store.close()
    return read


@pytest.mark.parametrize(("more", "is_read"), [(-1, True), (0, False), (1, False)])
def test_line_reads_no_further_once_a_relay_has_brought_too_much_for_all(
    more: int, is_read: bool, caplog: pytest.LogCaptureFixture,
) -> None:
    """A question counts as a message."""
    most = MAX_RECEIVES * RECEIVE_LIMIT
    rest = MAX_RELAY_MESSAGES - (most + 1) - 1
    assert round_of([most, rest + more, 7]) == [1, 2, 3][:2 + is_read]
    assert ("more messages than can be read at once" in caplog.text) != is_read


def test_contacts_that_have_brought_least_are_checked_first(roster: Roster) -> None:
    """Those who write without end hold up nobody else."""
    url = "https://relay.example.com/"
    for name in ("Bob", "Carol", "Dave"):
        contact, _ = Contact.invite(SUITE, system_now(), name, [(url, None)])
        roster.add(contact)
    for number, count in ((1, 60), (2, 5)):
        contact = roster.contacts[number]
        found = [(at, f"QUJ{at}") for at in range(1, count + 1)]
        contact.polled(system_now(), {contact.mailboxes[0].pub: found})
    assert roster.brought_lately(1, url) > roster.brought_lately(2, url) > 0
    assert roster.brought_lately(3, url) == 0
    assert roster.brought_lately(1, "https://other.example.net/") == 0
    client = RelayClient(url)

    async def nothing(number: int, boxes: Sequence[ReadBox]) -> None:
        pass

    async def in_turn() -> list[int]:
        host = Host(nothing, lambda _: False, print)
        line = Line(client, roster, Complaints(), asyncio.Semaphore(9), host)
        return [poll.number for poll in line.polls_in_turn()]

    assert asyncio.run(in_turn()) == [3, 2, 1]


def test_check_waits_no_longer_than_a_flooded_mailbox_of_the_same_relay_rests(
    tmp_path: Path,
) -> None:
    """Otherwise a mailbox that had to rest for half a minute would rest for one and a half."""
    rounds = itertools.count()
    brought = 100

    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({})
        if isinstance(request, list):
            if next(rounds):
                return nothing_new(request)
            question = encode_base64url(
                SUITE.seal(request[0]["pub"], CONTEXTS["question"], b"A" * 43))
            found = {"ok": True, "found": True, "question": question}
            return http_reply([found] + [{"ok": True, "found": False}] * (len(request) - 1))
        if request["at"]:
            return nothing_new(request)
        messages = [{"at": at, "data": "QUJD"} for at in range(1, brought + 1)]
        return http_reply({"ok": True, "messages": messages})

    with FakeRelay(reply) as fake:
        store = Store(tmp_path / "alice.db")
        for name in ("Bob", "Carol"):
            store.add(make_record(name, fake.url))
        with Connectoid(store, [(fake.url, None)], None, allow_http=True):
            until(lambda: len(fake.checks) > 1, "checked again")
        first, second = (checks.request for checks in fake.checks[:2])
    assert len(first) == 2
    (other,) = second
    assert 0 < other["wait"] <= brought / BURST_PER_S


def test_budget_counts_messages_and_bytes() -> None:
    """Either of them spends it."""
    budget = Budget()
    budget.spend(Budget.MAX_MESSAGES - 1, 1)
    assert not budget.is_spent
    budget.spend(1, 1)
    assert budget.is_spent
    budget = Budget()
    budget.spend(0, Budget.MAX_BYTES - 1)
    assert not budget.is_spent
    budget.spend(0, 1)
    assert budget.is_spent


class Meter(SystemSuite):
    """Count operations with keys from one turn of a loop to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._since = 0

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Open what is sealed, and count it."""
        self._since += 1
        return super().open(key, info, sealed)

    def verify(self, pub: str, signature: bytes, octets: bytes) -> None:
        """Verify a signature, and count it."""
        self._since += 1
        super().verify(pub, signature, octets)

    async def watch(self) -> None:
        """Note at each turn what the one before has cost."""
        while True:
            self.most = max(self.most, self._since)
            self._since = 0
            await asyncio.sleep(0)


@pytest.mark.parametrize("kind", ["moved", "offer", "answer"])
def test_flood_of_signed_messages_lets_others_have_their_turn(
    apps: Apps, relay_url: str, kind: str,
) -> None:
    """A few messages are opened, or checked, from one turn of the loop to the next.

    What Alice's side does not take from Bob is dropped, and counted.
    """
    meter = Meter()
    alice, bob = apps.pair(relay_url, suite=meter)
    (stolen,) = bob.contacts()
    bob.close()
    own = next(own for own in alice.contacts()[0].addresses
               if own.address == stolen.contact_address)
    members = {"sdpOffer": make_sdp("offer"), "sdpAnswer": make_sdp("answer")}
    count = 20 * MAX_STEP_MESSAGES
    texts = [forge(stolen, kind, seq=stolen.seq + number, re="A" * 43, **members)
             for number in range(1, count + 1)]
    messages = [(at, seal_message(SUITE, own.mailboxes[0].pub, text))
                for at, text in enumerate(texts, 1)]
    box = ReadBox(Poll(own.mailboxes[0], own.keys[0], 0), messages)

    async def take() -> None:
        watching = asyncio.create_task(meter.watch())
        await alice.runner._take(1, [box])
        watching.cancel()

    meter.most = 0
    alice.loop_thread.wait(take(), SOON_S)
    if kind == "answer":
        assert alice.refusals("Bob")["unexpected"] == count
    else:
        assert alice.contacts()[0].seen_seq == stolen.seq + count
    # Lines may have opened a question, or taken a message, at the same turn.
    assert meter.most < 3 * MAX_STEP_MESSAGES


class CountingSuite(SystemSuite):
    """Count the messages that are opened."""

    opened = 0

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Open what is sealed, and count it."""
        self.opened += int(info == CONTEXTS["message"])
        return super().open(key, info, sealed)


def test_same_bytes_are_opened_once_however_often_a_relay_brings_them() -> None:
    """In one round, and again in the next one."""
    suite = CountingSuite()
    contact, _ = Contact.invite(suite, system_now(), "Bob", [(NOWHERE, None)])
    (poll,) = contact.polls(system_now())
    for _ in range(2):
        box = ReadBox(poll, [(at, "QUJD") for at in range(Budget.MAX_MESSAGES)])
        contact.polled(system_now(), {poll.mailbox.pub: box.messages})
    assert suite.opened == 1


def made_up(counter: Iterator[int]) -> str:
    """Return what nobody has sealed, each time something else."""
    return encode_base64url(b"%d" % next(counter) + os.urandom(300))


def always_the_same(counter: Iterator[int]) -> str:
    """Return what nobody has sealed, each time the same."""
    return "QUJD"


def junk_relay(
    counter: Iterator[int], data: Callable[[Iterator[int]], str],
) -> Callable[[Any], bytes]:
    """Return the replies of a relay that always has more messages."""

    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({"ok": True})
        if isinstance(request, list):
            return http_reply([
                {**FOUND, "question": question_for(check["pub"])} for check in request
            ])
        messages = [
            {"at": next(counter), "data": data(counter)} for _ in range(RECEIVE_LIMIT)]
        return http_reply({"ok": True, "messages": messages})

    return reply


@pytest.mark.parametrize("data", [made_up, always_the_same])
def test_relay_that_brings_too_much_is_asked_seldom_and_delays_no_other(
    data: Callable[[Iterator[int]], str],
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture,
) -> None:
    """Carol's relay makes messages up; Bob, at another one, pairs and connects meanwhile."""
    with FakeRelay(junk_relay(itertools.count(1), data)) as fake:
        record = make_record("Carol", fake.url)
        suite = CountingSuite()
        alice = apps.begin(
            "Alice", relay_url, store=store_of(apps.folder / "s.db", record), suite=suite)
        bob = apps.begin("Bob", relay_url)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        assert alice.connect("Bob", SOON_S)
        until(lambda: "It is asked seldom" in caplog.text, "told")
        assert f"{fake.url} brings more messages for Carol than an app sends" in caplog.text
        assert len(fake.checks) == 1
        assert suite.opened <= Budget.MAX_MESSAGES + 20


def paired_records(url: str, *names: str) -> list[ContactRecord]:
    """Return the records of contacts that have been told an address, and poll no link any more."""
    records = []
    for record in [make_record(name, url) for name in names]:
        assert record.invited is not None
        records.append(replace(
            record, state="paired", current=record.invited, invited=None, invitation="",
            contact=record.signer, contact_address=record.invited.address,
            rotated_us=system_now().wall_us))
    return records


def test_relay_is_told_as_faulty_if_it_floods_what_only_single_contacts_know(
    apps: Apps, caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody else than that relay knows the mailboxes of both."""
    with FakeRelay(junk_relay(itertools.count(1), always_the_same)) as fake:
        records = paired_records(fake.url, "Bob", "Carol")
        apps.begin("Alice", fake.url, store=store_of(apps.folder / "s.db", *records))
        until(lambda: "asked seldom" in caplog.text, "told")
        assert (
            f"{fake.url} brings more messages for several contacts than their apps send:"
            " it is faulty, or they are.") in caplog.text
        assert "for Bob" not in caplog.text


def test_stranger_who_floods_a_link_slows_that_invitation_only(
    apps: Apps, relay: Relay, caplog: pytest.LogCaptureFixture,
) -> None:
    """Bob's mailbox is at the same relay, and is asked as often as before."""
    with FakeRelay(honest(relay)) as fake:
        alice, bob = apps.pair(fake.url)
        alice.share("Carol", APP_URL)
        invited = alice.contacts()[1].invited
        assert invited is not None
        request = {"pub": invited.mailboxes[0].pub, "action": "send"}
        for number in range(3 * 32):
            data = encode_base64url(b"junk %d" % number)
            _, reply = relay.handle({**request, "data": data}, f"192.0.2.{number % 3}")
            assert reply == {"ok": True}
        until(lambda: "for Carol than an app sends" in caplog.text, "told")
        _, carol = alice.runner._roster.contacts.values()
        assert carol.polls(system_now()) == []
        alice.connect("Bob", SOON_S).close()
        assert bob.connect("Alice", SOON_S)
        assert "faulty, or they are" not in caplog.text


# ---------------------------------------------------------------------------------------
# What goes out: queues, bounded in number and length.
# ---------------------------------------------------------------------------------------


class SilentTransport:
    """Keep all waiting but the relays that answer."""

    def __init__(self, *answering: str) -> None:
        self._answering = answering
        self.under_way: list[str] = []
        self.answered: list[str] = []

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = 0,
    ) -> tuple[int, bytes]:
        """Note a request, and answer it or not."""
        if url in self._answering:
            self.answered.append(url)
            return 200, b'{"ok": true}'
        self.under_way.append(url)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.under_way.remove(url)
        raise TransportError("never")

    async def renew(self) -> None:
        """Do nothing: there is nothing to close."""

    async def close(self) -> None:
        """Do nothing."""


def test_contact_that_names_ever_new_dead_relays_holds_few_connections(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Some are asked, all others are not, and another contact's message passes."""
    transport = SilentTransport("https://alive.example/")
    urls = [f"https://dead{number}.example/" for number in range(3 * MAX_QUEUES_OF_CONTACT)]

    def client_of(url: str) -> RelayClient:
        return RelayClient(url, transport)

    async def run() -> None:
        sender = Sender(client_of, Complaints())
        for url in urls:
            sender.send(1, Send(Mailbox("A", url, None), "QUJD"))
            await asyncio.sleep(0)
        for _ in range(3 * MAX_LETTERS):
            sender.send(1, Send(Mailbox("A", urls[0], None), "QUJD"))
        sender.send(2, Send(Mailbox("A", "https://alive.example/", None), "QUJD"))
        async with asyncio.timeout(SOON_S):
            while not transport.answered or len(transport.under_way) != MAX_QUEUES_OF_CONTACT:
                await asyncio.sleep(0)
        assert transport.under_way == urls[:MAX_NEW_RELAYS]
        await sender.finish(0.01)
        assert transport.under_way == []

    asyncio.run(run())
    assert caplog.text.count("names ever new relays") == 1


def test_many_contacts_hold_so_many_connections_and_no_more() -> None:
    """Whoever has most gives one up."""
    transport = SilentTransport()
    contacts = MAX_QUEUES // MAX_QUEUES_OF_CONTACT

    async def run() -> None:
        sender = Sender(lambda url: RelayClient(url, transport), Complaints())
        for contact in range(contacts + 1):
            for number in range(MAX_QUEUES_OF_CONTACT):
                url = f"https://dead{number}.example{contact}a/"
                sender.send(contact, Send(Mailbox("A", url, None), "QUJD"))
                await asyncio.sleep(0)
                assert len(transport.under_way) <= MAX_QUEUES
        async with asyncio.timeout(SOON_S):
            while len(transport.under_way) != MAX_QUEUES:
                await asyncio.sleep(0)
        counts = collections.Counter(url.partition("example")[2] for url in transport.under_way)
        assert min(counts.values()) == MAX_QUEUES_OF_CONTACT - 1
        assert len(counts) == contacts + 1
        await sender.finish(0.01)

    asyncio.run(run())


def test_line_ends_with_the_last_mailbox_at_its_relay(
    apps: Apps, relay: Relay, relay_url: str,
) -> None:
    """Nobody asks a relay that no contact uses, and its task ends.

    A tombstone still uses it, because its former contact may have to be told again.
    """
    with FakeRelay(honest(relay)) as used:
        alice, bob = apps.pair(relay_url)
        alice.relays = ((used.url, None),)
        alice.share("Carol", APP_URL)
        until(lambda: used.checks, "asked")
        assert lines_of(alice) == {f"line to {relay_url}", f"line to {used.url}"}
        bob.unshare("Alice")
        until(lambda: lines_of(alice) == {f"line to {used.url}"}, "ended")
        assert lines_of(bob) == {f"line to {relay_url}"}


def lines_of(app: Connectoid) -> set[str]:
    """Return the names of the tasks of an app that poll relays."""
    tasks = app.loop_thread.call(asyncio.all_tasks)
    names = {task.get_name() for task in tasks}
    return {name for name in names if name.startswith("line to ")}


# ---------------------------------------------------------------------------------------
# Apps that take nothing, or call from where they must not wait.
# ---------------------------------------------------------------------------------------


def connected(apps: Apps, url: str) -> tuple[Channel, Channel]:
    """Return both ends of a connection."""
    alice, bob = apps.pair(url)
    there = bob.connect("Alice", SOON_S)
    return alice.connect("Bob", SOON_S), there


def test_channel_of_an_app_that_takes_nothing_is_closed(apps: Apps, relay_url: str) -> None:
    """It has as many messages as may wait, and the other end hears of it."""
    here, there = connected(apps, relay_url)
    with contextlib.suppress(NotConnectedError):
        for number in range(2 * MAX_QUEUED_MESSAGES):
            there.send(str(number))
    with pytest.raises(NotConnectedError):
        there.receive(SOON_S)
    until(here.closed.is_set, "closed")
    taken = [here.receive(SOON_S) for _ in range(MAX_QUEUED_MESSAGES)]
    assert taken == [str(number) for number in range(MAX_QUEUED_MESSAGES)]
    with pytest.raises(NotConnectedError, match="1,024 messages wait"):
        here.receive(SOON_S)


@pytest.mark.parametrize("one", [b"a", "a"])
def test_message_of_64_kib_is_carried_and_a_larger_one_closes_the_channel(
    apps: Apps, relay_url: str, one: bytes | str
) -> None:
    here, there = connected(apps, relay_url)
    for size in (MAX_CHANNEL_BYTES - 1, MAX_CHANNEL_BYTES):
        there.send(one * size)
        assert here.receive(SOON_S) == one * size
    with pytest.raises(UsageError, match="at most 64 KiB"):
        there.send(one * (MAX_CHANNEL_BYTES + 1))
    write_unchecked(there, one * (MAX_CHANNEL_BYTES + 1))
    with pytest.raises(NotConnectedError, match="a message of more than 64 KiB came"):
        here.receive(SOON_S)
    with pytest.raises(NotConnectedError):
        there.receive(SOON_S)


def test_text_counts_in_utf_8(apps: Apps, relay_url: str) -> None:
    here, there = connected(apps, relay_url)
    there.send("\u00e4" * (MAX_CHANNEL_BYTES // 2))
    assert len(here.receive(SOON_S)) == MAX_CHANNEL_BYTES // 2
    with pytest.raises(UsageError, match="at most 64 KiB"):
        there.send("\u00e4" * (MAX_CHANNEL_BYTES // 2) + "a")


def test_burst_costs_a_listener_no_threads_and_no_tasks(apps: Apps, relay_url: str) -> None:
    here, there = connected(apps, relay_url)
    heard: list[object] = []
    threads: set[int] = set()

    def listen(message: bytes | str | None) -> None:
        heard.append(message)
        threads.add(threading.get_ident())

    here.listen(listen)
    before = threading.active_count()
    for number in range(5_000):
        there.send(str(number))
    until(lambda: len(heard) == 5_000, "heard")
    assert heard == [str(number) for number in range(5_000)]
    assert len(threads) == 1
    assert threading.active_count() == before
    assert len(here._loop_thread.call(asyncio.all_tasks)) < 20


def write_unchecked(channel: Channel, message: bytes | str) -> None:
    """Send what the library would not."""
    writing = channel._connections.write(channel._contact, channel.attempt_id, message)
    channel._loop_thread.wait(writing, SOON_S)


Act = Callable[[Connectoid, Channel], None]


def end_by_closing(alice: Connectoid, here: Channel) -> None:
    """Close the channel."""
    here.close()


def end_by_disconnecting(alice: Connectoid, here: Channel) -> None:
    """Disconnect the contact."""
    alice.disconnect("Bob")


def end_by_unsharing(alice: Connectoid, here: Channel) -> None:
    """End the sharing."""
    alice.unshare("Bob")


ENDS: list[Act] = [end_by_closing, end_by_disconnecting, end_by_unsharing]


class Guest:
    """A listener that sends, and then ends the connection, with every message."""

    def __init__(self, alice: Connectoid, here: Channel, end: Act) -> None:
        self.heard: list[object] = []
        self.over = threading.Event()
        self._alice = alice
        self._here = here
        self._end = end

    def __call__(self, message: bytes | str | None) -> None:
        """Note what comes, and what becomes of sending."""
        self.heard.append(message)
        if message is None:
            self.over.set()
            return
        try:
            self._here.send("an answer")
        except UsageError as error:
            self.heard.append(str(error))
        self._end(self._alice, self._here)


HEARD = ["Hello", "This call waits, so it must not be made by a listener.", None]


@pytest.mark.parametrize("end", ENDS)
def test_listener_may_end_its_channel_and_must_not_wait(
    apps: Apps, relay_url: str, end: Act,
) -> None:
    """A call on the loop that would wait for the loop raises an error that says so."""
    alice, bob = apps.pair(relay_url)
    there = bob.connect("Alice", SOON_S)
    here = alice.connect("Bob", SOON_S)
    guest = Guest(alice, here, end)
    here.listen(guest)
    there.send("Hello")
    assert guest.over.wait(SOON_S)
    assert guest.heard == HEARD
    with pytest.raises(NotConnectedError):
        there.receive(SOON_S)
    alice.contacts()


@pytest.mark.parametrize("end", ENDS)
def test_listener_may_end_its_channel_with_what_came_before_it(
    apps: Apps, relay_url: str, end: Act,
) -> None:
    """It hears the same as one that was there before the message."""
    alice, bob = apps.pair(relay_url)
    there = bob.connect("Alice", SOON_S)
    here = alice.connect("Bob", SOON_S)
    there.send("Hello")
    until(lambda: here._came.qsize() == 1, "came")
    guest = Guest(alice, here, end)
    here.listen(guest)
    assert guest.over.wait(SOON_S)
    assert guest.heard == HEARD
    with pytest.raises(NotConnectedError):
        there.receive(SOON_S)
    alice.contacts()


@pytest.mark.parametrize("end", ENDS)
def test_listener_that_fails_keeps_no_connection_open(
    apps: Apps, relay_url: str, caplog: pytest.LogCaptureFixture, end: Act,
) -> None:
    """It is called once more with the end, and both failures are in the log."""
    alice, bob = apps.pair(relay_url)
    there = bob.connect("Alice", SOON_S)
    here = alice.connect("Bob", SOON_S)
    heard: list[object] = []

    def fail(message: bytes | str | None) -> None:
        heard.append(message)
        raise ValueError(message)

    here.listen(fail)
    there.send("Hello")
    until(lambda: heard, "heard")
    end(alice, here)
    with pytest.raises(NotConnectedError):
        there.receive(SOON_S)
    until(lambda: caplog.text.count("A listener failed.") == 2, "logged")
    assert heard == ["Hello", None]


def test_app_that_closes_in_its_event_handler_is_closed(apps: Apps, relay_url: str) -> None:
    """Events have a thread of their own, which may make any call."""
    closed = threading.Event()

    def on_event(name: str, event: str) -> None:
        if event == "paired":
            carol.close()
            closed.set()

    store = Store(apps.folder / "Carol.db")
    carol = Connectoid(store, [(relay_url, None)], apps.wires.adapter(), on_event=on_event)
    with carol:
        apps.begin("Bob", relay_url).open(carol.share("Bob", APP_URL), "Carol")
        assert closed.wait(SOON_S)
        with pytest.raises(NotConnectedError, match="not started, or closed"):
            carol.connect("Bob")


def test_late_errors_of_aiortc_are_no_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    """Those of others are logged as they were."""
    aiortc = pytest.importorskip("aiortc")
    quiet_aiortc = pytest.importorskip("connectoid.webrtc").quiet_aiortc
    caplog.set_level(logging.INFO)

    def fail() -> NoReturn:
        raise ZeroDivisionError("ours")

    def fail_there() -> None:
        aiortc.RTCSessionDescription(sdp="", type="nonsense")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        quiet_aiortc(loop)
        loop.call_soon(fail_there)
        loop.call_soon(fail)
        await asyncio.sleep(0)

    asyncio.run(run())
    told = {record.levelname: record for record in caplog.records}
    assert told["INFO"].name == "connectoid"
    assert told["ERROR"].exc_info is not None
    assert isinstance(told["ERROR"].exc_info[1], ZeroDivisionError)
