"""Print how long fresh checks take while many clients hold half a request open."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import common

REQUEST = common.http_request(common.check(common.NO_BOX), close=True)
HALF_REQUEST = REQUEST[:-20]


def check(port: int) -> float:
    """Return the seconds that a check on a fresh connection takes."""
    started_s = time.perf_counter()
    with common.connect(port) as client:
        client.sendall(REQUEST)
        _, body = common.read_reply(client)
    assert b'"found": false' in body, body
    return time.perf_counter() - started_s


def main() -> int:
    """Measure with and without the half requests, and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", type=int, nargs="?", default=600, help="(default: %(default)s)")
    parser.add_argument("checks", type=int, nargs="?", default=500, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.ExitStack() as held,
        common.RelayProcess(Path(directory), *common.NO_RATES) as relay,
    ):
        for count in (0, arguments.clients):
            for _ in range(count):
                client = held.enter_context(common.connect(relay.port))
                client.sendall(HALF_REQUEST)
            taken_s = [check(relay.port) for _ in range(arguments.checks)]
            print(f"{count:5} half requests open, {arguments.checks} checks:"
                  f" median / 99th percentile / longest {common.spread_ms(taken_s)}")
    return 0


if __name__ == "__main__":
    common.run(main)
