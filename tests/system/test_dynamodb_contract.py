"""Hold the DynamoDB store to the contract that test_relay.py has for every store."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import cast

import pytest
from harness import Engine

import test_relay
from connectoid_relay import Store

engines = pytest.importorskip("engines", reason="boto3 is missing: pip install -e '.[test]'")
dynamodb_store = pytest.importorskip("dynamodb_store")

pytestmark = pytest.mark.slow

# The contract is every test there that takes a `store`; here it gets the one below.
globals().update({
    name: test for name, test in vars(test_relay).items()
    if name.startswith("test_") and "store" in inspect.signature(test).parameters
})


@pytest.fixture
def store(engine: Engine) -> Iterator[Store]:
    """Return an empty table on each engine, as a store that is as exact as SQLite's."""
    client = engines.client_of(engine.url)
    table = engines.new_name()
    dynamodb_store.create_table(client, table)
    store = dynamodb_store.DynamoDbStore(table, client, bucket_width_us=lambda _ttl_us: 1)
    yield cast(Store, store)
    store.close()
