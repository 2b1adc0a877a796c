// @ts-check
/**
 * The store: contacts in IndexedDB.
 *
 * Keys stay CryptoKeys that no script can read, so nothing here makes a backup. The browser's
 * files have them in plain PKCS #8. One page at a time runs contacts (Web Locks).
 * @module
 */

import { checkRecord } from "./contact/record.js";
import { REASONS, StoreError } from "./errors.js";

/** @import { ContactRecord } from "./contact/record.js" */

// A page that is reloaded waits until its former self has ended.
const LOCK_WAIT_S = 1;
const CONTACTS = "contacts";
const REFUSALS = "refusals";
// The first had no refusals.
const STORE_VERSION = 2;

/** Keep contacts in IndexedDB: `await Store.open()`. */
export class Store {
  /**
   * @param {IDBDatabase} db
   * @param {() => void} release
   */
  constructor(db, release) {
    this._db = db;
    this._release = release;
    this._isClosed = false;
    db.onversionchange = () => this.close();
  }

  /** Return the store of this name, for this page alone; throw StoreError. */
  static async open(name = "connectoid", { indexedDB, locks } = browserStorage()) {
    if (!indexedDB || !locks) {
      throw new StoreError(
        "This page cannot keep contacts: open it over https, in a newer browser.");
    }
    const release = await lock(locks, name);
    try {
      return new Store(await openDatabase(indexedDB, name), release);
    } catch (error) {
      release();
      throw storeError(error);
    }
  }

  /**
   * Return the records by their ids; throw StoreError, RecordError.
   * @returns {Promise<Map<number, ContactRecord>>}
   */
  async load() {
    const [numbers, records] = await this._use("readonly", (contacts) => (
      Promise.all([done(contacts.getAllKeys()), done(contacts.getAll())])));
    const loaded = new Map();
    for (const [place, number] of numbers.entries()) {
      loaded.set(Number(number), checkRecord(records[place]));
    }
    return loaded;
  }

  /**
   * Keep a new record durably and return its id.
   * @param {ContactRecord} record
   */
  async add(record) {
    return Number(await this._use("readwrite", (contacts) => done(contacts.add(record))));
  }

  /**
   * Replace a record durably.
   * @param {number} number
   * @param {ContactRecord} record
   */
  async save(number, record) {
    await this._use("readwrite", (contacts) => done(contacts.put(record, number)));
  }

  /**
   * Delete a record, and the counts of what was refused.
   * @param {number} number
   */
  async delete(number) {
    await this._use("readwrite", (contacts, refusals) => (
      Promise.all([done(contacts.delete(number)), done(refusals.delete(number))])));
  }

  /**
   * Return how often something of each contact was refused, by reason. Counts that are damaged are
   * left out.
   * @returns {Promise<Map<number, Record<string, number>>>}
   */
  async loadRefusals() {
    const [numbers, counts] = await this._use("readonly", (_, refusals) => (
      Promise.all([done(refusals.getAllKeys()), done(refusals.getAll())])));
    return new Map(numbers.map((number, place) => [Number(number), knownCounts(counts[place])]));
  }

  /**
   * Replace the counts of a contact, if it is there.
   * @param {number} number
   * @param {Record<string, number>} counts
   */
  async saveRefusals(number, counts) {
    await this._use("readwrite", async (contacts, refusals) => {
      const known = await done(contacts.getKey(number));
      if (known !== undefined) await done(refusals.put(counts, number));
    });
  }

  /** Let another page use the store: all other calls throw StoreError. */
  close() {
    this._isClosed = true;
    this._db.close();
    this._release();
  }

  /**
   * Return what work returns, once its transaction is on the disk.
   * @template T
   * @param {IDBTransactionMode} mode
   * @param {(contacts: IDBObjectStore, refusals: IDBObjectStore) => Promise<T>} work
   */
  async _use(mode, work) {
    if (this._isClosed) {
      throw new StoreError("The contacts of this page are closed: load it again to use them.");
    }
    try {
      const names = [CONTACTS, REFUSALS];
      const transaction = this._db.transaction(names, mode, { durability: "strict" });
      const committed = new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
      const [contacts, refusals] = names.map((name) => transaction.objectStore(name));
      const [result] = await Promise.all([work(contacts, refusals), committed]);
      return result;
    } catch (error) {
      throw storeError(error);
    }
  }
}

function browserStorage() {
  return { indexedDB: globalThis.indexedDB, locks: globalThis.navigator?.locks };
}

/**
 * @param {IDBFactory} indexedDB
 * @param {string} name
 */
function openDatabase(indexedDB, name) {
  const request = indexedDB.open(name, STORE_VERSION);
  request.onupgradeneeded = () => {
    const db = request.result;
    if (!db.objectStoreNames.contains(CONTACTS)) {
      db.createObjectStore(CONTACTS, { autoIncrement: true });
    }
    db.createObjectStore(REFUSALS);
  };
  return done(request);
}

/**
 * Return those counts that are some.
 * @param {any} counts
 * @returns {Record<string, number>}
 */
function knownCounts(counts) {
  const reasons = Object.keys(REASONS).filter((reason) => Number.isSafeInteger(counts?.[reason]));
  return Object.fromEntries(reasons.map((reason) => [reason, counts[reason]]));
}

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @param {any} error */
function storeError(error) {
  if (error?.name === "QuotaExceededError") {
    return new StoreError("The storage of this browser is full: free some, then go on.");
  }
  return new StoreError(`This browser does not keep data for this page: ${error?.message}. `
    + "Allow it, or leave private browsing.");
}

/**
 * Return a function that releases the lock, once this page has it; throw StoreError.
 * @param {LockManager} locks
 * @param {string} name
 * @returns {Promise<() => void>}
 */
function lock(locks, name) {
  return new Promise((resolve, reject) => {
    const hold = () => new Promise((release) => {
      resolve(() => release(undefined));
    });
    const refuse = () => reject(new StoreError(
      "This app is open in another tab: use that one, or close it."));
    const signal = AbortSignal.timeout(1_000 * LOCK_WAIT_S);
    locks.request(`connectoid ${name}`, { signal }, hold).catch(refuse);
  });
}
