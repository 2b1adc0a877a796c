"""Print what 5,000 long polls and 2,000 idle connections cost a relay, and how soon each is woken.

All are there at once: kept connections that have asked once, and long polls, each for a mailbox
of its own. Then messages go to the waiting mailboxes in random order. 20,000 need a file limit of
more than 20,000 (`ulimit -Hn`), for the relay as for this script:
`idle.py --clients 20000 --soak 120`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import common

# The reach: resident memory for each client, and the delay of 99 % of those woken.
MOST_KIB = 8
MOST_WAKE_S = 0.1
# What a long poll asks for.
WAIT_S = 60
# Kept connections that send.
SENDERS = 8
# 127.0.0.2 and following: each has 28,000 ports.
SOURCES = 8
# How long the last ones have to be woken.
SETTLE_S = 5.0
# In a soak an idle connection asks this often: the relay closes it after 75 s.
ASK_AGAIN_S = 45.0
# Connections between two looks at what was answered.
JOIN_BATCH = 100
# After these a relay has what every relay has after a moment: threads, caches, warm code.
WARM_CHECKS = 200
# Limits of the relay that stay as they are where they are enough.
DEFAULT_LIMIT = 10_000
# Numbers of the members that do not wait.
IDLE = -1
SENDER = -2
IDLE_REQUEST = common.http_request(common.check(common.NO_BOX))


class Waiters:
    """The crowd: waiters, each with its mailbox, and idle connections and senders."""

    def __init__(self, crowd: common.Crowd, port: int, clients: int) -> None:
        self.crowd = crowd
        self.port = port
        self.pubs = [common.Owner(number + 1).pub for number in range(clients)]
        self.empty = 0
        self.closed = 0
        self.refused = 0
        self.woken_s: dict[int, float] = {}
        self.idle: list[common.Member] = []
        # Of the idle ones.
        self.answered = 0

    def request(self, number: int) -> bytes:
        """Return the long poll of a waiter; one that was woken waits for what will not come."""
        at = 0
        if number in self.woken_s:
            at = common.LATER_AT
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
        """Let connections ask once and stay; return when all have their reply."""
        for number in range(count):
            member = self.crowd.join(self.port, IDLE, source(number), IDLE_REQUEST)
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
            elif member.number == IDLE:
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
        """Let all go on for some time; idle connections ask now and then."""
        end_s = time.perf_counter() + seconds
        next_s = time.perf_counter() + ASK_AGAIN_S
        while time.perf_counter() < end_s:
            self.listen(0.25)
            if time.perf_counter() > next_s:
                next_s += ASK_AGAIN_S
                self._ask_again()

    def _ask_again(self) -> None:
        for member in self.idle:
            if member.socket.fileno() >= 0:
                self.crowd.say(member, IDLE_REQUEST)


def source(number: int) -> str:
    """Return the address of a client."""
    return f"127.0.0.{2 + number % SOURCES}"


# ---------------------------------------------------------------------------------------
# Waking.
# ---------------------------------------------------------------------------------------


class Wakes:
    """Send to waiters in random order; note when each send was due and acknowledged."""

    def __init__(self, waiters: Waiters, sends: int, rate: int) -> None:
        self.waiters = waiters
        self.rate = rate
        self.order = random.Random(4).sample(range(len(waiters.pubs)), sends)
        self.due_s: dict[int, float] = {}
        self.acked_s: dict[int, float] = {}
        crowd = waiters.crowd
        self._free = [crowd.join(waiters.port, SENDER) for _ in range(SENDERS)]
        self._sending: dict[common.Member, int] = {}
        self._begin_s = time.perf_counter() + 0.1

    def run(self) -> None:
        """Send all, and return when each waiter is woken or will never be."""
        sends = len(self.order)
        give_up_s = self._begin_s + 2 * sends / self.rate + SETTLE_S
        while min(len(self.acked_s), len(self.waiters.woken_s)) < sends:
            if time.perf_counter() > give_up_s:
                break
            self._turn()
        for sender in (*self._free, *self._sending):
            self.waiters.crowd.leave(sender)

    def _turn(self) -> None:
        pause_s = 0.05
        if self._free and len(self.due_s) < len(self.order):
            due_s = self._begin_s + len(self.due_s) / self.rate
            pause_s = due_s - time.perf_counter()
            if pause_s <= 0:
                self._send(due_s)
                return
        for sender in self.waiters.listen(pause_s):
            self.acked_s[self._sending.pop(sender)] = time.perf_counter()
            self._free.append(sender)

    def _send(self, due_s: float) -> None:
        number = self.order[len(self.due_s)]
        sender = self._free.pop()
        # A sender that comes late because all are busy must not hide that: the time counts from
        # when the send was due.
        self.due_s[number] = due_s
        self._sending[sender] = number
        request = common.http_request(common.send(self.waiters.pubs[number]))
        self.waiters.crowd.say(sender, request)

    def never(self) -> int:
        """Return how many were never woken."""
        return len(self.due_s) - len(self.waiters.woken_s)

    def show(self) -> None:
        """Print how long after its message each was woken."""
        woken_s = self.waiters.woken_s
        sends = [acked_s - self.due_s[number] for number, acked_s in self.acked_s.items()]
        from_start = [
            woken_s[number] - due_s
            for number, due_s in self.due_s.items() if number in woken_s]
        from_ack = [
            max(0.0, woken_s[number] - acked_s)
            for number, acked_s in self.acked_s.items() if number in woken_s]
        late = sum(seconds > MOST_WAKE_S for seconds in from_start)
        common.row(
            "send, start to acknowledgement: p50 / p99 / longest", common.spread_ms(sends))
        show_delay(
            f"woken after the start of the send ({len(from_start):,} of {len(self.due_s):,})",
            from_start)
        show_delay("woken after its acknowledgement", from_ack)
        common.row("woken later than 100 ms, never", f"{late:,}, {self.never():,}")


def show_delay(what: str, seconds: list[float]) -> None:
    """Print a delay beside its aim."""
    met = common.percentile(seconds, 99) <= MOST_WAKE_S
    common.row(f"{what}: p50 / p99 / longest", common.spread_ms(seconds), "p99 100 ms", met)


# ---------------------------------------------------------------------------------------
# The run.
# ---------------------------------------------------------------------------------------


def show_memory(what: str, kib: int, count: int) -> None:
    """Print the memory for each of some clients."""
    if count:
        each_kib = kib / count
        common.row(
            f"memory for each of {what}", f"{each_kib:.2f} KiB", f"{MOST_KIB} KiB",
            each_kib <= MOST_KIB)


def measure(waiters: Waiters, relay: common.RelayProcess, arguments: argparse.Namespace) -> int:
    """Do it all, print it, and return how many were never woken."""
    for number in range(WARM_CHECKS):
        pub = waiters.pubs[number % len(waiters.pubs)]
        common.ask(relay.port, common.check(pub, common.LATER_AT))
    join(waiters, relay, arguments)
    wakes = Wakes(waiters, arguments.sends, arguments.rate)
    wakes.run()
    wakes.show()
    if arguments.soak:
        soak(waiters, relay, arguments.soak)
    common.row(
        "empty replies, refused, connections closed by the relay",
        f"{waiters.empty:,}, {waiters.refused:,}, {waiters.closed:,}")
    common.row("memory at the end", common.mib(common.memory_kib(relay.pid)))
    return wakes.never()


def join(waiters: Waiters, relay: common.RelayProcess, arguments: argparse.Namespace) -> None:
    """Connect all clients, and print what each costs."""
    before_kib = common.memory_kib(relay.pid)
    before_threads = common.threads(relay.pid)
    begin_s = time.perf_counter()
    waiters.park()
    parked_kib = common.memory_kib(relay.pid)
    waiters.rest(arguments.idle)
    both_kib = common.memory_kib(relay.pid)
    both_threads = common.threads(relay.pid)
    joined_s = time.perf_counter() - begin_s

    polls = arguments.clients
    idle = arguments.idle
    show_memory(f"{polls:,} long polls", parked_kib - before_kib, polls)
    show_memory(f"{idle:,} idle connections", both_kib - parked_kib, idle)
    show_memory(f"all {polls + idle:,}", both_kib - before_kib, polls + idle)
    common.row("memory before, with all", f"{common.mib(before_kib)}, {common.mib(both_kib)}")
    common.row(
        "threads before, with all", f"{before_threads}, {both_threads}", "the same",
        before_threads == both_threads)
    common.row("time to join", f"{joined_s:.1f} s")


def soak(waiters: Waiters, relay: common.RelayProcess, seconds: int) -> None:
    """Hold them all for some time and print what that costs."""
    begin_cpu_s = common.cpu_s(relay.pid)
    begin_s = time.perf_counter()
    waiters.keep(seconds)
    used = (common.cpu_s(relay.pid) - begin_cpu_s) / (time.perf_counter() - begin_s)
    held = common.metrics(relay.port)["connectoid_waiting_boxes"]
    common.row(
        f"held for {seconds} s: waiting then, CPU of the relay",
        f"{held:,}, {100 * used:.1f} % of a core")


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clients", type=int, default=5_000, help="long polls, each for its mailbox (%(default)s)")
    add("--idle", type=int, default=2_000, help="idle kept connections (%(default)s)")
    add("--sends", type=int, default=2_000, help="waiters to wake (%(default)s)")
    add("--rate", type=int, default=100, help="sends in a second (%(default)s)")
    add("--soak", type=int, default=0, metavar="SECONDS", help="hold all this long after (0)")
    return parser.parse_args()


def fit(arguments: argparse.Namespace) -> list[str]:
    """Shrink the numbers to the file limit, say so, and return the flags of the relay."""
    clients = arguments.clients + arguments.idle
    wanted = clients + common.SPARE_FILES
    allowed = common.raise_file_limit(wanted)
    if allowed < wanted:
        share = (allowed - common.SPARE_FILES) / clients
        arguments.clients = int(arguments.clients * share)
        arguments.idle = int(arguments.idle * share)
        print(f"The file limit is {allowed:,} (ulimit -Hn): {arguments.clients:,} long polls and"
              f" {arguments.idle:,} idle connections instead.")
    arguments.sends = min(arguments.sends, arguments.clients)
    room = arguments.clients + arguments.idle + 100
    flags = []
    if room > DEFAULT_LIMIT:
        flags += ["--max-connections", str(room)]
    if arguments.clients > DEFAULT_LIMIT:
        flags += ["--max-waiting", str(room)]
    return flags


def main() -> int:
    """Run it; the exit code is 1 if a waiter was never woken."""
    arguments = read_arguments()
    flags = [*common.NO_RATES, *fit(arguments)]
    common.pin(common.LOAD_CORE)
    print("relay:", *flags)
    with (
        tempfile.TemporaryDirectory() as directory,
        common.RelayProcess(Path(directory), *flags) as relay,
        common.Crowd() as crowd,
    ):
        common.heading()
        never = measure(Waiters(crowd, relay.port, arguments.clients), relay, arguments)
        return int(never > 0)


if __name__ == "__main__":
    common.run(main)
