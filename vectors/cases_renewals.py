"""Cases of renewals: a new signing key in place of the old one, and what counts afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cases_in_context import (
    LATE,
    SOON,
    Box,
    accepted,
    alices,
    bobs,
    bound_of_alice,
    context,
    contexts,
    reply,
    undone_of_mallory,
)
from cases_refused import beside, refused
from vector_forms import RENEW, hash_of, hash_of_link, mailbox, prove, prove_renewal
from vector_keys import Json, Key, b64, scatter, sha256, sign, unb64
from vector_people import (
    A0,
    A0_AT,
    A1,
    A1_AT,
    A2,
    A2_AT,
    A_HASH,
    ALICE,
    B0,
    B1,
    B1_AT,
    B2,
    B2_AT,
    BOB,
    HELLO,
    INVITATION,
    M0,
    M0_AT,
    MALLORY,
    MALLORYS_HELLO,
    NEW_ALICE,
    NEW_BOB,
    NEWEST_BOB,
    R,
    S,
)

OF_LINK = hash_of_link(INVITATION)

# Of another message that has told Alice's new key.
OTHER_HASH = b64(scatter("the hash of something else", 32))


def bob_renews(old: Key = BOB, new: Key = NEW_BOB, /, **changes: Any) -> str:
    """Return Bob's `renew`, changed."""
    proof = prove_renewal(new, old, new, INVITATION, changes.get("connectoid", B2_AT))
    members: Json = {"from": old.pub, "next": new.pub, "proof": proof, "connectoid": B2_AT}
    return bobs("renew", old, **members | changes)


def alice_renews(**changes: Any) -> str:
    """Return Alice's `renew`, changed."""
    proof = prove_renewal(NEW_ALICE, ALICE, NEW_ALICE, INVITATION, A2_AT)
    members: Json = {"next": NEW_ALICE.pub, "proof": proof, "connectoid": A2_AT}
    return alices("renew", **members | changes)


def new_bobs(kind: str, /, **changes: Any) -> str:
    """Return a numbered message that Bob's new key signs, changed."""
    return bobs(kind, NEW_BOB, **{"from": NEW_BOB.pub, "connectoid": B2_AT} | changes)


def contexts_of_renewals() -> dict[str, Json]:
    """Return the contexts in which one side has a new key."""
    known = contexts()
    bob_is_new = {
        "contact": NEW_BOB.pub,
        "former_contact": BOB.pub,
        "connectoid": B2_AT,
        "seen_seq": LATE - 1,
    }
    renewing: Json = {
        "from": NEW_ALICE.pub,
        "private": NEW_ALICE.private,
        "old_from": ALICE.pub,
        "old_private": ALICE.private,
        "renewal_hashes": [OTHER_HASH, A_HASH],
    }
    return {
        "alice unshared, renewing": known["alice unshared"] | renewing,
        "alice paired, Bob is new": known["alice paired"] | bob_is_new,
        "alice paired, two were Bob": known["alice paired"] | {"key_news": "copied"},
        "alice unshared, Bob is new": known["alice unshared"] | bob_is_new,
        **contexts_of_links_left(renewing),
        "bob paired, Alice is new": known["bob paired"]
        | {
            "contact": NEW_ALICE.pub,
            "former_contact": ALICE.pub,
            "connectoid": A2_AT,
            "seen_seq": LATE - 1,
        },
        "alice paired, renewing": context(
            "inviter",
            "paired",
            {"pending": A2_AT, "current": A1_AT},
            hello_hash=known["alice paired"]["hello_hash"],
            contact=BOB.pub,
            connectoid=B1_AT,
            seen_seq=SOON,
            link_hash=OF_LINK,
        )
        | renewing,
    }


def contexts_of_links_left(renewing: Json) -> dict[str, Json]:
    """Return those of Alice whose link somebody may still open, while she renews and afterwards."""
    bound: Json = {name: known for name, known in bound_of_alice().items() if name != "welcome"}
    link: Json = {"link_from": ALICE.pub, "link_private": ALICE.private}
    done: Json = {"old_from": "", "old_private": "", "renewal_hashes": []}
    under_way = context(
        "inviter",
        "paired",
        {"invited": A0_AT, "pending": A2_AT, "current": A1_AT},
        **bound,
        connectoid=B1_AT,
        seen_seq=SOON,
    ) | renewing | link
    return {
        "alice paired, renewing, with her link": under_way,
        "alice paired, renewed, with her link": under_way | done,
        "alice unshared, renewed, with her link": under_way | done | {"state": "unshared"},
    }


