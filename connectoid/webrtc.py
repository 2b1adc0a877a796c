"""WebRTC: what a runner needs of it, none at all, and that of aiortc."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from connectoid.certificates import verify_no_chain
from connectoid.consent import Consent, keep_consent
from connectoid.datagrams import bound_datagrams
from connectoid.errors import UsageError
from connectoid.gathering import IceServer, ServerNames, gather_in_time, read_server
from connectoid.guards import warning_about
from connectoid.ice import Ice
from connectoid.local_names import bound_local_names
from connectoid.reassembly import CHANNEL_LABEL, bound_association
from connectoid.recovery import recover_soon
from connectoid.sctp_gate import guard_sctp
from connectoid.shown import shown

# On a data channel; more waits.
MAX_BUFFERED_BYTES = 1024 * 1024
# For what was sent to arrive, when a connection is closed. Lost packets come again after 1 s.
FLUSH_S = 5.0
# For connections to close, at the end.
STOP_S = 2.0

log = logging.getLogger("connectoid")

# (contact, event, attempt_id, value)
Report: TypeAlias = Callable[[int, str, int, Any], None]
Description: TypeAlias = Mapping[str, str]


class WebRTC(Protocol):
    """Makes peer connections: one for each contact, the newest `attempt_id`.

    All calls come on the runner's event loop, none of them may block it, and all reports are
    made there. Reports are (contact, event, attempt_id, value): `gathered` with an offer, an answer
    or None, `opened`, `message` with bytes or str, `trouble` with what a server refuses, in words,
    `refused` when something came that no honest app sends, `too_large` when that is a message of
    over 64 KiB, `silent` when the other end has not answered for a while, `closed`.
    """

    def start(self, report: Report) -> None:
        """Begin: reports go there."""

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Make a peer connection and an offer, or the answer to one.

        The former connection of this contact ends.
        """

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Give the answer to the peer connection."""

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Send, and return when there is room for more; raise ConnectionError."""

    def close(self, contact: int, attempt_id: int) -> None:
        """Close the peer connection."""

    def doubt(self) -> None:
        """Report connections as closed whose other ends do not answer now.

        The network of this device is another one.
        """

    async def stop(self) -> None:
        """Close all, and end."""


