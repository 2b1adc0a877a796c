"""Gathering by aiortc: servers on this machine that answer, are silent, or refuse."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from apps import SOON_S
from test_http_transport import make_certificate

from connectoid import AiortcAdapter, Ice
from connectoid.allocations import MIN_LIFETIME_S, bound_allocations
from connectoid.gathering import (
    GATHER_LIMIT_S,
    NEEDED,
    IceServer,
    ServerNames,
    gather_in_time,
    read_server,
)
from connectoid.lookups import MAX_LOOKUPS, MAX_LOOKUPS_OF_ONE
from connectoid.webrtc import Description

aioice = pytest.importorskip("aioice.ice")
stun = pytest.importorskip("aioice.stun")
turn = pytest.importorskip("aioice.turn")
kwargs_of = pytest.importorskip("aiortc.rtcicetransport").connection_kwargs

HERE = "127.0.0.1"
# An address of this machine from which a packet goes nowhere, as far as a server goes.
DEAD = "127.0.0.2"
MAPPED = ("203.0.113.7", 50_007)
RELAYED = ("203.0.113.8", 50_008)


class Silent(asyncio.DatagramProtocol):
    """Answer nothing."""


class Server(asyncio.DatagramProtocol):
    """Tell whoever asks from HERE that its address is MAPPED, and refuse to be a TURN server."""

    def connection_made(self, transport: Any) -> None:
        """Keep the way back."""
        self._transport = transport

    def datagram_received(self, octets: bytes, address: tuple[str, int]) -> None:
        """Answer, or not."""
        if address[0] == DEAD:
            return
        asked = stun.parse_message(octets)
        reply = stun.Message(
            message_method=asked.message_method, message_class=stun.Class.RESPONSE,
            transaction_id=asked.transaction_id)
        reply.attributes["XOR-MAPPED-ADDRESS"] = MAPPED
        if asked.message_method == stun.Method.ALLOCATE:
            reply.message_class = stun.Class.ERROR
            reply.attributes = {
                "ERROR-CODE": (401, "Unauthorized"), "NONCE": b"nonce", "REALM": "example.com"}
        self._transport.sendto(bytes(reply), address)


class Lender(Server):
    """Lend whoever asks an address of its own, for a while, and then for another."""

    lifetime_s = 600
    later_s = 600

    def __init__(self) -> None:
        self.refreshed: list[int] = []

    def datagram_received(self, octets: bytes, address: tuple[str, int]) -> None:
        """Ask for no password."""
        asked = stun.parse_message(octets)
        reply = stun.Message(
            message_method=asked.message_method, message_class=stun.Class.RESPONSE,
            transaction_id=asked.transaction_id)
        reply.attributes = {
            "XOR-MAPPED-ADDRESS": MAPPED, "XOR-RELAYED-ADDRESS": RELAYED,
            "LIFETIME": self.lifetime_s}
        if asked.message_method == stun.Method.REFRESH:
            self.refreshed.append(asked.attributes["LIFETIME"])
            reply.attributes["LIFETIME"] = self.later_s
        self._transport.sendto(bytes(reply), address)


@contextlib.asynccontextmanager
async def serving(server: Callable[[], asyncio.DatagramProtocol] = Server) -> AsyncIterator[int]:
    """Lend a server; return its port."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(server, local_addr=(HERE, 0))
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


async def gather(
    servers: list[IceServer], addresses: list[str], timeout_s: float = SOON_S,
    warn: Callable[[str], None] = lambda _: None, *, names: ServerNames | None = None,
    contact: int = 1,
) -> list[tuple[str, str, str]]:
    """Return type, address and own address of the candidates that are gathered."""
    connection = aioice.Connection(ice_controlling=True)
    look_up = functools.partial((names or ServerNames()).addresses_of, contact)
    gather_in_time(connection, servers, look_up, warn, relay_only=False)
    try:
        found = await connection.get_component_candidates(1, addresses, timeout_s)
    finally:
        await connection.close()
    return [(each.type, each.host, each.related_address or each.host) for each in found]


