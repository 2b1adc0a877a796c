"""The form of the two tables of states.

A rule says what a state does with an event and which states may follow. An event without a
rule is no event of that state: a message is refused, and a late word of WebRTC is ignored.
PAIRING stands at the end of pairing.py and CONNECTING at the end of connecting.py, each below
the functions that it holds. PROTOCOL.md, "States", is drawn from both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

# What each side knows of the other. These states survive the process.
PAIRING_STATES: Mapping[str, str] = {
    "invited": "the inviter has made a link, and nobody has used it",
    "welcomed": "a hello has come; the opener has not shown yet that it knows the inviter",
    "opened": "the opener has a link, and no welcome yet",
    "ready": "the opener has the welcome; the inviter has not shown yet that it knows so",
    "paired": "each knows that the other knows",
    "unshared": "the user has ended the sharing; the other is told",
    "ended": "nothing is left but a name and a reason",
}

# The attempt to connect. These states end with the process.
CONNECTING_STATES: Mapping[str, str] = {
    "apart": "nothing",
    "gathering": "WebRTC looks for its candidates",
    "waiting": "a hello, an offer or a call is out",
    "joining": "both have offer and answer, and the channel is not open",
    "proving": "the channel is open, and each end shows whose it is",
    "connected": "the channel belongs to the app",
}

# In these states the opener wants to connect, whether the app does or not.
LASTING = ("opened", "ready")

# These states of CONNECTING have a time limit.
RESTLESS = ("gathering", "waiting", "joining", "proving")

# The numbered messages that each role takes from the other.
NUMBERED_FOR: Mapping[str, tuple[str, ...]] = {
    "inviter": ("ready", "offer", "moved", "renew", "unshare"),
    "opener": ("answer", "call", "moved", "renew", "unshare"),
}


# Each is the last word of a signing key, whatever its `seq`. So a thief who has copied a device
# cannot keep its owner from ending the contact, or from renewing the key.
LAST_WORDS = ("unshare", "renew")


class Rule(NamedTuple):
    """In a state, an event: the function that takes it, and the states that may follow.

    The function takes the machine and what the event brings. It returns the state that follows.
    """

    state: str
    event: str
    does: Callable[..., str]
    then: tuple[str, ...]


Table: TypeAlias = Mapping[tuple[str, str], Rule]


def make_table(*rows: tuple[str, str, Callable[..., str], str]) -> Table:
    """Return the rules by state and event.

    A row has states, an event, a function, and the states that may follow; `=` among these is
    the state itself.
    """
    table: dict[tuple[str, str], Rule] = {}
    for states, event, does, then in rows:
        for state in states.split():
            follow = dict.fromkeys(then.replace("=", state).split())
            table[state, event] = Rule(state, event, does, tuple(follow))
    return table
