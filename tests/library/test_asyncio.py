"""The asyncio face: the same calls, on the loop of the app."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest
from apps import (
    APP_URL,
    SOON_S,
    Apps,
    make_record,
)

from connectoid import (
    AiortcAdapter,
    AsyncConnectoid,
    Connectoid,
    NotConnectedError,
    Privacy,
    Store,
    UsageError,
    make_link,
)

# ---------------------------------------------------------------------------------------
# asyncio.
# ---------------------------------------------------------------------------------------


async def talk(alice: AsyncConnectoid, bob: AsyncConnectoid) -> list[bytes | str]:
    """Pair two apps, send both ways, cancel what waits, and return what came."""
    await bob.open(await alice.share("Bob", APP_URL), "Alice")
    async with asyncio.timeout(SOON_S):
        here, there = await asyncio.gather(alice.connect("Bob"), bob.connect("Alice"))
        await there.send("Hello")
        came = [await here.receive()]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await here.receive()
        await asyncio.gather(*(here.send(bytes([number]) * 60_000) for number in range(40)))
        came += [await there.receive() for _ in range(40)]
        await here.close()
        for channel in (here, there):
            with pytest.raises(NotConnectedError):
                await channel.receive()
            with pytest.raises(NotConnectedError):
                await channel.send("too late")
    await alice.share("Carol", APP_URL)
    waiting = asyncio.create_task(alice.connect("Carol"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await alice.unshare("Carol")
    return came


SAID: list[bytes | str] = ["Hello", *(bytes([number]) * 60_000 for number in range(40))]


def test_asyncio_face_does_all_that_the_blocking_one_does(apps: Apps, relay_url: str) -> None:
    """Share, open, connect, send, receive, close, unshare, and cancel."""

    async def run() -> list[bytes | str]:
        runners = [
            Connectoid(Store(apps.folder / f"{who}.db"), [(relay_url, None)], apps.wires.adapter())
            for who in ("Alice", "Bob")
        ]
        async with AsyncConnectoid(runners[0]) as alice, AsyncConnectoid(runners[1]) as bob:
            return await talk(alice, bob)

    assert asyncio.run(run()) == SAID


def names_of(face: type) -> set[str]:
    """Return the public names of a class."""
    return {name for name in vars(face) if not name.startswith("_")}


def test_both_faces_have_the_same_names_and_arguments() -> None:
    assert names_of(AsyncConnectoid) == names_of(Connectoid)
    for name in names_of(AsyncConnectoid):
        blocking, other = getattr(Connectoid, name), getattr(AsyncConnectoid, name)
        if isinstance(blocking, property):
            assert isinstance(other, property), name
            assert (other.fset is None) == (blocking.fset is None), name
            continue
        # With their defaults. The channels alone are of another class.
        parameters = inspect.signature(blocking).parameters
        assert inspect.signature(other).parameters == parameters, name


def test_settings_of_the_asyncio_face_are_those_of_the_runner(apps: Apps, relay_url: str) -> None:
    """An app that sets a name that nobody reads would believe that it hides its addresses."""

    async def run(app: Connectoid) -> None:
        async with AsyncConnectoid(app) as face:
            face.relays = [(relay_url, None)]
            face.privacy = Privacy(ask_first=True)
            face.allow_private_relays = True
            assert (face.relays, face.privacy) == (app.relays, Privacy(ask_first=True))
            assert app.privacy == face.privacy
            assert app.allow_private_relays
            assert face.allow_private_relays

    asyncio.run(run(Connectoid(Store(apps.folder / "Alice.db"))))


def test_asyncio_face_disconnects_by_name(apps: Apps, relay_url: str) -> None:
    async def run() -> None:
        runners = [
            Connectoid(Store(apps.folder / f"{who}.db"), [(relay_url, None)], apps.wires.adapter())
            for who in ("Alice", "Bob")
        ]
        async with AsyncConnectoid(runners[0]) as alice, AsyncConnectoid(runners[1]) as bob:
            await bob.open(await alice.share("Bob", APP_URL), "Alice")
            async with asyncio.timeout(SOON_S):
                here, there = await asyncio.gather(alice.connect("Bob"), bob.connect("Alice"))
                await alice.disconnect("Bob")
                for channel in (here, there):
                    with pytest.raises(NotConnectedError):
                        await channel.receive()
            with pytest.raises(UsageError, match="no contact"):
                await alice.disconnect("Carol")

    asyncio.run(run())


def test_asyncio_wait_begins_one_attempt(apps: Apps, relay_url: str) -> None:
    """However long it waits, the machine is asked once, since CONNECT-10 limits the attempts."""
    link = make_link(APP_URL, make_record("Bob", relay_url).invitation)

    async def run() -> None:
        app = Connectoid(Store(":memory:"), [(relay_url, None)], apps.wires.adapter())
        async with AsyncConnectoid(app) as bob:
            await bob.open(link, "Alice")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.5):
                    await bob.connect("Alice")

    asyncio.run(run())
    # Opening the link began an attempt, and a wait begins none beside it.
    assert apps.wires.gathered == 1


def test_asyncio_face_has_no_thread_of_its_own(apps: Apps, relay_url: str) -> None:
    """Everything runs on the loop of the app, which gets its events there too."""
    told: list[str] = []
    threads: set[threading.Thread] = set()

    def on_event(name: str, event: str) -> None:
        threads.add(threading.current_thread())
        told.append(event)
        raise ValueError(event)

    async def run() -> None:
        apps_of_two = [
            Connectoid(
                Store(apps.folder / f"{who}.db"), [(relay_url, None)], apps.wires.adapter(),
                on_event=on_event)
            for who in ("Alice", "Bob")
        ]
        async with AsyncConnectoid(apps_of_two[0]) as alice, AsyncConnectoid(apps_of_two[1]) as bob:
            before = set(threading.enumerate())
            await talk(alice, bob)
            assert not [
                thread for thread in set(threading.enumerate()) - before
                if "connectoid" in thread.name
            ]
            assert [record.name for record in await bob.contacts()] == ["Alice"]

    asyncio.run(run())
    assert {"paired", "connected", "disconnected"} <= {*told}
    assert threads == {threading.current_thread()}


@pytest.mark.slow
def test_asyncio_face_connects_through_aiortc(
    apps: Apps, relay_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as over wires in memory, with the real adapter."""
    ice = pytest.importorskip("aioice.ice")
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])

    async def run() -> list[bytes | str]:
        runners = [
            Connectoid(Store(apps.folder / f"{who}.db"), [(relay_url, None)], AiortcAdapter())
            for who in ("Alice", "Bob")
        ]
        async with AsyncConnectoid(runners[0]) as alice, AsyncConnectoid(runners[1]) as bob:
            return await talk(alice, bob)

    assert asyncio.run(run()) == SAID
