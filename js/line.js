// @ts-check
/**
 * A line: what polls one relay, for all contacts who have mailboxes there.
 *
 *     learn -> check (waits at the relay, unless woken) -> read the mailboxes -> rest -> check
 *
 * A relay that has failed is asked without waiting, so that it is known at once when it is back.
 *
 * A line begins with the first mailbox at a relay and is ended with the last, so there are only
 * lines to relays that the user has named, here or by opening a link.
 * @module
 */

import { Burst } from "./burst.js";
import { hasStun } from "./ice.js";
import {
  GATHERED_S, MAX_RELAY_MESSAGES, POLL_SLOW_S, RELAY_MESSAGES_PER_S,
} from "./limits.js";
import { ConnectoidError, RelayRefusalError, UnreachableError } from "./errors.js";
import { CHECK_EVERY_S, pauseAfterS } from "./pauses.js";
import {
  Budget, MAX_BATCH_CHECKS, checkMailboxes, readMailbox, retryS,
} from "./relay_client.js";
import { Loans, lendsTurn } from "./turn.js";

/** @import { Complaints } from "./complaints.js" */
/** @import { Poll } from "./contact/effects.js" */
/** @import { Found } from "./contact/inbox.js" */
/** @import { ContactRecord } from "./contact/record.js" */
/** @import { Page } from "./page.js" */
/** @import { Checked, RelayClient } from "./relay_client.js" */
/** @import { Roster } from "./roster.js" */
/** @import { System } from "./system.js" */

// Of a long poll: what a relay takes at most.
const WAIT_S = 60;
// Relays that are asked at a time. Each takes a connection, and a browser has 256 of them. Where
// there are more, whoever has the last place asks without waiting, and the others take turns.
export const MAX_LINES = 128;
// How long an offer waits to hear which servers all relays have, once one has answered.
const LEARN_S = 1;
// How long it waits for TURN servers to be lent: two requests.
const LEND_S = 3;

/**
 * The part of the runner that a line needs.
 * @typedef {object} Host
 * @property {System} system
 * @property {Roster} roster
 * @property {Complaints} complaints
 * @property {Page} page
 * @property {boolean} stopped
 * @property {(url: string) => boolean} isNamed whether the user has named a relay
 * @property {(number: number, found: Map<string, Found>) => Promise<void>} take
 *   gives a contact what was read, by mailbox
 * @property {(url: string) => void} relayIsBack has what waits for a relay go on
 */

/** So many at a time; all others wait, in order. */
export class Places {
  /** @param {number} count */
  constructor(count) {
    this._left = count;
    /** @type {(() => void)[]} */
    this._waiting = [];
  }

  get areTaken() {
    return this._left === 0;
  }

  /** Take a place, once there is one. */
  async take() {
    if (!this.areTaken) {
      this._left -= 1;
      return;
    }
    await new Promise((resolve) => this._waiting.push(() => resolve(undefined)));
  }

  /** Give a place to the next one who waits. */
  leave() {
    const next = this._waiting.shift();
    if (next) next();
    else this._left += 1;
  }
}

/** Something that holds at times, and that others wait for. */
class Flag {
  constructor() {
    this.isSet = false;
    this._tell = () => {};
    this._renew();
  }

  set() {
    this.isSet = true;
    this._tell();
  }

  clear() {
    if (this.isSet) this._renew();
    this.isSet = false;
  }

  _renew() {
    /** Resolves once it is set. */
    this.waited = new Promise((resolve) => {
      this._tell = () => resolve(undefined);
    });
  }
}

