"""How long to wait before a relay is asked again."""

from __future__ import annotations

import secrets

# Between the starts of two checks at one relay, at least.
CHECK_EVERY_S = 2.0
# After failures of a relay, one after the other.
BACKOFF_S = (2.0, 5.0, 15.0, 30.0, 60.0)
# Of every pause, so that many clients do not come back together.
JITTER = 0.25


def jittered(seconds: float) -> float:
    """Return a pause, up to a quarter longer."""
    return seconds * (1 + JITTER * secrets.randbelow(1_000) / 1_000)


def backoff_s(failures: int) -> float:
    """Return the pause after so many failures in a row, one or more."""
    return BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]
