// @ts-check
/**
 * The record of a contact: everything that survives the page.
 *
 * It is an object for the structured clone of IndexedDB, keys included.
 * @module
 */

import { isObject } from "../encoding.js";
import { RecordError } from "../errors.js";
import { parseAddress } from "../links.js";
import { NUMBERED_FOR, PAIRING_STATES } from "./rules.js";

/** @import { Mailbox, Relay } from "../links.js" */
/** @import { Key } from "../suite.js" */
/** @import { Role } from "./rules.js" */

/**
 * An address of one's own, with the private keys of its mailboxes in order. A former one has the
 * time when it was left.
 * @typedef {{address: string, keys: Key[], leftUs?: number}} OwnAddress
 *
 * @typedef {object} ContactRecord
 * @property {number} version
 * @property {Role} role the inviter made the link, the opener opened it
 * @property {string} state a PairingState
 * @property {string} name
 * @property {Relay[]} relays for new addresses of one's own
 * @property {Key} privateKey signs
 * @property {string} signer its public key
 * @property {number} expiresUs of the invitation, or of the tombstone
 * @property {string} invitation
 * @property {string} linkHash of the invitation, which goes sooner
 * @property {string} hello the opener's, with its proof
 * @property {string} helloHash of the one that counts
 * @property {string} welcome the inviter's
 * @property {string} welcomeHash
 * @property {string} r the inviter's
 * @property {OwnAddress | null} invited the address in the link
 * @property {OwnAddress | null} current
 * @property {OwnAddress | null} pending was announced, and nothing came there yet
 * @property {OwnAddress[]} replaced were announced, the oldest first; the other may know no newer
 * @property {OwnAddress[]} former left for a newer one, the oldest first
 * @property {number} rotatedUs
 * @property {string} contact the other's signing key
 * @property {string} contactAddress
 * @property {string} app its identifier, if the link names one
 * @property {number} protocol the version that both speak
 * @property {number[]} comparison
 * @property {boolean} verified the user has compared: both have the same string
 * @property {boolean} differs the user has compared: the other has another string
 * @property {number} seq the last that was sent
 * @property {number} seenSeq the last that was accepted
 * @property {string[]} usedTo the signing keys of further openers who were told, the newest last
 * @property {string} why it ended: a key of EVENTS
 * @property {string[]} namedRelays the URLs that the user has named, of relays with own addresses
 * @property {Key} oldPrivateKey vouches for the present one until the contact has answered
 * @property {string} oldSigner its public key
 * @property {Key} linkPrivateKey that of the link, once a renewal has replaced it: it answers who
 *   opens the link
 * @property {string} linkSigner its public key
 * @property {string[]} renewalHashes of what has told of the present one, the newest last
 * @property {string} formerContact the other's signing key before the present one
 * @property {string} keyNews one of KEY_NEWS, until the user says that all is well
 * @property {string[]} met the contact's relays that were last written to as the user wanted
 */

export const RECORD_VERSION = 1;

/**
 * What the user has to hear of the contact's key: nothing, that it is a new one, or that two
 * devices have named one each.
 */
export const KEY_NEWS = ["", "renewed", "copied"];

/**
 * No renewal is under way.
 * @type {Pick<ContactRecord, "oldPrivateKey" | "oldSigner" | "renewalHashes">}
 */
export const NO_OLD_KEY = { oldPrivateKey: null, oldSigner: "", renewalHashes: [] };

/**
 * The signing key is that of the link, or the link is no more.
 * @type {Pick<ContactRecord, "linkPrivateKey" | "linkSigner">}
 */
export const NO_LINK_KEY = { linkPrivateKey: null, linkSigner: "" };

/** A record of which nothing is known. @type {ContactRecord} */
export const BLANK = {
  version: RECORD_VERSION,
  role: "inviter",
  state: "",
  name: "",
  relays: [],
  privateKey: null,
  signer: "",
  expiresUs: 0,
  invitation: "",
  linkHash: "",
  hello: "",
  helloHash: "",
  welcome: "",
  welcomeHash: "",
  r: "",
  invited: null,
  current: null,
  pending: null,
  replaced: [],
  former: [],
  rotatedUs: 0,
  contact: "",
  contactAddress: "",
  app: "",
  protocol: 1,
  comparison: [],
  verified: false,
  differs: false,
  seq: 0,
  seenSeq: 0,
  usedTo: [],
  why: "",
  namedRelays: [],
  ...NO_OLD_KEY,
  ...NO_LINK_KEY,
  formerContact: "",
  keyNews: "",
  met: [],
};

