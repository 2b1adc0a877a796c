"""Cases of what a user wants of all connections, and of the size of an app's messages."""

from __future__ import annotations

from collections.abc import Iterator

from cases_in_context import ELSEWHERE, LATE, Box, accepted, alices, bobs, reply
from cases_sdp import BASE, join
from vector_forms import hash_of, mailbox, make_jws
from vector_keys import Json
from vector_people import (
    A0,
    A1,
    B0,
    B0_AT,
    B1,
    B1_AT,
    B2,
    BOB,
    HELLO,
    M0,
    MALLORY,
    from_bob,
    hello,
)

MAX_CHANNEL_BYTES = 65_536

HOST = "a=candidate:1 1 udp 2130706431 192.0.2.1 9 typ host"
OVER_TCP = "a=candidate:2 1 tcp 1518280447 192.0.2.1 9 typ host tcptype active"
HIDDEN = "a=candidate:3 1 udp 2122260223 0f3a.local 9 typ host"
SEEN_BY_STUN = "a=candidate:4 1 udp 1694498815 198.51.100.1 9 typ srflx raddr 0.0.0.0 rport 0"
BY_TURN = "a=candidate:5 1 udp 16777215 203.0.113.1 9 typ relay raddr 0.0.0.0 rport 0"
BY_TURN_TOO = "a=candidate:6 1 udp 16776703 2001:db8::1 9 typ relay raddr :: rport 0"

# By what the app wants: the candidates that WebRTC has gathered, and those that may be sent.
GATHERED: dict[str, tuple[bool, list[str], list[str]]] = {
    "all ways": (False, [HOST, SEEN_BY_STUN, BY_TURN], [HOST, SEEN_BY_STUN, BY_TURN]),
    "all ways, but not over TCP": (False, [OVER_TCP, HOST, BY_TURN], [HOST, BY_TURN]),
    "by TURN alone": (True, [HOST, SEEN_BY_STUN, BY_TURN, BY_TURN_TOO], [BY_TURN, BY_TURN_TOO]),
    "by TURN alone, over TCP as well": (True, [OVER_TCP, BY_TURN], [BY_TURN]),
    "by TURN alone, where no server answers": (True, [HOST, SEEN_BY_STUN], []),
    "by TURN alone, with a hidden address": (True, [HIDDEN, BY_TURN], [BY_TURN]),
}


def candidate_cases() -> Iterator[Json]:
    """Yield SDPs of one's own, with the candidates that a contact may learn."""
    for name, (relay_only, gathered, sent) in GATHERED.items():
        yield {
            "name": name,
            "relay_only": relay_only,
            "sdp": join([*BASE, *gathered]),
            "candidates": sent,
        }


def app_message_cases() -> Iterator[Json]:
    """Yield messages of an app around the limit: a part, so many times."""
    most = MAX_CHANNEL_BYTES
    for times in (0, 1, most - 1, most, most + 1):
        for kind, part in (("binary", "00"), ("text", "a")):
            yield app_message(f"{kind} of {times}", kind, part, times, times)
    # As many code units of UTF-16 are fewer bytes than they have in UTF-8.
    for part, octets in (("é", 2), ("€", 3), ("🥕", 4)):
        fits = most // octets
        for times in (fits, fits + 1):
            yield app_message(
                f"text of {times} times {part}", "text", part, times, times * octets
            )


def app_message(name: str, kind: str, part: str, times: int, count: int) -> Json:
    """Return a case of a message with so many bytes."""
    return {
        "name": name,
        "kind": kind,
        "part": part,
        "times": times,
        "closes": count > MAX_CHANNEL_BYTES,
    }


def asked_first() -> Iterator[Json]:
    """Yield what counts where the user wants to be asked first, and the app wants nothing."""
    wish: Json = {"ask_first": True}
    told: Json = {"told": "wants_to_connect"}
    yield {
        **accepted("offer, the user is asked first", "alice paired", Box(A1, bobs("offer")),
                   seen_seq=LATE),
        **wish,
        **told,
    }
    call = Box(B0, alices("call"))
    yield {
        **accepted("call, the user is asked first", "bob paired", call, seen_seq=LATE),
        **wish,
        **told,
    }
    yield from answered_unasked()
    yield from held_back()
    yield from not_held_back()


