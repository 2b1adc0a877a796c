// @ts-check
/**
 * All that a contact knows while it runs, and the few ways in which it changes.
 *
 * The functions of this folder take a Machine first. They add to `effects` what they want done in
 * the world, and they `keep` what has to last. What is here knows no message and no rule.
 * @module
 */

import { Burst } from "../burst.js";
import { NOTHING } from "../encoding.js";
import {
  ACTIVE_S, BURST_PER_S, MAX_BURST_MESSAGES, MAX_NEWLY_TOLD, MAX_RENEWAL_ANSWERS,
  POLL_FAST_FOR_S, REPEAT_S, TELL_EVERY_S, ZERO_EVERY_S,
} from "../limits.js";
import { REPEATABLE } from "./effects.js";
import { addressesOf, mailboxesOf } from "./record.js";
import { LASTING } from "./rules.js";

/** @import { Bytes } from "../encoding.js" */
/** @import { Allowed, Relay } from "../links.js" */
/** @import { Message } from "../messages.js" */
/** @import { Key, Suite } from "../suite.js" */
/** @import { Effect, Now, Privacy } from "./effects.js" */
/** @import { ContactRecord, OwnAddress } from "./record.js" */
/** @import { Rule } from "./rules.js" */

/**
 * One attempt to connect, for one peer connection.
 * @typedef {object} Attempt
 * @property {string} state a ConnectingState
 * @property {number} sinceS
 * @property {number} lateS when the state has lasted too long
 * @property {number} attemptId
 * @property {string | null} cause the hash of the message that is being answered
 * @property {string} offer the hash of the message with the offer
 * @property {string} answer the hash of the message with the answer
 * @property {string} out the hash of the message that is out, with an offer, an answer or a call
 * @property {boolean} isTaken whether a relay has taken it
 * @property {Bytes} challenge one's own
 * @property {boolean} replied the other's challenge was answered
 *
 * A message as it was found, where, the key that opens it, and whether it is fresh.
 * @typedef {{data: string, own: OwnAddress, key: Key, fresh: boolean}} Unread
 *
 * A message, the address that it came to, and whether that was since the check before.
 * @typedef {{message: Message, own: OwnAddress, fresh: boolean}} Received
 */

/** No attempt. @type {Attempt} */
export const APART = {
  state: "apart",
  sinceS: -Infinity,
  lateS: Infinity,
  attemptId: 0,
  cause: null,
  offer: "",
  answer: "",
  out: "",
  isTaken: false,
  challenge: NOTHING,
  replied: false,
};

/** What is known of one mailbox at its relay, since the page was loaded. */
export class Box {
  constructor() {
    // The cursor: the largest that was read. Before the first check it is -1.
    this.at = -1;
    // When it was last read to its end, and when so from 0.
    this.readS = -Infinity;
    this.fromZeroS = -Infinity;
    // The check under way is from 0.
    this.asksZero = false;
    // The messages in it, as far as is known.
    this.held = 0;
    // The messages that it has brought lately.
    this.burst = new Burst(BURST_PER_S);
    // It has brought too many, and is not checked before then.
    this.restsUntilS = -Infinity;
  }

  /**
   * Say whether the next check has to be from 0: the first, and then one an hour.
   * @param {number} nowS
   */
  isDueFromZero(nowS) {
    return this.at < 0 || nowS - this.fromZeroS >= ZERO_EVERY_S;
  }

  /**
   * Note what a check has found, to the end of the mailbox.
   * @param {number} nowS
   * @param {number[]} ats
   */
  noteRead(nowS, ats) {
    if (this.asksZero || this.at < 0) {
      this.asksZero = false;
      this.fromZeroS = nowS;
      this.held = 0;
    }
    this.held += ats.length;
    this._noteBurst(nowS, ats.length);
    this.readS = nowS;
    this.at = Math.max(0, this.at, ...ats);
  }

  /**
   * Let a mailbox rest that brings more than a contact sends.
   *
   * Whether they are good is not asked. Each costs a decryption, and whoever may write to a
   * mailbox, or runs its relay, could choose messages that count as good.
   * @param {number} nowS
   * @param {number} messages
   */
  _noteBurst(nowS, messages) {
    this.burst.note(messages, nowS);
    const lately = this.burst.left(nowS);
    if (lately > MAX_BURST_MESSAGES) this.restsUntilS = nowS + lately / BURST_PER_S;
  }

  /**
   * Say whether it is not to be checked yet.
   * @param {number} nowS
   */
  rests(nowS) {
    return nowS < this.restsUntilS;
  }
}

