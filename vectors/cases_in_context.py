"""Cases of messages in context: a side's knowledge, its mailboxes, and the effect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from cases_small import listed
from vector_forms import (
    commit,
    compare,
    hash_of,
    hash_of_link,
    invite,
    mailbox,
    make_jws,
    prove,
    sdp,
    seal,
    sign_otherwise,
)
from vector_keys import Json, Key, unb64
from vector_people import (
    A0,
    A0_AT,
    A1,
    A1_AT,
    A2,
    A2_AT,
    A3,
    A3_AT,
    A4,
    A4_AT,
    A_HASH,
    AF,
    AF_AT,
    ALICE,
    B0,
    B0_AT,
    B1,
    B1_AT,
    B2,
    B2_AT,
    BF_AT,
    BOB,
    HELLO,
    INVITATION,
    M0,
    M0_AT,
    MAILBOX_KEYS,
    MALLORYS_HELLO,
    OTHER_R,
    START,
    WELCOME,
    R,
    S,
    from_alice,
    from_bob,
    hello,
    used,
    welcome,
)

SOON = START + 3_000_000

LATE = START + 5_000_000

# Of the wall clock, when the messages are found.
NOW = START + 60_000_000

# Of ROTATE-3, in microseconds.
MONTH = 30 * 86_400_000_000

DAY = 86_400_000_000

# 2026-11-23: a clock that shows less is not set.
RELEASE = 1_795_392_000_000_000

TWO_AT = f"{A0_AT}~{AF_AT}"

TWO = invite(TWO_AT, S, commit(ALICE.pub, R))


# A relay where nobody has an address of these contexts.
ELSEWHERE = "https://elsewhere.example/"


def own(address: str) -> Json:
    """Return an address of one's own with its private keys."""
    pubs = {box.pub: box.private for box in MAILBOX_KEYS}
    return {"address": address, "private": [pubs[box["pub"]] for box in listed(address)]}


# What a side knows at first.
NOTHING_KNOWN: Json = {
    "invitation": "",
    "r": "",
    "hello": "",
    "hello_hash": "",
    "welcome": "",
    "contact": "",
    "connectoid": "",
    "app": "",
    "link_hash": "",
    "old_from": "",
    "old_private": "",
    "link_from": "",
    "link_private": "",
    "renewal_hashes": [],
    "former_contact": "",
    "key_news": "",
    "met": [],
    "seq": START + 2_000_000,
    "seen_seq": 0,
}


def context(
    role: str,
    state: str,
    addresses: dict[str, str],
    *,
    replaced: Sequence[str] = (),
    former: Mapping[str, int] = MappingProxyType({}),
    **members: Any,
) -> Json:
    """Return the knowledge of one side."""
    owns: Json = {name: own(address) for name, address in addresses.items()}
    if replaced:
        owns["replaced"] = [own(address) for address in replaced]
    if former:
        owns["former"] = [
            {**own(address), "left_us": left_us} for address, left_us in former.items()]
    signers = {"inviter": ALICE, "opener": BOB}
    signer = signers[role]
    return {
        "role": role,
        "state": state,
        "from": signer.pub,
        "private": signer.private,
        **NOTHING_KNOWN,
        "addresses": owns,
        **members,
    }


def contexts() -> dict[str, Json]:
    """Return all contexts by name."""
    return contexts_of_alice() | contexts_of_bob()


def bound_of_alice() -> Json:
    """Return what Alice keeps of the pairing once Bob has opened her link."""
    return {
        "invitation": INVITATION,
        "r": R,
        "link_hash": hash_of_link(INVITATION),
        "hello_hash": hash_of(HELLO),
        "welcome": WELCOME,
        "contact": BOB.pub,
    }


