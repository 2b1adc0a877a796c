"""Start real engines with DynamoDB's API on this machine, for the tests: dynalite and moto."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
DYNALITE = ROOT / "js" / "node_modules" / "dynalite" / "cli.js"
NO_DYNALITE = "dynalite is missing: run `npm install --ignore-scripts` in js/"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "eu-central-1",
    # A test must not look for a role of its machine.
    "AWS_EC2_METADATA_DISABLED": "true",
}
_numbers = itertools.count()


class Missing(Exception):
    """Say what to install for an engine."""


@contextlib.contextmanager
def dynalite() -> Iterator[str]:
    """Run dynalite on a free port and return its URL; raise Missing."""
    node = shutil.which("node")
    if not (node and DYNALITE.exists()):
        raise Missing(NO_DYNALITE)
    # It cannot say which port it got, so a line of JavaScript does. And it dies of a client
    # that is killed while it sends a request, which is for our tests to do.
    script = (
        "const server = require(process.argv[1])({createTableMs: 0}); server.listen(0,"
        " '127.0.0.1', () => console.log('port ' + server.address().port));"
        "process.on('uncaughtException', error => {"
        " if (error.code !== 'ECONNRESET') process.exit(1) })")
    with _process([node, "-e", script, str(DYNALITE.parent)]) as url:
        yield url


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """Run moto's server on a free port, as a process of its own, and return its URL.

    One request at a time: in threads its conditions do not hold (two writers both see the
    old item).
    """
    script = (
        "from waitress import create_server; from moto.server import create_backend_app;"
        " app = create_backend_app('dynamodb');"
        " server = create_server(app, host='127.0.0.1', port=0, threads=1);"
        " print('port', server.effective_port, flush=True); server.run()")
    with _process([sys.executable, "-c", script]) as url:
        yield url


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **ENVIRONMENT}) as process:
        try:
            line = ""
            if process.stdout:
                line = process.stdout.readline()
            port = re.fullmatch(r"port (\d+)\n", line)
            if not port:
                raise Missing(
                    f"{command[0]} does not start the engine; install the extra `test` and"
                    " dynalite")
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            process.kill()


ENGINES: Mapping[str, Callable[[], contextlib.AbstractContextManager[str]]] = {
    "dynalite": dynalite,
    "moto": moto,
}


def session() -> boto3.session.Session:
    """Return a session with credentials that are none."""
    return boto3.session.Session("test", "test", region_name="eu-central-1")


@functools.cache
def client_of(url: str) -> Any:
    """Return a client of an engine."""
    config = Config(
        max_pool_connections=32, connect_timeout=5, read_timeout=30,
        retries={"total_max_attempts": 2})
    return session().client("dynamodb", endpoint_url=url, config=config)


def new_name() -> str:
    """Return the name of a table that no other test has."""
    return f"table{next(_numbers)}"
