"""Be one end of a transfer by aiortc alone: what a large file costs without Connectoid.

    bare_aiortc.py send BYTES CHUNK_BYTES
    bare_aiortc.py receive BYTES

Each gives its description as a line of JSON, and reads that of the other. The sender sends chunks
as long as there is room, and prints the seconds from the first one until the other has all.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import aiortc

BUFFERED_BYTES = 1024 * 1024


def describe(connection: Any) -> None:
    """Give the description of this end."""
    local = connection.localDescription
    print(json.dumps({"sdp": local.sdp, "type": local.type}), flush=True)


async def take_description(connection: Any) -> None:
    """Take the description of the other end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    await connection.setRemoteDescription(aiortc.RTCSessionDescription(**json.loads(line)))


async def send(size: int, chunk_bytes: int) -> float:
    """Send this many bytes and return the seconds until the other has them."""
    connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration([]))
    channel = connection.createDataChannel("bench")
    opened = asyncio.Event()
    room = asyncio.Event()
    done = asyncio.Event()
    channel.on("open", opened.set)
    channel.on("message", lambda _: done.set())
    channel.on("bufferedamountlow", room.set)
    channel.bufferedAmountLowThreshold = BUFFERED_BYTES // 2
    await connection.setLocalDescription(await connection.createOffer())
    describe(connection)
    await take_description(connection)
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


async def receive(size: int) -> None:
    """Count this many bytes and say that they are there."""
    connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration([]))
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
    await take_description(connection)
    await connection.setLocalDescription(await connection.createAnswer())
    describe(connection)
    await closed.wait()
    await connection.close()


def main() -> None:
    """Be the end that the command line names."""
    size, *chunk_bytes = map(int, sys.argv[2:])
    if sys.argv[1] == "send":
        print(asyncio.run(send(size, *chunk_bytes)), flush=True)
    else:
        asyncio.run(receive(size))


if __name__ == "__main__":
    main()
