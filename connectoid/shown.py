"""Texts from outside, as people may see them: in a terminal, a log, the sentence of an error.

Whoever sends a text decides what is in it: the end of a line and a second, forged one; a command to
the terminal; a direction of writing that turns a name round; blanks until the line breaks. Text of
any script stays as it is, with the joiners of its letters and emoji.
"""

from __future__ import annotations

import re
import unicodedata

# Two or three lines of a terminal.
MAX_SHOWN_CHARS = 200
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Control characters, lone surrogates, and what ends lines or changes the direction of text.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What looks like a blank or like nothing: the blanks of Unicode, what has no width, two fillers of
# Hangul in three widths, and the empty pattern of Braille. One alone may be part of a word.
_BLANK = (
    "[\t \u00a0\u115f\u1160\u1680\u2000-\u200d\u202f\u205f\u2060\u2800\u3000\u3164\ufeff\uffa0]")
_BLANKS = re.compile(f"{_BLANK}{{2,}}|\t|^{_BLANK}|{_BLANK}$")
ZERO_WIDTH_JOINER = "\N{ZERO WIDTH JOINER}"
# What changes the emoji before it: variants, skin tones and tags.
_MODIFIER = re.compile("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
# Two of these letters are a flag.
_FLAG_LETTERS = "".join(map(chr, range(0x1f1e6, 0x1f200)))
# Of one character as people see it: a family of four with skin tones has eleven. A letter with more
# marks than that is no text.
MAX_GRAPHEME_CHARS = 32


def shown(text: str, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """Return a text from outside as a part of one line, of at most so many characters.

    Blanks are folded, and what is not printed is replaced. The middle of a long text is left out:
    the end of a file's name says what it is.
    """
    line = _BLANKS.sub(" ", _shortened(text, max_chars))
    return UNPRINTABLE.sub(REPLACEMENT, line).strip(" ")


def cut_before(text: str, end: int) -> int:
    """Return the last place up to `end` where a cut leaves whole what people see as a character."""
    for place in range(end, max(0, end - MAX_GRAPHEME_CHARS), -1):
        if place == len(text) or not _is_inside(text, place):
            return place
    return end


def _is_inside(text: str, place: int) -> bool:
    """Return whether what is on both sides of a place is one character to people."""
    char = text[place]
    if char in _FLAG_LETTERS:
        return (place - len(text[:place].rstrip(_FLAG_LETTERS))) % 2 == 1
    is_mark = unicodedata.category(char).startswith("M")
    return is_mark or bool(_MODIFIER.match(char)) or text[place - 1] == ZERO_WIDTH_JOINER


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    tail = text[cut_before(text, len(text) - max_chars // 3):]
    head = cut_before(text, max(0, max_chars - len(tail) - len(ELLIPSIS)))
    return text[:head] + ELLIPSIS + tail
