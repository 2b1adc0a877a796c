"""The face of a runner for asyncio: no thread, all on the loop of the app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import cast

from connectoid.blocking import Connectoid
from connectoid.channel import AsyncChannel
from connectoid.contact import ContactRecord, Privacy
from connectoid.roster import Relay
from connectoid.runner import Progress, Relays

log = logging.getLogger("connectoid")


class AsyncConnectoid:
    """Run a Connectoid, one that was not started, on the running event loop.

    It is an asynchronous context manager. Its `on_event` is called on that loop, so it must not
    block. Other threads may call the Connectoid, except for `connect`.
    """

    def __init__(self, app: Connectoid) -> None:
        self.app = app
        self._runner = app.runner

    async def __aenter__(self) -> AsyncConnectoid:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to poll and to connect, as Connectoid.start."""
        self.app.loop_thread.enter()
        try:
            await self._runner.start(self)
        except BaseException:
            self.app.loop_thread.stop()
            raise

    async def close(self) -> None:
        """Disconnect all, let waiting messages go, and end, as Connectoid.close."""
        # One that is cancelled goes on all the same: calls of other threads still go to the loop.
        await self._runner.close()
        self.app.loop_thread.stop()

    @property
    def relays(self) -> tuple[Relay, ...]:
        """Return the relays for new contacts; they may be set."""
        return self._runner.relays

    @relays.setter
    def relays(self, relays: Relays) -> None:
        self._runner.relays = tuple(relays)

    @property
    def privacy(self) -> Privacy:
        """Return what contacts may learn by connecting; it may be set, as Connectoid.privacy."""
        return self._runner.privacy

    @privacy.setter
    def privacy(self, privacy: Privacy) -> None:
        self._runner.set_privacy(privacy)

    @property
    def allow_private_relays(self) -> bool:
        """Return whether others' relays may be private, as Connectoid does; it may be set."""
        return self._runner.allow_private_relays

    @allow_private_relays.setter
    def allow_private_relays(self, is_allowed: bool) -> None:
        self._runner.allow_private_relays = is_allowed

    async def share(self, name: str, app_url: str) -> str:
        """Return a link for a new contact, as Connectoid.share."""
        return self._runner.share(name, app_url)

    async def open(self, link: str, name: str) -> str:
        """Open somebody's link, as Connectoid.open."""
        return self._runner.open(link, name)

    async def connect(
        self, name: str, timeout_s: float | None = None, *, anew: bool = True,
    ) -> AsyncChannel:
        """Return a channel to a contact once it is there, as Connectoid.connect.

        asyncio.timeout ends the wait, too.
        """
        return cast(AsyncChannel, await self._runner.connect(name, timeout_s, anew=anew))

    async def disconnect(self, name: str) -> None:
        """Close the connection to a contact, as Connectoid.disconnect."""
        self._runner.disconnect(name)

    async def unshare(self, name: str) -> None:
        """End the sharing with a contact, as Connectoid.unshare."""
        self._runner.unshare(name)

    async def unshare_and_tell(self, name: str, timeout_s: float) -> bool:
        """End the sharing and wait until that is sent, as Connectoid.unshare_and_tell."""
        return await self._runner.unshare_and_tell(name, timeout_s)

    async def forget(self, name: str) -> None:
        """Delete a contact that has ended, as Connectoid.forget."""
        self._runner.forget(name)

    async def move(self, name: str, relays: Relays | None = None) -> None:
        """Be reached through other relays, as Connectoid.move."""
        self._runner.move(name, relays)

    async def renew(self, name: str) -> None:
        """Replace the signing key that a contact knows, as Connectoid.renew."""
        self._runner.renew(name)

    async def renew_and_tell(self, name: str, timeout_s: float | None) -> bool:
        """Renew, and wait until the contact has the new key, as Connectoid.renew_and_tell."""
        return await self._runner.renew_and_tell(name, timeout_s)

    async def verify(self, name: str, *, same: bool = True) -> None:
        """Mark the outcome of a comparison, as Connectoid.verify."""
        self._runner.verify(name, same=same)

    async def contacts(self) -> list[ContactRecord]:
        """Return the records of all contacts, as Connectoid.contacts."""
        return self._runner.contacts()

    async def refusals(self, name: str) -> Mapping[str, int]:
        """Return what was refused of a contact, as Connectoid.refusals."""
        return self._runner.refusals(name)

    async def progress(self, name: str) -> Progress:
        """Return how it stands with a connection to a contact, as Connectoid.progress."""
        return self._runner.progress(name)

    # -- What the runner asks of its face --------------------------------------------------

    def make_channel(self, contact: int, attempt_id: int) -> AsyncChannel:
        """Return a channel to a contact; for the runner."""
        return AsyncChannel(self._runner, contact, attempt_id)

    def tell(self, name: str, event: str) -> None:
        """Have the app told soon; for the runner."""
        asyncio.get_running_loop().call_soon(self._tell, name, event)

    def _tell(self, name: str, event: str) -> None:
        try:
            self.app.on_event(name, event)
        except Exception:
            log.exception("on_event failed")
