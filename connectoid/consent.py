"""Consent to send (RFC 7675): whether the other end of a connection is still there.

aioice asks every 5 s and waits 0.5 s for an answer: over a satellite, or behind a full line, a
connection ended after 30 s. So a connection of aioice gets another method to ask with. It counts
an answer that comes late, and says early that none comes: then the other may be in another network
by now, and says so through the relays.

aioice has no setting for it. Another version may have other names: then it asks in its own way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

from connectoid.clock import boot_time_s

# Since the last answer: RFC 7675, section 5.1.
CONSENT_S = 30.0
# Between two questions. The RFC wants it a fifth shorter or longer, at random.
ASK_EVERY_S = 5.0
# Of a question. aioice repeats it after 0.5, 1 and 2 s, and waits 4 s more.
REPETITIONS = 3
# Without an answer the other is silent. A round trip that takes longer costs a request to a relay.
SILENT_S = 2.0

NEEDED = ("query_consent", "build_request", "remote_password", "_nominated", "_query_consent_task")


class Consent:
    """Ask the other end of one connection of aioice, as long as it answers."""

    def __init__(self, connection: Any, tell_silent: Callable[[], object]) -> None:
        self._connection = connection
        self._tell_silent = tell_silent
        self._doubted = asyncio.Event()

    def doubt(self) -> None:
        """Ask at once, and end the connection unless an answer comes soon."""
        self._doubted.set()

    async def query_consent(self) -> None:
        """Ask until there is no answer any more; then close the connection."""
        answered_s = boot_time_s()
        while boot_time_s() - answered_s < CONSENT_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_EVERY_S * random.uniform(0.8, 1.2)):  # noqa: S311
                    await self._doubted.wait()
            is_doubted = self._doubted.is_set()
            self._doubted.clear()
            if await self._is_answered(is_doubted=is_doubted):
                answered_s = boot_time_s()
            elif is_doubted:
                break
        # This very task: closing would cancel it.
        self._connection._query_consent_task = None
        await self._connection.close()

    async def _is_answered(self, *, is_doubted: bool) -> bool:
        """Ask over the path in use; in doubt no late answer is waited for."""
        pairs = list(self._connection._nominated.values())
        question = asyncio.create_task(self._ask(pairs[0]))
        try:
            await asyncio.wait([question], timeout=SILENT_S)
            if not question.done():
                self._tell_silent()
                if is_doubted:
                    return False
            return await question
        finally:
            question.cancel()

    async def _ask(self, pair: Any) -> bool:
        connection = self._connection
        try:
            await pair.protocol.request(
                connection.build_request(pair, nominate=False), pair.remote_addr,
                integrity_key=connection.remote_password.encode(), retransmissions=REPETITIONS)
        except Exception:
            # Its errors are in a module that is there only with aiortc.
            return False
        return True


def keep_consent(connection: Any, tell_silent: Callable[[], object]) -> Consent:
    """Have a connection of aioice ask so."""
    consent = Consent(connection, tell_silent)
    if all(hasattr(connection, name) for name in NEEDED):
        connection.query_consent = consent.query_consent
    return consent
