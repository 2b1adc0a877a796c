// @ts-check
/**
 * The client of a relay: fetch, and nothing believed.
 *
 * PROTOCOL.md, "Operations" and "Guards".
 * @module
 */

import { NOTHING, concat, decodeBase64url, fromAscii, isObject, parseJson } from "./encoding.js";
import { Refused, RelayError, RelayRefusalError, UnreachableError } from "./errors.js";
import { NO_AT } from "./limits.js";
import { isPrivateHost } from "./networks.js";
import { shown } from "./shown.js";
import { CONTEXTS } from "./suite.js";
import { browserSystem } from "./system.js";
import { originOf } from "./urls.js";

/** @import { Poll } from "./contact/effects.js" */
/** @import { Found } from "./contact/inbox.js" */
/** @import { Bytes } from "./encoding.js" */
/** @import { Mailbox } from "./links.js" */
/** @import { Suite } from "./suite.js" */
/** @import { System } from "./system.js" */

export const REQUEST_TIMEOUT_S = 10;
// Where the network may be another one. A browser keeps connections to a relay, and nothing answers
// on one that was made in the former network: each has to fail before a request makes a new one.
export const HURRIED_TIMEOUT_S = 3;
// 100 messages in 512 KiB, with their JSON.
const MAX_REPLY_BYTES = 1_048_576;
// Of the reply to each check of a batch, so that a whole one has a MiB.
export const MAX_CHECK_REPLY_BYTES = 4_096;
// Of the reply to `receive`, beside the data of its messages: 100 messages take 5 KiB. Whatever
// else a relay answers would cost time, and bring nothing.
export const MAX_BESIDE_BYTES = 16_384;
// Of commas and brackets in a reply. A batch of 256 checks has some 2,000. A MiB of empty lists
// would take long to parse.
export const MAX_REPLY_MARKS = 8_192;
const MARKS = new Set([...",[{"].map((mark) => mark.charCodeAt(0)));
const OK = 200;
// Of the reply to a send: a word, or an error with a sentence. Contacts and strangers choose what
// relays they are written to, and could have us download without end.
export const MAX_SEND_REPLY_BYTES = 4096;
const MAX_RETRY_S = 900;
// A shorter pause is over before anybody has read of it, and after a longer one nobody waits.
const MIN_TOLD_PAUSE_S = 60;
const MAX_TOLD_PAUSE_S = 86_400;
// A web page begins with it, and no JSON does.
const LESS_THAN = 0x3c;
const SPACE = 0x20;
const LAST_ASCII = 127;
export const MAX_BATCH_CHECKS = 256;
/**
 * What a refusal means to a user: to be told after the relay's own words.
 * @type {ReadonlyMap<string, string>}
 */
const HINTS = new Map([
  ["Full", " The relay says that others have filled that mailbox, or all of it. It is tried again;"
    + " if nothing comes of it, ask for a new link."],
]);
// Messages that are asked for at once.
export const RECEIVE_LIMIT = 100;
// Of one mailbox in a round: more than a box holds.
export const MAX_RECEIVES = 16;
// Of the data in one reply, and of one message: what PROTOCOL.md allows (RECEIVE-10, FORM-3).
export const MAX_RECEIVE_CHARS = 524_288;
export const MAX_DATA_CHARS = 32_768;
// Of a question: an answer of 655 bytes. Relays choose some 43.
export const MAX_QUESTION_CHARS = 1_024;

/**
 * A reply, and how many octets it had.
 * @typedef {{reply: any, octets: number}} Measured
 */

/** Ask one relay. */
export class RelayClient {
  /**
   * @param {string} url
   * @param {Pick<System, "fetch" | "sleep">} [system]
   * @param {(url: string) => boolean} [mayBePrivate] whether it may be on this machine or network
   * @param {() => number} [timeoutS] how long a request takes at most, beside what it waits for
   */
  constructor(
    url, system = browserSystem(), mayBePrivate = () => true, timeoutS = () => REQUEST_TIMEOUT_S,
  ) {
    this.url = url;
    this._timeoutS = timeoutS;
    this._system = system;
    this._mayBePrivate = mayBePrivate;
  }

  /**
   * Put a message into a mailbox; throw RelayRefusalError, RelayError.
   * @param {Mailbox} mailbox
   * @param {string} data
   * @param {AbortSignal} [signal]
   */
  async send({ pub, ext }, data, signal) {
    await this.ask({ pub, ext, action: "send", data }, 0, signal, MAX_SEND_REPLY_BYTES);
  }

