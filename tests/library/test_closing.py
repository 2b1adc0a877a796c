"""A connection that is closed lets arrive what was sent on it: two adapters, and aiortc."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from connectoid import AiortcAdapter, Ice
from connectoid.webrtc import Description

pytest.importorskip("aiortc")

PATIENCE_S = 60.0
ATTEMPT = 1

# Of an event, a value.
Told: TypeAlias = tuple[str, Any]


class Side:
    """One end: its adapter, and what it has reported."""

    def __init__(self) -> None:
        self.adapter = AiortcAdapter()
        self.told: list[Told] = []
        self._more = asyncio.Event()
        self.adapter.start(self._take)

    def _take(self, _contact: int, event: str, _attempt_id: int, value: Any) -> None:
        self.told.append((event, value))
        self._more.set()

    async def hears(self, event: str) -> Any:
        """Return the value of an event, once it is told."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for told, value in self.told:
                    if told == event:
                        return value
                self._more.clear()
                await self._more.wait()

    async def describe(self, offer: Description | None = None) -> Description:
        """Return an offer, or an answer."""
        self.adapter.gather(1, ATTEMPT, offer, Ice((), relay_only=False))
        description: Description = await self.hears("gathered")
        return description

    @property
    def dtls(self) -> Any:
        """Return what aiortc's SCTP sends by."""
        return self.adapter._peers[1].connection.sctp.transport

    def lose_next(self, is_lost: Callable[[int], bool]) -> None:
        """Lose packets that go out, by their number from now on."""
        dtls, sent, count = self.dtls, self.dtls._send_data, 0

        async def send(packet: bytes) -> None:
            nonlocal count
            count += 1
            if not is_lost(count):
                await sent(packet)

        dtls._send_data = send


async def connect() -> tuple[Side, Side]:
    """Return two sides with an open channel."""
    alice, bob = Side(), Side()
    answer = await alice.describe(await bob.describe())
    bob.adapter.join(1, ATTEMPT, answer)
    for side in (alice, bob):
        await side.hears("opened")
    return alice, bob


@pytest.mark.slow
def test_what_was_sent_just_before_the_end_arrives_though_it_was_lost_once() -> None:
    async def main() -> None:
        alice, bob = await connect()
        bob.lose_next(lambda number: number == 1)
        await bob.adapter.write(1, ATTEMPT, b"the proof")
        bob.adapter.close(1, ATTEMPT)
        await alice.hears("closed")
        assert [told for told in alice.told if told[0] == "message"] == [("message", b"the proof")]
        await asyncio.gather(alice.adapter.stop(), bob.adapter.stop())

    asyncio.run(main())


@pytest.mark.slow
def test_connection_whose_other_end_hears_nothing_ends_all_the_same() -> None:
    async def main() -> None:
        alice, bob = await connect()
        dtls = bob.dtls
        bob.lose_next(lambda _: True)
        await bob.adapter.write(1, ATTEMPT, b"lost")
        await bob.adapter.stop()
        assert dtls.state == "closed"
        await alice.adapter.stop()

    asyncio.run(main())


def test_end_that_broke_the_rules_is_not_waited_for() -> None:
    async def main() -> None:
        alice, bob = await connect()
        bob.lose_next(lambda _: True)
        connection = bob.adapter._peers[1].connection
        channel = bob.adapter._peers[1].channel
        closings: list[str] = []
        channel.close = lambda: closings.append("closed with care")
        connection.emit("datachannel", channel)
        await bob.hears("refused")
        bob.adapter.close(1, ATTEMPT)
        await asyncio.gather(alice.adapter.stop(), bob.adapter.stop())
        assert closings == []
        assert connection.connectionState == "closed"

    asyncio.run(main())
