"""Connect two copies of a peer-to-peer app through nothing but a link.

One user's app makes an invitation, which travels as a link through any messenger; the other's
opens it. From then on the two find each other through relays that can read nothing, and connect
directly. PROTOCOL.md says what goes over the wire.

An app uses Connectoid or AsyncConnectoid, which do all that follows. Below them is Contact, which
does no I/O and knows no clock:

    alice, todo = Contact.invite(suite, now, "Bob", [("https://relay.example.com/", None)])
    link = make_link("https://app.example.com/", alice.record.invitation)
    bob, todo = Contact.open(suite, now, "Alice", read_link(link))
    # What a check has found:
    todo = bob.polled(now, {pub: [(at, data), ...]})

Each call takes the time and returns what to do, in order: Save before anything leaves, then Send,
Gather, Join, Write, Close for the wire and for WebRTC, and Tell for the app. connectoid.contact
has the theory.
"""

from __future__ import annotations

from connectoid.aio import AsyncConnectoid
from connectoid.blocking import Connectoid
from connectoid.channel import AsyncChannel, Channel, NotConnectedError
from connectoid.comparison import EMOJI, comparison_string
from connectoid.contact import (
    CONNECTING,
    EVENTS,
    PAIRING,
    Close,
    Contact,
    ContactRecord,
    Effect,
    Forget,
    Gather,
    Join,
    Now,
    OwnAddress,
    Poll,
    Privacy,
    Rule,
    Save,
    Send,
    Tell,
    Write,
)
from connectoid.errors import (
    REASONS,
    ROUTINE,
    ConnectoidError,
    LinkError,
    OtherAppError,
    RecordError,
    Refused,
    UnsupportedVersionError,
    UsageError,
)
from connectoid.ice import Ice, check_ice_servers, load_ice_servers
from connectoid.links import (
    Invitation,
    Mailbox,
    format_address,
    make_link,
    parse_address,
    parse_invitation,
    read_link,
)
from connectoid.messages import Message, open_message, read_jws, seal_message, sign_jws
from connectoid.relay_client import RelayClient, RelayError
from connectoid.runner import Progress
from connectoid.shown import shown
from connectoid.store import Store, StoreError
from connectoid.suite import CONTEXTS, Suite, SystemSuite, app_of_contact, hash_jws, prove
from connectoid.webrtc import AiortcAdapter, WebRTC

__version__ = "0.2.0"

__all__ = [
    "CONNECTING",
    "CONTEXTS",
    "EMOJI",
    "EVENTS",
    "PAIRING",
    "REASONS",
    "ROUTINE",
    "AiortcAdapter",
    "AsyncChannel",
    "AsyncConnectoid",
    "Channel",
    "Close",
    "Connectoid",
    "ConnectoidError",
    "Contact",
    "ContactRecord",
    "Effect",
    "Forget",
    "Gather",
    "Ice",
    "Invitation",
    "Join",
    "LinkError",
    "Mailbox",
    "Message",
    "NotConnectedError",
    "Now",
    "OtherAppError",
    "OwnAddress",
    "Poll",
    "Privacy",
    "Progress",
    "RecordError",
    "Refused",
    "RelayClient",
    "RelayError",
    "Rule",
    "Save",
    "Send",
    "Store",
    "StoreError",
    "Suite",
    "SystemSuite",
    "Tell",
    "UnsupportedVersionError",
    "UsageError",
    "WebRTC",
    "Write",
    "app_of_contact",
    "check_ice_servers",
    "comparison_string",
    "format_address",
    "hash_jws",
    "load_ice_servers",
    "make_link",
    "open_message",
    "parse_address",
    "parse_invitation",
    "prove",
    "read_jws",
    "read_link",
    "seal_message",
    "shown",
    "sign_jws",
]
