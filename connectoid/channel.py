"""Channels to contacts: the blocking one, and the one for asyncio.

A runner gives each message of the other to `take`, on its loop, and None at the end. What waits
there is bounded: an app that does not take what comes loses the connection, not its memory. So is
each message.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Protocol

from connectoid.errors import ConnectoidError, UsageError
from connectoid.limits import MAX_CHANNEL_BYTES
from connectoid.loop_thread import LoopThread
from connectoid.operating_system import next_of

# Of a channel, that the app has not taken: then it is closed.
MAX_QUEUED_MESSAGES = 1_024
CLOSED = "The connection is closed."
FULL = f"The connection is closed: {MAX_QUEUED_MESSAGES:,} messages wait that were not received."
TOO_LARGE = "The connection is closed: a message of more than 64 KiB came."
WRONG = "The connection is closed: the other end broke the rules of data channels."

log = logging.getLogger("connectoid")


class NotConnectedError(ConnectoidError):
    """There is no connection, or no longer; its text says what is known of the reason."""


class Connections(Protocol):
    """What a channel needs of a runner."""

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Send, and return when there is room for more; raise ConnectionError."""

    def hang_up(self, contact: int) -> None:
        """Close the connection to a contact."""


Listener = Callable[[bytes | str | None], object]


def is_too_large(message: bytes | str) -> bool:
    """Return whether a message has more bytes than a channel carries."""
    if isinstance(message, str) and len(message) <= MAX_CHANNEL_BYTES:
        message = message.encode("utf-8", "surrogatepass")
    return len(message) > MAX_CHANNEL_BYTES


def check_size(message: bytes | str) -> None:
    """Raise UsageError for a message that the other side would refuse."""
    if is_too_large(message):
        raise UsageError("A message has at most 64 KiB: send it in parts.")


class Channel:
    """A connection to a contact: messages of the app, in order, bytes or str, up to 64 KiB each."""

    def __init__(
        self, connections: Connections, loop_thread: LoopThread, contact: int, attempt_id: int,
    ) -> None:
        self.attempt_id = attempt_id
        self.closed = threading.Event()
        # What is said of the end.
        self.why = CLOSED
        self._connections = connections
        self._loop_thread = loop_thread
        self._contact = contact
        self._came: queue.Queue[bytes | str | None] = queue.Queue()
        self._listener: Listener | None = None
        # Held while a listener is called. Nobody waits for it: who holds it brings all that comes.
        self._delivering = threading.Lock()

    def send(self, message: bytes | str, timeout_s: float | None = None) -> None:
        """Send a message, and wait until there is room for more.

        Raises NotConnectedError, TimeoutError, and UsageError for more than 64 KiB.
        """
        check_size(message)
        if self.closed.is_set():
            raise NotConnectedError(self.why)
        writing = self._connections.write(self._contact, self.attempt_id, message)
        try:
            self._loop_thread.wait(writing, timeout_s)
        except (ConnectionError, CancelledError):
            raise NotConnectedError(CLOSED) from None

    def receive(self, timeout_s: float | None = None) -> bytes | str:
        """Return the next message.

        Raises NotConnectedError once it is closed and empty, TimeoutError.
        """
        self._loop_thread.check_process()
        try:
            message = next_of(self._came, timeout_s)
        except queue.Empty:
            raise TimeoutError("Nothing came.") from None
        if message is None:
            # For the next call.
            self._came.put(None)
            raise NotConnectedError(self.why)
        return message

    def close(self) -> None:
        """Disconnect; what the other sent before may still be received. Idempotent."""
        if not self.closed.is_set():
            self._loop_thread.call(self._hang_up)

    def listen(self, listener: Listener) -> None:
        """Have a function called with each message, those that came already first; None is the end.

        The calls come on the runner's loop, one at a time. They hold up all contacts while they
        last, and must not wait. What a listener raises is logged.
        """
        self._listener = listener
        self._loop_thread.call(self._deliver)

    @property
    def is_closed(self) -> bool:
        """Return whether it has ended."""
        return self.closed.is_set()

    @property
    def is_full(self) -> bool:
        """Return whether the app has left too much untaken."""
        return self._came.qsize() >= MAX_QUEUED_MESSAGES

    def end(self, why: str) -> None:
        """Take the end, with what is said of it."""
        if not self.is_closed:
            self.why = why
            self.take(None)

    def take(self, message: bytes | str | None) -> None:
        """Take a message from the other, or the end."""
        if self.closed.is_set():
            return
        if message is not None:
            self._came.put(message)
            self._deliver()
            return
        self.closed.set()
        self._came.put(None)
        # The end comes amid a step of the contact's machine, which goes on first: a listener may
        # begin another step of it.
        self._loop_thread.soon(self._deliver)

    def _hang_up(self) -> None:
        self._connections.hang_up(self._contact)
        self.take(None)

    def _deliver(self) -> None:
        """Give the listener what has come, unless a call of it is doing so."""
        if not self._delivering.acquire(blocking=False):
            return
        try:
            while self._listener is not None:
                _call(self._listener, self._came.get_nowait())
        except queue.Empty:
            # That was all.
            pass
        finally:
            self._delivering.release()


def _call(listener: Listener, message: bytes | str | None) -> None:
    try:
        listener(message)
    except Exception:
        log.exception("A listener failed.")


class AsyncChannel:
    """A Channel for asyncio: to be used on the loop of the AsyncConnectoid that has made it."""

    def __init__(self, connections: Connections, contact: int, attempt_id: int) -> None:
        self.attempt_id = attempt_id
        self.is_closed = False
        # What is said of the end.
        self.why = CLOSED
        self._connections = connections
        self._contact = contact
        self._came: asyncio.Queue[bytes | str | None] = asyncio.Queue()

    async def send(self, message: bytes | str) -> None:
        """Send a message, and wait until there is room for more.

        Raises NotConnectedError, and UsageError for more than 64 KiB.
        """
        check_size(message)
        if self.is_closed:
            raise NotConnectedError(self.why)
        try:
            await self._connections.write(self._contact, self.attempt_id, message)
        except ConnectionError:
            raise NotConnectedError(CLOSED) from None

    async def receive(self) -> bytes | str:
        """Return the next message; raise NotConnectedError once it is closed and empty."""
        message = await self._came.get()
        if message is None:
            # For the next call.
            self._came.put_nowait(None)
            raise NotConnectedError(self.why)
        return message

    async def close(self) -> None:
        """Disconnect; what the other sent before may still be received. Idempotent."""
        if not self.is_closed:
            self._connections.hang_up(self._contact)
            self.take(None)

    @property
    def is_full(self) -> bool:
        """Return whether the app has left too much untaken."""
        return self._came.qsize() >= MAX_QUEUED_MESSAGES

    def end(self, why: str) -> None:
        """Take the end, with what is said of it."""
        if not self.is_closed:
            self.why = why
            self.take(None)

    def take(self, message: bytes | str | None) -> None:
        """Take a message from the other, or the end."""
        if self.is_closed:
            return
        if message is None:
            self.is_closed = True
        self._came.put_nowait(message)