/** What is in a record was checked when it came. */
export const KNOWN = { allowHttp: true };

/**
 * Return a record with what has come of comparing the string by voice.
 *
 * Who has found it the same has spoken with the contact, and nothing of its key is news.
 * @param {ContactRecord} record
 * @param {boolean} same
 */
export function compared(record, same) {
  const keyNews = same ? "" : record.keyNews;
  return { ...record, verified: same, differs: !same, keyNews };
}

/**
 * Return the public keys of all signing keys in a record.
 * @param {ContactRecord} record
 */
export function signersOf({ signer, oldSigner, linkSigner }) {
  return [signer, oldSigner, linkSigner].filter((key) => key !== "");
}

/**
 * Say whether the contact takes nothing any more from the signing key in the link.
 *
 * Either it has heard of a newer one, or the sharing has ended.
 * @param {ContactRecord} record
 */
export function isLinkKeyIdle({ state, oldSigner, linkSigner }) {
  return state === "unshared" || (linkSigner !== "" && linkSigner !== oldSigner);
}

/**
 * Return one's own addresses, whose mailboxes are polled.
 * @param {ContactRecord} record
 */
export function addressesOf({ invited, pending, replaced, current, former }) {
  return [invited, pending, ...replaced, current, ...former].filter((own) => own !== null);
}

/**
 * Return the mailboxes of an own address.
 * @param {OwnAddress} own
 */
export function mailboxesOf({ address }) {
  return parseAddress(address, KNOWN);
}

/**
 * Return the mailboxes of an own address, each with its private key.
 * @param {OwnAddress} own
 * @returns {[Mailbox, Key][]}
 */
export function keyedMailboxes(own) {
  return mailboxesOf(own).map((mailbox, place) => [mailbox, own.keys[place]]);
}

/**
 * Return a record as it was kept; throw RecordError.
 * @param {any} kept
 * @returns {ContactRecord}
 */
export function checkRecord(kept) {
  if (isObject(kept) && kept.version > RECORD_VERSION) {
    throw new RecordError("A saved contact is of another version of Connectoid.");
  }
  // Older records lack what came later.
  try {
    const record = withLater(kept);
    if (isRecord(record)) return record;
  } catch {
    // A member is not even like what it should be.
  }
  throw new RecordError("A saved contact is damaged.");
}

/**
 * Return a record with what older ones lack. They have `relaysNamed` in place of `namedRelays`, one
 * address or none as `former`, and one `leftUs` for all of them. The contact's relays are met.
 * @param {any} kept
 */
function withLater(kept) {
  if (!isObject(kept)) return kept;
  const { relaysNamed, leftUs = 0, ...others } = kept;
  const former = [others.former].flat().filter((own) => own !== null);
  const namedRelays = relaysNamed === true ? urlsOf(others.relays) : [];
  return {
    differs: false, protocol: 1, app: "", replaced: [], namedRelays, ...NO_OLD_KEY,
    ...NO_LINK_KEY, formerContact: "", keyNews: "", met: urlsAt(others.contactAddress),
    ...others,
    former: former.map((own) => ({ leftUs, ...own })),
  };
}

/**
 * Return the URLs of relays.
 * @param {Relay[]} relays
 */
export function urlsOf(relays) {
  return relays.map(([url]) => url);
}

/**
 * Return the URLs of the relays in an address, none for the one that is not known yet.
 * @param {string} address
 */
export function urlsAt(address) {
  if (!address) return [];
  return [...new Set(parseAddress(address, KNOWN).map(({ url }) => url))];
}

/**
 * @param {any} record
 * @returns {record is ContactRecord}
 */
function isRecord(record) {
  /** @type {OwnAddress[]} */
  const former = record.former;
  return Object.entries(BLANK).every(([name, blank]) => isLike(record[name], blank))
    && Object.hasOwn(PAIRING_STATES, record.state)
    && Object.hasOwn(NUMBERED_FOR, record.role)
    && KEY_NEWS.includes(record.keyNews)
    && addressesOf(record).every(isOwnAddress)
    && former.every(({ leftUs }) => Number.isInteger(leftUs));
}

/**
 * @param {unknown} member
 * @param {unknown} blank
 */
function isLike(member, blank) {
  return blank === null || typeof member === typeof blank;
}

/** @param {OwnAddress} own */
function isOwnAddress(own) {
  return mailboxesOf(own).length === own.keys.length;
}
