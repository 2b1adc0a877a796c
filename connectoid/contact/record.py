"""The record of a contact: everything that survives the process, and its form as JSON.

PROTOCOL.md, "What to persist", says why each member is saved and for how long.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from connectoid.contact.rules import NUMBERED_FOR, PAIRING_STATES
from connectoid.encoding import load_json
from connectoid.errors import RecordError, Refused
from connectoid.links import Mailbox, parse_address

# The URL and the `ext` of each relay.
Relays: TypeAlias = tuple[tuple[str, str | None], ...]

RECORD_VERSION = 1
# What the user has to hear of the contact's key: nothing, that it is a new one, or that two devices
# have named one each.
KEY_NEWS = ("", "renewed", "copied")
_ADDRESSES = ("invited", "current", "pending")
# What older records lack. They have `relays_named` in place of `named_relays`, one address or none
# as `former`, and one `left_us` for all of them. None as `met` is all of the contact's address.
_LATER: Mapping[str, Any] = {
    "replaced": (), "named_relays": (), "relays_named": False, "renewal_hashes": (), "left_us": 0,
    "met": None}


@dataclass(frozen=True)
class OwnAddress:
    """An address of one's own, with the private keys of its mailboxes in their order."""

    address: str
    keys: tuple[str, ...] = field(repr=False)
    # The time when it was left for a newer one.
    left_us: int = 0

    @functools.cached_property
    def mailboxes(self) -> tuple[Mailbox, ...]:
        """Return the mailboxes of the address."""
        return parse_address(self.address, allow_http=True)

    @property
    def keyed_mailboxes(self) -> Iterable[tuple[Mailbox, str]]:
        """Return each mailbox with its private key."""
        return zip(self.mailboxes, self.keys, strict=True)


@dataclass(frozen=True)
class ContactRecord:
    """Everything that is saved of a contact. It holds private keys."""

    # "inviter" made the link, "opener" opened it.
    role: str
    # A key of PAIRING_STATES.
    state: str
    name: str
    # The relays for new addresses of one's own.
    relays: Relays
    # The signing key.
    private_key: str = field(repr=False)
    # Its public key.
    signer: str
    # The end of the invitation, or of the tombstone.
    expires_us: int
    invitation: str = field(repr=False)
    # The hash of the invitation. It outlives the invitation.
    link_hash: str = ""
    # The opener's hello, with its proof.
    hello: str = field(default="", repr=False)
    # The hash of the hello that counts.
    hello_hash: str = ""
    # The inviter's welcome.
    welcome: str = field(default="", repr=False)
    welcome_hash: str = ""
    # The inviter's R, in base64url.
    r: str = field(default="", repr=False)
    # The address in the link.
    invited: OwnAddress | None = None
    current: OwnAddress | None = None
    # Announced. Nothing has arrived there yet.
    pending: OwnAddress | None = None
    # Announced and replaced, the oldest first. The contact may know no newer address.
    replaced: tuple[OwnAddress, ...] = ()
    # Left for a newer one, the oldest first. Each is polled until another comes into use, 30 days
    # later.
    former: tuple[OwnAddress, ...] = ()
    # The time when the newest address was made, or when the current one came into use, if later.
    rotated_us: int = 0
    # The other's signing key.
    contact: str = ""
    contact_address: str = ""
    # The identifier of the app, if the link names one.
    app: str = ""
    # The version of the protocol that both speak.
    protocol: int = 1
    comparison: tuple[int, ...] = ()
    # The user has compared the string: both have the same. The mark belongs to the pair of
    # signing keys.
    verified: bool = False
    # The user has compared it, and the other has another one. Neither: not compared.
    differs: bool = False
    # The last number that was sent.
    seq: int = 0
    # The last number that was accepted.
    seen_seq: int = 0
    # The signing keys of other openers who were told that the link is used, the newest last.
    used_to: tuple[str, ...] = ()
    # The reason why the contact has ended: a key of EVENTS.
    why: str = ""
    # The URLs of relays that the user has named, and at which there are addresses of one's own. All
    # others are those of the link.
    named_relays: tuple[str, ...] = ()
    # The signing key before, which vouches for the present one until the contact has answered.
    old_private_key: str = field(default="", repr=False)
    old_signer: str = ""
    # The signing key in the link, once a renewal has replaced it. It answers who opens the link.
    link_private_key: str = field(default="", repr=False)
    link_signer: str = ""
    # The hashes of what has told the contact of the present one, the newest last. Who answers one
    # of them knows it.
    renewal_hashes: tuple[str, ...] = ()
    # The other's signing key before the present one.
    former_contact: str = ""
    # One of KEY_NEWS, until the user says that all is well.
    key_news: str = ""
    # The relays of the contact that were last written to as the user wanted: they know this device.
    met: tuple[str, ...] = ()

    def compared(self, *, same: bool) -> ContactRecord:
        """Return the record with what has come of comparing the string by voice.

        Who has found it the same has spoken with the contact, and nothing of its key is news.
        """
        key_news = self.key_news
        if same:
            key_news = ""
        return replace(self, verified=same, differs=not same, key_news=key_news)

    @property
    def addresses(self) -> list[OwnAddress]:
        """Return the addresses that are polled."""
        owns = (self.invited, self.pending, *self.replaced, self.current, *self.former)
        return [own for own in owns if own is not None]

    @property
    def private_keys(self) -> set[str]:
        """Return all private keys that the record holds."""
        boxes = {key for own in self.addresses for key in own.keys}
        signing = {self.private_key, self.old_private_key, self.link_private_key}
        return (signing | boxes) - {""}

    @property
    def signers(self) -> set[str]:
        """Return the public keys of all signing keys that the record holds."""
        return {self.signer, self.old_signer, self.link_signer} - {""}

    @property
    def is_link_key_idle(self) -> bool:
        """Return whether the contact takes nothing any more from the signing key in the link.

        Either it has heard of a newer one, or the sharing has ended.
        """
        if self.state == "unshared":
            return True
        return self.link_signer not in ("", self.old_signer)

    @property
    def is_moving(self) -> bool:
        """Return whether the contact still has to hear of other relays than those it writes to.

        Addresses that are replaced in time stay at their relays.
        """
        if self.pending is None or self.current is None:
            return False
        return _places(self.pending) != _places(self.current)

    def to_json(self) -> str:
        """Return the record as text."""
        # Not dataclasses.asdict: its deep copy costs as much as opening a message.
        members = {"version": RECORD_VERSION, **vars(self)}
        return json.dumps(members, ensure_ascii=False, default=_address_to_json)

    @classmethod
    def from_json(cls, text: str) -> ContactRecord:
        """Return the record in a text; raise RecordError."""
        try:
            members = load_json(text)
            if members.pop("version") != RECORD_VERSION:
                raise RecordError("A saved contact is of another version of Connectoid.")
            record = cls(**_members_from_json(members))
            record._check()
        except (ValueError, TypeError, KeyError, AttributeError, Refused):
            raise RecordError("A saved contact is damaged.") from None
        return record

    def _check(self) -> None:
        """Raise ValueError or Refused for a member of the wrong type, or an impossible value."""
        if self.role not in NUMBERED_FOR or self.state not in PAIRING_STATES:
            raise ValueError
        if self.key_news not in KEY_NEWS:
            raise ValueError
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if kind in ("str", "int", "bool") and type(value).__name__ != kind:
                raise ValueError(name)
        for own in self.addresses:
            if len(own.mailboxes) != len(own.keys) or type(own.left_us) is not int:
                raise ValueError


