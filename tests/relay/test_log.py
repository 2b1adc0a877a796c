"""Test the log: it tells of refusals, and of no secret."""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

import pytest
from harness import OWNERS, START_US, Make, Owner, WatchedStore, check, question_of, receive, send

from connectoid_relay import (
    MIN_COUNTED_BYTES,
    Relay,
    Reply,
    StoreError,
    StoreFull,
    source_of,
)


class Session(NamedTuple):
    """What was said in a session with refusals of every kind."""

    replies: list[Reply]
    secrets: set[str]


SOURCES = ("203.0.113.77", "2001:db8:77::1", "198.51.100.77")


def run_session(relay: Relay, watched: WatchedStore, alice: Owner) -> Session:
    """Send, ask, guess, flood and break the store; return the replies and what no log may show."""
    first, second, third = SOURCES
    sealed = "c2VjcmV0LWRhdGE"
    replies = [relay.handle(send(alice, sealed), first), relay.handle(send(alice, sealed), first)]
    question = question_of(relay, alice, second)
    answer = alice.open(question)
    requests: list[object] = [
        receive(alice, answer + "x"),
        receive(alice, answer, limit=0),
        send(alice, sealed + "="),
        [alice.pub],
        alice.pub,
        check(alice, ext={"key": "secret-ext"}),
        send(alice, sealed, ext="secret-ext"),
    ]
    replies += [relay.handle(request, second) for request in requests]
    replies += [relay.handle(send(owner, sealed), third) for owner in OWNERS]
    for watched.error in (StoreError("no"), StoreFull("no"), RuntimeError("no")):
        replies += [relay.handle(request, second) for request in (
            send(alice, sealed), check(alice), receive(alice, answer))]
        replies += [relay.health()]
    watched.error = None
    replies += [relay.handle(check(alice, at=START_US + 9), third) for _ in range(30)]
    secrets = {
        alice.pub,
        alice.box.hex(),
        repr(alice.box)[2:20],
        question,
        answer,
        sealed,
        "secret-ext",
    }
    return Session(replies, secrets | {owner.pub for owner in OWNERS})


@pytest.mark.parametrize("log_ips", [False, True])
def test_log_tells_of_refusals_but_no_secrets_and_ips_only_if_asked(
        make: Make, alice: Owner, caplog: pytest.LogCaptureFixture, log_ips: bool) -> None:
    caplog.set_level(logging.DEBUG)
    watched = WatchedStore()
    relay = make(
        watched.store, log_ips=log_ips, rate=25, max_box_messages=8, max_bytes=6 * MIN_COUNTED_BYTES
    )
    replies, secrets = run_session(relay, watched, alice)
    errors = {
        reply.body["error"]
        for reply in replies
        if isinstance(reply.body, dict) and not reply.body["ok"]
    }
    assert errors == {"Bad request", "Wrong answer", "Too often", "Full", "Busy"}
    for told in ("storage is full", "asks too often", "a request failed"):
        assert told in caplog.text
    shown = caplog.text + "".join(repr(vars(record)) for record in caplog.records)
    assert [secret for secret in secrets if secret in shown] == []
    assert (SOURCES[2] in caplog.text) is log_ips
    # These sources did nothing worth a line.
    assert [source for source in SOURCES[:2] if source_of(source) in shown] == []


def test_replies_tell_only_what_was_asked_for(make: Make, alice: Owner) -> None:
    watched = WatchedStore()
    relay = make(watched.store, rate=25, max_box_messages=8, max_bytes=6 * MIN_COUNTED_BYTES)
    replies, secrets = run_session(relay, watched, alice)
    replies += [relay.health(), Reply(200, relay.document())]
    said = json.dumps([reply.body for reply in replies])
    assert [secret for secret in (*secrets, *SOURCES, "2001:0db8") if secret in said] == []
