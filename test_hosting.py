"""Test what a host sets: API keys, who is denied, trusted proxies, metrics, the page, STUN, and files of old."""

from __future__ import annotations

import collections
import contextlib
import html
import ipaddress
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from aioice import stun
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from conftest import (
    NOTHING,
    OK,
    ROOT,
    SOURCE,
    START_US,
    FakeClock,
    Owner,
    Process,
    answer_of,
    check,
    exchange,
    http_request,
    parse_response,
    post,
    receive,
    running,
    send,
    serving,
)
from connectoid_relay import (
    DAY_US,
    MAX_DATA_CHARS,
    MAX_EXT_CHARS,
    MAX_SETTING,
    METRICS,
    MIN_COUNTED_BYTES,
    MINUTE_US,
    SCHEMA,
    TRAFFIC_MINUTES,
    About,
    Access,
    Limits,
    Message,
    Networks,
    NoRoom,
    Quota,
    Relay,
    RelayServer,
    Reply,
    SettingError,
    SqliteStore,
    Store,
    Stored,
    StoreError,
    Traffic,
    __version__,
    _bars,
    _size,
    _span,
    answer_datagram,
    answer_stun,
    client_of,
    is_stun,
    read_access,
    render_page,
    source_of,
)

KEY, OTHER_KEY = "sesame-5f2c91d0a77b", "another-81c30e5bd9"
FORBIDDEN = (403, "Forbidden", 0)
OK_REPLY, NOTHING_REPLY = Reply(200, OK), Reply(200, NOTHING)
TO_MIDNIGHT_S = 57_600  # from START_US, which is at 8 o'clock UTC
SLOWLY = 30.0  # for whatever must come, on the slowest machine
Make = Callable[..., Relay]


class FailingStore:
    """A store whose methods raise while a test says so."""

    def __init__(self, inside: Store | None = None) -> None:
        self.inside, self.failing = inside or SqliteStore(":memory:"), False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inside, name)

        def call(*values: Any, **named: Any) -> Any:
            if self.failing and name != "close":
                raise StoreError("the disk has gone")
            return method(*values, **named)

        return call

    @property
    def store(self) -> Store:
        """Return itself, as what a relay takes."""
        return cast(Store, self)


@pytest.fixture
def make(clock: FakeClock) -> Iterator[Make]:
    """Return a function that makes a relay with what a host sets; all are closed with the test."""
    made: list[Relay] = []

    def make_relay(access: Access | None = None, store: Store | None = None, about: About | None = None,
                   **limits: int) -> Relay:
        relay = Relay(store or SqliteStore(":memory:"), Limits(**limits), access=access, about=about,
                      clock=clock.clock)
        made.append(relay)
        return relay

    yield make_relay
    for relay in made:
        relay.close()


def alices(public: Quota | None = None, **quota: int) -> Access:
    """Return the access with one key, of the table [keys.alice]."""
    return Access({KEY: Quota("keys.alice", **quota)}, public)


def refused(reply: Reply) -> tuple[int, str, int]:
    """Return status, error and retry (0 = none) of a refusal, which has nothing else to say."""
    assert isinstance(reply.body, dict)
    return (reply.status, *refusal_in(reply.body))


def refusal_in(body: dict[str, Any]) -> tuple[str, int]:
    """Return error and retry of a refusal's JSON."""
    assert body["ok"] is False
    assert body.keys() <= {"ok", "error", "detail", "retry"}
    return str(body["error"]), int(body.get("retry", 0))


def ask(relay: Relay, *requests: object, source: str = SOURCE) -> list[object]:
    """Return the replies to requests in a row: JSON that is well, and a refusal in short."""
    replies = [relay.handle(request, source) for request in requests]
    return [reply.body if reply.status == 200 else refused(reply) for reply in replies]


