// @ts-check
/**
 * Connecting: attempts, offers and answers, and the proof on the channel.
 *
 * The opener makes all offers; the inviter calls for one. A fresh offer is answered, and a stale
 * one is called for anew. CONNECTING is at the end. PROTOCOL.md, "Connecting" and "Channel".
 * @module
 */

import { NOTHING, concat, decodeBase64url, isSame } from "../encoding.js";
import { Refused } from "../errors.js";
import {
  AGAIN_AFTER_ANSWER_S, AGAIN_AFTER_OFFER_S, AGAIN_IDLE_S, AGAIN_UNREACHABLE_S, CHALLENGE_BYTES,
  GATHERED_S, MAX_UNREACHABLE, NEW_OFFER_S,
} from "../limits.js";
import { parseAddress } from "../links.js";
import { CONTEXTS } from "../suite.js";
import { APART, canConnect } from "./machine.js";
import * as outbox from "./outbox.js";
import { KNOWN, addressesOf } from "./record.js";
import * as renewal from "./renewal.js";
import { RESTLESS, makeTable } from "./rules.js";

/** @import { Bytes } from "../encoding.js" */
/** @import { Message, Sdp } from "../messages.js" */
/** @import { Machine } from "./machine.js" */

/**
 * Let an event change the attempt. An event without a rule is ignored.
 * @param {Machine} machine
 * @param {string} event
 * @param {...unknown} brought
 */
export async function turn(machine, event, ...brought) {
  const rule = CONNECTING.get(`${machine.attempt.state} ${event}`);
  if (!rule) return;
  const state = await machine.follow(rule, ...brought);
  if (state !== machine.attempt.state) {
    machine.setAttempt({ state, sinceS: machine.now.monotonicS });
  }
  if (!RESTLESS.includes(state)) machine.setAttempt({ lateS: Infinity });
}

/**
 * Do what the newest message of the round asks for. Nothing older counts.
 * @param {Machine} machine
 */
export async function actOnNewest(machine) {
  const received = machine.round;
  machine.round = [];
  if (machine.record.state !== "paired") return;
  for (const { message, fresh } of received.reverse()) {
    const { type, payload } = message;
    if (machine.mustAsk && ["offer", "ready", "call"].includes(type)) {
      await ask(machine, message);
      return;
    }
    if (type === "offer" || type === "ready") {
      await actOnOffer(machine, message, fresh);
      return;
    }
    // An answer counts only if it is one to the offer that is out.
    if (type === "call" || payload.re === machine.attempt.offer) {
      await turn(machine, type, message);
      return;
    }
  }
}

/**
 * Take an offer, or a ready that may have none.
 * @param {Machine} machine
 * @param {Message} message
 * @param {boolean} fresh
 */
async function actOnOffer(machine, message, fresh) {
  const isBusy = ["joining", "proving", "connected"].includes(machine.attempt.state);
  if (message.sdp && fresh) {
    await turn(machine, "offer", message);
  } else if (message.sdp || !isBusy) {
    await turn(machine, "stale", message);
  }
}

/**
 * Tell the app that the contact wants to connect, and the contact no address.
 *
 * A ready gets a call all the same, which tells the opener that it is known.
 * @param {Machine} machine
 * @param {Message} message
 */
async function ask(machine, { type, hash }) {
  machine.asked = hash;
  if (type === "ready" && machine.mayRepeat("call")) await outbox.sendCall(machine, null);
  machine.tellWish();
}

// -- Beginning ---------------------------------------------------------------------------

/**
 * Begin an attempt: the inviter calls, the opener offers, and in `opened` the hello offers.
 * @param {Machine} machine
 */
async function begin(machine) {
  if (!canConnect(machine.record)) return "apart";
  machine.nextBeginS = machine.now.monotonicS + AGAIN_IDLE_S;
  const cause = machine.asked;
  machine.asked = null;
  if (machine.record.role === "inviter") return call(machine, cause);
  if (!machine.record.hello) return gatherOffer(machine, cause);
  await outbox.repeatHello(machine);
  noteOut(machine, machine.record.helloHash);
  machine.lateIn(AGAIN_AFTER_OFFER_S);
  return "waiting";
}

/**
 * Give up what was begun, and begin without long pauses for a while.
 * @param {Machine} machine
 */