  /**
   * Return the reply to a request: an object with `ok` true, or the list of a batch.
   * Throw RelayRefusalError, RelayError.
   * @param {unknown} request
   * @param {number} [waitS]
   * @param {AbortSignal} [signal]
   * @param {number} [maxBytes] of the reply
   * @returns {Promise<any>}
   */
  async ask(request, waitS = 0, signal = undefined, maxBytes = MAX_REPLY_BYTES) {
    return (await this.askMeasured(request, waitS, signal, maxBytes)).reply;
  }

  /**
   * Return the reply to a request as `ask`, and its size.
   * @param {unknown} request
   * @param {number} [waitS]
   * @param {AbortSignal} [signal]
   * @param {number} [maxBytes] of the reply
   * @returns {Promise<Measured>}
   */
  async askMeasured(request, waitS = 0, signal = undefined, maxBytes = MAX_REPLY_BYTES) {
    // text/plain spares the preflight.
    const headers = { "Content-Type": "text/plain" };
    const init = { method: "POST", body: JSON.stringify(request), headers };
    const { status, reply, octets } = await this._exchange(init, waitS, maxBytes, signal);
    if (isObject(reply) && reply.ok !== true) throw this._refusal(reply);
    if (status !== OK || Array.isArray(reply) !== Array.isArray(request)) {
      throw new RelayError(`${this.url} is not a relay: it answered something else (${status}).`);
    }
    return { reply, octets };
  }

  /**
   * Return what a relay says of itself; throw RelayRefusalError, RelayError.
   * @returns {Promise<Record<string, any>>}
   */
  async document() {
    const init = { headers: { Accept: "application/json" } };
    const { status, reply } = await this._exchange(init, 0, MAX_REPLY_BYTES);
    // A refusal alone has to say whether all is well.
    if (isObject(reply) && "ok" in reply && reply.ok !== true) throw this._refusal(reply);
    if (status !== OK || !isObject(reply)) {
      throw new RelayError(`${this.url} is not a relay: it answered no document (${status}).`);
    }
    return reply;
  }

  /** @param {Record<string, any>} reply */
  _refusal(reply) {
    const hint = (HINTS.get(textOf(reply, "error")) ?? "") + until(reply.retry);
    return new RelayRefusalError(`${this.url} says "${saidBy(reply)}".${hint}`, retryOf(reply));
  }

  /**
   * Return the object or list that a relay answers in time, its status, and its size.
   * Throw RelayError.
   * @param {RequestInit} init
   * @param {number} waitS
   * @param {number} maxBytes
   * @param {AbortSignal} [signal]
   * @returns {Promise<Measured & {status: number}>}
   */
  async _exchange(init, waitS, maxBytes, signal) {
    if (!this._mayBePrivate(this.url) && isPrivateHost(originOf(this.url).host)) {
      throw new RelayError(
        `${this.url} is on this machine or in a private network, and is no relay of yours. ` +
        "Name it as one if you trust it.");
    }
    const abort = new AbortController();
    const over = new AbortController();
    const end = () => abort.abort();
    this._system.sleep(this._timeoutS() + waitS, over.signal).then(end);
    signal?.addEventListener("abort", end);
    try {
      signal?.throwIfAborted();
      return await this._fetch({ ...init, signal: abort.signal }, maxBytes);
    } catch (error) {
      // Some of it is what a stranger's server says.
      const said = shown(String(/** @type {any} */ (error)?.message ?? error));
      throw new UnreachableError(`${this.url} cannot be reached: ${said}.`);
    } finally {
      signal?.removeEventListener("abort", end);
      over.abort();
    }
  }

  /**
   * Fetch without cookies, redirects, caches or a referrer.
   * @param {RequestInit} init
   * @param {number} maxBytes
   * @returns {Promise<Measured & {status: number}>}
   */
  async _fetch(init, maxBytes) {
    const response = await this._system.fetch(this.url, {
      ...init,
      redirect: "error",
      credentials: "omit",
      cache: "no-store",
      referrerPolicy: "no-referrer",
    });
    const octets = await readBody(response, maxBytes);
    if (octets.find((octet) => octet > SPACE) === LESS_THAN) {
      throw new RangeError(
        "it answered a web page, as networks do where users have to log in: open a web page there");
    }
    const marks = octets.reduce((count, octet) => count + Number(MARKS.has(octet)), 0);
    if (marks > MAX_REPLY_MARKS) throw new RangeError("it answered more than was asked");
    const reply = parseJson(octets);
    if (typeof reply !== "object" || reply === null) {
      throw new RangeError("neither an object nor a list");
    }
    return { status: response.status, reply, octets: octets.length };
  }
}

