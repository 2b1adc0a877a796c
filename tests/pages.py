"""Read the documents for tests that type their commands and compare their tables."""

from __future__ import annotations

import re

from harness import ROOT

BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")


def page(name: str) -> str:
    """Return the text of a document."""
    return (ROOT / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of a page in a language, "" for those that name none."""
    return [block for its_language, block in BLOCK.findall(text) if its_language == language]


def rows_after(text: str, line: str) -> list[list[str]]:
    """Return the cells of the first table after a line, without its two head lines."""
    table = re.search(r"(?m)(^\|.*\n)+", text.partition(f"\n{line}\n")[2])
    assert table, line
    rows = table[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
