"""TURN: what a relay lends to those who own a mailbox there, for connections without a direct path.

Credentials are asked for just before a connection is made, for one contact at a time. They stay in
memory, and are used until their time is over. PROTOCOL.md, "TURN".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from connectoid.clock import boot_time_s
from connectoid.contact import Poll
from connectoid.errors import Refused
from connectoid.limits import MAX_TURN_CHARS, MAX_TURN_TTL_S, MAX_TURN_URLS
from connectoid.networks import is_private_host
from connectoid.relay_client import RelayClient, RelayError, ask_for_turn
from connectoid.suite import Suite
from connectoid.urls import origin_of

_URL = re.compile(r"turns?:(?P<server>[^/?#]+)(?:\?transport=(?:udp|tcp))?")
_WORD = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class TurnServer:
    """TURN servers by their URLs, with what they want to see for so many seconds."""

    urls: tuple[str, ...]
    username: str = field(repr=False)
    credential: str = field(repr=False)
    ttl_s: int

    def as_ice_server(self) -> dict[str, Any]:
        """Return the arguments of an RTCIceServer."""
        return {
            "urls": list(self.urls), "username": self.username, "credential": self.credential}


def lends_turn(document: Mapping[str, Any]) -> bool:
    """Return whether a relay lends TURN servers, by what it says of itself."""
    return document.get("turn") is True


def read_turn(turn: object, url: str) -> TurnServer:
    """Return the TURN servers that the relay with a URL lends; raise RelayError for another form.

    Those of one's own machine or network are for a relay that is there too.
    """
    may_be_private = is_private_host(origin_of(url).host)
    match turn:
        case {
            "urls": list(urls), "username": str(username), "credential": str(credential),
            "ttl": int(ttl_s),
        } if not isinstance(ttl_s, bool) and ttl_s >= 1:
            _check_urls(urls, may_be_private=may_be_private)
            _check_word(username)
            _check_word(credential)
            return TurnServer(tuple(urls), username, credential, min(ttl_s, MAX_TURN_TTL_S))
    raise _wrong("a member is missing, or of another form")


def _check_urls(urls: list[object], *, may_be_private: bool) -> None:
    if not 1 <= len(urls) <= MAX_TURN_URLS:
        raise _wrong(f"there are 1 to {MAX_TURN_URLS} URLs")
    for url in urls:
        match = None
        if isinstance(url, str):
            match = _URL.fullmatch(url)
        if match is None:
            raise _wrong("a URL looks like turn:turn.example.com:3478")
        try:
            host = origin_of(f"https://{match['server']}").host
        except Refused:
            raise _wrong("a host is none that all programs read alike") from None
        if is_private_host(host) and not may_be_private:
            raise _wrong("a server is on this machine or in a private network")


def _check_word(text: str) -> None:
    if len(text) > MAX_TURN_CHARS or not _WORD.fullmatch(text):
        raise _wrong(f"a user name or password is of 1 to {MAX_TURN_CHARS} characters of ASCII")


def _wrong(why: str) -> RelayError:
    return RelayError(f"A relay lends TURN servers that are left out: {why}.")


class Loan(NamedTuple):
    """TURN servers that a relay has lent, until then by the clock of whoever has borrowed them."""

    server: TurnServer
    until_s: float


class Loans:
    """Know what one relay has lent, by the mailboxes that proved it.

    Each is of one contact. So no two share a name, and a TURN server cannot tell that they are of
    one user.
    """

    def __init__(
        self, client: RelayClient, suite: Suite, now_s: Callable[[], float] = boot_time_s,
    ) -> None:
        self._client = client
        self._suite = suite
        self._now_s = now_s
        self._loans: dict[str, Loan] = {}

    def of(self, poll: Poll) -> TurnServer | None:
        """Return what is lent to a mailbox, None if there is nothing, or its time is over."""
        loan = self._loans.get(poll.mailbox.pub)
        if loan is None or loan.until_s <= self._now_s():
            return None
        return loan.server

    async def renew(self, poll: Poll) -> None:
        """Ask for what a mailbox may have, unless half of the time is left of what it has.

        The relay may lend nothing. Raises RelayError.
        """
        asked_s = self._now_s()
        self._loans = {pub: loan for pub, loan in self._loans.items() if loan.until_s > asked_s}
        loan = self._loans.get(poll.mailbox.pub)
        if loan is not None and asked_s < loan.until_s - loan.server.ttl_s / 2:
            return
        lent = await ask_for_turn(self._suite, self._client, poll)
        if lent is not None:
            server = read_turn(lent, self._client.url)
            self._loans[poll.mailbox.pub] = Loan(server, asked_s + server.ttl_s)
