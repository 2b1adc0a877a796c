"""Gathering by aiortc, within the time of PROTOCOL.md, CONNECT-13.

aioice asks one STUN server from each address of the machine, waits 5 s for all replies, and only
then tells what it has. But many machines have an address to which nothing comes back: the bridge of
a Docker without containers, or a tunnel into a company. So a connection of aioice gets another
method to gather with. It asks all servers at once, and takes what is there when the time is over.

It looks names up in daemon threads, too: aioice does it in the executor of the loop, whose few
threads are everybody's, and hold up the end of the process.

aioice has no setting for it. Another version may have other names: then no server is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from connectoid.allocations import bound_allocations
from connectoid.lookups import Lookups, few_of
from connectoid.shown import shown
from connectoid.thrifty_tls import expect_name, make_context
from connectoid.turn_stream import bound_turn_streams

# For candidates: what a server has not said by then is left out.
GATHER_LIMIT_S = 2.0
# For STUN servers to answer other addresses, once a server has answered one, and for other TURN
# servers, once one can be used. aioice asks again after 0.5 s, so that one packet may get lost.
SETTLE_S = 0.6

IPV4 = 4
# A TURN server's error (RFC 8489, section 14.8).
UNAUTHORIZED = 401

Task: TypeAlias = asyncio.Task[Any]

NEEDED = ("StunProtocol", "relayed_candidate", "server_reflexive_candidate")
# For IPv6 nobody translates addresses, so such a server would tell nothing new. It is a relay that
# was named by its address, and aiortc cannot read the URL.
STUN_BY_IPV6 = "stun:["


class IceServer(NamedTuple):
    """A server that aiortc can use."""

    url: str
    is_turn: bool
    host: str
    port: int
    is_tls: bool
    # udp or tcp, for TURN.
    transport: str
    username: str | None
    credential: str | None
    # Its place among what the connection is made with: who named it.
    entry: int

    def __repr__(self) -> str:
        """Return the URL: logs show no passwords."""
        return f"IceServer({self.url!r})"


LookUp: TypeAlias = Callable[[IceServer], Awaitable[list[str]]]


def read_server(server: Any, entry: int = 0) -> list[IceServer]:
    """Return the URLs of an ICE server, a URL or a mapping, as servers; raise ValueError."""
    if not isinstance(server, Mapping):
        server = {"urls": server}
    urls = server.get("urls", ())
    if isinstance(urls, str):
        urls = [urls]
    return [
        _read_url(url, server.get("username"), server.get("credential"), entry)
        for url in urls if not url.startswith(STUN_BY_IPV6)
    ]


def _read_url(
    url: str, username: str | None, credential: str | None, entry: int,
) -> IceServer:
    try:
        parsed = importlib.import_module("aiortc.rtcicetransport").parse_stun_turn_uri(url)
    except ValueError as error:
        raise ValueError(f"{url} cannot be used: {error}") from None
    if parsed["scheme"] == "stuns":
        raise ValueError(f"{url} cannot be used: STUN over TLS is not supported")
    is_turn = parsed["scheme"] != "stun"
    if is_turn and None in (username, credential):
        raise ValueError(f"{url} cannot be used without a username and a credential")
    return IceServer(
        url, is_turn, parsed["host"], parsed["port"], parsed["scheme"] == "turns",
        parsed.get("transport", "udp"), username, credential, entry)


class ServerNames:
    """Look the names of ICE servers up, for all connections of an adapter.

    Relays lend TURN servers with any names. They take no place of the STUN servers, which are of
    relays of one's own, and few of other contacts and of other relays.
    """

    def __init__(self, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo) -> None:
        self._stun = Lookups(getaddrinfo)
        self._turn = Lookups(getaddrinfo)

    async def addresses_of(self, contact: int, server: IceServer) -> list[str]:
        """Return a few addresses of a server that is asked for a contact; raise OSError."""
        if _is_address(server.host):
            return [server.host]
        asker = (contact, server.entry)
        name = (server.host, server.port)
        if server.is_turn:
            kind = socket.SOCK_STREAM if server.transport == "tcp" else socket.SOCK_DGRAM
            infos = await self._turn.look_up(asker, *name, socket.AF_UNSPEC, kind)
        else:
            # For IPv6 nobody translates addresses.
            infos = await self._stun.look_up(asker, *name, socket.AF_INET, socket.SOCK_DGRAM)
        return [info[4][0] for info in few_of(infos)]


class Gathering:
    """Gather the candidates of one connection of aioice; `warn` is told what servers refuse."""

    def __init__(
        self, connection: Any, servers: Sequence[IceServer], look_up: LookUp,
        warn: Callable[[str], None], *, relay_only: bool,
    ) -> None:
        self._aioice = importlib.import_module("aioice.ice")
        self._connection = connection
        self._servers = servers
        self._look_up = look_up
        self._found: dict[IceServer, asyncio.Future[list[str]]] = {}
        self._warn = warn
        self._relay_only = relay_only
        self._of_machine = connection.get_component_candidates

    async def get_component_candidates(
        self, component: int, addresses: list[str], timeout: float = GATHER_LIMIT_S,
    ) -> list[Any]:
        """Return the candidates of this machine, and those that servers have told in time."""
        found = await self._of_machine(component, addresses)
        stun = [
            asyncio.create_task(self._ask_stun(protocol, server))
            for server in self._servers if not server.is_turn
            for protocol in self._connection._protocols if _is_ipv4(protocol)
        ]
        turn = [
            asyncio.create_task(self._ask_turn(component, server))
            for server in self._servers if server.is_turn
        ]
        try:
            async with asyncio.timeout(timeout):
                await _until_first(stun + turn)
                await _until_all(stun, SETTLE_S)
                await _until_first(turn)
                await _until_all(turn, SETTLE_S)
        except TimeoutError:
            self._tell_of_silence(turn)
        finally:
            found += [task.result() for task in stun + turn if _has_candidate(task)]
            for task in stun + turn:
                task.cancel()
        return _without_repeated(found)

    def _tell_of_silence(self, asked: Iterable[Task]) -> None:
        """Tell of TURN servers that are silent, if no other one has told a candidate."""
        tasks = list(asked)
        if any(_has_candidate(task) for task in tasks):
            return
        servers = [server for server in self._servers if server.is_turn]
        for server, task in zip(servers, tasks, strict=True):
            if not task.done():
                self._warn(f"{server.url} cannot be used: it does not answer in time.")

    async def _ask_stun(self, protocol: Any, server: IceServer) -> Any:
        (address, *_) = await self._addresses_of(server)
        candidate, _ = await self._aioice.server_reflexive_candidate(
            protocol, (address, server.port))
        return candidate

    def _addresses_of(self, server: IceServer) -> asyncio.Future[list[str]]:
        """Look a server's name up, once for all addresses of this machine."""
        if server not in self._found:
            self._found[server] = asyncio.ensure_future(self._look_up(server))
        return self._found[server]

    async def _ask_turn(self, component: int, server: IceServer) -> Any:
        try:
            candidate, protocol = await self._relayed(component, server)
        except Exception as error:
            self._warn(f"{server.url} cannot be used: {_words_of(error)}.")
            return None
        self._connection._protocols.append(protocol)
        return candidate

    async def _relayed(self, component: int, server: IceServer) -> tuple[Any, Any]:
        """Return what the first address lends that can be reached; raise why none can."""
        *others, last = await self._look_up(server)
        for address in others:
            with contextlib.suppress(OSError):
                return await self._relayed_at(address, component, server)
        return await self._relayed_at(last, component, server)

    async def _relayed_at(
        self, address: str, component: int, server: IceServer,
    ) -> tuple[Any, Any]:
        lent: tuple[Any, Any] = await self._aioice.relayed_candidate(
            component=component,
            hide_related_address=self._relay_only,
            protocol_factory=lambda: self._aioice.StunProtocol(self._connection),
            turn_server=(address, server.port),
            turn_username=server.username,
            turn_password=server.credential,
            turn_ssl=tls_of(server),
            turn_transport=server.transport,
        )
        return lent