/** The state of one contact: what lasts is in `record`, the attempt to connect in `attempt`. */
export class Machine {
  /**
   * @param {Suite} suite
   * @param {ContactRecord} record
   * @param {Allowed} allowed
   */
  constructor(suite, record, allowed) {
    this.suite = suite;
    this.allowed = allowed;
    this.record = record;
    this.attempt = APART;

    // Of the step under way.
    /** @type {Now} */
    this.now = { wallUs: 0, monotonicS: 0 };
    /** @type {Effect[]} */
    this.effects = [];

    // The record was forgotten: nothing is saved any more.
    this.gone = false;

    // What the app wants of all connections, and the last offer or call that waits for its wish.
    /** @type {Privacy} */
    this.privacy = {};
    // Returns relays as a new address may show them: an API key may have got two halves.
    this.asShown = (/** @type {Relay[]} */ relays) => relays;
    /** @type {string | null} */
    this.asked = null;

    // What the app wants, and until when it is likely to come about.
    this.wanted = false;
    this.activeUntilS = -Infinity;
    this.fastUntilS = -Infinity;
    this.nextBeginS = -Infinity;

    // When the next `moved` or `unshare` may go out that nobody has asked for.
    this.nextWordS = -Infinity;

    // Attempts in a row in which both answered and no channel came.
    this.failed = 0;

    // The app was told that no relay takes what is out, since it wanted to connect.
    this.toldUnsent = false;

    // When a type was last sent as a reply that may be asked for often.
    /** @type {Map<string, number>} */
    this.repeatedS = new Map();

    // When the events of REPEATABLE were told last.
    /** @type {Map<string, number>} */
    this.toldS = new Map();

    // The answers to `renew` that went out lately.
    this.renewalAnswers = new Burst(1 / REPEAT_S);

    // When keys were told for the first time that the link is used, the newest last.
    /** @type {number[]} */
    this.newlyToldS = [];

    // By the mailbox's key.
    /** @type {Map<string, Box>} */
    this.boxes = new Map();

    // Digests of what was read already, the oldest first.
    /** @type {Set<string>} */
    this.seen = new Set();

    // What is not read yet of a round, and what is read and waits to be taken.
    /** @type {Unread[]} */
    this.unread = [];
    /** @type {Received[]} */
    this.untaken = [];

    // A `renew` of the round that has passed its checks. It counts if no other has another key.
    /** @type {Received | null} */
    this.vouched = null;

    // The numbered messages of a round: its newest may ask for a connection.
    /** @type {Received[]} */
    this.round = [];

    // Refused messages by reason.
    /** @type {Record<string, number>} */
    this.dropped = {};

    // The step before, for steps run one after the other.
    /** @type {Promise<unknown>} */
    this._last = Promise.resolve();
  }

  /**
   * Run a step after the one before; return its effects, Save first if the record changed.
   *
   * After an error record and attempt are what they were, and nothing is to be done.
   * @param {Now} now
   * @param {() => Promise<void>} work
   * @returns {Promise<Effect[]>}
   */
  step(now, work) {
    const run = this._last.then(() => this._step(now, work));
    this._last = run.catch(() => {});
    return run;
  }

  /**
   * @param {Now} now
   * @param {() => Promise<void>} work
   */
  async _step(now, work) {
    const { record, attempt } = this;
    this.now = now;
    this.effects = [];
    try {
      await work();
    } catch (error) {
      this.record = record;
      this.attempt = attempt;
      throw error;
    }
    if (this.record !== record && !this.gone) {
      this.effects.unshift({ do: "save", record: this.record });
    }
    return this.effects;
  }

  /**
   * Do what a rule says with what its event brings; return the state that follows.
   * @param {Rule} rule
   * @param {...unknown} brought
   */
  async follow(rule, ...brought) {
    const state = await rule.does(this, ...brought);
    if (!rule.then.includes(state)) {
      throw new Error(`${rule.state} on ${rule.event} cannot lead to ${state}`);
    }
    return state;
  }

  // -- What changes ------------------------------------------------------------------------

  /**
   * Change the record; the step will begin with a Save.
   * @param {Partial<ContactRecord>} changes
   */
  keep(changes) {
    const { record } = this;
    const names = /** @type {(keyof ContactRecord)[]} */ (Object.keys(changes));
    const isChanged = names.some((name) => changes[name] !== record[name]);
    if (isChanged) this.record = { ...record, ...changes };
  }

  /**
   * Change the attempt.
   * @param {Partial<Attempt>} changes
   */
  setAttempt(changes) {
    this.attempt = { ...this.attempt, ...changes };
  }

  /**
   * Let the state of the attempt last so long at most.
   * @param {number} seconds
   */
  lateIn(seconds) {
    this.setAttempt({ lateS: this.now.monotonicS + seconds });
  }

  /** @param {Effect} effect */
  do(effect) {
    this.effects.push(effect);
  }

  /**
   * Tell the app a key of EVENTS. What others can repeat at will is told seldom.
   * @param {string} event
   */
  tell(event) {
    if (!REPEATABLE.includes(event) || this.mayTell(event)) this.do({ do: "tell", event });
  }

