"""Type README's session, and run the programs of the docs, word for word."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import DEADLINE_S, OK, ROOT, Owner, Process, post, put_down, send, until
from pages import blocks, page

pytestmark = pytest.mark.slow

EMBEDDING, LIBRARY, README = (
    page(name) for name in ("docs/embedding.md", "docs/library.md", "README.md")
)
EMOJI_LINES = re.compile(
    r"(?m)^ {4}(\S+ [\w ]+(?: {3}\S+ [\w ]+){3})\n {4}(\S+ [\w ]+(?: {3}\S+ [\w ]+){2})$")
(
    RELAY, SHARE, OPEN, VERIFY, VERIFY_BOB, CHAT_ALICE, CHAT_BOB, SEND, RECEIVE, *_
) = blocks(README, "sh")


BOB = """
import sys
from connectoid import AiortcAdapter, Connectoid, Store

app = Connectoid(Store("bob.db"), [], AiortcAdapter())
app.allow_private_relays = True
with app:
    channel = app.connect(app.open(sys.argv[1], "Alice"))
    channel.send("Got: " + channel.receive())
    channel.closed.wait()
"""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class Terminal:
    """A command that was typed; what it prints is collected."""

    def __init__(self, command: str, folder: Path) -> None:
        self.popen = subprocess.Popen(
            ["bash", "-euc", command], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        self.printed = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.printed += line

    def enter(self, line: str) -> None:
        """Type a line."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def press_ctrl_d(self) -> None:
        """End the input."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def wait(self) -> str:
        """Return all that it printed, once it has ended well."""
        assert self.popen.wait(DEADLINE_S) == 0, self.printed
        self._reader.join(DEADLINE_S)
        return self.printed

    def shows(self, words: str) -> Callable[[], bool]:
        """Return a function that tells whether words have been printed."""
        return lambda: words in self.printed

    def close(self) -> None:
        """Leave nothing behind, and let a failed test show what was printed."""
        self.popen.kill()
        self._reader.join(DEADLINE_S)
        put_down(self.popen)
        print(self.printed)


@pytest.fixture
def desk(tmp_path: Path, start: Callable[..., Process]) -> Iterator[Callable[[str], Terminal]]:
    """Return a function that types a command of README, beside a relay that runs."""
    port = start().port
    with contextlib.ExitStack() as opened:

        def type_command(command: str) -> Terminal:
            command = command.replace("8080", str(port))
            command = command.replace(".venv/bin/connectoid", f"{sys.executable} -m connectoid.cli")
            terminal = Terminal(command, tmp_path)
            opened.callback(terminal.close)
            return terminal

        yield type_command


def test_readme_session_goes_as_typed(desk: Callable[[str], Terminal], tmp_path: Path) -> None:
    pytest.importorskip("aiortc", reason="needs aiortc: pip install 'connectoid[webrtc]'")
    sharing = desk(SHARE)
    until(sharing.shows("connectoid:#connectoid="))
    (link,) = re.findall(r"(?m)^connectoid:#connectoid=\S+$", sharing.printed)
    # Nobody can be asked in a pipe.
    command = OPEN.replace("connectoid:#connectoid=...", link).replace("--name", "--yes --name")
    opened = desk(command).wait()
    seen = EMOJI_LINES.findall(opened)
    assert seen == EMOJI_LINES.findall(sharing.wait())
    assert len(seen) == 1
    assert "Bob is marked as verified" in desk(VERIFY).wait()
    assert "Alice is marked as verified" in desk(VERIFY_BOB).wait()

    alice, bob = desk(CHAT_ALICE), desk(CHAT_BOB)
    alice.enter("Milk?")
    bob.enter("And bread.")
    until(alice.shows("Bob: And bread."))
    until(bob.shows("Alice: Milk?"))
    alice.press_ctrl_d()
    alice.wait()
    bob.wait()

    sending = desk(SEND.replace("100M", "1M"))
    receiving = desk(RECEIVE.replace("--dir", "--yes --dir"))
    assert "big.bin" in sending.wait()
    assert "inbox/big.bin" in receiving.wait()
    assert (tmp_path / "inbox/big.bin").read_bytes() == (tmp_path / "big.bin").read_bytes()


@pytest.mark.parametrize("text", [README, LIBRARY], ids=["README", "library"])
def test_python_apps_of_the_docs_meet(
        text: str, start: Callable[..., Process], tmp_path: Path) -> None:
    pytest.importorskip("aiortc", reason="needs aiortc: pip install 'connectoid[webrtc]'")
    alice, *_ = blocks(text, "python")
    alice = alice.replace("8080", str(start().port))
    with contextlib.ExitStack() as opened:

        def run(*command: str) -> subprocess.Popen[str]:
            popen = subprocess.Popen(
                [sys.executable, "-c", *command], cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT,
            )
            opened.callback(put_down, popen)
            return popen

        first = run(alice)
        assert first.stdout is not None
        link = first.stdout.readline().split()[-1]
        second = run(BOB, link)
        assert first.communicate(timeout=DEADLINE_S)[0] == "Got: milk, bread\n"
        assert second.wait(DEADLINE_S) == 0


def test_program_of_the_docs_embeds_a_relay(tmp_path: Path, alice: Owner) -> None:
    program, _ = blocks(EMBEDDING, "python")
    use = "print(server.server_address[1], flush=True); input()\n"
    program = program.replace("8080", "0").replace("...\n", use)
    popen = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, text=True, env=ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    try:
        assert popen.stdout is not None
        port = int(popen.stdout.readline())
        assert post(port, send(alice)) == (200, OK)
        _, errors = popen.communicate("\n", timeout=DEADLINE_S)
        assert (popen.returncode, errors) == (0, "")
    finally:
        put_down(popen)
