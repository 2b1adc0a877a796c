"""Run vectors/library through the Python library, and make them again with vectors/generate.py."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from generate import make_files

import connectoid
from connectoid import (
    CONTEXTS,
    EMOJI,
    PAIRING,
    REASONS,
    Close,
    Contact,
    ContactRecord,
    Effect,
    Invitation,
    LinkError,
    Mailbox,
    Message,
    Now,
    OtherAppError,
    OwnAddress,
    Privacy,
    Refused,
    Send,
    SystemSuite,
    Tell,
    UnsupportedVersionError,
    UsageError,
    Write,
    comparison_string,
    hash_jws,
    open_message,
    parse_address,
    parse_invitation,
    prove,
    read_jws,
    read_link,
    seal_message,
)
from connectoid.channel import is_too_large
from connectoid.encoding import decode_base64url, encode_base64url
from connectoid.ice import has_stun, ice_servers
from connectoid.limits import SIZES
from connectoid.networks import is_private_host
from connectoid.relay_client import RelayError
from connectoid.sdp import check_sdp, trim_sdp
from connectoid.turn import read_turn
from connectoid.urls import origin_of
from connectoid.versions import highest_common

VECTORS = Path(__file__).parents[2] / "vectors"
SUITE = SystemSuite()
# Nothing ends within a case.
NEVER_US = 2**62

# ---------------------------------------------------------------------------------------
# Reading the files.
# ---------------------------------------------------------------------------------------


def load(name: str) -> Any:
    """Return the content of a file of vectors."""
    return json.loads((VECTORS / "library" / f"{name}.json").read_text(encoding="utf-8"))


NAMES = sorted(path.stem for path in VECTORS.glob("library/*.json") if path.stem != "emoji")
FILES = {name: load(name) for name in NAMES}
CASES = [(name, case) for name, file in FILES.items() for case in file["cases"]]
REFUSED = [(name, case) for name, case in CASES if "refused" in case]
CONTEXT_KEYS: Mapping[str, str] = FILES["contexts"]["keys"]


def each(name: str) -> pytest.MarkDecorator:
    """Return the mark that runs a test with each case of a file."""
    return pytest.mark.parametrize(
        "case", FILES[name]["cases"], ids=lambda case: case["name"].replace("::", ":")
    )


def private(scalar: str) -> str:
    """Return a private key as SystemSuite has it."""
    return encode_base64url(bytes.fromhex(scalar))


def outcome(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result of a function, or the class of its refusal."""
    try:
        return work(), None
    except Refused as refused:
        return None, refused.reason


# ---------------------------------------------------------------------------------------
# Small forms.
# ---------------------------------------------------------------------------------------


@each("base64url")
def test_base64url_is_read_as_the_vectors_say(case: Any) -> None:
    octets, refused = outcome(lambda: decode_base64url(case["text"]))
    assert refused == case.get("refused")
    if refused is None:
        assert octets.hex() == case["octets"]
        assert encode_base64url(octets) == case["text"]


def parse_whole(address: str, *, allow_http: bool = False) -> tuple[Mailbox, ...]:
    """Return the mailboxes of an address whose keys are points."""
    mailboxes = parse_address(address, allow_http=allow_http)
    for mailbox in mailboxes:
        SUITE.check(mailbox.pub)
    return mailboxes


def as_mailboxes(listed: Iterable[Any]) -> tuple[Mailbox, ...]:
    """Return mailboxes of vectors as the library has them."""
    return tuple(Mailbox(**mailbox) for mailbox in listed)


@each("keys")
def test_keys_are_read_as_the_vectors_say(case: Any) -> None:
    address = f"{case['pub']}.{encode_base64url(b'https://relay.example.com/')}"
    assert outcome(lambda: parse_whole(address))[1] == case.get("refused")
    if "private" in case:
        sealed = SUITE.seal(case["pub"], CONTEXTS["message"], b"for this key")
        assert SUITE.open(private(case["private"]), CONTEXTS["message"], sealed) == b"for this key"


