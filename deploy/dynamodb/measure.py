"""Measure what the server on DynamoDB costs: README.md beside this file. Run `python deploy/dynamodb/measure.py`.

The engine is dynalite, whose CPU is not counted. Clients and mailboxes are those of deploy/ways.py.
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

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from dynamodb_store import DynamoDbStore, create_table, make_client  # noqa: E402
from engines import ENVIRONMENT, dynalite, new_name  # noqa: E402
from server import FOLLOW_EVERY_S  # noqa: E402
from ways import ROOT, Way, free_port, measure, show, started  # noqa: E402 - it shows the way to the next

from common import Owner, check, machine  # isort: skip  # noqa: E402

from connectoid_relay import SWEEP_EVERY_S, Relay  # noqa: E402

BATCH, BATCHES = 100, 50
IDLE_S = 10


@contextlib.contextmanager
def served(folder: Path, url: str) -> Iterator[Way]:
    """Run the server until it answers."""
    port = free_port()
    with started(folder, port, sys.executable, str(ROOT / "deploy" / "dynamodb" / "server.py"), "--host", "127.0.0.1",
                 "--port", str(port), "--endpoint-url", url, "--create-table", "--rate", "0",
                 "--max-connections-per-source", "0") as process:
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
        kind = "write" if model.name in ("PutItem", "UpdateItem") else "read"
        costs = parsed.get("ConsumedCapacity", [])
        self.spent[kind] += sum(cost["CapacityUnits"] for cost in (costs if isinstance(costs, list) else [costs]))


def in_process(url: str) -> None:
    """Print what a batch costs, and what a relay asks of the table while nobody asks anything of it."""
    client, table = make_client(endpoint_url=url), new_name()
    create_table(client, table)
    store = DynamoDbStore(table, client, follow_every_s=FOLLOW_EVERY_S)
    relay = Relay(store, rate_limit=store.rate_limit, source_key=store.source_key, fetch=store.fetch)
    with contextlib.closing(relay):
        batch = [check(Owner(number).pub) for number in range(1, BATCH + 1)]
        before_s = time.process_time()
        for number in range(BATCHES):
            relay.handle(batch, f"192.0.2.{number}")
        print(f"a batch of {BATCH} checks: {1e3 * (time.process_time() - before_s) / BATCHES:.1f} ms")
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
    print(f"{'':<24} check µs  message ms  memory MiB  clients of a core, half busy (computed)")
    with tempfile.TemporaryDirectory() as name, dynalite() as url:
        with served(Path(name), url) as way:
            show("server.py, dynalite", measure(way, Path(name)))
        in_process(url)


if __name__ == "__main__":
    main()
