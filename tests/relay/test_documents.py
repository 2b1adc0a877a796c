"""Compare what the documents repeat of the relay with it, and type what they tell to type."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from harness import DEADLINE_S, ROOT, Owner, put_down_after
from pages import blocks, page, rows_after

import connectoid_relay
from connectoid_relay import (
    SOURCE_SHARE,
    Limits,
    Quota,
    Refusal,
    __version__,
    build_parser,
    read_access,
)

CHANGELOG, EMBEDDING, HOSTING, README = (
    page(name) for name in ("CHANGELOG.md", "docs/embedding.md", "docs/hosting.md", "README.md")
)


def test_key_file_of_the_docs_is_read(tmp_path: Path) -> None:
    (keys,) = blocks(HOSTING, "toml")
    (tmp_path / "keys.toml").write_text(keys, "utf-8")
    access = read_access(str(tmp_path / "keys.toml"))
    key, send_key = re.findall(r'key = "(.*)"', keys)
    assert access.quota_of(key) == Quota("keys.alice", 100_000, 50_000_000, 3600)
    assert access.quota_of(send_key, sends=True) == Quota(
        "keys.alice.send_key", 50_000, 50_000_000, 3600, in_links=True)
    assert access.quota_of(send_key) == Quota("public", 10_000, 0, 600)
    assert access.quota_of(None) == Quota("public", 10_000, 0, 600)


def test_deny_list_of_the_docs_is_read(tmp_path: Path, alice: Owner) -> None:
    (denied,) = [block for block in blocks(HOSTING, "") if block.startswith("# a source")]
    (tmp_path / "denied").write_text(denied, "utf-8")
    access = read_access(None, str(tmp_path / "denied"))
    assert access.denies("192.0.2.7")
    assert access.denies("198.51.100.9")
    assert not access.denies("192.0.2.8")
    with pytest.raises(Refusal, match="Forbidden"):
        access.check_box(alice.box)


def test_docs_have_the_flags_verbatim() -> None:
    flags = HOSTING.partition("\n## Flags\n")[2]
    shown, *_ = blocks(flags, "")
    assert shown.split() == build_parser().format_help().split()


def test_threat_model_has_the_limits_of_the_relay() -> None:
    rows = dict(rows_after(page("docs/threat-model.md"), "## The relay"))
    limits = Limits()
    assert "sealed messages for an hour; questions for a minute" in rows["The relay keeps"]
    assert (limits.message_ttl_s, limits.question_ttl_s) == (3_600, 60)
    assert "for 30 days after its last check" in rows["The relay keeps"]
    assert limits.box_ttl_s == 30 * 86_400
    assert "at most an eighth of it from one address" in rows["A stranger can"]
    assert SOURCE_SHARE == 8


def test_changelog_names_the_version() -> None:
    newest = CHANGELOG.partition("\n## ")[2]
    assert re.match(rf"{re.escape(__version__)}\b[^.]", newest)


def test_all_names_exist_and_have_docstrings() -> None:
    for name in connectoid_relay.__all__:
        written = getattr(connectoid_relay, name).__doc__
        assert written, name
        assert not written.startswith(f"{name}("), f"{name} has only what Python makes"


@pytest.mark.slow
def test_client_by_hand_of_the_docs_works_as_typed(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    shutil.copy(ROOT / "connectoid_relay.py", tmp_path)
    first, *_ = blocks(README, "sh")
    install, run = first.replace("'.[cli]'", "'cryptography>=47'").splitlines()
    subprocess.run(["bash", "-c", install], cwd=tmp_path, check=True)

    by_hand = EMBEDDING.partition("\n## A client by hand\n")[2]
    make_key, talk, *_ = blocks(by_hand, "sh")
    (shown,) = blocks(by_hand, "")
    typed = (make_key + talk).replace("8080", port).replace("curl ", "curl -sS ")
    relay = subprocess.Popen(
        ["bash", "-c", f"exec {run.replace('8080', port)}"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )
    with put_down_after(relay):
        assert relay.stderr is not None
        assert "listening on" in relay.stderr.readline()
        finished = subprocess.run(
            ["bash", "-c", typed],
            cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )
    assert finished.stderr == ""
    # A question is new each time, and the page shows only its beginning.
    question = re.compile(r'"question": "[^"]+"')
    assert question.sub("a question", finished.stdout) == question.sub("a question", shown)
