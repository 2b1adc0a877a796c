"""Test the key file: what it may say, and what is told of mistakes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    FORBIDDEN,
    KEY,
    NOTHING,
    OK,
    OTHER_KEY,
    SOURCE,
    FakeClock,
    Make,
    Owner,
    Process,
    alices,
    ask,
    check,
    next_log_line,
    post,
    run_relay,
    send,
    texts_of,
    until,
)

from connectoid_relay import (
    MAX_EXT_CHARS,
    MAX_SETTING,
    Access,
    Quota,
    Refusal,
    Relay,
    SettingError,
    SqliteStore,
    read_access,
)

# ---------------------------------------------------------------------------------------
# The key file: what it may say, and what is told of mistakes.
# ---------------------------------------------------------------------------------------

GOOD = f'[keys.good]\nkey = "{KEY}"\n'
AT_LEAST_1 = "must be a whole number"

# The text of the file, the line told, and words of the message.
MISTAKES: dict[str, tuple[str | bytes, int, str]] = {
    "no value": (GOOD + "bytes =\n", 3, "Invalid value"),
    "no TOML": (GOOD + "\nhello, relay\n", 4, "write TOML: [keys.NAME], then key = "),
    "open header": (GOOD + "[keys.bad\n", 3, "write TOML"),
    "open string at the end": (GOOD + '[keys.bad]\nkey = "abc', 4, "write TOML"),
    "table twice": (GOOD + f'[keys.good]\nkey = "{OTHER_KEY}"\n', 3, "twice"),
    "member twice": (GOOD + f'key = "{OTHER_KEY}"\nbytes = 1\n', 3, "overwrite"),
    "key is a number": (
        GOOD + "[keys.bad]\nkey = 12\n",
        4,
        "key must be a string of 1 to 1024 characters",
    ),
    "key is empty": (
        GOOD + '[keys.bad]\nkey = ""\n',
        4,
        "key must be a string of 1 to 1024 characters",
    ),
    "key is too long": (
        GOOD + f'[keys.bad]\nbytes = 1\nkey = "{"k" * (MAX_EXT_CHARS + 1)}"\n',
        5,
        "key must be a string of 1 to 1024 characters",
    ),
    "key is missing": (GOOD + "[keys.bad]\nbytes = 1\n", 3, '[keys.bad] needs a key = "..."'),
    "key is there twice": (
        GOOD + f'[keys.bad]\nbytes = 1\nkey = "{KEY}"\n',
        5,
        "keys.good has the same key",
    ),
    "public has a key": (
        GOOD + f'[public]\nkey = "{OTHER_KEY}"\n',
        4,
        " is unknown; [public] may have requests_per_day, bytes, message_ttl",
    ),
    "send_key is a number": (GOOD + "send_key = 12\n", 3, "send_key must be a string"),
    "send_key is empty": (GOOD + 'send_key = ""\n', 3, "send_key must be a string"),
    "send_key is too long": (
        GOOD + f'send_key = "{"k" * (MAX_EXT_CHARS + 1)}"\n', 3, "send_key must be a string"),
    "send_key is the key": (
        GOOD + f'send_key = "{KEY}"\n', 3, "keys.good has the same key; make another"),
    "send_key of another": (
        GOOD + f'send_key = "s"\n[keys.bad]\nkey = "{OTHER_KEY}"\nsend_key = "s"\n',
        6,
        "keys.good.send_key has the same key; make another",
    ),
    "key is the send_key of another": (
        GOOD + 'send_key = "s"\n[keys.bad]\nkey = "s"\n',
        5,
        "keys.good.send_key has the same key; make another",
    ),
    "public has a send_key": (
        GOOD + '[public]\nsend_key = "s"\n', 4, " is unknown; [public] may have"),
    **{
        f"{member} alone": (GOOD + f"{member} = 1\n", 3, f"{member} needs a send_key = ")
        for member in ("send_requests_per_day", "send_bytes")
    },
    **{
        f"{member} = {value}": (
            GOOD + f'send_key = "s"\n{member} = {value}\n', 4, f"{member} {AT_LEAST_1}")
        for member in ("send_requests_per_day", "send_bytes")
        for value in ("0", "1.0", str(MAX_SETTING + 1))
    },
    "unknown member": (
        GOOD + "byte = 1\n",
        3,
        " is unknown; [keys.good] may have key, requests_per_day, bytes, message_ttl",
    ),
    "member of a longer name": (GOOD + "bytes_ = 1\nbytes = 2\n", 3, " is unknown"),
    "name of a quota inside": (GOOD + 'name = "x"\n', 3, " is unknown"),
    "unknown table": (
        GOOD + "[limits]\nbytes = 1\n",
        3,
        "limits is not a table; there are [keys.NAME] and [public]",
    ),
    "table with a name like public": (
        GOOD + f'[publicity]\nkey = "{OTHER_KEY}"\n',
        3,
        "there are [keys.NAME] and [public]",
    ),
    "member outside": ("bytes = 1\n" + GOOD, 1, "there are [keys.NAME] and [public]"),
    "public is no table": ("public = 1\n" + GOOD, 1, "there are [keys.NAME] and [public]"),
    "keys is no table": ("\nkeys = 1\n", 2, "there are [keys.NAME] and [public]"),
    "keys is an array": (f'[[keys]]\nkey = "{KEY}"\n', 1, "there are [keys.NAME] and [public]"),
    "keys hold no table": (
        GOOD + f'[keys]\nbytes = 1\nbad = "{OTHER_KEY}"\n',
        4,
        "keys.bytes is not a table",
    ),
    "a table too deep": (GOOD + "[keys.good.more]\nbytes = 1\n", 3, " is unknown"),
    "member with a line end": (GOOD + '"by\\ntes" = 1\n', 1, "is unknown"),
    "name with a dot outside": (
        GOOD + f'["keys.bad"]\nkey = "{OTHER_KEY}"\n',
        3,
        "there are [keys.NAME] and [public]",
    ),
    "dotted member": (GOOD + '[keys]\nbad.key = "x"\nbad.bytes = 0\n', 5, AT_LEAST_1),
    "quoted table": (GOOD + '[keys."two words"]\nkey = 1\n', 4, "key must be"),
    "quoted member": (GOOD + '"bytes" = 0\n', 3, AT_LEAST_1),
    "dotted quoted table": (GOOD + "[ keys . 'a.b' ]\nkey = 1\n", 4, "key must be"),
    "commented table": (
        GOOD + "# [keys.bad]\n[keys.bad] # bytes = 0\n# bytes = 0\nbytes = 0\n",
        6,
        AT_LEAST_1,
    ),
    "same member in an earlier table": (
        GOOD + 'bytes = 1\n[public]\nbytes = 2\n[keys.b]\nkey = "b"\nbytes = 0\n',
        8,
        AT_LEAST_1,
    ),
    "Windows line ends": (GOOD.replace("\n", "\r\n") + "bytes = 0\r\n", 3, AT_LEAST_1),
    "not UTF-8": (GOOD.encode() + b'[keys.bad]\nkey = "\xff"\n', 4, "save the file as UTF-8"),
    "not UTF-8 after a BOM": (b"\xef\xbb\xbf#\n\xff\n", 2, "save the file as UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), 1, "save the file as UTF-8"),
    "digits without end": (GOOD + f"bytes = {'9' * 5_000}\n", 3, ""),
    "brackets without end": ("keys = " + "[" * 100_000 + "\n", 1, ""),
    **{
        f"{member} = {value}": (GOOD + f"{member} = {value}\n", 3, f"{member} {AT_LEAST_1}")
        for member in ("requests_per_day", "bytes", "message_ttl")
        for value in (
            "0",
            "-1",
            "1.0",
            "1e3",
            "true",
            "false",
            '"1"',
            "[1]",
            "2027-01-01",
            "{a = 1}",
            "nan",
        )
    },
    **{
        f"{member} over the largest": (
            GOOD + f"{member} = {MAX_SETTING + 1}\n",
            3,
            str(MAX_SETTING),
        )
        for member in ("requests_per_day", "bytes", "message_ttl")
    },
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_key_file_is_told_in_one_line_with_its_place(
    tmp_path: Path, name: str
) -> None:
    text, line, words = MISTAKES[name]
    path = tmp_path / "keys.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingError) as caught:
        read_access(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(("members", "quota"), [
    ("", Quota("keys.good.send_key", 7, 8, 9, True)),
    ("send_requests_per_day = 1\n", Quota("keys.good.send_key", 1, 8, 9, True)),
    (f"send_bytes = {MAX_SETTING}\n", Quota("keys.good.send_key", 7, MAX_SETTING, 9, True)),
    ("send_bytes = 1\nsend_requests_per_day = 2\n", Quota("keys.good.send_key", 2, 1, 9, True)),
])
def test_send_key_has_as_much_as_the_key_unless_the_file_says_so(
    tmp_path: Path, members: str, quota: Quota
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        GOOD + "requests_per_day = 7\nbytes = 8\nmessage_ttl = 9\nsend_key = 's'\n" + members)
    access = read_access(str(path))
    assert access.quota_of("s", sends=True) == quota
    assert access.quota_of(KEY) == access.quota_of(KEY, sends=True) == Quota("keys.good", 7, 8, 9)
    with pytest.raises(Refusal, match="Forbidden"):
        access.quota_of("s")


@pytest.mark.parametrize("flag", ["keys", "denied"])
def test_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, flag: str) -> None:
    for path, why in (
        (tmp_path / "none", "No such file or directory; give a file that the relay may read"),
        (tmp_path, "Is a directory; give a file that the relay may read"),
    ):
        with pytest.raises(SettingError, match=f"^{re.escape(str(path))}: {why}$"):
            read_access(**{flag: str(path)})


@pytest.mark.parametrize("text", [
    GOOD, "\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), f"keys.good.key = '{KEY}'",
    f'keys = {{good = {{key = "{KEY}"}}}}',
    f'["keys"."good"]\n"key" = """{KEY}"""'])
def test_key_file_may_be_any_toml(tmp_path: Path, make: Make, alice: Owner, text: str) -> None:
    (tmp_path / "keys.toml").write_text(text, newline="")
    assert ask(
        make(access=read_access(str(tmp_path / "keys.toml"))), check(alice, ext=KEY), check(alice)
    ) == [NOTHING, FORBIDDEN]


def test_key_file_gives_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'''
        [public]
        message_ttl = 1
        [keys."Alice's shop, 2 x"]
        key = "{KEY}"
        requests_per_day = {MAX_SETTING}
        bytes = 1_000
        message_ttl = 0x10
        [keys.bob]
        key = "{"k" * MAX_EXT_CHARS}"
    ''')
    access = read_access(str(tmp_path / "keys.toml"))
    assert [access.quota_of(ext) for ext in (KEY, "k" * MAX_EXT_CHARS, None, "other")] == [
        Quota("keys.Alice's shop, 2 x", MAX_SETTING, 1_000, 16),
        Quota("keys.bob"),
        *[Quota("public", 0, 0, 1)] * 2,
    ]


def test_largest_settings_work(make: Make, clock: FakeClock, alice: Owner) -> None:
    relay = make(
        access=alices(requests_per_day=MAX_SETTING, bytes=MAX_SETTING, message_ttl_s=MAX_SETTING)
    )
    assert ask(relay, send(alice, ext=KEY)) == [OK]
    clock.advance(10**6)
    relay.sweep()
    assert texts_of(relay, alice, ext=KEY) == ["QUJD"]


@pytest.mark.sockets
@pytest.mark.parametrize(("flag", "text", "line"), [
    ("--keys", GOOD + "bytes = 0\n", 3), ("--deny", "192.0.2.1\n10.0.0.1/8\n", 2)])
def test_process_with_a_mistake_in_a_file_fails_with_one_line(
        tmp_path: Path, flag: str, text: str, line: int) -> None:
    (tmp_path / "bad.txt").write_text(text)
    finished = run_relay(flag, "bad.txt", "--port", "0", "--db", "relay.db", cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith(f"connectoid-relay: bad.txt, line {line}: ")
    assert finished.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_process_reads_keys_again_and_tells_none(
    start: Callable[..., Process], tmp_path: Path, alice: Owner
) -> None:
    (tmp_path / "keys.toml").write_text(GOOD)
    process = start("--db", ":memory:", "--keys", "keys.toml")
    assert post(process.port, check(alice, ext=KEY)) == (200, NOTHING)
    (tmp_path / "keys.toml").write_text(f'[keys.good]\nkey = "{OTHER_KEY}"\n')
    process.popen.send_signal(signal.SIGHUP)
    until(lambda: post(process.port, check(alice, ext=OTHER_KEY))[0] == 200)
    assert post(process.port, check(alice, ext=KEY))[0] == 403
    assert next_log_line(process) == "connectoid-relay: read the files again\n"
    (tmp_path / "keys.toml").write_text(f'[keys.good]\nkey = "{KEY}"\nkey = "{KEY}"\n')
    process.popen.send_signal(signal.SIGHUP)
    line = next_log_line(process)
    assert line.startswith("connectoid-relay: keys.toml, line 3: ")
    assert line.endswith("; all stays as it was\n")
    assert KEY not in line
    assert post(process.port, check(alice, ext=OTHER_KEY)) == (200, NOTHING)
    assert process.stop() == (0, "")


def test_quota_is_known_to_a_relay_that_starts_and_to_one_that_was_idle(
    tmp_path: Path, clock: FakeClock, alice: Owner
) -> None:
    def start_relay() -> Relay:
        access = Access({"sesame": Quota("keys.alice", requests_per_day=3)}, None)
        return Relay(SqliteStore(str(tmp_path / "relay.db")), access=access, clock=clock.clock)

    with contextlib.closing(start_relay()) as first, contextlib.closing(start_relay()) as idle:
        for _ in range(3):
            assert first.handle(check(alice, ext="sesame"), SOURCE) == (200, NOTHING)
        first.sweep()
        # This relay has nothing of its own to tell.
        idle.sweep()
        for relay in (first, idle):
            assert relay.handle(check(alice, ext="sesame"), SOURCE).status == 429
        with contextlib.closing(start_relay()) as new:
            assert new.handle(check(alice, ext="sesame"), SOURCE).status == 429


@pytest.mark.parametrize("name", ["keys", "denied"])
def test_pipe_in_place_of_a_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        SettingError, match=r"^.*/pipe: is a pipe; give a file, which can be read again$"
    ):
        read_access(**{name: str(tmp_path / "pipe")})
