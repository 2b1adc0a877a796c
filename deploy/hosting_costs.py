"""Measure what each way to run the relay costs: docs/hosting.md, "Which way to run it".

Run `python deploy/hosting_costs.py`. CPU is that of all processes of the server, proxy included, so
that a busy machine spoils little. A client of the computed column checks every 15 minutes,
each time on a fresh connection, and has one rendezvous a day: two messages, each sent, asked
for and received.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Owner,
    RelayProcess,
    ask,
    check,
    cpu_s,
    http_request,
    machine,
    memory_kib,
    send,
)
from load import Generator, Kind

from connectoid_relay import Relay, SqliteStore

ROOT = Path(__file__).resolve().parents[1]

# How many checks, how many under way, and of how many rounds the median is printed.
SECONDS = 2.0
WIDTH = 16
ROUNDS = 3
# How many messages are sent, asked for and received.
MESSAGES = 100
CHECKS_A_DAY = 96
MESSAGES_A_DAY = 2
# The CPU that clients get: a core that is busy half of the time.
HALF_A_DAY_S = 43_200
# How many cores of a Raspberry Pi 4 do the work of one of these: an estimate.
PI_4 = 6
# Base64url of 2,500 bytes.
BIG = "A" * 3_334
# Mailboxes that are checked.
OWNERS = 64
EMBEDDED_CHECKS = 20_000
OK = 200
TITLES = (
    f"{'':<24} check µs  message ms  memory MiB  clients of a core, half busy (computed)")

WSGI_APP = """
from connectoid_relay import Limits, Networks, Relay, SqliteStore, wsgi
application = wsgi(Relay(SqliteStore("wsgi.db"), Limits(rate=0, max_connections_per_source=0)))
"""
NGINX = """
worker_processes 1; pid nginx.pid; error_log error.log; daemon off;
events {{ worker_connections 1024; }}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f;
    uwsgi_temp_path u; scgi_temp_path s;
    upstream connectoid {{ server 127.0.0.1:{relay}; keepalive 32; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://connectoid; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
}}
"""


class Way(NamedTuple):
    """A server that runs: where, and whose CPU and memory count."""

    port: int
    pids: tuple[int, ...]


class Cost(NamedTuple):
    """CPU of a check, in µs, and of a message, in ms, and memory at rest.

    That is 0 if it is the embedder's.
    """

    check_us: float
    message_ms: float
    mib: float

    def clients(self, slower: int = 1) -> int:
        """Return how many clients a core carries that is busy half of the time."""
        day_s = CHECKS_A_DAY * self.check_us / 1e6 + MESSAGES_A_DAY * self.message_ms / 1e3
        return int(HALF_A_DAY_S / day_s / slower)


@contextlib.contextmanager
def direct(folder: Path) -> Iterator[Way]:
    """Run the relay alone."""
    with RelayProcess(folder, "--rate", "0", "--max-connections-per-source", "0") as relay:
        yield Way(relay.port, (relay.popen.pid,))


@contextlib.contextmanager
def started(folder: Path, port: int, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run another program until it answers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log_path = folder / "log"
    with log_path.open("wb") as log, subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=environment) as process:
        try:
            if not _answers(port):
                raise SystemExit(f"{command[0]} does not answer: {log_path.read_text()[-500:]}")
            yield process
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    """Wait until a relay answers; return whether it does so within 10 s."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            ask(port, check(Owner(1).pub))
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def behind_nginx(folder: Path) -> Iterator[Way]:
    """Run the relay behind nginx, as docs/hosting.md has it but for TLS."""
    with direct(folder) as relay:
        port = free_port()
        configuration = folder / "nginx.conf"
        configuration.write_text(NGINX.format(relay=relay.port, port=port))
        command = ("nginx", "-p", str(folder), "-c", str(configuration))
        with started(folder, port, *command) as nginx:
            yield Way(port, (*relay.pids, nginx.pid))


