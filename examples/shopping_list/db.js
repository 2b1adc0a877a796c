// @ts-check
/**
 * What this device keeps: IndexedDB, a record for each list and each item. It is read once. A
 * change writes what has changed, and tells it to other tabs of the page.
 * @module
 */

/** @import { Changes } from "./model.js" */

const KINDS = ["lists", "items", "contacts", "settings"];

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** @param {IDBTransaction} transaction */
function abort(transaction) {
  try {
    transaction.abort();
  } catch {
    // it is over already
  }
}

// Of what is to be kept, and not of the browser that keeps it.
const FAULTS = new Set(["DataError", "DataCloneError"]);

/**
 * A sentence for the user.
 * @param {any} error
 */
function wordsFor(error) {
  if (FAULTS.has(error?.name)) {
    return "What you changed last could not be kept. Load this page again, then change it again.";
  }
  return error?.name === "QuotaExceededError"
    ? "The storage of this browser is full. What you changed last is in this tab only: "
        + "free some space, then change it again."
    : "This browser keeps nothing for this page. Allow it to, or leave private browsing: "
        + "until then your lists are in this tab only.";
}

export class Keeper {
  /**
   * @param {(words: string) => void} onProblem is called when something could not be kept
   * @param {(changes: Changes, gone: string[]) => void} onElsewhere is called with what another tab
   *   has changed, and the lists that it no longer keeps
   */
  constructor(onProblem, onElsewhere) {
    this._onProblem = onProblem;
    /** @type {IDBDatabase | null} */
    this._db = null;
    this._tabs = new BroadcastChannel("shopping_list");
    this._tabs.onmessage = ({ data: { lists, items, gone = [] } }) => {
      if (lists && items) onElsewhere({ lists, items }, gone);
    };
  }

  /** Tell other tabs nothing any more, and hear nothing of them. */
  close() {
    this._tabs.close();
    this._db?.close();
  }

  /** Open the database; without one everything works until the tab is closed. */
  async open(name = "shopping_list") {
    try {
      const request = indexedDB.open(name, 1);
      request.onupgradeneeded = () =>
        KINDS.forEach((kind) => request.result.createObjectStore(kind, { keyPath: "id" }));
      this._db = await done(request);
    } catch (error) {
      this._onProblem(wordsFor(error));
    }
  }

  /** Return all records, by kind. @returns {Promise<Record<string, any[]>>} */
  async load() {
    if (!this._db) return Object.fromEntries(KINDS.map((kind) => [kind, []]));
    const transaction = this._db.transaction(KINDS);
    const found = await Promise.all(
      KINDS.map((kind) => done(transaction.objectStore(kind).getAll())),
    );
    return Object.fromEntries(KINDS.map((kind, place) => [kind, found[place]]));
  }

  /**
   * Keep records, by kind, and delete ids, by kind, all or nothing.
   * @param {Record<string, any[]>} put
   * @param {Record<string, string[]>} [remove]
   */
  async write(put, remove = {}) {
    const transaction = this._db?.transaction(KINDS, "readwrite");
    if (!transaction) return;
    try {
      for (const [kind, records] of Object.entries(put)) {
        for (const record of records) transaction.objectStore(kind).put(record);
      }
      for (const [kind, ids] of Object.entries(remove)) {
        for (const id of ids) transaction.objectStore(kind).delete(id);
      }
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
      const { lists = [], items = [] } = put;
      const { lists: gone = [] } = remove;
      if (lists.length || items.length || gone.length) {
        this._tabs.postMessage({ lists, items, gone });
      }
    } catch (error) {
      abort(transaction);
      this._onProblem(wordsFor(error));
    }
  }
}