/** Poll one relay until it is ended. `hasStun`, `lendsTurn` are false until it has said so. */
export class Line {
  /**
   * @param {Host} host
   * @param {RelayClient} client
   * @param {Places} places
   */
  constructor(host, client, places) {
    this.url = client.url;
    this._places = places;
    this._host = host;
    this._client = client;
    this._isEnded = false;
    this._ended = new AbortController();
    // From the start of this round to that of the next, at least.
    this._leastS = CHECK_EVERY_S;
    // What was told of mailboxes that bring too much.
    this._toldFlood = "";
    // The mailboxes at the last round, and those that were left for the next.
    this._known = new Set();
    /** @type {Set<string>} */
    this._left = new Set();
    // What all mailboxes have brought lately, and whether it was too much for the last round.
    this._burst = new Burst(RELAY_MESSAGES_PER_S);
    this._isBehind = false;
    // A pause goes on that was meant for an idle time.
    this._isSlow = false;
    this._woken = new AbortController();
    // Nothing has come over the present way to the relay.
    this._isDoubted = false;
    this.hasStun = false;
    this.lendsTurn = false;
    this._loans = new Loans(client, host.roster.suite, () => this._nowS());
    this._hasLearned = false;
    this.learned = Promise.resolve();
    // Why the relay could not be asked what it says of itself. A check that waits there ends: the
    // relay may be back since, and its servers are needed.
    /** @type {unknown} */
    this._unreachable = undefined;
    // From an answer to a failure.
    this.answers = new Flag();
    // Since when it fails; NaN while it does not.
    this._failsSinceS = NaN;
    this._run();
  }

  /** Ask at once, and do not wait: the way to the relay may be another one. */
  doubt() {
    this._isDoubted = true;
    this.wake();
  }

  /** Let a check begin as soon as it may, in place of one that waits. */
  wake() {
    this._woken.abort();
  }

  /** Poll no more. */
  end() {
    this._isEnded = true;
    this._ended.abort();
    this.wake();
  }

  /** Wake if there is something else to poll, or sooner. */
  notice() {
    const { roster } = this._host;
    const isHurried = this._isSlow && roster.pollGapS() < POLL_SLOW_S;
    const isNew = roster.mailboxes().some(
      ({ url, pub }) => url === this.url && !this._known.has(pub));
    if (isHurried || isNew) this.wake();
  }

  /**
   * Ask what the relay says of itself, until it has said it, and anew after each failure.
   *
   * What answers first may be a network where users have to log in, and a relay that comes back
   * may have other servers. One that only others have named is not asked (GUARD-7).
   */
  async _learn() {
    if (this._hasLearned || !this._host.isNamed(this.url)) return;
    try {
      const document = await this._client.document();
      this.hasStun = hasStun(document);
      this.lendsTurn = lendsTurn(document);
      this._hasLearned = true;
      this.answers.set();
    } catch (error) {
      if (error instanceof UnreachableError) {
        this._unreachable = error;
        this.wake();
        return;
      }
      this._host.complaints.make(error, this.url);
      // Something is there. The check that goes on meanwhile says whether it is a relay.
      await this._host.system.sleep(LEARN_S);
      if (!this._fails()) this.answers.set();
    }
  }

  /**
   * Ask for the TURN servers that a contact may use; what fails is complained of.
   * @param {number} number
   */
  async renewLoan(number) {
    const proof = this._host.roster.proof(number, this.url);
    if (!proof || !this.lendsTurn) return;
    try {
      await this._loans.renew(proof);
    } catch (error) {
      this._host.complaints.make(error, this.url);
    }
  }

  /**
   * Return the TURN servers that are lent for a contact, if any.
   * @param {number} number
   */
  lent(number) {
    const proof = this._host.roster.proof(number, this.url);
    return proof && this._loans.of(proof);
  }

  async _run() {
    while (!this._isOver()) {
      const beganS = this._nowS();
      this._woken = new AbortController();
      this._unreachable = undefined;
      this.learned = this._learn();
      let pauseS = CHECK_EVERY_S;
      this._leastS = CHECK_EVERY_S;
      try {
        pauseS = await this._poll();
      } catch (error) {
        this._leastS = Math.max(this._leastS, retryS(error));
        if (this._unreachable) this._woken = new AbortController();
        if (!this._woken.signal.aborted) pauseS = this._fail(this._unreachable ?? error, beganS);
      }
      this._tellOfFloods();
      await this._rest(beganS, Math.max(pauseS, this._leastS));
    }
  }

