"""A desk: the two machines of a pair at rest, and the test is the wire."""

from __future__ import annotations

from collections.abc import Sequence

from fake_sdp import make_sdp
from harness import START_US
from sim_app import App
from sim_plan import HOUR_S, Plan
from sim_run import Run
from sim_suite import unseal

from connectoid import Contact, Effect, Gather, Message, Now, Send, Write, read_jws

# The monotonic time when a desk begins.
BEFORE_S = 1e6


class Desk:
    """Hold the two machines of a pair that knows each other. Nothing goes on between them."""

    def __init__(self, relays: int = 1) -> None:
        run = Run(Plan(seed=1, relays=relays))
        run.play()
        self.ring = run.world.ring
        self.now_s = 0.0
        self.apps = run.world.apps
        self.alice, self.bob = (self.restart(run.world.apps[name]) for name in ("alice", "bob"))
        for contact in (self.alice, self.bob):
            self.check(contact)

    @staticmethod
    def restart(app: App) -> Contact:
        """Return the machine of a program that has just started."""
        assert app.saved
        return Contact(app.suite, app.saved)

    @property
    def now(self) -> Now:
        """Return the time, an hour after the pair has met."""
        return Now(START_US + round((HOUR_S + self.now_s) * 1e6), BEFORE_S + self.now_s)

    def check(self, contact: Contact, *batches: list[Effect], only: str = "") -> list[Effect]:
        """Deliver messages to a machine, from one relay or from all; return its effects."""
        boxes: dict[str, list[tuple[int, str]]] = {
            poll.mailbox.pub: []
            for poll in contact.polls(self.now)
            if only in ("", poll.mailbox.url)
        }
        for place, sent in enumerate(
            effect for batch in batches for effect in batch if isinstance(effect, Send)
        ):
            if sent.mailbox.pub in boxes:
                boxes[sent.mailbox.pub].append((round(self.now_s * 1e6) + place + 1, sent.data))
        return contact.polled(self.now, boxes)

    def kinds(self, effects: list[Effect]) -> list[str]:
        """Return the types of the messages among effects, each once for all its mailboxes."""
        return [message.type for message in self.messages(effects)]

    def messages(self, effects: list[Effect]) -> list[Message]:
        """Return the messages among effects."""
        sent = [effect for effect in effects if isinstance(effect, Send)]
        texts = [unseal(self.ring, self.apps["bob"].suite, one) for one in sent]
        return [read_jws(text) for text in dict.fromkeys(texts)]

    def offer(self) -> list[Effect]:
        """Let Bob ask for a connection; return his effects."""
        self.bob.connect(self.now)
        return self.gather(self.bob, "offer")

    def gather(self, contact: Contact, kind: str) -> list[Effect]:
        """Give a machine the SDP that it gathers."""
        attempt_id = contact.attempt.attempt_id
        return contact.gathered(self.now, attempt_id, make_sdp(kind, f"attempt {attempt_id}"))

    def open_channel(self) -> list[Effect]:
        """Bring both to an open channel with a new offer; return Bob's effects."""
        self.bob.disconnect(self.now)
        self.check(self.alice, self.offer())
        self.check(self.bob, self.gather(self.alice, "answer"))
        self.alice.channel_opened(self.now, self.alice.attempt.attempt_id)
        return self.bob.channel_opened(self.now, self.bob.attempt.attempt_id)

    def hear(self, octets: bytes) -> list[Effect]:
        """Let Alice find octets in the channel."""
        return self.alice.channel_message(self.now, self.alice.attempt.attempt_id, octets)

    def tick(self, contact: Contact, now_s: float) -> list[Effect]:
        """Let it be a certain second."""
        self.now_s = now_s
        return contact.tick(self.now)


def gathers(effects: list[Effect]) -> list[Gather]:
    """Return the Gathers among effects."""
    return [effect for effect in effects if isinstance(effect, Gather)]


def written(effects: Sequence[Effect]) -> list[bytes]:
    """Return the messages to write on the channel."""
    return [effect.octets for effect in effects if isinstance(effect, Write)]
