"""Measure what opening and answering a link costs a side in CPU, without WebRTC and imports; one process is both."""

from __future__ import annotations

import argparse
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).parent.parent))
import connectoid

CANDIDATES = 15  # in an SDP of some 1.3 KB, as browsers have
SDP = "v=0\r\n" + "a=candidate:1 1 udp 2130706431 192.0.2.1 50000 typ host generation 0 network-id 1\r\n" * CANDIDATES
TIMEOUT_S = 60.0
Report = Callable[[int, str, int, Any], None]


class Wire:
    """One end of a WebRTC that costs nothing: a thread that reports what the other end does."""

    def __init__(self) -> None:
        self.other = self
        self._reports: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._contact, self._ask = 0, 0

    def start(self, report: Report) -> None:
        """Begin to report."""
        def work() -> None:
            while (item := self._reports.get()) is not None:
                report(self._contact, item[0], self._ask, item[1])

        threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._reports.put(None)

    def gather(self, contact: int, ask: int, offer: object, _ice_servers: Sequence[Any]) -> None:
        """Have an SDP at once."""
        self._contact, self._ask = contact, ask
        self._reports.put(("gathered", {"type": "answer" if offer else "offer", "sdp": SDP}))

    def join(self, _contact: int, _ask: int, _answer: object) -> None:
        """Open the channel at both ends."""
        for end in (self, self.other):
            end._reports.put(("opened", None))

    def write(self, _contact: int, _ask: int, message: bytes | str) -> Future[None]:
        """Bring a message to the other end."""
        self.other._reports.put(("message", message))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self, contact: int, ask: int) -> None:
        """Do nothing: the process ends soon."""


def pair(url: str, folder: Path) -> float:
    """Pair Alice and Bob and return the milliseconds of CPU that it cost each, from the link to the proven channel."""
    here, there = Wire(), Wire()
    here.other, there.other = there, here
    alice, bob = (connectoid.Connectoid(connectoid.Store(folder / name), [(url, None)], wire, allow_http=True)
                  for name, wire in (("alice.db", here), ("bob.db", there)))
    with alice, bob:
        before_s = time.process_time()
        bob.open(alice.share("Bob", "https://app.example.com/"), "Alice")
        bob.connect("Alice", TIMEOUT_S)
        alice.connect("Bob", TIMEOUT_S)
        return 1e3 * (time.process_time() - before_s) / 2


def main() -> None:
    """Pair many times, and print the median with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=50, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, common.RelayProcess(Path(name), "--rate", "0") as relay:
        url, found = f"http://{common.HOST}:{relay.port}/", []
        for number in range(arguments.pairs + 1):
            folder = Path(name) / str(number)
            folder.mkdir()
            found.append(pair(url, folder))
    del found[0]  # it has what is read and compiled at the first use
    print(f"{common.machine()}, {arguments.pairs} pairs\n\nCPU of a side: {statistics.median(found):.1f} ms "
          f"({min(found):.1f} to {max(found):.1f}; reach: 10)")


if __name__ == "__main__":
    main()