export async function beginAnew(machine) {
  machine.beActive();
  // The same bytes of a hello are repeated, and the answer is for what made them.
  const { state, hello } = machine.record;
  if (state !== "opened" || !hello) await turn(machine, "stop");
  await turn(machine, "begin");
}

/**
 * Call for an offer, and give up the former connection.
 * @param {Machine} machine
 * @param {string | null} cause
 */
async function call(machine, cause) {
  leaveConnection(machine);
  close(machine);
  noteOut(machine, await outbox.sendCall(machine, cause));
  machine.lateIn(AGAIN_AFTER_OFFER_S);
  return "waiting";
}

/**
 * Let WebRTC make an offer, or the answer to one, for a new attempt.
 * @param {Machine} machine
 * @param {Sdp | null} offer
 * @param {string | null} cause
 */
function gather(machine, offer, cause) {
  leaveConnection(machine);
  const attemptId = machine.attempt.attemptId + 1;
  const sinceS = machine.now.monotonicS;
  machine.attempt = { ...APART, state: "gathering", sinceS, attemptId, cause };
  machine.lateIn(GATHERED_S);
  machine.do({ do: "gather", attemptId, offer });
  return "gathering";
}

/**
 * Let WebRTC make an offer, because of a message or of oneself.
 * @param {Machine} machine
 * @param {string | null} cause
 */
function gatherOffer(machine, cause) {
  return gather(machine, null, cause);
}

// -- Messages that are taken -------------------------------------------------------------

/**
 * Answer a fresh offer.
 * @param {Machine} machine
 * @param {Message} message
 */
function takeOffer(machine, { sdp, hash }) {
  return gather(machine, sdp, hash);
}

/**
 * Call for an offer in place of one whose sender may have given up.
 * @param {Machine} machine
 * @param {Message} message
 */
function takeStaleOffer(machine, { hash }) {
  return call(machine, hash);
}

/**
 * Make an offer, as the inviter has called for it.
 * @param {Machine} machine
 * @param {Message} message
 */
function takeCall(machine, { hash }) {
  const { state, sinceS } = machine.attempt;
  const ageS = machine.now.monotonicS - sinceS;
  // The inviter's time for the attempt begins a little earlier than the opener's.
  if (state === "joining" && ageS > AGAIN_AFTER_ANSWER_S / 2) noteFailure(machine);
  return gatherOffer(machine, hash);
}

/**
 * Make a new offer, unless the call has only crossed one that is out, without an answer yet.
 * @param {Machine} machine
 * @param {Message} message
 */
function takeCallUnlessCrossed(machine, message) {
  const { state, sinceS, offer, answer } = machine.attempt;
  const isOut = offer !== "" && answer === "";
  const isNew = machine.now.monotonicS - sinceS < NEW_OFFER_S;
  if (isOut && isNew && message.payload.re !== offer) return state;
  return takeCall(machine, message);
}

/**
 * Make a new offer, as the one in the hello was stale.
 * @param {Machine} machine
 * @param {Message} message
 */
function takeWelcomeWithoutAnswer(machine, { hash }) {
  return gatherOffer(machine, hash);
}

/**
 * Give the answer to the peer connection that made the offer.
 * @param {Machine} machine
 * @param {Message} message
 */
function takeAnswer(machine, { sdp, hash }) {
  machine.setAttempt({ answer: hash, isTaken: true });
  const answer = /** @type {Sdp} */ (sdp);
  machine.do({ do: "join", attemptId: machine.attempt.attemptId, answer });
  machine.lateIn(AGAIN_AFTER_ANSWER_S);
  return "joining";
}

// -- What WebRTC has gathered ------------------------------------------------------------

/**
 * Send what was gathered in the message that this state asks for; without it wait.
 * @param {Machine} machine
 * @param {Sdp | null} [sdp]
 */
async function takeGathered(machine, sdp = null) {
  machine.lateIn(AGAIN_AFTER_OFFER_S);
  if (machine.record.state === "welcomed") return welcome(machine, sdp);
  if (!sdp) return "waiting";
  if (machine.record.role === "inviter") return answer(machine, sdp);
  machine.setAttempt({ offer: await offer(machine, sdp) });
  noteOut(machine, machine.attempt.offer);
  return "waiting";
}

/**
 * @param {Machine} machine
 * @param {Sdp | null} sdp
 */
async function welcome(machine, sdp) {
  await outbox.sendWelcome(machine, sdp);
  noteOut(machine, machine.record.welcomeHash);
  return sdp ? "joining" : "apart";
}

