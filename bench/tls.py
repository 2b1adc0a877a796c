"""Print what a check costs over TLS: the relay beside nginx with a constant reply."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import ssl
import sys
import tempfile
from pathlib import Path

import common
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from servers import Running, free_port, nginx, running

# In a round, of each kind.
CHECKS = 200
NAMES = ("relay", "nginx")
REQUEST = common.http_request(common.check(common.Owner(1).pub))
LISTEN = "ssl; ssl_certificate chain.pem; ssl_certificate_key key.pem"


def write_certificate(directory: Path) -> None:
    """Write chain.pem and key.pem for 127.0.0.1, P-256 as certificates are today."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common.HOST)])
    address = x509.IPAddress(ipaddress.ip_address(common.HOST))
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 2 * day)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256()))
    (directory / "chain.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def command_of_relay(directory: Path, port: int) -> list[str]:
    """Return the command of our relay with TLS, all in memory."""
    tls = [
        "--tls-cert", str(directory / "chain.pem"), "--tls-key", str(directory / "key.pem")]
    where = ["--port", str(port), "--db", ":memory:"]
    return [sys.executable, str(common.RELAY), *where, *common.NO_RATES, *tls]


def start(name: str, stack: contextlib.ExitStack) -> Running | None:
    """Start a server until the stack is left; None if it is not installed."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    directory = Path(stack.enter_context(folder))
    write_certificate(directory)
    port = free_port()
    command: list[str] | None = command_of_relay(directory, port)
    if name == "nginx":
        command = nginx(port, directory, listen=LISTEN)
    if command is None:
        return None
    return stack.enter_context(running(command, port, directory))


def check(client: ssl.SSLSocket) -> None:
    """Ask once, and look at the reply."""
    client.sendall(REQUEST)
    status, body = common.read_reply(client)
    assert status == 200, body
    assert b'"found": false' in body, body


def measure(server: Running, context: ssl.SSLContext, *, kept: bool) -> float:
    """Return the microseconds of the server's CPU for a check."""
    before_s = server.cpu_s()
    with contextlib.ExitStack() as open_now:
        for number in range(CHECKS):
            if number == 0 or not kept:
                open_now.close()
                client = open_now.enter_context(context.wrap_socket(
                    common.connect(server.port), server_hostname=common.HOST))
            check(client)
    return (server.cpu_s() - before_s) / CHECKS * 1e6


def measure_all(rounds: int) -> dict[str, list[float]]:
    """Return the figures of all rounds by what they are of."""
    found: dict[str, list[float]] = {}
    # Both servers are ours, with certificates that nobody has signed.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.ExitStack() as stack:
        servers = {name: start(name, stack) for name in NAMES}
        common.pin(common.LOAD_CORE)
        for _ in range(rounds):
            for name, server in servers.items():
                if server:
                    fresh = found.setdefault(f"{name}, fresh connection", [])
                    fresh.append(measure(server, context, kept=False))
                    kept = found.setdefault(f"{name}, kept connection", [])
                    kept.append(measure(server, context, kept=True))
    if servers["nginx"] is None:
        print("skipped: nginx: not installed (apt-get install nginx-light)")
    return found


def main() -> int:
    """Measure in turn, and print medians with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    found = measure_all(rounds)
    print(f"{common.machine()}, {rounds} rounds\n\n| over TLS | CPU of a check, µs |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {common.spread(values)} |")
    return 0


if __name__ == "__main__":
    common.run(main)
