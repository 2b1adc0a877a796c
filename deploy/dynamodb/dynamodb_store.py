"""Keep all that a Connectoid relay keeps in one DynamoDB table, for any number of relays at a time.

It runs on AWS and on engines with DynamoDB's API (ScyllaDB's Alternator, dynalite): all it
asks for are conditional writes of single items. README.md beside this file says how to run
it. To embed it:

    from connectoid_relay import Limits, Relay
    from dynamodb_store import DynamoDbStore, make_client

    store = DynamoDbStore("connectoid", make_client(region="eu-central-1"))
    relay = Relay(store, Limits(), rate_limit=store.rate_limit,
                  source_key=store.source_key, fetch=store.fetch)

What stands in the table, by partition key and sort key, both binary:

    box      "box"       the box: its index of messages, and until when its row lives
    box      "m" id      the body of a message
    box      "question"  the newest question, and the answer of the one before
    "relay"  "messages"  relay time, the last `at`, the messages and bytes in all
    "relay"  "boxes"     the number of box rows
    "quota"  name        the bytes that an API key keeps at present
    "spent"  day name    its requests of a day
    "arrivals"  at       which box got a message, for long polls held by other relays
    "key"    day         the key under which sources are hashed on that day
    hash     "rate"      what a source has taken of a rate limit in a span of time

A message counts from the write that puts it into its box's index, and only then: the index
is rewritten whole, on condition that nobody else has done so meanwhile, and an `at` that
is not larger than the last one in it is replaced by a new one first. So a box's messages
show up in the order of their `at`, whoever takes them. All that is written before (a place
in the totals, the body) ends by itself if the writer dies. Every item but the totals
carries the attribute `ttl`. The engine deletes late, so what has expired is left out of
every answer.
"""

from __future__ import annotations

__all__ = [
    "DynamoDbStore", "SharedRateLimit", "bucket_width_us", "check_limits", "create_table",
    "make_client",
]

import collections
import contextlib
import email.utils
import hashlib
import re
import secrets
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from connectoid_relay import (
    DAY_US,
    MAX_RECEIVE_CHARS,
    MAX_SOURCES,
    MINUTE_US,
    POOL_THREADS,
    SECOND_US,
    SOURCE_KEY_BYTES,
    YEAR_2200_US,
    Held,
    Limits,
    Look,
    Message,
    NoRoom,
    SettingError,
    Stored,
    StoreError,
    Wider,
    counted_bytes,
    log,
    make_room,
    seconds_until,
)

# ---------------------------------------------------------------------------------------
# Limits.
# ---------------------------------------------------------------------------------------

# Messages in a box's index: they take 208 KiB, and an item may have 400.
MAX_BOX_ENTRIES = 4_096
# A healthy engine takes milliseconds.
CONNECT_TIMEOUT_S = 1.0
# Lambda's first event may make 22 calls within its 30 s.
READ_TIMEOUT_S = 1.0
# Of a call, the first one included.
ATTEMPTS = 2
# Beside one for each thread of the pool: the sweeper, the follower, the constructor.
SPARE_CONNECTIONS = 4
# An engine in trouble is asked by one call a second. All others fail at once.
RETRY_AFTER_S = 1.0
# Tries to write what others write at the same time: somebody wins each time.
MAX_TRIES = 30
# The longest pause between two of these.
RETRY_PAUSE_MS = 20
# How many boxes this process writes at the same time.
LOCKS = 64
# Items in one read: DynamoDB's limit.
MAX_BATCH_KEYS = 100
# Tries to read many items when the engine answers in parts.
MAX_BATCH_TRIES = 6
# The pause before the second part. It doubles before each further one: 1.5 s in all.
BATCH_PAUSE_S = 0.05
# A message's place is freed at most a twelfth of its life late: an hour has 5 minutes.
PARTS_OF_TTL = 12
# The same for short lives.
MIN_PART_US = SECOND_US
# Parts freed in one write: an expression may have 4 KiB.
SWEEP_PARTS = 16
# A sweep reads totals that nothing here has read for so long.
SWEEP_READ_US = 10 * SECOND_US
# How far the table's time may be behind before a question or a box row raises it.
TIME_STEP_US = 10 * SECOND_US
# An item outlives its content by this much, since that may expire later than its body knew.
TTL_SLACK_S = 3_600
# Arrivals are read again from this long ago, since a relay may announce a message this late.
ARRIVALS_OVERLAP_US = 10 * SECOND_US
# Arrivals are kept in memory far longer than a front takes between two looks.
ARRIVALS_KEPT_US = 2 * MINUTE_US
# They take 20 MB at most. What is forgotten is found by the next check.
MAX_ARRIVALS = 100_000
# Pages of 1 MiB, read at a time.
ARRIVALS_PAGES = 8
# A relay takes this part of a rate limit at first: as many relays get some of it.
FIRST_LEASE_PARTS = 64
# Later it takes an eighth at a time: few writes, and little lies idle elsewhere.
LEASE_PARTS = 8
# The most between our clock and the engine's or the table's. AWS refuses signatures beyond it.
MAX_CLOCK_GAP_S = 300
# How much of an engine's name for an error is logged. The longest of AWS has 38 characters.
MAX_CODE_CHARS = 64
# Of whatever is counted.
UNLIMITED = 10**15

# ---------------------------------------------------------------------------------------
# The client: time-outs, the table, words for what may go wrong.
# ---------------------------------------------------------------------------------------

_REFUSED_CODE = "ConditionalCheckFailedException"
_DENIED = (
    "does not accept our credentials; give others with the right to read and write it, and look"
    " at the clock")
_DENIED_CODES = (
    "AccessDeniedException",
    "ExpiredTokenException",
    "IncompleteSignatureException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationTokenException",
    "UnrecognizedClientException",
)
_THROTTLED = "has not enough capacity; raise it, or make it on demand"
_THROTTLED_CODES = (
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ThrottlingException",
)
_NO_CREDENTIALS = (
    "needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a"
    " role")
# What an error of the engine means to the host.
_MEANINGS = {
    "ResourceNotFoundException":
        "does not exist; make it with --create-table or name another with --table",
    "ValidationException":
        "has not the keys pk and sk, both binary; make another with --create-table",
    "HTTPClientError":
        "cannot be asked; look for line breaks in the credentials, and at --endpoint-url",
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    **dict.fromkeys(_DENIED_CODES, _DENIED),
    **dict.fromkeys(_THROTTLED_CODES, _THROTTLED),
}
_SILENT = "does not answer; look at the network and at --endpoint-url"
_FOREIGN = (
    "cannot be used: what answers at --endpoint-url does not speak DynamoDB, or others write to"
    " the table")
# The address may hold a password, so it is not repeated.
_NO_ADDRESS = "--endpoint-url is not a web address; write http://HOST:PORT"
# What botocore may find wrong before any call.
_WRONG_SETTINGS = {
    "InvalidRegionError": "--region, or AWS_DEFAULT_REGION, is no name of a region",
    "PartialCredentialsError":
        "half of the credentials is missing; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not there",
}


