"""What goes to relays: for each contact and relay a queue, and a task while it has something.

A contact's messages stay in order; a dead relay holds up only what one contact sends there.

Whoever has read a link may name relays too: they get `used`. What goes to these strangers has a
Sender of its own. Nothing there is shared with what goes to contacts, so nothing can be used up.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from connectoid.clock import boot_time_s
from connectoid.complaints import Complaints
from connectoid.contact import Send
from connectoid.pauses import jittered, retry_s
from connectoid.relay_client import ON_BEHALF_OF, RelayClient, RelayError

# What could not be sent by then, the machine sends anew.
SEND_FOR_S = 45.0
# Of one contact at one relay. The oldest goes first: the machine repeats what matters.
MAX_LETTERS = 32
# Relays that one contact is written to at a time: two addresses of three mailboxes each, and two
# more. A contact could name new ones for ever. As many for the strangers with its link.
MAX_QUEUES_OF_CONTACT = 8
# Of all contacts together. Each takes a task and a socket, of which a process has 1,024.
MAX_QUEUES = 256
# Of the strangers with links of all contacts.
MAX_QUEUES_OF_STRANGERS = 64
# Relays that one contact names and that are new: so many at once, and then one in a while. Each
# costs a lookup and a TLS handshake, and a contact could name another one in each message.
MAX_NEW_RELAYS = MAX_QUEUES_OF_CONTACT
NEW_RELAY_EVERY_S = 60.0


class Letter(NamedTuple):
    """A message on its way, until when it is worth sending, and whether a relay has taken it."""

    send: Send
    until_s: float
    taken: asyncio.Future[bool]


class Acquaintance:
    """The relays that a contact is written to, and how many new ones it may still name."""

    def __init__(self) -> None:
        self._known: dict[str, None] = {}
        self._left = float(MAX_NEW_RELAYS)
        self._counted_s = boot_time_s()

    def takes(self, url: str) -> bool:
        """Return whether a relay is known, or may be new. Then it is known."""
        if url not in self._known and not self._takes_new():
            return False
        self._known.pop(url, None)
        self._known[url] = None
        if len(self._known) > MAX_QUEUES_OF_CONTACT:
            del self._known[next(iter(self._known))]
        return True

    def _takes_new(self) -> bool:
        now_s = boot_time_s()
        gained = (now_s - self._counted_s) / NEW_RELAY_EVERY_S
        self._left = min(MAX_NEW_RELAYS, self._left + gained)
        self._counted_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


# The contact's id and the relay's URL.
Key: TypeAlias = tuple[int, str]


class Sender:
    """Send messages, each for a while, and drop what cannot be sent.

    What goes to strangers is tried once, and what becomes of it is not told: nobody waits for it,
    and a stranger's relay would choose the words.
    """

    def __init__(
        self, client_of: Callable[[str], RelayClient], complaints: Complaints, *,
        to_strangers: bool = False, on_taken: Callable[[int, Send], None] | None = None,
    ) -> None:
        self._client_of = client_of
        self._complaints = complaints
        self._on_taken = on_taken
        self._is_to_contacts = not to_strangers
        self._max_queues = MAX_QUEUES
        if to_strangers:
            self._max_queues = MAX_QUEUES_OF_STRANGERS
        self._is_ending = False
        # Set to end pauses, and replaced.
        self._hurried = asyncio.Event()
        self._acquaintances: dict[int, Acquaintance] = {}
        self._queues: dict[Key, collections.deque[Letter]] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def send(self, contact: int, message: Send) -> None:
        """Begin to send a message of a contact; drop it for too many new relays."""
        url = message.mailbox.url
        if not self._acquaintances.setdefault(contact, Acquaintance()).takes(url):
            text = f"Contact {contact} names ever new relays: not all of them are asked."
            self._tell(text, contact)
            return
        key = (contact, url)
        queue = self._queues.get(key)
        if queue is None:
            self._make_room(contact)
            queue = collections.deque(maxlen=MAX_LETTERS)
            self._queues[key] = queue
        taken = asyncio.get_running_loop().create_future()
        queue.append(Letter(message, boot_time_s() + SEND_FOR_S, taken))
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._send_all(key), name=f"send to {key[1]}")

    def letters(self, contact: int) -> list[Letter]:
        """Return what waits to be sent for a contact."""
        return [letter for key, queue in self._queues.items() if key[0] == contact
                for letter in queue]

    def hurry(self) -> None:
        """Try again at once what has failed, unless a relay has asked for a pause."""
        self._hurried.set()
        self._hurried = asyncio.Event()

    async def finish(self, timeout_s: float) -> None:
        """Let what is queued go out, without another attempt for what fails; then end."""
        self._is_ending = True
        tasks = list(self._tasks.values())
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=timeout_s)
        finally:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _make_room(self, contact: int) -> None:
        """End the oldest queue of a contact that has as many as it may, or of who has most."""
        counts = collections.Counter(number for number, _ in self._queues)
        if counts[contact] >= MAX_QUEUES_OF_CONTACT:
            self._end_oldest(contact)
        elif len(self._queues) >= self._max_queues:
            ((greatest, _),) = counts.most_common(1)
            self._end_oldest(greatest)

    def _end_oldest(self, contact: int) -> None:
        key = next(key for key in self._queues if key[0] == contact)
        self._tasks[key].cancel()
        self._forget(key)

    async def _send_all(self, key: Key) -> None:
        ON_BEHALF_OF.set((self._is_to_contacts, key[0]))
        queue = self._queues[key]
        try:
            while queue:
                letter = queue.popleft()
                is_taken = False
                try:
                    is_taken = await self._send_one(key[0], letter)
                except Exception as error:
                    self._complaints.make(f"Sending to {key[1]} failed: {error!r}", error=error)
                letter.taken.set_result(is_taken)
                if is_taken and self._on_taken is not None:
                    self._on_taken(key[0], letter.send)
        finally:
            if self._queues.get(key) is queue:
                self._forget(key)

    async def _send_one(self, contact: int, letter: Letter) -> bool:
        """Send a letter; return whether the relay has taken it."""
        mailbox = letter.send.mailbox
        client = self._client_of(mailbox.url)
        began_s = boot_time_s()
        while True:
            try:
                await client.send(mailbox, letter.send.data)
                return True
            except RelayError as error:
                self._tell(str(error), contact)
                least_s = jittered(error.retry_s)
                pause_s = max(least_s, jittered(retry_s(boot_time_s() - began_s)))
            is_last = self._is_ending or not self._is_to_contacts
            if is_last or boot_time_s() + pause_s > letter.until_s:
                return False
            await self._pause(pause_s, least_s)

    async def _pause(self, pause_s: float, least_s: float) -> None:
        began_s = boot_time_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._hurried.wait()
        await asyncio.sleep(began_s + least_s - boot_time_s())

    def _tell(self, text: str, contact: int) -> None:
        if self._is_to_contacts:
            self._complaints.make(text, contact)

    def _forget(self, key: Key) -> None:
        self._queues.pop(key, None)
        self._tasks.pop(key, None)


async def is_one_taken(letters: Iterable[Letter], timeout_s: float) -> bool:
    """Return whether a relay takes one of these letters in time."""
    waits = [letter.taken for letter in letters]
    with contextlib.suppress(TimeoutError):
        for taken in asyncio.as_completed(waits, timeout=timeout_s):
            if await taken:
                return True
    return False
