"""Errors of the library, and the reasons for refusing a message.

UsageError is the app's mistake, LinkError the user's. RecordError is a damaged record. Refused is
the fault of others: it is counted and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

# PROTOCOL.md, "Reading a message", says which check has which reason.
REASONS: Mapping[str, str] = {
    "encoding": "not canonical base64url without padding",
    "seal": "not sealed to this mailbox with this context string",
    "padding": "the plaintext has no allowed size, a wrong length, or something in its padding",
    "jws": "not three parts with the one header (a hello has a fourth)",
    "payload": "not JSON with the members and forms of its type",
    "sdp": "an offer or answer that is not that of one data channel, within bounds",
    "unexpected": "a type that has no place in this state or from this side",
    "recipient": "`to` is not the address that this mailbox belongs to",
    "proof": "a hello without the secret of the link, or a new key that has not signed for itself",
    "commitment": "a signing key and `r` that do not match the link",
    "reply": "`re` is not the hash of what was sent",
    "sender": "`from` is not the contact's signing key",
    "replaced": "signed by a key that the contact has replaced: it came late, or from a copy",
    "replay": "a `seq` that is not larger than the last one, or the very bytes again",
    "ahead": "a `seq` that is a day ahead of this device's clock: one of the two clocks is wrong",
    "signature": "not signed by `from`",
    "copied": "a new key of the contact beside another one: somebody has a copy of its device",
    "address": "an address that nobody should write to",
    "app": "of another app, or for another one",
    "version": "no version of the protocol that both sides speak",
    "channel": "the other end of the channel could not show whose it is",
}

# The reasons for which nothing is wrong: copies of a message wait in each mailbox and are read
# again each hour, and what the contact's former key has signed may come late.
ROUTINE = frozenset({"replay", "replaced"})


class ConnectoidError(Exception):
    """The base of all errors of the library."""


class UsageError(ConnectoidError):
    """A call that makes no sense in this state, or data that fits in no message."""


class LinkError(ConnectoidError):
    """A link that cannot be used; its text tells the user what to do."""


class OtherAppError(LinkError):
    """A link of another app: the user opens it there."""


class UnsupportedVersionError(LinkError):
    """A link of a later version of the protocol: the user needs a newer app."""


class RecordError(ConnectoidError):
    """A saved record that is damaged, or of another version."""


class Refused(ConnectoidError):
    """Input from outside that failed a check; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or REASONS[reason])
        self.reason = reason
