"""The command line in one process: what it says, and its exit codes."""

from __future__ import annotations

import dataclasses
import getpass
import io
import json
import logging
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
from apps import (
    APP_URL,
    NOWHERE,
    make_record,
    store_of,
)
from harness import LONG_DEADLINE_S

import connectoid
import connectoid.cli
from connectoid import OwnAddress, Progress
from connectoid.cli.inbox import ask_user
from connectoid.cli.running import outlook_of
from connectoid.encoding import encode_base64url

# ---------------------------------------------------------------------------------------
# The command line in one process: what it says, its exit codes, and the transfer of files
# over a channel in memory.
# ---------------------------------------------------------------------------------------


def test_cli_without_a_command_or_with_wrong_ones_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and the usage."""
    for argv in (
        [],
        ["dance"],
        ["share"],
        ["send", "Bob"],
        ["open", "x"],
        ["chat", "Bob", "--timeout", "soon"],
        ["receive", "Bob", "--max-bytes", "-1"],
        ["receive", "Bob", "--max-bytes", "much"],
        ["verify", "Bob", "--same", "--different"],
    ):
        with pytest.raises(SystemExit) as caught:
            connectoid.cli.main(argv)
        assert caught.value.code == 2
        assert "usage: connectoid" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, *connectoid.cli.COMMANDS])
def test_cli_helps_with_every_command(
    command: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, on stdout, with every flag."""
    with pytest.raises(SystemExit) as caught:
        connectoid.cli.main([*filter(None, [command]), "--help"])
    assert caught.value.code == 0
    said, errors = capsys.readouterr()
    assert not errors
    for word in (
        connectoid.cli.COMMANDS
        if command is None
        else [f"--{flag}" for flag in connectoid.cli.SHARED]
    ):
        assert word in said


INVITATION = make_record("Bob", "https://relay.example.com/").invitation
BAD_LINKS = {
    "": "This is not an invitation link",
    "https://app.example.com/": "This is not an invitation link",
    "Dear Bob, here is the link": "This is not an invitation link",
    f"{APP_URL}#connectoid={INVITATION[:-5]}": "cut off or damaged",
    f"{APP_URL}#connectoid={INVITATION[:-64]}": "no secret; ask for a new one",
    f"{APP_URL}#connectoid={INVITATION[3:]}": "damaged: its key is damaged",
    f"{APP_URL}#connectoid={INVITATION[:60]}": "This link is damaged",
    f"{APP_URL}#connectoid={INVITATION.replace('.', '')}": "This link is damaged",
    make_record("Bob", "http://127.0.0.1:9/").invitation.replace(
        encode_base64url(b"http://127.0.0.1:9/"), encode_base64url(b"http://example.com/")
    ): "elsewhere it is https",
}


