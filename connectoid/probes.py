"""Probes: what a network lets through. For `connectoid doctor`, not for connecting.

Each probe asks one server one thing, has a time to do so, and returns what came of it. What a
server answers is believed as far as it goes: one that lies about an address misleads the reader
of a report, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import ipaddress
import json
import secrets
import socket
import ssl
import struct
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from connectoid.clock import boot_time_s
from connectoid.datagrams import MAX_DATAGRAM_BYTES
from connectoid.encoding import encode_base64url
from connectoid.errors import ConnectoidError, UsageError
from connectoid.ice import PORTS
from connectoid.lookups import Lookups
from connectoid.networks import is_public
from connectoid.relay_client import RelayClient

# For one server to answer over UDP, with three retransmissions in it.
DATAGRAM_S = 4.0
RETRY_S = 0.5
# For the address of a name. The system would ask silent name servers for half a minute.
LOOK_UP_S = 10.0
# For a TURN server to give a relayed address: a connection, two requests and the retransmissions.
TURN_S = 10.0
# Of local addresses that are probed. A machine with containers has dozens.
MAX_LOCAL_ADDRESSES = 16
# Of the addresses of one server's name.
MAX_SERVER_ADDRESSES = 2

UNAUTHORIZED = 401
NO_ANSWER = "no answer"

Address = tuple[str, int]


class Answer(NamedTuple):
    """What came of a probe: `problem` is empty if it went well."""

    problem: str = ""
    # What it took.
    s: float = 0.0
    value: Any = None


class Mapped(NamedTuple):
    """How one socket of ours looked to the STUN servers that it asked, by server."""

    local: str
    seen: Mapping[Address, Address | None]


# ---------------------------------------------------------------------------------------
# Relays, by HTTP, TLS and UDP.
# ---------------------------------------------------------------------------------------


async def probe_document(client: RelayClient) -> Answer:
    """Return what a relay says of itself."""
    began_s = boot_time_s()
    try:
        document = await client.document()
    except ConnectoidError as error:
        return Answer(str(error))
    return Answer("", boot_time_s() - began_s, document)


async def probe_check(client: RelayClient, ext: str) -> Answer:
    """Check a mailbox that nobody has, as a client of this relay would: an API key is tried."""
    began_s = boot_time_s()
    try:
        await client.ask({"action": "check", "pub": random_box(), "ext": ext, "at": 0})
    except ConnectoidError as error:
        return Answer(str(error))
    return Answer("", boot_time_s() - began_s)


async def probe_udp_check(url: str) -> Answer:
    """Check a mailbox that nobody has, in one datagram."""
    token = secrets.token_hex(8)
    check = {"action": "check", "pub": random_box(), "at": 0, "id": token}
    try:
        servers = await look_up(urllib.parse.urlsplit(url).hostname or "", port_of(url))
    except OSError as error:
        return Answer(str(error))
    began_s = boot_time_s()
    async with datagrams(family_of(servers[0][0])) as asker:
        reply = await asker.ask(json.dumps(check).encode(), token.encode(), servers[0])
    if reply is None:
        return Answer(f"{NO_ANSWER} over UDP")
    return Answer("", boot_time_s() - began_s)


async def probe_certificate(url: str, ca_file: str | None = None) -> Answer:
    """Return until when the certificate of a relay is valid, as seconds since 1970."""
    parts = urllib.parse.urlsplit(url)
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    try:
        async with asyncio.timeout(TURN_S):
            _, writer = await asyncio.open_connection(
                parts.hostname, port_of(url), ssl=context)
    except (OSError, TimeoutError) as error:
        return Answer(str(error) or "timed out")
    certificate = writer.get_extra_info("peercert")
    # Nothing is on its way: not all servers answer the end of TLS, and none is waited for.
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Answer("", 0.0, ssl.cert_time_to_seconds(certificate["notAfter"]))


def random_box() -> str:
    """Return a mailbox that nobody has: of the right form, and a key by chance only."""
    return encode_base64url(b"\2" + secrets.token_bytes(48))


def port_of(url: str) -> int:
    """Return the port of a relay."""
    parts = urllib.parse.urlsplit(url)
    return parts.port or PORTS[parts.scheme]


# ---------------------------------------------------------------------------------------
# Datagrams: to several servers from one socket, as WebRTC does it.
# ---------------------------------------------------------------------------------------


class Asker(asyncio.DatagramProtocol):
    """Ask servers over UDP. A reply has in it the token of its request, which nobody can guess."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket."""
        self._transport = transport

    def datagram_received(self, octets: bytes, _address: Any) -> None:
        """Take a reply to a request, and nothing else."""
        if len(octets) > MAX_DATAGRAM_BYTES:
            return
        for token, future in self._waiting.items():
            if token in octets and not future.done():
                future.set_result(octets)

    def error_received(self, _error: Exception) -> None:
        """Wait on: what a router says of one datagram may not be so of the next."""

    async def ask(self, octets: bytes, token: bytes, server: Address) -> bytes | None:
        """Return the reply to a request that is sent again and again; None if there is none."""
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[token] = reply
        try:
            async with asyncio.timeout(DATAGRAM_S):
                while not reply.done():
                    self._transport.sendto(octets, server)
                    await asyncio.wait([reply], timeout=RETRY_S)
            return reply.result()
        except TimeoutError:
            return None
        finally:
            del self._waiting[token]


