// @ts-check
/**
 * Probes: what a network lets through, as far as a page can see. For `examine` of doctor.js, not
 * for connecting.
 *
 * A page sends no datagram by itself and sees no certificate. It asks relays by `fetch`, and all
 * else by RTCPeerConnection, which tells the addresses that servers have seen. What a server says
 * is believed as far as it goes: one that lies misleads the reader of a report, and nobody else.
 * @module
 */

import { RelayRefusalError } from "./errors.js";
import { NO_AT } from "./limits.js";
import { isPrivateHost } from "./networks.js";
import { RelayClient, askForTurn } from "./relay_client.js";
import { asIceServer, lendsTurn, readTurn } from "./turn.js";
import { IPV4 } from "./urls.js";
import { allGathered } from "./webrtc.js";

/** @import { Key, Suite } from "./suite.js" */
/** @import { System } from "./system.js" */

// For a server to answer whether pages may read it or not.
const HIDDEN_S = 5;
// For STUN servers to answer: a lookup, and three retransmissions.
const STUN_S = 5;
// For a TURN server to give a relayed address: a connection, two requests and the retransmissions.
const TURN_S = 10;
// As if its server had not answered: browsers say so of all that fails below STUN.
const NOT_REACHED = 701;

/**
 * What probes are made with.
 * @typedef {object} Bench
 * @property {System} system
 * @property {typeof RTCPeerConnection} PeerConnection
 * @property {Suite} suite
 * @property {AbortSignal} signal ends what goes on
 */

// -- Relays ------------------------------------------------------------------------------

/**
 * What came of asking a relay. `failure` is "" where it says what it is, `refused` where it refuses
 * to, `wrong` where something else answers, `hidden` where something answers that pages may not
 * read, and `unreachable` where nothing does. `words` are those of the error.
 * @typedef {object} RelayAnswer
 * @property {"" | "refused" | "wrong" | "hidden" | "unreachable"} failure
 * @property {string} words
 * @property {number} ms what it took
 * @property {number | null} aheadS by how much its clock is ahead of this one, where it can be seen
 * @property {Record<string, unknown>} document
 * @property {string} checkProblem why it takes no check, or ""
 * @property {RTCIceServer | null} lent the TURN servers that it lends
 * @property {string} loanProblem why it lends none, though it says that it does, or ""
 */

/**
 * Ask a relay what contacts ask it: what it is, a check, and TURN where it lends it.
 * @param {Bench} bench
 * @param {string} url
 * @param {string | null} ext
 * @returns {Promise<RelayAnswer>}
 */
export async function probeRelay(bench, url, ext) {
  const ear = new Ear(bench);
  const client = new RelayClient(url, { fetch: ear.fetch, sleep: bench.system.sleep });
  /** @type {RelayAnswer} */
  const answer = {
    failure: "", words: "", ms: 0, aheadS: null, document: {}, checkProblem: "", lent: null,
    loanProblem: "",
  };
  const beganS = bench.system.now().monotonicS;
  try {
    answer.document = await client.document();
    answer.ms = Math.round(1_000 * (bench.system.now().monotonicS - beganS));
    answer.aheadS = ear.aheadS;
  } catch (/** @type {any} */ error) {
    const failure = await whyFailed(bench, ear, url, error);
    return { ...answer, failure, words: error.message };
  }
  return { ...answer, ...await probeMailbox(bench, client, ext, answer.document) };
}

/**
 * Check a mailbox that nobody has, as a contact would, and ask for TURN with its key.
 * @param {Bench} bench
 * @param {RelayClient} client
 * @param {string | null} ext
 * @param {Record<string, unknown>} document
 */
async function probeMailbox({ suite }, client, ext, document) {
  const [key, pub] = await suite.makeKey("ECDH");
  const mailbox = { pub, url: client.url, ext };
  try {
    await client.ask({ action: "check", pub, ext, at: 0 });
  } catch (/** @type {any} */ error) {
    return { checkProblem: error.message };
  }
  if (!lendsTurn(document)) return {};
  try {
    const lent = await askForTurn(suite, client, { mailbox, key, at: NO_AT });
    return { lent: lent === undefined ? null : asIceServer(readTurn(lent, client.url)) };
  } catch (/** @type {any} */ error) {
    return { loanProblem: error.message };
  }
}

/**
 * Return why a relay did not say what it is.
 * @param {Bench} bench
 * @param {Ear} ear
 * @param {string} url
 * @param {unknown} error
 * @returns {Promise<RelayAnswer["failure"]>}
 */
async function whyFailed(bench, ear, url, error) {
  if (error instanceof RelayRefusalError) return "refused";
  if (ear.hasHeard) return "wrong";
  return await answersHidden(bench, url) ? "hidden" : "unreachable";
}

