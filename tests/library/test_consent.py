"""Consent to send: the other end of a connection answers late, or not at all."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from apps import SOON_S

from connectoid.consent import CONSENT_S, NEEDED, keep_consent

aioice = pytest.importorskip("aioice.ice")


class FakePath:
    """A connection of aioice with one path, at whose other end somebody answers or does not."""

    def __init__(self) -> None:
        self.answers = True
        self.asked = 0
        self.is_closed = asyncio.Event()
        self.told: list[str] = []
        self.protocol = self
        self.remote_addr = ("203.0.113.7", 50_007)
        self.remote_password = "password"
        self._nominated = {1: self}
        self._query_consent_task = None

    async def query_consent(self) -> None:
        """Be replaced."""

    def build_request(self, _pair: object, *, nominate: bool) -> bytes:
        """Return a question."""
        assert not nominate
        return b""

    async def request(self, *_: object, **__: Any) -> None:
        """Answer; or have none before the test is over."""
        self.asked += 1
        if not self.answers:
            await asyncio.Event().wait()

    async def close(self) -> None:
        """Note it."""
        self.is_closed.set()


def test_connection_in_doubt_goes_on_if_the_other_end_answers_and_ends_if_it_does_not() -> None:
    """The network of this device has changed, twice."""

    async def doubt_twice() -> FakePath:
        path = FakePath()
        consent = keep_consent(path, lambda: path.told.append("silent"))
        asking = asyncio.create_task(path.query_consent())
        async with asyncio.timeout(SOON_S):
            consent.doubt()
            while not path.asked:
                await asyncio.sleep(0)
            assert not path.is_closed.is_set()
            path.answers = False
            consent.doubt()
            await path.is_closed.wait()
            await asking
        return path

    path = asyncio.run(doubt_twice())
    assert path.told == ["silent"]
    assert path.asked == 2


def test_aioice_still_has_what_this_mends() -> None:
    """As soon as this fails, `consent` may go but for `doubt` and `silent`."""
    source = inspect.getsource(aioice.Connection.query_consent)
    assert "retransmissions=0" in source
    assert aioice.CONSENT_FAILURES * aioice.CONSENT_INTERVAL == CONSENT_S
    connection = aioice.Connection(ice_controlling=True)
    assert all(hasattr(connection, name) for name in NEEDED)
