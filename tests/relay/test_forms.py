"""Test the forms of requests: every member with every wrong value, and any JSON at all."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from harness import (
    ANY_TEXT,
    BAD,
    HOME,
    NOTHING,
    OK_REPLY,
    OTHER,
    START_US,
    Make,
    Owner,
    WatchedStore,
    answer_of,
    box_of,
    check,
    receive,
    refused,
    send,
)
from hypothesis import given
from hypothesis import strategies as st

from connectoid.encoding import is_deep as is_deep_for_apps
from connectoid_relay import MAX_JSON_LEVELS, Relay, Reply, answer_datagram, is_deep

# Forms


SURROGATES = "\ud800"
WRONG: Mapping[str, list[object]] = {
    "pub": [
        None,
        True,
        1,
        1.5,
        "",
        [],
        {},
        Owner(1).pub[:-1],
        Owner(1).pub + "A",
        Owner(1).pub + "\n",
        "B" + Owner(1).pub[1:],
        Owner(1).pub[:-1] + "B",
        "é" * 66,
        SURROGATES * 66,
        [Owner(1).pub],
    ],
    "ext": [True, 1, 1.5, [], {}, ["x"], "x" * 1_025, SURROGATES],
    "action": [None, True, 1, 1.5, "", [], {}, "Send", "send ", "health", SURROGATES, ["check"]],
    "at": [
        None,
        True,
        False,
        -1,
        -(10**30),
        0.0,
        1.5,
        1e3,
        "",
        "1",
        [],
        {},
        float("nan"),
        float("inf"),
    ],
    "wait": [None, True, False, -1, 0.0, 1.5, 1e3, "", "1", [], {}],
    "limit": [None, True, False, 0, -1, 101, 10**30, 1.0, 1.5, 1e1, "", "1", [], {}],
    "answer": [None, True, 1, 1.5, [], {}, SURROGATES],
    "data": [
        None,
        True,
        1,
        1.5,
        [],
        {},
        "",
        "A",
        "AAAAA",
        "QUJD=",
        "QU==",
        "QU JD",
        "QUJD\n",
        "QU+/",
        "éé",
        SURROGATES * 2,
    ],
}
MEMBERS = {
    "send": ["pub", "ext", "action", "data"],
    "check": ["pub", "ext", "action", "at", "wait"],
    "receive": ["pub", "ext", "action", "at", "limit", "answer"],
}
REQUESTS: Mapping[str, dict[str, Any]] = {
    "send": send(Owner(1)), "check": check(Owner(1)), "receive": receive(Owner(1), "x")}


@pytest.mark.parametrize(
    ("action", "member"), [(action, member) for action in MEMBERS for member in MEMBERS[action]]
)
def test_member_of_a_wrong_form_is_a_bad_request_and_nothing_is_stored(
    make: Make, action: str, member: str
) -> None:
    watched = WatchedStore()
    relay = make(watched.store, rate=0)
    watched.calls.clear()
    for wrong in WRONG[member]:
        assert refused(relay.handle({**REQUESTS[action], member: wrong}, HOME)) == BAD, wrong
        if action == "check":
            assert relay.handle([{**REQUESTS[action], member: wrong}], HOME).body != [NOTHING], (
                wrong
            )
    assert watched.calls.keys() <= {"look"}
    assert relay.store.arrivals(0) == (0, set())


@pytest.mark.parametrize(
    ("action", "member"), [(action, member) for action in MEMBERS for member in MEMBERS[action]]
)
def test_absent_member_is_a_bad_request_if_it_is_needed(
    relay: Relay, action: str, member: str
) -> None:
    needed = member in ("pub", "action", "data", "answer")
    whole = relay.handle(REQUESTS[action], HOME)
    reply = relay.handle(
        {name: value for name, value in REQUESTS[action].items() if name != member}, HOME
    )
    if needed:
        assert refused(reply) == BAD
    else:
        assert reply == whole


@pytest.mark.parametrize(
    "request_", [None, True, 0, 1.5, "", "check", [], [[]], {}, {"ok": True}, 10**40, SURROGATES]
)
def test_what_is_no_request_is_a_bad_request(relay: Relay, request_: object) -> None:
    reply = relay.handle(request_, HOME)
    if isinstance(reply.body, list):
        reply = Reply(400, reply.body[0])
    assert refused(reply) == BAD


@pytest.mark.parametrize("member", ["ext", "at", "wait", "limit"])
def test_member_at_its_edges_is_taken(relay: Relay, alice: Owner, member: str) -> None:
    edges: dict[str, list[object]] = {
        "ext": [None, "", "x" * 1_024, "\U0001f600" * 1_024],
        "at": [0, 1, 2**63 - 1, 2**63, 10**400],
        "wait": [0, 60, 61, 10**400],
        "limit": [1, 100],
    }
    relay.handle(send(alice), OTHER)
    requests = [check(alice), receive(alice, answer_of(relay, alice))]
    for edge in edges[member]:
        for request in requests:
            assert relay.handle({**request, member: edge}, HOME).status == 200


@pytest.mark.parametrize("sealed", ["AA", "A" * 32_767, "A" * 32_768, "-_-_", "AB"])
def test_data_is_kept_as_it_was_sent(relay: Relay, alice: Owner, sealed: str) -> None:
    assert relay.handle(send(alice, sealed), HOME) == OK_REPLY
    assert relay.store.messages(alice.box, 0, 100, START_US) == [(START_US, sealed)]


@pytest.mark.parametrize(
    ("sealed", "reply"),
    [
        ("A" * 32_769, (413, "Too big", 0)),
        ("A" * 32_770, (413, "Too big", 0)),
        ("+" * 40_000, (413, "Too big", 0)),
        ("A" * 32_765, BAD),
        ("A" * 32_767 + "=", BAD),
    ],
)
def test_data_of_a_wrong_form_is_refused(
    relay: Relay, alice: Owner, sealed: str, reply: tuple[int, str, int]
) -> None:
    assert refused(relay.handle(send(alice, sealed), HOME)) == reply
    assert relay.store.messages(alice.box, 0, 100, START_US) == []


def no_point() -> str:
    """Return a pub of the right form that is no point of the curve."""
    number = 1
    with contextlib.suppress(ValueError):
        while True:
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), box_of(number))
            number += 1
    return base64.urlsafe_b64encode(box_of(number)).rstrip(b"=").decode()


def test_send_alone_refuses_a_pub_that_is_no_point(relay: Relay) -> None:
    nobody = no_point()
    assert refused(relay.handle({"pub": nobody, "action": "send", "data": "QUJD"}, HOME)) == BAD
    assert relay.handle({"pub": nobody, "action": "check"}, HOME) == (200, NOTHING)
    assert refused(relay.handle({"pub": nobody, "action": "receive", "answer": "x"}, HOME)) == (
        403, "Wrong answer", 0)
    assert relay.store.arrivals(0) == (0, set())


def test_unknown_members_are_ignored(relay: Relay, alice: Owner) -> None:
    extra: dict[str, Any] = {"id": 7, "version": None, "": [SURROGATES], "ok": True}
    assert relay.handle(send(alice, **extra), HOME) == OK_REPLY
    answer = answer_of(relay, alice)
    assert relay.handle(receive(alice, answer, **extra), HOME) == (
        200,
        {"ok": True, "at": START_US, "data": "QUJD"},
    )


NAMES = st.sampled_from(sorted(WRONG))
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(10**40), 10**400])
    | st.floats()
    | ANY_TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT | NAMES, inner, max_size=4)
    ),
    max_leaves=8,
)
NEARLY = st.builds(
    lambda request, changes: {**request, **changes},
    st.sampled_from(list(REQUESTS.values())),
    st.dictionaries(NAMES, ANY_JSON, max_size=3))


@given(ANY_JSON | NEARLY | st.lists(NEARLY, min_size=1, max_size=3))
def test_handle_answers_any_json_value(make: Make, request_: object) -> None:
    relay = make(rate=0)
    status, reply = relay.handle(request_, HOME)
    assert status in {200, 400, 403, 413}
    items = reply if isinstance(reply, list) else [reply]
    for item in items:
        if item["ok"]:
            assert item.keys() in ({"ok"}, {"ok", "found"}, {"ok", "found", "question"})
        else:
            assert item["error"] in ("Bad request", "Wrong answer", "Too big")
    json.dumps(reply, allow_nan=False).encode("ascii")
    # Only a request that was good can have left something, and only a send.
    kept = {Owner(1).box} & relay.store.arrivals(0)[1]
    assert bool(kept) is (reply == {"ok": True})
    assert relay.store.arrivals(0)[1] == kept


@given(st.binary() | st.builds(lambda request: json.dumps(request).encode(), ANY_JSON | NEARLY))
def test_datagram_of_any_octets_gets_a_shorter_reply_or_none(make: Make, octets: bytes) -> None:
    reply = answer_datagram(make(rate=0), octets)
    assert reply is None or (len(reply) <= len(octets) and json.loads(reply)["found"] is False)


# Levels of nesting

PIECES = st.sampled_from(
    ["[", "{", "]", "}", '"', "\\", '\\"', '"]"', '"["', "é", "a", "[" * 99, "]" * 50, '["\\"]",'])


def levels_in(text: str) -> int:
    """Return the levels of JSON, read character by character."""
    most = levels = 0
    within = escaped = False
    for character in text:
        if within:
            ends = character == '"' and not escaped
            escaped = character == "\\" and not escaped
            within = not ends
        elif character == '"':
            within = True
        elif character in "[{":
            levels += 1
            most = max(most, levels)
        elif character in "]}":
            levels -= 1
    return most


@given(st.lists(PIECES, max_size=12).map("".join))
def test_levels_are_counted_as_one_reads_them(text: str) -> None:
    deep = levels_in(text) > MAX_JSON_LEVELS
    assert [is_deep(text.encode()), is_deep_for_apps(text)] == [deep, deep]
