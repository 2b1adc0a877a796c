"""Fuzz: no message makes a step raise, and a bad one changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from fake_wire import (
    APP,
    TEST_PUB,
    App,
    Attacker,
    ToySuite,
    World,
    apart,
    count,
    invite,
    link_of,
    newest,
    open_link,
    sdp,
    sign_octets,
)
from hypothesis import given
from hypothesis import strategies as st

import connectoid
from connectoid import (
    CONTEXTS,
    PAIRING,
    REASONS,
    Contact,
    LinkError,
    Refused,
    Send,
    parse_address,
    prove,
    read_jws,
    read_link,
    sign_jws,
)
from connectoid.encoding import encode_base64url

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=70)
    | st.sampled_from(
        [
            "",
            "A" * 43,
            "A" * 22,
            TEST_PUB,
            "\0",
            "é",
            "~",
            ".",
            "offer",
            "answer",
            "hello",
            "\u2028",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "sdp", "x"]), inner)
    ),
    max_leaves=5,
)

WRONG_VALUES: Mapping[str, list[Any]] = {
    "sdpOffer": [
        None,
        sdp("answer"),
        {"type": "offer"},
        {"sdp": "v=0"},
        {"type": "offer", "sdp": 1},
        [],
        "x",
    ],
    "nonce": [None, "", "A" * 21, "A" * 23, "A" * 21 + "B", 7, "=" * 22],
    "re": ["A" * 43, "", False],
    "from": ["A" * 66, None],
    "to": [None],
    "connectoid": [None],
    "type": ["Hello", None, "r"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_hello_with_a_wrong_member_is_refused(toy: World, name: str, value: object) -> None:
    alice = invite(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    payload = {
        **mallory.payload("hello", link.address, nonce="A" * 22, sdpOffer=sdp("offer")),
        name: value,
    }
    jws = sign_jws(toy.suite, mallory.key, payload)
    alice.hear(f"{jws}.{prove(link.secret, jws)}", at=link.address)
    assert alice.contact.dropped == {"payload": 1}
    assert alice.record.state == "invited"


@pytest.mark.parametrize(
    "name", ["type", "to", "from", "seq", "re", "connectoid", "nonce", "sdpOffer"]
)
def test_hello_without_a_member_is_refused(toy: World, name: str) -> None:
    alice = invite(toy)
    link = link_of(alice)
    mallory = Attacker(toy)
    payload = mallory.payload("hello", link.address, nonce="A" * 22, sdpOffer=sdp("offer"))
    del payload[name]
    jws = sign_jws(toy.suite, mallory.key, payload)
    alice.hear(f"{jws}.{prove(link.secret, jws)}", at=link.address)
    assert alice.contact.dropped == {"payload": 1}


RAW = [
    b'{"type":"hello"',
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"",
    b"\xff",
    b"{}",
    b"[" * 9_000,
    b'{"a":' * 1_500 + b"1" + b"}" * 1_500,
    b'{"type":"offer","to":"\\ud800"}',
    b'{"seq":' + b"9" * 5_000 + b"}",
    b'{"seq":NaN}',
    b'{"seq":-Infinity}',
    b'{"x":1e999}',
    b"\xef\xbb\xbf{}",
    b'{"type":["hello"]}',
    b'{"type":{}}',
    b'{"type":null}',
    b'{"type":"answer","type":"hello"}',
    b"{'a':1}",
]


@pytest.mark.parametrize("octets", RAW)
def test_body_that_is_no_payload_is_refused(toy: World, octets: bytes) -> None:
    alice, bob = apart(toy)
    before = alice.saved
    assert alice.hear(sign_octets(toy, bob.record.private_key, octets)) == []
    assert alice.contact.dropped == {"payload": 1}
    assert alice.saved == before


@given(
    kind=st.sampled_from(sorted(connectoid.messages.MEMBERS)),
    state=st.sampled_from(["invited", "welcomed", "opened", "paired"]),
    name=st.sampled_from(
        ["type", "to", "from", "seq", "re", "connectoid", "nonce", "r", "sdpOffer", "sdpAnswer"]
    ),
    value=JSON_VALUES,
)
def test_any_value_of_any_member_in_any_state_raises_nothing(
    kind: str, state: str, name: str, value: object
) -> None:
    app, payload, finish = STARTS[state]()
    common = {"sdpOffer": sdp("offer"), "sdpAnswer": sdp("answer"), "nonce": "A" * 22}
    payload = {**common, **payload, "type": kind, name: value}
    try:
        text = finish(payload)
    except (ValueError, UnicodeEncodeError):
        # A lone surrogate cannot be written.
        return
    effects = app.take(
        app.world.seal(str(payload_address(app)), text), address=payload_address(app)
    )
    assert count(Send, effects) <= 1
    assert app.record.state in {rule.state for rule in PAIRING.values()} | {"ended"}


def payload_address(app: App) -> str:
    """Return the address where an app of STARTS listens."""
    return (
        (app.record.invited or newest(app)).address
        if app.record.state == "invited"
        else newest(app).address
    )


def start_invited() -> tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return Alice before any message, and the payload of Mallory, who has the link."""
    world = World(ToySuite())
    alice = invite(world)
    mallory = Attacker(world)
    link = link_of(alice)

    def finish(payload: dict[str, Any]) -> str:
        jws = sign_jws(world.suite, mallory.key, payload)
        return f"{jws}.{prove(link.secret, jws)}" if payload["type"] == "hello" else jws

    return alice, mallory.payload("hello", link.address), finish


