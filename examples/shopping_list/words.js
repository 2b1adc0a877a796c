// @ts-check
/**
 * The state of a contact, in words for people.
 *
 * Each state is a tone, for the colour, and a sentence. Pure.
 * @module
 */

/** @import { Person } from "./sync.js" */

/** @typedef {[tone: string, words: string]} Standing */

/**
 * What Connectoid and the page know of a contact at this moment.
 * @typedef {object} Moment
 * @property {string} state of the pairing; "" if the contacts are not loaded
 * @property {string} why the contact ended
 * @property {string} attempt what goes on to connect
 * @property {boolean} isConnected
 * @property {string} lastEvent of connecting
 * @property {Set<string>} warnings `flooded`, `needs_newer_app`
 * @property {boolean} differs whether the emoji of the two were not the same
 * @property {boolean} isRelayDown whether no relay of this side answers
 * @property {boolean} isPaused whether it is not reached, since it did not confirm changes
 */

/**
 * @param {Person} person
 * @param {Moment} moment
 * @returns {Standing}
 */
export function standingOf(person, moment) {
  const { nickname, pending, lacking } = person;
  const { state, isConnected, lastEvent, warnings } = moment;
  if (state === "ended") return ["bad", endOf(person, moment.why)];
  if (!state) return ["off", "Not available now."];
  if (moment.differs) return DIFFERS;
  if (state === "invited") return standingOfInvited(nickname, warnings);
  if (state === "opened" && warnings.has("needs_newer_app")) {
    return ["bad", `${nickname} has a newer app. Reload this page, to have it too.`];
  }
  if (isConnected && !pending && lacking) return standingOfLacking(nickname, lacking);
  if (isConnected) return pending ? SENDING : UP_TO_DATE;
  if (!navigator.onLine) return pending ? WAITING_OFFLINE : OFFLINE;
  if (lastEvent === "unreachable") return UNREACHABLE;
  if (state === "opened") {
    return ["wait", `Waiting for ${nickname}'s app to answer. It has to be open too.`];
  }
  if (state !== "paired") return ["busy", "Getting connected ..."];
  return standingOfPaired(person, moment);
}

/**
 * Whoever has read a link can fill its mailbox, and say that their app is newer: neither warning
 * hides the other. The maker of a link is known by it.
 * @param {string} nickname
 * @param {Set<string>} warnings
 * @returns {Standing}
 */
function standingOfInvited(nickname, warnings) {
  const sentences = [];
  if (warnings.has("flooded")) {
    sentences.push(
      `Somebody fills the mailbox of this link. If ${nickname} does not open it soon, unshare, `
        + "and share again.");
  }
  if (warnings.has("needs_newer_app")) {
    sentences.push(
      "Somebody with the link has a newer app. "
        + `If that is ${nickname}, reload this page, to have it too.`);
  }
  if (!sentences.length) return ["wait", `${nickname} has not opened the link yet.`];
  return [warnings.has("flooded") ? "bad" : "wait", sentences.join(" ")];
}

/**
 * @param {string} nickname
 * @param {number} lacking
 * @returns {Standing}
 */
function standingOfLacking(nickname, lacking) {
  return ["bad", `${nickname}'s app has not taken ${counted(lacking, "thing")} of yours.`];
}

/** @type {Standing} */
const DIFFERS = ["bad", "The emoji differed. Somebody may read along. Unshare."];
/** @type {Standing} */
const SENDING = ["busy", "Connected, sending changes ..."];
/** @type {Standing} */
const UP_TO_DATE = ["good", "Connected. Everything is up to date."];
/** @type {Standing} */
const WAITING_OFFLINE = ["wait", "Changes wait until you are online."];
/** @type {Standing} */
const OFFLINE = ["wait", "You are offline."];
/** @type {Standing} */
const UNREACHABLE = [
  "bad", "Your two networks do not let you connect directly. Try again in another network.",
];

/**
 * @param {Person} person who is paired, and not connected
 * @param {Moment} moment
 * @returns {Standing}
 */
function standingOfPaired({ nickname, pending, syncedAt, lacking }, moment) {
  const { attempt, lastEvent, isRelayDown, isPaused } = moment;
  const isTrying = attempt !== "apart" && !(pending && lastEvent === "unanswered");
  if (isTrying && pending) return ["busy", `Looking for ${nickname} ... changes wait.`];
  if (isTrying) return ["busy", `Looking for ${nickname} ...`];
  if (pending && isPaused) {
    return ["wait", `${nickname}'s app does not confirm changes. They are sent again later.`];
  }
  if (pending) return ["wait", `Changes wait until ${nickname}'s app is open.`];
  if (lacking) return standingOfLacking(nickname, lacking);
  const tone = isRelayDown ? "wait" : "good";
  if (!syncedAt) return [tone, "Nothing to send yet."];
  // What the other side has changed since is not known here.
  return [tone, `Last synced ${ago(syncedAt)}.`];
}

/**
 * @param {Person} person
 * @param {string} why
 */
function endOf({ nickname, deleted }, why) {
  if (why === "used") {
    return "Somebody else has opened this link before you, or it was withdrawn. "
      + "Ask for a new one.";
  }
  if (why === "expired") return "Nobody answered while the link was good. Share again.";
  if (deleted) return `${nickname} has ended the sharing, and the lists were deleted here.`;
  return `${nickname} has ended the sharing.`;
}

/**
 * Return what the user should look into before they trust a contact, or "".
 * @param {Person & {keyNews: string, warned: boolean, verified: boolean, ended: boolean}} person
 */
export function warningOf({ nickname, keyNews, warned, verified, ended }) {
  if (ended) return "";
  if (keyNews === "copied") {
    return `Two devices say that they are ${nickname}: somebody has a copy of that device. `
      + "Unshare, and share again.";
  }
  if (keyNews) {
    return `${nickname}'s app has a new key. Ask ${nickname} whether that was wanted, and compare `
      + "again. If not, somebody has a copy of that device: unshare, and share again.";
  }
  if (!warned || verified) return "";
  return "Somebody else opened your link too. Compare by voice before you trust this contact.";
}

/**
 * Return what is said of messages that were refused.
 * @param {number} count
 */
export function refusalsIn(count) {
  return `${counted(count, "message")} ${count === 1 ? "was" : "were"} refused, `
    + "and changed nothing.";
}

const HOUR_MINUTES = 60;
const DAY_MINUTES = 1_440;

/** @param {number} at in milliseconds */
function ago(at) {
  const minutes = Math.round((Date.now() - at) / 60_000);
  if (minutes < 1) return "just now";
  if (minutes < HOUR_MINUTES) return `${counted(minutes, "minute")} ago`;
  if (minutes < DAY_MINUTES) return `${counted(Math.round(minutes / HOUR_MINUTES), "hour")} ago`;
  return `${counted(Math.round(minutes / DAY_MINUTES), "day")} ago`;
}

/**
 * @param {number} count
 * @param {string} unit
 */
function counted(count, unit) {
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}
