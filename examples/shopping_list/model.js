// @ts-check
/**
 * The lists and their items: what a change is, what may come from others, and which of two versions wins. Pure: the
 * clock and chance are handed in, nothing is written or sent. peer.py has the same rules.
 *
 * Every record carries `updatedAt` (milliseconds of the device that changed it) and `by` (that device): the larger pair
 * wins, everywhere. What is deleted stays as a tombstone, so that a device that was away does not bring it back.
 * @module
 */

export const MAX_LISTS = 200; // tombstones included
export const MAX_LISTS_OF_CONTACT = 50; // that one contact may add here
export const MAX_ITEMS = 2_000; // of a list, tombstones included: about 400 KB to sync
export const MAX_NAME_CHARS = 60;
export const MAX_TEXT_CHARS = 200;
export const MAX_QUANTITY_CHARS = 20;
export const MAX_AT = 2 ** 52; // milliseconds; leaves room for our own, later changes
const TOMBSTONE_MS = 365 * 86_400_000; // who was away for longer may bring deleted things back

const MAX_MESSAGE_CHARS = 65_536; // what a channel carries
const MESSAGE_BYTES = 48_000; // that we put in one, of JSON
const MAX_RECORDS = 500; // in a message

/**
 * @typedef {{id: string, name: string, updatedAt: number, by: string, deleted: boolean}} List
 * @typedef {{id: string, list: string, text: string, quantity: string, done: boolean, updatedAt: number, by: string,
 *   deleted: boolean}} Item
 * @typedef {{lists: List[], items: Item[]}} Changes
 * @typedef {{type: "changes", number: number, lists: List[], items: Item[]} | {type: "ack", number: number}
 *   | {type: "bye", number: number, delete: boolean}} Message
 */

// ---------------------------------------------------------------------------------------
// What comes from outside: checked member by member, copied, or thrown away whole.
// ---------------------------------------------------------------------------------------

const ID = /^[\w-]{8,40}$/;
const UNPRINTABLE = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]/u; // nor what turns the direction of text

/** Text that a person typed, as it may be kept. @param {string} text @param {number} maxChars */
export function tidy(text, maxChars) {
  const clean = text.replace(new RegExp(UNPRINTABLE, "gu"), " ").replace(/\s+/g, " ").trim();
  return [...clean].slice(0, maxChars).join("").trim();
}

/** @param {unknown} condition */
function must(condition) {
  if (!condition) throw new TypeError("This is no message of a shopping list.");
}

/** @param {unknown} text @param {number} maxChars */
function isText(text, maxChars) {
  return typeof text === "string" && text.length <= 2 * maxChars && [...text].length <= maxChars && !UNPRINTABLE.test(text);
}

/** @param {any} record */
function checkRecord(record) {
  must(typeof record === "object" && record !== null);
  must(typeof record.id === "string" && ID.test(record.id) && typeof record.by === "string" && ID.test(record.by));
  must(Number.isInteger(record.updatedAt) && record.updatedAt >= 0 && record.updatedAt <= MAX_AT);
  must(typeof record.deleted === "boolean");
}

/** Return a list as it may be kept; throw TypeError. @param {any} value @returns {List} */
export function checkList(value) {
  checkRecord(value);
  const { id, name, updatedAt, by, deleted } = value;
  must(isText(name, MAX_NAME_CHARS) && (name || deleted));
  return { id, name, updatedAt, by, deleted };
}

/** Return an item as it may be kept; throw TypeError. @param {any} value @returns {Item} */
export function checkItem(value) {
  checkRecord(value);
  const { id, list, text, quantity, done, updatedAt, by, deleted } = value;
  must(typeof list === "string" && ID.test(list) && typeof done === "boolean");
  must(isText(text, MAX_TEXT_CHARS) && isText(quantity, MAX_QUANTITY_CHARS) && (text || deleted));
  return { id, list, text, quantity, done, updatedAt, by, deleted };
}

