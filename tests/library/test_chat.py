"""The chat of the command line, over a channel in memory."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from apps import SOON_S

from connectoid import NotConnectedError
from connectoid.cli.chat import (
    MAX_LINE_CHARS,
    MAX_NUMBER,
    MAX_WAITING_LINES,
    SILENCE_S,
    Conversation,
)
from connectoid.limits import MAX_CHANNEL_BYTES


class Wire:
    """One end of a channel in memory."""

    def __init__(self) -> None:
        self.other: Wire = self
        self.came: queue.Queue[str | bytes | None] = queue.Queue()
        self.is_closed = False
        # The other end takes nothing.
        self.is_stalled = False

    def send(self, message: str | bytes, timeout_s: float | None = None) -> None:
        """Bring a message to the other end; raise NotConnectedError, TimeoutError."""
        if self.is_closed:
            raise NotConnectedError
        if self.is_stalled:
            assert timeout_s is not None
            raise TimeoutError
        self.other.came.put(message)

    def receive(self, timeout_s: float | None = None) -> str | bytes:
        """Return what came; raise TimeoutError, NotConnectedError."""
        if timeout_s is None:
            timeout_s = SOON_S
        try:
            message = self.came.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            raise NotConnectedError
        return message

    def close(self) -> None:
        """End both."""
        self.is_closed = True
        for end in (self, self.other):
            end.came.put(None)


class Side:
    """Somebody who chats: what was heard, and a thread that ends with the chat."""

    def __init__(self, lines: Iterable[str], *, is_typed: bool = False,
                 silence_s: float = SILENCE_S) -> None:
        self.heard: list[str] = []
        self.conversation = Conversation(
            self.heard.append, is_typed=is_typed, silence_s=silence_s)
        self._lines = lines
        self._ends: list[bool] = []
        self._thread = threading.Thread()

    def hold(self, line: Wire) -> Side:
        """Begin to chat on a channel."""
        self.conversation.begin(self._lines)
        self._thread = threading.Thread(target=self._hold, args=(line,), daemon=True)
        self._thread.start()
        return self

    def finish(self) -> bool:
        """Wait for the end of the channel, and return whether the chat has ended with it."""
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()
        return self._ends[-1]

    def _hold(self, line: Wire) -> None:
        self._ends.append(self.conversation.hold(line, "the other"))


class Keyboard:
    """The keys of a person who types nothing more after some lines."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = iter(lines)
        self.is_left = threading.Event()

    def __iter__(self) -> Keyboard:
        return self

    def __next__(self) -> str:
        """Return the next line; wait where there is none."""
        for line in self._lines:
            return line
        self.is_left.wait(SOON_S)
        raise StopIteration


def make_wire() -> tuple[Wire, Wire]:
    """Return both ends of a channel."""
    here, there = Wire(), Wire()
    here.other, there.other = there, here
    return here, there


# For a silence that is sure to come.
SHORT_S = 0.01
LINES = [f"{number}\n" for number in range(600)]
HEARD = [str(number) for number in range(600)]


def said(end: Wire) -> Any:
    """Return what the other end says next."""
    return json.loads(end.receive())


def say(end: Wire, *messages: Any) -> None:
    """Say something to the other end."""
    for message in messages:
        end.send(json.dumps(message))


def greeted(end: Wire, got: int = 0) -> str:
    """Greet as another program would, and return the token of the other's chat."""
    token: str = said(end)["chat"]
    say(end, {"app": "chat", "chat": "t"}, {"got": got})
    return token


@pytest.mark.parametrize(("ours", "theirs"), [(600, 600), (0, 600), (600, 0), (1, 600), (0, 0)])
def test_piped_lines_arrive_on_both_sides(ours: int, theirs: int) -> None:
    """The side that ends first takes what is under way, and what the other still says."""
    here, there = make_wire()
    alice = Side(LINES[:ours]).hold(here)
    bob = Side(LINES[:theirs]).hold(there)
    assert [alice.finish(), bob.finish()] == [True, True]
    assert (alice.heard, bob.heard) == (HEARD[:theirs], HEARD[:ours])
    assert [alice.conversation.undelivered(), bob.conversation.undelivered()] == [[], []]


