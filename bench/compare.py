"""Compare the relay with what people use today: `python bench/compare.py --help`.

Servers run on one core, the load on another. CPU of a server is what the operating system says. A figure is the
median of the rounds, with the least and the most; a ratio is made in each round, of figures that are seconds apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import clients
import common
import picture
from load import Figures, Generator, Kind
from servers import PEERS, Meeting, Peer, Running, free_port, running

PARTS = {
    "fresh": "a check that finds nothing, each on a fresh connection",
    "kept": "the same on kept connections",
    "udp": "checks over UDP, beside a bare echo loop",
    "meet": "a rendezvous between two fresh mailboxes",
    "idle": "memory of an idle client, CPU of its keep-alives",
}
ECHO = "echo"  # the name of the bare UDP loop among the servers
MAILBOXES = 1_000  # asked for in turn
TALKS = 200  # checks of a server that load.c cannot ask
TALKS_AT_A_TIME = 16
WARM_CLIENTS = 100  # connected before memory is looked at, so that what a server needs once is there
SETTLE_S = 0.5  # for a server to be done with what it was sent
PING_ROUNDS = 10
SEALS = 100
CHECKS_PER_DAY, MEETINGS_PER_DAY, DAY_S = 1_440, 10, 86_400
BUSY_LOAD = 0.5  # processes that want a core, in the last minute
TRUSTED_CORE = 0.90  # busy: with less a rate per second says nothing of the server
FULL_CORE = 0.95  # busy: then the server is the limit, not the load


# ---------------------------------------------------------------------------------------
# Measuring. A round is a dict from "part.server.measure" to a number.
# ---------------------------------------------------------------------------------------

Round = dict[str, float]


class Bench:
    """The servers that run, and how they are loaded."""

    def __init__(self, arguments: argparse.Namespace, generator: Generator) -> None:
        self.arguments, self.generator = arguments, generator
        self.servers: dict[str, Running] = {}
        self.kinds: dict[tuple[str, str], Kind] = {}

    def start(self, command: list[str], port: int, stack: contextlib.ExitStack,
              kind: socket.SocketKind = socket.SOCK_STREAM) -> Running:
        """Start a server until the stack is left."""
        directory = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        return stack.enter_context(running(command, port, Path(directory), kind))

    def start_peer(self, peer: Peer, stack: contextlib.ExitStack) -> Running | None:
        """Start a server of the table; return None if it is not installed."""
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        command = peer.command(port := free_port(), directory)
        return stack.enter_context(running(command, port, directory)) if command else None

    def load(self, mode: str, server: Running, *kinds: Kind) -> tuple[Figures, float]:
        """Return what the generator counted, and the CPU seconds of the server."""
        before_s = server.cpu_s()
        figures = self.generator.run(mode, server.port, self.arguments.seconds, *kinds)
        cpu_s = server.cpu_s() - before_s
        if figures.failed + figures.bad_datagrams > (figures.done + figures.datagrams) // 100:
            raise RuntimeError(f"{mode}: {figures} has too many failures to count")
        return figures, cpu_s


def learn(peer: Peer, port: int, *, keep: bool) -> Kind:
    """Return the requests of a check, and what a right reply is: the first one is looked at whole."""
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
        assert json.loads(reply.partition(b"\r\n\r\n")[2]) == {"ok": True, "found": False}, reply
    return Kind(requests, peer.begins, len(reply))


async def _first_kept(port: int, request: bytes) -> bytes:
    with clients.Line(port) as line:
        await line.send(request)
        return await line.until(lambda received: received.rstrip().endswith(b"}"))


def measure_checks(bench: Bench, peer: Peer, part: str) -> Round:
    """Return CPU, rate and latency of checks, on fresh or kept connections."""
    server = bench.servers[peer.name]
    if peer.check_talk:
        figures, cpu_s = talk(bench, server, peer.check_talk, TALKS)
    else:
        if (peer.name, part) not in bench.kinds:
            bench.kinds[peer.name, part] = learn(peer, server.port, keep=part == "kept")
        figures, cpu_s = bench.load(part, server, bench.kinds[peer.name, part])
    name = f"{part}.{peer.name}"
    return {f"{name}.cpu_us": 1e6 * cpu_s / figures.done, f"{name}.per_s": figures.done / figures.seconds,
            f"{name}.busy": cpu_s / figures.seconds, f"{name}.p50_us": figures.p50_us, f"{name}.p99_us": figures.p99_us}


def _datagrams() -> Kind:
    requests = [clients.check_of(clients.made_up_pub(), id=f"{number:06}") for number in range(MAILBOXES)]
    return Kind(requests, b"", 0)


def echo_name(generator: Generator) -> str:
    """Return what the echo loop is called in the figures: the one in Python must not pass for the one in C."""
    return "echo_c" if generator.program else "echo_python"


def measure_udp(bench: Bench) -> Round:
    """Return packets per second of the echo loop, and of the relay, with HTTP idle and saturated."""
    measured: Round = {}
    datagrams = _datagrams()
    reply = Kind(datagrams.requests, b'{"ok": true, "found": false', 0)
    echo = echo_name(bench.generator)
    for name, kind in ((echo, datagrams._replace(prefix=b'{"pub": "')), ("relay", reply)):
        figures, cpu_s = bench.load("udp", bench.servers[ECHO if name == echo else name], kind)
        measured |= {f"udp.{name}.per_s": figures.datagrams / figures.seconds,
                     f"udp.{name}.busy": cpu_s / figures.seconds, f"udp.{name}.cpu_us": 1e6 * cpu_s / figures.datagrams}
    if bench.generator.program:  # in Python the load of both would be the limit
        relay = bench.servers["relay"]
        fresh = learn(PEERS[0], relay.port, keep=False)
        figures, cpu_s = bench.load("both", relay, fresh, reply)
        measured |= {"both.relay.per_s": figures.datagrams / figures.seconds,
                     "both.relay.busy": cpu_s / figures.seconds,
                     "both.relay.http_per_s": figures.done / figures.seconds}
    return measured


def measure_meetings(bench: Bench, peer: Peer) -> Round:
    """Return the server's CPU for one rendezvous, with 16 of them at a time."""
    assert peer.meet
    figures, cpu_s = talk(bench, bench.servers[peer.name], peer.meet, bench.arguments.meetings)
    return {f"meet.{peer.name}.cpu_ms": 1e3 * cpu_s / figures.done,
            f"meet.{peer.name}.per_s": figures.done / figures.seconds,
            f"meet.{peer.name}.busy": cpu_s / figures.seconds}


