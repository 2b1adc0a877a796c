"""What hostile contacts, readers of a link and lying relays do to a real runner stays in bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz_runner import MUTATOR, SEEDS, Theatre, try_runner
from hypothesis import HealthCheck, given, settings


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    """Return what runs the scripts; at the end the process must not have grown."""
    made = Theatre()
    yield made
    made.close()


@pytest.mark.parametrize("name", SEEDS)
def test_script_stays_in_bounds_and_honest_contacts_get_through(
    name: str, theatre: Theatre
) -> None:
    try_runner(SEEDS[name], theatre)


def test_mutated_scripts_stay_in_bounds(theatre: Theatre) -> None:
    @settings(derandomize=True, deadline=None, max_examples=150, database=None,
              suppress_health_check=list(HealthCheck))
    @given(MUTATOR.strategy(list(SEEDS.values())))
    def attempt(octets: bytes) -> None:
        try_runner(octets, theatre)

    attempt()
