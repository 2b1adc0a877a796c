"""Cases of messages in context that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from cases_envelope import flip
from cases_in_context import (
    DAY,
    LATE,
    NOW,
    RELEASE,
    SOON,
    Box,
    accepted,
    alices,
    at_time,
    bobs,
    reply,
)
from cases_small import HOSTILE_URLS
from vector_forms import (
    CHANNEL,
    HEADER,
    MESSAGE,
    QUESTION,
    RELAY,
    commit,
    hash_of,
    invite,
    mailbox,
    make_jws,
    pad,
    prove,
    sdp,
    seal,
    to_json,
)
from vector_keys import HALF, Json, Key, b64, hpke_seal, no_point, scatter, sha256, sign_der, unb64
from vector_people import (
    A0,
    A0_AT,
    A1,
    A1_AT,
    A2,
    A2_AT,
    A_HASH,
    AF,
    AF_AT,
    ALICE,
    B0,
    B0_AT,
    B1,
    B1_AT,
    B2_AT,
    BF_AT,
    BOB,
    HELLO,
    INVITATION,
    M0_AT,
    MALLORY,
    MALLORYS_HELLO,
    OTHER_R,
    OTHER_S,
    WELCOME,
    R,
    S,
    from_alice,
    from_bob,
    hello,
    hello_payload,
    used,
    welcome,
)


def refused(reason: str, name: str, where: str, box: Box) -> Json:
    """Return a case in which a message is refused and changes nothing."""
    return {"name": name, "context": where, "found": [box.found], "refused": reason}


def raw(box: Key, sealed: str) -> Box:
    """Return `data` as it is."""
    return Box(box, sealed, is_sealed=True)


def refused_seals() -> Iterator[Json]:
    """Yield data with a wrong seal."""
    text = bobs("offer")
    data = seal(A1.pub, text)
    for name, changed in {
        "padded data": data + "=",
        "standard alphabet": "/" + data[1:],
        "unused bits": seal(A1.pub, text)[:-2] + "B",
        "white space": data[:9] + " " + data[9:],
        "length 1 modulo 4": data[: len(data) // 4 * 4 - 3],
    }.items():
        yield refused("encoding", name, "alice paired", raw(A1, changed))
    octets = pad(text.encode())
    for name, changed in {
        "a question": b64(hpke_seal(A1.pub, QUESTION, scatter("answer", 32).hex().encode())),
        "a message sealed as a question": seal(A1.pub, text, QUESTION),
        "a message sealed as a challenge": seal(A1.pub, text, CHANNEL),
        "sealed to another mailbox of hers": seal(A0.pub, text),
        "a bit changed": b64(flip(unb64(data), 200)),
        "two characters": "AA",
        "not sealed": b64(octets),
        "the ephemeral key is no point": b64(b"\4" + bytes(96) + unb64(data)[97:]),
    }.items():
        yield refused("seal", name, "alice paired", raw(A1, changed))
    for name, plaintext in {
        "not padded": octets[: 4 + len(text)],
        "padding of another size": octets + bytes(1_000),
        "something in the padding": octets[:-1] + b"\1",
        "length beyond the end": b"\0\1\0\0" + octets[4:],
    }.items():
        yield refused(
            "padding", name, "alice paired", raw(A1, b64(hpke_seal(A1.pub, MESSAGE, plaintext)))
        )


def refused_texts() -> Iterator[Json]:
    """Yield sealed texts that are no messages."""
    text = bobs("offer")
    none = f"{b64(HEADER.replace('ES384', 'none').encode())}.{text.split('.')[1]}."
    for name, changed in {
        "alg none": none,
        "alg HS256": make_jws(BOB, from_bob("offer"), HEADER.replace("ES384", "HS256")),
        "a proof on an offer": prove(S, text),
        "no JWS": "hello",
        "not ASCII": "\u00e9" + text,
    }.items():
        yield refused("jws", name, "alice paired", Box(A1, changed))
    for name, payload in {
        "no type": {},
        "seq is a text": from_bob("offer", seq=str(LATE)),
        "no SDP": from_bob("offer", sdpOffer=None),
        "an unknown type": from_bob("bye"),
        "seq of 2^53": from_bob("offer", seq=2**53),
    }.items():
        yield refused("payload", name, "alice paired", Box(A1, make_jws(BOB, payload)))


def with_lines(kind: str, *lines: str) -> Json:
    """Return an offer or answer with more lines."""
    known = sdp(kind, "-")
    return known | {"sdp": known["sdp"] + "".join(f"{line}\r\n" for line in lines)}


VIDEO_OFFER = with_lines("offer", "m=video 9 UDP/TLS/RTP/SAVPF 96")
CANDIDATES = tuple(f"a=candidate:1 1 udp 1 192.0.2.{n} 9 typ host" for n in range(1, 34))


def refused_sdps() -> Iterator[Json]:
    """Yield messages with an offer or answer that WebRTC must not see."""
    video = VIDEO_OFFER
    audio = with_lines("answer", "m=audio 9 UDP/TLS/RTP/SAVPF 111")
    for name, where, box in (
        ("hello of video", "alice invited", Box(A0, hello(sdpOffer=video))),
        ("hello of video without its proof", "alice invited",
         Box(A0, hello(MALLORY, OTHER_S, sdpOffer=video))),
        ("welcome of audio", "bob opened", Box(B0, welcome(sdpAnswer=audio))),
        ("ready of video", "alice welcomed", Box(A1, bobs("ready", sdpOffer=video))),
        ("offer of video", "alice paired", Box(A1, bobs("offer", sdpOffer=video))),
        ("offer of video at the pending address", "alice paired, moving",
         Box(A2, bobs("offer", to=A2_AT, sdpOffer=video))),
        ("answer of audio", "bob paired", Box(B0, alices("answer", sdpAnswer=audio))),
        ("answer with 33 candidates", "bob paired",
         Box(B0, alices("answer", sdpAnswer=with_lines("answer", *CANDIDATES)))),
    ):
        yield refused("sdp", name, where, box)


def refused_envelopes() -> Iterator[Json]:
    """Yield data that is no message, or not for this mailbox."""
    yield from refused_seals()
    yield from refused_texts()
    yield from refused_sdps()


def refused_recipients() -> Iterator[Json]:
    """Yield messages to another address: moved, or reflected."""
    for name, where, box in (
        ("moved recipient: a hello to Mallory's link", "alice invited", Box(A0, hello(to=M0_AT))),
        ("hello to the whole invitation", "alice invited", Box(A0, hello(to=INVITATION))),
        (
            "hello to the address with a dot after it",
            "alice invited",
            Box(A0, hello(to=A0_AT + ".")),
        ),
        ("hello to one of two mailboxes", "alice invited, two mailboxes", Box(A0, hello(to=A0_AT))),
        (
            "hello to the mailboxes in another order",
            "alice invited, two mailboxes",
            Box(A0, hello(to=f"{AF_AT}~{A0_AT}")),
        ),
        (
            "hello to the key at another relay",
            "alice invited",
            Box(A0, hello(to=mailbox(A0.pub, "https://other.example/"))),
        ),
        ("moved recipient: a welcome to Mallory", "bob opened", Box(B0, welcome(to=M0_AT))),
        (
            "moved between two addresses of hers",
            "alice paired, moving",
            Box(A1, bobs("offer", to=A2_AT)),
        ),
        ("an offer to somebody else", "alice paired", Box(A1, bobs("offer", to=M0_AT))),
        ("an offer with an empty to", "alice paired", Box(A1, bobs("offer", to=""))),
        ("moved recipient: a call to Mallory", "bob paired", Box(B0, alices("call", to=M0_AT))),
        ("reflected call", "alice paired", Box(A1, make_jws(ALICE, from_alice("call", seq=LATE)))),
        ("reflected hello", "bob opened", Box(B0, HELLO)),
        ("reflected welcome", "alice welcomed", Box(A1, WELCOME)),
    ):
        yield refused("recipient", name, where, box)


def refused_places() -> Iterator[Json]:
    """Yield types that have no place in the state, from the side or in the mailbox."""
    for name, where, box in (
        ("hello to an opener", "bob opened", Box(B0, hello(MALLORY, to=B0_AT))),
        ("hello to an opener, paired", "bob paired", Box(B0, hello(ALICE, to=B0_AT))),
        ("hello at the address of the welcome", "alice welcomed", Box(A1, hello(to=A1_AT))),
        ("welcome to an inviter", "alice invited", Box(A0, welcome(MALLORY, to=A0_AT))),
        ("used to an inviter", "alice paired", Box(A1, used(BOB, to=A1_AT))),
        ("second welcome", "bob ready", Box(B0, welcome(connectoid=A2_AT))),
        ("welcome when paired", "bob paired", Box(B0, WELCOME)),
        ("used after the welcome", "bob ready", Box(B0, used())),
        ("used to who has left", "bob unshared", Box(B0, used())),
        ("answer to an inviter", "alice paired", Box(A1, bobs("answer"))),
        ("call to an inviter", "alice paired", Box(A1, bobs("call"))),
        ("offer to an opener", "bob paired", Box(B0, alices("offer"))),
        ("ready to an opener", "bob paired", Box(B0, alices("ready", re=A_HASH))),
        ("offer at the link's mailbox", "alice paired", Box(A0, bobs("offer", to=A0_AT))),
        ("moved at the link's mailbox", "alice paired", Box(A0, bobs("moved", to=A0_AT))),
        ("ready at the link's mailbox", "alice welcomed", Box(A0, bobs("ready", to=A0_AT))),
    ):
        yield refused("unexpected", name, where, box)


def refused_pairings() -> Iterator[Json]:
    """Yield hellos, welcomes and useds that the link does not vouch for."""
    payload = hello_payload()
    for name, text in {
        "hello with a bad proof": prove(OTHER_S, make_jws(BOB, payload)),
        "hello by a relay that has no S": hello(MALLORY, OTHER_S),
        "hello with a proof by h": hello(MALLORY, commit(ALICE.pub, R)),
        "hello with the proof of another": ".".join(
            (MALLORYS_HELLO.rpartition(".")[0], HELLO.rpartition(".")[2])
        ),
        "hello with an empty proof": make_jws(BOB, payload) + ".",
        "hello with a padded proof": HELLO + "=",
        "hello proven for another link": hello(BOB, OTHER_S, to=A0_AT),
    }.items():
        yield refused("proof", name, "alice invited", Box(A0, text))
    yield refused(
        "proof",
        "second hello with a bad proof",
        "alice welcomed",
        Box(A0, hello(MALLORY, OTHER_S, connectoid=M0_AT)),
    )
    for name, text in {
        "welcome with another r": welcome(r=OTHER_R),
        "welcome with another key": welcome(MALLORY),
        "welcome with another key and r": welcome(MALLORY, r=OTHER_R),
        "welcome from Bob himself": welcome(BOB),
        "used with another r": used(r=OTHER_R),
        "used with another key": used(MALLORY),
    }.items():
        yield refused("commitment", name, "bob opened", Box(B0, text))
    for name, text in {
        "welcome to another hello": welcome(re=hash_of(MALLORYS_HELLO)),
        "used with a wrong re": used(re=A_HASH),
        "welcome whose re is the hash with the proof": welcome(re=b64(sha256(HELLO.encode()))),
        "welcome whose re is the hash with the signature": welcome(
            re=b64(sha256(HELLO.rpartition(".")[0].encode()))
        ),
        "used for another's hello": used(re=hash_of(MALLORYS_HELLO)),
    }.items():
        yield refused("reply", name, "bob opened", Box(B0, text))


NOT_NEW = (
    ("the seq that was accepted last", "alice paired", Box(A1, bobs("offer", seq=SOON))),
    ("a smaller seq", "alice paired", Box(A1, bobs("offer", seq=SOON - 1))),
    ("seq 1", "alice paired", Box(A1, bobs("offer", seq=1))),
    ("an old ready", "alice paired", Box(A1, make_jws(BOB, from_bob("ready")))),
    (
        "an old message at the former address",
        "alice paired, moving",
        Box(AF, bobs("offer", to=AF_AT, seq=SOON)),
    ),
    (
        "an old message at the pending address",
        "alice paired, moving",
        Box(A2, bobs("offer", to=A2_AT, seq=SOON)),
    ),
    ("an old call", "bob paired", Box(B0, alices("call", seq=SOON))),
)

AHEAD = (
    ("seq a day and more ahead", "alice paired", Box(A1, bobs("offer", seq=NOW + DAY + 1))),
    ("the largest seq", "alice paired", Box(A1, bobs("offer", seq=2**53 - 1))),
    (
        "the largest seq after a thief sent it",
        "alice paired, seq poisoned",
        Box(A1, bobs("offer", seq=2**53 - 1)),
    ),
    (
        "the largest seq at the pending address",
        "alice paired, moving",
        Box(A2, bobs("offer", to=A2_AT, seq=2**53 - 1)),
    ),
    (
        "the largest seq to who has left",
        "alice unshared",
        Box(A1, bobs("offer", seq=2**53 - 1)),
    ),
    ("a ready far ahead", "alice welcomed", Box(A1, bobs("ready", seq=NOW + DAY + 1))),
    ("a call far ahead", "bob paired", Box(B0, alices("call", seq=NOW + DAY + 1))),
)

NOT_THE_CONTACTS = (
    (
        "offer of Mallory",
        "alice paired",
        Box(A1, bobs("offer", MALLORY, **{"from": MALLORY.pub})),
    ),
    (
        "offer under Alice's own key",
        "alice paired",
        Box(A1, bobs("offer", ALICE, **{"from": ALICE.pub})),
    ),
    (
        "unshare of Mallory",
        "alice paired",
        Box(A1, bobs("unshare", MALLORY, **{"from": MALLORY.pub})),
    ),
    ("unshare before any hello", "alice invited", Box(A0, bobs("unshare", to=A0_AT))),
    ("call before the welcome", "bob opened", Box(B0, alices("call"))),
    (
        "ready of Mallory, who lost the race",
        "alice welcomed",
        Box(A1, bobs("ready", MALLORY, **{"from": MALLORY.pub})),
    ),
    ("call of Mallory", "bob ready", Box(B0, alices("call", MALLORY, **{"from": MALLORY.pub}))),
    (
        "offer of Mallory to who has left",
        "alice unshared",
        Box(A1, bobs("offer", MALLORY, **{"from": MALLORY.pub})),
    ),
    (
        "Mallory at the pending address",
        "alice paired, moving",
        Box(A2, bobs("offer", MALLORY, to=A2_AT, **{"from": MALLORY.pub})),
    ),
)


def refused_senders() -> Iterator[Json]:
    """Yield numbered messages that are not of the contact, not new, or not signed by it."""
    for name, where, box in NOT_THE_CONTACTS:
        yield refused("sender", name, where, box)
    for name, where, box in NOT_NEW:
        yield refused("replay", name, where, box)
    for name, where, box in AHEAD:
        yield refused("ahead", name, where, box)
    largest = Box(A1, bobs("offer", seq=2**53 - 1))
    for name, now_us in (
        ("the largest seq, by a clock that shows the first day that can be true", RELEASE),
        ("the largest seq, by a clock that shows a little less than 2^52", 2**52 - 1),
    ):
        yield at_time(now_us, refused("ahead", name, "alice paired", largest))


def unsigned(text: str, signature: bytes = bytes(96)) -> str:
    """Return a message with other bytes for a signature; a hello gets the proof for them."""
    head, body, *rest = text.split(".")
    jws = f"{head}.{body}.{b64(signature)}"
    if len(rest) > 1:
        return prove(S, jws)
    return jws


def refused_signatures() -> Iterator[Json]:
    """Yield messages of every kind that `from` did not sign."""
    for name, where, box in (*unsigned_pairings(), *unsigned_messages(), *changed_messages()):
        yield refused("signature", name, where, box)


def unsigned_pairings() -> tuple[tuple[str, str, Box], ...]:
    """Return hellos and their answers, not signed by `from`."""
    return (
        (
            "hello, not signed by from",
            "alice invited",
            Box(A0, hello(MALLORY, S, **{"from": BOB.pub})),
        ),
        ("hello with zeros", "alice invited", Box(A0, unsigned(HELLO))),
        ("second hello with zeros", "alice welcomed", Box(A0, unsigned(MALLORYS_HELLO))),
        (
            "welcome, not signed by from",
            "bob opened",
            Box(B0, welcome(MALLORY, **{"from": ALICE.pub})),
        ),
        ("used, not signed by from", "bob opened", Box(B0, used(MALLORY, **{"from": ALICE.pub}))),
    )


def unsigned_messages() -> tuple[tuple[str, str, Box], ...]:
    """Return numbered messages, not signed by `from`."""
    return (
        (
            "offer, not signed by from",
            "alice paired",
            Box(A1, bobs("offer", MALLORY, **{"from": BOB.pub})),
        ),
        (
            "call, not signed by from",
            "bob paired",
            Box(B0, alices("call", MALLORY, **{"from": ALICE.pub})),
        ),
        ("unshare with zeros", "alice paired", Box(A1, unsigned(bobs("unshare")))),
        (
            "unshare with zeros to who has left",
            "alice unshared",
            Box(A1, unsigned(bobs("unshare"))),
        ),
    )


def changed_messages() -> tuple[tuple[str, str, Box], ...]:
    """Return numbered messages, changed or signed in another way."""
    offer = bobs("offer")
    signed, _, signature = offer.rpartition(".")
    other = b64(to_json(from_bob("offer", seq=LATE, connectoid=M0_AT)))
    return (
        (
            "tampered connectoid",
            "alice paired",
            Box(A1, f"{signed.partition('.')[0]}.{other}.{signature}"),
        ),
        (
            "at the pending address, with zeros",
            "alice paired, moving",
            Box(A2, unsigned(bobs("offer", to=A2_AT))),
        ),
        (
            "signature in DER",
            "alice paired",
            Box(A1, unsigned(offer, sign_der(BOB, signed.encode()))),
        ),
        (
            "signed with a mailbox key",
            "alice paired",
            Box(A1, bobs("offer", B0, **{"from": BOB.pub})),
        ),
    )


def refused_urls() -> Iterator[Json]:
    """Yield hellos that name a hostile URL."""
    for name, url in HOSTILE_URLS.items():
        yield refused(
            "address",
            f"hello from {name}",
            "alice invited",
            Box(A0, hello(connectoid=mailbox(B0.pub, url))),
        )


BAD_LISTS = {
    "four mailboxes": "~".join((B0_AT, B1_AT, B2_AT, BF_AT)),
    "a key twice": f"{B0_AT}~{mailbox(B0.pub, 'https://other.example/')}",
    "no point": mailbox(no_point()),
    "second is no point": f"{B0_AT}~{mailbox(no_point())}",
    "nothing": "",
    "an invitation": invite(B0_AT, S, bytes(32)),
    "ext of 1025": mailbox(B0.pub, RELAY, "a" * 1_025),
    "x over the field": mailbox(b64(b"\2" + b"\xff" * HALF)),
    "http": mailbox(B0.pub, "http://relay.example.com/"),
}


def refused_lists() -> Iterator[Json]:
    """Yield messages that name an address of another form."""
    for name, address in BAD_LISTS.items():
        yield refused(
            "address", f"hello: {name}", "alice invited", Box(A0, hello(connectoid=address))
        )
        yield refused(
            "address",
            f"ready: {name}",
            "alice welcomed",
            Box(A1, bobs("ready", connectoid=address)),
        )
        yield refused(
            "address", f"offer: {name}", "alice paired", Box(A1, bobs("offer", connectoid=address))
        )
        yield refused(
            "address", f"welcome: {name}", "bob opened", Box(B0, welcome(connectoid=address))
        )
        yield refused(
            "address", f"call: {name}", "bob paired", Box(B0, alices("call", connectoid=address))
        )
    pending = bobs("offer", to=A2_AT, connectoid=BAD_LISTS["no point"])
    yield refused(
        "address", "no point, at the pending address", "alice paired, moving", Box(A2, pending)
    )
    yield refused(
        "address",
        "second hello: http",
        "alice welcomed",
        Box(A0, hello(MALLORY, connectoid=BAD_LISTS["http"])),
    )


def refused_echoes() -> Iterator[Json]:
    """Yield messages that would have the recipient write to herself or himself."""
    other_relay = "https://other.example/"
    for name, pub in {
        "the link's mailbox": A0.pub,
        "the current mailbox": A1.pub,
        "the signing key": ALICE.pub,
    }.items():
        for address in (mailbox(pub), f"{B1_AT}~{mailbox(pub, other_relay)}"):
            count = address.count("~") + 1
            yield refused(
                "address",
                f"offer: {name}, the recipient's own, {count} of {count}",
                "alice paired",
                Box(A1, bobs("offer", connectoid=address)),
            )
    for name, where, box in (
        ("hello", "alice invited", Box(A0, hello(connectoid=A0_AT))),
        ("welcome", "bob opened", Box(B0, welcome(connectoid=B0_AT))),
        ("used", "bob opened", Box(B0, used(connectoid=B0_AT))),
        ("ready", "alice welcomed", Box(A1, bobs("ready", connectoid=A1_AT))),
        ("unshare", "alice paired", Box(A1, bobs("unshare", connectoid=A1_AT))),
    ):
        yield refused("address", f"{name}: a mailbox that is the recipient's own", where, box)
    for name, where, pub in (
        ("pending", "alice paired, moving", A2.pub),
        ("former", "alice paired, moving", AF.pub),
        ("replaced", "alice paired, moved three times", A2.pub),
    ):
        yield refused(
            "address",
            f"offer: the {name} mailbox, the recipient's own",
            where,
            Box(A1, bobs("offer", connectoid=mailbox(pub))),
        )


def refused_addresses() -> Iterator[Json]:
    """Yield messages that would have others write to bad addresses."""
    yield from refused_urls()
    yield from refused_lists()
    yield from refused_echoes()


def refused_for_two() -> Iterator[Json]:
    """Yield messages with two things wrong: the class is that of the check that comes first."""
    http = mailbox(B0.pub, "http://relay.example.com/")
    noise = pad(b"no JWS")[:-1] + b"\1"
    yield refused(
        "padding",
        "padding before jws",
        "alice paired",
        raw(A1, b64(hpke_seal(A1.pub, MESSAGE, noise))),
    )
    for reason, after, where, box in (*wrong_in_form(), *wrong_in_what_is_proven(http)):
        yield refused(reason, f"{reason} before {after}", where, box)


# The check that refuses, the one that would come later, the receiver, and the message.
Wrong: TypeAlias = tuple[str, str, str, Box]


def wrong_in_form() -> Iterator[Wrong]:
    """Yield messages that are refused before anything is proven."""
    stranger = {"from": MALLORY.pub}
    yield from (
        ("jws", "payload", "alice paired", Box(A1, make_jws(BOB, b"{", '{"alg":"none"}'))),
        ("payload", "recipient", "alice paired", Box(A1, bobs("offer", to=M0_AT, seq=0))),
        (
            "jws",
            "sdp",
            "alice invited",
            Box(A0, make_jws(BOB, hello_payload(sdpOffer=VIDEO_OFFER))),
        ),
        (
            "sdp",
            "recipient",
            "alice paired",
            Box(A1, bobs("offer", to=M0_AT, sdpOffer=VIDEO_OFFER)),
        ),
        ("recipient", "unexpected", "alice paired", Box(A1, bobs("call", to=M0_AT))),
        ("recipient", "proof", "alice invited", Box(A0, hello(BOB, OTHER_S, to=M0_AT))),
        (
            "recipient",
            "sender",
            "alice paired",
            Box(A1, bobs("offer", MALLORY, to=M0_AT, **stranger)),
        ),
        ("unexpected", "sender", "alice paired", Box(A1, bobs("call", MALLORY, **stranger))),
        ("unexpected", "proof", "bob opened", Box(B0, hello(BOB, OTHER_S, to=B0_AT))),
        ("unexpected", "commitment", "alice invited", Box(A0, welcome(to=A0_AT, r=OTHER_R))),
    )


def wrong_in_what_is_proven(http: str) -> Iterator[Wrong]:
    """Yield messages whose form is right; `http` is an address that is not."""
    stranger = {"from": MALLORY.pub}
    yield from (
        ("proof", "signature", "alice invited", Box(A0, unsigned(HELLO)[:-3] + "AAA")),
        ("commitment", "reply", "bob opened", Box(B0, welcome(MALLORY, re=A_HASH))),
        ("reply", "signature", "bob opened", Box(B0, unsigned(welcome(re=A_HASH)))),
        ("sender", "replay", "alice paired", Box(A1, bobs("offer", MALLORY, seq=1, **stranger))),
        ("sender", "signature", "alice paired", Box(A1, unsigned(bobs("offer", BOB, **stranger)))),
        ("replay", "signature", "alice paired", Box(A1, unsigned(bobs("offer", seq=SOON)))),
        ("ahead", "signature", "alice paired", Box(A1, unsigned(bobs("offer", seq=NOW + 2 * DAY)))),
        (
            "sender",
            "ahead",
            "alice paired",
            Box(A1, bobs("offer", MALLORY, seq=NOW + 2 * DAY, **stranger)),
        ),
        ("signature", "address", "alice paired", Box(A1, unsigned(bobs("offer", connectoid=http)))),
        (
            "signature",
            "address of a hello",
            "alice invited",
            Box(A0, unsigned(hello(connectoid=http))),
        ),
        ("address", "unexpected in this state", "bob unshared", Box(B0, used(connectoid=http))),
    )


def beside(reason: str, name: str, where: str, /, *found: Box, **after: Any) -> Json:
    """Return a case in which one message of a round is refused, and another counts."""
    return {**accepted(name, where, *found, **after), "refused": reason}


def refused_twice() -> Iterator[Json]:
    """Yield rounds with a message twice."""
    offer = bobs("offer")
    other = bobs("offer", sdpOffer=sdp("offer", "Bob again"))
    call = reply(B1, "call", B1_AT, hash_of(offer))
    yield beside(
        "replay",
        "the very bytes twice",
        "alice paired",
        Box(A1, offer),
        Box(A1, offer),
        sent=[call],
        seen_seq=LATE,
    )
    yield beside(
        "replay",
        "one seq twice",
        "alice paired",
        Box(A1, offer),
        Box(A1, other),
        sent=[call],
        seen_seq=LATE,
    )
    two = bobs("offer", to=f"{A1_AT}~{A2_AT}")
    yield beside(
        "replay",
        "a message in both mailboxes",
        "alice paired, two mailboxes",
        Box(A1, two),
        Box(A2, two),
        seen_seq=LATE,
        sent=[reply(B1, "call", B1_AT, hash_of(two))],
    )


def refused_strangers() -> Iterator[Json]:
    """Yield rounds with a message of somebody else."""
    offer = bobs("offer")
    call = reply(B1, "call", B1_AT, hash_of(offer))
    yield beside(
        "sender",
        "Mallory beside Bob",
        "alice paired",
        Box(A1, bobs("offer", MALLORY, seq=LATE + 9, **{"from": MALLORY.pub})),
        Box(A1, offer),
        sent=[call],
        seen_seq=LATE,
    )
    yield beside(
        "proof",
        "a bad proof before the hello",
        "alice invited",
        Box(A0, hello(MALLORY, OTHER_S, connectoid=M0_AT)),
        Box(A0, HELLO),
        state="welcomed",
        contact=BOB.pub,
        hello_hash=hash_of(HELLO),
        sent=[reply(B0, "welcome", B0_AT, hash_of(HELLO), r=R)],
    )
    yield beside(
        "commitment",
        "a forged welcome before the right one",
        "bob opened",
        Box(B0, welcome(MALLORY, connectoid=M0_AT)),
        Box(B0, WELCOME),
        state="ready",
        contact=ALICE.pub,
        connectoid=A1_AT,
    )


def refused_with_junk() -> Iterator[Json]:
    """Yield rounds with a welcome or junk that does not count."""
    offer = bobs("offer")
    call = reply(B1, "call", B1_AT, hash_of(offer))
    yield beside(
        "unexpected",
        "a second welcome in the round",
        "bob opened",
        Box(B0, WELCOME),
        Box(B0, welcome(connectoid=A2_AT)),
        state="ready",
        connectoid=A1_AT,
    )
    yield beside(
        "seal",
        "junk before an offer",
        "alice paired",
        raw(A1, "QUJD"),
        Box(A1, offer),
        sent=[call],
        seen_seq=LATE,
    )
    yield beside(
        "sdp",
        "video before an offer",
        "alice paired",
        Box(A1, bobs("offer", seq=LATE - 1, sdpOffer=VIDEO_OFFER)),
        Box(A1, offer),
        sent=[call],
        seen_seq=LATE,
    )


def refused_after_the_end() -> Iterator[Json]:
    """Yield rounds in which a message comes after the one that ends the contact."""
    stranger = bobs("offer", MALLORY, seq=LATE + 1, **{"from": MALLORY.pub})
    left = bobs("unshare", seq=1)
    for name, later in {
        "an offer after an unshare": bobs("offer", seq=LATE + 1),
        "an offer with an old seq after an unshare": bobs("offer", seq=SOON),
        "an unsigned offer after an unshare": unsigned(bobs("offer", seq=LATE + 1)),
        "Mallory's offer after an unshare": stranger,
    }.items():
        yield beside(
            "unexpected",
            name,
            "alice paired",
            Box(A1, left),
            Box(A1, later),
            state="ended",
            why="unshared",
            sent=[reply(B1, "unshare", B1_AT, hash_of(left))],
        )
    yield beside(
        "unexpected",
        "an offer after an unshare to who has left",
        "alice unshared",
        Box(A1, bobs("unshare")),
        Box(A1, bobs("offer", seq=LATE + 1)),
        state="ended",
    )
    yield beside(
        "unexpected",
        "a call after a used",
        "bob opened",
        Box(B0, used()),
        Box(B0, alices("call")),
        state="ended",
        why="used",
    )


def refused_beside() -> Iterator[Json]:
    """Yield rounds in which one message is refused, and the other counts."""
    yield from refused_twice()
    yield from refused_strangers()
    yield from refused_with_junk()
    yield from refused_after_the_end()
