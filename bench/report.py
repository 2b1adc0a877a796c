"""Put into words what compare.py measured: tables in Markdown, ratios with their bounds.

A round is a dict from "part.server.measure" to a number. A figure is the median of the rounds,
with the least and the most. A ratio is made in each round, of figures that are seconds apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import common
from servers import Peer

Round = dict[str, float]

CHECKS_PER_DAY = 1_440
MEETINGS_PER_DAY = 10
DAY_S = 86_400
# With a core that is less busy, a rate per second says nothing of the server.
TRUSTED_CORE = 0.90
# With a core that is this busy, the server is the limit, not the load.
FULL_CORE = 0.95

# ---------------------------------------------------------------------------------------
# Figures of all rounds.
# ---------------------------------------------------------------------------------------


def figure(rounds: list[Round], name: str) -> float | None:
    """Return the median of a figure, or None if it was not measured."""
    values = [measured[name] for measured in rounds if name in measured]
    if not values:
        return None
    return statistics.median(values)


def shown(rounds: list[Round], name: str, form: str = ".0f") -> str:
    """Return the median of a figure with the least and the most; nothing if not measured."""
    values = [measured[name] for measured in rounds if name in measured]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return common.spread(values, form)


# ---------------------------------------------------------------------------------------
# Ratios: those that the project set out to reach, and for --quick those that need no peer.
# ---------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """A figure over a weighted sum of others, with its bound; 0 is no bound.

    The bound is at most for what costs, and at least for what is done.
    """

    words: str
    over: str
    under: dict[str, float]
    bound: float = 0
    at_least: bool = False
    # How busy the core was, where a rate means something on a full core only.
    full: tuple[str, ...] = ()

    def of(self, measured: Round) -> float | None:
        """Return the ratio of a round; None if a part or a server was left out."""
        if self.over not in measured or not self.under.keys() <= measured.keys():
            return None
        total = sum(weight * measured[name] for name, weight in self.under.items())
        return measured[self.over] / total


RATIOS = (
    Ratio(
        "1. check, fresh connection: CPU / nginx's constant reply",
        "fresh.relay.cpu_us", {"fresh.nginx.cpu_us": 1}, 1.8),
    Ratio(
        "1. check, fresh connection: CPU / ThreadingHTTPServer's constant reply",
        "fresh.relay.cpu_us", {"fresh.stock.cpu_us": 1}, 0.25),
    Ratio(
        "1. check, kept connection: CPU / nginx's constant reply",
        "kept.relay.cpu_us", {"kept.nginx.cpu_us": 1}, 6),
    Ratio(
        "2. check over UDP, HTTP idle: packets/s / echo loop in C",
        "udp.relay.per_s", {"udp.echo_c.per_s": 1}, 0.30, at_least=True,
        full=("udp.echo_c.busy", "udp.relay.busy")),
    Ratio(
        "2. check over UDP, HTTP saturated: packets/s / echo loop in C",
        "both.relay.per_s", {"udp.echo_c.per_s": 1}, 0.10, at_least=True,
        full=("udp.echo_c.busy", "both.relay.busy")),
    Ratio(
        "3. rendezvous: CPU / (2 seals + 7 of nginx's constant replies),"
        " seals while the other core is idle",
        "meet.relay.cpu_ms", {"seal.alone_ms": 2, "fresh.nginx.cpu_us": 7e-3}, 1.6),
    Ratio(
        "3. the same, seals while the other core is busy, as in the rendezvous",
        "meet.relay.cpu_ms", {"seal.cpu_ms": 2, "fresh.nginx.cpu_us": 7e-3}, 1.6),
)
QUICK_RATIOS = (
    RATIOS[1],
    Ratio(
        "check, kept connection: CPU / ThreadingHTTPServer's constant reply",
        "kept.relay.cpu_us", {"kept.stock.cpu_us": 1}),
    Ratio(
        "check over UDP: packets per CPU second / echo loop in Python",
        "udp.echo_python.cpu_us", {"udp.relay.cpu_us": 1}),
    Ratio("rendezvous: CPU / 2 seals", "meet.relay.cpu_ms", {"seal.cpu_ms": 2}),
)


def describe_ratios(rounds: list[Round], ratios: Sequence[Ratio]) -> Iterator[str]:
    """Yield a table of the ratios: median, least and most of the rounds."""
    yield "| ratio | reach | measured | met? |"
    yield "|---|---|---|---|"
    for ratio in ratios:
        bound = _bound(ratio)
        made = [ratio.of(measured) for measured in rounds]
        values = [value for value in made if value is not None]
        if len(values) < len(rounds) or not rounds:
            yield f"| {ratio.words} | {bound} | not measured | |"
        else:
            verdict = _verdict(rounds, ratio, statistics.median(values))
            yield f"| {ratio.words} | {bound} | {common.spread(values, '.2f')} | {verdict} |"


def _bound(ratio: Ratio) -> str:
    if not ratio.bound:
        return "none set"
    if ratio.at_least:
        return f"at least {ratio.bound:g}"
    return f"at most {ratio.bound:g}"


def _verdict(rounds: list[Round], ratio: Ratio, middle: float) -> str:
    busy = min((measured[name] for name in ratio.full for measured in rounds), default=1.0)
    if busy < TRUSTED_CORE:
        return (f"unknown: a core was busy for only {busy:.0%}, so others used it"
                " or the load was the limit")
    if not ratio.bound:
        return ""
    if (middle >= ratio.bound) == ratio.at_least:
        return "yes"
    return "NO"


# ---------------------------------------------------------------------------------------
# A line for each server.
# ---------------------------------------------------------------------------------------


def day_cpu_s(rounds: list[Round], peer: Peer) -> float | None:
    """Return the CPU seconds of a client's day, computed: idle all day, and ten rendezvous."""
    meet_ms = figure(rounds, f"meet.{peer.name}.cpu_ms")
    if peer.ping:
        once_us = figure(rounds, f"idle.{peer.name}.ping_us")
        times = DAY_S / peer.ping_every_s
    else:
        once_us = figure(rounds, f"fresh.{peer.name}.cpu_us")
        times = CHECKS_PER_DAY
    if once_us is None or meet_ms is None:
        return None
    return once_us * times / 1e6 + meet_ms * MEETINGS_PER_DAY / 1e3


