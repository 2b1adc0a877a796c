"""The command `chat`: lines of text, both ways, over as many connections as it takes.

    both    {"app": "chat", "chat": TOKEN}     a token for each start of the command
    both    {"got": 0}                         the number of the last line that was shown
    one     {"line": "Hello", "number": 1}
    other   {"got": 1}
    one     {"end": true}                      it has no more to say
    other   {"ended": true}                    it has all of it

A line that was not acknowledged is sent again on the next connection, and shown once: a line whose
number is not higher than that of the last one was there before. Each wait for an end is bounded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from connectoid import NotConnectedError, shown
from connectoid.cli.running import connect, running
from connectoid.cli.talking import MessageChannel, greet, read_control
from connectoid.cli.telling import Teller
from connectoid.limits import MAX_CHANNEL_BYTES

# Without a word from the other side, or from ours, once one of them has ended.
SILENCE_S = 5.0
# Sent and not yet acknowledged. Of a file that is piped in, no more is read. It is far less than
# the 1,024 messages for which a channel has room: with their acknowledgements it never runs full.
MAX_WAITING_LINES = 256
# Of a longer line the rest comes as the next. A character may take 12 bytes of JSON, and a message
# has 64 KiB.
MAX_LINE_CHARS = 5_000
# Of a line. All readers of JSON keep it as it is; a longer one would not fit into a confirmation.
MAX_NUMBER = 2**53 - 1
# Of a token of the other's.
MAX_TOKEN_CHARS = 64


class ClosableChannel(MessageChannel, Protocol):
    """What a chat needs of a channel."""

    def close(self) -> None:
        """Disconnect."""


class Line(NamedTuple):
    """A line of ours, and its number in this chat, from 1."""

    number: int
    text: str


def chat(arguments: argparse.Namespace, teller: Teller) -> int:
    """Send lines from stdin, print those that come, until either side ends."""
    name = arguments.name

    def show(line: str) -> None:
        # As long as it came.
        words = f"{name}: {shown(line, MAX_CHANNEL_BYTES)}"
        teller.say("line", "", result=words, contact=name, line=line)

    conversation = Conversation(show, is_typed=sys.stdin.isatty())
    with running(arguments, teller) as runner:
        try:
            while True:
                channel = connect(runner, arguments, teller)
                conversation.begin(sys.stdin)
                if conversation.hold(channel, name):
                    break
                words = f"The connection broke. Lines wait until {name} is back. (Ctrl-C ends)"
                teller.say("broken", words, contact=name)
            teller.say("disconnected", f"Disconnected from {name}.", contact=name)
        finally:
            tell_undelivered(conversation, name, teller)
    return int(bool(conversation.undelivered()))


def tell_undelivered(conversation: Conversation, name: str, teller: Teller) -> None:
    """Show the lines of which nobody knows whether they arrived."""
    lines = conversation.undelivered()
    if not lines:
        return
    words = "\n".join([f"{name} has not confirmed:", *(f"  {shown(line)}" for line in lines)])
    teller.say("undelivered", words, contact=name, lines=lines)


class Conversation:
    """A chat: what was said and not yet confirmed, what was heard, and who has ended.

    The thread that types adds lines; the one that holds a channel shows what comes and confirms it.
    A person who types is not waited for once the other has ended (`is_typed`); a pipe is.
    """

    def __init__(
        self, show: Callable[[str], None], *, is_typed: bool, silence_s: float = SILENCE_S,
    ) -> None:
        self._show = show
        self._is_typed = is_typed
        self._silence_s = silence_s
        self._token = secrets.token_hex(8)
        # Notified when there is room among the waiting, and held while something is sent.
        self._changed = threading.Condition()
        self._typing: threading.Thread | None = None
        # None between two connections, and before the other has said who it is.
        self._channel: ClosableChannel | None = None
        self._waiting: deque[Line] = deque()
        self._number = 0
        self._we_ended = False
        # The number of our last line before the end.
        self._end_number = 0
        # Since somebody last looked.
        self._has_said = False
        # The other took nothing for so long that a send gave up.
        self._is_stalled = False
        # Of the other's command, by its token.
        self._their_token = ""
        self._their_number = 0
        self._they_ended = False
        self._they_know = False

    def undelivered(self) -> list[str]:
        """Return the lines that were not confirmed."""
        return [line.text for line in self._waiting]

    def begin(self, lines: Iterable[str]) -> None:
        """Take lines from now on, in a thread; once."""
        if self._typing is None:
            self._typing = threading.Thread(target=self._type, args=(lines,), daemon=True)
            self._typing.start()

    def hold(self, channel: ClosableChannel, name: str) -> bool:
        """Chat on a channel until it ends; return whether the chat has ended with it.

        Raises TransferError if the other does not chat.
        """
        try:
            hello = greet(channel, {"app": "chat", "chat": self._token}, name)
            self._resume(channel, str(hello.get("chat"))[:MAX_TOKEN_CHARS])
            while self._listen(channel):
                pass
        except NotConnectedError:
            return self._is_over()
        except KeyboardInterrupt:
            self._leave()
            raise
        finally:
            self._channel = None
            channel.close()
        return True

    def _leave(self) -> None:
        """Tell the other that this side has left, unless the thread that types is sending."""
        if self._changed.acquire(blocking=False):
            self._end()
            self._changed.release()

    def _is_over(self) -> bool:
        """Return whether nothing is left to be said after a channel has broken.

        Who has no more to say waits for nobody who takes nothing.
        """
        if self._they_ended:
            return True
        return self._we_ended and (self._is_stalled or not self._waiting)

    def _type(self, lines: Iterable[str]) -> None:
        """Take lines until there are no more; wait while too many are not confirmed."""
        for line in lines:
            text = line.rstrip("\n")
            for start in range(0, max(1, len(text)), MAX_LINE_CHARS):
                self._say(text[start:start + MAX_LINE_CHARS])
        with self._changed:
            self._end()

    def _say(self, text: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING_LINES)
            self._number += 1
            line = Line(self._number, text)
            self._waiting.append(line)
            self._has_said = True
            self._send({"line": line.text, "number": line.number})

    def _end(self) -> None:
        if not self._we_ended:
            self._we_ended = True
            self._end_number = self._number
        self._send({"end": True})

    def _send(self, said: dict[str, Any]) -> None:
        """Send, if there is a channel. The lock is held, so that lines keep their order."""
        channel = self._channel
        if channel is None:
            return
        # The thread that holds the channel hears of its end too.
        with contextlib.suppress(NotConnectedError):
            try:
                channel.send(json.dumps(said), timeout_s=self._silence_s)
            except TimeoutError:
                self._is_stalled = True
                channel.close()

    def _resume(self, channel: ClosableChannel, token: str) -> None:
        """Say what was heard of the other, and again what it has not confirmed."""
        if token != self._their_token:
            # Another start of its command: it knows nothing of this chat, and its lines begin anew.
            self._their_token = token
            self._their_number = 0
        self._they_ended = False
        self._they_know = False
        with self._changed:
            self._is_stalled = False
            self._channel = channel
            self._send({"got": self._their_number})
            for line in self._waiting:
                self._send({"line": line.text, "number": line.number})
            if self._we_ended:
                self._end()

    def _listen(self, channel: ClosableChannel) -> bool:
        """Take one message, or a silence; return whether more can come."""
        timeout_s = None
        if self._they_ended or self._we_ended:
            timeout_s = self._silence_s
        try:
            said = read_control(channel.receive(timeout_s))
        except TimeoutError:
            return self._outlast_silence()
        if isinstance(said.get("line"), str):
            self._hear(said)
        elif "got" in said:
            self._confirm(said["got"])
        elif "end" in said:
            self._hear_end()
        elif "ended" in said:
            self._they_know = True
            self._confirm(self._end_number)
        return not (self._they_ended and self._they_know)

    def _hear(self, said: dict[str, Any]) -> None:
        """Show a line that is new, and confirm it."""
        number = said.get("number")
        if type(number) is not int:
            # A program that does not count.
            self._show(said["line"])
            return
        if number > MAX_NUMBER:
            return
        if number > self._their_number:
            self._their_number = number
            self._show(said["line"])
        with self._changed:
            self._send({"got": number})

    def _confirm(self, number: object) -> None:
        """Drop the lines that the other has shown."""
        if type(number) is not int or number > MAX_NUMBER:
            return
        with self._changed:
            while self._waiting and self._waiting[0].number <= number:
                self._waiting.popleft()
            self._changed.notify_all()

    def _hear_end(self) -> None:
        self._they_ended = True
        with self._changed:
            self._send({"ended": True})
            if self._is_typed:
                self._end()

    def _outlast_silence(self) -> bool:
        """End if we have said nothing either; return whether to go on."""
        with self._changed:
            if self._has_said:
                self._has_said = False
                return True
            if self._we_ended:
                return False
            self._end()
            return True
