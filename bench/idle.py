"""Print what 5,000 long polls and 2,000 idle connections cost a relay, and how soon each is woken (issue 4, Reach 4).

Kept connections that have asked once and long polls, each for a mailbox of its own, all at
once; then messages to the waiting mailboxes in random order. 20,000 need a file limit of more
than 20,000 (`ulimit -Hn`), for the relay as for this script: `idle.py --clients 20000 --soak 120`.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import common

MOST_KIB = 8  # of resident memory for each client: the reach
MOST_WAKE_S = 0.1
WAIT_S = 60  # what a long poll asks for
SENDERS = 8  # connections that send, kept open
SOURCES = 8  # 127.0.0.2 and following: each has 28,000 ports
SETTLE_S = 5.0  # for the last ones to be woken
ASK_AGAIN_S = 45.0  # an idle connection asks so often in a soak: the relay closes it after 75 s
JOIN_BATCH = 100  # connections between two looks at what was answered
NO_BOX = "Ag" + "A" * 64


class Waiters:
    """The crowd: who waits for which mailbox, who is idle, who sends."""

    def __init__(self, crowd: common.Crowd, port: int, clients: int) -> None:
        self.crowd, self.port = crowd, port
        self.pubs = [common.Owner(number + 1).pub for number in range(clients)]
        self.empty = self.closed = self.refused = 0
        self.woken_s: dict[int, float] = {}
        self.idle: list[common.Member] = []
        self.answered = 0  # of the idle ones

    def request(self, number: int) -> bytes:
        """Return the long poll of a waiter; one that was woken goes on waiting for what will not come."""
        at = common.LATER_AT if number in self.woken_s else 0
        return common.http_request(common.check(self.pubs[number], at, WAIT_S))

    def park(self) -> None:
        """Begin all long polls, and return when the relay holds them all."""
        for number in range(len(self.pubs)):
            self.crowd.join(self.port, number, source(number), self.request(number))
            if number % JOIN_BATCH == 0:
                self.listen(0.0)
        while common.metrics(self.port)["connectoid_waiting_boxes"] < len(self.pubs):
            self.listen(0.1)

    def rest(self, count: int) -> None:
        """Have so many connections ask once and stay; return when all have their reply."""
        for number in range(count):
            member = self.crowd.join(self.port, -1, source(number), common.http_request(common.check(NO_BOX)))
            self.idle.append(member)
            if number % JOIN_BATCH == 0:
                self.listen(0.0)
        while self.answered + self.closed < count:
            self.listen(0.1)

    def listen(self, timeout_s: float) -> list[common.Member]:
        """Take what is heard; return the senders that have their reply."""
        free = []
        for member, status, body in self.crowd.turn(timeout_s):
            self.closed += not status
            self.refused += status not in (0, 200)
            if status and member.number >= 0:
                self._take_poll(member, body)
            elif member.number == -1:
                self.answered += 1
            elif status:
                free.append(member)
        return free

    def _take_poll(self, member: common.Member, body: bytes) -> None:
        if b'"found": true' in body:
            self.woken_s[member.number] = time.perf_counter()
        else:
            self.empty += 1
        self.crowd.say(member, self.request(member.number))

    def keep(self, seconds: float) -> None:
        """Let all go on for some time, idle ones asking now and then."""
        end_s = time.perf_counter() + seconds
        next_s = time.perf_counter() + ASK_AGAIN_S
        while time.perf_counter() < end_s:
            self.listen(0.25)
            if time.perf_counter() > next_s:
                next_s += ASK_AGAIN_S
                for member in self.idle:
                    if member.socket.fileno() >= 0:
                        self.crowd.say(member, common.http_request(common.check(NO_BOX)))


def source(number: int) -> str:
    """Return the address that a client comes from."""
    return f"127.0.0.{2 + number % SOURCES}"


def wake(waiters: Waiters, sends: int, rate: int) -> tuple[dict[int, float], dict[int, float]]:
    """Send to so many waiters in random order; return when each send was due and when it was acknowledged."""
    order = random.Random(4).sample(range(len(waiters.pubs)), sends)
    free = [waiters.crowd.join(waiters.port, -2) for _ in range(SENDERS)]
    sending: dict[common.Member, int] = {}
    due_s: dict[int, float] = {}
    acked_s: dict[int, float] = {}
    begin_s = time.perf_counter() + 0.1
    give_up_s = begin_s + 2 * sends / rate + SETTLE_S
    while min(len(acked_s), len(waiters.woken_s)) < sends and time.perf_counter() < give_up_s:
        next_s = begin_s + len(due_s) / rate
        if len(due_s) < sends and free and next_s <= time.perf_counter():
            number, sender = order[len(due_s)], free.pop()
            # From when it was due: a sender that comes late because all are busy shall not hide that.
            due_s[number], sending[sender] = next_s, number
            waiters.crowd.say(sender, common.http_request(common.send(waiters.pubs[number])))
            continue
        pause_s = next_s - time.perf_counter() if free and len(due_s) < sends else 0.05
        for sender in waiters.listen(pause_s):
            acked_s[sending.pop(sender)] = time.perf_counter()
            free.append(sender)
    for sender in (*free, *sending):
        waiters.crowd.leave(sender)
    return due_s, acked_s


def show_wakes(waiters: Waiters, due_s: dict[int, float], acked_s: dict[int, float]) -> None:
    """Print how long after its message each was woken."""
    from_start = [waiters.woken_s[number] - due_s[number] for number in due_s if number in waiters.woken_s]
    from_ack = [max(0.0, waiters.woken_s[number] - acked_s[number]) for number in acked_s if number in waiters.woken_s]
    sends = [acked_s[number] - due_s[number] for number in acked_s]
    late = sum(seconds > MOST_WAKE_S for seconds in from_start)
    common.row("send, start to acknowledgement: p50 / p99 / longest", common.spread_ms(sends))
    common.row(f"woken after the start of the send ({len(from_start):,} of {len(due_s):,}): p50 / p99 / longest",
               common.spread_ms(from_start), "p99 100 ms", common.percentile(from_start, 99) <= MOST_WAKE_S)
    common.row("woken after its acknowledgement: p50 / p99 / longest", common.spread_ms(from_ack), "p99 100 ms",
               common.percentile(from_ack, 99) <= MOST_WAKE_S)
    common.row("woken later than 100 ms, never", f"{late:,}, {len(due_s) - len(from_start):,}")


def measure(waiters: Waiters, relay: common.RelayProcess, arguments: argparse.Namespace) -> int:
    """Do it all, print it, and return how many were never woken."""
    for number in range(200):  # what every relay has after a moment: threads, caches, code that has run once
        common.ask(relay.port, common.check(waiters.pubs[number % len(waiters.pubs)], common.LATER_AT))
    before_kib, before_threads = common.memory_kib(relay.pid), common.threads(relay.pid)
    begin_s = time.perf_counter()
    waiters.park()
    parked_kib = common.memory_kib(relay.pid)
    waiters.rest(arguments.idle)
    both_kib, both_threads = common.memory_kib(relay.pid), common.threads(relay.pid)
    joined_s = time.perf_counter() - begin_s
    clients = arguments.clients + arguments.idle
    for what, kib, count in ((f"{arguments.clients:,} long polls", parked_kib - before_kib, arguments.clients),
                             (f"{arguments.idle:,} idle connections", both_kib - parked_kib, arguments.idle),
                             (f"all {clients:,}", both_kib - before_kib, clients)):
        if count:
            common.row(f"memory for each of {what}", f"{kib / count:.2f} KiB", f"{MOST_KIB} KiB",
                       kib / count <= MOST_KIB)
    common.row("memory before, with all", f"{common.mib(before_kib)}, {common.mib(both_kib)}")
    common.row("threads before, with all", f"{before_threads}, {both_threads}", "the same",
               before_threads == both_threads)
    due_s, acked_s = wake(waiters, arguments.sends, arguments.rate)
    show_wakes(waiters, due_s, acked_s)
    if arguments.soak:
        soak(waiters, relay, arguments.soak)
    common.row("empty replies, refused, connections closed by the relay",
               f"{waiters.empty:,}, {waiters.refused:,}, {waiters.closed:,}")
    common.row("time to join, memory at the end", f"{joined_s:.1f} s, {common.mib(common.memory_kib(relay.pid))}")
    return len(due_s) - len(waiters.woken_s)


def soak(waiters: Waiters, relay: common.RelayProcess, seconds: int) -> None:
    """Hold them all for some time and print what that costs."""
    begin_cpu_s, begin_s = common.cpu_s(relay.pid), time.perf_counter()
    waiters.keep(seconds)
    used = (common.cpu_s(relay.pid) - begin_cpu_s) / (time.perf_counter() - begin_s)
    held = common.metrics(relay.port)["connectoid_waiting_boxes"]
    common.row(f"held for {seconds} s: waiting then, CPU of the relay", f"{held:,}, {100 * used:.1f} % of a core")


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=5_000, help="long polls, each for its mailbox (%(default)s)")
    parser.add_argument("--idle", type=int, default=2_000, help="idle kept connections (%(default)s)")
    parser.add_argument("--sends", type=int, default=2_000, help="waiters to wake (%(default)s)")
    parser.add_argument("--rate", type=int, default=100, help="sends in a second (%(default)s)")
    parser.add_argument("--soak", type=int, default=0, metavar="SECONDS", help="hold them so long after (0)")
    return parser.parse_args()


def fit(arguments: argparse.Namespace) -> list[str]:
    """Shrink the numbers to what the file limit allows, say so, and return the flags that the relay needs."""
    wanted = arguments.clients + arguments.idle + common.SPARE_FILES
    allowed = common.raise_file_limit(wanted)
    if allowed < wanted:
        share = (allowed - common.SPARE_FILES) / (arguments.clients + arguments.idle)
        arguments.clients, arguments.idle = int(arguments.clients * share), int(arguments.idle * share)
        print(f"The file limit is {allowed:,} (ulimit -Hn): {arguments.clients:,} long polls and"
              f" {arguments.idle:,} idle connections instead.")
    arguments.sends = min(arguments.sends, arguments.clients)
    room = arguments.clients + arguments.idle + 100
    default = 10_000  # of both limits: left alone where it is enough
    return [*(("--max-connections", str(room)) if room > default else ()),
            *(("--max-waiting", str(room)) if arguments.clients > default else ())]


def main() -> int:
    """Run it; the exit code is 1 if a waiter was never woken."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the relay is stopped
    flags = [*common.NO_RATES, *fit(arguments)]
    common.pin(common.LOAD_CORE)
    print("relay:", *flags)
    with (tempfile.TemporaryDirectory() as directory, common.RelayProcess(Path(directory), *flags) as relay,
          common.Crowd() as crowd):
        common.heading()
        return int(measure(Waiters(crowd, relay.port, arguments.clients), relay, arguments) > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
