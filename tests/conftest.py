"""Hand the harness's fixtures to all tests in these folders, and set the watch for all tests."""

import hypothesis
import pytest
import watch
from admin_harness import beside, path
from apps import apps, relay_url
from fake_wire import toy, world
from harness import (
    alice,
    bob,
    clock,
    dynalite_url,
    engine,
    folder,
    make,
    port,
    relay,
    start,
    unmute_children,
)

__all__ = [
    "alice", "apps", "beside", "bob", "clock", "dynalite_url", "engine", "folder", "make",
    "path", "port", "relay", "relay_url", "start", "toy", "world",
]

# Of inputs, for each test that makes them up: while writing, and otherwise.
FEW_EXAMPLES = 50
MANY_EXAMPLES = 500


def pytest_configure(config: pytest.Config) -> None:
    """Register the watch, here and not in a list of plugins, since these folders are no root.

    It chooses how many inputs the tests make up that do not say it themselves.
    """
    unmute_children()
    config.pluginmanager.register(watch)
    examples = MANY_EXAMPLES
    if "not slow" in config.option.markexpr:
        examples = FEW_EXAMPLES
    hypothesis.settings.register_profile(
        "examples", derandomize=True, deadline=None, database=None, max_examples=examples,
        suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis.settings.load_profile("examples")
