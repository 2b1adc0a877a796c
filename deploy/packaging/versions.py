"""Tell the version, or set it everywhere: `python deploy/packaging/versions.py [VERSION]`.

`connectoid_relay.__version__` is the version, and setup.cfg reads it there. What cannot read it
follows: the library, which does not import the relay, and the library for browsers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What stands around the version, in each file that has it.
PLACES: Mapping[str, str] = {
    "connectoid_relay.py": r'(?m)(?<=^__version__ = ")[^"]+(?="$)',
    "connectoid/__init__.py": r'(?m)(?<=^__version__ = ")[^"]+(?="$)',
    "js/connectoid.js": r'(?m)(?<=^export const VERSION = ")[^"]+(?=";$)',
    "js/package.json": r'(?m)(?<=^  "version": ")[^"]+(?=",$)',
}
VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")


def found() -> dict[str, str]:
    """Return the version in each place; raise SystemExit for a place without one."""
    versions = {}
    for name, pattern in PLACES.items():
        match = re.search(pattern, (ROOT / name).read_text("utf-8"))
        if not match:
            sys.exit(f"{name} names no version")
        versions[name] = match[0]
    return versions


def put(version: str) -> None:
    """Write a version into each place."""
    for name, pattern in PLACES.items():
        path = ROOT / name
        path.write_text(re.sub(pattern, version, path.read_text("utf-8")), "utf-8")


def main() -> None:
    """Set the version that an argument names, and tell the one that is."""
    if len(sys.argv) > 1:
        if not VERSION.fullmatch(sys.argv[1]):
            sys.exit(f"{sys.argv[1]!r} is not a version: write 1.2.3")
        put(sys.argv[1])
    versions = set(found().values())
    if len(versions) > 1:
        sys.exit(f"several versions: {found()}")
    print(*versions)


if __name__ == "__main__":
    main()
