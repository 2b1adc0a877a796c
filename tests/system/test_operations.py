"""Test docs/operations.md as typed, and what docs/hosting.md promises."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from admin_harness import ADMIN, ALERTS, closed_port, make_file, promtool, restored_messages
from harness import NOTHING, OK, ROOT, post

from connectoid_relay import SCHEMA

OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
HOSTING = (ROOT / "docs" / "hosting.md").read_text("utf-8")


def test_operations_name_every_command_of_the_admin_and_every_alert() -> None:
    for command in ("check", "backup", "restore", "stats", "delete"):
        assert f"connectoid-admin {command}" in OPERATIONS
    for alert in ALERTS:
        assert alert in OPERATIONS


def test_nightly_backup_of_the_docs_is_silent_and_keeps_a_month(tmp_path: Path, path: str) -> None:
    (line,) = re.findall(r"(?m)^17 3 \* \* \* root (.+)$", OPERATIONS)
    make_file(Path(path), len(SCHEMA))
    folder = tmp_path / "backups"
    folder.mkdir(0o700)
    for days in (29, 32):
        (folder / f"connectoid-{days}.db").touch()
        os.utime(folder / f"connectoid-{days}.db", (0, time.time() - days * 86_400))
    line = line.replace(
        "/usr/local/bin/connectoid-admin backup", f"{' '.join(ADMIN)} backup --db {path}"
    )
    # The environment is as cron has it.
    finished = subprocess.run(
        ["sh", "-c", line.replace("/var/backups/connectoid", str(folder))],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert finished.stdout + finished.stderr == ""
    kept = sorted(os.listdir(folder))
    assert kept[1:] == ["connectoid-29.db"]
    assert restored_messages(folder / kept[0]) == 0


def test_files_of_the_docs_are_all_that_prometheus_needs(tmp_path: Path) -> None:
    (names,) = re.findall(r"(?m)^sudo cp (.+) /etc/prometheus/$", OPERATIONS)
    for name in names.split():
        shutil.copy(ROOT / name, tmp_path)
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


# sudo, systemctl and the installed connectoid-admin, as small as can be, in a test's folder.
STAND_INS = {
    "sudo": '#!/bin/sh\nexec "$@"\n',
    "connectoid-admin": """#!/bin/sh
what=$1 && shift
exec $ADMIN "$what" --flags "--host 127.0.0.1 --port $PORT" "$@"
""",
    "systemctl": """#!/bin/sh
[ "$2" = connectoid-relay ] || exit 1
case $1 in
    stop) kill "$(cat pid)"; while kill -0 "$(cat pid)"; do sleep 0.1; done ;;
    start) $RELAY --host 127.0.0.1 --port "$PORT" & echo $! >pid ;;
esac >>log 2>&1
""",
}


class Host:
    """A machine on which docs/operations.md is typed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, closed_port()
        for name, text in STAND_INS.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def type(self, block: str) -> str:
        """Run a block of commands and return what it prints."""
        finished = subprocess.run(
            ["sh", "-eu", "-c", block],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={
                "PATH": f"{self.folder}:/usr/bin:/bin",
                "PORT": str(self.port),
                "ADMIN": " ".join(ADMIN),
                "RELAY": f"{sys.executable} {ROOT / 'connectoid_relay.py'}",
            },
        )
        assert finished.returncode == 0, finished.stdout
        return finished.stdout

    def wait(self) -> int:
        """Return the port once the relay answers."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                post(self.port, b"")
                break
            time.sleep(0.1)
        return self.port


def test_operations_and_a_lost_disk_go_as_typed(tmp_path: Path) -> None:
    look, put_back, *_ = re.findall(r"(?ms)^```sh\n(.*?)^```$", OPERATIONS)
    (pub,) = re.findall(r"connectoid-admin delete (\S{66})$", look, re.MULTILINE)
    host = Host(tmp_path)
    host.type("systemctl start connectoid-relay")
    try:
        assert post(host.wait(), {"action": "send", "pub": pub, "data": "QUJD"}) == (200, OK)
        output = host.type(look)
        assert "FAIL" not in output
        assert re.search(r"(?m)^file messages +1$", output)
        assert "deleted: 1 messages, 0 questions, 0 places of proven mailboxes" in output
        host.type(
            "systemctl stop connectoid-relay; rm connectoid.db*; systemctl start connectoid-relay"
        )
        assert post(host.wait(), {"action": "check", "pub": pub}) == (200, NOTHING)
        assert "is what was backed up as connectoid-backup.db" in host.type(put_back)
        assert post(host.wait(), {"action": "check", "pub": pub})[1]["found"] is True
    finally:
        host.type("systemctl stop connectoid-relay")


@pytest.mark.parametrize("row", ["Raspberry Pi", "VPS", "behind a proxy", "embedded", "WSGI"])
def test_hosting_has_each_way_to_run_it_with_what_it_carries_and_costs(row: str) -> None:
    text = HOSTING.partition("\n## Which way to run it\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and row in line]
    assert lines, row
    assert "measured" in lines[0] or "computed" in lines[0]
