// @ts-check
/**
 * Steps of the machines: what they ask for is done before the next one of the same contact.
 *
 * The store is written here, and what leaves the page goes to the carrier: what could not be saved
 * is not sent. A step that fails takes its contact back to the last record, and costs no other.
 * Unlike in Python steps wait, for keys and for the store, so each contact has a queue.
 * @module
 */

import { UsageError } from "./errors.js";

/** @import { Carrier } from "./carrier.js" */
/** @import { Complaints } from "./complaints.js" */
/** @import { Contact } from "./contact/contact.js" */
/** @import { Effect, Now } from "./contact/effects.js" */
/** @import { Lines } from "./line.js" */
/** @import { Entry, Roster } from "./roster.js" */
/** @import { System } from "./system.js" */

// Between two ticks, at least.
const TICK_S = 0.05;

/** @typedef {(contact: Contact, now: Now) => Promise<Effect[]>} Step */

/**
 * The part of the runner that steps need.
 * @typedef {object} Host
 * @property {System} system
 * @property {Roster} roster
 * @property {Complaints} complaints
 * @property {boolean} stopped
 */

/** Make the steps of the contacts on a roster, and do what they ask for. */
export class Steps {
  /**
   * @param {Host} host
   * @param {Carrier} carrier
   * @param {Lines} lines
   */
  constructor(host, carrier, lines) {
    this._host = host;
    this._carrier = carrier;
    this._lines = lines;
    // Aborted with every step, and replaced: all that wait for something look again.
    this._changed = new AbortController();
  }

  /** Return a signal that the next change aborts. */
  get changed() {
    return this._changed.signal;
  }

  /** Wake all that wait for `changed`. */
  noteChange() {
    this._changed.abort();
    this._changed = new AbortController();
  }

  /**
   * Make a step of a contact after the one before, and do what it asks for, in order.
   * Throw StoreError, and UsageError of the machine.
   * @param {number} number
   * @param {Step} step
   */
  run(number, step) {
    const entry = this._host.roster.entries.get(number);
    if (!entry) return Promise.resolve();
    entry.waiting += 1;
    const run = entry.last.then(() => this._runNow(number, entry, step));
    entry.last = run.catch(() => {});
    return run;
  }

  /**
   * Make a step that no app has asked for: its failure is a complaint.
   * @param {number} number
   * @param {Step} step
   */
  async make(number, step) {
    await this.run(number, step).catch((error) => this._host.complaints.make(error, number));
  }

  /**
   * Make a step of several contacts that no app has asked for.
   * @param {Iterable<number>} numbers
   * @param {Step} step
   */
  async makeAll(numbers, step) {
    await Promise.all([...numbers].map((number) => this.make(number, step)));
  }

  /** Make the ticks of all contacts when they are due, until the runner is closed. */
  async tick() {
    const { roster, system } = this._host;
    while (!this._host.stopped) {
      await this.makeAll(roster.dueAt(system.now().monotonicS), tick);
      if (this._host.stopped) return;
      const leftS = roster.nextTickS() - system.now().monotonicS;
      await system.sleep(Math.max(TICK_S, leftS), this.changed);
    }
  }

  /**
   * @param {number} number
   * @param {Entry} entry
   * @param {Step} step
   */
  async _runNow(number, entry, step) {
    const { roster, system } = this._host;
    try {
      if (!roster.entries.has(number)) return;
      const effects = await step(entry.contact, system.now());
      for (const effect of effects) await this._do(number, entry, effect);
      const isNews = entry.refusals.note(entry.contact, system.now().monotonicS);
      // The name of a tombstone may be that of another contact by now.
      if (isNews && entry.contact.record.state !== "unshared") {
        this._carrier.carryOut(number, entry, { do: "tell", event: "refused" });
      }
      if (entry.refusals.isToWrite(system.now().monotonicS)) {
        await this.writeRefusals(number, entry);
      }
    } catch (error) {
      // What is saved counts, whatever else the machine believes. Messages are read once more.
      if (!(error instanceof UsageError)) roster.restore(entry);
      throw error;
    } finally {
      entry.waiting -= 1;
    }
    this._lines.draw();
    this.noteChange();
  }

  /**
   * Write down what was refused of a contact. Nothing depends on it: a failure is told.
   * @param {number} number
   * @param {Entry} entry
   */
  async writeRefusals(number, entry) {
    const { roster, complaints } = this._host;
    await roster.saveRefusals(number, entry).catch((error) => complaints.make(error, number));
  }

  /**
   * Do what a machine asks for. What cannot be saved fails the step.
   * @param {number} number
   * @param {Entry} entry
   * @param {Effect} effect
   */
  async _do(number, entry, effect) {
    if (effect.do === "save") {
      await this._host.roster.save(number, entry, effect.record);
      this._host.complaints.clear(number);
    } else if (effect.do === "forget") {
      await this._host.roster.delete(number);
    } else {
      this._carrier.carryOut(number, entry, effect);
    }
  }
}

/** Let time go by for a contact. @type {Step} */
export function tick(contact, now) {
  return contact.tick(now);
}
