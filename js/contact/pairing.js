// @ts-check
/**
 * Pairing: from a link to two who know each other, and to the end of it.
 *
 * Hello, welcome and ready make a pair; `used` tells all who come later; `unshare` ends it.
 * PAIRING is at the end. PROTOCOL.md, "Pairing" and "Unshare".
 * @module
 */

import { comparisonString } from "../comparison.js";
import { encodeBase64url } from "../encoding.js";
import { Refused } from "../errors.js";
import {
  AGAIN_AFTER_ANSWER_S, AGAIN_IDLE_S, INVITATION_US, MAX_SEQ, MAX_USED, NEVER_US, RELEASE_US,
  SECRET_BYTES, TOMBSTONE_US,
} from "../limits.js";
import { formatInvitation } from "../links.js";
import { readJws } from "../messages.js";
import { appOfContact, hashApp, hashCommitment, hashLink } from "../suite.js";
import { VERSIONS, highestCommon, spokenBy } from "../versions.js";
import * as connecting from "./connecting.js";
import * as outbox from "./outbox.js";
import { BLANK, urlsOf } from "./record.js";
import { leaveInvitation, makeAddress } from "./rotation.js";
import { makeTable } from "./rules.js";

/** @import { Allowed, Invitation, Relay } from "../links.js" */
/** @import { Message } from "../messages.js" */
/** @import { Suite } from "../suite.js" */
/** @import { Machine, Received } from "./machine.js" */
/** @import { ContactRecord } from "./record.js" */

/**
 * Let an event change what is known of the other; throw Refused for one without a rule.
 * @param {Machine} machine
 * @param {string} event
 * @param {...unknown} brought
 */
export async function pair(machine, event, ...brought) {
  const rule = PAIRING.get(`${machine.record.state} ${event}`);
  if (!rule) throw new Refused("unexpected", `${event} while ${machine.record.state}`);
  const state = await machine.follow(rule, ...brought);
  machine.keep({ state });
}

/**
 * Say whether an event has a rule in this state.
 * @param {Machine} machine
 * @param {string} event
 */
export function isPossible(machine, event) {
  return PAIRING.has(`${machine.record.state} ${event}`);
}

// -- The link ----------------------------------------------------------------------------

/**
 * Return the record of a new contact with an invitation; throw UsageError for bad relays.
 * @param {Suite} suite
 * @param {string} name
 * @param {Relay[]} relays
 * @param {number} expiresUs
 * @param {Allowed & {app: string}} options
 * @returns {Promise<ContactRecord>}
 */
export async function makeInvitation(suite, name, relays, expiresUs, { app, ...allowed }) {
  const invited = await makeAddress(suite, relays, allowed);
  const [privateKey, signer] = await suite.makeKey("ECDSA");
  const r = encodeBase64url(suite.random(SECRET_BYTES));
  const secret = suite.random(SECRET_BYTES);
  const commitment = await hashCommitment(signer, r);
  const appHash = await hashApp(app);
  const invitation = formatInvitation(invited.address, secret, commitment, appHash);
  return {
    ...BLANK,
    role: "inviter",
    state: "invited",
    name,
    relays,
    namedRelays: urlsOf(relays),
    privateKey,
    signer,
    expiresUs,
    invitation,
    linkHash: await hashLink(invitation),
    app,
    r,
    invited,
  };
}

/**
 * Return the record of a new contact from a link.
 * Throw UsageError for bad relays, OtherAppError for the link of another app.
 * @param {Suite} suite
 * @param {string} name
 * @param {Relay[]} relays
 * @param {Invitation} invitation
 * @param {number} expiresUs
 * @param {Allowed & {namedRelays: string[], app: string}} options
 * @returns {Promise<ContactRecord>}
 */
export async function takeInvitation(
  suite, name, relays, invitation, expiresUs, { namedRelays, app, ...allowed },
) {
  const { address, text } = invitation;
  const ofContact = await appOfContact(invitation, app);
  const [privateKey, signer] = await suite.makeKey("ECDSA");
  return {
    ...BLANK,
    role: "opener",
    state: "opened",
    name,
    relays,
    namedRelays,
    privateKey,
    signer,
    expiresUs,
    invitation: text,
    linkHash: await hashLink(text),
    app: ofContact,
    current: await makeAddress(suite, relays, allowed),
    // There was none: the first ready rotates, whatever the clock shows.
    rotatedUs: NEVER_US,
    contactAddress: address,
  };
}

// -- Apps --------------------------------------------------------------------------------

/**
 * Throw Refused (app) if a hello or welcome is not of the app of the link.
 * @param {Machine} machine
 * @param {Message} message
 */
function checkApp(machine, { payload }) {
  if ((payload.app ?? "") !== machine.record.app) throw new Refused("app");
}

// -- Versions ----------------------------------------------------------------------------

/**
 * Return the highest version that this side and the sender of a hello or welcome speak.
 *
 * Without one the user is told that the app is too old; throw Refused (version). Nothing of
 * the message counts, so an updated app takes it when it comes again.
 * @param {Machine} machine
 * @param {number[]} ours
 * @param {Message} message
 */
