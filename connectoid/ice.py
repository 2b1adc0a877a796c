"""ICE: the servers that WebRTC may ask for the sake of a contact.

A STUN server learns when somebody connects, and says under which address others see them. A TURN
server carries the connection. So the relays are asked where this side has its own mailboxes for
this very contact, and no others. PROTOCOL.md, CONNECT-14.
"""

from __future__ import annotations

import json
import os
import re
import stat
import urllib.parse
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from connectoid.contact import ContactRecord
from connectoid.encoding import load_json
from connectoid.errors import UsageError
from connectoid.turn import TurnServer

PORTS = {"https": 443, "http": 80}
TURN_SCHEMES = ("turn:", "turns:")


class Ice(NamedTuple):
    """What a peer connection is made with.

    With `relay_only` it may use TURN servers and nothing else, so nobody sees one's own address.
    """

    servers: Sequence[Any] = ()
    relay_only: bool = False

    def __repr__(self) -> str:
        """Return how many servers there are: they have passwords, which no log shows."""
        return f"Ice({len(self.servers)} servers, relay_only={self.relay_only})"


def has_stun(document: Mapping[str, Any]) -> bool:
    """Return whether a relay has a STUN server, by what it says of itself."""
    return document.get("stun") is True


def ice_servers(
    record: ContactRecord, with_stun: Collection[str], lent: Mapping[str, TurnServer],
    more: Iterable[Any],
) -> list[Any]:
    """Return the servers for a contact: the STUN of one's own relays, the app's, the relays' TURN.

    `with_stun` are the URLs of all relays that are known to have a STUN server, and `lent` what
    relays have lent for this contact. The app's come first.
    """
    urls = dict.fromkeys(url for url, _ in record.relays)
    stun = [_stun_url(url) for url in urls if url in with_stun]
    turn = [lent[url].as_ice_server() for url in urls if url in lent]
    return [*stun, *more, *turn]


def has_turn(servers: Iterable[Any]) -> bool:
    """Return whether there is a TURN server among ICE servers: URLs, or mappings with `urls`."""
    return any(url.startswith(TURN_SCHEMES) for one in servers for url in _urls_of(one))


def _urls_of(server: Any) -> Sequence[str]:
    if isinstance(server, Mapping):
        server = server.get("urls", ())
    if isinstance(server, str):
        return (server,)
    if isinstance(server, list | tuple):
        return tuple(server)
    return ()


def _stun_url(url: str) -> str:
    """Return the URL of the STUN server of a relay."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc
    port = PORTS[parts.scheme]
    if parts.port:
        host = host.rpartition(":")[0]
        port = parts.port
    return f"stun:{host}:{port}"


# ---------------------------------------------------------------------------------------
# Servers that a user names. They are looked at when they are given: later nobody would know
# why no connection comes about. No error shows a password.
# ---------------------------------------------------------------------------------------

# RFC 7064 and RFC 7065.
_URL = re.compile(r"(?:stuns?|turns?):(?P<place>[^/?#\s]+)(?:\?transport=(?:udp|tcp))?", re.ASCII)
_MEMBERS = ("urls", "username", "credential", "credentialType")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def load_ice_servers(path: str | Path) -> list[Any]:
    """Return the ICE servers in a JSON file that nobody else can read; raise UsageError."""
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS:
                raise UsageError(f"{path}: others can read it; chmod 600 it.")
            return parse_ice_servers(file.read(), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: it is not text in UTF-8.") from None


def parse_ice_servers(text: str, source: str) -> list[Any]:
    """Return the ICE servers in JSON; raise UsageError, which names the source."""
    try:
        servers = load_json(text)
    except ValueError as error:
        place = ""
        if isinstance(error, json.JSONDecodeError):
            place = f", line {error.lineno}, column {error.colno}"
        raise UsageError(f"{source}{place}: it is not JSON.") from None
    try:
        return check_ice_servers(servers)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def check_ice_servers(servers: object) -> list[Any]:
    """Return ICE servers as they are: URLs, or mappings with the members of RTCIceServer.

    Raises UsageError, which says what is wrong with which.
    """
    if not isinstance(servers, list | tuple):
        raise UsageError("ICE servers are a list.")
    for number, server in enumerate(servers, 1):
        _check_server(server, f"ICE server {number}")
    return list(servers)


def _check_server(server: object, which: str) -> None:
    if isinstance(server, str):
        server = {"urls": server}
    if not isinstance(server, Mapping):
        raise UsageError(f"{which} is a URL, or an object with urls, username and credential.")
    for member in server:
        if member not in _MEMBERS:
            raise UsageError(f"{which} has a member that is none of {', '.join(_MEMBERS)}.")
    urls = _urls_of(server)
    if not urls:
        raise UsageError(f"{which} has no urls: a URL, or a list of them.")
    for url in urls:
        _check_ice_url(url, which)
    for member in ("username", "credential"):
        value = server.get(member)
        if value is None and has_turn(urls):
            raise UsageError(f"{which}: a TURN server needs a {member}.")
        if value is not None and not (isinstance(value, str) and value):
            raise UsageError(f"{which}: its {member} is a text.")


def _check_ice_url(url: object, which: str) -> None:
    match = None
    if isinstance(url, str):
        match = _URL.fullmatch(url)
    if match is None or not _is_place(match["place"]):
        raise UsageError(
            f"{which}: a URL looks like stun:HOST:PORT, turn:HOST:PORT or"
            " turns:HOST:PORT?transport=tcp, without a user.")


def _is_place(place: str) -> bool:
    """Return whether it is a host, perhaps with a port. A user would be a secret in a URL."""
    try:
        parts = urllib.parse.urlsplit(f"//{place}")
        return bool(parts.hostname) and parts.port != 0 and "@" not in place
    except ValueError:
        return False
