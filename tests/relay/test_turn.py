"""TURN credentials: who gets them, how many, and who else learns the secret."""

from __future__ import annotations

import base64
import hmac
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import (
    HOME,
    KEY,
    START_US,
    FakeClock,
    Make,
    Owner,
    Process,
    alices,
    assert_fails_with_one_line,
    check,
    document_of,
    next_log_line,
    post,
    receive,
    run_relay,
    until,
)

from connectoid_relay import (
    MAX_TURN_URLS,
    MIN_TURN_SECRET_BYTES,
    Relay,
    SettingError,
    Turn,
    read_turn,
)

URL = "turn:turn.example.com:3478"
SECRET = "5e9c27f35e9c27f35e9c27f3"
OTHER_SECRET = "another secret".replace(" ", "-") * 2
TURN = Turn([URL], SECRET.encode())


def credential_of(username: str, secret: str = SECRET) -> str:
    """Return the password that coturn wants to see for a name."""
    return base64.b64encode(hmac.digest(secret.encode(), username.encode(), "sha1")).decode()


def lending(make: Make, **options: Any) -> Relay:
    """Return a relay that lends TURN servers."""
    relay = make(**options)
    relay.turn = TURN
    return relay


def ask_for_turn(relay: Relay, owner: Owner, source: str = HOME, **more: Any) -> Any:
    """Return what an owner gets who proves a mailbox and asks for credentials."""
    asked = relay.handle(check(owner, prove=True, **more), source)
    assert asked.status == 200
    answer = owner.open(asked.body["question"])
    return relay.handle(receive(owner, answer, turn=True, **more), source).body.get("turn")


def test_credentials_are_those_that_coturn_works_out(make: Make, alice: Owner) -> None:
    turn = ask_for_turn(lending(make), alice)
    end, _, name = turn["username"].partition(":")
    assert int(end) == START_US // 1_000_000 + 3_600
    assert len(name) == 16
    assert int(name, 16) > 0
    assert turn == {
        "urls": [URL],
        "username": turn["username"],
        "credential": credential_of(turn["username"]),
        "ttl": 3_600,
    }


@pytest.mark.parametrize("limit", ["max_turn", "max_turn_per_source"])
def test_credentials_are_given_up_to_the_limit_and_counted(
    make: Make, clock: FakeClock, alice: Owner, limit: str
) -> None:
    relay = lending(make, **{limit: 2})
    given = [ask_for_turn(relay, alice) is not None for _ in range(3)]
    assert given == [True, True, False]
    counts = relay.counts.taken()
    assert counts["connectoid_turn_total", "given"] == 2
    assert counts["connectoid_turn_total", "refused"] == 1
    clock.advance(3_600)
    assert ask_for_turn(relay, alice) is not None


def test_rate_0_lifts_the_limits_on_credentials(make: Make, alice: Owner) -> None:
    relay = lending(make, max_turn=1, max_turn_per_source=1, rate=0)
    assert None not in [ask_for_turn(relay, alice) for _ in range(3)]


def test_networks_of_one_customer_share_what_a_source_may_have(
    make: Make, alice: Owner, bob: Owner
) -> None:
    """The /56 gets twice, the /48 four times what a source gets."""
    relay = lending(make, max_turn_per_source=1)
    sources = [f"2001:db8:1:{network:x}::1" for network in (0, 1, 2, 0x100, 0x101, 0x200)]
    given = [ask_for_turn(relay, alice, source) is not None for source in sources]
    assert given == [True, True, False, True, True, False]
    assert ask_for_turn(relay, bob, "2001:db8:2::1") is not None


def test_credentials_need_an_api_key_where_the_relay_wants_one(make: Make, alice: Owner) -> None:
    relay = lending(make, access=alices(None))
    assert relay.handle(check(alice, prove=True), HOME).status == 403
    assert ask_for_turn(relay, alice, ext=KEY) is not None


def test_document_says_whether_there_are_turn_servers(make: Make) -> None:
    assert lending(make).document()["turn"] is True
    assert make().document()["turn"] is False


def test_secret_is_in_no_text_of_the_relay(make: Make, alice: Owner) -> None:
    relay = lending(make)
    texts = [repr(TURN), repr(vars(relay)), str(relay.document()), str(ask_for_turn(relay, alice))]
    assert [text for text in texts if SECRET in text] == []


# The file ---------------------------------------------------------------------------------


