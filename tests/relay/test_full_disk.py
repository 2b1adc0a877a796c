"""Test full disks, and places that cannot be written to."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import (
    BIG,
    HOUR_S,
    NOTHING,
    OK,
    ROOMY,
    ROOMY_FLAGS,
    SOURCE,
    FakeClock,
    Owner,
    Process,
    assert_fails_with_one_line,
    check,
    messages_of,
    page,
    post,
    relay_on,
    run_relay,
    send,
    skip_without,
    sweep_for,
    trace_in,
    until,
)

from connectoid_relay import SqliteStore


@contextlib.contextmanager
def disk_of(megabytes: int, directory: Path) -> Iterator[Path]:
    """Mount a disk of so many megabytes below a directory, or skip the test."""
    disk = directory / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    skip_without("mount")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 4 MB."""
    with disk_of(4, tmp_path) as disk:
        yield disk


class Cramped(NamedTuple):
    """A place for a database that cannot grow beyond a few megabytes."""

    directory: Path
    # Options for the process.
    options: dict[str, Any]


@pytest.fixture(params=["disk", "limit"])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Cramped:
    """Return a small disk, and in a second run a limit on the size of files."""
    if request.param == "disk":
        return Cramped(request.getfixturevalue("small_disk"), {})
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    return Cramped(tmp_path, {"preexec_fn": limit})


def fill(answer_to: Callable[[dict[str, Any]], tuple[int, Any]], owner: Owner) -> int:
    """Send until there is no more room; return how many messages there was room for."""
    for number in range(1_000):
        status, reply = answer_to(send(owner, BIG))
        if status != 200:
            assert (status, reply["ok"], reply["error"]) == (507, False, "Full")
            assert reply["retry"] >= 1
            return number
        assert reply == OK
    raise AssertionError("32 MB found room where there is none")