@each("networks")
def test_hosts_are_private_as_the_vectors_say(case: Any) -> None:
    assert origin_of(f"https://{case['host']}/").host == case["host"]
    assert is_private_host(case["host"]) == case["private"]


@each("addresses")
def test_addresses_are_read_as_the_vectors_say(case: Any) -> None:
    mailboxes, refused = outcome(
        lambda: parse_whole(case["address"], allow_http=case.get("allow_http", False))
    )
    assert refused == case.get("refused")
    if refused is None:
        assert mailboxes == as_mailboxes(case["mailboxes"])
        assert connectoid.format_address(mailboxes) == case["address"]


DAMAGES = {
    "missing": r"This is not an invitation link\. Copy the whole link again\.",
    "no secret": r"This link has no secret; ask for a new one\.",
    "secret": r"This link is cut off or damaged\. .*",
    "address": r"This link is damaged: .*",
    "version": r"This link needs a newer version of this app\. .*",
}


def open_link(link: str) -> Invitation:
    """Return the invitation in a link that a contact can be made of."""
    invitation = read_link(link)
    Contact.open(SUITE, Now(1, 1.0), "Alice", invitation)
    return invitation


@each("links")
def test_links_are_read_or_refused_with_a_sentence(case: Any) -> None:
    if "refused" in case:
        assert case["refused"] == "link"
        with pytest.raises(LinkError) as caught:
            open_link(case["link"])
        assert re.fullmatch(DAMAGES[case["damage"]], str(caught.value))
        is_later = isinstance(caught.value, UnsupportedVersionError)
        assert is_later == (case["damage"] == "version")
        return
    invitation = open_link(case["link"])
    assert invitation == Invitation(
        case["invitation"], case["address"], bytes.fromhex(case["secret"]), bytes.fromhex(case["h"])
    )
    assert parse_address(invitation.address) == as_mailboxes(case["mailboxes"])
    assert (
        read_link(connectoid.make_link("https://app.example.com/#old", invitation.text))
        == invitation
    )


@each("apps")
def test_link_that_names_an_app_is_opened_by_that_app_alone(case: Any) -> None:
    invitation = parse_invitation(case["invitation"])
    if "refused" in case:
        with pytest.raises(OtherAppError, match="belongs to another app"):
            Contact.open(SUITE, Now(1, 1.0), "Alice", invitation, app=case["app"])
        return
    bob, _ = Contact.open(SUITE, Now(1, 1.0), "Alice", invitation, app=case["app"])
    assert invitation.app_hash.hex() == case["a"]
    assert bob.record.app == (case["app"] if case["a"] else "")


@each("versions")
def test_version_of_two_is_the_highest_of_both(case: Any) -> None:
    ours, theirs = case["ours"], case["theirs"]
    for one, other in ((ours, theirs), (theirs, ours)):
        found = outcome(functools.partial(highest_common, one, other))
        assert found == (case.get("version"), case.get("refused"))


@each("commitments")
def test_commitments_are_as_the_vectors_say(case: Any) -> None:
    same = encode_base64url(connectoid.suite.hash_commitment(case["from"], case["r"])) == case["h"]
    assert same == (case.get("refused") != "commitment")


# ---------------------------------------------------------------------------------------
# Envelopes.
# ---------------------------------------------------------------------------------------


@each("seals")
def test_seals_open_or_not_as_the_vectors_say(case: Any) -> None:
    opened, refused = outcome(
        lambda: SUITE.open(
            private(case["private"]), bytes.fromhex(case["info"]), bytes.fromhex(case["sealed"])
        )
    )
    assert refused == case.get("refused")
    if refused is None:
        assert opened.hex() == case["plaintext"]


@each("padding")
def test_padding_is_read_and_made_as_the_vectors_say(case: Any) -> None:
    key = private(case["private"])
    text, refused = outcome(lambda: open_message(SUITE, key, case["data"]))
    assert refused == case.get("refused")
    if refused is None:
        assert text == case["text"]
        made = decode_base64url(seal_message(SUITE, pub_of(key), text))
        smallest = next(size for size in SIZES if size >= 4 + len(text))
        assert len(SUITE.open(key, CONTEXTS["message"], made)) == smallest <= case["size"]


