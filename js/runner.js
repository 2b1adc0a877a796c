// @ts-check
/**
 * The runner: moves what the machines ask for.
 *
 *     what comes                     a step of a machine          what goes
 *     Line (one for each relay)   -> Contact.polled            -> Save, then Send -> Sender
 *     WebRTC reports              -> Contact.gathered, ...     -> Gather, Join, Write, Close
 *     the time                    -> Contact.tick              -> Tell -> the app
 *     the app                     -> Contact.connect, ...
 *
 * Steps runs them, and Carrier carries out what leaves the page. Here is what begins them.
 * @module
 */

import { checkApp } from "./apps.js";
import { Carrier } from "./carrier.js";
import { Complaints } from "./complaints.js";
import { Contact } from "./contact/contact.js";
import { EVENTS } from "./contact/effects.js";
import { ConnectoidError, LinkError, NotConnectedError, UsageError } from "./errors.js";
import { checkIceServers } from "./ice.js";
import { Lines } from "./line.js";
import { makeLink, readLink } from "./links.js";
import { Page } from "./page.js";
import { HURRIED_TIMEOUT_S, REQUEST_TIMEOUT_S, RelayClient } from "./relay_client.js";
import { Reports } from "./reports.js";
import { Roster } from "./roster.js";
import { Sender } from "./sender.js";
import { Steps, tick } from "./steps.js";
import { SystemSuite, hashLink } from "./suite.js";
import { browserSystem } from "./system.js";
import { isSameServer } from "./urls.js";
import { LACKS_WEBRTC, NO_WEBRTC, PeerAdapter } from "./webrtc.js";

/** @import { OnEvent } from "./carrier.js" */
/** @import { Effect, Privacy } from "./contact/effects.js" */
/** @import { Found } from "./contact/inbox.js" */
/** @import { Allowed, OwnRelay, Relay } from "./links.js" */
/** @import { AnyStore, Entry } from "./roster.js" */
/** @import { Step } from "./steps.js" */
/** @import { Suite } from "./suite.js" */
/** @import { System } from "./system.js" */
/** @import { WebRTC } from "./webrtc.js" */

// How long requests may take less than else, once the network may be another one.
const HURRY_S = 20;
// How long a closed runner takes to send what is still waiting.
const STOP_S = 2;

/**
 * `onEvent(name, event)` is called with a key of EVENTS, `onProblem` with an error whose text tells
 * the user what to do. `iceServers` are more than the STUN of the relays: TURN. A relay on this
 * machine or in a private network is asked if the user has named it; `allowPrivateRelays` allows
 * those too that others name. With `app`, an identifier such as a domain, no other app opens this
 * app's links, nor this app another one's.
 * @typedef {object} Settings
 * @property {string} [app]
 * @property {WebRTC} [webrtc]
 * @property {RTCIceServer[]} [iceServers]
 * @property {boolean} [allowPrivateRelays]
 * @property {Suite} [suite]
 * @property {OnEvent} [onEvent]
 * @property {(error: Error) => void} [onProblem]
 *
 * @typedef {Settings & Allowed & Partial<System>} Options
 */

/** Run the contacts of one store. Everything that throws throws ConnectoidErrors. */
export class Connectoid {
  /**
   * @param {AnyStore} store
   * @param {(string | OwnRelay)[]} [relays] for new contacts: URLs, or [URL, ext], or
   *   [URL, API key, its half that only sends]: links then have that half alone
   * @param {Options} [options]
   */
  constructor(store, relays = [], options = {}) {
    const {
      allowHttp, allowPrivateRelays = false, app = "", webrtc, iceServers = [], suite,
      onEvent = ignore, onProblem = console.warn, ...system
    } = options;
    this.system = { ...browserSystem(), ...system };
    this.page = new Page(this.system.page);
    this.suite = suite ?? new SystemSuite();
    this.webrtc = webrtc ?? systemWebRTC();
    this.complaints = new Complaints(onProblem);
    this.roster = new Roster(store, this.suite, { allowHttp }, () => this.system.now());
    /** @type {OwnRelay[]} */
    this._relays = [];
    /** @type {Relay[]} */
    this._inAddresses = [];
    this.relays = relays;
    this.stopped = false;
    this._isStarted = false;
    /** @type {Promise<void> | null} */
    this._closing = null;
    this._allowPrivateRelays = allowPrivateRelays;
    this._app = checkApp(app);
    /** @type {(url: string) => RelayClient} */
    const clientOf = (url) => new RelayClient(
      url, this.system, (one) => this._mayBePrivate(one), () => this._timeoutS());
    this._hurriedUntilS = -Infinity;
    this._lines = new Lines(this, clientOf);
    this._sender = new Sender(clientOf, this.system, this.complaints, {
      onTaken: (number, hash) => {
        this._steps.make(number, (contact, now) => contact.sent(now, hash));
      },
    });
    this._toStrangers = new Sender(
      clientOf, this.system, this.complaints, { toStrangers: true });
    const carrier = new Carrier(
      this, this._sender, this._toStrangers, this._lines, checkIceServers(iceServers), onEvent);
    this._steps = new Steps(this, carrier, this._lines);
    this._reports = new Reports(this, this._steps);
    /** @type {Promise<unknown>} */
    this._adopting = Promise.resolve();
  }

