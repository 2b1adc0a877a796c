"""Both ends of a connection of aiortc on one loop, with our adapters and without a relay."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from harness import DEADLINE_S

from connectoid import AiortcAdapter, Ice
from connectoid.webrtc import Description

SOON_S = DEADLINE_S


class End:
    """One end: an adapter, and what it has reported of its one connection."""

    def __init__(self) -> None:
        self.adapter = AiortcAdapter()
        self.reports: list[tuple[str, Any]] = []
        self.came: asyncio.Queue[bytes | str] = asyncio.Queue()
        self._changed = asyncio.Event()
        self.adapter.start(self._take)

    @property
    def events(self) -> list[str]:
        """Return what was reported, without the values."""
        return [event for event, _ in self.reports]

    @property
    def peer(self) -> Any:
        """Return what the adapter knows of its connection."""
        return self.adapter._peers[1]

    @property
    def sctp(self) -> Any:
        """Return aiortc's SCTP."""
        return self.peer.connection.sctp

    async def gather(self, offer: Description | None = None) -> Description:
        """Return an offer, or the answer to one."""
        self.adapter.gather(1, 1, offer, Ice(()))
        description: Description = await self.reported("gathered")
        return description

    async def reported(self, event: str) -> Any:
        """Wait for a report; return its value."""
        async with asyncio.timeout(SOON_S):
            while event not in self.events:
                self._changed.clear()
                await self._changed.wait()
        return dict(self.reports)[event]

    async def receive(self) -> bytes | str:
        """Return the next message."""
        async with asyncio.timeout(SOON_S):
            return await self.came.get()

    async def send_chunk(self, octets: bytes) -> None:
        """Send a chunk of SCTP, whatever it is."""
        await self.sctp._send_chunk(Raw(octets))

    def _take(self, _contact: int, event: str, _attempt_id: int, value: Any) -> None:
        if event == "message":
            self.came.put_nowait(value)
        else:
            self.reports.append((event, value))
        self._changed.set()


class Raw:
    """A chunk as Mallory writes it."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets

    def __bytes__(self) -> bytes:
        return self._octets


class TwoEnds:
    """Alice, who answers, and Mallory, who opens the channel."""

    def __init__(self) -> None:
        self.alice = End()
        self.mallory = End()

    async def gather(self) -> Description:
        """Have both gather; return the answer, which is still to be joined."""
        return await self.alice.gather(await self.mallory.gather())

    async def open(self, answer: Description) -> None:
        """Join the answer, and wait until the channel is open."""
        self.mallory.adapter.join(1, 1, answer)
        await self.alice.reported("opened")
        await self.mallory.reported("opened")

    async def close(self) -> None:
        """End both."""
        await self.mallory.adapter.stop()
        await self.alice.adapter.stop()


def run_two_ends(act: Callable[[TwoEnds], Awaitable[None]], *, is_open: bool = True) -> None:
    """Have both ends act, with a channel between them or before."""

    async def main() -> None:
        ends = TwoEnds()
        try:
            if is_open:
                await ends.open(await ends.gather())
            await act(ends)
        finally:
            await ends.close()

    ice: Any = importlib.import_module("aioice.ice")
    found = ice.get_host_addresses
    # Where there is no network they connect all the same.
    ice.get_host_addresses = lambda **kinds: found(**kinds) or ["127.0.0.1"]
    try:
        asyncio.run(main())
    finally:
        ice.get_host_addresses = found
