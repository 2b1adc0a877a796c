"""TLS that takes little besides content.

After the handshake a server may send new tickets and new keys, as many as it likes. Each costs
OpenSSL some 100 microseconds, and none of it is a reply: 10,000 of them in the 256 KiB that a loop
reads at once held it up for a second, and the next ones for as long. So octets reach OpenSSL piece
by piece, and a connection ends that brings many without content. Nor is a second handshake made.
"""

from __future__ import annotations

import functools
import ssl
from typing import Any

# Of what has come, for OpenSSL at once: the largest record, and a little.
PIECE_BYTES = 17 * 1024
# Octets beyond those of the content. Servers send two tickets of some 250.
MAX_BESIDE_CONTENT = 64 * 1024
# Octets that one of content may take: a record of its own.
RECORD_BYTES = 24
# Python's own but for DHE, whose group is the server's choice: one of 10,000 bits takes a second.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES:!SHA1"


class Overhead:
    """Count octets that brought no content."""

    def __init__(self) -> None:
        self._octets = 0

    def take(self, octets: int) -> None:
        """Count octets that OpenSSL gets; raise SSLError if they are too many."""
        self._octets += octets
        if self._octets > MAX_BESIDE_CONTENT:
            raise ssl.SSLError(1, "it sends records without content")

    def allow(self, content: int) -> None:
        """Count what came of them."""
        self._octets = max(0, self._octets - RECORD_BYTES * content)


class ThriftyObject(ssl.SSLObject):
    """The TLS of one connection; `arrived` is what its loop has read."""

    arrived: ssl.MemoryBIO
    _given: ssl.MemoryBIO
    _overhead: Overhead

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> ThriftyObject:
        given = ssl.MemoryBIO()
        made: ThriftyObject = super()._create(given, *args, **kwargs)  # type: ignore[misc]
        made.arrived = incoming
        made._given = given
        made._overhead = Overhead()
        return made

    def do_handshake(self) -> None:
        """Shake hands. OpenSSL bounds what a server sends meanwhile."""
        while True:
            try:
                super().do_handshake()
                return
            except ssl.SSLWantReadError:
                if not self._give():
                    raise

    def read(self, *args: Any) -> Any:
        """Return content, as an SSLObject does; raise SSLError for too little of it."""
        while True:
            try:
                content = super().read(*args)
            except ssl.SSLWantReadError:
                octets = self._give()
                if not octets:
                    raise
                self._overhead.take(octets)
            else:
                self._overhead.allow(content if isinstance(content, int) else len(content))
                return content

    def unwrap(self) -> Any:
        """Say goodbye, and take that of the server; raise SSLError."""
        while True:
            try:
                return super().unwrap()
            except ssl.SSLWantReadError:
                octets = self._give()
                if not octets:
                    raise
                self._overhead.take(octets)

    def _give(self) -> int:
        """Give OpenSSL a piece of what has come; return how much that is."""
        piece = self.arrived.read(PIECE_BYTES)
        self._given.write(piece)
        return len(piece)


def make_context() -> ssl.SSLContext:
    """Return what servers' certificates are checked with, those of the system trusted."""
    context = ssl.create_default_context()
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.sslobject_class = ThriftyObject
    return context


def expect_name(context: ssl.SSLContext, name: str) -> None:
    """Have certificates checked against a name, also where a connection is made to an address."""
    context.wrap_bio = functools.partial(  # type: ignore[method-assign]
        _wrap_bio, context, name)


def _wrap_bio(context: ssl.SSLContext, name: str, *args: Any, **kwargs: Any) -> ssl.SSLObject:
    kwargs["server_hostname"] = name
    return ssl.SSLContext.wrap_bio(context, *args, **kwargs)
