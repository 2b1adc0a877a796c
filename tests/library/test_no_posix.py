"""The library and the command line without what Windows lacks: no_posix.py hides it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import DEADLINE_S, ROOT, Process
from test_people import TERMINAL, People, Terminal

HIDE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "library")!r}]
import no_posix
no_posix.hide()
"""
CONTENT = os.urandom(300_000)


def run_hidden(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code without what Windows lacks."""
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], cwd=cwd, capture_output=True, text=True,
        timeout=DEADLINE_S, check=False)


@pytest.mark.parametrize("line", [
    "import fcntl", "from fcntl import flock", "import pwd, grp", "import os; os.O_NOFOLLOW",
    "from os import geteuid", "from socket import AF_UNIX", "import signal; signal.SIGHUP",
    "import time; time.clock_gettime(1)",
])
def test_unguarded_name_of_posix_is_an_error(line: str) -> None:
    """Only in a module of this project."""
    ran = run_hidden(f"exec({line!r}, {{'__name__': 'connectoid.a_module'}})")
    assert ran.returncode == 1
    assert "Windows has no" in ran.stderr or "cannot import name" in ran.stderr
    assert run_hidden(f"exec({line!r}, {{'__name__': 'another_package'}})").returncode == 0


def test_all_modules_of_the_library_are_imported() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "connectoid").rglob("*.py") if path.name != "__main__.py"]
    imports = "\n".join(f"import {module.removesuffix('.__init__')}" for module in modules)
    ran = run_hidden(f"{imports}\nprint('imported')")
    assert (ran.stdout, ran.stderr) == ("imported\n", "")


def test_relay_says_in_one_sentence_that_it_does_not_run_there(tmp_path: Path) -> None:
    for module in ("connectoid_relay", "connectoid_admin"):
        start = f"import {module}; sys.exit({module}.main(['--db', 'relay.db']))"
        ran = run_hidden(start, tmp_path)
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
        assert "POSIX" in ran.stderr
        assert "on Windows, run it in WSL" in ran.stderr
    assert [*tmp_path.iterdir()] == []


class HiddenTerminal(Terminal):
    """A command that runs without what Windows lacks."""

    program = HIDE + TERMINAL


@pytest.fixture
def people(tmp_path: Path, start: Callable[..., Process]) -> Iterator[People]:
    """Return Alice and Bob with a relay, which has all that POSIX has."""
    people = People(tmp_path, [f"http://127.0.0.1:{start().port}/"], HiddenTerminal)
    try:
        yield people
    finally:
        people.kill()


@pytest.mark.slow
def test_people_pair_chat_and_send_a_file(people: People, tmp_path: Path) -> None:
    people.pair()
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "chat", "Alice")
    bob.wait_for("connected")
    bob.type("Grüße 🔑")
    assert alice.wait_for("line")["line"] == "Grüße 🔑"
    # The lock of the store holds.
    second = people.run("Alice", "chat", "Bob")
    assert (second.end(), "end it first" in second.wait_for("error")["error"]) == (1, True)
    alice.popen.stdin.close() if alice.popen.stdin else None
    bob.wait_for("disconnected")
    assert [alice.end(), bob.end()] == [0, 0]
    (tmp_path / "Alice" / "film.bin").write_bytes(CONTENT)
    (tmp_path / "Bob" / "inbox").mkdir()
    sending = people.run("Alice", "send", "Bob", "film.bin")
    receiving = people.run("Bob", "receive", "Alice", "--yes", "--dir", "inbox")
    told = receiving.wait_for("received")
    assert [sending.end(), receiving.end()] == [0, 0]
    assert told["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert (tmp_path / "Bob" / "inbox" / "film.bin").read_bytes() == CONTENT
