"""Two people with the command line, where one packet in twenty is lost in each direction."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Line, lacking, open_lab
from people import Person, pair, send_file

pytestmark = pytest.mark.slow

# At home, with a poor Wi-Fi. This seed once lost the last message of a pairing.
POOR = Line(delay_ms=20, loss=0.05, seed=101)
FILE_BYTES = 500_000


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Lend a lab, or skip the test."""
    if lacking():
        pytest.skip(lacking())
    with open_lab(tmp_path) as lab:
        yield lab


def test_people_connect_and_a_file_arrives_over_a_line_that_loses_packets(lab: Lab) -> None:
    alice = Person(lab, "Alice", lab.home(line=POOR).host())
    bob = Person(lab, "Bob", lab.home().host())
    print(f"5 % lost: connected after {pair(alice, bob):.1f} s")
    path = lab.folder / "file.bin"
    path.write_bytes(os.urandom(FILE_BYTES))
    (lab.folder / "inbox").mkdir()
    sends, receives = send_file(alice, bob, path)
    sent = sends.wait_for("sent")
    assert receives.wait_for("received").told["sha256"] == sent.told["sha256"]
    assert (lab.folder / "inbox" / "file.bin").read_bytes() == path.read_bytes()
