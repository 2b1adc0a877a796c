// @ts-check
/**
 * All that has to do with other people: the one file that uses connectoid.js.
 *
 * On a channel both say all that they know of the lists they share, in messages of model.js, then what changes; each
 * message is acknowledged, so that "up to date" is known and not guessed. When nothing has happened for a while they
 * disconnect, and the next change connects them again.
 *
 * Contacts have a random id as their name in Connectoid, so that a nickname can be changed and never leaves the device.
 * @module
 */

import { Connectoid, EMOJI, Store, StoreError, makeLink, readLink } from "./lib.js";
import { MAX_LISTS_OF_CONTACT, randomId, readMessage, writeChanges } from "./model.js";

const IDLE_MS = 20_000; // without a message: disconnect, to save the battery
const BYE_MS = 2_000; // for the other app to say that it has read our last wish
const LOCK_AGAIN_MS = 3_000; // while another tab has the contacts
const LONG_AWAY_MS = 600_000; // a page that was hidden for so long asks everybody
const MAX_REFUSED = 20; // bad messages on one channel

/**
 * What is kept of a contact here; keys and the like are Connectoid's. `lists` are shared with it, those in `theirs` came
 * from it. `pending` is true while it lacks a change. `syncedAt` is when it last had all.
 * @typedef {{id: string, nickname: string, lists: string[], theirs: string[], pending: boolean, syncedAt: number,
 *   warned: boolean, deleted: boolean}} Person
 * @typedef {{channel: any, number: number, acknowledged: number, refused: number, timer: any}} Session
 * @typedef {import("./model.js").Changes} Changes
 */

export class Sync {
  /**
   * @param {object} parts
   * @param {import("./model.js").Model} parts.model
   * @param {(put: Record<string, any[]>, remove?: Record<string, string[]>) => Promise<void>} parts.write
   * @param {() => Promise<Person[]>} parts.load what is kept of people
   * @param {string} parts.appUrl that links lead to
   * @param {() => void} parts.onChange something is to be drawn anew
   * @param {(words: string) => void} parts.onNews a sentence for the user, once
   */
  constructor({ model, write, load, appUrl, onChange, onNews }) {
    this._trouble = "";
    /** @type {Map<string, boolean>} */
    this._answers = new Map(); // whether a relay did when it was last asked
    this.blocked = ""; // why there are no contacts now, in a sentence
    this._model = model;
    this._write = write;
    this._load = load;
    /** @type {Map<string, Person>} */
    this._people = new Map();
    this._appUrl = appUrl;
    this._onChange = onChange;
    this._onNews = onNews;
    /** @type {Map<string, Session>} */
    this._sessions = new Map();
    /** @type {Map<string, string>} */
    this._lastEvent = new Map();
    /** @type {[string, string | null][]} */
    this._relays = [];
    /** @type {any} */
    this._lib = null;
    this._hiddenAt = 0;
  }

  /** Begin, or say in `blocked` why not; try again while another tab has the contacts. */
  async start() {
    if (!globalThis.RTCPeerConnection) {
      this.blocked = "This browser cannot connect to others: its WebRTC is off. Turn it on, or use another browser.";
      return this._onChange();
    }
    try {
      const store = await Store.open();
      for (const person of await this._load()) this._people.set(person.id, person);
      const lib = new Connectoid(store, this._relays, {
        onEvent: (id, event) => this._heard(id, event),
        onProblem: (error) => this._troubled(error),
        fetch: (...request) => this._fetch(...request),
      });
      await lib.start();
      this._lib = lib;
      this.blocked = "";
    } catch (/** @type {any} */ error) {
      this.blocked = error.message;
      if (error instanceof StoreError && /another tab/.test(error.message)) setTimeout(() => this.start(), LOCK_AGAIN_MS);
      return this._onChange();
    }
    this._matchPeople();
    document.addEventListener("visibilitychange", () => this._seen());
    for (const id of this._people.keys()) this._reach(id);
    this._onChange();
  }

  // -- What the user does ---------------------------------------------------------------

  /** Use these relays for new contacts. @param {string[]} urls @param {string} key of all, or "" */
  setRelays(urls, key) {
    this._relays = urls.map((url) => [url, key || null]);
    if (this._lib) this._lib.relays = this._relays;
  }

  /** Return a link for somebody new. @param {string} nickname @param {string[]} lists */
  async share(nickname, lists) {
    const person = await this._addPerson(nickname, lists);
    try {
      const link = await this._lib.share(person.id, this._appUrl);
      this._onChange();
      return link;
    } catch (error) {
      await this._removePerson(person.id);
      throw error;
    }
  }

