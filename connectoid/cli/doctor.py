"""The command `doctor`: what this network lets through, and what connects to what.

It asks the relays of --relay and the servers of --ice-server as a runner would, from each local
address, and says in words what it found. It opens no store.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from connectoid import UsageError, probes
from connectoid.cli.running import check_relays
from connectoid.cli.telling import Teller
from connectoid.clock import system_now
from connectoid.ice import has_stun
from connectoid.relay_client import RelayClient, make_transport
from connectoid.shown import shown
from connectoid.urls import check_url
from connectoid.webrtc import quiet_aiortc

GOOD = "ok"
ODD = "warn"
BAD = "bad"

# Before the end of a certificate. Tools renew it weeks before, so this one is not being renewed.
CERTIFICATE_ODD_S = 7 * 86_400


class Finding(NamedTuple):
    """One line of the report: a state, what it is about, and what was found."""

    state: str
    about: str
    words: str


class Kind(NamedTuple):
    """What a way to the Internet is called, and what connects to what through it."""

    state: str
    name: str
    conclusion: str


# From the best to the worst.
KINDS: Mapping[str, Kind] = {
    probes.OPEN: Kind(
        GOOD, "reachable from the Internet as it is",
        "this device connects with everybody whose network lets UDP out"),
    probes.ONE_PORT: Kind(
        GOOD, "behind a NAT that keeps one port for all",
        "this device connects with servers and with other homes; where the other end has a"
        " symmetric NAT, as some mobile networks and companies have, it takes TURN"),
    probes.SOME_NAT: Kind(
        GOOD, "behind a NAT; which kind, a second STUN server would tell (--ice-server)",
        "this device connects with servers, and with most homes"),
    probes.SYMMETRIC: Kind(
        ODD, "behind a symmetric NAT, which takes another port for each server",
        "this device connects with servers and in its own network; with other homes it takes"
        " TURN"),
    probes.SILENT: Kind(
        ODD, "no STUN server answers: no UDP gets out and back",
        "this device connects in its own network only; all else takes another network, or TURN"
        " over TCP or TLS"),
}

FAMILIES: Mapping[socket.AddressFamily, str] = {
    socket.AF_INET: "over IPv4",
    socket.AF_INET6: "over IPv6",
}

WITH_TURN = Finding(GOOD, "in all", "through TURN this device connects with everybody")
WITHOUT_STUN = Finding(
    ODD, "in all",
    "nothing is known of the ways out: no STUN server outside this network was there to ask;"
    " --ice-server names one")
WITHOUT_WAY = Finding(
    BAD, "in all", "no connection leaves this network: it takes another network, or TURN")


class IceServer(NamedTuple):
    """A STUN or TURN server that a user has named."""

    url: str
    host: str
    port: int
    # Of TURN: "udp" or "tcp", and None of STUN.
    transport: str | None
    tls: bool
    username: str | None = None
    credential: str | None = None


def doctor(arguments: argparse.Namespace, teller: Teller) -> int:
    """Look at relays and networks, and say what connects to what; 1 if something is broken."""
    check_relays(arguments)
    for url in arguments.relay:
        check_url(url, allow_http=True)
    servers = [one for server in arguments.ice_server for one in read_servers(server)]
    examination = Examination(arguments, servers, teller)
    asyncio.run(examination.run())
    return int(examination.is_broken)


def read_servers(server: Any) -> list[IceServer]:
    """Return the servers of a URL, or of a mapping like RTCIceServer; raise UsageError."""
    if isinstance(server, str):
        return [read_server(server)]
    urls = server["urls"]
    if isinstance(urls, str):
        urls = [urls]
    login = {"username": server.get("username"), "credential": server.get("credential")}
    return [read_server(url)._replace(**login) for url in urls]


def read_server(url: str) -> IceServer:
    """Return the server of a STUN or TURN URL (RFC 7064, RFC 7065); raise UsageError."""
    scheme, _, rest = url.partition(":")
    place, _, query = rest.partition("?")
    parts = urllib.parse.urlsplit(f"//{place}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if scheme not in DEFAULT_PORTS or not parts.hostname or port == 0:
        raise UsageError(f"{url!a} is no URL of a STUN or TURN server, such as stun:HOST:PORT.")
    is_tls = scheme in ("stuns", "turns")
    transport = None
    if scheme in ("turn", "turns"):
        transport = query.removeprefix("transport=") or DEFAULT_TRANSPORTS[scheme]
    return IceServer(url, parts.hostname, port or DEFAULT_PORTS[scheme], transport, is_tls)


DEFAULT_PORTS: Mapping[str, int] = {"stun": 3478, "turn": 3478, "turns": 5349}
DEFAULT_TRANSPORTS: Mapping[str, str] = {"turn": "udp", "turns": "tcp"}


class Examination:
    """Find out all there is, the nearest first, and tell each finding when it is there."""

    def __init__(
        self, arguments: argparse.Namespace, servers: Sequence[IceServer], teller: Teller,
    ) -> None:
        self.is_broken = False
        self._arguments = arguments
        self._teller = teller
        self._turn = [server for server in servers if server.transport]
        # Where to ask for STUN.
        self._stun = [(server.host, server.port) for server in servers if not server.transport]
        self._has_turn = False

    async def run(self) -> None:
        """Examine all."""
        # What a server's garbage does to aioice is no traceback.
        quiet_aiortc(asyncio.get_running_loop())
        self._tell(look_at_clock())
        for finding in look_at_proxies(self._arguments.relay):
            self._tell(finding)
        for url in self._arguments.relay:
            await self._examine_relay(url)
        ways = await self._examine_ways()
        for server in self._turn:
            await self._examine_turn(server)
        for finding in conclude(ways, has_turn=self._has_turn):
            self._tell(finding)

    def _tell(self, finding: Finding) -> None:
        state, about, words = finding
        self.is_broken |= state == BAD
        self._teller.say(
            "finding", "", result=f"{state:5} {about}: {shown(words)}",
            state=state, about=about, found=words)

    async def _examine_relay(self, url: str) -> None:
        """Ask a relay what clients ask it, by HTTP, and then by UDP."""
        about = f"relay {url}"
        transport = make_transport(self._arguments.ca)
        client = RelayClient(url, transport)
        try:
            document = await probes.probe_document(client)
            self._tell(judge(about, "answers", document))
            if document.problem:
                return
            check = await probes.probe_check(client, self._arguments.ext or "")
            self._tell(judge(about, "takes a check", check))
        finally:
            await transport.close()
        if url.startswith("https:"):
            certificate = await probes.probe_certificate(url, self._arguments.ca)
            self._tell(judge_certificate(about, certificate))
        if document.value.get("udp") is True:
            heard = await probes.probe_udp_check(url)
            # Nobody depends on it.
            self._tell(judge(about, "answers a check over UDP", heard, otherwise=ODD))
        if has_stun(document.value):
            self._stun.append((urllib.parse.urlsplit(url).hostname or "", probes.port_of(url)))

    async def _examine_ways(self) -> Sequence[probes.Mapped]:
        """Ask all STUN servers from all local addresses."""
        servers: list[probes.Address] = []
        for host, port in self._stun:
            try:
                servers += await probes.look_up(host, port)
            except OSError as error:
                words = f"the name is not found: {error.strerror or error}"
                self._tell(Finding(BAD, f"STUN {host}", words))
        local = probes.local_addresses()
        outside = probes.outside(servers, local)
        found = await asyncio.gather(*(probes.probe_stun(one, outside) for one in local))
        # From an address of a family that no server has, nothing can be asked.
        ways = [way for way in found if way.seen]
        for way in ways:
            kind = KINDS[probes.kind_of(way)]
            self._tell(Finding(kind.state, f"from {way.local}", kind.name + self._details(way)))
        return ways

    def _details(self, way: probes.Mapped) -> str:
        """Return, for --verbose, how each server saw a local address."""
        if not self._arguments.verbose:
            return ""
        return "".join(
            f"; to {show(server)} {show(seen)}" for server, seen in way.seen.items())

    async def _examine_turn(self, server: IceServer) -> None:
        answer = await probes.probe_turn(
            server.host, server.port, server.username, server.credential,
            transport=server.transport or "", tls=server.tls)
        self._has_turn |= not answer.problem
        self._tell(judge(server.url, "gives a relayed address", answer))


def look_at_clock() -> Finding:
    """Return what the clock shows: certificates and messages are judged by it."""
    now = system_now()
    time = datetime.datetime.fromtimestamp(now.wall_us / 1e6, datetime.UTC)
    shown = f"{time:%Y-%m-%d %H:%M} UTC"
    if now.is_set:
        return Finding(GOOD, "clock", shown)
    return Finding(BAD, "clock", f"{shown} cannot be: it is not set")


def look_at_proxies(urls: Sequence[str]) -> Iterator[Finding]:
    """Return through which proxies requests go, without the password that a proxy's URL may have.
    """
    proxies = urllib.request.getproxies()
    for scheme in sorted({urllib.parse.urlsplit(url).scheme for url in urls}):
        proxy = proxies.get(scheme) or proxies.get("all")
        if proxy:
            place = proxy.rpartition("@")[2].rpartition("//")[2].rstrip("/")
            yield Finding(GOOD, "proxy", f"the environment names {place} for {scheme}")


def judge(about: str, words: str, answer: probes.Answer, otherwise: str = BAD) -> Finding:
    """Return what an answer means: `words` if it went well, else the problem."""
    if answer.problem:
        return Finding(otherwise, about, answer.problem)
    return Finding(GOOD, about, f"{words} ({answer.s * 1000:.0f} ms)")


def judge_certificate(about: str, answer: probes.Answer) -> Finding:
    """Return what the end of a certificate means."""
    if answer.problem:
        return Finding(ODD, about, f"its certificate cannot be seen: {answer.problem}")
    end = datetime.datetime.fromtimestamp(answer.value, datetime.UTC)
    words = f"its certificate is valid until {end:%Y-%m-%d}"
    if answer.value < system_now().wall_us / 1e6 + CERTIFICATE_ODD_S:
        return Finding(ODD, about, words)
    return Finding(GOOD, about, words)


def conclude(ways: Sequence[probes.Mapped], *, has_turn: bool) -> Iterator[Finding]:
    """Return what connects to what: a line for each family of addresses, and one for all."""
    kinds_by_family = {
        family: {
            probes.kind_of(way) for way in ways if probes.family_of(way.local) == family}
        for family in FAMILIES
    }
    best = []
    for family, words in FAMILIES.items():
        found = [kind for kind in KINDS if kind in kinds_by_family[family]]
        best += found[:1]
        for kind in found[:1]:
            yield Finding(KINDS[kind].state, words, KINDS[kind].conclusion)
    if has_turn:
        yield WITH_TURN
    elif not best:
        yield WITHOUT_STUN
    elif set(best) == {probes.SILENT}:
        yield WITHOUT_WAY


def show(address: probes.Address | None) -> str:
    """Return an address for people."""
    if address is None:
        return "nothing"
    host, port = address
    if probes.family_of(host) == socket.AF_INET6:
        host = f"[{host}]"
    return f"{host}:{port}"
