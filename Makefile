# make check: all that a change has to pass. make quick: what to run while writing.

PYTHON ?= python3
BIN = .venv/bin

check: check-style
	$(BIN)/pytest

quick: .venv/ready
	$(BIN)/pytest -m "not slow"

check-style: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy --strict connectoid_relay.py conftest.py test_relay.py test_hosting.py test_deploy.py systemd bench

.venv/ready: setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

.PHONY: check check-style clean quick
