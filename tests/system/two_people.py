"""Two people pair by the commands of README.md, with this Python and its warnings as errors.

`other_pythons.sh` runs it on other Pythons. The first words of the relay say where it listens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STRICT = [sys.executable, "-W", "error"]
# Where a machine has no other address.
TERMINAL = """
import sys
import aioice.ice
found = aioice.ice.get_host_addresses
aioice.ice.get_host_addresses = lambda **kinds: found(**kinds) or ["127.0.0.1"]
import connectoid.cli
sys.exit(connectoid.cli.main(sys.argv[1:]))
"""
DEADLINE_S = 120


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """Start a command of the relay or of the library."""
    return subprocess.Popen(
        [*STRICT, *argv], cwd=folder, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"LANG": "C.UTF-8"})


def main() -> int:
    """Start a relay, share, and open; return 0 if both see the same emoji."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with start(folder, str(ROOT / "connectoid_relay.py"), "--port", "0") as relay:
            try:
                return pair(folder, relay)
            finally:
                relay.kill()


def pair(folder: Path, relay: subprocess.Popen[str]) -> int:
    """Let Alice share and Bob open by a relay."""
    assert relay.stderr
    words = relay.stderr.readline()
    assert "listening on" in words, words
    port = words.rpartition(":")[2].strip()
    known = ["--relay", f"http://127.0.0.1:{port}/", "--json"]
    with start(folder, "-c", TERMINAL, "share", "Bob", "--store", "a.db", *known) as alice:
        assert alice.stdout
        link = json.loads(alice.stdout.readline())["link"]
        with start(folder, "-c", TERMINAL, "open", link, "--name", "Alice", "--yes", "--store",
                   "b.db", *known) as bob:
            told = [each.communicate(timeout=DEADLINE_S) for each in (alice, bob)]
    for each, (_, errors) in zip((alice, bob), told, strict=True):
        assert (each.returncode, errors) == (0, ""), errors
    emoji = [
        event["emoji"] for lines, _ in told for event in map(json.loads, lines.splitlines())
        if event["event"] == "compare"]
    assert len(emoji) == 2
    assert emoji[0] == emoji[1]
    print("paired")
    return 0


if __name__ == "__main__":
    sys.exit(main())
