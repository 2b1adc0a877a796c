"""Measure a cold start of the relay on Lambda: README.md, "A cold start".

Run `python deploy/dynamodb/cold_start.py`. Each round is a fresh process with its own copy of
the files, not yet compiled, as in a fresh instance of Lambda. The table is moto's, on this
machine. What is told is the median, CPU of the process alone.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from engines import ENVIRONMENT, ROOT, client_of, moto

sys.path.append(str(ROOT))

from dynamodb_store import create_table

ROUNDS = 9
HERE = Path(__file__).parent
FILES = (ROOT / "connectoid_relay.py", HERE / "lambda_relay.py", HERE / "dynamodb_store.py")
STEPS = (
    "import boto3",
    "import the relay, make the client",
    "first event: open the table, check, sweep",
    "second event: check",
)
CHECK = json.dumps({"action": "check", "pub": "A" + "g" * 64 + "A"})
INSTANCE = """
import json, sys, time
times_s = [time.process_time()]
def note(): times_s.append(time.process_time())
import boto3; note()
import lambda_relay; note()
statuses = []
for _ in range(2):
    statuses.append(lambda_relay.handler(json.loads(sys.argv[1]), None)["statusCode"]); note()
assert statuses == [200, 200], statuses
steps_ms = [1000 * (after - before) for before, after in zip(times_s, times_s[1:])]
# ru_maxrss would have that of the parent, from before exec.
status = open("/proc/self/status").read()
print(json.dumps([*steps_ms, int(status.partition("VmHWM:")[2].split()[0]) / 1024]))
"""


def start(url: str, number: int) -> list[float]:
    """Return what one start takes: milliseconds of CPU of each step, and MiB of memory at most.

    Each comes from an address of its own: a fresh instance takes a part of a source's rate
    limit.
    """
    event = {
        "requestContext": {"http": {"method": "POST", "sourceIp": f"192.0.2.{number}"}},
        "rawPath": "/",
        "body": CHECK,
    }
    environ = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONDONTWRITEBYTECODE": "1",
        "CONNECTOID_TABLE": "relay",
        "AWS_ENDPOINT_URL_DYNAMODB": url,
    }
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            shutil.copy(file, folder)
        ran = subprocess.run(
            [sys.executable, "-c", INSTANCE, json.dumps(event)], cwd=folder, check=True,
            timeout=60, stdout=subprocess.PIPE, env=environ)
        figures: list[float] = json.loads(ran.stdout)
        return figures


def main() -> None:
    """Print the rows of the table in README.md."""
    with moto() as url:
        create_table(client_of(url), "relay")
        rounds = [start(url, number) for number in range(ROUNDS)]
    *steps_ms, memory_mib = (statistics.median(column) for column in zip(*rounds, strict=True))
    for step, cpu_ms in zip((*STEPS, "in all"), (*steps_ms, sum(steps_ms)), strict=True):
        print(f"| {step} | {cpu_ms:.0f} ms |")
    print(f"\nMemory at most: {memory_mib:.0f} MiB")


if __name__ == "__main__":
    main()
