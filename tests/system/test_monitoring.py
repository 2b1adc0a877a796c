"""Test rules and dashboard, by promtool and then by a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from admin_harness import ALERTS, MONITORING, RULES, closed_port, promtool
from harness import Owner, Process, check, post, receive, send, skip_without

from connectoid_relay import METRICS, Limits

DASHBOARD = json.loads((MONITORING / "connectoid-dashboard.json").read_text())
# Seconds of scrapes, one a second: two of the dashboard's rate windows.
LOAD_S = 24
RATE_WINDOW = "12s"


def test_rules_and_configuration_are_valid_and_do_what_their_tests_say() -> None:
    promtool("check", "rules", "rules.yml")
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_one_case_that_fires_and_one_that_is_silent() -> None:
    cases = re.findall(
        r"(?m)^  - name: (\w+) (fires|is silent)$", (MONITORING / "rules_test.yml").read_text()
    )
    assert sorted(cases) == sorted(
        (alert, case) for alert in ALERTS for case in ("fires", "is silent")
    )


def queries() -> dict[str, str]:
    """Return the queries of the dashboard by panel and letter."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }


def test_dashboard_and_rules_know_all_metrics_and_no_others() -> None:
    named = set(re.findall(r"connectoid_\w+", " ".join([*queries().values(), RULES])))
    assert named == set(METRICS)
    limits = set(re.findall(r'limit="(\w+)"', " ".join([*queries().values(), RULES])))
    assert limits <= set(Limits._fields)
    errors = set(re.findall(r'error="([^"]+)"', " ".join([*queries().values(), RULES])))
    assert errors <= set(METRICS["connectoid_refusals_total"].values)


def test_panels_have_numbers_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


class Prometheus:
    """A Prometheus of our own, with the rules, that scrapes one relay every second."""

    def __init__(self, folder: Path, relay_port: int) -> None:
        self.port = closed_port()
        configuration = (
            (MONITORING / "prometheus.yml")
            .read_text()
            .replace("15s", "1s")
            .replace("localhost:8080", f"127.0.0.1:{relay_port}")
            .replace("rules.yml", str(MONITORING / "rules.yml"))
        )
        (folder / "prometheus.yml").write_text(configuration)
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, path: str, **members: str) -> Any:
        """Return what its API says."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(members)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """Return the values of a query now."""
        return [
            float(series["value"][1]) for series in self.ask("query", query=expression)["result"]
        ]

    def until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Ask again until it is so."""
        give_up = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if holds():
                    return
            assert time.monotonic() < give_up
            time.sleep(0.2)


def load_relay(port: int, stop: threading.Event) -> None:
    """Do what apps do, and what they should not do."""
    owners, number = [Owner(number) for number in range(1, 9)], 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("127.0.0.1", port))
        while not stop.is_set():
            number += 1
            owner = owners[number % len(owners)]
            post(port, send(owner, "A" * 2_500))
            found = post(port, check(owner))[1]
            if "question" in found:
                post(port, receive(owner, owner.open(found["question"]), limit=1))
            udp.send(json.dumps(check(owner, id="a")).encode())
            if number % 20 == 0:
                post(port, b"nonsense")
                post(port, receive(owner, "wrong"))


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Process]]:
    """Return a Prometheus that has scraped a relay under load."""
    skip_without("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    process = Process(
        "--udp",
        "--rate",
        "0",
        "--max-box-messages",
        "100000",
        "--max-box-bytes",
        "1000000000",
        cwd=folder,
    )
    prometheus = Prometheus(folder, process.port)
    stop = threading.Event()
    thread = threading.Thread(target=load_relay, args=(process.port, stop))
    try:
        thread.start()
        prometheus.until(
            lambda: (
                prometheus.query(f"count_over_time(connectoid_healthy[{LOAD_S}s])") >= [LOAD_S - 3]
            ),
            LOAD_S + 30,
        )
        yield prometheus, process
    finally:
        stop.set()
        thread.join(20)
        prometheus.process.terminate()
        prometheus.process.wait(20)
        process.stop()


@pytest.mark.slow
def test_real_prometheus_scrapes_and_knows_every_metric(
    scraped: tuple[Prometheus, Process],
) -> None:
    prometheus, _ = scraped
    assert prometheus.query("up") == [1]
    assert prometheus.query('rate(connectoid_requests_total{action="send"}[20s])')[0] > 0
    for name in METRICS:
        assert prometheus.query(name), name
        (metadata,) = prometheus.ask("metadata", metric=name)[name]
        assert (metadata["type"], metadata["help"]) == (METRICS[name].type, METRICS[name].meaning)


@pytest.mark.slow
def test_every_panel_of_the_dashboard_has_numbers(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, _ = scraped
    variables = {"$__rate_interval": RATE_WINDOW, "$job": "connectoid", "$instance": ".*"}
    empty = []
    for title, template in queries().items():
        expression = template
        for variable, value in variables.items():
            expression = expression.replace(variable, value)
        numbers = prometheus.query(expression)
        if not numbers or not all(number >= 0 for number in numbers):
            empty.append((title, numbers))
    assert empty == []


@pytest.mark.slow
def test_dashboard_marks_the_starts_of_a_relay(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, _ = scraped
    (mark,) = DASHBOARD["annotations"]["list"]
    expression = mark["expr"].replace("$job", "connectoid").replace("$instance", ".*")
    assert prometheus.query(expression) == []
    assert prometheus.query(expression.removesuffix(" > 0")) == [0]


@pytest.mark.slow
def test_dashboard_finds_relays_by_its_variables(scraped: tuple[Prometheus, Process]) -> None:
    prometheus, process = scraped
    for label, expected in (("job", ["connectoid"]), ("instance", [f"127.0.0.1:{process.port}"])):
        assert prometheus.ask(f"label/{label}/values", **{"match[]": "connectoid_info"}) == expected


@pytest.mark.slow
def test_every_alert_is_evaluated_silent_when_all_is_well_and_made_of_metrics_that_exist(
    scraped: tuple[Prometheus, Process],
) -> None:
    prometheus, _ = scraped
    (group,) = prometheus.ask("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == ALERTS
    for rule in group["rules"]:
        assert (rule["health"], rule["state"]) == ("ok", "inactive"), rule
        assert prometheus.query(rule["query"]) == [], rule["name"]
        for metric in set(re.findall(r"\b(?:connectoid_\w+(?:{[^}]*})?|up{[^}]*})", rule["query"])):
            assert prometheus.query(metric), (rule["name"], metric)


@pytest.mark.slow
def test_alert_is_pending_when_the_relay_has_gone(tmp_path: Path) -> None:
    skip_without("prometheus")
    process = Process(cwd=tmp_path)
    prometheus = Prometheus(tmp_path, process.port)
    try:
        prometheus.until(lambda: prometheus.query("up") == [1])
        process.stop(9)
        prometheus.until(
            lambda: (
                [
                    (alert["labels"]["alertname"], alert["state"])
                    for alert in prometheus.ask("alerts")["alerts"]
                ]
                == [("ConnectoidDown", "pending")]
            )
        )
    finally:
        process.stop(9)
        prometheus.process.terminate()
        prometheus.process.wait(20)


# ---------------------------------------------------------------------------------------
# The installer. deploy/install_test.sh tries it in a Debian of its own: make install-test.
# ---------------------------------------------------------------------------------------
