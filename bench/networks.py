"""Measure how long two people with the command line take to connect, in networks as people have.

With --lines it is how long a file takes over lines that are slow, or lose packets. The networks are
namespaces with NAT, made anew for each round: see tests/network. It needs root.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import common

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "network"))
from lab import Line, lacking, open_lab
from networks_of_people import NETWORKS, Network
from people import Person, pair, send_file

TIMEOUT_S = 60.0
FILE_BYTES = 5_000_000
FILE_TIMEOUT_S = 120.0
LINES = {
    "round trip 40 ms": Line(delay_ms=20),
    "round trip 600 ms": Line(delay_ms=300),
    "40 ms, 1 Mbit/s": Line(delay_ms=20, bits_per_s=1e6),
    "40 ms, 1 % lost": Line(delay_ms=20, loss=0.01),
    "40 ms, 5 % lost": Line(delay_ms=20, loss=0.05),
}


def measure(network: Network, timeout_s: float) -> float | None:
    """Return the seconds until two people are connected, None if they are not in time."""
    with tempfile.TemporaryDirectory() as name, open_lab(Path(name)) as lab:
        alice, bob = (
            Person(lab, who, place, relay=network.relay, ice_servers=network.ice_servers)
            for who, place in zip(("Alice", "Bob"), network.make(lab), strict=True))
        try:
            return pair(alice, bob, timeout_s)
        except TimeoutError:
            return None


def row(network: Network, rounds: int) -> str:
    """Return a row of the table."""
    found = [measure(network, TIMEOUT_S) for _ in range(rounds)]
    took = [seconds for seconds in found if seconds is not None]
    spread = "-"
    if took:
        spread = common.spread(took, ".1f")
    return f"| {network.name} | {len(took)} of {rounds} | {spread} |"


def transfer_s(line: Line) -> float | None:
    """Return the seconds of a file from a home with this line, None if they are too many."""
    with tempfile.TemporaryDirectory() as name, open_lab(Path(name)) as lab:
        alice = Person(lab, "Alice", lab.home(line=line).host())
        bob = Person(lab, "Bob", lab.home().host())
        pair(alice, bob)
        path = lab.folder / "file.bin"
        path.write_bytes(os.urandom(FILE_BYTES))
        (lab.folder / "inbox").mkdir()
        try:
            sends, _ = send_file(alice, bob, path)
            began_s = time.monotonic()
            return sends.wait_for("sent", FILE_TIMEOUT_S).at_s - began_s
        except TimeoutError:
            return None


def print_lines() -> None:
    """Print a row for each line."""
    print(f"{common.machine()}\n")
    print(f"| line | {FILE_BYTES / 1e6:g} MB, s |\n|---|---|")
    for name, line in LINES.items():
        took_s = transfer_s(line)
        shown = f"over {FILE_TIMEOUT_S:g}"
        if took_s is not None:
            shown = f"{took_s:.1f}"
        print(f"| {name} | {shown} |", flush=True)


def main() -> int:
    """Print a row for each network in which people connect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="networks with it in their name")
    parser.add_argument("--lines", action="store_true", help="a file over slow lines, once")
    arguments = parser.parse_args()
    if lacking():
        raise SystemExit(lacking())
    if arguments.lines:
        print_lines()
        return 0
    print(f"{common.machine()}, {arguments.rounds} rounds\n")
    print("| network | connected | after s |\n|---|---|---|")
    for network in NETWORKS:
        if network.connects and arguments.only in network.name:
            print(row(network, arguments.rounds), flush=True)
    return 0


if __name__ == "__main__":
    common.run(main)
