"""The contacts of one store: the machine of each, its name, and its record as it was saved last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from connectoid.contact import Contact, ContactRecord, Now, Poll, Privacy
from connectoid.contact.record import Relays
from connectoid.errors import UsageError
from connectoid.limits import NO_AT, POLL_SLOW_S
from connectoid.shown import UNPRINTABLE, shown
from connectoid.store import Store
from connectoid.suite import Suite

# The URL, the API key or whatever the relay wants in `ext`, and of a key with two halves the one
# that only sends.
Relay: TypeAlias = tuple[str, str | None] | tuple[str, str | None, str | None]


class ContactPoll(NamedTuple):
    """A mailbox to check, and the id of the contact that it is for."""

    number: int
    poll: Poll


class OwnKeys:
    """Know the API keys of this side: its addresses have the half of each that only sends.

    They belong to the app's settings and are never saved. PROTOCOL.md, ADDRESS-12.
    """

    def __init__(self) -> None:
        # By URL and the half that sends, and the other way round.
        self._keys: dict[tuple[str, str | None], str | None] = {}
        self._send_keys: dict[tuple[str, str | None], str] = {}

    def in_addresses(self, relays: Iterable[Relay]) -> Relays:
        """Return relays as addresses have them, and remember the owner's halves."""
        addresses = []
        for url, key, *halves in relays:
            send_key = key
            if halves and halves[0] is not None:
                send_key = halves[0]
                self._keys[url, send_key] = key
                self._send_keys[url, key] = send_key
            addresses.append((url, send_key))
        return tuple(addresses)

    def out_of_addresses(self, relays: Relays) -> Relays:
        """Return relays for a new address: a key that has got two halves stays here from now on."""
        return tuple((url, self._send_keys.get((url, ext), ext)) for url, ext in relays)

    def put_into(self, poll: Poll) -> Poll:
        """Return a check with the owner's half in place of the one in the address."""
        mailbox = poll.mailbox
        place = (mailbox.url, mailbox.ext)
        if place not in self._keys:
            return poll
        return dataclasses.replace(poll, mailbox=mailbox._replace(ext=self._keys[place]))


