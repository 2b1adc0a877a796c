"""Two people whose networks let nothing out but what goes through a proxy, with CONNECT."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import DEADLINE_S, serving
from test_http_transport import PROXIED_HOST, make_certificate
from test_people import People, Terminal

from connectoid_relay import Relay, SqliteStore, load_tls


class Tunnel(socketserver.StreamRequestHandler):
    """A connection to the proxy: it leads to this machine, and carries TLS that nobody reads."""

    def handle(self) -> None:
        """Take CONNECT, and carry octets both ways."""
        method, place, _ = self.rfile.readline().decode().split()
        while self.rfile.readline().strip():
            pass
        assert isinstance(self.server, Proxy)
        self.server.asked.append(f"{method} {place}")
        port = int(place.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as relay:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=carry, args=(relay, self.connection))
            back.start()
            carry(self.connection, relay)
            back.join()


def carry(source: socket.socket, target: socket.socket) -> None:
    """Carry octets until there are no more."""
    with contextlib.suppress(OSError):
        while octets := source.recv(65_536):
            target.sendall(octets)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy, with what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.asked: list[str] = []


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Return a proxy that serves."""
    with Proxy() as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join(DEADLINE_S)


class Employees(People):
    """People who name the certificate of their relay."""

    def run(self, who: str, *argv: str) -> Terminal:
        """Start a command."""
        return super().run(who, *argv, "--ca", str(self.folder / "certificate.pem"))


@pytest.mark.slow
def test_people_are_connected_through_a_proxy_by_a_relay_that_only_it_reaches(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No connection is left open: Python would say so, and `end` takes that for a failure."""
    certificate = str(make_certificate(tmp_path, -1, 1))
    for name in ("http_proxy", "all_proxy", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
    relay = Relay(SqliteStore(":memory:"))
    tls = load_tls(certificate, certificate)
    with contextlib.closing(relay), serving(relay, tls=tls) as server:
        place = f"{PROXIED_HOST}:{server.server_port}"
        people = Employees(tmp_path, [f"https://{place}/"])
        try:
            people.pair()
        finally:
            people.kill()
    assert set(proxy.asked) == {f"CONNECT {place}"}