def contexts_of_alice() -> dict[str, Json]:
    """Return Alice's contexts by name."""
    link: Json = {"invitation": INVITATION, "r": R}
    bound = bound_of_alice()
    return {
        "alice invited": context("inviter", "invited", {"invited": A0_AT}, **link, seq=0),
        "alice invited, two mailboxes": context(
            "inviter", "invited", {"invited": TWO_AT}, invitation=TWO, r=R, seq=0
        ),
        "alice welcomed": context(
            "inviter", "welcomed", {"invited": A0_AT, "pending": A1_AT}, **bound, connectoid=B0_AT
        ),
    } | contexts_of_alice_paired()


def contexts_of_alice_paired() -> dict[str, Json]:
    """Return those of Alice once she knows Bob."""
    there: Json = {**bound_of_alice(), "connectoid": B1_AT, "seen_seq": SOON}
    return {
        "alice paired": context("inviter", "paired", {"invited": A0_AT, "current": A1_AT}, **there),
        "alice paired, has met another relay": context(
            "inviter", "paired", {"invited": A0_AT, "current": A1_AT}, **there, met=[ELSEWHERE]
        ),
        "alice paired, moved three times": context(
            "inviter",
            "paired",
            {"invited": A0_AT, "pending": A4_AT, "current": A1_AT},
            replaced=(A2_AT, A3_AT),
            former={AF_AT: 0},
            **there,
        ),
        "alice paired, seq poisoned": context(
            "inviter",
            "paired",
            {"invited": A0_AT, "current": A1_AT},
            **there | {"seen_seq": 2**53 - 1},
        ),
        "alice paired, two mailboxes": context(
            "inviter", "paired", {"current": f"{A1_AT}~{A2_AT}"}, **there
        ),
        "alice unshared": context(
            "inviter", "unshared", {"invited": A0_AT, "current": A1_AT}, **there | {"welcome": ""}
        ),
    } | contexts_of_alice_moving(there)


def contexts_of_alice_moving(there: Json) -> dict[str, Json]:
    """Return those of Alice while one address is pending."""
    return {
        "alice paired, moving": context(
            "inviter",
            "paired",
            {"invited": A0_AT, "pending": A2_AT, "current": A1_AT},
            former={AF_AT: 0},
            **there,
        ),
        "alice paired, moving again soon": context(
            "inviter",
            "paired",
            {"invited": A0_AT, "pending": A2_AT, "current": A1_AT},
            former={AF_AT: NOW - MONTH + 1},
            **there,
        ),
        "alice paired, moving again after a month": context(
            "inviter",
            "paired",
            {"invited": A0_AT, "pending": A2_AT, "current": A1_AT},
            former={AF_AT: NOW - MONTH},
            **there,
        ),
        "alice paired, moving again often": context(
            "inviter",
            "paired",
            {"invited": A0_AT, "pending": A2_AT, "current": A1_AT},
            former={A4_AT: NOW - MONTH, AF_AT: NOW - MONTH + 1, A3_AT: NOW},
            **there,
        ),
    }


def contexts_of_bob() -> dict[str, Json]:
    """Return Bob's contexts by name."""
    known: Json = {
        "link_hash": hash_of_link(INVITATION),
        "hello_hash": hash_of(HELLO),
        "contact": ALICE.pub,
        "connectoid": A1_AT,
    }
    return {
        "bob opened": context(
            "opener",
            "opened",
            {"current": B0_AT},
            invitation=INVITATION,
            hello=HELLO,
            hello_hash=hash_of(HELLO),
            connectoid=A0_AT,
            seq=START + 1_000_000,
        ),
        "bob ready": context("opener", "ready", {"pending": B1_AT, "current": B0_AT}, **known),
        "bob paired": context(
            "opener", "paired", {"pending": B1_AT, "current": B0_AT}, **known, seen_seq=SOON
        ),
        "bob paired, moving": context(
            "opener",
            "paired",
            {"pending": B2_AT, "current": B1_AT},
            former={BF_AT: 0},
            **known,
            seen_seq=SOON,
        ),
        "bob unshared": context(
            "opener",
            "unshared",
            {"current": B0_AT},
            invitation=INVITATION,
            hello_hash=hash_of(HELLO),
            connectoid=A0_AT,
        ),
    }