  /**
   * Tell why a round has failed; return the pause after it.
   * @param {unknown} error
   * @param {number} beganS
   */
  _fail(error, beganS) {
    this._host.complaints.make(error, this.url);
    const pauseS = pauseAfterS(error, this._noteSilence(beganS));
    // A hidden page that expects nothing asks no more often than at any time.
    return this._isIdle() ? Math.max(pauseS, POLL_SLOW_S) : pauseS;
  }

  /** Note that it answers. If it is back, say so, and ask for the servers that offers need. */
  _noteAnswer() {
    const hasFailed = this._fails();
    this._failsSinceS = NaN;
    this.answers.set();
    if (!hasFailed) return;
    this._host.relayIsBack(this.url);
    this.learned = this._learn();
  }

  /**
   * Note a round without an answer; return the seconds since the first of them began.
   * @param {number} beganS
   */
  _noteSilence(beganS) {
    this._hasLearned = false;
    this.answers.clear();
    if (!this._fails()) this._failsSinceS = beganS;
    return this._nowS() - this._failsSinceS;
  }

  _fails() {
    return !Number.isNaN(this._failsSinceS);
  }

  /**
   * Say what is known of mailboxes that bring more than an app sends, once for each time.
   *
   * One of them may be flooded by its contact, or by whoever has read a link. Those of several
   * contacts, which nobody else has been told, are flooded by the relay, or by each of these
   * contacts.
   */
  _tellOfFloods() {
    const { roster, complaints } = this._host;
    const [first] = roster.flooded(this.url, { told: false });
    const areSeveral = roster.flooded(this.url, { told: true }).length > 1;
    const name = areSeveral ? "" : roster.entries.get(first)?.name;
    const text = wordsOfFlood(name);
    if (text && text !== this._toldFlood) {
      const about = areSeveral ? this.url : first;
      complaints.make(new ConnectoidError(`${this.url} ${text}`), about);
    }
    this._toldFlood = text;
  }

  /**
   * Wait for the rest of a pause. Waking shortens it to what a relay asks for at least.
   * @param {number} beganS
   * @param {number} pauseS
   */
  async _rest(beganS, pauseS) {
    const { sleep } = this._host.system;
    this._isSlow = pauseS > CHECK_EVERY_S;
    await sleep(beganS + pauseS - this._nowS(), this._woken.signal);
    if (!this._isOver()) await sleep(beganS + this._leastS - this._nowS(), this._ended.signal);
    this._isSlow = false;
  }

  /** Check all mailboxes at the relay, and hand on what they hold; return the pause after it. */
  async _poll() {
    const { page, roster } = this._host;
    const polls = page.isLeft ? [] : this._inTurn(roster.polls(this.url));
    // Longer than until then neither a check waits nor the pause: a mailbox may be due again.
    const restS = roster.restS(this.url);
    this._known = new Set(roster.mailboxes().map(({ pub }) => pub));
    this._isBehind = false;
    for (let start = 0; start < polls.length; start += MAX_BATCH_CHECKS) {
      const part = polls.slice(start, start + MAX_BATCH_CHECKS);
      const isOnly = part.length === polls.length;
      await this._pollPart(part, isOnly ? Math.ceil(Math.min(WAIT_S, restS)) : 0);
    }
    if (polls.length) this._noteAnswer();
    if (this._isBehind) return CHECK_EVERY_S;
    this._toldBehind = false;
    return Math.min(roster.pollGapS(), restS, roster.restS(this.url));
  }

