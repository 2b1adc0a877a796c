"""Print how long fresh checks take while many clients hold half a request open."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RELAY = Path(__file__).parent.parent / "connectoid_relay.py"
PUB = "Ag" + "A" * 64  # a mailbox that nobody has
BODY = json.dumps({"pub": PUB, "action": "check", "at": 0}).encode()
REQUEST = (b"POST / HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)) + BODY


def check(port: int) -> float:
    """Return the seconds that a check on a fresh connection takes."""
    started_s = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(REQUEST)
        reply = client.recv(4096)
    assert b'"found": false' in reply, reply
    return time.perf_counter() - started_s


def main() -> None:
    """Measure with and without the half requests, and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", type=int, nargs="?", default=600, help="(default: %(default)s)")
    parser.add_argument("checks", type=int, nargs="?", default=500, help="(default: %(default)s)")
    clients, checks = vars(parser.parse_args()).values()
    command = [sys.executable, str(RELAY), "--port", "0", "--rate", "0", "--max-connections-per-source", "0"]
    with (tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as held,
          subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE, text=True) as process):
        assert process.stderr is not None
        port = int(process.stderr.readline().rpartition(":")[2])
        for count in (0, clients):
            for _ in range(count):
                client = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
                client.sendall(REQUEST[:-20])
            taken_ms = sorted(1000 * check(port) for _ in range(checks))
            print(f"{count:5} half requests open, {checks} checks: median {statistics.median(taken_ms):.2f} ms,"
                  f" 99th percentile {taken_ms[checks * 99 // 100]:.2f} ms, longest {taken_ms[-1]:.2f} ms")
        process.terminate()


if __name__ == "__main__":
    main()
