"""TURN: how much of what a server sends is read at once.

A message of 64 KiB may hold thousands of fingerprints, each over all before it: aioice computed
them for two seconds. So long messages are passed over.

Over TCP, aioice copies all that is left for each message that it takes. Of empty ones 65,536 fit
in the 256 KiB that a loop reads at once: they held it up for a quarter of a second, and the next
ones for as long. So messages are taken a few at a time, with turns for everybody else between. One
that aioice cannot read is passed over.

aioice makes such a connection on its own, and has no setting for it: its classes get other methods,
for all connections of this process. Another version may have other names: then nothing is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import struct
from struct import unpack_from
from typing import Any

# Messages of a server before others have their turn. One takes some 20 microseconds.
MAX_MESSAGES_AT_ONCE = 64

# Of one message: a datagram of the other end, and what a server puts around it.
MAX_MESSAGE_BYTES = 2_048

# Before a message: its kind and its length, without this header in ChannelData, and without the
# further 16 bytes in a STUN message. RFC 8656, section 12.4; RFC 8489, section 5.
LENGTH_BYTES = 4
STUN_HEADER_BYTES = 20
# The first octet of ChannelData: RFC 8656, section 12.
CHANNEL_DATA = range(64, 80)

NEEDED = ("data_received", "datagram_received")
STREAM = "_connectoid_stream"
READ = "_connectoid_read"


class TurnStream:
    """Take what one server sends, message by message."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._octets = bytearray()
        self._has_turn_coming = False

    def take(self, octets: bytes) -> None:
        """Take octets; while earlier ones wait for their turn, these do too."""
        self._octets += octets
        if not self._has_turn_coming:
            self._read()

    def _read(self) -> None:
        """Take a few messages now, and the others soon. Nothing more is read before."""
        self._has_turn_coming = self._take_messages()
        transport = self._protocol.transport
        if transport.is_closing():
            self._octets.clear()
        elif self._has_turn_coming:
            transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read)
        else:
            transport.resume_reading()

    def _take_messages(self) -> bool:
        """Return whether there may be more than were taken."""
        at = 0
        taken = 0
        address = self._protocol.transport.get_extra_info("peername")
        while taken < MAX_MESSAGES_AT_ONCE:
            end = at + self._length_at(at)
            if end > len(self._octets):
                break
            # aioice lets this out where an attribute is cut off.
            with contextlib.suppress(struct.error):
                self._protocol.datagram_received(bytes(self._octets[at:end]), address)
            taken += 1
            at = end
        del self._octets[:at]
        return taken == MAX_MESSAGES_AT_ONCE

    def _length_at(self, at: int) -> int:
        """Return the bytes of the message that begins there, or of its header."""
        if len(self._octets) < at + LENGTH_BYTES:
            return LENGTH_BYTES
        (length,) = unpack_from("!H", self._octets, at + 2)
        header = STUN_HEADER_BYTES
        if self._octets[at] in CHANNEL_DATA:
            header = LENGTH_BYTES
        # All are padded to four bytes on TCP.
        return int(header + length + -length % 4)


def bound_turn_streams() -> None:
    """Have aioice read so from all servers. Idempotent."""
    turn = importlib.import_module("aioice.turn")
    messages: Any = getattr(turn, "TurnClientMixin", None)
    if hasattr(messages, "datagram_received") and not hasattr(messages, READ):
        setattr(messages, READ, messages.datagram_received)
        messages.datagram_received = _datagram_received
    protocol: Any = getattr(turn, "TurnClientTcpProtocol", None)
    if all(hasattr(protocol, name) for name in NEEDED):
        protocol.data_received = _data_received


def _datagram_received(protocol: Any, octets: bytes, address: tuple[str, int]) -> None:
    if len(octets) <= MAX_MESSAGE_BYTES:
        getattr(protocol, READ)(octets, address)


def _data_received(protocol: Any, octets: bytes) -> None:
    stream = getattr(protocol, STREAM, None)
    if stream is None:
        stream = TurnStream(protocol)
        setattr(protocol, STREAM, stream)
    stream.take(octets)
