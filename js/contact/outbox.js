// @ts-check
/**
 * What goes out: a function for each message that is made, and below them what all need.
 *
 * PROTOCOL.md, "Members", has the types; "Envelope" has the layers.
 * @module
 */

import { encodeBase64url } from "../encoding.js";
import {
  AGAIN_IDLE_S, MAX_SEQ, MAX_SEQ_AHEAD_US, MOVED_EVERY_S, SECRET_BYTES,
} from "../limits.js";
import { parseAddress, parseInvitation } from "../links.js";
import { sealMessage, signJws } from "../messages.js";
import { hashJws, prove } from "../suite.js";
import { VERSIONS } from "../versions.js";
import { isSet } from "./effects.js";
import { KNOWN, addressesOf, isLinkKeyIdle, urlsAt } from "./record.js";
import * as renewal from "./renewal.js";
import { isDue, rotate, rotateIfDue } from "./rotation.js";

/** @import { Message, Sdp } from "../messages.js" */
/** @import { Machine } from "./machine.js" */

// -- Messages of the pairing, known by their hash ----------------------------------------

/**
 * Make the one hello of an invitation and send it; return its hash.
 * @param {Machine} machine
 * @param {Sdp} sdpOffer
 */
export async function sendHello(machine, sdpOffer) {
  const { contactAddress, invitation } = machine.record;
  const nonce = encodeBase64url(machine.suite.random(SECRET_BYTES));
  const members = { nonce, sdpOffer, ...ofThisApp(machine) };
  const jws = await sign(machine, "hello", contactAddress, null, members);
  const { secret } = parseInvitation(invitation, KNOWN);
  const helloHash = await hashJws(jws);
  machine.keep({ hello: `${jws}.${await prove(secret, jws)}`, helloHash });
  await repeatHello(machine);
  return helloHash;
}

/**
 * Return what a hello or welcome says of the app that sends it.
 * @param {Machine} machine
 */
function ofThisApp({ record: { app } }) {
  return { versions: VERSIONS, ...(app && { app }) };
}

/**
 * Send the hello again, to the byte.
 * @param {Machine} machine
 */
export function repeatHello(machine) {
  const { contactAddress, hello, helloHash: hash } = machine.record;
  return post(machine, contactAddress, hello, { hash });
}

/**
 * Make the one welcome and send it, with a new address and with an answer if there is one.
 * @param {Machine} machine
 * @param {Sdp | null} sdpAnswer
 */
export async function sendWelcome(machine, sdpAnswer) {
  await rotate(machine);
  const { contactAddress, helloHash, r } = machine.record;
  const members = { r, ...ofThisApp(machine), ...(sdpAnswer && { sdpAnswer }) };
  const welcome = await sign(machine, "welcome", contactAddress, helloHash, members);
  const welcomeHash = await hashJws(welcome);
  machine.keep({ welcome, welcomeHash });
  machine.setAttempt({ offer: helloHash, answer: welcomeHash });
  // From now on repetitions are a minute apart.
  machine.mayRepeat("welcome");
  await post(machine, contactAddress, welcome, { hash: welcomeHash });
}

/**
 * Send the welcome again, where its hello wants replies.
 * @param {Machine} machine
 * @param {string} address
 */
export function repeatWelcome(machine, address) {
  return post(machine, address, machine.record.welcome);
}

/**
 * Tell the sender of a hello that the link is used, and that a welcome is not to be kept.
 *
 * A copy of this device may have sent one. The contact itself may live at this address, whoever has
 * sent the hello: so only a key that it takes nothing from any more says `unshare`.
 * @param {Machine} machine
 * @param {string} address
 * @param {string} helloHash
 * @param {{isToStranger: boolean}} whom
 */
export async function refuse(machine, address, helloHash, whom) {
  await sendUsed(machine, address, helloHash, whom);
  if (isLinkKeyIdle(machine.record)) {
    await post(machine, address, await signByLinkKey(machine, "unshare", address, helloHash), whom);
  }
}

/**
 * Send the welcome now that the app wants a connection, if a relay has not got it before.
 * @param {Machine} machine
 */
export async function repeatHeldWelcome(machine) {
  const { state, welcome, contactAddress } = machine.record;
  const known = machine.knownRelays;
  const hasAll = urlsAt(contactAddress).every((url) => known.includes(url));
  if (state === "welcomed" && welcome && !hasAll) await repeatWelcome(machine, contactAddress);
}

