"""Allocations of TURN servers: for how short a time one may be lent.

aioice asks for ten minutes, and asks again after five sixths of what it gets. A server that lends
for 0 seconds is asked again at once, without end: thousands of times a second, by everybody who
borrows from it. So what ends too soon is not used.

aioice has no setting for it: its class gets another method, for all connections of this process.
Another version may have other names: then nothing is bounded.
"""

from __future__ import annotations

import importlib
from typing import Any

# Of an allocation. RFC 8656, section 3.2, has ten minutes by default; asked for anew each 50 s, one
# costs little.
MIN_LIFETIME_S = 60

LIFETIME = "LIFETIME"
NEEDED = ("refresh", "request_with_retry")
# Where its own method stays.
REQUEST = "_connectoid_request"


def bound_allocations() -> None:
    """Have aioice use no allocation that ends too soon. Idempotent."""
    client: Any = getattr(importlib.import_module("aioice.turn"), "TurnClientMixin", None)
    is_known = all(hasattr(client, name) for name in NEEDED)
    if is_known and not hasattr(client, REQUEST):
        setattr(client, REQUEST, client.request_with_retry)
        client.request_with_retry = _request


async def _request(client: Any, request: Any) -> Any:
    """Return a reply; raise ConnectionError, after which aioice uses an allocation no more."""
    reply, address = await getattr(client, REQUEST)(request)
    # Whoever gives an allocation back asks for 0 seconds.
    asked_s = request.attributes.get(LIFETIME, 0)
    if asked_s and reply.attributes.get(LIFETIME, asked_s) < MIN_LIFETIME_S:
        raise ConnectionError(f"it lends for less than {MIN_LIFETIME_S} s")
    return reply, address