def make_client(*, region: str | None = None, endpoint_url: str | None = None,
                threads: int = POOL_THREADS) -> Any:
    """Return a DynamoDB client for so many threads whose calls end within seconds.

    Raises SettingError.
    """
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=threads + SPARE_CONNECTIONS)
    if endpoint_url and not re.match("https?://.", endpoint_url):
        raise SettingError(_NO_ADDRESS)
    try:
        session = boto3.session.Session()
        region = region or session.region_name
        if not region:
            raise SettingError("no region is known; name one with --region or AWS_DEFAULT_REGION")
        return session.client(
            "dynamodb", region_name=region, endpoint_url=endpoint_url, config=config)
    except BotoCoreError as error:
        code = code_of(error)
        meaning = _WRONG_SETTINGS.get(code, f"the settings for AWS cannot be used ({code})")
        raise SettingError(meaning) from None
    except ValueError:
        raise SettingError(_NO_ADDRESS) from None


def code_of(error: Exception) -> str:
    """Return the engine's word for an error, or the name of its class, fit for a log."""
    code = type(error).__name__
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", code))
    return re.sub(r"\W", "", code)[:MAX_CODE_CHARS]


def _explain(table_name: str, error: Exception) -> StoreError:
    """Return an error as one of ours, with its meaning and without what was in the call."""
    code = code_of(error)
    meaning = _FOREIGN
    if code in _MEANINGS:
        meaning = _MEANINGS[code]
    elif isinstance(error, ClientError):
        meaning = "cannot be used"
    elif isinstance(error, BotoCoreError):
        meaning = _SILENT
    return StoreError(f"the table {table_name} {meaning} ({code})")


def create_table(client: Any, table_name: str) -> bool:
    """Make the table, on demand, unless it is there. Raises StoreError.

    Return whether the engine deletes by its `ttl`. Without that nothing expired is ever
    told, but the table grows.
    """
    try:
        if not _exists(client, table_name):
            _make_table(client, table_name)
        waiter = client.get_waiter("table_exists")
        waiter.wait(TableName=table_name, WaiterConfig={"Delay": 0.2, "MaxAttempts": 300})
        return _have_expired_deleted(client, table_name)
    except Exception as error:
        # The error is not botocore's if the peer is no engine.
        raise _explain(table_name, error) from None


def _exists(client: Any, table_name: str) -> bool:
    try:
        client.describe_table(TableName=table_name)
    except client.exceptions.ResourceNotFoundException:
        return False
    return True


def _make_table(client: Any, table_name: str) -> None:
    schema = []
    attributes = []
    for name, kind in (("pk", "HASH"), ("sk", "RANGE")):
        schema.append({"AttributeName": name, "KeyType": kind})
        attributes.append({"AttributeName": name, "AttributeType": "B"})
    # Another process may be making it.
    with contextlib.suppress(client.exceptions.ResourceInUseException):
        client.create_table(
            TableName=table_name, BillingMode="PAY_PER_REQUEST", KeySchema=schema,
            AttributeDefinitions=attributes)


def _have_expired_deleted(client: Any, table_name: str) -> bool:
    """Return False if the engine knows no TTL."""
    try:
        described = client.describe_time_to_live(TableName=table_name)
        if described["TimeToLiveDescription"]["TimeToLiveStatus"] == "DISABLED":
            client.update_time_to_live(
                TableName=table_name,
                TimeToLiveSpecification={"Enabled": True, "AttributeName": "ttl"})
    except ClientError as error:
        if _MEANINGS.get(code_of(error)) in (_DENIED, _THROTTLED):
            raise
        return False
    return True


def check_limits(limits: Limits) -> None:
    """Raise SettingError for limits that an item of DynamoDB cannot hold."""
    if limits.max_box_messages > MAX_BOX_ENTRIES:
        raise SettingError(f"--max-box-messages must be at most {MAX_BOX_ENTRIES} with DynamoDB")


# ---------------------------------------------------------------------------------------
# The table: items as dicts of int, bytes and str, conditions that hold or not, and one
# error class. A name in an expression begins with #, a value with a colon.
# ---------------------------------------------------------------------------------------

Item: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[bytes, bytes]
Reply: TypeAlias = Mapping[str, Any]
_T = TypeVar("_T")
_NAME = re.compile(r"#(\w+)")
_JSON_TYPE = "application/x-amz-json"


def _encode(value: Any) -> dict[str, Any]:
    if isinstance(value, int):
        return {"N": str(value)}
    if isinstance(value, bytes):
        return {"B": value}
    return {"S": value}


def _encode_key(key: Key) -> dict[str, Any]:
    pk, sk = key
    return {"pk": {"B": pk}, "sk": {"B": sk}}


def _encode_item(key: Key, item: Mapping[str, Any]) -> dict[str, Any]:
    return _encode_key(key) | {name: _encode(value) for name, value in item.items()}


def _decode_value(value: Mapping[str, Any]) -> Any:
    if "N" in value:
        return int(value["N"])
    return next(iter(value.values()))


def _decode(attributes: Mapping[str, Mapping[str, Any]]) -> Item:
    return {name: _decode_value(value) for name, value in attributes.items()}


def _decode_item(reply: Reply) -> Item:
    return _decode(reply.get("Item", {}))


def _decode_attributes(reply: Reply) -> Item:
    return _decode(reply["Attributes"])


def _decode_page(reply: Reply) -> tuple[list[Item], Any]:
    """Return the items of a page, and where the next one begins."""
    return [_decode(item) for item in reply["Items"]], reply.get("LastEvaluatedKey")


def _expression(values: Mapping[str, Any], **expressions: str) -> dict[str, Any]:
    """Return expressions by their parameter, with the names and values that they use."""
    names = {name for text in expressions.values() for name in _NAME.findall(text)}
    parameters: dict[str, Any] = {
        **expressions,
        "ExpressionAttributeNames": {f"#{name}": name for name in names},
        "ExpressionAttributeValues": {f":{name}": _encode(value)
                                      for name, value in values.items()},
    }
    return {name: parameter for name, parameter in parameters.items() if parameter}


def _date_of(reply: Reply) -> str:
    """Return the engine's date, empty if it tells none.

    Raises ValueError or KeyError if this is not an engine's reply: else an empty 200 or a
    page of a proxy would be taken for a write that was done, or an item that is not there.
    """
    headers = reply["ResponseMetadata"]["HTTPHeaders"]
    if not headers.get("content-type", "").startswith(_JSON_TYPE):
        raise ValueError
    if headers.get("content-length") == "0":
        raise ValueError
    return str(headers.get("date", ""))


