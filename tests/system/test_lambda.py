"""Try the relay on Lambda as far as that goes without AWS: README.md, "AWS Lambda"."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import platform
import queue
import re
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import cfnlint.decode.cfn_yaml  # type: ignore[import-untyped]
import cold_start
import lambda_relay
import pytest
from apps import Apps
from dynamodb_store import READ_TIMEOUT_S, create_table, make_client
from engines import ENGINES, ENVIRONMENT, Missing, client_of, new_name
from harness import (
    NOTHING,
    ROOT,
    START_US,
    FakeClock,
    Owner,
    check,
    exchange,
    http_request,
    parse_response,
    receive,
    send,
    serving,
)
from lambda_relay import (
    FLAGS,
    SERVER_FLAGS,
    SWEEP_STEPS,
    TABLE,
    Handler,
    build_handler,
    prepare,
    read_flags,
    thawing_clock,
)

from connectoid_relay import (
    MAX_DATA_CHARS,
    Limits,
    Relay,
    SettingError,
    SqliteStore,
    StoreError,
    build_parser,
    flag_of,
)

HERE = Path(__file__).parents[2] / "deploy" / "dynamodb"
# A month; units in all tables.
FREE_REQUESTS, FREE_GB_S, FREE_UNITS, FREE_ALARMS = 1_000_000, 400_000, 25, 10
# Where a library names its machine, and the number of that machine.
ELF_MACHINE, AARCH64 = 18, 183
OF_BOTO3 = ("boto3", "botocore", "s3transfer", "jmespath", "dateutil", "six.py", "urllib3")
# Of a package.
MOST_UNPACKED_BYTES, MOST_ZIPPED_BYTES = 250 << 20, 50 << 20
ALICE, BOB = Owner(1), Owner(2)
ADDRESS = "203.0.113.7"
Reply = tuple[int, dict[str, str], bytes]

# The members of an event as AWS documents them, those that nobody reads too.
EVENT: Mapping[str, Any] = {
    "version": "2.0",
    "routeKey": "$default",
    "rawPath": "/",
    "rawQueryString": "",
    "headers": {
        "x-amzn-tls-version": "TLSv1.3",
        "x-forwarded-proto": "https",
        "x-forwarded-port": "443",
        "x-forwarded-for": ADDRESS,
        "accept": "*/*",
        "user-agent": "curl/8.5.0",
        "x-amzn-trace-id": "Root=1-00000000-000000000000000000000000",
        "host": "abc.lambda-url.eu-central-1.on.aws",
        "x-amzn-tls-cipher-suite": "TLS_AES_128_GCM_SHA256",
    },
    "requestContext": {
        "accountId": "anonymous",
        "apiId": "abc",
        "domainName": "abc.lambda-url.eu-central-1.on.aws",
        "domainPrefix": "abc",
        "http": {
            "method": "GET",
            "path": "/",
            "protocol": "HTTP/1.1",
            "sourceIp": ADDRESS,
            "userAgent": "curl/8.5.0",
        },
        "requestId": "00000000-0000-0000-0000-000000000000",
        "routeKey": "$default",
        "stage": "$default",
        "time": "15/Jan/2027:08:00:00 +0000",
        "timeEpoch": 1_800_000_000_000,
    },
    "isBase64Encoded": False,
}
FORM, PLAIN, AS_JSON = (
    "application/x-www-form-urlencoded",
    "text/plain;charset=UTF-8",
    "application/json",
)


def event_of(
    method: str,
    path: str = "/",
    body: bytes = b"",
    *,
    accept: str = "*/*",
    media_type: str = PLAIN,
    address: str = ADDRESS,
) -> dict[str, Any]:
    """Return the event that AWS makes of a request.

    What is neither text nor JSON comes in base64.
    """
    path, _, query = path.partition("?")
    http = EVENT["requestContext"]["http"] | {"method": method, "path": path, "sourceIp": address}
    event = {**EVENT, "rawPath": path, "rawQueryString": query,
             "headers": EVENT["headers"] | {"accept": accept},
             "requestContext": EVENT["requestContext"] | {"http": http}}
    if body:
        coded = not media_type.startswith(("text/", "application/json"))
        event["headers"] |= {"content-type": media_type, "content-length": str(len(body))}
        event |= {
            "body": base64.b64encode(body).decode() if coded else body.decode(),
            "isBase64Encoded": coded,
        }
    return event


def post_event(request: object, **options: Any) -> dict[str, Any]:
    """Return the event of a request to the relay, as `curl -d` sends it."""
    return event_of("POST", body=json.dumps(request).encode(), **{"media_type": FORM, **options})


# What the runtime of AWS does, as far as a handler sees it.
RUNTIME = """
import json, sys
import lambda_relay
for line in sys.stdin:
    print(json.dumps(lambda_relay.handler(json.loads(line), None)), flush=True)
