"""Test the units and connectoid-certificate, in mount namespaces that have an /etc of their own."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
from harness import NOTHING, OK, ROOT, Owner, check, needs, post, receive, send

from connectoid_admin import build_admin_parser, find_subject
from connectoid_relay import build_parser

HERE = ROOT / "systemd"
SERVICE, SOCKET_UNIT = HERE / "connectoid-relay.service", HERE / "connectoid-relay.socket"
SCRIPT = HERE / "connectoid-certificate"
# Of 10. What is missing are sockets for the internet, and readers of the keys.
MAX_EXPOSURE = 1.2
# The user nobody, as a number: the service's user has no name here either.
USER_ID = 65534
# The group connectoid in a test's /etc.
GROUP_ID = 64_999
# How many seconds a busy machine may need for a step.
SLOWLY = 20
WITH_TLS = (
    "--host",
    "127.0.0.1",
    "--tls-cert",
    "/etc/connectoid/tls/fullchain.pem",
    "--tls-key",
    "/etc/connectoid/tls/privkey.pem",
)
RELOAD = "try-reload-or-restart connectoid-relay.service\n"


def can_mount() -> bool:
    """Return whether we can have a mount namespace: some containers refuse them, even to root."""
    probe = ["unshare", "--mount", "mount", "--bind", "/etc", "/etc"]
    return (
        os.geteuid() == 0
        and bool(shutil.which("unshare"))
        and not subprocess.run(probe, capture_output=True, check=False).returncode
    )


needs_root = pytest.mark.skipif(not can_mount(), reason="needs root, and leave to mount")


class Pair(NamedTuple):
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


def make_pair(folder: Path, serial: int, password: bytes = b"") -> Pair:
    """Write a self-signed certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(serial)
        .public_key(key.public_key())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    lock = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    pair = Pair(folder / f"{serial}.crt", folder / f"{serial}.key")
    pair.certificate.write_bytes(certificate.public_bytes(pem.Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock))
    return pair


def opening(*folders: Path) -> Iterator[str]:
    """Yield commands that let everybody in a namespace reach folders below /root and the like."""

    def is_closed(folder: Path) -> bool:
        return not folder.stat().st_mode & stat.S_IXOTH

    tops = {
        closed[-1]
        for folder in folders
        if (closed := [above for above in folder.parents if is_closed(above)])
    }
    yield from ["mount --rbind / /mnt"] if tops else []
    for top in sorted(tops):
        yield f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(top))}"
    for folder in folders:
        if tops & set(folder.parents):
            path = shlex.quote(str(folder))
            yield f"mkdir -p {path} && mount --bind /mnt{path} {path}"


