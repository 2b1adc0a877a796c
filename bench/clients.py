"""Speak to each server as its clients do: one rendezvous, one idle client. Used by compare.py.

Each function is a coroutine that talks to 127.0.0.1 and asserts every reply. It uses bare
sockets: a library for each protocol would cost more than the servers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from common import DATA, HOST, QUESTION_INFO, SUITE, Owner, check, encode, receive, send

# Bits of the number that makes a key: the number is below the order of the curve.
OWNER_BITS = 380
TIMEOUT_S = 20
RECV_BYTES = 65_536
MQTT_KEEPALIVE_S = 60
# These bytes of a mailbox make a number that is used once.
NAMEPLATE_BYTES = 12


class Line:
    """A connection; `with` closes it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.received = b""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    async def send(self, octets: bytes) -> None:
        """Send all."""
        await asyncio.get_running_loop().sock_sendall(self.socket, octets)

    async def until(self, there: Callable[[bytes], bool]) -> bytes:
        """Return what came since the last call, once `there` accepts it.

        Raise ConnectionError if the server closes before.
        """
        loop = asyncio.get_running_loop()
        while not there(self.received):
            chunk = await loop.sock_recv(self.socket, RECV_BYTES)
            if not chunk:
                raise ConnectionError(f"closed after {self.received[-200:]!r}")
            self.received += chunk
        taken = self.received
        self.received = b""
        return taken

    async def until_end(self, octets: bytes) -> None:
        """Wait for a reply that ends with these octets."""
        await self.until(lambda received: received.endswith(octets))

    async def rest(self) -> bytes:
        """Return all that comes until the server closes."""
        loop = asyncio.get_running_loop()
        while chunk := await loop.sock_recv(self.socket, RECV_BYTES):
            self.received += chunk
        return self.received


async def exchange(port: int, octets: bytes) -> bytes:
    """Send octets on a fresh connection; return all that comes until the server closes."""
    with Line(port) as line:
        await line.send(octets)
        return await line.rest()


# ---------------------------------------------------------------------------------------
# Mailboxes, and JSON over HTTP: the relay, and the one behind FastAPI.
# ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two mailboxes that meet: Alice sends first. Other servers take `pub` as a name."""

    alice: Owner
    bob: Owner


def make_owner() -> Owner:
    """Return a fresh mailbox."""
    return Owner(secrets.randbits(OWNER_BITS) + 1)


def make_pairs(count: int) -> list[Pair]:
    """Return pairs of fresh mailboxes."""
    return [Pair(make_owner(), make_owner()) for _ in range(count)]


def made_up_pub() -> str:
    """Return the form of a mailbox that nobody has."""
    return encode(b"\x02" + os.urandom(48))


def http_request(body: bytes, *, keep: bool = False, path: str = "/") -> bytes:
    """Return a POST, or a GET without a body, as a client of few words sends it."""
    lines = [f"GET {path} HTTP/1.1", "Host: relay.example"]
    if body:
        lines[0] = f"POST {path} HTTP/1.1"
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if not keep:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


def check_of(pub: str, **members: Any) -> bytes:
    """Return the body of a check."""
    return json.dumps({**check(pub), **members}).encode("ascii")