"""
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret-of-the-account",
           "AWS_SESSION_TOKEN": "token-of-the-session"}


class Instance:
    """A process that Lambda might have started, with its own import of the handler."""

    def __init__(
        self,
        url: str,
        table: str,
        *,
        python: str = sys.executable,
        path: Sequence[Path] = (HERE, ROOT),
        cwd: Path | None = None,
        **environ: str,
    ) -> None:
        self.popen = subprocess.Popen(
            [python, "-c", RUNTIME],
            cwd=cwd,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(map(str, path)),
                **ENVIRONMENT,
                **SECRETS,
                "AWS_ENDPOINT_URL_DYNAMODB": url,
                TABLE: table,
                **environ,
            },
        )

    def __call__(self, event: object, _context: object = None) -> dict[str, Any]:
        """Return the reply to an event."""
        assert self.popen.stdin
        assert self.popen.stdout
        self.popen.stdin.write(json.dumps(event) + "\n")
        self.popen.stdin.flush()
        reply: dict[str, Any] = json.loads(self.popen.stdout.readline())
        return reply

    def end(self) -> str:
        """End the process and return what stood in its log."""
        rest, errors = self.popen.communicate(timeout=20)
        assert (self.popen.returncode, rest) == (0, "")
        return errors


Answering: TypeAlias = Handler | Instance


def answer(handler: Answering, event: object) -> Reply:
    """Answer an event as Lambda does, over JSON; return status, headers and body."""
    given = json.loads(json.dumps(handler(json.loads(json.dumps(event)), None)))
    assert given.keys() == {"statusCode", "headers", "body", "isBase64Encoded"}
    assert given["isBase64Encoded"] is False
    names = [name.lower() for name in given["headers"]]
    assert len(set(names)) == len(names)
    assert given["headers"]["Access-Control-Allow-Origin"] == "*"
    headers = {name.lower(): value for name, value in given["headers"].items()}
    return given["statusCode"], headers, given["body"].encode()


def post_to(handler: Answering, request: object, **options: Any) -> tuple[int, Any]:
    """Post a request and return the status and the parsed reply."""
    status, _, body = answer(handler, post_event(request, **options))
    return status, json.loads(body)


@pytest.fixture(autouse=True)
def _aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set dummy credentials, since a client looks for some."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def handler(relay: Relay) -> Handler:
    """Return the handler of a relay in memory."""
    return Handler(lambda: relay)


# The same requests to the server and to the handler


class Ask(NamedTuple):
    """A request to both."""

    method: str
    path: str = "/"
    body: bytes = b""
    accept: str = "*/*"
    media_type: str = FORM


REQUESTS: Mapping[str, Ask] = {
    "document": Ask("GET", accept="application/json"),
    "page": Ask("GET", accept="text/html"),
    "query": Ask("GET", "/?x=y", accept="application/json"),
    "head of the document": Ask("HEAD", accept="application/json"),
    "head of the page": Ask("HEAD"),
    "health": Ask("GET", "/health"),
    "head of health": Ask("HEAD", "/health"),
    "metrics": Ask("GET", "/metrics"),
    "options": Ask("OPTIONS"),
    "options of nothing": Ask("OPTIONS", "/nothing"),
    "nothing": Ask("GET", "/nothing"),
    "post to nothing": Ask("POST", "/nothing", b"{}"),
    "odd path": Ask("GET", "//health"),
    "put": Ask("PUT", "/", b"{}"),
    "delete": Ask("DELETE"),
    "post to health": Ask("POST", "/health", b"{}"),
    "check by curl": Ask("POST", body=json.dumps(check(ALICE)).encode()),
    "check by a browser": Ask("POST", body=json.dumps(check(ALICE)).encode(), media_type=PLAIN),
    "check as JSON": Ask("POST", body=json.dumps(check(ALICE)).encode(), media_type=AS_JSON),
    "check of nothing new": Ask("POST", body=json.dumps(check(ALICE, at=2**62)).encode()),
    "batch": Ask("POST", body=json.dumps([check(ALICE), check(BOB), 1]).encode()),
    "send": Ask("POST", body=json.dumps(send(ALICE)).encode()),
    "send too much": Ask("POST", body=json.dumps(send(ALICE, "A" * (MAX_DATA_CHARS + 1))).encode()),
    "send text beyond ASCII": Ask(
        "POST",
        body=json.dumps(send(ALICE, "\u00fc"), ensure_ascii=False).encode(),
        media_type=PLAIN,
    ),
    "wrong answer": Ask("POST", body=json.dumps(receive(ALICE, "A" * 43)).encode()),
    "no JSON": Ask("POST", body=b"\xff"),
    "no JSON in text": Ask("POST", body=b"{", media_type=PLAIN),
    "no body": Ask("POST"),
    "largest body": Ask("POST", body=json.dumps(check(ALICE)).encode().ljust(131_072)),
    "largest body but one": Ask("POST", body=json.dumps(check(ALICE)).encode().ljust(131_071)),
    "body too large": Ask("POST", body=b" " * 131_073),
    "largest body in text": Ask(
        "POST", body=json.dumps(check(ALICE)).encode().ljust(131_072), media_type=PLAIN
    ),
    "text too large": Ask("POST", body=b" " * 131_073, media_type=PLAIN),
    "text too large in octets": Ask("POST", body="\u00fc".encode() * 65_537, media_type=PLAIN),
    "huge body": Ask("POST", body=b" " * (4 << 20)),
    "get with a body": Ask("GET", "/health", b"{}"),
}


class Both(NamedTuple):
    """One relay, in two ways."""

    port: int
    handler: Handler


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    """Return a relay on a port and in a handler.

    Its clock stands still, so its questions stay the same.
    """
    relay = Relay(SqliteStore(":memory:"), clock=FakeClock().clock)
    relay.handle(send(ALICE), "192.0.2.1")
    with serving(relay) as server:
        yield Both(server.server_port, Handler(lambda: relay))


@pytest.mark.parametrize("name", REQUESTS)
def test_lambda_answers_as_the_server_does(name: str, both: Both) -> None:
    ask = REQUESTS[name]
    status, headers, body = parse_response(
        exchange(
            both.port,
            http_request(
                ask.body,
                f"Accept: {ask.accept}",
                f"Content-Type: {ask.media_type}",
                method=ask.method,
                path=ask.path,
            ),
        )
    )
    expected = {
        name: value
        for name, value in headers.items()
        if name not in ("connection", "content-length")
    }
    given = answer(both.handler, event_of(ask.method, ask.path, ask.body, accept=ask.accept,
                                          media_type=ask.media_type))
    # Which tell of the other requests.
    if name in ("metrics", "page"):
        assert given[:2] == (status, expected)
        assert given[2].splitlines()[:1] == body.splitlines()[:1]
    else:
        assert given == (status, expected, body)


# Events, and whole replies


CORS = {"access-control-allow-origin": "*"}
JSON_HEADERS = CORS | {"content-type": "application/json"}


def changed(event: Mapping[str, Any], **members: Any) -> dict[str, Any]:
    """Return an event with other members; None takes one away."""
    return {name: value for name, value in {**event, **members}.items() if value is not None}


CHECK = json.dumps(check(ALICE))
POSTED = event_of("POST")
EVENTS: Mapping[str, tuple[Any, int, dict[str, str], Any]] = {
    "text": (changed(POSTED, body=CHECK), 200, JSON_HEADERS, NOTHING),
    "base64": (
        changed(POSTED, body=base64.b64encode(CHECK.encode()).decode(), isBase64Encoded=True),
        200,
        JSON_HEADERS,
        NOTHING,
    ),
    "options": (
        event_of("OPTIONS"),
        204,
        CORS
        | {
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": "Content-Type",
            "access-control-max-age": "86400",
        },
        "",
    ),
    "health": (event_of("GET", "/health"), 200, JSON_HEADERS, {"ok": True}),
    "head of health": (event_of("HEAD", "/health"), 200, JSON_HEADERS, ""),
    "a method that is none": (
        event_of("PATCH"),
        405,
        JSON_HEADERS | {"allow": "GET, HEAD, POST, OPTIONS", "vary": "Accept"},
        {"ok": False, "error": "Not allowed"},
    ),
    "no such path": (
        event_of("GET", "/favicon.ico"),
        404,
        JSON_HEADERS,
        {"ok": False, "error": "Not found"},
    ),
    "an empty path": (changed(POSTED, rawPath="", body=CHECK), 200, JSON_HEADERS, NOTHING),
    "no body": (
        POSTED,
        400,
        JSON_HEADERS,
        {"ok": False, "error": "Bad request", "detail": "The body is not JSON in UTF-8."},
    ),
    "base64 that is none": (
        changed(POSTED, body="e30", isBase64Encoded=True),
        400,
        JSON_HEADERS,
        {"ok": False, "error": "Bad request", "detail": "The body did not arrive."},
    ),
    "base64 with other letters": (
        changed(POSTED, body="e30=\n", isBase64Encoded=True),
        400,
        JSON_HEADERS,
        {"ok": False, "error": "Bad request", "detail": "The body did not arrive."},
    ),
    "base64 beyond ASCII": (
        changed(POSTED, body="\u00fc", isBase64Encoded=True),
        400,
        JSON_HEADERS,
        {"ok": False, "error": "Bad request", "detail": "The body did not arrive."},
    ),
    "a lone surrogate": (
        changed(POSTED, body='{"x": "\ud800"}'),
        400,
        JSON_HEADERS,
        {"ok": False, "error": "Bad request", "detail": "The body is not JSON in UTF-8."},
    ),
    "a body that is no text": (
        changed(POSTED, body={"action": "check"}),
        400,
        JSON_HEADERS,
        {"ok": False, "error": "Bad request", "detail": "The body is not JSON in UTF-8."},
    ),
    "no headers": (changed(POSTED, headers=None, body=CHECK), 200, JSON_HEADERS, NOTHING),
    "no address": (
        changed(POSTED, body=CHECK, requestContext={"http": {"method": "POST"}}),
        200,
        JSON_HEADERS,
        NOTHING,
    ),
}
NO_EVENT = {"ok": False, "error": "Bad request", "detail": "This is no event of a function URL."}


@pytest.mark.parametrize("name", EVENTS)
def test_event_gets_its_whole_reply(name: str, handler: Handler) -> None:
    event, status, headers, reply = EVENTS[name]
    given = answer(handler, event)
    assert given[:2] == (status, headers)
    assert (json.loads(given[2]) if given[2] else "") == reply


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        "text",
        7,
        {},
        {"key1": "value1"},
        {"source": "aws.events", "detail": {}},
        changed(POSTED, requestContext=None),
        changed(POSTED, requestContext=[]),
        changed(POSTED, rawPath=None),
        changed(POSTED, requestContext={"http": "POST"}),
        changed(POSTED, rawPath=["/"]),
    ],
)
def test_what_is_no_event_of_a_function_url_is_refused(event: object, handler: Handler) -> None:
    status, headers, reply = answer(handler, event)
    assert (status, headers, json.loads(reply)) == (400, JSON_HEADERS, NO_EVENT)


def test_too_often_says_when_to_come_back_and_counts_by_source_address(clock: FakeClock) -> None:
    handler = Handler(lambda: Relay(SqliteStore(":memory:"), Limits(rate=1), clock=clock.clock))
    assert post_to(handler, check(ALICE)) == (200, NOTHING)
    assert post_to(handler, check(ALICE), address="203.0.113.8") == (200, NOTHING)
    forged = post_event(check(ALICE))
    forged["headers"]["x-forwarded-for"] = "198.51.100.1"
    status, headers, body = answer(handler, forged)
    assert (status, headers["retry-after"]) == (429, str(json.loads(body)["retry"]))


def test_addresses_of_one_network_in_ipv6_are_one_source(clock: FakeClock) -> None:
    handler = Handler(lambda: Relay(SqliteStore(":memory:"), Limits(rate=1), clock=clock.clock))
    statuses = [
        post_to(handler, check(ALICE), address=address)[0]
        for address in (
            "2001:db8::1",
            "2001:db8::2",
            "2001:db8:0:1::1",
            "::ffff:192.0.2.1",
            "192.0.2.1",
        )
    ]
    assert statuses == [200, 429, 200, 200, 429]


def test_check_with_wait_is_answered_at_once(clock: FakeClock) -> None:
    class Unslept(SqliteStore):
        """A store that fronts may not ask for arrivals: only waits ask for them."""

        def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
            raise AssertionError

    handler = Handler(lambda: Relay(Unslept(":memory:"), clock=clock.clock))
    assert post_to(handler, check(ALICE, wait=60)) == (200, NOTHING)
    assert post_to(handler, [check(ALICE, wait=60), check(BOB, wait=60)]) == (
        200,
        [NOTHING, NOTHING],
    )


# Between two events: sweeps, clocks, failures


class Counted(SqliteStore):
    """A store that counts its sweeps, always has more to delete, and knows who was seen."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.sweeps = 0
        self.kept: list[bytes] = []

    def sweep(self, now_us: int) -> bool:
        self.sweeps += 1
        super().sweep(now_us)
        return True

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        if not room_for:
            self.kept += expiries_us
        super().keep_boxes(expiries_us, now_us, room_for, soon=soon)


