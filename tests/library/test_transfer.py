"""Transfer files over a channel in memory: whole, resumed, and from a hostile peer."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import queue
import random
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from apps import (
    SOON_S,
)

from connectoid import (
    ConnectoidError,
    NotConnectedError,
)
from connectoid.cli import files, inbox
from connectoid.cli.inbox import Inbox
from connectoid.cli.talking import TransferError, read_reply
from connectoid.cli.telling import Teller


class Pipe:
    """One end of a channel in memory, which can break off.

    It counts the bytes of files that it has sent.
    """

    def __init__(self) -> None:
        self.other: Pipe = self
        self.came: queue.Queue[bytes | str | None] = queue.Queue()
        self.sent_bytes, self.break_after_bytes = 0, 2**60

    def send(self, message: bytes | str, timeout_s: float | None = None) -> None:
        """Bring a message to the other end; at the break both ends are closed."""
        if isinstance(message, bytes):
            self.sent_bytes += len(message)
            if self.sent_bytes > self.break_after_bytes:
                self.other.came.put(None)
                raise NotConnectedError
        self.other.came.put(message)

    def receive(self, timeout_s: float | None = None) -> bytes | str:
        """Return what came; raise TimeoutError if nothing does."""
        if timeout_s is None:
            timeout_s = SOON_S
        try:
            message = self.came.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            raise NotConnectedError
        return message


def make_pipe() -> tuple[Pipe, Pipe]:
    """Return both ends of a channel."""
    here, there = Pipe(), Pipe()
    here.other, there.other = there, here
    return here, there


def nobody_asks(question: str) -> tuple[bool, bool]:
    """Fail: there is nothing to ask."""
    raise AssertionError(question)


def inbox_of(folder: Path, **options: Any) -> Inbox:
    """Return an inbox that wants all that Alice sends."""
    options = {"max_bytes": 2**62, "ask": nobody_asks, "wants_all": True, **options}
    return Inbox(folder, options.pop("contact", "Alice"), **options)


def transfer(
    path: Path, folder: Path, break_after_bytes: int = 2**60
) -> tuple[Pipe, list[ConnectoidError]]:
    """Send a file into a folder; return the sender's end and what failed."""
    here, there = make_pipe()
    here.break_after_bytes = break_after_bytes
    teller, failed = Teller(as_json=True), list[ConnectoidError]()

    def receive() -> None:
        try:
            files.receive_file(there, inbox_of(folder), json.loads(there.receive()), teller)
        except ConnectoidError as error:
            failed.append(error)

    receiver = threading.Thread(target=receive)
    receiver.start()
    try:
        files.send_file(here, path, teller)
    except ConnectoidError as error:
        failed.append(error)
        there.came.put(None)
    receiver.join(SOON_S)
    return here, failed


@pytest.mark.parametrize("size", [0, 1, 60_000, 60_001, 20_000_000])
def test_file_arrives_whole(tmp_path: Path, size: int) -> None:
    """Name and content are equal, and nothing else is left."""
    (tmp_path / "to").mkdir()
    path = tmp_path / "Straße 1.bin"
    path.write_bytes(random.Random(size).randbytes(size))
    pipe, failed = transfer(path, tmp_path / "to")
    assert (failed, pipe.sent_bytes) == ([], size)
    assert {found.name: found.read_bytes() for found in (tmp_path / "to").iterdir()} == {
        path.name: path.read_bytes()
    }


def test_broken_transfer_goes_on_where_it_was(tmp_path: Path) -> None:
    """After two breaks no block was sent twice; a file that changed meanwhile is sent anew."""
    (tmp_path / "to").mkdir()
    path = tmp_path / "large"
    path.write_bytes(random.Random(5).randbytes(3_000_000))
    pipes = []
    for break_after_bytes in (1_000_000, 1_200_000, 2**60):
        pipe, failed = transfer(path, tmp_path / "to", break_after_bytes)
        pipes.append(pipe)
        assert all(isinstance(error, NotConnectedError) for error in failed)
    assert sum(pipe.sent_bytes for pipe in pipes) <= 3_000_000 + 2 * files.BLOCK_BYTES
    assert (tmp_path / "to" / "large").read_bytes() == path.read_bytes()
    transfer(path, tmp_path / "to", 1_000_000)
    path.write_bytes(b"another")
    pipe, failed = transfer(path, tmp_path / "to")
    assert (pipe.sent_bytes, failed) == (7, [])
    assert (tmp_path / "to" / "large (1)").read_bytes() == b"another"
    assert (tmp_path / "to" / "large").stat().st_size == 3_000_000


