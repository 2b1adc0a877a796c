"""SDPs that nobody's WebRTC has made, in the form that PROTOCOL.md asks for."""

from __future__ import annotations

SETUPS = {"offer": "actpass", "answer": "active"}

LINES = (
    "v=0",
    "o=- 1 1 IN IP4 0.0.0.0",
    "s={name}",
    "t=0 0",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
    "c=IN IP4 0.0.0.0",
    "a=mid:0",
    "a=sctp-port:5000",
    "a=ice-ufrag:abcd",
    "a=ice-pwd:abcdefghijklmnopqrstuv",
    f"a=fingerprint:sha-256 {':'.join(['AB'] * 32)}",
    "a=setup:{setup}",
)


def make_sdp(kind: str, name: str = "-", candidates: int = 0) -> dict[str, str]:
    """Return an offer or answer with a name in it, and candidates of nobody's."""
    lines = [line.format(name=name, setup=SETUPS[kind]) for line in LINES]
    lines += [
        f"a=candidate:{number} 1 udp 2130706431 192.0.2.{number} 9 typ host"
        for number in range(1, candidates + 1)
    ]
    return {"type": kind, "sdp": "".join(f"{line}\r\n" for line in lines)}


def name_in(sdp: str) -> str:
    """Return the name in such an SDP."""
    return sdp.partition("\r\ns=")[2].partition("\r\n")[0]