class Box(NamedTuple):
    """Something found in a mailbox: a message to seal, or `data` as it is."""

    key: Key
    text: str
    is_sealed: bool = False

    @property
    def found(self) -> Json:
        """Return it as the vectors have it."""
        data = self.text
        if not self.is_sealed:
            data = seal(self.key.pub, self.text)
        return {"mailbox": self.key.pub, "data": data}


def reply(
    box: Key, kind: str, to: str, re: str | None, signer: Key = ALICE, **members: Any
) -> Json:
    """Return a message that must be sent: the members that are certain."""
    return {
        "mailbox": box.pub,
        "payload": {"type": kind, "to": to, "from": signer.pub, "re": re, **members},
    }


def bobs(kind: str, signer: Key = BOB, /, **changes: Any) -> str:
    """Return a numbered message from Bob after the pairing, changed."""
    return make_jws(signer, from_bob(kind, seq=LATE) | changes)


def alices(kind: str, signer: Key = ALICE, /, **changes: Any) -> str:
    """Return a numbered message from Alice after the pairing, changed."""
    return make_jws(signer, from_alice(kind, seq=LATE) | changes)


def accepted(
    name: str,
    where: str,
    *boxes: Box,
    sent: Sequence[Json] = (),
    warned: bool = False,
    **after: Any,
) -> Json:
    """Return a case in which everything counts: the knowledge afterwards, the messages sent."""
    case: Json = {
        "name": name,
        "context": where,
        "found": [box.found for box in boxes],
        "after": after,
        "sent": list(sent),
    }
    if warned:
        case["warned"] = True
    return case


def accepted_in_two() -> Json:
    """Return a hello for an invitation with two mailboxes."""
    two = hello(
        to=TWO_AT, connectoid=f"{B0_AT}~{mailbox(B1.pub, 'https://other.example/', 'key 1')}"
    )
    return accepted(
        "hello in the second mailbox",
        "alice invited, two mailboxes",
        Box(AF, two),
        state="welcomed",
        hello_hash=hash_of(two),
        numbers=compare(TWO, two, ALICE.pub, R),
        contact=BOB.pub,
        sent=[
            reply(
                box,
                "welcome",
                json.loads(unb64(two.split(".")[1]))["connectoid"],
                hash_of(two),
                r=R,
            )
            for box in (B0, B1)
        ],
    )


def accepted_hellos() -> Iterator[Json]:
    """Yield hellos that count."""
    bound: Json = {
        "state": "welcomed",
        "contact": BOB.pub,
        "connectoid": B0_AT,
        "hello_hash": hash_of(HELLO),
        "numbers": compare(INVITATION, HELLO, ALICE.pub, R),
    }
    greeted = reply(B0, "welcome", B0_AT, hash_of(HELLO), r=R)
    yield accepted("hello", "alice invited", Box(A0, HELLO), sent=[greeted], **bound)
    yield accepted_in_two()
    far = hello(seq=2**53 - 1)
    yield accepted(
        "hello of a clock far ahead",
        "alice invited",
        Box(A0, far),
        state="welcomed",
        seen_seq=0,
        sent=[greeted | {"payload": greeted["payload"] | {"re": hash_of(far)}}],
    )
    local = hello(connectoid=mailbox(B0.pub, "http://localhost:8080/"))
    yield accepted(
        "hello from a relay on this machine",
        "alice invited",
        Box(A0, local),
        state="welcomed",
        sent=[reply(B0, "welcome", mailbox(B0.pub, "http://localhost:8080/"), hash_of(local), r=R)],
    )


