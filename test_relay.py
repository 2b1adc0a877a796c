"""Test the relay."""
from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import connectoid_relay
from conftest import ROOT
from connectoid_relay import *
from connectoid_relay import (CONTEXTS, ERRORS, FORMS, MAX_DATA_CHARS, MAX_EXT_CHARS, MAX_BATCH_ITEMS, MAX_RECEIVE_MESSAGES, MAX_RECEIVE_CHARS, MAX_WAIT_S, build_parser, __version__)
# ---------------------------------------------------------------------------------------
# Documents: what they repeat of the code is compared with it, what they tell to type is
# typed.
# ---------------------------------------------------------------------------------------


def read_table(document: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading, without the head."""
    text = (ROOT / document).read_text("utf-8").partition(f"\n{heading}\n")[2]
    lines = list(itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda line: not line.startswith("|"), text.split("\n"))))
    assert len(lines) > 2, f"no table below {heading!r} in {document}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_error_table_is_that_of_the_code() -> None:
    rows = [(text.strip("`"), int(status)) for text, status, _ in read_table("PROTOCOL.md", "## Errors")]
    assert rows == sorted(((error.text, error.status) for error in ERRORS), key=lambda row: row[1])


def test_limits_table_is_that_of_the_code() -> None:
    rows = [(name.strip("`"), int(default.replace(",", "")), meaning)
            for name, default, meaning in read_table("PROTOCOL.md", "## Limits")]
    assert rows == [(limit.name, limit.default, limit.metadata["meaning"]) for limit in fields(Limits)]


def test_forms_table_is_that_of_the_code() -> None:
    rows = {name.strip("`"): form for name, form in read_table("PROTOCOL.md", "### Forms")}
    assert rows == {name: form for name, (_, form) in FORMS.items()}


def test_context_table_is_that_of_the_code() -> None:
    rows = {use: info.strip("`").encode() for use, info in read_table("PROTOCOL.md", "## Context strings")}
    assert rows == CONTEXTS


def test_fixed_limits_in_the_protocol_are_those_of_the_code() -> None:
    text = " ".join((ROOT / "PROTOCOL.md").read_text("utf-8").split())
    assert (f"`data` {MAX_DATA_CHARS:,} characters, `ext` {MAX_EXT_CHARS:,} code points, {MAX_BATCH_ITEMS} checks"
            f" in a batch, {MAX_RECEIVE_MESSAGES} messages and {MAX_RECEIVE_CHARS >> 10} KiB of `data` in a reply,"
            f" {MAX_WAIT_S} s of waiting") in text


def test_readme_has_the_flags_verbatim() -> None:
    shown = (ROOT / "README.md").read_text("utf-8").partition("## Flags\n\n```\n")[2].partition("```")[0]
    assert shown.split() == build_parser().format_help().split()


def test_changelog_names_the_version() -> None:
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_all_names_exist_and_have_docstrings() -> None:
    for name in connectoid_relay.__all__:
        assert getattr(connectoid_relay, name).__doc__, name


@pytest.mark.slow
def test_readme_session_works_as_typed(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    text = (ROOT / "README.md").read_text("utf-8").replace("8080", str(port))
    start_relay, make_key, talk = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[:3]
    (shown,) = re.findall(r"```\n(\{.*?)```", text, re.DOTALL)
    shutil.copy(ROOT / "connectoid_relay.py", tmp_path)
    with subprocess.Popen(["bash", "-c", start_relay], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            assert process.stderr is not None
            lines = itertools.takewhile(lambda line: "listening on" not in line, process.stderr)
            assert not any("rror" in line for line in lines)
            typed = subprocess.run(["bash", "-c", (make_key + talk).replace("curl ", "curl -sS ")], cwd=tmp_path,
                                   capture_output=True, text=True, timeout=60, check=False)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert typed.stderr == ""
    # A question is new each time, and README shows only its beginning.
    pattern = re.sub(r'"question": "[^"]+"', '"question": "…"', shown)
    assert re.sub(r'"question": "[^"]+"', '"question": "…"', typed.stdout) == pattern
