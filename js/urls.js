// @ts-check
/**
 * URLs of relays: which of them are URLs at all, and for every parser the same.
 *
 * They come from outside, and several parsers read them: this one, that of `fetch`, and in Python
 * a third one. So only what all of them read alike is let through. PROTOCOL.md, "Addresses and
 * links".
 * @module
 */

import { Refused } from "./errors.js";
import { MAX_HOST_CHARS, MAX_LABEL_CHARS, MAX_URL_CHARS } from "./limits.js";

const SCHEME = /(?<scheme>https?):\/\//;
const HOST = /(?<host>\[[\dA-Fa-f:.]+\]|[A-Za-z\d.-]+)/;
const PORT = /(?::(?<port>[1-9]\d{0,4}))?/;
const PATH = /(?<path>(?:\/(?:[\w.~!$&'()*+,;=:@-]|%[\dA-Fa-f]{2})*)*)/;

// No user, no query, no fragment.
const URL_FORM = new RegExp(`^${SCHEME.source}${HOST.source}${PORT.source}${PATH.source}$`);
const LABEL = /^[A-Za-z\d](?:[A-Za-z\d-]*[A-Za-z\d])?$/;
// Where the last label is one of these, browsers take the whole host for a number.
const NUMBER = /^(?:\d+|0[Xx][\dA-Fa-f]*)$/;
const OCTET = /(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)/;
export const IPV4 = new RegExp(`^${OCTET.source}(?:\\.${OCTET.source}){3}$`);
export const LOOPBACK_NAME = "localhost";
// Names beyond ASCII. Which of them are good depends on a parser's version of Unicode.
const IDNA_PREFIX = "xn--";
// A parser takes a segment of dots away, with the one before it.
const DOTS = [".", ".."];
const MAX_PORT = 65_535;
const PORTS = { http: "80", https: "443" };

/**
 * Throw Refused (address) unless a client may send requests to a URL: with https, with http on this
 * machine, or with http if the app allows it.
 * @param {string} url
 * @param {boolean} allowHttp
 */
export function checkUrl(url, allowHttp) {
  const { scheme, host } = originOf(url);
  if (scheme === "http" && !allowHttp && !isLoopback(host)) {
    throw new Refused("address", "http is for a relay on this machine, elsewhere it is https");
  }
}

/**
 * Return scheme, host (in small letters, an IPv6 address in brackets) and port of a relay's URL.
 * Throw Refused (address) for another text.
 * @param {string} url
 */
export function originOf(url) {
  const { groups } = (url.length <= MAX_URL_CHARS && URL_FORM.exec(url)) || {};
  if (!groups || Number(groups.port ?? 1) > MAX_PORT) {
    throw new Refused("address", "a relay's URL looks like https://relay.example.com/");
  }
  if (!isHost(groups.host) || hasDots(groups.path) || !isUrl(url)) {
    throw new Refused("address", "the URL of its relay is none that all programs read alike");
  }
  const scheme = groups.scheme === "http" ? "http" : "https";
  return { scheme, host: groups.host.toLowerCase(), port: groups.port ?? PORTS[scheme] };
}

/**
 * Return whether a URL has the origin of one of the others.
 * @param {string} url
 * @param {string[]} others
 */
export function isSameServer(url, others) {
  const { scheme, host, port } = originOf(url);
  return others.some((other) => {
    const known = knownOrigin(other);
    return known?.scheme === scheme && known.host === host && known.port === port;
  });
}

/** @param {string} url */
function knownOrigin(url) {
  try {
    return originOf(url);
  } catch {
    return null;
  }
}

/**
 * Return whether a host is an address in its usual form, or a name in ASCII. The parser of the
 * browser knows IPv6, but for zeros before the numbers of an IPv4 address in it: Chromium lets
 * them through.
 * @param {string} host
 */
function isHost(host) {
  if (host.startsWith("[")) {
    const last = host.slice(host.lastIndexOf(":") + 1, -1);
    return !last.includes(".") || IPV4.test(last);
  }
  const labels = host.split(".");
  if (NUMBER.test(labels[labels.length - 1])) return IPV4.test(host);
  return host.length <= MAX_HOST_CHARS && labels.every(isLabel);
}

/** @param {string} label */
function isLabel(label) {
  if (label.length > MAX_LABEL_CHARS || !LABEL.test(label)) return false;
  return !label.toLowerCase().startsWith(IDNA_PREFIX);
}

/**
 * Return whether a path has a segment that a parser would take away.
 * @param {string} path
 */
function hasDots(path) {
  const segments = path.replace(/%2e/gi, ".").split("/");
  return segments.some((segment) => DOTS.includes(segment));
}

/** @param {string} url */
function isUrl(url) {
  try {
    return Boolean(new URL(url));
  } catch {
    return false;
  }
}

/** @param {string} host */
function isLoopback(host) {
  if (host === LOOPBACK_NAME || host === "[::1]") return true;
  return host.startsWith("127.") && IPV4.test(host);
}
