"""Pairing: from a link to two apps that know each other, and on to the end.

Hello, welcome and ready make a pair. `used` answers later hellos, `unshare` ends the pair. PAIRING
is at the end. PROTOCOL.md, "Pairing" and "Unshare".
"""

from __future__ import annotations

from collections.abc import Sequence

from connectoid.comparison import comparison_string
from connectoid.contact import connecting, outbox, rotation
from connectoid.contact.effects import Forget
from connectoid.contact.machine import Machine, Received
from connectoid.contact.record import ContactRecord, Relays, urls_at, urls_of
from connectoid.contact.rules import Table, make_table
from connectoid.encoding import encode_base64url
from connectoid.errors import Refused
from connectoid.limits import (
    AGAIN_AFTER_ANSWER_S,
    AGAIN_IDLE_S,
    INVITATION_US,
    MAX_SEQ,
    MAX_USED,
    NEVER_US,
    RELEASE_US,
    SECRET_BYTES,
    TOMBSTONE_US,
)
from connectoid.links import Invitation, format_invitation
from connectoid.messages import Message, read_jws
from connectoid.suite import Suite, app_of_contact, hash_app, hash_commitment, hash_link
from connectoid.versions import VERSIONS, highest_common, spoken_by


def pair(machine: Machine, event: str, *brought: object) -> None:
    """Apply an event to the state of the pairing; raise Refused for one without a rule."""
    rule = PAIRING.get((machine.record.state, event))
    if rule is None:
        raise Refused("unexpected", f"{event} while {machine.record.state}")
    state = machine.follow(rule, *brought)
    machine.keep(state=state)


def is_possible(machine: Machine, event: str) -> bool:
    """Return whether an event has a rule in this state."""
    return (machine.record.state, event) in PAIRING


# -- The link ----------------------------------------------------------------------------


def make_invitation(
    suite: Suite, name: str, relays: Relays, *, expires_us: int, allow_http: bool, app: str
) -> ContactRecord:
    """Return the record of a new contact with an invitation; raise UsageError for bad relays."""
    invited = rotation.make_address(suite, relays, allow_http=allow_http)
    private_key, signer = suite.make_key()
    r = encode_base64url(suite.random(SECRET_BYTES))
    secret = suite.random(SECRET_BYTES)
    commitment = hash_commitment(signer, r)
    invitation = format_invitation(invited.address, secret, commitment, hash_app(app))
    return ContactRecord(
        role="inviter",
        state="invited",
        name=name,
        relays=relays,
        private_key=private_key,
        signer=signer,
        expires_us=expires_us,
        invitation=invitation,
        link_hash=hash_link(invitation),
        r=r,
        invited=invited,
        named_relays=urls_of(relays),
        app=app,
    )


def take_invitation(
    suite: Suite,
    name: str,
    relays: Relays,
    invitation: Invitation,
    *,
    expires_us: int,
    allow_http: bool,
    named_relays: tuple[str, ...],
    app: str,
) -> ContactRecord:
    """Return the record of a new contact from a link.

    Raise UsageError for bad relays, OtherAppError for the link of another app.
    """
    app = app_of_contact(invitation, app)
    private_key, signer = suite.make_key()
    return ContactRecord(
        role="opener",
        state="opened",
        name=name,
        relays=relays,
        private_key=private_key,
        signer=signer,
        expires_us=expires_us,
        invitation=invitation.text,
        link_hash=hash_link(invitation.text),
        current=rotation.make_address(suite, relays, allow_http=allow_http),
        # There was none: the first ready rotates, whatever the clock shows.
        rotated_us=NEVER_US,
        contact_address=invitation.address,
        named_relays=named_relays,
        app=app,
    )


# -- Apps --------------------------------------------------------------------------------


def check_app(machine: Machine, message: Message) -> None:
    """Raise Refused (app) if a hello or welcome is not of the app of the link."""
    if (message.payload.get("app") or "") != machine.record.app:
        raise Refused("app")


# -- Versions ----------------------------------------------------------------------------


def agree(machine: Machine, ours: Sequence[int], message: Message) -> int:
    """Return the highest version that this side and the sender of a hello or welcome speak.

    Without one the user is told that the app is too old; raise Refused (version). Nothing of
    the message counts, so an updated app takes it when it comes again.
    """
    try:
        return highest_common(ours, spoken_by(message.payload))
    except Refused:
        machine.tell("needs_newer_app")
        raise


# -- The inviter: hellos -----------------------------------------------------------------


