// @ts-check
/**
 * From bytes and text to values that the rest may trust.
 *
 * Every function is pure. It returns the value or throws Refused. PROTOCOL.md, "Conventions".
 * @module
 */

import { Refused } from "./errors.js";
import { MAX_JSON_LEVELS } from "./limits.js";

/** @typedef {Uint8Array<ArrayBuffer>} Bytes */

export const NOTHING = new Uint8Array();

// The last character of a text leaves bits unused; they must be zero.
const BASE64URL = /^(?:[\w-]{4})*(?:[\w-][AQgw]|[\w-]{2}[AEIMQUYcgkosw048])?$/;

// A public key: 49 bytes that begin with 2 or 3.
export const PUB_FORM = /^A[g-z0-9_-][\w-]{63}[AQgw]$/;

/** @param {string} text */
export function toUtf8(text) {
  return new TextEncoder().encode(text);
}

/** @param {BufferSource} octets */
export function fromUtf8(octets) {
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  return decoder.decode(octets);
}

/** @param {Bytes} octets */
export function fromAscii(octets) {
  return String.fromCharCode(...octets);
}

/** @param {...Bytes} parts */
export function concat(...parts) {
  const size = parts.reduce((count, part) => count + part.length, 0);
  const whole = new Uint8Array(size);
  let start = 0;
  for (const part of parts) {
    whole.set(part, start);
    start += part.length;
  }
  return whole;
}

/**
 * Compare in constant time.
 * @param {Bytes} one
 * @param {Bytes} other
 */
export function isSame(one, other) {
  let difference = one.length ^ other.length;
  for (let place = 0; place < one.length; place += 1) {
    difference |= one[place] ^ other[place];
  }
  return difference === 0;
}

/**
 * Return RFC 4648 base64url without padding.
 * @param {Bytes} octets
 */
export function encodeBase64url(octets) {
  let text = "";
  for (const octet of octets) text += String.fromCharCode(octet);
  const padded = btoa(text).replaceAll("+", "-").replaceAll("/", "_");
  return padded.replace(/=+$/, "");
}

/**
 * Return the bytes that base64url stands for.
 * Throw Refused (encoding) for padding, another alphabet or unused bits.
 * @param {string} text
 * @returns {Bytes}
 */
export function decodeBase64url(text) {
  if (!BASE64URL.test(text)) throw new Refused("encoding");
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(binary, (char) => char.charCodeAt(0));
}

/**
 * Return the text whose UTF-8 is in base64url; throw Refused (encoding).
 * @param {string} text
 */
export function decodeText(text) {
  const octets = decodeBase64url(text);
  try {
    return fromUtf8(octets);
  } catch {
    throw new Refused("encoding", "not UTF-8");
  }
}

/**
 * Throw RangeError for a lone surrogate, which has no UTF-8.
 * @param {unknown} value
 */
export function checkText(value) {
  // Not String(value): an object may have a member of the name toString.
  const isText = typeof value === "string";
  if (isText && /\p{Surrogate}/u.test(value)) throw new RangeError("a lone surrogate");
}

const STRING = /"[^"\\]*(?:\\[^][^"\\]*)*"?/g;
const NO_BRACKETS = /[^\][{}]+/g;

/**
 * Say whether JSON has more than MAX_JSON_LEVELS, in one look from one end to the other.
 * What reads it may follow each level on the stack: a look comes before.
 * @param {string} text
 */
export function isDeep(text) {
  const brackets = text.replace(STRING, "").replace(NO_BRACKETS, "");
  let levels = 0;
  for (const bracket of brackets) {
    levels += "[{".includes(bracket) ? 1 : -1;
    if (levels > MAX_JSON_LEVELS) return true;
  }
  return false;
}

/**
 * Return a value from JSON in UTF-8; throw Refused (payload).
 * @param {BufferSource} octets
 * @returns {any}
 */
export function parseJson(octets) {
  try {
    const text = fromUtf8(octets);
    if (isDeep(text)) throw new RangeError("too many levels");
    return JSON.parse(text, (name, value) => {
      checkText(name);
      checkText(value);
      return value;
    });
  } catch {
    throw new Refused("payload", "not JSON in UTF-8");
  }
}

/**
 * @param {unknown} value
 * @returns {value is Record<string, any>}
 */
export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
