"""Test connectoid-admin check: each thing that it looks at."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import os
import re
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from admin_harness import (
    OLD_VERSIONS,
    admin,
    closed_port,
    content,
    damage,
    execute,
    found,
    levels,
    make_file,
    subject,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from harness import FakeClock, Owner, serving

from connectoid_admin import (
    CHECKS,
    RENEWAL_DAYS,
    AdminError,
    Finding,
    ask,
    back_up,
    clock_is_synchronized,
    delete,
    file_system_of,
)
from connectoid_relay import SCHEMA, SECOND_US, Relay, SqliteStore, load_tls


def test_check_of_a_relay_that_is_well_fails_nowhere_and_is_one_line_a_finding(
    path: str, beside: Relay, clock: FakeClock
) -> None:
    with serving(beside, udp=True, stun=True) as server:
        port = server.server_port
        code, output, errors = admin(
            "check",
            "--db",
            path,
            "--url",
            f"http://127.0.0.1:{port}/",
            "--flags",
            f"--host 127.0.0.1 --port {port} --udp --stun --trusted-proxy 127.0.0.0/8 --contact me",
        )
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert all(re.fullmatch(r"(OK   |WARN ) \w+: .+", line) for line in lines), output
    assert f"OK    file: {path}, schema {len(SCHEMA)} of {len(SCHEMA)}" in lines
    assert "OK    relay: a check over UDP is answered" in lines
    assert "OK    reach: STUN is answered" in lines
    assert {line.split()[1] for line in lines} == {f"{what}:" for what in CHECKS} - {"certificate:"}


def test_check_fails_where_nobody_listens(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    looked_at = subject(path, "--host", "127.0.0.1")
    (finding,) = found(looked_at, "relay")
    assert finding == Finding(
        "FAIL", "relay", f"{looked_at.local_url} does not answer: Connection refused"
    )
    assert admin("check", "--db", path, "--flags", f"--port {looked_at.flags.port}")[0] == 1


def test_check_tells_an_ill_relay(path: str, clock: FakeClock) -> None:
    relay = Relay(SqliteStore(path), clock=clock.clock)
    with serving(relay) as server:
        relay.store.close()
        looked_at = subject(path, "--host", "127.0.0.1", "--port", str(server.server_port))
        assert found(looked_at, "relay")[0] == Finding(
            "FAIL",
            "relay",
            f"{looked_at.local_url} is not well: The store cannot be read or written.",
        )


def health(port: int, *words: str) -> tuple[int, str, str]:
    """Ask a relay on this machine, which variables name."""
    return admin("health", *words, CONNECTOID_HOST="127.0.0.1", CONNECTOID_PORT=str(port))


def test_health_is_asked_and_told(path: str, clock: FakeClock) -> None:
    with serving(Relay(SqliteStore(path), clock=clock.clock)) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        assert health(server.server_port) == (0, f"{url} is well\n", "")
        assert health(server.server_port, "-q") == (0, "", "")
    told = f"connectoid-admin: {url} does not answer: Connection refused\n"
    assert health(server.server_port) == (1, "", told)


def test_health_is_asked_of_an_ill_relay(path: str, clock: FakeClock) -> None:
    relay = Relay(SqliteStore(path), clock=clock.clock)
    with serving(relay) as server:
        relay.store.close()
        url = f"http://127.0.0.1:{server.server_port}/"
        told = f"connectoid-admin: {url} is not well: The store cannot be read or written.\n"
        assert health(server.server_port, "-q") == (1, "", told)


def test_check_tells_another_program_at_the_relays_port() -> None:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        looked_at = subject(":memory:", "--host", "127.0.0.1", "--port", str(server.server_port))
        findings = found(looked_at, "relay")
        server.shutdown()
        thread.join(10)
    assert findings[-1] == Finding("FAIL", "relay", f"{looked_at.local_url} is another program")


class Hostile(socketserver.StreamRequestHandler):
    """Servers that answer a request with something other than a relay would."""

    reply = b""
    patient = False

    def handle(self) -> None:
        self.rfile.readline()
        with contextlib.suppress(OSError):
            # A byte now and then, so that no single read takes too long.
            while self.patient:
                self.wfile.write(self.reply)
                time.sleep(0.05)
            self.wfile.write(self.reply)


@contextlib.contextmanager
def hostile(reply: bytes, *, patient: bool = False) -> Iterator[str]:
    """Serve it, and return where."""
    handler = type("Handler", (Hostile,), {"reply": reply, "patient": patient})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join(10)


@pytest.mark.parametrize(
    "reply",
    [b"H", b"HTTP/1.1 200 OK\r\nA: b\r\n", b"HTTP/1.1 200 OK\r\n\r\nx"],
    ids=["status", "headers", "body"],
)
def test_relay_that_never_ends_its_answer_is_not_waited_for(reply: bytes) -> None:
    with (
        hostile(reply, patient=True) as url,
        pytest.raises(AdminError, match=f"^{url} does not answer: timed out$"),
    ):
        ask(url, "/", timeout_s=1)


def test_what_a_hostile_relay_says_stays_in_its_line(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    text = json.dumps(
        {"software": "connectoid_relay", "version": "1\x1b[2J\nOK    relay: all is well"}
    )
    with hostile(b"HTTP/1.1 500 \x1b[31m\r\n\r\n" + text.encode()) as url:
        port = url.rstrip("/").rpartition(":")[2]
        code, output, errors = admin(
            "check", "--db", path, "--flags", f"--host 127.0.0.1 --port {port}", "--url", url
        )
    assert (code, errors) == (1, "")
    assert "relay: all is well" in output
    assert not re.search(r"(?m)^OK +relay", output)
    assert all(letter.isprintable() or letter == "\n" for letter in output)


def test_check_follows_no_redirection() -> None:
    with hostile(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n") as url:
        assert found(subject(":memory:", url=url), "reach") == [
            Finding("FAIL", "reach", f"{url} is not a relay (status 302)")
        ]


@pytest.mark.parametrize(
    "metrics",
    [
        "connectoid_healthy 1",
        "connectoid_uptime_seconds 1e999",
        "connectoid_uptime_seconds nan",
        "connectoid_uptime_seconds -1",
        "connectoid_uptime_seconds " + "9" * 400,
        "\xff",
    ],
)
def test_stats_of_what_is_no_relay_are_those_of_the_file(path: str, metrics: str) -> None:
    make_file(Path(path), len(SCHEMA))
    with hostile(b"HTTP/1.1 200 OK\r\n\r\n" + metrics.encode("latin-1") + b"\n") as url:
        code, output, errors = admin("stats", "--db", path, "--json", "--url", url)
    assert (code, errors) == (
        0,
        f"connectoid-admin: {url} has no metrics (status 200); what the file says:\n",
    )
    assert json.loads(output)["relay"] is None


def test_stats_of_a_hostile_relay_have_nothing_for_the_terminal(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    metrics = 'connectoid_uptime_seconds 5\nconnectoid_info{version="\x1b]0;x\x07"} 1\n'
    with hostile(b"HTTP/1.1 200 OK\r\n\r\n" + metrics.encode()) as url:
        for words in ([], ["--json"]):
            code, output, errors = admin("stats", "--db", path, "--url", url, *words)
            assert (code, errors) == (0, "")
            assert "]0;x" in output
            assert all(letter.isprintable() or letter == "\n" for letter in output)


def test_quiet_check_leaves_out_what_is_well(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    words = ["check", "--db", path, "--flags", f"--port {closed_port()}"]
    code, output, _ = admin(*words)
    assert admin(*words, "--quiet") == (
        code,
        "".join(line for line in output.splitlines(keepends=True) if not line.startswith("OK ")),
        "",
    )
    assert "OK " in output


def test_check_tells_a_mistake_in_the_flags(tmp_path: Path) -> None:
    (tmp_path / "relay.env").write_text("# comment\nFLAGS='--port 8080 --rate many'\n")
    code, output, _ = admin("check", "--db", ":memory:", "--env", str(tmp_path / "relay.env"))
    assert code == 1
    assert (
        f"FAIL  flags: {tmp_path / 'relay.env'}: argument --rate:"
        " 'many' is not a whole number from 0 to 1000000000000"
        in output
    )
    # What answers at the default port may be the relay of somebody else.
    assert "WARN  relay: not looked at: the flags are not understood\n" in output


def test_check_of_a_missing_file_leaves_other_relays_alone(tmp_path: Path) -> None:
    code, output, _ = admin("check", "--db", str(tmp_path / "relay.db"))
    assert code == 1
    assert f"WARN  relay: not looked at: {tmp_path / 'relay.db'} is missing\n" in output
    assert "OK    relay" not in output


def test_check_of_what_is_no_database_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "relay.db").write_text("a letter to somebody, and no database at all\n" * 99)
    words = ["--db", str(tmp_path / "relay.db"), "--flags", f"--port {closed_port()}"]
    code, output, _ = admin("check", *words)
    assert code == 1
    assert "the disk was full" not in output
    assert "FAIL  clock" not in output
    assert "FAIL  file" in output


@pytest.mark.parametrize(
    ("flags", "level", "text"),
    [
        ("--tls-cert a.pem", "FAIL", "--tls-cert and --tls-key go together"),
        ("--turn turn:a", "FAIL", "--turn and --turn-secret go together"),
        (
            "--keys nowhere.toml",
            "FAIL",
            "nowhere.toml: No such file or directory; give a file that the relay may read",
        ),
        (
            "--host 127.0.0.1",
            "WARN",
            "behind a proxy all clients share the limits of one: --trusted-proxy 127.0.0.0/8",
        ),
        ("--port 80", "WARN", "plain HTTP: web pages that came over HTTPS may not use it"),
        ("--rate 0", "WARN", "--rate 0: nothing holds back clients that ask too often"),
        ("", "WARN", "no --contact: nobody knows whom to tell what is wrong"),
    ],
)
def test_check_tells_what_is_odd_in_the_flags(flags: str, level: str, text: str) -> None:
    assert Finding(level, "flags", text) in found(subject(":memory:", *flags.split()), "flags")


def test_check_tells_keys_that_everybody_may_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[keys.alice]\nkey = "secret"\n')
    for mode, expected in ((0o644, "WARN"), (0o640, "OK")):
        keys.chmod(mode)
        findings = found(subject(":memory:", "--keys", str(keys)), "flags")
        assert [finding.level for finding in findings if str(keys) in finding.text] == [expected]


def test_check_tells_a_damaged_file_wrong_rights_and_wrong_sums(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    os.chmod(path, 0o644)
    assert [(finding.level, finding.text) for finding in found(subject(path), "file")][1:] == [
        ("WARN", "others may open it (mode 0644); chmod 0600 it"),
        ("OK", "integrity_check ok"),
        ("OK", "4 messages, 2336 bytes, 1 proven mailboxes"),
    ]
    execute(Path(path), "UPDATE relay SET messages = 7")
    assert found(subject(path), "file")[-1] == Finding(
        "WARN", "file", "messages, bytes and mailboxes are (4, 2336, 1), but it says (7, 2336, 1)"
    )
    damage(Path(path))
    assert found(subject(path), "file")[-1].level == "FAIL"


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_check_and_backup_take_an_old_file_and_leave_it_old(
    tmp_path: Path, path: str, version: int
) -> None:
    make_file(Path(path), version)
    before = content(Path(path))
    assert found(subject(path), "file")[0] == Finding(
        "OK", "file", f"{path}, schema {version} of {len(SCHEMA)}"
    )
    back_up(path, str(tmp_path / "backup.db"))
    assert content(tmp_path / "backup.db") == content(Path(path)) == before
    with pytest.raises(
        AdminError, match=f"has schema {version}, and this program {len(SCHEMA)}; restart the relay"
    ):
        delete(path, Owner(1).box)
    assert content(Path(path)) == before


def test_check_tells_a_disk_without_room_and_a_reserve_in_use(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    findings = found(subject(path, "--max-bytes", "1"), "disk")
    assert (
        Finding(
            "WARN", "disk", "the reserve is in use: the disk was full, and messages are refused"
        )
        in findings
    )
    Path(path + "-reserve").touch()
    assert "WARN" not in levels(
        [
            finding
            for finding in found(subject(path, "--max-bytes", "1"), "disk")
            if "tmpfs" not in finding.text
        ]
    )
    (room, *_) = found(subject(path, "--max-bytes", str(10**12)), "disk")
    assert room.level in ("WARN", "FAIL")
    assert "a full relay (--max-bytes) would take " in room.text


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux")
def test_file_system_is_the_one_mounted_nearest() -> None:
    assert file_system_of("/proc/self/status") == "proc"
    assert file_system_of("/") != "proc"


def test_check_tells_a_clock_that_is_not_believed_or_behind_the_relays_time(path: str) -> None:
    time_us = make_file(Path(path), len(SCHEMA))
    date = datetime.datetime.fromtimestamp(time_us // SECOND_US, datetime.UTC)
    assert found(subject(path, now_us=lambda: 0), "clock") == [
        Finding("FAIL", "clock", "shows 1970-01-01 00:00:00 UTC, which the relay does not believe"),
        Finding(
            "WARN",
            "clock",
            f"the relay's time is {date:%Y-%m-%d %H:%M:%S} UTC, ahead of the clock, and stays so"
            " until that is reached; nothing is lost",
        ),
    ]
    assert len(found(subject(path, now_us=lambda: time_us), "clock")) == 1
    assert clock_is_synchronized() in (True, False, None)


class Shown(NamedTuple):
    """A certificate and its key."""

    certificate: Path
    key: Path


def issue(folder: Path, days: int, name: str = "relay.example.com") -> Shown:
    """Make a certificate that is valid for this many days and a bit."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    certificate = (
        x509.CertificateBuilder(
            issuer,
            issuer,
            key.public_key(),
            x509.random_serial_number(),
            now - datetime.timedelta(days=90),
            now + datetime.timedelta(days=days, minutes=10),
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = Shown(folder / f"{days}.pem", folder / f"{days}.key")
    files.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    files.key.touch(0o600)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@pytest.mark.parametrize(
    ("days", "level"), [(RENEWAL_DAYS, "OK"), (RENEWAL_DAYS - 1, "WARN"), (-1, "FAIL")]
)
def test_check_tells_a_certificate_near_its_end(tmp_path: Path, days: int, level: str) -> None:
    files = issue(tmp_path, days)
    looked_at = subject(
        ":memory:", "--tls-cert", str(files.certificate), "--tls-key", str(files.key)
    )
    assert levels(found(looked_at, "certificate")) == [level]


def test_check_tells_a_certificate_for_another_name(tmp_path: Path) -> None:
    files = issue(tmp_path, 60)
    for name, expected in (("relay.example.com", ["OK"]), ("other.example.com", ["OK", "FAIL"])):
        looked_at = subject(
            ":memory:",
            "--tls-cert",
            str(files.certificate),
            "--tls-key",
            str(files.key),
            url=f"https://{name}:1/",
        )
        assert levels(found(looked_at, "certificate")) == expected


def test_check_tells_a_certificate_that_was_renewed_but_not_read_again(
    tmp_path: Path, relay: Relay
) -> None:
    old, new = issue(tmp_path, 40), issue(tmp_path, 80)
    with serving(relay, tls=load_tls(str(old.certificate), str(old.key))) as server:
        for files, expected in ((old, ["OK"]), (new, ["OK", "WARN"])):
            findings = found(
                subject(
                    ":memory:",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(server.server_port),
                    "--tls-cert",
                    str(files.certificate),
                    "--tls-key",
                    str(files.key),
                ),
                "relay",
            )
            assert levels(findings) == expected
        (reach,) = found(
            subject(":memory:", url=f"https://127.0.0.1:{server.server_port}/"), "reach"
        )
        assert reach.level == "FAIL"
        assert "self-signed certificate" in reach.text or "certificate" in reach.text
