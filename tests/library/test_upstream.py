"""What the library works around in other projects is still there: see docs/upstream.md.

A test here fails when a project has mended a fault, or moved it. Then look whether our part goes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from aioice import ice, mdns, stun, turn
from aiortc import rtcdtlstransport as dtls
from aiortc import rtcicetransport as transport
from aiortc import rtcsctptransport as sctp
from harness import ROOT

PAGE = (ROOT / "docs" / "upstream.md").read_text("utf-8")

# What does it, and the words that show it.
CAUSES: tuple[tuple[Callable[..., Any], str], ...] = (
    (ice.Connection.get_component_candidates, "timeout: int = 5"),
    (ice.Connection.query_consent, "retransmissions=0"),
    (ice.Connection.data_received, "self._queue.put_nowait("),
    (turn.TurnClientMixin.refresh, "await asyncio.sleep(5 / 6 * time_to_expiry)"),
    (stun.unpack_unsigned, 'unpack("!I", data)'),
    (dtls.RTCDtlsTransport._recv_next, "first_byte = data[0]"),
    (sctp.decode_params, "pos += param_length + padl(param_length)"),
    (sctp.RTCSctpTransport._receive_sack_chunk, "for pos in range(gap[0], gap[1] + 1):"),
    (sctp.RTCSctpTransport._receive_sack_chunk, "self._cwnd += min(done_bytes,"),
    (sctp.RTCSctpTransport._t3_expired, "if not self._maybe_abandon(chunk):"),
    (sctp.RTCSctpTransport._transmit, "self._outbound_queue and self._flight_size < cwnd:"),
    (sctp.RTCSctpTransport._mark_received, "sorted(self._sack_misordered)"),
    (dtls.RTCCertificate._create_ssl_context, "lambda *args: True"),
    (mdns.MDnsProtocol.datagram_received, "dns.message.from_wire("),
    (sctp.RTCSctpTransport._data_channel_receive, '.decode("utf8")'),
)


def name_of(cause: tuple[Callable[..., Any], str]) -> str:
    """Return the name of what does it."""
    return cause[0].__qualname__


@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_cause_is_still_there_and_on_the_page(cause: tuple[Callable[..., Any], str]) -> None:
    function, words = cause
    assert words in inspect.getsource(function)
    assert function.__name__ in PAGE


def test_stun_server_by_its_ipv6_address_is_still_not_read() -> None:
    with pytest.raises(ValueError, match="malformed uri"):
        transport.parse_stun_turn_uri("stun:[2001:db8::1]")