def accepted_renewals() -> Iterator[Json]:
    """Yield renewals that count, and what counts after them."""
    yield from accepted_new_keys()
    yield from accepted_after_renewals()
    yield from accepted_while_renewing()
    yield from accepted_in_other_order()
    yield from accepted_at_links_left()


def accepted_at_links_left() -> Iterator[Json]:
    """Yield hellos to a link whose signing key was renewed."""
    told = reply(M0, "used", M0_AT, hash_of(MALLORYS_HELLO), r=R, connectoid=A0_AT)
    for name, where, undone, members in (
        ("second hello, while renewing", "alice paired, renewing, with her link", [],
         {"warned": True, "state": "paired"}),
        ("second hello, after a renewal", "alice paired, renewed, with her link",
         [undone_of_mallory()], {"warned": True, "state": "paired"}),
        ("hello at a link withdrawn, after a renewal", "alice unshared, renewed, with her link",
         [undone_of_mallory()], {"state": "unshared"}),
    ):
        yield accepted(name, where, Box(A0, MALLORYS_HELLO), sent=[told, *undone], **members)
    yield accepted(
        "the same hello again, after a renewal",
        "alice paired, renewed, with her link",
        Box(A0, HELLO),
        state="paired",
        contact=BOB.pub,
    )


def answered(box: Key, to: str, renewed: str, signer: Key = ALICE) -> Json:
    """Return the answer to a `renew`."""
    return reply(box, "moved", to, hash_of(renewed), signer)


def accepted_new_keys() -> Iterator[Json]:
    """Yield renewals of a contact."""
    mine, hers = bob_renews(), alice_renews()
    yield accepted(
        "renew",
        "alice paired",
        Box(A1, mine),
        contact=NEW_BOB.pub,
        former_contact=BOB.pub,
        connectoid=B2_AT,
        seen_seq=LATE,
        state="paired",
        key_news="renewed",
        sent=[answered(B2, B2_AT, mine)],
    )
    yield accepted(
        "renew from Alice",
        "bob paired",
        Box(B0, hers),
        contact=NEW_ALICE.pub,
        connectoid=A2_AT,
        seen_seq=LATE,
        sent=[answered(A2, A2_AT, hers, BOB)],
    )
    yield accepted(
        "renew before anything else",
        "bob ready",
        Box(B0, hers),
        contact=NEW_ALICE.pub,
        state="paired",
        sent=[answered(A2, A2_AT, hers, BOB)],
    )
    yield from accepted_newer_keys()


def accepted_newer_keys() -> Iterator[Json]:
    """Yield renewals of who has renewed before, and to who has left."""
    mine = bob_renews()
    again = bob_renews(NEW_BOB, NEWEST_BOB)
    yield accepted(
        "renew of a key that was renewed before",
        "alice paired, Bob is new",
        Box(A1, again),
        contact=NEWEST_BOB.pub,
        former_contact=NEW_BOB.pub,
        seen_seq=LATE,
        sent=[answered(B2, B2_AT, again)],
    )
    yield accepted(
        "renew to who has left",
        "alice unshared",
        Box(A1, mine),
        contact=NEW_BOB.pub,
        connectoid=B2_AT,
        seen_seq=LATE,
        state="unshared",
        key_news="renewed",
        sent=[reply(B2, "unshare", B2_AT, hash_of(mine))],
    )
    yield from accepted_whatever_the_seq()


def accepted_whatever_the_seq() -> Iterator[Json]:
    """Yield renewals, whose seq counts for nothing."""
    for name, where, seq in (
        ("renew with the seq that was accepted last", "alice paired", SOON),
        ("renew with seq 1", "alice paired", 1),
        ("renew with the largest seq", "alice paired", 2**53 - 1),
        ("renew after a seq that a thief made the largest", "alice paired, seq poisoned", LATE),
    ):
        text = bob_renews(seq=seq)
        yield accepted(
            name,
            where,
            Box(A1, text),
            contact=NEW_BOB.pub,
            connectoid=B2_AT,
            seen_seq=seq,
            sent=[answered(B2, B2_AT, text)],
        )