def take_hello(machine: Machine, received: Received) -> str:
    """Bind the first hello with a valid proof: the only one that ever counts."""
    message = received.message
    record = machine.record
    check_app(machine, message)
    protocol = agree(machine, VERSIONS, message)
    comparison = comparison_string(record.invitation, message.jws, record.signer, record.r)
    machine.keep(
        protocol=protocol,
        hello_hash=message.hash,
        contact=message.payload["from"],
        contact_address=message.payload["connectoid"],
        comparison=comparison,
    )
    if not machine.privacy.ask_first:
        machine.wanted = True
    welcome(machine, received)
    return "welcomed"


def welcome(machine: Machine, received: Received) -> None:
    """Answer the hello that counts, and its offer too if that is fresh."""
    if received.fresh and not machine.must_ask:
        # The welcome goes out with the answer, once WebRTC has gathered it.
        connecting.turn(machine, "offer", received.message)
    else:
        outbox.send_welcome(machine, None)


def take_hello_again(machine: Machine, received: Received) -> str:
    """Repeat the welcome to the hello that counts, and refuse all others."""
    message = received.message
    record = machine.record
    if message.hash != record.hello_hash:
        return take_other_hello(machine, received)
    if record.link_signer:
        # The contact has taken the welcome, or there would have been no renewal.
        return record.state
    if not record.welcome:
        if machine.attempt.state == "apart":
            welcome(machine, received)
    elif machine.may_repeat("welcome"):
        outbox.repeat_welcome(machine, message.payload["connectoid"])
    return record.state


def take_other_hello(machine: Machine, received: Received) -> str:
    """Warn the user that somebody else has the link; refuse the hello."""
    sender = received.message.payload["from"]
    if received.fresh or sender not in machine.record.used_to:
        machine.tell("opened_twice")
    return refuse_hello(machine, received)


def refuse_hello(machine: Machine, received: Received) -> str:
    """Reply that the link is used, unless an earlier process has done so already."""
    message = received.message
    sender = message.payload["from"]
    used_to = machine.record.used_to
    if sender in used_to:
        may_tell = received.fresh and machine.may_repeat("used")
    else:
        may_tell = machine.may_tell_another()
        used_to = (*used_to, sender)[-MAX_USED:]
    if may_tell:
        machine.keep(used_to=used_to)
        outbox.refuse(
            machine, message.payload["connectoid"], message.hash,
            is_to_stranger=sender != machine.record.contact)
    return machine.record.state


# -- The opener: what comes of the hello -------------------------------------------------


def take_welcome(machine: Machine, received: Received) -> str:
    """Take the welcome that the link vouches for, and answer it with ready."""
    message = received.message
    record = machine.record
    check_app(machine, message)
    # What the hello said counts, also if the app was updated since.
    protocol = agree(machine, spoken_by(read_jws(record.hello).payload), message)
    inviter = message.payload["from"]
    comparison = comparison_string(record.invitation, record.hello, inviter, message.payload["r"])
    machine.tell("paired")
    machine.keep(
        protocol=protocol,
        contact=inviter,
        contact_address=message.payload["connectoid"],
        welcome_hash=message.hash,
        comparison=comparison,
        invitation="",
        hello="",
    )
    attempt = machine.attempt
    is_awaited = attempt.state == "waiting" and attempt.offer == record.hello_hash
    if message.sdp and is_awaited:
        connecting.turn(machine, "answer", message)
        outbox.send_ready(machine, None)
    else:
        # The ready goes out with a new offer, once WebRTC has gathered it.
        connecting.turn(machine, "welcome", message)
    return "ready"


def take_used(machine: Machine, received: Received) -> str:
    """End: the link was used by somebody else, or withdrawn."""
    return end(machine, "used")


def take_late_welcome(machine: Machine, received: Received) -> str:
    """Tell an inviter whose welcome comes after the user has left."""
    payload = received.message.payload
    machine.keep(contact=payload["from"], contact_address=payload["connectoid"])
    return repeat_unshare(machine, received)


# -- Both: numbered messages, and the channel --------------------------------------------


def confirm(machine: Machine, received: Received | None = None) -> str:
    """Note that the other knows this side."""
    if machine.record.role == "opener":
        machine.keep(expires_us=NEVER_US)
        return "paired"
    machine.tell("paired")
    if not machine.privacy.ask_first:
        machine.wanted = True
    if machine.attempt.state == "joining":
        machine.late_in(AGAIN_AFTER_ANSWER_S)
    return "paired"


def take_message(machine: Machine, received: Received) -> str:
    """Stay paired. CONNECTING acts on the message."""
    return "paired"


