// @ts-check
/**
 * How long to wait before a relay is asked again.
 * @module
 */

import { retryS } from "./relay_client.js";

// Between the starts of two checks at one relay, at least.
export const CHECK_EVERY_S = 2;
// After a failure of a relay: this part of the time since it last answered, within bounds. So it is
// asked every few seconds for some minutes, and whoever waits for it waits little longer.
const AWAY_PART = 0.01;
export const MIN_RETRY_S = CHECK_EVERY_S;
export const MAX_RETRY_S = 60;
// Of every pause, so that many clients do not come back together.
const JITTER = 0.25;

/**
 * Return the pause before a relay is asked again that has failed for so long.
 * @param {number} awayS
 */
export function pauseS(awayS) {
  return Math.min(MAX_RETRY_S, Math.max(MIN_RETRY_S, AWAY_PART * awayS));
}

/**
 * Return the pause after an error, up to a quarter longer.
 * @param {unknown} error
 * @param {number} awayS how long the relay has failed
 */
export function pauseAfterS(error, awayS) {
  return Math.max(retryS(error), pauseS(awayS)) * (1 + JITTER * Math.random());
}