def start_opened() -> tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return Bob before the welcome, and the payload of a hostile Alice."""
    world = World(ToySuite())
    alice = invite(world)
    bob = open_link(world, link_of(alice))
    payload = {
        "type": "",
        "to": newest(bob).address,
        "from": alice.record.signer,
        "seq": 1,
        "re": bob.record.hello_hash,
        "r": alice.record.r,
        "connectoid": link_of(alice).address,
    }
    return bob, payload, lambda members: sign_jws(world.suite, alice.record.private_key, members)


def start_known(state: str) -> tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return Alice when she knows Bob, and the payload of a hostile Bob."""
    world = World(ToySuite())
    alice, bob = apart(world)
    alice = App(world, (Contact(world.suite, replace(alice.record, state=state)), []))
    payload = {
        "type": "",
        "to": newest(alice).address,
        "from": bob.record.signer,
        "seq": bob.record.seq + 1,
        "re": "A" * 43,
        "r": "A" * 22,
        "connectoid": newest(bob).address,
    }
    return alice, payload, lambda members: sign_jws(world.suite, bob.record.private_key, members)


STARTS: Mapping[str, Callable[[], tuple[App, dict[str, Any], Callable[[dict[str, Any]], str]]]] = {
    "invited": start_invited,
    "opened": start_opened,
    "welcomed": lambda: start_known("welcomed"),
    "paired": lambda: start_known("paired"),
}


@given(
    st.lists(st.text(max_size=200) | st.binary(max_size=200).map(encode_base64url), max_size=4),
    st.binary(max_size=1_100),
)
def test_any_data_raises_nothing(texts: list[str], plaintext: bytes) -> None:
    app, _, _ = start_invited()
    pub = link_of(app).address.split(".")[0]
    padded = (len(plaintext).to_bytes(4, "big") + plaintext).ljust(2_048, b"\0")
    sealed = app.world.suite.seal(pub, CONTEXTS["message"], padded)
    assert app.take(*texts, encode_base64url(sealed), address=link_of(app).address) == []
    assert app.contact.dropped.total() == len(texts) + 1
    assert set(app.contact.dropped) <= set(REASONS)


@given(st.text(max_size=120) | st.text(alphabet="~.=#?&%connectoidA-_", max_size=80))
def test_any_text_as_link_or_address_raises_its_own_error_alone(text: str) -> None:
    for link in (text, f"{APP}#connectoid={text}", f"{APP}?connectoid={text}"):
        with pytest.raises(LinkError):
            read_link(link)
    with pytest.raises(Refused):
        parse_address(text)
    with pytest.raises(Refused):
        read_jws(text)
