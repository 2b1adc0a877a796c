// @ts-check
/**
 * The doctor: what this network lets through, and what connects to what. For a page of settings.
 *
 * It asks the relays and servers that it is given as a runner would, opens no store, and tells
 * finding after finding, the nearest first. It says what is known and no more: where a browser
 * hides something, a finding is left out. The words are the app's, in its languages.
 * @module
 */

import { isSet } from "./contact/effects.js";
import { hasStun, stunUrl } from "./ice.js";
import {
  FAMILIES, KINDS, isNear, oneByOne, probeRelay, probeStun, probeTurn, probeWays, stunOf,
} from "./probes.js";
import { SystemSuite } from "./suite.js";
import { browserSystem } from "./system.js";
import { originOf } from "./urls.js";

/** @import { OwnRelay } from "./links.js" */
/** @import { Bench, Kind, RelayAnswer, StunAnswer, TurnAnswer, Ways } from "./probes.js" */
/** @import { Suite } from "./suite.js" */
/** @import { System } from "./system.js" */

// Between the clocks of a device and of a server. A day is too much for contacts.
const CLOCK_ODD_S = 300;
const LOOPBACK = /^(?:localhost|127\.|\[::1\])/;

/**
 * What findings mean. `ask` begins a part that takes a while, and is replaced by what it finds.
 * @type {Readonly<Record<string, "ask" | "ok" | "warn" | "bad">>}
 */
export const FINDINGS = {
  // This device. `s` is by how much its clock is behind that of the server `about`.
  offline: "bad",
  clock_not_set: "bad",
  clock_differs: "warn",
  webrtc_missing: "bad",
  // A relay, which is `about`. `why` is what it says, or what went wrong; `ms` is what it took.
  asks_relays: "ask",
  relay_answers: "ok",
  relay_refused: "bad",
  relay_wrong: "bad",
  relay_hidden: "bad",
  relay_unreachable: "bad",
  relay_insecure: "bad",
  relay_takes_no_check: "bad",
  relay_lends_turn: "ok",
  relay_lends_no_turn: "warn",
  // A STUN server. `seen` are the addresses that it sees. One in the network of this device is not
  // asked: to it no NAT is visible.
  asks_stun: "ask",
  stun_answers: "ok",
  stun_near: "warn",
  stun_silent: "warn",
  stun_refused: "warn",
  // What stands between this device and the Internet: `about` is "IPv4", "IPv6", or "".
  way_open: "ok",
  way_one_port: "ok",
  way_some_nat: "ok",
  way_symmetric: "warn",
  way_silent: "warn",
  // A TURN server. `code` is that of its error.
  asks_turn: "ask",
  turn_relays: "ok",
  turn_login: "bad",
  turn_error: "bad",
  turn_silent: "bad",
  turn_refused: "bad",
  // In all.
  all_without_relay: "bad",
  all_with_turn: "ok",
  all_without_turn: "bad",
  all_without_stun: "warn",
  all_without_way: "bad",
};

/**
 * One finding: a key of FINDINGS, its meaning there, and what it is about: a URL, "IPv4", "IPv6".
 * @typedef {object} Finding
 * @property {string} found
 * @property {"ask" | "ok" | "warn" | "bad"} state
 * @property {string} about
 * @property {string} [why]
 * @property {number} [ms]
 * @property {number} [s]
 * @property {number} [code]
 * @property {string[]} [seen]
 *
 * What is looked at. With `relayOnly` no STUN server is asked, as for connections.
 * @typedef {object} Patient
 * @property {(string | OwnRelay)[]} relays
 * @property {RTCIceServer[]} [iceServers]
 * @property {boolean} [relayOnly]
 *
 * @typedef {Partial<System> & Partial<Bench>} Instruments
 */

/**
 * Look at relays, servers and this network: `for await (const finding of examine(...))`. It takes a
 * minute at most, and ends early by its signal.
 * @param {Patient} patient
 * @param {Instruments} [instruments]
 * @returns {AsyncGenerator<Finding, void, void>}
 */
export async function* examine(patient, instruments = {}) {
  for await (const finding of look(patient, benchOf(instruments))) {
    if (instruments.signal?.aborted) return;
    yield finding;
  }
}

/**
 * @param {Patient} patient
 * @param {Bench} bench
 */
async function* look({ relays, iceServers = [], relayOnly = false }, bench) {
  yield* lookAtDevice(bench);
  yield finding("asks_relays");
  const answers = await Promise.all(relays.map((relay) => lookAtRelay(bench, relay)));
  for (const { findings } of answers) yield* findings;
  const servers = oneByOne([...answers.flatMap((answer) => answer.servers), ...iceServers]);
  const turn = servers.filter(({ urls }) => /^turns?:/.test(urls));
  /** @type {Ways} */
  let ways = { IPv4: "unasked", IPv6: "unasked" };
  let hasTurn = false;
  if (!bench.PeerConnection) yield finding("webrtc_missing");
  if (bench.PeerConnection && !relayOnly) ways = yield* lookAtWays(bench, servers);
  if (bench.PeerConnection && turn.length) hasTurn = yield* lookAtTurn(bench, turn);
  yield* conclude(ways, { hasRelay: answers.some(({ works }) => works), hasTurn, relayOnly });
}

/**
 * @param {Instruments} instruments
 * @returns {Bench}
 */
