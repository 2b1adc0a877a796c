"""Connecting: attempts, offers and answers, and the proof on the channel.

The opener makes all offers; the inviter calls for one. A fresh offer is answered and a stale one
is called for anew. CONNECTING is at the end. PROTOCOL.md, "Connecting" and "Channel".
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping

from connectoid.contact import outbox, renewal
from connectoid.contact.effects import Close, Gather, Join, Write
from connectoid.contact.machine import Attempt, Machine, can_connect
from connectoid.contact.rules import RESTLESS, Table, make_table
from connectoid.encoding import decode_base64url
from connectoid.errors import Refused
from connectoid.limits import (
    AGAIN_AFTER_ANSWER_S,
    AGAIN_AFTER_OFFER_S,
    AGAIN_IDLE_S,
    AGAIN_UNREACHABLE_S,
    CHALLENGE_BYTES,
    GATHERED_S,
    MAX_UNREACHABLE,
    NEW_OFFER_S,
)
from connectoid.links import parse_address
from connectoid.messages import Message
from connectoid.suite import CONTEXTS


def turn(machine: Machine, event: str, *brought: object) -> None:
    """Apply an event to the attempt. Events without a rule are ignored."""
    rule = CONNECTING.get((machine.attempt.state, event))
    if rule is None:
        return
    state = machine.follow(rule, *brought)
    if state != machine.attempt.state:
        machine.set_attempt(state=state, since_s=machine.now.monotonic_s)
    if state not in RESTLESS:
        machine.set_attempt(late_s=math.inf)


def act_on_newest(machine: Machine) -> None:
    """Act on the newest offer, call or answer of the round; older ones do not count."""
    received = machine.round
    machine.round = []
    if machine.record.state != "paired":
        return
    for each in reversed(received):
        message = each.message
        if machine.must_ask and message.type in ("offer", "ready", "call"):
            _ask(machine, message)
            return
        if message.type in ("offer", "ready"):
            _act_on_offer(machine, message, each.fresh)
            return
        # An answer counts only if it answers the current offer.
        if message.type == "call" or message.payload["re"] == machine.attempt.offer:
            turn(machine, message.type, message)
            return


def _act_on_offer(machine: Machine, message: Message, fresh: bool) -> None:
    """Take an offer, or a ready with or without one."""
    if message.sdp and fresh:
        turn(machine, "offer", message)
    elif message.sdp or machine.attempt.state not in ("joining", "proving", "connected"):
        turn(machine, "stale", message)


def _ask(machine: Machine, message: Message) -> None:
    """Tell the app that the contact wants to connect, and the contact no address.

    A ready gets a call all the same, which tells the opener that it is known.
    """
    machine.asked = message.hash
    if message.type == "ready" and machine.may_repeat("call"):
        outbox.send_call(machine, None)
    machine.tell_wish()


# -- Beginning ---------------------------------------------------------------------------


def begin(machine: Machine) -> str:
    """Begin an attempt: the inviter calls, the opener offers or repeats its hello."""
    if not can_connect(machine.record):
        return "apart"
    machine.next_begin_s = machine.now.monotonic_s + AGAIN_IDLE_S
    cause = machine.asked
    machine.asked = None
    if machine.record.role == "inviter":
        return call(machine, cause)
    if not machine.record.hello:
        return gather_offer(machine, cause)
    outbox.repeat_hello(machine)
    _note_out(machine, machine.record.hello_hash)
    machine.late_in(AGAIN_AFTER_OFFER_S)
    return "waiting"


def begin_anew(machine: Machine) -> None:
    """Give up what was begun, and begin without long pauses for a while."""
    machine.be_active()
    # The same bytes of a hello are repeated, and the answer is for what made them.
    if machine.record.state != "opened" or not machine.record.hello:
        turn(machine, "stop")
    turn(machine, "begin")


def call(machine: Machine, cause: str | None) -> str:
    """Call for an offer, and give up the present connection."""
    leave_connection(machine)
    close(machine)
    _note_out(machine, outbox.send_call(machine, cause))
    machine.late_in(AGAIN_AFTER_OFFER_S)
    return "waiting"


def gather(machine: Machine, offer: Mapping[str, str] | None, cause: str | None) -> str:
    """Have WebRTC make an offer, or the answer to one, for a new attempt."""
    leave_connection(machine)
    attempt_id = machine.attempt.attempt_id + 1
    machine.attempt = Attempt(
        state="gathering",
        since_s=machine.now.monotonic_s,
        attempt_id=attempt_id,
        cause=cause,
    )
    machine.late_in(GATHERED_S)
    machine.effects.append(Gather(attempt_id, offer))
    return "gathering"


# -- Messages received -------------------------------------------------------------------


def take_offer(machine: Machine, message: Message) -> str:
    """Answer a fresh offer."""
    return gather(machine, message.sdp, message.hash)


def take_stale_offer(machine: Machine, message: Message) -> str:
    """Call for a new offer, as the sender of a stale one may have given up."""
    return call(machine, message.hash)


def take_call(machine: Machine, message: Message) -> str:
    """Make an offer, as the inviter has called for it."""
    attempt = machine.attempt
    age_s = machine.now.monotonic_s - attempt.since_s
    # The inviter's time for the attempt begins a little earlier than the opener's.
    if attempt.state == "joining" and age_s > AGAIN_AFTER_ANSWER_S / 2:
        _note_failure(machine)
    return gather_offer(machine, message.hash)


def take_call_unless_crossed(machine: Machine, message: Message) -> str:
    """Make a new offer, unless the call has crossed the current one, which has no answer yet."""
    attempt = machine.attempt
    is_out = bool(attempt.offer) and not attempt.answer
    age_s = machine.now.monotonic_s - attempt.since_s
    if is_out and age_s < NEW_OFFER_S and message.payload["re"] != attempt.offer:
        return attempt.state
    return take_call(machine, message)


def take_welcome_without_answer(machine: Machine, message: Message) -> str:
    """Make a new offer, as the one in the hello was stale."""
    return gather_offer(machine, message.hash)


def take_answer(machine: Machine, message: Message) -> str:
    """Give the answer to the peer connection that made the offer."""
    machine.set_attempt(answer=message.hash, is_taken=True)
    machine.effects.append(Join(machine.attempt.attempt_id, message.sdp or {}))
    machine.late_in(AGAIN_AFTER_ANSWER_S)
    return "joining"


def gather_offer(machine: Machine, cause: str | None = None) -> str:
    """Have WebRTC make an offer. The cause is the hash of a message, or None."""
    return gather(machine, None, cause)


# -- Offers and answers from WebRTC ------------------------------------------------------


def take_gathered(machine: Machine, sdp: Mapping[str, str] | None = None) -> str:
    """Send the offer or answer in the message that fits the state; without one wait."""
    machine.late_in(AGAIN_AFTER_OFFER_S)
    if machine.record.state == "welcomed":
        return _welcome(machine, sdp)
    if sdp is None:
        return "waiting"
    if machine.record.role == "inviter":
        return _answer(machine, sdp)
    machine.set_attempt(offer=_offer(machine, sdp))
    _note_out(machine, machine.attempt.offer)
    return "waiting"


def _welcome(machine: Machine, sdp: Mapping[str, str] | None) -> str:
    outbox.send_welcome(machine, sdp)
    _note_out(machine, machine.record.welcome_hash)
    if sdp is None:
        return "apart"
    return "joining"


def _answer(machine: Machine, sdp: Mapping[str, str]) -> str:
    cause = machine.attempt.cause
    answer = outbox.send_answer(machine, cause, sdp)
    machine.set_attempt(offer=cause, answer=answer)
    _note_out(machine, answer)
    machine.late_in(AGAIN_AFTER_ANSWER_S)
    return "joining"


def _offer(machine: Machine, sdp: Mapping[str, str]) -> str:
    """Send an offer in the message that fits the pairing; return the message's hash."""
    if machine.record.state == "ready":
        return outbox.send_ready(machine, sdp)
    if machine.record.state == "paired":
        return outbox.send_offer(machine, machine.attempt.cause, sdp)
    return outbox.send_hello(machine, sdp)