def test_address_from_which_nothing_comes_back_holds_up_no_offer() -> None:
    """One of the two addresses gets a reply; the other is not waited for to the end."""

    async def gather_beside_dead() -> list[tuple[str, str, str]]:
        async with serving() as port:
            return await gather(read_server(f"stun:{HERE}:{port}"), [DEAD, HERE])

    assert asyncio.run(gather_beside_dead()) == [
        ("host", DEAD, DEAD), ("host", HERE, HERE), ("srflx", MAPPED[0], HERE)]


def test_what_is_there_when_the_time_is_over_is_told() -> None:
    """No server answers: there are the addresses of this machine. The TURN server is told."""
    told: list[str] = []

    async def gather_beside_silent() -> list[tuple[str, str, str]]:
        async with serving(Silent) as port:
            servers = [*read_server(f"stun:{HERE}:{port}"), *turn_at(port)]
            return await gather(servers, [HERE], GATHER_LIMIT_S, told.append)

    assert asyncio.run(gather_beside_silent()) == [("host", HERE, HERE)]
    (words,) = told
    assert words.startswith("turn:")
    assert words.endswith(" cannot be used: it does not answer in time.")


def turn_at(port: int) -> list[IceServer]:
    """Return a TURN server on this machine."""
    return read_server({"urls": f"turn:{HERE}:{port}", "username": "u", "credential": "c"})


@pytest.mark.parametrize("limit_s", [SOON_S, GATHER_LIMIT_S])
def test_silent_turn_server_beside_one_that_answers_holds_up_no_offer(limit_s: float) -> None:
    """Nor is it told: a network without UDP is silent to one of two, each time."""
    told: list[str] = []

    async def gather_beside_both() -> list[tuple[str, str, str]]:
        async with serving(Silent) as nobody, serving(Lender) as lender:
            servers = [*turn_at(nobody), *turn_at(lender)]
            return await gather(servers, [HERE], limit_s, told.append)

    found = asyncio.run(gather_beside_both())
    assert [kind for kind, *_ in found] == ["host", "relay"]
    assert found[-1][1] == RELAYED[0]
    assert told == []


def test_all_stun_servers_are_asked_and_an_address_is_told_once() -> None:
    """The first is silent, and two say the same."""

    async def gather_beside_three() -> list[tuple[str, str, str]]:
        async with serving(Silent) as nobody, serving() as one, serving() as other:
            servers = [
                server for port in (nobody, one, other)
                for server in read_server(f"stun:{HERE}:{port}")]
            return await gather(servers, [HERE])

    assert asyncio.run(gather_beside_three()) == [
        ("host", HERE, HERE), ("srflx", MAPPED[0], HERE)]


