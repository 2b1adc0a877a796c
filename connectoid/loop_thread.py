"""An event loop, in a thread of its own or in that of an app, and calls into it from all others."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from connectoid.errors import UsageError
from connectoid.operating_system import result_of

# For tasks of others, such as aiortc's, when the loop ends.
STOP_S = 2.0
FORKED = (
    "This process is a fork of the one that has started this runner, whose threads are not here: "
    "make another one, with another store.")

P = ParamSpec("P")
R = TypeVar("R")


class LoopThread:
    """Bring calls to an event loop. Without one they are made where they are.

    `start` makes a loop with a thread, until `stop`. `enter` takes the running loop of
    an app instead.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # The process that the loop runs in. A fork of it has no such thread, and would wait for
        # ever for the loop, or for a lock that another thread held.
        self._pid = os.getpid()
        # The loop was made here, and ends here.
        self._is_own = True

    @property
    def is_current(self) -> bool:
        """Return whether this is called in the loop's thread."""
        return self._live_loop is not None and threading.current_thread() is self._thread

    @property
    def is_of_app(self) -> bool:
        """Return whether calls go to a loop that was made elsewhere."""
        return self._live_loop is not None and not self._is_own

    def start(self) -> None:
        """Begin a loop in a thread; raise UsageError if there is a loop already."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(loop,), daemon=True, name=self._name)
        try:
            self._take(loop, thread, is_own=True)
        except UsageError:
            loop.close()
            raise
        thread.start()

    def stop(self) -> None:
        """Bring calls to the loop no more. End one that `start` has made. Idempotent."""
        self.check_process()
        with self._lock:
            loop = self._loop
            self._loop = None
        if loop is not None and self._thread is not None and self._is_own:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(2 * STOP_S)

    def enter(self) -> None:
        """Bring calls to the running loop; raise UsageError if there is a loop already."""
        self._take(asyncio.get_running_loop(), threading.current_thread(), is_own=False)

    def check_process(self) -> None:
        """Raise UsageError in a fork of the process that the loop runs in."""
        if self._loop is not None and os.getpid() != self._pid:
            raise UsageError(FORKED)

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what a plain function returns on the loop; raise what it raises."""
        future = self._submit(function, *args, **kwargs)
        if future is None:
            return function(*args, **kwargs)
        return future.result()

    def soon(self, function: Callable[[], None]) -> None:
        """Call a plain function on the loop, after what it is doing."""
        self.check_process()
        with self._lock:
            loop = self._live_loop
            if loop is not None:
                loop.call_soon_threadsafe(function)
                return
        function()

    def wait(self, coroutine: Coroutine[Any, Any, R], timeout_s: float | None = None) -> R:
        """Return what a coroutine returns on the loop; raise what it raises, or TimeoutError.

        Raises UsageError on the loop itself, which would wait for ever, and ConnectionError
        without a loop. Whoever is interrupted ends the coroutine too.
        """
        try:
            future = self._begin(coroutine)
        except BaseException:
            coroutine.close()
            raise
        try:
            return result_of(future, timeout_s)
        except BaseException:
            future.cancel()
            raise

    @property
    def _live_loop(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop that calls go to. An app may have closed its own."""
        if self._loop is None or self._loop.is_closed():
            return None
        return self._loop

    def _take(
        self, loop: asyncio.AbstractEventLoop, thread: threading.Thread, *, is_own: bool,
    ) -> None:
        self.check_process()
        with self._lock:
            if self._live_loop is not None:
                raise UsageError("This runner is started already.")
            self._is_own = is_own
            self._pid = os.getpid()
            self._thread = thread
            self._loop = loop

    def _begin(self, coroutine: Coroutine[Any, Any, R]) -> Future[R]:
        """Begin a coroutine on the loop, which is not the caller's."""
        self.check_process()
        if self.is_current:
            raise UsageError("This call waits, so it must not be made by a listener.")
        with self._lock:
            loop = self._live_loop
            if loop is None:
                raise ConnectionError("not started, or closed")
            return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def _submit(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs,
    ) -> Future[R] | None:
        """Begin a call on the loop; return None where it is to be made at once."""
        self.check_process()
        if self.is_current:
            return None
        # What was begun under the lock is finished before the loop ends.
        with self._lock:
            loop = self._live_loop
            if loop is None:
                return None
            return asyncio.run_coroutine_threadsafe(_call(function, *args, **kwargs), loop)


async def _call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    return function(*args, **kwargs)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and leave no task behind."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        # Calls that came in before the end.
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=STOP_S)
