"""Servers that hang, answer rubbish or lie: what each costs two people with the command line.

What it took is printed. Each kind of server has a couple of its own, and they try side by side.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from bad_servers import KINDS
from lab import RELAY_IPV4, RELAY_PORT, Lab, lacking, open_lab
from people import Command, Person

pytestmark = pytest.mark.slow

FIRST_PORT = 9_001
# For a request that nobody answers, and a little more.
PROXY_WAIT_S = "15"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Lend a lab, or skip the test."""
    if lacking():
        pytest.skip(lacking())
    with open_lab(tmp_path) as lab:
        yield lab


def start_all(lab: Lab) -> dict[str, int]:
    """Start a server of each kind at the internet; return their ports."""
    ports = dict(zip(KINDS, itertools.count(FIRST_PORT), strict=False))
    for kind, port in ports.items():
        lab.bad_server(kind, lab.servers, port, RELAY_IPV4)
    return ports


class Couple(NamedTuple):
    """Two people, and what they are told of servers: in $CONNECTOID_ICE_SERVERS, and as relays."""

    ice_servers: str
    relays: str
    # What a warning names, if there is one.
    told: str


def turn_at(ports: Iterable[int], *transports: str) -> dict[str, object]:
    """Return TURN servers as users give them to the command line."""
    urls = [f"turn:{RELAY_IPV4}:{port}?transport={transport}"
            for port in ports for transport in transports]
    return {"urls": urls, "username": "user", "credential": "password"}


def couples_at(ports: Mapping[str, int]) -> dict[str, Couple]:
    """Return a couple for each place where bad servers may be. The first relay is a good one."""
    good = f"http://{RELAY_IPV4}:{RELAY_PORT}/"
    stun = [f"stun:{RELAY_IPV4}:{port}" for port in ports.values()]
    others = [f"http://{RELAY_IPV4}:{ports[kind]}/" for kind in ("silent", "rubbish")]
    # Whoever believes it has a TURN server, and misses no other.
    liar = turn_at([ports["liar"]], "udp", "tcp")
    useless = [port for kind, port in ports.items() if kind != "liar"]
    return {
        "STUN, and TURN that lies": Couple(json.dumps([*stun, liar]), good, ""),
        "TURN over UDP": Couple(json.dumps([turn_at(useless, "udp")]), good, "turn:"),
        "TURN over TCP": Couple(json.dumps([turn_at(useless, "tcp")]), good, "turn:"),
        "relays": Couple("", " ".join([good, *others]), others[1]),
    }


def test_bad_servers_cost_a_warning_and_no_connection(lab: Lab) -> None:
    """All kinds of them at once, beside a good relay."""
    couples = couples_at(start_all(lab))
    under_way: dict[str, tuple[Person, Command, Command]] = {}
    for room, couple in couples.items():
        alice, bob = (
            Person(lab, name, lab.home().host(), room=room, ice_servers=couple.ice_servers,
                   environment=[f"CONNECTOID_RELAY={couple.relays}"])
            for name in ("Alice", "Bob"))
        shares = alice.start("share", "Bob")
        link = shares.wait_for("link").told["link"]
        under_way[room] = (alice, shares, bob.start("open", link, "--name", "Alice", "--yes"))
    for room, (alice, shares, opens) in under_way.items():
        began_s = opens.wait_for("waiting").at_s
        took_s = max(one.wait_for("connected").at_s for one in (shares, opens)) - began_s
        print(f"{room}: connected after {took_s:.1f} s; Alice heard: {alice.said}")
        assert couples[room].told in alice.said


def test_bad_proxies_are_told_in_time(lab: Lab) -> None:
    """Nothing goes past them, so nobody connects."""
    waiting = {}
    for kind, port in start_all(lab).items():
        proxy = f"http_proxy=http://{RELAY_IPV4}:{port}/"
        alice = Person(lab, "Alice", lab.place(), room=kind, environment=[proxy])
        waiting[kind] = alice.start("share", "Bob", "--timeout", PROXY_WAIT_S)
    for kind, shares in waiting.items():
        error = shares.wait_for("error").told["error"]
        print(f"{kind}: {error}")
        assert f"http://{RELAY_IPV4}:{RELAY_PORT}/ " in error