def _note_out(machine: Machine, message_hash: str) -> None:
    """Note that a message is out. A hello that is sent again may be at the relay already."""
    attempt = machine.attempt
    is_taken = attempt.is_taken and attempt.out == message_hash
    machine.set_attempt(out=message_hash, is_taken=is_taken)


def take_receipt(machine: Machine, message_hash: str) -> None:
    """Note that a relay has taken a message."""
    if message_hash and message_hash == machine.attempt.out:
        machine.set_attempt(is_taken=True)


# -- The channel: each end shows whose it is ---------------------------------------------


def send_challenge(machine: Machine) -> str:
    """Seal a challenge to the contact: only the owner of its mailbox key can send it back."""
    challenge = machine.suite.random(CHALLENGE_BYTES)
    machine.set_attempt(challenge=challenge, is_taken=True)
    machine.late_in(AGAIN_AFTER_ANSWER_S)
    mailbox = parse_address(machine.record.contact_address, allow_http=True)[0]
    sealed = machine.suite.seal(mailbox.pub, channel_info(machine), challenge)
    write(machine, sealed)
    return "proving"


def take_octets(machine: Machine, octets: bytes) -> str:
    """Take the first message as the other's challenge, the second as the reply to one's own."""
    if machine.attempt.replied:
        return take_reply(machine, octets)
    return take_challenge(machine, octets)


def take_challenge(machine: Machine, sealed: bytes) -> str:
    """Open the other's challenge and send it back."""
    challenge = open_challenge(machine, sealed)
    is_own = hmac.compare_digest(challenge, machine.attempt.challenge)
    if len(challenge) != CHALLENGE_BYTES or is_own:
        return refuse_channel(machine)
    machine.set_attempt(replied=True)
    write(machine, challenge)
    return "proving"


