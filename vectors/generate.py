"""Write the vectors library/*.json again, but for library/emoji.json, which it reads.

The committed files are the truth; this shows how they came about, and test_vectors.py checks
that it still makes the very same. It is written from PROTOCOL.md and RFC 9180 with plain
cryptography and hashlib, and imports nothing of connectoid: two programs that agree are a better
proof than one. All keys and random bytes come from names, HPKE's ephemeral keys and ECDSA's
nonces too, so nothing here is fit for anything but tests.

From the inside out: vector_keys, vector_forms, vector_people, and a module of cases for each
part of PROTOCOL.md.

    python vectors/generate.py
"""

from __future__ import annotations

import json
from pathlib import Path

from cases_apps import accepted_apps, app_cases, contexts_of_apps, refused_apps
from cases_envelope import jws_cases, padding_cases, seal_cases
from cases_ice import ice_cases, turn_cases
from cases_in_context import NOW, accepted_first, accepted_later, accepted_next, contexts
from cases_networks import network_cases
from cases_pairing import channel_cases, pairing_cases
from cases_payload import (
    commitment_cases,
    comparison_cases,
    hash_cases,
    payload_cases,
    proof_cases,
    seq_cases,
)
from cases_privacy import app_message_cases, asked_first, candidate_cases
from cases_refused import (
    refused_addresses,
    refused_beside,
    refused_envelopes,
    refused_for_two,
    refused_pairings,
    refused_places,
    refused_recipients,
    refused_senders,
    refused_signatures,
)
from cases_renewals import accepted_renewals, contexts_of_renewals, refused_renewals
from cases_sdp import sdp_cases
from cases_small import address_cases, base64url_cases, key_cases, link_cases
from cases_versions import accepted_versions, refused_versions, version_cases
from rules_shown import rules_shown
from vector_keys import Json
from vector_people import MAILBOX_KEYS

HERE = Path(__file__).parent


def context_file() -> Json:
    """Return the file of messages in context."""
    cases = (
        accepted_first,
        accepted_next,
        accepted_later,
        refused_envelopes,
        refused_recipients,
        refused_places,
        refused_pairings,
        refused_senders,
        refused_signatures,
        refused_addresses,
        refused_for_two,
        refused_beside,
        accepted_versions,
        refused_versions,
        accepted_apps,
        refused_apps,
        accepted_renewals,
        refused_renewals,
        asked_first,
    )
    return {
        "now_us": NOW,
        "keys": {box.pub: box.private for box in MAILBOX_KEYS},
        "contexts": contexts() | contexts_of_apps() | contexts_of_renewals(),
        "cases": [case for function in cases for case in function()],
    }


FILES = {
    "base64url": ("Base64url without padding, canonical only.", base64url_cases),
    "keys": ("Public keys.", key_cases),
    "addresses": ("Addresses.", address_cases),
    "networks": ("Hosts of one's own machine and networks, and others.", network_cases),
    "apps": ("Identifiers of apps, and links that name them.", app_cases),
    "versions": ("The version that two apps speak.", version_cases),
    "links": ("Links, and the invitations in them.", link_cases),
    "seals": ("HPKE with the context strings.", seal_cases),
    "padding": ("What is in a sealed message.", padding_cases),
    "jws": ("Form and signature of messages.", jws_cases),
    "payloads": ("Payloads of every type.", payload_cases),
    "sdp": ("Offers and answers, and what WebRTC may see of them.", sdp_cases),
    "proofs": ("The fourth part of a hello.", proof_cases),
    "commitments": ("What the link pins.", commitment_cases),
    "hashes": ("Hashes of messages.", hash_cases),
    "comparison": ("Comparison strings.", comparison_cases),
    "candidates": ("The candidates of one's own that a contact may learn.", candidate_cases),
    "app_messages": ("Messages of an app on a channel, around their limit.", app_message_cases),
    "seq": ("The seq of what is sent.", seq_cases),
    "pairings": ("Whole pairings.", pairing_cases),
    "ice_servers": ("The ICE servers for a contact.", ice_cases),
    "turn": ("TURN servers that a relay lends.", turn_cases),
    "channel": ("What comes on the channel of the first pairing.", channel_cases),
}


def with_rules(file: str, case: Json) -> Json:
    """Return a case with the rules of PROTOCOL.md that it shows, after its name."""
    return {"name": case["name"], "shows": rules_shown(file, case), **case}


def make_files() -> dict[str, str]:
    """Return the text of each file by its name."""
    values: dict[str, Json] = {
        name: {"title": title, "cases": list(cases())} for name, (title, cases) in FILES.items()
    }
    values["contexts"] = {"title": "Messages in context.", **context_file()}
    for name, value in values.items():
        value["cases"] = [with_rules(name, case) for case in value["cases"]]
    return {
        f"{name}.json": json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        for name, value in values.items()
    }


def main() -> None:
    """Write all files."""
    for name, text in make_files().items():
        (HERE / "library" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
