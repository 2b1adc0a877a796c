"""Keep all that a Connectoid relay keeps in one DynamoDB table, for any number of relays at a time.

It runs on AWS and on engines with DynamoDB's API (ScyllaDB's Alternator, dynalite): all it
asks for are conditional writes of single items. README.md beside this file says how to run it. To embed it:

    from connectoid_relay import Limits, Relay
    from dynamodb_store import DynamoDbStore, make_client

    store = DynamoDbStore("connectoid", make_client(region="eu-central-1"))
    relay = Relay(store, Limits(), rate_limit=store.rate_limit, source_key=store.source_key, fetch=store.fetch)

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
carries the attribute `ttl`; as the engine deletes late, what has expired is left out of every answer.
"""

from __future__ import annotations

__all__ = ["DynamoDbStore", "SharedRateLimit", "bucket_width_us", "check_limits", "create_table", "make_client"]

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
    Limits,
    Look,
    Message,
    NoRoom,
    Quota,
    SettingError,
    Stored,
    StoreError,
    check_room,
    counted_bytes,
    log,
    seconds_until,
)

# ---------------------------------------------------------------------------------------
# Limits.
# ---------------------------------------------------------------------------------------

MAX_BOX_ENTRIES = 4_096  # in a box's index: 208 KiB, and an item may have 400
CONNECT_TIMEOUT_S = 1.0  # a healthy engine takes milliseconds
READ_TIMEOUT_S = 1.0  # the same; Lambda's first event may make 22 calls within its 30 s
ATTEMPTS = 2  # of a call, the first one included
SPARE_CONNECTIONS = 4  # beside one for each thread of the pool: the sweeper, the follower, the constructor
RETRY_AFTER_S = 1.0  # an engine in trouble is asked by one call a second; all others fail at once
MAX_TRIES = 30  # to write what others write at the same time: somebody wins each time
RETRY_PAUSE_MS = 20  # at most, between two of these
LOCKS = 64  # boxes that this process writes at the same time
MAX_BATCH_KEYS = 100  # in one read of many items: DynamoDB's limit
MAX_BATCH_TRIES = 6  # of a read of many items that the engine answers in parts
BATCH_PAUSE_S = 0.05  # before the second part, doubled before each further one: 1.5 s in all
PARTS_OF_TTL = 12  # a message's place is freed at most a twelfth of its life late: an hour has 5 minutes
MIN_PART_US = SECOND_US  # the same, for short lives
SWEEP_PARTS = 16  # freed in one write: an expression may have 4 KiB
SWEEP_READ_US = 10 * SECOND_US  # totals that nothing here has read for so long are read by a sweep
TIME_STEP_US = 10 * SECOND_US  # by so much the table's time may be behind before a question or a box row raises it
TTL_SLACK_S = 3_600  # that an item outlives what it holds: it may expire a little later than its body knew
ARRIVALS_OVERLAP_US = 10 * SECOND_US  # looked at again: as late as a relay may tell what it has committed
ARRIVALS_KEPT_US = 2 * MINUTE_US  # in memory: far longer than a front takes between two looks
MAX_ARRIVALS = 100_000  # in memory (20 MB): what is forgotten is found by the next check
ARRIVALS_PAGES = 8  # of 1 MiB, read at a time
FIRST_LEASE_PARTS = 64  # a relay takes this part of a rate limit at first: as many relays get some of it
LEASE_PARTS = 8  # and an eighth at a time at last: few writes, and little lies idle elsewhere
MAX_CLOCK_GAP_S = 300  # between our clock and the engine's, or the table's time: AWS refuses signatures beyond it
MAX_CODE_CHARS = 64  # of an engine's word for an error, in the log: the longest of AWS has 38

UNLIMITED = 10**15  # of whatever is counted

# ---------------------------------------------------------------------------------------
# The client: time-outs, the table, words for what may go wrong.
# ---------------------------------------------------------------------------------------

_REFUSED_CODE = "ConditionalCheckFailedException"
_DENIED = "does not accept our credentials; give others with the right to read and write it, and look at the clock"
_THROTTLED = "has not enough capacity; raise it, or make it on demand"
# What an error of the engine means to whoever runs the relay.
_MEANINGS = {
    "ResourceNotFoundException": "does not exist; make it with --create-table or name another with --table",
    "ValidationException": "has not the keys pk and sk, both binary; make another with --create-table",
    **dict.fromkeys(("AccessDeniedException", "ExpiredTokenException", "IncompleteSignatureException",
                     "InvalidClientTokenId", "InvalidSignatureException", "MissingAuthenticationTokenException",
                     "UnrecognizedClientException"), _DENIED),
    **dict.fromkeys(("NoCredentialsError", "PartialCredentialsError"),
                    "needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"),
    "HTTPClientError": "cannot be asked; look for line breaks in the credentials, and at --endpoint-url",
    **dict.fromkeys(("ProvisionedThroughputExceededException", "RequestLimitExceeded", "ThrottlingException"),
                    _THROTTLED),
}
_SILENT = "does not answer; look at the network and at --endpoint-url"
_FOREIGN = "cannot be used: what answers at --endpoint-url does not speak DynamoDB, or others write to the table"
_NO_ADDRESS = "--endpoint-url is no web address; write http://HOST:PORT"  # which may hold a password
# What botocore may find wrong before any call.
_WRONG_SETTINGS = {
    "InvalidRegionError": "--region, or AWS_DEFAULT_REGION, is no name of a region",
    "PartialCredentialsError": "half of the credentials is missing; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not there",
}


