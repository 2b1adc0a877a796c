// @ts-check
/**
 * What comes in: reading the mailboxes, and the checks of each message in their order.
 *
 * First each message is read by itself. Then those of a round are sorted, and each is checked
 * against what is known of the other. The first check that fails drops the message, which changes
 * nothing but a counter. PROTOCOL.md, "Reading a message" and "Polling".
 * @module
 */

import { encodeBase64url, isSame, toUtf8 } from "../encoding.js";
import { Refused } from "../errors.js";
import { FLOODED_MESSAGES, FRESH_S, MAX_SEEN, MAX_SEQ_AHEAD_US } from "../limits.js";
import { parseInvitation } from "../links.js";
import { UNNUMBERED, checkSignature, openMessage, readJws } from "../messages.js";
import { checkAddress, hashCommitment, prove, sha256 } from "../suite.js";
import * as connecting from "./connecting.js";
import { isSet } from "./effects.js";
import * as outbox from "./outbox.js";
import * as pairing from "./pairing.js";
import { KNOWN, addressesOf, keyedMailboxes, mailboxesOf, signersOf } from "./record.js";
import * as renewal from "./renewal.js";
import { takeIntoUse } from "./rotation.js";
import { LAST_WORDS, NUMBERED_FOR } from "./rules.js";

/** @import { Key } from "../suite.js" */
/** @import { Now, Poll } from "./effects.js" */
/** @import { Message } from "../messages.js" */
/** @import { Machine, Received } from "./machine.js" */
/** @import { OwnAddress } from "./record.js" */

/**
 * The messages that were found in a mailbox, in order.
 * @typedef {[at: number, data: string][]} Found
 */

// -- Polling -----------------------------------------------------------------------------

/**
 * Return the checks to make at one relay; they count as made. A mailbox that rests has none.
 * @param {Machine} machine
 * @param {Now} now
 * @param {string} url
 * @returns {Poll[]}
 */
export function listPolls(machine, now, url) {
  const polls = [];
  for (const [mailbox, key] of addressesOf(machine.record).flatMap(keyedMailboxes)) {
    if (mailbox.url !== url) continue;
    const box = machine.box(mailbox.pub);
    if (box.rests(now.monotonicS)) continue;
    box.asksZero = box.isDueFromZero(now.monotonicS);
    polls.push({ mailbox, key, at: box.asksZero ? 0 : box.at });
  }
  return polls;
}

/**
 * Note what one round of checks found: for each mailbox that was read, [at, data].
 * Its messages join those of a round that is not taken to its end yet.
 * @param {Machine} machine
 * @param {ReadonlyMap<string, Found>} boxes
 */
export function noteRound(machine, boxes) {
  for (const own of addressesOf(machine.record)) {
    for (const [{ pub }, key] of keyedMailboxes(own)) {
      const found = boxes.get(pub);
      if (found) noteBox(machine, own, key, pub, found);
    }
  }
}

/**
 * Read and take so many messages of the round; with the last one its requests count.
 * @param {Machine} machine
 * @param {number} [most]
 */
export async function goOn(machine, most = Infinity) {
  let left = most;
  for (; machine.unread.length && left > 0; left -= 1) {
    await readNext(machine);
    if (!machine.unread.length) sortRound(machine);
  }
  for (; machine.untaken.length && left > 0; left -= 1) await takeNext(machine);
  if (machine.isBehind) return;
  await connecting.actOnNewest(machine);
  warnOfFlood(machine);
}

/**
 * Tell the user that somebody fills the mailbox of a link that nobody has opened yet.
 * @param {Machine} machine
 */
function warnOfFlood(machine) {
  const { invited, state } = machine.record;
  if (!invited || state !== "invited") return;
  const held = mailboxesOf(invited).map(({ pub }) => machine.box(pub).held);
  if (Math.max(...held) < FLOODED_MESSAGES) return;
  machine.tell("flooded");
}

/**
 * Sort what is not taken yet, by the key that the contact has now.
 *
 * Its sender chooses `seq`, and whoever has copied the sender's device chooses it, too. So it
 * decides nothing between the last words of a key and all else.
 * @param {Machine} machine
 */
function sortRound({ untaken, record: { contact } }) {
  untaken.sort(({ message: one }, { message: other }) => (
    placeOf(one, contact) - placeOf(other, contact) || seqOf(one) - seqOf(other)));
}

/**
 * Return the class of a message in its round.
 * @param {Message} message
 * @param {string} contact
 */
function placeOf({ type, payload }, contact) {
  if (UNNUMBERED.includes(type)) return 0;
  if (payload.from !== contact) return 4;
  return PLACES.get(type) ?? 2;
}

