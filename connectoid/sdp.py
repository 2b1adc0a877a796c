"""SDP: what of a contact's offer or answer WebRTC may see, and what of one's own may leave.

WebRTC trusts what it is given: for a section of video it decodes video. So everything from outside
passes `check_sdp` first. PROTOCOL.md, "SDP".
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from connectoid.errors import Refused, UsageError
from connectoid.limits import (
    MAX_CANDIDATES,
    MAX_CHANNEL_BYTES,
    MAX_FINGERPRINTS,
    MAX_SDP_CHARS,
    MAX_SDP_LINE_CHARS,
    MAX_SDP_LINES,
)

# A line, and what ends it. Parsers differ in what else they take for the end of a line.
_END = "\r\n"
_LINE = re.compile("[ -~]*")

_FIRST = "v=0"
_SECTION = re.compile("m=application [0-9]{1,5} (?:UDP|TCP)/DTLS/SCTP webrtc-datachannel")

# -- Candidates --------------------------------------------------------------------------

_CANDIDATE = re.compile(
    "[A-Za-z0-9+/]{1,32} 1 (?:udp|UDP|tcp|TCP) [0-9]{1,10}"
    " (?P<address>[!-~]+) (?P<port>[1-9][0-9]{0,4}) typ (?:host|srflx|prflx|relay)"
    "(?: [!-~]+)*"
)

# From 1 to 223: what comes after is multicast, reserved, or broadcast.
_FIRST_OCTET = "(?:[1-9]|[1-9][0-9]|1[0-9]{2}|2[01][0-9]|22[0-3])"
_OCTET = "(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4 = re.compile(rf"{_FIRST_OCTET}(?:\.{_OCTET}){{3}}")

_IPV6_GROUPS = 8
_IPV6_GROUP = re.compile("[0-9A-Fa-f]{1,4}")
_IPV6_MULTICAST = re.compile("[Ff]{2}[0-9A-Fa-f]{2}:.*")

# Browsers offer only such of TCP as open connections themselves, so no two of them ever meet. But
# they connect to whatever other one an SDP names, be it a service of their own machine.
_OVER_TCP = re.compile("a=candidate:[^ ]* [^ ]* (?:tcp|TCP) .*")

# Browsers hide their addresses behind names of multicast DNS. Any other name would be looked up.
_MDNS_NAME = re.compile(r"[A-Za-z0-9-]{1,63}\.local")

_MAX_PORT = 65_535


def _is_candidate(value: str) -> bool:
    found = _CANDIDATE.fullmatch(value)
    if found is None or int(found["port"]) > _MAX_PORT:
        return False
    address = found["address"]
    if _IPV4.fullmatch(address) or _MDNS_NAME.fullmatch(address):
        return True
    return _is_ipv6(address)


def _is_ipv6(text: str) -> bool:
    """Return whether a text is an IPv6 address of one host."""
    if _IPV6_MULTICAST.fullmatch(text):
        return False
    head, gap, tail = text.partition("::")
    groups = [group for part in (head, tail) if part for group in part.split(":")]
    if not all(map(_IPV6_GROUP.fullmatch, groups)):
        return False
    if gap:
        return 0 < len(groups) < _IPV6_GROUPS
    return len(groups) == _IPV6_GROUPS


# -- Attributes --------------------------------------------------------------------------


class Attribute(NamedTuple):
    """An attribute that WebRTC needs: the form of its value, and how often it stands there."""

    form: re.Pattern[str]
    least: int
    most: int


_FINGERPRINT = re.compile(
    "sha-256 [0-9A-F]{2}(?::[0-9A-F]{2}){31}"
    "|sha-384 [0-9A-F]{2}(?::[0-9A-F]{2}){47}"
    "|sha-512 [0-9A-F]{2}(?::[0-9A-F]{2}){63}"
)

ATTRIBUTES: Mapping[str, Attribute] = {
    "candidate": Attribute(_CANDIDATE, 0, MAX_CANDIDATES),
    "fingerprint": Attribute(_FINGERPRINT, 1, MAX_FINGERPRINTS),
    "ice-ufrag": Attribute(re.compile("[A-Za-z0-9+/]{4,256}"), 1, 1),
    "ice-pwd": Attribute(re.compile("[A-Za-z0-9+/]{22,256}"), 1, 1),
    "setup": Attribute(re.compile("actpass|active|passive"), 1, 1),
    "sctp-port": Attribute(re.compile("[0-9]{1,5}"), 1, 1),
    "max-message-size": Attribute(re.compile("0|[1-9][0-9]{0,19}"), 0, 1),
    "mid": Attribute(re.compile("[!-~]{1,32}"), 0, 1),
    "group": Attribute(re.compile("BUNDLE [!-~]{1,32}"), 0, 1),
    "ice-options": Attribute(re.compile("[ -~]+"), 0, 2),
    "ice-lite": Attribute(re.compile(""), 0, 1),
    "end-of-candidates": Attribute(re.compile(""), 0, 1),
}


def _takes_messages(value: str) -> bool:
    """Return whether a contact takes what the app may send. 0 is any size (RFC 8841, section 6)."""
    return value == "0" or int(value) >= MAX_CHANNEL_BYTES


# What a form does not say.
_CHECKS: Mapping[str, Callable[[str], bool]] = {
    "candidate": _is_candidate,
    "max-message-size": _takes_messages,
}

# The other lines that WebRTC needs. `i`, `u`, `k` and the like are of no use to it.
_KINDS = ("v=", "o=", "s=", "t=", "c=", "b=", "m=")


def _split_attribute(line: str) -> tuple[str, str]:
    """Return the name and the value of an attribute; the name of any other line is empty."""
    if not line.startswith("a="):
        return "", ""
    name, _, value = line[2:].partition(":")
    return name, value


def _is_needed(line: str) -> bool:
    if _OVER_TCP.fullmatch(line):
        return False
    return line.startswith(_KINDS) or _split_attribute(line)[0] in ATTRIBUTES


# -- A contact's SDP ---------------------------------------------------------------------


def check_sdp(text: str) -> str:
    """Return the lines of a contact's SDP that WebRTC may see; raise Refused (sdp)."""
    lines = _split_lines(text)
    sections = [line for line in lines if line.startswith("m=")]
    if lines[0] != _FIRST or len(sections) != 1 or not _SECTION.fullmatch(sections[0]):
        raise Refused("sdp", "not one section for a data channel")
    counts: collections.Counter[str] = collections.Counter()
    for line in lines:
        name, value = _split_attribute(line)
        if name in ATTRIBUTES:
            counts[name] += 1
            _check_value(name, value)
    for name, attribute in ATTRIBUTES.items():
        if not attribute.least <= counts[name] <= attribute.most:
            raise Refused("sdp", f"{counts[name]} times {name}")
    return _join_lines([line for line in lines if _is_needed(line)])


