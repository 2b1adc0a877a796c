"""Versions of the protocol: those that this library speaks, and what two apps make of theirs.

PROTOCOL.md, "Versions".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from connectoid.errors import Refused
from connectoid.limits import MAX_VERSION, MAX_VERSIONS

# What this library speaks. Links are those of version 1.
VERSIONS = (1, 2)

# The first version that knows `renew`. An older app drops it, and all that the new key signs.
RENEWAL_VERSION = 2

# What a hello or welcome speaks that does not say so.
_UNSAID = (1,)

# The beginning of an invitation of a later version: its number, from 2 to MAX_VERSION, and a tilde.
LATER = re.compile(r"(?:[2-9]|[1-9][0-9]{1,2})~")


def is_list_of_versions(value: object) -> bool:
    """Return whether a value is a list of versions, each larger than the one before."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_VERSIONS:
        return False
    # Not isinstance: True is an int.
    if any(type(each) is not int or not 0 < each <= MAX_VERSION for each in value):
        return False
    return sorted(set(value)) == value


def spoken_by(payload: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the versions that the sender of a hello or welcome speaks."""
    versions = payload.get("versions")
    if versions is None:
        return _UNSAID
    return tuple(versions)


def highest_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return the highest version of both; raise Refused (version) if they have none in common."""
    common = set(ours) & set(theirs)
    if not common:
        raise Refused("version")
    return max(common)