def pub_of(key: str) -> str:
    """Return the public key of a private one of the contexts."""
    return next(pub for pub, scalar in CONTEXT_KEYS.items() if private(scalar) == key)


def test_padding_has_no_size_for_a_text_of_16381() -> None:
    pub = next(iter(CONTEXT_KEYS))
    with pytest.raises(UsageError):
        seal_message(SUITE, pub, "a" * 16_381)


def read_signed(text: str) -> Message:
    """Return a message whose form and signature are right."""
    message = read_jws(text)
    message.check_signature(SUITE)
    return message


@each("jws")
def test_jws_is_read_as_the_vectors_say(case: Any) -> None:
    message, refused = outcome(lambda: read_signed(case["text"]))
    assert refused == case.get("refused")
    if refused is None:
        assert message.payload == case["payload"]
        assert message.hash == hash_jws(case["text"]) == case["hash"]
        assert message.payload["from"] == case["from"]


@each("payloads")
def test_payloads_are_read_as_the_vectors_say(case: Any) -> None:
    message, refused = outcome(lambda: read_signed(case["text"]))
    assert refused == case.get("refused")
    if refused is None:
        assert message.type == case["type"]
        assert message.payload == json.loads(case["payload"])


@each("sdp")
def test_offers_and_answers_are_read_as_the_vectors_say(case: Any) -> None:
    kept, refused = outcome(lambda: check_sdp(case["sdp"]))
    assert refused == case.get("refused")
    assert kept == case.get("kept")
    if kept is not None:
        # Nobody's own is refused by the other, nor cut twice.
        sent = trim_sdp(case["sdp"])
        assert check_sdp(sent) == trim_sdp(sent) == sent
        assert sorted(sent.splitlines()) == sorted(kept.splitlines())


@each("candidates")
def test_candidates_are_sent_as_the_vectors_say(case: Any) -> None:
    sent = trim_sdp(case["sdp"], relay_only=case["relay_only"])
    candidates = [line for line in sent.splitlines() if line.startswith("a=candidate:")]
    assert sorted(candidates) == sorted(case["candidates"])


@each("app_messages")
def test_app_messages_are_bounded_as_the_vectors_say(case: Any) -> None:
    message = case["part"] * case["times"]
    if case["kind"] == "binary":
        message = bytes.fromhex(message)
    assert is_too_large(message) is case["closes"]


@each("proofs")
def test_proofs_are_as_the_vectors_say(case: Any) -> None:
    message = read_signed(case["text"])
    assert (prove(bytes.fromhex(case["secret"]), message.jws) == message.proof) == (
        case.get("refused") != "proof"
    )


@each("hashes")
def test_hashes_are_as_the_vectors_say(case: Any) -> None:
    assert hash_jws(case["text"]) == case["hash"]


def name_emoji(numbers: Iterable[int]) -> list[str]:
    """Return the words that two people read to each other."""
    return [" ".join(EMOJI[number]) for number in numbers]


@each("comparison")
def test_comparison_strings_are_as_the_vectors_say(case: Any) -> None:
    numbers = comparison_string(case["invitation"], case["hello"], case["from"], case["r"])
    assert list(numbers) == case["numbers"]
    assert name_emoji(numbers) == case["emoji"]


def test_emoji_are_those_of_the_vectors() -> None:
    assert [list(pair) for pair in EMOJI] == load("emoji")["emoji"]


QUESTIONS = json.loads((VECTORS / "relay" / "questions.json").read_text(encoding="utf-8"))


def open_question(case: Any) -> bytes:
    """Return the answer to a question."""
    return SUITE.open(
        private(case["private"]), CONTEXTS["question"], decode_base64url(case["question"])
    )


@pytest.mark.parametrize("case", QUESTIONS["open"], ids=lambda case: case["title"])
def test_question_of_the_relays_vectors_opens(case: Any) -> None:
    assert QUESTIONS["info"].encode() == CONTEXTS["question"]
    assert open_question(case) == case["answer"].encode()