/**
 * Return whether something answers there. The page sees nothing of what it says.
 * @param {Bench} bench
 * @param {string} url
 */
async function answersHidden({ system, signal }, url) {
  const over = new AbortController();
  system.sleep(HIDDEN_S, signal).then(() => over.abort());
  try {
    // Without CORS a browser follows redirects, or asks nothing at all.
    await system.fetch(url, {
      mode: "no-cors", credentials: "omit", cache: "no-store", referrerPolicy: "no-referrer",
      signal: over.signal,
    });
    return true;
  } catch {
    return false;
  }
}

/** Hear whether a server answers at all, and what its clock shows. */
class Ear {
  /** @param {Bench} bench */
  constructor({ system, signal }) {
    this.hasHeard = false;
    /** @type {number | null} */
    this.aheadS = null;
    this._system = system;
    this._signal = signal;
  }

  /** @type {System["fetch"]} */
  fetch = async (url, init) => {
    const signals = [this._signal, init?.signal].filter((one) => one instanceof AbortSignal);
    const response = await this._system.fetch(url, { ...init, signal: AbortSignal.any(signals) });
    this.hasHeard = true;
    // Relays have none. A proxy before one does, and the page may read it of its own server.
    const atMs = Date.parse(response.headers.get("Date") ?? "");
    if (!Number.isNaN(atMs)) this.aheadS = atMs / 1e3 - this._system.now().wallUs / 1e6;
    return response;
  };
}

// -- What WebRTC gathers -----------------------------------------------------------------

const CANDIDATE = new RegExp(
  "^candidate:(?<foundation>\\S+) 1 (?<protocol>\\w+) \\d+ (?<address>\\S+) (?<port>\\d+)"
  + " typ (?<type>\\w+)(?: raddr (?<base>\\S+) rport (?<basePort>\\d+))?", "i");

/**
 * A candidate: an address of this device, or as which a server sees one, or one that a server has
 * lent. `socket` is that of this device, or "" where the browser hides it. Of one socket may be
 * those with one `foundation`, and others.
 * @typedef {object} Candidate
 * @property {string} foundation
 * @property {string} type `host`, `srflx` or `relay`
 * @property {string} protocol
 * @property {string} address
 * @property {string} port
 * @property {string} socket
 *
 * What a server did not do, for an address of this device: `family` is "" where it is not told.
 * @typedef {{code: number, family: string}} ServerError
 *
 * What was gathered. `isRefused` says that the browser does not take the servers, and `isComplete`
 * that it waits for nothing more.
 * @typedef {object} Gathered
 * @property {Candidate[]} candidates
 * @property {ServerError[]} errors
 * @property {boolean} isRefused
 * @property {boolean} isComplete
 */

/**
 * Let WebRTC look for candidates with some servers, until it has found all or `isEnough`.
 * @param {Bench} bench
 * @param {RTCConfiguration} configuration
 * @param {number} limitS
 * @param {(gathered: Gathered) => boolean} [isEnough]
 * @returns {Promise<Gathered>}
 */
async function gather({ PeerConnection, system, signal }, configuration, limitS, isEnough) {
  /** @type {Gathered} */
  const gathered = { candidates: [], errors: [], isRefused: false, isComplete: false };
  /** @type {RTCPeerConnection} */
  let connection;
  try {
    connection = new PeerConnection(configuration);
  } catch {
    return { ...gathered, isRefused: true };
  }
  const over = new AbortController();
  const enough = new Promise((resolve) => {
    connection.onicecandidate = ({ candidate }) => {
      const read = readCandidate(candidate?.candidate ?? "");
      if (read) gathered.candidates.push(read);
      if (isEnough?.(gathered)) resolve(null);
    };
    connection.onicecandidateerror = ({ errorCode, address }) => {
      gathered.errors.push({ code: errorCode, family: familyIn(address ?? "") });
      if (isEnough?.(gathered)) resolve(null);
    };
  });
  const ends = AbortSignal.any([signal, over.signal]);
  try {
    connection.createDataChannel("");
    await connection.setLocalDescription();
    await Promise.race([allGathered(connection), enough, system.sleep(limitS, ends)]);
    gathered.isComplete = connection.iceGatheringState === "complete";
    return gathered;
  } finally {
    over.abort();
    connection.close();
  }
}

/**
 * Return a candidate of the first component, else undefined.
 * @param {string} text
 * @returns {Candidate | undefined}
 */
