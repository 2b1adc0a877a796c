"""The client of a relay: it believes nothing, waits for nothing too long, and reads to the end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias

import pytest
from apps import (
    BAD_BATCHES,
    FOUND,
    NOWHERE,
    RUBBISH,
    SOON_S,
    SUITE,
    FakeRelay,
    http_reply,
    make_record,
)
from harness import running, serving

import connectoid
from connectoid import (
    Contact,
    RelayClient,
    RelayError,
)
from connectoid.clock import system_now
from connectoid.encoding import encode_base64url
from connectoid.relay_client import (
    MAX_AT,
    MAX_BESIDE_BYTES,
    MAX_CHECK_REPLY_BYTES,
    MAX_DATA_CHARS,
    MAX_QUESTION_CHARS,
    MAX_RECEIVE_CHARS,
    MAX_RECEIVES,
    MAX_REPLY_MARKS,
    MAX_RETRY_S,
    MAX_TOLD_PAUSE_S,
    MIN_TOLD_PAUSE_S,
    RECEIVE_LIMIT,
    Boxed,
    Budget,
    Checked,
    check_mailboxes,
    read_mailbox,
)
from connectoid_relay import Relay, RelayServer, SqliteStore

Run: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def run() -> Iterator[Run]:
    """Return what runs a coroutine on a loop that is there for the test."""
    with asyncio.Runner() as runner:
        yield runner.run


async def read(client: RelayClient, poll: connectoid.Poll) -> Boxed:
    """Return what is in one mailbox."""
    (checked,) = await check_mailboxes(client, [poll], 0)
    return await read_mailbox(SUITE, client, checked, Budget())


@pytest.mark.parametrize("reply", RUBBISH.values(), ids=RUBBISH.keys())
def test_client_takes_rubbish_for_a_dead_relay(reply: bytes, run: Run) -> None:
    """The error names the relay in printable text, and no other server gets a request."""
    with FakeRelay(lambda _: reply) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        for _ in range(2):
            with pytest.raises(RelayError) as caught:
                run(client.ask({"action": "send"}))
            assert fake.url in str(caught.value)
            assert str(caught.value).isprintable()
            assert 0 <= caught.value.retry_s <= MAX_RETRY_S
        run(client.close())
    assert len(fake.asked) == 2


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_reply_of_too_many_values_is_refused_before_it_is_parsed(more: int, run: Run) -> None:
    """Its own marks: two brackets and a comma."""
    reply = {"ok": True, "more": [0] * (MAX_REPLY_MARKS - 2 + more)}
    with FakeRelay(lambda _: http_reply(reply)) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        if more <= 0:
            assert run(client.ask({})) == reply
        else:
            with pytest.raises(RelayError, match="answered more than was asked"):
                run(client.ask({}))
        run(client.close())


def test_client_tells_the_words_of_a_relay_in_one_line(run: Run) -> None:
    """With what they mean to the user."""
    reply = {"ok": False, "error": "Full", "detail": "a\n\u202e  b."}
    with FakeRelay(lambda _: http_reply(reply, status="507 Full")) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        with pytest.raises(RelayError) as caught:
            run(client.ask({"action": "send"}))
        run(client.close())
    said = f'{fake.url} says "Full: a\ufffd\ufffd b" (507). The relay says that others have filled'
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("retry", "is_told"),
    [(MIN_TOLD_PAUSE_S - 1, False), (MIN_TOLD_PAUSE_S, False), (MIN_TOLD_PAUSE_S + 1, True),
     (MAX_TOLD_PAUSE_S - 1, True), (MAX_TOLD_PAUSE_S, True), (MAX_TOLD_PAUSE_S + 1, False),
     (True, False), ("61", False)])
def test_pause_that_a_relay_asks_for_is_told_as_a_time(
    retry: object, is_told: bool, run: Run,
) -> None:
    """A minute is over before anybody has read of it."""
    reply = {"ok": False, "error": "Too often", "retry": retry}
    with FakeRelay(lambda _: http_reply(reply, status="429 Too often")) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        with pytest.raises(RelayError) as caught:
            run(client.ask({"action": "send"}))
        run(client.close())
    until = re.search(r" It asks you to wait until \d\d:\d\d\.$", str(caught.value))
    assert (until is not None) is is_told


def test_words_of_a_relay_end_where_the_client_says_so(run: Run) -> None:
    """It may not go on in the client's name."""
    reply = {"ok": False, "error": 'Busy" (503). Renew at https://evil.example. It says "ok'}
    with FakeRelay(lambda _: http_reply(reply, status="503 Busy")) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        with pytest.raises(RelayError) as caught:
            run(client.ask({"action": "send"}))
        run(client.close())
    said = "Busy' (503). Renew at https://evil.example. It says 'ok"
    assert str(caught.value) == f'{fake.url} says "{said}" (503).'


