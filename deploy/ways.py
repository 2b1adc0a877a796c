"""Measure what each way to run the relay costs: README.md, "Which way to run it". Run `python deploy/ways.py`.

CPU is that of all processes of the server, proxy included, so that a busy machine spoils little. A client
of the computed column checks every 15 minutes, each time on a fresh connection, and has one rendezvous a day:
two messages, each sent, asked for and received.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import Owner, RelayProcess, ask, check, cpu_s, http_request, machine, memory_kib, send  # noqa: E402
from load import Generator, Kind  # noqa: E402

from connectoid_relay import Relay, SqliteStore  # noqa: E402

SECONDS, WIDTH, ROUNDS = 2.0, 16, 3  # of checks; requests under way; of which the median is told
MESSAGES = 100  # sent, asked for and received
CHECKS_A_DAY, MESSAGES_A_DAY = 96, 2
HALF_A_DAY_S = 43_200  # of CPU: a core that is busy half of the time
PI_4 = 6  # of whose cores do what one of those here does: an estimate, see README
BIG = "A" * 3_334  # of base64url: 2,500 bytes

WSGI_APP = """
from connectoid_relay import Limits, Networks, Relay, SqliteStore, wsgi
application = wsgi(Relay(SqliteStore("wsgi.db"), Limits(rate=0, max_connections_per_source=0)))
"""
NGINX = """
worker_processes 1; pid nginx.pid; error_log error.log; daemon off;
events {{ worker_connections 1024; }}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u;
    scgi_temp_path s;
    upstream connectoid {{ server 127.0.0.1:{relay}; keepalive 32; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://connectoid; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
}}
"""


class Way(NamedTuple):
    """A server that runs: where, and whose CPU and memory count."""

    port: int
    pids: tuple[int, ...]


class Cost(NamedTuple):
    """Of a check, in µs, and of a message, in ms, both of CPU; and of memory at rest, 0 if that is the embedder's."""

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
    with (folder / "log").open("wb") as log, subprocess.Popen(  # noqa: S603 - of ours
            command, cwd=folder, stdout=log, stderr=log, env=environment) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    ask(port, check(Owner(1).pub))
                    break
                time.sleep(0.1)
            else:
                raise SystemExit(f"{command[0]} does not answer: {(folder / 'log').read_text()[-500:]}")
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def behind_nginx(folder: Path) -> Iterator[Way]:
    """Run the relay behind nginx, as README has it but for TLS."""
    with direct(folder) as relay:
        port = free_port()
        (folder / "nginx.conf").write_text(NGINX.format(relay=relay.port, port=port))
        with started(folder, port, "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")) as nginx:
            yield Way(port, (*relay.pids, nginx.pid))


@contextlib.contextmanager
def in_gunicorn(folder: Path) -> Iterator[Way]:
    """Run the WSGI application in two processes of eight threads, as README has it."""
    (folder / "app.py").write_text(WSGI_APP)
    port = free_port()
    with started(folder, port, sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "8", "--bind",
                 f"127.0.0.1:{port}", "--chdir", str(folder), "app:application") as gunicorn:
        yield Way(port, (gunicorn.pid,))


def free_port() -> int:
    """Return a port at which nobody listens."""
    import socket  # noqa: PLC0415 - here alone

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def measure(way: Way, folder: Path) -> Cost:
    """Return what checks and messages cost a server that runs."""
    mib = sum(memory_kib(pid) for pid in way.pids) / 1024
    generator = Generator(folder, WIDTH)
    requests = [http_request(check(Owner(number).pub), close=True) for number in range(1, 65)]
    kind = Kind(requests, b"HTTP/1.1 200", 0)
    rounds = [per_check(way, lambda: generator.run("fresh", way.port, SECONDS, kind).done) for _ in range(ROUNDS)]
    return Cost(statistics.median(rounds), 1e-3 * per_check(way, lambda: converse(way.port)), mib)


def per_check(way: Way, work: Callable[[], int]) -> float:
    """Return the µs of CPU for each thing that was done."""
    before_s = sum(cpu_s(pid) for pid in way.pids)
    done = work()
    return float(1e6 * (sum(cpu_s(pid) for pid in way.pids) - before_s) / done)


def converse(port: int) -> int:
    """Send, ask for and receive messages, each in a mailbox of its own; return how many."""
    for number in range(1_000, 1_000 + MESSAGES):
        owner = Owner(number)
        exchange(lambda request: ask(port, request), owner)
    return MESSAGES


def exchange(answer_to: Callable[[dict[str, Any]], Any], owner: Owner) -> None:
    """Send a message and receive it."""
    answer_to(send(owner.pub, BIG))
    _, found = answer_to(check(owner.pub))
    status, _ = answer_to({"pub": owner.pub, "action": "receive", "answer": owner.open(found["question"])})
    if status != 200:  # noqa: PLR2004
        raise SystemExit(f"a message was not received: {status}")


def embedded(folder: Path) -> Cost:
    """Return what the relay costs without any socket: `Relay.handle`."""
    relay = Relay(SqliteStore(str(folder / "embedded.db")))
    with contextlib.closing(relay):
        requests = [check(Owner(number).pub) for number in range(1, 65)]
        before_s = time.process_time()
        for number in range(20_000):
            relay.handle(requests[number % 64], f"192.0.2.{number % 250}")
        check_us = 1e6 * (time.process_time() - before_s) / 20_000
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


def main() -> None:
    """Print a line for each way that can be had here."""
    print(machine())
    print(f"{'':<24} check µs  message ms  memory MiB  clients of a core, half busy (computed)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, way in (("direct", direct), ("behind nginx", behind_nginx), ("WSGI, gunicorn", in_gunicorn)):
            if title == "behind nginx" and not shutil.which("nginx"):
                print(f"{title:<24} not installed")
                continue
            (folder / way.__name__).mkdir()
            with way(folder / way.__name__) as running:
                show(title, cost := measure(running, folder / way.__name__))
            if title == "direct":
                show("Raspberry Pi 4", cost, PI_4)
        show("embedded, no socket", embedded(folder))


def show(title: str, cost: Cost, slower: int = 1) -> None:
    """Print a line."""
    computed = "" if slower == 1 else "  (all computed)"
    mib = f"{cost.mib:.1f}" if cost.mib else "-"
    print(f"{title:<24} {cost.check_us * slower:>8.0f}  {cost.message_ms * slower:>10.2f}  {mib:>10}"
          f"  {round(cost.clients(slower), -3):>10,}{computed}", flush=True)


if __name__ == "__main__":
    main()
