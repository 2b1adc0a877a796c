// @ts-check
/**
 * Problems outside, told once: a relay that is dead for a week causes one complaint.
 * @module
 */

// Remembered about one contact or relay, and of so many the latest. Whoever runs a relay may choose
// the words, and a contact names ever new relays.
export const MAX_COMPLAINTS = 100;
// Of different words about one contact or relay, in an hour. A relay may have ever new ones.
export const MAX_TOLD = 10;
export const TOLD_MS = 3_600_000;

/**
 * The id of a contact, the URL of a relay where this side has mailboxes, or what is sent to one.
 * @typedef {number | string} About
 */

/** Tell the app each complaint once, until what it is about has gone well again. */
export class Complaints {
  /**
   * @param {(error: Error) => void} onProblem
   * @param {() => number} [nowMs]
   */
  constructor(onProblem, nowMs = () => performance.now()) {
    this._nowMs = nowMs;
    this.areOver = false;
    this._onProblem = onProblem;
    // What was told, by what it is about.
    /** @type {Map<About, Set<string>>} */
    this._made = new Map();
    // When something was told lately, by what it is about.
    /** @type {Map<About, number[]>} */
    this._told = new Map();
  }

  /**
   * @param {any} error
   * @param {About} [about]
   */
  make(error, about = "") {
    if (this.areOver) return;
    const wasTold = [...this._made.values()].some((made) => made.has(error.message));
    const made = this._made.get(about) ?? new Set();
    made.add(error.message);
    // The latest is last.
    this._made.delete(about);
    this._made.set(about, made);
    const [oldest] = made;
    if (made.size > MAX_COMPLAINTS) made.delete(oldest);
    const [longestAgo] = this._made.keys();
    if (this._made.size > MAX_COMPLAINTS) this._made.delete(longestAgo);
    if (!wasTold && this._mayTell(about)) queueMicrotask(() => this._onProblem(error));
  }

  /**
   * Return whether new words may be told about something, and count them.
   * @param {About} about
   */
  _mayTell(about) {
    const now = this._nowMs();
    const told = (this._told.get(about) ?? []).filter((at) => at > now - TOLD_MS);
    if (told.length >= MAX_TOLD) return false;
    this._told.delete(about);
    this._told.set(about, [...told, now]);
    const [longestAgo] = this._told.keys();
    if (this._told.size > MAX_COMPLAINTS) this._told.delete(longestAgo);
    return true;
  }

  /**
   * Return the latest that was told about some and has not gone well since, or "".
   * @param {(about: About) => boolean} isAbout
   */
  latest(isAbout) {
    const [made] = [...this._made].filter(([about]) => isAbout(about)).slice(-1);
    return [...made?.[1] ?? []].at(-1) ?? "";
  }

  /**
   * Forget what was told: a relay has answered, or a contact was saved.
   * @param {About} about
   */
  clear(about) {
    this._made.delete(about);
  }
}
