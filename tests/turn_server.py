"""A real TURN server: coturn on loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness import DEADLINE_S

HOST = "127.0.0.1"
# A port that was free a moment ago may be taken by now.
ATTEMPTS = 5
LOOK_EVERY_S = 0.05
# What a test wants, whatever else a server may be told.
HERE = f"""
listening-ip={HOST}
relay-ip={HOST}
no-cli
log-file=/dev/null
realm=example.com
"""
# For two apps on one machine.
LOOPBACK = "allow-loopback-peers\n"


def free_port() -> int:
    """Return a port that is free for TCP and UDP now."""
    with (
        socket.create_server((HOST, 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        port = int(tcp.getsockname()[1])
        udp.bind((HOST, port))
    return port


@contextlib.contextmanager
def turn_server(config: str, *, for_loopback: bool = True) -> Iterator[int]:
    """Run coturn on loopback with a configuration; yield its port."""
    config += HERE + LOOPBACK * for_loopback
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for _ in range(ATTEMPTS):
            port = free_port()
            path = folder / "turnserver.conf"
            path.write_text(f"{config}listening-port={port}\npidfile={folder}/pid\n")
            process = stack.enter_context(running(path))
            if listens(process, port):
                yield port
                return
        raise AssertionError(f"coturn does not start with {config}")


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run coturn within a `with`."""
    program = shutil.which("turnserver", path="/usr/bin:/usr/sbin:/usr/local/bin")
    process = subprocess.Popen(
        [str(program), "-c", str(config)], cwd=config.parent, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server listens; return whether it does."""
    give_up_s = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < give_up_s:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), LOOK_EVERY_S):
            return True
        time.sleep(LOOK_EVERY_S)
    return False