def accepted_again() -> Iterator[Json]:
    """Yield the hello that counts, found again."""
    greeted = reply(B0, "welcome", B0_AT, hash_of(HELLO), r=R)
    yield accepted(
        "the same hello again",
        "alice welcomed",
        Box(A0, HELLO),
        sent=[greeted | {"text": WELCOME}],
        state="welcomed",
    )
    yield accepted(
        "the same hello with its other signature",
        "alice welcomed",
        Box(A0, prove(S, sign_otherwise(HELLO))),
        sent=[greeted | {"text": WELCOME}],
        state="welcomed",
    )
    yield accepted(
        "the same hello, paired",
        "alice paired",
        Box(A0, HELLO),
        sent=[greeted | {"text": WELCOME}],
        state="paired",
    )


def accepted_second() -> Iterator[Json]:
    """Yield hellos that came second."""
    bound: Json = {
        "state": "welcomed",
        "contact": BOB.pub,
        "connectoid": B0_AT,
        "hello_hash": hash_of(HELLO),
        "numbers": compare(INVITATION, HELLO, ALICE.pub, R),
    }
    told = reply(M0, "used", M0_AT, hash_of(MALLORYS_HELLO), r=R, connectoid=A0_AT)
    yield accepted(
        "second hello after the first",
        "alice welcomed",
        Box(A0, MALLORYS_HELLO),
        sent=[told],
        warned=True,
        **bound | {"numbers": []},
    )
    again = hello(nonce=OTHER_R)
    yield accepted(
        "second hello under Bob's own key",
        "alice welcomed",
        Box(A0, again),
        warned=True,
        state="welcomed",
        hello_hash=hash_of(HELLO),
        sent=[reply(B0, "used", B0_AT, hash_of(again), r=R)],
    )
    yield from accepted_second_later(told)


def accepted_second_later(told: Json) -> Iterator[Json]:
    """Yield hellos that came second to a pairing that is over; `told` is what is sent."""
    yield accepted(
        "second hello, while an address is pending",
        "alice paired, moving",
        Box(A0, MALLORYS_HELLO),
        sent=[told],
        warned=True,
        pending=A2_AT,
    )
    yield accepted(
        "second hello, paired",
        "alice paired",
        Box(A0, MALLORYS_HELLO),
        sent=[told],
        warned=True,
        state="paired",
        contact=BOB.pub,
        connectoid=B1_AT,
    )


def accepted_too_late() -> Iterator[Json]:
    """Yield hellos beside the first, or after the end."""
    bound: Json = {
        "state": "welcomed",
        "contact": BOB.pub,
        "connectoid": B0_AT,
        "hello_hash": hash_of(HELLO),
        "numbers": compare(INVITATION, HELLO, ALICE.pub, R),
    }
    greeted = reply(B0, "welcome", B0_AT, hash_of(HELLO), r=R)
    told = reply(M0, "used", M0_AT, hash_of(MALLORYS_HELLO), r=R, connectoid=A0_AT)
    yield accepted(
        "two hellos in one round",
        "alice invited",
        Box(A0, HELLO),
        Box(A0, MALLORYS_HELLO),
        sent=[greeted, told],
        warned=True,
        **bound,
    )
    yield accepted(
        "hello at a link withdrawn",
        "alice unshared",
        Box(A0, MALLORYS_HELLO),
        sent=[told, undone_of_mallory()],
        state="unshared",
    )


def undone_of_mallory() -> Json:
    """Return what undoes a welcome that somebody else has sent to Mallory in Alice's place."""
    return reply(M0, "unshare", M0_AT, hash_of(MALLORYS_HELLO), connectoid=A0_AT)


def accepted_first() -> Iterator[Json]:
    """Yield hellos that count, and the replies to those that come second."""
    yield from accepted_hellos()
    yield from accepted_again()
    yield from accepted_second()
    yield from accepted_too_late()


def accepted_by_alice() -> Iterator[Json]:
    """Yield messages to Alice that count after the hello."""
    ready = make_jws(BOB, from_bob("ready"))
    yield accepted(
        "ready",
        "alice welcomed",
        Box(A1, ready),
        state="paired",
        seen_seq=SOON,
        connectoid=B1_AT,
        sent=[reply(B1, "call", B1_AT, hash_of(ready))],
        current=A1_AT,
        pending=None,
        former=[],
    )
    left = bobs("unshare", to=A0_AT)
    yield accepted(
        "Bob left before the welcome came",
        "alice welcomed",
        Box(A0, left),
        state="ended",
        why="unshared",
        sent=[reply(B1, "unshare", B1_AT, hash_of(left))],
    )


