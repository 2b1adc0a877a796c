"""The identifier of an app, by which the link of one app is not opened by another.

PROTOCOL.md, "Apps".
"""

from __future__ import annotations

import re

from connectoid.errors import UsageError
from connectoid.limits import MAX_APP_CHARS

# A domain in reverse, or an origin: `org.example.list`, `https://list.example.org`.
_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:/_-]*")


def is_app(value: object) -> bool:
    """Return whether a value has the form of an app's identifier."""
    if not isinstance(value, str) or len(value) > MAX_APP_CHARS:
        return False
    return _FORM.fullmatch(value) is not None


def check_app(app: str) -> str:
    """Return an identifier, or an empty text for an app that has none; raise UsageError."""
    if app and not is_app(app):
        raise UsageError(
            f"An app's identifier has 1 to {MAX_APP_CHARS} of A-Z a-z 0-9 . : / _ - and begins"
            " with a letter or digit."
        )
    return app