def take_unshare(machine: Machine, received: Received) -> str:
    """End: the other has ended the sharing, and repeats that until it hears this answer."""
    # Nothing that comes later is read, so the answer announces no new address.
    machine.keep(relays=())
    outbox.send_unshare(machine, received.message.hash)
    return end(machine, "unshared")


# -- Leaving: a tombstone ----------------------------------------------------------------


def leave(machine: Machine) -> str:
    """Tell the other, and keep a tombstone: the keys, and where to tell it until it answers."""
    record = machine.record
    # Whoever leaves wants the other to hear of it, wherever that is now.
    machine.keep(met=urls_at(record.contact_address))
    if record.state == "welcomed":
        # `used` is all that an opener can check so far.
        outbox.send_used(
            machine, record.contact_address, record.hello_hash, is_to_stranger=False)
    elif record.state in ("ready", "paired") or record.hello_hash:
        outbox.send_unshare(machine, None)
    machine.next_word_s = machine.now.monotonic_s + AGAIN_IDLE_S
    machine.keep(
        name="",
        relays=(),
        hello="",
        welcome="",
        comparison=(),
        verified=False,
        differs=False,
        key_news="",
        expires_us=machine.now.wall_us + TOMBSTONE_US,
    )
    return "unshared"


def repeat_unshare(machine: Machine, received: Received) -> str:
    """Tell the former contact again, as it still writes."""
    if machine.may_repeat("unshare"):
        outbox.send_unshare(machine, received.message.hash)
    return "unshared"


def vanish(machine: Machine, received: Received | None = None) -> str:
    """Forget the tombstone. It says nothing: its answer would be answered in turn."""
    machine.gone = True
    machine.effects.append(Forget())
    return "ended"


def end(machine: Machine, why: str) -> str:
    """Keep nothing but the name, the reason, and the hash of the link."""
    connecting.turn(machine, "stop")
    record = machine.record
    machine.record = ContactRecord(
        role=record.role,
        state=record.state,
        name=record.name,
        relays=(),
        private_key="",
        signer="",
        expires_us=NEVER_US,
        invitation="",
        link_hash=record.link_hash,
        why=why,
        # A last word may have to go to one in a private network.
        named_relays=record.named_relays,
    )
    machine.tell(why)
    return "ended"


# -- Expiring ----------------------------------------------------------------------------


def check_expiry(machine: Machine) -> None:
    """End whatever has expired, if the wall clock is credible."""
    wall_us = machine.now.wall_us
    if machine.record.expires_us < RELEASE_US <= wall_us:
        # The date was computed by a clock that was not set.
        machine.keep(expires_us=wall_us + INVITATION_US)
    if not machine.record.expires_us <= wall_us < MAX_SEQ // 2:
        return
    if is_possible(machine, "expire"):
        pair(machine, "expire")
    else:
        # The invitation ends; the contact stays.
        rotation.leave_invitation(machine)


def expire_unanswered(machine: Machine) -> str:
    """End: nobody has answered."""
    return end(machine, "expired")


def expire_unconfirmed(machine: Machine) -> str:
    """End, and tell the other, which may be paired already."""
    connecting.turn(machine, "stop")
    machine.tell("expired")
    return leave(machine)


# -- The table ---------------------------------------------------------------------------

# `message` is any numbered message but `unshare`. `leave` is the user's wish to end, `expire` the
# end of the 30 days, `proven` a channel that leads to the contact.
PAIRING: Table = make_table(
    ("invited", "hello", take_hello, "welcomed"),
    ("welcomed paired", "hello", take_hello_again, "="),
    ("welcomed", "message", confirm, "paired"),
    ("opened", "welcome", take_welcome, "ready"),
    ("opened", "used", take_used, "ended"),
    ("ready", "message", confirm, "paired"),
    ("welcomed ready", "proven", confirm, "paired"),
    ("paired", "message", take_message, "paired"),
    ("invited welcomed opened ready paired", "leave", leave, "unshared"),
    ("welcomed ready paired", "unshare", take_unshare, "ended"),
    ("invited opened", "expire", expire_unanswered, "ended"),
    ("welcomed ready", "expire", expire_unconfirmed, "unshared"),
    ("unshared", "hello", refuse_hello, "unshared"),
    ("unshared", "welcome", take_late_welcome, "unshared"),
    ("unshared", "message", repeat_unshare, "unshared"),
    ("unshared", "unshare", vanish, "ended"),
    ("unshared", "expire", vanish, "ended"),
)
