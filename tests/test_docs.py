"""Read the documents as a stranger does: follow their links, compare them with the code."""

from __future__ import annotations

import ast
import configparser
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import oldest
import pytest
import yaml  # type: ignore[import-untyped]
from harness import ROOT
from pages import blocks, page, rows_after

import connectoid
import connectoid_relay
from connectoid.cli import COMMANDS

README, LIBRARY = (page(name) for name in ("README.md", "docs/library.md"))
PLACES = (
    "README.md", "CHANGELOG.md", "PROTOCOL.md", "docs", "deploy", "examples",
    "vectors",
)
# Of code that ruff does not read. Those without a suffix are scripts.
CODE = frozenset({
    "", ".c", ".cfg", ".css", ".html", ".js", ".mjs", ".service", ".sh", ".toml", ".yaml",
    ".yml"})
# What was made, or fetched, and is not kept; an sdist has PKG-INFO.
MADE = frozenset({"PKG-INFO", "__pycache__", "build", "dist", "node_modules", "screenshots"})
MAX_COLUMNS = 100
MAX_README_LINES = 200
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# These lines cannot be broken: one of a crontab, and a hook for certbot in its quotes.
UNBREAKABLE = re.compile(r"\d+ \d+ \* \* \* |    '/opt/connectoid/connectoid-certificate ")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"(?m)^#+ (.+)$")
FENCED = re.compile(r"(?ms)^ *```.*?^ *```$")


def is_kept(folder: str) -> bool:
    """Return whether a folder has not what tools leave behind for themselves."""
    if folder in (".ci", ".github"):
        return True
    return not (folder.startswith(".") or folder.endswith(".egg-info"))


def kept() -> Iterator[Path]:
    """Yield the files that the repository keeps."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in MADE and is_kept(name)]
        yield from (Path(folder, name) for name in files if name not in MADE)


def documents() -> list[Path]:
    """Return the documents that the repository keeps."""
    return [path for path in kept() if path.suffix == ".md"]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = FENCED.sub("", path.read_text("utf-8"))
    found: set[str] = set()
    for heading in HEADING.findall(text):
        shown = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        while slug in found:
            slug += "-1"
        found.add(slug)
    return found


def links(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the target and the anchor of each link into the repository."""
    text = FENCED.sub("", path.read_text("utf-8"))
    for link in LINK.findall(text):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            yield target, anchor


