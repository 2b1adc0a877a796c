"""What a hostile contact's SCTP can do: nothing but end the connection that it came on."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping

import pytest
from apps import APP_URL, SOON_S, Apps
from two_ends import End, Raw, TwoEnds, run_two_ends

from connectoid import AiortcAdapter, NotConnectedError
from connectoid.sctp_gate import (
    ABORT,
    DATA,
    ERROR,
    FORWARD_TSN,
    HEARTBEAT,
    HEARTBEAT_ACK,
    INIT,
    INIT_ACK,
    LEAST_COUNTED_BYTES,
    MAX_CONTROL_CHUNKS,
    MAX_PARAMETERS,
    MAX_RECONFIG_PARAMETERS,
    MAX_UNCONFIRMED_BYTES,
    NEEDED,
    RECONFIG,
    SACK,
    SHUTDOWN,
    BadPacketError,
    SctpGate,
    check_chunk,
    check_sack,
    guard_sctp,
    read_chunks,
)

aiortc = pytest.importorskip("aiortc")
ice = pytest.importorskip("aioice.ice")
sctp = pytest.importorskip("aiortc.rtcsctptransport")

HEAD = bytes(12)
WRONG = "the other end broke the rules of data channels"


def chunk(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a chunk, perhaps with another length than its own."""
    if length is None:
        length = 4 + len(body)
    return struct.pack("!BBH", kind, 0, length) + body + bytes(-len(body) % 4)


def parameter(value: bytes = b"", kind: int = 1, length: int | None = None) -> bytes:
    """Return a parameter, perhaps with another length than its own."""
    if length is None:
        length = 4 + len(value)
    return struct.pack("!HH", kind, length) + value + bytes(-len(value) % 4)


def sack(tsn: int, *gaps: tuple[int, int], count: int | None = None) -> bytes:
    """Return the body of a SACK, perhaps with another number of gap blocks than it has."""
    if count is None:
        count = len(gaps)
    blocks = b"".join(struct.pack("!HH", *gap) for gap in gaps)
    return struct.pack("!LLHH", tsn, 100_000, count, 0) + blocks


def is_good(kind: int, body: bytes) -> bool:
    """Return whether a packet of one chunk is taken."""
    try:
        for found in read_chunks(HEAD + chunk(kind, body)):
            check_chunk(*found)
    except BadPacketError:
        return False
    return True


def is_good_sack(body: bytes, last_tsn: int) -> bool:
    """Return whether a SACK is taken when so much was sent."""
    try:
        check_sack(body, last_tsn)
    except BadPacketError:
        return False
    return True


# -- From outside --------------------------------------------------------------------------


def of_nothing_for_ever(_: int) -> bytes:
    """Return a HEARTBEAT with a parameter of no bytes: aiortc would read it for ever."""
    return chunk(HEARTBEAT, parameter(length=0))


def of_gaps(tsn: int) -> bytes:
    """Return a SACK that would be counted for seconds."""
    return chunk(SACK, sack(tsn, *[(0, 65_535)] * 280))


def of_streams(tsn: int) -> bytes:
    """Return a FORWARD TSN, with 256 of the 65,536 streams that it can make."""
    streams = b"".join(struct.pack("!HH", stream, 0) for stream in range(256))
    return chunk(FORWARD_TSN, struct.pack("!L", tsn) + streams)


def on_another_stream(tsn: int) -> bytes:
    """Return a message on a stream of no channel."""
    return chunk(DATA, struct.pack("!LHHL", tsn, 77, 0, 53) + b".")


ATTACKS: Mapping[str, Callable[[int], bytes]] = {
    "parameter": of_nothing_for_ever,
    "gaps": of_gaps,
    "forward": of_streams,
    "stream": on_another_stream,
}


