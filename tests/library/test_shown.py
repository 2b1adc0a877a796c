"""What others send is shown as a part of one line: the same cases as js/tests/test_shown.mjs."""

from __future__ import annotations

import json

import pytest

from connectoid import shown
from connectoid.cli.telling import Teller
from connectoid.shown import MAX_SHOWN_CHARS

CASES = {
    "": "",
    "Straße 1": "Straße 1",
    " a \t b ": "a b",
    "a\u00a0\u2003\u2800\u3164\u115f\u1160\uffa0b": "a b",
    "a\nb\r\x1b[2J\x9b2J": "a\ufffdb\ufffd\ufffd[2J\ufffd2J",
    "a\u2028b\u2029c": "a\ufffdb\ufffdc",
    "\u202egpj.exe\u2066": "\ufffdgpj.exe\ufffd",
    "a\u200bb\ue000\ufeff": "a\ufffdb\ufffd\ufffd",
    "\ud800x": "\ufffdx",
    "🥕👍🏽": "🥕👍🏽",
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


@pytest.mark.parametrize("text", ["\ud800", "\x9b2J", "\u202e", "\u00fc\n"])
def test_json_of_commands_is_ascii_and_whole(
    text: str, capsys: pytest.CaptureFixture[str],
) -> None:
    """A lone surrogate ends no command, a terminal obeys nothing, and scripts lose nothing."""
    Teller(as_json=True).say("line", "", contact=text, line=text)
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said) == {"event": "line", "contact": text, "line": text}
