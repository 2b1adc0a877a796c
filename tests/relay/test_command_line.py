"""Test the command line as a process: flags, words, exit codes, signals and the log."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from aioice import stun
from harness import (
    DEADLINE_S,
    NOTHING,
    OK,
    PROGRAM,
    ROOT,
    Owner,
    Process,
    assert_fails_with_one_line,
    binding_request,
    check,
    datagrams_to,
    document_of,
    exchange,
    forwarded,
    http_request,
    page,
    park,
    parse_response,
    post,
    receive,
    reply_on,
    run_relay,
    send,
    until,
)

from connectoid_relay import (
    Limits,
    SqliteStore,
    __version__,
    build_parser,
    flag_of,
    variable_of,
)

# ---------------------------------------------------------------------------------------
# The command line, as a process: flags, words, exit codes, signals, the log.
# ---------------------------------------------------------------------------------------

FLAGS = [
    "--version",
    "--help",
    "--host",
    "--port",
    "--db",
    "--sync",
    "--udp",
    "--stun",
    "--turn",
    "--turn-secret",
    "--tls-cert",
    "--tls-key",
    "--keys",
    "--deny",
    "--trusted-proxy",
    "--name",
    "--contact",
    "--notice",
    "--price-url",
    "--log-ips",
    *map(flag_of, Limits._fields),
]


def test_version_is_printed(tmp_path: Path) -> None:
    finished = run_relay("--version", cwd=tmp_path)
    assert (finished.returncode, finished.stdout, finished.stderr) == (
        0,
        f"connectoid relay {__version__}\n",
        "",
    )


def test_log_goes_nowhere_where_stderr_is_closed(tmp_path: Path) -> None:
    script = "import connectoid_relay as r; r.log_to_stderr(); r.log.warning('x'); print('goes on')"
    finished = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", script],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False)
    assert (finished.returncode, finished.stdout) == (0, "goes on\n")


def test_help_names_every_flag(tmp_path: Path) -> None:
    finished = run_relay("--help", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    named = set(finished.stdout.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert [flag for flag in FLAGS if flag not in named] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ((), "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"),
        (("--host", "127.0.0.1"), "127.0.0.1"),
        (("--host", "::1"), "[::1]"),
    ],
)
def test_ready_line_names_the_real_port(
    host: tuple[str, ...], shown: str, start: Callable[..., Process]
) -> None:
    if host and not socket.has_dualstack_ipv6() and ":" in host[-1]:
        pytest.skip("no IPv6 here")
    process = start("--db", ":memory:", *host)
    assert process.port > 0
    url = f"http://{shown}:{process.port}"
    assert process.first_line == f"connectoid relay {__version__} listening on {url}\n"
    address = "::1" if ":" in shown and host else "127.0.0.1"
    with socket.create_connection((address, process.port), timeout=DEADLINE_S) as client:
        client.sendall(http_request(b"", method="GET", path="/health"))
        with client.makefile("rb") as stream:
            assert parse_response(stream.read())[0] == 200
    assert process.stop() == (0, "")


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-such-flag"],
        ["extra"],
        ["--port"],
        ["--port", "70000"],
        ["--port", "-1"],
        ["--port", "http"],
        ["--port", "80.0"],
        ["--port", ""],
        ["--port", "٨٠٨٠"],
        ["--rate", "-1"],
        ["--rate", "1e3"],
        ["--rate", "1_000"],
        ["--message-ttl", "0"],
        ["--question-ttl", "0"],
        ["--box-ttl", "soon"],
        ["--max-box-messages", "0"],
        ["--max-bytes", "9" * 30],
        ["--max-connections", " 5"],
        ["--sync", "off"],
        ["--udp", "yes"],
    ],
    ids=" ".join,
)
def test_wrong_flags_are_a_usage_error(flags: list[str], tmp_path: Path) -> None:
    finished = run_relay(*flags, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(
        r"connectoid_relay\.py: error: .* \(--help lists the flags\)\n", finished.stderr
    )
    assert any(flag in finished.stderr for flag in flags)
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


# A value for each kind of flag; --max-bytes stands for all limits.
SAID = {
    "--host": "127.0.0.1",
    "--port": "0",
    "--db": "other.db",
    "--sync": "normal",
    "--udp": "1",
    "--stun": "Yes",
    "--turn": "turn:a.example.com turns:b.example.com",
    "--turn-secret": "a file",
    "--tls-cert": "fullchain.pem",
    "--tls-key": "privkey.pem",
    "--keys": "keys.toml",
    "--deny": "denied",
    "--trusted-proxy": "127.0.0.0/8 ::1/128",
    "--name": "Alice's relay",
    "--contact": "alice@example.com",
    "--notice": "closed at night",
    "--price-url": "https://example.com/",
    "--log-ips": "true",
    **{flag_of(name): "7777" for name in Limits._fields},
}


def words_of(flag: str, text: str) -> list[str]:
    """Return the flags that say what a variable does."""
    if flag in ("--udp", "--stun", "--log-ips"):
        return [flag]
    if flag in ("--turn", "--trusted-proxy"):
        return [word for value in text.split() for word in (flag, value)]
    return [flag, text]


@pytest.mark.parametrize("flag", FLAGS[2:])
def test_variable_says_what_its_flag_does(flag: str) -> None:
    by_flag = build_parser().parse_args(words_of(flag, SAID[flag]))
    by_variable = build_parser(environ={variable_of(flag): SAID[flag]}).parse_args([])
    assert by_variable == by_flag
    assert by_variable != build_parser().parse_args([])


def test_flag_wins_over_its_variable() -> None:
    words = ["--port", "1", "--name", "Flag", "--trusted-proxy", "::1", "--udp"]
    environ = {
        "CONNECTOID_PORT": "none", "CONNECTOID_NAME": "Variable", "CONNECTOID_UDP": "0",
        "CONNECTOID_TRUSTED_PROXY": "127.0.0.1 ::2"}
    assert build_parser(environ=environ).parse_args(words) == build_parser().parse_args(words)


@pytest.mark.parametrize("text", ["", "0", "No", "false"])
def test_switch_stays_off_where_its_variable_says_so(text: str) -> None:
    environ = {"CONNECTOID_UDP": text, "CONNECTOID_PORT": ""}
    assert build_parser(environ=environ).parse_args([]) == build_parser().parse_args([])


@pytest.mark.parametrize(("flag", "text"), [
    ("--port", "80.0"), ("--udp", "2"), ("--sync", "off"), ("--trusted-proxy", "127.0.0.1 x"),
    ("--turn", "turn:a,turn:b"), ("--rate", "-1"), ("--name", os.fsdecode(b"\xff"))])
def test_wrong_variable_is_a_usage_error_that_names_it(
        flag: str, text: str, tmp_path: Path) -> None:
    environ = {**os.environ, variable_of(flag): text}
    finished = run_relay(cwd=tmp_path, env=environ)
    assert (finished.returncode, finished.stdout) == (2, "")
    start = f"connectoid_relay.py: error: variable {variable_of(flag)}: "
    assert finished.stderr.startswith(start)
    assert finished.stderr.count("\n") == 1
    assert run_relay("--version", cwd=tmp_path, env=environ).returncode == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_port_in_use_fails_with_one_line(kind: socket.SocketKind, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = str(taken.getsockname()[1])
        finished = run_relay(
            "--host", "127.0.0.1", "--port", port, "--udp", "--db", "relay.db", cwd=tmp_path
        )
    assert_fails_with_one_line(finished, port)


def test_second_relay_on_a_port_fails_with_one_line(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    port = str(start("--db", ":memory:").port)
    assert_fails_with_one_line(run_relay("--port", port, "--db", ":memory:", cwd=tmp_path), port)


# None of these is asked of a DNS server: an interface that does not exist, labels that no name
# may have, an address of documentation that no machine has.
@pytest.mark.parametrize(
    "host", ["fe80::1%nowhere", "a" * 64, "relay..example", ".", "203.0.113.1"]
)
def test_host_that_cannot_be_had_fails_with_one_line(host: str, tmp_path: Path) -> None:
    assert_fails_with_one_line(
        run_relay("--host", host, "--port", "0", "--db", ":memory:", cwd=tmp_path)
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_answers_pending_long_polls_and_ends_well(
    number: signal.Signals, start: Callable[..., Process], alice: Owner, bob: Owner, tmp_path: Path
) -> None:
    process = start("--db", "relay.db")
    assert post(process.port, send(bob)) == (200, OK)
    with (contextlib.closing(park(process.port, check(alice, wait=60))) as waiting,
          contextlib.closing(park(process.port, [check(alice, wait=60)])) as batch,
          # An idle connection.
          socket.create_connection(("127.0.0.1", process.port)),
          socket.create_connection(("127.0.0.1", process.port)) as slow):
        slow.sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        process.popen.send_signal(number)
        # The promise is under 2 s.
        assert process.popen.wait(3) == 0
        assert reply_on(waiting) == (200, NOTHING)
        assert reply_on(batch) == (200, [NOTHING])
    assert process.stop() == (0, "")
    # Everything is in the one file.
    assert not (tmp_path / "relay.db-wal").exists()
    store = SqliteStore(str(tmp_path / "relay.db"))
    assert [text for _, text in store.messages(bob.box, 0, 10, 0)] == ["QUJD"]
    store.close()


@pytest.mark.slow
def test_second_signal_does_no_harm(start: Callable[..., Process]) -> None:
    process = start("--db", "relay.db")
    with socket.create_connection(("127.0.0.1", process.port)) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        post(process.port, check(Owner(9)))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.popen.send_signal(number)
        assert process.popen.wait(DEADLINE_S) == 0
    assert process.stop() == (0, "")


def test_database_in_memory_leaves_no_file(
    start: Callable[..., Process], tmp_path: Path, alice: Owner
) -> None:
    process = start("--db", ":memory:")
    assert post(process.port, send(alice)) == (200, OK)
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]
    assert process.stop() == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "state", "expected"),
    [
        ((), "", "connectoid.db"),
        ((), "state", "state/connectoid.db"),
        (("--db", "other.db"), "state", "other.db"),
    ],
)
def test_database_stands_where_the_flag_or_the_state_directory_says(
    flags: tuple[str, ...], state: str, expected: str, start: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    environment = {name: text for name, text in os.environ.items() if name != "STATE_DIRECTORY"}
    if state:
        environment["STATE_DIRECTORY"] = str(tmp_path / state)
    process = start(*flags, env=environment)
    assert process.port
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.db")] == [expected]


def test_every_limit_is_a_flag_and_shows_in_the_document(start: Callable[..., Process]) -> None:
    given = {name: default + 1 for name, default in Limits()._asdict().items()}
    flags = itertools.chain(*((flag_of(name), str(number)) for name, number in given.items()))
    document = document_of(start("--db", ":memory:", *flags).port)
    retention = {name: given.pop(f"{name}_ttl_s") for name in ("message", "question", "box")}
    assert document["limits"] == given
    assert document["retention"] == retention
    assert (document["software"], document["version"], document["udp"]) == (
        "connectoid_relay",
        __version__,
        False,
    )


def test_limits_default_to_what_the_class_says(start: Callable[..., Process]) -> None:
    document = document_of(start("--db", ":memory:").port)
    named = {f"{name}_ttl_s": seconds for name, seconds in document["retention"].items()}
    assert document["limits"] | named == Limits()._asdict()


def misbehave(port: int, owner: Owner) -> list[str]:
    """Make errors of all kinds, too many requests at last; return what no log may hold."""
    assert post(port, send(owner, "SECRETAA")) == (200, OK)
    _, reply = post(port, check(owner))
    answer = owner.open(reply["question"])
    assert post(port, receive(owner, "WRONG" + answer))[0] == 403
    assert post(port, b"{SECRET")[0] == 400
    assert post(port, {"pub": owner.pub, "action": "SECRET"})[0] == 400
    assert post(port, send(owner, "SECRET" * 6_000))[0] == 413
    for octets in (
        b"SECRET\n\n",
        http_request(b"", path="/SECRET"),
        b"GET / HTTP/1.1\r\nA: " + b"SECRET" * 9_999,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: SECRET\r\n\r\n",
    ):
        assert exchange(port, octets).startswith(b"HTTP/1.1 4")
    until(lambda: bool(post(port, check(owner))[0] == 429))
    return [owner.pub, answer, "SECRET"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--log-ips",)])
def test_log_holds_no_key_and_no_message_and_an_address_only_if_asked(
        flags: tuple[str, ...], start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", "relay.db", "--udp", "--rate", "30", *flags)
    secrets = misbehave(process.port, alice)
    code, log = process.stop()
    assert code == 0
    assert [secret for secret in secrets if secret in log] == []
    assert ("127.0.0.1" in log) is bool(flags)
    assert "too often" in log
    assert "Traceback" not in log


def test_udp_answers_on_the_same_port_number(start: Callable[..., Process], alice: Owner) -> None:
    process = start("--db", ":memory:", "--udp", "--host", "127.0.0.1")
    assert document_of(process.port)["udp"] is True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", process.port))
        for found in (False, True):
            client.send(json.dumps(check(alice, id="one-1")).encode())
            assert json.loads(client.recv(2_048)) == {"ok": True, "found": found, "id": "one-1"}
            assert post(process.port, send(alice)) == (200, OK)


@pytest.mark.parametrize(
    ("modules", "words", "cause"),
    [
        (["cryptography/__init__.py"], "", "No module named 'cryptography.hazmat'"),
        (
            [
                "cryptography/__init__.py",
                "cryptography/hazmat/__init__.py",
                "cryptography/hazmat/primitives/__init__.py",
            ],
            "",
            "cannot import name 'hpke'",
        ),
        (["cryptography/__init__.py"], "raise ImportError('no libffi')", "no libffi)"),
    ],
    ids=["missing", "old", "broken"],
)
def test_missing_cryptography_is_said_in_one_sentence(
        modules: list[str], words: str, cause: str, tmp_path: Path) -> None:
    for module in modules:
        (tmp_path / "stub" / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stub" / module).write_text(words)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "stub")}
    finished = run_relay("--port", "0", cwd=tmp_path, env=environment)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.count("\n") == 1
    assert "cryptography" in finished.stderr
    assert "pip install 'cryptography>=47'" in finished.stderr
    # Another cause than the version is not hidden.
    assert f"({cause}" in finished.stderr
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    code = "try: import connectoid_relay\nexcept ImportError as error: print(error)"
    imported = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (imported.stdout, imported.stderr) == (finished.stderr, "")


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="bench/start.py tells those of others")
def test_memory_at_start_is_below_42_mib(start: Callable[..., Process]) -> None:
    """Measure the least of three: what the kernel maps of a library varies by 1 MiB."""
    statuses = [Path(f"/proc/{start().popen.pid}/status").read_text("ascii") for _ in range(3)]
    assert min(int(status.partition("VmRSS:")[2].split()[0]) for status in statuses) < 42 * 1024


def test_file_alone_runs_in_an_empty_directory(tmp_path: Path, alice: Owner) -> None:
    shutil.copy(ROOT / PROGRAM, tmp_path)
    # With -I neither this directory nor the environment helps.
    with subprocess.Popen(
        [sys.executable, "-I", PROGRAM, "--port", "0"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        assert popen.stderr is not None
        try:
            port = int(popen.stderr.readline().rpartition(":")[2])
            assert post(port, send(alice)) == (200, OK)
            assert [text for _, text in page(port, alice)] == ["QUJD"]
        finally:
            popen.terminate()
        assert popen.wait(DEADLINE_S) == 0
        assert popen.stderr.read() == ""
    assert sorted(path.name for path in tmp_path.iterdir() if "-" not in path.name) == [
        "connectoid.db",
        PROGRAM,
    ]


def test_main_can_be_called_from_another_program(tmp_path: Path) -> None:
    code = (
        "import sys, connectoid_relay;"
        " sys.exit(connectoid_relay.main(['--db', '/', '--port', '0']))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=DEADLINE_S,
        check=False,
    )
    assert_fails_with_one_line(finished, "/")


# ---------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--price-url", "javascript:alert(1)"],
            "'javascript:alert(1)' is not a web address; write https://...",
        ),
        (["--price-url", "example.org"], "write https://..."),
        (["--price-url", "https://example.org/ x"], "write https://..."),
        (["--price-url", ""], "write https://..."),
        (["--trusted-proxy", "10.0.0.1/8"], "'10.0.0.1/8' is not a network; write 10.0.0.0/8"),
        (["--trusted-proxy", "2001:db8::1/32"], "write 2001:db8::/32"),
        (
            ["--trusted-proxy", "nonsense"],
            "'nonsense' is not a network; write an address, or a network like 192.0.2.0/24",
        ),
        (["--trusted-proxy", "10.0.0.0/8,192.0.2.1"], "write an address"),
        (["--trusted-proxy", ""], "write an address"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--tls-key", "key.pem"], "--tls-cert and --tls-key go together"),
        (["--keys"], "expected one argument"),
        (["--deny"], "expected one argument"),
        (["--stun", "yes"], "unrecognized arguments: yes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flag_is_a_usage_error_in_one_line(
    flags: list[str], words: str, tmp_path: Path
) -> None:
    finished = run_relay("--port", "0", *flags, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(
        r"connectoid_relay\.py: error: .* \(--help lists the flags\)\n", finished.stderr
    )
    assert words in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--name", "--contact", "--notice", "--price-url"])
def test_text_that_is_not_utf_8_is_a_usage_error(flag: str, tmp_path: Path) -> None:
    finished = run_relay(
        "--port", "0", "--tls-cert", "x", flag, os.fsdecode(b"https://\xff"), cwd=tmp_path
    )
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert finished.stderr.startswith(f"connectoid_relay.py: error: argument {flag}: ")


def test_what_the_host_says_stands_in_the_document(start: Callable[..., Process]) -> None:
    said = {"name": "Relè ☕", "contact": "me@example.org", "notice": "<b>Moves</b> on Monday",
            "price_url": "https://example.org/price?a=1&b=2"}
    flags = [
        text for name, value in said.items() for text in (f"--{name.replace('_', '-')}", value)
    ]
    process = start("--db", ":memory:", "--stun", *flags)
    document = document_of(process.port)
    assert {name: document[name] for name in (*said, "stun", "udp")} == {
        **said,
        "stun": True,
        "udp": False,
    }
    assert sorted(document) == [
        "contact",
        "description",
        "limits",
        "name",
        "notice",
        "price_url",
        "protocols",
        "retention",
        "software",
        "stun",
        "turn",
        "udp",
        "version",
    ]
    with datagrams_to(process.port) as client:
        client.send(binding_request())
        assert stun.parse_message(client.recv(2_048)).attributes == {
            "XOR-MAPPED-ADDRESS": client.getsockname()[:2]}
    assert process.stop() == (0, "")


def test_what_the_host_does_not_say_is_null(start: Callable[..., Process]) -> None:
    document = document_of(start("--db", ":memory:").port)
    assert {
        name: document[name] for name in ("name", "contact", "notice", "price_url", "stun")
    } == {
        "name": "Connectoid relay",
        "contact": None,
        "notice": None,
        "price_url": None,
        "stun": False,
    }


def test_proxies_of_several_flags_are_all_trusted(
    start: Callable[..., Process], alice: Owner
) -> None:
    process = start(
        "--db",
        ":memory:",
        "--rate",
        "1",
        "--trusted-proxy",
        "127.0.0.0/8",
        "--trusted-proxy",
        "192.0.2.1",
    )
    assert [
        forwarded(process.port, check(alice), hops)[0]
        for hops in (
            "203.0.113.1, 192.0.2.1",
            "203.0.113.2, 192.0.2.1",
            "203.0.113.1",
            "203.0.113.3, 192.0.2.2",
        )
    ] == [200, 200, 429, 200]