@pytest.mark.sockets
@pytest.mark.parametrize("what", ATTACKS)
def test_packet_that_would_hold_up_aiortc_ends_the_connection_and_is_told(
    apps: Apps, relay_url: str, what: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Alice goes on: they connect anew, and what honest people send arrives."""
    found = ice.get_host_addresses
    monkeypatch.setattr(ice, "get_host_addresses", lambda **kinds: found(**kinds) or ["127.0.0.1"])
    alice = apps.begin("Alice", relay_url, webrtc=AiortcAdapter())
    adapter = AiortcAdapter()
    mallory = apps.begin("Mallory", relay_url, webrtc=adapter)
    mallory.open(alice.share("Mallory", APP_URL), "Alice")
    here = alice.connect("Mallory", SOON_S)
    there = mallory.connect("Alice", SOON_S)
    there.send("." * 65_536)
    assert here.receive(SOON_S) == "." * 65_536
    (peer,) = adapter._peers.values()
    transport = peer.connection.sctp

    async def attack() -> None:
        tsn = transport._local_tsn
        if what == "gaps":
            tsn = transport._last_received_tsn
        await transport._send_chunk(Raw(ATTACKS[what](tsn)))

    mallory.loop_thread.wait(attack())
    with pytest.raises(NotConnectedError, match=WRONG):
        here.receive(SOON_S)
    assert there.closed.wait(SOON_S)
    assert f"Mallory: The connection is closed: {WRONG}." in caplog.text
    mallory.connect("Alice", SOON_S).send("Hello")
    assert alice.connect("Mallory", SOON_S).receive(SOON_S) == "Hello"


# -- Between two ends -----------------------------------------------------------------------

# Chunks that nothing here has a use for: RFC 9260, 4895 and 5061.
SHUTDOWN_ACK = 8
COOKIE_ECHO = 10
COOKIE_ACK = 11
SHUTDOWN_COMPLETE = 14
AUTH = 15
ASCONF = 193
# Results of a request to end a stream: RFC 6525, section 4.4.
IN_PROGRESS = 6
OF_STREAMS = 13
OF_RESULT = 16


def data(mallory: End, content: bytes, kind: int = 51) -> bytes:
    """Return a message as the next one of Mallory's."""
    sctp_ = mallory.sctp
    seq = sctp_._outbound_stream_seq[mallory.peer.channel.id]
    body = struct.pack("!LHHL", sctp_._local_tsn, mallory.peer.channel.id, seq, kind) + content
    return struct.pack("!BBH", DATA, 3, 4 + len(body)) + body + bytes(-len(body) % 4)


def reset(mallory: End, ahead: int = 0) -> bytes:
    """Return a request to end the stream, after so many messages that are still to come."""
    sctp_ = mallory.sctp
    value = struct.pack(
        "!LLLH", sctp_._reconfig_request_seq, sctp_._reconfig_response_seq,
        (sctp_._local_tsn - 1 + ahead) % 2**32, mallory.peer.channel.id)
    return chunk(RECONFIG, parameter(value, OF_STREAMS))


async def end_the_stream(mallory: End) -> None:
    """End the stream, and say for ever that the other's is about to end."""
    async def answer(asked: object) -> None:
        if isinstance(asked, sctp.StreamResetOutgoingParam):
            value = struct.pack("!LL", asked.request_sequence, IN_PROGRESS)
            await mallory.send_chunk(chunk(RECONFIG, parameter(value, OF_RESULT)))

    mallory.sctp._receive_reconfig_param = answer
    await mallory.send_chunk(reset(mallory))


async def end_the_stream_later(mallory: End) -> None:
    """End the stream after one more message."""
    await mallory.send_chunk(reset(mallory, ahead=1))
    mallory.peer.channel.send("the last one")


async def shut_down(mallory: End) -> None:
    """Say goodbye, again and again, and never that it is done."""
    for _ in range(3):
        await mallory.send_chunk(chunk(SHUTDOWN, struct.pack("!L", mallory.sctp._local_tsn)))


async def abort(mallory: End) -> None:
    """End the association."""
    await mallory.send_chunk(chunk(ABORT))


async def send_no_text(mallory: End) -> None:
    """Send a text that is no UTF-8."""
    await mallory.send_chunk(data(mallory, b"\xff"))


async def send_of_no_kind(mallory: End) -> None:
    """Send a message that is neither text nor octets."""
    await mallory.send_chunk(data(mallory, b"x", kind=77))


async def open_again(mallory: End) -> None:
    """Open the channel a second time, on the same stream."""
    opening = struct.pack("!BBHLHH", 3, 0, 0, 0, 10, 0) + b"connectoid"
    await mallory.send_chunk(data(mallory, opening, kind=50))


async def begin_anew(mallory: End) -> None:
    """Send INIT with another number, as one that has restarted."""
    mallory.sctp._remote_verification_tag, tag = 0, mallory.sctp._remote_verification_tag
    await mallory.send_chunk(chunk(INIT, struct.pack("!LLHHL", 1, 0, 1, 1, 77)))
    mallory.sctp._remote_verification_tag = tag


async def send_cookies(mallory: End) -> None:
    """Send cookies that nobody has baked."""
    for size in (0, 24, 1_300):
        await mallory.send_chunk(chunk(COOKIE_ECHO, bytes(size)))


async def send_what_is_of_no_use(mallory: End) -> None:
    """Send chunks out of their turn, and some that aiortc does not know."""
    for kind in (COOKIE_ACK, SHUTDOWN_ACK, SHUTDOWN_COMPLETE, ERROR, AUTH, ASCONF, 0x3F, 0xFF):
        await mallory.send_chunk(chunk(kind, parameter(bytes(1_300))))


async def send_large_heartbeats(mallory: End) -> None:
    """Send heartbeats that are answered with as much."""
    for size in (0, 1_400, 1_439):
        await mallory.send_chunk(chunk(HEARTBEAT, parameter(bytes(size))))


async def acknowledge_again(mallory: End) -> None:
    """Say once more that the channel was opened."""
    await mallory.sctp._send(mallory.peer.channel.id, 50, b"\x02")


async def ask_for_streams(mallory: End) -> None:
    """Ask for more streams, and end such as there are none of."""
    for number in range(20):
        value = struct.pack("!LHH", number, 65_535, 0)
        await mallory.send_chunk(chunk(RECONFIG, parameter(value, 17)))
        value = struct.pack("!LLLHH", number, 0, mallory.sctp._local_tsn - 1, 7, 9)
        await mallory.send_chunk(chunk(RECONFIG, parameter(value, OF_STREAMS)))


async def nothing() -> None:
    """Do nothing."""


Act = Callable[[End], Awaitable[None]]


@pytest.mark.sockets
@pytest.mark.parametrize("act", [end_the_stream, end_the_stream_later, shut_down, abort])
def test_channel_that_the_other_end_leaves_is_closed_at_once(act: Act) -> None:
    """However long the other end takes for it, whoever sends hears of it."""

    async def play(ends: TwoEnds) -> None:
        alice = ends.alice
        channel = alice.peer.channel
        # Nothing is confirmed, so that a message waits for room.
        ends.mallory.sctp._send_sack = nothing
        waiting = asyncio.gather(
            *(alice.adapter.write(1, 1, bytes(65_536)) for _ in range(20)), return_exceptions=True)
        await asyncio.sleep(0)
        await act(ends.mallory)
        await alice.reported("closed")
        assert "refused" not in alice.events
        assert channel.readyState == "closed"
        assert [type(one) for one in await waiting][-1] is ConnectionError
        with pytest.raises(ConnectionError, match="the channel is closed"):
            await alice.adapter.write(1, 1, "Hello")

    run_two_ends(play)


@pytest.mark.sockets
@pytest.mark.parametrize("act", [send_no_text, send_of_no_kind, open_again])
def test_message_that_aiortc_fails_at_or_drops_is_refused(act: Act) -> None:
    async def play(ends: TwoEnds) -> None:
        await act(ends.mallory)
        await ends.alice.reported("refused")

    run_two_ends(play)


@pytest.mark.sockets
@pytest.mark.parametrize("act", [
    begin_anew, send_cookies, send_what_is_of_no_use, send_large_heartbeats, acknowledge_again,
    ask_for_streams])
def test_what_changes_nothing_is_let_pass_and_the_channel_goes_on(act: Act) -> None:
    async def play(ends: TwoEnds) -> None:
        await act(ends.mallory)
        for sender, reader in ((ends.mallory, ends.alice), (ends.alice, ends.mallory)):
            await sender.adapter.write(1, 1, bytes(65_536))
            assert await reader.receive() == bytes(65_536)
        assert ends.alice.events == ["gathered", "opened"]
        assert ends.alice.peer.connection.sctp.transport._ssl.pending() == 0

    run_two_ends(play)


# -- Packets -------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "good"), [(0, False), (3, False), (4, True), (5, False)])
def test_chunk_has_its_header_and_ends_in_its_packet(length: int, good: bool) -> None:
    packet = HEAD + chunk(14, length=length)
    if good:
        assert read_chunks(packet) == [(14, b"")]
    else:
        with pytest.raises(BadPacketError, match="a wrong length"):
            read_chunks(packet)


@pytest.mark.parametrize("packet", [b"", HEAD, HEAD + b"\3\0\0"])
def test_packet_without_a_chunk_is_refused(packet: bytes) -> None:
    with pytest.raises(BadPacketError, match="no chunk"):
        read_chunks(packet)


def test_control_chunks_in_a_packet_are_bounded_and_data_is_not() -> None:
    ack = chunk(11)
    much = chunk(DATA, bytes(12) + b".") * 60
    for count in (MAX_CONTROL_CHUNKS - 1, MAX_CONTROL_CHUNKS):
        assert len(read_chunks(HEAD + ack * count + much)) == count + 60
    with pytest.raises(BadPacketError, match="too many chunks"):
        read_chunks(HEAD + ack * (MAX_CONTROL_CHUNKS + 1))


def test_nothing_stands_beside_init() -> None:
    init = chunk(INIT, bytes(16))
    assert len(read_chunks(HEAD + init)) == 1
    with pytest.raises(BadPacketError, match="beside INIT"):
        read_chunks(HEAD + init + chunk(11))


@pytest.mark.parametrize(
    ("kind", "least"), [(DATA, 13), (INIT, 16), (INIT_ACK, 16), (SACK, 12), (SHUTDOWN, 4)])
def test_chunk_has_what_aiortc_reads_of_it(kind: int, least: int) -> None:
    assert [is_good(kind, bytes(size)) for size in (0, least - 1, least)] == [False, False, True]


def test_forward_tsn_is_refused_with_and_without_streams() -> None:
    assert not is_good(FORWARD_TSN, bytes(4))
    assert not is_good(FORWARD_TSN, bytes(8))


# -- Parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [INIT, INIT_ACK, HEARTBEAT, HEARTBEAT_ACK, ABORT, ERROR, RECONFIG])
def test_parameter_has_its_header_and_ends_in_its_chunk(kind: int) -> None:
    before = bytes(16 * (kind in (INIT, INIT_ACK)))

    def good(length: int) -> bool:
        return is_good(kind, before + parameter(b"1234", length=length))

    assert [good(length) for length in (0, 3, 9, 65_535)] == [False] * 4
    assert good(8)
    assert is_good(kind, before + parameter(length=4))


def test_parameters_of_a_chunk_are_bounded() -> None:
    for most, kind in ((MAX_PARAMETERS, HEARTBEAT), (MAX_RECONFIG_PARAMETERS, RECONFIG)):
        good = [is_good(kind, parameter() * count) for count in (most - 1, most, most + 1)]
        assert good == [True, True, False]


@pytest.mark.parametrize(("kind", "least"), [(13, 12), (16, 8), (17, 8), (99, 0)])
def test_reconfig_has_what_aiortc_reads_of_it(kind: int, least: int) -> None:
    sizes = (least, least + 2, least + 1)
    assert [is_good(RECONFIG, parameter(bytes(size), kind)) for size in sizes] == [
        True, True, False]
    if least:
        assert not is_good(RECONFIG, parameter(bytes(least - 2), kind))


# -- SACK ----------------------------------------------------------------------------------

# Numbers go round at 2^32.
TSN = 2**32 - 5


@pytest.mark.parametrize("end", [9, 10, 11])
def test_gap_block_ends_where_what_was_sent_ends(end: int) -> None:
    assert is_good_sack(sack(TSN, (2, end)), (TSN + 10) % 2**32) == (end <= 10)


@pytest.mark.parametrize("ahead", [-1, 0, 1])
def test_sack_goes_no_further_than_what_was_sent(ahead: int) -> None:
    assert is_good_sack(sack((TSN + 10 + ahead) % 2**32), (TSN + 10) % 2**32) == (ahead <= 0)


@pytest.mark.parametrize(
    ("gaps", "good"),
    [
        ([(1, 4), (5, 10)], True),
        # aiortc sorts numbers that go round like others.
        ([(5, 8), (2, 3)], True),
        ([(0, 4)], False),
        ([(4, 3)], False),
        ([(1, 6), (1, 6)], False),
        ([(1, 10), (10, 10)], False),
        ([(0, 65_535)], False),
    ],
)
def test_gap_blocks_hold_no_more_than_was_sent(gaps: list[tuple[int, int]], good: bool) -> None:
    assert is_good_sack(sack(TSN, *gaps), (TSN + 10) % 2**32) == good


def test_sack_has_as_many_blocks_as_it_says() -> None:
    assert is_good_sack(sack(0, (2, 2), count=1), 10)
    assert not is_good_sack(sack(0, (2, 2), count=2), 10)


# -- aiortc --------------------------------------------------------------------------------


class FakeDtls:
    """What aiortc's SCTP runs over, without another end."""

    state = "connected"


class FakeAssociation:
    """What the gate needs of an association of aiortc, with a window that grows."""

    State = sctp.RTCSctpTransport.State

    def __init__(self, window_bytes: int) -> None:
        self._association_state = self.State.ESTABLISHED
        self._cwnd = window_bytes
        self._data_channel_inbound_reset: set[int] = set()
        self._data_channels: dict[int, object] = {}
        self._local_tsn = 0

    async def _handle_data(self, _packet: bytes) -> None:
        self._cwnd *= 2

    def _flight_size_increase(self, _chunk: object) -> None:
        """Do nothing."""


@pytest.mark.sockets
@pytest.mark.parametrize("more", [-2, 0, 2])
def test_other_end_has_us_keep_so_much_and_no_more(more: int) -> None:
    """Whoever confirms all for a while, and then nothing, would decide it."""
    association = FakeAssociation(MAX_UNCONFIRMED_BYTES // 2 + more // 2)
    gate = SctpGate(association, lambda: pytest.fail("refused"))
    asyncio.run(gate.handle(HEAD + chunk(HEARTBEAT_ACK)))
    assert association._cwnd == MAX_UNCONFIRMED_BYTES + min(more, 0)


@pytest.mark.sockets
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_small_message_that_is_not_confirmed_counts_as_a_larger_one(more: int) -> None:
    """Each SACK walks over all of them, however small they are."""
    size = LEAST_COUNTED_BYTES + more
    made = sctp.DataChunk()
    made._book_size = size
    made._in_flight = False

    async def count() -> int:
        association = sctp.RTCSctpTransport(FakeDtls())
        guard_sctp(association, lambda: pytest.fail("refused"))
        association._flight_size_increase(made)
        counted: int = association._flight_size
        association._flight_size_decrease(made)
        assert association._flight_size == 0
        return counted

    assert asyncio.run(count()) == max(size, LEAST_COUNTED_BYTES)


def test_packet_has_one_sack() -> None:
    one = chunk(SACK, sack(0))
    assert len(read_chunks(HEAD + one + chunk(DATA, bytes(12) + b"."))) == 2
    with pytest.raises(BadPacketError, match="several SACKs"):
        read_chunks(HEAD + one + one)


@pytest.mark.sockets
def test_aiortc_has_the_names_that_the_gate_needs() -> None:
    """With others it would see everything; the attacks above then hold up the test."""

    async def names() -> list[bool]:
        connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration([]))
        connection.createDataChannel("connectoid")
        found = [hasattr(connection.sctp, name) for name in NEEDED]
        await connection.close()
        return found

    assert asyncio.run(names()) == [True] * len(NEEDED)


def test_aiortc_makes_chunks_that_the_gate_takes() -> None:
    """One of each kind, as it writes them itself."""
    init = sctp.InitChunk()
    init.params = [(sctp.SCTP_PRSCTP_SUPPORTED, b""), (sctp.SCTP_SUPPORTED_CHUNK_EXT, b"\xc0\x82")]
    reset = sctp.ReconfigChunk()
    reset.params = [(13, bytes(sctp.StreamResetOutgoingParam(1, 2, 3, [1])))]
    error = sctp.ErrorChunk()
    error.params = [(sctp.SCTP_CAUSE_STALE_COOKIE, bytes(8))]
    for made in (init, reset, error, sctp.AbortChunk(), sctp.CookieAckChunk()):
        (found,) = read_chunks(sctp.serialize_packet(5_000, 5_000, 1, made))
        check_chunk(*found)


def test_another_aiortc_is_left_as_it_is() -> None:
    guard_sctp(object(), list)
