"""Two people with terminals: real processes, the real relay, WebRTC by aiortc."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from apps import (
    NOWHERE,
    FakeRelay,
    honest,
    http_reply,
    until,
)
from harness import DEADLINE_S, LONG_DEADLINE_S, ROOT, STRICT, Process, put_down

from connectoid_relay import Relay, SqliteStore

# ---------------------------------------------------------------------------------------
# Two people with terminals: real processes, the real relay, WebRTC by aiortc.
# ---------------------------------------------------------------------------------------

# aioice does not offer 127.0.0.1; where that is all there is, it has to.
TERMINAL = f"""
import sys
import aioice.ice
sys.path.insert(0, {str(ROOT)!r})
found = aioice.ice.get_host_addresses
aioice.ice.get_host_addresses = lambda **kinds: found(**kinds) or ["127.0.0.1"]
import connectoid.cli
sys.exit(connectoid.cli.main(sys.argv[1:]))
"""


class Terminal:
    """A command that runs, with the events that it told so far."""

    program = TERMINAL

    def __init__(self, home: Path, *argv: str, relays: Sequence[str] = ()) -> None:
        home.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "CONNECTOID_STORE": str(home / "s.db"),
            "CONNECTOID_RELAY": " ".join(relays),
        }
        self.popen = subprocess.Popen(
            [*STRICT, "-c", self.program, *argv, "--json"],
            cwd=home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.events.append(json.loads(line))

    def told(self, event: str) -> dict[str, Any] | None:
        """Return the first event of a kind that it told."""
        return next((told for told in self.events if told["event"] == event), None)

    def wait_for(self, event: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Return an event once it is told."""
        until(lambda: self.told(event) or not self._reader.is_alive(), event, timeout_s)
        told = self.told(event)
        assert told is not None, (
            event,
            self.events,
            self.popen.stderr and self.popen.stderr.read(),
        )
        return told

    def type(self, text: str) -> None:
        """Type a line."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(text.encode() + b"\n")
        self.popen.stdin.flush()

    def end(self, number: int = 0, timeout_s: float = DEADLINE_S) -> int:
        """Send a signal, if any, and return the exit code.

        The process has printed nothing but JSON, and no traceback.
        """
        if number:
            self.popen.send_signal(number)
        code = self.popen.wait(timeout_s)
        self._reader.join(timeout_s)
        assert self.popen.stderr is not None
        errors = self.popen.stderr.read().decode()
        self.put_down()
        assert "Traceback" not in errors, errors
        return code

    def put_down(self) -> None:
        """End it if it still runs, and leave no pipe open."""
        self.popen.kill()
        # Its output has to be read before the pipe is closed.
        self._reader.join(DEADLINE_S)
        put_down(self.popen)


class People:
    """Alice and Bob, each with a store of their own, and their relays."""

    def __init__(
        self, folder: Path, relays: Sequence[str], terminal: type[Terminal] = Terminal,
    ) -> None:
        self.folder, self.relays, self._terminal = folder, relays, terminal
        self.terminals: list[Terminal] = []

    def run(self, who: str, *argv: str) -> Terminal:
        """Start a command."""
        self.terminals.append(self._terminal(self.folder / who, *argv, relays=self.relays))
        return self.terminals[-1]

    def pair(self) -> None:
        """Let Alice share and Bob open."""
        alice = self.run("Alice", "share", "Bob")
        bob = self.run("Bob", "open", alice.wait_for("link")["link"], "--name", "Alice", "--yes")
        assert [alice.end(), bob.end()] == [0, 0]
        emoji = [terminal.wait_for("compare")["emoji"] for terminal in (alice, bob)]
        assert emoji[0] == emoji[1]

    def kill(self) -> None:
        """End whatever still runs."""
        for terminal in self.terminals:
            terminal.put_down()


@pytest.fixture
def people(tmp_path: Path, start: Callable[..., Process]) -> Iterator[People]:
    """Return Alice and Bob with a relay."""
    people = People(tmp_path, [f"http://127.0.0.1:{start().port}/"])
    try:
        yield people
    finally:
        people.kill()


def names_of_files(people: People) -> dict[str, list[str]]:
    """Return what is in the folders of both."""
    return {
        who: sorted(path.name for path in (people.folder / who).iterdir())
        for who in ("Alice", "Bob")
    }


class LateRelay:
    """A relay that delivers one message late: the first one to the app that opened a link.

    All other messages pass at once.
    """

    def __init__(self, relay: Relay, late_s: float) -> None:
        self._relay, self._late_s = relay, late_s
        self._sends = itertools.count()

    def reply(self, request: Any) -> bytes:
        """Acknowledge a message, and deliver it now or later."""
        if (
            isinstance(request, dict)
            and request["action"] == "send"
            and next(self._sends) == 1
            and self._late_s
        ):
            timer = threading.Timer(self._late_s, self._relay.handle, (request, "192.0.2.1"))
            timer.daemon = True
            timer.start()
            return http_reply({"ok": True})
        return honest(self._relay)(request)


DELAYS_S = (0, 5, 15, 30, 60)
# More than the delay: what CONNECT-9 may take, and polls of 2 s.
CONNECTED_AFTER_S = 25


@pytest.mark.slow
def test_people_connect_however_late_an_answer_comes(tmp_path: Path) -> None:
    """The answer to the first offer is held back; the five pairs run side by side."""
    with contextlib.ExitStack() as stack:
        pairs: dict[int, tuple[Terminal, Terminal]] = {}
        for delay_s in DELAYS_S:
            relay = LateRelay(Relay(SqliteStore(":memory:")), delay_s)
            fake = stack.enter_context(FakeRelay(relay.reply))
            people = People(tmp_path / str(delay_s), [fake.url])
            people.folder.mkdir()
            stack.callback(people.kill)
            alice = people.run("Alice", "share", "Bob")
            pairs[delay_s] = (
                alice,
                people.run(
                    "Bob", "open", alice.wait_for("link")["link"], "--name", "Alice", "--yes"),
            )
        began_s = time.monotonic()
        for delay_s, (alice, bob) in pairs.items():
            left_s = began_s + delay_s + CONNECTED_AFTER_S - time.monotonic()
            alice.wait_for("connected", left_s)
            bob.wait_for("connected", left_s)
            print(delay_s, "s late: connected after", round(time.monotonic() - began_s, 1))
        assert [terminal.end() for pair in pairs.values() for terminal in pair] == [0] * 2 * len(
            DELAYS_S
        )


# What Alice's list of contacts says of Bob, once they have paired.
CONTACT: dict[str, Any] = {
    "event": "contact",
    "contact": "Bob",
    "state": "paired",
    "why": None,
    "verified": False,
    "differs": False,
    "renewing": False,
    "moving": False,
    "key_news": None,
    "opened_twice": False,
    "refused": {},
    "routine": {},
}


@pytest.mark.slow
def test_people_are_connected_and_chat(people: People) -> None:
    """Both run, lines go both ways, and Ctrl-C leaves nothing."""
    alice = people.run("Alice", "share", "Bob")
    link = alice.wait_for("link")["link"]
    bob = people.run("Bob", "open", link, "--name", "Alice", "--yes")
    bob.wait_for("connected")
    assert [alice.end(), bob.end()] == [0, 0]
    before = names_of_files(people)
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "chat", "Alice")
    bob.wait_for("connected")
    alice.type("Grüße \x1b[2J")
    bob.type("Hello")
    assert (alice.wait_for("line")["line"], bob.wait_for("line")["line"]) == (
        "Hello",
        "Grüße \x1b[2J",
    )
    verify, contacts = people.run("Alice", "verify", "Bob"), people.run("Alice", "contacts")
    assert [verify.end(), contacts.end()] == [0, 0]
    assert verify.wait_for("compare")["emoji"][0].keys() == {"emoji", "name"}
    assert contacts.events == [CONTACT]
    marking = people.run("Alice", "verify", "Bob", "--same")
    assert (marking.end(), "end it first" in marking.wait_for("error")["error"]) == (1, True)
    assert alice.end(signal.SIGINT) == 130
    bob.wait_for("disconnected")
    assert bob.end() == 0
    assert names_of_files(people) == before
    marking = people.run("Alice", "verify", "Bob", "--same")
    assert (marking.end(), marking.told("verified") is not None) == (0, True)


@pytest.mark.slow
def test_people_who_come_at_different_times_meet(
    people: People, tmp_path: Path, start: Callable[..., Process]
) -> None:
    """Alice shares and leaves. Bob opens and leaves. The relay restarts. Then both come.

    The first of their relays is dead.
    """
    flags = ["--db", str(tmp_path / "relay.db")]
    relay = start(*flags)
    people.relays = [NOWHERE, f"http://127.0.0.1:{relay.port}/"]
    alice = people.run("Alice", "share", "Bob")
    link = alice.wait_for("link")["link"]
    assert alice.end(signal.SIGINT) == 130
    bob = people.run("Bob", "open", link, "--name", "Alice", "--yes")
    bob.wait_for("waiting")
    until(lambda: (tmp_path / "relay.db-wal").stat().st_size > 5_000, "hello is at the relay")
    assert bob.end(signal.SIGINT) == 130
    assert relay.stop()[0] == 0
    start(*flags, "--port", str(relay.port))
    alice, bob = (
        people.run("Alice", "chat", "Bob"),
        people.run("Bob", "open", link, "--name", "Alice", "--yes"),
    )
    bob.wait_for("compare")
    alice.wait_for("connected")
    assert bob.end() == 0
    # `open` does not chat: it ends once both are connected. Alice waits for Bob to chat.
    alice.wait_for("broken")
    bob = people.run("Bob", "chat", "Alice")
    bob.type("back")
    assert alice.wait_for("line")["line"] == "back"
    assert bob.end(signal.SIGINT) == 130
    assert alice.end() == 0


@pytest.mark.slow
def test_people_lose_no_line_when_a_chat_is_killed(people: People) -> None:
    """Bob's chat is killed. What Alice says then waits for him; what still waits is told."""
    people.pair()
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "chat", "Alice")
    alice.type("first")
    assert bob.wait_for("line")["line"] == "first"
    assert bob.end(signal.SIGKILL) == -9
    alice.type("second")
    alice.wait_for("broken")
    alice.type("third")
    bob = people.run("Bob", "chat", "Alice")
    until(lambda: [e["line"] for e in bob.events if e["event"] == "line"] == ["second", "third"],
          "both lines have come", timeout_s=LONG_DEADLINE_S)
    # Once Alice has this, she has his confirmations too.
    bob.type("all here")
    alice.wait_for("line")
    assert bob.end(signal.SIGKILL) == -9
    alice.type("fourth")
    assert alice.end(signal.SIGINT) == 130
    assert alice.wait_for("undelivered")["lines"] == ["fourth"]


