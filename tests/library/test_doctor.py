"""`connectoid doctor`: what it finds of relays, servers and this network, and what it says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import aioice.stun
import pytest
from apps import NOWHERE, FakeRelay, http_reply
from harness import Process

import connectoid.cli
from connectoid import UsageError, probes
from connectoid.cli.doctor import (
    BAD,
    GOOD,
    KINDS,
    ODD,
    WITH_TURN,
    WITHOUT_STUN,
    WITHOUT_WAY,
    Finding,
    conclude,
    judge_certificate,
    look_at_proxies,
    read_server,
)
from connectoid.clock import system_now
from connectoid.datagrams import MAX_DATAGRAM_BYTES
from connectoid.lookups import Lookups

HOME = "192.168.1.5"
A = ("198.51.100.1", 3478)
B = ("198.51.100.2", 3478)
SEEN = ("203.0.113.9", 40_000)

Reply = Callable[[aioice.stun.Message], bytes | None]


@contextlib.contextmanager
def answering(reply: Reply) -> Iterator[probes.Address]:
    """Run a server that answers binding requests as it likes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                octets, client = server.recvfrom(2048)
                if octets == b"end":
                    return
                answer = reply(aioice.stun.parse_message(octets))
                if answer is not None:
                    server.sendto(answer, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            server.sendto(b"end", server.getsockname())
            thread.join()


def saying(address: probes.Address) -> Reply:
    """Return a reply that a client is seen as this address."""

    def reply(request: aioice.stun.Message) -> bytes:
        response = aioice.stun.Message(
            request.message_method, aioice.stun.Class.RESPONSE, request.transaction_id)
        response.attributes["XOR-MAPPED-ADDRESS"] = address
        return bytes(response)

    return reply


def kind_from(*replies: Reply) -> str:
    """Return what is concluded from the answers of servers."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(answering(reply)) for reply in replies]
        return probes.kind_of(asyncio.run(probes.probe_stun("127.0.0.1", servers)))


@pytest.mark.parametrize(
    ("replies", "kind"),
    [
        ([saying(("127.0.0.1", 1))], probes.OPEN),
        ([saying(SEEN)], probes.SOME_NAT),
        ([saying(SEEN), saying(SEEN)], probes.ONE_PORT),
        ([saying(SEEN), saying(("203.0.113.9", 40_001))], probes.SYMMETRIC),
        # Of those that answer nothing, or garbage, nothing is known.
        ([saying(SEEN), lambda _: None], probes.SOME_NAT),
        ([lambda request: request.transaction_id], probes.SILENT),
        ([bytes], probes.SILENT),
        ([lambda _: b"\0" * 20], probes.SILENT),
        # A FINGERPRINT (0x8028) of no length.
        ([lambda request: b"\1\1\0\4" + bytes(request)[4:20] + b"\x80\x28\0\0"], probes.SILENT),
    ],
)
def test_doctor_tells_nats_by_what_servers_see(replies: list[Reply], kind: str) -> None:
    assert kind_from(*replies) == kind


def test_doctor_asks_no_server_of_another_family_or_of_its_own_network() -> None:
    way = asyncio.run(probes.probe_stun("127.0.0.1", [("2001:db8::1", 3478)]))
    assert way == probes.Mapped("127.0.0.1", {})
    servers = [("192.168.1.1", 1), ("127.0.0.1", 1), ("fe80::1%2", 1), A, ("198.51.100.7", 1), A]
    assert probes.outside(servers, ["198.51.100.7"]) == [A]


def test_doctor_sees_nothing_from_an_address_that_has_gone() -> None:
    way = asyncio.run(probes.probe_stun("198.51.100.7", [A]))
    assert probes.kind_of(way) == probes.SILENT


def home(*seen: probes.Address | None) -> probes.Mapped:
    """Return how servers saw one socket at home."""
    return probes.Mapped(HOME, dict(zip((A, B), seen, strict=False)))


def conclusion(kind: str, words: str = "over IPv4") -> Finding:
    """Return what is said of a family of addresses."""
    return Finding(KINDS[kind].state, words, KINDS[kind].conclusion)


def test_doctor_concludes_from_the_best_way_of_each_family() -> None:
    silent = probes.Mapped("10.0.0.1", {A: None})
    nat = home(SEEN, SEEN)
    six = probes.Mapped("2001:db8::5", {("2001:db8::1", 3478): ("2001:db8::5", 9)})
    assert list(conclude([silent, nat, six], has_turn=False)) == [
        conclusion(probes.ONE_PORT), conclusion(probes.OPEN, "over IPv6")]
    assert list(conclude([silent], has_turn=False)) == [
        conclusion(probes.SILENT), WITHOUT_WAY]
    assert list(conclude([silent], has_turn=True)) == [conclusion(probes.SILENT), WITH_TURN]
    assert list(conclude([], has_turn=False)) == [WITHOUT_STUN]


def run(*flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    """Run the command, and return its exit code with what it told."""
    code = connectoid.cli.main(["doctor", "--json", *flags])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, told


def about(told: list[dict[str, Any]], what: str) -> list[tuple[str, str]]:
    """Return what was told about something."""
    return [(line["state"], line["found"]) for line in told if line.get("about") == what]


def test_doctor_examines_a_real_relay(
    start: Callable[..., Process], capsys: pytest.CaptureFixture[str]
) -> None:
    relay = start("--stun", "--udp")
    url = f"http://127.0.0.1:{relay.port}"
    code, told = run("--relay", url, capsys=capsys)
    assert code == 0
    states, words = zip(*about(told, f"relay {url}"), strict=True)
    assert states == (GOOD, GOOD, GOOD)
    assert [text.partition(" (")[0] for text in words] == [
        "answers", "takes a check", "answers a check over UDP"]
    # The relay is on this machine: to it, every NAT is invisible.
    assert about(told, "in all") == [(ODD, WITHOUT_STUN.words)]


def test_doctor_names_what_is_broken_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run("--relay", NOWHERE, "--ice-server", "stun:nowhere.invalid", capsys=capsys)
    assert code == 1
    ((state, words),) = about(told, f"relay {NOWHERE}")
    assert state == BAD
    assert "cannot be reached" in words
    ((state, words),) = about(told, "STUN nowhere.invalid")
    assert state == BAD
    assert words.startswith("the name is not found: ")


def test_doctor_tells_what_a_relay_says_of_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    def reply(request: Any) -> bytes:
        if request is None:
            return http_reply({"stun": False})
        return http_reply({"error": "Denied", "detail": "\x1b[31mno such key"})

    with FakeRelay(reply) as relay:
        code, told = run("--relay", relay.url, "--ext", "wrong", capsys=capsys)
    assert code == 1
    (_, (state, words)) = about(told, f"relay {relay.url}")
    assert state == BAD
    assert "Denied" in words
    assert "\x1b" not in words
    assert "wrong" not in json.dumps(told)


# Nothing comes of it, however long one waits.
SILENT_S = 2.0


@pytest.mark.parametrize("more", [-4, 0, 4])
def test_doctor_reads_no_long_datagrams(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """aioice would take seconds for one of 64 KiB."""
    monkeypatch.setattr(probes, "DATAGRAM_S", SILENT_S)

    def fill(request: aioice.stun.Message) -> bytes:
        octets = saying(("192.0.2.1", 9))(request)
        assert octets is not None
        padding = MAX_DATAGRAM_BYTES + more - len(octets)
        octets += struct.pack("!HH", 0x8022, padding - 4) + bytes(padding - 4)
        return octets[:2] + struct.pack("!H", len(octets) - 20) + octets[4:]

    with answering(fill) as server:
        mapped = asyncio.run(probes.probe_stun("127.0.0.1", [server]))
    assert [*mapped.seen.values()] == [("192.0.2.1", 9) if more <= 0 else None]


def test_doctor_waits_for_no_silent_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(probes, "LOOK_UP_S", SILENT_S)
    monkeypatch.setattr(probes, "Lookups", lambda: Lookups(lambda *_: [over.wait()]))
    with pytest.raises(OSError, match="no name server answers"):
        asyncio.run(probes.look_up("relay.example.com", 443))
    over.set()


def test_doctor_tells_a_wrong_turn_server_from_a_silent_one() -> None:
    def refuse(request: aioice.stun.Message) -> bytes:
        response = aioice.stun.Message(
            request.message_method, aioice.stun.Class.ERROR, request.transaction_id)
        response.attributes["ERROR-CODE"] = (401, "Unauthorized")
        return bytes(response)

    def forbid(request: aioice.stun.Message) -> bytes:
        response = aioice.stun.Message(
            request.message_method, aioice.stun.Class.ERROR, request.transaction_id)
        response.attributes["ERROR-CODE"] = (403, "Forbidden\x1b")
        return bytes(response)

    said = []
    for reply in (refuse, forbid):
        with answering(reply) as (host, port):
            answer = asyncio.run(
                probes.probe_turn(host, port, None, None, transport="udp", tls=False))
            said.append(answer.problem)
    assert said == ["it refuses the name or the password", r"it refuses (403 'Forbidden\x1b')"]
    refused = asyncio.run(
        probes.probe_turn("127.0.0.1", 1, None, None, transport="tcp", tls=False))
    assert "Connect call failed" in refused.problem


def test_doctor_warns_a_week_before_the_end_of_a_certificate() -> None:
    now_s = system_now().wall_us / 1e6
    week_s = 7 * 86_400
    for left_s, state in ((-1, ODD), (week_s - 60, ODD), (week_s + 60, GOOD)):
        answer = probes.Answer("", 0.0, now_s + left_s)
        assert judge_certificate("relay", answer).state == state


def test_doctor_names_proxies_without_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://alice:secret@proxy.example:3128/")
    found = list(look_at_proxies(["https://relay.example", "http://relay.example"]))
    assert found == [Finding(GOOD, "proxy", "the environment names proxy.example:3128 for https")]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("stun:a.example", ("a.example", 3478, None, False)),
        ("stun:[2001:db8::1]:99", ("2001:db8::1", 99, None, False)),
        ("turn:a.example", ("a.example", 3478, "udp", False)),
        ("turn:a.example:80?transport=tcp", ("a.example", 80, "tcp", False)),
        ("turns:a.example", ("a.example", 5349, "tcp", True)),
    ],
)
def test_doctor_reads_urls_of_servers(url: str, place: tuple[Any, ...]) -> None:
    assert read_server(url)[1:5] == place


@pytest.mark.parametrize(
    "url", ["", "stun:", "http://a.example", "stun:a:0", "stun:a:65536", "stun:a:b", "turn:?"])
def test_doctor_refuses_urls_of_no_server(url: str) -> None:
    with pytest.raises(UsageError, match="is no URL of a STUN or TURN server"):
        read_server(url)


def test_doctor_needs_a_relay(capsys: pytest.CaptureFixture[str]) -> None:
    assert connectoid.cli.main(["doctor"]) == 2
    assert "No relay" in capsys.readouterr().err
