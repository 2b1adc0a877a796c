"""Links that are not perfect, of TUN devices: the kernels that tests run on have no netem.

    link.py swallow NAME READY
    link.py join NAMESPACE NAME NAMESPACE NAME READY --delay-ms 300 --loss 0.01 --bits-per-s 1e6

`swallow` makes a device that takes packets and gives none. `join` makes one in each of two
namespaces and carries packets between them. The file READY is there once the devices are.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
MAX_PACKET_BYTES = 65_536
# A router keeps so much before a slow line, and drops what is more.
QUEUE_S = 0.5


def open_tun(name: str) -> int:
    """Make a TUN device, which lasts as long as the file descriptor that is returned."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return tun


class Way:
    """One direction of a link."""

    def __init__(self, target: int, arguments: argparse.Namespace) -> None:
        self._target = target
        self._delay_s = arguments.delay_ms / 1_000
        self._loss = arguments.loss
        self._bits_per_s = arguments.bits_per_s
        # The same packets are lost in each run.
        self._random = random.Random(arguments.seed)
        self._free_s = 0.0
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, bytes]] = []

    def take(self, packet: bytes, now_s: float) -> None:
        """Take a packet, or lose it."""
        begins_s = max(now_s, self._free_s)
        if self._random.random() < self._loss or begins_s - now_s > QUEUE_S:
            return
        self._free_s = begins_s + 8 * len(packet) / self._bits_per_s
        due_s = self._free_s + self._delay_s
        heapq.heappush(self._under_way, (due_s, next(self._order), packet))

    def deliver(self, now_s: float) -> float:
        """Hand over what has arrived; return the seconds until there is more."""
        while self._under_way and self._under_way[0][0] <= now_s:
            os.write(self._target, heapq.heappop(self._under_way)[2])
        if self._under_way:
            return self._under_way[0][0] - now_s
        return 1.0


def join(arguments: argparse.Namespace) -> None:
    """Carry packets between two namespaces, for ever."""
    tuns = []
    for namespace, name in ((arguments.one, arguments.one_name),
                            (arguments.other, arguments.other_name)):
        # A device keeps its file descriptor wherever it is moved to.
        own = f"cx{os.getpid()}"
        tuns.append(open_tun(own))
        subprocess.run(
            ["ip", "link", "set", own, "netns", namespace, "name", name, "up"],
            check=True)
    Path(arguments.ready).touch()
    ways = {tuns[0]: Way(tuns[1], arguments), tuns[1]: Way(tuns[0], arguments)}
    wait_s = 1.0
    while True:
        readable, _, _ = select.select(tuns, [], [], max(0.0, wait_s))
        now_s = time.monotonic()
        for tun in readable:
            ways[tun].take(os.read(tun, MAX_PACKET_BYTES), now_s)
        wait_s = min(way.deliver(now_s) for way in ways.values())


def swallow(arguments: argparse.Namespace) -> None:
    """Take packets, and give none."""
    tun = open_tun(arguments.name)
    Path(arguments.ready).touch()
    while True:
        select.select([tun], [], [])
        os.read(tun, MAX_PACKET_BYTES)


def main() -> None:
    """Do as told, until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    swallowing = commands.add_parser("swallow")
    swallowing.set_defaults(does=swallow)
    for name in ("name", "ready"):
        swallowing.add_argument(name)
    joining = commands.add_parser("join")
    joining.set_defaults(does=join)
    for name in ("one", "one_name", "other", "other_name", "ready"):
        joining.add_argument(name)
    joining.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    joining.add_argument("--loss", type=float, default=0.0, help="one way, from 0 to 1")
    joining.add_argument("--bits-per-s", type=float, default=1e9)
    joining.add_argument("--seed", type=int, default=1, help="of what is lost")
    arguments = parser.parse_args(sys.argv[1:])
    arguments.does(arguments)


if __name__ == "__main__":
    main()
