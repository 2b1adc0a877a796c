// @ts-check
/**
 * SDP: what of a contact's offer or answer WebRTC may see, and what of one's own may leave.
 *
 * WebRTC trusts what it is given: for a section of video it decodes video. So everything from
 * outside passes `checkSdp` first. PROTOCOL.md, "SDP".
 * @module
 */

import { Refused, UsageError } from "./errors.js";
import {
  MAX_CANDIDATES, MAX_CHANNEL_BYTES, MAX_FINGERPRINTS, MAX_SDP_CHARS, MAX_SDP_LINES,
  MAX_SDP_LINE_CHARS,
} from "./limits.js";

// What ends a line. Parsers differ in what else they take for it.
const END = "\r\n";
const LINE = /^[ -~]*$/;

const FIRST = "v=0";
const SECTION = /^m=application [0-9]{1,5} (?:UDP|TCP)\/DTLS\/SCTP webrtc-datachannel$/;

// -- Candidates --------------------------------------------------------------------------

const CANDIDATE = new RegExp(
  "^[A-Za-z0-9+/]{1,32} 1 (?:udp|UDP|tcp|TCP) [0-9]{1,10}"
  + " (?<address>[!-~]+) (?<port>[1-9][0-9]{0,4}) typ (?:host|srflx|prflx|relay)"
  + "(?: [!-~]+)*$");

// From 1 to 223: what comes after is multicast, reserved, or broadcast.
const FIRST_OCTET = "(?:[1-9]|[1-9][0-9]|1[0-9]{2}|2[01][0-9]|22[0-3])";
const OCTET = "(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])";
const IPV4 = new RegExp(`^${FIRST_OCTET}(?:\\.${OCTET}){3}$`);

const IPV6_GROUPS = 8;
const IPV6_GROUP = /^[0-9A-Fa-f]{1,4}$/;
const IPV6_MULTICAST = /^[Ff]{2}[0-9A-Fa-f]{2}:/;

// Browsers offer only such of TCP as open connections themselves, so no two of them ever meet. But
// they connect to whatever other one an SDP names, be it a service of their own machine.
const OVER_TCP = /^a=candidate:[^ ]* [^ ]* (?:tcp|TCP) /;

// Browsers hide their addresses behind names of multicast DNS. Any other name would be looked up.
const MDNS_NAME = /^[A-Za-z0-9-]{1,63}\.local$/;

const MAX_PORT = 65_535;

/** @param {string} value */
function isCandidate(value) {
  const found = CANDIDATE.exec(value)?.groups;
  if (!found || Number(found.port) > MAX_PORT) return false;
  const { address } = found;
  return IPV4.test(address) || MDNS_NAME.test(address) || isIpv6(address);
}

/**
 * Return whether a text is an IPv6 address of one host.
 * @param {string} text
 */
function isIpv6(text) {
  if (IPV6_MULTICAST.test(text)) return false;
  const [head, tail, ...more] = text.split("::");
  const groups = [...groupsOf(head), ...groupsOf(tail ?? "")];
  if (more.length || !groups.every((group) => IPV6_GROUP.test(group))) return false;
  if (tail === undefined) return groups.length === IPV6_GROUPS;
  return groups.length > 0 && groups.length < IPV6_GROUPS;
}

/** @param {string} text */
function groupsOf(text) {
  return text ? text.split(":") : [];
}

// -- Attributes --------------------------------------------------------------------------

/**
 * An attribute that WebRTC needs: the form of its value, and how often it stands there.
 * @typedef {{form: RegExp, least: number, most: number}} Attribute
 */

const FINGERPRINT = new RegExp(
  "^(?:sha-256 [0-9A-F]{2}(?::[0-9A-F]{2}){31}"
  + "|sha-384 [0-9A-F]{2}(?::[0-9A-F]{2}){47}"
  + "|sha-512 [0-9A-F]{2}(?::[0-9A-F]{2}){63})$");

/** @type {ReadonlyMap<string, Attribute>} */
const ATTRIBUTES = new Map([
  ["candidate", { form: CANDIDATE, least: 0, most: MAX_CANDIDATES }],
  ["fingerprint", { form: FINGERPRINT, least: 1, most: MAX_FINGERPRINTS }],
  ["ice-ufrag", { form: /^[A-Za-z0-9+/]{4,256}$/, least: 1, most: 1 }],
  ["ice-pwd", { form: /^[A-Za-z0-9+/]{22,256}$/, least: 1, most: 1 }],
  ["setup", { form: /^(?:actpass|active|passive)$/, least: 1, most: 1 }],
  ["sctp-port", { form: /^[0-9]{1,5}$/, least: 1, most: 1 }],
  ["max-message-size", { form: /^(?:0|[1-9][0-9]{0,19})$/, least: 0, most: 1 }],
  ["mid", { form: /^[!-~]{1,32}$/, least: 0, most: 1 }],
  ["group", { form: /^BUNDLE [!-~]{1,32}$/, least: 0, most: 1 }],
  ["ice-options", { form: /^[ -~]+$/, least: 0, most: 2 }],
  ["ice-lite", { form: /^$/, least: 0, most: 1 }],
  ["end-of-candidates", { form: /^$/, least: 0, most: 1 }],
]);

