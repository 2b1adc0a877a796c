// @ts-check
/**
 * What WebRTC reports: data goes to the app, and all else to the machine of the contact.
 * @module
 */

import { FULL, MAX_QUEUED_MESSAGES, TOO_LARGE, WRONG, isTooLarge } from "./channel.js";
import { NOTHING } from "./encoding.js";
import { ConnectoidError, NotConnectedError } from "./errors.js";

/** @import { Complaints } from "./complaints.js" */
/** @import { Contact } from "./contact/contact.js" */
/** @import { Now } from "./contact/effects.js" */
/** @import { Bytes } from "./encoding.js" */
/** @import { Entry, Roster } from "./roster.js" */
/** @import { Steps } from "./steps.js" */
/** @import { Report, WebRTC } from "./webrtc.js" */

/**
 * The part of the runner that reports need.
 * @typedef {object} Host
 * @property {Roster} roster
 * @property {Complaints} complaints
 * @property {WebRTC} webrtc
 * @property {boolean} stopped
 * @property {() => void} doubtWays has the ways to all relays tried
 */

/** Take reports, and refuse connections that bring what they must not. */
export class Reports {
  /**
   * @param {Host} host
   * @param {Steps} steps
   */
  constructor(host, steps) {
    this._host = host;
    this._steps = steps;
  }

  /** @type {Report} */
  take(number, event, attemptId, value) {
    const entry = this._host.roster.entries.get(number);
    if (!entry || this._host.stopped) return;
    if (event === "trouble") {
      this._host.complaints.make(new ConnectoidError(value), number);
    } else if (event === "refused") {
      this.refuse(number, attemptId, WRONG);
    } else if (event === "message") {
      this._messageCame(number, entry, attemptId, value);
    } else {
      // It may be this end that has lost its network.
      if (event === "silent") this._host.doubtWays();
      this._steps.make(number, (contact, now) => hear(contact, now, event, attemptId, value));
    }
  }

  /**
   * Close a connection that brought what it must not, unless a newer one is there.
   * @param {number} number
   * @param {number} attemptId
   * @param {string} why
   */
  async refuse(number, attemptId, why) {
    const { roster, complaints, webrtc } = this._host;
    const entry = roster.entries.get(number);
    if (entry?.contact.attempt.attemptId !== attemptId) return;
    const isTheirs = entry.channel?.attemptId === attemptId;
    // It is refused already: what still comes begins no further step.
    if (isTheirs && entry.channel?.closed) return;
    complaints.make(new NotConnectedError(`${entry.record.name}: ${why}`));
    // At once: what else has come on this connection is of no interest.
    webrtc.close(number, attemptId);
    if (isTheirs) entry.channel?.end(why);
    await this._steps.make(number, (contact, now) => contact.disconnect(now));
  }

  /**
   * Hand a message to the app; before its channel is there, to the machine.
   * @param {number} number
   * @param {Entry} entry
   * @param {number} attemptId
   * @param {Bytes | string} message
   */
  _messageCame(number, entry, attemptId, message) {
    // Here, behind every adapter; and before the channel is proven as well.
    if (isTooLarge(message)) {
      this.refuse(number, attemptId, TOO_LARGE);
      return;
    }
    const isTheirs = () => entry.channel?.attemptId === attemptId;
    // The way of all data. Only a message that comes amid steps has to wait for them.
    if (!entry.waiting && isTheirs()) {
      entry.channel?.take(message);
      return;
    }
    if (entry.waiting > MAX_QUEUED_MESSAGES) {
      this.refuse(number, attemptId, FULL);
      return;
    }
    this._steps.make(number, async (contact, now) => {
      if (!isTheirs()) return contact.channelMessage(now, attemptId, asOctets(message));
      entry.channel?.take(message);
      return [];
    });
  }
}

/**
 * Give a contact what WebRTC says of an attempt.
 * @param {Contact} contact
 * @param {Now} now
 * @param {string} event
 * @param {number} attemptId
 * @param {any} value
 */
function hear(contact, now, event, attemptId, value) {
  if (event === "gathered") return contact.gathered(now, attemptId, value);
  if (event === "opened") return contact.channelOpened(now, attemptId);
  if (event === "silent") return contact.channelSilent(now, attemptId);
  return contact.channelClosed(now, attemptId);
}

/**
 * A machine takes no text: empty, it is refused.
 * @param {Bytes | string} message
 */
function asOctets(message) {
  return typeof message === "string" ? NOTHING : message;
}
