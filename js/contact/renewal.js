// @ts-check
/**
 * A new signing key in place of the old one: making, announcing and accepting it.
 *
 * The old key vouches for the new one, in `renew`, and signs nothing else any more. The new key
 * signs all else from the start, and `renew` goes ahead of it until the contact has answered one of
 * these messages. Then the old key is deleted. So it never matters which of the two keys the
 * contact knows. PROTOCOL.md, "Renewal".
 * @module
 */

import { concat, decodeBase64url, encodeBase64url, toUtf8 } from "../encoding.js";
import { Refused, UsageError } from "../errors.js";
import { MAX_RENEWAL_HASHES } from "../limits.js";
import { CONTEXTS, sha256 } from "../suite.js";
import { RENEWAL_VERSION } from "../versions.js";
import { NO_OLD_KEY } from "./record.js";
import { rotate } from "./rotation.js";

/** @import { Message } from "../messages.js" */
/** @import { Machine, Received } from "./machine.js" */

/**
 * Make a new signing key and a new address; throw UsageError if this is not the time for it.
 *
 * A copy of the device has the keys of the mailboxes too, so all of these go. What the link needs
 * stays with it: whoever opens the link has to hear that it is used.
 * @param {Machine} machine
 */
export async function begin(machine) {
  const { state, protocol, privateKey, signer, oldSigner } = machine.record;
  if (state !== "paired") throw new UsageError("A key can be renewed once both know each other.");
  if (protocol < RENEWAL_VERSION) {
    throw new UsageError(
      "This contact was made with an older app, which knows no renewal. Share again.");
  }
  if (oldSigner) {
    throw new UsageError(
      "The contact has not answered the last renewal yet. Wait until it has.");
  }
  await rotate(machine);
  keepLinkKey(machine);
  const [newKey, newSigner] = await machine.suite.makeKey("ECDSA");
  machine.keep({
    privateKey: newKey,
    signer: newSigner,
    oldPrivateKey: privateKey,
    oldSigner: signer,
  });
}

/**
 * Keep the signing key in the link, as long as somebody may still open that.
 * @param {Machine} machine
 */
function keepLinkKey(machine) {
  const { invited, linkSigner, privateKey, signer } = machine.record;
  machine.keep({ welcome: "" });
  if (invited && !linkSigner) machine.keep({ linkPrivateKey: privateKey, linkSigner: signer });
}

/**
 * Return the proof by the new key that its owner follows the old one, at an address.
 * @param {Machine} machine
 * @param {string} address
 */
export async function prove({ suite, record }, address) {
  const { oldSigner, signer, linkHash, privateKey } = record;
  const octets = await provenOctets(oldSigner, signer, linkHash, address);
  return encodeBase64url(await suite.sign(privateKey, octets));
}

/**
 * Throw Refused (proof) unless the new key has signed for the old one, link and address.
 *
 * Who has a copy of the device could join a proof of the owner's with an address of his own.
 * @param {Machine} machine
 * @param {Message} message
 */
export async function check({ suite, record }, { payload }) {
  const { from, next, connectoid } = payload;
  const octets = await provenOctets(from, next, record.linkHash, connectoid);
  try {
    await suite.verify(next, decodeBase64url(payload.proof), octets);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    throw new Refused("proof", "the new key has not signed for all of this");
  }
}

/**
 * Say whether a new key is the contact's already, or the one that waits in this round.
 * @param {Machine} machine
 * @param {string} signer
 */
export function isKnown({ record, vouched }, signer) {
  return record.contact === signer || vouched?.message.payload.next === signer;
}

/**
 * Let a `renew` wait for the others of its round; throw Refused (copied) if it cannot count.
 *
 * Two new keys mean that two devices have the old one. Nobody can say which is the owner's: each
 * can have its message there first, and number it as it likes. So neither counts, nor does what
 * comes later, until the user has asked.
 * @param {Machine} machine
 * @param {Received} received
 */
export function hold(machine, received) {
  if (machine.vouched) {
    machine.vouched = null;
    machine.drop("copied");
    machine.keep({ keyNews: "copied" });
    tellWhoStays(machine, "copied");
  }
  if (machine.record.keyNews === "copied") throw new Refused("copied");
  machine.vouched = received;
}

/**
 * Know the contact by the new key alone from now on, and tell the user.
 * @param {Machine} machine
 * @param {Message} message
 */
export function take(machine, { payload }) {
  const { contact: formerContact } = machine.record;
  machine.keep({ formerContact, contact: payload.next, keyNews: "renewed" });
  tellWhoStays(machine, "contact_renewed");
}

/**
 * Tell a user who has not left the contact.
 * @param {Machine} machine
 * @param {string} event
 */
function tellWhoStays(machine, event) {
  if (machine.record.state !== "unshared") machine.tell(event);
}

/**
 * Remember the hash of a `renew`, or of what the new key has signed since.
 * @param {Machine} machine
 * @param {string} hash
 */
export function noteSaid(machine, hash) {
  const hashes = [...machine.record.renewalHashes, hash];
  machine.keep({ renewalHashes: hashes.slice(-MAX_RENEWAL_HASHES) });
}

/**
 * Delete the old key if the contact answers a `renew`, or what the new key has signed since.
 *
 * It does so with a message, or with a channel. What was said is sealed to the contact alone, so
 * nobody else knows the hashes. That it writes to the newest address proves nothing: the relay sees
 * the keys of its mailboxes, and who has a copy of the device can announce it.
 * @param {Machine} machine
 * @param {(string | null)[]} answered
 */
export function complete(machine, answered) {
  const { oldSigner, renewalHashes } = machine.record;
  if (!oldSigner || !renewalHashes.some((hash) => answered.includes(hash))) return;
  const isTold = machine.isRenewing;
  machine.keep(NO_OLD_KEY);
  if (isTold) machine.tell("renewed");
}

/**
 * Return what the new key signs. Each part has one length, so there is one way to read them.
 *
 * The key of the other side is not among them: each may renew without knowing of the other's.
 * @param {string} oldKey
 * @param {string} newKey
 * @param {string} linkHash
 * @param {string} address
 */
export async function provenOctets(oldKey, newKey, linkHash, address) {
  const parts = [oldKey, newKey, linkHash].map(decodeBase64url);
  return concat(CONTEXTS.renew, Uint8Array.of(0), ...parts, await sha256(toUtf8(address)));
}
