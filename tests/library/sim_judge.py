"""The judge of each step of an app: its records and its connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_world import Broken

from connectoid import ContactRecord

if TYPE_CHECKING:
    from sim_app import App


def keys_of(record: ContactRecord) -> set[str]:
    """Return the signing keys by which a contact may know a side: two while it renews."""
    return {record.signer, record.old_signer} - {""}


def judge_save(app: App, record: ContactRecord) -> None:
    """Raise Broken for a step that must not be: of numbers, of the contact, of addresses."""
    judge_step(app, record)
    for name in app.partners:
        partner = app.world.apps[name].saved
        if partner is not None and partner.contact in keys_of(record):
            judge_reach(app, record, partner)
            judge_reach(app, partner, record)


def judge_reach(app: App, record: ContactRecord, writer: ContactRecord) -> None:
    """Raise Broken if somebody has let go of the address that the contact writes to."""
    if not record.state == writer.state == "paired":
        return
    if writer.contact_address not in [own.address for own in record.addresses]:
        raise Broken(f"{app.name}: an address is gone that the contact writes to")


def judge_step(app: App, record: ContactRecord) -> None:
    """Raise Broken if a number runs backwards, or if another is believed to be the contact."""
    before = app.saved
    if before is None:
        judge_contact(app, record)
        return
    is_back = record.seq < before.seq or record.seen_seq < before.seen_seq
    if is_back and record.state != "ended":
        raise Broken(f"{app.name}: a number ran backwards")
    known = (before.contact, before.contact_address)
    if (record.contact, record.contact_address) != known:
        judge_contact(app, record)


def judge_contact(app: App, record: ContactRecord) -> None:
    """Raise Broken unless all that is believed of the other is the other's."""
    pubs = [text.split(".")[0] for text in record.contact_address.split("~") if text]
    if record.contact:
        pubs.append(record.contact)
    who = {app.world.ring.owners[pub] for pub in pubs}
    if len(who) > 1 or not who <= app.partners:
        raise Broken(f"{app.name}: believes in {sorted(who)}")
    if app.saved and app.saved.contact and record.contact not in ("", app.saved.contact):
        judge_new_key(app, app.saved.contact, record.contact)


def judge_new_key(app: App, before: str, contact: str) -> None:
    """Raise Broken unless a key that takes another's place is a newer one of the same contact."""
    owners = app.world.ring.owners
    in_order = list(owners)
    is_newer = in_order.index(contact) > in_order.index(before)
    if owners[contact] != owners[before] or not is_newer:
        raise Broken(f"{app.name}: another contact")


def judge_connection(app: App) -> None:
    """Raise Broken unless the other end of the channel is the contact's."""
    pc = app.webrtc.pc
    if pc is None or pc.peer is None or app.saved is None:
        raise Broken(f"{app.name}: connected with nobody")
    other = pc.peer.app
    if other.saved is None or other.name not in app.partners:
        raise Broken(f"{app.name}: connected with nobody")
    known = app.saved.contact in keys_of(other.saved)
    if not known or other.saved.contact not in keys_of(app.saved):
        raise Broken(f"{app.name}: connected with {other.name}, who is not the contact")


def judge_sdp(app: App, sdp: str) -> None:
    """Raise Broken for an SDP that no partner has made."""
    if not sdp:
        return
    pc = app.world.pcs.get(sdp)
    if pc is None or pc.app.name not in app.partners:
        raise Broken(f"{app.name}: takes an SDP of somebody else")
