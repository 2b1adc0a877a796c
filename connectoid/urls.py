"""URLs of relays: which of them are URLs at all, and for every parser the same.

They come from outside, and several parsers read them: this one, that of the HTTP client, and in
browsers a third one. So only what all of them read alike is let through. PROTOCOL.md, "Addresses
and links".
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple

from connectoid.errors import Refused
from connectoid.limits import MAX_HOST_CHARS, MAX_LABEL_CHARS, MAX_URL_CHARS

# No user, no query, no fragment.
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)*)"
)
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
# Where the last label is one of these, browsers take the whole host for a number.
_NUMBER = re.compile(r"[0-9]+|0[Xx][0-9A-Fa-f]*")
_LOOPBACK_NAME = "localhost"
# Names beyond ASCII. Which of them are good depends on a parser's version of Unicode.
_IDNA_PREFIX = "xn--"
# A parser takes a segment of dots away, with the one before it.
_DOTS = (".", "..")
MAX_PORT = 65_535
_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """The scheme of a URL, its host in small letters (an IPv6 address in brackets), its port."""

    scheme: str
    host: str
    port: int


def check_url(url: str, *, allow_http: bool = False) -> None:
    """Raise Refused (address) unless a client may send requests to this URL.

    It may with https; with http on this machine, or if the app allows it.
    """
    scheme, host, _ = origin_of(url)
    if scheme == "https" or allow_http or _is_loopback(host):
        return
    raise Refused("address", "http is for a relay on this machine, elsewhere it is https")


def origin_of(url: str) -> Origin:
    """Return the origin of a relay's URL; raise Refused (address) for another text."""
    match = None
    if len(url) <= MAX_URL_CHARS:
        match = _URL.fullmatch(url)
    if match is None or int(match["port"] or 1) > MAX_PORT:
        raise Refused("address", "a relay's URL looks like https://relay.example.com/")
    if not _is_host(match["host"]) or _has_dots(match["path"]):
        raise Refused("address", "the URL of its relay is none that all programs read alike")
    port = int(match["port"] or _PORTS[match["scheme"]])
    return Origin(match["scheme"], match["host"].lower(), port)


def is_same_server(url: str, others: Iterable[str]) -> bool:
    """Return whether a URL has the origin of one of the others."""
    origins = set()
    for other in others:
        with contextlib.suppress(Refused):
            origins.add(origin_of(other))
    return origin_of(url) in origins


def _is_host(host: str) -> bool:
    """Return whether a host is an address in its usual form, or a name in ASCII."""
    if host.startswith("["):
        return _is_ip(ipaddress.IPv6Address, host[1:-1])
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _is_ip(ipaddress.IPv4Address, host)
    return len(host) <= MAX_HOST_CHARS and all(map(_is_label, labels))


def _is_label(label: str) -> bool:
    if len(label) > MAX_LABEL_CHARS or not _LABEL.fullmatch(label):
        return False
    return not label.lower().startswith(_IDNA_PREFIX)


def _is_ip(kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _has_dots(path: str) -> bool:
    """Return whether a path has a segment that a parser would take away."""
    segments = re.sub("%2e", ".", path, flags=re.IGNORECASE).split("/")
    return any(segment in _DOTS for segment in segments)


def _is_loopback(host: str) -> bool:
    return host in (_LOOPBACK_NAME, "[::1]") or _is_ip_of_loopback(host)


def _is_ip_of_loopback(host: str) -> bool:
    return host.startswith("127.") and _is_ip(ipaddress.IPv4Address, host)
