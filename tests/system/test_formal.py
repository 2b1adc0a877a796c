"""Run the models of docs/formal: those for Spin, and those for ProVerif where somebody has it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT, needs

FORMAL = ROOT / "docs" / "formal"
PROVERIF = shutil.which("proverif")
# The figures at the end of ProVerif's names are not the same in every version.
NUMBERED_NAME = re.compile(r"_\d+\b")
# A claim takes seconds. This is for a busy machine.
TIMEOUT_S = 300


class Claim(NamedTuple):
    """What a model for Spin claims, and whether it is true."""

    model: str
    # The name of a formula, or nothing for the assertions.
    formula: str
    definitions: tuple[str, ...]
    is_true: bool


CLAIMS = (
    Claim("rotation", "reachable", (), is_true=True),
    Claim("rotation", "meets", (), is_true=True),
    Claim("rotation", "meets", ("CHANGES=2", "CHANGES_OF_OTHER=0"), is_true=True),
    Claim("rotation", "reachable", ("CHANGES=2",), is_true=True),
    Claim("rotation", "meets", ("CHANGES=2",), is_true=True),
    # Why ROTATE-4 keeps all replaced addresses: docs/formal/README.md.
    Claim("rotation", "reachable", ("CHANGES=2", "KEEPS_ONE"), is_true=False),
    Claim("rotation", "meets", ("CHANGES=2", "KEEPS_ONE"), is_true=False),
    Claim("renewal", "understood", (), is_true=True),
    Claim("renewal", "agree", (), is_true=True),
    # Why the contact's key is no part of a proof (RENEW-4), and a renewal waits for RENEW-7.
    Claim("renewal", "agree", ("PROVES_FOR_CONTACT",), is_true=False),
    Claim("renewal", "understood", ("ANYWHERE",), is_true=False),
    Claim("renewal", "shut", ("THIEF",), is_true=True),
    Claim("renewal", "told", ("THIEF",), is_true=True),
    Claim("renewal", "shows", ("THIEF",), is_true=True),
    # What is not promised: the first one wins, and a thief can keep a renewal from counting.
    Claim("renewal", "untaken", ("THIEF",), is_true=False),
    Claim("renewal", "agree", ("THIEF",), is_true=False),
    # Why the old key counts no more (RENEW-8), and an answer completes a renewal (RENEW-7).
    Claim("renewal", "shut", ("THIEF", "OLD_KEY_COUNTS"), is_true=False),
    Claim("renewal", "told", ("THIEF", "BY_ADDRESS"), is_true=False),
    Claim("thief", "heard", (), is_true=True),
    # Why former addresses stay for a month (ROTATE-3), and a rotation counts from use (ROTATE-6).
    Claim("thief", "heard", ("AT_ONCE",), is_true=False),
    Claim("thief", "heard", ("AT_ONCE", "STAYS"), is_true=True),
    Claim("thief", "heard", ("AT_ONCE", "STAYS", "FROM_MAKING"), is_true=False),
    Claim("seq", "", (), is_true=True),
    Claim("seq", "", ("WITHOUT_LIMIT",), is_true=False),
)


def run(directory: Path, *command: str) -> str:
    """Return what a program prints; fail if it fails."""
    finished = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def explore(directory: Path, claim: Claim) -> str:
    """Return what Spin's verifier prints of a claim."""
    definitions = [f"-D{definition}" for definition in claim.definitions]
    run(directory, "spin", *definitions, "-a", str(FORMAL / f"{claim.model}.pml"))
    run(directory, "gcc", "-O2", "-w", "-DCOLLAPSE", "-o", "pan", "pan.c")
    flags = ["-m1000000"]
    if claim.formula:
        # Weak fairness: a side that can always go on does so some time.
        flags += ["-a", "-f", "-N", claim.formula]
    return run(directory, "./pan", *flags)


@pytest.mark.slow
@needs("spin", "gcc")
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: "-".join(map(str, claim[:-1])))
def test_models_for_spin_hold_and_fail_as_the_page_says(claim: Claim, tmp_path: Path) -> None:
    printed = explore(tmp_path, claim)
    assert "max search depth too small" not in printed
    assert "Search not completed" not in printed or not claim.is_true
    assert ("errors: 0" in printed) is claim.is_true


def recorded() -> dict[str, list[str]]:
    """Return the results of each run of ProVerif: the model and its scenario, then lines."""
    results: dict[str, list[str]] = {}
    for paragraph in re.split(r"(?m)^(?=\w)", (FORMAL / "results.txt").read_text())[1:]:
        name, *lines = paragraph.splitlines()
        results[name] = [line.strip() for line in lines]
    return results


def libraries(model: str, scenario: str) -> list[str]:
    """Return the files that go before a model."""
    names = ["connectoid.pvl"]
    if model == "pairing":
        names.append("pairing.pvl")
    if scenario:
        names.append(f"scenarios/{scenario}.pvl")
    return [part for name in names for part in ("-lib", name)]


@pytest.mark.slow
@pytest.mark.skipif(PROVERIF is None, reason="no proverif here, and none in Debian 12")
@pytest.mark.parametrize("name", recorded())
def test_models_for_proverif_give_the_recorded_results(name: str) -> None:
    model, _, scenario = name.partition(" ")
    printed = run(FORMAL, str(PROVERIF), *libraries(model, scenario), f"{model}.pv")
    results = [
        NUMBERED_NAME.sub("", line) for line in printed.splitlines() if line.startswith("RESULT")
    ]
    assert results == recorded()[name]


def test_every_scenario_has_recorded_results() -> None:
    scenarios = {name.partition(" ")[2] for name in recorded()} - {""}
    assert scenarios == {path.stem for path in (FORMAL / "scenarios").glob("*.pvl")}