class NoWebRTC:
    """Make no connections: contacts can be seen and ended, no more."""

    def start(self, report: Report) -> None:
        """Do nothing, as all here."""

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Do nothing: the machine tries again later."""

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Do nothing."""

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Raise ConnectionError."""
        raise ConnectionError("no WebRTC")

    def close(self, contact: int, attempt_id: int) -> None:
        """Do nothing."""

    def doubt(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""


@dataclass
class Peer:
    """A peer connection of aiortc, its one data channel, and what asks whether it goes on."""

    attempt_id: int
    connection: Any
    # Set once no more are opened for it.
    has_all_sockets: asyncio.Event
    # Set when there is room for more, or the channel has ended.
    may_go_on: asyncio.Event
    channel: Any = None
    consent: Consent | None = None
    # Whether the other end broke the rules: it is owed nothing more.
    is_refused: bool = False

    @property
    def open_channel(self) -> Any:
        """Return the data channel if it is open, else None."""
        if self.channel is not None and self.channel.readyState == "open":
            return self.channel
        return None


class AiortcAdapter:
    """Make peer connections with aiortc.

    ICE servers are URLs, or dicts of RTCIceServer's arguments.
    """

    def __init__(self) -> None:
        try:
            self._aiortc = importlib.import_module("aiortc")
        except ImportError:
            raise UsageError(
                "Connections need the package aiortc: pip install 'connectoid[webrtc]'") from None
        self._peers: dict[int, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._report: Report = _report_nothing
        self._names: ServerNames

    def start(self, report: Report) -> None:
        """Begin: reports go there."""
        self._report = report
        self._names = ServerNames()
        quiet_aiortc(asyncio.get_running_loop())
        bound_local_names()

    async def stop(self) -> None:
        """Close all, and end. Idempotent."""
        for contact in list(self._peers):
            self._drop(contact)
        ending = list(self._tasks)
        if ending:
            await asyncio.wait(ending, timeout=FLUSH_S + STOP_S)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Make a peer connection and an offer, or the answer to one.

        Raises UsageError for connections by relay alone with an old aiortc.
        """
        if ice.relay_only and not hasattr(self._aiortc, "RTCIceTransportPolicy"):
            raise UsageError("Connections by relay alone need a newer aiortc.")
        peer = self._begin(contact, attempt_id, relay_only=ice.relay_only)
        self._do(self._gather(contact, peer, offer, ice))

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Give the answer to the peer connection."""
        self._do(self._join(contact, attempt_id, answer))

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Send, and return when there is room for more; raise ConnectionError."""
        peer = self._peers.get(contact)
        if peer is None or peer.attempt_id != attempt_id or peer.open_channel is None:
            raise ConnectionError("the channel is closed")
        channel = peer.open_channel
        try:
            channel.send(message)
        except Exception as error:
            # A channel that loses a message is of no use. To close it takes the other end.
            self._report(contact, "closed", attempt_id, None)
            raise ConnectionError(str(error)) from error
        if channel.bufferedAmount > MAX_BUFFERED_BYTES:
            peer.may_go_on.clear()
            await peer.may_go_on.wait()
            if peer.open_channel is None:
                raise ConnectionError("the channel was closed with messages waiting")

    def close(self, contact: int, attempt_id: int) -> None:
        """Close the peer connection, once what was sent has arrived."""
        peer = self._peers.get(contact)
        if peer is not None and peer.attempt_id == attempt_id:
            self._drop(contact)

    def doubt(self) -> None:
        """Have each connection ask its other end, and close it without an answer."""
        for peer in self._peers.values():
            if peer.consent is not None:
                peer.consent.doubt()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop keeps only a weak reference to a task.
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin(self, contact: int, attempt_id: int, *, relay_only: bool) -> Peer:
        """Make the connection of an attempt at once: a call to close it may come next."""
        self._drop(contact)
        peer = self._make_peer(attempt_id, relay_only=relay_only)
        self._peers[contact] = peer
        changed = functools.partial(self._changed, contact, peer)
        peer.connection.on("connectionstatechange", changed)
        return peer

    async def _gather(self, contact: int, peer: Peer, offer: Description | None, ice: Ice) -> None:
        try:
            await self._describe(contact, peer, offer, ice)
        except Exception as error:
            log.warning("WebRTC failed: %s", shown(str(error)))
        finally:
            peer.has_all_sockets.set()
        if self._peers.get(contact) is not peer:
            # It was closed, or replaced.
            return
        description = None
        if peer.connection.localDescription:
            local = peer.connection.localDescription
            description = {"type": local.type, "sdp": local.sdp}
        self._report(contact, "gathered", peer.attempt_id, description)

    def _make_peer(self, attempt_id: int, *, relay_only: bool) -> Peer:
        configuration = self._aiortc.RTCConfiguration([])
        if relay_only:
            configuration.iceTransportPolicy = self._aiortc.RTCIceTransportPolicy.RELAY
        connection = self._aiortc.RTCPeerConnection(configuration)
        return Peer(attempt_id, connection, asyncio.Event(), asyncio.Event())

    async def _describe(
        self, contact: int, peer: Peer, offer: Description | None, ice: Ice,
    ) -> None:
        connection = peer.connection
        connection.on("datachannel", functools.partial(self._watch, contact, peer))
        if offer is None:
            self._watch(contact, peer, connection.createDataChannel(CHANNEL_LABEL))
            self._prepare(contact, peer, ice)
            await connection.setLocalDescription(await connection.createOffer())
        else:
            await connection.setRemoteDescription(self._aiortc.RTCSessionDescription(**offer))
            self._prepare(contact, peer, ice)
            await connection.setLocalDescription(await connection.createAnswer())

    def _prepare(self, contact: int, peer: Peer, ice: Ice) -> None:
        """Have aiortc do what it has no setting for, before it gathers."""
        report = functools.partial(self._report, contact)
        warn = functools.partial(report, "trouble", peer.attempt_id)
        sctp = peer.connection.sctp
        unguarded = warning_about(sctp)
        if unguarded:
            warn(unguarded)
        refuse = functools.partial(self._refuse, contact, peer)
        guard_sctp(sctp, refuse)
        refuse_size = functools.partial(self._refuse, contact, peer, "too_large")
        bound_association(sctp, refuse, refuse_size, may_open=peer.channel is None)
        recover_soon(sctp)
        verify_no_chain(sctp.transport)
        connection = sctp.transport.transport._connection
        look_up = functools.partial(self._names.addresses_of, contact)
        gather_in_time(
            connection, _usable(ice.servers, warn), look_up, warn, relay_only=ice.relay_only)
        bound_datagrams(connection)
        peer.consent = keep_consent(
            connection, functools.partial(report, "silent", peer.attempt_id, None))

    async def _join(self, contact: int, attempt_id: int, answer: Description) -> None:
        peer = self._peers.get(contact)
        if peer is None or peer.attempt_id != attempt_id:
            return
        try:
            description = self._aiortc.RTCSessionDescription(**answer)
            await peer.connection.setRemoteDescription(description)
        except Exception as error:
            log.warning("WebRTC failed: %s", shown(str(error)))

    def _watch(self, contact: int, peer: Peer, channel: Any) -> None:
        """Report what happens on the one data channel of a connection."""
        if peer.channel is not None or channel.label != CHANNEL_LABEL:
            self._refuse(contact, peer)
            return
        peer.channel = channel
        channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES // 2
        opened = functools.partial(self._report, contact, "opened", peer.attempt_id, None)
        channel.on("open", opened)
        channel.on("bufferedamountlow", peer.may_go_on.set)
        channel.on("close", peer.may_go_on.set)
        channel.on("message", functools.partial(self._report, contact, "message", peer.attempt_id))
        channel.on(
            "close", functools.partial(self._report, contact, "closed", peer.attempt_id, None))
        if channel.readyState == "open":
            opened()

    def _refuse(self, contact: int, peer: Peer, event: str = "refused") -> None:
        peer.is_refused = True
        self._report(contact, event, peer.attempt_id, None)

    def _changed(self, contact: int, peer: Peer) -> None:
        """Notice the end of a connection that was open; any other just runs out of time."""
        is_over = peer.connection.connectionState in ("failed", "closed")
        if is_over and peer.channel is not None:
            self._report(contact, "closed", peer.attempt_id, None)

    def _drop(self, contact: int) -> None:
        """Begin to end a contact's connection."""
        peer = self._peers.pop(contact, None)
        if peer is not None:
            self._do(_end(peer))


