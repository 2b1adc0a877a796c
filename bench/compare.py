"""Compare the relay with what people use today: `python bench/compare.py --help`.

Servers run on one core, the load on another. CPU of a server is what the operating system says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import clients
import common
import picture
from load import Figures, Generator, Kind
from report import (
    QUICK_RATIOS,
    RATIOS,
    Ratio,
    Round,
    describe_limit,
    describe_meaning,
    describe_ratios,
    describe_servers,
    describe_udp,
    figure,
    shown,
)
from servers import PEERS, Meeting, Peer, Running, free_port, running

PARTS = {
    "fresh": "a check that finds nothing, each on a fresh connection",
    "kept": "the same on kept connections",
    "udp": "checks over UDP, beside a bare echo loop",
    "meet": "a rendezvous between two fresh mailboxes",
    "idle": "memory of an idle client, CPU of its keep-alives",
}
# The name of the bare UDP loop among the servers.
ECHO = "echo"
# Asked for in turn.
MAILBOXES = 1_000
# Checks of a server that load.c cannot ask.
TALKS = 200
TALKS_AT_A_TIME = 16
# Connected before memory is looked at, so that what a server needs once is there.
WARM_CLIENTS = 100
# How long a server has to finish its requests.
SETTLE_S = 0.5
PING_ROUNDS = 10
SEALS = 100
# How many processes wanted a core in the last minute.
BUSY_LOAD = 0.5


# ---------------------------------------------------------------------------------------
# The servers that run, and how they are loaded.
# ---------------------------------------------------------------------------------------


class Bench:
    """The servers that run, and how they are loaded."""

    def __init__(self, arguments: argparse.Namespace, generator: Generator) -> None:
        self.arguments = arguments
        self.generator = generator
        self.servers: dict[str, Running] = {}
        self.kinds: dict[tuple[str, str], Kind] = {}

    def start_echo(self, stack: contextlib.ExitStack) -> None:
        """Start the bare UDP loop until the stack is left."""
        port = free_port()
        command = self.generator.echo(port)
        kind = socket.SOCK_DGRAM
        self.servers[ECHO] = stack.enter_context(running(command, port, _folder(stack), kind))

    def start_peer(self, peer: Peer, stack: contextlib.ExitStack) -> Running | None:
        """Start a server of the table; return None if it is not installed."""
        directory = _folder(stack)
        port = free_port()
        command = peer.command(port, directory)
        if command is None:
            return None
        return stack.enter_context(running(command, port, directory))

    def load(self, mode: str, server: Running, *kinds: Kind) -> tuple[Figures, float]:
        """Return what the generator counted, and the CPU seconds of the server."""
        before_s = server.cpu_s()
        figures = self.generator.run(mode, server.port, self.arguments.seconds, *kinds)
        cpu_s = server.cpu_s() - before_s
        failed = figures.failed + figures.bad_datagrams
        if failed > (figures.done + figures.datagrams) // 100:
            raise RuntimeError(f"{mode}: {figures} has too many failures to count")
        return figures, cpu_s

    def echo_name(self) -> str:
        """Return the name of the echo loop in the figures: the one in Python is slower."""
        if self.generator.program:
            return "echo_c"
        return "echo_python"


def _folder(stack: contextlib.ExitStack) -> Path:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    return Path(stack.enter_context(folder))


# ---------------------------------------------------------------------------------------
# Checks.
# ---------------------------------------------------------------------------------------


def learn(peer: Peer, port: int, *, keep: bool) -> Kind:
    """Return the requests of a check and its right reply: the first one is looked at whole."""
    pubs = [clients.made_up_pub() for _ in range(MAILBOXES)]
    if keep:
        requests = [clients.http_request(clients.check_of(pub), keep=True) for pub in pubs]
        reply = asyncio.run(_first_kept(port, requests[0]))
    else:
        assert peer.check
        requests = [peer.check(pub) for pub in pubs]
        reply = asyncio.run(clients.exchange(port, requests[0]))
    assert reply.startswith(peer.begins), reply
    if peer.finds_nothing:
        body = reply.partition(b"\r\n\r\n")[2]
        assert json.loads(body) == {"ok": True, "found": False}, reply
    return Kind(requests, peer.begins, len(reply))


async def _first_kept(port: int, request: bytes) -> bytes:
    with clients.Line(port) as line:
        await line.send(request)
        return await line.until(lambda received: received.rstrip().endswith(b"}"))


def measure_checks(bench: Bench, peer: Peer, part: str) -> Round:
    """Return CPU, rate and latency of checks, on fresh or kept connections."""
    server = bench.servers[peer.name]
    if peer.check_talk:
        figures, cpu_s = talk(server, peer.check_talk, TALKS)
    else:
        if (peer.name, part) not in bench.kinds:
            bench.kinds[peer.name, part] = learn(peer, server.port, keep=part == "kept")
        figures, cpu_s = bench.load(part, server, bench.kinds[peer.name, part])
    name = f"{part}.{peer.name}"
    return {
        f"{name}.cpu_us": 1e6 * cpu_s / figures.done,
        f"{name}.per_s": figures.done / figures.seconds,
        f"{name}.busy": cpu_s / figures.seconds,
        f"{name}.p50_us": figures.p50_us,
        f"{name}.p99_us": figures.p99_us,
    }


def _datagrams() -> list[bytes]:
    return [clients.check_of(clients.made_up_pub(), id=f"{number:06}")
            for number in range(MAILBOXES)]


def measure_udp(bench: Bench) -> Round:
    """Return packets per second of the echo loop, and of the relay, HTTP idle and saturated."""
    requests = _datagrams()
    found_nothing = Kind(requests, b'{"ok": true, "found": false', 0)
    echoed = Kind(requests, b'{"pub": "', 0)
    measured = _measure_udp(bench, f"udp.{bench.echo_name()}", bench.servers[ECHO], echoed)
    relay = bench.servers["relay"]
    measured |= _measure_udp(bench, "udp.relay", relay, found_nothing)
    # In Python the load of both would be the limit.
    if bench.generator.program:
        fresh = learn(PEERS[0], relay.port, keep=False)
        figures, cpu_s = bench.load("both", relay, fresh, found_nothing)
        measured |= {
            "both.relay.per_s": figures.datagrams / figures.seconds,
            "both.relay.busy": cpu_s / figures.seconds,
            "both.relay.http_per_s": figures.done / figures.seconds,
        }
    return measured


def _measure_udp(bench: Bench, name: str, server: Running, kind: Kind) -> Round:
    figures, cpu_s = bench.load("udp", server, kind)
    return {
        f"{name}.per_s": figures.datagrams / figures.seconds,
        f"{name}.busy": cpu_s / figures.seconds,
        f"{name}.cpu_us": 1e6 * cpu_s / figures.datagrams,
    }


# ---------------------------------------------------------------------------------------
# Rendezvous.
# ---------------------------------------------------------------------------------------


def measure_meetings(bench: Bench, peer: Peer) -> Round:
    """Return the server's CPU for one rendezvous, with 16 of them at a time."""
    assert peer.meet
    figures, cpu_s = talk(bench.servers[peer.name], peer.meet, bench.arguments.meetings)
    return {
        f"meet.{peer.name}.cpu_ms": 1e3 * cpu_s / figures.done,
        f"meet.{peer.name}.per_s": figures.done / figures.seconds,
        f"meet.{peer.name}.busy": cpu_s / figures.seconds,
    }


