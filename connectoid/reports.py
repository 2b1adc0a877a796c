"""What WebRTC reports: data goes to the app, and all else to the machine of the contact."""

from __future__ import annotations

import contextlib
from typing import Any

from connectoid.carrier import AppChannel, Carrier
from connectoid.channel import FULL, TOO_LARGE, WRONG, is_too_large
from connectoid.complaints import Complaints
from connectoid.contact import Contact
from connectoid.line import Lines
from connectoid.roster import Roster
from connectoid.steps import Steps
from connectoid.store import StoreError

# What is said of a connection that brought what it must not.
REFUSED = {"refused": WRONG, "too_large": TOO_LARGE}


class Reports:
    """Take reports, and refuse connections that bring what they must not."""

    def __init__(
        self, roster: Roster, complaints: Complaints, carrier: Carrier, steps: Steps, lines: Lines,
    ) -> None:
        self._roster = roster
        self._complaints = complaints
        self._carrier = carrier
        self._steps = steps
        self._lines = lines

    def take(self, number: int, event: str, attempt_id: int, value: Any) -> None:
        """Take a report of an attempt: `webrtc.WebRTC` lists them. It never raises."""
        channel = self._carrier.channels.get(number)
        # Here, behind every adapter; and before the channel is proven as well.
        if event == "message" and is_too_large(value):
            event = "too_large"
        if event in REFUSED:
            self._refuse(number, attempt_id, REFUSED[event])
            return
        if event == "message" and channel is not None and channel.attempt_id == attempt_id:
            # This is the way of all data: no machine.
            self._pass_on(number, channel, value)
            return
        contact = self._roster.contacts.get(number)
        if contact is None or self._carrier.is_stopped:
            return
        if event == "trouble":
            self._complaints.make(str(value), number)
            return
        with contextlib.suppress(StoreError):
            self._hear(number, contact, event, attempt_id, value)

    def _hear(
        self, number: int, contact: Contact, event: str, attempt_id: int, value: Any,
    ) -> None:
        """Give a contact what WebRTC says of an attempt; raise StoreError."""
        match event:
            case "gathered":
                self._steps.make(number, contact.gathered, attempt_id, value)
            case "opened":
                self._steps.make(number, contact.channel_opened, attempt_id)
            case "message":
                # A machine takes no text: empty, it is refused.
                octets = b""
                if isinstance(value, bytes):
                    octets = value
                self._steps.make(number, contact.channel_message, attempt_id, octets)
            case "silent":
                self._steps.make(number, contact.channel_silent, attempt_id)
                # A check that waits may do so in a network that has gone.
                self._lines.wake()
            case "closed":
                self._steps.make(number, contact.channel_closed, attempt_id)

    def _pass_on(self, number: int, channel: AppChannel, message: bytes | str) -> None:
        if channel.is_full:
            self._refuse(number, channel.attempt_id, FULL)
        else:
            channel.take(message)

    def _refuse(self, number: int, attempt_id: int, why: str) -> None:
        """Close a connection that brought what it must not, unless a newer one is there."""
        contact = self._roster.contacts.get(number)
        if contact is None or contact.attempt.attempt_id != attempt_id:
            return
        self._complaints.make(f"{self._roster.names[number]}: {why}", number)
        channel = self._carrier.channels.get(number)
        if channel is not None and channel.attempt_id == attempt_id:
            channel.end(why)
        with contextlib.suppress(StoreError):
            self._steps.make(number, contact.disconnect)
        self._carrier.end_channel(number)
