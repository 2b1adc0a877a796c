"""Names of multicast DNS (RFC 6762), behind which browsers hide: what is read of the answers.

aioice opens one socket for all of them, on port 5353 of each interface, as soon as an offer has
such a name, whoever made it. It parses all that comes there, whoever sends it. One datagram of 64
KiB whose names point to each other held up the loop for two seconds. So a datagram is read only
while a name is asked for, and if it is an answer, small, and of few records. Nobody asks for names
of ours.

A program may hold that port alone. Then no such name is found, and only its candidate is left out:
with aioice the whole offer failed.

aioice opens this socket on its own, and has no setting for it: its class gets another method, for
all connections of this process. Another version may have other names: then nothing is bounded.
"""

from __future__ import annotations

import importlib
import logging
from struct import Struct
from typing import Any

log = logging.getLogger("connectoid")

# Of a datagram: those of Ethernet. An answer has some 100.
MAX_ANSWER_BYTES = 1_500
# Of all four sections: the addresses of a host, and what says that there are no others. To read so
# many takes a few milliseconds at most.
MAX_RECORDS = 16

# The number, the flags, and how many records each section has: RFC 1035, section 4.1.1.
HEADER = Struct("!HHHHHH")
IS_ANSWER = 0x8000

NEEDED = ("datagram_received", "resolve")
# Where its own method stays.
TAKE = "_connectoid_take"
ADD = "_connectoid_add"


def is_answer(datagram: bytes) -> bool:
    """Return whether a datagram looks like an answer, and one that is soon read."""
    if not HEADER.size <= len(datagram) <= MAX_ANSWER_BYTES:
        return False
    _, flags, *counts = HEADER.unpack_from(datagram)
    return bool(flags & IS_ANSWER) and sum(counts) <= MAX_RECORDS


def bound_local_names() -> None:
    """Have aioice read no more than answers to its questions, and do without them. Idempotent."""
    protocol: Any = getattr(importlib.import_module("aioice.mdns"), "MDnsProtocol", None)
    is_known = all(hasattr(protocol, name) for name in NEEDED)
    if is_known and not hasattr(protocol, TAKE):
        setattr(protocol, TAKE, protocol.datagram_received)
        protocol.datagram_received = _datagram_received
    connection: Any = importlib.import_module("aioice.ice").Connection
    if hasattr(connection, "add_remote_candidate") and not hasattr(connection, ADD):
        setattr(connection, ADD, connection.add_remote_candidate)
        connection.add_remote_candidate = _add_remote_candidate


def _datagram_received(protocol: Any, datagram: bytes, address: Any) -> None:
    if getattr(protocol, "queries", None) and is_answer(datagram):
        getattr(protocol, TAKE)(datagram, address)


async def _add_remote_candidate(connection: Any, candidate: Any) -> None:
    """Add a candidate, unless there is no socket to ask for its name with."""
    try:
        await getattr(connection, ADD)(candidate)
    except OSError as error:
        log.info("A candidate is left out: %s", error)
