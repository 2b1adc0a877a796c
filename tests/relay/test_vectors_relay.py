"""Play the vectors of vectors/relay: as JSON, as bytes, over HTTP and over UDP."""

from __future__ import annotations

import base64
import contextlib
import hmac
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import pytest
from cryptography.exceptions import InvalidTag
from harness import (
    NOTHING,
    ROOT,
    SOURCE,
    SUITE,
    FakeClock,
    Owner,
    check,
    decode,
    post,
    receive,
    serving,
)

from connectoid_relay import (
    CONTEXTS,
    ERRORS,
    MAX_DATAGRAM_BYTES,
    Limits,
    Relay,
    SqliteStore,
    Turn,
    Wait,
    answer_datagram,
    encode_base64url,
    source_of,
)

VECTORS = ROOT / "vectors" / "relay"
# A scenario goes over HTTP byte by byte if all its bodies have no more bytes.
MAX_HTTP_BYTES = 4_096
ANSWER = re.compile(r"\$answer(?::(\w+):(\d+))?")


def expand(value: Any) -> Any:
    """Write out each {"repeat": [part, count, ...]} in a JSON value."""
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"repeat"}:
        return {name: expand(member) for name, member in value.items()}
    pairs = iter(expand(value["repeat"]))
    parts = [part for part, count in zip(pairs, pairs, strict=True) for _ in range(count)]
    if isinstance(parts[0], str):
        return "".join(parts)
    return parts


def load(name: str) -> Any:
    """Return what is in a file of vectors, written out."""
    return expand(json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8")))


QUESTIONS = load("questions")
SCENARIOS = {
    path.stem: load(path.stem)
    for path in sorted(VECTORS.glob("*.json"))
    if path.stem != "questions"
}
REFUSALS = [
    pytest.param(name, marks=[pytest.mark.sockets] * scenario.get("http_only", False))
    for name, scenario in SCENARIOS.items()
    if scenario.get("refusal")
]


class Sent(NamedTuple):
    """A request on its way: the bytes, and the JSON value in them, None if there is none."""

    octets: bytes
    request: Any
    as_bytes: bool
    source: str


Ask: TypeAlias = Callable[[Sent], tuple[int, Any]]


class Player:
    """Play the steps of a scenario into one relay and compare what comes back."""

    def __init__(
        self, scenario: Any, relay: Relay, clock: FakeClock, ask: Ask, *, sweeps: bool
    ) -> None:
        self.relay = relay
        self.clock = clock
        self.ask = ask
        self.sweeps = sweeps
        self.pubs = {name: key["pub"] for name, key in scenario["keys"].items()}
        self.owners = {
            key["pub"]: Owner(int(key["private"], 16)) for key in scenario["keys"].values()
        }
        assert all(owner.pub == pub for pub, owner in self.owners.items())
        # The answers to the questions of each box.
        self.opened: dict[str, dict[str, str]] = {pub: {} for pub in self.owners}
        self.turn = scenario.get("turn")
        # The names in TURN credentials, in the order in which they came.
        self.names: list[str] = []

    def play(self, steps: list[Any]) -> None:
        """Play all steps."""
        for step in self.requests(steps):
            self.exchange(step)

    def requests(self, steps: list[Any]) -> Iterator[Any]:
        """Yield the requests, each as often as it says, and let time go by between them."""
        for step in steps:
            if "advance_s" in step:
                self.advance(step["advance_s"])
            else:
                yield from itertools.repeat(step, step.get("repeat_step", 1))

    def advance(self, seconds: float) -> None:
        """Let time go by, and what the relay does in the background be done."""
        self.clock.advance(seconds)
        while self.sweeps and self.relay.sweep():
            pass

    def exchange(self, step: Any) -> tuple[Sent, Any]:
        """Ask, compare, and return what was sent and what came back."""
        sent = self.fill(step)
        status, reply = self.ask(sent)
        told = self.tell(sent.request, reply, step["reply"])
        assert (status, told) == (step["status"], step["reply"]), sent.octets[:400]
        return sent, reply

    def fill(self, step: Any) -> Sent:
        """Put the answers into a request."""
        source = step.get("source", SOURCE)
        if "request" in step:
            request = self.fill_item(step["request"])
            return Sent(json.dumps(request, ensure_ascii=False).encode(), request, False, source)
        octets = self.fill_body(step)
        try:
            return Sent(octets, json.loads(octets), True, source)
        except (ValueError, RecursionError):
            return Sent(octets, None, True, source)

    def fill_body(self, step: Any) -> bytes:
        if "body_hex" in step:
            return bytes.fromhex(step["body_hex"])
        return self.fill_text(step["body"]).encode()

    def fill_item(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self.fill_item(inner) for inner in item]
        if isinstance(item, dict) and isinstance(item.get("answer"), str):
            return item | {"answer": self.fill_text(item["answer"], item.get("pub", ""))}
        return item

    def fill_text(self, text: str, pub: str = "") -> str:
        def answer(match: re.Match[str]) -> str:
            name, number = match.groups()
            box = self.pubs.get(name, pub)
            return list(self.opened[box].values())[int(number or 0) - 1]

        return ANSWER.sub(answer, text)

    def tell(self, request: Any, reply: Any, expected: Any) -> Any:
        """Return a reply as a vector would have it: questions by their numbers, no detail."""
        if isinstance(reply, list):
            if not isinstance(expected, list) or len(expected) != len(reply):
                return reply
            return [self.tell(*item) for item in zip(request, reply, expected, strict=True)]
        told = {member: value for member, value in reply.items() if member != "detail"}
        if "question" in told:
            number = self.open(request["pub"], told["question"])
            told["question"] = f"$question:{number}"
            if expected.get("question") == "$question":
                told["question"] = "$question"
        if "turn" in told:
            told["turn"] = f"$turn:{self.look_at(told['turn'])}"
        return told

    def look_at(self, turn: Any) -> int:
        """Look at TURN credentials as a server does; return which of the names they are for."""
        end, name = re.fullmatch(r"(\d+):([!-~]{1,64})", turn["username"]).groups()  # type: ignore[union-attr]
        digest = hmac.digest(self.turn["secret"].encode(), turn["username"].encode(), "sha1")
        ttl_s = self.relay.limits.turn_ttl_s
        assert turn == {
            "urls": self.turn["urls"],
            "username": turn["username"],
            "credential": base64.b64encode(digest).decode(),
            "ttl": ttl_s,
        }
        assert int(end) == self.relay.now_us() // 1_000_000 + ttl_s
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name) + 1

    def open(self, pub: str, question: str) -> int:
        """Open a question with the box's key; return which of the box's questions it is."""
        opened = self.opened[pub]
        if question not in opened:
            answer = open_question(self.owners[pub], question)
            assert re.fullmatch(r"[ -~]{43,}", answer)
            assert answer not in opened.values()
            opened[question] = answer
        return list(opened).index(question) + 1

    def stored(self) -> dict[str, list[Any]]:
        """Return every message of every box, asked for from addresses that nobody else has."""
        sources = (f"203.0.113.{number}" for number in itertools.count(1))
        found: dict[str, list[Any]] = {pub: [] for pub in self.owners}
        for pub, owner in self.owners.items():
            at = 0
            while (looked := self.relay.handle(check(owner, at), next(sources)).body) != NOTHING:
                assert isinstance(looked, dict)
                request = receive(owner, owner.open(looked["question"]), at=at, limit=100)
                reply = self.relay.handle(request, next(sources)).body
                assert isinstance(reply, dict)
                found[pub] += reply["messages"]
                at = found[pub][-1]["at"]
        return found