  /**
   * Return checks in the order of what their contacts have brought lately, least first.
   *
   * So those who write much hold up nobody who writes little.
   * @param {[number, Poll][]} polls
   */
  _inTurn(polls) {
    const { roster } = this._host;
    /** @type {Map<number, number>} */
    const lately = new Map();
    for (const [number] of polls) lately.set(number, roster.broughtLately(number, this.url));
    const least = (/** @type {number} */ number) => lately.get(number) ?? 0;
    return [...polls].sort(([one], [other]) => least(one) - least(other));
  }

  /**
   * @param {[number, Poll][]} polls
   * @param {number} waitS
   */
  async _pollPart(polls, waitS) {
    const checked = await this._check(polls.map(([, poll]) => poll), waitS);
    this._host.complaints.clear(this.url);
    await this._read(byContact(polls, checked));
  }

  /**
   * @param {Poll[]} polls
   * @param {number} waitS
   */
  async _check(polls, waitS) {
    await this._places.take();
    try {
      const { signal } = this._woken;
      const mayWait = !this._places.areTaken && !this._fails() && this._mayWait();
      const waits = mayWait && !signal.aborted;
      const checked = await checkMailboxes(this._client, polls, waits ? waitS : 0, signal);
      this._isDoubted = false;
      return checked;
    } finally {
      this._places.leave();
    }
  }

  /**
   * Read mailboxes, contact by contact.
   *
   * What a relay refuses for one is no failure of the others: it is thrown if all have failed. A
   * relay that is broken ends the round.
   * @param {Map<number, Checked[]>} contacts
   */
  async _read(contacts) {
    /** @type {RelayRefusalError[]} */
    const refusals = [];
    let hasRead = false;
    for (const [number, checked] of contacts) {
      if (this._burst.left(this._nowS()) >= MAX_RELAY_MESSAGES) {
        this._fallBehind();
        break;
      }
      const found = await this._readContact(checked, refusals);
      if (!found.size) continue;
      await this._host.take(number, found);
      hasRead = true;
    }
    // Of several, the one with the longest pause counts.
    refusals.sort((one, other) => other.retryS - one.retryS);
    if (!refusals.length) return;
    if (!hasRead) throw refusals[0];
    this._host.complaints.make(refusals[0], this.url);
    this._leastS = Math.max(this._leastS, refusals[0].retryS);
  }

  /** Leave the rest of a round to the next ones, and say so. */
  _fallBehind() {
    this._isBehind = true;
    if (this._toldBehind) return;
    this._toldBehind = true;
    this._host.complaints.make(new ConnectoidError(
      `${this.url} brings more messages than can be read at once. The rest is read bit by bit; `
      + "if this goes on, the relay is faulty."), this.url);
  }

  /**
   * Read the mailboxes of one contact, those first that were left over the last time.
   * @param {Checked[]} checked
   * @param {RelayRefusalError[]} refusals
   */
  async _readContact(checked, refusals) {
    /** @type {Map<string, Found>} */
    const found = new Map();
    const budget = new Budget();
    const isLeft = (/** @type {Checked} */ { poll }) => this._left.has(poll.mailbox.pub);
    const left = checked.filter(isLeft);
    for (const one of [...left, ...checked.filter((other) => !left.includes(other))]) {
      const { pub } = one.poll.mailbox;
      if (budget.isSpent) {
        this._left.add(pub);
        continue;
      }
      this._left.delete(pub);
      try {
        found.set(pub, await readMailbox(this._host.roster.suite, this._client, one, budget));
      } catch (error) {
        if (!(error instanceof RelayRefusalError)) throw error;
        refusals.push(error);
      }
    }
    this._burst.note(budget.opened, this._nowS());
    return found;
  }

  _mayWait() {
    return !this._isDoubted && !this._isIdle();
  }

  /** A hidden page that expects nothing asks once a minute. */
  _isIdle() {
    const { page, roster } = this._host;
    return page.isHidden && roster.pollGapS() >= POLL_SLOW_S;
  }

  _isOver() {
    return this._isEnded || this._host.stopped;
  }

