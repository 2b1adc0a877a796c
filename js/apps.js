// @ts-check
/**
 * The identifier of an app, by which the link of one app is not opened by another.
 *
 * PROTOCOL.md, "Apps".
 * @module
 */

import { UsageError } from "./errors.js";
import { MAX_APP_CHARS } from "./limits.js";

// A domain in reverse, or an origin: `org.example.list`, `https://list.example.org`.
const FORM = /^[A-Za-z0-9][A-Za-z0-9.:/_-]*$/;

/**
 * Say whether a value has the form of an app's identifier.
 * @param {unknown} value
 * @returns {boolean}
 */
export function isApp(value) {
  return typeof value === "string" && value.length <= MAX_APP_CHARS && FORM.test(value);
}

/**
 * Return an identifier, or an empty text for an app that has none; throw UsageError.
 * @param {string} app
 */
export function checkApp(app) {
  if (app !== "" && !isApp(app)) {
    throw new UsageError(
      `An app's identifier has 1 to ${MAX_APP_CHARS} of A-Z a-z 0-9 . : / _ - and begins`
      + " with a letter or digit.");
  }
  return app;
}
