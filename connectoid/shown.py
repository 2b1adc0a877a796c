"""Texts from outside, as people may see them: in a terminal, a log, the sentence of an error.

Whoever sends a text decides what is in it: the end of a line and a second, forged one; a command to
the terminal; a direction of writing that turns a name round; blanks until the line breaks.
"""

from __future__ import annotations

import re

# Two or three lines of a terminal.
MAX_SHOWN_CHARS = 200
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
# Those of Unicode, the tab, and letters and symbols that look like nothing: two fillers of Hangul
# in three widths, and the empty pattern of Braille.
_BLANKS = re.compile(
    "[\t \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\u115f\u1160\u2800\u3164\uffa0]+")


def shown(text: str, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """Return a text from outside as a part of one line, of at most so many characters.

    Blanks are folded, and what is not printed is replaced. The middle of a long text is left out:
    the end of a file's name says what it is.
    """
    line = _BLANKS.sub(" ", _shortened(text, max_chars))
    return "".join(map(_printable, line)).strip()


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    tail = max_chars // 3
    head = max_chars - tail - len(ELLIPSIS)
    return text[:head] + ELLIPSIS + text[len(text) - tail:]


def _printable(char: str) -> str:
    if char.isprintable():
        return char
    return UNPRINTABLE