def receive_from(
    control: dict[str, Any],
    into: Path | Inbox,
    *messages: bytes | str,
) -> tuple[list[Any], str]:
    """Let a hostile sender speak; return what it was told and the error."""
    here, there = make_pipe()
    for message in messages:
        here.send(message)
    here.other.came.put(None)
    error = ""
    if isinstance(into, Path):
        into = inbox_of(into)
    try:
        files.receive_file(there, into, control, Teller(as_json=True))
    except ConnectoidError as failed:
        error = str(failed)
    return [json.loads(text or "null") for text in here.came.queue if isinstance(text, str)], error


CONTENT = b"content"
END = json.dumps({"sha256": hashlib.sha256(CONTENT).hexdigest()})


def test_file_whose_last_acknowledgement_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    """The receiver has all of it, checks that it is the same, and keeps one copy."""
    offer, into = {"file": "f", "size": 7, "fingerprint": "x"}, inbox_of(tmp_path)
    receive_from(offer, into, CONTENT, END)
    told, error = receive_from(offer, into, END)
    assert (told, error) == ([{"have": 7}, {"done": True}], "")
    told, _ = receive_from(offer, into, json.dumps({"sha256": "0" * 64}))
    assert told == [{"have": 7}, {"done": False}]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_file_larger_than_the_disk_is_refused_before_it_comes(tmp_path: Path) -> None:
    """A sender may not fill the receiver's disk."""
    told, error = receive_from({"file": "f", "size": 2**59}, tmp_path, CONTENT, END)
    assert [reply["done"] for reply in told] == [False]
    assert "bytes more than are free" in told[0]["reason"]
    assert error == f"f cannot be kept in {tmp_path}: {told[0]['reason']}."
    assert not list(tmp_path.iterdir())


def test_sender_is_told_why_a_file_is_not_kept(tmp_path: Path) -> None:
    """Both sides end at once, with the reason, and neither shows a path of the other."""
    (tmp_path / "f").write_bytes(CONTENT)
    _, failed = transfer(tmp_path / "f", tmp_path / "gone")
    assert sorted(map(str, failed)) == [
        "The other side has given up: No such file or directory.",
        f"f cannot be kept in {tmp_path / 'gone'}: No such file or directory.",
    ]


def test_reason_of_the_other_side_is_a_line() -> None:
    """It steers no terminal and fills none."""
    here, there = make_pipe()
    there.send(json.dumps({"done": False, "reason": "\x1b[2J" + " " * 1000 + "no"}))
    with pytest.raises(TransferError) as caught:
        read_reply(here)
    assert str(caught.value) == "The other side has given up: \ufffd[2J \u2026 no."


