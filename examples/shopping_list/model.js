// @ts-check
/**
 * The lists and their items: what a change is, what may come from others, and which of two
 * versions wins. Pure: the clock and chance are handed in, nothing is written or sent. peer.py
 * has the same rules.
 *
 * Every record carries `updatedAt` (milliseconds of the device that changed it) and `by` (that
 * device): the larger pair wins, everywhere. What is deleted stays as a tombstone, so that a
 * device that was away does not bring it back.
 *
 * No honest clock is more than a day ahead: contacts whose clocks differ by more do not even
 * connect. A time beyond that would win over every later change. So such a record changes nothing
 * that is there, and one that is new, or was kept before this rule, gets the present time.
 * @module
 */

// Tombstones included.
export const MAX_LISTS = 200;
// How many a contact may add here.
export const MAX_LISTS_OF_CONTACT = 50;
// Of a list, tombstones included: about 400 KB to sync.
export const MAX_ITEMS = 2_000;
// In all lists that are shared with a contact, tombstones included: the two tell each other all of
// them whenever they connect. Beyond that the contact adds nothing. The user still may.
export const MAX_ITEMS_OF_CONTACT = 10_000;
// The same in bytes, the lists among them, with RECORD_BYTES for what is not text.
export const MAX_BYTES_OF_CONTACT = 4_000_000;
const RECORD_BYTES = 200;
export const MAX_NAME_CHARS = 60;
export const MAX_TEXT_CHARS = 200;
export const MAX_QUANTITY_CHARS = 20;
// Milliseconds: the form. What may be taken is MAX_AHEAD_MS.
export const MAX_AT = 2 ** 52;
// By how much the time of a change may be ahead of this device's clock: a day, as in PROTOCOL.md.
export const MAX_AHEAD_MS = 86_400_000;
// 2026-11-23. A clock that shows less is not set, and judges nobody's times.
const CLOCK_SET_MS = 1_795_392_000_000;
// A device that was away for longer may bring deleted things back.
const TOMBSTONE_MS = 365 * 86_400_000;

// The most that a channel carries.
const MAX_MESSAGE_CHARS = 65_536;
// How much JSON we put in one message.
const MESSAGE_BYTES = 48_000;
// In a message.
const MAX_RECORDS = 500;
// Of arrays and objects in a message. Ours have 3. What reads JSON may follow each level on the
// stack, and a message has room for 65,536. PROTOCOL.md has the same bound.
export const MAX_LEVELS = 100;

/**
 * @typedef {{id: string, name: string, updatedAt: number, by: string, deleted: boolean}} List
 * @typedef {{id: string, list: string, text: string, quantity: string, done: boolean,
 *   updatedAt: number, by: string, deleted: boolean}} Item
 * @typedef {{lists: List[], items: Item[]}} Changes
 * @typedef {{items: number, bytes: number, refused: number}} Room what a contact may still add, and
 *   how many lists and items found no room
 * @typedef {{type: "changes", number: number, lists: List[], items: Item[]}
 *   | {type: "ack", number: number, refused: number}
 *   | {type: "bye", number: number, delete: boolean}} Message
 */

// ---------------------------------------------------------------------------------------
// What comes from outside: checked member by member, copied, or thrown away whole.
// ---------------------------------------------------------------------------------------

const ID = /^[\w-]{8,40}$/;
// Nor characters that change the direction of text.
const UNPRINTABLE = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]/u;

/**
 * Text that a person typed, as it may be kept.
 * @param {string} text
 * @param {number} maxChars
 */
export function tidy(text, maxChars) {
  const clean = text.replace(new RegExp(UNPRINTABLE, "gu"), " ").replace(/\s+/g, " ").trim();
  return [...clean].slice(0, maxChars).join("").trim();
}

/** @param {unknown} condition */
function must(condition) {
  if (!condition) throw new TypeError("This is no message of a shopping list.");
}

/**
 * @param {unknown} text
 * @param {number} maxChars
 */
function isText(text, maxChars) {
  return (
    typeof text === "string" &&
    text.length <= 2 * maxChars &&
    [...text].length <= maxChars &&
    !UNPRINTABLE.test(text)
  );
}

/** @param {any} record */
function checkRecord(record) {
  must(typeof record === "object" && record !== null);
  must(
    typeof record.id === "string" &&
      ID.test(record.id) &&
      typeof record.by === "string" &&
      ID.test(record.by),
  );
  must(Number.isInteger(record.updatedAt) && record.updatedAt >= 0 && record.updatedAt <= MAX_AT);
  must(typeof record.deleted === "boolean");
}

/**
 * Return a list as it may be kept; throw TypeError.
 * @param {any} value
 * @returns {List}
 */
