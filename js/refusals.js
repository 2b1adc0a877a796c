// @ts-check
/**
 * What was refused of each contact: counted by reason, told, and written down.
 *
 * Anybody who may write to a mailbox decides how much is refused. So this costs a number for each
 * reason, an event for each reason an hour, and a write a minute.
 * @module
 */

import { ROUTINE } from "./errors.js";
import { TELL_EVERY_S } from "./limits.js";

/** @import { Contact } from "./contact/contact.js" */

// Between two writes for one contact: what a page that is left may lose of the counts.
export const WRITTEN_EVERY_S = 60;
/** Keep the refusals of one contact. */
export class Refusals {
  /** @param {Record<string, number>} [written] the counts of earlier pages */
  constructor(written = {}) {
    this.counts = { ...written };
    this.isWritten = true;
    this._writtenS = -Infinity;
    /** @type {Contact | null} */
    this._machine = null;
    /** @type {Record<string, number>} */
    this._seen = {};
    /** @type {Record<string, number>} */
    this._toldS = {};
  }

  /**
   * Count what a step has refused; return whether to tell the app now.
   * @param {Contact} contact
   * @param {number} nowS
   */
  note(contact, nowS) {
    if (this._machine !== contact) {
      // The machine was made anew from its record.
      this._machine = contact;
      this._seen = {};
    }
    const { dropped } = contact;
    const more = Object.keys(dropped).filter((reason) => dropped[reason] !== this._seen[reason]);
    for (const reason of more) {
      const before = this.counts[reason] ?? 0;
      this.counts[reason] = before + dropped[reason] - (this._seen[reason] ?? 0);
      this._seen[reason] = dropped[reason];
      this.isWritten = false;
    }
    return this._isToTell(more, nowS);
  }

  /**
   * Say whether the counts are to be written down now. If so, they count as written: nothing
   * depends on them.
   * @param {number} nowS
   */
  isToWrite(nowS) {
    if (this.isWritten || nowS - this._writtenS < WRITTEN_EVERY_S) return false;
    this.isWritten = true;
    this._writtenS = nowS;
    return true;
  }

  /**
   * Say whether one of the reasons was not told for an hour. If so, it counts as told.
   * @param {string[]} reasons
   * @param {number} nowS
   */
  _isToTell(reasons, nowS) {
    const untold = reasons.filter((reason) => (
      !ROUTINE.includes(reason) && nowS - (this._toldS[reason] ?? -Infinity) >= TELL_EVERY_S));
    for (const reason of untold) this._toldS[reason] = nowS;
    return untold.length > 0;
  }
}
