// @ts-check
/**
 * The channel: what an app has of a connection.
 *
 * What waits in it is bounded: an app that does not take what comes loses the connection, not its
 * memory. So is each message.
 * @module
 */

import { NotConnectedError, UsageError } from "./errors.js";
import { MAX_CHANNEL_BYTES } from "./limits.js";
import { CLOSED } from "./webrtc.js";

/** @import { Bytes } from "./encoding.js" */

/**
 * The part of the runner that a channel needs.
 * @typedef {object} Host
 * @property {{write: import("./webrtc.js").WebRTC["write"]}} webrtc
 * @property {(contact: number) => Promise<void>} hangUp
 * @property {(contact: number, attemptId: number, why: string) => Promise<void>} refuse
 */

// How many messages wait for an app that does not take them. With one more the channel is closed.
export const MAX_QUEUED_MESSAGES = 1_024;
export const FULL =
  `The connection is closed: ${MAX_QUEUED_MESSAGES} messages wait that were not received.`;
export const TOO_LARGE = "The connection is closed: a message of more than 64 KiB came.";
export const WRONG = "The connection is closed: the other end broke the rules of data channels.";

/**
 * Return whether a message has more bytes than a channel carries.
 * @param {Bytes | string} message
 */
export function isTooLarge(message) {
  // A string has at least as many bytes as code units.
  if (message.length > MAX_CHANNEL_BYTES) return true;
  return typeof message === "string"
    && new TextEncoder().encode(message).length > MAX_CHANNEL_BYTES;
}

/** A connection to a contact: messages in order, bytes or strings, up to 64 KiB each. */
export class Channel {
  /**
   * @param {Host} host
   * @param {number} contact
   * @param {number} attemptId
   */
  constructor(host, contact, attemptId) {
    this.attemptId = attemptId;
    this.closed = false;
    // What is said of the end.
    this.why = CLOSED;
    this._host = host;
    this._contact = contact;
    /** @type {(Bytes | string | null)[]} */
    this._came = [];
    /** @type {((message: Bytes | string | null) => unknown) | null} */
    this._listener = null;
    this._isDelivering = false;
    this._arrived = () => {};
  }

  /**
   * Send a message; resolve when there is room for more.
   * Throw NotConnectedError, and UsageError for more than 64 KiB.
   * @param {Bytes | string} message
   */
  async send(message) {
    if (isTooLarge(message)) {
      throw new UsageError("A message has at most 64 KiB: send it in parts.");
    }
    if (this.closed) throw new NotConnectedError(this.why);
    await this._host.webrtc.write(this._contact, this.attemptId, message);
  }

  /**
   * Return the next message, for one caller at a time.
   * Throw NotConnectedError once the channel is closed and empty.
   */
  async receive() {
    while (!this._came.length) await this._next();
    const [message] = this._came;
    // The end stays, for further calls.
    if (message === null) throw new NotConnectedError(this.why);
    this._came.shift();
    return message;
  }

  /** Return the messages up to the end: `for await (const message of channel)`. */
  async* [Symbol.asyncIterator]() {
    for (;;) {
      try {
        yield await this.receive();
      } catch (error) {
        if (error instanceof NotConnectedError) return;
        throw error;
      }
    }
  }

  /**
   * Call a function with each message, those that came already first; null is the end.
   * If it returns a promise, the next message waits for that. What it throws goes to the console.
   * @param {(message: Bytes | string | null) => unknown} listener
   */
  listen(listener) {
    this._listener = listener;
    this._deliver();
  }

  /** Disconnect. Earlier messages may still be received. Idempotent. */
  async close() {
    if (this.closed) return;
    this.take(null);
    await this._host.hangUp(this._contact);
  }

  /**
   * Take a message from the other side, or the end.
   * @param {Bytes | string | null} message
   */
  take(message) {
    if (this.closed) return;
    if (message !== null && this._came.length >= MAX_QUEUED_MESSAGES) {
      this._host.refuse(this._contact, this.attemptId, FULL);
      return;
    }
    this.closed = message === null;
    this._came.push(message);
    this._deliver();
    this._arrived();
  }

  /**
   * Take the end, with what is said of it.
   * @param {string} why
   */
  end(why) {
    if (this.closed) return;
    this.why = why;
    this.take(null);
  }

  /** Give the listener what has come, unless a call of it is doing so. */
  async _deliver() {
    if (this._isDelivering) return;
    this._isDelivering = true;
    while (this._listener && this._came.length) {
      const [message] = this._came.splice(0, 1);
      const heard = call(this._listener, message);
      if (heard instanceof Promise) await heard.catch(logFailure);
    }
    this._isDelivering = false;
  }

  /** @returns {Promise<void>} */
  _next() {
    return new Promise((resolve) => {
      this._arrived = resolve;
    });
  }
}

/**
 * Call a listener. One that fails must not break off a step of its contact.
 * @param {(message: Bytes | string | null) => unknown} listener
 * @param {Bytes | string | null} message
 */
function call(listener, message) {
  try {
    return listener(message);
  } catch (error) {
    return logFailure(error);
  }
}

/** @param {unknown} error */
function logFailure(error) {
  console.error("A listener failed.", error);
}
