// @ts-check
/**
 * The contacts of one store: the machine of each, its name, and its record as it was saved last.
 * @module
 */

import { Contact } from "./contact/contact.js";
import { addressesOf, keyedMailboxes, mailboxesOf } from "./contact/record.js";
import { UsageError } from "./errors.js";
import { NO_AT, POLL_SLOW_S } from "./limits.js";
import { Refusals } from "./refusals.js";
import { UNPRINTABLE, shown } from "./shown.js";

/** @import { Channel } from "./channel.js" */
/** @import { Now, Poll, Privacy } from "./contact/effects.js" */
/** @import { ContactRecord } from "./contact/record.js" */
/** @import { Allowed, OwnRelay, Relay } from "./links.js" */
/** @import { Store } from "./store.js" */
/** @import { Suite } from "./suite.js" */

/** @typedef {"load" | "add" | "save" | "delete" | "loadRefusals" | "saveRefusals" | "close"} Ask */
/** @typedef {Pick<Store, Ask>} AnyStore */

// After a step that failed: the next one may fail in the same way.
const REST_S = 2;

/** One contact. */
export class Entry {
  /**
   * @param {Contact} contact
   * @param {string} name
   * @param {Record<string, number>} [refused] the counts of earlier pages
   */
  constructor(contact, name, refused) {
    this.contact = contact;
    // As it was saved last.
    this.record = contact.record;
    // A tombstone has no name any more, and its end is told.
    this.name = name;
    /** @type {Channel | null} */
    this.channel = null;
    // The end of the last step, and the number of steps that are not done.
    /** @type {Promise<unknown>} */
    this.last = Promise.resolve();
    this.waiting = 0;
    // After a step that failed there is no tick before then.
    this.restsUntilS = -Infinity;
    this.refusals = new Refusals(refused);
  }

  /** When its machine has something to do, by the monotonic clock. */
  get nextTickS() {
    return Math.max(this.contact.nextTickS, this.restsUntilS);
  }
}

/**
 * Know the API keys of this side: its addresses have the half of each that only sends. They belong
 * to the app's settings and are never saved. PROTOCOL.md, ADDRESS-12.
 */
export class OwnKeys {
  constructor() {
    // By the URL and the half that sends, as JSON, and the other way round.
    /** @type {Map<string, string | null>} */
    this._keys = new Map();
    /** @type {Map<string, string>} */
    this._sendKeys = new Map();
  }

  /**
   * Return relays as addresses have them, and remember the owner's halves.
   * @param {OwnRelay[]} relays
   * @returns {Relay[]}
   */
  inAddresses(relays) {
    return relays.map(([url, key, sendKey]) => {
      if (sendKey == null) return [url, key];
      this._keys.set(JSON.stringify([url, sendKey]), key);
      this._sendKeys.set(JSON.stringify([url, key]), sendKey);
      return [url, sendKey];
    });
  }

  /**
   * Return relays for a new address: a key that has got two halves stays here from now on.
   * @param {Relay[]} relays
   * @returns {Relay[]}
   */
  outOfAddresses(relays) {
    return relays.map(([url, ext]) => (
      [url, this._sendKeys.get(JSON.stringify([url, ext])) ?? ext]));
  }

  /**
   * Return a check with the owner's half in place of the one in the address.
   * @param {Poll} poll
   * @returns {Poll}
   */
  putInto(poll) {
    const { mailbox } = poll;
    const ext = this._keys.get(JSON.stringify([mailbox.url, mailbox.ext]));
    return ext === undefined ? poll : { ...poll, mailbox: { ...mailbox, ext } };
  }
}

/** Hold contacts by their ids, which are those of the store. */
export class Roster {
  /**
   * @param {AnyStore} store
   * @param {Suite} suite
   * @param {Allowed} allowed
   * @param {() => Now} now
   */
  constructor(store, suite, allowed, now) {
    this.suite = suite;
    this.ownKeys = new OwnKeys();
    this.allowed = allowed;
    /** @type {Privacy} */
    this._privacy = {};
    /** @type {Map<number, Entry>} */
    this.entries = new Map();
    this._store = store;
    this._now = now;
  }

  get privacy() {
    return this._privacy;
  }

  /** @param {Privacy} privacy what the app wants of all connections */
  set privacy(privacy) {
    this._privacy = privacy;
    for (const { contact } of this.entries.values()) contact.privacy = privacy;
  }

  /** Load all contacts; throw StoreError, RecordError. */
  async load() {
    const refused = await this._store.loadRefusals();
    for (const [number, record] of await this._store.load()) {
      const known = this.entries.get(number)?.name ?? record.name;
      const entry = new Entry(this._contact(record), known, refused.get(number));
      this.entries.set(number, entry);
    }
  }

  close() {
    this._store.close();
  }

  /**
   * Give a contact what is a matter of the app's settings, and in no record.
   * @param {Contact} contact
   */
  _equip(contact) {
    contact.privacy = this._privacy;
    contact.machine.asShown = (relays) => this.ownKeys.outOfAddresses(relays);
  }

  /** @returns {Entry[]} */
  all() {
    return [...this.entries.values()];
  }

  // -- Names -------------------------------------------------------------------------------

  /**
   * Return the id of a contact; throw UsageError.
   * @param {string} name
   */
  numberOf(name) {
    for (const [number, { record }] of this.entries) {
      if (record.name === name) return number;
    }
    throw new UsageError(`There is no contact "${name}".`);
  }

