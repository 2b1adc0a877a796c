"""Looking names up in daemon threads: so many at a time, and few of them for each asker.

The executor of a loop would do it in threads that hold up the end of the process. It has few of
them, for all: who names hosts whose name servers are silent would keep everybody else waiting.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

# Host names that are looked up at a time, each in a thread of its own. A lookup whose name server
# is silent takes half a minute.
MAX_LOOKUPS = 32
# ... on behalf of one contact. It may name many hosts, and holds up nobody but itself.
MAX_LOOKUPS_OF_ONE = 2
# Addresses of a host that are tried, for each of IPv4 and IPv6. A name may have thousands, and each
# attempt takes a socket and a timer.
MAX_ADDRESSES_OF_FAMILY = 2


class Lookups:
    """Look names up on one event loop."""

    def __init__(self, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo) -> None:
        self._getaddrinfo = getaddrinfo
        self._places = asyncio.Semaphore(MAX_LOOKUPS)
        # By asker. Those without a lookup go.
        self._places_of: weakref.WeakValueDictionary[object, asyncio.Semaphore] = (
            weakref.WeakValueDictionary())

    async def look_up(
        self, asker: object, host: str, port: int, family: socket.AddressFamily,
        kind: socket.SocketKind,
    ) -> list[Any]:
        """Return what getaddrinfo does, once the asker has a place, and all have one more.

        Raises OSError.
        """
        places = self._places_of.setdefault(asker, asyncio.Semaphore(MAX_LOOKUPS_OF_ONE))
        await places.acquire()
        try:
            await self._places.acquire()
        except asyncio.CancelledError:
            places.release()
            raise

        def leave() -> None:
            self._places.release()
            places.release()

        return await self._begin((host, port, family, kind), leave)

    def _begin(
        self, name: tuple[str, int, socket.AddressFamily, socket.SocketKind],
        leave: Callable[[], None],
    ) -> asyncio.Future[list[Any]]:
        """Begin a lookup, whose places become free when its thread ends."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Any]] = loop.create_future()

        def look_up() -> None:
            try:
                infos = self._getaddrinfo(*name)
            except OSError as error:
                report(_settle, found, error)
            except UnicodeError:
                report(_settle, found, OSError("no name of a host"))
            else:
                report(_settle, found, infos)

        def report(*call: Any) -> None:
            # The loop may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(leave)
                loop.call_soon_threadsafe(*call)

        thread = threading.Thread(target=look_up, daemon=True, name=f"look up {name[0]}")
        try:
            thread.start()
        except RuntimeError:
            leave()
            raise OSError("this machine has no room for another thread") from None
        return found


def _settle(future: asyncio.Future[list[Any]], outcome: list[Any] | OSError) -> None:
    """Give a future its result or its error, if anybody still waits for it."""
    if future.done():
        return
    if isinstance(outcome, OSError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def few_of(infos: Iterable[Any]) -> list[Any]:
    """Return the first results of getaddrinfo of each family, in their order."""
    counts: collections.Counter[int] = collections.Counter()
    few = []
    for info in infos:
        counts[info[0]] += 1
        if counts[info[0]] <= MAX_ADDRESSES_OF_FAMILY:
            few.append(info)
    return few
