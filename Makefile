# make check: all that a change has to pass. make quick: what to run while writing.

PYTHON ?= python3
BIN = .venv/bin

check: check-style
	$(BIN)/pytest

quick: .venv/ready
	$(BIN)/pytest -m "not slow"

check-style: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy --strict connectoid_relay.py connectoid.py connectoid_admin.py connectoid_cli.py conftest.py cross_peer.py test_admin.py test_browser.py test_relay.py test_hosting.py test_deploy.py test_fuzz.py test_connectoid.py test_library.py test_simulation.py test_vectors.py deploy examples vectors systemd bench

.venv/ready: setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# The relay beside other servers; those that are missing are skipped. About 4 minutes.
bench: .venv/ready
	$(BIN)/pip install --quiet --editable '.[bench]'
	-npm install --silent --no-package-lock --prefix bench
	$(BIN)/python bench/compare.py

# The ratios that can be had with nothing but Python and the relay's package. Half a minute.
bench-quick: .venv/ready
	$(BIN)/python bench/compare.py --quick

# The installer in a clean Debian made by debootstrap, booted where systemd-nspawn can. Two to four minutes, as root; leaves nothing behind.
install-test:
	sh deploy/install_test.sh

clean:
	rm -rf .venv bench/node_modules build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

.PHONY: bench bench-quick check check-style clean install-test quick
