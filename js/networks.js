// @ts-check
/**
 * Addresses that everybody can reach, and those of one's own machine and networks.
 *
 * Somebody who names a relay at 127.0.0.1 or 192.168.1.1 would have this client ask services that
 * only this machine or this network can reach. A page never learns where a name leads, so only what
 * a URL itself says is looked at. PROTOCOL.md, "Guards".
 * @module
 */

import { IPV4, LOOPBACK_NAME } from "./urls.js";

/**
 * Of IPv4, all but these is public: the first address, the bits that count, and what it is.
 * @type {[string, number, string][]}
 */
const NOT_PUBLIC = [
  ["0.0.0.0", 8, "this host (RFC 1122)"],
  ["10.0.0.0", 8, "private (RFC 1918)"],
  ["100.64.0.0", 10, "within a provider (RFC 6598)"],
  ["127.0.0.0", 8, "loopback (RFC 1122)"],
  ["169.254.0.0", 16, "link-local (RFC 3927)"],
  ["172.16.0.0", 12, "private (RFC 1918)"],
  ["192.0.0.0", 24, "for protocols (RFC 6890)"],
  ["192.168.0.0", 16, "private (RFC 1918)"],
  ["198.18.0.0", 15, "for measurements (RFC 2544)"],
  ["224.0.0.0", 3, "multicast, reserved, and broadcast (RFC 1112)"],
];
const BITS = 32;
const GROUPS = 8;
// Of IPv6, only 2000::/3 is public, and what stands for an address of IPv4 that is.
const FIRST_GLOBAL = 0x2000;
const LAST_GLOBAL = 0x3fff;
// 6to4 (RFC 3056): the address of IPv4 follows.
const SIX_TO_FOUR = 0x2002;
// IPv4-mapped (RFC 4291), and NAT64 (RFC 6052): the address of IPv4 is the last two groups.
const EMBEDDING = ["0,0,0,0,0,65535", "100,65435,0,0,0,0"];

/**
 * Return whether a host of `originOf` is of one's own machine or network, by itself.
 * @param {string} host
 */
export function isPrivateHost(host) {
  if (host === LOOPBACK_NAME || host.endsWith(`.${LOOPBACK_NAME}`)) return true;
  if (IPV4.test(host)) return !isPublicIpv4(numberOf(host));
  return host.startsWith("[") && !isPublicIpv6(groupsOf(host));
}

/** @param {number} number */
function isPublicIpv4(number) {
  return !NOT_PUBLIC.some(([first, bits]) => {
    const shift = 2 ** (BITS - bits);
    return Math.floor(number / shift) === Math.floor(numberOf(first) / shift);
  });
}

/** @param {number[]} groups */
function isPublicIpv6(groups) {
  const [first, second, third] = groups;
  if (first === SIX_TO_FOUR) return isPublicIpv4(join(second, third));
  if (EMBEDDING.includes(groups.slice(0, 6).join())) {
    return isPublicIpv4(join(groups[6], groups[7]));
  }
  // Teredo (RFC 4380) hides an address of IPv4, and nobody uses it any more.
  const isTeredo = first === 0x2001 && second === 0;
  return first >= FIRST_GLOBAL && first <= LAST_GLOBAL && !isTeredo;
}

/**
 * @param {number} high
 * @param {number} low
 */
function join(high, low) {
  return high * 0x10000 + low;
}

/** @param {string} host an IPv4 address */
function numberOf(host) {
  return host.split(".").reduce((number, octet) => 256 * number + Number(octet), 0);
}

/**
 * Return the eight numbers of an IPv6 address. The parser of URLs writes IPv4 in it as hexadecimal.
 * @param {string} host in brackets
 */
function groupsOf(host) {
  const short = new URL(`https://${host}/`).hostname.slice(1, -1);
  const [before, after] = short.split("::").map((half) => half.split(":").filter(Boolean));
  const missing = GROUPS - before.length - (after?.length ?? 0);
  const groups = [...before, ...Array(missing).fill("0"), ...(after ?? [])];
  return groups.map((group) => parseInt(group, 16));
}
