"""Test the metrics with Prometheus's own parser."""

from __future__ import annotations

import json
import socket

import pytest
from harness import (
    DEADLINE_S,
    KEY,
    OK,
    START_US,
    FakeClock,
    Make,
    Owner,
    WatchedStore,
    alices,
    binding_request,
    check,
    exchange,
    forwarded,
    get,
    http_request,
    networks,
    octets_over_udp,
    post,
    receive,
    refusal_in,
    send,
    serving,
    until,
)
from prometheus_client.parser import text_string_to_metric_families

from connectoid_relay import (
    MAX_DATA_CHARS,
    METRICS,
    MIN_COUNTED_BYTES,
    Access,
    Limits,
    Quota,
    StoreError,
    __version__,
    samples_of,
)

# ---------------------------------------------------------------------------------------
# Metrics, read by Prometheus's own parser.
# ---------------------------------------------------------------------------------------


def read_metrics(text: str) -> dict[tuple[str, str], float]:
    """Return the values by name and label; have types and labels be those of the table."""
    values: dict[tuple[str, str], float] = {}
    seen = []
    for family in text_string_to_metric_families(text):
        name = family.name + "_total" * (family.type == "counter")
        metric = METRICS[name]
        assert (family.type, family.documentation) == (metric.type, metric.meaning)
        seen.append(name)
        for sample in family.samples:
            assert sample.name == name
            assert list(sample.labels) == ([metric.label] if metric.label else [])
            values[name, "".join(sample.labels.values())] = sample.value
    assert seen == [name for name in METRICS if name in seen]
    assert len(values) == len([line for line in text.splitlines() if not line.startswith("#")])
    return values


