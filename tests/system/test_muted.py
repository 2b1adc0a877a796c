"""The tests themselves, started as nohup and `&` in a script start them: signals are ignored."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import LONG_DEADLINE_S, ROOT

MUTED = "trap '' HUP INT QUIT; exec \"$@\""
SIGNALLED = "tests/system/test_backup.py::test_backup_that_is_told_to_stop_leaves_nothing"


@pytest.mark.slow
def test_programs_heed_signals_that_the_tests_were_started_without() -> None:
    finished = subprocess.run(
        ["sh", "-c", MUTED, "sh", sys.executable, "-m", "pytest", "-q", "-n1",
         "-p", "no:cacheprovider", SIGNALLED],
        cwd=ROOT, capture_output=True, text=True, timeout=LONG_DEADLINE_S, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "3 passed" in finished.stdout
