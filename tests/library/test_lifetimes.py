"""How a runner begins and ends: twice, half-way, interrupted, in a fork, and from other threads."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable

import pytest
from apps import APP_URL, NOWHERE, SOON_S, Apps, Wire, make_record, until

from connectoid import (
    AsyncConnectoid,
    Connectoid,
    Store,
    StoreError,
    UsageError,
    make_link,
)
from connectoid.relay_client import TransportError
from connectoid.webrtc import Report

Call = Callable[[], object]


class StuckTransport:
    """A relay without messages. What is sent to it takes for ever."""

    def __init__(self) -> None:
        self.is_closed = False
        self.has_send = False
        self._freed = asyncio.Event()

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = 0,
    ) -> tuple[int, bytes]:
        """Answer what asks; wait with what sends, and raise TransportError."""
        if method == "GET":
            return 200, b'{"ok": true}'
        request = json.loads(body)
        if isinstance(request, dict) and request["action"] == "send":
            self.has_send = True
            await self._freed.wait()
            raise TransportError("let go")
        found = {"ok": True, "found": False}
        reply = [found] * len(request) if isinstance(request, list) else found
        return 200, json.dumps(reply).encode()

    async def renew(self) -> None:
        """Do nothing: there is nothing to close."""

    async def close(self) -> None:
        """Note it."""
        self.is_closed = True


class LameWire(Wire):
    """WebRTC that fails to start for the first time."""

    has_failed = False

    def start(self, report: Report) -> None:
        """Fail once."""
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("no WebRTC yet")
        super().start(report)


def app_that_sends(apps: Apps, transport: StuckTransport) -> Connectoid:
    """Return an app, not started, that will have a hello to send as long as it runs."""
    store = Store(apps.folder / "Bob.db")
    app = Connectoid(store, [(NOWHERE, None)], apps.wires.adapter(), transport=transport)
    app.open(make_link(APP_URL, make_record("Bob").invitation), "Alice")
    return app


def is_open(store: Store) -> bool:
    """Return whether a store can be read."""
    try:
        store.load()
    except StoreError:
        return False
    return True


# -- Beginnings ----------------------------------------------------------------------------


def test_runner_is_started_once(apps: Apps) -> None:
    """What runs goes on, and ends as it would have."""
    app = apps.begin("Alice", NOWHERE)
    with pytest.raises(UsageError, match="started already"):
        app.start()

    async def enter() -> None:
        with pytest.raises(UsageError, match="started already"):
            await AsyncConnectoid(app).__aenter__()

    asyncio.run(enter())
    assert app.share("Bob", APP_URL)
    app.close()
    with pytest.raises(UsageError, match="or closed"):
        app.start()


def test_asyncio_face_is_entered_once(apps: Apps) -> None:
    """The first one goes on."""

    async def run() -> None:
        app = Connectoid(Store(":memory:"), [(NOWHERE, None)])
        async with AsyncConnectoid(app) as alice:
            with pytest.raises(UsageError, match="started already"):
                await AsyncConnectoid(app).__aenter__()
            with pytest.raises(UsageError, match="started already"):
                app.start()
            assert await alice.share("Bob", APP_URL)
        with pytest.raises(UsageError, match="or closed"):
            await AsyncConnectoid(app).__aenter__()

    asyncio.run(run())


def test_start_that_fails_is_undone_and_may_be_made_again(apps: Apps) -> None:
    """A session of aiohttp that nobody has closed would fail this test as a warning."""
    before = set(threading.enumerate())
    app = Connectoid(Store(apps.folder / "x.db"), [(NOWHERE, None)], LameWire(apps.wires))
    app.share("Bob", APP_URL)
    with pytest.raises(RuntimeError, match="no WebRTC yet"):
        app.start()
    gc.collect()
    assert set(threading.enumerate()) <= before
    with app:
        assert [record.name for record in app.contacts()] == ["Bob"]


# -- Ends ------------------------------------------------------------------------------------


def test_close_that_was_interrupted_is_finished_by_the_next_one(apps: Apps) -> None:
    """Ctrl-C cancels what waits for the close, as here."""
    transport = StuckTransport()
    app = app_that_sends(apps, transport)
    app.start()
    until(lambda: transport.has_send, "sent")
    closing = app.loop_thread.call(lambda: asyncio.ensure_future(app.runner.close()))
    until(lambda: app.runner._carrier.is_stopped, "closing")
    app.loop_thread.call(closing.cancel)
    app.close()
    assert transport.is_closed
    assert not is_open(app.runner.store)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("connectoid")]


def test_asyncio_face_that_is_cancelled_at_its_end_leaves_nothing(apps: Apps) -> None:
    """The end goes on without the task that has begun it."""
    transport = StuckTransport()
    app = app_that_sends(apps, transport)

    async def use() -> None:
        async with AsyncConnectoid(app):
            while not transport.has_send:
                await asyncio.sleep(0)

    async def run() -> None:
        using = asyncio.create_task(use())
        while not app.runner._carrier.is_stopped:
            await asyncio.sleep(0)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        await app.runner.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert transport.is_closed
    assert not is_open(app.runner.store)


def test_loop_that_ends_amid_a_close_closes_the_store(apps: Apps) -> None:
    """asyncio.run cancels the close too: what is left of it is done nevertheless."""
    transport = StuckTransport()
    app = app_that_sends(apps, transport)

    async def run() -> None:
        await AsyncConnectoid(app).__aenter__()
        while not transport.has_send:
            await asyncio.sleep(0)
        closing = asyncio.create_task(app.runner.close())
        while not app.runner._carrier.is_stopped:
            await asyncio.sleep(0)
        closing.cancel()

    asyncio.run(run())
    assert transport.is_closed
    assert not is_open(app.runner.store)
    # The loop is no more, so this finds nothing to do.
    app.close()


def test_call_in_a_fork_fails_and_the_parent_goes_on(apps: Apps) -> None:
    """It would wait for ever for a thread that is not there."""
    app = apps.begin("Alice", NOWHERE)
    calls: list[Call] = [
        app.contacts, app.close, app.start, lambda: app.share("Bob", APP_URL),
        lambda: app.connect("Bob"),
    ]
    with warnings.catch_warnings():
        # From Python 3.12 on a fork with threads is warned of.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.alarm(int(SOON_S))
        os._exit(len(calls) - sum(map(is_refused, calls)))
    assert os.waitpid(pid, 0)[1] == 0
    assert app.contacts() == []


def is_refused(call: Call) -> bool:
    """Return whether a call raises UsageError because of a fork."""
    try:
        call()
    except UsageError as error:
        return "fork" in str(error)
    return False


# -- Other threads ---------------------------------------------------------------------------


def test_other_threads_may_use_what_an_asyncio_face_runs(apps: Apps, relay_url: str) -> None:
    """Their calls come on the loop of the app, so that relays are asked and told at once."""

    async def run() -> None:
        apps_of_two = [
            Connectoid(Store(apps.folder / f"{who}.db"), [(relay_url, None)], apps.wires.adapter())
            for who in ("Alice", "Bob")
        ]
        hers, _ = apps_of_two
        async with AsyncConnectoid(hers) as alice, AsyncConnectoid(apps_of_two[1]) as bob:
            await bob.open(await asyncio.to_thread(hers.share, "Bob", APP_URL), "Alice")
            async with asyncio.timeout(SOON_S):
                await alice.connect("Bob")
            await asyncio.to_thread(hers.verify, "Bob")
            (record,) = await asyncio.to_thread(hers.contacts)
            assert record.verified
            with pytest.raises(UsageError, match="call connect of AsyncConnectoid"):
                await asyncio.to_thread(hers.connect, "Bob")
            await asyncio.to_thread(hers.unshare, "Bob")
            assert await alice.contacts() == []

    asyncio.run(run())


def test_other_threads_may_close_what_an_asyncio_face_runs(apps: Apps) -> None:
    """The loop itself cannot, as it would wait for itself. Afterwards the block ends as always."""

    async def run() -> None:
        app = Connectoid(Store(apps.folder / "x.db"), [(NOWHERE, None)], apps.wires.adapter())
        async with AsyncConnectoid(app) as alice:
            await alice.share("Bob", APP_URL)
            with pytest.raises(UsageError, match="on its loop"):
                app.close()
            await asyncio.to_thread(app.close)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            with pytest.raises(StoreError):
                await alice.share("Carol", APP_URL)

    asyncio.run(run())
