"""Whether this version of aiortc has what our guards replace in it.

Each guard leaves alone what it does not know. Then nobody is guarded by it, and the user is told.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

from connectoid import (
    allocations,
    certificates,
    consent,
    datagrams,
    local_names,
    reassembly,
    recovery,
    sctp_gate,
    turn_stream,
)


def warning_about(sctp: Any) -> str:
    """Return what the user of a connection is told that lacks a guard, else nothing."""
    lacking = sorted({name for target, names in _needs_of(sctp) for name in names
                      if not hasattr(target, name)})
    if not lacking:
        return ""
    versions = " and ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("aiortc", "aioice"))
    return (f"Connections are not guarded against all that others may send: {versions} are unknown"
            f" here. They lack {', '.join(lacking)}.")


def _needs_of(sctp: Any) -> Iterator[tuple[object, Sequence[str]]]:
    """Yield each part of a connection, and of aioice, with the names that it has to have."""
    for guard in (reassembly, recovery, sctp_gate):
        yield sctp, guard.NEEDED
    dtls = getattr(sctp, "transport", None)
    yield getattr(dtls, certificates.CERTIFICATE, None), certificates.NEEDED
    connection = getattr(getattr(dtls, "transport", None), "_connection", None)
    for bound in (consent, datagrams):
        yield connection, bound.NEEDED
    turn = importlib.import_module("aioice.turn")
    yield getattr(turn, "TurnClientMixin", None), (*allocations.NEEDED, "datagram_received")
    yield getattr(turn, "TurnClientTcpProtocol", None), turn_stream.NEEDED
    mdns = importlib.import_module("aioice.mdns")
    yield getattr(mdns, "MDnsProtocol", None), local_names.NEEDED