@pytest.mark.parametrize(("link", "says"), BAD_LINKS.items(), ids=BAD_LINKS.values())
def test_cli_says_what_is_wrong_with_a_link(
    link: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one sentence, and no store is made."""
    assert (
        connectoid.cli.main(
            ["open", link, "--name", "Alice", "--yes", "--store", str(tmp_path / "s.db")]
        )
        == 1
    )
    said, errors = capsys.readouterr()
    assert (said, errors.count("\n")) == ("", 1)
    assert says in errors
    assert [*tmp_path.iterdir()] == []


def test_cli_exit_codes_tell_usage_from_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 is for mistakes of the user, 1 for failures; with --json each is a line."""
    monkeypatch.delenv("CONNECTOID_RELAY", raising=False)
    store = ["--json", "--store", str(tmp_path / "s.db")]
    store_of(tmp_path / "s.db", make_record("Bob")).close()
    (tmp_path / "there").touch()
    for code, argv in (
        (0, ["contacts"]),
        (2, ["share", "Carol"]),
        (2, ["share", "Carol", "--relay", "nonsense"]),
        (2, ["share", "Carol", "--relay", "http://example.com/"]),
        (1, ["share", "Bob", "--timeout", "0.1"]),
        (2, ["share", "Bob\x1b[2J", "--relay", NOWHERE]),
        (2, ["verify", "Bob"]),
        (2, ["verify", "Zoe"]),
        (2, ["unshare", "Zoe"]),
        (2, ["chat", "Zoe"]),
        (2, ["send", "Bob", "/nonexistent"]),
        (2, ["receive", "Bob", "--dir", "/nonexistent"]),
        (1, ["chat", "Bob", "--timeout", "0.1"]),
        (1, ["import", "/nonexistent"]),
        (1, ["import", str(tmp_path / "there")]),
        (1, ["contacts", "--passphrase-file", "/nonexistent"]),
    ):
        monkeypatch.setattr("getpass.getpass", lambda _: "x")
        assert connectoid.cli.main([*argv, *store]) == code, argv
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[-1]["event"] == ("contact" if code == 0 else "error"), argv


def test_cli_share_shows_the_link_again_until_somebody_has_opened_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who pressed Ctrl-C, or lost the window, can still send it."""
    argv = ["share", "Bob", "--timeout", "0.01", "--store", str(tmp_path / "s.db")]
    assert connectoid.cli.main([*argv, "--relay", NOWHERE]) == 1
    link = capsys.readouterr().out
    assert connectoid.cli.main(argv) == 1
    assert capsys.readouterr().out == link


def test_cli_says_what_a_relay_said_when_nobody_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a user would look for the fault on the other side."""
    argv = ["share", "Bob", "--relay", NOWHERE, "--timeout", "1", "--store", str(tmp_path / "s.db")]
    assert connectoid.cli.main(argv) == 1
    errors = capsys.readouterr().err
    last = errors.splitlines()[-1]
    assert last.startswith(f"connectoid: {NOWHERE} cannot be reached")
    assert "Bob has not opened the link yet. `connectoid share Bob --store" in last


def test_cli_reads_a_link_from_stdin_and_names_the_contact_that_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All users of a machine can see the arguments in its list of processes."""
    link = connectoid.make_link(APP_URL, make_record("Bob", NOWHERE).invitation)
    for name in ("Alice", "Zoe"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{link}\n"))
        argv = ["open", "-", "--yes", "--name", name, "--timeout", "0.01"]
        assert connectoid.cli.main([*argv, "--store", str(tmp_path / "s.db")]) == 1
        assert "Waiting for Alice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "soon"])
def test_cli_waits_for_a_time_that_there_is(text: str, tmp_path: Path) -> None:
    """No contact is made for a wrong time."""
    with pytest.raises(SystemExit, match="2"):
        connectoid.cli.main(
            ["share", "Bob", f"--timeout={text}", "--store", str(tmp_path / "s.db")]
        )
    assert not (tmp_path / "s.db").exists()


def test_cli_contacts_keep_the_warning_that_a_link_was_opened_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test may have missed the event itself."""
    record = dataclasses.replace(make_record("Bob"), used_to=("A" * 43,))
    store_of(tmp_path / "s.db", record).close()
    assert connectoid.cli.main(["contacts", "--store", str(tmp_path / "s.db")]) == 0
    assert "opened by somebody else too" in capsys.readouterr().out


def test_cli_relays_of_a_flag_take_the_place_of_those_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the help says: the environment has the default."""
    monkeypatch.setenv("CONNECTOID_RELAY", "http://localhost:1/ http://localhost:2/")
    for flags, urls in (([], 2), (["--relay", NOWHERE], 1)):
        connectoid.cli.main(
            ["share", f"Bob {urls}", *flags, "--timeout", "0.01", "--store", str(tmp_path / "s.db")]
        )
        invitation = connectoid.read_link(capsys.readouterr().out.strip())
        assert len(connectoid.parse_address(invitation.address)) == urls


def test_cli_exports_and_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export is readable by its owner alone, overwrites nothing, and asks twice.

    When nobody types, there is no traceback.
    """
    store_of(tmp_path / "a.db", make_record("Bob")).close()
    words = iter(["one", "two", "", "one", "one", "one", "one", "two", "one"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(words))
    out, old, new = str(tmp_path / "out"), str(tmp_path / "a.db"), str(tmp_path / "b.db")
    assert [connectoid.cli.main(["export", out, "--store", old]) for _ in range(4)] == [2, 2, 0, 1]
    assert stat.S_IMODE(os.stat(out).st_mode) == 0o600
    assert [connectoid.cli.main(["import", out, "--store", new, "--json"]) for _ in range(2)] == [
        1,
        0,
    ]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"event": "imported", "count": 1}

    def nobody(_: str) -> str:
        raise EOFError

    capsys.readouterr()
    monkeypatch.setattr("getpass.getpass", nobody)
    assert connectoid.cli.main(["export", out + "2", "--store", old]) == 1
    assert capsys.readouterr().err == "connectoid: Nothing was typed.\n"


def test_cli_exports_and_imports_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passphrase comes from a file; without one, a sentence says so and nothing is shown."""

    def no_terminal(_: str) -> str:
        warnings.warn("echo", getpass.GetPassWarning, stacklevel=2)
        return "seen"

    monkeypatch.setattr("getpass.getpass", no_terminal)
    store_of(tmp_path / "a.db", make_record("Bob")).close()
    out, old, new = str(tmp_path / "out"), str(tmp_path / "a.db"), str(tmp_path / "b.db")
    assert connectoid.cli.main(["export", out, "--store", old]) == 2
    assert capsys.readouterr().err == (
        "connectoid: There is no terminal to type a passphrase on:"
        " use --export-passphrase-file.\n"
    )
    flags = ["--export-passphrase-file", str(tmp_path / "secret")]
    (tmp_path / "secret").write_text("\n")
    assert connectoid.cli.main(["export", out, "--store", old, *flags]) == 2
    (tmp_path / "secret").write_text("correct horse\n")
    assert connectoid.cli.main(["export", out, "--store", old, *flags]) == 0
    assert connectoid.cli.main(["import", out, "--store", new, *flags]) == 0


# ---------------------------------------------------------------------------------------
# States, and what is said of them.
# ---------------------------------------------------------------------------------------

COMPARED = (5, 9, 10, 11, 12, 13, 14)


def compared_store(folder: Path, **changes: Any) -> list[str]:
    """Return the flags of a store with a contact whose emoji can be compared."""
    record = dataclasses.replace(make_record("Bob", NOWHERE), comparison=COMPARED, **changes)
    store_of(folder / "s.db", record).close()
    return ["--store", str(folder / "s.db")]


@pytest.mark.parametrize(
    ("flag", "says", "marks"),
    [
        ("--same", "verified", {"verified": True, "differs": False}),
        ("--different", "does not match: unshare", {"verified": False, "differs": True}),
    ],
)
def test_cli_keeps_what_came_of_comparing(
    flag: str, says: str, marks: dict[str, bool], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A contact that does not match looks like no fresh one, and each mark replaces the other."""
    store = compared_store(tmp_path)
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert capsys.readouterr().out.endswith("\tnot verified\n")
    for before in ("--same", "--different", flag):
        assert connectoid.cli.main(["verify", "Bob", before, *store]) == 0
    command = f"End it: connectoid unshare Bob --store {tmp_path / 's.db'}"
    assert command in capsys.readouterr().err
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert capsys.readouterr().out.endswith(f"\t{says}\n")
    assert connectoid.cli.main(["contacts", "--json", *store]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name] for name in marks} == marks


