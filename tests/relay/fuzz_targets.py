"""Give an input to each reader of the relay, and compare what it makes of it with the judges.

The targets are in a table. The tests call them with some inputs, `bench/fuzz.py` calls them for
as long as one likes.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import logging
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple

import h11
import pytest
from fuzz_inputs import CHECK, HTTP_SEEDS, JSON_SEEDS, KEY, MAX_DATAGRAM_BYTES, UDP_SEEDS
from fuzz_judges import (
    BAD,
    BASE64URL,
    LIMITS,
    OK,
    STATUS_OF,
    Asked,
    NotJson,
    is_deep,
    is_integer,
    is_pub,
    judge,
    judge_body,
    may_wait,
    path_of,
    read_asked,
    read_conversation,
    split_field,
    statuses_of,
    strict_json,
)
from harness import SOURCE

from connectoid_relay import (
    ERRORS,
    Access,
    Head,
    Networks,
    Quota,
    RateLimit,
    Refusal,
    Relay,
    RelayServer,
    Reply,
    SqliteStore,
    Wait,
    answer_datagram,
    answer_stun,
    client_of,
    is_stun,
    parse_head,
    render,
    take_head,
)

# ---------------------------------------------------------------------------------------
# The world: relays and servers that live as long as the inputs come, and what they let out.
# ---------------------------------------------------------------------------------------

# Counts of one source in each rate limit. All others are of boxes with messages.
SPARE_COUNTS = 8
# Nothing takes this long unless it hangs.
HANG_S = 20.0
FENCE = json.dumps({**CHECK, "id": "fence-fence-1234"}).encode()


class Log(logging.Handler):
    """Keep what is logged: nothing that a client sends may cause a line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, with its traceback."""
        self.lines.append(self.format(record))


class World:
    """Hold a relay for the core, and three that serve: whole inputs, pieces, and more behind."""

    def __init__(self) -> None:
        self.log = Log()
        self.drawn: list[bytes] = []
        logging.getLogger("connectoid_relay").addHandler(self.log)
        access = Access({KEY: Quota("alice", requests_per_day=10**9)})
        self.core, *relays = (
            Relay(SqliteStore(":memory:"), LIMITS, access=access, random_bytes=self.draw)
            for _ in range(4)
        )
        self.servers = [
            RelayServer(("127.0.0.1", 0), relay, udp=True, stun=True) for relay in relays
        ]
        self.holders: list[object] = [*self.servers, *relays, self.core]
        self.sizes_at_first = [sizes(holder) for holder in self.holders]
        self.threads = [
            threading.Thread(target=server.serve_forever, daemon=True) for server in self.servers
        ]
        for thread in self.threads:
            thread.start()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.connect(("127.0.0.1", self.servers[0].server_port))
        self.udp.settimeout(HANG_S)

    def draw(self, count: int) -> bytes:
        """Return random bytes and remember them: they are secrets."""
        self.drawn.append(secrets.token_bytes(count))
        return self.drawn[-1]

    def check_secrets(self, text: bytes) -> None:
        """Fail if a reply has a secret in it, or if anything was logged."""
        assert not self.log.lines, self.log.lines[:3]
        assert KEY.encode() not in text
        for drawn in self.drawn:
            assert base64.urlsafe_b64encode(drawn).rstrip(b"=") not in text
            assert drawn not in text

    def check_memory(self) -> None:
        """Fail if something of a client is left: refused requests have no place in any table."""
        for holder, first in zip(self.holders, self.sizes_at_first, strict=True):
            left = {name: size for name, size in sizes(holder).items() if size > first.get(name, 0)}
            assert not left, f"left behind: {left}"
        for relay in (self.core, *(server.relay for server in self.servers)):
            counted = sum(
                sum(sizes(limit).values())
                for limit in vars(relay).values()
                if isinstance(limit, RateLimit)
            )
            assert counted <= relay.store.stored().messages + SPARE_COUNTS

    def close(self) -> None:
        """Stop all servers; then nothing of any client may be left in them."""
        try:
            self.udp.close()
            for server in self.servers:
                server.shutdown()
            self.check_memory()
            self.check_secrets(b"")
        finally:
            logging.getLogger("connectoid_relay").removeHandler(self.log)
            for server in self.servers:
                server.server_close()
                server.relay.close()
            self.core.close()


def sizes(holder: object) -> dict[str, int]:
    """Return how much is in each container that an object has, by name."""
    return {name: len(value) for name, value in vars(holder).items()
            if isinstance(value, Sized) and not isinstance(value, str | bytes | tuple)}


# ---------------------------------------------------------------------------------------
# Targets: each takes octets and the world, and asserts what is promised.
# ---------------------------------------------------------------------------------------

PROXIES = Networks(["127.0.0.0/8", "::1"])


def taken(octets: bytes, cuts: Sequence[int]) -> tuple[Head | str | None, bytes]:
    """Return what take_head makes of octets that come in pieces, and what it leaves."""
    incoming = bytearray()
    searched = 0
    for start, end in zip([0, *cuts], [*cuts, len(octets)], strict=True):
        incoming += octets[start:end]
        try:
            head = take_head(incoming, LIMITS, searched)
        except Refusal as refusal:
            return str(refusal.error.status), b""
        if head:
            return head, bytes(incoming) + octets[end:]
        searched = len(incoming)
    return None, b""


def try_heads(octets: bytes, _world: World) -> None:
    """A head is the same however it comes, to the judge, and to h11."""
    head, rest = taken(octets, [])
    in_bytes, rest_of_bytes = taken(octets, range(1, len(octets)))
    conversation, after = read_conversation(octets)
    if isinstance(head, Head):
        assert (in_bytes, rest_of_bytes) == (head, rest)
        assert read_asked(octets[: len(octets) - len(rest) - 4])[2:4] == (
            head.length,
            head.keep_alive,
        )
        compare_with_h11(octets, head, rest)
        assert client_of("127.0.0.1", head.forwarded_for, PROXIES)
        assert b"\r\n\r\n" in render(Reply(200, {"ok": True}), head)
    else:
        assert not conversation
        if not octets:
            after = {1}
        assert {int(str(text or 1)) for text in (head, in_bytes)} <= after


def try_whole_head(octets: bytes, _world: World) -> None:
    """parse_head takes what the judge takes, and refuses all else with one Bad request."""
    octets = octets.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    try:
        wanted = read_asked(octets[:-4])
    except ValueError:
        with pytest.raises(Refusal) as refused:
            parse_head(octets)
        assert refused.value.error.text == BAD
        return
    head = parse_head(octets)
    assert (head.method.encode(), head.path.encode(), head.length, head.keep_alive) == (
        wanted.method, path_of(wanted.target), wanted.length, wanted.keep_alive)


def compare_with_h11(octets: bytes, head: Head, rest: bytes) -> None:
    """What we read h11 reads too, with the same body and the same rest.

    Differences that are meant: we do without Host (h11 wants exactly one in HTTP/1.1), so each
    head gets one here in place of its own; and we close on "close" within a longer word.
    """
    text, _, _ = octets.partition(b"\r\n\r\n")
    first, *lines = text.split(b"\r\n")
    lines = [line for line in lines if line[:5].lower() != b"host:"]
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    peer.receive_data(b"\r\n".join([first, b"Host: relay", *lines, b"", rest]))
    request = peer.next_event()
    assert isinstance(request, h11.Request), request
    path = path_of(request.target).decode()
    assert (request.method.decode(), path) == (head.method, head.path)
    if len(rest) >= head.length:
        body, keeps = read_with_h11(peer)
        assert body == rest[:head.length]
        assert peer.trailing_data[0] == rest[head.length:]
        assert keeps or not head.keep_alive


def read_with_h11(peer: h11.Connection) -> tuple[bytes, bool]:
    """Return the body of a request, and whether the connection is good for another."""
    body = b""
    while isinstance(event := peer.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage), event
    return body, peer.their_state is not h11.MUST_CLOSE


def check_reply(reply: Reply, verdict: str | list[str], value: object) -> None:
    """A reply has the form of the protocol and says what the judge says."""
    json.dumps(reply.body, allow_nan=False).encode("ascii")
    if isinstance(verdict, list):
        assert reply.status == 200
        assert isinstance(reply.body, list)
        assert [item.get("error", OK) for item in reply.body] == verdict
        assert all(item["ok"] is ("error" not in item) for item in reply.body)
        return
    said = reply.body.get("error", OK)
    assert reply.body["ok"] is (said == OK)
    assert reply.status in {**STATUS_OF, OK: {200}}[said]
    full = isinstance(value, dict) and value.get("action") == "send" and said == "Too often"
    assert said == verdict or (verdict == OK and full), (said, verdict)
    if said == OK:
        assert reply.body.keys() <= {"ok", "found", "question"}
    else:
        assert reply.body.keys() <= {"ok", "error", "detail", "retry"}


def try_core(octets: bytes, world: World) -> None:
    """A body gets the right reply on every way in, and only a good send is stored."""
    value, verdict = judge_body(octets)
    replies = [finish(world, lambda: world.core.perform(world.core.begin(octets, SOURCE)), value)]
    if verdict != BAD or value is not None:
        replies.append(finish(world, lambda: world.core.handle(value, SOURCE), value))
    for reply in replies:
        if not is_deep(octets):
            check_reply(reply, verdict, value)
        world.check_secrets(json.dumps(reply.body).encode())


def finish(world: World, ask: Callable[[], Reply | Wait], value: object) -> Reply:
    """Return the reply to a request, after a look at what is stored."""
    before = world.core.store.stored()
    outcome = ask()
    reply = outcome
    if isinstance(outcome, Wait):
        reply = outcome.reply
    assert isinstance(reply, Reply)
    after = world.core.store.stored()
    sends = isinstance(value, dict) and value.get("action") == "send"
    if sends and reply.body == {"ok": True}:
        before = before._replace(messages=before.messages + 1, bytes=after.bytes)
    assert after == before
    return reply


def try_value(value: object, world: World) -> None:
    """Relay.handle gives any value what it ought to get."""
    reply = finish(world, lambda: world.core.handle(value, SOURCE), value)
    check_reply(reply, judge(value), value)


def wanted_of_datagram(octets: bytes) -> dict[str, Any] | None:
    """Return what the reply to a check in a datagram has beside `found`; None for no reply."""
    with contextlib.suppress(NotJson):
        request = strict_json(octets)
        if (
            len(octets) <= 2_048
            and isinstance(request, dict)
            and request.get("action") == "check"
            and is_pub(request.get("pub"))
            and is_integer(request.get("at", 0))
        ):
            if "id" not in request:
                return {"ok": True}
            if is_id(request["id"]):
                return {"ok": True, "id": request["id"]}
    return None


def is_id(name: object) -> bool:
    """Return whether a value has the form of `id`."""
    return isinstance(name, str) and 1 <= len(name) <= 16 and not set(name) - BASE64URL


def is_binding(octets: bytes) -> bool:
    """Return whether octets are a Binding request of RFC 8489 that needs nothing understood."""
    if len(octets) < 20 or struct.unpack(">HH", octets[:4]) != (1, len(octets) - 20):
        return False
    rest = octets[20:]
    while len(rest) >= 4:
        kind, size = struct.unpack(">HH", rest[:4])
        padded = 4 + (size + 3) // 4 * 4
        if kind < 0x8000 or len(rest) < padded:
            return False
        rest = rest[padded:]
    return not rest


def check_datagram(octets: bytes, reply: bytes | None, address: tuple[str, int]) -> None:
    """A datagram gets what it ought to get, or nothing."""
    if len(octets) >= 20 and octets[0] < 64 and octets[4:8] == b"\x21\x12\xa4\x42":
        masked = bytes(
            one ^ other
            for one, other in zip(socket.inet_aton(address[0]), octets[4:8], strict=True)
        )
        wanted = struct.pack(">HHI12sHHxBH4s", 0x101, 12, 0x2112A442, octets[8:20], 0x20, 8, 1,
                             address[1] ^ 0x2112, masked)
        if is_binding(octets):
            assert reply == wanted
        else:
            assert reply is None
        return
    members = wanted_of_datagram(octets)
    if reply is None:
        shortest = len(json.dumps({**(members or {}), "found": True}))
        assert members is None or shortest + 1 > len(octets) or is_deep(octets)
        return
    assert members is not None
    assert len(reply) <= len(octets)
    told = json.loads(reply)
    assert isinstance(told.pop("found"), bool)
    assert told == members


def try_datagram(octets: bytes, world: World) -> None:
    """answer_datagram and answer_stun say what they ought to, and store nothing."""
    before = world.core.store.stored()
    reply = (
        answer_stun(octets, SOURCE, 4_242)
        if is_stun(octets)
        else answer_datagram(world.core, octets, SOURCE)
    )
    check_datagram(octets, reply, (SOURCE, 4_242))
    assert world.core.store.stored() == before
    world.check_secrets(reply or b"")


def try_udp(octets: bytes, world: World) -> None:
    """A socket gets at most one datagram for each that it sends; a last one shows the end."""
    octets = octets[:MAX_DATAGRAM_BYTES]
    world.udp.send(octets)
    world.udp.send(FENCE)
    replies = []
    while b"fence-fence-1234" not in (reply := world.udp.recv(4_096)):
        replies.append(reply)
    assert len(replies) <= 1, replies
    if FENCE.strip(b"{}") not in octets:
        check_datagram(octets, replies[0] if replies else None, world.udp.getsockname())


class Answer(NamedTuple):
    """A reply on a connection."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def exchange(port: int, pieces: Sequence[bytes]) -> bytes:
    """Send pieces and the end, and return all that comes until the other side closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), HANG_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The relay may have closed; what it said before can still be read.
        with contextlib.suppress(OSError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while chunk := client.recv(1 << 16):
                received += chunk
    return received


def has_no_body(status: int, asked: Sequence[Asked]) -> bool:
    """Return whether the reply to the first of these requests ends with its head."""
    return status == 204 or any(request.method == b"HEAD" for request in asked[:1])


def read_answers(received: bytes, asked: Sequence[Asked]) -> list[Answer]:
    """Return the replies in what was received, strictly; whatever is left over is a failure."""
    answers: list[Answer] = []
    while received:
        if received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
            received = received[25:]
            continue
        head, end, received = received.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        status = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+", first)
        assert end, head
        assert status, first
        headers = dict(split_field(line) for line in lines)
        assert len(headers) == len(lines), "a header twice"
        size = int(headers.get(b"content-length", 0))
        if has_no_body(int(status[1]), asked[len(answers):]):
            size = 0
        assert len(received) >= size, "a body cut off"
        answers.append(Answer(int(status[1]), headers, received[:size]))
        received = received[size:]
    return answers


def check_answer(answer: Answer, request: Asked | None) -> None:
    """A reply is whole and says no more than it may."""
    assert answer.headers[b"access-control-allow-origin"] == b"*"
    assert answer.status in {200, 204, *(error.status for error in ERRORS)} - {503, 507, 408}, (
        answer
    )
    if answer.headers.get(b"content-type") == b"application/json" and answer.body:
        told = strict_json(answer.body)
        items = told if isinstance(told, list) else [told]
        errors = [item.get("error") for item in items if isinstance(item, dict)]
        assert all(error is None or error in STATUS_OF for error in errors)
        if not isinstance(told, list) and answer.status != 200:
            assert isinstance(told, dict)
            assert (told["ok"], answer.status in STATUS_OF[told["error"]]) == (False, True)
            assert str(told.get("retry", "")).encode() == answer.headers.get(b"retry-after", b"")
    last = request is None or not request.keep_alive
    assert (answer.headers.get(b"connection") == b"close") is last, answer


def check_conversation(answers: Sequence[Answer], asked: Sequence[Asked], after: set[int]) -> None:
    """Each request has one reply, in order; an error of HTTP is the last reply."""
    wanted = len(asked) + (min(after) >= 400)
    # A client that still sends when we close is reset, and may lose its last reply (after {2}).
    missing = after == {2} or (bool(asked) and after <= {0, 1} and may_wait(asked[-1]))
    assert wanted - missing <= len(answers) <= wanted, (answers, asked, after)
    for answer, request in itertools.zip_longest(answers, asked[:len(answers)]):
        check_answer(answer, request)
        statuses = after
        if request:
            statuses = statuses_of(request)
        assert answer.status in statuses, (answer, request)


def gist(answer: Answer) -> tuple[Any, ...]:
    """Return what does not change with the time of a reply."""
    told = re.sub(rb'"(question|at|retry|detail)": ("[^"]*"|[0-9]+)', b"", answer.body)
    is_json = (
        answer.headers.get(b"content-type") == b"application/json" and b'"software"' not in told
    )
    headers = {
        name: value
        for name, value in answer.headers.items()
        if name not in (b"content-length", b"retry-after")
    }
    if not is_json:
        return answer.status, headers
    return answer.status, headers, told


TRAILER = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"


def in_pieces(octets: bytes) -> list[bytes]:
    """Return the single bytes of what is short, else some pieces that cut lines and bodies."""
    size = 1
    if len(octets) > 300:
        size = len(octets) // 61
    return [octets[start:start + size] for start in range(0, len(octets), size)]


def try_socket(octets: bytes, world: World) -> None:
    """Three servers reply alike: to the whole, to pieces, and with one more request behind."""
    asked, after = read_conversation(octets)
    stored = [server.relay.store.stored().messages for server in world.servers]
    whole, cut = (
        read_answers(exchange(server.server_port, pieces), asked)
        for server, pieces in zip(world.servers, ([octets], in_pieces(octets)), strict=False)
    )
    check_conversation(whole, asked, after)
    check_conversation(cut, asked, after)
    for one, other in zip(whole, cut, strict=False):
        assert gist(one) == gist(other) or len(after) > 1
    received = exchange(world.servers[2].server_port, [octets + TRAILER])
    asked_of_all, after_all = read_conversation(octets + TRAILER)
    behind = read_answers(received, asked_of_all)
    check_conversation(behind, asked_of_all, after_all)
    if after == {0} and (not asked or asked[-1].keep_alive):
        assert asked_of_all[:-1] == asked
        assert behind[-1].status == 200
    check_stored(world, stored, ((asked, whole), (asked, cut), (asked_of_all, behind)))
    world.check_secrets(received)


Talk = tuple[Sequence[Asked], Sequence[Answer]]


def check_stored(world: World, before: Sequence[int], talks: Sequence[Talk]) -> None:
    """Each store has as many messages more as sends were answered with ok, or lost their reply."""
    for server, messages, (asked, answers) in zip(world.servers, before, talks, strict=True):
        kept = sum(answer.body.strip() == b'{"ok": true}' and request.method == b"POST"
                   for request, answer in zip(asked, answers, strict=False))
        lost = max(0, len(asked) - len(answers))
        assert 0 <= server.relay.store.stored().messages - messages - kept <= lost


Target = Callable[[bytes, World], None]
TARGETS: dict[str, tuple[Target, dict[str, bytes]]] = {
    "take_head": (try_heads, HTTP_SEEDS),
    "parse_head": (try_whole_head, HTTP_SEEDS),
    "core": (try_core, JSON_SEEDS),
    "datagram": (try_datagram, UDP_SEEDS),
    "HTTP socket": (try_socket, HTTP_SEEDS),
    "UDP socket": (try_udp, UDP_SEEDS),
}
