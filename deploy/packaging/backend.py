"""Build as setuptools does, with two differences; pyproject.toml names this module.

What belongs into an sdist stands in MANIFEST.in beside this file, since it is no file for the
project's first page. And the README that PyPI shows has no links into a repository that is not
there: a copy of it, in build/, has absolute ones.
"""

from __future__ import annotations

from pathlib import Path

from absolute_links import source_url, with_absolute_links
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.egg_info import manifest_maker

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable",
    "get_requires_for_build_sdist", "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]

def write_readme() -> None:
    """Write the README that setup.cfg names."""
    page = Path("build/README.md")
    page.parent.mkdir(exist_ok=True)
    text = Path("README.md").read_text("utf-8")
    page.write_text(with_absolute_links(text, source_url()), "utf-8")


# A build imports this module in a process of its own, in the project's folder.
manifest_maker.template = "deploy/packaging/MANIFEST.in"
write_readme()
