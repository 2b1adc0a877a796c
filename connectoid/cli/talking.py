"""What both ends of a channel say first, and the form of what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from connectoid import ConnectoidError, shown
from connectoid.encoding import load_json

NOT_UNDERSTOOD = "The other side sent what this program does not understand."

# What to run when the other runs this.
FITTING = {"chat": "chat", "send": "receive", "receive": "send"}


class MessageChannel(Protocol):
    """What a transfer needs of a channel."""

    def send(self, message: bytes | str, timeout_s: float | None = None) -> None:
        """Send a message; raise NotConnectedError, TimeoutError."""

    def receive(self, timeout_s: float | None = None) -> bytes | str:
        """Return the next message; raise NotConnectedError, TimeoutError."""


class TransferError(ConnectoidError):
    """A transfer that cannot go on; its text says why."""


def greet(channel: MessageChannel, hello: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Say which command this is, and return what the contact says.

    Raises TransferError if they do not fit: both send, or one chats and the other does not.
    """
    channel.send(json.dumps(hello))
    theirs = read_control(channel.receive())
    is_same_role = "role" in hello and theirs.get("role") == hello["role"]
    if theirs.get("app") != hello["app"] or is_same_role:
        command = shown(str(theirs.get("role") or theirs.get("app")))
        fitting = FITTING.get(command)
        if fitting is None:
            raise TransferError(f"{name} runs `{command}`, which this program does not know.")
        raise TransferError(f"{name} runs `{command}`. Run `{fitting}` here.")
    return theirs


def read_control(message: bytes | str) -> dict[str, Any]:
    """Return a control message; raise TransferError for anything else."""
    try:
        control = load_json(message) if isinstance(message, str) else None
    except ValueError:
        control = None
    if not isinstance(control, dict):
        raise TransferError(NOT_UNDERSTOOD)
    return control


def read_reply(channel: MessageChannel, timeout_s: float | None = None) -> dict[str, Any]:
    """Return the next control message of a receiver.

    Raises TransferError if the receiver has given up, TimeoutError, NotConnectedError.
    """
    reply = read_control(channel.receive(timeout_s))
    reason = reply.get("reason")
    if isinstance(reason, str):
        raise TransferError(f"The other side has given up: {shown(reason)}.")
    return reply


def count_of(control: Mapping[str, Any], name: str, most: int) -> int:
    """Return a number of bytes in a control message; raise TransferError."""
    count = control.get(name)
    if type(count) is not int or not 0 <= count <= most:
        raise TransferError(NOT_UNDERSTOOD)
    return count
