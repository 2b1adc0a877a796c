"""Let relays live longer beside the model of test_relay.py than that file has time for."""

from __future__ import annotations

import pytest

from test_relay import live


@pytest.mark.slow
def test_relay_replies_as_the_model_does_in_long_lives() -> None:
    live(examples=200, steps=50)