@pytest.mark.slow
def test_full_disk_refuses_sends_and_serves_owners_until_messages_expire(
        cramped: Cramped, start: Callable[..., Process], alice: Owner, bob: Owner) -> None:
    process = start("--db", str(cramped.directory / "relay.db"), "--message-ttl", "5", *ROOMY_FLAGS,
                    **cramped.options)
    answer_to = functools.partial(post, process.port)
    assert answer_to(send(alice)) == (200, OK)
    room = fill(answer_to, bob)
    # That is half a megabyte at least.
    assert room >= 16
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]
    assert [text for _, text in page(process.port, bob)] == [BIG] * room
    until(lambda: answer_to(check(bob)) == (200, NOTHING))
    until(lambda: fill(answer_to, bob) >= room // 2)
    assert page(process.port, bob)[0][1] == BIG
    code, log = process.stop()
    assert code == 0
    assert "full" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_full_disk_has_room_for_every_owner_again_and_again(
    small_disk: Path, clock: FakeClock, bob: Owner
) -> None:
    owners = [Owner(number) for number in range(10, 40)]
    with relay_on(small_disk / "relay.db", clock, ROOMY) as relay:
        for _ in range(3):
            for owner in owners:
                assert relay.handle(send(owner), SOURCE) == (200, OK)
            assert fill(lambda request: relay.handle(request, SOURCE), bob) >= 16
            sweep_for(relay, clock, 2)
            for owner in owners:
                assert [text for _, text in messages_of(relay, owner)] == ["QUJD"]
            clock.advance(HOUR_S)
            sweep_for(relay, clock)
            assert trace_in(small_disk, BIG.encode()) == []


def fill_disk(directory: Path) -> Path:
    """Fill a small disk, and return the file that does so."""
    with contextlib.suppress(OSError), (directory / "film").open("wb", buffering=0) as film:
        while film.tell() < 1 << 30:
            film.write(bytes(4_096))
    return directory / "film"


@pytest.mark.slow
def test_disk_filled_by_others_refuses_sends_until_they_make_room(
    small_disk: Path, clock: FakeClock, alice: Owner
) -> None:
    with relay_on(small_disk / "relay.db", clock, ROOMY) as relay:
        assert relay.handle(send(alice), SOURCE) == (200, OK)
        film = fill_disk(small_disk)
        fill(lambda request: relay.handle(request, SOURCE), Owner(3))
        assert [text for _, text in messages_of(relay, alice)] == ["QUJD"]
        film.unlink()
        sweep_for(relay, clock)
        assert relay.handle(send(alice, "YWdhaW4"), SOURCE) == (200, OK)
        assert [text for _, text in messages_of(relay, alice)] == ["QUJD", "YWdhaW4"]


@pytest.mark.slow
def test_disk_filled_by_others_has_room_again_where_messages_have_expired(
    tmp_path: Path, clock: FakeClock, bob: Owner
) -> None:
    # Large enough for more messages than the reserve could hold, each of the largest size: to
    # delete them takes room as well, for they are overwritten.
    with disk_of(100, tmp_path) as disk, relay_on(disk / "relay.db", clock, ROOMY) as relay:
        for _ in range(500):
            assert relay.handle(send(bob, "QUJD" * 8_192), SOURCE) == (200, OK)
        fill_disk(disk)
        fill(lambda request: relay.handle(request, SOURCE), bob)
        clock.advance(HOUR_S + 1)
        sweep_for(relay, clock)
        assert trace_in(disk, b"QUJD" * 100) == []
        assert fill(lambda request: relay.handle(request, SOURCE), bob) >= 250


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_on_a_disk_that_it_filled_serves_owners(
    number: signal.Signals,
    cramped: Cramped,
    start: Callable[..., Process],
    alice: Owner,
    bob: Owner,
) -> None:
    flags = ("--db", str(cramped.directory / "relay.db"), *ROOMY_FLAGS)
    process = start(*flags, **cramped.options)
    assert post(process.port, send(alice)) == (200, OK)
    fill(functools.partial(post, process.port), bob)
    process.stop(number)
    process = start(*flags, **cramped.options)
    assert process.port, process.first_line
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_on_a_disk_that_others_filled_serves_owners(
    number: signal.Signals, small_disk: Path, start: Callable[..., Process], alice: Owner
) -> None:
    process = start("--db", str(small_disk / "relay.db"))
    assert post(process.port, send(alice)) == (200, OK)
    process.stop(number)
    # Only the reserve is left.
    fill_disk(small_disk)
    process = start("--db", str(small_disk / "relay.db"))
    assert process.port, process.first_line
    assert [text for _, text in page(process.port, alice)] == ["QUJD"]


@pytest.mark.slow
def test_first_start_on_a_full_disk_fails_with_one_line(small_disk: Path) -> None:
    fill_disk(small_disk)
    assert_fails_with_one_line(
        run_relay("--port", "0", "--db", "relay.db", cwd=small_disk), "relay.db", "full"
    )


# These numbers are from linux/prctl.h and linux/capability.h.
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def _obey_rights() -> None:
    """Apply the rights of files to root too, in the program that this process becomes."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@pytest.mark.parametrize(("file_mode", "directory_mode"), [
    (0o400, 0o700), (0o000, 0o700), (0o400, 0o500), (0o600, 0o500), (None, 0o500)])
def test_read_only_place_fails_with_one_line(
    file_mode: int | None, directory_mode: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"preexec_fn": _obey_rights} if os.geteuid() == 0 else {}
    directory = tmp_path / "place"
    directory.mkdir()
    path = directory / "relay.db"
    if file_mode is not None:
        SqliteStore(str(path)).close()
        for other in directory.glob("relay.db-*"):
            other.unlink()
        path.chmod(file_mode)
    directory.chmod(directory_mode)
    probe = tmp_path / "probe"
    probe.touch(0o400)
    if subprocess.run(["test", "-w", str(probe)], check=False, **options).returncode == 0:
        pytest.skip("no rights bind whoever runs this")
    assert_fails_with_one_line(
        run_relay("--port", "0", "--db", str(path), cwd=tmp_path, **options), str(path)
    )


def test_read_only_disk_fails_with_one_line(small_disk: Path) -> None:
    path = small_disk / "relay.db"
    SqliteStore(str(path)).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_fails_with_one_line(
        run_relay("--port", "0", "--db", str(path), cwd=small_disk), str(path)
    )


def test_missing_directory_fails_with_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "missing" / "relay.db")
    assert_fails_with_one_line(run_relay("--port", "0", "--db", path, cwd=tmp_path), path)
    assert list(tmp_path.iterdir()) == []


def test_directory_as_database_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "relay.db").mkdir()
    assert_fails_with_one_line(
        run_relay("--port", "0", "--db", "relay.db", cwd=tmp_path), "relay.db"
    )