def test_cli_that_marks_the_emoji_asks_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever gives the mark has compared: it is confirmed, and no emoji are shown."""
    store = compared_store(tmp_path)
    assert connectoid.cli.main(["verify", "Bob", "--same", *store]) == 0
    assert capsys.readouterr() == ("", "Bob is marked as verified.\n")


MOVED = make_record("Bob", "https://new.example.com/").invited
STAYED = make_record("Bob", "https://relay.example.com/").invited


@pytest.mark.parametrize(
    ("pending", "is_moving"), [(MOVED, True), (STAYED, False), (None, False)],
    ids=["moved", "rotated", "answered"])
def test_cli_contacts_show_a_move_until_it_is_answered(
    pending: OwnAddress | None, is_moving: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An address that is replaced in time stays at its relay, and is no move."""
    current = make_record("Bob", "https://relay.example.com/").invited
    store = compared_store(tmp_path, state="paired", current=current, pending=pending)
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert ("shared, move not answered yet" in capsys.readouterr().out) is is_moving
    assert connectoid.cli.main(["contacts", "--json", *store]) == 0
    assert json.loads(capsys.readouterr().out)["moving"] is is_moving


def test_cli_names_the_flags_for_a_private_relay_of_somebody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the warning, and in the error at the end."""
    link = connectoid.make_link(APP_URL, make_record("Bob", NOWHERE).invitation)
    argv = ["open", link, "--name", "Alice", "--yes", "--store", str(tmp_path / "s.db")]
    assert connectoid.cli.main([*argv, "--timeout", "0.5"]) == 1
    said = capsys.readouterr().err
    assert said.count("name it with --relay, or give --allow-private-relays") == 2
    assert not logging.getLogger("connectoid").handlers


class Outlook:
    """A runner that knows how it stands with a contact."""

    def __init__(self, again_at_s: float | None, trouble: str = "") -> None:
        self._progress = Progress("apart", again_at_s, trouble)

    def progress(self, name: str) -> Progress:
        """Return it."""
        return self._progress


def test_cli_says_when_it_tries_again_and_what_the_relay_said() -> None:
    """A clock time, and no rhythm that nobody has counted."""
    at_s = time.mktime((2027, 1, 15, 14, 5, 0, 0, 0, -1))
    later, now = cast(Any, Outlook(at_s, "It is full.")), cast(Any, Outlook(None))
    again = " Trying again at 14:05, or as soon as this network changes."
    assert outlook_of(later, "Bob", "unreachable") == again
    assert outlook_of(later, "Bob", "unsent") == f" It is full.{again}"
    assert outlook_of(now, "Bob", "unreachable") == " Trying again now."
    assert outlook_of(later, "Bob", "flooded") == ""


def test_cli_contacts_warn_no_more_once_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The emoji were the same: whoever else opened the link has got nothing."""
    store = compared_store(tmp_path, verified=True, used_to=("A" * 43,))
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert capsys.readouterr().out == "Bob\tnot opened yet\tverified\n"