def make_client(*, region: str | None = None, endpoint_url: str | None = None, threads: int = POOL_THREADS) -> Any:
    """Return a DynamoDB client for so many threads whose calls end within seconds; raise SettingError."""
    config = Config(connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                    max_pool_connections=threads + SPARE_CONNECTIONS)
    if endpoint_url and not re.match("https?://.", endpoint_url):
        raise SettingError(_NO_ADDRESS)
    try:
        session = boto3.session.Session()
        if not (region := region or session.region_name):
            raise SettingError("no region is known; name one with --region or AWS_DEFAULT_REGION")
        return session.client("dynamodb", region_name=region, endpoint_url=endpoint_url, config=config)
    except BotoCoreError as error:
        code = code_of(error)
        raise SettingError(_WRONG_SETTINGS.get(code, f"the settings for AWS cannot be used ({code})")) from None
    except ValueError:
        raise SettingError(_NO_ADDRESS) from None


def code_of(error: Exception) -> str:
    """Return the engine's word for an error, or the name of its class, fit for a log."""
    answered = error.response.get("Error", {}) if isinstance(error, ClientError) else {}
    return re.sub(r"\W", "", str(answered.get("Code", type(error).__name__)))[:MAX_CODE_CHARS]


def _explain(table_name: str, error: Exception) -> StoreError:
    """Return an error as one of ours, with its meaning and without what was in the call."""
    code = code_of(error)
    meaning = _MEANINGS.get(code, "cannot be used" if isinstance(error, ClientError) else
                            _SILENT if isinstance(error, BotoCoreError) else _FOREIGN)
    return StoreError(f"the table {table_name} {meaning} ({code})")


def create_table(client: Any, table_name: str) -> bool:
    """Make the table, on demand, unless it is there; return whether the engine deletes by its `ttl`. Raises StoreError.

    Without that nothing expired is ever told, but the table grows.
    """
    keys = (("pk", "HASH"), ("sk", "RANGE"))
    try:
        if not _exists(client, table_name):
            with contextlib.suppress(client.exceptions.ResourceInUseException):  # another one is making it
                client.create_table(
                    TableName=table_name, BillingMode="PAY_PER_REQUEST",
                    KeySchema=[{"AttributeName": name, "KeyType": kind} for name, kind in keys],
                    AttributeDefinitions=[{"AttributeName": name, "AttributeType": "B"} for name, _ in keys])
        client.get_waiter("table_exists").wait(TableName=table_name, WaiterConfig={"Delay": 0.2, "MaxAttempts": 300})
        return _have_expired_deleted(client, table_name)
    except Exception as error:  # not of botocore if what answers is no engine
        raise _explain(table_name, error) from None


def _exists(client: Any, table_name: str) -> bool:
    try:
        client.describe_table(TableName=table_name)
    except client.exceptions.ResourceNotFoundException:
        return False
    return True


