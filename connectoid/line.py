"""A line: the task that polls one relay, for all contacts who have mailboxes there.

    learn -> check (waits at the relay, unless woken) -> read, contact by contact -> rest -> check

A relay that has failed is asked without waiting, so that it is known at once when it is back.
A line begins with the first mailbox at a relay and is ended with the last. What one contact's
mailboxes cost is bounded by a Budget, and what fails for one is no failure of the others. A mailbox
that brings more than an app sends rests, and the others do not. What all together cost is bounded
by a Burst: above it, those are read that have brought least.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from connectoid.burst import Burst
from connectoid.clock import boot_time_s
from connectoid.complaints import Complaints
from connectoid.contact import ContactRecord, Poll
from connectoid.errors import ConnectoidError
from connectoid.ice import has_stun
from connectoid.limits import (
    GATHERED_S,
    MAX_RELAY_MESSAGES,
    POLL_SLOW_S,
    RELAY_MESSAGES_PER_S,
)
from connectoid.pauses import CHECK_EVERY_S, jittered, retry_s
from connectoid.relay_client import (
    MAX_BATCH_CHECKS,
    Boxed,
    Budget,
    Checked,
    RelayClient,
    RelayError,
    RelayRefusalError,
    UnreachableError,
    check_mailboxes,
    read_mailbox,
)
from connectoid.roster import ContactPoll, Roster
from connectoid.store import StoreError
from connectoid.turn import Loans, TurnServer, lends_turn

# Of a long poll: what a relay takes at most.
WAIT_S = 60
# Relays that are asked at a time. Each takes a socket, and a process has 1,024 of them. Where
# there are more, whoever has the last place asks without waiting, and the others take turns.
MAX_LINES = 128
# How long an offer waits to hear which servers all relays have, once one has answered.
LEARN_S = 1.0
# How long it waits for TURN servers to be lent: two requests.
LEND_S = 3.0


class ReadBox(NamedTuple):
    """A mailbox that was read, and what was in it."""

    poll: Poll
    messages: Boxed


# Gives a contact what was read.
Take = Callable[[int, Sequence[ReadBox]], Awaitable[None]]


class Host(NamedTuple):
    """What lines call: who gets what was read, whose relays are the user's own, which is back."""

    take: Take
    is_named: Callable[[str], bool]
    is_back: Callable[[str], None]


