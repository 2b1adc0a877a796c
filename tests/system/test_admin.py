"""Test connectoid-admin: delete, stats, the files that it leaves alone, the command line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from admin_harness import (
    ADMIN,
    TRIGGER,
    VERSIONS,
    admin,
    closed_port,
    content,
    execute,
    found,
    in_another_process,
    make_file,
    subject,
)
from harness import (
    LONG_DEADLINE_S,
    NOTHING,
    OK,
    ROOT,
    SOURCE,
    FakeClock,
    Owner,
    Process,
    check,
    post,
    send,
    serving,
)

from connectoid_admin import (
    Finding,
    back_up,
    build_admin_parser,
    check_version,
    find_all,
    find_subject,
    main,
    parse_metrics,
    read_environment,
    restore,
    stored_in,
)
from connectoid_relay import (
    METRICS,
    SCHEMA,
    SECOND_US,
    DatabaseFile,
    Limits,
    Message,
    Quota,
    Relay,
    Stored,
    __version__,
    render_metrics,
    samples_of,
)


def test_delete_beside_a_relay_takes_all_of_a_mailbox_and_nothing_else(
    path: str, beside: Relay, alice: Owner, bob: Owner, clock: FakeClock
) -> None:
    assert admin("delete", "--db", path, alice.pub) == (
        0,
        "deleted: 2 messages, 1 questions, 1 places of proven mailboxes\n",
        "",
    )
    assert beside.stored() == Stored(1, 800, 0)
    assert beside.handle(check(alice), SOURCE) == (200, NOTHING)
    status, reply = beside.handle(check(bob), SOURCE)
    assert isinstance(reply, dict)
    assert (status, reply["found"]) == (200, True)
    # Its bytes belong to nobody any more: the quota of 10,000 is free again.
    quota = Quota("keys.alice", bytes=10_000)
    beside.store.put(
        Message(alice.box, "A" * 10_000, b"s" * 16, SECOND_US, quota), Limits(), clock.wall_us
    )
    assert "QUJD" not in Path(path).read_bytes().decode("latin-1")
    clock.advance(3_600)
    while beside.sweep():
        pass
    assert beside.stored() == Stored(0, 0, 0)


def test_delete_of_a_mailbox_that_has_nothing_is_done(path: str, beside: Relay) -> None:
    assert admin("delete", "--db", path, Owner(3).pub) == (
        0,
        "deleted: 0 messages, 0 questions, 0 places of proven mailboxes\n",
        "",
    )
    assert beside.stored() == Stored(3, 2 * 512 + 800, 1)


@pytest.mark.parametrize("pub", ["", "A", "A" * 66, Owner(1).pub[:-1]])
def test_delete_refuses_what_is_no_mailbox(pub: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["delete", pub])
    assert caught.value.code == 2
    assert "is not a mailbox: its pub has 66 characters" in capsys.readouterr().err


@pytest.mark.slow
def test_deletes_beside_a_busy_relay_keep_its_sums_right(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    process = start(
        "--db",
        "relay.db",
        "--rate",
        "0",
        "--max-box-messages",
        "100000",
        "--max-box-bytes",
        "1000000000",
    )
    stop = threading.Event()

    def write(number: int) -> None:
        while not stop.is_set():
            assert post(process.port, send(Owner(number + 1), "A" * 600)) == (200, OK)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(12):
            code, _, errors = admin(
                "delete", "--db", "relay.db", Owner(number % 3 + 1).pub, cwd=tmp_path
            )
            assert (code, errors) == (0, "")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert process.stop() == (0, "")
    findings = list(find_all(subject(str(tmp_path / "relay.db"))))
    assert [
        finding for finding in findings if finding.what == "file" and finding.level != "OK"
    ] == []


def test_stats_count_what_is_stored_and_tell_no_keys(
    path: str, beside: Relay, alice: Owner, bob: Owner, clock: FakeClock
) -> None:
    output = in_another_process(
        "import json, sys; from connectoid_admin import stored_in\n"
        "print(json.dumps(stored_in(sys.argv[1], int(sys.argv[2]))))",
        path,
        str(clock.wall_us),
    )
    stats = json.loads(output)
    assert {
        name: stats[name]
        for name in stats
        if name not in ("file_bytes", "wal_bytes", "reserve_bytes")
    } == {
        "path": path,
        "schema": len(SCHEMA),
        "messages": 3,
        "message_bytes": 2 * 512 + 800,
        "mailboxes_with_messages": 2,
        "messages_in_the_fullest_mailbox": 2,
        "proven_mailboxes": 1,
        "open_questions": 1,
        "oldest_message_age_s": 30,
        "median_message_age_s": 20,
        "newest_message_age_s": 10,
        "quotas": [{"name": "keys.alice", "requests_today": 2, "bytes": 8}],
    }
    assert alice.pub not in output
    assert bob.pub not in output
    assert "secret" not in output


def test_stats_have_rates_and_refusals_of_the_relay(path: str, beside: Relay, alice: Owner) -> None:
    beside.handle({"action": "send"}, SOURCE)
    with serving(beside) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        code, output, errors = admin("stats", "--db", path, "--json", "--url", url)
        assert (code, errors) == (0, "")
        relay = json.loads(output)["relay"]
        assert relay["version"] == __version__
        assert relay["healthy"] == 1
        # The refused one counts too.
        assert relay["requests"]["send"]["total"] == 4
        assert relay["refusals"]["Bad request"]["total"] == 1
        assert {
            f"connectoid_{name}_total" for name in relay if f"connectoid_{name}_total" in METRICS
        } == {name for name, metric in METRICS.items() if metric.type == "counter"}
        code, table, _ = admin("stats", "--db", path, "--url", url, "--over", "1")
        assert code == 0
        assert re.search(r"(?m)^file messages +3$", table)
        assert re.search(r"(?m)^relay requests send +4 \([\d.]+ a minute, now 0\)$", table)
        assert re.search(r"(?m)^relay refusals Bad request +1 ", table)
        assert re.search(r"(?m)^file quotas keys.alice bytes +8$", table)
        # The table leaves out what never happened.
        assert "Too often" not in table
        assert alice.pub not in output + table


def test_stats_without_a_relay_are_those_of_the_file(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    code, output, errors = admin(
        "stats", "--db", path, "--json", "--url", f"http://127.0.0.1:{closed_port()}/"
    )
    assert code == 0
    assert json.loads(output)["relay"] is None
    assert json.loads(output)["file"]["messages"] == 4
    assert "does not answer: Connection refused" in errors


def test_metrics_are_parsed_as_they_are_rendered(beside: Relay) -> None:
    samples = samples_of(beside)
    assert parse_metrics(render_metrics(samples)) == samples


@pytest.mark.parametrize("command", ["stats", "backup", "delete"])
def test_a_relay_that_is_stuck_in_a_commit_is_told(tmp_path: Path, path: str, command: str) -> None:
    make_file(Path(path), len(SCHEMA))
    words = {"backup": [str(tmp_path / "backup.db")], "delete": [Owner(1).pub], "stats": []}[
        command
    ]
    with open(path + "-lock", "w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        assert admin(command, "--db", path, *words) == (
            1,
            "",
            f"connectoid-admin: {path} is held by another process\n",
        )


@pytest.mark.parametrize("command", ["stats", "backup", "delete", "check"])
def test_no_command_makes_a_file_where_there_is_none(tmp_path: Path, command: str) -> None:
    words = {"backup": ["backup.db"], "delete": [Owner(1).pub]}.get(command, [])
    code, output, errors = admin(command, "--db", "wrong.db", "--flags", "", *words, cwd=tmp_path)
    assert code == 1
    assert "wrong.db: No such file or directory; name the relay's file with --db" in output + errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["stats", "backup", "delete"])
def test_file_of_another_program_is_left_alone(tmp_path: Path, command: str) -> None:
    execute(tmp_path / "other.db", "CREATE TABLE t (a)")
    octets = (tmp_path / "other.db").read_bytes()
    words = {"backup": ["backup.db"], "delete": [Owner(1).pub]}.get(command, [])
    code, _, errors = admin(command, "--db", "other.db", "--flags", "", *words, cwd=tmp_path)
    assert (code, errors) == (
        1,
        "connectoid-admin: other.db belongs to another program; choose another file with --db\n",
    )
    assert (tmp_path / "other.db").read_bytes() == octets
    assert os.listdir(tmp_path) == ["other.db"]


@pytest.mark.parametrize("command", ["stats", "backup", "delete"])
def test_file_with_a_trigger_is_left_alone(tmp_path: Path, path: str, command: str) -> None:
    make_file(Path(path), len(SCHEMA))
    execute(Path(path), TRIGGER)
    before = content(Path(path))
    words = {"backup": ["backup.db"], "delete": [Owner(1).pub]}.get(command, [])
    assert admin(command, "--db", path, *words, cwd=tmp_path) == (
        1,
        "",
        f"connectoid-admin: {path} is not as a relay makes it: see its trigger thief\n",
    )
    assert content(Path(path)) == before
    assert not (tmp_path / "backup.db").exists()
    assert found(subject(path), "file") == [
        Finding("FAIL", "file", f"{path} is not as a relay makes it: see its trigger thief")
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_file_of_each_schema_is_as_a_relay_makes_it_and_may_be_analyzed(
    path: str, version: int
) -> None:
    make_file(Path(path), version)
    execute(Path(path), "ANALYZE")
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert check_version(DatabaseFile(path), db) == version


@pytest.mark.parametrize("rest", ["-wal", "-journal", "-shm"])
def test_no_link_beside_the_file_is_followed(tmp_path: Path, path: str, rest: str) -> None:
    make_file(Path(path), len(SCHEMA))
    (tmp_path / "precious").write_text("precious")
    Path(path + rest).symlink_to(tmp_path / "precious")
    code, _, errors = admin("delete", "--db", path, Owner(1).pub)
    assert (code, errors) == (
        1,
        f"connectoid-admin: {path} cannot be opened; choose another file with --db"
        " (unable to open database file)\n",
    )
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.fixture
def as_another_user() -> Iterator[None]:
    """Become a user that may not read a test's files."""
    if os.geteuid():
        pytest.skip("needs root")
    os.seteuid(65_534)
    yield
    os.seteuid(0)