/**
 * Return the place of a message in its class: those that begin a contact stay as they came.
 * @param {Message} message
 */
function seqOf({ type, payload }) {
  return UNNUMBERED.includes(type) ? 0 : payload.seq;
}

/**
 * Do work, and count it as dropped if it is refused.
 * @param {Machine} machine
 * @param {() => Promise<void>} work
 */
async function dropRefused(machine, work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    machine.drop(error.reason);
  }
}

// -- Reading: what a message is by itself ------------------------------------------------

/**
 * Note the messages that were found in a mailbox.
 * @param {Machine} machine
 * @param {OwnAddress} own
 * @param {Key} key
 * @param {string} pub
 * @param {Found} found
 */
function noteBox(machine, own, key, pub, found) {
  const box = machine.box(pub);
  const nowS = machine.now.monotonicS;
  const fresh = nowS - box.readS <= FRESH_S;
  for (const [, data] of found) machine.unread.push({ data, own, key, fresh });
  box.noteRead(nowS, found.map(([at]) => at));
}

/**
 * Read the next message of the round.
 * @param {Machine} machine
 */
async function readNext(machine) {
  const [{ data, own, key, fresh }] = machine.unread.splice(0, 1);
  await dropRefused(machine, async () => {
    machine.untaken.push({ message: await read(machine, own, key, data), own, fresh });
  });
}

/**
 * Take the next message that was read of the round; with the last `renew` a new key counts.
 * @param {Machine} machine
 */
async function takeNext(machine) {
  const { contact } = machine.record;
  const [received] = machine.untaken.splice(0, 1);
  await takeOrDrop(machine, take, received);
  const { vouched } = machine;
  if (vouched && !isRenewalNext(machine)) {
    machine.vouched = null;
    await takeOrDrop(machine, takeNumbered, vouched);
  }
  if (machine.record.contact !== contact) sortRound(machine);
}

/**
 * Say whether another `renew` of the contact's key is the next message of the round.
 * @param {Machine} machine
 */
function isRenewalNext({ untaken: [next], record: { contact } }) {
  return next?.message.type === "renew" && next.message.payload.from === contact;
}

/**
 * Hand a message to a function that takes it, and count it as dropped if it is refused.
 * @param {Machine} machine
 * @param {(machine: Machine, received: Received) => Promise<void>} takes
 * @param {Received} received
 */
function takeOrDrop(machine, takes, received) {
  return dropRefused(machine, async () => {
    // By an earlier message of this round.
    if (machine.record.state === "ended") throw new Refused("unexpected");
    await takes(machine, received);
  });
}

/**
 * Return the message in `data`; throw Refused. The sender is not yet checked.
 * @param {Machine} machine
 * @param {OwnAddress} own
 * @param {Key} key
 * @param {string} data
 */
async function read(machine, own, key, data) {
  await remember(machine, data);
  const message = await readJws(await openMessage(machine.suite, key, data));
  if (message.payload.to !== own.address) throw new Refused("recipient");
  return message;
}

/**
 * Remember what was read, by its digest; throw Refused (replay) if it was read before.
 * @param {Machine} machine
 * @param {string} data
 */
async function remember({ seen }, data) {
  const digest = encodeBase64url(await sha256(toUtf8(data)));
  if (seen.has(digest)) throw new Refused("replay");
  seen.add(digest);
  const [oldest] = seen;
  if (seen.size > MAX_SEEN) seen.delete(oldest);
}

// -- Taking: who has sent a message, and what it changes ---------------------------------

/**
 * Check who has sent a message, and let it change what is known; throw Refused.
 * @param {Machine} machine
 * @param {Received} received
 */
async function take(machine, received) {
  const { message } = received;
  const check = CHECKS.get(message.type) ?? checkNumbered;
  await check(machine, received);
  await checkSignature(machine.suite, message);
  if (message.type === "renew") await renewal.check(machine, message);
  await checkConnectoid(machine, message.payload.connectoid);
  if (UNNUMBERED.includes(message.type)) {
    await pairing.pair(machine, message.type, received);
  } else if (message.type === "renew") {
    renewal.hold(machine, received);
  } else {
    await takeNumbered(machine, received);
  }
  // A stranger with the link, whose hello is refused, does not set the pace.
  if (message.payload.from === machine.record.contact) {
    machine.pollFast();
    machine.beActive();
  }
}

/**
 * Accept a numbered message: what it carries is true from now on.
 *
 * What it asks for waits for the end of the round, where only the newest counts.
 * @param {Machine} machine
 * @param {Received} received
 */
