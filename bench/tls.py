"""Print what a check costs over TLS, on fresh and kept connections: the relay beside nginx with a constant reply."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import ssl
import statistics
import sys
import tempfile
from pathlib import Path

import common
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from servers import Running, command_of, free_port, running

CHECKS = 200  # in a round, of each kind
REQUEST = common.http_request(common.check(common.Owner(1).pub))
NGINX_FILE = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events {{ }}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi; keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port} ssl; ssl_certificate chain.pem; ssl_certificate_key key.pem;
        default_type application/json;
        location / {{ return 200 '{{"ok": true, "found": false}}'; }}
    }}
}}
"""


def write_certificate(directory: Path) -> None:
    """Write chain.pem and key.pem for 127.0.0.1, P-256 as certificates are today."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256()))
    (directory / "chain.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def commands(directory: Path, port: int) -> dict[str, list[str] | None]:
    """Return the command of each server; None for what is not installed."""
    (directory / "nginx.conf").write_text(NGINX_FILE.format(port=port))
    return {
        "relay": [sys.executable, str(common.RELAY), "--port", str(port), "--db", ":memory:", *common.NO_RATES,
                  "--tls-cert", str(directory / "chain.pem"), "--tls-key", str(directory / "key.pem")],
        "nginx": command_of("nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"),
    }


def check(client: ssl.SSLSocket) -> None:
    """Ask once, and look at the reply."""
    client.sendall(REQUEST)
    status, body = common.read_reply(client)
    assert (status, b'"found": false' in body) == (200, True), (status, body)


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


def main() -> None:
    """Measure in turn, and print medians with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    servers: dict[str, Running] = {}
    with contextlib.ExitStack() as stack:
        for name in ("relay", "nginx"):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            write_certificate(directory)
            command = commands(directory, port := free_port())[name]
            if command:
                servers[name] = stack.enter_context(running(command, port, directory))
            else:
                print(f"skipped: {name}: not installed (apt-get install nginx-light)")
        common.pin(common.LOAD_CORE)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # of our own two servers
        found: dict[tuple[str, bool], list[float]] = {(name, kept): [] for name in servers for kept in (False, True)}
        for _ in range(rounds):
            for (name, kept), values in found.items():
                values.append(measure(servers[name], context, kept=kept))
    print(f"{common.machine()}, {rounds} rounds\n\n| over TLS | CPU of a check, µs |\n|---|---|")
    for (name, kept), values in found.items():
        print(f"| {name}, {'kept' if kept else 'fresh'} connection | {statistics.median(values):.0f}"
              f" ({min(values):.0f} to {max(values):.0f}) |")


if __name__ == "__main__":
    main()
