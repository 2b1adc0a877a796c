// @ts-check
/**
 * Class Contact: the face of the machine. Each method is one event, and one step.
 * @module
 */

import { checkApp } from "../apps.js";
import { LinkError, UsageError } from "../errors.js";
import {
  INVITATION_US, POLL_FAST_FOR_S, POLL_FAST_S, POLL_SLOW_S, ZERO_EVERY_S,
} from "../limits.js";
import { roomForSdp } from "../messages.js";
import { trimSdp } from "../sdp.js";
import { checkAddress } from "../suite.js";
import * as connecting from "./connecting.js";
import * as inbox from "./inbox.js";
import { Machine } from "./machine.js";
import * as outbox from "./outbox.js";
import * as pairing from "./pairing.js";
import { addressesOf, compared, mailboxesOf, urlsOf } from "./record.js";
import * as renewal from "./renewal.js";
import { longestAddress, noteNamed, noteNew, rotate } from "./rotation.js";

/** @import { Bytes } from "../encoding.js" */
/** @import { Allowed, Invitation, Relay } from "../links.js" */
/** @import { Sdp } from "../messages.js" */
/** @import { Suite } from "../suite.js" */
/** @import { Effect, Now, Poll, Privacy } from "./effects.js" */
/** @import { Found } from "./inbox.js" */
/** @import { ContactRecord } from "./record.js" */

// Messages that are read or taken in one step: each costs an operation with a key, or several. All
// else that this contact is asked waits for a step.
export const MAX_STEP_MESSAGES = 16;

/**
 * One contact: events and the time go in, effects come out. It throws nothing but UsageError.
 *
 * A method of an event takes the time and resolves to the effects, in order. Steps run one
 * after the other, however they are called.
 */
export class Contact {
  /**
   * @param {Suite} suite
   * @param {ContactRecord} record
   * @param {Allowed} [allowed]
   */
  constructor(suite, record, allowed = {}) {
    this.machine = new Machine(suite, record, allowed);
  }

  // -- Beginnings --------------------------------------------------------------------------

  /**
   * Return a new contact with `record.invitation` for a link, and what to do.
   * Throw UsageError for bad relays.
   * @param {Suite} suite
   * @param {Now} now
   * @param {string} name
   * @param {Relay[]} relays
   * @param {Allowed & {lifetimeUs?: number, app?: string}} [options]
   * @returns {Promise<[Contact, Effect[]]>}
   */
  static async invite(suite, now, name, relays, options = {}) {
    const { lifetimeUs = INVITATION_US, app = "", ...allowed } = options;
    const record = await pairing.makeInvitation(
      suite, name, relays, now.wallUs + lifetimeUs, { ...allowed, app: checkApp(app) });
    const contact = new Contact(suite, record, allowed);
    contact.machine.fastUntilS = now.monotonicS + POLL_FAST_FOR_S;
    for (const own of addressesOf(record)) noteNew(contact.machine, own, now);
    return [contact, [{ do: "save", record }]];
  }

  /**
   * Return a new contact for somebody's invitation, and what to do; throw LinkError, UsageError.
   *
   * Call this after the user has confirmed: chat programs open links too. Without relays of one's
   * own those of the link are used.
   * @param {Suite} suite
   * @param {Now} now
   * @param {string} name
   * @param {Invitation} invitation
   * @param {Allowed & {relays?: Relay[], app?: string}} [options]
   * @returns {Promise<[Contact, Effect[]]>}
   */
  static async open(suite, now, name, invitation, options = {}) {
    const { relays: named = [], app = "", ...allowed } = options;
    const mailboxes = await checkAddress(suite, invitation.address, allowed).catch((error) => {
      throw new LinkError(`This link is damaged: ${error.message}. Copy it again, whole.`);
    });
    let relays = named;
    if (!named.length) relays = mailboxes.map(({ url, ext }) => [url, ext]);
    const expiresUs = now.wallUs + INVITATION_US;
    const record = await pairing.takeInvitation(
      suite, name, relays, invitation, expiresUs,
      { ...allowed, namedRelays: urlsOf(named), app: checkApp(app) });
    const contact = new Contact(suite, record, allowed);
    return [contact, [{ do: "save", record }, ...await contact.connect(now)]];
  }

  // -- What the app wants ------------------------------------------------------------------

