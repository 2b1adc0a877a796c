"""What aioice takes of the datagrams that come to a connection: with aioice, and no network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from struct import pack
from typing import Any

import pytest
from two_ends import TwoEnds, run_two_ends

from connectoid.datagrams import (
    MAX_DATAGRAM_BYTES,
    MAX_QUEUED_RECORDS,
    MAX_ROLE_CONFLICTS,
    NEEDED,
    RECEIVE_BUFFER_BYTES,
    bound_datagrams,
)
from connectoid.limits import MAX_CANDIDATES

ice = pytest.importorskip("aioice.ice")
stun = pytest.importorskip("aioice.stun")
candidates = pytest.importorskip("aioice.candidate")

ALICE = ("192.0.2.1", 40_000)
# A fatal alert without encryption.
ALERT = b"\x15\xfe\xfd" + bytes(9) + b"\x02\x02\x28"


def record(length: int = 0, kind: int = 0x16) -> bytes:
    """Return a record of DTLS with so many bytes after its header."""
    return pack("!B10xH", kind, length) + bytes(length)


def candidate_at(address: tuple[str, int]) -> Any:
    """Return a host candidate."""
    host, port = address
    return candidates.Candidate("1", 1, "udp", 1, host, port, "host")


class FakeProtocol:
    """One socket of Alice's: it notes what is sent, and nobody answers."""

    def __init__(self) -> None:
        self.local_candidate = candidate_at(ALICE)
        # Without a socket.
        self.transport = asyncio.DatagramTransport()
        self.answered: list[tuple[str, int]] = []
        self.asked: list[tuple[str, int]] = []
        self.heard: list[bytes] = []

    def datagram_received(self, datagram: bytes, _address: tuple[str, int]) -> None:
        """Note what comes through."""
        self.heard.append(datagram)

    def send_stun(self, _message: Any, address: tuple[str, int]) -> None:
        """Note the answer to a check."""
        self.answered.append(address)

    async def request(self, request: Any, address: tuple[str, int], **_how: Any) -> Any:
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

    def take(self, *datagrams: bytes) -> list[bytes]:
        """Have datagrams come that are no STUN; return what aiortc will read."""
        for datagram in datagrams:
            self.connection.data_received(datagram, 1)
        queue = self.connection._queue
        return [queue.get_nowait()[0] for _ in range(queue.qsize())]

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


class LiarProtocol(FakeProtocol):
    """A socket that hears of so many conflicts of roles, and then of success."""

    def __init__(self, conflicts: int) -> None:
        super().__init__()
        self.conflicts = conflicts

    async def request(self, request: Any, address: tuple[str, int], **_how: Any) -> Any:
        """Note a check of Alice's, and say that both have the same role."""
        self.asked.append(address)
        await asyncio.sleep(0)
        if len(self.asked) <= self.conflicts:
            answer = stun.Message(
                message_method=stun.Method.BINDING, message_class=stun.Class.ERROR)
            answer.attributes["ERROR-CODE"] = (487, "Role Conflict")
            raise stun.TransactionFailed(answer)
        return request, address


@pytest.mark.parametrize("more", [-1, 0, 1, 1_000])
def test_peer_that_claims_conflicts_of_roles_is_asked_few_times(more: int) -> None:
    async def play(alice: Alice) -> None:
        protocol = LiarProtocol(MAX_ROLE_CONFLICTS + more)
        pair = ice.CandidatePair(protocol, candidate_at(("192.0.2.2", 1)))
        alice.connection._check_list.append(pair)
        alice.connection.check_start_task(pair)
        await pair.task
        assert len(protocol.asked) == 1 + MAX_ROLE_CONFLICTS + min(more, 0)
        assert pair.state.name == ("FAILED" if more > 0 else "SUCCEEDED")

    run(play)


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


def test_alert_that_comes_before_a_path_is_found_is_not_kept() -> None:
    """Anybody can send it, without a password, and the handshake would end with it."""

    async def play(alice: Alice) -> None:
        assert alice.take(ALERT) == []
        alice.nominate(2)
        assert alice.take(ALERT) == [ALERT]

    run(play)


@pytest.mark.parametrize("when", ["before", "after"])
def test_stranger_with_an_alert_keeps_no_connection_from_opening(when: str) -> None:
    """Before the other end is known, and before a path is found."""

    def alert(sockets: Any) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for protocol in sockets:
                candidate = protocol.local_candidate
                if "." in candidate.host:
                    stranger.sendto(ALERT, (candidate.host, candidate.port))

    async def play(ends: TwoEnds) -> None:
        answer = await ends.gather()
        sockets = [
            protocol for end in (ends.alice, ends.mallory)
            for protocol in end.sctp.transport.transport._connection._protocols]
        if when == "before":
            alert(sockets)
            await ends.open(answer)
            return
        opening = asyncio.create_task(ends.open(answer))
        while not opening.done():
            alert(sockets)
            await asyncio.sleep(0)
        await opening

    run_two_ends(play, is_open=False)