@pytest.mark.parametrize(
    ("news", "says"),
    [
        ("renewed", "ask by voice whether that was wanted"),
        ("copied", "two devices say that they are"),
    ],
)
def test_cli_contacts_tell_news_of_a_key_until_the_user_has_compared(
    news: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The event is told once, and may have been missed. An earlier mark does not hide it."""
    store = compared_store(tmp_path, verified=True, key_news=news)
    assert connectoid.cli.main(["verify", "Bob", "--different", *store]) == 0
    capsys.readouterr()
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert says in capsys.readouterr().out
    for mark, told in (((), news), (("--same",), None)):
        assert connectoid.cli.main(["verify", "Bob", *mark, *store]) == 0
        capsys.readouterr()
        assert connectoid.cli.main(["contacts", "--json", *store]) == 0
        assert json.loads(capsys.readouterr().out)["key_news"] == told
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert capsys.readouterr().out == "Bob\tnot opened yet\tverified\n"


def test_cli_says_that_nobody_was_told_of_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No relay has taken the word: the sharing has ended here only."""
    link = connectoid.make_link(APP_URL, make_record("Bob", NOWHERE).invitation)
    store = ["--store", str(tmp_path / "s.db"), "--timeout", "0.1"]
    assert connectoid.cli.main(["open", link, "--name", "Alice", "--yes", *store]) == 1
    capsys.readouterr()
    assert connectoid.cli.main(["unshare", "Alice", *store]) == 1
    said, errors = capsys.readouterr()
    assert said == ""
    assert "You no longer share with Alice. Alice has not been told" in errors
    assert "has ended" not in errors


def test_cli_asks_about_the_whole_name_of_a_relay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a name says whose it is, and a long one may begin like another."""
    url = f"https://relay.example.com.{'a.' * 100}mallory.example/{'relay.example.com/' * 8}"
    link = connectoid.make_link(APP_URL, make_record("Bob", url).invitation)
    monkeypatch.setattr("sys.stdin", TypedAnswer("n\n"))
    argv = ["open", link, "--name", "Alice", "--store", str(tmp_path / "s.db")]
    assert connectoid.cli.main(argv) == 1
    assert f"Connect with Alice, through {url}? [y/N]" in capsys.readouterr().err


def test_cli_opens_nothing_without_a_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can answer where there is no terminal, and Enter alone is a no."""
    link = connectoid.make_link(APP_URL, make_record("Bob", NOWHERE).invitation)
    argv = ["open", link, "--name", "Alice", "--store", str(tmp_path / "s.db")]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert connectoid.cli.main(argv) == 2
    assert f"give --yes to connect with Alice through {NOWHERE}" in capsys.readouterr().err
    for answer in ("", "n", "maybe"):
        monkeypatch.setattr("sys.stdin", TypedAnswer(f"{answer}\n"))
        assert connectoid.cli.main(argv) == 1
        assert "[y/N] Not opened. The link is still good." in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr("sys.stdin", TypedAnswer("y\n"))
    assert connectoid.cli.main([*argv, "--timeout", "0.01"]) == 1
    assert "Alice did not connect within 0.01 s." in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--yes"]])
def test_cli_refuses_the_link_of_another_app_before_it_asks(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody agrees to what cannot be; those of its own app, and of none, are asked about."""
    monkeypatch.setattr("sys.stdin", TypedAnswer("n\n"))
    flags = ["--name", "Alice", "--store", str(tmp_path / "s.db")]
    link = connectoid.make_link(APP_URL, make_record("Bob", app="org.example.chat").invitation)
    assert connectoid.cli.main(["open", link, *flags, *argv]) == 1
    assert capsys.readouterr() == (
        "", "connectoid: This link belongs to another app. Open it there: it is still good.\n")
    assert [*tmp_path.iterdir()] == []
    for app in ("", "connectoid.cli"):
        link = connectoid.make_link(APP_URL, make_record("Bob", app=app).invitation)
        assert connectoid.cli.main(["open", link, *flags]) == 1
        assert "[y/N]" in capsys.readouterr().err


def test_cli_receives_nothing_that_nobody_wants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal nobody can be asked: --yes says so before, and up to how much."""
    argv = ["receive", "Bob", "--dir", str(tmp_path), *compared_store(tmp_path)]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert connectoid.cli.main([*argv, "--max-bytes", "1000000"]) == 2
    assert capsys.readouterr().err == (
        "connectoid: Not a terminal: give --yes to receive whatever Bob sends,"
        " up to 1,000,000 bytes.\n")
    assert connectoid.cli.main([*argv, "--yes", "--timeout", "0.01"]) == 1
    assert "Bob has not opened the link yet." in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "answer"), [
    ("y\n", (True, False)), ("YES\n", (True, False)), ("all\n", (True, True)),
    ("\n", (False, False)), ("n\n", (False, False)), ("", (False, False)),
])
def test_cli_takes_only_a_yes_for_a_yes(
    typed: str, answer: tuple[bool, bool], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Enter alone is a no, and so is the end of the input."""
    monkeypatch.setattr("sys.stdin", TypedAnswer(typed))
    assert ask_user("Receive? ") == answer
    assert capsys.readouterr() == ("", "Receive? ")


class TypedAnswer(io.StringIO):
    """What somebody types at a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_cli_makes_no_store_where_it_has_nothing_to_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt name is told, and leaves neither file nor folder."""
    path = tmp_path / "nope" / "s.db"
    cases: list[tuple[int, list[str], str]] = [
        (0, ["contacts"], f"No contacts in {path}."),
        (2, ["verify", "Bob"], f"There is no contact 'Bob' in {path}."),
        (2, ["unshare", "Bob"], f"There is no store {path}."),
        (2, ["chat", "Bob"], f"There is no store {path}."),
        (2, ["export", "x"], f"There is no store {path}."),
    ]
    for code, argv, says in cases:
        assert connectoid.cli.main([*argv, "--store", str(path)]) == code
        assert says in capsys.readouterr().err
        assert not path.parent.exists()


def test_cli_names_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In words, without the number of an error."""
    argv = ["import", "/nonexistent", "--store", str(tmp_path / "s.db")]
    assert connectoid.cli.main(argv) == 1
    assert capsys.readouterr().err == "connectoid: /nonexistent: No such file or directory\n"


def test_cli_move_needs_relays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the flag or of the environment."""
    monkeypatch.delenv("CONNECTOID_RELAY", raising=False)
    assert connectoid.cli.main(["move", "Bob", *compared_store(tmp_path)]) == 2
    assert "No relay: give --relay URL" in capsys.readouterr().err


def test_cli_emoji_fit_into_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four on a line and three on the next, with the longest names that there are."""
    assert connectoid.cli.main(["verify", "Bob", *compared_store(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("   ") + 1 for line in lines] == [4, 3]


@pytest.mark.parametrize("argv", [["contacts", "--json"], ["contacts"], ["--help"]])
def test_cli_is_silent_if_its_reader_has_gone(argv: list[str], tmp_path: Path) -> None:
    """As `head` goes when it has read enough: no traceback, and no word of a broken pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "connectoid", *argv],
            env={**os.environ, "CONNECTOID_STORE": compared_store(tmp_path)[1]},
            stdout=writing, stderr=subprocess.PIPE, check=False, timeout=LONG_DEADLINE_S)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
