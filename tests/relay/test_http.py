"""Test HTTP: how requests are read, and what is answered."""

from __future__ import annotations

import json
import select
import socket
import struct

import pytest
from harness import (
    DEADLINE_S,
    NOTHING,
    Client,
    FakeClock,
    Owner,
    check,
    exchange,
    http_request,
    lasting,
    limited,
    padded,
    parse_response,
    post,
    receive,
    send,
    settle,
)

# Reading HTTP ----------------------------------------------------------------------------


def raw(*lines: bytes, first: bytes = b"GET /health HTTP/1.1", body: bytes = b"") -> bytes:
    """Return a request of exactly these lines."""
    return b"\r\n".join((first, b"Host: relay", b"Connection: close", *lines)) + b"\r\n\r\n" + body


TLS_CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(32)) + b"\x20"
RAW_REQUESTS = {
    "plain": (raw(), 200),
    "length": (raw(b"Content-Length: 5", body=b"abcde"), 200),
    "length 0": (raw(b"Content-Length: 0"), 200),
    "length of 9 digits": (raw(b"Content-Length: 000000005", body=b"abcde"), 200),
    "length in blanks": (raw(b"content-LENGTH:\t 5 \t", body=b"abcde"), 200),
    "no blank after colon": (raw(b"Content-Length:5", body=b"abcde"), 200),
    "two lengths": (raw(b"Content-Length: 5", b"Content-Length: 6", body=b"abcdef"), 400),
    "equal lengths": (raw(b"Content-Length: 5", b"Content-Length: 5", body=b"abcde"), 400),
    "lengths in a list": (raw(b"Content-Length: 5, 5", body=b"abcde"), 400),
    "negative length": (raw(b"Content-Length: -5", body=b"abcde"), 400),
    "length with plus": (raw(b"Content-Length: +5", body=b"abcde"), 400),
    "length with underscore": (raw(b"Content-Length: 1_0", body=b"abcdefghij"), 400),
    "hexadecimal length": (raw(b"Content-Length: 0x5", body=b"abcde"), 400),
    "fraction of a length": (raw(b"Content-Length: 5.0", body=b"abcde"), 400),
    "empty length": (raw(b"Content-Length:"), 400),
    "length of 10 digits": (raw(b"Content-Length: 0000000005", body=b"abcde"), 400),
    "length of 20 digits": (raw(b"Content-Length: 18446744073709551621", body=b"abcde"), 400),
    "Arabic digits": (raw("Content-Length: \u0665".encode(), body=b"abcde"), 400),
    "superscript in Latin-1": (raw(b"Content-Length: \xb2", body=b"ab"), 400),
    "9 digits too big": (raw(b"Content-Length: 999999999"), 413),
    "chunked": (raw(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    "chunked and length": (
        raw(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        400,
    ),
    "identity": (raw(b"transfer-encoding: identity"), 400),
    "empty transfer encoding": (raw(b"Transfer-Encoding:"), 400),
    "bare LF": (raw(b"A: b\nC: d"), 400),
    "bare LF at the end": (b"GET /health HTTP/1.1\nConnection: close\n\n", 400),
    "LF between the last lines": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\n", 400),
    "bare CR": (raw(b"A: b\rC: d"), 400),
    "bare CR in the first line": (raw(first=b"GET /\rhealth HTTP/1.1"), 400),
    "CR CR LF": (raw(b"A: b\r"), 400),
    "NUL in a value": (raw(b"A: b\0c"), 400),
    "NUL in the target": (raw(first=b"GET /health\0 HTTP/1.1"), 400),
    "control in a value": (raw(b"A: b\x07"), 400),
    "folded header": (raw(b"A: b", b" c"), 400),
    "folded length": (raw(b"Content-Length:", b"\t5", body=b"abcde"), 400),
    "blank before colon": (raw(b"Content-Length : 5", body=b"abcde"), 400),
    "blank in a name": (raw(b"Content Length: 5", body=b"abcde"), 400),
    "no colon": (raw(b"Content-Length"), 400),
    "no name": (raw(b": 5"), 400),
    "bad method": (raw(first=b"GE(T /health HTTP/1.1"), 400),
    "no method": (raw(first=b"/health HTTP/1.1"), 400),
    "blank before the method": (raw(first=b" GET /health HTTP/1.1"), 400),
    "two blanks": (raw(first=b"GET  /health HTTP/1.1"), 400),
    "blank in the target": (raw(first=b"GET /health now HTTP/1.1"), 400),
    "target not in ASCII": (raw(first=b"GET /h\xc3\xa9 HTTP/1.1"), 400),
    "empty line first": (b"\r\n" + raw(), 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/1.2": (raw(first=b"GET /health HTTP/1.2"), 400),
    "HTTP/2.0": (raw(first=b"GET /health HTTP/2.0"), 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http in small letters": (raw(first=b"GET /health http/1.1"), 400),
    "method in small letters": (raw(first=b"get /health HTTP/1.1"), 405),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
    "absolute target": (raw(first=b"GET http://relay.example.com:80/health HTTP/1.1"), 200),
    "absolute target in the middle": (
        raw(first=b"GET /healthhttp://relay.example.com HTTP/1.1"),
        404,
    ),
    "absolute target without a path": (
        raw(first=b"GET https://relay.example.com?a=b HTTP/1.1"),
        200,
    ),
    "query": (raw(first=b"GET /health?full=1/2?3 HTTP/1.1"), 200),
    "another path": (raw(first=b"GET /healthy HTTP/1.1"), 404),
    "a path below": (raw(first=b"GET /health/ HTTP/1.1"), 404),
    "TLS": (TLS_CLIENT_HELLO, 400),
}


@pytest.mark.parametrize(("octets", "status"), RAW_REQUESTS.values(), ids=RAW_REQUESTS)
def test_a_raw_request_is_answered_once_however_it_comes(
    port: int, octets: bytes, status: int
) -> None:
    # The rest would be another request to a proxy that counts differently.
    replies = [
        exchange(port, octets),
        exchange(port, octets, piece=1),
        exchange(port, octets + lasting() * 3),
    ]
    assert replies[1:] == replies[:1] * 2
    got, headers, body = parse_response(replies[0])
    assert (got, headers["connection"], headers["access-control-allow-origin"]) == (
        status,
        "close",
        "*",
    )
    assert int(headers["content-length"]) == len(body)
    if status == 400:
        assert json.loads(body)["error"] == "Bad request"


@pytest.mark.parametrize(
    "octets", [TLS_CLIENT_HELLO, b"GET / HTTP/1.1\n", b"GET /\0", b"GET / HTTP/1.1\rH"]
)
def test_what_cannot_become_a_request_is_answered_before_it_ends(port: int, octets: bytes) -> None:
    with Client(port, octets) as client:
        assert client.answer() == (
            400,
            {"ok": False, "error": "Bad request", "detail": "This is not HTTP/1.1."},
        )
        assert client.is_closed()


@pytest.mark.parametrize("piece", [None, 1_000])
@pytest.mark.parametrize(("size", "status"), [(999, 200), (1_000, 200), (1_001, 431)])
def test_headers_are_taken_up_to_the_limit(
    clock: FakeClock, size: int, status: int, piece: int | None
) -> None:
    request = raw(b"A: " + b"b" * (size - len(raw(b"A: "))))
    assert len(request) == size
    with limited(clock, max_header_bytes=1_000) as server:
        got, _, body = parse_response(exchange(server.server_port, request, piece))
    assert (got, json.loads(body).get("error")) == (status, "Too big" if status == 431 else None)


@pytest.mark.parametrize("piece", [None, 997])
@pytest.mark.parametrize(("size", "status"), [(131_071, 200), (131_072, 200), (131_073, 413)])
def test_bodies_are_taken_up_to_the_limit(
        port: int, alice: Owner, size: int, status: int, piece: int | None) -> None:
    got, reply = post(port, padded(check(alice), size), piece)
    assert (got, reply.get("error")) == (status, "Too big" if status == 413 else None)


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        (raw(b"A: " + b"b" * 200_000), 431),
        (http_request(b" " * 1_000_000), 413),
        (TLS_CLIENT_HELLO * 100, 400),
    ],
    ids=["headers", "body", "TLS"],
)
def test_a_refusal_is_readable_to_whom_sends_everything_first(
    port: int, octets: bytes, status: int
) -> None:
    middle = len(octets) * 9 // 10
    with Client(port, octets[:middle]) as client:
        assert select.select([client.socket], [], [], DEADLINE_S)[0]
        settle(port)
        # This fails if the relay closes without reading on.
        client.send(octets[middle:])
        got, headers, body = client.reply()
        error = "Bad request" if status == 400 else "Too big"
        assert (got, headers["connection"], json.loads(body)["error"]) == (status, "close", error)
        assert client.is_closed()


@pytest.mark.parametrize(
    ("version", "expected"), [(b"1.1", b"HTTP/1.1 100 Continue\r\n\r\n"), (b"1.0", b"")]
)
def test_a_body_is_asked_for_if_the_client_expects_that(
    port: int, alice: Owner, version: bytes, expected: bytes
) -> None:
    body = json.dumps(check(alice)).encode()
    head = http_request(body, "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/" + version)
    with Client(port, head.removesuffix(body)) as client:
        settle(port)
        client.send(body)
        # RFC 9110 10.1.1: HTTP/1.0 knows no such thing.
        assert client.received.read(len(expected)) == expected
        client.send(body)
        assert client.answer() == (200, NOTHING)


def test_a_body_too_big_is_not_asked_for(port: int) -> None:
    with Client(
        port, b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 131073\r\n\r\n"
    ) as client:
        assert client.answer()[0] == 413
        assert client.is_closed()


# What HTTP answers -----------------------------------------------------------------------

DOCUMENT = {
    "name",
    "description",
    "software",
    "version",
    "protocols",
    "contact",
    "limits",
    "retention",
    "udp",
    "stun",
    "turn",
    "notice",
    "price_url",
}


@pytest.mark.parametrize(("headers", "content_type"), [
    ((), "text/html; charset=utf-8"),
    (("Accept: text/html,application/xhtml+xml,*/*;q=0.8",), "text/html; charset=utf-8"),
    (("Accept: application/json",), "application/json"),
    (("accept: text/plain, application/json",), "application/json"),
])
def test_the_relay_introduces_itself_as_is_liked(
    port: int, headers: tuple[str, ...], content_type: str
) -> None:
    with Client(
        port, lasting(None, *headers), lasting(None, *headers).replace(b"GET", b"HEAD"), lasting()
    ) as client:
        status, head, body = client.reply()
        assert (status, head["content-type"], head["vary"]) == (200, content_type, "Accept")
        if content_type == "application/json":
            assert json.loads(body).keys() >= DOCUMENT
        else:
            assert body.startswith(b"<!DOCTYPE html>")
        # HEAD has the same head and no body: the next reply follows at once.
        assert client.reply(with_body=False) == (200, head, b"")
        assert client.reply()[2].startswith(b"<!DOCTYPE html>")


def test_health_is_told_with_and_without_body(port: int) -> None:
    get = lasting(path="/health")
    with Client(port, get.replace(b"GET", b"HEAD"), get) as client:
        status, head, _ = client.reply(with_body=False)
        assert (status, head["content-type"]) == (200, "application/json")
        got, same_head, body = client.reply()
        assert (got, same_head, json.loads(body)) == (200, head, {"ok": True})


def test_errors_after_a_head_have_their_body(port: int) -> None:
    with Client(port, lasting().replace(b"GET", b"HEAD"), b"nonsense\r\n\r\n") as client:
        assert client.reply(with_body=False)[0] == 200
        assert client.answer()[0] == 400


@pytest.mark.parametrize(("first", "status", "error", "allow"), [
    ("GET /nowhere", 404, "Not found", None),
    ("POST /nowhere", 404, "Not found", None),
    ("PUT /", 405, "Not allowed", {"GET", "HEAD", "POST", "OPTIONS"}),
    ("BREW /", 405, "Not allowed", {"GET", "HEAD", "POST", "OPTIONS"}),
    ("POST /health", 405, "Not allowed", {"GET", "HEAD", "OPTIONS"}),
])
def test_wrong_paths_and_methods_are_refused_without_harm(
        port: int, first: str, status: int, error: str, allow: set[str] | None) -> None:
    method, path = first.split()
    request = http_request(b"{}", method=method, path=path).replace(b"Connection: close\r\n", b"")
    with Client(port, request, lasting(path="/health")) as client:
        got, headers, body = client.reply()
        assert (got, json.loads(body)) == (status, {"ok": False, "error": error})
        assert (set(headers["allow"].split(", ")) if "allow" in headers else None) == allow
        assert client.answer() == (200, {"ok": True})


def test_browsers_may_ask_from_anywhere(port: int) -> None:
    preflight = lasting(
        None, "Origin: https://app.example.com", "Access-Control-Request-Method: POST"
    )
    with Client(port, preflight.replace(b"GET", b"OPTIONS"), lasting(path="/health")) as client:
        assert client.reply() == (
            204,
            {
                "access-control-allow-origin": "*",
                "access-control-allow-methods": "GET, POST, OPTIONS",
                "access-control-allow-headers": "Content-Type",
                "access-control-max-age": "86400",
            },
            b"",
        )
        assert client.answer() == (200, {"ok": True})


@pytest.mark.parametrize(("limits", "expected", "may_retry"), [
    ({}, (403, "Wrong answer"), False),
    ({"max_body_bytes": 100}, (413, "Too big"), False),
    ({"rate": 1}, (429, "Too often"), True),
    ({"max_bytes": 1}, (507, "Full"), True),
])
def test_errors_say_in_the_header_too_when_to_retry(
    clock: FakeClock,
    alice: Owner,
    limits: dict[str, int],
    expected: tuple[int, str],
    may_retry: bool,
) -> None:
    with limited(clock, **limits) as server, Client(server.server_port) as client:
        for request in (send(alice), receive(alice, "wrong")):
            client.send(lasting(request))
            status, headers, body = client.reply()
            if status != 200:
                break
        reply = json.loads(body)
        assert (status, reply["error"], reply["ok"]) == (*expected, False)
        assert headers["access-control-allow-origin"] == "*"
        assert headers["content-type"] == "application/json"
        assert headers.get("retry-after") == (str(reply["retry"]) if may_retry else None)
        assert "retry" in reply or not may_retry


@pytest.mark.parametrize("piece", [None, 1, 50])
def test_requests_in_a_row_are_answered_in_order(
    port: int, alice: Owner, piece: int | None
) -> None:
    requests = [
        lasting(path="/health"),
        lasting(check(alice)),
        lasting(send(alice)),
        lasting(check(alice)),
        lasting([check(alice), 7]),
        lasting().replace(b"GET", b"OPTIONS"),
        http_request(b"{"),
    ]
    octets = exchange(port, b"".join(requests), piece)
    replies = [parse_response(b"HTTP/1.1 " + part) for part in octets.split(b"HTTP/1.1 ")[1:]]
    assert [status for status, _, _ in replies] == [200, 200, 200, 200, 200, 204, 400]
    bodies = [json.loads(body) for status, _, body in replies if status != 204]
    assert bodies[:3] == [{"ok": True}, NOTHING, {"ok": True}]
    question = bodies[3].pop("question")
    assert bodies[3] == {"ok": True, "found": True}
    assert bodies[4] == [
        {"ok": True, "found": True, "question": question},
        {**bodies[4][1], "error": "Bad request"},
    ]
    assert [headers.get("connection") for _, headers, _ in replies] == [None] * 6 + ["close"]


def test_a_small_reply_is_one_segment(port: int, alice: Owner) -> None:
    with Client(port) as client:
        for request in (check(alice), send(alice), check(alice), {}):
            client.send(lasting(request))
            client.reply()
        tcp_info = client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(tcp_info) < 156:
        pytest.skip("this kernel does not count segments")
    # This is tcpi_data_segs_in of linux/tcp.h.
    assert struct.unpack_from("I", tcp_info, 152) == (4,)


def test_two_connection_headers_count_both(port: int) -> None:
    request = http_request(b"", "Connection: keep-alive", method="GET", path="/health")
    assert parse_response(exchange(port, request))[1]["connection"] == "close"