class Roster:
    """Hold contacts by their ids, which are those of the store."""

    def __init__(
        self, store: Store, suite: Suite, now: Callable[[], Now], *, allow_http: bool,
    ) -> None:
        self.suite = suite
        self.own_keys = OwnKeys()
        self._store = store
        self._now = now
        self._allow_http = allow_http
        self._saved = store.load()
        self._privacy = Privacy()
        self.contacts = {number: self._machine(record) for number, record in self._saved.items()}
        # A tombstone has no name any more, and events still tell of it.
        self.names = {number: record.name for number, record in self._saved.items()}

    @property
    def privacy(self) -> Privacy:
        """Return what the app wants of all connections; it may be set."""
        return self._privacy

    @privacy.setter
    def privacy(self, privacy: Privacy) -> None:
        self._privacy = privacy
        for contact in self.contacts.values():
            contact.privacy = privacy

    # -- Names ---------------------------------------------------------------------------

    def number_of(self, name: str) -> int:
        """Return the id of a contact; raise UsageError."""
        for number, contact in self.contacts.items():
            if contact.record.name == name:
                return number
        raise UsageError(f"There is no contact {name!r}.")

    def with_link(self, link_hash: str) -> Contact | None:
        """Return the contact that a link has made."""
        for contact in self.contacts.values():
            if contact.record.link_hash == link_hash:
                return contact
        return None

    def make_free(self, name: str) -> None:
        """Let a new contact have a name: one that has ended gives it up; raise UsageError."""
        if not shown(name) or UNPRINTABLE.search(name):
            raise UsageError("A contact needs a name, of characters that can be shown.")
        for number, contact in list(self.contacts.items()):
            if contact.record.name != name:
                continue
            if contact.record.state != "ended":
                raise UsageError(f"There is a contact {name!r} already.")
            self.delete(number)

    def records(self) -> list[ContactRecord]:
        """Return the records of all contacts, tombstones left out."""
        records = [contact.record for contact in self.contacts.values()]
        return [record for record in records if record.state != "unshared"]

    # -- What is saved; each raises StoreError -------------------------------------------

    def add(self, contact: Contact) -> int:
        """Save a new contact and return its id."""
        number = self._store.add(contact.record)
        self._equip(contact)
        self._saved[number] = contact.record
        self.contacts[number] = contact
        self.names[number] = contact.record.name
        return number

    def save(self, number: int, record: ContactRecord) -> None:
        """Save what has changed of a contact."""
        self._store.save(number, record)
        self._saved[number] = record

    def delete(self, number: int) -> None:
        """Delete a contact."""
        self._store.delete(number)
        del self._saved[number], self.contacts[number], self.names[number]

    def restore(self, number: int) -> None:
        """Go back to what was saved last: nothing that follows from anything later may leave."""
        if number in self._saved:
            self.contacts[number] = self._machine(self._saved[number])

    def forget_unused(self, number: int, keys: Iterable[str]) -> None:
        """Let the suite forget keys that a contact gave up while a line still read with them."""
        contact = self.contacts.get(number)
        used = set() if contact is None else contact.record.private_keys
        for key in keys:
            if key not in used:
                self.suite.forget(key)

    def _machine(self, record: ContactRecord) -> Contact:
        contact = Contact(self.suite, record, allow_http=self._allow_http)
        self._equip(contact)
        return contact

    def _equip(self, contact: Contact) -> None:
        """Give a contact what is a matter of the app's settings, and in no record."""
        contact.privacy = self._privacy
        contact.machine.as_shown = self.own_keys.out_of_addresses

    # -- Mailboxes -----------------------------------------------------------------------

    def urls(self) -> set[str]:
        """Return the relays with mailboxes of these contacts."""
        return {mailbox.url for contact in self.contacts.values() for mailbox in contact.mailboxes}

    def named_relays(self) -> set[str]:
        """Return the URLs of the relays that the user has named for a contact."""
        return {
            url
            for contact in self.contacts.values()
            for url in contact.record.named_relays
        }

    def mailboxes(self, url: str) -> set[str]:
        """Return the keys of all mailboxes at a relay."""
        return {
            mailbox.pub
            for contact in self.contacts.values()
            for mailbox in contact.mailboxes
            if mailbox.url == url
        }

    def polls(self, url: str) -> list[ContactPoll]:
        """Return the checks to make at a relay, contact by contact; call it only to make them."""
        now = self._now()
        return [
            ContactPoll(number, self.own_keys.put_into(poll))
            for number, contact in self.contacts.items()
            for poll in contact.polls(now, url)
        ]

    def flooded(self, url: str, *, told: bool) -> list[int]:
        """Return the ids of contacts with a mailbox at a relay that brings more than an app sends.

        `told` asks for the mailboxes that only the contact has been told, so not those of links.
        """
        now = self._now()
        flooded = []
        for number, contact in self.contacts.items():
            invited = contact.record.invited
            public = set()
            if told and invited is not None:
                public = set(invited.mailboxes)
            if any(box.url == url and box not in public for box in contact.resting(now)):
                flooded.append(number)
        return flooded

    def proof(self, number: int, url: str) -> Poll | None:
        """Return a mailbox that a contact has at a relay, with its key; None if it has none."""
        contact = self.contacts.get(number)
        if contact is None:
            return None
        for own in contact.record.addresses:
            for mailbox, key in own.keyed_mailboxes:
                if mailbox.url == url:
                    return self.own_keys.put_into(Poll(mailbox, key, NO_AT))
        return None

    def now_s(self) -> float:
        """Return the time by the clock of the contacts that never steps."""
        return self._now().monotonic_s

    def brought_lately(self, number: int, url: str) -> float:
        """Return how many messages a contact's mailboxes at a relay have brought lately."""
        contact = self.contacts.get(number)
        if contact is None:
            return 0.0
        return contact.brought_lately(self._now(), url)

    def poll_gap_s(self) -> float:
        """Return the seconds between two checks at a relay."""
        now = self._now()
        gaps_s = [contact.poll_gap_s(now) for contact in self.contacts.values()]
        return min(gaps_s, default=POLL_SLOW_S)

    def rest_s(self, url: str) -> float:
        """Return the seconds until a mailbox at a relay has rested, infinity if none rests."""
        now = self._now()
        return min((one.rest_s(now, url) for one in self.contacts.values()), default=math.inf)