/** Return a message that came; null for a type of later versions; throw TypeError. @param {unknown} text @returns {Message | null} */
export function readMessage(text) {
  must(typeof text === "string" && text.length <= MAX_MESSAGE_CHARS);
  let message;
  try {
    message = JSON.parse(/** @type {string} */ (text));
  } catch {
    must(false);
  }
  must(typeof message === "object" && message !== null && typeof message.type === "string");
  const { type, number } = message;
  if (!["changes", "ack", "bye"].includes(type)) return null;
  must(Number.isSafeInteger(number) && number > 0);
  if (type === "ack") return { type, number };
  if (type === "bye") return { type, number, delete: message.delete === true };
  const { lists, items } = message;
  must(Array.isArray(lists) && Array.isArray(items) && lists.length + items.length <= MAX_RECORDS);
  return { type, number, lists: lists.map(checkList), items: items.map(checkItem) };
}

/** Return messages that carry all these changes, lists before their items. @param {Changes} changes */
export function writeChanges({ lists, items }) {
  /** @type {Changes[]} */
  const parts = [];
  let room = 0;
  for (const [kind, record] of /** @type {["lists" | "items", any][]} */ (
    [...lists.map((list) => ["lists", list]), ...items.map((item) => ["items", item])])) {
    const octets = new TextEncoder().encode(JSON.stringify(record)).length + 1;
    const part = parts.at(-1);
    if (!part || octets > room || part.lists.length + part.items.length >= MAX_RECORDS) {
      parts.push({ lists: [], items: [] });
      room = MESSAGE_BYTES;
    }
    /** @type {any[]} */ (/** @type {Changes} */ (parts.at(-1))[kind]).push(record);
    room -= octets;
  }
  return parts.length ? parts : [{ lists: [], items: [] }];
}

// ---------------------------------------------------------------------------------------
// The model.
// ---------------------------------------------------------------------------------------

/** @param {{updatedAt: number, by: string}} one @param {{updatedAt: number, by: string}} other */
export function isNewer(one, other) {
  return one.updatedAt === other.updatedAt ? one.by > other.by : one.updatedAt > other.updatedAt;
}

/** @param {number} count of random characters, 6 bits each */
export function randomId(count = 11) {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  return Array.from(crypto.getRandomValues(new Uint8Array(count)), (octet) => letters[octet & 63]).join("");
}

/** Is thrown, with a sentence for the user, where a list can hold no more. */
export class FullError extends Error {}

export class Model {
  /** @param {{device: string, now?: () => number, makeId?: () => string}} options */
  constructor({ device, now = Date.now, makeId = randomId }) {
    this.device = device;
    /** @type {Map<string, List>} */
    this.lists = new Map();
    /** @type {Map<string, Item>} */
    this.items = new Map();
    this._now = now;
    this._makeId = makeId;
    this._lastAt = 0;
  }

  // -- What is there -------------------------------------------------------------------

  /** Return the lists that are not deleted, in the order in which they were made. */
  openLists() {
    return [...this.lists.values()].filter((list) => !list.deleted).sort(byId);
  }

  /** Return the items of a list that are not deleted, in the order in which they were added. @param {string} list */
  itemsOf(list) {
    return [...this.items.values()].filter((item) => item.list === list && !item.deleted).sort(byId);
  }

  /** Return all that is known of these lists, tombstones too. @param {Iterable<string>} ids @returns {Changes} */
  allOf(ids) {
    const wanted = new Set(ids);
    return {
      lists: [...this.lists.values()].filter(({ id }) => wanted.has(id)),
      items: [...this.items.values()].filter(({ list }) => wanted.has(list)),
    };
  }

  // -- Changes of the user: each returns the record, to be kept and sent ----------------

  /** @param {string} name @returns {List} */
  addList(name) {
    if (this.lists.size >= MAX_LISTS) throw new FullError("There are too many lists: delete one first.");
    return this._setList({ id: this._newId(), name, updatedAt: 0, by: "", deleted: false });
  }

