"""Load a server as fast as it answers: load.c if there is a C compiler, else the same in Python.

Both have WIDTH requests under way and never sleep. A reply counts by its beginning and its
length. `python bench/load.py echo PORT` is a bare loop of recvfrom and sendto, to compare with.
"""

from __future__ import annotations

import json
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from common import HERE, HOST, percentile

SOURCE = HERE / "load.c"
# After this time without any datagram, those under way are lost.
LOST_AFTER_S = 0.02
RECV_BYTES = 65_536
# How long the generator has to end by itself.
EXTRA_S = 20


class Kind(NamedTuple):
    """Requests of one size, taken in turn, and the beginning and length of a right reply.

    A length of 0 allows any.
    """

    requests: list[bytes]
    prefix: bytes
    length: int


class Figures(NamedTuple):
    """What a generator counted: `done` and `failed` requests over TCP, `datagrams` answered."""

    done: int
    failed: int
    p50_us: int
    p99_us: int
    datagrams: int
    bad_datagrams: int
    seconds: float


class Generator:
    """Load servers with the compiled load.c, or without a compiler with PythonLoad."""

    def __init__(self, directory: Path, width: int, *, compile_it: bool = True) -> None:
        self.directory = directory
        self.width = width
        self.program: Path | None = None
        compiler = shutil.which("cc")
        if compiler and compile_it:
            self.program = directory / "load"
            flags = ["-std=c99", "-O2", "-o", str(self.program)]
            subprocess.run([compiler, *flags, str(SOURCE)], check=True)

    def echo(self, port: int) -> list[str]:
        """Return the command of a bare UDP echo server."""
        if self.program:
            return [str(self.program), "echo", str(port)]
        return [sys.executable, __file__, "echo", str(port)]

    def run(self, mode: str, port: int, seconds: float, *kinds: Kind) -> Figures:
        """Load a port: mode is fresh, kept, udp or both (kinds: of fresh, of udp)."""
        if not self.program:
            return PythonLoad(mode, port, self.width, kinds).run(seconds)
        command = [str(self.program), mode, HOST, str(port), str(seconds), str(self.width)]
        for number, kind in enumerate(kinds):
            path = self.directory / f"requests-{number}"
            path.write_bytes(b"".join(kind.requests))
            command += [str(path), str(len(kind.requests))]
            command += [str(kind.length), kind.prefix.decode("ascii")]
        # Popen ends the child when Ctrl-C comes; run waits for it no longer than it may take.
        done = subprocess.run(
            command, check=True, capture_output=True, timeout=seconds + EXTRA_S)
        return Figures(**json.loads(done.stdout))


class _Slot:
    """One request under way, with its reply so far."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.reply = b""


class PythonLoad:
    """The same as load.c, slower. The server's CPU is counted all the same."""

    def __init__(self, mode: str, port: int, width: int, kinds: tuple[Kind, ...]) -> None:
        self.address = (HOST, port)
        self.width = width
        self.kept = mode == "kept"
        self.tcp = mode != "udp"
        self.kinds = kinds
        self.requests: list[Iterator[bytes]] = [cycle(kind.requests) for kind in kinds]
        self.epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.slots: dict[int, _Slot] = {}
        self.taken_s: list[float] = []
        self.failed = 0
        self.datagrams = 0
        self.bad_datagrams = 0
        self.under_way = 0
        self.heard_s = 0.0

    def run(self, seconds: float) -> Figures:
        """Load for some seconds."""
        started_s = time.perf_counter()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(self.address)
            udp.setblocking(False)
            for _ in range(self.width * self.tcp):
                self._connect()
            while time.perf_counter() < started_s + seconds:
                if self.tcp:
                    self._hear_all()
                if len(self.kinds) > self.tcp:
                    self._exchange_datagrams(udp)
        for opened in self.sockets.values():
            opened.close()
        self.epoll.close()
        return Figures(
            len(self.taken_s), self.failed, self._taken_us(50), self._taken_us(99),
            self.datagrams, self.bad_datagrams, time.perf_counter() - started_s)

    def _taken_us(self, percent: float) -> int:
        return round(1e6 * percentile(self.taken_s, percent))

    def _connect(self) -> None:
        # On the loopback interface this is over at once.
        opened = socket.create_connection(self.address)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setblocking(False)
        self.sockets[opened.fileno()] = opened
        self.epoll.register(opened, select.EPOLLIN)
        self._ask(opened)

    def _ask(self, opened: socket.socket) -> None:
        self.slots[opened.fileno()] = _Slot(time.perf_counter())
        opened.sendall(next(self.requests[0]))

    def _hear_all(self) -> None:
        for number, _ in self.epoll.poll(0):
            self._hear(number)

    def _hear(self, number: int) -> None:
        opened = self.sockets[number]
        slot = self.slots[number]
        try:
            chunk = opened.recv(RECV_BYTES)
        except ConnectionError:
            chunk = b""
        slot.reply += chunk
        if chunk and not (self.kept and len(slot.reply) >= self.kinds[0].length):
            return
        if _is_right(self.kinds[0], slot.reply):
            self.taken_s.append(time.perf_counter() - slot.started_s)
        else:
            self.failed += 1
        if chunk:
            self._ask(opened)
        else:
            self.sockets.pop(number).close()
            self._connect()

    def _exchange_datagrams(self, udp: socket.socket) -> None:
        try:
            for _ in range(self.width):
                self._count_datagram(udp.recv(RECV_BYTES))
        except BlockingIOError:
            if time.perf_counter() > self.heard_s + LOST_AFTER_S:
                self.under_way = 0
                self.heard_s = time.perf_counter()
        for _ in range(self.width - self.under_way):
            udp.send(next(self.requests[-1]))
            self.under_way += 1

    def _count_datagram(self, reply: bytes) -> None:
        if _is_right(self.kinds[-1], reply):
            self.datagrams += 1
        else:
            self.bad_datagrams += 1
        self.under_way = max(0, self.under_way - 1)
        self.heard_s = time.perf_counter()


def _is_right(kind: Kind, reply: bytes) -> bool:
    return reply.startswith(kind.prefix) and kind.length in (0, len(reply))


def echo(port: int) -> None:
    """Answer every datagram with itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((HOST, port))
        while True:
            udp.sendto(*udp.recvfrom(2_048))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "echo":
        sys.exit(__doc__)
    echo(int(sys.argv[2]))
