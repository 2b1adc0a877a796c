"""Print how long the relay takes from its start to its first answer, and its memory then."""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import common


def start_once() -> tuple[float, int]:
    """Return the seconds from the start to the first answer, and the resident KiB."""
    with (
        tempfile.TemporaryDirectory() as directory,
        common.RelayProcess(Path(directory)) as relay,
    ):
        assert b'"ok": true' in common.get(relay.port, "/health")
        taken_s = time.perf_counter() - relay.started_s
        return taken_s, common.memory_kib(relay.pid)


def main() -> int:
    """Print the median, the minimum and the maximum of some runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=5, help="(default: %(default)s)")
    runs = [start_once() for _ in range(parser.parse_args().runs)]
    seconds = [taken_s for taken_s, _ in runs]
    mib = [kib / 1024 for _, kib in runs]
    python = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"{python}, {len(runs)} runs: median (min to max)")
    print(f"start to first answer, s   {common.spread(seconds, '.3f')}")
    print(f"resident memory then, MiB  {common.spread(mib, '.1f')}")
    return 0


if __name__ == "__main__":
    common.run(main)
