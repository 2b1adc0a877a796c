"""Be one side of a pairing, for test_connectoid.mjs: `cross_peer.py share|open RELAY [LINK]`.

Its connections are plain TCP, and its SDP says where to: what is tried is everything but WebRTC. It prints its link,
then what it is told, what it receives and its comparison string, and says everything back that it receives.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from connectoid import EMOJI, Connectoid, NotConnectedError, Store

BINARY, TEXT = 0, 1
HEADER_BYTES = 5  # length and kind


class TcpAdapter:
    """Make connections over TCP: the offerer listens, and its SDP is the port."""

    def __init__(self) -> None:
        self._report: Callable[[int, str, int, Any], None] = lambda *_: None
        self._servers: dict[int, socket.socket] = {}
        self._links: dict[int, socket.socket] = {}

    def start(self, report: Callable[[int, str, int, Any], None]) -> None:
        """Begin: reports go there."""
        self._report = report

    def gather(self, contact: int, ask: int, offer: Mapping[str, str] | None, ice_servers: Sequence[str]) -> None:
        """Listen for an answerer, or be one."""
        if offer is None:
            server = socket.create_server(("127.0.0.1", 0))
            self._servers[contact] = server
            sdp = {"type": "offer", "sdp": f"port {server.getsockname()[1]}"}
            self._begin(lambda: self._report(contact, "gathered", ask, sdp))
        else:
            self._begin(lambda: self._answer(contact, ask, int(offer["sdp"].split()[1])))

    def _answer(self, contact: int, ask: int, port: int) -> None:
        self._report(contact, "gathered", ask, {"type": "answer", "sdp": "here"})
        self._serve(contact, ask, lambda: socket.create_connection(("127.0.0.1", port)))

    @staticmethod
    def _begin(work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True).start()

    def _serve(self, contact: int, ask: int, connect: Callable[[], socket.socket]) -> None:
        link = connect()
        self._links[contact] = link
        self._report(contact, "opened", ask, None)
        with link.makefile("rb") as stream:
            while len(head := stream.read(HEADER_BYTES)) == HEADER_BYTES:
                octets = stream.read(int.from_bytes(head[:-1], "big"))
                self._report(contact, "message", ask, octets if head[-1] == BINARY else octets.decode())
        self._report(contact, "closed", ask, None)

    def join(self, contact: int, ask: int, answer: Mapping[str, str]) -> None:
        """Begin: the answerer has connected."""
        server = self._servers.pop(contact)
        self._begin(lambda: self._serve(contact, ask, lambda: server.accept()[0]))

    def write(self, contact: int, ask: int, message: bytes | str) -> Future[None]:
        """Send one message."""
        octets = message if isinstance(message, bytes) else message.encode()
        kind = BINARY if isinstance(message, bytes) else TEXT
        self._links[contact].sendall(len(octets).to_bytes(HEADER_BYTES - 1, "big") + bytes([kind]) + octets)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def close(self, contact: int, ask: int) -> None:
        """End the connection."""
        link = self._links.pop(contact, None)
        if link is not None:
            link.shutdown(socket.SHUT_RDWR)
            link.close()

    def stop(self) -> None:
        """Do nothing: the program ends."""


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
            kept = app.contacts()[0]
            say("emoji", " ".join(EMOJI[number][1] for number in kept.comparison))
            say("state", kept.state)
        for line in sys.stdin:
            if line == "unshare\n":
                app.unshare(name)
                say("unshared")
            if line == "end\n":
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
