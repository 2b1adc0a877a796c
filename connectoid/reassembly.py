"""Bounds on what one connection of aiortc gathers and opens for the other end.

aiortc keeps fragments until a message is whole, however many come, and looks at all of them for
each new one. It makes a data channel for whoever asks for one, again and again. So a contact could
hold up the loop with a few bytes a second, or eat the memory. A connection of ours has one data
channel, ordered and reliable, and `sctp_gate` lets one stream through.

aiortc has no setting for that, so its SCTP transport is given methods that look at what comes
before it does. Where another version of aiortc has other names, only whole messages are judged, by
the runner.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack
from typing import Any

CHANNEL_LABEL = "connectoid"

# Of one message. The 64 KiB that a message may have are 55 of aiortc's and browsers' 1,200 bytes;
# they shorten a few to fill a packet. Each is looked at again with every one that follows.
MAX_MESSAGE_FRAGMENTS = 128

# Of fragments that came before one that was lost on its way. The 1 MiB that aiortc says it takes
# are 874 of 1,200 bytes. What is more is not taken, as by any SCTP without room, and comes again.
MAX_EARLY_FRAGMENTS = 1_024

# Flags of a DATA chunk: RFC 9260, section 3.3.1.
UNORDERED = 0x04

# The protocol of those who open data channels, and their message for it: RFC 8832, section 5.1.
DCEP = 50
OPEN = 3
# What is before priority and reliability, and what is after them: an ordered and reliable channel
# with our label, and without a protocol of its own.
OPEN_BEGIN = pack("!BB", OPEN, 0)
OPEN_END = pack("!HH", len(CHANNEL_LABEL), 0) + CHANNEL_LABEL.encode()

NEEDED = (
    "_receive_data_chunk", "_data_channel_receive", "_inbound_streams", "_last_received_tsn",
    "_sack_misordered", "_sack_needed")


class AssociationBound:
    """Look at what comes over one SCTP association, until there is too much of it."""

    def __init__(
        self, transport: Any, refuse: Callable[[], object], *, may_open: bool,
    ) -> None:
        self._transport = transport
        self._refuse = refuse
        # Whether the other end is still to open the channel.
        self._may_open = may_open
        self._is_over = False
        self._take_fragment = transport._receive_data_chunk
        self._take_message = transport._data_channel_receive

    async def receive_data(self, chunk: Any) -> None:
        """Give a fragment to aiortc, have it come again, or refuse it and all that follow."""
        if self._is_over:
            return
        if chunk.flags & UNORDERED:
            self._end()
        elif self._has_no_room(chunk):
            # The other is told what is there, and sends the rest again.
            self._transport._sack_needed = True
        else:
            await self._take_fragment(chunk)
            if self._unfinished(chunk.stream_id) >= MAX_MESSAGE_FRAGMENTS:
                self._end()

    async def receive_message(self, stream_id: int, protocol: int, message: bytes) -> None:
        """Give a whole message to aiortc, unless it would open a channel that is not ours."""
        if protocol == DCEP and message[:1] == OPEN_BEGIN[:1]:
            if not self._may_open or not _opens_ours(message):
                self._end()
            self._may_open = False
        if not self._is_over:
            await self._take_message(stream_id, protocol, message)

    def _has_no_room(self, chunk: Any) -> bool:
        early = self._transport._sack_misordered
        if len(early) < MAX_EARLY_FRAGMENTS:
            return False
        # Room is made by the one that they wait for.
        return bool(chunk.tsn != (self._transport._last_received_tsn + 1) % 2**32)

    def _unfinished(self, stream_id: int) -> int:
        """Return how many fragments wait though none before them is missing."""
        stream = self._transport._inbound_streams.get(stream_id)
        if stream is None:
            return 0
        return len(stream.reassembly) - len(self._transport._sack_misordered)

    def _end(self) -> None:
        """Take no more, and say so once."""
        if not self._is_over:
            self._is_over = True
            self._refuse()


def bound_association(
    transport: Any, refuse: Callable[[], object], *, may_open: bool,
) -> None:
    """Have `refuse` called, once, when the other end goes too far.

    `may_open`: the other end opens the channel, not this one.
    """
    if all(hasattr(transport, name) for name in NEEDED):
        bound = AssociationBound(transport, refuse, may_open=may_open)
        transport._receive_data_chunk = bound.receive_data
        transport._data_channel_receive = bound.receive_message


def _opens_ours(message: bytes) -> bool:
    """Return whether a DCEP OPEN is of the channel that CHANNEL-1 wants."""
    return message.startswith(OPEN_BEGIN) and message[8:] == OPEN_END
