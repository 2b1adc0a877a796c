"""Load a server as fast as it answers: load.c where there is a C compiler, else the same in Python.

Both have WIDTH requests under way and never sleep; each reply is counted by its beginning and its length.
`python bench/load.py echo PORT` is a bare loop of recvfrom and sendto, to compare with.
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

SOURCE = Path(__file__).parent / "load.c"
HOST = "127.0.0.1"
LOST_AFTER_S = 0.02  # without any datagram: those under way are lost
RECV_BYTES = 65_536
EXTRA_S = 20  # for the generator to end by itself


class Kind(NamedTuple):
    """Requests of one size, taken in turn, and how a right reply begins and how long it is (0: any length)."""

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
    """Load servers with the compiled load.c, or without a compiler with the Python below."""

    def __init__(self, directory: Path, width: int, *, compile_it: bool = True) -> None:
        self.directory, self.width = directory, width
        compiler = shutil.which("cc") if compile_it else None
        self.program = directory / "load" if compiler else None
        if compiler:
            subprocess.run([compiler, "-std=c99", "-O2", "-o", str(self.program), str(SOURCE)], check=True)

    def echo(self, port: int) -> list[str]:
        """Return the command of a bare UDP echo server."""
        return [str(self.program), "echo", str(port)] if self.program else [sys.executable, __file__, "echo", str(port)]

    def run(self, mode: str, port: int, seconds: float, *kinds: Kind) -> Figures:
        """Load a port: mode is fresh, kept, udp or both (kinds: of fresh, of udp)."""
        if not self.program:
            return PythonLoad(mode, port, self.width, kinds).run(seconds)
        command = [str(self.program), mode, HOST, str(port), str(seconds), str(self.width)]
        for number, kind in enumerate(kinds):
            path = self.directory / f"requests-{number}"
            path.write_bytes(b"".join(kind.requests))
            command += [str(path), str(len(kind.requests)), str(kind.length), kind.prefix.decode("ascii")]
        # Popen ends the child when Ctrl-C comes; run waits for it no longer than it may take.
        done = subprocess.run(command, check=True, capture_output=True, timeout=seconds + EXTRA_S)
        return Figures(**json.loads(done.stdout))


class _Slot:
    """One request under way, with its reply so far."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.reply = b""


class PythonLoad:
    """The same as load.c, slower: the server's CPU is counted all the same."""

    def __init__(self, mode: str, port: int, width: int, kinds: tuple[Kind, ...]) -> None:
        self.address, self.width = (HOST, port), width
        self.kept, self.tcp = mode == "kept", mode != "udp"
        self.kinds = kinds
        self.requests: list[Iterator[bytes]] = [cycle(kind.requests) for kind in kinds]
        self.epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.slots: dict[int, _Slot] = {}
        self.taken_s: list[float] = []
        self.failed = self.datagrams = self.bad_datagrams = self.under_way = 0
        self.heard_s = 0.0

    def run(self, seconds: float) -> Figures:
        """Load for so many seconds."""
        started_s = time.perf_counter()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.connect(self.address)
        udp.setblocking(False)
        with udp:
            for _ in range(self.width * self.tcp):
                self._connect()
            while time.perf_counter() < started_s + seconds:
                for number, _ in self.epoll.poll(0) if self.tcp else ():
                    self._hear(number)
                if len(self.kinds) > self.tcp:
                    self._exchange_datagrams(udp)
        for opened in self.sockets.values():
            opened.close()
        self.epoll.close()
        taken_us = sorted(1_000_000 * taken_s for taken_s in self.taken_s) or [0.0]
        return Figures(len(self.taken_s), self.failed, round(taken_us[len(taken_us) // 2]),
                       round(taken_us[len(taken_us) * 99 // 100]), self.datagrams, self.bad_datagrams,
                       time.perf_counter() - started_s)

    def _connect(self) -> None:
        opened = socket.create_connection(self.address)  # over at once on the loopback interface
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setblocking(False)
        self.sockets[opened.fileno()] = opened
        self.epoll.register(opened, select.EPOLLIN)
        self._ask(opened)

    def _ask(self, opened: socket.socket) -> None:
        self.slots[opened.fileno()] = _Slot(time.perf_counter())
        opened.sendall(next(self.requests[0]))

    def _hear(self, number: int) -> None:
        opened, slot = self.sockets[number], self.slots[number]
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
                right = _is_right(self.kinds[-1], udp.recv(RECV_BYTES))
                self.datagrams += right
                self.bad_datagrams += not right
                self.under_way = max(0, self.under_way - 1)
                self.heard_s = time.perf_counter()
        except BlockingIOError:
            if time.perf_counter() > self.heard_s + LOST_AFTER_S:
                self.under_way, self.heard_s = 0, time.perf_counter()
        for _ in range(self.width - self.under_way):
            udp.send(next(self.requests[-1]))
            self.under_way += 1


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