def test_person_is_not_waited_for_once_the_other_has_ended() -> None:
    """What was typed has arrived; nobody types the rest."""
    here, there = make_wire()
    keyboard = Keyboard(["hello\n"])
    alice = Side(LINES).hold(here)
    bob = Side(keyboard, is_typed=True).hold(there)
    assert [alice.finish(), bob.finish()] == [True, True]
    assert bob.heard == HEARD
    assert alice.heard == ["hello"]
    keyboard.is_left.set()


def test_chat_with_a_program_that_knows_no_end_ends_too() -> None:
    """The silence is bounded, and the line may not have arrived."""
    here, there = make_wire()
    alice = Side(["hello\n"], silence_s=SHORT_S).hold(here)
    greeted(there)
    assert [said(there) for _ in range(3)] == [
        {"got": 0}, {"line": "hello", "number": 1}, {"end": True}]
    assert alice.finish()
    assert alice.conversation.undelivered() == ["hello"]


def test_idle_pipe_is_not_waited_for_without_end() -> None:
    """The other has ended, and a script that neither writes nor ends holds up nobody."""
    here, there = make_wire()
    keyboard = Keyboard([])
    alice = Side(keyboard, silence_s=SHORT_S).hold(here)
    greeted(there)
    say(there, {"end": True})
    assert [said(there) for _ in range(3)] == [{"got": 0}, {"ended": True}, {"end": True}]
    say(there, {"ended": True})
    assert alice.finish()
    assert alice.heard == []
    keyboard.is_left.set()


def test_lines_that_were_lost_with_a_connection_come_with_the_next_and_once() -> None:
    """The other has shown two; the confirmation of the second was lost, and so was the third."""
    keyboard = Keyboard(["one\n", "two\n", "three\n"])
    alice = Side(keyboard, is_typed=True)
    here, there = make_wire()
    alice.hold(here)
    token = greeted(there)
    assert [said(there) for _ in range(4)] == [
        {"got": 0}, {"line": "one", "number": 1}, {"line": "two", "number": 2},
        {"line": "three", "number": 3}]
    say(there, {"line": "hi", "number": 1}, {"got": 1})
    assert said(there) == {"got": 1}
    there.close()
    assert not alice.finish()
    assert alice.conversation.undelivered() == ["two", "three"]
    here, there = make_wire()
    alice.hold(here)
    assert greeted(there, got=2) == token
    # What it sends again came before it heard what the other has.
    assert [said(there) for _ in range(3)] == [
        {"got": 1}, {"line": "two", "number": 2}, {"line": "three", "number": 3}]
    say(there, {"got": 3}, {"line": "hi", "number": 1}, {"line": "there", "number": 2})
    assert [said(there), said(there)] == [{"got": 1}, {"got": 2}]
    say(there, {"end": True})
    assert [said(there), said(there)] == [{"ended": True}, {"end": True}]
    say(there, {"ended": True})
    assert alice.finish()
    assert alice.heard == ["hi", "there"]
    assert alice.conversation.undelivered() == []
    keyboard.is_left.set()


def test_other_start_of_the_command_begins_its_lines_anew() -> None:
    alice = Side(Keyboard([]), is_typed=True)
    for token in ("t", "u"):
        here, there = make_wire()
        alice.hold(here)
        said(there)
        say(there, {"app": "chat", "chat": token}, {"got": 0}, {"line": "hi", "number": 1})
        assert [said(there), said(there)] == [{"got": 0}, {"got": 1}]
        there.close()
        assert not alice.finish()
    assert alice.heard == ["hi", "hi"]


