"""What is refused is counted by reason, told, and written down; a flood of it costs little."""

from __future__ import annotations

import collections
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from apps import NOWHERE, make_record, store_of

import connectoid.cli
from connectoid import REASONS, ROUTINE, Store, StoreError
from connectoid.cli.contacts import ROUTINE_WORDS
from connectoid.complaints import Complaints
from connectoid.limits import TELL_EVERY_S
from connectoid.refusals import WRITTEN_EVERY_S, Refusals


class Machine:
    """What a contact has refused."""

    def __init__(self, **dropped: int) -> None:
        self.dropped = collections.Counter(dropped)


class CountingStore(Store):
    """Count the writes; they fail if they should."""

    writes = 0
    is_full = False

    def save_refusals(self, number: int, counts: collections.abc.Mapping[str, int]) -> None:
        """Write, or fail."""
        self.writes += 1
        if self.is_full:
            raise StoreError("The store cannot be written: full.")
        super().save_refusals(number, counts)


@pytest.fixture
def store() -> Iterator[CountingStore]:
    """Return a store with one contact."""
    made = CountingStore(":memory:")
    assert made.add(make_record("Bob", NOWHERE)) == 1
    yield made
    made.close()


def test_every_reason_is_counted_told_and_written(store: CountingStore) -> None:
    """Copies of a message are routine: they are counted, and nobody is told."""
    for reason in REASONS:
        refusals = Refusals(store, Complaints())
        before = refusals.counts(1).get(reason, 0)
        assert refusals.note(1, Machine(**{reason: 2}), 0) is (reason not in ROUTINE)
        assert refusals.counts(1)[reason] == before + 2
    assert store.load_refusals() == {1: dict.fromkeys(REASONS, 2)}


def test_flood_of_refusals_costs_an_event_a_reason_and_a_write(store: CountingStore) -> None:
    """The counts are whole in the end."""
    refusals, machine = Refusals(store, Complaints()), Machine()
    told = 0
    for number in range(5_000):
        machine.dropped.update(REASONS.keys())
        told += refusals.note(1, machine, number / 100)
    # All reasons were new in the first step.
    assert (told, store.writes) == (1, 1)
    refusals.write_all(50)
    assert store.load_refusals() == {1: dict.fromkeys(REASONS, 5_000)}
    refusals.write_all(51)
    assert store.writes == 2


@pytest.mark.parametrize(("after_s", "told"), [
    (TELL_EVERY_S - 1, False), (TELL_EVERY_S, True), (TELL_EVERY_S + 1, True)])
def test_reason_is_told_again_after_an_hour(
    after_s: float, told: bool, store: CountingStore,
) -> None:
    """Another reason is told at once."""
    refusals, machine = Refusals(store, Complaints()), Machine(ahead=1)
    assert refusals.note(1, machine, 0)
    machine.dropped["sdp"] += 1
    assert refusals.note(1, machine, 1)
    machine.dropped["ahead"] += 1
    assert refusals.note(1, machine, after_s) is told
    assert not refusals.note(1, machine, after_s)


@pytest.mark.parametrize(("after_s", "writes"), [
    (WRITTEN_EVERY_S - 1, 1), (WRITTEN_EVERY_S, 2), (WRITTEN_EVERY_S + 1, 2)])
def test_counts_are_written_once_a_minute(
    after_s: float, writes: int, store: CountingStore,
) -> None:
    """Also if nothing more is refused."""
    refusals, machine = Refusals(store, Complaints()), Machine(seal=1)
    refusals.note(1, machine, 0)
    machine.dropped["seal"] += 1
    refusals.note(1, machine, 1)
    refusals.note(1, machine, after_s)
    assert store.writes == writes
    assert store.load_refusals() == {1: {"seal": writes}}


def test_machine_that_was_made_anew_goes_on_counting(store: CountingStore) -> None:
    """It begins at 0, as after a step that failed."""
    refusals = Refusals(store, Complaints())
    refusals.note(1, Machine(sdp=3), 0)
    refusals.note(1, Machine(sdp=2), 1)
    assert refusals.counts(1) == {"sdp": 5}


def test_full_disk_costs_the_counts_alone(store: CountingStore) -> None:
    """It is tried again after a minute, and is no error of the step."""
    refusals, machine = Refusals(store, Complaints()), Machine(sdp=3)
    store.is_full = True
    assert refusals.note(1, machine, 0)
    assert not refusals.note(1, machine, 1)
    assert store.writes == 1
    store.is_full = False
    refusals.note(1, machine, WRITTEN_EVERY_S)
    assert store.load_refusals() == {1: {"sdp": 3}}


def test_counts_of_a_deleted_contact_are_gone(store: CountingStore) -> None:
    """A late write brings none back."""
    refusals = Refusals(store, Complaints())
    refusals.note(1, Machine(sdp=3), 0)
    store.delete(1)
    assert store.load_refusals() == {}
    refusals.note(1, Machine(sdp=3), WRITTEN_EVERY_S)
    assert store.load_refusals() == {}
    refusals.forget(1)
    assert refusals.counts(1) == {}


@pytest.mark.slow
@pytest.mark.parametrize("passphrase", [None, "secret"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"7", b'{"sdp": []}', b"\xff" * 40])
def test_damaged_counts_keep_no_store_from_being_opened(
    damage: bytes, passphrase: str | None, tmp_path: Path,
) -> None:
    """They are left out, and replaced by the next."""
    path = tmp_path / "s.db"
    store = Store(path, passphrase)
    store.add(make_record("Bob", NOWHERE))
    store.save_refusals(1, {"sdp": 7})
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        (kept,) = db.execute("SELECT counts FROM refusals").fetchone()
        assert (b"sdp" in kept) is (passphrase is None)
        db.execute("UPDATE refusals SET counts = ?", (damage,))
    store = Store(path, passphrase)
    assert store.load_refusals() == {}
    assert list(store.load()) == [1]
    store.save_refusals(1, {"sdp": 8})
    assert store.load_refusals() == {1: {"sdp": 8}}
    store.close()


def test_contacts_with_verbose_show_what_was_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """How often, and why."""
    store = store_of(tmp_path / "s.db", make_record("Bob", NOWHERE))
    store.save_refusals(1, {"sdp": 1_234, "ahead": 1, "replay": 40, "replaced": 3})
    store.close()
    argv = ["contacts", "--store", str(tmp_path / "s.db")]
    assert connectoid.cli.main(argv) == 0
    assert capsys.readouterr().out == "Bob\tnot opened yet\t-\n"
    assert connectoid.cli.main([*argv, "--verbose"]) == 0
    assert capsys.readouterr().out == (
        "Bob\tnot opened yet\t-\n"
        f"    refused as ahead: 1 ({REASONS['ahead']})\n"
        f"    refused as sdp: 1,234 ({REASONS['sdp']})\n"
        f"    normal: 3 {ROUTINE_WORDS['replaced']}\n"
        f"    normal: 40 {ROUTINE_WORDS['replay']}\n")
    assert connectoid.cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["refused"] == {"ahead": 1, "sdp": 1_234}
    assert told["routine"] == {"replay": 40, "replaced": 3}


def test_everything_routine_has_words() -> None:
    assert ROUTINE_WORDS.keys() == ROUTINE