def metrics_of(port: int) -> dict[tuple[str, str], float]:
    """Return the metrics of a server."""
    status, headers, text = get(port, "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert headers["access-control-allow-origin"] == "*"
    return read_metrics(text)


def total(name: str, **values: int) -> dict[tuple[str, str], int]:
    """Return a counter with what is not 0 in it."""
    metric = METRICS[f"connectoid_{name}_total"]
    by_value = {value.lower().replace(" ", "_"): value for value in metric.values}
    assert values.keys() <= by_value.keys()
    return {
        (f"connectoid_{name}_total", value): values.get(small, 0)
        for small, value in by_value.items()
    }


def ask_for_everything(port: int, alice: Owner, bob: Owner) -> None:
    """Ask for each operation, and for each refusal, over HTTP."""
    for _ in range(2):
        assert post(port, send(alice, ext=KEY)) == (200, OK)
    _, reply = post(port, check(alice, ext=KEY))
    answer = alice.open(reply["question"])
    assert post(port, receive(alice, answer, ext=KEY, limit=9))[0] == 200
    assert post(port, receive(alice, "no", ext=KEY))[0] == 403
    nothing = check(alice, START_US + 9, ext=KEY)
    assert post(port, [nothing, nothing, nothing, check(bob, ext=KEY), 1])[0] == 200
    assert post(port, [nothing, nothing])[1][1]["error"] == "Too often"
    assert post(port, check(alice))[0] == 403
    assert post(port, b"{")[0] == 400
    assert post(port, {"action": "KEY"})[0] == 400
    assert post(port, send(alice, "A" * (MAX_DATA_CHARS + 1), ext=KEY))[0] == 429
    assert get(port, "/none")[0] == 404
    assert get(port, method="PUT")[0] == 405
    assert get(port, "/metrics", method="POST")[0] == 405
    assert exchange(port, b"G\0").startswith(b"HTTP/1.1 400 ")


ASKED_FOR_EVERYTHING = {
    **total("requests", send=3, check=8, receive=2),
    **total(
        "refusals",
        bad_request=4,
        forbidden=2,
        wrong_answer=1,
        too_often=2,
        not_found=1,
        not_allowed=2,
    ),
    **total("datagrams", check=2, stun=1, none=2),
    **total("turn"),
    **total("handshakes"),
    ("connectoid_questions_total", ""): 1,
    ("connectoid_messages", ""): 2,
    ("connectoid_message_bytes", ""): 2 * MIN_COUNTED_BYTES,
    ("connectoid_boxes", ""): 1,
    ("connectoid_healthy", ""): 1,
    ("connectoid_uptime_seconds", ""): 50,
    ("connectoid_connections", ""): 1,
    ("connectoid_waiting_boxes", ""): 0,
    ("connectoid_queued_requests", ""): 0,
    ("connectoid_info", __version__): 1,
    **{("connectoid_limit", name): number for name, number in Limits()._asdict().items()},
}


def test_metrics_count_what_was_asked(
    make: Make, clock: FakeClock, alice: Owner, bob: Owner
) -> None:
    quota = Quota("keys.alice", requests_per_day=9)
    relay = make(access=Access({KEY: quota}, None, denied_boxes=frozenset((bob.box,))))
    with serving(relay, udp=True, stun=True) as server:
        port = server.server_port
        ask_for_everything(port, alice, bob)
        check_in_a_datagram = json.dumps(check(alice)).encode()
        replies = octets_over_udp(
            port, check_in_a_datagram, b"junk", binding_request(), binding_request(0x11)
        )
        assert len(replies) == 2
        clock.advance(50)
        values = metrics_of(port)
    # The sweeper has its own pace.
    assert 0 <= values.pop(("connectoid_sweep_age_seconds", "")) <= 50
    assert values == ASKED_FOR_EVERYTHING


def test_metrics_are_all_of_the_table_and_tell_of_nobody(make: Make, alice: Owner) -> None:
    relay = make(access=alices())
    with serving(relay, proxies=networks("127.0.0.0/8")) as server:
        for request in (send(alice, ext=KEY), check(alice, ext=KEY), check(alice)):
            forwarded(server.server_port, request, "203.0.113.77")
        _, _, text = get(server.server_port, "/metrics")
    assert {name for name, _ in read_metrics(text)} == set(METRICS)
    assert [
        secret
        for secret in (alice.pub, KEY, "203.0.113", "127.0.0", "keys.alice", "QUJD")
        if secret in text
    ] == []


def test_metrics_answer_get_and_head_alone(make: Make) -> None:
    with serving(make()) as server:
        status, headers, text = get(server.server_port, "/metrics")
        assert (status, int(headers["content-length"])) == (200, len(text))
        assert text.endswith("\n")
        head = get(server.server_port, "/metrics", method="HEAD")
        assert (head[0], head[2]) == (200, "")
        assert {**head[1], "content-length": ""} == {**headers, "content-length": ""}
        assert get(server.server_port, "/metrics?since=1")[0] == 200
        status, headers, text = get(server.server_port, "/metrics", method="POST")
        assert (status, headers["allow"], json.loads(text)) == (
            405, "GET, HEAD, OPTIONS", {"ok": False, "error": "Not allowed"})


@pytest.mark.parametrize("path", ["/", "/metrics"])
@pytest.mark.parametrize("accept", ["text/html", "application/json"])
def test_pages_count_against_the_rate_of_their_source(
    make: Make, alice: Owner, path: str, accept: str
) -> None:
    with serving(make(rate=2)) as server:
        port = server.server_port
        assert [get(port, path, f"Accept: {accept}")[0] for _ in range(3)] == [200, 200, 429]
        status, reply = post(port, check(alice))
        assert (status, refusal_in(reply)) == (429, ("Too often", 60))
        assert get(port, "/health")[0] == 200


def test_metrics_are_told_while_the_store_fails(make: Make, clock: FakeClock) -> None:
    watched = WatchedStore()
    relay = make(watched.store)
    of_the_store = {"connectoid_messages", "connectoid_message_bytes", "connectoid_boxes"}
    with serving(relay) as server:
        assert metrics_of(server.server_port)["connectoid_healthy", ""] == 1
        watched.error = StoreError("the disk has gone")
        clock.advance(5)
        values = metrics_of(server.server_port)
        assert values["connectoid_healthy", ""] == 0
        assert {name for name, _ in values} == set(METRICS) - of_the_store
        watched.error = None
        clock.advance(5)
        values = metrics_of(server.server_port)
        assert (values["connectoid_healthy", ""], values["connectoid_boxes", ""]) == (1, 0)


def test_sweep_age_and_uptime_are_of_the_relays_time(make: Make, clock: FakeClock) -> None:
    relay = make()
    clock.advance(61)
    relay.sweep()
    clock.advance(59.5)
    samples = samples_of(relay)
    assert [
        samples[f"connectoid_{name}", ""]
        for name in ("sweep_age_seconds", "uptime_seconds", "healthy")
    ] == [59, 120, 1]
    clock.advance(1)
    # No sweeper runs here.
    assert samples_of(relay)["connectoid_healthy", ""] == 0


def test_waiting_boxes_and_connections_are_counted_while_they_last(
    make: Make, alice: Owner, bob: Owner
) -> None:
    def gauges() -> tuple[float, float]:
        values = metrics_of(server.server_port)
        return values["connectoid_waiting_boxes", ""], values["connectoid_connections", ""]

    with serving(make(rate=0)) as server:
        assert gauges() == (0, 1)
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=DEADLINE_S) as one:
            one.sendall(http_request(json.dumps(check(alice, wait=60)).encode()))
            until(lambda: gauges() == (1, 2))
            with socket.create_connection(
                ("127.0.0.1", server.server_port), timeout=DEADLINE_S
            ) as many:
                many.sendall(
                    http_request(json.dumps([check(alice, wait=60), check(bob, wait=60)]).encode())
                )
                until(lambda: gauges() == (3, 3))
        until(lambda: gauges() == (0, 1))