def open_question(owner: Owner, question: str) -> str:
    """Return the answer, as a client has to: from canonical base64url without padding only."""
    sealed = decode(question)
    if encode_base64url(sealed) != question:
        raise ValueError("not canonical")
    return SUITE.decrypt(sealed, owner.key, info=CONTEXTS["question"]).decode("ascii")


def ask_with_bytes(relay: Relay, sent: Sent) -> tuple[int, Any]:
    """Hand a body to the core as a front does."""
    reply = relay.perform(relay.begin(sent.octets, source_of(sent.source)))
    if isinstance(reply, Wait):
        return reply.reply
    return reply


def ask_with_json(relay: Relay, sent: Sent) -> tuple[int, Any]:
    """Hand the parsed JSON to the core as an embedder does; cases about bytes go as bytes."""
    if sent.as_bytes:
        return ask_with_bytes(relay, sent)
    return relay.handle(sent.request, sent.source)


def turn_of(scenario: Any) -> Turn | None:
    """Return the TURN servers of a scenario."""
    if "turn" not in scenario:
        return None
    return Turn(scenario["turn"]["urls"], scenario["turn"]["secret"].encode())


@contextlib.contextmanager
def playing(name: str, ask: str, *, sweeps: bool = True) -> Iterator[Player]:
    """Start a relay for a scenario: asked by "json", "bytes" or "http"."""
    scenario = SCENARIOS[name]
    clock = FakeClock()
    limits = Limits(**scenario.get("limits", {}))
    relay = Relay(
        SqliteStore(":memory:"), limits, turn=turn_of(scenario), clock=clock.clock)
    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        port = 0
        if ask == "http":
            port = stack.enter_context(serving(relay)).server_port
        asks: dict[str, Ask] = {
            "json": lambda sent: ask_with_json(relay, sent),
            "bytes": lambda sent: ask_with_bytes(relay, sent),
            "http": lambda sent: post(port, sent.octets, piece=1),
        }
        yield Player(scenario, relay, clock, asks[ask], sweeps=sweeps)


def octets_of(step: Any) -> int:
    """Return how many bytes the bodies of a step have, about."""
    if "advance_s" in step:
        return 0
    body = step.get("body") or step.get("body_hex") or json.dumps(step.get("request"))
    return len(body) * int(step.get("repeat_step", 1))