def secret_file(folder: Path, text: str, mode: int = 0o600) -> str:
    """Return a file with a secret in it."""
    path = folder / "turn-secret"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(("count", "is_taken"), [
    (MIN_TURN_SECRET_BYTES - 1, False),
    (MIN_TURN_SECRET_BYTES, True),
    (MIN_TURN_SECRET_BYTES + 1, True),
])
def test_secret_that_can_be_guessed_is_refused(
    tmp_path: Path, count: int, is_taken: bool
) -> None:
    path = secret_file(tmp_path, "x" * count + "\n")
    if is_taken:
        assert read_turn([URL], path) is not None
        return
    with pytest.raises(SettingError, match=r"at least 16 characters.*openssl rand -hex 32"):
        read_turn([URL], path)


@pytest.mark.parametrize(("mode", "is_taken"), [(0o600, True), (0o640, True), (0o644, False)])
def test_secret_that_everybody_may_read_is_refused(
    tmp_path: Path, mode: int, is_taken: bool
) -> None:
    path = secret_file(tmp_path, SECRET, mode)
    if is_taken:
        assert read_turn([URL], path) is not None
        return
    with pytest.raises(SettingError, match="others may read it; chmod 0640 it"):
        read_turn([URL], path)


@pytest.mark.parametrize("text", ["", "\n", f"{SECRET}\n{SECRET}\n", f"secret = {SECRET}"])
def test_file_that_is_not_one_word_is_refused_and_not_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingError, match="write one line") as caught:
        read_turn([URL], secret_file(tmp_path, text))
    assert SECRET not in str(caught.value)


@pytest.mark.sockets
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--turn", URL], "--turn and --turn-secret go together"),
        (["--turn-secret", "x"], "--turn and --turn-secret go together"),
        (["--turn", "turn.example.com"], "is not a TURN server; write turn:HOST:PORT"),
        (["--turn", "stun:turn.example.com"], "is not a TURN server"),
        (["--turn", "turn:alice@turn.example.com"], "is not a TURN server"),
        (["--turn", "turn:turn.example.com?transport=tls"], "is not a TURN server"),
        (["--turn-secret", "x", *["--turn", URL] * (MAX_TURN_URLS + 1)], "--turn at most 4 times"),
    ],
)
def test_wrong_turn_flags_are_a_usage_error(
    tmp_path: Path, flags: list[str], words: str
) -> None:
    finished = run_relay(*flags, cwd=tmp_path)
    assert finished.returncode == 2
    assert words in finished.stderr


@pytest.mark.sockets
def test_process_without_a_secret_fails_with_one_line(tmp_path: Path) -> None:
    flags = ("--turn", URL, "--turn-secret", "turn-secret", "--port", "0", "--db", ":memory:")
    assert_fails_with_one_line(run_relay(*flags, cwd=tmp_path), "turn-secret: No such file")
    secret_file(tmp_path, SECRET, 0o644)
    finished = run_relay(*flags, cwd=tmp_path)
    assert_fails_with_one_line(finished, "turn-secret: others may read it")
    assert SECRET not in finished.stderr


@pytest.mark.sockets
@pytest.mark.parametrize("count", [1, MAX_TURN_URLS - 1, MAX_TURN_URLS])
def test_process_reads_the_secret_again_and_tells_it_nobody(
    start: Callable[..., Process], tmp_path: Path, alice: Owner, count: int
) -> None:
    secret_file(tmp_path, f"{SECRET}\n")
    urls = [f"turn:turn{number}.example.com" for number in range(count)]
    flags = [word for url in urls for word in ("--turn", url)]
    process = start("--db", ":memory:", "--turn-secret", "turn-secret", *flags)
    assert document_of(process.port)["turn"] is True

    def secret_is(secret: str) -> bool:
        asked = post(process.port, check(alice, prove=True))[1]
        answer = alice.open(asked["question"])
        turn = post(process.port, receive(alice, answer, turn=True))[1]["turn"]
        assert turn["urls"] == urls
        return bool(turn["credential"] == credential_of(turn["username"], secret))

    assert secret_is(SECRET)
    secret_file(tmp_path, OTHER_SECRET)
    process.popen.send_signal(signal.SIGHUP)
    until(lambda: next_log_line(process) == "connectoid-relay: read the files again\n")
    assert secret_is(OTHER_SECRET)
    secret_file(tmp_path, "short")
    process.popen.send_signal(signal.SIGHUP)
    line = next_log_line(process)
    assert line.endswith("; all stays as it was\n")
    assert secret_is(OTHER_SECRET)
    told = Path(f"/proc/{process.popen.pid}/cmdline").read_bytes()
    assert OTHER_SECRET.encode() not in told
    assert OTHER_SECRET not in line
    assert process.stop() == (0, "")
