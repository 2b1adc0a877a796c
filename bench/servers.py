"""Know the servers that compare.py measures: how each is found, started, asked and counted."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clients
import common
from common import HERE, HOST

START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 5
RECV_BYTES = 2_048

# ---------------------------------------------------------------------------------------
# A running server, and what the operating system says of it.
# ---------------------------------------------------------------------------------------


class Running:
    """A server as a process (with children) that is pinned to one core."""

    def __init__(self, popen: subprocess.Popen[bytes], port: int) -> None:
        self.popen = popen
        self.port = port

    def cpu_s(self) -> float:
        """Return the seconds of CPU used so far, by its children too."""
        return common.cpu_s(self.popen.pid)

    def resident_kib(self) -> int:
        """Return the resident memory, of its children too."""
        return common.memory_kib(self.popen.pid)


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str], port: int, directory: Path,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> Iterator[Running]:
    """Start a server in a folder of its own and on its core; end it whatever happens.

    Raise OSError if it does not answer.
    """
    log_path = directory / "log"
    # It has a session of its own: Ctrl-C reaches this process only, which ends it.
    with log_path.open("wb") as log, subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True) as popen:
        try:
            common.pin(common.SERVER_CORE, popen.pid)
            if not _is_ready(popen, port, kind):
                words = log_path.read_text(errors="replace").strip()[-300:]
                raise OSError(f"it does not answer; it said: {words or 'nothing'}")
            yield Running(popen, port)
        finally:
            _end(popen)


def _knock(port: int, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.settimeout(1)
        probe.connect((HOST, port))
        if kind is socket.SOCK_DGRAM:
            probe.send(b"?")
            probe.recv(RECV_BYTES)


def _is_ready(popen: subprocess.Popen[bytes], port: int, kind: socket.SocketKind) -> bool:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and popen.poll() is None:
        try:
            _knock(port, kind)
            return True
        except OSError:
            time.sleep(0.02)
    return False


def _end(popen: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGTERM)
    try:
        popen.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------
# How each is found and started. A command is None where something is missing.
# ---------------------------------------------------------------------------------------

NGINX_FILE = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 1000000000;
    {upstream}
    server {{
        listen 127.0.0.1:{port} {listen};
        default_type application/json;
        location / {{ {location} }}
    }}
}}
"""
CONSTANT_REPLY = """return 200 '{"ok": true, "found": false}';"""
MOSQUITTO_FILE = """
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {directory}/
log_type error
max_queued_messages 10000
"""
# Debian keeps servers in a folder that is not in the path of an ordinary user.
SERVER_FOLDERS = ":/usr/sbin:/usr/local/sbin"


def command_of(program: str, *arguments: str) -> list[str] | None:
    """Return the command of a program, None if it is not installed."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + SERVER_FOLDERS)
    if found is None:
        return None
    return [found, *arguments]


def nginx(
    port: int, directory: Path, *, listen: str = "backlog=1024", upstream: str = "",
    location: str = CONSTANT_REPLY,
) -> list[str] | None:
    """Write a configuration for one worker and return the command of nginx."""
    path = directory / "nginx.conf"
    path.write_text(NGINX_FILE.format(
        port=port, listen=listen, upstream=upstream, location=location))
    return command_of("nginx", "-p", str(directory), "-c", str(path), "-e", "stderr")


def is_installed(*modules: str) -> bool:
    """Return whether all these modules of Python are there."""
    return all(importlib.util.find_spec(name) for name in modules)


def start_relay(port: int, directory: Path) -> list[str]:
    """Return the command of our relay, with defaults except for the limits of one source."""
    where = ["--host", HOST, "--port", str(port)]
    return [sys.executable, str(common.RELAY), *where, "--udp", *common.NO_RATES]


def start_nginx(port: int, directory: Path) -> list[str] | None:
    """Return the command of nginx with one worker and a constant reply."""
    return nginx(port, directory)


def start_stock(port: int, directory: Path) -> list[str]:
    """Return the command of the standard library's server."""
    return [sys.executable, str(HERE / "stock_server.py"), str(port)]


