"""What the library works around in other projects is still there: see docs/upstream.md.

A test here fails when a project has mended a fault, or moved it. Then look whether our part goes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from aioice import ice, mdns
from aiortc import rtcdtlstransport as dtls
from aiortc import rtcicetransport as transport
from aiortc import rtcsctptransport as sctp
from harness import ROOT

PAGE = (ROOT / "docs" / "upstream.md").read_text("utf-8")
# What happens, and the file that mends it.
ROWS = re.findall(r"^\| aio\w+ \| (.*?) \|.*\| `(\w+\.py)` \|", PAGE, re.MULTILINE)

# The beginning of what happens, the code that does it, and the words that show it.
CAUSES: dict[str, tuple[Callable[..., Any] | type, str]] = {
    "an offer waits 5 s": (ice.Connection.get_component_candidates, "timeout: int = 5"),
    "a connection with a round trip": (ice.Connection.query_consent, "retransmissions=0"),
    "a peer has checks sent": (
        ice.Connection.check_incoming,
        "if remote_candidate is None:\n            # Learning peer-reflexive candidates"),
    "datagrams of anybody": (ice.Connection.data_received, "self._queue.put_nowait("),
    "a datagram to port 5353": (mdns.MDnsProtocol.datagram_received, "dns.message.from_wire("),
    "one empty datagram": (dtls.RTCDtlsTransport._recv_next, "first_byte = data[0]"),
    "eight bytes stop": (sctp.decode_params, "pos += param_length + padl(param_length)"),
    "a SACK of ranges": (
        sctp.RTCSctpTransport._receive_sack_chunk, "for pos in range(gap[0], gap[1] + 1):"),
    "what is sent and not confirmed": (
        sctp.RTCSctpTransport._receive_sack_chunk,
        "self._cwnd += min(done_bytes, USERDATA_MAX_LENGTH)"),
    "fragments of a message": (sctp.InboundStream.add_chunk, "self.reassembly.append(chunk)"),
}


@pytest.mark.parametrize(("cause", "words"), CAUSES.values(), ids=CAUSES)
def test_cause_is_still_there(cause: Callable[..., Any], words: str) -> None:
    assert words in inspect.getsource(cause)


def test_stun_server_by_its_ipv6_address_is_still_not_read() -> None:
    with pytest.raises(ValueError, match="malformed uri"):
        transport.parse_stun_turn_uri("stun:[2001:db8::1]")


def test_rows_name_modules_of_the_library_and_causes_are_rows() -> None:
    assert len(ROWS) == PAGE.count("\n| aio")
    for _, module in ROWS:
        assert (ROOT / "connectoid" / module).is_file()
    for beginning in CAUSES:
        assert any(happens.startswith(beginning) for happens, _ in ROWS)