  /**
   * Count a refused message.
   * @param {string} reason
   */
  drop(reason) {
    this.dropped[reason] = (this.dropped[reason] ?? 0) + 1;
  }

  /** Check often for a while: something was sent or came. */
  pollFast() {
    this.fastUntilS = this.now.monotonicS + POLL_FAST_FOR_S;
  }

  /** Try to connect without long pauses for a while. */
  beActive() {
    this.activeUntilS = this.now.monotonicS + ACTIVE_S;
  }

  /**
   * Say whether a reply of this type may go out again; if so it counts as sent.
   * @param {string} kind
   */
  mayRepeat(kind) {
    const lastS = this.repeatedS.get(kind) ?? -Infinity;
    if (this.now.monotonicS - lastS < REPEAT_S) return false;
    this.repeatedS.set(kind, this.now.monotonicS);
    return true;
  }

  /**
   * Say whether an event may be told again now; if so it counts as told.
   * @param {string} event
   */
  mayTell(event) {
    const lastS = this.toldS.get(event) ?? -Infinity;
    if (this.now.monotonicS - lastS < TELL_EVERY_S) return false;
    this.toldS.set(event, this.now.monotonicS);
    return true;
  }

  /** Say whether one more answer to a `renew` may go out now; if so it counts. */
  mayAnswerRenewal() {
    const { monotonicS } = this.now;
    if (this.renewalAnswers.left(monotonicS) > MAX_RENEWAL_ANSWERS - 1) return false;
    this.renewalAnswers.note(1, monotonicS);
    return true;
  }

  /** Say whether another key may be told now that the link is used; if so it counts. */
  mayTellAnother() {
    const { monotonicS } = this.now;
    const told = this.newlyToldS.filter((toldS) => monotonicS - toldS < REPEAT_S);
    if (told.length >= MAX_NEWLY_TOLD) return false;
    this.newlyToldS = [...told, monotonicS];
    return true;
  }

  /** Tell the app once a minute that the contact waits for it, unless that is at its end. */
  tellWish() {
    if (this.record.relays.length && this.mayRepeat("wants_to_connect")) {
      this.tell("wants_to_connect");
    }
  }

  // -- What follows of it ------------------------------------------------------------------

  /**
   * Return what is known of a mailbox, by its key.
   * @param {string} pub
   */
  box(pub) {
    const box = this.boxes.get(pub) ?? new Box();
    this.boxes.set(pub, box);
    return box;
  }

  /** Whether something of a round is not taken yet. */
  get isBehind() {
    return this.unread.length > 0 || this.untaken.length > 0;
  }

  /** Whether attempts follow each other without long pauses. */
  get isActive() {
    return this.now.monotonicS < this.activeUntilS;
  }

  /** Whether the contact still has to hear of a new signing key. */
  get isRenewing() {
    return this.record.oldSigner !== "" && this.record.state === "paired";
  }

  /** Whether the contact, if it is known, still has to hear that the sharing has ended. */
  get isLeaving() {
    return this.record.state === "unshared" && this.record.contact !== "";
  }

  /** Whether the contact has to hear of what it cannot know but from this side. */
  get hasNews() {
    return this.isRenewing || this.isLeaving;
  }

  /** Whether the app has to want a connection before the contact is answered. */
  get mustAsk() {
    return Boolean(this.privacy.askFirst) && !this.wanted;
  }

  /** The relays that know this device: one's own for this contact, and those met. */
  get knownRelays() {
    const own = addressesOf(this.record).flatMap(mailboxesOf).map(({ url }) => url);
    return [...own, ...this.record.met];
  }

  /**
   * Say whether a message may go to a relay, which learns where this device is.
   *
   * Where the app asks first, a relay that is newly named gets only what the contact has to hear.
   * A wish to connect with the contact is none to write to strangers.
   * @param {string} url
   * @param {{isToStranger: boolean}} whom
   */
  mayWrite(url, { isToStranger }) {
    const mustAsk = isToStranger ? this.privacy.askFirst : this.mustAsk && !this.hasNews;
    return !mustAsk || this.knownRelays.includes(url);
  }

  /** Whether an attempt is to begin, as soon as it may. */
  get wantsAttempt() {
    return this.lacksConnection && this.attempt.state === "apart";
  }

  /** Whether a connection is wanted and may be made, and there is none. */
  get lacksConnection() {
    const isWanted = this.wanted || LASTING.includes(this.record.state);
    return isWanted && canConnect(this.record) && this.attempt.state !== "connected";
  }
}

/**
 * Say whether one may try to connect in this state of the pairing.
 * @param {ContactRecord} record
 */
export function canConnect({ state }) {
  return state === "paired" || LASTING.includes(state);
}
