// @ts-check
/**
 * What goes to relays: for each contact and relay a queue, while it has something.
 *
 * A contact's messages stay in order; a dead relay holds up only what one contact sends there.
 *
 * Whoever has read a link may name relays too: they get `used`. What goes to these strangers has a
 * Sender of its own. Nothing there is shared with what goes to contacts, so nothing can be used up.
 * @module
 */

import { ConnectoidError } from "./errors.js";
import { pauseAfterS } from "./pauses.js";
import { retryS } from "./relay_client.js";

/** @import { Complaints } from "./complaints.js" */
/** @import { Mailbox } from "./links.js" */
/** @import { RelayClient } from "./relay_client.js" */
/** @import { System } from "./system.js" */

// What could not be sent by then, the machine sends anew.
const SEND_FOR_S = 45;
// Of one contact at one relay. The oldest goes first: the machine repeats what matters.
export const MAX_LETTERS = 32;
// Relays that one contact is written to at a time: two addresses of three mailboxes each, and two
// more. A contact could name new ones for ever. As many for the strangers with its link.
export const MAX_QUEUES_OF_CONTACT = 8;
// Of all contacts together. Each takes a timer and a connection.
export const MAX_QUEUES = 256;
// Of the strangers with links of all contacts.
export const MAX_QUEUES_OF_STRANGERS = 64;
// Relays that one contact names and that are new: so many at once, and then one in a while. Each
// costs a lookup and a TLS handshake, and a contact could name another one in each message.
export const MAX_NEW_RELAYS = MAX_QUEUES_OF_CONTACT;
export const NEW_RELAY_EVERY_S = 60;

/** A message on its way, and until when it is worth sending. */
class Letter {
  /**
   * @param {Mailbox} mailbox
   * @param {string} data
   * @param {string} hash of the message in it
   * @param {number} untilS
   */
  constructor(mailbox, data, hash, untilS) {
    this.mailbox = mailbox;
    this.data = data;
    this.hash = hash;
    this.untilS = untilS;
  }
}

/** The relays that a contact is written to, and how many new ones it may still name. */
class Acquaintance {
  /** @param {number} nowS */
  constructor(nowS) {
    /** @type {Set<string>} */
    this._known = new Set();
    this._left = MAX_NEW_RELAYS;
    this._countedS = nowS;
  }

  /**
   * Return whether a relay is known, or may be new. Then it is known.
   * @param {string} url
   * @param {number} nowS
   */
  takes(url, nowS) {
    if (!this._known.delete(url) && !this._takesNew(nowS)) return false;
    this._known.add(url);
    const [oldest] = this._known;
    if (this._known.size > MAX_QUEUES_OF_CONTACT) this._known.delete(oldest);
    return true;
  }

  /** @param {number} nowS */
  _takesNew(nowS) {
    const gained = (nowS - this._countedS) / NEW_RELAY_EVERY_S;
    this._left = Math.min(MAX_NEW_RELAYS, this._left + gained);
    this._countedS = nowS;
    if (this._left < 1) return false;
    this._left -= 1;
    return true;
  }
}

/** The letters of one contact to one relay, sent one after the other. */
class Queue {
  /**
   * @param {number} contact
   * @param {RelayClient} client
   * @param {System} system
   * @param {Complaints | null} complaints none for strangers
   * @param {OnTaken} onTaken
   */
  constructor(contact, client, system, complaints, onTaken) {
    this.contact = contact;
    // Not the relay: it may answer, and refuse what is sent to this contact.
    this._about = `${contact} at ${client.url}`;
    // A letter that fails is not sent again.
    this.isEnding = false;
    // It is empty, and takes nothing more.
    this.isOver = false;
    this._client = client;
    this._system = system;
    this._complaints = complaints;
    this._onTaken = onTaken;
    this._ended = new AbortController();
    // The pause before the next attempt.
    this._pause = new AbortController();
    /** @type {Letter[]} */
    this._letters = [];
  }

  /**
   * @param {Mailbox} mailbox
   * @param {string} data
   * @param {string} hash
   */
  add(mailbox, data, hash) {
    this._letters.push(new Letter(mailbox, data, hash, this._nowS() + SEND_FOR_S));
    if (this._letters.length > MAX_LETTERS) this._letters.shift();
  }

  /** Send what there is, until nothing is left. */
  async sendAll() {
    for (;;) {
      const letter = this._letters.shift();
      if (!letter) break;
      await this._sendOne(letter);
    }
    this.isOver = true;
  }

  /** Try again at once what has failed, unless the relay has asked for a pause. */
  hurry() {
    this._pause.abort();
  }

  /** Send nothing more. */
  end() {
    this._letters = [];
    this._ended.abort();
    this._pause.abort();
  }

  /** @param {Letter} letter */
  async _sendOne(letter) {
    const { signal } = this._ended;
    const beganS = this._nowS();
    while (!signal.aborted) {
      const error = await this._try(letter);
      if (!error || signal.aborted) return;
      const pauseS = pauseAfterS(error, this._nowS() - beganS);
      const isLast = this.isEnding || !this._complaints;
      if (isLast || this._nowS() + pauseS > letter.untilS) return;
      const untilS = this._nowS() + retryS(error);
      this._pause = new AbortController();
      await this._system.sleep(pauseS, this._pause.signal);
      await this._system.sleep(untilS - this._nowS(), signal);
    }
  }

