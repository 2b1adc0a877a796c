"""Test API keys: who gets in, and what a quota gives."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from harness import (
    FORBIDDEN,
    KEY,
    NOTHING,
    OK,
    OTHER_KEY,
    SOURCE,
    START_US,
    TO_MIDNIGHT_S,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    alices,
    answer_of,
    ask,
    batch,
    check,
    receive,
    refused,
    relay_on,
    requests_with,
    send,
    texts_of,
)

from connectoid_relay import (
    DAY_US,
    MAX_DATA_CHARS,
    MAX_EXT_CHARS,
    MIN_COUNTED_BYTES,
    SEND_KEY_SHARE,
    TIMES_OF_48,
    TIMES_OF_56,
    Access,
    Limits,
    Message,
    NoRoom,
    Quota,
    Relay,
    SettingError,
    SqliteStore,
    Store,
    Stored,
    StoreError,
    answer_datagram,
    read_access,
    render_page,
    samples_of,
)

# ---------------------------------------------------------------------------------------
# API keys: who gets in, and what a quota gives.
# ---------------------------------------------------------------------------------------

UNKNOWN: Sequence[dict[str, Any]] = (
    {},
    {"ext": None},
    {"ext": ""},
    {"ext": "wrong"},
    {"ext": KEY + "x"},
    {"ext": KEY[:-1]},
    {"ext": KEY.upper()},
    {"ext": f" {KEY}"},
)


@pytest.mark.parametrize("members", UNKNOWN, ids=str)
def test_ext_is_ignored_without_keys(relay: Relay, alice: Owner, members: dict[str, Any]) -> None:
    assert ask(
        relay, check(alice, **members), send(alice, **members), receive(alice, "no", **members)
    ) == [NOTHING, OK, (403, "Wrong answer", 0)]


@pytest.mark.parametrize("members", UNKNOWN, ids=str)
def test_relay_with_keys_forbids_whoever_has_none(
    make: Make, alice: Owner, members: dict[str, Any]
) -> None:
    relay = make(access=alices())
    assert ask(relay, *requests_with(alice, members)) == [FORBIDDEN] * 3
    assert relay.store.stored() == Stored(0, 0, 0)


def test_relay_with_a_file_without_any_key_forbids_all(
    tmp_path: Path, make: Make, alice: Owner
) -> None:
    (tmp_path / "keys.toml").touch()
    relay = make(access=read_access(str(tmp_path / "keys.toml")))
    for members in UNKNOWN:
        assert ask(relay, *requests_with(alice, members)) == [FORBIDDEN] * 3


def test_right_key_opens_every_action(make: Make, alice: Owner) -> None:
    relay = make(access=Access({KEY: Quota("keys.alice"), OTHER_KEY: Quota("keys.bob")}, None))
    assert ask(relay, send(alice, ext=KEY)) == [OK]
    reply = relay.handle(check(alice, ext=OTHER_KEY), SOURCE)
    assert isinstance(reply.body, dict)
    answer = alice.open(reply.body["question"])
    assert ask(relay, receive(alice, answer, ext=KEY)) == [
        {"ok": True, "at": START_US, "data": "QUJD"}
    ]


def test_batch_is_forbidden_item_by_item(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(access=alices())
    items = [
        check(alice, ext=KEY),
        *(check(bob, **members) for members in UNKNOWN),
        check(bob, ext=KEY),
    ]
    assert batch(relay, *items) == [NOTHING, *[("Forbidden", 0)] * len(UNKNOWN), NOTHING]


@pytest.mark.parametrize(
    "ext", [1, ["a"], {"key": KEY}, True, "x" * (MAX_EXT_CHARS + 1)], ids=lambda ext: str(ext)[:9]
)
def test_ext_of_a_wrong_form_is_a_bad_request_with_keys_too(
    make: Make, alice: Owner, ext: object
) -> None:
    assert ask(make(access=alices()), check(alice, ext=ext)) == [(400, "Bad request", 0)]


def test_key_of_any_letters_up_to_the_limit_works(make: Make, alice: Owner) -> None:
    longest = "\U0001f511ключ\x00\"" + "é" * (MAX_EXT_CHARS - 7)
    assert len(longest) == MAX_EXT_CHARS
    assert ask(
        make(access=Access({longest: Quota("keys.alice")}, None)), check(alice, ext=longest)
    ) == [NOTHING]


def test_datagram_needs_no_key(make: Make, alice: Owner) -> None:
    reply = answer_datagram(make(access=alices()), json.dumps(check(alice)).encode(), SOURCE)
    assert reply == json.dumps(NOTHING).encode()


# requests_per_day


def test_requests_per_day_are_counted_until_midnight_utc(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    relay = make(access=alices(requests_per_day=3))
    request = check(alice, ext=KEY)
    assert ask(relay, *[request] * 4) == [*[NOTHING] * 3, (429, "Too often", TO_MIDNIGHT_S)]
    clock.advance(TO_MIDNIGHT_S - 0.5)
    assert ask(relay, request) == [(429, "Too often", 1)]
    clock.advance(0.499_999)
    assert ask(relay, request) == [(429, "Too often", 1)]
    clock.advance(0.000_001)
    assert ask(relay, *[request] * 4) == [*[NOTHING] * 3, (429, "Too often", DAY_US // 1_000_000)]


def test_requests_per_day_count_every_action_of_every_source(make: Make, alice: Owner) -> None:
    relay = make(access=alices(requests_per_day=4), max_box_messages=80)
    too_often = (429, "Too often", TO_MIDNIGHT_S)
    assert ask(relay, send(alice, ext=KEY), source="192.0.2.1") == [OK]
    assert ask(relay, receive(alice, "no", ext=KEY), source="192.0.2.2") == [
        (403, "Wrong answer", 0)
    ]
    assert batch(relay, *[check(alice, START_US, ext=KEY)] * 3, source="2001:db8::1") == [
        NOTHING, NOTHING, too_often[1:]]
    assert ask(relay, *requests_with(alice, {"ext": KEY}), source="192.0.2.3") == [too_often] * 3


def test_forbidden_requests_count_against_no_quota(make: Make, alice: Owner) -> None:
    relay = make(access=alices(requests_per_day=1))
    assert ask(relay, check(alice, ext="wrong"), check(alice), check(alice, ext=KEY)) == [
        FORBIDDEN
    ] * 2 + [NOTHING]


def test_requests_per_day_are_told_once_though_another_key_cannot_be_told(
    make: Make, alice: Owner
) -> None:
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

    relay = make(
        access=Access({KEY: Quota("keys.alice", requests_per_day=9), OTHER_KEY: Quota("keys.bob")}),
        store=cast(Store, Choosy()),
    )
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
    relay = make(access=alices(requests_per_day=1), rate=0)
    assert ask(relay, *[check(alice, ext=KEY)] * 2) == [NOTHING, (429, "Too often", TO_MIDNIGHT_S)]


def test_unknown_keys_share_the_quota_of_the_public(make: Make, alice: Owner) -> None:
    count = len(UNKNOWN)
    relay = make(access=alices(Quota("public", requests_per_day=count), requests_per_day=1))
    requests = [check(alice, **members) for members in UNKNOWN]
    assert (
        ask(relay, *requests, *requests)
        == [NOTHING] * count + [(429, "Too often", TO_MIDNIGHT_S)] * count
    )
    assert ask(relay, *[check(alice, ext=KEY)] * 2) == [NOTHING, (429, "Too often", TO_MIDNIGHT_S)]


def test_quota_without_requests_per_day_has_no_limit_of_them(make: Make, alice: Owner) -> None:
    assert ask(make(access=alices(), rate=0), *[check(alice, ext=KEY)] * 1_000) == [NOTHING] * 1_000


def test_requests_per_day_are_those_of_all_processes_after_a_sweep_each(
        tmp_path: Path, clock: FakeClock, alice: Owner) -> None:
    request, too_often = check(alice, ext=KEY), (429, "Too often", TO_MIDNIGHT_S)
    access = alices(requests_per_day=5)
    path = tmp_path / "relay.db"
    with (
        relay_on(path, clock, access=access) as here,
        relay_on(path, clock, access=access) as there,
    ):
        assert ask(here, request, request) == [NOTHING] * 2
        here.sweep()
        assert ask(there, request) == [NOTHING]
        there.sweep()
        assert ask(there, request) == [NOTHING]
        there.sweep()
        assert ask(there, request, request) == [NOTHING, too_often]
        there.sweep()
        # It learns of the others only once it has told.
        assert ask(here, request) == [NOTHING]
        here.sweep()
        assert ask(here, request) == [too_often]


def test_requests_per_day_survive_closing_and_are_known_after_a_sweep(
        tmp_path: Path, clock: FakeClock, alice: Owner) -> None:
    request, too_often = check(alice, ext=KEY), (429, "Too often", TO_MIDNIGHT_S)
    for fourth in (False, True):
        with relay_on(tmp_path / "relay.db", clock, access=alices(requests_per_day=3)) as relay:
            assert ask(relay, request) == [NOTHING]
            relay.sweep()
            # This one is not swept: it tells when it closes.
            assert ask(relay, request) == [too_often if fourth else NOTHING]
            if fourth:
                clock.advance(TO_MIDNIGHT_S)
                assert ask(relay, *[request] * 3) == [NOTHING] * 3


def test_requests_of_yesterday_do_not_count_for_today(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    relay = make(access=alices(requests_per_day=2))
    request = check(alice, ext=KEY)
    relay.sweep()
    clock.advance(TO_MIDNIGHT_S - 0.1)
    assert ask(relay, *[request] * 2) == [NOTHING] * 2
    # The sweep comes only on the next day.
    clock.advance(0.2)
    relay.sweep()
    assert ask(relay, request) == [NOTHING]
    relay.sweep()
    assert ask(relay, *[request] * 2) == [NOTHING, (429, "Too often", DAY_US // 1_000_000)]


def test_requests_that_a_failing_store_was_not_told_are_told_with_the_next_sweep(
        make: Make, clock: FakeClock, alice: Owner) -> None:
    watched = WatchedStore()
    relay, access = (
        make(access=alices(requests_per_day=9), store=watched.store),
        alices(requests_per_day=3),
    )
    assert ask(relay, *[check(alice, ext=KEY)] * 2) == [NOTHING] * 2
    watched.error = StoreError("the disk has gone")
    for _ in range(2):
        with pytest.raises(StoreError, match="the disk has gone"):
            relay.sweep()
    watched.error = None
    assert ask(relay, check(alice, ext=KEY)) == [NOTHING]
    relay.sweep()
    assert watched.inside.spent(relay.now_us()) == {"keys.alice": 3}
    relay.access = access
    assert ask(relay, check(alice, ext=KEY)) == [(429, "Too often", TO_MIDNIGHT_S)]
    relay.sweep()
    # No request was told twice.
    assert watched.inside.spent(relay.now_us()) == {"keys.alice": 3}


# bytes


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ([42], True),
        ([43], True),
        ([44], False),
        ([40, 2], True),
        ([40, 3], True),
        ([40, 4], False),
        ([43, 2], False),
    ],
)
def test_bytes_of_a_quota_are_taken_up_to_the_limit(
    make: Make, sizes: list[int], taken: bool
) -> None:
    relay = make(access=alices(bytes=43))
    sends = [send(Owner(number), "A" * size, ext=KEY) for number, size in enumerate(sizes, 1)]
    assert ask(relay, *sends) == [*[OK] * (len(sends) - 1), OK if taken else (429, "Too often", 60)]
    assert relay.store.stored().messages == len(sends) - (not taken)


def test_bytes_are_of_one_quota_alone(make: Make, alice: Owner) -> None:
    access = Access(
        {KEY: Quota("keys.alice", bytes=4), OTHER_KEY: Quota("keys.bob", bytes=4)}, Quota("public")
    )
    relay = make(access=access)
    assert ask(
        relay, send(alice, ext=KEY), send(alice, ext=KEY), send(alice, ext=OTHER_KEY), send(alice)
    ) == [OK, (429, "Too often", 60), OK, OK]


def test_bytes_are_free_again_after_expiry_and_a_sweep(
    make: Make, clock: FakeClock, alice: Owner
) -> None:
    relay = make(access=alices(bytes=8, message_ttl_s=10))
    small = send(alice, "QUJD", ext=KEY)
    assert ask(relay, small, small, small) == [OK, OK, (429, "Too often", 60)]
    clock.advance(9.999_999)
    relay.sweep()
    assert ask(relay, small) == [(429, "Too often", 60)]
    clock.advance(1)
    relay.sweep()
    assert ask(relay, small, small, small) == [OK, OK, (429, "Too often", 60)]
    # The owner reads on.
    assert ask(relay, check(alice, START_US + 10**12, ext=KEY)) == [NOTHING]


def test_bytes_survive_reopening_and_the_end_of_a_key(
    tmp_path: Path, clock: FakeClock, alice: Owner
) -> None:
    small = send(alice, "QUJD", ext=KEY)
    with relay_on(tmp_path / "relay.db", clock, access=alices(bytes=8)) as relay:
        assert ask(relay, small) == [OK]
    with relay_on(tmp_path / "relay.db", clock, access=alices(bytes=8)) as relay:
        assert ask(relay, small, small) == [OK, (429, "Too often", 60)]
        # The keys have gone, but their messages still expire.
        relay.access = Access()
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
    relay = make(access=alices(Quota("public"), message_ttl_s=ttl_s))
    assert ask(relay, send(alice, ext=KEY)) == [OK]
    clock.advance(ttl_s - 0.000_001)
    answer = answer_of(relay, alice)
    assert ask(relay, receive(alice, answer)) == [{"ok": True, "at": START_US, "data": "QUJD"}]
    clock.advance(0.000_001)
    assert ask(relay, check(alice), receive(alice, answer)) == [NOTHING] * 2
    relay.sweep()
    assert relay.store.stored().messages == 0


def test_message_is_kept_for_whom_sent_it(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(
        access=alices(Quota("public", message_ttl_s=5), message_ttl_s=20), message_ttl_s=10
    )
    assert ask(relay, send(alice, "cHVi"), send(alice, "a2V5", ext=KEY)) == [OK] * 2
    clock.advance(6)
    relay.sweep()
    assert texts_of(relay, alice) == ["a2V5"]


def test_document_tells_how_long_messages_of_the_public_are_kept(make: Make) -> None:
    relay = make(access=alices(Quota("public", message_ttl_s=77), message_ttl_s=88))
    retention = {"message": 77, "question": 60, "box": 30 * 86_400}
    assert relay.document()["retention"] == retention
    for access in (
        alices(Quota("public"), message_ttl_s=88),
        alices(None, message_ttl_s=88),
        Access(),
    ):
        relay.access = access
        assert relay.document()["retention"] == retention | {"message": 3_600}


# Another access in place of the old one


def test_another_access_counts_at_once_and_goes_on_counting_by_name(
    make: Make, alice: Owner
) -> None:
    relay = make(access=alices(requests_per_day=9, bytes=99))
    assert ask(relay, check(alice), *[send(alice, ext=KEY)] * 2) == [FORBIDDEN, OK, OK]
    relay.access = Access(
        {OTHER_KEY: Quota("keys.alice", requests_per_day=4, bytes=9)}, Quota("public")
    )
    # The old key is one of the public's now.
    assert ask(relay, check(alice, START_US + 9, ext=KEY)) == [NOTHING]
    assert ask(relay, *[send(alice, ext=OTHER_KEY)] * 3) == [
        (429, "Too often", 60), (429, "Too often", 60), (429, "Too often", TO_MIDNIGHT_S)]
    relay.access = Access()
    assert ask(relay, send(alice, ext=OTHER_KEY)) == [OK]


# Where a key may never be seen


def test_key_is_shown_nowhere(
    make: Make, alice: Owner, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "keys.toml").write_text(
        f'[keys.alice]\nkey = "{KEY}"\nrequests_per_day = 5\nbytes = 4\n'
    )
    watched = WatchedStore()
    relay = make(access=read_access(str(tmp_path / "keys.toml")), store=watched.store, rate=30)
    replies = [
        relay.handle(request, SOURCE)
        for request in [send(alice, ext=KEY)] * 7 + [check(alice, ext=KEY + "x")]
    ]
    watched.error = StoreError("the disk has gone")
    replies += [relay.handle(check(alice, ext=KEY), SOURCE) for _ in range(30)]
    page = render_page(relay, relay.document())
    shown = [repr(relay.access), str(vars(relay.access)), str(vars(relay)), repr(replies), page,
             json.dumps(relay.document()), repr(samples_of(relay)), caplog.text,
             *(repr(vars(record)) for record in caplog.records)]
    # Something was told.
    assert caplog.records
    assert [text for text in shown if KEY in text or KEY.encode().hex() in text] == []


@pytest.mark.parametrize(
    "text",
    [
        f'key = "{KEY}',
        f"[keys.a]\nkey = {KEY}",
        f'[keys.a]\nkey = "{KEY}" bytes = 1',
        f'[keys.a]\nkey = "{KEY}\\q"',
        f'[keys.a]\nkey = ["{KEY}"]',
        f'[keys.a]\nkey = {{it = "{KEY}"}}',
        f'[keys]\na = "{KEY}"',
        f'keys = "{KEY}"',
        f'[keys.a]\nkey = "{KEY * 60}"',
        f'[keys.a]\nkey = "{KEY}"\n[keys.b]\nkey = "{KEY}"',
        f'[public]\nkey = "{KEY}"',
        f'[keys.a]\nbytes = "{KEY}"',
        f'[keys.a]\nkey = "{KEY}"\nkey = "{KEY}"',
        f'[keys.a]\nkey : "{KEY}"',
        f'public = "{KEY}"',
        f'a = "{KEY}"',
    ],
)
def test_mistake_in_a_key_file_does_not_tell_the_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(SettingError) as caught:
        read_access(str(tmp_path / "keys.toml"))
    # The key is not in the causes either.
    assert KEY not in "".join(traceback.format_exception(caught.value))


# ---------------------------------------------------------------------------------------
# The half of a key that only sends: links carry it.
# ---------------------------------------------------------------------------------------

SEND_KEY = "the half in the link"


def two_halves(owner: Quota, sender: Quota, public: Quota | None = None) -> Access:
    """Return who gets in by a key of two halves."""
    return Access({KEY: owner}, public, send_keys={SEND_KEY: sender})


def test_send_key_only_sends(make: Make, alice: Owner, bob: Owner) -> None:
    relay = make(access=two_halves(Quota("keys.alice"), Quota("keys.alice.send_key")))
    assert relay.handle(send(alice, ext=SEND_KEY), SOURCE) == (200, OK)
    answer = answer_of_key(relay, alice)
    for request in (check(alice, ext=SEND_KEY), receive(alice, answer, ext=SEND_KEY)):
        status, reply = relay.handle(request, SOURCE)
        assert (status, reply["error"]) == (403, "Forbidden")
        assert "may only send" in reply["detail"]
        assert SEND_KEY not in reply["detail"]
    status, replies = relay.handle([check(bob, ext=SEND_KEY), check(bob, ext=KEY)], SOURCE)
    assert [reply["ok"] for reply in replies] == [False, True]
    assert relay.handle(send(bob, ext=KEY), SOURCE) == (200, OK)


def answer_of_key(relay: Relay, owner: Owner) -> str:
    """Return the answer to a question that the owner's half asks for."""
    status, reply = relay.handle(check(owner, ext=KEY), SOURCE)
    assert status == 200
    return owner.open(reply["question"])


