"""Cases of apps: links that name one, and hellos and welcomes of it and of others."""

from __future__ import annotations

from collections.abc import Iterator

from cases_in_context import Box, accepted, context, reply
from cases_refused import refused
from vector_forms import commit, hash_of, invite
from vector_keys import Json, sha256
from vector_people import (
    A0,
    A0_AT,
    A1_AT,
    ALICE,
    B0,
    B0_AT,
    BOB,
    R,
    S,
    hello,
    welcome,
)

APP_ID = "org.example.list"
OTHER_ID = "org.example.chat"


def hash_of_app(app: str) -> bytes:
    """Return what a link holds of an app's identifier."""
    return sha256(b"connectoid/1 app\0", app.encode())[:6]


NAMED = invite(A0_AT, S, commit(ALICE.pub, R) + hash_of_app(APP_ID))

OF_APP = hello(app=APP_ID)


def app_cases() -> Iterator[Json]:
    """Yield identifiers with their links, and whether an app of that name may open the link."""
    plain = invite(A0_AT, S, commit(ALICE.pub, R))
    for name, app in (
        ("a domain in reverse", APP_ID),
        ("an origin", "https://list.example.org:8443"),
        ("one character", "a"),
        ("127 characters", "a" * 127),
        ("128 characters", "a" * 128),
    ):
        named = invite(A0_AT, S, commit(ALICE.pub, R) + hash_of_app(app))
        yield {"name": name, "app": app, "a": hash_of_app(app).hex(), "invitation": named}
        yield {"name": f"{name}, the link names none", "app": app, "a": "", "invitation": plain}
    yield {"name": "no identifier, no app in the link", "app": "", "a": "", "invitation": plain}
    for name, app in (("another app", OTHER_ID), ("an app without one", "")):
        yield {
            "name": name,
            "app": app,
            "invitation": NAMED,
            "refused": "link",
            "damage": "app",
        }


def contexts_of_apps() -> dict[str, Json]:
    """Return Alice's and Bob's contexts with a link that names the app."""
    known: Json = {"invitation": NAMED, "app": APP_ID}
    return {
        "alice invited, app": context(
            "inviter", "invited", {"invited": A0_AT}, **known, r=R, seq=0
        ),
        "bob opened, app": context(
            "opener",
            "opened",
            {"current": B0_AT},
            **known,
            hello=OF_APP,
            hello_hash=hash_of(OF_APP),
            connectoid=A0_AT,
        ),
    }


def accepted_apps() -> Iterator[Json]:
    """Yield a hello and a welcome of the app that the link names."""
    greeted = reply(B0, "welcome", B0_AT, hash_of(OF_APP), r=R, app=APP_ID)
    yield accepted(
        "hello of the app",
        "alice invited, app",
        Box(A0, OF_APP),
        state="welcomed",
        contact=BOB.pub,
        sent=[greeted],
    )
    yield accepted(
        "welcome of the app",
        "bob opened, app",
        Box(B0, welcome(re=hash_of(OF_APP), app=APP_ID)),
        state="ready",
        contact=ALICE.pub,
        connectoid=A1_AT,
    )
    plain = hello(app=None)
    yield accepted(
        "hello whose app is null, the link names none",
        "alice invited",
        Box(A0, plain),
        state="welcomed",
        sent=[reply(B0, "welcome", B0_AT, hash_of(plain), r=R)],
    )


def refused_apps() -> Iterator[Json]:
    """Yield hellos and welcomes of other apps."""
    to = hash_of(OF_APP)
    for name, where, box in (
        ("hello of another app", "alice invited, app", Box(A0, hello(app=OTHER_ID))),
        ("hello of no app", "alice invited, app", Box(A0, hello())),
        ("hello of an app, the link names none", "alice invited", Box(A0, hello(app=APP_ID))),
        (
            "hello of another app and version",
            "alice invited, app",
            Box(A0, hello(app=OTHER_ID, versions=[3])),
        ),
        (
            "welcome of another app",
            "bob opened, app",
            Box(B0, welcome(re=to, app=OTHER_ID)),
        ),
        ("welcome of no app", "bob opened, app", Box(B0, welcome(re=to))),
        ("welcome of an app, the link names none", "bob opened", Box(B0, welcome(app=APP_ID))),
    ):
        yield refused("app", name, where, box)