function readCandidate(text) {
  const { groups } = CANDIDATE.exec(text) ?? {};
  if (!groups) return undefined;
  const { foundation, type, protocol, address, port, base, basePort } = groups;
  // A browser that hides addresses says 0.0.0.0 and 0, or another port for nobody.
  const isHidden = !base || base === "0.0.0.0" || base === "::";
  const socket = isHidden ? "" : `${base} ${basePort}`;
  return { foundation, type, protocol: protocol.toLowerCase(), address, port, socket };
}

/**
 * Return the family of an address, of which a browser may hide the end.
 * @param {string} address
 */
function familyIn(address) {
  if (!address) return "";
  return address.includes(":") ? "IPv6" : "IPv4";
}

// -- STUN --------------------------------------------------------------------------------

/**
 * As what a server sees this device: addresses, with ports. `state` is `answers`, or `silent` where
 * none came, or `refused` by the browser.
 * @typedef {{state: "answers" | "silent" | "refused", seen: string[]}} StunAnswer
 */

/**
 * Ask one STUN server.
 * @param {Bench} bench
 * @param {string} url
 * @returns {Promise<StunAnswer>}
 */
export async function probeStun(bench, url) {
  const gathered = await gather(bench, { iceServers: [{ urls: url }] }, STUN_S);
  if (gathered.isRefused) return { state: "refused", seen: [] };
  const seen = reflexive(gathered).map(({ address }) => address);
  const isSeen = seen.length > 0 || isSeenAsItIs(gathered);
  return { state: isSeen ? "answers" : "silent", seen: [...new Set(seen)] };
}

/** @param {Gathered} gathered */
function reflexive({ candidates }) {
  return candidates.filter(({ type, protocol }) => type === "srflx" && protocol === "udp");
}

/**
 * Return whether servers see an address of this device, which browsers do not say twice. A server
 * that does not answer is an error, in the browsers that have gathered all.
 * @param {Gathered} gathered
 */
function isSeenAsItIs({ candidates, errors, isComplete }) {
  const hosts = candidates.filter(({ type, protocol }) => type === "host" && protocol === "udp");
  const families = new Set(hosts.map(({ address }) => familyOf(address)));
  const arePublic = hosts.some(({ address }) => isPublic(address));
  // With addresses of both families nobody knows which of them it was.
  return isComplete && !errors.length && families.size === 1 && arePublic;
}

// -- TURN --------------------------------------------------------------------------------

/**
 * What came of asking a TURN server: `relays`, `login` for one that refuses the user name or the
 * password, `error` with the code of another refusal, `silent`, or `refused` by the browser.
 * @typedef {object} TurnAnswer
 * @property {"relays" | "login" | "error" | "silent" | "refused"} state
 * @property {number} code
 */

const UNAUTHORIZED = 401;

/**
 * Ask a TURN server, at one of its URLs, for a relayed address; give it back.
 * @param {Bench} bench
 * @param {RTCIceServer} server
 * @returns {Promise<TurnAnswer>}
 */
export async function probeTurn(bench, server) {
  const hasRelay = (/** @type {Gathered} */ { candidates }) => (
    candidates.some(({ type }) => type === "relay"));
  const codeOf = (/** @type {Gathered} */ { errors }) => (
    errors.find(({ code }) => code !== NOT_REACHED)?.code ?? 0);
  const gathered = await gather(
    bench, { iceServers: [server], iceTransportPolicy: "relay" }, TURN_S,
    (so) => hasRelay(so) || codeOf(so) > 0);
  const code = codeOf(gathered);
  if (gathered.isRefused) return { state: "refused", code };
  if (hasRelay(gathered)) return { state: "relays", code };
  if (code === UNAUTHORIZED) return { state: "login", code };
  return { state: code ? "error" : "silent", code };
}

// -- Servers -----------------------------------------------------------------------------

/**
 * Return servers with one URL each.
 * @param {RTCIceServer[]} servers
 * @returns {(RTCIceServer & {urls: string})[]}
 */
export function oneByOne(servers) {
  const single = servers.flatMap((server) => (
    [server.urls].flat().map((urls) => ({ ...server, urls }))));
  return [...new Map(single.map((server) => [server.urls, server])).values()];
}

const PLACE = /^(?<scheme>stun|turn)s?:(?<place>[^?]+)(?<query>.*)$/;

/**
 * Return the URL for STUN of a server: one for TURN over UDP answers that too, at the same port.
 * Return "" for another one.
 * @param {string} url
 */
export function stunOf(url) {
  const { scheme, place, query } = PLACE.exec(url)?.groups ?? {};
  if (scheme === "stun") return url;
  return url.startsWith("turn:") && !query.endsWith("=tcp") ? `stun:${place}` : "";
}

/**
 * Return the host of a server.
 * @param {string} url
 */
export function hostOf(url) {
  try {
    return new URL(`https://${PLACE.exec(url)?.groups?.place}/`).hostname;
  } catch {
    return "";
  }
}

