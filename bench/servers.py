"""Know the servers that compare.py measures: how each is found, started and asked; count what they cost."""

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

import connectoid_relay

HERE = Path(__file__).parent
RELAY = HERE.parent / "connectoid_relay.py"
START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 5
RECV_BYTES = 2_048

# ---------------------------------------------------------------------------------------
# A running server, and what the operating system says of it.
# ---------------------------------------------------------------------------------------


class Running:
    """A server as a process (with children) that is pinned to one core."""

    def __init__(self, popen: subprocess.Popen[bytes], port: int) -> None:
        self.popen, self.port = popen, port

    def cpu_s(self) -> float:
        """Return the seconds of CPU used so far, by its children too."""
        return common.cpu_s(self.popen.pid)

    def resident_kib(self) -> int:
        """Return the resident memory, of its children too."""
        return common.memory_kib(self.popen.pid)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((common.HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, directory: Path,
            kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[Running]:
    """Start a server in a folder of its own and on its core, and end it whatever happens; raise OSError if it fails."""
    with ((directory / "log").open("wb") as log,
          # In a session of its own: Ctrl-C is for us, and we end it.
          subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                           start_new_session=True) as popen):
        try:
            common.pin(common.SERVER_CORE, popen.pid)
            if not _is_ready(popen, port, kind):
                words = (directory / "log").read_text(errors="replace").strip()[-300:]
                raise OSError(f"it does not answer; it said: {words or 'nothing'}")
            yield Running(popen, port)
        finally:
            _end(popen)


def _knock(port: int, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.settimeout(1)
        probe.connect((common.HOST, port))
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

RELAY_FLAGS = ("--rate", "0", "--max-connections-per-source", "0")  # one address plays all the clients
NGINX_FILE = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        default_type application/json;
        location / {{ return 200 '{{"ok": true, "found": false}}'; }}
    }}
}}
"""
MOSQUITTO_FILE = """
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {directory}/
log_type error
max_queued_messages 10000
"""


def command_of(program: str, *arguments: str) -> list[str] | None:
    """Return the command of a program, None if it is not installed."""
    # Debian keeps servers where the path of an ordinary user does not lead.
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    return [found, *arguments] if found else None


def start_relay(port: int, directory: Path) -> list[str]:
    """Return the command of our relay, default but for the limits of one source."""
    return [sys.executable, str(RELAY), "--host", common.HOST, "--port", str(port), "--udp", *RELAY_FLAGS]


def start_nginx(port: int, directory: Path) -> list[str] | None:
    """Return the command of nginx with one worker and a constant reply."""
    (directory / "nginx.conf").write_text(NGINX_FILE.format(port=port))
    return command_of("nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr")


def start_stock(port: int, directory: Path) -> list[str]:
    """Return the command of the standard library's server."""
    return [sys.executable, str(HERE / "stock_server.py"), str(port)]


def start_fastapi(port: int, directory: Path) -> list[str] | None:
    """Return the command of the relay on FastAPI."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    return None if missing else [sys.executable, str(HERE / "fastapi_relay.py"), str(port), str(directory / "db")]


@functools.cache
def peerjs_package() -> Path | None:
    """Return the folder of the npm package, from bench/node_modules or NODE_PATH."""
    folders = [HERE / "node_modules", *map(Path, filter(None, os.environ.get("NODE_PATH", "").split(":")))]
    return next((folder / "peer" for folder in folders if (folder / "peer" / "package.json").is_file()), None)


def start_peerjs(port: int, directory: Path) -> list[str] | None:
    """Return the command of PeerJS server."""
    package = peerjs_package()
    if package is None:
        return None
    program = json.loads((package / "package.json").read_text())["bin"]["peerjs"]
    return command_of("node", str(package / program), "--port", str(port), "--host", common.HOST)


def start_mailbox(port: int, directory: Path) -> list[str] | None:
    """Return the command of magic-wormhole's mailbox server."""
    if importlib.util.find_spec("wormhole_mailbox_server") is None:
        return None
    return [sys.executable, "-m", "twisted", "wormhole-mailbox", f"--port=tcp:{port}:interface={common.HOST}",
            "--channel-db=channels.sqlite", "--usage-db=usage.sqlite"]


def start_mosquitto(port: int, directory: Path) -> list[str] | None:
    """Return the command of Mosquitto."""
    (directory / "mosquitto.conf").write_text(MOSQUITTO_FILE.format(port=port, directory=directory))
    directory.chmod(0o777)  # as root it becomes a user of its own
    return command_of("mosquitto", "-c", str(directory / "mosquitto.conf"))


def start_redis(port: int, directory: Path) -> list[str] | None:
    """Return the command of Redis, with its log of commands written every second."""
    return command_of("redis-server", "--port", str(port), "--bind", common.HOST, "--dir", str(directory),
                       "--appendonly", "yes", "--appendfsync", "everysec", "--save", "")


