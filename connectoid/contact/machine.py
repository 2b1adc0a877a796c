"""The working state of a contact, and the few ways in which it changes.

The functions of this package take a Machine as their first argument. They append to `effects`
and change the record with `keep`. This module knows no type of message and no rule.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from connectoid.burst import Burst
from connectoid.contact.effects import REPEATABLE, Effect, Now, Privacy, Save, Tell
from connectoid.contact.record import ContactRecord, OwnAddress, Relays
from connectoid.contact.rules import LASTING, Rule
from connectoid.errors import UsageError
from connectoid.limits import (
    ACTIVE_S,
    BURST_PER_S,
    MAX_BURST_MESSAGES,
    MAX_NEWLY_TOLD,
    MAX_RENEWAL_ANSWERS,
    POLL_FAST_FOR_S,
    REPEAT_S,
    TELL_EVERY_S,
    ZERO_EVERY_S,
)
from connectoid.messages import Message
from connectoid.suite import Suite


@dataclass(frozen=True)
class Attempt:
    """One attempt to connect, for one peer connection."""

    state: str = "apart"
    since_s: float = -math.inf
    # The deadline of the state.
    late_s: float = math.inf
    attempt_id: int = 0
    # The hash of the message that is being answered.
    cause: str | None = None
    # The hashes of the messages with the offer and with the answer.
    offer: str = ""
    answer: str = ""
    # The hash of this side's message that is out, with an offer, an answer or a call, and whether
    # a relay has taken it.
    out: str = ""
    is_taken: bool = False
    challenge: bytes = field(default=b"", repr=False)
    # This side has answered the other's challenge.
    replied: bool = False


@dataclass
class Box:
    """The state of one mailbox, since the process began."""

    # The cursor: the largest `at` that was read. It is -1 before the first check.
    at: int = -1
    # The times of the last read to the end, and of the last one from 0.
    read_s: float = -math.inf
    from_zero_s: float = -math.inf
    # The check in progress is from 0.
    asks_zero: bool = False
    # The number of messages found in it since the last check from 0.
    held: int = 0
    # The messages that it has brought lately.
    burst: Burst = field(default_factory=lambda: Burst(BURST_PER_S))
    # It has brought too many, and is not checked before then.
    rests_until_s: float = -math.inf

    def is_due_from_zero(self, now_s: float) -> bool:
        """Return whether the next check has to be from 0: the first one, then one an hour."""
        return self.at < 0 or now_s - self.from_zero_s >= ZERO_EVERY_S

    def note_read(self, now_s: float, ats: Sequence[int]) -> None:
        """Note a check that has read the mailbox to its end."""
        if self.asks_zero or self.at < 0:
            self.asks_zero = False
            self.from_zero_s = now_s
            self.held = 0
        self.held += len(ats)
        self._note_burst(now_s, len(ats))
        self.read_s = now_s
        self.at = max(0, self.at, *ats)

    def _note_burst(self, now_s: float, messages: int) -> None:
        """Let a mailbox rest that brings more than a contact sends.

        Whether they are good is not asked. Each costs a decryption, and whoever may write to a
        mailbox, or runs its relay, could choose messages that count as good.
        """
        self.burst.note(messages, now_s)
        lately = self.burst.left(now_s)
        if lately > MAX_BURST_MESSAGES:
            self.rests_until_s = now_s + lately / BURST_PER_S

    def rests(self, now_s: float) -> bool:
        """Return whether it is not to be checked yet."""
        return now_s < self.rests_until_s


class Unread(NamedTuple):
    """A message as it was found, where, the key that opens it, and whether it is fresh."""

    data: str
    own: OwnAddress
    key: str
    fresh: bool


class Received(NamedTuple):
    """A message, the address that it came to, and whether it is fresh."""

    message: Message
    own: OwnAddress
    fresh: bool


class Machine:
    """The state of one contact. `record` outlives the process, everything else ends with it."""

    def __init__(self, suite: Suite, record: ContactRecord, *, allow_http: bool) -> None:
        self.suite = suite
        self.allow_http = allow_http
        self.record = record
        self.attempt = Attempt()

        # The step in progress.
        self.now = Now(0, -math.inf)
        self.effects: list[Effect] = []

        # The record was forgotten. Nothing is saved any more.
        self.gone = False

        # What the app wants of all connections, and the last offer or call that waits for its wish.
        self.privacy = Privacy()

        # Returns relays as a new address may show them: an API key may have got two halves.
        self.as_shown: Callable[[Relays], Relays] = _as_they_are
        self.asked: str | None = None

        # The app's wish to connect, and the times that set the pace.
        self.wanted = False
        self.active_until_s = -math.inf
        self.fast_until_s = -math.inf
        self.next_begin_s = -math.inf

        # The earliest time of the next `moved` or `unshare` that nobody has asked for.
        self.next_word_s = -math.inf

        # Attempts in a row in which both answered and no channel came.
        self.failed = 0

        # The app was told that no relay takes what is out, since it wanted to connect.
        self.told_unsent = False

        # The times of the last welcome, used and unshare that were sent as replies.
        self.repeated_s: dict[str, float] = {}

        # The answers to `renew` that went out lately.
        self.renewal_answers = Burst(1 / REPEAT_S)

        # The times when the events of REPEATABLE were told last.
        self.told_s: dict[str, float] = {}

        # The times when keys were told for the first time that the link is used, the newest last.
        self.newly_told_s: collections.deque[float] = collections.deque(maxlen=MAX_NEWLY_TOLD)

        # The mailboxes by their public keys.
        self.boxes: dict[str, Box] = {}

        # Digests of the messages that were read, the oldest first.
        self.seen: dict[bytes, None] = {}

        # What is not read yet of the round, and what is read and waits to be taken.
        self.unread: collections.deque[Unread] = collections.deque()
        self.untaken: collections.deque[Received] = collections.deque()

        # A `renew` of the round that has passed its checks. It counts if no other has another key.
        self.vouched: Received | None = None

        # The numbered messages of the round. Only the newest may ask for a connection.
        self.round: list[Received] = []

        # Refused messages by reason.
        self.dropped: collections.Counter[str] = collections.Counter()

        # For debugging: rules taken as (state, event, next state).
        self.taken: collections.Counter[tuple[str, str, str]] = collections.Counter()

    @contextlib.contextmanager
    def step(self, now: Now) -> Iterator[list[Effect]]:
        """Run a step and yield its effects. If the record changes, Save becomes the first.

        A UsageError restores the record and the attempt.
        """
        record = self.record
        attempt = self.attempt
        self.now = now
        self.effects = []
        try:
            yield self.effects
        except UsageError:
            self.record = record
            self.attempt = attempt
            raise
        if self.record is not record and not self.gone:
            self.effects.insert(0, Save(self.record))
        self._forget_keys_of(record)

    def _forget_keys_of(self, before: ContactRecord) -> None:
        """Let the suite forget what was used before the step and is not any more."""
        if self.record is before and not self.gone:
            return
        used = set() if self.gone else self.record.private_keys
        for key in before.private_keys - used:
            self.suite.forget(key)

    def follow(self, rule: Rule, *brought: Any) -> str:
        """Apply a rule to the arguments of its event; return the next state."""
        state = rule.does(self, *brought)
        if state not in rule.then:
            raise RuntimeError(f"{rule.state} on {rule.event} cannot lead to {state}")
        self.taken[rule.state, rule.event, state] += 1
        return state

    # -- Changes -------------------------------------------------------------------------

    def keep(self, **changes: Any) -> None:
        """Change the record. The effects of the step will begin with a Save."""
        record = replace(self.record, **changes)
        if record != self.record:
            self.record = record

    def set_attempt(self, **changes: Any) -> None:
        """Change the attempt."""
        self.attempt = replace(self.attempt, **changes)

    def late_in(self, seconds: float) -> None:
        """Set the deadline of the attempt's state."""
        self.set_attempt(late_s=self.now.monotonic_s + seconds)

    def tell(self, event: str) -> None:
        """Tell the app a key of EVENTS. What others can repeat at will is told seldom."""
        if event not in REPEATABLE or self.may_tell(event):
            self.effects.append(Tell(event))

    def poll_fast(self) -> None:
        """Check often for a while, as something was sent or received."""
        self.fast_until_s = self.now.monotonic_s + POLL_FAST_FOR_S

    def be_active(self) -> None:
        """Repeat attempts without long pauses for a while."""
        self.active_until_s = self.now.monotonic_s + ACTIVE_S

    def may_repeat(self, kind: str) -> bool:
        """Return whether a reply of this type may go out now. If so, it counts as sent."""
        last_s = self.repeated_s.get(kind, -math.inf)
        if self.now.monotonic_s - last_s < REPEAT_S:
            return False
        self.repeated_s[kind] = self.now.monotonic_s
        return True

    def may_answer_renewal(self) -> bool:
        """Return whether one more answer to a `renew` may go out now. If so, it counts."""
        now_s = self.now.monotonic_s
        if self.renewal_answers.left(now_s) > MAX_RENEWAL_ANSWERS - 1:
            return False
        self.renewal_answers.note(1, now_s)
        return True

    def may_tell(self, event: str) -> bool:
        """Return whether an event may be told again now. If so, it counts as told."""
        if self.now.monotonic_s - self.told_s.get(event, -math.inf) < TELL_EVERY_S:
            return False
        self.told_s[event] = self.now.monotonic_s
        return True

    def may_tell_another(self) -> bool:
        """Return whether another key may be told now that the link is used. If so, it counts."""
        told_s = self.newly_told_s
        if len(told_s) == MAX_NEWLY_TOLD and self.now.monotonic_s - told_s[0] < REPEAT_S:
            return False
        told_s.append(self.now.monotonic_s)
        return True

    def tell_wish(self) -> None:
        """Tell the app once a minute that the contact waits for it, unless that is at its end."""
        if self.record.relays and self.may_repeat("wants_to_connect"):
            self.tell("wants_to_connect")

    # -- Queries -------------------------------------------------------------------------

    def box(self, pub: str) -> Box:
        """Return the state of a mailbox, by its public key."""
        return self.boxes.setdefault(pub, Box())

    @property
    def is_behind(self) -> bool:
        """Return whether something of the round is not taken yet."""
        return bool(self.unread or self.untaken)

    @property
    def is_active(self) -> bool:
        """Return whether attempts are still repeated without long pauses."""
        return self.now.monotonic_s < self.active_until_s

    @property
    def is_renewing(self) -> bool:
        """Return whether the contact still has to hear of a new signing key."""
        return bool(self.record.old_signer) and self.record.state == "paired"

    @property
    def is_leaving(self) -> bool:
        """Return whether the contact, if known, has to hear that the sharing has ended."""
        return self.record.state == "unshared" and bool(self.record.contact)

    @property
    def has_news(self) -> bool:
        """Return whether the contact has to hear of what it cannot know but from this side."""
        return self.is_renewing or self.is_leaving

    @property
    def must_ask(self) -> bool:
        """Return whether the app has to want a connection before the contact is answered."""
        return self.privacy.ask_first and not self.wanted

    @property
    def known_relays(self) -> set[str]:
        """Return the relays that know this device: one's own for this contact, and those met."""
        own = {mailbox.url for own in self.record.addresses for mailbox in own.mailboxes}
        return own.union(self.record.met)

    def may_write(self, url: str, *, is_to_stranger: bool) -> bool:
        """Return whether a message may go to a relay, which learns where this device is.

        Where the app asks first, a relay that is newly named gets only what the contact has to
        hear. A wish to connect with the contact is none to write to strangers.
        """
        must_ask = self.must_ask and not self.has_news
        if is_to_stranger:
            must_ask = self.privacy.ask_first
        return not must_ask or url in self.known_relays

    @property
    def wants_attempt(self) -> bool:
        """Return whether to begin an attempt, once its time has come."""
        return self.lacks_connection and self.attempt.state == "apart"

    @property
    def lacks_connection(self) -> bool:
        """Return whether a connection is wanted and may be made, and there is none."""
        is_wanted = self.wanted or self.record.state in LASTING
        return (
            is_wanted and can_connect(self.record) and self.attempt.state != "connected")


def _as_they_are(relays: Relays) -> Relays:
    return relays


def can_connect(record: ContactRecord) -> bool:
    """Return whether the state of the pairing allows an attempt to connect."""
    return record.state == "paired" or record.state in LASTING