@pytest.mark.parametrize("case", QUESTIONS["must_not_open"], ids=lambda case: case["title"])
def test_question_of_the_relays_vectors_must_not_open(case: Any) -> None:
    assert outcome(lambda: open_question(case))[1] in ("encoding", "seal")


# ---------------------------------------------------------------------------------------
# Messages in context.
# ---------------------------------------------------------------------------------------


def own(known: Any) -> OwnAddress | None:
    """Return an address of a context."""
    if not known:
        return None
    keys = tuple(map(private, known["private"]))
    return OwnAddress(known["address"], keys, known.get("left_us", 0))


SAME = (
    "role",
    "state",
    "invitation",
    "r",
    "hello",
    "hello_hash",
    "welcome",
    "contact",
    "former_contact",
    "seq",
    "seen_seq",
    "app",
    "link_hash",
    "key_news",
)


def keep(known: Any, now_us: int) -> ContactRecord:
    """Return the record of a context. No address is due for rotation."""
    invited, current, pending = (
        own(known["addresses"].get(name)) for name in ("invited", "current", "pending")
    )
    replaced, former = (
        tuple(filter(None, map(own, known["addresses"].get(name, ()))))
        for name in ("replaced", "former")
    )
    here = current or invited
    assert here
    relays = (
        () if known["state"] == "unshared" else tuple((box.url, box.ext) for box in here.mailboxes)
    )
    return ContactRecord(
        name="",
        relays=relays,
        private_key=private(known["private"]),
        signer=known["from"],
        old_private_key=private(known["old_private"]) if known["old_private"] else "",
        old_signer=known["old_from"],
        link_private_key=private(known["link_private"]) if known["link_private"] else "",
        link_signer=known["link_from"],
        renewal_hashes=tuple(known["renewal_hashes"]),
        met=tuple(known["met"]),
        expires_us=NEVER_US,
        rotated_us=now_us,
        contact_address=known["connectoid"],
        invited=invited,
        current=current,
        pending=pending,
        replaced=replaced,
        former=former,
        **{name: known[name] for name in SAME},
    )


