"""What one SCTP association of aiortc takes from the other end: with aiortc, and no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from struct import pack
from typing import Any

import pytest

from connectoid.reassembly import (
    DCEP,
    MAX_EARLY_FRAGMENTS,
    MAX_MESSAGE_FRAGMENTS,
    NEEDED,
    UNORDERED,
    bound_association,
)

sctp = pytest.importorskip("aiortc.rtcsctptransport")

LAST = 0x01
FIRST = 0x02
BINARY = 53
# Of what came before the first fragment.
TSN = 2**31 - 3


class FakeDtls:
    """What SCTP runs over, without another end."""

    state = "connected"
    _role = "server"

    async def _send_data(self, _packet: bytes) -> None:
        """Lose it."""


class Association:
    """aiortc's SCTP, bounded, and what was told and received."""

    def __init__(self, *, may_open: bool = True) -> None:
        self.sctp = sctp.RTCSctpTransport(FakeDtls())
        self.sctp._remote_port = 5000
        self.sctp._last_received_tsn = TSN
        self.sctp._association_state = self.sctp.State.ESTABLISHED
        self.refused: list[str] = []
        self.opened: list[Any] = []
        self.came: list[bytes] = []
        bound_association(
            self.sctp, lambda: self.refused.append("refused"), may_open=may_open)
        self.sctp.on("datachannel", self._watch)

    def _watch(self, channel: Any) -> None:
        self.opened.append(channel)
        channel.on("message", self.came.append)

    async def take(
        self, numbers: Iterable[int], flags: Callable[[int], int], content: bytes = b"x",
        stream_seq: int = 1,
    ) -> None:
        """Have fragments come, with their numbers after the OPEN."""
        for number in numbers:
            chunk = sctp.DataChunk(flags(number))
            chunk.tsn = (TSN + 2 + number) % 2**32
            chunk.stream_seq = stream_seq
            chunk.protocol = BINARY
            chunk.user_data = content
            await self.sctp._receive_chunk(chunk)

    async def open(self, content: bytes, *, number: int = -1, stream_id: int = 0) -> None:
        """Have a message of DCEP come."""
        chunk = sctp.DataChunk(FIRST | LAST)
        chunk.tsn = (TSN + 2 + number) % 2**32
        chunk.stream_id = stream_id
        # The first of its stream, or the next on the one of the channel.
        chunk.stream_seq = (number + 1) * (stream_id == 0)
        chunk.protocol = DCEP
        chunk.user_data = content
        await self.sctp._receive_chunk(chunk)


def open_of(label: bytes = b"connectoid", kind: int = 0, protocol: bytes = b"") -> bytes:
    """Return an OPEN of DCEP, with the priority that Chromium gives."""
    return pack("!BBHLHH", 3, kind, 256, 0, len(label), len(protocol)) + label + protocol


def never_ends(number: int) -> int:
    """Return the flags of a fragment of one message without an end."""
    return FIRST * (number == 0)


def run(play: Callable[[Association], Awaitable[None]], *, may_open: bool = True) -> Association:
    """Play what the other end does."""

    async def main() -> Association:
        association = Association(may_open=may_open)
        await play(association)
        return association

    return asyncio.run(main())


@pytest.mark.parametrize(("count", "is_taken"), [
    (MAX_MESSAGE_FRAGMENTS - 1, True),
    (MAX_MESSAGE_FRAGMENTS, True),
    (MAX_MESSAGE_FRAGMENTS + 1, False),
])
def test_message_of_more_fragments_than_any_app_sends_is_refused(
    count: int, is_taken: bool,
) -> None:
    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take(
            range(count), lambda number: never_ends(number) | LAST * (number == count - 1))

    association = run(play)
    assert association.came == [b"x" * count] * is_taken
    assert association.refused == ["refused"] * (not is_taken)


def test_messages_that_wait_for_a_number_that_never_comes_are_refused_as_many() -> None:
    """Each is whole, and none before it is missing."""

    async def play(association: Association) -> None:
        await association.open(open_of())
        await association.take(
            range(MAX_MESSAGE_FRAGMENTS - 1), lambda _: FIRST | LAST, stream_seq=9)
        assert association.refused == []
        await association.take([MAX_MESSAGE_FRAGMENTS - 1], lambda _: FIRST | LAST, stream_seq=9)

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
        held = len(association.sctp._inbound_streams[0].reassembly)
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
        await association.take([0], lambda _: FIRST | LAST)

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
    bound_association(object(), print, may_open=True)
