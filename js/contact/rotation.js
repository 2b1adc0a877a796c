// @ts-check
/**
 * The addresses of one's own: making them, announcing new ones, leaving old ones.
 *
 * PROTOCOL.md, "Rotation".
 * @module
 */

import { checkText } from "../encoding.js";
import { UsageError } from "../errors.js";
import { DAY_US, MAX_FORMER, MAX_REPLACED, NEVER_US, ROTATION_US } from "../limits.js";
import { formatAddress } from "../links.js";
import { checkAddress } from "../suite.js";
import { NO_LINK_KEY, addressesOf, mailboxesOf, urlsOf } from "./record.js";

/** @import { Allowed, Relay } from "../links.js" */
/** @import { Suite } from "../suite.js" */
/** @import { Now } from "./effects.js" */
/** @import { Machine } from "./machine.js" */
/** @import { OwnAddress } from "./record.js" */

/**
 * Return a new address with a key for each relay; throw UsageError for bad relays.
 * @param {Suite} suite
 * @param {Relay[]} relays
 * @param {Allowed} allowed
 * @returns {Promise<OwnAddress>}
 */
export async function makeAddress(suite, relays, allowed) {
  if (!relays.length) throw new UsageError("No relay is given.");
  const made = await Promise.all(relays.map(() => suite.makeKey("ECDH")));
  try {
    relays.flat().forEach(checkText);
    const mailboxes = relays.map(([url, ext], place) => ({ pub: made[place][1], url, ext }));
    const address = formatAddress(mailboxes);
    await checkAddress(suite, address, allowed);
    return { address, keys: made.map(([key]) => key) };
  } catch (error) {
    const { message } = /** @type {Error} */ (error);
    throw new UsageError(`The address of these relays cannot be used: ${message}.`);
  }
}

/**
 * Return the characters of the longest address that a message of now may announce.
 * @param {Machine} machine
 */
export function longestAddress({ record, asShown }) {
  // A new one is as long as one with another key.
  const again = asShown(record.relays).map(([url, ext]) => ({ pub: record.signer, url, ext }));
  const addresses = addressesOf(record).map(({ address }) => address);
  return Math.max(...[formatAddress(again), ...addresses].map(({ length }) => length));
}

/**
 * Make a pending address, at other relays if they are given.
 *
 * One that was pending before stays polled, as the contact may know no newer one. Throw UsageError
 * for bad relays, or if MAX_REPLACED addresses wait for the contact already, or more than
 * MAX_FORMER were left too lately to go.
 * @param {Machine} machine
 * @param {Relay[]} [relays]
 */
export async function rotate(machine, relays = machine.asShown(machine.record.relays)) {
  const before = machine.record.pending;
  let { replaced } = machine.record;
  if (before) replaced = [...replaced, before];
  if (replaced.length > MAX_REPLACED) {
    throw new UsageError(
      "This contact has not answered your last changes. "
      + "Wait until you have been connected, or share again.",
    );
  }
  if (leftLately(machine).length > MAX_FORMER) {
    throw new UsageError(
      "The addresses of this contact have changed too often lately. "
      + "Wait for a month, or share again.",
    );
  }
  const pending = await makeAddress(machine.suite, relays, machine.allowed);
  machine.keep({ pending, replaced, relays, rotatedUs: machine.now.wallUs });
  noteNew(machine, pending, machine.now);
}

/**
 * Note that the user has named the relays, and forget those where no address is any more.
 * @param {Machine} machine
 */
export function noteNamed(machine) {
  const { namedRelays, relays } = machine.record;
  const used = addressesOf(machine.record).flatMap(mailboxesOf).map(({ url }) => url);
  const named = [...new Set([...namedRelays, ...urlsOf(relays)])];
  machine.keep({ namedRelays: named.filter((url) => used.includes(url)) });
}

/**
 * Make a pending address if there is none and the current one is old.
 *
 * What comes to a mailbox has no say in this: a copy of the contact's device could fill it, hear of
 * each new address, and so make this side leave the one that the contact's owner knows.
 * @param {Machine} machine
 */
export async function rotateIfDue(machine) {
  const { pending, relays } = machine.record;
  if (!pending && relays.length && isOld(machine)) await rotate(machine);
}

/**
 * Say whether it is time to announce a new address, or the pending one again.
 * @param {Machine} machine
 */
export function isDue(machine) {
  const { pending, relays, rotatedUs } = machine.record;
  if (!pending) return relays.length > 0 && isOld(machine);
  const ageUs = machine.now.wallUs - rotatedUs;
  return ageUs < 0 || ageUs >= DAY_US;
}

/**
 * Say whether the address was made long ago, or by a clock that was ahead, or by none.
 * @param {Machine} machine
 */
function isOld(machine) {
  const ageUs = machine.now.wallUs - machine.record.rotatedUs;
  return ageUs < 0 || ageUs >= ROTATION_US;
}

/**
 * Make an address current if it is newer than that one: the contact has written to it.
 *
 * Those that are older become former ones. A copy of the contact's device may have written here,
 * and its owner may know any of those. So each stays until the next address comes into use, and for
 * 30 days at least.
 * @param {Machine} machine
 * @param {OwnAddress} own
 */
export function takeIntoUse(machine, own) {
  const { pending, replaced, current } = machine.record;
  const waiting = [...replaced, pending].filter((one) => one !== null);
  const place = waiting.findIndex(({ address }) => address === own.address);
  if (place < 0) return;
  const newer = waiting.slice(place + 1);
  const left = [current, ...waiting.slice(0, place)].filter((one) => one !== null);
  const { wallUs } = machine.now;
  machine.keep({
    current: own,
    pending: newer.length ? pending : null,
    replaced: newer.slice(0, -1),
    former: [...leftLately(machine), ...left.map((older) => ({ ...older, leftUs: wallUs }))],
    rotatedUs: wallUs,
  });
}

/**
 * Return the former addresses that have to stay: those that were left lately.
 * @param {Machine} machine
 */
function leftLately({ now, record }) {
  return record.former.filter(({ leftUs = 0 }) => {
    const ageUs = now.wallUs - leftUs;
    return ageUs >= 0 && ageUs < ROTATION_US;
  });
}

/**
 * Keep nothing of the invitation: nobody can open the link any more, and the contact stays.
 * @param {Machine} machine
 */
export function leaveInvitation(machine) {
  machine.keep({
    invitation: "", r: "", welcome: "", invited: null, ...NO_LINK_KEY, expiresUs: NEVER_US,
  });
}

/**
 * Note that mailboxes that did not exist before now hold nothing older.
 * @param {Machine} machine
 * @param {OwnAddress} own
 * @param {Now} now
 */
export function noteNew(machine, own, now) {
  for (const { pub } of mailboxesOf(own)) machine.box(pub).readS = now.monotonicS;
}