class Line:
    """Poll one relay until cancelled.

    `has_stun` and `lends_turn` are false until it has said so, and `learned` is set as long as it
    has. `answers` is set from an answer to a failure.
    """

    def __init__(
        self, client: RelayClient, roster: Roster, complaints: Complaints,
        places: asyncio.Semaphore, host: Host,
    ) -> None:
        self.has_stun = False
        self.lends_turn = False
        self.learned = asyncio.Event()
        self.answers = asyncio.Event()
        self._loans = Loans(client, roster.suite)
        self._client = client
        self._url = client.url
        self._roster = roster
        self._complaints = complaints
        self._places = places
        self._host = host
        # Since when it fails; None while it does not.
        self._fails_since_s: float | None = None
        # The mailboxes at the last round, and those that were left for the next.
        self._known: frozenset[str] = frozenset()
        self._left: set[str] = set()
        # What all mailboxes have brought lately, and whether it was too much for the last round.
        self._burst = Burst(RELAY_MESSAGES_PER_S)
        self._is_behind = False
        # From the start of this round to that of the next, at least.
        self._least_s = CHECK_EVERY_S
        # A pause goes on that was meant for an idle time.
        self._is_slow = False
        self._woken = asyncio.Event()
        # The time-out of a check that waits at the relay. Waking sets it off.
        self._waiting: asyncio.Timeout | None = None

    def wake(self) -> None:
        """Let a check begin as soon as it may, in place of one that waits."""
        self._woken.set()
        if self._waiting is not None:
            self._waiting.reschedule(0)
            self._waiting = None

    def notice(self) -> None:
        """Wake if what is to be polled has changed, or is to be polled sooner."""
        is_hurried = self._is_slow and self._roster.poll_gap_s() < POLL_SLOW_S
        if is_hurried or not self._roster.mailboxes(self._url) <= self._known:
            self.wake()

    async def run(self) -> None:
        """Poll for ever; whatever fails only makes the pauses longer."""
        while True:
            began_s = boot_time_s()
            self._least_s = CHECK_EVERY_S
            try:
                await self._learn()
                pause_s = await self._poll()
            except Exception as error:
                self._note_failure(error)
                pause_s = jittered(retry_s(self._note_silence(began_s)))
            self._tell_of_floods()
            pause_s = max(pause_s, self._least_s)
            self._is_slow = self._fails_since_s is None and pause_s > CHECK_EVERY_S
            await self._rest(began_s, pause_s)
            self._is_slow = False

    async def _note_answer(self) -> None:
        """Note that it answers. If it is back, say so, and ask for the servers that offers need."""
        has_failed = self._fails_since_s is not None
        self._fails_since_s = None
        self.answers.set()
        if has_failed:
            self._host.is_back(self._url)
            await self._learn()

    def _note_silence(self, began_s: float) -> float:
        """Note a round without an answer; return the seconds since the first of them began."""
        self.learned.clear()
        self.answers.clear()
        if self._fails_since_s is None:
            self._fails_since_s = began_s
        return boot_time_s() - self._fails_since_s

    async def _rest(self, began_s: float, pause_s: float) -> None:
        """Wait for the rest of a pause. Waking shortens it to what a relay asks for at least."""
        try:
            async with asyncio.timeout(max(0.0, began_s + pause_s - boot_time_s())):
                await self._woken.wait()
        except TimeoutError:
            return
        await asyncio.sleep(max(0.0, began_s + self._least_s - boot_time_s()))

    def _note_failure(self, error: Exception) -> None:
        """Tell of a failure, and leave a relay the pause that it has asked for."""
        self._complain(error)
        self._least_s = max(self._least_s, _retry_s(error))

    def _tell_of_floods(self) -> None:
        """Say what is known of mailboxes that bring more than an app sends.

        One of them may be flooded by its contact, or by whoever has read a link. Those of several
        contacts, which nobody else has been told, are flooded by the relay, or by each of these
        contacts.
        """
        flooded = self._roster.flooded(self._url, told=False)
        if len(self._roster.flooded(self._url, told=True)) > 1:
            self._complaints.make(
                f"{self._url} brings more messages for several contacts than their apps send:"
                " it is faulty, or they are. Their mailboxes are asked seldom.", self._url)
        elif flooded:
            name = self._roster.names[flooded[0]]
            self._complaints.make(
                f"{self._url} brings more messages for {name} than an app sends: somebody floods"
                " that mailbox, or the relay is faulty. It is asked seldom.", flooded[0])

    async def _learn(self) -> None:
        """Ask what the relay says of itself, until it has said it, and anew after each failure.

        What answers first may be a network where users have to log in, and a relay that comes back
        may have other servers. One that only others have named is not asked (GUARD-7).
        """
        if self.learned.is_set() or not self._host.is_named(self._url):
            return
        try:
            document = await self._client.document()
            self.has_stun = has_stun(document)
            self.lends_turn = lends_turn(document)
            self.learned.set()
            self.answers.set()
        except UnreachableError as error:
            self._complain(error)
            # Then the check does not wait: once it is answered, the servers can be asked for.
            self._note_silence(boot_time_s())
        except Exception as error:
            self._complain(error)
            # Something is there. The next check says whether it is a relay.
            self.answers.set()

    async def renew_loan(self, number: int) -> None:
        """Ask for the TURN servers that a contact may use; what fails is complained of."""
        proof = self._roster.proof(number, self._url)
        if proof is None or not self.lends_turn:
            return
        try:
            await self._loans.renew(proof)
        except RelayError as error:
            self._complain(error)

    def lent(self, number: int) -> TurnServer | None:
        """Return the TURN servers that are lent for a contact, if any."""
        proof = self._roster.proof(number, self._url)
        if proof is None:
            return None
        return self._loans.of(proof)

    def _complain(self, error: Exception) -> None:
        """Say what relays and disks do; anything else is a fault of this program."""
        if isinstance(error, RelayError | StoreError):
            self._complaints.make(str(error), self._url)
        else:
            text = f"The line to {self._url} failed: {error!r}"
            self._complaints.make(text, self._url, error=error)

    async def _poll(self) -> float:
        """Check all mailboxes and read those with messages; return the pause after it."""
        polls = self.polls_in_turn()
        # Longer than until then neither a check waits nor the pause: a mailbox may be due again.
        rest_s = self._roster.rest_s(self._url)
        self._known = frozenset(self._roster.mailboxes(self._url))
        self._is_behind = False
        self._woken.clear()
        parts = [
            polls[start:start + MAX_BATCH_CHECKS]
            for start in range(0, len(polls), MAX_BATCH_CHECKS)
        ]
        for part in parts:
            wait_s = 0
            if len(parts) == 1 and self._fails_since_s is None:
                wait_s = math.ceil(min(WAIT_S, rest_s))
            checked = await self._check(part, wait_s)
            if checked is None:
                return CHECK_EVERY_S
            await self._read(part, checked)
        if polls:
            await self._note_answer()
        if self._is_behind:
            return CHECK_EVERY_S
        rest_s = min(rest_s, self._roster.rest_s(self._url))
        return max(CHECK_EVERY_S, min(self._roster.poll_gap_s(), rest_s))

    async def _check(self, polls: Sequence[ContactPoll], wait_s: int) -> list[Checked] | None:
        """Return what a relay says of mailboxes, None if this line was woken meanwhile."""
        async with self._places:
            if self._places.locked() or self._woken.is_set():
                wait_s = 0
            try:
                async with asyncio.timeout(None) as timeout:
                    if wait_s:
                        self._waiting = timeout
                    return await check_mailboxes(
                        self._client, [poll for _, poll in polls], wait_s)
            except TimeoutError:
                return None
            finally:
                self._waiting = None

    async def _read(self, polls: Sequence[ContactPoll], checked: Sequence[Checked]) -> None:
        """Read mailboxes, contact by contact.

        What a relay refuses for one, or what cannot be saved, is no failure of the others: it is
        raised (RelayError, StoreError) if all have failed. A relay that is broken ends the round.
        """
        errors: list[ConnectoidError] = []
        has_read = False
        numbered = zip(polls, checked, strict=True)
        for number, group in itertools.groupby(numbered, key=_number_of):
            if self._burst.left(self._roster.now_s()) >= MAX_RELAY_MESSAGES:
                self._fall_behind()
                break
            boxes = await self._read_contact([one for _, one in group], errors)
            if not boxes:
                continue
            try:
                await self._host.take(number, boxes)
                has_read = True
            except StoreError as error:
                errors.append(error)
        if errors and not has_read:
            raise max(errors, key=_retry_s)
        for failure in errors:
            self._note_failure(failure)

    def polls_in_turn(self) -> list[ContactPoll]:
        """Return the checks to make, of contacts first that have brought least lately.

        So those who write much hold up nobody who writes little.
        """
        return sorted(self._roster.polls(self._url), key=self._brought_lately)

    def _brought_lately(self, poll: ContactPoll) -> float:
        return self._roster.brought_lately(poll.number, self._url)

    def _fall_behind(self) -> None:
        """Leave the rest of a round to the next ones, and say so."""
        self._is_behind = True
        self._complaints.make(
            f"{self._url} brings more messages than can be read at once. The rest is read bit by"
            " bit; if this goes on, the relay is faulty.", self._url)

    async def _read_contact(
        self, checked: Iterable[Checked], errors: list[ConnectoidError],
    ) -> list[ReadBox]:
        """Read the mailboxes of one contact, those first that were left over the last time."""
        boxes: list[ReadBox] = []
        budget = Budget()
        for one in sorted(checked, key=self._was_read):
            pub = one.poll.mailbox.pub
            if budget.is_spent:
                self._left.add(pub)
                continue
            self._left.discard(pub)
            try:
                messages = await read_mailbox(self._roster.suite, self._client, one, budget)
                boxes.append(ReadBox(one.poll, messages))
            except RelayRefusalError as error:
                errors.append(error)
        self._burst.note(budget.opened, self._roster.now_s())
        return boxes

    def _was_read(self, checked: Checked) -> bool:
        return checked.poll.mailbox.pub not in self._left


