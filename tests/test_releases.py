"""Test what a release rests on, as far as nothing has to be built: versions, links, workflows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import versions
import yaml  # type: ignore[import-untyped]
from absolute_links import source_url, with_absolute_links
from harness import ROOT

from connectoid_relay import __version__

MAX_ROOT_ENTRIES = 22
# Whose actions run where something is signed or published.
PUBLISHERS = ("actions/", "pypa/")
URL = "https://example.com/alice/app"


def workflow(name: str) -> dict[Any, Any]:
    """Return a workflow of the forge."""
    text = (ROOT / ".github" / "workflows" / name).read_text("utf-8")
    found: dict[Any, Any] = yaml.safe_load(text)
    return found


def test_version_is_the_same_everywhere() -> None:
    assert versions.found() == dict.fromkeys(versions.PLACES, __version__)


def test_version_is_set_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in versions.PLACES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    versions.put("12.34.56")
    assert versions.found() == dict.fromkeys(versions.PLACES, "12.34.56")


@pytest.mark.parametrize(("link", "shown"), [
    ("[a](docs/a.md)", f"[a]({URL}/blob/HEAD/docs/a.md)"),
    ("[a](docs/a.md#b)", f"[a]({URL}/blob/HEAD/docs/a.md#b)"),
    ("![a\nb](docs/a.png)", f"![a\nb]({URL}/raw/HEAD/docs/a.png)"),
    ("[`a`](a/)", f"[`a`]({URL}/blob/HEAD/a/)"),
    ("[a](#b)", "[a](#b)"),
    ("[a](https://example.com/)", "[a](https://example.com/)"),
])
def test_links_of_the_readme_work_elsewhere(link: str, shown: str) -> None:
    assert with_absolute_links(link, URL) == shown


def test_no_link_of_the_readme_stays_relative() -> None:
    text = with_absolute_links((ROOT / "README.md").read_text("utf-8"), URL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) >= 20
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_both_packages_name_one_repository() -> None:
    package = (ROOT / "js" / "package.json").read_text("utf-8")
    assert f'"git+{source_url(ROOT / "setup.cfg")}.git"' in package


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_may_do_no_more_than_they_need(name: str) -> None:
    found = workflow(name)
    assert found["permissions"] in ({}, {"contents": "read"})
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            used = step.get("uses", "")
            assert not used or used.startswith(PUBLISHERS)
            if used.startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


def test_release_is_built_by_who_cannot_sign_and_waits_for_the_owner() -> None:
    jobs = workflow("release.yml")["jobs"]
    assert jobs["build"]["permissions"] == {"contents": "read"}
    assert {name for name, job in jobs.items() if "environment" in job} == {"pypi", "npm"}
    for name in ("pypi", "npm"):
        assert jobs[name]["permissions"] == {"id-token": "write"}
        assert jobs[name]["needs"] == "attest"


def test_root_is_small() -> None:
    # What Git does not keep is hidden, ignored or made.
    ignored = {*(ROOT / ".gitignore").read_text("utf-8").split(), ".git", "PKG-INFO"}
    entries = {path.name for path in ROOT.iterdir()
               if not {path.name, f"{path.name}/"} & ignored and path.suffix != ".egg-info"}
    assert len(entries) <= MAX_ROOT_ENTRIES, sorted(entries)