/**
 * @param {Machine} machine
 * @param {Sdp} sdp
 */
async function answer(machine, sdp) {
  const { cause } = machine.attempt;
  const hash = await outbox.sendAnswer(machine, cause, sdp);
  machine.setAttempt({ offer: cause ?? "", answer: hash });
  noteOut(machine, hash);
  machine.lateIn(AGAIN_AFTER_ANSWER_S);
  return "joining";
}

/**
 * Send an offer in the message that the pairing has for it; return the message's hash.
 * @param {Machine} machine
 * @param {Sdp} sdp
 */
function offer(machine, sdp) {
  if (machine.record.state === "ready") return outbox.sendReady(machine, sdp);
  if (machine.record.state === "paired") {
    return outbox.sendOffer(machine, machine.attempt.cause, sdp);
  }
  return outbox.sendHello(machine, sdp);
}

/**
 * Note that a message is out. A hello that is sent again may be at the relay already.
 * @param {Machine} machine
 * @param {string} hash
 */
function noteOut(machine, hash) {
  const { out, isTaken } = machine.attempt;
  machine.setAttempt({ out: hash, isTaken: isTaken && out === hash });
}

/**
 * Note that a relay has taken a message.
 * @param {Machine} machine
 * @param {string} hash
 */
export function takeReceipt(machine, hash) {
  if (hash && hash === machine.attempt.out) machine.setAttempt({ isTaken: true });
}

// -- The channel: each end shows whose it is ---------------------------------------------

/**
 * Seal a challenge to the contact: only the owner of its mailbox key can send it back.
 * @param {Machine} machine
 */
async function sendChallenge(machine) {
  const challenge = machine.suite.random(CHALLENGE_BYTES);
  machine.setAttempt({ challenge, isTaken: true });
  machine.lateIn(AGAIN_AFTER_ANSWER_S);
  const [{ pub }] = parseAddress(machine.record.contactAddress, KNOWN);
  write(machine, await machine.suite.seal(pub, channelInfo(machine), challenge));
  return "proving";
}

/**
 * Take the other's challenge first, then one's own back.
 * @param {Machine} machine
 * @param {Bytes} octets
 */
function takeOctets(machine, octets) {
  if (machine.attempt.replied) return takeReply(machine, octets);
  return takeChallenge(machine, octets);
}

/**
 * Open the other's challenge and send it back.
 * @param {Machine} machine
 * @param {Bytes} sealed
 */
async function takeChallenge(machine, sealed) {
  const challenge = await openChallenge(machine, sealed);
  const isOwn = isSame(challenge, machine.attempt.challenge);
  if (challenge.length !== CHALLENGE_BYTES || isOwn) return refuseChannel(machine);
  machine.setAttempt({ replied: true });
  write(machine, challenge);
  return "proving";
}

/**
 * Be connected if the other could open the challenge.
 * @param {Machine} machine
 * @param {Bytes} octets
 */
function takeReply(machine, octets) {
  if (!isSame(octets, machine.attempt.challenge)) return refuseChannel(machine);
  renewal.complete(machine, [machine.attempt.offer, machine.attempt.answer]);
  machine.tell("connected");
  machine.failed = 0;
  return "connected";
}

/**
 * Close a channel whose other end is not the contact's; the next attempt waits for `late`.
 * @param {Machine} machine
 */
function refuseChannel(machine) {
  machine.drop("channel");
  close(machine);
  return "waiting";
}

/**
 * Return a challenge that is sealed to any address that is polled; otherwise nothing.
 * @param {Machine} machine
 * @param {Bytes} sealed
 */
async function openChallenge(machine, sealed) {
  const info = channelInfo(machine);
  for (const { keys } of addressesOf(machine.record)) {
    try {
      return await machine.suite.open(keys[0], info, sealed);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
    }
  }
  return NOTHING;
}

/**
 * Return what binds a challenge to this offer and this answer.
 * @param {Machine} machine
 */
function channelInfo({ attempt }) {
  const separator = Uint8Array.of(0);
  const offered = decodeBase64url(attempt.offer);
  return concat(CONTEXTS.channel, separator, offered, decodeBase64url(attempt.answer));
}

/**
 * Write on the channel of the attempt.
 * @param {Machine} machine
 * @param {Bytes} octets
 */
