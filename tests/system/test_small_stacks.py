"""Nested JSON crashes no thread with little stack: musl gives 128 KiB, many hosts set 1 MiB."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import DEADLINE_S, ROOT

# Python 3.12 follows thousands of levels on the stack of the thread, and asks nobody.
READ_IN_A_THREAD = """
import threading, urllib.error, urllib.request
from connectoid import Refused
from connectoid.cli.talking import TransferError, read_control
from connectoid.contact import ContactRecord
from connectoid.encoding import parse_json
from connectoid.errors import RecordError, UsageError
from connectoid.ice import parse_ice_servers
from connectoid_admin import Answer, _document
from connectoid_relay import Refusal, Relay, RelayServer, SqliteStore
from connectoid_relay import parse_json as parse_request

threading.stack_size({stack_bytes})
DEEP = ['[' * 30_000 + ']' * 30_000, '{{"a":' * 10_000 + '1' + '}}' * 10_000, '[' * 60_000]
READERS = [
    (lambda text: parse_request(text.encode()), Refusal),
    (lambda text: parse_json(text.encode()), Refused),
    (read_control, TransferError),
    (ContactRecord.from_json, RecordError),
    (lambda text: parse_ice_servers(text, 'x'), UsageError),
]
told = []

def read():
    for text in DEEP:
        for reader, refusal in READERS:
            try:
                reader(text)
            except refusal:
                told.append('refused')
        told.append(_document(Answer(200, {{}}, text.encode())))

thread = threading.Thread(target=read)
thread.start()
thread.join()
assert told == [*['refused'] * len(READERS), {{}}] * len(DEEP), told

relay = Relay(SqliteStore(':memory:'))
with RelayServer(('127.0.0.1', 0), relay) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for text in DEEP:
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{{server.server_port}}/', text.encode())
        except urllib.error.HTTPError as error:
            with error:
                told.append(error.status)
    server.shutdown()
    thread.join()
relay.close()
assert told[-3:] == [400] * 3, told
print('alive')
"""


@pytest.mark.parametrize("stack_bytes", [1 << 20, 128 << 10], ids=["1 MiB", "128 KiB"])
def test_nested_json_crashes_no_thread_with_little_stack(stack_bytes: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", READ_IN_A_THREAD.format(stack_bytes=stack_bytes)],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (ran.returncode, ran.stdout) == (0, "alive\n"), ran.stderr