def eventually(condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true in good time."""
    deadline_s = time.monotonic() + SLOWLY
    while not (fulfilled := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return fulfilled


def get(port: int, path: str = "/", *headers: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    """Return status, headers and text of a page."""
    status, found, body = parse_response(exchange(port, http_request(b"", *headers, method=method, path=path)))
    return status, found, body.decode("utf-8")


def document_of(port: int) -> dict[str, Any]:
    """Return the relay's document."""
    status, _, text = get(port, "/", "Accept: application/json")
    assert status == 200
    document: dict[str, Any] = json.loads(text)
    return document


def run_relay(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the relay until it leaves by itself."""
    return subprocess.run([sys.executable, str(ROOT / "connectoid_relay.py"), *flags], cwd=cwd, capture_output=True,
                          text=True, timeout=SLOWLY, check=False)


def next_log_line(process: Process) -> str:
    """Return what a process logs next."""
    assert process.popen.stderr is not None
    assert select.select([process.popen.stderr], [], [], SLOWLY)[0], "it logs nothing"
    return str(process.popen.stderr.readline())


def batch(relay: Relay, *items: object, source: str = SOURCE) -> list[Any]:
    """Return the replies to a batch: what is well, and refusals as error and retry."""
    status, replies = relay.handle(list(items), source)
    assert status == 200
    assert isinstance(replies, list)
    return [reply if reply["ok"] else refusal_in(reply) for reply in replies]


def texts_of(relay: Relay, owner: Owner, **members: Any) -> list[str]:
    """Return the data of all messages in a box, which has some."""
    reply = relay.handle(check(owner, **members), SOURCE)
    assert isinstance(reply.body, dict)
    reply = relay.handle(receive(owner, owner.open(reply.body["question"]), limit=100, **members), SOURCE)
    assert isinstance(reply.body, dict)
    return [message["data"] for message in reply.body["messages"]]


# ---------------------------------------------------------------------------------------
# API keys: who gets in, and what a quota gives.
# ---------------------------------------------------------------------------------------

UNKNOWN: Sequence[dict[str, Any]] = ({}, {"ext": None}, {"ext": ""}, {"ext": "wrong"}, {"ext": KEY + "x"},
                                     {"ext": KEY[:-1]}, {"ext": KEY.upper()}, {"ext": f" {KEY}"})


def requests_with(owner: Owner, members: dict[str, Any]) -> list[object]:
    """Return a request of each kind."""
    return [send(owner, **members), check(owner, **members), receive(owner, "no", **members)]


@pytest.mark.parametrize("members", UNKNOWN, ids=str)
def test_ext_is_ignored_without_keys(relay: Relay, alice: Owner, members: dict[str, Any]) -> None:
    assert ask(relay, check(alice, **members), send(alice, **members), receive(alice, "no", **members)) == [
        NOTHING, OK, (403, "Wrong answer", 0)]


@pytest.mark.parametrize("members", UNKNOWN, ids=str)
def test_relay_with_keys_forbids_whoever_has_none(make: Make, alice: Owner, members: dict[str, Any]) -> None:
    relay = make(alices())
    assert ask(relay, *requests_with(alice, members)) == [FORBIDDEN] * 3
    assert relay.store.stored() == Stored(0, 0, 0)


def test_relay_with_a_file_without_any_key_forbids_all(tmp_path: Path, make: Make, alice: Owner) -> None:
    (tmp_path / "keys.toml").touch()
    relay = make(read_access(str(tmp_path / "keys.toml")))
    for members in UNKNOWN:
        assert ask(relay, *requests_with(alice, members)) == [FORBIDDEN] * 3


def test_right_key_opens_every_action(make: Make, alice: Owner) -> None:
    relay = make(Access({KEY: Quota("keys.alice"), OTHER_KEY: Quota("keys.bob")}, None))
    assert ask(relay, send(alice, ext=KEY)) == [OK]
    reply = relay.handle(check(alice, ext=OTHER_KEY), SOURCE)
    assert isinstance(reply.body, dict)
    answer = alice.open(reply.body["question"])
    assert ask(relay, receive(alice, answer, ext=KEY)) == [{"ok": True, "at": START_US, "data": "QUJD"}]


def test_batch_is_forbidden_item_by_item(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(alices())
    items = [check(alice, ext=KEY), *(check(bob, **members) for members in UNKNOWN), check(bob, ext=KEY)]
    assert batch(relay, *items) == [NOTHING, *[("Forbidden", 0)] * len(UNKNOWN), NOTHING]


@pytest.mark.parametrize("ext", [1, ["a"], {"key": KEY}, True, "x" * (MAX_EXT_CHARS + 1)], ids=lambda ext: str(ext)[:9])
def test_ext_of_a_wrong_form_is_a_bad_request_with_keys_too(make: Make, alice: Owner, ext: object) -> None:
    assert ask(make(alices()), check(alice, ext=ext)) == [(400, "Bad request", 0)]


def test_key_of_any_letters_up_to_the_limit_works(make: Make, alice: Owner) -> None:
    longest = "\U0001f511ключ\x00\"" + "é" * (MAX_EXT_CHARS - 7)
    assert len(longest) == MAX_EXT_CHARS
    assert ask(make(Access({longest: Quota("keys.alice")}, None)), check(alice, ext=longest)) == [NOTHING]


def test_datagram_needs_no_key(make: Make, alice: Owner) -> None:
    assert answer_datagram(make(alices()), json.dumps(check(alice)).encode(), SOURCE) == json.dumps(NOTHING).encode()


# requests_per_day


def test_requests_per_day_are_counted_until_midnight_utc(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(alices(requests_per_day=3))
    request = check(alice, ext=KEY)
    assert ask(relay, *[request] * 4) == [*[NOTHING] * 3, (429, "Too often", TO_MIDNIGHT_S)]
    clock.advance(TO_MIDNIGHT_S - 0.5)
    assert ask(relay, request) == [(429, "Too often", 1)]
    clock.advance(0.499_999)
    assert ask(relay, request) == [(429, "Too often", 1)]
    clock.advance(0.000_001)
    assert ask(relay, *[request] * 4) == [*[NOTHING] * 3, (429, "Too often", DAY_US // 1_000_000)]


def test_requests_per_day_count_every_action_of_every_source(make: Make, alice: Owner) -> None:
    relay = make(alices(requests_per_day=4), max_box_messages=80)
    too_often = (429, "Too often", TO_MIDNIGHT_S)
    assert ask(relay, send(alice, ext=KEY), source="192.0.2.1") == [OK]
    assert ask(relay, receive(alice, "no", ext=KEY), source="192.0.2.2") == [(403, "Wrong answer", 0)]
    assert batch(relay, *[check(alice, START_US, ext=KEY)] * 3, source="2001:db8::1") == [
        NOTHING, NOTHING, too_often[1:]]
    assert ask(relay, *requests_with(alice, {"ext": KEY}), source="192.0.2.3") == [too_often] * 3


def test_forbidden_requests_count_against_no_quota(make: Make, alice: Owner) -> None:
    relay = make(alices(requests_per_day=1))
    assert ask(relay, check(alice, ext="wrong"), check(alice), check(alice, ext=KEY)) == [FORBIDDEN] * 2 + [NOTHING]


def test_requests_per_day_are_told_once_though_another_key_cannot_be_told(make: Make, alice: Owner) -> None:
    """A store that refuses one name must not have the others counted again with each sweep."""
    store = SqliteStore(":memory:")
    told = collections.Counter[str]()
    failing = {"keys.bob"}

    class Choosy:
        """A store that cannot count for one key."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def spend(self, requests: Mapping[str, int], now_us: int) -> None:
            if failing & requests.keys():
                raise StoreError("throttled")
            told.update(requests)
            store.spend(requests, now_us)

    relay = make(Access({KEY: Quota("keys.alice", requests_per_day=9), OTHER_KEY: Quota("keys.bob")}),
                 store=cast(Store, Choosy()))
    for key in (KEY, OTHER_KEY):
        relay.handle(check(alice, ext=key), SOURCE)
    for _ in range(3):
        with contextlib.suppress(StoreError):
            relay.sweep()
    assert told == {"keys.alice": 1}
    failing.clear()
    relay.sweep()
    relay.sweep()
    assert told == {"keys.alice": 1, "keys.bob": 1}
    for _ in range(9):
        reply = relay.handle(check(alice, ext=KEY), SOURCE)
    assert refused(reply)[:2] == (429, "Too often")


def test_requests_per_day_hold_without_rates_too(make: Make, alice: Owner) -> None:
    relay = make(alices(requests_per_day=1), rate=0)
    assert ask(relay, *[check(alice, ext=KEY)] * 2) == [NOTHING, (429, "Too often", TO_MIDNIGHT_S)]


def test_unknown_keys_share_the_quota_of_the_public(make: Make, alice: Owner) -> None:
    count = len(UNKNOWN)
    relay = make(alices(Quota("public", requests_per_day=count), requests_per_day=1))
    requests = [check(alice, **members) for members in UNKNOWN]
    assert ask(relay, *requests, *requests) == [NOTHING] * count + [(429, "Too often", TO_MIDNIGHT_S)] * count
    assert ask(relay, *[check(alice, ext=KEY)] * 2) == [NOTHING, (429, "Too often", TO_MIDNIGHT_S)]


def test_quota_without_requests_per_day_has_no_limit_of_them(make: Make, alice: Owner) -> None:
    assert ask(make(alices(), rate=0), *[check(alice, ext=KEY)] * 1_000) == [NOTHING] * 1_000


@contextlib.contextmanager
def relay_on(path: Path, clock: FakeClock, access: Access) -> Iterator[Relay]:
    """Open a relay on a file, and close it."""
    with contextlib.closing(Relay(SqliteStore(str(path)), access=access, clock=clock.clock)) as relay:
        yield relay


def test_requests_per_day_are_those_of_all_processes_after_a_sweep_each(
        tmp_path: Path, clock: FakeClock, alice: Owner) -> None:
    request, too_often = check(alice, ext=KEY), (429, "Too often", TO_MIDNIGHT_S)
    access = alices(requests_per_day=5)
    path = tmp_path / "relay.db"
    with relay_on(path, clock, access) as here, relay_on(path, clock, access) as there:
        assert ask(here, request, request) == [NOTHING] * 2
        here.sweep()
        assert ask(there, request) == [NOTHING]
        there.sweep()
        assert ask(there, request) == [NOTHING]
        there.sweep()
        assert ask(there, request, request) == [NOTHING, too_often]
        there.sweep()
        assert ask(here, request) == [NOTHING]  # it cannot know before it has told
        here.sweep()
        assert ask(here, request) == [too_often]


def test_requests_per_day_survive_closing_and_are_known_after_a_sweep(
        tmp_path: Path, clock: FakeClock, alice: Owner) -> None:
    request, too_often = check(alice, ext=KEY), (429, "Too often", TO_MIDNIGHT_S)
    for fourth in (False, True):
        with relay_on(tmp_path / "relay.db", clock, alices(requests_per_day=3)) as relay:
            assert ask(relay, request) == [NOTHING]
            relay.sweep()
            assert ask(relay, request) == [too_often if fourth else NOTHING]  # not swept: told when it closes
            if fourth:
                clock.advance(TO_MIDNIGHT_S)
                assert ask(relay, *[request] * 3) == [NOTHING] * 3


def test_requests_of_yesterday_do_not_count_for_today(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(alices(requests_per_day=2))
    request = check(alice, ext=KEY)
    relay.sweep()
    clock.advance(TO_MIDNIGHT_S - 0.1)
    assert ask(relay, *[request] * 2) == [NOTHING] * 2
    clock.advance(0.2)  # to the next day, and only now comes the sweep
    relay.sweep()
    assert ask(relay, request) == [NOTHING]
    relay.sweep()
    assert ask(relay, *[request] * 2) == [NOTHING, (429, "Too often", DAY_US // 1_000_000)]


def test_requests_that_a_failing_store_was_not_told_are_told_with_the_next_sweep(
        make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = FailingStore()
    relay, access = make(alices(requests_per_day=9), watched.store), alices(requests_per_day=3)
    assert ask(relay, *[check(alice, ext=KEY)] * 2) == [NOTHING] * 2
    watched.failing = True
    for _ in range(2):
        with pytest.raises(StoreError, match="the disk has gone"):
            relay.sweep()
    watched.failing = False
    assert ask(relay, check(alice, ext=KEY)) == [NOTHING]
    relay.sweep()
    assert watched.inside.spent(relay.now_us()) == {"keys.alice": 3}
    relay.access = access
    assert ask(relay, check(alice, ext=KEY)) == [(429, "Too often", TO_MIDNIGHT_S)]
    relay.sweep()
    assert watched.inside.spent(relay.now_us()) == {"keys.alice": 3}  # none was told twice


# bytes


@pytest.mark.parametrize(("sizes", "taken"), [
    ([42], True), ([43], True), ([44], False), ([40, 2], True), ([40, 3], True), ([40, 4], False), ([43, 2], False)])
def test_bytes_of_a_quota_are_taken_up_to_the_limit(make: Make, sizes: list[int], taken: bool) -> None:
    relay = make(alices(bytes=43))
    sends = [send(Owner(number), "A" * size, ext=KEY) for number, size in enumerate(sizes, 1)]
    assert ask(relay, *sends) == [*[OK] * (len(sends) - 1), OK if taken else (429, "Too often", 60)]
    assert relay.store.stored().messages == len(sends) - (not taken)


def test_bytes_are_of_one_quota_alone(make: Make, alice: Owner) -> None:
    relay = make(Access({KEY: Quota("keys.alice", bytes=4), OTHER_KEY: Quota("keys.bob", bytes=4)}, Quota("public")))
    assert ask(relay, send(alice, ext=KEY), send(alice, ext=KEY), send(alice, ext=OTHER_KEY), send(alice)) == [
        OK, (429, "Too often", 60), OK, OK]


def test_bytes_are_free_again_after_expiry_and_a_sweep(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(alices(bytes=8, message_ttl_s=10))
    small = send(alice, "QUJD", ext=KEY)
    assert ask(relay, small, small, small) == [OK, OK, (429, "Too often", 60)]
    clock.advance(9.999_999)
    relay.sweep()
    assert ask(relay, small) == [(429, "Too often", 60)]
    clock.advance(1)
    relay.sweep()
    assert ask(relay, small, small, small) == [OK, OK, (429, "Too often", 60)]
    assert ask(relay, check(alice, START_US + 10**12, ext=KEY)) == [NOTHING]  # the owner reads on


def test_bytes_survive_reopening_and_the_end_of_a_key(tmp_path: Path, clock: FakeClock, alice: Owner) -> None:
    small = send(alice, "QUJD", ext=KEY)
    with relay_on(tmp_path / "relay.db", clock, alices(bytes=8)) as relay:
        assert ask(relay, small) == [OK]
    with relay_on(tmp_path / "relay.db", clock, alices(bytes=8)) as relay:
        assert ask(relay, small, small) == [OK, (429, "Too often", 60)]
        relay.access = Access()  # the keys have gone; their messages still end
        clock.advance(3_601)
        relay.sweep()
        assert relay.stored() == Stored(0, 0, 0)
        relay.access = alices(bytes=8)
        assert ask(relay, small, small, small) == [OK, OK, (429, "Too often", 60)]


def test_quota_of_the_store_refuses_without_a_trace() -> None:
    with contextlib.closing(SqliteStore(":memory:")) as store:
        message = Message(Owner(1).box, "QUJD", b"source", 10, Quota("keys.alice", bytes=3))
        with pytest.raises(NoRoom, match="quota"):
            store.put(message, Limits(), START_US)
        assert store.stored() == Stored(0, 0, 0)
        assert store.put(message._replace(data="QUJ"), Limits(), START_US) == START_US
        assert store.stored() == Stored(1, MIN_COUNTED_BYTES, 0)


# message_ttl


@pytest.mark.parametrize("ttl_s", [1, 3_599, 3_601, 86_400])
def test_message_of_a_key_is_kept_as_long_as_its_quota_says(
        make: Make, clock: FakeClock, alice: Owner, ttl_s: int) -> None:
    relay = make(alices(Quota("public"), message_ttl_s=ttl_s))
    assert ask(relay, send(alice, ext=KEY)) == [OK]
    clock.advance(ttl_s - 0.000_001)
    answer = answer_of(relay, alice)
    assert ask(relay, receive(alice, answer)) == [{"ok": True, "at": START_US, "data": "QUJD"}]
    clock.advance(0.000_001)
    assert ask(relay, check(alice), receive(alice, answer)) == [NOTHING] * 2
    relay.sweep()
    assert relay.store.stored().messages == 0


def test_message_is_kept_for_whom_sent_it(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(alices(Quota("public", message_ttl_s=5), message_ttl_s=20), message_ttl_s=10)
    assert ask(relay, send(alice, "cHVi"), send(alice, "a2V5", ext=KEY)) == [OK] * 2
    clock.advance(6)
    relay.sweep()
    assert texts_of(relay, alice) == ["a2V5"]


def test_document_tells_how_long_messages_of_the_public_are_kept(make: Make) -> None:
    relay = make(alices(Quota("public", message_ttl_s=77), message_ttl_s=88))
    retention = {"message": 77, "question": 60, "box": 30 * 86_400}
    assert relay.document()["retention"] == retention
    for access in (alices(Quota("public"), message_ttl_s=88), alices(None, message_ttl_s=88), Access()):
        relay.access = access
        assert relay.document()["retention"] == retention | {"message": 3_600}


# Another access in place of the old one


def test_another_access_counts_at_once_and_goes_on_counting_by_name(make: Make, alice: Owner) -> None:
    relay = make(alices(requests_per_day=9, bytes=99))
    assert ask(relay, check(alice), *[send(alice, ext=KEY)] * 2) == [FORBIDDEN, OK, OK]
    relay.access = Access({OTHER_KEY: Quota("keys.alice", requests_per_day=4, bytes=9)}, Quota("public"))
    assert ask(relay, check(alice, START_US + 9, ext=KEY)) == [NOTHING]  # the old key is one of the public's now
    assert ask(relay, *[send(alice, ext=OTHER_KEY)] * 3) == [
        (429, "Too often", 60), (429, "Too often", 60), (429, "Too often", TO_MIDNIGHT_S)]
    relay.access = Access()
    assert ask(relay, send(alice, ext=OTHER_KEY)) == [OK]


# Where a key may never be seen


def test_key_is_shown_nowhere(make: Make, alice: Owner, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "keys.toml").write_text(f'[keys.alice]\nkey = "{KEY}"\nrequests_per_day = 5\nbytes = 4\n')
    watched = FailingStore()
    relay = make(read_access(str(tmp_path / "keys.toml")), watched.store, rate=30)
    replies = [relay.handle(request, SOURCE) for request in [send(alice, ext=KEY)] * 7 + [check(alice, ext=KEY + "x")]]
    watched.failing = True
    replies += [relay.handle(check(alice, ext=KEY), SOURCE) for _ in range(30)]
    page = render_page(relay, relay.document())
    shown = [repr(relay.access), str(vars(relay.access)), str(vars(relay)), repr(replies), page,
             json.dumps(relay.document()), repr(relay.samples()), caplog.text,
             *(repr(vars(record)) for record in caplog.records)]
    assert caplog.records  # something was told
    assert [text for text in shown if KEY in text or KEY.encode().hex() in text] == []


@pytest.mark.parametrize("text", [
    f'key = "{KEY}', f"[keys.a]\nkey = {KEY}", f'[keys.a]\nkey = "{KEY}" bytes = 1', f'[keys.a]\nkey = "{KEY}\\q"',
    f'[keys.a]\nkey = ["{KEY}"]', f'[keys.a]\nkey = {{it = "{KEY}"}}', f'[keys]\na = "{KEY}"', f'keys = "{KEY}"',
    f'[keys.a]\nkey = "{KEY * 60}"', f'[keys.a]\nkey = "{KEY}"\n[keys.b]\nkey = "{KEY}"', f'[public]\nkey = "{KEY}"',
    f'[keys.a]\nbytes = "{KEY}"', f'[keys.a]\nkey = "{KEY}"\nkey = "{KEY}"', f'[keys.a]\nkey : "{KEY}"',
    f'public = "{KEY}"', f'a = "{KEY}"'])
def test_mistake_in_a_key_file_does_not_tell_the_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(SettingError) as caught:
        read_access(str(tmp_path / "keys.toml"))
    assert KEY not in "".join(traceback.format_exception(caught.value))  # nor from what it was raised


# ---------------------------------------------------------------------------------------
# The key file: what it may say, and what is told of mistakes.
# ---------------------------------------------------------------------------------------

GOOD = f'[keys.good]\nkey = "{KEY}"\n'
AT_LEAST_1 = "must be a whole number"

# The text of the file, the line told, and words of the message.
MISTAKES: dict[str, tuple[str | bytes, int, str]] = {
    "no value": (GOOD + "bytes =\n", 3, "Invalid value"),
    "no TOML": (GOOD + "\nhello, relay\n", 4, "write TOML: [keys.NAME], then key = "),
    "open header": (GOOD + "[keys.bad\n", 3, "write TOML"),
    "open string at the end": (GOOD + '[keys.bad]\nkey = "abc', 4, "write TOML"),
    "table twice": (GOOD + f'[keys.good]\nkey = "{OTHER_KEY}"\n', 3, "twice"),
    "member twice": (GOOD + f'key = "{OTHER_KEY}"\nbytes = 1\n', 3, "overwrite"),
    "key is a number": (GOOD + "[keys.bad]\nkey = 12\n", 4, "key must be a string of 1 to 1024 characters"),
    "key is empty": (GOOD + '[keys.bad]\nkey = ""\n', 4, "key must be a string of 1 to 1024 characters"),
    "key is too long": (GOOD + f'[keys.bad]\nbytes = 1\nkey = "{"k" * (MAX_EXT_CHARS + 1)}"\n', 5,
                        "key must be a string of 1 to 1024 characters"),
    "key is missing": (GOOD + "[keys.bad]\nbytes = 1\n", 3, '[keys.bad] needs a key = "..."'),
    "key is there twice": (GOOD + f'[keys.bad]\nbytes = 1\nkey = "{KEY}"\n', 5, "keys.good has the same key"),
    "public has a key": (GOOD + f'[public]\nkey = "{OTHER_KEY}"\n', 4,
                         " is unknown; [public] may have requests_per_day, bytes, message_ttl"),
    "unknown member": (GOOD + "byte = 1\n", 3,
                       " is unknown; [keys.good] may have key, requests_per_day, bytes, message_ttl"),
    "member of a longer name": (GOOD + "bytes_ = 1\nbytes = 2\n", 3, " is unknown"),
    "name of a quota inside": (GOOD + 'name = "x"\n', 3, " is unknown"),
    "unknown table": (GOOD + "[limits]\nbytes = 1\n", 3, "limits is no table; there are [keys.NAME] and [public]"),
    "table with a name like public": (GOOD + f'[publicity]\nkey = "{OTHER_KEY}"\n', 3,
                                      "there are [keys.NAME] and [public]"),
    "member outside": ("bytes = 1\n" + GOOD, 1, "there are [keys.NAME] and [public]"),
    "public is no table": ("public = 1\n" + GOOD, 1, "there are [keys.NAME] and [public]"),
    "keys is no table": ("\nkeys = 1\n", 2, "there are [keys.NAME] and [public]"),
    "keys is an array": (f'[[keys]]\nkey = "{KEY}"\n', 1, "there are [keys.NAME] and [public]"),
    "keys hold no table": (GOOD + f'[keys]\nbytes = 1\nbad = "{OTHER_KEY}"\n', 4, "keys.bytes is no table"),
    "a table too deep": (GOOD + "[keys.good.more]\nbytes = 1\n", 3, " is unknown"),
    "member with a line end": (GOOD + '"by\\ntes" = 1\n', 1, "is unknown"),
    "name with a dot outside": (GOOD + f'["keys.bad"]\nkey = "{OTHER_KEY}"\n', 3, "there are [keys.NAME] and [public]"),
    "dotted member": (GOOD + '[keys]\nbad.key = "x"\nbad.bytes = 0\n', 5, AT_LEAST_1),
    "quoted table": (GOOD + '[keys."two words"]\nkey = 1\n', 4, "key must be"),
    "quoted member": (GOOD + '"bytes" = 0\n', 3, AT_LEAST_1),
    "dotted quoted table": (GOOD + "[ keys . 'a.b' ]\nkey = 1\n", 4, "key must be"),
    "commented table": (GOOD + "# [keys.bad]\n[keys.bad] # bytes = 0\n# bytes = 0\nbytes = 0\n", 6, AT_LEAST_1),
    "same member in an earlier table": (GOOD + 'bytes = 1\n[public]\nbytes = 2\n[keys.b]\nkey = "b"\nbytes = 0\n', 8,
                                        AT_LEAST_1),
    "Windows line ends": (GOOD.replace("\n", "\r\n") + "bytes = 0\r\n", 3, AT_LEAST_1),
    "not UTF-8": (GOOD.encode() + b'[keys.bad]\nkey = "\xff"\n', 4, "save the file as UTF-8"),
    "not UTF-8 after a BOM": (b"\xef\xbb\xbf#\n\xff\n", 2, "save the file as UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), 1, "save the file as UTF-8"),
    "digits without end": (GOOD + f"bytes = {'9' * 5_000}\n", 3, ""),
    "brackets without end": ("keys = " + "[" * 100_000 + "\n", 1, ""),
    **{f"{member} = {value}": (GOOD + f"{member} = {value}\n", 3, f"{member} {AT_LEAST_1}")
       for member in ("requests_per_day", "bytes", "message_ttl")
       for value in ("0", "-1", "1.0", "1e3", "true", "false", '"1"', "[1]", "2027-01-01", "{a = 1}", "nan")},
    **{f"{member} over the largest": (GOOD + f"{member} = {MAX_SETTING + 1}\n", 3, str(MAX_SETTING))
       for member in ("requests_per_day", "bytes", "message_ttl")},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_key_file_is_told_in_one_line_with_its_place(tmp_path: Path, name: str) -> None:
    text, line, words = MISTAKES[name]
    path = tmp_path / "keys.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingError) as caught:
        read_access(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize("flag", ["keys", "denied"])
def test_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, flag: str) -> None:
    for path, why in ((tmp_path / "none", "No such file or directory; give a file that the relay may read"),
                      (tmp_path, "Is a directory; give a file that the relay may read")):
        with pytest.raises(SettingError, match=f"^{re.escape(str(path))}: {why}$"):
            read_access(**{flag: str(path)})


@pytest.mark.parametrize("text", [
    GOOD, "\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), f"keys.good.key = '{KEY}'",
    f'keys = {{good = {{key = "{KEY}"}}}}',
    f'["keys"."good"]\n"key" = """{KEY}"""'])
def test_key_file_may_be_any_toml(tmp_path: Path, make: Make, alice: Owner, text: str) -> None:
    (tmp_path / "keys.toml").write_text(text, newline="")
    assert ask(make(read_access(str(tmp_path / "keys.toml"))), check(alice, ext=KEY), check(alice)) == [
        NOTHING, FORBIDDEN]


def test_key_file_gives_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'''
        [public]
        message_ttl = 1
        [keys."Alice's shop, 2 x"]
        key = "{KEY}"
        requests_per_day = {MAX_SETTING}
        bytes = 1_000
        message_ttl = 0x10
        [keys.bob]
        key = "{"k" * MAX_EXT_CHARS}"
    ''')
    access = read_access(str(tmp_path / "keys.toml"))
    assert [access.quota_of(ext) for ext in (KEY, "k" * MAX_EXT_CHARS, None, "other")] == [
        Quota("keys.Alice's shop, 2 x", MAX_SETTING, 1_000, 16), Quota("keys.bob"), *[Quota("public", 0, 0, 1)] * 2]


def test_largest_settings_work(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(alices(requests_per_day=MAX_SETTING, bytes=MAX_SETTING, message_ttl_s=MAX_SETTING))
    assert ask(relay, send(alice, ext=KEY)) == [OK]
    clock.advance(10**6)
    relay.sweep()
    assert texts_of(relay, alice, ext=KEY) == ["QUJD"]


@pytest.mark.parametrize(("flag", "text", "line"), [
    ("--keys", GOOD + "bytes = 0\n", 3), ("--deny", "192.0.2.1\n10.0.0.1/8\n", 2)])
def test_process_with_a_mistake_in_a_file_fails_with_one_line(
        tmp_path: Path, flag: str, text: str, line: int) -> None:
    (tmp_path / "bad.txt").write_text(text)
    finished = run_relay(flag, "bad.txt", "--port", "0", "--db", "relay.db", cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith(f"connectoid relay: bad.txt, line {line}: ")
    assert finished.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_process_reads_keys_again_and_tells_none(start: Callable[..., Process], tmp_path: Path, alice: Owner) -> None:
    (tmp_path / "keys.toml").write_text(GOOD)
    process = start("--db", ":memory:", "--keys", "keys.toml")
    assert post(process.port, check(alice, ext=KEY)) == (200, NOTHING)
    (tmp_path / "keys.toml").write_text(f'[keys.good]\nkey = "{OTHER_KEY}"\n')
    process.popen.send_signal(signal.SIGHUP)
    assert eventually(lambda: post(process.port, check(alice, ext=OTHER_KEY))[0] == 200)
    assert post(process.port, check(alice, ext=KEY))[0] == 403
    assert next_log_line(process) == "connectoid relay: read the files again\n"
    (tmp_path / "keys.toml").write_text(f'[keys.good]\nkey = "{KEY}"\nkey = "{KEY}"\n')
    process.popen.send_signal(signal.SIGHUP)
    line = next_log_line(process)
    assert line.startswith("connectoid relay: keys.toml, line 3: ")
    assert line.endswith("; all stays as it was\n")
    assert KEY not in line
    assert post(process.port, check(alice, ext=OTHER_KEY)) == (200, NOTHING)
    assert process.stop() == (0, "")


def test_quota_is_known_to_a_relay_that_starts_and_to_one_that_was_idle(tmp_path: Path, clock: FakeClock,
                                                                        alice: Owner) -> None:
    def start_relay() -> Relay:
        access = Access({"sesame": Quota("keys.alice", requests_per_day=3)}, None)
        return Relay(SqliteStore(str(tmp_path / "relay.db")), access=access, clock=clock.clock)

    with contextlib.closing(start_relay()) as first, contextlib.closing(start_relay()) as idle:
        for _ in range(3):
            assert first.handle(check(alice, ext="sesame"), SOURCE) == (200, NOTHING)
        first.sweep()
        idle.sweep()  # it had nothing to tell
        for relay in (first, idle):
            assert relay.handle(check(alice, ext="sesame"), SOURCE).status == 429
        with contextlib.closing(start_relay()) as new:
            assert new.handle(check(alice, ext="sesame"), SOURCE).status == 429


@pytest.mark.parametrize("name", ["keys", "denied"])
def test_pipe_in_place_of_a_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingError, match=r"^.*/pipe: is a pipe; give a file, which can be read again$"):
        read_access(**{name: str(tmp_path / "pipe")})


# ---------------------------------------------------------------------------------------
# The list of who is denied.
# ---------------------------------------------------------------------------------------


def denying(tmp_path: Path, *lines: str) -> Access:
    """Return the access that a list of lines gives."""
    (tmp_path / "deny.txt").write_text("\n".join(lines))
    return read_access(denied=str(tmp_path / "deny.txt"))


DENIED = ("# people who filled boxes", "", "  192.0.2.7\t# one address", "198.51.100.0/24", "2001:db8:1::1/128",
          "2001:db8:2::/48", "::ffff:203.0.113.9", "::ffff:233.252.0.0/120", "#203.0.113.1", "   ")


@pytest.mark.parametrize(("source", "denied"), [
    ("192.0.2.6", False), ("192.0.2.7", True), ("192.0.2.8", False), ("::ffff:192.0.2.7", True),
    ("198.51.99.255", False), ("198.51.100.0", True), ("198.51.100.255", True), ("198.51.101.0", False),
    ("2001:db8:1::1", True), ("2001:db8:1::ffff", True), ("2001:db8:1:1::1", False), ("2001:db8:0:ffff::1", False),
    ("2001:db8:2::", True), ("2001:db8:2:ffff:ffff::", True), ("2001:db8:3::", False),
    ("203.0.113.9", True), ("::ffff:203.0.113.9", True), ("203.0.113.8", False), ("203.0.113.1", False),
    ("233.252.0.0", True), ("233.252.0.255", True), ("233.252.1.0", False), ("::1", False), ("::", False),
    ("", False), ("nonsense", False), ("fe80::1%eth0", False)])
def test_denied_source_is_forbidden_everything(
        tmp_path: Path, make: Make, alice: Owner, source: str, denied: bool) -> None:
    relay = make(denying(tmp_path, *DENIED))
    assert relay.access.denies(source_of(source)) is denied
    expected = [FORBIDDEN] * 3 if denied else [OK, NOTHING, (403, "Wrong answer", 0)]
    assert ask(relay, send(alice), check(alice, START_US), receive(alice, "no"), source=source) == expected
    assert ask(relay, [check(alice, START_US)], source=source) == [FORBIDDEN if denied else [NOTHING]]
    datagram = json.dumps(check(alice, START_US)).encode()
    assert answer_datagram(relay, datagram, source_of(source)) == (None if denied else json.dumps(NOTHING).encode())


@pytest.mark.parametrize(("entry", "some", "others"), [
    ("0.0.0.0/0", ("0.0.0.0", "255.255.255.255", "::ffff:1.2.3.4"), ("::1", "2001:db8::")),
    ("::/0", ("::1", "ffff::"), ("192.0.2.1", "::ffff:1.2.3.4")),
    ("128.0.0.0/1", ("128.0.0.0", "192.0.2.1"), ("127.255.255.255",)),
    ("192.0.2.0/255.255.255.0", ("192.0.2.0", "192.0.2.255"), ("192.0.3.0",))])
def test_denied_network_may_be_of_any_size(
        tmp_path: Path, entry: str, some: Sequence[str], others: Sequence[str]) -> None:
    access = denying(tmp_path, entry)
    assert [source for source in some if not access.denies(source_of(source))] == []
    assert [source for source in others if access.denies(source_of(source))] == []


def test_denied_mailbox_is_forbidden_and_others_are_not(tmp_path: Path, make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(denying(tmp_path, f"{alice.pub} # spam"))
    assert ask(relay, *requests_with(alice, {})) == [FORBIDDEN] * 3
    assert ask(relay, check(bob), send(bob)) == [NOTHING, OK]
    assert batch(relay, check(bob, START_US), check(alice), check(bob, START_US)) == [
        NOTHING, ("Forbidden", 0), NOTHING]
    assert answer_datagram(relay, json.dumps(check(alice)).encode(), SOURCE) is None
    assert answer_datagram(relay, json.dumps(check(bob, START_US)).encode(), SOURCE) == json.dumps(NOTHING).encode()


def test_denied_mailbox_costs_its_key_nothing(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(Access({KEY: Quota("keys.alice", requests_per_day=1)}, None, denied_boxes=frozenset((alice.box,))))
    assert ask(relay, check(alice, ext=KEY), check(bob, ext=KEY)) == [FORBIDDEN, NOTHING]


def test_denied_source_gets_health_alone(tmp_path: Path, make: Make, alice: Owner) -> None:
    with serving(make(denying(tmp_path, "127.0.0.0/8"))) as server:
        port = server.server_port
        assert post(port, check(alice))[0] == 403
        for path in ("/", "/metrics"):
            status, _, text = get(port, path)
            assert (status, refusal_in(json.loads(text))) == (403, ("Forbidden", 0))
        status, _, text = get(port, "/health")
        assert (status, json.loads(text)) == (200, OK)


def test_denied_source_gets_no_datagram(tmp_path: Path, make: Make, alice: Owner) -> None:
    relay = make(denying(tmp_path, "127.0.0.0/8"))
    with serving(relay, udp=True, stun=True) as server, datagrams_to(server.server_port) as client:
        client.send(json.dumps(check(alice)).encode())
        client.send(binding_request())
        assert eventually(lambda: relay.counts.taken()["connectoid_datagrams_total", "none"] == 2)
        assert not select.select([client], [], [], 0)[0]


@pytest.mark.parametrize(("line", "words"), [
    ("10.0.0.1/8", "write 10.0.0.0/8"), ("2001:db8::1/32", "write 2001:db8::/32"), ("192.0.2.256", "write an address"),
    ("192.0.2.1-9", "write an address"), ("192.0.2.0/33", "write an address"), ("example.org", "write an address"),
    ("192.0.2.1 192.0.2.2", "write an address"), ("1", "write an address"), ("A" * 66, "write an address"),
    (Owner(1).pub[:-1], "write an address"), (Owner(1).pub + "A", "write an address"),
    ("x" * 9_999, "write an address")], ids=lambda text: text[:20])
def test_mistake_in_a_deny_list_is_told_in_one_line_with_its_place(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        denying(tmp_path, "# first", "192.0.2.1", f" {line} # why", "nonsense")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'deny.txt'}, line 3: {line[:80]!r} is no address, network or mailbox; ")
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(tmp_path)) + 250


def test_process_reads_the_deny_list_again(start: Callable[..., Process], tmp_path: Path, alice: Owner) -> None:
    def deny(text: str) -> None:
        (tmp_path / "deny.txt").write_text(text)
        process.popen.send_signal(signal.SIGHUP)

    (tmp_path / "deny.txt").write_text("192.0.2.0/24\n")
    process = start("--db", ":memory:", "--deny", "deny.txt")
    assert post(process.port, check(alice)) == (200, NOTHING)
    deny(f"127.0.0.0/8\n{alice.pub}\n")
    assert eventually(lambda: post(process.port, check(alice))[0] == 403)
    assert get(process.port, "/health")[0] == 200
    assert next_log_line(process) == "connectoid relay: read the files again\n"
    deny("192.0.2.0/24\n\n127.0.0.1/8\n")
    assert next_log_line(process) == ("connectoid relay: deny.txt, line 3: '127.0.0.1/8' is no address, network or"
                                      " mailbox; write 127.0.0.0/8; all stays as it was\n")
    assert post(process.port, check(alice))[0] == 403
    (tmp_path / "deny.txt").unlink()
    process.popen.send_signal(signal.SIGHUP)
    assert next_log_line(process) == ("connectoid relay: deny.txt: No such file or directory; give a file that the"
                                      " relay may read;"
                                      " all stays as it was\n")
    assert post(process.port, check(alice))[0] == 403
    deny("")
    assert eventually(lambda: post(process.port, check(alice))[0] == 200)
    code, _ = process.stop()
    assert code == 0


# ---------------------------------------------------------------------------------------
# Trusted proxies: whose request it is.
# ---------------------------------------------------------------------------------------


def networks(*texts: str) -> Networks:
    """Return a set of networks."""
    return Networks(ipaddress.ip_network(text) for text in texts)


TRUSTED = networks("10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.1/32")


@pytest.mark.parametrize(("peer", "forwarded_for", "client"), [
    ("192.0.2.9", "", "192.0.2.9"),
    ("192.0.2.9", "203.0.113.1", "192.0.2.9"),  # forged: nobody trusts this peer
    ("192.0.2.9", "10.0.0.1", "192.0.2.9"),
    ("10.0.0.1", "", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1", "203.0.113.1"),
    ("192.0.2.1", "  203.0.113.1\t", "203.0.113.1"),
    ("10.0.0.1", "198.51.100.1, 203.0.113.1", "203.0.113.1"),  # the client wrote the first itself
    ("10.0.0.1", "10.0.0.3,203.0.113.1", "203.0.113.1"),
    ("10.0.0.1", "198.51.100.1,203.0.113.1, 10.0.0.2 ,192.0.2.1", "203.0.113.1"),  # several hops of ours
    ("10.0.0.1", "10.0.0.4, 10.0.0.3, 10.0.0.2", "10.0.0.4"),  # all are ours: the first is the client
    ("10.0.0.1", "2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002::/64"),
    ("10.0.0.1", "2001:db8:1:2::9", "2001:0db8:0001:0002::/64"),
    ("10.0.0.1", "::ffff:203.0.113.1", "203.0.113.1"),
    ("10.0.0.1", "203.0.113.1, ::ffff:10.0.0.2", "203.0.113.1"),
    ("::ffff:10.0.0.1", "203.0.113.1", "203.0.113.1"),
    ("::ffff:192.0.2.9", "203.0.113.1", "192.0.2.9"),
    ("2001:db8:ffff::1", "203.0.113.1", "203.0.113.1"),
    ("2001:db8:fffe::1", "203.0.113.1", "2001:0db8:fffe:0000::/64"),
    # What is no address tells nothing; so whoever handed it to us is the source.
    ("10.0.0.1", "unknown", "10.0.0.1"),
    ("10.0.0.1", "_hidden", "10.0.0.1"),
    ("10.0.0.1", ",", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1,", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1:4711", "10.0.0.1"),
    ("10.0.0.1", "[2001:db8:1::1]:443", "10.0.0.1"),
    ("10.0.0.1", "[2001:db8:1::1]", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1/32", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.01", "10.0.0.1"),
    ("10.0.0.1", '"203.0.113.1"', "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1 10.0.0.2", "10.0.0.1"),
    ("10.0.0.1", "203.0.113.1, garbage, 10.0.0.2", "10.0.0.2"),
    ("10.0.0.1", "203.0.113.1,,10.0.0.2", "10.0.0.2"),
    ("10.0.0.1", "unknown, 203.0.113.1", "203.0.113.1"),
    ("", "203.0.113.1", ""),
])
def test_client_is_the_last_address_that_no_trusted_proxy_has(peer: str, forwarded_for: str, client: str) -> None:
    assert client_of(peer, forwarded_for, TRUSTED) == client
    assert client_of(peer, forwarded_for, networks()) == source_of(peer)


@given(peer=st.text() | st.ip_addresses().map(str), hops=st.lists(st.text() | st.ip_addresses().map(str)))
@example("10.0.0.1", ["fe80::1%x"]).via("a zone")
@example("10.0.0.1", ["\ud800", "\0"]).via("what no address holds")
def test_client_is_found_in_any_text(peer: str, hops: list[str]) -> None:
    everywhere = networks("0.0.0.0/0", "::/0")
    for proxies in (networks(), TRUSTED, everywhere):
        assert isinstance(client_of(peer, ",".join(hops), proxies), str)


@given(st.lists(st.tuples(st.ip_addresses(), st.integers(0, 128))), st.lists(st.ip_addresses()))
def test_networks_hold_what_ipaddress_says(
        chosen: list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]],
        addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
    some = [ipaddress.ip_network(f"{address}/{min(bits, address.max_prefixlen)}", strict=False)
            for address, bits in chosen]
    asked = [address for address in (*addresses, *(address for address, _ in chosen))
             if not getattr(address, "ipv4_mapped", None)]
    assert [str(address) in Networks(some) for address in asked] == [
        any(address in network for network in some) for address in asked]


def test_trusted_proxy_is_read_from_mapped_addresses_too(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:", "--rate", "1", "--host", "127.0.0.1", "--trusted-proxy", "::ffff:127.0.0.1")
    assert [forwarded(process.port, check(alice), f"203.0.113.{number}")[0] for number in range(3)] == [200] * 3


def forwarded(port: int, request: object, *hops: str) -> tuple[int, Any]:
    """Post a request with an X-Forwarded-For header for each of the hops."""
    octets = http_request(json.dumps(request).encode(), *(f"X-Forwarded-For: {hop}" for hop in hops))
    status, _, body = parse_response(exchange(port, octets))
    return status, json.loads(body)


def test_rates_behind_a_trusted_proxy_are_those_of_its_clients(make: Make, alice: Owner) -> None:
    with serving(make(rate=2), proxies=networks("127.0.0.0/8")) as server:
        port = server.server_port

        def statuses(*hops: str) -> list[int]:
            return [forwarded(port, check(alice), *hops)[0] for _ in range(3)]

        assert statuses("203.0.113.1") == [200, 200, 429]
        assert statuses("203.0.113.2") == [200, 200, 429]
        assert statuses("203.0.113.3", "203.0.113.1") == [429] * 3  # two headers are one list, in their order
        assert statuses("203.0.113.1, 203.0.113.3", "127.0.0.7") == [200, 200, 429]
        assert statuses("2001:db8::1") == [200, 200, 429]
        assert statuses("2001:db8::2") == [429] * 3
        assert statuses("garbage") == [200, 200, 429]
        assert statuses() == [429] * 3  # the proxy itself
        for path in ("/", "/metrics"):
            assert get(port, path, "X-Forwarded-For: 203.0.113.1")[0] == 429
            assert get(port, path, f"x-forwarded-for: 198.51.100.{len(path)}")[0] == 200


def test_header_of_a_proxy_that_nobody_trusts_is_ignored(make: Make, alice: Owner) -> None:
    with serving(make(rate=2), proxies=networks("192.0.2.0/24")) as server:
        assert [forwarded(server.server_port, check(alice), f"203.0.113.{number}")[0] for number in range(3)] == [
            200, 200, 429]


def test_deny_list_holds_for_clients_of_a_proxy_and_not_for_the_proxy(
        tmp_path: Path, make: Make, alice: Owner) -> None:
    access = denying(tmp_path, "203.0.113.1", "127.0.0.0/8")
    with serving(make(access), proxies=networks("127.0.0.0/8")) as server:
        port = server.server_port
        assert [forwarded(port, check(alice), *hops)[0] for hops in (
            ("203.0.113.1",), ("203.0.113.2",), ("203.0.113.1, 203.0.113.2",), ())] == [403, 200, 200, 403]


@contextlib.contextmanager
def connected(port: int, count: int) -> Iterator[list[int]]:
    """Hold connections, each after a reply; yield their statuses."""
    request = http_request(b"", method="GET", path="/health").replace(b"Connection: close\r\n", b"")
    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SLOWLY))
            client.sendall(request)
            statuses.append(int(client.recv(65_536).split()[1]))
        yield statuses


@pytest.mark.parametrize(("proxies", "allowed"), [((), 2), (("127.0.0.0/8",), 4)], ids=["stranger", "proxy"])
def test_proxy_may_have_all_connections_and_no_more(make: Make, proxies: Sequence[str], allowed: int) -> None:
    relay = make(max_connections=4, max_connections_per_source=2)
    with serving(relay, proxies=networks(*proxies)) as server:
        with connected(server.server_port, allowed) as statuses:
            assert statuses == [200] * allowed
            assert get(server.server_port, "/health", "X-Forwarded-For: 203.0.113.1")[0] == 503
        assert eventually(lambda: get(server.server_port, "/health")[0] == 200)


# ---------------------------------------------------------------------------------------
# Metrics, read by Prometheus's own parser.
# ---------------------------------------------------------------------------------------


def read_metrics(text: str) -> dict[tuple[str, str], float]:
    """Return the values by name and label; have types and labels be those of the table."""
    values: dict[tuple[str, str], float] = {}
    seen = []
    for family in text_string_to_metric_families(text):
        name = family.name + "_total" * (family.type == "counter")
        metric = METRICS[name]
        assert (family.type, family.documentation) == (metric.type, metric.meaning)
        seen.append(name)
        for sample in family.samples:
            assert sample.name == name
            assert list(sample.labels) == ([metric.label] if metric.label else [])
            values[name, "".join(sample.labels.values())] = sample.value
    assert seen == [name for name in METRICS if name in seen]
    assert len(values) == len([line for line in text.splitlines() if not line.startswith("#")])
    return values


def metrics_of(port: int) -> dict[tuple[str, str], float]:
    """Return the metrics of a server."""
    status, headers, text = get(port, "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert headers["access-control-allow-origin"] == "*"
    return read_metrics(text)


def total(name: str, **values: int) -> dict[tuple[str, str], int]:
    """Return a counter with what is not 0 in it."""
    metric = METRICS[f"connectoid_{name}_total"]
    by_value = {value.lower().replace(" ", "_"): value for value in metric.values}
    assert values.keys() <= by_value.keys()
    return {(f"connectoid_{name}_total", value): values.get(small, 0) for small, value in by_value.items()}


def test_metrics_count_what_was_asked(make: Make, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    relay = make(Access({KEY: Quota("keys.alice", requests_per_day=9)}, None, denied_boxes=frozenset((bob.box,))))
    with serving(relay, udp=True, stun=True) as server:
        port = server.server_port
        for _ in range(2):
            assert post(port, send(alice, ext=KEY)) == (200, OK)
        _, reply = post(port, check(alice, ext=KEY))
        assert post(port, receive(alice, alice.open(reply["question"]), ext=KEY, limit=9))[0] == 200
        assert post(port, receive(alice, "no", ext=KEY))[0] == 403
        assert post(port, [check(alice, START_US + 9, ext=KEY)] * 3 + [check(bob, ext=KEY), 1])[0] == 200
        assert post(port, [check(alice, START_US + 9, ext=KEY)] * 2)[1][1]["error"] == "Too often"
        assert post(port, check(alice))[0] == 403
        assert post(port, b"{")[0] == 400
        assert post(port, {"action": "KEY"})[0] == 400
        assert post(port, send(alice, "A" * (MAX_DATA_CHARS + 1), ext=KEY))[0] == 429
        for path, method, status in (("/none", "GET", 404), ("/", "PUT", 405), ("/metrics", "POST", 405)):
            assert get(port, path, method=method)[0] == status
        assert exchange(port, b"G\0").startswith(b"HTTP/1.1 400 ")
        replies = over_udp(port, json.dumps(check(alice)).encode(), b"junk", binding_request(), binding_request(0x11))
        assert len(replies) == 2
        clock.advance(50)
        values = metrics_of(port)
    assert 0 <= values.pop(("connectoid_sweep_age_seconds", "")) <= 50  # the sweeper has its own pace
    assert values == {
        **total("requests", send=3, check=8, receive=2),
        **total("refusals", bad_request=4, forbidden=2, wrong_answer=1, too_often=2, not_found=1, not_allowed=2),
        **total("datagrams", check=2, stun=1, none=2),
        **total("handshakes"),
        ("connectoid_questions_total", ""): 1,
        ("connectoid_messages", ""): 2, ("connectoid_message_bytes", ""): 2 * MIN_COUNTED_BYTES,
        ("connectoid_boxes", ""): 1, ("connectoid_healthy", ""): 1, ("connectoid_uptime_seconds", ""): 50,
        ("connectoid_connections", ""): 1, ("connectoid_waiting_boxes", ""): 0,
        ("connectoid_queued_requests", ""): 0, ("connectoid_info", __version__): 1,
        **{("connectoid_limit", name): number for name, number in Limits()._asdict().items()},
    }


def test_metrics_are_all_of_the_table_and_tell_of_nobody(make: Make, alice: Owner) -> None:
    relay = make(alices())
    with serving(relay, proxies=networks("127.0.0.0/8")) as server:
        for request in (send(alice, ext=KEY), check(alice, ext=KEY), check(alice)):
            forwarded(server.server_port, request, "203.0.113.77")
        _, _, text = get(server.server_port, "/metrics")
    assert {name for name, _ in read_metrics(text)} == set(METRICS)
    assert [secret for secret in (alice.pub, KEY, "203.0.113", "127.0.0", "keys.alice", "QUJD") if secret in text] == []


def test_metrics_answer_get_and_head_alone(make: Make) -> None:
    with serving(make()) as server:
        status, headers, text = get(server.server_port, "/metrics")
        assert (status, int(headers["content-length"])) == (200, len(text))
        assert text.endswith("\n")
        head = get(server.server_port, "/metrics", method="HEAD")
        assert (head[0], head[2]) == (200, "")
        assert {**head[1], "content-length": ""} == {**headers, "content-length": ""}
        assert get(server.server_port, "/metrics?since=1")[0] == 200
        status, headers, text = get(server.server_port, "/metrics", method="POST")
        assert (status, headers["allow"], json.loads(text)) == (
            405, "GET, HEAD, OPTIONS", {"ok": False, "error": "Not allowed"})


@pytest.mark.parametrize("path", ["/", "/metrics"])
@pytest.mark.parametrize("accept", ["text/html", "application/json"])
def test_pages_count_against_the_rate_of_their_source(make: Make, alice: Owner, path: str, accept: str) -> None:
    with serving(make(rate=2)) as server:
        port = server.server_port
        assert [get(port, path, f"Accept: {accept}")[0] for _ in range(3)] == [200, 200, 429]
        status, reply = post(port, check(alice))
        assert (status, refusal_in(reply)) == (429, ("Too often", 60))
        assert get(port, "/health")[0] == 200


def test_metrics_are_told_while_the_store_fails(make: Make, clock: FakeClock) -> None:
    watched = FailingStore()
    relay = make(None, watched.store)
    of_the_store = {"connectoid_messages", "connectoid_message_bytes", "connectoid_boxes"}
    with serving(relay) as server:
        assert metrics_of(server.server_port)["connectoid_healthy", ""] == 1
        watched.failing = True
        clock.advance(5)
        values = metrics_of(server.server_port)
        assert values["connectoid_healthy", ""] == 0
        assert {name for name, _ in values} == set(METRICS) - of_the_store
        watched.failing = False
        clock.advance(5)
        values = metrics_of(server.server_port)
        assert (values["connectoid_healthy", ""], values["connectoid_boxes", ""]) == (1, 0)


def test_sweep_age_and_uptime_are_of_the_relays_time(make: Make, clock: FakeClock) -> None:
    relay = make()
    clock.advance(61)
    relay.sweep()
    clock.advance(59.5)
    samples = relay.samples()
    assert [samples[f"connectoid_{name}", ""] for name in ("sweep_age_seconds", "uptime_seconds", "healthy")] == [
        59, 120, 1]
    clock.advance(1)
    assert relay.samples()["connectoid_healthy", ""] == 0  # nobody sweeps


def test_waiting_boxes_and_connections_are_counted_while_they_last(make: Make, alice: Owner, bob: Owner) -> None:
    def gauges() -> tuple[float, float]:
        values = metrics_of(server.server_port)
        return values["connectoid_waiting_boxes", ""], values["connectoid_connections", ""]

    with serving(make(rate=0)) as server:
        assert gauges() == (0, 1)
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=SLOWLY) as one:
            one.sendall(http_request(json.dumps(check(alice, wait=60)).encode()))
            assert eventually(lambda: gauges() == (1, 2))
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=SLOWLY) as many:
                many.sendall(http_request(json.dumps([check(alice, wait=60), check(bob, wait=60)]).encode()))
                assert eventually(lambda: gauges() == (3, 3))
        assert eventually(lambda: gauges() == (0, 1))


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
    assert page.count(html.escape(MARKUP)) == 5  # the name stands in the title too
    tags = re.compile(r"<(/?[a-zA-Z]+)")
    added = ["aside", "/aside", "dt", "dd", "dt", "dd"]
    assert sorted(tags.findall(page)) == sorted([*tags.findall(plain), *added])
    assert links_in(page) == []


@pytest.mark.parametrize("about", [About(), About("n", "m@example.org", "notice", "https://example.org/")], ids=len)
def test_page_loads_and_runs_nothing(make: Make, about: About) -> None:
    page = page_of(make(about=about), udp=True, stun=True).lower()
    for loading in ("<script", "src=", "<link", "@import", "url(", "<iframe", "<form", "<base", "<object", "<embed",
                    "http-equiv", "javascript:", "srcset"):
        assert loading not in page, loading
    assert not re.search(r"\son\w+\s*=", page)
    assert page.count("http") == (about.price_url is not None)


@pytest.mark.parametrize(("contact", "shown"), [
    ("me@example.org", '<a href="mailto:me@example.org" rel="noreferrer">me@example.org</a>'),
    ("mailto:me@example.org", '<a href="mailto:me@example.org" rel="noreferrer">me@example.org</a>'),
    ("https://example.org/?a=1&b=2",
     '<a href="https://example.org/?a=1&amp;b=2" rel="noreferrer">https://example.org/?a=1&amp;b=2</a>'),
    ("http://example.org", '<a href="http://example.org" rel="noreferrer">http://example.org</a>'),
    ('https://x/"onclick="y', '<a href="https://x/&quot;onclick=&quot;y" rel="noreferrer">'
                              "https://x/&quot;onclick=&quot;y</a>"),
    ("javascript:alert(1)", "javascript:alert(1)"),
    ("JavaScript:alert(1)//me@example.org", "JavaScript:alert(1)//me@example.org"),
    ("data:text/html,<b>", "data:text/html,&lt;b&gt;"),
    ("javascript:alert(1)\nhttps://example.org", "javascript:alert(1)\nhttps://example.org"),
    ("+49 30 901820", "+49 30 901820"),
    ("write to me@example.org", "write to me@example.org"),
    ("//example.org", "//example.org"),
    ("@me:example.org", "@me:example.org")])
def test_contact_is_a_link_if_it_can_be_one_without_harm(make: Make, contact: str, shown: str) -> None:
    page = page_of(make(about=About(contact=contact)))
    assert f"<dt>Contact<dd>{shown}\n" in page
    assert len(links_in(page)) == shown.count("<a ")


@pytest.mark.parametrize("about", [About(), About(contact="", notice="", price_url="")], ids=["none", "empty"])
def test_page_leaves_out_what_the_host_does_not_say(make: Make, about: About) -> None:
    page = page_of(make(about=about))
    assert [word for word in ("Contact", "Prices", "<aside", "None") if word in page] == []


def test_page_tells_prices_and_notice(make: Make) -> None:
    page = page_of(make(about=About("Relay of the club", notice="Moves on\nMonday.", price_url="https://x.example/p")))
    assert '<dt>Prices<dd><a href="https://x.example/p" rel="noreferrer">What this relay costs</a>\n' in page
    assert '<aside aria-label="Notice">Moves on\nMonday.</aside>' in page
    assert "<title>Relay of the club</title>" in page
    assert "<h1>Relay of the club</h1>" in page


def test_page_tells_how_the_relay_is(make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = FailingStore()
    relay = make(None, watched.store, rate=0, max_connections=0, max_bytes=3 << 19, max_box_bytes=1 << 20,
                 max_boxes=1_000_000, max_box_messages=1_000, message_ttl_s=5_400, box_ttl_s=90_000)
    assert ask(relay, send(alice), send(alice), send(alice)) == [OK] * 3
    clock.advance(59)
    page = page_of(relay, udp=True)
    assert '<strong class="well">All is well.</strong> Up for 59 seconds.' in page
    told = told_on(page)
    assert {name: told[name] for name in told if name != "Size of a message"} == {
        "Messages": "3", "Storage": "1.5 KiB of 1.5 MiB", "Mailboxes with a proven owner": "0 of 1,000,000",
        "Requests from one address": "no limit", "Connections at a time": "no limit",
        "A message is kept": "1 hour 30 minutes, unless an API key says otherwise",
        "Messages in a mailbox": "1,000, at most 1 MiB", "An unused mailbox is kept": "1 day 1 hour",
        "Checks over UDP": "on", "STUN": "off", "Software": f"connectoid_relay {__version__}"}
    clock.advance(2)
    assert '<strong class="ill">Not well: The sweeper has stopped.</strong> Up for 1 minute 1 second.' in page_of(relay)
    relay.sweep()
    watched.failing = True
    clock.advance(5)
    page = page_of(relay)
    assert '<strong class="ill">Not well: The store cannot be read or written.</strong>' in page
    told = told_on(page)
    assert [told[name] for name in ("Messages", "Storage", "Mailboxes with a proven owner")] == [
        "unknown", "unknown of 1.5 MiB", "unknown of 1,000,000"]


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


def test_page_is_sent_while_the_store_fails(make: Make, clock: FakeClock) -> None:
    watched = FailingStore()
    with serving(make(None, watched.store)) as server:
        watched.failing = True
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


def test_traffic_of_a_relay_is_its_requests_by_minute(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make()
    for requests in (3, 0, 2):
        ask(relay, *[check(alice)] * requests, {"action": "none"})
        for _ in range(2):
            relay.sweep()
            clock.advance(30)
    assert relay.traffic() == [3, 0, 2]
    assert "Requests per minute: 3 at most" in page_of(relay)


def bars_in(picture: str) -> dict[int, int]:
    """Return the heights of the bars by their place."""
    found = re.search(r'<path d="([^"]*)"/>', picture)
    assert found is not None
    bars = re.findall(r"M(\d+) 72v-(\d+)h8v\2z", found[1])
    assert "".join(f"M{x} 72v-{height}h8v{height}z" for x, height in bars) == found[1]
    return {int(x): int(height) for x, height in bars}


@pytest.mark.parametrize(("traffic", "words", "bars"), [
    ([], "No requests in the last 60 minutes", {}),
    ([0], "No requests in the last 60 minutes", {590: 1}),
    ([0] * 60, "No requests in the last 60 minutes", {10 * x: 1 for x in range(60)}),
    ([1], "Requests per minute: 1 at most", {590: 10}),
    ([0, 10], "Requests per minute: 10 at most", {580: 1, 590: 72}),
    ([0] * 59 + [1_234_567], "Requests per minute: 1,234,567 at most", {10 * x: 1 for x in range(59)} | {590: 72}),
    ([1_000_000] + [1] * 59, "Requests per minute: 1,000,000 at most", {0: 72} | {10 * x: 3 for x in range(1, 60)}),
    ([10**12] * 7 + [10] * 60, "Requests per minute: 10 at most", {10 * x: 72 for x in range(60)}),
], ids=lambda value: str(value)[:20])
def test_bars_fit_their_picture(traffic: list[int], words: str, bars: dict[int, int]) -> None:
    picture = _bars(traffic)
    assert bars_in(picture) == bars
    assert f"<figcaption>{words}</figcaption>" in picture
    assert f'aria-label="{words}. One bar a minute."' in picture


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "0 seconds"), (1, "1 second"), (59, "59 seconds"), (60, "1 minute"), (61, "1 minute 1 second"),
    (3_599, "59 minutes 59 seconds"), (3_600, "1 hour"), (3_601, "1 hour 1 second"), (7_262, "2 hours 1 minute"),
    (86_399, "23 hours 59 minutes"), (86_400, "1 day"), (90_061, "1 day 1 hour"), (30 * 86_400, "30 days"),
    (MAX_SETTING, "11,574,074 days 1 hour")])
def test_span_is_told_in_two_units(seconds: int, words: str) -> None:
    assert _span(seconds) == words


@pytest.mark.parametrize(("octets", "words"), [
    (0, "0 bytes"), (2, "2 bytes"), (1_023, "1023 bytes"), (1_024, "1 KiB"), (1_536, "1.5 KiB"),
    ((1 << 20) - 1, "1024 KiB"), (1 << 20, "1 MiB"), (1 << 30, "1 GiB"), (1 << 40, "1 TiB"), (3 << 50, "3072 TiB"),
    (MAX_SETTING, "931.3 GiB")])
def test_size_is_told_in_the_largest_unit(octets: int, words: str) -> None:
    assert _size(octets) == words


# ---------------------------------------------------------------------------------------
# STUN: bytes by hand from RFC 8489, addresses from RFC 5769, and two clients of others.
# ---------------------------------------------------------------------------------------

COOKIE = bytes.fromhex("2112a442")
TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")  # of all samples in RFC 5769
LAST = TRANSACTION[::-1]
IPV6 = "2001:db8:1234:5678:11:2233:4455:6677"
# RFC 5769, sections 2.2 and 2.3: the attribute XOR-MAPPED-ADDRESS for port 32853.
MAPPED_IPV4 = bytes.fromhex("0020 0008 0001 a147 e112a643")
MAPPED_IPV6 = bytes.fromhex("0020 0014 0002 a147 0113a9fa a5d3f179 bc25f4b5 bed2b9d9")


def binding_request(kind: int = 0x0001, attributes: bytes = b"", *, transaction: bytes = TRANSACTION,
                    cookie: bytes = COOKIE, length: int | None = None) -> bytes:
    """Return a STUN message, a Binding request if nothing else is asked for."""
    size = len(attributes) if length is None else length
    return kind.to_bytes(2, "big") + size.to_bytes(2, "big") + cookie + transaction + attributes


def attribute(kind: int, value: bytes = b"", padding: bytes = b"\0") -> bytes:
    """Return an attribute, padded to four bytes."""
    return struct.pack(">HH", kind, len(value)) + value + padding * (-len(value) % 4)


SOFTWARE = attribute(0x8022, b"STUN test client", b" ")


@contextlib.contextmanager
def datagrams_to(port: int, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """Connect a socket of datagrams."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(SLOWLY)
        client.connect((host, port))
        yield client


def over_udp(port: int, *datagrams: bytes, checks: bool = True) -> list[bytes]:
    """Send datagrams, and one that is answered, a check or else STUN; return the replies up to then."""
    last = json.dumps(check(Owner(99), id="-last-")).encode() if checks else binding_request(transaction=LAST)
    replies: list[bytes] = []
    with datagrams_to(port) as client:
        for datagram in (*datagrams, last):
            client.send(datagram)
        while not replies or (b"-last-" if checks else LAST) not in replies[-1]:
            replies.append(client.recv(65_536))
    return replies[:-1]


@pytest.mark.parametrize(("address", "mapped"), [
    ("192.0.2.1", MAPPED_IPV4), ("::ffff:192.0.2.1", MAPPED_IPV4), (IPV6, MAPPED_IPV6), (f"{IPV6}%eth0", MAPPED_IPV6)])
@pytest.mark.parametrize("attributes", [
    b"", SOFTWARE, attribute(0x8022, b"odd"), attribute(0x8028, b"\xe5\x7a\x3b\xcf"), attribute(0xffff),
    SOFTWARE + attribute(0x8029, bytes(8)) + attribute(0x8000, b"x" * 1_900)], ids=len)
def test_binding_request_gets_its_address(address: str, mapped: bytes, attributes: bytes) -> None:
    request = binding_request(attributes=attributes)
    assert is_stun(request)
    header = bytes.fromhex("0101") + len(mapped).to_bytes(2, "big") + COOKIE + TRANSACTION
    assert answer_stun(request, address, 32_853) == header + mapped


# RFC 5769, section 2.1: a request of ICE, with attributes that must be understood.
ICE_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff80290008932f"
    "f9b151263b36000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf")

UNANSWERED: dict[str, bytes] = {
    "indication": binding_request(0x0011), "success": binding_request(0x0101), "error": binding_request(0x0111),
    "allocate": binding_request(0x0003), "shared secret": binding_request(0x0002), "method 0": binding_request(0x0000),
    "high method": binding_request(0x2001), "length 4 and no attribute": binding_request(length=4),
    "length 0 and an attribute": binding_request(attributes=SOFTWARE, length=0),
    "length too short": binding_request(attributes=SOFTWARE, length=len(SOFTWARE) - 4),
    "length too long": binding_request(attributes=SOFTWARE, length=len(SOFTWARE) + 4),
    "attribute without value": binding_request(attributes=SOFTWARE[:4]),
    "attribute cut off": binding_request(attributes=SOFTWARE[:-4]),
    "attribute header cut off": binding_request(attributes=SOFTWARE + b"\x80\x22"),
    "padding missing": binding_request(attributes=attribute(0x8022, b"odd", b"")),
    "byte too many": binding_request(attributes=SOFTWARE + b"\0"),
    "change request": binding_request(attributes=attribute(0x0003, bytes(4))),
    "attribute 0": binding_request(attributes=attribute(0x0000)),
    "last that must be understood": binding_request(attributes=attribute(0x7fff)),
    "must be understood, behind": binding_request(attributes=SOFTWARE + attribute(0x0024, bytes(4))),
    "ice": ICE_REQUEST,
}


@pytest.mark.parametrize("name", UNANSWERED)
def test_stun_that_is_no_plain_binding_request_gets_nothing(name: str) -> None:
    assert is_stun(UNANSWERED[name])
    assert answer_stun(UNANSWERED[name], "192.0.2.1", 32_853) is None


@pytest.mark.parametrize("datagram", [
    b"", b"\0", binding_request()[:19], binding_request(cookie=bytes(4)), binding_request(cookie=COOKIE[::-1]),
    *(bytes([first]) + binding_request()[1:] for first in (0x40, 0x80, 0xc0, 0xff)),
    b'{"action": "check", "pub": "A"}'])
def test_what_is_not_stun_is_told_apart(datagram: bytes) -> None:
    assert not is_stun(datagram)


@given(st.integers(0, 0x3fff), st.binary(max_size=64), st.integers(0, 70) | st.none(),
       st.sampled_from(["192.0.2.1", "::1", "::ffff:192.0.2.1", "fe80::1%eth0"]), st.integers(0, 65_535))
def test_any_stun_gets_a_short_reply_or_none(
        kind: int, attributes: bytes, length: int | None, address: str, port: int) -> None:
    datagram = binding_request(kind, attributes, length=length)
    assert is_stun(datagram)
    reply = answer_stun(datagram, address, port)
    if reply is not None:
        assert (kind, len(reply)) == (1, 44 if address in ("::1", "fe80::1%eth0") else 32)
        assert stun.parse_message(reply).attributes["XOR-MAPPED-ADDRESS"][1] == port


@given(st.lists(st.tuples(st.integers(0x8000, 0xffff), st.binary(max_size=20))))
def test_any_optional_attributes_are_ignored(attributes: list[tuple[int, bytes]]) -> None:
    request = binding_request(attributes=b"".join(attribute(kind, value) for kind, value in attributes))
    assert answer_stun(request, "192.0.2.1", 32_853) == answer_stun(binding_request(), "192.0.2.1", 32_853)


@pytest.mark.parametrize(("fronts", "replies"), [
    ({"udp": True}, ["check"]), ({"stun": True}, ["stun"]), ({"udp": True, "stun": True}, ["stun", "check"])], ids=str)
def test_server_answers_of_checks_and_stun_what_it_was_asked_to(
        make: Make, alice: Owner, fronts: dict[str, bool], replies: list[str]) -> None:
    relay = make()
    datagrams = (*UNANSWERED.values(), b"", b"\0", binding_request(), json.dumps(check(alice)).encode())
    with serving(relay, **fronts) as server:
        document = document_of(server.server_port)
        assert (document["udp"], document["stun"]) == ("udp" in fronts, "stun" in fronts)
        kinds = ["stun" if is_stun(reply) else "check" for reply in over_udp(
            server.server_port, *datagrams, checks="udp" in fronts)]
    assert kinds == replies
    counted = relay.counts.taken()
    assert {kind: counted["connectoid_datagrams_total", kind] for kind in ("check", "stun", "none")} == {
        "check": 2 * ("udp" in fronts), "stun": 1 + ("udp" not in fronts) if "stun" in fronts else 0,
        "none": len(datagrams) - len(replies)}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_stun_over_a_socket_tells_the_clients_own_address(make: Make, host: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    relay = make()
    with serving_on("" if socket.has_dualstack_ipv6() else host, relay) as port, datagrams_to(port, host) as client:
        request = stun.Message(stun.Method.BINDING, stun.Class.REQUEST, attributes={"SOFTWARE": "aioice"})
        request.add_fingerprint()
        client.send(bytes(request))
        reply = stun.parse_message(client.recv(2_048))
        assert (reply.message_method, reply.message_class, reply.transaction_id, reply.attributes) == (
            stun.Method.BINDING, stun.Class.RESPONSE, request.transaction_id,
            {"XOR-MAPPED-ADDRESS": client.getsockname()[:2]})


@contextlib.contextmanager
def serving_on(host: str, relay: Relay) -> Iterator[int]:
    """Serve STUN on an interface; yield the port."""
    with running(RelayServer((host, 0), relay, stun=True)) as server:
        yield server.server_port


def test_stun_answers_the_client_of_coturn(make: Make) -> None:
    program = shutil.which("turnutils_stunclient")
    if program is None:
        pytest.skip("turnutils_stunclient (of coturn) is not installed")
    with serving(make(), stun=True) as server:
        finished = subprocess.run([program, "-p", str(server.server_port), "127.0.0.1"], capture_output=True, text=True,
                                  timeout=SLOWLY, check=False)
    assert finished.returncode == 0, finished
    assert re.search(r"UDP reflexive addr: 127\.0\.0\.1:\d+", finished.stdout)


@pytest.mark.parametrize("rate", [600, 0])
def test_stun_has_its_part_of_the_budget_of_datagrams(make: Make, clock: FakeClock, alice: Owner, rate: int) -> None:
    relay = make(max_udp=3, rate=rate)
    with serving(relay, udp=True, stun=True) as server, datagrams_to(server.server_port) as client:
        def count_of(*datagrams: bytes) -> int:
            before = sum(counted().values())
            for datagram in datagrams:
                client.send(datagram)
            assert eventually(lambda: sum(counted().values()) == before + len(datagrams))
            replies = 0
            while select.select([client], [], [], 0)[0]:
                client.recv(2_048)
                replies += 1
            return replies

        def counted() -> dict[str, int]:
            taken = relay.counts.taken()
            return {kind: taken["connectoid_datagrams_total", kind] for kind in ("check", "stun", "none")}

        ask_ = json.dumps(check(alice)).encode()
        assert count_of(binding_request(), ask_, binding_request()) == 3
        assert count_of(binding_request(), ask_) == (0 if rate else 2)
        clock.advance(1)
        assert count_of(*[binding_request()] * 4) == (3 if rate else 4)


# ---------------------------------------------------------------------------------------
# The store: files of older relays, and the numbers that it keeps for hosts.
# ---------------------------------------------------------------------------------------


def old_file(path: Path, owner: Owner, messages: int) -> None:
    """Make a file as the first relay did, with messages and the box row of an owner."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for sql in (*SCHEMA[0], "PRAGMA user_version = 1"):
            db.execute(sql)
        for number in range(messages):
            db.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?)", (
                START_US + number, owner.box, START_US + 3_600_000_000 + number, b"s" * 16, 4, f"QUJ{number}"))
        db.execute("INSERT INTO boxes VALUES (?, ?)", (owner.box, START_US + 30 * DAY_US))
        db.execute("UPDATE relay SET time_us = ?, last_at = ?, bytes = ?, boxes = 1", (
            START_US, START_US + messages - 1, messages * MIN_COUNTED_BYTES))


def test_file_of_the_first_schema_is_taken_over_with_all_that_is_in_it(
        tmp_path: Path, clock: FakeClock, alice: Owner, bob: Owner) -> None:
    path = tmp_path / "relay.db"
    old_file(path, alice, 3)
    access = alices(Quota("public", bytes=8))
    with relay_on(path, clock, access) as relay:
        assert relay.stored() == Stored(3, 3 * MIN_COUNTED_BYTES, 1)
        assert relay.store.look(alice.box, 0, START_US).box_expires_us == START_US + 30 * DAY_US
        assert texts_of(relay, alice) == ["QUJ0", "QUJ1", "QUJ2"]
        assert ask(relay, send(alice, "bmV3"), check(bob)) == [OK, NOTHING]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(SCHEMA),)
    clock.advance(1)
    with relay_on(path, clock, access) as relay:  # and once more, as a file of today
        assert texts_of(relay, alice) == ["QUJ0", "QUJ1", "QUJ2", "bmV3"]
        assert ask(relay, send(bob, "bmV3"), send(bob, "bmV3")) == [OK, (429, "Too often", 60)]
        assert relay.stored() == Stored(5, 5 * MIN_COUNTED_BYTES, 1)
        clock.advance(3_599.5)
        relay.sweep()  # those of old belong to no quota, and go like the others
        assert relay.stored() == Stored(1, MIN_COUNTED_BYTES, 1)
        assert ask(relay, send(bob, "bmV3"), send(bob, "bmV3")) == [OK, (429, "Too often", 60)]


@pytest.mark.parametrize("version", [len(SCHEMA) + 1, 2**31 - 1, -1, 0])
def test_file_of_a_version_to_come_is_refused_in_one_line_and_stays_as_it_is(
        tmp_path: Path, alice: Owner, version: int) -> None:
    old_file(tmp_path / "relay.db", alice, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "relay.db")) as db:
        db.execute(f"PRAGMA user_version = {version}")
    octets = (tmp_path / "relay.db").read_bytes()
    with pytest.raises(StoreError) as caught:
        SqliteStore(str(tmp_path / "relay.db"))
    assert str(caught.value) == (f"{tmp_path / 'relay.db'} has schema {version}, this relay knows {len(SCHEMA)};"
                                 " choose another file with --db")
    assert (tmp_path / "relay.db").read_bytes() == octets


def test_process_refuses_a_file_of_a_version_to_come(tmp_path: Path, alice: Owner) -> None:
    old_file(tmp_path / "relay.db", alice, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "relay.db")) as db:
        db.execute(f"PRAGMA user_version = {len(SCHEMA) + 1}")
    finished = run_relay("--db", "relay.db", "--port", "0", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (
        1, f"connectoid relay: relay.db has schema {len(SCHEMA) + 1}, this relay knows {len(SCHEMA)};"
           " choose another file with --db\n")


def test_stored_follows_puts_and_sweeps() -> None:
    with contextlib.closing(SqliteStore(":memory:")) as store:
        assert store.stored() == Stored(0, 0, 0)
        for number, size in enumerate((2, MIN_COUNTED_BYTES, MIN_COUNTED_BYTES + 1)):
            message = Message(Owner(1).box, "A" * size, b"s", 10 + number, Quota("q"))
            assert store.put(message, Limits(), START_US) == START_US + number
        counted = 3 * MIN_COUNTED_BYTES + 1
        assert store.stored() == Stored(3, counted, 0)
        store.keep_boxes({Owner(1).box: START_US + 11}, START_US, room_for=1)
        assert store.stored() == Stored(3, counted, 1)
        for now_us, stored in ((START_US + 9, Stored(3, counted, 1)),
                               (START_US + 11, Stored(2, counted - MIN_COUNTED_BYTES, 0)),
                               (START_US + 14, Stored(0, 0, 0))):
            assert store.sweep(now_us) is False
            assert store.stored() == stored


def test_spend_adds_by_name_and_day(tmp_path: Path) -> None:
    days = [START_US + day * DAY_US for day in range(3)]
    midnight_us = START_US + TO_MIDNIGHT_S * 1_000_000
    def spend(requests: dict[str, int], now_us: int) -> dict[str, int]:
        store.spend(requests, now_us)
        return store.spent(now_us)

    with contextlib.closing(SqliteStore(str(tmp_path / "relay.db"))) as store:
        assert spend({"a": 2}, days[0]) == {"a": 2}
        assert spend({"b": 1, "a": 3}, midnight_us - 1) == {"b": 1, "a": 5}
        assert spend({"a": 4}, midnight_us) == {"a": 4}
        assert spend({"a": 1}, days[0]) == {"b": 1}  # told by the store's time, which does not go back
        assert store.spent(midnight_us) == {"a": 5}
    with contextlib.closing(SqliteStore(str(tmp_path / "relay.db"))) as store:
        assert spend({"a": 1, "b": 7}, days[1]) == {"a": 6, "b": 7}
        assert spend({"a": 1}, days[2]) == {"a": 1}
        store.put(Message(Owner(1).box, "QUJD", b"s", 10, Quota("a", bytes=4)), Limits(), days[2])
        assert spend({"a": 1}, days[2]) == {"a": 2}
        with pytest.raises(NoRoom, match="quota"):
            store.put(Message(Owner(1).box, "QU", b"s", 10, Quota("a", bytes=4)), Limits(), days[2])


# ---------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "words"), [
    (["--price-url", "javascript:alert(1)"], "'javascript:alert(1)' is no web address; write https://..."),
    (["--price-url", "example.org"], "write https://..."),
    (["--price-url", "https://example.org/ x"], "write https://..."),
    (["--price-url", ""], "write https://..."),
    (["--trusted-proxy", "10.0.0.1/8"], "'10.0.0.1/8' is no network; write 10.0.0.0/8"),
    (["--trusted-proxy", "2001:db8::1/32"], "write 2001:db8::/32"),
    (["--trusted-proxy", "nonsense"], "'nonsense' is no network; write an address, or a network like 192.0.2.0/24"),
    (["--trusted-proxy", "10.0.0.0/8,192.0.2.1"], "write an address"),
    (["--trusted-proxy", ""], "write an address"),
    (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
    (["--tls-key", "key.pem"], "--tls-cert and --tls-key go together"),
    (["--keys"], "expected one argument"), (["--deny"], "expected one argument"),
    (["--stun", "yes"], "unrecognized arguments: yes")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_flag_is_a_usage_error_in_one_line(flags: list[str], words: str, tmp_path: Path) -> None:
    finished = run_relay("--port", "0", *flags, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(r"connectoid_relay\.py: error: .* \(--help lists the flags\)\n", finished.stderr)
    assert words in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--name", "--contact", "--notice", "--price-url"])
def test_text_that_is_not_utf_8_is_a_usage_error(flag: str, tmp_path: Path) -> None:
    finished = run_relay("--port", "0", "--tls-cert", "x", flag, os.fsdecode(b"https://\xff"), cwd=tmp_path)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert finished.stderr.startswith(f"connectoid_relay.py: error: argument {flag}: ")


def test_what_the_host_says_stands_in_the_document(start: Callable[..., Process]) -> None:
    said = {"name": "Relè ☕", "contact": "me@example.org", "notice": "<b>Moves</b> on Monday",
            "price_url": "https://example.org/price?a=1&b=2"}
    flags = [text for name, value in said.items() for text in (f"--{name.replace('_', '-')}", value)]
    process = start("--db", ":memory:", "--stun", *flags)
    document = document_of(process.port)
    assert {name: document[name] for name in (*said, "stun", "udp")} == {**said, "stun": True, "udp": False}
    assert sorted(document) == ["contact", "description", "limits", "name", "notice", "price_url", "retention",
                                "software", "stun", "udp", "version"]
    with datagrams_to(process.port) as client:
        client.send(binding_request())
        assert stun.parse_message(client.recv(2_048)).attributes == {
            "XOR-MAPPED-ADDRESS": client.getsockname()[:2]}
    assert process.stop() == (0, "")


def test_what_the_host_does_not_say_is_null(start: Callable[..., Process]) -> None:
    document = document_of(start("--db", ":memory:").port)
    assert {name: document[name] for name in ("name", "contact", "notice", "price_url", "stun")} == {
        "name": "Connectoid relay", "contact": None, "notice": None, "price_url": None, "stun": False}


def test_proxies_of_several_flags_are_all_trusted(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:", "--rate", "1", "--trusted-proxy", "127.0.0.0/8", "--trusted-proxy", "192.0.2.1")
    assert [forwarded(process.port, check(alice), hops)[0] for hops in (
        "203.0.113.1, 192.0.2.1", "203.0.113.2, 192.0.2.1", "203.0.113.1", "203.0.113.3, 192.0.2.2")] == [
        200, 200, 429, 200]
