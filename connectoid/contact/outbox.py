"""Outgoing messages: a function for each type, and below them the common steps.

PROTOCOL.md, "Members", has the types; "Envelope" has the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from connectoid.contact import renewal, rotation
from connectoid.contact.effects import Send
from connectoid.contact.machine import Machine
from connectoid.contact.record import OwnAddress, urls_at
from connectoid.encoding import encode_base64url
from connectoid.limits import (
    AGAIN_IDLE_S,
    MAX_SEQ,
    MAX_SEQ_AHEAD_US,
    MOVED_EVERY_S,
    SECRET_BYTES,
)
from connectoid.links import parse_address, parse_invitation
from connectoid.messages import Message, seal_message, sign_jws
from connectoid.suite import hash_jws, prove
from connectoid.versions import VERSIONS

# -- Messages of the pairing, known by their hash ----------------------------------------


def send_hello(machine: Machine, sdp: Mapping[str, str]) -> str:
    """Make the one hello of an invitation and send it; return its hash."""
    record = machine.record
    nonce = encode_base64url(machine.suite.random(SECRET_BYTES))
    members = {"nonce": nonce, "sdpOffer": sdp, **_of_this_app(machine)}
    jws = sign(machine, "hello", record.contact_address, None, **members)
    secret = parse_invitation(record.invitation, allow_http=True).secret
    machine.keep(hello=f"{jws}.{prove(secret, jws)}", hello_hash=hash_jws(jws))
    repeat_hello(machine)
    return machine.record.hello_hash


def _of_this_app(machine: Machine) -> dict[str, Any]:
    """Return what a hello or welcome says of the app that sends it."""
    members: dict[str, Any] = {"versions": VERSIONS}
    if machine.record.app:
        members["app"] = machine.record.app
    return members


def repeat_hello(machine: Machine) -> None:
    """Send the hello again, to the byte."""
    record = machine.record
    post(machine, record.contact_address, record.hello, message_hash=record.hello_hash)


def send_welcome(machine: Machine, sdp: Mapping[str, str] | None) -> None:
    """Make the one welcome and send it, with a new address and the answer if there is one."""
    rotation.rotate(machine)
    members: dict[str, Any] = {"r": machine.record.r, **_of_this_app(machine)}
    if sdp:
        members["sdpAnswer"] = sdp
    address = machine.record.contact_address
    jws = sign(machine, "welcome", address, machine.record.hello_hash, **members)
    machine.keep(welcome=jws, welcome_hash=hash_jws(jws))
    machine.set_attempt(offer=machine.record.hello_hash, answer=machine.record.welcome_hash)
    # Repetitions are a minute apart from now on.
    machine.may_repeat("welcome")
    post(machine, address, jws, message_hash=machine.record.welcome_hash)


def repeat_welcome(machine: Machine, address: str) -> None:
    """Send the welcome again, to the address in a hello."""
    post(machine, address, machine.record.welcome)


def refuse(machine: Machine, address: str, hello_hash: str, *, is_to_stranger: bool) -> None:
    """Tell the sender of a hello that the link is used, and that a welcome is not to be kept.

    A copy of this device may have sent one. The contact itself may live at this address, whoever
    has sent the hello: so only a key that it takes nothing from any more says `unshare`.
    """
    send_used(machine, address, hello_hash, is_to_stranger=is_to_stranger)
    if machine.record.is_link_key_idle:
        jws = sign_by_link_key(machine, "unshare", address, hello_hash)
        post(machine, address, jws, is_to_stranger=is_to_stranger)


def repeat_held_welcome(machine: Machine) -> None:
    """Send the welcome now that the app wants a connection, if a relay has not got it before."""
    record = machine.record
    has_all = machine.known_relays.issuperset(urls_at(record.contact_address))
    if record.state == "welcomed" and record.welcome and not has_all:
        repeat_welcome(machine, record.contact_address)


def send_used(machine: Machine, address: str, hello_hash: str, *, is_to_stranger: bool) -> None:
    """Tell the sender of a hello that the link is used. R proves that the inviter says so."""
    jws = sign_by_link_key(machine, "used", address, hello_hash, r=machine.record.r)
    post(machine, address, jws, is_to_stranger=is_to_stranger)


def sign_by_link_key(machine: Machine, kind: str, to: str, re: str, **members: Any) -> str:
    """Return a new message by the signing key in the link, with no address but that of the link."""
    record = machine.record
    private_key = record.link_private_key or record.private_key
    members["from"] = record.link_signer or record.signer
    members["connectoid"] = record.addresses[0].address
    payload = make_payload(machine, kind, to, re, **members)
    return sign_jws(machine.suite, private_key, payload)


# -- Numbered messages, known by their `seq` ---------------------------------------------


def send_ready(machine: Machine, sdp: Mapping[str, str] | None) -> str:
    """Answer the welcome, with a new offer if its answer is of no use; return the hash."""
    members = {}
    if sdp:
        members["sdpOffer"] = sdp
    return say(machine, "ready", machine.record.welcome_hash, **members)


def send_offer(machine: Machine, cause: str | None, sdp: Mapping[str, str]) -> str:
    """Offer a connection; return the hash. The cause is a call, or None."""
    return say(machine, "offer", cause, sdpOffer=sdp)


def send_answer(machine: Machine, cause: str | None, sdp: Mapping[str, str]) -> str:
    """Answer an offer; return the hash."""
    return say(machine, "answer", cause, sdpAnswer=sdp)


def send_call(machine: Machine, cause: str | None) -> str:
    """Call for an offer; return the hash. The cause is a stale offer, or None."""
    return say(machine, "call", cause)


def send_moved(machine: Machine, cause: str | None) -> str:
    """Tell the contact one's newest address; return the hash. The cause is a `moved`, or None."""
    return say(machine, "moved", cause)