@pytest.mark.slow
def test_people_are_told_of_a_link_that_was_opened_twice(people: People) -> None:
    """Eve is told, with exit code 1; Alice is warned; Bob goes on."""
    alice = people.run("Alice", "share", "Bob")
    link = alice.wait_for("link")["link"]
    assert people.run("Bob", "open", link, "--name", "Alice", "--yes").end() == 0
    assert alice.end() == 0
    alice, bob = people.run("Alice", "chat", "Bob"), people.run("Bob", "chat", "Alice")
    bob.wait_for("connected")
    eve = people.run("Eve", "open", link, "--name", "Alice", "--yes")
    assert eve.end() == 1
    assert eve.wait_for("error")["error"].startswith("Alice: This link was used by somebody else")
    alice.wait_for("opened_twice")
    bob.type("still here")
    assert alice.wait_for("line")["line"] == "still here"
    assert bob.end(signal.SIGINT) == 130
    assert alice.end() == 0


@pytest.mark.slow
def test_people_are_told_of_the_end_of_a_sharing(people: People) -> None:
    """Bob was away when Alice ended it."""
    people.pair()
    assert people.run("Alice", "unshare", "Bob").end() == 0
    contacts = people.run("Alice", "contacts")
    assert (contacts.end(), contacts.events) == (0, [])
    bob = people.run("Bob", "chat", "Alice")
    assert bob.end() == 1
    assert bob.wait_for("error")["error"] == "Alice has ended the sharing."