def day_cell(rounds: list[Round], peer: Peer) -> str:
    """Return the CPU of a client's day in words."""
    day_s = day_cpu_s(rounds, peer)
    if day_s is None:
        return ""
    return f"{day_s:.3f}"


def idle_cell(rounds: list[Round], peer: Peer) -> str:
    """Return the memory of an idle client in words; without a connection it takes none."""
    kib = figure(rounds, f"idle.{peer.name}.kib")
    needs_connection = peer.ping or not peer.meet
    if needs_connection and kib is None:
        return ""
    if needs_connection:
        return f"{kib:.1f}"
    if kib is None:
        return "no connection"
    return f"no connection ({peer.parked_words}: {kib:.1f})"


def describe_servers(rounds: list[Round], peers: Sequence[Peer]) -> Iterator[str]:
    """Yield the big table: a line for each server."""
    yield ("| server | check, fresh connection: CPU µs | checks/s | core busy | p50 ms | p99 ms"
           " | kept connection: CPU µs | rendezvous: CPU ms | idle client: KiB"
           " | its day: CPU s |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for peer in peers:
        fresh = f"fresh.{peer.name}"
        per_s = figure(rounds, f"{fresh}.per_s") or 0
        busy = figure(rounds, f"{fresh}.busy") or 0
        p50_ms = (figure(rounds, f"{fresh}.p50_us") or 0) / 1e3
        p99_ms = (figure(rounds, f"{fresh}.p99_us") or 0) / 1e3
        cells = (
            peer.title, shown(rounds, f"{fresh}.cpu_us"), f"{per_s:,.0f}", f"{busy:.0%}",
            f"{p50_ms:.2f}", f"{p99_ms:.2f}", shown(rounds, f"kept.{peer.name}.cpu_us"),
            shown(rounds, f"meet.{peer.name}.cpu_ms", ".2f"), idle_cell(rounds, peer),
            day_cell(rounds, peer))
        yield f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------
# UDP, and what the figures mean.
# ---------------------------------------------------------------------------------------


def describe_udp(rounds: list[Round], echo_name: str) -> Iterator[str]:
    """Yield what was measured over UDP."""
    language = {"echo_c": "C", "echo_python": "Python"}[echo_name]
    yield "| UDP, server on one core | packets/s | core busy | CPU µs each |"
    yield "|---|---|---|---|"
    for name, title in (
            (f"udp.{echo_name}", f"echo loop in {language}"), ("udp.relay", "relay, HTTP idle"),
            ("both.relay", "relay, HTTP saturated")):
        busy = figure(rounds, f"{name}.busy")
        if busy is not None:
            per_s = shown(rounds, f"{name}.per_s", ",.0f")
            cpu_us = shown(rounds, f"{name}.cpu_us", ".1f")
            yield f"| {title} | {per_s} | {busy:.0%} | {cpu_us} |"
    http = shown(rounds, "both.relay.http_per_s")
    if http:
        yield f"\nBeside the packets, HTTP was saturated: {http} checks/s on fresh connections."


def describe_limit(rounds: list[Round], *, compiled: bool) -> Iterator[str]:
    """Yield how one knows that the load is not the limit."""
    if compiled:
        yield (f"Where the server's core is busy for {FULL_CORE:.0%} or more, the server is the"
               " limit and not the load.")
    else:
        yield ("The load is generated in Python and may be the limit of what is done per second"
               " (see how busy the core was). CPU for each request is right all the same.")
    relay = figure(rounds, "fresh.relay.per_s")
    nginx = figure(rounds, "fresh.nginx.per_s")
    if relay and nginx:
        yield (f"The load reached {nginx:,.0f} checks/s at nginx and {relay:,.0f} at the relay."
               " To open a fresh connection costs more than it costs nginx to serve it, so a core"
               " of load cannot fill a core of nginx or Redis.")
    busy = figure(rounds, "meet.relay.busy")
    per_s = figure(rounds, "meet.relay.per_s")
    if busy and per_s:
        yield (f"The relay's core was busy for {busy:.0%} of the time with {per_s:.0f}"
               " rendezvous/s; the clients' core opens two questions for each.")


def describe_meaning(peers: Sequence[Peer], width: int, talks: int) -> Iterator[str]:
    """Yield in words what each server was asked for."""
    yield (
        "CPU is that of the server with all its processes, on one core."
        f" {width} requests at a time, {talks} rendezvous; messages of"
        f" {len(common.DATA):,} bytes. A day is computed from the other figures:"
        f" {MEETINGS_PER_DAY} rendezvous, and {CHECKS_PER_DAY:,} checks or the keep-alives."
        " In brackets: least and most of the rounds.\n")
    for peer in peers:
        keeps = ""
        if peer.ping:
            keeps = f"; keep-alive every {peer.ping_every_s} s"
        yield (f"- {peer.title} ({peer.version()}): check = {peer.check_words};"
               f" rendezvous = {peer.meet_words}; idle = {peer.idle_words}{keeps}")