def talk(bench: Bench, server: Running, meet: Meeting, count: int) -> tuple[Figures, float]:
    """Return what so many talks took, 16 at a time, and the CPU seconds of the server."""
    pairs = clients.make_pairs(count)  # not counted: the clients' work
    before_s, started_s = server.cpu_s(), time.perf_counter()
    taken_s = sorted(asyncio.run(_meet_all(meet, server.port, pairs)))
    seconds, cpu_s = time.perf_counter() - started_s, server.cpu_s() - before_s
    return Figures(count, 0, round(1e6 * taken_s[count // 2]), round(1e6 * taken_s[count * 99 // 100]), 0, 0,
                   seconds), cpu_s


async def _meet_all(meet: Meeting, port: int, pairs: list[clients.Pair]) -> list[float]:
    waiting, taken_s = iter(pairs), []

    async def work() -> None:
        for pair in waiting:
            started_s = time.perf_counter()
            await asyncio.wait_for(meet(port, pair), clients.TIMEOUT_S)
            taken_s.append(time.perf_counter() - started_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(TALKS_AT_A_TIME):
            group.create_task(work())
    return taken_s


def measure_seals(bench: Bench) -> Round:
    """Return the CPU of one seal to a P-384 key, on the server's core, while the other one is busy or not.

    Cores share caches, heat and often more than that: a seal costs up to a third more while the other core works,
    as it does when all the rest is measured.
    """
    alone_ms = _seal_ms()
    with subprocess.Popen([sys.executable, clients.__file__]) as busy:  # it is where we are: on the core of the load
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


def measure_idle(bench: Bench, peer: Peer) -> Round:
    """Return resident KiB of an idle client, and the CPU of a keep-alive, at a server that was just started."""
    assert peer.idle
    with contextlib.ExitStack() as stack:
        server = bench.start_peer(peer, stack)
        assert server
        return asyncio.run(_measure_idle(peer, server, bench.arguments.clients, stack))


async def _measure_idle(peer: Peer, server: Running, count: int, stack: contextlib.ExitStack) -> Round:
    assert peer.idle
    lines, kib = [], 0
    for number in range(WARM_CLIENTS + count):
        if number == WARM_CLIENTS:
            await asyncio.sleep(SETTLE_S)
            kib = server.resident_kib()
        lines.append(stack.enter_context(await peer.idle(server.port, number)))
    await asyncio.sleep(SETTLE_S)
    measured = {f"idle.{peer.name}.kib": (server.resident_kib() - kib) / count}
    if peer.ping:
        cpu_s = server.cpu_s()
        for _ in range(PING_ROUNDS):
            await _ping_all(peer, lines)
        await asyncio.sleep(SETTLE_S)
        measured[f"idle.{peer.name}.ping_us"] = 1e6 * (server.cpu_s() - cpu_s) / (PING_ROUNDS * len(lines))
    return measured


async def _ping_all(peer: Peer, lines: list[clients.Line]) -> None:
    for line in lines:
        await line.send(peer.ping)
        if peer.pong_bytes:
            await line.until(lambda received: len(received) >= peer.pong_bytes)


def attempt(title: str, measure: Callable[..., Round], *arguments: Any) -> Round:
    """Return what was measured; or nothing, and say so: one server that fails must not cost the others' figures."""
    try:
        return measure(*arguments)
    except (OSError, RuntimeError, AssertionError, ExceptionGroup, subprocess.SubprocessError) as error:
        print(f"failed: {title}: {measure.__name__}: {error!r}", file=sys.stderr)
        return {}


def measure_round(bench: Bench, peers: list[Peer], parts: list[str]) -> Round:
    """Return the figures of one round: each part with each server in turn."""
    measured = measure_seals(bench) if "meet" in parts else {}
    for part in [part for part in ("fresh", "kept") if part in parts]:
        for peer in peers:
            if part == "fresh" or peer.finds_nothing:
                measured |= attempt(peer.title, measure_checks, bench, peer, part)
    if ECHO in bench.servers:
        measured |= attempt("UDP", measure_udp, bench)
    for peer in peers:
        if "meet" in parts and peer.meet:
            measured |= attempt(peer.title, measure_meetings, bench, peer)
        if "idle" in parts and peer.idle:
            measured |= attempt(peer.title, measure_idle, bench, peer)
    return measured


# ---------------------------------------------------------------------------------------
# Ratios: those that the project set out to reach, and for --quick those that need no peer.
# ---------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """A ratio with its bound: at most for what costs, at least for what is done; 0 is no bound."""

    words: str
    of: Callable[[Round], float]
    bound: float = 0
    at_least: bool = False
    full: tuple[str, ...] = ()  # how busy the core was, where a rate means something on a full core alone


RATIOS = (
    Ratio("1. check, fresh connection: CPU / nginx's constant reply",
          lambda got: got["fresh.relay.cpu_us"] / got["fresh.nginx.cpu_us"], 1.8),
    Ratio("1. check, fresh connection: CPU / ThreadingHTTPServer's constant reply",
          lambda got: got["fresh.relay.cpu_us"] / got["fresh.stock.cpu_us"], 0.25),
    Ratio("1. check, kept connection: CPU / nginx's constant reply",
          lambda got: got["kept.relay.cpu_us"] / got["kept.nginx.cpu_us"], 6),
    Ratio("2. check over UDP, HTTP idle: packets/s / echo loop in C",
          lambda got: got["udp.relay.per_s"] / got["udp.echo_c.per_s"], 0.30, at_least=True,
          full=("udp.echo_c.busy", "udp.relay.busy")),
    Ratio("2. check over UDP, HTTP saturated: packets/s / echo loop in C",
          lambda got: got["both.relay.per_s"] / got["udp.echo_c.per_s"], 0.10, at_least=True,
          full=("udp.echo_c.busy", "both.relay.busy")),
    Ratio("3. rendezvous: CPU / (2 seals + 7 of nginx's constant replies), seals while the other core is idle",
          lambda got: got["meet.relay.cpu_ms"] / (2 * got["seal.alone_ms"] + 7 * got["fresh.nginx.cpu_us"] / 1e3), 1.6),
    Ratio("3. the same, seals while the other core is busy, as in the rendezvous",
          lambda got: got["meet.relay.cpu_ms"] / (2 * got["seal.cpu_ms"] + 7 * got["fresh.nginx.cpu_us"] / 1e3), 1.6),
)
QUICK_RATIOS = (
    RATIOS[1],
    Ratio("check, kept connection: CPU / ThreadingHTTPServer's constant reply",
          lambda got: got["kept.relay.cpu_us"] / got["kept.stock.cpu_us"]),
    Ratio("check over UDP: packets per CPU second / echo loop in Python",
          lambda got: got["udp.echo_python.cpu_us"] / got["udp.relay.cpu_us"]),
    Ratio("rendezvous: CPU / 2 seals", lambda got: got["meet.relay.cpu_ms"] / (2 * got["seal.cpu_ms"])),
)


def describe_ratios(rounds: list[Round], ratios: Sequence[Ratio]) -> Iterator[str]:
    """Yield a table of the ratios: median, least and most of the rounds."""
    yield "| ratio | reach | measured | met? |"
    yield "|---|---|---|---|"
    for ratio in ratios:
        made = []
        with contextlib.suppress(KeyError):  # a part or a server was left out
            made = [ratio.of(measured) for measured in rounds]
        bound = f"{'at least' if ratio.at_least else 'at most'} {ratio.bound:g}" if ratio.bound else "none set"
        if not made:
            yield f"| {ratio.words} | {bound} | not measured | |"
            continue
        middle = statistics.median(made)
        yield (f"| {ratio.words} | {bound} | {middle:.2f} ({min(made):.2f} to {max(made):.2f})"
               f" | {_verdict(rounds, ratio, middle)} |")


def _verdict(rounds: list[Round], ratio: Ratio, middle: float) -> str:
    busy = min((measured[name] for name in ratio.full for measured in rounds), default=1.0)
    if busy < TRUSTED_CORE:
        return f"unknown: a core was busy for {busy:.0%} only, so others used it or the load was the limit"
    if not ratio.bound:
        return ""
    return "yes" if (middle >= ratio.bound) == ratio.at_least else "NO"


# ---------------------------------------------------------------------------------------
# Words.
# ---------------------------------------------------------------------------------------


def figure(rounds: list[Round], name: str) -> float | None:
    """Return the median of a figure, or None if it was not measured."""
    values = [measured[name] for measured in rounds if name in measured]
    return statistics.median(values) if values else None


def shown(rounds: list[Round], name: str, form: str = ".0f") -> str:
    """Return the median of a figure with the least and the most."""
    values = [measured[name] for measured in rounds if name in measured]
    if not values:
        return ""
    middle = f"{statistics.median(values):{form}}"
    return f"{middle} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else middle


def day_cpu_s(rounds: list[Round], peer: Peer) -> float | None:
    """Return the CPU seconds of a client's day, computed: idle all day, and ten rendezvous."""
    check_us, ping_us = (figure(rounds, f"{part}.{peer.name}.{measure}")
                         for part, measure in (("fresh", "cpu_us"), ("idle", "ping_us")))
    meet_ms = figure(rounds, f"meet.{peer.name}.cpu_ms")
    idle_us = ping_us and ping_us * DAY_S / peer.ping_every_s if peer.ping else check_us and check_us * CHECKS_PER_DAY
    return idle_us / 1e6 + meet_ms * MEETINGS_PER_DAY / 1e3 if idle_us and meet_ms else None


def idle_cell(rounds: list[Round], peer: Peer) -> str:
    """Return the memory of an idle client in words; who has no connection takes none, by definition."""
    kib = figure(rounds, f"idle.{peer.name}.kib")
    if peer.ping or not peer.meet:
        return "" if kib is None else f"{kib:.1f}"
    return "no connection" if kib is None else f"no connection ({peer.parked_words}: {kib:.1f})"


def describe_servers(rounds: list[Round], peers: Sequence[Peer]) -> Iterator[str]:
    """Yield the big table: a line for each server."""
    yield ("| server | check, fresh connection: CPU µs | checks/s | core busy | p50 / p99 ms | kept connection: CPU µs"
           " | rendezvous: CPU ms | idle client: KiB | its day: CPU s |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for peer in peers:
        name = f"fresh.{peer.name}"
        per_s, busy, p50_us, p99_us = (figure(rounds, f"{name}.{measure}") or 0
                                       for measure in ("per_s", "busy", "p50_us", "p99_us"))
        day_s = day_cpu_s(rounds, peer)
        yield (f"| {peer.title} | {shown(rounds, f'{name}.cpu_us')} | {per_s:,.0f} | {busy:.0%}"
               f" | {p50_us / 1e3:.2f} / {p99_us / 1e3:.2f} | {shown(rounds, f'kept.{peer.name}.cpu_us')}"
               f" | {shown(rounds, f'meet.{peer.name}.cpu_ms', '.2f')} | {idle_cell(rounds, peer)}"
               f" | {'' if day_s is None else f'{day_s:.3f}'} |")


def describe_udp(rounds: list[Round], generator: Generator) -> Iterator[str]:
    """Yield what was measured over UDP."""
    yield "| UDP, server on one core | packets/s | core busy | CPU µs each |"
    yield "|---|---|---|---|"
    loop = f"echo loop in {'C' if generator.program else 'Python'}"
    for name, title in ((f"udp.{echo_name(generator)}", loop), ("udp.relay", "relay, HTTP idle"),
                        ("both.relay", "relay, HTTP saturated")):
        busy = figure(rounds, f"{name}.busy")
        if busy is not None:
            yield (f"| {title} | {shown(rounds, f'{name}.per_s')} | {busy:.0%}"
                   f" | {shown(rounds, f'{name}.cpu_us', '.1f')} |")
    http = shown(rounds, "both.relay.http_per_s")
    if http:
        yield f"\nBeside the packets, while HTTP was saturated: {http} checks/s on fresh connections."


def describe_meaning(peers: Sequence[Peer], arguments: argparse.Namespace) -> Iterator[str]:
    """Yield in words what was asked of each server."""
    yield (f"CPU is that of the server with all its processes, on one core. {arguments.width} requests at a time,"
           f" {TALKS_AT_A_TIME} rendezvous; messages of {len(common.DATA):,} bytes. A day is computed from the other"
           f" figures: {MEETINGS_PER_DAY} rendezvous, and {CHECKS_PER_DAY:,} checks or the keep-alives. In brackets:"
           " least and most of the rounds.\n")
    for peer in peers:
        keeps = f"; keep-alive every {peer.ping_every_s} s" if peer.ping else ""
        yield (f"- {peer.title} ({peer.version()}): check = {peer.check_words}; rendezvous = {peer.meet_words};"
               f" idle = {peer.idle_words}{keeps}")


def describe_limit(rounds: list[Round], generator: Generator) -> Iterator[str]:
    """Yield how one knows that the load is not the limit."""
    if generator.program:
        yield f"Where the server's core is busy for {FULL_CORE:.0%} or more, the server is the limit and not the load."
    else:
        yield ("The load is generated in Python and may be the limit of what is done per second (see how busy the"
               " core was). CPU for each request is right all the same.")
    relay, nginx = (figure(rounds, f"fresh.{name}.per_s") for name in ("relay", "nginx"))
    if relay and nginx:
        yield (f"The load reached {nginx:,.0f} checks/s at nginx and {relay:,.0f} at the relay. A fresh connection"
               " costs whoever opens it more than it costs nginx, so a core of load cannot fill"
               " a core of nginx or Redis.")
    busy, per_s = figure(rounds, "meet.relay.busy"), figure(rounds, "meet.relay.per_s")
    if busy and per_s:
        yield (f"The relay's core was busy for {busy:.0%} of the time with {per_s:.0f} rendezvous/s; the clients' core"
               " opens two questions for each.")


def warn_of_others(load: float) -> None:
    """Say so if somebody else is at work on this machine: then no figure is worth much."""
    if load > BUSY_LOAD:
        print(f"warning: a load of {load:.1f} before anything was started: others use this machine, and it will show",
              file=sys.stderr)


# ---------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {','.join(allowed)}")
        return names
    return convert


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(
        prog="compare.py", description="Compare the relay with what people use today.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {part:6} {words}" for part, words in PARTS.items())
        + "\n\nservers, and what to install:\n"
        + "\n".join(f"  {peer.name:10} {peer.needs or 'nothing'}" for peer in PEERS))
    parser.add_argument("--quick", action="store_true", help="under 60 s, with Python alone: the relay and the stock"
                        " server, the load in Python")
    parser.add_argument("--rounds", type=int, help="default: 5; with --quick 3")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16, help="requests at a time (default: %(default)s)")
    parser.add_argument("--meetings", type=int, default=160, help="rendezvous in a round (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=500, help="idle clients (default: %(default)s)")
    parser.add_argument("--parts", type=_names(list(PARTS)), help="some of them, with commas between")
    parser.add_argument("--only", type=_names(names), help="some servers, with commas between")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables there too")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="write a picture there")
    return parser


def start_all(bench: Bench, parts: list[str], stack: contextlib.ExitStack) -> list[Peer]:
    """Start the servers that are wanted and there; say which are skipped."""
    started = []
    quick = ["relay", "stock"] if bench.arguments.quick else None
    for peer in PEERS:
        if peer.name not in (bench.arguments.only or quick or [peer.name]):
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
    if "udp" in parts and "relay" in bench.servers:
        port = free_port()
        bench.servers[ECHO] = bench.start(bench.generator.echo(port), port, stack, socket.SOCK_DGRAM)
    return started


def measure_all(bench: Bench, peers: list[Peer], parts: list[str]) -> list[Round]:
    """Return the rounds; whoever waits is told how far it is."""
    rounds = []
    for peer in peers:  # not counted: caches, and the compiler inside Node, warm up
        attempt(peer.title, measure_checks, bench, peer, "fresh")
    for number in range(count := bench.arguments.rounds or (3 if bench.arguments.quick else 5)):
        started_s = time.monotonic()
        rounds.append(measure_round(bench, peers, parts))
        print(f"round {number + 1} of {count}: {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    return rounds


def describe(bench: Bench, peers: list[Peer], rounds: list[Round]) -> Iterator[str]:
    """Yield all that is to be said, in Markdown."""
    yield common.machine() + f", {len(rounds)} rounds\n"
    yield from describe_ratios(rounds, QUICK_RATIOS if bench.arguments.quick else RATIOS)
    seal = shown(rounds, "seal.cpu_ms", ".2f")
    yield (f"\nA seal to a P-384 key costs {seal} ms while the other core is busy, as it is in a rendezvous;"
           f" {shown(rounds, 'seal.alone_ms', '.2f')} ms while it is not.\n" if seal else "")
    yield from describe_servers(rounds, peers)
    yield ""
    if ECHO in bench.servers:
        yield from describe_udp(rounds, bench.generator)
        yield ""
    yield from describe_limit(rounds, bench.generator)
    yield ""
    yield from describe_meaning(peers, bench.arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    parts = arguments.parts or [part for part in PARTS if not (arguments.quick and part == "idle")]
    warn_of_others(os.getloadavg()[0])
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        generator = Generator(directory, arguments.width, compile_it=not arguments.quick)
        if not (generator.program or arguments.quick):
            print("skipped: load.c: no C compiler (apt-get install gcc libc6-dev); the load is Python's")
        bench = Bench(arguments, generator)
        common.pin(common.LOAD_CORE)
        peers = start_all(bench, parts, stack)
        rounds = measure_all(bench, peers, parts)
        told = "\n".join(describe(bench, peers, rounds))
    print("\n" + told)
    if arguments.markdown:
        arguments.markdown.write_text(told + "\n", encoding="utf-8")
    if arguments.svg:
        bars = [picture.Bars(peer.title, figure(rounds, f"fresh.{peer.name}.cpu_us"),
                             1e3 * (figure(rounds, f"meet.{peer.name}.cpu_ms") or 0) or None) for peer in peers]
        arguments.svg.write_text(picture.draw(bars), encoding="utf-8")


def main() -> int:
    """Run the command line and return its exit code; whatever ends us ends the servers too."""
    arguments = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        compare(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
