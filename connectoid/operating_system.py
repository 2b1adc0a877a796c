"""What Windows, macOS and Linux do differently: locks, links, long paths, text, Ctrl-C.

Besides, `clock` and `way_out` know what a system has or lacks.
"""

from __future__ import annotations

import io
import ntpath
import os
import queue
import sys
import time
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

IS_WINDOWS = sys.platform == "win32"

# With 0600 a file is its owner's alone. Windows gives it the rights of its folder, and those that
# are in a user's profile are that user's.
PRIVATE = 0o600
# Of a path on Windows, unless it begins with the mark: its name is the last part.
MAX_PATH_CHARS = 259
# What is beyond that limit, and a name that Windows would read otherwise.
LONG_PATH_MARK = "\\\\?\\"
# Windows tells of Ctrl-C only between two waits.
LOOK_FOR_CTRL_C_S = 0.2

# In a folder that others may write to, a link may lead to somebody else's file.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

if sys.platform == "win32":
    import msvcrt

    def take_lock(descriptor: int) -> bool:
        """Lock an open file for this process; return False if another one has the lock."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def take_lock(descriptor: int) -> bool:
        """Lock an open file for this process; return False if another one has the lock."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def long_path(path: str, *, is_windows: bool = IS_WINDOWS) -> str:
    """Return a path that the system takes, whatever its length."""
    if not is_windows or path.startswith(LONG_PATH_MARK):
        return path
    whole = ntpath.abspath(path)
    if len(whole) <= MAX_PATH_CHARS:
        return path
    if whole.startswith("\\\\"):
        return LONG_PATH_MARK + "UNC" + whole[1:]
    return LONG_PATH_MARK + whole


def data_file(*parts: str, is_windows: bool = IS_WINDOWS) -> str:
    """Return the path of a file of this user's programs; nothing where nobody is at home."""
    places = [os.environ.get("LOCALAPPDATA", "")]
    if not is_windows:
        # Without $HOME, and without a home in the list of users, the ~ stays.
        home = "" if os.environ.get("HOME") == "" else os.path.expanduser("~/.local/share")
        places = [os.environ.get("XDG_DATA_HOME", ""), home]
    folder = next(filter(os.path.isabs, places), "")
    return folder and os.path.join(folder, *parts)


def speak_utf8(*streams: Any, is_windows: bool = IS_WINDOWS) -> None:
    """Have output fail at no character. Windows gives a pipe the alphabet of a country."""
    for stream in streams:
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if is_windows:
            stream.reconfigure(encoding="utf-8")
        if stream.writable():
            stream.reconfigure(errors="backslashreplace")


def result_of(
    future: Future[T], timeout_s: float | None, *, is_windows: bool = IS_WINDOWS,
) -> T:
    """Return the result of a future; raise what it raises, TimeoutError, KeyboardInterrupt."""
    until_s = _until_s(timeout_s)
    while is_windows and not future.done() and time.monotonic() < until_s:
        wait([future], min(LOOK_FOR_CTRL_C_S, until_s - time.monotonic()))
    if is_windows:
        return future.result(0)
    return future.result(timeout_s)


def next_of(
    came: queue.Queue[T], timeout_s: float | None, *, is_windows: bool = IS_WINDOWS,
) -> T:
    """Return the next of a queue; raise queue.Empty after a time-out, KeyboardInterrupt."""
    if not is_windows:
        return came.get(timeout=timeout_s)
    until_s = _until_s(timeout_s)
    while (left_s := until_s - time.monotonic()) > LOOK_FOR_CTRL_C_S:
        try:
            return came.get(timeout=LOOK_FOR_CTRL_C_S)
        except queue.Empty:
            continue
    return came.get(timeout=max(0.0, left_s))


def _until_s(timeout_s: float | None) -> float:
    if timeout_s is None:
        return float("inf")
    return time.monotonic() + timeout_s
