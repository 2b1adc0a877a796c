"""Bounds on what aioice takes of the datagrams that come to a connection.

aioice learns an address from each STUN check of one who knows the password, and sends seven checks
of its own there, and again when another check comes from it. So a contact with addresses of others
could have datagrams sent to as many as they like.

And it takes all datagrams that are no STUN, whoever sends them. One that is empty, or like SRTP,
ends the connection by an error that aiortc does not expect. One alert without encryption, sent
before a path is found, kept it from opening. So what is for DTLS counts once a path is found, and
from an address of the other.

aiortc reads one record of DTLS for each datagram. The others that it brings would stay in OpenSSL,
and be more and more. So each record is given to it like a datagram of its own.

What comes while others have their turn waits in the kernel, which has little room for it: each
burst of a large file lost packets. So the kernel is asked for more.

And it asks anew at once whenever the other end says that both have the same role (error 487 of
RFC 8445). Who says so each time was asked 350 times a second, for each candidate.

aioice has no setting for it. Another version may have other names: then nothing is bounded here.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from struct import unpack_from
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from connectoid.limits import MAX_CANDIDATES

# Records of DTLS for aiortc. It takes each at once, as long as there is a connection.
MAX_QUEUED_RECORDS = 256

# Of a datagram: those of Ethernet. Nobody sends larger ones, which IP would have to cut up. aiortc
# reads as many of a record, and sends as many at once. A STUN message of 64 KiB, with a checksum
# after each checksum, took aioice 0.1 s to refuse.
MAX_DATAGRAM_BYTES = 1_500

# Of datagrams that wait in the kernel for a socket: what another Connectoid has under way at most.
# Linux has 208 KiB, with its own 1.1 KB for each packet: 92 of them. Windows has 64 KiB.
RECEIVE_BUFFER_BYTES = 1024 * 1024

# Of a pair of candidates. One settles who has which role (RFC 8445, section 7.2.5.1), and checks of
# both sides may cross.
MAX_ROLE_CONFLICTS = 2

# The first octet of what is for DTLS (RFC 7983, section 7). A data channel has nothing else.
DTLS = range(20, 64)
# That of a STUN message is below.
STUN = range(4)

# The first octet of a record whose header has 13 bytes, the length of the rest last: RFC 6347,
# section 4.1. Those of DTLS 1.3 may have no length.
RECORD = range(20, 32)
RECORD_HEADER_BYTES = 13

Address: TypeAlias = tuple[str, int]

NEEDED = (
    "request_received", "check_incoming", "check_start", "check_state", "check_complete",
    "data_received", "get_component_candidates", "_find_pair", "_nominated",
    "_protocols", "_queue", "_remote_candidates")


class DatagramBound:
    """Look at what comes to one connection of aioice before it does."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._take_request = connection.request_received
        self._take_check = connection.check_incoming
        self._start_check = connection.check_start
        # Checks of a pair that were begun: the first, and one more for each conflict of roles.
        self._starts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._take_record = connection.data_received
        self._gather = connection.get_component_candidates

    def request_received(self, message: Any, address: Address, protocol: Any) -> None:
        """Answer a check, unless it is of no use."""
        if self._is_of_use(address, protocol):
            self._take_request(message, address, protocol)

    def check_incoming(self, message: Any, address: Address, protocol: Any) -> None:
        """Act on a check: those that came early are as many as they like."""
        if self._is_of_use(address, protocol):
            self._take_check(message, address, protocol)

    async def check_start(self, pair: Any) -> None:
        """Ask whether a pair of candidates works, unless the other only ever has it asked anew."""
        starts = self._starts.get(pair, 0) + 1
        self._starts[pair] = starts
        if starts <= 1 + MAX_ROLE_CONFLICTS:
            await self._start_check(pair)
        else:
            self._connection.check_state(pair, type(pair).State.FAILED)
            self._connection.check_complete(pair)

    async def get_component_candidates(self, *args: Any, **kwargs: Any) -> Any:
        """Gather, and listen to all sockets that were opened for it. No path is found before."""
        candidates = await self._gather(*args, **kwargs)
        for protocol in self._connection._protocols:
            _enlarge_buffer(protocol.transport)
            protocol.datagram_received = functools.partial(
                self.datagram_received, protocol.datagram_received)
        return candidates

    def datagram_received(
        self, take: Callable[[bytes, Address], None], datagram: bytes, address: tuple[Any, ...],
    ) -> None:
        """Give STUN to aioice, which looks for a password in it, and all else of the other."""
        # That of IPv6 has two more members.
        source = (address[0], address[1])
        if not 0 < len(datagram) <= MAX_DATAGRAM_BYTES:
            return
        if datagram[0] in STUN or self._is_of_other(source):
            take(datagram, source)

    def data_received(self, datagram: bytes, component: int) -> None:
        """Keep the records for DTLS of a datagram, and nothing else. What is lost comes again."""
        if not self._connection._nominated or len(datagram) > MAX_DATAGRAM_BYTES:
            return
        for record in records_of(datagram):
            has_room = self._connection._queue.qsize() < MAX_QUEUED_RECORDS
            if record[0] in DTLS and has_room:
                self._take_record(record, component)

    def _is_of_other(self, source: Address) -> bool:
        """Return whether the other end has told an address, or made a check from there."""
        return any(
            (candidate._network_host, candidate.port) == source
            for candidate in self._connection._remote_candidates)

    def _is_of_use(self, address: Address, protocol: Any) -> bool:
        """Return whether a check may begin another one.

        Candidates are as many as an SDP may have, those of the SDP among them. Once a path is
        found, no address is learned, and none is tried again that did not answer.
        """
        known = self._connection._remote_candidates
        is_connected = bool(self._connection._nominated)
        for candidate in known:
            if (candidate._network_host, candidate.port) == address:
                pair = self._connection._find_pair(protocol, candidate)
                has_failed = pair is not None and pair.state.name == "FAILED"
                return not (is_connected and has_failed)
        return not is_connected and len(known) < MAX_CANDIDATES


def records_of(datagram: bytes) -> Iterator[bytes]:
    """Yield the records of DTLS in a datagram; the last may be cut off, which OpenSSL drops."""
    if datagram and datagram[0] not in RECORD:
        yield datagram
        return
    at = 0
    while at + RECORD_HEADER_BYTES <= len(datagram):
        (length,) = unpack_from("!H", datagram, at + RECORD_HEADER_BYTES - 2)
        end = at + RECORD_HEADER_BYTES + length
        yield datagram[at:end]
        at = end


def _enlarge_buffer(transport: Any) -> None:
    """Ask for more room in the kernel. It gives less where its limit is lower, or an error."""
    own = transport.get_extra_info("socket")
    if own is None:
        return
    if own.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < RECEIVE_BUFFER_BYTES:
        with contextlib.suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)


def bound_datagrams(connection: Any) -> None:
    """Have a connection of aioice learn few addresses, and keep few datagrams.

    Whoever replaces its way of gathering does so before.
    """
    if all(hasattr(connection, name) for name in NEEDED):
        bound = DatagramBound(connection)
        connection.request_received = bound.request_received
        connection.check_incoming = bound.check_incoming
        connection.check_start = bound.check_start
        connection.data_received = bound.data_received
        connection.get_component_candidates = bound.get_component_candidates
