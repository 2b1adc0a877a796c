"""Share, chat and send files from a terminal, directly from one device to another.

    connectoid share Bob             # prints a link for Bob, and waits for him
    connectoid open LINK --name Alice
    connectoid chat Alice

It uses the public API of the library alone. Words for people go to stderr. What a script wants
(links, received lines, --json) goes to stdout. README.md shows a session.

The modules: `telling` says, `running` runs a store, `talking` speaks on a channel. Above them are
the commands, in `pairing`, `contacts`, `chat`, `files` and `devices`, and `command_line`, which
has the flags.
"""

from __future__ import annotations

from connectoid.cli.command_line import COMMANDS, SHARED, main

__all__ = ["COMMANDS", "SHARED", "main"]
