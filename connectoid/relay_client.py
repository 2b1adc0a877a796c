"""The client of a relay, on an event loop. It believes nothing.

PROTOCOL.md, "Operations", "Guards".
"""

from __future__ import annotations

import contextvars
import importlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from connectoid.clock import system_now
from connectoid.contact import Poll
from connectoid.encoding import decode_base64url, parse_json
from connectoid.errors import ConnectoidError, Refused, UsageError
from connectoid.limits import NO_AT
from connectoid.links import Mailbox
from connectoid.shown import shown
from connectoid.suite import CONTEXTS, Suite
from connectoid.urls import check_url

REQUEST_TIMEOUT_S = 10.0
# 100 messages in 512 KiB, with their JSON.
MAX_REPLY_BYTES = 1024 * 1024
# Of the reply to a send: a word, or an error with a sentence. Contacts and strangers choose what
# relays they are written to, and could have us download without end.
MAX_SEND_REPLY_BYTES = 4 * 1024
# Of the reply to each check of a batch, so that a whole one has a MiB.
MAX_CHECK_REPLY_BYTES = 4 * 1024
# Of the reply to `receive`, beside the data of its messages: 100 messages take 5 KiB. Whatever else
# a relay answers would cost time, and bring nothing.
MAX_BESIDE_BYTES = 16 * 1024
# Of commas and brackets in a reply. A batch of 256 checks has some 2,000. A MiB of empty lists
# would take half a second to parse.
MAX_REPLY_MARKS = 8_192
OK = 200
MAX_RETRY_S = 900.0
# A shorter pause is over before anybody has read of it, and after a longer one nobody waits.
MIN_TOLD_PAUSE_S = 60.0
MAX_TOLD_PAUSE_S = 86_400.0
# What nginx, Apache, Caddy and others answer to HTTP on their port of TLS.
SPOKE_HTTP_TO_TLS = re.compile(
    rb"plain HTTP (?:request was sent )?to (?:an )?(?:HTTPS|SSL-enabled)|HTTP request to an HTTPS")
MAX_BATCH_CHECKS = 256
# What a refusal means to a user: to be told after the relay's own words.
HINTS: Mapping[str, str] = {
    "Full": " The relay says that others have filled that mailbox, or all of it. It is tried again;"
    " if nothing comes of it, ask for a new link.",
}
# Messages that are asked for at once.
RECEIVE_LIMIT = 100
# The bound of `at`: JavaScript's numbers are exact below it. In microseconds it is the year 2255.
MAX_AT = 2**53
# Of one mailbox in a round: more than a box holds.
MAX_RECEIVES = 16
# Of the data in one reply, and of one message: what PROTOCOL.md allows (RECEIVE-10, FORM-3).
MAX_RECEIVE_CHARS = 512 * 1024
MAX_DATA_CHARS = 32_768
# Of a question: an answer of 655 bytes. Relays choose some 43.
MAX_QUESTION_CHARS = 1_024
# On whose behalf the requests of a task are made: what a transport bounds, it bounds for each. In
# a task that does not say so, each host is one of its own.
ON_BEHALF_OF: contextvars.ContextVar[object] = contextvars.ContextVar("on_behalf_of")


class RelayError(ConnectoidError):
    """A relay cannot be reached, or answers rubbish."""

    # The pause that it asked for.
    retry_s = 0.0


class UnreachableError(RelayError):
    """There was no whole reply of a relay, or of anything in its place."""


class RelayRefusalError(RelayError):
    """A relay has answered, and refuses one request. `retry_s` is the pause that it asked for."""

    def __init__(self, text: str, retry_s: float = 0.0) -> None:
        super().__init__(text)
        self.retry_s = retry_s


class TransportError(ConnectionError):
    """An exchange failed before there was a whole reply; the text says how."""


class Transport(Protocol):
    """Carries requests to relays: HttpTransport, or a fake in tests."""

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = MAX_REPLY_BYTES,
    ) -> tuple[int, bytes]:
        """Return status and body of a reply; raise TransportError, also for a larger body."""

    async def renew(self) -> None:
        """Close all connections, and make new ones from now on."""

    async def close(self) -> None:
        """Close all connections."""


