// @ts-check
/**
 * What a page or a test hands in: the network, the time, and the window.
 * @module
 */

import { ZERO_EVERY_S } from "./limits.js";

/** @import { Now } from "./contact/effects.js" */

/**
 * @typedef {object} System
 * @property {typeof globalThis.fetch} fetch
 * @property {() => Now} now
 * @property {(seconds: number, signal?: AbortSignal) => Promise<void>} sleep
 *   ends early when its signal says so
 * @property {any} page the window: events and `document.visibilityState`
 */

/**
 * Return the system of this browser.
 * @returns {System}
 */
export function browserSystem() {
  const clock = new Clock();
  return {
    fetch: (...args) => globalThis.fetch(...args),
    now: () => clock.now(),
    sleep,
    page: globalThis,
  };
}

/**
 * The browser's clock. `performance.now()` may stand still while the machine sleeps, and the wall
 * clock may go back: the monotonic time is the larger of both steps.
 */
class Clock {
  constructor() {
    this._wallMs = Date.now();
    this._performanceMs = performance.now();
    this._monotonicMs = 0;
  }

  /** @returns {Now} */
  now() {
    const wallMs = Date.now();
    const performanceMs = performance.now();
    const passedMs = Math.max(wallMs - this._wallMs, performanceMs - this._performanceMs, 0);
    this._monotonicMs += passedMs;
    this._wallMs = wallMs;
    this._performanceMs = performanceMs;
    return { wallUs: wallMs * 1_000, monotonicS: this._monotonicMs / 1_000 };
  }
}

/** @type {System["sleep"]} */
function sleep(seconds, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const boundedS = Math.min(Math.max(seconds, 0), ZERO_EVERY_S);
    const timer = setTimeout(end, 1_000 * boundedS);
    signal?.addEventListener("abort", end);
    if (signal?.aborted) end();
  });
}