class Table:
    """Read and write the items of a table; raises StoreError and nothing else.

    Once the engine has not answered or has refused for want of capacity, one call a second
    tries again and all others of its kind (reads, writes) fail at once: else every thread
    of a relay would wait for its time-outs, and every client for a thread.
    """

    def __init__(self, name: str, client: Any) -> None:
        self._name = name
        self._client = client
        self.closed = threading.Event()
        # By reads (False) and writes (True): the trouble, and until when it counts.
        self._troubles: dict[bool, tuple[str, float]] = {}
        # The engine's, in its last reply.
        self.date = ""

    def _read(self, call: Callable[..., Reply], decode: Callable[[Reply], _T],
              **parameters: Any) -> _T | None:
        return self._call(False, call, decode, parameters)

    def _write(self, call: Callable[..., Reply], decode: Callable[[Reply], _T],
               **parameters: Any) -> _T | None:
        return self._call(True, call, decode, parameters)

    def _call(self, writes: bool, call: Callable[..., Reply], decode: Callable[[Reply], _T],
              parameters: Mapping[str, Any]) -> _T | None:
        """Return what the engine's reply says; None if a condition does not hold."""
        self._check_trouble(writes)
        result: _T | None = None
        try:
            reply = call(**parameters)
            self.date = _date_of(reply)
            result = decode(reply)
        except Exception as error:
            # The error is not botocore's if the peer is no engine.
            if code_of(error) != _REFUSED_CODE:
                raise self._note_trouble(writes, error) from None
        self._troubles.pop(writes, None)
        return result

    def _check_trouble(self, writes: bool) -> None:
        """Raise StoreError while there is trouble; let one call a second try again."""
        if self.closed.is_set():
            raise StoreError(f"the table {self._name} is closed")
        trouble, until_s = self._troubles.get(writes, ("", 0.0))
        if not trouble:
            return
        if time.monotonic() < until_s:
            raise StoreError(trouble)
        self._troubles[writes] = (trouble, time.monotonic() + RETRY_AFTER_S)

    def _note_trouble(self, writes: bool, error: Exception) -> StoreError:
        """Return an error as one of ours; remember it if the next calls would meet it too."""
        told = _explain(self._name, error)
        is_throttled = _MEANINGS.get(code_of(error)) == _THROTTLED
        if is_throttled or not isinstance(error, ClientError):
            self._troubles[writes] = (str(told), time.monotonic() + RETRY_AFTER_S)
        return told

    def read(self, key: Key) -> Item:
        """Return an item as it is now, empty if there is none."""
        item = self._read(
            self._client.get_item, _decode_item, TableName=self._name, Key=_encode_key(key),
            ConsistentRead=True)
        return item or {}

    def write(self, key: Key, item: Mapping[str, Any], condition: str = "",
              **values: Any) -> bool:
        """Write a whole item if the condition holds; return whether it did."""
        expression = _expression(values, ConditionExpression=condition)
        written = self._write(
            self._client.put_item, bool, TableName=self._name, Item=_encode_item(key, item),
            **expression)
        return written is not None

    def update(self, key: Key, change: str, condition: str = "", **values: Any) -> Item | None:
        """Change an item, which need not exist, if the condition holds.

        Return what has changed, else None.
        """
        expression = _expression(values, UpdateExpression=change, ConditionExpression=condition)
        return self._write(
            self._client.update_item, _decode_attributes, TableName=self._name,
            Key=_encode_key(key), ReturnValues="UPDATED_NEW", **expression)

    def query(self, pk: bytes, after: bytes, *, pages: int, consistent: bool) -> list[Item]:
        """Return the items of a partition after a sort key, in their order.

        They come from so many pages of 1 MiB at most.
        """
        condition = _expression(
            {"pk": pk, "after": after}, KeyConditionExpression="#pk = :pk AND #sk > :after")
        items: list[Item] = []
        start: dict[str, Any] = {}
        for _ in range(pages):
            page = self._read(
                self._client.query, _decode_page, TableName=self._name,
                ConsistentRead=consistent, **condition, **start)
            found, last_key = page or ([], None)
            items += found
            if not last_key:
                break
            start = {"ExclusiveStartKey": last_key}
        return items

    def read_many(self, keys: Sequence[Key]) -> list[Item]:
        """Return those of up to MAX_BATCH_KEYS items that exist, in any order."""
        encoded = [_encode_key(key) for key in keys]
        request: Mapping[str, Any] = {self._name: {"Keys": encoded, "ConsistentRead": True}}
        items: list[Item] = []
        for attempt in range(MAX_BATCH_TRIES):
            if attempt:
                self.closed.wait(BATCH_PAUSE_S * 2 ** (attempt - 1))
            batch = self._read(
                self._client.batch_get_item, self._decode_batch, RequestItems=request)
            found, request = batch or ([], {})
            items += found
            if not request:
                return items
        raise StoreError(f"the table {self._name} {_THROTTLED}")

    def _decode_batch(self, reply: Reply) -> tuple[list[Item], Mapping[str, Any]]:
        """Return what was found, and what to ask for again."""
        found = reply["Responses"].get(self._name, ())
        return [_decode(item) for item in found], reply.get("UnprocessedKeys") or {}


# ---------------------------------------------------------------------------------------
# Totals: sums over what expires. Beside each total stand its parts, by the time at which
# they have wholly expired; a sweep takes such a part off the total in one write. So what a
# relay has added and not used, because it was killed, is gone with its part, and any
# number of sweepers agree.
# ---------------------------------------------------------------------------------------


