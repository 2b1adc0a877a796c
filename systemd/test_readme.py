"""Do what README.md says under "Host it", word for word, on machines made of namespaces.

A machine has an /etc, /opt, /var/lib, /usr/bin, homes, processes and a network of its own; what it
changes is gone with it. Stand-ins are there for what it cannot have: systemd, apt's mirrors, sudo's
setting up, certificate authorities. All else is real: python3, pip, groupadd, curl, ssh, sshd, the relay.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import OK, ROOT, Owner, check, send

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
SLOWLY = 20  # seconds until something that will happen has surely happened
INSTALLING = 120  # seconds for pip and its index
HEALTHY = '{"ok": true}'
HOME = "/home/alice"
CHECKOUT = f"{HOME}/connectoid"
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "bash", "curl", "openssl", "/usr/bin/python3")


def commands() -> dict[str, list[str]]:
    """Return README's blocks of shell commands under "Host it", by their headings."""
    blocks: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^##(?=#)", README.split("\n## Host it\n")[1].split("\n## ")[0]):
        title, _, text = part.lstrip("#").strip().partition("\n")
        found = re.findall(r"^ *```sh\n.*?^ *```$", text, re.MULTILINE | re.DOTALL)
        blocks[title] = [textwrap.dedent(block).removeprefix("```sh\n").removesuffix("```") for block in found]
    return {title: found for title, found in blocks.items() if found}


COMMANDS = commands()
VPS, PORT_443 = "On a VPS, under systemd", "Port 443, and restarts that nobody notices"
HTTPS, CADDY, NGINX = "HTTPS, built in", "HTTPS by Caddy", "HTTPS by nginx"
PI = "A Raspberry Pi at home"


# The machine ---------------------------------------------------------------------------------


