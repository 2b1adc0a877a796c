"""Incoming messages: reading the mailboxes, and checking each message in order.

First each message is read by itself. Then the messages of a round are sorted, and each is checked
against the record. The first check that fails drops the message and changes only a counter.
PROTOCOL.md, "Reading a message" and "Polling".
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import math
from collections.abc import Callable, Mapping, Sequence

from connectoid.contact import connecting, outbox, pairing, renewal, rotation
from connectoid.contact.effects import Now, Poll
from connectoid.contact.machine import Machine, Received, Unread
from connectoid.contact.record import OwnAddress
from connectoid.contact.rules import LAST_WORDS, NUMBERED_FOR
from connectoid.errors import Refused
from connectoid.limits import FLOODED_MESSAGES, FRESH_S, MAX_SEEN, MAX_SEQ_AHEAD_US
from connectoid.links import Invitation, parse_invitation
from connectoid.messages import UNNUMBERED, Message, open_message, read_jws
from connectoid.suite import check_address, hash_commitment, prove

# -- Polling -----------------------------------------------------------------------------


def list_polls(machine: Machine, now: Now, url: str | None) -> list[Poll]:
    """Return the checks to make, at one relay or at all. They count as made.

    A mailbox that rests is left out.
    """
    polls: list[Poll] = []
    for own in machine.record.addresses:
        for mailbox, key in own.keyed_mailboxes:
            if url not in (None, mailbox.url):
                continue
            box = machine.box(mailbox.pub)
            if box.rests(now.monotonic_s):
                continue
            at = box.at
            if box.is_due_from_zero(now.monotonic_s):
                box.asks_zero = True
                at = 0
            polls.append(Poll(mailbox, key, at))
    return polls


def note_round(machine: Machine, boxes: Mapping[str, Sequence[tuple[int, str]]]) -> None:
    """Note the result of a round of checks: (at, data) for each mailbox that was read.

    Its messages join those of a round that is not taken to its end yet.
    """
    keys: dict[str, tuple[OwnAddress, str]] = {}
    for own in machine.record.addresses:
        for mailbox, key in own.keyed_mailboxes:
            keys[mailbox.pub] = (own, key)
    for pub, found in boxes.items():
        if pub in keys:
            own, key = keys[pub]
            note_box(machine, own, key, pub, found)


def go_on(machine: Machine, most: float = math.inf) -> None:
    """Read and take so many messages of the round; with the last one its requests count."""
    left = most
    while machine.unread and left > 0:
        left -= 1
        read_next(machine)
        if not machine.unread:
            sort_round(machine)
    while machine.untaken and left > 0:
        left -= 1
        take_next(machine)
    if not machine.is_behind:
        connecting.act_on_newest(machine)
        warn_of_flood(machine)


def warn_of_flood(machine: Machine) -> None:
    """Tell the user that somebody fills the mailbox of a link that nobody has opened yet."""
    invited = machine.record.invited
    if invited is None or machine.record.state != "invited":
        return
    held = max(machine.box(mailbox.pub).held for mailbox in invited.mailboxes)
    if held >= FLOODED_MESSAGES:
        machine.tell("flooded")


def sort_round(machine: Machine) -> None:
    """Sort what is not taken yet, by the key that the contact has now."""
    contact = machine.record.contact
    in_order = sorted(machine.untaken, key=lambda received: _order(received.message, contact))
    machine.untaken = collections.deque(in_order)


def _order(message: Message, contact: str) -> tuple[int, int]:
    """Return the place of a message in its round: a class, and a place within it.

    Its sender chooses `seq`, and whoever has copied the sender's device chooses it, too. So it
    decides nothing between the last words of a key and all else.
    """
    if message.type in UNNUMBERED:
        return 0, 0
    seq = message.payload["seq"]
    if message.payload["from"] != contact:
        return 4, seq
    return PLACES.get(message.type, 2), seq


# -- Reading a message by itself ---------------------------------------------------------


def note_box(
    machine: Machine, own: OwnAddress, key: str, pub: str, found: Sequence[tuple[int, str]]
) -> None:
    """Note the messages that were found in a mailbox."""
    box = machine.box(pub)
    now_s = machine.now.monotonic_s
    fresh = now_s - box.read_s <= FRESH_S
    machine.unread.extend(Unread(data, own, key, fresh) for _, data in found)
    box.note_read(now_s, [at for at, _ in found])


def read_next(machine: Machine) -> None:
    """Read the next message of the round."""
    data, own, key, fresh = machine.unread.popleft()
    try:
        message = read(machine, own, key, data)
    except Refused as refused:
        machine.dropped[refused.reason] += 1
    else:
        machine.untaken.append(Received(message, own, fresh))


def read(machine: Machine, own: OwnAddress, key: str, data: str) -> Message:
    """Return the message in `data`; raise Refused. Its sender is not checked yet."""
    remember(machine, data)
    message = read_jws(open_message(machine.suite, key, data))
    if message.payload["to"] != own.address:
        raise Refused("recipient")
    return message


def remember(machine: Machine, data: str) -> None:
    """Remember the digest of a message; raise Refused (replay) if it was read before."""
    digest = hashlib.sha256(data.encode("utf-8", "replace")).digest()
    if digest in machine.seen:
        raise Refused("replay")
    machine.seen[digest] = None
    if len(machine.seen) > MAX_SEEN:
        oldest = next(iter(machine.seen))
        del machine.seen[oldest]


# -- Checking the sender, and taking the message -----------------------------------------


def take_next(machine: Machine) -> None:
    """Take the next message that was read of the round; with the last `renew` a new key counts."""
    contact = machine.record.contact
    take_or_drop(machine, take, machine.untaken.popleft())
    if machine.vouched is not None and not _is_renewal_next(machine):
        vouched, machine.vouched = machine.vouched, None
        take_or_drop(machine, take_numbered, vouched)
    if machine.record.contact != contact:
        sort_round(machine)


def _is_renewal_next(machine: Machine) -> bool:
    """Return whether another `renew` of the contact's key is the next message of the round."""
    if not machine.untaken:
        return False
    message = machine.untaken[0].message
    return message.type == "renew" and message.payload["from"] == machine.record.contact


