"""Commands that bring a store to another device: `export` and `import`."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import pathlib
import warnings

import connectoid
from connectoid import Store
from connectoid.cli.running import passphrase_of, read_passphrase
from connectoid.cli.telling import Teller
from connectoid.operating_system import PRIVATE


def export(arguments: argparse.Namespace, teller: Teller) -> int:
    """Write all contacts to a file under a passphrase, for another device."""
    with contextlib.closing(Store(arguments.store, passphrase_of(arguments))) as store:
        octets = store.export(new_passphrase(arguments.export_passphrase_file))
    with open(arguments.file, "xb", opener=_open_private) as file:
        file.write(octets)
    words = (
        f"{arguments.file} holds your keys. Import it on the other device, then stop using this"
        " store: two devices with the same keys get in each other's way."
    )
    teller.say("exported", words, file=arguments.file)
    return 0


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE)


def import_(arguments: argparse.Namespace, teller: Teller) -> int:
    """Add the contacts of an export to the store."""
    octets = pathlib.Path(arguments.file).read_bytes()
    with contextlib.closing(Store(arguments.store, passphrase_of(arguments))) as store:
        count = store.import_(octets, old_passphrase(arguments.export_passphrase_file))
    teller.say("imported", f"Contacts that are new here: {count}.", count=count)
    return 0


def new_passphrase(path: str | None) -> str:
    """Return a passphrase from a file, or one that was typed twice; raise UsageError."""
    if path is not None:
        passphrase = read_passphrase(path)
        is_same = True
    else:
        passphrase = ask("New passphrase for the export: ")
        is_same = not passphrase or passphrase == ask("Again: ")
    if not passphrase or not is_same:
        raise connectoid.UsageError("The passphrases are empty or differ.")
    return passphrase


def old_passphrase(path: str | None) -> str:
    """Return the passphrase of an export, from a file or typed; raise UsageError."""
    if path is not None:
        return read_passphrase(path)
    return ask("Passphrase of the export: ")


def ask(question: str) -> str:
    """Return what is typed, unseen; raise EOFError, and UsageError without a terminal."""
    with warnings.catch_warnings():
        # Without a terminal, getpass would warn and show what is typed.
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass(question)
        except getpass.GetPassWarning:
            raise connectoid.UsageError(
                "There is no terminal to type a passphrase on: use --export-passphrase-file."
            ) from None
