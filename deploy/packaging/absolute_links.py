"""Make the links of a page absolute, for who reads it elsewhere than in its repository."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

# A link or a picture, unless it leads elsewhere or within the page.
RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def source_url(settings_file: Path = Path("setup.cfg")) -> str:
    """Return where the repository is."""
    settings = configparser.ConfigParser()
    settings.read(settings_file, "utf-8")
    lines = settings["metadata"]["project_urls"].strip().splitlines()
    return dict(line.split(" = ", 1) for line in lines)["Source"]


def with_absolute_links(text: str, url: str) -> str:
    """Return a page whose links lead into a repository: pictures to their octets."""
    def absolute(link: re.Match[str]) -> str:
        mark, shown, target = link.groups()
        view = "raw" if mark else "blob"
        return f"{mark}{shown}({url}/{view}/HEAD/{target})"
    return RELATIVE.sub(absolute, text)