class Lines:
    """Have a line to each relay with mailboxes of our contacts, and to no other."""

    def __init__(
        self, client_of: Callable[[str], RelayClient], roster: Roster, complaints: Complaints,
        host: Host,
    ) -> None:
        self._client_of = client_of
        self._roster = roster
        self._complaints = complaints
        self._host = host
        self._places = asyncio.Semaphore(MAX_LINES)
        self._lines: dict[str, Line] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def draw(self) -> None:
        """Begin and end lines as the contacts' mailboxes come and go; have the others look."""
        urls = self._roster.urls()
        for url in self._lines.keys() - urls:
            del self._lines[url]
            self._tasks.pop(url).cancel()
        for url in urls:
            if url in self._lines:
                self._lines[url].notice()
            else:
                self._add(url)

    def wake(self) -> None:
        """Let all check at once that wait for something else than a relay wants."""
        for line in self._lines.values():
            line.wake()

    def with_stun(self) -> set[str]:
        """Return the URLs of the relays with a STUN server, as far as that is known."""
        return {url for url, line in self._lines.items() if line.has_stun}

    async def learn(self, number: int, record: ContactRecord) -> None:
        """Wait until one's own relays for a contact have said which servers they have, and lent.

        One of them has to answer, or nothing could come in that replies to an offer. Another one
        that does not do it in time has none, for now. PROTOCOL.md, CONNECT-14 and CONNECT-18.
        """
        # Those of a new contact have no lines yet.
        self.draw()
        own = [url for url, _ in record.relays if self._host.is_named(url)]
        lines = [self._lines[url] for url in own if url in self._lines]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHERED_S):
                await _hear_from(lines)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEND_S):
                await asyncio.gather(*(line.renew_loan(number) for line in lines))

    def lent(self, number: int) -> dict[str, TurnServer]:
        """Return the TURN servers that are lent for a contact, by the URLs of the relays."""
        servers = {url: line.lent(number) for url, line in self._lines.items()}
        return {url: server for url, server in servers.items() if server is not None}

    async def end(self) -> None:
        """End all lines."""
        tasks = list(self._tasks.values())
        self._lines.clear()
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _add(self, url: str) -> None:
        line = Line(
            self._client_of(url), self._roster, self._complaints, self._places, self._host)
        # A line that is noted has a task, whatever fails.
        self._tasks[url] = asyncio.create_task(line.run(), name=f"line to {url}")
        self._lines[url] = line


async def _hear_from(lines: Sequence[Line]) -> None:
    """Wait until a relay answers, and a moment for the others. Without lines there is no wait.

    What answers may turn out in that moment to be none.
    """
    while lines:
        await _wait_for_first(line.answers for line in lines)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEARN_S):
                await asyncio.gather(*(line.learned.wait() for line in lines))
        if any(line.answers.is_set() for line in lines):
            return


async def _wait_for_first(events: Iterable[asyncio.Event]) -> None:
    """Wait until one of some events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _number_of(pair: tuple[ContactPoll, Checked]) -> int:
    return pair[0].number


def _retry_s(error: Exception) -> float:
    """Return the pause that a relay has asked for, a little longer."""
    if isinstance(error, RelayError):
        return jittered(error.retry_s)
    return 0.0
