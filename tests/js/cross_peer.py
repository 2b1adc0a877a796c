"""Be one side of a pairing, for js/tests/test_python.mjs: `cross_peer.py share|open RELAY [LINK]`.

Its connections are plain TCP, and its SDP says where to: what is tried is everything but WebRTC.
It prints its link, then what it is told, what it receives and its comparison string, and says
everything back that it receives.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from fake_sdp import make_sdp, name_in

from connectoid import EMOJI, Connectoid, Ice, NotConnectedError, Store
from connectoid.webrtc import Description, Report

HOST = "127.0.0.1"
BINARY = 0
TEXT = 1
LENGTH_BYTES = 4


class TcpAdapter:
    """Make connections over TCP: the offerer listens, and its SDP is the port."""

    def __init__(self) -> None:
        self._servers: dict[int, asyncio.Server] = {}
        self._joined: dict[int, asyncio.Event] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, report: Report) -> None:
        """Begin: reports go there."""
        self._report = report

    def gather(
        self, contact: int, attempt_id: int, offer: Description | None, ice: Ice,
    ) -> None:
        """Listen for an answerer, or be one."""
        if offer is None:
            self._begin(self._listen(contact, attempt_id))
        else:
            self._begin(self._answer(contact, attempt_id, int(name_in(offer["sdp"]))))

    def join(self, contact: int, attempt_id: int, answer: Description) -> None:
        """Serve the answerer, who connects by itself and perhaps sooner."""
        self._joined[contact].set()

    async def write(self, contact: int, attempt_id: int, message: bytes | str) -> None:
        """Send one message."""
        writer = self._writers.get(contact)
        if writer is None:
            raise ConnectionError("closed")
        if isinstance(message, bytes):
            writer.write(len(message).to_bytes(LENGTH_BYTES, "big") + bytes([BINARY]) + message)
        else:
            octets = message.encode()
            writer.write(len(octets).to_bytes(LENGTH_BYTES, "big") + bytes([TEXT]) + octets)
        await writer.drain()

    def close(self, contact: int, attempt_id: int) -> None:
        """End the connection."""
        writer = self._writers.pop(contact, None)
        if writer is not None:
            writer.close()

    def doubt(self) -> None:
        """Do nothing: this network stays."""

    async def stop(self) -> None:
        """Close all."""
        for contact in list(self._writers):
            self.close(contact, 0)
        for server in self._servers.values():
            server.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, contact: int, attempt_id: int) -> None:
        joined = asyncio.Event()
        self._joined[contact] = joined

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await joined.wait()
            await self._serve(contact, attempt_id, reader, writer)

        server = await asyncio.start_server(serve, HOST, 0)
        self._servers[contact] = server
        port = server.sockets[0].getsockname()[1]
        self._report(contact, "gathered", attempt_id, make_sdp("offer", str(port)))

    async def _answer(self, contact: int, attempt_id: int, port: int) -> None:
        self._report(contact, "gathered", attempt_id, make_sdp("answer"))
        reader, writer = await asyncio.open_connection(HOST, port)
        await self._serve(contact, attempt_id, reader, writer)

    async def _serve(
        self, contact: int, attempt_id: int, reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._writers[contact] = writer
        self._report(contact, "opened", attempt_id, None)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                self._report(contact, "message", attempt_id, await _read(reader))
        self._report(contact, "closed", attempt_id, None)


async def _read(reader: asyncio.StreamReader) -> bytes | str:
    """Return the next message."""
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    kind = await reader.readexactly(1)
    octets = await reader.readexactly(length)
    if kind[0] == BINARY:
        return octets
    return octets.decode()


def say(*words: str) -> None:
    """Print a line for the test, from any thread."""
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


def main(role: str, relay: str, link: str = "") -> None:
    """Pair, connect, and send back what comes until the other hangs up."""
    name = "Bob" if role == "share" else "Alice"
    paired = threading.Event()

    def tell(_: str, event: str) -> None:
        say("told", event)
        if event == "paired":
            paired.set()

    with Connectoid(Store(":memory:"), [(relay, None)], TcpAdapter(), on_event=tell) as app:
        if role == "share":
            say("link", app.share(name, "https://app.example.com/"))
        else:
            app.open(link, name)
        channel = app.connect(name, 60)
        try:
            while True:
                message = channel.receive(60)
                say("received", str(message))
                channel.send(message)
        except NotConnectedError:
            paired.wait(60)
            record = app.contacts()[0]
            say("emoji", " ".join(EMOJI[number][1] for number in record.comparison))
            say("state", record.state)
        for line in sys.stdin:
            if line == "renew\n":
                say("answered", str(app.renew_and_tell(name, 60)))
            if line == "unshare\n":
                app.unshare(name)
                say("unshared")
            if line == "end\n":
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