def test_send_key_is_as_the_public_where_there_is_a_quota_for_that(
        make: Make, alice: Owner) -> None:
    access = two_halves(
        Quota("keys.alice"), Quota("keys.alice.send_key"), Quota("public", requests_per_day=1))
    relay = make(access=access)
    assert relay.handle(check(alice, ext=SEND_KEY), SOURCE) == (200, NOTHING)
    assert relay.handle(check(alice, ext=SEND_KEY), SOURCE).status == 429
    # A send is one of the key.
    assert relay.handle(send(alice, ext=SEND_KEY), SOURCE) == (200, OK)


@pytest.mark.parametrize("limit", [1, 3])
def test_reader_of_a_link_spends_nothing_of_the_owner(
        make: Make, clock: FakeClock, alice: Owner, limit: int) -> None:
    access = two_halves(
        Quota("keys.alice", requests_per_day=4, bytes=1_000),
        Quota("keys.alice.send_key", requests_per_day=limit, bytes=4 * limit))
    relay = make(access=access, rate=0)
    statuses = [relay.handle(send(alice, ext=SEND_KEY), f"198.51.100.{number}").status
                for number in range(50)]
    assert statuses == [200] * limit + [429] * (50 - limit)
    # Her checks still work, and so do her own sends: none of her four requests is spent.
    answer = answer_of_key(relay, alice)
    assert relay.handle(receive(alice, answer, ext=KEY, limit=100), SOURCE).status == 200
    assert relay.handle(send(alice, "A" * 900, ext=KEY), SOURCE).status == 200
    assert relay.handle(check(alice, ext=KEY), SOURCE).status == 200
    assert relay.handle(check(alice, ext=KEY), SOURCE).status == 429
    clock.advance(TO_MIDNIGHT_S)
    while relay.sweep():
        pass
    assert relay.handle(send(alice, ext=SEND_KEY), SOURCE).status == 200


