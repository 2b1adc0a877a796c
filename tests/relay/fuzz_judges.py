"""Judge requests: what ought to come, read from PROTOCOL.md a second time."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from connectoid_relay import ERRORS, Limits

# ---------------------------------------------------------------------------------------
# Judges: what ought to come, read from PROTOCOL.md a second time.
# ---------------------------------------------------------------------------------------

LIMITS = Limits(
    rate=10**9,
    max_sends=10**9,
    max_source_bytes=10**12,
    max_seals=10**9,
    max_udp=10**9,
    max_connections_per_source=0,
    max_header_bytes=4_096,
    max_body_bytes=40_000,
    request_timeout_s=60,
)
STATUS_OF = {
    error.text: {other.status for other in ERRORS if other.text == error.text} for error in ERRORS
}
BAD, OK = "Bad request", "ok"
# A relay may refuse what is nested deeper.
UNJUDGED_LEVELS = 100
MAX_AT = 10**4_300
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
BASE64URL = set(LETTERS + "-_")
TOKEN = set((LETTERS + "!#$%&'*+-.^_`|~").encode())


class NotJson(Exception):
    """Say that octets are no JSON of PROTOCOL.md, "Conventions"."""


def no_constant(name: str) -> None:
    """Refuse NaN and the infinities."""
    raise NotJson(name)


def strict_json(octets: bytes) -> object:
    """Return the value of octets; raise NotJson."""
    try:
        value: object = json.loads(octets.decode("utf-8"), parse_constant=no_constant)
        # Members that do not count are read too.
        everything = json.loads(octets, object_pairs_hook=list)
        json.dumps(everything, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None
    return value


def is_clean(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can hold."""
    return isinstance(value, str) and not any(
        0xD800 <= ord(character) < 0xE000 for character in value
    )


def is_integer(value: object, least: int = 0, most: int = MAX_AT) -> bool:
    """Return whether a value is an integer from least to most."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def unpacked(value: object) -> bytes | None:
    """Return what base64url without padding stands for, None if it is none."""
    if not isinstance(value, str) or not value or set(value) - BASE64URL or len(value) % 4 == 1:
        return None
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))


def is_pub(value: object) -> bool:
    """Return whether a value has the form of `pub`, canonical."""
    octets = unpacked(value)
    return (octets is not None and len(octets) == 49 and octets[0] in (2, 3)
            and base64.urlsafe_b64encode(octets).rstrip(b"=").decode() == value)


def is_on_curve(pub: str) -> bool:
    """Return whether a `pub` of the right form is a point."""
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), unpacked(pub) or b"")
    except ValueError:
        return False
    return True


def judge_send(request: dict[str, Any]) -> str:
    """Return what a send with a good `pub` and `ext` gets."""
    sealed = request.get("data")
    if isinstance(sealed, str) and len(sealed) > 32_768:
        return "Too big"
    if unpacked(sealed) and is_on_curve(request["pub"]):
        return OK
    return BAD


def judge_check(request: dict[str, Any]) -> str:
    """Return what a check with a good `pub` and `ext` gets."""
    if is_integer(request.get("at", 0)) and is_integer(request.get("wait", 0)):
        return OK
    return BAD


def judge_receive(request: dict[str, Any]) -> str:
    """Return what a receive with a good `pub` and `ext` gets: nobody here knows an answer."""
    fits = (is_clean(request.get("answer")) and is_integer(request.get("limit", 1), 1, 100)
            and is_integer(request.get("at", 0)))
    return "Wrong answer" if fits else BAD


JUDGES = {"send": judge_send, "check": judge_check, "receive": judge_receive}


def judge_one(request: object, actions: Sequence[str] = tuple(JUDGES)) -> str:
    """Return "ok" or the error that a request ought to get."""
    if (
        not isinstance(request, dict)
        or not isinstance(request.get("action"), str)
        or request["action"] not in actions
    ):
        return BAD
    ext = request.get("ext")
    if not is_pub(request.get("pub")) or not (ext is None or (is_clean(ext) and len(ext) <= 1_024)):
        return BAD
    return JUDGES[request["action"]](request)


def judge(request: object) -> str | list[str]:
    """Return what a request or a batch ought to get."""
    if isinstance(request, list) and 1 <= len(request) <= 256:
        return [judge_one(item, ["check"]) for item in request]
    return judge_one(request)


def is_deep(octets: bytes) -> bool:
    """Return whether a relay may refuse octets as nested too deep."""
    if octets.count(b"[") + octets.count(b"{") <= UNJUDGED_LEVELS:
        return False
    steps = ((octet in b"[{") - (octet in b"]}") for octet in octets)
    # Brackets in strings may count too.
    return max(itertools.accumulate(steps)) > UNJUDGED_LEVELS


def judge_body(octets: bytes) -> tuple[object, str | list[str]]:
    """Return the value of a body (None if there is none) and what it ought to get."""
    try:
        value = strict_json(octets)
    except NotJson:
        return None, BAD
    return value, judge(value)


class Asked(NamedTuple):
    """A request on a connection, as the judge reads it."""

    method: bytes
    target: bytes
    length: int
    keep_alive: bool
    body: bytes


def split_lines(head: bytes) -> list[bytes]:
    """Return the lines of a head; raise ValueError for a bare CR or LF, or a control character."""
    lines = head.split(b"\r\n")
    if any((octet < 0x20 and octet != 9) or octet == 0x7F for line in lines for octet in line):
        raise ValueError("a control character")
    return lines


def split_field(line: bytes) -> tuple[bytes, bytes]:
    """Return name (in small letters) and value of a line; raise ValueError if it is none."""
    name, colon, value = line.partition(b":")
    if not colon or not name or set(name) - TOKEN:
        raise ValueError("no header")
    return name.lower(), value.strip(b" \t")


def read_first(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Return method, target and version; raise ValueError for anything else."""
    method, target, version = line.split(b" ")
    if not method or set(method) - TOKEN or version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise ValueError("no request line")
    if not target or any(not 0x21 <= octet <= 0x7E for octet in target):
        raise ValueError("no request line")
    return method, target, version