  /** Throw an error with a sentence for the user if this is no link that can be opened. @param {string} link */
  checkLink(link) {
    readLink(link);
  }

  /** Connect with whoever made the link, after the user has confirmed. @param {string} link @param {string} nickname */
  async open(link, nickname) {
    const person = await this._addPerson(nickname, []);
    try {
      await this._lib.open(link, person.id);
    } catch (error) {
      await this._removePerson(person.id);
      throw error;
    }
    if (!this._kept(person.id)) await this._removePerson(person.id); // opened before: that contact goes on
    this._onChange();
  }

  /** Share one more list with a contact. @param {string} id @param {string} list */
  async shareToo(id, list) {
    const person = this._person(id);
    await this._update(id, { lists: [...new Set([...person.lists, list])], pending: true });
    this._say(id, this._model.allOf([list]));
  }

  /** @param {string} id @param {string} nickname */
  rename(id, nickname) {
    return this._update(id, { nickname });
  }

  /** @param {string} id @param {boolean} same */
  async verify(id, same) {
    await this._lib.verify(id, { same });
    this._onChange();
  }

  /**
   * End it, and tell the other app; if the two are connected, it is asked to delete its copy of our lists.
   * @param {string} id @param {{deleteThere: boolean, deleteHere: boolean}} choice
   */
  async unshare(id, { deleteThere, deleteHere }) {
    if (deleteThere) await this._sayBye(id);
    if (this._kept(id)?.state !== "ended") await this._lib.unshare(id);
    await this.dismiss(id, { deleteHere });
  }

  /** Take a contact that has ended off the list. @param {string} id @param {{deleteHere: boolean}} choice */
  async dismiss(id, { deleteHere }) {
    if (deleteHere) await this._forgetListsOf(id);
    if (this._kept(id)?.state === "ended") await this._lib.forget(id);
    await this._removePerson(id);
  }

  /**
   * Tell those who share these lists what has changed; another tab that has the contacts does it for this one.
   * @param {Changes} changes @param {string} [except] who said it
   */
  changed(changes, except = "") {
    if (!this._lib) return;
    const lists = new Set([...changes.lists.map(({ id }) => id), ...changes.items.map(({ list }) => list)]);
    for (const { id, lists: shared } of this._people.values()) {
      if (id === except || !shared.some((list) => lists.has(list))) continue;
      this._update(id, { pending: true });
      this._say(id, {
        lists: changes.lists.filter((list) => shared.includes(list.id)),
        items: changes.items.filter(({ list }) => shared.includes(list)),
      });
    }
  }

  /** Return what there is to show of all contacts. */
  people() {
    const order = [...this._people.values()].sort((one, other) => one.nickname.localeCompare(other.nickname));
    return order.map((person) => this._view(person));
  }

  // -- What Connectoid says -----------------------------------------------------------

  /** @param {string} id @param {string} event */
  async _heard(id, event) {
    if (!this._people.has(id)) return;
    const name = this._person(id).nickname;
    this._lastEvent.set(id, event);
    if (event === "connected") await this._serve(id);
    if (event === "paired") this._onNews(`${name} is connected with you now.`);
    if (event === "opened_twice") await this._update(id, { warned: true });
    if (event === "unshared") this._onNews(`${name} has ended the sharing.`);
    this._onChange();
  }

  /** @param {any} error */
  _troubled(error) {
    for (const url of this._answers.keys()) if (error.message.startsWith(url)) this._answers.set(url, false);
    this._trouble = error.message.replace(/( cannot be reached): .*/s, "$1."); // the rest is for who knows browsers
    this._onChange();
  }

  /** What is wrong with the relays: nothing, as long as one of them answers. */
  get relayTrouble() {
    return [...this._answers.values()].includes(true) ? "" : this._trouble;
  }

  /** @param {RequestInfo | URL} url @param {RequestInit} [init] */
  async _fetch(url, init) {
    const before = this.relayTrouble;
    try {
      const response = await fetch(url, init);
      this._answers.set(String(url), response.ok);
      return response;
    } catch (error) {
      if (!init?.signal?.aborted) this._answers.set(String(url), false);
      throw error;
    } finally {
      if (this.relayTrouble !== before) this._onChange();
    }
  }

  // -- A channel ------------------------------------------------------------------------

  /** Want a connection with a contact that may take one. @param {string} id */
  _reach(id) {
    if (this._kept(id)?.state === "paired") this._lib.connect(id, { timeoutS: 0 }).catch(() => {}); // the event tells
  }