/**
 * Tell the sender of a hello that the link is used; r proves that this is no lie.
 * @param {Machine} machine
 * @param {string} address
 * @param {string} helloHash
 * @param {{isToStranger: boolean}} whom
 */
export async function sendUsed(machine, address, helloHash, { isToStranger }) {
  const { r } = machine.record;
  const jws = await signByLinkKey(machine, "used", address, helloHash, { r });
  await post(machine, address, jws, { isToStranger });
}

/**
 * Return a new message by the signing key in the link, with no address but that of the link.
 * @param {Machine} machine
 * @param {string} type
 * @param {string} to
 * @param {string} re
 * @param {object} [members]
 */
function signByLinkKey(machine, type, to, re, members) {
  const { linkPrivateKey, linkSigner, privateKey, signer } = machine.record;
  const [{ address: connectoid }] = addressesOf(machine.record);
  const from = linkSigner || signer;
  const payload = makePayload(machine, type, to, re, { from, connectoid, ...members });
  return signJws(machine.suite, linkPrivateKey ?? privateKey, payload);
}

// -- Numbered messages, known by their `seq` ---------------------------------------------

/**
 * Answer the welcome, with a fresh offer where its answer cannot be used; return the hash.
 * @param {Machine} machine
 * @param {Sdp | null} sdpOffer
 */
export function sendReady(machine, sdpOffer) {
  const members = { ...(sdpOffer && { sdpOffer }) };
  return say(machine, "ready", machine.record.welcomeHash, members);
}

/**
 * Offer a connection, because of a call or of oneself; return the hash.
 * @param {Machine} machine
 * @param {string | null} cause
 * @param {Sdp} sdpOffer
 */
export function sendOffer(machine, cause, sdpOffer) {
  return say(machine, "offer", cause, { sdpOffer });
}

/**
 * Answer an offer; return the hash.
 * @param {Machine} machine
 * @param {string | null} cause
 * @param {Sdp} sdpAnswer
 */
export function sendAnswer(machine, cause, sdpAnswer) {
  return say(machine, "answer", cause, { sdpAnswer });
}

/**
 * Call for an offer, because of a stale one or of oneself; return the hash.
 * @param {Machine} machine
 * @param {string | null} cause
 */
export function sendCall(machine, cause) {
  return say(machine, "call", cause);
}

/**
 * Tell the contact one's newest address, for a `moved` or of oneself; return the hash.
 * @param {Machine} machine
 * @param {string | null} cause
 */
export function sendMoved(machine, cause) {
  return say(machine, "moved", cause);
}

/**
 * Tell the contact that the sharing has ended; return the hash.
 * @param {Machine} machine
 * @param {string | null} cause
 */
export function sendUnshare(machine, cause) {
  return say(machine, "unshare", cause);
}

// -- What nobody has asked for, and its answer -------------------------------------------

/**
 * Tell the contact one's newest address, if nothing else that was said has told it in time.
 *
 * A tombstone tells it that the sharing has ended.
 * @param {Machine} machine
 */
export async function announceIfDue(machine) {
  const { now, nextWordS, record } = machine;
  if (now.monotonicS < nextWordS) return;
  let pauseS = MOVED_EVERY_S;
  if (machine.hasNews) {
    // One of them is always at the relay when the contact comes.
    pauseS = AGAIN_IDLE_S;
  } else if (record.state !== "paired" || !isDue(machine)) {
    return;
  }
  machine.nextWordS = now.monotonicS + pauseS;
  if (machine.isLeaving) await sendUnshare(machine, null);
  else await sendMoved(machine, null);
}

/**
 * Write to the contact's new address, so that it can let go of an older one, or of its old key.
 *
 * A `renew` that was accepted is the only one of its key, and a few are answered at any time: the
 * `moved` that follows it may have come first, to another mailbox. What is not answered is made up
 * for by the next `moved`.
 * @param {Machine} machine
 * @param {Message} message
 */
export async function answerMoved(machine, { type, payload, hash }) {
  if (payload.re !== null) return;
  const isDue = machine.mayRepeat("moved");
  if (isDue || (type === "renew" && machine.mayAnswerRenewal())) await sendMoved(machine, hash);
}

// -- What all of them need ---------------------------------------------------------------