  /**
   * Want a connection.
   * @param {Now} now
   */
  connect(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      machine.wanted = true;
      machine.failed = 0;
      machine.toldUnsent = false;
      machine.beActive();
      await connecting.turn(machine, "begin");
      await outbox.repeatHeldWelcome(machine);
    });
  }

  /**
   * Want no connection: close what there is.
   * @param {Now} now
   */
  disconnect(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      machine.wanted = false;
      machine.activeUntilS = -Infinity;
      await connecting.turn(machine, "stop");
    });
  }

  /**
   * Begin anew if a connection is wanted and there is none: this device is elsewhere now.
   * @param {Now} now
   */
  networkChanged(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (!machine.lacksConnection) return;
      machine.failed = 0;
      machine.toldUnsent = false;
      await connecting.beginAnew(machine);
    });
  }

  /**
   * Notice that a relay has taken a Send, by the hash of its message.
   * @param {Now} now
   * @param {string} hash
   */
  sent(now, hash) {
    const { machine } = this;
    return machine.step(now, async () => connecting.takeReceipt(machine, hash));
  }

  /**
   * Begin anew, at most once a minute, unless the other has what may lead to a connection.
   *
   * An offer that was made before may lack the addresses that STUN servers tell.
   * @param {Now} now
   */
  relayIsBack(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      const states = ["apart"];
      if (this.record.role === "opener") states.push("gathering", "waiting");
      if (!machine.lacksConnection || !states.includes(machine.attempt.state)) return;
      if (machine.mayRepeat("begin")) await connecting.beginAnew(machine);
    });
  }

  /**
   * End the sharing: name and connection go at once, the other is told for 30 days.
   * Throw UsageError if it has ended.
   * @param {Now} now
   */
  unshare(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (!pairing.isPossible(machine, "leave")) {
        throw new UsageError("The sharing is ended already.");
      }
      await connecting.turn(machine, "stop");
      await pairing.pair(machine, "leave");
    });
  }

  /**
   * Mark what has come of comparing the string by voice: the same, or another one.
   * The same also means that a new key of the contact is no news any more (`keyNews`).
   * Throw UsageError while there is none.
   * @param {Now} now
   * @param {{same?: boolean}} [result]
   */
  verify(now, { same = true } = {}) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (!machine.record.comparison.length) {
        throw new UsageError("There is nothing to compare yet: the other has not answered.");
      }
      machine.record = compared(machine.record, same);
    });
  }

  /**
   * Use other relays from now on, and tell the contact; throw UsageError for bad ones.
   * @param {Now} now
   * @param {Relay[]} relays
   */
  move(now, relays) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (!["ready", "paired"].includes(machine.record.state)) {
        throw new UsageError("Share again: a link holds the relays that it was made with.");
      }
      await rotate(machine, relays);
      noteNamed(machine);
      machine.wanted = true;
      machine.beActive();
      await connecting.turn(machine, "stop");
      await connecting.turn(machine, "begin");
    });
  }

  /**
   * Have a new signing key, which shuts out every copy of this device from before.
   *
   * Throw UsageError unless both know each other, with apps that know how, and the contact has
   * answered the last renewal.
   * @param {Now} now
   */
  renew(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      await renewal.begin(machine);
      machine.nextWordS = -Infinity;
      await outbox.announceIfDue(machine);
    });
  }

  // -- What the time does ------------------------------------------------------------------

  /**
   * Let time go by: at the start, and again at `nextTickS`.
   * @param {Now} now
   */
  tick(now) {
    const { machine } = this;
    return machine.step(now, async () => {
      await pairing.checkExpiry(machine);
      if (this._owesWelcome) await outbox.sendWelcome(machine, null);
      if (now.monotonicS >= machine.attempt.lateS) {
        await connecting.turn(machine, "late");
      } else if (machine.wantsAttempt && now.monotonicS >= machine.nextBeginS) {
        await connecting.turn(machine, "begin");
      }
      await outbox.announceIfDue(machine);
    });
  }

  /** When the next attempt to connect begins, by the monotonic clock; or infinity. */
  get againS() {
    return this.machine.wantsAttempt ? this.machine.nextBeginS : Infinity;
  }

  /** Whether the page was closed before the welcome could go out. */
  get _owesWelcome() {
    const { state, welcome } = this.record;
    return state === "welcomed" && !welcome && this.attempt.state === "apart";
  }

  /** When `tick` has something to do, by the monotonic clock; at most in an hour. */
  get nextTickS() {
    const { machine } = this;
    let nextS = Math.min(machine.attempt.lateS, machine.now.monotonicS + ZERO_EVERY_S);
    if (machine.wantsAttempt) nextS = Math.min(nextS, machine.nextBeginS);
    if (machine.hasNews) nextS = Math.min(nextS, machine.nextWordS);
    return nextS;
  }

  // -- What WebRTC says --------------------------------------------------------------------

  /**
   * Take the offer or answer that a Gather asked for; null if WebRTC failed.
   * Throw UsageError for one that fits in no message, or is not that of a data channel.
   * @param {Now} now
   * @param {number} attemptId
   * @param {Sdp | null} sdp
   */
  gathered(now, attemptId, sdp) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (attemptId !== machine.attempt.attemptId) return;
      await connecting.turn(machine, "gathered", sdp && this._trimmed(sdp));
    });
  }

  /**
   * Return an offer or answer that fits into a message with the addresses of both sides.
   * @param {Sdp} sdp
   * @returns {Sdp}
   */
  _trimmed(sdp) {
    const { machine, record } = this;
    const addressChars = record.contactAddress.length + longestAddress(machine);
    const mostBytes = roomForSdp(addressChars);
    return { ...sdp, sdp: trimSdp(sdp.sdp, { mostBytes, ...machine.privacy }) };
  }

  /**
   * Begin to prove to each other: the data channel is open.
   * @param {Now} now
   * @param {number} attemptId
   */
  channelOpened(now, attemptId) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (attemptId !== machine.attempt.attemptId) return;
      await connecting.turn(machine, "channel");
    });
  }

  /**
   * Take a binary message of the channel; after `connected` they are the app's.
   * @param {Now} now
   * @param {number} attemptId
   * @param {Bytes} octets
   */
  channelMessage(now, attemptId, octets) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (attemptId !== machine.attempt.attemptId) return;
      await connecting.turn(machine, "octets", octets);
      const isConnected = machine.attempt.state === "connected";
      if (isConnected && pairing.isPossible(machine, "proven")) {
        await pairing.pair(machine, "proven");
      }
    });
  }

  /**
   * Notice that the other end does not answer: it may be in another network, and say so.
   * @param {Now} now
   * @param {number} attemptId
   */
  channelSilent(now, attemptId) {
    const { machine } = this;
    return machine.step(now, async () => {
      const { attempt } = machine;
      if (attemptId === attempt.attemptId && attempt.state === "connected") machine.pollFast();
    });
  }

  /**
   * Notice that the channel is closed.
   * @param {Now} now
   * @param {number} attemptId
   */
  channelClosed(now, attemptId) {
    const { machine } = this;
    return machine.step(now, async () => {
      if (attemptId !== machine.attempt.attemptId) return;
      await connecting.turn(machine, "closed");
    });
  }

  // -- What relays say ---------------------------------------------------------------------

  /**
   * Return the checks to make at a relay, at most `pollGapS` apart.
   * They count as made, so call this only to make them.
   * @param {Now} now
   * @param {string} url
   * @returns {Poll[]}
   */
  polls(now, url) {
    return inbox.listPolls(this.machine, now, url);
  }

  /**
   * Return the seconds between two checks; where it is 2, a check may wait instead.
   * @param {Now} now
   */
  pollGapS(now) {
    if (now.monotonicS < this.machine.fastUntilS) return POLL_FAST_S;
    return POLL_SLOW_S;
  }

  /**
   * Take what one round of checks found: for each mailbox read to its end, [at, data].
   * A mailbox that could not be asked, or not read to its end, is not among them.
   * @param {Now} now
   * @param {ReadonlyMap<string, Found>} boxes
   */
  polled(now, boxes) {
    const { machine } = this;
    return machine.step(now, () => {
      inbox.noteRound(machine, boxes);
      return inbox.goOn(machine);
    });
  }

  /**
   * Take MAX_STEP_MESSAGES of a round, so that no step takes long.
   * Call it without boxes while `isBehind`. What this contact is asked meanwhile counts at once.
   * @param {Now} now
   * @param {ReadonlyMap<string, Found>} [boxes]
   */
  polledInPart(now, boxes = new Map()) {
    const { machine } = this;
    return machine.step(now, () => {
      inbox.noteRound(machine, boxes);
      return inbox.goOn(machine, MAX_STEP_MESSAGES);
    });
  }

  // -- What can be seen --------------------------------------------------------------------

  /** What is known of the other. It holds private keys. */
  get record() {
    return this.machine.record;
  }

  /** @param {Privacy} privacy what the app wants of all connections */
  set privacy(privacy) {
    this.machine.privacy = privacy;
  }

  /** What goes on to connect. */
  get attempt() {
    return this.machine.attempt;
  }

  /** The mailboxes that are polled. */
  get mailboxes() {
    return addressesOf(this.record).flatMap(mailboxesOf);
  }

  /** Whether something of the last round is not taken yet. */
  get isBehind() {
    return this.machine.isBehind;
  }

  /** The number of refused messages by reason: the keys are those of REASONS. */
  get dropped() {
    return this.machine.dropped;
  }

  /**
   * Return the mailboxes that are not checked for a while: they have brought too much.
   * @param {Now} now
   */
  resting(now) {
    return this.mailboxes.filter(({ pub }) => this.machine.box(pub).rests(now.monotonicS));
  }

  /**
   * Return how many messages the mailboxes at a relay have brought lately.
   * @param {Now} now
   * @param {string} url
   */
  broughtLately(now, url) {
    const there = this.mailboxes.filter((mailbox) => mailbox.url === url);
    const lately = there.map(({ pub }) => this.machine.box(pub).burst.left(now.monotonicS));
    return lately.reduce((sum, messages) => sum + messages, 0);
  }

  /**
   * Return the seconds until a mailbox at a relay has rested, infinity if none rests.
   * @param {Now} now
   * @param {string} url
   */
  restS(now, url) {
    const resting = this.resting(now).filter((mailbox) => mailbox.url === url);
    const endsS = resting.map(({ pub }) => this.machine.box(pub).restsUntilS);
    return Math.min(Infinity, ...endsS) - now.monotonicS;
  }
}
