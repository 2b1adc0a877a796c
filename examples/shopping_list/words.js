// @ts-check
/**
 * The state of a contact, in words for people.
 *
 * Each state is a tone, for the colour, and a sentence. Pure.
 * @module
 */

/** @import { Finding } from "../../js/connectoid.js" */
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
 * @property {number | null} [againAt] when the next attempt to connect begins, in milliseconds
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
  if (lastEvent === "unreachable") return standingOfUnreachable(moment);
  if (lastEvent === "unsent") return UNSENT;
  if (state === "opened") {
    return ["wait", `Waiting for ${nickname}'s app to answer. It has to be open too.`];
  }
  if (lastEvent === "wants_to_connect") return ["wait", `${nickname} would like to connect.`];
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
const UNSENT = ["bad", "No relay takes what you send. It is tried again."];

/**
 * @param {Moment} moment
 * @returns {Standing}
 */
function standingOfUnreachable({ attempt, againAt }) {
  let next = "Try again in another network.";
  if (attempt !== "apart") next = "Trying again now.";
  if (againAt) next = `Trying again at ${clockTime(againAt)}, and at once in another network.`;
  return ["bad", `Your two networks do not let you connect directly. ${next}`];
}

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
 * Return what is said while a contact does not know the new key of this side yet, or "".
 * @param {{nickname: string, renewal: string}} person
 */
export function renewalOf({ nickname, renewal }) {
  if (renewal !== "waiting") return "";
  return `${nickname}'s app does not know your new key yet. Until then copies of this device still `
    + `count. If that lasts while ${nickname}'s app is open, unshare, and share again.`;
}

/**
 * Return what is said once a contact knows the new key of this side.
 * @param {string} nickname
 */
export function renewedOf(nickname) {
  return `${nickname}'s app knows your new key, and takes nothing any more from copies of this `
    + "device.";
}

// Of the lists that a contact had deleted, how many are named.
export const MAX_NAMED = 3;

/**
 * Return what is said once a contact's app had lists deleted here.
 * @param {string} nickname
 * @param {string[]} names of the first of them
 * @param {number} count of all
 */
export function deletionOf(nickname, names, count) {
  const more = count > names.length ? ` and ${counted(count - names.length, "more list")}` : "";
  return `${nickname}'s app has asked to delete what ${nickname} had shared with you. `
    + `Deleted here: ${names.join(", ")}${more}.`;
}

/**
 * Return what is said of messages that were refused.
 * @param {number} count
 */
export function refusalsIn(count) {
  return `${counted(count, "message")} ${count === 1 ? "was" : "were"} refused, `
    + "and changed nothing.";
}

// -- The connection check ----------------------------------------------------------------

/** @type {Readonly<Record<string, (finding: Finding) => string>>} */
const FINDING_WORDS = {
  offline: () => "This device is offline.",
  clock_not_set: () => "The clock of this device is not set.",
  clock_differs: ({ about, s = 0 }) =>
    `This clock and that of ${about} are ${span(Math.abs(s))} apart. From a day on, the apps of `
      + "others take nothing from this one.",
  webrtc_missing: () =>
    "This browser cannot connect to others: its WebRTC is off. "
      + "Turn it on, or use another browser.",
  asks_relays: () => "Asking the relay …",
  relay_answers: ({ about, ms }) => `The relay ${about} answers (${ms} ms).`,
  relay_refused: ({ why = "" }) => why,
  relay_wrong: ({ why = "" }) => why,
  relay_hidden: ({ about }) =>
    `Something answers at ${about}, and lets no page read it: it is no relay, or a proxy before `
      + "it takes away the headers that allow it (CORS).",
  relay_unreachable: ({ about }) =>
    `${about} cannot be reached. The address may be wrong, the relay down, its certificate not `
      + "valid, or something on the way blocks it: a browser does not say which.",
  relay_insecure: ({ about }) =>
    `${about} is not asked: a page that came over https may ask relays over https only.`,
  relay_takes_no_check: ({ about, why }) => `The relay ${about} does not serve you. ${why}`,
  relay_lends_turn: ({ about }) => `The relay ${about} lends a TURN server.`,
  relay_lends_no_turn: ({ about, why }) =>
    `The relay ${about} says that it lends a TURN server, and does not. ${why}`,
  asks_stun: () => "Asking how this device looks from outside …",
  stun_answers: ({ about, seen = [] }) =>
    seen.length ? `${about} sees this device as ${seen.join(" and ")}.` : `${about} answers.`,
  stun_near: ({ about }) =>
    `${about} is in your own network, and tells nothing of the way out.`,
  stun_silent: ({ about }) =>
    `${about} does not answer. It is down, or this network does not let UDP through.`,
  stun_refused: ({ about }) => `This browser refuses the address ${about}.`,
  way_open: ({ about }) =>
    `${about}: servers see this device under an address of its own. It connects directly with `
      + "everybody whose network lets UDP out.",
  way_one_port: ({ about }) =>
    `${about}: this network keeps one port for all. This device connects directly with other `
      + "homes; where the other network takes another port for each, as some mobile networks and "
      + "companies do, TURN is needed.",
  way_some_nat: ({ about }) =>
    `${about}: this device is seen from outside. Whether that is enough for every other home is `
      + "not known here: two STUN servers at different places would tell.",
  way_symmetric: ({ about }) =>
    `${about}: this network takes another port for each server. This device connects directly `
      + "within its own network and with servers; with other homes it takes TURN.",
  way_silent: () =>
    "No STUN server has answered. Unless all of them are down, this network lets no UDP out: this "
      + "device connects directly within its own network only. All else takes another network, "
      + "or TURN over TCP or TLS.",
  asks_turn: () => "Asking for a TURN server …",
  turn_relays: ({ about }) => `${about} carries connections.`,
  turn_login: ({ about }) => `${about} refuses the user name or the password.`,
  turn_error: ({ about, code }) => `${about} refuses to carry connections (error ${code}).`,
  turn_silent: ({ about }) =>
    `${about} does not carry connections. It is down, refuses, or is not reached from here.`,
  turn_refused: ({ about }) => `This browser refuses ${about}.`,
  all_without_relay: () => "In all: no relay works, so devices do not find each other now.",
  all_with_turn: () => "In all: where two devices find no direct way, TURN carries them.",
  all_without_turn: () =>
    "In all: you connect through TURN alone, and no TURN server works: nothing connects.",
  all_without_stun: () =>
    "In all: nothing is known of the way out, as no STUN server elsewhere could be asked.",
  all_without_way: () =>
    "In all: no way out of this network was found. Use another network, or TURN.",
};

/**
 * Return the sentence for something that the connection check has found.
 * @param {Finding} finding
 */
export function wordsOfFinding(finding) {
  return FINDING_WORDS[finding.found](finding);
}

/** @param {number} seconds */
function span(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes < HOUR_MINUTES) return counted(minutes, "minute");
  if (minutes < DAY_MINUTES) return counted(Math.round(minutes / HOUR_MINUTES), "hour");
  return counted(Math.round(minutes / DAY_MINUTES), "day");
}

const HOUR_MINUTES = 60;
const DAY_MINUTES = 1_440;

/** @param {number} at in milliseconds */
function clockTime(at) {
  return new Date(at).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
}

/** @param {number} at in milliseconds */
function ago(at) {
  const seconds = (Date.now() - at) / 1_000;
  return Math.round(seconds / 60) < 1 ? "just now" : `${span(seconds)} ago`;
}

/**
 * @param {number} count
 * @param {string} unit
 */
function counted(count, unit) {
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}