class Manager:
    """Stand in for systemd, as a machine's process 1: Debian's Python runs this class's source.

    It does what the units say of environment, user, group, folders, sockets and signals, but
    confines nothing: test_systemd.py looks at that.
    """

    def __init__(self) -> None:
        self.units: dict[str, dict[str, list[str]]] = {}  # as read before the last daemon-reload
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.sockets: dict[str, socket.socket] = {}
        self.notify = socket.socket()

    def unit(self, name: str) -> dict[str, list[str]]:
        """Return the settings of a unit and its overrides."""
        if name not in self.units:
            file = Path("/etc/systemd/system", name)
            lines = [line for part in [file, *sorted(Path(f"{file}.d").glob("*.conf"))]
                     for line in part.read_text().splitlines() if re.match(r"\w+=", line)]
            unit: dict[str, list[str]] = {}
            for key, _, text in (line.partition("=") for line in lines):
                unit[key] = [*unit.get(key, []), text] if text else []
            self.units[name] = unit
        return self.units[name]

    def environment(self, unit: dict[str, list[str]]) -> dict[str, str]:
        """Return the variables that a service gets."""
        lines = [line.strip('"') for line in unit["Environment"]]
        for file in unit["EnvironmentFile"]:
            with contextlib.suppress(FileNotFoundError):
                lines += Path(file.removeprefix("-")).read_text().splitlines()
        return {name: text for name, _, text in (line.partition("=") for line in lines)}

    def state_folder(self, name: str) -> str:
        """Make the folder that a service with DynamicUser= may write to."""
        private, link = Path("/var/lib/private", name), Path("/var/lib", name)
        private.mkdir(mode=0o700, exist_ok=True)
        os.chown(private, 65534, 65534)
        if not link.is_symlink():
            link.symlink_to(f"private/{name}")
        return str(link)

    def start(self, name: str) -> None:
        """Start a service, until it says that it is ready, or open a socket."""
        if name in self.sockets or self.pid(name):
            return
        unit, service = self.unit(name), name.replace(".socket", ".service")
        if name.endswith(".socket"):
            if self.pid(service):
                raise RuntimeError(f"Socket service {service} already active, refusing.")
            (port,) = unit["ListenStream"]
            self.sockets[name] = socket.create_server(
                ("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=int(unit["Backlog"][0]))
            return
        variables = self.environment(unit)
        command = [part for word in unit["ExecStart"][0].split()
                   for part in (variables[word[1:]].split() if word.startswith("$") else [word])]
        self.notify.close()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind("")  # a name that Linux thinks up
        variables["NOTIFY_SOCKET"] = self.notify.getsockname().decode().replace("\0", "@")
        variables["STATE_DIRECTORY"] = self.state_folder(unit["StateDirectory"][0])
        shell, descriptors = 'exec "$@"', []
        if opened := self.sockets.get(name.replace(".service", ".socket")):
            descriptors = [opened.fileno()]
            shell = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&{opened.fileno()}'
        user = ["setpriv", "--reuid=65534", "--regid=65534", f"--groups={unit['SupplementaryGroups'][0]}",
                "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        with Path("/run/journal").open("ab") as journal:
            self.services[name] = subprocess.Popen(
                ["bash", "-c", shell, "bash", *user, *command], env={"PATH": "/usr/bin:/bin", **variables}, cwd="/",
                stdout=journal, stderr=journal, pass_fds=descriptors, umask=int(unit["UMask"][0], 8))
        self.wait_until_ready(name)

    def wait_until_ready(self, name: str) -> None:
        """Return when a service that starts says so."""
        self.notify.settimeout(0.1)
        for _ in range(200):
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in self.notify.recv(4096):
                    return
            if not self.pid(name):
                break
        self.stop(name)
        raise RuntimeError(f"Job for {name} failed")

    def pid(self, name: str) -> int:
        """Return the process id of a service that runs, or 0."""
        service = self.services.get(name)
        return service.pid if service and service.poll() is None else 0

    def stop(self, name: str) -> None:
        """End a service, or close a socket."""
        if opened := self.sockets.pop(name, None):
            opened.close()
        if service := self.services.pop(name, None):
            service.terminate()
            service.wait(10)

    def restart(self, name: str) -> None:
        """End a service and start it."""
        self.stop(name)
        self.start(name)

    def reload(self, name: str) -> None:
        """Have a service read its files again."""
        if not self.pid(name):
            raise RuntimeError(f"{name} is not active, cannot reload.")
        command = self.unit(name)["ExecReload"][0].replace("$MAINPID", str(self.pid(name)))
        subprocess.run(command.split(), check=True)

    def reload_if_active(self, name: str) -> None:
        """Do what try-reload-or-restart does with a service that can reload."""
        if self.pid(name):
            self.reload(name)

    def status(self, name: str) -> None:
        """Return if a unit is active."""
        if name not in self.sockets and not self.pid(name):
            raise RuntimeError(f"{name}: inactive")

    def enable(self, name: str) -> None:
        """Have a unit started with the machine."""
        for target in self.unit(name)["WantedBy"]:
            link = Path(f"/etc/systemd/system/{target}.wants", name)
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(f"/etc/systemd/system/{name}")

    def disable(self, name: str) -> None:
        """Undo that."""
        for target in self.unit(name)["WantedBy"]:
            Path(f"/etc/systemd/system/{target}.wants", name).unlink(missing_ok=True)

    def obey(self, verb: str, *words: str) -> str:
        """Carry out what systemctl was asked for; return what is wrong, if so."""
        if verb == "daemon-reload":
            self.units.clear()
            return ""
        does = {"start": self.start, "stop": self.stop, "restart": self.restart, "status": self.status,
                "reload": self.reload, "try-reload-or-restart": self.reload_if_active,
                "enable": self.enable, "disable": self.disable}
        then = {"enable": self.start, "disable": self.stop}[verb] if "--now" in words else None
        try:
            for word in words:
                if word != "--now":
                    name = word if "." in word else f"{word}.service"
                    does[verb](name)
                    if then:
                        then(name)
        except (RuntimeError, OSError) as failure:
            return str(failure)
        return ""

    def serve(self) -> None:
        """Obey until the end."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("/run/systemctl")
            Path("/run/systemctl").chmod(0o666)
            listener.listen()
            print("ready", flush=True)
            while True:
                client, _ = listener.accept()
                with client:
                    client.sendall(self.obey(*client.makefile().read().split("\0")).encode())


SYSTEMD = "\n".join([
    "from __future__ import annotations", "import contextlib, os, re, socket, subprocess", "from pathlib import Path",
    textwrap.dedent(inspect.getsource(Manager)), "Manager().serve()"])

# Each as small as can be. What hooks and cron need is in /usr/bin, where they look.
STAND_INS = {
    "/usr/bin/systemctl": """#!/usr/bin/python3 -I
import os, socket, sys
if os.geteuid() and sys.argv[1] != "status":
    sys.exit("Interactive authentication required.")
with socket.socket(socket.AF_UNIX) as manager:
    manager.connect("/run/systemctl")
    manager.sendall("\\0".join(sys.argv[1:]).encode())
    manager.shutdown(socket.SHUT_WR)
    sys.exit(manager.makefile().read() or 0)
""",
    "/usr/bin/journalctl": '#!/bin/sh\n[ "$(id -u) $*" = "0 -u connectoid-relay" ] && exec cat /run/journal\n',
    # A real one asks who may: this lets everybody, so that a line that lacks it fails.
    "/usr/bin/sudo": """#!/bin/sh
HOME=/root USER=root SUDO_USER=alice exec /usr/local/bin/as-root --reuid 0 --regid 0 --clear-groups "$@"
""",
    # What shall be installed is there already, or the list is wrong.
    "/usr/bin/apt-get": """#!/bin/sh
[ "$(id -u)" = 0 ] || exit 100
[ "$*" = update ] && exit
[ "$1 $2" = "install -y" ] && shift 2 || exit 100
for package; do
    dpkg -s "$package" | grep -q '^Status: install ok installed' ||
        [ "$package" = certbot ] || [ "$package" = caddy ] || exit 100
done
""",
    # The relay is in the machine's network; pip, in the same block, needs the world's.
    "/usr/local/bin/curl": '#!/bin/sh\nexec sudo nsenter --net=/run/network /usr/bin/curl "$@"\n',
    # What an authority signs is valid for the name; "localhost" is for the test's own look.
    "/usr/local/bin/sign": """#!/bin/sh
exec openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 -subj /CN=relay.example.com \\
    -addext subjectAltName=DNS:relay.example.com,DNS:localhost -out "$1" -keyout "$2" 2>/dev/null
""",
    # It keeps what it was told, folders for root alone, and runs the hook in a shell: now and with each renewal.
    "/usr/bin/certbot": """#!/bin/bash
set -eu
[ "$(id -u)" = 0 ]
umask 077
if [ "$1" = certonly ]; then
    if [ "$2 $3" = "--webroot -w" ]; then
        [ -d "$4" ]
        shift 3
        set -- certonly --standalone "${@:2}"
    fi
    [ "$2 $3 $5" = "--standalone -d --deploy-hook" ] && [ $# = 6 ]
    mkdir -p "/etc/letsencrypt/live/$4"
    printf %s "$6" >/etc/letsencrypt/hook
    printf %s "$4" >/etc/letsencrypt/name
fi
export RENEWED_LINEAGE="/etc/letsencrypt/live/$(cat /etc/letsencrypt/name)"
sign "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem"
exec sh -c "$(cat /etc/letsencrypt/hook)"
""",
    # Likewise: copy to where it was told, then run the command, now and with each --cron.
    "/root/.acme.sh/acme.sh": """#!/bin/sh
set -eu
if [ "$1" = --install-cert ]; then
    [ "$2 $3 $4 $6 $8" = "-d relay.example.com --fullchain-file --key-file --reloadcmd" ] && [ $# = 9 ]
    printf '%s\\n' "$5" "$7" "$9" >/root/.acme.sh/installed
fi
{ read -r certificate; read -r key; read -r command; } </root/.acme.sh/installed
sign "$certificate" "$key"
cd /root/.acme.sh && eval "$command"
""",
}

# Runs before process 1: what others must not see changed gets a layer over it, or is hidden.
FURNISH = r"""
set -eu
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/changes /mnt/work
[ -z "$FROM" ] || cp -a "$FROM/." /mnt/changes/
cp -L /etc/resolv.conf /etc/hosts /mnt/
for folder in etc opt var/lib usr/bin; do
    mkdir -p "/mnt/changes/$folder" "/mnt/work/$folder"
    mount -t overlay -o "lowerdir=/$folder,upperdir=/mnt/changes/$folder,workdir=/mnt/work/$folder" overlay "/$folder"
done
for folder in root home usr/local/bin; do
    mkdir -p "/mnt/changes/$folder"
    mount --bind "/mnt/changes/$folder" "/$folder"
done
mount -t tmpfs -o mode=755 tmpfs /run
cp --remove-destination /mnt/resolv.conf /mnt/hosts /etc/
mount -t proc proc /proc
touch /run/network && mount --bind /proc/self/ns/net /run/network
ip link set lo up
exec /usr/bin/python3 -I -c "$SYSTEMD"
"""


class Machine:
    """Run commands on a Debian of their own; one can begin as a copy of another."""

    def __init__(self, model: Machine | None = None) -> None:
        changes = f"/proc/{model.process.pid}/root/mnt/changes" if model else ""
        # What pip is told here about its index, it is told there.
        passed = {name: text for name, text in os.environ.items() if re.match(r"(?i)PIP_|\w+_PROXY$", name)}
        self.environment = {**passed, "LANG": "C.UTF-8",
                            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.started = contextlib.ExitStack()
        self.process: subprocess.Popen[str] = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", FURNISH], text=True,
            env={**self.environment, "FROM": changes, "SYSTEMD": SYSTEMD}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise OSError(self.close())
        if not model:
            self.furnish()

    def furnish(self) -> None:
        """Put in place what a new machine has, and the checkout."""
        for name, text in STAND_INS.items():
            self.write(name, text, 0o755)
        self.run("rm -rf /opt/connectoid /etc/connectoid /var/lib/connectoid-relay /etc/systemd/system/connectoid*\n"
                 "if getent group connectoid; then groupdel connectoid; fi\n"
                 "if id alice; then userdel alice; fi\n"
                 "useradd --create-home --shell /bin/bash --password '*' alice\n"
                 "install -m 4755 /usr/bin/setpriv /usr/local/bin/as-root\n"
                 "install -d -m 0711 /var/lib/private\n", user="root")  # systemd's is 0700, but shown to the service
        for name in ("connectoid_relay.py", *(f"systemd/connectoid-{name}"
                                              for name in ("certificate", "relay.service", "relay.socket"))):
            self.write(f"{CHECKOUT}/{name}", (ROOT / name).read_text())

    def path(self, name: str) -> Path:
        """Return where a file of the machine is seen from here."""
        return Path(f"/proc/{self.process.pid}/root{name}")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        """Write a file, and the folders above it."""
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)
        self.path(name).chmod(mode)

    def start(self, block: str, user: str = "alice", *enter: str) -> subprocess.Popen[str]:
        """Start a block of commands in the checkout."""
        pid = self.process.pid
        enter = ("nsenter", "--target", str(pid), "--mount", f"--pid=/proc/{pid}/ns/pid_for_children", *enter)
        home = HOME if user == "alice" else "/root"
        return self.started.enter_context(subprocess.Popen(
            [*enter, "setpriv", "--reuid", user, "--regid", user, "--init-groups", "env", "-C",
             CHECKOUT if self.path(CHECKOUT).exists() else "/", "bash", "-euo", "pipefail", "-c", block],
            env={**self.environment, "HOME": home, "USER": user}, text=True, umask=0o022,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE))

    def inside(self, block: str, user: str = "alice") -> subprocess.Popen[str]:
        """Start a block that knows no network but the machine's."""
        return self.start(block, user, "--net")

    def run(self, block: str, user: str = "alice") -> str:
        """Run a block of commands and return what it printed; it must succeed."""
        process = self.start(block, user)
        output, errors = process.communicate(timeout=INSTALLING)
        assert process.returncode == 0, f"{block}\nended with {process.returncode}:\n{output}{errors}{self.log()}"
        return output

    def log(self) -> str:
        """Return what the service has written."""
        journal = self.path("/run/journal")
        return journal.read_text() if journal.exists() else ""

    def ask(self, url: str, *options: str) -> str:
        """Return what curl prints, or nothing."""
        process = self.start(shlex.join(["curl", "-s", "--max-time", "5", *options, url]))
        return process.communicate(timeout=SLOWLY)[0]

    def close(self) -> str:
        """End all that runs, and return what process 1 complained about."""
        self.process.kill()
        self.started.close()
        return self.process.communicate(timeout=SLOWLY)[1]


def until(holds: Callable[[], bool]) -> bool:
    """Return whether something comes true in time."""
    deadline = time.monotonic() + SLOWLY
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def bare() -> Iterator[Machine]:
    """Return a machine on which nothing was done yet."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if os.geteuid() or missing:
        pytest.skip(f"not installed: {', '.join(missing)}" if missing else "needs root")
    try:
        machine = Machine()
    except OSError as failure:
        pytest.skip(f"no leave to make a machine of namespaces and layers: {failure}")
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def installed(bare: Machine) -> Iterator[Machine]:
    """Return a machine on which the relay was installed as README says, the model of the others."""
    machine = Machine(bare)
    process = machine.start(COMMANDS[VPS][0])
    output, errors = process.communicate(timeout=INSTALLING)
    try:
        if re.search("Failed to establish a new connection|NameResolutionError|Network is unreachable", errors):
            pytest.skip("pip reaches no index")
        assert process.returncode == 0, errors + machine.log()
        assert output.endswith(HEALTHY) or output.endswith(HEALTHY + "\n"), output + errors
        yield machine
    finally:
        machine.close()


@pytest.fixture
def vps(installed: Machine) -> Iterator[Machine]:
    """Return a machine with a relay that runs as installed."""
    machine = Machine(installed)
    machine.run("sudo systemctl start connectoid-relay")
    yield machine
    machine.close()


# README --------------------------------------------------------------------------------------


def test_readme_has_no_commands_that_are_not_run_here() -> None:
    assert {title: len(found) for title, found in COMMANDS.items()} == {
        VPS: 4, PORT_443: 2, HTTPS: 4, CADDY: 1, NGINX: 1, PI: 1}


def test_readme_installs_a_relay_that_is_well(installed: Machine) -> None:
    assert "listening on http://" in installed.log()
    assert installed.ask("http://localhost:8080/health").strip() == HEALTHY
    owners = installed.run("ps -o user:20= -C python && stat -c %U:%G:%a /var/lib/private/connectoid-relay")
    assert owners == "nobody\nnobody:nogroup:700\n"


def test_readme_restart_takes_the_new_flags(vps: Machine) -> None:
    vps.write("/etc/connectoid/relay.env", "FLAGS=--port 8080 --name Ours\n")
    vps.run(COMMANDS[VPS][1])
    assert '"name": "Ours"' in vps.ask("http://localhost:8080/", "-H", "Accept: application/json")


def test_readme_log_and_state_are_shown(vps: Machine) -> None:
    assert "listening on http://" in vps.run(COMMANDS[VPS][2])


def test_readme_upgrade_runs_the_newer_relay_with_the_old_messages(vps: Machine, alice: Owner) -> None:
    def post(request: object) -> dict[str, object]:
        reply: dict[str, object] = json.loads(vps.ask("http://localhost:8080/", "-d", json.dumps(request)))
        return reply
    assert post(send(alice)) == OK
    relay = vps.path(f"{CHECKOUT}/connectoid_relay.py")
    relay.write_text(re.sub(r'(?m)^__version__ = ".*"', '__version__ = "99.1"', relay.read_text()))
    vps.run(COMMANDS[VPS][3])
    assert vps.log().splitlines()[-1].startswith("connectoid relay 99.1 listening on http://")
    assert post(check(alice)).keys() == {"ok", "found", "question"}


def test_readme_install_again_keeps_the_flags(vps: Machine) -> None:
    flags = "FLAGS=--port 8081\n"
    vps.write("/etc/connectoid/relay.env", flags)
    lines = [line for line in COMMANDS[VPS][0].splitlines() if "FLAGS" not in line and "curl http" not in line]
    again = "\n".join([*lines, COMMANDS[VPS][1]]).replace("python3 -m venv", "python3 -m venv --clear")
    vps.run(again)
    assert vps.ask("http://localhost:8081/health").strip() == HEALTHY


def test_readme_files_for_the_relay_are_read_by_its_group(vps: Machine) -> None:
    words = re.findall(r"`(sudo (?:chgrp|chmod|systemctl reload) [^`]*)`", README.split(f"### {VPS}")[1])[:3]
    vps.write("/etc/connectoid/keys.toml", '[keys.alice]\nkey = "0123456789abcdef0123456789abcdef"\n', 0o600)
    vps.write("/etc/connectoid/relay.env", "FLAGS=--port 8080 --keys /etc/connectoid/keys.toml\n")
    assert vps.start(COMMANDS[VPS][1]).wait(SLOWLY) == 1  # not yet
    vps.run("\n".join(words[:2]).replace("FILE", "/etc/connectoid/keys.toml"))
    vps.run(COMMANDS[VPS][1])
    vps.run(words[2])
    assert until(lambda: vps.log().endswith("read the files again\n"))


def test_readme_port_443_is_held_for_the_relay(vps: Machine) -> None:
    vps.write("/etc/connectoid/relay.env", "FLAGS=--port 443\n")
    assert vps.start("sudo systemctl restart connectoid-relay").wait(SLOWLY) == 1
    assert "ermission denied" in vps.log()  # of itself it may not have it
    vps.run(COMMANDS[PORT_443][0])
    assert vps.ask("http://localhost:443/health").strip() == HEALTHY


def test_readme_port_443_refuses_nobody_while_the_relay_restarts(vps: Machine) -> None:
    vps.run(COMMANDS[PORT_443][0])
    vps.run("sudo systemctl stop connectoid-relay")
    early = vps.start("curl -s --max-time 10 http://localhost:443/health")
    connected = "ss -Htn state established dport = :443 | grep -q ."
    assert until(lambda: vps.inside(connected).wait(SLOWLY) == 0)
    vps.run("sudo systemctl start connectoid-relay")
    assert early.communicate(timeout=SLOWLY)[0].strip() == HEALTHY


def test_readme_port_443_block_is_what_to_do_after_a_change(vps: Machine) -> None:
    vps.run(COMMANDS[PORT_443][0])
    override = "/etc/systemd/system/connectoid-relay.socket.d/override.conf"
    vps.write(override, vps.path(override).read_text().replace("443", "444"))
    vps.run("\n".join(COMMANDS[PORT_443][0].splitlines()[-4:]))
    assert vps.ask("http://localhost:444/health").strip() == HEALTHY


STORE = "/var/lib/caddy/.local/share/caddy/certificates/acme-v02.api.letsencrypt.org-directory/relay.example.com"
AS_CRON = ("line=$(grep -v '^#' /etc/cron.d/connectoid-certificate)\n"  # five times, a user, a command
           "env -i PATH=/usr/bin:/bin SHELL=/bin/sh HOME=/root /bin/sh -c \"$(echo \"$line\" | cut -d' ' -f7-)\"")
# Of each way: what is there before, the commands, what renews, and where the certificate is then.
WAYS = {
    "certbot": ("", COMMANDS[HTTPS][0], "certbot renew", "/etc/letsencrypt/live/relay.example.com/fullchain.pem"),
    "acme.sh": ("", COMMANDS[HTTPS][1], "/root/.acme.sh/acme.sh --cron", "/root/relay.crt"),
    "Caddy": (f"umask 077; mkdir -p {STORE}; cd {STORE}; sign relay.example.com.crt relay.example.com.key",
              f"{COMMANDS[HTTPS][2]}sudo sh -c {shlex.quote(AS_CRON)}",
              f"cd {STORE}; sign relay.example.com.crt relay.example.com.key; {AS_CRON}",
              f"{STORE}/relay.example.com.crt"),
}


@pytest.mark.parametrize("way", WAYS)
def test_readme_certificate_is_served_and_renewed(vps: Machine, way: str) -> None:
    before, obtain, renew, certificate = WAYS[way]
    vps.run(before, user="root")
    vps.run(obtain, user="root" if way == "acme.sh" else "alice")
    vps.run(COMMANDS[HTTPS][3])

    def is_served(kept: str) -> bool:
        there = ("--cacert", kept, "--connect-to", "relay.example.com:8443:localhost:8443")
        return {vps.ask(f"https://{name}:8443/health", *there).strip()
                for name in ("localhost", "relay.example.com")} == {HEALTHY}
    vps.run(f"cp {certificate} /root/first.pem", user="root")
    assert is_served("/root/first.pem")
    vps.run(renew, user="root")
    assert until(lambda: is_served(certificate))
    assert not is_served("/root/first.pem")


@pytest.mark.skipif(not shutil.which("nginx"), reason="not installed: nginx")
def test_readme_nginx_takes_its_configuration_and_is_told_of_renewals(vps: Machine) -> None:
    vps.write("/usr/local/bin/systemctl", '#!/bin/sh\n[ "$*" = "reload nginx" ] && echo "$*" >>/run/reloads\n')
    vps.run("chmod +x /usr/local/bin/systemctl", user="root")
    vps.run(COMMANDS[NGINX][0])
    (block,) = re.findall(r"```nginx\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    vps.write("/etc/nginx/sites-enabled/relay.conf", block)
    vps.run("nginx -t -q", user="root")
    vps.run("certbot renew", user="root")
    assert vps.run("cat /run/reloads", user="root") == "reload nginx\n" * 2


def test_readme_cron_file_is_one_that_cron_takes(vps: Machine) -> None:
    vps.run(COMMANDS[HTTPS][2])
    file = vps.path("/etc/cron.d/connectoid-certificate")
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o644)
    assert re.fullmatch(r"\d+ \d+ \* \* \* root [^%]*\n", file.read_text())


def test_readme_removal_leaves_nothing(bare: Machine, vps: Machine) -> None:
    # systemd leaves its folder of links, empty, where this was the first unit of the kind.
    listing = ("find /etc /opt /var/lib ! -path '/var/lib/private' ! '(' -type d -name '*.target.wants' -empty ')'"
               " | sort; getent group connectoid || true")
    before = bare.run(listing, user="root")
    for block in (COMMANDS[PORT_443][0], COMMANDS[HTTPS][1], COMMANDS[HTTPS][2], COMMANDS[HTTPS][3]):
        vps.run(block, user="root")
    assert vps.run(listing, user="root") != before
    vps.run(COMMANDS[PORT_443][1])
    assert set(vps.run(listing, user="root").splitlines()) - set(before.splitlines()) == set()
    assert vps.ask("http://localhost:443/health") == ""


@pytest.mark.skipif(not shutil.which("sshd"), reason="not installed: sshd")
def test_readme_tunnel_reaches_the_relay_at_home(vps: Machine) -> None:
    vps.run(COMMANDS[CADDY][0])  # the flags behind a proxy
    vps.run(r"""
        mkdir -p /run/sshd /run/netns
        echo '192.0.2.1 relay.example.com' >>/etc/hosts
        ssh-keygen -q -A
        cd /home/alice && mkdir -m 0700 .ssh
        ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519
        cp .ssh/id_ed25519.pub .ssh/authorized_keys
        echo "relay.example.com $(cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub)" >.ssh/known_hosts
        chown -R alice:alice .ssh
    """, user="root")
    # The VPS: a network of its own, in which port 22 and 8080 are free.
    server = vps.inside(r"""
        ip netns add vps
        ip link add home type veth peer name world netns vps
        ip addr add 192.0.2.2/24 dev home && ip link set home up
        ip -n vps addr add 192.0.2.1/24 dev world && ip -n vps link set world up && ip -n vps link set lo up
        exec ip netns exec vps /usr/sbin/sshd -D -e -f /dev/null -o UsePAM=no -o HostKey=/etc/ssh/ssh_host_ed25519_key
    """, user="root")
    assert server.stderr is not None
    assert "Server listening" in server.stderr.readline()
    tunnel = vps.inside(COMMANDS[PI][0])

    def on_vps(command: str) -> str:
        return vps.inside(f"ip netns exec vps {command}", user="root").communicate(timeout=SLOWLY)[0].strip()
    assert until(lambda: on_vps("/usr/bin/curl -s http://127.0.0.1:8080/health") == HEALTHY)
    _, errors = vps.inside(COMMANDS[PI][0]).communicate(timeout=SLOWLY)  # its port is taken: it does not stay without
    assert "remote port forwarding failed" in errors
    assert tunnel.poll() is None