def gather_in_time(
    connection: Any, servers: Sequence[IceServer], look_up: LookUp, warn: Callable[[str], None],
    *, relay_only: bool,
) -> None:
    """Have a connection of aioice gather so."""
    aioice = importlib.import_module("aioice.ice")
    if not all(hasattr(aioice, name) for name in NEEDED):
        warn("This version of aiortc is unknown here: STUN and TURN servers are not asked.")
        return
    bound_turn_streams()
    bound_allocations()
    gathering = Gathering(connection, servers, look_up, warn, relay_only=relay_only)
    connection.get_component_candidates = gathering.get_component_candidates


def tls_of(server: IceServer) -> ssl.SSLContext | None:
    """Return what a server's certificate is checked with: against its name, not its address."""
    if not server.is_tls:
        return None
    context = make_context()
    expect_name(context, server.host)
    return context


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_ipv4(protocol: Any) -> bool:
    return ipaddress.ip_address(protocol.local_candidate.host).version == IPV4


async def _until_first(asked: Iterable[Task]) -> None:
    """Wait until a server has told a candidate, or all have failed."""
    for task in asyncio.as_completed(asked):
        with contextlib.suppress(Exception):
            if await task is not None:
                return


async def _until_all(asked: Collection[Task], timeout_s: float) -> None:
    if asked:
        await asyncio.wait(asked, timeout=timeout_s)


def _has_candidate(task: Task) -> bool:
    if not task.done() or task.cancelled() or task.exception() is not None:
        return False
    return task.result() is not None


def _without_repeated(candidates: Iterable[Any]) -> list[Any]:
    """Leave out what a second server has told as well."""
    by_address: dict[tuple[str, int], Any] = {}
    for candidate in candidates:
        by_address.setdefault((candidate.host, candidate.port), candidate)
    return list(by_address.values())


def _words_of(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None and response.error_code == UNAUTHORIZED:
        return "it refuses the username or the password"
    # Some of it is what the server says.
    return shown(str(error) or type(error).__name__)
