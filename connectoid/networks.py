"""Addresses that everybody can reach, and those of one's own machine and networks.

Somebody who names a relay at 127.0.0.1 or 192.168.1.1 would have this client ask services that
only this machine or this network can reach. PROTOCOL.md, "Guards".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TypeAlias

IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Of IPv4, all but these is public.
NOT_PUBLIC: Mapping[str, str] = {
    "0.0.0.0/8": "this host (RFC 1122)",
    "10.0.0.0/8": "private (RFC 1918)",
    "100.64.0.0/10": "within a provider (RFC 6598)",
    "127.0.0.0/8": "loopback (RFC 1122)",
    "169.254.0.0/16": "link-local (RFC 3927)",
    "172.16.0.0/12": "private (RFC 1918)",
    "192.0.0.0/24": "for protocols (RFC 6890)",
    "192.168.0.0/16": "private (RFC 1918)",
    "198.18.0.0/15": "for measurements (RFC 2544)",
    "224.0.0.0/3": "multicast, reserved, and broadcast (RFC 1112)",
}
_NOT_PUBLIC = tuple(map(ipaddress.IPv4Network, NOT_PUBLIC))

# Of IPv6, only this is public, and what stands for an address of IPv4 that is.
_GLOBAL = ipaddress.IPv6Network("2000::/3")
# Teredo (RFC 4380) hides an address of IPv4, and nobody uses it any more.
_TEREDO = ipaddress.IPv6Network("2001::/32")
# 6to4 (RFC 3056): the address of IPv4 follows the first 16 bits.
_6TO4 = ipaddress.IPv6Network("2002::/16")
_6TO4_SHIFT = 80
# IPv4-mapped (RFC 4291), and NAT64 (RFC 6052): the address of IPv4 is the last 32 bits.
_EMBEDDING = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))
_IPV4_MASK = 0xFFFFFFFF

_LOCAL_NAME = "localhost"

# What a user can do about a relay there that somebody else has named. A program that has flags for
# it says which.
NAME_IT = "name it as one if you trust it"


def is_private_host(host: str) -> bool:
    """Return whether a host of an Origin is of one's own machine or network, by itself.

    It is so for `localhost` and for addresses. Other names have to be looked up.
    """
    if host == _LOCAL_NAME or host.endswith(f".{_LOCAL_NAME}"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return not is_public(address)


def is_public(address: IP) -> bool:
    """Return whether everybody can reach an address."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC)
    if address in _6TO4:
        return _is_public_ipv4(int(address) >> _6TO4_SHIFT)
    if any(address in network for network in _EMBEDDING):
        return _is_public_ipv4(int(address))
    return address in _GLOBAL and address not in _TEREDO


def _is_public_ipv4(number: int) -> bool:
    return is_public(ipaddress.IPv4Address(number & _IPV4_MASK))