/**
 * Return the words of a relay that refuses; what is no text has none.
 * @param {Record<string, any>} reply
 */
function saidBy({ error, detail }) {
  const words = [error, detail].filter((one) => typeof one === "string" && one);
  // The relay's words end where we say so.
  return shown(words.join(": ")).replace(/\.$/, "").replaceAll('"', "'");
}

/**
 * @param {Response} response
 * @param {number} maxBytes
 */
async function readBody(response, maxBytes) {
  const reader = response.body?.getReader();
  let octets = NOTHING;
  while (reader) {
    const { value, done } = await reader.read();
    if (done) break;
    octets = concat(octets, /** @type {Bytes} */ (value));
    if (octets.length > maxBytes) {
      reader.cancel().catch(() => {});
      throw new RangeError(`a reply over ${(maxBytes / 1024).toLocaleString("en")} KiB`);
    }
  }
  return octets;
}

/**
 * Return the seconds after which a relay wants to be asked again, 0 if it did not say.
 * @param {unknown} error
 */
export function retryS(error) {
  return error instanceof RelayError ? error.retryS : 0;
}

/**
 * Return a member that is text, else nothing: a relay may have put anything there.
 * @param {any} reply
 * @param {string} name
 */
function textOf(reply, name) {
  return typeof reply[name] === "string" ? reply[name] : "";
}

/**
 * Return until when a relay wants to be left alone, for people; nothing if that is soon.
 * @param {unknown} retry
 */
function until(retry) {
  if (typeof retry !== "number" || retry <= MIN_TOLD_PAUSE_S || retry > MAX_TOLD_PAUSE_S) return "";
  // The minute after, as the clock shows no seconds.
  const at = new Date(Date.now() + (retry + MIN_TOLD_PAUSE_S) * 1_000);
  const clock = at.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  return ` It asks you to wait until ${clock}.`;
}

/** @param {any} reply */
function retryOf(reply) {
  const isGiven = typeof reply.retry === "number" && reply.retry > 0;
  return isGiven ? Math.min(reply.retry, MAX_RETRY_S) : 0;
}

// -- Bounds on what is read --------------------------------------------------------------

// As many as one mailbox can bring.
export const MAX_MESSAGES = MAX_RECEIVES * RECEIVE_LIMIT;
// Of replies. Twice what a relay keeps in a box, unless its host has raised that.
export const MAX_BYTES = 16 * 1_048_576;

/**
 * What may still be read for one contact in this round.
 *
 * It is looked at before each request. Once so much was read, what is left in that mailbox, and the
 * contact's other mailboxes at this relay, wait for the next round: a relay that makes messages up,
 * or a stranger who fills mailboxes, holds nobody else up.
 */
export class Budget {
  constructor() {
    this.questions = 0;
    this._messages = 0;
    this._bytes = 0;
  }

  /** How many decryptions it takes: one for each question and message. */
  get opened() {
    return this.questions + this._messages;
  }

  get isSpent() {
    return this._messages >= MAX_MESSAGES || this._bytes >= MAX_BYTES;
  }

  /**
   * Count messages that were read, and the octets of the reply that brought them.
   * @param {number} messages
   * @param {number} octets
   */
  spend(messages, octets) {
    this._messages += messages;
    this._bytes += octets;
  }
}

/** @param {Found} messages */
function charsOf(messages) {
  return messages.reduce((sum, [, data]) => sum + data.length, 0);
}

// -- Reading mailboxes: a batch of checks, then for each mailbox with messages an answer ---

/**
 * A mailbox and what the relay said when it was checked.
 * @typedef {{poll: Poll, reply: any}} Checked
 */

/**
 * Check mailboxes in one batch, and wait until one has messages; throw RelayError.
 * @param {RelayClient} client
 * @param {Poll[]} polls
 * @param {number} waitS
 * @param {AbortSignal} [signal]
 * @returns {Promise<Checked[]>}
 */
