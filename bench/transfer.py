"""Compare `connectoid send` of a large file with bare aiortc and magic-wormhole.

Each is two processes, at two ends of a line that takes time or loses packets: see tests/network.
They take turns, and the same packets are lost for each. It needs root.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import common

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "network"))
from lab import RELAY_IPV4, Lab, Line, Namespace, lacking, open_lab
from people import Person, pair, send_file

BARE = str(Path(__file__).with_name("bare_aiortc.py"))
MAILBOX_PORT = 4000
WORMHOLE_CODE = "7-crossover-clockwork"
TIMEOUT_S = 120.0
# What decides how fast magic-wormhole may send.
TCP = os.environ.get("TCP", "reno")

# Where Alice and Bob are.
Places: TypeAlias = tuple[Namespace, Namespace]


class NeverError(Exception):
    """A transfer that did not begin, or took too long."""


class Way(NamedTuple):
    """A way between two people, and how much they send over it."""

    name: str
    megabytes: int
    # None is one machine.
    line: Line | None


WAYS = (
    Way("loopback", 5, None),
    Way("round trip of 300 ms", 5, Line(delay_ms=150)),
    Way("40 ms, 1 % lost", 5, Line(delay_ms=20, loss=0.01)),
    Way("40 ms, 5 % lost", 5, Line(delay_ms=20, loss=0.05)),
)


def make_places(lab: Lab, line: Line | None) -> Places:
    """Put two people at the ends of a line, or on one machine.

    CUBIC, which most machines have, is Reno over such short ways. It is not allowed in a namespace
    where the machine has another one itself. BBR takes no lost packet for a full line.
    """
    alice = bob = lab.place(line=line)
    if line is not None:
        bob = lab.place()
    for place in (alice, bob):
        place.run("sysctl", "-qw", f"net.ipv4.tcp_congestion_control={TCP}")
    return alice, bob


# ---------------------------------------------------------------------------------------
# The three. Each returns the seconds from the connection until the other has all of it.
# ---------------------------------------------------------------------------------------


def connectoid_s(lab: Lab, places: Places, size: int) -> float:
    """Send a file with our command line; both know then that the hash is right."""
    alice, bob = (Person(lab, *named) for named in zip(("Alice", "Bob"), places, strict=True))
    pair(alice, bob)
    path = make_file(lab, size)
    (lab.folder / "inbox").mkdir()
    sends, receives = send_file(alice, bob, path)
    began_s = time.monotonic()
    sent = sends.wait_for("sent", TIMEOUT_S)
    assert receives.wait_for("received").told["sha256"] == sent.told["sha256"]
    return sent.at_s - began_s


class Bare:
    """aiortc alone, with messages of one size."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes

    def __call__(self, lab: Lab, places: Places, size: int) -> float:
        """Send bytes; nothing is hashed, read or kept."""
        sends = start(lab, places[0], sys.executable, BARE, "send", size, self._chunk_bytes)
        receives = start(lab, places[1], sys.executable, BARE, "receive", size)
        for one, other in ((sends, receives), (receives, sends)):
            print(read_line(one), file=other.stdin, flush=True)
        return float(read_line(sends))


