// @ts-check
/**
 * How long to wait before a relay is asked again.
 * @module
 */

import { retryS } from "./relay_client.js";

// Between the starts of two checks at one relay, at least.
export const CHECK_EVERY_S = 2;
// After failures of a relay, one after the other.
const BACKOFF_S = [2, 5, 15, 30, 60];
// Of every pause, so that many clients do not come back together.
const JITTER = 0.25;

/**
 * Return the pause after a failure, up to a quarter longer.
 * @param {unknown} error
 * @param {number} failures those before it
 */
export function backoffS(error, failures) {
  const place = Math.min(failures, BACKOFF_S.length - 1);
  const pauseS = Math.max(retryS(error), BACKOFF_S[place]);
  return pauseS * (1 + JITTER * Math.random());
}