class Host:
    """Run programs on this machine with their own /etc, group connectoid and systemctl."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.folder, self.etc, self.bin, self.state = (
            folder,
            folder / "etc",
            folder / "bin",
            folder / "state",
        )
        self.tls = self.etc / "connectoid" / "tls"
        self.etc.mkdir()
        # These programs look for these files.
        for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
            shutil.copy(Path("/etc") / name, self.etc)
        groups = self.etc / "group"
        others = [
            line for line in groups.read_text().splitlines() if not line.startswith("connectoid:")
        ]
        groups.write_text("\n".join([*others, f"connectoid:x:{GROUP_ID}:", ""]))
        self.state.mkdir(mode=0o700)
        os.chown(self.state, USER_ID, USER_ID)
        self.bin.mkdir()
        self.fake(
            "systemctl",
            f'echo "$@" >>{folder}/systemctl.log; [ -z "$RELAY" ] || kill -HUP "$RELAY"',
        )
        python = [
            Path(sys.base_prefix).resolve(),
            Path(sys.prefix).resolve(),
            ROOT.resolve(),
            folder.resolve(),
        ]
        self._enter = " && ".join([f"mount --bind {self.etc} /etc", *opening(*python), 'exec "$@"'])

    def fake(self, name: str, commands: str) -> None:
        """Put a shell script where it is found before the program of that name."""
        program = self.bin / name
        program.write_text(f"#!/bin/sh\n{commands}\n")
        program.chmod(0o755)

    def start(self, *command: object, **environment: object) -> subprocess.Popen[str]:
        """Start a program; the variable RELAY names the process that a reload is for."""
        path = f"{self.bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        variables = {"PATH": path, **environment}
        return subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", self._enter, "sh", *map(str, command)],
            text=True,
            cwd=self.folder,
            env={name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            umask=0,
            process_group=0,
        )

    def run(self, *command: object, **environment: object) -> tuple[int, str, str]:
        """Run a program and return its exit code, output and errors."""
        process = self.start(*command, **environment)
        output, errors = process.communicate(timeout=SLOWLY)
        return process.returncode, output, errors

    def reloads(self) -> str:
        """Return what systemctl was asked for since the last time."""
        record = self.folder / "systemctl.log"
        asked = record.read_text() if record.exists() else ""
        record.unlink(missing_ok=True)
        return asked

    def installed(self) -> dict[str, tuple[str, bytes]]:
        """Return mode, owner and content of each file in /etc/connectoid/tls."""
        return {path.name: (described(path), path.read_bytes()) for path in self.tls.iterdir()}


def described(path: Path) -> str:
    """Return mode, user and group of a file."""
    status = path.stat()
    return f"{status.st_mode & 0o7777:04o} {status.st_uid}:{status.st_gid}"


def as_user(*command: object, groups: str = "") -> tuple[object, ...]:
    """Return a command that runs as the service's user would, with or without the group."""
    membership = ["--groups", groups] if groups else ["--clear-groups"]
    return (
        "setpriv",
        "--reuid",
        USER_ID,
        "--regid",
        USER_ID,
        *membership,
        "--no-new-privs",
        *command,
    )


def in_place(pair: Pair) -> dict[str, tuple[str, bytes]]:
    """Return what Host.installed returns when this pair is installed."""
    mode = f"0640 0:{GROUP_ID}"
    return {
        "fullchain.pem": (mode, pair.certificate.read_bytes()),
        "privkey.pem": (mode, pair.key.read_bytes()),
    }


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Return a machine on which the script has not run yet."""
    return Host(tmp_path)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Return the first certificate."""
    return make_pair(tmp_path, 1)


@pytest.fixture
def renewed(tmp_path: Path) -> Pair:
    """Return the certificate that replaces it."""
    return make_pair(tmp_path, 2)


class Service(NamedTuple):
    """A relay that runs as the service's user in a Host's namespace."""

    # The relay's process, or strace's.
    process: subprocess.Popen[str]
    port: int

    def log_line(self) -> str:
        """Return the next line of the log, when it is there."""
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], SLOWLY)[0]
        return self.process.stderr.readline()

    def stop(self, pid: int = 0) -> tuple[int, str]:
        """Send SIGTERM and return the exit code and the log since the ready line."""
        os.kill(pid or self.process.pid, signal.SIGTERM)
        _, log = self.process.communicate(timeout=SLOWLY)
        return self.process.returncode, log