def accepted_after_renewals() -> Iterator[Json]:
    """Yield messages by a key that the old one has vouched for."""
    text = bob_renews()
    moved = new_bobs("moved", seq=LATE + 1)
    for name, boxes in (
        ("renew, and moved by the new key", (Box(A1, text), Box(A1, moved))),
        ("moved by the new key, found before its renew", (Box(A1, moved), Box(A1, text))),
    ):
        yield accepted(
            name,
            "alice paired",
            *boxes,
            contact=NEW_BOB.pub,
            connectoid=B2_AT,
            seen_seq=LATE + 1,
            sent=[answered(B2, B2_AT, text)],
        )
    yield accepted(
        "renew after an offer of the round by the old key",
        "alice paired",
        Box(A1, bobs("offer", seq=LATE - 1)),
        Box(A1, text),
        contact=NEW_BOB.pub,
        connectoid=B2_AT,
        seen_seq=LATE,
        sent=[answered(B2, B2_AT, text)],
    )
    yield from accepted_by_the_new_key()


def accepted_by_the_new_key() -> Iterator[Json]:
    """Yield what the new key signs later on."""
    offer = new_bobs("offer")
    yield accepted(
        "offer by the new key",
        "alice paired, Bob is new",
        Box(A1, offer),
        seen_seq=LATE,
        sent=[reply(B2, "call", B2_AT, hash_of(offer))],
    )
    left = new_bobs("unshare")
    yield accepted(
        "unshare by the new key",
        "alice paired, Bob is new",
        Box(A1, left),
        state="ended",
        why="unshared",
        sent=[reply(B2, "unshare", B2_AT, hash_of(left))],
    )


def accepted_in_other_order() -> Iterator[Json]:
    """Yield rounds whose order by seq is not what counts."""
    text = bob_renews(seq=SOON + 1)
    late = bobs("moved", seq=LATE)
    yield accepted(
        "renew, and moved by the old key with a larger seq",
        "alice paired",
        Box(A1, text),
        Box(A1, late),
        contact=NEW_BOB.pub,
        seen_seq=SOON + 1,
        sent=[reply(B1, "moved", B1_AT, hash_of(late)), answered(B2, B2_AT, text)],
    )
    yield beside(
        "unexpected",
        "unshare by the old key, and renew with a smaller seq",
        "alice paired",
        Box(A1, bob_renews(BOB, NEWEST_BOB, seq=1)),
        Box(A1, bobs("unshare")),
        state="ended",
        why="unshared",
        sent=[reply(B1, "unshare", B1_AT, hash_of(bobs("unshare")))],
    )
    yield from accepted_beside_another()


def accepted_beside_another() -> Iterator[Json]:
    """Yield renewals beside one that does not count."""
    text = bob_renews(seq=SOON + 1)
    yield beside(
        "replay",
        "renew twice in a round",
        "alice paired",
        Box(A1, bob_renews(seq=LATE - 1)),
        Box(A1, bob_renews()),
        contact=NEW_BOB.pub,
        seen_seq=LATE - 1,
        sent=[answered(B2, B2_AT, bob_renews(seq=LATE - 1))],
    )
    yield beside(
        "proof",
        "renew beside another without its proof",
        "alice paired",
        Box(A1, bob_renews(BOB, NEWEST_BOB, proof=b64(bytes(96)))),
        Box(A1, text),
        contact=NEW_BOB.pub,
        sent=[answered(B2, B2_AT, text)],
    )


def refused_copies() -> Iterator[Json]:
    """Yield renewals by two devices with the same key, of which none counts."""
    mine, other = bob_renews(), bob_renews(BOB, NEWEST_BOB, seq=1)
    unmoved: Json = {"state": "paired", "contact": BOB.pub, "connectoid": B1_AT, "old_from": ""}
    for name, boxes in (
        ("two renews with another key each", (Box(A1, mine), Box(A1, other))),
        ("two renews with another key each, the other way round", (Box(A1, other), Box(A1, mine))),
    ):
        yield beside(
            "copied", name, "alice paired", *boxes, seen_seq=SOON, key_news="copied", **unmoved
        ) | {"times": 2}
    yield beside(
        "copied",
        "two renews with another key each, to who has left",
        "alice unshared",
        Box(A1, mine),
        Box(A1, other),
        contact=BOB.pub,
        state="unshared",
    ) | {"times": 2}
    where = "alice paired, two were Bob"
    yield refused("copied", "renew after two with another key each", where, Box(A1, mine))
    yield refused(
        "address",
        "address before copied",
        where,
        Box(A1, bob_renews(connectoid=A1_AT)),
    )
    yield accepted(
        "unshare after two renews with another key each",
        where,
        Box(A1, bobs("unshare")),
        state="ended",
        why="unshared",
        sent=[reply(B1, "unshare", B1_AT, hash_of(bobs("unshare")))],
    )


