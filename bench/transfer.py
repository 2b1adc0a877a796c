"""Compare `connectoid send` of a large file with bare aiortc on this machine: two processes each, alternating."""

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

CLI = Path(__file__).parent.parent / "connectoid_cli.py"
CHUNKS = (16_384, 60_000, 262_144)  # bytes of a message: what browsers are sure to take, ours, and more
BUFFERED_BYTES = 1024 * 1024  # as much as connectoid.py lets wait
TIMEOUT_S = 300.0

# ---------------------------------------------------------------------------------------
# Bare aiortc: two processes that exchange their SDP over a pipe. The first sends chunks as
# long as there is room, the second counts; the time is from the first chunk to the last.
# ---------------------------------------------------------------------------------------


async def describe(connection: Any, pipe: Connection, offer: bool) -> None:
    """Connect two peer connections through a pipe."""

    async def take() -> None:
        sdp, kind = await asyncio.to_thread(pipe.recv)
        await connection.setRemoteDescription(aiortc.RTCSessionDescription(sdp, kind))

    if not offer:
        await take()
    await connection.setLocalDescription(await (connection.createOffer() if offer else connection.createAnswer()))
    pipe.send((connection.localDescription.sdp, connection.localDescription.type))
    if offer:
        await take()


async def send_bare(pipe: Connection, size: int, chunk_bytes: int) -> float:
    """Send so many bytes and return the seconds until the other has them."""
    connection = aiortc.RTCPeerConnection()
    channel = connection.createDataChannel("bench")
    opened, room, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    channel.on("open", opened.set)
    channel.on("message", lambda _: done.set())
    channel.on("bufferedamountlow", room.set)
    channel.bufferedAmountLowThreshold = BUFFERED_BYTES // 2
    await describe(connection, pipe, offer=True)
    await opened.wait()
    began_s, block = time.perf_counter(), bytes(chunk_bytes)
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
    """Count so many bytes and say that they are there."""
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
    await describe(connection, pipe, offer=False)
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
        command = [sys.executable, str(CLI), *argv, "--json", "--store", str(self.folder / f"{who}.db")]
        return subprocess.Popen(command, env={**os.environ, "CONNECTOID_RELAY": self._relay}, cwd=self.folder,
                                text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    @staticmethod
    def events(process: subprocess.Popen[str], wanted: str) -> dict[str, Any]:
        """Return the first event of a kind."""
        assert process.stdout is not None
        for line in process.stdout:
            if (event := json.loads(line))["event"] == wanted:
                return dict(event)
        raise SystemExit(f"connectoid ended without {wanted!r}")

    def send_s(self, path: Path) -> float:
        """Return the seconds of a transfer: from the connection until both know that the hash is right."""
        inbox = Path(tempfile.mkdtemp(dir=self.folder))
        receiver = self.start("Bob", "receive", "Alice", "--dir", str(inbox))
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
    with tempfile.TemporaryDirectory() as name, common.RelayProcess(Path(name)) as relay:
        path = Path(name) / "large.bin"
        path.write_bytes(os.urandom(size))
        yield People(Path(name), relay), path


def main() -> None:
    """Measure in turn, and print medians with the least and the most, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=100, help="(default: %(default)s)")
    arguments = parser.parse_args()
    size = arguments.megabytes * 1_000_000
    found: dict[str, list[float]] = {}
    with paired(size) as (people, path):
        for _ in range(arguments.rounds):
            found.setdefault("connectoid send", []).append(size / 1e6 / people.send_s(path))
            for chunk_bytes in CHUNKS:
                name = f"aiortc, messages of {chunk_bytes:,} bytes"
                found.setdefault(name, []).append(size / 1e6 / bare_s(size, chunk_bytes))
    print(f"{common.machine()}, {arguments.rounds} rounds\n\n| {arguments.megabytes} MB | MB/s |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |")
    medians = {name: statistics.median(values) for name, values in found.items()}
    ours = medians.pop("connectoid send")
    print(f"\nOf the best of aiortc: {ours / max(medians.values()):.2f}; of messages as large as ours: "
          f"{ours / medians[f'aiortc, messages of {CHUNKS[1]:,} bytes']:.2f} (reach: 0.8)")


if __name__ == "__main__":
    main()
