"""Test coturn with the configuration of docs/hosting.md, and names that a relay gives."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from aioice import stun, turn
from harness import DEADLINE_S, HOME, ROOT, Make, Owner, check, needs, receive
from turn_server import HOST, free_port, turn_server

from connectoid_relay import Turn

pytestmark = [pytest.mark.slow, needs("turnserver", "openssl")]

HOSTING = (ROOT / "docs" / "hosting.md").read_text("utf-8")
SECRET = "0123456789abcdef0123456789abcdef"
URL = "turn:turn.example.com"
QUOTA = 20
FIRST_CHANNEL = 0x4000
# On a busy machine coturn once left all seven repeats of a request unanswered: a client asks again
# from another port.
ATTEMPTS = 3

# What nobody may reach through the server, and what everybody may.
PRIVATE = (
    "127.0.0.1", "10.1.2.3", "100.64.1.1", "169.254.169.254", "172.16.0.1", "172.31.255.255",
    "192.168.1.1", "198.18.0.1", "0.0.0.1", "255.255.255.255", "224.0.0.1",
)
PUBLIC = ("203.0.113.9", "9.9.9.9", "172.32.0.1", "192.0.1.1", "198.20.0.1", "100.128.0.1")


def recipe(folder: Path) -> tuple[str, int]:
    """Return the configuration of the page for this machine, and its port of TLS."""
    found = re.search(r"`/etc/turnserver\.conf` gets this.*?```\n(.*?)```", HOSTING, re.DOTALL)
    assert found
    tls_port = free_port()
    changes = {
        "static-auth-secret=CHANGE-ME": f"static-auth-secret={SECRET}",
        "tls-listening-port=5349": f"tls-listening-port={tls_port}",
        "listening-port=3478\n": "",
        "/etc/turnserver/": f"{folder}/",
    }
    config = found[1]
    for line, ours in changes.items():
        assert line in config
        config = config.replace(line, ours)
    return config, tls_port


def make_certificate(folder: Path) -> None:
    """Make the files that the configuration names, for the server's name."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=turn.example.com", "-addext",
         f"subjectAltName=IP:{HOST}", "-keyout", "privkey.pem", "-out", "fullchain.pem"],
        cwd=folder, check=True, capture_output=True, timeout=DEADLINE_S)


class Allocation(asyncio.DatagramProtocol):
    """What a server has allocated, until it is released."""

    def __init__(self) -> None:
        self._released = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        """Note how to release it."""
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that it is released."""
        self._released.set()

    async def release(self) -> None:
        """Give it back."""
        self.transport.close()
        await self._released.wait()


class Client:
    """Allocate at a TURN server as whoever a relay has lent it to."""

    def __init__(self, lent: dict[str, Any], port: int, tls: ssl.SSLContext | None = None) -> None:
        self.lent = lent
        self.port = port
        self.tls = tls

    async def allocate(self) -> Allocation:
        """Return an allocation; raise stun.TransactionFailed."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(stun.TransactionTimeout):
                return await self._allocate_once()
        return await self._allocate_once()

    async def _allocate_once(self) -> Allocation:
        transport = "udp"
        if self.tls:
            transport = "tcp"
        _, allocation = await turn.create_turn_endpoint(
            Allocation, (HOST, self.port), self.lent["username"], self.lent["credential"],
            ssl=self.tls, transport=transport)
        return allocation

    async def reach(self, peers: tuple[str, ...]) -> list[int]:
        """Return what the server says to channels to peers: 0, or the code of its error."""
        allocation = await self.allocate()
        client = allocation.transport._TurnTransport__inner_protocol
        codes = []
        for number, peer in enumerate(peers, FIRST_CHANNEL):
            codes.append(await code_of(client.channel_bind(number, (peer, 9))))
        await allocation.release()
        return codes

    async def refused(self) -> int:
        """Return the error of an allocation, 0 if there is none."""
        return await code_of(self._try())

    async def _try(self) -> None:
        allocation = await self.allocate()
        await allocation.release()


async def code_of(transaction: Coroutine[Any, Any, None]) -> int:
    """Return the code of a transaction that fails, else 0."""
    try:
        await transaction
    except stun.TransactionFailed as error:
        code = error.response.error_code
        assert code
        return code
    return 0


def lend(make: Make, owner: Owner, secret: str = SECRET) -> dict[str, Any]:
    """Return what a relay lends to an owner."""
    relay = make()
    relay.turn = Turn([URL], secret.encode())
    asked = relay.handle(check(owner, prove=True), HOME).body
    answer = owner.open(asked["question"])
    lent = relay.handle(receive(owner, answer, turn=True), HOME).body["turn"]
    assert isinstance(lent, dict)
    return lent


def test_coturn_of_the_recipe_takes_what_a_relay_lends_and_reaches_no_private_network(
    make: Make, alice: Owner, tmp_path: Path
) -> None:
    make_certificate(tmp_path)
    config, tls_port = recipe(tmp_path)
    tls = ssl.create_default_context(cafile=str(tmp_path / "fullchain.pem"))
    with turn_server(config, for_loopback=False) as port:
        lent = lend(make, alice)
        client = Client(lent, port)
        assert asyncio.run(client.reach(PRIVATE)) == [403] * len(PRIVATE)
        assert asyncio.run(client.reach(PUBLIC)) == [0] * len(PUBLIC)
        assert asyncio.run(Client(lent, tls_port, tls).refused()) == 0


def test_coturn_of_the_recipe_takes_nothing_else_and_bounds_what_a_name_uses(
    make: Make, alice: Owner, bob: Owner, tmp_path: Path
) -> None:
    make_certificate(tmp_path)
    config, _ = recipe(tmp_path)
    with turn_server(config, for_loopback=False) as port:
        asyncio.run(try_names(
            Client(lend(make, alice), port), Client(lend(make, bob), port),
            forged=Client(lend(make, alice, "x" * 32), port)))


async def try_names(client: Client, other: Client, *, forged: Client) -> None:
    """Allocate by names that are wrong, and by one until it is used up."""
    assert await forged.refused() == 401
    longer = client.lent | {"username": "2" + client.lent["username"][1:]}
    assert await Client(longer, client.port).refused() == 401
    ended = Turn([URL], SECRET.encode()).credentials("alice", 0, 3_600)
    assert await Client(ended, client.port).refused() == 401
    held = [await client.allocate() for _ in range(QUOTA)]
    assert [await client.refused(), await other.refused()] == [486, 0]
    for allocation in held:
        await allocation.release()
