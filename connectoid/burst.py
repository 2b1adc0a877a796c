"""Count what was brought lately, where some may come at once and not for ever."""

from __future__ import annotations

import math


class Burst:
    """Messages that were brought lately: each second takes some off."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._messages = 0.0
        self._noted_s = -math.inf

    def note(self, messages: int, now_s: float) -> None:
        """Count messages that have come now."""
        self._messages = self.left(now_s) + messages
        self._noted_s = now_s

    def left(self, now_s: float) -> float:
        """Return how many of them still count."""
        gone = self._per_s * (now_s - self._noted_s)
        return max(0.0, self._messages - gone)
