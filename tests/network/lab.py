"""Networks as people have them, on one machine: namespaces of Linux, with NAT by nftables.

    internet    one router
    servers     a host at the internet, with the relay and a TURN server
    place       a host at the internet, with a public address
    home        a router behind the internet, or behind another home, with hosts of its own

Nothing here meets the machine's own network, so addresses and ports may be fixed. All names begin
with `cx-` and the number of this process, and go with the lab.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LINK = str(Path(__file__).with_name("link.py"))
BAD_SERVERS = str(Path(__file__).with_name("bad_servers.py"))
PREFIX = "cx"
NEEDED = ("ip", "nft", "sysctl")

RELAY_IPV4 = "203.0.113.1"
ANY_IPV4 = "0.0.0.0"
RELAY_IPV6 = "2001:db8::1"
RELAY_NAME = "relay.example.com"
RELAY_PORT = 8080
TURN_PORT = 3478
# Of a relay that lends a TURN server, and of that server.
TURN_SECRET = "4f1de7f2c5a84f1de7f2c5a8"

# What `ip netns exec` shows as /etc.
ETC = Path("/etc/netns")
HOSTS = f"""127.0.0.1 localhost
{RELAY_IPV4} {RELAY_NAME}
{RELAY_IPV6} {RELAY_NAME}
"""

# Interfaces: the way out of a namespace, and the inside of a home.
UP = "up0"
LAN = "lan0"

# Without a packet of one's own before it, nothing comes in.
GUARD = f"""
chain forward {{
    type filter hook forward priority 0;
    iifname "{UP}" ct state established,related accept
    iifname "{UP}" drop
}}
chain input {{
    type filter hook input priority 0;
    iifname "{UP}" ct state established,related accept
    iifname "{UP}" meta l4proto {{ tcp, udp }} drop
}}
"""
# Linux keeps the port where it can: the same for all destinations, and only those may answer.
PORT_RESTRICTED = "masquerade"
# A port for each destination.
SYMMETRIC = "masquerade fully-random"


@functools.cache
def lacking() -> str:
    """Return what this machine lacks for a lab, or an empty text."""
    for program in NEEDED:
        if shutil.which(program) is None:
            return f"{program} is missing: apt-get install iproute2 nftables procps"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = Namespace(f"{PREFIX}-{os.getpid()}-probe")
    try:
        run("ip", "netns", "add", probe.name)
        probe.run("nft", "add table ip cx { chain post { type nat hook postrouting priority 100; "
                         "masquerade; }; }")
    except LabError as error:
        return f"network namespaces or NAT are not allowed here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe.name], capture_output=True, check=False)
    return ""


class LabError(Exception):
    """A command that makes a part of a lab has failed; the text is what it said."""


def run(*argv: str, given: str | None = None) -> None:
    """Run a command; raise LabError."""
    done = subprocess.run(argv, input=given, check=False, text=True, capture_output=True)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")


class Namespace(NamedTuple):
    """A network namespace, by its name."""

    name: str

    def command(self, *argv: str) -> list[str]:
        """Return a command line that runs another one in here."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str) -> None:
        """Run a command in here; raise LabError."""
        run(*self.command(*argv))

    def ip(self, *lines: str) -> None:
        """Run commands of `ip` in here, one a line."""
        run("ip", "-netns", self.name, "-batch", "-", given="\n".join(lines) + "\n")

    def nft(self, rules: str) -> None:
        """Add rules of nftables, as their file has them."""
        run(*self.command("nft", "-f", "-"), given=rules + "\n")


class Line(NamedTuple):
    """A way that takes time, loses packets, or carries few. All is meant one way."""

    delay_ms: float = 0.0
    loss: float = 0.0
    bits_per_s: float = 1e9
    # Of what is lost.
    seed: int = 1


class Home(NamedTuple):
    """A home: its router, its number, and what the hosts in it have."""

    lab: Lab
    router: Namespace
    number: int

    def host(self, *, ipv6: bool = False, ipv4: bool = True) -> Namespace:
        """Return a new host of this home."""
        last = self.lab.next_number()
        host = self.lab.namespace("host")
        port = f"port{last}"
        self.lab.wire(host, UP, self.router, port)
        self.router.ip(f"link set {port} master {LAN}")
        if ipv4:
            host.ip(
                f"address add 192.168.{self.number}.{last}/24 dev {UP}",
                f"route add default via 192.168.{self.number}.1")
        if ipv6:
            host.ip(
                f"address add 2001:db8:{self.number}:1::{last}/64 dev {UP}",
                f"route add default via 2001:db8:{self.number}:1::ffff dev {UP}")
        return host


