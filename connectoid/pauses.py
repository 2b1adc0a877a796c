"""How long to wait before a relay is asked again."""

from __future__ import annotations

import secrets

# Between the starts of two checks at one relay, at least.
CHECK_EVERY_S = 2.0
# After a failure of a relay: this part of the time since it last answered, within bounds. So it is
# asked every few seconds for some minutes, and whoever waits for it waits little longer.
AWAY_PART = 0.01
MIN_RETRY_S = CHECK_EVERY_S
MAX_RETRY_S = 60.0
# Of every pause, so that many clients do not come back together.
JITTER = 0.25


def jittered(seconds: float) -> float:
    """Return a pause, up to a quarter longer."""
    return seconds * (1 + JITTER * secrets.randbelow(1_000) / 1_000)


def retry_s(away_s: float) -> float:
    """Return the pause before a relay is asked again that has failed for so long."""
    return min(MAX_RETRY_S, max(MIN_RETRY_S, AWAY_PART * away_s))