def _usable(servers: Iterable[Any], warn: Callable[[str], None]) -> list[IceServer]:
    """Return the servers that aiortc can use. Any other costs a warning, and no connection."""
    found: list[IceServer] = []
    for entry, server in enumerate(servers):
        try:
            found += read_server(server, entry)
        except ValueError as error:
            warn(f"{error}.")
    return found


async def _end(peer: Peer) -> None:
    """Close a connection, once what was sent has arrived.

    aiortc opens sockets for as long as it gathers. It would not close those that it opens after the
    connection was closed.
    """
    await peer.has_all_sockets.wait()
    if peer.open_channel is not None and not peer.is_refused:
        await _close_channel(peer.open_channel)
    await peer.connection.close()


async def _close_channel(channel: Any) -> None:
    """Close a channel: it closes when the other end has all of it (RFC 6525, section 5.2.2).

    A connection that is closed at once takes with it what was lost on the way: the last message
    may be the one that proves to the other side that it is connected.
    """
    closed = asyncio.Event()
    channel.once("close", closed.set)
    channel.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FLUSH_S):
            await closed.wait()


def _report_nothing(contact: int, event: str, attempt_id: int, value: Any) -> None:
    """Before the start there is nobody to report to."""


# ---------------------------------------------------------------------------------------
# aiortc's own tasks fail when the other end has gone. That is no news, and no traceback.
# ---------------------------------------------------------------------------------------

Handler: TypeAlias = Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]
ITS_PACKAGES = ("aiortc", "aioice", "pyee")


class QuietHandler:
    """Handle a loop's exceptions: log those of aiortc at `info`, leave others as they were."""

    def __init__(self, former: Handler | None) -> None:
        self._former = former

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log, or have the former handler do its work."""
        if _is_of_aiortc(context.get("exception")):
            log.info("WebRTC: %s", context["exception"])
        elif self._former is not None:
            self._former(loop, context)
        else:
            loop.default_exception_handler(context)


def quiet_aiortc(loop: asyncio.AbstractEventLoop) -> None:
    """Keep aiortc's late errors out of the users' sight."""
    former = loop.get_exception_handler()
    if not isinstance(former, QuietHandler):
        loop.set_exception_handler(QuietHandler(former))


def _is_of_aiortc(error: BaseException | None) -> bool:
    if error is None:
        return False
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        if module.partition(".")[0] in ITS_PACKAGES:
            return True
        trace = trace.tb_next
    return False
