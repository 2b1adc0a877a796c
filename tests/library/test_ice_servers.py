"""STUN and TURN servers that a user names: looked at when they are given, and never told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from apps import APP_URL, Apps
from harness import needs
from turn_server import turn_server

from connectoid import AiortcAdapter, Connectoid, Privacy, Store, UsageError
from connectoid.cli.command_line import main
from connectoid.ice import check_ice_servers, load_ice_servers, parse_ice_servers

PASSWORD = "mellon-mellon"
TURN = {"urls": "turn:turn.example.com", "username": "alice", "credential": PASSWORD}

GOOD: list[list[Any]] = [
    [],
    ["stun:stun.example.com", "stun:[2001:db8::1]:3478"],
    [TURN],
    [TURN | {"urls": ["turn:turn.example.com:3478?transport=tcp", "turns:192.0.2.1:443"]}],
    [TURN | {"credentialType": "password"}, {"urls": ["stun:stun.example.com"]}],
]


@pytest.mark.parametrize("servers", GOOD, ids=str)
def test_servers_are_taken_as_they_are(servers: list[Any]) -> None:
    assert check_ice_servers(servers) == servers
    assert parse_ice_servers(json.dumps(servers), "here") == servers


BAD: list[tuple[object, str]] = [
    ({"urls": "stun:a"}, "ICE servers are a list"),
    ("stun:stun.example.com", "ICE servers are a list"),
    (None, "ICE servers are a list"),
    (["stun:a", 5], "ICE server 2 is a URL, or an object"),
    ([[TURN]], "ICE server 1 is a URL, or an object"),
    ([TURN | {"password": PASSWORD}], "ICE server 1 has a member that is none of urls, username"),
    ([{"username": "alice"}], "ICE server 1 has no urls"),
    ([TURN | {"urls": []}], "ICE server 1 has no urls"),
    ([TURN, TURN | {"urls": [5]}], "ICE server 2: a URL looks like"),
    (["turn.example.com"], "ICE server 1: a URL looks like"),
    (["http://turn.example.com"], "ICE server 1: a URL looks like"),
    ([TURN | {"urls": "turn://turn.example.com"}], "ICE server 1: a URL looks like"),
    ([TURN | {"urls": "turn:turn.example.com:0"}], "ICE server 1: a URL looks like"),
    ([TURN | {"urls": "turn:turn.example.com:65536"}], "ICE server 1: a URL looks like"),
    ([TURN | {"urls": "turn:a?transport=tls"}], "ICE server 1: a URL looks like"),
    ([f"turn:alice:{PASSWORD}@turn.example.com"], "ICE server 1: a URL looks like"),
    (["turn:turn.example.com"], "ICE server 1: a TURN server needs a username"),
    ([{**TURN, "credential": None}], "ICE server 1: a TURN server needs a credential"),
    ([TURN | {"credential": ""}], "ICE server 1: its credential is a text"),
    ([TURN | {"username": 5}], "ICE server 1: its username is a text"),
]


@pytest.mark.parametrize(("servers", "words"), BAD)
def test_error_says_what_is_wrong_with_which_and_no_password(servers: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_ice_servers(servers)
    assert str(caught.value).startswith(words)
    assert PASSWORD not in str(caught.value)


def test_runner_looks_at_servers_when_it_is_made(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "app.db")) as store:
        wrong = pytest.raises(UsageError, match="ICE server 1: a TURN server needs a username")
        with wrong:
            Connectoid(store, [], ice_servers=["turn:turn.example.com"])


# Files and the environment ----------------------------------------------------------------


def write(folder: Path, text: str, mode: int = 0o600) -> str:
    """Return a file with servers in it."""
    path = folder / "servers.json"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(("mode", "is_taken"), [
    (0o600, True), (0o400, True), (0o640, False), (0o604, False), (0o620, False)])
def test_file_that_others_can_read_is_refused(tmp_path: Path, mode: int, is_taken: bool) -> None:
    path = write(tmp_path, json.dumps([TURN]), mode)
    if is_taken:
        assert load_ice_servers(path) == [TURN]
        return
    with pytest.raises(UsageError, match=r"others can read it; chmod 600 it"):
        load_ice_servers(path)


@pytest.mark.parametrize(("text", "words"), [
    ("", "servers.json, line 1, column 1: it is not JSON"),
    (f'[{{"urls": "turn:a", "credential": "{PASSWORD}",}}]', "line 1, column"),
    ("[" * 100_000, "it is not JSON"),
    (json.dumps([TURN, TURN | {"urls": "x"}]), "servers.json: ICE server 2: a URL looks like"),
])
def test_mistake_in_a_file_is_told_with_its_place_and_no_password(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_ice_servers(write(tmp_path, text))
    assert words in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("make", [
    lambda folder: folder / "missing.json",
    lambda folder: folder,
    lambda folder: Path(write(folder, "")).write_bytes(b"\xff") and folder / "servers.json",
])
def test_what_is_no_file_of_text_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(UsageError):
        load_ice_servers(make(tmp_path))


def run(*flags: str, folder: Path) -> int:
    """Return the exit code of a command that would wait for Bob."""
    store = folder / "alice.db"
    Store(store).close()
    try:
        return main(["chat", "Bob", "--store", str(store), *flags])
    except SystemExit as left:
        return int(str(left.code))


@pytest.mark.parametrize(("flag", "words"), [
    ("--ice-server=turn:turn.example.com", "put them into the file of --ice-servers"),
    ("--ice-server=stun.example.com", "a URL looks like"),
    ("--ice-servers=missing.json", "missing.json: No such file"),
])
def test_wrong_servers_are_a_usage_error(
    tmp_path: Path, flag: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(flag, folder=tmp_path) == 2
    assert words in capsys.readouterr().err


@pytest.mark.sockets
def test_servers_in_the_environment_are_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONNECTOID_ICE_SERVERS", json.dumps([TURN | {"urls": "turn:"}]))
    assert run(folder=tmp_path) == 2
    told = capsys.readouterr().err
    assert "$CONNECTOID_ICE_SERVERS: ICE server 1: a URL looks like" in told
    assert PASSWORD not in told
    # A file takes its place, and what is wrong next is that there is no Bob.
    assert run(f"--ice-servers={write(tmp_path, json.dumps([TURN]))}", folder=tmp_path) == 2
    assert "There is no contact 'Bob'" in capsys.readouterr().err


@needs("turnserver")
@pytest.mark.slow
@pytest.mark.sockets
def test_turn_server_that_refuses_the_password_is_named_where_nobody_comes(
    apps: Apps, relay_url: str
) -> None:
    with turn_server(f"lt-cred-mech\nuser=alice:another-{PASSWORD}\n") as port:
        turn = TURN | {"urls": f"turn:127.0.0.1:{port}"}
        alice = apps.begin("Alice", relay_url, webrtc=AiortcAdapter(), ice_servers=[turn])
        bob = apps.begin("Bob", relay_url, webrtc=AiortcAdapter(), ice_servers=[turn])
        alice.privacy = bob.privacy = Privacy(relay_only=True)
        bob.open(alice.share("Bob", APP_URL), "Alice")
        with pytest.raises(TimeoutError) as caught:
            bob.connect("Alice", 5)
    assert f"turn:127.0.0.1:{port} cannot be used: it refuses" in str(caught.value)
    assert PASSWORD not in str(caught.value)
