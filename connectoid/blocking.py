"""The blocking face of a runner: its loop has a thread of its own, and calls go there."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, cast

from connectoid.channel import Channel, NotConnectedError
from connectoid.contact import ContactRecord, Now, Privacy
from connectoid.errors import UsageError
from connectoid.loop_thread import LoopThread
from connectoid.relay_client import Transport
from connectoid.roster import Relay
from connectoid.runner import Progress, Relays, Runner
from connectoid.store import Store
from connectoid.suite import Suite
from connectoid.webrtc import WebRTC

# For the app's on_event, when the runner is closed.
STOP_S = 2.0

log = logging.getLogger("connectoid")

OnEvent = Callable[[str, str], object]


class Connectoid:
    """Run the contacts of one store: a context manager, and safe to use from many threads.

    `on_event(name, event)` is called, from a thread of its own, with a key of EVENTS. Without
    `webrtc` contacts pair but do not connect. `relays` are (URL, ext) for new contacts, or
    (URL, API key, its half that only sends): links then have that half alone. The
    certificates in `ca_file` are trusted beside those of the system. With `app`, an identifier such
    as a domain, no other app opens this app's links, nor this app another one's.
    """

    def __init__(
        self, store: Store, relays: Relays = (), webrtc: WebRTC | None = None, *,
        on_event: OnEvent | None = None, ice_servers: Sequence[Any] = (), allow_http: bool = False,
        suite: Suite | None = None, now: Callable[[], Now] | None = None,
        ca_file: str | None = None, transport: Transport | None = None, app: str = "",
    ) -> None:
        self.runner = Runner(
            store, relays, webrtc, ice_servers=ice_servers, allow_http=allow_http, suite=suite,
            now=now, ca_file=ca_file, transport=transport, app=app)
        self.on_event = on_event or _ignore
        # AsyncConnectoid lets it bring calls to the loop of the app.
        self.loop_thread = LoopThread("connectoid loop")
        self._closing = threading.Lock()
        self._events: queue.Queue[tuple[str, str] | None] = queue.Queue()
        self._teller = threading.Thread(
            target=self._tell_on, daemon=True, name="connectoid events")

    def __enter__(self) -> Connectoid:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def relays(self) -> tuple[Relay, ...]:
        """Return the relays for new contacts; they may be set."""
        return self.runner.relays

    @relays.setter
    def relays(self, relays: Relays) -> None:
        self.runner.relays = tuple(relays)

    @property
    def privacy(self) -> Privacy:
        """Return what contacts may learn by connecting; it may be set, for later connections."""
        return self.runner.privacy

    @privacy.setter
    def privacy(self, privacy: Privacy) -> None:
        self.loop_thread.call(self.runner.set_privacy, privacy)

    @property
    def allow_private_relays(self) -> bool:
        """Return whether relays that others name may be on this machine or in private networks.

        It may be set. Those that the user has named, here or for a contact, always may.
        """
        return self.runner.allow_private_relays

    @allow_private_relays.setter
    def allow_private_relays(self, is_allowed: bool) -> None:
        self.runner.allow_private_relays = is_allowed

    def start(self) -> None:
        """Begin to poll and to connect.

        Raises UsageError if it was started before, if `ca_file` cannot be read, or if the package
        aiohttp is missing.
        """
        self.loop_thread.start()
        try:
            self.loop_thread.wait(self.runner.start(self))
        except BaseException:
            self.loop_thread.stop()
            raise
        self._teller.start()

    def close(self) -> None:
        """Disconnect all, let waiting messages go, and end; the store is closed. Idempotent.

        After one that was interrupted another one goes on with it.
        """
        self.loop_thread.check_process()
        if self.loop_thread.is_current:
            raise UsageError("A listener cannot close its runner, nor can other calls on its loop.")
        with self._closing:
            try:
                self.loop_thread.wait(self.runner.close())
            except ConnectionError:
                # It was never started, or is closed already.
                self.runner.store.close()
            except Exception:
                # Nothing is left to do on the loop.
                self.loop_thread.stop()
                raise
            self.loop_thread.stop()
        self._events.put(None)
        if self._teller.is_alive() and threading.current_thread() is not self._teller:
            self._teller.join(STOP_S)

    # -- What an app does ----------------------------------------------------------------

    def share(self, name: str, app_url: str) -> str:
        """Return a link for a new contact.

        Raises UsageError for a name that is taken, or without relays.
        """
        return self.loop_thread.call(self.runner.share, name, app_url)

    def open(self, link: str, name: str) -> str:
        """Open somebody's link, after the user has confirmed.

        Returns the contact's name; raises LinkError, UsageError. The same link again goes on with
        the contact that it made, by the name that it has.
        """
        return self.loop_thread.call(self.runner.open, link, name)

    def connect(self, name: str, timeout_s: float | None = None, *, anew: bool = True) -> Channel:
        """Return a channel to a contact, once it is there.

        Raises NotConnectedError, TimeoutError, UsageError. Without `anew` it goes on with a wait
        that has timed out, for as long as that one would have tried.
        """
        if self.loop_thread.is_of_app:
            raise UsageError("This runner is on the app's loop: call connect of AsyncConnectoid.")
        connecting = self.runner.connect(name, timeout_s, anew=anew)
        try:
            return cast(Channel, self.loop_thread.wait(connecting))
        except (ConnectionError, CancelledError):
            raise NotConnectedError("This runner is not started, or closed.") from None

    def disconnect(self, name: str) -> None:
        """Close the connection to a contact; raise UsageError."""
        self.loop_thread.call(self.runner.disconnect, name)

    def unshare(self, name: str) -> None:
        """End the sharing with a contact, who is told; raise UsageError."""
        self.loop_thread.call(self.runner.unshare, name)

    def unshare_and_tell(self, name: str, timeout_s: float) -> bool:
        """End the sharing, and return whether a relay has the word for the contact in time.

        It is also True if nobody needs to be told. Otherwise the contact learns of it as soon as
        it writes and this store is in use. Raises UsageError.
        """
        return self.loop_thread.wait(self.runner.unshare_and_tell(name, timeout_s))

    def forget(self, name: str) -> None:
        """Delete what is kept of a contact that has ended; raise UsageError for any other."""
        self.loop_thread.call(self.runner.forget, name)

    def move(self, name: str, relays: Relays | None = None) -> None:
        """Be reached by a contact through other relays from now on, or those of this runner.

        Raises UsageError, also where the contact has answered none of the last nine moves. The
        contact is told, through his own relays. Until he has written to the new address the others
        that he may know are polled.
        """
        self.loop_thread.call(self.runner.move, name, relays)

    def renew(self, name: str) -> None:
        """Replace the signing key that a contact knows, so that copies of this device are shut out.

        They are once the event `renewed` comes: then the contact has the new key. Until then this
        side repeats it while it runs. Raises UsageError before both know each other, while the last
        renewal is not answered, and for a contact that was made with an older app.
        """
        self.loop_thread.call(self.runner.renew, name)

    def renew_and_tell(self, name: str, timeout_s: float | None) -> bool:
        """Renew, or go on with a renewal; return whether the contact has the new key in time.

        Raises UsageError as `renew` does, and NotConnectedError if the sharing ends meanwhile.
        """
        return self.loop_thread.wait(self.runner.renew_and_tell(name, timeout_s))

    def verify(self, name: str, *, same: bool = True) -> None:
        """Mark that the comparison strings were the same, or not; raise UsageError."""
        self.loop_thread.call(self.runner.verify, name, same=same)

    def contacts(self) -> list[ContactRecord]:
        """Return the records of all contacts, tombstones left out.

        A record holds private keys: show its name and state.
        """
        return self.loop_thread.call(self.runner.contacts)

    def refusals(self, name: str) -> Mapping[str, int]:
        """Return how often something that came for a contact was refused, by a key of REASONS.

        Anybody who knows the link, or a mailbox, may have sent it. Raises UsageError.
        """
        return self.loop_thread.call(self.runner.refusals, name)

    def progress(self, name: str) -> Progress:
        """Return how it stands with a connection to a contact; raise UsageError."""
        return self.loop_thread.call(self.runner.progress, name)

    # -- What the runner asks of its face --------------------------------------------------

    def make_channel(self, contact: int, attempt_id: int) -> Channel:
        """Return a channel to a contact; for the runner."""
        return Channel(self.runner, self.loop_thread, contact, attempt_id)

    def tell(self, name: str, event: str) -> None:
        """Tell the app, from the thread of events; for the runner."""
        self._events.put((name, event))

    def _tell_on(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self.on_event(*event)
            except Exception:
                log.exception("on_event failed")


def _ignore(name: str, event: str) -> None:
    """Nobody wants to know of events."""