def take_or_drop(
    machine: Machine, takes: Callable[[Machine, Received], None], received: Received
) -> None:
    """Hand a message to a function that takes it, and count it as dropped if it is refused."""
    try:
        if machine.record.state == "ended":
            # An earlier message of this round has ended the contact.
            raise Refused("unexpected")
        takes(machine, received)
    except Refused as refused:
        machine.dropped[refused.reason] += 1


def take(machine: Machine, received: Received) -> None:
    """Check the sender of a message and hand the message to the pairing; raise Refused."""
    message = received.message
    check = CHECKS.get(message.type, check_numbered)
    check(machine, received)
    message.check_signature(machine.suite)
    if message.type == "renew":
        renewal.check(machine, message)
    check_connectoid(machine, message.payload["connectoid"])
    if message.type in UNNUMBERED:
        pairing.pair(machine, message.type, received)
    elif message.type == "renew":
        renewal.hold(machine, received)
    else:
        take_numbered(machine, received)
    # A stranger with the link, whose hello is refused, does not set the pace.
    if message.payload["from"] == machine.record.contact:
        machine.poll_fast()
        machine.be_active()


def take_numbered(machine: Machine, received: Received) -> None:
    """Accept a numbered message: its `seq` and its address count from now on.

    Its request waits for the end of the round, where only the newest counts.
    """
    payload = received.message.payload
    machine.keep(seen_seq=payload["seq"], contact_address=payload["connectoid"])
    renewal.complete(machine, payload["re"])
    rotation.take_into_use(machine, received.own)
    kind = received.message.type
    if kind == "renew":
        renewal.take(machine, received.message)
        connecting.break_off(machine)
    event = "message"
    if kind == "unshare":
        event = "unshare"
    pairing.pair(machine, event, received)
    if kind not in ("moved", "renew"):
        machine.round.append(received)
    elif machine.record.state == "paired":
        outbox.answer_moved(machine, received.message)


