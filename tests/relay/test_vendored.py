"""Copy the relay and its test to an empty folder, as programs do that carry the relay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import LONG_DEADLINE_S, ROOT

# Runs the tests in a program that may open no socket and start no other, with the copy that
# lies beside them.
RUN = """
import sys

def refuse(event, _arguments):
    if event in {"socket.__new__", "subprocess.Popen", "os.fork", "os.posix_spawn"}:
        raise RuntimeError(event)

sys.addaudithook(refuse)
import pytest
code = pytest.main(["-q", "-W", "error", "-p", "no:cacheprovider", "test_relay.py"])
print(sys.modules["connectoid_relay"].__file__)
sys.exit(code)
"""


@pytest.mark.slow
def test_two_files_alone_test_themselves_without_sockets(tmp_path: Path) -> None:
    for name in ("connectoid_relay.py", "test_relay.py"):
        shutil.copy(ROOT / name, tmp_path)
    finished = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG_DEADLINE_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    *_, counts, relay = finished.stdout.splitlines()
    assert "skipped" not in counts
    assert relay == str(tmp_path / "connectoid_relay.py")


def test_the_test_to_copy_is_short_enough_to_read() -> None:
    assert len((ROOT / "test_relay.py").read_text("utf-8").splitlines()) <= 1_320
