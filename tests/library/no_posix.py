"""Hide from the library what Windows lacks: `hide()`, before it is imported.

Only modules of this project are deceived. They get stand-ins of the modules below, which have not
the names of the table, and find no module that Windows has not. Python and other packages see the
system as it is, so that all else works.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib
import types
from collections.abc import Mapping
from typing import Any

OURS = ("connectoid", "connectoid_relay", "connectoid_admin", "peer", "a_module_of_ours")
MISSING_MODULES = frozenset({
    "crypt", "curses", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource",
    "spwd", "syslog", "termios", "tty"})
MISSING_NAMES: Mapping[str, frozenset[str]] = {
    "os": frozenset({
        "O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "chown",
        "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid",
        "getuid", "killpg", "lchown", "mkfifo", "nice", "pread", "pwrite", "register_at_fork",
        "sched_getaffinity", "sendfile", "setsid", "statvfs", "sync", "uname", "wait", "waitid"}),
    "select": frozenset({"epoll", "kqueue", "poll"}),
    "signal": frozenset({
        "SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2",
        "SIGWINCH", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"}),
    "socket": frozenset({
        "AF_NETLINK", "AF_PACKET", "AF_UNIX", "CMSG_LEN", "CMSG_SPACE", "MSG_DONTWAIT",
        "MSG_NOSIGNAL", "NETLINK_ROUTE", "SCM_RIGHTS", "SO_BINDTODEVICE", "SO_REUSEPORT",
        "TCP_INFO"}),
    "sys": frozenset({"abiflags", "getdlopenflags", "setdlopenflags"}),
    "time": frozenset({
        "CLOCK_BOOTTIME", "CLOCK_MONOTONIC", "CLOCK_REALTIME", "clock_gettime", "tzset"}),
}
CHANGED: Mapping[str, Mapping[str, object]] = {"sys": {"platform": "win32"}, "os": {"name": "nt"}}


def is_ours(importer: Mapping[str, Any] | None) -> bool:
    """Return whether a module of this project imports."""
    return str((importer or {}).get("__name__")).partition(".")[0] in OURS


class StandIn(types.ModuleType):
    """A module without the names that Windows lacks."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        # Past our own __setattr__.
        vars(self)["_real"] = real

    def __getattr__(self, name: str) -> Any:
        if name in MISSING_NAMES[self.__name__]:
            raise AttributeError(f"Windows has no {self.__name__}.{name}")
        changed = CHANGED.get(self.__name__, {})
        return changed[name] if name in changed else getattr(vars(self)["_real"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["_real"], name, value)


class Msvcrt(types.ModuleType):
    """The lock of Windows, by that of this system."""

    LK_NBLCK = 2

    @staticmethod
    def locking(descriptor: int, mode: int, octets: int) -> None:
        """Lock an open file; raise OSError if another process has locked it."""
        assert (mode, octets) == (Msvcrt.LK_NBLCK, 1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def hide() -> None:
    """Deceive all modules of this project that are imported from now on."""
    stand_ins: dict[str, types.ModuleType] = {
        name: StandIn(importlib.import_module(name)) for name in MISSING_NAMES}
    stand_ins["msvcrt"] = Msvcrt("msvcrt")
    really_import = builtins.__import__

    def import_for(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0,
    ) -> types.ModuleType:
        if level == 0 and is_ours(globals):
            if name in MISSING_MODULES:
                raise ModuleNotFoundError(f"Windows has no {name}", name=name)
            if name in stand_ins:
                return stand_ins[name]
        return really_import(name, globals, locals, fromlist, level)

    builtins.__import__ = import_for
