"""Test the container as far as no engine is needed; deploy/container_test.sh runs it."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Any

import yaml  # type: ignore[import-untyped]
from harness import ROOT
from pages import blocks, page

from connectoid_relay import build_parser

HOSTING = page("docs/hosting.md").partition("\n## As a container\n")[2]
CONTAINERFILE = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
STATE = "/var/lib/connectoid-relay"


def compose() -> dict[str, Any]:
    """Return the page's example for Compose."""
    example, *_ = blocks(HOSTING, "yaml")
    found: dict[str, Any] = yaml.safe_load(example)
    return found


def test_example_for_compose_sets_variables_that_the_relay_understands() -> None:
    found = compose()
    flags = build_parser(environ=found["services"]["relay"]["environment"]).parse_args([])
    assert flags != build_parser().parse_args([])
    assert flags.contact == "me@example.com"
    (subnet,) = found["networks"]["default"]["ipam"]["config"]
    assert flags.trusted_proxy == [ip_network(subnet["subnet"])]
    # Each variable has been used: a misspelt one would change nothing.
    for name, value in found["services"]["relay"]["environment"].items():
        assert build_parser(environ={name: value}).parse_args([]) != build_parser().parse_args([])


def test_example_for_compose_mounts_what_is_there() -> None:
    found = compose()
    relay = found["services"]["relay"]
    messages, secrets = (mount.split(":") for mount in relay["volumes"])
    assert (messages, secrets[1:]) == (["messages", STATE], ["/etc/connectoid", "ro"])
    assert relay["environment"]["CONNECTOID_TURN_SECRET"].startswith(secrets[1])
    assert (ROOT / relay["build"]["dockerfile"]).is_file()
    named = {mount.split(":")[0] for service in found["services"].values()
             for mount in service["volumes"] if not mount.startswith(".")}
    assert named == found["volumes"].keys()
    assert relay["ports"] == ["127.0.0.1:8080:8080"]


def test_containers_are_bounded_as_the_page_says() -> None:
    relay = compose()["services"]["relay"]
    assert (relay["read_only"], relay["cap_drop"]) == (True, ["ALL"])
    assert relay["security_opt"] == ["no-new-privileges:true"]
    command = HOSTING.partition("podman run")[2].partition("```")[0]
    assert {"--read-only", "--cap-drop", "--security-opt"} <= set(command.split())
    assert f"-v messages:{STATE}" in command


def test_containerfile_copies_what_is_there_and_runs_without_a_shell() -> None:
    copied = re.findall(r"(?m)^COPY (?!--from)(.*) /opt/connectoid/$", CONTAINERFILE)
    assert [(ROOT / name).is_file() for name in copied[0].split()] == [True, True]
    final = CONTAINERFILE.rpartition("\nFROM ")[2]
    assert f"VOLUME {STATE}\n" in final
    assert "USER 65532:65532\n" in final
    assert "STOPSIGNAL SIGTERM\n" in final
    for word in ("CMD", "ENTRYPOINT"):
        assert re.search(rf'(?m){word} \["/opt/connectoid/bin/python", .*\]$', final)
    assert "RUN" not in final
    assert re.findall(r"'(cryptography\S+)'", CONTAINERFILE) == re.findall(
        r"needs='(cryptography\S+)'", (ROOT / "deploy/install.sh").read_text("utf-8"))
