"""Servers that hang, answer rubbish or lie, on a TCP and a UDP port of one number.

    bad_servers.py KIND HOST PORT READY

The file READY is there once the server listens.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 65_536
RUBBISH = bytes(range(256)) * 4

# STUN (RFC 8489): a success has this bit, and its attributes come after 20 bytes.
SUCCESS = 0x0100
HEAD_BYTES = 20
XOR_MAPPED_ADDRESS = 0x0020
XOR_RELAYED_ADDRESS = 0x0016
LIFETIME = 0x000D
IPV4 = 1
COOKIE = 0x2112A442
# Of a machine that is not there, or somebody else's.
FALSE_ADDRESS = 0xC6336401  # 198.51.100.1
FALSE_PORT = 9

PAGE = b"<!DOCTYPE html><p>Welcome to the hotel. Please log in."
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"


def say_nothing(_asked: bytes) -> bytes:
    """Answer nothing."""
    return b""


def say_rubbish(_asked: bytes) -> bytes:
    """Answer what is no message of any protocol."""
    return RUBBISH


def lie(asked: bytes) -> bytes:
    """Grant what a STUN or TURN client asks for, with false addresses."""
    if len(asked) < HEAD_BYTES:
        return b""
    (method,) = struct.unpack_from("!H", asked)
    address = struct.pack("!BBHI", 0, IPV4, FALSE_PORT ^ COOKIE >> 16, FALSE_ADDRESS ^ COOKIE)
    body = struct.pack("!HHI", LIFETIME, 4, 600)
    for kind in (XOR_MAPPED_ADDRESS, XOR_RELAYED_ADDRESS):
        body += struct.pack("!HH", kind, len(address)) + address
    return struct.pack("!HH", method | SUCCESS, len(body)) + asked[4:HEAD_BYTES] + body


def show_a_page(_asked: bytes) -> bytes:
    """Answer as a network where users have to log in."""
    return HEAD % len(PAGE) + PAGE


KINDS: Mapping[str, Callable[[bytes], bytes]] = {
    "silent": say_nothing, "rubbish": say_rubbish, "liar": lie, "portal": show_a_page}


class Datagrams(asyncio.DatagramProtocol):
    """Answer datagrams."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer

    def connection_made(self, transport: Any) -> None:
        """Keep the way back."""
        self._transport = transport

    def datagram_received(self, octets: bytes, address: tuple[str, int]) -> None:
        """Answer one."""
        answer = self._answer(octets)
        if answer:
            self._transport.sendto(answer, address)


async def serve(kind: str, host: str, port: int, ready: Path) -> None:
    """Answer for ever. Connections stay open."""
    answer = KINDS[kind]

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while octets := await reader.read(MAX_BYTES):
            writer.write(answer(octets))
        writer.close()

    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: Datagrams(answer), local_addr=(host, port))
    server = await asyncio.start_server(converse, host, port)
    ready.touch()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