  /** @param {string} id */
  async _serve(id) {
    const channel = await this._lib.connect(id, { timeoutS: 0 }).catch(() => null);
    if (!channel || this._sessions.get(id)?.channel === channel) return;
    /** @type {Session} */
    const session = { channel, number: 0, acknowledged: 0, refused: 0, timer: 0 };
    this._sessions.set(id, session);
    channel.listen((/** @type {any} */ message) => this._came(id, session, message));
    this._say(id, this._model.allOf(this._person(id).lists));
  }

  /** @param {string} id @param {Changes} changes */
  _say(id, changes) {
    const session = this._sessions.get(id);
    if (!session) return this._reach(id);
    for (const part of writeChanges(changes)) this._send(id, session, { type: "changes", number: ++session.number, ...part });
  }

  /** @param {string} id @param {Session} session @param {import("./model.js").Message} message */
  _send(id, session, message) {
    this._rest(id, session);
    session.channel.send(JSON.stringify(message)).catch(() => {}); // it is closed, and will say so
  }

  /** @param {string} id @param {Session} session @param {any} text */
  async _came(id, session, text) {
    if (text === null) return this._ended(id, session);
    this._rest(id, session);
    let message;
    try {
      message = readMessage(text);
    } catch {
      session.refused += 1;
      if (session.refused > MAX_REFUSED) session.channel.close();
      return;
    }
    if (message?.type === "ack") await this._acknowledged(id, session, message.number);
    if (message?.type === "changes") await this._take(id, message);
    if (message?.type === "bye" && message.delete) await this._obey(id);
    if (message && message.type !== "ack") this._send(id, session, { type: "ack", number: message.number });
  }

  /** @param {string} id @param {Changes} changes */
  async _take(id, changes) {
    const person = this._people.get(id);
    if (!person) return;
    const [lists, theirs] = [new Set(person.lists), new Set(person.theirs)];
    const merged = this._model.merge(changes, (list, isNew) => {
      if (isNew && theirs.size < MAX_LISTS_OF_CONTACT) [lists, theirs].forEach((set) => set.add(list));
      return lists.has(list);
    });
    if (lists.size > person.lists.length) await this._update(id, { lists: [...lists], theirs: [...theirs] });
    if (merged.lists.length + merged.items.length === 0) return;
    await this._write({ lists: merged.lists, items: merged.items });
    this.changed(merged, id);
    this._onChange();
  }

  /** @param {string} id @param {Session} session @param {number} number */
  async _acknowledged(id, session, number) {
    session.acknowledged = Math.max(session.acknowledged, number);
    if (session.acknowledged >= session.number) await this._update(id, { pending: false, syncedAt: Date.now() });
  }

  /** Disconnect after a while of silence; one that owes us a reply is gone. @param {string} id @param {Session} session */
  _rest(id, session) {
    clearTimeout(session.timer);
    session.timer = setTimeout(() => session.channel.close(), IDLE_MS);
  }

  /** @param {string} id @param {Session} session */
  _ended(id, session) {
    clearTimeout(session.timer);
    if (this._sessions.get(id) !== session) return;
    this._sessions.delete(id);
    if (this._people.get(id)?.pending) this._reach(id);
    this._onChange();
  }