def read_asked(head: bytes) -> Asked:
    """Return a request without its body from a head without its end; raise ValueError."""
    first, *lines = split_lines(head)
    method, target, version = read_first(first)
    headers = [split_field(line) for line in lines]
    lengths = [value for name, value in headers if name == b"content-length"] or [b"0"]
    if any(name == b"transfer-encoding" for name, _ in headers) or len(lengths) > 1:
        raise ValueError("smuggling")
    if not 1 <= len(lengths[0]) <= 9 or set(lengths[0]) - set(b"0123456789"):
        raise ValueError("no length")
    # "close" within another word closes too, which hurts nobody.
    close = any(b"close" in value.lower() for name, value in headers if name == b"connection")
    return Asked(method, target, int(lengths[0]), version == b"HTTP/1.1" and not close, b"")


def is_hopeless(half: bytes) -> bool:
    """Return whether half a head can never be good: a NUL, a bare LF, a CR without LF."""
    return (
        b"\0" in half
        or b"\n" in half.replace(b"\r\n", b"")
        or b"\r" in half.replace(b"\r\n", b"")[:-1]
        or (half.replace(b"\r\n", b"").endswith(b"\r") and not half.endswith(b"\r"))
    )


class Ends(Exception):
    """Say that no further request is read, and what comes instead."""

    def __init__(self, *after: int) -> None:
        super().__init__(after)
        self.after = set(after)


def read_next(octets: bytes) -> tuple[Asked, bytes]:
    """Return a request and what is behind it; raise Ends."""
    head, end, rest = octets.partition(b"\r\n\r\n")
    if len(head + end) > LIMITS.max_header_bytes:
        # The pieces of the bytes decide which of the two comes.
        raise Ends(431, 400)
    if not end and is_hopeless(head):
        raise Ends(400)
    if not end:
        raise Ends(1)
    try:
        request = read_asked(head)
    except ValueError:
        raise Ends(400) from None
    if request.length > LIMITS.max_body_bytes:
        raise Ends(413)
    if len(rest) < request.length:
        raise Ends(1)
    return request._replace(body=rest[:request.length]), rest[request.length:]


def read_conversation(octets: bytes) -> tuple[list[Asked], set[int]]:
    """Return the whole requests in octets, and what follows them.

    That is a set of error statuses, {0} for the end, {1} for half a request, {2} for bytes behind
    a request after which the connection closes.
    """
    asked: list[Asked] = []
    try:
        while octets:
            request, octets = read_next(octets)
            asked.append(request)
            if not request.keep_alive and octets:
                raise Ends(2)
    except Ends as ends:
        return asked, ends.after
    return asked, {0}


def path_of(target: bytes) -> bytes:
    """Return the path of a target, whose scheme and host do not matter."""
    return re.sub(rb"^[hH][tT][tT][pP][sS]?://[^/?]*", b"", target).split(b"?")[0] or b"/"


def statuses_of(request: Asked) -> set[int]:
    """Return the statuses that a request may get."""
    methods = {
        b"/": (b"GET", b"HEAD", b"POST"),
        b"/health": (b"GET", b"HEAD"),
        b"/metrics": (b"GET", b"HEAD"),
    }
    path = path_of(request.target)
    if request.method == b"OPTIONS":
        return {204}
    if path not in methods:
        return {404}
    if request.method not in methods[path]:
        return {405}
    if request.method == b"POST":
        return statuses_of_body(request.body)
    return {200}


def statuses_of_body(body: bytes) -> set[int]:
    """Return the statuses that a posted body may get."""
    value, verdict = judge_body(body)
    if is_deep(body):
        return {200, 400}
    if isinstance(verdict, list):
        return {200}
    if verdict != OK:
        return STATUS_OF[verdict] - {431}
    if isinstance(value, dict) and value.get("action") == "send":
        # The box may be full by now.
        return {200, 429}
    return {200}


def may_wait(request: Asked) -> bool:
    """Return whether a request may wait; it gets no reply if its client hangs up."""
    with contextlib.suppress(NotJson):
        value = strict_json(request.body)
        items = value if isinstance(value, list) else [value]
        return any(isinstance(item, dict) and item.get("wait") for item in items)
    return False