def make_transport(
    ca_file: str | None = None, may_be_private: Callable[[str], bool] | None = None,
) -> Transport:
    """Return a transport for the running loop; raise UsageError if aiohttp is missing."""
    try:
        module = importlib.import_module("connectoid.http_transport")
    except ImportError as error:
        raise UsageError(str(error)) from None
    transport: Transport = module.HttpTransport(ca_file, may_be_private)
    return transport


class Measured(NamedTuple):
    """A reply, and how many octets it had."""

    reply: Any
    octets: int


class RelayClient:
    """Ask one relay. Cancel a request to end it.

    The methods are coroutines of the loop on which the client is first used. Without a transport
    it makes one of its own, which `close` closes.
    """

    def __init__(
        self, url: str, transport: Transport | None = None, *,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        check_url(url, allow_http=True)
        self.url = url
        self._timeout_s = timeout_s
        self._transport = transport
        self._owns_transport = transport is None

    async def send(self, mailbox: Mailbox, data: str) -> None:
        """Put a message into a mailbox; raise RelayRefusalError, RelayError."""
        request = {"pub": mailbox.pub, "ext": mailbox.ext, "action": "send", "data": data}
        await self.ask(request, max_bytes=MAX_SEND_REPLY_BYTES)

    async def ask(
        self, request: object, wait_s: float = 0.0, max_bytes: int = MAX_REPLY_BYTES,
    ) -> Any:
        """Return the reply to a request: an object with `ok` true, or the list of a batch.

        Raises RelayRefusalError, RelayError. A request that the relay holds back has `wait_s` more
        time.
        """
        return (await self.ask_measured(request, wait_s, max_bytes)).reply

    async def ask_measured(
        self, request: object, wait_s: float = 0.0, max_bytes: int = MAX_REPLY_BYTES,
    ) -> Measured:
        """Return the reply to a request as `ask`, and its size."""
        body = json.dumps(request).encode("utf-8")
        status, octets = await self._exchange("POST", body, wait_s, max_bytes)
        reply = self._read(octets)
        if isinstance(reply, dict) and reply.get("ok") is not True:
            raise self._refusal(status, reply)
        if status != OK or isinstance(reply, list) != isinstance(request, list):
            raise RelayError(f"{self.url} is not a relay: it answered something else ({status}).")
        return Measured(reply, len(octets))

    async def document(self) -> Mapping[str, Any]:
        """Return what a relay says of itself; raise RelayRefusalError, RelayError."""
        status, octets = await self._exchange("GET", b"", 0.0, MAX_REPLY_BYTES)
        reply = self._read(octets)
        # A refusal alone has to say whether all is well.
        if isinstance(reply, dict) and reply.get("ok", True) is not True:
            raise self._refusal(status, reply)
        if status != OK or not isinstance(reply, dict):
            raise RelayError(f"{self.url} is not a relay: it answered no document ({status}).")
        return reply

    def _refusal(self, status: int, reply: Mapping[str, Any]) -> RelayRefusalError:
        error = _text_of(reply, "error")
        words = filter(None, (error, _text_of(reply, "detail")))
        # The relay's words end where we say so.
        said = shown(": ".join(words)).removesuffix(".").replace('"', "'")
        hint = HINTS.get(error, "") + _until(reply.get("retry"))
        text = f'{self.url} says "{said}" ({status}).{hint}'
        return RelayRefusalError(text, _retry_of(reply))

    async def close(self) -> None:
        """Close the connections, unless others use the transport too."""
        if self._owns_transport and self._transport is not None:
            await self._transport.close()
            self._transport = None

    async def _exchange(
        self, method: str, body: bytes, wait_s: float, max_bytes: int,
    ) -> tuple[int, bytes]:
        if self._transport is None:
            self._transport = make_transport()
        try:
            return await self._transport.exchange(
                method, self.url, body, timeout_s=self._timeout_s, wait_s=wait_s,
                max_bytes=max_bytes)
        except TransportError as error:
            # Some of it is what a stranger's server says.
            said = shown(str(error))
            raise UnreachableError(f"{self.url} cannot be reached: {said}.") from None

    def _read(self, octets: bytes) -> Any:
        if sum(map(octets.count, b",[{")) > MAX_REPLY_MARKS:
            raise RelayError(f"{self.url} is not a relay: it answered more than was asked.")
        try:
            reply = parse_json(octets)
        except Refused:
            raise RelayError(f"{self.url} is not a relay: {_kind_of(octets)}.") from None
        if not isinstance(reply, dict | list):
            raise RelayError(f"{self.url} is not a relay: it answered no object and no list.")
        return reply


def _kind_of(octets: bytes) -> str:
    """Return what there is in place of JSON, and what that may mean to a user."""
    if SPOKE_HTTP_TO_TLS.search(octets):
        return "it speaks TLS, and its address begins with https://"
    if octets.lstrip().startswith(b"<"):
        return (
            "it answered a web page, as networks do where users have to log in: open a web page"
            " there")
    return "it answered what is not JSON"


def _text_of(reply: Mapping[str, Any], name: str) -> str:
    """Return a member that is text, else nothing: a relay may have put anything there."""
    text = reply.get(name)
    if isinstance(text, str):
        return text
    return ""


def _until(retry: object) -> str:
    """Return until when a relay wants to be left alone, for people; nothing if that is soon."""
    if not isinstance(retry, int | float) or not MIN_TOLD_PAUSE_S < retry <= MAX_TOLD_PAUSE_S:
        return ""
    # The minute after, as the clock shows no seconds.
    until_s = system_now().wall_us / 1e6 + retry + MIN_TOLD_PAUSE_S
    return f" It asks you to wait until {time.strftime('%H:%M', time.localtime(until_s))}."


def _retry_of(reply: Mapping[str, Any]) -> float:
    retry = reply.get("retry")
    if isinstance(retry, int | float) and retry is not True and retry > 0:
        return float(min(retry, MAX_RETRY_S))
    return 0.0


# ---------------------------------------------------------------------------------------
# Reading mailboxes: a batch of checks, then for each mailbox with messages an answer.
# ---------------------------------------------------------------------------------------

Boxed = list[tuple[int, str]]


class Budget:
    """What may still be read for one contact in this round.

    It is looked at before each request. Once so much was read, what is left in that mailbox, and
    the contact's other mailboxes at this relay, wait for the next round: a relay that makes
    messages up, or a stranger who fills mailboxes, holds nobody else up.
    """

    # As many as one mailbox can bring.
    MAX_MESSAGES = MAX_RECEIVES * RECEIVE_LIMIT
    # Of replies. Twice what a relay keeps in a box, unless its host has raised that.
    MAX_BYTES = 16 * 1024 * 1024

    def __init__(self) -> None:
        self.questions = 0
        self._messages = 0
        self._bytes = 0

    @property
    def opened(self) -> int:
        """Return how many decryptions it takes: one for each question and message."""
        return self.questions + self._messages

    @property
    def is_spent(self) -> bool:
        """Return whether nothing more may be read."""
        return self._messages >= self.MAX_MESSAGES or self._bytes >= self.MAX_BYTES

    def spend(self, messages: int, octets: int) -> None:
        """Count messages that were read, and the octets of the reply that brought them."""
        self._messages += messages
        self._bytes += octets


class Checked(NamedTuple):
    """A mailbox and what the relay said when it was checked."""

    poll: Poll
    reply: Any


async def check_mailboxes(
    client: RelayClient, polls: Sequence[Poll], wait_s: float,
) -> list[Checked]:
    """Check mailboxes in one batch, and wait until one has messages; raise RelayError."""
    checks = [
        {"pub": poll.mailbox.pub, "ext": poll.mailbox.ext, "action": "check", "at": poll.at,
         "wait": int(wait_s)}
        for poll in polls
    ]
    replies = await client.ask(checks, wait_s, MAX_CHECK_REPLY_BYTES * len(checks))
    if len(replies) != len(checks):
        raise RelayError(f"{client.url} did not answer a batch with as many replies.")
    return [Checked(poll, reply) for poll, reply in zip(polls, replies, strict=True)]


async def read_mailbox(
    suite: Suite, client: RelayClient, checked: Checked, budget: Budget,
) -> Boxed:
    """Return (at, data) of a mailbox that was checked, as far as the budget goes.

    Raises RelayRefusalError, RelayError.
    """
    poll, reply = checked
    if not isinstance(reply, dict):
        raise RelayError(f"{client.url} is not a relay: it answered a check with no object.")
    if reply.get("ok") is not True:
        raise RelayRefusalError(f"{client.url} refused a check.", _retry_of(reply))
    if reply.get("found") is not True:
        return []
    request = {
        "pub": poll.mailbox.pub, "ext": poll.mailbox.ext, "action": "receive",
        "limit": RECEIVE_LIMIT, "answer": _answer_to(suite, client.url, poll, reply),
    }
    budget.questions += 1
    messages: Boxed = []
    at = poll.at
    for _ in range(MAX_RECEIVES):
        if budget.is_spent:
            break
        found = await client.ask_measured({**request, "at": at})
        more = _messages_of(client.url, found, at)
        budget.spend(len(more), found.octets)
        if not more:
            break
        messages += more
        at = more[-1][0]
    return messages


async def ask_for_turn(suite: Suite, client: RelayClient, poll: Poll) -> object | None:
    """Return what a relay lends to the owner of a mailbox, None if nothing; raise RelayError.

    It takes a proof, and no message. PROTOCOL.md, "TURN".
    """
    request = {"pub": poll.mailbox.pub, "ext": poll.mailbox.ext, "at": NO_AT}
    asked = await client.ask({**request, "action": "check", "prove": True})
    # An older relay asks nothing where there is no message.
    if "question" not in asked:
        return None
    answer = _answer_to(suite, client.url, poll, asked)
    found = await client.ask({**request, "action": "receive", "answer": answer, "turn": True})
    lent: object = found.get("turn")
    return lent


def _answer_to(suite: Suite, url: str, poll: Poll, reply: Mapping[str, Any]) -> str:
    question = _text_of(reply, "question")
    if len(question) > MAX_QUESTION_CHARS:
        raise RelayError(f"{url} is not a relay: its question is too long.")
    try:
        octets = decode_base64url(question)
        return suite.open(poll.key, CONTEXTS["question"], octets).decode("ascii")
    except (Refused, UnicodeDecodeError):
        raise RelayError(f"{url} is not a relay: it asked what only others can answer.") from None


def _messages_of(url: str, received: Measured, after: int) -> Boxed:
    """Return the messages of a reply as (at, data), none at the end of a mailbox.

    Raises RelayError for more than was asked for or than a relay may answer, before any is kept.
    """
    messages = received.reply.get("messages", [])
    if not isinstance(messages, list) or len(messages) > RECEIVE_LIMIT:
        raise RelayError(f"{url} is not a relay: it answered no list, or one that is too long.")
    found: Boxed = []
    for message in messages:
        if not _is_message(message, after):
            raise RelayError(f"{url} is not a relay: it answered messages of a wrong form.")
        after = message["at"]
        found.append((after, message["data"]))
    chars = sum(len(sealed) for _, sealed in found)
    if chars > MAX_RECEIVE_CHARS or received.octets > chars + MAX_BESIDE_BYTES:
        raise RelayError(f"{url} is not a relay: it answered more data than it may.")
    return found


def _is_message(message: object, after: int) -> bool:
    """Return whether a message has its form and comes after another one."""
    match message:
        # Not int(): True is an int.
        case {"at": at, "data": str(sealed)} if type(at) is int:
            return after < at < MAX_AT and len(sealed) <= MAX_DATA_CHARS
    return False
