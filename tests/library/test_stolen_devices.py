"""A thief has a copy of Alice's store and runs it, with the same relay, while she renews."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from apps import SOON_S, Apps, make_record, store_of, until

import connectoid.cli
from connectoid import Connectoid, NotConnectedError, Store, UsageError


def told(apps: Apps, who: str, name: str, event: str) -> bool:
    """Return whether an app was told an event."""
    return (who, name, event) in apps.told


def steal(apps: Apps, url: str) -> tuple[Connectoid, Connectoid, Connectoid]:
    """Return the apps of Alice and of Bob, and one with a copy of Alice's store."""
    alice, bob = apps.pair(url)
    alice.close()
    for path in apps.folder.glob("Alice.db*"):
        shutil.copy(path, apps.folder / path.name.replace("Alice", "Thief"))
    return apps.begin("Alice", url), bob, apps.begin("Thief", url)


def test_thief_is_shut_out_by_a_renewal_and_cannot_end_the_contact(
    apps: Apps, relay_url: str
) -> None:
    alice, bob, thief = steal(apps, relay_url)
    assert alice.renew_and_tell("Bob", SOON_S)
    until(lambda: told(apps, "Alice", "Bob", "renewed"), "Alice is told")
    until(lambda: told(apps, "Bob", "Alice", "contact_renewed"), "Bob is told")
    assert thief.unshare_and_tell("Bob", SOON_S)
    until(lambda: bob.refusals("Alice").get("replaced"), "what the thief says is refused")
    assert bob.contacts()[0].state == "paired"
    channel = alice.connect("Bob", SOON_S)
    channel.send("still here")
    assert bob.connect("Alice", SOON_S).receive(SOON_S) == "still here"


def test_both_renew_at_once(apps: Apps, relay_url: str) -> None:
    alice, bob = apps.pair(relay_url)
    alice.renew("Bob")
    bob.renew("Alice")
    for app, name in ((alice, "Bob"), (bob, "Alice")):
        assert app.renew_and_tell(name, SOON_S)
    mine, theirs = alice.contacts()[0], bob.contacts()[0]
    assert (mine.contact, theirs.contact) == (theirs.signer, mine.signer)


def test_renewal_that_is_not_answered_goes_on_after_a_restart(
    apps: Apps, relay_url: str
) -> None:
    alice, bob = apps.pair(relay_url)
    bob.close()
    assert not alice.renew_and_tell("Bob", 0.1)
    signer = alice.contacts()[0].signer
    with pytest.raises(UsageError, match="not answered"):
        alice.renew("Bob")
    alice.close()
    alice, bob = apps.begin("Alice", relay_url), apps.begin("Bob", relay_url)
    assert alice.renew_and_tell("Bob", SOON_S)
    assert bob.contacts()[0].contact == alice.contacts()[0].signer == signer


def test_wait_for_a_renewal_ends_with_the_contact(apps: Apps, relay_url: str) -> None:
    alice, bob = apps.pair(relay_url)
    alice.close()
    assert bob.unshare_and_tell("Alice", SOON_S)
    alice = apps.begin("Alice")
    with pytest.raises(NotConnectedError, match="ended the sharing"):
        alice.renew_and_tell("Bob", SOON_S)


def test_who_has_ended_a_contact_keeps_no_key_once_the_other_has_heard_it(
    apps: Apps, relay_url: str
) -> None:
    alice, bob = apps.pair(relay_url)
    bob.close()
    assert alice.unshare_and_tell("Bob", SOON_S)
    alice.close()
    apps.begin("Bob", relay_url)
    until(lambda: told(apps, "Bob", "Alice", "unshared"), "Bob is told")
    apps.begin("Alice", relay_url)
    with contextlib.closing(Store(apps.folder / "Alice.db", lock=False)) as store:
        until(lambda: not store.load(), "nothing is left")


def test_cli_renews_and_says_what_is_not_answered_yet(
    apps: Apps, relay_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alice, bob = apps.pair(relay_url)
    alice.close()
    bob.close()
    store = ["--store", str(tmp_path / "Alice.db")]
    command = ["renew", "Bob", *store, "--timeout", "0.1"]
    for words in ("Telling Bob", "Bob has not answered the last renewal yet"):
        assert connectoid.cli.main(command) == 1
        said, errors = capsys.readouterr()
        assert (said, words in errors) == ("", True)
        assert f"connectoid renew Bob --store {tmp_path / 'Alice.db'}" in errors
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert "\tshared, renewal not answered yet\t" in capsys.readouterr().out
    apps.begin("Bob", relay_url)
    assert connectoid.cli.main(["renew", "Bob", *store, "--timeout", str(SOON_S)]) == 0
    assert "takes nothing any more from copies of this device" in capsys.readouterr().err
    assert connectoid.cli.main(["contacts", *store]) == 0
    assert "\tshared\t" in capsys.readouterr().out


def test_cli_renews_nothing_before_both_know_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record()
    store_of(tmp_path / "s.db", record).close()
    assert connectoid.cli.main(["renew", "Bob", "--store", str(tmp_path / "s.db")]) == 2
    assert "once both know each other" in capsys.readouterr().err
    with contextlib.closing(Store(tmp_path / "s.db")) as store:
        assert list(store.load().values()) == [record]
