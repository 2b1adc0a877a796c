"""Cases of versions: what two apps speak with each other, and links of versions to come."""

from __future__ import annotations

from collections.abc import Iterator

from cases_in_context import Box, accepted, reply
from vector_forms import hash_of
from vector_keys import Json
from vector_people import (
    A0,
    A1_AT,
    ALICE,
    B0,
    B0_AT,
    BOB,
    M0,
    M0_AT,
    MALLORY,
    R,
    hello,
    welcome,
)

# What the opener's hello and the inviter's welcome say, and what both speak then.
COMMON: dict[str, tuple[list[int], list[int], int]] = {
    "one version": ([1], [1], 1),
    "two in common": ([1, 2], [1, 2], 2),
    "the highest of one side": ([1, 2, 3], [1, 2], 2),
    "a gap": ([1, 3, 7], [1, 3, 5], 3),
    "nothing but the lowest": ([1, 2], [1, 3], 1),
    "the largest number": ([1, 999], [999], 999),
}

NOTHING_IN_COMMON: dict[str, tuple[list[int], list[int]]] = {
    "a later app alone": ([1], [2]),
    "an earlier app alone": ([2, 3], [1]),
    "lists that pass each other": ([1, 3], [2, 4]),
}


def version_cases() -> Iterator[Json]:
    """Yield two lists of versions, with the highest that both have."""
    for name, (ours, theirs, both) in COMMON.items():
        yield {"name": name, "ours": ours, "theirs": theirs, "version": both}
    for name, (ours, theirs) in NOTHING_IN_COMMON.items():
        yield {"name": name, "ours": ours, "theirs": theirs, "refused": "version"}


def accepted_versions() -> Iterator[Json]:
    """Yield hellos and welcomes that name a version of the recipient's, or nothing."""
    for name, versions, both in (
        ("version 1", [1], 1),
        ("version 2", [2], 2),
        ("versions 1 and 2", [1, 2], 2),
        ("versions 1 and 3", [1, 3], 1),
        ("null", None, 1),
    ):
        told = hello(versions=versions)
        yield accepted(
            f"hello of {name}",
            "alice invited",
            Box(A0, told),
            state="welcomed",
            contact=BOB.pub,
            protocol=both,
            hello_hash=hash_of(told),
            sent=[reply(B0, "welcome", B0_AT, hash_of(told), r=R)],
        )
    # Bob's hello names none, so he has said that he speaks version 1 alone.
    for name, versions in (("version 1", [1]), ("versions 1 and 2", [1, 2]), ("null", None)):
        yield accepted(
            f"welcome of {name}",
            "bob opened",
            Box(B0, welcome(versions=versions)),
            state="ready",
            contact=ALICE.pub,
            protocol=1,
            connectoid=A1_AT,
        )
    second = hello(MALLORY, connectoid=M0_AT, versions=[3])
    yield accepted(
        "second hello of version 3",
        "alice welcomed",
        Box(A0, second),
        state="welcomed",
        contact=BOB.pub,
        sent=[reply(M0, "used", M0_AT, hash_of(second), r=R)],
        warned=True,
    )


def refused_versions() -> Iterator[Json]:
    """Yield hellos and welcomes of later versions alone: the user is told."""
    for name, where, box in (
        ("hello of version 3", "alice invited", Box(A0, hello(versions=[3]))),
        ("hello of versions 3 and 999", "alice invited", Box(A0, hello(versions=[3, 999]))),
        ("welcome of version 2", "bob opened", Box(B0, welcome(versions=[2]))),
        ("welcome of versions 2 and 999", "bob opened", Box(B0, welcome(versions=[2, 999]))),
    ):
        yield {
            "name": name,
            "context": where,
            "found": [box.found],
            "refused": "version",
            "told": "needs_newer_app",
        }
