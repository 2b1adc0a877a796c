"""What aioice reads of multicast DNS, which anybody may send: with aioice, and no network."""

from __future__ import annotations

import asyncio
import socket
from struct import pack
from typing import Any

import pytest

from connectoid.local_names import (
    HEADER,
    IS_ANSWER,
    MAX_ANSWER_BYTES,
    MAX_RECORDS,
    NEEDED,
    bound_local_names,
    is_answer,
)

mdns = pytest.importorskip("aioice.mdns")

NAME = "0b1c2d3e.local"
NAME_OCTETS = b"\x080b1c2d3e\x05local\x00"
BOB = "192.0.2.2"
BOB_OCTETS = bytes([192, 0, 2, 2])
ADDRESS, TEXT = 1, 16
# Of the Internet, and the only ones of their name: RFC 6762, section 10.2.
CLASS = 0x8001
MALLORY = ("192.0.2.9", 5353)


class FakeTransport:
    """A socket that is in the group already, and sends nothing."""

    def __init__(self) -> None:
        self.sent = 0

    def get_extra_info(self, _name: str) -> Any:
        """Return the socket."""
        return self

    def setsockopt(self, *_args: Any) -> None:
        """Join the group."""

    def is_closing(self) -> bool:
        """Return that it goes on."""
        return False

    def sendto(self, _datagram: bytes, _address: Any) -> None:
        """Note that something is sent."""
        self.sent += 1


def record(kind: int, content: bytes) -> bytes:
    """Return a record of the name."""
    return NAME_OCTETS + pack("!HHIH", kind, CLASS, 120, len(content)) + content


def answer(*more: bytes, flags: int = IS_ANSWER) -> bytes:
    """Return an answer with an address of Bob's, and more records."""
    records = [record(ADDRESS, BOB_OCTETS), *more]
    return HEADER.pack(0, flags, 0, len(records), 0, 0) + b"".join(records)


def long_answer(length: int) -> bytes:
    """Return an answer of so many bytes: a text fills it up."""
    room = length - len(answer(record(TEXT, b"")))
    words, last = divmod(room, 256)
    text = (b"\xff" + bytes(255)) * words
    if last:
        text += bytes([last - 1]) + bytes(last - 1)
    return answer(record(TEXT, text))


def resolve(datagram: bytes) -> str | None:
    """Return what aioice finds for the name if that comes while it asks."""

    async def main() -> str | None:
        bound_local_names()
        bound_local_names()
        protocol = mdns.MDnsProtocol()
        protocol.connection_made(FakeTransport())
        asking = asyncio.create_task(protocol.resolve(NAME, timeout=0.05))
        await asyncio.sleep(0)
        protocol.datagram_received(datagram, MALLORY)
        found: str | None = await asking
        return found

    return asyncio.run(main())


def test_answer_is_taken() -> None:
    assert resolve(answer()) == BOB


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_answer_that_is_longer_than_any_is_not_read(more: int) -> None:
    datagram = long_answer(MAX_ANSWER_BYTES + more)
    assert len(datagram) == MAX_ANSWER_BYTES + more
    assert (resolve(datagram) == BOB) == (more <= 0)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_answer_of_more_records_than_any_is_not_read(more: int) -> None:
    texts = [record(TEXT, b"\1a")] * (MAX_RECORDS - 1 + more)
    assert (resolve(answer(*texts)) == BOB) == (more <= 0)


@pytest.mark.parametrize("section", range(4))
def test_records_of_all_sections_count(section: int) -> None:
    counts = [0, 0, 0, 0]
    counts[section] = MAX_RECORDS + 1
    assert not is_answer(HEADER.pack(0, IS_ANSWER, *counts))


@pytest.mark.parametrize("datagram", [b"", bytes(HEADER.size - 1), answer(flags=0)])
def test_what_is_no_answer_is_not_read(datagram: bytes) -> None:
    """Nobody asks for names of ours: to answer would only take time."""
    assert resolve(datagram) is None


def test_nothing_is_read_while_no_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in an offer opens the socket, and anybody may send there as long as it is open."""

    async def main() -> None:
        bound_local_names()
        monkeypatch.setattr(mdns.dns.message, "from_wire", pytest.fail)
        mdns.MDnsProtocol().datagram_received(answer(), MALLORY)

    asyncio.run(main())


def test_aioice_has_what_is_replaced_and_another_version_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(hasattr(mdns.MDnsProtocol, name) for name in NEEDED)
    monkeypatch.setattr(mdns, "MDnsProtocol", object)
    bound_local_names()


# aioice leaves the socket that it cannot bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_name_that_cannot_be_asked_for_costs_its_candidate_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program holds the port of multicast DNS for itself."""
    ice = pytest.importorskip("aioice.ice")
    text = "1 1 udp 2122260223 {} 9 typ host"
    hidden, plain = (
        ice.Candidate.from_sdp(text.format(host)) for host in (NAME, BOB))

    async def main() -> list[str]:
        bound_local_names()
        bound_local_names()
        connection = ice.Connection(ice_controlling=True)
        for candidate in (hidden, plain, None):
            await connection.add_remote_candidate(candidate)
        hosts = [candidate.host for candidate in connection.remote_candidates]
        await connection.close()
        return hosts

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        monkeypatch.setattr(mdns, "MDNS_PORT", holder.getsockname()[1])
        assert asyncio.run(main()) == [BOB]
