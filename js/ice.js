// @ts-check
/**
 * ICE: the servers that WebRTC may ask for the sake of a contact.
 *
 * A STUN server learns when somebody connects, and says under which address others see them. A TURN
 * server carries the connection. So the relays are asked where this side has its own mailboxes for
 * this very contact, and no others. PROTOCOL.md, CONNECT-14.
 * @module
 */

import { isObject } from "./encoding.js";
import { UsageError } from "./errors.js";
import { asIceServer } from "./turn.js";

/** @import { ContactRecord } from "./contact/record.js" */
/** @import { TurnServer } from "./turn.js" */

/**
 * Return whether a relay has a STUN server, by what it says of itself.
 * @param {Record<string, unknown>} document
 */
export function hasStun(document) {
  return document.stun === true;
}

/**
 * Return the servers for a contact: the STUN of one's own relays, the app's, the relays' TURN.
 * @param {Pick<ContactRecord, "relays">} record
 * @param {ReadonlySet<string>} withStun URLs of all relays that are known to have a STUN server
 * @param {ReadonlyMap<string, TurnServer>} lent what relays have lent for this contact, by URL
 * @param {RTCIceServer[]} more the app's
 * @returns {RTCIceServer[]}
 */
export function iceServers({ relays }, withStun, lent, more) {
  const urls = [...new Set(relays.map(([url]) => url))];
  const stun = urls.filter((url) => withStun.has(url)).map((url) => ({ urls: stunUrl(url) }));
  const turn = urls.map((url) => lent.get(url)).filter((server) => server !== undefined);
  return [...stun, ...more, ...turn.map(asIceServer)];
}

/**
 * Return whether there is a TURN server among ICE servers.
 * @param {RTCIceServer[]} servers
 */
export function hasTurn(servers) {
  return servers.flatMap(({ urls }) => urls).some((url) => /^turns?:/.test(url));
}

/** @param {string} url a relay's */
export function stunUrl(url) {
  const { protocol, hostname, port } = new URL(url);
  const usual = protocol === "https:" ? 443 : 80;
  return `stun:${hostname}:${port || usual}`;
}

// -- Servers that a user names -----------------------------------------------------------

// They are looked at when they are given: later nobody would know why no connection comes about.
// No error shows a password.

// RFC 7064 and RFC 7065.
const URL_FORM = /^(?:stuns?|turns?):(?<place>[^/?#@\s]+)(?:\?transport=(?:udp|tcp))?$/;
const MEMBERS = ["urls", "username", "credential", "credentialType"];

/**
 * Return ICE servers as they are; throw UsageError, which says what is wrong with which.
 * @param {unknown} servers
 * @returns {RTCIceServer[]}
 */
export function checkIceServers(servers) {
  if (!Array.isArray(servers)) throw new UsageError("ICE servers are a list.");
  for (const [place, server] of servers.entries()) checkServer(server, `ICE server ${place + 1}`);
  return servers;
}

/**
 * @param {any} server
 * @param {string} which
 */
function checkServer(server, which) {
  if (!isObject(server)) {
    throw new UsageError(`${which} is an object with urls, username and credential.`);
  }
  if (Object.keys(server).some((member) => !MEMBERS.includes(member))) {
    throw new UsageError(`${which} has a member that is none of ${MEMBERS.join(", ")}.`);
  }
  const urls = [server.urls ?? []].flat();
  if (!urls.length) throw new UsageError(`${which} has no urls: a URL, or a list of them.`);
  for (const url of urls) checkIceUrl(url, which);
  for (const member of ["username", "credential"]) {
    const value = server[member] ?? null;
    if (value === null && hasTurn([{ urls }])) {
      throw new UsageError(`${which}: a TURN server needs a ${member}.`);
    }
    if (value !== null && !(typeof value === "string" && value)) {
      throw new UsageError(`${which}: its ${member} is a text.`);
    }
  }
}

/**
 * @param {any} url
 * @param {string} which
 */
function checkIceUrl(url, which) {
  const place = typeof url === "string" ? URL_FORM.exec(url)?.groups?.place : undefined;
  if (!place || !isPlace(place)) {
    throw new UsageError(
      `${which}: a URL looks like stun:HOST:PORT, turn:HOST:PORT or`
      + " turns:HOST:PORT?transport=tcp, without a user.");
  }
}

/**
 * Return whether it is a host, perhaps with a port.
 * @param {string} place
 */
function isPlace(place) {
  try {
    return new URL(`https://${place}/`).port !== "0";
  } catch {
    return false;
  }
}
