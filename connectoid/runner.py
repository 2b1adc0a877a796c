"""The runner: one event loop that owns the machines, the lines to relays, and WebRTC.

    what comes          a step of a machine         what goes
    a Line has read     Contact.polled              Save, Forget                 the store
    WebRTC reports      Contact.gathered, ...       Send                         the Sender
    the time has come   Contact.tick                Gather, Join, Write, Close   WebRTC
    the app calls       Contact.connect, ...        Tell                         the app
    the way out changes Contact.network_changed
    a relay is back     Contact.relay_is_back

Everything here runs on that loop, so no step meets another half-way (`steps`). No step waits. The
store is written in the step itself, because what could not be saved must not leave; a save takes a
few milliseconds at most, and no data of a channel needs one. What fails in a step of one contact is
logged, takes that contact back to its last record, and costs no other contact anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from connectoid.apps import check_app
from connectoid.carrier import App, AppChannel, Carrier
from connectoid.channel import NotConnectedError
from connectoid.clock import boot_time_s, system_now
from connectoid.complaints import Complaints
from connectoid.contact import (
    EVENTS,
    Contact,
    ContactRecord,
    Effect,
    Forget,
    Now,
    Privacy,
    Send,
)
from connectoid.errors import LinkError, UsageError
from connectoid.ice import check_ice_servers
from connectoid.line import Host, Lines, ReadBox
from connectoid.links import make_link, read_link
from connectoid.refusals import Refusals
from connectoid.relay_client import RelayClient, Transport, make_transport
from connectoid.reports import Reports
from connectoid.roster import Relay, Roster
from connectoid.sender import SEND_FOR_S, Sender, is_one_taken
from connectoid.steps import Steps
from connectoid.store import Store, StoreError
from connectoid.suite import Suite, SystemSuite, hash_link
from connectoid.urls import is_same_server
from connectoid.way_out import watch_way_out
from connectoid.webrtc import NoWebRTC, WebRTC

# For messages on their way, when the runner is closed.
STOP_S = 2.0

Relays = Iterable[Relay]


class Progress(NamedTuple):
    """How it stands with a connection to a contact."""

    # A state of CONNECTING: what goes on.
    state: str
    # When the next attempt begins, in seconds since 1970; None if one goes on, or none is to come.
    again_at_s: float | None
    # What a relay or this device did wrong for it lately, in words; or nothing.
    trouble: str


class Runner:
    """Run the contacts of one store on an event loop, behind a Connectoid or AsyncConnectoid."""

    def __init__(
        self, store: Store, relays: Relays, webrtc: WebRTC | None, *, ice_servers: Sequence[Any],
        allow_http: bool, suite: Suite | None, now: Callable[[], Now] | None, ca_file: str | None,
        transport: Transport | None, app: str,
    ) -> None:
        self.store = store
        self.webrtc = webrtc or NoWebRTC()
        self.suite = suite or SystemSuite()
        self.complaints = Complaints()
        # Of all that others name.
        self.allow_private_relays = False
        self._allow_http = allow_http
        self._app = check_app(app)
        self._ice_servers = tuple(ice_servers)
        self._now = now or system_now
        self._ca_file = ca_file
        self._owns_transport = transport is None
        self._transport = transport
        self._transport_to_strangers = transport
        self._roster = Roster(store, self.suite, self._now, allow_http=allow_http)
        self.relays = tuple(relays)
        self._sender = Sender(self._client, self.complaints, on_taken=self._note_taken)
        self._to_strangers = Sender(
            self._client_to_strangers, self.complaints, to_strangers=True)
        self._lines = Lines(
            self._client, self._roster, self.complaints,
            Host(self._take, self._is_named, self._relay_is_back))
        self._carrier = Carrier(
            self._roster, self.complaints, self._sender, self._to_strangers, self._lines,
            webrtc=self.webrtc, ice_servers=check_ice_servers(ice_servers))
        self._refusals = Refusals(store, self.complaints)
        self._steps = Steps(
            self._roster, self.complaints, self._refusals, self._lines, self._carrier,
            now=self._now)
        self._reports = Reports(
            self._roster, self.complaints, self._carrier, self._steps, self._lines)
        self._closing: asyncio.Task[None] | None = None

    # -- Beginning and end ---------------------------------------------------------------

    async def start(self, app: App) -> None:
        """Begin to poll and to connect, for an app. What fails is undone.

        Raises UsageError if it was started before, if certificates cannot be read, or if aiohttp is
        missing.
        """
        if self._carrier.is_running or self._closing is not None:
            raise UsageError("This runner is started already, or closed.")
        async with contextlib.AsyncExitStack() as undo:
            if self._owns_transport:
                self._transport = self._make_transport(undo)
                # A stranger's relay whose name is looked up slowly takes no contact's place.
                self._transport_to_strangers = self._make_transport(undo)
            self.webrtc.start(self._reports.take)
            undo.push_async_callback(self.webrtc.stop)
            undo.push_async_callback(self._lines.end)
            self._lines.draw()
            undo.push_async_callback(self._carrier.end_tasks)
            self._carrier.begin(self._steps.tick())
            self._carrier.begin(watch_way_out(self._network_changed))
            self._carrier.start(app)
            undo.pop_all()

    def _make_transport(self, undo: contextlib.AsyncExitStack) -> Transport:
        transport = make_transport(self._ca_file, self._may_be_private)
        undo.push_async_callback(transport.close)
        return transport

    async def close(self) -> None:
        """Disconnect all, let waiting messages go, and end; the store is closed. Idempotent.

        The work goes on if a caller is cancelled, and every later call waits for it.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # In the reverse order. If a step fails, or is cancelled because the loop ends, those that
        # come after it are made nevertheless.
        async with contextlib.AsyncExitStack() as steps:
            steps.callback(self.store.close)
            for transport in (self._transport, self._transport_to_strangers):
                if transport is not None:
                    steps.push_async_callback(transport.close)
            if self._carrier.is_running:
                steps.push_async_callback(self.webrtc.stop)
            steps.push_async_callback(self._carrier.end_tasks)
            steps.push_async_callback(self._lines.end)
            steps.push_async_callback(self._finish_sending)
            steps.callback(self._hang_up_all)

    async def _finish_sending(self) -> None:
        await asyncio.gather(self._sender.finish(STOP_S), self._to_strangers.finish(STOP_S))

    def _hang_up_all(self) -> None:
        """Disconnect all, and carry out nothing any more."""
        for number, contact in list(self._roster.contacts.items()):
            with contextlib.suppress(StoreError):
                self._steps.make(number, contact.disconnect)
        self._refusals.write_all(self._now().monotonic_s)
        self._carrier.stop()
        self.complaints.are_over = True
        self._steps.note_change()

    # -- What an app does: Connectoid says more of each call ------------------------------

    @property
    def relays(self) -> tuple[Relay, ...]:
        """Return the relays for new contacts; they may be set."""
        return self._relays

    @relays.setter
    def relays(self, relays: tuple[Relay, ...]) -> None:
        self._relays = relays
        self._in_addresses = self._roster.own_keys.in_addresses(relays)

    def share(self, name: str, app_url: str) -> str:
        """Return a link for a new contact; raise UsageError, StoreError."""
        contact, effects = Contact.invite(
            self.suite, self._now(), name, self._in_addresses, allow_http=self._allow_http,
            app=self._app)
        self._adopt(contact, effects)
        return make_link(app_url, contact.record.invitation)

    def open(self, link: str, name: str) -> str:
        """Open somebody's link and return the contact's name.

        Raises LinkError, UsageError, StoreError.
        """
        invitation = read_link(link, allow_http=self._allow_http)
        known = self._roster.with_link(hash_link(invitation.text))
        if known is not None and known.record.role == "inviter":
            raise LinkError("This is your own link: send it to somebody else.")
        if known is not None:
            return known.record.name
        contact, effects = Contact.open(
            self.suite, self._now(), name, invitation, relays=self._in_addresses,
            allow_http=self._allow_http, app=self._app)
        self._adopt(contact, effects)
        return name

    async def connect(
        self, name: str, timeout_s: float | None = None, *, anew: bool = True,
    ) -> AppChannel:
        """Return a channel to a contact; raise NotConnectedError, TimeoutError, UsageError."""
        number = self._roster.number_of(name)
        former = self._carrier.channels.get(number)
        if former is not None and not former.is_closed:
            return former
        began_s = boot_time_s()
        # A contact that was restored has forgotten that it was wanted: it is asked once more.
        asked: Contact | None = None
        if not anew:
            asked = self._roster.contacts[number]
        try:
            async with asyncio.timeout(timeout_s):
                while self._carrier.channels.get(number) is former:
                    contact = self._roster.contacts.get(number)
                    if contact is not None and contact is not asked:
                        self._steps.do(number, contact.connect(self._now()))
                        asked = contact
                        continue
                    self._check_hope(contact)
                    await self._steps.changed.wait()
        except TimeoutError:
            words = [self.trouble_since(began_s, number), self._absence(number, timeout_s)]
            raise TimeoutError(" ".join(filter(None, words))) from None
        return self._carrier.channels[number]

    def disconnect(self, name: str) -> None:
        """Close the connection to a contact; raise UsageError."""
        self.hang_up(self._roster.number_of(name))

    def hang_up(self, number: int) -> None:
        """Close the connection to a contact, if there still is one."""
        contact = self._roster.contacts.get(number)
        if contact is not None:
            self._steps.do(number, contact.disconnect(self._now()))
            self._carrier.end_channel(number)

    def set_privacy(self, privacy: Privacy) -> None:
        """Have all connections from now on made in another way."""
        self._roster.privacy = privacy

    def unshare(self, name: str) -> bool:
        """End the sharing with a contact; return whether it has to be told. Raise UsageError."""
        number = self._roster.number_of(name)
        effects = self._roster.contacts[number].unshare(self._now())
        self._steps.do(number, effects)
        self._carrier.end_channel(number)
        return any(isinstance(effect, Send) for effect in effects)

    async def unshare_and_tell(self, name: str, timeout_s: float) -> bool:
        """End the sharing, and return whether a relay has the word for the other in time.

        It is also True if nobody needs to be told. Raises UsageError.
        """
        number = self._roster.number_of(name)
        before = self._sender.letters(number)
        must_tell = self.unshare(name)
        letters = [letter for letter in self._sender.letters(number) if letter not in before]
        # Without letters nobody is told: the contact has named too many new relays.
        return not must_tell or await is_one_taken(letters, timeout_s)

    def forget(self, name: str) -> None:
        """Delete a contact that has ended; raise UsageError for any other."""
        number = self._roster.number_of(name)
        if self._roster.contacts[number].record.state != "ended":
            raise UsageError(f"{name} is still a contact: unshare ends it.")
        self._steps.do(number, [Forget()])

    def move(self, name: str, relays: Relays | None = None) -> None:
        """Be reached through other relays, or those of this runner; raise UsageError."""
        number = self._roster.number_of(name)
        shown = self._in_addresses
        if relays is not None:
            shown = self._roster.own_keys.in_addresses(relays)
        self._steps.do(number, self._roster.contacts[number].move(self._now(), shown))

    def renew(self, name: str) -> None:
        """Replace this side's signing key for a contact; raise UsageError."""
        number = self._roster.number_of(name)
        self._steps.do(number, self._roster.contacts[number].renew(self._now()))

    async def renew_and_tell(self, name: str, timeout_s: float | None) -> bool:
        """Renew, and return whether the contact has answered in time.

        Go on with a renewal that is under way. Raises UsageError, and NotConnectedError if the
        sharing ends meanwhile.
        """
        number = self._roster.number_of(name)
        if not self._roster.contacts[number].record.old_signer:
            self.renew(name)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._is_renewing(number):
                    await self._steps.changed.wait()
        return not self._is_renewing(number)

    def verify(self, name: str, *, same: bool = True) -> None:
        """Mark the outcome of a comparison; raise UsageError."""
        number = self._roster.number_of(name)
        self._steps.do(number, self._roster.contacts[number].verify(self._now(), same=same))

    def contacts(self) -> list[ContactRecord]:
        """Return the records of all contacts, tombstones left out."""
        return self._roster.records()

    def refusals(self, name: str) -> Mapping[str, int]:
        """Return how often something of a contact was refused, by reason; raise UsageError."""
        return self._refusals.counts(self._roster.number_of(name))

    def progress(self, name: str) -> Progress:
        """Return how it stands with a connection to a contact; raise UsageError."""
        number = self._roster.number_of(name)
        contact = self._roster.contacts[number]
        now = self._now()
        again_at_s = None
        if math.isfinite(contact.again_s):
            left_s = max(0.0, contact.again_s - now.monotonic_s)
            again_at_s = now.wall_us / 1e6 + left_s
        trouble = self.trouble_since(boot_time_s() - SEND_FOR_S, number)
        return Progress(contact.attempt.state, again_at_s, trouble)

    @property
    def privacy(self) -> Privacy:
        """Return what the app wants of all connections."""
        return self._roster.privacy

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Send on a channel, and return when there is room for more; raise ConnectionError."""
        await self.webrtc.write(contact, attempt_id, message)

    def _adopt(self, contact: Contact, effects: Sequence[Effect]) -> None:
        """Give a new contact its name and begin with it; raise UsageError, StoreError.

        Only now, when nothing else can be refused, does an ended contact give its name up.
        """
        self._roster.make_free(contact.record.name)
        self._steps.do(self._roster.add(contact), effects)

    def trouble_since(self, began_s: float, number: int) -> str:
        """Return what went wrong last for a contact since then, or nothing."""
        relays = [mailbox.url for mailbox in self._roster.contacts[number].mailboxes]
        return self.complaints.latest_since(began_s, [number, *relays])

    def _absence(self, number: int, timeout_s: float | None) -> str:
        """Return why a wait for a contact was in vain."""
        record = self._roster.contacts[number].record
        if record.state == "invited":
            return f"{record.name} has not opened the link yet."
        return f"{record.name} did not connect within {timeout_s:g} s."

    def _is_renewing(self, number: int) -> bool:
        """Return whether a renewal is not answered yet; raise NotConnectedError if it never is."""
        contact = self._roster.contacts.get(number)
        self._check_hope(contact)
        return contact is not None and bool(contact.record.old_signer)

    def _check_hope(self, contact: Contact | None) -> None:
        """Raise NotConnectedError if a wait for a contact is in vain."""
        if contact is None:
            raise NotConnectedError("The sharing has ended.")
        if contact.record.state in ("ended", "unshared") or self._carrier.is_stopped:
            raise NotConnectedError(EVENTS.get(contact.record.why) or "The sharing has ended.")

    # -- What comes: from relays, and of the network ---------------------------------------

    async def _take(self, number: int, boxes: Sequence[ReadBox]) -> None:
        """Give a contact what a line has read for it; raise StoreError."""
        contact = self._roster.contacts.get(number)
        if contact is not None:
            found = {box.poll.mailbox.pub: box.messages for box in boxes}
            self._steps.make(number, contact.polled_in_part, found)
        # One that was made anew, or deleted, has nothing to go on with.
        while contact is not None and contact is self._roster.contacts.get(number):
            if not contact.is_behind:
                break
            # Others have their turn.
            await asyncio.sleep(0)
            self._steps.make(number, contact.polled_in_part)
        self._roster.forget_unused(number, [box.poll.key for box in boxes])

    def _note_taken(self, number: int, send: Send) -> None:
        """Let a contact know that a relay has taken a message."""
        contact = self._roster.contacts.get(number)
        if contact is not None:
            with contextlib.suppress(StoreError):
                self._steps.make(number, contact.sent, send.message_hash)

    async def _network_changed(self) -> None:
        """Have all that waits go on at once, over new connections."""
        self._lines.wake()
        for transport in (self._transport, self._transport_to_strangers):
            if transport is not None:
                await transport.renew()
        for sender in (self._sender, self._to_strangers):
            sender.hurry()
        self.webrtc.doubt()
        for number, contact in list(self._roster.contacts.items()):
            with contextlib.suppress(StoreError):
                self._steps.make(number, contact.network_changed)

    def _relay_is_back(self, url: str) -> None:
        """Have what waits for a relay go on at once. What others had to send may wait for it too.

        This device's network may have been away, and nothing else has told so.
        """
        self._sender.hurry()
        for number, contact in list(self._roster.contacts.items()):
            if any(mailbox.url == url for mailbox in contact.mailboxes):
                with contextlib.suppress(StoreError):
                    self._steps.make(number, contact.relay_is_back)

    def _client(self, url: str) -> RelayClient:
        return RelayClient(url, self._transport)

    def _client_to_strangers(self, url: str) -> RelayClient:
        return RelayClient(url, self._transport_to_strangers)

    def _may_be_private(self, url: str) -> bool:
        """Return whether a relay may be on this machine or in a private network.

        It may if the user has named it, or has allowed it for all.
        """
        if self.allow_private_relays:
            return True
        return self._is_named(url) or is_same_server(url, self._named_relays())

    def _is_named(self, url: str) -> bool:
        return url in self._named_relays()

    def _named_relays(self) -> set[str]:
        """Return the URLs of the relays that the user has named, here or for a contact."""
        return {relay[0] for relay in self.relays} | self._roster.named_relays()
