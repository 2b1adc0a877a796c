"""Compare `connectoid send` of a large file with bare aiortc on this machine.

Each is two processes; they take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiortc
import common

ROOT = Path(__file__).parent.parent
# Bytes of a message: a size that all browsers take, ours, and a larger one.
OUR_CHUNK_BYTES = 60_000
CHUNKS = (16_384, OUR_CHUNK_BYTES, 262_144)
BUFFERED_BYTES = 1024 * 1024
TIMEOUT_S = 300.0

# ---------------------------------------------------------------------------------------
# Bare aiortc: two processes that exchange their SDP over a pipe. The first sends chunks as
# long as there is room, the second counts. The time is from the first chunk to the last.
# ---------------------------------------------------------------------------------------


async def offer_through(pipe: Connection, connection: Any) -> None:
    """Connect to the other process, which answers."""
    await connection.setLocalDescription(await connection.createOffer())
    await _send_description(pipe, connection)
    await _take_description(pipe, connection)


async def answer_through(pipe: Connection, connection: Any) -> None:
    """Connect to the other process, which offers."""
    await _take_description(pipe, connection)
    await connection.setLocalDescription(await connection.createAnswer())
    await _send_description(pipe, connection)


async def _send_description(pipe: Connection, connection: Any) -> None:
    description = connection.localDescription
    pipe.send((description.sdp, description.type))


async def _take_description(pipe: Connection, connection: Any) -> None:
    sdp, kind = await asyncio.to_thread(pipe.recv)
    await connection.setRemoteDescription(aiortc.RTCSessionDescription(sdp, kind))


async def send_bare(pipe: Connection, size: int, chunk_bytes: int) -> float:
    """Send this many bytes and return the seconds until the other has them."""
    connection = aiortc.RTCPeerConnection()
    channel = connection.createDataChannel("bench")
    opened = asyncio.Event()
    room = asyncio.Event()
    done = asyncio.Event()
    channel.on("open", opened.set)
    channel.on("message", lambda _: done.set())
    channel.on("bufferedamountlow", room.set)
    channel.bufferedAmountLowThreshold = BUFFERED_BYTES // 2
    await offer_through(pipe, connection)
    await opened.wait()

    began_s = time.perf_counter()
    block = bytes(chunk_bytes)
    for start in range(0, size, chunk_bytes):
        channel.send(block[:size - start])
        if channel.bufferedAmount > BUFFERED_BYTES:
            room.clear()
            await room.wait()
    await done.wait()
    took_s = time.perf_counter() - began_s
    await connection.close()
    return took_s


async def receive_bare(pipe: Connection, size: int) -> None:
    """Count this many bytes and say that they are there."""
    connection = aiortc.RTCPeerConnection()
    closed = asyncio.Event()
    got = 0

    def watch(channel: Any) -> None:
        def count(message: bytes) -> None:
            nonlocal got
            got += len(message)
            if got >= size:
                channel.send("done")

        channel.on("message", count)
        channel.on("close", closed.set)

    connection.on("datachannel", watch)
    await answer_through(pipe, connection)
    await closed.wait()
    await connection.close()


def run_receiver(pipe: Connection, size: int) -> None:
    """Be the second process."""
    asyncio.run(receive_bare(pipe, size))


def bare_s(size: int, chunk_bytes: int) -> float:
    """Return the seconds of a transfer by aiortc alone."""
    here, there = multiprocessing.Pipe()
    receiver = multiprocessing.Process(target=run_receiver, args=(there, size), daemon=True)
    receiver.start()
    took_s = asyncio.run(asyncio.wait_for(send_bare(here, size, chunk_bytes), TIMEOUT_S))
    receiver.join(TIMEOUT_S)
    return took_s


# ---------------------------------------------------------------------------------------
# The command line, as two people use it.
# ---------------------------------------------------------------------------------------


class People:
    """Alice and Bob, paired; their stores are in a folder."""

    def __init__(self, folder: Path, relay: common.RelayProcess) -> None:
        self.folder = folder
        self._relay = f"http://{common.HOST}:{relay.port}/"
        alice = self.start("Alice", "share", "Bob")
        bob = self.start("Bob", "open", self.events(alice, "link")["link"], "--name", "Alice")
        for process in (alice, bob):
            process.communicate(timeout=TIMEOUT_S)

    def start(self, who: str, *argv: str) -> subprocess.Popen[str]:
        """Start a command."""
        store = str(self.folder / f"{who}.db")
        command = [sys.executable, "-m", "connectoid", *argv, "--json", "--store", store]
        environment = {
            **os.environ, "CONNECTOID_RELAY": self._relay, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, env=environment, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE)

    @staticmethod
    def events(process: subprocess.Popen[str], wanted: str) -> dict[str, Any]:
        """Return the first event of a kind."""
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == wanted:
                return dict(event)
        raise SystemExit(f"connectoid ended without {wanted!r}")

    def send_s(self, path: Path) -> float:
        """Return the seconds from the connection until both know that the hash is right."""
        inbox = Path(tempfile.mkdtemp(dir=self.folder))
        receiver = self.start("Bob", "receive", "Alice", "--yes", "--dir", str(inbox))
        sender = self.start("Alice", "send", "Bob", str(path))
        self.events(sender, "connected")
        began_s = time.perf_counter()
        sent = self.events(sender, "sent")
        took_s = time.perf_counter() - began_s
        assert self.events(receiver, "received")["sha256"] == sent["sha256"]
        for process in (sender, receiver):
            process.communicate(timeout=TIMEOUT_S)
        (inbox / path.name).unlink()
        return took_s


@contextlib.contextmanager
def paired(size: int) -> Iterator[tuple[People, Path]]:
    """Pair two people through a relay, with a file of random bytes."""
    with (
        tempfile.TemporaryDirectory() as name,
        common.RelayProcess(Path(name)) as relay,
    ):
        path = Path(name) / "large.bin"
        path.write_bytes(os.urandom(size))
        yield People(Path(name), relay), path


OURS = "connectoid send"


def title(chunk_bytes: int) -> str:
    """Return the name of a transfer by aiortc alone."""
    return f"aiortc, messages of {chunk_bytes:,} bytes"


def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """Return MB per second of all rounds."""
    found: dict[str, list[float]] = {OURS: []}
    found |= {title(chunk_bytes): [] for chunk_bytes in CHUNKS}
    megabytes = size / 1e6
    with paired(size) as (people, path):
        for _ in range(rounds):
            found[OURS].append(megabytes / people.send_s(path))
            for chunk_bytes in CHUNKS:
                found[title(chunk_bytes)].append(megabytes / bare_s(size, chunk_bytes))
    return found


def main() -> int:
    """Measure in turn, and print medians with the least and the most, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=100, help="(default: %(default)s)")
    arguments = parser.parse_args()
    found = measure(arguments.megabytes * 1_000_000, arguments.rounds)
    print(f"{common.machine()}, {arguments.rounds} rounds\n")
    print(f"| {arguments.megabytes} MB | MB/s |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {common.spread(values, '.1f')} |")
    medians = {name: statistics.median(values) for name, values in found.items()}
    ours = medians.pop(OURS)
    best = ours / max(medians.values())
    like = ours / medians[title(OUR_CHUNK_BYTES)]
    print(f"\nOf the best of aiortc: {best:.2f};"
          f" of messages as large as ours: {like:.2f} (reach: 0.8)")
    return 0


if __name__ == "__main__":
    common.run(main)