@contextlib.asynccontextmanager
async def datagrams(
    family: socket.AddressFamily, local: Address | None = None,
) -> AsyncIterator[Asker]:
    """Open a socket, at a local address or at what the system chooses; raise OSError."""
    loop = asyncio.get_running_loop()
    transport, asker = await loop.create_datagram_endpoint(
        Asker, local_addr=local, family=family)
    try:
        yield asker
    finally:
        transport.close()


async def look_up(host: str, port: int) -> list[Address]:
    """Return the addresses of a server; raise OSError."""
    looking_up = Lookups().look_up(
        None, host.strip("[]"), port, socket.AF_UNSPEC, socket.SOCK_DGRAM)
    try:
        found = await asyncio.wait_for(looking_up, LOOK_UP_S)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, "no name server answers") from None
    addresses = dict.fromkeys((str(info[4][0]), port) for info in found)
    return list(addresses)[:MAX_SERVER_ADDRESSES]


def family_of(address: str) -> socket.AddressFamily:
    """Return whether an address is one of IPv4 or of IPv6."""
    if ":" in address:
        return socket.AF_INET6
    return socket.AF_INET


# ---------------------------------------------------------------------------------------
# STUN (RFC 8489) and TURN (RFC 8656).
# ---------------------------------------------------------------------------------------


def aioice(name: str) -> Any:
    """Return a module of aioice, by which aiortc connects; raise UsageError."""
    try:
        return importlib.import_module(f"aioice.{name}")
    except ImportError:
        raise UsageError(
            "Connections need the package aiortc: pip install 'connectoid[webrtc]'") from None


def local_addresses() -> list[str]:
    """Return the addresses of this machine from which WebRTC would connect."""
    found: list[str] = aioice("ice").get_host_addresses(use_ipv4=True, use_ipv6=True)
    return found[:MAX_LOCAL_ADDRESSES]


def outside(servers: Sequence[Address], local: Sequence[str]) -> list[Address]:
    """Return the servers that are not on this machine or in its networks.

    To one that is, every NAT is invisible.
    """
    return [
        server for server in dict.fromkeys(servers)
        if is_public(ipaddress.ip_address(server[0].partition("%")[0])) and server[0] not in local
    ]


async def probe_stun(local: str, servers: Sequence[Address]) -> Mapped:
    """Ask STUN servers, from one socket, how it looks to them."""
    family = family_of(local)
    fitting = [server for server in servers if family_of(server[0]) == family]
    try:
        async with datagrams(family, (local, 0)) as asker:
            seen = await asyncio.gather(*(_binding(asker, server) for server in fitting))
    except OSError:
        # The interface has gone, or may not be used.
        seen = [None] * len(fitting)
    return Mapped(local, dict(zip(fitting, seen, strict=True)))


async def _binding(asker: Asker, server: Address) -> Address | None:
    """Return as what a server sees a socket."""
    stun = aioice("stun")
    request = stun.Message(
        message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST)
    reply = await asker.ask(bytes(request), request.transaction_id, server)
    if reply is None:
        return None
    try:
        attributes = stun.parse_message(reply).attributes
    except (ValueError, struct.error):
        return None
    mapped: Address | None = attributes.get("XOR-MAPPED-ADDRESS")
    return mapped


async def probe_turn(
    host: str, port: int, username: str | None, password: str | None, *, transport: str,
    tls: bool,
) -> Answer:
    """Ask a TURN server for a relayed address, and give it back. `value` is that address."""
    stun = aioice("stun")
    began_s = boot_time_s()
    try:
        (server, *_) = await look_up(host, port)
        async with asyncio.timeout(TURN_S):
            relayed, _ = await aioice("turn").create_turn_endpoint(
                asyncio.DatagramProtocol, server, username, password, ssl=tls, transport=transport)
    except TimeoutError:
        return Answer(NO_ANSWER)
    except stun.TransactionFailed as error:
        return Answer(_refusal_of(error.response.attributes))
    except (OSError, stun.TransactionError) as error:
        return Answer(str(error) or NO_ANSWER)
    address = relayed.get_extra_info("sockname")
    relayed.close()
    return Answer("", boot_time_s() - began_s, address)


def _refusal_of(attributes: Mapping[str, Any]) -> str:
    code, reason = attributes.get("ERROR-CODE", (0, ""))
    if code == UNAUTHORIZED:
        return "it refuses the name or the password"
    return f"it refuses ({code} {reason!a})"


# ---------------------------------------------------------------------------------------
# What it means. RFC 4787: a NAT maps a socket to one port for all (endpoint-independent), or
# to another port for each server (here "symmetric", as in RFC 3489 and everyday speech).
# ---------------------------------------------------------------------------------------

OPEN = "open"
ONE_PORT = "one port"
SYMMETRIC = "symmetric"
# One server alone cannot tell the two apart.
SOME_NAT = "some NAT"
SILENT = "silent"
# There was no server to ask by this kind of address.
UNASKED = "unasked"


def kind_of(mapped: Mapped) -> str:
    """Return what stands between a local address and the Internet."""
    if not mapped.seen:
        return UNASKED
    seen = [address for address in mapped.seen.values() if address is not None]
    if not seen:
        return SILENT
    if all(address[0] == mapped.local for address in seen):
        return OPEN
    if len(seen) == 1:
        return SOME_NAT
    if len(set(seen)) == 1:
        return ONE_PORT
    return SYMMETRIC