  /**
   * Return the ids of contacts that have ended and whose name a new one takes.
   * Throw UsageError for a name that is taken, empty, or cannot be shown.
   * @param {string} name
   */
  endedWith(name) {
    if (!shown(name) || UNPRINTABLE.test(name)) {
      throw new UsageError("A contact needs a name, of characters that can be shown.");
    }
    const ended = [];
    for (const [number, { record }] of this.entries) {
      if (record.name !== name) continue;
      if (record.state !== "ended") {
        throw new UsageError(`There is a contact "${name}" already.`);
      }
      ended.push(number);
    }
    return ended;
  }

  /**
   * Return the contact that a link has made.
   * @param {string} linkHash
   */
  withLink(linkHash) {
    return this.all().find(({ record }) => record.linkHash === linkHash);
  }

  // -- What is saved; each throws StoreError -----------------------------------------------

  /**
   * Save a new contact and return its id.
   * @param {Contact} contact
   */
  async add(contact) {
    this._equip(contact);
    const number = await this._store.add(contact.record);
    this.entries.set(number, new Entry(contact, contact.record.name));
    return number;
  }

  /**
   * Save what has changed of a contact.
   * @param {number} number
   * @param {Entry} entry
   * @param {ContactRecord} record
   */
  async save(number, entry, record) {
    await this._store.save(number, record);
    entry.record = record;
  }

  /**
   * Save the counts of what was refused.
   * @param {number} number
   * @param {Entry} entry
   */
  async saveRefusals(number, entry) {
    await this._store.saveRefusals(number, entry.refusals.counts);
  }

  /**
   * Delete a contact.
   * @param {number} number
   */
  async delete(number) {
    await this._store.delete(number);
    this.entries.delete(number);
  }

  /**
   * Go back to what was saved last: nothing that follows from anything later may leave.
   * @param {Entry} entry
   */
  restore(entry) {
    entry.contact = this._contact(entry.record);
    entry.restsUntilS = this._now().monotonicS + REST_S;
  }

  /** @param {ContactRecord} record */
  _contact(record) {
    const contact = new Contact(this.suite, record, this.allowed);
    this._equip(contact);
    return contact;
  }

  // -- Mailboxes ---------------------------------------------------------------------------

  /** Return the relays with mailboxes of these contacts. */
  urls() {
    return new Set(this.mailboxes().map(({ url }) => url));
  }

  /**
   * Return the ids of the contacts with a mailbox at a relay.
   * @param {string} url
   */
  at(url) {
    const entries = [...this.entries];
    return entries
      .filter(([, { contact }]) => contact.mailboxes.some((mailbox) => mailbox.url === url))
      .map(([number]) => number);
  }

  /** Return the URLs of the relays that the user has named for a contact. */
  namedRelays() {
    return this.all().flatMap(({ record }) => record.namedRelays);
  }

  mailboxes() {
    return this.all().flatMap(({ contact }) => contact.mailboxes);
  }

  /**
   * Return the checks to make at a relay, with the id of the contact that each is for.
   * They count as made.
   * @param {string} url
   * @returns {[number, Poll][]}
   */
  polls(url) {
    const now = this._now();
    /** @type {[number, Poll][]} */
    const polls = [];
    for (const [number, { contact }] of this.entries) {
      for (const poll of contact.polls(now, url)) {
        polls.push([number, this.ownKeys.putInto(poll)]);
      }
    }
    return polls;
  }

  /**
   * Return the ids of contacts with a mailbox at a relay that brings more than an app sends.
   *
   * `told` asks for the mailboxes that only the contact has been told, so not those of links.
   * @param {string} url
   * @param {{told: boolean}} which
   */
  flooded(url, { told }) {
    const now = this._now();
    const flooded = [...this.entries].filter(([, { contact, record: { invited } }]) => {
      const open = told && invited ? mailboxesOf(invited).map(({ pub }) => pub) : [];
      const resting = contact.resting(now);
      return resting.some((mailbox) => mailbox.url === url && !open.includes(mailbox.pub));
    });
    return flooded.map(([number]) => number);
  }

  /**
   * Return a mailbox that a contact has at a relay, with its key; undefined if it has none.
   * @param {number} number
   * @param {string} url
   */
  proof(number, url) {
    const contact = this.entries.get(number)?.contact;
    const owned = contact ? addressesOf(contact.record).flatMap(keyedMailboxes) : [];
    const found = owned.find(([mailbox]) => mailbox.url === url);
    return found && this.ownKeys.putInto({ mailbox: found[0], key: found[1], at: NO_AT });
  }

  /**
   * Return how many messages a contact's mailboxes at a relay have brought lately.
   * @param {number} number
   * @param {string} url
   */
  broughtLately(number, url) {
    return this.entries.get(number)?.contact.broughtLately(this._now(), url) ?? 0;
  }

  /** Return the seconds between two checks at a relay. */
  pollGapS() {
    const now = this._now();
    const gapsS = this.all().map(({ contact }) => contact.pollGapS(now));
    return Math.min(POLL_SLOW_S, ...gapsS);
  }

  /**
   * Return the seconds until a mailbox at a relay has rested, infinity if none rests.
   * @param {string} url
   */
  restS(url) {
    const now = this._now();
    return Math.min(Infinity, ...this.all().map(({ contact }) => contact.restS(now, url)));
  }

  /**
   * Return the ids of contacts whose machine has something to do by then.
   * @param {number} nowS
   */
  dueAt(nowS) {
    const numbers = [...this.entries.keys()];
    return numbers.filter((number) => {
      const nextS = this.entries.get(number)?.nextTickS ?? Infinity;
      return nextS <= nowS;
    });
  }

  /** Return when the first machine has something to do, by the monotonic clock. */
  nextTickS() {
    return Math.min(Infinity, ...this.all().map(({ nextTickS }) => nextTickS));
  }
}
