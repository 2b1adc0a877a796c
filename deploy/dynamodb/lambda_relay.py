"""Run the Connectoid relay on AWS Lambda, behind a function URL.

README.md beside this file, "AWS Lambda", says how. Lambda imports this file once in each
instance, then calls `handler` with one event at a time (payload format 2.0). Instances share
nothing but the table. Between two events an instance is frozen, and after any of them it may
be gone: so no thread sweeps, and nobody waits. A check that finds nothing is answered at once,
which PROTOCOL.md ("check") allows.
"""

from __future__ import annotations

import argparse
import binascii
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from dynamodb_store import DynamoDbStore, check_limits, make_client

from connectoid_relay import (
    BAD_REQUEST,
    BUSY,
    MINUTE_US,
    SECOND_US,
    SYSTEM_CLOCK,
    About,
    Clock,
    Head,
    Limits,
    RateLimit,
    Refusal,
    Relay,
    Reply,
    SettingError,
    StoreError,
    answer_at_once,
    build_parser,
    flag_of,
    read_access,
    respond_in_pairs,
)

log = logging.getLogger("connectoid_relay")

# The environment variable with the name of the DynamoDB table.
TABLE = "CONNECTOID_TABLE"
# The one with flags as on any machine, but for SERVER_FLAGS: docs/hosting.md, "Flags".
FLAGS = "CONNECTOID_FLAGS"
# Flags of sockets, which AWS has, and of the database file: they would do nothing here. Neither
# would those of TURN: everybody may read what is in a function's package.
SERVER_FLAGS = frozenset((
    "host", "port", "db", "sync", "udp", "stun", "turn", "turn_secret", "tls_cert", "tls_key",
    "trusted_proxy", "max_udp", "max_header_bytes", "request_timeout_s", "idle_timeout_s",
    "max_connections", "max_connections_per_source", "max_waiting", "max_waiting_per_source",
    "max_queued", "max_buffered_bytes"))
# How often an instance sweeps. /health calls a sweeper late that has not swept for longer.
SWEEP_EVERY_US = MINUTE_US
# How many a sweep deletes at a time, so that a request that sweeps is not late by much.
SWEEP_STEPS = 8
# How long until a host may have corrected a setting.
SETTING_RETRY_S = 60
# How long until the table may answer again.
STORE_RETRY_S = 5


def read_flags(text: str) -> argparse.Namespace:
    """Return what the flags say.

    Raises SettingError for a wrong one, after a line on stderr that names it.
    """
    parser = build_parser(FLAGS)
    try:
        arguments = parser.parse_args(shlex.split(text))
    except (SystemExit, ValueError):
        # ValueError is a quotation without an end.
        raise SettingError(f"{FLAGS} is no line of flags") from None
    given = [flag_of(name) for name in sorted(SERVER_FLAGS)
             if getattr(arguments, name) != parser.get_default(name)]
    if given:
        raise SettingError(f"take {', '.join(given)} out of {FLAGS}: on Lambda they do nothing")
    return arguments


def thawing_clock(wall_us: Callable[[], int]) -> Clock:
    """Return a clock that goes on while an instance is frozen, and never back.

    Nobody promises that the monotonic clock counts on meanwhile. The wall clock is AWS's,
    and right.
    """
    latest_us = 0

    def monotonic_us() -> int:
        nonlocal latest_us
        latest_us = max(latest_us, wall_us())
        return latest_us

    return Clock(wall_us, monotonic_us)


def prepare(environ: Mapping[str, str], client: Any = None,
            wall_us: Callable[[], int] = SYSTEM_CLOCK.wall_us) -> Callable[[], Relay]:
    """Return what opens the relay of an environment; all that asks no table is done before.

    Raises SettingError.
    """
    table = environ.get(TABLE, "")
    arguments = read_flags(environ.get(FLAGS, ""))
    if not table:
        raise SettingError(f"set {TABLE} to the name of the table")
    limits = Limits(*(getattr(arguments, name) for name in Limits._fields))
    check_limits(limits)
    about = About(arguments.name, arguments.contact, arguments.notice, arguments.price_url)
    access = read_access(arguments.keys, arguments.deny)
    client = client or make_client()

    def open_relay() -> Relay:
        store = DynamoDbStore(table, client)
        return Relay(
            store, limits, access=access, about=about, clock=thawing_clock(wall_us),
            log_ips=arguments.log_ips, rate_limit=store.rate_limit,
            source_key=store.source_key, fetch=store.fetch)

    return open_relay


