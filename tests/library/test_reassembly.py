"""What one SCTP association of aiortc takes from the other end: with aiortc, and no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from struct import pack
from typing import Any

import pytest

from connectoid.limits import MAX_CHANNEL_BYTES
from connectoid.reassembly import (
    DCEP,
    FIRST,
    KINDS,
    LAST,
    MAX_DUPLICATES,
    MAX_EARLY_FRAGMENTS,
    MAX_EARLY_RUNS,
    NEEDED,
    OCTETS,
    TEXT,
    UNORDERED,
    bound_association,
)

sctp = pytest.importorskip("aiortc.rtcsctptransport")

WHOLE = FIRST | LAST
# Of what came before the first fragment.
TSN = 2**31 - 3


class FakeDtls:
    """What SCTP runs over, without another end: it keeps the last packet."""

    state = "connected"
    _role = "server"

    def __init__(self) -> None:
        self.sent = b""

    async def _send_data(self, packet: bytes) -> None:
        self.sent = packet


class Association:
    """aiortc's SCTP, bounded, and what was told and received."""

    def __init__(self, *, may_open: bool = True, tsn: int = TSN) -> None:
        self.dtls = FakeDtls()
        self.sctp = sctp.RTCSctpTransport(self.dtls)
        self.sctp._remote_port = 5000
        self.sctp._last_received_tsn = tsn
        self.tsn = tsn
        self.sctp._association_state = self.sctp.State.ESTABLISHED
        self.refused: list[str] = []
        self.opened: list[Any] = []
        self.came: list[bytes] = []
        bound_association(
            self.sctp, lambda: self.refused.append("refused"),
            lambda: self.refused.append("too_large"), may_open=may_open)
        self.sctp.on("datachannel", self._watch)

    def _watch(self, channel: Any) -> None:
        self.opened.append(channel)
        channel.on("message", self.came.append)

    async def take(
        self, numbers: Iterable[int], flags: Callable[[int], int], content: bytes = b"x",
        stream_seq: int = 1, protocol: int = OCTETS,
    ) -> None:
        """Have fragments come, with their numbers after the OPEN."""
        for number in numbers:
            chunk = sctp.DataChunk(flags(number))
            chunk.tsn = (self.tsn + 2 + number) % 2**32
            chunk.stream_seq = stream_seq
            chunk.protocol = protocol
            chunk.user_data = content
            await self.sctp._receive_chunk(chunk)

    async def open(self, content: bytes, *, number: int = -1, stream_id: int = 0) -> None:
        """Have a message of DCEP come."""
        chunk = sctp.DataChunk(WHOLE)
        chunk.tsn = (self.tsn + 2 + number) % 2**32
        chunk.stream_id = stream_id
        # The first of its stream, or the next on the one of the channel.
        chunk.stream_seq = (number + 1) * (stream_id == 0)
        chunk.protocol = DCEP
        chunk.user_data = content
        await self.sctp._receive_chunk(chunk)

    async def take_whole(self, *numbers: int) -> None:
        """Have messages of one fragment come; each has its number as its content."""
        for number in numbers:
            await self.take([number], lambda _: WHOLE, str(number).encode(), number + 1)


def open_of(label: bytes = b"connectoid", kind: int = 0, protocol: bytes = b"") -> bytes:
    """Return an OPEN of DCEP, with the priority that Chromium gives."""
    return pack("!BBHLHH", 3, kind, 256, 0, len(label), len(protocol)) + label + protocol


def never_ends(number: int) -> int:
    """Return the flags of a fragment of one message without an end."""
    return FIRST * (number == 0)