def prove(handler: Handler, owner: Owner) -> None:
    """Make a box row: send, check, answer."""
    assert post_to(handler, send(owner)) == (200, {"ok": True})
    question = post_to(handler, check(owner))[1]["question"]
    status, reply = post_to(handler, receive(owner, owner.open(question)))
    assert (status, reply["data"]) == (200, "QUJD")


def test_sweep_is_bounded_and_comes_once_a_minute(clock: FakeClock) -> None:
    store = Counted()
    handler = Handler(lambda: Relay(store, clock=clock.clock))
    for _ in range(3):
        post_to(handler, check(ALICE))
    assert store.sweeps == SWEEP_STEPS
    clock.advance(59.999)
    post_to(handler, check(ALICE))
    assert store.sweeps == SWEEP_STEPS
    clock.advance(0.001)
    post_to(handler, check(ALICE))
    assert store.sweeps == 2 * SWEEP_STEPS


def test_sweep_that_finds_nothing_is_one_step(clock: FakeClock) -> None:
    class Clean(Counted):
        """There is nothing to delete."""

        def sweep(self, now_us: int) -> bool:
            super().sweep(now_us)
            return False

    store = Clean()
    handler = Handler(lambda: Relay(store, clock=clock.clock))
    post_to(handler, check(ALICE))
    assert store.sweeps == 1


def test_instance_with_one_request_writes_down_the_boxes_that_were_seen(clock: FakeClock) -> None:
    store = Counted()
    prove(Handler(lambda: Relay(store, clock=clock.clock)), ALICE)
    clock.advance(2 * 86_400)
    store.kept.clear()
    assert post_to(Handler(lambda: Relay(store, clock=clock.clock)), check(ALICE)) == (200, NOTHING)
    assert store.kept == [ALICE.box]


@pytest.mark.parametrize("idle_s", [0, 59, 60, 61, 86_400])
def test_health_is_good_however_long_nobody_asked(
    idle_s: int, handler: Handler, clock: FakeClock
) -> None:
    assert post_to(handler, check(ALICE)) == (200, NOTHING)
    clock.advance(idle_s)
    assert answer(handler, event_of("GET", "/health"))[0] == 200


def test_sweep_that_fails_costs_no_reply(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SqliteStore):
        """A store that cannot sweep."""

        def sweep(self, now_us: int) -> bool:
            raise StoreError("out of order")

    handler = Handler(lambda: Relay(Broken(":memory:"), clock=clock.clock))
    assert post_to(handler, send(ALICE)) == (200, {"ok": True})
    clock.advance(61)
    assert post_to(handler, send(ALICE)) == (200, {"ok": True})
    assert caplog.messages == ["connectoid-relay: cannot sweep: out of order"]
    status, _, reply = answer(handler, event_of("GET", "/health"))
    assert (status, json.loads(reply)["detail"]) == (503, "The sweeper has stopped.")


def test_clock_goes_on_while_an_instance_is_frozen_and_never_back() -> None:
    shown = iter([START_US, START_US + 5, START_US + 3, START_US + 3_600_000_000])
    clock = thawing_clock(lambda: next(shown))
    assert [clock.monotonic_us() - START_US for _ in range(4)] == [0, 5, 5, 3_600_000_000]


