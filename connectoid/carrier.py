"""Effects that leave the process are carried out here: to relays, to WebRTC, and to the app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from connectoid.complaints import Complaints
from connectoid.contact import Close, Effect, Gather, Join, Send, Tell, Write
from connectoid.ice import Ice, has_turn, ice_servers
from connectoid.line import Lines
from connectoid.roster import Roster
from connectoid.sender import Sender
from connectoid.webrtc import WebRTC


class AppChannel(Protocol):
    """What a runner does with the channels that it has made for an app."""

    attempt_id: int

    @property
    def is_closed(self) -> bool:
        """Return whether it has ended."""

    @property
    def is_full(self) -> bool:
        """Return whether the app has left too much untaken."""

    def end(self, why: str) -> None:
        """Take the end, with what is said of it."""

    def take(self, message: bytes | str | None) -> None:
        """Take a message from the other, or the end."""


class App(Protocol):
    """The face of a runner: it makes the channels that the app uses, and is told the events."""

    def make_channel(self, contact: int, attempt_id: int) -> AppChannel:
        """Return a channel to a contact."""

    def tell(self, name: str, event: str) -> None:
        """Tell the app; never fail and never wait."""


class Carrier:
    """Carry out effects from `start` to `stop`; those that come before wait for the start."""

    def __init__(
        self, roster: Roster, complaints: Complaints, sender: Sender, to_strangers: Sender,
        lines: Lines, *, webrtc: WebRTC, ice_servers: Sequence[Any],
    ) -> None:
        self.channels: dict[int, AppChannel] = {}
        self.is_running = False
        self.is_stopped = False
        self._roster = roster
        self._complaints = complaints
        self._sender = sender
        self._to_strangers = to_strangers
        self._lines = lines
        self._webrtc = webrtc
        self._ice_servers = tuple(ice_servers)
        self._early: list[tuple[int, Effect]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, app: App) -> None:
        """Begin, with what has come so far."""
        self._app = app
        self.is_running = True
        for number, effect in self._early:
            self.carry_out(number, effect)
        self._early.clear()

    def stop(self) -> None:
        """Carry out nothing any more."""
        self.is_stopped = True

    async def end_tasks(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a task that ends with the runner."""
        # The loop keeps only a weak reference to a task.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def carry_out(self, number: int, effect: Effect) -> None:
        """Carry out one effect; one that fails is dropped, as if it had been lost on its way."""
        if self.is_stopped:
            return
        if not self.is_running:
            self._early.append((number, effect))
            return
        try:
            self._carry_out_now(number, effect)
        except Exception as error:
            self._complain(number, effect, error)

    def end_channel(self, number: int) -> None:
        """Tell the app's channel to a contact that it has ended."""
        channel = self.channels.get(number)
        if channel is not None:
            channel.take(None)

    def _carry_out_now(self, number: int, effect: Effect) -> None:
        match effect:
            case Send(is_to_stranger=True):
                self._to_strangers.send(number, effect)
            case Send():
                self._sender.send(number, effect)
            case Gather():
                self.begin(self._gather(number, effect))
                self.end_channel(number)
            case Join(attempt_id, answer):
                self._webrtc.join(number, attempt_id, answer)
            case Write(attempt_id, octets):
                self.begin(self._write(number, attempt_id, octets))
            case Close(attempt_id):
                self._webrtc.close(number, attempt_id)
                self.end_channel(number)
            case Tell(event):
                self._tell(number, event)

    async def _gather(self, number: int, effect: Gather) -> None:
        """Have WebRTC gather as soon as it is known which servers it may ask."""
        try:
            ice = await self._ice(number)
            # Meanwhile the contact may have given this attempt up.
            if self._is_gathering(number, effect.attempt_id):
                self._webrtc.gather(number, effect.attempt_id, effect.offer, ice)
        except Exception as error:
            self._complain(number, effect, error)

    def _is_gathering(self, number: int, attempt_id: int) -> bool:
        contact = self._roster.contacts.get(number)
        if contact is None or self.is_stopped:
            return False
        attempt = contact.attempt
        return attempt.state == "gathering" and attempt.attempt_id == attempt_id

    def _complain(self, number: int, effect: Effect, error: Exception) -> None:
        text = f"{type(effect).__name__} for contact {number} failed: {error!r}"
        self._complaints.make(text, number, error=error)

    async def _ice(self, number: int) -> Ice:
        """Return the servers for a contact. By relay alone no STUN server is asked."""
        record = self._roster.contacts[number].record
        await self._lines.learn(number, record)
        relay_only = self._roster.privacy.relay_only
        with_stun = self._lines.with_stun()
        if relay_only:
            with_stun = set()
        servers = ice_servers(record, with_stun, self._lines.lent(number), self._ice_servers)
        if relay_only and not has_turn(servers):
            self._complaints.make(
                f"{record.name}: connections by relay alone need a TURN server, yours or one that"
                " your relay lends.", number)
        return Ice(servers, relay_only)

    async def _write(self, number: int, attempt_id: int, octets: bytes) -> None:
        # A channel that is closed says so itself.
        with contextlib.suppress(ConnectionError):
            await self._webrtc.write(number, attempt_id, octets)

    def _tell(self, number: int, event: str) -> None:
        if event == "connected":
            attempt_id = self._roster.contacts[number].attempt.attempt_id
            self.channels[number] = self._app.make_channel(number, attempt_id)
        if event == "disconnected":
            self.end_channel(number)
        self._app.tell(self._roster.names[number], event)
