"""What others send is shown as a part of one line: the same cases as js/tests/test_shown.mjs."""

from __future__ import annotations

import json

import pytest

from connectoid import shown
from connectoid.cli.telling import Teller
from connectoid.shown import MAX_GRAPHEME_CHARS, MAX_SHOWN_CHARS, cut_before

CASES = {
    "": "",
    "Straße 1": "Straße 1",
    " a \t b ": "a b",
    "a\u00a0\u2003\u2800\u3164\u115f\u1160\uffa0b": "a b",
    "a\u200b\u200b\u200d\ufeffb\u2060": "a b",
    "a\tb": "a b",
    "a\nb\r\x1b[2J\x9b2J": "a\ufffdb\ufffd\ufffd[2J\ufffd2J",
    "a\u2028b\u2029c": "a\ufffdb\ufffdc",
    "\u202egpj.exe\u2066": "\ufffdgpj.exe\ufffd",
    "\u200d": "",
    "\ud800x": "\ufffdx",
    "🥕👍🏽": "🥕👍🏽",
    # Text of any script stays as it is.
    "10\u202fAM, 20\u00a0km, \ue000": "10\u202fAM, 20\u00a0km, \ue000",
    "\u0645\u06cc\u200c\u0634\u0648\u062f": "\u0645\u06cc\u200c\u0634\u0648\u062f",
    "\u0915\u094d\u200d\u0937": "\u0915\u094d\u200d\u0937",
    "👨\u200d👩\u200d👧": "👨\u200d👩\u200d👧",
    "\u05d0\u200f1": "\u05d0\u200f1",
}


@pytest.mark.parametrize(("text", "line"), CASES.items())
def test_text_from_outside_becomes_a_part_of_one_line(text: str, line: str) -> None:
    assert shown(text) == line
    assert shown(line) == line


@pytest.mark.parametrize("char", ["e", "🥕"])
@pytest.mark.parametrize("length", [
    MAX_SHOWN_CHARS - 1, MAX_SHOWN_CHARS, MAX_SHOWN_CHARS + 1])
def test_long_text_loses_its_middle(length: int, char: str) -> None:
    if length <= MAX_SHOWN_CHARS:
        assert shown(char * length) == char * length
        return
    head = MAX_SHOWN_CHARS - MAX_SHOWN_CHARS // 3 - 1
    line = shown(f"{char * (length - 1)}.")
    assert len(line) == MAX_SHOWN_CHARS
    assert line == f"{char * head}\u2026{char * (MAX_SHOWN_CHARS - head - 2)}."


# What people see as one character.
GRAPHEMES = ["e\u0301", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "\u0915\u093f"]


@pytest.mark.parametrize("grapheme", GRAPHEMES)
@pytest.mark.parametrize("shift", range(6))
def test_no_character_falls_apart_where_the_middle_is_left_out(grapheme: str, shift: int) -> None:
    line = shown("e" * shift + grapheme * MAX_SHOWN_CHARS)
    assert len(line) <= MAX_SHOWN_CHARS
    head, tail = line.split("\u2026")
    assert head[shift:] == grapheme * (len(head[shift:]) // len(grapheme))
    assert tail == grapheme * (len(tail) // len(grapheme))


@pytest.mark.parametrize("marks", [
    MAX_GRAPHEME_CHARS - 1, MAX_GRAPHEME_CHARS, MAX_GRAPHEME_CHARS + 1])
def test_letter_with_too_many_marks_is_cut(marks: int) -> None:
    text = "ab" + "\u0301" * marks
    cut = 1 if marks < MAX_GRAPHEME_CHARS else len(text) - 1
    assert cut_before(text, len(text) - 1) == cut


@pytest.mark.parametrize("text", ["\ud800", "\x9b2J", "\u202e", "\u00fc\n"])
def test_json_of_commands_is_ascii_and_whole(
    text: str, capsys: pytest.CaptureFixture[str],
) -> None:
    """A lone surrogate ends no command, a terminal obeys nothing, and scripts lose nothing."""
    Teller(as_json=True).say("line", "", contact=text, line=text)
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said) == {"event": "line", "contact": text, "line": text}