class SlowNames:
    """Look names up: those that begin with `slow` take until the end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end = threading.Event()

    def __call__(self, host: str, port: int, *_: object) -> list[Any]:
        """Return what getaddrinfo does."""
        self.begun.append(host)
        if host.startswith("slow"):
            self.may_end.wait(SOON_S)
            raise socket.gaierror(socket.EAI_AGAIN, "slow")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (HERE, port))]


def lent_at(*hosts: str, entry: int = 0) -> list[IceServer]:
    """Return TURN servers as a relay lends them."""
    urls = [f"turn:{host}" for host in hosts]
    return read_server({"urls": urls, "username": "u", "credential": "c"}, entry)


def test_slow_names_of_turn_servers_keep_no_stun_server_waiting() -> None:
    """Many contacts have a relay that lends them; the threads of the loop are free."""
    getaddrinfo = SlowNames()

    async def run() -> tuple[list[tuple[str, str, str]], list[str]]:
        names = ServerNames(getaddrinfo)
        slow = [f"slow{number}.example" for number in range(4)]
        lookups = [
            asyncio.create_task(names.addresses_of(contact, server))
            for contact in range(MAX_LOOKUPS) for server in lent_at(*slow)]
        while len(getaddrinfo.begun) < MAX_LOOKUPS:
            await asyncio.sleep(0)
        async with serving() as port:
            found = await gather(
                read_server(f"stun:stun.example:{port}"), [HERE], names=names, contact=MAX_LOOKUPS)
        threads = [one.name for one in threading.enumerate() if not one.daemon]
        for lookup in lookups:
            lookup.cancel()
        return found, threads

    found, threads = asyncio.run(run())
    getaddrinfo.may_end.set()
    assert found == [("host", HERE, HERE), ("srflx", MAPPED[0], HERE)]
    assert not [name for name in threads if "look up" in name]


def test_slow_names_of_one_relay_keep_no_other_one_of_the_contact_waiting() -> None:
    getaddrinfo = SlowNames()

    async def run() -> list[str]:
        names = ServerNames(getaddrinfo)
        slow = [f"slow{number}.example" for number in range(MAX_LOOKUPS_OF_ONE + 1)]
        lookups = [
            asyncio.create_task(names.addresses_of(1, server)) for server in lent_at(*slow)]
        while len(getaddrinfo.begun) < MAX_LOOKUPS_OF_ONE:
            await asyncio.sleep(0)
        (other,) = lent_at("turn.example", entry=1)
        async with asyncio.timeout(SOON_S):
            found = await names.addresses_of(1, other)
        for lookup in lookups:
            lookup.cancel()
        return found

    assert asyncio.run(run()) == [HERE]
    getaddrinfo.may_end.set()
    assert len(getaddrinfo.begun) == MAX_LOOKUPS_OF_ONE + 1


def test_name_of_a_stun_server_is_looked_up_once_for_all_addresses() -> None:
    getaddrinfo = SlowNames()

    async def run() -> None:
        async with serving() as port:
            await gather(
                read_server(f"stun:stun.example:{port}"), [HERE, DEAD],
                names=ServerNames(getaddrinfo))

    asyncio.run(run())
    assert getaddrinfo.begun == ["stun.example"]


def two_addresses(_host: str, port: int, *_: object) -> list[Any]:
    """Return one where nobody listens, and one where a server does."""
    return [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in (DEAD, HERE)]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_allocation_that_ends_too_soon_is_not_used(more: int) -> None:
    """It would be asked for again and again."""
    lender = Lender()
    lender.lifetime_s = MIN_LIFETIME_S + more
    told: list[str] = []

    async def run() -> list[tuple[str, str, str]]:
        async with serving(lambda: lender) as port:
            return await gather(turn_at(port), [HERE], warn=told.append)

    kinds = [kind for kind, *_ in asyncio.run(run())]
    if more < 0:
        assert kinds == ["host"]
        assert told[0].endswith(" cannot be used: it lends for less than 60 s.")
        return
    assert (kinds, told) == (["host", "relay"], [])


@pytest.mark.parametrize(("later_s", "is_over"), [
    (MIN_LIFETIME_S - 1, True), (MIN_LIFETIME_S, False)])
def test_allocation_that_is_lent_anew_for_too_short_a_time_is_over(
    later_s: int, *, is_over: bool,
) -> None:
    """What is given back is lent for no time at all, and that is no error."""
    lender = Lender()
    lender.later_s = later_s

    async def run() -> None:
        bound_allocations()
        async with serving(lambda: lender) as port:
            relayed, _ = await turn.create_turn_endpoint(Silent, (HERE, port), "u", "c")
            client = relayed._TurnTransport__inner_protocol
            # As it does after five sixths of what is left.
            refreshing = asyncio.create_task(client.refresh(0))
            while not lender.refreshed or client.transactions:
                await asyncio.sleep(0)
            assert client.transport.is_closing() == is_over
            refreshing.cancel()
            lender.later_s = 0
            await client.delete()

    asyncio.run(run())
    assert lender.refreshed == ([600] if is_over else [600, 0])


@contextlib.asynccontextmanager
async def serving_tcp(context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Lend a TURN server over TCP or TLS; return its port."""

    class Way:
        def __init__(self, writer: asyncio.StreamWriter) -> None:
            self._writer = writer

        def sendto(self, octets: bytes, _address: object) -> None:
            self._writer.write(octets)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lender = Lender()
        lender.connection_made(Way(writer))
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readexactly(20)
                rest = await reader.readexactly(int.from_bytes(head[2:4], "big"))
                lender.datagram_received(head + rest, (HERE, 0))
        writer.close()

    async with await asyncio.start_server(serve, HERE, 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


def test_turn_server_is_reached_at_its_second_address() -> None:
    async def run() -> list[tuple[str, str, str]]:
        async with serving_tcp() as port:
            servers = lent_at(f"turn.example:{port}?transport=tcp")
            return await gather(servers, [HERE], names=ServerNames(two_addresses))

    assert [kind for kind, *_ in asyncio.run(run())] == ["host", "relay"]


@pytest.mark.parametrize(("host", "is_used"), [(HERE, True), ("turn.example", False)])
def test_certificate_of_a_turn_server_is_checked_against_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, *, is_used: bool,
) -> None:
    """It is good for the address that the name leads to, and for nothing else."""
    certificate = make_certificate(tmp_path, -1, 1)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    told: list[str] = []

    async def run() -> list[tuple[str, str, str]]:
        async with serving_tcp(context) as port:
            servers = read_server(
                {"urls": f"turns:{host}:{port}", "username": "u", "credential": "c"})
            names = ServerNames(two_addresses)
            return await gather(servers, [HERE], warn=told.append, names=names)

    kinds = [kind for kind, *_ in asyncio.run(run())]
    if is_used:
        assert (kinds, told) == (["host", "relay"], [])
        return
    assert kinds == ["host"]
    assert len(told) == 1
    assert "Hostname mismatch" in told[0]