async function takeNumbered(machine, received) {
  const { type, payload } = received.message;
  machine.keep({ seenSeq: payload.seq, contactAddress: payload.connectoid });
  renewal.complete(machine, [payload.re]);
  takeIntoUse(machine, received.own);
  if (type === "renew") {
    renewal.take(machine, received.message);
    await connecting.breakOff(machine);
  }
  const event = type === "unshare" ? "unshare" : "message";
  await pairing.pair(machine, event, received);
  if (type !== "moved" && type !== "renew") {
    machine.round.push(received);
  } else if (machine.record.state === "paired") {
    await outbox.answerMoved(machine, received.message);
  }
}

/**
 * Throw Refused (address) unless one may write to an address, which is none of one's own.
 *
 * At a mailbox of our own we could open what we seal for the other. An echo would prove a channel.
 * @param {Machine} machine
 * @param {string} address
 */
async function checkConnectoid({ suite, allowed, record }, address) {
  const mailboxes = await checkAddress(suite, address, allowed);
  const ownKeys = new Set(signersOf(record));
  for (const { pub } of addressesOf(record).flatMap(mailboxesOf)) ownKeys.add(pub);
  if (mailboxes.some(({ pub }) => ownKeys.has(pub))) {
    throw new Refused("address", "it has a key of one's own");
  }
}

/**
 * Throw Refused unless this comes to the link, from somebody who has read it.
 * @param {Machine} machine
 * @param {Received} received
 */
async function checkHello({ record }, { message, own }) {
  if (record.role !== "inviter" || own.address !== record.invited?.address) {
    throw new Refused("unexpected");
  }
  const { secret } = parseInvitation(record.invitation, KNOWN);
  const proof = await prove(secret, message.jws);
  if (!isSame(toUtf8(proof), toUtf8(String(message.proof)))) throw new Refused("proof");
}

/**
 * Throw Refused unless the link vouches for its sender and it answers the hello.
 * @param {Machine} machine
 * @param {Received} received
 */
async function checkWelcome({ record }, { message: { payload, hash } }) {
  // This is the copy from another mailbox.
  if (hash === record.welcomeHash) throw new Refused("replay");
  if (record.role !== "opener" || !record.invitation) throw new Refused("unexpected");
  const { commitment } = parseInvitation(record.invitation, KNOWN);
  const made = await hashCommitment(payload.from, payload.r);
  if (!isSame(made, commitment)) throw new Refused("commitment");
  if (payload.re !== record.helloHash) throw new Refused("reply");
}

/**
 * Throw Refused unless this is the contact's, and its `seq` counts.
 * @param {Machine} machine
 * @param {Received} received
 */
async function checkNumbered(machine, { message: { type, payload }, own }) {
  const { record } = machine;
  if (!NUMBERED_FOR[record.role].includes(type)) throw new Refused("unexpected");
  if (type !== "unshare" && own.address === record.invited?.address) {
    throw new Refused("unexpected");
  }
  // What follows it counts without it.
  if (type === "renew" && renewal.isKnown(machine, payload.next)) throw new Refused("replay");
  // For as long as relays keep it: nothing is wrong. Another `renew` is that of a copy.
  if (payload.from === record.formerContact && type !== "renew") throw new Refused("replaced");
  if (payload.from !== record.contact) throw new Refused("sender");
  if (!LAST_WORDS.includes(type)) checkSeq(machine, payload.seq);
}

/**
 * Throw Refused unless `seq` is larger than all before, and not far ahead of a set clock.
 * @param {Machine} machine
 * @param {number} seq
 */
function checkSeq(machine, seq) {
  const most = limitOfSeq(machine);
  let { seenSeq } = machine.record;
  // It was accepted when the clock was not set, or ahead.
  if (seenSeq > most) seenSeq = 0;
  if (seq <= seenSeq) throw new Refused("replay");
  if (seq > most) throw new Refused("ahead");
}

/**
 * Return the largest `seq` that can be accepted now.
 * @param {Machine} machine
 */
function limitOfSeq({ now }) {
  return isSet(now) ? now.wallUs + MAX_SEQ_AHEAD_US : Infinity;
}

/**
 * What the contact's key signs, in order: where it leaves, all else, and where it is replaced. So
 * the old key is heard before a new one takes its place.
 */
const PLACES = new Map([["unshare", 1], ["renew", 3]]);

/** By type. All others are numbered. */
const CHECKS = new Map([
  ["hello", checkHello],
  ["welcome", checkWelcome],
  ["used", checkWelcome],
]);
