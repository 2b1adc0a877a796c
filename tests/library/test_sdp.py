"""One's own SDP before it leaves; what comes from others is in vectors/library/sdp.json."""

from __future__ import annotations

import json

import pytest
from fake_sdp import make_sdp

from connectoid import UsageError
from connectoid.limits import MAX_CANDIDATES
from connectoid.sdp import check_sdp, trim_sdp

BASE = make_sdp("offer")["sdp"]
TCP = "a=candidate:1 1 tcp 1 192.0.2.{} 9 typ host tcptype active\r\n"
HOST = "a=candidate:1 1 udp 1 192.0.2.{} 9 typ host\r\n"
SEEN = "a=candidate:1 1 udp 1 192.0.2.{} 9 typ srflx raddr 0.0.0.0 rport 0\r\n"
RELAYED = "a=candidate:1 1 udp 1 192.0.2.{} 9 typ relay raddr 0.0.0.0 rport 0\r\n"


def many(line: str, count: int) -> str:
    """Return so many candidates of a kind."""
    return "".join(line.format(number) for number in range(1, count + 1))


def lines_of(sdp: str) -> set[str]:
    """Return the lines of an SDP without order."""
    return set(sdp.splitlines())


@pytest.mark.parametrize("count", [0, 1, MAX_CANDIDATES - 1, MAX_CANDIDATES])
def test_own_candidates_within_the_bound_all_leave(count: int) -> None:
    own = BASE + many(HOST, count)
    assert trim_sdp(own) == own == check_sdp(own)


def test_own_candidates_over_the_bound_that_reach_least_stay_behind() -> None:
    own = BASE + many(TCP, 9) + many(HOST, MAX_CANDIDATES) + many(SEEN, 2) + many(RELAYED, 1)
    sent = trim_sdp(own)
    assert lines_of(sent) == lines_of(
        BASE + many(HOST, MAX_CANDIDATES - 3) + many(SEEN, 2) + many(RELAYED, 1))
    assert check_sdp(sent) == sent


def test_own_candidates_over_tcp_stay_behind_and_a_contacts_are_not_used() -> None:
    """A browser would connect to whatever service they name."""
    passive = TCP.replace("active", "passive").replace("192.0.2.{}", "127.0.0.1")
    own = BASE + many(TCP, 2) + passive + passive.replace("tcp 1", "TCP 1") + many(HOST, 1)
    assert trim_sdp(own) == check_sdp(own) == BASE + many(HOST, 1)


def test_own_candidates_that_no_contact_would_take_stay_behind() -> None:
    bad = HOST.format(1).replace(" 1 udp", " 2 udp") + HOST.replace("192.0.2.{}", "fe80::1%eth0")
    assert trim_sdp(BASE + bad + many(HOST, 1)) == BASE + many(HOST, 1)


def test_own_candidate_that_is_there_often_is_counted_often() -> None:
    assert trim_sdp(BASE + HOST.format(1) * 99) == BASE + HOST.format(1) * MAX_CANDIDATES


@pytest.mark.parametrize(("more", "count"), [(-1, 8), (0, 9), (1, 9)])
def test_own_candidates_for_which_a_message_has_no_room_stay_behind(more: int, count: int) -> None:
    """Those that reach least; all else of an SDP stays, and may be too much."""
    own = BASE + SEEN.format(9) + many(HOST, 8)
    chosen = BASE + SEEN.format(9) + many(HOST, count - 1)
    assert trim_sdp(own, most_bytes=len(json.dumps(own)) + more) == chosen
    assert trim_sdp(own, most_bytes=1) == BASE


def test_own_candidates_by_relay_alone_are_those_of_turn_servers() -> None:
    own = BASE + many(TCP, 1) + many(HOST, 2) + many(SEEN, 2) + many(RELAYED, 2)
    assert trim_sdp(own, relay_only=True) == BASE + many(RELAYED, 2)


def test_own_sdp_of_media_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="not that of a data channel"):
        trim_sdp(BASE + "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n")
