# make check: all that a change has to pass.
# make quick: what to run while writing; no sockets, no programs, half a minute of CPU.

PYTHON ?= python3
BIN = .venv/bin
# What runs on other systems than Linux: README.md, "Connectoid". The tests and deploy/ do not.
ON_WINDOWS = connectoid examples
ON_MACOS = $(ON_WINDOWS) connectoid_relay.py connectoid_admin.py test_relay.py vectors

check: check-style
	$(BIN)/pytest

quick: .venv/ready
	$(BIN)/pytest -m "not slow and not sockets"

check-style: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin $(ON_MACOS)
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 $(ON_WINDOWS)

.venv/ready: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
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

# The installer, and the commands of docs/hosting.md, in a clean Debian made by debootstrap,
# booted by systemd-nspawn where that can be had.
# Three to six minutes, as root; leaves nothing behind.
install-test:
	sh deploy/install_test.sh

# The quick tests, and two people who pair, on the Pythons of other Debians, as root.
# The newest are previews: they are told, and fail nothing.
other-pythons:
	sh tests/system/other_pythons.sh trixie
	-sh tests/system/other_pythons.sh sid
	-sh tests/system/other_pythons.sh sid python3.15

# The quick tests, and two people who pair, with the oldest packages that setup.cfg allows.
# Pip alone takes some minutes.
oldest:
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	$(PYTHON) deploy/packaging/oldest.py >build/oldest/constraints.txt
	build/oldest/bin/pip install --quiet --constraint build/oldest/constraints.txt \
		'.[dynamodb,test]'
	build/oldest/bin/python -m pytest -q -m "not slow and not sockets"
	build/oldest/bin/python tests/system/two_people.py

# What a release has, built into dist/ and checked. A minute.
packages: .venv/ready
	$(BIN)/pip install --quiet --editable '.[package]'
	sh deploy/packaging/make_packages.sh

# The relay in a container, as root: a minute. Says what it lacks where it cannot.
container-test:
	sh deploy/container_test.sh

clean:
	rm -rf .venv bench/node_modules build dist *.egg-info .hypothesis .mypy_cache .pytest_cache \
		.ruff_cache

.PHONY: bench bench-quick check check-style clean container-test install-test \
	oldest other-pythons packages quick
