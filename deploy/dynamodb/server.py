"""Run the Connectoid relay on a DynamoDB table: several share one, behind a load balancer.

`python deploy/dynamodb/server.py --table connectoid --region eu-central-1 --create-table`
says what is missing, if anything is. The flags are those of connectoid_relay.py and four
more: see --help, and README.md beside this file.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["boto3>=1.35", "cryptography>=47"]
# ///

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Where connectoid_relay.py is, if not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import connectoid_relay
from connectoid_relay import NO_VARIABLES, Limits, Relay, SettingError, log, run_command, serve

try:
    from dynamodb_store import DynamoDbStore, check_limits, create_table, make_client
except ModuleNotFoundError as error:
    if error.name not in ("boto3", "botocore"):
        raise
    sys.exit("The DynamoDB store needs the package boto3: pip install 'boto3>=1.35'")

# Each server asks so often for messages that others took: a long poll ends within a second.
FOLLOW_EVERY_S = 0.5


def _table_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a table: 3 to 255 of A-Z a-z 0-9 _ . -")
    return text


def build_parser(prog: str = "server.py",
                 environ: Mapping[str, str] = NO_VARIABLES) -> argparse.ArgumentParser:
    """Return the relay's parser with the flags for a table instead of a file."""
    parser = connectoid_relay.build_parser(prog, environ)
    parser.set_defaults(db=None, sync=None)
    parser.add_argument(
        "--table", metavar="NAME", type=_table_name, default="connectoid",
        help="the table (default: %(default)s)")
    parser.add_argument(
        "--region", metavar="NAME", help="the region of AWS (default: $AWS_DEFAULT_REGION)")
    parser.add_argument(
        "--endpoint-url", metavar="URL",
        help="another engine with DynamoDB's API: http://HOST:PORT")
    parser.add_argument(
        "--create-table", action="store_true", help="make the table first, unless it is there")
    return parser


def open_relay(arguments: argparse.Namespace, limits: Limits, **settings: Any) -> Relay:
    """Return a relay on the table that the flags name; raise SettingError or StoreError."""
    if arguments.db or arguments.sync:
        raise SettingError("--db and --sync are for a relay on a file; leave them out")
    check_limits(limits)
    client = make_client(region=arguments.region, endpoint_url=arguments.endpoint_url)
    if arguments.create_table and not create_table(client, arguments.table):
        log.warning(
            "connectoid-relay: this engine deletes nothing by itself (no TTL): the table grows")
    store = DynamoDbStore(arguments.table, client, follow_every_s=FOLLOW_EVERY_S)
    store.check_clock(time.time_ns() // 1_000)
    return Relay(
        store, limits, rate_limit=store.rate_limit, source_key=store.source_key,
        fetch=store.fetch, **settings)


def serve_table(arguments: argparse.Namespace) -> None:
    """Run a relay on a table, as `connectoid_relay.serve` does on a file."""
    serve(arguments, open_relay, remote=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 stopped, 1 failed; 2 (usage) exits."""
    parser = build_parser(os.path.basename(sys.argv[0]), os.environ)
    return run_command(parser, argv, serve_table)


if __name__ == "__main__":
    sys.exit(main())