async def offer(ice: Ice) -> tuple[str, list[str]]:
    """Return the SDP of an offer that aiortc makes with some servers, and what they refuse."""
    gathered: asyncio.Future[Description] = asyncio.get_running_loop().create_future()
    troubles: list[str] = []

    def report(_contact: int, event: str, _attempt_id: int, value: Any) -> None:
        if event == "gathered":
            gathered.set_result(value)
        elif event == "trouble":
            troubles.append(value)

    adapter = AiortcAdapter()
    adapter.start(report)
    adapter.gather(1, 1, None, ice)
    async with asyncio.timeout(SOON_S):
        description = await gathered
    await adapter.stop()
    return description["sdp"], troubles


@pytest.mark.parametrize(("server", "words"), [
    ("stun:stun.example.com:many", "stun:stun.example.com:many cannot be used: malformed uri"),
    ("stuns:stun.example.com", "STUN over TLS is not supported"),
    ("https://stun.example.com/", "invalid scheme"),
    ({"urls": ["turn:turn.example.com"]}, "without a username and a credential"),
])
def test_server_that_aiortc_cannot_use_costs_a_warning_and_no_offer(
    server: object, words: str,
) -> None:
    sdp, (trouble,) = asyncio.run(offer(Ice([server])))
    assert "m=application" in sdp
    assert words in trouble


def test_turn_server_that_refuses_the_password_is_told_without_it() -> None:
    """The offer has what there is."""

    async def offer_beside_refusal() -> tuple[str, list[str]]:
        async with serving() as port:
            turn = {"urls": f"turn:{HERE}:{port}", "username": "alice", "credential": "secret"}
            return await offer(Ice([turn]))

    sdp, (trouble,) = asyncio.run(offer_beside_refusal())
    assert "m=application" in sdp
    assert "it refuses the username or the password" in trouble
    assert "secret" not in trouble
    assert "secret" not in repr(read_server(
        {"urls": "turn:a", "username": "alice", "credential": "secret"}))


def test_stun_server_by_its_ipv6_address_is_left_out_without_a_word() -> None:
    """For IPv6 nobody needs one, and aiortc cannot read such a URL."""
    assert read_server("stun:[2001:db8::1]:443") == []


def test_aioice_still_has_what_this_mends() -> None:
    """As soon as this fails, a part of `gathering` may go."""
    waits = inspect.signature(aioice.Connection.get_component_candidates).parameters["timeout"]
    assert waits.default == 5
    assert all(hasattr(aioice, name) for name in NEEDED)
    two = [stub("stun:one.example.com"), stub("stun:other.example.com")]
    assert kwargs_of(two) == {"stun_server": ("one.example.com", 3478)}
    with pytest.raises(ValueError, match="malformed"):
        kwargs_of([stub("stun:[2001:db8::1]:443")])


def stub(url: str) -> Any:
    """Return a server as aiortc wants it."""
    return pytest.importorskip("aiortc").RTCIceServer(urls=url)