def accepted_by_bob() -> Iterator[Json]:
    """Yield messages to Bob that count after the hello."""
    yield accepted(
        "welcome",
        "bob opened",
        Box(B0, WELCOME),
        state="ready",
        contact=ALICE.pub,
        connectoid=A1_AT,
        seen_seq=0,
        numbers=compare(INVITATION, HELLO, ALICE.pub, R),
    )
    early = welcome(seq=1)
    yield accepted(
        "welcome of a clock that stands at 1970",
        "bob opened",
        Box(B0, early),
        state="ready",
        contact=ALICE.pub,
    )
    yield accepted("used", "bob opened", Box(B0, used()), state="ended", why="used")
    yield accepted(
        "call before anything else",
        "bob ready",
        Box(B0, make_jws(ALICE, from_alice("call"))),
        state="paired",
        seen_seq=SOON,
    )


def accepted_next() -> Iterator[Json]:
    """Yield messages that count after the hello."""
    yield from accepted_by_alice()
    yield from accepted_by_bob()


def accepted_addresses() -> Iterator[Json]:
    """Yield messages that count at each of Alice's addresses."""
    offer = bobs("offer")
    call = reply(B1, "call", B1_AT, hash_of(offer))
    yield accepted(
        "offer", "alice paired", Box(A1, offer), sent=[call], seen_seq=LATE, state="paired"
    )
    elsewhere = mailbox(B2.pub, "https://other.example:8443/relay", "key 1")
    moved = bobs("offer", connectoid=elsewhere)
    yield accepted(
        "offer from new relays",
        "alice paired",
        Box(A1, moved),
        connectoid=elsewhere,
        sent=[reply(B2, "call", elsewhere, hash_of(moved))],
    )
    yield from accepted_at_pending()
    former = bobs("offer", to=AF_AT)
    yield accepted(
        "a message at the former address",
        "alice paired, moving",
        Box(AF, former),
        current=A1_AT,
        pending=A2_AT,
        former=[AF_AT],
        seen_seq=LATE,
        sent=[reply(B1, "call", B1_AT, hash_of(former))],
    )
    yield from accepted_at_replaced()


def accepted_at_pending() -> Iterator[Json]:
    """Yield messages that take the pending address into use."""
    pending = bobs("offer", to=A2_AT)
    yield accepted(
        "the first message at the pending address",
        "alice paired, moving",
        Box(A2, pending),
        current=A2_AT,
        pending=None,
        former=[A1_AT],
        seen_seq=LATE,
        sent=[reply(B1, "call", B1_AT, hash_of(pending))],
    )
    stays = {"soon": [AF_AT], "after a month": [], "often": [AF_AT, A3_AT]}
    for when, stay in stays.items():
        yield accepted(
            f"a message at the pending address, moving again {when}",
            f"alice paired, moving again {when}",
            Box(A2, pending),
            current=A2_AT,
            pending=None,
            former=[*stay, A1_AT],
            sent=[reply(B1, "call", B1_AT, hash_of(pending))],
        )


def accepted_at_replaced() -> Iterator[Json]:
    """Yield messages that count while two of Alice's addresses are replaced."""
    cases: tuple[tuple[str, Key, str, str | None, list[str], list[str]], ...] = (
        ("a message at the address that was replaced first", A2, A2_AT, A4_AT, [A3_AT], []),
        ("a message at the address that was replaced last", A3, A3_AT, A4_AT, [], [A2_AT]),
        ("a message at the pending address, where others are replaced", A4, A4_AT, None, [],
         [A2_AT, A3_AT]),
    )
    for name, box, address, pending, replaced, older in cases:
        offer = bobs("offer", to=address)
        yield accepted(
            name,
            "alice paired, moved three times",
            Box(box, offer),
            current=address,
            pending=pending,
            replaced=replaced,
            former=[A1_AT, *older],
            seen_seq=LATE,
            sent=[reply(B1, "call", B1_AT, hash_of(offer), connectoid=A4_AT)],
        )
    moved = bobs("moved", re=A_HASH)
    yield accepted(
        "a message at the current address, where others are replaced",
        "alice paired, moved three times",
        Box(A1, moved),
        current=A1_AT,
        pending=A4_AT,
        replaced=[A2_AT, A3_AT],
        former=[AF_AT],
        seen_seq=LATE,
    )


