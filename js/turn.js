// @ts-check
/**
 * TURN: what a relay lends to those who own a mailbox there, for connections without a direct path.
 *
 * Credentials are asked for just before a connection is made, for one contact at a time. They stay
 * in memory, and are used until their time is over. PROTOCOL.md, "TURN".
 * @module
 */

import { isObject } from "./encoding.js";
import { RelayError } from "./errors.js";
import { MAX_TURN_CHARS, MAX_TURN_TTL_S, MAX_TURN_URLS } from "./limits.js";
import { isPrivateHost } from "./networks.js";
import { askForTurn } from "./relay_client.js";
import { originOf } from "./urls.js";

/** @import { Poll } from "./contact/effects.js" */
/** @import { RelayClient } from "./relay_client.js" */
/** @import { Suite } from "./suite.js" */

/**
 * TURN servers by their URLs, with what they want to see for so many seconds.
 * @typedef {object} TurnServer
 * @property {string[]} urls
 * @property {string} username
 * @property {string} credential
 * @property {number} ttlS
 */

const URL_FORM = /^turns?:(?<server>[^/?#]+)(?:\?transport=(?:udp|tcp))?$/;
const WORD = /^[!-~]+$/;

/**
 * Return what WebRTC gets of a TURN server.
 * @param {TurnServer} server
 * @returns {RTCIceServer}
 */
export function asIceServer({ urls, username, credential }) {
  return { urls, username, credential };
}

/**
 * Return whether a relay lends TURN servers, by what it says of itself.
 * @param {Record<string, unknown>} document
 */
export function lendsTurn(document) {
  return document.turn === true;
}

/**
 * Return the TURN servers that the relay with a URL lends; throw RelayError for another form.
 * Those of one's own machine or network are for a relay that is there too.
 * @param {any} turn
 * @param {string} url
 * @returns {TurnServer}
 */
export function readTurn(turn, url) {
  const mayBePrivate = isPrivateHost(originOf(url).host);
  const { urls, username, credential, ttl } = isObject(turn) ? turn : {};
  if (!Array.isArray(urls) || !Number.isSafeInteger(ttl) || ttl < 1) {
    throw wrong("a member is missing, or of another form");
  }
  checkUrls(urls, mayBePrivate);
  checkWord(username);
  checkWord(credential);
  return { urls, username, credential, ttlS: Math.min(ttl, MAX_TURN_TTL_S) };
}

/**
 * @param {any[]} urls
 * @param {boolean} mayBePrivate
 */
function checkUrls(urls, mayBePrivate) {
  if (urls.length < 1 || urls.length > MAX_TURN_URLS) {
    throw wrong(`there are 1 to ${MAX_TURN_URLS} URLs`);
  }
  for (const url of urls) {
    const server = typeof url === "string" && URL_FORM.exec(url)?.groups?.server;
    if (!server) throw wrong("a URL looks like turn:turn.example.com:3478");
    if (isPrivateHost(hostOf(server)) && !mayBePrivate) {
      throw wrong("a server is on this machine or in a private network");
    }
  }
}

/** @param {string} server a host, perhaps with a port */
function hostOf(server) {
  try {
    return originOf(`https://${server}`).host;
  } catch {
    throw wrong("a host is none that all programs read alike");
  }
}

/** @param {any} text */
function checkWord(text) {
  if (typeof text !== "string" || text.length > MAX_TURN_CHARS || !WORD.test(text)) {
    throw wrong(`a user name or password is of 1 to ${MAX_TURN_CHARS} characters of ASCII`);
  }
}

/** @param {string} why */
function wrong(why) {
  return new RelayError(`A relay lends TURN servers that are left out: ${why}.`);
}

/**
 * Know what one relay has lent, by the mailboxes that proved it. Each is of one contact. So no two
 * share a name, and a TURN server cannot tell that they are of one user.
 */
export class Loans {
  /**
   * @param {RelayClient} client
   * @param {Suite} suite
   * @param {() => number} nowS
   */
  constructor(client, suite, nowS) {
    this._client = client;
    this._suite = suite;
    this._nowS = nowS;
    // Until when each is lent.
    /** @type {Map<string, {server: TurnServer, untilS: number}>} */
    this._loans = new Map();
  }

  /**
   * Return what is lent to a mailbox, undefined if there is nothing, or its time is over.
   * @param {Poll} poll
   */
  of({ mailbox: { pub } }) {
    const loan = this._loans.get(pub);
    return loan && loan.untilS > this._nowS() ? loan.server : undefined;
  }

  /**
   * Ask for what a mailbox may have, unless half of the time is left of what it has. The relay may
   * lend nothing. Throw RelayError.
   * @param {Poll} poll
   */
  async renew(poll) {
    const askedS = this._nowS();
    const { pub } = poll.mailbox;
    for (const [other, { untilS }] of this._loans) {
      if (untilS <= askedS) this._loans.delete(other);
    }
    const loan = this._loans.get(pub);
    if (loan && askedS < loan.untilS - loan.server.ttlS / 2) return;
    const lent = await askForTurn(this._suite, this._client, poll);
    if (lent === undefined) return;
    const server = readTurn(lent, this._client.url);
    this._loans.set(pub, { server, untilS: askedS + server.ttlS });
  }
}
