"""SCTP where packets are lost: an association begins, and goes on, sooner than aiortc's own.

aiortc halves what is under way for a lost packet, though it is no sign of a full line while packets
take no longer than they have to. It repeats a packet again and again, before the answer to the
first repetition can be there. Once its timer has expired it repeats what the other end has, too,
and takes what it hears of the same loss for another one: then little is under way for long. It
sends more than the other end keeps while a packet is missing. It waits 3 s before it asks to begin
a second time, and does that in a way that the other end has to ignore.

aiortc has no setting for it. Where another version of it has other names, it does as it does.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from connectoid.reassembly import MAX_EARLY_FRAGMENTS

NEEDED = (
    "_association_state", "_cwnd", "_fast_recovery_exit", "_fast_recovery_transmit",
    "_flight_size", "_last_sacked_tsn", "_outbound_queue", "_receive_chunk", "_receive_sack_chunk",
    "_rto", "_send_chunk", "_sent_queue", "_t3_expired", "_transmit")

# RFC 9260, section 16. aiortc still has the 3 s of RFC 4960.
RTO_INITIAL_S = 1.0
# Of what was under way, after a loss: as in H-TCP. A line that is full has a queue, in which
# packets wait as long as they are on their way, or longer: it keeps a half, as with aiortc.
MOST_KEPT = 0.8
# Of a round trip, in the mean: RFC 6298, section 2.
SMOOTHING = 1 / 8
# Chunks from the first that is not confirmed to the last that was sent. If that first one is lost,
# the other end keeps so many, and those that it has not kept would be lost as well. A contact that
# never confirms the first one, and all others, would have us keep more and more.
MAX_SPAN = MAX_EARLY_FRAGMENTS


class Recovery:
    """One association of aiortc."""

    def __init__(self, transport: Any) -> None:
        self._sctp = importlib.import_module("aiortc.rtcsctptransport")
        self._transport = transport
        self._send_chunk = transport._send_chunk
        self._take_chunk = transport._receive_chunk
        self._take_sack = transport._receive_sack_chunk
        self._transmit = transport._transmit
        self._expire = transport._t3_expired
        # The shortest round trip, and the mean one; None before there was one.
        self._shortest_s: float | None = None
        self._mean_s = 0.0
        # As they were when something was last transmitted. Before an association there is no
        # threshold.
        self._window = transport._cwnd
        self._threshold = 0
        self._is_recovering = False
        # When the timer last expired: the last chunk that was sent, None once all of it is
        # confirmed, and how many were under way.
        self._expired_tsn: int | None = None
        self._expired_under_way = 0

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

    def expire(self) -> None:
        """Have all repeated that the other end has not confirmed."""
        transport = self._transport
        if transport._sent_queue:
            self._expired_tsn = transport._sent_queue[-1].tsn
        self._expired_under_way = self._under_way()
        self._expire()
        self._is_recovering = False
        self._note_window()

    async def transmit(self) -> None:
        """Send what may be sent, with a window that fits the line."""
        transport = self._transport
        has_expired = self._has_expired()
        if transport._fast_recovery_exit is not None and not self._is_recovering:
            self._begin_recovery(has_expired=has_expired)
        self._is_recovering = transport._fast_recovery_exit is not None

        lost = []
        if self._is_recovering or has_expired:
            lost = self._lost()
        await self._transmit_in_span()
        # SACKs for what is under way now say nothing about what was just repeated.
        under_way = self._under_way()
        if has_expired:
            under_way += self._expired_under_way
        for chunk in lost:
            if not chunk._retransmit:
                chunk._misses = -under_way
        self._note_window()

    def _lost(self) -> list[Any]:
        """Return what is to be repeated. What the other end has is not, though aiortc says so."""
        marked = [chunk for chunk in self._transport._sent_queue if chunk._retransmit]
        for chunk in marked:
            chunk._retransmit = not chunk._acked
        return [chunk for chunk in marked if chunk._retransmit]

    def _has_expired(self) -> bool:
        """Return whether something is not confirmed that was sent before the timer expired."""
        last = self._transport._last_sacked_tsn
        if self._expired_tsn is not None and self._sctp.uint32_gte(last, self._expired_tsn):
            self._expired_tsn = None
        return self._expired_tsn is not None

    def _begin_recovery(self, *, has_expired: bool) -> None:
        """Make the window smaller for a loss.

        The timer has done so already for what was sent before it expired: RFC 6582, section 4.
        """
        transport = self._transport
        if has_expired:
            transport._fast_recovery_exit = None
            transport._fast_recovery_transmit = False
            transport._cwnd, transport._ssthresh = self._window, self._threshold
            return
        kept = max(transport._cwnd, int(self._window * self._part_kept()))
        transport._cwnd = transport._ssthresh = kept

    async def _transmit_in_span(self) -> None:
        """Send what may be sent, of new chunks no more than the other end keeps."""
        waiting = self._transport._outbound_queue
        room = max(0, MAX_SPAN - len(self._transport._sent_queue))
        held = [waiting.pop() for _ in range(len(waiting) - room)]
        await self._transmit()
        waiting.extend(reversed(held))

    def _under_way(self) -> int:
        return int(self._transport._flight_size // self._sctp.USERDATA_MAX_LENGTH)

    def _note_window(self) -> None:
        self._window, self._threshold = self._transport._cwnd, self._transport._ssthresh

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
        transport._t3_expired = recovery.expire
        transport._transmit = recovery.transmit
