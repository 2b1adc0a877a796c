"""Sort the tests into tiers, fence the quick ones in, and see that no test leaves anything behind.

There are three tiers. `make quick` runs what is neither `slow` nor `sockets`. `make check` runs
everything that this machine can. `.ci/run` installs first whatever tests skip without.

This is a plugin of pytest, so that it holds for test_relay.py too, which has no conftest.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------
# Tiers. Tests that use a fixture with a server in it, or that are in one of these rooms, open
# sockets or start programs. All others are quick unless they are marked.
# ---------------------------------------------------------------------------------------

SOCKET_ROOMS = (
    "tests/js/",
    "tests/library/test_asyncio.py",
    "tests/library/test_behind_a_proxy.py",
    "tests/library/test_certificates.py",
    "tests/library/test_cli.py",
    "tests/library/test_closing.py",
    "tests/library/test_consent.py",
    "tests/library/test_datagrams.py",
    "tests/library/test_doctor.py",
    "tests/library/test_flooded_links.py",
    "tests/library/test_fuzz_readers.py",
    "tests/library/test_fuzz_runner.py",
    "tests/library/test_gathering.py",
    "tests/library/test_guards.py",
    "tests/library/test_hostile_counterparts.py",
    "tests/library/test_hostile_webrtc.py",
    "tests/library/test_http_transport.py",
    "tests/library/test_isolation.py",
    "tests/library/test_no_posix.py",
    "tests/library/test_lent_turn.py",
    "tests/library/test_lifetimes.py",
    "tests/library/test_local_names.py",
    "tests/library/test_other_apps.py",
    "tests/library/test_people.py",
    "tests/library/test_private_networks.py",
    "tests/library/test_reassembly.py",
    "tests/library/test_recovery.py",
    "tests/library/test_relay_client.py",
    "tests/library/test_runner.py",
    "tests/library/test_sctp_gate.py",
    "tests/library/test_stolen_devices.py",
    "tests/library/test_strangers.py",
    "tests/library/test_thrifty_tls.py",
    "tests/library/test_two_halves.py",
    "tests/library/test_upstream.py",
    "tests/library/test_turn_stream.py",
    "tests/library/test_way_out.py",
    "tests/network/",
    "tests/relay/test_command_line.py",
    "tests/relay/test_documents.py",
    "tests/relay/test_full_disk.py",
    "tests/relay/test_fuzz.py",
    "tests/relay/test_http.py",
    "tests/relay/test_kills.py",
    "tests/relay/test_limits.py",
    "tests/relay/test_long_poll.py",
    "tests/relay/test_metrics.py",
    "tests/relay/test_networks.py",
    "tests/relay/test_second_process.py",
    "tests/relay/test_server.py",
    "tests/relay/test_udp.py",
    "tests/relay/test_vendored.py",
    "tests/system/",
)
SOCKET_FIXTURES = {"port", "start"}


def opens_sockets(path: Path) -> bool:
    """Return whether a file is in a room whose tests open sockets or start programs."""
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix().startswith(SOCKET_ROOMS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the files out whose tests a quick run does not want: their imports take long."""
    if "not sockets" in config.option.markexpr and opens_sockets(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what opens sockets or starts programs."""
    for item in items:
        fixtures = SOCKET_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if fixtures or opens_sockets(item.path):
            item.add_marker("sockets")


# ---------------------------------------------------------------------------------------
# The fence. Python calls an audit hook before it makes a socket or starts a program.
# A hook cannot be taken back, so a flag says whether it refuses.
# ---------------------------------------------------------------------------------------

FENCED_OFF = {"os.fork", "os.posix_spawn", "os.system", "socket.__new__", "subprocess.Popen"}


class Fence:
    """Refuse sockets and programs while it is up."""

    def __init__(self) -> None:
        self.is_up = False

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        """Raise RuntimeError for what a quick test may not do."""
        if not self.is_up or event not in FENCED_OFF:
            return
        # aiortc looks for libraries while it is imported, which whichever test is first does.
        if arguments and str(arguments[0]).endswith("ldconfig"):
            return
        raise RuntimeError(f"{event} in a quick test: mark it with `sockets`")


FENCE = Fence()
sys.addaudithook(FENCE.hear)


@pytest.fixture(autouse=True)
def fence(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put the fence around a test that is quick."""
    marks = {mark.name for mark in request.node.iter_markers()}
    FENCE.is_up = not marks & {"slow", "sockets"}
    yield
    FENCE.is_up = False


# ---------------------------------------------------------------------------------------
# What a test leaves behind. Fixtures of a module or a session come before the first look, so
# that what they keep running is nobody's fault.
# ---------------------------------------------------------------------------------------

GRACE_S = 10.0
LOOK_EVERY_S = 0.02


class Belongings(NamedTuple):
    """What outlives a function in this process."""

    children: frozenset[str]
    threads: frozenset[str]
    files: frozenset[str]

    def since(self, before: Belongings) -> list[str]:
        """Return what has come since, in words."""
        return [
            *(f"process {pid}" for pid in sorted(self.children - before.children)),
            *(f"thread {name}" for name in sorted(self.threads - before.threads)),
            *(f"temporary file {name}" for name in sorted(self.files - before.files)),
        ]


def children_of(task: Path) -> list[str]:
    """Return the processes that a thread has started; none if the thread is over."""
    try:
        return (task / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def look_around() -> Belongings:
    """Return the children, the threads that hold up the end, and the temporary files."""
    tasks = Path("/proc/self/task").iterdir()
    children = [pid for task in tasks for pid in children_of(task)]
    threads = [f"{thread.name} ({thread.ident})" for thread in threading.enumerate()
               if not thread.daemon]
    return Belongings(
        frozenset(children), frozenset(threads), frozenset(os.listdir(tempfile.gettempdir())))


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """Fail a test that leaves a process, a thread or a temporary file behind."""
    before = look_around()
    yield
    give_up_s = time.monotonic() + GRACE_S
    while left := look_around().since(before):
        assert time.monotonic() < give_up_s, f"left behind: {', '.join(left)}"
        time.sleep(LOOK_EVERY_S)


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests a folder for temporary files that no other program writes to."""
    # Folders of `tmp_path` stay where they would be without this.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    path = tempfile.mkdtemp(prefix="connectoid-")
    # As open as /tmp itself: some tests run as another user.
    os.chmod(path, 0o1777)
    os.environ["TMPDIR"] = path
    # npm would keep compiled modules there.
    os.environ["NODE_DISABLE_COMPILE_CACHE"] = "1"
    tempfile.tempdir = path
    config.add_cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