def send_unshare(machine: Machine, cause: str | None) -> str:
    """Tell the contact that the sharing has ended; return the hash."""
    return say(machine, "unshare", cause)


# -- What nobody has asked for, and its answer -------------------------------------------


def announce_if_due(machine: Machine) -> None:
    """Tell the contact one's newest address, if nothing else that was said has told it in time.

    A tombstone tells it that the sharing has ended.
    """
    if machine.now.monotonic_s < machine.next_word_s:
        return
    if machine.has_news:
        # One of them is always at the relay when the contact comes.
        pause_s = AGAIN_IDLE_S
    elif machine.record.state == "paired" and rotation.is_due(machine):
        pause_s = MOVED_EVERY_S
    else:
        return
    machine.next_word_s = machine.now.monotonic_s + pause_s
    if machine.is_leaving:
        send_unshare(machine, None)
    else:
        send_moved(machine, None)


def answer_moved(machine: Machine, message: Message) -> None:
    """Write to the contact's new address, so that it can let go of an older one, or of its old key.

    A `renew` that was accepted is the only one of its key, and a few are answered at any time: the
    `moved` that follows it may have come first, to another mailbox. What is not answered is made up
    for by the next `moved`.
    """
    if message.payload["re"] is not None:
        return
    is_due = machine.may_repeat("moved")
    if is_due or (message.type == "renew" and machine.may_answer_renewal()):
        send_moved(machine, message.hash)


# -- The common steps --------------------------------------------------------------------


def say(machine: Machine, kind: str, re: str | None, **members: Any) -> str:
    """Rotate if that is due, and send a numbered message to the contact; return its hash.

    While the contact may not know the key that signs it, a word of the old key goes ahead. Who
    leaves says so with both keys: a `renew` that a copy of the device has answered with another one
    does not count.
    """
    rotation.rotate_if_due(machine)
    if machine.record.old_signer and kind == "unshare":
        say_by_old_key(machine, kind, re)
    elif machine.record.old_signer:
        send_renew(machine)
    address = machine.record.contact_address
    jws = sign(machine, kind, address, re, **members)
    message_hash = hash_jws(jws)
    if machine.record.old_signer:
        renewal.note_said(machine, message_hash)
    post(machine, address, jws, message_hash=message_hash)
    return message_hash


def send_renew(machine: Machine) -> None:
    """Have the old key say which one follows it."""
    proof = renewal.prove(machine, _announced(machine).address)
    message_hash = say_by_old_key(
        machine, "renew", None, next=machine.record.signer, proof=proof)
    renewal.note_said(machine, message_hash)


def say_by_old_key(machine: Machine, kind: str, re: str | None, **members: Any) -> str:
    """Send `renew` or `unshare` by the key that a renewal replaces; return the hash."""
    record = machine.record
    address = record.contact_address
    members["from"] = record.old_signer
    payload = make_payload(machine, kind, address, re, **members)
    jws = sign_jws(machine.suite, record.old_private_key, payload)
    post(machine, address, jws)
    return hash_jws(jws)


def sign(machine: Machine, kind: str, to: str, re: str | None, **members: Any) -> str:
    """Return a new signed message. Its `seq` goes into the record."""
    payload = make_payload(machine, kind, to, re, **members)
    return sign_jws(machine.suite, machine.record.private_key, payload)


def make_payload(
    machine: Machine, kind: str, to: str, re: str | None, **members: Any
) -> Mapping[str, Any]:
    """Return the payload of a new message. Its `seq` goes into the record."""
    machine.keep(seq=next_seq(machine))
    return {
        "type": kind,
        "to": to,
        "from": machine.record.signer,
        "seq": machine.record.seq,
        "re": re,
        "connectoid": _announced(machine).address,
        **members,
    }


def next_seq(machine: Machine) -> int:
    """Return the `seq` of a new message: the time, but more than that of the last one."""
    wall_us = machine.now.wall_us
    following = machine.record.seq + 1
    if wall_us >= MAX_SEQ // 2:
        return following
    if machine.now.is_set and following > wall_us + MAX_SEQ_AHEAD_US:
        # The clock was ahead. Nobody has accepted that number whose own was right.
        return wall_us
    return max(wall_us, following)


def _announced(machine: Machine) -> OwnAddress:
    """Return the address for replies."""
    record = machine.record
    return record.pending or record.current or record.addresses[0]


def post(
    machine: Machine, address: str, text: str, *, message_hash: str = "",
    is_to_stranger: bool = False,
) -> None:
    """Seal a message to each mailbox of an address, and send it where it may go.

    What is held back is not kept: as soon as the app wants a connection, more is said.
    """
    is_held = False
    for mailbox in parse_address(address, allow_http=True):
        if not machine.may_write(mailbox.url, is_to_stranger=is_to_stranger):
            is_held = True
            continue
        sealed = seal_message(machine.suite, mailbox.pub, text)
        machine.effects.append(Send(mailbox, sealed, is_to_stranger, message_hash))
    if is_to_stranger:
        return
    if is_held:
        machine.tell_wish()
    else:
        machine.keep(met=urls_at(address))
    machine.poll_fast()