def take_reply(machine: Machine, octets: bytes) -> str:
    """Connect if the other could open the challenge."""
    if not hmac.compare_digest(octets, machine.attempt.challenge):
        return refuse_channel(machine)
    renewal.complete(machine, machine.attempt.offer, machine.attempt.answer)
    machine.tell("connected")
    machine.failed = 0
    return "connected"


def refuse_channel(machine: Machine) -> str:
    """Close a channel that does not lead to the contact. `late` decides on the next attempt."""
    machine.dropped["channel"] += 1
    close(machine)
    return "waiting"


def open_challenge(machine: Machine, sealed: bytes) -> bytes:
    """Return the challenge, sealed to any address that is polled; empty if none opens it."""
    for own in machine.record.addresses:
        try:
            return machine.suite.open(own.keys[0], channel_info(machine), sealed)
        except Refused:
            continue
    return b""


def channel_info(machine: Machine) -> bytes:
    """Return the `info` that binds a challenge to this offer and this answer."""
    offer = decode_base64url(machine.attempt.offer)
    answer = decode_base64url(machine.attempt.answer)
    return CONTEXTS["channel"] + b"\0" + offer + answer


def write(machine: Machine, octets: bytes) -> None:
    """Write on the channel of the attempt."""
    machine.effects.append(Write(machine.attempt.attempt_id, octets))


# -- Failing and ending ------------------------------------------------------------------


def try_again(machine: Machine) -> str:
    """Try once more while the attempt is active; later attempts are rare."""
    if machine.record.state == "welcomed" and machine.is_active:
        # Only the opener may try again.
        machine.set_attempt(late_s=machine.active_until_s)
        return machine.attempt.state
    if machine.attempt.out and not machine.attempt.is_taken:
        return _try_unsent(machine)
    answered = machine.attempt.state != "waiting"
    goes_on = machine.is_active
    if answered:
        _note_failure(machine)
        goes_on = goes_on and machine.failed < MAX_UNREACHABLE
    if goes_on:
        return begin(machine)
    if answered:
        # The first one is told already.
        if machine.failed > 1:
            machine.tell("unreachable")
        machine.next_begin_s = machine.now.monotonic_s + AGAIN_UNREACHABLE_S
    else:
        machine.tell("unanswered")
    close(machine)
    return "apart"


def _try_unsent(machine: Machine) -> str:
    """Try once more what no relay has taken: nobody can have answered it, or failed to connect."""
    if not machine.is_active:
        machine.tell("unsent")
        close(machine)
        return "apart"
    if not machine.told_unsent:
        machine.told_unsent = True
        machine.tell("unsent")
    return begin(machine)


def _note_failure(machine: Machine) -> None:
    """Count an attempt without a channel, and tell the user after the first what would help."""
    machine.failed += 1
    if machine.failed == 1:
        machine.tell("unreachable")


def wait_for_late(machine: Machine) -> str:
    """Wait for `late`, which decides on the next attempt."""
    return "waiting"


def lose(machine: Machine) -> str:
    """Tell the app that the connection is lost. The app may want another."""
    machine.wanted = False
    machine.tell("disconnected")
    return "apart"


def stop(machine: Machine) -> str:
    """Close the peer connection, if there is one."""
    if machine.attempt.state != "apart":
        close(machine)
    return "apart"


def break_off(machine: Machine) -> None:
    """End what may lead to a copy of the contact's device: a connection, an attempt, a request."""
    machine.round = []
    machine.asked = None
    leave_connection(machine)
    if machine.attempt.state == "connected":
        machine.wanted = False
    machine.next_begin_s = -math.inf
    turn(machine, "stop")


def leave_connection(machine: Machine) -> None:
    """Tell the app if an open connection is given up for another."""
    if machine.attempt.state == "connected":
        machine.tell("disconnected")


def close(machine: Machine) -> None:
    """Close the peer connection. Answers to its offer no longer count."""
    machine.effects.append(Close(machine.attempt.attempt_id))
    machine.set_attempt(offer="")


# -- The table ---------------------------------------------------------------------------

_ALL = "apart gathering waiting joining proving connected"

# `late` is the deadline of a state; `stale` is an offer that is not fresh. `gathered`, `channel`,
# `octets` and `closed` come from WebRTC.
CONNECTING: Table = make_table(
    ("apart", "begin", begin, "gathering waiting apart"),
    (_ALL, "offer", take_offer, "gathering"),
    (_ALL, "stale", take_stale_offer, "waiting"),
    ("apart joining proving connected", "call", take_call, "gathering"),
    ("waiting", "call", take_call_unless_crossed, "gathering ="),
    ("apart waiting", "welcome", take_welcome_without_answer, "gathering"),
    ("gathering", "gathered", take_gathered, "waiting joining apart"),
    ("gathering", "late", take_gathered, "waiting apart"),
    ("waiting joining proving", "late", try_again, "gathering waiting = apart"),
    ("waiting", "answer", take_answer, "joining"),
    ("joining", "channel", send_challenge, "proving"),
    ("proving", "octets", take_octets, "proving connected waiting"),
    ("proving", "closed", wait_for_late, "waiting"),
    ("connected", "closed", lose, "apart"),
    (_ALL, "stop", stop, "apart"),
)