def supported() -> tuple[list[str], set[str]]:
    """Return the Pythons and the systems that the classifiers of setup.cfg name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", "utf-8")
    classifiers = config["metadata"]["classifiers"]
    systems = set(re.findall(r"Operating System :: .*\b(\w+)$", classifiers, re.MULTILINE))
    return re.findall(r"Python :: (3\.\d+)", classifiers), systems


def test_places_agree_on_what_is_supported() -> None:
    pythons, systems = supported()
    assert systems == {"Linux", "MacOS", "Windows"}
    first, last = pythons[0], pythons[-1]
    assert [f"3.{minor}" for minor in range(int(first[2:]), int(last[2:]) + 1)] == pythons
    assert f"Python {first} to {last} on Linux (glibc or musl), macOS or Windows." in README
    requires = page("setup.cfg"), page("connectoid_relay.py")
    assert f"python_requires = >={first}\n" in requires[0]
    assert f'# requires-python = ">={first}"\n' in requires[1]
    assert f"\npython_version = {first}\n" in requires[0]
    assert f'target-version = "py{first.replace(".", "")}"' in page("pyproject.toml")
    makefile = page("Makefile")
    assert {"darwin", "win32"} == set(re.findall("--platform (\\w+)", makefile))
    workflow = yaml.safe_load(page(".github/workflows/ci.yml"))
    matrix = workflow["jobs"]["suite"]["strategy"]["matrix"]
    assert matrix["python"] == pythons
    assert matrix["os"] == ["ubuntu-latest", "windows-latest", "macos-latest"]
    tried = rows_after(page("docs/contributing.md"), "### Systems")
    assert [python for python, _ in tried] == pythons
    for _, command in tried:
        assert command == "nobody" or (ROOT / command.strip("`").split()[0]).exists()


def test_places_agree_on_the_oldest_sqlite_and_cryptography() -> None:
    least = "SQLite {}.{} or newer".format(*connectoid_relay.MIN_SQLITE)
    assert least in " ".join(README.split())
    assert least in " ".join(page("docs/hosting.md").split())
    (version,) = re.findall(r"cryptography>=(\d+)", page("setup.cfg"))
    assert f'# dependencies = ["cryptography>={version}"]' in page("connectoid_relay.py")
    assert f"`cryptography` {version} or newer" in page("docs/hosting.md")


def test_oldest_packages_are_those_of_all_that_runs_and_tests() -> None:
    wanted = oldest.read_requirements(page("setup.cfg"))
    pinned = {oldest.pin(line) for line in wanted}
    assert {"cryptography==47", "aioice==0.13", "moto==5", "uvloop==0.19"} <= pinned
    assert len(pinned) == len({line.partition("==")[0] for line in pinned})
    with pytest.raises(ValueError, match="pytest names no least version"):
        oldest.pin("pytest")


def test_links_between_documents_lead_somewhere() -> None:
    astray = []
    for path in documents():
        for target, anchor in links(path):
            there = (path.parent / target).resolve() if target else path
            if not there.exists() or (anchor and anchor not in anchors(there)):
                astray.append(f"{path.relative_to(ROOT)}: {target}#{anchor}")
    assert astray == []


def test_pages_are_all_linked_from_the_readme() -> None:
    readme = ROOT / "README.md"
    linked = {(ROOT / target).resolve() for target, _ in links(readme)}
    assert set((ROOT / "docs").glob("*.md")) <= linked


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("place", PLACES)
def test_lines_of_documents_are_not_wide(place: str) -> None:
    wide = []
    for path in documents():
        if (ROOT / place) not in (path, *path.parents):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if len(line) > MAX_COLUMNS and not line.startswith("|") and not UNBREAKABLE.match(line):
                wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert wide == []


@pytest.mark.parametrize("suffix", sorted(CODE))
def test_lines_of_code_are_not_wide(suffix: str) -> None:
    """Also those of shell, YAML and JavaScript."""
    paths = [path for path in kept() if path.suffix == suffix]
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS]
    assert paths
    assert wide == []


def test_library_s_events_are_those_of_the_code() -> None:
    rows = {event.strip("`"): meaning for event, meaning in rows_after(LIBRARY, "### Events")}
    assert rows == connectoid.EVENTS


def test_library_s_commands_are_those_of_the_code() -> None:
    rows = rows_after(LIBRARY, "## The command line")
    named = {name for row in rows for name in re.findall(r"`connectoid (\w+)", row[0])}
    assert named == COMMANDS.keys()


@pytest.mark.parametrize("face", [connectoid.Connectoid, connectoid.AsyncConnectoid])
def test_library_s_calls_exist(face: type[object]) -> None:
    for call, _ in rows_after(LIBRARY, "### Calls"):
        name, _, written = call.strip("`)").partition("(")
        parameters = inspect.signature(getattr(face, name)).parameters
        shown = {part.partition("=")[0] for part in written.split(", ") if part}
        assert shown <= parameters.keys(), call


@pytest.mark.parametrize("text", [README, LIBRARY], ids=["README", "library"])
def test_calls_of_the_examples_in_javascript_exist(text: str) -> None:
    example = "\n".join(blocks(text, "js"))
    modules = [*ROOT.glob("js/*.js"), *ROOT.glob("js/contact/*.js")]
    library = "\n".join(module.read_text("utf-8") for module in modules)
    called = set(re.findall(r"(?:app|channel|Store)\.(\w+)\(", example))
    defined = set(re.findall(r"(?m)^  (?:static )?(?:async )?(\w+)\(", library))
    assert len(called) >= 4
    assert called <= defined


def names_in(*modules: Path) -> set[str]:
    """Return what modules define: classes, functions, `Class.method`, and tables with a type."""
    found: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, FUNCTIONS)]
                found |= {f"{node.name}.{method.name}" for method in methods}
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                found.add(node.name)
            if isinstance(node, ast.AnnAssign):
                found.add(ast.unparse(node.target))
    return found


def test_three_ways_through_the_code_name_what_is_there() -> None:
    text = page("docs/contributing.md").partition("\n## Three ways through the code\n")[2]
    ways = text.partition("\n## ")[0].replace("\n", " ").split(" **")[1:]
    library = names_in(*(ROOT / "connectoid").rglob("*.py"))
    relay = names_in(ROOT / "connectoid_relay.py")
    for way, defined in zip(ways, (relay, relay, library), strict=True):
        named = set(re.findall(r"`(\w*[A-Z_.]\w*(?:\.\w+)?)`", way))
        assert {name for name in named if not name.endswith(".py")} <= defined


def test_modules_of_one_language_are_listed_and_all_others_are_in_both() -> None:
    rows = rows_after(page("docs/contributing.md"), "## Two languages")
    listed = {(name, language) for names, language, _ in rows for name in names.split(", ")}
    python = modules_of(ROOT / "connectoid", "*.py") - {"__init__", "contact/__init__"}
    javascript = modules_of(ROOT / "js", "*.js") - {"connectoid"}
    found = {(f"`{name}`", "Python") for name in python - javascript}
    found |= {(f"`{name}`", "JavaScript") for name in javascript - python}
    assert found | {("`cli`", "Python")} == listed


def modules_of(folder: Path, pattern: str) -> set[str]:
    """Return the modules of a library, with those of the machine."""
    paths = [*folder.glob(pattern), *(folder / "contact").glob(pattern)]
    return {path.relative_to(folder).with_suffix("").as_posix() for path in paths}


def test_sections_that_code_quotes_of_the_pages_exist() -> None:
    folders = ("connectoid", "deploy", "examples", "systemd", "tests")
    places = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    quoted = set()
    for path in places:
        if path.suffix in (".py", ".sh", ".service", "") and path.is_file():
            text = re.sub(r"\n#? *", " ", path.read_text("utf-8"))
            quoted |= set(re.findall(r'(docs/[a-z-]+\.md), "([^"]+)"', text))
    assert len(quoted) >= 5
    astray = [quote for quote in quoted if quote[1] not in HEADING.findall(page(quote[0]))]
    assert astray == []