export function checkList(value) {
  checkRecord(value);
  const { id, name, updatedAt, by, deleted } = value;
  must(isText(name, MAX_NAME_CHARS) && (name || deleted));
  return { id, name, updatedAt, by, deleted };
}

/**
 * Return an item as it may be kept; throw TypeError.
 * @param {any} value
 * @returns {Item}
 */
export function checkItem(value) {
  checkRecord(value);
  const { id, list, text, quantity, done, updatedAt, by, deleted } = value;
  must(typeof list === "string" && ID.test(list) && typeof done === "boolean");
  must(isText(text, MAX_TEXT_CHARS) && isText(quantity, MAX_QUANTITY_CHARS) && (text || deleted));
  return { id, list, text, quantity, done, updatedAt, by, deleted };
}

const STRING = /"[^"\\]*(?:\\[^][^"\\]*)*"?/g;
const NO_BRACKETS = /[^\][{}]+/g;

/**
 * Say whether JSON has more than MAX_LEVELS. A look comes before it is read.
 * @param {string} text
 */
function isDeep(text) {
  let levels = 0;
  for (const bracket of text.replace(STRING, "").replace(NO_BRACKETS, "")) {
    levels += "[{".includes(bracket) ? 1 : -1;
    if (levels > MAX_LEVELS) return true;
  }
  return false;
}

/**
 * Return a message that came; null for a type of later versions; throw TypeError.
 * @param {unknown} text
 * @returns {Message | null}
 */
export function readMessage(text) {
  must(typeof text === "string" && text.length <= MAX_MESSAGE_CHARS && !isDeep(text));
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
  if (type === "ack") {
    // An earlier version did not say it.
    const { refused = 0 } = message;
    must(Number.isSafeInteger(refused) && refused >= 0 && refused <= MAX_RECORDS);
    return { type, number, refused };
  }
  if (type === "bye") return { type, number, delete: message.delete === true };
  const { lists, items } = message;
  must(
    Array.isArray(lists) && Array.isArray(items) && lists.length + items.length <= MAX_RECORDS,
  );
  return { type, number, lists: lists.map(checkList), items: items.map(checkItem) };
}

/**
 * Return messages that carry all these changes, lists before their items.
 * @param {Changes} changes
 */
export function writeChanges({ lists, items }) {
  /** @type {Changes[]} */
  const parts = [];
  let room = 0;
  for (const [kind, record] of /** @type {["lists" | "items", any][]} */ ([
    ...lists.map((list) => ["lists", list]),
    ...items.map((item) => ["items", item]),
  ])) {
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

/**
 * @param {{updatedAt: number, by: string}} one
 * @param {{updatedAt: number, by: string}} other
 */
export function isNewer(one, other) {
  return one.updatedAt === other.updatedAt ? one.by > other.by : one.updatedAt > other.updatedAt;
}

/**
 * Return about how many bytes a list or an item takes.
 * @param {List | Item} record
 */
function bytesOf(record) {
  const words = "name" in record ? record.name : record.text + record.quantity;
  return RECORD_BYTES + UTF8.encode(words).length;
}

const UTF8 = new TextEncoder();

/** @returns {Room} */
const unbounded = () => ({ items: Infinity, bytes: Infinity, refused: 0 });

/** @param {number} count of random characters, 6 bits each */
export function randomId(count = 11) {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  return Array.from(
    crypto.getRandomValues(new Uint8Array(count)),
    (octet) => letters[octet & 63],
  ).join("");
}

/** A list can hold no more; the message is a sentence for the user. */
export class FullError extends Error {}

/** What is to be changed is not there any more; the message is a sentence for the user. */
export class GoneError extends Error {}
export const LIST_GONE = "This list is no longer here: somebody has deleted it.";
export const ITEM_GONE = "This is no longer on the list: somebody has deleted it.";

export class Model {
  /** @param {{device: string, now?: () => number, makeId?: () => string}} options */
  constructor({ device, now = Date.now, makeId = randomId }) {
    this.device = device;
    /** @type {Map<string, List>} */
    this.lists = new Map();
    /** @type {Map<string, Item>} */
    this.items = new Map();
    // The same by their list: no change of one item looks at all others.
    /** @type {Map<string, Map<string, Item>>} */
    this._byList = new Map();
    /** @type {Map<string, number>} */
    this._bytes = new Map();
    this._now = now;
    this._makeId = makeId;
    this._lastAt = 0;
  }

  // -- What is there -------------------------------------------------------------------

  /** Return the lists that are not deleted, in the order in which they were made. */
  openLists() {
    return [...this.lists.values()].filter((list) => !list.deleted).sort(byId);
  }

  /**
   * Return the items of a list that are not deleted, in the order in which they were added.
   * @param {string} list
   */
  itemsOf(list) {
    return [...this._of(list).values()].filter((item) => !item.deleted).sort(byId);
  }

  /**
   * Return how many items of a list are still to buy.
   * @param {string} list
   */
  openCountOf(list) {
    let count = 0;
    for (const { deleted, done } of this._of(list).values()) count += Number(!deleted && !done);
    return count;
  }

  /**
   * Return all that is known of these lists, tombstones too.
   * @param {Iterable<string>} ids
   * @returns {Changes}
   */
  allOf(ids) {
    const wanted = [...new Set(ids)];
    return {
      lists: wanted.flatMap((id) => this.lists.get(id) ?? []),
      items: wanted.flatMap((id) => [...this._of(id).values()]),
    };
  }

  /**
   * Return what a contact may still add to the lists that are shared with it.
   * @param {Iterable<string>} ids
   * @returns {Room}
   */
  roomIn(ids) {
    const room = { items: MAX_ITEMS_OF_CONTACT, bytes: MAX_BYTES_OF_CONTACT, refused: 0 };
    for (const id of ids) {
      room.items -= this._of(id).size;
      room.bytes -= this._bytes.get(id) ?? 0;
    }
    return room;
  }

  // -- Changes of the user: each returns the record, to be kept and sent ----------------
  // What a contact had forgotten in the meantime is not there to be changed: GoneError.

  /**
   * @param {string} name
   * @returns {List}
   */
  addList(name) {
    if (this.lists.size >= MAX_LISTS) {
      throw new FullError("There are too many lists: delete one first.");
    }
    return this._setList({ id: this._newId(), name, updatedAt: 0, by: "", deleted: false });
  }

  /**
   * @param {string} id
   * @param {Partial<Pick<List, "name" | "deleted">>} changes
   * @returns {List}
   */
  changeList(id, changes) {
    const list = this.lists.get(id);
    if (!list) throw new GoneError(LIST_GONE);
    return this._setList({ ...list, ...changes });
  }

  /**
   * @param {string} list
   * @param {string} text
   * @param {string} quantity
   * @returns {Item}
   */
  addItem(list, text, quantity) {
    if (!this.lists.has(list)) throw new GoneError(LIST_GONE);
    if (this._of(list).size >= MAX_ITEMS) {
      throw new FullError("This list is full: go on with a new one.");
    }
    return this._setItem({
      id: this._newId(),
      list,
      text,
      quantity,
      done: false,
      updatedAt: 0,
      by: "",
      deleted: false,
    });
  }

  /**
   * @param {string} id
   * @param {Partial<Pick<Item, "text" | "quantity" | "done" | "deleted">>} changes
   * @returns {Item}
   */
  changeItem(id, changes) {
    const item = this.items.get(id);
    if (!item) throw new GoneError(ITEM_GONE);
    return this._setItem({ ...item, ...changes });
  }

  // -- Changes from elsewhere -----------------------------------------------------------

  /**
   * Take what is newer, and return that. `mayWrite` says which lists the sender may change or
   * add, and `room` what still fits: it is used up. Items without their list are left out, and an
   * item never moves to another list.
   * @param {Changes} changes
   * @param {(list: string, isNew: boolean) => boolean} [mayWrite]
   * @param {Room} [room]
   * @returns {Changes}
   */
  merge({ lists, items }, mayWrite = () => true, room = unbounded()) {
    /** @type {Changes} */
    const taken = { lists: [], items: [] };
    for (const list of lists) {
      const isNew = !this.lists.has(list.id);
      if (!mayWrite(list.id, isNew)) {
        room.refused += 1;
        continue;
      }
      const merged = this._mergeList(list, room);
      if (merged) taken.lists.push(merged);
    }
    for (const item of items) {
      if (!this.lists.has(item.list) || !mayWrite(item.list, false)) {
        room.refused += 1;
        continue;
      }
      const merged = this._mergeItem(item, room);
      if (merged) taken.items.push(merged);
    }
    return taken;
  }

  /**
   * Take what this device has kept, and return what was healed: records with a time that no clock
   * can have had.
   * @param {Changes} kept
   * @returns {Changes}
   */
  load(kept) {
    const taken = this.merge(kept);
    const before = new Map([...kept.lists, ...kept.items].map((one) => [one.id, one.updatedAt]));
    const isHealed = (/** @type {List | Item} */ one) => before.get(one.id) !== one.updatedAt;
    return { lists: taken.lists.filter(isHealed), items: taken.items.filter(isHealed) };
  }

  /**
   * Forget lists here, without a tombstone: the others keep them.
   * @param {Iterable<string>} ids
   */
  forget(ids) {
    const gone = this.allOf(ids);
    for (const list of gone.lists) {
      this.lists.delete(list.id);
      this._note(list.id, -bytesOf(list));
    }
    for (const item of gone.items) this._dropItem(item);
    return gone;
  }

  /** Forget tombstones that everybody has seen by now, and return them. */
  purge() {
    const until = this._now() - TOMBSTONE_MS;
    const old = [...this.items.values()].filter(
      ({ deleted, updatedAt }) => deleted && updatedAt < until,
    );
    for (const item of old) this._dropItem(item);
    return old;
  }

  // -- Inside ---------------------------------------------------------------------------

  /**
   * Return what is kept of a list that came, or null if it changes nothing or has no room.
   * @param {List} list
   * @param {Room} room
   */
  _mergeList(list, room) {
    const known = this.lists.get(list.id);
    if (known && !this._isNews(known, list, room)) return null;
    if (!known && this.lists.size >= MAX_LISTS) {
      room.refused += 1;
      return null;
    }
    const bytes = bytesOf(list) - (known ? bytesOf(known) : 0);
    // What takes no more than before always has room.
    if (bytes > 0 && room.bytes < bytes) {
      room.refused += 1;
      return null;
    }
    room.bytes -= bytes;
    return this._keepList(this._healed(list));
  }

  /**
   * Return what is kept of an item that came, or null if it changes nothing or has no room.
   * @param {Item} item
   * @param {Room} room
   */
  _mergeItem(item, room) {
    const known = this.items.get(item.id);
    if (known && known.list !== item.list) {
      room.refused += 1;
      return null;
    }
    if (known && !this._isNews(known, item, room)) return null;
    const isFull = !known && this._of(item.list).size >= MAX_ITEMS;
    const items = known ? 0 : 1;
    const bytes = bytesOf(item) - (known ? bytesOf(known) : 0);
    // What takes no more than before always has room.
    if (isFull || (items && room.items < items) || (bytes > 0 && room.bytes < bytes)) {
      room.refused += 1;
      return null;
    }
    room.items -= items;
    room.bytes -= bytes;
    return this._keepItem(this._healed(item));
  }

  /**
   * Return whether a record is to replace what is known. Count it if it never may.
   * @param {List | Item} known
   * @param {List | Item} record
   * @param {Room} room
   */
  _isNews(known, record, room) {
    if (this._isAhead(record)) {
      room.refused += 1;
      return false;
    }
    return isNewer(record, known);
  }

  /** @param {List | Item} record */
  _isAhead(record) {
    const now = this._now();
    return now >= CLOCK_SET_MS && record.updatedAt > now + MAX_AHEAD_MS;
  }

  /**
   * @template {List | Item} T
   * @param {T} record
   * @returns {T}
   */
  _healed(record) {
    return this._isAhead(record) ? { ...record, updatedAt: this._now() } : record;
  }

  /** @param {List} list */
  _keepList(list) {
    const known = this.lists.get(list.id);
    this._note(list.id, bytesOf(list) - (known ? bytesOf(known) : 0));
    this.lists.set(list.id, list);
    return list;
  }

  /** @param {Item} item */
  _keepItem(item) {
    const known = this.items.get(item.id);
    const growth = bytesOf(item) - (known ? bytesOf(known) : 0);
    this.items.set(item.id, item);
    this._byList.set(item.list, this._of(item.list).set(item.id, item));
    this._note(item.list, growth);
    return item;
  }

  /** @param {Item} item */
  _dropItem(item) {
    this.items.delete(item.id);
    this._of(item.list).delete(item.id);
    this._note(item.list, -bytesOf(item));
  }

  /**
   * Note that a list takes so many bytes more.
   * @param {string} list
   * @param {number} bytes
   */
  _note(list, bytes) {
    this._bytes.set(list, (this._bytes.get(list) ?? 0) + bytes);
  }

  /**
   * Return the items of a list, tombstones too.
   * @param {string} list
   * @returns {Map<string, Item>}
   */
  _of(list) {
    return this._byList.get(list) ?? new Map();
  }

  /** @param {List} list */
  _setList(list) {
    return this._keepList(this._stamp(list));
  }

  /** @param {Item} item */
  _setItem(item) {
    return this._keepItem(this._stamp(item));
  }

  /**
   * What users change is newer than what they saw, whatever the clocks say; but one record with a
   * time ahead does not take the others along.
   * @template {List | Item} T
   * @param {T} record
   * @returns {T}
   */
  _stamp(record) {
    this._lastAt = Math.max(this._now(), this._lastAt + 1);
    const updatedAt = Math.max(this._lastAt, record.updatedAt + 1);
    return { ...record, updatedAt, by: this.device };
  }

  /** It begins with the time, so that ids are in the order of their making. */
  _newId() {
    return `${this._now().toString(36).padStart(9, "0")}-${this._makeId()}`;
  }
}

/**
 * @param {{id: string}} one
 * @param {{id: string}} other
 */
const byId = (one, other) => (one.id < other.id ? -1 : 1);