function agree(machine, ours, message) {
  try {
    return highestCommon(ours, spokenBy(message.payload));
  } catch (error) {
    machine.tell("needs_newer_app");
    throw error;
  }
}

// -- The inviter: hellos -----------------------------------------------------------------

/**
 * Bind the first hello with a valid proof: the only one that ever counts.
 * @param {Machine} machine
 * @param {Received} received
 */
async function takeHello(machine, received) {
  const { jws, hash, payload } = received.message;
  const { invitation, signer, r } = machine.record;
  checkApp(machine, received.message);
  const protocol = agree(machine, VERSIONS, received.message);
  machine.keep({
    protocol,
    helloHash: hash,
    contact: payload.from,
    contactAddress: payload.connectoid,
    comparison: await comparisonString(invitation, jws, signer, r),
  });
  if (!machine.privacy.askFirst) machine.wanted = true;
  await welcome(machine, received);
  return "welcomed";
}

/**
 * Answer the hello that counts: with an answer to its offer if that is fresh.
 * @param {Machine} machine
 * @param {Received} received
 */
async function welcome(machine, { message, fresh }) {
  if (fresh && !machine.mustAsk) {
    // The welcome goes out with the answer, once that is gathered.
    await connecting.turn(machine, "offer", message);
  } else {
    await outbox.sendWelcome(machine, null);
  }
}

/**
 * Repeat the welcome to the hello that counts, and refuse all others.
 * @param {Machine} machine
 * @param {Received} received
 */
async function takeHelloAgain(machine, received) {
  const { hash, payload } = received.message;
  const { helloHash, linkSigner, state, welcome: made } = machine.record;
  if (hash !== helloHash) return takeOtherHello(machine, received);
  // The contact has taken the welcome, or there would have been no renewal.
  if (linkSigner) return state;
  if (!made) {
    if (machine.attempt.state === "apart") await welcome(machine, received);
  } else if (machine.mayRepeat("welcome")) {
    await outbox.repeatWelcome(machine, payload.connectoid);
  }
  return machine.record.state;
}

/**
 * Warn the user of another who has the link, and refuse that hello.
 * @param {Machine} machine
 * @param {Received} received
 */
function takeOtherHello(machine, received) {
  const { from } = received.message.payload;
  if (received.fresh || !machine.record.usedTo.includes(from)) machine.tell("opened_twice");
  return refuseHello(machine, received);
}

/**
 * Say that the link is used. What a restart reads again was answered before.
 * @param {Machine} machine
 * @param {Received} received
 */
async function refuseHello(machine, { message: { hash, payload }, fresh }) {
  const { contact, usedTo } = machine.record;
  const isKnown = usedTo.includes(payload.from);
  const mayTell = isKnown ? fresh && machine.mayRepeat("used") : machine.mayTellAnother();
  if (mayTell) {
    if (!isKnown) machine.keep({ usedTo: [...usedTo, payload.from].slice(-MAX_USED) });
    const isToStranger = payload.from !== contact;
    await outbox.refuse(machine, payload.connectoid, hash, { isToStranger });
  }
  return machine.record.state;
}

// -- The opener: what comes of the hello -------------------------------------------------

/**
 * Take the welcome that the link vouches for, and answer it with ready.
 * @param {Machine} machine
 * @param {Received} received
 */
async function takeWelcome(machine, { message }) {
  const { from, r, connectoid } = message.payload;
  const { invitation, hello, helloHash } = machine.record;
  checkApp(machine, message);
  // What the hello said counts, also if the app was updated since.
  const { payload: said } = await readJws(hello);
  const protocol = agree(machine, spokenBy(said), message);
  machine.tell("paired");
  machine.keep({
    protocol,
    contact: from,
    contactAddress: connectoid,
    welcomeHash: message.hash,
    comparison: await comparisonString(invitation, hello, from, r),
    invitation: "",
    hello: "",
  });
  const { state, offer } = machine.attempt;
  const isAwaited = state === "waiting" && offer === helloHash;
  if (message.sdp && isAwaited) {
    await connecting.turn(machine, "answer", message);
    await outbox.sendReady(machine, null);
  } else {
    // A ready goes out with a new offer, once that is gathered.
    await connecting.turn(machine, "welcome", message);
  }
  return "ready";
}

/**
 * End: the link was used by somebody else, or withdrawn.
 * @param {Machine} machine
 */
function takeUsed(machine) {
  return end(machine, "used");
}

/**
 * Tell an inviter whose welcome comes when the user has thought better of it.
 * @param {Machine} machine
 * @param {Received} received
 */
function takeLateWelcome(machine, received) {
  const { from, connectoid } = received.message.payload;
  machine.keep({ contact: from, contactAddress: connectoid });
  return repeatUnshare(machine, received);
}

// -- Both: numbered messages, and the channel --------------------------------------------

/**
 * Be sure that the other has what it needs to know.
 * @param {Machine} machine
 */
function confirm(machine) {
  if (machine.record.role === "opener") {
    machine.keep({ expiresUs: NEVER_US });
    return "paired";
  }
  machine.tell("paired");
  if (!machine.privacy.askFirst) machine.wanted = true;
  if (machine.attempt.state === "joining") machine.lateIn(AGAIN_AFTER_ANSWER_S);
  return "paired";
}