def refuse_link(part: Path, final: Path) -> None:
    """Do as FAT and exFAT do."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_file_gets_its_name_where_there_are_no_hard_links(tmp_path: Path) -> None:
    """Nothing is overwritten there either, and no partial file stays."""
    (tmp_path / "f.txt").write_text("mine")
    for number in (1, 2):
        part = tmp_path / ".part"
        part.write_bytes(CONTENT)
        final = files.put_in_place(part, tmp_path, "f.txt", refuse_link)
        assert final == tmp_path / f"f ({number}).txt"
        assert final.read_bytes() == CONTENT
    assert (tmp_path / "f.txt").read_text() == "mine"
    assert len([*tmp_path.iterdir()]) == 3
    # The partial file is gone: no empty file takes its place.
    with pytest.raises(FileNotFoundError):
        files.put_in_place(part, tmp_path, "g.txt", refuse_link)
    assert not (tmp_path / "g.txt").exists()


@pytest.mark.parametrize("taken", [
    files.MAX_SAME_NAMES - 1, files.MAX_SAME_NAMES, files.MAX_SAME_NAMES + 1])
def test_names_in_a_folder_end_somewhere(taken: int, tmp_path: Path) -> None:
    """A file gets the last name, and none beyond it."""
    names = itertools.count(1)

    def link(part: Path, final: Path) -> None:
        if next(names) <= taken:
            raise FileExistsError

    (tmp_path / ".part").touch()
    if taken < files.MAX_SAME_NAMES:
        assert files.put_in_place(tmp_path / ".part", tmp_path, "f", link).name == f"f ({taken})"
        return
    with pytest.raises(FileExistsError, match="too many files"):
        files.put_in_place(tmp_path / ".part", tmp_path, "f", link)


@pytest.mark.parametrize(("size", "says"), [
    (inbox.MAX_FILE_BYTES - 1, "bytes more than are free"),
    (inbox.MAX_FILE_BYTES, "bytes more than are free"),
    (inbox.MAX_FILE_BYTES + 1, "does not understand"),
])
def test_offer_has_a_size_that_there_may_be(size: int, says: str, tmp_path: Path) -> None:
    """A larger one is no offer."""
    _, error = receive_from({"file": "f", "size": size}, tmp_path)
    assert says in error


class Progress:
    """Keep how far a file is."""

    def __init__(self) -> None:
        self.seen_bytes: list[int] = []

    def __call__(self, done: int, size: int) -> None:
        """Take a step."""
        self.seen_bytes.append(done)


def test_progress_follows_each_acknowledgement_that_is_there() -> None:
    """The window is far from full: nobody waits, and nothing stands still."""
    here, there = make_pipe()
    size = 4 * files.BLOCK_BYTES
    acknowledged = [files.BLOCK_BYTES, 3 * files.BLOCK_BYTES]
    for got in acknowledged:
        there.send(json.dumps({"got": got}))
    progress = Progress()
    files.send_blocks(here, io.BytesIO(bytes(size)), 0, size, progress)
    assert progress.seen_bytes == [3 * files.BLOCK_BYTES] * 4


def test_sender_waits_when_its_window_is_full() -> None:
    """What a receiver's memory must hold is bounded."""
    here, there = make_pipe()
    for sent_bytes in (files.WINDOW_BYTES - 1, files.WINDOW_BYTES):
        assert files.take_acknowledgements(here, sent_bytes, 0, 2**30) == 0
    there.send(json.dumps({"got": 1}))
    assert files.take_acknowledgements(here, files.WINDOW_BYTES + 1, 0, 2**30) == 1
    here.came.put(None)
    with pytest.raises(NotConnectedError):
        files.take_acknowledgements(here, files.WINDOW_BYTES + 2, 1, 2**30)


def test_file_with_a_wrong_hash_is_not_kept(tmp_path: Path) -> None:
    """Both sides are told, and nothing stays, so that the next attempt begins anew."""
    told, error = receive_from(
        {"file": "f", "size": 7}, tmp_path, CONTENT, json.dumps({"sha256": "0" * 64})
    )
    assert told == [{"have": 0}, {"done": False}]
    assert error == "f arrived damaged; it is not kept."
    told, error = receive_from({"file": "f", "size": 8}, tmp_path, CONTENT, END)
    assert error == "f arrived damaged; it is not kept."
    _, error = receive_from({"file": "f", "size": 6}, tmp_path, CONTENT, END)
    assert error == "The other side sent more than it said."
    assert [*tmp_path.iterdir()] == []