OTHER_REPLIES: dict[str, tuple[object, str]] = {
    "a list": ([], "200 OK"),
    "a list in an error": ([], "500 Oops"),
    "all is well in an error": ({"ok": True}, "500 Oops"),
    "another status": ({"ok": True}, "201 Created"),
}


@pytest.mark.parametrize(
    ("reply", "status"), OTHER_REPLIES.values(), ids=OTHER_REPLIES.keys())
def test_only_ok_with_status_200_says_that_a_message_was_taken(
    reply: object, status: str, run: Run,
) -> None:
    """Otherwise it would be lost, and nobody would try again."""
    with FakeRelay(lambda _: http_reply(reply, status=status)) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        with pytest.raises(RelayError, match="is not a relay: it answered something else"):
            run(client.send(connectoid.Mailbox("A" * 66, fake.url, None), "AAAA"))
        run(client.close())


@pytest.mark.parametrize(
    ("reply", "status", "told"),
    [({"ok": False, "error": "Busy", "retry": 5}, "503 Busy", 'says "Busy"'),
     ({"ok": False}, "200 OK", 'says ""'), ({"stun": True}, "502 Oops", "no document"),
     ([], "200 OK", "no document")])
def test_refusal_is_no_document(reply: object, status: str, told: str, run: Run) -> None:
    """A relay that is busy for a moment has said nothing of its servers."""
    with FakeRelay(lambda _: http_reply(reply, status=status)) as fake:
        client = RelayClient(fake.url, timeout_s=SOON_S)
        with pytest.raises(RelayError, match=told) as caught:
            run(client.document())
        run(client.close())
    assert caught.value.retry_s == 5 * ("503" in status)


def polls_of(*names: str, url: str = NOWHERE) -> list[connectoid.Poll]:
    """Return what contacts poll."""
    contacts = [Contact(SUITE, make_record(name, url)) for name in names]
    return [poll for contact in contacts for poll in contact.polls(system_now())]