def _have_expired_deleted(client: Any, table_name: str) -> bool:
    """Return False if the engine knows no TTL."""
    try:
        status = client.describe_time_to_live(TableName=table_name)["TimeToLiveDescription"]["TimeToLiveStatus"]
        if status == "DISABLED":
            client.update_time_to_live(TableName=table_name,
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
_T = TypeVar("_T")
_TYPES: Mapping[type, str] = {bytes: "B", int: "N", str: "S"}
_NAME = re.compile(r"#(\w+)")


def _encode(value: Any) -> dict[str, Any]:
    return {_TYPES[type(value)]: str(value) if isinstance(value, int) else value}


def _encode_key(key: Key) -> dict[str, Any]:
    return {"pk": {"B": key[0]}, "sk": {"B": key[1]}}


def _decode(attributes: Mapping[str, Mapping[str, Any]]) -> Item:
    return {name: int(value["N"]) if "N" in value else next(iter(value.values()))
            for name, value in attributes.items()}


def _expression(values: Mapping[str, Any], **expressions: str) -> dict[str, Any]:
    """Return expressions by their parameter, with the names and values that they use."""
    parameters: dict[str, Any] = {**expressions, "ExpressionAttributeNames": {
        f"#{name}": name for text in expressions.values() for name in _NAME.findall(text)},
        "ExpressionAttributeValues": {f":{name}": _encode(value) for name, value in values.items()}}
    return {name: parameter for name, parameter in parameters.items() if parameter}


def _date_of(reply: Mapping[str, Any]) -> str:
    """Return the engine's date, empty if it tells none; raise ValueError or KeyError if this is not an engine's reply.

    Else an empty 200 or a page of a proxy would be taken for a write that was done, or an item that is not there.
    """
    headers = reply["ResponseMetadata"]["HTTPHeaders"]
    if not headers.get("content-type", "").startswith("application/x-amz-json") or headers.get("content-length") == "0":
        raise ValueError
    return str(headers.get("date", ""))


class Table:
    """Read and write the items of a table; raises StoreError and nothing else.

    Once the engine has not answered or has refused for want of capacity, one call a second
    tries again and all others of its kind (reads, writes) fail at once: else every thread of a relay
    would wait for its time-outs, and every client for a thread.
    """

    def __init__(self, name: str, client: Any) -> None:
        self._name, self._client = name, client
        self.closed = threading.Event()
        self._troubles: dict[bool, tuple[str, float]] = {}  # of reads and writes: what is told, until when
        self.date = ""  # of the engine, in its last reply

    def _call(self, operation: str, decode: Callable[[Any], _T], **parameters: Any) -> _T | None:
        """Return what the engine's reply says; None if a condition does not hold."""
        if self.closed.is_set():
            raise StoreError(f"the table {self._name} is closed")
        writes = operation in ("put_item", "update_item")
        trouble, until_s = self._troubles.get(writes, ("", 0.0))
        if trouble:
            if time.monotonic() < until_s:
                raise StoreError(trouble)
            self._troubles[writes] = trouble, time.monotonic() + RETRY_AFTER_S
        try:
            reply = getattr(self._client, operation)(**parameters)
            self.date = _date_of(reply)
            result = decode(reply)
        except Exception as error:  # not of botocore if what answers is no engine
            code = code_of(error)
            if code != _REFUSED_CODE:
                told = _explain(self._name, error)
                if not isinstance(error, ClientError) or _MEANINGS.get(code) == _THROTTLED:
                    self._troubles[writes] = str(told), time.monotonic() + RETRY_AFTER_S
                raise told from None
            result = None
        self._troubles.pop(writes, None)
        return result

    def read(self, key: Key) -> Item:
        """Return an item as it is now, empty if there is none."""
        return self._call("get_item", lambda reply: _decode(reply.get("Item", {})), TableName=self._name,
                          Key=_encode_key(key), ConsistentRead=True) or {}

    def write(self, key: Key, item: Mapping[str, Any], condition: str = "", **values: Any) -> bool:
        """Write a whole item if the condition holds; return whether it did."""
        return self._call(
            "put_item", bool, TableName=self._name, Item=_encode_key(key) | {
                name: _encode(value) for name, value in item.items()},
            **_expression(values, ConditionExpression=condition)) is not None

    def update(self, key: Key, change: str, condition: str = "", **values: Any) -> Item | None:
        """Change an item, which need not exist, if the condition holds; return what has changed, else None."""
        return self._call(
            "update_item", lambda reply: _decode(reply["Attributes"]), TableName=self._name, Key=_encode_key(key),
            ReturnValues="UPDATED_NEW", **_expression(values, UpdateExpression=change, ConditionExpression=condition))

    def query(self, pk: bytes, after: bytes, *, pages: int, consistent: bool) -> list[Item]:
        """Return the items of a partition after a sort key, in their order, from so many pages of 1 MiB at most."""
        condition = _expression({"pk": pk, "after": after}, KeyConditionExpression="#pk = :pk AND #sk > :after")
        items: list[Item] = []
        start: dict[str, Any] = {}
        for _ in range(pages):
            found, last_key = self._call(
                "query", lambda reply: ([*map(_decode, reply["Items"])], reply.get("LastEvaluatedKey")),
                TableName=self._name, ConsistentRead=consistent, **condition, **start) or ([], None)
            items += found
            if not last_key:
                break
            start = {"ExclusiveStartKey": last_key}
        return items

    def read_many(self, keys: Sequence[Key]) -> list[Item]:
        """Return those of up to MAX_BATCH_KEYS items that exist, in any order."""
        request: Mapping[str, Any] = {self._name: {"Keys": [_encode_key(key) for key in keys], "ConsistentRead": True}}
        items: list[Item] = []
        for attempt in range(MAX_BATCH_TRIES):
            if attempt:
                self.closed.wait(BATCH_PAUSE_S * 2 ** (attempt - 1))
            found, request = self._call("batch_get_item", self._decode_batch, RequestItems=request) or ([], {})
            items += found
            if not request:
                return items
        raise StoreError(f"the table {self._name} {_THROTTLED}")

    def _decode_batch(self, reply: Mapping[str, Any]) -> tuple[list[Item], Mapping[str, Any]]:
        """Return what was found, and what to ask for again."""
        return [*map(_decode, reply["Responses"].get(self._name, ()))], reply.get("UnprocessedKeys") or {}


# ---------------------------------------------------------------------------------------
# Totals: sums over what expires. Beside each total stand its parts, by the time at which
# they have wholly expired; a sweep takes such a part off the total in one write. So what a
# relay has added and not used, because it was killed, is gone with its part, and any
# number of sweepers agree.
# ---------------------------------------------------------------------------------------


def bucket_width_us(ttl_us: int) -> int:
    """Return for how long what lives so long shares a part: an item keeps 13 parts or so of each length of life."""
    return max(MIN_PART_US, ttl_us // PARTS_OF_TTL)


class Totals:
    """Keep totals of some names in one item; the first one has a limit.

    A part's name is short (a letter and its end): the item shall cost one unit a write, which is 1 KiB.
    """

    def __init__(self, table: Table, key: Key, *names: str) -> None:
        self._table, self._key, self._names = table, key, names
        self._seen: Item = {}
        self._read_us = 0

    def read(self) -> Item:
        """Return the item as it is now."""
        self._seen = self._table.read(self._key)
        return self._seen

    def add(self, amounts: Mapping[str, int], end_us: int, room: int = UNLIMITED, *, also: str = "",
            condition: str = "", **values: Any) -> Item | None:
        """Add amounts that end at a time, if there is room for them; return what has changed, None if refused."""
        first = self._names[0]
        left = room - amounts.get(first, 0)
        added = ", ".join(f"#{name} :{name}, #{name[0]}{end_us} :{name}" for name in amounts)
        return None if left < 0 else self._update(
            f"{also} ADD {added}" if added else also,
            f"(attribute_not_exists(#{first}) OR #{first} <= :left){condition}", left=left, **amounts, **values)

    def give_back(self, amounts: Mapping[str, int], end_us: int) -> None:
        """Take off what was added, unless a sweep has done so; if that cannot be done now, a sweep will."""
        taken = ", ".join(f"#{name} :{name}, #{name[0]}{end_us} :{name}" for name in amounts)
        condition = " AND ".join(f"attribute_exists(#{name[0]}{end_us})" for name in amounts)
        with contextlib.suppress(StoreError):
            self._update(f"ADD {taken}", condition, **{name: -amount for name, amount in amounts.items()})

    def prolong(self, name: str, old_end_us: int, new_end_us: int) -> None:
        """Have one of what is counted end later."""
        old, new = f"{name[0]}{old_end_us}", f"{name[0]}{new_end_us}"
        if self._update(f"ADD #{old} :less, #{new} :more", f"attribute_exists(#{old})", less=-1, more=1) is None:
            self.add({name: 1}, new_end_us)

    def release(self, now_us: int) -> int:
        """Take parts that have ended off the totals and return how many; SWEEP_PARTS says that there may be more."""
        if not self._seen or now_us - self._read_us >= SWEEP_READ_US:
            self.read()
            self._read_us = now_us
        seen = self._seen.copy()
        ends = sorted({int(part[1:]) for part in seen if part[1:].isdigit() and int(part[1:]) <= now_us})[:SWEEP_PARTS]
        if not ends:
            return 0
        parts = {name: [part for end in ends if (part := f"{name[0]}{end}") in seen] for name in self._names}
        gone = {part: seen[part] for same in parts.values() for part in same}
        change = (f"SET {', '.join(f'#{name} = #{name} - :{name}' for name in self._names)}"
                  f" REMOVE {', '.join(f'#{part}' for part in gone)}")
        sums = {name: sum(gone[part] for part in same) for name, same in parts.items()}
        condition = " AND ".join(f"#{part} = :{part}" for part in gone)
        ours = self._table.update(self._key, change, condition, **sums, **gone) is not None
        self._seen = {}
        return len(ends) if ours else SWEEP_PARTS  # another sweeper was faster

    def _update(self, change: str, condition: str, **values: Any) -> Item | None:
        item = self._table.update(self._key, change, condition, **values)
        self._seen.update(item or {})
        return item


# ---------------------------------------------------------------------------------------
# A box: what its item holds, packed, so that a check reads and a send writes little.
# ---------------------------------------------------------------------------------------

_ENTRY = struct.Struct(">QQI16s16s")
ID_BYTES = 16  # random
VERSION_BYTES = 8  # random


class Entry(NamedTuple):
    """A message in the index of its box."""

    at: int
    expires_us: int
    size: int
    source: bytes
    id: bytes


class Box(NamedTuple):
    """A box as one of its versions shows it; one that does not exist has version 0.

    Versions are random. If they were counted, that of a box which the engine has deleted would
    come again, and a writer that slept meanwhile would write over what others have put there.
    """

    version: int = 0
    last_at: int = 0
    kept_until_us: int = 0  # the expiry of its row, 0 without one
    entries: tuple[Entry, ...] = ()

    def alive(self, now_us: int) -> Box:
        """Return it without what has expired."""
        return self._replace(entries=tuple(entry for entry in self.entries if entry.expires_us > now_us),
                             kept_until_us=self.kept_until_us if self.kept_until_us > now_us else 0)


def read_box_item(item: Item) -> Box:
    """Return the box that an item holds; raise StoreError."""
    if not item:
        return Box()
    try:
        return Box(item["version"], item["last_at"], item["kept_until_us"],
                   tuple(map(Entry._make, _ENTRY.iter_unpack(item["entries"]))))
    except (KeyError, TypeError, struct.error):
        raise StoreError("a box in the table is none of ours; others write to the table") from None


def box_item(box: Box) -> Item:
    """Return the item that holds a box."""
    ends_us = max((entry.expires_us for entry in box.entries), default=0)
    return {"version": box.version, "last_at": box.last_at, "kept_until_us": box.kept_until_us,
            "entries": b"".join(_ENTRY.pack(*entry) for entry in box.entries),
            "ttl": ttl_of(max(ends_us, box.kept_until_us))}


def ttl_of(expires_us: int) -> int:
    """Return the second from which the engine may delete what expires then."""
    return -(-expires_us // SECOND_US) + TTL_SLACK_S


def _sums(entries: Sequence[Entry]) -> tuple[int, int, int]:
    return (len(entries), sum(entry.size for entry in entries),
            min((entry.expires_us for entry in entries), default=0))


def content_of(box: Box, source: bytes) -> tuple[int, ...]:
    """Return what check_room asks of a box and a source."""
    return (*_sums(box.entries), *_sums([entry for entry in box.entries if entry.source == source]))


# ---------------------------------------------------------------------------------------
# Arrivals: which boxes got messages, for the long polls of a relay.
# ---------------------------------------------------------------------------------------


class ArrivalLog:
    """Remember which boxes got messages, in the order in which we heard of it.

    Relays tell of their messages a little late, so a smaller `at` can come after a larger
    one. It gets the next place after the last: whoever has seen all up to there sees it too.
    So does whoever begins at the time at which the log does.
    """

    def __init__(self, start_us: int = 0) -> None:
        self.newest_at = self._last_place = start_us
        self._lock = threading.Lock()
        self._heard: collections.deque[tuple[int, int, bytes]] = collections.deque(maxlen=MAX_ARRIVALS)
        self._ats: set[int] = set()

    def note(self, arrivals: Iterable[tuple[int, bytes]]) -> None:
        """Take (at, box); those that are known already are passed over."""
        with self._lock:
            for at, box in arrivals:
                if at in self._ats:
                    continue
                place = self._last_place = max(at, self._last_place + 1)
                while self._heard and (len(self._heard) == MAX_ARRIVALS
                                       or self._heard[0][0] < place - ARRIVALS_KEPT_US):
                    self._ats.discard(self._heard.popleft()[1])
                self._heard.append((place, at, box))
                self._ats.add(at)
                self.newest_at = max(self.newest_at, at)

    def after(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest place, and the boxes of those after the given one."""
        with self._lock:
            boxes = set()
            for place, _, box in reversed(self._heard):
                if place <= after_us:
                    break
                boxes.add(box)
            return (self._last_place if boxes else after_us), boxes


# ---------------------------------------------------------------------------------------
# Rate limits in sum.
# ---------------------------------------------------------------------------------------


class SharedRateLimit:
    """Count what each key takes in a span of time, together with all other relays on the table.

    A relay leases a small part of the limit at first, then as much again as it has, up to an
    eighth of the limit: so that most requests cost no write, and many relays get a part. The
    sum is never over the limit; what is leased and not used may leave it lower. As
    connectoid_relay.RateLimit otherwise. Keys stand in the table as keyed hashes.
    """

    def __init__(self, store: DynamoDbStore, name: str, limit: int, span_us: int) -> None:
        self.limit = limit
        self._store, self._name, self._span_us = store, name, span_us
        self._lock = threading.Lock()
        self._span = 0
        self._leased: dict[Hashable, int] = {}  # in this span
        self._left: dict[Hashable, int] = {}  # leased and not taken
        self._refused: dict[Hashable, int] = {}  # what was too much: in this span it stays so

    def take(self, key: Hashable, now_us: int, amount: int = 1) -> int:
        """Take the amount and return 0, or take nothing and return the seconds to wait; raise StoreError."""
        if not self.limit:
            return 0
        span = now_us // self._span_us
        retry_s = seconds_until((span + 1) * self._span_us, now_us)
        key = self._begin(key, span)
        while (missing := self._take_leased(key, amount)) > 0:
            if self._is_refused(key, missing) or not self._lease(key, span, missing):
                return retry_s
        return 0

    def _begin(self, key: Hashable, span: int) -> Hashable:
        """Start again with a new span; return under which key this one counts."""
        with self._lock:
            if span != self._span:
                self._span, self._leased, self._left, self._refused = span, {}, {}, {}
            crowded = len(self._left) + len(self._refused) >= MAX_SOURCES
            return None if crowded and key not in self._left and key not in self._refused else key

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

    def _lease(self, key: Hashable, span: int, missing: int) -> bool:
        """Lease what is missing, and more if there is; return whether that was to be had."""
        leased = self._leased.get(key, 0)
        more = min(max(self.limit // FIRST_LEASE_PARTS, leased), self.limit // LEASE_PARTS, self.limit - leased)
        for amount in dict.fromkeys((max(missing, more), missing)):
            if self._store.lease((self._name, span, key), amount, self.limit, (span + 1) * self._span_us):
                with self._lock:
                    if span == self._span:  # else it is lost
                        for count in (self._leased, self._left):
                            count[key] = count.get(key, 0) + amount
                return True
        with self._lock:
            self._refused[key] = missing
        return False


# ---------------------------------------------------------------------------------------
# The store.
# ---------------------------------------------------------------------------------------

class _OfThread(threading.local):
    """What belongs to one thread: boxes that it is about to look at, each once."""

    fetched: Mapping[bytes, Box] = {}


RELAY: Key = (b"relay", b"messages")
BOXES: Key = (b"relay", b"boxes")
ARRIVALS = b"arrivals"


class DynamoDbStore:
    """Keep everything in one table; a connectoid_relay.Store for any number of threads and processes.

    `bucket_width_us` says for how long messages of a certain life share a part of the
    totals. With `follow_every_s` a thread reads that often which boxes got messages, and
    `arrivals` tells what it has read without asking the table: what a front needs. Raises
    StoreError, with what to do, if the table cannot be used.
    """

    def __init__(self, table_name: str, client: Any = None, *, bucket_width_us: Callable[[int], int] = bucket_width_us,
                 follow_every_s: float = 0, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._table = Table(table_name, client or make_client())
        self._bucket_width_us, self._random_bytes = bucket_width_us, random_bytes
        self._totals = Totals(self._table, RELAY, "bytes", "messages")
        self._box_totals = Totals(self._table, BOXES, "boxes")
        self._quotas: dict[str, Totals] = {}  # as many as there are API keys
        self._time_us = self._last_at = 0  # as we know them: the table may be further
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._source_keys: dict[int, bytes] = {}
        self._of_thread = _OfThread()
        for item in self._table.query(RELAY[0], b"\0", pages=1, consistent=True):
            self._learn(item)
        self._log = ArrivalLog(max(self._time_us, self._last_at))
        self._follower: threading.Thread | None = None
        if follow_every_s:
            self._follower = threading.Thread(target=self._follow, args=(follow_every_s,), daemon=True)
            self._follower.start()

    def close(self) -> None:
        """Let go of the table."""
        self._table.closed.set()
        if self._follower:
            self._follower.join()

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: each read is one of its own."""
        return contextlib.nullcontext()

    # Time

    def _learn(self, item: Item) -> None:
        """Take in what the item of the relay says; raise StoreError for a time that nobody would get away from."""
        if max(item.get("time_us", 0), item.get("last_at", 0)) >= YEAR_2200_US:
            raise StoreError("the table's time is past the year 2200; set all relays' clocks, and make another table")
        self._time_us = max(self._time_us, item.get("time_us", 0))
        self._last_at = max(self._last_at, item.get("last_at", 0))

    def _known_us(self, now_us: int) -> int:
        """Return the caller's time or the table's, whichever is larger, as far as we know it."""
        return max(now_us, self._time_us)

    def time_us(self) -> int:
        """Return the table's time as it was last raised."""
        item = self._totals.read()
        self._learn(item)
        return max(int(item.get("time_us", 0)), int(item.get("last_at", 0)))

    def check_clock(self, wall_us: int) -> None:
        """Raise StoreError if our clock is not the engine's; warn if the table's time is ahead of ours.

        All relays take the table's time where theirs is behind: one clock that is ahead makes messages expire early.
        """
        with contextlib.suppress(TypeError, ValueError):  # of an engine that tells no date
            engine_s = email.utils.parsedate_to_datetime(self._table.date).timestamp()
            if abs(wall_us // SECOND_US - engine_s) > MAX_CLOCK_GAP_S:
                raise StoreError("our clock and that of the table's engine differ by more than 5 minutes; set them")
        if max(self._time_us, self._last_at) > wall_us + MAX_CLOCK_GAP_S * SECOND_US:
            log.warning("connectoid relay: the table's time is more than 5 minutes ahead of our clock: was another"
                        " relay's wrong? All relays use the table's; a table made anew would begin again")

    def _raise_time(self, now_us: int, step_us: int = 0) -> bool:
        """Raise the table's time, unless it is known to be about there; return whether that took a write."""
        if now_us <= self._time_us + step_us:
            return False
        item = self._table.update(RELAY, "SET #time_us = :now", "attribute_not_exists(#time_us) OR #time_us < :now",
                                  now=now_us)
        self._learn({"time_us": now_us} if item is None else item)
        return item is not None

    # Messages

    def _lock_of(self, box: bytes) -> threading.Lock:
        """Return the lock for a box: our own writers shall not get into each other's way at the table."""
        return self._locks[hash(box) % LOCKS]

    def _read_box(self, box: bytes) -> Box:
        return read_box_item(self._table.read((box, b"box")))

    def _write_box(self, name: bytes, seen: Box, box: Box) -> bool:
        """Write the next version of a box; return False if there is another meanwhile."""
        condition, values = ("#version = :seen", {"seen": seen.version}) if seen.version else (
            "attribute_not_exists(#pk)", {})
        version = 1 + int.from_bytes(self._random_bytes(VERSION_BYTES))
        return self._table.write((name, b"box"), box_item(box._replace(version=version)), condition, **values)

    def put(self, message: Message, limits: Limits, now_us: int) -> int:
        """Keep a message durably and return its `at`; raise NoRoom."""
        with self._lock_of(message.box), contextlib.ExitStack() as undo:
            now_us = self._known_us(now_us)
            box = self._read_box(message.box).alive(now_us)
            _check_box(box, message, limits, now_us)
            self._take_quota(message, now_us, undo)
            at = self._take_place(message, limits.max_bytes * (3 if box.kept_until_us else 2) // 3, now_us, undo)
            entry = Entry(at, at + message.ttl_us, len(message.data), message.source, self._random_bytes(ID_BYTES))
            self._table.write((message.box, b"m" + entry.id), {"sealed": message.data, "ttl": ttl_of(entry.expires_us)})
            try:
                entry = self._commit(message, limits, box, entry)
            except NoRoom:
                raise
            except Exception:
                undo.pop_all()  # it may have been kept: its place ends by itself
                raise
            undo.pop_all()
        self._announce(message.box, entry)
        return entry.at

    def _take_quota(self, message: Message, now_us: int, undo: contextlib.ExitStack) -> None:
        """Count the bytes against the API key's."""
        quota: Quota = message.quota
        if not (quota.name and quota.bytes):
            return
        totals = self._quotas.setdefault(quota.name, Totals(self._table, (b"quota", quota.name.encode()), "bytes"))
        amounts, end_us = {"bytes": len(message.data)}, self._end_of(now_us + message.ttl_us, message.ttl_us)
        while totals.add(amounts, end_us, quota.bytes) is None:
            if not totals.release(now_us):
                raise NoRoom("quota")
        undo.callback(totals.give_back, amounts, end_us)
        totals.release(now_us)

    def _take_place(self, message: Message, room: int, now_us: int, undo: contextlib.ExitStack) -> int:
        """Count the message and its bytes, and return an `at`; raise NoRoom."""
        amounts = {"bytes": counted_bytes(len(message.data)), "messages": 1}
        at, end_us = self._take_at(now_us, amounts, message.ttl_us, room)
        undo.callback(self._totals.give_back, amounts, end_us)
        return at

    def _take_at(self, now_us: int, amounts: Mapping[str, int], ttl_us: int, room: int = UNLIMITED) -> tuple[int, int]:
        """Return an `at` larger than any before, and the end of what was added to the totals with it; raise NoRoom.

        The first way fails if another relay's clock is ahead, the second one only if we did not know of that.
        """
        for _ in range(MAX_TRIES):
            floor_us, last_at = max(now_us, self._time_us), self._last_at
            at = max(floor_us, last_at + 1)
            also, condition, values = ("SET #last_at = :at", " AND (attribute_not_exists(#last_at) OR #last_at < :at)",
                                       {"at": at}) if last_at < floor_us or not last_at else (
                "SET #last_at = #last_at + :one", " AND #last_at >= :floor", {"one": 1, "floor": floor_us})
            end_us = self._end_of(at + ttl_us, ttl_us)
            item = self._totals.add(amounts, end_us, room, also=also, condition=condition, **values)
            if item is not None:
                self._learn(item)
                return int(item["last_at"]), end_us
            item = self._totals.read()
            self._learn(item)
            if item.get("bytes", 0) + amounts.get("bytes", 0) > room:
                raise NoRoom("relay")
        raise StoreError("too many relays write to the table at the same time")

    def _end_of(self, expires_us: int, ttl_us: int) -> int:
        """Return the end of the part of the totals in which something is counted."""
        width_us = self._bucket_width_us(ttl_us)
        return -(-expires_us // width_us) * width_us

    def _commit(self, message: Message, limits: Limits, box: Box, entry: Entry) -> Entry:
        """Put the entry into the index and return it as it stands there; raise NoRoom.

        An entry whose write got no reply is known by its id. If it is not there, the write may
        still be under way: then we do not write again, and nothing is acknowledged.
        """
        for _ in range(MAX_TRIES):
            if box.last_at >= entry.at:  # another relay was faster: a reader may have passed ours already
                at, _ = self._take_at(entry.at, {}, message.ttl_us)
                entry = entry._replace(at=at, expires_us=at + message.ttl_us)
            alive, failure = box.alive(entry.at), None
            try:
                if self._write_box(message.box, box, alive._replace(
                        last_at=entry.at, entries=(*alive.entries, entry))):
                    return entry
            except StoreError as error:
                failure = error
            box = self._read_box(message.box)
            for kept in box.entries:
                if kept.id == entry.id:
                    return kept
            if failure:
                raise failure
            _check_box(box, message, limits, entry.at)
            time.sleep(secrets.randbelow(RETRY_PAUSE_MS) / 1_000)
        raise StoreError("too many relays write to one box at the same time")

    def _announce(self, box: bytes, entry: Entry) -> None:
        """Tell the other relays; if that fails, the next check finds the message all the same."""
        self._log.note([(entry.at, box)])
        with contextlib.suppress(StoreError):
            self._table.write((ARRIVALS, entry.at.to_bytes(8)), {
                "box": box, "expires_us": entry.expires_us, "ttl": ttl_of(entry.expires_us)})

    @contextlib.contextmanager
    def fetch(self, boxes: Iterable[bytes]) -> Iterator[None]:
        """Read boxes a hundred at a time, for the looks of this thread within a `with`: what Relay takes as `fetch`.

        A call costs a millisecond of CPU, however little it reads.
        """
        fetched = dict.fromkeys(boxes, Box())
        names = tuple(fetched)
        with contextlib.suppress(StoreError):  # each look will say so
            for start in range(0, len(names), MAX_BATCH_KEYS):
                for item in self._table.read_many([(name, b"box") for name in names[start:start + MAX_BATCH_KEYS]]):
                    fetched[item["pk"]] = read_box_item(item)
            self._of_thread.fetched = fetched
        try:
            yield
        finally:
            self._of_thread.fetched = {}

    def look(self, box: bytes, at_us: int, now_us: int) -> Look:
        """Return whether the box has news, and until when its row lives."""
        alive = (self._of_thread.fetched.get(box) or self._read_box(box)).alive(now_us)
        return Look(any(entry.at > at_us for entry in alive.entries), alive.kept_until_us or None)

    def messages(self, box: bytes, at_us: int, limit: int, now_us: int) -> list[tuple[int, str]]:
        """Return (at, data) newer than `at`, oldest first."""
        entries = page_of(self._read_box(box).alive(now_us), at_us, limit)
        if not entries:
            return []
        bodies = {item["sk"][1:]: item["sealed"]
                  for item in self._table.read_many([(box, b"m" + entry.id) for entry in entries])}
        return [(entry.at, bodies[entry.id]) for entry in entries if entry.id in bodies]

    # Arrivals

    def arrivals(self, after_us: int) -> tuple[int, set[bytes]]:
        """Return the newest `at` of all, and the boxes that got messages after the given one."""
        if self._follower:
            return self._log.after(after_us)
        arrivals = self._read_arrivals(after_us, consistent=True)
        return max((at for at, _ in arrivals), default=after_us), {box for _, box in arrivals}

    def _read_arrivals(self, after_us: int, *, consistent: bool = False) -> list[tuple[int, bytes]]:
        items = self._table.query(ARRIVALS, after_us.to_bytes(8), pages=ARRIVALS_PAGES, consistent=consistent)
        return [(int.from_bytes(item["sk"]), item["box"]) for item in items if item["expires_us"] > self._time_us]

    def _follow(self, every_s: float) -> None:
        while not self._table.closed.wait(every_s):
            try:
                self._log.note(self._read_arrivals(max(0, self._log.newest_at - ARRIVALS_OVERLAP_US)))
            except StoreError:
                pass  # the sweeper says what is wrong
            except Exception:  # whatever it is, the next time is another
                log.exception("reading arrivals failed; please report this")

    # Questions

    def question(self, box: bytes, made_after_us: int, now_us: int) -> str | None:
        """Return the newest question if it was made after the given time."""
        item = self._table.read((box, b"question"))
        young = item and item["made_us"] > made_after_us and item["expires_us"] > now_us
        return item["question"] if young else None

    def put_question(self, box: bytes, question: tuple[str, bytes], ttl_us: int, now_us: int) -> str:
        """Keep a question unless another is still young; return the one to hand out."""
        self._raise_time(now_us, TIME_STEP_US)
        now_us = self._known_us(now_us)
        for _ in range(MAX_TRIES):
            item = self._table.read((box, b"question"))
            if item and item["made_us"] > now_us - ttl_us // 2 and item["expires_us"] > now_us:
                return str(item["question"])  # another check was faster
            former = {"former_answer": item["answer"], "former_expires_us": item["expires_us"]} if item else {}
            made = {"made_us": now_us, "question": question[0], "answer": question[1],
                    "expires_us": now_us + ttl_us, "ttl": ttl_of(now_us + ttl_us)}
            condition, values = ("#made_us = :seen", {"seen": item["made_us"]}) if item else (
                "attribute_not_exists(#pk)", {})
            if self._table.write((box, b"question"), made | former, condition, **values):
                return question[0]
        raise StoreError("too many relays make questions for one box at the same time")

    def answers(self, box: bytes, now_us: int) -> list[bytes]:
        """Return the hashes of the answers that are good now."""
        item = self._table.read((box, b"question"))
        return [item[prefix + "answer"] for prefix in ("", "former_")
                if item.get(prefix + "expires_us", 0) > now_us]

    # Box rows

    def keep_boxes(self, expiries_us: Mapping[bytes, int], now_us: int, room_for: int = 0, *,
                   soon: bool = False) -> None:
        """Raise the expiry of box rows; make missing ones while there are fewer than room_for. `soon` is now."""
        self._raise_time(now_us, TIME_STEP_US)
        now_us = self._known_us(now_us)
        for box, expires_us in expiries_us.items():
            with self._lock_of(box):
                self._keep_box(box, expires_us, now_us, room_for)

    def _keep_box(self, name: bytes, expires_us: int, now_us: int, room_for: int) -> None:
        seen = self._read_box(name)
        for _ in range(MAX_TRIES):
            box = seen.alive(now_us)
            if expires_us <= max(now_us, box.kept_until_us):
                return
            is_new, one = not box.kept_until_us, {"boxes": 1}
            if is_new and self._box_totals.add(one, expires_us, room_for) is None:
                return
            written = self._write_box(name, seen, box._replace(kept_until_us=expires_us))
            seen = seen if written else self._read_box(name)
            if written or seen.kept_until_us == expires_us:  # ours, if a write whose reply was lost was made again
                if not is_new:
                    self._box_totals.prolong("boxes", box.kept_until_us, expires_us)
                return
            if is_new:
                self._box_totals.give_back(one, expires_us)
        raise StoreError("too many relays write to one box at the same time")

    # Quotas, rate limits

    def spend(self, requests: Mapping[str, int], now_us: int) -> None:
        """Add to the requests of today by name of quota."""
        day = self._known_us(now_us) // DAY_US
        for name, count in requests.items():
            self._table.update((b"spent%d" % day, name.encode()), "ADD #requests :count SET #ttl = :ttl",
                               count=count, ttl=ttl_of((day + 1) * DAY_US))

    def spent(self, now_us: int) -> dict[str, int]:
        """Return the requests of today by name of quota, of all processes."""
        items = self._table.query(b"spent%d" % (now_us // DAY_US), b"\0", pages=ARRIVALS_PAGES, consistent=False)
        return {item["sk"].decode(): item["requests"] for item in items}

    def rate_limit(self, name: str, limit: int, span_us: int) -> SharedRateLimit:
        """Return a rate limit that all relays on the table hold in sum: what Relay takes as `rate_limit`."""
        return SharedRateLimit(self, name, limit, span_us)

    def lease(self, counted: tuple[str, int, Hashable], amount: int, limit: int, ends_us: int) -> bool:
        """Take an amount of what may be counted until a time; return whether that was to be had."""
        key = self.source_key((ends_us - 1) // DAY_US)
        digest = hashlib.blake2b(repr(counted).encode("utf-8", "replace"), key=key, digest_size=16).digest()
        return amount <= limit and self._table.update(
            (digest, b"rate"), "ADD #taken :amount SET #ttl = :ttl", "attribute_not_exists(#taken) OR #taken <= :room",
            amount=amount, room=limit - amount, ttl=ttl_of(ends_us)) is not None

    def source_key(self, day: int) -> bytes:
        """Return the key of a day (since 1970) that all relays on the table share: what Relay takes as `source_key`."""
        if day not in self._source_keys:
            item = self._key_of(day)
            if len(self._source_keys) > 1:
                self._source_keys = {}
            self._source_keys[day] = item["key"]
        return self._source_keys[day]

    def _key_of(self, day: int) -> Item:
        where = (b"key", b"%d" % day)
        if item := self._table.read(where):
            return item
        made = {"key": self._random_bytes(SOURCE_KEY_BYTES), "ttl": ttl_of((day + 1) * DAY_US)}
        return made if self._table.write(where, made, "attribute_not_exists(#pk)") else self._table.read(where)

    # The whole

    def stored(self) -> Stored:
        """Return what the table holds."""
        messages, boxes = self._totals.read(), self._box_totals.read()
        return Stored(messages.get("messages", 0), messages.get("bytes", 0), boxes.get("boxes", 0))

    def sweep(self, now_us: int) -> bool:
        """Free the places of what has expired, and return whether there is more; the engine deletes by itself."""
        now_us = self._known_us(now_us)
        released = [totals.release(now_us) for totals in (self._totals, self._box_totals)]
        if any(released):
            self._raise_time(now_us)
        return SWEEP_PARTS in released

    def probe(self, now_us: int) -> None:
        """Write the time and read a box for real; raise StoreError if that fails."""
        if not self._raise_time(now_us):
            # With a condition, as every write of this item: ScyllaDB orders those alone among each other.
            self._table.update(RELAY, "SET #probed_us = :now", "attribute_exists(#pk)", now=now_us)
        self.look(b"probe", 0, now_us)


def _check_box(box: Box, message: Message, limits: Limits, now_us: int) -> None:
    """Raise NoRoom if a box has no room for a message."""
    content = content_of(box.alive(now_us), message.source)
    if content[0] >= MAX_BOX_ENTRIES:  # whatever the limits say
        raise NoRoom("box", content[2])
    check_room(content, len(message.data), limits)


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