def start_fastapi(port: int, directory: Path) -> list[str] | None:
    """Return the command of the relay on FastAPI."""
    if not is_installed("fastapi", "uvicorn"):
        return None
    return [sys.executable, str(HERE / "fastapi_relay.py"), str(port), str(directory / "db")]


@functools.cache
def peerjs_package() -> Path | None:
    """Return the folder of the npm package, from bench/node_modules or NODE_PATH."""
    folders = [HERE / "node_modules"]
    folders += [Path(name) for name in os.environ.get("NODE_PATH", "").split(":") if name]
    for folder in folders:
        package = folder / "peer"
        if (package / "package.json").is_file():
            return package
    return None


def start_peerjs(port: int, directory: Path) -> list[str] | None:
    """Return the command of PeerJS server."""
    package = peerjs_package()
    if package is None:
        return None
    program = json.loads((package / "package.json").read_text())["bin"]["peerjs"]
    return command_of("node", str(package / program), "--port", str(port), "--host", HOST)


def start_mailbox(port: int, directory: Path) -> list[str] | None:
    """Return the command of magic-wormhole's mailbox server."""
    if not is_installed("wormhole_mailbox_server"):
        return None
    where = f"--port=tcp:{port}:interface={HOST}"
    files = ["--channel-db=channels.sqlite", "--usage-db=usage.sqlite"]
    return [sys.executable, "-m", "twisted", "wormhole-mailbox", where, *files]


def start_mosquitto(port: int, directory: Path) -> list[str] | None:
    """Return the command of Mosquitto."""
    path = directory / "mosquitto.conf"
    path.write_text(MOSQUITTO_FILE.format(port=port, directory=directory))
    # Mosquitto, started by root, becomes a user of its own, which writes here.
    directory.chmod(0o777)
    return command_of("mosquitto", "-c", str(path))


def start_redis(port: int, directory: Path) -> list[str] | None:
    """Return the command of Redis, with its log of commands written every second."""
    where = ["--port", str(port), "--bind", HOST, "--dir", str(directory)]
    log = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    return command_of("redis-server", *where, *log)


# ---------------------------------------------------------------------------------------
# Which version of each.
# ---------------------------------------------------------------------------------------