def goes_over_http(scenario: Any) -> bool:
    """Return whether one client on this machine can play a scenario in a moment."""
    sources = {step.get("source", SOURCE) for step in scenario["steps"] if "advance_s" not in step}
    return (len(sources) == 1 and not scenario.get("waits")
            and sum(map(octets_of, scenario["steps"])) < MAX_HTTP_BYTES)


def refusals_in(reply: Any) -> list[Any]:
    """Return the refusals in a reply or a batch of replies."""
    items = reply if isinstance(reply, list) else [reply]
    return [item for item in items if item["ok"] is False]


CORE = [name for name, scenario in SCENARIOS.items() if not scenario.get("http_only")]
# Room comes back with a sweep. Nothing else may depend on sweeps.
UNSWEPT = [name for name in CORE if "max_bytes" not in SCENARIOS[name].get("limits", {})]
HTTP = [name for name, scenario in SCENARIOS.items() if goes_over_http(scenario)]


@pytest.mark.parametrize("name", CORE)
def test_scenario_as_json_gives_its_replies(name: str) -> None:
    with playing(name, "json") as player:
        player.play(SCENARIOS[name]["steps"])


@pytest.mark.parametrize("name", UNSWEPT)
def test_scenario_as_bytes_and_without_sweeps_gives_its_replies(name: str) -> None:
    with playing(name, "bytes", sweeps=False) as player:
        player.play(SCENARIOS[name]["steps"])


@pytest.mark.sockets
@pytest.mark.parametrize("name", HTTP)
def test_scenario_over_http_in_one_byte_pieces_gives_its_replies(name: str) -> None:
    # The server has a sweeper of its own.
    with playing(name, "http", sweeps=False) as player:
        player.play(SCENARIOS[name]["steps"])


@pytest.mark.parametrize("name", CORE)
def test_datagram_with_a_request_tells_no_more_than_found(name: str) -> None:
    with playing(name, "json") as player:
        for step in player.requests(SCENARIOS[name]["steps"]):
            sent, reply = player.exchange(step)
            if len(sent.octets) > MAX_DATAGRAM_BYTES:
                continue
            is_check = isinstance(sent.request, dict) and sent.request.get("action") == "check"
            found = None
            if is_check and reply["ok"]:
                found = {"ok": True, "found": reply["found"]}
            answered = answer_datagram(player.relay, sent.octets)
            assert (answered and json.loads(answered)) == step.get("udp", found), sent.octets
            assert answered is None or len(answered) <= len(sent.octets)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_leaves_the_store_as_it_was(name: str) -> None:
    scenario = SCENARIOS[name]
    ask = "http" if scenario.get("http_only") else "json"
    stored = []
    for steps in (scenario["steps"][:-1], scenario["steps"]):
        with playing(name, ask) as player:
            player.play(steps)
            stored.append(player.stored())
    assert stored[0] == stored[1]
    assert refusals_in(scenario["steps"][-1]["reply"])


def test_vectors_are_as_many_as_their_readme_says() -> None:
    readme = " ".join((VECTORS.parent / "README.md").read_text(encoding="utf-8").split())
    counts = re.search(
        r"(\d+) scenarios, one a file, (\d+) of them refusals; .* (\d+) fixed questions"
        r" that open and (\d+) that must not\.",
        readme,
    )
    assert counts
    assert [int(count) for count in counts.groups()] == [
        len(SCENARIOS), len(REFUSALS), len(QUESTIONS["open"]), len(QUESTIONS["must_not_open"])]
    assert len(SCENARIOS) >= 60
    assert 2 * len(REFUSALS) >= len(SCENARIOS)


def test_vectors_know_only_errors_of_the_table() -> None:
    steps = [
        step
        for scenario in SCENARIOS.values()
        for step in scenario["steps"]
        if "advance_s" not in step
    ]
    single = {
        (step["reply"]["error"], step["status"]) for step in steps if "error" in step["reply"]
    }
    assert single == {
        (text, status)
        for text, status in ERRORS
        if status in {400, 403, 413, 429, 507} and text != "Forbidden"
    }
    in_batches = {
        refusal["error"]
        for step in steps
        if step["status"] == 200
        for refusal in refusals_in(step["reply"])
    }
    assert in_batches == {"Bad request", "Too often"}


@pytest.mark.parametrize("case", QUESTIONS["open"], ids=lambda case: case["title"])
def test_question_opens_to_its_answer(case: Any) -> None:
    assert QUESTIONS["info"] == CONTEXTS["question"].decode()
    assert open_question(Owner(int(case["private"], 16)), case["question"]) == case["answer"]


@pytest.mark.parametrize("case", QUESTIONS["must_not_open"], ids=lambda case: case["title"])
def test_question_that_is_not_right_does_not_open(case: Any) -> None:
    owner = Owner(int(case["private"], 16))
    with pytest.raises((ValueError, InvalidTag)):
        open_question(owner, case["question"])
