"""What systems do differently, each told which one it is."""

from __future__ import annotations

import io
import queue
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

import connectoid.cli
from connectoid.operating_system import (
    MAX_PATH_CHARS,
    data_file,
    long_path,
    next_of,
    result_of,
    speak_utf8,
)


def test_long_path_of_windows_gets_its_mark() -> None:
    most = "C:\\" + "f" * (MAX_PATH_CHARS - 3)
    assert [long_path(path, is_windows=True) for path in (most[:-1], most, most + "f")] == [
        most[:-1], most, f"\\\\?\\{most}f"]
    share = "\\\\host\\share\\" + "f" * MAX_PATH_CHARS
    assert long_path(share, is_windows=True) == "\\\\?\\UNC\\host\\share\\" + "f" * MAX_PATH_CHARS
    marked = f"\\\\?\\{most}f"
    assert long_path(marked, is_windows=True) == marked
    assert long_path("/" + "f" * 1_000, is_windows=False) == "/" + "f" * 1_000


@pytest.mark.parametrize(("environment", "is_windows", "path"), [
    ({"HOME": "/home/alice"}, False, "/home/alice/.local/share/a/b"),
    ({"HOME": "/home/alice", "XDG_DATA_HOME": "/data"}, False, "/data/a/b"),
    ({"HOME": "/home/alice", "XDG_DATA_HOME": "data"}, False, "/home/alice/.local/share/a/b"),
    ({"HOME": ""}, False, ""),
    ({"HOME": "~"}, False, ""),
    ({"LOCALAPPDATA": "/C/Users/Alice"}, True, "/C/Users/Alice/a/b"),
    ({"LOCALAPPDATA": ""}, True, ""),
    ({}, True, ""),
])
def test_data_of_a_user_are_at_home_or_nowhere(
        environment: dict[str, str], is_windows: bool, path: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert data_file("a", "b", is_windows=is_windows) == path


def test_command_without_a_home_makes_no_folder_of_that_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert connectoid.cli.main(["contacts", "--store", ""]) == 2
    assert "This user has no home: name a store with --store." in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("is_windows", "octets"), [
    (False, b"Gr\xfc\xdfe \\U0001f511"), (True, "Grüße 🔑".encode()),
])
def test_output_fails_at_no_character(is_windows: bool, octets: bytes) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="latin-1")
    speak_utf8(stream, None, io.StringIO(), is_windows=is_windows)
    stream.write("Grüße 🔑")
    stream.flush()
    assert written.getvalue() == octets


@pytest.mark.parametrize("is_windows", [False, True])
def test_waits_end_with_what_they_wait_for_or_their_time(is_windows: bool) -> None:
    future: Future[int] = Future()
    came: queue.Queue[int] = queue.Queue()

    def come() -> None:
        future.set_result(1)
        came.put(2)

    with pytest.raises(TimeoutError):
        result_of(future, 0.01, is_windows=is_windows)
    with pytest.raises(queue.Empty):
        next_of(came, 0.3, is_windows=is_windows)
    later = threading.Timer(0.3, come)
    later.start()
    try:
        assert result_of(future, None, is_windows=is_windows) == 1
        assert next_of(came, None, is_windows=is_windows) == 2
    finally:
        later.join()
    failed: Future[int] = Future()
    failed.set_exception(TimeoutError("its own"))
    with pytest.raises(TimeoutError, match="its own"):
        result_of(failed, None, is_windows=is_windows)