/**
 * Return whether a server is, by its URL, on this device or in its network.
 * @param {string} url
 */
export function isNear(url) {
  return isPrivateHost(hostOf(url));
}

// -- What it means. RFC 4787: a NAT maps a socket to one port for all (endpoint-independent), or
// to another port for each server (here "symmetric", as in RFC 3489 and everyday speech). --------

/**
 * @typedef {"open" | "one_port" | "some_nat" | "symmetric" | "silent" | "unasked"} Kind
 *
 * What stands between this device and the Internet, for each kind of address.
 * @typedef {{IPv4: Kind, IPv6: Kind}} Ways
 */

/** @type {Kind[]} from the best to the worst */
export const KINDS = ["open", "one_port", "some_nat", "symmetric", "silent", "unasked"];
/** @type {("IPv4" | "IPv6")[]} */
export const FAMILIES = ["IPv4", "IPv6"];

/**
 * Ask several STUN servers at once, from the same sockets, and return what stands in between.
 * @param {Bench} bench
 * @param {Map<string, StunAnswer>} answers of servers outside this network, each asked alone
 * @returns {Promise<Ways>}
 */
export async function probeWays(bench, answers) {
  const asked = [...answers].filter(([, { state }]) => state === "answers").map(([url]) => url);
  if (!asked.length) {
    const kind = answers.size ? "silent" : "unasked";
    return { IPv4: kind, IPv6: "unasked" };
  }
  const gathered = await gather(bench, { iceServers: [{ urls: asked }] }, STUN_S);
  /** @param {"IPv4" | "IPv6"} family */
  const hostsSeeing = (family) => new Set(asked.filter((url) => (
    answers.get(url)?.seen.some((address) => familyOf(address) === family))).map(hostOf)).size;
  return {
    IPv4: kindOf(gathered, "IPv4", hostsSeeing("IPv4")),
    IPv6: kindOf(gathered, "IPv6", hostsSeeing("IPv6")),
  };
}

/**
 * @param {Gathered} gathered from the same sockets, with all servers
 * @param {"IPv4" | "IPv6"} family
 * @param {number} count of hosts that have seen an address of this family
 * @returns {Kind}
 */
export function kindOf(gathered, family, count) {
  const isOfFamily = (/** @type {Candidate} */ { address }) => familyOf(address) === family;
  const hosts = gathered.candidates.filter((one) => one.type === "host" && isOfFamily(one));
  const seen = reflexive(gathered).filter(isOfFamily);
  if (!seen.length) {
    const isOpen = hosts.some(({ address }) => isPublic(address)) && isSeenAsItIs(gathered);
    return isOpen && !reflexive(gathered).length ? "open" : "unasked";
  }
  if (seen.every(({ address }) => hosts.some((host) => host.address === address))) return "open";
  const hasAllAnswers = count > 1 && gathered.isComplete
    && gathered.errors.every((error) => error.family && error.family !== family);
  const udpHosts = gathered.candidates.filter(({ type, protocol }) => (
    type === "host" && protocol === "udp"));
  const sockets = [...new Set(seen.map(({ socket }) => socket))];
  const kinds = sockets.map((socket) => kindOfSocket(
    seen.filter((one) => one.socket === socket), udpHosts.length === 1, hasAllAnswers));
  return KINDS.find((kind) => kinds.includes(kind)) ?? "unasked";
}

/**
 * @param {Candidate[]} seen as what servers saw a socket, or several that the browser hides
 * @param {boolean} isOnlySocket
 * @param {boolean} hasAllAnswers of servers at several hosts
 * @returns {Kind}
 */
function kindOfSocket(seen, isOnlySocket, hasAllAnswers) {
  const ports = new Set(seen.map(({ address, port }) => `${address} ${port}`)).size;
  if (ports === 1) return hasAllAnswers ? "one_port" : "some_nat";
  // Of several sockets, each may have a port. A foundation has one socket (RFC 8445, 5.1.1.3).
  const foundations = new Set(seen.map(({ foundation }) => foundation)).size;
  const isOne = seen[0].socket !== "" || isOnlySocket || foundations < ports;
  return isOne ? "symmetric" : "some_nat";
}

/**
 * Return "IPv4", "IPv6", or "" for a name, behind which a browser hides an address.
 * @param {string} address
 */
export function familyOf(address) {
  if (address.includes(":")) return "IPv6";
  return IPV4.test(address) ? "IPv4" : "";
}

/** @param {string} address */
function isPublic(address) {
  const family = familyOf(address);
  return family !== "" && !isPrivateHost(family === "IPv6" ? `[${address}]` : address);
}