def test_message_expires_while_an_instance_is_frozen() -> None:
    fake = FakeClock()
    handler = Handler(
        lambda: Relay(SqliteStore(":memory:"), clock=thawing_clock(lambda: fake.wall_us))
    )
    assert post_to(handler, send(ALICE)) == (200, {"ok": True})
    assert post_to(handler, check(ALICE))[1]["found"]
    # The monotonic clock of the instance stands still.
    fake.wall_us += 3_600_000_000
    assert post_to(handler, check(ALICE)) == (200, NOTHING)


def busy(detail: str, retry_s: int = 5) -> dict[str, Any]:
    """Return the reply of a relay that cannot work."""
    return {"ok": False, "error": "Busy", "detail": detail, "retry": retry_s}


@pytest.mark.parametrize(
    ("error", "reply", "logged"),
    [
        (
            StoreError("there is no table"),
            busy("The relay cannot use its store."),
            "connectoid-relay: there is no table",
        ),
        (
            SettingError("mend this"),
            busy("The relay is not set up; its log says why.", 60),
            "connectoid-relay: mend this",
        ),
        (
            ZeroDivisionError("oh"),
            busy("The relay failed."),
            "a request failed; please report this",
        ),
    ],
)
def test_relay_that_cannot_be_opened_is_busy_and_tried_again(
        error: Exception, reply: dict[str, Any], logged: str, relay: Relay, *, clock: FakeClock,
        caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[Exception | Relay] = [error, error, relay]

    def open_relay() -> Relay:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    handler = Handler(open_relay, lambda: clock.wall_us)
    status, headers, body = answer(handler, post_event(check(ALICE)))
    assert (status, json.loads(body), headers["retry-after"]) == (503, reply, str(reply["retry"]))
    clock.advance(4.999)
    assert post_to(handler, check(ALICE)) == (503, reply)
    # Not tried again so soon.
    assert len(outcomes) == 2
    clock.advance(0.001)
    assert post_to(handler, check(ALICE)) == (503, reply)
    assert len(outcomes) == 1
    clock.advance(5)
    assert post_to(handler, check(ALICE)) == post_to(handler, check(ALICE)) == (200, NOTHING)
    assert caplog.messages[0] == logged


def test_failure_that_is_told_again_and_again_takes_no_more_memory(clock: FakeClock) -> None:
    error = StoreError("there is no table")

    def open_relay() -> Relay:
        raise error

    handler, depths = Handler(open_relay, lambda: clock.wall_us), []
    for _ in range(20):
        assert post_to(handler, check(ALICE))[0] == 503
        depths.append(len(traceback.extract_tb(error.__traceback__)))
    assert max(depths[1:]) <= depths[0]


# Settings


def logged_by(environ: Mapping[str, str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the handler of an environment that is wrong has to say to the host."""
    assert post_to(build_handler(environ), check(ALICE)) == (
        503, busy("The relay is not set up; its log says why.", 60))
    return caplog.messages


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--rate x", "argument --rate: 'x' is not a whole number from 0 to 1000000000000"),
        ("--rat 5", "unrecognized arguments: --rat 5"),
        ("--name", "argument --name: expected one argument"),
        (
            "--price-url ftp://example.com",
            "argument --price-url: 'ftp://example.com' is not a web address; write https://...",
        ),
    ],
)
def test_wrong_flag_is_named_in_the_log(flags: str, told: str, caplog: pytest.LogCaptureFixture,
                                        capfd: pytest.CaptureFixture[str]) -> None:
    assert logged_by({TABLE: "relay", FLAGS: flags}, caplog) == [
        "connectoid-relay: CONNECTOID_FLAGS is no line of flags"]
    assert capfd.readouterr().err == f"CONNECTOID_FLAGS: error: {told} (--help lists the flags)\n"


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, "set CONNECTOID_TABLE to the name of the table"),
        ({TABLE: ""}, "set CONNECTOID_TABLE to the name of the table"),
        ({TABLE: "relay", FLAGS: "--name 'Alice"}, "CONNECTOID_FLAGS is no line of flags"),
        (
            {TABLE: "relay", FLAGS: "--udp --port 80"},
            "take --port, --udp out of CONNECTOID_FLAGS: on Lambda they do nothing",
        ),
        (
            {TABLE: "relay", FLAGS: "--keys none.toml"},
            "none.toml: No such file or directory; give a file that the relay may read",
        ),
        (
            {TABLE: "relay", FLAGS: "--max-box-messages 5000"},
            "--max-box-messages must be at most 4096 with DynamoDB",
        ),
    ],
)
def test_wrong_setting_is_told_to_the_host(environ: Mapping[str, str], told: str,
                                           caplog: pytest.LogCaptureFixture) -> None:
    assert logged_by(environ, caplog) == [f"connectoid-relay: {told}"]


def test_every_flag_is_taken_or_refused() -> None:
    flags = {
        action.dest: action
        for action in build_parser()._actions
        if action.dest not in ("help", "version")
    }
    assert flags.keys() >= SERVER_FLAGS
    for name, action in flags.items():
        values = {"host": "127.0.0.1", "sync": "normal", "trusted_proxy": "10.0.0.0/8",
                  "price_url": "https://example.com/", "turn": "turn:turn.example.com"}
        text = flag_of(name) if action.nargs == 0 else f"{flag_of(name)} {values.get(name, '64')}"
        if name in SERVER_FLAGS:
            with pytest.raises(SettingError, match=re.escape(f"take {flag_of(name)} out of")):
                read_flags(text)
        else:
            assert getattr(read_flags(text), name) != action.default


def test_flags_with_spaces_are_quoted_as_in_a_shell() -> None:
    arguments = read_flags("--name \"Alice's relay\" --rate 5 --contact mail@example.com")
    assert (arguments.name, arguments.rate, arguments.contact) == (
        "Alice's relay",
        5,
        "mail@example.com",
    )


# The template


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    """Return template.yaml, with `!GetAtt A.B` as `{"Fn::GetAtt": ["A", "B"]}`."""
    parsed: dict[str, Any] = json.loads(
        json.dumps(cfnlint.decode.cfn_yaml.load(str(HERE / "template.yaml")))
    )
    return parsed


def properties(template: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the properties of the resources of a type."""
    return [
        resource["Properties"]
        for resource in template["Resources"].values()
        if resource["Type"] == kind
    ]


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    """Run cfn-lint as people do, hints included."""
    return subprocess.run(
        [Path(sys.executable).parent / "cfn-lint", "--include-checks", "I", "--", path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_template_lints_clean() -> None:
    linted = lint(HERE / "template.yaml")
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


def test_template_lint_can_fail(tmp_path: Path) -> None:
    broken = tmp_path / "template.yaml"
    broken.write_text(
        (HERE / "template.yaml").read_text().replace("InvokedViaFunctionUrl", "InvokedViaUrl")
    )
    assert lint(broken).returncode == 2


def test_template_stays_within_the_free_tier(template: Mapping[str, Any]) -> None:
    (table,) = properties(template, "AWS::DynamoDB::Table")
    assert table["BillingMode"] == "PROVISIONED"
    assert table["ProvisionedThroughput"] == {
        "ReadCapacityUnits": FREE_UNITS,
        "WriteCapacityUnits": FREE_UNITS,
    }
    # Which have units of their own.
    assert "GlobalSecondaryIndexes" not in table
    assert table["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": False}
    assert len(properties(template, "AWS::CloudWatch::Alarm")) <= FREE_ALARMS


def test_url_is_public_by_both_permissions_and_leaves_cors_to_the_relay(
    template: Mapping[str, Any],
) -> None:
    function = {"Fn::GetAtt": ["Relay", "Arn"]}
    assert properties(template, "AWS::Lambda::Url") == [
        {"TargetFunctionArn": function, "AuthType": "NONE"}
    ]
    assert properties(template, "AWS::Lambda::Permission") == [
        {
            "FunctionName": function,
            "Principal": "*",
            "Action": "lambda:InvokeFunctionUrl",
            "FunctionUrlAuthType": "NONE",
        },
        {
            "FunctionName": function,
            "Principal": "*",
            "Action": "lambda:InvokeFunction",
            "InvokedViaFunctionUrl": True,
        },
    ]


def test_role_is_for_this_table_and_this_log_alone(template: Mapping[str, Any]) -> None:
    (role,) = properties(template, "AWS::IAM::Role")
    assert role.keys() == {"AssumeRolePolicyDocument", "Policies"}
    (policy,) = role["Policies"]
    statements = policy["PolicyDocument"]["Statement"]
    assert [statement["Resource"] for statement in statements] == [
        {"Fn::GetAtt": ["Table", "Arn"]}, {"Fn::GetAtt": ["Log", "Arn"]}]
    assert {statement["Effect"] for statement in statements} == {"Allow"}
    assert "*" not in json.dumps(policy)
    (function,) = properties(template, "AWS::Serverless::Function")
    # Without it SAM adds a policy for all logs.
    assert function["Role"] == {"Fn::GetAtt": ["Role", "Arn"]}
    assert function["LoggingConfig"] == {
        "LogGroup": {"Ref": "Log"},
        "LogFormat": "JSON",
        "SystemLogLevel": "WARN",
        "ApplicationLogLevel": "INFO",
    }
    assert "Policies" not in function


def test_alarms_watch_what_there_is_and_go_to_people(template: Mapping[str, Any]) -> None:
    alarms = properties(template, "AWS::CloudWatch::Alarm")
    assert {(alarm["Namespace"], alarm["MetricName"]) for alarm in alarms} == {
        ("AWS/Lambda", "Errors"), ("AWS/Lambda", "Throttles"), ("AWS/Lambda", "Invocations"),
        ("AWS/DynamoDB", "ReadThrottleEvents"), ("AWS/DynamoDB", "WriteThrottleEvents")}
    for alarm in alarms:
        assert alarm["AlarmActions"] == [{"Ref": "Alarms"}]
        assert alarm["Dimensions"] in ([{"Name": "FunctionName", "Value": {"Ref": "Relay"}}],
                                       [{"Name": "TableName", "Value": {"Ref": "Table"}}])
    (use,) = (alarm for alarm in alarms if alarm["MetricName"] == "Invocations")
    assert use["Threshold"] < FREE_REQUESTS / 31
    assert properties(template, "AWS::SNS::Topic") == [
        {"Subscription": [{"Protocol": "email", "Endpoint": {"Ref": "AlarmEmail"}}]}]


def test_function_runs_this_handler_with_these_settings(template: Mapping[str, Any]) -> None:
    (function,) = properties(template, "AWS::Serverless::Function")
    module, _, name = function["Handler"].partition(".")
    assert getattr(sys.modules[module], name) is lambda_relay.handler
    assert function["Environment"]["Variables"] == {
        TABLE: {"Ref": "Table"},
        FLAGS: {"Ref": "Flags"},
    }
    assert function["CodeUri"] == "../../build/lambda/"
    assert function["Architectures"] == ["arm64"]


# The package


def make(folder: Path, *variables: str) -> None:
    """Make the package, as README says."""
    made = subprocess.run(
        [
            "make",
            "--silent",
            "-C",
            str(HERE),
            f"FOLDER={folder}",
            f"PIP={sys.executable} -m pip",
            *variables,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr


def zipped(folder: Path, to: Path) -> Path:
    """Return the package as the file that AWS gets."""
    return Path(shutil.make_archive(str(to), "zip", folder))


@pytest.mark.slow
def test_package_is_for_the_machine_of_the_template_and_within_the_limits(
    tmp_path: Path, template: Mapping[str, Any]
) -> None:
    (function,) = properties(template, "AWS::Serverless::Function")
    make(tmp_path / "package")
    assert (
        f"RUNTIME ?= {function['Runtime'].removeprefix('python')}\n"
        in (HERE / "Makefile").read_text()
    )
    libraries = list((tmp_path / "package").rglob("*.so"))
    assert libraries
    for library in libraries:
        assert struct.unpack_from("<H", library.read_bytes(), ELF_MACHINE)[0] == AARCH64
    unpacked = sum(file.stat().st_size for file in (tmp_path / "package").rglob("*"))
    assert unpacked < MOST_UNPACKED_BYTES
    assert zipped(tmp_path / "package", tmp_path / "package").stat().st_size < MOST_ZIPPED_BYTES


# Against engines that speak DynamoDB's protocol


@contextlib.contextmanager
def instances(url: str, table: str, number: int, **options: Any) -> Iterator[list[Instance]]:
    """Start this many instances on a table; all end with the block."""
    alive: list[Instance] = []
    try:
        for _ in range(number):
            alive.append(Instance(url, table, **options))
        yield alive
    finally:
        for instance in alive:
            instance.popen.kill()
            instance.popen.communicate()


@pytest.fixture(scope="module", params=ENGINES)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the URL of an engine."""
    with engine(request.param) as url:
        yield url


@pytest.fixture(scope="module")
def dynalite_url() -> Iterator[str]:
    """Return the URL of the engine that counts units as AWS does."""
    with engine("dynalite") as url:
        yield url


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    """Return the URL of the engine that knows of expiry; Python alone installs it."""
    with engine("moto") as url:
        yield url


@contextlib.contextmanager
def engine(name: str) -> Iterator[str]:
    """Run an engine, or skip the test and say what to install."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(ENGINES[name]())
        except Missing as error:
            pytest.skip(str(error))
        yield url


def make_table(url: str, template: Mapping[str, Any]) -> str:
    """Make a table as the template has it and return its name."""
    (table,) = properties(template, "AWS::DynamoDB::Table")
    wanted = ("AttributeDefinitions", "KeySchema", "BillingMode", "ProvisionedThroughput")
    client_of(url).create_table(
        TableName=(name := new_name()), **{member: table[member] for member in wanted}
    )
    client_of(url).get_waiter("table_exists").wait(
        TableName=name, WaiterConfig={"Delay": 0.1, "MaxAttempts": 300}
    )
    return name


def handler_on(
    url: str, table: str, clock: FakeClock, flags: str = "", client: Any = None
) -> Handler:
    """Return a handler made from its settings, by a wall clock that stands still."""
    def wall_us() -> int:
        return clock.wall_us

    return Handler(
        prepare({TABLE: table, FLAGS: flags}, client or client_of(url), wall_us), wall_us
    )


def meet(first: Answering, second: Answering) -> None:
    """Send, check, answer and receive a message, each step at another instance."""
    assert post_to(first, check(ALICE)) == (200, NOTHING)
    assert post_to(second, send(ALICE, "QUJD")) == (200, {"ok": True})
    assert post_to(second, send(ALICE, "A" * MAX_DATA_CHARS)) == (200, {"ok": True})
    status, reply = post_to(first, check(ALICE))
    assert (status, reply.keys()) == (200, {"ok", "found", "question"})
    given = ALICE.open(reply["question"])
    assert post_to(second, check(ALICE)) == (200, reply)
    status, received = post_to(second, receive(ALICE, given))
    assert (status, received) == (200, {"ok": True, "at": received["at"], "data": "QUJD"})
    status, rest = post_to(first, receive(ALICE, given, at=received["at"], limit=100))
    assert (status, [message["data"] for message in rest["messages"]]) == (
        200,
        ["A" * MAX_DATA_CHARS],
    )
    assert rest["messages"][0]["at"] > received["at"]
    assert post_to(second, check(ALICE, at=rest["messages"][0]["at"])) == (200, NOTHING)
    assert post_to(first, receive(ALICE, "A" * 43))[0] == 403


def test_rendezvous_works_across_two_handlers_on_one_table(url: str, template: Mapping[str, Any],
                                                           clock: FakeClock) -> None:
    table = make_table(url, template)
    meet(handler_on(url, table, clock), handler_on(url, table, clock))


@pytest.mark.slow
def test_rendezvous_works_across_two_processes_and_leaves_no_word_in_the_log(
        url: str, template: Mapping[str, Any]) -> None:
    with instances(url, make_table(url, template), 2) as (first, second):
        meet(first, second)
        for event, status, _, _ in EVENTS.values():
            assert answer(first, event)[0] == status
        assert (first.end(), second.end()) == ("", "")


class Gateway(http.server.BaseHTTPRequestHandler):
    """Do what AWS does before a function.

    It makes events of requests, and requests' replies of the function's.
    """

    protocol_version = "HTTP/1.1"
    # Those that are free, used in turn.
    instances: queue.Queue[Instance]

    def do_POST(self) -> None:
        """Return an instance's reply to a request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        event = event_of(
            self.command,
            self.path,
            body,
            accept=self.headers.get("Accept", "*/*"),
            media_type=self.headers.get("Content-Type", FORM),
            address=self.client_address[0],
        )
        reply = (instance := self.instances.get(timeout=20))(event)
        self.instances.put(instance)
        octets = reply["body"].encode()
        self.send_response(reply["statusCode"])
        for name, value in {**reply["headers"], "Content-Length": len(octets)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(octets)

    do_GET = do_POST

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.mark.slow
def test_apps_pair_and_connect_through_instances_in_turn(tmp_path: Path, dynalite_url: str,
                                                         template: Mapping[str, Any]) -> None:
    with (
        instances(dynalite_url, make_table(dynalite_url, template), 2) as both,
        contextlib.ExitStack() as stack,
    ):
        Gateway.instances = queue.Queue()
        for instance in both:
            Gateway.instances.put(instance)
        server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway))
        threading.Thread(target=server.serve_forever).start()
        stack.callback(server.shutdown)
        apps = Apps(tmp_path, stack)
        alice, bob = apps.pair(f"http://127.0.0.1:{server.server_port}/")
        channel = bob.connect("Alice", 60)
        channel.send("milk, bread")
        assert alice.connect("Bob", 60).receive(20) == "milk, bread"
        channel.close()


@pytest.mark.slow
def test_instance_that_is_killed_takes_nothing_with_it(
    url: str, template: Mapping[str, Any]
) -> None:
    with instances(url, make_table(url, template), 2) as (first, second):
        assert post_to(first, send(ALICE, "QUJD")) == (200, {"ok": True})
        given = ALICE.open(post_to(first, check(ALICE))[1]["question"])
        first.popen.kill()
        assert post_to(second, receive(ALICE, given))[1]["data"] == "QUJD"


def test_limits_hold_in_sum_over_instances(
    url: str, template: Mapping[str, Any], clock: FakeClock
) -> None:
    table, flags = make_table(url, template), "--max-sends 4 --max-box-messages 64"
    both = [handler_on(url, table, clock, flags) for _ in range(2)]
    statuses = [post_to(both[turn % 2], send(ALICE))[0] for turn in range(10)]
    assert (statuses.count(200), statuses.count(429)) == (4, 6)
    clock.advance(60)
    statuses = [post_to(both[turn % 2], send(ALICE))[0] for turn in range(4)]
    clock.advance(60)
    # An eighth of the box.
    assert [*statuses, post_to(both[1], send(ALICE))[0]] == [200, 200, 200, 200, 429]


@pytest.mark.slow
def test_package_works_with_nothing_else_but_boto3(tmp_path: Path, dynalite_url: str,
                                                   template: Mapping[str, Any]) -> None:
    keys, boto3, package = tmp_path / "keys.toml", tmp_path / "runtime", tmp_path / "package"
    keys.write_text('[keys.friends]\nkey = "the-key-of-friends"\n')
    make(tmp_path / "made", f"PLATFORM=manylinux2014_{platform.machine()}", f"FILES={keys}",
         f"RUNTIME={sys.version_info.major}.{sys.version_info.minor}")
    shutil.unpack_archive(zipped(tmp_path / "made", tmp_path / "package"), package)
    boto3.mkdir()
    # Which Lambda's runtime has.
    for name in OF_BOTO3:
        (boto3 / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=60
    )
    with instances(
        dynalite_url,
        make_table(dynalite_url, template),
        1,
        python=str(tmp_path / "bare/bin/python"),
        path=(package, boto3),
        cwd=package,
        **{FLAGS: "--keys keys.toml"},
    ) as (instance,):
        assert post_to(instance, check(ALICE))[1]["error"] == "Forbidden"
        assert post_to(instance, send(ALICE, ext="the-key-of-friends")) == (200, {"ok": True})
        assert post_to(instance, check(ALICE, ext="the-key-of-friends"))[1]["found"]
        assert instance.end() == ""


def test_settings_reach_the_relay(url: str, template: Mapping[str, Any], clock: FakeClock) -> None:
    handler = handler_on(
        url,
        make_table(url, template),
        clock,
        '--name "Alice\'s relay" --contact mail@example.com'
        " --notice closing --price-url https://example.com/ --rate 77 --message-ttl 1800",
    )
    status, _, body = answer(handler, event_of("GET", accept="application/json"))
    document = json.loads(body)
    assert (
        status,
        [document[name] for name in ("name", "contact", "notice", "price_url", "udp", "stun")],
    ) == (
        200,
        ["Alice's relay", "mail@example.com", "closing", "https://example.com/", False, False],
    )
    assert (document["limits"]["rate"], document["retention"]["message"]) == (77, 1_800)


def test_message_on_a_table_expires_while_its_instance_is_frozen(
    url: str, template: Mapping[str, Any], clock: FakeClock
) -> None:
    handler = handler_on(url, make_table(url, template), clock)
    assert post_to(handler, send(ALICE)) == (200, {"ok": True})
    # The monotonic clock of the instance stands still.
    clock.wall_us += 3_599_000_000
    assert post_to(handler, check(ALICE))[1]["found"]
    clock.wall_us += 1_000_000
    assert post_to(handler, check(ALICE)) == (200, NOTHING)


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Return a port that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("member", ["pub", "data"])
def test_log_has_no_secret_whatever_goes_wrong(
    member: str, dynalite_url: str, template: Mapping[str, Any]
) -> None:
    address, sealed = "198.51.100.77", "QUJDREVGR0hJSktM"
    body = send(ALICE, sealed)
    events = [
        post_event(event, address=address)
        for event in (
            body,
            body,
            {**body, member: body[member] + "="},
            [body],
            receive(ALICE, sealed),
            check(ALICE),
        )
    ]
    table = make_table(dynalite_url, template)
    with (
        closed_port() as port,
        instances(dynalite_url, table, 1, **{FLAGS: "--rate 4"}) as (limited,),
        instances(f"http://127.0.0.1:{port}", table, 1) as (cut_off,),
        instances(dynalite_url, "no-such-table", 1) as (lost,),
    ):
        for event in [*events, {**events[0], "body": sealed}]:
            statuses = [answer(instance, event)[0] for instance in (limited, cut_off, lost)]
        assert statuses == [429, 503, 503]
        for instance, told in ((limited, "a source asks too often"), (cut_off, "does not answer"),
                               (lost, "does not exist")):
            errors = instance.end()
            assert told in errors
            for secret in (address, "198.51.100", sealed, ALICE.pub, *SECRETS.values()):
                assert secret not in errors


def test_missing_table_is_busy_and_its_name_is_in_the_log(url: str, clock: FakeClock,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    handler = handler_on(url, "nosuchtable", clock)
    assert post_to(handler, send(ALICE)) == (503, busy("The relay cannot use its store."))
    (message,) = caplog.messages
    assert message.startswith("connectoid-relay: the table nosuchtable does not exist")


def test_engine_that_dies_is_busy_with_retry(template: Mapping[str, Any], clock: FakeClock) -> None:
    with engine("moto") as url:
        client = make_client(endpoint_url=url)
        handler = handler_on(url, make_table(url, template), clock, client=client)
        assert post_to(handler, send(ALICE)) == (200, {"ok": True})
    for request in (send(ALICE), check(ALICE), receive(ALICE, "A" * 43)):
        status, headers, body = answer(handler, post_event(request))
        assert (status, headers["retry-after"], json.loads(body)) == (
            503, "5", busy("The relay cannot use its store."))
    assert answer(handler, event_of("OPTIONS"))[0] == 204
    assert answer(handler, event_of("GET", "/health"))[0] == 503
    # Which says nothing of the table.
    assert answer(handler, event_of("GET", accept="application/json"))[0] == 200


# What the relay does with the table, as the template and README have it


class Watched:
    """A client that notes its calls and the units that they cost."""

    def __init__(self, url: str) -> None:
        self.client = make_client(endpoint_url=url)
        self.calls: list[str] = []
        self.units = {"read": 0.0, "write": 0.0}
        self.client.meta.events.register("provide-client-params.dynamodb", self._ask)
        self.client.meta.events.register("after-call.dynamodb", self._note)

    @staticmethod
    def _ask(params: dict[str, Any], **_: object) -> None:
        params["ReturnConsumedCapacity"] = "TOTAL"

    def _note(self, parsed: Mapping[str, Any], model: Any, **_: object) -> None:
        self.calls.append(model.name)
        costs = parsed.get("ConsumedCapacity", [])
        kind = "write" if model.name in ("PutItem", "UpdateItem", "DeleteItem") else "read"
        self.units[kind] += sum(
            cost["CapacityUnits"] for cost in (costs if isinstance(costs, list) else [costs])
        )

    def spent(self) -> tuple[float, float]:
        """Return the units of reads and writes since the last time."""
        units, self.units = self.units, {"read": 0.0, "write": 0.0}
        return units["read"], units["write"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return a file with an API key that has each quota."""
    path = tmp_path / "keys.toml"
    path.write_text('[keys.friends]\nkey = "key"\nrequests_per_day = 99\nbytes = 99999\n')
    return path


def test_role_allows_what_the_store_calls_and_no_more(
    url: str, template: Mapping[str, Any], clock: FakeClock, keys: Path
) -> None:
    watched = Watched(url)
    handler = handler_on(url, make_table(url, template), clock, f"--keys {keys}", watched.client)
    for _ in range(2):
        assert post_to(handler, send(ALICE, ext="key"))[0] == 200
        given = ALICE.open(post_to(handler, check(ALICE, ext="key"))[1]["question"])
        assert post_to(handler, receive(ALICE, given, limit=100, ext="key"))[0] == 200
        for path in ("/", "/health", "/metrics"):
            assert answer(handler, event_of("GET", path))[0] == 200
        clock.advance(3_700)
    (role,) = properties(template, "AWS::IAM::Role")
    allowed = role["Policies"][0]["PolicyDocument"]["Statement"][0]["Action"]
    assert allowed == sorted(f"dynamodb:{call}" for call in set(watched.calls))


def test_first_event_ends_within_the_timeout_if_each_call_takes_as_long_as_it_may(
        url: str, template: Mapping[str, Any], clock: FakeClock, page: str, keys: Path) -> None:
    table, calls = make_table(url, template), []

    def ask_first(request: Mapping[str, Any]) -> Any:
        watched = Watched(url)
        status, reply = post_to(
            handler_on(url, table, clock, f"--keys {keys}", watched.client), request
        )
        assert status == 200
        calls.append(len(watched.calls))
        return reply

    ask_first(send(ALICE, ext="key"))
    ask_first(receive(ALICE, ALICE.open(ask_first(check(ALICE, ext="key"))["question"]), ext="key"))
    (function,) = properties(template, "AWS::Serverless::Function")
    assert max(calls) * READ_TIMEOUT_S < function["Timeout"]
    assert f"an instance's first one up to {max(calls)}" in " ".join(page.split())


def test_table_of_the_template_is_that_of_create_table(
    url: str, template: Mapping[str, Any]
) -> None:
    create_table(client_of(url), name := new_name())
    made = client_of(url).describe_table(TableName=name)["Table"]
    (table,) = properties(template, "AWS::DynamoDB::Table")
    assert table["KeySchema"] == made["KeySchema"]
    assert table["AttributeDefinitions"] == made["AttributeDefinitions"]


def test_expiry_attribute_of_the_template_is_that_of_create_table(
    template: Mapping[str, Any], moto_url: str
) -> None:
    client, name = client_of(moto_url), new_name()
    assert create_table(client, name)
    made = client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
    (table,) = properties(template, "AWS::DynamoDB::Table")
    assert table["TimeToLiveSpecification"] == {
        "AttributeName": made["AttributeName"],
        "Enabled": True,
    }


# The figures of README.md


@pytest.fixture(scope="module")
def page() -> str:
    """Return the part of README.md that is about Lambda."""
    return (HERE / "README.md").read_text().partition("\n## AWS Lambda\n")[2]


def table_of(page: str, header: str) -> list[list[str]]:
    """Return the cells of the table that begins with this header."""
    rows = page.partition(f"\n{header}\n")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# Characters of base64url: a sealed message of 2 KiB, and one of 16 KiB.
TYPICAL, LARGEST = "A" * 2_880, "A" * 22_036


def measured(url: str, table: str, clock: FakeClock) -> dict[str, tuple[float, float]]:
    """Return the units of reads and writes of each kind of request.

    Each comes from an address that asked nothing before.
    """
    watched, addresses = Watched(url), iter(range(1, 255))
    handler = handler_on(url, table, clock, client=watched.client)

    def cost(request: object) -> tuple[tuple[float, float], Any]:
        status, reply = post_to(handler, request, address=f"203.0.113.{next(addresses)}")
        assert status == 200
        return watched.spent(), reply

    units = {
        "the first check of an instance": cost(check(BOB))[0],
        "a check that finds nothing": cost(check(BOB))[0],
    }
    units["a batch of 50 such checks"] = cost([check(Owner(number)) for number in range(10, 60)])[0]
    for owner, sealed, kind in ((BOB, TYPICAL, "typical"), (ALICE, LARGEST, "largest")):
        units[f"sending the {kind} message"] = cost(send(owner, sealed))[0]
        asked, reply = cost(check(owner))
        units["a check that gets a question"] = asked
        units[f"receiving the {kind} message"] = cost(
            receive(owner, owner.open(reply["question"]))
        )[0]
    return units


def test_units_of_the_page_are_those_that_the_engine_counts(
    page: str, dynalite_url: str, template: Mapping[str, Any], clock: FakeClock
) -> None:
    units = measured(dynalite_url, make_table(dynalite_url, template), clock)
    assert table_of(page, "| request | read units | write units |") == [
        [name, f"{read:.0f}", f"{write:.0f}"] for name, (read, write) in units.items()]
    month_s = 30 * 86_400
    # So it is the requests that end first.
    for read, write in units.values():
        assert max(read, write) * FREE_REQUESTS <= FREE_UNITS * month_s


MINUTES_A_MONTH, DAYS_A_MONTH = 43_200, 30
# Each side makes a check every 2 s for 90 s, sends two messages and receives two.
CONNECT_REQUESTS = 50
# How long a request takes at Lambda, a guess, and the limit of the template.
REQUEST_S, MEMORY_GB = 0.05, 0.5
# Arm64, us-east-1.
USD_A_REQUEST, USD_A_GB_S = 0.20 / 1e6, 0.0000133334
# Kept ready for a month.
USD_A_READ_UNIT, USD_A_WRITE_UNIT = 0.00013 * 24 * 30, 0.00065 * 24 * 30


def requests_a_month(check_minutes: float, connections_a_month: float) -> float:
    """Return the requests of a client that checks so often and connects so often."""
    return MINUTES_A_MONTH / check_minutes + CONNECT_REQUESTS * connections_a_month


CLIENTS: Mapping[str, float] = {
    "each minute": requests_a_month(1, 0),
    "every 15 minutes": requests_a_month(15, 0),
    "every 15 minutes, and connects once a day": requests_a_month(15, DAYS_A_MONTH),
    "once an hour, and connects once a day": requests_a_month(60, DAYS_A_MONTH),
    "once an hour, and connects once a week": requests_a_month(60, DAYS_A_MONTH / 7),
}


def usd_a_month(clients: int) -> float:
    """Return what so many clients cost, evenly spread.

    Each checks every 15 minutes and connects once a day.
    """
    requests = clients * CLIENTS["every 15 minutes, and connects once a day"]
    # A second: a request costs about one of each kind.
    units = requests / (DAYS_A_MONTH * 86_400)
    return (USD_A_REQUEST * max(0, requests - FREE_REQUESTS)
            + USD_A_GB_S * max(0, requests * REQUEST_S * MEMORY_GB - FREE_GB_S)
            + (USD_A_READ_UNIT + USD_A_WRITE_UNIT) * max(0, units - FREE_UNITS))


def usd_a_day_of_flood(concurrency: int) -> float:
    """Return what a flood costs in a day.

    AWS lets ten requests a second pass for each one at a time.
    """
    return 86_400 * (USD_A_REQUEST * 10 * concurrency + USD_A_GB_S * MEMORY_GB * concurrency)


def test_clients_of_the_page_are_those_that_the_free_requests_carry(page: str) -> None:
    assert table_of(
        page, "| a client that checks | requests a month | clients within 1,000,000 |"
    ) == [
        [name, f"{requests:,.0f}", f"{FREE_REQUESTS // requests:,.0f}"]
        for name, requests in CLIENTS.items()
    ]


def test_prices_of_the_page_are_computed(page: str, template: Mapping[str, Any]) -> None:
    rows = table_of(page, "| clients | Lambda and DynamoDB, USD a month |")
    assert rows == [
        [f"{clients:,}", f"{usd_a_month(clients):,.2f}"]
        for clients in (200, 1_000, 10_000, 100_000)
    ]
    (flood,) = re.findall(r"at most ([0-9.]+) USD a day", page)
    assert flood == f"{usd_a_day_of_flood(template['Parameters']['Concurrency']['Default']):.2f}"


def test_other_figures_of_the_page_are_computed(page: str) -> None:
    month_s = DAYS_A_MONTH * 86_400
    clients = int(FREE_REQUESTS // CLIENTS["each minute"])
    time_usd = USD_A_GB_S * REQUEST_S * MEMORY_GB
    for figure in (
        f"would use {MEMORY_GB * month_s:,.0f} GB-s of the {FREE_GB_S:,}",
        f"may have {FREE_UNITS * 60 // clients} mailboxes each",
        f"an hour a day is {DAYS_A_MONTH * 3_600 / 66:,.0f} requests",
        f"({FREE_UNITS * month_s:,} of each)",
        f"five minutes, {FREE_UNITS * 300:,} units",
        f"{USD_A_REQUEST * 1e6:.2f} USD, and {time_usd * 1e6:.2f} USD for their time",
    ):
        assert figure in " ".join(page.split())
    on_a_machine = re.findall(
        r"with TLS ([0-9,]+) clients a core", (ROOT / "docs/hosting.md").read_text()
    )[0]
    assert f"carries {on_a_machine} such clients on one core" in " ".join(page.split())


def test_cold_start_command_of_the_page_runs(page: str, moto_url: str) -> None:
    assert "`python deploy/dynamodb/cold_start.py`" in page
    create_table(client_of(moto_url), "relay")
    *steps_ms, memory_mib = cold_start.start(moto_url, 1)
    assert len(steps_ms) == len(cold_start.STEPS)
    assert min(steps_ms) > 0
    # This shows that the template gives more than enough.
    assert 20 < memory_mib < MEMORY_GB * 1024 / 2


def test_every_setting_and_parameter_stands_in_the_page(
    page: str, template: Mapping[str, Any]
) -> None:
    for name in (TABLE, FLAGS, *template["Parameters"], *map(flag_of, SERVER_FLAGS)):
        assert f"`{name}`" in page
    (example,) = re.findall(r"'Flags=\"(.*)\"'", page)
    assert (read_flags(example).rate, read_flags(example).contact) == (300, "mail@example.com")