def _split_lines(text: str) -> list[str]:
    """Return the lines of an SDP, at least one; raise Refused (sdp) for too many, or odd ones."""
    if len(text) > MAX_SDP_CHARS or not text.endswith(_END):
        raise Refused("sdp", "too long, or cut off")
    lines = text.removesuffix(_END).split(_END)
    if len(lines) > MAX_SDP_LINES:
        raise Refused("sdp", f"{len(lines)} lines")
    for line in lines:
        if len(line) > MAX_SDP_LINE_CHARS or not _LINE.fullmatch(line):
            raise Refused("sdp", "a line that is too long, or not of printable ASCII")
    return lines


def _check_value(name: str, value: str) -> None:
    """Raise Refused (sdp) unless the value of an attribute has its form."""
    has_form = ATTRIBUTES[name].form.fullmatch(value) is not None
    if not has_form or (name in _CHECKS and not _CHECKS[name](value)):
        raise Refused("sdp", f"a wrong {name}")


def _join_lines(lines: Sequence[str]) -> str:
    return _END.join(lines) + _END


# -- One's own SDP -----------------------------------------------------------------------


def trim_sdp(text: str, *, most_bytes: int = MAX_SDP_CHARS, relay_only: bool = False) -> str:
    """Return one's own SDP as a contact takes it, with the most useful of its candidates.

    It has at most `most_bytes` as JSON, if that takes no more than leaving candidates out. With
    `relay_only` it has none but those of TURN servers. Raises UsageError for an SDP of anything but
    a data channel.
    """
    lines = [line for line in text.split(_END) if _is_needed(line)]
    candidates = [line for line in lines if _is_candidate_line(line)]
    others = [line for line in lines if not _is_candidate_line(line)]
    good = [line for line in candidates if _is_candidate(_split_attribute(line)[1])]
    if relay_only:
        good = [line for line in good if " typ relay" in line]
    # They end the one section, where their order means nothing.
    chosen = sorted(good, key=_rank)[:MAX_CANDIDATES]
    while chosen and len(json.dumps(_join_lines([*others, *chosen]))) > most_bytes:
        chosen.pop()
    try:
        return check_sdp(_join_lines([*others, *chosen]))
    except Refused as refused:
        raise UsageError(f"This SDP is not that of a data channel: {refused}.") from None


def _is_candidate_line(line: str) -> bool:
    return _split_attribute(line)[0] == "candidate"


def _rank(line: str) -> int:
    """Return the place of a candidate: those come first that networks apart need."""
    return int(" typ host" in line)
