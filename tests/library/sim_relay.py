"""Relays for the simulation: the real core, on a store that always has a question ready."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Mapping
from typing import TypeAlias

import connectoid_relay
from connectoid import CONTEXTS, Suite
from connectoid.encoding import encode_base64url

# A box that somebody has filled is another matter. There is a test for it:
# test_networks_that_do_not_connect_are_told_and_spend_no_relays_share.
NO_LIMITS = connectoid_relay.Limits(rate=0, max_box_messages=4_096)

SOURCE_SHARE = connectoid_relay.SOURCE_SHARE


Kept: TypeAlias = tuple[int, str, int, bytes]


class ReadyQuestions:
    """Questions sealed by the cheap suite, ready before a relay would make one itself."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        # Question, hash of the answer, when.
        self._made: dict[bytes, tuple[str, bytes, int]] = {}

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str:
        """Return the question of a box."""
        made = self._made.get(box)
        if made is None or made[2] <= made_after_us:
            answer = encode_base64url(self._suite.random(connectoid_relay.ANSWER_BYTES))
            sealed = self._suite.seal(
                encode_base64url(box), CONTEXTS["question"], answer.encode("ascii")
            )
            made = (encode_base64url(sealed), connectoid_relay.hash_answer(answer), now_us)
            self._made[box] = made
        return made[0]

    def answers(self, box: bytes) -> list[bytes]:
        """Return the hash of the last answer."""
        return [self._made[box][1]] if box in self._made else []


class ReadySqliteStore(connectoid_relay.SqliteStore):
    """The real store with those questions."""

    def __init__(self, suite: Suite) -> None:
        super().__init__(":memory:")
        self._ready = ReadyQuestions(suite)

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return a question in any case."""
        return self._ready.question(box, made_after_us, now_us)

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the answer to the last question."""
        return self._ready.answers(box)


class MemoryStore:
    """A store in dicts. Its questions are ready, so the relay makes none itself."""

    def __init__(self, suite: Suite) -> None:
        # At, data, expiry, source.
        self._messages: dict[bytes, list[Kept]] = collections.defaultdict(list)
        self._ready = ReadyQuestions(suite)
        self._boxes: dict[bytes, int] = {}
        self._time_us = 0

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Return nothing to hold."""
        return contextlib.nullcontext()

    def time_us(self) -> int:
        """Return the largest time of a write."""
        return self._time_us

    def put(
        self, message: connectoid_relay.Message, limits: connectoid_relay.Limits, now_us: int
    ) -> int:
        """Keep a message; raise NoRoom."""
        record = self._live(message.box, now_us)
        if len(record) >= limits.max_box_messages:
            raise connectoid_relay.NoRoom("box")
        share = limits.max_box_messages // SOURCE_SHARE
        if sum(source == message.source for *_, source in record) >= share:
            raise connectoid_relay.NoRoom("source")
        at_us = max(now_us, self._time_us + 1)
        self._time_us = at_us
        record.append((at_us, message.data, now_us + message.ttl_us, message.source))
        return at_us

    def _live(self, box: bytes, now_us: int) -> list[Kept]:
        record = self._messages[box]
        while record and record[0][2] <= now_us:
            del record[0]
        return record

    def look(self, box: bytes, at_us: int, now_us: int) -> connectoid_relay.Look:
        """Return whether there is something newer."""
        record = self._live(box, now_us)
        return connectoid_relay.Look(bool(record) and record[-1][0] > at_us, self._boxes.get(box))

    def messages(self, box: bytes, at_us: int, limit: int, now_us: int) -> list[tuple[int, str]]:
        """Return the newer messages."""
        return [(at, sealed) for at, sealed, *_ in self._live(box, now_us) if at > at_us][:limit]

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return nothing: nobody waits at this relay."""
        return after_us, set()

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return a question in any case."""
        return self._ready.question(box, made_after_us, now_us)

    def put_question(
        self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int
    ) -> str:
        """Fail: a real seal would make the simulation slow."""
        raise AssertionError("the relay made a question")

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the answer to the last question."""
        return self._ready.answers(box)

    def keep_boxes(
        self,
        expiries_us: Mapping[bytes, int],
        now_us: int,
        room_for: int = 0,
        *,
        soon: bool = False,
    ) -> None:
        """Keep expiries."""
        self._boxes.update(expiries_us)

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Count nothing."""

    def spent(self, now_us: int) -> dict[str, int]:
        """Return nothing."""
        return {}

    def stored(self) -> connectoid_relay.Stored:
        """Return nothing of interest."""
        return connectoid_relay.Stored(0, 0, 0)

    def sweep(self, now_us: int) -> bool:
        """Delete nothing: a look does."""
        return False

    def probe(self, now_us: int) -> None:
        """Be well."""

    def close(self) -> None:
        """Let go of nothing."""