@pytest.fixture
def serve(host: Host) -> Iterator[Callable[..., Service]]:
    """Return a function that starts a relay with flags, under a program such as `strace`.

    All relays end with the test.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*flags: object, under: tuple[object, ...] = (), **environment: object) -> Service:
        relay = as_user(
            sys.executable, ROOT / "connectoid_relay.py", "--port", 0, *flags, groups="connectoid"
        )
        process = host.start(*under, *relay, STATE_DIRECTORY=host.state, **environment)
        started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        ready = re.fullmatch(r"connectoid relay \S+ listening on https?://\S+:(\d+)\n", line)
        assert ready, line
        return Service(process, int(ready[1]))

    yield start
    for process in started:
        # The whole group, since strace does not pass signals on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=SLOWLY)


def serial_at(port: int, trusted: Path) -> int:
    """Return the serial number of the certificate that a relay shows."""
    context = ssl.create_default_context(cafile=str(trusted))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=SLOWLY) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        shown = client.getpeercert(binary_form=True)
        assert shown
        return x509.load_der_x509_certificate(shown).serial_number


# The units ---------------------------------------------------------------------------------


def test_unit_says_nothing_that_a_variable_of_the_host_could_not_change(tmp_path: Path) -> None:
    unit = SERVICE.read_text("utf-8")
    own, file = (unit.index(line) for line in ("Environment=FLAGS=\n", "EnvironmentFile="))
    assert own < file
    assert build_parser().parse_args([]).port == 8080
    host = tmp_path / "relay.env"
    host.write_text("CONNECTOID_PORT=9000\n")
    arguments = build_admin_parser().parse_args(["check", "--env", str(host)])
    assert find_subject(arguments).flags.port == 9000


@needs("systemd-analyze")
def test_units_are_what_systemd_expects(tmp_path: Path) -> None:
    units = [tmp_path / unit.name for unit in (SERVICE, SOCKET_UNIT)]
    units[0].write_text(SERVICE.read_text().replace("/opt/connectoid/bin/python", sys.executable))
    units[1].write_text(SOCKET_UNIT.read_text())
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs("systemd-analyze")
def test_service_is_hardened() -> None:
    report = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", SERVICE],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exposure = re.search(r"Overall exposure level for connectoid-relay\.service: ([\d.]+)", report)
    assert exposure
    assert float(exposure[1]) <= MAX_EXPOSURE, f"{exposure[1]}:\n" + "\n".join(
        line for line in report.splitlines() if not line.startswith("✓")
    )


def unit_values(name: str) -> list[str]:
    """Return the values of a setting of the service, in order."""
    return re.findall(rf"^{name}=(.*)$", SERVICE.read_text(), re.MULTILINE)


def system_calls(word: str) -> set[str]:
    """Return the system calls that a word of SystemCallFilter= stands for."""
    if not word.startswith("@"):
        return {word}
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    return {
        call
        for line in map(str.strip, listed)
        if line and line[0] != "#"
        for call in system_calls(line)
    }


def allowed_calls() -> set[str]:
    """Return the system calls that the service's filter allows."""
    allowed: set[str] = set()
    for value in unit_values("SystemCallFilter"):
        calls = set().union(*map(system_calls, value.removeprefix("~").split()))
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


class Trace(NamedTuple):
    """What strace saw of the relay, from its first instruction on."""

    lines: list[str]

    def calls(self) -> set[str]:
        """Return the names of the system calls."""
        return {call[1] for line in self.lines if (call := re.match(r"\d+ +(\w+)\(", line))}

    def forbidden(self) -> list[str]:
        """Return what the unit would have forbidden: calls, families of sockets, writable code."""
        families = set(re.findall(r"\bsocket(?:pair)?\((\w+)", "\n".join(self.lines)))
        code = [
            line
            for line in self.lines
            if "PROT_EXEC" in line and re.search(r"PROT_WRITE|mprotect\(", line)
        ]
        return [
            *sorted(self.calls() - allowed_calls()),
            *sorted(families - set(unit_values("RestrictAddressFamilies")[0].split())),
            *code,
        ]


def read_trace(file: Path) -> Trace:
    """Return the part of a trace that is the relay's own: after setpriv became it."""
    lines = file.read_text().splitlines()
    began = [number for number, line in enumerate(lines) if re.match(r"\d+ +execve\(.*= 0$", line)]
    return Trace(lines[began[-1] + 1 :])


@pytest.mark.slow
@needs_root
@needs("strace", "setpriv", "systemd-analyze")
def test_relay_does_nothing_that_the_unit_forbids(
    host: Host, serve: Callable[..., Service], tmp_path: Path, alice: Owner
) -> None:
    trace = tmp_path / "trace"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(host.state / "notify"))
        (host.state / "notify").chmod(0o666)
        service = serve(
            "--host",
            "127.0.0.1",
            "--message-ttl",
            1,
            "--udp",
            "--stun",
            under=("strace", "-f", "-qq", "-o", trace),
            NOTIFY_SOCKET=host.state / "notify",
            WATCHDOG_USEC=2_000_000,
        )
        # strace does not pass signals on.
        pid = int(trace.read_text().split()[0])
        assert post(service.port, send(alice)) == (200, OK)
        answer = alice.open(post(service.port, check(alice))[1]["question"])
        assert post(service.port, receive(alice, answer))[1]["data"] == "QUJD"
        # Meanwhile the message is swept.
        assert post(service.port, check(alice, at=2**62, wait=3)) == (200, NOTHING)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(SLOWLY)
            client.sendto(
                b'{"action": "check", "pub": "%s"}' % alice.pub.encode(),
                ("127.0.0.1", service.port),
            )
            assert client.recv(1_000) == b'{"ok": true, "found": false}'
        os.kill(pid, signal.SIGHUP)
        assert "read the files again" in service.log_line()
        # READY=1 may come first.
        assert b"WATCHDOG=1" in manager.recv(1_000) + manager.recv(1_000)
        assert service.stop(pid)[0] == 0
    seen = read_trace(trace)
    # These calls show that the relay was used, and that it swept.
    assert {"fdatasync", "ftruncate", "accept4", "recvfrom"} <= seen.calls()
    assert seen.forbidden() == []


