// @ts-check
/**
 * Count what was brought lately, where some may come at once and not for ever.
 * @module
 */

/** Messages that were brought lately: each second takes some off. */
export class Burst {
  /** @param {number} perS */
  constructor(perS) {
    this._perS = perS;
    this._messages = 0;
    this._notedS = -Infinity;
  }

  /**
   * Count messages that have come now.
   * @param {number} messages
   * @param {number} nowS
   */
  note(messages, nowS) {
    this._messages = this.left(nowS) + messages;
    this._notedS = nowS;
  }

  /**
   * Return how many of them still count.
   * @param {number} nowS
   */
  left(nowS) {
    return Math.max(0, this._messages - this._perS * (nowS - this._notedS));
  }
}