  /** What contacts may learn by connecting. */
  get privacy() {
    return this.roster.privacy;
  }

  /** @param {Privacy} privacy how later connections are made */
  set privacy(privacy) {
    this.roster.privacy = privacy;
  }

  // -- Beginning and end -------------------------------------------------------------------

  /**
   * Load the contacts, begin to poll and to connect.
   * Throw StoreError, RecordError, and UsageError if it was started before.
   */
  async start() {
    if (this._isStarted || this._closing) {
      throw new UsageError("This runner is started already, or closed.");
    }
    this._isStarted = true;
    try {
      await this.roster.load();
      if (this.webrtc === NO_WEBRTC) this.complaints.make(new ConnectoidError(LACKS_WEBRTC));
      this.webrtc.start((...report) => this._reports.take(...report));
    } catch (error) {
      // It may be started once more.
      this._isStarted = false;
      throw error;
    }
    this.page.watch((type) => this._pageChanged(type));
    this._steps.makeAll(this.roster.entries.keys(), tick);
    this._lines.draw();
    this._steps.tick();
  }

  /** Disconnect all, let waiting messages go and close the store. Idempotent. */
  close() {
    this._closing ??= this._close();
    return this._closing;
  }

  async _close() {
    this.page.end();
    try {
      await this._hangUpAll();
      for (const [number, entry] of this.roster.entries) {
        if (!entry.refusals.isWritten) await this._steps.writeRefusals(number, entry);
      }
      this.stopped = true;
      this.complaints.areOver = true;
      await Promise.all([this._sender.finish(STOP_S), this._toStrangers.finish(STOP_S)]);
      this._lines.end();
      this._steps.noteChange();
      this.webrtc.stop();
    } finally {
      this.roster.close();
    }
  }

  // -- What an app does --------------------------------------------------------------------

  /** @returns {(string | OwnRelay)[]} the relays for new contacts; they may be set */
  get relays() {
    return this._relays;
  }

  set relays(relays) {
    this._relays = relays.map(asRelay);
    this._inAddresses = this.roster.ownKeys.inAddresses(this._relays);
  }

  /**
   * Return a link for a new contact; throw UsageError for a name that is taken, or no relays.
   * @param {string} name
   * @param {string} appUrl
   */
  share(name, appUrl) {
    return this._alone(async () => {
      const options = { app: this._app, ...this.roster.allowed };
      const now = this.system.now();
      const [contact, effects] = await Contact.invite(
        this.suite, now, name, this._inAddresses, options);
      await this._adopt(contact, effects);
      return makeLink(appUrl, contact.record.invitation);
    });
  }

  /**
   * Open somebody's link, after the user has confirmed; return the contact's name.
   * Throw LinkError, UsageError. The same link again goes on with the contact that it made, by
   * the name that it has.
   * @param {string} link
   * @param {string} name
   */
  open(link, name) {
    return this._alone(async () => {
      const invitation = readLink(link, this.roster.allowed);
      const known = this.roster.withLink(await hashLink(invitation.text));
      if (known?.record.role === "inviter") {
        throw new LinkError("This is your own link: send it to somebody else.");
      }
      if (known) return known.record.name;
      const options = { relays: this._inAddresses, app: this._app, ...this.roster.allowed };
      const now = this.system.now();
      const [contact, effects] = await Contact.open(
        this.suite, now, name, invitation, options);
      await this._adopt(contact, effects);
      return name;
    });
  }

  /**
   * Return a channel to a contact, once it is there; throw NotConnectedError, UsageError.
   * @param {string} name
   * @param {{timeoutS?: number}} [options]
   */
  async connect(name, { timeoutS = Infinity } = {}) {
    const number = this.roster.numberOf(name);
    const untilS = this._nowS() + timeoutS;
    const former = this.roster.entries.get(number)?.channel;
    if (former && !former.closed) return former;
    await this._steps.run(number, (contact, now) => contact.connect(now));
    for (;;) {
      const entry = this.roster.entries.get(number);
      if (entry?.channel && entry.channel !== former) return entry.channel;
      if (this.stopped || isOver(entry)) throw new NotConnectedError(end(entry));
      const leftS = untilS - this._nowS();
      if (leftS <= 0) throw new NotConnectedError(absence(name, entry, timeoutS));
      await this.system.sleep(leftS, this._steps.changed);
    }
  }

