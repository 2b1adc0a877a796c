"""The table of networks: how each is made, and whether two people in it can connect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from lab import (
    GUARD,
    RELAY_IPV4,
    RELAY_IPV6,
    RELAY_NAME,
    SYMMETRIC,
    TURN_PORT,
    UP,
    Home,
    Lab,
    Namespace,
)

# Who may use a TURN server that users name.
FOR_USER = ("--lt-cred-mech", "--user=user:password")

# Where Alice and Bob are.
Places: TypeAlias = tuple[Namespace, Namespace]


class Network(NamedTuple):
    """A network: its name, how it is made, and what the people in it say to their commands."""

    name: str
    make: Callable[[Lab], Places]
    connects: bool = True
    relay: str = RELAY_IPV4
    # What both have in $CONNECTOID_ICE_SERVERS.
    ice_servers: str = ""
    needs_coturn: bool = False
    # Whether files may get stuck where words do not.
    is_narrow: bool = False


def both_public(lab: Lab) -> Places:
    """Two hosts without anything in between."""
    return lab.place(), lab.place()


def one_behind_nat(lab: Lab) -> Places:
    """Alice at the internet, Bob at home."""
    return lab.place(), lab.home().host()


def same_home(lab: Lab) -> Places:
    """Both at home, where the router carries nothing back in that has just gone out."""
    home = lab.home()
    return home.host(), home.host()


def two_homes(lab: Lab) -> Places:
    """Each behind a router that lets in what was asked for."""
    return lab.home().host(), lab.home().host()


def double_nat(lab: Lab) -> Places:
    """Alice behind a router of her own and one of her provider."""
    return lab.home(behind=lab.home()).host(), lab.home().host()


def symmetric_and_cone(lab: Lab) -> Places:
    """Alice has a port for each destination, Bob's router admits none but the one it knows."""
    return lab.home(SYMMETRIC).host(), lab.home().host()


def both_symmetric(lab: Lab) -> Places:
    """Both have a port for each destination."""
    return lab.home(SYMMETRIC).host(), lab.home(SYMMETRIC).host()


def ipv6_only(lab: Lab) -> Places:
    """No IPv4 anywhere, and routers that let in what was asked for."""
    alice = lab.place(ipv4=False, ipv6=True)
    bob = lab.place(ipv4=False, ipv6=True)
    for place in (alice, bob):
        place.nft(f"table inet guard {{ {GUARD} }}")
    return alice, bob


def broken_ipv6(lab: Lab) -> Places:
    """Both homes have IPv6 by all appearances, and their routers drop it."""
    hosts = []
    for _ in range(2):
        home = lab.home(ipv6=True)
        home.router.nft("table ip6 broken { chain forward {"
                        " type filter hook forward priority -1; drop; }; }")
        hosts.append(home.host(ipv6=True))
    return hosts[0], hosts[1]


def dead_bridge(lab: Lab) -> Places:
    """Two homes; both machines have the bridge of a Docker without containers."""
    places = two_homes(lab)
    for place in places:
        place.ip("link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0",
                 "link set docker0 up")
    return places


def split_vpn(lab: Lab) -> Places:
    """Two homes; Alice has a tunnel, which swallows what is sent from its address."""
    alice, bob = two_homes(lab)
    lab.hold(alice, "tun0")
    alice.ip("address add 10.8.0.2/24 dev tun0", "link set tun0 up",
             "route add default dev tun0 table 100", "rule add from 10.8.0.2 lookup 100")
    return alice, bob


def strict_home(lab: Lab) -> Namespace:
    """Return a host whose firewall lets no UDP out."""
    home = lab.home()
    home.router.nft("table ip strict { chain forward {"
                    " type filter hook forward priority -1; meta l4proto udp drop; }; }")
    return home.host()


def no_udp(lab: Lab) -> Places:
    """Alice's firewall lets no UDP out, and both know a TURN server."""
    lab.turn(*FOR_USER)
    return strict_home(lab), lab.home().host()


def no_udp_and_a_lender(lab: Lab) -> Places:
    """No firewall lets UDP out, and nobody knows more than a relay, which lends a TURN server."""
    lab.lend()
    return strict_home(lab), strict_home(lab)


def small_mtu(lab: Lab) -> Places:
    """Two homes; on Alice's way packets have at most 1,280 bytes, and only TCP is told so."""
    home = lab.home()
    narrow(home)
    return home.host(), lab.home().host()


def narrow(home: Home) -> None:
    """Let a router drop packets of more than 1,280 bytes without a word."""
    home.router.ip(f"link set {UP} mtu 1280")
    home.router.nft("table ip silent { chain output { type filter hook output priority 0;"
                    " icmp type destination-unreachable drop; };"
                    " chain forward { type filter hook forward priority 0;"
                    " tcp flags syn tcp option maxseg size set rt mtu; }; }")


def small_mtu_with_turn(lab: Lab) -> Places:
    """Packets of 1,280 bytes have those of a TURN server in them."""
    lab.turn(*FOR_USER)
    home = lab.home(SYMMETRIC)
    narrow(home)
    return home.host(), lab.home(SYMMETRIC).host()


def both_symmetric_with_turn(lab: Lab) -> Places:
    """Both have a port for each destination, and know a TURN server."""
    lab.turn(*FOR_USER)
    return both_symmetric(lab)


def both_symmetric_and_a_lender(lab: Lab) -> Places:
    """Both have a port for each destination, and a relay that lends a TURN server."""
    lab.lend()
    return both_symmetric(lab)


def turn_over(transport: str) -> str:
    """Return the TURN server of a lab as users give it to the command line."""
    url = f"turn:{RELAY_IPV4}:{TURN_PORT}?transport={transport}"
    return json.dumps([{"urls": [url], "username": "user", "credential": "password"}])


NETWORKS = (
    Network("both public", both_public),
    Network("one behind NAT", one_behind_nat),
    Network("same home, no hairpin", same_home),
    Network("two homes", two_homes),
    Network("double NAT", double_nat),
    Network("IPv6 only", ipv6_only, relay=f"[{RELAY_IPV6}]"),
    Network("broken IPv6 at both", broken_ipv6, relay=RELAY_NAME),
    Network("a bridge without members", dead_bridge),
    Network("a split VPN", split_vpn),
    Network("MTU 1280 and a black hole", small_mtu, is_narrow=True),
    Network("MTU 1280, a black hole, TURN", small_mtu_with_turn, ice_servers=turn_over("udp"),
            needs_coturn=True, is_narrow=True),
    Network("no UDP, TURN over TCP", no_udp, ice_servers=turn_over("tcp"), needs_coturn=True),
    Network("no UDP at both, a relay that lends TURN", no_udp_and_a_lender, needs_coturn=True),
    Network("both symmetric, TURN", both_symmetric_with_turn, ice_servers=turn_over("udp"),
            needs_coturn=True),
    Network("both symmetric, a relay that lends TURN", both_symmetric_and_a_lender,
            needs_coturn=True),
    Network("symmetric and cone", symmetric_and_cone, connects=False),
    Network("symmetric and symmetric", both_symmetric, connects=False),
)