def test_bytes_of_the_two_halves_are_counted_apart(make: Make, alice: Owner, bob: Owner) -> None:
    access = two_halves(Quota("keys.alice", bytes=8), Quota("keys.alice.send_key", bytes=8))
    relay = make(access=access)
    for half in (SEND_KEY, KEY):
        assert relay.handle(send(alice, "A" * 7, ext=half), SOURCE).status == 200
        assert relay.handle(send(bob, "A" * 2, ext=half), SOURCE).status == 429
    assert relay.stored() == Stored(2, 2 * MIN_COUNTED_BYTES, 0)


def reader(number: int) -> str:
    """Return an address of somebody who has read the link."""
    return f"198.51.100.{number}"


@pytest.mark.parametrize("each", [1, 3])
def test_reader_of_a_link_spends_an_eighth_of_the_requests_from_one_address(
        make: Make, clock: FakeClock, alice: Owner, each: int) -> None:
    sender = Quota("keys.alice.send_key", requests_per_day=each * SEND_KEY_SHARE)
    relay = make(access=two_halves(Quota("keys.alice"), sender), rate=0)
    for number in range(SEND_KEY_SHARE):
        statuses = [relay.handle(send(alice, ext=SEND_KEY), reader(number)).status
                    for _ in range(each + 1)]
        assert statuses == [200] * each + [429]
    # What was refused has spent nothing of what is for all, and now that is spent.
    assert relay.handle(send(alice, ext=SEND_KEY), reader(9)).status == 429
    clock.advance(TO_MIDNIGHT_S)
    assert relay.handle(send(alice, ext=SEND_KEY), reader(0)).status == 200


