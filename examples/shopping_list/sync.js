// @ts-check
/**
 * All that has to do with other people: the one file that uses connectoid.js.
 *
 * On a channel both say all that they know of the lists they share, in messages of model.js, then
 * what changes; each message is acknowledged, so that "up to date" is known and not guessed. When
 * nothing has happened for a while they disconnect, and the next change connects them again.
 *
 * Contacts have a random id as their name in Connectoid, so that a nickname can be changed and
 * never leaves the device.
 * @module
 */

import {
  Connectoid,
  EMOJI,
  NotConnectedError,
  ROUTINE,
  RelayError,
  Store,
  StoreError,
  appOfContact,
  makeLink,
  parseAddress,
  readLink,
  shown,
} from "./lib.js";
import { MAX_LISTS_OF_CONTACT, randomId, readMessage, writeChanges } from "./model.js";
import { MAX_NAMED, deletionOf, renewedOf, standingOf } from "./words.js";

// As peer.py has it: no other app opens the links of a shopping list.
const APP = "connectoid.shopping-list";
// After this time without a message we disconnect, to save the battery.
const IDLE_MS = 20_000;
// For the other app to say that it has read our last wish.
const BYE_MS = 2_000;
// How often we try again while another tab has the contacts.
const LOCK_AGAIN_MS = 3_000;
// A page that was hidden for this long asks everybody.
const LONG_AWAY_MS = 600_000;
// How many bad messages one channel may bring.
const MAX_REFUSED = 20;
// As in peer.py: before a contact is reached again whose last connections, one, two and more, have
// brought it less than all changes.
const PAUSES_MS = [0, 60_000, 300_000, 1_800_000];
// As in the library: how often a contact can have the user told that something was not taken.
const TELL_EVERY_MS = 3_600_000;
// Events that are no step of connecting: anybody with the link can cause some of them. What was
// refused is counted, and the rest is in the record.
const ASIDE = new Set(["refused", "opened_twice", "renewed", "contact_renewed", "copied"]);
// States in which a contact may wait for the user's wish to connect.
const WAITING = ["welcomed", "ready", "paired"];
// They stay true until the contact is there, whatever comes after them.
const WARNINGS = new Set(["flooded", "needs_newer_app"]);

/**
 * What is kept of a contact here; keys and the like are Connectoid's. `lists` are shared with it,
 * those in `theirs` came from it. `pending` is true while it lacks a change. `syncedAt` is when
 * it last had all, `lacking` the number of lists and items that it has not taken. `deleted` is true
 * once it had its lists deleted here, until it shares others.
 * @typedef {{id: string, nickname: string, lists: string[], theirs: string[], pending: boolean,
 *   syncedAt: number, lacking?: number, deleted: boolean}} Person
 * @typedef {{channel: any, number: number, acknowledged: number, refused: number,
 *   lacking: number, timer: any}} Session
 * @typedef {Record<string, any[]>} Put
 * @typedef {Record<string, string[]>} Remove
 * @typedef {import("./model.js").Changes} Changes
 */