def talk(server: Running, meet: Meeting, count: int) -> tuple[Figures, float]:
    """Return what the talks took, 16 at a time, and the CPU seconds of the server."""
    # The clients' work, which is not counted.
    pairs = clients.make_pairs(count)
    before_s = server.cpu_s()
    started_s = time.perf_counter()
    taken_s = asyncio.run(_meet_all(meet, server.port, pairs))
    seconds = time.perf_counter() - started_s
    cpu_s = server.cpu_s() - before_s
    p50_us = round(1e6 * common.percentile(taken_s, 50))
    p99_us = round(1e6 * common.percentile(taken_s, 99))
    return Figures(count, 0, p50_us, p99_us, 0, 0, seconds), cpu_s


async def _meet_all(meet: Meeting, port: int, pairs: list[clients.Pair]) -> list[float]:
    waiting = iter(pairs)
    taken_s = []

    async def work() -> None:
        for pair in waiting:
            started_s = time.perf_counter()
            await asyncio.wait_for(meet(port, pair), clients.TIMEOUT_S)
            taken_s.append(time.perf_counter() - started_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(TALKS_AT_A_TIME):
            group.create_task(work())
    return taken_s


def measure_seals() -> Round:
    """Return the CPU of one seal to a P-384 key, on the server's core.

    Cores share caches, heat and often more than that: a seal costs up to a third more while the
    other core works, as it does when all the rest is measured. So both are measured.
    """
    alone_ms = _seal_ms()
    # The child inherits the core of this process: that of the load.
    with subprocess.Popen([sys.executable, clients.__file__]) as busy:
        try:
            time.sleep(SETTLE_S)
            return {"seal.alone_ms": alone_ms, "seal.cpu_ms": _seal_ms()}
        finally:
            busy.kill()


def _seal_ms() -> float:
    keys = [clients.make_owner().key.public_key() for _ in range(SEALS)]
    common.pin(common.SERVER_CORE)
    started_s = time.process_time()
    for key in keys:
        common.SUITE.encrypt(b"a" * 43, key, info=common.QUESTION_INFO)
    cpu_s = time.process_time() - started_s
    common.pin(common.LOAD_CORE)
    return 1e3 * cpu_s / SEALS


# ---------------------------------------------------------------------------------------
# Idle clients.
# ---------------------------------------------------------------------------------------


def measure_idle(bench: Bench, peer: Peer) -> Round:
    """Return resident KiB of an idle client and CPU of a keep-alive, at a fresh server."""
    with contextlib.ExitStack() as stack:
        server = bench.start_peer(peer, stack)
        assert server
        return asyncio.run(_measure_idle(peer, server, bench.arguments.clients, stack))


async def _measure_idle(
    peer: Peer, server: Running, count: int, stack: contextlib.ExitStack,
) -> Round:
    lines = await _join_all(peer, server, range(WARM_CLIENTS), stack)
    await asyncio.sleep(SETTLE_S)
    kib = server.resident_kib()
    lines += await _join_all(peer, server, range(WARM_CLIENTS, WARM_CLIENTS + count), stack)
    await asyncio.sleep(SETTLE_S)
    measured = {f"idle.{peer.name}.kib": (server.resident_kib() - kib) / count}
    if peer.ping:
        measured[f"idle.{peer.name}.ping_us"] = await _measure_pings(peer, server, lines)
    return measured


async def _join_all(
    peer: Peer, server: Running, numbers: range, stack: contextlib.ExitStack,
) -> list[clients.Line]:
    assert peer.idle
    return [stack.enter_context(await peer.idle(server.port, number)) for number in numbers]


async def _measure_pings(peer: Peer, server: Running, lines: list[clients.Line]) -> float:
    cpu_s = server.cpu_s()
    for _ in range(PING_ROUNDS):
        for line in lines:
            await line.send(peer.ping)
            if peer.pong_bytes:
                await line.until(lambda received: len(received) >= peer.pong_bytes)
    await asyncio.sleep(SETTLE_S)
    return 1e6 * (server.cpu_s() - cpu_s) / (PING_ROUNDS * len(lines))


# ---------------------------------------------------------------------------------------
# Rounds.
# ---------------------------------------------------------------------------------------

FAILURES = (
    OSError, RuntimeError, AssertionError, ExceptionGroup, subprocess.SubprocessError)


def attempt(title: str, measure: Callable[..., Round], *arguments: Any) -> Round:
    """Return what was measured. A failure is told, and costs nothing of the others' figures."""
    try:
        return measure(*arguments)
    except FAILURES as error:
        print(f"failed: {title}: {measure.__name__}: {error!r}", file=sys.stderr)
        return {}


def measure_round(bench: Bench, peers: list[Peer], parts: list[str]) -> Round:
    """Return the figures of one round: each part with each server in turn."""
    measured: Round = {}
    if "meet" in parts:
        measured |= measure_seals()
    if "fresh" in parts:
        for peer in peers:
            measured |= attempt(peer.title, measure_checks, bench, peer, "fresh")
    if "kept" in parts:
        for peer in filter(_finds_nothing, peers):
            measured |= attempt(peer.title, measure_checks, bench, peer, "kept")
    if ECHO in bench.servers:
        measured |= attempt("UDP", measure_udp, bench)
    for peer in peers:
        if "meet" in parts and peer.meet:
            measured |= attempt(peer.title, measure_meetings, bench, peer)
        if "idle" in parts and peer.idle:
            measured |= attempt(peer.title, measure_idle, bench, peer)
    return measured


def _finds_nothing(peer: Peer) -> bool:
    return peer.finds_nothing


def measure_all(bench: Bench, peers: list[Peer]) -> list[Round]:
    """Return the rounds; stderr tells how far it is."""
    arguments = bench.arguments
    # Not counted: caches, and the compiler inside Node, warm up.
    for peer in peers:
        attempt(peer.title, measure_checks, bench, peer, "fresh")
    rounds = []
    for number in range(1, arguments.rounds + 1):
        started_s = time.monotonic()
        rounds.append(measure_round(bench, peers, arguments.parts))
        seconds = time.monotonic() - started_s
        print(f"round {number} of {arguments.rounds}: {seconds:.0f} s", file=sys.stderr)
    return rounds


# ---------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------


def _names(text: str, allowed: list[str]) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no {', '.join(unknown)}; there are {','.join(allowed)}")
    return names


def _parts(text: str) -> list[str]:
    return _names(text, list(PARTS))


def _servers(text: str) -> list[str]:
    return _names(text, [peer.name for peer in PEERS])


def _epilog() -> str:
    lines = ["parts:"]
    lines += [f"  {part:6} {words}" for part, words in PARTS.items()]
    lines += ["", "servers, and what to install:"]
    lines += [f"  {peer.name:10} {peer.needs or 'nothing'}" for peer in PEERS]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description="Compare the relay with what people use today.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_epilog())
    add = parser.add_argument
    add("--quick", action="store_true", help="under 60 s, with Python only: the relay and the"
        " stock server, the load in Python")
    add("--rounds", type=int, help="default: 5; with --quick 3")
    add("--seconds", type=float, default=1.0, help="of each load (default: %(default)s)")
    add("--width", type=int, default=16, help="requests at a time (default: %(default)s)")
    add("--meetings", type=int, default=160, help="rendezvous in a round (default: %(default)s)")
    add("--clients", type=int, default=500, help="idle clients (default: %(default)s)")
    add("--parts", type=_parts, help="some of them, with commas between")
    add("--only", type=_servers, help="some servers, with commas between")
    add("--markdown", metavar="FILE", type=Path, help="write the tables there too")
    add("--svg", metavar="FILE", type=Path, help="write a picture there")
    return parser


def read_arguments() -> argparse.Namespace:
    """Return what the command line says, with its defaults filled in."""
    arguments = build_parser().parse_args()
    rounds = 5
    parts = list(PARTS)
    only = [peer.name for peer in PEERS]
    if arguments.quick:
        rounds = 3
        parts.remove("idle")
        only = ["relay", "stock"]
    arguments.rounds = arguments.rounds or rounds
    arguments.parts = arguments.parts or parts
    arguments.only = arguments.only or only
    return arguments


def warn_of_others(load: float) -> None:
    """Warn if this machine is busy with something else: then no figure is worth much."""
    if load > BUSY_LOAD:
        print(f"warning: a load of {load:.1f} before anything was started:"
              " others use this machine, and it will show", file=sys.stderr)


def start_all(bench: Bench, stack: contextlib.ExitStack) -> list[Peer]:
    """Start the servers that are wanted and there; say which are skipped."""
    started = []
    for peer in PEERS:
        if peer.name not in bench.arguments.only:
            continue
        try:
            server = bench.start_peer(peer, stack)
        except OSError as error:
            print(f"skipped: {peer.title}: {error}")
            continue
        if server is None:
            print(f"skipped: {peer.title}: not installed ({peer.needs})")
            continue
        bench.servers[peer.name] = server
        started.append(peer)
    if "udp" in bench.arguments.parts and "relay" in bench.servers:
        bench.start_echo(stack)
    return started


def describe(bench: Bench, peers: list[Peer], rounds: list[Round]) -> Iterator[str]:
    """Yield the whole report, in Markdown."""
    ratios: Sequence[Ratio] = RATIOS
    if bench.arguments.quick:
        ratios = QUICK_RATIOS
    yield common.machine() + f", {len(rounds)} rounds\n"
    yield from describe_ratios(rounds, ratios)
    yield ""
    busy_ms = shown(rounds, "seal.cpu_ms", ".2f")
    alone_ms = shown(rounds, "seal.alone_ms", ".2f")
    if busy_ms:
        yield (f"A seal to a P-384 key costs {busy_ms} ms while the other core is busy, as it is"
               f" in a rendezvous; {alone_ms} ms while it is not.\n")
    yield from describe_servers(rounds, peers)
    yield ""
    if ECHO in bench.servers:
        yield from describe_udp(rounds, bench.echo_name())
        yield ""
    yield from describe_limit(rounds, compiled=bool(bench.generator.program))
    yield ""
    yield from describe_meaning(peers, bench.arguments.width, TALKS_AT_A_TIME)


def bars_of(rounds: list[Round], peer: Peer) -> picture.Bars:
    """Return the bars of a server."""
    meet_ms = figure(rounds, f"meet.{peer.name}.cpu_ms")
    meet_us = None
    if meet_ms is not None:
        meet_us = 1e3 * meet_ms
    return picture.Bars(peer.title, figure(rounds, f"fresh.{peer.name}.cpu_us"), meet_us)


def main() -> int:
    """Measure, print, write."""
    arguments = read_arguments()
    warn_of_others(os.getloadavg()[0])
    with contextlib.ExitStack() as stack:
        compile_it = not arguments.quick
        generator = Generator(_folder(stack), arguments.width, compile_it=compile_it)
        if compile_it and not generator.program:
            print("skipped: load.c: no C compiler (apt-get install gcc libc6-dev);"
                  " the load is Python's")
        bench = Bench(arguments, generator)
        common.pin(common.LOAD_CORE)
        peers = start_all(bench, stack)
        rounds = measure_all(bench, peers)
        told = "\n".join(describe(bench, peers, rounds))
    print("\n" + told)
    if arguments.markdown:
        arguments.markdown.write_text(told + "\n", encoding="utf-8")
    if arguments.svg:
        bars = [bars_of(rounds, peer) for peer in peers]
        arguments.svg.write_text(picture.draw(bars), encoding="utf-8")
    return 0


if __name__ == "__main__":
    common.run(main)
