"""Class Contact: the public face of the machine. Each method is one event and one step."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

from connectoid.apps import check_app
from connectoid.contact import connecting, inbox, outbox, pairing, renewal, rotation
from connectoid.contact.effects import Effect, Now, Poll, Privacy, Save
from connectoid.contact.machine import Attempt, Machine
from connectoid.contact.record import ContactRecord, urls_of
from connectoid.errors import LinkError, Refused, UsageError
from connectoid.limits import (
    INVITATION_US,
    POLL_FAST_FOR_S,
    POLL_FAST_S,
    POLL_SLOW_S,
    ZERO_EVERY_S,
)
from connectoid.links import Invitation, Mailbox
from connectoid.messages import room_for_sdp
from connectoid.sdp import trim_sdp
from connectoid.suite import Suite, check_address

# Messages that are read or taken in one step: each costs an operation with a key, or several. All
# other contacts wait for a step, about 20 ms.
MAX_STEP_MESSAGES = 16

NOTHING: Mapping[str, Sequence[tuple[int, str]]] = {}


class Contact:
    """One contact: events and the time go in, effects come out. It raises only UsageError.

    The method of an event takes the time and returns the effects, in order.
    """

    def __init__(self, suite: Suite, record: ContactRecord, *, allow_http: bool = False) -> None:
        self.machine = Machine(suite, record, allow_http=allow_http)

    # -- Beginnings ----------------------------------------------------------------------

    @classmethod
    def invite(
        cls,
        suite: Suite,
        now: Now,
        name: str,
        relays: Iterable[tuple[str, str | None]],
        *,
        lifetime_us: int = INVITATION_US,
        allow_http: bool = False,
        app: str = "",
    ) -> tuple[Contact, list[Effect]]:
        """Return a new contact with `record.invitation` for a link, and the effects.

        Raise UsageError for bad relays, or an identifier of the app without its form.
        """
        record = pairing.make_invitation(
            suite,
            name,
            tuple(relays),
            expires_us=now.wall_us + lifetime_us,
            allow_http=allow_http,
            app=check_app(app),
        )
        contact = cls(suite, record, allow_http=allow_http)
        contact.machine.fast_until_s = now.monotonic_s + POLL_FAST_FOR_S
        for own in record.addresses:
            rotation.note_new(contact.machine, own, now)
        return contact, [Save(record)]

    @classmethod
    def open(
        cls,
        suite: Suite,
        now: Now,
        name: str,
        invitation: Invitation,
        *,
        relays: Iterable[tuple[str, str | None]] = (),
        allow_http: bool = False,
        app: str = "",
    ) -> tuple[Contact, list[Effect]]:
        """Return a new contact from an invitation, and the effects.

        Call this after the user has confirmed, as chat programs open links too. Without relays
        those of the link are used. Raise LinkError, or UsageError for bad relays.
        """
        try:
            mailboxes = check_address(suite, invitation.address, allow_http=allow_http)
        except Refused as error:
            raise LinkError(f"This link is damaged: {error}. Copy it again, whole.") from None
        named = tuple(relays)
        relays = named or tuple((mailbox.url, mailbox.ext) for mailbox in mailboxes)
        record = pairing.take_invitation(
            suite,
            name,
            relays,
            invitation,
            expires_us=now.wall_us + INVITATION_US,
            allow_http=allow_http,
            named_relays=urls_of(named),
            app=check_app(app),
        )
        contact = cls(suite, record, allow_http=allow_http)
        return contact, [Save(record), *contact.connect(now)]

    # -- Events from the app -------------------------------------------------------------

    def connect(self, now: Now) -> list[Effect]:
        """Want a connection."""
        machine = self.machine
        with machine.step(now) as effects:
            machine.wanted = True
            machine.failed = 0
            machine.told_unsent = False
            machine.be_active()
            connecting.turn(machine, "begin")
            outbox.repeat_held_welcome(machine)
        return effects

    def disconnect(self, now: Now) -> list[Effect]:
        """Want no connection, and close the present one."""
        machine = self.machine
        with machine.step(now) as effects:
            machine.wanted = False
            machine.active_until_s = -math.inf
            connecting.turn(machine, "stop")
        return effects

    def network_changed(self, now: Now) -> list[Effect]:
        """Begin anew if a connection is wanted and there is none: this device is elsewhere now."""
        machine = self.machine
        with machine.step(now) as effects:
            if machine.lacks_connection:
                machine.failed = 0
                machine.told_unsent = False
                connecting.begin_anew(machine)
        return effects

    def relay_is_back(self, now: Now) -> list[Effect]:
        """Begin anew, at most once a minute, unless the other has what may lead to a connection.

        An offer that was made before may lack the addresses that STUN servers tell.
        """
        machine = self.machine
        with machine.step(now) as effects:
            states = ["apart"]
            if self.record.role == "opener":
                states += ["gathering", "waiting"]
            may_begin = machine.lacks_connection and self.attempt.state in states
            if may_begin and machine.may_repeat("begin"):
                connecting.begin_anew(machine)
        return effects

    def unshare(self, now: Now) -> list[Effect]:
        """End the sharing: delete the name, close the connection, tell the other for 30 days.

        Raise UsageError if it has ended.
        """
        machine = self.machine
        with machine.step(now) as effects:
            if not pairing.is_possible(machine, "leave"):
                raise UsageError("The sharing is ended already.")
            connecting.turn(machine, "stop")
            pairing.pair(machine, "leave")
        return effects

    def verify(self, now: Now, *, same: bool = True) -> list[Effect]:
        """Note what has come of comparing the string by voice: the same, or another one.

        The same also means that a new key of the contact is no news any more (`key_news`).
        Raise UsageError while there is none.
        """
        with self.machine.step(now) as effects:
            if not self.record.comparison:
                raise UsageError("There is nothing to compare yet: the other has not answered.")
            self.machine.record = self.record.compared(same=same)
        return effects

    def move(self, now: Now, relays: Iterable[tuple[str, str | None]]) -> list[Effect]:
        """Use other relays from now on, and tell the contact; raise UsageError for bad ones."""
        machine = self.machine
        with machine.step(now) as effects:
            if machine.record.state not in ("ready", "paired"):
                raise UsageError("Share again: a link holds the relays that it was made with.")
            rotation.rotate(machine, tuple(relays))
            rotation.note_named(machine)
            machine.wanted = True
            machine.be_active()
            connecting.turn(machine, "stop")
            connecting.turn(machine, "begin")
        return effects

    def renew(self, now: Now) -> list[Effect]:
        """Have a new signing key, which shuts out every copy of this device from before.

        Raise UsageError unless both know each other, with apps that know how, and the contact has
        answered the last renewal.
        """
        machine = self.machine
        with machine.step(now) as effects:
            renewal.begin(machine)
            machine.next_word_s = -math.inf
            outbox.announce_if_due(machine)
        return effects

    # -- Time ----------------------------------------------------------------------------

    def tick(self, now: Now) -> list[Effect]:
        """Act on the time. Call this at the start, and again at `next_tick_s`."""
        machine = self.machine
        with machine.step(now) as effects:
            pairing.check_expiry(machine)
            if self._owes_welcome:
                outbox.send_welcome(machine, None)
            if now.monotonic_s >= machine.attempt.late_s:
                connecting.turn(machine, "late")
            elif machine.wants_attempt and now.monotonic_s >= machine.next_begin_s:
                connecting.turn(machine, "begin")
            outbox.announce_if_due(machine)
        return effects

    @property
    def _owes_welcome(self) -> bool:
        """Return whether the process ended before the welcome could go out."""
        record = self.record
        return record.state == "welcomed" and not record.welcome and self.attempt.state == "apart"

    @property
    def next_tick_s(self) -> float:
        """Return the time of the next `tick` by the monotonic clock, at most in an hour."""
        machine = self.machine
        next_s = min(machine.attempt.late_s, machine.now.monotonic_s + ZERO_EVERY_S)
        if machine.wants_attempt:
            next_s = min(next_s, machine.next_begin_s)
        if machine.has_news:
            next_s = min(next_s, machine.next_word_s)
        return next_s

    # -- Events from WebRTC --------------------------------------------------------------

    def gathered(self, now: Now, attempt_id: int, sdp: Mapping[str, str] | None) -> list[Effect]:
        """Take the offer or answer of a Gather, or None if WebRTC failed.

        Raise UsageError for one that fits in no message, or is not that of a data channel.
        """
        with self.machine.step(now) as effects:
            if attempt_id == self.attempt.attempt_id:
                connecting.turn(self.machine, "gathered", self._trimmed(sdp))
        return effects

    def _trimmed(self, sdp: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """Return an offer or answer that fits into a message with the addresses of both sides."""
        if sdp is None:
            return None
        address_chars = len(self.record.contact_address) + rotation.longest_address(self.machine)
        text = trim_sdp(
            sdp["sdp"], most_bytes=room_for_sdp(address_chars),
            relay_only=self.privacy.relay_only)
        return {**sdp, "sdp": text}

    def channel_opened(self, now: Now, attempt_id: int) -> list[Effect]:
        """Send a challenge on the open data channel."""
        with self.machine.step(now) as effects:
            if attempt_id == self.attempt.attempt_id:
                connecting.turn(self.machine, "channel")
        return effects

    def channel_message(self, now: Now, attempt_id: int, octets: bytes) -> list[Effect]:
        """Take a binary message of the channel. After `connected` they belong to the app."""
        machine = self.machine
        with machine.step(now) as effects:
            if attempt_id == machine.attempt.attempt_id:
                connecting.turn(machine, "octets", octets)
                if self.is_connected and pairing.is_possible(machine, "proven"):
                    pairing.pair(machine, "proven")
        return effects

    def channel_silent(self, now: Now, attempt_id: int) -> list[Effect]:
        """Notice that the other end does not answer: it may be in another network, and say so."""
        with self.machine.step(now) as effects:
            if attempt_id == self.attempt.attempt_id and self.is_connected:
                self.machine.poll_fast()
        return effects

    def channel_closed(self, now: Now, attempt_id: int) -> list[Effect]:
        """Notice that the channel is closed."""
        with self.machine.step(now) as effects:
            if attempt_id == self.attempt.attempt_id:
                connecting.turn(self.machine, "closed")
        return effects

    # -- Relays --------------------------------------------------------------------------

    def polls(self, now: Now, url: str | None = None) -> list[Poll]:
        """Return the checks to make (at one relay), at most `poll_gap_s` apart.

        They count as made, so make all of them. A mailbox that rests has none.
        """
        return inbox.list_polls(self.machine, now, url)

    def poll_gap_s(self, now: Now) -> float:
        """Return the seconds between two checks. At POLL_FAST_S a long poll may replace them."""
        if now.monotonic_s < self.machine.fast_until_s:
            return POLL_FAST_S
        return POLL_SLOW_S

    def polled(self, now: Now, boxes: Mapping[str, Sequence[tuple[int, str]]]) -> list[Effect]:
        """Take the result of a round of checks: (at, data) for each mailbox read to its end.

        Leave out a mailbox that could not be read to its end.
        """
        with self.machine.step(now) as effects:
            inbox.note_round(self.machine, boxes)
            inbox.go_on(self.machine)
        return effects

    def polled_in_part(
        self, now: Now, boxes: Mapping[str, Sequence[tuple[int, str]]] = NOTHING,
    ) -> list[Effect]:
        """Take MAX_STEP_MESSAGES of a round, so that no step takes long.

        Call it without boxes while `is_behind`. What this contact is asked meanwhile counts at
        once.
        """
        with self.machine.step(now) as effects:
            inbox.note_round(self.machine, boxes)
            inbox.go_on(self.machine, MAX_STEP_MESSAGES)
        return effects

    def sent(self, now: Now, message_hash: str) -> list[Effect]:
        """Notice that a relay has taken a Send, by the hash of its message."""
        with self.machine.step(now) as effects:
            connecting.take_receipt(self.machine, message_hash)
        return effects

    # -- Queries -------------------------------------------------------------------------

    @property
    def record(self) -> ContactRecord:
        """Return the record. It holds private keys."""
        return self.machine.record

    @property
    def privacy(self) -> Privacy:
        """Return what the app wants of all connections; it may be set."""
        return self.machine.privacy

    @privacy.setter
    def privacy(self, privacy: Privacy) -> None:
        self.machine.privacy = privacy

    @property
    def attempt(self) -> Attempt:
        """Return the attempt to connect."""
        return self.machine.attempt

    @property
    def is_connected(self) -> bool:
        """Return whether the channel belongs to the app."""
        return self.attempt.state == "connected"

    @property
    def mailboxes(self) -> list[Mailbox]:
        """Return the mailboxes that are polled."""
        return [mailbox for own in self.record.addresses for mailbox in own.mailboxes]

    @property
    def again_s(self) -> float:
        """Return the time of the next attempt to connect by the monotonic clock; or infinity."""
        if self.machine.wants_attempt:
            return self.machine.next_begin_s
        return math.inf

    @property
    def is_behind(self) -> bool:
        """Return whether something of the last round is not taken yet."""
        return self.machine.is_behind

    @property
    def dropped(self) -> collections.Counter[str]:
        """Return the numbers of refused messages by reason, a key of REASONS."""
        return self.machine.dropped

    def resting(self, now: Now) -> list[Mailbox]:
        """Return the mailboxes that are not checked for a while: they have brought too much."""
        return [
            mailbox for mailbox in self.mailboxes
            if self.machine.box(mailbox.pub).rests(now.monotonic_s)
        ]

    def brought_lately(self, now: Now, url: str) -> float:
        """Return how many messages the mailboxes at a relay have brought lately."""
        boxes = [self.machine.box(mailbox.pub) for mailbox in self.mailboxes if mailbox.url == url]
        return sum(box.burst.left(now.monotonic_s) for box in boxes)

    def rest_s(self, now: Now, url: str) -> float:
        """Return the seconds until a mailbox at a relay has rested, infinity if none rests."""
        ends_s = [
            self.machine.box(mailbox.pub).rests_until_s
            for mailbox in self.resting(now) if mailbox.url == url
        ]
        return min(ends_s, default=math.inf) - now.monotonic_s
