"""The clocks of the system. The pure part of the library is handed the time and never reads it."""

from __future__ import annotations

import sys
import time

from connectoid.contact import Now


def boot_time_s() -> float:
    """Return the seconds of a clock that never steps and counts while the machine sleeps."""
    if sys.platform == "win32":
        return time.monotonic()
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def system_now() -> Now:
    """Return the time of the system."""
    return Now(time.time_ns() // 1000, boot_time_s())
