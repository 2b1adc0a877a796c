"""Cases of offers and answers: what WebRTC may see of them, and which it must never see.

In `sdp/` are those that browsers and aiortc have made, a line a line. The one of WebKit is written
after public ones: it has the WebRTC of Chromium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from vector_forms import sdp
from vector_keys import Json

HERE = Path(__file__).parent

CANDIDATE = "a=candidate:1 1 udp 2130706431 192.0.2.1 9 typ host"

SHA_256, SHA_384, SHA_512 = (
    f"a=fingerprint:sha-{bits} {':'.join(['AB'] * (bits // 8))}" for bits in (256, 384, 512)
)

MAX_CHARS = 8_192
MAX_LINES = 128
MAX_LINE_CHARS = 512
MAX_CANDIDATES = 32
MAX_FINGERPRINTS = 4

# What WebRTC needs. All other lines are left out.
KINDS = ("v", "o", "s", "t", "c", "b", "m")
ATTRIBUTES = (
    "candidate",
    "fingerprint",
    "ice-ufrag",
    "ice-pwd",
    "setup",
    "sctp-port",
    "max-message-size",
    "mid",
    "group",
    "ice-options",
    "ice-lite",
    "end-of-candidates",
)

BASE: list[str] = sdp("offer", "-")["sdp"].split("\r\n")[:-1]


def join(lines: list[str]) -> str:
    """Return lines as an SDP."""
    return "".join(f"{line}\r\n" for line in lines)


def is_needed(line: str) -> bool:
    """Return whether WebRTC may see a line."""
    kind, _, value = line.partition("=")
    if value.startswith("candidate:") and value.split()[2].lower() == "tcp":
        return False
    if kind == "a":
        return value.partition(":")[0] in ATTRIBUTES
    return kind in KINDS


def accepted(name: str, lines: list[str]) -> Json:
    """Return a case of an SDP, with the lines of it that WebRTC may see."""
    return {"name": name, "sdp": join(lines), "kept": join(list(filter(is_needed, lines)))}


def refused(name: str, text: str) -> Json:
    """Return a case of an SDP that WebRTC must not see."""
    return {"name": name, "sdp": text, "refused": "sdp"}


def with_line(line: str) -> list[str]:
    """Return the lines of a good SDP with one more at its end."""
    return [*BASE, line]


def without(start: str) -> list[str]:
    """Return the lines of a good SDP without those that begin in a certain way."""
    return [line for line in BASE if not line.startswith(start)]


def instead(start: str, line: str) -> list[str]:
    """Return the lines of a good SDP with another one in the place of some."""
    place = next(place for place, known in enumerate(BASE) if known.startswith(start))
    return [*BASE[:place], line, *BASE[place + 1 :]]


FILLER_CHARS = 128
FILLER = "a=x:".ljust(FILLER_CHARS - len("\r\n"), "x")

# -- How much ----------------------------------------------------------------------------


def candidates(count: int) -> list[str]:
    """Return a good SDP with so many candidates."""
    return BASE + [CANDIDATE.replace("192.0.2.1", f"192.0.2.{n}") for n in range(1, count + 1)]


def fingerprints(count: int) -> list[str]:
    """Return a good SDP with so many fingerprints."""
    return BASE + [SHA_384] * (count - 1)


def lines(count: int) -> list[str]:
    """Return a good SDP of so many lines."""
    return BASE + ["a=x"] * (count - len(BASE))


def line_of(chars: int) -> list[str]:
    """Return a good SDP with a line of so many characters."""
    return with_line("a=x:".ljust(chars, "x"))


def chars(count: int) -> list[str]:
    """Return a good SDP of so many characters."""
    full, rest = divmod(count - len(join(BASE)), FILLER_CHARS)
    last = "a=x:".ljust(FILLER_CHARS + rest - len("\r\n"), "x")
    return [*BASE, *[FILLER] * (full - 1), last]


BOUNDS: tuple[tuple[str, Callable[[int], list[str]], int], ...] = (
    ("candidates", candidates, MAX_CANDIDATES),
    ("fingerprints", fingerprints, MAX_FINGERPRINTS),
    ("lines", lines, MAX_LINES),
    ("characters in a line", line_of, MAX_LINE_CHARS),
    ("characters", chars, MAX_CHARS),
)


def bounds() -> Iterator[Json]:
    """Yield SDPs just below a bound, at it, and just above it."""
    for what, make, most in BOUNDS:
        yield accepted(f"{most - 1} {what}", make(most - 1))
        yield accepted(f"{most} {what}", make(most))
        yield refused(f"{most + 1} {what}", join(make(most + 1)))


# -- Sections and lines ------------------------------------------------------------------

SECTION = "m=application 9 UDP/DTLS/SCTP webrtc-datachannel"

SECTIONS = {
    "a section of video beside": with_line("m=video 9 UDP/TLS/RTP/SAVPF 96"),
    "a section of audio before": instead("t=", "m=audio 9 UDP/TLS/RTP/SAVPF 111"),
    "video alone": instead("m=", "m=video 9 UDP/TLS/RTP/SAVPF 96"),
    "a data channel twice": with_line(SECTION),
    "no section": without("m="),
    "the data channel of old drafts": instead("m=", "m=application 9 DTLS/SCTP 5000"),
    "without DTLS": instead("m=", "m=application 9 UDP/SCTP webrtc-datachannel"),
    "another use of SCTP": instead("m=", "m=application 9 UDP/DTLS/SCTP other"),
    "two formats": instead("m=", f"{SECTION} other"),
    "a section with a blank more": instead("m=", SECTION.replace(" 9", "  9")),
    "a section with a port of six digits": instead("m=", SECTION.replace("9", "123456")),
    "another version": instead("v=", "v=1"),
    "the version later": BASE[1:] + BASE[:1],
}

TEXTS = {
    "empty": "",
    "a line end alone": "\r\n",
    "no line end after the last line": join(BASE)[:-2],
    "line feeds alone": join(BASE).replace("\r\n", "\n"),
    "carriage returns alone": join(BASE).replace("\r\n", "\r"),
    "a line feed alone in a line": join(with_line("a=x\nm=video 9 UDP/TLS/RTP/SAVPF 96")),
    "a form feed in a line": join(with_line("a=x\fm=video 9 UDP/TLS/RTP/SAVPF 96")),
    "a line separator of Unicode": join(with_line("a=x\u2028m=video 9 UDP/TLS/RTP/SAVPF 96")),
    "a next line of Latin 1": join(with_line("a=x\x85m=video 9 UDP/TLS/RTP/SAVPF 96")),
    "NUL": join(with_line("a=x\0")),
    "a tabulator": join(with_line("a=x\t")),
    "not ASCII": join(instead("s=", "s=é")),
}

# -- Attributes --------------------------------------------------------------------------

GOOD_CANDIDATES = {
    "tcp, active": "a=candidate:3 1 TCP 2105458943 192.0.2.2 9 typ host tcptype active",
    "tcp, passive": "a=candidate:3 1 tcp 1518280447 127.0.0.1 80 typ host tcptype passive",
    "tcp without a type": CANDIDATE.replace("udp", "TCP"),
    "server-reflexive": f"{CANDIDATE[:-4]}srflx raddr 10.0.0.1 rport 9",
    "peer-reflexive": f"{CANDIDATE[:-4]}prflx",
    "relayed": f"{CANDIDATE[:-4]}relay raddr 0.0.0.0 rport 0 generation 0 ufrag abcd",
    "IPv6": CANDIDATE.replace("192.0.2.1", "2001:db8:0:1:2:3:4:5"),
    "IPv6 with a gap": CANDIDATE.replace("192.0.2.1", "2001:DB8::1"),
    "IPv6 with a gap at its end": CANDIDATE.replace("192.0.2.1", "2001:db8:1:2:3:4:5::"),
    "the first IPv4 address": CANDIDATE.replace("192.0.2.1", "1.0.0.0"),
    "the last IPv4 address": CANDIDATE.replace("192.0.2.1", "223.255.255.255"),
    "the last port": CANDIDATE.replace(" 9 ", " 65535 "),
    "a name of multicast DNS": CANDIDATE.replace("192.0.2.1", "0b7a5b5c-7a6e-4a9a.local"),
}

BAD_ADDRESSES = (
    "example.com",
    "router.lan.local",
    ".local",
    "localhost",
    "0.0.0.0",  # noqa: S104
    "224.0.0.251",
    "255.255.255.255",
    "240.0.0.1",
    "192.0.2.256",
    "192.0.2.01",
    "192.0.2",
    "192.0.2.1.1",
    "3221225985",
    "ff02::fb",
    "FF02:0:0:0:0:0:0:FB",
    "::",
    ":",
    "1::2::3",
    "1:2:3:4:5:6:7",
    "1:2:3:4:5:6:7:8:9",
    "1:2:3:4:5:6:7:8::",
    "2001:db8::12345",
    "2001:db8::g",
    "::ffff:192.0.2.1",
    "fe80::1%eth0",
    "[2001:db8::1]",
)

BAD_CANDIDATES = {
    "a candidate without a value": "a=candidate",
    "an empty candidate": "a=candidate:",
    "a foundation of 33 characters": CANDIDATE.replace("candidate:1", "candidate:" + "1" * 33),
    "component 2": CANDIDATE.replace(" 1 udp", " 2 udp"),
    "another transport": CANDIDATE.replace("udp", "sctp"),
    "a transport in mixed case": CANDIDATE.replace("udp", "Tcp"),
    "TCP to a name": CANDIDATE.replace("udp", "tcp").replace("192.0.2.1", "example.com"),
    "a negative priority": CANDIDATE.replace("2130706431", "-1"),
    "a priority of 11 digits": CANDIDATE.replace("2130706431", "21307064310"),
    "port 0": CANDIDATE.replace(" 9 ", " 0 "),
    "port 65536": CANDIDATE.replace(" 9 ", " 65536 "),
    "another type": CANDIDATE.replace("host", "guest"),
    "no type": CANDIDATE.removesuffix(" typ host"),
    "two blanks": CANDIDATE.replace(" 9", "  9"),
    "a blank at the end": CANDIDATE + " ",
} | {f"address {text}": CANDIDATE.replace("192.0.2.1", text) for text in BAD_ADDRESSES}

GOOD_LINES = {
    "a fingerprint of SHA-512": SHA_512,
    "a bandwidth": "b=AS:30",
    "the largest message": "a=max-message-size:18446744073709551615",
    "messages of any size": "a=max-message-size:0",
    "messages of 64 KiB": "a=max-message-size:65536",
    "messages of 64 KiB and a byte": "a=max-message-size:65537",
    "ICE lite": "a=ice-lite",
    "all candidates there": "a=end-of-candidates",
    "a group": "a=group:BUNDLE 0",
    "options twice": "a=ice-options:trickle\r\na=ice-options:ice2 trickle",
    "an attribute that nobody knows": "a=later:1",
    "an attribute that would have Firefox ask a server": "a=identity:eyJpZHAiOnt9fQ",
    "attributes of media": "a=rtpmap:96 VP8/90000\r\na=ssrc:1 cname:x",
    "a line of a kind that nobody needs": "u=https://example.com/",
    "a line that is none": "hello",
    "an empty line": "",
    "an attribute with a blank before it": "a= candidate:x",
    "an attribute in capitals": "a=CANDIDATE:x",
}

BAD_LINES = {
    "a fingerprint in lower case": SHA_256.replace("AB", "ab"),
    "a fingerprint of SHA-1": f"a=fingerprint:sha-1 {':'.join(['AB'] * 20)}",
    "a fingerprint too short": SHA_256[:-3],
    "a fingerprint too long": SHA_256 + ":AB",
    "a fingerprint without colons": SHA_256.replace(":AB", "AB"),
    "a user name twice": "a=ice-ufrag:abcd",
    "a password twice": "a=ice-pwd:abcdefghijklmnopqrstuv",
    "a role twice": "a=setup:active",
    "a port twice": "a=sctp-port:5000",
    "a largest message that is no number": "a=max-message-size:-1",
    "a largest message of 21 digits": "a=max-message-size:184467440737095516150",
    "a largest message of 1,000 bytes": "a=max-message-size:1000",
    "a largest message of 64 KiB less a byte": "a=max-message-size:65535",
    "a largest message with a zero before it": "a=max-message-size:065536",
    "two zeros for a largest message": "a=max-message-size:00",
    "two groups": "a=group:BUNDLE 0\r\na=group:BUNDLE 0",
    "a group of two": "a=group:BUNDLE 0 1",
    "a group of another kind": "a=group:LS 0",
    "two names of the section": "a=mid:0\r\na=mid:1",
    "options three times": "\r\n".join(["a=ice-options:trickle"] * 3),
    "empty options": "a=ice-options:",
    "ICE lite with a value": "a=ice-lite:x",
    "all candidates there, twice": "a=end-of-candidates\r\na=end-of-candidates",
}

REPLACED = {
    "a user name of 3 characters": ("a=ice-ufrag", "a=ice-ufrag:abc"),
    "a user name of 257 characters": ("a=ice-ufrag", "a=ice-ufrag:" + "a" * 257),
    "a user name with a dash": ("a=ice-ufrag", "a=ice-ufrag:abc-"),
    "a password of 21 characters": ("a=ice-pwd", "a=ice-pwd:" + "a" * 21),
    "a password of 257 characters": ("a=ice-pwd", "a=ice-pwd:" + "a" * 257),
    "another role": ("a=setup", "a=setup:holdconn"),
    "a port of six digits": ("a=sctp-port", "a=sctp-port:123456"),
}

LONGEST = {
    "a user name of 256 characters": ("a=ice-ufrag", "a=ice-ufrag:" + "a" * 256),
    "a password of 256 characters": ("a=ice-pwd", "a=ice-pwd:" + "a" * 256),
    "the other role": ("a=setup", "a=setup:passive"),
    "over TCP": ("m=", SECTION.replace("UDP", "TCP")),
}

NEEDED = ("a=fingerprint", "a=ice-ufrag", "a=ice-pwd", "a=setup", "a=sctp-port")


def sdp_cases() -> Iterator[Json]:
    """Yield offers and answers."""
    yield from sdp_accepted()
    yield from bounds()
    yield from sdp_refused()


def sdp_accepted() -> Iterator[Json]:
    """Yield those that WebRTC may see, the real ones first."""
    for path in sorted(HERE.glob("sdp/*.sdp")):
        yield accepted(path.stem, path.read_text(encoding="ascii").splitlines())
    for name, line in (GOOD_CANDIDATES | GOOD_LINES).items():
        yield accepted(name, with_line(line))
    for name, (start, line) in LONGEST.items():
        yield accepted(name, instead(start, line))
    yield accepted("without a name and a time", [*without("s="), "t=0 0"])


def sdp_refused() -> Iterator[Json]:
    """Yield those that it must not see."""
    for name, wrong in SECTIONS.items():
        yield refused(name, join(wrong))
    for name, text in TEXTS.items():
        yield refused(name, text)
    for name, line in (BAD_CANDIDATES | BAD_LINES).items():
        yield refused(name, join(with_line(line)))
    for name, (start, line) in REPLACED.items():
        yield refused(name, join(instead(start, line)))
    for start in NEEDED:
        yield refused(f"without {start}", join(without(start)))
