"""Measure the CPU that a side uses to open and answer a link, without WebRTC and imports.

One process is both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).parent.parent))
import connectoid
from connectoid.ice import Ice
from connectoid.webrtc import Description, Report

# An SDP of some 1.3 KB, as browsers have.
CANDIDATES = 15 * (
    "a=candidate:1 1 udp 2130706431 192.0.2.1 50000 typ host generation 0\r\n",)
SDP = "".join((
    "v=0\r\n",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n",
    "a=sctp-port:5000\r\n",
    "a=ice-ufrag:abcd\r\n",
    "a=ice-pwd:abcdefghijklmnopqrstuv\r\n",
    f"a=fingerprint:sha-256 {':'.join(32 * ['AB'])}\r\n",
    "a=setup:active\r\n",
    *CANDIDATES,
))
TIMEOUT_S = 60.0


class Wire:
    """One end of a WebRTC that costs nothing: it reports what the other end does."""

    def __init__(self) -> None:
        self.other = self
        self._contact = 0
        self._attempt_id = 0

    def start(self, report: Report) -> None:
        """Begin: reports go there."""
        self._loop = asyncio.get_running_loop()
        self._report = report

    def doubt(self) -> None:
        """Do nothing: this network stays."""

    async def stop(self) -> None:
        """Do nothing: there is nothing to close."""

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Have an SDP at once."""
        self._contact = contact
        self._attempt_id = attempt_id
        self._report_soon("gathered", {"type": "answer" if offer else "offer", "sdp": SDP})

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Open the channel at both ends."""
        self._report_soon("opened", None)
        self.other._report_soon("opened", None)

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Bring a message to the other end."""
        self.other._report_soon("message", message)

    def close(self, contact: int, attempt_id: int) -> None:
        """Do nothing: the process ends soon."""

    def _report_soon(self, event: str, value: Any) -> None:
        # The other end has a loop of its own, which may have ended.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(
                self._report, self._contact, event, self._attempt_id, value)


def pair(url: str, folder: Path) -> float:
    """Return the milliseconds of CPU for each side, from the link to the proven channel."""
    here = Wire()
    there = Wire()
    here.other = there
    there.other = here
    with side(url, folder / "alice.db", here) as alice, side(url, folder / "bob.db", there) as bob:
        before_s = time.process_time()
        bob.open(alice.share("Bob", "https://app.example.com/"), "Alice")
        bob.connect("Alice", TIMEOUT_S)
        alice.connect("Bob", TIMEOUT_S)
        return 1e3 * (time.process_time() - before_s) / 2


def side(url: str, path: Path, wire: Wire) -> connectoid.Connectoid:
    """Return one side of the pair."""
    return connectoid.Connectoid(
        connectoid.Store(path), [(url, None)], wire, allow_http=True)


def main() -> int:
    """Pair many times, and print the median with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=50, help="(default: %(default)s)")
    arguments = parser.parse_args()
    found = []
    with (
        tempfile.TemporaryDirectory() as name,
        common.RelayProcess(Path(name), "--rate", "0") as relay,
    ):
        url = f"http://{common.HOST}:{relay.port}/"
        for number in range(arguments.pairs + 1):
            folder = Path(name) / str(number)
            folder.mkdir()
            found.append(pair(url, folder))
    # The first one has what is read and compiled at the first use.
    del found[0]
    print(f"{common.machine()}, {arguments.pairs} pairs\n")
    print(f"CPU of a side, ms: {common.spread(found, '.1f')}; reach: 10")
    return 0


if __name__ == "__main__":
    common.run(main)
