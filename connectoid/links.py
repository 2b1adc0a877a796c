"""Mailboxes, addresses, invitations, links.

An address is always the very string that was given out. PROTOCOL.md, "Addresses and links".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from connectoid.encoding import PUB_FORM, decode_base64url, decode_text, encode_base64url
from connectoid.errors import LinkError, Refused, UnsupportedVersionError
from connectoid.limits import (
    APP_HASH_BYTES,
    MAX_ADDRESS_CHARS,
    MAX_EXT_CHARS,
    MAX_MAILBOXES,
    SECRET_BYTES,
)
from connectoid.urls import check_url
from connectoid.versions import LATER

# A link without an app: the invitation alone.
_BARE = re.compile(r"[A-Za-z0-9._~-]+")
_PARAMETER = "connectoid"

# What a messenger or a user may leave around a link.
_BLANKS = " \t\r\n\u00a0"
# A percent escape of ASCII. There is nothing else in an invitation: it is refused for what stays.
_ESCAPE = re.compile(r"%([0-7][0-9A-Fa-f])")

# `pub.url.ext.fourth`; before the fourth part there may be an empty `ext`.
_PARTS = 4
HASH_BYTES = hashlib.sha256().digest_size
# S and h, and perhaps the hash of the app.
_FOURTH_BYTES = (SECRET_BYTES + HASH_BYTES, SECRET_BYTES + HASH_BYTES + APP_HASH_BYTES)


class Mailbox(NamedTuple):
    """A public key at a relay, and the `ext` that the relay asks for."""

    pub: str
    url: str
    ext: str | None = None

    def __str__(self) -> str:
        parts = [self.pub, encode_base64url(self.url.encode())]
        if self.ext is not None:
            parts.append(encode_base64url(self.ext.encode()))
        return ".".join(parts)


# -- Addresses ---------------------------------------------------------------------------


def format_address(mailboxes: Iterable[Mailbox]) -> str:
    """Return the address of one to three mailboxes as text."""
    return "~".join(map(str, mailboxes))


def parse_address(address: str, *, allow_http: bool = False) -> tuple[Mailbox, ...]:
    """Return the mailboxes of an address; raise Refused (address).

    That includes an address that a client must not write to. Suite.check has to check whether
    the keys are points of the curve.
    """
    if len(address) > MAX_ADDRESS_CHARS:
        raise Refused("address", f"it has more than {MAX_ADDRESS_CHARS} characters")
    texts = address.split("~")
    if len(texts) > MAX_MAILBOXES:
        raise Refused("address", f"it has more than {MAX_MAILBOXES} mailboxes")
    mailboxes = tuple(_parse_mailbox(text, allow_http) for text in texts)
    if len({mailbox.pub for mailbox in mailboxes}) < len(mailboxes):
        raise Refused("address", "a key occurs twice in it")
    return mailboxes


def _parse_mailbox(text: str, allow_http: bool) -> Mailbox:
    match text.split("."):
        case [pub, url] if url:
            ext = None
        case [pub, url, ext] if ext:
            pass
        case _:
            raise Refused("address", "it is cut off, or has a part too many")
    if not PUB_FORM.fullmatch(pub):
        raise Refused("address", "its key is damaged")
    url = _decode_part(url)
    if ext is not None:
        ext = _decode_part(ext)
    check_url(url, allow_http=allow_http)
    if ext is not None and len(ext) > MAX_EXT_CHARS:
        raise Refused("address", f"its ext is longer than {MAX_EXT_CHARS} characters")
    return Mailbox(pub, url, ext)


def _decode_part(text: str) -> str:
    try:
        return decode_text(text)
    except Refused:
        raise Refused("address", "a part of it is not readable") from None


# -- Invitations -------------------------------------------------------------------------


@dataclass(frozen=True)
class Invitation:
    """The content of a link: the inviter's address, the secret S, h, and perhaps of which app."""

    text: str = field(repr=False)
    address: str
    secret: bytes = field(repr=False)
    commitment: bytes
    app_hash: bytes = b""


def format_invitation(
    address: str, secret: bytes, commitment: bytes, app_hash: bytes = b""
) -> str:
    """Return an invitation: an address whose last mailbox has a fourth part.

    That is S, h, and the hash of the app if it has an identifier.
    """
    fourth = encode_base64url(secret + commitment + app_hash)
    last = parse_address(address, allow_http=True)[-1]
    if last.ext is None:
        # Its place stays empty.
        return f"{address}..{fourth}"
    return f"{address}.{fourth}"


def parse_invitation(text: str, *, allow_http: bool = False) -> Invitation:
    """Return the content of an invitation; raise LinkError with a sentence for the user.

    That is UnsupportedVersionError for one of a later version.
    """
    if LATER.match(text):
        raise UnsupportedVersionError(
            "This link needs a newer version of this app. Update the app, and open the link again."
        )
    address, fourth = _split_invitation(text)
    try:
        parse_address(address, allow_http=allow_http)
    except Refused as error:
        raise LinkError(
            f"This link is damaged: {error}. Copy it again, whole, or ask for a new one."
        ) from None
    if not fourth:
        raise LinkError("This link has no secret; ask for a new one.")
    try:
        octets = decode_base64url(fourth)
    except Refused:
        octets = b""
    if len(octets) not in _FOURTH_BYTES:
        raise LinkError("This link is cut off or damaged. Copy it again, whole.")
    hash_at, app_at = SECRET_BYTES, SECRET_BYTES + HASH_BYTES
    return Invitation(text, address, octets[:hash_at], octets[hash_at:app_at], octets[app_at:])


def _split_invitation(text: str) -> tuple[str, str]:
    """Return the address in an invitation, and its fourth part or nothing."""
    before, tilde, last = text.rpartition("~")
    parts = last.split(".", _PARTS - 1)
    parts += [""] * (_PARTS - len(parts))
    pub, url, ext, fourth = parts
    mailbox = f"{pub}.{url}"
    if ext:
        mailbox = f"{mailbox}.{ext}"
    return f"{before}{tilde}{mailbox}", fourth


# -- Links -------------------------------------------------------------------------------


def make_link(app_url: str, invitation: str) -> str:
    """Return a link to an app. The invitation is in the fragment, which no server sees."""
    return f"{app_url.partition('#')[0]}#{_PARAMETER}={invitation}"


def read_link(link: str, *, allow_http: bool = False) -> Invitation:
    """Return the invitation in a link, in its fragment or its query, or bare; raise LinkError."""
    before, _, fragment = link.strip(_BLANKS).partition("#")
    query = before.partition("?")[2]
    for part in (fragment, query):
        value = _find_parameter(part)
        if value is not None:
            return parse_invitation(value, allow_http=allow_http)
    if fragment or not _is_bare(before):
        raise LinkError("This is not an invitation link. Copy the whole link again.")
    return parse_invitation(before, allow_http=allow_http)


def _find_parameter(text: str) -> str | None:
    """Return the invitation among the parameters of a fragment or a query."""
    for parameter in text.split("&"):
        name, equals, value = parameter.partition("=")
        if equals and name == _PARAMETER:
            return _ESCAPE.sub(_unquote, value)
    return None


def _unquote(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16))


def _is_bare(text: str) -> bool:
    """Return whether a text has the form of an invitation without an app's URL."""
    if not _BARE.fullmatch(text):
        return False
    return bool(LATER.match(text)) or ("." in text and bool(PUB_FORM.match(text)))
