"""Encoding and validation: from bytes and text to trusted values.

Pure functions that return the value or raise Refused. PROTOCOL.md, "Conventions" and "Forms".
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

from connectoid.errors import Refused
from connectoid.limits import MAX_JSON_LEVELS

# A compressed point of P-384: 49 bytes that begin with 2 or 3.
PUB_FORM = re.compile(r"A[g-z0-9_-][A-Za-z0-9_-]{63}[AQgw]")

# 32 bytes and 16 bytes in canonical base64url.
HASH_FORM = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
RANDOM_FORM = re.compile(r"[A-Za-z0-9_-]{21}[AQgw]")

# 96 bytes: r || s of ES384.
SIGNATURE_FORM = re.compile(r"[A-Za-z0-9_-]{128}")

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")

# Four characters hold three bytes. A single character left over is not even one byte.
_GROUP_CHARS = 4
_IMPOSSIBLE_REST = 1


def encode_base64url(octets: bytes) -> str:
    """Return RFC 4648 base64url without padding."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


def decode_base64url(text: str) -> bytes:
    """Return the bytes of base64url text.

    Raise Refused (encoding) for padding, another alphabet or unused bits.
    """
    if not _BASE64URL.fullmatch(text) or len(text) % _GROUP_CHARS == _IMPOSSIBLE_REST:
        raise Refused("encoding")
    padding = "=" * (-len(text) % _GROUP_CHARS)
    octets = base64.urlsafe_b64decode(text + padding)
    if encode_base64url(octets) != text:
        raise Refused("encoding")
    return octets


def decode_text(text: str) -> str:
    """Return the UTF-8 text in base64url; raise Refused (encoding)."""
    try:
        return decode_base64url(text).decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("encoding", "not UTF-8") from None


_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NO_BRACKETS = re.compile(r"[^][{}]+")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def is_deep(text: str) -> bool:
    """Return whether JSON has more than MAX_JSON_LEVELS, in one look from one end to the other.

    A parser follows each level on the stack, and a thread may have little of it: a look comes
    before.
    """
    if text.count("[") + text.count("{") <= MAX_JSON_LEVELS:
        return False
    brackets = _NO_BRACKETS.sub("", _STRING.sub("", text))
    return max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_JSON_LEVELS


def load_json(text: str) -> Any:
    """Return the value of JSON, as json.loads does; raise ValueError, also for too many levels."""
    if is_deep(text):
        raise ValueError(f"over {MAX_JSON_LEVELS} levels of nesting")
    return json.loads(text)


def parse_json(octets: bytes) -> object:
    """Return the value of JSON in UTF-8; raise Refused (payload)."""
    try:
        text = octets.decode("utf-8")
        if is_deep(text):
            raise ValueError(f"over {MAX_JSON_LEVELS} levels of nesting")
        value: object = json.loads(text, parse_constant=_refuse_constant)
        # A lone surrogate is no text.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError:
        raise Refused("payload", "not JSON in UTF-8") from None
    return value


def _refuse_constant(name: str) -> float:
    # NaN and Infinity are not JSON.
    raise ValueError(name)
