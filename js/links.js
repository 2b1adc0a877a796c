// @ts-check
/**
 * Mailboxes, addresses, invitations and links.
 *
 * Here `address` is always the very string. PROTOCOL.md, "Addresses and links".
 * @module
 */

import {
  PUB_FORM, concat, decodeBase64url, decodeText, encodeBase64url, toUtf8,
} from "./encoding.js";
import { LinkError, Refused, UnsupportedVersionError } from "./errors.js";
import { MAX_ADDRESS_CHARS, MAX_EXT_CHARS, MAX_MAILBOXES, SECRET_BYTES } from "./limits.js";
import { checkUrl } from "./urls.js";
import { LATER } from "./versions.js";

/** @import { Bytes } from "./encoding.js" */

/**
 * A public key at a relay, and the extension that the relay wants to see with every request.
 * @typedef {{pub: string, url: string, ext: string | null}} Mailbox
 *
 * @typedef {[url: string, ext: string | null]} Relay
 *
 * A relay of one's own may have an API key of two halves: addresses have the one that only sends.
 * @typedef {[url: string, ext: string | null, sendKey?: string | null]} OwnRelay
 *
 * With `allowHttp`, http is allowed beyond loopback.
 * @typedef {{allowHttp?: boolean}} Allowed
 *
 * The contents of a link: where to write, the secret S that proves the link, h, and perhaps of
 * which app it is.
 * @typedef {object} Invitation
 * @property {string} text
 * @property {string} address
 * @property {Bytes} secret
 * @property {Bytes} commitment
 * @property {Bytes} appHash
 */

const MARK = "connectoid=";
// Behind S and the 32 bytes of h.
const APP_AT = SECRET_BYTES + 32;
// S and h, perhaps the app's hash: 48 or 54 bytes, whose characters leave no bits unused.
const FOURTH = /^(?:[\w-]{64}|[\w-]{72})$/;

/**
 * Return the address of one to three mailboxes as text.
 * @param {Mailbox[]} mailboxes
 */
export function formatAddress(mailboxes) {
  return mailboxes.map(formatMailbox).join("~");
}

/** @param {Mailbox} mailbox */
function formatMailbox({ pub, url, ext }) {
  const parts = [pub, encodeBase64url(toUtf8(url))];
  if (ext !== null) parts.push(encodeBase64url(toUtf8(ext)));
  return parts.join(".");
}

/**
 * Return the mailboxes of an address.
 * Throw Refused (address), also for one that a client must not ask.
 * `Suite.check` finds out whether the keys are points of the curve.
 * @param {string} address
 * @param {Allowed} [allowed]
 * @returns {Mailbox[]}
 */
export function parseAddress(address, { allowHttp = false } = {}) {
  if (address.length > MAX_ADDRESS_CHARS) {
    throw new Refused("address", `it has more than ${MAX_ADDRESS_CHARS} characters`);
  }
  const texts = address.split("~");
  if (texts.length > MAX_MAILBOXES) {
    throw new Refused("address", `it has more than ${MAX_MAILBOXES} mailboxes`);
  }
  const mailboxes = texts.map((text) => parseMailbox(text, allowHttp));
  const keys = new Set(mailboxes.map(({ pub }) => pub));
  if (keys.size < mailboxes.length) throw new Refused("address", "a key occurs twice in it");
  return mailboxes;
}

/**
 * @param {string} text
 * @param {boolean} allowHttp
 * @returns {Mailbox}
 */
function parseMailbox(text, allowHttp) {
  const [pub, url, ext, ...more] = text.split(".");
  if (!url || ext === "" || more.length) {
    throw new Refused("address", "it is cut off, or has a part too many");
  }
  if (!PUB_FORM.test(pub)) throw new Refused("address", "its key is damaged");
  const mailbox = { pub, url: readPart(url), ext: ext === undefined ? null : readPart(ext) };
  checkUrl(mailbox.url, allowHttp);
  if (mailbox.ext !== null && [...mailbox.ext].length > MAX_EXT_CHARS) {
    throw new Refused("address", `its ext is longer than ${MAX_EXT_CHARS} characters`);
  }
  return mailbox;
}

/** @param {string} part */
function readPart(part) {
  try {
    return decodeText(part);
  } catch {
    throw new Refused("address", "a part of it is not readable");
  }
}

