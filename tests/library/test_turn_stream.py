"""What a TURN server over TCP has us do at once: with aioice, and no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from struct import pack

import pytest
from apps import SOON_S

from connectoid.turn_stream import (
    MAX_MESSAGE_BYTES,
    MAX_MESSAGES_AT_ONCE,
    bound_turn_streams,
)

turn = pytest.importorskip("aioice.turn")

CHANNEL = 0x4000
# Of the other end, behind the server.
BOB = ("192.0.2.2", 9)
# A STUN message whose LIFETIME is of two octets, padded.
CUT_OFF = pack("!HHI12sHHHxx", 0x0103, 8, 0x2112A442, bytes(12), 0x000D, 2, 0)
PATIENCE = 3


def channel_data(content: bytes) -> bytes:
    """Return a message with data of Bob's."""
    return pack("!HH", CHANNEL, len(content)) + content + bytes(-len(content) % 4)


class FakeTransport:
    """A connection to a server that may be told to wait."""

    def __init__(self) -> None:
        self.is_reading = True
        self.is_over = False

    def get_extra_info(self, _name: str) -> tuple[str, int]:
        """Return the server's address."""
        return ("192.0.2.9", 3478)

    def is_closing(self) -> bool:
        """Return whether it has ended."""
        return self.is_over

    def pause_reading(self) -> None:
        """Note it."""
        self.is_reading = False

    def resume_reading(self) -> None:
        """Note it."""
        self.is_reading = True


class Client:
    """aioice's client of TURN, and what came through it."""

    def __init__(self) -> None:
        bound_turn_streams()
        self.transport = FakeTransport()
        self.protocol = turn.TurnClientTcpProtocol(("192.0.2.9", 3478), "alice", "x", 600, 500)
        self.protocol.connection_made(self.transport)
        self.protocol.channel_to_peer[CHANNEL] = BOB
        self.protocol.receiver = self
        self.came: list[bytes] = []

    def datagram_received(self, content: bytes, address: tuple[str, int]) -> None:
        """Note what came from Bob."""
        assert address == BOB
        self.came.append(content)

    async def read_all(self) -> None:
        """Let the client go on until it reads again."""
        async with asyncio.timeout(SOON_S):
            while not self.transport.is_reading:
                await asyncio.sleep(0)


def run(play: Callable[[Client], Awaitable[None]]) -> Client:
    """Play what a server sends."""

    async def main() -> Client:
        client = Client()
        await play(client)
        return client

    return asyncio.run(main())


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_messages_of_a_server_are_taken_a_few_at_a_time(more: int) -> None:
    """Nothing more is read until they are, and all come in their order."""
    contents = [str(number).encode() for number in range(MAX_MESSAGES_AT_ONCE + more)]

    async def play(client: Client) -> None:
        client.protocol.data_received(b"".join(map(channel_data, contents)))
        assert client.came == contents[:MAX_MESSAGES_AT_ONCE]
        assert client.transport.is_reading == (more < 0)
        # As a transport that had read on.
        client.protocol.data_received(channel_data(b"the last"))
        await client.read_all()

    assert run(play).came == [*contents, b"the last"]


def test_quarter_of_a_megabyte_of_empty_messages_leaves_turns_for_others() -> None:
    turns = 0

    async def play(client: Client) -> None:
        nonlocal turns
        client.protocol.data_received(channel_data(b"") * 65_536)
        while not client.transport.is_reading:
            turns += 1
            await asyncio.sleep(0)

    assert len(run(play).came) == 65_536
    assert turns >= 65_536 / MAX_MESSAGES_AT_ONCE


def indication(octets: int) -> bytes:
    """Return a STUN message of so many bytes: data of Bob's, and fingerprints after it."""
    port, address = 9 ^ 0x2112, 0xC0000202 ^ 0x2112A442
    attributes = pack("!HHBBHI", 0x0012, 8, 0, 1, port, address) + pack("!HH4s", 0x0013, 4, b"data")
    padding = octets - 20 - len(attributes)
    attributes += pack("!HH", 0x8022, padding - 4) + bytes(padding - 4)
    return pack("!HHI12s", 0x0017, len(attributes), 0x2112A442, bytes(12)) + attributes


@pytest.mark.parametrize("more", [-4, 0, 4])
def test_long_messages_of_a_server_are_passed_over(more: int) -> None:
    """A STUN message has multiples of four bytes."""
    message = indication(MAX_MESSAGE_BYTES + more)

    async def play(client: Client) -> None:
        client.protocol.peer_to_channel[BOB] = CHANNEL
        client.protocol.data_received(message + channel_data(b"the last"))
        await client.read_all()

    assert run(play).came == [b"data"] * (more <= 0) + [b"the last"]


def test_fingerprints_of_a_long_message_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is over all before it, and aioice reads on after it."""
    parsed: list[int] = []
    monkeypatch.setattr(turn.stun, "parse_message", lambda octets: parsed.append(len(octets)))
    long = pack("!HHI12s", 0x0017, 65_528, 0x2112A442, bytes(12)) + bytes(65_528)

    async def play(client: Client) -> None:
        client.protocol.data_received(long)
        await client.read_all()

    run(play)
    assert parsed == []


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1_000])
def test_messages_come_whole_however_they_are_cut(size: int) -> None:
    """Those of STUN are aioice's to read."""
    contents = [b"", b"1", b"22", b"333", b"4444", bytes(300)]
    stun = b"\x00\x17\x00\x04" + bytes(20)
    octets = b"".join(map(channel_data, contents[:3])) + stun
    octets += b"".join(map(channel_data, contents[3:]))

    async def play(client: Client) -> None:
        for at in range(0, len(octets), size):
            client.protocol.data_received(octets[at:at + size])
            await client.read_all()

    assert run(play).came == contents


def test_what_waits_when_the_connection_ends_is_left() -> None:
    async def play(client: Client) -> None:
        client.protocol.data_received(channel_data(b"x") * (2 * MAX_MESSAGES_AT_ONCE))
        client.transport.is_over = True
        for _ in range(PATIENCE):
            await asyncio.sleep(0)

    assert len(run(play).came) <= 2 * MAX_MESSAGES_AT_ONCE


@pytest.mark.parametrize("before", [0, MAX_MESSAGES_AT_ONCE])
def test_message_that_cannot_be_read_is_passed_over(before: int) -> None:
    """Also where it is taken later."""

    async def play(client: Client) -> None:
        octets = channel_data(b"x") * before + CUT_OFF + channel_data(b"the last")
        client.protocol.data_received(octets)
        await client.read_all()

    assert run(play).came == [b"x"] * before + [b"the last"]