def _said(*command: str) -> str:
    said = subprocess.run(command_of(*command) or command, capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[.\d]*", said.stdout + said.stderr)
    return found[0] if found else "of unknown version"


def _npm_version() -> str:
    package = peerjs_package()
    ours = json.loads((package / "package.json").read_text())["version"] if package else ""
    return f"{ours}, Node {_said('node', '--version')}"


def _fastapi_version() -> str:
    names = ("fastapi", "uvicorn", "uvloop", "httptools")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if importlib.util.find_spec(name))


# ---------------------------------------------------------------------------------------
# The table of all servers.
# ---------------------------------------------------------------------------------------

Meeting = Callable[[int, clients.Pair], Coroutine[Any, Any, None]]
Idling = Callable[[int, int], Coroutine[Any, Any, clients.Line]]


@dataclass(frozen=True)
class Peer:
    """A server: its command, its idle check on a fresh connection, its rendezvous, its idle client."""

    name: str
    title: str
    needs: str  # what to install where it is missing
    command: Callable[[int, Path], list[str] | None]
    version: Callable[[], str]
    check: Callable[[str], bytes] | None  # the octets for a mailbox; the server closes after its reply
    check_words: str
    check_talk: Meeting | None = None  # instead, where it takes more than one question and one reply
    begins: bytes = b"HTTP/1.1 200"
    finds_nothing: bool = False  # its reply is that of a check, to the letter
    meet: Meeting | None = None
    meet_words: str = "none"
    idle: Idling | None = None  # None: whoever is idle has no connection
    idle_words: str = "no connection"
    parked_words: str = ""  # of a client that waits on a connection though it need not
    ping: bytes = b""  # what its clients send while they are idle; else they check once a minute
    pong_bytes: int = 0
    ping_every_s: int = 60


def _http_check(pub: str) -> bytes:
    return clients.http_request(clients.check_of(pub))


def _get(path: str) -> Callable[[str], bytes]:
    return lambda pub: clients.http_request(b"", path=path)



PEERS = (
    Peer("relay", "Connectoid relay", "", start_relay, lambda: connectoid_relay.__version__, _http_check,
         "check", finds_nothing=True,
         meet=clients.meet_at_relay, meet_words="7 requests, proof of the key twice, full sync",
         idle=clients.park_at_relay, parked_words="in a long poll"),
    Peer("nginx", "nginx, constant reply", "apt-get install nginx-light", start_nginx,
         lambda: _said("nginx", "-v"), _http_check, "constant reply", finds_nothing=True),
    Peer("stock", "Python's http.server, constant reply", "", start_stock, lambda: f"Python {sys.version.split()[0]}",
         _http_check, "constant reply", finds_nothing=True),
    Peer("fastapi", "FastAPI + SQLite", "pip install fastapi 'uvicorn[standard]'", start_fastapi,
         _fastapi_version, _http_check, "check", finds_nothing=True,
         meet=clients.meet_at_fastapi, meet_words="4 requests, no proof, full sync"),
    Peer("peerjs", "PeerJS server", "npm install --prefix bench", start_peerjs, _npm_version,
         _get("/peerjs/id"), "GET /peerjs/id",
         meet=clients.meet_at_peerjs, meet_words="2 WebSockets, both present, nothing stored",
         idle=clients.idle_at_peerjs, idle_words="WebSocket", ping=clients.PEERJS_PING, ping_every_s=5),
    Peer("mailbox", "magic-wormhole mailbox", "pip install magic-wormhole-mailbox-server", start_mailbox,
         lambda: importlib.metadata.version("magic-wormhole-mailbox-server"), None,
         "a WebSocket that opens a mailbox", clients.check_at_mailbox,
         meet=clients.meet_at_mailbox, meet_words="2 WebSockets, both present, stored in SQLite",
         idle=clients.idle_at_mailbox, idle_words="WebSocket", ping=clients.WS_PING,
         pong_bytes=len(clients.WS_PONG)),
    Peer("mosquitto", "Mosquitto", "apt-get install mosquitto", start_mosquitto, lambda: _said("mosquitto", "-h"),
         lambda pub: clients.mqtt_connect(pub, clean=False) + clients.MQTT_LEAVE,
         "connect to a kept session with nothing in it", begins=b"\x20\x02",
         meet=clients.meet_at_mosquitto, meet_words="4 connections, no proof, retained, QoS 1, in memory",
         idle=clients.idle_at_mosquitto, idle_words="subscribed", ping=clients.MQTT_PING, pong_bytes=2),
    Peer("redis", "Redis", "apt-get install redis-server", start_redis, lambda: _said("redis-server", "--version"),
         lambda pub: clients.redis_commands(("LRANGE", pub, "0", "-1")), "LRANGE of an absent list", begins=b"*0",
         meet=clients.meet_at_redis, meet_words="4 connections, no proof, sync once a second",
         idle=clients.idle_at_redis, parked_words="in BLPOP"),
)