/**
 * Return an invitation: an address whose last mailbox has a fourth part. That is S, h, and the hash
 * of the app if it has an identifier.
 * @param {string} address
 * @param {Bytes} secret
 * @param {Bytes} commitment
 * @param {Bytes} appHash
 */
export function formatInvitation(address, secret, commitment, appHash) {
  const fourth = encodeBase64url(concat(secret, commitment, appHash));
  const last = parseAddress(address, { allowHttp: true }).pop();
  // An `ext` that is not there leaves its place empty.
  const dots = last?.ext === null ? ".." : ".";
  return `${address}${dots}${fourth}`;
}

/**
 * Return the contents of an invitation; throw LinkError with a sentence for the user.
 * That is UnsupportedVersionError for one of a later version.
 * @param {string} text
 * @param {Allowed} [allowed]
 * @returns {Invitation}
 */
export function parseInvitation(text, allowed = {}) {
  if (LATER.test(text)) {
    throw new UnsupportedVersionError(
      "This link needs a newer version of this app. Update the app, and open the link again.");
  }
  const { address, fourth } = splitInvitation(text);
  try {
    parseAddress(address, allowed);
  } catch (error) {
    throw damagedLink(error);
  }
  if (!fourth) throw new LinkError("This link has no secret; ask for a new one.");
  if (!FOURTH.test(fourth)) {
    throw new LinkError("This link is cut off or damaged. Copy it again, whole.");
  }
  const octets = decodeBase64url(fourth);
  const secret = octets.slice(0, SECRET_BYTES);
  const commitment = octets.slice(SECRET_BYTES, APP_AT);
  return { text, address, secret, commitment, appHash: octets.slice(APP_AT) };
}

/**
 * Return the address in an invitation, and the fourth part of its last mailbox.
 * @param {string} text
 */
function splitInvitation(text) {
  const mailboxes = text.split("~");
  const last = /** @type {string} */ (mailboxes.pop());
  const [pub, url = "", ext = "", ...rest] = last.split(".");
  const parts = [pub, url];
  if (ext) parts.push(ext);
  const address = [...mailboxes, parts.join(".")].join("~");
  return { address, fourth: rest.join(".") };
}

/** @param {unknown} error */
function damagedLink(error) {
  const { message } = /** @type {Error} */ (error);
  return new LinkError(
    `This link is damaged: ${message}. Copy it again, whole, or ask for a new one.`);
}

/**
 * Return the link to an app. The invitation is in the fragment, which no server sees.
 * @param {string} appUrl
 * @param {string} invitation
 */
export function makeLink(appUrl, invitation) {
  const [page] = appUrl.split("#");
  return `${page}#${MARK}${invitation}`;
}

/**
 * Return the invitation in a link's fragment or query, or a bare one; throw LinkError.
 * @param {string} link
 * @param {Allowed} [allowed]
 */
export function readLink(link, allowed = {}) {
  const match = /^([^?#]*(?:\?([^#]*))?)(?:#(.*))?$/s.exec(trim(link));
  const [, before, query = "", fragment = ""] = /** @type {RegExpExecArray} */ (match);
  for (const parameter of `${fragment}&${query}`.split("&")) {
    if (parameter.startsWith(MARK)) {
      return parseInvitation(unquote(parameter.slice(MARK.length)), allowed);
    }
  }
  if (fragment || !isBare(before)) {
    throw new LinkError("This is not an invitation link. Copy the whole link again.");
  }
  return parseInvitation(before, allowed);
}

/**
 * Return a text without the blanks around it, the same ones as in Python.
 * @param {string} text
 */
function trim(text) {
  return /[^ \t\r\n\u00a0](?:.*[^ \t\r\n\u00a0])?/s.exec(text)?.[0] ?? "";
}

/** @param {string} text */
function isBare(text) {
  const [pub] = text.split(".");
  return /^[\w.~-]+$/.test(text) && (LATER.test(text) || PUB_FORM.test(pub));
}

/**
 * Return a text without its percent escapes of ASCII. There is nothing else in an invitation: it is
 * refused for what stays.
 * @param {string} text
 */
function unquote(text) {
  return text.replace(/%([0-7][0-9A-Fa-f])/g, (_, hex) => String.fromCharCode(parseInt(hex, 16)));
}
