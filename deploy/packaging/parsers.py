"""Make the parsers of the programs by the names that a wheel gives them.

Pages of the manual and completions are made of these: make_packages.sh.
"""

from __future__ import annotations

import argparse

from connectoid.cli.command_line import make_parser
from connectoid_admin import build_admin_parser
from connectoid_relay import build_parser


def client() -> argparse.ArgumentParser:
    """Return the parser of `connectoid`."""
    return make_parser()


def relay() -> argparse.ArgumentParser:
    """Return the parser of `connectoid-relay`."""
    return build_parser("connectoid-relay")


def admin() -> argparse.ArgumentParser:
    """Return the parser of `connectoid-admin`."""
    return build_admin_parser("connectoid-admin")