LARGE_BYTES = 24_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("who", "how", "code"), [
    ("Alice", signal.SIGKILL, -9), ("Bob", signal.SIGKILL, -9), ("Bob", signal.SIGINT, 130)])
def test_people_go_on_with_a_file_after_a_kill(
    people: People, who: str, how: signal.Signals, code: int,
) -> None:
    """The sender or the receiver is killed in the middle of a file, or stopped by Ctrl-C.

    The part that has arrived is not sent again.
    """
    people.pair()
    large, folder = people.folder / "large.bin", people.folder / "Bob" / "in"
    folder.mkdir()
    large.write_bytes(random.Random(2).randbytes(LARGE_BYTES))
    commands = {
        "Alice": ("send", "Bob", str(large)),
        "Bob": ("receive", "Alice", "--yes", "--dir", str(folder)),
    }
    running_now = {name: people.run(name, *argv) for name, argv in commands.items()}

    def there_bytes() -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    until(lambda: there_bytes() > LARGE_BYTES // 4, "a part is there", DEADLINE_S)
    assert running_now[who].end(how) == code
    there = there_bytes()
    assert there < LARGE_BYTES
    running_now[who] = people.run(who, *commands[who])
    assert [terminal.end(timeout_s=LONG_DEADLINE_S) for terminal in running_now.values()] == [0, 0]
    sent, received = running_now["Alice"].wait_for("sent"), running_now["Bob"].wait_for("received")
    assert sent["sha256"] == received["sha256"] == hashlib.sha256(large.read_bytes()).hexdigest()
    assert sent["there_before"] >= there
    assert [(path.name, path.stat().st_size) for path in folder.iterdir()] == [
        ("large.bin", LARGE_BYTES)
    ]