@pytest.mark.parametrize("source", [("192.0.2.2", 9, 0, 0), ("192.0.2.9", 2)], ids=str)
def test_what_is_no_stun_is_taken_from_addresses_of_the_other_alone(source: Any) -> None:
    """Those of the SDP, and those that checks came from."""

    async def play(alice: Alice) -> None:
        alice.connection._protocols.append(alice.protocol)
        await alice.connection.get_component_candidates(1, [])
        hear = alice.protocol.datagram_received
        await alice.connection.add_remote_candidate(candidate_at(("192.0.2.2", 1)))
        await alice.hear(2)
        # A STUN message is for aioice, whoever sends it: it looks for a password.
        for octets in (ALERT, b"", b"\x80", b"\x04", b"\x03", b"\x00"):
            hear(octets, source)
        assert alice.protocol.heard == [b"\x03", b"\x00"]
        for port in (1, 2):
            hear(ALERT, ("192.0.2.2", port))
        assert alice.protocol.heard[2:] == [ALERT, ALERT]

    run(play)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_records_that_nobody_reads_are_bounded(more: int) -> None:
    async def play(alice: Alice) -> None:
        alice.nominate(2)
        count = MAX_QUEUED_RECORDS + more
        assert alice.take(*[record()] * count) == [record()] * min(count, MAX_QUEUED_RECORDS)

    run(play)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_datagram_that_is_longer_than_any_is_not_taken(more: int) -> None:
    async def play(alice: Alice) -> None:
        alice.nominate(2)
        datagram = record(MAX_DATAGRAM_BYTES + more - len(record()))
        assert alice.take(datagram) == [datagram] * (more <= 0)

    run(play)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_stun_that_is_longer_than_any_is_not_read(more: int) -> None:
    """Checksums after checksums take aioice long, and whoever sends them needs no password."""

    async def play(alice: Alice) -> None:
        alice.connection._protocols.append(alice.protocol)
        await alice.connection.get_component_candidates(1, [])
        datagram = bytes(MAX_DATAGRAM_BYTES + more)
        alice.protocol.datagram_received(datagram, ("192.0.2.9", 2))
        assert alice.protocol.heard == [datagram] * (more <= 0)

    run(play)


def test_records_of_one_datagram_are_given_to_aiortc_one_by_one() -> None:
    """It reads one for each datagram: the others would stay in OpenSSL for ever."""

    async def play(alice: Alice) -> None:
        alice.nominate(2)
        records = [record(length) for length in (0, 3, 60)]
        assert alice.take(b"".join(records)) == records
        # What is cut off is OpenSSL's to judge, and what has no header is nothing.
        assert alice.take(record(3)[:-1]) == [record(3)[:-1]]
        assert alice.take(record(3) + record()[:-1]) == [record(3)]
        # What would end the connection may not hide behind another record.
        assert alice.take(record(3) + record(1_400, kind=0x80) + record()) == [record(3), record()]
        # Records of DTLS 1.3 need no length.
        assert alice.take(b"\x2c" + bytes(40)) == [b"\x2c" + bytes(40)]

    run(play)


@pytest.mark.parametrize(
    ("datagram", "is_taken"),
    [(b"", False), (record(kind=0x13), False), (record(kind=0x14), True), (b"\x3f", True),
     (b"\x40", False), (b"\x80" * 1501, False)])
def test_only_what_is_for_dtls_is_taken(datagram: bytes, *, is_taken: bool) -> None:
    """By anything else, whoever sends it, aiortc would end the connection."""

    async def play(alice: Alice) -> None:
        alice.nominate(2)
        assert alice.take(datagram) == [datagram] * is_taken

    run(play)


def room_of(own: Any) -> int:
    """Return how much waits in the kernel for a socket."""
    room: int = own.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    return room


def test_kernel_is_asked_to_keep_a_burst() -> None:
    """It gives what it would give to anybody who asks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
        if room_of(asks) < RECEIVE_BUFFER_BYTES:
            with contextlib.suppress(OSError):
                asks.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        given = room_of(asks)

    async def rooms() -> list[int]:
        connection = ice.Connection(ice_controlling=False)
        bound_datagrams(connection)
        await connection.get_component_candidates(1, ["127.0.0.1"])
        found = [
            room_of(protocol.transport.get_extra_info("socket"))
            for protocol in connection._protocols]
        await connection.close()
        return found

    assert asyncio.run(rooms()) == [given]


def test_aioice_has_all_that_is_bounded() -> None:
    """Another version may have other names, and then nothing is bounded any more."""

    async def missing() -> list[str]:
        connection = ice.Connection(ice_controlling=False)
        assert ice.CandidatePair.State.FAILED.name == "FAILED"
        assert candidate_at(ALICE)._network_host == ALICE[0]
        return [name for name in NEEDED if not hasattr(connection, name)]

    assert asyncio.run(missing()) == []
    bound_datagrams(object())