  /** Ask the other app to delete its copy, if it is there. @param {string} id */
  async _sayBye(id) {
    const session = this._sessions.get(id);
    if (!session) return;
    const number = ++session.number;
    this._send(id, session, { type: "bye", number, delete: true });
    for (let waitedMs = 0; waitedMs < BYE_MS && session.acknowledged < number && !session.channel.closed; waitedMs += 50) {
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  /** Delete what came from a contact, who wants it. @param {string} id */
  async _obey(id) {
    await this._forgetListsOf(id);
    await this._update(id, { deleted: true, theirs: [] });
  }

  /** A page that slept for long may have missed what relays keep for an hour. */
  _seen() {
    if (document.visibilityState === "hidden") this._hiddenAt = Date.now();
    else if (Date.now() - this._hiddenAt > LONG_AWAY_MS) for (const id of this._people.keys()) this._reach(id);
  }

  // -- People -----------------------------------------------------------------------

  /** @param {string} id @returns {any} */
  _kept(id) {
    return this._lib?.contacts().find((/** @type {any} */ kept) => kept.name === id);
  }

  /** @param {string} id @returns {Person} */
  _person(id) {
    return this._people.get(id) ?? { id, nickname: "Somebody", lists: [], theirs: [], pending: false, syncedAt: 0,
      warned: false, deleted: false };
  }

  /** What the two databases know of each other may differ after a crash. */
  _matchPeople() {
    const contacts = this._lib.contacts();
    const ids = new Set(contacts.map((/** @type {any} */ kept) => kept.name));
    for (const { name, state } of contacts) {
      if (!this._people.has(name) && state !== "ended") this._people.set(name, this._person(name));
    }
    for (const id of this._people.keys()) if (!ids.has(id)) this._removePerson(id);
  }

  /** @param {string} nickname @param {string[]} lists */
  async _addPerson(nickname, lists) {
    if (!this._lib) throw new Error(this.blocked || "Wait a moment, then try again.");
    if ([...this._people.values()].some((person) => person.nickname === nickname)) {
      throw new Error(`You have somebody called ${nickname} already: choose another name.`);
    }
    const id = randomId(16);
    await this._update(id, { nickname, lists, pending: lists.length > 0 });
    return this._person(id);
  }

  /** @param {string} id @param {Partial<Person>} changes */
  async _update(id, changes) {
    const person = { ...this._person(id), ...changes };
    this._people.set(id, person);
    this._onChange();
    await this._write({ contacts: [person] });
  }

  /** @param {string} id */
  async _removePerson(id) {
    this._people.delete(id);
    this._sessions.delete(id);
    this._onChange();
    await this._write({}, { contacts: [id] });
  }

  /** Forget the lists that came from a contact, but for those that are shared with others too. @param {string} id */
  async _forgetListsOf(id) {
    const others = [...this._people.values()].filter((person) => person.id !== id).flatMap(({ lists }) => lists);
    const gone = this._model.forget(this._person(id).theirs.filter((list) => !others.includes(list)));
    await this._write({}, { lists: gone.lists.map((list) => list.id), items: gone.items.map((item) => item.id) });
    this._onChange();
  }

  // -- Words ----------------------------------------------------------------------------

  /** @param {Person} person */
  _view(person) {
    const { id } = person;
    const kept = this._kept(id) ?? { state: "", comparison: [], verified: false, why: "", invitation: "", attempt: "apart" };
    const [tone, words] = this._words(person, kept);
    return {
      ...person, tone, words,
      connected: this._sessions.has(id),
      ended: kept.state === "ended",
      link: kept.state === "invited" ? makeLink(this._appUrl, kept.invitation) : "",
      emoji: kept.comparison.map((/** @type {number} */ index) => EMOJI[index]),
      verified: kept.verified,
      warned: person.warned || kept.usedSent > 0,
    };
  }

  /** How it stands, for people: a tone for the colour, and a sentence. @param {Person} person @param {any} kept @returns {[string, string]} */
  _words({ id, nickname, pending, syncedAt, deleted }, { state, why, attempt }) {
    const unreachable = this._lastEvent.get(id) === "unreachable";
    if (state === "ended") {
      if (why === "used") return ["bad", "Somebody else has opened this link before you, or it was withdrawn. Ask for a new one."];
      if (why === "expired") return ["bad", "Nobody answered while the link was good. Share again."];
      return ["bad", `${nickname} has ended the sharing${deleted ? ", and the lists were deleted here" : ""}.`];
    }
    if (!state) return ["off", "Not available now."];
    if (state === "invited") return ["wait", `${nickname} has not opened the link yet.`];
    if (this._sessions.has(id)) return pending ? ["busy", "Connected, sending changes ..."] : ["good", "Connected. Everything is up to date."];
    if (!navigator.onLine) return ["wait", pending ? "Changes wait until you are online." : "You are offline."];
    if (unreachable) return ["bad", "Your two networks do not let you connect directly. Try again in another network."];
    if (state === "opened") return ["wait", `Waiting for ${nickname}'s app to answer. It has to be open too.`];
    if (state !== "paired") return ["busy", "Getting connected ..."];
    if (pending && this._lastEvent.get(id) === "unanswered") return ["wait", `Changes wait until ${nickname}'s app is open.`];
    if (attempt !== "apart") return pending ? ["busy", `Looking for ${nickname} ... changes wait.`] : ["busy", `Looking for ${nickname} ...`];
    if (pending) return ["wait", `Changes wait until ${nickname}'s app is open.`];
    return ["good", syncedAt ? `Up to date: synced ${ago(syncedAt)}.` : "Nothing to send yet."];
  }
}

/** @param {number} at in milliseconds */
function ago(at) {
  const minutes = Math.round((Date.now() - at) / 60_000);
  if (minutes < 1) return "just now";
  const [count, unit] = minutes < 60 ? [minutes, "minute"] : minutes < 1_440
    ? [Math.round(minutes / 60), "hour"] : [Math.round(minutes / 1_440), "day"];
  return `${count} ${unit}${count === 1 ? "" : "s"} ago`;
}
