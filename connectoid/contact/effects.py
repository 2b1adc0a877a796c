"""Input and output of a machine: the time, the effects, the checks to make.

The runner executes the effects of a step in order. Each may fail. Only a failed Save matters: the
runner then drops the Contact and makes another from the record on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from connectoid.contact.record import ContactRecord
from connectoid.limits import MAX_SEQ, RELEASE_US
from connectoid.links import Mailbox


class Now(NamedTuple):
    """The time by two clocks: the wall clock, and a clock that never steps."""

    # Since 1970.
    wall_us: int
    monotonic_s: float

    @property
    def is_set(self) -> bool:
        """Return whether the wall clock shows a time that can be true."""
        return RELEASE_US <= self.wall_us < MAX_SEQ // 2


class Privacy(NamedTuple):
    """What an app wants of all connections; contacts learn nothing of it.

    `relay_only`: contacts are told no address but those of TURN servers. `ask_first`: a contact who
    wants to connect is told no address at all before the app wants to connect too, and nothing goes
    to a relay that is newly named.
    """

    relay_only: bool = False
    ask_first: bool = False


class Save(NamedTuple):
    """Write the record down, durably, before anything that follows."""

    record: ContactRecord


class Forget(NamedTuple):
    """Delete the record: nothing is left to do for it."""


class Send(NamedTuple):
    """Send `data` to a mailbox: the contact's, or a stranger's who has opened the link too.

    Once a relay has taken it, `Contact.sent` gets the hash of the message that is in it.
    """

    mailbox: Mailbox
    data: str
    is_to_stranger: bool = False
    message_hash: str = ""


class Gather(NamedTuple):
    """Replace the peer connection by a new one, and make an offer or answer the given one.

    The result goes to `Contact.gathered`.
    """

    attempt_id: int
    offer: Mapping[str, str] | None


class Join(NamedTuple):
    """Give the answer to the peer connection."""

    attempt_id: int
    answer: Mapping[str, str]


class Write(NamedTuple):
    """Send one binary message on the data channel."""

    attempt_id: int
    octets: bytes


class Close(NamedTuple):
    """Close the peer connection, if there is one."""

    attempt_id: int


class Tell(NamedTuple):
    """Tell the app: a key of EVENTS."""

    event: str


Effect: TypeAlias = Save | Forget | Send | Gather | Join | Write | Close | Tell

EVENTS: Mapping[str, str] = {
    "paired": "Both know each other now. The emoji can be compared.",
    "connected": "The channel is open, and the other end has shown whose it is.",
    "wants_to_connect": "The contact would like to connect, and waits until this side does too.",
    "disconnected": "The channel is closed.",
    "opened_twice": (
        "Somebody else opened this link too. "
        "Compare the emoji by voice before you trust this contact."
    ),
    "flooded": (
        "Somebody fills the mailbox of this link. "
        "If nobody opens it soon, share again with a new link."
    ),
    "needs_newer_app": (
        "Somebody with this link has a newer app. "
        "If the two of you do not connect, update this one."
    ),
    "refused": (
        "Something that came for this contact was refused and changed nothing: `refusals` says why."
    ),
    "renewed": (
        "The contact knows the new key of this side, "
        "and takes nothing any more from copies of this device from before."
    ),
    "contact_renewed": (
        "The contact has a new key, and its former one counts no more. If it has not asked for "
        "that, somebody has a copy of its device: unshare, and share again."
    ),
    "copied": (
        "Two devices say that they are this contact: somebody has a copy of its device. "
        "End the contact, and share again."
    ),
    "used": "This link was used by somebody else, or withdrawn; ask for a new one.",
    "expired": "Nobody answered for as long as the link was good; share again.",
    "unshared": "The other has ended the sharing.",
    "unsent": (
        "No relay takes what this side sends to the contact. "
        "Another attempt is made from time to time."
    ),
    "unanswered": "No answer yet. Another attempt is made from time to time.",
    "unreachable": (
        "Both answered, but their networks do not connect: they may need a TURN server."
    ),
}


# Anybody with the link brings the first three about, and the contact the last one.
REPEATABLE = frozenset({"opened_twice", "flooded", "needs_newer_app", "contact_renewed"})


@dataclass(frozen=True)
class Poll:
    """A mailbox to check from `at`. The key opens its question and its messages."""

    mailbox: Mailbox
    key: str = field(repr=False)
    at: int