export class Sync {
  /**
   * @param {object} parts
   * @param {import("./model.js").Model} parts.model
   * @param {(put: Put, remove?: Remove) => Promise<void>} parts.write
   * @param {() => Promise<Person[]>} parts.load what is kept of people
   * @param {string} parts.appUrl that links lead to
   * @param {RTCIceServer[]} parts.iceServers of the user's own
   * @param {{relayOnly: boolean, askFirst: boolean}} parts.privacy what others may learn
   * @param {() => void} parts.onChange something is to be drawn anew
   * @param {(words: string) => void} parts.onNews a sentence for the user, once
   * @param {(id: string, words: string) => void} parts.onDeleted a sentence for the user that
   *   stays: a contact had lists deleted here. It replaces the last one of that contact
   * @param {() => number} [parts.nowMs] since some moment; never set back
   */
  constructor({
    model, write, load, appUrl, iceServers, privacy, onChange, onNews, onDeleted,
    nowMs = () => performance.now(),
  }) {
    this._trouble = "";
    // Whether a relay of this side did when it was last asked.
    /** @type {Map<string, boolean>} */
    this._answers = new Map();
    // Why there are no contacts now, in a sentence.
    this.blocked = "";
    this._model = model;
    this._write = write;
    this._load = load;
    /** @type {Map<string, Person>} */
    this._people = new Map();
    this._appUrl = appUrl;
    this._iceServers = iceServers;
    this._privacy = privacy;
    this._onChange = onChange;
    this._onNews = onNews;
    this._onDeleted = onDeleted;
    // What contacts had deleted here since the page was loaded.
    /** @type {Map<string, {names: string[], count: number}>} */
    this._deletions = new Map();
    this._nowMs = nowMs;
    // When it was last told that something of a contact was not taken.
    /** @type {Map<string, number>} */
    this._toldAt = new Map();
    /** @type {Map<string, Session>} */
    this._sessions = new Map();
    // Of connecting.
    /** @type {Map<string, string>} */
    this._lastEvent = new Map();
    /** @type {Map<string, Set<string>>} */
    this._warnings = new Map();
    // How many connections in turn have not brought a contact all changes, and who is not reached
    // for a while.
    /** @type {Map<string, number>} */
    this._failures = new Map();
    /** @type {Set<string>} */
    this._paused = new Set();
    /** @type {[string, string | null][]} */
    this._relays = [];
    /** @type {any} */
    this._lib = null;
    this._hiddenAt = 0;
    // The lists that were changed before the contacts were there.
    /** @type {Set<string>} */
    this._early = new Set();
  }

  /** Begin, or say in `blocked` why not; try again while another tab has the contacts. */
  async start() {
    if (!globalThis.RTCPeerConnection) {
      this.blocked =
        "This browser cannot connect to others: its WebRTC is off. "
        + "Turn it on, or use another browser.";
      return this._onChange();
    }
    try {
      const store = await Store.open();
      for (const person of await this._load()) this._people.set(person.id, person);
      /** @type {any} */
      const lib = new Connectoid(store, this._relays, {
        app: APP,
        iceServers: this._iceServers,
        onEvent: (id, event) => this._heard(id, event),
        onProblem: (error) => this._troubled(lib, error),
        fetch: (...request) => this._fetch(lib, ...request),
      });
      lib.privacy = this._privacy;
      await lib.start();
      this._lib = lib;
      this.blocked = "";
    } catch (/** @type {any} */ error) {
      this.blocked = error.message;
      if (error instanceof StoreError && /another tab/.test(error.message)) {
        setTimeout(() => this.start(), LOCK_AGAIN_MS);
      }
      return this._onChange();
    }
    this._matchPeople();
    for (const { id, lists } of this._people.values()) {
      if (lists.some((list) => this._early.has(list))) this._update(id, { pending: true });
    }
    document.addEventListener("visibilitychange", () => this._seen());
    for (const id of this._people.keys()) this._reach(id);
    this._onChange();
  }

  // -- What the user does ---------------------------------------------------------------

  /**
   * Use these relays for new contacts.
   * @param {string[]} urls
   * @param {string} key of all, or ""
   */
  setRelays(urls, key) {
    this._relays = urls.map((url) => [url, key || null]);
    if (this._lib) this._lib.relays = this._relays;
  }

  /**
   * Return a link for somebody new.
   * @param {string} nickname
   * @param {string[]} lists
   */
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

  /**
   * Return the relays that a link names. Throw an error with a sentence for the user if this is no
   * link that can be opened, or one of another app.
   * @param {string} link
   */
  async checkLink(link) {
    const invitation = readLink(link);
    await appOfContact(invitation, APP);
    return parseAddress(invitation.address).map(({ url }) => shown(url, url.length));
  }

  /**
   * Connect with whoever made the link, after the user has confirmed.
   * @param {string} link
   * @param {string} nickname
   */
  async open(link, nickname) {
    const person = await this._addPerson(nickname, []);
    try {
      await this._lib.open(link, person.id);
    } catch (error) {
      await this._removePerson(person.id);
      throw error;
    }
    // Opened before: that contact goes on.
    if (!this._record(person.id)) await this._removePerson(person.id);
    this._onChange();
  }

  /**
   * Share one more list with a contact.
   * @param {string} id
   * @param {string} list
   */
  async shareToo(id, list) {
    const person = this._person(id);
    await this._update(id, { lists: [...new Set([...person.lists, list])], pending: true });
    this._say(id, this._model.allOf([list]));
  }

