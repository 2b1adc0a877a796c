"""Test that expired messages are gone from the files, and that the files are private."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    HOUR_S,
    NOTHING,
    OK,
    ROOMY,
    SOURCE,
    START_US,
    FakeClock,
    Owner,
    Process,
    check,
    messages_of,
    post,
    relay_on,
    send,
    sweep_for,
    trace_in,
    until,
)

from connectoid_relay import SqliteStore


def test_expired_messages_are_gone_from_the_files(
    tmp_path: Path, clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    with relay_on(tmp_path / "relay.db", clock, ROOMY) as relay:
        for number in range(300):
            relay.handle(send(alice, f"SECRET{number:04d}" + "QUJD" * (number % 7 * 500)), SOURCE)
        relay.handle(send(bob, "SECRETAA"), SOURCE)
        assert messages_of(relay, alice)
        _, reply = relay.handle(check(alice), SOURCE)
        assert isinstance(reply, dict)
        question = reply["question"].encode()
        assert trace_in(tmp_path, b"SECRET")
        assert trace_in(tmp_path, question)
        clock.advance(1_800)
        relay.handle(send(alice, "LATERAAA"), SOURCE)
        clock.advance(1_801)
        sweep_for(relay, clock)
        assert {
            octets: trace_in(tmp_path, octets) for octets in (b"SECRET", question, bob.box)
        } == {b"SECRET": [], question: [], bob.box: []}
        assert trace_in(tmp_path, b"LATERAAA")
        # The owner has been here, so the row stays.
        assert trace_in(tmp_path, alice.box)
        clock.advance(31 * 86_400)
        sweep_for(relay, clock)
        assert {octets: trace_in(tmp_path, octets) for octets in (b"LATERAAA", alice.box)} == {
            b"LATERAAA": [], alice.box: []}


@pytest.mark.slow
def test_expired_messages_are_gone_once_a_reader_is_out_of_the_way(tmp_path: Path, clock: FakeClock,
                                                                   alice: Owner) -> None:
    path = tmp_path / "relay.db"
    with (
        relay_on(path, clock) as relay,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader,
    ):
        relay.handle(send(alice, "SECRETAA"), SOURCE)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)
        clock.advance(HOUR_S + 1)
        relay.sweep()
        clock.advance(30)
        relay.sweep()
        # The reader still needs it.
        assert trace_in(tmp_path, b"SECRETAA")
        reader.execute("ROLLBACK")
        sweep_for(relay, clock)
        assert trace_in(tmp_path, b"SECRETAA") == []


@pytest.mark.parametrize("swept", [True, False])
def test_expired_messages_are_gone_after_a_crash(*, swept: bool, tmp_path: Path, clock: FakeClock,
                                                 alice: Owner) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    with relay_on(before / "relay.db", clock) as relay:
        relay.handle(send(alice, "SECRETAA"), SOURCE)
        assert trace_in(before, b"SECRETAA")
        clock.advance(HOUR_S + 1)
        if swept:
            relay.sweep()
        # This is what a crash leaves.
        shutil.copytree(before, after)
    with relay_on(after / "relay.db", clock) as relay:
        sweep_for(relay, clock)
        assert trace_in(after, b"SECRETAA") == []


@pytest.mark.slow
def test_expired_messages_are_gone_from_the_files_of_a_running_relay(
    start: Callable[..., Process], tmp_path: Path, alice: Owner
) -> None:
    process = start("--db", "relay.db", "--message-ttl", "2")
    assert post(process.port, send(alice, "SECRETAA")) == (200, OK)
    assert trace_in(tmp_path, b"SECRETAA")
    until(lambda: trace_in(tmp_path, b"SECRETAA") == [])
    assert post(process.port, check(alice)) == (200, NOTHING)
    assert process.stop() == (0, "")


def test_files_of_the_store_are_for_its_user_only(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        store = SqliteStore(str(tmp_path / "relay.db"))
        store.put_question(b"box", ("question", b"hash"), 10, START_US)
        modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(mask)
    assert set(modes.values()) == {0}
    assert {"relay.db", "relay.db-reserve"} < modes.keys()
