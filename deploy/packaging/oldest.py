"""Print the oldest package of each kind that setup.cfg allows, as constraints for pip."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What runs and tests the project. Tools that make packages and rivals in benchmarks are not ours.
EXTRAS = ("webrtc", "cli", "dynamodb", "test")
# A name, perhaps with extras of its own, and its least version.
REQUIREMENT = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)")


def read_requirements(text: str) -> list[str]:
    """Return all requirements of a setup.cfg, as they stand there."""
    settings = configparser.ConfigParser()
    settings.read_string(text)
    extras = settings["options.extras_require"]
    lists = [settings["options"]["install_requires"], *(extras[name] for name in EXTRAS)]
    return sorted({line for lines in lists for line in lines.split()})


def pin(requirement: str) -> str:
    """Return the constraint for the oldest version; raise ValueError if there is none."""
    found = REQUIREMENT.fullmatch(requirement)
    if not found:
        raise ValueError(f"setup.cfg: {requirement} names no least version")
    return f"{found[1]}=={found[2]}"


def main() -> int:
    """Print the constraints; return the exit code."""
    for requirement in read_requirements((ROOT / "setup.cfg").read_text()):
        print(pin(requirement))
    return 0


if __name__ == "__main__":
    sys.exit(main())
