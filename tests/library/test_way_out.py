"""The way out of this machine: when a change of it is told."""

from __future__ import annotations

import asyncio

import pytest

from connectoid.way_out import SETTLE_S, Way, WayOut

NONE = ("", "")
WIFI = ("192.0.2.1", "")
BOTH = ("192.0.2.1", "2001:db8::7")
CELLULAR = ("198.51.100.1", "")


@pytest.mark.parametrize(("ways", "told"), [
    pytest.param([WIFI, WIFI], 0, id="nothing has changed"),
    pytest.param([WIFI, CELLULAR, CELLULAR], 1, id="another network"),
    pytest.param([WIFI, BOTH, CELLULAR, BOTH, BOTH], 1, id="it takes a while to settle"),
    pytest.param([WIFI, NONE, NONE], 0, id="no network any more"),
    pytest.param([WIFI, NONE, NONE, WIFI, WIFI], 1, id="the same network again"),
    pytest.param([WIFI, NONE, WIFI, WIFI], 1, id="the same network again, at once"),
    pytest.param([NONE, NONE, WIFI, WIFI], 1, id="the first network"),
])
def test_change_is_told_once_it_has_settled_and_there_is_a_way_out(
    ways: list[Way], told: int,
) -> None:
    """The ways are what is found, one look after the other."""
    left = list(ways)
    changes: list[str] = []
    slept: list[float] = []

    async def change() -> None:
        changes.append("changed")

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def look_to_the_end() -> None:
        way_out = WayOut(change, look=lambda: left.pop(0), sleep=sleep)
        while left:
            await way_out.look_again()

    asyncio.run(look_to_the_end())
    assert len(changes) == told
    assert set(slept) <= {SETTLE_S}