  /**
   * Answer a contact who wants to connect.
   * @param {string} id
   */
  connect(id) {
    this._lastEvent.delete(id);
    this._paused.delete(id);
    this._reach(id);
    this._onChange();
  }

  /**
   * @param {string} id
   * @param {string} nickname
   */
  rename(id, nickname) {
    return this._update(id, { nickname });
  }

  /**
   * @param {string} id
   * @param {boolean} same
   */
  async verify(id, same) {
    await this._lib.verify(id, { same });
    this._onChange();
  }

  /**
   * Have a new signing key for a contact, so that copies of this device are shut out.
   * @param {string} id
   */
  async renew(id) {
    await this._lib.renew(id);
    this._onChange();
  }

  /**
   * End it, and tell the other app; if the two are connected, it is asked to delete its copy of
   * our lists.
   * @param {string} id
   * @param {{deleteThere: boolean, deleteHere: boolean}} choice
   */
  async unshare(id, { deleteThere, deleteHere }) {
    if (deleteThere) await this._sayBye(id);
    if (this._record(id)?.state !== "ended") await this._lib.unshare(id);
    await this.dismiss(id, { deleteHere });
  }

  /**
   * Take a contact that has ended off the list.
   * @param {string} id
   * @param {{deleteHere: boolean}} choice
   */
  async dismiss(id, { deleteHere }) {
    if (deleteHere) await this._write({}, this._forgetListsOf(id));
    if (this._record(id)?.state === "ended") await this._lib.forget(id);
    await this._removePerson(id);
  }

  /**
   * Tell those who share these lists what has changed; another tab that has the contacts does it
   * for this one.
   * @param {Changes} changes
   * @param {string} [except] who said it
   */
  changed(changes, except = "") {
    const lists = new Set([
      ...changes.lists.map(({ id }) => id),
      ...changes.items.map(({ list }) => list),
    ]);
    if (!this._lib) {
      for (const list of lists) this._early.add(list);
      return;
    }
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
    const order = [...this._people.values()].sort((one, other) =>
      one.nickname.localeCompare(other.nickname),
    );
    return order.map((person) => this._view(person));
  }

  // -- What Connectoid says -----------------------------------------------------------

  /**
   * @param {string} id
   * @param {string} event
   */
  async _heard(id, event) {
    if (!this._people.has(id)) return;
    const name = this._person(id).nickname;
    if (WARNINGS.has(event)) {
      this._warnings.set(id, (this._warnings.get(id) ?? new Set()).add(event));
    } else if (!ASIDE.has(event)) this._lastEvent.set(id, event);
    if (event === "paired") this._warnings.delete(id);
    if (event === "connected") await this._serve(id);
    if (event === "paired") this._onNews(`You are now connected with ${name}.`);
    if (event === "unshared") this._onNews(`${name} has ended the sharing.`);
    if (event === "renewed") this._onNews(renewedOf(name));
    this._onChange();
  }

  /**
   * Return the relays where this side has mailboxes, or will have them. Nobody else chooses them.
   * @param {any} lib
   * @returns {Set<string>}
   */
  _ownRelays(lib) {
    const ofContacts = lib.contacts().flatMap((/** @type {any} */ { relays }) => relays);
    return new Set([...this._relays, ...ofContacts].map(([url]) => url));
  }

  /**
   * Note whether a relay has answered, unless it is somebody else's: that says nothing of ours.
   * @param {any} lib
   * @param {string} url
   * @param {boolean} hasAnswered
   */
  _note(lib, url, hasAnswered) {
    const own = this._ownRelays(lib);
    for (const known of this._answers.keys()) if (!own.has(known)) this._answers.delete(known);
    if (own.has(url)) this._answers.set(url, hasAnswered);
  }

  /**
   * @param {any} lib
   * @param {any} error
   */
  _troubled(lib, error) {
    // Of one contact's channel, which says so itself.
    if (error instanceof NotConnectedError) return;
    const own = [...this._ownRelays(lib)].find((url) => error.message.startsWith(url));
    if (!own && error instanceof RelayError) return;
    if (own) this._note(lib, own, false);
    // The rest is for people who know browsers.
    this._trouble = error.message.replace(/( cannot be reached): .*/s, "$1.");
    this._onChange();
  }

