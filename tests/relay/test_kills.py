"""Test that a relay that is killed loses nothing and starts again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from harness import (
    DEADLINE_S,
    OK,
    PROGRAM,
    ROOMY_FLAGS,
    ROOT,
    START_US,
    Owner,
    Process,
    assert_increasing,
    page,
    post,
    send,
    until,
)

from connectoid_relay import Limits, Message, SqliteStore

# ---------------------------------------------------------------------------------------
# Faults of the store: kills, full and read-only disks, damaged and foreign files, clocks
# that step, several relays on one file, and what stays in the files when it should not.
# ---------------------------------------------------------------------------------------


def send_until_killed(
    port: int, owner: Owner, texts: Iterator[str], counted: queue.SimpleQueue[str]
) -> list[str]:
    """Send one text after the other; return those that were acknowledged."""
    acknowledged: list[str] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        for text in texts:
            connection.request("POST", "/", json.dumps(send(owner, text)))
            reply = json.loads(connection.getresponse().read())
            assert reply == OK
            acknowledged.append(text)
            counted.put(text)
    return acknowledged


def texts_of(name: str) -> Iterator[str]:
    """Return numbered texts of 32 KB: the WAL is emptied now and then, and kills hit that too."""
    return (f"{name}n{number:05d}" + "A" * 32_000 for number in itertools.count())


def load_and_kill(
    process: Process, owners: Sequence[Owner], name: str, kill_after: int
) -> list[list[str]]:
    """Kill a relay after so many messages of six senders; return what each got acknowledged."""
    counted: queue.SimpleQueue[str] = queue.SimpleQueue()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        senders = [pool.submit(send_until_killed, process.port, owners[sender % len(owners)],
                               texts_of(f"{name}s{sender}"), counted) for sender in range(6)]
        for _ in range(kill_after):
            counted.get(timeout=DEADLINE_S)
        process.popen.kill()
        return [sender.result() for sender in senders]


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["full", "normal"])
def test_kill_under_load_loses_no_acknowledged_message(
    sync: str, start: Callable[..., Process], tmp_path: Path, alice: Owner, bob: Owner
) -> None:
    owners, chance = (alice, bob), random.Random(sync)
    flags = ("--sync", sync, "--db", "relay.db", *ROOMY_FLAGS)
    # The texts of each sender in each round, for each owner.
    acknowledged: list[list[list[str]]] = [[], []]
    before: list[list[tuple[int, str]]] = [[], []]
    for turn in range(5):
        lists = load_and_kill(start(*flags), owners, f"r{turn}", chance.randrange(20, 400))
        for number in range(2):
            acknowledged[number] += lists[number::2]
        process = start(*flags)
        for number, owner in enumerate(owners):
            found = page(process.port, owner)
            assert_increasing(found)
            assert found[:len(before[number])] == before[number]
            for texts in acknowledged[number]:
                kept = set(texts)
                # Each is there, once, in its order.
                assert [text for _, text in found if text in kept] == texts
            before[number] = found
        assert process.stop() == (0, "")
    store = SqliteStore(str(tmp_path / "relay.db"))
    assert store.messages(alice.box, 0, 1, 0) == before[0][:1]
    store.close()


def test_file_whose_checkpoint_was_cut_off_opens_with_all_messages(
    tmp_path: Path, bob: Owner
) -> None:
    whole, torn = tmp_path / "whole.db", tmp_path / "torn.db"
    store = SqliteStore(str(whole))
    for _ in range(30):
        store.put(Message(bob.box, "A" * 32_000, b"source", 10**9), Limits(), START_US)
    before, wal = whole.read_bytes(), (tmp_path / "whole.db-wal").read_bytes()
    store.close()
    after = whole.read_bytes()
    assert len(before) < len(after)
    # The first page has got there, which tells of many more; the others are in the WAL alone.
    torn.write_bytes(after[:4_096] + before[4_096:])
    (tmp_path / "torn.db-wal").write_bytes(wal)
    store = SqliteStore(str(torn))
    # One reply brings half a MiB of them.
    assert len(store.messages(bob.box, 0, 100, START_US)) == 16
    assert store.look(bob.box, START_US + 28, START_US).found
    store.close()


# Kills a fork at every call that opening a new store makes, and opens the file again.
KILL_AT_EVERY_CALL = """
    import os, pathlib, signal, sys
    from connectoid_relay import Limits, Message, SqliteStore

    def die_at(moment):
        left = [moment]
        def count(frame, event, argument):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    for moment in range(1, 100_000):
        child = os.fork()
        if not child:
            sys.setprofile(die_at(moment))
            SqliteStore("relay.db")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        store = SqliteStore("relay.db")
        at = store.put(Message(b"box", "QUJD", b"source", 10**9), Limits(), 10**15)
        assert store.messages(b"box", 0, 10, 10**15) == [(at, "QUJD")]
        store.close()
        for path in pathlib.Path().iterdir():
            path.unlink()
        if not killed:
            break
    print(moment - 1)
"""


@pytest.mark.slow
def test_kill_at_every_call_of_the_first_start_leaves_a_file_that_opens(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_AT_EVERY_CALL)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    # There are more than 50 such calls; the making of each table is among them.
    assert int(finished.stdout) > 50


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "-lock", "-wal", "-shm", "-reserve"])
def test_kill_when_a_file_appears_lets_the_next_start_work(
    suffix: str, start: Callable[..., Process], tmp_path: Path, alice: Owner
) -> None:
    command = [sys.executable, str(ROOT / PROGRAM), "--port", "0", "--db", "relay.db"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        until((tmp_path / f"relay.db{suffix}").exists)
        first.kill()
    process = start("--db", "relay.db")
    assert process.port, process.first_line
    assert post(process.port, send(alice)) == (200, OK)
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]
    assert process.stop() == (0, "")
