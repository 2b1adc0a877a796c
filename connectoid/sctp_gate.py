"""SCTP: which packets of a contact aiortc may see.

aiortc trusts the lengths and numbers in a packet: a parameter that says it has no bytes is read for
ever, and a range that was never sent is counted through. So each packet is looked at first, as an
SDP is by `check_sdp`. What breaks RFC 9260, or is of no use to one reliable channel, ends the
connection. What aiortc fails at does the same.

And aiortc goes on where an association is over for us: while it says goodbye, and while a channel
is closed by both ends in turn. The other would decide how long that takes, and the channel would
count as open. So it ends at once.

Where another version of aiortc has other names, it sees everything.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from connectoid.shown import shown

NEEDED = (
    "State", "_association_state", "_cwnd", "_data_channel_closed", "_data_channel_inbound_reset",
    "_data_channels", "_flight_size_increase", "_handle_data", "_local_tsn", "_set_state")
# Sent and not yet acknowledged. aiortc knows no ceiling, and each SACK walks over all of it. A
# contact that confirms everything for a while, and then nothing, would decide how much
# is kept. It is as much as our own queue holds, and enough for 13 Mbit/s at a round trip of 600 ms.
MAX_UNCONFIRMED_BYTES = 1024 * 1024
# A smaller chunk counts as so many of them: each SACK, and each message of our own, walks over
# chunks, not bytes. So there are 4,096 at most, over which a SACK walks in 2 ms.
LEAST_COUNTED_BYTES = 256

# -- Chunks: RFC 9260, section 3.2 ---------------------------------------------------------

DATA = 0
INIT = 1
INIT_ACK = 2
SACK = 3
HEARTBEAT = 4
HEARTBEAT_ACK = 5
ABORT = 6
SHUTDOWN = 7
ERROR = 9
# RFC 6525, section 3.1.
RECONFIG = 130
# RFC 3758, section 3.2. Only what is sent without being repeated needs it, and nothing here is.
FORWARD_TSN = 192

# Bytes before the first chunk, and before the body of a chunk or the value of a parameter.
PACKET_HEADER_BYTES = 12
HEADER_BYTES = 4

# Bytes of a body or a value: what stands at its beginning. aiortc reads it without looking.
LEAST_BODY_BYTES: Mapping[int, int] = {DATA: 13, INIT: 16, INIT_ACK: 16, SACK: 12, SHUTDOWN: 4}
# Of requests to end streams, of answers to them, and of requests for more streams.
LEAST_RECONFIG_BYTES: Mapping[int, int] = {13: 12, 16: 8, 17: 8}

# Chunks in a packet that carry no data. aiortc answers many of them with a packet each. Browsers
# put two or three beside each other.
MAX_CONTROL_CHUNKS = 8

# Parameters in a chunk. Firefox sends about ten when it begins.
MAX_PARAMETERS = 32
# RFC 6525, section 3.1. aiortc answers each with a packet.
MAX_RECONFIG_PARAMETERS = 2

# Where parameters begin in the bodies that have some.
PARAMETERS_AT: Mapping[int, int] = {
    INIT: 16, INIT_ACK: 16, HEARTBEAT: 0, HEARTBEAT_ACK: 0, ABORT: 0, ERROR: 0, RECONFIG: 0}

TSNS = 2**32

log = logging.getLogger("connectoid")


class BadPacketError(ValueError):
    """A packet that aiortc must not see."""


class Item(NamedTuple):
    """A chunk or a parameter; `kind` is its type, without the flags of a chunk."""

    kind: int
    value: bytes


def read_chunks(packet: bytes) -> list[Item]:
    """Return the chunks of a packet; raise BadPacketError."""
    chunks = [Item(kind >> 8, value) for kind, value in _split(packet, PACKET_HEADER_BYTES)]
    if not chunks:
        raise BadPacketError("no chunk")
    if sum(chunk.kind != DATA for chunk in chunks) > MAX_CONTROL_CHUNKS:
        raise BadPacketError("too many chunks")
    # The last one says all that others would, and each costs as much.
    if sum(chunk.kind == SACK for chunk in chunks) > 1:
        raise BadPacketError("several SACKs")
    # aiortc fails otherwise; RFC 9260, section 6.10, forbids it too.
    if len(chunks) > 1 and any(chunk.kind == INIT for chunk in chunks):
        raise BadPacketError("something beside INIT")
    return chunks


def check_chunk(kind: int, body: bytes) -> None:
    """Raise BadPacketError for a chunk that is wrong in itself."""
    if kind == FORWARD_TSN:
        raise BadPacketError("FORWARD TSN on a reliable channel")
    if len(body) < LEAST_BODY_BYTES.get(kind, 0):
        raise BadPacketError("a chunk that is too short")
    if kind in PARAMETERS_AT:
        _check_parameters(kind, body)


def check_sack(body: bytes, last_tsn: int) -> None:
    """Raise BadPacketError for a SACK of more than was sent.

    Gap blocks are offsets from the number up to which all has come: RFC 9260, section 3.3.4. They
    are disjoint, so together they hold no more than was sent. Their order is left alone: where
    numbers go round, aiortc itself sends them in another one.
    """
    tsn, _, gaps, duplicates = struct.unpack_from("!LLHH", body)
    if LEAST_BODY_BYTES[SACK] + HEADER_BYTES * (gaps + duplicates) > len(body):
        raise BadPacketError("a SACK that is too short")
    outstanding = (last_tsn - tsn) % TSNS
    # Numbers go round: what is half of them away is ahead.
    if outstanding >= TSNS // 2:
        raise BadPacketError("a SACK of what was not sent")
    held = 0
    for gap in range(gaps):
        at = LEAST_BODY_BYTES[SACK] + HEADER_BYTES * gap
        start, end = struct.unpack_from("!HH", body, at)
        held += end - start + 1
        if not 0 < start <= end <= outstanding or held > outstanding:
            raise BadPacketError("a SACK with a wrong gap block")


def _check_parameters(kind: int, body: bytes) -> None:
    """Raise BadPacketError for parameters that are wrong in themselves, or too many."""
    most = MAX_PARAMETERS
    if kind == RECONFIG:
        most = MAX_RECONFIG_PARAMETERS
    for count, parameter in enumerate(_split(body, PARAMETERS_AT[kind]), 1):
        if count > most:
            raise BadPacketError("too many parameters")
        if kind == RECONFIG:
            _check_reconfig(parameter)


def _check_reconfig(parameter: Item) -> None:
    """Raise BadPacketError for a parameter of RE-CONFIG without its form."""
    length = len(parameter.value)
    # A list of streams has two bytes for each.
    if length < LEAST_RECONFIG_BYTES.get(parameter.kind, 0) or length % 2:
        raise BadPacketError("a wrong RE-CONFIG")


def _split(octets: bytes, at: int) -> Iterator[Item]:
    """Yield what has a type, a length, a value and padding to four bytes, up to the end.

    Chunks and parameters are alike in this. The type has two bytes: those of a chunk are type and
    flags.
    """
    while at + HEADER_BYTES <= len(octets):
        kind, length = struct.unpack_from("!HH", octets, at)
        if length < HEADER_BYTES or at + length > len(octets):
            raise BadPacketError("a wrong length")
        yield Item(kind, octets[at + HEADER_BYTES:at + length])
        at += length + -length % 4


# -- One connection ------------------------------------------------------------------------


class SctpGate:
    """Look at each packet of one connection, until there is one that is refused."""

    def __init__(self, transport: Any, refuse: Callable[[], object]) -> None:
        self._transport = transport
        self._refuse = refuse
        self._handle = transport._handle_data
        self._count = transport._flight_size_increase
        # That of the one data channel, once something has come on it.
        self._stream_id: int | None = None
        self._is_over = False

    async def handle(self, packet: bytes) -> None:
        """Give a packet to aiortc, or refuse it and all that follow."""
        if self._is_over:
            return
        try:
            kinds = self._check(packet)
            # A late one would have aiortc begin anew: RFC 9260, section 5.2.2.
            if INIT in kinds and self._is_established:
                return
            await self._handle(packet)
        except ConnectionError:
            # DTLS has ended, and says so itself.
            raise
        except Exception as error:
            log.info("WebRTC: %s", shown(repr(error)))
            self._is_over = True
            self._refuse()
        else:
            self._transport._cwnd = min(self._transport._cwnd, MAX_UNCONFIRMED_BYTES)
            self._end_what_ends(kinds)

    def count(self, chunk: Any) -> None:
        """Count a chunk that is sent among those that are not confirmed."""
        chunk._book_size = max(chunk._book_size, LEAST_COUNTED_BYTES)
        self._count(chunk)

    @property
    def _is_established(self) -> bool:
        return self._transport._association_state is self._transport.State.ESTABLISHED

    def _end_what_ends(self, kinds: set[int]) -> None:
        """Close the channel that the other end closes, and the association that it leaves."""
        transport = self._transport
        for stream_id in transport._data_channel_inbound_reset & set(transport._data_channels):
            transport._data_channel_closed(stream_id)
        if SHUTDOWN in kinds:
            transport._set_state(transport.State.CLOSED)

    def _check(self, packet: bytes) -> set[int]:
        """Return the types of the chunks of a packet; raise BadPacketError."""
        chunks = read_chunks(packet)
        for kind, body in chunks:
            check_chunk(kind, body)
            if kind == SACK:
                check_sack(body, (self._transport._local_tsn - 1) % TSNS)
            elif kind == DATA:
                self._check_stream(body)
        return {chunk.kind for chunk in chunks}

    def _check_stream(self, body: bytes) -> None:
        """Raise BadPacketError for a second stream: aiortc keeps something for each of 65,536."""
        (stream_id,) = struct.unpack_from("!H", body, 4)
        if self._stream_id is None:
            self._stream_id = stream_id
        elif self._stream_id != stream_id:
            raise BadPacketError("another stream")


def guard_sctp(transport: Any, refuse: Callable[[], object]) -> None:
    """Have `refuse` called, once, when a packet comes that aiortc must not see."""
    if all(hasattr(transport, name) for name in NEEDED):
        gate = SctpGate(transport, refuse)
        transport._handle_data = gate.handle
        transport._flight_size_increase = gate.count