def test_line_that_is_typed_after_the_end_is_not_taken_for_delivered() -> None:
    alice = Side([], is_typed=True)
    alice.conversation._end()
    alice.conversation._say("late")
    alice.conversation._confirm(alice.conversation._end_number)
    assert alice.conversation.undelivered() == ["late"]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_lines_wait_for_confirmation_in_a_bounded_number(extra: int) -> None:
    """What is piped in beyond that is not read yet."""
    count = MAX_WAITING_LINES + extra
    taken: list[int] = []

    def lines() -> Iterator[str]:
        for number in range(count):
            taken.append(number)
            yield f"{number}\n"

    here, there = make_wire()
    alice = Side(lines()).hold(here)
    greeted(there)
    first = min(count, MAX_WAITING_LINES)
    came = [said(there) for _ in range(1 + first)]
    assert came[-1]["number"] == first
    # One more may have been taken, and waits for room.
    assert len(taken) <= MAX_WAITING_LINES + 1
    assert len(alice.conversation.undelivered()) == first
    say(there, {"got": first})
    assert [said(there) for _ in range(count - first)] == [
        {"line": str(number), "number": number + 1} for number in range(first, count)]
    say(there, {"got": count})
    assert said(there) == {"end": True}
    say(there, {"ended": True}, {"end": True})
    assert said(there) == {"ended": True}
    assert alice.finish()


@pytest.mark.parametrize(("number", "is_taken"), [
    (MAX_NUMBER - 1, True), (MAX_NUMBER, True), (MAX_NUMBER + 1, False),
    pytest.param(10**4_000, False, id="4,001 digits")])
def test_numbers_are_taken_up_to_a_bound(number: int, is_taken: bool) -> None:
    keyboard = Keyboard(["hello\n"])
    here, there = make_wire()
    alice = Side(keyboard, is_typed=True).hold(here)
    greeted(there)
    assert [said(there), said(there)] == [{"got": 0}, {"line": "hello", "number": 1}]
    say(there, {"line": "hi", "number": number}, {"got": number}, {"end": True})
    there.close()
    assert alice.finish()
    assert alice.heard == ["hi"] * is_taken
    assert alice.conversation.undelivered() == ["hello"] * (not is_taken)
    keyboard.is_left.set()


def test_lines_go_on_the_next_connection_if_the_other_takes_nothing_on_this() -> None:
    keyboard = Keyboard(["hello\n"])
    alice = Side(keyboard, is_typed=True)
    here, there = make_wire()
    alice.hold(here)
    greeted(there)
    assert [said(there), said(there)] == [{"got": 0}, {"line": "hello", "number": 1}]
    here.is_stalled = True
    # The confirmation of it does not go out.
    say(there, {"line": "hi", "number": 1})
    assert not alice.finish()
    assert alice.heard == ["hi"]
    here, there = make_wire()
    alice.hold(here)
    greeted(there)
    assert [said(there), said(there)] == [{"got": 1}, {"line": "hello", "number": 1}]
    say(there, {"got": 1}, {"end": True}, {"ended": True})
    assert alice.finish()
    assert alice.conversation.undelivered() == []
    keyboard.is_left.set()


def test_who_has_no_more_to_say_waits_for_nobody_who_takes_nothing() -> None:
    keyboard = Keyboard(["hello\n"])
    alice = Side(keyboard)
    here, there = make_wire()
    alice.hold(here)
    greeted(there)
    assert [said(there), said(there)] == [{"got": 0}, {"line": "hello", "number": 1}]
    here.is_stalled = True
    # The end of the input.
    keyboard.is_left.set()
    assert alice.finish()
    assert alice.conversation.undelivered() == ["hello"]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_long_line_comes_in_parts_that_fit_into_a_message(extra: int) -> None:
    text = "\N{GRINNING FACE}" * (MAX_LINE_CHARS + extra)
    here, there = make_wire()
    alice = Side([text]).hold(here)
    bob = Side([]).hold(there)
    assert [alice.finish(), bob.finish()] == [True, True]
    assert bob.heard == [part for part in (text[:MAX_LINE_CHARS], text[MAX_LINE_CHARS:]) if part]
    longest = json.dumps({"line": text[:MAX_LINE_CHARS], "number": 2**53})
    assert len(longest) <= MAX_CHANNEL_BYTES


@pytest.mark.parametrize(
    "message", [{"got": "1"}, {"got": True}, {"got": -1}, {"line": 1}, {"number": 1}, {}])
def test_chat_goes_on_after_what_it_does_not_know(message: object) -> None:
    keyboard = Keyboard(["hello\n"])
    here, there = make_wire()
    alice = Side(keyboard, is_typed=True).hold(here)
    greeted(there)
    say(there, message, {"line": "hi"}, {"end": True}, {"ended": True})
    assert alice.finish()
    assert alice.heard == ["hi"]
    keyboard.is_left.set()