def accepted_while_renewing() -> Iterator[Json]:
    """Yield messages to who has a new key that is not answered yet."""
    where = "alice paired, renewing"
    ahead = reply(B1, "renew", B1_AT, None, next=NEW_ALICE.pub, connectoid=A2_AT)
    offer = bobs("offer")
    call = reply(B1, "call", B1_AT, hash_of(offer), NEW_ALICE, connectoid=A2_AT)
    yield accepted(
        "offer at the old address, while renewing",
        where,
        Box(A1, offer),
        old_from=ALICE.pub,
        current=A1_AT,
        sent=[ahead, call],
    )
    answer = bobs("moved", to=A2_AT, re=A_HASH)
    yield accepted(
        "moved at the new address, while renewing",
        where,
        Box(A2, answer),
        old_from="",
        current=A2_AT,
        pending=None,
        former=[A1_AT],
    )
    text = bob_renews()
    hers = reply(B2, "renew", B2_AT, None, next=NEW_ALICE.pub, connectoid=A2_AT)
    yield accepted(
        "renew at the old address, while renewing",
        where,
        Box(A1, text),
        contact=NEW_BOB.pub,
        connectoid=B2_AT,
        old_from=ALICE.pub,
        sent=[hers, answered(B2, B2_AT, text, NEW_ALICE)],
    )
    yield from accepted_later_while_renewing()


def accepted_later_while_renewing() -> Iterator[Json]:
    """Yield what comes to who has left, and to the new address."""
    last = bobs("offer")
    left = (reply(B1, "unshare", B1_AT, hash_of(last), signer) for signer in (ALICE, NEW_ALICE))
    yield accepted(
        "offer to who has left, while renewing",
        "alice unshared, renewing",
        Box(A1, last),
        sent=list(left),
        state="unshared",
    )
    text = bob_renews(to=A2_AT)
    hers = reply(B2, "renew", B2_AT, None, next=NEW_ALICE.pub, connectoid=A2_AT)
    yield accepted(
        "renew at the new address, while renewing",
        "alice paired, renewing",
        Box(A2, text),
        contact=NEW_BOB.pub,
        old_from=ALICE.pub,
        current=A2_AT,
        sent=[hers, answered(B2, B2_AT, text, NEW_ALICE)],
    )
    yield from accepted_answers()


def accepted_answers() -> Iterator[Json]:
    """Yield answers to what has told the new key, and what a thief's `moved` has brought about."""
    where = "alice paired, renewing"
    for name, box, to, re in (
        ("offer at the new address that answers an older word, while renewing",
         A2, A2_AT, OTHER_HASH),
        ("offer at the old address that answers a word, while renewing", A1, A1_AT, A_HASH),
    ):
        text = bobs("offer", to=to, re=re)
        call = reply(B1, "call", B1_AT, hash_of(text), NEW_ALICE, connectoid=A2_AT)
        yield accepted(name, where, Box(box, text), old_from="", sent=[call])
    unproven: Json = {"current": A2_AT, "pending": None, "former": [A1_AT], "old_from": ALICE.pub}
    stolen = bobs("moved", to=A2_AT, re=hash_of(alices("moved", connectoid=A2_AT)))
    yield accepted(
        "moved at the new address that answers the old key, while renewing",
        where,
        Box(A2, stolen),
        **unproven,
    )
    offer = bobs("offer", to=A2_AT)
    ahead = reply(B1, "renew", B1_AT, None, next=NEW_ALICE.pub, connectoid=A2_AT)
    call = reply(B1, "call", B1_AT, hash_of(offer), NEW_ALICE, connectoid=A2_AT)
    yield accepted(
        "offer at the new address that answers nothing, while renewing",
        where,
        Box(A2, offer),
        sent=[ahead, call],
        **unproven,
    )


def refused_renewals() -> Iterator[Json]:
    """Yield renewals that do not count, and what the old key says afterwards."""
    yield from refused_proofs()
    yield from refused_new_keys()
    yield from refused_old_keys()
    yield from refused_copies()


def refused_proofs() -> Iterator[Json]:
    """Yield proofs of a new key that do not fit."""
    for name, proof in (proofs_of_something_else() | proofs_of_another_form()).items():
        text = bob_renews(proof=proof)
        yield refused("proof", f"a renew with a proof {name}", "alice paired", Box(A1, text))