  _nowS() {
    return this._host.system.now().monotonicS;
  }
}

/**
 * Return what is known of a flood for one contact, or for several, which have no name here.
 * @param {string | undefined} name
 */
function wordsOfFlood(name) {
  if (name === undefined) return "";
  if (name === "") {
    return "brings more messages for several contacts than their apps send: "
      + "it is faulty, or they are. Their mailboxes are asked seldom.";
  }
  return `brings more messages for ${name} than an app sends: somebody floods that mailbox, `
    + "or the relay is faulty. It is asked seldom.";
}

/**
 * Wait until a relay answers, and a moment for the others. Without lines there is no wait.
 *
 * What answers may turn out in that moment to be none.
 * @param {Line[]} lines
 * @param {System["sleep"]} sleep
 * @param {AbortSignal} over ends the wait
 */
async function hearFrom(lines, sleep, over) {
  while (lines.length && !over.aborted) {
    await Promise.race(lines.map((line) => line.answers.waited));
    await Promise.race([Promise.all(lines.map((line) => line.learned)), sleep(LEARN_S)]);
    if (lines.some((line) => line.answers.isSet)) return;
  }
}

/**
 * Return what was checked, by contact.
 * @param {[number, Poll][]} polls
 * @param {Checked[]} checked
 */
function byContact(polls, checked) {
  /** @type {Map<number, Checked[]>} */
  const contacts = new Map();
  for (const [place, [number]] of polls.entries()) {
    contacts.set(number, [...contacts.get(number) ?? [], checked[place]]);
  }
  return contacts;
}

/** Have a line to each relay with mailboxes of our contacts, and to no other. */
export class Lines {
  /**
   * @param {Host} host
   * @param {(url: string) => RelayClient} clientOf
   */
  constructor(host, clientOf) {
    this._host = host;
    this._clientOf = clientOf;
    this._places = new Places(MAX_LINES);
    /** @type {Map<string, Line>} */
    this._lines = new Map();
  }

  /** Begin and end lines as the contacts' mailboxes come and go; have the others look. */
  draw() {
    const urls = this._host.roster.urls();
    for (const [url, line] of this._lines) {
      if (urls.has(url)) continue;
      this._lines.delete(url);
      line.end();
    }
    for (const url of urls) {
      const line = this._lines.get(url);
      if (line) line.notice();
      else this._lines.set(url, new Line(this._host, this._clientOf(url), this._places));
    }
  }

  /** End all lines. */
  end() {
    for (const line of this._lines.values()) line.end();
  }

  /** Let all check again, as soon as they may. */
  wake() {
    for (const line of this._lines.values()) line.wake();
  }

  /** Let all ask at once: the way to the relays may be another one. */
  doubt() {
    for (const line of this._lines.values()) line.doubt();
  }

  /**
   * Return the lines to some relays, as far as there are lines.
   * @param {string[]} urls
   */
  to(urls) {
    return urls.map((url) => this._lines.get(url)).filter((line) => line !== undefined);
  }

  /**
   * Return the lines to one's own relays for a contact, once they have said which servers they
   * have, and lent. One of them has to answer, or nothing could come in that replies to an offer.
   * Another one that does not do it in time has none, for now. PROTOCOL.md, CONNECT-14 and
   * CONNECT-18.
   * @param {number} number
   * @param {Pick<ContactRecord, "relays">} record
   */
  async learned(number, { relays }) {
    const { sleep } = this._host.system;
    // Those of a new contact have no lines yet.
    this.draw();
    const lines = this.to(relays.map(([url]) => url));
    const named = lines.filter((line) => this._host.isNamed(line.url));
    const over = new AbortController();
    await Promise.race([
      hearFrom(named, sleep, over.signal), sleep(GATHERED_S).then(() => over.abort())]);
    const loans = lines.map((line) => line.renewLoan(number));
    await Promise.race([Promise.all(loans), sleep(LEND_S)]);
    return lines;
  }
}