@pytest.mark.slow
@needs_root
@needs("strace", "setpriv", "systemd-analyze")
def test_relay_with_tls_does_nothing_that_the_unit_forbids(
    host: Host, serve: Callable[..., Service], tmp_path: Path, pair: Pair, renewed: Pair
) -> None:
    trace = tmp_path / "trace"
    host.run(SCRIPT, *pair)
    service = serve(*WITH_TLS, under=("strace", "-f", "-qq", "-o", trace))
    pid = int(trace.read_text().split()[0])
    assert serial_at(service.port, pair.certificate) == 1
    host.run(SCRIPT, *renewed, RELAY=pid)
    assert "read the files again" in service.log_line()
    assert serial_at(service.port, renewed.certificate) == 2
    assert service.stop(pid)[0] == 0
    assert read_trace(trace).forbidden() == []


# connectoid-certificate ----------------------------------------------------------------------


@needs_root
def test_certificate_script_puts_both_in_place_and_reloads(host: Host, pair: Pair) -> None:
    assert host.run(SCRIPT, *pair) == (0, "", "")
    assert host.installed() == in_place(pair)
    assert described(host.tls) == described(host.tls.parent) == f"0750 0:{GROUP_ID}"
    assert host.reloads() == RELOAD


@needs_root
def test_certificate_script_does_nothing_the_second_time(host: Host, pair: Pair) -> None:
    host.run(SCRIPT, *pair)
    before = [path.stat().st_ino for path in sorted(host.tls.iterdir())]
    host.reloads()
    assert host.run(SCRIPT, *pair) == (0, "", "")
    assert [path.stat().st_ino for path in sorted(host.tls.iterdir())] == before
    assert host.reloads() == ""


@needs_root
def test_certificate_script_replaces_what_was_renewed(
    host: Host, pair: Pair, renewed: Pair
) -> None:
    host.run(SCRIPT, *pair)
    host.reloads()
    assert host.run(SCRIPT, *renewed) == (0, "", "")
    assert host.installed() == in_place(renewed)
    assert host.reloads() == RELOAD


@needs_root
def test_certificate_script_takes_a_new_certificate_for_the_old_key(host: Host, pair: Pair) -> None:
    host.run(SCRIPT, *pair)
    host.reloads()
    # A longer chain.
    pair.certificate.write_text(pair.certificate.read_text() * 2)
    assert host.run(SCRIPT, *pair) == (0, "", "")
    assert host.installed() == in_place(pair)
    assert host.reloads() == RELOAD


@needs_root
def test_certificate_script_never_shows_the_key(host: Host, pair: Pair) -> None:
    pair.key.chmod(0o644)
    # Each of these programs first records what there is at this moment.
    for name in ("python3", "chmod", "mv"):
        host.fake(
            name,
            f"find /etc/connectoid/tls -type f -printf '%m %U:%G\\n' >>{host.folder}/seen\n"
            f'exec /usr/bin/{name} "$@"',
        )
    assert host.run(SCRIPT, *pair) == (0, "", "")
    seen = (host.folder / "seen").read_text().split("\n")
    assert set(seen) == {"", "600 0:0", f"600 0:{GROUP_ID}", f"640 0:{GROUP_ID}"}


WRONG = "not a certificate in PEM and its private key"