def _said(*command: str) -> str:
    said = subprocess.run(
        command_of(*command) or command, capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[.\d]*", said.stdout + said.stderr)
    if found is None:
        return "of unknown version"
    return found[0]


def _relay_version() -> str:
    return _said(sys.executable, str(common.RELAY), "--version")


def _nginx_version() -> str:
    return _said("nginx", "-v")


def _python_version() -> str:
    return f"Python {sys.version.split()[0]}"


def _fastapi_version() -> str:
    names = ("fastapi", "uvicorn", "uvloop", "httptools")
    there = [name for name in names if is_installed(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there)


def _peerjs_version() -> str:
    package = peerjs_package()
    assert package
    version = json.loads((package / "package.json").read_text())["version"]
    return f"{version}, Node {_said('node', '--version')}"


def _mailbox_version() -> str:
    return importlib.metadata.version("magic-wormhole-mailbox-server")


def _mosquitto_version() -> str:
    return _said("mosquitto", "-h")


def _redis_version() -> str:
    return _said("redis-server", "--version")


# ---------------------------------------------------------------------------------------
# The check of each, as octets for a mailbox.
# ---------------------------------------------------------------------------------------


def _http_check(pub: str) -> bytes:
    return clients.http_request(clients.check_of(pub))


def _peerjs_check(pub: str) -> bytes:
    return clients.http_request(b"", path="/peerjs/id")


def _mosquitto_check(pub: str) -> bytes:
    return clients.mqtt_connect(pub, clean=False) + clients.MQTT_LEAVE


# ---------------------------------------------------------------------------------------
# The table of all servers.
# ---------------------------------------------------------------------------------------

Meeting = Callable[[int, clients.Pair], Coroutine[Any, Any, None]]
Idling = Callable[[int, int], Coroutine[Any, Any, clients.Line]]


@dataclass(frozen=True)
class Peer:
    """A server: its command, its idle check on a fresh connection, rendezvous, idle client."""

    name: str
    title: str
    # What to install where it is missing.
    needs: str
    command: Callable[[int, Path], list[str] | None]
    version: Callable[[], str]

    # The octets of a check for a mailbox, after whose reply the server closes. A check that
    # takes more than one question and one reply is a talk.
    check_words: str
    check: Callable[[str], bytes] | None = None
    check_talk: Meeting | None = None
    # How a right reply begins, and whether it is that of our relay, to the letter.
    begins: bytes = b"HTTP/1.1 200"
    finds_nothing: bool = False

    meet_words: str = "none"
    meet: Meeting | None = None

    # Without `idle` an idle client has no connection; with `parked_words` it need not have one.
    idle_words: str = "no connection"
    idle: Idling | None = None
    parked_words: str = ""
    # What idle clients send and receive; without it they check once a minute.
    ping: bytes = b""
    pong_bytes: int = 0
    ping_every_s: int = 60


PEERS = (
    Peer(
        "relay", "Connectoid relay", "", start_relay, _relay_version,
        "check", _http_check, finds_nothing=True,
        meet_words="7 requests, proof of the key twice, full sync", meet=clients.meet_at_relay,
        idle=clients.park_at_relay, parked_words="in a long poll"),
    Peer(
        "nginx", "nginx, constant reply", "apt-get install nginx-light",
        start_nginx, _nginx_version,
        "constant reply", _http_check, finds_nothing=True),
    Peer(
        "stock", "Python's http.server, constant reply", "", start_stock, _python_version,
        "constant reply", _http_check, finds_nothing=True),
    Peer(
        "fastapi", "FastAPI + SQLite", "pip install fastapi 'uvicorn[standard]'",
        start_fastapi, _fastapi_version,
        "check", _http_check, finds_nothing=True,
        meet_words="4 requests, no proof, full sync", meet=clients.meet_at_fastapi),
    Peer(
        "peerjs", "PeerJS server", "npm install --prefix bench", start_peerjs, _peerjs_version,
        "GET /peerjs/id", _peerjs_check,
        meet_words="2 WebSockets, both present, nothing stored", meet=clients.meet_at_peerjs,
        idle_words="WebSocket", idle=clients.idle_at_peerjs,
        ping=clients.PEERJS_PING, ping_every_s=5),
    Peer(
        "mailbox", "magic-wormhole mailbox", "pip install magic-wormhole-mailbox-server",
        start_mailbox, _mailbox_version,
        "a WebSocket that opens a mailbox", check_talk=clients.check_at_mailbox,
        meet_words="2 WebSockets, both present, stored in SQLite", meet=clients.meet_at_mailbox,
        idle_words="WebSocket", idle=clients.idle_at_mailbox,
        ping=clients.WS_PING, pong_bytes=len(clients.WS_PONG)),
    Peer(
        "mosquitto", "Mosquitto", "apt-get install mosquitto",
        start_mosquitto, _mosquitto_version,
        "connect to a kept session with nothing in it", _mosquitto_check, begins=b"\x20\x02",
        meet_words="4 connections, no proof, retained, QoS 1, in memory",
        meet=clients.meet_at_mosquitto,
        idle_words="subscribed", idle=clients.idle_at_mosquitto,
        ping=clients.MQTT_PING, pong_bytes=2),
    Peer(
        "redis", "Redis", "apt-get install redis-server", start_redis, _redis_version,
        "LRANGE of an absent list", clients.redis_range, begins=b"*0",
        meet_words="4 connections, no proof, sync once a second", meet=clients.meet_at_redis,
        idle=clients.idle_at_redis, parked_words="in BLPOP"),
)
