"""Measure what the server on DynamoDB costs: README.md beside this file.

Run `python deploy/dynamodb/measure.py`. The engine is dynalite, whose CPU is not counted.
Clients and mailboxes are those of deploy/hosting_costs.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy"))

from common import Owner, check, machine
from dynamodb_store import DynamoDbStore, create_table, make_client
from engines import ENVIRONMENT, dynalite, new_name
from hosting_costs import ROOT, TITLES, Way, free_port, measure, show, started
from server import FOLLOW_EVERY_S

from connectoid_relay import SWEEP_EVERY_S, Relay

# Checks in a batch.
BATCH = 100
BATCHES = 50
IDLE_S = 10


@contextlib.contextmanager
def served(folder: Path, url: str) -> Iterator[Way]:
    """Run the server until it answers."""
    port = free_port()
    command = (sys.executable, str(ROOT / "deploy" / "dynamodb" / "server.py"))
    flags = (
        "--host", "127.0.0.1", "--port", str(port), "--endpoint-url", url, "--create-table",
        "--rate", "0", "--max-connections-per-source", "0")
    with started(folder, port, *command, *flags) as process:
        yield Way(port, (process.pid,))


class Units:
    """Count the units that the engine charges a client for."""

    def __init__(self, client: Any) -> None:
        self.spent = {"read": 0.0, "write": 0.0}
        client.meta.events.register("provide-client-params.dynamodb.*", self._ask)
        client.meta.events.register("after-call.dynamodb.*", self._add)

    @staticmethod
    def _ask(params: dict[str, Any], **_: object) -> dict[str, Any]:
        return params | {"ReturnConsumedCapacity": "TOTAL"}

    def _add(self, model: Any, parsed: dict[str, Any], **_: object) -> None:
        kind = "read"
        if model.name in ("PutItem", "UpdateItem"):
            kind = "write"
        costs = parsed.get("ConsumedCapacity", [])
        if not isinstance(costs, list):
            costs = [costs]
        self.spent[kind] += sum(cost["CapacityUnits"] for cost in costs)


def in_process(url: str) -> None:
    """Print what a batch costs, and what an idle relay asks of the table."""
    client = make_client(endpoint_url=url)
    table = new_name()
    create_table(client, table)
    store = DynamoDbStore(table, client, follow_every_s=FOLLOW_EVERY_S)
    relay = Relay(
        store, rate_limit=store.rate_limit, source_key=store.source_key, fetch=store.fetch)
    with contextlib.closing(relay):
        batch = [check(Owner(number).pub) for number in range(1, BATCH + 1)]
        before_s = time.process_time()
        for number in range(BATCHES):
            relay.handle(batch, f"192.0.2.{number}")
        spent_s = time.process_time() - before_s
        print(f"a batch of {BATCH} checks: {1e3 * spent_s / BATCHES:.1f} ms")
        units = Units(client)
        for _ in range(IDLE_S):
            relay.sweep()
            time.sleep(SWEEP_EVERY_S)
        for kind, spent in units.spent.items():
            print(f"without requests: {spent / IDLE_S:.1f} {kind} units a second")


def main() -> None:
    """Print the lines of README.md."""
    os.environ.update(ENVIRONMENT)
    print(machine())
    print(TITLES)
    with tempfile.TemporaryDirectory() as name, dynalite() as url:
        with served(Path(name), url) as way:
            show("server.py, dynalite", measure(way, Path(name)))
        in_process(url)


if __name__ == "__main__":
    main()