  /** @param {string} id @param {Partial<Pick<List, "name" | "deleted">>} changes @returns {List} */
  changeList(id, changes) {
    return this._setList({ .../** @type {List} */ (this.lists.get(id)), ...changes });
  }

  /** @param {string} list @param {string} text @param {string} quantity @returns {Item} */
  addItem(list, text, quantity) {
    if (this._countOf(list) >= MAX_ITEMS) throw new FullError("This list is full: go on with a new one.");
    return this._setItem({ id: this._newId(), list, text, quantity, done: false, updatedAt: 0, by: "", deleted: false });
  }

  /** @param {string} id @param {Partial<Pick<Item, "text" | "quantity" | "done" | "deleted">>} changes @returns {Item} */
  changeItem(id, changes) {
    return this._setItem({ .../** @type {Item} */ (this.items.get(id)), ...changes });
  }

  // -- Changes from elsewhere -----------------------------------------------------------

  /**
   * Take what is newer, and return that. `mayWrite` says which lists the sender may change or add; items without their
   * list are left out, and an item never moves to another list.
   * @param {Changes} changes @param {(list: string, isNew: boolean) => boolean} [mayWrite] @returns {Changes}
   */
  merge({ lists, items }, mayWrite = () => true) {
    return {
      lists: lists.filter((list) => mayWrite(list.id, !this.lists.has(list.id)) && this._mergeList(list)),
      items: items.filter((item) => this.lists.has(item.list) && mayWrite(item.list, false) && this._mergeItem(item)),
    };
  }

  /** Forget lists here, without a tombstone: the others keep them. @param {Iterable<string>} ids */
  forget(ids) {
    const gone = this.allOf(ids);
    for (const { id } of gone.lists) this.lists.delete(id);
    for (const { id } of gone.items) this.items.delete(id);
    return gone;
  }

  /** Forget tombstones that everybody has seen by now, and return them. */
  purge() {
    const until = this._now() - TOMBSTONE_MS;
    const old = [...this.items.values()].filter(({ deleted, updatedAt }) => deleted && updatedAt < until);
    for (const { id } of old) this.items.delete(id);
    return old;
  }

  // -- Inside ---------------------------------------------------------------------------

  /** @param {List} list */
  _mergeList(list) {
    const known = this.lists.get(list.id);
    if (known ? !isNewer(list, known) : this.lists.size >= MAX_LISTS) return false;
    this.lists.set(list.id, list);
    return true;
  }

  /** @param {Item} item */
  _mergeItem(item) {
    const known = this.items.get(item.id);
    if (known ? known.list !== item.list || !isNewer(item, known) : this._countOf(item.list) >= MAX_ITEMS) return false;
    this.items.set(item.id, item);
    return true;
  }

  /** @param {List} list */
  _setList(list) {
    const changed = this._stamp(list);
    this.lists.set(changed.id, changed);
    return changed;
  }

  /** @param {Item} item */
  _setItem(item) {
    const changed = this._stamp(item);
    this.items.set(changed.id, changed);
    return changed;
  }

  /**
   * What a user changes is newer than what he saw, whatever the clocks say; but one record with a time far ahead does
   * not take the others along.
   * @template {List | Item} T @param {T} record @returns {T}
   */
  _stamp(record) {
    this._lastAt = Math.max(this._now(), this._lastAt + 1);
    const updatedAt = Math.min(MAX_AT, Math.max(this._lastAt, record.updatedAt + 1));
    return { ...record, updatedAt, by: this.device };
  }

  /** Begins with the time, so that the order of ids is that of making. */
  _newId() {
    return `${this._now().toString(36).padStart(9, "0")}-${this._makeId()}`;
  }

  /** @param {string} list */
  _countOf(list) {
    let count = 0;
    for (const item of this.items.values()) count += Number(item.list === list);
    return count;
  }
}

/** @param {{id: string}} one @param {{id: string}} other */
const byId = (one, other) => (one.id < other.id ? -1 : 1);