def test_user_that_may_not_read_the_file_or_the_flags_is_told_to_use_sudo(
    path: str, as_another_user: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--db", path], ["--env", f"{path}.env"]):
        assert main(["stats", *words]) == 1
        assert re.fullmatch(
            rf"connectoid-admin: {path}(.env)?: Permission denied; use sudo[^\n]*\n",
            capsys.readouterr().err,
        )


@pytest.mark.parametrize("words", [["--flags", "--rate many"], ["--env", "nowhere.env"]])
def test_nothing_but_check_goes_on_with_other_flags_than_the_relays(
    tmp_path: Path, words: list[str]
) -> None:
    make_file(tmp_path / "connectoid.db", len(SCHEMA))
    code, output, errors = admin("backup", *words, "backup.db", cwd=tmp_path)
    assert (code, output, errors.count("\n")) == (1, "", 1)
    assert not (tmp_path / "backup.db").exists()
    assert admin("backup", "--db", "connectoid.db", *words, "backup.db", cwd=tmp_path)[0] == 0


def test_lock_file_is_no_link_to_follow(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    (tmp_path / "relay.db-lock").symlink_to(tmp_path / "precious")
    code, _, errors = admin("delete", "--db", path, Owner(1).pub)
    assert code == 1
    assert f"{path}-lock: Too many levels of symbolic links" in errors
    assert not (tmp_path / "precious").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_root_makes_belongs_to_the_relays_user(tmp_path: Path, path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    back_up(path, str(tmp_path / "backup.db"))
    for name in os.listdir(tmp_path):
        os.unlink(tmp_path / name) if name == "relay.db-lock" else None
    os.chown(path, 1234, 1234)
    stored_in(path)
    restore(str(tmp_path / "backup.db"), path)
    owners = {
        name: os.stat(tmp_path / name).st_uid
        for name in os.listdir(tmp_path)
        if name.startswith("relay.db")
    }
    assert set(owners) >= {"relay.db", "relay.db-lock"}
    assert set(owners.values()) == {1234}


# ---------------------------------------------------------------------------------------
# Check.
# ---------------------------------------------------------------------------------------


def test_environment_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "relay.env"
    for text, variables in (
        ("FLAGS=--port 80\n", {"FLAGS": "--port 80"}),
        ('FLAGS="--port 80"\n', {"FLAGS": "--port 80"}),
        ("# FLAGS=1\n;FLAGS=1\nno line of a variable\nOTHER=2\n", {"OTHER": "2"}),
        ("FLAGS=\n", {"FLAGS": ""}),
        ("FLAGS=--name 'My relay' --udp", {"FLAGS": "--name 'My relay' --udp"}),
        ("FLAGS=--port 80 \\\n  --udp\nFLAGS=--stun", {"FLAGS": "--stun"}),
        ("FLAGS=--port 80 \\\n  --udp\n", {"FLAGS": "--port 80   --udp"}),
    ):
        file.write_text(text)
        assert read_environment(str(file)) == variables


@pytest.mark.parametrize(
    "text",
    [
        "FLAGS=--db mine.db --port 80 --name 'My relay' --udp",
        'CONNECTOID_DB=mine.db\nCONNECTOID_PORT=80\nCONNECTOID_NAME="My relay"\nCONNECTOID_UDP=1',
        "FLAGS=--db mine.db --port 80 --udp\nCONNECTOID_PORT=81\nCONNECTOID_NAME=My relay",
    ])
def test_flags_are_those_of_the_environment_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "relay.env"
    file.write_text(text)
    words = ["stats", "--env", str(file)]
    flags = find_subject(build_admin_parser().parse_args(words)).flags
    assert (flags.db, flags.port, flags.name, flags.udp) == ("mine.db", 80, "My relay", True)


def test_wrong_variable_is_told_by_its_name(tmp_path: Path) -> None:
    code, output, _ = admin("check", cwd=tmp_path, CONNECTOID_RATE="many")
    assert code == 1
    assert "flags: the environment and the defaults: variable CONNECTOID_RATE: 'many'" in output


def test_database_is_the_one_of_the_relays_flags_or_of_its_folder(tmp_path: Path) -> None:
    make_file(tmp_path / "mine.db", len(SCHEMA))
    (tmp_path / "relay.env").write_text(
        f"FLAGS=--db {tmp_path / 'mine.db'} --port {closed_port()}\n"
    )
    code, output, _ = admin("stats", "--env", str(tmp_path / "relay.env"))
    assert code == 0
    assert str(tmp_path / "mine.db") in output
    make_file(tmp_path / "connectoid.db", len(SCHEMA))
    code, output, _ = admin(
        "stats", "--flags", f"--port {closed_port()}", STATE_DIRECTORY=str(tmp_path)
    )
    assert code == 0
    assert str(tmp_path / "connectoid.db") in output


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["backup"],
        ["stats", "--over", "x"],
        *(
            ["check", "--url", url]
            for url in (
                "relay",
                "ftp://relay/",
                "http://",
                "http://[/",
                "http://relay:0/",
                "http://relay:99999/",
                "http://relay:x/",
                "http://\xfc.example/",
                "http://relay/\xfc",
                "https://me:secret@relay/",
                "http://relay/?x",
                "http://re lay/",
            )
        ),
    ],
)
def test_wrong_usage_is_one_line_and_2(words: list[str]) -> None:
    code, output, errors = admin(*words)
    assert (code, output) == (2, "")
    assert re.fullmatch(r"connectoid_admin\.py[^\n]*: error: [^\n]+\n", errors)


def test_every_command_has_its_help() -> None:
    code, output, _ = admin("--help")
    assert code == 0
    for command in ("check", "health", "backup", "restore", "stats", "delete"):
        assert f"    {command} " in output
        assert admin(command, "--help")[0] == 0
    assert admin("--version") == (0, f"connectoid admin {__version__}\n", "")


def test_output_that_nobody_reads_to_the_end_is_no_traceback(path: str) -> None:
    make_file(Path(path), len(SCHEMA))
    process = subprocess.Popen(
        [*ADMIN, "check", "--db", path, "--flags", f"--port {closed_port()}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait(20)
    process.stderr.close()


# ---------------------------------------------------------------------------------------
# Monitoring: the rules by promtool, then all of it by a real Prometheus.
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["connectoid_admin.py", "connectoid_relay.py"])
def test_help_whose_reader_has_gone_ends_quietly(program: str) -> None:
    """As `head` goes when it has read enough: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, ROOT / program, "--help"], stdout=writing, stderr=subprocess.PIPE,
            check=False, timeout=LONG_DEADLINE_S)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