function benchOf({ PeerConnection = globalThis.RTCPeerConnection, suite, signal, ...system }) {
  return {
    PeerConnection,
    suite: suite ?? new SystemSuite(),
    signal: signal ?? new AbortController().signal,
    system: { ...browserSystem(), ...system },
  };
}

/**
 * @param {keyof typeof FINDINGS & string} found
 * @param {string} [about]
 * @param {Partial<Finding>} [more]
 * @returns {Finding}
 */
function finding(found, about = "", more = {}) {
  return { found, state: FINDINGS[found], about, ...more };
}

// -- This device, and relays -------------------------------------------------------------

/** @param {Bench} bench */
function* lookAtDevice({ system }) {
  if (system.page.navigator?.onLine === false) yield finding("offline");
  if (!isSet(system.now())) yield finding("clock_not_set");
}

/**
 * Return what is found of a relay, whether it carries messages, and the servers that it has.
 * @param {Bench} bench
 * @param {string | OwnRelay} relay
 */
async function lookAtRelay(bench, relay) {
  const [url, ext = null] = typeof relay === "string" ? [relay] : relay;
  if (isInsecure(bench, url)) {
    return { findings: [finding("relay_insecure", url)], works: false, servers: [] };
  }
  const answer = await probeRelay(bench, url, ext);
  const works = !answer.failure && !answer.checkProblem;
  /** @type {RTCIceServer[]} */
  const servers = [];
  if (hasStun(answer.document)) servers.push({ urls: stunUrl(url) });
  if (answer.lent) servers.push(answer.lent);
  return { findings: [...judgeRelay(url, answer)], works, servers };
}

/**
 * Return whether a browser lets no page over https ask it.
 * @param {Bench} bench
 * @param {string} url
 */
function isInsecure({ system }, url) {
  const { scheme, host } = originOf(url);
  return system.page.location?.protocol === "https:" && scheme === "http" && !LOOPBACK.test(host);
}

/**
 * @param {string} url
 * @param {RelayAnswer} answer
 */
function* judgeRelay(url, { failure, words, ms, aheadS, checkProblem, lent, loanProblem }) {
  if (failure) {
    yield finding(`relay_${failure}`, url, { why: words });
    return;
  }
  yield finding("relay_answers", url, { ms });
  if (aheadS !== null && Math.abs(aheadS) > CLOCK_ODD_S) {
    yield finding("clock_differs", url, { s: Math.round(aheadS) });
  }
  if (checkProblem) yield finding("relay_takes_no_check", url, { why: checkProblem });
  if (lent) yield finding("relay_lends_turn", url);
  if (loanProblem) yield finding("relay_lends_no_turn", url, { why: loanProblem });
}

// -- Ways to the Internet, and TURN ------------------------------------------------------

/**
 * @param {Bench} bench
 * @param {(RTCIceServer & {urls: string})[]} servers
 * @returns {AsyncGenerator<Finding, Ways, void>}
 */
async function* lookAtWays(bench, servers) {
  const all = [...new Set(servers.map((server) => stunOf(server.urls)).filter(Boolean))];
  // Those that answer TURN alone are told as what they are.
  const named = new Set(servers.map((server) => server.urls));
  for (const url of all) if (isNear(url) && named.has(url)) yield finding("stun_near", url);
  const urls = all.filter((url) => !isNear(url));
  if (urls.length) yield finding("asks_stun");
  const asked = urls.map(async (url) => [url, await probeStun(bench, url)]);
  const answers = /** @type {[string, StunAnswer][]} */ (await Promise.all(asked));
  for (const [url, { state, seen }] of answers) {
    if (named.has(url)) yield finding(`stun_${state}`, url, { seen });
  }
  const ways = await probeWays(bench, new Map(answers));
  for (const family of FAMILIES) {
    const kind = ways[family];
    // Of which kind the addresses are that nobody has seen is not known.
    if (kind !== "unasked") yield finding(`way_${kind}`, kind === "silent" ? "" : family);
  }
  return ways;
}

/**
 * Return whether a TURN server gives a relayed address.
 * @param {Bench} bench
 * @param {(RTCIceServer & {urls: string})[]} servers
 * @returns {AsyncGenerator<Finding, boolean, void>}
 */
async function* lookAtTurn(bench, servers) {
  yield finding("asks_turn");
  const asked = servers.map(async (server) => ({ server, answer: await probeTurn(bench, server) }));
  let hasTurn = false;
  for (const { server, answer } of await Promise.all(asked)) {
    hasTurn ||= answer.state === "relays";
    yield judgeTurn(server.urls, answer);
  }
  return hasTurn;
}

/**
 * @param {string} url
 * @param {TurnAnswer} answer
 */
function judgeTurn(url, { state, code }) {
  return finding(`turn_${state}`, url, state === "error" ? { code } : {});
}

// -- What connects to what ---------------------------------------------------------------

/**
 * Return what follows for all connections.
 * @param {Ways} ways
 * @param {{hasRelay: boolean, hasTurn: boolean, relayOnly: boolean}} known
 */
export function* conclude(ways, { hasRelay, hasTurn, relayOnly }) {
  if (!hasRelay) yield finding("all_without_relay");
  const known = /** @type {Kind[]} */ (Object.values(ways)).filter((kind) => kind !== "unasked");
  const best = KINDS.find((kind) => known.some((one) => one === kind));
  if (hasTurn) yield finding("all_with_turn");
  else if (relayOnly) yield finding("all_without_turn");
  else if (!best) yield finding("all_without_stun");
  else if (best === "silent") yield finding("all_without_way");
}
