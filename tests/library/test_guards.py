"""A version of aiortc that is unknown here is told, and its connections work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from connectoid import AiortcAdapter
from connectoid.guards import warning_about
from connectoid.ice import Ice

aiortc = pytest.importorskip("aiortc")


async def words_of_an_offer() -> list[str]:
    """Make an offer; return what its user is told meanwhile."""
    told: list[str] = []
    gathered = asyncio.Event()

    def report(_contact: int, event: str, _attempt: int, detail: Any) -> None:
        if event == "trouble":
            told.append(detail)
        elif event == "gathered":
            assert detail["type"] == "offer"
            gathered.set()

    adapter = AiortcAdapter()
    adapter.start(report)
    adapter.gather(1, 1, None, Ice([], relay_only=False))
    await gathered.wait()
    await adapter.stop()
    return told


def test_known_version_is_told_nothing() -> None:
    assert asyncio.run(words_of_an_offer()) == []


def test_version_that_lacks_a_name_is_told_and_makes_offers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("aiortc.rtcsctptransport.RTCSctpTransport._t3_expired")
    monkeypatch.setattr("connectoid.webrtc.recover_soon", lambda _: None)
    (words,) = asyncio.run(words_of_an_offer())
    assert words.startswith("Connections are not guarded against all that others may send: aiortc ")
    assert words.endswith(" They lack _t3_expired.")


def test_all_that_is_needed_is_looked_for() -> None:
    """Of something else all is missed, and of aioice nothing."""
    words = warning_about(object())
    for name in ("_handle_data", "_receive_data_chunk", "_t3_expired", "_create_ssl_context",
                 "query_consent", "request_received"):
        assert f" {name}," in words or f" {name}." in words
    assert "resolve" not in words
