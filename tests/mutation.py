"""Inputs that damage: seeds with edits, and bytes of no meaning.

An input is a seed and a list of edits, small numbers all, so that a failure shrinks to the few
edits that matter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from hypothesis import strategies as st


class Edit(NamedTuple):
    """A change: which kind, where (modulo the length), over how many bytes, with which piece."""

    kind: str
    where: int
    size: int
    piece: int


Change: TypeAlias = Callable[[bytes, int, int, bytes], bytes]

MAX_EDITS = 6
# Repeats of repeats would grow without end.
MAX_INPUT_BYTES = 1 << 16
# Of an input without meaning.
MAX_RANDOM_BYTES = 300


def tokens(octets: bytes) -> list[bytes]:
    """Return words and single other bytes."""
    return re.findall(rb"[A-Za-z0-9_-]+|\r\n|[^A-Za-z0-9_-]", octets, re.DOTALL)


def replace_token(octets: bytes, where: int, _size: int, piece: bytes) -> bytes:
    """Put a piece in the place of a token."""
    words = tokens(octets)
    return b"".join([*words[:where % len(words)], piece, *words[where % len(words) + 1:]])


def swap_tokens(octets: bytes, where: int, size: int, _piece: bytes) -> bytes:
    """Exchange two tokens."""
    words = tokens(octets)
    one = where % len(words)
    other = (where + size) % len(words)
    words[one], words[other] = words[other], words[one]
    return b"".join(words)


def replace_number(octets: bytes, where: int, size: int, _piece: bytes) -> bytes:
    """Replace a number, most of all with a length that does not fit its body."""
    places = list(re.finditer(rb"[0-9]+", octets))
    if not places:
        return octets
    place = places[where % len(places)]
    return octets[:place.start()] + b"%d" % size + octets[place.end():]


KINDS: Mapping[str, Change] = {
    "insert": lambda octets, where, size, piece: octets[:where] + piece + octets[where:],
    "delete": lambda octets, where, size, piece: octets[:where] + octets[where + size :],
    "repeat": lambda octets, where, size, piece: octets[: where + size] + octets[where:],
    "cut off": lambda octets, where, size, piece: octets[: where + 1],
    "flip": lambda octets, where, size, piece: (
        octets[:where] + bytes([octets[where] ^ 1 << size % 8]) + octets[where + 1 :]
    ),
    "byte": lambda octets, where, size, piece: (
        octets[:where] + bytes([size * 4 % 256]) + octets[where + 1 :]
    ),
    "case": lambda octets, where, size, piece: (
        octets[:where] + octets[where : where + size].swapcase() + octets[where + size :]
    ),
    "splice": lambda octets, where, size, piece: octets[:where] + piece[size * len(piece) // 65 :],
    "append": lambda octets, where, size, piece: octets + piece,
    "replace token": replace_token,
    "swap tokens": swap_tokens,
    "replace number": replace_number,
}


class Mutator(NamedTuple):
    """Make inputs of seeds: with these kinds of edits, and with these pieces."""

    kinds: Mapping[str, Change]
    pieces: Sequence[bytes]
    # Of the inputs that are drawn, those that are bytes without meaning.
    random_share: float = 0.05

    def mutate(self, octets: bytes, edits: Sequence[Edit]) -> bytes:
        """Return the octets after the edits."""
        for kind, where, size, piece in edits:
            if octets:
                change = self.kinds[kind]
                octets = change(octets, where % len(octets), size, self.pieces[piece])
                octets = octets[:MAX_INPUT_BYTES]
        return octets

    def draw(self, chance: random.Random, seeds: Sequence[bytes]) -> bytes:
        """Return an input: a seed with some edits, or bytes of no meaning."""
        if chance.random() < self.random_share:
            return chance.randbytes(chance.randrange(MAX_RANDOM_BYTES))
        seed = chance.choice(seeds)
        count = chance.randrange(MAX_EDITS + 1)
        return self.mutate(seed, [self._draw_edit(chance) for _ in range(count)])

    def strategy(self, seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
        """Return seeds with edits, and bytes of no meaning, for Hypothesis."""
        edits = st.lists(
            st.builds(
                Edit,
                st.sampled_from(sorted(self.kinds)),
                st.integers(0, 4_095),
                st.integers(0, 64),
                st.integers(0, len(self.pieces) - 1),
            ),
            max_size=MAX_EDITS,
        )
        return st.builds(self.mutate, st.sampled_from(seeds), edits) | st.binary(max_size=256)

    def _draw_edit(self, chance: random.Random) -> Edit:
        size = chance.choice((1, 1, 2, 8, chance.randrange(65)))
        kind = chance.choice(sorted(self.kinds))
        return Edit(kind, chance.randrange(1 << 20), size, chance.randrange(len(self.pieces)))
