"""A new signing key in place of the old one: making, announcing and accepting it.

The old key vouches for the new one, in `renew`, and signs nothing else any more. The new key signs
all else from the start, and `renew` goes ahead of it until the contact has answered one of these
messages. Then the old key is deleted. So it never matters which of the two keys the contact knows.

PROTOCOL.md, "Renewal".
"""

from __future__ import annotations

import hashlib

from connectoid.contact import rotation
from connectoid.contact.machine import Machine, Received
from connectoid.encoding import decode_base64url, encode_base64url
from connectoid.errors import Refused, UsageError
from connectoid.limits import MAX_RENEWAL_HASHES
from connectoid.messages import Message
from connectoid.suite import CONTEXTS
from connectoid.versions import RENEWAL_VERSION


def begin(machine: Machine) -> None:
    """Make a new signing key and a new address; raise UsageError if this is not the time for it.

    A copy of the device has the keys of the mailboxes too, so all of these go. What the link needs
    stays with it: whoever opens the link has to hear that it is used.
    """
    record = machine.record
    if record.state != "paired":
        raise UsageError("A key can be renewed once both know each other.")
    if record.protocol < RENEWAL_VERSION:
        raise UsageError(
            "This contact was made with an older app, which knows no renewal. Share again."
        )
    if record.old_signer:
        raise UsageError("The contact has not answered the last renewal yet. Wait until it has.")
    rotation.rotate(machine)
    keep_link_key(machine)
    private_key, signer = machine.suite.make_key()
    machine.keep(
        private_key=private_key,
        signer=signer,
        old_private_key=record.private_key,
        old_signer=record.signer,
    )


def keep_link_key(machine: Machine) -> None:
    """Keep the signing key in the link, as long as somebody may still open that."""
    record = machine.record
    machine.keep(welcome="")
    if record.invited is not None and not record.link_signer:
        machine.keep(link_private_key=record.private_key, link_signer=record.signer)


def prove(machine: Machine, address: str) -> str:
    """Return the proof by the new key that its owner follows the old one, at an address."""
    record = machine.record
    octets = proven_octets(record.old_signer, record.signer, record.link_hash, address)
    return encode_base64url(machine.suite.sign(record.private_key, octets))


def check(machine: Machine, message: Message) -> None:
    """Raise Refused (proof) unless the new key has signed for the old one, link and address.

    Who has a copy of the device could join a proof of the owner's with an address of his own.
    """
    payload = message.payload
    octets = proven_octets(
        payload["from"], payload["next"], machine.record.link_hash, payload["connectoid"])
    try:
        machine.suite.verify(payload["next"], decode_base64url(payload["proof"]), octets)
    except Refused:
        raise Refused("proof", "the new key has not signed for all of this") from None


def is_known(machine: Machine, signer: str) -> bool:
    """Return whether a new key is the contact's already, or the one that waits in this round."""
    if machine.vouched is not None and machine.vouched.message.payload["next"] == signer:
        return True
    return machine.record.contact == signer


def hold(machine: Machine, received: Received) -> None:
    """Let a `renew` wait for the others of its round; raise Refused (copied) if it cannot count.

    Two new keys mean that two devices have the old one. Nobody can say which is the owner's: each
    can have its message there first, and number it as it likes. So neither counts, nor does what
    comes later, until the user has asked.
    """
    if machine.vouched is not None:
        machine.vouched = None
        machine.dropped["copied"] += 1
        machine.keep(key_news="copied")
        _tell_who_stays(machine, "copied")
    if machine.record.key_news == "copied":
        raise Refused("copied")
    machine.vouched = received


def take(machine: Machine, message: Message) -> None:
    """Know the contact by the new key alone from now on, and tell the user."""
    machine.keep(
        former_contact=machine.record.contact,
        contact=message.payload["next"],
        key_news="renewed",
    )
    _tell_who_stays(machine, "contact_renewed")


def _tell_who_stays(machine: Machine, event: str) -> None:
    """Tell a user who has not left the contact."""
    if machine.record.state != "unshared":
        machine.tell(event)


def note_said(machine: Machine, message_hash: str) -> None:
    """Remember the hash of a `renew`, or of what the new key has signed since."""
    hashes = (*machine.record.renewal_hashes, message_hash)
    machine.keep(renewal_hashes=hashes[-MAX_RENEWAL_HASHES:])


def complete(machine: Machine, *answered: str | None) -> None:
    """Delete the old key if the contact answers a `renew`, or what the new key has signed since.

    It does so with a message, or with a channel. What was said is sealed to the contact alone, so
    nobody else knows the hashes. That it writes to the newest address proves nothing: the relay
    sees the keys of its mailboxes, and who has a copy of the device can announce it.
    """
    record = machine.record
    if record.old_signer and not set(record.renewal_hashes).isdisjoint(answered):
        is_told = machine.is_renewing
        machine.keep(old_private_key="", old_signer="", renewal_hashes=())
        if is_told:
            machine.tell("renewed")


def proven_octets(old: str, new: str, link_hash: str, address: str) -> bytes:
    """Return what the new key signs. Each part has one length, so there is one way to read them.

    The key of the other side is not among them: each may renew without knowing of the other's.
    """
    keys = decode_base64url(old) + decode_base64url(new)
    hashes = decode_base64url(link_hash) + hashlib.sha256(address.encode()).digest()
    return CONTEXTS["renew"] + b"\0" + keys + hashes