# Three emoji that two joiners make one.
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
HOSTILE_NAMES = {
    "../../etc/passwd": "passwd",
    "/etc/passwd": "passwd",
    "..\\..\\boot.ini": "boot.ini",
    "..": "file",
    ".": "file",
    "": "file",
    "/": "file",
    ".bashrc": "bashrc",
    "...": "file",
    "a\nb\x1b[2Jc": "a\ufffdb\ufffd[2Jc",
    "a\0b": "a\ufffdb",
    "\ud800x": "\ufffdx",
    "e" * 199: "e" * 199,
    "e" * 200: "e" * 200,
    # A long name keeps its suffix.
    "e" * 196 + ".txt": "e" * 196 + ".txt",
    "e" * 197 + ".txt": "e" * 196 + ".txt",
    "e" * 197 + "." + "t" * 20: "e" * 197 + ".tt",
    "\u00fc" * 300: "\u00fc" * 100,
    "\u8cb7" * 67: "\u8cb7" * 66,
    "\u8cb7" * 67 + ".txt": "\u8cb7" * 65 + ".txt",
    "e" * 199 + "e\u0301": "e" * 199,
    "e" * 190 + FAMILY + ".jpg": "e" * 190 + ".jpg",
    "a" + " " * 300 + ".exe": "a .exe",
    "a\u2800\u3164\u00a0\tb": "a b",
    # Text of any script stays as it is.
    "10\u202fAM.png": "10\u202fAM.png",
    "\u0645\u06cc\u200c\u0634\u0648\u062f": "\u0645\u06cc\u200c\u0634\u0648\u062f",
    "\u0915\u094d\u200d\u0937": "\u0915\u094d\u200d\u0937",
    FAMILY: FAMILY,
    "\u2215etc\uff0fpasswd": "_etc_passwd",
    "  spaces  ": "spaces",
    "-rf": "rf",
    ". -rf": "rf",
    "-": "file",
    "\u202egpj.exe": "\ufffdgpj.exe",
    "CON/../x": "x",
    # What Windows reads otherwise.
    "C:evil.txt": "C_evil.txt",
    "C:\\evil.txt": "evil.txt",
    "f.txt::$DATA": "f.txt__$DATA",
    "a:b": "a_b",
    'a<b>c"d|e?f*g': "a_b_c_d_e_f_g",
    "x.": "x",
    "x. . ": "x",
    "x ": "x",
    "CON": "_CON",
    "con.tar.gz": "_con.tar.gz",
    "Aux .txt": "_Aux .txt",
    "com\u00b9": "_com\u00b9",
    "LPT9.": "_LPT9",
    "conin$": "_conin$",
    "CONSOLE.txt": "CONSOLE.txt",
    "com10": "com10",
    "nul:": "nul_",
}