async def ask(port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request on a fresh connection; its status must be 200."""
    body = json.dumps(request).encode("ascii")
    head, _, reply = (await exchange(port, http_request(body))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), (head, reply)
    answered: dict[str, Any] = json.loads(reply)
    assert answered["ok"] is True, reply
    return answered


async def meet_at_relay(port: int, pair: Pair) -> None:
    """Check, send, check, receive, send, check, receive."""
    assert (await ask(port, check(pair.bob.pub)))["found"] is False
    for receiver in (pair.bob, pair.alice):
        await ask(port, send(receiver.pub))
        checked = await ask(port, check(receiver.pub))
        answer = receiver.open(checked["question"])
        received = await ask(port, receive(receiver.pub, answer))
        assert received["data"] == DATA


async def meet_at_fastapi(port: int, pair: Pair) -> None:
    """Deposit, fetch, answer, fetch: nobody proves anything."""
    for receiver in (pair.bob, pair.alice):
        await ask(port, send(receiver.pub))
        received = await ask(port, {"pub": receiver.pub, "action": "receive", "at": 0})
        assert received["data"] == DATA


def open_forever() -> None:
    """Do what the clients of a rendezvous do most of the time, until the process is ended."""
    owner = make_owner()
    sealed = SUITE.encrypt(b"a" * 43, owner.key.public_key(), info=QUESTION_INFO)
    while True:
        SUITE.decrypt(sealed, owner.key, info=QUESTION_INFO)


async def park_at_relay(port: int, number: int) -> Line:
    """Begin a long poll."""
    line = Line(port)
    await line.send(http_request(check_of(made_up_pub(), wait=60), keep=True))
    return line


# ---------------------------------------------------------------------------------------
# Redis: a list for each mailbox.
# ---------------------------------------------------------------------------------------


def redis_command(*words: str) -> bytes:
    """Return a command in the form of Redis."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words]
    return b"".join(parts)


# Redis closes after it.
REDIS_QUIT = redis_command("QUIT")


def redis_range(name: str) -> bytes:
    """Return what fetches a list."""
    return redis_command("LRANGE", name, "0", "-1") + REDIS_QUIT


async def meet_at_redis(port: int, pair: Pair) -> None:
    """Deposit, fetch, answer, fetch: RPUSH (and EXPIRE), LRANGE."""
    for receiver in (pair.bob, pair.alice):
        push = redis_command("RPUSH", receiver.pub, DATA)
        expire = redis_command("EXPIRE", receiver.pub, "3600")
        pushed = await exchange(port, push + expire + REDIS_QUIT)
        assert pushed == b":1\r\n:1\r\n+OK\r\n", pushed
        fetched = await exchange(port, redis_range(receiver.pub))
        expected = b"*1\r\n$%d\r\n%s\r\n+OK\r\n" % (len(DATA), DATA.encode())
        assert fetched == expected, fetched


async def idle_at_redis(port: int, number: int) -> Line:
    """Wait for a message of one's own."""
    line = Line(port)
    await line.send(redis_command("BLPOP", f"idle-{number}", "0"))
    return line


# ---------------------------------------------------------------------------------------
# Mosquitto: MQTT 3.1.1, a retained message of QoS 1 for each mailbox.
# ---------------------------------------------------------------------------------------

MQTT_PING = b"\xc0\x00"
MQTT_LEAVE = b"\xe0\x00"
# The number of the only packet on a connection that needs one.
MQTT_ID = b"\x00\x01"
MQTT_CONNECTED = b"\x20\x02\x00\x00"
MQTT_PUBLISHED = b"\x40\x02" + MQTT_ID
MQTT_SUBSCRIBED = b"\x90\x03\x00\x01\x01"


def _mqtt(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    length = b""
    rest = len(body)
    while rest > 127:
        length += bytes([rest % 128 | 128])
        rest //= 128
    return bytes([kind]) + length + bytes([rest]) + body


def _mqtt_text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def mqtt_connect(name: str, *, clean: bool = True) -> bytes:
    """Return a CONNECT; without `clean` the server keeps what comes for this name."""
    flags = bytes([2 * clean])
    keepalive = struct.pack(">H", MQTT_KEEPALIVE_S)
    return _mqtt(0x10, _mqtt_text("MQTT"), b"\x04", flags, keepalive, _mqtt_text(name))


def mqtt_publish(topic: bytes, message: bytes) -> bytes:
    """Return a retained PUBLISH of QoS 1."""
    return _mqtt(0x33, topic, MQTT_ID, message)


def mqtt_remove(topic: bytes) -> bytes:
    """Return what removes a retained message: a PUBLISH with nothing in it."""
    return _mqtt(0x31, topic)


def mqtt_subscribe(topic: bytes) -> bytes:
    """Return a SUBSCRIBE of QoS 1."""
    return _mqtt(0x82, MQTT_ID, topic, b"\x01")


async def meet_at_mosquitto(port: int, pair: Pair) -> None:
    """Deposit, fetch, answer, fetch; what is fetched is removed."""
    message = DATA.encode()
    for receiver in (pair.bob, pair.alice):
        topic = _mqtt_text(receiver.pub)
        hello = mqtt_connect(f"to-{receiver.pub}")
        sent = await exchange(port, hello + mqtt_publish(topic, message) + MQTT_LEAVE)
        assert sent == MQTT_CONNECTED + MQTT_PUBLISHED, sent
        with Line(port) as line:
            await line.send(mqtt_connect(receiver.pub) + mqtt_subscribe(topic))
            fetched = await line.until(lambda received: received.endswith(message))
            assert MQTT_SUBSCRIBED in fetched, fetched
            await line.send(MQTT_PUBLISHED + mqtt_remove(topic) + MQTT_LEAVE)
            await line.rest()


async def idle_at_mosquitto(port: int, number: int) -> Line:
    """Subscribe to a mailbox of one's own."""
    line = Line(port)
    topic = _mqtt_text(f"box-{number}")
    await line.send(mqtt_connect(f"idle-{number}") + mqtt_subscribe(topic))
    await line.until_end(MQTT_SUBSCRIBED)
    return line


# ---------------------------------------------------------------------------------------
# WebSocket (RFC 6455), as far as PeerJS and the mailbox server need it.
# ---------------------------------------------------------------------------------------

WS_CLOSE = b"\x88\x82\0\0\0\0\x03\xe8"
WS_KEY = base64.b64encode(b"connectoid bench").decode()


def ws_upgrade(path: str) -> bytes:
    """Return the request that begins a WebSocket."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: relay.example\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {WS_KEY}\r\n\r\n").encode()


def ws_frame(opcode: int, body: bytes) -> bytes:
    """Return one frame. Its mask is zero, which saves work here and nowhere else."""
    length = b"\xfe" + struct.pack(">H", len(body))
    if len(body) < 126:
        length = bytes([0x80 | len(body)])
    return bytes([opcode]) + length + bytes(4) + body


def ws_text(message: dict[str, Any]) -> bytes:
    """Return a message as one frame."""
    return ws_frame(0x81, json.dumps(message).encode())


WS_PING = ws_frame(0x89, b"")
WS_PONG = b"\x8a\x00"


async def ws_wait(line: Line, type_name: str, *also: str) -> bytes:
    """Return what came, once a message of this type is there and all is whole.

    There are no spaces after colons in what is returned.
    """
    words = [part.encode() for part in (f'"type":"{type_name}"', *also)]

    def there(received: bytes) -> bool:
        plain = received.replace(b'": ', b'":')
        return received.endswith(b"}") and all(word in plain for word in words)

    return (await line.until(there)).replace(b'": ', b'":')


async def ws_leave(line: Line) -> None:
    """Close a WebSocket and the connection."""
    with line:
        await line.send(WS_CLOSE)
        await line.rest()


async def _join_peerjs(port: int, name: str) -> Line:
    line = Line(port)
    await line.send(ws_upgrade(f"/peerjs?key=peerjs&id={name}&token=t&version=1.5.4"))
    assert (await ws_wait(line, "OPEN")).startswith(b"HTTP/1.1 101 ")
    return line


async def meet_at_peerjs(port: int, pair: Pair) -> None:
    """Join both, pass an offer and an answer, leave."""
    alice = await _join_peerjs(port, pair.alice.pub)
    bob = await _join_peerjs(port, pair.bob.pub)
    for type_name, sender, receiver, to in (
            ("OFFER", alice, bob, pair.bob), ("ANSWER", bob, alice, pair.alice)):
        message = {"type": type_name, "dst": to.pub, "payload": {"sdp": DATA}}
        await sender.send(ws_text(message))
        assert DATA.encode() in await ws_wait(receiver, type_name)
    await ws_leave(alice)
    await ws_leave(bob)


async def idle_at_peerjs(port: int, number: int) -> Line:
    """Join under a name of one's own."""
    return await _join_peerjs(port, f"idle-{number}")


PEERJS_PING = ws_text({"type": "HEARTBEAT"})


async def _bind_mailbox(port: int, side: str) -> Line:
    line = Line(port)
    # The upgrade goes alone: the server overlooks what comes with it.
    await line.send(ws_upgrade("/v1"))
    assert (await ws_wait(line, "welcome")).startswith(b"HTTP/1.1 101 ")
    await line.send(ws_text({"type": "bind", "appid": "bench.example", "side": side}))
    return line


async def _join_mailbox(port: int, side: str, nameplate: int) -> Line:
    line = await _bind_mailbox(port, side)
    await line.send(ws_text({"type": "claim", "nameplate": str(nameplate)}))
    claimed = await ws_wait(line, "claimed")
    mailbox = claimed.rpartition(b'"mailbox":"')[2].partition(b'"')[0].decode()
    await line.send(ws_text({"type": "open", "mailbox": mailbox}))
    return line


async def check_at_mailbox(port: int, pair: Pair) -> None:
    """Open a mailbox in which there is nothing; the pong shows that it is done."""
    line = await _bind_mailbox(port, pair.bob.pub)
    opening = ws_text({"type": "open", "mailbox": pair.bob.pub})
    await line.send(opening + ws_text({"type": "ping", "ping": 1}))
    assert b'"type":"message"' not in await ws_wait(line, "pong")
    await ws_leave(line)


async def meet_at_mailbox(port: int, pair: Pair) -> None:
    """Claim a nameplate, open its mailbox, add a message, wait for the other's, leave."""
    names = [pair.alice.pub, pair.bob.pub]
    nameplate = int.from_bytes(pair.alice.pub.encode()[:NAMEPLATE_BYTES])
    lines = [await _join_mailbox(port, name, nameplate) for name in names]
    for sender, receiver in ((0, 1), (1, 0)):
        phase = names[sender]
        await lines[sender].send(ws_text({"type": "add", "phase": phase, "body": DATA}))
        await ws_wait(lines[receiver], "message", f'"phase":"{phase}"', DATA)
    for line in lines:
        await line.send(ws_text({"type": "release"}))
        await line.send(ws_text({"type": "close", "mood": "happy"}))
        await ws_wait(line, "closed")
        await ws_leave(line)


async def idle_at_mailbox(port: int, number: int) -> Line:
    """Bind, claim a nameplate of one's own and open its mailbox."""
    line = await _join_mailbox(port, f"side-{number}", number)
    await line.send(WS_PING)
    await line.until_end(WS_PONG)
    return line


if __name__ == "__main__":
    open_forever()
