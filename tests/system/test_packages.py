"""Build the packages, look at what is in them, and use them as a stranger would."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import LONG_DEADLINE_S, ROOT, needs

from connectoid_relay import __version__

NAME = f"connectoid-{__version__}"
# Of the quick tests, those that read what else the project has: pages, vectors, the relay alone.
SOME_TESTS = ("test_relay.py", "tests/test_docs.py", "tests/test_protocol.py")
# What setuptools adds.
GENERATED = ("PKG-INFO", "connectoid.egg-info/", "setup.cfg", "build/")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Build an sdist, and a wheel of that."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    finished = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder, ROOT],
        capture_output=True, text=True, timeout=LONG_DEADLINE_S, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def unpacked(dist: Path) -> Path:
    """Unpack the sdist."""
    subprocess.run(["tar", "-xf", dist / f"{NAME}.tar.gz", "-C", dist], check=True)
    return dist / NAME


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="is no clone of the repository")
@needs("git")
def test_sdist_has_what_the_repository_keeps(unpacked: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")
              if path.is_file()}
    kept = {name for name in listed.splitlines() if (ROOT / name).exists()}
    assert kept <= packed
    assert [name for name in packed - kept if not name.startswith(GENERATED)] == []


def test_sdist_tests_itself(unpacked: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider",
         "-m", "not slow and not sockets", *SOME_TESTS],
        cwd=unpacked, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True,
        text=True, timeout=LONG_DEADLINE_S, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:]


def test_wheel_has_the_library_and_the_programs_alone(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        names = wheel.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        told = email.message_from_bytes(wheel.read(metadata))
        programs = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert {"connectoid/py.typed", "connectoid_relay.py", "connectoid_admin.py"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        "connectoid", "connectoid_admin.py", "connectoid_relay.py", f"{NAME}.dist-info"}
    assert (told["Name"], told["Version"], told["License-Expression"]) == (
        "connectoid", __version__, "MIT")
    assert "](docs/" not in str(told.get_payload())
    assert [line.split(" = ")[0] for line in programs.splitlines() if " = " in line] == [
        "connectoid", "connectoid-admin", "connectoid-relay"]


def test_wheel_installs_programs_that_tell_their_version(dist: Path, tmp_path: Path) -> None:
    wheel = dist / f"{NAME}-py3-none-any.whl"
    # Without --ignore-installed, pip removes what this Python has installed.
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed",
         "--prefix", tmp_path, wheel],
        capture_output=True, timeout=LONG_DEADLINE_S, check=True)
    (library,) = tmp_path.rglob("site-packages")
    for program in ("connectoid", "connectoid-relay", "connectoid-admin"):
        finished = subprocess.run(
            [tmp_path / "bin" / program, "--version"], env={"PYTHONPATH": str(library)},
            cwd=tmp_path, capture_output=True, text=True, timeout=LONG_DEADLINE_S, check=True)
        assert finished.stdout.split()[-1] == __version__


@needs("npm")
def test_npm_package_has_the_library_alone(tmp_path: Path) -> None:
    """A bundle that was built before does not go with it."""
    package = tmp_path / "js"
    shutil.copytree(ROOT / "js", package, ignore=shutil.ignore_patterns("node_modules", "dist"))
    (package / "dist").mkdir()
    (package / "dist/connectoid.js").touch()
    finished = subprocess.run(
        ["npm", "pack", "--dry-run", "--json", "--ignore-scripts"], cwd=package,
        env={**os.environ, "npm_config_cache": str(tmp_path)}, capture_output=True, text=True,
        timeout=LONG_DEADLINE_S, check=True)
    (told,) = json.loads(finished.stdout)
    names = {file["path"] for file in told["files"]}
    modules = {path.relative_to(package).as_posix()
               for pattern in ("*.js", "contact/*.js") for path in package.glob(pattern)}
    assert (told["name"], told["version"]) == ("connectoid", __version__)
    assert names == modules | {"package.json"}
