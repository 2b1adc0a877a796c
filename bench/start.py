"""Print how long the relay takes from its start to its first answer, and its memory then."""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

RELAY = Path(__file__).parent.parent / "connectoid_relay.py"


def start_once() -> tuple[float, int]:
    """Return the seconds from start to the first check answered, and the resident KiB."""
    with tempfile.TemporaryDirectory() as directory:
        started_s = time.perf_counter()
        with subprocess.Popen([sys.executable, str(RELAY), "--port", "0"], cwd=directory,
                              stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            port = process.stderr.readline().rpartition(":")[2].strip()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
            taken_s = time.perf_counter() - started_s
            status = Path(f"/proc/{process.pid}/status").read_text("ascii")
            process.terminate()
        return taken_s, int(status.partition("VmRSS:")[2].split()[0])


def main() -> None:
    """Print the median, the minimum and the maximum of some runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=5, help="(default: %(default)s)")
    runs = [start_once() for _ in range(parser.parse_args().runs)]
    seconds, kib = zip(*runs, strict=True)
    print(f"Python {platform.python_version()}, {platform.machine()}, {len(runs)} runs: median (min to max)")
    print(f"start to first answer  {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")
    print(f"resident memory then   {statistics.median(kib) / 1024:.1f} MiB ({min(kib) / 1024:.1f} to"
          f" {max(kib) / 1024:.1f})")


if __name__ == "__main__":
    main()
