"""Alice and Bob, each with the command line in a network of their own."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab import RELAY_IPV4, RELAY_PORT, ROOT, Lab, Namespace, end

# For what a person would wait for, on a busy machine.
PATIENCE_S = 100.0


class Event(NamedTuple):
    """What a command has told, and when."""

    at_s: float
    told: dict[str, Any]


class Command:
    """A command that runs, and what it tells."""

    def __init__(self, argv: list[str], folder: Path, log: Path) -> None:
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                argv, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self._events.put(Event(time.monotonic(), json.loads(line)))
        self._events.put(None)

    def wait_for(self, kind: str, timeout_s: float = PATIENCE_S) -> Event:
        """Return the next event of a kind; raise TimeoutError, or EOFError if it never comes."""
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                event = self._events.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {kind!r} within {timeout_s:g} s") from None
            if event is None:
                raise EOFError(f"it has ended without {kind!r}")
            if event.told["event"] == kind:
                return event

    def end(self) -> None:
        """End it, if it has not ended."""
        end(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Person:
    """Somebody in a network, with a store."""

    def __init__(
        self, lab: Lab, name: str, place: Namespace, *, relay: str = RELAY_IPV4,
        ice_servers: str = "", room: str = "", environment: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.place = place
        # Those of one lab who are not in the same room share no files.
        self.folder = lab.folder / room
        self.folder.mkdir(exist_ok=True)
        url = f"http://{relay}:{RELAY_PORT}/"
        self._environment = [f"PYTHONPATH={ROOT}", f"CONNECTOID_RELAY={url}", *environment]
        if ice_servers:
            self._environment.append(f"CONNECTOID_ICE_SERVERS={ice_servers}")
        self._lab = lab

    @property
    def said(self) -> str:
        """Return what this person's commands have said to people so far."""
        return self._log.read_text()

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self, *argv: str) -> Command:
        """Start a command of `connectoid`."""
        command = Command(
            self.place.command(
                "env", *self._environment,
                sys.executable, "-m", "connectoid", *argv, "--json", "--allow-http",
                "--store", f"{self.name}.db"),
            self.folder, self._log)
        self._lab.ending.callback(command.end)
        return command


def pair(alice: Person, bob: Person, timeout_s: float = PATIENCE_S) -> float:
    """Pair two people; return the seconds from Bob's first try until both are connected.

    Raises TimeoutError.
    """
    shares = alice.start("share", "Bob")
    link = shares.wait_for("link").told["link"]
    shares.wait_for("waiting")
    opens = bob.start("open", link, "--name", "Alice", "--yes")
    began_s = opens.wait_for("waiting").at_s
    connected = [side.wait_for("connected", timeout_s) for side in (shares, opens)]
    for side in (shares, opens):
        side.process.wait(PATIENCE_S)
    return max(event.at_s for event in connected) - began_s


def send_file(sender: Person, recipient: Person, path: Path) -> tuple[Command, Command]:
    """Begin to send a file; return the sender's command and the other's, once they connect."""
    receives = recipient.start("receive", sender.name, "--yes", "--dir", "inbox")
    sends = sender.start("send", recipient.name, str(path))
    for command in (receives, sends):
        command.wait_for("connected")
    return sends, receives
