"""The way out of this machine, and when it changes: another Wi-Fi, a cable, a tunnel.

It is known by the address that this machine would send from. Linux says by netlink when something
has changed; elsewhere the address is looked at every few seconds. A change within the network that
leaves the address alone, such as another provider behind the same router, is not seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

# Where Linux does not say it, and should its word get lost.
LOOK_EVERY_S = 5.0
# Addresses and routes come one after the other, the last of them by DHCP.
SETTLE_S = 0.5
# For documentation (RFC 5737, RFC 3849). Nothing is sent there.
ANYWHERE = ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"))
DISCARD_PORT = 9

# RTMGRP_LINK, and RTMGRP_IPV4_ and RTMGRP_IPV6_ IFADDR and ROUTE, of linux/rtnetlink.h.
NEWS_OF_NETWORKS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
MAX_NEWS_BYTES = 65_536

# The addresses that this machine sends from: IPv4 and IPv6, each empty if there is no way out.
Way: TypeAlias = tuple[str, ...]


def way_out() -> Way:
    """Return the addresses that this machine would send from now."""
    return tuple(source_for(family, host) for family, host in ANYWHERE)


def source_for(family: socket.AddressFamily, host: str) -> str:
    """Return the address that this machine would send to a host from, "" without a way there.

    It is the host itself if that is this machine.
    """
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, DISCARD_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


class WayOut:
    """Notice that there is another way out than before, or one again, and call a function."""

    def __init__(
        self, changed: Callable[[], Awaitable[None]], *, look: Callable[[], Way] = way_out,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._changed = changed
        self._look = look
        self._sleep = sleep
        self._known = look()

    async def look_again(self) -> None:
        """Look, and call the function if it has changed and stays so for a moment."""
        way = self._look()
        if way == self._known:
            return
        self._known = await self._settled(way)
        if any(self._known):
            await self._changed()

    async def _settled(self, way: Way) -> Way:
        while True:
            before = way
            await self._sleep(SETTLE_S)
            way = self._look()
            if way == before:
                return way


async def watch_way_out(changed: Callable[[], Awaitable[None]]) -> None:
    """Call a function, for ever, whenever there is another way out, or one again."""
    way = WayOut(changed)
    with _open_news() as news:
        while True:
            await _next_news(news)
            await way.look_again()
            # News come in floods, and a socket that fails for good has some at once, without end.
            await asyncio.sleep(SETTLE_S)


@contextlib.contextmanager
def _open_news() -> Iterator[socket.socket | None]:
    """Lend a socket that becomes readable when something has changed; None where there is none."""
    if sys.platform != "linux":
        yield None
        return
    try:
        news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    except OSError:
        # Some sandboxes have none.
        yield None
        return
    with news:
        news.setblocking(False)
        news.bind((0, NEWS_OF_NETWORKS))
        yield news


async def _next_news(news: socket.socket | None) -> None:
    """Wait until something may have changed."""
    if news is None:
        await asyncio.sleep(LOOK_EVERY_S)
        return
    # An error means that there was too much news.
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(LOOK_EVERY_S):
            await asyncio.get_running_loop().sock_recv(news, MAX_NEWS_BYTES)