class Handler:
    """Answer the events of one instance; the first one has the relay opened, which is then kept."""

    def __init__(self, open_relay: Callable[[], Relay],
                 wall_us: Callable[[], int] = SYSTEM_CLOCK.wall_us) -> None:
        self._open_relay = open_relay
        self._wall_us = wall_us
        self._relay: Relay | None = None
        # Why it could not be opened, and until when that is not tried again.
        self._failure: tuple[Exception, int] | None = None
        # 0 before the first sweep.
        self._sweep_at_us = 0
        self._complaints = RateLimit(1, MINUTE_US)

    def __call__(self, event: object, _context: object = None) -> dict[str, Any]:
        """Return the reply to an event of a function URL (payload format 2.0); never raises."""
        octets = octets_of(event)
        head = head_of(event, len(octets or b""))
        reply = self._answer(event, head, octets)
        headers, body = respond_in_pairs(reply, head)
        return {
            "statusCode": reply.status,
            # AWS has a length of its own.
            "headers": {name: value for name, value in headers if name != "Content-Length"},
            "body": body.decode("utf-8"),
            "isBase64Encoded": False,
        }

    def _answer(self, event: object, head: Head | None, octets: bytes | None) -> Reply:
        try:
            relay = self._relay or self._open()
            if head is None:
                return relay.refuse(Refusal(BAD_REQUEST, "This is no event of a function URL."))
            # Before the reply: /health tells of it.
            if 0 < self._sweep_at_us <= relay.now_us():
                self._sweep(relay)
            address = str(_member(event, "requestContext", "http", "sourceIp") or "")

            def take_body() -> bytes:
                return _take(octets)

            reply = answer_at_once(relay, head, address, take_body)
            # There may be no second request that could write down who was seen.
            if not self._sweep_at_us:
                self._sweep(relay)
        except Exception as error:
            return self._excuse(error)
        return reply

    def _open(self) -> Relay:
        """Open the relay.

        While the table does not answer, only one event in so many seconds waits for it.
        """
        if self._failure:
            error, until_us = self._failure
            if self._wall_us() < until_us:
                # The traceback is left out: otherwise each time would add to it.
                raise error.with_traceback(None)
        try:
            relay = self._open_relay()
        except Exception as error:
            self._failure = (error, self._wall_us() + STORE_RETRY_S * SECOND_US)
            raise
        self._relay = relay
        return relay

    def _sweep(self, relay: Relay) -> None:
        """Sweep some.

        AWS deletes expired items by itself: this is mostly about sums and who was seen.
        """
        self._sweep_at_us = relay.now_us() + SWEEP_EVERY_US
        try:
            for _ in range(SWEEP_STEPS):
                if not relay.sweep():
                    break
        except Exception as error:
            # Whatever it is, the client still gets the reply.
            self._complain(f"cannot sweep: {error}")

    def _excuse(self, error: Exception) -> Reply:
        """Return what a client is told when there is no relay."""
        if isinstance(error, SettingError):
            self._complain(str(error))
            detail = "The relay is not set up; its log says why."
            return Refusal(BUSY, detail, SETTING_RETRY_S).reply()
        if isinstance(error, StoreError):
            self._complain(str(error))
            return Refusal(BUSY, "The relay cannot use its store.", STORE_RETRY_S).reply()
        log.error("a request failed; please report this", exc_info=error)
        return Refusal(BUSY, "The relay failed.", STORE_RETRY_S).reply()

    def _complain(self, text: str) -> None:
        if not self._complaints.take(text, self._wall_us()):
            log.error("connectoid-relay: %s", text)


def _member(value: object, *names: str) -> Any:
    """Return a member of a member, None if it is not there."""
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def head_of(event: object, length: int) -> Head | None:
    """Return the head of the request that an event tells of, with a body of so many bytes.

    None if it tells of none.
    """
    method = _member(event, "requestContext", "http", "method")
    path = _member(event, "rawPath")
    if not isinstance(method, str) or not isinstance(path, str):
        return None
    return Head(
        method=method,
        path=path or "/",
        length=length,
        # AWS sees to these two.
        keep_alive=True,
        expects_continue=False,
        wants_json="application/json" in str(_member(event, "headers", "accept")),
        forwarded_for="",
    )


def octets_of(event: object) -> bytes | None:
    """Return the body of the request in an event, None if what should be base64 is not.

    AWS sends text and JSON as they are, and base64 for all other types, as that of `curl -d`.
    """
    body = _member(event, "body")
    if not isinstance(body, str):
        return b""
    if not _member(event, "isBase64Encoded"):
        # A lone surrogate is for the relay to refuse.
        return body.encode("utf-8", "surrogatepass")
    try:
        return binascii.a2b_base64(body.encode("ascii"), strict_mode=True)
    except ValueError:
        return None


def _take(octets: bytes | None) -> bytes:
    if octets is None:
        raise Refusal(BAD_REQUEST, "The body did not arrive.")
    return octets


def build_handler(environ: Mapping[str, str]) -> Handler:
    """Return the handler for an environment.

    What is wrong with that, it tells the log with the first event. Never raises: clients
    would see AWS's 502, without CORS headers, which browsers hide from an app.
    """
    try:
        return Handler(prepare(environ))
    except Exception as error:
        failure = error

    def fail() -> NoReturn:
        raise failure.with_traceback(None)

    return Handler(fail)


handler = build_handler(os.environ)
