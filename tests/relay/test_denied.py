"""Test the list of the denied."""

from __future__ import annotations

import json
import select
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from harness import (
    FORBIDDEN,
    KEY,
    NOTHING,
    OK,
    SOURCE,
    START_US,
    Make,
    Owner,
    Process,
    ask,
    batch,
    binding_request,
    check,
    datagrams_to,
    denying,
    get,
    next_log_line,
    post,
    receive,
    refusal_in,
    requests_with,
    send,
    serving,
    until,
)

from connectoid_relay import Access, Quota, SettingError, answer_datagram, source_of

DENIED = (
    "# people who filled boxes",
    "",
    "  192.0.2.7\t# one address",
    "198.51.100.0/24",
    "2001:db8:1::1/128",
    "2001:db8:2::/48",
    "::ffff:203.0.113.9",
    "::ffff:233.252.0.0/120",
    "#203.0.113.1",
    "   ",
)


@pytest.mark.parametrize(
    ("source", "denied"),
    [
        ("192.0.2.6", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("::ffff:192.0.2.7", True),
        ("198.51.99.255", False),
        ("198.51.100.0", True),
        ("198.51.100.255", True),
        ("198.51.101.0", False),
        ("2001:db8:1::1", True),
        ("2001:db8:1::ffff", True),
        ("2001:db8:1:1::1", False),
        ("2001:db8:0:ffff::1", False),
        ("2001:db8:2::", True),
        ("2001:db8:2:ffff:ffff::", True),
        ("2001:db8:3::", False),
        ("203.0.113.9", True),
        ("::ffff:203.0.113.9", True),
        ("203.0.113.8", False),
        ("203.0.113.1", False),
        ("233.252.0.0", True),
        ("233.252.0.255", True),
        ("233.252.1.0", False),
        ("::1", False),
        ("::", False),
        ("", False),
        ("nonsense", False),
        ("fe80::1%eth0", False),
    ],
)
def test_denied_source_is_forbidden_everything(
        tmp_path: Path, make: Make, alice: Owner, source: str, denied: bool) -> None:
    relay = make(access=denying(tmp_path, *DENIED))
    assert relay.access.denies(source_of(source)) is denied
    expected = [FORBIDDEN] * 3 if denied else [OK, NOTHING, (403, "Wrong answer", 0)]
    assert (
        ask(relay, send(alice), check(alice, START_US), receive(alice, "no"), source=source)
        == expected
    )
    assert ask(relay, [check(alice, START_US)], source=source) == [
        FORBIDDEN if denied else [NOTHING]
    ]
    datagram = json.dumps(check(alice, START_US)).encode()
    assert answer_datagram(relay, datagram, source_of(source)) == (
        None if denied else json.dumps(NOTHING).encode()
    )


@pytest.mark.parametrize(("entry", "some", "others"), [
    ("0.0.0.0/0", ("0.0.0.0", "255.255.255.255", "::ffff:1.2.3.4"), ("::1", "2001:db8::")),
    ("::/0", ("::1", "ffff::"), ("192.0.2.1", "::ffff:1.2.3.4")),
    ("128.0.0.0/1", ("128.0.0.0", "192.0.2.1"), ("127.255.255.255",)),
    ("192.0.2.0/255.255.255.0", ("192.0.2.0", "192.0.2.255"), ("192.0.3.0",))])
def test_denied_network_may_be_of_any_size(
        tmp_path: Path, entry: str, some: Sequence[str], others: Sequence[str]) -> None:
    access = denying(tmp_path, entry)
    assert [source for source in some if not access.denies(source_of(source))] == []
    assert [source for source in others if access.denies(source_of(source))] == []


def test_denied_mailbox_is_forbidden_and_others_are_not(
    tmp_path: Path, make: Make, alice: Owner, bob: Owner
) -> None:
    relay = make(access=denying(tmp_path, f"{alice.pub} # spam"))
    assert ask(relay, *requests_with(alice, {})) == [FORBIDDEN] * 3
    assert ask(relay, check(bob), send(bob)) == [NOTHING, OK]
    assert batch(relay, check(bob, START_US), check(alice), check(bob, START_US)) == [
        NOTHING, ("Forbidden", 0), NOTHING]
    assert answer_datagram(relay, json.dumps(check(alice)).encode(), SOURCE) is None
    assert (
        answer_datagram(relay, json.dumps(check(bob, START_US)).encode(), SOURCE)
        == json.dumps(NOTHING).encode()
    )


def test_denied_mailbox_costs_its_key_nothing(make: Make, alice: Owner, bob: Owner) -> None:
    access = Access(
        {KEY: Quota("keys.alice", requests_per_day=1)}, None, denied_boxes=frozenset((alice.box,))
    )
    relay = make(access=access)
    assert ask(relay, check(alice, ext=KEY), check(bob, ext=KEY)) == [FORBIDDEN, NOTHING]


@pytest.mark.sockets
def test_denied_source_gets_health_alone(tmp_path: Path, make: Make, alice: Owner) -> None:
    with serving(make(access=denying(tmp_path, "127.0.0.0/8"))) as server:
        port = server.server_port
        assert post(port, check(alice))[0] == 403
        for path in ("/", "/metrics"):
            status, _, text = get(port, path)
            assert (status, refusal_in(json.loads(text))) == (403, ("Forbidden", 0))
        status, _, text = get(port, "/health")
        assert (status, json.loads(text)) == (200, OK)


@pytest.mark.sockets
def test_denied_source_gets_no_datagram(tmp_path: Path, make: Make, alice: Owner) -> None:
    relay = make(access=denying(tmp_path, "127.0.0.0/8"))
    with serving(relay, udp=True, stun=True) as server, datagrams_to(server.server_port) as client:
        client.send(json.dumps(check(alice)).encode())
        client.send(binding_request())
        until(lambda: relay.counts.taken()["connectoid_datagrams_total", "none"] == 2)
        assert not select.select([client], [], [], 0)[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("10.0.0.1/8", "write 10.0.0.0/8"),
        ("2001:db8::1/32", "write 2001:db8::/32"),
        ("192.0.2.256", "write an address"),
        ("192.0.2.1-9", "write an address"),
        ("192.0.2.0/33", "write an address"),
        ("example.org", "write an address"),
        ("192.0.2.1 192.0.2.2", "write an address"),
        ("1", "write an address"),
        ("A" * 66, "write an address"),
        (Owner(1).pub[:-1], "write an address"),
        (Owner(1).pub + "A", "write an address"),
        ("x" * 9_999, "write an address"),
    ],
    ids=lambda text: text[:20],
)
def test_mistake_in_a_deny_list_is_told_in_one_line_with_its_place(
    tmp_path: Path, line: str, words: str
) -> None:
    with pytest.raises(SettingError) as caught:
        denying(tmp_path, "# first", "192.0.2.1", f" {line} # why", "nonsense")
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'deny.txt'}, line 3: {line[:80]!r} is not an address, network or mailbox; "
    )
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(tmp_path)) + 250