  /**
   * Close the connection to a contact; throw UsageError.
   * @param {string} name
   */
  async disconnect(name) {
    await this.hangUp(this.roster.numberOf(name));
  }

  /**
   * End the sharing with a contact, who is told; throw UsageError.
   * @param {string} name
   */
  async unshare(name) {
    const number = this.roster.numberOf(name);
    await this._steps.run(number, (contact, now) => contact.unshare(now));
  }

  /**
   * Let a contact reach us through other relays from now on, or those of this runner.
   * Throw UsageError, also where the contact has answered none of the last nine moves. The contact
   * is told, through its own relays. Until it has written to the new address the others that it may
   * know are polled.
   * @param {string} name
   * @param {(string | OwnRelay)[]} [relays]
   */
  async move(name, relays = this.relays) {
    const number = this.roster.numberOf(name);
    const shown = this.roster.ownKeys.inAddresses(relays.map(asRelay));
    await this._steps.run(number, (contact, now) => contact.move(now, shown));
  }

  /**
   * Replace the signing key that a contact knows, so that copies of this device are shut out.
   *
   * They are once the event `renewed` comes: then the contact has the new key. Until then this side
   * repeats it while it runs. Throw UsageError before both know each other, while the last renewal
   * is not answered, and for a contact that was made with an older app.
   * @param {string} name
   */
  async renew(name) {
    const number = this.roster.numberOf(name);
    await this._steps.run(number, (contact, now) => contact.renew(now));
  }

  /**
   * Delete what is kept of a contact that has ended; throw UsageError for any other.
   * @param {string} name
   */
  async forget(name) {
    const number = this.roster.numberOf(name);
    if (this.roster.entries.get(number)?.record.state !== "ended") {
      throw new UsageError(`${name} is still a contact: unshare ends it.`);
    }
    await this._steps.run(number, forget);
  }

  /**
   * Mark whether the comparison strings were the same; throw UsageError.
   * @param {string} name
   * @param {{same?: boolean}} [result]
   */
  async verify(name, result) {
    const number = this.roster.numberOf(name);
    await this._steps.run(number, (contact, now) => contact.verify(now, result));
  }

  /** Return the records of all contacts but tombstones, with `attempt`: what goes on. */
  contacts() {
    const shown = this.roster.all().filter(({ record }) => record.state !== "unshared");
    return shown.map(({ record, contact }) => ({ ...record, attempt: contact.attempt.state }));
  }

  /**
   * Return how often something that came for a contact was refused, by a key of REASONS. Anybody
   * who knows the link, or a mailbox, may have sent it. Throw UsageError.
   * @param {string} name
   * @returns {Record<string, number>}
   */
  refusals(name) {
    const entry = this.roster.entries.get(this.roster.numberOf(name));
    return { ...entry?.refusals.counts };
  }

  /**
   * Return how it stands with a connection to a contact: the state of the attempt, when the next
   * one begins (in ms since 1970, or null), and what a relay or this device did wrong for it
   * lately. Throw UsageError.
   * @param {string} name
   */
  progress(name) {
    const number = this.roster.numberOf(name);
    const { contact } = /** @type {Entry} */ (this.roster.entries.get(number));
    const { wallUs, monotonicS } = this.system.now();
    const leftS = Math.max(0, contact.againS - monotonicS);
    const againAt = Number.isFinite(leftS) ? wallUs / 1_000 + leftS * 1_000 : null;
    const urls = contact.mailboxes.map(({ url }) => url);
    const trouble = this.complaints.latest((about) => (
      about === number || urls.includes(String(about)) || `${about}`.startsWith(`${number} at `)));
    return { state: contact.attempt.state, againAt, trouble };
  }

  // -- What lines and channels ask ---------------------------------------------------------

  /**
   * Return whether the user has named a relay.
   * @param {string} url
   */
  isNamed(url) {
    return this._namedRelays().includes(url);
  }

  /**
   * Give a contact what a line has read for it, by mailbox.
   * @param {number} number
   * @param {Map<string, Found>} found
   */
  async take(number, found) {
    await this._steps.make(number, (contact, now) => contact.polledInPart(now, found));
    // What an app or WebRTC asks of this contact comes in between.
    while (this.roster.entries.get(number)?.contact.isBehind) {
      await this._steps.make(number, (contact, now) => contact.polledInPart(now));
    }
  }

  /** @param {number} number */
  async hangUp(number) {
    await this._steps.run(number, disconnect);
  }

  /**
   * Close a connection that brought what it must not, unless a newer one is there.
   * @param {number} number
   * @param {number} attemptId
   * @param {string} why
   */
  refuse(number, attemptId, why) {
    return this._reports.refuse(number, attemptId, why);
  }

