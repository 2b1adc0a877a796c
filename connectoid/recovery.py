"""SCTP where packets are lost: an association begins, and goes on, sooner than aiortc's own.

aiortc halves what is under way for a lost packet, though it is no sign of a full line while packets
take no longer than they have to. It repeats a packet again and again, before the answer to the
first repetition can be there. It waits 3 s before it asks to begin a second time, and does that in
a way that the other end has to ignore.

aiortc has no setting for it. Where another version of it has other names, it does as it does.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

NEEDED = (
    "_association_state", "_cwnd", "_fast_recovery_exit", "_flight_size", "_receive_chunk",
    "_receive_sack_chunk", "_rto", "_send_chunk", "_sent_queue", "_transmit")

# RFC 9260, section 16. aiortc still has the 3 s of RFC 4960.
RTO_INITIAL_S = 1.0
# Of what was under way, after a loss: as in H-TCP. A line that is full has a queue, in which
# packets wait as long as they are on their way, or longer: it keeps a half, as with aiortc.
MOST_KEPT = 0.8
# Of a round trip, in the mean: RFC 6298, section 2.
SMOOTHING = 1 / 8


class Recovery:
    """One association of aiortc."""

    def __init__(self, transport: Any) -> None:
        self._sctp = importlib.import_module("aiortc.rtcsctptransport")
        self._transport = transport
        self._send_chunk = transport._send_chunk
        self._take_chunk = transport._receive_chunk
        self._take_sack = transport._receive_sack_chunk
        self._transmit = transport._transmit
        # The shortest round trip, and the mean one; None before there was one.
        self._shortest_s: float | None = None
        self._mean_s = 0.0
        # As they were when something was last transmitted.
        self._window = transport._cwnd
        self._is_recovering = False

    async def send_chunk(self, chunk: Any) -> None:
        """Send a chunk. An INIT has no tag (RFC 9260, section 8.5.1), a repeated one neither.

        aiortc gives it the tag of an INIT that has come meanwhile. Where both ends lose an answer,
        neither begins any more.
        """
        transport = self._transport
        if not isinstance(chunk, self._sctp.InitChunk):
            await self._send_chunk(chunk)
            return
        packet = self._sctp.serialize_packet(
            transport._local_port, transport._remote_port, 0, chunk)
        await transport.transport._send_data(packet)

    async def receive_chunk(self, chunk: Any) -> None:
        """Take a chunk, but no INIT that comes late: aiortc would forget what it has of the data.

        Where this end has begun, the other has what it needs to begin.
        """
        is_established = self._transport._association_state.name == "ESTABLISHED"
        if not (is_established and isinstance(chunk, self._sctp.InitChunk)):
            await self._take_chunk(chunk)

    async def receive_sack(self, chunk: Any) -> None:
        """Take a SACK, and the time of the round trip that it ends."""
        if self._ends_round_trip(chunk.cumulative_tsn):
            self._note_round_trip(time.time() - self._transport._sent_queue[0]._sent_time)
        await self._take_sack(chunk)

    async def transmit(self) -> None:
        """Send what may be sent, with a window that fits the line."""
        transport = self._transport
        is_recovering = transport._fast_recovery_exit is not None
        if is_recovering and not self._is_recovering:
            kept = max(transport._cwnd, int(self._window * self._part_kept()))
            transport._cwnd = transport._ssthresh = kept
        self._is_recovering = is_recovering

        lost = []
        if is_recovering:
            lost = [chunk for chunk in transport._sent_queue if chunk._retransmit]
        await self._transmit()
        # SACKs for what is under way now say nothing about what was just repeated.
        under_way = transport._flight_size // self._sctp.USERDATA_MAX_LENGTH
        for chunk in lost:
            if not chunk._retransmit:
                chunk._misses = -under_way
        self._window = transport._cwnd

    def _ends_round_trip(self, tsn: int) -> bool:
        """Return whether a SACK says how long a packet took.

        What was repeated, or confirmed before, took another time.
        """
        sent = self._transport._sent_queue
        if not sent or sent[0]._sent_count > 1 or sent[0]._acked:
            return False
        return bool(self._sctp.uint32_gte(tsn, sent[0].tsn))

    def _note_round_trip(self, took_s: float) -> None:
        if self._shortest_s is None:
            self._shortest_s = self._mean_s = took_s
        self._shortest_s = min(self._shortest_s, took_s)
        self._mean_s += SMOOTHING * (took_s - self._mean_s)

    def _part_kept(self) -> float:
        """Return the part of the window that is kept: less, the longer packets wait in a queue."""
        if self._shortest_s is None or self._mean_s <= 0:
            return 0.0
        return min(MOST_KEPT, self._shortest_s / self._mean_s)


def recover_soon(transport: Any) -> None:
    """Have an SCTP transport of aiortc do so, before it starts."""
    if all(hasattr(transport, name) for name in NEEDED):
        recovery = Recovery(transport)
        transport._rto = RTO_INITIAL_S
        transport._send_chunk = recovery.send_chunk
        transport._receive_chunk = recovery.receive_chunk
        transport._receive_sack_chunk = recovery.receive_sack
        transport._transmit = recovery.transmit
