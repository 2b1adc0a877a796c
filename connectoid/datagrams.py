"""Bounds on what aioice takes of the datagrams that come to a connection.

aioice learns an address from each STUN check of one who knows the password, and sends seven checks
of its own there, and again when another check comes from it. So a contact with addresses of others
could have datagrams sent to as many as they like. And aioice takes all datagrams that are no STUN,
whoever sends them: until a path is found it keeps them, and later one that is empty, or like SRTP,
ends the connection by an error that aiortc does not expect.

aioice has no setting for it. Another version may have other names: then nothing is bounded here.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from connectoid.limits import MAX_CANDIDATES

# For DTLS, which begins when a path is found: a few come before. Later each is taken at once.
MAX_QUEUED_DATAGRAMS = 256

# The first octet of what is for DTLS (RFC 7983, section 7). A data channel has nothing else.
DTLS = range(20, 64)

Address: TypeAlias = tuple[str, int]

NEEDED = (
    "request_received", "check_incoming", "data_received", "_find_pair", "_nominated", "_queue",
    "_remote_candidates")


class DatagramBound:
    """Look at what comes to one connection of aioice before it does."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._take_request = connection.request_received
        self._take_check = connection.check_incoming
        self._take_datagram = connection.data_received

    def request_received(self, message: Any, address: Address, protocol: Any) -> None:
        """Answer a check, unless it is of no use."""
        if self._is_of_use(address, protocol):
            self._take_request(message, address, protocol)

    def check_incoming(self, message: Any, address: Address, protocol: Any) -> None:
        """Act on a check: those that came early are as many as they like."""
        if self._is_of_use(address, protocol):
            self._take_check(message, address, protocol)

    def data_received(self, datagram: bytes, component: int) -> None:
        """Keep a datagram for DTLS, and no other. What is lost comes again."""
        is_for_dtls = bool(datagram) and datagram[0] in DTLS
        if is_for_dtls and self._connection._queue.qsize() < MAX_QUEUED_DATAGRAMS:
            self._take_datagram(datagram, component)

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


def bound_datagrams(connection: Any) -> None:
    """Have a connection of aioice learn few addresses, and keep few datagrams."""
    if all(hasattr(connection, name) for name in NEEDED):
        bound = DatagramBound(connection)
        connection.request_received = bound.request_received
        connection.check_incoming = bound.check_incoming
        connection.data_received = bound.data_received