def run(
    play: Callable[[Association], Awaitable[None]], *, may_open: bool = True, tsn: int = TSN,
) -> Association:
    """Play what the other end does."""

    async def main() -> Association:
        association = Association(may_open=may_open, tsn=tsn)
        await play(association)
        return association

    return asyncio.run(main())


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_message_of_more_bytes_than_any_is_refused_while_it_comes(more: int) -> None:
    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take([0], lambda _: FIRST, bytes(MAX_CHANNEL_BYTES // 2))
        await association.take([1], lambda _: 0, bytes(MAX_CHANNEL_BYTES // 2 - 1))
        await association.take([2], lambda _: LAST * (more < 1), bytes(1 + more))

    association = run(play)
    assert association.came == [bytes(MAX_CHANNEL_BYTES + more)] * (more < 1)
    assert association.refused == ["too_large"] * (more == 1)


def test_message_of_small_fragments_costs_no_more_than_its_bytes() -> None:
    """Each is looked at once, and kept with those before it."""
    count = 2_000

    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take(
            range(count), lambda number: never_ends(number) | LAST * (number == count - 1))

    association = run(play)
    assert association.came == [b"x" * count]
    assert association.refused == []
    assert association.sctp._advertised_rwnd == 1024 * 1024


@pytest.mark.parametrize(("flags", "stream_seq"), [
    (WHOLE, 9), (LAST, 1), (0, 1)], ids=["of another message", "an end", "a middle"])
def test_fragment_that_is_not_the_next_of_its_message_is_refused(
    flags: int, stream_seq: int,
) -> None:
    """None before it is missing, so it would wait for ever."""

    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take([0], lambda _: flags, stream_seq=stream_seq)

    assert run(play).refused == ["refused"]


def test_message_that_begins_within_another_is_refused() -> None:
    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take([0, 1], lambda _: FIRST)

    assert run(play).refused == ["refused"]


@pytest.mark.parametrize("tsn", [*range(2**32 - 7, 2**32), 0, 2**31 - 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)], ids=str)
def test_messages_come_in_their_order_where_numbers_go_round(
    tsn: int, order: tuple[int, ...],
) -> None:
    """The first of an order is not the smallest there."""

    async def play(association: Association) -> None:
        await association.open(open_of())
        for number in order:
            await association.take_whole(number, number)

    association = run(play, tsn=tsn)
    assert association.came == [b"0", b"1", b"2", b"3"]
    assert association.refused == []
    assert association.sctp._last_received_tsn == (tsn + 5) % 2**32
    assert not association.sctp._sack_misordered


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_gaps_between_fragments_are_bounded_and_a_sack_fits_in_a_packet(more: int) -> None:
    """What is not taken comes again. What joins two runs, or is the next, makes room."""
    numbers = range(1, 2 * (MAX_EARLY_RUNS + more), 2)

    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take_whole(*numbers)
        # As many come again as a packet may bring.
        await association.take_whole(*[1] * 70)
        await association.sctp._send_sack()
        assert len(association.sctp._sack_misordered) == min(len(numbers), MAX_EARLY_RUNS)
        await association.take_whole(2, numbers[-1])
        assert association.came == []
        await association.take_whole(*range(numbers[-1] + 1))
        assert len(association.came) == numbers[-1] + 1

    association = run(play)
    assert association.refused == []
    blocks = min(len(numbers), MAX_EARLY_RUNS) + MAX_DUPLICATES
    assert len(association.dtls.sent) == 12 + 16 + 4 * blocks
    assert len(association.dtls.sent) <= sctp.SCTP_MAX_PACKET_LENGTH


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_fragments_that_came_again_are_told_up_to_a_bound(more: int) -> None:
    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take_whole(*[0] * (1 + MAX_DUPLICATES + more))

    told = run(play).sctp._sack_duplicates
    assert len(told) == MAX_DUPLICATES + min(more, 0)


@pytest.mark.parametrize("protocol", [*range(49, 60), 0, 2**32 - 1])
def test_message_of_a_kind_that_there_is_not_is_refused(protocol: int) -> None:
    """aiortc would drop it without a word."""

    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take([0], lambda _: WHOLE, b"\x02", protocol=protocol)

    association = run(play)
    assert association.refused == ["refused"] * (protocol not in KINDS)
    assert len(association.came) == (protocol in KINDS - {DCEP})


def test_text_that_is_none_is_refused() -> None:
    """aiortc would fail."""

    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take([0], lambda _: WHOLE, "ä".encode()[:1], protocol=TEXT)

    assert run(play).refused == ["refused"]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_fragments_that_wait_for_a_lost_one_are_bounded_and_come_again(more: int) -> None:
    """Nothing ends: an honest sender may have so much under way."""
    count = MAX_EARLY_FRAGMENTS + more
    length = 4

    def flags(number: int) -> int:
        return FIRST * (number % length == 0) | LAST * (number % length == length - 1)

    async def play(association: Association) -> None:
        await association.open(open_of())
        for number in range(1, count + 1):
            await association.take([number], flags, stream_seq=1 + number // length)
        held = len(association.sctp._sack_misordered)
        assert held == min(count, MAX_EARLY_FRAGMENTS)
        assert association.sctp._sack_needed
        await association.take([0], flags)
        # The sender has heard what is there, and sends the rest again.
        last = (count + length) // length * length
        for number in range(held + 1, last):
            await association.take([number], flags, stream_seq=1 + number // length)
        assert association.came == [b"x" * length] * (last // length)

    assert run(play).refused == []


async def unordered(association: Association) -> None:
    """Send a fragment of an unordered channel."""
    await association.take([0], lambda _: UNORDERED)


async def other_channel(association: Association) -> None:
    """Open the channel again, on a stream of its own."""
    await association.open(open_of(), number=0, stream_id=2)


async def same_channel(association: Association) -> None:
    """Open the channel again, on its own stream."""
    await association.open(open_of(), number=0)


@pytest.mark.parametrize("act", [unordered, other_channel, same_channel])
def test_what_one_ordered_reliable_channel_never_brings_is_refused_once(
    act: Callable[[Association], Awaitable[None]],
) -> None:
    async def play(association: Association) -> None:
        await association.open(open_of())
        await act(association)
        await act(association)
        # An honest message comes too late.
        await association.take([0], lambda _: WHOLE)

    association = run(play)
    assert association.refused == ["refused"]
    assert association.came == []
    assert len(association.opened) == 1


@pytest.mark.parametrize("message", [
    open_of(b"x" * 60_000),
    open_of(b"connectoid2"),
    open_of(kind=0x80),
    open_of(kind=0x01),
    open_of(protocol=b"x" * 60_000),
    open_of() + b"x",
    open_of()[:11],
])
def test_channel_that_is_not_ours_is_refused_before_it_is_made(message: bytes) -> None:
    async def play(association: Association) -> None:
        await association.open(message)

    association = run(play)
    assert association.refused == ["refused"]
    assert association.opened == []


def test_side_that_opens_the_channel_has_none_opened_for_it() -> None:
    async def play(association: Association) -> None:
        await association.open(open_of())

    association = run(play, may_open=False)
    assert association.refused == ["refused"]
    assert association.opened == []


def test_aiortc_has_all_that_is_bounded() -> None:
    """Another version may have other names, and then nothing is bounded any more."""

    async def missing() -> list[str]:
        transport = sctp.RTCSctpTransport(FakeDtls())
        return [name for name in NEEDED if not hasattr(transport, name)]

    assert asyncio.run(missing()) == []
    bound_association(object(), print, print, may_open=True)