  /** What is wrong with the relays: nothing, as long as one of them answers. */
  get relayTrouble() {
    return [...this._answers.values()].includes(true) ? "" : this._trouble;
  }

  /**
   * @param {any} lib
   * @param {RequestInfo | URL} url
   * @param {RequestInit} [init]
   */
  async _fetch(lib, url, init) {
    const before = this.relayTrouble;
    try {
      const response = await fetch(url, init);
      this._note(lib, String(url), response.ok);
      return response;
    } catch (error) {
      if (!init?.signal?.aborted) this._note(lib, String(url), false);
      throw error;
    } finally {
      if (this.relayTrouble !== before) this._onChange();
    }
  }

  // -- A channel ------------------------------------------------------------------------

  /**
   * Want a connection with a contact that may take one.
   * @param {string} id
   */
  _reach(id) {
    if (this._record(id)?.state === "paired" && !this._paused.has(id)) {
      // The event tells.
      this._lib.connect(id, { timeoutS: 0 }).catch(() => {});
    }
  }

  /** @param {string} id */
  async _serve(id) {
    const channel = await this._lib.connect(id, { timeoutS: 0 }).catch(() => null);
    if (!channel || this._sessions.get(id)?.channel === channel) return;
    /** @type {Session} */
    const session = { channel, number: 0, acknowledged: 0, refused: 0, lacking: 0, timer: 0 };
    this._sessions.set(id, session);
    channel.listen((/** @type {any} */ message) => this._came(id, session, message));
    this._say(id, this._model.allOf(this._person(id).lists));
  }

  /**
   * @param {string} id
   * @param {Changes} changes
   */
  _say(id, changes) {
    const session = this._sessions.get(id);
    if (!session) return this._reach(id);
    for (const part of writeChanges(changes)) {
      this._send(id, session, { type: "changes", number: ++session.number, ...part });
    }
  }

  /**
   * @param {string} id
   * @param {Session} session
   * @param {import("./model.js").Message} message
   */
  _send(id, session, message) {
    this._rest(id, session);
    // It is closed, and will say so.
    session.channel.send(JSON.stringify(message)).catch(() => {});
  }