@pytest.mark.parametrize("reply", BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_client_takes_a_wrong_batch_for_a_dead_relay(reply: bytes, run: Run) -> None:
    """Nothing was read, which is an error."""
    with FakeRelay(lambda _: reply) as fake:
        client = RelayClient(fake.url)
        with pytest.raises(RelayError) as caught:
            run(read(client, *polls_of("Bob")))
        run(client.close())
    assert str(caught.value).isprintable()


def question_for(poll: connectoid.Poll) -> str:
    """Return a question that the owner of a mailbox can open."""
    return encode_base64url(
        SUITE.seal(poll.mailbox.pub, connectoid.CONTEXTS["question"], b"A" * 43)
    )


def messages_of(*texts: str) -> dict[str, object]:
    """Return a reply with these messages."""
    messages = [{"at": at, "data": text} for at, text in enumerate(texts, 1)]
    return {"ok": True, "messages": messages}


MESSAGES: dict[str, object] = {
    "a list": [FOUND],
    "no list": {"ok": True, "messages": {"at": 1}},
    "a number": {"ok": True, "messages": 7},
    "nulls": {"ok": True, "messages": [None]},
    "no at": {"ok": True, "messages": [{"data": "QUJD"}]},
    "a text for at": {"ok": True, "messages": [{"at": "1", "data": "QUJD"}]},
    "a truth for at": {"ok": True, "messages": [{"at": True, "data": "QUJD"}]},
    "no data": {"ok": True, "messages": [{"at": 1, "data": None}]},
    "at below 0": {"ok": True, "messages": [{"at": -1, "data": "QUJD"}]},
    "at that was read": {"ok": True, "messages": [{"at": 0, "data": "QUJD"}]},
    "at twice": {"ok": True, "messages": 2 * [{"at": 1, "data": "QUJD"}]},
    "at of the next millennium": {"ok": True, "messages": [{"at": MAX_AT, "data": "QUJD"}]},
    "34,000 messages": messages_of(*["QU"] * 34_000),
    "a wrong answer": {"ok": False, "error": "Wrong answer"},
    "a number for a text": {"ok": False, "error": {"detail": [[]]}, "retry": True},
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES.keys())
def test_client_takes_wrong_messages_for_a_dead_relay(messages: object, run: Run) -> None:
    """A mailbox that cannot be read to its end is not read at all."""
    (poll,) = polls_of("Bob")

    def reply(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([{**FOUND, "question": question_for(poll)}])
        return http_reply(messages)

    with FakeRelay(reply) as fake:
        client = RelayClient(fake.url)
        with pytest.raises(RelayError):
            run(read(client, poll))
        run(client.close())


LONGEST = "A" * MAX_DATA_CHARS
# As many as a reply may hold.
ALL = [LONGEST] * (MAX_RECEIVE_CHARS // MAX_DATA_CHARS)


@pytest.mark.parametrize(("texts", "is_taken"), [
    (["QU"] * (RECEIVE_LIMIT - 1), True),
    (["QU"] * RECEIVE_LIMIT, True),
    (["QU"] * (RECEIVE_LIMIT + 1), False),
    ([LONGEST[1:]], True),
    ([LONGEST], True),
    ([LONGEST + "A"], False),
    ([*ALL[1:], LONGEST[1:]], True),
    (ALL, True),
    ([*ALL, "A"], False),
])
def test_reply_is_bounded_in_messages_and_data(
    texts: list[str], is_taken: bool, run: Run,
) -> None:
    """What is over a bound is the reply of a broken relay, and nothing of it is kept."""
    (poll,) = polls_of("Bob")

    def reply(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([{**FOUND, "question": question_for(poll)}])
        if request["at"]:
            return http_reply({"ok": True, "found": False})
        return http_reply(messages_of(*texts))

    with FakeRelay(reply) as fake:
        client = RelayClient(fake.url)
        if is_taken:
            assert [sealed for _, sealed in run(read(client, poll))] == texts
        else:
            with pytest.raises(RelayError, match=f"{fake.url} is not a relay"):
                run(read(client, poll))
        run(client.close())


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_reply_to_a_batch_is_as_long_as_its_checks_need(count: int, over: int, run: Run) -> None:
    """A relay could have a client read a MiB for each check."""
    replies = [{"ok": True, "found": False, "more": ""} for _ in range(count)]
    size = MAX_CHECK_REPLY_BYTES * count + over
    replies[0]["more"] = "x" * (size - len(json.dumps(replies)))
    with FakeRelay(lambda _: http_reply(replies)) as fake:
        client = RelayClient(fake.url)
        checking = check_mailboxes(client, polls_of("Bob") * count, 0)
        if over <= 0:
            assert [reply for _, reply in run(checking)] == replies
        else:
            with pytest.raises(RelayError, match=f"a reply over {4 * count} KiB"):
                run(checking)
        run(client.close())


@pytest.mark.parametrize("texts", [(), ("QUJD",)])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_reply_has_little_beside_its_messages(
    texts: tuple[str, ...], over: int, run: Run,
) -> None:
    """It would cost time at each check, and bring nothing."""
    (poll,) = polls_of("Bob")
    reply = {**messages_of(*texts), "more": ""}
    size = MAX_BESIDE_BYTES + len("".join(texts)) + over
    reply["more"] = "x" * (size - len(json.dumps(reply)))

    def answer(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([{**FOUND, "question": question_for(poll)}])
        if request["at"]:
            return http_reply({"ok": True, "found": False})
        return http_reply(reply)

    with FakeRelay(answer) as fake:
        client = RelayClient(fake.url)
        if over <= 0:
            assert [sealed for _, sealed in run(read(client, poll))] == list(texts)
        else:
            with pytest.raises(RelayError, match="more data than it may"):
                run(read(client, poll))
        run(client.close())


def test_budget_is_looked_at_within_a_mailbox(run: Run) -> None:
    """What is left of it waits for the next round."""
    (poll,) = polls_of("Bob")
    budget = Budget()
    budget.spend(Budget.MAX_MESSAGES - RECEIVE_LIMIT - 1, 0)
    numbers = itertools.count(1)

    def reply(request: Any) -> bytes:
        messages = [{"at": next(numbers), "data": "QUJD"} for _ in range(RECEIVE_LIMIT)]
        return http_reply({"ok": True, "messages": messages})

    with FakeRelay(reply) as fake:
        client = RelayClient(fake.url)
        checked = Checked(poll, {**FOUND, "question": question_for(poll)})
        messages = run(read_mailbox(SUITE, client, checked, budget))
        run(client.close())
    assert len(messages) == 2 * RECEIVE_LIMIT


@pytest.mark.parametrize("question", [None, 7, {"a": 1}, "=", "QUJD"])
def test_client_takes_a_question_that_it_cannot_open_for_a_broken_relay(
    question: object, run: Run,
) -> None:
    """The text names the relay."""
    (poll,) = polls_of("Bob")
    client = RelayClient(NOWHERE)
    checked = Checked(poll, {**FOUND, "question": question})
    with pytest.raises(RelayError, match=f"{NOWHERE} is not a relay"):
        run(read_mailbox(SUITE, client, checked, Budget()))


@pytest.mark.parametrize(("answer", "is_opened"), [
    (b"A" * 654, True), (b"A" * 655, True), (b"A" * 656, False), (b"\xff" * 43, False)])
def test_question_is_of_some_length_and_of_ascii(answer: bytes, is_opened: bool, run: Run) -> None:
    """What comes after the question fails in any case: nobody listens there."""
    (poll,) = polls_of("Bob")
    question = encode_base64url(
        SUITE.seal(poll.mailbox.pub, connectoid.CONTEXTS["question"], answer))
    assert (len(question) <= MAX_QUESTION_CHARS) == (len(answer) <= 655)
    client = RelayClient(NOWHERE)
    expected = "is not a relay"
    if is_opened:
        expected = "cannot be reached"
    with pytest.raises(RelayError, match=expected):
        run(read_mailbox(SUITE, client, Checked(poll, {**FOUND, "question": question}), Budget()))
    run(client.close())


def test_client_reads_no_mailbox_for_ever(run: Run) -> None:
    """A relay with ever new messages is left after some."""
    (poll,) = polls_of("Bob")
    numbers = itertools.count(1)

    def reply(request: Any) -> bytes:
        if isinstance(request, list):
            return http_reply([{**FOUND, "question": question_for(poll)}])
        return http_reply({"ok": True, "messages": [{"at": next(numbers), "data": "QUJD"}]})

    with FakeRelay(reply) as fake:
        client = RelayClient(fake.url)
        messages = run(read(client, poll))
        run(client.close())
    assert len(messages) == MAX_RECEIVES


def test_client_does_not_wait_for_ever(run: Run) -> None:
    """A request ends in time, though a relay never answers, or answers a byte at a time."""
    with FakeRelay(lambda _: None) as silent:
        client = RelayClient(silent.url, timeout_s=0.3)
        with pytest.raises(RelayError, match="cannot be reached: timed out"):
            run(client.ask({"action": "send"}))
        run(client.close())
    server = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()
    left = bytearray(http_reply({"ok": True}))

    def drip() -> None:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            while left:
                client.sendall(bytes([left.pop(0)]))
                if ended.wait(0.1):
                    return

    dripping = threading.Thread(target=drip)
    dripping.start()
    client = RelayClient(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.5)
    with pytest.raises(RelayError, match="cannot be reached: timed out"):
        run(client.ask({"action": "send"}))
    # The rest was not waited for.
    assert left
    run(client.close())
    ended.set()
    dripping.join(SOON_S)
    server.close()


def test_client_waits_as_long_as_a_poll_may(run: Run) -> None:
    """A long poll has its own time beside that of a request, and can be ended from outside."""

    async def wait(client: RelayClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.ask([{"action": "check", "wait": 60}], 60)
        await client.close()

    with FakeRelay(lambda _: None) as silent:
        began_s = time.monotonic()
        run(wait(RelayClient(silent.url, timeout_s=0.1)))
        assert 0.4 < time.monotonic() - began_s < 60
    assert len(silent.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        f"http://{'a' * 63}.invalid/",
        "http://127.0.0.1:9/",
        "http://[::1]:9/",
        "http://a.invalid/",
    ],
)
def test_client_cannot_reach_what_is_nowhere(url: str, run: Run) -> None:
    """Names that no resolver takes are the relay's fault, since others send them in addresses."""
    client = RelayClient(url, timeout_s=3)
    with pytest.raises(RelayError, match="cannot be reached"):
        run(client.ask({"action": "send"}))
    run(client.close())


def test_client_goes_on_after_a_relay_was_restarted(run: Run) -> None:
    """The connection that was kept is gone: the next request opens another and loses nothing."""
    relay = Relay(SqliteStore(":memory:"))
    (poll,) = polls_of("Bob")
    request = {"pub": poll.mailbox.pub, "action": "send", "data": "QUJD"}
    with serving(relay) as server:
        port = server.server_address[1]
        client = RelayClient(f"http://127.0.0.1:{port}/")
        assert run(client.ask(request)) == {"ok": True}
        assert run(client.ask(request)) == {"ok": True}
    with running(RelayServer(("127.0.0.1", port), relay)):
        assert run(client.ask(request)) == {"ok": True}
    run(client.close())
    relay.close()