/**
 * Return whether a contact takes what the app may send. 0 is any size (RFC 8841, section 6).
 * @param {string} value
 */
function takesMessages(value) {
  return value === "0" || Number(value) >= MAX_CHANNEL_BYTES;
}

// What a form does not say.
/** @type {ReadonlyMap<string, (value: string) => boolean>} */
const CHECKS = new Map([["candidate", isCandidate], ["max-message-size", takesMessages]]);

// The other lines that WebRTC needs. `i`, `u`, `k` and the like are of no use to it.
const KINDS = ["v=", "o=", "s=", "t=", "c=", "b=", "m="];

/**
 * Return the name and the value of an attribute; the name of any other line is empty.
 * @param {string} line
 */
function splitAttribute(line) {
  if (!line.startsWith("a=")) return ["", ""];
  const [name, ...parts] = line.slice(2).split(":");
  return [name, parts.join(":")];
}

/** @param {string} line */
function isNeeded(line) {
  if (OVER_TCP.test(line)) return false;
  return KINDS.includes(line.slice(0, 2)) || ATTRIBUTES.has(splitAttribute(line)[0]);
}

// -- A contact's SDP ---------------------------------------------------------------------

/**
 * Return the lines of a contact's SDP that WebRTC may see; throw Refused (sdp).
 * @param {string} text
 */
export function checkSdp(text) {
  const lines = splitLines(text);
  const sections = lines.filter((line) => line.startsWith("m="));
  if (lines[0] !== FIRST || sections.length !== 1 || !SECTION.test(sections[0])) {
    throw new Refused("sdp", "not one section for a data channel");
  }
  const found = lines.map(splitAttribute).filter(([name]) => ATTRIBUTES.has(name));
  for (const [name, value] of found) checkValue(name, value);
  for (const [name, { least, most }] of ATTRIBUTES) {
    const count = found.filter(([other]) => other === name).length;
    if (count < least || count > most) throw new Refused("sdp", `${count} times ${name}`);
  }
  return joinLines(lines.filter(isNeeded));
}

/**
 * Return the lines of an SDP, at least one; throw Refused (sdp) for too many, or odd ones.
 * @param {string} text
 */
function splitLines(text) {
  if (text.length > MAX_SDP_CHARS || !text.endsWith(END)) {
    throw new Refused("sdp", "too long, or cut off");
  }
  const lines = text.slice(0, -END.length).split(END);
  if (lines.length > MAX_SDP_LINES) throw new Refused("sdp", `${lines.length} lines`);
  if (lines.some((line) => line.length > MAX_SDP_LINE_CHARS || !LINE.test(line))) {
    throw new Refused("sdp", "a line that is too long, or not of printable ASCII");
  }
  return lines;
}

/**
 * Throw Refused (sdp) unless the value of an attribute has its form.
 * @param {string} name
 * @param {string} value
 */
function checkValue(name, value) {
  const hasForm = ATTRIBUTES.get(name)?.form.test(value);
  const check = CHECKS.get(name);
  if (!hasForm || (check && !check(value))) {
    throw new Refused("sdp", `a wrong ${name}`);
  }
}

/** @param {string[]} lines */
function joinLines(lines) {
  return lines.join(END) + END;
}

// -- One's own SDP -----------------------------------------------------------------------

/**
 * Return one's own SDP as a contact takes it, with the most useful of its candidates.
 *
 * It has at most `mostBytes` as JSON, if that takes no more than leaving candidates out. With
 * `relayOnly` it has none but those of TURN servers. Throw UsageError for an SDP of anything but a
 * data channel.
 * @param {string} text
 * @param {{mostBytes?: number, relayOnly?: boolean}} [bounds]
 */
export function trimSdp(text, { mostBytes = MAX_SDP_CHARS, relayOnly = false } = {}) {
  const lines = text.split(END).filter(isNeeded);
  const candidates = lines.filter(isCandidateLine);
  const others = lines.filter((line) => !isCandidateLine(line));
  const isFree = (/** @type {string} */ line) => !relayOnly || line.includes(" typ relay");
  const good = candidates.filter(
    (line) => isCandidate(splitAttribute(line)[1]) && isFree(line));
  // They end the one section, where their order means nothing.
  const chosen = good.sort((one, other) => rank(one) - rank(other)).slice(0, MAX_CANDIDATES);
  const bytes = () => JSON.stringify(joinLines([...others, ...chosen])).length;
  while (chosen.length && bytes() > mostBytes) chosen.pop();
  try {
    return checkSdp(joinLines([...others, ...chosen]));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    throw new UsageError(`This SDP is not that of a data channel: ${error.message}.`);
  }
}

/** @param {string} line */
function isCandidateLine(line) {
  return splitAttribute(line)[0] === "candidate";
}

/**
 * Return the place of a candidate: those come first that networks apart need.
 * @param {string} line
 */
function rank(line) {
  return Number(line.includes(" typ host"));
}
