"""Compare PROTOCOL.md with the code, with the vectors, and with itself."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from rules_shown import BY_NAME

import connectoid
import connectoid_relay
from connectoid import CONNECTING, PAIRING, REASONS, Rule
from connectoid.messages import MEMBERS, UNNUMBERED
from connectoid_relay import (
    ERRORS,
    FORMS,
    MAX_BATCH_ITEMS,
    MAX_DATA_CHARS,
    MAX_EXT_CHARS,
    MAX_RECEIVE_CHARS,
    MAX_RECEIVE_MESSAGES,
    MAX_WAIT_S,
    METRICS,
    Limits,
    meanings,
)

PROTOCOL = (ROOT / "PROTOCOL.md").read_text("utf-8")
ONE_LINE = " ".join(PROTOCOL.split())

# ---------------------------------------------------------------------------------------
# Reading the page.
# ---------------------------------------------------------------------------------------


def table_after(mark: str) -> list[list[str]]:
    """Return the cells of the first table after a line, without its two head lines."""
    _, found, text = PROTOCOL.partition(f"\n{mark}\n")
    assert found, f"{mark!r} is not in PROTOCOL.md"
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def plain(cell: str) -> str:
    """Return a cell without the marks of code."""
    return cell.strip("`")


# ---------------------------------------------------------------------------------------
# What the page repeats of the relay.
# ---------------------------------------------------------------------------------------


def test_error_table_is_that_of_the_code() -> None:
    rows = [(plain(text), int(status)) for text, status, _ in table_after("## Errors")]
    errors = [(error.text, error.status) for error in ERRORS]
    assert rows == sorted(errors, key=lambda row: row[1])


def test_limits_table_is_that_of_the_code() -> None:
    rows = [(plain(name), int(default.replace(",", "")), meaning)
            for name, default, meaning in table_after("## Limits")]
    assert rows == [(name, getattr(Limits(), name), text)
                    for name, (text, _) in meanings().items()]


def test_forms_table_is_that_of_the_code() -> None:
    rows = {plain(name): form for name, form in table_after("### Forms")}
    assert rows == {name: form for name, (_, form) in FORMS.items()}


def test_metrics_table_is_that_of_the_code() -> None:
    rows = [tuple(plain(cell) for cell in row) for row in table_after("### Metrics")]
    assert rows == [(name, metric.type, metric.label, metric.meaning)
                    for name, metric in METRICS.items()]


def test_fixed_limits_in_the_protocol_are_those_of_the_code() -> None:
    sentence = (
        f"`data` {MAX_DATA_CHARS:,} characters, `ext` {MAX_EXT_CHARS:,} code points,"
        f" {MAX_BATCH_ITEMS} checks in a batch, {MAX_RECEIVE_MESSAGES} messages and"
        f" {MAX_RECEIVE_CHARS >> 10} KiB of `data` in a reply, {MAX_WAIT_S} s of waiting")
    assert sentence in ONE_LINE


# ---------------------------------------------------------------------------------------
# What the page repeats of the library.
# ---------------------------------------------------------------------------------------


def draw(table: Mapping[tuple[str, str], Rule]) -> str:
    """Return a table of states as the diagram in PROTOCOL.md."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for rule in table.values():
        for then in rule.then:
            arrows.setdefault((rule.state, then), []).append(rule.event)
    lines = [f"    {state} --> {then}: {', '.join(events)}"
             for (state, then), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


@pytest.mark.parametrize("table", [PAIRING, CONNECTING], ids=["pairing", "connecting"])
def test_states_in_the_protocol_are_those_of_the_code(
        table: Mapping[tuple[str, str], Rule]) -> None:
    assert draw(table) in PROTOCOL


def test_context_strings_in_the_protocol_are_those_of_the_code() -> None:
    rows = {use: plain(info).encode() for use, info in table_after("## Context strings")}
    assert rows == connectoid.CONTEXTS
    assert rows.items() >= connectoid_relay.CONTEXTS.items()


def test_types_and_their_members_in_the_protocol_are_those_of_the_code() -> None:
    rows = table_after("and, by its type, from one side only:")
    assert {plain(row[0]) for row in rows} == MEMBERS.keys()
    for cell, _, _, members, counts in rows:
        kind = plain(cell)
        named = set(re.findall(r"`(nonce|r|sdpOffer|sdpAnswer|versions|app|next|proof)`", members))
        assert named == MEMBERS[kind].keys() - {"re"}, kind
        assert (counts == "no") == (kind in UNNUMBERED)


def test_reasons_in_the_protocol_are_those_of_the_code() -> None:
    text = PROTOCOL.partition("### Reading a message\n")[2].partition("### Pairing")[0]
    reasons = re.findall(r"^\| (?:READ|SDP)-\d+ \| `(\w+)` \|", text, re.MULTILINE)
    assert set(reasons) == REASONS.keys() - {"channel"}


def test_who_can_do_what_stands_in_the_docs_as_in_the_protocol() -> None:
    section = PROTOCOL.partition("### Threat model\n\n")[2]
    table = section.partition("\n\n")[0]
    assert table.startswith("| attacker | can | cannot |\n")
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert any(table in page.read_text("utf-8") for page in pages)


# ---------------------------------------------------------------------------------------
# The rules and their numbers.
# ---------------------------------------------------------------------------------------

VECTORS = ROOT / "vectors"
RULE = re.compile(r"(?:- \*\*|\| )([A-Z]+)-(\d+)(?:\*\* | \| )")
KEY_WORD = re.compile(r"\b(?:MUST|SHOULD)\b")


def numbered() -> list[tuple[str, int]]:
    """Return the rules of the page in order, as section and number."""
    found = [RULE.match(line) for line in PROTOCOL.splitlines()]
    return [(rule[1], int(rule[2])) for rule in found if rule]


def sections() -> dict[str, list[int]]:
    """Return the numbers of each section, in order."""
    numbers: dict[str, list[int]] = {}
    for section, number in numbered():
        numbers.setdefault(section, []).append(number)
    return numbers


RULES = {f"{section}-{number}" for section, number in numbered()}


def statements() -> list[str]:
    """Return the paragraphs, items and rows of the page after its introduction."""
    text = PROTOCOL.partition("\n## Conventions\n")[2]
    return re.split(r"\n\n|\n(?=- |\d+\. |\|)", text)


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Return every case of the vectors, with the file that it is in."""
    found = []
    for path in sorted(VECTORS.glob("*/*.json")):
        file = path.relative_to(VECTORS).as_posix()
        value = json.loads(path.read_text("utf-8"))
        if file == "library/emoji.json":
            continue
        if file == "relay/questions.json":
            listed = value["open"] + value["must_not_open"]
        elif file.startswith("relay/"):
            listed = [value]
        else:
            listed = value["cases"]
        found += [(file, case) for case in listed]
    return found


CASES = cases()
SHOWN = {rule for _, case in CASES for rule in case["shows"]}


def test_rules_are_numbered_without_a_gap() -> None:
    """A rule that came later stands where it belongs, with the next number."""
    for section, numbers in sections().items():
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), section


def test_obligations_have_a_number() -> None:
    loose = [text for text in statements() if KEY_WORD.search(text) and not RULE.match(text)]
    assert loose == []


def test_rules_are_obligations() -> None:
    weak = [text for text in statements()
            if text.startswith("- **") and RULE.match(text) and not KEY_WORD.search(text)]
    assert weak == []


def test_rules_that_the_page_refers_to_exist() -> None:
    named = set(re.findall(r"\b[A-Z]{2,}-\d+\b", PROTOCOL))
    others = {"SHA-256", "SHA-384", "HMAC-SHA256", "AES-256", "UTF-8"}
    assert {name for name in named - RULES if name not in others} == set()


def test_vectors_name_rules_that_exist() -> None:
    for file, case in CASES:
        name = case.get("name", case.get("title"))
        assert case["shows"], (file, name)
        assert set(case["shows"]) <= RULES, (file, name)
        assert len(set(case["shows"])) == len(case["shows"]), (file, name)


def test_names_that_say_more_are_those_of_cases() -> None:
    names: dict[str, set[str]] = {}
    for file, case in CASES:
        names.setdefault(Path(file).stem, set()).add(case.get("name", ""))
    for file, known in BY_NAME.items():
        for pattern in known:
            assert fnmatch.filter(names[file], pattern), (file, pattern)


def ranges(numbers: list[int]) -> str:
    """Return numbers in order as text, with the first and the last of those in a row."""
    rows: list[list[int]] = []
    for number in numbers:
        if rows and rows[-1][-1] == number - 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    return ", ".join(str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows)


def draw_coverage() -> str:
    """Return the table of vectors/README.md that says which rules have no vector."""
    lines = ["| rules | how many | with vectors | without |", "|---|---|---|---|"]
    for section, numbers in sections().items():
        without = [number for number in numbers if f"{section}-{number}" not in SHOWN]
        shown = len(numbers) - len(without)
        lines.append(f"| {section} | {len(numbers)} | {shown} | {ranges(without)} |")
    lines.append(f"| all | {len(RULES)} | {len(SHOWN)} | {len(RULES - SHOWN)} |")
    return "\n".join(lines)


def test_readme_of_the_vectors_says_which_rules_have_none() -> None:
    assert draw_coverage() in (VECTORS / "README.md").read_text("utf-8")


def test_order_of_implementation_names_every_file_of_vectors() -> None:
    order = PROTOCOL.partition("\n## Order of implementation\n")[2]
    patterns = set(re.findall(r"`((?:library|relay)/[^`]+)`", order))
    files = {path.relative_to(VECTORS).as_posix() for path in VECTORS.glob("*/*.json")}
    found = {pattern: set(fnmatch.filter(files, pattern)) for pattern in patterns}
    assert [pattern for pattern in patterns if not found[pattern]] == []
    assert set().union(*found.values()) == files


def test_links_within_the_page_name_its_sections() -> None:
    headings = set(re.findall(r"^#+ (.*)$", PROTOCOL, re.MULTILINE))
    named = set(re.findall(r"\*([A-Z][A-Za-z ]+|send|check|receive|hello)\*(?!\*)", PROTOCOL))
    assert named - headings == set()


# ---------------------------------------------------------------------------------------
# What code and documents say about the page.
# ---------------------------------------------------------------------------------------

PLACES = ("*.py", "*.md", "connectoid/**/*.py", "deploy/**/*.py", "docs/*.md", "examples/**/*.js",
          "js/*.js", "js/contact/*.js", "js/tests/*.mjs", "tests/**/*.py", "vectors/*.md")
QUOTED = re.compile(r'PROTOCOL\.md,((?:\s*(?://|#|\*)?\s*,?\s*"[A-Z a-z]+")+)')


def written_about() -> dict[str, str]:
    """Return the texts of the repository that may name a section or a rule, by file."""
    paths = {path for place in PLACES for path in ROOT.glob(place)}
    texts = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: path.read_text("utf-8") for name, path in texts.items()
            if "node_modules" not in name and name != "PROTOCOL.md"}


def test_sections_that_code_and_documents_quote_exist() -> None:
    headings = set(re.findall(r"^#+ (.*)$", PROTOCOL, re.MULTILINE))
    quoted = {(file, section) for file, text in written_about().items()
              for found in QUOTED.findall(text)
              for section in re.findall(r'"([^"]+)"', found)}
    assert len(quoted) > 10
    assert [(file, section) for file, section in quoted if section not in headings] == []


def test_rules_that_code_and_documents_name_exist() -> None:
    rule = re.compile(rf"\b(?:{'|'.join(sections())})-\d+\b")
    named = {(file, name) for file, text in written_about().items() for name in rule.findall(text)}
    assert [(file, name) for file, name in named if name not in RULES] == []
