"""What aioice takes of the datagrams that come to a connection: with aioice, and no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from connectoid.datagrams import MAX_QUEUED_DATAGRAMS, NEEDED, bound_datagrams
from connectoid.limits import MAX_CANDIDATES

ice = pytest.importorskip("aioice.ice")
stun = pytest.importorskip("aioice.stun")
candidates = pytest.importorskip("aioice.candidate")

ALICE = ("192.0.2.1", 40_000)


def candidate_at(address: tuple[str, int]) -> Any:
    """Return a host candidate."""
    host, port = address
    return candidates.Candidate("1", 1, "udp", 1, host, port, "host")


class FakeProtocol:
    """One socket of Alice's: it notes what is sent, and nobody answers."""

    def __init__(self) -> None:
        self.local_candidate = candidate_at(ALICE)
        self.answered: list[tuple[str, int]] = []
        self.asked: list[tuple[str, int]] = []

    def send_stun(self, _message: Any, address: tuple[str, int]) -> None:
        """Note the answer to a check."""
        self.answered.append(address)

    async def request(self, _request: Any, address: tuple[str, int], **_how: Any) -> Any:
        """Note a check of Alice's; it fails, as one does without an answer."""
        self.asked.append(address)
        raise stun.TransactionTimeout


class Alice:
    """A connection of aioice, bounded."""

    def __init__(self) -> None:
        self.connection = ice.Connection(ice_controlling=False)
        self.connection.remote_username = "mallory"
        self.connection.remote_password = "m" * 22
        self.connection._early_checks_done = True
        self.protocol = FakeProtocol()
        bound_datagrams(self.connection)

    async def hear(self, port: int, *, is_early: bool = False) -> None:
        """Have an authenticated check come from a port, and all that it begins be done."""
        message = stun.Message(
            message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST)
        username = f"{self.connection.local_username}:mallory"
        message.attributes["USERNAME"] = username
        message.attributes["PRIORITY"] = 1
        message.attributes["ICE-CONTROLLING"] = 1
        message.add_message_integrity(self.connection.local_password.encode())
        self.connection._early_checks_done = not is_early
        self.connection.request_received(message, ("192.0.2.2", port), self.protocol)
        for _ in range(3):
            await asyncio.sleep(0)

    def nominate(self, port: int) -> None:
        """Find a path."""
        candidate = candidate_at(("192.0.2.2", port))
        self.connection._remote_candidates.append(candidate)
        self.connection._nominated[1] = ice.CandidatePair(self.protocol, candidate)


def run(play: Callable[[Alice], Awaitable[None]]) -> Alice:
    """Play what comes."""

    async def main() -> Alice:
        alice = Alice()
        await play(alice)
        return alice

    return asyncio.run(main())


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("in_sdp", [0, 5, MAX_CANDIDATES])
def test_addresses_that_checks_tell_are_no_more_than_an_sdp_may_have(
    in_sdp: int, more: int,
) -> None:
    async def play(alice: Alice) -> None:
        for port in range(1, in_sdp + 1):
            await alice.connection.add_remote_candidate(candidate_at(("192.0.2.3", port)))
        for port in range(1, MAX_CANDIDATES - in_sdp + more + 1):
            await alice.hear(port)

    alice = run(play)
    learned = MAX_CANDIDATES - in_sdp + min(more, 0)
    assert alice.protocol.asked == [("192.0.2.2", port) for port in range(1, learned + 1)]
    # Whoever is not asked is not answered: they do not send where nobody would send back.
    assert alice.protocol.answered == alice.protocol.asked


def test_early_checks_are_bounded_as_well() -> None:
    """aioice answers them before it has the other's candidates."""

    async def play(alice: Alice) -> None:
        for port in range(1, 2 * MAX_CANDIDATES + 1):
            await alice.hear(port, is_early=True)
        connection = alice.connection
        for check in list(connection._early_checks):
            connection.check_incoming(*check)
        await asyncio.sleep(0)

    assert len(run(play).protocol.asked) == MAX_CANDIDATES


def test_once_a_path_is_found_no_address_is_learned_and_none_is_asked_again() -> None:
    async def play(alice: Alice) -> None:
        await alice.hear(1)
        assert len(alice.protocol.asked) == 1
        alice.nominate(2)
        for port in (1, 3, 4, 1):
            await alice.hear(port)

    alice = run(play)
    assert alice.protocol.asked == [("192.0.2.2", 1)]
    assert alice.protocol.answered == [("192.0.2.2", 1)]


def test_path_in_use_is_answered() -> None:
    """So the other knows that Alice is there, and may use another of its candidates."""

    async def play(alice: Alice) -> None:
        alice.nominate(2)
        await alice.connection.add_remote_candidate(candidate_at(("192.0.2.2", 3)))
        await alice.hear(2)
        await alice.hear(3)

    assert run(play).protocol.answered == [("192.0.2.2", 2), ("192.0.2.2", 3)]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_datagrams_that_wait_for_a_path_are_bounded(more: int) -> None:
    """Anybody can send them, without a password."""

    async def play(alice: Alice) -> None:
        for _ in range(MAX_QUEUED_DATAGRAMS + more):
            alice.connection.data_received(b"\x16", 1)

    assert run(play).connection._queue.qsize() == MAX_QUEUED_DATAGRAMS + min(more, 0)


@pytest.mark.parametrize(
    ("datagram", "is_taken"),
    [(b"", False), (b"\x13", False), (b"\x14", True), (b"\x3f", True), (b"\x40", False),
     (b"\x80" * 1501, False)])
def test_only_what_is_for_dtls_is_taken(datagram: bytes, *, is_taken: bool) -> None:
    """By anything else, whoever sends it, aiortc would end the connection."""

    async def play(alice: Alice) -> None:
        alice.connection.data_received(datagram, 1)

    assert run(play).connection._queue.qsize() == is_taken


def test_aioice_has_all_that_is_bounded() -> None:
    """Another version may have other names, and then nothing is bounded any more."""

    async def missing() -> list[str]:
        connection = ice.Connection(ice_controlling=False)
        assert ice.CandidatePair.State.FAILED.name == "FAILED"
        assert candidate_at(ALICE)._network_host == ALICE[0]
        return [name for name in NEEDED if not hasattr(connection, name)]

    assert asyncio.run(missing()) == []
    bound_datagrams(object())
