"""How an SCTP association of aiortc goes on after lost packets: with aiortc, and no network."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from connectoid.recovery import MAX_SPAN, MOST_KEPT, NEEDED, recover_soon

sctp = pytest.importorskip("aiortc.rtcsctptransport")
channels = pytest.importorskip("aiortc.rtcdatachannel")

PATIENCE_S = 60.0
# Of chunks: RFC 9260, section 3.2.
DATA = 0
INIT = 1
INIT_ACK = 2
CHUNK_BYTES = sctp.USERDATA_MAX_LENGTH
# Packets.
WINDOW = 20


class End:
    """What one association sends by; the other end has another one."""

    def __init__(self, role: str) -> None:
        self.state = "connected"
        self._role = role
        self.sctp = sctp.RTCSctpTransport(self)
        recover_soon(self.sctp)
        self.sent: list[bytes] = []
        # Of the first chunk in packets that are lost, once each.
        self.lost: list[int] = []
        self.other: End | None = None

    def _register_data_receiver(self, receiver: Any) -> None:
        assert receiver is self.sctp

    async def _send_data(self, packet: bytes) -> None:
        self.sent.append(packet)
        kind = packet[12]
        if kind in self.lost:
            self.lost.remove(kind)
        elif self.other is not None:
            asyncio.get_running_loop().call_soon(self.other.take, packet)

    def take(self, packet: bytes) -> None:
        """Have a packet come."""
        self._taking = asyncio.ensure_future(self.sctp._handle_data(packet))

    async def start(self) -> None:
        """Begin."""
        await self.sctp.start(sctp.RTCSctpTransport.getCapabilities(), 5000)

    def open(self) -> Any:
        """Return a channel."""
        parameters = channels.RTCDataChannelParameters(label="connectoid")
        return channels.RTCDataChannel(self.sctp, parameters)


def two_ends() -> tuple[End, End]:
    """Return two ends that have not begun."""
    ends = End("client"), End("server")
    for end, other in (ends, ends[::-1]):
        end.other = other
    return ends


def run(play: Callable[[], Awaitable[None]]) -> None:
    """Play, for as long as a busy machine may take."""

    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await play()

    asyncio.run(main())


@pytest.mark.slow
def test_ends_that_both_lose_an_answer_begin_all_the_same() -> None:
    """Each asks again, and the other knows it for a question."""

    async def play() -> None:
        ends = two_ends()
        opened = asyncio.Event()
        for end in ends:
            end.lost.append(INIT_ACK)
        ends[0].open().on("open", opened.set)
        for end in ends:
            await end.start()
        await opened.wait()
        inits = [packet for end in ends for packet in end.sent if packet[12] == INIT]
        assert len(inits) > len(ends)
        assert {packet[4:8] for packet in inits} == {bytes(4)}

    run(play)


def test_question_that_comes_late_changes_nothing() -> None:
    async def play() -> None:
        one, other = two_ends()
        came: asyncio.Queue[str] = asyncio.Queue()
        other.sctp.on("datachannel", lambda channel: channel.on("message", came.put_nowait))
        channel = one.open()
        opened = asyncio.Event()
        channel.on("open", opened.set)
        for end in (one, other):
            await end.start()
        await opened.wait()
        channel.send("before")
        assert await came.get() == "before"
        other.take(next(packet for packet in one.sent if packet[12] == INIT))
        channel.send("after")
        assert await came.get() == "after"
        # It is confirmed too.
        while one.sctp._sent_queue:
            await asyncio.sleep(0.01)

    run(play)


class Sender:
    """An association with a full window under way, and another end that is played."""

    def __init__(self) -> None:
        self.end = End("client")
        self.sctp = self.end.sctp
        self.sctp._remote_port = 5000
        self.sctp._association_state = self.sctp.State.ESTABLISHED
        self.sctp._cwnd = self.sctp._ssthresh = WINDOW * CHUNK_BYTES
        self._first_tsn = self.sctp._local_tsn

    async def send(self, count: int = 4 * WINDOW) -> None:
        """Have more sent than there is room for."""
        await self.sctp._send(0, 53, bytes(count * CHUNK_BYTES))
        # aiortc sends a few at a time.
        while self.sctp._flight_size < self.sctp._cwnd:
            await self.sctp._transmit()

    async def confirm(self, count: int, *gaps: tuple[int, int]) -> None:
        """Have a SACK come: for so many, and for some that come after one that is missing."""
        chunk = sctp.SackChunk()
        chunk.cumulative_tsn = (self._first_tsn + count - 1) % 2**32
        chunk.gaps = list(gaps)
        await self.sctp._receive_chunk(chunk)

    async def lose_one(self) -> None:
        """Lose the third packet, and have the three confirmed that come after it."""
        for last in (2, 3, 4):
            await self.confirm(2, (2, last))

    def expire(self) -> None:
        """Have the timer expire."""
        self.sctp._t3_cancel()
        self.sctp._t3_expired()

    def all_repeated(self) -> set[int]:
        """Return which packets were sent again; the first is 1."""
        times = collections.Counter(
            int.from_bytes(packet[16:20]) for packet in self.end.sent if packet[12] == DATA)
        return {(tsn - self._first_tsn) % 2**32 + 1 for tsn, sent in times.items() if sent > 1}

    def repeated(self) -> int:
        """Return how often the third packet was sent again."""
        (chunk,) = (
            chunk for chunk in self.sctp._sent_queue if chunk.tsn == (self._first_tsn + 2) % 2**32)
        return int(chunk._sent_count) - 1

    async def take_round_trips(self, *took_s: float) -> None:
        """Have the first packets confirmed after these times."""
        for count, seconds in enumerate(took_s, 1):
            self.sctp._sent_queue[0]._sent_time = time.time() - seconds
            await self.confirm(count)


@pytest.mark.parametrize(("took_s", "part"), [
    ((100.0, 100.0), MOST_KEPT),
    # The mean is 100 + (1000 - 100) / 8.
    ((100.0, 1_000.0), 0.5),
    # 100 + (300 - 100) / 8 = 125, and a little less and more.
    ((100.0, 299.0), MOST_KEPT),
    ((100.0, 301.0), 100 / 125.125),
])
def test_loss_costs_half_of_the_window_where_packets_wait_and_else_a_fifth(
    took_s: tuple[float, float], part: float,
) -> None:
    async def play() -> None:
        sender = Sender()
        await sender.send()
        await sender.take_round_trips(*took_s)
        window = sender.sctp._cwnd
        await sender.lose_one()
        assert sender.repeated() == 1
        assert sender.sctp._cwnd == pytest.approx(part * window, rel=0.0005)

    run(play)


def test_repeated_packet_is_repeated_again_only_once_its_answer_should_be_there() -> None:
    async def play() -> None:
        sender = Sender()
        await sender.send()
        await sender.take_round_trips(0.1, 0.1)
        await sender.lose_one()
        under_way = sender.sctp._flight_size // CHUNK_BYTES
        for last in range(5, 5 + under_way + 2):
            await sender.confirm(2, (2, last))
        assert sender.repeated() == 1
        await sender.confirm(2, (2, 5 + under_way + 2))
        assert sender.repeated() == 2

    run(play)


@pytest.mark.parametrize("was_noticed", [False, True])
def test_after_the_timer_the_same_loss_costs_nothing_more(*, was_noticed: bool) -> None:
    """What was under way is still confirmed, packet by packet."""

    async def play() -> None:
        sender = Sender()
        await sender.send()
        await sender.confirm(2)
        if was_noticed:
            await sender.lose_one()
        threshold = sender.sctp._cwnd // 2
        sender.expire()
        for last in range(5, WINDOW - 1):
            await sender.confirm(2, (2, last))
        assert sender.repeated() == 1 + was_noticed
        assert sender.sctp._ssthresh == threshold
        assert sender.sctp._fast_recovery_exit is None

    run(play)


def test_loss_of_what_was_sent_after_the_timer_costs_a_part_of_the_window() -> None:
    async def play() -> None:
        sender = Sender()
        await sender.send()
        sender.expire()
        for count in range(1, 2 * WINDOW):
            await sender.confirm(count)
        threshold = sender.sctp._ssthresh
        for last in (2, 3, 4):
            await sender.confirm(2 * WINDOW, (2, last))
        assert sender.sctp._fast_recovery_exit is not None
        assert sender.sctp._ssthresh != threshold

    run(play)


def test_after_the_timer_only_what_is_missing_is_repeated() -> None:
    async def play() -> None:
        sender = Sender()
        await sender.send()
        # The third and the tenth are missing, and all from the sixteenth on.
        await sender.confirm(2, (2, 7), (9, 13))
        sender.expire()
        await asyncio.sleep(0)
        await sender.confirm(9, (2, 6))
        await sender.confirm(15)
        assert {3, 10, 16} <= sender.all_repeated() <= {3, 10, *range(16, 4 * WINDOW)}

    run(play)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_other_end_gets_no_more_than_it_keeps_while_the_first_is_missing(more: int) -> None:
    async def play() -> None:
        sender = Sender()
        await sender.send(MAX_SPAN + more)
        sent = sender.sctp._sent_queue
        for last in range(2, MAX_SPAN + 2):
            await sender.confirm(0, (2, min(last, len(sent))))
        assert len(sent) == MAX_SPAN + min(more, 0)
        # It comes at last.
        await sender.confirm(len(sent))
        assert len(sent) == max(more, 0)

    run(play)


def test_aiortc_has_the_names_that_this_needs() -> None:
    async def play() -> None:
        missing = [name for name in NEEDED if not hasattr(End("client").sctp, name)]
        assert missing == []

    run(play)
