// @ts-check
/**
 * Versions of the protocol: those that this library speaks, and what two apps make of theirs.
 *
 * PROTOCOL.md, "Versions".
 * @module
 */

import { Refused } from "./errors.js";
import { MAX_VERSION, MAX_VERSIONS } from "./limits.js";

/** What this library speaks. Links are those of version 1. */
export const VERSIONS = [1, 2];

/** The first version that knows `renew`. An older app drops it, and all that the new key signs. */
export const RENEWAL_VERSION = 2;

// What a hello or welcome speaks that does not say so.
const UNSAID = [1];

/** The beginning of an invitation of a later version: its number, from 2 to 999, and a tilde. */
export const LATER = /^(?:[2-9]|[1-9][0-9]{1,2})~/;

/**
 * Say whether a value is a list of versions, each larger than the one before.
 * @param {unknown} value
 * @returns {boolean}
 */
export function isListOfVersions(value) {
  if (!Array.isArray(value) || !value.length || value.length > MAX_VERSIONS) return false;
  return value.every((each, place) =>
    Number.isSafeInteger(each) && each <= MAX_VERSION && each > (place ? value[place - 1] : 0));
}

/**
 * Return the versions that the sender of a hello or welcome speaks.
 * @param {Record<string, any>} payload
 * @returns {number[]}
 */
export function spokenBy({ versions }) {
  return versions ?? UNSAID;
}

/**
 * Return the highest version of both; throw Refused (version) if they have none in common.
 * @param {number[]} ours
 * @param {number[]} theirs
 */
export function highestCommon(ours, theirs) {
  const common = ours.filter((version) => theirs.includes(version));
  if (!common.length) throw new Refused("version");
  return Math.max(...common);
}