def sent_by(effects: Iterable[Effect], keys: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the mailbox and the text of each message that is to be sent."""
    return [
        (effect.mailbox.pub, open_message(SUITE, private(keys[effect.mailbox.pub]), effect.data))
        for effect in effects
        if isinstance(effect, Send)
    ]


def after(record: ContactRecord) -> dict[str, Any]:
    """Return the knowledge in a record, by the names of the vectors."""
    addresses = {
        name: place and place.address
        for name, place in (
            ("current", record.current),
            ("pending", record.pending),
        )
    }
    return {
        "state": record.state,
        "contact": record.contact,
        "former_contact": record.former_contact,
        "old_from": record.old_signer,
        "key_news": record.key_news,
        "connectoid": record.contact_address,
        "why": record.why,
        "protocol": record.protocol,
        "seen_seq": record.seen_seq,
        "hello_hash": record.hello_hash,
        "numbers": list(record.comparison),
        "met": list(record.met),
        "replaced": [place.address for place in record.replaced],
        "former": [place.address for place in record.former],
        **addresses,
    }


def check_sent(sent: list[tuple[str, str]], wanted: list[Any]) -> None:
    """Compare messages that are sent with the members that a case asks for."""
    assert [pub for pub, _ in sent] == [message["mailbox"] for message in wanted]
    for (_, text), message in zip(sent, wanted, strict=True):
        payload = read_signed(text).payload
        assert {name: payload[name] for name in message["payload"]} == message["payload"]
        assert message.get("text", text) == text


def time_of(case: Any) -> int:
    """Return what the clock of a case shows."""
    return int(case.get("now_us", FILES["contexts"]["now_us"]))


def known_in(case: Any) -> ContactRecord:
    """Return the record with which a case begins."""
    return keep(FILES["contexts"]["contexts"][case["context"]], time_of(case))


def find(case: Any) -> tuple[Contact, list[Effect]]:
    """Let the side of a case find the messages in its mailboxes."""
    contact = Contact(SUITE, known_in(case))
    contact.privacy = Privacy(ask_first=case.get("ask_first", False))
    boxes: dict[str, list[tuple[int, str]]] = {}
    for at, found in enumerate(case["found"]):
        boxes.setdefault(found["mailbox"], []).append((at, found["data"]))
    return contact, contact.polled(Now(time_of(case), 1_000.0), boxes)


@each("contexts")
def test_message_in_context_is_taken_as_the_vectors_say(case: Any) -> None:
    before = known_in(case)
    contact, effects = find(case)
    refused = {case["refused"]: case.get("times", 1)} if "refused" in case else {}
    assert dict(contact.dropped) == refused
    check_sent(sent_by(effects, CONTEXT_KEYS), case.get("sent", []))
    assert (Tell("opened_twice") in effects) == case.get("warned", False)
    is_asked = case.get("told") == "wants_to_connect"
    assert (Tell("wants_to_connect") in effects) == is_asked
    if "after" in case:
        known = after(contact.record)
        assert {name: known[name] for name in case["after"]} == case["after"]
    else:
        assert contact.record == before
        assert effects == [Tell(event) for event in (case.get("told"),) if event]


@each("ice_servers")
def test_ice_servers_are_as_the_vectors_say(case: Any) -> None:
    relays = tuple((url, ext) for url, ext in case["relays"])
    known = keep(FILES["contexts"]["contexts"]["alice paired"], FILES["contexts"]["now_us"])
    record = replace(known, relays=relays, contact_address=case["connectoid"])
    with_stun = {url for url, document in case["documents"].items() if has_stun(document)}
    lent = {url: read_turn(turn, url) for url, turn in case["lent"].items()}
    assert ice_servers(record, with_stun, lent, case["more"]) == case["ice_servers"]


@each("turn")
def test_turn_servers_are_lent_or_left_out_as_the_vectors_say(case: Any) -> None:
    if "refused" in case:
        with pytest.raises(RelayError, match="left out"):
            read_turn(case["turn"], case["relay"])
        return
    server = read_turn(case["turn"], case["relay"])
    assert server.as_ice_server() == case["ice_server"]
    assert server.ttl_s == case["ttl_s"]
    assert repr(server) == f"TurnServer(urls={server.urls}, ttl_s={server.ttl_s})"


@each("seq")
def test_seq_of_what_is_sent_is_as_the_vectors_say(case: Any) -> None:
    known = FILES["contexts"]["contexts"]["alice paired"] | {"seq": case["last"]}
    contact = Contact(SUITE, keep(known, case["now_us"]))
    effects = contact.connect(Now(case["now_us"], 1_000.0))
    assert [read_jws(text).payload["seq"] for _, text in sent_by(effects, CONTEXT_KEYS)] == [
        case["seq"]
    ]
    assert contact.record.seq == case["seq"]


# ---------------------------------------------------------------------------------------
# Whole pairings: each side is played against the messages of the other, and must send those
# of the vectors. Its keys and random bytes are dealt to it, and its signatures repeat.
# ---------------------------------------------------------------------------------------


class DealtSuite(SystemSuite):
    """The real suite, with keys and random bytes from the vectors."""

    def __init__(self, keys: Iterable[tuple[str, str]], octets: Mapping[int, bytes]) -> None:
        super().__init__()
        self._keys = iter(keys)
        self._octets = octets

    def random(self, count: int) -> bytes:
        """Return the bytes of this length."""
        return self._octets[count]

    def make_key(self) -> tuple[str, str]:
        """Return the next key."""
        return next(self._keys)

    def sign(self, key: str, octets: bytes) -> bytes:
        """Return the signature with the nonce of RFC 6979, as in the vectors."""
        signer = ec.derive_private_key(int.from_bytes(decode_base64url(key), "big"), ec.SECP384R1())
        halves = utils.decode_dss_signature(
            signer.sign(octets, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
        )
        return b"".join(half.to_bytes(48, "big") for half in halves)


def start_side(pairing: Any, name: str) -> Contact:
    """Return a contact that has made, or has opened, the link of a pairing."""
    told = pairing[name]
    invitation = read_link(pairing["link"])
    here, then = told["addresses"]
    challenge = next(
        challenge for challenge in pairing["channel"]["challenges"] if challenge["by"] == name
    )
    nonce = decode_base64url(pairing["messages"][0]["payload"]["nonce"])
    keys = zip(
        map(private, then["private"]),
        (box.pub for box in parse_address(then["address"])),
        strict=True,
    )
    suite = DealtSuite(keys, {16: nonce, 32: bytes.fromhex(challenge["challenge"])})
    relays = tuple((box.url, box.ext) for box in parse_address(then["address"]))
    record = ContactRecord(
        "inviter",
        "invited",
        "",
        relays,
        private(told["private"]),
        told["from"],
        NEVER_US,
        invitation.text,
    )
    if name == "alice":
        return Contact(suite, replace(record, r=pairing["r"], invited=own(here)))
    return Contact(
        suite,
        replace(
            record,
            role="opener",
            state="opened",
            current=own(here),
            contact_address=invitation.address,
        ),
    )


class Player:
    """Play one side of a pairing against the messages of the other."""

    def __init__(self, pairing: Any, name: str) -> None:
        self.pairing = pairing
        self.name = name
        self.contact = start_side(pairing, name)
        self.sent: list[tuple[str, str]] = []
        self.done: list[Effect] = []
        self.keys = {
            box.pub: key
            for side in (pairing["alice"], pairing["bob"])
            for address in side["addresses"]
            for box, key in zip(parse_address(address["address"]), address["private"], strict=True)
        }

    def do(self, effects: list[Effect]) -> None:
        """Take the effects of the contact."""
        self.done += effects
        self.sent += sent_by(effects, self.keys)

    def play(self) -> None:
        """Send and find all messages, each found at the second in which the next is sent."""
        steps = self.pairing["messages"]
        for message, following in zip(steps, [*steps[1:], steps[-1]], strict=True):
            if message["by"] == self.name:
                self.send(Now(message["payload"]["seq"], 100.0), message)
            else:
                self.find(Now(following["payload"]["seq"], 100.0), message)
        assert self.sent == []

    def send(self, now: Now, message: Any) -> None:
        """Check that this side sends a message, once it has its SDP."""
        if message["payload"]["type"] == "hello":
            self.do(self.contact.connect(now))
        if self.contact.attempt.state == "gathering":
            sdp = message["payload"].get("sdpOffer") or message["payload"].get("sdpAnswer")
            self.do(self.contact.gathered(now, self.contact.attempt.attempt_id, sdp))
        assert self.sent == [(copy["mailbox"], message["text"]) for copy in message["data"]]
        self.sent = []

    def find(self, now: Now, message: Any) -> None:
        """Find a message in all of its mailboxes."""
        if message["fresh"]:
            self.do(self.contact.polled(now, {copy["mailbox"]: [] for copy in message["data"]}))
        self.do(
            self.contact.polled(
                now, {copy["mailbox"]: [(1, copy["data"])] for copy in message["data"]}
            )
        )

    def connect(self) -> None:
        """Prove to each other on the channel."""
        channel = self.pairing["channel"]
        now = Now(1, 101.0)
        attempt_id = self.contact.attempt.attempt_id
        mine, other = sorted(
            channel["challenges"], key=lambda challenge: challenge["by"] != self.name
        )
        assert (self.contact.attempt.offer, self.contact.attempt.answer) == (
            channel["offer"],
            channel["answer"],
        )
        self.do(self.contact.channel_opened(now, attempt_id))
        sealed = self.written()
        info = bytes.fromhex(channel["info"])
        assert SUITE.open(private(self.keys[mine["to"]]), info, sealed).hex() == mine["challenge"]
        self.do(self.contact.channel_message(now, attempt_id, bytes.fromhex(other["sealed"])))
        assert self.written().hex() == other["challenge"]
        self.do(self.contact.channel_message(now, attempt_id, bytes.fromhex(mine["challenge"])))
        assert Tell("connected") in self.done

    def written(self) -> bytes:
        """Return the last message on the channel."""
        return next(effect.octets for effect in reversed(self.done) if isinstance(effect, Write))


@pytest.mark.parametrize("name", ["alice", "bob"])
@each("pairings")
def test_pairing_is_played_as_the_vectors_say(case: Any, name: str) -> None:
    player = Player(case, name)
    player.play()
    assert list(player.contact.record.comparison) == case["numbers"]
    player.connect()
    assert player.contact.record.state == "paired"
    assert player.contact.attempt.state == "connected"
    # Copies in the other mailboxes.
    assert set(player.contact.dropped) <= {"replay", "unexpected"}


@each("channel")
def test_channel_is_proven_as_the_vectors_say(case: Any) -> None:
    player = Player(FILES["pairings"]["cases"][0], case["by"])
    player.play()
    now = Now(1, 101.0)
    attempt_id = player.contact.attempt.attempt_id
    player.do(player.contact.channel_opened(now, attempt_id))
    for number, octets in enumerate(case["received"], 1):
        assert player.contact.attempt.state == "proving"
        player.do(player.contact.channel_message(now, attempt_id, bytes.fromhex(octets)))
        if number == 1 and "written" in case:
            assert player.written().hex() == case["written"]
    refused = case.get("refused") == "channel"
    assert player.contact.dropped["channel"] == refused
    assert (Close(attempt_id) in player.done) == refused
    assert (Tell("connected") in player.done) != refused


@each("pairings")
def test_pairing_can_be_read_with_the_keys(case: Any) -> None:
    keys = Player(case, "alice").keys
    for message in case["messages"]:
        for copy in message["data"]:
            text = open_message(SUITE, private(keys[copy["mailbox"]]), copy["data"])
            assert text == message["text"]
            assert read_signed(text).payload == message["payload"]
        assert hash_jws(message["text"]) == message["hash"]
    assert name_emoji(case["numbers"]) == case["emoji"]
    info = (
        CONTEXTS["channel"]
        + b"\0"
        + b"".join(map(decode_base64url, (case["channel"]["offer"], case["channel"]["answer"])))
    )
    assert info.hex() == case["channel"]["info"]


# ---------------------------------------------------------------------------------------
# The files themselves.
# ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vectors_are_what_a_second_program_makes() -> None:
    for program in VECTORS.glob("*.py"):
        source = program.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) connectoid", source, re.MULTILINE), program
    made = make_files()
    assert {
        name: text == (VECTORS / "library" / name).read_text(encoding="utf-8")
        for name, text in made.items()
    } == {f"{name}.json": True for name in NAMES}


def test_vectors_are_as_many_as_their_readme_says() -> None:
    readme = " ".join((VECTORS / "README.md").read_text(encoding="utf-8").split())
    counts = re.search(r"(\d+) cases in (\d+) files, (\d+) of them refusals", readme)
    assert counts
    assert [int(count) for count in counts.groups()] == [len(CASES), len(NAMES), len(REFUSED)]
    assert len(CASES) >= 120
    assert 2 * len(REFUSED) >= len(CASES)
    for name in NAMES:
        assert f"`library/{name}.json`" in readme


def test_vectors_have_a_name_for_each_case() -> None:
    for name, file in FILES.items():
        names = [case["name"] for case in file["cases"]]
        assert sorted(set(names)) == sorted(names), name


def test_vectors_refuse_for_each_reason_that_a_message_can_have() -> None:
    assert {case["refused"] for _, case in REFUSED} == {*REASONS, "link", "turn"}
    in_context = {case["refused"] for name, case in REFUSED if name == "contexts"}
    assert in_context == set(REASONS) - {"channel"}
    assert {context["state"] for context in FILES["contexts"]["contexts"].values()} == {
        state for state, _ in PAIRING
    }