def test_process_reads_the_deny_list_again(
    start: Callable[..., Process], tmp_path: Path, alice: Owner
) -> None:
    def deny(text: str) -> None:
        (tmp_path / "deny.txt").write_text(text)
        process.popen.send_signal(signal.SIGHUP)

    (tmp_path / "deny.txt").write_text("192.0.2.0/24\n")
    process = start("--db", ":memory:", "--deny", "deny.txt")
    assert post(process.port, check(alice)) == (200, NOTHING)
    deny(f"127.0.0.0/8\n{alice.pub}\n")
    until(lambda: post(process.port, check(alice))[0] == 403)
    assert get(process.port, "/health")[0] == 200
    assert next_log_line(process) == "connectoid-relay: read the files again\n"
    deny("192.0.2.0/24\n\n127.0.0.1/8\n")
    assert next_log_line(process) == (
        "connectoid-relay: deny.txt, line 3: '127.0.0.1/8' is not an address, network or"
        " mailbox; write 127.0.0.0/8; all stays as it was\n"
    )
    assert post(process.port, check(alice))[0] == 403
    (tmp_path / "deny.txt").unlink()
    process.popen.send_signal(signal.SIGHUP)
    assert next_log_line(process) == (
        "connectoid-relay: deny.txt: No such file or directory; give a file that the"
        " relay may read;"
        " all stays as it was\n"
    )
    assert post(process.port, check(alice))[0] == 403
    deny("")
    until(lambda: post(process.port, check(alice))[0] == 200)
    code, _ = process.stop()
    assert code == 0