class Wormhole:
    """magic-wormhole, with a mailbox server of the lab."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def __call__(self, lab: Lab, places: Places, size: int) -> float:
        """Send a file; both know then that the hash is right."""
        python = str(self._program.with_name("python"))
        lab.start(*lab.servers.command(
            python, "-m", "twisted", "wormhole-mailbox",
            f"--port=tcp:{MAILBOX_PORT}:interface={RELAY_IPV4}",
            "--channel-db=channels.sqlite", "--usage-db=usage.sqlite"))
        wait_for_port(lab.servers)
        path = make_file(lab, size)
        sends = start(
            lab, places[0], *self._command("send"), "--code", WORMHOLE_CODE, path)
        start(
            lab, places[1], *self._command("receive"), "--accept-file", "-o", "came.bin",
            WORMHOLE_CODE)
        until(sends, "Sending (")
        began_s = time.monotonic()
        until(sends, "Transfer complete")
        took_s = time.monotonic() - began_s
        assert (lab.folder / "came.bin").stat().st_size == size
        return took_s

    def _command(self, what: str) -> list[str]:
        return [
            str(self._program), "--relay-url", f"ws://{RELAY_IPV4}:{MAILBOX_PORT}/v1",
            "--transit-helper", f"tcp:{RELAY_IPV4}:{MAILBOX_PORT + 1}", what, "--hide-progress"]


Sending: TypeAlias = Callable[[Lab, Places, int], float]


def make_file(lab: Lab, size: int) -> Path:
    """Make a file of random bytes."""
    path = lab.folder / "large.bin"
    path.write_bytes(os.urandom(size))
    return path


def start(lab: Lab, place: Namespace, *argv: object) -> subprocess.Popen[str]:
    """Start a program that ends with the lab, with pipes to it."""
    process = subprocess.Popen(
        place.command(*map(str, argv)), cwd=lab.folder, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lab.ending.callback(end, process)
    return process


def end(process: subprocess.Popen[str]) -> None:
    """End a program, and close the pipes to it."""
    process.kill()
    process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line of a program; end it after a while, and raise NeverError."""
    assert process.stdout is not None
    timer = threading.Timer(TIMEOUT_S, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line:
        raise NeverError
    return line.strip()


def until(process: subprocess.Popen[str], words: str) -> None:
    """Read lines of a program until there is one with these words."""
    while words not in read_line(process):
        pass


def wait_for_port(place: Namespace) -> None:
    """Return once the mailbox server listens."""
    look = f"until ss -Hltn 'sport = :{MAILBOX_PORT}' | grep -q .; do sleep 0.05; done"
    subprocess.run(place.command("sh", "-c", look), check=True, timeout=TIMEOUT_S)


# ---------------------------------------------------------------------------------------
# The table.
# ---------------------------------------------------------------------------------------

OURS = "`connectoid send`"


def contenders(wormhole: Path | None) -> dict[str, Sending]:
    """Return all that take turns, by their names."""
    found: dict[str, Sending] = {OURS: connectoid_s}
    # The size of ours, and the largest that aiortc takes.
    for chunk_bytes in (60_000, 262_144):
        found[f"aiortc, messages of {chunk_bytes:,} bytes"] = Bare(chunk_bytes)
    if wormhole is not None:
        found["magic-wormhole"] = Wormhole(wormhole)
    return found


def measure(sending: Sending, way: Way, seed: int) -> float:
    """Return the seconds of one transfer, in a lab of its own; infinity for one that never ends."""
    line = way.line
    if line is not None:
        line = line._replace(seed=seed)
    with tempfile.TemporaryDirectory() as name, open_lab(Path(name)) as lab:
        try:
            return sending(lab, make_places(lab, line), way.megabytes * 1_000_000)
        except (NeverError, TimeoutError, EOFError):
            return math.inf


def rows(way: Way, all_sending: dict[str, Sending], rounds: int) -> Iterator[str]:
    """Yield the rows of a way: medians with the least and the most, and how ours is to each."""
    found: dict[str, list[float]] = {name: [] for name in all_sending}
    for seed in range(1, rounds + 1):
        for name, sending in all_sending.items():
            found[name].append(measure(sending, way, seed))
    ours_s = statistics.median(found[OURS])
    for name, took in found.items():
        ratio = statistics.median(took) / ours_s
        yield (f"| {way.name}, {way.megabytes} MB | {name} | {common.spread(took, '.1f')}"
               f" | {ratio:.2f} |")


def find_wormhole(named: str) -> Path | None:
    """Return the program of magic-wormhole, if it is there."""
    beside = Path(sys.executable).with_name("wormhole")
    found = named or shutil.which("wormhole") or (str(beside) if beside.exists() else "")
    return Path(found) if found else None


def main() -> int:
    """Measure in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--round-trip", type=float, metavar="MS", help="of a line of one's own")
    parser.add_argument("--loss", type=float, default=0.0, metavar="PERCENT", help="one way")
    parser.add_argument("--megabytes", type=int, default=5, help="with --round-trip (default: 5)")
    parser.add_argument(
        "--wormhole", default="", metavar="PROGRAM", help="magic-wormhole's, with its mailbox"
        " server beside it (default: what is installed)")
    arguments = parser.parse_args()
    if lacking():
        raise SystemExit(lacking())
    ways: tuple[Way, ...] = WAYS
    if arguments.round_trip is not None:
        line = Line(delay_ms=arguments.round_trip / 2, loss=arguments.loss / 100)
        name = f"{arguments.round_trip:g} ms, {arguments.loss:g} % lost"
        ways = (Way(name, arguments.megabytes, line),)
    all_sending = contenders(find_wormhole(arguments.wormhole))
    print(f"{common.machine()}, {arguments.rounds} rounds\n")
    print("| way | | s | to ours |\n|---|---|---|---|")
    for way in ways:
        for row in rows(way, all_sending, arguments.rounds):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    common.run(main)