  /** Have the ways to all relays tried: the network may be another one. */
  doubtWays() {
    this._hurriedUntilS = this._nowS() + HURRY_S;
    this._lines.doubt();
  }

  // -- What comes from the page ------------------------------------------------------------

  /**
   * A page that is left may never come back: the others learn at once that it went.
   * @param {string} type
   */
  _pageChanged(type) {
    if (type === "pagehide") {
      this._hangUpAll();
      // At once: the steps above may have no time left.
      this.webrtc.stop();
    }
    if (type === "online" || type === "networkchange") this._networkChanged();
    if (!this.page.isHidden) this._lines.wake();
    this._steps.noteChange();
  }

  /** Have all that waits go on at once. */
  _networkChanged() {
    this.doubtWays();
    for (const sender of [this._sender, this._toStrangers]) sender.hurry();
    this.webrtc.doubt();
    this._steps.makeAll(this.roster.entries.keys(), networkChanged);
  }

  /**
   * Have what waits for a relay go on at once. What others had to send may wait for it too.
   *
   * This device's network may have been away, and nothing else has told so.
   * @param {string} url
   */
  relayIsBack(url) {
    this._sender.hurry();
    this._steps.makeAll(this.roster.at(url), relayIsBack);
  }

  // -- Contacts ----------------------------------------------------------------------------

  /**
   * Make contacts one after the other.
   * @template T
   * @param {() => Promise<T>} work
   * @returns {Promise<T>}
   */
  _alone(work) {
    const run = this._adopting.then(work);
    this._adopting = run.catch(() => {});
    return run;
  }

  /**
   * Give a new contact its name, which one that has ended gives up; throw UsageError.
   * @param {string} name
   */
  async _makeFree(name) {
    for (const number of this.roster.endedWith(name)) await this._steps.run(number, forget);
  }

  /**
   * Give a new contact its name and begin with it; throw UsageError, StoreError.
   *
   * Only now, when nothing else can be refused, does an ended contact give its name up.
   * @param {Contact} contact
   * @param {Effect[]} effects
   */
  async _adopt(contact, effects) {
    await this._makeFree(contact.record.name);
    const number = await this.roster.add(contact);
    await this._steps.run(number, async () => effects);
  }

  _hangUpAll() {
    return this._steps.makeAll(this.roster.entries.keys(), disconnect);
  }

  _nowS() {
    return this.system.now().monotonicS;
  }

  _timeoutS() {
    return this._nowS() < this._hurriedUntilS ? HURRIED_TIMEOUT_S : REQUEST_TIMEOUT_S;
  }

  /**
   * Return whether a relay may be on this machine or in a private network: if the user has named
   * it, or has allowed it for all.
   * @param {string} url
   */
  _mayBePrivate(url) {
    if (this._allowPrivateRelays) return true;
    return this.isNamed(url) || isSameServer(url, this._namedRelays());
  }

  /** Return the URLs of the relays that the user has named, here or for a contact. */
  _namedRelays() {
    return [...this._relays.map(([url]) => url), ...this.roster.namedRelays()];
  }
}

// -- Steps -------------------------------------------------------------------------------

/** @type {Step} */
function disconnect(contact, now) {
  return contact.disconnect(now);
}

/** @type {Step} */
function networkChanged(contact, now) {
  return contact.networkChanged(now);
}

/** @type {Step} */
function relayIsBack(contact, now) {
  return contact.relayIsBack(now);
}

/** Delete what is kept of a contact. @type {Step} */
async function forget() {
  return [{ do: "forget" }];
}

// -- Forms -------------------------------------------------------------------------------

/**
 * @param {string | OwnRelay} relay
 * @returns {OwnRelay}
 */
function asRelay(relay) {
  return typeof relay === "string" ? [relay, null] : relay;
}

/** @returns {WebRTC} */
function systemWebRTC() {
  return globalThis.RTCPeerConnection ? new PeerAdapter() : NO_WEBRTC;
}

function ignore() {}

// -- Why there is no connection ----------------------------------------------------------

/**
 * Return whether no connection to a contact can come about any more.
 * @param {Entry | undefined} entry
 */
function isOver(entry) {
  return !entry || ["ended", "unshared"].includes(entry.record.state);
}

/**
 * Return why a sharing has ended.
 * @param {Entry | undefined} entry
 */
function end(entry) {
  return EVENTS[entry?.record.why ?? ""] ?? "The sharing has ended.";
}

/**
 * Return why a wait for a contact was in vain.
 * @param {string} name
 * @param {Entry | undefined} entry
 * @param {number} timeoutS
 */
function absence(name, entry, timeoutS) {
  if (entry?.record.state === "invited") return `${name} has not opened the link yet.`;
  return `${name} did not connect within ${timeoutS} s.`;
}