def proofs_of_something_else() -> dict[str, str]:
    """Return proofs by another key, or for other keys, another link or another address."""
    other_link = INVITATION[:-1] + chr(ord(INVITATION[-1]) ^ 1)
    return {
        "by the old key": prove_renewal(BOB, BOB, NEW_BOB, INVITATION, B2_AT),
        "by Mallory": prove_renewal(MALLORY, BOB, NEW_BOB, INVITATION, B2_AT),
        "for another old key": prove_renewal(NEW_BOB, MALLORY, NEW_BOB, INVITATION, B2_AT),
        "for another new key": prove_renewal(NEW_BOB, BOB, NEWEST_BOB, INVITATION, B2_AT),
        "for another link": prove_renewal(NEW_BOB, BOB, NEW_BOB, other_link, B2_AT),
        "for another address": prove_renewal(NEW_BOB, BOB, NEW_BOB, INVITATION, B1_AT),
        "whose keys are swapped": prove_renewal(NEW_BOB, NEW_BOB, BOB, INVITATION, B2_AT),
        "without its zero": prove_renewal(
            NEW_BOB, BOB, NEW_BOB, INVITATION, B2_AT, info=b"connectoid/1 renew"
        ),
        "of another use": prove_renewal(
            NEW_BOB, BOB, NEW_BOB, INVITATION, B2_AT, info=b"connectoid/1 message\0"
        ),
    }


def proofs_of_another_form() -> dict[str, str]:
    """Return proofs over other octets, and what is no signature."""
    keys = RENEW + unb64(BOB.pub) + unb64(NEW_BOB.pub)
    of_link, of_address = sha256(INVITATION.encode()), sha256(B2_AT.encode())
    good = unb64(prove_renewal(NEW_BOB, BOB, NEW_BOB, INVITATION, B2_AT))
    return {
        "for no address": b64(sign(NEW_BOB, keys + of_link)),
        "whose hashes are swapped": b64(sign(NEW_BOB, keys + of_address + of_link)),
        "that has the contact's key, too": b64(
            sign(NEW_BOB, keys + unb64(ALICE.pub) + of_link + of_address)
        ),
        "of zeros": b64(bytes(96)),
        "with a bit changed": b64(bytes([good[0] ^ 1]) + good[1:]),
    }


def refused_new_keys() -> Iterator[Json]:
    """Yield renewals with something else wrong."""
    for reason, name, where, box in (
        ("sender", "renew of Mallory's key", "alice paired", Box(A1, bob_renews(MALLORY))),
        (
            "signature",
            "renew that the new key signs",
            "alice paired",
            Box(A1, bob_renews(NEW_BOB, NEW_BOB, **{"from": BOB.pub})),
        ),
        (
            "signature",
            "signature before proof, of a renew",
            "alice paired",
            Box(A1, bob_renews(MALLORY, **{"from": BOB.pub})),
        ),
        ("unexpected", "renew at the link's mailbox", "alice paired",
         Box(A0, bob_renews(to=A0_AT))),
        ("address", "renew with an address of the recipient's own", "alice paired",
         Box(A1, bob_renews(connectoid=A1_AT))),
        ("address", "an offer with the recipient's old key as a mailbox", "alice paired, renewing",
         Box(A1, bobs("offer", connectoid=mailbox(ALICE.pub)))),
        ("jws", "a proof of the link on a renew", "alice paired",
         Box(A1, prove(S, bob_renews()))),
        ("recipient", "renew to another address", "alice paired",
         Box(A1, bob_renews(to=A2_AT))),
        ("replay", "renew to the key that is there", "alice paired",
         Box(A1, bob_renews(BOB, BOB))),
    ):
        yield refused(reason, name, where, box)


def refused_old_keys() -> Iterator[Json]:
    """Yield what a copy of Bob's device may say after his renewal."""
    new, left = "alice paired, Bob is new", "alice unshared, Bob is new"
    yield refused("replay", "the same renew again", new, Box(A1, bob_renews()))
    yield refused("replay", "the same renew again, to who has left", left, Box(A1, bob_renews()))
    thief = bob_renews(BOB, MALLORY)
    for name, where in (
        ("another renew by the old key", new),
        ("another renew by the old key, to who has left", left),
    ):
        yield refused("sender", name, where, Box(A1, thief))
    for name, where, text in (
        ("offer by the old key", new, bobs("offer")),
        ("moved by the old key", new, bobs("moved")),
        ("unshare by the old key", new, bobs("unshare")),
        ("unshare by the old key, to who has left", left, bobs("unshare")),
        ("unshare by the old key with the largest seq", new, bobs("unshare", seq=2**53 - 1)),
    ):
        yield refused("replaced", name, where, Box(A1, text))
    yield refused(
        "replaced",
        "call by Alice's old key",
        "bob paired, Alice is new",
        Box(B1, alices("call", to=B1_AT)),
    )