@pytest.mark.parametrize(("name", "kept_as"), HOSTILE_NAMES.items())
def test_hostile_file_name_leads_nowhere_else(name: str, kept_as: str, tmp_path: Path) -> None:
    """The file is in the folder, under a name that shows what it is."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    _, error = receive_from({"file": name, "size": 7, "fingerprint": "x"}, folder, CONTENT, END)
    assert not error
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        f"a/b/{kept_as}"
    ]


def test_received_file_overwrites_nothing(tmp_path: Path) -> None:
    """Existing files, folders and links keep their names and what is in them."""
    (tmp_path / "f.txt").write_text("mine")
    (tmp_path / "f (1).txt").mkdir()
    (tmp_path / "f (2).txt").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        receive_from({"file": "f.txt", "size": 7}, tmp_path, CONTENT, END)
    assert (tmp_path / "f.txt").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "f (3).txt").read_bytes() == (tmp_path / "f (4).txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "control",
    [
        {},
        {"file": 7, "size": 7},
        {"file": "f"},
        {"file": "f", "size": -1},
        {"file": "f", "size": True},
        {"file": "f", "size": 1.5},
        {"file": "f", "size": "7"},
        {"file": "f", "size": 2**61},
    ],
)
def test_receiver_refuses_what_it_does_not_understand(
    control: dict[str, Any], tmp_path: Path
) -> None:
    """An offer of a wrong form leaves nothing."""
    told, error = receive_from(control, tmp_path, CONTENT, END)
    assert (told, error) == ([], "The other side sent what this program does not understand.")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "end", ["", "null", "[]", "7", "{", '"x"', "[" * 100_000], ids=lambda end: end[:5] or "empty"
)
def test_receiver_takes_any_end_for_a_failed_transfer(end: str, tmp_path: Path) -> None:
    """Rubbish in place of the hash is an error of the other side."""
    _, error = receive_from({"file": "f", "size": 7}, tmp_path, CONTENT, end)
    assert error == "The other side sent what this program does not understand."


@pytest.mark.parametrize(
    "reply", ["", "{}", '{"have": -1}', '{"have": 8}', '{"have": "0"}', '{"have": true}']
)
def test_sender_refuses_what_it_does_not_understand(reply: str, tmp_path: Path) -> None:
    """The position that the receiver claims is within the file."""
    here, there = make_pipe()
    (tmp_path / "f").write_bytes(CONTENT)
    there.send(reply)
    with pytest.raises(TransferError, match="does not understand"):
        files.send_file(here, tmp_path / "f", Teller(as_json=True))
    assert here.sent_bytes == 0


# -- What is let in ----------------------------------------------------------------------


class Asked:
    """Answer questions, and keep them."""

    def __init__(self, *answers: tuple[bool, bool]) -> None:
        self.answers = [*answers]
        self.questions: list[str] = []

    def __call__(self, question: str) -> tuple[bool, bool]:
        """Give the next answer."""
        self.questions.append(question)
        return self.answers.pop(0)


YES, NO, ALL = (True, False), (False, False), (True, True)


def offer_of(name: str, size: int = 7) -> dict[str, Any]:
    """Return what a sender says first of a file."""
    return {"file": name, "size": size, "fingerprint": name}


def test_file_comes_only_if_the_user_wants_it(tmp_path: Path) -> None:
    """A no leaves nothing, and the sender is told; a yes is good for one file."""
    asked = Asked(YES, NO)
    into = inbox_of(tmp_path, ask=asked, wants_all=False)
    _, error = receive_from(offer_of("one"), into, CONTENT, END)
    assert not error
    told, error = receive_from(offer_of("two"), into, CONTENT, END)
    assert told == [{"done": False, "reason": "it is not wanted"}]
    assert error == "two is not received: it is not wanted."
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert asked.questions == [
        "one\nReceive 7 bytes, from Alice? [y/N/all] ",
        "two\nReceive 7 bytes, from Alice? [y/N/all] ",
    ]


def test_user_who_wants_all_is_asked_once(tmp_path: Path) -> None:
    """The limits stay."""
    asked = Asked(ALL)
    into = inbox_of(tmp_path, ask=asked, wants_all=False, max_bytes=20)
    for name in ("one", "two"):
        assert receive_from(offer_of(name), into, CONTENT, END)[1] == ""
    assert "may still come" in receive_from(offer_of("three"), into, CONTENT, END)[1]
    assert len(asked.questions) == 1


FORGED = "Receive 3 bytes, from Bob? [y\u2215N\u2215all]"


@pytest.mark.parametrize(("name", "line"), [
    ("\r\x1b[2KReceive 1 bytes", "\ufffd\ufffd[2KReceive 1 bytes"),
    (f"a.jpg{' ' * 200}{FORGED}", "a.jpg Receive 3 bytes, from Bob_ [y_N_all]"),
    (f"a.jpg{' ' * 9}{FORGED}", "a.jpg Receive 3 bytes, from Bob_ [y_N_all]"),
    ("e" * 59, "e" * 59),
    ("e" * 60, "e" * 60),
    ("e" * 61, "e" * 39 + "\u2026" + "e" * 20),
])
def test_name_of_an_offer_cannot_rewrite_the_question(
    name: str, line: str, tmp_path: Path,
) -> None:
    """It has a line of its own, fills no second one, and the question follows it."""
    asked = Asked(NO)
    into = inbox_of(tmp_path, ask=asked, wants_all=False)
    receive_from(offer_of(name, 2**40), into)
    assert asked.questions == [
        f"{line}\nReceive 1,099,511,627,776 bytes, from Alice? [y/N/all] "]


@pytest.mark.parametrize(("max_bytes", "comes"), [(13, False), (14, True), (15, True)])
def test_all_files_together_have_at_most_so_many_bytes(
    max_bytes: int, comes: bool, tmp_path: Path,
) -> None:
    """What is too much is refused before a byte of it comes."""
    into = inbox_of(tmp_path, max_bytes=max_bytes)
    assert receive_from(offer_of("one"), into, CONTENT, END)[1] == ""
    told, error = receive_from(offer_of("two"), into, CONTENT, END)
    assert (error == "") is comes
    assert (tmp_path / "two").exists() is comes
    if not comes:
        reason = "7 bytes are more than the 6 that may still come"
        assert told == [{"done": False, "reason": reason}]
        assert error == f"two is not received: {reason}. --max-bytes sets how much may come."


@pytest.mark.parametrize("before", [
    inbox.MAX_FILES - 1, inbox.MAX_FILES, inbox.MAX_FILES + 1])
def test_one_command_receives_so_many_files(before: int, tmp_path: Path) -> None:
    """Empty files cost none of the bytes, and fill a folder too."""
    accepted = {inbox.Offer(str(number), 0, "") for number in range(before)}
    offer = inbox_of(tmp_path).read_offer(offer_of("one"))
    refusal = inbox_of(tmp_path, accepted=accepted).refusal(offer)
    assert (refusal is None) is (before < inbox.MAX_FILES)


def test_connection_that_breaks_costs_no_second_question_and_no_bytes(tmp_path: Path) -> None:
    """The same file of the same command was let in already."""
    asked = Asked(YES)
    into = inbox_of(tmp_path, ask=asked, wants_all=False, max_bytes=7)
    with pytest.raises(NotConnectedError):
        receive_until_break(offer_of("one"), into, CONTENT[:3])
    told, error = receive_from(offer_of("one"), into, CONTENT[3:], END)
    assert (told, error) == ([{"have": 3}, {"done": True}], "")
    assert (tmp_path / "one").read_bytes() == CONTENT


def receive_until_break(offer: dict[str, Any], into: Inbox, *blocks: bytes) -> None:
    """Let a connection break in the middle of a file; raise NotConnectedError."""
    here, there = make_pipe()
    for block in blocks:
        here.send(block)
    there.came.put(None)
    files.receive_file(there, into, offer, Teller(as_json=True))


def test_partial_file_is_offered_again_and_a_no_removes_it(tmp_path: Path) -> None:
    """The question says what is there."""
    asked = Asked(YES, NO)
    with pytest.raises(NotConnectedError):
        receive_until_break(
            offer_of("one"), inbox_of(tmp_path, ask=asked, wants_all=False), CONTENT[:3])
    assert len([*tmp_path.iterdir()]) == 1
    receive_from(offer_of("one"), inbox_of(tmp_path, ask=asked, wants_all=False))
    assert asked.questions[1] == (
        "one\nReceive 7 bytes, of which 3 are there, from Alice? [y/N/all] ")
    assert [*tmp_path.iterdir()] == []


def test_nobody_goes_on_with_the_partial_file_of_another(tmp_path: Path) -> None:
    """Mallory who offers the same file learns nothing of Alice's, and destroys nothing."""
    with pytest.raises(NotConnectedError):
        receive_until_break(offer_of("one"), inbox_of(tmp_path), CONTENT[:3])
    told, _ = receive_from(
        offer_of("one"), inbox_of(tmp_path, contact="Mallory"), b"", json.dumps({"sha256": ""}))
    assert told == [{"have": 0}, {"done": False}]
    told, _ = receive_from(offer_of("one"), inbox_of(tmp_path), CONTENT[3:], END)
    assert told == [{"have": 3}, {"done": True}]