  /**
   * Send a letter, and return what went wrong.
   * @param {Letter} letter
   */
  async _try(letter) {
    try {
      await this._client.send(letter.mailbox, letter.data, this._ended.signal);
      this._complaints?.clear(this._about);
      this._onTaken(this.contact, letter.hash);
      return null;
    } catch (error) {
      if (!this._ended.signal.aborted) this._complaints?.make(error, this._about);
      return error;
    }
  }

  _nowS() {
    return this._system.now().monotonicS;
  }
}

/**
 * Is told what a relay has taken for a contact, by the hash of the message.
 * @callback OnTaken
 * @param {number} contact
 * @param {string} hash
 */

/**
 * Send messages, each for a while, and drop what cannot be sent.
 *
 * What goes to strangers is tried once, and what becomes of it is not told: nobody waits for it,
 * and a stranger's relay would choose the words.
 */
export class Sender {
  /**
   * @param {(url: string) => RelayClient} clientOf
   * @param {System} system
   * @param {Complaints} complaints
   * @param {{toStrangers?: boolean, onTaken?: OnTaken}} [more]
   */
  constructor(clientOf, system, complaints, { toStrangers = false, onTaken = () => {} } = {}) {
    this._onTaken = onTaken;
    this._clientOf = clientOf;
    this._system = system;
    this._complaints = toStrangers ? null : complaints;
    this._maxQueues = toStrangers ? MAX_QUEUES_OF_STRANGERS : MAX_QUEUES;
    this._isEnding = false;
    /** @type {Map<number, Acquaintance>} */
    this._acquaintances = new Map();
    // By contact and URL, the oldest first.
    /** @type {Map<string, Queue>} */
    this._queues = new Map();
    /** @type {Set<Promise<void>>} */
    this._sending = new Set();
  }

  /**
   * Begin to send a message of a contact; drop it for too many new relays.
   * @param {number} contact
   * @param {Mailbox} mailbox
   * @param {string} data
   * @param {string} [hash] of the message in it
   */
  send(contact, mailbox, data, hash = "") {
    const { url } = mailbox;
    if (!this._takes(contact, url)) {
      const words = `Contact ${contact} names ever new relays: not all of them are asked.`;
      this._complaints?.make(new ConnectoidError(words));
      return;
    }
    const key = `${contact} ${url}`;
    const known = this._queues.get(key);
    if (known && !known.isOver) {
      known.add(mailbox, data, hash);
      return;
    }
    const queue = this._begin(contact, url, key);
    queue.add(mailbox, data, hash);
    this._sendAll(key, queue);
  }

  /** Try again at once what has failed, unless a relay has asked for a pause. */
  hurry() {
    for (const queue of this._queues.values()) queue.hurry();
  }

  /**
   * Let what is queued go out, without another attempt for what fails; then end.
   * @param {number} timeoutS
   */
  async finish(timeoutS) {
    this._isEnding = true;
    for (const queue of this._queues.values()) queue.isEnding = true;
    const over = new AbortController();
    const sent = Promise.all(this._sending);
    await Promise.race([sent, this._system.sleep(timeoutS, over.signal)]);
    over.abort();
    for (const queue of this._queues.values()) queue.end();
  }

  /**
   * @param {number} contact
   * @param {string} url
   */
  _takes(contact, url) {
    const nowS = this._system.now().monotonicS;
    const acquaintance = this._acquaintances.get(contact) ?? new Acquaintance(nowS);
    this._acquaintances.set(contact, acquaintance);
    return acquaintance.takes(url, nowS);
  }

  /**
   * @param {number} contact
   * @param {string} url
   * @param {string} key
   */
  _begin(contact, url, key) {
    this._makeRoom(contact);
    const queue = new Queue(
      contact, this._clientOf(url), this._system, this._complaints, this._onTaken);
    queue.isEnding = this._isEnding;
    this._queues.set(key, queue);
    return queue;
  }

  /**
   * @param {string} key
   * @param {Queue} queue
   */
  _sendAll(key, queue) {
    const sending = queue.sendAll().finally(() => {
      this._sending.delete(sending);
      if (this._queues.get(key) === queue) this._queues.delete(key);
    });
    this._sending.add(sending);
  }

  /**
   * End the oldest queue of a contact that has as many as it may, or of who has most.
   * @param {number} contact
   */
  _makeRoom(contact) {
    /** @type {Map<number, number>} */
    const counts = new Map();
    for (const { contact: number } of this._queues.values()) {
      counts.set(number, (counts.get(number) ?? 0) + 1);
    }
    if ((counts.get(contact) ?? 0) >= MAX_QUEUES_OF_CONTACT) {
      this._endOldest(contact);
    } else if (this._queues.size >= this._maxQueues) {
      const [[greatest]] = [...counts].sort(([, one], [, other]) => other - one);
      this._endOldest(greatest);
    }
  }

  /** @param {number} contact */
  _endOldest(contact) {
    for (const [key, queue] of this._queues) {
      if (queue.contact !== contact) continue;
      queue.end();
      this._queues.delete(key);
      return;
    }
  }
}
