"""How long to wait before a relay is asked again."""

from __future__ import annotations

import pytest

from connectoid.pauses import CHECK_EVERY_S, MAX_RETRY_S, MIN_RETRY_S, jittered, retry_s


@pytest.mark.parametrize(("away_s", "pause_s"), [
    (0, 2), (199, 2), (200, 2), (201, 2.01), (5_999, 59.99), (6_000, 60), (6_001, 60)])
def test_pause_is_a_hundredth_of_what_went_before_within_bounds(
    away_s: float, pause_s: float,
) -> None:
    assert retry_s(away_s) == pytest.approx(pause_s)


def test_pauses_keep_the_rule_of_checks_and_are_up_to_a_quarter_longer() -> None:
    """PROTOCOL.md, CHECK-8 and POLL-5."""
    assert MIN_RETRY_S >= CHECK_EVERY_S == 2
    assert all(MAX_RETRY_S <= jittered(MAX_RETRY_S) < 1.25 * MAX_RETRY_S for _ in range(1_000))


@pytest.mark.parametrize(("away_s", "checks"), [(300.0, 148), (86_400.0, 1_786)])
def test_relay_that_is_away_costs_few_checks(away_s: float, checks: int) -> None:
    """Two a second at first and one a minute in the end, if each fails at once."""
    now_s = 0.0
    made = 0
    while now_s < away_s:
        made += 1
        now_s += retry_s(now_s)
    assert made <= checks
