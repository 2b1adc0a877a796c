"""Reassembly: fragments of the other end, in their order, as whole messages.

aiortc keeps fragments until a message is whole, however many come, and looks at all of them for
each new one. It makes a data channel for whoever asks for one, again and again. So a contact could
hold up the loop with a few bytes a second, or eat the memory. And where the numbers of fragments go
round, it waits for ever for one that is there: the first of an order is not the smallest.

A connection of ours has one data channel, ordered and reliable, and `sctp_gate` lets one stream
through. So the order of fragments is that of messages, and each is looked at once: it is the next,
or waits until it is, or has come before.

aiortc has no setting for that, so its SCTP transport is given methods that do it. Where another
version of aiortc has other names, only whole messages are judged, by the runner.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack
from typing import Any

from connectoid.limits import MAX_CHANNEL_BYTES

CHANNEL_LABEL = "connectoid"

# Of fragments that came before one that was lost on its way. The 1 MiB that aiortc says it takes
# are 874 of 1,200 bytes. What is more is not taken, as by any SCTP without room, and comes again.
MAX_EARLY_FRAGMENTS = 1_024
# Of these, runs without a gap. A SACK has four bytes for each, and has to go out in one packet of
# 1,189 bytes, as all of aiortc: of a larger one a part stays in OpenSSL, and becomes more.
MAX_EARLY_RUNS = 256
# Fragments that came again since the last SACK, which has four bytes for each of them too.
MAX_DUPLICATES = 32

# Flags of a DATA chunk: RFC 9260, section 3.3.1.
LAST = 0x01
FIRST = 0x02
UNORDERED = 0x04

# The numbers of fragments and of messages go round.
TSNS = 2**32
STREAM_SEQS = 2**16

# The protocol of those who open data channels, and their message for it: RFC 8832, section 5.1.
DCEP = 50
OPEN = 3
# What is before priority and reliability, and what is after them: an ordered and reliable channel
# with our label, and without a protocol of its own.
OPEN_BEGIN = pack("!BB", OPEN, 0)
OPEN_END = pack("!HH", len(CHANNEL_LABEL), 0) + CHANNEL_LABEL.encode()

# What a message is: RFC 8831, section 8. Text and octets, and those without any. aiortc drops a
# message of any other kind without a word.
TEXT = 51
OCTETS = 53
NO_TEXT = 56
NO_OCTETS = 57
KINDS = {DCEP, TEXT, OCTETS, NO_TEXT, NO_OCTETS}

NEEDED = (
    "_receive_data_chunk", "_data_channel_receive", "_reset_deferred_streams", "_advertised_rwnd",
    "_last_received_tsn", "_sack_duplicates", "_sack_misordered", "_sack_needed")


class EarlyFragments:
    """Fragments that came before one that was lost, by their numbers."""

    def __init__(self) -> None:
        self.by_tsn: dict[int, Any] = {}
        self._runs = 0

    def has_room(self, tsn: int) -> bool:
        """Return whether one more can be kept."""
        if len(self.by_tsn) >= MAX_EARLY_FRAGMENTS:
            return False
        return self._runs + 1 - self._neighbours(tsn) <= MAX_EARLY_RUNS

    def add(self, fragment: Any) -> None:
        """Keep one that is new."""
        self._runs += 1 - self._neighbours(fragment.tsn)
        self.by_tsn[fragment.tsn] = fragment

    def take(self, tsn: int) -> Any:
        """Return a fragment that is the next now, None if it has not come."""
        fragment = self.by_tsn.pop(tsn, None)
        if fragment is not None:
            self._runs -= 1 - self._neighbours(tsn)
        return fragment

    def _neighbours(self, tsn: int) -> int:
        """Return how many runs end or begin beside a number: it would join them."""
        return sum((tsn + step) % TSNS in self.by_tsn for step in (-1, 1))


class Message:
    """The message that is coming."""

    def __init__(self) -> None:
        self.octets = bytearray()
        self._has_begun = False
        self._stream_seq = 0

    def add(self, fragment: Any) -> bool:
        """Take the next fragment; return whether it is one of this message."""
        is_first = bool(fragment.flags & FIRST)
        if is_first == self._has_begun or fragment.stream_seq != self._stream_seq:
            return False
        self._has_begun = True
        self.octets += fragment.user_data
        return True

    def end(self) -> bytes:
        """Return the message that is whole, and begin the next one."""
        octets = bytes(self.octets)
        self.octets.clear()
        self._has_begun = False
        self._stream_seq = (self._stream_seq + 1) % STREAM_SEQS
        return octets


class AssociationBound:
    """Take what comes over one SCTP association, until it breaks a rule."""

    def __init__(
        self, transport: Any, refuse: Callable[[], object], refuse_size: Callable[[], object], *,
        may_open: bool,
    ) -> None:
        self._transport = transport
        self._refuse = refuse
        self._refuse_size = refuse_size
        # Whether the other end is still to open the channel.
        self._may_open = may_open
        self._is_over = False
        self._early = EarlyFragments()
        self._message = Message()
        self._take_message = transport._data_channel_receive
        # What aiortc writes into SACKs.
        transport._sack_misordered = self._early.by_tsn

    async def receive_data(self, fragment: Any) -> None:
        """Take a fragment, have it come again, or refuse it and all that follow."""
        if self._is_over:
            return
        transport = self._transport
        transport._sack_needed = True
        ahead = (fragment.tsn - transport._last_received_tsn) % TSNS
        if fragment.flags & UNORDERED:
            self._end(self._refuse)
        elif not 0 < ahead < TSNS // 2 or fragment.tsn in self._early.by_tsn:
            # It has come before.
            if len(transport._sack_duplicates) < MAX_DUPLICATES:
                transport._sack_duplicates.append(fragment.tsn)
        elif ahead == 1:
            transport._advertised_rwnd -= len(fragment.user_data)
            await self._take_next(fragment)
        elif self._early.has_room(fragment.tsn):
            transport._advertised_rwnd -= len(fragment.user_data)
            self._early.add(fragment)

    async def _take_whole(self, stream_id: int, protocol: int, message: bytes) -> None:
        """Give a whole message to aiortc, if it is of a kind that there is on our channel."""
        is_good = protocol in KINDS
        if protocol == TEXT:
            is_good = _is_text(message)
        elif protocol == DCEP and message[:1] == OPEN_BEGIN[:1]:
            is_good = self._may_open and _opens_ours(message)
            self._may_open = False
        if is_good:
            await self._take_message(stream_id, protocol, message)
        else:
            self._end(self._refuse)

    async def _take_next(self, fragment: Any) -> None:
        """Take the next fragment, and those that have waited for it."""
        while fragment is not None and not self._is_over:
            self._transport._last_received_tsn = fragment.tsn
            await self._add(fragment)
            fragment = self._early.take((fragment.tsn + 1) % TSNS)
        # The other may have asked to end its stream once all of this is there.
        await self._transport._reset_deferred_streams()

    async def _add(self, fragment: Any) -> None:
        """Add a fragment to its message, and take that if it is whole now."""
        if not self._message.add(fragment):
            self._end(self._refuse)
        elif len(self._message.octets) > MAX_CHANNEL_BYTES:
            self._end(self._refuse_size)
        elif fragment.flags & LAST:
            message = self._message.end()
            self._transport._advertised_rwnd += len(message)
            await self._take_whole(fragment.stream_id, fragment.protocol, message)

    def _end(self, refuse: Callable[[], object]) -> None:
        """Take no more, and say so once."""
        if not self._is_over:
            self._is_over = True
            refuse()


def bound_association(
    transport: Any, refuse: Callable[[], object], refuse_size: Callable[[], object], *,
    may_open: bool,
) -> None:
    """Have `refuse` called, once, when the other end goes too far: `refuse_size` for a message.

    `may_open`: the other end opens the channel, not this one.
    """
    if all(hasattr(transport, name) for name in NEEDED):
        bound = AssociationBound(transport, refuse, refuse_size, may_open=may_open)
        transport._receive_data_chunk = bound.receive_data


def _opens_ours(message: bytes) -> bool:
    """Return whether a DCEP OPEN is of the channel that CHANNEL-1 wants."""
    return message.startswith(OPEN_BEGIN) and message[8:] == OPEN_END


def _is_text(message: bytes) -> bool:
    """Return whether a message is UTF-8."""
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True