@contextlib.contextmanager
def in_gunicorn(folder: Path) -> Iterator[Way]:
    """Run the WSGI application in two processes of eight threads, as docs/embedding.md has it."""
    (folder / "app.py").write_text(WSGI_APP)
    port = free_port()
    command = (
        sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "8", "--bind",
        f"127.0.0.1:{port}", "--chdir", str(folder), "app:application")
    with started(folder, port, *command) as gunicorn:
        yield Way(port, (gunicorn.pid,))


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def measure(way: Way, folder: Path) -> Cost:
    """Return what checks and messages cost a server that runs."""
    mib = sum(memory_kib(pid) for pid in way.pids) / 1024
    generator = Generator(folder, WIDTH)
    requests = [http_request(request, close=True) for request in checks()]
    kind = Kind(requests, b"HTTP/1.1 200", 0)

    def check_all() -> int:
        return int(generator.run("fresh", way.port, SECONDS, kind).done)

    def converse_all() -> int:
        return converse(way.port)

    rounds = [per_check(way, check_all) for _ in range(ROUNDS)]
    message_ms = 1e-3 * per_check(way, converse_all)
    return Cost(statistics.median(rounds), message_ms, mib)


def checks() -> list[dict[str, Any]]:
    """Return a check of each mailbox."""
    return [check(Owner(number).pub) for number in range(1, OWNERS + 1)]


def per_check(way: Way, work: Callable[[], int]) -> float:
    """Return the µs of CPU for each thing that was done."""
    before_s = sum(cpu_s(pid) for pid in way.pids)
    done = work()
    return float(1e6 * (sum(cpu_s(pid) for pid in way.pids) - before_s) / done)


def converse(port: int) -> int:
    """Send, ask for and receive messages, each in a mailbox of its own; return how many."""

    def ask_at(request: dict[str, Any]) -> Any:
        return ask(port, request)

    for number in range(1_000, 1_000 + MESSAGES):
        exchange(ask_at, Owner(number))
    return MESSAGES


def exchange(answer_to: Callable[[dict[str, Any]], Any], owner: Owner) -> None:
    """Send a message and receive it."""
    answer_to(send(owner.pub, BIG))
    _, found = answer_to(check(owner.pub))
    answer = owner.open(found["question"])
    status, _ = answer_to({"pub": owner.pub, "action": "receive", "answer": answer})
    if status != OK:
        raise SystemExit(f"a message was not received: {status}")


def embedded(folder: Path) -> Cost:
    """Return what the relay costs without any socket: `Relay.handle`."""
    relay = Relay(SqliteStore(str(folder / "embedded.db")))
    with contextlib.closing(relay):
        requests = checks()
        before_s = time.process_time()
        for number in range(EMBEDDED_CHECKS):
            relay.handle(requests[number % OWNERS], f"192.0.2.{number % 250}")
        check_us = 1e6 * (time.process_time() - before_s) / EMBEDDED_CHECKS
        owners = [Owner(number) for number in range(1_000, 1_000 + MESSAGES)]
        spent_s = [0.0]

        def timed(request: dict[str, Any]) -> Any:
            start_s = time.process_time()
            reply = relay.handle(request, "192.0.2.1")
            spent_s[0] += time.process_time() - start_s
            return reply

        for owner in owners:
            exchange(timed, owner)
    return Cost(check_us, 1e3 * spent_s[0] / MESSAGES, 0)


WAYS = {"direct": direct, "behind nginx": behind_nginx, "WSGI, gunicorn": in_gunicorn}


def main() -> None:
    """Print a line for each way that this machine offers."""
    print(machine())
    print(TITLES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, way in WAYS.items():
            if title == "behind nginx" and not shutil.which("nginx"):
                print(f"{title:<24} not installed")
                continue
            place = folder / way.__name__
            place.mkdir()
            with way(place) as running:
                cost = measure(running, place)
            show(title, cost)
            if title == "direct":
                show("Raspberry Pi 4", cost, PI_4)
        show("embedded, no socket", embedded(folder))


def show(title: str, cost: Cost, slower: int = 1) -> None:
    """Print a line."""
    computed = ""
    if slower != 1:
        computed = "  (all computed)"
    mib = "-"
    if cost.mib:
        mib = f"{cost.mib:.1f}"
    check_us = cost.check_us * slower
    message_ms = cost.message_ms * slower
    clients = round(cost.clients(slower), -3)
    print(f"{title:<24} {check_us:>8.0f}  {message_ms:>10.2f}  {mib:>10}  {clients:>10,}{computed}",
          flush=True)


if __name__ == "__main__":
    main()