def bucket_width_us(ttl_us: int) -> int:
    """Return for how long messages of a certain life share a part.

    An item keeps 13 parts or so of each length of life.
    """
    return max(MIN_PART_US, ttl_us // PARTS_OF_TTL)


def _part(name: str, end_us: int) -> str:
    """Return the name of a part: the item should cost one unit a write, which is 1 KiB."""
    return f"{name[0]}{end_us}"


class Totals:
    """Keep totals of some names in one item; the first one has a limit."""

    def __init__(self, table: Table, key: Key, *names: str) -> None:
        self._table = table
        self._key = key
        self._names = names
        self._seen: Item = {}
        self._read_us = 0

    def read(self) -> Item:
        """Return the item as it is now."""
        self._seen = self._table.read(self._key)
        return self._seen

    def add(self, amounts: Mapping[str, int], end_us: int, room: int = UNLIMITED, *,
            also: str = "", condition: str = "", **values: Any) -> Item | None:
        """Add amounts that end at a time, if there is room for them.

        Return what has changed, None if refused.
        """
        first = self._names[0]
        left = room - amounts.get(first, 0)
        if left < 0:
            return None
        change = also
        if amounts:
            change = f"{also} {_addition(amounts, end_us)}"
        has_room = f"(attribute_not_exists(#{first}) OR #{first} <= :left)"
        return self._update(change, has_room + condition, left=left, **amounts, **values)

    def give_back(self, amounts: Mapping[str, int], end_us: int) -> None:
        """Take off what was added, unless a sweep has done so.

        If that cannot be done now, a sweep will.
        """
        condition = " AND ".join(
            f"attribute_exists(#{_part(name, end_us)})" for name in amounts)
        less = {name: -amount for name, amount in amounts.items()}
        with contextlib.suppress(StoreError):
            self._update(_addition(amounts, end_us), condition, **less)

    def prolong(self, name: str, old_end_us: int, new_end_us: int) -> None:
        """Let one of the counted things end later."""
        old = _part(name, old_end_us)
        new = _part(name, new_end_us)
        moved = self._update(
            f"ADD #{old} :less, #{new} :more", f"attribute_exists(#{old})", less=-1, more=1)
        if moved is None:
            self.add({name: 1}, new_end_us)

    def release(self, now_us: int) -> int:
        """Take parts that have ended off the totals and return how many.

        SWEEP_PARTS says that there may be more.
        """
        if not self._seen or now_us - self._read_us >= SWEEP_READ_US:
            self.read()
            self._read_us = now_us
        seen = self._seen.copy()
        ends_us = _ended(seen, now_us)
        if not ends_us:
            return 0
        gone: Item = {}
        sums: dict[str, int] = {}
        for name in self._names:
            parts = [part for end_us in ends_us if (part := _part(name, end_us)) in seen]
            gone |= {part: seen[part] for part in parts}
            sums[name] = sum(seen[part] for part in parts)
        less = ", ".join(f"#{name} = #{name} - :{name}" for name in sums)
        removed = ", ".join(f"#{part}" for part in gone)
        condition = " AND ".join(f"#{part} = :{part}" for part in gone)
        change = f"SET {less} REMOVE {removed}"
        changed = self._table.update(self._key, change, condition, **sums, **gone)
        self._seen = {}
        if changed is None:
            # Another sweeper was faster.
            return SWEEP_PARTS
        return len(ends_us)

    def _update(self, change: str, condition: str, **values: Any) -> Item | None:
        item = self._table.update(self._key, change, condition, **values)
        self._seen.update(item or {})
        return item


def _addition(amounts: Iterable[str], end_us: int) -> str:
    """Return the expression that adds each amount to its total and to its part."""
    added = [f"#{name} :{name}, #{_part(name, end_us)} :{name}" for name in amounts]
    return f"ADD {', '.join(added)}"


def _ended(item: Item, now_us: int) -> list[int]:
    """Return the ends of the first parts that have wholly expired."""
    ends_us = {int(name[1:]) for name in item if name[1:].isdigit()}
    return sorted(end_us for end_us in ends_us if end_us <= now_us)[:SWEEP_PARTS]


# ---------------------------------------------------------------------------------------
# A box: what its item holds, packed so that a check reads little and a send writes little.
# ---------------------------------------------------------------------------------------

_ENTRY = struct.Struct(">QQI16s16s")
# Both are random.
ID_BYTES = 16
VERSION_BYTES = 8


class Entry(NamedTuple):
    """A message in the index of its box: the members of Held, and where its body is."""

    at: int
    expires_us: int
    size: int
    source: bytes
    id: bytes


class Box(NamedTuple):
    """A box as one of its versions shows it; one that does not exist has version 0.

    Versions are random. If they were counted, that of a box which the engine has deleted
    would come again, and a writer that slept meanwhile would write over what others have
    put there. `kept_until_us` is the expiry of the box's row, 0 without one.
    """

    version: int = 0
    last_at: int = 0
    kept_until_us: int = 0
    entries: tuple[Entry, ...] = ()

    def alive(self, now_us: int) -> Box:
        """Return it without what has expired."""
        entries = tuple(entry for entry in self.entries if entry.expires_us > now_us)
        kept_until_us = self.kept_until_us
        if kept_until_us <= now_us:
            kept_until_us = 0
        return self._replace(entries=entries, kept_until_us=kept_until_us)


def read_box_item(item: Item) -> Box:
    """Return the box that an item holds; raise StoreError."""
    if not item:
        return Box()
    try:
        entries = tuple(Entry._make(entry) for entry in _ENTRY.iter_unpack(item["entries"]))
        return Box(item["version"], item["last_at"], item["kept_until_us"], entries)
    except (KeyError, TypeError, struct.error):
        raise StoreError(
            "a box in the table is none of ours; others write to the table") from None


def box_item(box: Box) -> Item:
    """Return the item that holds a box."""
    ends_us = max((entry.expires_us for entry in box.entries), default=0)
    return {
        "version": box.version,
        "last_at": box.last_at,
        "kept_until_us": box.kept_until_us,
        "entries": b"".join(_ENTRY.pack(*entry) for entry in box.entries),
        "ttl": ttl_of(max(ends_us, box.kept_until_us)),
    }


def ttl_of(expires_us: int) -> int:
    """Return the second from which the engine may delete what expires then."""
    return -(-expires_us // SECOND_US) + TTL_SLACK_S


def make_room_in(box: Box, message: Message, limits: Limits, now_us: int) -> list[Entry]:
    """Return what has to give way in a box, mostly nothing, for a message; raise NoRoom."""
    # Whatever the limits say.
    if len(box.entries) >= MAX_BOX_ENTRIES:
        raise NoRoom("box", min(entry.expires_us for entry in box.entries))
    held = [Held(entry.at, entry.expires_us, entry.size, entry.source) for entry in box.entries]
    given = make_room(held, message.source, len(message.data), limits, now_us)
    dropped = {one.at for one in given}
    return [entry for entry in box.entries if entry.at in dropped]


def page_of(box: Box, at_us: int, limit: int) -> list[Entry]:
    """Return the entries newer than `at`: up to limit and 512 KiB of data, at least one."""
    entries: list[Entry] = []
    room = MAX_RECEIVE_CHARS
    for entry in box.entries:
        if entry.at <= at_us:
            continue
        room -= entry.size
        if len(entries) == limit or (entries and room < 0):
            break
        entries.append(entry)
    return entries


# ---------------------------------------------------------------------------------------
# Time: the table's, which all relays take where their own is behind.
# ---------------------------------------------------------------------------------------

RELAY: Key = (b"relay", b"messages")


class TableTime:
    """Know the table's time and the last `at`, as far as we have seen them."""

    def __init__(self, table: Table, totals: Totals) -> None:
        self._table = table
        self._totals = totals
        # The table may be further than these two.
        self.time_us = 0
        self.last_at = 0

    def learn(self, item: Item) -> None:
        """Take in what the item of the relay says.

        Raises StoreError for a time that nobody would get away from.
        """
        time_us = item.get("time_us", 0)
        last_at = item.get("last_at", 0)
        if max(time_us, last_at) >= YEAR_2200_US:
            raise StoreError(
                "the table's time is past the year 2200; set all relays' clocks, and make"
                " another table")
        self.time_us = max(self.time_us, time_us)
        self.last_at = max(self.last_at, last_at)

    def newest_us(self) -> int:
        """Return the table's time or the last `at`, whichever is larger."""
        return max(self.time_us, self.last_at)

    def known_us(self, now_us: int) -> int:
        """Return the caller's time or the table's, whichever is larger, as far as we know it."""
        return max(now_us, self.time_us)

    def read_us(self) -> int:
        """Return the table's time as it was last raised."""
        item = self._totals.read()
        self.learn(item)
        return max(int(item.get("time_us", 0)), int(item.get("last_at", 0)))

    def raise_to(self, now_us: int, step_us: int = 0) -> bool:
        """Raise the table's time, unless it is known to be nearly there.

        Return whether that took a write.
        """
        if now_us <= self.time_us + step_us:
            return False
        item = self._table.update(
            RELAY, "SET #time_us = :now", "attribute_not_exists(#time_us) OR #time_us < :now",
            now=now_us)
        if item is None:
            # Somebody else has raised it.
            self.learn({"time_us": now_us})
            return False
        self.learn(item)
        return True

    def check_clock(self, wall_us: int) -> None:
        """Raise StoreError if our clock is not the engine's.

        Warn if the table's time is ahead of ours. All relays take the table's time where
        theirs is behind: one clock that is ahead makes messages expire early.
        """
        # Of an engine that tells no date.
        with contextlib.suppress(TypeError, ValueError):
            engine_s = email.utils.parsedate_to_datetime(self._table.date).timestamp()
            if abs(wall_us // SECOND_US - engine_s) > MAX_CLOCK_GAP_S:
                raise StoreError(
                    "our clock and that of the table's engine differ by more than 5 minutes;"
                    " set them")
        if self.newest_us() > wall_us + MAX_CLOCK_GAP_S * SECOND_US:
            log.warning(
                "connectoid-relay: the table's time is more than 5 minutes ahead of our clock:"
                " was another relay's wrong? All relays use the table's; a table made anew would"
                " begin again")


# ---------------------------------------------------------------------------------------
# Arrivals: which boxes got messages, for the long polls of a relay.
# ---------------------------------------------------------------------------------------

ARRIVALS = b"arrivals"


class ArrivalLog:
    """Remember which boxes got messages, in the order in which we heard of it.

    Relays tell of their messages a little late, so a smaller `at` can come after a larger
    one. It gets the next place after the last: whoever has seen all up to there sees it
    too. So does whoever begins at the time at which the log does.
    """

    def __init__(self, start_us: int = 0) -> None:
        self.newest_at = start_us
        self._last_place = start_us
        self._lock = threading.Lock()
        # Place, at, box.
        self._heard: collections.deque[tuple[int, int, bytes]] = collections.deque()
        self._ats: set[int] = set()

    def note(self, arrivals: Iterable[tuple[int, bytes]]) -> None:
        """Take (at, box); those that are known already are passed over."""
        with self._lock:
            for at, box in arrivals:
                if at not in self._ats:
                    self._add(at, box)

    def _add(self, at: int, box: bytes) -> None:
        place = max(at, self._last_place + 1)
        self._last_place = place
        while self._heard and self._may_forget_one(place):
            _, oldest_at, _ = self._heard.popleft()
            self._ats.discard(oldest_at)
        self._heard.append((place, at, box))
        self._ats.add(at)
        self.newest_at = max(self.newest_at, at)

    def _may_forget_one(self, place: int) -> bool:
        oldest_place, _, _ = self._heard[0]
        return len(self._heard) == MAX_ARRIVALS or oldest_place < place - ARRIVALS_KEPT_US

    def after(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest place, and the boxes of those after the given one."""
        boxes = set()
        with self._lock:
            for place, _, box in reversed(self._heard):
                if place <= after_us:
                    break
                boxes.add(box)
            if not boxes:
                return after_us, boxes
            return self._last_place, boxes


class Arrivals:
    """Tell other relays which boxes got messages, and learn it from them.

    With `follow_every_s` a thread reads that often what is new, and `after` asks the table
    no more.
    """

    def __init__(self, table: Table, table_time: TableTime, follow_every_s: float) -> None:
        self._table = table
        self._time = table_time
        self._log = ArrivalLog(table_time.newest_us())
        self._follower: threading.Thread | None = None
        if follow_every_s:
            self._follower = threading.Thread(
                target=self._follow, args=(follow_every_s,), daemon=True)
            self._follower.start()

    def join(self) -> None:
        """Wait for the end of the thread, when the table is closed."""
        if self._follower:
            self._follower.join()

    def announce(self, box: bytes, entry: Entry) -> None:
        """Tell the other relays; if that fails, the next check finds the message all the same."""
        self._log.note([(entry.at, box)])
        item = {"box": box, "expires_us": entry.expires_us, "ttl": ttl_of(entry.expires_us)}
        with contextlib.suppress(StoreError):
            self._table.write((ARRIVALS, entry.at.to_bytes(8)), item)

    def after(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""
        if self._follower:
            return self._log.after(after_us)
        arrivals = self._read(after_us, consistent=True)
        newest_at = max((at for at, _ in arrivals), default=after_us)
        return newest_at, {box for _, box in arrivals}

    def _read(self, after_us: int, *, consistent: bool = False) -> list[tuple[int, bytes]]:
        items = self._table.query(
            ARRIVALS, after_us.to_bytes(8), pages=ARRIVALS_PAGES, consistent=consistent)
        return [(int.from_bytes(item["sk"]), item["box"]) for item in items
                if item["expires_us"] > self._time.time_us]

    def _follow(self, every_s: float) -> None:
        """Read what is new, again and again: the body of the thread."""
        while not self._table.closed.wait(every_s):
            after_us = max(0, self._log.newest_at - ARRIVALS_OVERLAP_US)
            try:
                self._log.note(self._read(after_us))
            except StoreError:
                # The sweeper says what is wrong.
                pass
            except Exception:
                # Whatever the error is, the next call is a new try.
                log.exception("reading arrivals failed; please report this")


# ---------------------------------------------------------------------------------------
# What relays on the table count together, and the key under which they hash sources.
# ---------------------------------------------------------------------------------------


class SharedCounts:
    """Count requests by quota and day, lease parts of rate limits, share the keys of days."""

    def __init__(self, table: Table, table_time: TableTime,
                 random_bytes: Callable[[int], bytes]) -> None:
        self._table = table
        self._time = table_time
        self._random_bytes = random_bytes
        self._source_keys: dict[int, bytes] = {}

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Add to the requests of today by name of quota."""
        day = self._time.known_us(now_us) // DAY_US
        ttl = ttl_of((day + 1) * DAY_US)
        for name, count in requests.items():
            self._table.update(
                (b"spent%d" % day, name.encode()), "ADD #requests :count SET #ttl = :ttl",
                count=count, ttl=ttl)

    def spent(self, now_us: int) -> dict[str, int]:
        """Return the requests of today by name of quota, of all processes."""
        items = self._table.query(
            b"spent%d" % (now_us // DAY_US), b"\0", pages=ARRIVALS_PAGES, consistent=False)
        return {item["sk"].decode(): item["requests"] for item in items}

    def lease(self, counted: tuple[str, int, Hashable], amount: int, limit: int,
              ends_us: int) -> bool:
        """Take an amount of what may be counted until a time; return whether there was enough."""
        if amount > limit:
            return False
        key = self.source_key((ends_us - 1) // DAY_US)
        octets = repr(counted).encode("utf-8", "replace")
        digest = hashlib.blake2b(octets, key=key, digest_size=16).digest()
        taken = self._table.update(
            (digest, b"rate"), "ADD #taken :amount SET #ttl = :ttl",
            "attribute_not_exists(#taken) OR #taken <= :room",
            amount=amount, room=limit - amount, ttl=ttl_of(ends_us))
        return taken is not None

    def source_key(self, day: int) -> bytes:
        """Return the key of a day (since 1970) that all relays on the table share."""
        if day not in self._source_keys:
            key = self._key_of(day)
            if len(self._source_keys) > 1:
                self._source_keys = {}
            self._source_keys[day] = key
        return self._source_keys[day]

    def _key_of(self, day: int) -> bytes:
        where = (b"key", b"%d" % day)
        item = self._table.read(where)
        if not item:
            item = {
                "key": self._random_bytes(SOURCE_KEY_BYTES),
                "ttl": ttl_of((day + 1) * DAY_US),
            }
            if not self._table.write(where, item, "attribute_not_exists(#pk)"):
                # Another relay was faster.
                item = self._table.read(where)
        return bytes(item["key"])


class SharedRateLimit:
    """Count what each key takes in a span of time, together with all other relays on the table.

    A relay leases a small part of the limit at first, then as much again as it has, up to
    an eighth of the limit: so most requests cost no write, and many relays get a part. The
    sum is never over the limit; what is leased and not used may leave it lower. As
    connectoid_relay.RateLimit otherwise. Keys stand in the table as keyed hashes.
    """

    def __init__(self, counts: SharedCounts, name: str, limit: int, span_us: int) -> None:
        self.limit = limit
        self._counts = counts
        self._name = name
        self._span_us = span_us
        self._lock = threading.Lock()
        self._span = 0
        # By key: leased in this span; leased and not taken; what was too much, and stays so.
        self._leased: dict[Hashable, int] = {}
        self._left: dict[Hashable, int] = {}
        self._refused: dict[Hashable, int] = {}

    def take(self, key: Hashable, now_us: int, amount: int = 1,
             wider: Sequence[Wider] = ()) -> int:
        """Take the amount and return 0, or return the seconds to wait.

        What a source has taken before a network around it refused is lost. Raises StoreError.
        """
        if not self.limit:
            return 0
        span = now_us // self._span_us
        for each in (Wider(key, 1), *wider):
            if not self._has_taken(each, span, amount):
                return seconds_until((span + 1) * self._span_us, now_us)
        return 0

    def _has_taken(self, counted: Wider, span: int, amount: int) -> bool:
        """Take the amount of one key, if there is so much left for it."""
        counted = counted._replace(key=self._begin(counted.key, span))
        while (missing := self._take_leased(counted.key, amount)) > 0:
            is_refused = self._is_refused(counted.key, missing)
            if is_refused or not self._lease(counted, span, missing):
                return False
        return True

    def _begin(self, key: Hashable, span: int) -> Hashable:
        """Start again with a new span; return under which key this one counts."""
        with self._lock:
            if span != self._span:
                self._span = span
                self._leased = {}
                self._left = {}
                self._refused = {}
            if key in self._left or key in self._refused:
                return key
            if len(self._left) + len(self._refused) >= MAX_SOURCES:
                # All further ones share a count.
                return None
            return key

    def _take_leased(self, key: Hashable, amount: int) -> int:
        """Take from what is leased; return how much is missing, if it is not enough."""
        with self._lock:
            left = self._left.get(key, 0)
            if amount <= left:
                self._left[key] = left - amount
            return amount - left

    def _is_refused(self, key: Hashable, missing: int) -> bool:
        with self._lock:
            return missing >= self._refused.get(key, UNLIMITED)

    def _lease(self, counted: Wider, span: int, missing: int) -> bool:
        """Lease what is missing, and more if there is; return whether there was enough."""
        key = counted.key
        limit = self.limit * counted.times
        leased = self._leased.get(key, 0)
        more = max(limit // FIRST_LEASE_PARTS, leased)
        more = min(more, limit // LEASE_PARTS, limit - leased)
        ends_us = (span + 1) * self._span_us
        for amount in dict.fromkeys((max(missing, more), missing)):
            if self._counts.lease((self._name, span, key), amount, limit, ends_us):
                self._note_lease(key, span, amount)
                return True
        with self._lock:
            self._refused[key] = missing
        return False

    def _note_lease(self, key: Hashable, span: int, amount: int) -> None:
        with self._lock:
            # Otherwise it is lost.
            if span == self._span:
                self._leased[key] = self._leased.get(key, 0) + amount
                self._left[key] = self._left.get(key, 0) + amount


# ---------------------------------------------------------------------------------------
# Questions: the newest one of a box, and the answer of the one before.
# ---------------------------------------------------------------------------------------


class Questions:
    """Keep the questions of boxes."""

    def __init__(self, table: Table, table_time: TableTime) -> None:
        self._table = table
        self._time = table_time

    def young(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""
        item = self._table.read((box, b"question"))
        return _young_question(item, made_after_us, now_us)

    def put(self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep a question unless another is still young; return the one to hand out."""
        self._time.raise_to(now_us, TIME_STEP_US)
        now_us = self._time.known_us(now_us)
        for _ in range(MAX_TRIES):
            item = self._table.read((box, b"question"))
            young = _young_question(item, now_us - ttl_us // 2, now_us)
            if young is not None:
                # Another check was faster.
                return young
            if self._write(box, question, now_us, now_us + ttl_us, item):
                return question[0]
        raise StoreError("too many relays make questions for one box at the same time")

    def _write(self, box: bytes, question: tuple[str, bytes], now_us: int, expires_us: int,
               former: Item) -> bool:
        """Write a question in place of the former one, if that is still there."""
        sealed, answer = question
        made = {"made_us": now_us, "question": sealed, "answer": answer,
                "expires_us": expires_us, "ttl": ttl_of(expires_us)}
        if not former:
            return self._table.write((box, b"question"), made, "attribute_not_exists(#pk)")
        made["former_answer"] = former["answer"]
        made["former_expires_us"] = former["expires_us"]
        return self._table.write(
            (box, b"question"), made, "#made_us = :seen", seen=former["made_us"])

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now."""
        item = self._table.read((box, b"question"))
        return [item[prefix + "answer"] for prefix in ("", "former_")
                if item.get(prefix + "expires_us", 0) > now_us]


def _young_question(item: Item, made_after_us: int, now_us: int) -> str | None:
    if item and item["made_us"] > made_after_us and item["expires_us"] > now_us:
        return str(item["question"])
    return None


# ---------------------------------------------------------------------------------------
# The store.
# ---------------------------------------------------------------------------------------

BOXES: Key = (b"relay", b"boxes")


class Boxes:
    """Read and write the items of boxes, and keep their rows."""

    def __init__(self, table: Table, random_bytes: Callable[[int], bytes]) -> None:
        self._table = table
        self._random_bytes = random_bytes
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self.totals = Totals(table, BOXES, "boxes")

    def lock_of(self, box: bytes) -> threading.Lock:
        """Return the lock for a box: our own writers keep out of each other's way."""
        return self._locks[hash(box) % LOCKS]

    def read(self, box: bytes) -> Box:
        """Return a box as it is now."""
        return read_box_item(self._table.read((box, b"box")))

    def read_many(self, boxes: Iterable[bytes]) -> dict[bytes, Box]:
        """Return boxes by name, read a hundred at a time."""
        read = dict.fromkeys(boxes, Box())
        keys = [(name, b"box") for name in read]
        for start in range(0, len(keys), MAX_BATCH_KEYS):
            for item in self._table.read_many(keys[start:start + MAX_BATCH_KEYS]):
                read[item["pk"]] = read_box_item(item)
        return read

    def write(self, name: bytes, seen: Box, box: Box) -> bool:
        """Write the next version of a box; return False if there is another meanwhile."""
        version = 1 + int.from_bytes(self._random_bytes(VERSION_BYTES))
        item = box_item(box._replace(version=version))
        if not seen.version:
            return self._table.write((name, b"box"), item, "attribute_not_exists(#pk)")
        return self._table.write((name, b"box"), item, "#version = :seen", seen=seen.version)

    def keep(self, name: bytes, expires_us: int, now_us: int, room_for: int) -> None:
        """Raise the expiry of a box's row; make it while there are fewer than room_for."""
        with self.lock_of(name):
            seen = self.read(name)
            for _ in range(MAX_TRIES):
                if self._has_kept(name, seen, expires_us, now_us, room_for):
                    return
                seen = self.read(name)
        raise StoreError("too many relays write to one box at the same time")

    def _has_kept(self, name: bytes, seen: Box, expires_us: int, now_us: int,
                  room_for: int) -> bool:
        """Try once; return False if another relay has written the box meanwhile."""
        one = {"boxes": 1}
        box = seen.alive(now_us)
        if expires_us <= max(now_us, box.kept_until_us):
            return True
        is_new = not box.kept_until_us
        if is_new and self.totals.add(one, expires_us, room_for) is None:
            return True
        written = self.write(name, seen, box._replace(kept_until_us=expires_us))
        if not written:
            # It is ours, if a write whose reply was lost was made again.
            written = self.read(name).kept_until_us == expires_us
        if written and not is_new:
            self.totals.prolong("boxes", box.kept_until_us, expires_us)
        if is_new and not written:
            self.totals.give_back(one, expires_us)
        return written


class _OfThread(threading.local):
    """What belongs to one thread: boxes that it is about to look at, each once."""

    fetched: Mapping[bytes, Box] = {}


class DynamoDbStore:
    """Keep everything in one table.

    It is a connectoid_relay.Store for any number of threads and processes.
    `bucket_width_us` says for how long messages of a certain life share a part of the
    totals. With `follow_every_s` a thread reads that often which boxes got messages, and
    `arrivals` tells what it has read without asking the table: what a front needs. Raises
    StoreError, with what to do, if the table cannot be used.
    """

    def __init__(self, table_name: str, client: Any = None, *,
                 bucket_width_us: Callable[[int], int] = bucket_width_us,
                 follow_every_s: float = 0,
                 random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._table = Table(table_name, client or make_client())
        self._bucket_width_us = bucket_width_us
        self._random_bytes = random_bytes
        self._totals = Totals(self._table, RELAY, "bytes", "messages")
        self._boxes = Boxes(self._table, random_bytes)
        # As many as there are API keys.
        self._quotas: dict[str, Totals] = {}
        self._of_thread = _OfThread()
        self._time = TableTime(self._table, self._totals)
        for item in self._table.query(RELAY[0], b"\0", pages=1, consistent=True):
            self._time.learn(item)
        self._counts = SharedCounts(self._table, self._time, random_bytes)
        self._questions = Questions(self._table, self._time)
        self._arrivals = Arrivals(self._table, self._time, follow_every_s)

    def close(self) -> None:
        """Let go of the table."""
        self._table.closed.set()
        self._arrivals.join()

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: each read is one of its own."""
        return contextlib.nullcontext()

    def time_us(self) -> int:
        """Return the table's time as it was last raised."""
        return self._time.read_us()

    def check_clock(self, wall_us: int) -> None:
        """Raise StoreError if our clock is not the engine's; warn if the table's is ahead."""
        self._time.check_clock(wall_us)

    # Messages

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`; raise NoRoom."""
        with self._boxes.lock_of(message.box), contextlib.ExitStack() as undo:
            now_us = self._time.known_us(now_us)
            box = self._boxes.read(message.box).alive(now_us)
            make_room_in(box, message, limits, now_us)
            self._take_quota(message, now_us, undo)
            # A third of the room is for boxes with a row.
            thirds = 3 if box.kept_until_us else 2
            at = self._take_place(message, limits.max_bytes * thirds // 3, now_us, undo)
            entry = self._write_body(message, at)
            try:
                entry = self._commit(message, limits, box, entry)
            except NoRoom:
                raise
            except Exception:
                # It may have been kept: its place ends by itself.
                undo.pop_all()
                raise
            undo.pop_all()
        self._arrivals.announce(message.box, entry)
        return entry.at

    def _take_quota(self, message: Message, now_us: int, undo: contextlib.ExitStack) -> None:
        """Count the bytes against the API key's."""
        quota = message.quota
        if not (quota.name and quota.bytes):
            return
        totals = self._quotas.get(quota.name)
        if totals is None:
            totals = Totals(self._table, (b"quota", quota.name.encode()), "bytes")
            totals = self._quotas.setdefault(quota.name, totals)
        amounts = {"bytes": len(message.data)}
        end_us = self._end_of(now_us + message.ttl_us, message.ttl_us)
        while totals.add(amounts, end_us, quota.bytes) is None:
            if not totals.release(now_us):
                raise NoRoom("quota")
        undo.callback(totals.give_back, amounts, end_us)
        totals.release(now_us)

    def _take_place(self, message: Message, room: int, now_us: int,
                    undo: contextlib.ExitStack) -> int:
        """Count the message and its bytes, and return an `at`; raise NoRoom."""
        amounts = {"bytes": counted_bytes(len(message.data)), "messages": 1}
        at, end_us = self._take_at(now_us, amounts, message.ttl_us, room)
        undo.callback(self._totals.give_back, amounts, end_us)
        return at

    def _take_at(self, now_us: int, amounts: Mapping[str, int], ttl_us: int,
                 room: int = UNLIMITED) -> tuple[int, int]:
        """Return an `at` larger than any before; raise NoRoom.

        With it comes the end of what was added to the totals.
        """
        for _ in range(MAX_TRIES):
            floor_us = max(now_us, self._time.time_us)
            at = max(floor_us, self._time.last_at + 1)
            end_us = self._end_of(at + ttl_us, ttl_us)
            item = self._add_with_at(amounts, end_us, room, floor_us)
            if item is not None:
                self._time.learn(item)
                return int(item["last_at"]), end_us
            item = self._totals.read()
            self._time.learn(item)
            if item.get("bytes", 0) + amounts.get("bytes", 0) > room:
                raise NoRoom("relay")
        raise StoreError("too many relays write to the table at the same time")

    def _add_with_at(self, amounts: Mapping[str, int], end_us: int, room: int,
                     floor_us: int) -> Item | None:
        """Add to the totals and take the next `at`, in one write.

        The first way fails if another relay's clock is ahead, the second one only if we
        did not know of that.
        """
        last_at = self._time.last_at
        if last_at < floor_us or not last_at:
            return self._totals.add(
                amounts, end_us, room, also="SET #last_at = :at",
                condition=" AND (attribute_not_exists(#last_at) OR #last_at < :at)",
                at=max(floor_us, last_at + 1))
        return self._totals.add(
            amounts, end_us, room, also="SET #last_at = #last_at + :one",
            condition=" AND #last_at >= :floor", one=1, floor=floor_us)

    def _end_of(self, expires_us: int, ttl_us: int) -> int:
        """Return the end of the part of the totals in which something is counted."""
        width_us = self._bucket_width_us(ttl_us)
        return -(-expires_us // width_us) * width_us

    def _write_body(self, message: Message, at: int) -> Entry:
        """Write the body of a message; return the entry that is to point to it."""
        size = len(message.data)
        name = self._random_bytes(ID_BYTES)
        entry = Entry(at, at + message.ttl_us, size, message.source, name)
        item = {"sealed": message.data, "ttl": ttl_of(entry.expires_us)}
        self._table.write((message.box, b"m" + name), item)
        return entry

    def _commit(self, message: Message, limits: Limits, box: Box, entry: Entry) -> Entry:
        """Put the entry into the index and return it as it stands there; raise NoRoom.

        What has to give way leaves the index. Its body ends by itself, and so do its bytes of an
        API key.

        An entry whose write got no reply is known by its id. If it is not there, the write
        may still be under way: then we do not write again, and nothing is acknowledged.
        """
        for _ in range(MAX_TRIES):
            if box.last_at >= entry.at:
                # Another relay was faster: a reader may have passed ours already.
                at, _ = self._take_at(entry.at, {}, message.ttl_us)
                entry = entry._replace(at=at, expires_us=at + message.ttl_us)
            alive = box.alive(entry.at)
            dropped = make_room_in(alive, message, limits, entry.at)
            left = [kept for kept in alive.entries if kept not in dropped]
            new = alive._replace(last_at=entry.at, entries=(*left, entry))
            failure: StoreError | None = None
            try:
                if self._boxes.write(message.box, box, new):
                    self._give_places_back(dropped)
                    return entry
            except StoreError as error:
                failure = error
            box = self._boxes.read(message.box)
            for kept in box.entries:
                if kept.id == entry.id:
                    return kept
            if failure:
                raise failure
            time.sleep(secrets.randbelow(RETRY_PAUSE_MS) / 1_000)
        raise StoreError("too many relays write to one box at the same time")

    def _give_places_back(self, dropped: Sequence[Entry]) -> None:
        """Take what has given way off the totals."""
        for entry in dropped:
            amounts = {"bytes": counted_bytes(entry.size), "messages": 1}
            end_us = self._end_of(entry.expires_us, entry.expires_us - entry.at)
            self._totals.give_back(amounts, end_us)

    @contextlib.contextmanager
    def fetch(self, boxes: Iterable[bytes]) -> Iterator[None]:
        """Read boxes a hundred at a time, for the looks of this thread within a `with`.

        It is what Relay takes as `fetch`. A call costs a millisecond of CPU, however
        little it reads.
        """
        # StoreError: each look will say so.
        with contextlib.suppress(StoreError):
            self._of_thread.fetched = self._boxes.read_many(boxes)
        try:
            yield
        finally:
            self._of_thread.fetched = {}

    def look(self, box: bytes, at_us: int, now_us: int) -> Look:
        """Return whether the box has news, and until when its row lives."""
        seen = self._of_thread.fetched.get(box)
        if not seen:
            seen = self._boxes.read(box)
        alive = seen.alive(now_us)
        found = any(entry.at > at_us for entry in alive.entries)
        return Look(found, alive.kept_until_us or None)

    def messages(self, box: bytes, at_us: int, limit: int,
                 now_us: int) -> list[tuple[int, str]]:
        """Return (at, data) newer than `at`, oldest first."""
        entries = page_of(self._boxes.read(box).alive(now_us), at_us, limit)
        if not entries:
            return []
        items = self._table.read_many([(box, b"m" + entry.id) for entry in entries])
        bodies = {item["sk"][1:]: item["sealed"] for item in items}
        return [(entry.at, bodies[entry.id]) for entry in entries if entry.id in bodies]

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""
        return self._arrivals.after(after_us)

    # Questions

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""
        return self._questions.young(box, made_after_us, now_us)

    def put_question(self, box: bytes, question: tuple[str, bytes], ttl_us: int,
                     now_us: int) -> str:
        """Keep a question unless another is still young; return the one to hand out."""
        return self._questions.put(box, question, ttl_us, now_us)

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now."""
        return self._questions.answers(box, now_us)

    # Box rows

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for.

        `soon` is now.
        """
        self._time.raise_to(now_us, TIME_STEP_US)
        now_us = self._time.known_us(now_us)
        for box, expires_us in expiries_us.items():
            self._boxes.keep(box, expires_us, now_us, room_for)


    # What is counted together

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Add to the requests of today by name of quota."""
        self._counts.spend(requests, now_us)

    def spent(self, now_us: int) -> dict[str, int]:
        """Return the requests of today by name of quota, of all processes."""
        return self._counts.spent(now_us)

    def rate_limit(self, name: str, limit: int, span_us: int) -> SharedRateLimit:
        """Return a rate limit that all relays on the table hold in sum.

        It is what Relay takes as `rate_limit`.
        """
        return SharedRateLimit(self._counts, name, limit, span_us)

    def source_key(self, day: int) -> bytes:
        """Return the key of a day (since 1970) that all relays on the table share.

        It is what Relay takes as `source_key`.
        """
        return self._counts.source_key(day)

    # The whole

    def stored(self) -> Stored:
        """Return what the table holds."""
        messages = self._totals.read()
        boxes = self._boxes.totals.read()
        return Stored(
            messages.get("messages", 0), messages.get("bytes", 0), boxes.get("boxes", 0))

    def sweep(self, now_us: int) -> bool:
        """Free the places of what has expired, and return whether there is more.

        The engine deletes by itself.
        """
        now_us = self._time.known_us(now_us)
        released = [totals.release(now_us) for totals in (self._totals, self._boxes.totals)]
        if any(released):
            self._time.raise_to(now_us)
        return SWEEP_PARTS in released

    def probe(self, now_us: int) -> None:
        """Write the time and read a box for real; raise StoreError if that fails."""
        if not self._time.raise_to(now_us):
            # With a condition, as every write of this item: ScyllaDB orders those alone
            # among each other.
            self._table.update(
                RELAY, "SET #probed_us = :now", "attribute_exists(#pk)", now=now_us)
        self.look(b"probe", 0, now_us)
