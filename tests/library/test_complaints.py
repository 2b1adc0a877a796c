"""Complaints: each is logged once, and belongs to a contact or a relay, or to nobody."""

from __future__ import annotations

import pytest

from connectoid.clock import boot_time_s
from connectoid.complaints import MAX_COMPLAINTS, MAX_TOLD, TOLD_S, Complaints

ALICE_S_RELAY = "https://alice.example/"
BOB_S_RELAY = "https://bob.example/"


def test_latest_complaint_is_that_of_whom_it_is_about() -> None:
    """Two contacts may have the same trouble, which is logged once."""
    complaints = Complaints()
    complaints.make("It is dead.", ALICE_S_RELAY)
    complaints.make("It is busy.", 1)
    complaints.make("It is busy.", 2)
    complaints.make("The disk is full.")
    complaints.make("It is gone.", BOB_S_RELAY)
    assert complaints.latest_since(0.0, [1, ALICE_S_RELAY]) == "It is busy."
    assert complaints.latest_since(0.0, [2]) == "It is busy."
    assert complaints.latest_since(0.0, [3, ALICE_S_RELAY]) == "It is dead."
    assert complaints.latest_since(0.0, [1, BOB_S_RELAY]) == "It is gone."
    assert complaints.latest_since(0.0, [3]) == ""


def test_complaint_of_long_ago_is_not_that_of_a_wait() -> None:
    complaints = Complaints()
    complaints.make("It is dead.", 1)
    assert complaints.latest_since(boot_time_s(), [1]) == "It is dead."
    assert complaints.latest_since(boot_time_s() + 3_600, [1]) == ""


@pytest.mark.parametrize(
    ("others", "logged", "found"),
    [
        (MAX_COMPLAINTS - 2, 1, "It is dead."),
        (MAX_COMPLAINTS - 1, 1, "It is dead."),
        (MAX_COMPLAINTS, 2, ""),
    ],
)
def test_hundred_complaints_are_remembered(
    caplog: pytest.LogCaptureFixture, others: int, logged: int, found: str
) -> None:
    complaints = Complaints()
    complaints.make("It is dead.", -1)
    for number in range(others):
        complaints.make(f"{number} is dead.", number)
    assert complaints.latest_since(0.0, [-1]) == found
    complaints.make("It is dead.", -1)
    assert caplog.messages.count("It is dead.") == logged


def test_of_ever_new_words_about_one_relay_ten_are_logged_in_an_hour(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The latest is known nevertheless."""
    now_s = 0.0
    monkeypatch.setattr("connectoid.complaints.boot_time_s", lambda: now_s)
    complaints = Complaints()
    for number in range(MAX_TOLD + 1):
        complaints.make(f"{number}", ALICE_S_RELAY)
    complaints.make("another relay", BOB_S_RELAY)
    assert complaints.latest_since(0.0, [ALICE_S_RELAY]) == f"{MAX_TOLD}"
    now_s = TOLD_S
    complaints.make("an hour later", ALICE_S_RELAY)
    first = [f"{number}" for number in range(MAX_TOLD)]
    assert caplog.messages == [*first, "another relay", "an hour later"]