@pytest.mark.parametrize(("age_s", "stays"), [
    (inbox.PART_AGE_S - 1, True), (inbox.PART_AGE_S, True), (inbox.PART_AGE_S + 1, False)])
def test_partial_file_that_nobody_goes_on_with_is_removed(
    age_s: float, stays: bool, tmp_path: Path,
) -> None:
    """Files of other programs stay, whatever their age."""
    part = inbox_of(tmp_path).part(inbox.Offer("f", 7, "0123456789abcdef"))
    for path in (part, tmp_path / "f", tmp_path / ".f.part"):
        path.touch()
        os.utime(path, (1_000_000_000, 1_000_000_000))
    removed = inbox_of(tmp_path).remove_old_parts(1_000_000_000 + age_s)
    assert part.exists() is stays
    assert (removed == []) is stays
    assert (tmp_path / "f").exists()
    assert (tmp_path / ".f.part").exists()


def test_partial_file_is_no_link_to_another(tmp_path: Path) -> None:
    """In a shared folder somebody else may put one where the partial file will be."""
    (tmp_path / "mine").write_bytes(b"abc")
    into = inbox_of(tmp_path)
    into.part(into.read_offer(offer_of("one"))).symlink_to(tmp_path / "mine")
    _, error = receive_from(offer_of("one"), into, CONTENT, END)
    assert error.startswith(f"one cannot be kept in {tmp_path}: ")
    assert (tmp_path / "mine").read_bytes() == b"abc"


# Of any file that this process writes, for the time of a test.
WRITABLE_BYTES = 8 * 2**20


def test_full_disk_is_told_and_the_rest_comes_once_there_is_room(tmp_path: Path) -> None:
    """The disk was large enough when the file was offered."""
    (tmp_path / "to").mkdir()
    path = tmp_path / "large"
    path.write_bytes(random.Random(7).randbytes(WRITABLE_BYTES + 1_000_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITABLE_BYTES, limits[1]))
    try:
        _, failed = transfer(path, tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(map(str, failed)) == [
        "The other side has given up: File too large.",
        f"large cannot be kept in {tmp_path / 'to'}: File too large.",
    ]
    pipe, failed = transfer(path, tmp_path / "to")
    assert (failed, pipe.sent_bytes) == ([], 1_000_000)
    assert (tmp_path / "to" / "large").read_bytes() == path.read_bytes()