/**
 * Send a numbered message to the contact, with a new address if one is due; return its hash.
 *
 * While the contact may not know the key that signs it, the word of the old key goes ahead.
 * @param {Machine} machine
 * @param {string} type
 * @param {string | null} re
 * @param {object} [members]
 */
async function say(machine, type, re, members) {
  await rotateIfDue(machine);
  if (machine.record.oldSigner) {
    if (type === "unshare") await sayByOldKey(machine, type, re);
    else await sendRenew(machine);
  }
  const { contactAddress } = machine.record;
  const jws = await sign(machine, type, contactAddress, re, members);
  const hash = await hashJws(jws);
  if (machine.record.oldSigner) renewal.noteSaid(machine, hash);
  await post(machine, contactAddress, jws, { hash });
  return hash;
}

/**
 * Have the old key say which one follows it.
 * @param {Machine} machine
 */
async function sendRenew(machine) {
  const proof = await renewal.prove(machine, announcedAddress(machine));
  const members = { next: machine.record.signer, proof };
  renewal.noteSaid(machine, await sayByOldKey(machine, "renew", null, members));
}

/**
 * Send `renew` or `unshare` by the key that a renewal replaces; return the hash.
 * @param {Machine} machine
 * @param {string} type
 * @param {string | null} re
 * @param {object} [members]
 */
async function sayByOldKey(machine, type, re, members) {
  const { contactAddress, oldSigner: from, oldPrivateKey } = machine.record;
  const payload = makePayload(machine, type, contactAddress, re, { from, ...members });
  const jws = await signJws(machine.suite, oldPrivateKey, payload);
  await post(machine, contactAddress, jws);
  return hashJws(jws);
}

/**
 * Return a new message, with all that is true now; its `seq` is in the record.
 * @param {Machine} machine
 * @param {string} type
 * @param {string} to
 * @param {string | null} re
 * @param {object} [members]
 */
async function sign(machine, type, to, re, members) {
  const payload = makePayload(machine, type, to, re, members);
  return signJws(machine.suite, machine.record.privateKey, payload);
}

/**
 * Return the payload of a new message; its `seq` is in the record.
 * @param {Machine} machine
 * @param {string} type
 * @param {string} to
 * @param {string | null} re
 * @param {object} [members]
 */
function makePayload(machine, type, to, re, members) {
  const seq = nextSeq(machine);
  machine.keep({ seq });
  const connectoid = announcedAddress(machine);
  return { type, to, from: machine.record.signer, seq, re, connectoid, ...members };
}

/**
 * Return the `seq` of a new message: the time, but more than that of the last one.
 * @param {Machine} machine
 */
function nextSeq({ now, record }) {
  const following = record.seq + 1;
  if (now.wallUs >= MAX_SEQ / 2) return following;
  // The clock was ahead. Nobody has accepted that number whose own was right.
  if (isSet(now) && following > now.wallUs + MAX_SEQ_AHEAD_US) return now.wallUs;
  return Math.max(now.wallUs, following);
}

/**
 * Return the address for replies.
 * @param {Machine} machine
 */
function announcedAddress(machine) {
  const { pending, current } = machine.record;
  const [first] = addressesOf(machine.record);
  return (pending ?? current ?? first).address;
}

/**
 * Seal a message to each mailbox of an address, and send it where it may go.
 *
 * What is held back is not kept: as soon as the app wants a connection, more is said.
 * @param {Machine} machine
 * @param {string} address
 * @param {string} text
 * @param {{hash?: string, isToStranger?: boolean}} [about] the hash of the message, and for whom
 */
async function post(machine, address, text, { hash = "", isToStranger = false } = {}) {
  const mailboxes = parseAddress(address, KNOWN);
  const known = mailboxes.filter(({ url }) => machine.mayWrite(url, { isToStranger }));
  for (const mailbox of known) {
    const data = await sealMessage(machine.suite, mailbox.pub, text);
    machine.do({ do: "send", mailbox, data, isToStranger, hash });
  }
  if (isToStranger) return;
  if (known.length < mailboxes.length) machine.tellWish();
  else meet(machine, address);
  machine.pollFast();
}

/**
 * Note that the relays of an address know this device, as the user wants what goes there.
 * @param {Machine} machine
 * @param {string} address
 */
export function meet(machine, address) {
  const met = urlsAt(address);
  if (met.join(" ") !== machine.record.met.join(" ")) machine.keep({ met });
}