def test_share_of_a_key_in_links_is_one_request_and_one_message_at_least(
        make: Make, alice: Owner) -> None:
    sender = Quota("keys.alice.send_key", SEND_KEY_SHARE - 1, MAX_DATA_CHARS + 4)
    relay = make(access=two_halves(Quota("keys.alice"), sender))
    longest = "A" * MAX_DATA_CHARS
    assert relay.handle(send(alice, longest, ext=SEND_KEY), reader(0)).status == 200
    status, reply = relay.handle(send(alice, ext=SEND_KEY), reader(0))
    assert (status, reply["detail"]) == (
        429, "One network may spend 1/8 of what this API key has.")
    assert relay.handle(send(alice, ext=SEND_KEY), reader(1)).status == 200


@pytest.mark.parametrize(("chars", "status"), [(-4, 200), (0, 200), (4, 429)])
def test_reader_of_a_link_spends_an_eighth_of_the_bytes_from_one_address(
        make: Make, clock: FakeClock, alice: Owner, chars: int, status: int) -> None:
    share = 2 * MAX_DATA_CHARS
    sender = Quota(
        "keys.alice.send_key", bytes=SEND_KEY_SHARE * share, message_ttl_s=7_200)
    relay = make(access=two_halves(Quota("keys.alice"), sender))
    assert relay.handle(send(alice, "A" * (share // 2), ext=SEND_KEY), reader(0)).status == 200
    # The rest, in two that fit into a message each.
    assert relay.handle(send(alice, "A" * 8, ext=SEND_KEY), reader(0)).status == 200
    rest = "A" * (share // 2 - 8 + chars)
    assert relay.handle(send(alice, rest, ext=SEND_KEY), reader(0)).status == status
    assert relay.handle(send(alice, rest, ext=SEND_KEY), reader(1)).status == 200
    assert relay.handle(send(alice, rest, ext=KEY), reader(0)).status == 200
    # As long as messages are kept.
    clock.advance(7_200)
    assert relay.handle(send(alice, rest, ext=SEND_KEY), reader(0)).status == 200


@pytest.mark.parametrize(("step", "times"), [(1, TIMES_OF_56), (256, TIMES_OF_48)])
def test_networks_around_a_reader_of_a_link_get_more_and_not_all(
        make: Make, alice: Owner, step: int, times: int) -> None:
    sender = Quota("keys.alice.send_key", requests_per_day=SEND_KEY_SHARE)
    relay = make(access=two_halves(Quota("keys.alice"), sender))
    sources = [f"2001:db8:7:{step * number:x}::1" for number in range(SEND_KEY_SHARE)]
    statuses = [relay.handle(send(alice, ext=SEND_KEY), source).status for source in sources]
    assert statuses == [200] * times + [429] * (SEND_KEY_SHARE - times)