def spoil(name: str, pair: Pair, renewed: Pair) -> tuple[Pair, str]:
    """Return a pair that is wrong in a certain way, and the message about it."""
    empty, text = renewed.certificate.parent / "empty", renewed.certificate.parent / "text"
    empty.touch()
    text.write_text("no certificate\n")
    locked = make_pair(renewed.certificate.parent, 3, b"secret")
    missing = renewed.certificate.parent / "missing"
    of_no_use = "no such file, or an empty one"
    return {
        "foreign key": (Pair(renewed.certificate, pair.key), WRONG),
        "swapped": (Pair(renewed.key, renewed.certificate), WRONG),
        "text": (Pair(text, renewed.key), WRONG),
        "locked key": (locked, WRONG),
        "empty": (Pair(empty, renewed.key), of_no_use),
        "missing": (Pair(renewed.certificate, missing), of_no_use),
        "folder": (Pair(renewed.certificate, renewed.key.parent), of_no_use),
    }[name]


@needs_root
@pytest.mark.parametrize(
    "name", ["foreign key", "swapped", "text", "locked key", "empty", "missing", "folder"]
)
def test_certificate_script_keeps_the_old_when_the_new_are_wrong(
    host: Host, pair: Pair, renewed: Pair, name: str
) -> None:
    host.run(SCRIPT, *pair)
    host.reloads()
    wrong, reason = spoil(name, pair, renewed)
    status, output, errors = host.run(SCRIPT, *wrong)
    assert (status, output) == (1, "")
    assert re.fullmatch(rf"connectoid-certificate: .*: {reason}\n", errors)
    assert host.installed() == in_place(pair)
    assert host.reloads() == ""


@needs_root
@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"]])
def test_certificate_script_says_how_it_is_used(host: Host, arguments: list[str]) -> None:
    usage = "connectoid-certificate: usage: connectoid-certificate FULLCHAIN PRIVKEY\n"
    assert host.run(SCRIPT, *arguments) == (2, "", usage)
    assert not host.tls.exists()
    assert host.reloads() == ""


@needs_root
@needs("setpriv")
def test_certificate_script_wants_root(host: Host, pair: Pair) -> None:
    sentence = "connectoid-certificate: only root can do this: use sudo\n"
    assert host.run(*as_user(SCRIPT, *pair, groups="connectoid")) == (1, "", sentence)


@needs_root
def test_certificate_script_wants_the_group(host: Host, pair: Pair) -> None:
    groups = host.etc / "group"
    groups.write_text(re.sub(r"(?m)^connectoid:.*\n", "", groups.read_text()))
    sentence = "connectoid-certificate: no group connectoid: groupadd --system connectoid\n"
    assert host.run(SCRIPT, *pair) == (1, "", sentence)
    assert not host.tls.exists()


@needs_root
def test_certificate_script_tells_when_the_reload_failed(host: Host, pair: Pair) -> None:
    host.fake("systemctl", "exit 1")
    status, output, errors = host.run(SCRIPT, *pair)
    assert (status, output) == (1, "")
    assert errors.startswith("connectoid-certificate: the files are in place, but")
    assert host.installed() == in_place(pair)


@needs_root
@needs("setpriv")
def test_certificate_is_the_groups_alone(host: Host, pair: Pair) -> None:
    host.run(SCRIPT, *pair)
    for name, file in zip(("fullchain.pem", "privkey.pem"), pair, strict=True):
        read = ("cat", f"/etc/connectoid/tls/{name}")
        assert host.run(*as_user(*read, groups="connectoid")) == (0, file.read_text(), "")
        assert host.run(*as_user(*read))[:2] == (1, "")
        assert host.run(*as_user("touch", *read[1:], groups="connectoid"))[0] == 1


@needs_root
@needs("setpriv")
def test_relay_serves_a_renewed_certificate_after_the_script(
    host: Host, serve: Callable[..., Service], pair: Pair, renewed: Pair
) -> None:
    host.run(SCRIPT, *pair)
    service = serve(*WITH_TLS)
    assert serial_at(service.port, pair.certificate) == 1
    assert host.run(SCRIPT, *renewed, RELAY=service.process.pid) == (0, "", "")
    assert "read the files again" in service.log_line()
    assert serial_at(service.port, renewed.certificate) == 2
    assert service.stop() == (0, "")