def accepted_seqs() -> Iterator[Json]:
    """Yield messages that count by their seq."""
    offer = bobs("offer")
    call = reply(B1, "call", B1_AT, hash_of(offer))
    next_one = bobs("offer", seq=SOON + 1)
    yield accepted(
        "seq larger by one",
        "alice paired",
        Box(A1, next_one),
        seen_seq=SOON + 1,
        sent=[reply(B1, "call", B1_AT, hash_of(next_one))],
    )
    yield from accepted_far_seqs()
    older = bobs("offer", seq=SOON + 1, sdpOffer=sdp("offer", "Bob before"), connectoid=B0_AT)
    yield accepted(
        "a round is taken in the order of seq",
        "alice paired",
        Box(A1, offer),
        Box(A1, older),
        seen_seq=LATE,
        connectoid=B1_AT,
        sent=[call],
    )


def at_time(now_us: int, case: Json) -> Json:
    """Return a case in which the clock shows another time."""
    return {**case, "now_us": now_us}


def accepted_far_seqs() -> Iterator[Json]:
    """Yield messages whose seq is far ahead, and counts all the same."""
    soon = bobs("offer", seq=NOW + DAY)
    yield accepted(
        "seq a day ahead of the clock",
        "alice paired",
        Box(A1, soon),
        seen_seq=NOW + DAY,
        sent=[reply(B1, "call", B1_AT, hash_of(soon))],
    )
    last = bobs("offer", seq=2**53 - 1)
    for name, now_us in (
        ("the largest seq, by a clock that stands at 1970", 0),
        ("the largest seq, by a clock that shows the day before it can be true", RELEASE - 1),
        ("the largest seq, by a clock that shows 2^52", 2**52),
    ):
        yield at_time(
            now_us,
            accepted(
                name,
                "alice paired",
                Box(A1, last),
                seen_seq=2**53 - 1,
                sent=[reply(B1, "call", B1_AT, hash_of(last))],
            ),
        )
    offer = bobs("offer")
    yield accepted(
        "offer after a seq that a thief made the largest",
        "alice paired, seq poisoned",
        Box(A1, offer),
        seen_seq=LATE,
        sent=[reply(B1, "call", B1_AT, hash_of(offer))],
    )


def accepted_last_words() -> Iterator[Json]:
    """Yield unshares, whose seq counts for nothing."""
    for name, where, seq in (
        ("unshare with the seq that was accepted last", "alice paired", SOON),
        ("unshare with seq 1", "alice paired", 1),
        ("unshare with the largest seq", "alice paired", 2**53 - 1),
        ("unshare after a seq that a thief made the largest", "alice paired, seq poisoned", LATE),
    ):
        left = bobs("unshare", seq=seq)
        yield accepted(
            name,
            where,
            Box(A1, left),
            state="ended",
            why="unshared",
            sent=[reply(B1, "unshare", B1_AT, hash_of(left))],
        )
    yield accepted(
        "unshare with seq 1 to who has left",
        "alice unshared",
        Box(A1, bobs("unshare", seq=1)),
        state="ended",
    )
    left = alices("unshare", seq=1)
    yield accepted(
        "unshare with seq 1 from Alice",
        "bob paired",
        Box(B0, left),
        state="ended",
        why="unshared",
        sent=[reply(A1, "unshare", A1_AT, hash_of(left), BOB)],
    )