  /**
   * @param {string} id
   * @param {Session} session
   * @param {any} text
   */
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
    if (!message) return;
    if (message.type === "ack") {
      await this._acknowledged(id, session, message);
      return;
    }
    let refused = 0;
    if (message.type === "changes") refused = await this._take(id, message);
    if (message.type === "bye" && message.delete && this._people.has(id)) await this._obey(id);
    this._send(id, session, { type: "ack", number: message.number, refused });
  }

  /**
   * Take changes, and return how many lists and items were not kept.
   * @param {string} id
   * @param {Changes} changes
   */
  async _take(id, changes) {
    const person = this._people.get(id);
    if (!person) return 0;
    const [lists, theirs] = [new Set(person.lists), new Set(person.theirs)];
    const room = this._model.roomIn(lists);
    const merged = this._model.merge(changes, (list, isNew) => {
      if (isNew && theirs.size < MAX_LISTS_OF_CONTACT) {
        [lists, theirs].forEach((set) => set.add(list));
      }
      return lists.has(list);
    }, room);
    // What found no room is not shared: somebody else may bring a list of that id later.
    for (const { id: list } of changes.lists) {
      if (!this._model.lists.has(list)) [lists, theirs].forEach((set) => set.delete(list));
    }
    if (room.refused) this._tellRefused(person);
    if (lists.size > person.lists.length) {
      await this._update(id, { lists: [...lists], theirs: [...theirs], deleted: false });
    }
    if (merged.lists.length + merged.items.length > 0) {
      await this._write({ lists: merged.lists, items: merged.items });
      this.changed(merged, id);
      this._onChange();
    }
    return room.refused;
  }

  /** @param {Person} person some of whose lists and items were not taken */
  _tellRefused({ id, nickname }) {
    if (this._nowMs() - (this._toldAt.get(id) ?? -Infinity) < TELL_EVERY_MS) return;
    this._toldAt.set(id, this._nowMs());
    this._onNews(`${nickname} shares what is not taken here: some items are missing.`);
  }

  /**
   * What the other has not taken is not sent again before the next connection: it would not take
   * it then. Nobody has got what was not sent, and a second acknowledgement says nothing.
   * @param {string} id
   * @param {Session} session
   * @param {{number: number, refused: number}} message
   */
  async _acknowledged(id, session, { number, refused }) {
    const last = Math.min(number, session.number);
    if (last <= session.acknowledged) return;
    session.acknowledged = last;
    session.lacking += refused;
    if (session.acknowledged < session.number) return;
    this._failures.delete(id);
    const { lacking } = session;
    const synced = lacking ? {} : { syncedAt: Date.now() };
    await this._update(id, { pending: false, lacking, ...synced });
  }

  /**
   * Disconnect after a while of silence; one that owes us a reply is gone.
   * @param {string} id
   * @param {Session} session
   */
  _rest(id, session) {
    clearTimeout(session.timer);
    session.timer = setTimeout(() => session.channel.close(), IDLE_MS);
  }

  /**
   * @param {string} id
   * @param {Session} session
   */
  _ended(id, session) {
    clearTimeout(session.timer);
    if (this._sessions.get(id) !== session) return;
    this._sessions.delete(id);
    if (this._people.get(id)?.pending) this._reachLater(id);
    this._onChange();
  }

  /**
   * Reach a contact again that has not confirmed all changes: at once, then ever more seldom.
   * @param {string} id
   */
  _reachLater(id) {
    const failures = this._failures.get(id) ?? 0;
    this._failures.set(id, failures + 1);
    this._paused.add(id);
    setTimeout(() => {
      this._paused.delete(id);
      this._reach(id);
      this._onChange();
    }, PAUSES_MS[Math.min(failures, PAUSES_MS.length - 1)]);
  }

  /**
   * Ask the other app to delete its copy, if it is there.
   * @param {string} id
   */
  async _sayBye(id) {
    const session = this._sessions.get(id);
    if (!session) return;
    const number = ++session.number;
    this._send(id, session, { type: "bye", number, delete: true });
    for (
      let waitedMs = 0;
      waitedMs < BYE_MS && session.acknowledged < number && !session.channel.closed;
      waitedMs += 50
    ) {
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  /**
   * Delete what came from a contact, who wants it.
   * @param {string} id
   */
  async _obey(id) {
    const { deleted } = this._person(id);
    const before = new Map(this._model.openLists().map((list) => [list.id, list.name]));
    const removed = this._forgetListsOf(id);
    const names = removed.lists.flatMap((list) => before.get(list) ?? []);
    if (names.length) this._tellDeleted(id, names);
    // Somebody else may bring a list of that id later: it is not this contact's to see.
    const lists = this._person(id).lists.filter((list) => !removed.lists.includes(list));
    const isDeleted = deleted || names.length > 0;
    await this._update(id, { deleted: isDeleted, lists, theirs: [] }, removed);
  }

  /**
   * @param {string} id
   * @param {string[]} names of lists
   */
  _tellDeleted(id, names) {
    const former = this._deletions.get(id) ?? { names: [], count: 0 };
    const all = {
      names: [...former.names, ...names].slice(0, MAX_NAMED),
      count: former.count + names.length,
    };
    this._deletions.set(id, all);
    this._onDeleted(id, deletionOf(this._person(id).nickname, all.names, all.count));
  }

  /** A page that slept for long may have missed what relays keep for an hour. */
  _seen() {
    if (document.visibilityState === "hidden") this._hiddenAt = Date.now();
    else if (Date.now() - this._hiddenAt > LONG_AWAY_MS) {
      for (const id of this._people.keys()) this._reach(id);
    }
  }

  // -- People -----------------------------------------------------------------------

  /**
   * @param {string} id
   * @returns {any}
   */
  _record(id) {
    return this._lib?.contacts().find((/** @type {any} */ record) => record.name === id);
  }

  /**
   * @param {string} id
   * @returns {Person}
   */
  _person(id) {
    return (
      this._people.get(id) ?? {
        id,
        nickname: "Somebody",
        lists: [],
        theirs: [],
        pending: false,
        syncedAt: 0,
        deleted: false,
      }
    );
  }

  /** What the two databases know of each other may differ after a crash. */
  _matchPeople() {
    const contacts = this._lib.contacts();
    const ids = new Set(contacts.map((/** @type {any} */ record) => record.name));
    for (const { name, state } of contacts) {
      if (!this._people.has(name) && state !== "ended") {
        this._people.set(name, this._person(name));
      }
    }
    for (const id of this._people.keys()) if (!ids.has(id)) this._removePerson(id);
  }

  /**
   * @param {string} nickname
   * @param {string[]} lists
   */
  async _addPerson(nickname, lists) {
    if (!this._lib) throw new Error(this.blocked || "Wait a moment, then try again.");
    if ([...this._people.values()].some((person) => person.nickname === nickname)) {
      throw new Error(`You have somebody called ${nickname} already: choose another name.`);
    }
    const id = randomId(16);
    await this._keep({ ...this._person(id), nickname, lists, pending: lists.length > 0 });
    return this._person(id);
  }

  /**
   * Change what is kept of a contact, unless it has gone meanwhile.
   * @param {string} id
   * @param {Partial<Person>} changes
   * @param {Remove} [remove] what goes from the database with it
   */
  async _update(id, changes, remove) {
    const known = this._people.get(id);
    if (known) await this._keep({ ...known, ...changes }, remove);
  }

  /**
   * @param {Person} person
   * @param {Remove} [remove]
   */
  async _keep(person, remove) {
    this._people.set(person.id, person);
    this._onChange();
    await this._write({ contacts: [person] }, remove);
  }

  /** @param {string} id */
  async _removePerson(id) {
    this._people.delete(id);
    this._sessions.delete(id);
    this._onChange();
    await this._write({}, { contacts: [id] });
  }

  /**
   * Forget the lists that came from a contact, but for those that are shared with others too.
   * Return what is no longer to be kept.
   * @param {string} id
   */
  _forgetListsOf(id) {
    const others = [...this._people.values()]
      .filter((person) => person.id !== id)
      .flatMap(({ lists }) => lists);
    const lists = this._person(id).theirs.filter((list) => !others.includes(list));
    const { items } = this._model.forget(lists);
    this._onChange();
    return { lists, items: items.map((item) => item.id) };
  }

  // -- What there is to show ----------------------------------------------------------------

  /** @param {Person} person */
  _view(person) {
    const { id } = person;
    const record = this._record(id) ?? UNKNOWN;
    const isConnected = this._sessions.has(id);
    const lastEvent = this._lastEvent.get(id) ?? "";
    const warnings = this._warnings.get(id) ?? new Set();
    const isRelayDown = Boolean(this.relayTrouble);
    const isPaused = this._paused.has(id);
    const againAt = record.state ? this._lib.progress(id).againAt : null;
    const moment = { ...record, againAt, isConnected, lastEvent, warnings, isRelayDown, isPaused };
    const [tone, words] = standingOf(person, moment);
    const isOpen = record.state === "invited";
    return {
      ...person,
      tone,
      words,
      connected: isConnected,
      asks: !isConnected && WAITING.includes(record.state) && lastEvent === "wants_to_connect",
      ended: record.state === "ended",
      link: isOpen ? makeLink(this._appUrl, record.invitation) : "",
      emoji: record.comparison.map((/** @type {number} */ index) => EMOJI[index]),
      verified: record.verified,
      // Of the record, which outlives the page: the events are told once.
      warned: record.usedTo.length > 0,
      keyNews: record.keyNews,
      renewal: standingOfRenewal(record),
      refused: record.state ? this._refusedOf(id) : 0,
    };
  }

  /**
   * Return how much of what came for a contact was refused, and is no routine.
   * @param {string} id
   */
  _refusedOf(id) {
    return Object.entries(this._lib.refusals(id))
      .filter(([reason]) => !ROUTINE.includes(reason))
      .reduce((sum, [, count]) => sum + count, 0);
  }
}

/**
 * Return "possible" if this side may have a new key, "waiting" if the contact has to answer the
 * last one, or "".
 * @param {any} record
 */
function standingOfRenewal({ state, oldSigner }) {
  if (state !== "paired") return "";
  return oldSigner ? "waiting" : "possible";
}

/** A contact that Connectoid has not loaded. */
const UNKNOWN = {
  state: "",
  comparison: [],
  verified: false,
  differs: false,
  usedTo: [],
  keyNews: "",
  oldSigner: "",
  why: "",
  invitation: "",
  attempt: "apart",
};