export async function checkMailboxes(client, polls, waitS, signal) {
  const checks = polls.map(({ mailbox: { pub, ext }, at }) => (
    { pub, ext, action: "check", at, wait: waitS }));
  const replies = await client.ask(checks, waitS, signal, MAX_CHECK_REPLY_BYTES * checks.length);
  if (replies.length !== checks.length) {
    throw new RelayError(`${client.url} did not answer a batch with as many replies.`);
  }
  return polls.map((poll, place) => ({ poll, reply: replies[place] }));
}

/**
 * Return [at, data] of a mailbox that was checked, as far as the budget goes.
 * Throw RelayRefusalError, RelayError.
 * @param {Suite} suite
 * @param {RelayClient} client
 * @param {Checked} checked
 * @param {Budget} budget
 */
export async function readMailbox(suite, client, { poll, reply }, budget) {
  if (!isObject(reply)) {
    throw new RelayError(`${client.url} is not a relay: it answered a check with no object.`);
  }
  if (reply.ok !== true) {
    throw new RelayRefusalError(`${client.url} refused a check.`, retryOf(reply));
  }
  /** @type {Found} */
  const messages = [];
  if (reply.found !== true) return messages;
  const { pub, ext } = poll.mailbox;
  const answer = await answerTo(suite, client.url, poll, reply);
  budget.questions += 1;
  let { at } = poll;
  for (let turn = 0; turn < MAX_RECEIVES && !budget.isSpent; turn += 1) {
    const request = { pub, ext, action: "receive", limit: RECEIVE_LIMIT, answer, at };
    const received = await client.askMeasured(request);
    const more = messagesOf(client.url, received, at);
    budget.spend(more.length, received.octets);
    if (!more.length) break;
    messages.push(...more);
    [at] = more[more.length - 1];
  }
  return messages;
}

/**
 * Return what a relay lends to the owner of a mailbox, undefined if nothing. It takes a proof, and
 * no message. Throw RelayError. PROTOCOL.md, "TURN".
 * @param {Suite} suite
 * @param {RelayClient} client
 * @param {Poll} poll
 * @returns {Promise<unknown>}
 */
export async function askForTurn(suite, client, poll) {
  const { pub, ext } = poll.mailbox;
  const request = { pub, ext, at: NO_AT };
  const asked = await client.ask({ ...request, action: "check", prove: true });
  // An older relay asks nothing where there is no message.
  if (!asked.question) return undefined;
  const answer = await answerTo(suite, client.url, poll, asked);
  const found = await client.ask({ ...request, action: "receive", answer, turn: true });
  return found.turn;
}

/**
 * @param {Suite} suite
 * @param {string} url
 * @param {Poll} poll
 * @param {any} reply
 */
async function answerTo(suite, url, { key }, reply) {
  const question = textOf(reply, "question");
  if (question.length > MAX_QUESTION_CHARS) {
    throw new RelayError(`${url} is not a relay: its question is too long.`);
  }
  try {
    const octets = await suite.open(key, CONTEXTS.question, decodeBase64url(question));
    if (octets.some((octet) => octet > LAST_ASCII)) throw new Refused("encoding");
    return fromAscii(octets);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    throw new RelayError(`${url} is not a relay: it asked what only others can answer.`);
  }
}

/**
 * Return the messages of a reply, none at the end of a mailbox.
 *
 * Throw RelayError for more than was asked for or than a relay may answer, before any is kept.
 * @param {string} url
 * @param {Measured} received
 * @param {number} after
 * @returns {Found}
 */
function messagesOf(url, { reply, octets }, after) {
  const { messages = [] } = reply;
  if (!Array.isArray(messages) || messages.length > RECEIVE_LIMIT) {
    throw new RelayError(`${url} is not a relay: it answered no list, or one that is too long.`);
  }
  /** @type {Found} */
  const found = [];
  let last = after;
  for (const message of messages) {
    if (!isMessage(message, last)) {
      throw new RelayError(`${url} is not a relay: it answered messages of a wrong form.`);
    }
    last = message.at;
    found.push([last, message.data]);
  }
  const chars = charsOf(found);
  if (chars > MAX_RECEIVE_CHARS || octets > chars + MAX_BESIDE_BYTES) {
    throw new RelayError(`${url} is not a relay: it answered more data than it may.`);
  }
  return found;
}

/**
 * Say whether a message has its form and comes after another one.
 * @param {any} message
 * @param {number} after
 */
function isMessage(message, after) {
  return Number.isSafeInteger(message?.at) && message.at > after
    && typeof message.data === "string" && message.data.length <= MAX_DATA_CHARS;
}