/** Go on: what a message asks for is up to CONNECTING. */
function takeMessage() {
  return "paired";
}

/**
 * End: the other has ended the sharing, and repeats that until it hears this answer.
 * @param {Machine} machine
 * @param {Received} received
 */
async function takeUnshare(machine, { message }) {
  // Nothing that comes later is read, so the answer announces no new address.
  machine.keep({ relays: [] });
  await outbox.sendUnshare(machine, message.hash);
  return end(machine, "unshared");
}

// -- Leaving: a tombstone ----------------------------------------------------------------

/**
 * Tell the other, and leave a tombstone: keys, and where to tell it until it answers.
 * @param {Machine} machine
 */
async function leave(machine) {
  const { state, contactAddress, helloHash } = machine.record;
  // Whoever leaves wants the other to hear of it, wherever that is now.
  outbox.meet(machine, contactAddress);
  if (state === "welcomed") {
    // `used` is all that an opener can check so far.
    await outbox.sendUsed(machine, contactAddress, helloHash, { isToStranger: false });
  } else if (state === "ready" || state === "paired" || helloHash) {
    await outbox.sendUnshare(machine, null);
  }
  machine.nextWordS = machine.now.monotonicS + AGAIN_IDLE_S;
  machine.keep({
    name: "",
    relays: [],
    hello: "",
    welcome: "",
    comparison: [],
    verified: false,
    differs: false,
    keyNews: "",
    expiresUs: machine.now.wallUs + TOMBSTONE_US,
  });
  return "unshared";
}

/**
 * Tell the former contact, who has not heard it yet.
 * @param {Machine} machine
 * @param {Received} received
 */
async function repeatUnshare(machine, { message }) {
  if (machine.mayRepeat("unshare")) await outbox.sendUnshare(machine, message.hash);
  return "unshared";
}

/**
 * Forget the tombstone. It says nothing: its answer would be answered in turn.
 * @param {Machine} machine
 */
function vanish(machine) {
  machine.gone = true;
  machine.do({ do: "forget" });
  return "ended";
}

/**
 * Keep nothing but the name, the reason, and which link it was.
 * @param {Machine} machine
 * @param {string} why
 */
async function end(machine, why) {
  await connecting.turn(machine, "stop");
  const { role, state, name, linkHash, namedRelays } = machine.record;
  machine.record = {
    ...BLANK, role, state, name, linkHash, why, expiresUs: NEVER_US,
    // A last word may have to go to one in a private network.
    namedRelays,
  };
  machine.tell(why);
  return "ended";
}

// -- Expiring ----------------------------------------------------------------------------

/**
 * End what is over by a wall clock that can be believed.
 * @param {Machine} machine
 */
export async function checkExpiry(machine) {
  const { wallUs } = machine.now;
  if (machine.record.expiresUs < RELEASE_US && RELEASE_US <= wallUs) {
    // It was reckoned by a clock that was not set.
    machine.keep({ expiresUs: wallUs + INVITATION_US });
  }
  const isOver = machine.record.expiresUs <= wallUs && wallUs < MAX_SEQ / 2;
  if (!isOver) return;
  if (isPossible(machine, "expire")) {
    await pair(machine, "expire");
  } else {
    // The invitation ends; the contact stays.
    leaveInvitation(machine);
  }
}

/**
 * End: nobody has answered.
 * @param {Machine} machine
 */
function expireUnanswered(machine) {
  return end(machine, "expired");
}

/**
 * End, and tell the other, who may know this one as paired.
 * @param {Machine} machine
 */
async function expireUnconfirmed(machine) {
  await connecting.turn(machine, "stop");
  machine.tell("expired");
  return leave(machine);
}

// -- The table ---------------------------------------------------------------------------

/**
 * `message` is any numbered message but `unshare`. `leave` is the user's wish to end, `expire` the
 * 30 days, `proven` a channel whose other end has shown whose it is.
 */
export const PAIRING = makeTable(
  ["invited", "hello", takeHello, "welcomed"],
  ["welcomed paired", "hello", takeHelloAgain, "="],
  ["welcomed", "message", confirm, "paired"],
  ["opened", "welcome", takeWelcome, "ready"],
  ["opened", "used", takeUsed, "ended"],
  ["ready", "message", confirm, "paired"],
  ["welcomed ready", "proven", confirm, "paired"],
  ["paired", "message", takeMessage, "paired"],
  ["invited welcomed opened ready paired", "leave", leave, "unshared"],
  ["welcomed ready paired", "unshare", takeUnshare, "ended"],
  ["invited opened", "expire", expireUnanswered, "ended"],
  ["welcomed ready", "expire", expireUnconfirmed, "unshared"],
  ["unshared", "hello", refuseHello, "unshared"],
  ["unshared", "welcome", takeLateWelcome, "unshared"],
  ["unshared", "message", repeatUnshare, "unshared"],
  ["unshared", "unshare", vanish, "ended"],
  ["unshared", "expire", vanish, "ended"],
);