class Lab:
    """Namespaces, until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = 0
        self._names: list[str] = []
        # What is done before the namespaces go.
        self.ending = contextlib.ExitStack()
        self._relay = self.ending.enter_context(contextlib.ExitStack())
        self.internet = self.namespace("net")
        self.servers = self.namespace("servers")
        self.wire(self.servers, UP, self.internet, "servers0")
        self.internet.ip(
            "address add 203.0.113.254/24 dev servers0",
            "address add 2001:db8::ffff/64 dev servers0")
        self.servers.ip(
            f"address add {RELAY_IPV4}/24 dev {UP}", f"address add {RELAY_IPV6}/64 dev {UP}",
            "route add default via 203.0.113.254", f"route add default via 2001:db8::ffff dev {UP}")

    def close(self) -> None:
        """End all that runs in here, and remove it."""
        try:
            self.ending.close()
        finally:
            for name in self._names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
                shutil.rmtree(ETC / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                ETC.rmdir()

    def next_number(self) -> int:
        """Return a number that nothing in this lab has."""
        self._numbers += 1
        return self._numbers

    def namespace(self, kind: str) -> Namespace:
        """Return a new namespace, which forwards what is not for itself."""
        name = f"{PREFIX}-{os.getpid()}-{kind}{self.next_number()}"
        run("ip", "netns", "add", name)
        self._names.append(name)
        (ETC / name).mkdir(parents=True)
        (ETC / name / "hosts").write_text(HOSTS)
        made = Namespace(name)
        made.ip("link set lo up")
        made.run(
            "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
            "net.ipv6.conf.default.accept_dad=0", "net.ipv4.conf.all.rp_filter=0")
        return made

    @staticmethod
    def wire(one: Namespace, one_end: str, other: Namespace, other_end: str) -> None:
        """Put a cable between two namespaces."""
        one.ip(
            f"link add {one_end} type veth peer name {other_end} netns {other.name}",
            f"link set {one_end} up")
        other.ip(f"link set {other_end} up")

    def place(
        self, *, ipv4: bool = True, ipv6: bool = False, line: Line | None = None,
    ) -> Namespace:
        """Return a new host at the internet."""
        host = self.namespace("place")
        self.attach(host, ipv4=ipv4, ipv6=ipv6, line=line)
        return host

    def attach(
        self, client: Namespace, *, ipv4: bool = True, ipv6: bool = False,
        line: Line | None = None,
    ) -> int:
        """Give a namespace a way to the internet, and public addresses; return its number."""
        number = self.next_number()
        if line is None:
            self.wire(client, UP, self.internet, f"down{number}")
        else:
            self.join(line, client, UP, self.internet, f"down{number}")
        self.address(client, number, ipv4=ipv4, ipv6=ipv6)
        return number

    def address(
        self, client: Namespace, number: int, *, ipv4: bool = True, ipv6: bool = False,
    ) -> None:
        """Give both ends of a cable to the internet their addresses, and the client its routes."""
        down = f"down{number}"
        if ipv4:
            self.internet.ip(f"address add 198.51.{number}.1/24 dev {down}")
            client.ip(
                f"address add 198.51.{number}.2/24 dev {UP}",
                f"route add default via 198.51.{number}.1")
        if ipv6:
            self.internet.ip(
                f"address add 2001:db8:{number}::1/64 dev {down}",
                f"route add 2001:db8:{number}:1::/64 via 2001:db8:{number}::2 dev {down}")
            client.ip(
                f"address add 2001:db8:{number}::2/64 dev {UP}",
                f"route add default via 2001:db8:{number}::1 dev {UP}")

    def home(
        self, nat: str = PORT_RESTRICTED, *, behind: Home | None = None, ipv6: bool = False,
        line: Line | None = None,
    ) -> Home:
        """Return a new home behind the internet, or behind the router of another home.

        IPv6 is not translated, but guarded as well.
        """
        if behind is None:
            router = self.namespace("router")
            number = self.attach(router, ipv6=ipv6, line=line)
        else:
            router = behind.host()
            number = self.next_number()
        router.ip(
            f"link add {LAN} type bridge", f"link set {LAN} up",
            f"address add 192.168.{number}.1/24 dev {LAN}")
        if ipv6:
            router.ip(f"address add 2001:db8:{number}:1::ffff/64 dev {LAN}")
        router.nft(
            f"table inet guard {{ {GUARD} }}\n"
            "table ip nat { chain post { type nat hook postrouting priority 100; "
            f'oifname "{UP}" {nat}; }}; }}')
        return Home(self, router, number)

    # -- What runs in a lab ----------------------------------------------------------------

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a program that ends with the lab; its output goes to a file of the folder."""
        log = self.ending.enter_context((self.folder / f"log{self.next_number()}").open("w"))
        process = subprocess.Popen(
            argv, cwd=self.folder, text=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.ending.callback(end, process)
        return process

    def join(
        self, line: Line, one: Namespace, one_name: str, other: Namespace, other_name: str,
    ) -> None:
        """Put a line between two namespaces."""
        ready = self.folder / f"ready{self.next_number()}"
        self.start(
            sys.executable, LINK, "join", one.name, one_name, other.name, other_name, str(ready),
            "--delay-ms", str(line.delay_ms), "--loss", str(line.loss),
            "--bits-per-s", str(line.bits_per_s), "--seed", str(line.seed))
        wait_for_file(ready)

    def relay(self, *flags: str) -> None:
        """Start a relay with STUN at the internet, and wait until it serves.

        The one before ends, with all that it holds.
        """
        self._relay.close()
        process = subprocess.Popen(
            self.servers.command(
                sys.executable, str(ROOT / "connectoid_relay.py"), "--db", ":memory:", "--stun",
                "--rate", "0", "--port", str(RELAY_PORT), *flags),
            cwd=self.folder, text=True, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._relay.callback(end, process)
        assert process.stderr is not None
        self._relay.callback(process.stderr.close)
        assert "listening" in process.stderr.readline()

    def turn(self, *access: str) -> None:
        """Start a TURN server at the internet, with what says who may use it."""
        self.start(*self.servers.command(
            "turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", *access,
            "--realm=example.com",
            f"--listening-ip={RELAY_IPV4}", f"--relay-ip={RELAY_IPV4}",
            f"--listening-port={TURN_PORT}", "--log-file=stdout", "--pidfile=turn.pid"))

    def lend(self) -> None:
        """Have the relay lend a TURN server, over UDP and TCP."""
        self.turn("--use-auth-secret", f"--static-auth-secret={TURN_SECRET}")
        secret = self.folder / "turn-secret"
        secret.write_text(TURN_SECRET)
        secret.chmod(0o600)
        url = f"turn:{RELAY_IPV4}:{TURN_PORT}"
        self.relay(
            "--turn", url, "--turn", f"{url}?transport=tcp", "--turn-secret", str(secret))

    def bad_server(self, kind: str, place: Namespace, port: int, host: str = ANY_IPV4) -> None:
        """Start a server of a kind of `bad_servers` in a namespace, and wait until it listens."""
        ready = self.folder / f"ready{self.next_number()}"
        self.start(*place.command(sys.executable, BAD_SERVERS, kind, host, str(port), str(ready)))
        wait_for_file(ready)

    def hold(self, place: Namespace, name: str) -> None:
        """Make a tunnel in a namespace that swallows what goes into it."""
        ready = self.folder / f"ready{self.next_number()}"
        self.start(*place.command(sys.executable, LINK, "swallow", name, str(ready)))
        wait_for_file(ready)


def end(process: subprocess.Popen[str]) -> None:
    """End a process."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_file(path: Path) -> None:
    """Return once a program has made a file."""
    subprocess.run(
        ["sh", "-c", 'until test -e "$0"; do sleep 0.01; done', str(path)], check=True, timeout=60)


@contextlib.contextmanager
def open_lab(folder: Path) -> Iterator[Lab]:
    """Lend a lab with a relay."""
    lab = Lab(folder)
    try:
        lab.relay()
        yield lab
    finally:
        lab.close()
