"""Test the installer; deploy/install_test.sh tries it in a Debian of its own: make install-test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import ROOT, needs, skip_without

SCRIPTS = sorted((ROOT / "deploy").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_one_that_any_shell_reads(script: Path) -> None:
    for words in (["dash"], ["bash"], ["busybox", "ash"]):
        if shutil.which(words[0]):
            subprocess.run([*words, "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        finished = subprocess.run(
            ["shellcheck", str(script)], capture_output=True, text=True, check=False
        )
        assert finished.stdout == ""
    assert "\nset -eu\n" in script.read_text()


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        ([], 2, "usage: "),
        (["nonsense"], 2, "usage: "),
        (["remove", "--all"], 2, "what is --all?"),
        (["install", "--flags"], 2, "--flags needs a text"),
        (["upgrade", "--purge"], 2, "what is --purge?"),
    ],
)
def test_installer_does_nothing_when_it_is_used_wrongly(
    words: list[str], code: int, complaint: str
) -> None:
    finished = subprocess.run(
        ["sh", "deploy/install.sh", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == code
    assert complaint in finished.stderr


def test_installer_does_nothing_unless_root_runs_it() -> None:
    user = []
    if os.geteuid() == 0:
        skip_without("setpriv")
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    # Such a user may not be able to read the script in its place.
    script = (ROOT / "deploy" / "install.sh").read_text()
    finished = subprocess.run(
        [*user, "sh", "-s", "install"],
        input=script,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr == "install.sh: only root can do this: use sudo\n"


@pytest.mark.slow
@needs("debootstrap")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_trial_of_the_installer_that_is_told_to_stop_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        ["sh", "deploy/install_test.sh"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    # Wait until debootstrap is at work.
    while not list(tmp_path.glob("*/root.part")):
        assert process.poll() is None
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "install_test.sh: debootstrap; a minute or two\n"
    assert process.returncode == 1
    assert os.listdir(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        # A process may have ended just now.
        with contextlib.suppress(OSError):
            assert str(tmp_path) not in file.read_text(errors="replace")


def test_installer_tells_its_usage() -> None:
    finished = subprocess.run(
        ["sh", "deploy/install.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert finished.stdout.startswith(
        "usage: install.sh install [--flags TEXT] | upgrade | remove [--purge]\n"
    )