function write(machine, octets) {
  machine.do({ do: "write", attemptId: machine.attempt.attemptId, octets });
}

// -- Failing and ending ------------------------------------------------------------------

/**
 * Try once more while there is hope; then seldom.
 * @param {Machine} machine
 */
function tryAgain(machine) {
  if (machine.record.state === "welcomed" && machine.isActive) {
    // Only the opener may try again.
    machine.setAttempt({ lateS: machine.activeUntilS });
    return machine.attempt.state;
  }
  if (machine.attempt.out && !machine.attempt.isTaken) return tryUnsent(machine);
  const isAnswered = machine.attempt.state !== "waiting";
  let goesOn = machine.isActive;
  if (isAnswered) {
    noteFailure(machine);
    goesOn &&= machine.failed < MAX_UNREACHABLE;
  }
  if (goesOn) return begin(machine);
  if (isAnswered) {
    // The first one is told already.
    if (machine.failed > 1) machine.tell("unreachable");
    machine.nextBeginS = machine.now.monotonicS + AGAIN_UNREACHABLE_S;
  } else {
    machine.tell("unanswered");
  }
  close(machine);
  return "apart";
}

/**
 * Try once more what no relay has taken: nobody can have answered it, or failed to connect.
 * @param {Machine} machine
 */
function tryUnsent(machine) {
  if (!machine.isActive) {
    machine.tell("unsent");
    close(machine);
    return "apart";
  }
  if (!machine.toldUnsent) machine.tell("unsent");
  machine.toldUnsent = true;
  return begin(machine);
}

/**
 * Count an attempt without a channel, and tell the user after the first what would help.
 * @param {Machine} machine
 */
function noteFailure(machine) {
  machine.failed += 1;
  if (machine.failed === 1) machine.tell("unreachable");
}

/** Leave a lost channel to `late`, which tries again. */
function waitForLate() {
  return "waiting";
}

/**
 * Tell the app that the connection is lost; it may want another.
 * @param {Machine} machine
 */
function lose(machine) {
  machine.wanted = false;
  machine.tell("disconnected");
  return "apart";
}

/**
 * Close what there is.
 * @param {Machine} machine
 */
function stop(machine) {
  if (machine.attempt.state !== "apart") close(machine);
  return "apart";
}

/**
 * End what may lead to a copy of the contact's device: a connection, an attempt, a request.
 * @param {Machine} machine
 */
export async function breakOff(machine) {
  machine.round = [];
  machine.asked = null;
  leaveConnection(machine);
  if (machine.attempt.state === "connected") machine.wanted = false;
  machine.nextBeginS = -Infinity;
  await turn(machine, "stop");
}

/**
 * Tell the app that its connection is given up for another.
 * @param {Machine} machine
 */
function leaveConnection(machine) {
  if (machine.attempt.state === "connected") machine.tell("disconnected");
}

/**
 * Close the peer connection: an answer to its offer is none any more.
 * @param {Machine} machine
 */
function close(machine) {
  machine.do({ do: "close", attemptId: machine.attempt.attemptId });
  machine.setAttempt({ offer: "" });
}

// -- The table ---------------------------------------------------------------------------

const ALL = "apart gathering waiting joining proving connected";

/**
 * `late` is a state that has lasted too long; `stale` is an offer that is not fresh. `gathered`,
 * `channel`, `octets` and `closed` are what WebRTC says.
 */
export const CONNECTING = makeTable(
  ["apart", "begin", begin, "gathering waiting apart"],
  [ALL, "offer", takeOffer, "gathering"],
  [ALL, "stale", takeStaleOffer, "waiting"],
  ["apart joining proving connected", "call", takeCall, "gathering"],
  ["waiting", "call", takeCallUnlessCrossed, "gathering ="],
  ["apart waiting", "welcome", takeWelcomeWithoutAnswer, "gathering"],
  ["gathering", "gathered", takeGathered, "waiting joining apart"],
  ["gathering", "late", takeGathered, "waiting apart"],
  ["waiting joining proving", "late", tryAgain, "gathering waiting = apart"],
  ["waiting", "answer", takeAnswer, "joining"],
  ["joining", "channel", sendChallenge, "proving"],
  ["proving", "octets", takeOctets, "proving connected waiting"],
  ["proving", "closed", waitForLate, "waiting"],
  ["connected", "closed", lose, "apart"],
  [ALL, "stop", stop, "apart"],
);