def accepted_ends() -> Iterator[Json]:
    """Yield messages that count at the end of a sharing."""
    offer = bobs("offer")
    left = bobs("unshare")
    yield accepted(
        "unshare",
        "alice paired",
        Box(A1, left),
        state="ended",
        why="unshared",
        sent=[reply(B1, "unshare", B1_AT, hash_of(left))],
    )
    yield accepted(
        "offer to who has left",
        "alice unshared",
        Box(A1, offer),
        state="unshared",
        sent=[reply(B1, "unshare", B1_AT, hash_of(offer))],
    )
    yield accepted(
        "unshare to who has left", "alice unshared", Box(A1, bobs("unshare")), state="ended"
    )
    yield accepted(
        "welcome to who has left",
        "bob unshared",
        Box(B0, WELCOME),
        state="unshared",
        sent=[reply(A1, "unshare", A1_AT, hash_of(WELCOME), BOB)],
    )


def accepted_moves() -> Iterator[Json]:
    """Yield messages that announce an address, and nothing else."""
    elsewhere = mailbox(B2.pub, "https://other.example:8443/relay", "key 1")
    moved = bobs("moved", connectoid=elsewhere)
    yield accepted(
        "moved",
        "alice paired",
        Box(A1, moved),
        connectoid=elsewhere,
        seen_seq=LATE,
        state="paired",
        sent=[reply(B2, "moved", elsewhere, hash_of(moved))],
    )
    answer = bobs("moved", to=A2_AT, re=A_HASH)
    yield accepted(
        "moved in answer, at the pending address",
        "alice paired, moving",
        Box(A2, answer),
        current=A2_AT,
        pending=None,
        former=[A1_AT],
        seen_seq=LATE,
    )
    early = bobs("offer", seq=LATE - 1)
    moved = bobs("moved")
    yield accepted(
        "moved after an offer of the round",
        "alice paired",
        Box(A1, moved),
        Box(A1, early),
        seen_seq=LATE,
        sent=[
            reply(B1, "moved", B1_AT, hash_of(moved)),
            reply(B1, "call", B1_AT, hash_of(early)),
        ],
    )
    yield from accepted_late_moves(moved)


def accepted_late_moves(moved: str) -> Iterator[Json]:
    """Yield Bob's message to an Alice who has left, and one of Alice."""
    yield accepted(
        "moved to who has left",
        "alice unshared",
        Box(A1, moved),
        state="unshared",
        sent=[reply(B1, "unshare", B1_AT, hash_of(moved))],
    )
    yield accepted(
        "moved from Alice",
        "bob paired, moving",
        Box(B1, alices("moved", to=B1_AT)),
        seen_seq=LATE,
        sent=[reply(A1, "moved", A1_AT, hash_of(alices("moved", to=B1_AT)), BOB, connectoid=B2_AT)],
    )


def accepted_from_alice() -> Iterator[Json]:
    """Yield messages of Alice that count."""
    yield accepted("call", "bob paired", Box(B0, alices("call")), seen_seq=LATE, state="paired")
    yield accepted(
        "call at the pending address",
        "bob paired",
        Box(B1, alices("call", to=B1_AT)),
        current=B1_AT,
        former=[B0_AT],
        pending=None,
    )
    yield accepted(
        "answer to an offer that is no longer out",
        "bob paired",
        Box(B0, alices("answer")),
        seen_seq=LATE,
        state="paired",
    )
    left = alices("unshare")
    yield accepted(
        "unshare from Alice",
        "bob paired",
        Box(B0, left),
        state="ended",
        why="unshared",
        sent=[reply(A1, "unshare", A1_AT, hash_of(left), BOB)],
    )


def accepted_later() -> Iterator[Json]:
    """Yield messages that count between two that know each other."""
    yield from accepted_addresses()
    yield from accepted_seqs()
    yield from accepted_last_words()
    yield from accepted_ends()
    yield from accepted_moves()
    yield from accepted_from_alice()