def _places(own: OwnAddress) -> list[tuple[str, str | None]]:
    """Return the relays of an address, each with its `ext`."""
    return [(mailbox.url, mailbox.ext) for mailbox in own.mailboxes]


def _address_to_json(own: OwnAddress) -> dict[str, Any]:
    members = {"address": own.address, "keys": own.keys}
    if own.left_us:
        return {**members, "left_us": own.left_us}
    return members


def _members_from_json(members: dict[str, Any]) -> dict[str, Any]:
    """Return the members with tuples and addresses in place of lists and objects."""
    members = {**_LATER, **members}
    members["relays"] = tuple((url, ext) for url, ext in members["relays"])
    if members.pop("relays_named"):
        members["named_relays"] = urls_of(members["relays"])
    if members["met"] is None:
        members["met"] = urls_at(members["contact_address"])
    for name in ("comparison", "used_to", "named_relays", "renewal_hashes", "met"):
        members[name] = tuple(members[name])
    for name in _ADDRESSES:
        own = members[name]
        if own is not None:
            members[name] = _address_from_json(own)
    if not isinstance(members["former"], list):
        members["former"] = [own for own in (members["former"],) if own is not None]
    left_us = members.pop("left_us")
    members["former"] = [{"left_us": left_us, **own} for own in members["former"]]
    for name in ("replaced", "former"):
        members[name] = tuple(_address_from_json(own) for own in members[name])
    return members


def urls_of(relays: Relays) -> tuple[str, ...]:
    """Return the URLs of relays."""
    return tuple(url for url, _ in relays)


def urls_at(address: str) -> tuple[str, ...]:
    """Return the URLs of the relays in an address, none for the one that is not known yet."""
    if not address:
        return ()
    return tuple(dict.fromkeys(box.url for box in parse_address(address, allow_http=True)))


def _address_from_json(own: dict[str, Any]) -> OwnAddress:
    return OwnAddress(own["address"], tuple(own["keys"]), own.get("left_us", 0))