def answered_unasked() -> Iterator[Json]:
    """Yield what is answered before the user is asked, without an address of this device."""
    wish: Json = {"ask_first": True}
    ready = make_jws(BOB, from_bob("ready"))
    yield {
        **accepted(
            "ready, the user is asked first",
            "alice welcomed",
            Box(A1, ready),
            state="paired",
            sent=[reply(B1, "call", B1_AT, None)],
        ),
        **wish,
        "told": "wants_to_connect",
    }
    moved = bobs("moved")
    yield {
        **accepted(
            "moved, the user is asked first",
            "alice paired",
            Box(A1, moved),
            seen_seq=LATE,
            sent=[reply(B1, "moved", B1_AT, hash_of(moved))],
        ),
        **wish,
    }
    yield {
        **accepted(
            "hello, the user is asked first",
            "alice invited",
            Box(A0, HELLO),
            state="welcomed",
            sent=[reply(B0, "welcome", B0_AT, hash_of(HELLO))],
        ),
        **wish,
    }


ASKED: Json = {"ask_first": True}
AWAY = mailbox(B2.pub, ELSEWHERE)
MOVED = bobs("moved", connectoid=AWAY)


def held_back() -> Iterator[Json]:
    """Yield what does not go to a relay that is newly named before the user is asked."""
    told: Json = {"told": "wants_to_connect"}
    case = accepted(
        "held back: moved to a new relay", "alice paired", Box(A1, MOVED), seen_seq=LATE,
        connectoid=AWAY, met=[])
    yield {**case, **ASKED, **told}
    both = f"{B1_AT}~{AWAY}"
    half = bobs("moved", connectoid=both)
    case = accepted(
        "held back: moved to a known relay and a new one", "alice paired", Box(A1, half),
        seen_seq=LATE, connectoid=both, met=[], sent=[reply(B1, "moved", both, hash_of(half))])
    yield {**case, **ASKED, **told}
    unshare = bobs("unshare", connectoid=AWAY)
    case = accepted(
        "held back: unshare from a new relay", "alice paired", Box(A1, unshare), state="ended",
        why="unshared")
    yield {**case, **ASKED}
    at_home = hello(connectoid=mailbox(B0.pub, ELSEWHERE))
    case = accepted(
        "held back: hello from a new relay", "alice invited", Box(A0, at_home), state="welcomed",
        met=[])
    yield {**case, **ASKED, **told}
    stranger = hello(MALLORY, connectoid=mailbox(M0.pub, ELSEWHERE))
    case = accepted(
        "held back: hello from a new relay to a link that is used", "alice paired",
        Box(A0, stranger), warned=True, state="paired", met=[])
    yield {**case, **ASKED}


def not_held_back() -> Iterator[Json]:
    """Yield what goes to another relay than before all the same."""
    case = accepted(
        "not held back: moved to a relay that was met", "alice paired, has met another relay",
        Box(A1, MOVED), seen_seq=LATE, connectoid=AWAY, met=[ELSEWHERE],
        sent=[reply(B2, "moved", AWAY, hash_of(MOVED))])
    yield {**case, **ASKED}
    yield accepted(
        "not held back: moved to a new relay, and nobody wants to be asked", "alice paired",
        Box(A1, MOVED), seen_seq=LATE, connectoid=AWAY, met=[ELSEWHERE],
        sent=[reply(B2, "moved", AWAY, hash_of(MOVED))])
    case = accepted(
        "not held back: moved to a new relay, after the user has left", "alice unshared",
        Box(A1, MOVED), seen_seq=LATE, met=[ELSEWHERE],
        sent=[reply(B2, "unshare", AWAY, hash_of(MOVED))])
    yield {**case, **ASKED}
