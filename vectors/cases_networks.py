"""Cases of addresses: which are of one's own machine and networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vector_keys import Json

# The first and the last address of each network, and those beside it.
PRIVATE: Mapping[str, tuple[str, ...]] = {
    "this host": ("0.0.0.1", "0.255.255.255"),
    "private, 8 bits": ("10.0.0.0", "10.255.255.255"),
    "within a provider": ("100.64.0.0", "100.127.255.255"),
    "loopback": ("127.0.0.0", "127.0.0.1", "127.255.255.255"),
    "link-local": ("169.254.0.0", "169.254.169.254", "169.254.255.255"),
    "private, 12 bits": ("172.16.0.0", "172.31.255.255"),
    "for protocols": ("192.0.0.0", "192.0.0.255"),
    "private, 16 bits": ("192.168.0.0", "192.168.255.255"),
    "for measurements": ("198.18.0.0", "198.19.255.255"),
    "multicast": ("224.0.0.0", "239.255.255.255"),
    "reserved and broadcast": ("240.0.0.0", "255.255.255.255"),
    "IPv6: unspecified": ("[::]", "[0:0:0:0:0:0:0:0]"),
    "IPv6: loopback": ("[::1]", "[0::0:1]"),
    "IPv6: IPv4 of old": ("[::192.0.2.1]", "[::127.0.0.1]"),
    "IPv6: below the global ones": ("[1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]",),
    "IPv6: above the global ones": ("[4000::]",),
    "IPv6: unique local": ("[fc00::]", "[fd12:3456:789a::1]", "[fdff::ffff]"),
    "IPv6: link-local": ("[fe80::1]", "[febf::1]"),
    "IPv6: site-local": ("[fec0::1]", "[feff::1]"),
    "IPv6: multicast": ("[ff02::1]", "[ff0e::1]", "[ffff::1]"),
    "IPv6: Teredo": ("[2001::1]", "[2001:0:ffff:ffff:ffff:ffff:ffff:ffff]"),
    "IPv6: discarded": ("[100::1]",),
    "IPv6: NAT64 of one's own": ("[64:ff9b:1::1]", "[64:ff9b:1:ffff:ffff:ffff:192.0.2.1]"),
    "IPv6: NAT64, a bit beside it": ("[64:ff9b:0:0:0:1:192.0.2.1]",),
    "IPv6: mapped": ("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::FFFF:192.168.0.1]"),
    "IPv6: mapped, a bit beside it": ("[::1:ffff:192.0.2.1]", "[::fffe:192.0.2.1]"),
    "IPv6: NAT64": ("[64:ff9b::10.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[0064:FF9B::127.0.0.1]"),
    "IPv6: 6to4": ("[2002:7f00:1::]", "[2002:c0a8:101::1]", "[2002:a00::1]"),
    "a name": ("localhost", "a.localhost", "relay.a.localhost"),
}

PUBLIC: Mapping[str, tuple[str, ...]] = {
    "IPv4": ("1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0"),
    "IPv4, beside loopback": ("126.255.255.255", "128.0.0.0"),
    "IPv4, beside link-local": ("169.253.255.255", "169.255.0.0"),
    "IPv4, beside private": ("172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0"),
    "IPv4, beside what protocols have": ("191.255.255.255", "192.0.1.0"),
    "IPv4, beside measurements": ("198.17.255.255", "198.20.0.0"),
    "IPv4, the last": ("223.255.255.255",),
    "IPv6": ("[2000::]", "[2001:1::]", "[2001:db8::1]", "[2003::1]"),
    "IPv6, the last": ("[3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]",),
    "IPv6: mapped": ("[::ffff:192.0.2.1]", "[::ffff:c000:201]"),
    "IPv6: NAT64": ("[64:ff9b::192.0.2.1]",),
    "IPv6: 6to4": ("[2002:c000:201::1]", "[2002:c000:201:c0a8:101::]"),
    "a name": ("relay.example.com", "localhost.example.com", "notlocalhost", "relay"),
}


def network_cases() -> Iterator[Json]:
    """Yield hosts of URLs, in small letters, and whether they are private by themselves."""
    for is_private, kinds in ((True, PRIVATE), (False, PUBLIC)):
        word = "private" if is_private else "public"
        for kind, hosts in kinds.items():
            for host in hosts:
                yield {
                    "name": f"{word}: {kind}: {host}", "host": host.lower(), "private": is_private,
                }