def check_connectoid(machine: Machine, address: str) -> None:
    """Raise Refused (address) unless one may write to an address, which is none of one's own.

    At a mailbox of our own we could open what we seal for the other. An echo would prove a channel.
    """
    mailboxes = check_address(machine.suite, address, allow_http=machine.allow_http)
    record = machine.record
    own_keys = {mailbox.pub for own in record.addresses for mailbox in own.mailboxes}
    own_keys |= record.signers
    if any(mailbox.pub in own_keys for mailbox in mailboxes):
        raise Refused("address", "it has a key of one's own")


def check_hello(machine: Machine, received: Received) -> None:
    """Raise Refused unless a hello comes to the link's address and proves to know the link."""
    message = received.message
    if machine.record.role != "inviter" or received.own != machine.record.invited:
        raise Refused("unexpected")
    proof = prove(_invitation(machine).secret, message.jws)
    if not hmac.compare_digest(proof, str(message.proof)):
        raise Refused("proof")


def check_welcome(machine: Machine, received: Received) -> None:
    """Raise Refused unless the link vouches for the sender and `re` is the hello."""
    message = received.message
    record = machine.record
    if message.hash == record.welcome_hash:
        # It is the copy from another mailbox.
        raise Refused("replay")
    if record.role != "opener" or not record.invitation:
        raise Refused("unexpected")
    commitment = hash_commitment(message.payload["from"], message.payload["r"])
    if not hmac.compare_digest(commitment, _invitation(machine).commitment):
        raise Refused("commitment")
    if message.payload["re"] != record.hello_hash:
        raise Refused("reply")


def check_numbered(machine: Machine, received: Received) -> None:
    """Raise Refused unless the contact sent it, and its `seq` counts."""
    message = received.message
    record = machine.record
    if message.type not in NUMBERED_FOR[record.role]:
        raise Refused("unexpected")
    if received.own == record.invited and message.type != "unshare":
        raise Refused("unexpected")
    if message.type == "renew" and renewal.is_known(machine, message.payload["next"]):
        # What follows it counts without it.
        raise Refused("replay")
    if message.payload["from"] == record.former_contact and message.type != "renew":
        # For as long as relays keep it: nothing is wrong. Another `renew` is that of a copy.
        raise Refused("replaced")
    if message.payload["from"] != record.contact:
        raise Refused("sender")
    if message.type not in LAST_WORDS:
        check_seq(machine, message.payload["seq"])


def check_seq(machine: Machine, seq: int) -> None:
    """Raise Refused unless `seq` is larger than all before, and not far ahead of a set clock."""
    seen_seq = machine.record.seen_seq
    most = limit_of_seq(machine)
    if seen_seq > most:
        # It was accepted when the clock was not set, or ahead.
        seen_seq = 0
    if seq <= seen_seq:
        raise Refused("replay")
    if seq > most:
        raise Refused("ahead")


def limit_of_seq(machine: Machine) -> float:
    """Return the largest `seq` that can be accepted now."""
    if not machine.now.is_set:
        return math.inf
    return machine.now.wall_us + MAX_SEQ_AHEAD_US


# What the contact's key signs, in order: where it leaves, all else, and where it is replaced. So
# the old key is heard before a new one takes its place.
PLACES: Mapping[str, int] = {"unshare": 1, "renew": 3}

# The check of each type. All other types are numbered.
CHECKS: Mapping[str, Callable[[Machine, Received], None]] = {
    "hello": check_hello,
    "welcome": check_welcome,
    "used": check_welcome,
}


def _invitation(machine: Machine) -> Invitation:
    return parse_invitation(machine.record.invitation, allow_http=True)
